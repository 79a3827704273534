//! The stream table: level 1 descriptors and stream table entries (IHI 0070 sections 5.1 and 5.2).

use bitfield_struct::bitfield;

/// A level 1 stream table descriptor, 8 bytes.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct L1Std {
    /// 0 invalid; 1 to 11: 2^(Span-1) entries.
    #[bits(5)]
    pub span: u8,
    __: bool,
    /// Bits 55:6 of the level 2 array's address.
    #[bits(50)]
    pub l2ptr_55_6: u64,
    __: u8,
}

/// STE.Config.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SteConfig {
    /// 0xx: abort without an event.
    Abort,
    /// 100: bypass.
    Bypass,
    /// 101: stage 1.
    Stage1,
    /// 110: stage 2.
    Stage2,
    /// 111: stage 1 and stage 2.
    Nested,
}

impl SteConfig {
    /// From the field.
    pub const fn from_code(code: u8) -> Self {
        match code & 7 {
            4 => Self::Bypass,
            5 => Self::Stage1,
            6 => Self::Stage2,
            7 => Self::Nested,
            _ => Self::Abort,
        }
    }
    /// The field (abort is 0).
    pub const fn code(self) -> u8 {
        match self {
            Self::Abort => 0,
            Self::Bypass => 4,
            Self::Stage1 => 5,
            Self::Stage2 => 6,
            Self::Nested => 7,
        }
    }
    /// Stage 1 translates.
    pub const fn stage1(self) -> bool {
        matches!(self, Self::Stage1 | Self::Nested)
    }
    /// Stage 2 translates.
    pub const fn stage2(self) -> bool {
        matches!(self, Self::Stage2 | Self::Nested)
    }
}

/// Bytes of a stream table entry.
pub const STE_BYTES: u64 = 64;
/// Bytes of a level 1 descriptor.
pub const L1STD_BYTES: u64 = 8;

/// A stream table entry: eight 64-bit words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ste(pub [u64; 8]);

macro_rules! words {
    ($($(#[$doc:meta])* $get:ident $set:ident $n:literal $ty:ty;)*) => {
        $(
            $(#[$doc])*
            pub const fn $get(&self) -> $ty {
                <$ty>::from_bits(self.0[$n])
            }
            /// Replaces the word that the getter of the same name reads.
            pub const fn $set(mut self, word: $ty) -> Self {
                self.0[$n] = word.into_bits();
                self
            }
        )*
    };
}
pub(crate) use words;

impl Ste {
    words! {
        /// Word 0.
        dw0 with_dw0 0 SteDw0;
        /// Word 1.
        dw1 with_dw1 1 SteDw1;
        /// Word 2.
        dw2 with_dw2 2 SteDw2;
        /// Word 3.
        dw3 with_dw3 3 SteDw3;
        /// Word 4.
        dw4 with_dw4 4 SteDw4;
        /// Word 5.
        dw5 with_dw5 5 SteDw5;
        /// Word 6.
        dw6 with_dw6 6 SteDw6;
    }
    /// V.
    pub const fn valid(&self) -> bool {
        self.dw0().v()
    }
    /// Config.
    pub const fn config(&self) -> SteConfig {
        SteConfig::from_code(self.dw0().config())
    }
    /// S1ContextPtr as an address.
    pub const fn s1_context_ptr(&self) -> u64 {
        self.dw0().s1contextptr_55_6() << 6
    }
    /// S2TTB as an address, bits 51:4.
    pub const fn s2ttb(&self) -> u64 {
        self.dw3().s2ttb_51_4() << 4
    }
}

/// STE word 0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw0 {
    /// Valid.
    pub v: bool,
    /// 0xx abort, 100 bypass, 101 stage 1, 110 stage 2, 111 both; see [`SteConfig`].
    #[bits(3)]
    pub config: u8,
    /// 0 linear, 1 two-level with 4 KiB leaves, 2 with 64 KiB leaves, 3 acts as 0.
    #[bits(2)]
    pub s1fmt: u8,
    /// Bits 55:6 of the CD table's address.
    #[bits(50)]
    pub s1contextptr_55_6: u64,
    #[bits(3)]
    __: u8,
    /// log2 of the number of CDs.
    #[bits(5)]
    pub s1cdmax: u8,
}

/// STE word 1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw1 {
    /// Transactions without a substream: 0 and 3 terminate, 1 bypass stage 1, 2 CD 0.
    #[bits(2)]
    pub s1dss: u8,
    /// CD fetch inner cacheability: 0 NC, 1 WB-RA, 2 WT-RA, 3 WB.
    #[bits(2)]
    pub s1cir: u8,
    /// CD fetch outer cacheability.
    #[bits(2)]
    pub s1cor: u8,
    /// CD fetch shareability.
    #[bits(2)]
    pub s1csh: u8,
    /// Page-based hardware attributes of stage 2.
    #[bits(4)]
    pub s2hwu: u8,
    /// Destructive reads allowed.
    pub dre: bool,
    /// Contiguous hint.
    #[bits(4)]
    pub cont: u8,
    /// Directed cache prefetch allowed.
    pub dcp: bool,
    /// PASID on PRI overflow auto-responses.
    pub ppar: bool,
    /// Events may be merged.
    pub mev: bool,
    /// For software.
    #[bits(4)]
    pub software: u8,
    /// CDs may use permission indirection.
    pub s1pie: bool,
    /// Stage 2 forced write-back.
    pub s2fwb: bool,
    /// MPAM of stage 1.
    pub s1mpam: bool,
    /// Stage 1 stalls are not allowed.
    pub s1stalld: bool,
    /// ATS: 0 none, 1 full, 2 split stage, 3 full with DPT.
    #[bits(2)]
    pub eats: u8,
    /// Stream world: 0 EL1, 2 EL2 (secure table: 0 secure, 1 EL3, 2 S-EL2).
    #[bits(2)]
    pub strw: u8,
    /// Memory type, if MTCFG.
    #[bits(4)]
    pub memattr: u8,
    /// Use MemAttr.
    pub mtcfg: bool,
    /// 0xxx incoming, 1RWT.
    #[bits(4)]
    pub alloccfg: u8,
    #[bits(3)]
    __: u8,
    /// 0 non-shareable, 1 incoming, 2 outer, 3 inner.
    #[bits(2)]
    pub shcfg: u8,
    /// Secure streams with stage 1 off: 0 and 1 incoming, 2 secure, 3 non-secure.
    #[bits(2)]
    pub nscfg: u8,
    /// 0 and 1 incoming, 2 unprivileged, 3 privileged.
    #[bits(2)]
    pub privcfg: u8,
    /// 0 and 1 incoming, 2 data, 3 instruction.
    #[bits(2)]
    pub instcfg: u8,
    /// Implementation defined.
    #[bits(12)]
    pub impdef: u16,
}

/// STE word 2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw2 {
    /// VMID.
    pub s2vmid: u16,
    /// Implementation defined.
    pub impdef: u16,
    /// Input size of stage 2: 64 - S2T0SZ bits.
    #[bits(6)]
    pub s2t0sz: u8,
    /// Start level.
    #[bits(2)]
    pub s2sl0: u8,
    /// Walk inner cacheability.
    #[bits(2)]
    pub s2ir0: u8,
    /// Walk outer cacheability.
    #[bits(2)]
    pub s2or0: u8,
    /// Walk shareability.
    #[bits(2)]
    pub s2sh0: u8,
    /// 0 4K, 1 64K, 2 16K, 3 reserved.
    #[bits(2)]
    pub s2tg: u8,
    /// Output size code.
    #[bits(3)]
    pub s2ps: u8,
    /// VMSAv8-64.
    pub s2aa64: bool,
    /// Big-endian tables.
    pub s2endi: bool,
    /// No access flag faults.
    pub s2affd: bool,
    /// Stage 1 walks to Device memory fault.
    pub s2ptw: bool,
    /// Hardware dirty state.
    pub s2hd: bool,
    /// Hardware access flag.
    pub s2ha: bool,
    /// Stall.
    pub s2s: bool,
    /// Record.
    pub s2r: bool,
    /// Access flag in table descriptors.
    pub s2haft: bool,
    /// Stage 2 permission indirection.
    pub s2pie: bool,
    /// Stage 2 permission overlay.
    pub s2poe: bool,
    /// DPT VMID match.
    #[bits(2)]
    pub dpt_vmatch: u8,
}

