//! Fields of a context bank's registers (IHI 0062D chapters 16 and 17).

use bitfield_struct::bitfield;

/// SCTLR. Bits 9, 10, 12, 28 to 30 are for stage 1; bit 13 is PTW at stage 2 only, where 15:14 are BSU.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Sctlr {
    /// Translate (0: flat mapping).
    pub m: bool,
    /// TEX remap (AArch32 short).
    pub tre: bool,
    /// Access flag enable (AArch32 short).
    pub afe: bool,
    /// No access flag faults.
    pub affd: bool,
    /// Table walks are big-endian.
    pub e: bool,
    /// Faults are reported to the client as aborts.
    pub cfre: bool,
    /// Fault interrupt enable.
    pub cfie: bool,
    /// Faults: 0 terminate, 1 stall.
    pub cfcfg: bool,
    /// Keep processing transactions after a fault.
    pub hupcf: bool,
    /// Writable memory is execute never.
    pub wxn: bool,
    /// Memory writable by unprivileged accesses is execute never for privileged ones.
    pub uwxn: bool,
    __: bool,
    /// Private ASID namespace.
    pub asidpne: bool,
    /// Stage 2: stage 1 walks that hit Device memory are permission faults.
    pub ptw: bool,
    /// Transient hint (stage 1), BSU (stage 2).
    #[bits(2)]
    pub transientcfg: u8,
    /// Memory type while M = 0.
    #[bits(4)]
    pub memattr: u8,
    /// Use MemAttr (stage 1).
    pub mtcfg: bool,
    __: bool,
    /// Shareability while M = 0: 0 default, 1 outer, 2 inner, 3 non.
    #[bits(2)]
    pub shcfg: u8,
    /// Read allocation while M = 0.
    #[bits(2)]
    pub racfg: u8,
    /// Write allocation while M = 0.
    #[bits(2)]
    pub wacfg: u8,
    /// Security while M = 0 (secure banks).
    #[bits(2)]
    pub nscfg: u8,
    /// EL0 cache maintenance passes.
    pub uci: bool,
    __: bool,
}

/// TCR of a stage 1 AArch64 bank.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TcrS1 {
    /// TTBR0 region is 2^(64-T0SZ).
    #[bits(6)]
    pub t0sz: u8,
    __: bool,
    /// TTBR0 walks disabled.
    pub epd0: bool,
    /// Inner cacheability of TTBR0 walks.
    #[bits(2)]
    pub irgn0: u8,
    /// Outer cacheability of TTBR0 walks.
    #[bits(2)]
    pub orgn0: u8,
    /// Shareability of TTBR0 walks.
    #[bits(2)]
    pub sh0: u8,
    /// Granule of TTBR0: 0 4K, 1 64K, 2 16K.
    #[bits(2)]
    pub tg0: u8,
    /// TTBR1 region is 2^(64-T1SZ).
    #[bits(6)]
    pub t1sz: u8,
    /// ASID comes from TTBR1.
    pub a1: bool,
    /// TTBR1 walks disabled.
    pub epd1: bool,
    /// Inner cacheability of TTBR1 walks.
    #[bits(2)]
    pub irgn1: u8,
    /// Outer cacheability of TTBR1 walks.
    #[bits(2)]
    pub orgn1: u8,
    /// Shareability of TTBR1 walks.
    #[bits(2)]
    pub sh1: u8,
    /// Granule of TTBR1: 1 16K, 2 4K, 3 64K.
    #[bits(2)]
    pub tg1: u8,
}

/// TCR of a stage 1 AArch32 bank: the long format (EAE = 1). For EAE = 0, bits 2:0 are T0SZ, 4 PD0, 5 PD1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TcrS1Long {
    /// TTBR0 region is 2^(32-T0SZ).
    #[bits(3)]
    pub t0sz: u8,
    __: bool,
    /// Short format: TTBR0 walks disabled.
    pub pd0: bool,
    /// Short format: TTBR1 walks disabled.
    pub pd1: bool,
    __: bool,
    /// TTBR0 walks disabled.
    pub epd0: bool,
    /// Inner cacheability of TTBR0 walks.
    #[bits(2)]
    pub irgn0: u8,
    /// Outer cacheability of TTBR0 walks.
    #[bits(2)]
    pub orgn0: u8,
    /// Shareability of TTBR0 walks.
    #[bits(2)]
    pub sh0: u8,
    /// Security of TTBR0 walks.
    pub nscfg0: bool,
    __: bool,
    /// TTBR1 region is 2^(32-T1SZ).
    #[bits(3)]
    pub t1sz: u8,
    #[bits(3)]
    __: u8,
    /// ASID comes from TTBR1.
    pub a1: bool,
    /// TTBR1 walks disabled.
    pub epd1: bool,
    /// Inner cacheability of TTBR1 walks.
    #[bits(2)]
    pub irgn1: u8,
    /// Outer cacheability of TTBR1 walks.
    #[bits(2)]
    pub orgn1: u8,
    /// Shareability of TTBR1 walks.
    #[bits(2)]
    pub sh1: u8,
    /// Security of TTBR1 walks.
    pub nscfg1: bool,
    /// Long descriptors.
    pub eae: bool,
}

