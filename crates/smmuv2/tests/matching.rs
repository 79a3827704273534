//! From a StreamID to a group: masks, no match, several matches, and what S2CR.TYPE makes of it.

mod rig;

use portcullis_smmuv2::{Config, Match};
use rig::*;

const BYPASS: u32 = 0x0001_0000;
const FAULT: u32 = 0x0002_0000;
const RESERVED: u32 = 0x0003_0000;

fn set(r: &Rig, n: u64, smr: u32, s2cr: u32) {
    r.w(S2CR + 4 * n, s2cr);
    r.w(SMR + 4 * n, smr);
}

#[test]
fn mask_bits_are_ignored() {
    let r = Rig::zynqmp_on();
    let mut p = r.port();
    // (SMR, ids that match, ids that do not)
    let rows: &[(u32, &[u32], &[u32])] = &[
        (0x8000_0200, &[0x200], &[0x201, 0x280, 0, 0x4200]),
        (0x803f_0200, &[0x200, 0x201, 0x23f], &[0x1ff, 0x240]), // all of HPC0
        (0x803f_0215, &[0x200, 0x23f], &[0x240]),               // ID bits under the mask do not matter
        (0x8001_14e8, &[0x14e8, 0x14e9], &[0x14ea]),            // a pair of DMA channels
        (0xffff_0000, &[0, 1, 0x5555, 0x7fff], &[]),
        (0xffff_7fff, &[0, 0x7fff], &[]),
        (0x7fff_0000, &[], &[0, 1]), // VALID is 0
    ];
    for (smr, yes, no) in rows {
        set(&r, 20, *smr, BYPASS);
        for id in *yes {
            assert_eq!(rd(&mut p, *id, DATA), Ok(DATA), "{smr:#x} and {id:#x}");
        }
        for id in *no {
            assert_eq!(rd(&mut p, *id, DATA), Err(ABORT), "{smr:#x} and {id:#x}");
        }
    }
}

#[test]
fn every_group_takes_part() {
    let r = Rig::zynqmp_on();
    for n in 0..48 {
        set(&r, n, 0x8000_0100 | n as u32, BYPASS);
    }
    let mut p = r.port();
    for n in 0..48 {
        assert_eq!(rd(&mut p, 0x100 + n, DATA), Ok(DATA), "group {n}");
        let e = r.smmu.explain(stream(0x100 + n), DATA.into(), portcullis_arch::Access::Read);
        assert_eq!(e.matched, Some(Match::Group(n as u16)));
    }
    assert_eq!(rd(&mut p, 0x130, DATA), Err(ABORT));
}

#[test]
fn no_match_bypasses_or_faults_by_usfcfg() {
    let r = Rig::zynqmp_on();
    let mut p = r.port();
    assert_eq!(wr(&mut p, 0x201, DATA), Err(ABORT));
    assert_eq!((r.r(GFSR), r.r(GFSYNR0), r.r(GFSYNR1), r.r(GFSYNR2)), (2, 2, 0x201, 0));
    assert_eq!(r.r64(GFAR), DATA);
    r.w(GFSR, 2);
    r.w(CR0, 0x0020_0002);
    assert_eq!(wr(&mut p, 0x201, DATA), Ok(DATA));
    assert_eq!(r.r(GFSR), 0);
}

#[test]
fn several_matches_are_a_conflict() {
    // An MMU-500 always faults; elsewhere SMCFCFG decides.
    let r = Rig::zynqmp();
    r.w(CR0, 0x0000_0002);
    set(&r, 3, 0x8000_0042, BYPASS);
    set(&r, 40, 0x800f_0040, BYPASS);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x41, DATA), Ok(DATA));
    assert_eq!(rd(&mut p, 0x42, DATA), Err(ABORT));
    assert_eq!((r.r(GFSR), r.r(GFSYNR1)), (4, 0x42), "SMCF");
    let e = r.smmu.explain(stream(0x42), DATA.into(), portcullis_arch::Access::Read);
    assert_eq!(e.matched, Some(Match::Conflict(3, 40)));
    r.w(SMR + 12, 0x42);
    assert_eq!(rd(&mut p, 0x42, DATA), Ok(DATA), "one of them disabled");

    let r = Rig::new(Config::default());
    r.w(CR0, 0x0000_0002);
    set(&r, 0, 0x8000_0042, FAULT);
    set(&r, 1, 0x8000_0042, FAULT);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 0x42, DATA), Ok(DATA), "SMCFCFG 0: bypass with the attributes of CR0");
    assert_eq!(r.r(GFSR), 0);
    r.w(CR0, 0x0020_0002);
    assert_eq!(rd(&mut p, 0x42, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 4);
}

#[test]
fn s2cr_type_decides() {
    let r = Rig::zynqmp_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, 0x7000_2000, (DATA + 0x3000) | RW);
    r.stage1(4, root, LINUX_SCTLR);
    let mut p = r.port();
    set(&r, 0, 0x8000_0042, 4);
    assert_eq!(wr(&mut p, 0x42, 0x7000_2008), Ok(DATA + 0x3008));
    r.w(S2CR, BYPASS | 4);
    assert_eq!(wr(&mut p, 0x42, DATA + 0x123), Ok(DATA + 0x123));
    for s2cr in [FAULT | 4, RESERVED | 4] {
        r.w(S2CR, s2cr);
        assert_eq!(wr(&mut p, 0x42, 0x7000_2008), Err(ABORT), "{s2cr:#x}");
        assert_eq!((r.r(GFSR), r.r(GFSYNR0), r.r(GFSYNR1)), (1, 2, 0x42), "ICF");
        r.w(GFSR, 1);
    }
}

#[test]
fn a_bypass_truncates_the_address_and_never_faults() {
    let r = Rig::new(Config { pa_bits: 36, upstream_bits: 64, ..Config::default() });
    let mut p = r.port();
    // CLIENTPD, unmatched, S2CR bypass.
    assert_eq!(rd(&mut p, 1, 0xffff_fff0_6000_0040), Ok(0x6000_0040));
    r.w(CR0, 0);
    assert_eq!(rd(&mut p, 1, 0xabcd_0012_3456_7890), Ok(0x2_3456_7890));
    set(&r, 0, 0x8000_0001, BYPASS);
    assert_eq!(rd(&mut p, 1, 0xf0_0000_0000), Ok(0));
    assert_eq!(r.r(GFSR), 0);
}

#[test]
fn a_change_of_the_map_counts_for_the_next_transaction_without_invalidation() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x7000_0000, DATA | RW);
    let mut p = r.port();
    assert_eq!(rd(&mut p, SID, 0x7000_0000), Ok(DATA));
    r.w(SMR, SID);
    assert_eq!(rd(&mut p, SID, 0x7000_0000), Err(ABORT));
    r.w(SMR, 0x8000_0000 | SID);
    assert_eq!(rd(&mut p, SID, 0x7000_0000), Ok(DATA));
    r.w(CR0, 0x0020_0001);
    assert_eq!(rd(&mut p, SID, 0x7000_0000), Ok(0x7000_0000));
}
