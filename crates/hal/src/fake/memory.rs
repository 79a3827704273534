//! Physical memory with a CPU's view and a device's view.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use portcullis_arch::Pa;
use spin::Mutex;

use crate::{Block, DmaMemory};

/// Bytes of a cache line.
const LINE: u64 = 64;
const WORDS_PER_LINE: usize = 8;
/// What a device finds in a block that the CPU has not written back: looks like a valid descriptor on purpose.
const GARBAGE: u64 = 0x5a5a_5a5a_5a5a_5a5b;

const LIVE: u8 = 1;
const FREED: u8 = 2;

/// A heap in physical memory, for tests. Four kinds:
///
/// | Kind | A CPU's store reaches devices |
/// |---|---|
/// | [`plain`](Self::plain) | at once |
/// | [`reordering`](Self::reordering) | some time later, in any order; all of them at the next `wmb` |
/// | [`non_coherent`](Self::non_coherent) | when its line is cleaned and a `wmb` follows |
/// | [`non_coherent_reordering`](Self::non_coherent_reordering) | when a cache evicts the line, which may be at any time; surely when its line is cleaned and a `wmb` follows |
///
/// "Any order" is pseudo-random from a seed; stores to one word stay in order. In all but the plain kind a new block
/// holds garbage in the devices' view until its zeroes have been made visible. A device's store reaches the CPU at
/// once when coherent, and otherwise when the CPU invalidates the line. Freed blocks are reused as late as possible.
pub struct FakeMemory {
    base: u64,
    cpu: Box<[AtomicU64]>,
    /// The devices' view; empty if it is the CPU's.
    device: Box<[AtomicU64]>,
    /// Per line: never used, live or freed.
    state: Box<[AtomicU8]>,
    coherent: bool,
    buffers: Mutex<Buffers>,
    heap: Mutex<Heap>,
    after_free: AtomicUsize,
    stray: AtomicUsize,
}

/// What lies between the CPU and memory.
struct Buffers {
    /// Stores (by word index) on their way, in program order.
    pending: VecDeque<(usize, u64)>,
    /// Lines that only the CPU's cache has.
    dirty: BTreeSet<usize>,
    /// State of the generator, if things happen by themselves.
    random: Option<u64>,
}

struct Heap {
    next: u64,
    live: BTreeMap<u64, usize>,
    freed: VecDeque<Block>,
    allocations: usize,
    /// How many more allocations succeed.
    budget: Option<usize>,
    bad_frees: usize,
}

impl FakeMemory {
    /// Memory that the CPU and devices see alike. `base` and `len` in bytes, multiples of 64.
    pub fn plain(base: u64, len: usize) -> Self {
        Self::build(base, len, true, false, None)
    }

    /// Coherent memory behind a store buffer that writes in any order.
    pub fn reordering(base: u64, len: usize, seed: u64) -> Self {
        Self::build(base, len, true, true, Some(seed))
    }

    /// Memory behind a CPU cache that devices do not snoop and that evicts nothing by itself.
    pub fn non_coherent(base: u64, len: usize) -> Self {
        Self::build(base, len, false, true, None)
    }

    /// Memory behind a CPU cache that devices do not snoop and that evicts lines when it likes.
    pub fn non_coherent_reordering(base: u64, len: usize, seed: u64) -> Self {
        Self::build(base, len, false, true, Some(seed))
    }

