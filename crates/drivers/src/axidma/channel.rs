//! One channel behind the interface of all DMA engines.

use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_hal::{Clock, DmaMemory, Mmio, poll};

use super::core::{Core, Mastery, RESET_TIMEOUT_US, State as CoreState, other};
use super::error::HardwareError;
use super::ring::{Chunk, split};
use super::transaction::{Cyclic, Transaction};
use super::{AxiDmaError, ChannelConfig};
use crate::dmaengine::{
    Callback, Caps, ChannelError, Cookie, Descriptor, DescriptorPool, Direction, DmaChannel, Notifier,
    ResidueGranularity, Segment, State, Status, Work,
};

/// MM2S or S2MM of an [`AxiDma`](super::AxiDma).
pub struct AxiDmaChannel<R, M, C> {
    name: String,
    direction: Direction,
    core: Arc<Core<R, M, C>>,
}

/// What terminating a channel needs next.
enum Step {
    Done,
    WaitForReset,
    StopAlone,
    Reset,
}

impl<R: Mmio, M: DmaMemory, C: Clock> AxiDmaChannel<R, M, C> {
    pub(super) fn new(name: &str, direction: Direction, core: Arc<Core<R, M, C>>) -> Self {
        let side = match direction {
            Direction::MemToDev => "MM2S",
            Direction::DevToMem => "S2MM",
        };
        Self { name: format!("{name} {side}"), direction, core }
    }

    /// Which channel it is.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The registers when the channel last reported an error.
    pub fn last_error(&self) -> Option<HardwareError> {
        self.core.with(|state| state.channel(self.direction).last_error)
    }

    /// The descriptor pool given at the start.
    pub fn pool(&self) -> Option<DescriptorPool> {
        self.core.with(|state| state.channel(self.direction).ring.map(|ring| ring.pool()))
    }

    fn config(&self) -> ChannelConfig {
        self.core.config.channel(self.direction).copied().unwrap_or_default()
    }

    /// What buffers have to be aligned to, in bytes. Cores realign streams of up to 64 bits only (Linux
    /// `xilinx_dma_chan_probe`).
    fn align(&self) -> u64 {
        let ChannelConfig { data_width, include_dre, .. } = self.config();
        if include_dre && data_width <= 64 { 1 } else { u64::from(data_width / 8).max(1) }
    }

    /// The longest piece, a multiple of every alignment, so that the pieces behind it are aligned.
    fn max_chunk(&self) -> u64 {
        let max = (1u64 << self.core.config.length_bits) - 1;
        if self.core.has_scatter_gather() { max & !(self.align().max(64) - 1) } else { max }
    }

    fn max_chunks(&self) -> usize {
        self.core.with(|state| state.channel(self.direction).ring.map_or(1, |ring| ring.slots()))
    }

    fn check_direction(&self, asked: Direction) -> Result<(), ChannelError> {
        if asked == self.direction {
            return Ok(());
        }
        Err(ChannelError::Direction { asked, channel: self.direction })
    }

    fn check_segment(&self, segment: &Segment) -> Result<(), ChannelError> {
        let Segment { address, len } = *segment;
        let (align, bits) = (self.align(), self.core.config.address_bits);
        if len == 0 {
            return Err(ChannelError::Empty);
        }
        if !address.is_aligned(align) {
            return Err(ChannelError::Alignment { address, align });
        }
        let last = address.get().checked_add(len - 1);
        if last.is_none_or(|last| bits < 64 && last >> bits != 0) {
            return Err(ChannelError::AddressRange { address, len, bits });
        }
        Ok(())
    }

