//! A guest's domain: its stage 1 table in guest memory, or that of a process.

use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Asid, Iova, Pa};
use portcullis_drivers::ops::{DomainKind, DomainOps, DomainSpec, IommuError, Paging, TableRoot};
use portcullis_drivers::tables::{TableGuard, TableMemory};
use portcullis_hal::DmaMemory;
use portcullis_pgtable::{Config, Flush, PageTable, Prot, Stage1};
use spin::Mutex;

use super::{ViommuError, ViommuHost, ViommuTable};

impl From<ViommuError> for IommuError {
    fn from(error: ViommuError) -> Self {
        Self::Virtual { reason: error.reason() }
    }
}

/// A domain of a [`GuestIommu`](super::GuestIommu).
pub(super) struct GuestDomain<M: DmaMemory> {
    host: Arc<dyn ViommuHost>,
    kind: DomainKind,
    table: Option<PageTable<Stage1, TableMemory<M>>>,
    root: Option<TableRoot>,
    guard: Arc<TableGuard>,
    /// Who is attached.
    endpoints: Mutex<BTreeSet<u32>>,
}

/// Tells the host what has been unmapped. Leaves are gathered, tables wait.
struct Notify<'a> {
    host: &'a dyn ViommuHost,
    /// Who is attached when something is told: whoever comes later walks what is in the table by then.
    attached: &'a Mutex<BTreeSet<u32>>,
    guard: &'a TableGuard,
    gathered: Option<(u64, u64)>,
    result: Result<(), ViommuError>,
}

impl Notify<'_> {
    fn send(&mut self, start: u64, end: u64) {
        let endpoints: Vec<u32> = self.attached.lock().iter().copied().collect();
        for endpoint in endpoints {
            let range = Some((Iova(start), end.saturating_sub(start)));
            if let Err(error) = self.host.invalidate(endpoint, range) {
                // Where the device has gone, its tables have gone out of use.
                if error != ViommuError::Gone {
                    self.guard.keep();
                    self.result = self.result.and(Err(error));
                }
            }
        }
    }

    fn finish(mut self) -> Result<(), ViommuError> {
        if let Some((start, end)) = self.gathered.take() {
            self.send(start, end);
        }
        self.result
    }
}

impl Flush for Notify<'_> {
    fn leaf(&mut self, iova: u64, len: u64, _granule: u64) {
        let (start, end) = self.gathered.unwrap_or((iova, iova));
        self.gathered = Some((start.min(iova), end.max(iova.saturating_add(len))));
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.send(iova, iova.saturating_add(len));
    }
}

