//! The SMMUv3 board, booted: DMA through every kind of domain, faults, stalls, and what interrupts and messages do.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Board, RAM_V3 as RAM, map, smmuv3, smmuv3_noncoherent};
use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_board::MachineDescription;
use portcullis_board::sim::{BuildError, EventKind, Machine, Options};
use portcullis_board::system::{BootOptions, System, V3Options};
use portcullis_bus::{DmaFault, DmaPort as _, Initiator};
use portcullis_drivers::fault::FaultReason;
use portcullis_iommu::{DomainSpec, FaultReport, FaultResponse, Paging, Prot, StreamOverrides};

const IN: u64 = 0x1000_0000;

fn board() -> Board {
    Board::of(smmuv3(), false)
}

fn messages() -> Board {
    let options =
        BootOptions { v3: V3Options { messages: true, ..V3Options::default() }, ..BootOptions::default() };
    Board::booted(smmuv3(), false, &options)
}

#[test]
fn the_machine_boots_and_says_what_its_smmu_is() {
    let board = board();
    assert_eq!(board.system.channels().len(), 4);
    assert_eq!(board.system.testers().len(), 2);
    assert!(board.machine().smmu().is_none() && board.system.smmu().is_none());
    let (_, driver) = board.system.smmu_v3().unwrap();
    assert_eq!((driver.features().stream_bits, driver.coherent()), (16, true));
    assert!(board.system.describe().contains("SMMUv3"), "{}", board.system.describe());
    let (registers, offset) = board.machine().window_at(Pa(0x3101_00a8)).unwrap();
    assert_eq!(offset, 0x1_00a8);
    // CR0 through the bus: everything is on.
    assert_eq!(portcullis_hal::Mmio::read32(&registers, 0x20) & 0xd, 0xd);
    assert_eq!(board.machine().window_at(Pa(0x4001_0000)).map(|(_, o)| o), Ok(0));
    board.no_faults();
}

#[test]
fn dma_goes_through_a_stage_1_domain() {
    let board = board();
    for (i, name) in ["dma0", "dma1", "dma2", "dma3"].into_iter().enumerate() {
        let domain = board.domain_for(name);
        let pa = RAM + 0x10_0000 * i as u64;
        map(&domain, IN, pa, 0x4000);
        board.works(name, (IN + 0x2001, pa + 0x2001), (IN, pa), 0x1000);
        assert_eq!(domain.iova_to_phys(Iova(IN + 0x123)), Some(Pa(pa + 0x123)));
    }
    board.no_faults();
}

