//! Fields of the global registers (IHI 0062D chapters 9 to 11).

use bitfield_struct::bitfield;

/// CR0 / SCR0: control of one security state's transactions.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cr0 {
    /// Client port disable: 1 = transactions bypass translation.
    pub clientpd: bool,
    /// Global faults are reported to the client as aborts.
    pub gfre: bool,
    /// Global fault interrupt enable.
    pub gfie: bool,
    /// 16-bit StreamIDs (only with IDR0.EXIDS).
    pub exidenable: bool,
    /// Configuration access faults are aborted.
    pub gcfgfre: bool,
    /// Configuration access fault interrupt enable.
    pub gcfgfie: bool,
    /// Transient hint for bypassing streams.
    #[bits(2)]
    pub transientcfg: u8,
    /// Stalling disabled.
    pub stalld: bool,
    /// A stall in one context stalls the others.
    pub gse: bool,
    /// Unidentified streams: 0 bypass, 1 fault.
    pub usfcfg: bool,
    /// Private VMID namespace.
    pub vmidpne: bool,
    /// Private TLB maintenance.
    pub ptm: bool,
    /// Force broadcast for bypassing streams.
    pub fb: bool,
    /// Barrier shareability upgrade for bypassing streams.
    #[bits(2)]
    pub bsu: u8,
    /// Memory type of bypassing streams, if MTCFG.
    #[bits(4)]
    pub memattr: u8,
    /// Use MemAttr.
    pub mtcfg: bool,
    /// Stream match conflicts: 0 bypass, 1 fault.
    pub smcfcfg: bool,
    /// Shareability of bypassing streams: 0 default, 1 outer, 2 inner, 3 non.
    #[bits(2)]
    pub shcfg: u8,
    /// Read allocation of bypassing streams.
    #[bits(2)]
    pub racfg: u8,
    /// Write allocation of bypassing streams.
    #[bits(2)]
    pub wacfg: u8,
    /// Security state of bypassing streams (SCR0): 0 default, 2 secure, 3 non-secure.
    #[bits(2)]
    pub nscfg: u8,
    /// CBAR bit 10 means E2HC (CR0, only with IDR2.E2HS).
    pub hypmode: bool,
    /// 16-bit VMIDs (CR0, only with IDR2.VMID16S).
    pub vmid16en: bool,
}

/// SCR1: how the secure side shares the SMMU.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Scr1 {
    /// Context banks given to the non-secure side.
    pub nsnumcbo: u8,
    /// Stream match groups given to the non-secure side.
    pub nsnumsmrgo: u8,
    /// Interrupts given to the non-secure side (SMMUv1).
    pub nsnumirpto: u8,
    /// Global address space is secure only.
    pub gasrae: bool,
    /// External faults that would go to GFSR go to SGFSR.
    pub gefro: bool,
    /// Secure instruction fetches from non-secure memory fault.
    pub sif: bool,
    /// Count secure events.
    pub spmen: bool,
    /// Non-secure configuration access faults are recorded in GFSR.
    pub nscafro: bool,
    /// Compressed indexing is off for the non-secure side.
    pub nscompindexdisable: bool,
    #[bits(2)]
    __: u8,
}

/// CR2 / SCR2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cr2 {
    /// VMID of bypassing transactions.
    pub bpvmid: u8,
    __: u8,
    /// Extended stream match groups given to the non-secure side (SCR2).
    #[bits(11)]
    pub exnsnumsmrgo: u16,
    #[bits(2)]
    __: u8,
    /// Compressed indexing enabled.
    pub compindexenable: bool,
    /// Non-secure side may not use the extended groups (SCR2).
    pub exnssmrgdisable: bool,
    /// Extended stream match groups enabled.
    pub exsmrgenable: bool,
}

/// ACR / sACR of MMU-500.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Acr {
    #[bits(2)]
    __: u8,
    /// Stage 1 walk cache enable.
    pub s1wc2en: bool,
    /// Stage 2 walk cache enable (non-secure copy).
    pub s2wc2en: bool,
    /// IPA to PA cache enable (non-secure copy).
    pub ipa2pa_cen: bool,
    #[bits(3)]
    __: u8,
    /// Unmatched streams may be cached in the TLB.
    pub smtnmb_tlben: bool,
    /// MMU-disabled streams may be cached in the TLB.
    pub mmudisb_tlben: bool,
    /// Bypassing streams may be cached in the TLB.
    pub s2crb_tlben: bool,
    #[bits(5)]
    __: u8,
    /// TLB page size.
    pub pagesize: bool,
    #[bits(7)]
    __: u8,
    /// 4 KiB page dependence check in the TCU disabled (non-secure copy).
    pub dp4k_tcudisb: bool,
    /// 4 KiB page dependence check in the TBU disabled (non-secure copy).
    pub dp4k_tbudisb: bool,
    /// 1 = ACTLR of this security state's banks is read only.
    pub cache_lock: bool,
    /// Normalise incoming attributes.
    pub normalize: bool,
    #[bits(4)]
    __: u8,
}

