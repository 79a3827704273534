//! The free ranges of a space, ordered by address: a B+ tree in an arena, augmented with what can be allocated.
//!
//! An entry of a leaf is a gap. An entry of an inner node is a child, with the lowest start in it and the largest *fit* in it. The
//! fit of a gap is the largest size that can be allocated in it at its natural alignment (the next power of two), and every
//! smaller size can be as well. So one number per subtree tells whether an allocation fits there, alignment and all, and a
//! search never has to turn back: it visits one path down, and at most one more to stay below a limit.
//!
//! Everything is in pages.

use alloc::vec::Vec;

/// Entries of a node, a power of two below 32.
const FANOUT: usize = 16;
/// Two neighbours with no more entries than this together become one node.
const MERGE: usize = FANOUT * 3 / 4;
/// More levels than any number of gaps that fits in memory needs: neighbours hold more than [`MERGE`] entries together.
const LEVELS: usize = 16;

/// A free range: first page, and the page behind the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    pub start: u64,
    pub end: u64,
}

/// A range that should become free and is, in part, already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AlreadyFree;

/// Pages of the largest block that fits at its natural alignment.
///
/// If a whole aligned block of 2^m pages fits and none of 2^(m+1), then a larger size can only start at a multiple of 2^(m+1) and
/// end with the gap.
fn fit(start: u64, end: u64) -> u64 {
    if start >= end {
        return 0;
    }
    let up = |order: u32| (start + ((1 << order) - 1)) >> order << order;
    let mut order = (end - start).ilog2();
    if up(order) + (1 << order) > end {
        // The length is at least 2^order, so an aligned half of it is inside.
        order -= 1;
    }
    end.saturating_sub(up(order + 1)).max(1 << order)
}

#[derive(Clone, Copy)]
struct Entry {
    start: u64,
    fit: u64,
    /// The end of a gap, or the number of a child.
    word: u64,
}

/// What a place without an entry holds: it is never at or below a page, and nothing fits in it. So the loops over a node need
/// neither its length nor a branch per entry, which the processor could only guess.
const NOTHING: Entry = Entry { start: u64::MAX >> 1, fit: 0, word: 0 };

#[derive(Clone)]
struct Node {
    starts: [u64; FANOUT],
    fits: [u64; FANOUT],
    words: [u64; FANOUT],
    len: usize,
}

impl Node {
    fn new() -> Self {
        let Entry { start, fit, word } = NOTHING;
        Self { starts: [start; FANOUT], fits: [fit; FANOUT], words: [word; FANOUT], len: 0 }
    }
    /// The entry that stands for this node above it.
    fn summary(&self, id: usize) -> Entry {
        Entry { start: self.starts[0], fit: self.largest(), word: id as u64 }
    }
    #[inline]
    fn largest(&self) -> u64 {
        let mut most = [0; 4];
        for four in self.fits.chunks_exact(4) {
            most = core::array::from_fn(|i| four[i].max(most[i]));
        }
        most[0].max(most[1]).max(most[2].max(most[3]))
    }
    /// How many entries start at or below a page.
    #[inline]
    fn upto(&self, page: u64) -> usize {
        // The top bit of a difference: numbers are below 2^62, and unlike a comparison it is two instructions for two entries.
        self.starts.iter().map(|start| start.wrapping_sub(page + 1) >> 63).sum::<u64>() as usize
    }
    /// The highest of the first `count` entries with a fit.
    #[inline]
    fn highest(&self, count: usize, pages: u64) -> Option<usize> {
        let mut all = 0;
        for (i, fit) in self.fits.iter().enumerate() {
            let fits = (fit.wrapping_sub(pages) >> 63).wrapping_sub(1);
            all |= fits & 1 << i;
        }
        (all & ((1 << count) - 1)).checked_ilog2().map(|i| i as usize)
    }
    #[inline]
    fn put(&mut self, i: usize, entry: Entry) {
        self.starts[i] = entry.start;
        self.fits[i] = entry.fit;
        self.words[i] = entry.word;
    }
    fn insert(&mut self, i: usize, entry: Entry) {
        self.starts.copy_within(i..FANOUT - 1, i + 1);
        self.fits.copy_within(i..FANOUT - 1, i + 1);
        self.words.copy_within(i..FANOUT - 1, i + 1);
        self.put(i, entry);
        self.len += 1;
    }
    fn remove(&mut self, i: usize) {
        self.starts.copy_within(i + 1.., i);
        self.fits.copy_within(i + 1.., i);
        self.words.copy_within(i + 1.., i);
        self.put(FANOUT - 1, NOTHING);
        self.len -= 1;
    }
    fn entry(&self, i: usize) -> Entry {
        Entry { start: self.starts[i], fit: self.fits[i], word: self.words[i] }
    }
    /// Takes the entries of the right neighbour.
    fn append(&mut self, other: &Self) {
        for i in 0..other.len {
            self.put(self.len + i, other.entry(i));
        }
        self.len += other.len;
    }
    /// Moves the upper half to a new right neighbour.
    fn split(&mut self) -> Self {
        let mut right = Self::new();
        let keep = self.len / 2;
        for i in keep..self.len {
            right.put(i - keep, self.entry(i));
            self.put(i, NOTHING);
        }
        right.len = self.len - keep;
        self.len = keep;
        right
    }
}

