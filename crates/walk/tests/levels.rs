//! VMSAv8-64, level by level: which words are read, what each descriptor type means at each level of each granule, start
//! levels, concatenated tables, contiguous runs, ranges and address sizes. Expected values are literal or follow from
//! the shift table in `common`, not from the walker's own arithmetic.

mod common;

use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{Fault, FaultKind, Flat, Nested, NoRecord, Region, Rule, Split, Stage1, Trace};

const ROOT: u64 = 0x80_0000_0000;
const OUT: u64 = 0x1234_0000_0000;

/// Address of the table at `level` on the way of [`path`].
fn table_at(level: i8) -> u64 {
    ROOT + 0x10_0000 * level as u64
}

/// Writes table descriptors from `start` down to `level`, puts `leaf` there, and returns the addresses of the words.
fn path(words: &Words, g: Granule, start: i8, level: i8, bits: u32, va: u64, leaf: u64) -> Vec<u64> {
    let mut at = Vec::new();
    for l in start..=level {
        let width = if l == start { bits - shift(g, l) } else { stride(g) };
        let word = table_at(l) + (va >> shift(g, l) & ((1 << width) - 1)) * 8;
        words.set(word, if l == level { leaf } else { table_at(l + 1) | d::TABLE });
        at.push(word);
    }
    at
}

fn fault(kind: FaultKind, level: i8) -> Fault {
    Fault::new(kind, 1, level)
}

fn walk1(words: &Words, r: Region, va: u64) -> Result<(u64, u8), Fault> {
    let n = only1(stage1(Some(r), None));
    n.translate(words, va, read(), Updates::Apply, &mut NoRecord).map(|w| (w.pa, w.size_log2))
}

/// Levels at which a block is a leaf (48-bit addresses) and the start level of a 48-bit space.
const BLOCKS: [(Granule, i8, &[i8]); 3] =
    [(Granule::K4, 0, &[1, 2]), (Granule::K16, 0, &[2]), (Granule::K64, 1, &[2])];

#[test]
fn every_descriptor_type_at_every_level_of_every_granule() {
    for (g, start, blocks) in BLOCKS {
        let mask = (1u64 << 48) - 1;
        let va = 0x7edc_ba98_7654_3210 & (mask >> 1);
        let r = region(table_at(start), g, start, 48);
        for level in start..=3 {
            for kind in 0..4u64 {
                let words = Words::default();
                let size = shift(g, level);
                // Low address bits of a block are not part of the output address.
                let junk = 0xfff << 12 & ((1 << size) - 1) & 0xffff_f000;
                let leaf = OUT & !((1 << size) - 1) | junk | d::AF | d::USER | kind;
                let read_at = path(&words, g, start, level, 48, va, leaf);
                let is_leaf = if level == 3 { kind == 3 } else { kind == 1 && blocks.contains(&level) };
                let got = walk1(&words, r, va);
                let what = format!("{g:?} level {level} type {kind}");
                if is_leaf {
                    let offset = va & ((1 << size) - 1);
                    let pa = OUT & !((1 << size) - 1) | offset;
                    assert_eq!(got, Ok((pa, size as u8)), "{what}");
                    assert_eq!(words.take_addresses(), read_at, "{what}");
                } else if kind == 3 {
                    // A table: the walk goes on and finds nothing in memory that is zero.
                    assert_eq!(got, Err(fault(FaultKind::Translation, level + 1)), "{what}");
                    assert_eq!(words.take_addresses().len(), read_at.len() + 1, "{what}");
                } else {
                    assert_eq!(got, Err(fault(FaultKind::Translation, level)), "{what}");
                    assert_eq!(words.take_addresses(), read_at, "{what}");
                }
            }
        }
    }
}

