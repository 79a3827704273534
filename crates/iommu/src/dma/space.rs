//! The address space that the devices of a domain share: [`DmaSpace`].

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use portcullis_arch::Iova;
use portcullis_drivers::ops::{DomainOps, IommuError};
use spin::Mutex;

use super::local::{DmaLocal, LocalCell};
use super::retire::{Flushes, Ring};
use super::{DmaError, Mode, SpaceConfig};
use crate::Domain;
use crate::iova::{IovaConfig, IovaDomain, IovaError};

/// Nanoseconds that an unmapped address waits for a flush (Linux `IOVA_DEFAULT_FQ_TIMEOUT`).
const LAZY_NS: u64 = 10_000_000;

/// What is only this CPU's shares no cache line with what is another's.
#[repr(align(128))]
struct Apart<T>(T);

/// The free addresses of a translating domain, and the invalidations owed to it (Linux `iommu_dma_cookie`). One per
/// domain: who maps in the domain without it has to keep to addresses that are reserved in it.
pub struct DmaSpace {
    pub(super) domain: Arc<Domain>,
    /// The same, one step nearer.
    pub(super) ops: Arc<dyn DomainOps>,
    pub(super) iovas: Arc<IovaDomain>,
    pub(super) granule: u64,
    pub(super) first: Iova,
    pub(super) last: Iova,
    current_cpu: fn() -> usize,
    cpus: usize,
    lazy: Apart<AtomicBool>,
    /// One per CPU; none if the space has always been strict.
    rings: Vec<Apart<Mutex<Ring>>>,
    pub(super) flushes: Flushes,
    locals: Mutex<Vec<Weak<LocalCell>>>,
    timer: Mutex<Timer>,
    quarantined: AtomicU64,
    bad_frees: AtomicU64,
}

#[derive(Default)]
struct Timer {
    /// When it was last looked at.
    last: u64,
    /// Since when something waits, at the earliest.
    since: Option<u64>,
}

/// Numbers of a space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceStatistics {
    /// Flushes of everything.
    pub flushes: u64,
    /// Flushes that failed.
    pub failed_flushes: u64,
    /// Addresses that wait for a flush in the rings of the space (those of a [`DmaLocal`] are its own).
    pub waiting: usize,
    /// Bytes of addresses that are never handed out again, because an invalidation failed.
    pub quarantined: u64,
    /// Addresses that waited for a flush and were not allocated as they were freed: a driver unmapped with a wrong size.
    pub bad_frees: u64,
}

/// Why a range could not be released.
pub(super) enum ReleaseError {
    /// Nothing was mapped.
    Nothing,
    /// The hardware may still use it.
    Iommu(IommuError),
    /// It was not allocated as it was given back.
    Iova(IovaError),
}

/// Where addresses come from and go to: a CPU's ring and magazines, shared or owned.
pub(super) trait Part {
    fn space(&self) -> &DmaSpace;
    /// As [`IovaDomain::try_alloc`], or in the last try [`IovaDomain::alloc`].
    fn alloc(&mut self, len: u64, limit: Iova, last_try: bool) -> Result<Iova, IovaError>;
    /// No device knows the address any more.
    fn free(&mut self, iova: Iova, len: u64) -> Result<(), IovaError>;
    /// The address is unmapped, but TLBs may know it.
    fn retire(&mut self, iova: Iova, len: u64) -> Result<(), IommuError>;

    /// Unmaps whole pages and gives the address back, now or after a flush.
    #[inline(always)]
    fn release(&mut self, base: Iova, size: u64, strict: bool) -> Result<(), ReleaseError> {
        let space = self.space();
        if strict || !space.is_lazy() {
            return self.release_now(base, size);
        }
        match space.ops.unmap_lazy(base, size) {
            Ok(0) => Err(ReleaseError::Nothing),
            Ok(_) => match self.retire(base, size) {
                Ok(()) => Ok(()),
                Err(_) => self.release_one(base, size),
            },
            Err(error) => Err(space.lost(size, error)),
        }
    }

    #[inline(never)]
    fn release_now(&mut self, base: Iova, size: u64) -> Result<(), ReleaseError> {
        let space = self.space();
        match space.ops.unmap(base, size) {
            Ok(0) => Err(ReleaseError::Nothing),
            Ok(_) => self.free(base, size).map_err(ReleaseError::Iova),
            Err(error) => Err(space.lost(size, error)),
        }
    }

