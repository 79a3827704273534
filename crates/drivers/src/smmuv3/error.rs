//! What can go wrong after probing.

use core::fmt;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::smmuv3::regs::CommandError;
use portcullis_arch::{Asid, StreamId, SubstreamId};
use portcullis_hal::Timeout;
use portcullis_pgtable::{ConfigError, Granule, MapError, ProtectError, UnmapError};
use thiserror::Error;

use crate::ops::DomainKind;

/// The registers that tell why a command queue does not move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueRegisters {
    /// CMDQ_PROD.
    pub prod: u32,
    /// CMDQ_CONS, with the error code in bits 30:24.
    pub cons: u32,
    /// GERROR.
    pub gerror: u32,
    /// GERRORN.
    pub gerrorn: u32,
}

impl fmt::Display for QueueRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { prod, cons, gerror, gerrorn } = self;
        write!(f, "PROD {prod:#010x}, CONS {cons:#010x}, GERROR {gerror:#010x}, GERRORN {gerrorn:#010x}")
    }
}

/// A request that the driver could not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A register did not get the value that was waited for.
    #[error(transparent)]
    Register(#[from] Timeout),
    /// The command queue did not get on. Invalidations may not have happened: what they were for must not be reused.
    #[error("timed out after {waited_us} us waiting for {what}: {seen}")]
    CommandQueue {
        /// What was waited for ("CMD_SYNC", "room in the command queue").
        what: &'static str,
        /// How long.
        waited_us: u64,
        /// The registers at the end.
        seen: QueueRegisters,
    },
    /// The SMMU refused a command or could not carry it out.
    #[error("the SMMU stopped with {code:?} at command {:#018x} {:#018x}", .command.0[0], .command.0[1])]
    Command {
        /// CMDQ_CONS.ERR.
        code: CommandError,
        /// The command.
        command: Command,
    },
    /// More at once than a queue holds.
    #[error("{wanted} commands at once, the queue holds {room}")]
    QueueTooSmall {
        /// Commands.
        wanted: usize,
        /// Entries that can be used.
        room: usize,
    },
    /// No memory.
    #[error("no memory for {what} of {bytes} bytes")]
    NoMemory {
        /// "the stream table" or the like.
        what: &'static str,
        /// Size asked for.
        bytes: usize,
    },
    /// The platform's memory lies where the SMMU cannot reach.
    #[error("{what} at pa {pa:#x} does not fit into {bits} address bits")]
    TableAddress {
        /// "the stream table" or the like.
        what: &'static str,
        /// Where the platform put it.
        pa: u64,
        /// Output address bits of the SMMU.
        bits: u8,
    },
    /// The device has no stream.
    #[error("the device has no stream id")]
    NoStream,
    /// The stream id does not fit.
    #[error("stream {stream} is out of range: the SMMU has {bits} bits of stream ids")]
    StreamRange {
        /// The stream.
        stream: StreamId,
        /// IDR1.SIDSIZE.
        bits: u8,
    },
    /// A mask of stream ids; SMMUv3 looks streams up one by one.
    #[error("stream {stream} with mask {mask:#x}: an SMMUv3 has no stream matching")]
    StreamMask {
        /// The stream.
        stream: StreamId,
        /// Its mask.
        mask: u32,
    },
    /// A device shares a stream with another one, but wants it to behave differently.
    #[error("stream {stream} is in use with other options (substreams, stalls, ATS)")]
    StreamOptions {
        /// The stream.
        stream: StreamId,
    },
    /// The stream was not entered.
    #[error("stream {stream} belongs to no device")]
    UnknownStream {
        /// The stream.
        stream: StreamId,
    },
    /// The substream id does not fit, or the stream has none.
    #[error(
        "substream {substream} of stream {stream} is out of range: the stream has {bits} bits of substream ids"
    )]
    SubstreamRange {
        /// The stream.
        stream: StreamId,
        /// The substream.
        substream: SubstreamId,
        /// Bits of this stream.
        bits: u8,
    },
    /// Somebody else uses the substream.
    #[error("substream {substream} of stream {stream} is in use")]
    SubstreamInUse {
        /// The stream.
        stream: StreamId,
        /// The substream.
        substream: SubstreamId,
    },
    /// While substreams are in use, the stream itself needs a stage 1, identity or blocked domain.
    #[error("substreams of stream {stream} are in use, which a {kind} domain for the stream does not allow")]
    SubstreamsBelow {
        /// The stream.
        stream: StreamId,
        /// The kind of domain.
        kind: DomainKind,
    },
    /// Only stage 1 and process domains fit below a substream.
    #[error("a {kind} domain cannot be attached to a substream")]
    NotForSubstreams {
        /// The kind of domain.
        kind: DomainKind,
    },
    /// The hardware lacks the stage or stages.
    #[error("this SMMU has no {what}, which a {kind} domain needs")]
    MissingStage {
        /// The kind of domain.
        kind: DomainKind,
        /// "stage 1 translation" or the like.
        what: &'static str,
    },
    /// The hardware lacks the granule.
    #[error("this SMMU does not walk tables with a {granule} granule")]
    MissingGranule {
        /// The granule.
        granule: Granule,
    },
    /// A feature that was asked for is missing.
    #[error("this SMMU has no {what}")]
    MissingFeature {
        /// "ATS" or the like.
        what: &'static str,
    },
    /// The parent of a nested domain is no stage 2 domain of this SMMU.
    #[error("the parent of a nested domain must be a stage 2 domain of the same SMMU, this one is {kind}")]
    Parent {
        /// What the parent is.
        kind: DomainKind,
    },
    /// A guest's stream table entry has bits that a guest does not decide about, or that make no sense.
    #[error(
        "the guest's stream table entry has bits {bits:#x} in word {word}, which are not the guest's to set"
    )]
    GuestEntry {
        /// Word of the entry.
        word: u8,
        /// The bits.
        bits: u64,
    },
    /// A guest's command that is not passed on.
    #[error("a guest's command with opcode {opcode:#04x} is not passed on")]
    GuestCommand {
        /// The opcode.
        opcode: u8,
    },
    /// A device and a domain of different SMMUs.
    #[error("the domain belongs to another SMMU than the device")]
    OtherInstance,
    /// The operation needs tables of this driver.
    #[error("a {kind} domain has no page table of its own to {operation}")]
    NoPageTable {
        /// The kind of domain.
        kind: DomainKind,
        /// "map" or the like.
        operation: &'static str,
    },
    /// The operation needs a tag for TLB entries.
    #[error("a {kind} domain translates nothing")]
    NoContext {
        /// The kind of domain.
        kind: DomainKind,
    },
    /// All address space identifiers are in use.
    #[error("all {count} {what} are in use")]
    NoIdentifier {
        /// "ASIDs" or "VMIDs".
        what: &'static str,
        /// How many there are.
        count: u32,
    },
    /// TLB entries are told apart by ASID, and this one tags another address space.
    #[error("{asid} tags the TLB entries of another address space")]
    AsidInUse {
        /// The ASID.
        asid: Asid,
    },
    /// The ASID has more bits than the SMMU tells apart.
    #[error("{asid} does not fit into the {bits} bits of this SMMU")]
    AsidRange {
        /// The ASID.
        asid: Asid,
        /// 8 or 16.
        bits: u8,
    },
    /// A page table cannot be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A range cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A range cannot be unmapped.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// A range's protection cannot be changed.
    #[error(transparent)]
    Protect(#[from] ProtectError),
    /// Somebody else has been changing stream or context descriptors for too long.
    #[error("gave up after {waited_us} us waiting for another change of stream table entries to finish")]
    ConfigurationBusy {
        /// How long.
        waited_us: u64,
    },
    /// Nothing is stalled there.
    #[error("stream {stream} has no stalled transaction with tag {stag:#x} that waits for an answer")]
    NothingStalled {
        /// The stream.
        stream: StreamId,
        /// STAG.
        stag: u16,
    },
    /// No page request group waits there.
    #[error("stream {stream} has no page request group {group} that waits for an answer")]
    NothingRequested {
        /// The stream.
        stream: StreamId,
        /// Page request group index.
        group: u16,
    },
}
