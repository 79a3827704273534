//! What can go wrong after probing.

use core::fmt;

use portcullis_arch::Asid;
use portcullis_hal::Timeout;
use portcullis_pgtable::{ConfigError, Granule, MapError, ProtectError, UnmapError};
use thiserror::Error;

use super::{DomainKind, StreamError};

/// A request that the driver could not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The streams of a device cannot be entered.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// All context banks that could be used are in use.
    #[error(
        "no free context bank for a {kind} domain: all {usable} usable of {banks} banks are taken ({stage2_only} are \
         stage-2 only, {lost} given up after an invalidation that did not complete)"
    )]
    NoContextBank {
        /// The kind of domain.
        kind: DomainKind,
        /// Banks that could serve it.
        usable: usize,
        /// Banks that exist.
        banks: usize,
        /// Stage 2 only banks.
        stage2_only: usize,
        /// Banks no longer used.
        lost: usize,
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
    /// The parent of a nested domain is no stage 2 domain of this SMMU.
    #[error("the parent of a nested domain must be a stage 2 domain of the same SMMU, this one is {kind}")]
    Parent {
        /// What the parent is.
        kind: DomainKind,
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
    /// The operation needs a context bank.
    #[error("a {kind} domain has no context bank")]
    NoBank {
        /// The kind of domain.
        kind: DomainKind,
    },
    /// TLB entries are told apart by ASID, and this one tags another address space.
    #[error("{asid} tags the TLB entries of context bank {bank} already, which uses another table")]
    AsidInUse {
        /// The ASID.
        asid: Asid,
        /// Who uses it.
        bank: u8,
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
    /// The invalidation did not complete: entries may still be in use, memory behind them must not be reused.
    #[error("TLB sync timed out -- SMMU may be deadlocked ({scope}): {timeout}")]
    TlbSync {
        /// Where.
        scope: SyncScope,
        /// What was waited for.
        timeout: Timeout,
    },
    /// Nothing is stalled in the bank.
    #[error("no deferred fault in context bank {bank}")]
    NothingStalled {
        /// The bank.
        bank: u8,
    },
}

/// Which invalidation did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncScope {
    /// sTLBGSYNC.
    Global,
    /// CBn_TLBSYNC.
    Bank(u8),
}

impl fmt::Display for SyncScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global => f.write_str("global"),
            Self::Bank(bank) => write!(f, "context bank {bank}"),
        }
    }
}
