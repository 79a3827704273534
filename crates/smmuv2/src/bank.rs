//! Registers of a context bank's page (IHI 0062D chapters 16 and 17).

use portcullis_arch::smmuv2::offset::cb;
use portcullis_arch::smmuv2::{Acr, CbType, Fsr, Fsynr0, Sctlr};
use portcullis_bus::Memory;
use portcullis_walk::Invalidation;

use crate::config::Config;
use crate::context::format_code;
use crate::fault::resume;
use crate::global::{half, set_half};
use crate::model::{Live, SmmuV2};
use crate::state::{Bank, Regs};

/// SCTLR fields of a stage 1 bank and of a stage 2 bank (which has FB, bit 21).
const SCTLR_S1: u32 = 0x7fdf_d7ff;
const SCTLR_S2: u32 = 0x0fef_e1ff;

/// The SCTLR fields that exist. MMU-500 fixes ASIDPNE (bit 12) at 0 and lists FB at stage 1 too.
fn sctlr_mask(c: &Config, is_stage2: bool) -> u32 {
    match (is_stage2, c.mmu500) {
        (true, _) => SCTLR_S2,
        (false, true) => SCTLR_S1 & !(1 << 12) | 1 << 21,
        (false, false) => SCTLR_S1,
    }
}

/// The FSYNR0 fields that exist: NESTED, S1PTWF, ATOF (read only on MMU-500) and S1CBNDX are stage 2's.
fn fsynr0_mask(c: &Config, is_stage2: bool) -> u32 {
    let nested = Fsynr0::new().with_nested(true).with_s1ptwf(true).with_s1cbndx(0xff);
    let atof = Fsynr0::new().with_atof(true);
    match is_stage2 {
        false => 0x0d73,
        true => {
            let absent = if c.nested { 0 } else { nested.into_bits() };
            0x00ff_0f7f & !absent & !if c.mmu500 { atof.into_bits() } else { 0 }
        }
    }
}

/// TCR2: HAD with IDR2.HADS, no HA and HD (IDR1.HAFDBS is 0); MMU-500 fixes TBI at 1.
pub(crate) fn tcr2_write(c: &Config, value: u32) -> u32 {
    let had = if c.hierarchy_disable { 0x300 } else { 0 };
    value & (0x4003_c077 | had) | if c.mmu500 { 0x60 } else { 0 }
}

/// ACTLR: MMU-500's CPRE and CMTLB.
pub(crate) fn actlr_mask(c: &Config) -> u32 {
    if c.mmu500 { 3 } else { 0 }
}

/// Fields of SCTLR and FSYNR0 that exist in either format.
pub(crate) fn any_format(c: &Config) -> (u32, u32) {
    (sctlr_mask(c, false) | sctlr_mask(c, true), fsynr0_mask(c, false) | fsynr0_mask(c, true))
}

/// Registers that a stage 2 bank does not have.
fn stage1_only(at: usize) -> bool {
    matches!(at, cb::TCR2 | cb::TTBR1 | 0x2c | cb::CONTEXTIDR | cb::MAIR0 | cb::MAIR1 | cb::PAR | 0x54)
        || (cb::TLBIVA..cb::TLBIIPAS2).contains(&at)
        || (cb::ATS1PR..=cb::ATSR).contains(&at)
}

fn stage2_only(at: usize) -> bool {
    matches!(at, cb::IPAFAR | 0x74 | cb::TLBIIPAS2 | 0x634 | cb::TLBIIPAS2L | 0x63c)
}

