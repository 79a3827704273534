//! Driver for the PL writer: a small bus master in programmable logic that writes one 32-bit word.
//!
//! [`PlWriter::write`] starts a write, [`PlWriter::status`] and [`PlWriter::wait`] tell how it went. The stream id of the
//! write is that of the PL port plus the AXI ID given here.

use portcullis_arch::Iova;
use portcullis_arch::plwriter::{AXI_ID_MASK, Response, Status, reg};
use portcullis_hal::{Clock, Mmio, Timeout, poll};
use thiserror::Error;

/// A write that could not be started or went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PlWriterError {
    /// The IP writes whole words.
    #[error("destination {0:#x} is not a multiple of 4")]
    Unaligned(Iova),
    /// The AXI ID has 6 bits.
    #[error("AXI ID {0:#x} does not fit into 6 bits")]
    AxiId(u8),
    /// AxCACHE has 4 bits.
    #[error("AxCACHE {0:#x} does not fit into 4 bits")]
    Cache(u8),
    /// The write before has not ended. A fault that stalls does this.
    #[error("the write before is still under way")]
    Busy,
    /// The interconnect or an IOMMU refused it.
    #[error("the write to {to:#x} was answered with {response:?}")]
    Refused {
        /// Where to.
        to: Iova,
        /// The AXI response.
        response: Response,
    },
    /// No response came.
    #[error(transparent)]
    Timeout(#[from] Timeout),
}

/// One PL writer.
#[derive(Debug)]
pub struct PlWriter<R> {
    regs: R,
}

impl<R: Mmio> PlWriter<R> {
    /// A driver over its register window.
    pub fn new(regs: R) -> Self {
        Self { regs }
    }

    /// Starts writing `value` to `to` with an AXI ID and AxCACHE bits (0b0010 is normal non-cacheable, 0b1111 write-back
    /// and allocate).
    pub fn write(&self, to: Iova, value: u32, axi_id: u8, cache: u8) -> Result<(), PlWriterError> {
        if !to.is_aligned(4) {
            return Err(PlWriterError::Unaligned(to));
        }
        if u32::from(axi_id) > AXI_ID_MASK {
            return Err(PlWriterError::AxiId(axi_id));
        }
        if cache > 0xf {
            return Err(PlWriterError::Cache(cache));
        }
        if self.status().busy() {
            return Err(PlWriterError::Busy);
        }
        let values = [
            (reg::DESTINATION_LOW, to.get() as u32),
            (reg::DESTINATION_HIGH, (to.get() >> 32) as u32),
            (reg::DATA, value),
            (reg::CACHE, u32::from(cache)),
            (reg::AXI_ID, u32::from(axi_id)),
            (reg::TRIGGER, 1),
        ];
        for (offset, value) in values {
            self.regs.write32(offset as usize, value);
        }
        Ok(())
    }

    /// How the last write stands.
    pub fn status(&self) -> Status {
        Status::from_bits(self.regs.read32(reg::TRIGGER as usize))
    }

    /// Waits for the response to the last write.
    pub fn wait(&self, clock: &impl Clock, timeout_us: u64) -> Result<(), PlWriterError> {
        let what = "PL writer TRIGGER.DONE == 1";
        let read = || u64::from(self.status().into_bits());
        let seen = poll(clock, what, timeout_us, read, |seen| Status::from_bits(seen as u32).done())?;
        let status = Status::from_bits(seen as u32);
        if !status.error() {
            return Ok(());
        }
        let low = self.regs.read32(reg::DESTINATION_LOW as usize);
        let high = self.regs.read32(reg::DESTINATION_HIGH as usize);
        let to = Iova(u64::from(high) << 32 | u64::from(low));
        Err(PlWriterError::Refused { to, response: status.response() })
    }
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;

    use portcullis_hal::fake::{FakeClock, FakeMmio};

    use super::*;

    #[test]
    fn a_write_sets_the_registers_of_the_thesis_and_triggers_last() {
        let mmio = Arc::new(FakeMmio::new());
        let writer = PlWriter::new(mmio.clone());
        writer.write(Iova(0x1_7000_0000), 0xcafe_beef, 3, 0xf).unwrap();
        let expected =
            [(0x30, 0x7000_0000), (0x34, 1), (0x38, 0xcafe_beef), (0x3c, 0xf), (0x40, 3), (0x44, 1)];
        assert_eq!(mmio.take_writes(), expected);
    }

    #[test]
    fn what_the_ip_cannot_do_is_refused() {
        let mmio = Arc::new(FakeMmio::new());
        let writer = PlWriter::new(mmio.clone());
        assert_eq!(writer.write(Iova(2), 0, 0, 0), Err(PlWriterError::Unaligned(Iova(2))));
        assert_eq!(writer.write(Iova(0), 0, 0x40, 0), Err(PlWriterError::AxiId(0x40)));
        assert_eq!(writer.write(Iova(0), 0, 0, 0x10), Err(PlWriterError::Cache(0x10)));
        mmio.set32(0x44, 1);
        assert_eq!(writer.write(Iova(0), 0, 0, 0), Err(PlWriterError::Busy));
        assert!(mmio.take_writes().is_empty());
    }

    #[test]
    fn an_error_response_names_address_and_response_and_a_silent_ip_times_out() {
        let mmio = Arc::new(FakeMmio::new());
        let writer = PlWriter::new(mmio.clone());
        let clock = FakeClock::new();
        mmio.set32(0x30, 0x7000_2000);
        mmio.set32(0x44, 0x26);
        let refused = PlWriterError::Refused { to: Iova(0x7000_2000), response: Response::SlvErr };
        assert_eq!(writer.wait(&clock, 1000), Err(refused));
        mmio.set32(0x44, 0x2);
        assert_eq!(writer.wait(&clock, 1000), Ok(()));
        mmio.set32(0x44, 0x1);
        assert!(matches!(writer.wait(&clock, 1000), Err(PlWriterError::Timeout(t)) if t.seen == 1));
    }
}