#[test]
fn two_masters_share_a_domain() {
    let board = board();
    let domain = board.stage1();
    for name in ["dma0", "dma1"] {
        board.attach(name, &domain);
    }
    map(&domain, IN, RAM, 0x4000);
    board.works("dma0", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    board.works("dma1", (IN + 0x3000, RAM + 0x3000), (IN + 0x1000, RAM + 0x1000), 0x1000);
    // One unmapping is for both.
    assert_eq!(domain.unmap(Iova(IN), 0x1000).unwrap(), 0x1000);
    for name in ["dma0", "dma1"] {
        board.refused(name, (IN + 0x2000, RAM + 0x2000), IN, FaultReason::Translation, IN);
    }
}

#[test]
fn every_kind_of_domain_does_what_it_says() {
    let board = board();
    let core = board.system.core();
    let at = (IN + 0x1000, RAM + 0x1000);
    let stage2 = board.stage2();
    board.attach("dma0", &stage2);
    map(&stage2, IN, RAM, 0x4000);
    board.works("dma0", at, (IN, RAM), 64);

    let identity = board.alloc(DomainSpec::Identity);
    core.attach_device(board.device("dma0"), &identity).unwrap();
    board.works("dma0", (RAM + 0x2000, RAM + 0x2000), (RAM, RAM), 64);
    board.no_faults();

    // Blocked: aborts without an event.
    let blocked = board.alloc(DomainSpec::Blocked);
    core.attach_device(board.device("dma0"), &blocked).unwrap();
    assert!(board.copy("dma0", RAM + 0x2000, RAM, 64).result.is_err());
    board.no_faults();

    // Stage 1 on stage 2: the descriptors of the channel as well.
    let below = board.stage2();
    let nested = core.nested_domain(&below, Paging::default()).unwrap();
    let ipa = 0x2000_0000;
    map(&below, ipa, RAM, 0x4000);
    map(&nested, IN, ipa, 0x4000);
    let pool = board.channel("dma0").driver.pool();
    map(&below, pool.iova.get() & !0xfff, pool.block.pa.get() & !0xfff, 0x2000);
    board.attach("dma0", &nested);
    board.works("dma0", at, (IN, RAM), 64);
    board.no_faults();
}

#[test]
fn a_fault_arrives_in_the_handler_with_its_device() {
    let board = board();
    let domain = board.domain_for("dma3");
    map(&domain, IN, RAM, 0x2000);
    board.refused("dma3", (IN + 0x1000, RAM + 0x1000), IN + 0x5004, FaultReason::Translation, IN + 0x5004);
    // Write to a read-only page: the fault is of the write.
    domain.map(Iova(IN + 0x8000), Pa(RAM + 0x8000), 0x1000, Prot::READ.noexec()).unwrap();
    board.put(RAM + 0x8000, &[0xee; 4]);
    assert!(board.copy("dma3", IN + 0x8000, IN, 4).result.is_err());
    let fault = board.fault();
    assert_eq!((fault.report.reason, fault.name.as_deref()), (FaultReason::Permission, Some("dma3")));
    assert_eq!((fault.report.stream, fault.report.stage), (Some(StreamId(0x13)), Some(1)));
    assert!(!fault.report.stalled);
    // What the tracer saw says the same, with the record that the SMMU wrote.
    let events = board.events();
    let story = events.iter().rev().find_map(|e| match &e.kind {
        EventKind::Transaction(t) => t.fault.as_ref(),
        _ => None,
    });
    let explanation = story.unwrap().explanation.v3().unwrap();
    let portcullis_smmuv3::Outcome::Event { record, .. } = &explanation.outcome else {
        panic!("{:?}", explanation.outcome)
    };
    assert_eq!(
        (record.code(), record.input_addr()),
        (Some(portcullis_arch::smmuv3::EventCode::Permission), IN + 0x8000)
    );
    // The event queue's wire is an edge.
    let edge = |high| {
        let is = |e: &&portcullis_board::sim::Event| matches!(e.kind, EventKind::Interrupt { line: 64, high: h } if h == high);
        events.iter().filter(is).count()
    };
    assert_eq!((edge(true), edge(false)), (2, 2));
}

#[test]
fn a_stall_waits_until_the_handler_has_mapped_the_page() {
    let board = board();
    let domain = board.stalling();
    board.attach("dma0", &domain);
    map(&domain, IN, RAM, 0x1000);
    let mapper = domain.clone();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        assert!(report.stalled, "{report}");
        count.fetch_add(1, Ordering::Relaxed);
        let page = report.iova.get() & !0xfff;
        mapper.map(Iova(page), Pa(RAM + (page - IN)), 0x1000, Prot::RW.noexec()).unwrap();
        FaultResponse::Resolved
    })));
    // Source and destination pages come on demand.
    board.works("dma0", (IN + 0x5000, RAM + 0x5000), (IN + 0x800, RAM + 0x800), 0x1000);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!(board.faults().len(), 2);
    assert!(board.machine().smmu_v3().unwrap().stalled().is_empty());
    let stalls = board.events().into_iter().filter(|e| match &e.kind {
        EventKind::Transaction(t) => matches!(t.error, Some((_, DmaFault::Stalled(_)))),
        _ => false,
    });
    assert_eq!(stalls.count(), 2);
}

#[test]
fn a_deferred_stall_is_answered_later() {
    let board = board();
    let domain = board.stalling();
    board.attach("dma1", &domain);
    map(&domain, IN, RAM, 0x1000);
    domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Deferred)));
    for resolve in [true, false] {
        let to = IN + if resolve { 0x1000 } else { 0x3000 };
        let cookie = board.start("dma1", to, IN, 16);
        board.settle();
        assert!(board.is_running("dma1", cookie));
        let fault = board.fault();
        assert!(fault.report.stalled);
        assert_eq!(board.machine().smmu_v3().unwrap().stalled().len(), 1);
        let response = if resolve {
            map(&domain, to, RAM + 0x1000, 0x1000);
            FaultResponse::Resolved
        } else {
            FaultResponse::Terminate
        };
        board.system.core().answer(fault.instance, &fault.report, response).unwrap();
        board.settle();
        assert_eq!(board.completion("dma1", cookie).result.is_ok(), resolve);
    }
}

