//! The translations that a device keeps: bounded, found by address, forgotten by range.

use std::collections::BTreeMap;

use portcullis_bus::{AtcInvalidation, AtsTranslation, Initiator};

/// The smallest block that a translation completion or an invalidation can name (2^12 bytes).
pub(super) const MIN_SIZE_LOG2: u8 = 12;

/// A naturally aligned range: 2^`size_log2` bytes that begin at `base`. A size of 64 is the whole address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    base: u64,
    size_log2: u8,
}

impl Range {
    pub(super) const ALL: Self = Self { base: 0, size_log2: 64 };

    /// The range of that size that holds `addr`.
    pub(super) fn around(addr: u64, size_log2: u8) -> Self {
        let size_log2 = size_log2.clamp(MIN_SIZE_LOG2, 64);
        Self { base: addr & !Self::low(size_log2), size_log2 }
    }

    /// All address bits inside a range of that size.
    fn low(size_log2: u8) -> u64 {
        1u64.checked_shl(u32::from(size_log2)).map_or(u64::MAX, |size| size - 1)
    }

    pub(super) fn first(self) -> u64 {
        self.base
    }

    pub(super) fn last(self) -> u64 {
        self.base | Self::low(self.size_log2)
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first() <= other.last() && other.first() <= self.last()
    }
}

/// Which substreams a translation holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tag {
    /// Requests without a substream.
    Untagged,
    /// One substream.
    Substream(u32),
    /// Every substream, but not requests without one.
    Global,
}

impl Tag {
    /// True if the invalidation takes translations with this tag.
    pub(super) fn is_hit_by(self, what: &AtcInvalidation) -> bool {
        match (self, what.substream) {
            (Self::Untagged, None) => true,
            (Self::Untagged, Some(_)) | (_, None) => false,
            (Self::Substream(mine), Some(s)) => what.global || mine == s.get(),
            // Its owner cannot be told any more: any substream's invalidation takes it.
            (Self::Global, Some(_)) => true,
        }
    }
}

/// Whose translation it is. A privileged or instruction request has its own, because the permissions that come back
/// are those of what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    stream: u32,
    pub(super) tag: Tag,
    non_secure: bool,
    privileged: bool,
    instruction: bool,
}

impl Key {
    pub(super) fn of(from: &Initiator) -> Self {
        Self {
            stream: from.stream.get(),
            tag: from.substream.map_or(Tag::Untagged, |s| Tag::Substream(s.get())),
            non_secure: from.attrs.non_secure(),
            privileged: from.attrs.privileged(),
            instruction: from.attrs.instruction(),
        }
    }

    /// The key of a translation that holds for every substream.
    pub(super) fn global(self) -> Self {
        match self.tag {
            Tag::Substream(_) => Self { tag: Tag::Global, ..self },
            Tag::Untagged | Tag::Global => self,
        }
    }
}

/// A granted translation and the input range it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) range: Range,
    translation: AtsTranslation,
}

impl Block {
    /// The block of `addr` that was granted, or `None` if no completion can say that (a size below 4 KiB or of the whole
    /// address space and more).
    pub(super) fn new(addr: u64, translation: AtsTranslation) -> Option<Self> {
        let size = translation.size_log2;
        (MIN_SIZE_LOG2..64).contains(&size).then(|| Self { range: Range::around(addr, size), translation })
    }

    /// Whose it is when the request that it answers was `key`'s.
    pub(super) fn owner(&self, key: Key) -> Key {
        if self.translation.global { key.global() } else { key }
    }

    /// True if it allows the access.
    pub(super) fn allows(&self, write: bool, instruction: bool) -> bool {
        let t = &self.translation;
        if write { t.write } else { t.read && (t.execute || !instruction) }
    }

    /// The translated address of `addr`, and the bytes from there to the block's end.
    pub(super) fn translate(&self, addr: u64) -> (u64, u64) {
        let low = Range::low(self.range.size_log2);
        (self.translation.addr & !low | addr & low, (low - (addr & low)).saturating_add(1))
    }
}

struct Entry {
    block: Block,
    age: u64,
}

/// The cache: at most `capacity` blocks; the oldest goes when it is full.
pub(super) struct Cache {
    capacity: usize,
    entries: BTreeMap<(Key, u64), Entry>,
    /// The entries by age.
    order: BTreeMap<u64, (Key, u64)>,
    next_age: u64,
}

