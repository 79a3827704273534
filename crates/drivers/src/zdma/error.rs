//! What can go wrong with a channel or with one transaction.

use core::fmt;

use portcullis_arch::Iova;
use portcullis_arch::zdma::interrupt;
use portcullis_hal::Timeout;
use thiserror::Error;

use super::{Cookie, DescriptorPool, POOL_BYTES, POOL_DESCRIPTORS};

/// A request that was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ZdmaError {
    /// The descriptor pool is too small or misaligned.
    #[error(
        "a descriptor pool needs {POOL_BYTES} bytes and addresses that are multiples of 64, this one has {} bytes at \
         pa {:#x}, iova {:#x}", .pool.block.len, .pool.block.pa, .pool.iova
    )]
    Pool {
        /// The pool.
        pool: DescriptorPool,
    },
    /// Nothing to copy.
    #[error("an empty transfer, or an empty segment in one")]
    Empty,
    /// Source and destination lists differ.
    #[error("the source has {from} bytes and the destination {to}")]
    LengthMismatch {
        /// Bytes of the source.
        from: u64,
        /// Bytes of the destination.
        to: u64,
    },
    /// The register for the size has 30 bits.
    #[error("{len} bytes are too many for one transfer without descriptors in memory")]
    TooLong {
        /// Bytes.
        len: u64,
    },
    /// A segment goes past what descriptors (44 bits) or registers (49 bits) can express.
    #[error("{address:#x}+{len:#x} does not fit into {bits} address bits")]
    AddressRange {
        /// First address.
        address: Iova,
        /// Bytes.
        len: u64,
        /// Address bits that there are.
        bits: u8,
    },
    /// More descriptors than there are.
    #[error("the transfer needs {needed} descriptors, and a channel has {POOL_DESCRIPTORS}")]
    TooManyDescriptors {
        /// How many.
        needed: usize,
    },
    /// Not enough descriptors are free now.
    #[error("the transfer needs {needed} descriptors and {free} are free: wait for completions")]
    PoolEmpty {
        /// How many.
        needed: usize,
        /// Free ones.
        free: usize,
    },
    /// The channel is running.
    #[error("the channel is not idle")]
    Busy,
    /// The cookie names nothing.
    #[error("no transaction {cookie:?}, or its completion was taken already")]
    UnknownCookie {
        /// The cookie.
        cookie: Cookie,
    },
    /// The engine did not get through in time.
    #[error("{timeout}; STATUS {status:#x}, ISR {isr:#x}")]
    Timeout {
        /// What was waited for.
        timeout: Timeout,
        /// STATUS afterwards.
        status: u32,
        /// ISR afterwards.
        isr: u32,
    },
}

/// Which access got an error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BusErrorKind {
    /// The fetch of a source descriptor, or the descriptor is misaligned.
    SourceDescriptor,
    /// The fetch of a destination descriptor, or the descriptor is misaligned.
    DestinationDescriptor,
    /// A read of source data.
    SourceRead,
    /// A write of destination data.
    DestinationWrite,
}

impl BusErrorKind {
    /// From ISR; the earliest in the order of work if there are several.
    pub(super) fn from_status(status: u32) -> Self {
        let kinds = [
            (interrupt::AXI_RD_SRC_DSCR, Self::SourceDescriptor),
            (interrupt::AXI_RD_DATA, Self::SourceRead),
            (interrupt::AXI_RD_DST_DSCR, Self::DestinationDescriptor),
        ];
        let found = kinds.iter().find(|(bit, _)| status & bit != 0);
        found.map_or(Self::DestinationWrite, |(_, kind)| *kind)
    }
}

impl fmt::Display for BusErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SourceDescriptor => "fetch of a source descriptor",
            Self::DestinationDescriptor => "fetch of a destination descriptor",
            Self::SourceRead => "read of source data",
            Self::DestinationWrite => "write of destination data",
        })
    }
}

/// Where the engine says it is (SRC_CUR_PYLD, DST_CUR_PYLD).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// In the source.
    pub source: Iova,
    /// In the destination.
    pub destination: Iova,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "source at {:#x}, destination at {:#x}", self.source, self.destination)
    }
}

/// Why a transaction did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TransferError {
    /// An error response: nothing is there, or an IOMMU refused the access.
    #[error("bus error on the {kind} ({position})")]
    Bus {
        /// Which access.
        kind: BusErrorKind,
        /// Where the engine was.
        position: Position,
    },
    /// The channel was terminated.
    #[error("terminated")]
    Terminated,
    /// The engine said that it was done and had not counted this one.
    #[error("the channel is done but did not report this transaction ({position})")]
    Incomplete {
        /// Where the engine was.
        position: Position,
    },
}
