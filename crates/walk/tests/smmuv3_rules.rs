//! Rules that SMMUv3 adds to the tables: the halves of an address space and TBI, E0PD, PAN, XNX, S2FWB, one bit or another
//! that SMMUv2 reads differently.

mod common;

use common::*;
use portcullis_arch::attrs::Allocate;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Attributes, MemoryType, Shareability};
use portcullis_walk::stage::combine;
use portcullis_walk::{Fault, FaultKind, Flat, Nested, NoRecord, Split, Stage1, Stage2, TableFormat};

const ROOT: u64 = 0x1000;

fn v3(region_bits: [u8; 2], tbi: [bool; 2], single: bool) -> Split {
    Split::Smmuv3 { region_bits, tbi, single }
}

#[test]
fn bit_55_picks_the_half_and_the_bits_above_the_region_must_repeat_it() {
    let s = v3([48, 39], [false; 2], false);
    for (va, want) in [
        (0, Some((0, 0))),
        (0xffff_ffff_ffff, Some((0, 0xffff_ffff_ffff))),
        (1 << 48, None),
        (1 << 63, None),
        (1 << 55, None),
        (u64::MAX, Some((1, 0x7f_ffff_ffff))),
        (0xffff_ff80_0000_0000, Some((1, 0))),
        (0xffff_ff7f_ffff_ffff, None),
        (0x00ff_ff80_0000_0000, None),
        (0x7fff_ff80_0000_0000, None),
    ] {
        assert_eq!(s.select(va), want, "{va:#x}");
    }
}

#[test]
fn the_top_byte_is_ignored_in_the_half_that_says_so() {
    for (tbi0, tbi1) in [(false, false), (true, false), (false, true), (true, true)] {
        let s = v3([48, 48], [tbi0, tbi1], false);
        for top in 0..=255u64 {
            let low = top << 56 | 0x1000;
            let high = top << 56 | 0x00ff_ffff_ffff_1000;
            assert_eq!(s.select(low), (tbi0 || top == 0).then_some((0, 0x1000)));
            assert_eq!(s.select(high), (tbi1 || top == 255).then_some((1, 0xffff_ffff_1000)));
            // Bits 54 to 48 count all the same.
            assert_eq!(s.select(low | 1 << 54), None);
            assert_eq!(s.select(high & !(1 << 48)), None);
        }
    }
}

#[test]
fn without_an_upper_half_the_bits_above_must_be_0() {
    for tbi in [false, true] {
        let s = v3([48, 48], [tbi; 2], true);
        assert_eq!(s.select(0xffff_ffff_ffff), Some((0, 0xffff_ffff_ffff)));
        assert_eq!(s.select(u64::MAX), None);
        assert_eq!(s.select(0x00ff_ffff_ffff_0000), None);
        assert_eq!(s.select(0xab00_0000_0000_1000), tbi.then_some((0, 0x1000)));
        assert_eq!(s.select(1 << 48), None);
    }
}

#[test]
fn a_region_of_52_bits_ends_where_bit_52_begins() {
    let s = v3([52, 52], [false; 2], false);
    assert_eq!(s.select((1 << 52) - 1), Some((0, (1 << 52) - 1)));
    assert_eq!(s.select(1 << 52), None);
    assert_eq!(s.select(0xfff0_0000_0000_0000), Some((1, 0)));
    assert_eq!(s.select(0xffef_ffff_ffff_ffff), None);
}

#[test]
fn e0pd_keeps_unprivileged_accesses_out_of_one_half() {
    let words = Words::default();
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER);
    let low = stage1(Some(region(ROOT, Granule::K4, 3, 21)), None);
    let split = v3([21; 2], [false; 2], false);
    let high = Stage1 { split, ..stage1(None, Some(region(ROOT, Granule::K4, 3, 21))) };
    for (s1, va, half) in [(Stage1 { split, ..low }, 0u64, 0), (high, 0xffff_ffff_ffe0_0000, 1)] {
        for closed in [0, 1] {
            for k in KINDS {
                let mut s1 = s1.clone();
                s1.e0pd[closed] = true;
                let got = only1(s1).translate(&words, va, kind(k), Updates::Apply, &mut NoRecord);
                let open = only1(Stage1 { e0pd: [false; 2], ..only1_of(&words, half) });
                let plain = open.translate(&words, va, kind(k), Updates::Apply, &mut NoRecord);
                if closed != half {
                    assert_eq!(got, plain);
                } else if k.2 {
                    // A TLB must not give the privileged answer to unprivileged accesses.
                    assert_eq!(got.map(|w| w.perms), plain.map(|w| w.perms.privileged_only()));
                } else {
                    assert_eq!(got, Err(Fault::new(FaultKind::Translation, 1, 0)));
                }
            }
        }
    }
}

