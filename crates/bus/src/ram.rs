//! A block of RAM that CPU, walkers and devices share: the one place of this crate with `unsafe`.
//!
//! Guest memory is written by several masters at once, as hardware does, so it is never borrowed as a Rust
//! slice: all access goes through raw copies and atomics on memory that this type owns or has mapped. With the feature
//! `shared` it can be a file that another process maps as well ([`Ram::map`]).
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const ALIGN: usize = 4096;

/// Why a file cannot be RAM.
#[cfg(feature = "shared")]
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The range is empty, not page aligned, or past the end of the file.
    #[error(
        "{len:#x} bytes at offset {offset:#x} of a file of {size:#x} bytes cannot be mapped: not page aligned or past its end"
    )]
    Range {
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Size of the file.
        size: u64,
    },
    /// The file may shrink.
    #[error(
        "the file is not a memfd that is sealed against shrinking; `memory-backend-memfd,share=on` of QEMU is"
    )]
    NotSealed,
    /// The host refused.
    #[error("the file cannot be mapped: {0}")]
    Host(#[from] std::io::Error),
}

#[cfg(feature = "shared")]
impl From<rustix::io::Errno> for RamError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Host(e.into())
    }
}

/// RAM. Offsets are in bytes from its start; callers pass ranges inside [`len`](Ram::len), and an access
/// outside is refused with `None`/`false`.
pub struct Ram {
    start: NonNull<u8>,
    len: usize,
    block: Block,
}

/// Where the memory comes from.
enum Block {
    /// The allocator: the block, of which `start` is the first aligned byte.
    Heap(NonNull<u8>, Layout),
    /// A mapping that begins at `start`.
    #[cfg(feature = "shared")]
    Mapped,
}

