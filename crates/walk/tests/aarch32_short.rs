//! The AArch32 short format: TTBCR.N ranges, sections, supersections and pages, AP with and without AFE, memory types
//! with and without TEX remap.

mod common;

use common::*;
use portcullis_arch::attrs::Allocate;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Attributes, MemoryType, Shareability};
use portcullis_walk::{Fault, FaultKind, NoRecord, Region, Rule, Split, Stage1, TableFormat, Trace};

const T0: u64 = 0x10_0000;
const T1: u64 = 0x20_0000;

fn fault(kind: FaultKind, level: i8) -> Fault {
    Fault::new(kind, 1, level)
}

fn short_with(n: u8) -> Stage1 {
    let r = |base, bits| Some(Region { start_level: 1, ..region(base, Granule::K4, 1, bits) });
    Stage1 {
        format: TableFormat::Short,
        split: Split::Short { n },
        output_bits: 40,
        range_fault_level: 1,
        ..stage1(r(T0, 32 - n), r(T1, 32))
    }
}

const AP_FULL: u32 = 3 << 10;

#[test]
fn short_ranges_for_every_n() {
    let words = Words::default();
    for i in 0..4096u64 {
        words.set32(T0 + i * 4, 0x1000_0000 | AP_FULL | 2);
        words.set32(T1 + i * 4, 0x2000_0000 | AP_FULL | 2);
    }
    for n in 0..8u8 {
        let s1 = short_with(n);
        let edge = 1u64 << (32 - n);
        for va in [0u64, 0x0012_3456, edge - 1, edge, 0xffff_ffff, 0x8000_0000, 0x01ff_ffff, 0x0200_0000] {
            if va >> 32 != 0 {
                continue;
            }
            words.take_log();
            let half = usize::from(va >= edge);
            let w = only1(s1.clone()).translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
            assert_eq!(w.pa, [0x1000_0000, 0x2000_0000][half] | va & 0xf_ffff, "N={n} {va:#x}");
            assert_eq!(w.size_log2, 20);
            assert_eq!(words.take_addresses(), [[T0, T1][half] + (va >> 20) * 4]);
            let mut off = s1.clone();
            off.regions[half] = None;
            let got = only1(off).translate(&words, va, read(), Updates::Apply, &mut NoRecord);
            assert_eq!(got, Err(fault(FaultKind::Translation, 1)), "PD{half}");
        }
        let got = only1(s1).translate(&words, 1 << 32, read(), Updates::Apply, &mut NoRecord);
        assert_eq!(got, Err(fault(FaultKind::Translation, 1)));
    }
}