fn only1_of(_: &Words, half: usize) -> Stage1 {
    let mut regions = [None, None];
    regions[half] = Some(region(ROOT, Granule::K4, 3, 21));
    Stage1 { split: v3([21; 2], [false; 2], false), ..stage1(regions[0], regions[1]) }
}

#[test]
fn pan_refuses_privileged_data_accesses_to_unprivileged_pages() {
    for ap in 0..4u64 {
        for (ap_table, flat) in [(0u64, false), (1, false), (1, true)] {
            for (pan, single) in [(false, false), (true, false), (true, true)] {
                let words = Words::default();
                words.set(ROOT, 0x2000 | d::TABLE | ap_table << 61);
                words.set(0x2000, 0x9000 | d::PAGE | d::AF | ap << 6);
                let mut r = region(ROOT, Granule::K4, 2, 30);
                r.flat_attributes = flat;
                let s1 = Stage1 { pan, single_privilege: single, ..stage1(Some(r), None) };
                let user = ap & 1 != 0 && (ap_table == 0 || flat);
                for k in KINDS {
                    let go = |s1: &Stage1| {
                        only1(s1.clone()).translate(&words, 0, kind(k), Updates::Apply, &mut NoRecord).is_ok()
                    };
                    let without = go(&Stage1 { pan: false, ..s1.clone() });
                    let (_, fetch, privileged) = k;
                    let refused = pan && !single && user && privileged && !fetch;
                    assert_eq!(go(&s1), without && !refused, "{ap} {ap_table} {flat} {pan} {single} {k:?}");
                }
            }
        }
    }
}

#[test]
fn xnx_tells_privileged_from_unprivileged_fetches_at_stage_2() {
    // XN[1:0] in bits 54:53: (privileged, unprivileged) may execute.
    let xnx = [(true, true), (false, true), (false, false), (true, false)];
    for format in [TableFormat::Aarch64, TableFormat::Long] {
        for xn in 0..4u64 {
            for on in [false, true] {
                let words = Words::default();
                words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::S2R | 0xf << 2 | xn << 53);
                let s2 = Stage2 { xnx: on, format, ..stage2(region(ROOT, Granule::K4, 3, 21)) };
                for privileged in [false, true] {
                    let k = kind((false, true, privileged));
                    let got = only2(s2.clone()).translate(&words, 0, k, Updates::Apply, &mut NoRecord);
                    let both = xn & 2 == 0;
                    let (p, u) = if on { xnx[xn as usize] } else { (both, both) };
                    assert_eq!(got.is_ok(), if privileged { p } else { u }, "{xn} {on}");
                }
                assert!(only2(s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).is_ok());
            }
        }
    }
}

/// MAIR bytes and the memory types that they name.
const TYPES: [(u64, u8); 7] =
    [(0x00, 0x0), (0x04, 0x1), (0x08, 0x2), (0x0c, 0x3), (0x44, 0x5), (0xbb, 0xa), (0xff, 0xf)];

fn with_fwb(mair: u64, memattr: u64, fwb: bool, words: &Words) -> Nested {
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::USER | 3 << 8);
    let plain = d::PAGE | d::AF | d::S2R | 0xf << 2;
    (0..16).for_each(|p| words.set(0x8000 + p * 8, p << 12 | plain));
    words.set(0x8000 + 9 * 8, 0x9000 | d::PAGE | d::AF | d::S2R | memattr << 2);
    let mut s2 = stage2(region(0x8000, Granule::K4, 3, 16));
    // The page of the tables (code 15) means "keep" with S2FWB.
    (s2.fwb, s2.leaf_hints) = (fwb, false);
    let s1 = Stage1 { mair, ..stage1(Some(region(ROOT, Granule::K4, 3, 21)), None) };
    both(s1, s2)
}

#[test]
fn fwb_replaces_keeps_or_combines_the_memory_type() {
    for (mair, stage1_type) in TYPES {
        for memattr in 0..16u64 {
            let words = Words::default();
            let n = with_fwb(mair, memattr, true, &words);
            let w = n.translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
            let device = stage1_type < 4;
            // MemAttr[3] is ignored.
            let want = match memattr & 7 {
                kind @ 0..=3 if device => (kind as u8).min(stage1_type),
                kind @ 0..=3 => kind as u8,
                // Reserved.
                4 => 0,
                5 if device => stage1_type,
                5 => 0x5,
                6 => 0xf,
                _ => stage1_type,
            };
            assert_eq!(w.attrs.memory().code(), want, "{mair:#x} {memattr}");
            assert_eq!(w.attrs.transient(), 0, "nothing of the rule is left in the result");
            let code = w.attrs.memory();
            assert!(code.is_cacheable() || w.attrs.shareability() == Shareability::Outer);
        }
    }
}

