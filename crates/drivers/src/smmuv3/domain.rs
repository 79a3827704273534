//! Domains: what a stream's or a substream's transactions meet.
//!
//! A domain that translates has a tag for its TLB entries from the start, and its page table if the driver makes one.
//! [`Domain::map`] takes no lock but the page table's own rules. [`Domain::unmap`] gathers the invalidations of a call,
//! waits for them, and only then takes the addresses away from devices with translation caches of their own (ATS).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_arch::{Asid, Iova, Ipa, Pa, StreamId, SubstreamId, Vmid};
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, Flush, Granule, LazyFlush, PageTable, Prot, Stage1, Stage2};
use spin::Mutex;

use super::context::Cds;
use super::flush::{Gather, Tag};
use super::link::Link;
use super::ste::GuestSte;
use super::{Error, Platform, Shared, guest};
use crate::ops::{DomainKind, DomainOptions, FaultModel, Paging, TableRoot};
use crate::tables::{TableGuard, TableMemory, TablePlace};

/// What domain to make.
pub enum DomainConfig<P: Platform> {
    /// [`DomainKind::Blocked`]: accesses abort without an event.
    Blocked,
    /// [`DomainKind::Identity`].
    Identity,
    /// [`DomainKind::Stage1`].
    Stage1(Paging),
    /// [`DomainKind::Stage2`].
    Stage2(Paging),
    /// [`DomainKind::Nested`] with a table of this driver. Context descriptor and tables are mapped one to one in the
    /// parent, since the hardware looks for them there.
    Nested(Arc<Domain<P>>, Paging),
    /// [`DomainKind::Nested`] with the table of a guest, whose root and tables are IPAs. The context descriptor is
    /// this driver's.
    NestedGuest(Arc<Domain<P>>, TableRoot),
    /// [`DomainKind::Nested`] with the context descriptors of a guest.
    Guest(Arc<Domain<P>>, GuestSte),
    /// [`DomainKind::Process`].
    Process(TableRoot),
}

pub enum Tables<M: DmaMemory> {
    None,
    Stage1(PageTable<Stage1, TableMemory<M>>),
    Stage2(PageTable<Stage2, TableMemory<M>>),
}

/// A domain of one SMMU.
pub struct Domain<P: Platform> {
    pub(super) shared: Arc<Shared<P>>,
    pub(super) link: Arc<Link>,
    pub(super) fault_model: FaultModel,
    pub(super) tag: Option<Tag>,
    /// In this order: the tables of a nested domain leave the parent before the parent is given up.
    pub(super) tables: Tables<P::Memory>,
    /// The stage 1 table, whoever made it.
    pub(super) root: Option<TableRoot>,
    pub(super) guest: Option<GuestSte>,
    pub(super) cd_memory: Option<TableMemory<P::Memory>>,
    pub(super) cds: Mutex<Cds>,
    /// Walks have been stopped for good (EPD0).
    pub(super) stopped: AtomicBool,
    pub(super) parent: Option<Arc<Domain<P>>>,
    pub(super) guard: Arc<TableGuard>,
    nested_on_top: AtomicU32,
}

/// Permissions for stage 2 from those of a mapping; stage 2 does not know privilege.
fn stage2_prot(prot: Prot<Stage1>) -> Prot<Stage2> {
    let narrowed = Prot::<Stage2>::new(prot.read, prot.write).memory(prot.memory);
    if prot.execute { narrowed } else { narrowed.noexec() }
}

