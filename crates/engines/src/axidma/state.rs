//! Saving and restoring a core.

use portcullis_arch::axidma::{BdControl, Dmacr, REGISTERS, error, irq};
use serde::{Deserialize, Serialize};

use super::channel::{Channel, Timer, Work};
use super::fifo::Fifo;
use super::{AxiDma, AxiDmaConfig, BURST_BYTES};
use crate::RestoreError;

const VERSION: u32 = 1;

/// Everything about an [`AxiDma`] that changes at run time, the stream's contents and parked transactions included.
/// What it was built with is not part of it: restore into a core with the same configuration, behind a port that
/// knows its stalls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AxiDmaState {
    version: u32,
    mm2s: Channel,
    s2mm: Channel,
    fifo: Fifo,
}

impl AxiDma {
    /// The state now.
    pub fn save(&self) -> AxiDmaState {
        let Self {
            config: _,
            port: _,
            mm2s_irq: _,
            s2mm_irq: _,
            mm2s,
            s2mm,
            fifo,
            scratch: _,
            cut_through: _,
        } = self;
        AxiDmaState { version: VERSION, mm2s: mm2s.clone(), s2mm: s2mm.clone(), fifo: fifo.clone() }
    }

    /// Continues from a saved state and drives the interrupt lines to match. On an error nothing changes.
    pub fn restore(&mut self, state: AxiDmaState) -> Result<(), RestoreError> {
        let AxiDmaState { version, mm2s, s2mm, fifo } = state;
        if version != VERSION {
            return Err(RestoreError::Version { found: version, expected: VERSION });
        }
        fifo.check(self.fifo_bytes()).map_err(RestoreError::Impossible)?;
        for channel in [&mm2s, &s2mm] {
            check(channel, &self.config).map_err(RestoreError::Impossible)?;
        }
        (self.mm2s, self.s2mm, self.fifo) = (mm2s, s2mm, fifo);
        self.drive_irqs();
        Ok(())
    }
}

fn check(channel: &Channel, config: &AxiDmaConfig) -> Result<(), &'static str> {
    let Channel {
        control,
        status,
        halted,
        current,
        tail_register,
        tail,
        address,
        length,
        threshold_left,
        timer: Timer { armed: _, since: _, count: _ },
        queued,
        next,
        done_one: _,
        work,
        parked,
        inside_packet: _,
    } = channel;
    let writable = REGISTERS.first().map_or(0, |dmacr| dmacr.writable);
    let dmacr = Dmacr::from_bits(*control);
    if control & !writable != Dmacr::from_bits(0).with_one(true).into_bits() || dmacr.reset() {
        return Err("a DMACR with bits that do not exist");
    }
    if status & !(error::ALL | irq::ALL) != 0 {
        return Err("a DMASR with bits that do not exist");
    }
    if dmacr.irq_threshold() == 0 || *threshold_left == 0 || *threshold_left > dmacr.irq_threshold() {
        return Err("an interrupt threshold that never comes");
    }
    let descriptors = current | tail_register | tail | next;
    if descriptors & !config.descriptor_mask() != 0 || address & !config.address_mask() != 0 {
        return Err("an address with bits that do not exist");
    }
    if length & !config.length_mask() != 0 {
        return Err("a length with bits that do not exist");
    }
    if *halted && (dmacr.rs() || *queued || work.is_some() || parked.is_some()) {
        return Err("work in a halted channel");
    }
    if status & error::ALL != 0 && !halted {
        return Err("a channel that runs in spite of an error");
    }
    if *queued && !config.sg {
        return Err("queued descriptors in a core without scatter-gather engine");
    }
    if let Some(work) = work {
        check_work(work, config)?;
    }
    let access = match work {
        None => *queued,
        Some(work) => config.sg || !work.finished,
    };
    if parked.is_some() && !access {
        return Err("a stalled transaction that nobody issued");
    }
    Ok(())
}

fn check_work(work: &Work, config: &AxiDmaConfig) -> Result<(), &'static str> {
    let Work { next, at, left, done, starts: _, ends: _, finished, error, voided } = work;
    if next & !config.descriptor_mask() != 0 || at & !config.address_mask() != 0 {
        return Err("a buffer address with bits that do not exist");
    }
    let length = left.checked_add(*done).filter(|n| *n <= config.length_mask());
    if length.is_none_or(|n| n > BdControl::from_bits(u32::MAX).length()) {
        return Err("a buffer with more bytes than a length can say");
    }
    if (*left == 0 || *error != 0) && !finished {
        return Err("a buffer that is done, but does not know it");
    }
    if error & !(error::DMA_INTERNAL | error::DMA_SLAVE | error::DMA_DECODE) != 0 {
        return Err("a buffer with an error that buffers do not have");
    }
    if voided > left || *voided > BURST_BYTES {
        return Err("a terminated burst that is longer than a burst");
    }
    Ok(())
}
