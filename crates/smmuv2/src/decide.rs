//! From a transaction to what becomes of it: the order of checks of IHI 0062D section 3.8.4.

use portcullis_arch::smmuv2::{CbType, Cba2r, Cr0, S2cr, S2crType};
use portcullis_arch::{Access, Attributes};
use portcullis_bus::Initiator;

use crate::config::Config;
use crate::context::{Overrides, translation};
use crate::matching::{Match, find};
use crate::memo::{Contexts, Place};
use crate::state::{Bank, Regs};

/// A global fault (GFSR bit).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GlobalFault {
    /// Invalid context.
    InvalidContext,
    /// Unidentified stream.
    UnidentifiedStream,
    /// Stream match conflict.
    StreamMatchConflict,
    /// Unimplemented context bank.
    UnimplementedBank,
    /// Secure instruction fetch from non-secure memory on a bypassing stream.
    Permission,
}

impl GlobalFault {
    /// Its bit in GFSR.
    pub const fn bit(self) -> u32 {
        match self {
            Self::InvalidContext => 1 << 0,
            Self::UnidentifiedStream => 1 << 1,
            Self::StreamMatchConflict => 1 << 2,
            Self::UnimplementedBank => 1 << 3,
            Self::Permission => 1 << 7,
        }
    }
}

/// Why a transaction bypasses translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BypassReason {
    /// CR0.CLIENTPD is set.
    ClientDisabled,
    /// No group matches and CR0.USFCFG is 0.
    Unmatched,
    /// Several groups match and CR0.SMCFCFG is 0.
    Conflict,
    /// S2CR.TYPE is bypass.
    Stream,
}

/// What becomes of a transaction, before any table is read.
#[derive(Clone, Debug)]
pub(crate) enum Decision {
    Bypass {
        attrs: Attributes,
        reason: BypassReason,
    },
    Global {
        fault: GlobalFault,
        nested: bool,
    },
    /// A fault is outstanding in `bank`.
    Blocked {
        bank: u8,
        stall: bool,
        abort: bool,
    },
    /// Every stage is off, and SCR1.SIF forbids the fetch that the bank would let pass.
    SecureFetch(Place),
    /// Through a context, which lies in the memo.
    Translate(Place),
}

/// What was looked at on the way to a [`Decision`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Trail {
    pub secure: bool,
    pub matched: Option<Match>,
    pub group: Option<u16>,
    pub bank: Option<u8>,
    pub stage2_bank: Option<u8>,
    /// A read and a write of this initiator would end differently before any table is read, so the decision holds for
    /// this transaction only.
    pub only_this: bool,
}

fn cr0_overrides(cr0: Cr0, secure: bool) -> Overrides {
    Overrides {
        memory: cr0.mtcfg().then_some(cr0.memattr()),
        shcfg: cr0.shcfg(),
        racfg: cr0.racfg(),
        wacfg: cr0.wacfg(),
        transient: cr0.transientcfg(),
        nscfg: secure.then_some(cr0.nscfg()),
    }
}

fn s2cr_overrides(s2cr: S2cr, secure: bool) -> Overrides {
    Overrides {
        memory: s2cr.mtcfg().then_some(s2cr.memattr()),
        shcfg: s2cr.shcfg(),
        racfg: s2cr.racfg(),
        wacfg: s2cr.wacfg(),
        transient: s2cr.transientcfg(),
        nscfg: secure.then_some(s2cr.nscfg()),
    }
}

/// Decides in the architecture's order; changes nothing. `contexts` are those of these registers.
pub(crate) fn decide(
    config: &Config,
    regs: &Regs,
    contexts: &mut Contexts,
    from: &Initiator,
    access: Access,
) -> (Decision, Trail) {
    let secure = config.secure && !from.attrs.non_secure();
    let mut trail = Trail { secure, ..Trail::default() };
    let decision = decide_with(config, regs, contexts, from, access, &mut trail);
    (decision, trail)
}

