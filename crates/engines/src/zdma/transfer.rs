//! Data movement: what a run does next, and how bytes get from the source to the destination.
//!
//! Between incrementing addresses data moves by [`DmaPort::copy`] in pieces as large as both descriptors and the
//! step allow. Fixed addresses go beat by beat through the common buffer, as does data that a terminated stall
//! turned into zeros.

use portcullis_arch::Iova;
use portcullis_arch::zdma::{ADDRESS_MASK, BURST_FIXED, DataAttr, reg};
use portcullis_bus::{CopySide, DmaFault, DmaPort, Initiator};

use super::Zdma;
use super::run::{AccessKind, Plan, Side, Which};

/// Room for data that is read and dropped, or for fill data.
const SCRATCH_BYTES: usize = 16 * 1024;

/// What an access transferred before it stopped, and why it did.
type Transferred = (usize, Option<DmaFault>);

impl Zdma {
    /// Takes the next action of a run, moving at most `limit` bytes. Returns how much of the limit it used.
    pub(super) fn advance(&mut self, limit: usize) -> usize {
        let run = &self.run;
        if !run.staged.rest().is_empty() {
            return match run.destination.loaded {
                true if self.writable(limit) == 0 => self.stage(limit),
                true => self.drain(limit),
                false => self.fetch_for(Which::Destination),
            };
        }
        if run.plan == Plan::SimpleFill {
            if run.destination.left == 0 {
                self.finish(super::Phase::Done);
                return 0;
            }
            return self.fill(limit);
        }
        if !run.source.loaded {
            return self.fetch_for(Which::Source);
        }
        if run.source.left == 0 {
            self.source_done();
            return 0;
        }
        if run.plan == Plan::SimpleRead {
            return self.read_and_drop(limit);
        }
        if !run.destination.loaded {
            return self.fetch_for(Which::Destination);
        }
        if self.fixed(Which::Source) || self.fixed(Which::Destination) {
            return self.stage(limit);
        }
        self.copy(limit)
    }

    fn fetch_for(&mut self, which: Which) -> usize {
        self.fetch(which);
        0
    }

    fn data_attr(&self) -> DataAttr {
        DataAttr::from_bits(self.registers.get(reg::DATA_ATTR))
    }

    /// True if this side keeps its address: in simple mode only.
    fn fixed(&self, which: Which) -> bool {
        let attr = self.data_attr();
        let burst = match which {
            Which::Source => attr.arburst(),
            Which::Destination => attr.awburst(),
        };
        self.run.plan != Plan::ScatterGather && burst == BURST_FIXED
    }

    /// Where and as whom one side accesses its payload.
    fn payload(&self, which: Which) -> (Initiator, Iova) {
        let attr = self.data_attr();
        let (side, cache) = match which {
            Which::Source => (&self.run.source, attr.arcache()),
            Which::Destination => (&self.run.destination, attr.awcache()),
        };
        (self.initiator(cache, side.control().coherent()), Iova(side.at))
    }

    /// Bytes in each beat of a side that keeps its address: the lanes from its address up (AXI4 A3.4.1).
    fn beat(&self, which: Which) -> Option<usize> {
        let at = self.run.peek(which).at;
        self.fixed(which).then(|| lanes(at, self.config.bus.bytes()))
    }

    fn copy(&mut self, limit: usize) -> usize {
        let n = limit.min(contiguous(&self.run.source)).min(contiguous(&self.run.destination));
        let (source, destination) = (self.payload(Which::Source), self.payload(Which::Destination));
        match self.port.copy(source, destination, n) {
            Ok(()) => {
                self.moved(n);
                if self.run.source.left == 0 {
                    self.source_done();
                }
            }
            Err(e) => {
                self.moved(e.error.done.min(n));
                let side = match e.side {
                    CopySide::Source => Which::Source,
                    CopySide::Destination => Which::Destination,
                };
                self.fault(AccessKind::Payload(side), e.error.fault);
            }
        }
        n
    }

