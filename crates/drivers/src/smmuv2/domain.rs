//! Domains: what a stream's transactions meet.
//!
//! A domain with a context bank takes it when it is made and gives it back when it is dropped; streams that are still
//! attached then are blocked. [`Domain::map`] and its companions take no lock but the page table's own rules.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use portcullis_arch::smmuv2::offset::cb;
use portcullis_arch::smmuv2::{S2crType, TcrS1};
use portcullis_arch::{Asid, Iova, Ipa, Pa, Vmid};
use portcullis_hal::{Block, Clock, DmaMemory, Mmio};
use portcullis_pgtable::{Config, Granule, LazyFlush, PageTable, Prot, Stage1, Stage2};

use super::bank::{BankRegisters, Below};
use super::streams::s2cr_of;
use super::tlb::{Invalidation, Tag};
use super::{Error, FaultModel, Shared, TableRoot};
use crate::fault::FaultHandler;
use crate::tables::{TableGuard, TableMemory, TablePlace};

/// Kinds of domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DomainKind {
    /// Every transaction faults (S2CR type fault).
    Blocked,
    /// Transactions pass untranslated (S2CR type bypass).
    Identity,
    /// Stage 1 with a table of this driver.
    Stage1,
    /// Stage 2 with a table of this driver.
    Stage2,
    /// Stage 1 on top of a stage 2 domain.
    Nested,
    /// Stage 1 with the table of a process.
    Process,
}

impl fmt::Display for DomainKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "blocked",
            Self::Identity => "identity",
            Self::Stage1 => "stage 1",
            Self::Stage2 => "stage 2",
            Self::Nested => "nested",
            Self::Process => "process",
        })
    }
}

/// The page table that the driver makes for a domain. What is `None` follows the hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paging {
    /// Granule; the smallest that the SMMU walks.
    pub granule: Option<Granule>,
    /// Input address bits; the widest the SMMU accepts (48 at most).
    pub input_bits: Option<u8>,
    /// Output address bits; the widest of the SMMU.
    pub output_bits: Option<u8>,
    /// Whether walks snoop the CPU's caches; what the SMMU's options say.
    pub coherent_walk: Option<bool>,
}

/// What domain to make.
pub enum DomainConfig<R: Mmio, M: DmaMemory + Clone, C: Clock> {
    /// [`DomainKind::Blocked`].
    Blocked,
    /// [`DomainKind::Identity`].
    Identity,
    /// [`DomainKind::Stage1`].
    Stage1(Paging),
    /// [`DomainKind::Stage2`].
    Stage2(Paging),
    /// [`DomainKind::Nested`] with a table of this driver. The table's own pages are mapped one to one in the parent,
    /// since the hardware looks for them there.
    Nested(Arc<Domain<R, M, C>>, Paging),
    /// [`DomainKind::Nested`] with the table of a guest; all addresses in it are IPAs.
    NestedGuest(Arc<Domain<R, M, C>>, TableRoot),
    /// [`DomainKind::Process`].
    Process(TableRoot),
}

/// What else a domain can be given.
#[derive(Clone, Default)]
pub struct DomainOptions {
    /// Terminate or stall, and whether to go on after a fault.
    pub fault_model: FaultModel,
    /// Who is asked about faults; without one, the SMMU's default handler.
    pub handler: Option<Arc<dyn FaultHandler>>,
}

/// A context bank in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context {
    pub bank: u8,
    pub tag: Tag,
}

enum Tables<M: DmaMemory> {
    None,
    Stage1(PageTable<Stage1, TableMemory<M>>),
    Stage2(PageTable<Stage2, TableMemory<M>>),
}

/// A domain of one SMMU.
pub struct Domain<R: Mmio, M: DmaMemory + Clone, C: Clock> {
    pub(super) shared: Arc<Shared<R, M, C>>,
    pub(super) number: u32,
    kind: DomainKind,
    context: Option<Context>,
    /// In this order: the tables of a nested domain leave the parent before the parent is given up.
    tables: Tables<M>,
    root: Option<TableRoot>,
    parent: Option<Arc<Domain<R, M, C>>>,
    guard: Arc<TableGuard>,
    nested_on_top: AtomicU32,
}

