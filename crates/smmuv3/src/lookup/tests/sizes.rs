//! Start levels and sizes, against the tables of DDI 0487 and an independent calculation.

use super::*;
use crate::lookup::size;
use portcullis_arch::vmsa::Granule::{self, K4, K16, K64};

#[test]
fn stage_1_start_levels_of_every_size() {
    // Granule, T0SZ from, to, level.
    let table: &[(Granule, u8, u8, i8)] = &[
        (K4, 12, 15, -1),
        (K4, 16, 24, 0),
        (K4, 25, 33, 1),
        (K4, 34, 42, 2),
        (K4, 43, 48, 3),
        (K16, 12, 16, 0),
        (K16, 17, 27, 1),
        (K16, 28, 38, 2),
        (K16, 39, 48, 3),
        (K64, 12, 21, 1),
        (K64, 22, 34, 2),
        (K64, 35, 47, 3),
    ];
    for &(granule, from, to, level) in table {
        for tsz in from..=to {
            assert_eq!(size::stage1_start(granule, 64 - tsz), level, "{granule:?} T0SZ {tsz}");
        }
    }
}

#[test]
fn stage_2_start_levels_of_every_code() {
    for (granule, code, ds, stt, level) in [
        (K4, 0, false, false, Some(2)),
        (K4, 1, false, false, Some(1)),
        (K4, 2, false, false, Some(0)),
        (K4, 3, false, false, None),
        (K4, 3, false, true, Some(3)),
        (K4, 4, false, true, None),
        (K4, 4, true, false, Some(-1)),
        (K4, 5, true, true, None),
        (K4, 6, true, true, None),
        (K4, 7, true, true, None),
        (K16, 0, false, false, Some(3)),
        (K16, 1, false, false, Some(2)),
        (K16, 2, false, false, Some(1)),
        (K16, 3, false, true, None),
        (K16, 3, true, false, Some(0)),
        (K64, 0, false, false, Some(3)),
        (K64, 1, false, false, Some(2)),
        (K64, 2, false, false, Some(1)),
        (K64, 3, true, true, None),
    ] {
        assert_eq!(size::stage2_start(granule, code, ds, stt), level, "{granule:?} {code} {ds} {stt}");
    }
}

/// The ranges of DDI 0487 as they stand there: granule, level, T0SZ from, to (without DS), and the least with DS.
const STAGE2: &[(Granule, i8, u8, u8, u8)] = &[
    (K4, -1, 64, 0, 12),
    (K4, 0, 16, 24, 12),
    (K4, 1, 21, 33, 21),
    (K4, 2, 30, 42, 30),
    (K4, 3, 39, 51, 39),
    (K16, 0, 16, 16, 12),
    (K16, 1, 16, 27, 13),
    (K16, 2, 24, 38, 24),
    (K16, 3, 35, 49, 35),
    (K64, 1, 12, 21, 12),
    (K64, 2, 18, 34, 18),
    (K64, 3, 31, 47, 31),
];

#[test]
fn stage_2_sizes_that_each_start_level_can_serve() {
    for &(granule, level, from, to, from_ds) in STAGE2 {
        for tsz in 8..=52u8 {
            let plain = (from..=to).contains(&tsz);
            assert_eq!(
                size::stage2_fits(granule, level, 64 - tsz, false),
                plain && level >= 0,
                "{granule:?} L{level} {tsz}"
            );
            let to = if level == -1 { 15 } else { to };
            let wide = (from_ds..=to).contains(&tsz);
            if granule != K64 {
                assert_eq!(
                    size::stage2_fits(granule, level, 64 - tsz, true),
                    wide,
                    "{granule:?} L{level} {tsz} DS"
                );
            }
        }
    }
}

