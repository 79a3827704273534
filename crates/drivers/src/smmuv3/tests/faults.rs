//! Events and page requests on their way to the owner of the domain, and the answers.

use alloc::boxed::Box;

use portcullis_arch::Access;

use super::*;
use crate::fault::{FaultDetail, FaultReason, FaultReport, FaultResponse};

/// A handler that answers always the same, and what it was told.
fn handler(response: FaultResponse) -> (Arc<dyn FaultHandler>, Arc<Mutex<Vec<FaultReport>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let seen = told.clone();
    let answer = move |report: &FaultReport| {
        seen.lock().push(*report);
        response
    };
    (Arc::new(answer), told)
}

/// F_TRANSLATION of a write to 0x7000, stalled with a tag, with or without a substream.
fn stalled(stream: u64, substream: Option<u64>, stag: u64) -> [u64; 4] {
    let substream = substream.map_or(0, |substream| 1 << 11 | substream << 12);
    [stream << 32 | substream | 0x10, 1 << 31 | stag | 2 << 40, 0x7000, 0]
}

const fn resume(stream: u64, stag: u64, retry: bool) -> (u64, u64) {
    (stream << 32 | 0x44 | if retry { 1 << 12 } else { 1 << 13 }, stag)
}

#[test]
fn a_stalled_access_is_answered_by_the_owner_of_its_domain() {
    let rig = rig();
    let master = rig.master(&[9], SUBSTREAMS);
    let make = |handler| {
        let fault_model = FaultModel { stall: true, ..FaultModel::default() };
        let options = DomainOptions { fault_model, handler: Some(handler) };
        rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap()
    };
    let ((good, good_told), (bad, bad_told)) =
        (handler(FaultResponse::Resolved), handler(FaultResponse::Terminate));
    let (main, process) = (make(bad), make(good));
    rig.smmu.attach(&master, &main).unwrap();
    rig.smmu.attach_substream(&master, SubstreamId(4), &process).unwrap();
    rig.hardware.take();
    rig.hardware.event(stalled(9, Some(4), 0x11));
    rig.hardware.event(stalled(9, None, 0x12));
    assert_eq!(rig.smmu.handle_irq(), 2);
    assert_eq!(rig.hardware.commands(), [resume(9, 0x11, true), resume(9, 0x12, false)]);
    let report = good_told.lock()[0];
    assert_eq!((report.reason, report.access), (FaultReason::Translation, Access::Write));
    assert_eq!((report.stream, report.substream), (Some(StreamId(9)), Some(SubstreamId(4))));
    assert_eq!((report.iova, report.stage, report.stalled), (Iova(0x7000), Some(1), true));
    assert_eq!(bad_told.lock().len(), 1);
    assert_eq!(rig.smmu.take_faults().faults.len(), 2);
    assert_eq!(rig.smmu.handle_irq(), 0);
}

#[test]
fn a_substream_that_nobody_uses_is_refused_and_told_to_the_default_handler() {
    let rig = rig();
    let _master = rig.master(&[9], SUBSTREAMS);
    let (default, told) = handler(FaultResponse::Resolved);
    rig.smmu.set_fault_handler(Some(default));
    rig.hardware.take();
    rig.hardware.event(stalled(9, Some(5), 0x21));
    // A last page request of group 3 of an unknown substream.
    rig.hardware.request([9 | 5 << 32 | 1 << 60 | 1 << 62 | 1 << 63, 0x8000 | 3]);
    assert_eq!(rig.smmu.handle_irq(), 2);
    let refused = (9 << 32 | 5 << 12 | 1 << 11 | 0x41, 3 | 1 << 12);
    assert_eq!(rig.hardware.commands(), [resume(9, 0x21, false), refused]);
    assert_eq!(told.lock().len(), 2);
}

#[test]
fn a_deferred_answer_comes_later_or_when_the_stream_is_detached() {
    let rig = rig();
    let master = rig.master(&[9], SUBSTREAMS);
    let (default, told) = handler(FaultResponse::Deferred);
    rig.smmu.set_fault_handler(Some(default));
    let domain = rig.stalling();
    rig.smmu.attach(&master, &domain).unwrap();
    rig.hardware.event(stalled(9, None, 1));
    rig.hardware.event(stalled(9, None, 2));
    rig.hardware.take();
    assert_eq!(rig.smmu.handle_irq(), 2);
    assert!(rig.hardware.commands().is_empty());
    assert_eq!(rig.smmu.waiting(), (2, 0));
    let first = told.lock()[0];
    rig.smmu.answer(&first, FaultResponse::Resolved).unwrap();
    assert_eq!(rig.hardware.commands(), [resume(9, 1, true)]);
    assert_eq!(
        rig.smmu.answer(&first, FaultResponse::Resolved),
        Err(Error::NothingStalled { stream: StreamId(9), stag: 1 })
    );
    rig.smmu.detach(&master).unwrap();
    let commands = rig.hardware.commands();
    // The entry aborts first, then what waits ends: what was known, and what was not.
    assert_eq!(commands[commands.len() - 2..], [resume(9, 2, false), (9 << 32 | 0x45, 0)]);
    assert_eq!(rig.smmu.waiting(), (0, 0));
}

