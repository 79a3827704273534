//! Input ranges, region choice and output sizes (section 5.2): which fault, in which bank, at which level.

mod rig;

use portcullis_arch::Access;
use portcullis_smmuv2::Config;
use rig::*;

/// A plain SMMU whose bank 0 serves stream 1.
fn plain(c: Config) -> Rig {
    let r = Rig::new(c);
    r.w(CR0, 0x0020_0402);
    r.group(0, 1, 0);
    r
}

/// Output or (FSR, FSYNR0) of bank 0, which is cleared.
fn ask(r: &Rig, va: u64) -> std::result::Result<u64, (u32, u32)> {
    go(&mut r.port(), stream(1), va, Access::Read).map_err(|_| {
        let got = (r.rb(0, FSR), r.rb(0, FSYNR0));
        r.wb(0, FSR, 0xffff_ffff);
        got
    })
}

const TF64: (u32, u32) = (0x402, 0);
const ASF64: (u32, u32) = (0x480, 0);

/// A level 0 table whose entries all lead to one level 1 table full of 1 GiB blocks at 1 GiB, so that any address
/// inside the region translates.
fn everywhere(r: &Rig) -> u64 {
    let mut t = Tables::new(r);
    let (l0, l1) = (t.alloc(1), t.alloc(1));
    for i in 0..512 {
        t.store(l0 + 8 * i, l1 | 3);
        t.store(l1 + 8 * i, 0x4000_0000 | (RW & !2));
    }
    l0
}

#[test]
fn aarch64_regions_by_t0sz_t1sz_and_the_sign() {
    let r = plain(Config::default());
    let root = everywhere(&r);
    r.stage1(0, root, LINUX_SCTLR);
    r.wb64(0, TTBR1, root);
    // 48 bits below, 44 bits above, TG1 4K; SEP 7 with a 49-bit bus: bit 48 is the sign.
    r.wb(0, TCR, 0x8014_2010);
    for (va, want) in [
        (0x0, true),
        (0x0000_ffff_ffff_f000, true),
        (0x0001_0000_0000_0000, false), // extended: 0xffff_0000_...: below the 44-bit region
        (0x0001_efff_ffff_f000, false),
        (0x0001_f000_0000_0000, true),
        (0x0001_ffff_ffff_f000, true),
        (0xffff_f000_0000_0000, true), // the bus has 49 bits
        (0xfffe_0000_0000_0000, true),
    ] {
        let got = ask(&r, va);
        if want {
            assert!(got.is_ok(), "{va:#x}: {got:?}");
        } else {
            assert_eq!(got, Err(TF64), "{va:#x}");
        }
    }
    // EPD1, then EPD0.
    r.wb(0, TCR, 0x8094_2010);
    assert_eq!(ask(&r, 0x0001_ffff_ffff_f000), Err(TF64));
    r.wb(0, TCR, 0x8014_2090);
    assert_eq!(ask(&r, 0), Err(TF64));
    assert!(ask(&r, 0x0001_ffff_ffff_f000).is_ok());
}

#[test]
fn sep_says_which_bit_is_the_sign() {
    let r = plain(Config::default());
    let root = everywhere(&r);
    r.stage1(0, root, LINUX_SCTLR);
    r.wb64(0, TTBR1, root);
    r.wb(0, TCR, 0x8019_2019); // both regions 39 bits
    r.wb64(0, TTBR0, everywhere_39(&r, root));
    r.wb64(0, TTBR1, everywhere_39(&r, root));
    // SEP, the sign bit.
    for (sep, bit) in [(0u32, 31u32), (1, 35), (2, 39), (3, 41), (4, 43), (5, 47), (6, 48), (7, 48)] {
        r.wb(0, TCR2, 0x15 | sep << 15);
        let sign = 1u64 << bit;
        if bit < 39 {
            // The lower half of the positions is in TTBR0's region.
            assert!(ask(&r, sign - 1).is_ok(), "SEP {sep}");
        }
        // All ones from the sign down: the top of TTBR1's region.
        assert!(ask(&r, sign | (sign - 1)).is_ok(), "SEP {sep}");
        if bit > 39 {
            assert_eq!(ask(&r, sign), Err(TF64), "SEP {sep}: negative, but below TTBR1's region");
        }
        if bit < 48 {
            assert_eq!(ask(&r, sign << 1), Err(TF64), "SEP {sep}: a bit above the position");
        }
    }
}