/// (granule, T0SZ range, start level), sheet table for SMMUv2.
const START1: [(Granule, std::ops::RangeInclusive<u8>, i8); 10] = [
    (Granule::K4, 16..=24, 0),
    (Granule::K4, 25..=33, 1),
    (Granule::K4, 34..=39, 2),
    (Granule::K16, 16..=16, 0),
    (Granule::K16, 17..=27, 1),
    (Granule::K16, 28..=38, 2),
    (Granule::K16, 39..=39, 3),
    (Granule::K64, 16..=21, 1),
    (Granule::K64, 22..=34, 2),
    (Granule::K64, 35..=39, 3),
];

#[test]
fn every_t0sz_starts_at_its_level_and_resolves_its_bits() {
    for (g, sizes, start) in START1 {
        for t0sz in sizes {
            let bits = 64 - t0sz;
            let r = region(table_at(start), g, start, bits);
            for va in [0, (1u64 << bits) - 1, 0x5a5a_5a5a_5a5a & ((1 << bits) - 1)] {
                let words = Words::default();
                let page = OUT | d::PAGE | d::AF;
                let at = path(&words, g, start, 3, bits.into(), va, page);
                let offset = va & ((1 << shift(g, 3)) - 1);
                let n = only1(stage1(Some(r), None));
                let privileged = kind((false, false, true));
                let w = n.translate(&words, va, privileged, Updates::Apply, &mut NoRecord).unwrap();
                assert_eq!(w.pa, OUT | offset, "{g:?} T0SZ {t0sz} at {va:#x}");
                assert_eq!(words.take_addresses(), at, "{g:?} T0SZ {t0sz} at {va:#x}");
            }
            let words = Words::default();
            assert_eq!(walk1(&words, r, 1 << bits), Err(fault(FaultKind::Translation, 0)));
            assert_eq!(words.take_addresses(), [0; 0], "an address out of range reads nothing");
        }
    }
}

/// (granule, SL0, start level, T0SZ range), sheet table for SMMUv2 stage 2.
const START2: [(Granule, u8, i8, std::ops::RangeInclusive<u8>); 9] = [
    (Granule::K4, 2, 0, 16..=24),
    (Granule::K4, 1, 1, 21..=33),
    (Granule::K4, 0, 2, 30..=39),
    (Granule::K16, 2, 1, 16..=27),
    (Granule::K16, 1, 2, 24..=38),
    (Granule::K16, 0, 3, 35..=39),
    (Granule::K64, 2, 1, 16..=21),
    (Granule::K64, 1, 2, 18..=34),
    (Granule::K64, 0, 3, 31..=39),
];

#[test]
fn every_stage_2_start_level_and_its_concatenated_tables() {
    let mut most = 0;
    for (g, _, start, sizes) in START2 {
        for t0sz in sizes {
            let bits = 64 - u32::from(t0sz);
            let tables = 1u64 << bits.saturating_sub(shift(g, start) + stride(g));
            assert!(tables <= 16);
            most = most.max(tables);
            let n = only2(stage2(region(table_at(start), g, start, bits as u8)));
            for which in [0, tables - 1] {
                // The last entry of the chosen table, and below it the first of each.
                let entries = 1u64 << (bits - shift(g, start)).min(stride(g));
                let ipa = (which * entries + entries - 1) << shift(g, start);
                let words = Words::default();
                let page = OUT | d::PAGE | d::AF | d::S2R;
                let at = path(&words, g, start, 3, bits, ipa, page);
                assert_eq!(at[0], table_at(start) + which * g.bytes() + (entries - 1) * 8);
                let w = n.translate(&words, ipa | 0x123, read(), Updates::Apply, &mut NoRecord).unwrap();
                assert_eq!((w.pa, words.take_addresses()), (OUT | 0x123, at), "{g:?} T0SZ {t0sz}");
            }
            let ipa = 1 << bits;
            let f = Fault { ipa, stage: 2, ..fault(FaultKind::Translation, 0) };
            let words = Words::default();
            assert_eq!(n.translate(&words, ipa, read(), Updates::Apply, &mut NoRecord), Err(f));
        }
    }
    assert_eq!(most, 16);
}

