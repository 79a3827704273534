//! Caches: on a board where nothing snoops, the drivers clean and invalidate whatever devices and walkers look at; where
//! everything snoops, nobody has to; and when maintenance is left out, it is noticed.

mod common;

use std::sync::Arc;

use common::workload::{self, Coherent};
use common::{Board, RAM, coherent, map, thesis};
use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::{EventKind, Machine, Memory, Options};
use portcullis_bus::StaleRead;
use portcullis_bus::coherency::Maintenance;
use portcullis_drivers::smmuv2::{self, DomainConfig, DomainOptions, SmmuV2, StreamMatch};
use portcullis_drivers::zdma::{self, DescriptorPool, POOL_BYTES, Zdma};
use portcullis_hal::{Block, DmaMemory};
use portcullis_iommu::{Process, ProcessConfig, Prot};

const IN: u64 = 0x7000_0000;

fn stale(machine: &Machine) -> Vec<StaleRead> {
    machine.tracer().note_stale_reads(machine.memory());
    let (events, _) = machine.tracer().take();
    let stale = |kind| if let EventKind::Stale(s) = kind { Some(s) } else { None };
    events.into_iter().filter_map(|e| stale(e.kind)).collect()
}

#[test]
fn no_path_of_a_driver_leaves_anything_stale_where_nothing_snoops() {
    let board = Board::cached();
    workload::run(&board, Coherent::Nothing);
    let stale = stale(board.machine());
    assert!(stale.is_empty(), "{} stale reads, the first: {}", stale.len(), stale[0]);
}

#[test]
fn where_everything_snoops_nobody_has_to_maintain_caches() {
    let board = Board::of(coherent(), true);
    workload::run(&board, Coherent::Everything);
    let stale = stale(board.machine());
    assert!(stale.is_empty(), "{} stale reads, the first: {}", stale.len(), stale[0]);
}

/// Memory whose owner forgets to clean.
#[derive(Clone)]
struct Forgetful(Memory);

impl DmaMemory for Forgetful {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        self.0.alloc(len, align)
    }
    fn free(&self, block: Block) {
        self.0.free(block);
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.0.load64(pa)
    }
    fn store64(&self, pa: Pa, value: u64) {
        self.0.store64(pa, value);
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.0.cas64(pa, expected, new)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.0.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.0.write(pa, buf);
    }
    fn clean(&self, _: Pa, _: usize) {}
    fn invalidate(&self, pa: Pa, len: usize) {
        self.0.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.0.wmb();
    }
}

fn machine(description: portcullis_board::MachineDescription) -> Arc<Machine> {
    Machine::build(description, Options { cpu_cache: true, ..Options::default() }).unwrap()
}

/// A channel behind an SMMU, with drivers over the given memories; a copy of eight bytes by a list in memory. Returns
/// whether it went well.
fn copy<T, D>(machine: &Arc<Machine>, tables: T, descriptors: D) -> bool
where
    T: DmaMemory + Clone + 'static,
    D: DmaMemory,
{
    let engine = machine.engine("lpd-dma0").unwrap();
    let options = smmuv2::Options {
        coherent_walk: Some(machine.description().smmus[0].dma_coherent),
        ..smmuv2::Options::new(0x2_0000, "arm,mmu-500")
    };
    let registers = machine.smmu_registers().unwrap();
    let smmu = SmmuV2::probe(registers, tables, machine.clock(), options).unwrap();
    let master = smmu.add_master(&[StreamMatch::exact(engine.stream.get())]).unwrap();
    let config = DomainConfig::Stage1(Default::default());
    let domain = smmu.new_domain(config, DomainOptions::default()).unwrap();
    smmu.attach(&master, &domain).unwrap();
    let block = descriptors.alloc(POOL_BYTES, 4096).unwrap();
    let pool = DescriptorPool { block, iova: Iova(0x10_0000) };
    let (read, write) = match engine.coherent {
        true => (Prot::READ.cached(), Prot::RW.cached()),
        false => (Prot::READ, Prot::RW),
    };
    domain.map(pool.iova, block.pa, 0x1000, read.noexec()).unwrap();
    domain.map(Iova(IN), Pa(RAM), 0x1000, write.noexec()).unwrap();
    let config = zdma::Config { coherent: engine.coherent };
    let channel = Zdma::new(machine.engine_registers(engine), descriptors, pool, config).unwrap();
    let memory = machine.dma_memory();
    memory.write(Pa(RAM), b"the data");
    if !engine.coherent {
        memory.clean(Pa(RAM), 8);
    }
    let cookie = channel.submit_memcpy(Iova(IN + 0x800), Iova(IN), 8).unwrap();
    channel.issue_pending();
    let done = channel.wait(cookie, &machine.clock(), 100_000);
    let mut seen = [0; 8];
    memory.read(Pa(RAM + 0x800), &mut seen);
    done.is_ok_and(|d| d.result.is_ok()) && &seen == b"the data"
}

