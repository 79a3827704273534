//! Causes of F_TRANSLATION: no valid descriptor, or no table for the address.

use portcullis_bus::Memory;
use portcullis_smmuv3::Explanation;
use portcullis_walk::Fault;

use crate::causes::translation::{
    BUDGET, neighbours, no_snoop, not_mapped, other_address, unmapped, virtual_base,
};
use crate::causes::{Cause, CauseContext, CauseKind};
use crate::v3::causes::walk_end::search;
use crate::v3::probe::{Probe, leaf};
use crate::v3::shape::{self, Shape};
use crate::v3::story::{before_the_walk, steps_of_fault};

/// Causes by how well they are supported; ranks are compared, their values mean nothing else.
pub(super) fn causes<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let mut ranked: Vec<(u8, Cause)> = Vec::new();
    let Some(s) = shape::of_stage(e, probe.caps(), fault.stage) else { return Vec::new() };
    let steps = steps_of_fault(e, fault);
    let has_stage1 = e.ste.is_some_and(|(_, ste)| ste.config().stage1());
    if fault.stage == 2 && has_stage1 {
        ranked.extend(search(probe, e, ctx, fault).map(|c| (92, c)));
        ranked.push((80, stage2_hole(e, ctx, probe, fault)));
    } else {
        let va = if fault.stage == 2 { fault.ipa } else { e.va.get() };
        let page = s.pages().bytes();
        let mapped = |at: Option<u64>| at.and_then(|a| leaf(&probe.explain(e.from, a, e.access)));
        let below = mapped(va.checked_sub(page));
        let above = mapped(va.checked_add(page));
        if below.is_none() && above.is_none() {
            // Where a neighbour is mapped the tables are read rightly.
            ranked.extend(search(probe, e, ctx, fault).map(|c| (92, c)));
        }
        let all = probe.mappings(e.from, va, BUDGET);
        match steps.last() {
            None => ranked.push((70, out_of_range(probe, e, fault, &s))),
            Some(step) => {
                if steps.len() == 1 {
                    ranked.extend(empty_table(probe, &s));
                }
                let walker = no_snoop(probe.caps().coherent, "COHACC");
                ranked.push((65, not_mapped(va, step, &all, walker)));
            }
        }
        ranked.extend(unmapped(va, ctx));
        ranked.extend(neighbours(va, page, below, above, &all));
        ranked.extend(other_address(va, ctx, &all));
        if s.off && fault.stage == 1 {
            // No walk, no tables: what is mapped elsewhere says nothing about this half.
            ranked.retain(|(_, c)| matches!(c.kind, CauseKind::WalksDisabled | CauseKind::CpuVirtualAddress));
        }
    }
    if ranked.iter().any(|(_, cause)| cause.kind == CauseKind::LayoutMismatch) {
        // Misread tables make everything look unmapped: what else was guessed from them means little.
        ranked.retain(|(rank, _)| *rank >= 80);
    }
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    ranked.into_iter().map(|(_, cause)| cause).collect()
}

/// Stage 2 of a nested pair does not map what stage 1, or the CD fetch, asks for.
fn stage2_hole<M: Memory>(
    e: &Explanation,
    ctx: &CauseContext<'_>,
    probe: &Probe<'_, M>,
    fault: &Fault,
) -> Cause {
    let ipa = fault.ipa;
    let whose = if e.cd.is_none() {
        "where the guest's context descriptor is"
    } else if fault.on_stage1_walk {
        "where a stage 1 table is"
    } else {
        "to which stage 1 leads"
    };
    let vmid = e.ste.map_or(0, |(_, s)| s.dw2().s2vmid());
    let mut cause = Cause::new(
        CauseKind::Stage2NotMapped,
        format!("stage 2 (VMID {vmid}) does not map IPA {ipa:#x}, {whose}"),
        "map the guest's memory in the stage 2 domain before it uses the device; check that S1ContextPtr, CD and stage 1 hold \
         guest (intermediate) physical addresses",
    );
    if steps_of_fault(e, fault).is_empty() {
        cause = cause.because(before_the_walk(e, probe.caps(), fault));
    }
    if ctx.is_ram(ipa) {
        cause = cause
            .because(format!("{ipa:#x} is host RAM: stage 1 may hold host physical addresses by mistake"));
    }
    cause
}

fn out_of_range<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, fault: &Fault, s: &Shape) -> Cause {
    let why = before_the_walk(e, probe.caps(), fault);
    if fault.stage == 1 && s.off {
        let fix = if s.half == 0 {
            "EPD0=1 keeps a CD valid after its process has exited: stop the device before the process goes, or bind another one \
             to its PASID"
        } else {
            "drivers like Linux's use TTB0 only (EPD1=1): give the device addresses of the lower half; a kernel pointer is no DMA \
             address"
        };
        return Cause::new(CauseKind::WalksDisabled, format!("walks for this half are off: {why}"), fix);
    }
    Cause::new(
        CauseKind::AddressOutOfRange,
        why,
        format!(
            "limit the addresses that are handed out to the size of the tables (dma_set_mask, the domain's aperture), or lower \
             {} with tables to match",
            s.size_field()
        ),
    )
}

/// The first table holds nothing at all.
fn empty_table<M: Memory>(probe: &Probe<'_, M>, s: &Shape) -> Option<(u8, Cause)> {
    let entries = u32::from(s.bits.saturating_sub(s.entry_log2(s.start))).min(16);
    let bytes = (8u64 << entries).clamp(64, s.pages().bytes());
    let mut words = (0..bytes).step_by(8).map(|at| probe.load64(s.base.wrapping_add(at)));
    if !words.all(|w| w == Ok(0)) {
        return None;
    }
    let cause = Cause::new(
        CauseKind::WrongTableBase,
        format!("{} points to {:#x}, where everything is zero: no tables", s.base_field(), s.base),
        format!(
            "write the physical address of the first table into {}; if the CPU wrote the tables through its cache and the walker \
             does not snoop, clean them",
            s.base_field()
        ),
    );
    Some((90, virtual_base(cause, s.base)))
}
