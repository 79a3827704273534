//! A bounded, set-associative TLB with 16 bytes per entry.
//!
//! An entry's first word is its tag: the input address of its first byte with, in the twelve low bits that a page
//! address does not need, the number of a *(context, page size)* pair. The second word holds the output page, the
//! permissions, an index into a table of attributes and the global bit. Entries of one context share their pair
//! number per page size, so forgetting a whole address space means forgetting its numbers: constant time,
//! whatever the TLB holds. A lookup probes one set of four entries, one cache line of tags and data, per page
//! size that the context uses. Where only parts of a leaf could be kept, the size of that leaf belongs to the pair, so
//! that an invalidation by address finds all of them.

use crate::perms::Perms;
use crate::stage::canonical;
use crate::sync::Scope;

/// Ways of a set.
pub const WAYS: usize = 4;

/// Translation regimes that never share entries (IHI 0062D: StreamWorld in SMMUv3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Regime {
    /// EL1/EL0.
    Guest,
    /// Hyp (EL2).
    Hyp,
    /// EL2 with E2H, which has ASIDs and both halves of the address space.
    HypHost,
    /// Monitor (EL3).
    Monitor,
}

/// The stages that an entry of a context stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlbStage {
    /// Stage 1 only.
    Stage1,
    /// Stage 2 only: looked up by IPA.
    Stage2,
    /// Stage 1 and stage 2 in one.
    Combined,
}

/// What entries are tagged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ContextKey {
    /// Security state.
    pub secure: bool,
    /// Translation regime.
    pub regime: Regime,
    /// Stages.
    pub stage: TlbStage,
    /// VMID; 0 where the regime has none.
    pub vmid: u16,
    /// ASID; 0 where the regime has none.
    pub asid: u16,
    /// Input address bits that count: what the bus delivers, or 56 where the top byte is always ignored. Operands of
    /// invalidations are cut to them. With 64, entries are only filled for addresses whose top byte repeats bit 55.
    pub va_bits: u8,
}

impl ContextKey {
    /// An operand of an invalidation as the entries of this context are tagged: its top byte never counts.
    #[inline]
    fn operand(&self, va: u64) -> u64 {
        if self.va_bits >= 64 { canonical(va) } else { canonical(va) & ((1 << self.va_bits) - 1) }
    }
}

/// What a hit gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Output address of the byte asked for.
    pub pa: u64,
    /// Bytes from there to the end of the entry's page.
    pub left: u64,
    /// Permissions.
    pub perms: Perms,
    /// Index into the owner's attribute table.
    pub attrs: u8,
    /// log2 of the entry's page size.
    pub size_log2: u8,
    /// Global.
    pub global: bool,
}

#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set {
    tag: [u64; WAYS],
    data: [u64; WAYS],
}

/// What a walk found, for [`Tlb::fill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Output address of the page's first byte.
    pub page: u64,
    /// log2 of the page size.
    pub size_log2: u8,
    /// log2 of the size of the leaf that decides what an invalidation by address removes: larger than the page if only
    /// a part of that leaf could be kept (a stage 1 block over smaller stage 2 pages).
    pub leaf_log2: u8,
    /// What it allows.
    pub perms: Perms,
    /// Index into the owner's attribute table.
    pub attrs: u8,
    /// Global.
    pub global: bool,
}

impl Entry {
    /// True if the entry's fields hold it.
    #[inline]
    fn fits(&self) -> bool {
        let shift = self.size_log2;
        (12..=48).contains(&shift) && self.page >> 61 == 0 && self.page & ((1 << shift) - 1) == 0
    }
}

/// A page size in use by a context, and the size of the leaves that such pages are parts of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SizeId {
    shift: u8,
    leaf: u8,
    id: u16,
    /// Pages next to each other land in sets next to each other; contexts and sizes are spread by this.
    salt: u32,
}

impl SizeId {
    const fn new(shift: u8, leaf: u8, id: u16) -> Self {
        Self { shift, leaf, id, salt: (id as u32).wrapping_mul(0x9e37_79b1) }
    }
}

/// What a range takes from the pages of one number.
#[derive(Clone, Copy)]
struct Doomed {
    first: u64,
    last: u64,
    only_global: bool,
}

