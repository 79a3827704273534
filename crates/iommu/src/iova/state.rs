//! What every range is at the moment, a byte for each page, kept at the range's first page: with it a range is given back once,
//! and with the size it was allocated with.
//!
//! Bytes are loaded and stored, never changed by a read-modify-write: this is on the path of a cached allocation. So of two frees
//! of one range at the very same time both may be taken; the second copy is then thrown away where it leaves the caches.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::array;
use core::sync::atomic::{AtomicU8, Ordering};

use super::magazine::ORDERS;

/// No range starts at the page, or a free one that is in no cache.
pub(super) const NONE: u8 = 0;
const LIVE: u8 = 0x80;
const CACHED: u8 = 0x40;
/// Allocated, and too large for the caches: the number of pages follows, [`DIGIT`] bits in each of the next bytes, which belong to
/// no other range and mean nothing by themselves.
const LIVE_LARGE: u8 = LIVE | 0x3f;
const DIGIT: u32 = 6;
const DIGITS: u32 = 9;

/// Allocated with 2^order pages.
pub(super) fn live(order: usize) -> u8 {
    LIVE | order as u8
}

/// In a magazine, with 2^order pages.
pub(super) fn cached(order: usize) -> u8 {
    CACHED | order as u8
}

/// True if a range in a magazine starts there.
pub(super) fn is_cached(state: u8) -> bool {
    state & CACHED != 0
}

/// log2 of the pages that one chunk covers (4 KiB of bytes for 16 MiB of 4 KiB pages).
const CHUNK: u32 = 12;

/// The states of an aligned run of pages.
pub(super) struct Chunk([AtomicU8; 1 << CHUNK]);

impl Chunk {
    #[inline]
    pub fn get(&self, page: u64) -> u8 {
        self.0[(page % (1 << CHUNK)) as usize].load(Ordering::Relaxed)
    }
    #[inline]
    pub fn set(&self, page: u64, state: u8) {
        self.0[(page % (1 << CHUNK)) as usize].store(state, Ordering::Relaxed);
    }

    /// Marks an allocated range. A large one is aligned to more pages than it has digits, so they are in this chunk.
    pub fn set_live(&self, page: u64, pages: u64) {
        if pages.is_power_of_two() && pages < 1 << ORDERS {
            return self.set(page, live(pages.trailing_zeros() as usize));
        }
        self.set(page, LIVE_LARGE);
        for i in 0..DIGITS {
            self.set(page + 1 + u64::from(i), (pages >> (i * DIGIT)) as u8 & ((1 << DIGIT) - 1));
        }
    }

    /// Pages of the allocated range that starts at a page.
    pub fn live_pages(&self, page: u64) -> Option<u64> {
        match self.get(page) {
            LIVE_LARGE => {
                let digit = |i| u64::from(self.get(page + 1 + u64::from(i))) << (i * DIGIT);
                Some((0..DIGITS).map(digit).sum())
            }
            state if state & LIVE != 0 => Some(1 << (state & 0x3f)),
            _ => None,
        }
    }
}

/// All chunks of a space, made when something is first allocated in them, and kept.
pub(super) struct States(BTreeMap<u64, Arc<Chunk>>);

impl States {
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }
    pub fn find(&self, page: u64) -> Option<&Arc<Chunk>> {
        self.0.get(&(page >> CHUNK))
    }
    pub fn make(&mut self, page: u64) -> &Arc<Chunk> {
        let make = || Arc::new(Chunk(array::from_fn(|_| AtomicU8::new(NONE))));
        self.0.entry(page >> CHUNK).or_insert_with(make)
    }
}

/// Chunks a CPU looked at lately.
const KEPT: usize = 64;

/// A CPU's way to chunks without the lock around [`States`].
pub(super) struct ChunkCache(Vec<Option<(u64, Arc<Chunk>)>>);

impl ChunkCache {
    pub fn new() -> Self {
        Self(alloc::vec![None; KEPT])
    }

    /// The chunk of a page, asked from `states` if it was not seen lately.
    #[inline]
    pub fn get(&mut self, page: u64, states: impl FnOnce() -> Option<Arc<Chunk>>) -> Option<&Chunk> {
        let number = page >> CHUNK;
        // The remainder is below the length.
        let kept = &mut self.0[(number % KEPT as u64) as usize];
        if !matches!(kept, Some((held, _)) if *held == number) {
            *kept = Some((number, states()?));
        }
        kept.as_ref().map(|(_, chunk)| &**chunk)
    }
}