/// STE word 3.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw3 {
    /// Secure only.
    pub s2nsw: bool,
    /// Secure only.
    pub s2nsa: bool,
    /// Third bit of the start level (DS, 4K).
    pub s2sl0_2: bool,
    /// 52-bit addresses with 4K and 16K.
    pub s2ds: bool,
    /// Bits 51:4 of the table's address.
    #[bits(48)]
    pub s2ttb_51_4: u64,
    #[bits(9)]
    __: u16,
    /// 128-bit descriptors only.
    #[bits(2)]
    pub s2skl: u8,
    __: bool,
}

/// STE word 4.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw4 {
    /// Implementation defined.
    pub impdef: u16,
    /// MPAM partition.
    pub partid: u16,
    /// Secure stage 2 input size.
    #[bits(6)]
    pub s_s2t0sz: u8,
    /// Secure stage 2 start level.
    #[bits(2)]
    pub s_s2sl0: u8,
    #[bits(6)]
    __: u8,
    /// Secure stage 2 granule.
    #[bits(2)]
    pub s_s2tg: u8,
    /// Realm only.
    pub mecid: u16,
}

/// STE word 5.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw5 {
    /// MPAM performance group.
    pub pmg: u8,
    /// MPAM, non-secure.
    pub mpam_ns: bool,
    /// Translation hardening.
    pub assured_only: bool,
    /// Translation hardening.
    pub tl0: bool,
    /// Translation hardening.
    pub tl1: bool,
    /// Bits 55:12 of the virtual machine structure's address.
    #[bits(44)]
    pub vmsptr_55_12: u64,
    __: u8,
}

/// STE word 6.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SteDw6 {
    /// Secure only.
    pub s2sw: bool,
    /// Secure only.
    pub s2sa: bool,
    /// Third bit of the secure start level.
    pub s_s2sl0_2: bool,
    __: bool,
    /// Bits 51:4 of the secure table's address.
    #[bits(48)]
    pub s_s2ttb_51_4: u64,
    #[bits(12)]
    __: u16,
}