#[test]
fn level_minus_one_resolves_52_bits() {
    let words = Words::default();
    words.set(ROOT + 8 * 15, table_at(2) | d::TABLE);
    words.set(table_at(2), 1 << 47 | d::TABLE);
    words.set(1 << 47, OUT & !0x3fff_ffff | d::BLOCK | d::AF | d::USER);
    let mut s1 = stage1(Some(region(ROOT, Granule::K4, -1, 52)), None);
    s1.split = Split::Aarch64 { va_bits: 53, signed: true, region_bits: [52, 52] };
    let w = only1(s1).translate(&words, 15 << 48 | 5, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2), (OUT & !0x3fff_ffff | 5, 30));
}

/// (granule, level, log2 of the size of a run), sheet "Contiguous groups".
const RUNS: [(Granule, i8, u8); 7] = [
    (Granule::K4, 3, 16),
    (Granule::K4, 2, 25),
    (Granule::K4, 1, 34),
    (Granule::K16, 3, 21),
    (Granule::K16, 2, 30),
    (Granule::K64, 3, 21),
    (Granule::K64, 2, 34),
];

#[test]
fn a_legal_contiguous_run_is_one_leaf_and_an_illegal_one_is_not() {
    for (g, level, run) in RUNS {
        let start = if g == Granule::K64 { 1 } else { 0 };
        let page = shift(g, level);
        let entry = (1u64 << (u32::from(run) - page)) - 2;
        let va = 7 << 35 | entry << page | 0x77;
        let kind = if level == 3 { d::PAGE } else { d::BLOCK };
        let base = OUT & !((1 << run) - 1);
        for (output, size) in [(base | entry << page, run), (base | (entry - 1) << page, page as u8)] {
            let words = Words::default();
            path(&words, g, start, level, 48, va, output | kind | d::AF | d::USER | d::CONT);
            let got = walk1(&words, region(table_at(start), g, start, 48), va);
            assert_eq!(got, Ok((output | 0x77, size)), "{g:?} level {level} output {output:#x}");
        }
    }
}

#[test]
fn a_contiguous_run_larger_than_the_region_is_not_used() {
    // 32 bits from level 1: four entries, and a run would take sixteen.
    let words = Words::default();
    let leaf = 1 << 30 | d::BLOCK | d::AF | d::USER | d::CONT;
    words.set(ROOT + 8, leaf);
    assert_eq!(walk1(&words, region(ROOT, Granule::K4, 1, 32), 1 << 30), Ok((1 << 30, 30)));
}

#[test]
fn a_leaf_never_reaches_beyond_input_limits_or_output_size() {
    let leaf = |gib: u64| gib << 30 | d::BLOCK | d::AF | d::USER | d::S2W | d::CONT;
    let words = Words::default();
    words.set(0x1000 + 8, leaf(1));
    // A run of 16 GiB in a stage whose outputs end at 4 GiB.
    let mut s1 = stage1(Some(region(0x1000, Granule::K4, 1, 39)), None);
    s1.output_bits = 32;
    let w = only1(s1).translate(&words, 1 << 30 | 9, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (1 << 30 | 9, 32, 34));
    // The same at stage 2 with inputs that end at 8 GiB.
    let mut s2 = stage2(region(0x1000, Granule::K4, 1, 39));
    s2.input_limit_bits = 33;
    let w = only2(s2.clone()).translate(&words, 1 << 30 | 9, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (1 << 30 | 9, 33, 34));
    // And behind a first stage that is off and takes 32 bits.
    s2.input_limit_bits = 48;
    let flat = Flat { input_bits: 32, output_bits: 40, stage: 1, level: 1 };
    let n = Nested { stage1: None, stage2: Some(s2), flat };
    let w = n.translate(&words, 1 << 30, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2), (1 << 30, 32));
    assert_eq!(
        n.translate(&words, 1 << 32, read(), Updates::Apply, &mut NoRecord).unwrap_err().kind,
        FaultKind::Translation
    );
}

