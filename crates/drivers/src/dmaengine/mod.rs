//! One interface for everybody who moves data with a DMA engine, whatever the engine (Linux's dmaengine).
//!
//! A client asks a [`Registry`] for a channel, prepares a [`Descriptor`], submits it and issues what is pending. The
//! transaction ends as one [`Completion`], handed to the client's [`Callback`]; [`DmaChannel::status`], [`wait`] and
//! [`Signal`] serve those who would rather look. Drivers implement [`DmaChannel`]:
//! [`ZdmaChannel`](crate::zdma::ZdmaChannel) and [`AxiDmaChannel`](crate::axidma::AxiDmaChannel).
//!
//! | | Linux's dmaengine | here |
//! |---|---|---|
//! | prepare | takes hardware descriptors, which leak if nobody submits | checks only; submitting takes them, and says when there are too few |
//! | callback | may get no result; not called for what was terminated | always gets the result, and every transaction gets one |
//! | release | frees what the engine may still use | stops the channel first; one that does not stop is not handed out again |
//! | request | NULL, an error pointer or a channel | a channel, or an error that says who has it |

mod error;
mod notify;
mod record;
mod registry;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_hal::Block;

pub use error::{BusAccess, BusResponse, ChannelError, RequestError, TransferError, WaitError};
pub use notify::{Callback, Notifier, Signal, deliver, wait};
pub use record::Record;
pub use registry::{ChannelHandle, ChannelRequest, Registry};

/// Names a transaction of one channel. Later ones have greater numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// A stretch of memory in a scatter-gather list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address, of any alignment that the channel bears.
    pub address: Iova,
    /// Bytes, not 0.
    pub len: u64,
}

/// Memory for an engine's descriptors. The engine reads them through its IOMMU like everything else, so it has two
/// addresses: where the CPU writes, and where the engine reads. Without an IOMMU they are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorPool {
    /// The memory, aligned to 64. How many bytes is said where the driver takes it.
    pub block: Block,
    /// The same memory as the engine addresses it, aligned to 64.
    pub iova: Iova,
}

/// Which way a transfer between memory and a stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From memory to the device (MM2S, tx).
    MemToDev,
    /// From the device to memory (S2MM, rx).
    DevToMem,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MemToDev => "memory to device",
            Self::DevToMem => "device to memory",
        })
    }
}

/// A kind of transfer, for asking whoever can do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Capability {
    /// [`DmaChannel::prep_memcpy`].
    Memcpy,
    /// [`DmaChannel::prep_slave_sg`] in this direction.
    Slave(Direction),
    /// [`DmaChannel::prep_cyclic`] in this direction.
    Cyclic(Direction),
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memcpy => f.write_str("memcpy"),
            Self::Slave(direction) => write!(f, "scatter-gather from {direction}"),
            Self::Cyclic(direction) => write!(f, "cyclic transfers from {direction}"),
        }
    }
}

/// How exact [`Status::residue`] is while a transaction runs (Linux `enum dma_residue_granularity`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResidueGranularity {
    /// All or nothing.
    Descriptor,
    /// It shrinks with every hardware descriptor.
    Segment,
    /// It shrinks with every burst.
    Burst,
}

/// What a channel can do and what it asks of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// It copies from memory to memory, lists included.
    pub memcpy: bool,
    /// It transfers between memory and a stream.
    pub slave: bool,
    /// It repeats a transfer until terminated.
    pub cyclic: bool,
    /// The way it goes, if it is a stream's.
    pub direction: Option<Direction>,
    /// Bits of the addresses it can express: the DMA mask of its device.
    pub address_bits: u8,
    /// Addresses have to be multiples of this many bytes (a power of two).
    pub align: u64,
    /// Bytes of one hardware descriptor. Longer segments are cut.
    pub max_segment: u64,
    /// Hardware descriptors of one transaction, and of all that are under way.
    pub max_segments: usize,
    /// [`DmaChannel::pause`] works.
    pub pause: bool,
    /// How exact the residue is.
    pub residue: ResidueGranularity,
}

impl Caps {
    /// True if the channel can do this.
    pub fn has(&self, capability: Capability) -> bool {
        match capability {
            Capability::Memcpy => self.memcpy,
            Capability::Slave(direction) => self.slave && self.direction == Some(direction),
            Capability::Cyclic(direction) => self.cyclic && self.direction == Some(direction),
        }
    }
}

/// What a transaction is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Work {
    /// Copy between lists of the same total size.
    Memcpy {
        /// Destination.
        to: Vec<Segment>,
        /// Source.
        from: Vec<Segment>,
    },
    /// Move a list to or from the channel's stream, as one packet when it goes to the stream.
    Slave {
        /// The memory.
        segments: Vec<Segment>,
        /// The way.
        direction: Direction,
    },
    /// Move a ring of periods to or from the stream until terminated.
    Cyclic {
        /// The ring.
        ring: Segment,
        /// Bytes after which the callback runs; a divisor of the ring's.
        period: u64,
        /// The way.
        direction: Direction,
    },
}

/// A prepared transaction: checked against the channel, and holding nothing of it, so that dropping it is fine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor(Work);

