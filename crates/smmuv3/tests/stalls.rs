//! Stalled transactions: STAGs, CMD_RESUME, CMD_STALL_TERM, SMMUEN, records that wait for the event queue, STALL_MAX.

mod rig;

use portcullis_bus::{DmaError, DmaFault, DmaPort, Mmio, StallState, StallTag};
use portcullis_smmuv3::Caps;
use rig::*;

const IN: u64 = 2 << 40;

fn stalled<T: std::fmt::Debug>(result: Result<T, DmaError>) -> StallTag {
    match result.unwrap_err().fault {
        DmaFault::Stalled(tag) => tag,
        other => panic!("{other:?}"),
    }
}

fn resume(sid: u64, stag: u64, ac: bool, ab: bool) -> [u64; 2] {
    [0x44 | u64::from(ac) << 12 | u64::from(ab) << 13 | sid << 32, stag]
}

fn stag_of(event: &[u64; 4]) -> u64 {
    event[1] & 0xffff
}

#[test]
fn a_stall_is_recorded_and_retried() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, STALL);
    let mut p = r.port();
    let tag = stalled(write4(&mut p, from(1), 0x1234, 0xbeef));
    let events = r.events();
    assert_eq!(events, [[1 << 32 | 0x10, IN | 1 << 31 | stag_of(&events[0]), 0x1234, 0]]);
    assert_eq!(p.stall_state(tag), StallState::Waiting);
    r.map(root, 0x1000, DATA | RW);
    r.command(resume(1, stag_of(&events[0]), true, false));
    assert_eq!(p.stall_state(tag), StallState::Retry);
    write4(&mut p, from(1), 0x1234, 0xbeef).unwrap();
    assert_eq!(r.load(DATA + 0x230) >> 32, 0xbeef);
    assert_eq!(r.smmu.stalled(), []);
}

#[test]
fn terminating_is_an_abort_or_reads_zero() {
    for (ab, abort_only, abort) in [(false, false, false), (true, false, true), (false, true, true)] {
        let mut r = Rig::started(Caps { abort_only, ..caps() });
        r.stage1(1, STALL | A);
        let mut p = r.port();
        let tag = stalled(read4(&mut p, from(1), 0x1000));
        let stag = stag_of(&r.events()[0]);
        r.command(resume(1, stag, false, ab));
        assert_eq!(p.stall_state(tag), StallState::Terminated { abort });
    }
    // Also for stage 2, which has no A.
    let mut r = Rig::started(caps());
    r.stage2(2, 1 << 57);
    let mut p = r.port();
    let tag = stalled(read4(&mut p, from(2), 0x1000));
    let stag = stag_of(&r.events()[0]);
    r.command(resume(2, stag, false, false));
    assert_eq!(p.stall_state(tag), StallState::Terminated { abort: false });
}

#[test]
fn a_wrong_stream_or_stag_has_no_effect() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    r.stage1(2, STALL);
    let mut p = r.port();
    let one = stalled(read4(&mut p, from(1), 0x1000));
    let two = stalled(read4(&mut p, from(2), 0x1000));
    let events = r.events();
    let (a, b) = (stag_of(&events[0]), stag_of(&events[1]));
    assert_ne!(a, b);
    r.command(resume(1, b, true, false));
    r.command(resume(2, a, true, false));
    r.command(resume(1, 0x7fff, true, false));
    assert_eq!((p.stall_state(one), p.stall_state(two)), (StallState::Waiting, StallState::Waiting));
    r.command(resume(2, b, true, false));
    r.command(resume(2, b, false, true));
    assert_eq!((p.stall_state(one), p.stall_state(two)), (StallState::Waiting, StallState::Retry));
}

#[test]
fn stall_term_ends_one_stream() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    r.stage1(2, STALL);
    let mut p = r.port();
    let tags = [1, 1, 2].map(|sid| stalled(read4(&mut p, from(sid), 0x1000)));
    r.command([0x45 | 1 << 32, 0]);
    let over = StallState::Terminated { abort: true };
    assert_eq!(tags.map(|t| p.stall_state(t)), [over, over, StallState::Waiting]);
}

#[test]
fn smmuen_0_ends_all_of_its_security_state() {
    let mut r = Rig::started(secure_caps());
    r.start_secure();
    r.stage1(1, STALL);
    // The secure stream 1 uses the same CD.
    r.store(S_STRTAB + 64, &[1 | 5 << 1 | (CDS + 64), 0, 0, 0, 0, 0, 0, 0]);
    let secure = from(1).with_attrs(attrs().with_non_secure(false));
    let mut p = r.port();
    let ns = stalled(read4(&mut p, from(1), 0x1000));
    let s = stalled(read4(&mut p, secure, 0x1000));
    assert_eq!((r.events().len(), r.secure_events().len()), (1, 1));
    r.w(CR0, CMDQEN | EVENTQEN);
    assert_eq!(p.stall_state(ns), StallState::Terminated { abort: true });
    assert_eq!(p.stall_state(s), StallState::Waiting);
    // The secure queue resumes it with SSec, and not without.
    let stag = u64::from(r.smmu.stalled()[0].stag.unwrap());
    r.secure_command(resume(1, stag, true, false));
    assert_eq!(p.stall_state(s), StallState::Waiting);
    r.secure_command([resume(1, stag, true, false)[0] | 1 << 10, stag]);
    assert_eq!(p.stall_state(s), StallState::Retry);
}