#[test]
fn a_master_that_cannot_stall_is_terminated_in_a_stalling_domain() {
    let board = board();
    let domain = board.stalling();
    board.attach("dma3", &domain);
    map(&domain, IN, RAM, 0x1000);
    assert!(board.copy("dma3", IN + 0x1000, IN, 16).result.is_err());
    assert!(!board.fault().report.stalled);
}

#[test]
fn events_come_as_messages_too() {
    let board = messages();
    let domain = board.domain_for("dma3");
    map(&domain, IN, RAM, 0x1000);
    board.refused("dma3", (IN, RAM), IN + 0x2000, FaultReason::Translation, IN + 0x2000);
    let found = board.events().into_iter().find_map(|e| match e.kind {
        EventKind::Message { address, data, lpi } => Some((address, data, lpi)),
        _ => None,
    });
    assert_eq!(found, Some((Pa(0x2f03_0040), 0, 8192)));
}

#[test]
fn an_unknown_stream_aborts_and_is_reported() {
    let board = board();
    let core = board.system.core();
    core.remove_device(board.device("dma2")).unwrap();
    assert!(board.copy("dma2", RAM, RAM + 0x1000, 16).result.is_err());
    let domain = board.domain_for("dma0");
    map(&domain, IN, RAM, 0x1000);
    board.works("dma0", (IN + 0x800, RAM + 0x800), (IN, RAM), 64);
}

#[test]
fn a_linear_stream_table_has_room_for_the_first_streams_only() {
    let v3 = V3Options { stream_bits: Some(8), ..V3Options::default() };
    let unbound = BTreeSet::new();
    let options = BootOptions { v3, unbound, ..BootOptions::default() };
    let machine = Machine::build(smmuv3(), Options::default()).unwrap();
    let error = System::boot(machine, &options).err().unwrap().to_string();
    assert!(error.starts_with("testdev0: ") && error.contains("stream 0x408"), "{error}");
    let unbound = ["testdev0", "testdev1"].map(str::to_owned).into();
    let board = Board::booted(smmuv3(), false, &BootOptions { unbound, ..options });
    assert!(board.system.testers().is_empty());
    let cfg = board.machine().smmu_registers().unwrap();
    assert_eq!(portcullis_hal::Mmio::read32(&cfg, 0x88), 8);
    let domain = board.domain_for("dma0");
    map(&domain, IN, RAM, 0x1000);
    board.works("dma0", (IN + 0x800, RAM + 0x800), (IN, RAM), 64);
}

#[test]
fn nothing_coherent_works_with_maintenance() {
    let board = Board::of(smmuv3_noncoherent(), true);
    let domain = board.domain_for("dma0");
    map(&domain, IN, RAM, 0x4000);
    board.works("dma0", (IN + 0x2000, RAM + 0x2000), (IN, RAM), 0x1000);
    domain.unmap(Iova(IN), 0x1000).unwrap();
    board.refused("dma0", (IN + 0x2000, RAM + 0x2000), IN, FaultReason::Translation, IN);
    assert!(board.events().iter().all(|e| !matches!(e.kind, EventKind::Stale(_))));
}

#[test]
fn other_presets_boot_as_well() {
    use portcullis_board::machine::SmmuV3Preset;
    for preset in [SmmuV3Preset::Small, SmmuV3Preset::QemuVirt] {
        let mut description = smmuv3();
        description.test_devices.clear();
        description.smmus[0].v3.as_mut().unwrap().preset = preset;
        let board = Board::of(description, false);
        let domain = board.domain_for("dma1");
        map(&domain, IN, RAM, 0x2000);
        board.works("dma1", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x800);
        board.refused("dma1", (IN, RAM), IN + 0x5000, FaultReason::Translation, IN + 0x5000);
    }
}

#[test]
fn a_quirk_that_is_not_modelled_refuses_the_machine() {
    let mut description = smmuv3();
    description.smmus[0].v3.as_mut().unwrap().quirk = Some("cavium,cn9900-broken-page1-regspace".into());
    let error = Machine::build(description, Options::default()).err().unwrap();
    assert!(matches!(error, BuildError::Quirk { .. }), "{error}");
    assert!(error.to_string().contains("cavium"), "{error}");
}

