//! Every kind of domain, from the driver's calls to the bytes that move: what is mapped is reached, what is not is
//! refused and reported, and nothing that was taken away is reached again.

mod common;

use std::sync::Arc;

use common::{Board, RAM, map, thesis};
use portcullis_arch::{Asid, Iova, Pa};
use portcullis_board::machine::DeclaredStream;
use portcullis_board::system::BootOptions;
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::smmuv2;
use portcullis_iommu::{
    AddressSpace as _, BindOptions, DefaultDomain, DomainKind, DomainSpec, Error, Granule, IommuError,
    Paging, Process, ProcessConfig, Prot, StreamOverrides,
};

const FPD: &str = "fpd-dma0";
const LPD: &str = "lpd-dma7";
/// What devices see.
const IN: u64 = 0x7000_0000;
const OUT: u64 = 0x7000_2000;

#[test]
fn stage_1_translates_both_sides_and_refuses_the_rest() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x1000);
    map(&domain, OUT, RAM + 0x2000, 0x1000);
    board.works(FPD, (OUT + 3, RAM + 0x2003), (IN + 5, RAM + 5), 0xff0);
    board.refused(FPD, (OUT + 0x1000, RAM + 0x3000), IN, FaultReason::Translation, OUT + 0x1000);
    board.refused(FPD, (OUT, RAM + 0x2000), IN - 4, FaultReason::Translation, IN - 4);
    // Another channel has no domain: its stream is blocked.
    board.refused(LPD, (OUT, RAM + 0x2000), IN, FaultReason::InvalidContext, fetch_of(&board, LPD));
}

/// The first thing that a channel does is to read a descriptor.
fn fetch_of(board: &Board, name: &str) -> u64 {
    board.channel(name).driver.pool().iova.get()
}

#[test]
fn every_granule_of_the_smmu_and_every_block_size_moves_data() {
    let board = Board::new();
    for granule in [Granule::K4, Granule::K64] {
        let paging = Paging { granule: Some(granule), ..Paging::default() };
        for spec in [DomainSpec::Stage1(paging), DomainSpec::Stage2(paging)] {
            let domain = board.alloc(spec);
            board.attach(FPD, &domain);
            // 1 GiB of memory at another address: one block, or two of 512 MiB.
            map(&domain, 0x80_4000_0000, 0x4000_0000, 0x4000_0000);
            let at = |pa: u64| (0x80_0000_0000 + pa, pa);
            board.works(FPD, at(RAM + 0x8_0001), at(RAM + 0x10), 0x4_0003);
        }
    }
    let refused = board.system.core().alloc_domain(
        board.instance(),
        DomainSpec::Stage1(Paging { granule: Some(Granule::K16), ..Paging::default() }),
    );
    let missing = smmuv2::Error::MissingGranule { granule: Granule::K16 };
    assert_eq!(refused.err(), Some(Error::Iommu(IommuError::SmmuV2(missing))));
    board.no_faults();
}

