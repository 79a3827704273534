//! Memory that device and CPU see alike: [`Coherent`].

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use portcullis_arch::{Iova, Pa};
use portcullis_hal::{Block, DmaMemory};

use super::device::{Inner, bytes};
use super::single::Place;
use super::space::Part;
use super::{Direction, DmaAttrs, DmaError, MappingKind};

/// Pages of memory without an IOMMU.
const PAGE: u64 = 0x1000;
/// Memory in pieces of this size or more is aligned to it, for a page table's blocks.
const BLOCK: u64 = 2 << 20;

/// Coherent memory (what Linux's `dma_alloc_coherent` gives): contiguous for the device, zeroed at first, and shared
/// without syncs. On a device that does not snoop, the accessors behave as uncached accesses do: each write reaches
/// memory before the call returns, each read comes from there. Dropping it takes it from the device first.
pub struct Coherent<M: DmaMemory + Clone> {
    device: Arc<Inner<M>>,
    iova: Iova,
    len: u64,
    /// In order; together at least `len` bytes.
    blocks: Vec<Block>,
    place: Place,
}

impl<M: DmaMemory + Clone> Coherent<M> {
    pub(super) fn alloc(device: &Arc<Inner<M>>, len: u64, at: Place) -> Result<Self, DmaError> {
        let page = device.space.as_ref().map_or(PAGE, |space| space.granule);
        let size = len.checked_next_multiple_of(page).filter(|_| len > 0);
        let size = size.ok_or_else(|| device.no_buffer(Pa(0), len))?;
        let mut buffer = Self { device: device.clone(), iova: Iova(0), len, blocks: Vec::new(), place: at };
        buffer.gather(size, page)?;
        for block in &buffer.blocks {
            // The zeroes.
            device.clean(block.pa, block.len as u64);
        }
        if let Err(error) = buffer.expose(size) {
            buffer.free_blocks();
            return Err(error);
        }
        if let Some(ledger) = &device.ledger {
            ledger.mapped(MappingKind::Coherent, buffer.iova, len, None, &[], at);
        }
        Ok(buffer)
    }

    /// Gets memory: in one piece, or behind an IOMMU in ever smaller ones (Linux `__iommu_dma_alloc_pages`).
    fn gather(&mut self, size: u64, page: u64) -> Result<(), DmaError> {
        let mut piece = size;
        let mut there = 0;
        while there < size {
            let want = piece.min(size - there);
            let align = if want >= BLOCK { BLOCK.max(page) } else { page };
            if let Some(block) = self.device.memory.alloc(bytes(want), bytes(align)) {
                self.blocks.push(block);
                there += want;
                continue;
            }
            piece = (want / 2).next_multiple_of(page);
            if self.device.space.is_none() || want <= page {
                self.free_blocks();
                return Err(DmaError::NoMemory { device: self.device.name.clone(), len: size });
            }
        }
        Ok(())
    }

    /// Makes the memory reachable.
    fn expose(&mut self, size: u64) -> Result<(), DmaError> {
        let device = self.device.clone();
        let Some(mut part) = device.part() else {
            for block in &self.blocks {
                let bits = device.coherent_mask_bits();
                self.iova = device.direct_address(block.pa, block.len as u64, bits)?;
            }
            return Ok(());
        };
        let base = device.addresses(&mut part, size, device.coherent_limit())?;
        let prot = device.prot(Direction::Bidirectional, DmaAttrs::NONE);
        let mut done = 0;
        let failure = self.blocks.iter().find_map(|block| {
            let (iova, len) = (base.wrapping_add(done), block.len as u64);
            let error = part.space().domain.map(iova, block.pa, len, prot).err();
            done += if error.is_none() { len } else { 0 };
            let device = device.name.clone();
            error.map(|error| DmaError::Map { device, iova, pa: block.pa, len, error })
        });
        if let Some(error) = failure {
            if done == 0 {
                let _taken_back = part.free(base, size);
            } else if part.release(base, size, true).is_err() {
                // The device may know the first pieces.
                self.keep();
            }
            return Err(error);
        }
        self.iova = base;
        Ok(())
    }

    /// The address for the device.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Bytes, as asked for.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: there is no coherent memory of 0 bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Where in memory an offset is. For a CPU mapping of one's own, which must be uncached on a device that does not
    /// snoop.
    pub fn pa(&self, offset: u64) -> Option<Pa> {
        if offset >= self.len {
            return None;
        }
        let mut left = offset;
        for block in &self.blocks {
            if left < block.len as u64 {
                return Some(block.pa.wrapping_add(left));
            }
            left -= block.len as u64;
        }
        None
    }

