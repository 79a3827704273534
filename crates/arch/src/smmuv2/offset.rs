//! Where the registers are. Offsets are bytes from the start of their space: global space 0 ([`gr0`]), global
//! space 1 ([`gr1`]) or a context bank's page ([`cb`]). Page `n` of an SMMU starts at `n << page_shift`; the
//! context banks follow the `NUMPAGE` global pages (IHI 0062D chapters 9 to 17).

/// Global space 0.
pub mod gr0 {
    /// Control, banked by security state.
    pub const CR0: usize = 0x000;
    /// Secure control 1 (secure only).
    pub const SCR1: usize = 0x004;
    /// Control 2.
    pub const CR2: usize = 0x008;
    /// Auxiliary control (implementation defined).
    pub const ACR: usize = 0x010;
    /// Identification 0 to 7, 4 bytes each.
    pub const IDR0: usize = 0x020;
    /// Identification 1.
    pub const IDR1: usize = 0x024;
    /// Identification 2.
    pub const IDR2: usize = 0x028;
    /// Identification 7: implementation revision.
    pub const IDR7: usize = 0x03c;
    /// Global fault address (64 bits).
    pub const GFAR: usize = 0x040;
    /// Global fault status.
    pub const GFSR: usize = 0x048;
    /// Global fault status restore.
    pub const GFSRRESTORE: usize = 0x04c;
    /// Global fault syndrome 0.
    pub const GFSYNR0: usize = 0x050;
    /// Global fault syndrome 1.
    pub const GFSYNR1: usize = 0x054;
    /// Global fault syndrome 2.
    pub const GFSYNR2: usize = 0x058;
    /// Invalidate all secure entries (secure only).
    pub const STLBIALL: usize = 0x060;
    /// Invalidate by VMID.
    pub const TLBIVMID: usize = 0x064;
    /// Invalidate all non-secure non-hyp entries.
    pub const TLBIALLNSNH: usize = 0x068;
    /// Invalidate all hyp entries.
    pub const TLBIALLH: usize = 0x06c;
    /// Start a global synchronisation.
    pub const TLBGSYNC: usize = 0x070;
    /// Global synchronisation status.
    pub const TLBGSTATUS: usize = 0x074;
    /// Invalidate hyp by VA (AArch32).
    pub const TLBIVAH: usize = 0x078;
    /// Invalidate monitor by VA, last level (secure only, 64 bits).
    pub const STLBIVALM: usize = 0x0a0;
    /// Invalidate monitor by VA (secure only, 64 bits).
    pub const STLBIVAM: usize = 0x0a8;
    /// Invalidate hyp by VA, last level (64 bits).
    pub const TLBIVALH64: usize = 0x0b0;
    /// Invalidate stage 1 and combined entries of a VMID.
    pub const TLBIVMIDS1: usize = 0x0b8;
    /// Invalidate all monitor entries (secure only).
    pub const STLBIALLM: usize = 0x0bc;
    /// Invalidate hyp by VA (64 bits).
    pub const TLBIVAH64: usize = 0x0c0;
    /// First of the eight global address translation operations (64 bits each): 1UR, 1UW, 1PR, 1PW, 12UR, 12UW,
    /// 12PR, 12PW.
    pub const GATS1UR: usize = 0x100;
    /// Last of the eight: stages 1 and 2, privileged write.
    pub const GATS12PW: usize = 0x138;
    /// Result of a global address translation operation (64 bits).
    pub const GPAR: usize = 0x180;
    /// Status of global address translation operations.
    pub const GATSR: usize = 0x188;
    /// Where secure software finds the non-secure copies: their offset plus this.
    pub const NS_ALIAS: usize = 0x400;
    /// Stream match register 0; the others follow every 4 bytes.
    pub const SMR: usize = 0x800;
    /// Stream to context register 0; the others follow every 4 bytes.
    pub const S2CR: usize = 0xc00;
    /// Peripheral identification 4 to 7, then 0 to 3 (Arm IP).
    pub const PIDR4: usize = 0xfd0;
    /// Component identification 0 to 3.
    pub const CIDR0: usize = 0xff0;
}