#[test]
fn stage_2_translates_and_reports_the_address_that_it_was_asked_for() {
    let board = Board::new();
    let domain = board.stage2();
    board.attach(LPD, &domain);
    map(&domain, IN, RAM, 0x2000);
    board.works(LPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    board.put32(RAM, 1);
    let done = board.copy(LPD, OUT, IN, 4);
    assert!(done.result.is_err());
    let report = board.fault().report;
    assert_eq!(
        (report.reason, report.stage, report.bank),
        (FaultReason::Translation, Some(2), domain.bank())
    );
    assert_eq!(report.ipa.map(|ipa| ipa.get()), Some(OUT));
}

#[test]
fn nested_domains_go_through_both_tables_and_tell_which_stage_refused() {
    let board = Board::new();
    let parent = board.stage2();
    // The guest's physical memory, and the descriptors, which the guest of this test gets at their own address.
    map(&parent, 0x4000_0000, RAM, 0x4000);
    let pool = board.channel(FPD).driver.pool();
    map(&parent, pool.block.pa.get(), pool.block.pa.get(), 0x1000);
    let domain = board.system.core().nested_domain(&parent, Paging::default()).unwrap();
    assert_eq!(domain.kind(), DomainKind::Nested);
    board.attach(FPD, &domain);
    map(&domain, IN, 0x4000_0000, 0x1000);
    map(&domain, OUT, 0x4000_3000, 0x2000);
    board.works(FPD, (OUT, RAM + 0x3000), (IN, RAM), 0x1000);
    assert_eq!(domain.iova_to_phys(Iova(OUT + 8)), Some(Pa(RAM + 0x3008)));

    let done = board.copy(FPD, OUT + 0x1000, IN, 4);
    assert!(done.result.is_err());
    let report = board.fault().report;
    assert_eq!((report.reason, report.stage), (FaultReason::Translation, Some(2)));
    assert_eq!((report.iova, report.ipa.map(|i| i.get())), (Iova(OUT + 0x1000), Some(0x4000_4000)));
    assert_eq!(report.bank, parent.bank());

    board.refused(FPD, (OUT, RAM + 0x3000), IN + 0x1000, FaultReason::Translation, IN + 0x1000);

    // What the parent takes away is gone although the combined entries were warm.
    board.works(FPD, (OUT, RAM + 0x3000), (IN, RAM), 0x100);
    parent.unmap(Iova(0x4000_0000), 0x1000).unwrap();
    let done = board.copy(FPD, OUT, IN, 4);
    assert!(done.result.is_err());
    assert_eq!(board.fault().report.stage, Some(2));
}

#[test]
fn a_guest_s_own_table_is_walked_at_its_ipas() {
    let board = Board::new();
    let parent = board.stage2();
    let pool = board.channel(FPD).driver.pool();
    map(&parent, pool.block.pa.get(), pool.block.pa.get(), 0x1000);
    map(&parent, 0x8000_0000, RAM + 0x8_0000, 0x4_0000);
    let guest = guest::Memory::new(board.machine().dma_memory(), 0x8000_0000, RAM + 0x8_0000, 0x2_0000);
    let table = guest.table();
    let prot = Prot::RW.noexec();
    table.map(Iova(0x1000), Pa(0x8002_0000), 0x1000, prot).unwrap();
    table.map(Iova(0x8000), Pa(0x8003_0000), 0x1000, prot).unwrap();
    table.map(pool.iova, pool.block.pa, 0x1000, prot).unwrap();
    let root = portcullis_iommu::TableRoot::from_registers(&table.registers(), Granule::K4);
    let domain = board.system.core().nested_guest_domain(&parent, root).unwrap();
    board.system.core().attach_device(board.device(FPD), &domain).unwrap();
    board.works(FPD, (0x8000, RAM + 0xb_0000), (0x1000, RAM + 0xa_0000), 0x1000);
    board.refused(FPD, (0x9000, RAM), 0x1000, FaultReason::Translation, 0x9000);

    // The guest changes its table and asks for the invalidation.
    table.unmap(Iova(0x8000), 0x1000, &mut portcullis_pgtable::NoFlush).unwrap();
    domain.ops().invalidate(Iova(0x8000), 0x1000).unwrap();
    board.refused(FPD, (0x8000, RAM + 0xb_0000), 0x1000, FaultReason::Translation, 0x8000);

    // The host takes the guest's tables away: the walk itself is refused, by stage 2.
    parent.unmap(Iova(0x8000_0000), 0x2_0000).unwrap();
    assert!(board.copy(FPD, 0x8000, 0x1000, 4).result.is_err());
    let fault = board.fault().report;
    assert_eq!((fault.stage, fault.bank), (Some(2), parent.bank()));
    assert!(fault.ipa.is_some_and(|ipa| (0x8000_0000..0x8002_0000).contains(&ipa.get())), "{fault}");
}

/// A guest's memory: its physical addresses are IPAs.
mod guest {
    use super::*;
    use portcullis_hal::{Block, DmaMemory};
    use portcullis_pgtable::{Config, PageTable, Stage1};
    use std::sync::Mutex;

    #[derive(Clone)]
    pub struct Memory {
        host: portcullis_board::sim::Memory,
        ipa: u64,
        pa: u64,
        free: Arc<Mutex<(u64, u64)>>,
    }

    impl Memory {
        pub fn new(host: portcullis_board::sim::Memory, ipa: u64, pa: u64, len: u64) -> Self {
            Self { host, ipa, pa, free: Arc::new(Mutex::new((ipa, ipa + len))) }
        }
        pub fn table(&self) -> PageTable<Stage1, Self> {
            PageTable::new(self.clone(), Config::new(Granule::K4, 39, 40).coherent_walk(false)).unwrap()
        }
        fn host_pa(&self, ipa: Pa) -> Pa {
            Pa(ipa.get() - self.ipa + self.pa)
        }
    }

    impl DmaMemory for Memory {
        fn alloc(&self, len: usize, align: usize) -> Option<Block> {
            let mut free = self.free.lock().unwrap();
            let at = free.0.next_multiple_of(align as u64);
            if at + len as u64 > free.1 {
                return None;
            }
            free.0 = at + len as u64;
            self.host.write(self.host_pa(Pa(at)), &vec![0; len]);
            Some(Block { pa: Pa(at), len })
        }
        fn free(&self, _: Block) {}
        fn load64(&self, pa: Pa) -> u64 {
            self.host.load64(self.host_pa(pa))
        }
        fn store64(&self, pa: Pa, value: u64) {
            self.host.store64(self.host_pa(pa), value);
        }
        fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
            self.host.cas64(self.host_pa(pa), expected, new)
        }
        fn read(&self, pa: Pa, buf: &mut [u8]) {
            self.host.read(self.host_pa(pa), buf);
        }
        fn write(&self, pa: Pa, buf: &[u8]) {
            self.host.write(self.host_pa(pa), buf);
        }
        fn clean(&self, pa: Pa, len: usize) {
            self.host.clean(self.host_pa(pa), len);
        }
        fn invalidate(&self, pa: Pa, len: usize) {
            self.host.invalidate(self.host_pa(pa), len);
        }
        fn wmb(&self) {
            self.host.wmb();
        }
    }
}

