//! Registers that exist in one format of a bank only, fields that change with the format, ACTLR and its lock.

mod rig;

use portcullis_smmuv2::{Aarch32, Config, Granules};
use rig::*;

const STAGE1_ONLY: [u64; 6] = [TCR2, TTBR1, CONTEXTIDR, MAIR0, MAIR1, PAR];

#[test]
fn a_stage_2_bank_has_no_stage_1_registers() {
    let r = Rig::zynqmp();
    r.w(r.cbar(2), LINUX_CBAR);
    for reg in STAGE1_ONLY {
        r.wb(2, reg, 0x0000_4005);
    }
    let before: Vec<u32> = STAGE1_ONLY.iter().map(|reg| r.rb(2, *reg)).collect();
    assert!(before.iter().all(|v| *v != 0));
    r.w(r.cbar(2), 0);
    for reg in STAGE1_ONLY {
        assert_eq!(r.rb(2, reg), 0, "{reg:#x} reads zero");
        r.wb(2, reg, 0xffff_ffff);
    }
    r.w(r.cbar(2), LINUX_CBAR);
    let after: Vec<u32> = STAGE1_ONLY.iter().map(|reg| r.rb(2, *reg)).collect();
    assert_eq!(before, after, "and writes were ignored");
}

#[test]
fn ipafar_is_a_register_of_stage_2_banks() {
    let r = Rig::zynqmp();
    r.w(r.cbar(2), 0);
    r.wb64(2, IPAFAR, 0x1234_5678_9fff);
    assert_eq!(r.rb64(2, IPAFAR), 0x1234_5678_9000, "its low twelve bits are zero");
    r.w(r.cbar(2), LINUX_CBAR);
    assert_eq!(r.rb64(2, IPAFAR), 0);
    r.wb64(2, IPAFAR, 0x7777_7000);
    r.w(r.cbar(2), 0);
    assert_eq!(r.rb64(2, IPAFAR), 0x1234_5678_9000);
}

#[test]
fn ipafar_is_far_where_nesting_is_not_implemented() {
    let r = Rig::new(Config { nested: false, ..Config::default() });
    r.w(r.cbar(0), 0);
    r.wb64(0, FAR, 0x1234_5678);
    assert_eq!(r.rb64(0, IPAFAR), 0x1234_5678);
    r.wb64(0, IPAFAR, 0x9999_9000);
    assert_eq!(r.rb64(0, FAR), 0x1234_5678, "and read only");
    r.wb(0, FSYNR0, 0xffff_ffff);
    assert_eq!(r.rb(0, FSYNR0) & 0x4, 0, "FSYNR0.NESTED does not exist");
}

#[test]
fn registers_with_two_formats_keep_the_bits_of_the_other() {
    let r = Rig::zynqmp();
    // CBAR: stage 1 with memory attributes and hints, then type 2, then back.
    r.w(r.cbar(1), 0x00f5_f7aa);
    r.w(r.cbar(1), 0x00f6_f7aa);
    assert_eq!(r.r(r.cbar(1)), 0x00f6_f7aa);
    // S2CR: fields of a translating stream survive in a faulting one.
    r.w(S2CR, 0x3ffe_fbff);
    assert_eq!(r.r(S2CR), 0x3ffe_fbff);
    // TCR and TTBR: the same bits under AArch32 short, long and AArch64.
    r.w(r.cbar(1), LINUX_CBAR);
    for va64 in [1, 0] {
        r.w(r.cba2r(1), va64);
        r.wb(1, TCR, 0x7fff_ffff);
        r.wb64(1, TTBR0, u64::MAX);
        r.w(r.cba2r(1), 1 - va64);
        assert_eq!((r.rb(1, TCR), r.rb64(1, TTBR0)), (0x7fff_ffff, u64::MAX));
    }
}

#[test]
fn reserved_encodings_read_back_as_written() {
    let r = Rig::zynqmp();
    // S2CR: TYPE 3, NSCFG 1, RACFG 1, WACFG 1, PRIVCFG 1, INSTCFG 1, TRANSIENTCFG 1, MemAttr 4, MTCFG.
    r.w(S2CR, 0x1557_4800);
    assert_eq!(r.r(S2CR), 0x1557_4800);
    r.w(r.cbar(0), LINUX_CBAR);
    // TCR with SH0 1 and TG0 3; TCR2 with PASize 7 and SEP 6.
    r.wb(0, TCR, 0x0000_d010);
    r.wb(0, TCR2, 0x0003_0017);
    assert_eq!((r.rb(0, TCR), r.rb(0, TCR2)), (0x0000_d010, 0x0003_0077));
}

#[test]
fn sctlr_has_the_fields_of_its_stage() {
    // MMU-500: ASIDPNE is fixed at 0, FB is there at both stages.
    let r = Rig::zynqmp();
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb(0, SCTLR, 0xffff_ffff);
    assert_eq!(r.rb(0, SCTLR), 0x7fff_c7ff);
    r.w(r.cbar(0), 0);
    assert_eq!(r.rb(0, SCTLR), 0x0fef_c1ff, "PTW was not in the stage 1 format");
    r.wb(0, SCTLR, 0xffff_ffff);
    assert_eq!(r.rb(0, SCTLR), 0x0fef_e1ff);
    // The plain architecture.
    let r = Rig::new(Config::default());
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb(0, SCTLR, 0xffff_ffff);
    assert_eq!(r.rb(0, SCTLR), 0x7fdf_d7ff);
}

