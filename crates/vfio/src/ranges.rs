//! How often each part of an address range is in use.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// Counts over half-open ranges of addresses. Neighbours with the same count are one entry, so that pinning all memory of a
/// machine costs as much as its number of pieces, not of pages.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    /// Start to (end, count); disjoint; no count is 0.
    ranges: BTreeMap<u64, (u64, u32)>,
    bytes: u64,
}

impl Counted {
    /// Bytes with a count.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether `[start, end)` has a byte with a count.
    pub fn touches(&self, start: u64, end: u64) -> bool {
        self.ranges.range(..end).next_back().is_some_and(|(_, (to, _))| *to > start)
    }

    /// Counts `[start, end)` once more; gives the parts that had no count.
    pub fn add(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.split(start);
        self.split(end);
        let mut gaps = Vec::new();
        let mut at = start;
        for (from, (to, count)) in self.ranges.range_mut(start..end) {
            if at < *from {
                gaps.push((at, *from));
            }
            *count = count.saturating_add(1);
            at = *to;
        }
        if at < end {
            gaps.push((at, end));
        }
        for &(from, to) in &gaps {
            self.ranges.insert(from, (to, 1));
            self.bytes += to - from;
        }
        self.join(start, end);
        gaps
    }

    /// Counts `[start, end)` once less; gives the parts that have no count any more. Parts without a count stay so.
    pub fn remove(&mut self, start: u64, end: u64) -> Vec<(u64, u64)> {
        self.split(start);
        self.split(end);
        let mut gone = Vec::new();
        for (from, (to, count)) in self.ranges.range_mut(start..end) {
            *count -= 1;
            if *count == 0 {
                gone.push((*from, *to));
            }
        }
        for &(from, to) in &gone {
            self.ranges.remove(&from);
            self.bytes -= to - from;
        }
        self.join(start, end);
        gone
    }

    /// Everything that has a count.
    pub fn take_all(&mut self) -> Vec<(u64, u64)> {
        self.bytes = 0;
        core::mem::take(&mut self.ranges).into_iter().map(|(from, (to, _))| (from, to)).collect()
    }

    fn split(&mut self, at: u64) {
        if let Some((_, (to, count))) = self.ranges.range_mut(..at).next_back()
            && *to > at
        {
            let upper = (*to, *count);
            *to = at;
            self.ranges.insert(at, upper);
        }
    }

    /// Makes one of neighbours with the same count, within and around `[start, end]`.
    fn join(&mut self, start: u64, end: u64) {
        let mut inside: Vec<u64> = self.ranges.range(start..=end).map(|(from, _)| *from).collect();
        inside.reverse();
        for from in inside {
            let Some(&(to, count)) = self.ranges.get(&from) else { continue };
            if let Some((_, below)) = self.ranges.range_mut(..from).next_back()
                && *below == (from, count)
            {
                below.0 = to;
                self.ranges.remove(&from);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_part_is_new_once_and_gone_once() {
        let mut counted = Counted::default();
        assert_eq!(counted.add(0x1000, 0x3000), [(0x1000, 0x3000)]);
        assert_eq!(counted.add(0x2000, 0x5000), [(0x3000, 0x5000)]);
        assert_eq!(counted.bytes(), 0x4000);
        assert_eq!(counted.remove(0x1000, 0x3000), [(0x1000, 0x2000)]);
        assert!(counted.touches(0x2fff, 0x3000) && !counted.touches(0x1000, 0x2000));
        assert_eq!(counted.remove(0x2000, 0x5000), [(0x2000, 0x5000)]);
        assert_eq!(counted.bytes(), 0);
    }

    #[test]
    fn neighbours_with_one_count_are_one_entry() {
        let mut counted = Counted::default();
        for page in [3u64, 1, 2, 0] {
            counted.add(page << 12, (page + 1) << 12);
        }
        assert_eq!(counted.ranges.len(), 1);
        assert_eq!(counted.take_all(), [(0, 0x4000)]);
    }

    proptest! {
        #[test]
        fn counts_are_those_of_an_array(steps in proptest::collection::vec((any::<bool>(), 0u64..20, 1u64..8), 1..60)) {
            let (mut counted, mut array) = (Counted::default(), vec![0u32; 32]);
            for (add, start, len) in steps {
                let cells = start as usize..(start + len) as usize;
                let mut changed = Vec::new();
                for n in cells {
                    if add {
                        array[n] += 1;
                        if array[n] == 1 { changed.push(n as u64); }
                    } else if array[n] > 0 {
                        array[n] -= 1;
                        if array[n] == 0 { changed.push(n as u64); }
                    }
                }
                let parts = if add { counted.add(start, start + len) } else { counted.remove(start, start + len) };
                let parts: Vec<u64> = parts.into_iter().flat_map(|(from, to)| from..to).collect();
                prop_assert_eq!(parts, changed);
                prop_assert_eq!(counted.bytes(), array.iter().filter(|n| **n > 0).count() as u64);
                prop_assert_eq!(counted.touches(3, 17), array[3..17].iter().any(|n| *n > 0));
            }
        }
    }
}
