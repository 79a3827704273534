//! A device region as somebody else may use it: checked, and revocable for good.
//!
//! [`RegionWindow::revoke`] returns only when no access through the window is under way. Without that, a register write that
//! had begun before could start a device again after it was stopped.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

use portcullis_hal::Mmio;

use crate::Region;

/// Set in the count of accesses once the window is revoked.
const REVOKED: usize = 1 << (usize::BITS - 1);
/// How often a revocation looks for accesses to end: long for a register access, short for a user who waits.
const SPINS: u32 = if cfg!(test) { 20_000_000 } else { 200_000_000 };

/// A region of a device. As [`Mmio`]: accesses that are misaligned or outside, and all once it is revoked, read ones and write
/// nothing.
pub struct RegionWindow {
    registers: Arc<dyn Mmio>,
    size: u64,
    /// Accesses under way, and [`REVOKED`].
    users: AtomicUsize,
}

/// An access that is under way.
struct Access<'a>(&'a AtomicUsize);

impl Drop for Access<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl RegionWindow {
    /// A window over a region.
    pub fn new(region: &Region) -> Arc<Self> {
        Arc::new(Self { registers: region.registers.clone(), size: region.size, users: AtomicUsize::new(0) })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether `bytes` (4 or 8) at `offset` are an access that the region has.
    pub fn contains(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(bytes) && offset.checked_add(bytes).is_some_and(|end| end <= self.size)
    }

    fn enter(&self, offset: usize, bytes: u64) -> Option<Access<'_>> {
        if !self.contains(offset as u64, bytes) {
            return None;
        }
        let before = self.users.fetch_add(1, Ordering::Acquire);
        let access = Access(&self.users);
        (before & REVOKED == 0).then_some(access)
    }

    /// From now on no access reaches the device. `false` if one that began earlier does not end, and then it may still.
    #[must_use]
    pub fn revoke(&self) -> bool {
        let mut users = self.users.fetch_or(REVOKED, Ordering::AcqRel) & !REVOKED;
        for _ in 0..SPINS {
            if users == 0 {
                return true;
            }
            core::hint::spin_loop();
            users = self.users.load(Ordering::Acquire) & !REVOKED;
        }
        users == 0
    }

    /// True after [`revoke`](Self::revoke).
    pub fn is_revoked(&self) -> bool {
        self.users.load(Ordering::Acquire) & REVOKED != 0
    }
}

impl Mmio for RegionWindow {
    fn read32(&self, offset: usize) -> u32 {
        self.enter(offset, 4).map_or(u32::MAX, |_access| self.registers.read32(offset))
    }
    fn write32(&self, offset: usize, value: u32) {
        if let Some(_access) = self.enter(offset, 4) {
            self.registers.write32(offset, value);
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        self.enter(offset, 8).map_or(u64::MAX, |_access| self.registers.read64(offset))
    }
    fn write64(&self, offset: usize, value: u64) {
        if let Some(_access) = self.enter(offset, 8) {
            self.registers.write64(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use portcullis_arch::Pa;
    use portcullis_hal::fake::FakeMmio;

    use super::*;

    #[test]
    fn accesses_outside_or_misaligned_or_after_the_revocation_do_not_reach_the_device() {
        let device = Arc::new(FakeMmio::new());
        let window = RegionWindow::new(&Region::new(Pa(0xa000_0000), 0x1000, device.clone()));
        window.write32(0xffc, 7);
        assert_eq!(window.read32(0xffc), 7);
        device.take_log();
        for offset in [0x1000, 0xffe, 2, usize::MAX - 3, usize::MAX] {
            window.write32(offset, 1);
            assert_eq!(window.read32(offset), u32::MAX);
        }
        window.write64(0xffc, 1);
        assert_eq!(window.read64(4), u64::MAX);
        assert!(window.revoke() && window.is_revoked());
        window.write32(0, 1);
        assert_eq!(window.read32(0xffc), u32::MAX);
        assert!(device.take_log().is_empty());
    }

    #[test]
    fn a_revocation_waits_for_the_access_that_is_under_way() {
        struct Slow(AtomicUsize);
        impl Mmio for Slow {
            fn read32(&self, _: usize) -> u32 {
                0
            }
            fn write32(&self, _: usize, _: u32) {
                self.0.store(1, Ordering::SeqCst);
                for _ in 0..100_000 {
                    std::thread::yield_now();
                    if self.0.load(Ordering::SeqCst) == 2 {
                        break;
                    }
                }
                self.0.store(3, Ordering::SeqCst);
            }
            fn read64(&self, _: usize) -> u64 {
                0
            }
            fn write64(&self, _: usize, _: u64) {}
        }
        let slow = Arc::new(Slow(AtomicUsize::new(0)));
        let window = RegionWindow::new(&Region::new(Pa(0), 0x1000, slow.clone()));
        std::thread::scope(|scope| {
            scope.spawn(|| window.write32(0, 0));
            while slow.0.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            scope.spawn(|| slow.0.store(2, Ordering::SeqCst));
            assert!(window.revoke());
            assert_eq!(slow.0.load(Ordering::SeqCst), 3, "the write had ended");
        });
    }
}