#[test]
fn a_page_request_group_is_answered_as_a_whole() {
    let rig = rig();
    let master = rig.master(&[9], MasterOptions { substream_bits: 8, ats: true, can_stall: false });
    let (good, told) = handler(FaultResponse::Resolved);
    let options = DomainOptions { handler: Some(good), ..DomainOptions::default() };
    let domain = rig.smmu.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap();
    rig.smmu.attach_substream(&master, SubstreamId(7), &domain).unwrap();
    rig.hardware.take();
    let page = |address: u64, last: u64| [9 | 7 << 32 | 1 << 61 | last << 62 | 1 << 63, address | 5];
    rig.hardware.request(page(0x1000, 0));
    assert_eq!(rig.smmu.handle_irq(), 1);
    assert!(rig.hardware.commands().is_empty() && told.lock().is_empty());
    rig.hardware.request(page(0x2000, 1));
    assert_eq!(rig.smmu.handle_irq(), 1);
    assert_eq!(rig.hardware.commands(), [(9 << 32 | 7 << 12 | 1 << 11 | 0x41, 5 | 2 << 12)]);
    let pages: Vec<Iova> = told.lock().iter().map(|report| report.iova).collect();
    assert_eq!(pages, [Iova(0x1000), Iova(0x2000)]);
}

#[test]
fn an_overflow_and_a_global_error_are_reports() {
    let rig = rig();
    let (default, told) = handler(FaultResponse::Terminate);
    rig.smmu.set_fault_handler(Some(default));
    rig.hardware.event([1 << 32 | 0x04, 0, 0, 0]);
    let prod = rig.hardware.mmio.get32(hardware::EVENTQ_PROD);
    rig.hardware.mmio.set32(hardware::EVENTQ_PROD, prod | 1 << 31);
    rig.hardware.mmio.set32(0x60, 1 << 2);
    assert_eq!(rig.smmu.handle_irq(), 3);
    assert_eq!(rig.hardware.mmio.get32(hardware::EVENTQ_CONS), prod | 1 << 31, "acknowledged");
    assert_eq!(rig.hardware.mmio.get32(0x64), 1 << 2, "acknowledged");
    let told = told.lock();
    assert!(matches!(told[0].detail, FaultDetail::SmmuV3Global(gerror::GlobalError::EventQueueAbort)));
    assert_eq!((told[1].reason, told[1].stream), (FaultReason::InvalidContext, Some(StreamId(1))));
    let lost = FaultDetail::SmmuV3Lost(fault::Source::Events, evtq::Lost::Overflow);
    assert_eq!(told[2].detail, lost);
    assert!(told[0].to_string().contains("EVENTQ write aborted"), "{}", told[0]);
}

#[test]
fn a_handler_may_change_domains() {
    let rig = rig();
    let master = Arc::new(rig.master(&[9], SUBSTREAMS));
    let (first, second) = (rig.stalling(), rig.stalling());
    rig.smmu.attach(&master, &first).unwrap();
    let (smmu, owner, next) = (rig.smmu.clone(), master.clone(), second.clone());
    let switch = move |_: &FaultReport| match smmu.attach(&owner, &next) {
        Ok(()) => FaultResponse::Resolved,
        Err(_) => FaultResponse::Terminate,
    };
    rig.smmu.set_fault_handler(Some(Arc::new(switch)));
    rig.hardware.event(stalled(9, None, 1));
    rig.hardware.take();
    rig.smmu.handle_irq();
    assert_eq!(rig.hardware.commands().last(), Some(&resume(9, 1, true)));
    assert_eq!(rig.hardware.look(9, None).1[1], second.table_root().unwrap().ttbr0.get());
    // Otherwise the handler keeps the SMMU alive.
    rig.smmu.set_fault_handler(None);
}

#[test]
fn a_change_within_a_change_gives_up_instead_of_hanging() {
    let rig = rig();
    let (master, domain) = (Arc::new(rig.master(&[9], MasterOptions::default())), rig.stage1());
    let result = Arc::new(Mutex::new(None));
    let (smmu, owner, other, answer) = (rig.smmu.clone(), master.clone(), domain.clone(), result.clone());
    rig.hardware.inside.lock().watch = Some(Box::new(move |_, [first, _]| {
        if first as u8 == 0x03 && answer.lock().is_none() {
            *answer.lock() = Some(smmu.attach(&owner, &other));
        }
    }));
    rig.smmu.attach(&master, &domain).unwrap();
    rig.hardware.inside.lock().watch = None;
    assert!(matches!(*result.lock(), Some(Err(Error::ConfigurationBusy { waited_us })) if waited_us >= 1000));
}
