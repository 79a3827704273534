//! Two stages: every stage 1 descriptor goes through stage 2, faults name the right stage, level and IPA, in the order in
//! which the hardware meets them.

mod common;

use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::{FaultKind, Nested, NoRecord, Trace};

const S2_ROOT: u64 = 0x40_0000;
const S2_PAGES: u64 = 0x40_1000;
/// IPAs of the stage 1 tables of levels 1, 2 and 3, and of the page that they map.
const IPA: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x9000];
/// Where stage 2 puts an IPA below 2 MiB.
const MOVED: u64 = 0x10_0000_0000;

/// Stage 1 tables for VA 0x12_3456_7000 (39 bits), stage 2 from level 2 with 4K pages that move by [`MOVED`].
fn build(words: &Words) -> Nested {
    let va = VA;
    words.set(S2_ROOT, S2_PAGES | d::TABLE);
    for page in 0..512u64 {
        words.set(S2_PAGES + page * 8, (MOVED + (page << 12)) | d::PAGE | d::AF | d::S2R | d::S2W | 0xf << 2);
    }
    for (i, level) in (1..=3).enumerate() {
        let next = IPA[i + 1] | if level == 3 { d::PAGE | d::AF | d::USER } else { d::TABLE };
        words.set(stage1_word(i, va), next);
    }
    both(stage1(Some(region(IPA[0], Granule::K4, 1, 39)), None), stage2(region(S2_ROOT, Granule::K4, 2, 32)))
}

const VA: u64 = 0x12_3456_7000;

/// Physical address of the i-th stage 1 descriptor.
fn stage1_word(i: usize, va: u64) -> u64 {
    MOVED + IPA[i] + (va >> shift(Granule::K4, i as i8 + 1) & 511) * 8
}

#[test]
fn each_stage_1_word_is_read_where_stage_2_puts_it() {
    let words = Words::default();
    let n = build(&words);
    let mut trace = Trace::default();
    let w = n.translate(&words, VA | 0x234, read(), Updates::Apply, &mut trace).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (MOVED | 0x9234, 12, 12));
    let s2 = |ipa: u64| [S2_ROOT, S2_PAGES + (ipa >> 12) * 8];
    let mut want = Vec::new();
    for (i, ipa) in IPA.into_iter().take(3).enumerate() {
        want.extend(s2(ipa));
        want.push(stage1_word(i, VA));
    }
    want.extend(s2(IPA[3]));
    assert_eq!(words.take_addresses(), want);
    let stages: Vec<u8> = trace.steps.iter().map(|s| s.stage).collect();
    assert_eq!(stages, [2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 2]);
    // A stage 1 step names the IPA of its word.
    assert_eq!(trace.steps[2].address, stage1_word(0, VA) - MOVED);
}

#[test]
fn a_fault_on_a_stage_1_table_is_a_stage_2_fault_with_the_address_of_the_word() {
    let page = |i: usize| S2_PAGES + (IPA[i] >> 12) * 8;
    type Break = fn(&Words, u64);
    let breaks: [(Break, FaultKind); 5] = [
        (|w, at| w.set(at, 0), FaultKind::Translation),
        (|w, at| w.set(at, w.get(at) & !d::AF), FaultKind::AccessFlag),
        (|w, at| w.set(at, w.get(at) & !d::S2R), FaultKind::Permission),
        (|w, at| w.set(at, w.get(at) | 1 << 47), FaultKind::AddressSize),
        (|w, at| w.refuse(at), FaultKind::External),
    ];
    for i in 0..4 {
        for (damage, kind) in breaks {
            let words = Words::default();
            let mut n = build(&words);
            n.stage2.as_mut().unwrap().output_bits = 44;
            damage(&words, page(i));
            let f = n.translate(&words, VA | 0x234, read(), Updates::Apply, &mut NoRecord).unwrap_err();
            assert_eq!((f.kind, f.stage, f.level, f.on_stage1_walk), (kind, 2, 3, i < 3));
            let fetch = if kind == FaultKind::External { page(i) } else { 0 };
            assert_eq!((f.fetch, f.write), (fetch, false));
            let ipa = if i < 3 { stage1_word(i, VA) - MOVED } else { IPA[3] | 0x234 };
            assert_eq!(f.ipa, ipa);
        }
        // Stage 2 out of range: IPA above the input limit.
        let words = Words::default();
        let mut n = build(&words);
        if i < 3 {
            let s1 = n.stage1.as_mut().unwrap();
            match i {
                0 => s1.regions[0].as_mut().unwrap().base |= 1 << 40,
                _ => words.set(stage1_word(i - 1, VA), 1 << 40 | d::TABLE),
            }
        } else {
            words.set(stage1_word(2, VA), 1 << 40 | d::PAGE | d::AF | d::USER);
        }
        let f = n.translate(&words, VA, read(), Updates::Apply, &mut NoRecord).unwrap_err();
        assert_eq!((f.kind, f.stage, f.level, f.on_stage1_walk), (FaultKind::Translation, 2, 0, i < 3));
        assert_eq!(f.ipa >> 40, 1);
    }
}