/// The level 1 table of [`everywhere`].
fn everywhere_39(r: &Rig, l0: u64) -> u64 {
    r.peek(l0) & !0xfff
}

#[test]
fn a_narrow_bus_zero_extends() {
    // 40 bits upstream: SEP 7 does not extend, and a position above the bus does not either.
    let r = plain(Config { upstream_bits: 40, ..Config::default() });
    let root = everywhere(&r);
    r.stage1(0, root, LINUX_SCTLR);
    for sep in [7u32, 5, 4, 3] {
        r.wb(0, TCR2, 0x15 | sep << 15);
        assert!(ask(&r, 0xff_ffff_f000).is_ok(), "SEP {sep}");
    }
    r.wb(0, TCR2, 0x15 | 2 << 15); // bit 39 is the top bit of the bus
    assert_eq!(ask(&r, 0xff_ffff_f000), Err(TF64));
    // 64 bits: nothing to extend.
    let r = plain(Config { upstream_bits: 64, ..Config::default() });
    let root = everywhere(&r);
    r.stage1(0, root, LINUX_SCTLR);
    r.wb64(0, TTBR1, root);
    r.wb(0, TCR, 0x8010_2010);
    assert!(ask(&r, 0xffff_0000_0000_0000).is_ok());
    assert!(ask(&r, 0x0000_ffff_ffff_f000).is_ok());
    assert_eq!(ask(&r, 0xfffe_ffff_ffff_f000), Err(TF64));
    assert_eq!(ask(&r, 0x0001_0000_0000_0000), Err(TF64));
}

/// T0SZ = 0x19 is 39 bits and starts at level 1: with 48-bit settings the same tables are misread (S2's trouble).
#[test]
fn t0sz_sets_the_start_level() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    let at = t.slot(root, 1, 0x7000_0000, 3);
    t.store(at, DATA | RW);
    r.group(0, 1, 0);
    assert_eq!(ask(&r, 0x7000_0000), Err(TF64), "its first entry is not the one of a level 0 table");
    r.wb(0, TCR, 0x0080_2019);
    assert_eq!(ask(&r, 0x7000_0000), Ok(DATA));
    assert_eq!(ask(&r, 0x80_0000_0000), Err(TF64), "beyond 39 bits");
    // Sizes that no granule has are translation faults.
    for t0sz in [0u32, 15, 40, 63] {
        r.wb(0, TCR, 0x0080_2000 | t0sz);
        assert_eq!(ask(&r, 0x7000_0000), Err(TF64), "T0SZ {t0sz}");
    }
}

#[test]
fn a_bank_that_is_off_checks_its_output_only() {
    let r = plain(Config { ipa_bits: 44, pa_bits: 42, upstream_bits: 64, ..Config::default() });
    r.w(r.cba2r(0), 1);
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb(0, SCTLR, CFRE);
    assert_eq!(ask(&r, (1 << 42) - 0x1000), Ok((1 << 42) - 0x1000));
    assert_eq!(ask(&r, 1 << 42), Err(ASF64), "min(IAS, OAS) with stage 2 bypassed");
    assert_eq!(ask(&r, 1 << 63), Err(ASF64));
    // AArch32: 32 bits of input even then.
    r.w(r.cba2r(0), 0);
    assert_eq!(ask(&r, 0xffff_f000), Ok(0xffff_f000));
    assert_eq!(ask(&r, 1 << 32), Err((0x002, 1)), "TF, PLVL 1, FORMAT short");
}

