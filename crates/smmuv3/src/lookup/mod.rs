//! The configuration look-up: from a transaction's StreamID and SubstreamID, through stream table entry and context
//! descriptor, to what becomes of it (IHI 0070 sections 3.3, 3.4, 5 and 7.3.22).
//!
//! Start with [`look_up`]. [`stream`] finds the STE, [`ste`] says whether it is legal and what its stage 2 is,
//! [`substream`] finds the CD, [`cd`] says whether that is legal and what its stage 1 is; [`attrs`] holds the attribute
//! overrides, [`size`] the rules of address sizes. Nothing that was read is kept between look-ups: the configuration cache
//! is the port's slot, so an invalid level 1 descriptor is never remembered. Only the work of decoding is spared, by
//! [`memo`], for words that have not changed.

pub(crate) mod attrs;
pub(crate) mod cd;
pub(crate) mod memo;
pub(crate) mod size;
pub(crate) mod ste;
pub(crate) mod stream;
pub(crate) mod substream;
#[cfg(test)]
pub(crate) mod tests;

use portcullis_arch::smmuv3::{Cd, EventCode, Ste, SteConfig};
use portcullis_arch::{Access, Attributes};
use portcullis_bus::{Initiator, Memory};
use portcullis_walk::{Context, ContextKey, Flat, Nested, NoRecord, Recorder, Stage2, TlbStage};

use crate::decision::{BypassReason, ConfigFault, Decision, FaultFlags, SilentAbort, Trail, View};
use attrs::Overrides;
use memo::{Memo, Place, same_words};
use ste::World;
use stream::NoSte;
use substream::{Choice, NoCd};

/// What becomes of a transaction of `from` to `va`, before any of its own translation tables is read, and what was
/// looked at on the way. Reads tables and, through stage 2, may set access flags (see `view.updates`); records nothing.
///
/// The answer holds for every address and for reads and writes alike, so that it may be cached, with these exceptions:
/// faults and silent aborts, and answers with [`Trail::only_this`].
pub(crate) fn look_up<M: Memory, R: Recorder>(
    view: &View<'_, M>,
    from: &Initiator,
    va: u64,
    access: Access,
    recorder: &mut R,
) -> (Decision, Trail) {
    let mut trail = Trail::default();
    let decision = if view.regs.cr0.smmuen() {
        configured(view, from, access, recorder, &mut trail)
    } else {
        disabled(view, from, va, access, &mut trail)
    };
    (decision, trail)
}

/// [`look_up`] with a memo, for ports: reads the same words, and decodes those that are new. A translation is in the
/// memo at the place that is returned; everything else is a decision.
pub(crate) fn look_up_remembering<M: Memory>(
    view: &View<'_, M>,
    memo: &mut Memo,
    from: &Initiator,
    va: u64,
    access: Access,
    trail: &mut Trail,
) -> Result<Place, Decision> {
    if !view.regs.cr0.smmuen() {
        return Err(disabled(view, from, va, access, trail));
    }
    let (mut ste, mut cd) = (Ste::default(), Cd::default());
    let at = read_entry(view, from, &mut ste, trail).map_err(Decision::Fault)?;
    let place = memo.place(from, &ste);
    let fetched = match memo.find(place, from, &ste) {
        Some((_, None)) => return Ok(place),
        Some((context, Some((index, words)))) => {
            let which = (context.stages.stage2.as_ref(), index);
            let fetched = substream::fetch(view, &ste, which, &mut cd, &mut NoRecord, trail);
            if fetched.is_ok() && same_words(&cd.0, &words.0) {
                return Ok(place);
            }
            // The STE is legal, the CD is another.
            trail.ste = Some((at, ste));
            Some(fetched.map(|at| (at, cd)))
        }
        None => {
            trail.ste = Some((at, ste));
            check_entry(view, &ste, from, trail).map_err(Decision::Fault)?;
            None
        }
    };
    match stages_with(view, from, &ste, access, &mut NoRecord, trail, fetched) {
        Decision::Translate(context) => {
            let ssid = from.substream.map(|s| s.get());
            let cd = match (substream::choose(view.caps.ssid_bits, &ste, ssid), trail.cd) {
                (Choice::Cd(index), Some((_, cd))) => Some((index, cd)),
                _ => None,
            };
            memo.keep(place, from, &ste, cd, !trail.only_this, *context);
            Ok(place)
        }
        other => Err(other),
    }
}

