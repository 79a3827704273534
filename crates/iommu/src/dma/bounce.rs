//! Bounce buffers (Linux swiotlb): memory of our own that the device gets in place of the driver's.
//!
//! Two reasons. An IOMMU protects whole pages, so an untrusted device that is given a part of a page is given a page of
//! its own that holds nothing else. And a device that does not snoop and writes a part of a cache line would lose to,
//! or destroy, what the CPU has in the rest of the line (Linux: `dma_kmalloc_needs_bounce`).
//!
//! A slot keeps the buffer's offset in the page, is zeroed around the buffer, and holds a copy of the buffer even if the
//! device only writes: what it leaves out keeps the old contents after the copy back, and no stale memory gets out.

use alloc::collections::BTreeMap;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use portcullis_arch::{Iova, Pa};
use portcullis_hal::{Block, DmaMemory};
use spin::Mutex;

use super::device::{Inner, bytes};
use super::space::Part;
use super::{Direction, DmaAttrs, DmaError};

/// Bytes of a cache line (Linux `ARCH_DMA_MINALIGN` is twice that at most).
const LINE: u64 = 64;
/// Bytes of a page where no IOMMU says so.
const PAGE: u64 = 0x1000;

/// A buffer that bounces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    block: Block,
    /// The driver's buffer.
    original: Pa,
    len: u64,
    /// The copy in the block.
    copy: Pa,
}

/// A range that begins in a buffer and ends behind it.
#[derive(Debug)]
pub(super) struct Overrun;

/// A device's bounce buffers.
pub(super) struct BouncePool {
    limit: u64,
    used: AtomicU64,
    count: AtomicUsize,
    /// By the address that the device uses.
    slots: Mutex<BTreeMap<u64, Slot>>,
}

impl BouncePool {
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            used: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            slots: Mutex::new(BTreeMap::new()),
        }
    }

    /// Whether anything bounces now.
    #[inline]
    pub fn in_use(&self) -> bool {
        self.count.load(Ordering::Relaxed) != 0
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn reserve(&self, size: u64) -> bool {
        let grow = |used: u64| used.checked_add(size).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).is_ok()
    }

    fn release(&self, size: u64) {
        self.used.fetch_sub(size, Ordering::Relaxed);
    }

    fn insert(&self, iova: Iova, slot: Slot) {
        self.slots.lock().insert(iova.get(), slot);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The slot that a mapping begins with; it is not in the pool any more.
    pub fn take(&self, iova: Iova) -> Option<Slot> {
        let slot = self.slots.lock().remove(&iova.get())?;
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(slot)
    }

    /// The driver's memory and the copy behind a part of a mapping; `None` if it does not bounce.
    pub fn find(&self, iova: Iova, len: u64) -> Result<Option<(Pa, Pa)>, Overrun> {
        if !self.in_use() {
            return Ok(None);
        }
        let slots = self.slots.lock();
        let below = slots.range(..=iova.get()).next_back();
        let Some((offset, slot)) =
            below.map(|(start, slot)| (iova.get() - start, slot)).filter(|(offset, slot)| *offset < slot.len)
        else {
            return Ok(None);
        };
        match offset.checked_add(len) {
            Some(end) if end <= slot.len => {
                Ok(Some((slot.original.wrapping_add(offset), slot.copy.wrapping_add(offset))))
            }
            _ => Err(Overrun),
        }
    }
}

impl<M: DmaMemory + Clone> Inner<M> {
    fn page(&self) -> u64 {
        self.space.as_ref().map_or(PAGE, |space| space.granule)
    }

    /// Whether a buffer must not be given to the device as it is.
    #[inline]
    pub fn must_bounce(&self, pa: Pa, len: u64, direction: Direction) -> bool {
        let ends = pa.get() | len;
        (!self.config.coherent && direction.device_writes() && ends & (LINE - 1) != 0)
            || (self.config.untrusted && self.space.is_some() && ends & (self.page() - 1) != 0)
    }

    pub fn map_bounced(
        &self,
        part: Option<&mut impl Part>,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<Iova, DmaError> {
        let page = self.page();
        let offset = pa.get() & (page - 1);
        let size = offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(page));
        let size = size.ok_or_else(|| self.no_buffer(pa, len))?;
        let full = || DmaError::BounceFull {
            device: self.name.clone(),
            len: size,
            used: self.bounce.used(),
            limit: self.bounce.limit,
        };
        if !self.bounce.reserve(size) {
            return Err(full());
        }
        // The memory comes zeroed, and so is what lies around the copy.
        let Some(block) = self.memory.alloc(bytes(size), bytes(page)) else {
            self.bounce.release(size);
            return Err(DmaError::NoMemory { device: self.name.clone(), len: size });
        };
        let slot = Slot { block, original: pa, len, copy: block.pa.wrapping_add(offset) };
        if !attrs.skip_cpu_sync {
            self.copy(pa, slot.copy, len);
        }
        self.clean(block.pa, size);
        match self.place(part, slot.copy, len, self.prot(direction, attrs)) {
            Ok(iova) => {
                self.bounce.insert(iova, slot);
                Ok(iova)
            }
            Err(error) => {
                self.discard(slot);
                Err(error)
            }
        }
    }

    /// Takes a slot out of the device's reach, at once, and copies back what it wrote.
    pub fn unmap_bounced(
        &self,
        part: Option<&mut impl Part>,
        slot: Slot,
        iova: Iova,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(), DmaError> {
        // Strict even in a lazy space: the memory is used again at once.
        if let Err(error) = self.displace(part, iova, slot.len, true) {
            self.kept.fetch_add(slot.block.len as u64, Ordering::Relaxed);
            return Err(error);
        }
        if direction.device_writes() && !attrs.skip_cpu_sync {
            self.invalidate(slot.copy, slot.len);
            self.copy(slot.copy, slot.original, slot.len);
        }
        self.discard(slot);
        Ok(())
    }

    fn discard(&self, slot: Slot) {
        self.memory.free(slot.block);
        self.bounce.release(slot.block.len as u64);
    }

    /// The CPU copies.
    pub fn copy(&self, from: Pa, to: Pa, len: u64) {
        let mut buffer = [0; 512];
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(buffer.len() as u64);
            let Some(buffer) = buffer.get_mut(..chunk as usize) else { return };
            self.memory.read(from.wrapping_add(done), buffer);
            self.memory.write(to.wrapping_add(done), buffer);
            done += chunk;
        }
    }
}