/// From the root to an entry of a leaf: per level the node and the entry's place in it.
#[derive(Clone, Copy)]
struct Path([(u32, u32); LEVELS]);

impl Path {
    fn new() -> Self {
        Self([(0, 0); LEVELS])
    }
    #[inline]
    fn at(&self, level: usize) -> (usize, usize) {
        let (id, i) = self.0[level];
        (id as usize, i as usize)
    }
    #[inline]
    fn set(&mut self, level: usize, id: usize, i: usize) {
        self.0[level] = (id as u32, i as u32);
    }
}

/// The gaps.
pub(super) struct GapTree {
    nodes: Vec<Node>,
    unused: Vec<usize>,
    root: usize,
    /// Levels; 1 if the root is a leaf.
    height: usize,
    gaps: usize,
    pages: u64,
    #[cfg(test)]
    pub visits: core::cell::Cell<u64>,
}

impl GapTree {
    /// A space that is all free. Ends are below 2^62.
    pub fn new(start: u64, end: u64) -> Self {
        let mut root = Node::new();
        if start < end {
            root.insert(0, Entry { start, fit: fit(start, end), word: end });
        }
        Self {
            gaps: root.len,
            pages: end.saturating_sub(start),
            nodes: Vec::from([root]),
            unused: Vec::new(),
            root: 0,
            height: 1,
            #[cfg(test)]
            visits: core::cell::Cell::new(0),
        }
    }

    /// Free pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }
    /// Free ranges.
    pub fn gaps(&self) -> usize {
        self.gaps
    }
    /// The largest size that can be allocated.
    pub fn largest(&self) -> u64 {
        self.nodes[self.root].largest()
    }

    /// Takes the highest naturally aligned range of `pages` pages that ends at or below page `last`.
    pub fn alloc(&mut self, pages: u64, last: u64) -> Option<u64> {
        let path = self.find(pages, last)?;
        let gap = self.gap(&path);
        let start = (gap.end.min(last + 1) - pages) & !(pages.next_power_of_two() - 1);
        self.carve(&path, start, start + pages);
        Some(start)
    }

