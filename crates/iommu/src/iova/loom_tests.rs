//! The caches under a model checker: every interleaving (up to a number of preemptions) of the locks and the word, on the code
//! that runs in the allocator.

extern crate std;

use alloc::vec::Vec;
use core::sync::atomic::Ordering::Relaxed;
use std::collections::BTreeSet;

use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

use super::rcache::{Rcache, Refused, Shape};
use super::sync::{Family, Lock, Word};

struct Loom;

impl Family for Loom {
    type Mutex<T: Send> = loom::sync::Mutex<T>;
    type Word = AtomicU64;
}

impl<T: Send> Lock<T> for loom::sync::Mutex<T> {
    fn new(value: T) -> Self {
        Self::new(value)
    }
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.lock().unwrap())
    }
}

impl Word for AtomicU64 {
    fn new() -> Self {
        Self::new(0)
    }
    fn load(&self) -> u64 {
        self.load(Relaxed)
    }
    fn increment(&self) {
        self.fetch_add(1, Relaxed);
    }
}

/// Magazines so small that they go to the depot, and a depot so small that they go on to the tree.
const SHAPE: Shape = Shape { magazine: 1, run: 2, depot: 1 };

struct Space {
    rcache: Rcache<Loom>,
    /// Pages in use, as their users see it. Its lock is not the model's: it is held for no step of it.
    used: std::sync::Mutex<BTreeSet<u64>>,
}

impl Space {
    fn new(pages: u64, cpus: usize) -> Arc<Self> {
        let rcache = Rcache::new(16, 16 + pages, cpus, SHAPE);
        Arc::new(Self { rcache, used: std::sync::Mutex::default() })
    }
    fn got(&self, page: u64) -> u64 {
        assert!(self.used.lock().unwrap().insert(page), "page {page} was handed out twice");
        page
    }
    fn gives(&self, page: u64) -> u64 {
        assert!(self.used.lock().unwrap().remove(&page));
        page
    }
    fn alloc(&self, cpu: usize, order: usize) -> Option<u64> {
        let page = self.rcache.alloc_cached(cpu, order, u64::MAX >> 8)?;
        Some(self.got(page))
    }
    fn free(&self, cpu: usize, order: usize, page: u64) {
        self.rcache.free_cached(cpu, order, self.gives(page)).unwrap();
    }
    /// Nothing was lost: all of it is free, in one piece.
    fn is_whole(&self, pages: u64) {
        self.rcache.flush();
        self.rcache.space.0.with(|space| {
            assert_eq!((space.gaps.pages(), space.gaps.gaps()), (pages, 1));
        });
    }
}

fn explore(preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.max_branches = 20_000;
    model.check(check);
}

/// Threads run `work(space, thread)`; then nothing may be lost.
fn together(pages: u64, cpus: usize, threads: usize, work: fn(&Space, usize)) {
    let space = Space::new(pages, cpus);
    let run = |n| {
        let space = space.clone();
        thread::spawn(move || work(&space, n))
    };
    let all: Vec<_> = (1..threads).map(run).collect();
    work(&space, 0);
    for thread in all {
        thread.join().unwrap();
    }
    space.is_whole(pages);
}

/// Three pages taken and freed, so that magazines go to the depot and come back.
fn three(space: &Space, cpu: usize) {
    let pages: Vec<_> = (0..3).filter_map(|_| space.alloc(cpu, 0)).collect();
    for page in pages {
        space.free(cpu, 0, page);
    }
}

#[test]
fn two_cpus_pass_magazines_through_the_depot() {
    explore(2, || together(16, 2, 2, three));
}

#[test]
fn two_threads_on_the_cache_of_one_cpu() {
    explore(2, || together(16, 1, 2, |space, _| three(space, 0)));
}

#[test]
fn flush_and_trim_meet_allocations() {
    explore(2, || {
        together(16, 2, 2, |space, thread| match thread {
            0 => three(space, 0),
            _ => {
                space.rcache.flush();
                space.rcache.trim(0);
            }
        });
    });
}

#[test]
fn an_allocation_that_needs_everything_gets_it_when_the_others_are_done() {
    explore(2, || {
        let space = Space::new(4, 2);
        let other = {
            let space = space.clone();
            thread::spawn(move || {
                if let Some(page) = space.alloc(1, 0) {
                    space.free(1, 0, page);
                }
            })
        };
        // While the other has a page or is at work it may fail, but not break anything.
        let large = |space: &Space| {
            space.rcache.alloc_large(4, 100).or_else(|| {
                space.rcache.flush();
                space.rcache.alloc_large(4, 100)
            })
        };
        if let Some(page) = large(&space) {
            space.rcache.free_large(page, 4).unwrap();
        }
        other.join().unwrap();
        let page = large(&space).unwrap();
        space.rcache.free_large(page, 4).unwrap();
        space.is_whole(4);
    });
}

#[test]
fn an_owner_is_asked_and_gives_back() {
    explore(3, || {
        let space = Space::new(16, 0);
        let owner = {
            let space = space.clone();
            thread::spawn(move || {
                let mut owned = space.rcache.owned();
                for _ in 0..3 {
                    let page = space.got(space.rcache.alloc_owned(&mut owned, 0, 100).unwrap());
                    space.rcache.free_owned(&mut owned, 0, space.gives(page)).unwrap();
                }
                owned
            })
        };
        space.rcache.flush();
        let mut owned = owner.join().unwrap();
        // It saw the request at one of its calls, or sees it now; in both cases a second one empties it.
        space.rcache.flush();
        space.rcache.follow(&mut owned);
        space.is_whole(16);
    });
}

#[test]
fn a_range_freed_by_another_cpu_is_freed_once() {
    explore(3, || {
        let space = Space::new(16, 2);
        let page = space.alloc(0, 0).unwrap();
        space.gives(page);
        let other = {
            let space = space.clone();
            thread::spawn(move || space.rcache.free_cached(1, 0, page))
        };
        let mine = space.rcache.free_cached(0, 0, page);
        let theirs = other.join().unwrap();
        assert!([mine, theirs].contains(&Ok(())));
        assert!([mine, theirs].iter().all(|done| matches!(done, Ok(()) | Err(Refused::Free))));
        // Even if both were taken: it is handed out once, and goes back once.
        let again: Vec<_> = [0, 1].into_iter().filter_map(|cpu| space.alloc(cpu, 0)).collect();
        for page in again {
            space.free(0, 0, page);
        }
        space.is_whole(16);
    });
}