#[test]
fn identity_passes_and_blocked_refuses() {
    let board = Board::new();
    let (identity, blocked) = (board.alloc(DomainSpec::Identity), board.alloc(DomainSpec::Blocked));
    board.attach(FPD, &identity);
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 0x800);
    board.attach(FPD, &blocked);
    board.refused(FPD, (RAM + 0x1000, RAM + 0x1000), RAM, FaultReason::InvalidContext, fetch_of(&board, FPD));
    board.attach(FPD, &identity);
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 0x800);
    // Dropping a domain blocks what is still attached; the core keeps it while a device is in it.
    drop(identity);
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 0x800);
    board.no_faults();
}

#[test]
fn default_domains_block_pass_or_translate() {
    let boot = |default_domain| {
        let options = BootOptions { default_domain, ..BootOptions::default() };
        Board::booted(thesis(), false, &options)
    };
    let board = boot(DefaultDomain::Identity);
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
    let board = boot(DefaultDomain::Blocked);
    board.refused(FPD, (RAM + 0x1000, RAM + 0x1000), RAM, FaultReason::InvalidContext, fetch_of(&board, FPD));
    // 17 masters and 16 banks: not every device can have a translating domain.
    let options = BootOptions { default_domain: DefaultDomain::Translated, ..BootOptions::default() };
    let machine = portcullis_board::sim::Machine::build(thesis(), Default::default()).unwrap();
    let error = portcullis_board::system::System::boot(machine, &options).err().unwrap().to_string();
    assert!(error.contains("pl-writer0") && error.contains("no free context bank"), "{error}");
}

#[test]
fn streams_that_nobody_claimed_fault_or_bypass_as_the_option_says() {
    for bypass_unmatched in [false, true] {
        // The device tree says another stream than the hardware sends.
        let streams = [(FPD.to_string(), vec![0x3a])].into();
        let options = BootOptions { bypass_unmatched, streams, ..BootOptions::default() };
        let board = Board::booted(thesis(), false, &options);
        if bypass_unmatched {
            board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
        } else {
            let at = fetch_of(&board, FPD);
            board.refused(FPD, (RAM + 0x1000, RAM + 0x1000), RAM, FaultReason::UnknownStream, at);
        }
    }
    let options =
        BootOptions { streams: [("no-such".to_string(), vec![1])].into(), ..BootOptions::default() };
    let machine = portcullis_board::sim::Machine::build(thesis(), Default::default()).unwrap();
    let error = portcullis_board::system::System::boot(machine, &options).err().unwrap();
    assert!(error.to_string().contains("no-such"));
}

