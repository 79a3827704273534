//! Memory types, shareability and hints: MAIR, stage 2 MemAttr, their combination, and the attributes of the walker's
//! own reads.

mod common;

use common::*;
use portcullis_arch::attrs::Allocate;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Attributes, MemoryType, Shareability};
use portcullis_walk::NoRecord;
use portcullis_walk::stage::{combine, walk_attributes};

const ROOT: u64 = 0x1000;

fn stage1_attributes(mair_byte: u8, index: u64, sh: u64) -> Attributes {
    let words = Words::default();
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER | index << 2 | sh << 8);
    let mut s1 = stage1(Some(region(ROOT, Granule::K4, 3, 21)), None);
    s1.mair = u64::from(mair_byte) << (8 * index);
    only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap().attrs
}

/// Cacheability of a MAIR nibble that is not Device: 1 NC, 2 WT, 3 WB (DDI 0487, MAIR_ELx).
const NIBBLE: [u8; 16] = [2, 2, 2, 2, 1, 3, 3, 3, 2, 2, 2, 2, 3, 3, 3, 3];

#[test]
fn every_mair_byte_at_every_index() {
    let hint = |set: bool| if set { Allocate::Yes } else { Allocate::No };
    for byte in 0..=255u8 {
        let a = stage1_attributes(byte, u64::from(byte) % 8, 3);
        let (outer, inner) = (byte >> 4, byte & 0xf);
        if outer == 0 {
            // With bits [1:0] not zero it acts as the type of bits [3:2].
            assert_eq!(a.memory().code(), inner >> 2, "{byte:#x}");
        } else {
            assert_eq!(
                a.memory(),
                MemoryType::normal(NIBBLE[usize::from(outer)], NIBBLE[usize::from(inner)])
            );
        }
        if outer == 0 || (outer == 4 && inner == 4) {
            assert_eq!(a.shareability(), Shareability::Outer, "{byte:#x}");
            assert_eq!((a.read_allocate(), a.write_allocate()), (Allocate::Default, Allocate::Default));
            continue;
        }
        assert_eq!(a.shareability(), Shareability::Inner);
        let bits = match inner {
            0 => 3,
            4 => outer,
            other => other,
        };
        assert_eq!(
            (a.read_allocate(), a.write_allocate()),
            (hint(bits & 2 != 0), hint(bits & 1 != 0)),
            "{byte:#x}"
        );
    }
}

#[test]
fn shareability_codes() {
    for (code, want) in
        [(0, Shareability::Non), (1, Shareability::Outer), (2, Shareability::Outer), (3, Shareability::Inner)]
    {
        assert_eq!(stage1_attributes(0xff, 1, code).shareability(), want);
    }
}

/// Strength order, weakest last: sheet, "strongest of nGnRnE > nGnRE > nGRE > GRE > NC > WT > WB".
fn stronger(a: u8, b: u8) -> u8 {
    // By hand: Device codes 0 to 3 in order; Normal by the smaller code of each half.
    let device = |c: u8| c < 4;
    match (device(a), device(b)) {
        (true, true) => a.min(b),
        (true, false) => a,
        (false, true) => b,
        _ => (a & 0xc).min(b & 0xc) | (a & 3).min(b & 3),
    }
}