impl Descriptor {
    /// For drivers: a descriptor for what has been checked. Submitting checks again, because a client may hand it to
    /// another channel.
    pub fn new(work: Work) -> Self {
        Self(work)
    }

    /// What it is to do.
    pub fn work(&self) -> &Work {
        &self.0
    }

    /// What it is to do, owned.
    pub fn into_work(self) -> Work {
        self.0
    }
}

/// How a transaction ended, or that a period of a cyclic one has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub cookie: Cookie,
    /// Success, or what was wrong.
    pub result: Result<(), TransferError>,
    /// Bytes that were moved. Fewer than asked for is no error when a stream's packet was short. Of a cyclic
    /// transaction: since its start.
    pub transferred: u64,
    /// Bytes that were not.
    pub residue: u64,
    /// A period of a cyclic transaction has passed, and it goes on: this is not the end.
    pub ongoing: bool,
}

/// What a transaction is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Submitted, not started.
    Queued,
    /// The engine has it.
    Running,
    /// The engine has it and was told to pause.
    Paused,
    /// Done.
    Complete,
    /// Ended without success.
    Failed(TransferError),
    /// Never submitted, or ended so long ago that it is forgotten.
    Unknown,
}

/// How a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// What it is doing.
    pub state: State,
    /// Bytes moved so far.
    pub transferred: u64,
    /// Bytes not moved yet; of a cyclic transaction, up to the end of the ring.
    pub residue: u64,
}

impl Status {
    /// Of a cookie that names nothing.
    pub const UNKNOWN: Self = Self { state: State::Unknown, transferred: 0, residue: 0 };

    /// True when nothing more will happen to the transaction.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Complete | State::Failed(_) | State::Unknown)
    }
}

impl From<Completion> for Status {
    fn from(completion: Completion) -> Self {
        let Completion { cookie: _, result, transferred, residue, ongoing } = completion;
        let state = match result {
            Err(error) => State::Failed(error),
            Ok(()) if ongoing => State::Running,
            Ok(()) => State::Complete,
        };
        Self { state, transferred, residue }
    }
}

/// One channel of a DMA engine. Addresses are what the engine puts on the bus: from the DMA API of the **engine's**
/// device, or of one that shares its domain.
///
/// Callbacks run without any lock held, inside [`handle_irq`](Self::handle_irq), [`terminate`](Self::terminate) or
/// [`issue_pending`](Self::issue_pending), and may call the channel.
pub trait DmaChannel: Send + Sync {
    /// "dma@a0000000 MM2S" or the like, for messages.
    fn name(&self) -> &str;
    /// What it can do.
    fn caps(&self) -> Caps;

    /// Prepares a copy of `len` bytes; the ranges must not overlap.
    fn prep_memcpy(&self, to: Iova, from: Iova, len: u64) -> Result<Descriptor, ChannelError> {
        self.prep_memcpy_sg(&[Segment { address: to, len }], &[Segment { address: from, len }])
    }
    /// Prepares a copy between two lists of the same total size.
    fn prep_memcpy_sg(&self, to: &[Segment], from: &[Segment]) -> Result<Descriptor, ChannelError> {
        let (_, _) = (to, from);
        Err(ChannelError::Unsupported { what: "memory to memory copies" })
    }
    /// Prepares a transfer between a list and the channel's stream. To the stream, the list is one packet.
    fn prep_slave_sg(&self, segments: &[Segment], direction: Direction) -> Result<Descriptor, ChannelError> {
        let (_, _) = (segments, direction);
        Err(ChannelError::Unsupported { what: "transfers with a stream" })
    }
    /// Prepares a transfer that runs round a ring of periods until terminated, and calls back after each period.
    fn prep_cyclic(
        &self,
        address: Iova,
        len: u64,
        period: u64,
        direction: Direction,
    ) -> Result<Descriptor, ChannelError> {
        let (_, _, _, _) = (address, len, period, direction);
        Err(ChannelError::Unsupported { what: "cyclic transfers" })
    }

    /// Queues a transaction. Nothing starts before [`issue_pending`](Self::issue_pending).
    fn submit(&self, descriptor: Descriptor, callback: Option<Callback>) -> Result<Cookie, ChannelError>;
    /// Starts what was submitted: now, or when what runs is through.
    fn issue_pending(&self);
    /// How a transaction stands.
    fn status(&self, cookie: Cookie) -> Status;

    /// Holds the channel in the middle of its work.
    fn pause(&self) -> Result<(), ChannelError> {
        Err(ChannelError::Unsupported { what: "pause" })
    }
    /// Goes on after a pause.
    fn resume(&self) -> Result<(), ChannelError> {
        Err(ChannelError::Unsupported { what: "resume" })
    }
    /// Stops the channel and ends all its transactions with [`TransferError::Terminated`]. Bounded. On `Ok` the engine
    /// touches none of their memory any more (Linux `dmaengine_terminate_sync`); on an error it still may, nothing new
    /// starts, and calling again tries again. Gives how many transactions there were.
    fn terminate(&self) -> Result<usize, ChannelError>;
    /// Deals with the channel's interrupt; false if it was somebody else's.
    fn handle_irq(&self) -> bool;
}
