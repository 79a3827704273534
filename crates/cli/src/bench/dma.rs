//! Goals 12 and 13, and those of the board with two AXI DMAs: addresses, mappings, a loop through descriptors, two virtual
//! machines on two threads.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use portcullis_arch::axidma::{BdControl, Descriptor, Dmacr, MM2S, S2MM, bd, reg};
use portcullis_arch::{Asid, Iova, Pa};
use portcullis_board::MachineDescription;
use portcullis_board::guest::Guest;
use portcullis_board::os::host::DmaOptions;
use portcullis_board::os::proxy::LoopClient as _;
use portcullis_board::sim::{EngineKind, EngineSlot, Machine, Memory, Options, Pool};
use portcullis_board::system::{BootOptions, System};
use portcullis_bus::{Activity, SystemMemory};
use portcullis_hal::{Block, DmaMemory, Mmio as _};
use portcullis_iommu::dma::{
    Coherent, DeviceConfig, Direction, DmaAttrs, DmaDevice, DmaLocal, DmaSpace, Mode, SpaceConfig,
};
use portcullis_iommu::iova::{IovaConfig, IovaDomain};
use portcullis_iommu::{
    DefaultDomain, Domain, DomainKind, DomainOps, Granule, InstanceId, IommuError, Prot, TableRoot,
};
use portcullis_pgtable::{Config, NoFlush, PageTable, Stage1};
use portcullis_proxy::test::Arguments;

use super::timing::{Random, against, in_rmw, once, scaling, stay_on_cpu, together};
use super::{Figure, Goal};
use crate::dma_proxy::guest;
use crate::shipped::choose;

const LIMIT: Iova = Iova((1 << 48) - 1);
const PAGE: u64 = 4096;

fn in_rmw_figure(goal_number: u32, what: &str, (ns, ratio): (f64, f64), goal: f64) -> Figure {
    Figure {
        goal_number,
        what: what.into(),
        figure: ns,
        figure_unit: "ns",
        ratio,
        ratio_unit: "RMW",
        goal: Goal::AtMost(goal),
    }
}

fn two_threads(goal_number: u32, what: &str, (best, ratio): (f64, f64), unit: &'static str) -> Figure {
    Figure {
        goal_number,
        what: what.into(),
        figure: best / 1e6,
        figure_unit: unit,
        ratio,
        ratio_unit: "x one",
        goal: Goal::AtLeast(1.8),
    }
}

/// Goal 12.
pub fn addresses() -> Vec<Figure> {
    const N: u64 = 1 << 16;
    let domain = |cpus| {
        let config = IovaConfig { granule: PAGE, first: Iova(0), last: LIMIT, cpus };
        Arc::new(IovaDomain::new(config).expect("48 bits of 4K pages"))
    };
    let shared = domain(1);
    let mut local = shared.local();
    let cached = in_rmw(N, || {
        for _ in 0..N {
            let iova = local.alloc(black_box(PAGE), LIMIT).expect("room");
            local.free(black_box(iova), PAGE).expect("in use");
        }
    });
    let tree = domain(0);
    let mut random = Random::new(7);
    let mut length = move || (1 + (random.next() >> 11) % 64) * PAGE;
    let mut pick = Random::new(11);
    let mut live = Vec::new();
    while live.len() < 10_000 {
        let len = length();
        live.push((tree.alloc(0, len, LIMIT).expect("room"), len));
    }
    let mut step = |n: u64| {
        for _ in 0..n {
            let i = ((pick.next() >> 11) % 10_000) as usize;
            let (iova, len) = live[i];
            tree.free(0, iova, len).expect("in use");
            let len = length();
            live[i] = (tree.alloc(0, len, LIMIT).expect("room"), len);
        }
    };
    step(200_000);
    let slow = in_rmw(N, || step(N));
    vec![
        in_rmw_figure(12, "IOVA alloc+free, cached", cached, 1.8),
        in_rmw_figure(12, "IOVA alloc+free, tree, 10k live, random sizes", slow, 43.0),
    ]
}