/// TCR of a stage 2 AArch64 bank (VTCR).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TcrS2 {
    /// Region is 2^(64-T0SZ).
    #[bits(6)]
    pub t0sz: u8,
    /// Start level; meaning depends on the granule.
    #[bits(2)]
    pub sl0: u8,
    /// Inner cacheability of walks.
    #[bits(2)]
    pub irgn0: u8,
    /// Outer cacheability of walks.
    #[bits(2)]
    pub orgn0: u8,
    /// Shareability of walks.
    #[bits(2)]
    pub sh0: u8,
    /// Granule: 0 4K, 1 64K, 2 16K.
    #[bits(2)]
    pub tg0: u8,
    /// Output size code.
    #[bits(3)]
    pub pasize: u8,
    #[bits(2)]
    __: u8,
    /// Hardware access flag update (HAFDBS).
    pub ha: bool,
    /// Hardware dirty update (HAFDBS).
    pub hd: bool,
    #[bits(9)]
    __: u16,
}

/// TCR of a stage 2 AArch32 bank.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TcrS2Aarch32 {
    /// Region is 2^(32-T0SZ), T0SZ signed, -8 to 7.
    #[bits(4)]
    pub t0sz: u8,
    /// Copy of bit 3.
    pub s: bool,
    __: bool,
    /// Start level: 0 level 2, 1 level 1.
    #[bits(2)]
    pub sl0: u8,
    /// Inner cacheability of walks.
    #[bits(2)]
    pub irgn0: u8,
    /// Outer cacheability of walks.
    #[bits(2)]
    pub orgn0: u8,
    /// Shareability of walks.
    #[bits(2)]
    pub sh0: u8,
    #[bits(17)]
    __: u32,
    /// Reads as one.
    pub eae: bool,
}

/// TCR2 (stage 1).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Tcr2 {
    /// Output size code.
    #[bits(3)]
    pub pasize: u8,
    __: bool,
    /// 16-bit ASIDs.
    pub as16: bool,
    /// Top byte ignored for TTBR0 (translation operations only).
    pub tbi0: bool,
    /// Top byte ignored for TTBR1 (translation operations only).
    pub tbi1: bool,
    __: bool,
    /// Hierarchical attributes disabled for TTBR0.
    pub had0: bool,
    /// Hierarchical attributes disabled for TTBR1.
    pub had1: bool,
    /// Hardware access flag update.
    pub ha: bool,
    /// Hardware dirty update.
    pub hd: bool,
    #[bits(2)]
    __: u8,
    /// Security of TTBR0 walks (AArch64).
    pub nscfg0: bool,
    /// Sign extension position: 0 bit 31, 1 35, 2 39, 3 41, 4 43, 5 47, 6 and 7 the upstream size.
    #[bits(3)]
    pub sep: u8,
    #[bits(12)]
    __: u16,
    /// Security of TTBR1 walks (AArch64).
    pub nscfg1: bool,
    __: bool,
}

/// FSR: context fault status. Bits 1 to 8 and 31 are write one to clear.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Fsr {
    __: bool,
    /// Translation.
    pub tf: bool,
    /// Access flag.
    pub aff: bool,
    /// Permission.
    pub pf: bool,
    /// External abort.
    pub ef: bool,
    /// TLB match conflict.
    pub tlbmcf: bool,
    /// TLB lock.
    pub tlblkf: bool,
    /// Address size.
    pub asf: bool,
    /// Unsupported upstream transaction.
    pub uut: bool,
    /// Translation scheme: 0 AArch32 short, 1 AArch32 long, 2 AArch64.
    #[bits(2)]
    pub format: u8,
    #[bits(19)]
    __: u32,
    /// A transaction is stalled.
    pub ss: bool,
    /// Another fault while one was recorded.
    pub multi: bool,
}

impl Fsr {
    /// The write-one-to-clear bits.
    pub const W1C: u32 = 0x8000_01fe;
}

/// FSYNR0: fault syndrome. Bits 2, 3, 9 and 23:16 are for stage 2 banks.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Fsynr0 {
    /// Level of the fault.
    #[bits(2)]
    pub plvl: u8,
    /// Stage 1 followed by stage 2.
    pub nested: bool,
    /// On the stage 2 translation of a stage 1 table access.
    pub s1ptwf: bool,
    /// A write.
    pub wnr: bool,
    /// Privileged, after overrides.
    pub pnu: bool,
    /// Instruction, after overrides.
    pub ind: bool,
    __: bool,
    /// Non-secure, after overrides.
    pub nsattr: bool,
    /// From an address translation operation.
    pub atof: bool,
    /// External abort on a table walk.
    pub ptwf: bool,
    /// Recorded asynchronously.
    pub afr: bool,
    #[bits(4)]
    __: u8,
    /// Stage 1 bank of a nested fault.
    pub s1cbndx: u8,
    __: u8,
}

