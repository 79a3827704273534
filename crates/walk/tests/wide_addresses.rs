//! Walks of up to 52 bits with the three granules, compared with a walker that was written from the sheet alone: one level
//! after the other, with addresses put together by hand and no shared code.

mod common;

use std::collections::BTreeMap;

use common::*;
use portcullis_arch::attrs::Shareability;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{AddressFormat, Fault, FaultKind, NoRecord, Split, Stage1, Stage2};
use proptest::prelude::*;

/// The formats by granule and whether addresses have 52 bits.
fn address_format(granule: Granule, wide: bool) -> AddressFormat {
    match (granule, wide) {
        (_, false) => AddressFormat::Bits48,
        (Granule::K64, true) => AddressFormat::Lpa64K,
        _ => AddressFormat::Ds,
    }
}

/// The address fields of a descriptor for `address` (sheet, section 8).
fn encode(address: u64, format: AddressFormat) -> u64 {
    let low48 = address & 0xffff_ffff_ffff;
    match format {
        AddressFormat::Bits48 => low48,
        AddressFormat::Lpa64K => low48 | (address >> 48) << 12,
        AddressFormat::Ds => address & 0x3_ffff_ffff_ffff | (address >> 50) << 8,
    }
}

/// (granule in bits, index bits of a level)
fn sizes(g: Granule) -> (u32, u32) {
    match g {
        Granule::K4 => (12, 9),
        Granule::K16 => (14, 11),
        Granule::K64 => (16, 13),
    }
}

/// The slow walker: `Ok((output, leaf size))` or the kind and level of the fault. Access flag on, permissions off.
fn slow(
    words: &BTreeMap<u64, u64>,
    (g, wide): (Granule, bool),
    (base, start, input_bits, output_bits): (u64, i32, u32, u32),
    va: u64,
) -> Result<(u64, u32), (FaultKind, i8)> {
    let (page_bits, index_bits) = sizes(g);
    let mut table = base;
    for level in start..=3 {
        let lowest = page_bits + (3 - level) as u32 * index_bits;
        let highest = if level == start { input_bits } else { lowest + index_bits };
        let index = (va % (1u64 << highest)) / (1 << lowest);
        let word = words.get(&(table + 8 * index)).copied().unwrap_or(0);
        let field = |hi: u32, lo: u32| word / (1 << lo) % (1 << (hi - lo + 1));
        let address = match (g, wide) {
            (_, false) => field(47, 12) << 12,
            (Granule::K64, true) => field(15, 12) << 48 | field(47, 16) << 16,
            (_, true) => field(9, 8) << 50 | field(49, 12) << 12,
        };
        let block_here = match (g, level) {
            (Granule::K4, 0) => wide,
            (Granule::K4, 1 | 2) => true,
            (Granule::K16, 1) => wide,
            (Granule::K16, 2) => true,
            (Granule::K64, 1) => wide,
            (Granule::K64, 2) => true,
            _ => false,
        };
        let leaf = match (word % 4, level) {
            (3, 3) => true,
            (3, _) => false,
            (1, l) if l < 3 && block_here => true,
            _ => return Err((FaultKind::Translation, level as i8)),
        };
        if output_bits < 52 && address >> output_bits != 0 {
            return Err((FaultKind::AddressSize, level as i8));
        }
        if leaf {
            if field(10, 10) == 0 {
                return Err((FaultKind::AccessFlag, level as i8));
            }
            let size = 1u64 << lowest;
            return Ok((address / size * size + va % size, lowest));
        }
        table = address >> page_bits << page_bits;
    }
    unreachable!()
}

const GRANULES: [Granule; 3] = [Granule::K4, Granule::K16, Granule::K64];

/// Start level of stage 1 from the sheet's table of T0SZ.
fn start_level(g: Granule, tsz: u32) -> i32 {
    match (g, tsz) {
        (Granule::K4, 12..=15) => -1,
        (Granule::K4, 16..=24) => 0,
        (Granule::K4, 25..=33) => 1,
        (Granule::K4, _) => 2,
        (Granule::K16, 12..=16) => 0,
        (Granule::K16, 17..=27) => 1,
        (Granule::K16, 28..=38) => 2,
        (Granule::K16, _) => 3,
        (Granule::K64, 12..=21) => 1,
        (Granule::K64, 22..=34) => 2,
        (Granule::K64, _) => 3,
    }
}

