//! The smallest platform: a bump allocator, registers that remember, memory in an array, a clock that counts, and the
//! exit of the host's kernel.

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use portcullis_arch::Pa;
use portcullis_hal::{Block, Clock, DmaMemory, Mmio};

const HEAP_BYTES: usize = 8 << 20;

/// Hands out its bytes once and takes nothing back.
struct Bump {
    heap: UnsafeCell<[u8; HEAP_BYTES]>,
    next: AtomicUsize,
}

// SAFETY: the heap is only reached through the ranges that `alloc` hands out, and no two of them overlap.
unsafe impl Sync for Bump {}

// SAFETY: every call reserves a range of its own by one atomic addition, inside of the heap and aligned as asked.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let base = self.heap.get().cast::<u8>();
        let slack = layout.align() - 1;
        let start = self.next.fetch_add(layout.size() + slack, Ordering::Relaxed);
        let aligned = ((base.addr() + start + slack) & !slack) - base.addr();
        if aligned + layout.size() > HEAP_BYTES {
            return core::ptr::null_mut();
        }
        // SAFETY: `aligned` is inside of the heap, as has just been checked.
        unsafe { base.add(aligned) }
    }

    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static ALLOCATOR: Bump = Bump { heap: UnsafeCell::new([0; HEAP_BYTES]), next: AtomicUsize::new(0) };

/// Ends the program (exit_group of Linux on x86-64).
pub fn exit(code: i32) -> ! {
    // SAFETY: the system call takes an integer and does not return.
    unsafe { asm!("syscall", in("rax") 231, in("rdi") code, options(noreturn, nostack)) }
}

/// Registers that remember.
pub struct Window(Box<[AtomicU32]>);

impl Window {
    /// `bytes` of registers, all 0.
    pub fn new(bytes: usize) -> Self {
        Self((0..bytes / 4).map(|_| AtomicU32::new(0)).collect())
    }

    /// Sets a register.
    pub fn set(&self, offset: usize, value: u32) {
        if let Some(word) = self.0.get(offset / 4) {
            word.store(value, Ordering::Relaxed);
        }
    }
}

impl Mmio for Window {
    fn read32(&self, offset: usize) -> u32 {
        self.0.get(offset / 4).map_or(0, |word| word.load(Ordering::Relaxed))
    }
    fn write32(&self, offset: usize, value: u32) {
        self.set(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }
    fn write64(&self, offset: usize, value: u64) {
        self.set(offset, value as u32);
        self.set(offset + 4, (value >> 32) as u32);
    }
}

/// Registers of an AXI DMA that is reset at once, and otherwise does nothing.
pub struct Resetting(Window);

impl Resetting {
    /// `bytes` of registers, all 0.
    pub fn new(bytes: usize) -> Self {
        Self(Window::new(bytes))
    }
}

impl Mmio for Resetting {
    fn read32(&self, offset: usize) -> u32 {
        self.0.read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        // DMACR.Reset.
        self.0.write32(offset, if matches!(offset, 0 | 0x30) { value & !4 } else { value });
    }
    fn read64(&self, offset: usize) -> u64 {
        self.0.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.0.write64(offset, value);
    }
}

/// Registers of an SMMUv3 that does everything at once: it acknowledges what is written and consumes every command.
pub struct Acknowledging(Window);

impl Acknowledging {
    /// `bytes` of registers, all 0.
    pub fn new(bytes: usize) -> Self {
        Self(Window::new(bytes))
    }

    /// Sets a register.
    pub fn set(&self, offset: usize, value: u32) {
        self.0.set(offset, value);
    }
}

impl Mmio for Acknowledging {
    fn read32(&self, offset: usize) -> u32 {
        match offset {
            // CR0ACK, IRQ_CTRLACK, CMDQ_CONS.
            0x24 => self.0.read32(0x20),
            0x54 => self.0.read32(0x50),
            0x9c => self.0.read32(0x98),
            _ => self.0.read32(offset),
        }
    }
    fn write32(&self, offset: usize, value: u32) {
        self.0.write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.0.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.0.write64(offset, value);
    }
}

/// Memory in an array, given out once.
#[derive(Clone)]
pub struct Memory(Arc<Words>);

struct Words {
    base: u64,
    words: Box<[AtomicU64]>,
    next: AtomicU64,
}

impl Memory {
    /// `bytes` at `base`.
    pub fn new(base: u64, bytes: usize) -> Self {
        let words = (0..bytes / 8).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Words { base, words, next: AtomicU64::new(base) }))
    }

    fn word(&self, pa: Pa) -> Option<&AtomicU64> {
        self.0.words.get((pa.get().checked_sub(self.0.base)? / 8) as usize)
    }
}

impl DmaMemory for Memory {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        let end = self.0.base + self.0.words.len() as u64 * 8;
        let start = self.0.next.load(Ordering::Relaxed).checked_next_multiple_of(align as u64)?;
        let next = start.checked_add(len as u64).filter(|next| *next <= end)?;
        self.0.next.store(next, Ordering::Relaxed);
        Some(Block { pa: Pa(start), len })
    }
    fn free(&self, _: Block) {}
    fn load64(&self, pa: Pa) -> u64 {
        self.word(pa).map_or(0, |word| word.load(Ordering::Acquire))
    }
    fn store64(&self, pa: Pa, value: u64) {
        if let Some(word) = self.word(pa) {
            word.store(value, Ordering::Release);
        }
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let word = self.word(pa).ok_or(0u64)?;
        word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = pa.wrapping_add(i as u64);
            *byte = (self.load64(at) >> (at.get() % 8 * 8)) as u8;
        }
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        for (i, byte) in buf.iter().enumerate() {
            let at = pa.wrapping_add(i as u64);
            let shift = at.get() % 8 * 8;
            self.store64(at, self.load64(at) & !(0xff << shift) | u64::from(*byte) << shift);
        }
    }
    fn clean(&self, _: Pa, _: usize) {}
    fn invalidate(&self, _: Pa, _: usize) {}
    fn wmb(&self) {}
}

/// Time that passes when somebody waits.
#[derive(Default)]
pub struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn delay_us(&self, us: u64) {
        self.0.fetch_add(us * 1000, Ordering::Relaxed);
    }
}