// SAFETY: the memory is owned or mapped by this value and freed only with it; all access is by raw copy or atomics, and
// racing byte copies model what racing bus masters do (no Rust reference into the block is ever made).
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Allocates `len` zero bytes. Pages are taken from the host when they are first touched.
    ///
    /// Returns `None` if `len` is 0 or too large for the host.
    pub fn new(len: usize) -> Option<Self> {
        // Over-allocated by a page and aligned by hand: a large alignment would make the allocator clear, and
        // so commit, the whole block.
        let layout = Layout::from_size_align(len.checked_add(ALIGN)?, 16).ok()?;
        if len == 0 {
            return None;
        }
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { alloc_zeroed(layout) };
        // What a device tree asks for may be more than the host has.
        let block = NonNull::new(raw)?;
        let skip = block.as_ptr().align_offset(ALIGN);
        // SAFETY: skip < ALIGN, and ALIGN bytes more than `len` were allocated.
        let start = unsafe { block.add(skip) };
        Some(Self { start, len, block: Block::Heap(block, layout) })
    }

    /// Maps `len` bytes from `offset` on of a file, shared with every other process that maps it.
    ///
    /// # Errors
    /// The file cannot be mapped, does not reach that far, or may still shrink: touching what a mapping lost would kill this
    /// process, so only a memfd that is sealed against shrinking (F_SEAL_SHRINK) is taken.
    #[cfg(feature = "shared")]
    pub fn map(file: impl std::os::fd::AsFd, offset: u64, len: usize) -> Result<Self, RamError> {
        use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
        use rustix::mm::{MapFlags, ProtFlags, mmap};

        let file = file.as_fd();
        let size = u64::try_from(fstat(file)?.st_size).unwrap_or(0);
        let end = offset.checked_add(len as u64);
        if len == 0 || !offset.is_multiple_of(ALIGN as u64) || end.is_none_or(|end| end > size) {
            return Err(RamError::Range { offset, len, size });
        }
        if !fcntl_get_seals(file).unwrap_or(SealFlags::empty()).contains(SealFlags::SHRINK) {
            return Err(RamError::NotSealed);
        }
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing of this process.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                offset,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(RamError::Host(rustix::io::Errno::NOMEM.into()))?;
        Ok(Self { start, len, block: Block::Mapped })
    }

    /// Size in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: a block of RAM has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    #[inline]
    fn at(&self, offset: usize, len: usize) -> Option<NonNull<u8>> {
        if offset > self.len || len > self.len - offset {
            return None;
        }
        // SAFETY: offset <= len of the block.
        Some(unsafe { self.start.add(offset) })
    }

    #[inline]
    fn word<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let size = size_of::<T>();
        if !offset.is_multiple_of(size) {
            return None;
        }
        Some(self.at(offset, size)?.cast())
    }

    /// Reads into `buf`; false if the range is not inside the block.
    #[inline]
    #[must_use]
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> bool {
        let Some(p) = self.at(offset, buf.len()) else { return false };
        // SAFETY: `at` checked the range; `buf` is a Rust slice and cannot overlap the block.
        unsafe { p.as_ptr().copy_to_nonoverlapping(buf.as_mut_ptr(), buf.len()) };
        true
    }

    /// Writes `buf`; false if the range is not inside the block.
    #[inline]
    #[must_use]
    pub fn write(&self, offset: usize, buf: &[u8]) -> bool {
        let Some(p) = self.at(offset, buf.len()) else { return false };
        // SAFETY: `at` checked the range; `buf` is a Rust slice and cannot overlap the block.
        unsafe { p.as_ptr().copy_from_nonoverlapping(buf.as_ptr(), buf.len()) };
        true
    }

    /// Copies `len` bytes to `dst_offset` of `dst`, which may be this block and may overlap; false if either
    /// range is not inside its block.
    #[inline]
    #[must_use]
    pub fn copy_to(&self, offset: usize, dst: &Ram, dst_offset: usize, len: usize) -> bool {
        let (Some(from), Some(to)) = (self.at(offset, len), dst.at(dst_offset, len)) else { return false };
        // SAFETY: `at` checked both ranges; `copy_to` allows overlap.
        unsafe { from.as_ptr().copy_to(to.as_ptr(), len) };
        true
    }

    /// Reads an aligned 64-bit little-endian word in one piece.
    #[inline]
    pub fn load64(&self, offset: usize) -> Option<u64> {
        let p = self.word::<u64>(offset)?;
        // SAFETY: in range and aligned; the block lives as long as `self`, and atomics may alias.
        let a = unsafe { AtomicU64::from_ptr(p.as_ptr()) };
        Some(u64::from_le(a.load(Ordering::Acquire)))
    }

    /// Reads an aligned 32-bit little-endian word in one piece.
    #[inline]
    pub fn load32(&self, offset: usize) -> Option<u32> {
        let p = self.word::<u32>(offset)?;
        // SAFETY: as in `load64`.
        let a = unsafe { AtomicU32::from_ptr(p.as_ptr()) };
        Some(u32::from_le(a.load(Ordering::Acquire)))
    }

    /// Writes an aligned 64-bit little-endian word in one piece; false if out of range or misaligned.
    #[inline]
    #[must_use]
    pub fn store64(&self, offset: usize, value: u64) -> bool {
        let Some(p) = self.word::<u64>(offset) else { return false };
        // SAFETY: as in `load64`.
        let a = unsafe { AtomicU64::from_ptr(p.as_ptr()) };
        a.store(value.to_le(), Ordering::Release);
        true
    }

    /// Reads consecutive aligned 64-bit words, each in one piece; false if out of range or misaligned.
    #[inline]
    #[must_use]
    pub fn load_run(&self, offset: usize, words: &mut [u64]) -> bool {
        let Some(bytes) = words.len().checked_mul(8) else { return false };
        let Some(p) = self.at(offset, bytes) else { return false };
        if !offset.is_multiple_of(8) {
            return false;
        }
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: word `i` of the range that `at` checked.
            let source = unsafe { p.cast::<u64>().add(i) };
            // SAFETY: as in `load64`.
            let a = unsafe { AtomicU64::from_ptr(source.as_ptr()) };
            *word = u64::from_le(a.load(Ordering::Acquire));
        }
        true
    }

    /// Writes `count` consecutive aligned words, each in one piece: `first`, `first + step` and so on, wrapping;
    /// false if out of range or misaligned, and then nothing is written.
    #[inline]
    #[must_use]
    pub fn store_run(&self, offset: usize, count: usize, first: u64, step: u64) -> bool {
        let Some(bytes) = count.checked_mul(8) else { return false };
        let Some(p) = self.at(offset, bytes) else { return false };
        if !offset.is_multiple_of(8) {
            return false;
        }
        let mut value = first;
        for i in 0..count {
            // SAFETY: word `i` of the range that `at` checked.
            let word = unsafe { p.cast::<u64>().add(i) };
            // SAFETY: as in `load64`.
            let a = unsafe { AtomicU64::from_ptr(word.as_ptr()) };
            a.store(value.to_le(), Ordering::Release);
            value = value.wrapping_add(step);
        }
        true
    }

    /// Compare-and-swap of an aligned 64-bit word; returns what it held.
    #[inline]
    pub fn cas64(&self, offset: usize, expected: u64, new: u64) -> Option<u64> {
        let p = self.word::<u64>(offset)?;
        // SAFETY: as in `load64`.
        let a = unsafe { AtomicU64::from_ptr(p.as_ptr()) };
        let held = a.compare_exchange(expected.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Acquire);
        Some(u64::from_le(held.unwrap_or_else(|v| v)))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        match self.block {
            Block::Heap(block, layout) => {
                // SAFETY: `block` came from `alloc_zeroed` with this layout and is freed once.
                unsafe { dealloc(block.as_ptr(), layout) };
            }
            #[cfg(feature = "shared")]
            Block::Mapped => {
                // SAFETY: `map` made this mapping of `len` bytes; nothing points into it any more.
                let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_outside_the_block_are_refused() {
        let ram = Ram::new(8192).unwrap();
        assert!(ram.write(8190, &[1, 2]));
        assert!(!ram.write(8191, &[1, 2]));
        assert!(!ram.read(usize::MAX, &mut [0]));
        assert!(!ram.copy_to(0, &ram, 4096, 4097));
        assert_eq!(ram.load64(8188), None, "misaligned");
        assert_eq!(ram.load64(8192), None);
        assert!(Ram::new(0).is_none());
        assert!(Ram::new(usize::MAX).is_none());
        assert!(std::hint::black_box(Ram::new(1 << 60)).is_none(), "more than any host has");
    }

    #[cfg(feature = "shared")]
    #[test]
    fn a_mapped_file_is_seen_from_both_sides_and_must_not_shrink() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let file = memfd_create("ram", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 0x4000).unwrap();
        assert!(matches!(Ram::map(&file, 0, 0x4000), Err(RamError::NotSealed)));
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let (a, b) = (Ram::map(&file, 0, 0x4000).unwrap(), Ram::map(&file, 0x1000, 0x3000).unwrap());
        assert!(b.store64(8, 77));
        assert_eq!(a.load64(0x1008), Some(77));
        for (offset, len) in [(0x1000, 0x4000), (u64::MAX - 0xfff, 0x2000), (0x800, 0x1000), (0, 0)] {
            assert!(matches!(Ram::map(&file, offset, len), Err(RamError::Range { .. })));
        }
        drop(a);
        assert_eq!(b.load64(8), Some(77));
    }

    #[test]
    fn words_are_little_endian() {
        let ram = Ram::new(64).unwrap();
        assert!(ram.store64(8, 0x0102_0304_0506_0708));
        let mut b = [0; 8];
        assert!(ram.read(8, &mut b));
        assert_eq!(b, [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(ram.cas64(8, 1, 2), Some(0x0102_0304_0506_0708));
        assert_eq!(ram.cas64(8, 0x0102_0304_0506_0708, 2), Some(0x0102_0304_0506_0708));
        assert_eq!(ram.load32(8), Some(2));
    }
}