/// SMMUEN = 0.
fn disabled<M>(view: &View<'_, M>, from: &Initiator, va: u64, access: Access, trail: &mut Trail) -> Decision {
    let (caps, regs) = (view.caps, &view.regs);
    if regs.gbpa.abort() {
        trail.rule = "CR0.SMMUEN = 0 and GBPA.ABORT = 1";
        return Decision::Silent(SilentAbort::Disabled);
    }
    if size::exceeds(va, caps.oas_bits) {
        trail.rule = "CR0.SMMUEN = 0 and the address is above OAS";
        return Decision::Silent(SilentAbort::DisabledRange);
    }
    let attrs = Overrides::of_gbpa(caps, regs.secure, regs.gbpa).apply(incoming(view, from));
    if secure_fetch(view, attrs, access, trail) {
        trail.rule = "CR0.SMMUEN = 0, and S_CR0.SIF refuses a fetch from non-secure memory";
        return Decision::Silent(SilentAbort::Disabled);
    }
    trail.rule = "CR0.SMMUEN = 0 and GBPA.ABORT = 0";
    Decision::Bypass { attrs, reason: BypassReason::Disabled, limit_bits: caps.oas_bits }
}

/// The attributes as they come in. A non-secure stream stays non-secure, and a secure one is what the port says.
fn incoming<M>(view: &View<'_, M>, from: &Initiator) -> Attributes {
    from.attrs.with_non_secure(!view.regs.secure)
}

/// True if S_CR0.SIF refuses this access of a stream that stage 1 does not translate.
fn secure_fetch<M>(view: &View<'_, M>, attrs: Attributes, access: Access, trail: &mut Trail) -> bool {
    let regs = &view.regs;
    trail.only_this = regs.secure && regs.cr0.sif() && attrs.instruction() && attrs.non_secure();
    trail.only_this && access == Access::Read
}

/// SMMUEN = 1.
fn configured<M: Memory, R: Recorder>(
    view: &View<'_, M>,
    from: &Initiator,
    access: Access,
    recorder: &mut R,
    trail: &mut Trail,
) -> Decision {
    match stream_entry(view, from, trail) {
        Ok(ste) => stages(view, from, &ste, access, recorder, trail),
        Err(fault) => Decision::Fault(fault),
    }
}

/// What an event about the stream takes from its STE.
fn flags_of(ste: &Ste) -> FaultFlags {
    let d2 = ste.dw2();
    FaultFlags::new().with_merge(ste.dw1().mev()).with_s2_record(d2.s2r()).with_s2_stall(d2.s2s())
}

/// Reads the STE of a stream and checks it. SMMUEN is 1. A legal STE may say that transactions are aborted.
pub(crate) fn stream_entry<M: Memory>(
    view: &View<'_, M>,
    from: &Initiator,
    trail: &mut Trail,
) -> Result<Ste, ConfigFault> {
    let mut ste = Ste::default();
    let at = read_entry(view, from, &mut ste, trail)?;
    trail.ste = Some((at, ste));
    check_entry(view, &ste, from, trail)?;
    Ok(ste)
}

/// A fault of the configuration that names no address.
fn fault_of(from: &Initiator, code: EventCode, flags: FaultFlags) -> ConfigFault {
    ConfigFault { code, ssid: from.substream.map(|s| s.get()), fetch: 0, stage2: None, flags }
}

/// Reads the STE of a stream, and tells its address.
#[inline]
fn read_entry<M: Memory>(
    view: &View<'_, M>,
    from: &Initiator,
    ste: &mut Ste,
    trail: &mut Trail,
) -> Result<u64, ConfigFault> {
    stream::fetch(view, from.stream.get(), ste, trail).map_err(|why| match why {
        NoSte::BadStream(rule) => {
            trail.rule = rule;
            fault_of(from, EventCode::BadStreamId, FaultFlags::new())
        }
        NoSte::Abort(at) => {
            trail.rule = "memory refused the stream table entry or its level 1 descriptor";
            ConfigFault { fetch: at, ..fault_of(from, EventCode::SteFetch, FaultFlags::new()) }
        }
    })
}

fn check_entry<M>(
    view: &View<'_, M>,
    ste: &Ste,
    from: &Initiator,
    trail: &mut Trail,
) -> Result<(), ConfigFault> {
    match ste::illegal(view.caps, &view.regs, ste) {
        None => Ok(()),
        Some(rule) => {
            trail.rule = rule;
            Err(fault_of(from, EventCode::BadSte, flags_of(ste)))
        }
    }
}

/// From a legal STE to the stages of a translation.
pub(crate) fn stages<M: Memory, R: Recorder>(
    view: &View<'_, M>,
    from: &Initiator,
    ste: &Ste,
    access: Access,
    recorder: &mut R,
    trail: &mut Trail,
) -> Decision {
    stages_with(view, from, ste, access, recorder, trail, None)
}