impl<M: DmaMemory + Clone + 'static> GuestDomain<M> {
    pub fn new(host: Arc<dyn ViommuHost>, memory: &M, spec: DomainSpec) -> Result<Arc<Self>, IommuError> {
        let guard = Arc::new(TableGuard::default());
        let (kind, table, root) = match spec {
            DomainSpec::Blocked => (DomainKind::Blocked, None, None),
            DomainSpec::Identity => (DomainKind::Identity, None, None),
            DomainSpec::Process(root) => (DomainKind::Process, None, Some(root)),
            DomainSpec::Stage1(paging) => {
                let table = Self::build(&*host, memory, &guard, paging)?;
                let root = TableRoot::from_registers(&table.registers(), table.config().granule);
                (DomainKind::Stage1, Some(table), Some(root))
            }
            _ => return Err(IommuError::Unsupported { what: "second stage: that is its host's" }),
        };
        Ok(Arc::new(Self { host, kind, table, root, guard, endpoints: Mutex::default() }))
    }

    fn build(
        host: &dyn ViommuHost,
        memory: &M,
        guard: &Arc<TableGuard>,
        paging: Paging,
    ) -> Result<PageTable<Stage1, TableMemory<M>>, IommuError> {
        let info = host.info();
        let granule = paging.granule.unwrap_or_else(|| info.smallest_granule());
        let config = Config::new(
            granule,
            paging.input_bits.unwrap_or(info.va_bits),
            paging.output_bits.unwrap_or(info.ipa_bits),
        )
        .coherent_walk(paging.coherent_walk.unwrap_or(info.coherent_walk));
        Ok(PageTable::new(TableMemory::new(memory.clone(), guard.clone()), config)?)
    }

    /// What the host has to be told about the domain.
    pub fn as_table(&self) -> ViommuTable {
        match (self.kind, self.root) {
            (DomainKind::Identity, _) => ViommuTable::Bypass,
            (_, Some(root)) => ViommuTable::Stage1(root),
            _ => ViommuTable::Blocked,
        }
    }

    /// Points an endpoint here.
    pub fn join(&self, endpoint: u32) -> Result<(), IommuError> {
        // Before: an unmapping from now on must reach it.
        let fresh = self.endpoints.lock().insert(endpoint);
        let set = self.host.set_table(endpoint, self.as_table());
        // Unconfirmed: the table is in use, though the one before may be as well. Whoever drops the domain has to know.
        if fresh && !matches!(set, Ok(()) | Err(ViommuError::Unconfirmed)) {
            self.endpoints.lock().remove(&endpoint);
        }
        Ok(set?)
    }

    /// The endpoint points elsewhere.
    pub fn leave(&self, endpoint: u32) {
        self.endpoints.lock().remove(&endpoint);
    }

    fn notify(&self) -> Notify<'_> {
        Notify {
            host: &*self.host,
            attached: &self.endpoints,
            guard: &self.guard,
            gathered: None,
            result: Ok(()),
        }
    }

    fn table(&self, what: &'static str) -> Result<&PageTable<Stage1, TableMemory<M>>, IommuError> {
        self.table.as_ref().ok_or(IommuError::Unsupported { what })
    }
}

impl<M: DmaMemory + Clone + 'static> DomainOps for GuestDomain<M> {
    fn kind(&self) -> DomainKind {
        self.kind
    }
    fn bank(&self) -> Option<u8> {
        None
    }
    fn asid(&self) -> Option<Asid> {
        None
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        Ok(self.table("page table of its own to map in")?.map(iova, pa, len, prot)?)
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        let table = self.table("page table of its own to unmap from")?;
        let mut notify = self.notify();
        let bytes = table.unmap(iova, len, &mut notify);
        notify.finish()?;
        Ok(bytes?)
    }
    fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        let table = self.table("page table of its own to protect in")?;
        let mut notify = self.notify();
        let changed = table.protect(iova, len, prot, &mut notify);
        notify.finish()?;
        Ok(changed?)
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        match &self.table {
            Some(table) => Some(table.lookup(iova)?.pa),
            None => (self.kind == DomainKind::Identity).then_some(Pa(iova.get())),
        }
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        Some(self.table.as_ref()?.input_range())
    }
    fn page_sizes(&self) -> u64 {
        self.table.as_ref().map_or(0, PageTable::page_sizes)
    }
    fn table_root(&self) -> Option<TableRoot> {
        self.root
    }
    fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError> {
        let mut notify = self.notify();
        notify.send(iova.get(), iova.get().saturating_add(len));
        Ok(notify.finish()?)
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        let endpoints: Vec<u32> = self.endpoints.lock().iter().copied().collect();
        for endpoint in endpoints {
            match self.host.invalidate(endpoint, None) {
                Ok(()) | Err(ViommuError::Gone) => {}
                Err(error) => {
                    self.guard.keep();
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        let endpoints: Vec<u32> = self.endpoints.lock().iter().copied().collect();
        for endpoint in endpoints {
            match self.host.set_table(endpoint, ViommuTable::Blocked) {
                Ok(()) | Err(ViommuError::Gone) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl<M: DmaMemory> Drop for GuestDomain<M> {
    /// Endpoints still attached are blocked before the tables are freed.
    fn drop(&mut self) {
        for endpoint in self.endpoints.get_mut().iter() {
            match self.host.set_table(*endpoint, ViommuTable::Blocked) {
                Ok(()) | Err(ViommuError::Gone) => {}
                Err(_) => self.guard.keep(),
            }
        }
    }
}
