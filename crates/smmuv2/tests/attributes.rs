//! The attributes of the outgoing transaction: who overrides what (section 2.9 and the tables of reserved encodings).

mod rig;

use portcullis_arch::{Access, Attributes, Iova};
use portcullis_bus::Initiator;
use portcullis_smmuv2::Config;
use rig::*;

/// Memory type code, shareability (0 non, 2 outer, 3 inner), read and write hints (0 default, 2 yes, 3 no),
/// transient.
type Shape = (u8, u8, u8, u8, u8);

fn shape(a: Attributes) -> Shape {
    (
        a.memory().code(),
        a.shareability() as u8,
        a.read_allocate() as u8,
        a.write_allocate() as u8,
        a.transient(),
    )
}

fn out_of(r: &Rig, from: Initiator, va: u64) -> Attributes {
    r.port().translate(&from, Iova(va), Access::Read).unwrap().attrs
}

fn out(r: &Rig, va: u64) -> Shape {
    shape(out_of(r, stream(1), va))
}

/// What a device sends that says nothing: write-back, non-shareable, no hints.
const PLAIN: Shape = (0xf, 0, 0, 0, 0);

/// MemAttr (16: MTCFG is 0), SHCFG, RACFG, WACFG, TRANSIENTCFG.
type Fields = (u32, u32, u32, u32, u32);

/// Fields that mean the same in CR0, S2CR and SCTLR, and what comes out.
const OVERRIDES: &[(Fields, Shape)] = &[
    ((16, 0, 0, 0, 0), PLAIN),
    ((16, 1, 0, 0, 0), (0xf, 2, 0, 0, 0)),
    ((16, 2, 0, 0, 0), (0xf, 3, 0, 0, 0)),
    ((16, 3, 0, 0, 0), (0xf, 0, 0, 0, 0)),
    ((16, 0, 2, 3, 0), (0xf, 0, 2, 3, 0)),
    ((16, 0, 3, 2, 3), (0xf, 0, 3, 2, 3)),
    ((16, 0, 1, 1, 1), PLAIN), // reserved hints act as default
    ((16, 0, 0, 0, 2), (0xf, 0, 0, 0, 2)),
    ((0xa, 2, 0, 0, 0), (0xa, 3, 0, 0, 0)),
    ((0x7, 0, 0, 0, 0), (0x7, 0, 0, 0, 0)), // outer non-cacheable, inner write-back
    ((0x5, 3, 2, 2, 0), (0x5, 2, 0, 0, 0)), // non-cacheable: outer shareable, no allocation
    ((0x1, 3, 2, 2, 0), (0x1, 2, 0, 0, 0)), // Device the same
    ((0x0, 0, 0, 0, 0), (0x0, 2, 0, 0, 0)),
    ((0x2, 0, 0, 0, 0), (0x2, 2, 0, 0, 0)),
    ((0x3, 0, 0, 0, 0), (0x3, 2, 0, 0, 0)),
    ((0x4, 0, 0, 0, 0), (0x0, 2, 0, 0, 0)), // reserved: Device-nGnRnE
    ((0x8, 0, 0, 0, 0), (0x0, 2, 0, 0, 0)),
    ((0xc, 0, 0, 0, 0), (0x0, 2, 0, 0, 0)),
];

fn cr0_fields((mem, sh, ra, wa, tr): Fields) -> u32 {
    let mt = if mem < 16 { 1 << 20 | mem << 16 } else { 0 };
    mt | sh << 22 | ra << 24 | wa << 26 | tr << 6
}

fn s2cr_fields((mem, sh, ra, wa, tr): Fields) -> u32 {
    let mt = if mem < 16 { 1 << 11 | mem << 12 } else { 0 };
    mt | sh << 8 | ra << 20 | wa << 22 | tr << 28
}

fn sctlr_fields((mem, sh, ra, wa, tr): Fields) -> u32 {
    let mt = if mem < 16 { 1 << 20 | mem << 16 } else { 0 };
    mt | sh << 22 | ra << 24 | wa << 26 | tr << 14
}

