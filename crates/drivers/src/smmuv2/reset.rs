//! Probe, reset, resume and shutdown.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{Acr, Cr0};
use portcullis_hal::{Clock, DmaMemory, Mmio};
use spin::Mutex;

use super::bank::Banks;
use super::fault::CONTEXT_FAULT;
use super::ident::{Identification, ProbeError, StreamMapping};
use super::regs::Regs;
use super::streams::StreamTable;
use super::{Error, Options, Shared, SmmuV2, State};
use crate::fault::FaultLog;

/// ACTLR of MMU-500: enable the prefetcher. Several errata of MMU-500 (841119, 826419 and others) need it off.
const ACTLR_CPRE: u32 = 1 << 1;

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> SmmuV2<R, M, C> {
    /// Identifies an SMMU, resets it and enables translation (Linux `arm_smmu_device_probe`).
    ///
    /// Afterwards every stream faults (or bypasses, as the options say) except the preserved ones.
    pub fn probe(mmio: R, memory: M, clock: C, options: Options) -> Result<Self, ProbeError> {
        let mut regs = Regs::new(mmio);
        let mut id = Identification::read(&regs, options.window)?;
        regs.set_layout(id.page_shift, id.global_pages);
        let mut streams = StreamTable::new(&id, options.bypass_unmatched);

        // Firmware may have left the SMMU translating for streams that stay in use. Nothing may fault while their
        // entries are rebuilt, so clients bypass until the reset is through.
        let cr0 = Cr0::from_bits(regs.read(gr0::CR0));
        regs.write(gr0::CR0, cr0.with_clientpd(true).into_bits());
        let preserve = |stream| streams.preserve(stream, &id).map_err(Error::from).map_err(ProbeError::Reset);
        options.preserve.iter().copied().try_for_each(preserve)?;
        let preserved = streams.entries().iter().filter(|entry| entry.preserved).count();

        let state = State { streams, banks: Banks::new(id.context_banks, id.stage2_banks) };
        let faults = FaultLog::new(options.fault_log);
        let mut shared = Shared {
            regs,
            memory,
            clock,
            id,
            options,
            preserved,
            state: Mutex::new(state),
            prefetch_locked: AtomicBool::new(false),
            domain_numbers: AtomicU32::new(0),
            faults: Mutex::new(faults),
            handler: Mutex::new(None),
        };
        shared.reset().map_err(ProbeError::Reset)?;
        shared.probe_masks(&mut id);
        shared.id = id;
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Programs everything again after the SMMU lost its registers, from the software copy. Domains, attachments and
    /// mappings are as before.
    pub fn resume(&self) -> Result<(), Error> {
        self.shared.reset()
    }

    /// Turns translation off: **every stream passes untranslated** from now on (Linux `arm_smmu_device_shutdown`).
    /// Tells whether domains were in use. [`resume`](Self::resume) turns it on again.
    pub fn shutdown(&self) -> bool {
        let state = self.shared.state.lock();
        self.shared.regs.write(gr0::CR0, Cr0::new().with_clientpd(true).into_bits());
        state.banks.iter().any(|(_, bank)| bank.registers.is_some())
    }
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Shared<R, M, C> {
    /// Linux `arm_smmu_device_reset`.
    fn reset(&self) -> Result<(), Error> {
        let regs = &self.regs;
        let gfsr = regs.read(gr0::GFSR);
        regs.write(gr0::GFSR, gfsr);
        self.write_groups_and_banks();
        self.invalidate_everything();
        let cr0 = Cr0::from_bits(regs.read(gr0::CR0))
            .with_gfre(true)
            .with_gfie(true)
            .with_gcfgfre(true)
            .with_gcfgfie(true)
            .with_vmidpne(true)
            .with_ptm(true)
            .with_clientpd(false)
            .with_usfcfg(!self.options.bypass_unmatched)
            .with_fb(false)
            .with_bsu(0);
        let cr0 = if self.id.vmid16 { cr0.with_vmid16en(true) } else { cr0 };
        let cr0 = if self.id.extended_ids { cr0.with_exidenable(true) } else { cr0 };
        if self.options.mmu500 {
            self.reset_mmu500();
        }
        self.sync_global()?;
        regs.write(gr0::CR0, cr0.into_bits());
        Ok(())
    }

    /// Everything that the software copy holds.
    fn write_groups_and_banks(&self) {
        let mut state = self.state.lock();
        for index in 0..state.streams.entries().len() {
            self.write_group(&state.streams, index);
        }
        for bank in 0..self.id.context_banks {
            let Some(slot) = state.banks.get_mut(bank) else { continue };
            slot.deferred = false;
            match &slot.registers {
                Some(registers) => registers.write(&self.regs, bank),
                None => self.regs.write_cb(bank, cb::SCTLR, 0),
            }
            self.regs.write_cb(bank, cb::FSR, CONTEXT_FAULT);
        }
    }

    /// Linux `arm_mmu500_reset`.
    fn reset_mmu500(&self) {
        let regs = &self.regs;
        let acr = Acr::from_bits(regs.read(gr0::ACR));
        // From r2p0 on ACTLR is locked until CACHE_LOCK is cleared.
        let acr = if self.id.revision.0 >= 2 { acr.with_cache_lock(false) } else { acr };
        // Unmatched and bypassing streams then use the TLB too, instead of going to the TCU each time.
        regs.write(gr0::ACR, acr.with_smtnmb_tlben(true).with_s2crb_tlben(true).into_bits());
        let mut locked = false;
        for bank in 0..self.id.context_banks {
            let actlr = regs.read_cb(bank, cb::ACTLR);
            regs.write_cb(bank, cb::ACTLR, actlr & !ACTLR_CPRE);
            locked |= regs.read_cb(bank, cb::ACTLR) & ACTLR_CPRE != 0;
        }
        self.prefetch_locked.store(locked, Ordering::Relaxed);
    }

    /// Finds out which ID and MASK bits exist, by writing them into a group that is not in use (Linux
    /// `arm_smmu_test_smr_masks`). Without a free group what the entries already hold is believed.
    fn probe_masks(&self, id: &mut Identification) {
        if !matches!(id.streams, StreamMapping::Matching { .. }) {
            return;
        }
        let Some(index) = self.state.lock().streams.first_free() else {
            id.stream_mask_mask = id.stream_id_mask;
            return;
        };
        let field = u32::from(if id.extended_ids { u16::MAX } else { 0x7fff });
        self.regs.write_smr(index, u32::from(id.stream_id_mask));
        id.stream_id_mask = (self.regs.read_smr(index) & field) as u16;
        self.regs.write_smr(index, u32::from(id.stream_id_mask) << 16);
        id.stream_mask_mask = (self.regs.read_smr(index) >> 16 & field) as u16;
    }
}
