//! Stalled transactions: RESUME, its order rules, the interrupt, and what else releases them.

mod rig;

use portcullis_arch::Iova;
use portcullis_bus::{DmaFault, DmaPort, StallState, StallTag};
use portcullis_smmuv2::Config;
use rig::*;

const STALL: u32 = M | CFRE | CFIE | CFCFG;

#[test]
fn the_normal_order_fixes_clears_and_resumes() {
    let (r, mut t, root) = one_domain(STALL);
    t.page(root, 0x1000, DATA | RW);
    let mut p = r.port();
    // Eight bytes are on the mapped page, eight are not.
    let e = p.write(stream(SID), Iova(0x1ff8), &[0x77; 16]).unwrap_err();
    let DmaFault::Stalled(tag) = e.fault else { panic!("{e}") };
    assert_eq!(e.done, 8);
    assert_eq!((r.rb(0, FSR), r.rb64(0, FAR), r.rb(0, FSYNR0)), (0x4000_0402, 0x2000, 0x13));
    assert_eq!(r.irqs.pending(), [0, COMBINED_NS]);
    t.page(root, 0x2000, (DATA + 0x5000) | RW);
    assert_eq!(p.stall_state(tag), StallState::Waiting, "mapping is not enough");
    r.wb(0, FSR, 0x402);
    assert_eq!(r.rb(0, FSR), 0x4000_0400);
    assert_eq!(r.irqs.pending(), [0, COMBINED_NS], "MMU-500: high while SS is 1");
    r.wb(0, RESUME, 0);
    assert_eq!(r.rb(0, FSR), 0x400);
    assert!(r.irqs.pending().is_empty());
    assert_eq!(p.stall_state(tag), StallState::Retry);
    p.write(stream(SID), Iova(0x2000), &[0x77; 8]).unwrap();
    assert_eq!(r.peek(DATA + 0x5000), 0x7777_7777_7777_7777);
    assert_eq!(p.stall_state(tag), StallState::Terminated { abort: true }, "a tag is used up");
}

#[test]
fn a_retry_runs_the_whole_translation_again() {
    // Not from a remembered descriptor: TTBR0 and TCR are read again.
    let (r, mut t, root) = one_domain(STALL);
    let mut p = r.port();
    let first = tag(rd(&mut p, SID, 0x1000));
    let other = t.alloc(1);
    t.page(root, 0x1000, DATA | RW);
    t.page(other, 0x1000, (DATA + 0x2000) | RW);
    r.wb64(0, TTBR0, other);
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(first), StallState::Retry);
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA + 0x2000));
}

#[test]
fn a_retry_that_faults_again_is_recorded_again() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    for n in 0..3 {
        let t = tag(rd(&mut p, SID, 0x1000));
        assert_eq!(r.rb(0, FSR), 0x4000_0402, "round {n}");
        r.wb(0, FSR, 0x402);
        r.wb(0, RESUME, 0);
        assert_eq!(p.stall_state(t), StallState::Retry);
    }
}

#[test]
fn mmu_500_ignores_resume_while_fsr_is_set() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    let t = tag(rd(&mut p, SID, 0x1000));
    for write in [0, 1] {
        r.wb(0, RESUME, write);
        assert_eq!(r.rb(0, FSR), 0x4000_0402);
        assert_eq!(p.stall_state(t), StallState::Waiting);
    }
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 1);
    assert_eq!(p.stall_state(t), StallState::Terminated { abort: true });
}

