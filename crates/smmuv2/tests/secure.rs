//! Secure streams: what decides whether they leave as secure, SCR1.SIF, and the syndrome's NSATTR.

mod rig;

use portcullis_arch::{Access, Attributes, Iova};
use rig::*;

const SECURE_BANK: u8 = 8;
const SECURE_GROUP: u64 = 40;

/// Banks 8 and up and groups 32 and up are secure; secure stream 1 goes to bank 8, a stage 1 bank with `sctlr`.
fn secure_domain(sctlr: u32) -> (Rig, Tables, u64) {
    let r = Rig::zynqmp();
    r.ws(SCR1, 0x0201_2008);
    r.ws(CR0, 0x0020_0402);
    r.w(CR0, 0x0020_0402);
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    let b = |reg| r.cb(SECURE_BANK, reg);
    r.ws(r.cba2r(SECURE_BANK), 1);
    r.ws(r.cbar(SECURE_BANK), LINUX_CBAR);
    r.ws(b(TCR2), LINUX_TCR2);
    r.ws(b(TCR), LINUX_TCR);
    r.ws(b(TTBR0), root as u32);
    r.ws(b(MAIR0), LINUX_MAIR0);
    r.ws(b(SCTLR), sctlr);
    r.ws(S2CR + 4 * SECURE_GROUP, SECURE_BANK.into());
    r.ws(SMR + 4 * SECURE_GROUP, 0x8000_0001);
    (r, t, root)
}

fn leaves_secure(r: &Rig, from: portcullis_bus::Initiator, va: u64) -> bool {
    !r.port().translate(&from, Iova(va), Access::Read).unwrap().attrs.non_secure()
}

const NS: u64 = 1 << 5;

#[test]
fn the_descriptor_says_whether_a_secure_stream_stays_secure() {
    let (r, mut t, root) = secure_domain(M | CFRE);
    t.page(root, 0x1000, DATA | RW);
    t.page(root, 0x2000, DATA | RW | NS);
    assert!(leaves_secure(&r, secure(1), 0x1000));
    assert!(!leaves_secure(&r, secure(1), 0x2000));
    // S2CR.NSCFG has no say while the bank translates.
    for nscfg in 0..4 {
        r.ws(S2CR + 4 * SECURE_GROUP, u32::from(SECURE_BANK) | nscfg << 18);
        assert!(leaves_secure(&r, secure(1), 0x1000), "NSCFG {nscfg}");
        assert!(!leaves_secure(&r, secure(1), 0x2000), "NSCFG {nscfg}");
    }
    // NSTable makes everything below non-secure.
    let at = t.slot(root, 0, 0x1000, 2);
    t.store(at, r.peek(at) | 1 << 63);
    r.ws(STLBIALL, 0);
    assert!(!leaves_secure(&r, secure(1), 0x1000));
}

#[test]
fn a_non_secure_stream_stays_non_secure() {
    let (r, mut t, _) = secure_domain(M | CFRE);
    let root = t.alloc(1);
    t.page(root, 0x1000, DATA | RW);
    r.stage1(0, root, LINUX_SCTLR);
    r.group(0, 1, 2 << 18); // NSCFG works for secure groups only
    assert!(!leaves_secure(&r, stream(1), 0x1000));
    r.group(0, 1, 0x0001_0000 | 2 << 18);
    assert!(!leaves_secure(&r, stream(1), 0x1000));
    r.w(CR0, 0x2020_0003);
    assert!(!leaves_secure(&r, stream(1), 0x1000));
    r.w(CR0, 0x0020_0402);
    r.group(0, 1, 0);
    r.wb(0, SCTLR, 2 << 28);
    assert!(!leaves_secure(&r, stream(1), 0x1000));
}

/// NSCFG: 0 default, 1 (reserved) non-secure, 2 secure, 3 non-secure.
#[test]
fn nscfg_decides_where_nothing_is_translated() {
    let (r, ..) = secure_domain(0);
    for (nscfg, stays) in [(0u32, true), (1, false), (2, true), (3, false)] {
        r.ws(CR0, 0x0020_0403 | nscfg << 28);
        assert_eq!(leaves_secure(&r, secure(1), DATA), stays, "SCR0, NSCFG {nscfg}");
        r.ws(CR0, 0x0020_0402);
        r.ws(S2CR + 4 * SECURE_GROUP, 0x0001_0000 | nscfg << 18);
        assert_eq!(leaves_secure(&r, secure(1), DATA), stays, "S2CR, NSCFG {nscfg}");
        r.ws(S2CR + 4 * SECURE_GROUP, u32::from(SECURE_BANK));
        r.ws(r.cb(SECURE_BANK, SCTLR), CFRE | nscfg << 28);
        assert_eq!(leaves_secure(&r, secure(1), DATA), stays, "SCTLR, NSCFG {nscfg}");
    }
    // SCTLR after S2CR.
    r.ws(S2CR + 4 * SECURE_GROUP, u32::from(SECURE_BANK) | 3 << 18);
    r.ws(r.cb(SECURE_BANK, SCTLR), CFRE | 2 << 28);
    assert!(leaves_secure(&r, secure(1), DATA));
    r.ws(r.cb(SECURE_BANK, SCTLR), CFRE);
    assert!(!leaves_secure(&r, secure(1), DATA));
}

