//! The operating system's page allocator on a board: a buddy allocator over one range of RAM.
//!
//! It gives out the lowest free block that fits, so that the same calls give the same addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use portcullis_arch::Pa;
use portcullis_hal::Block;

/// Smallest block: one cache line, so that no two blocks share a line.
const MIN_ORDER: u32 = 6;

/// A range of RAM that drivers allocate from.
pub struct Pool {
    base: u64,
    order: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Free blocks by order.
    free: BTreeMap<u32, BTreeSet<u64>>,
    /// Blocks given out: address to order.
    used: BTreeMap<u64, u32>,
}

impl Pool {
    /// A pool of the `1 << order` bytes at `base`, which must be a multiple of its size.
    pub fn new(base: Pa, order: u32) -> Self {
        let order = order.clamp(MIN_ORDER, 48);
        let mut state = State::default();
        state.free.entry(order).or_default().insert(base.get());
        Self { base: base.get(), order, state: Mutex::new(state) }
    }

    /// First address and size in bytes.
    pub fn range(&self) -> (Pa, u64) {
        (Pa(self.base), 1 << self.order)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a block, or `None` when there is no room.
    pub fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        let size = len.max(align).max(1 << MIN_ORDER).checked_next_power_of_two()?;
        let want = size.trailing_zeros();
        let mut s = self.lock();
        let (order, pa) = s
            .free
            .range(want..)
            .filter_map(|(o, blocks)| blocks.first().map(|b| (*o, *b)))
            .min_by_key(|(o, b)| (*b, *o))?;
        s.free.get_mut(&order)?.remove(&pa);
        for o in (want..order).rev() {
            s.free.entry(o).or_default().insert(pa + (1 << o));
        }
        s.used.insert(pa, want);
        Some(Block { pa: Pa(pa), len })
    }

    /// Gives a block back; false if it was not given out (or is free already), and then nothing happens.
    pub fn free(&self, block: Block) -> bool {
        let mut s = self.lock();
        let Some(mut order) = s.used.remove(&block.pa.get()) else { return false };
        let mut pa = block.pa.get();
        while order < self.order {
            let buddy = self.base + ((pa - self.base) ^ (1 << order));
            if !s.free.get_mut(&order).is_some_and(|f| f.remove(&buddy)) {
                break;
            }
            pa = pa.min(buddy);
            order += 1;
        }
        s.free.entry(order).or_default().insert(pa);
        true
    }

    /// Blocks given out and not yet back.
    pub fn outstanding(&self) -> usize {
        self.lock().used.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_distinct_and_come_back() {
        let pool = Pool::new(Pa(0x1000_0000), 20);
        let mut blocks = Vec::new();
        for (i, len) in [64usize, 4096, 100, 8192, 1, 65536, 4096].into_iter().enumerate() {
            let align = if i % 2 == 0 { 64 } else { 4096 };
            let b = pool.alloc(len, align).unwrap();
            assert!(b.pa.is_aligned(align as u64) && b.len == len);
            for o in &blocks {
                let (o, b): (&Block, &Block) = (o, &b);
                let apart =
                    o.pa.get() + o.len as u64 <= b.pa.get() || b.pa.get() + b.len as u64 <= o.pa.get();
                assert!(apart);
            }
            blocks.push(b);
        }
        assert_eq!(pool.outstanding(), 7);
        assert!(blocks.iter().all(|b| pool.free(*b)));
        assert!(!pool.free(blocks[0]), "twice");
        assert_eq!(pool.alloc(1 << 20, 4096).unwrap().pa, Pa(0x1000_0000), "all merged again");
        assert_eq!(pool.alloc(64, 64), None);
        assert_eq!(pool.alloc(usize::MAX, 64), None);
    }
}