#[test]
fn a_level_interrupt_in_the_tree_is_lost() {
    use portcullis_board::tree::{Interrupt, Trigger};
    let mut description: MachineDescription = smmuv3();
    description.smmus[0].v3.as_mut().unwrap().eventq =
        Some(Interrupt::Spi { number: 64, trigger: Trigger::LevelHigh });
    let board = Board::of(description, false);
    let domain = board.domain_for("dma3");
    map(&domain, IN, RAM, 0x1000);
    assert!(board.copy("dma3", IN, IN + 0x5000, 4).result.is_err());
    board.no_faults();
    board.system.core().handle_irq(board.instance()).unwrap();
    assert_eq!(board.fault().report.iova, Iova(IN + 0x5000));
}

#[test]
fn the_same_calls_give_the_same_trace() {
    let run = || {
        let board = board();
        let domain = board.stalling();
        board.attach("dma0", &domain);
        map(&domain, IN, RAM, 0x1000);
        assert!(board.copy("dma0", IN + 0x1000, IN, 64).result.is_err());
        format!("{:?}", board.events())
    };
    assert_eq!(run(), run());
}

#[test]
fn a_machine_can_be_reset_and_booted_again() {
    let board = board();
    let machine = board.machine().clone();
    machine.smmu_v3().unwrap().reset();
    let board = Board { system: System::boot(machine, &BootOptions::default()).unwrap() };
    let domain = board.domain_for("dma0");
    map(&domain, IN, RAM, 0x1000);
    board.works("dma0", (IN + 0x800, RAM + 0x800), (IN, RAM), 64);
}

#[test]
fn an_event_queue_that_overflows_says_so_and_goes_on() {
    let board = board();
    let domain = board.domain_for("dma3");
    map(&domain, IN, RAM, 0x1000);
    let smmu = board.machine().smmu_v3().unwrap();
    let mut port = smmu.port(board.machine().memory().clone());
    let from = Initiator::new(StreamId(0x13));
    // The queue has 128 entries, and nobody empties it meanwhile.
    for i in 0..300 {
        assert!(port.read(from, Iova(IN + 0x1_0000 + i * 0x1000), &mut [0; 4]).is_err());
    }
    board.settle();
    let batch = board.system.core().take_faults();
    let translation = batch.faults.iter().filter(|f| f.report.reason == FaultReason::Translation).count();
    assert_eq!(translation, 128);
    let other: Vec<_> = batch.faults.iter().filter(|f| f.report.reason != FaultReason::Translation).collect();
    assert_eq!(other.len(), 1, "{other:?}");
    board.refused("dma3", (IN, RAM), IN + 0x5000, FaultReason::Translation, IN + 0x5000);
    board.works("dma3", (IN + 0x800, RAM + 0x800), (IN, RAM), 64);
}

#[test]
fn privilege_overrides_decide_who_may_read_a_privileged_page() {
    let board = board();
    let domain = board.domain_for("dma3");
    domain.map(Iova(IN), Pa(RAM), 0x1000, Prot::RW.noexec().privileged()).unwrap();
    board.put(RAM, &[0xee; 16]);
    assert!(board.copy("dma3", IN + 8, IN, 4).result.is_err());
    assert_eq!(board.fault().report.reason, FaultReason::Permission);
    let overrides = StreamOverrides { privileged: Some(true), ..StreamOverrides::default() };
    board.system.core().set_overrides(board.device("dma3"), overrides).unwrap();
    // The descriptors of a list are fetched as privileged as well.
    board.works("dma3", (IN + 0x800, RAM + 0x800), (IN, RAM), 64);
}

#[test]
fn a_stream_table_entry_that_was_changed_without_cfgi_is_noticed() {
    let board = board();
    let domain = board.domain_for("dma3");
    map(&domain, IN, RAM, 0x2000);
    board.works("dma3", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    let smmu = board.machine().smmu_v3().unwrap();
    let from = Initiator::new(StreamId(0x13));
    let (at, ste) = smmu.explain(from, Iova(IN), portcullis_arch::Access::Read).ste.unwrap();
    // Config = abort, behind the driver's back. The port goes on with what it knows.
    let aborts = ste.dw0().with_config(0).into_bits();
    portcullis_bus::Memory::write(board.machine().memory(), at, Default::default(), &aborts.to_le_bytes())
        .unwrap();
    board.events();
    board.works("dma3", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    let stale = board.events().into_iter().find_map(|e| match e.kind {
        EventKind::Transaction(t) => t.fault,
        _ => None,
    });
    let stale = stale.unwrap();
    assert!(stale.cached.is_some() && stale.explanation.is_fault());
}
