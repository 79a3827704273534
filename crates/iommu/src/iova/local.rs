//! A CPU's own part of an IOVA domain.

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use portcullis_arch::Iova;

use super::rcache::Owned;
use super::{IovaDomain, IovaError, Size};

/// Caches with one owner: no lock, and no atomic read-modify-write while they last. From [`IovaDomain::local`].
///
/// Ranges may be freed through another handle, or through the domain, than they were allocated with. A handle reads at each call
/// whether the domain wants its cached ranges back (because an allocation failed somewhere) and returns them then; so one that
/// is not used keeps what it has, at most 320 ranges of each size. Dropping it returns them (Linux: a CPU goes offline).
pub struct LocalIova {
    domain: Arc<IovaDomain>,
    owned: Owned,
}

impl LocalIova {
    pub(super) fn new(domain: Arc<IovaDomain>) -> Self {
        domain.handles.fetch_add(1, Ordering::Relaxed);
        Self { owned: domain.rcache.owned(), domain }
    }

    /// The domain.
    pub fn domain(&self) -> &Arc<IovaDomain> {
        &self.domain
    }

    /// As [`IovaDomain::alloc`].
    #[inline(always)]
    pub fn alloc(&mut self, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        let (size, last) = self.domain.request(len, limit)?;
        match self.once(size, last) {
            Some(page) => Ok(Iova(page << self.domain.shift)),
            None => self.again(size, last, len, limit),
        }
    }

    /// As [`IovaDomain::try_alloc`].
    #[inline]
    pub fn try_alloc(&mut self, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        let (size, last) = self.domain.request(len, limit)?;
        let page = self.once(size, last);
        self.domain.granted(page, len, limit)
    }

    /// As [`IovaDomain::free`].
    #[inline(always)]
    pub fn free(&mut self, iova: Iova, len: u64) -> Result<(), IovaError> {
        let (page, size) = self.domain.given(iova, len)?;
        let rcache = &self.domain.rcache;
        let done = match size {
            Size::Order(order) => rcache.free_owned(&mut self.owned, order, page),
            Size::Pages(pages) => rcache.free_large(page, pages),
        };
        done.map_err(|refused| self.domain.refused(refused, iova, len))
    }

    /// Returns what is cached if the domain asked for it. For handles that are idle for long.
    pub fn poll(&mut self) {
        self.domain.rcache.follow(&mut self.owned);
    }

    /// Returns what is cached.
    pub fn drain(&mut self) {
        self.domain.rcache.drain(&mut self.owned);
    }

    #[inline(always)]
    fn once(&mut self, size: Size, last: u64) -> Option<u64> {
        let rcache = &self.domain.rcache;
        match size {
            Size::Order(order) => rcache.alloc_owned(&mut self.owned, order, last),
            Size::Pages(pages) => rcache.alloc_large(pages, last),
        }
    }

    #[cold]
    #[inline(never)]
    fn again(&mut self, size: Size, last: u64, len: u64, limit: Iova) -> Result<Iova, IovaError> {
        self.drain();
        self.domain.rcache.flush();
        let page = self.once(size, last);
        self.domain.granted(page, len, limit)
    }
}

impl Drop for LocalIova {
    fn drop(&mut self) {
        self.drain();
        self.domain.handles.fetch_sub(1, Ordering::Relaxed);
    }
}