#[test]
fn a_forced_type_also_replaces_that_of_a_transaction_without_stage_1() {
    for (memattr, incoming, want) in [
        (6, MemoryType::DEVICE_NGNRE, MemoryType::NORMAL_WB),
        (6, MemoryType::NORMAL_NC, MemoryType::NORMAL_WB),
        (7, MemoryType::DEVICE_NGNRE, MemoryType::DEVICE_NGNRE),
        (7, MemoryType::normal(2, 2), MemoryType::normal(2, 2)),
        (5, MemoryType::NORMAL_WB, MemoryType::NORMAL_NC),
        (1, MemoryType::NORMAL_WB, MemoryType::DEVICE_NGNRE),
    ] {
        let words = Words::default();
        let n = Nested { stage1: None, ..with_fwb(0xff, memattr, true, &words) };
        let w = n.translate(&words, 0x9000, read(), Updates::Apply, &mut NoRecord).unwrap();
        let a = combine(Attributes::DEVICE_DEFAULT.with_memory(incoming), w.attrs);
        assert_eq!(a.memory(), want, "{memattr} {incoming}");
    }
}

#[test]
fn with_fwb_the_walk_itself_obeys_the_page_it_reads() {
    for (memattr, want) in
        [(6u64, MemoryType::NORMAL_WB), (5, MemoryType::NORMAL_NC), (7, MemoryType::normal(2, 2))]
    {
        let words = Words::default();
        let mut n = with_fwb(0xff, 7, true, &words);
        words.set(0x8008, 0x1000 | d::PAGE | d::AF | d::S2R | memattr << 2);
        let table = n.stage1.as_mut().unwrap().regions[0].as_mut().unwrap();
        table.walk_attrs = A.with_memory(MemoryType::normal(2, 2));
        n.translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
        let log = words.take_log();
        let (_, _, attrs) = log.iter().find(|l| l.0 == ROOT).unwrap();
        assert_eq!(attrs.memory(), want);
    }
}

#[test]
fn bits_63_to_60_of_a_stage_2_leaf_are_hints_for_smmuv2_alone() {
    let words = Words::default();
    words.set(ROOT, 0x9000 | d::PAGE | d::AF | d::S2R | 0xf << 2 | 0xe << 60);
    for (leaf_hints, ra, wa) in
        [(true, Allocate::Yes, Allocate::No), (false, Allocate::Default, Allocate::Default)]
    {
        let s2 = Stage2 { leaf_hints, ..stage2(region(ROOT, Granule::K4, 3, 21)) };
        let w = only2(s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!((w.attrs.read_allocate(), w.attrs.write_allocate()), (ra, wa));
    }
}

#[test]
fn an_input_that_is_too_large_for_a_stage_that_is_off_is_an_address_size_fault_of_stage_1() {
    let words = Words::default();
    let mut n = only2(stage2(region(ROOT, Granule::K4, 3, 21)));
    n.flat = Flat { input_bits: 64, output_bits: 44, stage: 1, level: 0 };
    let got = n.translate(&words, 1 << 44, read(), Updates::Apply, &mut NoRecord);
    assert_eq!(got, Err(Fault::new(FaultKind::AddressSize, 1, 0)));
    let below = n.translate(&words, (1 << 44) - 1, read(), Updates::Apply, &mut NoRecord).unwrap_err();
    assert_eq!((below.stage, below.kind), (2, FaultKind::Translation));
}

#[test]
fn aarch32_descriptors_with_bits_47_to_40_are_address_size_faults() {
    for bit in 40..48 {
        for level in 2..=3i8 {
            let words = Words::default();
            let leaf = d::PAGE | d::AF | d::USER | 0x9000;
            words.set(ROOT, 0x2000 | d::TABLE | if level == 2 { 1 << bit } else { 0 });
            words.set(0x2000, leaf | if level == 3 { 1 << bit } else { 0 });
            let s1 = Stage1 {
                format: TableFormat::Long,
                split: Split::Long { tsz: [2, 0] },
                output_bits: 40,
                range_fault_level: 1,
                ..stage1(Some(region(ROOT, Granule::K4, 2, 30)), None)
            };
            let got = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord);
            assert_eq!(got, Err(Fault::new(FaultKind::AddressSize, 1, level)));
            let s2 = Stage2 {
                format: TableFormat::Long,
                output_bits: 40,
                ..stage2(region(ROOT, Granule::K4, 2, 30))
            };
            let got = only2(s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord);
            assert_eq!(got, Err(Fault::new(FaultKind::AddressSize, 2, level)));
        }
    }
}
