//! Context banks: what is in their registers, and which are free.

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::smmuv2::offset::cb;
use portcullis_arch::smmuv2::{CbType, Cba2r, Cbar, Sctlr, Tcr2, TcrS1};
use portcullis_arch::{Asid, Pa, Vmid};
use portcullis_hal::Mmio;
use portcullis_pgtable::{Granule, Stage1Registers, Stage2Registers};

use super::regs::Regs;
use super::{DomainKind, Error};
use crate::fault::FaultHandler;

/// How a domain's bank treats faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultModel {
    /// SCTLR.CFCFG: a fault stalls the transaction until the handler has answered. Otherwise it is terminated.
    pub stall: bool,
    /// SCTLR.HUPCF: transactions after a fault are processed. Otherwise they wait, or are terminated, until the
    /// fault is handled (Linux).
    pub keep_processing: bool,
}

/// A stage 1 table that somebody else owns: a process, or the guest of a nested domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableRoot {
    /// Base address of the first table (for a nested domain an IPA), without an ASID.
    pub ttbr0: Pa,
    /// T0SZ: 64 minus the address bits. It also decides at which level the walk starts.
    pub t0sz: u8,
    /// Granule.
    pub granule: Granule,
    /// IPS / PASize code: 0 32, 1 36, 2 40, 3 42, 4 44, 5 48 bits.
    pub ips: u8,
    /// Shareability of walks: 3 inner (coherent), 2 outer.
    pub sh: u8,
    /// Inner cacheability of walks: 1 write-back, 0 non-cacheable.
    pub irgn: u8,
    /// Outer cacheability of walks.
    pub orgn: u8,
    /// Memory attributes that the descriptors index.
    pub mair: u64,
    /// The tag of TLB entries; `None` lets the driver choose.
    pub asid: Option<Asid>,
}

impl TableRoot {
    /// The table that these registers describe (lower half).
    pub const fn from_registers(registers: &Stage1Registers, granule: Granule) -> Self {
        Self {
            ttbr0: registers.ttbr,
            t0sz: registers.tsz,
            granule,
            ips: registers.ips,
            sh: registers.sh,
            irgn: registers.irgn,
            orgn: registers.orgn,
            mair: registers.mair,
            asid: None,
        }
    }

    fn tcr(&self) -> TcrS1 {
        TcrS1::new()
            .with_t0sz(self.t0sz & 0x3f)
            .with_irgn0(self.irgn & 3)
            .with_orgn0(self.orgn & 3)
            .with_sh0(self.sh & 3)
            .with_tg0(self.granule.tg0())
            .with_epd1(true)
    }
}

/// Register values of a bank in use, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BankRegisters {
    pub cba2r: Cba2r,
    pub cbar: Cbar,
    /// TCR2, TTBR1 and MAIR exist at stage 1 only.
    pub stage1: Option<Stage1Only>,
    pub tcr: u32,
    pub ttbr0: u64,
    pub sctlr: Sctlr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage1Only {
    pub tcr2: Tcr2,
    pub ttbr1: u64,
    pub mair: u64,
}

fn sctlr(model: FaultModel) -> Sctlr {
    Sctlr::new()
        .with_cfie(true)
        .with_cfre(true)
        .with_afe(true)
        .with_tre(true)
        .with_m(true)
        .with_cfcfg(model.stall)
        .with_hupcf(model.keep_processing)
}

fn cba2r(vmid16: Option<Vmid>) -> Cba2r {
    Cba2r::new().with_va64(true).with_vmid16(vmid16.map_or(0, Vmid::get))
}

/// Where the output of a stage 1 bank goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Below {
    /// Stage 2 is bypassed.
    Nothing,
    /// Into this stage 2 bank with this VMID.
    Stage2(u8, Vmid),
}

impl BankRegisters {
    /// A stage 1 bank (Linux `arm_smmu_init_context_bank`).
    pub fn stage1(root: &TableRoot, asid: Asid, below: Below, vmid16: bool, model: FaultModel) -> Self {
        let cbar = match below {
            // Neutral attributes for the stage 2 that is not there: write-back, non-shareable.
            Below::Nothing => {
                Cbar::new().with_type_code(CbType::Stage1Bypass as u8).with_bpshcfg(3).with_memattr(0xf)
            }
            Below::Stage2(bank, vmid) => Cbar::new()
                .with_type_code(CbType::Nested as u8)
                .with_s2_cbndx(bank)
                .with_vmid(if vmid16 { 0 } else { vmid.get() as u8 }),
        };
        let vmid = match below {
            Below::Stage2(_, vmid) => vmid,
            Below::Nothing => Vmid(0),
        };
        let tag = u64::from(asid.get()) << 48;
        Self {
            cba2r: cba2r(vmid16.then_some(vmid)),
            cbar,
            stage1: Some(Stage1Only {
                tcr2: Tcr2::new().with_pasize(root.ips & 7).with_sep(7).with_as16(true),
                ttbr1: tag,
                mair: root.mair,
            }),
            tcr: root.tcr().into_bits(),
            ttbr0: root.ttbr0.get() & 0x0000_ffff_ffff_ffff | tag,
            sctlr: sctlr(model).with_asidpne(true),
        }
    }

