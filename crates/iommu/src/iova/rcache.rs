//! The tree, the caches over it, and the ways between them. Pages, not addresses; no policy.
//!
//! Locks: a CPU's slot, then a depot or the space; a depot and the space are never held together, nor two slots.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::magazine::{Cache, Magazine, ORDERS, leaves};
use super::state::{self, Chunk, States};
use super::sync::{Family, Lock, Word};
use super::tree::{AlreadyFree, GapTree};

/// Sizes of the caches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Ranges per magazine.
    pub magazine: usize,
    /// Pages that an empty cache takes from the tree at once, a power of two.
    pub run: u64,
    /// Full magazines of one size that the depot takes.
    pub depot: usize,
}

/// Why a range was not freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is free.
    Free,
    /// No allocation starts there.
    Unknown,
    /// It was allocated with so many pages.
    Size(u64),
}

/// Its own cache lines: what one CPU writes is not what another reads.
#[repr(align(128))]
pub(super) struct Apart<T>(pub T);

/// What is free in the tree, and what the pages are.
pub(super) struct Space {
    pub gaps: GapTree,
    states: States,
    /// Reserved ranges, sorted and apart.
    reserved: Vec<(u64, u64)>,
    aperture: (u64, u64),
}

impl Space {
    /// First page, and the page behind the last.
    pub fn aperture(&self) -> (u64, u64) {
        self.aperture
    }

    fn alloc(&mut self, pages: u64, last: u64) -> Option<u64> {
        let page = self.gaps.alloc(pages, last)?;
        self.states.make(page).set_live(page, pages);
        Some(page)
    }

    fn free(&mut self, page: u64, pages: u64) -> Result<(), Refused> {
        match self.states.find(page) {
            Some(chunk) if chunk.live_pages(page) == Some(pages) => {
                self.gaps.free(page, page + pages).map_err(|AlreadyFree| Refused::Free)?;
                chunk.set_free(page, pages);
                Ok(())
            }
            _ => Err(self.why(page)),
        }
    }

    /// What is wrong with a free at a page.
    fn why(&self, page: u64) -> Refused {
        let chunk = self.states.find(page);
        match chunk.and_then(|chunk| chunk.live_pages(page)) {
            Some(pages) => Refused::Size(pages),
            None if chunk.is_some_and(|chunk| state::is_cached(chunk.get(page))) => Refused::Free,
            None if self.gaps.contains(page) => Refused::Free,
            None => Refused::Unknown,
        }
    }
}

/// Everything that CPUs share.
pub(super) struct Rcache<F: Family> {
    slots: Box<[Apart<F::Mutex<Cache>>]>,
    depots: [Apart<F::Mutex<Vec<Magazine>>>; ORDERS],
    pub space: Apart<F::Mutex<Space>>,
    /// Counts the requests to owners of caches to give them back.
    drains: Apart<F::Word>,
    shape: Shape,
    end: u64,
}

/// A cache with one owner.
pub(super) struct Owned {
    cache: Cache,
    drained: u64,
}

impl<F: Family> Rcache<F> {
    /// Pages `[start, end)`; no CPUs means no caches. Depots and trees are shared in any case.
    pub fn new(start: u64, end: u64, cpus: usize, shape: Shape) -> Self {
        let space = Space {
            gaps: GapTree::new(start, end),
            states: States::new(),
            reserved: Vec::new(),
            aperture: (start, end),
        };
        Self {
            slots: (0..cpus).map(|_| Apart(F::Mutex::new(Cache::new(shape.magazine)))).collect(),
            depots: core::array::from_fn(|_| Apart(F::Mutex::new(Vec::new()))),
            space: Apart(F::Mutex::new(space)),
            drains: Apart(F::Word::new()),
            shape,
            end,
        }
    }

    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn cpus(&self) -> usize {
        self.slots.len()
    }

    /// A cache for one owner.
    pub fn owned(&self) -> Owned {
        Owned { cache: Cache::new(self.shape.magazine), drained: self.drains.0.load() }
    }