#[test]
fn short_leaves_of_every_size() {
    let va = 0x4567_89ab;
    let level2 = 0x30_0400u64;
    let l1 = T0 + (va >> 20) * 4;
    let l2 = level2 + (va >> 12 & 0xff) * 4;
    // (level 1, level 2, output, size)
    let cases: [(u32, u32, u64, u8); 6] = [
        (0xabc0_0000 | AP_FULL | 2, 0, 0xabc0_0000 | va & 0xf_ffff, 20),
        (0xabc0_0000 | AP_FULL | 3, 0, 0xabc0_0000 | va & 0xf_ffff, 20),
        // A supersection: PA[35:32] in bits 23:20, PA[39:36] in bits 8:5.
        (0xab00_0000 | 0xc << 20 | 0xd << 5 | 1 << 18 | AP_FULL | 2, 0, 0xdc_ab00_0000 | va & 0xff_ffff, 24),
        (level2 as u32 | 1, 0xabcd_0000 | 3 << 4 | 1, 0xabcd_0000 | va & 0xffff, 16),
        (level2 as u32 | 1, 0xabcd_e000 | 3 << 4 | 2, 0xabcd_e000 | va & 0xfff, 12),
        (level2 as u32 | 1 | 0xf << 5, 0xabcd_e000 | 3 << 4 | 3, 0xabcd_e000 | va & 0xfff, 12),
    ];
    for (first, second, pa, size) in cases {
        for big_endian in [false, true] {
            let words = Words::default();
            let order = |v: u32| if big_endian { v.swap_bytes() } else { v };
            words.set32(l1, order(first));
            words.set32(l2, order(second));
            let s1 = Stage1 { big_endian, ..short_with(0) };
            let mut trace = Trace::default();
            let w = only1(s1).translate(&words, va, read(), Updates::Apply, &mut trace).unwrap();
            assert_eq!((w.pa, w.size_log2, w.leaf_log2), (pa, size, size));
            let at = if second == 0 { vec![l1] } else { vec![l1, l2] };
            assert_eq!(words.take_addresses(), at);
            let values: Vec<u64> = trace.steps.iter().map(|s| s.value).collect();
            assert_eq!(values, [first, second][..at.len()].iter().map(|&v| u64::from(v)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn short_faults_name_their_level() {
    let words = Words::default();
    let at = |words: &Words, s1: Stage1| {
        only1(s1).translate(words, 0x1234, read(), Updates::Apply, &mut NoRecord).unwrap_err()
    };
    assert_eq!(at(&words, short_with(0)), fault(FaultKind::Translation, 1));
    words.set32(T0, 0x30_0001);
    assert_eq!(at(&words, short_with(0)), fault(FaultKind::Translation, 2));
    words.set32(0x30_0004, 0x5000 | 2);
    assert_eq!(at(&words, short_with(0)), fault(FaultKind::Permission, 2));
    let afe = |affd| Stage1 { access_flag_enable: true, affd, ..short_with(0) };
    words.set32(0x30_0004, 0x5000 | 2 << 4 | 2);
    assert_eq!(at(&words, afe(false)), fault(FaultKind::AccessFlag, 2));
    assert!(only1(afe(true)).translate(&words, 0x1234, read(), Updates::Apply, &mut NoRecord).is_ok());
    words.set32(0x30_0004, 0x8000_5000 | 2);
    assert_eq!(at(&words, Stage1 { output_bits: 31, ..afe(false) }), fault(FaultKind::AddressSize, 2));
    words.refuse(0x30_0004);
    let refused = |fetch, level| Fault { fetch, ..fault(FaultKind::External, level) };
    assert_eq!(at(&words, short_with(0)), refused(0x30_0004, 2));
    words.set32(T0, 1 << 20 | 1 << 18 | AP_FULL | 2);
    let mut trace = Trace::default();
    let s1 = Stage1 { output_bits: 32, ..short_with(0) };
    let got = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut trace);
    assert_eq!(got, Err(fault(FaultKind::AddressSize, 1)));
    assert_eq!(trace.steps[0].rule, Rule::AddressSize { address: 1 << 32, bits: 32 });
    words.refuse(T0);
    assert_eq!(at(&words, short_with(0)), refused(T0, 1));
}

/// AP[2:0] with AFE = 0: privileged and unprivileged as "rw", "r-" or "--" (sheet 5.5).
const SHORT_AP: [(&str, &str); 8] = [
    ("--", "--"),
    ("rw", "--"),
    ("rw", "r-"),
    ("rw", "rw"),
    ("--", "--"),
    ("r-", "--"),
    ("r-", "r-"),
    ("r-", "r-"),
];
/// AP[2:1] with AFE = 1.
const SHORT_AFE: [(&str, &str); 4] = [("rw", "--"), ("rw", "rw"), ("r-", "--"), ("r-", "r-")];

#[test]
fn short_permissions_of_every_ap_value_on_every_leaf() {
    let level2 = 0x30_0400u32;
    for n in 0..1u32 << 8 {
        let (ap, xn, pxn, afe) = (n & 7, n >> 3 & 1, n >> 4 & 1, n >> 5 & 1 != 0);
        let (wxn, uwxn) = (n >> 6 & 1 != 0, n >> 7 & 1 != 0);
        let (two, low) = (ap >> 2, ap & 3);
        let section = two << 15 | low << 10 | xn << 4 | pxn | 2;
        let leaves = [
            (0x100_0000 | section, None),
            (0x100_0000 | section | 1 << 18, None),
            (level2 | pxn << 2 | 1, Some(0x100_0000 | two << 9 | low << 4 | xn << 15 | 1)),
            (level2 | pxn << 2 | 1, Some(0x100_0000 | two << 9 | low << 4 | xn | 2)),
        ];
        for (first, second) in leaves {
            let words = Words::default();
            words.set32(T0, first);
            if let Some(v) = second {
                words.set32(level2.into(), v);
            }
            let s1 = Stage1 { access_flag_enable: afe, wxn, uwxn, ..short_with(0) };
            let nest = only1(s1);
            for k in KINDS {
                let (write, fetch, privileged) = k;
                let got =
                    nest.translate(&words, 0, kind(k), Updates::Apply, &mut NoRecord).map_err(|f| f.kind);
                if afe && ap & 1 == 0 {
                    assert_eq!(got, Err(FaultKind::AccessFlag));
                    continue;
                }
                let (p, u) = if afe { SHORT_AFE[ap as usize >> 1] } else { SHORT_AP[ap as usize] };
                let mine = if privileged { p } else { u };
                let (r, w) = (mine.starts_with('r'), mine.ends_with('w'));
                let want = match (write, fetch) {
                    (true, _) => w,
                    (_, false) => r,
                    _ => {
                        let never = xn != 0 || privileged && pxn != 0;
                        r && !never && !(wxn && w) && !(uwxn && u.ends_with('w'))
                    }
                };
                assert_eq!(got.is_ok(), want, "{n:#x} {first:#x} {k:?}");
            }
        }
    }
}

#[test]
fn short_types_without_remap() {
    let wb = |a: Attributes| (a.memory(), a.write_allocate());
    let normal = |o, i, wa| (MemoryType::normal(o, i), wa);
    let (yes, no, none) = (Allocate::Yes, Allocate::No, Allocate::Default);
    // TEX, C, B as one number (DDI 0487 table of TEX[2:0], C, B with SCTLR.TRE = 0).
    let cases = [
        (0b00000, (MemoryType::DEVICE_NGNRNE, none)),
        (0b00001, (MemoryType::DEVICE_NGNRE, none)),
        (0b00010, normal(2, 2, no)),
        (0b00011, normal(3, 3, no)),
        (0b00100, (MemoryType::NORMAL_NC, none)),
        (0b00111, normal(3, 3, yes)),
        (0b01000, (MemoryType::DEVICE_NGNRE, none)),
        (0b10000, (MemoryType::NORMAL_NC, none)),
        (0b10001, normal(1, 3, yes)),
        (0b10100, normal(3, 1, no)),
        (0b11010, normal(2, 2, no)),
        (0b11111, normal(3, 3, no)),
    ];
    for (code, want) in cases {
        for shareable in [0u32, 1] {
            let words = Words::default();
            let (tex, cb) = (code >> 2, code & 3);
            words.set32(T0, 0x100_0000 | tex << 12 | cb << 2 | AP_FULL | shareable << 16 | 2);
            words.set32(T0 + 4, 0x30_0001);
            words.set32(0x30_0000, 0x5000 | tex << 6 | cb << 2 | 3 << 4 | shareable << 10 | 2);
            words.set32(0x30_0040, 0x1_0000 | tex << 12 | cb << 2 | 3 << 4 | shareable << 10 | 1);
            for va in [0, 0x10_0000, 0x11_0000] {
                let w = only1(short_with(0))
                    .translate(&words, va, read(), Updates::Apply, &mut NoRecord)
                    .unwrap();
                assert_eq!(wb(w.attrs), want, "{code:05b} {va:#x}");
                let own = if shareable != 0 { Shareability::Inner } else { Shareability::Non };
                let cacheable = want.0.is_cacheable();
                assert_eq!(w.attrs.shareability(), if cacheable { own } else { Shareability::Outer });
            }
        }
    }
}

#[test]
fn short_types_with_remap_come_from_prrr_and_nmrr() {
    // Linux's values (sheet 7.2): TR1 Device, TR4 and TR7 Normal, DS0, DS1, NS1, NOS7; WB-WA for 7.
    let prrr = 1u64 << 2 | 2 << 8 | 2 << 14 | 1 << 16 | 1 << 17 | 1 << 19 | 1 << 31;
    let nmrr = 1u64 << 14 | 1 << 30;
    let cases = [
        (0, false, MemoryType::DEVICE_NGNRNE, Shareability::Outer),
        (1, true, MemoryType::DEVICE_NGNRE, Shareability::Outer),
        (4, true, MemoryType::NORMAL_NC, Shareability::Outer),
        (7, true, MemoryType::NORMAL_WB, Shareability::Inner),
        (7, false, MemoryType::NORMAL_WB, Shareability::Non),
    ];
    for (n, s, memory, sh) in cases {
        let words = Words::default();
        // n is {TEX[0], C, B}; TEX[2:1] do not count.
        for junk in [0u32, 0b110] {
            let (tex, cb) = (n >> 2 | junk, n & 3);
            words.set32(T0, 0x100_0000 | tex << 12 | cb << 2 | AP_FULL | u32::from(s) << 16 | 2);
            let s1 = Stage1 { tex_remap: true, mair: prrr | nmrr << 32, ..short_with(0) };
            let a = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap().attrs;
            assert_eq!((a.memory(), a.shareability()), (memory, sh), "n = {n}");
        }
    }
    // Every inner and outer code of one entry.
    for codes in 0..16u64 {
        const CACHE: [u8; 4] = [1, 3, 2, 3];
        let words = Words::default();
        words.set32(T0, 0x100_0000 | 1 << 12 | 1 << 2 | AP_FULL | 2);
        let (inner, outer) = (codes & 3, codes >> 2);
        let mair = 2u64 << 10 | (inner << 10 | outer << 26) << 32;
        let s1 = Stage1 { tex_remap: true, mair, ..short_with(0) };
        let a = only1(s1).translate(&words, 0, read(), Updates::Apply, &mut NoRecord).unwrap().attrs;
        assert_eq!(a.memory(), MemoryType::normal(CACHE[outer as usize], CACHE[inner as usize]));
    }
}

#[test]
fn short_security_and_global_bits() {
    for (secure, ns, sif) in (0..8).map(|n| (n & 1 != 0, n & 2 != 0, n & 4 != 0)) {
        let words = Words::default();
        let bit = u32::from(ns);
        words.set32(T0, 0x100_0000 | AP_FULL | bit << 19 | 1 << 17 | 2);
        words.set32(T0 + 4, 0x30_0001 | bit << 3);
        words.set32(0x30_0000, 0x5000 | 3 << 4 | 2);
        let mut s1 = Stage1 { secure, secure_fetch_only: sif && secure, ..short_with(0) };
        s1.regions[0].as_mut().unwrap().walk_attrs = A.with_non_secure(!secure);
        let n = only1(s1);
        for (va, global) in [(0, false), (0x10_0000, true)] {
            let w = n.translate(&words, va, read(), Updates::Apply, &mut NoRecord).unwrap();
            assert_eq!((w.attrs.non_secure(), w.global), (!secure || ns, global));
            let fetch = n.translate(&words, va, kind((false, true, false)), Updates::Apply, &mut NoRecord);
            assert_eq!(fetch.is_err(), sif && secure && ns);
        }
        assert_eq!(words.take_log().last().unwrap().2.non_secure(), !secure || ns);
    }
}