/// Global space 1.
pub mod gr1 {
    /// Context bank attribute register 0; the others follow every 4 bytes.
    pub const CBAR: usize = 0x000;
    /// Context bank fault restricted syndrome A, register 0.
    pub const CBFRSYNRA: usize = 0x400;
    /// Context bank attribute register 2, register 0.
    pub const CBA2R: usize = 0x800;
}

/// A context bank.
pub mod cb {
    /// System control.
    pub const SCTLR: usize = 0x000;
    /// Auxiliary control (implementation defined).
    pub const ACTLR: usize = 0x004;
    /// Resume a stalled transaction.
    pub const RESUME: usize = 0x008;
    /// Translation control 2 (stage 1).
    pub const TCR2: usize = 0x010;
    /// Translation table base 0 (64 bits).
    pub const TTBR0: usize = 0x020;
    /// Translation table base 1 (64 bits, stage 1).
    pub const TTBR1: usize = 0x028;
    /// Translation control.
    pub const TCR: usize = 0x030;
    /// Context identification (stage 1).
    pub const CONTEXTIDR: usize = 0x034;
    /// Memory attributes 0, or PRRR (stage 1).
    pub const MAIR0: usize = 0x038;
    /// Memory attributes 1, or NMRR (stage 1).
    pub const MAIR1: usize = 0x03c;
    /// Result of an address translation operation (64 bits, stage 1).
    pub const PAR: usize = 0x050;
    /// Fault status.
    pub const FSR: usize = 0x058;
    /// Fault status restore.
    pub const FSRRESTORE: usize = 0x05c;
    /// Fault address (64 bits).
    pub const FAR: usize = 0x060;
    /// Fault syndrome 0.
    pub const FSYNR0: usize = 0x068;
    /// Fault syndrome 1 (implementation defined).
    pub const FSYNR1: usize = 0x06c;
    /// IPA fault address (64 bits, stage 2).
    pub const IPAFAR: usize = 0x070;
    /// Invalidate by VA (64 bits).
    pub const TLBIVA: usize = 0x600;
    /// Invalidate by VA, any ASID (64 bits).
    pub const TLBIVAA: usize = 0x608;
    /// Invalidate by ASID.
    pub const TLBIASID: usize = 0x610;
    /// Invalidate all of the bank's VMID.
    pub const TLBIALL: usize = 0x618;
    /// Invalidate by VA, last level (64 bits).
    pub const TLBIVAL: usize = 0x620;
    /// Invalidate by VA, any ASID, last level (64 bits).
    pub const TLBIVAAL: usize = 0x628;
    /// Invalidate by IPA (64 bits, stage 2).
    pub const TLBIIPAS2: usize = 0x630;
    /// Invalidate by IPA, last level (64 bits, stage 2).
    pub const TLBIIPAS2L: usize = 0x638;
    /// Start a synchronisation.
    pub const TLBSYNC: usize = 0x7f0;
    /// Synchronisation status.
    pub const TLBSTATUS: usize = 0x7f4;
    /// First of the four address translation operations (64 bits each): 1PR, 1PW, 1UR, 1UW.
    pub const ATS1PR: usize = 0x800;
    /// Last of the four: unprivileged write.
    pub const ATS1UW: usize = 0x818;
    /// Status of address translation operations.
    pub const ATSR: usize = 0x8f0;
}

/// Global pages beyond the two spaces, by page number.
pub mod page {
    /// Implementation defined: integration, TBU QoS, power (MMU-500).
    pub const IMPDEF: usize = 2;
    /// Performance monitors.
    pub const PMU: usize = 3;
    /// Security state determination table.
    pub const SSD: usize = 4;
    /// Extended stream match registers.
    pub const EXSMR: usize = 6;
    /// Extended stream to context registers.
    pub const EXS2CR: usize = 7;
    /// First page of the compressed index table.
    pub const COMPINDEX: usize = 8;
    /// Pages of the compressed index table.
    pub const COMPINDEX_PAGES: usize = 16;
}
