//! A user address space: anonymous memory at virtual addresses, in tables like those of a CPU.
//!
//! [`Process::mmap`] gives memory, [`Process::write`] and [`Process::read`] are the process's own accesses, and
//! [`IommuCore::bind`](crate::IommuCore::bind) lets a device use the same addresses. Pages are open to user mode (AP\[1\]),
//! not global, and not executable unless asked for.
//!
//! Coherency is the platform's: nothing here cleans data. A device that does not snoop needs [`clean`](Process::clean)
//! before it reads and [`invalidate`](Process::invalidate) after it wrote. A walker that does not snoop needs
//! [`ProcessConfig::coherent_walk`] = false (every descriptor is cleaned as it is stored), or
//! [`clean_tables`](Process::clean_tables) by hand, as the thesis did.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Access, Asid, Iova, Pa};
use portcullis_drivers::ops::{IommuError, TableRoot};
use portcullis_drivers::tables::{TableGuard, TableMemory, TablePlace};
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, ConfigError, Flush, Granule, MapError, PageTable, Stage1, UnmapError};
use spin::Mutex;
use thiserror::Error;

use crate::{AddressSpace, Domain, FaultReport, Prot};

/// What an address space shall be like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessConfig {
    /// Page size.
    pub granule: Granule,
    /// Bits of virtual addresses: 48, or 39 (three levels with 4K pages).
    pub va_bits: u8,
    /// Bits of physical addresses.
    pub pa_bits: u8,
    /// True if everybody who walks the tables snoops the CPU's caches.
    pub coherent_walk: bool,
    /// The tag for TLB entries; `None` lets each IOMMU choose.
    pub asid: Option<Asid>,
}

impl Default for ProcessConfig {
    /// 4K pages, 48 bits, walkers that do not snoop.
    fn default() -> Self {
        Self { granule: Granule::K4, va_bits: 48, pa_bits: 48, coherent_walk: false, asid: None }
    }
}

/// A request that an address space did not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProcessError {
    /// The process has exited.
    #[error("the process has exited")]
    Exited,
    /// No memory for pages.
    #[error("no memory for {bytes:#x} bytes")]
    NoMemory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// No gap in the address space is large enough.
    #[error("no room for {len:#x} bytes in {va_bits} bits of virtual addresses")]
    NoRoom {
        /// Bytes asked for.
        len: u64,
        /// Bits of the address space.
        va_bits: u8,
    },
    /// The range is not free, not aligned, or not in the address space.
    #[error("{va:#x}+{len:#x} is not aligned, not free, or not an address of the process")]
    Range {
        /// First address.
        va: Iova,
        /// Bytes.
        len: u64,
    },
    /// Nothing is there.
    #[error("{va:#x} is not mapped")]
    NotMapped {
        /// The address.
        va: Iova,
    },
    /// The tables cannot be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pages cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The pages cannot be unmapped.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// A device may still use the memory, so it was not freed.
    #[error("a device may still use the memory, which is therefore lost: {0}")]
    Device(#[from] IommuError),
}

/// A stretch of virtual memory.
#[derive(Debug)]
struct Area {
    len: u64,
    prot: Prot,
    /// The pages that were touched, by their number in the area.
    pages: BTreeMap<u64, Block>,
    /// On its way out.
    leaving: bool,
}

/// Remembers where tables are.
#[derive(Debug, Default)]
struct Tables(Mutex<Vec<Block>>);

impl TablePlace for Tables {
    fn place(&self, block: Block) -> bool {
        self.0.lock().push(block);
        true
    }
    fn remove(&self, block: Block) -> bool {
        self.0.lock().retain(|other| *other != block);
        true
    }
}

#[derive(Debug, Default)]
struct Users {
    domains: Vec<Arc<Domain>>,
    exited: bool,
}

type Table<M> = PageTable<Stage1, TableMemory<M>>;

/// A user address space in memory `M`.
pub struct Process<M: DmaMemory + Clone + 'static> {
    memory: M,
    config: ProcessConfig,
    table: Mutex<Option<Arc<Table<M>>>>,
    areas: Mutex<BTreeMap<u64, Area>>,
    users: Mutex<Users>,
    tables: Arc<Tables>,
    guard: Arc<TableGuard>,
}

/// Passes unmappings on to every domain that uses the table. Leaves are gathered, tables wait.
struct Notify<'a> {
    users: &'a Mutex<Users>,
    guard: &'a TableGuard,
    gathered: Option<(u64, u64)>,
    result: Result<(), IommuError>,
}