impl<P: Platform> Domain<P> {
    pub(super) fn new(
        shared: Arc<Shared<P>>,
        config: DomainConfig<P>,
        options: DomainOptions,
    ) -> Result<Arc<Self>, Error> {
        let kind = match &config {
            DomainConfig::Blocked => DomainKind::Blocked,
            DomainConfig::Identity => DomainKind::Identity,
            DomainConfig::Stage1(_) => DomainKind::Stage1,
            DomainConfig::Stage2(_) => DomainKind::Stage2,
            DomainConfig::Nested(..) | DomainConfig::NestedGuest(..) | DomainConfig::Guest(..) => {
                DomainKind::Nested
            }
            DomainConfig::Process(_) => DomainKind::Process,
        };
        let parent = match &config {
            DomainConfig::Nested(parent, _)
            | DomainConfig::NestedGuest(parent, _)
            | DomainConfig::Guest(parent, _) => Some(parent.clone()),
            _ => None,
        };
        if let Some(parent) = &parent {
            if parent.kind() != DomainKind::Stage2 || !Arc::ptr_eq(&parent.shared, &shared) {
                return Err(Error::Parent { kind: parent.kind() });
            }
            if !shared.features.nested() {
                return Err(Error::MissingStage { kind, what: "nested translation" });
            }
            parent.nested_on_top.fetch_add(1, Ordering::SeqCst);
        }
        let number = shared.domain_numbers.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let below = parent.as_ref().map(|parent| parent.link.clone());
        let link = Link::new(number, kind, options.handler, below);
        let mut domain = Self {
            shared,
            link,
            fault_model: options.fault_model,
            tag: None,
            tables: Tables::None,
            root: None,
            guest: None,
            cd_memory: None,
            cds: Mutex::default(),
            stopped: AtomicBool::new(false),
            parent,
            guard: Arc::default(),
            nested_on_top: AtomicU32::new(0),
        };
        // From here on dropping `domain` gives back whatever it has.
        match config {
            DomainConfig::Blocked | DomainConfig::Identity => {}
            DomainConfig::Stage1(paging) | DomainConfig::Nested(_, paging) => {
                let root = domain.build_stage1(paging)?;
                domain.start_stage1(root, false)?;
            }
            DomainConfig::Stage2(paging) => domain.start_stage2(paging)?,
            DomainConfig::NestedGuest(_, root) | DomainConfig::Process(root) => {
                domain.start_stage1(root, true)?;
            }
            DomainConfig::Guest(_, guest) => {
                guest.check(domain.shared.features.substream_bits)?;
                domain.tag = domain.vmid().map(Tag::Guest);
                domain.guest = Some(guest);
            }
        }
        Ok(Arc::new(domain))
    }

    fn granule(&self, paging: &Paging) -> Result<Granule, Error> {
        let features = &self.shared.features;
        let granule = paging.granule.unwrap_or_else(|| features.smallest_granule());
        if features.supports(granule) { Ok(granule) } else { Err(Error::MissingGranule { granule }) }
    }

    fn need_stage1(&self) -> Result<(), Error> {
        let missing = Error::MissingStage { kind: self.kind(), what: "stage 1 translation" };
        if self.shared.features.stage1 { Ok(()) } else { Err(missing) }
    }

    /// Memory for what the walker of this domain's stage 1 reads.
    fn stage1_memory(&self) -> TableMemory<P::Memory> {
        let (memory, guard) = (self.shared.platform.memory().clone(), self.guard.clone());
        match &self.parent {
            None => TableMemory::new(memory, guard),
            Some(parent) => {
                let unit = parent.granule_bytes() as usize;
                TableMemory::placed(memory, guard, parent.clone(), unit)
            }
        }
    }

    fn build_stage1(&mut self, paging: Paging) -> Result<TableRoot, Error> {
        self.need_stage1()?;
        let features = &self.shared.features;
        let granule = self.granule(&paging)?;
        let output = if self.parent.is_some() { features.output_bits } else { features.ipa_bits };
        let config =
            Config::new(granule, paging.input_bits.unwrap_or(48), paging.output_bits.unwrap_or(output))
                .coherent_walk(paging.coherent_walk.unwrap_or(self.shared.coherent));
        let table = PageTable::new(self.stage1_memory(), config)?;
        let root = TableRoot::from_registers(&table.registers(), granule);
        self.tables = Tables::Stage1(table);
        Ok(root)
    }

