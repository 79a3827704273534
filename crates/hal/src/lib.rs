//! What a driver needs from its platform: registers, memory that devices can reach, time.
//!
//! A driver holds instances of these traits, not static functions, so that several IOMMUs, non-coherent
//! walkers and several address spaces coexist. `no_std`, traits only; `fake` (feature `fake`) is a platform for
//! tests that gives memory the properties real memory has: writes that a device does not see until they are
//! cleaned, and in an order that only barriers fix.
//!
//! A platform implements [`Mmio`] for a register window, [`DmaMemory`] for memory and [`Clock`] for time.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

#[cfg(feature = "fake")]
pub mod fake;
mod wait;

use alloc::sync::Arc;

use portcullis_arch::Pa;

pub use wait::{Timeout, poll};

/// One window of device registers. Offsets are bytes from its start, and accesses are little-endian, in
/// program order, and not combined.
pub trait Mmio: Send + Sync {
    /// Reads a 32-bit register.
    fn read32(&self, offset: usize) -> u32;
    /// Writes a 32-bit register.
    fn write32(&self, offset: usize, value: u32);
    /// Reads a 64-bit register.
    fn read64(&self, offset: usize) -> u64;
    /// Writes a 64-bit register.
    fn write64(&self, offset: usize, value: u64);
}

/// A block of memory from [`DmaMemory::alloc`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    /// Its physical address.
    pub pa: Pa,
    /// Its size in bytes.
    pub len: usize,
}

/// Memory that devices can reach, and the CPU's side of keeping it coherent.
///
/// Addresses are physical. An access outside of memory that this platform owns is a bug of the caller: the
/// platform may refuse it in its own way (a read gives 0, a write is dropped), but must not corrupt anything.
/// Implementations are cheap to call: page-table code calls `load64` and `store64` per descriptor.
pub trait DmaMemory: Send + Sync {
    /// Allocates `len` zeroed bytes at a multiple of `align` (a power of two), or `None` when there is no room.
    fn alloc(&self, len: usize, align: usize) -> Option<Block>;
    /// Gives back a block that `alloc` returned.
    fn free(&self, block: Block);
    /// Loads an aligned 64-bit word in one piece.
    fn load64(&self, pa: Pa) -> u64;
    /// Stores an aligned 64-bit word in one piece.
    fn store64(&self, pa: Pa, value: u64);
    /// Replaces the word at `pa` by `new` if it holds `expected`; `Err` gives what it held instead.
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64>;
    /// Loads consecutive words, ascending, each in one piece. For platforms where finding an address costs
    /// something, and can be done once per run (the run may cross no end of memory).
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.load64(pa.wrapping_add(i as u64 * 8));
        }
    }
    /// Stores `count` consecutive words, ascending, each in one piece: `first`, `first + step`, `first + 2 * step`
    /// and so on, wrapping. The counterpart of [`load_run`](DmaMemory::load_run) for page tables.
    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        for i in 0..count as u64 {
            self.store64(pa.wrapping_add(i * 8), first.wrapping_add(i.wrapping_mul(step)));
        }
    }
    /// Copies bytes from memory.
    fn read(&self, pa: Pa, buf: &mut [u8]);
    /// Copies bytes to memory.
    fn write(&self, pa: Pa, buf: &[u8]);
    /// Writes the CPU's cached lines of a range back, so that non-coherent observers see them (DC CVAC).
    /// Ordered before a following [`wmb`](DmaMemory::wmb).
    fn clean(&self, pa: Pa, len: usize);
    /// Drops the CPU's cached lines of a range, so that what a device wrote is read (DC IVAC).
    fn invalidate(&self, pa: Pa, len: usize);
    /// Write barrier towards devices and walkers: earlier stores and cleans are visible to them before later stores
    /// and register writes (Linux `dma_wmb` / `wmb`).
    fn wmb(&self);
}

/// Time, for bounded waits.
pub trait Clock: Send + Sync {
    /// Nanoseconds since some start; never goes back.
    fn now_ns(&self) -> u64;
    /// Lets at least `us` microseconds pass. On a simulated board this is when devices work.
    fn delay_us(&self, us: u64);
}

impl<T: Mmio + ?Sized> Mmio for Arc<T> {
    fn read32(&self, offset: usize) -> u32 {
        (**self).read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        (**self).write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        (**self).read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        (**self).write64(offset, value);
    }
}

impl<T: DmaMemory + ?Sized> DmaMemory for Arc<T> {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        (**self).alloc(len, align)
    }
    fn free(&self, block: Block) {
        (**self).free(block);
    }
    fn load64(&self, pa: Pa) -> u64 {
        (**self).load64(pa)
    }
    fn store64(&self, pa: Pa, value: u64) {
        (**self).store64(pa, value);
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        (**self).cas64(pa, expected, new)
    }
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        (**self).load_run(pa, words);
    }
    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        (**self).store_run(pa, count, first, step);
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        (**self).read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        (**self).write(pa, buf);
    }
    fn clean(&self, pa: Pa, len: usize) {
        (**self).clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        (**self).invalidate(pa, len);
    }
    fn wmb(&self) {
        (**self).wmb();
    }
}

impl<T: Clock + ?Sized> Clock for Arc<T> {
    fn now_ns(&self) -> u64 {
        (**self).now_ns()
    }
    fn delay_us(&self, us: u64) {
        (**self).delay_us(us);
    }
}