    fn build(base: u64, len: usize, coherent: bool, two_views: bool, seed: Option<u64>) -> Self {
        let base = base.next_multiple_of(LINE);
        let words = len / LINE as usize * WORDS_PER_LINE;
        let view = |n| (0..n).map(|_| AtomicU64::new(0)).collect();
        Self {
            base,
            cpu: view(words),
            device: view(if two_views { words } else { 0 }),
            state: (0..words / WORDS_PER_LINE).map(|_| AtomicU8::new(0)).collect(),
            coherent,
            buffers: Mutex::new(Buffers {
                pending: VecDeque::new(),
                dirty: BTreeSet::new(),
                random: seed.map(|s| s.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            }),
            heap: Mutex::new(Heap {
                next: base,
                live: BTreeMap::new(),
                freed: VecDeque::new(),
                allocations: 0,
                budget: None,
                bad_frees: 0,
            }),
            after_free: AtomicUsize::new(0),
            stray: AtomicUsize::new(0),
        }
    }

    /// Lets `n` more allocations succeed and all later ones fail.
    pub fn fail_after(&self, n: usize) {
        self.heap.lock().budget = Some(n);
    }

    /// Lets allocations succeed again while there is room.
    pub fn fail_never(&self) {
        self.heap.lock().budget = None;
    }

    /// Allocations that succeeded so far.
    pub fn allocations(&self) -> usize {
        self.heap.lock().allocations
    }

    /// Blocks that have not been given back.
    pub fn outstanding(&self) -> usize {
        self.heap.lock().live.len()
    }

    /// Blocks given back twice, or that were never given out.
    pub fn bad_frees(&self) -> usize {
        self.heap.lock().bad_frees
    }

    /// Accesses, by the CPU or a device, to memory that had been freed.
    pub fn uses_after_free(&self) -> usize {
        self.after_free.load(Ordering::Relaxed)
    }

    /// Accesses outside of this memory, or misaligned.
    pub fn stray_accesses(&self) -> usize {
        self.stray.load(Ordering::Relaxed)
    }

    /// Panics unless everything has been given back and nothing has been misused.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.outstanding(), 0, "blocks leaked");
        assert_eq!(self.bad_frees(), 0, "blocks freed that were not allocated");
        assert_eq!(self.uses_after_free(), 0, "freed blocks used");
        assert_eq!(self.stray_accesses(), 0, "accesses outside of memory");
    }

    /// Loads an aligned word as a device or a walker sees it. In the reordering kinds, things may happen just before.
    pub fn device_load64(&self, pa: Pa) -> u64 {
        let Some(index) = self.index(pa) else { return 0 };
        if self.device.is_empty() {
            return self.cpu[index].load(Ordering::Acquire);
        }
        let mut buffers = self.buffers.lock();
        self.happen(&mut buffers);
        self.device[index].load(Ordering::Relaxed)
    }

