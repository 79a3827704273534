//! Register offsets and fields (IHI 0070 chapter 6).

use bitfield_struct::bitfield;

/// Size of one register page.
pub const PAGE: u64 = 0x1_0000;
/// Offset of the secure registers from the non-secure ones of the same name.
pub const SECURE: u64 = 0x8000;

/// Offsets in the register window: page 0 from 0, page 1 from [`PAGE`].
#[allow(missing_docs)] // The names are the registers'.
pub mod offset {
    pub const IDR0: u64 = 0x000;
    pub const IDR1: u64 = 0x004;
    pub const IDR2: u64 = 0x008;
    pub const IDR3: u64 = 0x00c;
    pub const IDR4: u64 = 0x010;
    pub const IDR5: u64 = 0x014;
    pub const IIDR: u64 = 0x018;
    pub const AIDR: u64 = 0x01c;
    pub const CR0: u64 = 0x020;
    pub const CR0ACK: u64 = 0x024;
    pub const CR1: u64 = 0x028;
    pub const CR2: u64 = 0x02c;
    pub const S_INIT: u64 = 0x03c;
    pub const STATUSR: u64 = 0x040;
    pub const GBPA: u64 = 0x044;
    pub const AGBPA: u64 = 0x048;
    pub const IRQ_CTRL: u64 = 0x050;
    pub const IRQ_CTRLACK: u64 = 0x054;
    pub const GERROR: u64 = 0x060;
    pub const GERRORN: u64 = 0x064;
    pub const GERROR_IRQ_CFG0: u64 = 0x068;
    pub const GERROR_IRQ_CFG1: u64 = 0x070;
    pub const GERROR_IRQ_CFG2: u64 = 0x074;
    pub const STRTAB_BASE: u64 = 0x080;
    pub const STRTAB_BASE_CFG: u64 = 0x088;
    pub const CMDQ_BASE: u64 = 0x090;
    pub const CMDQ_PROD: u64 = 0x098;
    pub const CMDQ_CONS: u64 = 0x09c;
    pub const EVENTQ_BASE: u64 = 0x0a0;
    /// In page 1 ([`super::PAGE`] + this); the secure one is in page 0 at 0x80a8.
    pub const EVENTQ_PROD: u64 = 0x0a8;
    /// In page 1; the secure one is in page 0 at 0x80ac.
    pub const EVENTQ_CONS: u64 = 0x0ac;
    pub const EVENTQ_IRQ_CFG0: u64 = 0x0b0;
    pub const EVENTQ_IRQ_CFG1: u64 = 0x0b8;
    pub const EVENTQ_IRQ_CFG2: u64 = 0x0bc;
    pub const PRIQ_BASE: u64 = 0x0c0;
    /// In page 1.
    pub const PRIQ_PROD: u64 = 0x0c8;
    /// In page 1.
    pub const PRIQ_CONS: u64 = 0x0cc;
    pub const PRIQ_IRQ_CFG0: u64 = 0x0d0;
    pub const PRIQ_IRQ_CFG1: u64 = 0x0d8;
    pub const PRIQ_IRQ_CFG2: u64 = 0x0dc;
    pub const GATOS_CTRL: u64 = 0x100;
    pub const GATOS_SID: u64 = 0x108;
    pub const GATOS_ADDR: u64 = 0x110;
    pub const GATOS_PAR: u64 = 0x118;
    pub const PIDR4: u64 = 0xfd0;
    pub const CIDR3: u64 = 0xffc;
}

/// IDR0: features.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr0 {
    /// Stage 2.
    pub s2p: bool,
    /// Stage 1.
    pub s1p: bool,
    /// Table formats: bit 0 AArch32 LPAE, bit 1 AArch64.
    #[bits(2)]
    pub ttf: u8,
    /// Coherent access to tables and queues.
    pub cohacc: bool,
    /// Broadcast TLB maintenance.
    pub btm: bool,
    /// Hardware flag update: 0 none, 1 access flag, 2 access flag and dirty state.
    #[bits(2)]
    pub httu: u8,
    /// Dormant hint.
    pub dormhint: bool,
    /// EL2 stream worlds.
    pub hyp: bool,
    /// ATS.
    pub ats: bool,
    /// Split-stage ATS is not supported.
    pub ns1ats: bool,
    /// 16-bit ASIDs.
    pub asid16: bool,
    /// Message signalled interrupts.
    pub msi: bool,
    /// WFE wake-up events.
    pub sev: bool,
    /// Address translation operations.
    pub atos: bool,
    /// Page request interface.
    pub pri: bool,
    /// VMID wildcards.
    pub vmw: bool,
    /// 16-bit VMIDs.
    pub vmid16: bool,
    /// Two-level CD tables.
    pub cd2l: bool,
    /// Virtual ATOS page.
    pub vatos: bool,
    /// Table endianness: 0 mixed, 2 little only, 3 big only.
    #[bits(2)]
    pub ttendian: u8,
    /// CR2.REC_CFG_ATS exists.
    pub atsrecerr: bool,
    /// 0 stall and terminate, 1 terminate only, 2 stall forced.
    #[bits(2)]
    pub stall_model: u8,
    /// Termination is always an abort.
    pub term_model: bool,
    /// 1: two-level stream tables.
    #[bits(2)]
    pub st_level: u8,
    __: bool,
    /// Realm state.
    pub rme_impl: bool,
    __: bool,
}

