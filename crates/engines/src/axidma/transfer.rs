//! Data movement: what the core does next, and how bytes get through the loopback.
//!
//! While the FIFO is empty and both channels have a buffer, one [`DmaPort::copy`] moves a whole run straight from
//! source to destination. Otherwise MM2S fills the FIFO as far as there is room and S2MM empties it. Software sees
//! no difference as long as the buffers do not overlap: a byte that S2MM could not write stays in the stream, and
//! when S2MM stops, MM2S goes on reading ahead until the FIFO is full, on either path.

use portcullis_arch::Iova;
use portcullis_arch::axidma::error;
use portcullis_bus::{CopySide, DmaPort, Initiator};

use super::{AxiDma, Direction};

/// The most bytes that are read into the FIFO in one piece.
const SCRATCH_BYTES: usize = 16 * 1024;

impl AxiDma {
    pub(super) fn fifo_bytes(&self) -> usize {
        self.config.fifo_bytes.max(1)
    }

    /// Takes the next action, moving at most `limit` bytes. Returns how much of the limit it used, or `None` if
    /// nothing can be done.
    pub(super) fn advance(&mut self, limit: usize, now: u64) -> Option<usize> {
        // The sender reports first: its data has left before the receiver's has arrived.
        if Direction::BOTH.into_iter().any(|which| self.serve(which, now)) {
            return Some(0);
        }
        let (sends, receives) = (self.mm2s.can_move(), self.s2mm.can_move());
        if receives && !self.fifo.is_empty() {
            return Some(self.drain(limit));
        }
        if sends && receives && self.cut_through && !self.voided() {
            return Some(self.copy(limit));
        }
        let room = self.fifo_bytes().saturating_sub(self.fifo.len());
        if sends && room > 0 {
            return Some(self.fill(limit.min(room)));
        }
        None
    }

    /// True if some of the payload in work is not to be read or not to be written.
    fn voided(&self) -> bool {
        [&self.mm2s, &self.s2mm].into_iter().filter_map(|c| c.work.as_ref()).any(|w| w.voided > 0)
    }

    /// Who accesses payload, where, and how many bytes lie there before the end of the buffer or of the address
    /// space.
    fn payload(&self, which: Direction) -> (Initiator, Iova, usize) {
        let stream = match which {
            Direction::Mm2s => self.config.streams.mm2s,
            Direction::S2mm => self.config.streams.s2mm,
        };
        let (at, left) = self.peek(which).work.as_ref().map_or((0, 0), |w| (w.at, w.left));
        let after = self.config.address_mask().saturating_sub(at).saturating_add(1);
        let n = u64::from(left).min(after) as usize;
        (self.config.initiator(stream), Iova(at), n)
    }

    /// How many bytes of the payload in work a terminated stall covers.
    fn voided_bytes(&self, which: Direction) -> usize {
        self.peek(which).work.as_ref().map_or(0, |w| w.voided as usize)
    }

    fn copy(&mut self, limit: usize) -> usize {
        let (reader, source, readable) = self.payload(Direction::Mm2s);
        let (writer, destination, writable) = self.payload(Direction::S2mm);
        let n = limit.min(readable).min(writable);
        let result = self.port.copy((reader, source), (writer, destination), n);
        let done = result.err().map_or(n, |e| short_of(n, e.error.done));
        let last = self.sent(done);
        self.received(done, last);
        if let Err(e) = result {
            let side = match e.side {
                CopySide::Source => Direction::Mm2s,
                CopySide::Destination => Direction::S2mm,
            };
            self.payload_fault(side, e.error.fault);
        }
        n
    }

    /// MM2S reads into the FIFO.
    fn fill(&mut self, limit: usize) -> usize {
        let (from, at, readable) = self.payload(Direction::Mm2s);
        let voided = self.voided_bytes(Direction::Mm2s);
        let n = limit.min(readable).min(SCRATCH_BYTES).min(if voided > 0 { voided } else { usize::MAX });
        let mut data = std::mem::take(&mut self.scratch);
        data.clear();
        data.resize(n, 0);
        let result = if voided > 0 { Ok(()) } else { self.port.read(from, at, &mut data) };
        data.truncate(result.err().map_or(n, |e| short_of(n, e.done)));
        let last = self.sent(data.len());
        self.fifo.push(&data, last);
        self.scratch = data;
        if let Err(e) = result {
            self.payload_fault(Direction::Mm2s, e.fault);
        }
        n
    }

    /// S2MM writes from the FIFO.
    fn drain(&mut self, limit: usize) -> usize {
        let (from, at, writable) = self.payload(Direction::S2mm);
        let voided = self.voided_bytes(Direction::S2mm);
        let limit = limit.min(writable).min(if voided > 0 { voided } else { usize::MAX });
        let data = self.fifo.front();
        let data = data.get(..limit).unwrap_or(data);
        let n = data.len();
        let result = if voided > 0 { Ok(()) } else { self.port.write(from, at, data) };
        let done = result.err().map_or(n, |e| short_of(n, e.done));
        let last = self.fifo.pop(done);
        self.received(done, last);
        if let Err(e) = result {
            self.payload_fault(Direction::S2mm, e.fault);
        }
        n
    }

    /// `n` bytes of MM2S entered the stream. True if the last of them carries TLAST.
    fn sent(&mut self, n: usize) -> bool {
        self.mm2s.moved(n, self.config.address_mask());
        let Some(work) = &mut self.mm2s.work else { return false };
        work.finished = work.left == 0;
        work.finished && work.ends && n > 0
    }

    /// S2MM wrote `n` bytes from the stream, the last of them with TLAST if `last`.
    fn received(&mut self, n: usize, last: bool) {
        if n == 0 {
            return;
        }
        let (sg, mask) = (self.config.sg, self.config.address_mask());
        let channel = &mut self.s2mm;
        channel.moved(n, mask);
        let starts = !std::mem::replace(&mut channel.inside_packet, !last);
        let Some(work) = &mut channel.work else { return };
        work.starts |= starts;
        work.ends = last;
        work.finished = last || work.left == 0;
        if !sg && work.finished && !last {
            // The packet is longer than LENGTH.
            work.error = error::DMA_INTERNAL;
        }
    }
}

/// What an access of `n` bytes transferred that failed after `done`: never all of it, whatever the port says.
fn short_of(n: usize, done: usize) -> usize {
    done.min(n.saturating_sub(1))
}
