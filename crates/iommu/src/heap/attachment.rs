//! A device at a buffer.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_hal::DmaMemory;
use spin::Mutex;

use super::{DmaBuf, HeapError};
use crate::dma::{Direction, DmaAttrs, DmaDevice, Mode, SgEntry, SgMapping, SgSegment};

/// What the buffer knows of an attachment.
pub(super) struct Attached<M: DmaMemory + Clone + 'static> {
    device: DmaDevice<M>,
    /// Its own list: the DMA API may change one while another device uses the buffer.
    pieces: Vec<SgEntry>,
    mapping: Mutex<Option<(SgMapping, Direction)>>,
}

impl<M: DmaMemory + Clone + 'static> Attached<M> {
    pub fn new(device: DmaDevice<M>, pieces: Vec<SgEntry>) -> Self {
        Self { device, pieces, mapping: Mutex::new(None) }
    }

    /// Lends the buffer to the CPU or gives it back, if it is mapped.
    pub fn sync(&self, for_cpu: bool) -> Result<(), HeapError> {
        match &*self.mapping.lock() {
            Some((mapping, direction)) if for_cpu => self.device.sync_sg_for_cpu(mapping, *direction)?,
            Some((mapping, direction)) => self.device.sync_sg_for_device(mapping, *direction)?,
            None => {}
        }
        Ok(())
    }
}

/// A device attached to a buffer (Linux `struct dma_buf_attachment`), from [`DmaBuf::attach`]. It holds a reference to the
/// buffer. Dropping it unmaps and detaches.
pub struct Attachment<M: DmaMemory + Clone + 'static> {
    buffer: DmaBuf<M>,
    attached: Arc<Attached<M>>,
}

impl<M: DmaMemory + Clone + 'static> Attachment<M> {
    pub(super) fn new(buffer: DmaBuf<M>, attached: Arc<Attached<M>>) -> Self {
        Self { buffer, attached }
    }

    /// The buffer.
    pub fn buffer(&self) -> &DmaBuf<M> {
        &self.buffer
    }
    /// The device.
    pub fn device(&self) -> &DmaDevice<M> {
        &self.attached.device
    }

    /// Makes the buffer reachable for the device (Linux `dma_buf_map_attachment`): what to tell it, in order. Behind an IOMMU the
    /// pieces of a scattered buffer are one range of addresses, and as few segments as the device's limits allow.
    pub fn map(&self, direction: Direction) -> Result<Vec<SgSegment>, HeapError> {
        let mut mapping = self.attached.mapping.lock();
        if mapping.is_some() {
            return Err(HeapError::Mapped { device: self.device().name().into() });
        }
        let mapped = self.device().map_sg(&self.attached.pieces, direction, DmaAttrs::NONE)?;
        let segments = mapped.segments().to_vec();
        *mapping = Some((mapped, direction));
        Ok(segments)
    }

    /// What [`map`](Self::map) gave, while it is mapped.
    pub fn segments(&self) -> Option<Vec<SgSegment>> {
        self.attached.mapping.lock().as_ref().map(|(mapping, _)| mapping.segments().to_vec())
    }

    /// Takes it back (Linux `dma_buf_unmap_attachment`). After an error of the DMA API the device may still reach the memory; then
    /// the buffer is never reused.
    pub fn unmap(&self) -> Result<(), HeapError> {
        let mapping = self.attached.mapping.lock().take();
        let Some((mapping, direction)) = mapping else {
            return Err(HeapError::NotMapped { device: self.device().name().into() });
        };
        // Before the unmap: whoever frees the buffer after it has to know.
        if let Some(space) = self.device().space().filter(|space| space.mode() == Mode::Lazy) {
            self.buffer.owed_by(space);
        }
        self.device().unmap_sg(mapping, direction, DmaAttrs::NONE).inspect_err(|_| self.buffer.keep())?;
        Ok(())
    }
}

impl<M: DmaMemory + Clone + 'static> Drop for Attachment<M> {
    fn drop(&mut self) {
        if self.attached.mapping.lock().is_some() {
            // A failure keeps the buffer's memory, which is all that can be done.
            let _kept = self.unmap();
        }
    }
}

impl<M: DmaMemory + Clone + 'static> fmt::Debug for Attachment<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("device", &self.device().name())
            .field("buffer", &self.buffer)
            .field("segments", &self.segments())
            .finish()
    }
}