/// Operand of the global address translation operations GATS*.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct AtsOperand {
    /// Context bank.
    pub ndx: u8,
    #[bits(4)]
    __: u8,
    /// Address bits 63:12.
    #[bits(52)]
    pub page: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smmuv2::{Cba2r, Cbar, Cr0, Gfsr, Gfsynr0, Idr0, Idr1, Idr2, S2cr, Smr};

    #[test]
    fn values_linux_writes_decode_as_linux_means_them() {
        // SCTLR for a stage 1 domain: CFIE|CFRE|AFE|TRE|M|ASIDPNE.
        let s = Sctlr::new().with_cfie(true).with_cfre(true).with_afe(true).with_tre(true).with_m(true);
        assert_eq!(s.with_asidpne(true).into_bits(), 0x1067);
        assert_eq!(s.into_bits(), 0x67);
        // TCR for 4K, 48 bits, non-coherent and coherent walks.
        let t = TcrS1::new().with_t0sz(16).with_epd1(true);
        assert_eq!(t.with_sh0(2).into_bits(), 0x0080_2010);
        assert_eq!(t.with_sh0(3).with_irgn0(1).with_orgn0(1).into_bits(), 0x0080_3510);
        assert_eq!(Tcr2::new().with_pasize(5).with_sep(7).with_as16(true).into_bits(), 0x0003_8015);
        // CR0 after Linux's reset of an MMU-500 that started as 0x200001.
        let c = Cr0::from_bits(0x0020_1c36);
        assert!(c.gfre() && c.gfie() && c.gcfgfre() && c.gcfgfie() && c.usfcfg() && c.vmidpne() && c.ptm());
        assert!(!c.clientpd() && c.smcfcfg());
        // fsr=0x402, fsynr=0x11: translation fault, AArch64, a write, level 1.
        let (fsr, syn) = (Fsr::from_bits(0x402), Fsynr0::from_bits(0x11));
        assert!(fsr.tf() && fsr.format() == 2 && syn.wnr() && syn.plvl() == 1);
        assert_eq!(Gfsr::from_bits(0x8000_0002), Gfsr::new().with_multi(true).with_usf(true));
        assert!(Gfsynr0::from_bits(4).pnu());
    }

    #[test]
    fn fields_sit_where_the_architecture_puts_them() {
        assert_eq!(Smr::new().with_valid(true).with_mask(0x7fff).with_id(0x7fff).into_bits(), 0xffff_7fff);
        let s = S2cr::new().with_cbndx(0xff).with_type_code(3).with_privcfg(3).with_instcfg(3);
        assert_eq!(s.into_bits(), 0x0f03_00ff);
        let s = S2cr::new().with_memattr(0xf).with_mtcfg(true).with_exidvalid(true).with_shcfg(3);
        assert_eq!(s.into_bits(), 0x0000_ff00);
        let s = S2cr::new().with_nscfg(3).with_racfg(3).with_wacfg(3).with_transientcfg(3);
        assert_eq!(s.into_bits(), 0x30fc_0000);
        assert_eq!(Cbar::new().with_type_code(1).with_bpshcfg(3).with_memattr(0xf).into_bits(), 0x0001_f300);
        assert_eq!(Cbar::new().with_type_code(3).with_s2_cbndx(0x12).with_vmid(5).into_bits(), 0x0003_1205);
        assert_eq!(Cba2r::new().with_va64(true).with_vmid16(0xabcd).into_bits(), 0xabcd_0001);
        assert_eq!(Fsynr0::new().with_s1cbndx(0xff).with_atof(true).with_ptwf(true).into_bits(), 0x00ff_0600);
        assert_eq!(
            Fsr::new().with_ss(true).with_multi(true).with_uut(true).with_asf(true).into_bits(),
            0xc000_0180
        );
        assert_eq!(
            TcrS2::new().with_pasize(5).with_tg0(1).with_sl0(1).with_t0sz(24).into_bits(),
            0x0005_4058
        );
        assert_eq!(TcrS1Long::new().with_eae(true).with_t1sz(7).with_epd1(true).into_bits(), 0x8087_0000);
    }

    #[test]
    fn identification_of_the_zynqmp_decodes() {
        let (i0, i1, i2) =
            (Idr0::from_bits(0xfc01_3e30), Idr1::from_bits(0x3000_0f10), Idr2::from_bits(0x5555));
        assert!(i0.ses() && i0.s1ts() && i0.s2ts() && i0.nts() && i0.sms() && i0.atosns() && i0.btm());
        assert!(
            !i0.cttw() && i0.numsidb() == 15 && i0.numsmrg() == 48 && i0.numirpt() == 1 && i0.ptfs() == 0
        );
        assert_eq!((i1.numpagendxb(), i1.numssdndxb(), i1.numcb(), i1.pagesize()), (3, 15, 16, false));
        assert_eq!((i2.ias(), i2.oas(), i2.ubs()), (5, 5, 5));
        assert!(i2.ptfsv8_4k() && !i2.ptfsv8_16k() && i2.ptfsv8_64k());
    }
}
