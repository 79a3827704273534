//! The general purpose DMA of the ZynqMP: masked, disabled, waited for, and every register as after power-up.
//!
//! The engine has no abort: EN = 0 while it runs is not documented to stop it, and the list in memory is the last owner's. So
//! the wait is for the list to end; if it does not, the group is blocked at the IOMMU ([`Group`](crate::Group)), the next
//! access of the engine is refused, and that ends its run.

use alloc::sync::Arc;

use portcullis_arch::zdma::{Ctrl0, Ctrl2, REGISTERS, Rights, State, interrupt, reg};
use portcullis_hal::{Clock, poll};

use super::{ResetDriver, ResetError, registers, timed_out};
use crate::PlatformDevice;

const STOP_US: u64 = 100_000;
const NEEDED: u64 = reg::CTRL2 as u64 + 4;
const SHOWN: [(&str, u32); 3] = [("STATUS", reg::STATUS), ("ISR", reg::ISR), ("CTRL2", reg::CTRL2)];

/// Reset driver for `xlnx,zynqmp-dma-1.0`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ZdmaReset;

impl ResetDriver for ZdmaReset {
    fn compatible(&self) -> &[&'static str] {
        &["xlnx,zynqmp-dma-1.0"]
    }

    fn reset(&self, device: &PlatformDevice, clock: &Arc<dyn Clock>) -> Result<(), ResetError> {
        let regs = registers(device, NEEDED)?;
        let read = |register: u32| regs.read32(register as usize);
        let write = |register: u32, value| regs.write32(register as usize, value);
        write(reg::IDS, interrupt::ALL);
        write(reg::CTRL2, Ctrl2::new().into_bits());
        let state = || u64::from(read(reg::STATUS) & 3);
        if state() == State::Paused as u64 {
            // CONT while EN = 0 takes a paused channel to disabled.
            write(reg::CTRL0, Ctrl0::from_bits(read(reg::CTRL0)).with_cont(true).into_bits());
        }
        let stopped = |state| state != State::Busy as u64 && state != State::Paused as u64;
        poll(clock, "STATUS.STATE not busy, not paused", STOP_US, state, stopped)
            .map_err(|timeout| timed_out(device, regs, timeout, &SHOWN))?;
        // Addresses and fill data of the last owner, and how it wanted transfers to look on the bus.
        for register in REGISTERS.iter().filter(|register| register.rights == Rights::ReadWrite) {
            write(register.offset, register.reset);
        }
        for register in REGISTERS.iter() {
            match register.rights {
                Rights::ClearOnWrite => write(register.offset, 0),
                Rights::ClearOnRead => drop(read(register.offset)),
                _ => {}
            }
        }
        write(reg::ISR, interrupt::ALL);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use portcullis_arch::Pa;
    use portcullis_hal::fake::{FakeClock, FakeMmio};

    use super::*;
    use crate::{Region, ResetFailure};

    fn channel(state: impl Fn(u32) -> u32 + Send + 'static) -> (PlatformDevice, Arc<FakeMmio>) {
        let mut reads = 0;
        let regs =
            Arc::new(FakeMmio::with_handler(move |_, access| match (access.write, access.offset as u32) {
                (false, reg::STATUS) => {
                    reads += 1;
                    Some(state(reads).into())
                }
                _ => None,
            }));
        let device = PlatformDevice {
            name: "fd500000.dma".into(),
            compatible: alloc::vec!["xlnx,zynqmp-dma-1.0".into()],
            device: None,
            regions: alloc::vec![Region::new(Pa(0xfd50_0000), 0x1000, regs.clone())],
            interrupts: alloc::vec![],
        };
        (device, regs)
    }

    #[test]
    fn a_busy_channel_is_masked_disabled_waited_for_and_cleared() {
        let (device, regs) = channel(|reads| if reads < 5 { 2 } else { 0 });
        regs.set32(reg::SRC_START_LSB as usize, 0x1234);
        regs.set32(reg::WR_ONLY_WORD2 as usize, 0x5ec2e7);
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        ZdmaReset.reset(&device, &clock).unwrap();
        let log = regs.take_log();
        let position = |write, offset: u32| {
            log.iter().position(|a| a.write == write && a.offset == offset as usize).unwrap()
        };
        let order = [
            position(true, reg::IDS),
            position(true, reg::CTRL2),
            position(false, reg::STATUS),
            position(true, reg::SRC_START_LSB),
            position(true, reg::ISR),
        ];
        assert!(order.is_sorted(), "{order:?}");
        assert_eq!(regs.get32(reg::SRC_START_LSB as usize), 0);
        assert_eq!(regs.get32(reg::WR_ONLY_WORD2 as usize), 0, "nothing of the last owner is left");
        assert_eq!(regs.get32(reg::DATA_ATTR as usize), 0x0483_d20f);
        assert!(!log.iter().any(|a| a.write && a.offset == reg::IEN as usize));
    }

    #[test]
    fn a_paused_channel_is_continued_into_disabled() {
        let (device, regs) = channel(|reads| if reads < 2 { 1 } else { 0 });
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        ZdmaReset.reset(&device, &clock).unwrap();
        assert!(regs.take_writes().contains(&(reg::CTRL0 as usize, 0x2)));
    }

    #[test]
    fn a_channel_that_stays_busy_is_an_error() {
        let (device, _regs) = channel(|_| 2);
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        let error = ZdmaReset.reset(&device, &clock).unwrap_err();
        assert!(matches!(error.what, ResetFailure::Timeout(t) if t.seen == 2), "{error}");
        assert_eq!(error.registers[0], ("STATUS", 2));
    }
}