#[test]
fn a_write_only_stage_2_page_cannot_hold_stage_1_tables_but_a_read_only_one_can() {
    for (ap, ok) in [(d::S2R, true), (d::S2W, false), (0, false), (d::S2R | d::S2W, true)] {
        let words = Words::default();
        let n = build(&words);
        words.set(S2_PAGES + 8, (MOVED + 0x1000) | d::PAGE | d::AF | 0xf << 2 | ap);
        let write = kind((true, false, false));
        assert_eq!(n.translate(&words, VA, write, Updates::Apply, &mut NoRecord).is_ok(), ok);
    }
}

#[test]
fn stage_1_tables_in_device_memory_are_refused_if_ptw_says_so() {
    for memattr in 0..16u64 {
        for protect in [false, true] {
            let words = Words::default();
            let mut n = build(&words);
            n.stage2.as_mut().unwrap().protect_walks = protect;
            let at = S2_PAGES + (IPA[1] >> 12) * 8;
            words.set(at, (MOVED + IPA[1]) | d::PAGE | d::AF | d::S2R | memattr << 2);
            let device = memattr < 4 || matches!(memattr, 4 | 8 | 12);
            let got = n.translate(&words, VA, read(), Updates::Apply, &mut NoRecord);
            assert_eq!(got.is_err(), protect && device, "{memattr}");
            if let Err(f) = got {
                assert_eq!((f.kind, f.stage, f.level, f.on_stage1_walk), (FaultKind::Permission, 2, 3, true));
            }
            // Data in Device memory is no concern of PTW.
            let data = S2_PAGES + (IPA[3] >> 12) * 8;
            words.set(at, (MOVED + IPA[1]) | d::PAGE | d::AF | d::S2R | 0xf << 2);
            words.set(data, (MOVED + IPA[3]) | d::PAGE | d::AF | d::S2R | memattr << 2);
            assert!(n.translate(&words, VA, read(), Updates::Apply, &mut NoRecord).is_ok());
        }
    }
}

#[test]
fn the_first_fault_on_the_way_is_the_one_reported() {
    // Every descriptor on the way is broken in its own manner; mended one after the other from the front.
    let words = Words::default();
    let mut n = build(&words);
    n.stage1.as_mut().unwrap().output_bits = 40;
    let s2 = |i: usize| S2_PAGES + (IPA[i] >> 12) * 8;
    let good: Vec<(u64, u64)> = (0..3)
        .flat_map(|i| [s2(i), stage1_word(i, VA)])
        .chain([s2(3)])
        .map(|at| (at, words.get(at)))
        .collect();
    let leaf = good[5].1;
    words.set(good[0].0, 0);
    words.set(good[1].0, 0);
    words.set(good[2].0, good[2].1 & !d::AF);
    words.set(good[3].0, good[3].1 | 1 << 41);
    words.set(good[4].0, good[4].1 & !d::S2R);
    words.set(good[5].0, leaf & !d::AF & !d::USER);
    words.set(good[6].0, good[6].1 & !d::S2R);
    let fault = || {
        n.translate(&words, VA, read(), Updates::Apply, &mut NoRecord).map_err(|f| (f.stage, f.kind, f.level))
    };
    let mend = |i: usize| words.set(good[i].0, good[i].1);
    assert_eq!(fault(), Err((2, FaultKind::Translation, 3)));
    mend(0);
    assert_eq!(fault(), Err((1, FaultKind::Translation, 1)));
    mend(1);
    assert_eq!(fault(), Err((2, FaultKind::AccessFlag, 3)));
    mend(2);
    assert_eq!(fault(), Err((1, FaultKind::AddressSize, 2)));
    mend(3);
    assert_eq!(fault(), Err((2, FaultKind::Permission, 3)));
    mend(4);
    assert_eq!(fault(), Err((1, FaultKind::AccessFlag, 3)));
    words.set(good[5].0, leaf & !d::USER);
    assert_eq!(fault(), Err((1, FaultKind::Permission, 3)), "before stage 2 sees the output");
    mend(5);
    assert_eq!(fault(), Err((2, FaultKind::Permission, 3)));
    mend(6);
    assert!(fault().is_ok());
}