/// The last number that is given out.
const MAX_ID: u16 = 0xffe;
/// No entry has it.
const NO_ID: u16 = 0xfff;
/// Where a tag has the number.
const ID: u64 = 0xfff;
const SIZES: usize = 8;
/// An invalidation by address looks for at most this many (log2) parts of a leaf; if it has more, all parts of
/// such leaves are forgotten.
const PARTS_LOG2: u8 = 9;

/// The page sizes of one context.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    n: u8,
    ids: [SizeId; SIZES],
}

impl Default for Sizes {
    fn default() -> Self {
        Self { n: 0, ids: [SizeId::new(12, 12, NO_ID); SIZES] }
    }
}

impl Sizes {
    fn push(&mut self, size: SizeId) {
        if let Some(at) = self.ids.get_mut(usize::from(self.n)) {
            *at = size;
            self.n += 1;
        }
    }

    /// There are more than the first.
    #[inline(always)]
    pub(crate) fn are_several(&self) -> bool {
        self.n > 1
    }
}

struct Context {
    key: ContextKey,
    sizes: Sizes,
}

/// The TLB of one port.
pub struct Tlb {
    sets: Vec<Set>,
    contexts: Vec<Context>,
    next_id: u16,
    victim: u32,
    sets_log2: u32,
    epoch: u64,
}

/// Names a context inside the TLB until the next [`Tlb::clear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextIndex(u32);

const GLOBAL: u64 = 1 << 14;
const PA_SHIFT: u32 = 15;

impl Tlb {
    /// A TLB of at least `entries` entries, rounded up to a power of two of at least four. Memory is taken when the
    /// first entry is filled.
    pub fn new(entries: usize) -> Self {
        let sets = entries.clamp(WAYS, 1 << 24).div_ceil(WAYS).next_power_of_two();
        Self {
            sets: Vec::new(),
            contexts: Vec::new(),
            next_id: 1,
            victim: 0,
            sets_log2: sets.trailing_zeros(),
            epoch: 0,
        }
    }

    /// Number of entries it can hold.
    pub fn capacity(&self) -> usize {
        WAYS << self.sets_log2
    }

    /// Bytes of memory that a full TLB takes per entry, context tables left aside.
    pub const fn bytes_per_entry() -> usize {
        size_of::<Set>() / WAYS
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.contexts.clear();
        self.next_id = 1;
        self.sets.fill(Set::default());
        self.epoch += 1;
    }

    /// Changes whenever page sizes that [`sizes`](Tlb::sizes) or [`fill`](Tlb::fill) returned earlier must be asked for
    /// again, because their numbers may be given to others.
    #[inline]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Number of contexts known.
    pub fn contexts(&self) -> usize {
        self.contexts.len()
    }

    /// The index of `key`'s context, made if needed.
    pub fn context(&mut self, key: ContextKey) -> ContextIndex {
        let at = self.contexts.iter().position(|c| c.key == key).unwrap_or_else(|| {
            self.contexts.push(Context { key, sizes: Sizes::default() });
            self.contexts.len() - 1
        });
        ContextIndex(at as u32)
    }

    /// The page sizes of a context, for [`lookup`](Tlb::lookup).
    pub fn sizes(&self, context: ContextIndex) -> Sizes {
        self.contexts.get(context.0 as usize).map(|c| c.sizes).unwrap_or_default()
    }

    #[inline(always)]
    fn index(&self, va: u64, size: SizeId) -> usize {
        // There is a power of two of them.
        ((va >> size.shift) as usize).wrapping_add(size.salt as usize) & self.sets.len().wrapping_sub(1)
    }

    /// Looks `va` up in the page sizes of a context.
    pub fn lookup(&self, sizes: &Sizes, va: u64) -> Option<Hit> {
        sizes.ids.iter().take(usize::from(sizes.n)).find_map(|&size| self.probe(size, va))
    }

    /// Looks `va` up in the first page size of a context.
    #[inline(always)]
    pub(crate) fn lookup_first(&self, sizes: &Sizes, va: u64) -> Option<Hit> {
        // Without any it is one that no entry has.
        self.probe(sizes.ids[0], va)
    }