#[test]
fn aarch32_long_regions() {
    let r = plain(Config::default());
    let mut t = Tables::new(&r);
    // 32 bits from level 1 for TTBR0, the same for TTBR1 elsewhere.
    let (lower, upper) = (t.alloc(1), t.alloc(1));
    for i in 0..4 {
        t.store(lower + 8 * i, 0x4000_0000 | (RW & !2));
        t.store(upper + 8 * i, 0x8000_0000 | (RW & !2));
    }
    let (lower2, upper2) = (t.alloc(1), t.alloc(1));
    for i in 0..512 {
        t.store(lower2 + 8 * i, 0x4000_0000 | (RW & !2));
        t.store(upper2 + 8 * i, 0x8000_0000 | (RW & !2));
    }
    r.stage1(0, lower, LINUX_SCTLR);
    r.w(r.cba2r(0), 0);
    // T0SZ, T1SZ, start tables, addresses and the half they land in (None: TF, PLVL 1).
    type Row<'a> = (u32, u32, u64, u64, &'a [(u64, Option<u32>)]);
    let rows: &[Row<'_>] = &[
        (0, 0, lower, upper, &[(0, Some(0)), (0xffff_f000, Some(0))]),
        (1, 0, lower, upper, &[(0, Some(0)), (0x7fff_f000, Some(0)), (0x8000_0000, Some(1))]),
        (0, 1, lower, upper, &[(0x7fff_f000, Some(0)), (0x8000_0000, Some(1)), (0xffff_f000, Some(1))]),
        (
            2,
            2,
            lower2,
            upper2,
            &[(0x3fff_f000, Some(0)), (0x4000_0000, None), (0xbfff_f000, None), (0xc000_0000, Some(1))],
        ),
        (7, 7, lower2, upper2, &[(0x01ff_f000, Some(0)), (0x0200_0000, None), (0xfe00_0000, Some(1))]),
    ];
    for (t0sz, t1sz, ttbr0, ttbr1, cases) in rows {
        r.wb(0, TCR, 0x8000_0000 | t0sz | t1sz << 16);
        r.wb64(0, TTBR0, *ttbr0);
        r.wb64(0, TTBR1, *ttbr1);
        for (va, want) in *cases {
            let got = ask(&r, *va).map(|pa| u32::from(pa >= 0x8000_0000));
            let text = format!("T0SZ {t0sz}, T1SZ {t1sz}, {va:#x}");
            match want {
                Some(half) => assert_eq!(got, Ok(*half), "{text}"),
                None => assert_eq!(got, Err((0x202, 1)), "{text}"),
            }
        }
        assert_eq!(ask(&r, 1 << 32), Err((0x202, 1)), "above 32 bits");
    }
    r.wb(0, TCR, 0x8080_0001); // EPD1
    assert_eq!(ask(&r, 0x8000_0000), Err((0x202, 1)));
    r.wb(0, TCR, 0x8000_0080); // EPD0
    assert_eq!(ask(&r, 0), Err((0x202, 1)));
}

