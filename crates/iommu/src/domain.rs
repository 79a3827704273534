//! A domain of the core: a driver's domain, and what the core has to remember about it.

use alloc::sync::Arc;
use core::fmt;

use portcullis_arch::{Asid, Iova, Pa};
use portcullis_drivers::fault::FaultHandler;
use portcullis_drivers::ops::{DomainKind, DomainOps, IommuError, TableRoot};
use portcullis_pgtable::MapError;
use spin::Mutex;

use crate::manager::InstanceId;
use crate::{Prot, ReservedKind, ReservedRegion};

/// What the transactions of one or more groups meet. Any number of groups of the same IOMMU may be attached; dropping the
/// last reference frees its context and tables.
pub struct Domain {
    pub(crate) ops: Arc<dyn DomainOps>,
    pub(crate) instance: InstanceId,
    pub(crate) handler: Mutex<Option<Arc<dyn FaultHandler>>>,
}

impl Domain {
    /// For a driver's domain. Domains of a core come from [`IommuCore`](crate::IommuCore), which also attaches them.
    pub fn new(ops: Arc<dyn DomainOps>, instance: InstanceId) -> Arc<Self> {
        Arc::new(Self { ops, instance, handler: Mutex::new(None) })
    }

    /// The kind.
    pub fn kind(&self) -> DomainKind {
        self.ops.kind()
    }
    /// The IOMMU it belongs to.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }
    /// The context bank, if it has one.
    pub fn bank(&self) -> Option<u8> {
        self.ops.bank()
    }
    /// The tag of its stage 1 TLB entries, if it has one.
    pub fn asid(&self) -> Option<Asid> {
        self.ops.asid()
    }
    /// The driver's domain.
    pub fn ops(&self) -> &Arc<dyn DomainOps> {
        &self.ops
    }

    /// Maps `[iova, iova + len)` to `[pa, pa + len)`; all or nothing (Linux `iommu_map`).
    pub fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.ops.map(iova, pa, len, prot)
    }
    /// Unmaps; afterwards no device reaches the memory through this domain. Gives the bytes that were mapped (Linux
    /// `iommu_unmap`).
    pub fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.ops.unmap(iova, len)
    }
    /// Unmaps, but leaves what the TLB knows about the pages to a later [`invalidate_all`](Self::invalidate_all)
    /// (Linux `iommu_unmap_fast` with `iotlb_gather.queued`). Until that is complete, devices may reach the memory.
    pub fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.ops.unmap_lazy(iova, len)
    }
    /// Makes the TLB forget a range, and waits.
    pub fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError> {
        self.ops.invalidate(iova, len)
    }
    /// Makes the TLB forget everything of the domain, and waits (Linux `iommu_flush_iotlb_all`).
    pub fn invalidate_all(&self) -> Result<(), IommuError> {
        self.ops.invalidate_all()
    }
    /// Changes what existing mappings allow.
    pub fn protect(&self, iova: Iova, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.ops.protect(iova, len, prot)
    }
    /// Where an address goes (Linux `iommu_iova_to_phys`).
    pub fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        self.ops.iova_to_phys(iova)
    }
    /// Page and block sizes as a bit map; 0 where nothing can be mapped.
    pub fn page_sizes(&self) -> u64 {
        self.ops.page_sizes()
    }
    /// First and last address that can be mapped.
    pub fn input_range(&self) -> Option<(Iova, Iova)> {
        self.ops.input_range()
    }
    /// The stage 1 table as the hardware got it.
    pub fn table_root(&self) -> Option<TableRoot> {
        self.ops.table_root()
    }

    /// Who is asked about faults of devices without a handler of their own (Linux `iommu_set_fault_handler`).
    pub fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        let old = core::mem::replace(&mut *self.handler.lock(), handler);
        // Not under the lock: a handler may own anything.
        drop(old);
    }

    /// Whether the driver made its table, so that the core can map in it.
    pub(crate) fn is_paging(&self) -> bool {
        self.ops.input_range().is_some()
    }

    /// Maps a direct region one to one, where it is not already. `Ok(false)` if this kind of domain cannot.
    pub(crate) fn map_direct(&self, region: &ReservedRegion) -> Result<bool, IommuError> {
        if !self.is_paging() {
            let relaxed = region.kind == ReservedKind::DirectRelaxable;
            return Ok(relaxed || self.kind() == DomainKind::Identity);
        }
        if region.len == 0 {
            return Ok(true);
        }
        let page = 1u64 << self.ops.page_sizes().trailing_zeros().min(63);
        let mut start = region.start.get() & !(page - 1);
        let end = region.end().checked_next_multiple_of(page).unwrap_or(!(page - 1));
        if start >= end {
            // Only the very last page of 64 bits.
            self.map(Iova(start), Pa(start), page, region.prot)?;
        }
        // Another device's region may cover a part of it. Each try maps up to the first page that is there already, so
        // there are no more tries than such pages.
        while start < end {
            let Err(error) = self.map(Iova(start), Pa(start), end - start, region.prot) else { break };
            let Some(MapError::AlreadyMapped { iova: taken }) = error.map_error() else {
                return Err(error);
            };
            let at = taken & !(page - 1);
            if self.iova_to_phys(Iova(at)) != Some(Pa(at)) {
                return Err(error);
            }
            if at > start {
                self.map(Iova(start), Pa(start), at - start, region.prot)?;
            }
            start = at.saturating_add(page);
        }
        Ok(true)
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("kind", &self.kind())
            .field("instance", &self.instance)
            .field("bank", &self.bank())
            .finish()
    }
}
