//! The hardware side of page tables: how an SMMU reads them, what it keeps of them, and how it forgets.
//!
//! [`stage`] holds the parameters of a translation; [`translate`] and [`long`]/[`short`] are the walker: they read
//! descriptors from memory, update their access flags and dirty state where that is on, and give a leaf or the fault
//! that the architecture names, with a [`record::Recorder`] that sees every word read (and compiles to nothing
//! when it does not care). [`tlb`] is the bounded TLB. [`tbu`] is a port: what a device holds, with its private
//! TLB, no lock on a hit and none on a miss whose configuration is cached. [`sync`] is the protocol between
//! ports and the SMMU that invalidates: an invalidation is complete only when no access that used the old
//! translation is still running.
//!
//! SMMU models supply configuration and record faults by implementing [`tbu::Tcu`].
#![forbid(unsafe_code)]

pub mod long;
pub mod perms;
pub mod record;
mod runs;
pub mod short;
mod slot;
pub mod split;
pub mod stage;
pub mod sync;
pub mod tbu;
pub mod tlb;
pub mod translate;
mod update;

pub use perms::{AccessKind, Perms};
pub use record::{NoRecord, Recorder, Rule, Step, Trace};
pub use stage::{
    AddressFormat, Fault, FaultKind, FlagUpdate, Flat, Leaf, Nested, Region, Split, Stage1, Stage2,
    TableFormat, Updates, Walked,
};
pub use sync::{Invalidation, Scope, StageScope, SyncLog, SyncToken};
pub use tbu::{CachedEntry, Context, Decoded, FaultOutcome, Resolution, Stats, Tbu, Tcu, Translated};
pub use tlb::{ContextKey, Regime, Tlb, TlbStage};