#[test]
fn aarch32_short_regions() {
    let r = plain(Config::default());
    let mut t = Tables::new(&r);
    // 16 KiB tables of 1 MiB sections at 0x4000_0000 and 0x8000_0000; AP = 3, TRE and AFE off.
    let (lower, upper) = (t.alloc(4), t.alloc(4));
    for i in 0..2048 {
        let pair = |base: u64| (base | 0xc02) << 32 | base | 0xc02;
        t.store(lower + 8 * i, pair(0x4000_0000));
        t.store(upper + 8 * i, pair(0x8000_0000));
    }
    r.stage1(0, lower, M | CFRE);
    r.w(r.cba2r(0), 0);
    r.wb64(0, TTBR1, upper);
    for (tcr, va, want) in [
        (0u32, 0u64, Ok(0)),
        (0, 0xfff0_0000, Ok(0)),
        (1, 0x7ff0_0000, Ok(0)),
        (1, 0x8000_0000, Ok(1)),
        (7, 0x01f0_0000, Ok(0)),
        (7, 0x0200_0000, Ok(1)),
        (7, 0xfff0_0000, Ok(1)),
        (1 | 1 << 4, 0, Err((0x002, 1))),           // PD0
        (1 | 1 << 5, 0x8000_0000, Err((0x002, 1))), // PD1
        (1 | 1 << 5, 0, Ok(0)),
    ] {
        r.wb(0, TCR, tcr);
        let got = ask(&r, va).map(|pa| u32::from(pa >= 0x8000_0000));
        assert_eq!(got, want, "TCR {tcr:#x}, {va:#x}");
    }
    assert_eq!(ask(&r, 1 << 32), Err((0x002, 1)));
}

#[test]
fn stage_2_input_ranges() {
    let r = plain(Config { ipa_bits: 42, pa_bits: 36, upstream_bits: 64, ..Config::default() });
    let mut t = Tables::new(&r);
    let root = t.alloc(2);
    for i in 0..1024 {
        t.store(root + 8 * i, 0x4000_0000 | (S2_RW & !2));
    }
    // 40 bits from level 1, two tables in a row.
    r.stage2(0, root, 0, M | CFRE);
    assert!(ask(&r, 0xff_ffff_f000).is_ok());
    // NSATTR: the input is non-secure. PLVL is 0 for the range.
    assert_eq!(ask(&r, 1 << 40), Err((0x402, 0x100)), "outside T0SZ, and above OAS: TF, not ASF");
    assert_eq!(ask(&r, 1 << 42), Err((0x402, 0x100)), "above IAS");
    assert_eq!(ask(&r, 1 << 63), Err((0x402, 0x100)));
    // Off: the output must fit OAS.
    r.wb(0, SCTLR, CFRE);
    assert_eq!(ask(&r, 0xf_ffff_f000), Ok(0xf_ffff_f000));
    assert_eq!(ask(&r, 1 << 36), Err((0x480, 0x100)));
    // AArch32 stage 2 has 40 bits at most: TF with M = 1, ASF with M = 0, PLVL 1.
    r.w(r.cba2r(0), 0);
    r.wb(0, SCTLR, M | CFRE);
    r.wb(0, TCR, 0x0000_0058); // T0SZ -8 (S copies bit 3), SL0 1
    assert!(ask(&r, 0xff_ffff_f000).is_ok());
    assert_eq!(ask(&r, 1 << 40), Err((0x202, 0x101)));
    r.wb(0, SCTLR, CFRE);
    assert_eq!(ask(&r, 1 << 40), Err((0x280, 0x101)));
}

#[test]
fn aarch32_stage_2_stops_at_a_smaller_ias() {
    let r = plain(Config { ipa_bits: 36, ..Config::default() });
    let mut t = Tables::new(&r);
    let root = t.alloc(2);
    for i in 0..1024 {
        t.store(root + 8 * i, 0x4000_0000 | (S2_RW & !2));
    }
    r.stage2(0, root, 0, M | CFRE);
    r.w(r.cba2r(0), 0);
    r.wb(0, TCR, 0x0000_0058);
    assert!(ask(&r, 0xf_ffff_f000).is_ok());
    assert_eq!(ask(&r, 1 << 36), Err((0x202, 0x101)));
}