#[test]
fn stage_1_and_stage_2_types_combine_to_the_stronger() {
    const MAIR_OF: [(u8, u8); 13] = [
        (0x00, 0x0),
        (0x04, 0x1),
        (0x08, 0x2),
        (0x0c, 0x3),
        (0x44, 0x5),
        (0x48, 0x6),
        (0x4f, 0x7),
        (0x84, 0x9),
        (0xbb, 0xa),
        (0xbf, 0xb),
        (0xf4, 0xd),
        (0xfb, 0xe),
        (0xff, 0xf),
    ];
    for (mair, code1) in MAIR_OF {
        for memattr in 0..16u8 {
            for (sh1, sh2) in (0..16u64).map(|n| (n & 3, n >> 2)) {
                let words = Words::default();
                words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER | sh1 << 8);
                let plain = d::PAGE | d::AF | d::S2R | 0xf << 2;
                (0..16).for_each(|p| words.set(0x8000 + p * 8, p << 12 | plain));
                words.set(
                    0x8000 + 9 * 8,
                    0x9000 | d::PAGE | d::AF | d::S2R | u64::from(memattr) << 2 | sh2 << 8,
                );
                let mut s1 = stage1(Some(region(ROOT, Granule::K4, 3, 21)), None);
                s1.mair = mair.into();
                let s2 = stage2(region(0x8000, Granule::K4, 3, 21));
                let w = both(s1, s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
                // The reserved codes act as nGnRnE.
                let code2 = if matches!(memattr, 4 | 8 | 12) { 0 } else { memattr };
                let want = stronger(code1, code2);
                assert_eq!(w.attrs.memory().code(), want, "MAIR {mair:#x} MemAttr {memattr:#x}");
                let sh = |code| matches!(code, 1 | 2);
                let outer = want < 4 || want == 5 || sh(sh1) || sh(sh2);
                let want_sh = match (outer, sh1 == 3 || sh2 == 3) {
                    (true, _) => Shareability::Outer,
                    (_, true) => Shareability::Inner,
                    _ => Shareability::Non,
                };
                assert_eq!(w.attrs.shareability(), want_sh);
            }
        }
    }
}

#[test]
fn stage_2_hints_win_unless_they_say_nothing() {
    let wb = |r, w| {
        Attributes::from_bits(0)
            .with_memory(MemoryType::NORMAL_WB)
            .with_read_allocate(r)
            .with_write_allocate(w)
    };
    use Allocate::{Default, No, Yes};
    for (one, two, want) in
        [(Yes, Default, Yes), (No, Default, No), (Yes, No, No), (No, Yes, Yes), (Default, Yes, Yes)]
    {
        let c = combine(wb(one, two), wb(two, one));
        assert_eq!(c.read_allocate(), want);
        let c = combine(wb(one, one), wb(two, two).with_memory(MemoryType::NORMAL_NC));
        assert_eq!((c.memory(), c.read_allocate()), (MemoryType::NORMAL_NC, Default));
    }
    assert!(combine(wb(Yes, Yes), wb(Yes, Yes).with_non_secure(true)).non_secure(), "non-secure wins");
    // SMMUv2 puts them into bits 61:60 and 63:62 of a stage 2 leaf.
    let words = Words::default();
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::S2R | 0xf << 2 | 2 << 60 | 3 << 62);
    let w = only2(stage2(region(ROOT, Granule::K4, 3, 21)))
        .translate(&words, 0, read(), Updates::Apply, &mut NoRecord)
        .unwrap();
    assert_eq!((w.attrs.read_allocate(), w.attrs.write_allocate()), (Yes, No));
}

#[test]
fn walk_attributes_follow_tcr_and_stage_2_of_the_table() {
    // IRGN/ORGN: 0 NC, 1 WB-WA, 2 WT, 3 WB no WA.
    for (code, cache) in [(0u8, 1u8), (1, 3), (2, 2), (3, 3)] {
        for other in 0..4u8 {
            let a = walk_attributes(code, other, 3, true);
            assert_eq!(a.memory().code() & 3, cache);
            let b = walk_attributes(other, code, 3, true);
            assert_eq!(b.memory().code() >> 2, cache);
        }
    }
    assert_eq!(walk_attributes(0, 0, 3, true).shareability(), Shareability::Outer, "NC is outer shareable");
    let words = Words::default();
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER);
    (0..16).for_each(|p| words.set(0x8000 + p * 8, p << 12 | d::PAGE | d::AF | d::S2R | 0xf << 2 | 3 << 8));
    words.set(0x8008, 0x1000 | d::PAGE | d::AF | d::S2R | 0x5 << 2);
    let mut r1 = region(ROOT, Granule::K4, 3, 21);
    r1.walk_attrs = walk_attributes(1, 1, 3, true);
    let mut r2 = region(0x8000, Granule::K4, 3, 21);
    r2.walk_attrs = walk_attributes(2, 2, 0, true);
    let n = both(stage1(Some(r1), None), stage2(r2));
    n.translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
    let types: Vec<MemoryType> = words.take_log().iter().map(|l| l.2.memory()).collect();
    let wt = MemoryType::normal(2, 2);
    assert_eq!(
        types,
        [wt, MemoryType::NORMAL_NC, wt],
        "stage 2 table, stage 1 table through stage 2, stage 2 table"
    );
}
