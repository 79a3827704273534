//! Which DMA ranges the peer has mapped: enough to hold it to the protocol's rules about them.

use std::collections::BTreeMap;

/// Ranges without overlap, by first address.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    /// First address to last address (inclusive, so that a range may end at the top of the address space).
    ranges: BTreeMap<u64, u64>,
}

/// What an unmap request covers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Covered {
    /// No map.
    Nothing,
    /// A part of some map: never allowed.
    Part,
    /// Whole maps: first address and size of each.
    Whole(Vec<(u64, u64)>),
}

impl Mappings {
    pub(super) fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether any byte of `first ..= last` is mapped.
    pub(super) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.ranges.range(..=last).next_back().is_some_and(|(_, &end)| end >= first)
    }

    pub(super) fn insert(&mut self, first: u64, last: u64) {
        self.ranges.insert(first, last);
    }

    pub(super) fn remove(&mut self, first: u64) {
        self.ranges.remove(&first);
    }

    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// What `first ..= last` covers. The specification wants one exact map; a range that covers several whole ones is
    /// taken too, as the kernel's type 1 IOMMU does.
    pub(super) fn covered(&self, first: u64, last: u64) -> Covered {
        let crosses_start = self.ranges.range(..first).next_back().is_some_and(|(_, &end)| end >= first);
        let mut whole = Vec::new();
        for (&start, &end) in self.ranges.range(first..=last) {
            if end > last {
                return Covered::Part;
            }
            // A map of the whole address space has a size that 64 bits cannot hold; `insert` never sees one, because
            // its size came in 64 bits.
            whole.push((start, (end - start).saturating_add(1)));
        }
        match (crosses_start, whole.is_empty()) {
            (true, _) => Covered::Part,
            (false, true) => Covered::Nothing,
            (false, false) => Covered::Whole(whole),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_overlap_and_a_shared_byte_does() {
        let mut maps = Mappings::default();
        maps.insert(0x1000, 0x1fff);
        assert!(!maps.overlaps(0x0, 0xfff));
        assert!(!maps.overlaps(0x2000, 0x2fff));
        assert!(maps.overlaps(0x1fff, 0x1fff));
        assert!(maps.overlaps(0x0, u64::MAX));
    }

    #[test]
    fn unmap_covers_whole_maps_or_nothing() {
        let mut maps = Mappings::default();
        maps.insert(0x1000, 0x1fff);
        maps.insert(0x2000, 0x3fff);
        assert_eq!(maps.covered(0x1000, 0x1fff), Covered::Whole(vec![(0x1000, 0x1000)]));
        assert_eq!(maps.covered(0x0, u64::MAX), Covered::Whole(vec![(0x1000, 0x1000), (0x2000, 0x2000)]));
        assert_eq!(maps.covered(0x1000, 0x2fff), Covered::Part);
        assert_eq!(maps.covered(0x3000, 0x4fff), Covered::Part);
        assert_eq!(maps.covered(0x3000, 0x3000), Covered::Part);
        assert_eq!(maps.covered(0x4000, 0x4fff), Covered::Nothing);
    }
}