    fn start_stage1(&mut self, root: TableRoot, foreign: bool) -> Result<(), Error> {
        self.need_stage1()?;
        let features = &self.shared.features;
        if !features.supports(root.granule) {
            return Err(Error::MissingGranule { granule: root.granule });
        }
        let mut asids = self.shared.asids.lock();
        let asid = match root.asid.filter(|_| foreign) {
            None => Asid(asids.allocate()?),
            Some(asid) if u32::from(asid.get()) >> features.asid_bits != 0 => {
                return Err(Error::AsidRange { asid, bits: features.asid_bits });
            }
            Some(asid) if asids.take(asid.get(), root.ttbr0) => asid,
            Some(asid) => return Err(Error::AsidInUse { asid }),
        };
        drop(asids);
        let vmid = self.parent.as_ref().and_then(|parent| parent.vmid()).unwrap_or_default();
        self.tag = Some(Tag::Stage1 { asid, vmid, el2: self.shared.el2() && self.parent.is_none() });
        self.root = Some(root);
        self.cd_memory = Some(self.stage1_memory());
        Ok(())
    }

    fn start_stage2(&mut self, paging: Paging) -> Result<(), Error> {
        let features = &self.shared.features;
        if !features.stage2 {
            return Err(Error::MissingStage { kind: self.kind(), what: "stage 2 translation" });
        }
        let granule = self.granule(&paging)?;
        let config = Config::new(
            granule,
            paging.input_bits.unwrap_or(features.ipa_bits),
            paging.output_bits.unwrap_or(features.output_bits),
        )
        .coherent_walk(paging.coherent_walk.unwrap_or(self.shared.coherent));
        let memory = TableMemory::new(self.shared.platform.memory().clone(), self.guard.clone());
        let table = PageTable::new(memory, config)?;
        let vmid = Vmid(self.shared.vmids.lock().allocate()?);
        self.tag = Some(Tag::Stage2(vmid));
        self.tables = Tables::Stage2(table);
        Ok(())
    }

    fn granule_bytes(&self) -> u64 {
        match (&self.tables, &self.root) {
            (Tables::Stage1(table), _) => table.config().granule.size(),
            (Tables::Stage2(table), _) => table.config().granule.size(),
            (Tables::None, Some(root)) => root.granule.size(),
            (Tables::None, None) => 0x1000,
        }
    }

