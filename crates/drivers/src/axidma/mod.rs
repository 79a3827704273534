//! Driver for the AXI DMA of programmable logic (PG021): memory to stream (MM2S), stream to memory (S2MM).
//!
//! [`AxiDma::new`] resets the core and finds out whether it was built with a scatter-gather engine; each channel is then
//! an [`AxiDmaChannel`], used through [`DmaChannel`]. `ring` holds the descriptors in memory,
//! `core` the register sequences, `transaction` what is under way.
//!
//! The register sequences are those of Linux's `xilinx_dma` where the hardware asks for them. The differences:
//!
//! | | Linux 6.12 | here |
//! |---|---|---|
//! | error | the transaction never ends; later ones may never either | it fails with kind and address, the core is reset, those behind it run |
//! | the other channel at that reset | dies without a word | what was in its middle fails with [`EngineReset`](crate::dmaengine::TransferError::EngineReset), the rest is started again |
//! | terminate | resets the core, the other channel with it | leaves the other channel alone if the stream stays whole: an MM2S that stops between two packets, an S2MM that was to receive nothing. Else it resets the core, and the other channel is told as above. A FIFO that the core's reset does not empty keeps what it has |
//! | core that does not come out of reset | carries on | nothing starts until it has; until then transactions do not end, because their memory is not safe |
//! | more than 255 transactions issued at once | the threshold does not count them | batches of at most 255 |
//! | S2MM threshold | the number of transactions: a packet over two of them is never reported | 1, unless the delay timer is on |
//! | cyclic MM2S | one packet and one interrupt per round, no callback | one packet, interrupt and callback per period |
//! | direct mode | moves one segment, completes all that is queued | one transaction of one segment at a time |
//! | CURDESC | written at each start, ignored by a running core | written when the core is halted |
//! | pause | no | no: RS = 0 may flush what is under way (PG021) |
//! | packet shorter than a multi-segment S2MM transaction | the next packet fills the rest of it | the same: only the hardware knows the end |
//!
//! Not covered: multichannel mode, keyhole, control and status streams.

mod channel;
mod core;
mod error;
mod ring;
#[cfg(test)]
mod tests;
mod transaction;

use ::core::fmt;
use alloc::sync::Arc;

use portcullis_hal::{Clock, DmaMemory, Mmio};

use self::core::Core;
use crate::dmaengine::{ChannelError, DescriptorPool, Direction, DmaChannel};

pub use channel::AxiDmaChannel;
pub use error::{AxiDmaError, HardwareError};
pub use ring::{BD_BYTES, pool_bytes};

/// Buffer descriptors of a channel in Linux 6.12; [`pool_bytes`] of it is a good size for a pool.
pub const DEFAULT_DESCRIPTORS: usize = 512;

/// What the device tree says about a channel, and where its descriptors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelConfig {
    /// [`pool_bytes`] of memory in the DMA device's domain; a core without scatter-gather needs none.
    pub pool: Option<DescriptorPool>,
    /// `xlnx,datawidth`: bits of the stream and of the memory interface, 8 to 1024.
    pub data_width: u16,
    /// `xlnx,include-dre`: buffers of any alignment.
    pub include_dre: bool,
    /// `xlnx,irq-delay`: the delay timer, in 125 clocks of the scatter-gather engine; 0 is off.
    pub irq_delay: u8,
}

impl Default for ChannelConfig {
    fn default() -> Self {
        Self { pool: None, data_width: 32, include_dre: false, irq_delay: 0 }
    }
}

/// What the device tree says about a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// `xlnx,addrwidth`, 32 to 64.
    pub address_bits: u8,
    /// `xlnx,sg-length-width`, 8 to 26: bits of a buffer's length.
    pub length_bits: u8,
    /// `dma-coherent`: accesses snoop the CPU's caches.
    pub coherent: bool,
    /// Memory to stream, if the core has it.
    pub mm2s: Option<ChannelConfig>,
    /// Stream to memory, if the core has it.
    pub s2mm: Option<ChannelConfig>,
}

impl Default for Config {
    /// Linux's defaults, and no channel.
    fn default() -> Self {
        Self { address_bits: 32, length_bits: 23, coherent: false, mm2s: None, s2mm: None }
    }
}

impl Config {
    /// Of one channel.
    pub fn channel(&self, direction: Direction) -> Option<&ChannelConfig> {
        match direction {
            Direction::MemToDev => self.mm2s.as_ref(),
            Direction::DevToMem => self.s2mm.as_ref(),
        }
    }
}

/// One AXI DMA core.
pub struct AxiDma<R, M, C> {
    core: Arc<Core<R, M, C>>,
    channels: [Option<Arc<AxiDmaChannel<R, M, C>>>; 2],
}

impl<R: Mmio, M: DmaMemory, C: Clock> AxiDma<R, M, C> {
    /// Resets the core and prepares its channels (Linux `xilinx_dma_probe`). `name` is for messages.
    pub fn new(name: &str, regs: R, memory: M, clock: C, config: Config) -> Result<Self, AxiDmaError> {
        let core = Arc::new(Core::new(regs, memory, clock, config)?);
        let channel = |direction| {
            let present = config.channel(direction).is_some();
            present.then(|| Arc::new(AxiDmaChannel::new(name, direction, core.clone())))
        };
        let channels = [channel(Direction::MemToDev), channel(Direction::DevToMem)];
        Ok(Self { core, channels })
    }

    /// A channel, if the core has it.
    pub fn channel(&self, direction: Direction) -> Option<&Arc<AxiDmaChannel<R, M, C>>> {
        self.channels.iter().flatten().find(|channel| channel.direction() == direction)
    }

    /// The core was built with a scatter-gather engine (DMASR.SGIncld).
    pub fn has_scatter_gather(&self) -> bool {
        self.core.has_scatter_gather()
    }

    /// True if nothing runs and nothing waits to run.
    pub fn is_idle(&self) -> bool {
        self.core.is_idle()
    }

    /// Terminates both channels and masks their interrupts (Linux `xilinx_dma_remove`, which leaves the engine running).
    /// On `Ok` the core touches no memory any more, and the pools can be freed.
    pub fn stop(&self) -> Result<(), ChannelError> {
        for channel in self.channels.iter().flatten() {
            channel.terminate()?;
        }
        self.core.mask_interrupts();
        Ok(())
    }
}

impl<R, M, C> fmt::Debug for AxiDma<R, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AxiDma").finish_non_exhaustive()
    }
}
