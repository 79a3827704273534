//! Everything an SMMUv2 remembers, as one plain struct; reset, save and restore.

use portcullis_arch::smmuv2::{Acr, Cba2r, Cbar, Cr0, Cr2, Fsr, Gfsr, S2cr, Scr1, Sctlr};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bank::{actlr_mask, any_format, tcr2_write};
use crate::config::Config;
use crate::global::{
    CBAR_MASK, acr_mask, cba2r_write, cr0_write, cr2_mask, gfsynr0_mask, s2cr_mask, scr1_write, smr_mask,
    stream_mask,
};
use crate::stall::Stalls;

/// The registers that exist once per security state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Side {
    pub cr0: u32,
    pub cr2: u32,
    pub acr: u32,
    pub gfsr: u32,
    pub gfar: u64,
    pub gfsynr: [u32; 3],
    pub gpar: u64,
}

impl Side {
    pub fn cr0(&self) -> Cr0 {
        Cr0::from_bits(self.cr0)
    }
    pub fn cr2(&self) -> Cr2 {
        Cr2::from_bits(self.cr2)
    }
}

/// One context bank, with the registers of global space 1 that belong to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Bank {
    pub cbar: u32,
    pub cba2r: u32,
    pub cbfrsynra: u32,
    pub sctlr: u32,
    pub actlr: u32,
    pub tcr2: u32,
    pub ttbr: [u64; 2],
    pub tcr: u32,
    pub contextidr: u32,
    pub mair: [u32; 2],
    pub par: u64,
    /// Without FORMAT, which is computed when read.
    pub fsr: u32,
    pub far: u64,
    pub fsynr: [u32; 2],
    pub ipafar: u64,
    pub impdef: [u32; 2],
}

impl Bank {
    pub fn fsr(&self) -> Fsr {
        Fsr::from_bits(self.fsr)
    }
    pub fn cbar(&self) -> Cbar {
        Cbar::from_bits(self.cbar)
    }
}

/// All registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Regs {
    /// Non-secure, secure.
    pub side: [Side; 2],
    pub scr1: u32,
    pub smr: Vec<u32>,
    pub s2cr: Vec<u32>,
    pub compindex: Vec<u8>,
    pub banks: Vec<Bank>,
    pub stalls: Stalls,
    /// MMU-500 TBUQOS0 to 3.
    pub tbuqos: [u32; 4],
}

impl Regs {
    pub fn reset(c: &Config) -> Self {
        let m = c.mmu500;
        let side = |ns: bool| Side {
            cr0: c.cr0_reset().into_bits(),
            cr2: Cr2::new().into_bits(),
            acr: if m {
                let a = Acr::new().with_cache_lock(true).with_s1wc2en(true);
                a.with_s2wc2en(ns).with_ipa2pa_cen(ns).into_bits()
            } else {
                0
            },
            ..Side::default()
        };
        let bank = Bank {
            cbar: if m { Cbar::new().with_type_code(2).into_bits() } else { 0 },
            sctlr: if m { 0x100 } else { 0 },
            actlr: if m { 3 } else { 0 },
            tcr2: tcr2_write(c, 0),
            cba2r: cba2r_write(c, 0),
            ..Bank::default()
        };
        let groups = usize::from(c.stream_groups);
        let s2cr = if m { S2cr::new().with_type_code(2).into_bits() } else { 0 };
        Self {
            side: [side(true), side(false)],
            scr1: c.scr1_reset().into_bits(),
            smr: vec![0; groups],
            s2cr: vec![s2cr; groups],
            compindex: if c.compressed_index { vec![0; 1 << c.stream_id_bits] } else { Vec::new() },
            banks: vec![bank; usize::from(c.context_banks)],
            stalls: Stalls::default(),
            tbuqos: [0; 4],
        }
    }

    pub fn scr1(&self) -> Scr1 {
        Scr1::from_bits(self.scr1)
    }

    /// True while CR0.STALLD of a bank's security state takes stalling away. MMU-500 has no such bit.
    pub fn stalling_off(&self, c: &Config, n: usize) -> bool {
        self.side[usize::from(self.bank_is_secure(c, n))].cr0().stalld()
    }

    /// SCTLR of a bank as it works.
    pub fn sctlr(&self, c: &Config, n: usize) -> Sctlr {
        let sctlr = Sctlr::from_bits(self.banks.get(n).map_or(0, |b| b.sctlr));
        sctlr.with_cfcfg(sctlr.cfcfg() && !self.stalling_off(c, n))
    }

    /// True if VMIDs have 16 bits.
    pub fn wide_vmids(&self, c: &Config) -> bool {
        c.vmid16 && self.side[0].cr0().vmid16en()
    }

