//! Heaps that hand out contiguous runs of a region: the CMA heap and the carveout heap.

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_hal::{Block, DmaMemory};
use spin::Mutex;

use super::buffer::{Counters, Source, zero};
use super::{DmaBuf, HEAP_PAGE, Heap, HeapError, HeapUsage, whole_pages};
use crate::dma::SgEntry;

/// Runs are aligned to the next power of two of their size, up to this (Linux `CONFIG_CMA_ALIGNMENT` 8: 1 MiB).
const CMA_ALIGN: u64 = HEAP_PAGE << 8;

/// A region, and what is free in it.
struct Region<M: DmaMemory + Clone + 'static> {
    memory: M,
    /// Free ranges, sorted and apart: first address, and the address behind the last.
    free: Mutex<Vec<(u64, u64)>>,
    counters: Counters,
    /// Goes back to the platform with the heap and its last buffer.
    block: Option<Block>,
}

impl<M: DmaMemory + Clone + 'static> Region<M> {
    fn new(memory: M, start: u64, end: u64, block: Option<Block>) -> Arc<Self> {
        let free = Mutex::new(Vec::from([(start, end)]));
        Arc::new(Self { memory, free, counters: Counters::default(), block })
    }

    /// The lowest run with room. An alignment that leaves no room leaves the gap alone.
    fn take(&self, len: u64, align: u64) -> Option<u64> {
        let mut free = self.free.lock();
        let (i, at) = free.iter().enumerate().find_map(|(i, &(start, end))| {
            let at = start.checked_next_multiple_of(align)?;
            (at.checked_add(len)? <= end).then_some((i, at))
        })?;
        let (start, end) = free.remove(i);
        let rest = [(at + len, end), (start, at)];
        rest.into_iter().filter(|(a, b)| a < b).for_each(|gap| free.insert(i, gap));
        Some(at)
    }

    fn largest(&self) -> u64 {
        self.free.lock().iter().map(|(start, end)| end - start).max().unwrap_or(0)
    }

    fn alloc(self: &Arc<Self>, name: &Arc<str>, len: u64, align: u64) -> Result<DmaBuf<M>, HeapError> {
        let len = whole_pages(name, len)?;
        let align = align.min(len.checked_next_power_of_two().unwrap_or(align));
        let taken = self.take(len, align);
        let none = || HeapError::NoMemory { heap: name.clone(), len, largest: self.largest() };
        let piece = SgEntry { pa: Pa(taken.ok_or_else(none)?), len };
        zero(&self.memory, piece);
        Ok(DmaBuf::new(name, self.memory.clone(), self.clone(), Vec::from([piece])))
    }
}

impl<M: DmaMemory + Clone + 'static> Source for Region<M> {
    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn reclaim(&self, pieces: &[SgEntry]) {
        let mut free = self.free.lock();
        for piece in pieces {
            let (mut start, mut end) = (piece.pa.get(), piece.pa.get() + piece.len);
            free.retain(|&(a, b)| {
                let joins = b == start || a == end;
                if joins {
                    (start, end) = (start.min(a), end.max(b));
                }
                !joins
            });
            let place = free.partition_point(|&(a, _)| a < start);
            free.insert(place, (start, end));
        }
    }
}

impl<M: DmaMemory + Clone + 'static> Drop for Region<M> {
    fn drop(&mut self) {
        if let Some(block) = self.block
            && self.counters.usage().kept == 0
        {
            self.memory.free(block);
        }
    }
}

/// One contiguous run per buffer, from an area that was set aside at start (Linux `cma_heap.c`): for devices without an IOMMU
/// that cannot follow a list.
pub struct CmaHeap<M: DmaMemory + Clone + 'static> {
    name: Arc<str>,
    region: Arc<Region<M>>,
}

impl<M: DmaMemory + Clone + 'static> CmaHeap<M> {
    /// Sets `len` bytes of the platform's memory aside, rounded up to whole pages. `name` is the area's, as `linux,cma`.
    pub fn new(name: &str, memory: M, len: u64) -> Result<Self, HeapError> {
        let len = whole_pages(name, len)?;
        let align = CMA_ALIGN.min(len.checked_next_power_of_two().unwrap_or(CMA_ALIGN));
        let none = || HeapError::NoMemory { heap: name.into(), len, largest: 0 };
        // Whole pages fit the CPU's lengths.
        let block = memory.alloc(len as usize, align as usize).ok_or_else(none)?;
        let start = block.pa.get();
        Ok(Self { name: name.into(), region: Region::new(memory, start, start + len, Some(block)) })
    }
}

impl<M: DmaMemory + Clone + 'static> CmaHeap<M> {
    /// Over the whole pages of an area that was set aside when the platform started (`shared-dma-pool` with `reusable`), which
    /// `memory` can access and does not hand out.
    pub fn over(name: &str, memory: M, start: Pa, len: u64) -> Result<Self, HeapError> {
        let (first, end) = pages_of(name, start, len)?;
        Ok(Self { name: name.into(), region: Region::new(memory, first, end, None) })
    }
}

/// First address and end of the whole pages of a region.
fn pages_of(heap: &str, start: Pa, len: u64) -> Result<(u64, u64), HeapError> {
    let bad = || HeapError::Region { heap: heap.into(), start: start.get(), len };
    let first = start.get().checked_next_multiple_of(HEAP_PAGE).ok_or_else(bad)?;
    let end = start.checked_add(len).ok_or_else(bad)?.get() / HEAP_PAGE * HEAP_PAGE;
    if first < end { Ok((first, end)) } else { Err(bad()) }
}

impl<M: DmaMemory + Clone + 'static> Heap<M> for CmaHeap<M> {
    fn name(&self) -> &str {
        &self.name
    }
    fn alloc(&self, len: u64) -> Result<DmaBuf<M>, HeapError> {
        self.region.alloc(&self.name, len, CMA_ALIGN)
    }
    fn usage(&self) -> HeapUsage {
        self.region.counters.usage()
    }
}

/// One contiguous run per buffer, from a region that firmware reserved (`reserved-memory` without `reusable`), which the platform
/// itself does not use. Aligned to pages.
pub struct CarveoutHeap<M: DmaMemory + Clone + 'static> {
    name: Arc<str>,
    region: Arc<Region<M>>,
}

impl<M: DmaMemory + Clone + 'static> CarveoutHeap<M> {
    /// Over the whole pages of `[start, start + len)`, which `memory` can access and does not hand out.
    pub fn new(name: &str, memory: M, start: Pa, len: u64) -> Result<Self, HeapError> {
        let (first, end) = pages_of(name, start, len)?;
        Ok(Self { name: name.into(), region: Region::new(memory, first, end, None) })
    }
}

impl<M: DmaMemory + Clone + 'static> Heap<M> for CarveoutHeap<M> {
    fn name(&self) -> &str {
        &self.name
    }
    fn alloc(&self, len: u64) -> Result<DmaBuf<M>, HeapError> {
        self.region.alloc(&self.name, len, HEAP_PAGE)
    }
    fn usage(&self) -> HeapUsage {
        self.region.counters.usage()
    }
}
