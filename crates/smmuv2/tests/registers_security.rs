//! What belongs to whom: SCR1's splits, secure banks and groups, GASRAE.

mod rig;

use rig::*;

/// 5 banks and 7 groups for the non-secure side, the rest secure.
fn split() -> Rig {
    let r = Rig::zynqmp();
    r.ws(SCR1, 0x0201_0705);
    assert_eq!(r.rs(SCR1), 0x0201_0705);
    r
}

#[test]
fn identification_tells_non_secure_software_only_what_it_owns() {
    let r = split();
    assert_eq!((r.r(IDR0), r.rs(IDR0)), (0x7c01_3e07, 0xfc01_3e30));
    assert_eq!((r.r(IDR1), r.rs(IDR1)), (0x3000_0005, 0x3000_0f10));
    r.ws(SCR1, 0x0201_0000);
    assert_eq!((r.r(IDR0), r.r(IDR1)), (0x7c01_3e00, 0x3000_0000));
    r.ws(SCR1, 0x0201_ffff);
    assert_eq!((r.r(IDR0), r.r(IDR1)), (0x7c01_3e30, 0x3000_0010), "not more than there are");
}

#[test]
fn scr1_is_secure_only() {
    let r = split();
    r.w(SCR1, 0);
    assert_eq!((r.r(SCR1), r.rs(SCR1)), (0, 0x0201_0705));
}

#[test]
fn stream_groups_of_the_secure_side_are_invisible() {
    let r = split();
    for n in 0..48u64 {
        r.ws(SMR + 4 * n, 0x8000_0001 + n as u32);
        r.ws(S2CR + 4 * n, 0x0001_0000);
    }
    for n in 0..48u64 {
        let want = if n < 7 { (0x8000_0001 + n as u32, 0x0001_0000) } else { (0, 0) };
        assert_eq!((r.r(SMR + 4 * n), r.r(S2CR + 4 * n)), want, "group {n}");
        r.w(SMR + 4 * n, 0);
        r.w(S2CR + 4 * n, 0);
        let want = if n < 7 { (0, 0) } else { (0x8000_0001 + n as u32, 0x0001_0000) };
        assert_eq!((r.rs(SMR + 4 * n), r.rs(S2CR + 4 * n)), want, "group {n} after non-secure writes");
    }
}

#[test]
fn context_banks_of_the_secure_side_are_invisible() {
    let r = split();
    for n in [4u8, 5, 15] {
        r.ws(r.cbar(n), LINUX_CBAR);
        r.ws(r.cba2r(n), 1);
        r.ws(r.cbfrsynra(n), 0x1234);
        r.ws(r.cb(n, TTBR0), 0x4000_0000);
    }
    let view = |n| (r.r(r.cbar(n)), r.r(r.cba2r(n)), r.r(r.cbfrsynra(n)), r.rb(n, TTBR0));
    assert_eq!(view(4), (LINUX_CBAR, 1, 0x1234, 0x4000_0000));
    for n in [5, 15] {
        assert_eq!(view(n), (0, 0, 0, 0), "bank {n}");
        for reg in [r.cbar(n), r.cba2r(n), r.cbfrsynra(n), r.cb(n, TTBR0), r.cb(n, FSRRESTORE)] {
            r.w(reg, 0xffff_ffff);
        }
        assert_eq!(r.rb(n, FSR), 0, "not even FORMAT");
        assert_eq!((r.rs(r.cbar(n)), r.rs(r.cb(n, TTBR0))), (LINUX_CBAR, 0x4000_0000));
        assert_eq!(r.rs(r.cb(n, FSR)), 0x400);
    }
}

#[test]
fn ssd_index_is_for_secure_software_only() {
    let r = split();
    r.ws(r.cbfrsynra(0), 0x5555_1234);
    assert_eq!((r.r(r.cbfrsynra(0)), r.rs(r.cbfrsynra(0))), (0x1234, 0x5555_1234));
    r.w(r.cbfrsynra(0), 0xffff_0042);
    assert_eq!(r.rs(r.cbfrsynra(0)), 0x5555_0042, "a non-secure write leaves it alone");
    r.ws(0x454, 0x0001_0eef);
    assert_eq!((r.r(GFSYNR1), r.rs(0x454)), (0x0eef, 0x0001_0eef));
    r.w(GFSYNR1, 0xffff_0001);
    assert_eq!(r.rs(0x454), 0x0001_0001);
}

#[test]
fn gasrae_takes_the_global_space_away_but_not_the_banks() {
    let r = Rig::new(portcullis_smmuv2::Config {
        translation_ops: true,
        ..portcullis_smmuv2::Config::mmu500_zynqmp()
    });
    r.w(SMR, 0x8000_0001);
    r.w(r.cbar(0), LINUX_CBAR);
    r.w64(GPAR, 0x77);
    r.ws(SCR1, 0x0301_3010);
    for offset in [CR0, IDR0, IDR1, GFSR, SMR, S2CR, GPAR, r.cbar(0), 0x2204, 0xfe0] {
        assert_eq!(r.r(offset), 0, "{offset:#x}");
        r.w(offset, 0xffff_ffff);
    }
    // Operations are registers too.
    r.w64(GATS, 0x7000_0000);
    r.wb(0, TTBR0, 0x4000_0000);
    assert_eq!(r.rb(0, TTBR0), 0x4000_0000, "context banks stay");
    assert_eq!(r.rs(SMR), 0x8000_0001);
    r.ws(SCR1, 0x0201_3010);
    assert_eq!((r.r(CR0), r.r(SMR), r.r64(GPAR)), (0x0020_0001, 0x8000_0001, 0x77));
    assert_eq!(r.r(r.cbar(0)), LINUX_CBAR);
}

#[test]
fn a_secure_stream_matches_secure_groups_only() {
    let r = split();
    r.w(CR0, 0x0020_0402);
    r.ws(CR0, 0x0020_0402);
    // The same stream id in group 0 (non-secure) and 7 (secure), both bypassing.
    for n in [0, 7] {
        r.ws(S2CR + 4 * n, 0x0001_0000);
    }
    let mut p = r.port();
    r.ws(SMR, 0x8000_0042);
    assert_eq!(rd(&mut p, 0x42, DATA), Ok(DATA));
    assert_eq!(go(&mut p, secure(0x42), DATA, portcullis_arch::Access::Read), Err(ABORT));
    assert_eq!((r.rs(GFSR), r.rs(GFSYNR0), r.rs(GFSYNR1)), (2, 0, 0x42), "USF in the secure copy");
    assert_eq!(r.rs(0x448), 0, "and not in the other");
    r.ws(SMR, 0);
    r.ws(SMR + 4 * 7, 0x8000_0042);
    assert_eq!(go(&mut p, secure(0x42), DATA, portcullis_arch::Access::Read), Ok(DATA));
    assert_eq!(rd(&mut p, 0x42, DATA), Err(ABORT));
    assert_eq!(r.r(GFSR), 2);
}

#[test]
fn each_security_state_has_its_own_client_port_disable() {
    let r = split();
    r.w(CR0, 0x0020_0402);
    let mut p = r.port();
    assert_eq!(rd(&mut p, 1, DATA), Err(ABORT));
    assert_eq!(go(&mut p, secure(1), DATA, portcullis_arch::Access::Read), Ok(DATA));
    r.w(CR0, 0x0020_0403);
    r.ws(CR0, 0x0020_0402);
    assert_eq!(rd(&mut p, 1, DATA), Ok(DATA));
    assert_eq!(go(&mut p, secure(1), DATA, portcullis_arch::Access::Read), Err(ABORT));
}
