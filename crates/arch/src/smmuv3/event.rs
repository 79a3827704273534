//! Event records (IHI 0070 section 7.3), 32 bytes, and page request records (section 8.1), 16 bytes.

use bitfield_struct::bitfield;

/// Bytes of an event record.
pub const EVENT_BYTES: u64 = 32;
/// Bytes of a page request record.
pub const PRI_BYTES: u64 = 16;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal,)*) => {
        /// Event codes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum EventCode { $($(#[$doc])* $name = $code,)* }
        impl EventCode {
            /// Every code.
            pub const ALL: &[EventCode] = &[$(EventCode::$name,)*];
            /// From the field.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
            /// The architecture's name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

codes! {
    /// Unsupported upstream transaction.
    Uut = 0x01 "F_UUT",
    /// StreamID out of range or its level 1 descriptor invalid.
    BadStreamId = 0x02 "C_BAD_STREAMID",
    /// Abort on a stream table fetch.
    SteFetch = 0x03 "F_STE_FETCH",
    /// Invalid or illegal STE.
    BadSte = 0x04 "C_BAD_STE",
    /// ATS translation request refused.
    BadAtsTreq = 0x05 "F_BAD_ATS_TREQ",
    /// Transactions without (or with) a substream are disabled.
    StreamDisabled = 0x06 "F_STREAM_DISABLED",
    /// Translated transaction refused.
    TranslForbidden = 0x07 "F_TRANSL_FORBIDDEN",
    /// SubstreamID out of range or its level 1 descriptor invalid.
    BadSubstreamId = 0x08 "C_BAD_SUBSTREAMID",
    /// Abort on a CD fetch.
    CdFetch = 0x09 "F_CD_FETCH",
    /// Invalid or illegal CD.
    BadCd = 0x0a "C_BAD_CD",
    /// Abort on a translation table fetch or update.
    WalkEabt = 0x0b "F_WALK_EABT",
    /// No translation.
    Translation = 0x10 "F_TRANSLATION",
    /// Address size.
    AddrSize = 0x11 "F_ADDR_SIZE",
    /// Access flag clear.
    Access = 0x12 "F_ACCESS",
    /// Not permitted.
    Permission = 0x13 "F_PERMISSION",
    /// TLB conflict.
    TlbConflict = 0x20 "F_TLB_CONFLICT",
    /// Configuration cache conflict.
    CfgConflict = 0x21 "F_CFG_CONFLICT",
    /// Hint that a page will be wanted.
    PageRequest = 0x24 "E_PAGE_REQUEST",
    /// Abort on a virtual machine structure fetch.
    VmsFetch = 0x25 "F_VMS_FETCH",
}

/// CLASS: what was being translated when a stage 2 fault happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventClass {
    /// A context descriptor fetch.
    Cd = 0,
    /// A stage 1 table fetch or update.
    Tt = 1,
    /// The input address.
    In = 2,
}

impl EventClass {
    /// From the field.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Cd,
            1 => Self::Tt,
            2 => Self::In,
            _ => return None,
        })
    }
}

/// An event record: four 64-bit words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EventRecord(pub [u64; 4]);

impl EventRecord {
    /// Word 0.
    pub const fn dw0(&self) -> EventDw0 {
        EventDw0::from_bits(self.0[0])
    }
    /// Word 1.
    pub const fn dw1(&self) -> EventDw1 {
        EventDw1::from_bits(self.0[1])
    }
    /// The code, if the architecture defines it.
    pub const fn code(&self) -> Option<EventCode> {
        EventCode::from_code(self.dw0().code())
    }
    /// Word 2: the input address.
    pub const fn input_addr(&self) -> u64 {
        self.0[2]
    }
    /// Word 3 of a stage 2 fault: the IPA, bits 55:12.
    pub const fn ipa(&self) -> u64 {
        self.0[3] & 0x00ff_ffff_ffff_f000
    }
    /// Word 3 of a fetch abort: the address of the fetch, bits 55:3.
    pub const fn fetch_addr(&self) -> u64 {
        self.0[3] & 0x00ff_ffff_ffff_fff8
    }
}