/// Tables on the way of `va`, down to a leaf at a random level or to noise.
fn plant(
    r: &mut Random,
    g: Granule,
    wide: bool,
    base: u64,
    start: i32,
    bits: u32,
    va: u64,
) -> BTreeMap<u64, u64> {
    let (page_bits, index_bits) = sizes(g);
    let format = address_format(g, wide);
    let mut words = BTreeMap::new();
    let mut table = base;
    for level in start..=3 {
        let lowest = page_bits + (3 - level) as u32 * index_bits;
        let highest = if level == start { bits } else { lowest + index_bits };
        let at = table + 8 * ((va % (1 << highest)) >> lowest);
        // Mostly within 48 bits, often within 52, page aligned.
        let reach = r.pick(&[40, 47, 48, 52]);
        let next = (r.next() % (1u64 << reach)) >> page_bits << page_bits;
        let kind = match r.below(16) {
            0 => r.below(4),
            1..=3 => 1,
            _ => 3,
        };
        let af = if r.below(16) == 0 { 0 } else { d::AF };
        words.insert(at, encode(next, format) | kind | af | d::USER | if wide { 0 } else { r.below(4) << 8 });
        table = if wide { next } else { next & 0xffff_ffff_ffff };
    }
    words
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn both_stages_agree_with_a_walker_from_the_sheet(seed: u64) {
        let mut r = Random(seed);
        let g = r.pick(&GRANULES);
        let wide = r.flip();
        let tsz = if wide { 12 + r.below(28) } else { 16 + r.below(24) } as u32;
        let bits = 64 - tsz;
        let start = start_level(g, tsz);
        let half = r.below(2);
        let inside = r.next() % (1 << bits);
        let va = if half == 1 { inside | !((1 << bits) - 1) } else { inside };
        let reach = if wide { r.pick(&[40, 52]) } else { 40 };
        let base = (r.next() % (1 << reach)) & !0xffff;
        let output_bits = if wide { 52 } else { r.pick(&[40, 44, 48, 52]) };
        let map = plant(&mut r, g, wide, base, start, bits, inside);
        let words = Words::default();
        map.iter().for_each(|(at, v)| words.set(*at, *v));
        let mut table = region(base, g, start as i8, bits as u8);
        table.address = address_format(g, wide);

        let mut regions = [None, None];
        regions[half as usize] = Some(table);
        let s1 = Stage1 {
            split: Split::Smmuv3 { region_bits: [bits as u8; 2], tbi: [false; 2], single: false },
            output_bits: output_bits as u8,
            sh_override: [Some(Shareability::Inner); 2],
            ..stage1(regions[0], regions[1])
        };
        let want = if base >> output_bits.min(63) != 0 {
            Err((FaultKind::AddressSize, 0))
        } else {
            slow(&map, (g, wide), (base, start, bits, output_bits), inside)
        };
        let got = only1(s1).translate(&words, va, read(), Updates::Apply, &mut NoRecord);
        let plain = got.map(|w| (w.pa, u32::from(w.size_log2))).map_err(|f| (f.kind, f.level));
        // A block may reach beyond what the first table covers, or what comes out.
        let want = want.map(|(pa, size)| (pa, size.min(bits).min(output_bits)));
        prop_assert_eq!(plain, want, "{:?} wide {} tsz {} base {:#x} va {:#x} {:x?}", g, wide, tsz, base, va, map);
        if let Ok(w) = got {
            prop_assert_eq!(w.attrs.shareability(), Shareability::Outer, "index 0 is NC");
        }

        let s2 = Stage2 { input_limit_bits: 52, output_bits: output_bits as u8, ..stage2(table) };
        words.take_addresses();
        let got = only2(s2).translate(&words, inside, read(), Updates::Apply, &mut NoRecord);
        prop_assert_eq!(got.map(|w| (w.pa, u32::from(w.size_log2))).map_err(|f| (f.kind, f.level)), want);
        let reads = words.take_addresses();
        prop_assert!(reads.len() <= 5 && reads.iter().all(|at| map.contains_key(at)));
    }
}

/// One leaf at `level`, its tables at addresses of 52 bits.
fn single(
    g: Granule,
    format: AddressFormat,
    start: i8,
    bits: u8,
    leaf_level: i8,
    va: u64,
    leaf: u64,
) -> (Stage1, Words) {
    let (page_bits, index_bits) = sizes(g);
    let words = Words::default();
    let mut table = 0xf_1000_0000_0000u64;
    let mut first = region(table, g, start, bits);
    first.address = format;
    for level in start..=leaf_level {
        let lowest = page_bits + (3 - level) as u32 * index_bits;
        let highest = if level == start { u32::from(bits) } else { lowest + index_bits };
        let at = table + 8 * ((va % (1 << highest)) >> lowest);
        table += 0x1_0000_0000;
        words.set(at, if level == leaf_level { leaf } else { encode(table, format) | d::TABLE });
    }
    let s1 = Stage1 {
        split: Split::Smmuv3 { region_bits: [bits; 2], tbi: [false; 2], single: false },
        output_bits: 52,
        ..stage1(Some(first), None)
    };
    (s1, words)
}

