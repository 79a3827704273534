//! The AXI DMA (PG021): both channels are masked and stopped, then the core is reset, which takes both at once.
//!
//! A stream-to-memory channel that waits for data does not halt when RS is cleared (known from hardware); Linux's driver
//! says "Cannot stop channel" and resets. So the wait for Halted is short and its end is no error; the wait for the core's
//! reset is the one that counts.

use alloc::sync::Arc;

use portcullis_arch::axidma::{Dmacr, Dmasr, MM2S, S2MM, irq, reg};
use portcullis_hal::{Clock, poll};

use super::{ResetDriver, ResetError, ResetFailure, read_all, registers, timed_out};
use crate::PlatformDevice;

/// For transfers that are under way to end by themselves.
const HALT_US: u64 = 10_000;
/// What Linux's driver gives the core.
const RESET_US: u64 = 1_000_000;
/// Bytes of both channels' registers.
const NEEDED: u64 = (S2MM + reg::LENGTH) as u64 + 4;

const SHOWN: [(&str, u32); 4] = [
    ("MM2S DMACR", MM2S + reg::DMACR),
    ("MM2S DMASR", MM2S + reg::DMASR),
    ("S2MM DMACR", S2MM + reg::DMACR),
    ("S2MM DMASR", S2MM + reg::DMASR),
];

/// Reset driver for `xlnx,axi-dma-1.00.a`.
///
/// It reaches the core and nothing else: data in a FIFO between the two channels stays there unless the FIFO is on the core's
/// reset. A board where it is not needs a driver of its own that empties it ([`ResetDrivers::with`](crate::ResetDrivers::with)).
#[derive(Clone, Copy, Debug, Default)]
pub struct AxiDmaReset;

impl ResetDriver for AxiDmaReset {
    fn compatible(&self) -> &[&'static str] {
        &["xlnx,axi-dma-1.00.a"]
    }

    fn reset(&self, device: &PlatformDevice, clock: &Arc<dyn Clock>) -> Result<(), ResetError> {
        let regs = registers(device, NEEDED)?;
        let at = |block: u32, register: u32| (block + register) as usize;
        let control = |block| Dmacr::from_bits(regs.read32(at(block, reg::DMACR)));
        let status = |block| Dmasr::from_bits(regs.read32(at(block, reg::DMASR)));
        // A build has one channel or both; the bit that always reads as 1 tells.
        let built = |block: &u32| control(*block).one();
        let channels = || [MM2S, S2MM].into_iter().filter(built);
        for block in channels() {
            let masked = Dmacr::from_bits(control(block).into_bits() & !irq::ALL);
            regs.write32(at(block, reg::DMACR), masked.into_bits());
        }
        for block in channels() {
            regs.write32(at(block, reg::DMACR), control(block).with_rs(false).into_bits());
        }
        for block in channels() {
            let halted = || u64::from(status(block).halted());
            let _reset_comes_anyway = poll(clock, "DMASR.Halted == 1", HALT_US, halted, |bit| bit == 1);
        }
        // Either channel's bit resets the whole core.
        let Some(first) = channels().next() else {
            let what = ResetFailure::Unrecognised { kind: "an AXI DMA" };
            return Err(ResetError { device: device.name.clone(), what, registers: read_all(regs, &SHOWN) });
        };
        regs.write32(at(first, reg::DMACR), control(first).with_rs(false).with_reset(true).into_bits());
        let resetting = || u64::from(control(first).reset());
        poll(clock, "DMACR.Reset == 0", RESET_US, resetting, |bit| bit == 0)
            .map_err(|timeout| timed_out(device, regs, timeout, &SHOWN))?;
        for block in channels() {
            let halted = || u64::from(status(block).halted());
            poll(clock, "DMASR.Halted == 1 after the reset", RESET_US, halted, |bit| bit == 1)
                .map_err(|timeout| timed_out(device, regs, timeout, &SHOWN))?;
            // Reset values already, on a core that does as it is told.
            regs.write32(at(block, reg::DMASR), irq::ALL);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use portcullis_hal::fake::FakeClock;

    use super::*;
    use crate::testing::{AxiCore, axi_device};

    #[test]
    fn a_running_core_is_masked_stopped_waited_for_and_reset() {
        let core = AxiCore::new();
        core.start();
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        AxiDmaReset.reset(&axi_device("dma", &core), &clock).unwrap();
        let log = core.registers().take_writes();
        let expected = [
            (0x00, 0x0001_0003), // MM2S masked, still running
            (0x30, 0x0001_0003), // S2MM masked
            (0x00, 0x0001_0002), // RS cleared
            (0x30, 0x0001_0002),
            (0x00, 0x0001_0006), // core reset
            (0x04, 0x7000),      // status acknowledged
            (0x34, 0x7000),
        ];
        assert_eq!(log, expected);
        assert!(core.is_stopped());
    }

    #[test]
    fn an_armed_receiver_that_does_not_halt_is_reset_all_the_same() {
        let core = AxiCore::new();
        core.start();
        core.never_halts(true);
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        AxiDmaReset.reset(&axi_device("dma", &core), &clock).unwrap();
        assert!(core.is_stopped());
    }

    #[test]
    fn a_core_that_does_not_finish_its_reset_is_an_error_with_its_registers() {
        let core = AxiCore::new();
        core.start();
        core.stuck(true);
        let fake = Arc::new(FakeClock::new());
        let clock: Arc<dyn Clock> = fake.clone();
        let error = AxiDmaReset.reset(&axi_device("dma0", &core), &clock).unwrap_err();
        let text = alloc::string::ToString::to_string(&error);
        assert!(text.starts_with("dma0 cannot be stopped: timed out after "), "{text}");
        assert!(text.contains("waiting for DMACR.Reset == 0"), "{text}");
        assert!(text.contains("MM2S DMACR 0x10006") && text.contains("S2MM DMASR"), "{text}");
        assert!(fake.now_ns() < 5_000_000_000, "the wait is bounded");
    }

    #[test]
    fn a_device_without_registers_is_refused() {
        let mut device = axi_device("dma", &AxiCore::new());
        device.regions.clear();
        let clock: Arc<dyn Clock> = Arc::new(FakeClock::new());
        assert!(AxiDmaReset.reset(&device, &clock).is_err());
    }
}
