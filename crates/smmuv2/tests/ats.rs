//! Address translation operations: GATS* through GPAR, CBn_ATS1* through PAR. A ZynqMP has none.

mod rig;

use portcullis_smmuv2::Config;
use rig::*;

const VA: u64 = 0x7000_0000;
const ERROR: u64 = 1;

/// Success in the long format: bit 11 is one, NS (a non-secure bank), SH, PA, MAIR byte.
fn good(pa: u64, sh: u64, mair: u64) -> u64 {
    mair << 56 | pa | 1 << 11 | 1 << 9 | sh << 7
}

/// Bank 0: stage 1 with VA; bank 1: the same nested on bank 2; bank 2: stage 2.
fn world() -> (Rig, Tables, u64, u64) {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let (root, root2) = (t.alloc(1), t.alloc(2));
    t.page(root, VA, 0x8000_0000 | RW);
    t.page(root, VA + 0x1000, 0x8000_1000 | RW | READ_ONLY);
    t.page(root, VA + 0x2000, 0x8000_2000 | PAGE | NG);
    t.page(root, VA + 0x3000, 0x8000_3000 | RW & !AF);
    for page in 0..32 {
        let pa = TABLES + 0x1000 * page;
        t.page2(root2, pa, pa | S2_RW);
    }
    t.page2(root2, 0x8000_0000, DATA | S2_RW);
    t.page2(root2, 0x8000_1000, (DATA + 0x1000) | S2_RW & !0x80);
    r.stage1(0, root, M | CFRE);
    r.stage1(1, root, M | CFRE);
    r.stage2(2, root2, 0, M | CFRE);
    r.nest(1, 2, 0);
    (r, t, root, root2)
}

/// One of the eight operations: 0 1UR, 1 1UW, 2 1PR, 3 1PW, 4 12UR, 5 12UW, 6 12PR, 7 12PW.
fn gats(r: &Rig, op: u64, va: u64, bank: u64) -> u64 {
    r.w64(GATS + 8 * op, va | bank);
    assert_eq!(r.r(GATSR), 0, "not active");
    r.r64(GPAR)
}

#[test]
fn stage_1_operations_answer_the_intermediate_address() {
    let (r, ..) = world();
    for op in 0..4 {
        assert_eq!(gats(&r, op, VA, 0), good(0x8000_0000, 3, 0xff), "operation {op}");
    }
    assert_eq!(gats(&r, 0, VA, 1), good(0x8000_0000, 3, 0xff), "nested: the IPA");
}

#[test]
fn both_stages_answer_the_physical_address() {
    let (r, ..) = world();
    for op in 4..8 {
        assert_eq!(gats(&r, op, VA, 1), good(DATA, 3, 0xff), "operation {op}");
        assert_eq!(gats(&r, op, VA, 0), good(0x8000_0000, 3, 0xff), "no stage 2: its own output");
    }
}

#[test]
fn permissions_follow_the_operation() {
    let (r, ..) = world();
    // F, PF, FORMAT AArch64, PLVL 3.
    let pf = 3 << 32 | 2 << 8 | 8 | ERROR;
    for (op, read_only, kernel_only) in
        [(0, false, true), (1, true, true), (2, false, false), (3, true, false)]
    {
        let got = gats(&r, op, VA + 0x1000, 0);
        assert_eq!(got == pf, read_only, "operation {op} on a read-only page");
        let got = gats(&r, op, VA + 0x2000, 0);
        assert_eq!(got == pf, kernel_only, "operation {op} on a privileged page");
    }
    // Stage 2 refuses the write: STAGE.
    assert_eq!(gats(&r, 4, VA + 0x1000, 1), good(DATA + 0x1000, 3, 0xff));
    // Writable for stage 1, read only for stage 2.
    let (r, mut t, root, _) = world();
    t.page(root, VA, 0x8000_1000 | RW);
    assert_eq!(gats(&r, 5, VA, 1), 1 << 35 | pf);
    assert_eq!(gats(&r, 1, VA, 1), good(0x8000_1000, 3, 0xff), "stage 1 alone does not ask");
}