impl Notify<'_> {
    fn send(&mut self, start: u64, end: u64) {
        // Only now that the pages are gone from the tables: a domain that joins later has never seen them. And without a
        // lock: waiting for the hardware may let handlers run that need it.
        let domains = self.users.lock().domains.clone();
        for domain in domains {
            if let Err(error) = domain.ops.invalidate(Iova(start), end - start) {
                self.guard.keep();
                self.result = self.result.and(Err(error));
            }
        }
    }

    fn finish(mut self) -> Result<(), IommuError> {
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

impl<M: DmaMemory + Clone + 'static> Process<M> {
    /// An empty address space.
    pub fn new(memory: M, config: ProcessConfig) -> Result<Arc<Self>, ProcessError> {
        let (tables, guard) = (Arc::new(Tables::default()), Arc::new(TableGuard::default()));
        let in_memory = TableMemory::placed(memory.clone(), guard.clone(), tables.clone(), 1);
        let table_config = Config::new(config.granule, config.va_bits, config.pa_bits);
        let table = PageTable::new(in_memory, table_config.coherent_walk(config.coherent_walk))?;
        Ok(Arc::new(Self {
            memory,
            config,
            table: Mutex::new(Some(Arc::new(table))),
            areas: Mutex::new(BTreeMap::new()),
            users: Mutex::new(Users::default()),
            tables,
            guard,
        }))
    }

    fn table(&self) -> Result<Arc<Table<M>>, ProcessError> {
        self.table.lock().clone().ok_or(ProcessError::Exited)
    }

    fn page(&self) -> u64 {
        self.config.granule.size()
    }

    fn round(&self, len: u64) -> Option<u64> {
        len.checked_next_multiple_of(self.page()).filter(|len| *len > 0)
    }

    /// Anonymous memory of at least `len` bytes, at an address that the process chooses.
    pub fn mmap(&self, len: u64, prot: Prot) -> Result<Iova, ProcessError> {
        let va = self.reserve(len, prot)?;
        self.populate(va).inspect_err(|_| self.forget(va))?;
        Ok(va)
    }

    /// Anonymous memory at `va`, which is aligned to a page, as is `len`.
    pub fn mmap_at(&self, va: Iova, len: u64, prot: Prot) -> Result<(), ProcessError> {
        self.reserve_at(va, len, prot)?;
        self.populate(va).inspect_err(|_| self.forget(va))
    }

    /// Addresses without memory; each page comes with [`fault_in`](Self::fault_in).
    pub fn reserve(&self, len: u64, prot: Prot) -> Result<Iova, ProcessError> {
        let va_bits = self.config.va_bits;
        let no_room = ProcessError::NoRoom { len, va_bits };
        let len = self.round(len).ok_or(no_room)?;
        let mut areas = self.areas.lock();
        // From a quarter of the address space up, as far from 0 as real ones.
        let mut va = 1u64 << va_bits.saturating_sub(2).min(46);
        for (start, area) in areas.iter() {
            let free_below = start.checked_sub(va);
            if free_below.is_some_and(|free| free >= len) {
                break;
            }
            va = va.max(start + area.len);
        }
        if va.checked_add(len).is_none_or(|end| end > 1 << va_bits) {
            return Err(no_room);
        }
        self.insert(&mut areas, va, len, prot)?;
        Ok(Iova(va))
    }

    /// The same at `va`.
    pub fn reserve_at(&self, va: Iova, len: u64, prot: Prot) -> Result<(), ProcessError> {
        let range = ProcessError::Range { va, len };
        let end = va.get().checked_add(len).ok_or(range)?;
        let mut areas = self.areas.lock();
        let taken = areas.range(..end).next_back().is_some_and(|(start, area)| start + area.len > va.get());
        let aligned = (va.get() | len).is_multiple_of(self.page()) && len > 0;
        if taken || !aligned || end > 1 << self.config.va_bits {
            return Err(range);
        }
        self.insert(&mut areas, va.get(), len, prot)
    }

    fn insert(
        &self,
        areas: &mut BTreeMap<u64, Area>,
        va: u64,
        len: u64,
        prot: Prot,
    ) -> Result<(), ProcessError> {
        self.table()?;
        areas.insert(va, Area { len, prot, pages: BTreeMap::new(), leaving: false });
        Ok(())
    }

    fn populate(&self, va: Iova) -> Result<(), ProcessError> {
        let len = self.areas.lock().get(&va.get()).map_or(0, |area| area.len);
        (0..len).step_by(self.page() as usize).try_for_each(|at| self.fault_in(va.wrapping_add(at)).map(drop))
    }

    /// Takes back what an mmap that failed has made; no device has seen it.
    fn forget(&self, va: Iova) {
        let _it_fails_as_the_mmap_did = self.munmap(va);
    }

    /// Gives the page of an address its memory, as a page fault of the process does. `Ok(false)` if it has some
    /// already; [`ProcessError::NotMapped`] if the address does not belong to the process.
    pub fn fault_in(&self, va: Iova) -> Result<bool, ProcessError> {
        let table = self.table()?;
        let page = self.page();
        let mut areas = self.areas.lock();
        let not_mapped = ProcessError::NotMapped { va };
        let (&start, area) = areas.range_mut(..=va.get()).next_back().ok_or(not_mapped)?;
        let offset = va.get() - start;
        if area.leaving || offset >= area.len {
            return Err(not_mapped);
        }
        let (prot, index) = (area.prot, offset / page);
        if area.pages.contains_key(&index) {
            return Ok(false);
        }
        let no_memory = ProcessError::NoMemory { bytes: page };
        let block = self.memory.alloc(page as usize, page as usize).ok_or(no_memory)?;
        if let Err(error) = table.map(Iova(va.get() & !(page - 1)), block.pa, page, prot) {
            self.memory.free(block);
            return Err(error.into());
        }
        area.pages.insert(index, block);
        Ok(true)
    }

    /// Gives back the memory that starts at `va`, as `mmap` or `reserve` gave it. Devices that use the address space
    /// cannot reach it any more when its pages are freed.
    pub fn munmap(&self, va: Iova) -> Result<u64, ProcessError> {
        let table = self.table()?;
        let len = {
            let mut areas = self.areas.lock();
            let area = areas.get_mut(&va.get()).filter(|area| !area.leaving);
            let area = area.ok_or(ProcessError::NotMapped { va })?;
            area.leaving = true;
            area.len
        };
        let mut notify = Notify { users: &self.users, guard: &self.guard, gathered: None, result: Ok(()) };
        let unmapped = table.unmap(va, len, &mut notify);
        let flushed = notify.finish();
        let area = self.areas.lock().remove(&va.get());
        unmapped?;
        flushed?;
        self.free_pages(area);
        Ok(len)
    }

    fn free_pages(&self, areas: impl IntoIterator<Item = Area>) {
        for block in areas.into_iter().flat_map(|area| area.pages.into_values()) {
            self.memory.free(block);
        }
    }

    /// Where an address is in memory.
    pub fn lookup(&self, va: Iova) -> Option<Pa> {
        Some(self.table().ok()?.lookup(va)?.pa)
    }

    /// Calls `each(physical address, range in the buffer)` for the pages of a range that is mapped as a whole.
    fn for_pages(
        &self,
        va: Iova,
        len: usize,
        mut each: impl FnMut(Pa, core::ops::Range<usize>),
    ) -> Result<(), ProcessError> {
        let table = self.table()?;
        let page = self.page();
        for commit in [false, true] {
            let mut done = 0usize;
            while done < len {
                let at = va.checked_add(done as u64).ok_or(ProcessError::NotMapped { va })?;
                let pa = table.lookup(at).ok_or(ProcessError::NotMapped { va: at })?.pa;
                let n = (len - done).min((page - at.get() % page) as usize);
                if commit {
                    each(pa, done..done + n);
                }
                done += n;
            }
        }
        Ok(())
    }

    /// The process writes (through the CPU's cache).
    pub fn write(&self, va: Iova, bytes: &[u8]) -> Result<(), ProcessError> {
        self.for_pages(va, bytes.len(), |pa, range| {
            if let Some(bytes) = bytes.get(range) {
                self.memory.write(pa, bytes);
            }
        })
    }

    /// The process reads (through the CPU's cache).
    pub fn read(&self, va: Iova, buf: &mut [u8]) -> Result<(), ProcessError> {
        self.for_pages(va, buf.len(), |pa, range| {
            if let Some(buf) = buf.get_mut(range) {
                self.memory.read(pa, buf);
            }
        })
    }

    /// Writes the CPU's cached lines back, so that a device that does not snoop reads what the process wrote.
    pub fn clean(&self, va: Iova, len: usize) -> Result<(), ProcessError> {
        self.for_pages(va, len, |pa, range| self.memory.clean(pa, range.len()))?;
        self.memory.wmb();
        Ok(())
    }

    /// Drops the CPU's cached lines, so that the process reads what a device that does not snoop wrote.
    pub fn invalidate(&self, va: Iova, len: usize) -> Result<(), ProcessError> {
        self.for_pages(va, len, |pa, range| self.memory.invalidate(pa, range.len()))
    }

    /// Writes all tables back, for walkers that do not snoop.
    pub fn clean_tables(&self) {
        for block in self.tables.0.lock().iter() {
            self.memory.clean(block.pa, block.len);
        }
        self.memory.wmb();
    }

    /// Number of tables.
    pub fn table_count(&self) -> usize {
        self.tables.0.lock().len()
    }

    /// The configuration.
    pub fn config(&self) -> &ProcessConfig {
        &self.config
    }

    /// Domains that use the address space.
    pub fn domains(&self) -> Vec<Arc<Domain>> {
        self.users.lock().domains.clone()
    }

    /// The process ends (Linux: the `release` notifier of SVA). First every device is stopped from walking the tables and
    /// its TLB entries are invalidated; then tables and pages are freed. Bound devices stay bound, and their accesses
    /// fault, until they are unbound. On an error everything that a device might still reach is kept.
    pub fn exit(&self) -> Result<(), ProcessError> {
        let domains = {
            let mut users = self.users.lock();
            users.exited = true;
            // They stay in the list until they have stopped: an munmap meanwhile has to tell them.
            users.domains.clone()
        };
        let mut result = Ok(());
        for domain in &domains {
            if let Err(error) = domain.ops.stop_walks() {
                self.guard.keep();
                result = Err(error.into());
            }
        }
        let stopped = core::mem::take(&mut self.users.lock().domains);
        drop((domains, stopped));
        let table = self.table.lock().take();
        drop(table);
        let areas = core::mem::take(&mut *self.areas.lock());
        if !self.guard.is_kept() {
            self.free_pages(areas.into_values());
        }
        result
    }

    /// True after [`exit`](Self::exit).
    pub fn has_exited(&self) -> bool {
        self.users.lock().exited
    }
}

