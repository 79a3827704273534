//! What an IOMMU driver tells about a fault, and what the owner of the device may answer.
//!
//! [`FaultReport`] is the part that all IOMMUs have in common, with the driver's own record in
//! [`FaultReport::detail`]. Every fault goes to a [`FaultHandler`] if there is one, and into the driver's
//! [`FaultLog`], so that none disappears unseen.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::{Access, Iova, Ipa, StreamId, SubstreamId};

use crate::smmuv2::{ContextFault, GlobalFault};
use crate::smmuv3;

/// Why a transaction was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultReason {
    /// No valid translation for the address.
    Translation,
    /// The access flag of the leaf is clear.
    AccessFlag,
    /// The translation forbids this kind of access.
    Permission,
    /// An address in a table, or the result, is wider than configured.
    AddressSize,
    /// A table walk, or the access itself, met an error on the bus.
    ExternalAbort,
    /// The TLB holds two answers.
    TlbConflict,
    /// No stream table entry matches.
    UnknownStream,
    /// More than one stream table entry matches.
    StreamConflict,
    /// The stream is configured to fault, or its context cannot be used.
    InvalidContext,
    /// The transaction is of a kind that the IOMMU does not support.
    Unsupported,
    /// An access to the IOMMU's own registers was refused.
    RegisterAccess,
    /// None of these.
    Other,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Translation => "translation fault",
            Self::AccessFlag => "access flag fault",
            Self::Permission => "permission fault",
            Self::AddressSize => "address size fault",
            Self::ExternalAbort => "external abort",
            Self::TlbConflict => "TLB conflict",
            Self::UnknownStream => "unknown stream",
            Self::StreamConflict => "stream match conflict",
            Self::InvalidContext => "invalid context",
            Self::Unsupported => "unsupported transaction",
            Self::RegisterAccess => "configuration access fault",
            Self::Other => "other fault",
        })
    }
}

/// One fault, in terms that every IOMMU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// Why.
    pub reason: FaultReason,
    /// Who, if the hardware tells.
    pub stream: Option<StreamId>,
    /// Its address space of that device, if the transaction named one.
    pub substream: Option<SubstreamId>,
    /// The address as the device issued it.
    pub iova: Iova,
    /// For a fault of stage 2: the address that stage 2 was asked for.
    pub ipa: Option<Ipa>,
    /// Read or write.
    pub access: Access,
    /// A privileged access.
    pub privileged: bool,
    /// An instruction fetch.
    pub instruction: bool,
    /// The stage that faulted, 1 or 2; `None` before translation began.
    pub stage: Option<u8>,
    /// Table level of the fault, 0 to 3.
    pub level: Option<u8>,
    /// The context bank that recorded it.
    pub bank: Option<u8>,
    /// The transaction waits for an answer.
    pub stalled: bool,
    /// The driver's own record with the raw registers.
    pub detail: FaultDetail,
}

/// The record of the driver that reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultDetail {
    /// A context fault of an SMMUv2.
    SmmuV2Context(ContextFault),
    /// A global fault of an SMMUv2.
    SmmuV2Global(GlobalFault),
    /// An event record of an SMMUv3.
    SmmuV3Event(smmuv3::evtq::Record),
    /// A page request that reached an SMMUv3.
    SmmuV3Page(smmuv3::priq::PageRequest),
    /// A global error of an SMMUv3; all other fields of the report say nothing.
    SmmuV3Global(smmuv3::gerror::GlobalError),
    /// A hypervisor told it through a virtual IOMMU; there is no record.
    Virtual,
    /// Records of an SMMUv3's queue were lost; all other fields of the report say nothing.
    SmmuV3Lost(smmuv3::fault::Source, smmuv3::evtq::Lost),
}

impl fmt::Display for FaultReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.detail {
            FaultDetail::SmmuV3Global(error) => return write!(f, "global error: {error}"),
            FaultDetail::SmmuV3Lost(queue, lost) => return write!(f, "{queue:?} lost: {lost:?}"),
            _ => write!(f, "{}: ", self.reason)?,
        }
        if let Some(stream) = self.stream {
            write!(f, "stream {stream} ")?;
        }
        if let Some(substream) = self.substream {
            write!(f, "substream {substream} ")?;
        }
        let privilege = if self.privileged { "privileged" } else { "unprivileged" };
        let kind = if self.instruction { " instruction" } else { "" };
        write!(f, "{privilege}{kind} {} of iova {:#x}", self.access, self.iova)?;
        if let Some(ipa) = self.ipa {
            write!(f, " (ipa {ipa:#x})")?;
        }
        if let Some(stage) = self.stage {
            write!(f, ", stage {stage}")?;
        }
        if let Some(level) = self.level {
            write!(f, " level {level}")?;
        }
        if let Some(bank) = self.bank {
            write!(f, ", context bank {bank}")?;
        }
        if self.stalled { f.write_str(", stalled") } else { Ok(()) }
    }
}

/// What becomes of the transaction. Matters only if it is stalled; a terminated one is gone already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultResponse {
    /// The cause is gone: try again.
    Resolved,
    /// Refuse it.
    Terminate,
    /// Somebody will decide later and then call the driver (`resume_stalled`).
    Deferred,
}

/// The owner of a device, or of a domain, that wants to know about faults.
///
/// Called without a lock of the driver, so it may map, unmap, attach and detach. A handler that answers
/// [`FaultResponse::Terminate`] to everything is an observer. Closures are handlers.
pub trait FaultHandler: Send + Sync {
    /// One fault.
    fn fault(&self, report: &FaultReport) -> FaultResponse;
}

impl<F: Fn(&FaultReport) -> FaultResponse + Send + Sync> FaultHandler for F {
    fn fault(&self, report: &FaultReport) -> FaultResponse {
        self(report)
    }
}

/// What [`FaultLog::take`] gives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultBatch {
    /// The faults since the last time, oldest first.
    pub faults: Vec<FaultReport>,
    /// Faults since the last time that did not fit; the oldest are kept, because they are the causes.
    pub lost: u64,
}

/// A bounded queue of faults.
#[derive(Debug)]
pub struct FaultLog {
    queue: VecDeque<FaultReport>,
    capacity: usize,
    lost: u64,
    total: u64,
}

impl FaultLog {
    /// A log that holds up to `capacity` faults.
    pub fn new(capacity: usize) -> Self {
        Self { queue: VecDeque::new(), capacity, lost: 0, total: 0 }
    }

    /// Appends a fault, or counts it as lost.
    pub fn push(&mut self, report: FaultReport) {
        self.total = self.total.saturating_add(1);
        if self.queue.len() < self.capacity {
            self.queue.push_back(report);
        } else {
            self.lost = self.lost.saturating_add(1);
        }
    }

    /// Takes all faults out and resets the count of lost ones.
    pub fn take(&mut self) -> FaultBatch {
        FaultBatch { faults: self.queue.drain(..).collect(), lost: core::mem::take(&mut self.lost) }
    }

    /// All faults ever, kept or lost.
    pub fn total(&self) -> u64 {
        self.total
    }
}
