//! Likely causes of what an [`Explanation`] says, in order, each with its evidence and what to check.
//!
//! Evidence comes from the SMMU itself: other stream match groups, neighbouring addresses, everything that is mapped, and
//! experiments on a copy of the registers. A guess that an experiment confirmed stands before one that it did not.

pub(crate) mod layout;
mod stream;
pub(crate) mod translation;
pub(crate) mod walk_end;

use std::fmt;

use portcullis_arch::{StreamId, zynqmp};
use portcullis_bus::{Memory, StaleRead};
use portcullis_smmuv2::{Explanation, Outcome, SmmuV2};
use portcullis_walk::{CachedEntry, FaultKind};
use serde::Serialize;

use crate::outcome;
use crate::probe::Probe;
use crate::record::{ContextRecord, fault_bits};
use crate::story;

/// What the SMMU cannot know and its surroundings can. The default knows nothing, and everything still works.
#[derive(Clone, Copy, Debug, Default)]
pub struct CauseContext<'a> {
    /// Stream ids are those of a Zynq UltraScale+.
    pub zynqmp: bool,
    /// RAM as `(base, size)`.
    pub ram: &'a [(u64, u64)],
    /// Stale reads that were reported around the transaction or its explanation.
    pub stale: &'a [StaleRead],
    /// The TLB entry that the transaction would hit.
    pub cached: Option<CachedEntry>,
    /// The transaction went through, whatever registers and tables say (see [`Seen::passed`](crate::Seen::passed)).
    pub passed: bool,
    /// Names of masters by stream, such as their device-tree nodes.
    pub names: &'a [(StreamId, String)],
    /// What was unmapped from the transaction's address space, the latest last.
    pub unmapped: &'a [Unmapped],
}

/// A range of an address space that was unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmapped {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// Nanoseconds between the unmapping and the transaction.
    pub ago_ns: u64,
}

impl CauseContext<'_> {
    /// True if `pa` is RAM; false also if no RAM is known.
    pub(crate) fn is_ram(&self, pa: u64) -> bool {
        self.ram.iter().any(|(base, size)| pa.wrapping_sub(*base) < *size)
    }

    /// What is at a physical address.
    pub(crate) fn place(&self, pa: u64) -> &'static str {
        match (self.ram.is_empty(), self.is_ram(pa)) {
            (true, _) => "whatever is there",
            (_, true) => "RAM",
            (_, false) => "not RAM",
        }
    }

    /// `stream 0x14e8 (FPD DMA channel 0 (...), dma@fd500000)`.
    pub(crate) fn describe(&self, stream: StreamId) -> String {
        let mut known: Vec<String> = Vec::new();
        if self.zynqmp {
            known.extend(zynqmp::decode(stream).map(|d| d.to_string()));
        }
        known.extend(self.names.iter().filter(|(s, _)| *s == stream).map(|(_, n)| n.clone()));
        if known.is_empty() {
            return format!("stream {stream:#x}");
        }
        format!("stream {stream:#x}: {}", known.join(", "))
    }
}

