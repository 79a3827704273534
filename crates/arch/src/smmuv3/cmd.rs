//! Commands (IHI 0070 chapter 4): 16 bytes, two 64-bit words.
//!
//! [`Command`] is any command; the other types are views of its two words for one group of opcodes, bit for bit.

use bitfield_struct::bitfield;

/// Bytes of a command.
pub const COMMAND_BYTES: u64 = 16;

/// A command as it lies in the queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Command(pub [u64; 2]);

impl Command {
    /// The opcode field.
    pub const fn code(self) -> u8 {
        self.0[0] as u8
    }
    /// The opcode, if the architecture defines it.
    pub const fn opcode(self) -> Option<Opcode> {
        Opcode::from_code(self.code())
    }
    /// SSec: the command is for secure structures.
    pub const fn ssec(self) -> bool {
        self.0[0] >> 10 & 1 != 0
    }
    /// The two words as one number, for the views.
    pub const fn to_bits(self) -> u128 {
        self.0[0] as u128 | (self.0[1] as u128) << 64
    }
    /// From one number.
    pub const fn from_bits(bits: u128) -> Self {
        Self([bits as u64, (bits >> 64) as u64])
    }
}

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// The opcodes of the architecture.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Opcode { $($(#[$doc])* $name = $code,)* }
        impl Opcode {
            /// Every opcode.
            pub const ALL: &[Opcode] = &[$(Opcode::$name,)*];
            /// From the field.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code {
                    $($code => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

opcodes! {
    /// CMD_PREFETCH_CONFIG.
    PrefetchConfig = 0x01,
    /// CMD_PREFETCH_ADDR.
    PrefetchAddr = 0x02,
    /// CMD_CFGI_STE.
    CfgiSte = 0x03,
    /// CMD_CFGI_STE_RANGE; with Range 31 CMD_CFGI_ALL.
    CfgiSteRange = 0x04,
    /// CMD_CFGI_CD.
    CfgiCd = 0x05,
    /// CMD_CFGI_CD_ALL.
    CfgiCdAll = 0x06,
    /// CMD_CFGI_VMS_PIDM.
    CfgiVmsPidm = 0x07,
    /// CMD_TLBI_NH_ALL.
    TlbiNhAll = 0x10,
    /// CMD_TLBI_NH_ASID.
    TlbiNhAsid = 0x11,
    /// CMD_TLBI_NH_VA.
    TlbiNhVa = 0x12,
    /// CMD_TLBI_NH_VAA.
    TlbiNhVaa = 0x13,
    /// CMD_TLBI_EL3_ALL.
    TlbiEl3All = 0x18,
    /// CMD_TLBI_EL3_VA.
    TlbiEl3Va = 0x1a,
    /// CMD_TLBI_EL2_ALL.
    TlbiEl2All = 0x20,
    /// CMD_TLBI_EL2_ASID.
    TlbiEl2Asid = 0x21,
    /// CMD_TLBI_EL2_VA.
    TlbiEl2Va = 0x22,
    /// CMD_TLBI_EL2_VAA.
    TlbiEl2Vaa = 0x23,
    /// CMD_TLBI_S12_VMALL.
    TlbiS12Vmall = 0x28,
    /// CMD_TLBI_S2_IPA.
    TlbiS2Ipa = 0x2a,
    /// CMD_TLBI_NSNH_ALL.
    TlbiNsnhAll = 0x30,
    /// CMD_ATC_INV.
    AtcInv = 0x40,
    /// CMD_PRI_RESP.
    PriResp = 0x41,
    /// CMD_RESUME.
    Resume = 0x44,
    /// CMD_STALL_TERM.
    StallTerm = 0x45,
    /// CMD_SYNC.
    Sync = 0x46,
    /// CMD_TLBI_S_EL2_ALL.
    TlbiSEl2All = 0x50,
    /// CMD_TLBI_S_EL2_ASID.
    TlbiSEl2Asid = 0x51,
    /// CMD_TLBI_S_EL2_VA.
    TlbiSEl2Va = 0x52,
    /// CMD_TLBI_S_EL2_VAA.
    TlbiSEl2Vaa = 0x53,
    /// CMD_TLBI_S_S12_VMALL.
    TlbiSS12Vmall = 0x58,
    /// CMD_TLBI_S_S2_IPA.
    TlbiSS2Ipa = 0x5a,
    /// CMD_TLBI_SNH_ALL.
    TlbiSnhAll = 0x60,
    /// CMD_DPTI_ALL.
    DptiAll = 0x70,
    /// CMD_DPTI_PA.
    DptiPa = 0x73,
}

/// PREFETCH_CONFIG and PREFETCH_ADDR.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Prefetch {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    /// The SubstreamID counts.
    pub ssv: bool,
    /// SubstreamID.
    #[bits(20)]
    pub ssid: u32,
    /// StreamID.
    pub sid: u32,
    /// 2^Size translations.
    #[bits(5)]
    pub size: u8,
    /// 2^(12 + Stride) bytes apart.
    #[bits(5)]
    pub stride: u8,
    __: bool,
    /// Secure queue only.
    pub ns: bool,
    /// Bits 63:12 of the address.
    #[bits(52)]
    pub addr_63_12: u64,
}

/// CFGI_STE, CFGI_STE_RANGE (CFGI_ALL), CFGI_CD and CFGI_CD_ALL.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Cfgi {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    __: bool,
    /// SubstreamID (CFGI_CD).
    #[bits(20)]
    pub ssid: u32,
    /// StreamID.
    pub sid: u32,
    /// CFGI_STE and CFGI_CD: bit 0 is Leaf. CFGI_STE_RANGE: 2^(Range + 1) streams, 31 all.
    #[bits(5)]
    pub range: u8,
    #[bits(59)]
    __: u64,
}

