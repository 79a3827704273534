//! One channel: what it keeps, how its registers react, and its interrupts.

use portcullis_arch::axidma::{DELAY_UNIT_CLOCKS, DMACR_RESET, Dmacr, Dmasr, error, irq};
use portcullis_bus::StallTag;
use serde::{Deserialize, Serialize};

/// The buffer in work: of a descriptor, or of a direct transfer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Work {
    /// NXTDESC as it was fetched.
    pub(super) next: u64,
    /// Address of the next payload byte.
    pub(super) at: u64,
    /// Payload bytes to go.
    pub(super) left: u32,
    /// Payload bytes transferred.
    pub(super) done: u32,
    /// A packet starts with this buffer.
    pub(super) starts: bool,
    /// A packet ends with this buffer. MM2S: known from the start; S2MM: when TLAST has come.
    pub(super) ends: bool,
    /// No more data moves: what is missing is the report to software.
    pub(super) finished: bool,
    /// Error bits of DMASR that the report will raise.
    pub(super) error: u32,
    /// How many of the bytes to go a terminated stall covers: read as zeros, or not written.
    pub(super) voided: u32,
}

/// The interrupt delay timer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Timer {
    /// A packet ended, nobody has been told, and no other has begun.
    pub(super) armed: bool,
    /// When it started to count, once it does.
    pub(super) since: Option<u64>,
    /// IRQDelaySts.
    pub(super) count: u8,
}

/// Everything about a channel that changes at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Channel {
    /// DMACR.
    pub(super) control: u32,
    /// The sticky bits of DMASR: errors and interrupts.
    pub(super) status: u32,
    pub(super) halted: bool,
    /// CURDESC.
    pub(super) current: u64,
    /// TAILDESC as software reads it.
    pub(super) tail_register: u64,
    /// The pause point: TAILDESC as of the write that counts, so never half of an address.
    pub(super) tail: u64,
    /// SA or DA.
    pub(super) address: u64,
    pub(super) length: u32,
    /// IRQThresholdSts.
    pub(super) threshold_left: u8,
    pub(super) timer: Timer,
    /// There are descriptors to process: the tail was written and not met yet.
    pub(super) queued: bool,
    /// The descriptor to fetch next.
    pub(super) next: u64,
    /// Direct mode: a transfer was done since the channel was started.
    pub(super) done_one: bool,
    pub(super) work: Option<Work>,
    /// The access that stalled: a fetch if nothing is in work, a status write if that is finished, else payload.
    pub(super) parked: Option<StallTag>,
    /// S2MM: the packet that comes in has begun and not ended.
    pub(super) inside_packet: bool,
}

impl Default for Channel {
    fn default() -> Self {
        Self {
            control: DMACR_RESET,
            status: 0,
            halted: true,
            current: 0,
            tail_register: 0,
            tail: 0,
            address: 0,
            length: 0,
            threshold_left: 1,
            timer: Timer::default(),
            queued: false,
            next: 0,
            done_one: false,
            work: None,
            parked: None,
            inside_packet: false,
        }
    }
}

impl Channel {
    pub(super) fn dmacr(&self) -> Dmacr {
        Dmacr::from_bits(self.control)
    }

    /// The interrupt output.
    pub(super) fn interrupt(&self) -> bool {
        self.status & self.control & irq::ALL != 0
    }

    /// True if payload can move.
    pub(super) fn can_move(&self) -> bool {
        self.parked.is_none() && self.work.as_ref().is_some_and(|w| !w.finished)
    }

    /// DMASR.
    pub(super) fn status_word(&self, sg: bool) -> u32 {
        let nothing_to_do = self.work.is_none() && if sg { !self.queued } else { self.done_one };
        Dmasr::from_bits(self.status)
            .with_halted(self.halted)
            .with_idle(!self.halted && nothing_to_do)
            .with_sg_included(sg)
            .with_irq_threshold(self.threshold_left)
            .with_irq_delay(self.timer.count)
            .into_bits()
    }