#[test]
fn cr0_overrides_what_bypasses() {
    let r = Rig::new(Config::default());
    for (fields, want) in OVERRIDES {
        r.w(CR0, cr0_fields(*fields) | 1);
        assert_eq!(out(&r, DATA), *want, "CLIENTPD, {fields:?}");
        r.w(CR0, cr0_fields(*fields));
        assert_eq!(out(&r, DATA), *want, "unmatched, {fields:?}");
    }
    r.group(0, 1, 0x0002_0000);
    r.group(1, 1, 0x0002_0000);
    for (fields, want) in OVERRIDES {
        r.w(CR0, cr0_fields(*fields));
        assert_eq!(out(&r, DATA), *want, "conflict, {fields:?}");
    }
}

#[test]
fn s2cr_overrides_what_it_lets_bypass() {
    let r = Rig::plain_on();
    for (fields, want) in OVERRIDES {
        r.group(0, 1, s2cr_fields(*fields) | 0x0001_0000);
        assert_eq!(out(&r, DATA), *want, "{fields:?}");
    }
}

#[test]
fn a_bank_that_is_off_overrides_after_s2cr() {
    let r = Rig::plain_on();
    r.w(r.cba2r(0), 1);
    r.w(r.cbar(0), LINUX_CBAR);
    for (fields, want) in OVERRIDES {
        r.group(0, 1, s2cr_fields(*fields));
        r.wb(0, SCTLR, 0);
        assert_eq!(out(&r, DATA), *want, "S2CR alone, {fields:?}");
        r.group(0, 1, 0);
        r.wb(0, SCTLR, sctlr_fields(*fields));
        assert_eq!(out(&r, DATA), *want, "SCTLR alone, {fields:?}");
    }
    // Both: SCTLR wins where it says something, S2CR's hint stays.
    r.group(0, 1, s2cr_fields((0xa, 1, 2, 0, 0)));
    r.wb(0, SCTLR, sctlr_fields((0xf, 2, 0, 3, 0)));
    assert_eq!(out(&r, DATA), (0xf, 3, 2, 3, 0));
}

fn mapped(leaf: u64) -> (Rig, Tables, u64) {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.page(root, 0x1000, leaf);
    r.stage1(0, root, LINUX_SCTLR);
    r.group(0, 1, 0);
    (r, t, root)
}

#[test]
fn with_translation_the_descriptor_speaks_and_s2cr_is_silent() {
    // MAIR of Linux: 0 non-cacheable, 1 write-back, 2 Device-nGnRE.
    let (r, mut t, root) = mapped(DATA | RW);
    r.group(0, 1, s2cr_fields((0x1, 1, 3, 3, 3)));
    assert_eq!(out(&r, 0x1000), (0xf, 3, 2, 2, 0));
    for (index, sh, want) in [
        (0u64, 3u64, (0x5, 2, 0, 0, 0)),
        (1, 0, (0xf, 0, 2, 2, 0)),
        (1, 1, (0xf, 2, 2, 2, 0)), // the reserved SH acts as outer
        (1, 2, (0xf, 2, 2, 2, 0)),
        (2, 3, (0x1, 2, 0, 0, 0)),
        (3, 3, (0xd, 3, 2, 2, 0)), // 0xf4: outer write-back, inner non-cacheable
    ] {
        let leaf = DATA | 3 | index << 2 | USER | sh << 8 | AF | NG;
        t.page(root, 0x1000, leaf);
        r.wb(0, TLBIALL, 0);
        assert_eq!(out(&r, 0x1000), want, "index {index}, SH {sh}");
    }
}

#[test]
fn cbar_adds_the_bypassed_stage_2() {
    let (r, _, _) = mapped(DATA | RW);
    // MemAttr, BPSHCFG, RACFG, WACFG of CBAR type 1.
    for ((mem, sh, ra, wa), want) in [
        ((0xfu32, 3u32, 0u32, 0u32), (0xf, 3, 2, 2, 0)), // neutral, as Linux writes it
        ((0xf, 2, 0, 0), (0xf, 3, 2, 2, 0)),
        ((0xf, 1, 0, 0), (0xf, 2, 2, 2, 0)),
        ((0xf, 0, 0, 0), (0xf, 2, 2, 2, 0)), // BPSHCFG 0 is outer
        ((0xf, 3, 3, 3), (0xf, 3, 3, 3, 0)),
        ((0xb, 3, 0, 0), (0xb, 3, 2, 2, 0)),
        ((0x5, 3, 2, 2), (0x5, 2, 0, 0, 0)),
        ((0x1, 3, 0, 0), (0x1, 2, 0, 0, 0)),
        ((0x8, 3, 0, 0), (0x0, 2, 0, 0, 0)),
    ] {
        r.w(r.cbar(0), 0x0001_0000 | mem << 12 | sh << 8 | ra << 20 | wa << 22);
        r.wb(0, TLBIALL, 0);
        assert_eq!(out(&r, 0x1000), want, "M=1, {mem:#x} {sh} {ra} {wa}");
    }
    // The same with the bank off: the incoming transaction is write-back, non-shareable, without hints.
    r.wb(0, SCTLR, 0);
    r.w(r.cbar(0), 0x0001_0000 | 0xb << 12 | 2 << 8 | 3 << 20);
    assert_eq!(out(&r, 0x1000), (0xb, 3, 3, 0, 0));
}