#[test]
fn the_record_of_a_stall_waits_for_room() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    let mut p = r.port();
    let tags: Vec<_> = (0..10).map(|n| stalled(read4(&mut p, from(1), 0x1000 * (n + 1)))).collect();
    assert_eq!(r.r(EVENTQ_PROD), 8, "full, but stalls are never lost and never overflow");
    assert_eq!(r.smmu.stalled().iter().filter(|s| s.recorded).count(), 8);
    r.w(EVENTQ_CONS, 1);
    assert_eq!(r.r(EVENTQ_PROD), 9, "written as soon as there is room");
    let events = r.events();
    assert_eq!(events.len(), 9);
    assert_eq!(events[7][2], 0x9000);
    assert_eq!(events[8][2], 0xa000);
    assert!(tags.iter().all(|t| p.stall_state(*t) == StallState::Waiting));
}

#[test]
fn a_record_that_waits_is_dropped_for_a_retry_when_something_was_invalidated() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, STALL);
    let mut p = r.port();
    r.w(CR0, SMMUEN | CMDQEN);
    let tag = stalled(read4(&mut p, from(1), 0x1000));
    assert_eq!(r.r(EVENTQ_PROD), 0);
    r.map(root, 0x1000, DATA | RW);
    r.tlbi_all();
    assert_eq!(p.stall_state(tag), StallState::Waiting, "the queue is not writable yet");
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    assert_eq!(p.stall_state(tag), StallState::Retry);
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap(), 0);
    assert_eq!(r.events().len(), 0);
}

#[test]
fn a_record_that_memory_refuses_is_written_after_the_error() {
    let mut r = Rig::new(caps());
    r.start();
    r.stage1(1, STALL);
    r.w(CR0, SMMUEN | CMDQEN);
    r.w64(EVENTQ_BASE, NOWHERE | 3);
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    let mut p = r.port();
    let tag = stalled(read4(&mut p, from(1), 0x1000));
    assert_eq!(r.r(GERROR), 4);
    r.w(CR0, SMMUEN | CMDQEN);
    r.w64(EVENTQ_BASE, EVENTQ | 3);
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    assert_eq!(r.r(EVENTQ_PROD), 0, "the error is still active");
    r.acknowledge();
    assert_eq!(r.r(EVENTQ_PROD), 1);
    assert_eq!(p.stall_state(tag), StallState::Waiting);
}

#[test]
fn no_more_than_stall_max_have_tags() {
    let mut r = Rig::started(Caps { stall_max: 2, ..caps() });
    r.stage1(1, STALL);
    let mut p = r.port();
    let tags: Vec<_> = (0..4).map(|n| stalled(read4(&mut p, from(1), 0x1000 * (n + 1)))).collect();
    let events = r.events();
    assert_eq!(events.len(), 2);
    r.command(resume(1, stag_of(&events[0]), true, false));
    let states: Vec<_> = tags.iter().map(|t| p.stall_state(*t)).collect();
    use StallState::{Retry, Waiting};
    assert_eq!(states, [Retry, Waiting, Retry, Waiting], "the next that waited comes in its place");
    let again = stalled(read4(&mut p, from(1), 0x3000));
    assert_eq!(p.stall_state(again), Waiting);
    assert_eq!(r.events().len(), 1);
}

#[test]
fn a_stall_does_not_hold_other_transactions() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, STALL);
    r.map(root, 0x2000, DATA | RW);
    let mut p = r.port();
    let tag = stalled(read4(&mut p, from(1), 0x1000));
    assert_eq!(read4(&mut p, from(1), 0x2000).unwrap(), 0);
    // Invalidations do not touch it.
    r.tlbi_all();
    r.cfgi_all();
    assert_eq!(p.stall_state(tag), StallState::Waiting);
}

#[test]
fn an_unknown_tag_is_terminated() {
    let r = Rig::started(caps());
    assert_eq!(r.port().stall_state(StallTag(77)), StallState::Terminated { abort: true });
}

#[test]
fn a_stall_whose_configuration_is_gone_ends_as_the_new_one_says() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    let mut p = r.port();
    let tag = stalled(read4(&mut p, from(1), 0x1000));
    let stag = stag_of(&r.events()[0]);
    r.ste(1, [1, 0, 0, 0, 0, 0, 0, 0]);
    r.command([0x03 | 1 << 32, 1]);
    r.command(SYNC);
    r.command(resume(1, stag, true, false));
    assert_eq!(p.stall_state(tag), StallState::Retry);
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap_err().fault, DmaFault::Terminated);
}

#[test]
fn a_stall_of_a_reset_smmu_is_over() {
    let mut r = Rig::started(caps());
    r.stage1(1, STALL);
    let mut p = r.port();
    let tag = stalled(read4(&mut p, from(1), 0x1000));
    r.smmu.reset();
    assert_eq!(p.stall_state(tag), StallState::Terminated { abort: true });
    assert_eq!((r.r(CR0), r.r(EVENTQ_PROD)), (0, 0));
    r.ns.write32(CR0, 0).unwrap();
    r.start();
    let again = stalled(read4(&mut p, from(1), 0x1000));
    assert_ne!(again, tag, "no tag is given out twice");
}
