//! Faults that stall: the transaction waits in the SMMU until its owner has decided, and then goes on where it stopped
//! or ends with an error.

mod common;

use std::sync::{Arc, Mutex};

use common::{Board, RAM, Random, map};
use portcullis_arch::Access;
use portcullis_arch::{Iova, Pa};
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::zdma::{BusErrorKind, TransferError, ZdmaError};
use portcullis_iommu::{Domain, DomainSpec, FaultModel, FaultReport, FaultResponse, Paging, Process, Prot};

const FPD: &str = "fpd-dma0";
const LPD: &str = "lpd-dma0";
const IN: u64 = 0x7000_0000;

/// A handler that maps the page that is missing, at `pa = iova - IN + RAM`, and tries again. Gives the faults it saw.
fn demand_paging(domain: &Arc<Domain>) -> Arc<Mutex<Vec<FaultReport>>> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (log, target) = (seen.clone(), Arc::downgrade(domain));
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        log.lock().unwrap().push(*report);
        let (Some(domain), page) = (target.upgrade(), report.iova.get() & !0xfff) else {
            return FaultResponse::Terminate;
        };
        if !(IN..IN + 0x10_0000).contains(&page) {
            return FaultResponse::Terminate;
        }
        domain.map(Iova(page), Pa(page - IN + RAM), 0x1000, Prot::RW.noexec()).unwrap();
        FaultResponse::Resolved
    })));
    seen
}

#[test]
fn a_handler_that_maps_the_page_lets_the_transfer_go_on() {
    let board = Board::new();
    let domain = board.stalling();
    let seen = demand_paging(&domain);
    for (i, name) in (0..).zip([FPD, LPD]) {
        board.attach(name, &domain);
        let (src, dst) = (0x1_0123 + i * 0x4_0000, 0x3_0456 + i * 0x4_0000);
        // Five pages on each side, none of them there.
        board.works(name, (IN + dst, RAM + dst), (IN + src, RAM + src), 0x4000);
        let faults = std::mem::take(&mut *seen.lock().unwrap());
        assert_eq!(faults.len(), 10, "{name}: {faults:#?}");
        assert!(faults.iter().all(|f| f.stalled && f.reason == FaultReason::Translation));
        assert_eq!(faults.iter().filter(|f| f.access == Access::Write).count(), 5);
        assert_eq!(faults[0].iova, Iova(IN + src));
    }
    // A second time nothing is missing.
    board.faults();
    board.works(FPD, (IN + 0x3_0456, RAM + 0x3_0456), (IN + 0x1_0123, RAM + 0x1_0123), 0x4000);
    board.no_faults();
}

#[test]
fn descriptors_come_on_demand_too() {
    let board = Board::new();
    let domain = board.stalling();
    let core = board.system.core();
    core.attach_device(board.device(FPD), &domain).unwrap();
    map(&domain, IN, RAM, 0x2000);
    let pool = board.channel(FPD).driver.pool();
    let target = Arc::downgrade(&domain);
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        assert_eq!(report.iova, pool.iova);
        let domain = target.upgrade().unwrap();
        domain.map(pool.iova, pool.block.pa, 0x1000, Prot::READ.noexec()).unwrap();
        FaultResponse::Resolved
    })));
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x800);
    assert_eq!(board.faults().len(), 1);
}

#[test]
fn a_handler_that_terminates_ends_the_transfer_with_an_error() {
    let board = Board::new();
    let domain = board.stalling();
    board.attach(FPD, &domain);
    map(&domain, IN, RAM, 0x2000);
    domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Terminate)));
    let done = board.copy(FPD, IN + 0x1800, IN, 0x1000);
    assert_eq!((done.transferred, done.residue), (0x800, 0x800));
    let Err(TransferError::Bus { kind: BusErrorKind::DestinationWrite, .. }) = done.result else {
        panic!("{done:?}")
    };
    assert!(board.fault().report.stalled);
    // Without any handler the answer is the same.
    domain.set_fault_handler(None);
    let done = board.copy(FPD, IN, IN + 0x1800, 0x1000);
    let Err(TransferError::Bus { kind: BusErrorKind::SourceRead, .. }) = done.result else {
        panic!("{done:?}")
    };
    board.fault();
    board.works(FPD, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
}

/// A domain whose faults wait for somebody to decide later.
fn deferring(board: &Board) -> Arc<Domain> {
    let domain = board.stalling();
    domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Deferred)));
    domain
}

fn answer(board: &Board, domain: &Domain, response: FaultResponse) {
    board.system.core().resume_stalled(board.instance(), domain.bank().unwrap(), response).unwrap();
    board.settle();
}