    /// Both sides went on by `bytes`.
    fn moved(&mut self, bytes: usize) {
        self.run.source.consume(bytes, false);
        self.wrote(bytes);
    }

    /// The destination took `bytes` more, and answered.
    fn wrote(&mut self, bytes: usize) {
        let fixed = self.fixed(Which::Destination);
        self.registers.count_bytes(bytes);
        self.run.destination.consume(bytes, fixed);
        if self.run.destination.loaded && self.run.destination.left == 0 {
            self.destination_done();
        }
    }

    /// Reads into the common buffer, behind what is in it.
    fn stage(&mut self, limit: usize) -> usize {
        let beat = self.beat(Which::Source);
        let mut data = std::mem::take(&mut self.run.staged).into_rest();
        let before = data.len();
        let room = (self.config.buffer_entries() * self.config.bus.bytes()).saturating_sub(before);
        let n = whole_beats(limit.min(room), beat, reach(&self.run.source, beat));
        let (from, at) = self.payload(Which::Source);
        data.resize(before + n, 0);
        let (done, fault) = read(&mut *self.port, from, at, beat, data.get_mut(before..).unwrap_or(&mut []));
        data.truncate(before + done);
        self.run.staged.data = data;
        self.run.source.consume(done, beat.is_some());
        if let Some(fault) = fault {
            self.fault(AccessKind::Payload(Which::Source), fault);
        }
        n
    }

    /// How much of the common buffer can be written now: at a fixed address whole beats only, while more data
    /// is to come.
    fn writable(&self, limit: usize) -> usize {
        let rest = self.run.staged.rest().len();
        let beat = self.beat(Which::Destination);
        let ready = match beat {
            Some(beat) if self.run.source.left > 0 => rest - rest % beat,
            _ => rest,
        };
        whole_beats(limit, beat, ready.min(reach(&self.run.destination, beat)))
    }

    /// Writes from the common buffer.
    fn drain(&mut self, limit: usize) -> usize {
        let beat = self.beat(Which::Destination);
        let (from, at) = self.payload(Which::Destination);
        let n = self.writable(limit);
        let data = self.run.staged.rest().get(..n).unwrap_or(&[]);
        let (done, fault) = write(&mut *self.port, from, at, beat, data);
        self.run.staged.consume(done);
        self.wrote(done);
        if let Some(fault) = fault {
            self.fault(AccessKind::Payload(Which::Destination), fault);
        }
        n
    }

    /// Write-only mode.
    fn fill(&mut self, limit: usize) -> usize {
        let beat = self.beat(Which::Destination);
        let (from, at) = self.payload(Which::Destination);
        let n = whole_beats(limit.min(SCRATCH_BYTES), beat, reach(&self.run.destination, beat));
        let mut data = std::mem::take(&mut self.scratch);
        data.clear();
        let words = [reg::WR_ONLY_WORD0, reg::WR_ONLY_WORD1, reg::WR_ONLY_WORD2, reg::WR_ONLY_WORD3];
        let pattern = words.map(|w| self.registers.get(w).to_le_bytes());
        let width = self.config.bus.bytes();
        let pattern = pattern.as_flattened().iter().take(width);
        data.extend(pattern.cycle().skip(self.run.fill_at % width).take(n));
        let (done, fault) = write(&mut *self.port, from, at, beat, &data);
        self.scratch = data;
        self.filled(done);
        if let Some(fault) = fault {
            self.fault(AccessKind::Payload(Which::Destination), fault);
        }
        n
    }

    fn filled(&mut self, bytes: usize) {
        self.run.fill_at = self.run.fill_at.wrapping_add(bytes) % self.config.bus.bytes();
        self.wrote(bytes);
    }

