//! IOVA allocation: which addresses a device gets to see.
//!
//! [`IovaDomain`] hands out page-granular, naturally aligned ranges of an aperture, from the top down, at or below a limit (a
//! device's DMA mask), never address 0. Start with [`IovaDomain::new`], [`reserve`](IovaDomain::reserve) what must not be used, then
//! [`alloc`](IovaDomain::alloc) and [`free`](IovaDomain::free). [`Preference`] is the rule "below 4 GiB as long as that works".
//!
//! | Linux `iova.c` / `dma-iommu.c` | Here |
//! |---|---|
//! | rbtree of allocations and two cursors; linear in a fragmented space | B+ tree of gaps that knows what fits where: logarithmic, under a limit too |
//! | magazines of 127 per CPU for 2^0..2^5 pages, loaded and previous | magazines of 160, so that what a full flush queue gives back stays with its CPU; an empty one takes a run of 128 pages at once |
//! | depot, trimmed by a worker every 100 ms down to the number of CPUs | the same by [`trim`](IovaDomain::trim), and never more than 32 |
//! | sizes below 32 pages rounded up to a power of two | the same |
//! | flush of all caches, then one more try | the same; asks owned handles as well |
//! | a second free of a range corrupts the cache | refused and named ([`IovaError`]), as is one with a wrong size |
//!
//! The per-CPU part has two faces. `alloc(cpu, ..)` takes a lock per call, which only the CPU itself ever holds for long. An
//! owned [`LocalIova`] takes none: a cached call through it has no atomic read-modify-write. What an idle handle keeps back is
//! bounded: two magazines of each size, 320 ranges, 20160 pages in all (78.75 MiB of addresses with 4 KiB pages).

mod error;
mod local;
#[cfg(test)]
mod loom_tests;
mod magazine;
mod preference;
#[cfg(test)]
mod property_tests;
mod rcache;
mod state;
mod sync;
#[cfg(test)]
mod tests;
mod tree;
#[cfg(test)]
mod tree_tests;

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

use portcullis_arch::Iova;

pub use error::IovaError;
pub use local::LocalIova;
use magazine::ORDERS;
pub use preference::Preference;
use rcache::{Rcache, Refused, Shape};
use sync::{Lock, Native};

/// Two magazines hold two runs and more: a flush queue that gives 255 ranges back at once does not spill into the depot, from where
/// another CPU would take them, and with them the cache lines of their descriptors. (Linux: 127 entries.) 32 in the depot, as it was before it became a list.
const SHAPE: Shape = Shape { magazine: 160, run: 128, depot: 32 };

/// What an [`IovaDomain`] is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaConfig {
    /// Bytes of a page: the smallest that the page tables of the domain map. A power of two, at least 4096.
    pub granule: u64,
    /// First address of the aperture. Page 0 is never used, even if it is inside.
    pub first: Iova,
    /// Last address of the aperture, inclusive.
    pub last: Iova,
    /// CPUs with a cache behind [`IovaDomain::alloc`]; 0 for none (everything from the tree).
    pub cpus: usize,
}

/// The free addresses of one domain. Shared by all CPUs and all devices of the domain.
pub struct IovaDomain {
    rcache: Rcache<Native>,
    /// log2 of the granule.
    shift: u32,
    handles: AtomicUsize,
}

/// How much of a domain is free, apart from what the caches hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaUsage {
    /// Bytes that are free.
    pub free: u64,
    /// Ranges that they form.
    pub gaps: usize,
    /// Bytes of the largest range that can be allocated.
    pub largest: u64,
}

/// The size of an allocation: one that the caches know, or pages.
#[derive(Clone, Copy)]
enum Size {
    Order(usize),
    Pages(u64),
}

impl IovaDomain {
    /// A space that is all free.
    pub fn new(config: IovaConfig) -> Result<Self, IovaError> {
        let IovaConfig { granule, first, last, cpus } = config;
        let bad = IovaError::BadConfig { granule, first, last };
        if !granule.is_power_of_two() || granule < 4096 {
            return Err(bad);
        }
        let shift = granule.trailing_zeros();
        let start = first.get().div_ceil(granule).max(1);
        let end = pages_upto(last, shift);
        if start >= end {
            return Err(bad);
        }
        Ok(Self { rcache: Rcache::new(start, end, cpus, SHAPE), shift, handles: AtomicUsize::new(0) })
    }

    /// Bytes of a page.
    pub fn granule(&self) -> u64 {
        1 << self.shift
    }

    /// Takes a range out of use for good, with every page it touches and as far as it lies in the aperture; both ends inclusive.
    /// Reserving something twice is fine. Before the domain is used: what is in use cannot be reserved.
    pub fn reserve(&self, first: Iova, last: Iova) -> Result<(), IovaError> {
        let start = first.get() >> self.shift;
        let end = (last.get() >> self.shift) + 1;
        let (low, high) = self.rcache.space.0.with(|space| space.aperture());
        let (start, end) = (start.max(low), end.min(high));
        if start >= end || self.rcache.reserve(start, end) {
            return Ok(());
        }
        Err(IovaError::InUse { first, last })
    }