#[test]
fn hand_made_descriptors_of_52_bits() {
    let rest = d::AF | d::USER;
    // (granule, format, start, input bits, level, leaf word, its output, size)
    type Case = (Granule, AddressFormat, i8, u8, i8, u64, u64, u8);
    let cases: [Case; 6] = [
        // A 4 KiB page at 0xf_edcb_a987_6000: [49:12] in place, [51:50] = 0b11 in [9:8].
        (Granule::K4, AddressFormat::Ds, -1, 52, 3, 0x3_edcb_a987_6303 | rest, 0xf_edcb_a987_6000, 12),
        // A block of 512 GiB at 0xf_ed80_0000_0000.
        (Granule::K4, AddressFormat::Ds, -1, 52, 0, 0x3_ed80_0000_0301 | rest, 0xf_ed80_0000_0000, 39),
        // 16 KiB: a page, and a block of 64 GiB.
        (Granule::K16, AddressFormat::Ds, 0, 52, 3, 0x1_2345_6789_8203 | rest, 0x9_2345_6789_8000, 14),
        (Granule::K16, AddressFormat::Ds, 0, 52, 1, 0x1_2340_0000_0201 | rest, 0x9_2340_0000_0000, 36),
        // 64 KiB: [15:12] are [51:48]. A page, and a block of 4 TiB.
        (Granule::K64, AddressFormat::Lpa64K, 1, 52, 3, 0xedcb_a987_f003 | rest, 0xf_edcb_a987_0000, 16),
        (Granule::K64, AddressFormat::Lpa64K, 1, 52, 1, 0xec00_0000_a001 | rest, 0xa_ec00_0000_0000, 42),
    ];
    for (g, format, start, bits, level, leaf, output, size) in cases {
        let va = 0xc_3210_4567_89ab & ((1 << bits) - 1);
        let (s1, words) = single(g, format, start, bits, level, va, leaf);
        let w = only1(s1.clone()).translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!((w.pa, w.size_log2), (output | va & ((1 << size) - 1), size), "{g:?} {level}");
        // Without 52 bits the extra blocks do not exist.
        let mut narrow = s1;
        narrow.regions[0].as_mut().unwrap().address = AddressFormat::Bits48;
        let got = only1(narrow).translate(&words, va, read(), Updates::Apply, &mut NoRecord);
        assert_ne!(got.map(|w| w.pa).ok(), Some(w.pa));
    }
}

#[test]
fn with_ds_the_shareability_comes_from_the_configuration() {
    for half in 0..2usize {
        for (cd, want) in [(Shareability::Non, 0), (Shareability::Outer, 2), (Shareability::Inner, 3)] {
            // [9:8] = 3 are address bits, MAIR index 1 is write-back.
            let va = if half == 0 { 0x1000 } else { 0xfff0_0000_0000_1000 };
            let leaf = 0x9303 | d::AF | d::USER | 1 << 2;
            let (mut s1, words) = single(Granule::K4, AddressFormat::Ds, -1, 52, 3, 0x1000, leaf);
            s1.regions.swap(0, half);
            s1.sh_override[half] = Some(cd);
            let w = only1(s1).translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
            assert_eq!((w.pa, w.attrs.shareability() as u8), (0xc_0000_0000_9000, want));
        }
    }
    let words = Words::default();
    words.set(0x1000, 0x9303 | d::AF | d::S2R | 0xf << 2);
    let mut table = region(0x1000, Granule::K4, 3, 21);
    table.address = AddressFormat::Ds;
    for sh in [Shareability::Non, Shareability::Outer, Shareability::Inner] {
        let s2 = Stage2 { output_bits: 52, sh_override: Some(sh), ..stage2(table) };
        let w = only2(s2).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!((w.pa, w.attrs.shareability()), (0xc_0000_0000_9000, sh));
    }
}

#[test]
fn a_base_of_52_bits_is_used_and_checked() {
    let va = 0x1000;
    let leaf = 0x9003 | d::AF | d::USER;
    let (s1, words) = single(Granule::K4, AddressFormat::Ds, -1, 52, 3, va, leaf);
    for (bits, ok) in [(52, true), (51, false), (48, false)] {
        let n = only1(Stage1 { output_bits: bits, ..s1.clone() });
        let got = n.translate(&words, va, read(), Updates::Apply, &mut NoRecord);
        assert_eq!(got.is_ok(), ok);
        if let Err(f) = got {
            assert_eq!(f, Fault::new(FaultKind::AddressSize, 1, 0));
        }
    }
}

#[test]
fn the_first_level_of_52_bits_has_sixteen_entries() {
    for top in 0..16u64 {
        let words = Words::default();
        let va = top << 48;
        words.set(0x1000 + top * 8, 0x2000 | d::TABLE);
        words.set(0x2000, d::BLOCK | d::AF | d::USER | top << 39);
        let mut table = region(0x1000, Granule::K4, -1, 52);
        table.address = AddressFormat::Ds;
        let s1 = Stage1 {
            split: Split::Smmuv3 { region_bits: [52; 2], tbi: [false; 2], single: true },
            output_bits: 52,
            ..stage1(Some(table), None)
        };
        let w = only1(s1).translate(&words, va | 5, read(), Updates::Apply, &mut NoRecord).unwrap();
        assert_eq!((w.pa, w.size_log2), (top << 39 | 5, 39));
        assert_eq!(words.take_addresses(), [0x1000 + top * 8, 0x2000]);
    }
}