/// IDR1: sizes, as log2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr1 {
    /// StreamID bits.
    #[bits(6)]
    pub sidsize: u8,
    /// SubstreamID bits.
    #[bits(5)]
    pub ssidsize: u8,
    /// Page request queue entries, log2.
    #[bits(5)]
    pub priqs: u8,
    /// Event queue entries, log2.
    #[bits(5)]
    pub eventqs: u8,
    /// Command queue entries, log2.
    #[bits(5)]
    pub cmdqs: u8,
    /// INSTCFG, PRIVCFG and NSCFG overrides work.
    pub attr_perms_ovr: bool,
    /// MTCFG, SHCFG and ALLOCCFG overrides work.
    pub attr_types_ovr: bool,
    /// Preset bases are relative.
    pub rel: bool,
    /// Queue bases are preset.
    pub queues_preset: bool,
    /// Table bases are preset.
    pub tables_preset: bool,
    /// Enhanced command queues.
    pub ecmdq: bool,
}

/// IDR3: features of v3.1 and later.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr3 {
    #[bits(2)]
    __: u8,
    /// Hierarchical attribute disable.
    pub had: bool,
    /// Page-based hardware attributes.
    pub pbha: bool,
    /// Stage 2 execute-never per privilege.
    pub xnx: bool,
    /// PASID on PRI overflow auto-responses always.
    pub pps: bool,
    __: bool,
    /// MPAM.
    pub mpam: bool,
    /// Stage 2 forced write-back.
    pub fwb: bool,
    /// Small tables.
    pub stt: bool,
    /// Range invalidation and level hints.
    pub ril: bool,
    /// Break-before-make level.
    #[bits(2)]
    pub bbml: u8,
    /// E0PD.
    pub e0pd: bool,
    /// Stage 1 walks to Device memory as Normal-NC.
    pub ptwnnc: bool,
    /// Device permission table.
    pub dpt: bool,
    /// PASID on translated transactions.
    pub pasidtt: bool,
    /// Enhanced PAN.
    pub epan: bool,
    /// Stage 1 permission indirection.
    pub s1pi: bool,
    /// Stage 2 permission indirection.
    pub s2pi: bool,
    /// Stage 2 permission overlay.
    pub s2po: bool,
    /// Translation hardening.
    pub the: bool,
    /// MTE permissions.
    pub mteperm: bool,
    /// Attribute index extension.
    pub aie: bool,
    __: u8,
}

/// IDR5: address sizes and granules.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Idr5 {
    /// Output address size code: 32, 36, 40, 42, 44, 48, 52, 56 bits.
    #[bits(3)]
    pub oas: u8,
    __: bool,
    /// 4 KiB granule.
    pub gran4k: bool,
    /// 16 KiB granule.
    pub gran16k: bool,
    /// 64 KiB granule.
    pub gran64k: bool,
    /// 52-bit addresses with 4 KiB and 16 KiB granules.
    pub ds: bool,
    /// 128-bit descriptors.
    pub d128: bool,
    __: bool,
    /// Virtual address size: 0 48, 1 52, 2 56 bits.
    #[bits(2)]
    pub vax: u8,
    #[bits(4)]
    __: u8,
    /// Most stalled transactions.
    pub stall_max: u16,
}

/// Bits of an address size code (IDR5.OAS, CD.IPS, STE.S2PS).
pub const ADDRESS_BITS: [u8; 8] = [32, 36, 40, 42, 44, 48, 52, 56];

