//! Sizes, alignments and halves of register accesses, and the secure aliases of the non-secure copies.

mod rig;

use portcullis_bus::Mmio;
use portcullis_smmuv2::Config;
use rig::*;

#[test]
fn a_64_bit_register_takes_one_access_or_two_halves() {
    let r = Rig::zynqmp();
    r.w(r.cbar(3), LINUX_CBAR);
    for reg in [TTBR0, TTBR1, PAR] {
        r.wb64(3, reg, 0x0123_4567_89ab_c000);
        assert_eq!((r.rb(3, reg), r.rb(3, reg + 4)), (0x89ab_c000, 0x0123_4567));
        r.wb(3, reg + 4, 0xfeed_beef);
        assert_eq!(r.rb64(3, reg), 0xfeed_beef_89ab_c000);
        r.wb(3, reg, 0x1111_2000);
        assert_eq!(r.rb64(3, reg), 0xfeed_beef_1111_2000);
    }
    // FAR and GFAR keep the 49 bits of the bus.
    r.wb64(3, FAR, u64::MAX);
    assert_eq!(r.rb64(3, FAR), 0x0001_ffff_ffff_ffff);
    r.w64(GFAR, u64::MAX);
    assert_eq!(r.r64(GFAR), 0x0001_ffff_ffff_ffff);
}

#[test]
fn a_64_bit_access_to_two_32_bit_registers_reaches_both() {
    let r = Rig::zynqmp();
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb64(0, MAIR0, 0xaaaa_bbbb_cccc_dddd);
    assert_eq!((r.rb(0, MAIR0), r.rb(0, MAIR1)), (0xcccc_dddd, 0xaaaa_bbbb));
    assert_eq!(r.r64(SMR), 0);
    r.w64(SMR, 0x8000_0002_8000_0001);
    assert_eq!((r.r(SMR), r.r(SMR + 4)), (0x8000_0001, 0x8000_0002));
    assert_eq!(r.r64(IDR0), 0x3000_0010_7c01_3e30);
}

#[test]
fn misaligned_and_odd_sizes_read_zero_and_write_nothing() {
    let r = Rig::zynqmp();
    r.w(SMR, 0x8000_1234);
    for (offset, len) in [
        (SMR, 0),
        (SMR, 1),
        (SMR, 2),
        (SMR, 3),
        (SMR, 5),
        (SMR, 16),
        (SMR + 1, 1),
        (SMR + 2, 2),
        (SMR + 2, 4),
        (SMR + 4, 8),
        (SMR - 4, 8),
        (SMR, 4096),
    ] {
        let mut b = vec![0xee; len];
        r.ns.mmio_read(offset, &mut b).unwrap();
        assert!(b.iter().all(|v| *v == 0), "{len} bytes at {offset:#x}");
        r.ns.mmio_write(offset, &vec![0xff; len]).unwrap();
        assert_eq!((r.r(SMR - 4), r.r(SMR), r.r(SMR + 4), r.r(SMR + 8)), (0, 0x8000_1234, 0, 0));
    }
}

#[test]
fn secure_software_finds_the_non_secure_copies_400_further_on() {
    let r = Rig::zynqmp();
    // Plain offset, value, what the register keeps.
    for (offset, value, kept) in [
        (CR0, 0x0020_0c06, 0x0020_0c06),
        (CR2, 0x55, 0x55),
        (ACR, 0x0000_051c, 0x0000_051c),
        (GFAR, 0x7000_2000, 0x7000_2000),
        (GFSYNR0, 0x0e, 0x0e),
        (GFSYNR1, 0x14e8, 0x14e8),
        (GFSYNR2, 0x77, 0x77),
    ] {
        let secure_before = r.rs(offset);
        r.w(offset, value);
        assert_eq!((r.r(offset), r.rs(0x400 + offset)), (kept, kept), "{offset:#x}");
        assert_eq!(r.rs(offset), secure_before, "the secure copy of {offset:#x} is another");
        r.ws(0x400 + offset, 0);
        r.ws(offset, value);
        assert_ne!(r.r(offset), kept, "{offset:#x} through the alias");
    }
    // GFSR by restore and by clearing.
    r.ws(0x44c, 0x8000_0002);
    assert_eq!((r.r(GFSR), r.rs(0x448), r.rs(GFSR)), (0x8000_0002, 0x8000_0002, 0));
    r.ws(0x448, 0x8000_0000);
    assert_eq!(r.r(GFSR), 2);
}