    /// A stage 2 bank.
    pub fn stage2(table: &Stage2Registers, vmid: Vmid, vmid16: bool, model: FaultModel) -> Self {
        Self {
            cba2r: cba2r(vmid16.then_some(vmid)),
            cbar: Cbar::new().with_type_code(CbType::Stage2 as u8).with_vmid(if vmid16 {
                0
            } else {
                vmid.get() as u8
            }),
            stage1: None,
            tcr: table.vtcr(),
            ttbr0: table.vttbr.get(),
            sctlr: sctlr(model),
        }
    }

    /// Writes all of it, SCTLR last, in the order of Linux's `arm_smmu_write_context_bank`: the format before what
    /// depends on it, TCR2.AS before TTBR.
    pub fn write<R: Mmio>(&self, regs: &Regs<R>, bank: u8) {
        regs.write_cba2r(bank, self.cba2r.into_bits());
        regs.write_cbar(bank, self.cbar.into_bits());
        if let Some(stage1) = &self.stage1 {
            regs.write_cb(bank, cb::TCR2, stage1.tcr2.into_bits());
        }
        regs.write_cb(bank, cb::TCR, self.tcr);
        regs.write_cb64(bank, cb::TTBR0, self.ttbr0);
        if let Some(stage1) = &self.stage1 {
            regs.write_cb64(bank, cb::TTBR1, stage1.ttbr1);
            regs.write_cb(bank, cb::MAIR0, stage1.mair as u32);
            regs.write_cb(bank, cb::MAIR1, (stage1.mair >> 32) as u32);
        }
        regs.write_cb(bank, cb::SCTLR, self.sctlr.into_bits());
    }

    /// 1 or 2.
    pub fn stage(&self) -> u8 {
        if self.stage1.is_some() { 1 } else { 2 }
    }
}

/// One bank in software.
#[derive(Clone, Default)]
pub(super) struct Bank {
    /// `None`: free, or `lost`.
    pub registers: Option<BankRegisters>,
    /// Taken, perhaps not written yet.
    pub taken: bool,
    /// An invalidation did not complete when it was freed: its tables may still be walked.
    pub lost: bool,
    pub asid: Option<Asid>,
    pub vmid: Vmid,
    /// TTBR0 of a table of somebody else, to recognise sharing of an ASID.
    pub root: Option<Pa>,
    pub handler: Option<Arc<dyn FaultHandler>>,
    /// A fault handler answered "later": the transaction is stalled and CFIE is off.
    pub deferred: bool,
}

/// All banks.
pub(super) struct Banks {
    banks: Vec<Bank>,
    stage2_only: usize,
}

impl Banks {
    pub fn new(banks: u8, stage2_only: u8) -> Self {
        Self {
            banks: alloc::vec![Bank::default(); usize::from(banks)],
            stage2_only: usize::from(stage2_only),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u8, &Bank)> {
        self.banks.iter().enumerate().map(|(index, bank)| (index as u8, bank))
    }
    pub fn get(&self, bank: u8) -> Option<&Bank> {
        self.banks.get(usize::from(bank))
    }
    pub fn get_mut(&mut self, bank: u8) -> Option<&mut Bank> {
        self.banks.get_mut(usize::from(bank))
    }

    /// Takes the first free bank: from 0 for stage 2, behind the stage 2 only ones for stage 1.
    pub fn take(&mut self, kind: DomainKind) -> Result<u8, Error> {
        let first = if kind == DomainKind::Stage2 { 0 } else { self.stage2_only };
        let usable = self.banks.len().saturating_sub(first);
        let free = |(_, bank): &(usize, &mut Bank)| !bank.taken && !bank.lost;
        if let Some((index, bank)) = self.banks.iter_mut().enumerate().skip(first).find(free) {
            *bank = Bank { taken: true, ..Bank::default() };
            return Ok(index as u8);
        }
        Err(Error::NoContextBank {
            kind,
            usable,
            banks: self.banks.len(),
            stage2_only: self.stage2_only,
            lost: self.banks.iter().filter(|bank| bank.lost).count(),
        })
    }

    /// Frees a bank, or gives it up.
    pub fn release(&mut self, bank: u8, lost: bool) {
        if let Some(bank) = self.get_mut(bank) {
            // Entries with the tag of a lost bank may still be in the TLB, so the tag stays taken with it.
            let tag = if lost { (bank.asid, bank.vmid) } else { (None, Vmid(0)) };
            *bank = Bank { lost, asid: tag.0, vmid: tag.1, ..Bank::default() };
        }
    }

    /// An ASID that no other address space of this VMID uses: the wished one, else the bank's number (Linux), else
    /// the next free one above.
    pub fn choose_asid(
        &self,
        bank: u8,
        vmid: Vmid,
        wish: Option<Asid>,
        root: Option<Pa>,
    ) -> Result<Asid, Error> {
        let user = |asid: Asid| {
            self.iter()
                .find(|(index, other)| *index != bank && other.vmid == vmid && other.asid == Some(asid))
        };
        if let Some(asid) = wish {
            return match user(asid) {
                // The same tables under the same tag are one address space.
                Some((_, other)) if other.root.is_some() && other.root == root => Ok(asid),
                Some((index, _)) => Err(Error::AsidInUse { asid, bank: index }),
                None => Ok(asid),
            };
        }
        let first = u16::from(bank);
        // There are at most 128 users, so one of 129 candidates is free.
        let free = (first..first + 129).map(Asid).find(|asid| user(*asid).is_none());
        Ok(free.unwrap_or(Asid(first)))
    }
}