#[test]
fn faults_are_told_by_kind_level_and_stage() {
    let (r, mut t, root, root2) = world();
    let error = |bit: u64, level: u64, stage2: bool| {
        level << 32 | u64::from(stage2) << 35 | 2 << 8 | 1 << bit | ERROR
    };
    assert_eq!(gats(&r, 0, 0x1_0000_0000, 0), error(1, 1, false), "TF");
    assert_eq!(gats(&r, 0, VA + 0x3000, 0), error(2, 3, false), "AFF");
    t.page(root, VA + 0x4000, 1 << 47 | RW);
    r.wb(0, TCR2, 0x0003_8012);
    assert_eq!(gats(&r, 0, VA + 0x4000, 0), error(7, 3, false), "ASF");
    let at = t.slot(root, 0, 0x2_0000_0000, 1);
    t.store(at, 0x1_0000_0003);
    assert_eq!(gats(&r, 0, 0x2_0000_0000, 0), error(4, 2, false), "EF");
    t.page2(root2, 0x8000_0000, 0);
    assert_eq!(gats(&r, 4, VA, 1), error(1, 3, true), "TF at stage 2");
    // Nothing else is recorded anywhere.
    for bank in 0..3 {
        assert_eq!(r.rb(bank, FSR), 0x400);
    }
    assert_eq!(r.r(GFSR), 0);
    assert!(r.irqs.pending().is_empty());
}

#[test]
fn banks_that_cannot_answer() {
    let (r, ..) = world();
    const UCBF: u64 = 1 << 30 | 1;
    const ICF: u64 = 1 << 29 | 1;
    assert_eq!(gats(&r, 0, VA, 2), UCBF, "a stage 2 bank");
    assert_eq!(gats(&r, 0, VA, 32), UCBF);
    assert_eq!(gats(&r, 0, VA, 255), UCBF);
    r.w(r.cbar(3), 0x0002_0000);
    assert_eq!(gats(&r, 0, VA, 3), ICF);
    r.w(r.cbar(3), 0x0003_ff00);
    assert_eq!(gats(&r, 4, VA, 3), UCBF, "its stage 2 bank does not exist");
    r.w(r.cbar(3), 0x0003_0000);
    assert_eq!(gats(&r, 4, VA, 3), ICF, "its stage 2 bank is a stage 1 bank");
}

#[test]
fn attributes_are_a_mair_byte() {
    let (r, mut t, root, _) = world();
    for (index, sh, byte) in [(0u64, 2, 0x44), (1, 3, 0xff), (2, 2, 0x04)] {
        t.page(root, VA, 0x8000_0000 | 3 | index << 2 | USER | 3 << 8 | AF | NG);
        assert_eq!(gats(&r, 0, VA, 0), good(0x8000_0000, sh, byte), "index {index}");
    }
    // CBAR's part counts for both stages.
    t.page(root, VA, 0x8000_0000 | RW);
    r.w(r.cbar(0), 0x0001_5300);
    assert_eq!(gats(&r, 4, VA, 0), good(0x8000_0000, 2, 0x44));
    assert_eq!(gats(&r, 0, VA, 0), good(0x8000_0000, 3, 0xff));
}

#[test]
fn the_short_format_has_its_own_par() {
    let (r, mut t, ..) = world();
    let table = t.alloc(4);
    // A section and a supersection at 0x12_xxxx_xxxx, TEX remap off: TEX 1, C, B: write-back write-allocate, S.
    let word = |i: u64, v: u32| {
        let at = table + 4 * i;
        let old = r.peek(at & !7);
        let shift = 8 * (at & 4);
        r.poke(at & !7, old & !(0xffff_ffff << shift) | u64::from(v) << shift);
    };
    word(0x700, 0x6000_0000 | 0x1_1c0e);
    for i in 0..16 {
        word(0x800 + i, 0x6000_0000 | 1 << 20 | 2 << 5 | 1 << 18 | 0x1_1c0e);
    }
    r.stage1(3, table, M | CFRE);
    r.w(r.cba2r(3), 0);
    r.wb(3, TCR, 0);
    // Outer 1 (write-back write-allocate), inner 5, SH, NS; inner shareable: NOS.
    assert_eq!(gats(&r, 0, VA + 0x5000, 3), 0x6000_5000 | 1 << 10 | 1 << 9 | 1 << 7 | 5 << 4 | 1 << 2);
    // SS and PA[39:32] = 0x21 in bits 23:16.
    let supersection = 0x6000_0000 | 0x21 << 16 | 1 << 10 | 1 << 9 | 1 << 7 | 5 << 4 | 1 << 2 | 2;
    assert_eq!(gats(&r, 0, 0x8000_0000, 3), supersection);
    // A fault: FORMAT 0, PLVL 1.
    assert_eq!(gats(&r, 0, 0x9000_0000, 3), 1 << 32 | 2 | ERROR);
    assert_eq!(gats(&r, 0, 1 << 32, 3), 1 << 32 | 2 | ERROR);
}