/// Event word 0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EventDw0 {
    /// Code.
    pub code: u8,
    #[bits(3)]
    __: u8,
    /// The SubstreamID is valid (not in C_BAD_SUBSTREAMID, where it always is).
    pub ssv: bool,
    /// SubstreamID.
    #[bits(20)]
    pub ssid: u32,
    /// StreamID.
    pub sid: u32,
}

/// Event word 1. Which fields exist depends on the code.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EventDw1 {
    /// STAG of a stalled transaction, or an implementation defined reason.
    pub stag: u16,
    /// Granule protection fault (fetch aborts).
    pub gpcf: bool,
    #[bits(14)]
    __: u16,
    /// The transaction is stalled.
    pub stall: bool,
    __: bool,
    /// Privileged.
    pub pnu: bool,
    /// Instruction.
    pub ind: bool,
    /// Read.
    pub rnw: bool,
    #[bits(2)]
    __: u8,
    /// The IPA is non-secure (secure queue only).
    pub nsipa: bool,
    /// Stage 2.
    pub s2: bool,
    /// CLASS; see [`EventClass`].
    #[bits(2)]
    pub class: u8,
    /// Dirty bit (v3.4).
    pub dirty_bit: bool,
    /// Assured only (v3.4).
    pub assured_only: bool,
    /// F_PERMISSION with CLASS = TT: 1 table read, 0 table update.
    pub ttrnw: bool,
    /// Overlay (v3.4).
    pub overlay: bool,
    #[bits(2)]
    __: u8,
    /// Implementation defined.
    pub impdef: u16,
}

/// Word 1 of F_BAD_ATS_TREQ.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct BadAtsTreqDw1 {
    /// Number of smallest translation units.
    #[bits(5)]
    pub span: u8,
    #[bits(23)]
    __: u32,
    /// Privileged.
    pub privileged: bool,
    /// Execute.
    pub x: bool,
    /// Write.
    pub w: bool,
    /// Read.
    pub r: bool,
    __: u32,
}

/// Word 1 of E_PAGE_REQUEST.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequestDw1 {
    #[bits(33)]
    __: u64,
    /// Unprivileged execute.
    pub ux: bool,
    /// Unprivileged write.
    pub uw: bool,
    /// Unprivileged read.
    pub ur: bool,
    __: bool,
    /// Privileged execute.
    pub px: bool,
    /// Privileged write.
    pub pw: bool,
    /// Privileged read.
    pub pr: bool,
    #[bits(4)]
    __: u8,
    /// Span * 4096 bytes.
    pub span: u8,
    #[bits(12)]
    __: u16,
}

/// A page request record: two 64-bit words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PriRecord(pub [u64; 2]);

impl PriRecord {
    /// Word 0.
    pub const fn dw0(&self) -> PriDw0 {
        PriDw0::from_bits(self.0[0])
    }
    /// Word 1.
    pub const fn dw1(&self) -> PriDw1 {
        PriDw1::from_bits(self.0[1])
    }
}

/// Page request word 0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PriDw0 {
    /// StreamID.
    pub sid: u32,
    /// SubstreamID.
    #[bits(20)]
    pub ssid: u32,
    #[bits(6)]
    __: u8,
    /// Privileged.
    pub privileged: bool,
    /// Execute.
    pub x: bool,
    /// Read.
    pub r: bool,
    /// Write.
    pub w: bool,
    /// Last of its group.
    pub last: bool,
    /// The SubstreamID counts.
    pub ssv: bool,
}

/// Page request word 1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PriDw1 {
    /// Page request group.
    #[bits(9)]
    pub prg_index: u16,
    #[bits(3)]
    __: u8,
    /// Bits 63:12 of the address.
    #[bits(52)]
    pub addr_63_12: u64,
}