/// S_IDR0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SIdr0 {
    #[bits(13)]
    __: u16,
    /// Message signalled interrupts for the secure side.
    pub msi: bool,
    #[bits(10)]
    __: u16,
    /// As IDR0.STALL_MODEL.
    #[bits(2)]
    pub stall_model: u8,
    #[bits(5)]
    __: u8,
    /// Enhanced command queues.
    pub ecmdq: bool,
}

/// S_IDR1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct SIdr1 {
    /// StreamID bits of secure streams.
    #[bits(6)]
    pub s_sidsize: u8,
    #[bits(23)]
    __: u32,
    /// Secure EL2 and secure stage 2.
    pub sel2: bool,
    __: bool,
    /// Secure state is implemented.
    pub secure_impl: bool,
}

/// CR0 and S_CR0 (and their ACK registers).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cr0 {
    /// Translation on.
    pub smmuen: bool,
    /// Page request queue on (not in S_CR0).
    pub priqen: bool,
    /// Event queue on.
    pub eventqen: bool,
    /// Command queue on.
    pub cmdqen: bool,
    /// Check ATS translated traffic (not in S_CR0).
    pub atschk: bool,
    /// Secure instruction fetches from non-secure memory fault (S_CR0 only).
    pub sif: bool,
    /// VMID wildcard: ignore so many low VMID bits on invalidation (1 to 4).
    #[bits(3)]
    pub vmw: u8,
    /// Non-secure stalls are off (S_CR0 only).
    pub nsstalld: bool,
    /// Device permission table walks.
    pub dpt_walk_en: bool,
    #[bits(21)]
    __: u32,
}

/// CR1: attributes of queue and table accesses. Cacheability 0 NC, 1 WB, 2 WT; shareability 0 non, 2 outer, 3 inner.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cr1 {
    /// Queues, inner cacheability.
    #[bits(2)]
    pub queue_ic: u8,
    /// Queues, outer cacheability.
    #[bits(2)]
    pub queue_oc: u8,
    /// Queues, shareability.
    #[bits(2)]
    pub queue_sh: u8,
    /// Tables, inner cacheability.
    #[bits(2)]
    pub table_ic: u8,
    /// Tables, outer cacheability.
    #[bits(2)]
    pub table_oc: u8,
    /// Tables, shareability.
    #[bits(2)]
    pub table_sh: u8,
    #[bits(20)]
    __: u32,
}

/// CR2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cr2 {
    /// EL2 streams are EL2-E2H.
    pub e2h: bool,
    /// Record C_BAD_STREAMID.
    pub recinvsid: bool,
    /// Ignore broadcast TLB maintenance.
    pub ptm: bool,
    /// Record configuration errors of ATS requests.
    pub rec_cfg_ats: bool,
    #[bits(28)]
    __: u32,
}

/// GBPA and S_GBPA: what becomes of transactions while SMMUEN = 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Gbpa {
    /// Memory type, if MTCFG.
    #[bits(4)]
    pub memattr: u8,
    /// Use MemAttr.
    pub mtcfg: bool,
    #[bits(3)]
    __: u8,
    /// 0xxx incoming, 1RWT override.
    #[bits(4)]
    pub alloccfg: u8,
    /// 0 non-shareable, 1 incoming, 2 outer, 3 inner.
    #[bits(2)]
    pub shcfg: u8,
    /// S_GBPA only: 0 and 1 incoming, 2 secure, 3 non-secure.
    #[bits(2)]
    pub nscfg: u8,
    /// 0 and 1 incoming, 2 unprivileged, 3 privileged.
    #[bits(2)]
    pub privcfg: u8,
    /// 0 and 1 incoming, 2 data, 3 instruction.
    #[bits(2)]
    pub instcfg: u8,
    /// Abort everything.
    pub abort: bool,
    #[bits(10)]
    __: u16,
    /// Set to write; hardware clears it.
    pub update: bool,
}

/// IRQ_CTRL and its ACK.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IrqCtrl {
    /// Global errors.
    pub gerror_irqen: bool,
    /// Page request queue.
    pub priq_irqen: bool,
    /// Event queue.
    pub eventq_irqen: bool,
    #[bits(29)]
    __: u32,
}