    /// A write to DMACR without the reset bit.
    pub(super) fn write_control(&mut self, value: u32) {
        let old = self.dmacr();
        let mut new = Dmacr::from_bits(value).with_one(true).with_reset(false);
        new.set_irq_threshold(new.irq_threshold().max(1));
        if self.status & error::ALL != 0 {
            new.set_rs(false);
        }
        self.control = new.into_bits();
        if new.irq_threshold() != old.irq_threshold() {
            self.threshold_left = new.irq_threshold();
        }
        if new.irq_delay() != old.irq_delay() {
            self.timer.since = None;
        }
        match (old.rs(), new.rs()) {
            (false, true) if self.halted => {
                self.halted = false;
                self.next = self.current;
            }
            (true, false) if self.work.is_none() && self.parked.is_none() => self.halt(),
            _ => {}
        }
    }

    /// A write to DMASR.
    pub(super) fn acknowledge(&mut self, value: u32) {
        self.status &= !(value & irq::ALL);
    }

    /// True while CURDESC can be written.
    pub(super) fn takes_current(&self) -> bool {
        self.halted && self.status & error::ALL == 0
    }

    /// The write to TAILDESC that counts.
    pub(super) fn start_at_tail(&mut self) {
        self.tail = self.tail_register;
        self.queued |= self.dmacr().rs();
    }

    /// A write to LENGTH, without bits that do not exist.
    pub(super) fn start_direct(&mut self, length: u32, mm2s: bool) {
        if !self.dmacr().rs() || self.work.is_some() {
            return;
        }
        self.length = length;
        if length > 0 {
            // One packet; where an incoming one ends, its TLAST will say.
            self.work = Some(Work { at: self.address, left: length, ends: mm2s, ..Work::default() });
        }
    }

    /// Nothing is in flight any more.
    pub(super) fn halt(&mut self) {
        self.control = self.dmacr().with_rs(false).into_bits();
        self.halted = true;
        (self.queued, self.done_one) = (false, false);
        (self.work, self.parked) = (None, None);
    }

    /// Software stopped the channel, but the stream gives or takes nothing.
    pub(super) fn halt_if_starved(&mut self) {
        if !self.dmacr().rs() && self.can_move() {
            self.halt();
        }
    }

    /// An error appears, and halts the channel.
    pub(super) fn fail(&mut self, bits: u32) {
        self.status |= bits & error::ALL | irq::ERROR;
        self.halt();
    }

    /// `bytes` of payload moved, the last of them with TLAST if `last`.
    pub(super) fn moved(&mut self, bytes: usize, address_mask: u64) {
        let Some(work) = &mut self.work else { return };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(work.left);
        work.left -= bytes;
        work.done += bytes;
        work.voided = work.voided.saturating_sub(bytes);
        work.at = work.at.wrapping_add(u64::from(bytes)) & address_mask;
        if bytes > 0 {
            self.timer.armed = false;
        }
    }

    /// A packet is complete, its data and status visible.
    pub(super) fn count_packet(&mut self, sg: bool, now: u64) {
        self.threshold_left = if sg { self.threshold_left.saturating_sub(1) } else { 0 };
        if self.threshold_left == 0 {
            self.status |= irq::IOC;
            self.threshold_left = self.dmacr().irq_threshold();
            self.timer = Timer::default();
        } else {
            self.timer = Timer { armed: true, since: Some(now), count: 0 };
        }
    }

    /// Lets the delay timer see the time; returns when it will expire.
    pub(super) fn run_timer(&mut self, now: u64, clock_hz: u64) -> Option<u64> {
        let (control, delay) = (self.dmacr(), self.dmacr().irq_delay());
        let runs = self.timer.armed && control.rs() && delay > 0 && self.status & irq::DELAY == 0;
        if !runs {
            (self.timer.since, self.timer.count) = (None, 0);
            return None;
        }
        let since = *self.timer.since.get_or_insert(now);
        let (clock, unit) = (u128::from(clock_hz.max(1)), u128::from(DELAY_UNIT_CLOCKS) * 1_000_000_000);
        let units = u128::from(now.saturating_sub(since)) * clock / unit;
        if units >= u128::from(delay) {
            self.status |= irq::DELAY;
            self.threshold_left = control.irq_threshold();
            self.timer = Timer::default();
            return None;
        }
        self.timer.count = units as u8;
        let period = (u128::from(delay) * unit).div_ceil(clock);
        Some(since.saturating_add(u64::try_from(period).unwrap_or(u64::MAX)))
    }
}