impl Cfgi {
    /// Leaf: level 1 descriptors may stay cached.
    pub const fn leaf(self) -> bool {
        self.range() & 1 != 0
    }
    /// Range of CMD_CFGI_ALL.
    pub const ALL_RANGE: u8 = 31;
}

/// Every TLBI command.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Tlbi {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    __: bool,
    /// A range is (NUM + 1) * 2^SCALE granules.
    #[bits(5)]
    pub num: u8,
    #[bits(3)]
    __: u8,
    /// Six bits with IDR5.DS, else five.
    #[bits(6)]
    pub scale: u8,
    #[bits(6)]
    __: u8,
    /// VMID.
    pub vmid: u16,
    /// ASID.
    pub asid: u16,
    /// Only last-level entries must go.
    pub leaf: bool,
    #[bits(6)]
    __: u8,
    /// 128-bit descriptors.
    pub ttl128: bool,
    /// Level of the leaves, 0 any.
    #[bits(2)]
    pub ttl: u8,
    /// 0 no range, 1 4K, 2 16K, 3 64K.
    #[bits(2)]
    pub tg: u8,
    /// Bits 63:12 of the address (51:12 of an IPA).
    #[bits(52)]
    pub addr_63_12: u64,
}

/// ATC_INV.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct AtcInv {
    /// Opcode.
    pub opcode: u8,
    __: bool,
    /// Global: all PASIDs of the address.
    pub g: bool,
    /// Secure.
    pub ssec: bool,
    /// The SubstreamID counts.
    pub ssv: bool,
    /// SubstreamID.
    #[bits(20)]
    pub ssid: u32,
    /// StreamID.
    pub sid: u32,
    /// 4096 * 2^Size bytes, 52 all.
    #[bits(6)]
    pub size: u8,
    #[bits(6)]
    __: u8,
    /// Bits 63:12 of the address.
    #[bits(52)]
    pub addr_63_12: u64,
}

/// PRI_RESP.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct PriResp {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    /// The SubstreamID counts.
    pub ssv: bool,
    /// SubstreamID.
    #[bits(20)]
    pub ssid: u32,
    /// StreamID.
    pub sid: u32,
    /// Page request group.
    #[bits(9)]
    pub prg_index: u16,
    #[bits(3)]
    __: u8,
    /// 0 failure, 1 invalid request, 2 success.
    #[bits(2)]
    pub resp: u8,
    #[bits(50)]
    __: u64,
}

/// RESUME and STALL_TERM.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Resume {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    __: bool,
    /// 1 retry, 0 terminate.
    pub ac: bool,
    /// 1 abort, 0 RAZ/WI.
    pub ab: bool,
    #[bits(18)]
    __: u32,
    /// StreamID.
    pub sid: u32,
    /// Stall tag.
    pub stag: u16,
    #[bits(48)]
    __: u64,
}

/// SYNC.
#[bitfield(u128)]
#[derive(PartialEq, Eq)]
pub struct Sync {
    /// Opcode.
    pub opcode: u8,
    #[bits(2)]
    __: u8,
    /// Secure.
    pub ssec: bool,
    __: bool,
    /// Completion signal: 0 none, 1 interrupt, 2 event, 3 illegal.
    #[bits(2)]
    pub cs: u8,
    __: u8,
    /// MSI shareability.
    #[bits(2)]
    pub msh: u8,
    /// MSI memory type (STE.MemAttr encoding).
    #[bits(4)]
    pub msiattr: u8,
    #[bits(4)]
    __: u8,
    /// MSI data.
    pub msidata: u32,
    #[bits(2)]
    __: u8,
    /// Bits 55:2 of the MSI address.
    #[bits(54)]
    pub msiaddr_55_2: u64,
    #[bits(7)]
    __: u8,
    /// Realm queue only.
    pub msi_ns: bool,
}

macro_rules! views {
    ($($view:ident),*) => {
        $(
            impl From<Command> for $view {
                fn from(c: Command) -> Self {
                    Self::from_bits(c.to_bits())
                }
            }
            impl From<$view> for Command {
                fn from(v: $view) -> Self {
                    Self::from_bits(v.into_bits())
                }
            }
        )*
    };
}
views!(Prefetch, Cfgi, Tlbi, AtcInv, PriResp, Resume, Sync);