/// The board with two AXI DMAs, without a record of what happens. Everything snoops, so that what is measured is not the
/// walk over cache lines.
fn system(lazy: bool) -> System {
    let chosen = choose("zynqmp-hp0-2dma").expect("a shipped board");
    let mut description = MachineDescription::from_tree(&chosen.tree).expect("a good tree");
    description.smmus.iter_mut().for_each(|s| s.dma_coherent = true);
    description.axi_dmas.iter_mut().for_each(|d| d.dma_coherent = true);
    description.dma_proxies.iter_mut().for_each(|p| p.dma_coherent = true);
    let options = Options { plain_ports: true, ..Options::default() };
    let machine = Machine::build(description, options).expect("a board that can be built");
    machine.tracer().mute(true);
    let boot = BootOptions {
        default_domain: DefaultDomain::Translated,
        dma: DmaOptions { lazy, debug: false },
        ..BootOptions::default()
    };
    System::boot(machine, &boot).expect("a board that boots")
}

/// Mappings a second of `threads` threads, with a part of the space of their own.
fn mapped_together(device: &DmaDevice<Memory>, space: &Arc<DmaSpace>, threads: usize) -> f64 {
    together(threads, |_| {
        let mut local = space.local();
        move || {
            const N: u64 = 1000;
            map_and_unmap(&mut local, device, N);
            N
        }
    })
}

fn map_and_unmap(local: &mut DmaLocal, device: &DmaDevice<Memory>, n: u64) {
    for _ in 0..n {
        let pa = black_box(Pa(0x1234_5000));
        let iova = local.map_single(device, pa, PAGE, Direction::ToDevice, DmaAttrs::NONE).expect("room");
        local.unmap_single(device, iova, PAGE, Direction::ToDevice, DmaAttrs::NONE).expect("mapped");
    }
}

/// Plain memory for tables, from address 0 on, without the decoding of addresses that a board's memory does.
#[derive(Clone)]
struct Plain(Arc<(Vec<Page>, Mutex<Vec<u64>>)>);

/// Aligned as memory is, so that what two threads use in a table lies on different cache lines of the host, too.
#[repr(align(4096))]
struct Page([AtomicU64; 512]);

impl Plain {
    fn new(tables: u64) -> Self {
        let pages = (0..tables).map(|_| Page(std::array::from_fn(|_| AtomicU64::new(0)))).collect();
        let free = (0..tables).rev().map(|table| table << 12).collect();
        Self(Arc::new((pages, Mutex::new(free))))
    }
    #[inline]
    fn word(&self, pa: Pa) -> &AtomicU64 {
        &self.0.0[(pa.get() >> 12) as usize].0[(pa.get() >> 3 & 511) as usize]
    }
}

impl DmaMemory for Plain {
    fn alloc(&self, len: usize, _: usize) -> Option<Block> {
        let mut free = self.0.1.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Block { pa: Pa(free.pop()?), len })
    }
    fn free(&self, block: Block) {
        self.0.1.lock().unwrap_or_else(PoisonError::into_inner).push(block.pa.get());
    }
    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.word(pa).load(Ordering::Acquire)
    }
    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        self.word(pa).store(value, Ordering::Release);
    }
    #[inline]
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.word(pa).compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
    fn read(&self, _: Pa, _: &mut [u8]) {}
    fn write(&self, _: Pa, _: &[u8]) {}
    fn clean(&self, _: Pa, _: usize) {}
    fn invalidate(&self, _: Pa, _: usize) {}
    #[inline]
    fn wmb(&self) {
        std::sync::atomic::fence(Ordering::Release);
    }
}

/// A domain of real tables and no SMMU: what the API and the tables cost, without waiting for hardware.
struct Tables(PageTable<Stage1, Plain>);