#[test]
fn a_deferred_transfer_waits_until_it_is_resumed() {
    let board = Board::new();
    let domain = deferring(&board);
    board.attach(FPD, &domain);
    map(&domain, IN, RAM, 0x1000);
    board.put(RAM, b"worth waiting for");
    let cookie = board.start(FPD, IN + 0x1000, IN, 17);
    board.settle();
    assert!(board.is_running(FPD, cookie));
    assert_eq!(board.channel(FPD).driver.residue(cookie), Some(17));
    assert!(board.fault().report.stalled);
    for _ in 0..3 {
        board.settle();
    }
    assert!(board.is_running(FPD, cookie), "nobody has decided");
    board.no_faults();
    map(&domain, IN + 0x1000, RAM + 0x1000, 0x1000);
    answer(&board, &domain, FaultResponse::Resolved);
    assert_eq!(board.completion(FPD, cookie).result, Ok(()));
    assert_eq!(board.get(RAM + 0x1000, 17), b"worth waiting for");
    let (instance, bank) = (board.instance(), domain.bank().unwrap());
    assert!(board.system.core().resume_stalled(instance, bank, FaultResponse::Resolved).is_err());

    // Terminated instead.
    let cookie = board.start(FPD, IN + 0x2000, IN, 17);
    board.settle();
    assert!(board.is_running(FPD, cookie));
    answer(&board, &domain, FaultResponse::Terminate);
    assert!(board.completion(FPD, cookie).result.is_err());
}

#[test]
fn transfers_behind_a_stalled_one_wait_with_it_and_other_domains_do_not() {
    let board = Board::new();
    let domain = deferring(&board);
    for name in [FPD, LPD] {
        board.attach(name, &domain);
    }
    let other = board.domain_for("fpd-dma1");
    for domain in [&domain, &other] {
        map(domain, IN, RAM, 0x4000);
    }
    let stalled = board.start(FPD, IN + 0x4000, IN, 16);
    board.settle();
    let behind = board.start(LPD, IN + 0x1000, IN, 16);
    board.settle();
    assert!(board.is_running(FPD, stalled) && board.is_running(LPD, behind));
    board.works("fpd-dma1", (IN + 0x2000, RAM + 0x2000), (IN, RAM), 0x1000);
    map(&domain, IN + 0x4000, RAM + 0x4000, 0x1000);
    answer(&board, &domain, FaultResponse::Resolved);
    assert_eq!(board.completion(FPD, stalled).result, Ok(()));
    assert_eq!(board.completion(LPD, behind).result, Ok(()));
    assert_eq!(board.faults().len(), 1);
}

#[test]
fn many_stalled_channels_in_many_banks_are_all_resolved() {
    let board = Board::new();
    let mut random = Random(7);
    let names: Vec<String> = board.system.channels().iter().take(12).map(|c| c.name.to_string()).collect();
    let domains: Vec<_> = names.iter().map(|_| board.stalling()).collect();
    let mut started = Vec::new();
    for (i, (name, domain)) in (0..).zip(names.iter().zip(&domains)) {
        demand_paging(domain);
        board.attach(name, domain);
        let (src, dst) = (i * 0x1_0000 + random.below(0x1000), i * 0x1_0000 + 0x8000 + random.below(0x1000));
        let data: Vec<u8> = (0..0x5000).map(|_| random.next() as u8).collect();
        board.put(RAM + src, &data);
        started.push((name, dst, data, board.start(name, IN + dst, IN + src, 0x5000)));
    }
    board.settle();
    for (name, dst, data, cookie) in started {
        assert_eq!(board.completion(name, cookie).result, Ok(()), "{name}");
        assert!(board.get(RAM + dst, data.len()) == data, "{name}");
    }
}

#[test]
fn the_pl_writer_waits_as_well() {
    let board = Board::new();
    let domain = board.stalling();
    let seen = demand_paging(&domain);
    board.system.core().attach_device(board.device("pl-writer0"), &domain).unwrap();
    assert!(board.pl_write(IN + 0x5550, 0xcafe_beef, 0));
    assert_eq!(board.get32(RAM + 0x5550), 0xcafe_beef);
    assert_eq!(seen.lock().unwrap().len(), 1);
}

