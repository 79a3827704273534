//! The protocol between a port and the SMMU that invalidates, for every interleaving and every reordering that the memory
//! model of the language allows (loom). It is the variant with a fence on each side; `membarrier` only moves the
//! port's fence to the side that invalidates.
//!
//! One page is mapped; software changes the page-table entry to another page, invalidates, synchronises, and then gives
//! the old page to somebody else, who writes it. No access of the port may see that.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering, fence};
use loom::thread;

const OLD: usize = 0;
const NEW: usize = 1;
const REUSED: usize = 99;

#[derive(Default)]
struct Board {
    entry: AtomicUsize,
    generation: AtomicUsize,
    mark: AtomicUsize,
    old_page: AtomicUsize,
}

/// What [`SyncLog`](portcullis_walk::SyncLog) and [`Tbu`](portcullis_walk::Tbu) do, step for step.
fn port(board: &Board, cached: bool, accesses: usize, fenced: bool) {
    let (mut seen, mut mark) = (0, 0);
    let mut tlb = cached.then_some(OLD);
    for _ in 0..accesses {
        mark += 1;
        board.mark.store(mark, Ordering::Relaxed);
        if fenced {
            fence(Ordering::SeqCst);
        }
        let generation = board.generation.load(Ordering::Acquire);
        if generation != seen {
            tlb = None;
            seen = generation;
        }
        let page = *tlb.get_or_insert_with(|| board.entry.load(Ordering::Acquire));
        if page == OLD {
            assert_ne!(board.old_page.load(Ordering::Relaxed), REUSED, "a stale translation was used");
        }
        mark += 1;
        board.mark.store(mark, Ordering::Release);
    }
}

fn invalidate(board: &Board, fenced: bool) {
    board.entry.store(NEW, Ordering::Release);
    board.generation.store(1, Ordering::Release);
    if fenced {
        fence(Ordering::SeqCst);
    }
    let mark = board.mark.load(Ordering::Acquire);
    while mark & 1 != 0 && board.mark.load(Ordering::Acquire) == mark {
        thread::yield_now();
    }
    board.old_page.store(REUSED, Ordering::Relaxed);
}

fn check(cached: bool, accesses: usize, fenced: bool) {
    loom::model(move || {
        let board = Arc::new(Board::default());
        let other = board.clone();
        let running = thread::spawn(move || port(&other, cached, accesses, fenced));
        invalidate(&board, fenced);
        running.join().unwrap();
    });
}

#[test]
fn no_access_uses_a_translation_after_its_invalidation_completed() {
    for cached in [false, true] {
        check(cached, 2, true);
    }
}

#[test]
#[should_panic(expected = "a stale translation was used")]
fn without_the_fences_one_would() {
    check(true, 1, false);
}

/// An SMMU whose TLBI and SYNC come from two threads, one after the other.
#[test]
fn the_one_who_synchronises_need_not_be_the_one_who_invalidated() {
    loom::model(|| {
        let board = Arc::new(Board::default());
        let published = Arc::new(AtomicUsize::new(0));
        let (b, p) = (board.clone(), published.clone());
        let publisher = thread::spawn(move || {
            b.entry.store(NEW, Ordering::Release);
            b.generation.store(1, Ordering::Release);
            p.store(1, Ordering::Release);
        });
        let b = board.clone();
        let device = thread::spawn(move || port(&b, true, 1, true));
        if published.load(Ordering::Acquire) == 1 {
            fence(Ordering::SeqCst);
            let mark = board.mark.load(Ordering::Acquire);
            while mark & 1 != 0 && board.mark.load(Ordering::Acquire) == mark {
                thread::yield_now();
            }
            board.old_page.store(REUSED, Ordering::Relaxed);
        }
        publisher.join().unwrap();
        device.join().unwrap();
    });
}