#[test]
fn a_low_word_write_operates_and_a_high_word_write_does_not() {
    let (r, ..) = world();
    r.w64(GPAR, 0);
    r.w(GATS + 4, 0);
    assert_eq!(r.r64(GPAR), 0);
    r.w(GATS, VA as u32);
    assert_eq!(r.r64(GPAR), good(0x8000_0000, 3, 0xff));
    r.wb64(0, PAR, 0);
    r.wb(0, ATS1UR + 4, 0);
    assert_eq!(r.rb64(0, PAR), 0);
    r.wb(0, ATS1UR, VA as u32 | 0xfff);
    assert_eq!(r.rb64(0, PAR), good(0x8000_0000, 3, 0xff), "bits 11:0 have no meaning");
}

#[test]
fn bank_operations_answer_in_par() {
    let (r, ..) = world();
    let pf = 3 << 32 | 2 << 8 | 8 | ERROR;
    for (reg, read_only, kernel_only) in
        [(ATS1PR, false, false), (ATS1PW, true, false), (ATS1UR, false, true), (ATS1UW, true, true)]
    {
        r.wb64(0, reg, VA);
        assert_eq!(r.rb64(0, PAR), good(0x8000_0000, 3, 0xff));
        assert_eq!(r.rb(0, 0x8f0), 0, "ATSR");
        r.wb64(0, reg, VA + 0x1000);
        assert_eq!(r.rb64(0, PAR) == pf, read_only, "{reg:#x}");
        r.wb64(0, reg, VA + 0x2000);
        assert_eq!(r.rb64(0, PAR) == pf, kernel_only, "{reg:#x}");
    }
    assert_eq!(r.rb(0, FSR), 0x400, "a stage 1 fault is in PAR only");
    // A stage 2 bank has none of it.
    r.wb64(2, ATS1PR, VA);
    assert_eq!(r.rb64(2, PAR), 0);
}

#[test]
fn a_stage_2_fault_of_a_bank_operation_is_recorded_in_the_stage_2_bank() {
    let (r, mut t, root, root2) = world();
    r.group(0, 1, 1);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, VA), Ok(DATA));
    let leaf_table = t.slot(root, 0, VA, 3) & !0xfff;
    t.page2(root2, leaf_table, 0);
    r.wb64(1, ATS1UW, VA);
    assert_eq!(r.rb64(1, PAR), 1 << 31 | ERROR, "ATOT");
    // NESTED, S1PTWF, WNR, NSATTR, ATOF, S1CBNDX 1, level 3.
    assert_eq!((r.rb(2, FSR), r.rb(2, FSYNR0)), (0x402, 0x0001_031f));
    assert_eq!((r.rb64(2, FAR), r.rb64(2, IPAFAR)), (VA, leaf_table));
    assert_eq!(r.rb(1, FSR), 0x400);
    // The bank is closed now, for transactions as well, even where the TLB would hit.
    assert_eq!(rd(&mut p, 1, VA), Err(ABORT));
    r.wb(2, FSR, 2);
    assert_eq!(rd(&mut p, 1, VA), Ok(DATA));
}

#[test]
fn a_second_stage_2_fault_of_an_operation_counts_by_hupcf() {
    let (r, mut t, root, root2) = world();
    let leaf_table = t.slot(root, 0, VA, 3) & !0xfff;
    t.page2(root2, leaf_table, 0);
    for (hupcf, fsr) in [(0, 0x408), (HUPCF, 0x8000_0408)] {
        // CFCFG makes no operation wait.
        r.wb(2, SCTLR, M | CFRE | CFCFG | hupcf);
        r.wb(2, FSRRESTORE, 8);
        r.wb64(1, ATS1PR, VA);
        assert_eq!((r.rb64(1, PAR), r.rb(2, FSR)), (1 << 31 | ERROR, fsr));
    }
}

