//! The AArch32 long format: T0SZ and T1SZ ranges, 40-bit addresses, stage 2.

mod common;

use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{Fault, FaultKind, NoRecord, Split, Stage1, TableFormat};

const T0: u64 = 0x10_0000;
const T1: u64 = 0x20_0000;

fn fault(kind: FaultKind, level: i8) -> Fault {
    Fault::new(kind, 1, level)
}

fn long(t0: u8, t1: u8) -> Stage1 {
    let r = |base, tsz: u8| Some(region(base, Granule::K4, if tsz < 2 { 1 } else { 2 }, 32 - tsz));
    Stage1 {
        format: TableFormat::Long,
        split: Split::Long { tsz: [t0, t1] },
        output_bits: 40,
        range_fault_level: 1,
        ..stage1(r(T0, t0), r(T1, t1))
    }
}

/// Region of `va` by the sheet's four rules; `None` is the gap.
fn long_half(t0: u8, t1: u8, va: u64) -> Option<usize> {
    let below = va < 1 << (32 - t0);
    let above = va >= (1 << 32) - (1u64 << (32 - t1));
    match (t0 > 0, t1 > 0) {
        (false, false) => Some(0),
        (true, false) => Some(if below { 0 } else { 1 }),
        (false, true) => Some(if above { 1 } else { 0 }),
        (true, true) if below => Some(0),
        (true, true) if above => Some(1),
        _ => None,
    }
}

#[test]
fn long_ranges_for_every_pair_of_sizes() {
    // Level 1 blocks and level 2 blocks alike say which table they are in: bit 36 or 37 of the output.
    let words = Words::default();
    for (base, mark) in [(T0, 1u64 << 36), (T1, 1 << 37)] {
        for i in 0..2048u64 {
            words.set(base + i * 8, mark | d::BLOCK | d::AF | d::USER);
        }
    }
    for (t0, t1) in (0..8u8).flat_map(|a| (0..8u8).map(move |b| (a, b))) {
        let n = only1(long(t0, t1));
        let mut probes = vec![0, 0xffff_ffff, 0x8000_0000, 0x7fff_ffff, 0x4000_0000];
        for t in [t0, t1] {
            let edge = 1u64 << (32 - t);
            probes.extend([
                edge.wrapping_sub(1),
                edge,
                (1 << 32) - edge,
                ((1u64 << 32) - edge).wrapping_sub(1),
            ]);
        }
        for va in probes {
            if va >> 32 != 0 {
                continue;
            }
            words.take_log();
            let got = n.translate(&words, va, read(), Updates::Apply, &mut NoRecord);
            let Some(half) = long_half(t0, t1, va) else {
                assert_eq!(got, Err(fault(FaultKind::Translation, 1)), "{t0} {t1} {va:#x}");
                continue;
            };
            let w = got.unwrap();
            assert_eq!(w.pa >> 36, 1 << half, "{t0} {t1} {va:#x}");
            let t = [t0, t1][half];
            let (low, level) = if t < 2 { (30, 1) } else { (21, 2) };
            let inside = va & ((1 << (32 - t)) - 1);
            assert_eq!(words.take_addresses(), [[T0, T1][half] + (inside >> low) * 8]);
            // The whole block that a TLB would keep belongs to the same table.
            let size = 1u64 << w.size_log2;
            let first = va & !(size - 1);
            assert_eq!(long_half(t0, t1, first), Some(half), "{t0} {t1} {va:#x} level {level}");
            assert_eq!(long_half(t0, t1, first + size - 1), Some(half), "{t0} {t1} {va:#x} level {level}");
            assert_eq!(w.pa & 0x1f_ffff, va & 0x1f_ffff);
        }
        let got = n.translate(&words, 1 << 32, read(), Updates::Apply, &mut NoRecord);
        assert_eq!(got, Err(fault(FaultKind::Translation, 1)));
        for half in 0..2 {
            let mut off = long(t0, t1);
            off.regions[half] = None;
            for va in [0, 0xffff_ffff] {
                let got = only1(off.clone()).translate(&words, va, read(), Updates::Apply, &mut NoRecord);
                assert_eq!(got.is_err(), long_half(t0, t1, va) == Some(half), "EPD{half}");
            }
        }
    }
}

#[test]
fn a_block_that_reaches_over_the_split_is_cut_to_its_own_side() {
    // T0SZ = 7: TTBR0 has the first 32 MiB; TTBR1's first block of 1 GiB begins at 0 all the same.
    let words = Words::default();
    words.set(T1, 7 << 30 | d::BLOCK | d::AF | d::USER);
    let w = only1(long(7, 0)).translate(&words, 0x0212_3456, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (7 << 30 | 0x0212_3456, 25, 30));
    // T1SZ = 7: TTBR1 has the last 32 MiB, TTBR0's last block of 1 GiB ends behind them.
    words.set(T0 + 3 * 8, 9 << 30 | d::BLOCK | d::AF | d::USER);
    let w = only1(long(0, 7)).translate(&words, 0xfdff_ffff, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (9 << 30 | 0x3dff_ffff, 25, 30));
}

#[test]
fn long_addresses_have_40_bits() {
    for level in 1..=3u64 {
        let words = Words::default();
        for l in 1..=3u64 {
            let high = if l == level { 1 << 40 } else { 0 };
            let kind = if l == 3 { d::PAGE | d::AF | d::USER } else { d::TABLE };
            words.set(T0 + (l - 1) * 0x1000, (T0 + l * 0x1000) | kind | high);
        }
        let got = only1(long(0, 0)).translate(&words, 0x44, read(), Updates::Apply, &mut NoRecord);
        assert_eq!(got, Err(fault(FaultKind::AddressSize, level as i8)));
    }
}

#[test]
fn long_stage_2_takes_up_to_40_bits_in_concatenated_tables() {
    // T0SZ −8 with SL0 = 1: level 1, two tables; T0SZ −2 with SL0 = 0: level 2, sixteen tables.
    for (level, bits, entries, low) in [(1i8, 40u8, 1024u64, 30u32), (2, 34, 8192, 21)] {
        let words = Words::default();
        let mut s2 = stage2(region(T0, Granule::K4, level, bits));
        (s2.format, s2.input_limit_bits, s2.output_bits, s2.range_fault_level) =
            (TableFormat::Long, 40, 40, 1);
        words.set(T0 + (entries - 1) * 8, 5 << 30 | d::BLOCK | d::AF | d::S2R | 0xf << 2);
        let n = only2(s2);
        let ipa = (entries - 1) << low | 0x77;
        assert_eq!(
            n.translate(&words, ipa, read(), Updates::Apply, &mut NoRecord).unwrap().pa,
            5 << 30 | 0x77
        );
        let f = n.translate(&words, 1 << 40, read(), Updates::Apply, &mut NoRecord).unwrap_err();
        assert_eq!((f.kind, f.level, f.stage), (FaultKind::Translation, 1, 2));
    }
}
