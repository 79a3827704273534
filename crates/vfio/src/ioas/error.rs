//! What an address space refuses, and why.

use portcullis_arch::Iova;
use portcullis_drivers::ops::IommuError;
use portcullis_iommu::ReservedKind;
use thiserror::Error;

use crate::PinError;

/// A request that an address space did not fulfil. Unless the variant says otherwise, nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum IoasError {
    /// No bytes.
    #[error("an area at {iova:#x} without bytes")]
    Empty {
        /// The address.
        iova: Iova,
    },
    /// Not a multiple of the page size.
    #[error("{value:#x} is not a multiple of the page size {page:#x}")]
    Unaligned {
        /// An address or a length.
        value: u64,
        /// The page size.
        page: u64,
    },
    /// Past the end of 64 bits.
    #[error("{iova:#x}+{len:#x} wraps around")]
    Wraps {
        /// The address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// First and last address are in the wrong order.
    #[error("a range from {first:#x} to {last:#x}")]
    Backwards {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
    /// Outside of what the IOMMU translates.
    #[error("{first:#x}..={last:#x} is outside of what the IOMMU translates ({start:#x}..={end:#x})")]
    Aperture {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
        /// First address that the IOMMU translates.
        start: Iova,
        /// Last such address.
        end: Iova,
    },
    /// There is an area already (Linux: EEXIST).
    #[error("{first:#x}..={last:#x} overlaps the area {there_first:#x}..={there_last:#x}")]
    Exists {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
        /// First address of the area.
        there_first: Iova,
        /// Last address of the area.
        there_last: Iova,
    },
    /// A device of the address space has a use of its own for these addresses.
    #[error("{first:#x}..={last:#x} overlaps the reserved region {start:#x}+{len:#x} ({kind:?})")]
    Reserved {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
        /// Start of the region.
        start: Iova,
        /// Its bytes.
        len: u64,
        /// Its kind.
        kind: ReservedKind,
    },
    /// Nothing is there (Linux: ENOENT).
    #[error("no area in {first:#x}..={last:#x}")]
    NoArea {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
    },
    /// Areas are unmapped whole.
    #[error(
        "{first:#x}..={last:#x} cuts the area {there_first:#x}..={there_last:#x}, which can be unmapped as a whole only"
    )]
    Cut {
        /// First address.
        first: Iova,
        /// Last address.
        last: Iova,
        /// First address of the area.
        there_first: Iova,
        /// Last address of the area.
        there_last: Iova,
    },
    /// No room for an area.
    #[error("no {len:#x} free addresses in a row")]
    NoRoom {
        /// Bytes asked for.
        len: u64,
    },
    /// Too much memory.
    #[error("{more:#x} bytes more would make {pinned:#x} pinned bytes too many: the limit is {limit:#x}")]
    PinLimit {
        /// Bytes pinned now.
        pinned: u64,
        /// Bytes to come.
        more: u64,
        /// The limit.
        limit: u64,
    },
    /// Too many areas.
    #[error("there are {limit} areas already, which is the limit")]
    AreaLimit {
        /// The limit.
        limit: usize,
    },
    /// The owner of the memory refused.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The IOMMU refused.
    #[error(transparent)]
    Iommu(#[from] IommuError),
    /// The IOMMU core refused.
    #[error(transparent)]
    Core(#[from] portcullis_iommu::Error),
    /// An IOMMU did not confirm an invalidation. The areas are gone, their memory stays pinned for good.
    #[error("a device may still reach the memory, which stays pinned: {0}")]
    StillReachable(IommuError),
    /// A group comes or goes, or another call works on the same area.
    #[error("the address space is being changed")]
    Busy,
    /// It was closed.
    #[error("the address space is closed")]
    Closed,
    /// Groups are still in it.
    #[error("{0} groups are still in the address space")]
    InUse(usize),
}