    fn gather(&self) -> Result<Gather<'_, P>, Error> {
        let tag = self.tag.ok_or(Error::NoContext { kind: self.kind() })?;
        let granule = self.granule_bytes();
        Ok(Gather::new(&self.shared, &self.link, tag, granule, &self.nested_on_top, &self.guard))
    }

    /// Maps `[iova, iova + len)` to `[pa, pa + len)`; all or nothing. In a nested domain `pa` is an IPA of the parent, in
    /// a stage 2 domain `iova` is one.
    pub fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot<Stage1>) -> Result<(), Error> {
        match &self.tables {
            Tables::Stage1(table) => Ok(table.map(iova, pa, len, prot)?),
            Tables::Stage2(table) => Ok(table.map(Ipa(iova.get()), pa, len, stage2_prot(prot))?),
            Tables::None => Err(self.no_table("map in")),
        }
    }

    /// Unmaps `[iova, iova + len)`, holes allowed; gives the bytes that were mapped. When it returns, no device of the
    /// domain can reach the memory any more. [`Error::CommandQueue`] or [`Error::Command`]: the entries are gone from
    /// the tables, but not certainly from the TLB or from a device's own cache.
    pub fn unmap(&self, iova: Iova, len: u64) -> Result<u64, Error> {
        let mut flush = match &self.tables {
            Tables::None => return Err(self.no_table("unmap from")),
            _ => self.gather()?,
        };
        let bytes = match &self.tables {
            Tables::Stage1(table) => table.unmap(iova, len, &mut flush),
            Tables::Stage2(table) => table.unmap(Ipa(iova.get()), len, &mut flush),
            Tables::None => Ok(0),
        };
        flush.finish()?;
        Ok(bytes?)
    }

    /// Unmaps as [`unmap`](Self::unmap) does, but leaves the TLB entries of pages and blocks, and what devices have
    /// cached, to a later [`invalidate_all`](Self::invalidate_all): devices may reach the memory until that is complete.
    /// Tables that are freed are invalidated at once.
    pub fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, Error> {
        let mut flush = match &self.tables {
            Tables::None => return Err(self.no_table("unmap from")),
            _ => LazyFlush(self.gather()?),
        };
        let bytes = match &self.tables {
            Tables::Stage1(table) => table.unmap(iova, len, &mut flush),
            Tables::Stage2(table) => table.unmap(Ipa(iova.get()), len, &mut flush),
            Tables::None => Ok(0),
        };
        flush.0.finish()?;
        Ok(bytes?)
    }

    /// Changes what existing mappings allow; all of the range must be mapped.
    pub fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), Error> {
        let mut flush = match &self.tables {
            Tables::None => return Err(self.no_table("protect in")),
            _ => self.gather()?,
        };
        let changed = match &self.tables {
            Tables::Stage1(table) => table.protect(iova, len, prot, &mut flush),
            Tables::Stage2(table) => table.protect(Ipa(iova.get()), len, stage2_prot(prot), &mut flush),
            Tables::None => Ok(()),
        };
        flush.finish()?;
        Ok(changed?)
    }

    /// Where an address goes, through both stages of a nested domain; `None` if nowhere or if the table is somebody
    /// else's. An identity domain answers with the address itself.
    pub fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        match (&self.tables, &self.parent) {
            (Tables::Stage1(table), None) => Some(table.lookup(iova)?.pa),
            (Tables::Stage1(table), Some(parent)) => parent.iova_to_phys(Iova(table.lookup(iova)?.pa.get())),
            (Tables::Stage2(table), _) => Some(table.lookup(Ipa(iova.get()))?.pa),
            (Tables::None, _) => (self.kind() == DomainKind::Identity).then_some(Pa(iova.get())),
        }
    }

    /// Invalidates a range after the owner of a process or guest table has changed it, and waits.
    pub fn invalidate(&self, iova: Iova, len: u64) -> Result<(), Error> {
        let mut flush = self.gather()?;
        let granule = self.granule_bytes();
        let start = iova.get() & !(granule - 1);
        let end = iova.get().saturating_add(len);
        let len = end.saturating_sub(start).checked_next_multiple_of(granule).unwrap_or(u64::MAX);
        // All levels: the owner may have freed tables.
        flush.table(start, len);
        flush.finish()
    }

    /// Invalidates everything of the domain, and waits.
    pub fn invalidate_all(&self) -> Result<(), Error> {
        let mut flush = self.gather()?;
        flush.everything();
        flush.finish()
    }

    /// Passes a guest's invalidation on to the hardware, with the VMID of the domain below and the physical stream in
    /// place of the guest's (`stream` translates). Waits until it has happened. Opcodes other than those of a stage 1
    /// guest are refused, and nothing of the batch is issued then.
    pub fn invalidate_for_guest(
        &self,
        commands: &[Command],
        stream: impl Fn(StreamId) -> Option<StreamId>,
    ) -> Result<(), Error> {
        let Some(Tag::Guest(vmid)) = self.tag else { return Err(Error::NoContext { kind: self.kind() }) };
        let mut passed = Vec::with_capacity(commands.len());
        // Where the guest waits: what comes after may rely on what came before, as ATC_INV does on TLBI.
        let mut waits = Vec::new();
        for &command in commands {
            match guest::translate(command, vmid, &self.shared.features, &stream)? {
                Some(command) => passed.push(command),
                None if command.opcode() == Some(Opcode::Sync) => waits.push(passed.len()),
                None => {}
            }
        }
        waits.push(passed.len());
        let mut from = 0;
        for to in waits {
            for chunk in passed.get(from..to).unwrap_or_default().chunks(guest::AT_ONCE) {
                self.shared.sync(chunk)?;
            }
            from = to;
        }
        Ok(())
    }

    fn no_table(&self, operation: &'static str) -> Error {
        Error::NoPageTable { kind: self.kind(), operation }
    }

    /// The kind.
    pub fn kind(&self) -> DomainKind {
        self.link.kind
    }
    /// The ASID of a domain whose context descriptor is this driver's.
    pub fn asid(&self) -> Option<Asid> {
        match self.tag? {
            Tag::Stage1 { asid, .. } => Some(asid),
            Tag::Stage2(_) | Tag::Guest(_) => None,
        }
    }
    /// The VMID of a stage 2 domain, or of a nested domain's parent.
    pub fn vmid(&self) -> Option<Vmid> {
        match (self.tag, &self.parent) {
            (Some(Tag::Stage2(vmid)), _) => Some(vmid),
            (_, Some(parent)) => parent.vmid(),
            _ => None,
        }
    }
    /// The stage 1 table as the context descriptor has it.
    pub fn table_root(&self) -> Option<TableRoot> {
        self.root
    }
    /// Page and block sizes as a bit map; 0 without a table of this driver.
    pub fn page_sizes(&self) -> u64 {
        match &self.tables {
            Tables::Stage1(table) => table.page_sizes(),
            Tables::Stage2(table) => table.page_sizes(),
            Tables::None => 0,
        }
    }
    /// First and last address that can be mapped.
    pub fn input_range(&self) -> Option<(Iova, Iova)> {
        match &self.tables {
            Tables::Stage1(table) => Some(table.input_range()),
            Tables::Stage2(table) => {
                let (first, last) = table.input_range();
                Some((Iova(first.get()), Iova(last.get())))
            }
            Tables::None => None,
        }
    }
    /// Number of page tables in memory.
    pub fn table_count(&self) -> usize {
        match &self.tables {
            Tables::Stage1(table) => table.table_count(),
            Tables::Stage2(table) => table.table_count(),
            Tables::None => 0,
        }
    }
    /// Streams and substreams that use the domain.
    pub fn users(&self) -> Vec<(StreamId, Option<SubstreamId>)> {
        self.link
            .users()
            .iter()
            .filter(|user| !user.nested)
            .map(|user| (user.stream, user.substream))
            .collect()
    }
    /// Bytes of tables that could not be freed because an invalidation did not complete.
    pub fn kept_bytes(&self) -> u64 {
        self.guard.kept_bytes()
    }

    /// Everything that still points here is pointed elsewhere, and nothing is cached under the tag any more.
    fn retire(&self) -> Result<(), Error> {
        {
            let mut config = self.shared.configuration()?;
            for user in self.link.users().iter().filter(|user| !user.nested) {
                self.shared.abandon(&mut config, &self.link, *user)?;
            }
        }
        match self.tag {
            Some(tag) => self.shared.sync(&[tag.all()]),
            None => Ok(()),
        }
    }
}