    /// The pieces of a transaction, its bytes, and its periods.
    fn plan(&self, work: &Work) -> Result<(Vec<Chunk>, u64, Option<Cyclic>), ChannelError> {
        let (max, limit) = (self.max_chunk(), self.max_chunks());
        let mut chunks = Vec::new();
        let (len, cyclic) = match work {
            Work::Slave { segments, direction } => {
                self.check_direction(*direction)?;
                let mut len = 0u64;
                for segment in segments {
                    self.check_segment(segment)?;
                    len = len.saturating_add(segment.len);
                }
                split(segments, max, limit, &mut chunks);
                (len, None)
            }
            Work::Cyclic { ring, period, direction } => {
                self.check_direction(*direction)?;
                if !self.core.has_scatter_gather() {
                    return Err(ChannelError::Unsupported {
                        what: "cyclic transfers without scatter-gather",
                    });
                }
                self.check_segment(ring)?;
                if *period == 0 || ring.len % period != 0 || period % self.align() != 0 {
                    return Err(ChannelError::Period { len: ring.len, period: *period });
                }
                let mut at = 0;
                while at < ring.len && chunks.len() <= limit {
                    let one = Segment { address: ring.address.wrapping_add(at), len: *period };
                    split(&[one], max, limit, &mut chunks);
                    at += period;
                }
                let of_period = usize::try_from(period.div_ceil(max)).unwrap_or(usize::MAX);
                (ring.len, Some(Cyclic { chunks: of_period, period: *period, next: 0, total: 0 }))
            }
            _ => return Err(ChannelError::Unsupported { what: "memory to memory copies" }),
        };
        match chunks.len() {
            0 => Err(ChannelError::Empty),
            needed if needed > limit => Err(ChannelError::TooManySegments { needed, max: limit }),
            _ => Ok((chunks, len, cyclic)),
        }
    }

    fn prepare(&self, work: Work) -> Result<Descriptor, ChannelError> {
        self.plan(&work)?;
        Ok(Descriptor::new(work))
    }

    /// What to do next for ending everything. `stopped`: what came of stopping this channel alone, if it was tried.
    fn next_step(&self, state: &mut CoreState, stopped: Option<bool>) -> Step {
        let direction = self.direction;
        match state.mastery {
            Mastery::Resetting => return Step::WaitForReset,
            Mastery::Stuck => {
                state.mastery = Mastery::Resetting;
                return Step::Reset;
            }
            Mastery::Ready => {}
        }
        let busy = !state.channel(other(direction)).running.is_empty();
        let channel = state.channel(direction);
        if !channel.terminating {
            // Somebody's reset took everything along.
            return Step::Done;
        }
        if !channel.on {
            self.core.end_all(channel, direction);
            return Step::Done;
        }
        // What is on its way to a receiver has to go with it, or the next one gets it.
        let alone = busy && (direction == Direction::MemToDev || channel.running.is_empty());
        match stopped {
            Some(true) if self.core.end_stopped(channel, direction) => Step::Done,
            None if alone => {
                self.core.tell_to_stop(channel, direction);
                Step::StopAlone
            }
            _ => {
                state.mastery = Mastery::Resetting;
                Step::Reset
            }
        }
    }

    fn wait_for_reset(&self) -> Result<(), AxiDmaError> {
        let resetting = || u64::from(self.core.with(|state| state.mastery == Mastery::Resetting));
        let what = "another context to reset the AXI DMA";
        poll(&self.core.clock, what, RESET_TIMEOUT_US, resetting, |resetting| resetting == 0)
            .map(drop)
            .map_err(|timeout| AxiDmaError::Recovering { timeout })
    }
}

impl<R: Mmio, M: DmaMemory, C: Clock> DmaChannel for AxiDmaChannel<R, M, C> {
    fn name(&self) -> &str {
        &self.name
    }

    fn caps(&self) -> Caps {
        let scatter_gather = self.core.has_scatter_gather();
        let residue =
            if scatter_gather { ResidueGranularity::Segment } else { ResidueGranularity::Descriptor };
        Caps {
            memcpy: false,
            slave: true,
            cyclic: scatter_gather,
            direction: Some(self.direction),
            address_bits: self.core.config.address_bits,
            align: self.align(),
            max_segment: self.max_chunk(),
            max_segments: self.max_chunks(),
            pause: false,
            residue,
        }
    }

