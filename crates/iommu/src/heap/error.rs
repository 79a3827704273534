//! What can go wrong with heaps and buffers.

use alloc::sync::Arc;

use super::Handle;
use crate::dma::DmaError;

/// A request to a heap, a buffer or a table of handles that was not fulfilled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeapError {
    /// No bytes, or more than there can be.
    #[error("heap {heap}: there are no buffers of {len:#x} bytes")]
    Length {
        /// Name of the heap.
        heap: Arc<str>,
        /// What was asked for.
        len: u64,
    },
    /// No memory.
    #[error("heap {heap}: no memory for {len:#x} bytes (the largest run that is free has {largest:#x})")]
    NoMemory {
        /// Name of the heap.
        heap: Arc<str>,
        /// Bytes asked for, in whole pages.
        len: u64,
        /// Bytes that could be had in one piece; 0 if the heap does not know.
        largest: u64,
    },
    /// A region for a heap that is empty, not of whole pages, or beyond the address space.
    #[error("heap {heap}: {start:#x}+{len:#x} is no region for a heap")]
    Region {
        /// Name of the heap.
        heap: Arc<str>,
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// Outside of a buffer.
    #[error("{offset:#x}+{len:#x} is outside of a buffer of {size:#x} bytes")]
    Bounds {
        /// Where in the buffer.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the buffer.
        size: u64,
    },
    /// The attachment is mapped already.
    #[error("{device}: the attachment is mapped already")]
    Mapped {
        /// Name of the device.
        device: Arc<str>,
    },
    /// The attachment is not mapped.
    #[error("{device}: the attachment is not mapped")]
    NotMapped {
        /// Name of the device.
        device: Arc<str>,
    },
    /// The DMA API refused.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The process has no such handle.
    #[error("process {process} has no handle {handle}")]
    BadHandle {
        /// Name of the process.
        process: Arc<str>,
        /// The number.
        handle: Handle,
    },
    /// The process has as many handles as it may.
    #[error("process {process} has {limit} handles, which is its limit")]
    TooManyHandles {
        /// Name of the process.
        process: Arc<str>,
        /// The limit.
        limit: usize,
    },
}
