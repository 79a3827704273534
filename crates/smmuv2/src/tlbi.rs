//! TLB invalidations (IHI 0062D chapter 3.8 and the register descriptions): from an operand to what ports forget.

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{CbType, Cba2r, Tcr2};
use portcullis_bus::Memory;
use portcullis_walk::{Invalidation, Regime, Scope, StageScope};

use crate::context::regime_of;
use crate::model::SmmuV2;
use crate::state::Regs;

/// VA\[55:12\] in bits 43:0 of an operand, bit 55 copied upwards.
fn operand_va(value: u64) -> u64 {
    ((value << 20) as i64 >> 8) as u64 & !0xfff
}

impl<M: Memory> SmmuV2<M> {
    /// A write to an invalidation register of global space 0; other offsets do nothing.
    pub(crate) fn global_invalidation(&self, regs: &Regs, at: usize, secure: bool, value: u64) {
        let all = |secure, regime, stages| {
            Invalidation::Contexts(Scope { secure, regime, vmid: None, asid: None, stages })
        };
        let vmid = |stages| {
            let mask = if regs.wide_vmids(&self.config) { 0xffff } else { 0xff };
            let vmid = Some((value & mask) as u16);
            Invalidation::Contexts(Scope {
                secure: false,
                regime: Some(Regime::Guest),
                vmid,
                asid: None,
                stages,
            })
        };
        let address = |secure, regime, va| {
            let scope =
                Scope { secure, regime: Some(regime), vmid: None, asid: None, stages: StageScope::All };
            Invalidation::Address(scope, va)
        };
        let every = StageScope::All;
        let what = match at {
            gr0::STLBIALL if secure => all(true, None, every),
            gr0::TLBIVMID => vmid(every),
            gr0::TLBIVMIDS1 => vmid(StageScope::Stage1AndCombined),
            gr0::TLBIALLNSNH => all(false, Some(Regime::Guest), every),
            gr0::TLBIALLH => all(false, Some(Regime::Hyp), every),
            gr0::STLBIALLM if secure => all(true, Some(Regime::Monitor), every),
            gr0::TLBIVAH => address(false, Regime::Hyp, value & 0xffff_f000),
            gr0::TLBIVAH64 | gr0::TLBIVALH64 => address(false, Regime::Hyp, operand_va(value)),
            gr0::STLBIVAM | gr0::STLBIVALM if secure => address(true, Regime::Monitor, operand_va(value)),
            _ => return,
        };
        self.log.publish(what);
    }

    /// A write to an invalidation register of a context bank.
    pub(crate) fn bank_invalidation(&self, regs: &Regs, n: usize, at: usize, secure: bool, value: u64) {
        let Some(bank) = regs.banks.get(n) else { return };
        let bank_secure = regs.bank_is_secure(&self.config, n);
        if bank_secure && !secure {
            return;
        }
        let (cbar, cba2r) = (bank.cbar(), Cba2r::from_bits(bank.cba2r));
        let is_stage2 = cbar.kind() == CbType::Stage2;
        let va64 = cba2r.va64();
        let by_ipa = matches!(at, cb::TLBIIPAS2 | cb::TLBIIPAS2L);
        if is_stage2 != by_ipa {
            return;
        }
        let regime = regime_of(regs, bank, bank_secure);
        let single = regime != Regime::Guest;
        let vmid = (!single).then(|| regs.vmid(&self.config, bank));
        let scope = Scope {
            secure: bank_secure,
            regime: Some(regime),
            vmid,
            asid: None,
            stages: StageScope::Stage1AndCombined,
        };
        let va = if va64 { operand_va(value) } else { value & 0xffff_f000 };
        let tagged = |asid: u64| Scope { asid: (!single).then_some(asid as u16), ..scope };
        // With AS = 0 the bank's entries carry eight bits of ASID, and so does the operand.
        let asid_mask = if va64 && Tcr2::from_bits(bank.tcr2).as16() { 0xffff } else { 0xff };
        let what = match at {
            cb::TLBIALL => Invalidation::Contexts(Scope { stages: StageScope::All, ..scope }),
            cb::TLBIASID => Invalidation::Contexts(tagged(value & asid_mask)),
            cb::TLBIVA | cb::TLBIVAL if va64 => Invalidation::Address(tagged(value >> 48 & asid_mask), va),
            cb::TLBIVA | cb::TLBIVAL => Invalidation::Address(tagged(value & 0xff), va),
            cb::TLBIVAA | cb::TLBIVAAL => Invalidation::Address(scope, va),
            cb::TLBIIPAS2 | cb::TLBIIPAS2L => {
                let bits = if va64 { 0xf_ffff_ffff } else { 0xfff_ffff };
                Invalidation::Address(Scope { stages: StageScope::Stage2, ..scope }, (value & bits) << 12)
            }
            _ => return,
        };
        self.log.publish(what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_55_of_the_operand_is_copied_upwards() {
        assert_eq!(operand_va(0x7000_0000 >> 12), 0x7000_0000);
        assert_eq!(operand_va(0xabcd << 48 | 0x0fff_ffff_f000 >> 12), 0x0fff_ffff_f000);
        assert_eq!(operand_va(0xfff_ffff_ffff), 0xffff_ffff_ffff_f000);
    }
}