/// [`stages`], with the CD that this STE and initiator choose, and its address, if it has been read already.
fn stages_with<M: Memory, R: Recorder>(
    view: &View<'_, M>,
    from: &Initiator,
    ste: &Ste,
    access: Access,
    recorder: &mut R,
    trail: &mut Trail,
    fetched: Option<Result<(u64, Cd), NoCd>>,
) -> Decision {
    let (caps, regs) = (view.caps, &view.regs);
    if ste.config() == SteConfig::Abort {
        trail.rule = "STE.Config = 0b0xx: abort";
        return Decision::Silent(SilentAbort::Stream);
    }
    let ssid = from.substream.map(|s| s.get());
    let overrides = overrides(view, ste);
    let client = overrides.permissions(from.attrs);
    let flags = flags_of(ste);
    let shown = flags.with_privileged(client.privileged()).with_instruction(client.instruction());
    let fault = |code, flags| ConfigFault { code, ssid, fetch: 0, stage2: None, flags };
    let index = match substream::choose(caps.ssid_bits, ste, ssid) {
        Choice::Cd(index) => Some(index),
        Choice::NoStage1 => None,
        Choice::Bad(rule) => {
            trail.rule = rule;
            return Decision::Fault(fault(EventCode::BadSubstreamId, flags));
        }
        Choice::Disabled(rule) => {
            trail.rule = rule;
            return Decision::Fault(ConfigFault { ssid: None, ..fault(EventCode::StreamDisabled, flags) });
        }
    };
    let stage2 = ste.config().stage2().then(|| ste::stage2(caps, ste));
    let Some(index) = index else {
        let attrs = overrides.apply(incoming(view, from));
        if secure_fetch(view, attrs, access, trail) {
            trail.rule = "S_CR0.SIF refuses a fetch from non-secure memory";
            return Decision::Fault(fault(EventCode::Permission, shown.with_flat(true)));
        }
        return without_stage1(view, ste, stage2, attrs, trail);
    };
    let fetched = fetched.unwrap_or_else(|| {
        let mut cd = Cd::default();
        let at = substream::fetch(view, ste, (stage2.as_ref(), index), &mut cd, recorder, trail)?;
        Ok((at, cd))
    });
    let cd = match fetched {
        Ok((at, cd)) => {
            trail.cd = Some((at, cd));
            cd
        }
        Err(NoCd::BadSubstream(rule)) => {
            trail.rule = rule;
            let ssid = Some(ssid.unwrap_or(0));
            return Decision::Fault(ConfigFault { ssid, ..fault(EventCode::BadSubstreamId, flags) });
        }
        Err(NoCd::Abort(at)) => {
            trail.rule = "memory refused the context descriptor or its level 1 descriptor";
            return Decision::Fault(ConfigFault { fetch: at, ..fault(EventCode::CdFetch, flags) });
        }
        Err(NoCd::Stage2(why)) => {
            trail.rule = "stage 2 refused the address of the context descriptor or its level 1 descriptor";
            let code = NoCd::code_of(why.kind);
            return Decision::Fault(ConfigFault {
                fetch: why.fetch,
                stage2: Some(why),
                ..fault(code, shown)
            });
        }
    };
    let world = ste::world(caps, regs, ste);
    if let Some(rule) = cd::illegal(caps, regs, ste, world, &cd) {
        trail.rule = rule;
        return Decision::Fault(fault(EventCode::BadCd, flags));
    }
    let d = cd.dw0();
    let flags = flags.with_s1_abort(d.a()).with_s1_record(d.r()).with_s1_stall(d.s());
    let nested = stage2.is_some();
    trail.rule = if nested { "STE.Config = 0b111: both stages" } else { "STE.Config = 0b101: stage 1" };
    let va_bits = cd::va_bits(world, &cd);
    let key = ContextKey {
        secure: regs.secure,
        regime: world.regime(),
        stage: if nested { TlbStage::Combined } else { TlbStage::Stage1 },
        vmid: ste::vmid(caps, regs, ste),
        asid: if world.single() { 0 } else { d.asid() },
        va_bits,
    };
    let stage1 = Some(cd::stage1(caps, regs, world, &cd));
    // Of the memory type that comes in only allocation hints are left, after the overrides. Where a secure stream goes is
    // for the descriptors to say.
    let attrs = overrides.apply(from.attrs).with_non_secure(!regs.secure);
    Decision::Translate(Box::new(Context {
        key,
        token: flags.into_bits(),
        va_mask: if va_bits >= 64 { u64::MAX } else { (1 << va_bits) - 1 },
        stages: Nested { stage1, stage2, flat: Flat::UNCHECKED },
        incoming: attrs,
        after: None,
        cacheable: true,
        keeps_hints: true,
    }))
}