/// IDR0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr0 {
    /// Number of stream mapping register groups (128 with the extension).
    pub numsmrg: u8,
    /// 16-bit StreamIDs supported.
    pub exids: bool,
    /// StreamID width in bits.
    #[bits(4)]
    pub numsidb: u8,
    /// Broadcast TLB maintenance.
    pub btm: bool,
    /// Coherent table walks.
    pub cttw: bool,
    /// More than 128 stream match groups.
    pub exsmrgs: bool,
    /// Number of context interrupts (SMMUv2: 1, one per bank).
    pub numirpt: u8,
    /// AArch32 formats: 0 short and long, 1 long only, 2 none.
    #[bits(2)]
    pub ptfs: u8,
    /// 1 = no address translation operations.
    pub atosns: bool,
    /// Stream matching (0: stream indexing).
    pub sms: bool,
    /// Nested translation.
    pub nts: bool,
    /// Stage 2 translation.
    pub s2ts: bool,
    /// Stage 1 translation.
    pub s1ts: bool,
    /// Two security states (secure reads only).
    pub ses: bool,
}

/// IDR1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr1 {
    /// Context banks.
    pub numcb: u8,
    /// Width of the security state determination index, minus one.
    #[bits(4)]
    pub numssdndxb: u8,
    /// Security state determination table: 0 none.
    #[bits(2)]
    pub ssdtp: u8,
    __: bool,
    /// Stream match conflicts are always detected.
    pub smcd: bool,
    /// Context banks that are stage 2 only (the first ones).
    pub nums2cb: u8,
    /// Hardware update of access flag and dirty state.
    #[bits(2)]
    pub hafdbs: u8,
    #[bits(2)]
    __: u8,
    /// log2(global pages) - 1.
    #[bits(3)]
    pub numpagendxb: u8,
    /// Pages of 64 KiB (0: 4 KiB).
    pub pagesize: bool,
}

/// IDR2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr2 {
    /// Intermediate address size code.
    #[bits(4)]
    pub ias: u8,
    /// Output address size code.
    #[bits(4)]
    pub oas: u8,
    /// Upstream bus size code (5 = 49 bits, 15 = 64 bits).
    #[bits(4)]
    pub ubs: u8,
    /// AArch64 4 KiB granule.
    pub ptfsv8_4k: bool,
    /// AArch64 16 KiB granule.
    pub ptfsv8_16k: bool,
    /// AArch64 64 KiB granule.
    pub ptfsv8_64k: bool,
    /// 16-bit VMIDs.
    pub vmid16s: bool,
    /// Number of stream match groups with the extension.
    #[bits(11)]
    pub exnumsmrg: u16,
    /// E2H contexts.
    pub e2hs: bool,
    /// Hierarchical attribute disable.
    pub hads: bool,
    /// Compressed StreamID indexing.
    pub compindexs: bool,
    /// DIPAN privilege configuration.
    pub dipans: bool,
    __: bool,
}

/// SMR, in the format for EXIDENABLE = 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Smr {
    /// StreamID to match.
    #[bits(15)]
    pub id: u16,
    __: bool,
    /// Bits to ignore.
    #[bits(15)]
    pub mask: u16,
    /// The group takes part in matching.
    pub valid: bool,
}

/// S2CR.TYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum S2crType {
    /// Translate through context bank CBNDX.
    Translation = 0,
    /// Bypass translation.
    Bypass = 1,
    /// Fault: invalid context.
    Fault = 2,
    /// Reserved; acts as fault.
    Reserved = 3,
}

/// S2CR: what becomes of a stream. Fields from PRIVCFG up have their meaning for TYPE 0; for TYPE 1 bits 25:24 are BSU
/// and 26 is FB, and bits 7:0 a VMID.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct S2cr {
    /// Context bank (TYPE 0) or VMID (TYPE 1).
    pub cbndx: u8,
    /// Shareability: 0 default, 1 outer, 2 inner, 3 non.
    #[bits(2)]
    pub shcfg: u8,
    /// Valid bit of the group while EXIDENABLE = 1.
    pub exidvalid: bool,
    /// Use MemAttr.
    pub mtcfg: bool,
    /// Memory type.
    #[bits(4)]
    pub memattr: u8,
    /// See [`S2crType`].
    #[bits(2)]
    pub type_code: u8,
    /// Security: 0 default, 2 secure, 3 non-secure (secure groups).
    #[bits(2)]
    pub nscfg: u8,
    /// Read allocation: 0 default, 2 allocate, 3 no allocate.
    #[bits(2)]
    pub racfg: u8,
    /// Write allocation.
    #[bits(2)]
    pub wacfg: u8,
    /// Privilege: 0 default, 1 DIPAN, 2 unprivileged, 3 privileged.
    #[bits(2)]
    pub privcfg: u8,
    /// Instruction/data: 0 default, 2 data, 3 instruction.
    #[bits(2)]
    pub instcfg: u8,
    /// Transient hint.
    #[bits(2)]
    pub transientcfg: u8,
    #[bits(2)]
    __: u8,
}