    fn prep_slave_sg(&self, segments: &[Segment], direction: Direction) -> Result<Descriptor, ChannelError> {
        self.prepare(Work::Slave { segments: segments.to_vec(), direction })
    }

    fn prep_cyclic(
        &self,
        address: Iova,
        len: u64,
        period: u64,
        direction: Direction,
    ) -> Result<Descriptor, ChannelError> {
        self.prepare(Work::Cyclic { ring: Segment { address, len }, period, direction })
    }

    fn submit(&self, descriptor: Descriptor, callback: Option<Callback>) -> Result<Cookie, ChannelError> {
        let (chunks, len, cyclic) = self.plan(descriptor.work())?;
        // Taken only on success: a refused one is dropped without the lock.
        let mut notifier = callback.map(Notifier::new);
        self.core.with(|state| {
            if state.mastery == Mastery::Stuck && !self.core.unstick(state) {
                return Err(AxiDmaError::Stuck.into());
            }
            let channel = state.channel(self.direction);
            if channel.terminating {
                return Err(ChannelError::Busy { what: "stopping" });
            }
            // It never makes room for another, and the ring is its own.
            if channel.all().any(|transaction| transaction.cyclic.is_some()) {
                return Err(ChannelError::Busy { what: "a cyclic transfer" });
            }
            if cyclic.is_some() && channel.outstanding() > 0 {
                return Err(ChannelError::Busy { what: "transfers before a cyclic one" });
            }
            let first = match &mut channel.ring {
                None => 0,
                Some(ring) => {
                    let (needed, free) = (chunks.len(), ring.free());
                    ring.take(needed).ok_or(ChannelError::NoDescriptors { needed, free })?
                }
            };
            let (cookie, notifier) = (channel.record.issue(), notifier.take());
            channel.submitted.push_back(Transaction { cookie, notifier, chunks, len, first, cyclic });
            Ok(cookie)
        })
    }

    fn issue_pending(&self) {
        self.core.with(|state| {
            let channel = state.channel(self.direction);
            channel.issued.append(&mut channel.submitted);
            if state.mastery == Mastery::Stuck {
                self.core.unstick(state);
            }
            self.core.start(state, self.direction);
        });
    }

    fn status(&self, cookie: Cookie) -> Status {
        self.core.with(|state| {
            let channel = state.channel(self.direction);
            let is = |transaction: &&Transaction| transaction.cookie == cookie;
            if let Some(transaction) = channel.running.iter().find(is) {
                let transferred = self.core.moved_of(channel, transaction, self.direction);
                let residue = match transaction.cyclic {
                    Some(cyclic) => cyclic.residue(transaction.len),
                    None => transaction.len.saturating_sub(transferred),
                };
                return Status { state: State::Running, transferred, residue };
            }
            match channel.all().find(is) {
                Some(waiting) => Status { state: State::Queued, transferred: 0, residue: waiting.len },
                None => channel.record.status(cookie),
            }
        })
    }

    fn terminate(&self) -> Result<usize, ChannelError> {
        let outstanding = self.core.with(|state| {
            let channel = state.channel(self.direction);
            channel.terminating = true;
            channel.outstanding()
        });
        let mut stopped = None;
        // Others may reset the core in between, which ends this too: a few rounds are more than there can be.
        for _ in 0..4 {
            match self.core.with(|state| self.next_step(state, stopped)) {
                Step::Done => return Ok(outstanding),
                Step::WaitForReset => self.wait_for_reset()?,
                Step::StopAlone => stopped = Some(self.core.wait_for_halt(self.direction)),
                Step::Reset => {
                    self.core.reset()?;
                    return Ok(outstanding);
                }
            }
        }
        Err(AxiDmaError::Stuck.into())
    }

    fn handle_irq(&self) -> bool {
        self.core.handle_irq(self.direction)
    }
}

impl<R, M, C> fmt::Debug for AxiDmaChannel<R, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AxiDmaChannel").field("name", &self.name).finish_non_exhaustive()
    }
}
