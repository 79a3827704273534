//! What can go wrong, with the numbers needed to see why.

use portcullis_arch::Iova;

/// Why an operation of an [`IovaDomain`](super::IovaDomain) was refused. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IovaError {
    /// The granule is no power of two of at least 4096, or the aperture has no page besides page 0.
    #[error("no IOVA space: granule {granule:#x}, aperture {first:#x} to {last:#x}")]
    BadConfig {
        /// Bytes of a page.
        granule: u64,
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
    /// An allocation of no bytes, or of more than the 64 bits of an address.
    #[error("an IOVA range cannot have {len:#x} bytes")]
    BadLength {
        /// What was asked for.
        len: u64,
    },
    /// No room below the limit.
    #[error(
        "no IOVA range of {len:#x} bytes up to {limit:#x}: {free:#x} bytes are free, the largest aligned range has {largest:#x} \
         (anywhere), {handles} per-CPU handles may hold more"
    )]
    Full {
        /// Bytes asked for.
        len: u64,
        /// Last address allowed.
        limit: Iova,
        /// Bytes that are free in the whole space.
        free: u64,
        /// Bytes of the largest range that could be had without a limit.
        largest: u64,
        /// Handles that may still hold cached ranges.
        handles: usize,
    },
    /// The range is free already.
    #[error("double free of IOVA {iova:#x}, {len:#x} bytes")]
    DoubleFree {
        /// Its address.
        iova: Iova,
        /// Its bytes.
        len: u64,
    },
    /// No allocation starts at this address.
    #[error("free of IOVA {iova:#x}, {len:#x} bytes, where no allocation starts")]
    NotAllocated {
        /// The address.
        iova: Iova,
        /// The bytes.
        len: u64,
    },
    /// The range was allocated with another size.
    #[error("free of IOVA {iova:#x} with {len:#x} bytes, but it was allocated with {allocated:#x}")]
    WrongSize {
        /// Its address.
        iova: Iova,
        /// Bytes in the free.
        len: u64,
        /// Bytes of the allocation, rounded up.
        allocated: u64,
    },
    /// Something of a range to reserve is in use, or in the cache of an idle handle.
    #[error("IOVAs in {first:#x} to {last:#x} are in use and cannot be reserved")]
    InUse {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
}