/// The kind of a cause, for machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CauseKind {
    /// A stream match register holds an id that no master sends, or another port's, instead of this stream.
    WrongStreamId,
    /// No stream match register is meant for this stream.
    MissingStreamMapping,
    /// A stream match register holds this stream but is not valid.
    InvalidStreamMatch,
    /// The group for this stream belongs to the other security state.
    OtherSecurityState,
    /// The stream id is wider than this SMMU takes.
    StreamIdTooWide,
    /// Several groups match.
    StreamMatchConflict,
    /// S2CR says fault: no domain is attached.
    NoDomainAttached,
    /// S2CR or CBAR name a bank that does not exist for this stream.
    MissingBank,
    /// CBAR.TYPE cannot be used.
    UnusableBank,
    /// A secure instruction fetch from non-secure memory.
    SecureInstructionFetch,
    /// The transaction passes untranslated: its address is used as physical.
    Bypass,
    /// SCTLR.M = 0: the bank does not translate.
    TranslationOff,
    /// An earlier fault of the bank is not cleared.
    UnclearedFault,
    /// The TLB holds something else than the tables.
    MissingTlbInvalidation,
    /// The walker read a descriptor that the CPU had not written back from its cache.
    TablesNotCleaned,
    /// The data that was accessed is stale.
    BufferNotMaintained,
    /// T0SZ, start level, granule or PASize do not fit the tables.
    LayoutMismatch,
    /// TTBR does not point to tables.
    WrongTableBase,
    /// The address is outside of what TTBR0 and TTBR1 cover.
    AddressOutOfRange,
    /// The access ran past the end of a mapping.
    PastTheEnd,
    /// The access begins before a mapping.
    BeforeTheBegin,
    /// The upper half of the address is missing.
    TruncatedAddress,
    /// A physical address where a DMA address is expected.
    PhysicalAddress,
    /// A CPU's virtual address where a DMA address is expected.
    CpuVirtualAddress,
    /// Nothing is mapped there, and nobody knows of an unmapping.
    NotMapped,
    /// It was mapped, and has been unmapped.
    UsedAfterUnmap,
    /// PASize is smaller than the addresses in the tables.
    OutputSizeTooSmall,
    /// A descriptor holds an address that this SMMU cannot put out.
    DamagedDescriptor,
    /// A write to what is mapped read-only.
    ReadOnly,
    /// A read of what is mapped write-only.
    WriteOnly,
    /// An unprivileged access to what is privileged only.
    PrivilegedOnly,
    /// Data read as instructions.
    InstructionFetch,
    /// The access flag is clear.
    AccessFlagClear,
    /// A table is where no memory answers.
    TableOutsideMemory,
    /// Stage 2 does not map what stage 1 needs.
    Stage2NotMapped,
    /// Stage 2 forbids it.
    Stage2Forbids,
    /// SMMUv3: the SMMU is off, and GBPA decides.
    SmmuOff,
    /// SMMUv3: a stream table entry that is not valid (V = 0).
    InvalidStreamEntry,
    /// SMMUv3: a stream table entry that breaks a rule.
    IllegalStreamEntry,
    /// SMMUv3: a context descriptor that is not valid (V = 0).
    InvalidContextDescriptor,
    /// SMMUv3: a context descriptor that breaks a rule.
    IllegalContextDescriptor,
    /// SMMUv3: nobody is bound to this substream (PASID).
    SubstreamNotBound,
    /// SMMUv3: the stream does not take substreams, or not so many.
    SubstreamsOff,
    /// SMMUv3: STE.S1DSS does not allow this kind of transaction.
    StreamDisabled,
    /// SMMUv3: CD.EPD stops walks for the address.
    WalksDisabled,
    /// SMMUv3: the stream table, or a table of context descriptors, is where no memory answers.
    ConfigOutsideMemory,
    /// SMMUv3: the configuration cache holds something else than the stream table or the context descriptors.
    MissingConfigInvalidation,
}

/// One likely cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// For machines.
    pub kind: CauseKind,
    /// What is probably wrong, in one sentence.
    pub what: String,
    /// What speaks for it.
    pub evidence: Vec<String>,
    /// What to check or change.
    pub fix: String,
}

impl Cause {
    pub(crate) fn new(kind: CauseKind, what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { kind, what: what.into(), evidence: Vec::new(), fix: fix.into() }
    }
    pub(crate) fn because(mut self, evidence: impl Into<String>) -> Self {
        self.evidence.push(evidence.into());
        self
    }
    pub(crate) fn because_all(mut self, evidence: impl IntoIterator<Item = String>) -> Self {
        self.evidence.extend(evidence);
        self
    }
}

/// The sentence, then evidence and remedy on lines of their own.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.evidence.iter().try_for_each(|e| write!(f, "\n    because: {e}"))?;
        write!(f, "\n    check:   {}", self.fix)
    }
}

