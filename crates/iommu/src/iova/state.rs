//! What every range is at the moment, kept at its first page: with it a range is given back once, and with the size it was
//! allocated with.
//!
//! States are loaded and stored, never changed by a read-modify-write: this is on the path of a cached allocation. So of two frees
//! of one range at the very same time both may be taken; the second copy is then thrown away where it leaves the caches.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::array;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::magazine::ORDERS;

/// No small range starts at the page, or a free one that is in no cache.
pub(super) const NONE: u8 = 0;
const LIVE: u8 = 0x80;
const CACHED: u8 = 0x40;

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

/// log2 of the pages that one chunk covers (4.5 KiB for 16 MiB of 4 KiB pages).
const CHUNK: u32 = 12;
/// Ranges that the caches do not take start at multiples of this.
const LARGE: u64 = 1 << ORDERS;

/// The states of an aligned run of pages. Aligned, so that the run of pages that an empty cache takes at once has cache lines of its
/// own: two CPUs that share one lose all scaling.
#[repr(align(128))]
pub(super) struct Chunk {
    /// Per page.
    small: [AtomicU8; 1 << CHUNK],
    /// Per place where a large range can start: its pages while it is allocated, else 0.
    large: [AtomicU64; (1 << CHUNK) / LARGE as usize],
}

impl Chunk {
    fn new() -> Self {
        Self { small: array::from_fn(|_| AtomicU8::new(NONE)), large: array::from_fn(|_| AtomicU64::new(0)) }
    }

    /// The state of a small range.
    #[inline(always)]
    pub fn get(&self, page: u64) -> u8 {
        self.small[(page % (1 << CHUNK)) as usize].load(Ordering::Relaxed)
    }
    #[inline(always)]
    pub fn set(&self, page: u64, state: u8) {
        self.small[(page % (1 << CHUNK)) as usize].store(state, Ordering::Relaxed);
    }

    #[inline]
    fn large(&self, page: u64) -> &AtomicU64 {
        &self.large[(page % (1 << CHUNK) / LARGE) as usize]
    }

    /// Marks an allocated range of any size.
    pub fn set_live(&self, page: u64, pages: u64) {
        match is_small(pages) {
            true => self.set(page, live(pages.trailing_zeros() as usize)),
            false => self.large(page).store(pages, Ordering::Relaxed),
        }
    }

    /// Unmarks it.
    pub fn set_free(&self, page: u64, pages: u64) {
        match is_small(pages) {
            true => self.set(page, NONE),
            false => self.large(page).store(0, Ordering::Relaxed),
        }
    }

    /// Pages of the allocated range that starts at a page.
    pub fn live_pages(&self, page: u64) -> Option<u64> {
        match self.get(page) {
            state if state & LIVE != 0 => Some(1 << (state & !LIVE)),
            _ if !page.is_multiple_of(LARGE) => None,
            _ => Some(self.large(page).load(Ordering::Relaxed)).filter(|pages| *pages != 0),
        }
    }
}

/// True for the sizes that the caches take. Others below [`LARGE`] pages are not asked for.
fn is_small(pages: u64) -> bool {
    pages < LARGE && pages.is_power_of_two()
}

/// All chunks of a space, made when something is first allocated in them, and kept: a hash table with open addressing, at most
/// half full. Neighbours have neighbouring places.
pub(super) struct States {
    places: Vec<Option<(u64, Arc<Chunk>)>>,
    used: usize,
}

impl States {
    pub fn new() -> Self {
        Self { places: alloc::vec![None; 8], used: 0 }
    }

    /// Where a chunk is, or would be.
    #[inline]
    fn place(&self, number: u64) -> usize {
        let mask = self.places.len() - 1;
        let mut i = number as usize & mask;
        while matches!(&self.places[i], Some((held, _)) if *held != number) {
            i = (i + 1) & mask;
        }
        i
    }

    #[inline]
    pub fn find(&self, page: u64) -> Option<&Arc<Chunk>> {
        self.places[self.place(page >> CHUNK)].as_ref().map(|(_, chunk)| chunk)
    }

    #[inline]
    pub fn make(&mut self, page: u64) -> &Arc<Chunk> {
        let number = page >> CHUNK;
        let mut place = self.place(number);
        if self.places[place].is_none() {
            self.used += 1;
            if 2 * self.used > self.places.len() {
                self.grow();
                place = self.place(number);
            }
        }
        &self.places[place].get_or_insert_with(|| (number, Arc::new(Chunk::new()))).1
    }

    #[cold]
    fn grow(&mut self) {
        let more = alloc::vec![None; 2 * self.places.len()];
        for chunk in core::mem::replace(&mut self.places, more).into_iter().flatten() {
            let place = self.place(chunk.0);
            self.places[place] = Some(chunk);
        }
    }
}

/// Chunks a CPU looked at lately.
const KEPT: usize = 64;

/// A CPU's way to chunks without the lock around [`States`].
pub(super) struct ChunkCache([Option<(u64, Arc<Chunk>)>; KEPT]);

impl ChunkCache {
    pub fn new() -> Self {
        Self(array::from_fn(|_| None))
    }

    /// The chunk of a page, if it was seen lately.
    #[inline(always)]
    pub fn seen(&self, page: u64) -> Option<&Chunk> {
        let number = page >> CHUNK;
        match &self.0[(number % KEPT as u64) as usize] {
            Some((held, chunk)) if *held == number => Some(chunk),
            _ => None,
        }
    }

    /// The chunk of a page, asked from `states` if it was not seen lately.
    pub fn get(&mut self, page: u64, states: impl FnOnce() -> Option<Arc<Chunk>>) -> Option<&Chunk> {
        if self.seen(page).is_none() {
            let number = page >> CHUNK;
            // The remainder is below the length.
            self.0[(number % KEPT as u64) as usize] = Some((number, states()?));
        }
        self.seen(page)
    }
}