/// Permissions for stage 2 from those of a mapping; stage 2 does not know privilege.
fn stage2_prot(prot: Prot<Stage1>) -> Prot<Stage2> {
    let narrowed = Prot::<Stage2>::new(prot.read, prot.write).memory(prot.memory);
    if prot.execute { narrowed } else { narrowed.noexec() }
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> Domain<R, M, C> {
    pub(super) fn new(
        shared: Arc<Shared<R, M, C>>,
        config: DomainConfig<R, M, C>,
        options: DomainOptions,
    ) -> Result<Arc<Self>, Error> {
        let number = shared.domain_numbers.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut domain = Self {
            shared,
            number,
            kind: DomainKind::Blocked,
            context: None,
            tables: Tables::None,
            root: None,
            parent: None,
            guard: Arc::default(),
            nested_on_top: AtomicU32::new(0),
        };
        // From here on dropping `domain` gives back whatever it has.
        match config {
            DomainConfig::Blocked => {}
            DomainConfig::Identity => domain.kind = DomainKind::Identity,
            DomainConfig::Stage1(paging) => {
                domain.kind = DomainKind::Stage1;
                let root = domain.build_stage1(paging)?;
                domain.start_stage1(root, options)?;
            }
            DomainConfig::Stage2(paging) => {
                domain.kind = DomainKind::Stage2;
                domain.start_stage2(paging, options)?;
            }
            DomainConfig::Nested(parent, paging) => {
                domain.kind = DomainKind::Nested;
                domain.nest(parent)?;
                let root = domain.build_stage1(paging)?;
                domain.start_stage1(root, options)?;
            }
            DomainConfig::NestedGuest(parent, root) => {
                domain.kind = DomainKind::Nested;
                domain.nest(parent)?;
                domain.start_stage1(root, options)?;
            }
            DomainConfig::Process(root) => {
                domain.kind = DomainKind::Process;
                domain.start_stage1(root, options)?;
            }
        }
        Ok(Arc::new(domain))
    }

    fn nest(&mut self, parent: Arc<Self>) -> Result<(), Error> {
        let id = &self.shared.id;
        if !id.nested {
            return Err(Error::MissingStage { kind: self.kind, what: "nested translation" });
        }
        if parent.kind != DomainKind::Stage2 || !Arc::ptr_eq(&parent.shared, &self.shared) {
            return Err(Error::Parent { kind: parent.kind });
        }
        parent.nested_on_top.fetch_add(1, Ordering::SeqCst);
        self.parent = Some(parent);
        Ok(())
    }

    fn granule(&self, paging: &Paging) -> Result<Granule, Error> {
        let granule = paging.granule.unwrap_or_else(|| self.shared.id.smallest_granule());
        if self.shared.id.supports(granule) { Ok(granule) } else { Err(Error::MissingGranule { granule }) }
    }

    fn build_stage1(&mut self, paging: Paging) -> Result<TableRoot, Error> {
        let id = &self.shared.id;
        if !id.stage1 {
            return Err(Error::MissingStage { kind: self.kind, what: "stage 1 translation" });
        }
        let granule = self.granule(&paging)?;
        let config = Config::new(
            granule,
            paging.input_bits.unwrap_or(id.va_bits.min(48)),
            paging.output_bits.unwrap_or(id.ipa_bits),
        )
        .coherent_walk(paging.coherent_walk.unwrap_or(self.shared.coherent_walk()));
        let (memory, guard) = (self.shared.memory.clone(), self.guard.clone());
        let memory = match &self.parent {
            None => TableMemory::new(memory, guard),
            Some(parent) => {
                let unit = parent.granule_bytes() as usize;
                TableMemory::placed(memory, guard, parent.clone(), unit)
            }
        };
        let table = PageTable::new(memory, config)?;
        let root = TableRoot::from_registers(&table.registers(), granule);
        self.tables = Tables::Stage1(table);
        Ok(root)
    }

    fn start_stage1(&mut self, root: TableRoot, options: DomainOptions) -> Result<(), Error> {
        let shared = self.shared.clone();
        if !shared.id.stage1 {
            return Err(Error::MissingStage { kind: self.kind, what: "stage 1 translation" });
        }
        if !shared.id.supports(root.granule) {
            return Err(Error::MissingGranule { granule: root.granule });
        }
        let below = match self.parent.as_ref().and_then(|parent| parent.context) {
            Some(Context { bank, tag: Tag::Stage2(vmid) }) => Below::Stage2(bank, vmid),
            _ => Below::Nothing,
        };
        let vmid = if let Below::Stage2(_, vmid) = below { vmid } else { Vmid(0) };
        let foreign = matches!(self.tables, Tables::None).then_some(root.ttbr0);
        let mut state = shared.state.lock();
        let bank = state.banks.take(self.kind)?;
        let asid = match state.banks.choose_asid(bank, vmid, root.asid, foreign) {
            Ok(asid) => asid,
            Err(error) => {
                state.banks.release(bank, false);
                return Err(error);
            }
        };
        let registers = BankRegisters::stage1(&root, asid, below, shared.id.vmid16, options.fault_model);
        if let Some(slot) = state.banks.get_mut(bank) {
            slot.registers = Some(registers);
            (slot.asid, slot.vmid, slot.root) = (Some(asid), vmid, foreign);
            slot.handler = options.handler;
        }
        registers.write(&shared.regs, bank);
        self.context = Some(Context { bank, tag: Tag::Stage1(asid) });
        self.root = Some(root);
        Ok(())
    }

    fn start_stage2(&mut self, paging: Paging, options: DomainOptions) -> Result<(), Error> {
        let shared = self.shared.clone();
        let id = &shared.id;
        if !id.stage2 {
            return Err(Error::MissingStage { kind: self.kind, what: "stage 2 translation" });
        }
        let granule = self.granule(&paging)?;
        let config = Config::new(
            granule,
            paging.input_bits.unwrap_or(id.ipa_bits),
            paging.output_bits.unwrap_or(id.pa_bits),
        )
        .coherent_walk(paging.coherent_walk.unwrap_or(shared.coherent_walk()));
        let memory = TableMemory::new(shared.memory.clone(), self.guard.clone());
        let table = PageTable::new(memory, config)?;
        let mut state = shared.state.lock();
        let bank = state.banks.take(self.kind)?;
        let vmid = Vmid(u16::from(bank) + 1);
        let registers = BankRegisters::stage2(&table.registers(), vmid, id.vmid16, options.fault_model);
        if let Some(slot) = state.banks.get_mut(bank) {
            slot.registers = Some(registers);
            // The VMID tags stage 2 entries; without an ASID the bank does not take part in their choice.
            slot.vmid = vmid;
            slot.handler = options.handler;
        }
        registers.write(&shared.regs, bank);
        self.context = Some(Context { bank, tag: Tag::Stage2(vmid) });
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

    fn invalidation(&self, context: Context) -> Invalidation<'_, R, M, C> {
        let granule = self.granule_bytes();
        Invalidation::new(&self.shared, context.bank, context.tag, granule, &self.nested_on_top, &self.guard)
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
    /// domain can reach the memory any more. [`Error::TlbSync`]: the entries are gone from the tables, but not
    /// certainly from the TLB.
    pub fn unmap(&self, iova: Iova, len: u64) -> Result<u64, Error> {
        let Some(context) = self.context else { return Err(self.no_table("unmap from")) };
        let mut flush = self.invalidation(context);
        let bytes = match &self.tables {
            Tables::Stage1(table) => table.unmap(iova, len, &mut flush),
            Tables::Stage2(table) => table.unmap(Ipa(iova.get()), len, &mut flush),
            Tables::None => return Err(self.no_table("unmap from")),
        };
        flush.finish()?;
        Ok(bytes?)
    }

    /// Unmaps as [`unmap`](Self::unmap) does, but leaves the TLB entries of pages and blocks to a later
    /// [`invalidate_all`](Self::invalidate_all): devices may reach the memory until that is complete. Tables that are
    /// freed are invalidated at once.
    pub fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, Error> {
        let Some(context) = self.context else { return Err(self.no_table("unmap from")) };
        let mut flush = LazyFlush(self.invalidation(context));
        let bytes = match &self.tables {
            Tables::Stage1(table) => table.unmap(iova, len, &mut flush),
            Tables::Stage2(table) => table.unmap(Ipa(iova.get()), len, &mut flush),
            Tables::None => return Err(self.no_table("unmap from")),
        };
        flush.0.finish()?;
        Ok(bytes?)
    }

    /// Changes what existing mappings allow; all of the range must be mapped.
    pub fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), Error> {
        let Some(context) = self.context else { return Err(self.no_table("protect in")) };
        let mut flush = self.invalidation(context);
        let changed = match &self.tables {
            Tables::Stage1(table) => table.protect(iova, len, prot, &mut flush),
            Tables::Stage2(table) => table.protect(Ipa(iova.get()), len, stage2_prot(prot), &mut flush),
            Tables::None => return Err(self.no_table("protect in")),
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
            (Tables::None, _) => (self.kind == DomainKind::Identity).then_some(Pa(iova.get())),
        }
    }

    /// Invalidates a range after the owner of a process or guest table has changed it, and waits.
    pub fn invalidate(&self, iova: Iova, len: u64) -> Result<(), Error> {
        let Some(context) = self.context else { return Err(Error::NoBank { kind: self.kind }) };
        let mut flush = self.invalidation(context);
        let granule = self.granule_bytes();
        let start = iova.get() & !(granule - 1);
        let end = iova.get().saturating_add(len);
        let len = end.saturating_sub(start).checked_next_multiple_of(granule).unwrap_or(u64::MAX);
        // All levels: the owner may have freed tables.
        portcullis_pgtable::Flush::table(&mut flush, start, len);
        flush.finish()
    }

    /// Invalidates everything of the domain, and waits.
    pub fn invalidate_all(&self) -> Result<(), Error> {
        let Some(context) = self.context else { return Err(Error::NoBank { kind: self.kind }) };
        self.shared.invalidate_tag(context.bank, context.tag).inspect_err(|_| self.guard.keep())
    }

    /// Stops walks of a process or guest table for good (TCR.EPD0), because its owner is going to free it. Accesses
    /// fault from then on. When it returns without an error, the table is not used any more.
    pub fn stop_walks(&self) -> Result<(), Error> {
        let Some(context) = self.context else { return Err(Error::NoBank { kind: self.kind }) };
        if let Tag::Stage1(_) = context.tag {
            let mut state = self.shared.state.lock();
            if let Some(slot) = state.banks.get_mut(context.bank) {
                slot.root = None;
                if let Some(registers) = &mut slot.registers {
                    registers.tcr = TcrS1::from_bits(registers.tcr).with_epd0(true).into_bits();
                    self.shared.regs.write_cb(context.bank, cb::TCR, registers.tcr);
                }
            }
        }
        self.invalidate_all()
    }

    fn no_table(&self, operation: &'static str) -> Error {
        Error::NoPageTable { kind: self.kind, operation }
    }

    /// The kind.
    pub fn kind(&self) -> DomainKind {
        self.kind
    }
    /// The context bank, if the kind has one.
    pub fn bank(&self) -> Option<u8> {
        self.context.map(|context| context.bank)
    }
    /// The ASID of a stage 1, nested or process domain.
    pub fn asid(&self) -> Option<Asid> {
        match self.context?.tag {
            Tag::Stage1(asid) => Some(asid),
            Tag::Stage2(_) => None,
        }
    }
    /// The VMID of a stage 2 domain, or of a nested domain's parent.
    pub fn vmid(&self) -> Option<Vmid> {
        match (self.context?.tag, &self.parent) {
            (Tag::Stage2(vmid), _) => Some(vmid),
            (_, Some(parent)) => parent.vmid(),
            _ => None,
        }
    }
    /// The stage 1 table's registers as the bank got them.
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
    /// Number of tables in memory.
    pub fn table_count(&self) -> usize {
        match &self.tables {
            Tables::Stage1(table) => table.table_count(),
            Tables::Stage2(table) => table.table_count(),
            Tables::None => 0,
        }
    }
    /// Bytes of tables that could not be freed because an invalidation did not complete.
    pub fn kept_bytes(&self) -> u64 {
        self.guard.kept_bytes()
    }
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> TablePlace for Domain<R, M, C> {
    fn place(&self, block: Block) -> bool {
        let prot = if self.shared.coherent_walk() { Prot::RW.cached() } else { Prot::RW };
        self.map(Iova(block.pa.get()), block.pa, block.len as u64, prot.noexec()).is_ok()
    }
    fn remove(&self, block: Block) -> bool {
        self.unmap(Iova(block.pa.get()), block.len as u64).is_ok()
    }
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Drop for Domain<R, M, C> {
    /// Streams still attached are blocked, the bank is disabled and its entries invalidated, and only then are the
    /// tables freed (Linux `arm_smmu_destroy_domain_context`).
    fn drop(&mut self) {
        let shared = &self.shared;
        if let Some(Context { bank, tag }) = self.context {
            let (handler, fault) = {
                let mut state = shared.state.lock();
                for index in state.streams.of_domain(self.number) {
                    shared.point(&mut state, index, s2cr_of(S2crType::Fault), 0);
                }
                shared.disable_bank(&mut state, bank)
            };
            match fault {
                Some(fault) => shared.report_last_fault(&fault, handler),
                None => drop(handler),
            }
            let result = shared.invalidate_tag(bank, tag);
            if result.is_err() {
                self.guard.keep();
            }
            shared.state.lock().banks.release(bank, result.is_err());
        } else {
            let mut state = shared.state.lock();
            for index in state.streams.of_domain(self.number) {
                shared.point(&mut state, index, s2cr_of(S2crType::Fault), 0);
            }
        }
        if let Some(parent) = &self.parent {
            // The tables of this domain leave the parent after this; its TLB entries under the ASID are gone.
            parent.nested_on_top.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> fmt::Debug for Domain<R, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bank = self.context.map(|context| context.bank);
        f.debug_struct("Domain")
            .field("number", &self.number)
            .field("kind", &self.kind)
            .field("bank", &bank)
            .finish()
    }
}
