//! Driver for the PCIe DMA test device ([`portcullis_arch::testdev`]) with its extension block: copies between IO virtual
//! addresses, on behalf of a substream (PASID) if one is set.
//!
//! Start with [`TestDevice::copy`], which waits, or [`TestDevice::start`] and [`TestDevice::result`] where somebody has to
//! handle page requests or stalls meanwhile. Registers are written with 32 bits: an 8-byte access of the device is two
//! accesses, and the upper one hits no register.

use portcullis_arch::testdev::{IrqCtrl, PasidCtrl, ResultCode, TransferResult, reg};
use portcullis_arch::{Iova, Pa, SubstreamId};
use portcullis_hal::{Clock, Mmio, Timeout, poll};
use thiserror::Error;

/// Who a transfer is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pasid {
    /// The substream.
    pub id: SubstreamId,
    /// Accesses are privileged.
    pub privileged: bool,
    /// Reads are instruction fetches.
    pub execute: bool,
}

impl Pasid {
    /// Unprivileged data accesses of a substream.
    pub const fn new(id: u32) -> Self {
        Self { id: SubstreamId(id), privileged: false, execute: false }
    }
}

/// A transfer that was not started, or did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TestDeviceError {
    /// The size register has 32 bits, and nothing is not a transfer.
    #[error("{0:#x} bytes: the device moves 1 to 0xffffffff at once")]
    Size(u64),
    /// A PASID has 20 bits.
    #[error("substream {0} does not fit into 20 bits")]
    Pasid(SubstreamId),
    /// The transfer before has not ended. A fault that stalls and a page request do this.
    #[error("the transfer before is still under way")]
    Busy,
    /// It failed.
    #[error("{code:?} at the {side} after {done} bytes had arrived", side = if *.destination { "destination" } else { "source" })]
    Failed {
        /// What happened first.
        code: ResultCode,
        /// At the destination; otherwise at the source.
        destination: bool,
        /// Bytes that had arrived by then.
        done: u32,
    },
    /// It did not end.
    #[error(transparent)]
    Timeout(#[from] Timeout),
}

/// One test device.
#[derive(Debug)]
pub struct TestDevice<R> {
    regs: R,
}

impl<R: Mmio> TestDevice<R> {
    /// A driver over BAR 0. The device makes no transfers by itself from now on.
    pub fn new(regs: R) -> Self {
        let device = Self { regs };
        device.set_aggressive(false);
        device
    }

    fn write(&self, offset: u64, value: u32) {
        self.regs.write32(offset as usize, value);
    }
    fn read(&self, offset: u64) -> u32 {
        self.regs.read32(offset as usize)
    }

    /// On whose behalf transfers are made from now on; `None` for the device itself.
    pub fn set_pasid(&self, pasid: Option<Pasid>) -> Result<(), TestDeviceError> {
        let value = match pasid {
            None => PasidCtrl::new(),
            Some(p) if p.id.get() >> 20 != 0 => return Err(TestDeviceError::Pasid(p.id)),
            Some(p) => PasidCtrl::new()
                .with_pasid(p.id.get())
                .with_privileged(p.privileged)
                .with_execute(p.execute)
                .with_enable(true),
        };
        self.write(reg::PASID_CTRL, value.into_bits());
        Ok(())
    }

    /// Milliseconds between the start of a transfer and its first access.
    pub fn set_delay(&self, ms: u32) {
        self.write(reg::BUSY_DELAY, ms);
    }

    /// The device repeats its transfer by itself, as an attacker would.
    pub fn set_aggressive(&self, on: bool) {
        self.write(reg::AGGRESSIVE, on.into());
    }

