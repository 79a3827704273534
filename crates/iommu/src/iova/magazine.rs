//! What one CPU keeps: per size a loaded and a previous magazine (Bonwick's magazines, as in Linux `iova_rcache`).

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::state::{self, Chunk, ChunkCache};

/// Sizes that are cached: 2^0 to 2^5 pages (Linux `IOVA_RANGE_CACHE_MAX_SIZE`).
pub(super) const ORDERS: usize = 6;

/// First pages of free ranges of one size; never more than the capacity.
pub(super) type Magazine = Vec<u64>;

struct Class {
    loaded: Magazine,
    previous: Magazine,
}

impl Class {
    fn pop(&mut self, last: u64) -> Option<u64> {
        if self.loaded.is_empty() {
            core::mem::swap(&mut self.loaded, &mut self.previous);
        }
        [&mut self.loaded, &mut self.previous].into_iter().find_map(|magazine| {
            // Almost always the first.
            let i = magazine.iter().rposition(|&page| page <= last)?;
            Some(magazine.swap_remove(i))
        })
    }
}

/// The magazines of a CPU.
pub(super) struct Cache {
    classes: [Class; ORDERS],
    chunks: ChunkCache,
    capacity: usize,
}

impl Cache {
    pub fn new(capacity: usize) -> Self {
        let class = |_| Class { loaded: Magazine::new(), previous: Magazine::new() };
        Self { classes: core::array::from_fn(class), chunks: ChunkCache::new(), capacity }
    }

    /// Allocates the newest range of the loaded magazine: almost every allocation. `None` says nothing but that the long way has to
    /// be taken.
    #[inline(always)]
    pub fn take_newest(&mut self, order: usize, last: u64) -> Option<u64> {
        let class = &mut self.classes[order];
        let &page = class.loaded.last()?;
        let chunk = self.chunks.seen(page)?;
        if page + ((1 << order) - 1) > last || chunk.get(page) != state::cached(order) {
            return None;
        }
        chunk.set(page, state::live(order));
        class.loaded.pop()
    }

    /// Frees a range into the loaded magazine: almost every free. False says nothing but that the long way has to be taken.
    #[inline(always)]
    pub fn put_newest(&mut self, order: usize, page: u64) -> bool {
        let class = &mut self.classes[order];
        if class.loaded.len() >= class.loaded.capacity().min(self.capacity) {
            return false;
        }
        match self.chunks.seen(page) {
            Some(chunk) if chunk.get(page) == state::live(order) => chunk.set(page, state::cached(order)),
            _ => return false,
        }
        class.loaded.push(page);
        true
    }

    /// The states around a page.
    pub fn chunk(&mut self, page: u64, states: impl FnOnce() -> Option<Arc<Chunk>>) -> Option<&Chunk> {
        self.chunks.get(page, states)
    }

    /// A range of 2^order pages that ends at or below page `last`.
    pub fn pop(&mut self, order: usize, last: u64) -> Option<u64> {
        let last = last.checked_sub((1 << order) - 1)?;
        let class = &mut self.classes[order];
        match class.loaded.last() {
            Some(&page) if page <= last => class.loaded.pop(),
            _ => class.pop(last),
        }
    }

    /// Keeps a range; a full magazine that has to leave for it is returned.
    pub fn push(&mut self, order: usize, page: u64) -> Option<Magazine> {
        let class = &mut self.classes[order];
        if class.loaded.len() < self.capacity {
            // Grows to its capacity at once.
            if class.loaded.capacity() == 0 {
                class.loaded.reserve_exact(self.capacity);
            }
            class.loaded.push(page);
            return None;
        }
        core::mem::swap(&mut class.loaded, &mut class.previous);
        let mut full = None;
        if class.loaded.len() == self.capacity {
            let empty = Magazine::with_capacity(self.capacity);
            full = Some(core::mem::replace(&mut class.loaded, empty));
        }
        class.loaded.push(page);
        full
    }

    /// True if there is nothing of a size.
    pub fn is_empty(&self, order: usize) -> bool {
        let class = &self.classes[order];
        class.loaded.is_empty() && class.previous.is_empty()
    }

    /// Puts a magazine of a size where there was nothing.
    pub fn load(&mut self, order: usize, magazine: Magazine) {
        self.classes[order].loaded = magazine;
    }

    /// Takes everything: (order, first pages).
    pub fn take(&mut self) -> Vec<(usize, Magazine)> {
        let mut all = Vec::new();
        for (order, class) in self.classes.iter_mut().enumerate() {
            let both = [&mut class.loaded, &mut class.previous];
            all.extend(both.map(|magazine| (order, core::mem::take(magazine))));
        }
        all.retain(|(_, magazine)| !magazine.is_empty());
        all
    }
}

/// The states of ranges that leave the caches for good. False for the second copy of a range that was freed twice at the same
/// time.
pub(super) fn leaves(chunk: &Chunk, order: usize, page: u64) -> bool {
    let right = chunk.get(page) == state::cached(order);
    if right {
        chunk.set(page, state::NONE);
    }
    right
}