#[test]
fn the_stronger_of_two_stages_wins() {
    let (r, mut t, root) = mapped(DATA | RW);
    let root2 = t.alloc(2);
    // Stage 1 tables and the page, where they are.
    for page in 0..16 {
        let pa = TABLES + 0x1000 * page;
        t.page2(root2, pa, pa | S2_RW);
    }
    r.stage2(1, root2, 7, M | CFRE);
    r.nest(0, 1, 7);
    let kinds =
        [(0x0u64, 0x00u32), (0x1, 0x04), (0x2, 0x08), (0x3, 0x0c), (0x5, 0x44), (0xa, 0xaa), (0xf, 0xff)];
    let stronger = |a: u64, b: u64| {
        // Device before Normal, and within each the smaller code is the stronger one, inner and outer apart.
        match (a < 4, b < 4) {
            (true, false) => a,
            (false, true) => b,
            (true, true) => a.min(b),
            _ => (a & 0xc).min(b & 0xc) | (a & 3).min(b & 3),
        }
    };
    for (code1, mair) in kinds {
        for (code2, _) in kinds {
            r.wb(0, MAIR0, mair);
            let ipa = 0x8000_0000;
            t.page(root, 0x1000, ipa | 3 | USER | 3 << 8 | AF | NG);
            t.page2(root2, ipa, DATA | 3 | code2 << 2 | 0xc0 | AF);
            r.w(TLBIALLNSNH, 0);
            let got = out(&r, 0x1000);
            assert_eq!(u64::from(got.0), stronger(code1, code2), "{code1:#x} and {code2:#x}");
        }
    }
    // Shareability: outer over inner over non. Hints: stage 2's if it has any (bits 61:60 and 63:62).
    r.wb(0, MAIR0, 0xff);
    for (sh1, sh2, want) in [(0u64, 0u64, 0), (3, 0, 3), (0, 3, 3), (2, 3, 2), (3, 2, 2), (0, 2, 2)] {
        for (hints, ra, wa) in [(0u64, 2, 2), (3 << 60, 3, 2), (2 << 60 | 3 << 62, 2, 3), (1 << 60, 2, 2)] {
            t.page(root, 0x1000, 0x8000_0000 | 3 | USER | sh1 << 8 | AF | NG);
            t.page2(root2, 0x8000_0000, DATA | 3 | 0xf << 2 | 0xc0 | sh2 << 8 | AF | hints);
            r.w(TLBIALLNSNH, 0);
            assert_eq!(out(&r, 0x1000), (0xf, want, ra, wa, 0), "{sh1} {sh2} {hints:#x}");
        }
    }
}

#[test]
fn stage_2_alone_combines_with_the_overridden_transaction() {
    let r = Rig::plain_on();
    let mut t = Tables::new(&r);
    let root = t.alloc(2);
    t.page2(root, 0x1000, DATA | 3 | 0xf << 2 | 0xc0 | 3 << 8 | AF);
    r.stage2(0, root, 3, M);
    r.group(0, 1, 0);
    assert_eq!(out(&r, 0x1000), (0xf, 3, 0, 0, 0));
    r.group(0, 1, s2cr_fields((0xa, 1, 2, 3, 0)));
    assert_eq!(out(&r, 0x1000), (0xa, 2, 2, 3, 0));
    // M = 0: SCTLR.MemAttr always counts, SHCFG 0 is non-shareable.
    r.group(0, 1, 0);
    for (mem, sh, want) in [
        (0xfu32, 0u32, (0xf, 0, 0, 0, 0)),
        (0xf, 1, (0xf, 2, 0, 0, 0)),
        (0xb, 2, (0xb, 3, 0, 0, 0)),
        (0x0, 3, (0x0, 2, 0, 0, 0)),
    ] {
        r.wb(0, SCTLR, mem << 16 | sh << 22);
        assert_eq!(out(&r, 0x1000), want, "{mem:#x} {sh}");
        assert_eq!(rd(&mut r.port(), 1, 0x1234_5000), Ok(0x1234_5000));
    }
}