    /// Allocates `len` bytes, rounded up to pages (below 32 pages to a power of two of them), aligned to the next power of two,
    /// with no byte above `limit`. `cpu` only chooses a cache. When there is no room, everything that caches hold is given
    /// back first.
    pub fn alloc(&self, cpu: usize, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        let (size, last) = self.request(len, limit)?;
        let once = || self.once(cpu, size, last);
        let page = once().or_else(|| {
            self.rcache.flush();
            once()
        });
        self.granted(page, len, limit)
    }

    /// The same without giving caches back (Linux `alloc_iova_fast` with `flush_rcache` false): for a first try that may fail.
    pub fn try_alloc(&self, cpu: usize, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        let (size, last) = self.request(len, limit)?;
        self.granted(self.once(cpu, size, last), len, limit)
    }

    /// Gives a range back, with the length it was allocated with. Any CPU may.
    pub fn free(&self, cpu: usize, iova: Iova, len: u64) -> Result<(), IovaError> {
        let (page, size) = self.given(iova, len)?;
        let done = match size {
            Size::Order(order) => self.rcache.free_cached(cpu, order, page),
            Size::Pages(pages) => self.rcache.free_large(page, pages),
        };
        done.map_err(|refused| self.refused(refused, iova, len))
    }

    /// A handle with caches of its own, for one CPU or thread.
    pub fn local(self: &Arc<Self>) -> LocalIova {
        LocalIova::new(self.clone())
    }

    /// Gives what all caches hold back to the tree, and asks the owners of handles to do so at their next call.
    pub fn flush(&self) {
        self.rcache.flush();
    }

    /// Gives one full magazine of each size back to the tree where there are more of them than CPUs; returns how many. To be
    /// called every 100 ms or so, while it returns something.
    pub fn trim(&self) -> usize {
        self.rcache.trim(self.rcache.cpus())
    }

    /// What is free, without what caches hold ([`flush`](IovaDomain::flush) first to count that as well).
    pub fn usage(&self) -> IovaUsage {
        self.rcache.space.0.with(|space| IovaUsage {
            free: space.gaps.pages() << self.shift,
            gaps: space.gaps.gaps(),
            largest: space.gaps.largest() << self.shift,
        })
    }

    fn once(&self, cpu: usize, size: Size, last: u64) -> Option<u64> {
        match size {
            Size::Order(order) => self.rcache.alloc_cached(cpu, order, last),
            Size::Pages(pages) => self.rcache.alloc_large(pages, last),
        }
    }

    /// The size, and the last page that may be used.
    #[inline(always)]
    fn request(&self, len: u64, limit: Iova) -> Result<(Size, u64), IovaError> {
        let size = size_of(len, self.shift)?;
        match pages_upto(limit, self.shift).min(self.rcache.end()).checked_sub(1) {
            Some(last) => Ok((size, last)),
            None => Err(self.full(len, limit)),
        }
    }

    /// The page and size of a range that is given back.
    #[inline(always)]
    fn given(&self, iova: Iova, len: u64) -> Result<(u64, Size), IovaError> {
        let size = size_of(len, self.shift)?;
        let page = iova.get() >> self.shift;
        // Whether the length is right as well, the state of the page tells.
        if !iova.is_aligned(1 << self.shift) || page >= self.rcache.end() {
            return Err(IovaError::NotAllocated { iova, len });
        }
        Ok((page, size))
    }

    #[inline]
    fn granted(&self, page: Option<u64>, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        match page {
            Some(page) => Ok(Iova(page << self.shift)),
            None => Err(self.full(len, limit)),
        }
    }

    #[cold]
    #[inline(never)]
    fn full(&self, len: u64, limit: Iova) -> IovaError {
        let IovaUsage { free, largest, .. } = self.usage();
        IovaError::Full { len, limit, free, largest, handles: self.handles.load(Ordering::Relaxed) }
    }

    #[cold]
    #[inline(never)]
    fn refused(&self, refused: Refused, iova: Iova, len: u64) -> IovaError {
        match refused {
            Refused::Free => IovaError::DoubleFree { iova, len },
            Refused::Unknown => IovaError::NotAllocated { iova, len },
            Refused::Size(pages) => IovaError::WrongSize { iova, len, allocated: pages << self.shift },
        }
    }
}

impl fmt::Debug for IovaDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IovaDomain").field("granule", &self.granule()).field("usage", &self.usage()).finish()
    }
}

/// Whole pages at or below an inclusive last address.
#[inline(always)]
fn pages_upto(last: Iova, shift: u32) -> u64 {
    match last.checked_add(1) {
        Some(end) => end.get() >> shift,
        None => 1 << (64 - shift),
    }
}

/// The size of an allocation of `len` bytes.
#[inline(always)]
fn size_of(len: u64, shift: u32) -> Result<Size, IovaError> {
    let Some(more) = len.checked_sub(1) else { return Err(IovaError::BadLength { len }) };
    // Pages less one: its bits are the order.
    let more = more >> shift;
    let order = (64 - more.leading_zeros()) as usize;
    Ok(if order < ORDERS { Size::Order(order) } else { Size::Pages(more + 1) })
}