#[test]
fn the_smaller_leaf_limits_the_size_and_the_stage_1_leaf_stays_known() {
    // Stage 1: a block of 2 MiB or a page; stage 2: pages, a run of pages, a block of 2 MiB or 1 GiB.
    for (first, first_log2) in [(d::BLOCK, 21u8), (d::BLOCK | d::CONT, 25)] {
        for (second, second_log2) in
            [(d::PAGE, 12u8), (d::PAGE | d::CONT, 16), (d::BLOCK, 21), (d::BLOCK, 30)]
        {
            let words = Words::default();
            // IPA of the stage 1 table: 0x1000 in a page of its own, moved like all else by 1 GiB.
            const GIB: u64 = 1 << 30;
            let rw = d::AF | d::S2R | d::S2W | 0xf << 2;
            match second_log2 {
                30 => words.set(S2_ROOT, GIB | second | rw),
                21 => {
                    words.set(S2_ROOT, 0x50_0000 | d::TABLE);
                    (0..512).for_each(|i| words.set(0x50_0000 + i * 8, (GIB + (i << 21)) | second | rw));
                }
                _ => {
                    words.set(S2_ROOT, 0x50_0000 | d::TABLE);
                    for i in 0..64u64 {
                        words.set(0x50_0000 + i * 8, (0x60_0000 + (i << 12)) | d::TABLE);
                        for p in 0..512 {
                            words.set(
                                0x60_0000 + (i << 12) + p * 8,
                                (GIB + (i << 21) + (p << 12)) | second | rw,
                            );
                        }
                    }
                }
            }
            let block = 16u64;
            words.set(GIB + 0x1000 + block * 8, block << 21 | first | d::AF | d::USER);
            let n = both(
                stage1(Some(region(0x1000, Granule::K4, 2, 30)), None),
                stage2(region(S2_ROOT, Granule::K4, 1, 39)),
            );
            let va = block << 21 | 0x1_2345;
            let w = n.translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
            assert_eq!(w.pa, GIB + va);
            assert_eq!((w.size_log2, w.leaf_log2), (first_log2.min(second_log2), first_log2));
        }
    }
}

#[test]
fn with_stage_1_off_the_address_is_an_ipa() {
    let words = Words::default();
    let mut n = build(&words);
    n.stage1 = None;
    let w = n.translate(&words, 0x9234, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!((w.pa, w.size_log2, w.leaf_log2), (MOVED | 0x9234, 12, 12));
    let f = n.translate(&words, 1 << 33, read(), Updates::Apply, &mut NoRecord).unwrap_err();
    assert_eq!((f.kind, f.stage, f.ipa, f.on_stage1_walk), (FaultKind::Translation, 2, 1 << 33, false));
}

#[test]
fn a_stage_1_answer_goes_through_stage_2_for_its_tables_only() {
    let words = Words::default();
    let n = build(&words);
    words.set(S2_PAGES + (IPA[3] >> 12) * 8, 0);
    let w = n.translate_stage1(&words, VA | 5, read(), Updates::Apply, &mut NoRecord).unwrap();
    assert_eq!(w.pa, IPA[3] | 5);
    words.set(S2_PAGES + (IPA[2] >> 12) * 8, 0);
    assert!(
        n.translate_stage1(&words, VA, read(), Updates::Apply, &mut NoRecord).unwrap_err().on_stage1_walk
    );
    let off = Nested { stage1: None, ..n };
    assert_eq!(off.translate_stage1(&words, VA, read(), Updates::Apply, &mut NoRecord).unwrap().pa, VA);
}
