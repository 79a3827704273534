//! The allocator against a naive model: every range that is handed out is inside, aligned, under its limit and nobody else's,
//! and an allocation fails only if the model finds no place either.
//!
//! Ten million operations: `cargo test --release -p portcullis-iommu -- --ignored ten_million`.

extern crate std;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::tree_tests::Random;
use super::*;

const PAGE: u64 = 4096;

struct Model {
    random: Random,
    domain: Arc<IovaDomain>,
    locals: Vec<LocalIova>,
    first: u64,
    end: u64,
    reserved: Vec<(u64, u64)>,
    /// First page to (pages taken, bytes asked for).
    live: BTreeMap<u64, (u64, u64)>,
    /// The same in no order, to choose from.
    order: Vec<u64>,
    failed: u64,
}

impl Model {
    fn new(seed: u64, pages: u64) -> Self {
        let config = IovaConfig { granule: PAGE, first: Iova(0), last: Iova(pages * PAGE - 1), cpus: 2 };
        let domain = Arc::new(IovaDomain::new(config).unwrap());
        let mut random = Random(seed);
        let mut reserved: Vec<(u64, u64)> = Vec::new();
        for _ in 0..random.below(4) {
            let start = random.below(pages - 8);
            let end = start + 1 + random.below(8);
            domain.reserve(Iova(start * PAGE), Iova(end * PAGE - 1)).unwrap();
            reserved.push((start, end));
        }
        let locals = (0..2).map(|_| domain.local()).collect();
        let (live, order) = (BTreeMap::new(), Vec::new());
        Self { random, domain, locals, first: 1, end: pages, reserved, live, order, failed: 0 }
    }

    /// True if the model finds a place.
    fn has_room(&self, pages: u64, limit: u64) -> bool {
        let mut used: Vec<(u64, u64)> = self.reserved.clone();
        used.extend(self.live.iter().map(|(&page, &(pages, _))| (page, page + pages)));
        used.push((self.end.min(limit.saturating_add(1) / PAGE), u64::MAX));
        used.sort_unstable();
        let mut at = self.first;
        used.iter().any(|&(start, end)| {
            let fits = at.next_multiple_of(pages.next_power_of_two()) + pages <= start;
            at = at.max(end.min(self.end));
            fits
        })
    }

    fn alloc(&mut self, largest: u64) {
        let bytes = match self.random.below(4) {
            0 => 1 + self.random.below(largest * PAGE),
            _ => 1 + self.random.below(PAGE * largest.min(40)),
        };
        let pages = match bytes.div_ceil(PAGE) {
            small @ ..32 => small.next_power_of_two(),
            large => large,
        };
        let limit = match self.random.below(4) {
            0 => self.random.below(self.end * PAGE),
            1 => self.end * PAGE / 2 - 1,
            _ => u64::MAX,
        };
        let who = self.random.below(4) as usize;
        let ask = |domain: &IovaDomain, locals: &mut Vec<LocalIova>| match who {
            cpu @ (0 | 1) => domain.alloc(cpu, bytes, Iova(limit)),
            local => locals[local - 2].alloc(bytes, Iova(limit)),
        };
        let iova = ask(&self.domain, &mut self.locals).or_else(|_| {
            // Handles that were idle have what is missing.
            self.locals.iter_mut().for_each(LocalIova::poll);
            ask(&self.domain, &mut self.locals)
        });
        let Ok(iova) = iova else {
            self.failed += 1;
            // Looking is slow, and failing is frequent in a full space.
            if self.failed % 32 == 1 {
                assert!(!self.has_room(pages, limit), "{pages} pages up to {limit:#x} were refused");
            }
            return;
        };
        let page = iova.get() / PAGE;
        assert!(iova.is_aligned(PAGE * pages.next_power_of_two()), "{iova} for {pages} pages");
        assert!(page >= self.first && page + pages <= self.end && (page + pages) * PAGE - 1 <= limit);
        let before = self.live.range(..page + pages).next_back();
        assert!(before.is_none_or(|(&other, &(count, _))| other + count <= page), "{iova} is in use");
        assert!(!self.reserved.iter().any(|&(start, end)| page < end && start < page + pages));
        self.live.insert(page, (pages, bytes));
        self.order.push(page);
    }

    fn free(&mut self) {
        let i = self.random.below(self.order.len() as u64) as usize;
        let page = self.order.swap_remove(i);
        let (_, bytes) = self.live.remove(&page).unwrap();
        let iova = Iova(page * PAGE);
        let who = self.random.below(4) as usize;
        let mut give = || match who {
            cpu @ (0 | 1) => self.domain.free(cpu, iova, bytes),
            local => self.locals[local - 2].free(iova, bytes),
        };
        give().unwrap();
        if page.is_multiple_of(64) {
            assert_eq!(give(), Err(IovaError::DoubleFree { iova, len: bytes }));
        }
    }

    fn run(mut self, operations: u64, load: usize, largest: u64) {
        for _ in 0..operations {
            match self.random.below(4096) {
                0 => self.domain.flush(),
                1 => drop(self.domain.trim()),
                2 => self.locals[0] = self.domain.local(),
                _ => {}
            }
            // Phases that grow and phases that shrink.
            let swing = (self.random.0 >> 60) as usize;
            let grow = self.random.below(16) < if self.order.len() < load { 9 } else { 7 };
            match self.order.is_empty() || grow && swing != 0 {
                true => self.alloc(largest),
                false => self.free(),
            }
        }
        while !self.order.is_empty() {
            self.free();
        }
        self.locals.clear();
        self.domain.flush();
        let mut used: Vec<bool> = (0..self.end).map(|page| page < self.first).collect();
        for &(start, end) in &self.reserved {
            used[start as usize..end as usize].fill(true);
        }
        let free = used.iter().filter(|used| !**used).count() as u64;
        let gaps = used.chunk_by(|a, b| a == b).filter(|run| !run[0]).count();
        assert!(self.end > 1000 || self.failed > operations / 100, "a small space is full at times");
        let usage = self.domain.usage();
        assert_eq!((usage.free / PAGE, usage.gaps), (free, gaps), "nothing is lost, and all has merged");
    }
}

fn agree(operations: u64) {
    for (seed, pages, load, largest) in
        [(1, 300, 60, 60), (2, 4096, 300, 100), (3, 1 << 16, 2500, 300), (4, 1 << 20, 10_000, 64)]
    {
        Model::new(seed, pages).run(operations / 4, load, largest);
    }
}

#[test]
fn random_use_agrees_with_a_naive_model() {
    agree(100_000);
}

#[test]
#[ignore = "for a release build"]
fn ten_million_operations_agree_with_a_naive_model() {
    agree(10_000_000);
}
