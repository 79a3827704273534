//! What a recorded fault does to later transactions: the table of CFCFG and HUPCF, row by row, and its transitions.

mod rig;

use portcullis_bus::{DmaPort, StallState};
use rig::*;

const GOOD: u64 = 0x1000;
const BAD: u64 = 0x9000;

fn bank(sctlr: u32) -> Rig {
    let (r, mut t, root) = one_domain(M | CFRE | CFIE | sctlr);
    t.page(root, GOOD, DATA | RW);
    t.page(root, 0x2000, (DATA + 0x1000) | RW);
    r
}

#[test]
fn terminate_and_hupcf_0_closes_the_bank_until_fsr_is_cleared() {
    let r = bank(0);
    let (mut a, mut b) = (r.port(), r.port());
    assert_eq!(rd(&mut a, SID, GOOD), Ok(DATA));
    assert_eq!(rd(&mut b, SID, GOOD), Ok(DATA));
    assert_eq!(wr(&mut a, SID, BAD), Err(ABORT));
    // TLB hits in every port, walks and further faults: all terminated, nothing recorded, MULTI stays 0.
    for _ in 0..3 {
        assert_eq!(rd(&mut a, SID, GOOD), Err(ABORT));
        assert_eq!(rd(&mut b, SID, GOOD), Err(ABORT), "another TBU");
        assert_eq!(rd(&mut b, SID, 0x2000), Err(ABORT));
        assert_eq!(rd(&mut b, SID, 0xa000), Err(ABORT));
    }
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR), r.rb(0, FSYNR0)), (0x402, BAD, 0x13));
    r.wb(0, FSR, 0x402);
    assert_eq!(rd(&mut a, SID, GOOD), Ok(DATA));
    assert_eq!(rd(&mut b, SID, 0x2000), Ok(DATA + 0x1000));
}

#[test]
fn terminate_and_hupcf_1_goes_on_and_counts() {
    let r = bank(HUPCF);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA));
    assert_eq!(wr(&mut p, SID, BAD), Err(ABORT));
    assert_eq!(r.rb(0, FSR), 0x402);
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA), "processed");
    assert_eq!(rd(&mut p, SID, 0x2000), Ok(DATA + 0x1000));
    assert_eq!(r.rb(0, FSR), 0x402);
    assert_eq!(rd(&mut p, SID, 0xa000), Err(ABORT));
    assert_eq!(r.rb(0, FSR), 0x8000_0402, "MULTI");
    assert_eq!((r.rb64(0, FAR), r.rb(0, FSYNR0)), (BAD, 0x13), "of the first fault");
    // MULTI alone keeps the record closed.
    r.wb(0, FSR, 0x2);
    assert_eq!(rd(&mut p, SID, 0xb000), Err(ABORT));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR)), (0x8000_0400, BAD));
    r.wb(0, FSR, 0x8000_0000);
    assert_eq!(rd(&mut p, SID, 0xb000), Err(ABORT));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR)), (0x402, 0xb000));
}

#[test]
fn stall_and_hupcf_0_makes_everyone_wait() {
    let r = bank(CFCFG);
    let (mut a, mut b) = (r.port(), r.port());
    assert_eq!(rd(&mut b, SID, GOOD), Ok(DATA));
    let first = tag(wr(&mut a, SID, BAD));
    assert_eq!(r.rb(0, FSR), 0x4000_0402, "SS");
    let second = tag(rd(&mut b, SID, GOOD));
    let third = tag(rd(&mut b, SID, 0xa000));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR)), (0x4000_0402, BAD), "no MULTI");
    for t in [first, second, third] {
        assert_eq!(a.stall_state(t), StallState::Waiting);
    }
    r.wb(0, FSR, 0x402);
    let fourth = tag(rd(&mut b, SID, GOOD));
    r.wb(0, RESUME, 1);
    assert_eq!(a.stall_state(first), StallState::Terminated { abort: true });
    for t in [second, third, fourth] {
        assert_eq!(b.stall_state(t), StallState::Retry);
    }
    assert_eq!(r.rb(0, FSR), 0x400);
    assert_eq!(rd(&mut b, SID, GOOD), Ok(DATA));
}