#[test]
fn a_secure_banks_fault_names_the_input_after_s2cr() {
    let (r, ..) = secure_domain(M | CFRE);
    for (nscfg, want) in [(0u32, 0x0), (3, 0x100), (1, 0x100), (2, 0)] {
        r.ws(S2CR + 4 * SECURE_GROUP, u32::from(SECURE_BANK) | nscfg << 18);
        assert_eq!(go(&mut r.port(), secure(1), 0x9000, Access::Read), Err(ABORT));
        assert_eq!(r.rs(r.cb(SECURE_BANK, FSR)), 0x402);
        assert_eq!(r.rs(r.cb(SECURE_BANK, FSYNR0)), want, "NSCFG {nscfg}");
        r.ws(r.cb(SECURE_BANK, FSR), 2);
    }
    // A non-secure stage 1 bank does not say it.
    let root = TABLES;
    r.stage1(0, root, LINUX_SCTLR);
    r.group(0, 1, 0);
    assert_eq!(rd(&mut r.port(), 1, 0x9000), Err(ABORT));
    assert_eq!(r.rb(0, FSYNR0), 0);
}

#[test]
fn a_secure_banks_interrupt_and_stall_are_the_secure_sides() {
    let (r, ..) = secure_domain(M | CFRE | CFIE | CFCFG);
    let mut p = r.port();
    let t = tag(go(&mut p, secure(1), 0x9000, Access::Read));
    assert_eq!(r.irqs.pending(), [8, COMBINED_S]);
    r.w(r.cb(SECURE_BANK, FSR), 2);
    r.w(r.cb(SECURE_BANK, RESUME), 0);
    assert_eq!(r.rs(r.cb(SECURE_BANK, FSR)), 0x4000_0402, "out of reach for the other side");
    r.ws(r.cb(SECURE_BANK, FSR), 2);
    r.ws(r.cb(SECURE_BANK, RESUME), 1);
    use portcullis_bus::{DmaPort, StallState};
    assert_eq!(p.stall_state(t), StallState::Terminated { abort: true });
}

/// A secure stream that fetches instructions.
fn fetcher() -> portcullis_bus::Initiator {
    secure(1).with_attrs(Attributes::DEVICE_DEFAULT.with_non_secure(false).with_instruction(true))
}

const SIF: u32 = 1 << 26;

#[test]
fn sif_refuses_secure_fetches_from_non_secure_pages() {
    let (r, mut t, root) = secure_domain(M | CFRE);
    t.page(root, 0x1000, DATA | RW);
    t.page(root, 0x2000, DATA | RW | NS | READ_ONLY);
    let mut p = r.port();
    assert_eq!(go(&mut p, fetcher(), 0x2000, Access::Read), Ok(DATA));
    r.ws(SCR1, 0x0201_2008 | SIF);
    r.ws(STLBIALL, 0);
    assert_eq!(go(&mut p, fetcher(), 0x1000, Access::Read), Ok(DATA), "secure memory");
    assert_eq!(go(&mut p, secure(1), 0x2000, Access::Read), Ok(DATA), "data");
    assert_eq!(go(&mut p, fetcher(), 0x2000, Access::Read), Err(ABORT));
    assert_eq!(r.rs(r.cb(SECURE_BANK, FSR)), 0x408, "PF of the bank");
    assert_eq!(r.rs(r.cb(SECURE_BANK, FSYNR0)), 0x43);
    assert_eq!(r.rs(GFSR), 0);
}

#[test]
fn sif_counts_where_a_bank_is_off() {
    let (r, ..) = secure_domain(CFRE | 3 << 28);
    r.ws(SCR1, 0x0201_2008 | SIF);
    let mut p = r.port();
    // A write first: what it taught the port must not let the fetch through.
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Write), Ok(DATA));
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Read), Err(ABORT));
    assert_eq!((r.rs(r.cb(SECURE_BANK, FSR)), r.rs(r.cb(SECURE_BANK, FSYNR0))), (0x408, 0x40));
    r.ws(r.cb(SECURE_BANK, FSR), 8);
    r.ws(r.cb(SECURE_BANK, SCTLR), CFRE | 2 << 28);
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Read), Ok(DATA), "secure output");
}

#[test]
fn sif_on_a_bypass_is_a_global_permission_fault() {
    let (r, ..) = secure_domain(0);
    r.ws(SCR1, 0x0201_2008 | SIF);
    r.ws(S2CR + 4 * SECURE_GROUP, 0x0001_0000 | 3 << 18);
    let mut p = r.port();
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Write), Ok(DATA));
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Read), Err(ABORT));
    assert_eq!((r.rs(GFSR), r.rs(GFSYNR0), r.r(GFSR)), (0x80, 0x8, 0), "PF in SGFSR");
    assert_eq!(go(&mut p, secure(1), DATA, Access::Read), Ok(DATA));
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Write), Ok(DATA), "writes are data");
    r.ws(GFSR, 0x80);
    r.ws(SCR1, 0x0201_2008);
    assert_eq!(go(&mut p, fetcher(), DATA, Access::Read), Ok(DATA));
}
