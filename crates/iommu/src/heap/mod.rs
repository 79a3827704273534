//! dma-buf heaps: memory that several devices and several processes share (Linux `dma-buf`, `dma-heap`).
//!
//! A heap hands out a [`DmaBuf`], a zeroed buffer of whole pages. No IOMMU takes part in that: [`DmaBuf::attach`] brings a device
//! in, with a list of the pieces of its own, and [`Attachment::map`] gives that device an address through the
//! [DMA API](crate::dma). So a buffer has as many I/O virtual addresses as it has mapped attachments, and they are nobody else's
//! business. Between processes a [`HandleTable`] passes the buffer, never an address.
//!
//! | Heap | Memory | For a device without an IOMMU |
//! |---|---|---|
//! | [`SystemHeap`] | pieces of 1 MiB, 64 KiB and 4 KiB from anywhere, largest first | a list of pieces |
//! | [`CmaHeap`] | one contiguous run of an area set aside at start | one address |
//! | [`CarveoutHeap`] | one contiguous run of a region that firmware reserved | one address |
//!
//! # What a buffer guarantees
//!
//! * It is zeroed, for the CPU and for devices, so nothing of an earlier one is readable in it.
//! * It is freed with its last reference. Clones, handles and attachments each are one.
//! * Its memory is not reused as long as a device may reach it: where invalidation is lazy, freeing waits for a flush; where an unmap
//!   failed, the memory is kept for good and counted ([`HeapUsage::kept`]).
//! * The CPU's accesses belong between [`DmaBuf::begin_cpu_access`] and [`DmaBuf::end_cpu_access`], which sync every mapped
//!   attachment.

mod attachment;
mod buffer;
mod error;
mod handles;
mod region;
mod system;
#[cfg(test)]
mod tests;

pub use attachment::Attachment;
pub use buffer::DmaBuf;
pub use error::HeapError;
pub use handles::{Handle, HandleTable};
pub use region::{CarveoutHeap, CmaHeap};
pub use system::SystemHeap;

use portcullis_hal::DmaMemory;

/// Buffers are multiples of this, whatever the pages of an IOMMU are.
pub const HEAP_PAGE: u64 = 0x1000;

/// Where buffers come from. Behind `Arc<dyn Heap<M>>` a process finds it by its name (Linux `/dev/dma_heap/<name>`).
pub trait Heap<M: DmaMemory + Clone + 'static>: Send + Sync {
    /// Its name.
    fn name(&self) -> &str;
    /// A zeroed buffer of `len` bytes, rounded up to whole pages (Linux `DMA_HEAP_IOCTL_ALLOC`).
    fn alloc(&self, len: u64) -> Result<DmaBuf<M>, HeapError>;
    /// What is out.
    fn usage(&self) -> HeapUsage;
}

/// What a heap has given out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapUsage {
    /// Buffers.
    pub buffers: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes of buffers that are gone and cannot be reused, because a device may still reach them.
    pub kept: u64,
}

/// Bytes of whole pages.
fn whole_pages(heap: &str, len: u64) -> Result<u64, HeapError> {
    let size =
        len.checked_next_multiple_of(HEAP_PAGE).filter(|size| *size != 0 && usize::try_from(*size).is_ok());
    size.ok_or_else(|| HeapError::Length { heap: heap.into(), len })
}