impl S2cr {
    /// The TYPE field as a type.
    pub const fn kind(self) -> S2crType {
        match self.type_code() {
            0 => S2crType::Translation,
            1 => S2crType::Bypass,
            2 => S2crType::Fault,
            _ => S2crType::Reserved,
        }
    }
}

/// GFSR / SGFSR: global fault status, write one to clear.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Gfsr {
    /// Invalid context.
    pub icf: bool,
    /// Unidentified stream.
    pub usf: bool,
    /// Stream match conflict.
    pub smcf: bool,
    /// Unimplemented context bank.
    pub ucbf: bool,
    /// Unimplemented context interrupt (SMMUv1).
    pub ucif: bool,
    /// Configuration access.
    pub caf: bool,
    /// External.
    pub ef: bool,
    /// Permission (SGFSR).
    pub pf: bool,
    /// Unsupported upstream transaction.
    pub uut: bool,
    #[bits(22)]
    __: u32,
    /// Another fault while one was recorded.
    pub multi: bool,
}

impl Gfsr {
    /// The bits that exist.
    pub const MASK: u32 = 0x8000_01ff;
}

/// GFSYNR0: global fault syndrome.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Gfsynr0 {
    /// The fault came from a nested configuration.
    pub nested: bool,
    /// A write.
    pub wnr: bool,
    /// Privileged, as it came in.
    pub pnu: bool,
    /// Instruction, as it came in.
    pub ind: bool,
    /// Security state of the stream (secure copy).
    pub nsstate: bool,
    /// Non-secure attribute, as it came in.
    pub nsattr: bool,
    /// From an address translation operation.
    pub ats: bool,
    #[bits(25)]
    __: u32,
}

/// CBAR.TYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CbType {
    /// A stage 2 context.
    Stage2 = 0,
    /// Stage 1 with stage 2 bypass.
    Stage1Bypass = 1,
    /// Stage 1 with stage 2 fault.
    Stage1Fault = 2,
    /// Stage 1 followed by stage 2 (nested).
    Nested = 3,
}

/// CBAR. Bits 9:8 and 15:10 have the meaning below for TYPE 1; for TYPE 3 bits 15:8 are the stage 2 bank
/// ([`Cbar::s2_cbndx`]).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cbar {
    /// VMID.
    pub vmid: u8,
    /// TYPE 1: shareability of the bypassed stage 2: 1 outer, 2 inner, 3 non.
    #[bits(2)]
    pub bpshcfg: u8,
    /// TYPE 1: hyp context (E2HC while HYPMODE).
    pub hypc: bool,
    /// TYPE 1: force broadcast.
    pub fb: bool,
    /// TYPE 1: memory type of the bypassed stage 2 (15 is neutral).
    #[bits(4)]
    pub memattr: u8,
    /// See [`CbType`].
    #[bits(2)]
    pub type_code: u8,
    /// Barrier shareability upgrade.
    #[bits(2)]
    pub bsu: u8,
    /// TYPE 1: read allocation.
    #[bits(2)]
    pub racfg: u8,
    /// TYPE 1: write allocation.
    #[bits(2)]
    pub wacfg: u8,
    /// Interrupt index (SMMUv1; 0).
    pub irptndx: u8,
}

impl Cbar {
    /// The TYPE field as a type.
    pub const fn kind(self) -> CbType {
        match self.type_code() {
            0 => CbType::Stage2,
            1 => CbType::Stage1Bypass,
            2 => CbType::Stage1Fault,
            _ => CbType::Nested,
        }
    }
    /// TYPE 3: the stage 2 context bank, bits 15:8.
    pub const fn s2_cbndx(self) -> u8 {
        (self.into_bits() >> 8) as u8
    }
    /// TYPE 3: replaces the stage 2 context bank.
    pub const fn with_s2_cbndx(self, bank: u8) -> Self {
        Self::from_bits(self.into_bits() & !0xff00 | (bank as u32) << 8)
    }
}

/// CBA2R.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cba2r {
    /// AArch64 format.
    pub va64: bool,
    /// Monitor context (secure, TYPE 1, VA64).
    pub monc: bool,
    #[bits(14)]
    __: u16,
    /// VMID while CR0.VMID16EN.
    pub vmid16: u16,
}