#[test]
fn elsewhere_resume_first_works_and_can_fault_again() {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    r.stage1(0, root, STALL | HUPCF);
    r.group(0, 1, 0);
    let mut p = r.port();
    let first = tag(rd(&mut p, 1, 0x1000));
    assert!(r.irqs.level(0));
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(first), StallState::Retry);
    assert_eq!(r.rb(0, FSR), 0x402, "SS is gone, the fault is still recorded");
    let second = tag(rd(&mut p, 1, 0x1000));
    assert_eq!(r.rb(0, FSR), 0xc000_0402, "MULTI");
    r.wb(0, FSR, 0x8000_0402);
    assert!(!r.irqs.level(0), "SS alone does not count here");
    r.wb(0, RESUME, 1);
    assert_eq!(p.stall_state(second), StallState::Terminated { abort: true });
    // With HUPCF 0 what is retried is aborted while the fault stays recorded.
    r.wb(0, SCTLR, M | CFCFG);
    let third = tag(rd(&mut p, 1, 0x1000));
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(third), StallState::Retry);
    assert_eq!(rd(&mut p, 1, 0x1000), Err(ABORT));
}

#[test]
fn resume_with_nothing_stalled_does_nothing() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, DATA | RW);
    let mut p = r.port();
    r.wb(0, RESUME, 1);
    assert_eq!(rd(&mut p, SID, 0x1000), Ok(DATA));
    assert_eq!(rd(&mut p, SID, 0x5000), Err(ABORT));
    r.wb(0, RESUME, 0);
    assert_eq!(r.rb(0, FSR), 0x402);
    assert_eq!(rd(&mut p, SID, 0x1000), Err(ABORT));
}

#[test]
fn terminating_uses_cfre_of_that_moment_and_records_nothing() {
    for (cfre, abort) in [(CFRE, true), (0, false)] {
        let (r, ..) = one_domain(STALL);
        let mut p = r.port();
        let t = tag(rd(&mut p, SID, 0x1000));
        r.wb(0, SCTLR, M | CFCFG | cfre);
        r.wb(0, FSR, 0x402);
        r.wb(0, RESUME, 1);
        assert_eq!(p.stall_state(t), StallState::Terminated { abort });
        assert_eq!(r.rb(0, FSR), 0x400);
    }
}

#[test]
fn fsrrestore_does_not_touch_ss() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    let t = tag(rd(&mut p, SID, 0x1000));
    r.wb(0, FSRRESTORE, 0);
    assert_eq!(r.rb(0, FSR), 0x4000_0400);
    assert_eq!(p.stall_state(t), StallState::Waiting);
    r.wb(0, FSRRESTORE, 0x4000_0008);
    assert_eq!(r.rb(0, FSR), 0x4000_0408);
    r.wb(0, FSR, 0xffff_ffff);
    assert_eq!(r.rb(0, FSR), 0x4000_0400, "write one to clear does not touch it either");
    r.wb(0, RESUME, 0);
    r.wb(0, FSRRESTORE, 0x4000_0000);
    assert_eq!(r.rb(0, FSR), 0x400, "nor can it be set");
}

#[test]
fn rewriting_the_bank_retries_what_is_stalled() {
    type Change = fn(&Rig);
    let changes: [(&str, Change); 3] = [
        ("CBAR", |r| r.w(r.cbar(0), LINUX_CBAR | 5)),
        ("CBA2R", |r| r.w(r.cba2r(0), 1)),
        ("NSNUMCBO", |r| r.ws(SCR1, 0x0201_3000)),
    ];
    for (what, change) in changes {
        let (r, ..) = one_domain(STALL);
        let mut p = r.port();
        let t = tag(rd(&mut p, SID, 0x1000));
        change(&r);
        assert_eq!(p.stall_state(t), StallState::Retry, "{what}");
        assert_eq!(r.rs(r.cb(0, FSR)), 0x402, "{what}: SS is gone");
    }
    // A bank that keeps its owner keeps its stall.
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    let t = tag(rd(&mut p, SID, 0x1000));
    r.ws(SCR1, 0x0201_3008);
    r.w(r.cbar(1), LINUX_CBAR);
    assert_eq!((p.stall_state(t), r.rb(0, FSR)), (StallState::Waiting, 0x4000_0402));
}

#[test]
fn reset_ends_every_stall() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    let t = tag(rd(&mut p, SID, 0x1000));
    r.smmu.reset();
    assert_eq!(p.stall_state(t), StallState::Terminated { abort: true });
    assert!(r.irqs.pending().is_empty());
}