#[test]
fn tables_that_are_not_cleaned_are_noticed_at_the_walker() {
    let machine = machine(thesis());
    assert!(!copy(&machine, Forgetful(machine.dma_memory()), machine.dma_memory()));
    let stale = stale(&machine);
    assert!(!stale.is_empty());
    assert!(stale.iter().all(|s| &*s.reader == "smmu table walker" && s.missing == Maintenance::Clean));
    assert!(stale.iter().all(|s| s.seen == 0 && s.current != 0), "{stale:#x?}");
}

#[test]
fn descriptors_that_are_not_cleaned_are_noticed_at_the_channel() {
    let machine = machine(thesis());
    assert!(!copy(&machine, machine.dma_memory(), Forgetful(machine.dma_memory())));
    let stale = stale(&machine);
    assert!(!stale.is_empty());
    assert!(stale.iter().all(|s| &*s.reader == "lpd-dma0" && s.missing == Maintenance::Clean), "{stale:#x?}");
}

#[test]
fn nothing_is_stale_with_maintenance_or_where_hardware_snoops() {
    let one = machine(thesis());
    assert!(copy(&one, one.dma_memory(), one.dma_memory()));
    assert_eq!(stale(&one), []);
    let snooping = machine(coherent());
    assert!(copy(&snooping, Forgetful(snooping.dma_memory()), Forgetful(snooping.dma_memory())));
    assert_eq!(stale(&snooping), []);
}

#[test]
fn buffers_that_are_not_maintained_are_noticed_on_either_side() {
    let board = Board::cached();
    let domain = board.domain_for("fpd-dma0");
    map(&domain, IN, RAM, 0x2000);
    let memory = board.machine().memory();
    board.put(RAM, &[0; 0x2000]);
    // Not cleaned: the device reads what was there before.
    board.machine().cpu_write(Pa(RAM), &7u64.to_le_bytes()).unwrap();
    assert_eq!(board.copy("fpd-dma0", IN + 0x1000, IN, 8).result, Ok(()));
    let seen = stale(board.machine());
    let [s] = seen.as_slice() else { panic!("{seen:#?}") };
    assert_eq!((&*s.reader, s.pa, s.seen, s.current), ("fpd-dma0", RAM, 0, 7));
    memory.clean(Pa(RAM), 8);
    // Not invalidated: the CPU reads what it read before.
    let mut bytes = [0; 8];
    board.machine().cpu_read(Pa(RAM + 0x1000), &mut bytes).unwrap();
    assert_eq!(board.copy("fpd-dma0", IN + 0x1000, IN, 8).result, Ok(()));
    assert_eq!(stale(board.machine()), []);
    board.machine().cpu_read(Pa(RAM + 0x1000), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);
    let seen = stale(board.machine());
    let [s] = seen.as_slice() else { panic!("{seen:#?}") };
    assert_eq!((&*s.reader, s.current, s.missing), ("cpu", 7, Maintenance::Invalidate));
    memory.invalidate(Pa(RAM + 0x1000), 8);
    board.machine().cpu_read(Pa(RAM + 0x1000), &mut bytes).unwrap();
    assert_eq!(bytes, 7u64.to_le_bytes());
}

#[test]
fn a_process_with_tables_for_a_snooping_walker_is_not_seen_by_one_that_does_not() {
    let board = Board::cached();
    let config = ProcessConfig { coherent_walk: true, ..ProcessConfig::default() };
    let process = Process::new(board.machine().dma_memory(), config).unwrap();
    let va = process.mmap(0x1000, Prot::RW.noexec()).unwrap();
    process.clean(va, 0x1000).unwrap();
    board.system.core().bind(board.device("fpd-dma0"), process.clone()).unwrap();
    assert!(board.copy_simple("fpd-dma0", va.get() + 0x800, va.get(), 8).result.is_err());
    let seen = stale(board.machine());
    assert!(!seen.is_empty() && seen.iter().all(|s| &*s.reader == "smmu table walker"), "{seen:#?}");
    // What the thesis did: clean all tables by hand.
    process.clean_tables();
    board.faults();
    assert_eq!(board.copy_simple("fpd-dma0", va.get() + 0x800, va.get(), 8).result, Ok(()));
    assert_eq!(stale(board.machine()), []);
}

/// The record explains transactions before they happen; that look must not count as somebody's reading.
#[test]
fn explaining_reads_nothing() {
    let board = Board::cached();
    let domain = board.domain_for("fpd-dma0");
    map(&domain, IN, RAM, 0x2000);
    board.works("fpd-dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    stale(board.machine());
    // The tables change in the CPU's cache only, and the TLB still has the answer: the walker reads nothing.
    let root = domain.table_root().unwrap();
    let memory = board.machine().dma_memory();
    memory.store64(root.ttbr0, memory.load64(root.ttbr0) ^ 0x1000);
    assert_eq!(board.copy("fpd-dma0", IN + 0x1000, IN, 64).result, Ok(()));
    assert_eq!(stale(board.machine()), []);
    memory.invalidate(root.ttbr0, 8);
}
