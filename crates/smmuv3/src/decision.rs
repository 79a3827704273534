//! The seam between the configuration look-up (`lookup`) and the rest of the model: what the look-up needs, and what it
//! says becomes of a transaction before any of its own translation tables is read.

use bitfield_struct::bitfield;
use portcullis_arch::Attributes;
use portcullis_arch::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa};
use portcullis_arch::smmuv3::{EventCode, Ste};
use portcullis_walk::{Context, Fault, Updates};

use crate::caps::{Caps, StallModel};

/// The registers of one programming interface on which look-ups depend. `cr0` is what CR0ACK shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableRegs {
    /// The secure interface.
    pub secure: bool,
    /// The stall model that this interface shows: the implementation's, but for the non-secure one terminate only while
    /// S_CR0.NSSTALLD takes stalls from it.
    pub stall_model: StallModel,
    pub cr0: Cr0,
    pub cr1: Cr1,
    pub cr2: Cr2,
    pub gbpa: Gbpa,
    pub strtab_base: u64,
    pub strtab_base_cfg: u32,
}

/// What a look-up reads from.
pub(crate) struct View<'a, M> {
    pub caps: &'a Caps,
    pub regs: TableRegs,
    pub memory: &'a M,
    /// Whether access flags of stage 2 may be set on the way to a CD.
    pub updates: Updates,
    /// STE.PRIVCFG and INSTCFG count (not for address translation operations).
    pub overrides: bool,
}

impl<'a, M> View<'a, M> {
    /// What a transaction's look-up sees.
    pub fn new(caps: &'a Caps, regs: TableRegs, memory: &'a M) -> Self {
        Self { caps, regs, memory, updates: Updates::Apply, overrides: true }
    }
}

/// Why a transaction passes untranslated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BypassReason {
    /// SMMUEN is 0 and GBPA.ABORT is 0.
    Disabled,
    /// STE.Config is bypass.
    Stream,
    /// STE.S1DSS bypasses stage 1 and there is no stage 2.
    NoSubstream,
    /// Its address is translated already (ATS).
    Translated,
}

/// Why a transaction is aborted without an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SilentAbort {
    /// SMMUEN is 0 and GBPA.ABORT is 1.
    Disabled,
    /// SMMUEN is 0 and the address is above OAS.
    DisabledRange,
    /// STE.Config is 0xx.
    Stream,
}

/// What the walk's faults need of the STE and CD: travels as `Context::token` and comes back with a fault.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub(crate) struct FaultFlags {
    /// CD.A.
    pub s1_abort: bool,
    /// CD.R.
    pub s1_record: bool,
    /// CD.S.
    pub s1_stall: bool,
    /// STE.S2R.
    pub s2_record: bool,
    /// STE.S2S.
    pub s2_stall: bool,
    /// STE.MEV.
    pub merge: bool,
    /// Stage 1 is off or bypassed: a stage 1 F_ADDR_SIZE is always aborted and recorded.
    pub flat: bool,
    /// In a [`ConfigFault`] with PnU and InD in its record (0x0b to 0x13): the transaction is privileged, after the
    /// STE's overrides. (A walk's fault takes it from `Context::incoming`.)
    pub privileged: bool,
    /// The same: it is an instruction fetch, after the STE's overrides (writes never are).
    pub instruction: bool,
    #[bits(55)]
    __: u64,
}

/// A configuration error, or a stage 2 fault of a CD fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConfigFault {
    /// The event's code. 0x10 to 0x13 and F_WALK_EABT mean a stage 2 fault of a CD fetch (`stage2` is set). One
    /// exception: F_PERMISSION without `stage2` is a secure stream's instruction fetch that leaves a bypassed stage 1
    /// non-secure while S_CR0.SIF is 1 (S2 = 0, CLASS = IN, always aborted and recorded).
    pub code: EventCode,
    /// The SubstreamID that the event shows, if it shows one.
    pub ssid: Option<u32>,
    /// Address of a fetch that aborted (F_STE_FETCH, F_CD_FETCH).
    pub fetch: u64,
    /// The stage 2 fault of a CD fetch.
    pub stage2: Option<Fault>,
    /// STE.S2R, S2S and MEV, where an STE was read.
    pub flags: FaultFlags,
}

/// What becomes of a transaction.
#[derive(Clone, Debug)]
pub(crate) enum Decision {
    /// Aborted, no event.
    Silent(SilentAbort),
    /// Passes. Addresses of more than `limit_bits` bits are refused: silently while SMMUEN is 0, as F_ADDR_SIZE
    /// otherwise.
    Bypass { attrs: Attributes, reason: BypassReason, limit_bits: u8 },
    /// Goes through translation.
    Translate(Box<Context>),
    /// Refused with an event (unless R, RECINVSID or the like suppress it).
    Fault(ConfigFault),
}

/// What was read on the way, for explanations and ATS.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Trail {
    /// Level 1 stream table descriptor: address and value.
    pub l1std: Option<(u64, u64)>,
    /// STE: address and words.
    pub ste: Option<(u64, Ste)>,
    /// Level 1 context descriptor: address and value.
    pub l1cd: Option<(u64, u64)>,
    /// CD: address (PA) and words.
    pub cd: Option<(u64, portcullis_arch::smmuv3::Cd)>,
    /// Reads and writes of this initiator end differently, so the answer must not be kept for the other (only with
    /// S_CR0.SIF).
    pub only_this: bool,
    /// The field and rule that decided, in words (`"STE.Config = 0b000: abort"`).
    pub rule: &'static str,
}