    /// Copies bytes out.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), DmaError> {
        self.check(offset, buffer.len() as u64)?;
        let mut rest = buffer;
        self.pieces(offset, rest.len() as u64, |pa, len| {
            let (now, later) = core::mem::take(&mut rest).split_at_mut(len);
            self.device.invalidate(pa, len as u64);
            self.device.memory.read(pa, now);
            rest = later;
        });
        Ok(())
    }

    /// Copies bytes in. They are visible to the device when this returns.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), DmaError> {
        self.check(offset, data.len() as u64)?;
        let mut rest = data;
        self.pieces(offset, rest.len() as u64, |pa, len| {
            let (now, later) = rest.split_at(len);
            self.refresh(pa, len as u64);
            self.device.memory.write(pa, now);
            self.device.clean(pa, len as u64);
            rest = later;
        });
        Ok(())
    }

    /// Sets bytes.
    pub fn fill(&self, offset: u64, len: u64, value: u8) -> Result<(), DmaError> {
        self.check(offset, len)?;
        let line = [value; 256];
        let mut done = 0;
        while done < len {
            let chunk = (len - done).min(line.len() as u64);
            self.write(offset + done, line.get(..chunk as usize).unwrap_or_default())?;
            done += chunk;
        }
        Ok(())
    }

    /// A little-endian 32-bit word, as in a descriptor.
    pub fn read32(&self, offset: u64) -> Result<u32, DmaError> {
        let mut word = [0; 4];
        self.read(offset, &mut word)?;
        Ok(u32::from_le_bytes(word))
    }

    /// Writes a little-endian 32-bit word.
    pub fn write32(&self, offset: u64, value: u32) -> Result<(), DmaError> {
        self.write(offset, &value.to_le_bytes())
    }

    /// A little-endian 64-bit word.
    pub fn read64(&self, offset: u64) -> Result<u64, DmaError> {
        let mut word = [0; 8];
        self.read(offset, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes a little-endian 64-bit word.
    pub fn write64(&self, offset: u64, value: u64) -> Result<(), DmaError> {
        self.write(offset, &value.to_le_bytes())
    }

    /// Takes it from the device and frees it (Linux `dma_free_coherent`). After an error the memory is not freed: the
    /// device may still reach it.
    #[track_caller]
    pub fn free(mut self) -> Result<(), DmaError> {
        let at = core::panic::Location::caller();
        self.release(at)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DmaError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(DmaError::Bounds { device: self.device.name.clone(), offset, len, size: self.len }),
        }
    }

    /// What else is in the cache lines of a write is the device's as well, and must not be written back stale.
    fn refresh(&self, pa: Pa, len: u64) {
        self.device.invalidate(pa, len);
    }

    /// The pieces of memory behind a range that has been checked.
    fn pieces(&self, offset: u64, len: u64, mut each: impl FnMut(Pa, usize)) {
        let (mut skip, mut left) = (offset, len);
        for block in &self.blocks {
            let size = block.len as u64;
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = (size - skip).min(left);
            if here == 0 {
                return;
            }
            each(block.pa.wrapping_add(skip), here as usize);
            (skip, left) = (0, left - here);
        }
    }

    fn release(&mut self, at: Place) -> Result<(), DmaError> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        if let Some(ledger) = &self.device.ledger {
            // It was mapped, or the blocks would be gone.
            let _noted = ledger.unmapped(MappingKind::Coherent, self.iova, self.len, None, at);
        }
        let device = self.device.clone();
        // At once: the memory is freed.
        match device.displace(device.part().as_mut(), self.iova, self.len, true) {
            Ok(()) => {
                self.free_blocks();
                Ok(())
            }
            Err(error) => {
                self.keep();
                Err(error)
            }
        }
    }

    fn free_blocks(&mut self) {
        for block in self.blocks.drain(..) {
            self.device.memory.free(block);
        }
    }

    fn keep(&mut self) {
        let kept = self.blocks.drain(..).map(|block| block.len as u64).sum();
        self.device.kept.fetch_add(kept, Ordering::Relaxed);
    }
}

impl<M: DmaMemory + Clone> Drop for Coherent<M> {
    fn drop(&mut self) {
        let _kept_and_counted = self.release(self.place);
    }
}

impl<M: DmaMemory + Clone> fmt::Debug for Coherent<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Coherent").field("iova", &self.iova).field("len", &self.len).finish_non_exhaustive()
    }
}