    /// Stores an aligned word as a device does.
    pub fn device_store64(&self, pa: Pa, value: u64) {
        let Some(index) = self.index(pa) else { return };
        let _ordered = self.buffers.lock();
        if self.coherent {
            self.cpu[index].store(value, Ordering::Release);
        }
        if let Some(word) = self.device.get(index) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Reads bytes as a device sees them.
    pub fn device_read(&self, pa: Pa, buf: &mut [u8]) {
        for_words(pa, buf.len(), |word, at, range| {
            let bytes = self.device_load64(word).to_le_bytes();
            buf[range.clone()].copy_from_slice(&bytes[at..at + range.len()]);
        });
    }

    /// Writes bytes as a device does.
    pub fn device_write(&self, pa: Pa, buf: &[u8]) {
        for_words(pa, buf.len(), |word, at, range| {
            let mut bytes = self.device_load64(word).to_le_bytes();
            bytes[at..at + range.len()].copy_from_slice(&buf[range]);
            self.device_store64(word, u64::from_le_bytes(bytes));
        });
    }

    /// The index of an aligned word of this memory; counts what is not one, and what has been freed.
    fn index(&self, pa: Pa) -> Option<usize> {
        let offset = pa.get().wrapping_sub(self.base);
        if !offset.is_multiple_of(8) || offset / 8 >= self.cpu.len() as u64 {
            self.stray.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let index = (offset / 8) as usize;
        if self.state[index / WORDS_PER_LINE].load(Ordering::Relaxed) == FREED {
            self.after_free.fetch_add(1, Ordering::Relaxed);
        }
        Some(index)
    }

    /// The lines that `[pa, pa + len)` touches, cut to this memory.
    fn lines(&self, pa: Pa, len: usize) -> core::ops::Range<usize> {
        let start = pa.get().wrapping_sub(self.base);
        if len == 0 || start >= self.cpu.len() as u64 * 8 {
            return 0..0;
        }
        let end = start.saturating_add(len as u64).div_ceil(LINE).min(self.state.len() as u64);
        (start / LINE) as usize..end as usize
    }

    /// Notes that the CPU has stored a word.
    fn stored(&self, buffers: &mut Buffers, index: usize, value: u64) {
        if self.coherent {
            buffers.pending.push_back((index, value));
        } else {
            buffers.dirty.insert(index / WORDS_PER_LINE);
        }
    }

    /// Lets a few things happen by themselves.
    fn happen(&self, buffers: &mut Buffers) {
        while let Some(random) = buffers.next_random() {
            if random & 1 == 0 && !buffers.pending.is_empty() {
                let chosen = (random >> 1) as usize % buffers.pending.len();
                let word = buffers.pending[chosen].0;
                // The oldest store to that word goes first.
                if let Some(oldest) = buffers.pending.iter().position(|&(index, _)| index == word)
                    && let Some((index, value)) = buffers.pending.remove(oldest)
                {
                    self.device[index].store(value, Ordering::Relaxed);
                }
            }
            if random >> 32 & 3 == 0 && !buffers.dirty.is_empty() {
                let chosen = (random >> 40) as usize % buffers.dirty.len();
                if let Some(line) = buffers.dirty.iter().nth(chosen).copied() {
                    self.settle(buffers, line);
                    buffers.dirty.remove(&line);
                    for index in words_of(line) {
                        self.device[index].store(self.cpu[index].load(Ordering::Relaxed), Ordering::Relaxed);
                    }
                }
            }
            if random >> 62 != 0 {
                break;
            }
        }
    }

    /// Performs the stores to a line that are on their way.
    fn settle(&self, buffers: &mut Buffers, line: usize) {
        buffers.pending.retain(|&(index, value)| {
            let elsewhere = index / WORDS_PER_LINE != line;
            if !elsewhere {
                self.device[index].store(value, Ordering::Relaxed);
            }
            elsewhere
        });
    }

    /// The CPU's store of a word, `None` for one that fails.
    fn update<T>(&self, index: usize, store: impl FnOnce(&AtomicU64) -> (Option<u64>, T)) -> T {
        if self.device.is_empty() {
            return store(&self.cpu[index]).1;
        }
        let mut buffers = self.buffers.lock();
        let (value, result) = store(&self.cpu[index]);
        if let Some(value) = value {
            self.stored(&mut buffers, index, value);
        }
        self.happen(&mut buffers);
        result
    }

    /// Prepares the lines of a new block.
    fn give_out(&self, block: Block) {
        let mut buffers = self.buffers.lock();
        for line in self.lines(block.pa, block.len) {
            self.state[line].store(LIVE, Ordering::Relaxed);
            if !self.device.is_empty() {
                self.settle(&mut buffers, line);
            }
            for index in words_of(line) {
                self.cpu[index].store(0, Ordering::Release);
                if let Some(word) = self.device.get(index) {
                    word.store(GARBAGE, Ordering::Relaxed);
                    self.stored(&mut buffers, index, 0);
                }
            }
        }
    }
}

impl Buffers {
    fn next_random(&mut self) -> Option<u64> {
        let mut x = self.random?;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random = Some(x);
        Some(x.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }
}

fn words_of(line: usize) -> core::ops::Range<usize> {
    line * WORDS_PER_LINE..(line + 1) * WORDS_PER_LINE
}

/// Calls `each(word address, first byte in the word, range in the buffer)` for the words of a byte range.
fn for_words(pa: Pa, len: usize, mut each: impl FnMut(Pa, usize, core::ops::Range<usize>)) {
    let mut done = 0;
    while done < len {
        let at = pa.wrapping_add(done as u64);
        let skip = (at.get() % 8) as usize;
        let n = (8 - skip).min(len - done);
        each(Pa(at.get() - skip as u64), skip, done..done + n);
        done += n;
    }
}

impl DmaMemory for FakeMemory {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        if len == 0 || !align.is_power_of_two() {
            return None;
        }
        let mut heap = self.heap.lock();
        if heap.budget == Some(0) {
            return None;
        }
        let size = (len as u64).checked_next_multiple_of(LINE)?;
        let align = (align as u64).max(LINE);
        let end = self.base + self.cpu.len() as u64 * 8;
        let fresh = heap.next.checked_next_multiple_of(align);
        let block = match fresh.filter(|pa| pa.checked_add(size).is_some_and(|to| to <= end)) {
            Some(pa) => {
                heap.next = pa + size;
                Block { pa: Pa(pa), len }
            }
            None => {
                let fits = |b: &Block| b.len == len && b.pa.is_aligned(align);
                let oldest = heap.freed.iter().position(fits)?;
                heap.freed.remove(oldest)?
            }
        };
        if let Some(budget) = &mut heap.budget {
            *budget -= 1;
        }
        heap.allocations += 1;
        heap.live.insert(block.pa.get(), len);
        self.give_out(block);
        Some(block)
    }

    fn free(&self, block: Block) {
        let mut heap = self.heap.lock();
        if heap.live.get(&block.pa.get()) != Some(&block.len) {
            heap.bad_frees += 1;
            return;
        }
        heap.live.remove(&block.pa.get());
        heap.freed.push_back(block);
        for line in self.lines(block.pa, block.len) {
            self.state[line].store(FREED, Ordering::Relaxed);
        }
    }

    fn load64(&self, pa: Pa) -> u64 {
        self.index(pa).map_or(0, |index| self.cpu[index].load(Ordering::Acquire))
    }

    fn store64(&self, pa: Pa, value: u64) {
        if let Some(index) = self.index(pa) {
            self.update(index, |word| {
                word.store(value, Ordering::Release);
                (Some(value), ())
            });
        }
    }

    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let index = self.index(pa).ok_or(0u64)?;
        self.update(index, |word| {
            let result = word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire);
            (result.is_ok().then_some(new), result.map(drop))
        })
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) {
        for_words(pa, buf.len(), |word, at, range| {
            let bytes = self.load64(word).to_le_bytes();
            buf[range.clone()].copy_from_slice(&bytes[at..at + range.len()]);
        });
    }