#[test]
fn protect_takes_rights_away_from_warm_entries_and_gives_them_back() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x4000);
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    domain.protect(Iova(IN + 0x1000), 0x1000, Prot::READ.noexec()).unwrap();
    board.refused(FPD, (IN + 0x1000, RAM + 0x1000), IN, FaultReason::Permission, IN + 0x1000);
    board.works(FPD, (IN + 0x2000, RAM + 0x2000), (IN + 0x1000, RAM + 0x1000), 0x1000);
    domain.protect(Iova(IN + 0x1000), 0x1000, Prot::RW.noexec()).unwrap();
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    // Privileged pages are none of an unprivileged stream's business, unless S2CR says that it is privileged.
    domain.protect(Iova(IN), 0x1000, Prot::READ.privileged().noexec()).unwrap();
    board.refused(FPD, (IN + 0x1000, RAM + 0x1000), IN, FaultReason::Permission, IN);
    let privileged = StreamOverrides { privileged: Some(true), instruction: None };
    board.system.core().set_overrides(board.device(FPD), privileged).unwrap();
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN + 0x2000, RAM + 0x2000), 16);
    let data = board.copy(FPD, IN + 0x1000, IN, 16);
    assert_eq!(data.result, Ok(()));
    // As instructions, reads need the right to execute.
    let instruction = StreamOverrides { privileged: None, instruction: Some(true) };
    board.system.core().set_overrides(board.device(FPD), instruction).unwrap();
    let at = fetch_of(&board, FPD);
    board.refused(FPD, (IN + 0x1000, RAM + 0x1000), IN + 0x2000, FaultReason::Permission, at);
}

#[test]
fn unmapped_pages_and_blocks_are_gone_at_once_and_can_be_mapped_elsewhere() {
    let board = Board::new();
    for domain in [board.stage1(), board.stage2()] {
        board.attach(FPD, &domain);
        map(&domain, IN, RAM, 0x10_0000);
        board.works(FPD, (IN + 0x8_0000, RAM + 0x8_0000), (IN, RAM), 0x8_0000);
        // More pages than are invalidated one by one.
        assert_eq!(domain.unmap(Iova(IN), 0x8_0000), Ok(0x8_0000));
        for at in [IN, IN + 0x7_f000, IN + 0x4_0000] {
            board.refused(FPD, (IN + 0x8_0000, RAM + 0x8_0000), at, FaultReason::Translation, at);
        }
        // A few, one by one.
        assert_eq!(domain.unmap(Iova(IN + 0x8_0000), 0x3000), Ok(0x3000));
        let gone = IN + 0x8_2000;
        board.refused(FPD, (gone, RAM + 0x8_2000), IN + 0x9_0000, FaultReason::Translation, gone);
        map(&domain, IN, RAM + 0x4_0000, 0x1000);
        board.works(FPD, (IN + 0x9_0000, RAM + 0x9_0000), (IN, RAM + 0x4_0000), 0x1000);
        // A 2 MiB block.
        map(&domain, 0x4000_0000, 0x4000_0000, 0x20_0000);
        board.works(FPD, (0x4000_1000, 0x4000_1000), (0x4010_0000, 0x4010_0000), 0x1000);
        assert!(domain.unmap(Iova(0x4000_0000), 0x1000).is_err(), "a part of a block");
        board.works(FPD, (0x4000_1000, 0x4000_1000), (0x4010_0000, 0x4010_0000), 0x1000);
        assert_eq!(domain.unmap(Iova(0x4000_0000), 0x20_0000), Ok(0x20_0000));
        board.refused(FPD, (0x4000_1000, 0x4000_1000), IN, FaultReason::Translation, 0x4000_1000);
    }
}