    /// Looks `va` up in the others, and makes the one that has it the first.
    pub(crate) fn lookup_rest(&self, sizes: &mut Sizes, va: u64) -> Option<Hit> {
        let all = sizes.ids.get_mut(..usize::from(sizes.n))?;
        let (at, hit) =
            all.iter().enumerate().skip(1).find_map(|(i, &size)| Some((i, self.probe(size, va)?)))?;
        all.swap(0, at);
        Some(hit)
    }

    // Inlined, because a hit that goes through memory costs more than finding it.
    #[inline(always)]
    fn probe(&self, size: SizeId, va: u64) -> Option<Hit> {
        let inside = (1u64 << size.shift) - 1;
        let tag = va & !inside | u64::from(size.id);
        let set = self.sets.get(self.index(va, size))?;
        // All ways are compared before the one branch: which way holds the page is as good as random.
        let matches = set.tag.iter().enumerate().fold(0u32, |m, (way, &t)| m | u32::from(t == tag) << way);
        if matches == 0 {
            return None;
        }
        let d = set.data[matches.trailing_zeros() as usize % WAYS];
        Some(Hit {
            pa: d >> PA_SHIFT << 12 | va & inside,
            left: inside + 1 - (va & inside),
            perms: Perms(d as u8 & 0x3f),
            attrs: (d >> 6) as u8,
            size_log2: size.shift,
            global: d & GLOBAL != 0,
        })
    }

    /// Fills an entry for the page around `va`. Returns the context's page sizes, which may have changed. A page
    /// below 4 KiB, a misaligned one or an address beyond 2^61 is not kept.
    pub fn fill(&mut self, context: ContextIndex, va: u64, entry: Entry) -> Sizes {
        let mut sizes = self.sizes(context);
        self.fill_with(context, &mut sizes, va, entry);
        sizes
    }

    /// [`fill`](Tlb::fill) for an owner that holds the context's page sizes, and whose copy is brought up to date.
    #[inline(always)]
    pub fn fill_with(&mut self, context: ContextIndex, sizes: &mut Sizes, va: u64, entry: Entry) {
        let leaf = entry.leaf_log2.min(63).max(entry.size_log2);
        let known = |s: &&SizeId| s.shift == entry.size_log2 && s.leaf == leaf;
        let size = match sizes.ids.iter().take(usize::from(sizes.n)).find(known) {
            Some(s) if entry.fits() => *s,
            _ => {
                let size = self.size_id(context, &entry);
                *sizes = self.sizes(context);
                match size {
                    Some(size) => size,
                    None => return,
                }
            }
        };
        if self.sets.is_empty() {
            self.sets = vec![Set::default(); 1 << self.sets_log2];
        }
        let tag = va & !((1u64 << size.shift) - 1) | u64::from(size.id);
        let data = entry.page >> 12 << PA_SHIFT
            | u64::from(entry.perms.0 & 0x3f)
            | u64::from(entry.attrs) << 6
            | if entry.global { GLOBAL } else { 0 };
        self.victim = self.victim.wrapping_add(1);
        let victim = self.victim as usize % WAYS;
        let index = self.index(va, size);
        if let Some(set) = self.sets.get_mut(index) {
            // The same tag again (after an upgrade of the leaf), a free way, or a victim.
            let bits = |want: u64| {
                set.tag.iter().enumerate().fold(0u32, |m, (way, &t)| m | u32::from(t == want) << way)
            };
            let way = match (bits(tag), bits(0)) {
                (0, 0) => victim,
                (0, free) => free.trailing_zeros() as usize,
                (same, _) => same.trailing_zeros() as usize,
            } % WAYS;
            set.tag[way] = tag;
            set.data[way] = data;
        }
    }

    fn size_id(&mut self, context: ContextIndex, entry: &Entry) -> Option<SizeId> {
        let (shift, leaf) = (entry.size_log2, entry.leaf_log2.min(63).max(entry.size_log2));
        if !entry.fits() {
            return None;
        }
        let at = context.0 as usize;
        let sizes = &self.contexts.get(at)?.sizes;
        let known = |s: &&SizeId| s.shift == shift && s.leaf == leaf;
        if let Some(s) = sizes.ids.iter().take(usize::from(sizes.n)).find(known) {
            return Some(*s);
        }
        if usize::from(sizes.n) == SIZES {
            return None;
        }
        if self.next_id > MAX_ID {
            // Numbers are used up: drop every entry and start over, keeping the contexts themselves.
            for c in &mut self.contexts {
                c.sizes = Sizes::default();
            }
            self.sets.fill(Set::default());
            self.next_id = 1;
            self.epoch += 1;
        }
        let id = self.next_id;
        self.next_id += 1;
        let c = self.contexts.get_mut(at)?;
        let size = SizeId::new(shift, leaf, id);
        c.sizes.push(size);
        Some(size)
    }