fn decide_with(
    config: &Config,
    regs: &Regs,
    contexts: &mut Contexts,
    from: &Initiator,
    access: Access,
    trail: &mut Trail,
) -> Decision {
    let secure = trail.secure;
    let cr0 = regs.side[usize::from(secure)].cr0();
    let global = |fault, nested| Decision::Global { fault, nested };
    let sif = secure && regs.scr1().sif();
    let bypass = |attrs: Attributes, reason, trail: &mut Trail| {
        trail.only_this = sif && attrs.instruction() && attrs.non_secure();
        if trail.only_this && access == Access::Read {
            return global(GlobalFault::Permission, false);
        }
        Decision::Bypass { attrs, reason }
    };
    let by_cr0 = || cr0_overrides(cr0, secure).apply(from.attrs);
    if cr0.clientpd() {
        return bypass(by_cr0(), BypassReason::ClientDisabled, trail);
    }
    let matched = find(config, regs, from.stream, secure);
    trail.matched = Some(matched.clone());
    let group = match matched {
        Match::Group(g) => g,
        Match::None if cr0.usfcfg() => return global(GlobalFault::UnidentifiedStream, false),
        Match::None => return bypass(by_cr0(), BypassReason::Unmatched, trail),
        Match::Conflict(..) if cr0.smcfcfg() => return global(GlobalFault::StreamMatchConflict, false),
        Match::Conflict(..) => return bypass(by_cr0(), BypassReason::Conflict, trail),
    };
    trail.group = Some(group);
    let s2cr = S2cr::from_bits(regs.s2cr.get(usize::from(group)).copied().unwrap_or_default());
    let overridden = s2cr_overrides(s2cr, secure).apply(from.attrs);
    match s2cr.kind() {
        S2crType::Translation => {}
        S2crType::Bypass => return bypass(overridden, BypassReason::Stream, trail),
        S2crType::Fault | S2crType::Reserved => return global(GlobalFault::InvalidContext, false),
    }
    let n = s2cr.cbndx();
    trail.bank = Some(n);
    let (bank, stage2) = match banks_of(config, regs, n, secure) {
        Ok(banks) => banks,
        Err(Unusable { fault, nested, stage2_bank }) => {
            trail.stage2_bank = stage2_bank;
            return global(fault, nested);
        }
    };
    trail.stage2_bank = stage2.map(|s| s.0);
    for (n, bank) in [Some((n, bank)), stage2].into_iter().flatten() {
        let (fsr, sctlr) = (bank.fsr(), regs.sctlr(config, n.into()));
        if bank.fsr != 0 && !sctlr.hupcf() {
            return Decision::Blocked {
                bank: n,
                stall: fsr.ss(),
                abort: sctlr.cfre() || (sctlr.cfcfg() && !fsr.ss()),
            };
        }
    }
    if cr0.gse()
        && let Some(stalled) = other_stalled_bank(config, regs, n, secure)
    {
        return Decision::Blocked { bank: stalled, stall: true, abort: true };
    }
    let mut incoming = overridden;
    match s2cr.privcfg() {
        1 | 2 => incoming = incoming.with_privileged(false),
        3 => incoming = incoming.with_privileged(true),
        _ => {}
    }
    match s2cr.instcfg() {
        2 => incoming = incoming.with_instruction(false),
        1 | 3 => incoming = incoming.with_instruction(true),
        _ => {}
    }
    let decode = || translation(config, regs, n, bank, stage2.map(|s| s.1), incoming, secure);
    let (place, context) = contexts.find(n, secure, incoming, decode);
    let flat = context.stages.stage1.is_none() && context.stages.stage2.is_none();
    trail.only_this = sif && flat && context.incoming.instruction() && context.incoming.non_secure();
    if trail.only_this && access == Access::Read {
        return Decision::SecureFetch(place);
    }
    Decision::Translate(place)
}

/// Why a bank cannot translate: steps 5 to 9.
pub(crate) struct Unusable {
    pub fault: GlobalFault,
    pub nested: bool,
    stage2_bank: Option<u8>,
}

/// A bank, and the number and registers of its stage 2 bank if it is nested.
type Banks<'a> = (&'a Bank, Option<(u8, &'a Bank)>);

/// Bank `n` and, if it is nested, its stage 2 bank, checked in the order of the architecture.
pub(crate) fn banks_of<'a>(
    config: &Config,
    regs: &'a Regs,
    n: u8,
    secure: bool,
) -> Result<Banks<'a>, Unusable> {
    let usable = |n: u8| {
        let own = regs.bank_is_secure(config, n.into()) == secure;
        regs.banks.get(usize::from(n)).filter(|_| own)
    };
    let unusable = |fault, nested, stage2_bank| Err(Unusable { fault, nested, stage2_bank });
    let Some(bank) = usable(n) else { return unusable(GlobalFault::UnimplementedBank, false, None) };
    let kind = bank.cbar().kind();
    let stage_missing = match kind {
        CbType::Stage2 => !config.stage2,
        CbType::Stage1Bypass | CbType::Stage1Fault => !config.stage1,
        CbType::Nested => !config.nested,
    };
    let stage2_only = n < config.stage2_only_banks && kind != CbType::Stage2;
    let refused = kind == CbType::Stage1Fault || (secure && kind != CbType::Stage1Bypass);
    if stage_missing || stage2_only || refused {
        return unusable(GlobalFault::InvalidContext, true, None);
    }
    if kind != CbType::Nested {
        return Ok((bank, None));
    }
    let n2 = bank.cbar().s2_cbndx();
    let Some(bank2) = usable(n2) else { return unusable(GlobalFault::UnimplementedBank, true, Some(n2)) };
    let va64 = |b: &Bank| Cba2r::from_bits(b.cba2r).va64();
    if bank2.cbar().kind() != CbType::Stage2 || (va64(bank) && !va64(bank2)) {
        return unusable(GlobalFault::InvalidContext, true, Some(n2));
    }
    Ok((bank, Some((n2, bank2))))
}

/// A bank of a security state, not `own`, in which a transaction is stalled.
fn other_stalled_bank(config: &Config, regs: &Regs, own: u8, secure: bool) -> Option<u8> {
    let stalled = |(n, b): &(usize, &Bank)| {
        b.fsr().ss() && *n != usize::from(own) && regs.bank_is_secure(config, *n) == secure
    };
    regs.banks.iter().enumerate().find(stalled).map(|(n, _)| n as u8)
}

/// The security attribute of a transaction after S2CR, for FSYNR0.NSATTR.
pub(crate) fn non_secure_input(config: &Config, regs: &Regs, from: &Initiator) -> bool {
    let secure = config.secure && !from.attrs.non_secure();
    match find(config, regs, from.stream, secure) {
        Match::Group(g) if secure => {
            let s2cr = S2cr::from_bits(regs.s2cr.get(usize::from(g)).copied().unwrap_or_default());
            s2cr_overrides(s2cr, secure).apply(from.attrs).non_secure()
        }
        _ => from.attrs.non_secure(),
    }
}
