//! The story of one translation: which registers and descriptors were looked at and what each decided. Runs the same
//! decision and the same walker as a transaction and changes nothing.

use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{Initiator, Memory};
use portcullis_walk::{Decoded, Fault, Step, Trace, Updates, Walked};

use crate::context::kind_of;
use crate::decide::{BypassReason, Decision, GlobalFault, decide};
use crate::matching::Match;
use crate::memo::Contexts;
use crate::model::{SECURE_FETCH, SmmuV2};
use crate::state::Regs;

/// A context bank's registers as a translation saw them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names are the registers'.
pub struct BankView {
    pub index: u8,
    pub cbar: u32,
    pub cba2r: u32,
    pub sctlr: u32,
    pub tcr: u32,
    pub tcr2: u32,
    pub ttbr0: u64,
    pub ttbr1: u64,
    pub mair: u64,
    pub fsr: u32,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// Passed untranslated.
    Bypass {
        /// Why.
        reason: BypassReason,
        /// Output address.
        pa: Pa,
        /// Outgoing attributes.
        attrs: Attributes,
    },
    /// A global fault.
    Global {
        /// Which.
        fault: GlobalFault,
        /// GFSYNR0.NESTED.
        nested: bool,
        /// The client gets an abort (CR0.GFRE).
        abort: bool,
    },
    /// Refused because an earlier fault of this bank is still recorded and HUPCF is 0.
    Blocked {
        /// The bank.
        bank: u8,
        /// It waits for RESUME (a transaction is stalled there).
        stall: bool,
    },
    /// Translated.
    Translated {
        /// The result.
        walked: Walked,
        /// Attributes before translation, overrides applied.
        incoming: Attributes,
    },
    /// A context fault.
    Fault {
        /// What went wrong and where.
        fault: Fault,
        /// Attributes before translation, overrides applied.
        incoming: Attributes,
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
    /// What the stream mapping registers say, if they were looked at.
    pub matched: Option<Match>,
    /// SMR and S2CR of the group that matched.
    pub group: Option<(u16, u32, u32)>,
    /// The context bank.
    pub bank: Option<BankView>,
    /// The stage 2 bank of a nested context.
    pub stage2_bank: Option<BankView>,
    /// Every descriptor read.
    pub walk: Vec<Step>,
    /// How it ended.
    pub outcome: Outcome,
}

fn view(regs: &Regs, n: u8) -> Option<BankView> {
    let b = regs.banks.get(usize::from(n))?;
    Some(BankView {
        index: n,
        cbar: b.cbar,
        cba2r: b.cba2r,
        sctlr: b.sctlr,
        tcr: b.tcr,
        tcr2: b.tcr2,
        ttbr0: b.ttbr[0],
        ttbr1: b.ttbr[1],
        mair: u64::from(b.mair[1]) << 32 | u64::from(b.mair[0]),
        fsr: b.fsr,
    })
}

impl<M: Memory> SmmuV2<M> {
    /// What a transaction would do now, from the registers and the tables, whatever TLBs hold. Nothing is recorded.
    pub fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        let live = self.lock();
        let regs = &live.regs;
        let mut contexts = Contexts::default();
        let (decision, trail) = decide(&self.config, regs, &mut contexts, &from, access);
        let cr0 = regs.side[usize::from(trail.secure)].cr0();
        let group = trail.group.map(|g| {
            let at = usize::from(g);
            let get = |v: &Vec<u32>| v.get(at).copied().unwrap_or_default();
            (g, get(&regs.smr), get(&regs.s2cr))
        });
        let mut explanation = Explanation {
            from,
            va,
            access,
            secure: trail.secure,
            cr0: cr0.into_bits(),
            matched: trail.matched,
            group,
            bank: trail.bank.and_then(|n| view(regs, n)),
            stage2_bank: trail.stage2_bank.and_then(|n| view(regs, n)),
            walk: Vec::new(),
            outcome: Outcome::Blocked { bank: 0, stall: false },
        };
        drop(live);
        explanation.outcome = match decision {
            Decision::Bypass { attrs, reason } => {
                let pa = Pa(va.get() & ((1 << self.config.pa_bits) - 1));
                Outcome::Bypass { reason, pa, attrs }
            }
            Decision::Global { fault, nested } => Outcome::Global { fault, nested, abort: cr0.gfre() },
            Decision::Blocked { bank, stall, .. } => Outcome::Blocked { bank, stall },
            Decision::SecureFetch(place) => {
                let Some(Decoded { context, .. }) = contexts.get(place) else { return explanation };
                Outcome::Fault { fault: SECURE_FETCH, incoming: context.incoming }
            }
            Decision::Translate(place) => {
                let Some(Decoded { context, .. }) = contexts.get(place) else { return explanation };
                let mut trace = Trace::default();
                let input = va.get() & context.va_mask;
                let kind = kind_of(context, access);
                let incoming = context.incoming;
                let stages = &context.stages;
                let outcome = match stages.translate(&self.walker, input, kind, Updates::Pretend, &mut trace)
                {
                    Ok(walked) => Outcome::Translated { walked, incoming },
                    Err(fault) => Outcome::Fault { fault, incoming },
                };
                explanation.walk = trace.steps;
                outcome
            }
        };
        explanation
    }
}