#[test]
fn tcr2_keeps_tbi_on_an_mmu_500_and_has_no_hardware_update() {
    let r = Rig::zynqmp();
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb(0, TCR2, 0);
    assert_eq!(r.rb(0, TCR2), 0x60);
    r.wb(0, TCR2, 0xffff_ffff);
    assert_eq!(r.rb(0, TCR2), 0x4003_c077, "no HAD, HA, HD: IDR2.HADS and IDR1.HAFDBS are 0");
    let r = Rig::new(Config::default());
    r.w(r.cbar(0), LINUX_CBAR);
    r.wb(0, TCR2, 0xffff_ffff);
    assert_eq!(r.rb(0, TCR2), 0x4003_c377, "HAD with IDR2.HADS");
    r.wb(0, TCR2, 0);
    assert_eq!(r.rb(0, TCR2), 0);
}

#[test]
fn eae_reads_one_in_an_aarch32_stage_2_bank() {
    let r = Rig::zynqmp();
    r.w(r.cbar(0), 0);
    r.wb(0, TCR, 0x40);
    assert_eq!(r.rb(0, TCR), 0x8000_0040);
    r.w(r.cba2r(0), 1);
    assert_eq!(r.rb(0, TCR), 0x40);
}

#[test]
fn fsr_format_follows_the_bank() {
    let r = Rig::zynqmp();
    let format = |cbar, cba2r, tcr| {
        r.w(r.cbar(0), cbar);
        r.w(r.cba2r(0), cba2r);
        r.wb(0, TCR, tcr);
        r.rb(0, FSR)
    };
    assert_eq!(format(LINUX_CBAR, 1, 0), 0x400, "AArch64");
    assert_eq!(format(LINUX_CBAR, 0, 0), 0x000, "AArch32 short");
    assert_eq!(format(LINUX_CBAR, 0, 0x8000_0000), 0x200, "AArch32 long");
    assert_eq!(format(0, 0, 0), 0x200, "stage 2 AArch32");
    assert_eq!(format(0, 1, 0), 0x400, "stage 2 AArch64");
    let r = Rig::new(Config { aarch32: Aarch32::LongOnly, ..Config::default() });
    r.w(r.cbar(0), LINUX_CBAR);
    assert_eq!(r.rb(0, FSR), 0x200, "there is no short format");
}

#[test]
fn va64_is_fixed_where_there_is_one_kind_of_format() {
    let only64 = Rig::new(Config { aarch32: Aarch32::None, ..Config::default() });
    assert_eq!(only64.r(only64.cba2r(0)), 1, "after reset");
    only64.w(only64.cba2r(0), 0);
    assert_eq!(only64.r(only64.cba2r(0)), 1);
    let granules = Granules { k4: false, k16: false, k64: false };
    let only32 = Rig::new(Config { granules, ..Config::default() });
    only32.w(only32.cba2r(0), 1);
    assert_eq!(only32.r(only32.cba2r(0)), 0);
    let both = Rig::new(Config::default());
    assert_eq!(both.r(both.cba2r(0)), 0, "resets to AArch32");
}

#[test]
fn cba2r_has_vmid16_only_with_16_bit_vmids() {
    let r = Rig::zynqmp();
    r.w(r.cba2r(0), 0xabcd_0001);
    assert_eq!(r.r(r.cba2r(0)), 1);
    let r = Rig::new(Config::default());
    r.w(r.cba2r(0), 0xabcd_0003);
    assert_eq!(r.r(r.cba2r(0)), 0xabcd_0001, "and MONC only with two security states");
}

/// CACHE_LOCK in the ACR copy of a bank's security state makes its ACTLR read only.
#[test]
fn actlr_is_locked_by_the_acr_of_its_security_state() {
    let r = Rig::zynqmp();
    r.ws(SCR1, 0x0201_3008); // banks 8 and up are secure
    let (mine, theirs) = (r.cb(0, ACTLR), r.cb(8, ACTLR));
    r.w(mine, 1);
    r.ws(mine, 1);
    r.ws(theirs, 1);
    assert_eq!((r.r(mine), r.rs(theirs)), (3, 3), "both locked after reset");
    r.w(ACR, 0x0000_001c);
    r.w(mine, 1);
    r.ws(theirs, 1);
    assert_eq!((r.r(mine), r.rs(theirs)), (1, 3));
    r.w(ACR, 0x0400_001c);
    r.w(mine, 0);
    assert_eq!(r.r(mine), 1, "locked again");
    r.ws(ACR, 0);
    r.ws(theirs, 0xffff_fff0);
    r.ws(mine, 0);
    assert_eq!((r.r(mine), r.rs(theirs)), (1, 0), "only two bits, and the other lock does not count");
}

/// What Linux does first on an MMU-500: unlock, allow caching of unmatched and bypassing streams, prefetch off.
#[test]
fn linux_turns_the_prefetcher_off() {
    let r = Rig::zynqmp();
    assert_eq!(r.r(0x3c) >> 4, 2, "major revision");
    let acr = r.r(ACR);
    r.w(ACR, acr & !(1 << 26) | 1 << 8 | 1 << 10);
    assert_eq!(r.r(ACR), 0x0000_051c);
    for bank in 0..16 {
        let actlr = r.rb(bank, ACTLR);
        r.wb(bank, ACTLR, actlr & !2);
        assert_eq!(r.rb(bank, ACTLR), 1, "bank {bank}");
    }
}