    /// 2^order pages through the cache of a CPU, without asking anybody to give something back.
    pub fn alloc_cached(&self, cpu: usize, order: usize, last: u64) -> Option<u64> {
        match self.slot(cpu) {
            Some(slot) => slot.with(|cache| self.alloc_from(cache, order, last)),
            None => self.alloc_large(1 << order, last),
        }
    }

    pub fn free_cached(&self, cpu: usize, order: usize, page: u64) -> Result<(), Refused> {
        match self.slot(cpu) {
            Some(slot) => slot.with(|cache| self.free_to(cache, order, page)),
            None => self.free_large(page, 1 << order),
        }
    }

    /// Any number of pages from the tree.
    pub fn alloc_large(&self, pages: u64, last: u64) -> Option<u64> {
        self.space.0.with(|space| space.alloc(pages, last))
    }

    pub fn free_large(&self, page: u64, pages: u64) -> Result<(), Refused> {
        self.space.0.with(|space| space.free(page, pages))
    }

    fn slot(&self, cpu: usize) -> Option<&F::Mutex<Cache>> {
        let i = cpu.checked_rem(self.slots.len())?;
        self.slots.get(i).map(|slot| &slot.0)
    }

    /// The chunk of a page, from all of them.
    fn chunk(&self, page: u64) -> Option<Arc<Chunk>> {
        self.space.0.with(|space| space.states.find(page).cloned())
    }

    /// From the cache; else from the depot; else from the tree.
    #[inline(always)]
    fn alloc_from(&self, cache: &mut Cache, order: usize, last: u64) -> Option<u64> {
        match cache.take_newest(order, last) {
            Some(page) => Some(page),
            None => self.alloc_longer(cache, order, last),
        }
    }

    #[cold]
    #[inline(never)]
    fn alloc_longer(&self, cache: &mut Cache, order: usize, last: u64) -> Option<u64> {
        match self.pop(cache, order, last) {
            Some(page) => Some(page),
            None => self.refill(cache, order, last),
        }
    }

    fn pop(&self, cache: &mut Cache, order: usize, last: u64) -> Option<u64> {
        while let Some(page) = cache.pop(order, last) {
            if let Some(chunk) = cache.chunk(page, || self.chunk(page))
                && chunk.get(page) == state::cached(order)
            {
                chunk.set(page, state::live(order));
                return Some(page);
            }
            // A second copy of it, of two frees at the same time.
        }
        None
    }

    fn refill(&self, cache: &mut Cache, order: usize, last: u64) -> Option<u64> {
        let empty = cache.is_empty(order);
        if empty && let Some(magazine) = self.depots[order].0.with(Vec::pop) {
            cache.load(order, magazine);
            if let Some(page) = self.pop(cache, order, last) {
                return Some(page);
            }
        }
        let pages = 1u64 << order;
        let run = self.shape.run.max(pages);
        if cache.is_empty(order) {
            // A run of its own keeps what CPUs write for their ranges (page table entries above all) on different cache lines.
            let run = self.space.0.with(|space| {
                let first = space.gaps.alloc(run, last)?;
                let top = first + run - pages;
                let mut magazine = Magazine::with_capacity(self.shape.magazine);
                // The run is aligned to its length, and so in one chunk.
                let chunk = space.states.make(first);
                for page in (first..top).step_by(pages as usize) {
                    chunk.set(page, state::cached(order));
                    magazine.push(page);
                }
                chunk.set(top, state::live(order));
                Some((top, magazine))
            });
            if let Some((page, magazine)) = run {
                cache.load(order, magazine);
                return Some(page);
            }
        }
        self.alloc_large(pages, last)
    }

    #[inline(always)]
    fn free_to(&self, cache: &mut Cache, order: usize, page: u64) -> Result<(), Refused> {
        if cache.put_newest(order, page) {
            return Ok(());
        }
        self.free_longer(cache, order, page)
    }

