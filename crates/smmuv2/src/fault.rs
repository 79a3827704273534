//! Recording faults, terminating and stalling transactions, RESUME (IHI 0062D chapter 3; DDI 0517 for MMU-500).

use portcullis_arch::smmuv2::{CbType, Fsr, Fsynr0, Gfsr, Gfsynr0, Sctlr};
use portcullis_arch::{Access, StreamId};
use portcullis_bus::Initiator;
use portcullis_walk::{Context, Fault, FaultKind, FaultOutcome};

use crate::config::Config;
use crate::context::kind_of;
use crate::decide::{GlobalFault, non_secure_input};
use crate::global::stream_mask;
use crate::stall::Fate;
use crate::state::Regs;

/// Where a fault came from: a client's transaction, or an address translation operation, which never stalls.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub from: &'a Initiator,
    pub va: u64,
    pub access: Access,
    pub operation: bool,
}

/// Records a global fault for a transaction and says how it ends: global faults never stall.
pub(crate) fn global(
    config: &Config,
    regs: &mut Regs,
    (fault, nested): (GlobalFault, bool),
    origin: Origin<'_>,
    secure: bool,
) -> FaultOutcome {
    let Origin { from, va, access, .. } = origin;
    // The bus delivers so many address bits, and the ids are as wide as the register.
    let (va, stream) = (va & config.upstream_mask(), from.stream.get() & stream_mask(config, false));
    let side = &mut regs.side[usize::from(secure)];
    if side.gfsr == 0 {
        side.gfsr = fault.bit();
        side.gfar = va;
        let a = from.attrs;
        side.gfsynr[0] = Gfsynr0::new()
            .with_nested(nested && !secure)
            .with_wnr(access == Access::Write)
            .with_pnu(a.privileged())
            .with_ind(a.instruction())
            .with_nsstate(false)
            // Logs of MMU-500 systems show it clear in the non-secure copy, where no stream could have it clear.
            .with_nsattr(secure && a.non_secure())
            .into_bits();
        side.gfsynr[1] = stream;
        side.gfsynr[2] = 0;
    } else {
        side.gfsr |= Gfsr::new().with_multi(true).into_bits();
    }
    FaultOutcome::Terminate { abort: side.cr0().gfre() }
}

/// The FSR bit of a walk fault.
pub(crate) fn fsr_bit(kind: FaultKind) -> Fsr {
    match kind {
        FaultKind::Translation => Fsr::new().with_tf(true),
        FaultKind::AccessFlag => Fsr::new().with_aff(true),
        FaultKind::Permission => Fsr::new().with_pf(true),
        FaultKind::External => Fsr::new().with_ef(true),
        FaultKind::AddressSize => Fsr::new().with_asf(true),
    }
}

/// Records a context fault and says how the transaction ends.
pub(crate) fn context(
    config: &Config,
    regs: &mut Regs,
    context: &Context,
    origin: Origin<'_>,
    fault: Fault,
) -> FaultOutcome {
    let Origin { from, va, access, operation } = origin;
    let first = context.token as usize;
    let Some(cbar) = regs.banks.get(first).map(|b| b.cbar()) else {
        return FaultOutcome::Terminate { abort: true };
    };
    let nested = cbar.kind() == CbType::Nested;
    let at = if fault.stage == 2 && nested { usize::from(cbar.s2_cbndx()) } else { first };
    let sctlr = regs.sctlr(config, at);
    let (hupcf, cfcfg) = (sctlr.hupcf(), sctlr.cfcfg());
    let may_wait = !operation && regs.stalls.has_room();
    let ns_input = non_secure_input(config, regs, from);
    let Some(bank) = regs.banks.get_mut(at) else { return FaultOutcome::Terminate { abort: true } };
    let (empty, ss) = (bank.fsr == 0, bank.fsr().ss());
    if empty {
        let kind = kind_of(context, access);
        bank.fsr = fsr_bit(fault.kind).into_bits();
        let stage2 = fault.stage == 2;
        bank.far = if stage2 && !nested { fault.ipa } else { va & config.upstream_mask() };
        bank.ipafar = if stage2 { fault.ipa & !0xfff } else { bank.ipafar };
        let mut syn = Fsynr0::new()
            .with_plvl(fault.level.clamp(0, 3) as u8)
            .with_wnr(kind.is_write())
            .with_pnu(context.incoming.privileged())
            .with_ind(kind.is_fetch())
            .with_nsattr(ns_input && (stage2 || context.key.secure))
            .with_ptwf(fault.kind == FaultKind::External);
        if stage2 {
            syn = syn.with_nested(nested && config.nested).with_s1ptwf(fault.on_stage1_walk);
            syn = syn.with_atof(operation && !config.mmu500);
            if nested {
                syn = syn.with_s1cbndx(first as u8);
            }
        }
        bank.fsynr[0] = syn.into_bits();
        bank.fsynr[1] = 0;
        if !operation {
            bank.cbfrsynra = from.stream.get() & stream_mask(config, false);
        }
    }
    // Behind a stalled transaction a fault waits unrecorded. Otherwise HUPCF lets it be processed and counted.
    let behind = ss && (cfcfg || !hupcf);
    if !empty && !behind && hupcf {
        bank.fsr |= Fsr::new().with_multi(true).into_bits();
    }
    let stalls = if empty { cfcfg } else { behind || (cfcfg && hupcf) };
    if stalls && may_wait {
        bank.fsr = bank.fsr().with_ss(true).into_bits();
        return FaultOutcome::Stall(regs.stalls.wait(at as u8, !behind));
    }
    FaultOutcome::Terminate { abort: sctlr.cfre() || (!empty && !ss && cfcfg) }
}

/// A transaction that meets an outstanding fault (5.4 of the manual's rules for HUPCF = 0).
pub(crate) fn blocked(regs: &mut Regs, bank: u8, stall: bool, abort: bool) -> FaultOutcome {
    if stall && regs.stalls.has_room() {
        FaultOutcome::Stall(regs.stalls.wait(bank, false))
    } else {
        FaultOutcome::Terminate { abort }
    }
}

/// RESUME: the recorded transaction is retried or terminated, those that waited behind it are retried.
/// Nothing happens if nothing is stalled, and on MMU-500 while fault bits are still set.
pub(crate) fn resume(config: &Config, regs: &mut Regs, n: u8, terminate: bool) {
    let Some(bank) = regs.banks.get_mut(usize::from(n)) else { return };
    if !bank.fsr().ss() || (config.mmu500 && bank.fsr & Fsr::W1C != 0) {
        return;
    }
    bank.fsr &= !Fsr::new().with_ss(true).into_bits();
    let abort = Sctlr::from_bits(bank.sctlr).cfre();
    let end = Fate::Terminated { abort };
    regs.stalls.release(n, |recorded| if recorded && terminate { end } else { Fate::Retry });
}

/// CBAR, CBA2R or the ownership of a bank changed: its stalled transactions are retried and SS goes away.
pub(crate) fn retry_all(regs: &mut Regs, n: u8) {
    if let Some(bank) = regs.banks.get_mut(usize::from(n)) {
        bank.fsr &= !Fsr::new().with_ss(true).into_bits();
    }
    regs.stalls.release(n, |_| Fate::Retry);
}

/// The stream of a fault record, for display.
pub(crate) fn stream_of(cbfrsynra: u32) -> StreamId {
    StreamId(cbfrsynra & 0xffff)
}
