//! Lazy invalidation: addresses that are unmapped but may still be in a TLB wait in a [`Ring`] for a flush.
//!
//! Linux stores with each waiting address how many flushes had begun when it was queued (`fq->fq_flush_start_cnt`) and
//! frees it when more than that have finished. Reading the counter costs a full barrier per address, so here a ring
//! reads it once for all that it holds ([`Ring::seal`]): later than Linux, which can only make an address wait longer.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use portcullis_arch::Iova;
use portcullis_drivers::ops::IommuError;
use spin::Mutex;

use crate::Domain;

/// Addresses that wait in one ring at most (Linux `IOVA_DEFAULT_FQ_SIZE` is 256, of which 255 can be used). With one more they are two
/// runs of a CPU's IOVA cache, whose magazines hold them all: nothing of them goes by way of other CPUs.
pub(super) const RING: usize = 255;
/// A ring is looked after each time so many more wait: half a ring, so that a flush of one CPU serves half of what waits on another.
const BATCH: usize = 128;

/// The flushes of a domain: how many began, and up to which all is finished.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Flushes {
    started: AtomicU64,
    finished: AtomicU64,
    failed: AtomicU64,
    one: Mutex<()>,
}

impl Flushes {
    pub fn finished(&self) -> u64 {
        self.finished.load(Ordering::Acquire)
    }

    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// How many flushes had begun, for everything that the caller has unmapped before.
    pub fn began(&self) -> u64 {
        // Either the next flush to begin sees the cleared descriptors, or its number is not counted here.
        fence(Ordering::SeqCst);
        self.started.load(Ordering::Relaxed)
    }

    /// Returns when a flush has finished that began after [`began`](Self::began) gave `began`.
    pub fn flush_after(&self, began: u64, domain: &Domain) -> Result<(), IommuError> {
        let _one = self.one.lock();
        if self.finished() > began {
            // Somebody else's, while the lock was waited for.
            return Ok(());
        }
        let number = self.started.load(Ordering::Relaxed).wrapping_add(1);
        self.started.store(number, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        domain.invalidate_all().inspect_err(|_| {
            self.failed.fetch_add(1, Ordering::Relaxed);
        })?;
        self.finished.store(number, Ordering::Release);
        Ok(())
    }
}

/// Addresses that wait. The first `sealed` of them are free when more than `began` flushes have finished.
#[derive(Debug)]
pub(super) struct Ring {
    waiting: Vec<(Iova, u64)>,
    sealed: usize,
    began: u64,
}

impl Ring {
    /// `None` without memory for it.
    pub fn new() -> Option<Self> {
        let mut waiting = Vec::new();
        waiting.try_reserve_exact(RING).ok()?;
        Some(Self { waiting, sealed: 0, began: 0 })
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of addresses that wait.
    pub fn bytes(&self) -> u64 {
        self.waiting.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    /// All that waits now is free once a flush that begins later has finished. Gives what to ask
    /// [`flush_after`](Flushes::flush_after) for.
    pub fn seal(&mut self, flushes: &Flushes) -> u64 {
        self.began = flushes.began();
        self.sealed = self.waiting.len();
        self.began
    }

    /// Gives back what has become free.
    pub fn reclaim(&mut self, flushes: &Flushes, mut give: impl FnMut(Iova, u64)) {
        if self.sealed > 0 && flushes.finished() > self.began {
            for (iova, len) in self.waiting.drain(..self.sealed.min(self.waiting.len())) {
                give(iova, len);
            }
            self.sealed = 0;
        }
    }

    /// Lets an address wait whose descriptors are cleared. When the ring is full, flushes first; if that fails the
    /// address is not in the ring.
    #[inline(always)]
    pub fn push(
        &mut self,
        entry: (Iova, u64),
        flushes: &Flushes,
        domain: &Domain,
        mut give: impl FnMut(Iova, u64),
    ) -> Result<(), IommuError> {
        if self.waiting.len() >= RING {
            self.look_after(flushes, &mut give);
            if self.waiting.len() >= RING {
                self.make_room(flushes, domain, &mut give)?;
            }
        }
        self.waiting.push(entry);
        if self.waiting.len().is_multiple_of(BATCH) {
            self.look_after(flushes, give);
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn make_room(
        &mut self,
        flushes: &Flushes,
        domain: &Domain,
        give: impl FnMut(Iova, u64),
    ) -> Result<(), IommuError> {
        let began = self.seal(flushes);
        flushes.flush_after(began, domain)?;
        self.reclaim(flushes, give);
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn look_after(&mut self, flushes: &Flushes, give: impl FnMut(Iova, u64)) {
        self.reclaim(flushes, give);
        if self.sealed == 0 {
            self.seal(flushes);
        }
    }

    /// Flushes and gives everything back.
    pub fn empty(
        &mut self,
        flushes: &Flushes,
        domain: &Domain,
        give: impl FnMut(Iova, u64),
    ) -> Result<(), IommuError> {
        if self.waiting.is_empty() { Ok(()) } else { self.make_room(flushes, domain, give) }
    }
}
