//! A guest's memory: contiguous for the guest, scattered over the host's memory block by block.
//!
//! [`GuestMemory`] is a [`DmaMemory`] whose addresses are the guest's physical ones. A translation is one look into a table,
//! and every access is confined to the table: there is no address that a guest could say that leads out of its own blocks.

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::{Ipa, Pa};
use portcullis_hal::{Block, DmaMemory};
use spin::{Mutex, RwLock};

use super::heap::Heap;
use crate::ranges::Counted;
use crate::{GuestRange, HostRange, PinError, PinMemory, VmError};

/// What a guest's memory shall be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemoryConfig {
    /// First address, a multiple of the block size.
    pub base: Ipa,
    /// Bytes, a multiple of the block size.
    pub bytes: u64,
    /// Bytes of a block of host memory: a power of two from 4 KiB to 2 MiB.
    pub block: u64,
    /// Bytes at the beginning that the guest's own allocator leaves alone.
    pub kept_free: u64,
    /// In which order the blocks are used.
    pub seed: u64,
}

impl GuestMemoryConfig {
    /// Blocks of 64 KiB.
    pub const fn new(base: Ipa, bytes: u64) -> Self {
        Self { base, bytes, block: 0x1_0000, kept_free: 0, seed: 1 }
    }
}

/// The part that pins count on, and that outlives the machine while a device may reach it.
struct Backing<M: DmaMemory> {
    host: M,
    /// Host address of each block of the guest, in the guest's order.
    blocks: Arc<[u64]>,
    block: u64,
    pinned: Mutex<Counted>,
}

impl<M: DmaMemory> Backing<M> {
    /// Whether all of `[start, end)` is the guest's memory.
    fn owns(&self, start: u64, end: u64, sorted: &[u64]) -> bool {
        let mut at = start;
        while at < end {
            let index = sorted.partition_point(|block| *block <= at);
            let Some(block) = index.checked_sub(1).and_then(|n| sorted.get(n)) else { return false };
            if at - block >= self.block {
                return false;
            }
            at = block + self.block;
        }
        start < end
    }
}

impl<M: DmaMemory> Drop for Backing<M> {
    /// Zeroes the memory and gives it back. What is still pinned is lost instead: a device may reach it.
    fn drop(&mut self) {
        let pinned = self.pinned.get_mut();
        let zeros = [0u8; 4096];
        for &block in self.blocks.iter() {
            if pinned.touches(block, block + self.block) {
                continue;
            }
            for at in (0..self.block).step_by(zeros.len()) {
                self.host.write(Pa(block + at), &zeros);
            }
            self.host.clean(Pa(block), self.block as usize);
        }
        self.host.wmb();
        for &block in self.blocks.iter() {
            if !pinned.touches(block, block + self.block) {
                self.host.free(Block { pa: Pa(block), len: self.block as usize });
            }
        }
    }
}

/// Pins for a whole [`Backing`]; keeps it.
struct Pins<M: DmaMemory> {
    backing: Arc<Backing<M>>,
    sorted: Box<[u64]>,
}

impl<M: DmaMemory> PinMemory for Pins<M> {
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError> {
        let end = pa.get().checked_add(len);
        match end.filter(|end| self.backing.owns(pa.get(), *end, &self.sorted)) {
            Some(end) => {
                self.backing.pinned.lock().add(pa.get(), end);
                Ok(())
            }
            None => Err(PinError { pa, len, reason: "it is not memory of this machine" }),
        }
    }
    fn unpin(&self, pa: Pa, len: u64) {
        self.backing.pinned.lock().remove(pa.get(), pa.get().saturating_add(len));
    }
}

/// Pins for a machine that is dead.
struct NoMemory;

impl PinMemory for NoMemory {
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError> {
        Err(PinError { pa, len, reason: "the machine is dead" })
    }
    fn unpin(&self, _: Pa, _: u64) {}
}

struct Inner<M: DmaMemory> {
    /// Gone when the machine has died: whatever still holds a handle has no memory any more. Taking it away waits for the
    /// accesses that are under way.
    backing: RwLock<Option<Arc<Backing<M>>>>,
    /// Of each block, in the guest's order; for saying where the memory was.
    blocks: Arc<[u64]>,
    base: u64,
    bytes: u64,
    shift: u32,
    alive: AtomicBool,
    heap: Mutex<Heap>,
}

/// A guest's memory in guest addresses. Clones are handles to the same one. Reads outside of it, and all after the machine's
/// death, give 0; writes are dropped.
pub struct GuestMemory<M: DmaMemory> {
    inner: Arc<Inner<M>>,
}

impl<M: DmaMemory> Clone for GuestMemory<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: DmaMemory> fmt::Debug for GuestMemory<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestMemory({:#x}+{:#x})", self.inner.base, self.inner.bytes)
    }
}

