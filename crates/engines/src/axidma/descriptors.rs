//! Buffer descriptors: fetch, status write, and what follows from each (PG021 "Descriptor Management").
//!
//! A fetch is one read of the eight base words, a report one write of STATUS. Data is visible before STATUS, and
//! STATUS before the interrupt.

use portcullis_arch::Iova;
use portcullis_arch::axidma::{BdStatus, Descriptor, bd, error};
use portcullis_bus::{BusError, DmaFault, StallState};

use super::channel::Work;
use super::{AxiDma, BURST_BYTES, Direction};

/// The error bits of one kind of access: SLVERR, DECERR.
type ErrorBits = (u32, u32);
const ON_DESCRIPTORS: ErrorBits = (error::SG_SLAVE, error::SG_DECODE);
const ON_PAYLOAD: ErrorBits = (error::DMA_SLAVE, error::DMA_DECODE);

impl AxiDma {
    /// Takes the next action of a channel that does not concern payload. False if there is none.
    pub(super) fn serve(&mut self, which: Direction, now: u64) -> bool {
        let channel = self.channel(which);
        if channel.halted || channel.parked.is_some() {
            return false;
        }
        match &channel.work {
            Some(work) if work.finished => self.report(which, now),
            Some(_) => return false,
            None if !channel.dmacr().rs() => channel.halt(),
            None if channel.queued => self.fetch(which),
            None => return false,
        }
        true
    }

    fn fetch(&mut self, which: Direction) {
        let from = self.config.initiator(self.config.streams.sg);
        let channel = self.channel(which);
        channel.current = channel.next;
        let at = Iova(channel.current);
        let mut bytes = [0; bd::BYTES];
        match self.port.read(from, at, &mut bytes) {
            Ok(()) => self.load(which, Descriptor::from_bytes(&bytes)),
            Err(e) => self.descriptor_fault(which, e.fault),
        }
    }

    fn load(&mut self, which: Direction, descriptor: Descriptor) {
        let config = self.config;
        let Descriptor { next, buffer, control, status } = descriptor;
        let channel = self.channel(which);
        if status.complete() && !channel.dmacr().cyclic() {
            return channel.fail(error::SG_INTERNAL);
        }
        let length = control.length() & config.length_mask();
        channel.work = Some(Work {
            next: next & config.descriptor_mask(),
            at: buffer & config.address_mask(),
            left: length,
            ends: which == Direction::Mm2s && control.eof(),
            finished: length == 0,
            error: if length == 0 { error::DMA_INTERNAL } else { 0 },
            ..Work::default()
        });
    }

    /// Tells software what became of the buffer in work.
    fn report(&mut self, which: Direction, now: u64) {
        let from = self.config.initiator(self.config.streams.sg);
        let channel = self.peek(which);
        let Some(work) = &channel.work else { return };
        if self.config.sg {
            let incoming = which == Direction::S2mm;
            let status = BdStatus::new()
                .with_transferred(work.done)
                .with_sof(incoming && work.starts)
                .with_eof(incoming && work.ends)
                .with_int_err(work.error & error::DMA_INTERNAL != 0)
                .with_slv_err(work.error & error::DMA_SLAVE != 0)
                .with_dec_err(work.error & error::DMA_DECODE != 0)
                .with_complete(true);
            let at = Iova(channel.current).wrapping_add(bd::STATUS);
            if let Err(e) = self.port.write(from, at, &status.into_bits().to_le_bytes()) {
                return self.descriptor_fault(which, e.fault);
            }
        }
        self.retire(which, now);
    }

    /// The buffer in work is done and reported.
    fn retire(&mut self, which: Direction, now: u64) {
        let sg = self.config.sg;
        let channel = self.channel(which);
        let Some(work) = channel.work.take() else { return };
        if which == Direction::S2mm && !sg {
            channel.length = work.done;
        }
        if work.error != 0 {
            return channel.fail(work.error);
        }
        if work.ends {
            channel.count_packet(sg, now);
        }
        channel.next = work.next;
        channel.done_one = true;
        if channel.current == channel.tail && !channel.dmacr().cyclic() {
            channel.queued = false;
        }
        if !channel.dmacr().rs() {
            channel.halt();
        }
    }

    /// A descriptor access did not complete.
    fn descriptor_fault(&mut self, which: Direction, fault: DmaFault) {
        let channel = self.channel(which);
        match fault {
            DmaFault::Stalled(tag) => channel.parked = Some(tag),
            fault => {
                // If the report of an error gets lost, the error itself does not.
                let pending = channel.work.as_ref().map_or(0, |w| w.error);
                channel.fail(pending | bit(fault, ON_DESCRIPTORS));
            }
        }
    }

    /// A payload access did not complete.
    pub(super) fn payload_fault(&mut self, which: Direction, fault: DmaFault) {
        let any_error = which == Direction::S2mm && !self.config.sg;
        let channel = self.channel(which);
        if let DmaFault::Stalled(tag) = fault {
            channel.parked = Some(tag);
        } else if let Some(work) = &mut channel.work {
            // PG021: a direct S2MM transfer reports any write error as an internal one too.
            work.error |= bit(fault, ON_PAYLOAD) | if any_error { error::DMA_INTERNAL } else { 0 };
            work.finished = true;
        }
    }

    /// Asks what became of a stalled access.
    pub(super) fn ask_about_stall(&mut self, which: Direction, now: u64) {
        let Some(tag) = self.peek(which).parked else { return };
        let abort = match self.port.stall_state(tag) {
            StallState::Waiting => return,
            StallState::Retry => None,
            StallState::Terminated { abort } => Some(abort),
        };
        let channel = self.channel(which);
        channel.parked = None;
        let payload = channel.can_move();
        match (abort, &mut channel.work) {
            (None, _) => {}
            (Some(true), _) if payload => self.payload_fault(which, DmaFault::Terminated),
            (Some(true), _) => self.descriptor_fault(which, DmaFault::Terminated),
            // A descriptor of zeros.
            (Some(false), None) => self.load(which, Descriptor::default()),
            (Some(false), Some(work)) if payload => {
                work.voided = work.left.min(BURST_BYTES - (work.at % u64::from(BURST_BYTES)) as u32);
            }
            // The status word is lost, and nobody notices.
            (Some(false), Some(_)) => self.retire(which, now),
        }
    }
}

/// The error bit for a fault: what the IOMMU terminates is SLVERR.
fn bit(fault: DmaFault, (slave, decode): ErrorBits) -> u32 {
    match fault {
        DmaFault::Bus(BusError::Decode) => decode,
        DmaFault::Bus(BusError::Slave) | DmaFault::Terminated | DmaFault::Stalled(_) => slave,
    }
}
