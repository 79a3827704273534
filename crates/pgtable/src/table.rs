//! The table itself: making, reading and dropping it, and the walk that map, unmap and protect share.

use core::sync::atomic::{AtomicU64, Ordering, fence};

use portcullis_arch::Pa;
use portcullis_hal::{Block, DmaMemory};

use crate::geometry::{Geometry, LAST, SYNCED, TABLE, VALID};
use crate::stage::InputAddress;
use crate::{Config, ConfigError, Flush, Stage, UnmapError};

/// Smallest alignment of a first table: a table smaller than that shares no cache line and satisfies every TTBR.
const MIN_TABLE: u64 = 64;
/// Descriptors that are loaded at once.
pub(crate) const CHUNK: usize = 64;
/// The same for short runs, which should not pay for room that they do not need.
const SHORT: usize = 16;

/// A page table of stage `S` in memory `M`.
///
/// # Callers at the same time
///
/// All calls but [`free_empty_tables`](Self::free_empty_tables) take `&self`, take no lock, and may run at the same
/// time on **disjoint ranges**, also inside of one table. This is what an address allocator gives, and what Linux's
/// io-pgtable asks for. When ranges overlap, the caller broke the contract and this happens:
///
/// - map with map: one of them gets [`MapError::AlreadyMapped`](crate::MapError) or
///   [`MapError::Raced`](crate::MapError), or both succeed and at each page the last writer wins. Tables are
///   installed by compare-and-swap, so none is lost and none freed twice.
/// - unmap with unmap: every entry is counted by at least one of them, tables are detached by compare-and-swap, so
///   none is freed twice.
/// - unmap with map, protect or lookup: what each sees is unspecified, and when the unmapped range covers a whole
///   table, the other call may still use that table's memory after it has been freed. In Rust's sense this is safe
///   (accesses go through [`DmaMemory`]); for the machine it is not. Do not do it.
///
/// # Which tables exist
///
/// Tables come with the mappings that need them. [`unmap`](Self::unmap) frees a table when its range covers all that
/// the table translates; a table that became empty piece by piece stays (another caller may be using it) and is used
/// again by later mappings, which then cannot use a block in its place. Whoever has the table alone can call
/// [`free_empty_tables`](Self::free_empty_tables). Dropping the page table frees everything; it must not be in use
/// by hardware then.
#[derive(Debug)]
pub struct PageTable<S: Stage, M: DmaMemory> {
    pub(crate) mem: M,
    pub(crate) geometry: Geometry,
    pub(crate) root: Pa,
    pub(crate) coherent: bool,
    tops: Tops,
    config: Config<S>,
}

/// Where the tables above the last level were found: a page's entry is then two loads away and not four. Read by all callers, and
/// written when a range of addresses is used for the first time (1 GiB with 4K pages), so that callers that map at the same time share
/// it without writing it.
#[derive(Debug, Default)]
struct Tops {
    /// Address bits above such a table, plus one, in bits 63:40; its address without bits 11:0 below.
    words: [AtomicU64; TOPS],
    /// Times that words were cleared, because tables are going to be freed.
    clears: AtomicU64,
}

/// Ranges that are remembered.
const TOPS: usize = 8;
const TOP_ADDRESS: u64 = (1 << 40) - 1;

