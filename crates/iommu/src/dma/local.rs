//! A CPU's own part of a space: [`DmaLocal`].

use alloc::sync::Arc;
use core::fmt;
use core::panic::Location;
use core::sync::atomic::{AtomicU64, Ordering};

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::IommuError;
use portcullis_hal::DmaMemory;

use super::retire::Ring;
use super::space::Part;
use super::{Direction, DmaAttrs, DmaDevice, DmaError, DmaSpace};
use crate::iova::{IovaError, LocalIova};

/// What the timer of the space has to know about a local ring. The owner writes `pushed`, everybody reads it seldom.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct LocalCell {
    pushed: AtomicU64,
    covered: AtomicU64,
}

impl LocalCell {
    /// Addresses that were let wait so far.
    pub fn pushed(&self) -> u64 {
        self.pushed.load(Ordering::Acquire)
    }
    /// How many of them a flush has covered.
    pub fn covered(&self) -> u64 {
        self.covered.load(Ordering::Relaxed)
    }
    pub fn cover(&self, pushed: u64) {
        self.covered.store(pushed, Ordering::Relaxed);
    }
}

/// Numbers of a part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalStatistics {
    /// Addresses asked for.
    pub mapped: u64,
    /// Addresses given back, those that still wait included.
    pub unmapped: u64,
    /// Addresses that wait for a flush.
    pub waiting: usize,
}

/// One CPU's (or thread's) own part of a [`DmaSpace`]: free addresses and a ring that nobody else touches, so that
/// mapping and unmapping in it writes no cache line that another CPU writes. Dropping it flushes what waits, and gives
/// its addresses back to the space.
///
/// What was mapped through it may be unmapped through the device or another part, and the other way round.
pub struct DmaLocal {
    space: Arc<DmaSpace>,
    owned: Owned,
}

struct Owned {
    iovas: LocalIova,
    ring: Option<Ring>,
    cell: Arc<LocalCell>,
    pushed: u64,
    mapped: u64,
    unmapped: u64,
}

/// The part while it is used.
struct InUse<'a> {
    space: &'a DmaSpace,
    owned: &'a mut Owned,
}

impl Part for InUse<'_> {
    #[inline(always)]
    fn space(&self) -> &DmaSpace {
        self.space
    }
    #[inline(always)]
    fn alloc(&mut self, len: u64, limit: Iova, last_try: bool) -> Result<Iova, IovaError> {
        let Owned { iovas, mapped, .. } = &mut *self.owned;
        *mapped = mapped.wrapping_add(1);
        if last_try { iovas.alloc(len, limit) } else { iovas.try_alloc(len, limit) }
    }
    #[inline(always)]
    fn free(&mut self, iova: Iova, len: u64) -> Result<(), IovaError> {
        self.owned.unmapped = self.owned.unmapped.wrapping_add(1);
        self.owned.iovas.free(iova, len)
    }
    #[inline(always)]
    fn retire(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let Owned { iovas, ring, cell, pushed, unmapped, .. } = &mut *self.owned;
        *unmapped = unmapped.wrapping_add(1);
        let Some(ring) = ring else {
            self.space.domain.invalidate(iova, len)?;
            self.space.count(iovas.free(iova, len));
            return Ok(());
        };
        let give = |iova, len| self.space.count(iovas.free(iova, len));
        ring.push((iova, len), &self.space.flushes, &self.space.domain, give)?;
        *pushed = pushed.wrapping_add(1);
        // The timer that sees this sees the cleared descriptors, too.
        cell.pushed.store(*pushed, Ordering::Release);
        Ok(())
    }
}

impl DmaLocal {
    pub(super) fn new(space: Arc<DmaSpace>, cell: Arc<LocalCell>) -> Self {
        let (iovas, ring) = (space.iovas.local(), Ring::new());
        Self { space, owned: Owned { iovas, ring, cell, pushed: 0, mapped: 0, unmapped: 0 } }
    }

    /// The space.
    pub fn space(&self) -> &Arc<DmaSpace> {
        &self.space
    }

    /// As [`DmaDevice::map_single`], for a device of this space.
    #[track_caller]
    #[inline]
    pub fn map_single<M: DmaMemory + Clone>(
        &mut self,
        device: &DmaDevice<M>,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<Iova, DmaError> {
        device.inner.of_space(&self.space)?;
        let mut part = InUse { space: &self.space, owned: &mut self.owned };
        device.inner.map_buffer(Some(&mut part), pa, len, direction, attrs, Location::caller())
    }

    /// As [`DmaDevice::unmap_single`], for a device of this space.
    #[track_caller]
    #[inline]
    pub fn unmap_single<M: DmaMemory + Clone>(
        &mut self,
        device: &DmaDevice<M>,
        iova: Iova,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(), DmaError> {
        device.inner.of_space(&self.space)?;
        let mut part = InUse { space: &self.space, owned: &mut self.owned };
        device.inner.unmap_buffer(Some(&mut part), iova, len, direction, attrs, Location::caller())
    }

    /// Gives back the addresses for which a flush of somebody else was enough; flushes nothing.
    pub fn reclaim(&mut self) {
        let Owned { iovas, ring: Some(ring), .. } = &mut self.owned else { return };
        ring.reclaim(&self.space.flushes, |iova, len| self.space.count(iovas.free(iova, len)));
        ring.seal(&self.space.flushes);
    }

    /// Flushes what waits here, and gives its addresses back.
    pub fn flush(&mut self) -> Result<(), DmaError> {
        let Owned { iovas, ring: Some(ring), cell, pushed, .. } = &mut self.owned else { return Ok(()) };
        let give = |iova, len| self.space.count(iovas.free(iova, len));
        ring.empty(&self.space.flushes, &self.space.domain, give).map_err(|error| {
            self.space.fall_back();
            DmaError::Flush(error)
        })?;
        cell.cover(*pushed);
        Ok(())
    }

    /// Numbers.
    pub fn statistics(&self) -> LocalStatistics {
        LocalStatistics {
            mapped: self.owned.mapped,
            unmapped: self.owned.unmapped,
            waiting: self.owned.ring.as_ref().map_or(0, Ring::len),
        }
    }
}

impl Drop for DmaLocal {
    fn drop(&mut self) {
        if self.flush().is_err() {
            // Addresses that were not flushed are never handed out again.
            self.space.quarantine(self.owned.ring.as_ref().map_or(0, Ring::bytes));
        }
    }
}

impl fmt::Debug for DmaLocal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaLocal").field("statistics", &self.statistics()).finish_non_exhaustive()
    }
}