#[test]
fn a_nested_stage_2_that_is_off_still_adds_its_sctlr() {
    let (r, _, _) = mapped(DATA | RW);
    r.w(r.cba2r(1), 1);
    r.w(r.cbar(1), 0);
    r.wb(1, SCTLR, 0xb << 16 | 1 << 22 | 3 << 24);
    r.nest(0, 1, 0);
    assert_eq!(out(&r, 0x1000), (0xb, 2, 3, 2, 0));
    r.wb(0, SCTLR, 0);
    assert_eq!(out(&r, 0x1000), (0xb, 2, 3, 0, 0), "both off");
}

/// (PRIVCFG, incoming privileged, outgoing privileged), and INSTCFG alike.
#[test]
fn privcfg_and_instcfg_change_the_transaction() {
    let (r, _, _) = mapped(DATA | RW);
    let from = |p, i| stream(1).with_attrs(Attributes::DEVICE_DEFAULT.with_privileged(p).with_instruction(i));
    for (code, incoming, want) in [
        (0u32, false, false),
        (0, true, true),
        (1, true, false), // reserved without DIPANS: unprivileged
        (2, true, false),
        (2, false, false),
        (3, false, true),
    ] {
        r.group(0, 1, code << 24);
        let a = out_of(&r, from(incoming, false), 0x1000);
        assert_eq!(a.privileged(), want, "PRIVCFG {code}, {incoming}");
    }
    for (code, incoming, want) in [
        (0u32, false, false),
        (0, true, true),
        (1, false, true), // reserved: instruction
        (2, true, false),
        (3, false, true),
    ] {
        r.group(0, 1, code << 26);
        let a = out_of(&r, from(false, incoming), 0x1000);
        assert_eq!(a.instruction(), want, "INSTCFG {code}, {incoming}");
    }
}

/// User data of a process is UXN: forcing "instruction" makes its pages unreadable, and never touches writes.
#[test]
fn instcfg_makes_reads_fetches_and_leaves_writes_data() {
    let (r, _, _) = mapped(DATA | RW | UXN | PXN);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, 0x1000), Ok(DATA));
    r.group(0, 1, 3 << 26);
    assert_eq!(wr(&mut p, 1, 0x1000), Ok(DATA));
    assert_eq!(rd(&mut p, 1, 0x1000), Err(ABORT));
    assert_eq!((r.rb(0, FSR), r.rb(0, FSYNR0)), (0x408, 0x43), "PF, IND, level 3");
    r.wb(0, FSR, 0x8);
    // A master that drives AxPROT[2] itself, and the cure.
    let fetcher = stream(1).with_attrs(Attributes::DEVICE_DEFAULT.with_instruction(true));
    r.group(0, 1, 0);
    assert_eq!(go(&mut p, fetcher, 0x1000, Access::Read), Err(ABORT));
    r.wb(0, FSR, 0x8);
    r.group(0, 1, 2 << 26);
    assert_eq!(go(&mut p, fetcher, 0x1000, Access::Read), Ok(DATA));
}

#[test]
fn privcfg_decides_about_kernel_pages() {
    let (r, _, _) = mapped(DATA | PAGE | NG); // AP[1] = 0
    let mut p = r.port();
    assert_eq!(wr(&mut p, 1, 0x1000), Err(ABORT));
    assert_eq!((r.rb(0, FSR), r.rb(0, FSYNR0)), (0x408, 0x13));
    r.wb(0, FSR, 0x8);
    r.group(0, 1, 3 << 24);
    assert_eq!(wr(&mut p, 1, 0x1000), Ok(DATA));
    r.group(0, 1, 2 << 24);
    let privileged = stream(1).with_attrs(Attributes::DEVICE_DEFAULT.with_privileged(true));
    assert_eq!(go(&mut p, privileged, 0x1000, Access::Write), Err(ABORT));
    assert_eq!(r.rb(0, FSYNR0), 0x13, "unprivileged after the override");
}
