//! How a change of live tables reaches the hardware's TLBs.

/// What a page table tells the owner of the TLBs while it takes translations away. One value belongs to one call,
/// so an implementation may gather (Linux's `iommu_iotlb_gather`).
///
/// When a method is called, the changed descriptors are already visible to walkers: a register write that the
/// implementation makes is behind the barrier.
pub trait Flush {
    /// Leaf entries of `[iova, iova + len)` are gone or changed; each covered `granule` bytes. The range may have
    /// holes. It may be invalidated now, gathered, or left to a later flush of everything (lazy mode), but nobody may
    /// reuse the memory behind it before that is complete.
    fn leaf(&mut self, iova: u64, len: u64, granule: u64);

    /// Everything cached about `[iova, iova + len)`, leaves and walk-cache entries alike, has to go.
    ///
    /// **Must be complete when it returns**: the caller frees a table that lay below, or writes a new leaf where an
    /// incompatible one was (break-before-make). Lazy mode does not exist here.
    fn table(&mut self, iova: u64, len: u64);
}

/// Flushes nothing: for tables that no hardware uses (not attached yet, or already detached and flushed).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoFlush;

impl Flush for NoFlush {
    #[inline]
    fn leaf(&mut self, _: u64, _: u64, _: u64) {}
    #[inline]
    fn table(&mut self, _: u64, _: u64) {}
}

/// Leaves what leaves cached to a later flush of everything (lazy mode); tables are still flushed at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LazyFlush<F>(pub F);

impl<F: Flush> Flush for LazyFlush<F> {
    #[inline]
    fn leaf(&mut self, _: u64, _: u64, _: u64) {}
    #[inline]
    fn table(&mut self, iova: u64, len: u64) {
        self.0.table(iova, len);
    }
}

impl<F: Flush + ?Sized> Flush for &mut F {
    #[inline]
    fn leaf(&mut self, iova: u64, len: u64, granule: u64) {
        (**self).leaf(iova, len, granule);
    }
    #[inline]
    fn table(&mut self, iova: u64, len: u64) {
        (**self).table(iova, len);
    }
}