/// Likely causes of how a transaction ended, the likeliest first. Empty if it was translated and nothing is odd.
///
/// `smmu` should be as it was when `e` was made; faults recorded since do not matter. Descriptors are read again through the
/// SMMU's walker, so a model of CPU caches may report stale reads: take reports that are wanted before calling this.
pub fn causes<M: Memory>(smmu: &SmmuV2<M>, e: &Explanation, ctx: &CauseContext<'_>) -> Vec<Cause> {
    let Some(probe) = Probe::of(smmu) else { return Vec::new() };
    if let Outcome::Blocked { bank, .. } = e.outcome {
        return blocked(&probe, e, ctx, bank);
    }
    probe.clear_faults();
    let mut found = Vec::new();
    found.extend(ctx.cached.filter(|c| story::stale_entry(e, c)).map(|c| stale_tlb(e, &c)));
    found.extend(of_outcome(&probe, e, ctx));
    found
}

fn of_outcome<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Vec<Cause> {
    match &e.outcome {
        Outcome::Bypass { reason, pa, .. } => stream::bypass(probe, e, ctx, *reason, pa.get()),
        Outcome::Global { fault, nested, .. } => stream::global(probe, e, ctx, *fault, *nested),
        Outcome::Translated { walked, .. } => {
            walk_end::translated(e, ctx, walked.pa, walked.size_log2).into_iter().collect()
        }
        Outcome::Fault { fault, incoming } => {
            let mut found: Vec<Cause> = walk_end::stale_tables(&e.walk, ctx).into_iter().collect();
            found.extend(match fault.kind {
                FaultKind::Translation => translation::causes(probe, e, ctx, fault),
                FaultKind::AddressSize => walk_end::address_size(probe, e, ctx, fault),
                FaultKind::AccessFlag => walk_end::access_flag(e, fault),
                FaultKind::Permission => walk_end::permission(probe, e, fault, *incoming),
                FaultKind::External => walk_end::external(probe, e, ctx, fault),
            });
            found
        }
        Outcome::Blocked { .. } => Vec::new(),
    }
}

/// The bank refuses everything because of a fault that came first: that one is the cause, and it has causes of its own.
fn blocked<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>, bank: u8) -> Vec<Cause> {
    let record = ContextRecord::of(probe, bank);
    let bits = fault_bits(record.fsr);
    let mut first = Cause::new(
        CauseKind::UnclearedFault,
        format!("context bank {bank} still holds an earlier fault ({bits}) and refuses everything until it is cleared"),
        format!(
            "handle the recorded fault first, then write FSR back to itself (W1C){}; if the interrupt handler should have \
             done so, check that its interrupt reaches the CPU (SCTLR.CFIE; on ZynqMP boot code must unmask SMMU_REG.IER_0)",
            if record.fsr >> 30 & 1 != 0 { ", then RESUME" } else { "" }
        ),
    )
    .because(format!("recorded: {record}"))
    .because("SCTLR.HUPCF=0: after a fault all transactions of the bank are terminated, also those that hit the TLB");
    probe.clear_faults();
    let (from, va, access) = record.transaction();
    let earlier = (from.stream, va, access) != (e.from.stream, e.va, e.access);
    let again = probe.explain(e.from, e.va.get(), e.access);
    first = first.because(match again.outcome {
        Outcome::Translated { walked, .. } => {
            format!("without that fault this transaction would be translated to {:#x}", walked.pa)
        }
        Outcome::Fault { fault, .. } => {
            format!("without that fault this transaction would get a {}", outcome::fault_name(fault.kind))
        }
        _ => "without that fault this transaction would not be translated either".into(),
    });
    let mut found = vec![first];
    if earlier {
        found.extend(of_outcome(probe, &probe.explain(from, va.get(), access), ctx));
    } else {
        found.extend(of_outcome(probe, &again, ctx));
    }
    found
}

fn stale_tlb(e: &Explanation, cached: &CachedEntry) -> Cause {
    let tables = match e.outcome {
        Outcome::Translated { walked, .. } => format!("the tables now say {:#x}", walked.pa),
        _ => "the tables no longer map it".into(),
    };
    Cause::new(
        CauseKind::MissingTlbInvalidation,
        format!("the TLB still translates {:#x} to {:#x}: missing TLB invalidation", e.va, cached.pa),
        "after changing or removing a descriptor write TLBIVA or TLBIVAL (VA>>12, ASID in 63:48), or TLBIASID, then TLBSYNC \
         and wait for TLBSTATUS.SACTIVE=0",
    )
    .because(tables)
    .because("a TLB hit does not read the tables")
}
