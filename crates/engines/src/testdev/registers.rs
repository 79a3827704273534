//! The registers of BAR0, and how accesses of any size reach them.

use std::sync::PoisonError;

use portcullis_arch::testdev::{BAR0_BYTES, IrqCtrl, PasidCtrl, reg};
use portcullis_bus::mmio::{Registers32, Shared};
use portcullis_bus::{BusError, Mmio};

use super::{Cause, NS_PER_MS, TestDev, When};

/// All defined bits of IRQ_CTRL that software sets.
const IRQ_WRITABLE: u32 = 3;

impl TestDev {
    /// What a read of up to 4 bytes at `offset` returns, before it is cut to its size.
    fn read_register(&self, offset: u64) -> u64 {
        let v = &self.values;
        match offset {
            reg::SRCADDR => v.srcaddr,
            reg::DSTADDR => v.dstaddr,
            reg::SIZE => v.size,
            reg::STATUS => u64::from(v.busy),
            reg::BUSY_DELAY => v.busy_delay,
            reg::AGGRESSIVE => u64::from(v.aggressive),
            _ if self.config.extended => self.read_extension(offset),
            _ => 0,
        }
    }

    fn read_extension(&self, offset: u64) -> u64 {
        let v = &self.values;
        match offset {
            reg::PASID_CTRL => v.pasid.into(),
            reg::RESULT => v.result.into(),
            reg::RESULT_DONE => v.result_done.into(),
            reg::COUNT => v.count,
            reg::IRQ_CTRL => v.irq.into(),
            reg::MSI_DATA => v.msi_data.into(),
            reg::MSI_ADDR_LO => v.msi_addr,
            reg::MSI_ADDR_HI => v.msi_addr >> 32,
            reg::SRC_HI => v.srcaddr >> 32,
            reg::DST_HI => v.dstaddr >> 32,
            _ => 0,
        }
    }

    /// A write of up to 4 bytes, which arrives with zeros above.
    fn write_register(&mut self, offset: u64, value: u32) {
        let wide = u64::from(value);
        match offset {
            reg::SRCADDR => self.values.srcaddr = wide,
            reg::DSTADDR => self.values.dstaddr = wide,
            reg::SIZE => self.values.size = wide,
            reg::DOORBELL => self.doorbell(value),
            reg::BUSY_DELAY => self.values.busy_delay = wide,
            reg::AGGRESSIVE => self.aggressive(value & 1 != 0),
            _ if self.config.extended => self.write_extension(offset, value),
            _ => {}
        }
    }

    fn write_extension(&mut self, offset: u64, value: u32) {
        let v = &mut self.values;
        match offset {
            reg::PASID_CTRL => {
                let p = PasidCtrl::from_bits(value);
                let p = PasidCtrl::new()
                    .with_pasid(p.pasid())
                    .with_execute(p.execute())
                    .with_privileged(p.privileged())
                    .with_enable(p.enable());
                v.pasid = p.into_bits();
            }
            reg::IRQ_CTRL => {
                let cleared = IrqCtrl::from_bits(value).pending();
                let pending = IrqCtrl::from_bits(v.irq).pending() && !cleared;
                v.irq = IrqCtrl::from_bits(value & IRQ_WRITABLE).with_pending(pending).into_bits();
                self.drive_irq();
            }
            reg::MSI_DATA => v.msi_data = value,
            reg::MSI_ADDR_LO => v.msi_addr = with_low(v.msi_addr, value),
            reg::MSI_ADDR_HI => v.msi_addr = with_high(v.msi_addr, value),
            reg::SRC_HI => v.srcaddr = with_high(v.srcaddr, value),
            reg::DST_HI => v.dstaddr = with_high(v.dstaddr, value),
            _ => {}
        }
    }

    fn doorbell(&mut self, value: u32) {
        if value & 1 == 0 || self.values.size == 0 || self.values.busy {
            return;
        }
        let delay = self.values.busy_delay.saturating_mul(NS_PER_MS);
        self.values.busy = self.arm(Cause::Doorbell, When::After(delay));
    }

    fn aggressive(&mut self, on: bool) {
        if on && !self.values.aggressive {
            self.arm(Cause::Tick, When::After(0));
        }
        self.values.aggressive = on;
    }

    /// An access of any size as the bus splits it: at most 4 bytes each. A size that is no power of two, or an address
    /// that is no multiple of it, is refused.
    fn pieces(offset: u64, len: usize) -> Result<usize, BusError> {
        let size = len as u64;
        if !matches!(len, 1 | 2 | 4 | 8) || !offset.is_multiple_of(size) {
            return Err(BusError::Slave);
        }
        match offset.checked_add(size) {
            Some(end) if end <= BAR0_BYTES => Ok(len.min(4)),
            _ => Err(BusError::Decode),
        }
    }
}

fn with_low(value: u64, low: u32) -> u64 {
    value & !0xffff_ffff | u64::from(low)
}

fn with_high(value: u64, high: u32) -> u64 {
    value & 0xffff_ffff | u64::from(high) << 32
}

impl Registers32 for TestDev {
    fn read(&mut self, offset: u32) -> Result<u32, BusError> {
        Self::pieces(offset.into(), 4)?;
        Ok(self.read_register(offset.into()) as u32)
    }

    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError> {
        Self::pieces(offset.into(), 4)?;
        self.write_register(offset.into(), value);
        Ok(())
    }
}

/// BAR0 as the bus sees it: accesses of 1, 2, 4 and 8 bytes. (The [`Mmio`] of `Shared<TestDev>` takes 4 bytes only, and
/// the published driver reads STATUS with 8.)
#[derive(Clone)]
pub struct TestDevBar(pub Shared<TestDev>);

impl Mmio for TestDevBar {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        let size = TestDev::pieces(offset, data.len())?;
        let device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (piece, at) in data.chunks_mut(size).zip((offset..).step_by(size)) {
            let value = device.read_register(at).to_le_bytes();
            piece.copy_from_slice(value.get(..size).unwrap_or(&[]));
        }
        Ok(())
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        let size = TestDev::pieces(offset, data.len())?;
        let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (piece, at) in data.chunks(size).zip((offset..).step_by(size)) {
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(piece) {
                *to = *from;
            }
            device.write_register(at, u32::from_le_bytes(value));
        }
        Ok(())
    }
}