/// Fisher and Yates with a small generator; the same seed gives the same order.
fn shuffle(blocks: &mut [u64], seed: u64) {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for n in (1..blocks.len()).rev() {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let other = (x >> 8) as usize % (n + 1);
        blocks.swap(n, other);
    }
}

impl<M: DmaMemory> GuestMemory<M> {
    /// Allocates the blocks one by one from `host` and puts them into an order of its own.
    pub fn new(vm: &str, host: M, config: GuestMemoryConfig) -> Result<Self, VmError> {
        let GuestMemoryConfig { base, bytes, block, kept_free, seed } = config;
        let layout = |problem| VmError::Layout { vm: vm.to_string(), problem };
        if !block.is_power_of_two() || !(0x1000..=0x20_0000).contains(&block) {
            return Err(layout("blocks are a power of two from 4 KiB to 2 MiB"));
        }
        if bytes == 0 || !bytes.is_multiple_of(block) || !base.get().is_multiple_of(block) {
            return Err(layout(
                "start and size are multiples of the block size, and there is at least one block",
            ));
        }
        let end = base.get().checked_add(bytes).ok_or_else(|| layout("it ends behind the last address"))?;
        let count = usize::try_from(bytes / block).map_err(|_| layout("it is too large"))?;
        let mut blocks = Vec::new();
        while blocks.len() < count {
            let Some(found) = host.alloc(block as usize, block as usize) else {
                let got = blocks.len() as u64 * block;
                for pa in blocks {
                    host.free(Block { pa: Pa(pa), len: block as usize });
                }
                return Err(VmError::NoMemory { vm: vm.to_string(), len: bytes, got });
            };
            blocks.push(found.pa.get());
        }
        for block in blocks.iter().map(|pa| Pa(*pa)) {
            // They come zeroed for the CPU. The guest's devices see what is in memory, which may be the last owner's still.
            host.clean(block, config.block as usize);
        }
        host.wmb();
        shuffle(&mut blocks, seed);
        let blocks: Arc<[u64]> = blocks.into();
        let backing = Backing { host, blocks: blocks.clone(), block, pinned: Mutex::new(Counted::default()) };
        let start = base.get().saturating_add(kept_free).min(end);
        Ok(Self {
            inner: Arc::new(Inner {
                backing: RwLock::new(Some(Arc::new(backing))),
                blocks,
                base: base.get(),
                bytes,
                shift: block.trailing_zeros(),
                alive: AtomicBool::new(true),
                heap: Mutex::new(Heap::new(start, end)),
            }),
        })
    }

    /// First and last address.
    pub fn range(&self) -> (Ipa, Ipa) {
        (Ipa(self.inner.base), Ipa(self.inner.base + (self.inner.bytes - 1)))
    }

    /// Where a guest address is on the host.
    pub fn host_address(&self, ipa: Ipa) -> Option<Pa> {
        let offset = ipa.get().checked_sub(self.inner.base)?;
        let block = *self.inner.blocks.get(usize::try_from(offset >> self.inner.shift).ok()?)?;
        Some(Pa(block + (offset & ((1 << self.inner.shift) - 1))))
    }

    /// Pieces that the guest's allocator has given out.
    pub fn outstanding(&self) -> usize {
        self.inner.heap.lock().outstanding()
    }

    /// Bytes that are pinned.
    pub fn pinned_bytes(&self) -> u64 {
        self.inner.backing.read().as_ref().map_or(0, |backing| backing.pinned.lock().bytes())
    }

    pub(super) fn guest_range(&self) -> GuestRange {
        let inner = &*self.inner;
        let range = |pa: &u64| HostRange { pa: Pa(*pa), len: 1 << inner.shift };
        let backing = inner.blocks.iter().map(range).collect();
        GuestRange { ipa: Ipa(inner.base), len: inner.bytes, backing, writable: true }
    }

    pub(super) fn kill(&self) {
        self.inner.alive.store(false, Ordering::Release);
        let backing = self.inner.backing.write().take();
        // Not under the lock: without pins this zeroes it all.
        drop(backing);
    }

    pub(super) fn is_alive(&self) -> bool {
        self.inner.alive.load(Ordering::Acquire)
    }
}

impl<M: DmaMemory + 'static> GuestMemory<M> {
    pub(super) fn pins(&self) -> Arc<dyn PinMemory> {
        let Some(backing) = self.inner.backing.read().clone() else { return Arc::new(NoMemory) };
        let mut sorted: Box<[u64]> = Box::from(&*backing.blocks);
        sorted.sort_unstable();
        Arc::new(Pins { backing, sorted })
    }
}