#[test]
fn stall_and_hupcf_1_goes_on_and_faults_wait_unrecorded() {
    let r = bank(CFCFG | HUPCF);
    let mut p = r.port();
    let first = tag(wr(&mut p, SID, BAD));
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA), "processed");
    let second = tag(rd(&mut p, SID, 0xa000));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR)), (0x4000_0402, BAD), "unrecorded, no MULTI");
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 1);
    assert_eq!(p.stall_state(first), StallState::Terminated { abort: true });
    assert_eq!(p.stall_state(second), StallState::Retry, "only the recorded one is terminated");
    // The retried one records itself now.
    let again = tag(rd(&mut p, SID, 0xa000));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR), r.rb(0, FSYNR0)), (0x4000_0402, 0xa000, 3));
    assert_eq!(p.stall_state(again), StallState::Waiting);
}

#[test]
fn changed_to_terminate_while_stalled_still_waits_for_resume() {
    let r = bank(CFCFG);
    let mut p = r.port();
    let first = tag(rd(&mut p, SID, BAD));
    r.wb(0, SCTLR, M | CFRE);
    let second = tag(rd(&mut p, SID, GOOD));
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 0);
    assert_eq!((p.stall_state(first), p.stall_state(second)), (StallState::Retry, StallState::Retry));
    assert_eq!(rd(&mut p, SID, BAD), Err(ABORT), "terminated now");
}

#[test]
fn changed_to_stall_after_a_terminated_fault_aborts() {
    // CFRE is 0: the abort does not come from there.
    let r = bank(0);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, BAD), Err(ABORT));
    r.wb(0, SCTLR, M | CFCFG);
    assert_eq!(rd(&mut p, SID, GOOD), Err(ABORT));
    r.wb(0, SCTLR, M);
    assert_eq!(rd(&mut p, SID, GOOD), Err(SILENT));
    r.wb(0, FSR, 2);
    r.wb(0, SCTLR, M | CFCFG);
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA));
}

/// The same with HUPCF 1: the next fault is counted and stalls, and RESUME reaches it.
#[test]
fn a_stall_behind_a_terminated_fault_can_be_resumed() {
    let r = bank(HUPCF);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, BAD), Err(ABORT));
    r.wb(0, SCTLR, M | CFRE | CFCFG | HUPCF);
    let waiting = tag(rd(&mut p, SID, 0xa000));
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR)), (0xc000_0402, BAD), "MULTI and SS");
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(waiting), StallState::Waiting, "MMU-500: not while FSR is set");
    r.wb(0, FSR, 0x8000_0402);
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(waiting), StallState::Retry);
}

#[test]
fn changed_to_hupcf_1_reopens_the_bank() {
    let r = bank(0);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA));
    assert_eq!(rd(&mut p, SID, BAD), Err(ABORT));
    assert_eq!(rd(&mut p, SID, GOOD), Err(ABORT));
    r.wb(0, SCTLR, M | CFRE | HUPCF);
    assert_eq!(rd(&mut p, SID, GOOD), Ok(DATA));
    r.wb(0, SCTLR, M | CFRE);
    assert_eq!(rd(&mut p, SID, GOOD), Err(ABORT));
}

#[test]
fn a_closed_bank_does_not_close_others() {
    let r = bank(0);
    let mut t = Tables::at(&r, TABLES + 0x10_0000);
    let root = t.alloc(1);
    t.page(root, GOOD, (DATA + 0x8000) | RW);
    r.stage1(1, root, LINUX_SCTLR);
    r.group(1, 0x868, 1);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, BAD), Err(ABORT));
    assert_eq!(rd(&mut p, 0x868, GOOD), Ok(DATA + 0x8000));
    assert_eq!(rd(&mut p, SID, GOOD), Err(ABORT));
}

#[test]
fn two_streams_of_one_bank_share_its_fate() {
    let r = bank(0);
    r.group(1, 0x868, 0);
    let (mut a, mut b) = (r.port(), r.port());
    assert_eq!(rd(&mut b, 0x868, GOOD), Ok(DATA));
    assert_eq!(rd(&mut a, SID, BAD), Err(ABORT));
    assert_eq!(rd(&mut b, 0x868, GOOD), Err(ABORT));
}