    /// Makes a range free; nothing of it may be.
    pub fn free(&mut self, start: u64, end: u64) -> Result<(), AlreadyFree> {
        let before = self.locate(start);
        let after = match &before {
            Some(path) => self.next(path),
            None => self.first(),
        };
        let left = before.as_ref().map(|path| self.gap(path));
        let right = after.as_ref().map(|path| self.gap(path));
        if left.is_some_and(|gap| gap.end > start) || right.is_some_and(|gap| gap.start < end) {
            return Err(AlreadyFree);
        }
        self.pages += end - start;
        let left = before.as_ref().zip(left).filter(|(_, gap)| gap.end == start);
        let right = after.as_ref().zip(right).filter(|(_, gap)| gap.start == end);
        match (left, right) {
            (Some((path, low)), Some((removed, high))) => {
                self.set(path, Gap { start: low.start, end: high.end });
                self.remove(removed);
            }
            (Some((path, low)), None) => self.set(path, Gap { start: low.start, end }),
            (None, Some((path, high))) => self.set(path, Gap { start, end: high.end }),
            (None, None) => {
                let (path, place) = match before {
                    Some(path) => (path, path.at(self.height - 1).1 + 1),
                    None => (self.leftmost(), 0),
                };
                self.insert(&path, place, Gap { start, end });
            }
        }
        Ok(())
    }

    /// True if the page is free.
    pub fn contains(&self, page: u64) -> bool {
        self.locate(page).is_some_and(|path| self.gap(&path).end > page)
    }

    /// Free pages within a range.
    pub fn pages_in(&self, start: u64, end: u64) -> u64 {
        let mut pages = 0;
        let mut end = end;
        while start < end {
            let Some(path) = self.locate(end - 1) else { break };
            let gap = self.gap(&path);
            pages += gap.end.min(end).saturating_sub(gap.start.max(start));
            end = gap.start;
        }
        pages
    }

    /// Takes what is free within a range.
    pub fn take(&mut self, start: u64, end: u64) {
        let mut end = end;
        while start < end {
            let Some(path) = self.locate(end - 1) else { break };
            let gap = self.gap(&path);
            let (low, high) = (gap.start.max(start), gap.end.min(end));
            if low < high {
                self.carve(&path, low, high);
            }
            end = gap.start;
        }
    }

    #[inline]
    fn node(&self, id: usize) -> &Node {
        #[cfg(test)]
        self.visits.set(self.visits.get() + 1);
        &self.nodes[id]
    }

    fn gap(&self, path: &Path) -> Gap {
        let (id, i) = path.at(self.height - 1);
        Gap { start: self.nodes[id].starts[i], end: self.nodes[id].words[i] }
    }

    /// The highest gap with room at or below page `last`.
    fn find(&self, pages: u64, last: u64) -> Option<Path> {
        let mut path = Path::new();
        let mut id = self.root;
        let mut seen = 0;
        // Down to the gap that `last` may cut.
        for level in 0..self.height {
            let node = self.node(id);
            let Some(i) = node.upto(last).checked_sub(1) else { break };
            path.set(level, id, i);
            seen = level + 1;
            if node.fits[i] < pages {
                break;
            }
            if seen == self.height {
                if fit(node.starts[i], node.words[i].min(last + 1)) >= pages {
                    return Some(path);
                }
                break;
            }
            id = node.words[i] as usize;
        }
        // All that lies to the left of the way down is below `last`; what was passed last is highest.
        for level in (0..seen).rev() {
            let (id, i) = path.at(level);
            let Some(i) = self.node(id).highest(i, pages) else { continue };
            path.set(level, id, i);
            let mut id = self.nodes[id].words[i] as usize;
            for below in level + 1..self.height {
                let node = self.node(id);
                let i = node.highest(node.len, pages)?;
                path.set(below, id, i);
                id = node.words[i] as usize;
            }
            return Some(path);
        }
        None
    }

    /// The last gap that starts at or below a page.
    fn locate(&self, page: u64) -> Option<Path> {
        let mut path = Path::new();
        let mut id = self.root;
        for level in 0..self.height {
            let node = self.node(id);
            let i = node.upto(page).checked_sub(1)?;
            path.set(level, id, i);
            id = node.words[i] as usize;
        }
        Some(path)
    }

    /// The way to the place before all gaps.
    fn leftmost(&self) -> Path {
        let mut path = Path::new();
        path.set(0, self.root, 0);
        self.descend(&mut path, 0);
        path
    }