    /// Read-only mode.
    fn read_and_drop(&mut self, limit: usize) -> usize {
        let beat = self.beat(Which::Source);
        let (from, at) = self.payload(Which::Source);
        let n = whole_beats(limit.min(SCRATCH_BYTES), beat, reach(&self.run.source, beat));
        let mut data = std::mem::take(&mut self.scratch);
        data.resize(n, 0);
        let (done, fault) = read(&mut *self.port, from, at, beat, &mut data);
        self.scratch = data;
        self.run.source.consume(done, beat.is_some());
        if let Some(fault) = fault {
            self.fault(AccessKind::Payload(Which::Source), fault);
        }
        n
    }

    /// A stalled access was ended without an error: one AXI burst reads as zeros, or its data is ignored.
    pub(super) fn pass_over(&mut self, access: AccessKind) {
        match access {
            AccessKind::Descriptor(which) => self.pass_over_descriptor(which),
            AccessKind::Payload(Which::Source) => {
                let n = self.burst(Which::Source);
                let fixed = self.fixed(Which::Source);
                self.run.source.consume(n, fixed);
                if self.run.plan != Plan::SimpleRead {
                    // Whatever this burst's predecessors brought is still to be written first.
                    self.run.staged.data.resize(self.run.staged.data.len() + n, 0);
                }
            }
            AccessKind::Payload(Which::Destination) => {
                let n = self.burst(Which::Destination);
                if self.run.plan == Plan::SimpleFill {
                    self.filled(n);
                } else if !self.run.staged.rest().is_empty() {
                    let n = self.writable(n);
                    self.run.staged.consume(n);
                    self.wrote(n);
                } else {
                    self.moved(n.min(self.run.source.left as usize));
                }
            }
        }
    }

    /// Payload bytes of the AXI burst that begins at a side's position: up to the next multiple of the burst's
    /// size (so never across 4 KiB), or all its beats at a fixed address.
    fn burst(&self, which: Which) -> usize {
        let attr = self.data_attr();
        let len = match which {
            Which::Source => attr.arlen(),
            Which::Destination => attr.awlen(),
        };
        let side = self.run.peek(which);
        let beats = 1 << len.min(4);
        let bytes = match self.beat(which) {
            Some(beat) => beats * beat,
            None => lanes(side.at, beats * self.config.bus.bytes()),
        };
        bytes.min(side.left as usize)
    }
}

/// Bytes from `at` to the next multiple of `size`.
fn lanes(at: u64, size: usize) -> usize {
    size - (at % size as u64) as usize
}

/// Payload bytes up to the descriptor's end or the end of the address space, where addresses wrap.
fn contiguous(side: &Side) -> usize {
    (ADDRESS_MASK + 1 - side.at).min(u64::from(side.left)) as usize
}

fn reach(side: &Side, beat: Option<usize>) -> usize {
    if beat.is_some() { side.left as usize } else { contiguous(side) }
}

/// As much of `all` as `limit` allows; with a beat, whole beats (at least one) unless it is all.
fn whole_beats(limit: usize, beat: Option<usize>, all: usize) -> usize {
    match beat {
        Some(beat) if limit < all => (limit.max(beat) / beat * beat).min(all),
        _ => limit.min(all),
    }
}

/// Reads `data`, in one go or in beats at one address.
fn read(
    port: &mut dyn DmaPort,
    from: Initiator,
    at: Iova,
    beat: Option<usize>,
    data: &mut [u8],
) -> Transferred {
    let size = beat.unwrap_or(data.len()).max(1);
    let mut done = 0;
    for chunk in data.chunks_mut(size) {
        if let Err(e) = port.read(from, at, chunk) {
            return (done + e.done.min(chunk.len()), Some(e.fault));
        }
        done += chunk.len();
    }
    (done, None)
}

/// Writes `data`, in one go or in beats at one address.
fn write(port: &mut dyn DmaPort, from: Initiator, at: Iova, beat: Option<usize>, data: &[u8]) -> Transferred {
    let size = beat.unwrap_or(data.len()).max(1);
    let mut done = 0;
    for chunk in data.chunks(size) {
        if let Err(e) = port.write(from, at, chunk) {
            return (done + e.done.min(chunk.len()), Some(e.fault));
        }
        done += chunk.len();
    }
    (done, None)
}