#[test]
fn a_failed_map_leaves_nothing_reachable() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x1000);
    map(&domain, IN + 0x4000, RAM + 0x4000, 0x1000);
    assert!(domain.map(Iova(IN + 0x1000), Pa(RAM + 0x8000), 0x8000, Prot::RW).is_err());
    board.refused(FPD, (IN + 0x1000, RAM + 0x8000), IN, FaultReason::Translation, IN + 0x1000);
    board.works(FPD, (IN + 0x4000, RAM + 0x4000), (IN, RAM), 0x100);
}

#[test]
fn devices_that_share_a_stream_entry_share_group_and_domain() {
    let mut description = thesis();
    // One entry for all eight channels of the full power domain.
    for channel in description.dma_channels.iter_mut().filter(|c| c.bus_width == 128) {
        let id = portcullis_arch::StreamId(0x14e8);
        channel.streams.declared = vec![DeclaredStream { smmu: 0, id, mask: 7 }];
    }
    let board = Board::of(description, false);
    let core = board.system.core();
    let group = core.group_of(board.device("fpd-dma0")).unwrap();
    assert_eq!(core.devices_of(group).unwrap().len(), 8);
    let domain = board.stage1();
    let alone = core.attach_device(board.device("fpd-dma3"), &domain);
    assert!(matches!(alone, Err(Error::GroupNotSingular { .. })), "{alone:?}");
    map(&domain, IN, RAM, 0x1_0000);
    core.attach_group(group, &domain).unwrap();
    for i in 0..8 {
        let name = format!("fpd-dma{i}");
        board.system.map_descriptors(board.channel(&name), &domain).unwrap();
        board.works(&name, (IN + 0x8000, RAM + 0x8000), (IN + i, RAM + i), 0x1000);
    }
    let at = fetch_of(&board, LPD);
    board.refused(LPD, (IN, RAM), IN, FaultReason::InvalidContext, at);
    core.detach_group(group).unwrap();
    let at = fetch_of(&board, "fpd-dma5");
    board.refused("fpd-dma5", (IN, RAM), IN, FaultReason::InvalidContext, at);
}

#[test]
fn sixteen_domains_are_apart_and_the_seventeenth_is_refused_until_one_is_free() {
    let board = Board::new();
    let names: Vec<String> = board.system.channels().iter().map(|c| c.name.to_string()).collect();
    let mut domains: Vec<_> = names.iter().map(|name| board.domain_for(name)).collect();
    for (i, (name, domain)) in (0..).zip(names.iter().zip(&domains)) {
        // The same address everywhere, and other memory behind it.
        map(domain, IN, RAM + i * 0x2000, 0x2000);
        assert_eq!(domain.bank(), Some(i as u8), "{name}");
    }
    let full = board.system.core().paging_domain(board.instance());
    let error = full.unwrap_err().to_string();
    assert!(error.contains("no free context bank") && error.contains("16 usable of 16"), "{error}");
    for (i, name) in (0..).zip(&names) {
        board.works(name, (IN + 0x1000, RAM + i * 0x2000 + 0x1000), (IN, RAM + i * 0x2000), 0x1000);
    }

    // The next owner of bank and ASID sees nothing of the entries that are warm now.
    let old = domains.remove(3);
    let (bank, asid) = (old.bank(), old.asid());
    board.system.core().detach_device(board.device(&names[3])).unwrap();
    drop(old);
    let new = board.domain_for(&names[3]);
    assert_eq!((new.bank(), new.asid()), (bank, asid));
    board.refused(&names[3], (IN + 0x1000, RAM + 0x7000), IN, FaultReason::Translation, IN);
    map(&new, IN, RAM + 0x4_0000, 0x2000);
    board.works(&names[3], (IN + 0x1000, RAM + 0x4_1000), (IN, RAM + 0x4_0000), 0x1000);
    board.works(&names[4], (IN + 0x1000, RAM + 0x9000), (IN, RAM + 0x8000), 0x1000);
    board.no_faults();
}