/// GERROR and GERRORN: an error is active while the two differ.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Gerror {
    /// Command error; CMDQ_CONS.ERR says which.
    pub cmdq_err: bool,
    __: bool,
    /// Event queue write aborted.
    pub eventq_abt_err: bool,
    /// Page request queue write aborted.
    pub priq_abt_err: bool,
    /// CMD_SYNC MSI write aborted.
    pub msi_cmdq_abt_err: bool,
    /// Event queue MSI write aborted.
    pub msi_eventq_abt_err: bool,
    /// Page request queue MSI write aborted.
    pub msi_priq_abt_err: bool,
    /// Global error MSI write aborted.
    pub msi_gerror_abt_err: bool,
    /// Service failure mode.
    pub sfm_err: bool,
    /// Enhanced command queue error.
    pub cmdqp_err: bool,
    /// Device permission table fault.
    pub dpt_err: bool,
    #[bits(21)]
    __: u32,
}

/// x_IRQ_CFG2: attributes of an MSI write.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IrqCfg2 {
    /// STE.MemAttr encoding.
    #[bits(4)]
    pub memattr: u8,
    /// 0 and 1 non-shareable, 2 outer, 3 inner.
    #[bits(2)]
    pub sh: u8,
    #[bits(25)]
    __: u32,
    /// PRIQ_IRQ_CFG2 only: interrupt on a message with Last = 1 instead of on empty to non-empty.
    pub lo: bool,
}

/// STRTAB_BASE.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct StrtabBase {
    #[bits(6)]
    __: u8,
    /// Bits 55:6 of the address.
    #[bits(50)]
    pub addr_55_6: u64,
    #[bits(6)]
    __: u8,
    /// Read allocate.
    pub ra: bool,
    __: bool,
}

/// STRTAB_BASE_CFG.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct StrtabBaseCfg {
    /// log2 of the number of streams.
    #[bits(6)]
    pub log2size: u8,
    /// Two-level split: 6, 8 or 10 (others act as 6).
    #[bits(5)]
    pub split: u8,
    #[bits(5)]
    __: u8,
    /// 0 linear, 1 two-level (others act as 0).
    #[bits(2)]
    pub fmt: u8,
    #[bits(14)]
    __: u16,
}

/// CMDQ_BASE, EVENTQ_BASE and PRIQ_BASE.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct QueueBase {
    /// log2 of the number of entries.
    #[bits(5)]
    pub log2size: u8,
    /// Bits 55:5 of the address.
    #[bits(51)]
    pub addr_55_5: u64,
    #[bits(6)]
    __: u8,
    /// Read (command queue) or write allocate hint.
    pub allocate: bool,
    __: bool,
}

impl QueueBase {
    /// The address as written, bits 55:5.
    pub const fn address(self) -> u64 {
        self.addr_55_5() << 5
    }
}

/// OVFLG of EVENTQ_PROD and PRIQ_PROD, OVACKFLG of their CONS.
pub const OVERFLOW: u32 = 1 << 31;
/// CMDQ_CONS.ERR.
pub const CMDQ_ERR_SHIFT: u32 = 24;
/// Mask of an index with its wrap bit, before it is cut to the queue's size.
pub const INDEX_MASK: u32 = 0xf_ffff;

/// CMDQ_CONS.ERR codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CommandError {
    /// No error.
    None = 0,
    /// Illegal command.
    Ill = 1,
    /// The command could not be fetched.
    Abt = 2,
    /// A CMD_SYNC could not complete an earlier ATC invalidation.
    AtcInvSync = 3,
}

impl CommandError {
    /// From the code in CMDQ_CONS.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::None,
            1 => Self::Ill,
            2 => Self::Abt,
            3 => Self::AtcInvSync,
            _ => return None,
        })
    }
}

/// GATOS_SID.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GatosSid {
    /// StreamID.
    pub streamid: u32,
    /// SubstreamID.
    #[bits(20)]
    pub substreamid: u32,
    /// The SubstreamID counts.
    pub ssid_valid: bool,
    /// S_GATOS_SID only: a secure stream.
    pub ssec: bool,
    #[bits(10)]
    __: u16,
}

/// GATOS_ADDR.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GatosAddr {
    #[bits(4)]
    __: u8,
    /// S_GATOS_ADDR only.
    #[bits(2)]
    pub ns: u8,
    /// No flag updates.
    pub httui: bool,
    /// Instruction fetch.
    pub ind: bool,
    /// 1 read.
    pub rnw: bool,
    /// Privileged.
    pub pnu: bool,
    /// 1 stage 1, 2 stage 2, 3 both.
    #[bits(2)]
    pub kind: u8,
    /// Bits 63:12 of the address.
    #[bits(52)]
    pub addr_63_12: u64,
}
