//! The story of one translation: which registers, tables and descriptors were looked at and what each decided. Runs the
//! same look-up and the same walker as a transaction and changes nothing.

#[cfg(test)]
mod tests;

use portcullis_arch::smmuv3::regs::Gerror;
use portcullis_arch::smmuv3::{Cd, EventRecord, Ste};
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{Initiator, Memory};
use portcullis_walk::{AccessKind, Fault, Step, Trace, Updates, Walked};

use crate::decision::{BypassReason, Decision, FaultFlags, SilentAbort, View};
use crate::event::{self, Client, Ending, Judged};
use crate::lookup::look_up;
use crate::model::SmmuV3;
use crate::state::{Interface, Shapes};

/// What becomes of an event record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recorded {
    /// It goes into the event queue now.
    Now,
    /// The queue cannot take it now: the record of a stalled transaction waits.
    Later,
    /// The queue is full: the record is lost and OVFLG says so.
    Overflow,
    /// The queue is off, or stands at an error: the record is lost.
    Lost,
    /// It is not to be recorded (CD.R, STE.S2R, CR2.RECINVSID).
    Suppressed,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Passes untranslated.
    Bypass {
        /// Why.
        reason: BypassReason,
        /// Output address.
        pa: Pa,
        /// Outgoing attributes.
        attrs: Attributes,
    },
    /// Aborted without an event.
    Silent(SilentAbort),
    /// Translated.
    Translated {
        /// The result of the walk.
        walked: Walked,
        /// Attributes before translation, overrides applied.
        incoming: Attributes,
        /// Outgoing attributes.
        outgoing: Attributes,
    },
    /// Refused with an event.
    Event {
        /// The record as it would be written; a stalled transaction's has 0 for its STAG.
        record: EventRecord,
        /// What becomes of the record.
        recorded: Recorded,
        /// How the transaction ends.
        ending: Ending,
        /// The fault of the walk, or of stage 2 on the way to the CD; `None` for configuration errors.
        fault: Option<Fault>,
    },
}

/// What a transaction would do now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Who asks.
    pub from: Initiator,
    /// For which address.
    pub va: Iova,
    /// Read or write.
    pub access: Access,
    /// The stream is secure.
    pub secure: bool,
    /// CR0 of its security state.
    pub cr0: u32,
    /// GBPA of its security state: what decides while CR0.SMMUEN is 0.
    pub gbpa: u32,
    /// STRTAB_BASE.
    pub strtab_base: u64,
    /// STRTAB_BASE_CFG.
    pub strtab_base_cfg: u32,
    /// The level 1 stream table descriptor, if one was read: address and value.
    pub l1std: Option<(Pa, u64)>,
    /// The stream table entry, if one was read.
    pub ste: Option<(Pa, Ste)>,
    /// The level 1 context descriptor, if one was read: address in memory and value.
    pub l1cd: Option<(Pa, u64)>,
    /// The context descriptor, if one was read: address in memory.
    pub cd: Option<(Pa, Cd)>,
    /// The rule that decided before translation tables were read.
    pub rule: &'static str,
    /// Every stage 2 descriptor read on the way to the CD.
    pub cd_walk: Vec<Step>,
    /// Every descriptor read for the address itself.
    pub walk: Vec<Step>,
    /// How it ended.
    pub outcome: Outcome,
}

/// What the event queue would do with a record.
fn recorded(caps_shapes: &Shapes, i: &Interface, judged: &Judged) -> Recorded {
    let errors: Gerror = i.errors();
    let (off, full) = (!i.cr0().eventqen() || errors.eventq_abt_err(), i.eventq.is_full(caps_shapes.eventq));
    match (judged.ending, judged.recorded) {
        (Ending::Stall, _) if off || full => Recorded::Later,
        (_, false) => Recorded::Suppressed,
        _ if off => Recorded::Lost,
        _ if full => Recorded::Overflow,
        _ => Recorded::Now,
    }
}

impl<M: Memory> SmmuV3<M> {
    /// What a transaction would do now, from the registers and the tables, whatever TLBs hold. Nothing is recorded, and no
    /// access flag or dirty state is written.
    pub fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        let secure = self.is_secure(&from);
        let (regs, interface) = {
            let live = self.lock();
            let regs = live.regs.table_regs(&self.caps, secure);
            (regs, live.regs.side[usize::from(secure)].clone())
        };
        let view = View { updates: Updates::Pretend, ..View::new(&self.caps, regs, &self.memory) };
        let mut cd_trace = Trace::default();
        let (decision, trail) = look_up(&view, &from, va.get(), access, &mut cd_trace);
        let mut trace = Trace::default();
        let shapes = Shapes::new(&self.caps);
        let event = |judged: Judged, fault| Outcome::Event {
            record: if judged.ending == Ending::Stall {
                event::stalled(judged.record, 0)
            } else {
                judged.record
            },
            recorded: recorded(&shapes, &interface, &judged),
            ending: judged.ending,
            fault,
        };
        let outcome = match decision {
            Decision::Silent(why) => Outcome::Silent(why),
            Decision::Bypass { attrs, reason, limit_bits } => {
                if crate::lookup::size::exceeds(va.get(), limit_bits) {
                    let record = event::out_of_range(&Client::new(&from, va.get(), access, attrs));
                    event(Judged { record, recorded: true, ending: Ending::Abort, merge: false }, None)
                } else {
                    Outcome::Bypass { reason, pa: Pa(va.get()), attrs: attrs.of(access) }
                }
            }
            Decision::Fault(fault) => {
                let judged = event::config_fault(&from, va.get(), access, &fault, regs.cr2.recinvsid());
                event(judged, fault.stage2)
            }
            Decision::Translate(context) => {
                let kind = AccessKind::new(access, context.incoming);
                let input = va.get() & context.va_mask;
                let walked =
                    context.stages.translate(&self.memory, input, kind, Updates::Pretend, &mut trace);
                match walked {
                    Ok(walked) => Outcome::Translated {
                        walked,
                        incoming: context.incoming,
                        outgoing: context.outgoing(walked.attrs).of(access),
                    },
                    Err(fault) => {
                        let client = Client::new(&from, va.get(), access, context.incoming);
                        let flags = FaultFlags::from_bits(context.token);
                        event(event::walk_fault(&client, &fault, flags, false), Some(fault))
                    }
                }
            }
        };
        Explanation {
            from,
            va,
            access,
            secure,
            cr0: regs.cr0.into_bits(),
            gbpa: regs.gbpa.into_bits(),
            strtab_base: regs.strtab_base,
            strtab_base_cfg: regs.strtab_base_cfg,
            l1std: trail.l1std.map(|(at, v)| (Pa(at), v)),
            ste: trail.ste.map(|(at, v)| (Pa(at), v)),
            l1cd: trail.l1cd.map(|(at, v)| (Pa(at), v)),
            cd: trail.cd.map(|(at, v)| (Pa(at), v)),
            rule: trail.rule,
            cd_walk: cd_trace.steps,
            walk: trace.steps,
            outcome,
        }
    }
}