impl<M: DmaMemory + Clone + 'static> AddressSpace for Process<M> {
    fn table_root(&self) -> Option<TableRoot> {
        let table = self.table().ok()?;
        let root = TableRoot::from_registers(&table.registers(), self.config.granule);
        Some(TableRoot { asid: self.config.asid, ..root })
    }

    fn join(&self, domain: &Arc<Domain>) -> bool {
        let mut users = self.users.lock();
        if users.exited {
            return false;
        }
        users.domains.push(domain.clone());
        true
    }

    fn page_fault(&self, va: Iova, access: Access) -> bool {
        let allowed = {
            let areas = self.areas.lock();
            areas.range(..=va.get()).next_back().is_some_and(|(_, area)| match access {
                Access::Read => area.prot.read || area.prot.write,
                Access::Write => area.prot.write,
            })
        };
        // A page that is there already is the answer, too: the device has faulted before it came.
        allowed && self.fault_in(va).is_ok()
    }

    fn resolve(&self, fault: &FaultReport) -> bool {
        // What its page does not allow, no page will.
        let allowed = {
            let areas = self.areas.lock();
            areas.range(..=fault.iova.get()).next_back().is_some_and(|(_, area)| {
                let prot = area.prot;
                let executable = match fault.privileged {
                    false => prot.execute,
                    // What user mode may write is not fetched with privilege.
                    true => prot.execute && (prot.is_privileged() || !prot.write),
                };
                (fault.privileged || !prot.is_privileged()) && (executable || !fault.instruction)
            })
        };
        allowed && self.page_fault(fault.iova, fault.access)
    }

    fn leave(&self, domain: &Arc<Domain>) {
        let left: Vec<Arc<Domain>> = {
            let mut users = self.users.lock();
            let (leaving, staying) =
                core::mem::take(&mut users.domains).into_iter().partition(|own| Arc::ptr_eq(own, domain));
            users.domains = staying;
            leaving
        };
        // Without the lock: it may be the last reference.
        drop(left);
    }
}

impl<M: DmaMemory + Clone + 'static> Drop for Process<M> {
    fn drop(&mut self) {
        // What cannot be freed stays; there is nobody to tell.
        let _kept_on_error = self.exit();
    }
}

impl<M: DmaMemory + Clone + 'static> core::fmt::Debug for Process<M> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Process").field("config", &self.config).finish_non_exhaustive()
    }
}