#[test]
fn identification_and_invalidation_registers_have_no_alias() {
    let r = Rig::zynqmp();
    for offset in [0x404, 0x420, 0x424, 0x428, 0x43c, 0x460, 0x464, 0x468, 0x46c, 0x478, 0x480, 0x49c] {
        r.ws(offset, 0xffff_ffff);
        assert_eq!(r.rs(offset), 0, "{offset:#x}");
    }
}

#[test]
fn non_secure_software_does_not_see_the_aliases() {
    let r = Rig::zynqmp();
    for offset in (0x400..0x800).step_by(4) {
        r.w(offset, 0xffff_ffff);
        assert_eq!(r.r(offset), 0, "{offset:#x}");
    }
    assert_eq!(r.r(CR0), 0x0020_0001);
    assert_eq!(r.r(GFSR), 0);
}

#[test]
fn an_smmu_without_security_has_one_set_of_registers() {
    let r = Rig::new(Config::default());
    r.ws(CR0, 0);
    assert_eq!((r.r(CR0), r.rs(CR0)), (0, 0));
    for offset in [SCR1, 0x400, 0x448] {
        r.ws(offset, 0xffff_ffff);
        assert_eq!((r.rs(offset), r.r(offset)), (0, 0), "{offset:#x}");
    }
    assert_eq!(r.rs(IDR0) >> 31, 0, "SES");
}

#[test]
fn write_only_registers_read_zero() {
    let r = Rig::zynqmp();
    for offset in
        [GFSRRESTORE, TLBIVMID, TLBIALLNSNH, TLBIALLH, TLBGSYNC, TLBIVAH, TLBIVALH64, TLBIVMIDS1, TLBIVAH64]
    {
        r.w(offset, 0);
        assert_eq!(r.r(offset), 0, "{offset:#x}");
    }
    r.w(r.cbar(0), LINUX_CBAR);
    for reg in [RESUME, FSRRESTORE, TLBIVA, TLBIVAA, TLBIASID, TLBIALL, TLBIVAL, TLBIVAAL, TLBSYNC] {
        r.wb(0, reg, 0);
        assert_eq!(r.rb(0, reg), 0, "{reg:#x}");
    }
}

#[test]
fn gfsr_restore_replaces_the_whole_value_and_drives_the_interrupt() {
    let r = Rig::zynqmp();
    r.w(CR0, 0x0020_0004); // GFIE
    r.w(GFSRRESTORE, 0xffff_ffff);
    assert_eq!(r.r(GFSR), 0x8000_01ff, "the bits that exist");
    assert!(r.irqs.level(GLOBAL_NS));
    r.w(GFSRRESTORE, 0x20);
    assert_eq!(r.r(GFSR), 0x20);
    assert!(!r.irqs.level(GLOBAL_NS), "a configuration access fault is not a global fault");
    r.w(GFSRRESTORE, 0x8000_0000);
    assert!(r.irqs.level(GLOBAL_NS), "MULTI counts");
    r.w(GFSR, 0x8000_0000);
    assert!(!r.irqs.level(GLOBAL_NS));
}

#[test]
fn an_aligned_64_bit_write_is_never_seen_torn() {
    let r = Rig::zynqmp();
    r.w(r.cbar(0), LINUX_CBAR);
    let at = r.cb(0, TTBR0);
    let torn = std::thread::scope(|s| {
        let writer = s.spawn(|| {
            for i in 0..20_000u32 {
                let v = u64::from(i) << 32 | u64::from(i);
                r.ns.write64(at, v).unwrap();
            }
        });
        let mut torn = 0;
        while !writer.is_finished() {
            let v = r.r64(at);
            torn += u32::from((v >> 32) as u32 != v as u32);
        }
        torn
    });
    assert_eq!(torn, 0);
}
