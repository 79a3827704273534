//! What can go wrong with a channel, with one transaction, with a request for a channel.

use alloc::string::String;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_hal::Timeout;
use thiserror::Error;

use super::{Capability, Cookie, Direction};
use crate::axidma::AxiDmaError;
use crate::zdma::ZdmaError;

/// A call that a channel did not carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The hardware has no such thing.
    #[error("the channel has no {what}")]
    Unsupported {
        /// "pause" or the like.
        what: &'static str,
    },
    /// Nothing to transfer.
    #[error("an empty transfer, or an empty segment in one")]
    Empty,
    /// The channel's stream goes the other way.
    #[error("the channel goes from {channel}, not from {asked}")]
    Direction {
        /// What the client asked for.
        asked: Direction,
        /// What the channel does.
        channel: Direction,
    },
    /// The engine has no realignment logic (DRE).
    #[error("{address:#x} is not a multiple of {align}, and the engine cannot realign")]
    Alignment {
        /// The address.
        address: Iova,
        /// Bytes.
        align: u64,
    },
    /// A segment goes past what the engine can address.
    #[error("{address:#x}+{len:#x} does not fit into the engine's {bits} address bits")]
    AddressRange {
        /// First address.
        address: Iova,
        /// Bytes.
        len: u64,
        /// Address bits that there are.
        bits: u8,
    },
    /// The periods do not make up the ring.
    #[error("a ring of {len} bytes is not made of periods of {period} bytes")]
    Period {
        /// Bytes of the ring.
        len: u64,
        /// Bytes of a period.
        period: u64,
    },
    /// More hardware descriptors than there are.
    #[error("the transfer needs {needed} hardware descriptors, and the channel has {max}")]
    TooManySegments {
        /// How many, or one more than there are.
        needed: usize,
        /// How many there are.
        max: usize,
    },
    /// Not enough hardware descriptors are free now.
    #[error("the transfer needs {needed} hardware descriptors and {free} are free: wait for completions")]
    NoDescriptors {
        /// How many.
        needed: usize,
        /// Free ones.
        free: usize,
    },
    /// Something is under way that bears nothing beside it.
    #[error("the channel is busy with {what}")]
    Busy {
        /// "a cyclic transfer" or the like.
        what: &'static str,
    },
    /// What a ZDMA channel said.
    #[error(transparent)]
    Zdma(#[from] ZdmaError),
    /// What an AXI DMA said.
    #[error(transparent)]
    AxiDma(#[from] AxiDmaError),
}

/// Which access of an engine got an error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BusAccess {
    /// The fetch of a descriptor, or the write of its status.
    Descriptor,
    /// A read of source data.
    Read,
    /// A write of destination data.
    Write,
}

impl fmt::Display for BusAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Descriptor => "access to a descriptor",
            Self::Read => "read of data",
            Self::Write => "write of data",
        })
    }
}

/// Which error response it was, if the engine tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BusResponse {
    /// SLVERR: what an SMMU answers when it terminates an access.
    Slave,
    /// DECERR: nothing is at the address.
    Decode,
    /// The engine does not tell.
    Unknown,
}

impl fmt::Display for BusResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slave => "slave error (an IOMMU may have refused it)",
            Self::Decode => "decode error (nothing is there)",
            Self::Unknown => "bus error",
        })
    }
}

/// Why a transaction did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TransferError {
    /// An error response: nothing is there, or an IOMMU refused the access.
    #[error("{response} on the {access} near {at:#x}")]
    Bus {
        /// Which access.
        access: BusAccess,
        /// Which response.
        response: BusResponse,
        /// The descriptor, or the start of the buffer that the engine had in work.
        at: Iova,
    },
    /// The engine did not like a descriptor or a packet.
    #[error("internal error of the engine: {what}")]
    Internal {
        /// What its manual says about it.
        what: &'static str,
    },
    /// The engine said that it was done and had not finished this one.
    #[error("the engine is done but did not finish this transaction")]
    Incomplete,
    /// The engine did not start.
    #[error("the engine did not start")]
    NotStarted,
    /// The engine had to be reset as a whole for the sake of another channel.
    #[error("the engine was reset because of its other channel, in the middle of this transaction")]
    EngineReset,
    /// The channel was terminated.
    #[error("terminated")]
    Terminated,
}

/// A wait that did not end with success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WaitError {
    /// Time ran out. The transaction is still under way.
    #[error("{timeout}; {residue} bytes are left")]
    Timeout {
        /// What was waited for.
        timeout: Timeout,
        /// Bytes not moved.
        residue: u64,
    },
    /// The transaction failed.
    #[error("{error} ({transferred} bytes were moved)")]
    Failed {
        /// Why.
        error: TransferError,
        /// Bytes moved.
        transferred: u64,
    },
    /// The cookie names nothing.
    #[error("no transaction {cookie:?}")]
    Unknown {
        /// The cookie.
        cookie: Cookie,
    },
}

/// A request for a channel that was refused (Linux `dma_request_chan`).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// Nobody registered an engine of that name (yet).
    #[error("there is no DMA engine {provider}; there are: {known}")]
    NoProvider {
        /// The name.
        provider: String,
        /// Those that there are.
        known: String,
    },
    /// The engine has no such channel.
    #[error("{provider} has no channel {cell}")]
    NoChannel {
        /// The engine.
        provider: String,
        /// The cell of the `dmas` property.
        cell: u32,
    },
    /// Nobody can do it.
    #[error("no engine can do {capability}")]
    NotCapable {
        /// What.
        capability: Capability,
    },
    /// Those who could are taken.
    #[error("{channel} is in use by {owner}")]
    InUse {
        /// The channel.
        channel: String,
        /// Its client.
        owner: String,
    },
    /// The channel did not stop when its last client gave it back.
    #[error("{channel} did not stop when {owner} released it: {error}")]
    Stuck {
        /// The channel.
        channel: String,
        /// Its last client.
        owner: String,
        /// What it said.
        error: ChannelError,
    },
    /// The name and cell are registered already.
    #[error("{provider} has a channel {cell} already")]
    Duplicate {
        /// The engine.
        provider: String,
        /// The cell.
        cell: u32,
    },
}