    /// The flush failed. One address may do what everything did not.
    #[cold]
    #[inline(never)]
    fn release_one(&mut self, base: Iova, size: u64) -> Result<(), ReleaseError> {
        let space = self.space();
        space.fall_back();
        match space.domain.invalidate(base, size) {
            Ok(()) => self.free(base, size).map_err(ReleaseError::Iova),
            Err(error) => Err(space.lost(size, error)),
        }
    }
}

/// The part that is shared by all who run on a CPU.
pub(super) struct CpuPart<'a> {
    space: &'a DmaSpace,
    cpu: usize,
}

impl Part for CpuPart<'_> {
    fn space(&self) -> &DmaSpace {
        self.space
    }
    fn alloc(&mut self, len: u64, limit: Iova, last_try: bool) -> Result<Iova, IovaError> {
        let iovas = &self.space.iovas;
        if last_try { iovas.alloc(self.cpu, len, limit) } else { iovas.try_alloc(self.cpu, len, limit) }
    }
    fn free(&mut self, iova: Iova, len: u64) -> Result<(), IovaError> {
        self.space.iovas.free(self.cpu, iova, len)
    }
    fn retire(&mut self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let Some(ring) = self.space.rings.get(self.cpu) else {
            // Not reached: without rings the space is strict. Strict is right in any case.
            self.space.domain.invalidate(iova, len)?;
            self.space.count(self.space.iovas.free(self.cpu, iova, len));
            return Ok(());
        };
        let give = |iova, len| self.space.count(self.space.iovas.free(self.cpu, iova, len));
        ring.0.lock().push((iova, len), &self.space.flushes, &self.space.domain, give)
    }
}

impl DmaSpace {
    /// A space over all that `domain` can map, without page 0 and what is reserved.
    pub fn new(domain: Arc<Domain>, config: SpaceConfig<'_>) -> Result<Arc<Self>, DmaError> {
        let no_table = DmaError::NoTable { kind: domain.kind() };
        let Some((first, last)) = domain.input_range() else { return Err(no_table) };
        if domain.page_sizes() == 0 {
            return Err(no_table);
        }
        let granule = 1u64 << domain.page_sizes().trailing_zeros();
        // An address of 0 looks like none.
        let first = Iova(first.get().max(granule));
        let last = last.min(config.limit.unwrap_or(last));
        let cpus = config.cpus.max(1);
        let iovas = IovaDomain::new(IovaConfig { granule, first, last, cpus }).map_err(DmaError::Space)?;
        for region in config.reserved.iter().filter(|region| region.len > 0) {
            let start = region.start.get() & !(granule - 1);
            let end = region.end().saturating_sub(1) | (granule - 1);
            iovas.reserve(Iova(start), Iova(end)).map_err(DmaError::Space)?;
        }
        let mut rings = Vec::new();
        if config.mode == Mode::Lazy {
            rings.extend((0..cpus).map_while(|_| Ring::new()).map(|ring| Apart(Mutex::new(ring))));
        }
        // As Linux: without memory for the rings, strict.
        let lazy = rings.len() == cpus && config.mode == Mode::Lazy;
        Ok(Arc::new(Self {
            ops: domain.ops().clone(),
            domain,
            iovas: Arc::new(iovas),
            granule,
            first,
            last,
            current_cpu: config.current_cpu,
            cpus,
            lazy: Apart(AtomicBool::new(lazy)),
            rings,
            flushes: Flushes::default(),
            locals: Mutex::new(Vec::new()),
            timer: Mutex::new(Timer::default()),
            quarantined: AtomicU64::new(0),
            bad_frees: AtomicU64::new(0),
        }))
    }

    /// The domain.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Bytes of a page: what mappings are rounded to.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// First and last address that can be handed out.
    pub fn range(&self) -> (Iova, Iova) {
        (self.first, self.last)
    }

    /// How unmaps reach the TLB now. A space that was asked to be lazy is strict after a flush has failed, and without
    /// memory for its rings.
    pub fn mode(&self) -> Mode {
        if self.is_lazy() { Mode::Lazy } else { Mode::Strict }
    }

    pub(super) fn is_lazy(&self) -> bool {
        self.lazy.0.load(Ordering::Relaxed)
    }

    /// A part of the space for one CPU (or thread) alone.
    pub fn local(self: &Arc<Self>) -> DmaLocal {
        let cell = Arc::new(LocalCell::default());
        self.locals.lock().push(Arc::downgrade(&cell));
        DmaLocal::new(self.clone(), cell)
    }