    /// The VMID of a bank.
    pub fn vmid(&self, c: &Config, bank: &Bank) -> u16 {
        if self.wide_vmids(c) { Cba2r::from_bits(bank.cba2r).vmid16() } else { bank.cbar().vmid().into() }
    }

    /// True if bank `n` belongs to the secure side.
    pub fn bank_is_secure(&self, c: &Config, n: usize) -> bool {
        c.secure && n >= usize::from(self.scr1().nsnumcbo())
    }
}

/// A saved SMMU: everything but the wiring. Opaque; `serde` writes it in any format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    version: u32,
    config: Config,
    regs: Regs,
}

/// A saved state that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// Written by another version of the format.
    #[error("saved state has version {0}, this model reads version {VERSION}")]
    Version(u32),
    /// Saved from an SMMU of another configuration.
    #[error("saved state is of an SMMU with another configuration")]
    Config,
    /// Inconsistent contents.
    #[error("saved state is damaged: {0}")]
    Damaged(&'static str),
}

pub(crate) const VERSION: u32 = 1;

impl State {
    pub(crate) fn new(config: &Config, regs: &Regs) -> Self {
        // Naming every field makes a new one break the build until it is handled here and in `into_regs`.
        let Regs { side, scr1, smr, s2cr, compindex, banks, stalls, tbuqos } = regs.clone();
        let regs = Regs { side, scr1, smr, s2cr, compindex, banks, stalls, tbuqos };
        Self { version: VERSION, config: config.clone(), regs }
    }

    pub(crate) fn into_regs(self, config: &Config) -> Result<Regs, RestoreError> {
        let Self { version, config: saved, regs } = self;
        if version != VERSION {
            return Err(RestoreError::Version(version));
        }
        if saved != *config {
            return Err(RestoreError::Config);
        }
        let fresh = Regs::reset(config);
        if regs.smr.len() != fresh.smr.len()
            || regs.s2cr.len() != fresh.s2cr.len()
            || regs.compindex.len() != fresh.compindex.len()
            || regs.banks.len() != fresh.banks.len()
        {
            return Err(RestoreError::Damaged("register counts do not match the configuration"));
        }
        match damage(config, &regs) {
            Some(what) => Err(RestoreError::Damaged(what)),
            None => Ok(regs),
        }
    }
}

/// What is wrong with saved registers of the right counts: values that no write could have left.
fn damage(c: &Config, regs: &Regs) -> Option<&'static str> {
    let upstream = c.upstream_mask();
    let only = |value: u32, mask: u32| value & !mask == 0;
    let side = |s: &Side, secure: bool| {
        cr0_write(c, c.cr0_reset().into_bits(), s.cr0, secure) == s.cr0
            && only(s.cr2, cr2_mask(c, secure))
            && only(s.acr, acr_mask(c, secure))
            && only(s.gfsr, Gfsr::MASK)
            && s.gfar & !upstream == 0
            && only(s.gfsynr[0], gfsynr0_mask(c, secure))
            && only(s.gfsynr[1], stream_mask(c, true))
    };
    let (sctlr, fsynr0) = any_format(c);
    let fault_bits = Fsr::W1C | Fsr::new().with_ss(true).into_bits();
    let bank = |b: &Bank| {
        only(b.cbar, CBAR_MASK)
            && cba2r_write(c, b.cba2r) == b.cba2r
            && only(b.cbfrsynra, stream_mask(c, true))
            && only(b.sctlr, sctlr)
            && only(b.actlr, actlr_mask(c))
            && tcr2_write(c, b.tcr2) == b.tcr2
            && only(b.fsr, fault_bits)
            && only(b.fsynr[0], fsynr0)
    };
    let rules: [(bool, &'static str); 5] = [
        (
            !side(&regs.side[0], false) || !side(&regs.side[1], true),
            "a global register has bits that do not exist",
        ),
        (
            scr1_write(c, c.scr1_reset().into_bits(), regs.scr1) != regs.scr1,
            "SCR1 has bits that do not exist",
        ),
        (
            !regs.smr.iter().all(|v| only(*v, smr_mask(c)))
                || !regs.s2cr.iter().all(|v| only(*v, s2cr_mask(c))),
            "a stream mapping register has bits that do not exist",
        ),
        (!regs.banks.iter().all(bank), "a context bank register has bits that do not exist"),
        (
            // A bank says that it stalls exactly while a transaction waits in it.
            regs.banks.iter().enumerate().any(|(n, b)| b.fsr().ss() != regs.stalls.any_in(n)),
            "FSR.SS and the stalled transactions do not agree",
        ),
    ];
    let bits = rules.iter().find(|(bad, _)| *bad).map(|(_, what)| *what);
    regs.stalls.damage(regs.banks.len()).or(bits)
}