    /// Sets addresses and size without starting anything, for [`set_aggressive`](Self::set_aggressive).
    pub fn set_transfer(&self, to: Iova, from: Iova, len: u64) -> Result<(), TestDeviceError> {
        let size = u32::try_from(len).ok().filter(|n| *n > 0).ok_or(TestDeviceError::Size(len))?;
        // A write of the low half clears the high one.
        for (low, high, address) in
            [(reg::SRCADDR, reg::SRC_HI, from.get()), (reg::DSTADDR, reg::DST_HI, to.get())]
        {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(reg::SIZE, size);
        Ok(())
    }

    /// Starts copying `len` bytes. Addresses and PASID are those at the end of the delay, so nothing may be changed before
    /// the transfer has ended.
    pub fn start(&self, to: Iova, from: Iova, len: u64) -> Result<(), TestDeviceError> {
        if self.is_busy() {
            return Err(TestDeviceError::Busy);
        }
        self.set_transfer(to, from, len)?;
        self.write(reg::DOORBELL, 1);
        Ok(())
    }

    /// True while a transfer is under way.
    pub fn is_busy(&self) -> bool {
        self.read(reg::STATUS) != 0
    }

    /// How many transfers have ended; wraps.
    pub fn count(&self) -> u32 {
        self.read(reg::COUNT)
    }

    /// How the last transfer ended.
    pub fn result(&self) -> Result<(), TestDeviceError> {
        if self.is_busy() {
            return Err(TestDeviceError::Busy);
        }
        let result = TransferResult::from_bits(self.read(reg::RESULT));
        match result.code() {
            ResultCode::Ok => Ok(()),
            code => {
                let done = self.read(reg::RESULT_DONE);
                Err(TestDeviceError::Failed { code, destination: result.destination(), done })
            }
        }
    }

    /// Waits for the end of the transfer.
    pub fn wait(&self, clock: &impl Clock, timeout_us: u64) -> Result<(), TestDeviceError> {
        let read = || u64::from(self.read(reg::STATUS));
        poll(clock, "test device STATUS == 0", timeout_us, read, |status| status == 0)?;
        self.result()
    }

    /// Copies `len` bytes and waits.
    pub fn copy(
        &self,
        to: Iova,
        from: Iova,
        len: u64,
        clock: &impl Clock,
        timeout_us: u64,
    ) -> Result<(), TestDeviceError> {
        self.start(to, from, len)?;
        self.wait(clock, timeout_us)
    }

    /// The end of a transfer is a message: `data` written to `address` (which an IOMMU may translate).
    pub fn use_messages(&self, address: Pa, data: u32) {
        self.write(reg::MSI_ADDR_LO, address.get() as u32);
        self.write(reg::MSI_ADDR_HI, (address.get() >> 32) as u32);
        self.write(reg::MSI_DATA, data);
        self.write(reg::IRQ_CTRL, IrqCtrl::new().with_enable(true).with_message(true).into_bits());
    }

    /// The end of a transfer is a wired interrupt.
    pub fn use_wire(&self) {
        self.write(reg::IRQ_CTRL, IrqCtrl::new().with_enable(true).into_bits());
    }

    /// The end of a transfer is not signalled.
    pub fn mask(&self) {
        self.write(reg::IRQ_CTRL, IrqCtrl::new().with_pending(true).into_bits());
    }

    /// Takes the wired interrupt back; true if it was there.
    pub fn handle_irq(&self) -> bool {
        let control = IrqCtrl::from_bits(self.read(reg::IRQ_CTRL));
        if control.pending() {
            self.write(reg::IRQ_CTRL, control.into_bits());
        }
        control.pending()
    }
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;

    use portcullis_hal::fake::{FakeClock, FakeMmio};

    use super::*;

    fn device() -> (Arc<FakeMmio>, TestDevice<Arc<FakeMmio>>) {
        let mmio = Arc::new(FakeMmio::new());
        let device = TestDevice::new(mmio.clone());
        assert_eq!(mmio.take_writes(), [(0x30, 0)]);
        (mmio, device)
    }

    #[test]
    fn a_transfer_sets_low_halves_before_high_ones_and_rings_last() {
        let (mmio, device) = device();
        device.start(Iova(0x8_7000_2000), Iova(0x7000_0000), 0x1000).unwrap();
        let expected =
            [(0x00, 0x7000_0000), (0x128, 0), (0x08, 0x7000_2000), (0x12c, 8), (0x10, 0x1000), (0x18, 1)];
        assert_eq!(mmio.take_writes(), expected);
    }

    #[test]
    fn what_the_device_cannot_do_is_refused() {
        let (mmio, device) = device();
        for len in [0, 1 << 32] {
            assert_eq!(device.start(Iova(0), Iova(0), len), Err(TestDeviceError::Size(len)));
        }
        let wide = SubstreamId(1 << 20);
        assert_eq!(device.set_pasid(Some(Pasid::new(1 << 20))), Err(TestDeviceError::Pasid(wide)));
        mmio.set32(0x20, 1);
        assert_eq!(device.start(Iova(0), Iova(0), 1), Err(TestDeviceError::Busy));
        assert_eq!(device.result(), Err(TestDeviceError::Busy));
        assert!(mmio.take_writes().is_empty());
    }

    #[test]
    fn pasids_carry_privilege_and_execution() {
        let (mmio, device) = device();
        device.set_pasid(Some(Pasid::new(5))).unwrap();
        device.set_pasid(Some(Pasid { privileged: true, execute: true, ..Pasid::new(0xf_ffff) })).unwrap();
        device.set_pasid(None).unwrap();
        assert_eq!(mmio.take_writes(), [(0x100, 0x8000_0005), (0x100, 0xe00f_ffff), (0x100, 0)]);
    }

    #[test]
    fn a_failure_says_what_where_and_how_far_and_a_device_that_hangs_times_out() {
        let (mmio, device) = device();
        let clock = FakeClock::new();
        assert_eq!(device.copy(Iova(0), Iova(0), 64, &clock, 1000), Ok(()));
        mmio.set32(0x108, 0x101);
        mmio.set32(0x10c, 32);
        let failed = TestDeviceError::Failed { code: ResultCode::Terminated, destination: true, done: 32 };
        assert_eq!(device.wait(&clock, 1000), Err(failed));
        mmio.set32(0x20, 1);
        assert!(matches!(device.wait(&clock, 1000), Err(TestDeviceError::Timeout(t)) if t.seen == 1));
    }

    #[test]
    fn interrupts_are_messages_or_a_wire_that_is_taken_back() {
        let (mmio, device) = device();
        device.use_messages(Pa(0x1_2f03_0040), 7);
        let expected = [(0x120, 0x2f03_0040), (0x124, 1), (0x11c, 7), (0x118, 3)];
        assert_eq!(mmio.take_writes(), expected);
        assert!(!device.handle_irq());
        mmio.set32(0x118, 0x8000_0001);
        mmio.take_writes();
        assert!(device.handle_irq());
        assert_eq!(mmio.take_writes(), [(0x118, 0x8000_0001)]);
    }
}