#[test]
fn output_sizes_by_stage_and_nesting() {
    // IAS 42, OAS 40: with stage 2 bypassed 40 bits count, on top of stage 2 42 do.
    let r = plain(Config { ipa_bits: 42, pa_bits: 40, ..Config::default() });
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    for (va, bit) in [(0x1000u64, 39), (0x2000, 40), (0x3000, 41), (0x4000, 42)] {
        t.page(root, va, 1 << bit | RW);
    }
    r.stage1(0, root, LINUX_SCTLR);
    assert_eq!(ask(&r, 0x1000), Ok(1 << 39));
    for va in [0x2000, 0x3000, 0x4000] {
        assert_eq!(ask(&r, va), Err((0x480, 3)), "{va:#x}");
    }
    let root2 = t.alloc(8);
    let blocks = 1u64 << 30;
    // 42 bits from level 1: eight tables in a row. Tables map flat, 1 TiB and up to 1 GiB.
    for i in 0..4096 {
        let pa = if i < 1024 { i * blocks } else { 0x4000_0000 };
        t.store(root2 + 8 * i, pa | (S2_RW & !2));
    }
    r.stage2(1, root2, 0, M | CFRE);
    r.wb(1, TCR, 0x8005_3556);
    r.nest(0, 1, 0);
    assert_eq!(ask(&r, 0x2000), Ok(0x4000_0000));
    assert_eq!(ask(&r, 0x3000), Ok(0x4000_0000));
    assert_eq!(ask(&r, 0x4000), Err((0x480, 3)), "above IAS");
    // And stage 2's own output above OAS.
    t.store(root2 + 8 * 1024, 1 << 41 | (S2_RW & !2));
    assert!(rd(&mut r.port(), 1, 0x2000).is_err());
    assert_eq!((r.rb(0, FSR), r.rb(1, FSR), r.rb(1, FSYNR0)), (0x400, 0x480, 0x0000_0105));
}

#[test]
fn aarch32_outputs_have_40_bits_at_most() {
    let r = plain(Config::default());
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    t.store(root, 1 << 39 | (RW & !2));
    t.store(root + 8, 1 << 40 | (RW & !2));
    r.stage1(0, root, LINUX_SCTLR);
    r.w(r.cba2r(0), 0);
    r.wb(0, TCR, 0x8000_0000);
    assert_eq!(ask(&r, 0), Ok(1 << 39));
    assert_eq!(ask(&r, 1 << 30), Err((0x280, 1)));
    // Stage 2 AArch64 start levels that VTCR cannot have.
    let r = plain(Config::default());
    r.stage2(0, root, 0, M | CFRE);
    for vtcr in [0x0000_00c0 | 24, 0x0000_0080 | 25, 0x0000_0040 | 20, 0x40 | 34, 40, 29] {
        r.wb(0, TCR, vtcr);
        assert_eq!(ask(&r, 0), Err((0x402, 0x100)), "VTCR {vtcr:#x}");
    }
}

#[test]
fn hyp_has_one_region() {
    let r = plain(Config::default());
    let mut t = Tables::new(&r);
    let root = t.alloc(1);
    for i in 0..4 {
        t.store(root + 8 * i, 0x4000_0000 | (PAGE & !2));
    }
    r.stage1(0, root, LINUX_SCTLR);
    r.w(r.cbar(0), LINUX_CBAR | 1 << 10);
    // AArch64: no sign, whatever SEP says.
    let l0 = everywhere(&r);
    r.wb64(0, TTBR0, l0);
    r.wb(0, TCR, 0x10);
    assert!(ask(&r, 0xffff_ffff_f000).is_ok());
    assert_eq!(ask(&r, 1 << 48), Err(TF64));
    // AArch32: T1SZ has no meaning.
    r.w(r.cba2r(0), 0);
    r.wb64(0, TTBR0, root);
    r.poke(root, 0x4000_0000 | (PAGE & !2));
    r.poke(root + 24, 0x4000_0000 | (PAGE & !2));
    r.wb(0, TCR, 0x8000_0000 | 2 << 16);
    assert_eq!(ask(&r, 0xc000_0000), Ok(0x4000_0000));
    r.wb(0, TCR, 0x8000_0001);
    assert_eq!(ask(&r, 0xc000_0000), Err((0x202, 1)));
}