impl<M: DmaMemory> Backing<M> {
    /// Host address of an offset in the guest's memory, and the bytes that follow it in the same block.
    #[inline]
    fn locate(&self, offset: u64) -> Option<(Pa, u64)> {
        // The table is as long as the memory, so this is the check of the bounds.
        let block = *self.blocks.get(usize::try_from(offset >> self.block.trailing_zeros()).ok()?)?;
        let within = offset & (self.block - 1);
        Some((Pa(block + within), self.block - within))
    }
}

impl<M: DmaMemory> Inner<M> {
    /// An access of the guest to an aligned word: the host's memory and the word's address there.
    #[inline]
    fn word<T>(&self, at: Pa, access: impl FnOnce(&M, Pa) -> T) -> Option<T> {
        if !at.get().is_multiple_of(8) {
            return None;
        }
        let backing = self.backing.read();
        let backing = backing.as_ref()?;
        let (pa, _) = backing.locate(at.get().wrapping_sub(self.base))?;
        Some(access(&backing.host, pa))
    }

    /// Calls `each(host's memory, host address, range of the buffer)` for the parts of a range that are the guest's memory.
    fn pieces(&self, at: Pa, len: usize, mut each: impl FnMut(&M, Pa, Range<usize>)) {
        let backing = self.backing.read();
        let Some(backing) = backing.as_ref() else { return };
        let mut done = 0;
        while done < len {
            let Some(here) = at.get().checked_add(done as u64) else { return };
            let left = len - done;
            let n = match backing.locate(here.wrapping_sub(self.base)) {
                Some((pa, follow)) => {
                    let n = left.min(usize::try_from(follow).unwrap_or(left));
                    each(&backing.host, pa, done..done + n);
                    n
                }
                // Up to the beginning of the memory there is nothing, and behind its end neither.
                None => match self.base.checked_sub(here).filter(|gap| *gap > 0) {
                    Some(gap) => left.min(usize::try_from(gap).unwrap_or(left)),
                    None => return,
                },
            };
            done += n;
        }
    }
}

impl<M: DmaMemory> DmaMemory for GuestMemory<M> {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        if !self.is_alive() {
            return None;
        }
        let at = self.inner.heap.lock().alloc(len as u64, align as u64)?;
        let zeros = [0u8; 1024];
        for offset in (0..len).step_by(zeros.len()) {
            if let Some(part) = zeros.get(..zeros.len().min(len - offset)) {
                self.write(Pa(at + offset as u64), part);
            }
        }
        Some(Block { pa: Pa(at), len })
    }

    fn free(&self, block: Block) {
        // What was not given out is a mistake of the guest, and hurts nobody else.
        let _not_given_out = self.inner.heap.lock().free(block.pa.get());
    }

    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.inner.word(pa, |host, pa| host.load64(pa)).unwrap_or(0)
    }

    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        // Outside of the memory there is nothing to store to.
        let _outside = self.inner.word(pa, |host, pa| host.store64(pa, value));
    }

    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.inner.word(pa, |host, pa| host.cas64(pa, expected, new)).unwrap_or(Err(0))
    }

    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        let whole = pa.get().is_multiple_of(8);
        words.fill(0);
        self.inner.pieces(pa, if whole { words.len() * 8 } else { 0 }, |memory, host, range| {
            if let Some(part) = words.get_mut(range.start / 8..range.end / 8) {
                memory.load_run(host, part);
            }
        });
    }

    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        let Some(len) = count.checked_mul(8).filter(|_| pa.get().is_multiple_of(8)) else { return };
        self.inner.pieces(pa, len, |memory, host, range| {
            let value = first.wrapping_add((range.start as u64 / 8).wrapping_mul(step));
            memory.store_run(host, range.len() / 8, value, step);
        });
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) {
        buf.fill(0);
        self.inner.pieces(pa, buf.len(), |memory, host, range| {
            if let Some(part) = buf.get_mut(range) {
                memory.read(host, part);
            }
        });
    }

    fn write(&self, pa: Pa, buf: &[u8]) {
        self.inner.pieces(pa, buf.len(), |memory, host, range| {
            if let Some(part) = buf.get(range) {
                memory.write(host, part);
            }
        });
    }

    fn clean(&self, pa: Pa, len: usize) {
        self.inner.pieces(pa, len, |memory, host, range| memory.clean(host, range.len()));
    }

    fn invalidate(&self, pa: Pa, len: usize) {
        self.inner.pieces(pa, len, |memory, host, range| memory.invalidate(host, range.len()));
    }

    #[inline]
    fn wmb(&self) {
        core::sync::atomic::fence(Ordering::SeqCst);
        if let Some(backing) = self.inner.backing.read().as_ref() {
            backing.host.wmb();
        }
    }
}
