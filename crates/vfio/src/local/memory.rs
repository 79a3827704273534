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
use spin::Mutex;

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
    blocks: Box<[u64]>,
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
        for &block in &self.blocks {
            if pinned.touches(block, block + self.block) {
                continue;
            }
            for at in (0..self.block).step_by(zeros.len()) {
                self.host.write(Pa(block + at), &zeros);
            }
            self.host.clean(Pa(block), self.block as usize);
        }
        self.host.wmb();
        for &block in &self.blocks {
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

struct Inner<M: DmaMemory> {
    backing: Arc<Backing<M>>,
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
        shuffle(&mut blocks, seed);
        let backing = Backing {
            host,
            blocks: blocks.into_boxed_slice(),
            block,
            pinned: Mutex::new(Counted::default()),
        };
        let start = base.get().saturating_add(kept_free).min(end);
        Ok(Self {
            inner: Arc::new(Inner {
                backing: Arc::new(backing),
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
        self.inner.locate(ipa.get()).map(|(pa, _)| pa)
    }

    /// Pieces that the guest's allocator has given out.
    pub fn outstanding(&self) -> usize {
        self.inner.heap.lock().outstanding()
    }

    /// Bytes that are pinned.
    pub fn pinned_bytes(&self) -> u64 {
        self.inner.backing.pinned.lock().bytes()
    }

    pub(super) fn guest_range(&self) -> GuestRange {
        let inner = &*self.inner;
        let range = |pa: &u64| HostRange { pa: Pa(*pa), len: inner.backing.block };
        let backing = inner.backing.blocks.iter().map(range).collect();
        GuestRange { ipa: Ipa(inner.base), len: inner.bytes, backing, writable: true }
    }

    pub(super) fn kill(&self) {
        self.inner.alive.store(false, Ordering::Release);
    }

    pub(super) fn is_alive(&self) -> bool {
        self.inner.alive.load(Ordering::Acquire)
    }
}

impl<M: DmaMemory + 'static> GuestMemory<M> {
    pub(super) fn pins(&self) -> Arc<dyn PinMemory> {
        let backing = self.inner.backing.clone();
        let mut sorted = backing.blocks.clone();
        sorted.sort_unstable();
        Arc::new(Pins { backing, sorted })
    }
}

impl<M: DmaMemory> Inner<M> {
    /// Host address of a guest address, and the bytes that follow it in the same block.
    #[inline]
    fn locate(&self, at: u64) -> Option<(Pa, u64)> {
        let offset = at.wrapping_sub(self.base);
        // The table is as long as the memory, so this is the check of the bounds.
        let block = *self.backing.blocks.get(usize::try_from(offset >> self.shift).ok()?)?;
        let within = offset & (self.backing.block - 1);
        Some((Pa(block + within), self.backing.block - within))
    }

    /// The same for an access of the guest to an aligned word.
    #[inline]
    fn word(&self, at: Pa) -> Option<Pa> {
        if !at.get().is_multiple_of(8) || !self.alive.load(Ordering::Relaxed) {
            return None;
        }
        self.locate(at.get()).map(|(pa, _)| pa)
    }

    /// Calls `each(host address, range of the buffer)` for the parts of a range that are the guest's memory.
    fn pieces(&self, at: Pa, len: usize, mut each: impl FnMut(Pa, Range<usize>)) {
        if !self.alive.load(Ordering::Relaxed) {
            return;
        }
        let mut done = 0;
        while done < len {
            let Some(here) = at.get().checked_add(done as u64) else { return };
            let left = len - done;
            let n = match self.locate(here) {
                Some((pa, follow)) => {
                    let n = left.min(usize::try_from(follow).unwrap_or(left));
                    each(pa, done..done + n);
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
        self.inner.word(pa).map_or(0, |pa| self.inner.backing.host.load64(pa))
    }

    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        if let Some(pa) = self.inner.word(pa) {
            self.inner.backing.host.store64(pa, value);
        }
    }

    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let pa = self.inner.word(pa).ok_or(0u64)?;
        self.inner.backing.host.cas64(pa, expected, new)
    }

    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        let whole = pa.get().is_multiple_of(8);
        words.fill(0);
        self.inner.pieces(pa, if whole { words.len() * 8 } else { 0 }, |host, range| {
            if let Some(part) = words.get_mut(range.start / 8..range.end / 8) {
                self.inner.backing.host.load_run(host, part);
            }
        });
    }

    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        let Some(len) = count.checked_mul(8).filter(|_| pa.get().is_multiple_of(8)) else { return };
        self.inner.pieces(pa, len, |host, range| {
            let value = first.wrapping_add((range.start as u64 / 8).wrapping_mul(step));
            self.inner.backing.host.store_run(host, range.len() / 8, value, step);
        });
    }

    fn read(&self, pa: Pa, buf: &mut [u8]) {
        buf.fill(0);
        self.inner.pieces(pa, buf.len(), |host, range| {
            if let Some(part) = buf.get_mut(range) {
                self.inner.backing.host.read(host, part);
            }
        });
    }

    fn write(&self, pa: Pa, buf: &[u8]) {
        self.inner.pieces(pa, buf.len(), |host, range| {
            if let Some(part) = buf.get(range) {
                self.inner.backing.host.write(host, part);
            }
        });
    }

    fn clean(&self, pa: Pa, len: usize) {
        self.inner.pieces(pa, len, |host, range| self.inner.backing.host.clean(host, range.len()));
    }

    fn invalidate(&self, pa: Pa, len: usize) {
        self.inner.pieces(pa, len, |host, range| self.inner.backing.host.invalidate(host, range.len()));
    }

    #[inline]
    fn wmb(&self) {
        self.inner.backing.host.wmb();
    }
}