#[test]
fn addresses_are_not_sign_extended() {
    let (r, mut t, ..) = world();
    let root = t.alloc(1);
    t.page(root, 0xffff_8000_0000_1000, DATA | RW);
    t.page(root, 0x1000, (DATA + 0x1000) | RW);
    r.wb64(0, TTBR0, root);
    r.wb64(0, TTBR1, root);
    r.wb(0, TCR, 0x8010_2010);
    r.group(0, 1, 0);
    // A transaction has 49 bits, the top one is the sign.
    assert_eq!(rd(&mut r.port(), 1, 0x0001_8000_0000_1000), Ok(DATA));
    let tf = 2 << 8 | 2 | ERROR;
    assert_eq!(gats(&r, 0, 0x0001_8000_0000_1000, 0), tf, "neither half");
    assert_eq!(gats(&r, 0, 0xffff_8000_0000_1000, 0), good(DATA, 3, 0xff));
    assert_eq!(gats(&r, 0, 0xff00_0000_0000_1000, 0), tf);
    // TBI0 and TBI1 let the top byte be anything.
    assert_eq!(gats(&r, 0, 0x5500_0000_0000_1000, 0), tf);
    r.wb(0, TCR2, LINUX_TCR2 | 1 << 5);
    assert_eq!(gats(&r, 0, 0x5500_0000_0000_1000, 0), good(DATA + 0x1000, 3, 0xff));
    assert_eq!(gats(&r, 0, 0xaaff_8000_0000_1000, 0), tf);
    r.wb(0, TCR2, LINUX_TCR2 | 1 << 6);
    assert_eq!(gats(&r, 0, 0xaaff_8000_0000_1000, 0), good(DATA, 3, 0xff));
}

#[test]
fn each_side_has_its_own_gpar() {
    let r = Rig::new(Config { secure: true, ..Config::default() });
    r.ws(SCR1, 0x0001_2018);
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, VA, DATA | RW);
    r.stage1(0, root, M);
    r.ws(r.cba2r(24), 1);
    r.ws(r.cbar(24), LINUX_CBAR);
    r.ws(r.cb(24, TCR2), LINUX_TCR2);
    r.ws(r.cb(24, TCR), LINUX_TCR);
    r.ws(r.cb(24, TTBR0), root as u32);
    r.ws(r.cb(24, MAIR0), LINUX_MAIR0);
    r.ws(r.cb(24, SCTLR), M);
    let s = |offset: u64, value: u64| portcullis_bus::Mmio::write64(&r.s, offset, value).unwrap();
    s(GATS, VA | 24);
    let gpar = |offset| portcullis_bus::Mmio::read64(&r.s, offset).unwrap();
    assert_eq!(gpar(GPAR), good(DATA, 3, 0xff) & !(1 << 9), "secure: the NS bit is the descriptor's");
    assert_eq!((r.r64(GPAR), gpar(0x580)), (0, 0));
    s(0x500, VA);
    assert_eq!((r.r64(GPAR), gpar(0x580)), (good(DATA, 3, 0xff), good(DATA, 3, 0xff)), "through the alias");
    // Banks of the other side do not exist.
    assert_eq!(gats(&r, 0, VA, 24), 1 << 30 | 1);
    s(GATS, VA);
    assert_eq!(gpar(GPAR), 1 << 30 | 1);
    // Nor do non-secure writes reach the alias.
    r.w64(GPAR, 0);
    r.w64(0x500, VA);
    assert_eq!(r.r64(GPAR), 0);
}

#[test]
fn a_zynqmp_has_no_translation_operations() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, VA, DATA | RW);
    for op in 0..8 {
        r.w64(GATS + 8 * op, VA);
        r.w64(GPAR, u64::MAX);
        assert_eq!((r.r64(GPAR), r.r(GATSR)), (0, 0));
    }
    for reg in [ATS1PR, ATS1PW, ATS1UR, ATS1UW] {
        r.wb64(0, reg, VA);
        assert_eq!((r.rb64(0, PAR), r.rb(0, 0x8f0)), (0, 0));
    }
}
