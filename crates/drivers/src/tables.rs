//! Memory for page tables that hardware walks: [`TableMemory`].
//!
//! Freed tables are the dangerous moment of an IOMMU driver: hardware that still walks one walks whatever is there
//! next. A [`TableMemory`] gives nothing back once [`TableGuard::keep`] was called, which a driver does when a TLB
//! invalidation did not complete. Memory is lost then, not other people's data.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use portcullis_arch::Pa;
use portcullis_hal::{Block, DmaMemory};

/// Says whether tables may still be freed. One per domain or address space.
#[derive(Debug, Default)]
pub struct TableGuard {
    keep: AtomicBool,
    kept: AtomicU64,
}

impl TableGuard {
    /// From now on no table is freed, because the hardware did not confirm that it stopped using them.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Release);
    }

    /// True after [`keep`](Self::keep).
    pub fn is_kept(&self) -> bool {
        self.keep.load(Ordering::Acquire)
    }

    /// Bytes of tables that were not freed.
    pub fn kept_bytes(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }
}

/// Who must know where tables are: for the tables of a nested stage 1, the stage 2 that their walk goes through.
pub trait TablePlace: Send + Sync {
    /// Makes a table reachable for the walker. `false`: not possible, the table cannot be used.
    fn place(&self, block: Block) -> bool;
    /// Takes it back. `false`: the hardware may still reach it, so it must not be freed.
    fn remove(&self, block: Block) -> bool;
}

/// Memory `M` with a guard over what is freed.
#[derive(Clone)]
pub struct TableMemory<M> {
    memory: M,
    guard: Arc<TableGuard>,
    place: Option<Arc<dyn TablePlace>>,
    /// Tables that are placed fill whole pages of this size: nothing else may become reachable with them.
    unit: usize,
}

impl<M: DmaMemory> TableMemory<M> {
    /// Tables that the walker reaches at their physical addresses.
    pub fn new(memory: M, guard: Arc<TableGuard>) -> Self {
        Self { memory, guard, place: None, unit: 1 }
    }

    /// Tables that have to be placed first, in whole pages of `unit` bytes (a power of two).
    pub fn placed(memory: M, guard: Arc<TableGuard>, place: Arc<dyn TablePlace>, unit: usize) -> Self {
        Self { memory, guard, place: Some(place), unit }
    }
}

impl<M: DmaMemory> DmaMemory for TableMemory<M> {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        let Some(place) = &self.place else { return self.memory.alloc(len, align) };
        let block = self.memory.alloc(len.max(self.unit), align.max(self.unit))?;
        if place.place(block) {
            return Some(block);
        }
        self.memory.free(block);
        None
    }

    fn free(&self, block: Block) {
        let (block, reachable) = match &self.place {
            Some(place) => {
                let block = Block { pa: block.pa, len: block.len.max(self.unit) };
                (block, !place.remove(block))
            }
            None => (block, false),
        };
        if reachable || self.guard.is_kept() {
            self.guard.kept.fetch_add(block.len as u64, Ordering::Relaxed);
        } else {
            self.memory.free(block);
        }
    }

    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.memory.load64(pa)
    }
    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        self.memory.store64(pa, value);
    }
    #[inline]
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.memory.cas64(pa, expected, new)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.memory.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.memory.write(pa, buf);
    }
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        self.memory.load_run(pa, words);
    }
    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        self.memory.store_run(pa, count, first, step);
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.memory.clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.memory.invalidate(pa, len);
    }
    #[inline]
    fn wmb(&self) {
        self.memory.wmb();
    }
}