#[test]
fn an_unknown_tag_is_over() {
    let (r, ..) = one_domain(STALL);
    for t in [0, 1, 77, u64::MAX] {
        assert_eq!(r.port().stall_state(StallTag(t)), StallState::Terminated { abort: true });
    }
}

#[test]
fn linux_resumes_every_bank_it_owns_separately() {
    let (r, mut t, _) = one_domain(STALL);
    let root = t.alloc(1);
    r.stage1(1, root, STALL);
    r.group(1, 0x868, 1);
    let mut p = r.port();
    let (a, b) = (tag(rd(&mut p, SID, 0x1000)), tag(rd(&mut p, 0x868, 0x1000)));
    r.wb(1, FSR, 0x402);
    r.wb(1, RESUME, 1);
    assert_eq!(p.stall_state(a), StallState::Waiting);
    assert_eq!(p.stall_state(b), StallState::Terminated { abort: true });
}

/// Linux from 6.16 on masks CFIE while a transaction is stalled, for the line stays high otherwise.
#[test]
fn masking_cfie_silences_a_stalled_bank() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    let t = tag(rd(&mut p, SID, 0x1000));
    r.wb(0, SCTLR, STALL & !CFIE);
    assert!(r.irqs.pending().is_empty());
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 0);
    r.wb(0, SCTLR, STALL);
    assert!(r.irqs.pending().is_empty());
    assert_eq!(p.stall_state(t), StallState::Retry);
}

#[test]
fn stalld_turns_stalling_off_where_it_exists() {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    r.stage1(0, root, STALL);
    r.group(0, 1, 0);
    r.w(CR0, 0x0020_0506);
    assert_eq!(r.rb(0, SCTLR), STALL & !CFCFG, "CFCFG reads zero");
    r.wb(0, SCTLR, STALL);
    assert_eq!(r.rb(0, SCTLR), STALL & !CFCFG);
    assert_eq!(rd(&mut r.port(), 1, 0x1000), Err(ABORT));
    assert_eq!(r.rb(0, FSR), 0x402);
}

#[test]
fn gse_lets_one_stall_stop_all_banks_where_it_exists() {
    let r = Rig::new(Config { secure: true, ..Config::default() });
    r.w(CR0, 0x0020_0402);
    let mut t = Tables::new(&r);
    for n in 0..2u8 {
        let root = t.alloc(1);
        t.page(root, 0x1000, DATA | RW);
        r.stage1(n, root, STALL);
        r.group(n.into(), n.into(), n.into());
    }
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, 0x1000), Ok(DATA));
    let first = tag(rd(&mut p, 0, 0x5000));
    assert_eq!(rd(&mut p, 1, 0x1000), Ok(DATA), "GSE is 0");
    r.w(CR0, 0x0020_0602);
    let second = tag(rd(&mut p, 1, 0x1000));
    assert_eq!(r.rb(1, FSR), 0x400);
    assert_eq!(
        go(&mut p, secure(9), DATA, portcullis_arch::Access::Read),
        Ok(DATA),
        "the other side goes on"
    );
    r.wb(0, FSR, 0x402);
    r.wb(0, RESUME, 1);
    assert_eq!(p.stall_state(first), StallState::Terminated { abort: true });
    assert_eq!(p.stall_state(second), StallState::Retry);
    assert_eq!(rd(&mut p, 1, 0x1000), Ok(DATA));
}

/// Masters that never ask what became of their stalled transactions cost nothing in the long run.
#[test]
fn forgotten_stalls_do_not_pile_up() {
    let (r, ..) = one_domain(STALL);
    let mut p = r.port();
    for _ in 0..70_000 {
        tag(rd(&mut p, SID, 0x1000));
        r.wb(0, FSR, 0x402);
        r.wb(0, RESUME, 0);
    }
    let last = tag(rd(&mut p, SID, 0x1000));
    assert_eq!(p.stall_state(last), StallState::Waiting);
}