#[test]
fn everything_works_again_after_a_loss_of_power() {
    let board = Board::new();
    let (_, driver) = board.system.smmu().unwrap();
    let one = board.domain_for(FPD);
    let two = board.stage2();
    board.attach(LPD, &two);
    for domain in [&one, &two] {
        map(domain, IN, RAM, 0x4000);
    }
    let identity = board.alloc(DomainSpec::Identity);
    board.attach("fpd-dma1", &identity);
    let check = || {
        for name in [FPD, LPD] {
            board.works(name, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
            board.refused(name, (IN, RAM), IN + 0x4000, FaultReason::Translation, IN + 0x4000);
        }
        board.works("fpd-dma1", (RAM, RAM), (RAM + 0x1000, RAM + 0x1000), 64);
        let at = fetch_of(&board, "fpd-dma2");
        board.refused("fpd-dma2", (RAM, RAM), RAM, FaultReason::InvalidContext, at);
    };
    check();
    board.machine().smmu().unwrap().reset();
    // Nothing is translated now: the address goes to memory as it is, which is nobody's there.
    assert_eq!(board.copy(FPD, RAM + 0x1000, RAM, 4).result, Ok(()));
    board.no_faults();
    driver.resume().unwrap();
    check();
    // Changes made before the loss are still made after it.
    one.unmap(Iova(IN + 0x3000), 0x1000).unwrap();
    board.machine().smmu().unwrap().reset();
    driver.resume().unwrap();
    board.refused(FPD, (IN, RAM), IN + 0x3000, FaultReason::Translation, IN + 0x3000);
}

#[test]
fn shutdown_lets_everything_pass_and_says_that_domains_were_in_use() {
    let board = Board::new();
    let (_, driver) = board.system.smmu().unwrap();
    assert!(!driver.shutdown());
    driver.resume().unwrap();
    let domain = board.domain_for(FPD);
    assert!(driver.shutdown());
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
    driver.resume().unwrap();
    board.refused(FPD, (RAM + 0x1000, RAM + 0x1000), RAM, FaultReason::Translation, RAM);
    map(&domain, RAM, RAM, 0x2000);
    board.works(FPD, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
}

fn process(board: &Board) -> Arc<Process<portcullis_board::sim::Memory>> {
    Process::new(board.machine().dma_memory(), ProcessConfig::default()).unwrap()
}

#[test]
fn a_device_uses_the_addresses_of_the_process_that_it_is_bound_to() {
    let board = Board::new();
    let core = board.system.core();
    let (one, other) = (process(&board), process(&board));
    // Both have the same addresses.
    let prot = Prot::RW.noexec();
    let va = one.mmap(0x3000, prot).unwrap();
    assert_eq!(other.mmap(0x3000, prot).unwrap(), va);
    one.write(va, b"one's own data").unwrap();
    other.write(va, b"other's data").unwrap();
    let before = board.domain_for(FPD);
    let domain = core.bind(board.device(FPD), one.clone()).unwrap();
    let shared = core.bind(board.device("fpd-dma1"), one.clone()).unwrap();
    assert!(Arc::ptr_eq(&domain, &shared), "one process, one bank");
    core.bind(board.device(LPD), other.clone()).unwrap();

    let copy = |name: &str| board.copy_simple(name, va.get() + 0x2ff8, va.get(), 8);
    let read = |p: &Process<_>| {
        let mut bytes = [0; 8];
        p.read(va.wrapping_add(0x2ff8), &mut bytes).unwrap();
        bytes
    };
    assert_eq!(copy(FPD).result, Ok(()));
    assert_eq!((&read(&one), &read(&other)), (b"one's ow", &[0; 8]));
    assert_eq!(copy(LPD).result, Ok(()));
    assert_eq!(&read(&other), b"other's ");
    assert_eq!(copy("fpd-dma1").result, Ok(()));
    board.no_faults();

    // What the process gives back is out of reach for both devices.
    one.munmap(va).unwrap();
    for name in [FPD, "fpd-dma1"] {
        assert!(copy(name).result.is_err());
        let fault = board.fault();
        assert_eq!((fault.report.iova, fault.report.reason), (va, FaultReason::Translation));
        assert_eq!(fault.name.as_deref(), Some(name));
    }
    assert_eq!(copy(LPD).result, Ok(()));

    // The end of the process comes before the end of the binding.
    other.exit().unwrap();
    assert!(copy(LPD).result.is_err());
    assert_eq!(board.fault().report.reason, FaultReason::Translation);
    core.unbind(board.device(LPD)).unwrap();
    core.unbind(board.device(FPD)).unwrap();
    core.unbind(board.device("fpd-dma1")).unwrap();
    assert!(Arc::ptr_eq(&core.domain_of(board.device(FPD)).unwrap(), &before));
    assert!(one.domains().is_empty());
    map(&before, IN, RAM, 0x2000);
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x100);
}

#[test]
fn process_pages_are_given_back_to_the_pool_when_it_is_over() {
    let board = Board::new();
    let core = board.system.core();
    let memory = board.machine().dma_memory();
    let before = memory.pool().outstanding();
    {
        let process = process(&board);
        let va = process.mmap(0x5000, Prot::RW).unwrap();
        core.bind(board.device(FPD), process.clone()).unwrap();
        assert_eq!(board.copy_simple(FPD, va.get() + 0x4000, va.get(), 16).result, Ok(()));
        process.exit().unwrap();
        core.unbind(board.device(FPD)).unwrap();
    }
    assert_eq!(memory.pool().outstanding(), before);
    {
        let domain = board.domain_for(FPD);
        map(&domain, IN, RAM, 0x10_0000);
        map(&domain, 0x12_3456_7000, RAM, 0x1000);
        core.detach_device(board.device(FPD)).unwrap();
    }
    assert_eq!(memory.pool().outstanding(), before, "page tables too");
}

#[test]
fn a_wrong_t0sz_or_address_size_of_a_process_faults_as_the_thesis_saw_it() {
    let board = Board::new();
    let core = board.system.core();
    let config = ProcessConfig { va_bits: 39, ..ProcessConfig::default() };
    let process = Process::new(board.machine().dma_memory(), config).unwrap();
    let va = process.mmap(0x1000, Prot::RW).unwrap();
    let root = process.table_root().unwrap();
    // A 48-bit walk over 39-bit tables takes the wrong level for the first one.
    let wrong = BindOptions {
        root: Some(portcullis_iommu::TableRoot { t0sz: 16, ..root }),
        ..BindOptions::default()
    };
    core.bind_with(board.device(FPD), process.clone(), wrong).unwrap();
    assert!(board.copy_simple(FPD, va.get(), va.get() + 0x800, 16).result.is_err());
    let fault = board.fault().report;
    assert_eq!(fault.reason, FaultReason::Translation);
    core.unbind(board.device(FPD)).unwrap();
    core.bind(board.device(FPD), process).unwrap();
    assert_eq!(board.copy_simple(FPD, va.get(), va.get() + 0x800, 16).result, Ok(()));
}

#[test]
fn a_wished_asid_tags_one_address_space_only() {
    let board = Board::new();
    let core = board.system.core();
    let asid = Some(Asid(0x77));
    let config = ProcessConfig { asid, ..ProcessConfig::default() };
    let one = Process::new(board.machine().dma_memory(), config).unwrap();
    let other = Process::new(board.machine().dma_memory(), config).unwrap();
    let domain = core.bind(board.device(FPD), one.clone()).unwrap();
    assert_eq!(domain.asid(), asid);
    let refused = core.bind(board.device(LPD), other);
    let Err(Error::Iommu(IommuError::SmmuV2(smmuv2::Error::AsidInUse { .. }))) = refused else {
        panic!("{refused:?}")
    };
    drop(domain);
    core.unbind(board.device(FPD)).unwrap();
}

#[test]
fn the_pl_writer_is_kept_to_its_domain_and_other_axi_ids_are_other_streams() {
    let board = Board::new();
    let device = board.device("pl-writer0");
    let domain = board.stage1();
    board.system.core().attach_device(device, &domain).unwrap();
    map(&domain, IN, RAM, 0x1000);
    assert!(board.pl_write(IN + 0x10, 0xcafe_beef, 0));
    assert_eq!(board.get32(RAM + 0x10), 0xcafe_beef);
    assert!(!board.pl_write(IN + 0x1000, 1, 0));
    assert_eq!(board.fault().report.reason, FaultReason::Translation);
    assert!(!board.pl_write(IN, 1, 5));
    let fault = board.fault();
    assert_eq!((fault.report.reason, fault.device), (FaultReason::UnknownStream, None));
    assert_eq!(board.get32(RAM), 0);
}
