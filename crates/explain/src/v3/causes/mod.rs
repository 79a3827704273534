//! Likely causes of what an SMMUv3 did, in order, each with its evidence and what to check. Guesses are tried on a copy
//! of the SMMU over patched memory: one that an experiment confirmed stands before one that it did not.

mod config;
mod translation;
mod walk_end;

use portcullis_arch::smmuv3::EventCode;
use portcullis_bus::Memory;
use portcullis_smmuv3::{BypassReason, Explanation, Outcome, SilentAbort, SmmuV3};
use portcullis_walk::FaultKind;

use crate::causes::walk_end as shared;
use crate::causes::{Cause, CauseContext, CauseKind};
use crate::v3::probe::Probe;
use crate::v3::story::{self, Seen, Stale};

/// Likely causes of how a transaction through an SMMUv3 ended, the likeliest first. Empty if it was translated and nothing
/// is odd.
///
/// `smmu` should be as it was when `e` was made; faults recorded since do not matter. Descriptors are read again through
/// the SMMU's memory, so a model of CPU caches may report stale reads: take reports that are wanted before calling this.
pub fn causes_v3<M: Memory>(smmu: &SmmuV3<M>, e: &Explanation, ctx: &CauseContext<'_>) -> Vec<Cause> {
    let Some(probe) = Probe::of(smmu) else { return Vec::new() };
    let seen = Seen { cached: ctx.cached, passed: ctx.passed, asked: false };
    if let Some(stale) = story::stale(e, &seen) {
        let first = stale_answer(e, &stale);
        // Behind it, why the tables would refuse.
        return std::iter::once(first).chain(of_outcome(&probe, e, ctx)).collect();
    }
    of_outcome(&probe, e, ctx)
}

fn of_outcome<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Vec<Cause> {
    let tables =
        || shared::stale_tables(&e.cd_walk, ctx).into_iter().chain(shared::stale_tables(&e.walk, ctx));
    match &e.outcome {
        Outcome::Bypass { reason, pa, .. } => bypass(e, ctx, *reason, pa.get()).into_iter().collect(),
        Outcome::Silent(why) => vec![silent(probe, e, ctx, *why)],
        Outcome::Translated { walked, .. } => {
            tables().chain(shared::stale_buffer(ctx, walked.pa, walked.size_log2)).collect()
        }
        Outcome::Event { record, fault, .. } => {
            let mut found: Vec<Cause> = config::stale_words(e, ctx).into_iter().chain(tables()).collect();
            found.extend(match fault {
                None => config::causes(probe, e, ctx, record.code()),
                Some(fault) => match fault.kind {
                    FaultKind::Translation => translation::causes(probe, e, ctx, fault),
                    FaultKind::AddressSize => walk_end::address_size(probe, e, ctx, fault),
                    FaultKind::AccessFlag => walk_end::access_flag(probe, e, fault),
                    FaultKind::Permission => walk_end::permission(probe, e, fault),
                    FaultKind::External => walk_end::external(probe, e, ctx, fault),
                },
            });
            found
        }
    }
}

/// Hardware used what it had looked up before.
fn stale_answer(e: &Explanation, stale: &Stale) -> Cause {
    let say = story::tables_say(e);
    let (stream, va) = (e.from.stream, e.va);
    match stale {
        Stale::Tlb(c) => Cause::new(
            CauseKind::MissingTlbInvalidation,
            format!("the TLB still translates {va:#x} to {:#x}: missing TLB invalidation", c.pa),
            "after changing or removing a descriptor send CMD_TLBI_NH_VA (VMID, ASID, address) or CMD_TLBI_NH_ASID, for stage 2 \
             CMD_TLBI_S2_IPA and CMD_TLBI_NH_ALL, then CMD_SYNC and wait for it; for a stream with ATS CMD_ATC_INV and another \
             CMD_SYNC after that",
        )
        .because(say)
        .because("a TLB hit does not read the tables"),
        Stale::Both(_) | Stale::Config => {
            let fix = "after changing an STE send CMD_CFGI_STE for the stream (Leaf=0 if its L1STD changed too), after changing a CD \
                       CMD_CFGI_CD with its SubstreamID, then CMD_SYNC; what may live in TLB entries (table addresses, sizes, ASID, VMID) \
                       needs a CMD_TLBI after it as well";
            let what = format!("the SMMU still uses an older STE or CD of stream {stream:#x}: missing CMD_CFGI");
            Cause::new(CauseKind::MissingConfigInvalidation, what, fix)
                .because(say)
                .because("configuration caches may keep an STE or CD, valid or not, until CMD_CFGI names it")
        }
    }
}

/// Causes of a transaction that passes untranslated. A stream that is told to pass needs none.
fn bypass(e: &Explanation, ctx: &CauseContext<'_>, reason: BypassReason, pa: u64) -> Option<Cause> {
    if reason != BypassReason::Disabled {
        return None;
    }
    let cause = Cause::new(
        CauseKind::SmmuOff,
        "not translated: the SMMU is off (CR0.SMMUEN=0) and GBPA.ABORT=0, as after reset",
        "set GBPA.ABORT before anything else, then stream table, queues and CR0.SMMUEN=1, and wait for CR0ACK",
    );
    Some(cause.because(format!("{:#x} is used as physical address {pa:#x} ({})", e.va, ctx.place(pa))))
}

fn silent<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    why: SilentAbort,
) -> Cause {
    match why {
        SilentAbort::Disabled => Cause::new(
            CauseKind::SmmuOff,
            "everything is aborted: the SMMU is off (CR0.SMMUEN=0) and GBPA.ABORT=1",
            "enable the SMMU (CR0.SMMUEN=1, CR0ACK), or clear GBPA.ABORT by its Update protocol",
        ),
        SilentAbort::DisabledRange => Cause::new(
            CauseKind::AddressOutOfRange,
            format!("the SMMU is off, and {:#x} has more than {} bits (OAS)", e.va, probe.caps().oas_bits),
            "limit the master's addresses (dma_set_mask)",
        ),
        SilentAbort::Stream => Cause::new(
            CauseKind::NoDomainAttached,
            format!(
                "the STE of stream {:#x} says abort (Config=0b000): no domain is attached, or a blocking one is",
                e.from.stream
            ),
            "attach a domain: Linux fills the stream table with such entries, and a driver's attach (or the DMA API's default \
             domain) replaces them; no event is recorded for this",
        )
        .because(ctx.describe(e.from.stream))
        .because(config::claimed_words(&config::claimed(probe, e))),
    }
}

/// The name of an event, for evidence.
fn named(code: Option<EventCode>) -> &'static str {
    code.map_or("event", EventCode::name)
}