#[test]
fn ttbr0_and_ttbr1_meet_at_every_sign_extension_position() {
    // Both regions hold one table whose entries all point at a page of their own.
    let words = Words::default();
    let (lower, upper) = (ROOT, ROOT + 0x1000);
    for i in 0..512 {
        words.set(lower + 8 * i, 1 << 40 | i << 21 | d::BLOCK | d::AF | d::USER);
        words.set(upper + 8 * i, 2 << 40 | i << 21 | d::BLOCK | d::AF | d::USER);
    }
    for va_bits in [32u8, 36, 40, 42, 44, 48, 49, 64] {
        let r = |base| Some(region(base, Granule::K4, 2, 30));
        let mut s1 = stage1(r(lower), r(upper));
        s1.split = Split::Aarch64 { va_bits, signed: true, region_bits: [30, 30] };
        let n = only1(s1.clone());
        let at = |n: &Nested, va: u64| {
            n.translate(&words, va, read(), Updates::Apply, &mut NoRecord).map(|w| w.pa)
        };
        let top = if va_bits == 64 { u64::MAX } else { (1 << va_bits) - 1 };
        let no = Err(fault(FaultKind::Translation, 0));
        assert_eq!(at(&n, 0x3fff_ffff), Ok(1 << 40 | 0x3fff_ffff), "{va_bits}");
        assert_eq!(at(&n, 0x4000_0000), no, "{va_bits}");
        assert_eq!(at(&n, top), Ok(2 << 40 | 0x3fff_ffff), "{va_bits}");
        assert_eq!(at(&n, top - 0x3fff_ffff), Ok(2 << 40), "{va_bits}");
        assert_eq!(at(&n, top - 0x4000_0000), no, "{va_bits}");
        if va_bits < 64 {
            assert_eq!(at(&n, top + 1), no, "a bit above the position");
            assert_eq!(at(&n, u64::MAX), no, "bits above the position, even if they look like a sign");
            // Without a sign all of it belongs to TTBR0.
            s1.split = Split::Aarch64 { va_bits, signed: false, region_bits: [30, 30] };
            assert_eq!(at(&only1(s1.clone()), top), no);
        }
        // EPD: the half is off.
        for half in 0..2 {
            let mut off = s1.clone();
            off.split = Split::Aarch64 { va_bits, signed: true, region_bits: [30, 30] };
            off.regions[half] = None;
            let (zero, one) = (at(&only1(off.clone()), 0).is_ok(), at(&only1(off), top).is_ok());
            assert_eq!((zero, one), (half == 1, half == 0));
        }
    }
}

#[test]
fn halves_of_different_size_and_granule() {
    let words = Words::default();
    words.set(ROOT + 8 * 3, 1 << 40 | d::PAGE | d::AF | d::USER);
    words.set(ROOT + 0x10_0000, 2 << 40 | d::BLOCK | d::AF | d::USER);
    let lower = region(ROOT, Granule::K64, 3, 25);
    let upper = region(ROOT + 0x10_0000, Granule::K4, 1, 39);
    let n = only1(stage1(Some(lower), Some(upper)));
    let at = |va| n.translate(&words, va, read(), Updates::Apply, &mut NoRecord).map(|w| (w.pa, w.size_log2));
    assert_eq!(at(0x3_1234), Ok((1 << 40 | 0x1234, 16)));
    assert_eq!(at((1 << 49) - (1 << 39) + 5), Ok((2 << 40 | 5, 30)));
    assert_eq!(at(1 << 25), Err(fault(FaultKind::Translation, 0)));
    assert_eq!(at((1 << 49) - (1 << 39) - 1), Err(fault(FaultKind::Translation, 0)));
}