impl Tops {
    #[inline]
    fn word(&self, key: u64) -> &AtomicU64 {
        &self.words[(key % TOPS as u64) as usize]
    }
    #[inline]
    fn get(&self, key: u64) -> Option<u64> {
        let word = self.word(key).load(Ordering::Acquire);
        (word >> 40 == key + 1).then_some((word & TOP_ADDRESS) << 12)
    }
    fn clears(&self) -> u64 {
        self.clears.load(Ordering::SeqCst)
    }
    /// Remembers a table that was found after [`clears`](Self::clears) gave `clears`.
    fn set(&self, key: u64, table: u64, clears: u64) {
        let word = self.word(key);
        word.store((key + 1) << 40 | table >> 12, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if self.clears() != clears {
            // Perhaps it is being freed: whoever clears may have been here before.
            word.store(0, Ordering::SeqCst);
        }
    }
    /// Forgets everything: what was detached is going to be freed.
    fn clear(&self) {
        self.clears.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        for word in &self.words {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// What an input address translates to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<S: Stage> {
    /// Output address of exactly the address asked for.
    pub pa: Pa,
    /// What is allowed.
    pub prot: crate::Prot<S>,
    /// Bytes that the page or block covers.
    pub page_size: u64,
    /// Level of the leaf, 1 to 3.
    pub level: u8,
    /// The leaf as it is in memory.
    pub descriptor: u64,
}

/// An entry that a walk stopped at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Where it is.
    pub pa: Pa,
    pub level: u32,
    pub value: u64,
}

impl<S: Stage, M: DmaMemory> PageTable<S, M> {
    /// Makes an empty table; allocates its first level.
    pub fn new(mem: M, config: Config<S>) -> Result<Self, ConfigError> {
        let geometry = Geometry::new(&config)?;
        let bytes = geometry.root_len().max(MIN_TABLE);
        let no_memory = ConfigError::NoMemory { bytes };
        let len = usize::try_from(bytes).map_err(|_| no_memory)?;
        let block = mem.alloc(len, len).ok_or(no_memory)?;
        let (pa, bits) = (block.pa.get(), config.output_bits);
        if !geometry.puts_out(pa, bytes) {
            mem.free(block);
            return Err(ConfigError::TableAddress { pa, bits });
        }
        if !config.coherent_walk {
            mem.clean(block.pa, len);
        }
        mem.wmb();
        Ok(Self {
            mem,
            geometry,
            root: block.pa,
            coherent: config.coherent_walk,
            tops: Tops::default(),
            config,
        })
    }

    /// Address of the first table (the first of several side by side, if concatenated).
    pub fn root(&self) -> Pa {
        self.root
    }

    /// What the hardware has to be told: [`Stage1Registers`](crate::Stage1Registers) or
    /// [`Stage2Registers`](crate::Stage2Registers).
    pub fn registers(&self) -> S::Registers {
        S::registers(&self.config, &self.geometry, self.root)
    }

    /// What the table was made from.
    pub fn config(&self) -> &Config<S> {
        &self.config
    }

    /// The memory the tables are in.
    pub fn memory(&self) -> &M {
        &self.mem
    }

    /// The level that a walk starts at, 0 to 3.
    pub fn start_level(&self) -> u8 {
        self.geometry.start as u8
    }

    /// First and last input address.
    pub fn input_range(&self) -> (S::Input, S::Input) {
        let (first, last) = self.geometry.limits();
        (first.into(), last.into())
    }

    /// The page and block sizes as a bit map: bit n for 2^n bytes (Linux `pgsize_bitmap`).
    pub fn page_sizes(&self) -> u64 {
        (self.geometry.first_leaf..=LAST).map(|level| self.geometry.size(level)).sum()
    }

    /// What `iova` translates to. Any byte address; `None` if unmapped or outside of the table.
    pub fn lookup(&self, iova: S::Input) -> Option<Mapping<S>> {
        let g = &self.geometry;
        let offset = self.offset(iova);
        if !g.contains(offset, 1) {
            return None;
        }
        let entry = self.leaf_entry(offset);
        if entry.value & VALID == 0 {
            return None;
        }
        let page_size = g.size(entry.level);
        Some(Mapping {
            pa: Pa(g.output(entry.level, entry.value) | (offset & (page_size - 1))),
            prot: S::prot(entry.value),
            page_size,
            level: entry.level as u8,
            descriptor: entry.value,
        })
    }

    /// Number of tables there are, the first level counted as one. Reads all tables.
    pub fn table_count(&self) -> usize {
        let mut count = 0;
        self.for_each_table(self.root.get(), self.geometry.start, &mut |_, _| count += 1);
        count
    }

    /// Frees tables without any mapping. The exclusive borrow is what makes this safe: nobody can be about to use one.
    /// Returns how many there were.
    pub fn free_empty_tables(&mut self, flush: &mut impl Flush) -> usize {
        self.tops.clear();
        let mut freed = 0;
        self.prune(self.root.get(), self.geometry.start, 0, flush, &mut freed);
        freed
    }

    /// Frees empty tables below `table`; true if nothing is left in it.
    fn prune(&self, table: u64, level: u32, offset: u64, flush: &mut impl Flush, freed: &mut usize) -> bool {
        let g = &self.geometry;
        let mut empty = true;
        for index in 0..g.entries(level) {
            let entry = Pa(table + index * 8);
            let value = self.mem.load64(entry);
            if value & VALID == 0 {
                continue;
            }
            let below = offset + (index << g.shift(level));
            if g.is_table(level, value) && self.prune(g.next(value), level + 1, below, flush, freed) {
                self.mem.store64(entry, 0);
                self.publish(entry, 1);
                self.mem.wmb();
                flush.table(self.input(below), g.size(level));
                self.free_table(g.next(value));
                *freed += 1;
            } else {
                empty = false;
            }
        }
        empty
    }

    /// Distance from the first input address; past the end for addresses of no use.
    #[inline]
    pub(crate) fn offset(&self, iova: S::Input) -> u64 {
        iova.get().wrapping_sub(self.geometry.base)
    }

    /// The input address at an offset.
    #[inline]
    pub(crate) fn input(&self, offset: u64) -> u64 {
        offset.wrapping_add(self.geometry.base)
    }

    /// Checks a range that is to be unmapped or protected; gives its offset.
    #[inline]
    pub(crate) fn check_range(&self, iova: S::Input, len: u64) -> Result<u64, UnmapError> {
        let g = &self.geometry;
        let offset = self.offset(iova);
        let iova = iova.get();
        if (offset | len) & g.page_mask != 0 || len == 0 {
            return Err(UnmapError::Unaligned { iova, len, granule: g.granule() });
        }
        if !g.contains(offset, len) {
            let (first, last) = g.limits();
            return Err(UnmapError::InputRange { iova, len, first, last });
        }
        Ok(offset)
    }

    /// Walks to the leaf or the invalid entry that decides about `offset`.
    #[inline]
    pub(crate) fn leaf_entry(&self, offset: u64) -> Entry {
        let g = &self.geometry;
        let mut table = self.root.get();
        let mut level = g.start;
        loop {
            let pa = Pa(table + g.index(level, offset) * 8);
            let value = self.mem.load64(pa);
            if !g.is_table(level, value) {
                return Entry { pa, level, value };
            }
            table = g.next(value);
            level += 1;
        }
    }

    /// Loads `count` entries from `entry` on and hands them over in order, as many at a time as are convenient, with the index of
    /// the first. Stops when `each` gives an error.
    #[inline]
    pub(crate) fn each_chunk<E>(
        &self,
        entry: Pa,
        count: u64,
        mut each: impl FnMut(u64, &[u64]) -> Result<(), E>,
    ) -> Result<(), E> {
        if count <= SHORT as u64 {
            let mut words = [0; SHORT];
            let words = &mut words[..count as usize];
            self.mem.load_run(entry, words);
            return each(0, words);
        }
        let mut words = [0; CHUNK];
        let mut done = 0;
        while done < count {
            let chunk = ((count - done) as usize).min(CHUNK);
            let words = &mut words[..chunk];
            self.mem.load_run(entry.wrapping_add(done * 8), words);
            each(done, words)?;
            done += chunk as u64;
        }
        Ok(())
    }

    /// The straight way to a page's entry, where tables lead all the way to the last level and a walker is known to
    /// see them. `None` says nothing but that the long way has to be taken.
    #[inline(always)]
    pub(crate) fn page_entry(&self, offset: u64) -> Option<Pa> {
        let g = &self.geometry;
        if g.root_shift < g.top_shift {
            return self.descend(self.root.get() + (offset >> g.root_shift) * 8, g.root_shift, offset);
        }
        let table = match self.tops.get(offset >> g.top_shift) {
            Some(table) => table,
            None => self.find_top(offset)?,
        };
        let above = table + ((offset >> g.table_shift) & g.index_mask) * 8;
        self.below(above, g.table_shift, offset).map(|(entry, _)| Pa(entry))
    }

    /// From an entry that translates 2^shift bytes down to the page's.
    #[inline(never)]
    fn descend(&self, mut pa: u64, mut shift: u32, offset: u64) -> Option<Pa> {
        let g = &self.geometry;
        while shift > g.granule_log2 {
            (pa, shift) = self.below(pa, shift, offset)?;
        }
        Some(Pa(pa))
    }

    /// One level down, if a table is there that a walker is known to see.
    #[inline(always)]
    fn below(&self, pa: u64, shift: u32, offset: u64) -> Option<(u64, u32)> {
        let g = &self.geometry;
        let wanted = if self.coherent { TABLE } else { TABLE | SYNCED };
        let value = self.mem.load64(Pa(pa));
        let shift = shift - g.stride;
        (value & wanted == wanted)
            .then(|| ((value & g.next_mask) + ((offset >> shift) & g.index_mask) * 8, shift))
    }

    /// Walks to the table above the last level, and remembers it.
    #[cold]
    #[inline(never)]
    fn find_top(&self, offset: u64) -> Option<u64> {
        let g = &self.geometry;
        let clears = self.tops.clears();
        let mut shift = g.root_shift;
        let mut pa = self.root.get() + (offset >> shift) * 8;
        while shift >= g.top_shift {
            (pa, shift) = self.below(pa, shift, offset)?;
        }
        let table = pa - ((offset >> shift) & g.index_mask) * 8;
        self.tops.set(offset >> g.top_shift, table, clears);
        Some(table)
    }

    /// Tables above the last level have been detached and are going to be freed.
    pub(crate) fn forget_tops(&self) {
        self.tops.clear();
    }

    /// Refuses a range that cuts a block at its start or at its end.
    pub(crate) fn check_cut(&self, offset: u64, end: u64) -> Result<(), UnmapError> {
        for at in [offset, end - 1] {
            let entry = self.leaf_entry(at);
            let size = self.geometry.size(entry.level);
            let block = at & !(size - 1);
            if entry.value & VALID != 0 && (block < offset || end - block < size) {
                return Err(self.partial(block, size));
            }
        }
        Ok(())
    }

    /// The error for a block at an offset.
    #[cold]
    pub(crate) fn partial(&self, block: u64, size: u64) -> UnmapError {
        UnmapError::PartialBlock { block: self.input(block), size }
    }

    /// Makes `count` stored descriptors visible to a walker that does not snoop. A barrier has to follow.
    #[inline]
    pub(crate) fn publish(&self, entry: Pa, count: u64) {
        if !self.coherent {
            self.mem.clean(entry, (count * 8) as usize);
        }
    }

    /// Gives a table that is not the first one back.
    pub(crate) fn free_table(&self, table: u64) {
        self.mem.free(Block { pa: Pa(table), len: self.geometry.table_len() as usize });
    }

    /// Visits a table and all below it, lowest first.
    pub(crate) fn for_each_table(&self, table: u64, level: u32, visit: &mut impl FnMut(u64, u32)) {
        let g = &self.geometry;
        if level < LAST {
            for index in 0..g.entries(level) {
                let value = self.mem.load64(Pa(table + index * 8));
                if g.is_table(level, value) {
                    self.for_each_table(g.next(value), level + 1, visit);
                }
            }
        }
        visit(table, level);
    }
}

impl<S: Stage, M: DmaMemory> Drop for PageTable<S, M> {
    fn drop(&mut self) {
        let root = self.root.get();
        self.for_each_table(root, self.geometry.start, &mut |table, _| {
            if table != root {
                self.free_table(table);
            }
        });
        self.mem.free(Block { pa: self.root, len: self.geometry.root_len().max(MIN_TABLE) as usize });
    }
}