impl Cache {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, entries: BTreeMap::new(), order: BTreeMap::new(), next_age: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
    }

    pub(super) fn look_up(&self, key: Key, addr: u64) -> Option<Block> {
        self.exact(key, addr).or_else(|| self.exact(key.global(), addr))
    }

    fn exact(&self, key: Key, addr: u64) -> Option<Block> {
        let (_, entry) = self.entries.range((key, 0)..=(key, addr)).next_back()?;
        (addr <= entry.block.range.last()).then_some(entry.block)
    }

    /// Keeps a block in place of everything it overlaps. Returns how many others had to go for want of room.
    pub(super) fn insert(&mut self, key: Key, block: Block) -> u64 {
        if self.capacity == 0 {
            return 0;
        }
        let key = block.owner(key);
        self.remove_of(key, block.range);
        let mut evicted = 0;
        while self.entries.len() >= self.capacity {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            self.entries.remove(&oldest);
            evicted += 1;
        }
        let slot = (key, block.range.first());
        let age = self.next_age;
        self.next_age = self.next_age.wrapping_add(1);
        self.order.insert(age, slot);
        self.entries.insert(slot, Entry { block, age });
        evicted
    }

    /// Forgets what an invalidation names.
    pub(super) fn invalidate(&mut self, what: &AtcInvalidation, range: Range) {
        self.remove_where(|key, block| key.tag.is_hit_by(what) && block.range.overlaps(range));
    }

    fn remove_of(&mut self, key: Key, range: Range) {
        // Entries of one key never overlap each other: only the one before the range can reach into it.
        let first = self.entries.range((key, 0)..=(key, range.first())).next_back();
        let first = first.filter(|(_, e)| e.block.range.overlaps(range)).map(|(slot, _)| *slot);
        let inside = self.entries.range((key, range.first())..=(key, range.last())).map(|(slot, _)| *slot);
        let gone: Vec<_> = first.into_iter().chain(inside).collect();
        for slot in gone {
            if let Some(entry) = self.entries.remove(&slot) {
                self.order.remove(&entry.age);
            }
        }
    }

    fn remove_where(&mut self, mut gone: impl FnMut(&Key, &Block) -> bool) {
        let order = &mut self.order;
        self.entries.retain(|(key, _), entry| {
            let keep = !gone(key, &entry.block);
            if !keep {
                order.remove(&entry.age);
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_arch::{StreamId, SubstreamId};

    fn key(substream: Option<u32>) -> Key {
        Key::of(&Initiator { substream: substream.map(SubstreamId), ..Initiator::new(StreamId(1)) })
    }

    fn block(at: u64, addr: u64, size_log2: u8, global: bool) -> Block {
        let (read, write) = (true, true);
        let t = AtsTranslation { addr, size_log2, read, write, execute: false, privileged: false, global };
        Block::new(at, t).unwrap()
    }

    #[test]
    fn a_block_translates_every_address_of_its_size() {
        let b = block(0x40_1234, 0x8020_0000, 21, false);
        assert_eq!((b.range.first(), b.range.last()), (0x40_0000, 0x5f_ffff));
        assert_eq!(b.translate(0x5f_fff0), (0x803f_fff0, 0x10));
        // The largest, at the top of the address space.
        let b = block(u64::MAX, 0, 63, false);
        assert_eq!((b.range.first(), b.range.last()), (1 << 63, u64::MAX));
        assert_eq!(b.translate(u64::MAX), (i64::MAX as u64, 1));
    }

    #[test]
    fn sizes_that_no_completion_can_carry_are_no_block() {
        for size_log2 in (0..12).chain(64..=255) {
            let t = AtsTranslation {
                addr: 0,
                size_log2,
                read: true,
                write: true,
                execute: false,
                privileged: false,
                global: false,
            };
            assert_eq!(Block::new(0x5000, t), None, "{size_log2}");
        }
    }

    #[test]
    fn a_new_block_takes_the_place_of_what_it_overlaps() {
        let mut c = Cache::new(8);
        for page in 0..4 {
            c.insert(key(None), block(page << 12, page << 12, 12, false));
        }
        c.insert(key(None), block(0, 0x20_0000, 13, false));
        assert_eq!(c.len(), 3);
        c.insert(key(None), block(0x1000, 0x1000, 12, false));
        assert_eq!(c.len(), 3, "the page replaces the block it lies in");
        assert_eq!(c.look_up(key(None), 0), None);
        assert_eq!(c.order.len(), c.entries.len());
    }

    #[test]
    fn the_oldest_goes_when_there_is_no_room() {
        let mut c = Cache::new(2);
        assert_eq!(c.insert(key(None), block(0, 0, 12, false)), 0);
        assert_eq!(c.insert(key(None), block(0x1000, 0, 12, false)), 0);
        assert_eq!(c.insert(key(None), block(0x2000, 0, 12, false)), 1);
        assert_eq!((c.len(), c.look_up(key(None), 0)), (2, None));
        assert!(c.look_up(key(None), 0x1000).is_some());
    }

    #[test]
    fn a_global_block_serves_every_substream_but_not_requests_without() {
        let mut c = Cache::new(8);
        c.insert(key(Some(3)), block(0, 0x9000, 12, true));
        assert!(c.look_up(key(Some(7)), 0).is_some());
        assert_eq!(c.look_up(key(None), 0), None);
        let untagged = AtcInvalidation::all_of(None);
        c.invalidate(&untagged, Range::ALL);
        assert_eq!(c.len(), 1);
        c.invalidate(&AtcInvalidation::all_of(Some(SubstreamId(9))), Range::ALL);
        assert_eq!(c.len(), 0);
    }

    #[test]
    fn an_invalidation_takes_its_substream_and_range_only() {
        let fill = || {
            let mut c = Cache::new(16);
            for tag in [None, Some(1), Some(2)] {
                c.insert(key(tag), block(0x1000, 0, 12, false));
                c.insert(key(tag), block(0x20_0000, 0, 21, false));
            }
            c
        };
        let left = |what: AtcInvalidation| {
            let mut c = fill();
            c.invalidate(&what, Range::around(what.addr, what.size_log2));
            [None, Some(1), Some(2)]
                .map(|t| (c.look_up(key(t), 0x1000).is_some(), c.look_up(key(t), 0x3f_ffff).is_some()))
        };
        let one = |addr, size_log2, global| {
            left(AtcInvalidation { substream: Some(SubstreamId(1)), global, addr, size_log2 })
        };
        let (all, none) = ((true, true), (false, false));
        assert_eq!(one(0x1000, 12, false), [all, (false, true), all]);
        assert_eq!(one(0x30_0000, 12, false), [all, (true, false), all], "a page of a block takes the block");
        assert_eq!(one(0, 64, false), [all, none, all]);
        assert_eq!(one(0, 64, true), [all, none, none]);
        assert_eq!(one(0, 255, false), [all, none, all]);
        assert_eq!(left(AtcInvalidation::all_of(None)), [none, all, all]);
    }
}