impl DomainOps for Tables {
    fn kind(&self) -> DomainKind {
        DomainKind::Stage1
    }
    fn bank(&self) -> Option<u8> {
        None
    }
    fn asid(&self) -> Option<Asid> {
        None
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.0.map(iova, pa, len, prot).map_err(IommuError::Map)
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.0.unmap(iova, len, &mut NoFlush).map_err(IommuError::Unmap)
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.unmap(iova, len)
    }
    fn protect(&self, iova: Iova, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.0.protect(iova, len, prot, &mut NoFlush).map_err(IommuError::Protect)
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        Some(self.0.lookup(iova)?.pa)
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        Some(self.0.input_range())
    }
    fn page_sizes(&self) -> u64 {
        self.0.page_sizes()
    }
    fn table_root(&self) -> Option<TableRoot> {
        None
    }
    fn invalidate(&self, _: Iova, _: u64) -> Result<(), IommuError> {
        Ok(())
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        Ok(())
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Ok(())
    }
}

/// Goal 13: the DMA API, lazy, first with tables in plain memory and no hardware to wait for, as the peer was measured; then on a
/// board, over the SMMUv2's driver and model, whose flush waits for every port.
pub fn mappings() -> Vec<Figure> {
    let memory = SystemMemory::new(&[(0, 1 << 24)]).expect("valid region");
    let memory = Memory::new(memory, Arc::new(Pool::new(Pa(0), 24)));
    let table = PageTable::new(Plain::new(64), Config::new(Granule::K4, 48, 48)).expect("48 bits, 4K");
    let domain = Domain::new(Arc::new(Tables(table)), InstanceId(0));
    let config = SpaceConfig { mode: Mode::Lazy, ..SpaceConfig::default() };
    let space = DmaSpace::new(domain, config).expect("a domain with a table");
    let config = DeviceConfig::default().coherent(true).mask(48);
    let device = DmaDevice::translated("bench", space.clone(), memory, config);
    let mut figures = mapped(13, "DMA map+unmap 4K, lazy", &device, &space);

    let system = system(true);
    let stack = system.os().axi().get("axidma0").expect("bound at boot");
    let device = stack.dma().clone();
    let space = device.space().expect("a domain that translates").clone();
    figures.extend(mapped(0, "the same on a board, over its SMMUv2", &device, &space));
    figures
}

fn mapped(number: u32, what: &str, device: &DmaDevice<Memory>, space: &Arc<DmaSpace>) -> Vec<Figure> {
    const N: u64 = 1 << 16;
    let mut local = space.local();
    let one = in_rmw(N, || map_and_unmap(&mut local, device, N));
    drop(local);
    let mut figures = vec![
        in_rmw_figure(number, what, one, 6.3),
        two_threads(
            number,
            &format!("{what}, two threads"),
            scaling(|n| mapped_together(device, space, n)),
            "M/s",
        ),
    ];
    if number == 0 {
        figures.iter_mut().for_each(|f| f.goal = Goal::None);
    }
    figures
}

/// Descriptors for a loop of `len` bytes, and a way to run it.
struct Loop<'a> {
    system: &'a System,
    slot: usize,
    registers: portcullis_board::sim::Registers,
    ring: Coherent<Memory>,
    buffers: Coherent<Memory>,
    len: u64,
}

