//! Faults of nested translation: which of the two banks records what, and whose SCTLR decides.

mod rig;

use portcullis_arch::Access;
use portcullis_bus::StallState;
use rig::*;

/// IPA of the stage 1 tables: stage 2 maps it to where they are.
const VA: u64 = 0x7000_0000;
const IPA: u64 = 0x8000_0000;

struct Nest {
    r: Rig,
    t: Tables,
    root: u64,
    root2: u64,
    /// Address of the last level stage 1 table.
    leaf_table: u64,
}

/// Bank 3 nested on stage 2 bank 5; stream 1; VA maps to IPA maps to DATA.
fn nest(sctlr1: u32, sctlr2: u32) -> Nest {
    let r = Rig::zynqmp_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    let root2 = t.alloc(2);
    t.page(root, VA, IPA | RW);
    let leaf_table = t.slot(root, 0, VA, 3) & !0xfff;
    for page in 0..32 {
        let pa = TABLES + 0x1000 * page;
        t.page2(root2, pa, pa | S2_RW);
    }
    t.page2(root2, IPA, DATA | S2_RW);
    r.stage1(3, root, sctlr1);
    r.stage2(5, root2, 9, sctlr2);
    r.nest(3, 5, 9);
    r.group(0, 1, 3);
    Nest { r, t, root, root2, leaf_table }
}

const ON: u32 = M | CFRE | CFIE;

#[test]
fn both_stages_translate() {
    let n = nest(ON, ON);
    assert_eq!(wr(&mut n.r.port(), 1, VA | 0x123), Ok(DATA | 0x123));
}

#[test]
fn a_stage_1_fault_is_the_stage_1_banks() {
    let n = nest(ON, ON);
    assert_eq!(wr(&mut n.r.port(), 1, VA + 0x1000), Err(ABORT));
    assert_eq!((n.r.rb(3, FSR), n.r.rb(3, FSYNR0), n.r.rb64(3, FAR)), (0x402, 0x13, VA + 0x1000));
    assert_eq!((n.r.rb(5, FSR), n.r.rb64(5, IPAFAR)), (0x400, 0));
    assert_eq!(n.r.irqs.pending(), [3, COMBINED_NS]);
}

#[test]
fn a_stage_2_fault_of_the_output_is_only_the_stage_2_banks() {
    let mut n = nest(ON, ON);
    n.t.page2(n.root2, IPA, 0);
    assert_eq!(wr(&mut n.r.port(), 1, VA | 0x234), Err(ABORT));
    assert_eq!((n.r.rb(3, FSR), n.r.rb(3, FSYNR0), n.r.r(n.r.cbfrsynra(3))), (0x400, 0, 0));
    // NESTED, WNR, S1CBNDX 3, level 3; FAR the VA, IPAFAR the IPA without its low bits.
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x402, 0x0003_0117));
    assert_eq!((n.r.rb64(5, FAR), n.r.rb64(5, IPAFAR)), (VA | 0x234, IPA));
    assert_eq!(n.r.r(n.r.cbfrsynra(5)), 1);
    assert_eq!(n.r.irqs.pending(), [5, COMBINED_NS]);
}

#[test]
fn stage_2_permission_and_access_flag() {
    let mut n = nest(ON, ON);
    n.t.page2(n.root2, IPA, DATA | S2_RW & !0x80);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Ok(DATA));
    assert_eq!(wr(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x408, 0x0003_0117));
    n.r.wb(5, FSR, 0xffff_ffff);
    n.t.page2(n.root2, IPA, DATA | S2_RW & !AF);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x404, 0x0003_0107));
}

#[test]
fn a_stage_2_fault_on_a_stage_1_table_says_so() {
    let mut n = nest(ON, ON);
    n.t.page2(n.root2, n.leaf_table, 0);
    assert_eq!(wr(&mut n.r.port(), 1, VA | 0x10), Err(ABORT));
    assert_eq!(n.r.rb(3, FSR), 0x400, "nothing in the stage 1 bank");
    // S1PTWF. The access that failed belongs to a write transaction.
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x402, 0x0003_011f));
    assert_eq!((n.r.rb64(5, FAR), n.r.rb64(5, IPAFAR)), (VA | 0x10, n.leaf_table));
    n.r.wb(5, FSR, 0x402);
    // Not readable by stage 2: a permission fault of the walk.
    n.t.page2(n.root2, n.leaf_table, n.leaf_table | S2_RW & !0x40);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x408, 0x0003_010f));
    assert_eq!(n.r.rb64(5, IPAFAR), n.leaf_table);
}

#[test]
fn ptw_forbids_stage_1_tables_in_device_memory() {
    let mut n = nest(ON, ON);
    let device = n.leaf_table | 0x3 | 0x1 << 2 | 0xc0 | AF;
    n.t.page2(n.root2, n.leaf_table, device);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Ok(DATA));
    n.r.wb(5, SCTLR, ON | 1 << 13);
    n.r.w(TLBIALLNSNH, 0);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x408, 0x0003_010f));
}