#[test]
fn a_guest_s_memory_can_come_on_demand_through_stage_2() {
    let board = Board::new();
    let stall = FaultModel { stall: true, ..FaultModel::default() };
    let spec = DomainSpec::Stage2(Paging::default());
    let parent = board.system.core().alloc_domain_with(board.instance(), spec, stall).unwrap();
    let pool = board.channel(FPD).driver.pool();
    map(&parent, pool.block.pa.get(), pool.block.pa.get(), 0x1000);
    let domain = board.system.core().nested_domain(&parent, Paging::default()).unwrap();
    board.attach(FPD, &domain);
    map(&domain, IN, 0x4000_0000, 0x8000);
    let target = Arc::downgrade(&parent);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        log.lock().unwrap().push((report.stage, report.bank, report.stalled));
        let Some(ipa) = report.ipa else { return FaultResponse::Terminate };
        let page = ipa.get() & !0xfff;
        let parent = target.upgrade().unwrap();
        parent.map(Iova(page), Pa(page - 0x4000_0000 + RAM), 0x1000, Prot::RW).unwrap();
        FaultResponse::Resolved
    })));
    board.works(FPD, (IN + 0x4000, RAM + 0x4000), (IN, RAM), 0x2000);
    assert_eq!(*seen.lock().unwrap(), [(Some(2), parent.bank(), true); 4]);
}

#[test]
fn a_process_page_is_faulted_in_for_the_device() {
    let board = Board::new();
    let core = board.system.core();
    let process = Process::new(board.machine().dma_memory(), Default::default()).unwrap();
    let va = process.reserve(0x4000, Prot::RW.noexec()).unwrap();
    let stall = FaultModel { stall: true, ..FaultModel::default() };
    let options = portcullis_iommu::BindOptions { fault_model: stall, ..Default::default() };
    let domain = core.bind_with(board.device(FPD), process.clone(), options).unwrap();
    let owner = Arc::downgrade(&process);
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        match owner.upgrade().map(|p| p.fault_in(report.iova)) {
            Some(Ok(_)) => FaultResponse::Resolved,
            _ => FaultResponse::Terminate,
        }
    })));
    assert_eq!(board.copy_simple(FPD, va.get() + 0x2ff0, va.get() + 0xff0, 0x40).result, Ok(()));
    assert_eq!(board.faults().len(), 4);
    // Behind its end there is nothing to fault in.
    assert!(board.copy_simple(FPD, va.get() + 0x3ff0, va.get(), 0x40).result.is_err());
    assert_eq!(board.faults().last().unwrap().report.iova, va.wrapping_add(0x4000));
    core.unbind(board.device(FPD)).unwrap();
}

#[test]
fn a_channel_that_waits_can_be_terminated_once_the_fault_is_answered() {
    let board = Board::new();
    let domain = deferring(&board);
    board.attach(FPD, &domain);
    map(&domain, IN, RAM, 0x1000);
    let cookie = board.start(FPD, IN + 0x1000, IN, 16);
    board.settle();
    let (driver, clock) = (&board.channel(FPD).driver, board.machine().clock());
    assert!(matches!(driver.terminate(&clock, 1000), Err(ZdmaError::Timeout { .. })), "it still waits");
    answer(&board, &domain, FaultResponse::Terminate);
    assert_eq!(driver.terminate(&clock, 1000), Ok(1));
    assert_eq!(board.completion(FPD, cookie).result, Err(TransferError::Terminated));
    board.faults();
    board.works(FPD, (IN + 0x800, RAM + 0x800), (IN, RAM), 0x800);
}

#[test]
fn the_end_of_a_domain_ends_what_is_stalled_in_it() {
    for interrupts in [true, false] {
        let board = Board::new();
        let domain = deferring(&board);
        board.attach(FPD, &domain);
        let (bank, cookie) = (domain.bank(), board.start(FPD, IN, IN, 16));
        match interrupts {
            true => board.settle(),
            // Nobody has looked at the fault when the domain goes.
            false => board.machine().run(1000).unwrap(),
        }
        assert!(board.is_running(FPD, cookie));
        board.system.core().detach_device(board.device(FPD)).unwrap();
        drop(domain);
        // The next owner of the bank gets neither the transaction nor the report.
        let next = board.domain_for("fpd-dma1");
        assert_eq!(next.bank(), bank);
        board.settle();
        assert!(board.completion(FPD, cookie).result.is_err());
        let fault = board.fault();
        assert_eq!((fault.report.iova, fault.name.as_deref()), (Iova(IN), Some(FPD)));
        map(&next, IN, RAM, 0x2000);
        board.works("fpd-dma1", (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
        board.no_faults();
    }
}

#[test]
fn a_handler_that_never_resolves_is_noticed() {
    let board = Board::new();
    let domain = board.stalling();
    board.attach(FPD, &domain);
    domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Resolved)));
    let cookie = board.start(FPD, IN, IN, 16);
    let error = board.system.settle().unwrap_err().to_string();
    assert!(error.contains("interrupt"), "{error}");
    domain.set_fault_handler(None);
    board.settle();
    assert!(board.completion(FPD, cookie).result.is_err());
}