impl<'a> Loop<'a> {
    fn new(system: &'a System, len: u64) -> Self {
        let machine = system.machine();
        let mut found = machine.engines().iter().enumerate();
        let core = |(_, e): &(usize, &EngineSlot)| matches!(e.engine, EngineKind::AxiDma(_));
        let (slot, engine) = found.find(core).expect("the board has cores");
        let device = system.os().axi().get(&engine.name).expect("bound at boot").dma().clone();
        let ring = device.alloc_coherent(PAGE).expect("memory");
        let buffers = device.alloc_coherent(2 * len).expect("memory");
        let registers = machine.engine_registers(engine);
        let this = Self { system, slot, registers, ring, buffers, len };
        this.write(MM2S, reg::DMACR, Dmacr::new().with_reset(true).into_bits());
        for (block, descriptor) in [(S2MM, 64), (MM2S, 0)] {
            this.address(block, reg::CURDESC, descriptor);
            let run = Dmacr::new().with_rs(true).with_irq_threshold(1);
            this.write(block, reg::DMACR, run.into_bits());
        }
        this
    }
    fn write(&self, block: u32, offset: u32, value: u32) {
        self.registers.write32((block + offset) as usize, value);
    }
    fn address(&self, block: u32, offset: u32, descriptor: u64) {
        let at = self.ring.iova().get() + descriptor;
        self.write(block, offset, at as u32);
        self.write(block, offset + 4, (at >> 32) as u32);
    }
    /// One transfer: two descriptors written, two tails, the engine's work, two status words read. Each descriptor leads to
    /// itself, so that the next tail starts it again.
    fn once(&self) {
        let control = BdControl::new().with_length(self.len as u32);
        let from = self.buffers.iova().get();
        for (block, at, buffer, control) in
            [(S2MM, 64, from + self.len, control), (MM2S, 0, from, control.with_sof(true).with_eof(true))]
        {
            let next = self.ring.iova().get() + at;
            let descriptor = Descriptor { next, buffer, control, status: Default::default() };
            self.ring.write(at, &descriptor.bytes()).expect("inside");
            self.address(block, reg::TAILDESC, at);
        }
        while self.system.machine().step_engine(self.slot) == Activity::Busy {}
        for at in [0, 64] {
            let status = self.ring.read32(at + bd::STATUS).expect("inside");
            assert!(status >> 31 == 1, "the loop has to complete");
        }
    }
}

/// A loop of 64 KiB through descriptors, behind the SMMU, against memcpy of the same bytes.
pub fn loops() -> Vec<Figure> {
    const LEN: usize = 64 << 10;
    const N: u64 = 2000;
    let system = system(false);
    let looped = Loop::new(&system, LEN as u64);
    let source = vec![1u8; LEN];
    let mut target = vec![0u8; LEN];
    let (ns, ratio) = against(
        N,
        || (0..N).for_each(|_| looped.once()),
        || {
            once(N, || {
                for _ in 0..N {
                    black_box(&mut target[..]).copy_from_slice(black_box(&source[..]));
                }
            })
        },
    );
    vec![Figure {
        goal_number: 0,
        what: "AXI DMA loop of 64 KiB through descriptors".into(),
        figure: LEN as f64 / ns,
        figure_unit: "GB/s",
        ratio: 1.0 / ratio,
        ratio_unit: "memcpy",
        goal: Goal::AtLeast(0.7),
    }]
}

/// Two virtual machines with an engine each, every byte compared by their own programs.
pub fn machines() -> Vec<Figure> {
    const TRANSFERS: i32 = 400;
    const BYTES: i32 = 64 << 10;
    let system = system(false);
    let guests: Vec<Guest> =
        ["A", "B"].iter().enumerate().map(|(i, name)| guest(&system, i, name).expect("a guest")).collect();
    let rate = |guests: &[Guest]| {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (n, guest) in guests.iter().enumerate() {
                scope.spawn(move || {
                    stay_on_cpu(n);
                    let arguments = Arguments { transfers: TRANSFERS, bytes: BYTES };
                    let core = guest.cores().first().expect("an engine each");
                    let summary = core.proxy.run(arguments, &mut |_| {}).expect("buffers");
                    assert!(summary.is_ok(), "every byte comes back");
                });
            }
        });
        let bytes = guests.len() as f64 * f64::from(TRANSFERS) * f64::from(BYTES);
        bytes / start.elapsed().as_secs_f64()
    };
    rate(&guests);
    let what = "two virtual machines loop on two threads, verified";
    vec![two_threads(0, what, scaling(|machines| rate(&guests[..machines])), "MB/s")]
}
