//! Interrupts: reading fault records, asking the owner, answering the hardware.

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{Gfsr, Gfsynr0};
use portcullis_arch::{Iova, StreamId};
use portcullis_hal::{Clock, DmaMemory, Mmio};

use super::fault::{CONTEXT_FAULT, ContextFault, ContextRegisters, GlobalFault};
use super::{Error, Shared, SmmuV2};
use crate::fault::{FaultHandler, FaultReport, FaultResponse};

const RESUME_RETRY: u32 = 0;
const RESUME_TERMINATE: u32 = 1;

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Shared<R, M, C> {
    /// Reads the fault record of a bank, in Linux's order.
    pub(super) fn read_context_fault(&self, bank: u8, stage: u8) -> ContextFault {
        let regs = &self.regs;
        let mut raw = ContextRegisters {
            far: regs.read_cb64(bank, cb::FAR),
            fsr: regs.read_fsr(bank),
            fsynr0: regs.read_cb(bank, cb::FSYNR0),
            cbfrsynra: regs.read_cbfrsynra(bank),
            ipafar: None,
        };
        if stage == 2 && raw.fsr & CONTEXT_FAULT != 0 {
            raw.ipafar = Some(regs.read_cb64(bank, cb::IPAFAR));
        }
        ContextFault::decode(bank, stage, raw)
    }

    /// Tells everybody about the fault of a domain that is gone. There is nothing left to answer.
    pub(super) fn report_last_fault(&self, fault: &ContextFault, own: Option<Arc<dyn FaultHandler>>) {
        let report = fault.report();
        self.faults.lock().push(report);
        let handler = own.or_else(|| self.handler.lock().clone());
        if let Some(handler) = handler {
            let _the_transaction_is_terminated = handler.fault(&report);
        }
    }
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> SmmuV2<R, M, C> {
    /// For any interrupt of the SMMU, combined or not: looks at the global status and at every bank in use, and handles
    /// what it finds. Gives how many faults that were; 0 means that the interrupt was somebody else's.
    ///
    /// One look at each: a fault that comes meanwhile keeps the (level) interrupt up.
    pub fn handle_irq(&self) -> usize {
        let mut handled = usize::from(self.handle_global_fault().is_some());
        let banks: Vec<u8> = {
            let state = self.shared.state.lock();
            state.banks.iter().filter(|(_, slot)| slot.registers.is_some()).map(|(bank, _)| bank).collect()
        };
        for bank in banks {
            if self.shared.regs.read_fsr(bank) & CONTEXT_FAULT != 0 {
                handled += usize::from(self.handle_context_fault(bank).is_some());
            }
        }
        handled
    }

    /// Handles the fault that a bank has recorded, if there is one (Linux `arm_smmu_context_fault`).
    ///
    /// The owner of the domain is asked; a stalled transaction is then retried or terminated. FSR is cleared before
    /// RESUME: the other way round the retry could fault into a record that is still full, and MMU-500 ignores a
    /// RESUME while FSR is not clear.
    pub fn handle_context_fault(&self, bank: u8) -> Option<ContextFault> {
        let shared = &self.shared;
        let regs = &shared.regs;
        let (stage, handler) = {
            let state = shared.state.lock();
            let slot = state.banks.get(bank)?;
            if slot.deferred {
                return None;
            }
            (slot.registers.as_ref()?.stage(), slot.handler.clone())
        };
        let fault = shared.read_context_fault(bank, stage);
        let raw = fault.raw;
        if raw.fsr & CONTEXT_FAULT == 0 {
            return None;
        }
        let report = fault.report();
        shared.faults.lock().push(report);
        let handler = handler.or_else(|| shared.handler.lock().clone());
        let response = handler.map_or(FaultResponse::Terminate, |handler| handler.fault(&report));
        if fault.stalled && response == FaultResponse::Deferred {
            self.defer(bank);
            regs.write_cb(bank, cb::FSR, raw.fsr);
        } else {
            regs.write_cb(bank, cb::FSR, raw.fsr);
            if fault.stalled {
                regs.write_cb(bank, cb::RESUME, resume_code(response));
            }
        }
        Some(fault)
    }

    /// MMU-500 keeps the interrupt up while a transaction is stalled, so it is masked until somebody has decided
    /// (Linux from 6.16 on).
    fn defer(&self, bank: u8) {
        let mut state = self.shared.state.lock();
        let Some(slot) = state.banks.get_mut(bank) else { return };
        let Some(registers) = &slot.registers else { return };
        slot.deferred = true;
        self.shared.regs.write_cb(bank, cb::SCTLR, registers.sctlr.with_cfie(false).into_bits());
    }

    /// The answer to a fault that a handler deferred: [`FaultResponse::Resolved`] retries the transaction,
    /// everything else terminates it.
    pub fn resume_stalled(&self, bank: u8, response: FaultResponse) -> Result<(), Error> {
        let mut state = self.shared.state.lock();
        let slot = state.banks.get_mut(bank).filter(|slot| slot.deferred);
        let Some((slot, registers)) = slot.and_then(|slot| slot.registers.map(|registers| (slot, registers)))
        else {
            return Err(Error::NothingStalled { bank });
        };
        slot.deferred = false;
        self.shared.regs.write_cb(bank, cb::RESUME, resume_code(response));
        self.shared.regs.write_cb(bank, cb::SCTLR, registers.sctlr.into_bits());
        Ok(())
    }

    /// Handles a recorded global fault, if there is one (Linux `arm_smmu_global_fault`). The handler set by
    /// [`set_fault_handler`](Self::set_fault_handler) is told; there is nothing to answer.
    pub fn handle_global_fault(&self) -> Option<GlobalFault> {
        let regs = &self.shared.regs;
        let gfsr = regs.read(gr0::GFSR);
        if gfsr == 0 {
            return None;
        }
        let gfsynr0 = regs.read(gr0::GFSYNR0);
        let gfsynr1 = regs.read(gr0::GFSYNR1);
        let gfsynr2 = regs.read(gr0::GFSYNR2);
        let fault = GlobalFault {
            flags: Gfsr::from_bits(gfsr),
            syndrome: Gfsynr0::from_bits(gfsynr0),
            stream: StreamId(gfsynr1 & 0xffff),
            iova: Some(Iova(regs.read64(gr0::GFAR))),
            gfsynr1,
            gfsynr2,
        };
        regs.write(gr0::GFSR, gfsr);
        let report: FaultReport = fault.report();
        self.shared.faults.lock().push(report);
        let handler = self.shared.handler.lock().clone();
        if let Some(handler) = handler {
            let _only_a_stalled_transaction_can_be_answered = handler.fault(&report);
        }
        Some(fault)
    }
}

fn resume_code(response: FaultResponse) -> u32 {
    if response == FaultResponse::Resolved { RESUME_RETRY } else { RESUME_TERMINATE }
}