impl<P: Platform> TablePlace for Domain<P> {
    fn place(&self, block: Block) -> bool {
        let prot = if self.shared.coherent { Prot::RW.cached() } else { Prot::RW };
        self.map(Iova(block.pa.get()), block.pa, block.len as u64, prot.noexec()).is_ok()
    }
    fn remove(&self, block: Block) -> bool {
        self.unmap(Iova(block.pa.get()), block.len as u64).is_ok()
    }
}

impl<P: Platform> Drop for Domain<P> {
    /// Streams still attached are blocked and substreams detached, then the TLB entries under the tag are invalidated,
    /// and only then are tables and tag given back.
    fn drop(&mut self) {
        let result = self.retire();
        let lost = result.is_err();
        if lost {
            self.guard.keep();
        }
        match self.tag {
            Some(Tag::Stage1 { asid, .. }) => self.shared.asids.lock().release(asid.get(), lost),
            Some(Tag::Stage2(vmid)) => self.shared.vmids.lock().release(vmid.get(), lost),
            Some(Tag::Guest(_)) | None => {}
        }
        if let Some(memory) = &self.cd_memory {
            let cds = core::mem::take(&mut *self.cds.lock());
            for block in cds.0.into_iter().flatten() {
                memory.free(block);
            }
        }
        // Those for whom it could not be made certain.
        for user in self.link.users() {
            self.link.remove(user.stream, user.substream);
        }
        if let Some(parent) = &self.parent {
            // The tables of this domain leave the parent after this; its TLB entries under the tag are gone.
            parent.nested_on_top.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl<P: Platform> fmt::Debug for Domain<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("number", &self.link.number)
            .field("kind", &self.kind())
            .field("tag", &self.tag)
            .finish_non_exhaustive()
    }
}