    /// Continues a path with the lowest entries below a level.
    fn descend(&self, path: &mut Path, level: usize) {
        for level in level..self.height - 1 {
            let (id, i) = path.at(level);
            path.set(level + 1, self.node(id).words[i] as usize, 0);
        }
    }

    fn first(&self) -> Option<Path> {
        (self.gaps != 0).then(|| self.leftmost())
    }

    /// The gap behind one.
    fn next(&self, path: &Path) -> Option<Path> {
        let mut path = *path;
        let level = (0..self.height).rev().find(|&level| {
            let (id, i) = path.at(level);
            i + 1 < self.nodes[id].len
        })?;
        path.0[level].1 += 1;
        self.descend(&mut path, level);
        Some(path)
    }

    /// Takes `[start, end)` out of the gap that holds it.
    fn carve(&mut self, path: &Path, start: u64, end: u64) {
        self.pages -= end - start;
        let gap = self.gap(path);
        let (low, high) = (Gap { start: gap.start, end: start }, Gap { start: end, end: gap.end });
        match (low.start < low.end, high.start < high.end) {
            (false, false) => self.remove(path),
            (true, false) => self.set(path, low),
            (false, true) => self.set(path, high),
            (true, true) => {
                self.set(path, low);
                self.insert(path, path.at(self.height - 1).1 + 1, high);
            }
        }
    }

    /// Replaces a gap by one that keeps its place in the order.
    fn set(&mut self, path: &Path, gap: Gap) {
        let level = self.height - 1;
        let (id, i) = path.at(level);
        let old = self.nodes[id].fits[i];
        let fit = fit(gap.start, gap.end);
        self.nodes[id].put(i, Entry { start: gap.start, fit, word: gap.end });
        self.propagate(path, level, old, fit);
    }

    /// Brings the entries above a node up to date after one of its fits changed (0 for an entry that was not there or is no
    /// more), or its first start.
    fn propagate(&mut self, path: &Path, level: usize, mut old: u64, mut new: u64) {
        for level in (0..level).rev() {
            let (id, i) = path.at(level);
            let child = self.node(path.at(level + 1).0);
            let (start, largest) = (self.nodes[id].starts[i], self.nodes[id].fits[i]);
            let fit = match old < largest && new <= largest {
                true => largest,
                false => child.largest(),
            };
            if child.starts[0] == start && fit == largest {
                return;
            }
            self.nodes[id].starts[i] = self.nodes[path.at(level + 1).0].starts[0];
            self.nodes[id].fits[i] = fit;
            (old, new) = (largest, fit);
        }
    }

    /// The same after anything changed in a node.
    fn refresh(&mut self, path: &Path, level: usize) {
        for level in (0..level).rev() {
            let (id, i) = path.at(level);
            let child = path.at(level + 1).0;
            let entry = self.node(child).summary(child);
            let node = &self.nodes[id];
            if (node.starts[i], node.fits[i]) == (entry.start, entry.fit) {
                return;
            }
            self.nodes[id].put(i, entry);
        }
    }

