//! An AXI DMA core with its driver, on a host or in a virtual machine: the same code, with other memory, registers and clock.

use std::sync::Arc;

use portcullis_drivers::axidma::{
    AxiDma, AxiDmaChannel, AxiDmaError, ChannelConfig, Config, DEFAULT_DESCRIPTORS, pool_bytes,
};
use portcullis_drivers::dmaengine::{
    BusAccess, ChannelError, Cookie, DescriptorPool, Direction, DmaChannel, Segment, Status, TransferError,
    WaitError, wait,
};
use portcullis_hal::{Block, Clock, DmaMemory, Mmio};
use portcullis_iommu::dma::{Coherent, DmaDevice, DmaError};
use thiserror::Error;

use crate::machine;

/// Registers of any platform.
pub type AnyMmio = Arc<dyn Mmio>;
/// Time of any platform.
pub type AnyClock = Arc<dyn Clock>;

/// A core that its driver does not come up on.
#[derive(Debug, Error)]
pub enum StackError {
    /// No memory for descriptors.
    #[error("descriptors: {0}")]
    Pool(#[from] DmaError),
    /// The driver refused.
    #[error(transparent)]
    Driver(#[from] AxiDmaError),
    /// Coherent memory came in pieces, and descriptors are one.
    #[error("descriptors: no {0} bytes of contiguous memory")]
    Scattered(u64),
}

/// A core with its driver and the memory of its descriptors.
pub struct AxiStack<M: DmaMemory + Clone + 'static> {
    driver: AxiDma<AnyMmio, M, AnyClock>,
    dma: DmaDevice<M>,
    /// The driver's rings are in it.
    _pools: Vec<Coherent<M>>,
}

/// The channel of a stack.
pub type StackChannel<M> = AxiDmaChannel<AnyMmio, M, AnyClock>;

impl<M: DmaMemory + Clone + 'static> AxiStack<M> {
    /// Brings the driver of a core up. `node` is what the device tree says, `dma` the core's own device.
    ///
    /// # Errors
    /// There is no memory for descriptors, or the driver refuses.
    pub fn new(
        name: &str,
        node: &machine::AxiDma,
        registers: AnyMmio,
        clock: AnyClock,
        dma: DmaDevice<M>,
    ) -> Result<Self, StackError> {
        let mut pools = Vec::new();
        let mut channel = |index: usize| -> Result<Option<ChannelConfig>, StackError> {
            let Some(channel) = node.channels.get(index).and_then(Option::as_ref) else { return Ok(None) };
            let mut pool = None;
            if node.scatter_gather {
                let len = pool_bytes(DEFAULT_DESCRIPTORS);
                let memory = dma.alloc_coherent(len as u64)?;
                let (first, last) = (memory.pa(0), memory.pa(len as u64 - 1));
                let whole = first.zip(last).filter(|(a, b)| b.get() - a.get() == len as u64 - 1);
                let Some((pa, _)) = whole else { return Err(StackError::Scattered(len as u64)) };
                pool = Some(DescriptorPool { block: Block { pa, len }, iova: memory.iova() });
                pools.push(memory);
            }
            Ok(Some(ChannelConfig {
                pool,
                data_width: u16::try_from(channel.data_width).unwrap_or(32),
                include_dre: channel.realigns,
                irq_delay: 0,
            }))
        };
        let config = Config {
            address_bits: node.address_bits,
            length_bits: node.length_bits,
            coherent: dma.is_coherent(),
            mm2s: channel(0)?,
            s2mm: channel(1)?,
        };
        let driver = AxiDma::new(name, registers, dma.memory().clone(), clock, config)?;
        Ok(Self { driver, dma, _pools: pools })
    }
    /// The driver.
    pub fn driver(&self) -> &AxiDma<AnyMmio, M, AnyClock> {
        &self.driver
    }
    /// The core's own device.
    pub fn dma(&self) -> &DmaDevice<M> {
        &self.dma
    }
    /// A channel.
    pub fn channel(&self, direction: Direction) -> Option<Arc<StackChannel<M>>> {
        self.driver.channel(direction).cloned()
    }
    /// The channel that `dmas` calls by a number: 0 is MM2S, 1 is S2MM.
    pub fn numbered(&self, number: u32) -> Option<Arc<dyn DmaChannel>> {
        let direction = match number {
            0 => Direction::MemToDev,
            1 => Direction::DevToMem,
            _ => return None,
        };
        let channel = self.channel(direction)?;
        Some(channel)
    }