#[test]
fn an_address_above_the_output_size_faults_at_the_level_that_holds_it() {
    let va = 0x7f12_3456_7890u64;
    for bits in [32u8, 36, 40, 42, 44, 47] {
        for bad in 0..=3i8 {
            let words = Words::default();
            let high = 1u64 << bits;
            for level in 0..=3i8 {
                let next = 0x10_0000 * (level as u64 + 1);
                let kind = if level == 3 { d::PAGE | d::AF | d::USER } else { d::TABLE };
                let index = va >> shift(Granule::K4, level) & 511;
                words.set(
                    0x10_0000 * level as u64 + index * 8,
                    next | kind | if level == bad { high } else { 0 },
                );
            }
            let mut s1 = stage1(Some(region(0, Granule::K4, 0, 48)), None);
            s1.output_bits = bits;
            let mut trace = Trace::default();
            let got = only1(s1).translate(&words, va, read(), Updates::Apply, &mut trace);
            assert_eq!(got, Err(fault(FaultKind::AddressSize, bad)));
            let rule = trace.steps.last().unwrap().rule;
            let Rule::AddressSize { address, bits: b } = rule else { panic!("{rule:?}") };
            assert_eq!((address, b), (high | (0x10_0000 * (bad as u64 + 1)), bits));
        }
        // The table base itself: nothing is read.
        let words = Words::default();
        let mut s1 = stage1(Some(region(1 << bits, Granule::K4, 0, 48)), None);
        s1.output_bits = bits;
        let got = only1(s1).translate(&words, va, read(), Updates::Apply, &mut NoRecord);
        assert_eq!((got, words.take_addresses()), (Err(fault(FaultKind::AddressSize, 0)), vec![]));
        let mut s2 = stage2(region(1 << bits, Granule::K4, 0, 48));
        s2.output_bits = bits;
        let f = Fault { ipa: va, stage: 2, ..fault(FaultKind::AddressSize, 0) };
        assert_eq!(only2(s2).translate(&words, va, read(), Updates::Apply, &mut NoRecord), Err(f));
    }
}

#[test]
fn an_aborted_read_is_an_external_fault_of_its_level() {
    let va = 0x12_3456_7000;
    for bad in 0..=3usize {
        let words = Words::default();
        let at = path(&words, Granule::K4, 0, 3, 48, va, OUT | d::PAGE | d::AF | d::USER);
        words.refuse(at[bad]);
        let got = walk1(&words, region(table_at(0), Granule::K4, 0, 48), va);
        assert_eq!(got, Err(Fault { fetch: at[bad], ..fault(FaultKind::External, bad as i8) }));
        assert_eq!(words.take_addresses(), at[..bad]);
    }
}

#[test]
fn the_access_flag_comes_after_the_address_and_before_permissions() {
    let privileged_page = OUT | d::PAGE;
    let check = |page: u64, affd: bool, output_bits: u8| {
        let words = Words::default();
        path(&words, Granule::K4, 0, 3, 48, 0x5000, page);
        let mut s1 = stage1(Some(region(table_at(0), Granule::K4, 0, 48)), None);
        (s1.affd, s1.output_bits) = (affd, output_bits);
        only1(s1)
            .translate(&words, 0x5000, read(), Updates::Apply, &mut NoRecord)
            .map_err(|f| (f.kind, f.level))
            .err()
    };
    assert_eq!(check(privileged_page, false, 42), Some((FaultKind::AddressSize, 3)));
    assert_eq!(check(privileged_page, false, 48), Some((FaultKind::AccessFlag, 3)));
    assert_eq!(check(privileged_page, true, 48), Some((FaultKind::Permission, 3)));
    assert_eq!(check(privileged_page | d::AF, false, 48), Some((FaultKind::Permission, 3)));
    assert_eq!(check(privileged_page | d::USER, true, 48), None);
    assert_eq!(check(privileged_page | d::USER | d::AF, false, 48), None);
}