#[test]
fn an_external_abort_on_a_stage_1_table_is_stage_1s() {
    let mut n = nest(ON, ON);
    n.t.page2(n.root2, n.leaf_table, 0x1_0000_0000 | S2_RW);
    assert_eq!(rd(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(3, FSR), n.r.rb(3, FSYNR0), n.r.rb(5, FSR)), (0x410, 0x403, 0x400));
}

#[test]
fn a_stage_2_only_fault_is_not_nested() {
    let n = nest(ON, ON);
    n.r.group(1, 2, 5);
    assert_eq!(wr(&mut n.r.port(), 2, 0x9000_0abc), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0)), (0x402, 0x0000_0112));
    assert_eq!((n.r.rb64(5, FAR), n.r.rb64(5, IPAFAR)), (0x9000_0abc, 0x9000_0000), "FAR is the IPA");
}

#[test]
fn the_stage_2_bank_decides_about_abort_interrupt_and_stall() {
    // Stage 1 would be silent and terminate; stage 2 aborts, interrupts and stalls.
    let mut n = nest(M, ON | CFCFG);
    n.t.page2(n.root2, IPA, 0);
    let mut p = n.r.port();
    let stalled = tag(wr(&mut p, 1, VA));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(3, FSR)), (0x4000_0402, 0x400));
    assert_eq!(n.r.irqs.pending(), [5, COMBINED_NS]);
    n.t.page2(n.root2, IPA, (DATA + 0x4000) | S2_RW);
    n.r.wb(5, FSR, 0x402);
    n.r.wb(3, RESUME, 0);
    assert_eq!(p.stall_state(stalled), StallState::Waiting, "RESUME of the other bank");
    n.r.wb(5, RESUME, 0);
    assert_eq!(p.stall_state(stalled), StallState::Retry);
    assert_eq!(wr(&mut p, 1, VA), Ok(DATA + 0x4000), "from stage 1 on");
    // And the other way round: stage 2 silent, stage 1 aborts.
    let mut n = nest(ON | CFCFG, M);
    n.t.page2(n.root2, IPA, 0);
    assert_eq!(wr(&mut n.r.port(), 1, VA), Err(SILENT));
    assert!(n.r.irqs.pending().is_empty());
}

use portcullis_bus::DmaPort;

#[test]
fn a_fault_in_the_stage_2_bank_closes_every_bank_nested_on_it() {
    let mut n = nest(ON, ON);
    let root = n.t.alloc(1);
    n.t.page(root, VA, IPA | RW);
    n.r.stage1(4, root, ON);
    n.r.nest(4, 5, 9);
    n.r.group(1, 2, 4);
    n.r.stage1(6, root, ON); // not nested
    n.r.group(2, 3, 6);
    n.t.page2(n.root2, 0x9000_0000, 0);
    n.t.page(n.root, VA + 0x1000, 0x9000_0000 | RW);
    let (mut a, mut b, mut c) = (n.r.port(), n.r.port(), n.r.port());
    assert_eq!(rd(&mut a, 1, VA), Ok(DATA));
    assert_eq!(rd(&mut b, 2, VA), Ok(DATA));
    assert_eq!(rd(&mut c, 3, VA), Ok(IPA));
    assert_eq!(rd(&mut a, 1, VA + 0x1000), Err(ABORT));
    assert_eq!(rd(&mut a, 1, VA), Err(ABORT));
    assert_eq!(rd(&mut b, 2, VA), Err(ABORT));
    assert_eq!(rd(&mut c, 3, VA), Ok(IPA));
    n.r.wb(5, FSR, 0x402);
    assert_eq!(rd(&mut b, 2, VA), Ok(DATA));
}

#[test]
fn the_first_banks_fault_is_met_first() {
    // Bank 3: closed and silent. Bank 5: closed and aborting.
    let n = nest(M, M | CFRE);
    n.r.wb(3, FSRRESTORE, 2);
    n.r.wb(5, FSRRESTORE, 2);
    let mut p = n.r.port();
    assert_eq!(rd(&mut p, 1, VA), Err(SILENT));
    n.r.wb(3, FSR, 2);
    assert_eq!(rd(&mut p, 1, VA), Err(ABORT));
    n.r.wb(5, FSR, 2);
    assert_eq!(rd(&mut p, 1, VA), Ok(DATA));
}

#[test]
fn stage_1_off_leaves_stage_2() {
    let n = nest(CFRE, ON);
    assert_eq!(go(&mut n.r.port(), stream(1), IPA | 0x40, Access::Write), Ok(DATA | 0x40));
    assert_eq!(wr(&mut n.r.port(), 1, VA), Err(ABORT));
    assert_eq!((n.r.rb(5, FSR), n.r.rb(5, FSYNR0) & 0xff_000c), (0x402, 0x0003_0004), "still nested");
}

#[test]
fn stage_2_off_leaves_stage_1() {
    let n = nest(ON, CFRE);
    assert_eq!(wr(&mut n.r.port(), 1, VA), Ok(IPA));
}