    /// Forgets the entries of all contexts in `scope`. With an ASID, global entries of that ASID go as well: removing
    /// more than was asked for is always allowed.
    pub fn forget_contexts(&mut self, scope: &Scope) {
        for c in &mut self.contexts {
            if scope.covers_but_asid(&c.key) && scope.covers_asid(&c.key) {
                // Its numbers are never looked up again; the entries die where they are.
                c.sizes = Sizes::default();
            }
        }
    }

    /// Forgets the entries of the contexts in `scope` whose leaf covers `va`; of other ASIDs only global ones.
    ///
    /// Software invalidates a block or a contiguous run by any one address in it, so every entry that holds a part of
    /// such a leaf goes, not only the part around `va`. True if a context gave up numbers for that, so that
    /// [`sizes`](Tlb::sizes) must be asked for again.
    pub fn forget_address(&mut self, scope: &Scope, va: u64) -> bool {
        let mut renumbered = false;
        for i in 0..self.contexts.len() {
            let Some(c) = self.contexts.get(i) else { continue };
            if !scope.covers_but_asid(&c.key) {
                continue;
            }
            let only_global = !scope.covers_asid(&c.key);
            let va = c.key.operand(va);
            let sizes = c.sizes;
            let mut kept = Sizes::default();
            for &size in sizes.ids.iter().take(usize::from(sizes.n)) {
                let parts_log2 = size.leaf - size.shift;
                if parts_log2 > PARTS_LOG2 {
                    continue;
                }
                kept.push(size);
                let first = va & !((1u64 << size.leaf) - 1);
                match parts_log2 {
                    0 => self.forget_page(va, size, only_global),
                    n => (0..1u64 << n)
                        .for_each(|p| self.forget_page(first | p << size.shift, size, only_global)),
                }
            }
            // A number that is left out is never looked up again.
            if let Some(c) = self.contexts.get_mut(i).filter(|_| kept.n != sizes.n) {
                c.sizes = kept;
                renumbered = true;
            }
        }
        renumbered
    }

    /// Forgets the entries of the contexts in `scope` whose leaf covers an address from `start` to `last`; of other ASIDs
    /// only global ones. Leaves smaller than `1 << granule_log2` bytes may stay. A `last` below `start` means the top.
    ///
    /// Costs one probe for each page that the range could hold, or one sweep through the TLB where that is less. Contexts
    /// keep their numbers.
    pub fn forget_range(&mut self, scope: &Scope, start: u64, last: u64, granule_log2: u8) {
        let length = last.checked_sub(start).unwrap_or(u64::MAX);
        if self.sets.is_empty() {
            return;
        }
        let mut pages = 0u64;
        let mut work: Vec<(SizeId, Doomed)> = Vec::new();
        for c in self.contexts.iter().filter(|c| scope.covers_but_asid(&c.key)) {
            let only_global = !scope.covers_asid(&c.key);
            let first = c.key.operand(start);
            // A range across bit 55 names both halves of an address space, and it does not wrap at the top.
            let last = match first.checked_add(length) {
                Some(last) if (first ^ last) >> 55 == 0 => last,
                _ => u64::MAX,
            };
            for &size in c.sizes.ids.iter().take(usize::from(c.sizes.n)) {
                if size.leaf < granule_log2 {
                    continue;
                }
                // A leaf goes as a whole.
                let below = (1u64 << size.leaf) - 1;
                let doomed = Doomed { first: first & !below, last: last | below, only_global };
                pages = pages.saturating_add((doomed.last - doomed.first) >> size.shift).saturating_add(1);
                work.push((size, doomed));
            }
        }
        if pages <= self.sets.len() as u64 {
            for (size, d) in work {
                let n = ((d.last - d.first) >> size.shift) + 1;
                for page in 0..n {
                    self.forget_page(d.first + (page << size.shift), size, d.only_global);
                }
            }
        } else {
            self.sweep(&work);
        }
    }