    fn write(&self, pa: Pa, buf: &[u8]) {
        for_words(pa, buf.len(), |word, at, range| {
            let mut bytes = self.load64(word).to_le_bytes();
            bytes[at..at + range.len()].copy_from_slice(&buf[range]);
            self.store64(word, u64::from_le_bytes(bytes));
        });
    }

    fn clean(&self, pa: Pa, len: usize) {
        if self.coherent {
            return;
        }
        let mut buffers = self.buffers.lock();
        for line in self.lines(pa, len) {
            if buffers.dirty.remove(&line) {
                for index in words_of(line) {
                    buffers.pending.push_back((index, self.cpu[index].load(Ordering::Relaxed)));
                }
            }
        }
        self.happen(&mut buffers);
    }

    fn invalidate(&self, pa: Pa, len: usize) {
        if self.coherent {
            return;
        }
        let mut buffers = self.buffers.lock();
        for line in self.lines(pa, len) {
            self.settle(&mut buffers, line);
            buffers.dirty.remove(&line);
            for index in words_of(line) {
                self.cpu[index].store(self.device[index].load(Ordering::Relaxed), Ordering::Release);
            }
        }
    }

    fn wmb(&self) {
        if self.device.is_empty() {
            return;
        }
        let mut buffers = self.buffers.lock();
        for (index, value) in buffers.pending.drain(..) {
            self.device[index].store(value, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    const BASE: u64 = 0x8000_0000;

    #[test]
    fn a_store_reaches_a_non_snooping_device_after_clean_and_barrier_only() {
        let memory = FakeMemory::non_coherent(BASE, 4096);
        let pa = memory.alloc(64, 64).unwrap().pa;
        memory.store64(pa, 7);
        assert_eq!((memory.load64(pa), memory.device_load64(pa)), (7, GARBAGE));
        memory.wmb();
        assert_eq!(memory.device_load64(pa), GARBAGE, "a barrier alone cleans nothing");
        memory.clean(pa, 8);
        assert_eq!(memory.device_load64(pa), GARBAGE, "a clean alone is not complete");
        memory.wmb();
        assert_eq!(memory.device_load64(pa), 7);
    }

    #[test]
    fn a_devices_store_reaches_a_caching_cpu_after_invalidate_only() {
        let memory = FakeMemory::non_coherent(BASE, 4096);
        let pa = memory.alloc(64, 64).unwrap().pa;
        memory.device_write(pa.wrapping_add(3), b"abcdefgh");
        let mut seen = [0xff; 8];
        memory.read(pa.wrapping_add(3), &mut seen);
        assert_eq!(seen, [0; 8]);
        memory.invalidate(pa, 16);
        memory.read(pa.wrapping_add(3), &mut seen);
        assert_eq!(&seen, b"abcdefgh");
    }

    /// How a device sees two stores between barriers, over many seeds.
    fn views(make: impl Fn(u64) -> FakeMemory, between: impl Fn(&FakeMemory, Pa)) -> BTreeSet<(u64, u64)> {
        let mut seen = BTreeSet::new();
        for seed in 0..200 {
            let memory = make(seed);
            let block = memory.alloc(128, 64).unwrap();
            let (first, second) = (block.pa, block.pa.wrapping_add(64));
            memory.clean(block.pa, 128);
            memory.wmb();
            memory.store64(first, 1);
            between(&memory, first);
            memory.store64(second, 2);
            // The second is looked at first, so that seeing (0, 2) means that it has overtaken.
            let second = memory.device_load64(second);
            seen.insert((memory.device_load64(first), second));
        }
        seen
    }

    #[test]
    fn stores_without_a_barrier_reach_devices_in_any_order() {
        let reordering = |seed| FakeMemory::reordering(BASE, 4096, seed);
        assert!(views(reordering, |_, _| ()).contains(&(0, 2)), "overtaking is possible");
        assert!(!views(reordering, |memory, _| memory.wmb()).iter().any(|&(first, _)| first == 0));
        let evicting = |seed| FakeMemory::non_coherent_reordering(BASE, 4096, seed);
        assert!(views(evicting, |_, _| ()).contains(&(0, 2)), "lines are evicted in any order");
        assert!(views(evicting, |memory, _| memory.wmb()).contains(&(0, 2)), "a barrier alone does not help");
        let right = |memory: &FakeMemory, pa| {
            memory.clean(pa, 8);
            memory.wmb();
        };
        assert!(!views(evicting, right).iter().any(|&(first, _)| first == 0));
    }

    #[test]
    fn stores_to_one_word_stay_in_order() {
        for seed in 0..100 {
            let memory = FakeMemory::reordering(BASE, 4096, seed);
            let pa = memory.alloc(64, 64).unwrap().pa;
            memory.wmb();
            let mut last = 0;
            for value in 1..50 {
                memory.store64(pa, value);
                let seen = memory.device_load64(pa);
                assert!(seen >= last && seen <= value);
                last = seen;
            }
        }
    }

    #[test]
    fn blocks_are_aligned_zeroed_and_accounted_for() {
        let memory = FakeMemory::plain(BASE, 1 << 16);
        let a = memory.alloc(100, 8).unwrap();
        let b = memory.alloc(4096, 4096).unwrap();
        assert!(b.pa.is_aligned(4096) && b.pa.get() >= a.pa.get() + 100);
        memory.store64(b.pa, 1);
        assert_eq!((memory.outstanding(), memory.uses_after_free()), (2, 0));
        memory.free(b);
        assert_eq!(memory.load64(b.pa), 1);
        assert_eq!((memory.outstanding(), memory.uses_after_free()), (1, 1));
        memory.free(b);
        assert_eq!(memory.bad_frees(), 1);
        let blocks: Vec<Block> = core::iter::from_fn(|| memory.alloc(4096, 4096)).collect();
        assert_eq!(blocks.iter().filter(|&&block| block == b).count(), 1, "freed memory comes back, last");
        assert_eq!(memory.load64(b.pa), 0);
        assert_eq!(memory.load64(Pa(BASE - 8)), 0);
        assert_eq!(memory.stray_accesses(), 1);
    }

    #[test]
    fn allocations_fail_when_told() {
        let memory = FakeMemory::plain(BASE, 1 << 16);
        memory.fail_after(2);
        assert!(memory.alloc(64, 64).is_some() && memory.alloc(64, 64).is_some());
        assert!(memory.alloc(64, 64).is_none() && memory.alloc(64, 64).is_none());
        memory.fail_never();
        assert!(memory.alloc(64, 64).is_some());
        assert_eq!(memory.allocations(), 3);
    }
}