    /// For the owner of time, every few milliseconds: flushes when something has waited for 10 ms. What was unmapped
    /// between two calls counts as unmapped right after the first. Tells whether it has flushed.
    pub fn tick(&self, now_ns: u64) -> Result<bool, DmaError> {
        let waits = self.rings.iter().any(|ring| ring.0.lock().len() > 0)
            || self.cells().iter().any(|cell| cell.pushed() != cell.covered());
        {
            let mut timer = self.timer.lock();
            let last = core::mem::replace(&mut timer.last, now_ns);
            if !waits {
                timer.since = None;
                return Ok(false);
            }
            let since = *timer.since.get_or_insert(last);
            if now_ns.saturating_sub(since) < LAZY_NS {
                return Ok(false);
            }
            timer.since = None;
        }
        self.flush().map(|()| true)
    }

    /// Flushes everything now (Linux `iommu_dma_flush_iotlb_all`). When it returns without an error, no device reaches
    /// what was unmapped before the call.
    pub fn flush(&self) -> Result<(), DmaError> {
        for ring in &self.rings {
            ring.0.lock().seal(&self.flushes);
        }
        let cells: Vec<_> = self.cells().into_iter().map(|cell| (cell.pushed(), cell)).collect();
        let began = self.flushes.began();
        self.flushes.flush_after(began, &self.domain).map_err(|error| {
            self.fall_back();
            DmaError::Flush(error)
        })?;
        for (cpu, ring) in self.rings.iter().enumerate() {
            let give = |iova, len| self.count(self.iovas.free(cpu, iova, len));
            ring.0.lock().reclaim(&self.flushes, give);
        }
        for (pushed, cell) in cells {
            cell.cover(pushed);
        }
        Ok(())
    }

    /// Numbers.
    pub fn statistics(&self) -> SpaceStatistics {
        SpaceStatistics {
            flushes: self.flushes.finished(),
            failed_flushes: self.flushes.failed(),
            waiting: self.rings.iter().map(|ring| ring.0.lock().len()).sum(),
            quarantined: self.quarantined.load(Ordering::Relaxed),
            bad_frees: self.bad_frees.load(Ordering::Relaxed),
        }
    }

    fn cells(&self) -> Vec<Arc<LocalCell>> {
        let mut locals = self.locals.lock();
        locals.retain(|cell| cell.strong_count() > 0);
        locals.iter().filter_map(Weak::upgrade).collect()
    }

    /// From now on, strict.
    pub(super) fn fall_back(&self) {
        self.lazy.0.store(false, Ordering::Relaxed);
    }

    /// Counts addresses that the allocator did not take back.
    pub(super) fn count(&self, freed: Result<(), IovaError>) {
        if freed.is_err() {
            self.bad_frees.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Never hands out addresses again that the hardware may still use.
    #[cold]
    #[inline(never)]
    fn lost(&self, len: u64, error: IommuError) -> ReleaseError {
        self.quarantine(len);
        ReleaseError::Iommu(error)
    }

    /// Never hands out an address again.
    pub(super) fn quarantine(&self, len: u64) {
        self.quarantined.fetch_add(len, Ordering::Relaxed);
    }

    pub(super) fn cpu_part(&self) -> CpuPart<'_> {
        CpuPart { space: self, cpu: (self.current_cpu)() % self.cpus }
    }

    /// Whole pages that hold `len` bytes from `address` on: offset in the first page, and their bytes.
    #[inline]
    pub(super) fn pages(&self, address: u64, len: u64) -> Option<(u64, u64)> {
        // A page is a power of two, which a division would not know.
        let mask = self.granule - 1;
        let offset = address & mask;
        Some((offset, offset.checked_add(len)?.checked_add(mask)? & !mask))
    }
}

impl Drop for DmaSpace {
    /// The domain may live on, so nothing that was unmapped stays reachable.
    fn drop(&mut self) {
        if self.rings.iter().any(|ring| ring.0.lock().len() > 0) {
            let began = self.flushes.began();
            let _unmapped_for_good = self.flushes.flush_after(began, &self.domain);
        }
    }
}

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaSpace")
            .field("domain", &self.domain)
            .field("range", &self.range())
            .field("mode", &self.mode())
            .finish_non_exhaustive()
    }
}
