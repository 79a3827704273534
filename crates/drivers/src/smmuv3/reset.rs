//! Probe, reset, take-over, resume and shutdown, in the order of Linux's `arm_smmu_device_reset`.

use core::sync::atomic::Ordering;

use portcullis_arch::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa, IrqCfg2, IrqCtrl, offset};
use portcullis_hal::{Mmio, poll};

use super::cmdq::commands::cfgi_all;
use super::{Error, MsiTarget, Platform, Shared, tlbi};

/// Inner shareable, write-back: how the SMMU reads tables and queues where it is coherent (Linux writes the same,
/// coherent or not).
const CR1: Cr1 = Cr1::new()
    .with_table_sh(3)
    .with_table_oc(1)
    .with_table_ic(1)
    .with_queue_sh(3)
    .with_queue_oc(1)
    .with_queue_ic(1);
/// Memory type of MSI writes: Device-nGnRE.
const MSI_DEVICE: u8 = 1;

impl<P: Platform> Shared<P> {
    pub(super) fn read(&self, at: u64) -> u32 {
        self.platform.registers().read32(at as usize)
    }
    pub(super) fn write(&self, at: u64, value: u32) {
        self.platform.registers().write32(at as usize, value);
    }
    fn write64(&self, at: u64, value: u64) {
        self.platform.registers().write64(at as usize, value);
    }

    /// Waits until a register holds `value` in the bits of `mask`.
    fn wait(&self, what: &'static str, at: u64, mask: u32, value: u32) -> Result<(), Error> {
        let read = || u64::from(self.read(at));
        let done = |seen: u64| seen as u32 & mask == value;
        poll(self.platform.clock(), what, self.options.timeout_us, read, done)?;
        Ok(())
    }

    /// Writes CR0 and waits until it has taken effect.
    fn set_cr0(&self, cr0: Cr0) -> Result<(), Error> {
        self.write(offset::CR0, cr0.into_bits());
        self.wait("CR0ACK == CR0", offset::CR0ACK, u32::MAX, cr0.into_bits())
    }

    fn set_irq_ctrl(&self, ctrl: IrqCtrl) -> Result<(), Error> {
        self.write(offset::IRQ_CTRL, ctrl.into_bits());
        self.wait("IRQ_CTRLACK == IRQ_CTRL", offset::IRQ_CTRLACK, u32::MAX, ctrl.into_bits())
    }

    /// From now on everything aborts while translation is off.
    fn abort_while_off(&self) -> Result<(), Error> {
        let update = Gbpa::new().with_update(true).into_bits();
        self.wait("GBPA.Update == 0", offset::GBPA, update, 0)?;
        let gbpa = Gbpa::from_bits(self.read(offset::GBPA)).with_abort(true).with_update(true);
        self.write(offset::GBPA, gbpa.into_bits());
        self.wait("GBPA.Update == 0", offset::GBPA, update, 0)
    }

    /// Turns everything off. If translation was on, nothing gets through from here on until it is on again.
    pub(super) fn disable(&self) -> Result<(), Error> {
        self.queue_runs.store(false, Ordering::Release);
        if Cr0::from_bits(self.read(offset::CR0)).smmuen() {
            self.abort_while_off()?;
        }
        self.set_cr0(Cr0::new())?;
        self.router.forget_stalls();
        Ok(())
    }

    /// Programs everything up to, but without, turning translation on. Gives CR0.
    pub(super) fn prepare(&self) -> Result<Cr0, Error> {
        let features = &self.features;
        self.disable()?;
        self.write(offset::CR1, CR1.into_bits());
        let cr2 = Cr2::new().with_ptm(true).with_recinvsid(true).with_e2h(self.el2());
        self.write(offset::CR2, cr2.into_bits());
        {
            let config = self.configuration()?;
            self.write64(offset::STRTAB_BASE, config.table.base_register());
            self.write(offset::STRTAB_BASE_CFG, config.table.config_register());
        }

        // An error of the one before would keep the queue from running.
        let (gerror, gerrorn) = (self.read(offset::GERROR), self.read(offset::GERRORN));
        if gerror != gerrorn {
            self.write(offset::GERRORN, gerror);
        }
        self.queue.program();
        let mut cr0 = Cr0::new().with_cmdqen(true);
        self.set_cr0(cr0)?;
        self.queue_runs.store(true, Ordering::Release);
        self.queue.issue_sync(&[cfgi_all()])?;
        if features.hyp {
            self.queue.issue_sync(&[tlbi::all_el2()])?;
        }
        self.queue.issue_sync(&[tlbi::all_el1()])?;

        self.events.program();
        cr0 = cr0.with_eventqen(true);
        self.set_cr0(cr0)?;
        if let Some(requests) = &self.requests {
            requests.program();
            cr0 = cr0.with_priqen(true);
            self.set_cr0(cr0)?;
        }
        if features.ats {
            cr0 = cr0.with_atschk(true);
            self.set_cr0(cr0)?;
        }
        self.set_up_interrupts()?;
        Ok(cr0)
    }

    /// Turns translation on.
    pub(super) fn enable(&self, cr0: Cr0) -> Result<(), Error> {
        self.set_cr0(cr0.with_smmuen(true))
    }

    fn set_up_interrupts(&self) -> Result<(), Error> {
        self.set_irq_ctrl(IrqCtrl::new())?;
        let targets = self.options.msi.unwrap_or_default();
        let sources = [
            (
                true,
                targets.gerror,
                [offset::GERROR_IRQ_CFG0, offset::GERROR_IRQ_CFG1, offset::GERROR_IRQ_CFG2],
            ),
            (
                true,
                targets.events,
                [offset::EVENTQ_IRQ_CFG0, offset::EVENTQ_IRQ_CFG1, offset::EVENTQ_IRQ_CFG2],
            ),
            (
                self.requests.is_some(),
                targets.requests,
                [offset::PRIQ_IRQ_CFG0, offset::PRIQ_IRQ_CFG1, offset::PRIQ_IRQ_CFG2],
            ),
        ];
        for (present, target, [cfg0, cfg1, cfg2]) in sources {
            if !present || !self.features.msi {
                continue;
            }
            let MsiTarget { address, data } = target.unwrap_or_default();
            self.write64(cfg0, address & MsiTarget::ADDRESS);
            if target.is_some() {
                self.write(cfg1, data);
                self.write(cfg2, IrqCfg2::new().with_memattr(MSI_DEVICE).into_bits());
            }
        }
        let ctrl = IrqCtrl::new().with_eventq_irqen(true).with_gerror_irqen(true);
        self.set_irq_ctrl(ctrl.with_priq_irqen(self.requests.is_some()))
    }
}
