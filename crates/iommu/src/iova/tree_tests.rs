//! The tree against a list, and the cost of its searches.

use alloc::vec::Vec;

use super::tree::{AlreadyFree, Gap, GapTree};

/// A fixed-seed generator.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// What the tree has to answer: from a list of gaps, trying every place.
fn highest(gaps: &[Gap], pages: u64, last: u64) -> Option<u64> {
    let align = pages.next_power_of_two();
    gaps.iter().rev().find_map(|gap| {
        let end = gap.end.min(last + 1);
        let start = end.checked_sub(pages)? / align * align;
        (start >= gap.start).then_some(start)
    })
}

#[test]
fn every_small_gap_gives_the_largest_block_that_really_fits() {
    for start in 1..70 {
        for end in start + 1..start + 70 {
            let tree = GapTree::new(start, end);
            let gaps = [Gap { start, end }];
            let fits = (1..=70).filter(|&pages| highest(&gaps, pages, end).is_some());
            assert_eq!(fits.max(), Some(tree.largest()), "{start}..{end}");
            assert!((1..=tree.largest()).all(|pages| highest(&gaps, pages, end).is_some()));
        }
    }
}

/// Random allocations and frees, in a space of which about `load` allocations stay; every answer checked.
fn agrees_with_a_list(seed: u64, space: u64, load: usize, operations: usize, largest: u64) {
    let mut random = Random(seed);
    let mut tree = GapTree::new(3, space);
    let mut live: Vec<(u64, u64)> = Vec::new();
    for operation in 0..operations {
        let grow = live.len() < load / 2 || live.len() < 2 * load && random.below(2) == 0;
        if grow {
            let pages = 1 + random.below(largest);
            let last = match random.below(3) {
                0 => random.below(space),
                _ => space - 1,
            };
            // The list is made anew only now and then; in between the tree's own answer must at least be free.
            let expected = (operation % 64 == 0).then(|| highest(&tree.validate(), pages, last));
            let found = tree.alloc(pages, last);
            assert!(expected.is_none_or(|expected| expected == found), "{pages} pages up to {last}");
            if let Some(start) = found {
                assert!(start + pages <= last + 1 && start % pages.next_power_of_two() == 0);
                live.push((start, pages));
            }
        } else {
            let (start, pages) = live.swap_remove(random.below(live.len() as u64) as usize);
            assert!(!tree.contains(start));
            tree.free(start, start + pages).unwrap();
            assert_eq!(tree.free(start, start + pages), Err(AlreadyFree));
        }
    }
    let mut all: Vec<(u64, u64)> =
        tree.validate().into_iter().map(|gap| (gap.start, gap.end - gap.start)).collect();
    all.extend(&live);
    all.sort_unstable();
    let end = all.iter().fold(3, |at, &(start, pages)| {
        assert_eq!(at, start, "pages are free or in use, not both, not neither");
        start + pages
    });
    assert_eq!(end, space);
    for (start, pages) in live {
        tree.free(start, start + pages).unwrap();
    }
    assert_eq!(tree.validate(), [Gap { start: 3, end: space }]);
    assert_eq!(tree.height(), 1);
}

#[test]
fn answers_are_those_of_a_search_through_a_list() {
    for seed in 1..=8 {
        agrees_with_a_list(seed, 500, 40, 4000, 20);
        agrees_with_a_list(seed, 60_000, 3000, 20_000, 40);
        agrees_with_a_list(seed, 1 << 40, 2000, 10_000, 5000);
    }
}

/// Every second page in use: `holes` holes of one page, below a gap of `above` pages that is not in the comb.
fn comb(holes: u64) -> GapTree {
    let mut tree = GapTree::new(0, 2 * holes);
    for page in (0..2 * holes).step_by(2) {
        tree.take(page, page + 1);
    }
    assert_eq!(tree.gaps(), holes as usize);
    tree
}

fn visits(tree: &mut GapTree, work: impl FnOnce(&mut GapTree)) -> u64 {
    tree.visits.set(0);
    work(tree);
    tree.visits.get()
}

#[test]
fn a_search_in_ten_thousand_holes_visits_a_path_or_two() {
    let mut tree = comb(10_000);
    // Two pages fit at one place only, low in the comb; everywhere else the search would have to turn back.
    tree.free(6000, 6001).unwrap();
    let height = tree.height() as u64;
    assert!(height <= 5, "10 000 gaps in half-full nodes of 16");
    for (pages, last, expected) in [
        (1, 19_999, Some(19_999)),
        (1, 9_998, Some(9_997)),
        (2, 19_999, Some(6000)),
        (2, 6002, Some(6000)),
        (2, 6000, None),
        (3, 19_999, None),
        (4, 19_999, None),
    ] {
        let mut found = None;
        let seen = visits(&mut tree, |tree| found = tree.alloc(pages, last));
        assert_eq!(found, expected, "{pages} up to {last}");
        assert!(seen <= 4 * height, "{seen} nodes for {pages} pages up to {last}");
        if let Some(start) = found {
            let seen = visits(&mut tree, |tree| tree.free(start, start + pages).unwrap());
            assert!(seen <= 5 * height, "{seen} nodes to free {pages} pages");
        }
    }
    tree.validate();
}

#[test]
fn gaps_that_are_large_enough_but_badly_aligned_cost_nothing() {
    // Gaps of 3 pages at 4n + 1: two fit (at 4n + 2), three do not, although there are 10 000 gaps of three.
    let mut tree = GapTree::new(0, 40_000);
    for page in (0..40_000).step_by(4) {
        tree.take(page, page + 1);
    }
    let seen = visits(&mut tree, |tree| assert_eq!(tree.alloc(3, 39_999), None));
    assert!(seen <= 2, "the root knows: {seen}");
    assert_eq!(tree.alloc(2, 39_999), Some(39_998));
}

#[test]
fn a_comb_fills_and_empties() {
    let mut tree = comb(5000);
    while tree.alloc(1, u64::MAX >> 8).is_some() {}
    assert_eq!((tree.gaps(), tree.pages(), tree.height()), (0, 0, 1));
    tree.validate();
    for page in (0..10_000).step_by(2).chain((1..10_000).step_by(2)) {
        tree.free(page, page + 1).unwrap();
    }
    assert_eq!(tree.validate(), [Gap { start: 0, end: 10_000 }]);
}

#[test]
fn ranges_taken_out_are_counted_as_far_as_they_were_free() {
    let mut tree = comb(100);
    assert_eq!(tree.pages_in(10, 20), 5);
    tree.take(10, 20);
    assert_eq!((tree.pages_in(10, 20), tree.pages()), (0, 95));
    tree.take(0, 200);
    assert_eq!(tree.pages(), 0);
    tree.validate();
}