    /// Looks at every entry once.
    fn sweep(&mut self, work: &[(SizeId, Doomed)]) {
        let mut by_number: Vec<Option<Doomed>> = vec![None; usize::from(NO_ID) + 1];
        for (size, doomed) in work {
            if let Some(at) = by_number.get_mut(usize::from(size.id)) {
                *at = Some(*doomed);
            }
        }
        for set in &mut self.sets {
            for way in 0..WAYS {
                let (va, id) = (set.tag[way] & !ID, set.tag[way] & ID);
                let Some(Some(d)) = by_number.get(id as usize) else { continue };
                if (d.first..=d.last).contains(&va) && (!d.only_global || set.data[way] & GLOBAL != 0) {
                    set.tag[way] = 0;
                }
            }
        }
    }

    #[inline]
    fn forget_page(&mut self, va: u64, size: SizeId, only_global: bool) {
        let tag = va & !((1u64 << size.shift) - 1) | u64::from(size.id);
        let index = self.index(va, size);
        let Some(set) = self.sets.get_mut(index) else { return };
        for way in 0..WAYS {
            if set.tag[way] == tag && (!only_global || set.data[way] & GLOBAL != 0) {
                set.tag[way] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::StageScope;

    const KEY: ContextKey = ContextKey {
        secure: false,
        regime: Regime::Guest,
        stage: TlbStage::Stage1,
        vmid: 0,
        asid: 1,
        va_bits: 49,
    };
    const SCOPE: Scope = Scope {
        secure: false,
        regime: Some(Regime::Guest),
        vmid: Some(0),
        asid: Some(1),
        stages: StageScope::All,
    };

    fn entry(page: u64, size_log2: u8, perms: Perms, attrs: u8, global: bool) -> Entry {
        Entry { page, size_log2, leaf_log2: size_log2, perms, attrs, global }
    }

    fn get(t: &Tlb, c: ContextIndex, va: u64) -> Option<u64> {
        t.lookup(&t.sizes(c), va).map(|h| h.pa)
    }

    #[test]
    fn entries_take_sixteen_bytes() {
        assert_eq!(Tlb::bytes_per_entry(), 16);
    }

    #[test]
    fn pages_of_several_sizes_live_together() {
        let mut t = Tlb::new(64);
        let c = t.context(KEY);
        t.fill(c, 0x1234, entry(0x8000, 12, Perms::ALL, 3, false));
        t.fill(c, 0x40_0000, entry(0x1_0020_0000, 21, Perms(1), 9, true));
        assert_eq!(get(&t, c, 0x1fff), Some(0x8fff));
        let h = t.lookup(&t.sizes(c), 0x5f_fffe).unwrap();
        assert_eq!((h.pa, h.left, h.perms, h.attrs, h.global), (0x1_003f_fffe, 2, Perms(1), 9, true));
        assert_eq!(get(&t, c, 0x2000), None);
        assert_eq!(get(&t, c, 0x60_0000), None);
    }

    #[test]
    fn invalidation_by_address_hits_any_byte_of_the_page_and_nothing_else() {
        let mut t = Tlb::new(64);
        let c = t.context(KEY);
        t.fill(c, 0x40_0000, entry(0x20_0000, 21, Perms::ALL, 0, false));
        t.fill(c, 0x1000, entry(0x8000, 12, Perms::ALL, 0, false));
        t.forget_address(&SCOPE, 0x5f_f000);
        assert_eq!(get(&t, c, 0x40_0000), None);
        assert_eq!(get(&t, c, 0x1000), Some(0x8000));
        t.forget_address(&Scope { asid: Some(2), ..SCOPE }, 0x1000);
        assert_eq!(get(&t, c, 0x1000), Some(0x8000), "another ASID, not global");
        t.forget_address(&Scope { vmid: Some(9), ..SCOPE }, 0x1000);
        assert_eq!(get(&t, c, 0x1000), Some(0x8000), "another VMID");
    }

    #[test]
    fn global_entries_go_with_an_invalidation_of_any_asid() {
        let mut t = Tlb::new(64);
        let c = t.context(KEY);
        t.fill(c, 0x1000, entry(0x8000, 12, Perms::ALL, 0, true));
        t.forget_address(&Scope { asid: Some(2), ..SCOPE }, 0x1000);
        assert_eq!(get(&t, c, 0x1000), None);
    }

    #[test]
    fn forgetting_a_context_leaves_the_others() {
        let mut t = Tlb::new(64);
        let (a, b) = (t.context(KEY), t.context(ContextKey { asid: 2, ..KEY }));
        t.fill(a, 0x1000, entry(0x8000, 12, Perms::ALL, 0, false));
        t.fill(b, 0x1000, entry(0x9000, 12, Perms::ALL, 0, false));
        t.forget_contexts(&SCOPE);
        assert_eq!((get(&t, a, 0x1000), get(&t, b, 0x1000)), (None, Some(0x9000)));
    }

    #[test]
    fn numbers_of_contexts_never_come_back_to_life() {
        let mut t = Tlb::new(64);
        let c = t.context(KEY);
        for i in 0..3 * u64::from(MAX_ID) {
            t.fill(c, 0x1000, entry((i + 1) << 12, 12, Perms::ALL, 0, false));
            assert_eq!(get(&t, c, 0x1000), Some((i + 1) << 12));
            t.forget_contexts(&SCOPE);
            assert_eq!(get(&t, c, 0x1000), None);
        }
    }

    #[test]
    fn it_is_bounded_and_holds_its_capacity_of_neighbouring_pages() {
        let mut t = Tlb::new(1024);
        let c = t.context(KEY);
        for i in 0..1024u64 {
            t.fill(c, i << 12, entry((i + 7) << 12, 12, Perms::ALL, 0, false));
        }
        assert!((0..1024u64).all(|i| get(&t, c, i << 12) == Some((i + 7) << 12)));
        for i in 1024..8192u64 {
            t.fill(c, i << 12, entry((i + 7) << 12, 12, Perms::ALL, 0, false));
        }
        let held = (0..8192u64).filter(|&i| get(&t, c, i << 12).is_some()).count();
        assert_eq!((held, t.capacity()), (1024, 1024));
    }

    #[test]
    fn an_invalidation_removes_every_part_of_the_leaf_it_names() {
        for (leaf_log2, kept) in [(16, true), (21, true), (30, false), (34, false)] {
            let mut t = Tlb::new(4096);
            let c = t.context(KEY);
            let part = Entry { leaf_log2, ..entry(0x8000, 12, Perms::ALL, 0, false) };
            let parts = [0u64, 3, 15].map(|p| 0x4_0000_0000 + (p << 12));
            for va in parts {
                t.fill(c, va, part);
            }
            t.fill(c, 0x9_0000_0000, part);
            t.fill(c, 0x9_0000_1000, entry(0x9000, 12, Perms::ALL, 0, false));
            t.forget_address(&SCOPE, 0x4_0000_1000);
            for va in parts {
                assert_eq!(get(&t, c, va), None, "a part of a leaf of 2^{leaf_log2} bytes");
            }
            assert_eq!(get(&t, c, 0x9_0000_0000).is_some(), kept, "a part of another leaf");
            assert_eq!(get(&t, c, 0x9_0000_1000), Some(0x9000), "a whole page elsewhere");
        }
    }

    #[test]
    fn what_does_not_fit_an_entry_is_not_kept() {
        let mut t = Tlb::new(64);
        let c = t.context(KEY);
        let bad = [(0x8000, 11), (0, 49), (0, 255), (1 << 61, 12), (0x8000, 21), (0x8001, 12)];
        for (page, size_log2) in bad {
            t.fill(c, 0x1000, entry(page, size_log2, Perms(0xff), 0, false));
            assert_eq!(get(&t, c, 0x1000), None);
        }
        t.fill(c, 0x1000, entry(0x8000, 12, Perms(0xff), 1, false));
        let hit = t.lookup(&t.sizes(c), 0x1000).unwrap();
        assert_eq!((hit.perms, hit.attrs, hit.global), (Perms::ALL, 1, false));
    }
}
