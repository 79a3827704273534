//! What can go wrong, with what is needed to act.

use alloc::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::{DomainKind, IommuError};
use thiserror::Error;

use super::MappingKind;
use crate::iova::IovaError;

/// A request of the DMA API that was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DmaError {
    /// A domain in which nothing can be mapped.
    #[error("a {kind} domain has no addresses to hand out")]
    NoTable {
        /// Its kind.
        kind: DomainKind,
    },
    /// No space of addresses can be made of the domain, or what is reserved in it is not to be had.
    #[error(transparent)]
    Space(IovaError),
    /// No bytes, or more than there can be.
    #[error("{device}: {len:#x} bytes at {pa:#x} are no buffer")]
    Length {
        /// Name of the device.
        device: Arc<str>,
        /// Where.
        pa: Pa,
        /// Bytes.
        len: u64,
    },
    /// No free I/O virtual addresses, or what was unmapped was not allocated like that.
    #[error("{device}: {error}")]
    Iova {
        /// Name of the device.
        device: Arc<str>,
        /// How many, up to where, and what there is.
        error: IovaError,
    },
    /// The device cannot drive the address, and no IOMMU helps.
    #[error(
        "{device}: {pa:#x}+{len:#x} is beyond the {bits} address bits of the device, and no IOMMU translates"
    )]
    BeyondMask {
        /// Name of the device.
        device: Arc<str>,
        /// Where.
        pa: Pa,
        /// Bytes.
        len: u64,
        /// Address bits.
        bits: u8,
    },
    /// With so few bits, the device reaches nothing.
    #[error("{device}: with {bits} address bits the device reaches nothing at or above {first:#x}")]
    Mask {
        /// Name of the device.
        device: Arc<str>,
        /// Address bits.
        bits: u8,
        /// First address that can be handed out.
        first: u64,
    },
    /// No memory for a coherent buffer.
    #[error("{device}: no memory for {len:#x} bytes")]
    NoMemory {
        /// Name of the device.
        device: Arc<str>,
        /// Bytes.
        len: u64,
    },
    /// The bounce buffers are used up.
    #[error("{device}: no room for {len:#x} bytes to bounce: {used:#x} of {limit:#x} are in use")]
    BounceFull {
        /// Name of the device.
        device: Arc<str>,
        /// Bytes asked for, in whole pages.
        len: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes there may be.
        limit: u64,
    },
    /// The domain did not map.
    #[error("{device}: mapping {iova:#x} to {pa:#x}+{len:#x}: {error}")]
    Map {
        /// Name of the device.
        device: Arc<str>,
        /// The address it was to get.
        iova: Iova,
        /// Where.
        pa: Pa,
        /// Bytes.
        len: u64,
        /// Why.
        error: IommuError,
    },
    /// The domain did not unmap, or the TLB did not confirm: the device may still reach the memory, which must not be
    /// used for anything else. The address is not handed out again.
    #[error("{device}: unmapping {iova:#x}+{len:#x}: {error}; the device may still reach the memory")]
    Unmap {
        /// Name of the device.
        device: Arc<str>,
        /// The address.
        iova: Iova,
        /// Bytes.
        len: u64,
        /// Why.
        error: IommuError,
    },
    /// Nothing is mapped there.
    #[error("{device}: nothing is mapped at {iova:#x}+{len:#x}")]
    NotMapped {
        /// Name of the device.
        device: Arc<str>,
        /// The address.
        iova: Iova,
        /// Bytes.
        len: u64,
    },
    /// The debug mode knows that something of another kind is mapped there.
    #[error("{device}: {iova:#x} is {mapped}, which is not what the call is for")]
    OtherKind {
        /// Name of the device.
        device: Arc<str>,
        /// The address.
        iova: Iova,
        /// What it is.
        mapped: MappingKind,
    },
    /// A CPU's part belongs to another space.
    #[error("{device}: the device is not in this address space")]
    OtherSpace {
        /// Name of the device.
        device: Arc<str>,
    },
    /// Outside of a coherent buffer.
    #[error("{device}: {offset:#x}+{len:#x} is outside of a coherent buffer of {size:#x} bytes")]
    Bounds {
        /// Name of the device.
        device: Arc<str>,
        /// Where in the buffer.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// A flush of the TLB failed. The space is strict from now on, and what waited for the flush stays out of use.
    #[error("flushing the TLB: {0}")]
    Flush(IommuError),
}