impl<M: Memory> SmmuV2<M> {
    /// The bank behind a page, if this security state may touch it and the register exists in its format.
    fn accessible<'a>(&self, regs: &'a Regs, n: usize, at: usize, secure: bool) -> Option<&'a Bank> {
        let bank = regs.banks.get(n)?;
        if !secure && regs.bank_is_secure(&self.config, n) {
            return None;
        }
        let is_stage2 = bank.cbar().kind() == CbType::Stage2;
        let exists = if is_stage2 { !stage1_only(at) } else { !stage2_only(at) };
        exists.then_some(bank)
    }

    pub(crate) fn read_bank(&self, live: &mut Live, n: usize, at: usize, secure: bool) -> u32 {
        let Live { regs, bank_sync, .. } = live;
        let Some(b) = self.accessible(regs, n, at, secure) else { return 0 };
        let c = &self.config;
        let is_stage2 = b.cbar().kind() == CbType::Stage2;
        match at {
            cb::SCTLR => regs.sctlr(c, n).into_bits() & sctlr_mask(c, is_stage2),
            cb::ACTLR => b.actlr,
            cb::TCR2 => b.tcr2,
            cb::TTBR0 | 0x24 => half(b.ttbr[0], at == 0x24),
            cb::TTBR1 | 0x2c => half(b.ttbr[1], at == 0x2c),
            // EAE reads as one where there is no short format.
            cb::TCR if is_stage2 && format_code(c, b) == 1 => b.tcr | 1 << 31,
            cb::TCR => b.tcr,
            cb::CONTEXTIDR => b.contextidr,
            cb::MAIR0 => b.mair[0],
            cb::MAIR1 => b.mair[1],
            0x40 | 0x44 => b.impdef[(at - 0x40) / 4],
            cb::PAR | 0x54 if c.stage1 => half(b.par, at == 0x54),
            cb::FSR => b.fsr().with_format(format_code(c, b)).into_bits(),
            cb::FAR | 0x64 => half(b.far, at == 0x64),
            cb::FSYNR0 => b.fsynr[0] & fsynr0_mask(c, is_stage2),
            cb::FSYNR1 => b.fsynr[1],
            // Without nesting it is another name of FAR.
            cb::IPAFAR | 0x74 if !c.nested => half(b.far, at == 0x74),
            cb::IPAFAR | 0x74 => half(b.ipafar, at == 0x74),
            cb::TLBSTATUS => bank_sync.get_mut(n).map_or(0, |t| u32::from(!t.poll())),
            _ => 0,
        }
    }

    pub(crate) fn write_bank(&self, live: &mut Live, n: usize, at: usize, secure: bool, value: u32) {
        if self.accessible(&live.regs, n, at, secure).is_none() {
            return;
        }
        match at {
            cb::RESUME => resume(&self.config, &mut live.regs, n as u8, value & 1 != 0),
            cb::TLBSYNC => {
                let token = self.log.begin_sync();
                if let Some(t) = live.bank_sync.get_mut(n) {
                    t.merge(token);
                }
            }
            cb::TLBIASID | cb::TLBIALL => self.bank_invalidation(&live.regs, n, at, secure, value.into()),
            cb::SCTLR => {
                let stalld = live.regs.stalling_off(&self.config, n);
                let Some(bank) = live.regs.banks.get_mut(n) else { return };
                // CFCFG is read only while CR0.STALLD is set.
                let fixed = if stalld { Sctlr::new().with_cfcfg(true).into_bits() } else { 0 };
                let is_stage2 = bank.cbar().kind() == CbType::Stage2;
                bank.sctlr = value & sctlr_mask(&self.config, is_stage2) & !fixed | bank.sctlr & fixed;
                self.log.publish(Invalidation::Config);
            }
            _ => {
                let lock = self.actlr_locked(&live.regs, n);
                if let Some(bank) = live.regs.banks.get_mut(n)
                    && write_register(&self.config, bank, at, value, lock)
                {
                    self.log.publish(Invalidation::Config);
                }
            }
        }
    }

    /// CACHE_LOCK in the ACR of a bank's security state makes its ACTLR read only (MMU-500).
    fn actlr_locked(&self, regs: &Regs, n: usize) -> bool {
        let side = &regs.side[usize::from(regs.bank_is_secure(&self.config, n))];
        self.config.mmu500 && Acr::from_bits(side.acr).cache_lock()
    }
}

/// Writes a plain register; true if translations may now be different.
fn write_register(c: &Config, b: &mut Bank, at: usize, value: u32, actlr_locked: bool) -> bool {
    let is_stage2 = b.cbar().kind() == CbType::Stage2;
    match at {
        cb::ACTLR => {
            if !actlr_locked {
                b.actlr = value & actlr_mask(c);
            }
            return false;
        }
        cb::TCR2 => b.tcr2 = tcr2_write(c, value),
        cb::TTBR0 | 0x24 => set_half(&mut b.ttbr[0], at == 0x24, value),
        cb::TTBR1 | 0x2c => set_half(&mut b.ttbr[1], at == 0x2c, value),
        cb::TCR => b.tcr = value,
        cb::CONTEXTIDR => b.contextidr = value,
        cb::MAIR0 => b.mair[0] = value,
        cb::MAIR1 => b.mair[1] = value,
        0x40 | 0x44 => b.impdef[(at - 0x40) / 4] = value,
        cb::PAR | 0x54 => {
            set_half(&mut b.par, at == 0x54, value);
            return false;
        }
        cb::FSR => {
            b.fsr &= !(value & Fsr::W1C);
            return false;
        }
        cb::FSRRESTORE => {
            let ss = b.fsr().ss();
            b.fsr = Fsr::from_bits(value & Fsr::W1C).with_ss(ss).into_bits();
        }
        cb::FAR | 0x64 => {
            set_half(&mut b.far, at == 0x64, value);
            b.far &= c.upstream_mask();
            return false;
        }
        cb::FSYNR0 => {
            b.fsynr[0] = value & fsynr0_mask(c, is_stage2);
            return false;
        }
        cb::FSYNR1 => {
            b.fsynr[1] = value;
            return false;
        }
        cb::IPAFAR | 0x74 if c.nested => {
            set_half(&mut b.ipafar, at == 0x74, value);
            b.ipafar &= !0xfff;
            return false;
        }
        _ => return false,
    }
    true
}