/// The whole matrix of S2TG, S2SL0 and S2T0SZ through the STE check, computed here from the list above.
#[test]
fn the_whole_s2_matrix_is_legal_where_the_tables_say_so() {
    for (stt, oas) in [(false, 48u8), (true, 48), (false, 40), (true, 52)] {
        let mut s = Scene::new(Ste::default(), Cd::default());
        (s.caps.stt, s.caps.oas_bits) = (stt, oas);
        for (tg, granule) in [(0u8, K4), (1, K64), (2, K16)] {
            for sl0 in 0..4u8 {
                for tsz in 0..64u8 {
                    let level = match (granule, sl0) {
                        (K4, 3) => Some(3).filter(|_| stt),
                        (K4, n) => Some(2 - n as i8),
                        (_, 3) => None,
                        (_, n) => Some(3 - n as i8),
                    };
                    let most = match (stt, granule) {
                        (false, _) => 39,
                        (true, K64) => 47,
                        (true, _) => 48,
                    };
                    let least = (64 - oas.max(40)).max(if granule == K64 { 12 } else { 16 });
                    let row = STAGE2.iter().find(|r| r.0 == granule && Some(r.1) == level);
                    let want =
                        row.is_some_and(|r| (r.2..=r.3).contains(&tsz)) && (least..=most).contains(&tsz);
                    let e = ste(SteConfig::Stage2);
                    let e = e.with_dw2(e.dw2().with_s2tg(tg).with_s2sl0(sl0).with_s2t0sz(tsz));
                    let is = crate::lookup::ste::illegal(&s.caps, &s.regs, &e).is_none();
                    assert_eq!(is, want, "{granule:?} SL0 {sl0} T0SZ {tsz} STT {stt} OAS {oas}");
                }
            }
        }
    }
}

#[test]
fn the_whole_vmsav8_32_s2_matrix() {
    let s = Scene::new(Ste::default(), Cd::default());
    for sl0 in 0..4u8 {
        for t0sz in -8i8..8 {
            let want = match sl0 {
                0 => t0sz >= -2,
                1 => t0sz <= 1,
                _ => false,
            };
            for high in 0..4u8 {
                let e = ste(SteConfig::Stage2);
                let d2 = e.dw2().with_s2aa64(false).with_s2sl0(sl0).with_s2t0sz(high << 4 | t0sz as u8 & 0xf);
                let is = crate::lookup::ste::illegal(&s.caps, &s.regs, &e.with_dw2(d2)).is_none();
                assert_eq!(is, want, "SL0 {sl0} T0SZ {t0sz}");
                if is {
                    let region = crate::lookup::ste::stage2(&s.caps, &e.with_dw2(d2)).region.expect("legal");
                    let bits = (32 - t0sz) as u8;
                    assert_eq!((region.input_bits, region.start_level), (bits, 2 - sl0 as i8));
                }
            }
        }
    }
}

#[test]
fn size_codes_are_capped_by_oas_and_by_the_architecture_version() {
    let mut c = caps();
    for (revision, oas, want) in [
        (0, 48, [32, 36, 40, 42, 44, 48, 48, 48]),
        (1, 48, [32, 36, 40, 42, 44, 48, 48, 48]),
        (1, 52, [32, 36, 40, 42, 44, 48, 52, 52]),
        (3, 40, [32, 36, 40, 40, 40, 40, 40, 40]),
        (3, 32, [32; 8]),
    ] {
        (c.revision, c.oas_bits) = (revision, oas);
        let got: [u8; 8] = core::array::from_fn(|i| size::effective(&c, i as u8));
        assert_eq!(got, want, "v3.{revision} OAS {oas}");
    }
}

#[test]
fn first_tables_are_aligned_to_their_size() {
    let a = 0x000f_ffff_ffff_fff0;
    // 4K, 39 bits from level 1: 512 entries. 25 bits from level 2: 16 entries. Concatenated: 40 bits, two tables.
    for (granule, level, bits, out, low) in [
        (K4, 1, 39, 48, 0x1000u64),
        (K4, 2, 25, 48, 0x80),
        (K4, 2, 22, 48, 0x10),
        (K4, 2, 22, 52, 0x40),
        (K4, 1, 40, 48, 0x2000),
        (K4, 1, 43, 48, 0x10000),
        (K16, 0, 48, 48, 0x10),
        (K64, 1, 48, 48, 0x200),
        (K64, 1, 52, 52, 0x2000),
        (K4, -1, 52, 52, 0x80),
    ] {
        assert_eq!(
            size::first_table(a, granule, level, bits, out),
            a & !(low - 1),
            "{granule:?} {level} {bits}"
        );
    }
}
