//! Which parts of a guest's memory are in use: first fit over a map of free ranges.

use alloc::collections::BTreeMap;

/// Smallest piece: a cache line, so that no two pieces share one.
const UNIT: u64 = 64;

/// A heap over `[start, end)`.
#[derive(Debug)]
pub(super) struct Heap {
    /// Start to end; neighbours are joined.
    free: BTreeMap<u64, u64>,
    used: BTreeMap<u64, u64>,
}

impl Heap {
    pub fn new(start: u64, end: u64) -> Self {
        Self { free: BTreeMap::from([(start, end)]), used: BTreeMap::new() }
    }

    /// The lowest `len` bytes at a multiple of `align` that are free.
    pub fn alloc(&mut self, len: u64, align: u64) -> Option<u64> {
        if len == 0 || !align.is_power_of_two() {
            return None;
        }
        let len = len.checked_next_multiple_of(UNIT)?;
        let align = align.max(UNIT);
        let fits = |(start, end): (&u64, &u64)| {
            let at = start.checked_next_multiple_of(align)?;
            let behind = at.checked_add(len)?;
            (behind <= *end).then_some((*start, *end, at, behind))
        };
        let (start, end, at, behind) = self.free.iter().find_map(fits)?;
        self.free.remove(&start);
        if start < at {
            self.free.insert(start, at);
        }
        if behind < end {
            self.free.insert(behind, end);
        }
        self.used.insert(at, behind);
        Some(at)
    }

    /// Gives back what begins at `at`; `false` if nothing does.
    pub fn free(&mut self, at: u64) -> bool {
        let Some(mut end) = self.used.remove(&at) else { return false };
        let mut start = at;
        if let Some(behind) = self.free.remove(&end) {
            end = behind;
        }
        if let Some((below, to)) = self.free.range(..at).next_back()
            && *to == at
        {
            start = *below;
        }
        self.free.insert(start, end);
        true
    }

    pub fn outstanding(&self) -> usize {
        self.used.len()
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_are_aligned_apart_inside_and_come_back(
            steps in proptest::collection::vec((any::<bool>(), 1u64..9000, 0u32..14), 1..200)
        ) {
            let mut heap = Heap::new(0x4000_0000, 0x4010_0000);
            let mut live: Vec<(u64, u64)> = Vec::new();
            for (alloc, len, align) in steps {
                if alloc {
                    if let Some(at) = heap.alloc(len, 1 << align) {
                        prop_assert!(at.is_multiple_of(1 << align) && at >= 0x4000_0000 && at + len <= 0x4010_0000);
                        prop_assert!(live.iter().all(|(other, n)| at + len <= *other || other + n <= at));
                        live.push((at, len));
                    }
                } else if !live.is_empty() {
                    let (at, _) = live.swap_remove(len as usize % live.len());
                    prop_assert!(heap.free(at) && !heap.free(at));
                }
            }
            for (at, _) in live {
                heap.free(at);
            }
            prop_assert_eq!(heap.alloc(0x10_0000, 64), Some(0x4000_0000), "all joined again");
            prop_assert_eq!(heap.alloc(1, 1), None);
        }
    }
}