/// The STE's overrides, where they count.
fn overrides<M>(view: &View<'_, M>, ste: &Ste) -> Overrides {
    if view.overrides { Overrides::of_ste(view.caps, view.regs.secure, ste.dw1()) } else { Overrides::NONE }
}

/// What becomes of a transaction whose address is translated already (ATS; section 3.9.1.3): it has no substream, and is
/// unprivileged data before the STE's overrides. The answer holds like that of [`look_up`].
pub(crate) fn look_up_translated<M: Memory>(view: &View<'_, M>, from: &Initiator) -> (Decision, Trail) {
    let mut trail = Trail::default();
    let (caps, regs) = (view.caps, &view.regs);
    let plain = from.attrs.with_privileged(false).with_instruction(false);
    let from = Initiator { substream: None, ..*from }.with_attrs(plain);
    let forbidden = |trail: &mut Trail, rule| {
        trail.rule = rule;
        let flags = FaultFlags::new();
        let code = EventCode::TranslForbidden;
        Decision::Fault(ConfigFault { code, ssid: None, fetch: 0, stage2: None, flags })
    };
    let pass = |trail: &mut Trail, rule| {
        trail.rule = rule;
        let attrs = incoming(view, &from);
        Decision::Bypass { attrs, reason: BypassReason::Translated, limit_bits: caps.oas_bits }
    };
    let t = &mut trail;
    let decision = if !regs.cr0.smmuen() {
        forbidden(t, "CR0.SMMUEN = 0: translated transactions are refused")
    } else if regs.secure {
        forbidden(t, "translated transactions of secure streams are refused")
    } else if !regs.cr0.atschk() {
        pass(t, "CR0.ATSCHK = 0: translated transactions pass")
    } else {
        match stream_entry(view, &from, t) {
            Err(fault) => Decision::Fault(fault),
            Ok(ste) if ste.config() == SteConfig::Abort => {
                t.rule = "STE.Config = 0b0xx: abort";
                Decision::Silent(SilentAbort::Stream)
            }
            Ok(ste) => match ste::eats(caps, regs, &ste) {
                0 => forbidden(t, "the effective STE.EATS is 0: translated transactions are refused"),
                2 => {
                    let attrs = overrides(view, &ste).permissions(incoming(view, &from));
                    without_stage1(view, &ste, Some(ste::stage2(caps, &ste)), attrs, t)
                }
                _ => pass(t, "STE.EATS = 1: translated transactions pass"),
            },
        }
    };
    (decision, trail)
}

/// Stage 1 is off, bypassed or not asked for: stage 2 alone, or nothing.
pub(crate) fn without_stage1<M>(
    view: &View<'_, M>,
    ste: &Ste,
    stage2: Option<Stage2>,
    attrs: Attributes,
    trail: &mut Trail,
) -> Decision {
    let caps = view.caps;
    let flags = flags_of(ste);
    let chosen = ste.config().stage1();
    let Some(stage2) = stage2 else {
        let (reason, limit_bits);
        (reason, limit_bits, trail.rule) = if chosen {
            (BypassReason::NoSubstream, caps.ias_bits(), "STE.S1DSS = 1: no SubstreamID, stage 1 is bypassed")
        } else {
            (BypassReason::Stream, caps.oas_bits, "STE.Config = 0b100: bypass")
        };
        return Decision::Bypass { attrs, reason, limit_bits };
    };
    trail.rule =
        if chosen { "STE.S1DSS = 1: no SubstreamID, stage 2 only" } else { "STE.Config = 0b110: stage 2" };
    let key = ContextKey {
        secure: view.regs.secure,
        regime: World::El1.regime(),
        stage: TlbStage::Stage2,
        vmid: ste::vmid(caps, &view.regs, ste),
        asid: 0,
        va_bits: 64,
    };
    let flat = Flat { input_bits: 64, output_bits: caps.ias_bits(), stage: 1, level: 0 };
    Decision::Translate(Box::new(Context {
        key,
        token: flags.with_flat(true).into_bits(),
        va_mask: u64::MAX,
        stages: Nested { stage1: None, stage2: Some(stage2), flat },
        incoming: attrs,
        after: None,
        cacheable: true,
        keeps_hints: true,
    }))
}