    /// Starts a transfer through both channels: what is read at `from` goes out on the stream, comes back, and is written at
    /// `to`. Returns what the two are called.
    ///
    /// # Errors
    /// The core lacks a channel, or one refuses.
    pub fn begin(&self, to: &[Segment], from: &[Segment]) -> Result<Loop<M>, ChannelError> {
        let lacks = ChannelError::Unsupported { what: "channel of that direction" };
        let tx = self.channel(Direction::MemToDev).ok_or(lacks)?;
        let rx = self.channel(Direction::DevToMem).ok_or(lacks)?;
        let into = rx.prep_slave_sg(to, Direction::DevToMem)?;
        let out = tx.prep_slave_sg(from, Direction::MemToDev)?;
        let received = rx.submit(into, None)?;
        rx.issue_pending();
        let sent = match tx.submit(out, None) {
            Ok(sent) => sent,
            Err(error) => {
                let _why_comes_first = rx.terminate();
                return Err(error);
            }
        };
        tx.issue_pending();
        Ok(Loop { tx, rx, sent, received })
    }
}

impl<M: DmaMemory + Clone + 'static> AxiStack<M> {
    /// Receives without anybody who sends here: what is in the stream already, or nothing.
    ///
    /// # Errors
    /// Nothing came, or the channel failed. It is stopped then.
    pub fn receive(&self, to: &[Segment], clock: &impl Clock, timeout_us: u64) -> Result<u64, WaitError> {
        let refused = |error| WaitError::Failed { error, transferred: 0 };
        let Some(rx) = self.channel(Direction::DevToMem) else {
            return Err(refused(TransferError::NotStarted));
        };
        let submitted = rx.prep_slave_sg(to, Direction::DevToMem).and_then(|into| rx.submit(into, None));
        let cookie = submitted.map_err(|_| refused(TransferError::NotStarted))?;
        rx.issue_pending();
        let ended = wait(&*rx, cookie, clock, timeout_us);
        if ended.is_err() {
            let _why_comes_first = rx.terminate();
        }
        ended.map(|status| status.transferred)
    }
}

/// A transfer through both channels of a core.
pub struct Loop<M: DmaMemory + Clone + 'static> {
    tx: Arc<StackChannel<M>>,
    rx: Arc<StackChannel<M>>,
    sent: Cookie,
    received: Cookie,
}

impl<M: DmaMemory + Clone + 'static> Loop<M> {
    /// How both sides stand: sent, received.
    pub fn status(&self) -> (Status, Status) {
        (self.tx.status(self.sent), self.rx.status(self.received))
    }
    /// Waits for both sides, bounded. Gives the bytes that arrived.
    ///
    /// # Errors
    /// The first error of either side. Both channels are stopped then.
    pub fn wait(&self, clock: &impl Clock, timeout_us: u64) -> Result<u64, WaitError> {
        let sent = wait(&*self.tx, self.sent, clock, timeout_us);
        let received = match sent {
            // What was not sent does not arrive.
            Err(_) => wait(&*self.rx, self.received, clock, 100),
            Ok(_) => wait(&*self.rx, self.received, clock, timeout_us),
        };
        // A receiver that failed keeps the sender waiting: its error is the cause.
        let result = match (sent, received) {
            (Ok(_), Ok(received)) => return Ok(received.transferred),
            (Err(WaitError::Timeout { .. }), Err(error @ WaitError::Failed { .. })) => Err(error),
            // Nor does a sender that was refused give the receiver anything to write, so of two refusals the receiver's came
            // first: an SMMU may refuse everything of a core from then on.
            (
                Err(WaitError::Failed { error: TransferError::Bus { .. }, .. }),
                Err(
                    error @ WaitError::Failed {
                        error: TransferError::Bus { access: BusAccess::Write, .. },
                        ..
                    },
                ),
            ) => Err(error),
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        for channel in [&self.tx, &self.rx] {
            // The error that came first is the one that matters.
            let _stopped = channel.terminate();
        }
        result
    }
}