#[test]
fn big_endian_tables_are_read_byte_reversed() {
    let va = 0x12_3456_7abc;
    let words = Words::default();
    let at = path(&words, Granule::K4, 0, 3, 48, va, OUT | d::PAGE | d::AF | d::USER);
    at.iter().for_each(|&a| words.set(a, words.get(a).swap_bytes()));
    let mut s1 = stage1(Some(region(table_at(0), Granule::K4, 0, 48)), None);
    assert!(only1(s1.clone()).translate(&words, va, read(), Updates::Apply, &mut NoRecord).is_err());
    s1.big_endian = true;
    let w = only1(s1).translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!(w.pa, OUT | 0xabc);
    let mut s2 = stage2(region(table_at(0), Granule::K4, 0, 48));
    s2.big_endian = true;
    assert_eq!(
        only2(s2).translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap().pa,
        OUT | 0xabc
    );
}

#[test]
fn a_stage_that_is_off_checks_sizes_only() {
    let words = Words::default();
    let at = |flat, va| {
        let n = Nested { stage1: None, stage2: None, flat };
        n.translate(&words, va, read(), Updates::Apply, &mut NoRecord)
            .map(|w| w.pa)
            .map_err(|f| (f.kind, f.stage, f.level, f.ipa))
    };
    let flat = Flat { input_bits: 32, output_bits: 30, stage: 1, level: 1 };
    assert_eq!(at(flat, 0x3fff_ffff), Ok(0x3fff_ffff));
    assert_eq!(at(flat, 0x4000_0000), Err((FaultKind::AddressSize, 1, 1, 0)));
    assert_eq!(at(flat, 0x1_0000_0000), Err((FaultKind::Translation, 1, 1, 0)));
    let flat = Flat { input_bits: 64, output_bits: 40, stage: 2, level: 0 };
    assert_eq!(at(flat, 1 << 40), Err((FaultKind::AddressSize, 2, 0, 1 << 40)));
    assert_eq!(at(Flat::UNCHECKED, u64::MAX), Ok(u64::MAX));
}

#[test]
fn a_stage_2_that_is_on_is_not_checked_as_if_it_were_off() {
    // Inputs of 48 bits, outputs of 40: a large IPA may well map to a small PA.
    let words = Words::default();
    let ipa = 1u64 << 45;
    path(&words, Granule::K4, 0, 3, 48, ipa, 0x12_0000 | d::PAGE | d::AF | d::S2R);
    let flat = Flat { input_bits: 64, output_bits: 40, stage: 2, level: 0 };
    let mut s2 = stage2(region(table_at(0), Granule::K4, 0, 48));
    s2.output_bits = 40;
    let n = Nested { stage1: None, stage2: Some(s2), flat };
    assert_eq!(n.translate(&words, ipa, read(), Updates::Apply, &mut NoRecord).unwrap().pa, 0x12_0000);
}

#[test]
fn a_region_that_no_register_can_describe_translates_nothing() {
    let words = Words::default();
    words.set(ROOT, OUT | d::PAGE | d::AF | d::USER);
    for (level, bits) in
        [(3, 12), (3, 0), (0, 39), (4, 48), (-2, 64), (i8::MIN, 255), (i8::MAX, 64), (-1, 48)]
    {
        let s1 = Stage1 {
            split: Split::Aarch64 { va_bits: 64, signed: true, region_bits: [48, 48] },
            ..stage1(Some(region(ROOT, Granule::K4, level, bits)), None)
        };
        let got = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord);
        assert_eq!(got, Err(fault(FaultKind::Translation, 0)), "level {level}, {bits} bits");
        let s2 = stage2(region(ROOT, Granule::K4, level, bits));
        assert_eq!(
            only2(s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap_err().kind,
            FaultKind::Translation
        );
    }
}