    fn create(&mut self, node: Node) -> usize {
        if let Some(id) = self.unused.pop() {
            self.nodes[id] = node;
            return id;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Adds a gap at a place of the leaf that the path leads to.
    fn insert(&mut self, path: &Path, place: usize, gap: Gap) {
        self.gaps += 1;
        let mut entry = Entry { start: gap.start, fit: fit(gap.start, gap.end), word: gap.end };
        let mut place = place;
        for level in (0..self.height).rev() {
            let id = path.at(level).0;
            let node = &mut self.nodes[id];
            if node.len < FANOUT {
                let fit = entry.fit;
                node.insert(place, entry);
                match level == self.height - 1 {
                    true => self.propagate(path, level, 0, fit),
                    false => self.refresh(path, level),
                }
                return;
            }
            let mut right = node.split();
            match place.checked_sub(node.len) {
                Some(place) if place != 0 => right.insert(place, entry),
                _ => node.insert(place, entry),
            }
            let left = node.summary(id);
            let right_id = self.create(right);
            entry = self.nodes[right_id].summary(right_id);
            if level == 0 {
                let mut root = Node::new();
                root.insert(0, left);
                root.insert(1, entry);
                self.root = self.create(root);
                self.height += 1;
                return;
            }
            let (parent, i) = path.at(level - 1);
            self.nodes[parent].put(i, left);
            place = i + 1;
        }
    }

    /// Removes a gap.
    fn remove(&mut self, path: &Path) {
        self.gaps -= 1;
        let mut path = *path;
        for level in (1..self.height).rev() {
            let (id, i) = path.at(level);
            let old = self.nodes[id].fits[i];
            self.nodes[id].remove(i);
            let (parent, at) = path.at(level - 1);
            let len = self.nodes[id].len;
            if len == 0 {
                self.unused.push(id);
                continue;
            }
            let neighbour = |i: usize| self.nodes[parent].words[i] as usize;
            let joins = |i: usize| len + self.nodes[neighbour(i)].len <= MERGE;
            let low = if at + 1 < self.nodes[parent].len && joins(at + 1) {
                at
            } else if at > 0 && joins(at - 1) {
                at - 1
            } else {
                match level == self.height - 1 {
                    true => self.propagate(&path, level, old, 0),
                    false => self.refresh(&path, level),
                }
                return;
            };
            let (left, right) = (neighbour(low), neighbour(low + 1));
            let [into, from] = self.pair(left, right);
            into.append(from);
            let entry = into.summary(left);
            self.nodes[parent].put(low, entry);
            self.unused.push(right);
            // Goes next.
            path.set(level - 1, parent, low + 1);
        }
        let root = self.root;
        self.nodes[root].remove(path.at(0).1);
        while self.height > 1 && self.nodes[self.root].len <= 1 {
            self.unused.push(self.root);
            self.root = self.nodes[self.root].words[0] as usize;
            self.height -= 1;
        }
    }

    /// Two different nodes.
    fn pair(&mut self, a: usize, b: usize) -> [&mut Node; 2] {
        let (low, high) = self.nodes.split_at_mut(a.max(b));
        match a < b {
            true => [&mut low[a], &mut high[0]],
            false => [&mut high[0], &mut low[b]],
        }
    }

    /// Checks what the tree promises about itself, and gives the gaps in order.
    #[cfg(test)]
    pub fn validate(&self) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        let mut work = Vec::from([(self.root, 0, None)]);
        let mut reached = 0;
        while let Some((id, level, above)) = work.pop() {
            let node = &self.nodes[id];
            reached += 1;
            assert!(node.len > 0 || level == 0 && self.height == 1);
            assert!(
                above.is_none_or(|above| above == (node.starts[0], node.largest())),
                "a stale entry above"
            );
            for i in 0..node.len {
                assert!(i == 0 || node.starts[i - 1] < node.starts[i]);
                if level + 1 == self.height {
                    let gap = Gap { start: node.starts[i], end: node.words[i] };
                    assert!(gaps.last().is_none_or(|last| last.end < gap.start), "gaps that touch are one");
                    assert!(gap.start < gap.end && node.fits[i] == fit(gap.start, gap.end));
                    gaps.push(gap);
                }
            }
            if level + 1 < self.height {
                // A stack: the lowest last.
                let children = (0..node.len).rev();
                let entry = |i: usize| Some((node.starts[i], node.fits[i]));
                work.extend(children.map(|i| (node.words[i] as usize, level + 1, entry(i))));
            }
        }
        assert_eq!(reached + self.unused.len(), self.nodes.len(), "a node was lost");
        assert_eq!(gaps.len(), self.gaps);
        assert_eq!(gaps.iter().map(|gap| gap.end - gap.start).sum::<u64>(), self.pages);
        gaps
    }

    #[cfg(test)]
    pub fn height(&self) -> usize {
        self.height
    }
}