    #[cold]
    #[inline(never)]
    fn free_longer(&self, cache: &mut Cache, order: usize, page: u64) -> Result<(), Refused> {
        match cache.chunk(page, || self.chunk(page)) {
            Some(chunk) if chunk.get(page) == state::live(order) => chunk.set(page, state::cached(order)),
            _ => return Err(self.space.0.with(|space| space.why(page))),
        }
        if let Some(full) = cache.push(order, page) {
            self.store(order, full);
        }
        Ok(())
    }

    /// A full magazine goes to the depot, or back to the tree if that has enough.
    #[cold]
    fn store(&self, order: usize, magazine: Magazine) {
        let left = self.depots[order].0.with(|depot| {
            if depot.len() < self.shape.depot {
                depot.push(magazine);
                return None;
            }
            Some(magazine)
        });
        if let Some(magazine) = left {
            self.give_back([(order, magazine)]);
        }
    }

    fn give_back(&self, magazines: impl IntoIterator<Item = (usize, Magazine)>) {
        for (order, magazine) in magazines {
            self.space.0.with(|space| {
                for page in magazine {
                    let chunk = space.states.find(page);
                    if chunk.is_some_and(|chunk| leaves(chunk, order, page)) {
                        // The state says that it is in no gap.
                        let _ = space.gaps.free(page, page + (1 << order));
                    }
                }
            });
        }
    }

    /// Gives everything that is not in use back to the tree; owners follow at their next call.
    pub fn flush(&self) {
        self.drains.0.increment();
        for slot in &self.slots {
            let all = slot.0.with(Cache::take);
            self.give_back(all);
        }
        for (order, depot) in self.depots.iter().enumerate() {
            let all = depot.0.with(core::mem::take);
            self.give_back(all.into_iter().map(|magazine| (order, magazine)));
        }
    }

    /// Gives one magazine of each size back whose depot has more of them than `keep`.
    pub fn trim(&self, keep: usize) -> usize {
        let mut trimmed = 0;
        for (order, depot) in self.depots.iter().enumerate() {
            let surplus = depot.0.with(|depot| (depot.len() > keep).then(|| depot.pop()).flatten());
            trimmed += usize::from(surplus.is_some());
            self.give_back(surplus.map(|magazine| (order, magazine)));
        }
        trimmed
    }

    /// Takes a range out of use, as far as it is in the space. False if something of it is in use.
    pub fn reserve(&self, start: u64, end: u64) -> bool {
        self.flush();
        self.space.0.with(|space| {
            let already = space.reserved.iter().map(|&(a, b)| b.min(end).saturating_sub(a.max(start)));
            let already: u64 = already.sum();
            if space.gaps.pages_in(start, end) + already < end.saturating_sub(start) {
                return false;
            }
            space.gaps.take(start, end);
            let (mut low, mut high) = (start, end);
            space.reserved.retain(|&(a, b)| {
                let joins = a <= high && low <= b;
                if joins {
                    (low, high) = (low.min(a), high.max(b));
                }
                !joins
            });
            let place = space.reserved.partition_point(|&(a, _)| a < low);
            space.reserved.insert(place, (low, high));
            true
        })
    }

    #[inline(always)]
    pub fn alloc_owned(&self, owned: &mut Owned, order: usize, last: u64) -> Option<u64> {
        self.follow(owned);
        self.alloc_from(&mut owned.cache, order, last)
    }

    #[inline(always)]
    pub fn free_owned(&self, owned: &mut Owned, order: usize, page: u64) -> Result<(), Refused> {
        self.follow(owned);
        self.free_to(&mut owned.cache, order, page)
    }

    /// Gives back what the owner has if somebody asked for it.
    #[inline(always)]
    pub fn follow(&self, owned: &mut Owned) {
        let asked = self.drains.0.load();
        if asked != owned.drained {
            owned.drained = asked;
            self.drain(owned);
        }
    }

    /// Gives back what the owner has.
    #[cold]
    #[inline(never)]
    pub fn drain(&self, owned: &mut Owned) {
        self.give_back(owned.cache.take());
    }
}
