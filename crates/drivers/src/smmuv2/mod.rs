//! Driver for Arm SMMUv2 (IHI 0062) and MMU-500, as non-secure software.
//!
//! Start with [`SmmuV2::probe`], which identifies, resets and enables an SMMU. Then: [`SmmuV2::add_master`] enters a
//! device's streams, [`SmmuV2::new_domain`] makes a [`Domain`], [`SmmuV2::attach`] points the streams at it, and
//! [`Domain::map`] lets the device reach memory. [`SmmuV2::handle_irq`] belongs to every interrupt of the SMMU.
//!
//! | Covered | Not covered |
//! |---|---|
//! | stream matching with probed masks, stream indexing, 16-bit StreamIDs | more than 128 groups, compressed indexing |
//! | stage 1, stage 2, nested, identity, blocked and process domains in AArch64 format | AArch32 formats |
//! | terminate and stall, deferred answers, the combined interrupt line | address translation operations |
//! | MMU-500 set-up with Linux's errata workarounds | secure software, hyp and monitor contexts, PMU |
//!
//! The order of register accesses is that of Linux's `arm-smmu` (6.12); tests compare it with the traces. Where
//! the two differ on purpose: IDR7 is read on every SMMU, GFAR is read for global faults and IPAFAR for stage 2
//! ones, more than 64 invalidations by address become one by ASID or VMID, and freeing a bank waits for the
//! invalidation before anything is reused.

mod bank;
mod domain;
mod error;
mod fault;
mod ident;
mod irq;
mod regs;
mod reset;
mod streams;
#[cfg(test)]
mod tests;
mod tlb;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::AtomicU32;

use portcullis_arch::smmuv2::offset::cb;
use portcullis_arch::smmuv2::{Fsr, S2cr, S2crType, Sctlr};
use portcullis_hal::{Clock, DmaMemory, Mmio};
use spin::Mutex;

use crate::fault::{FaultBatch, FaultHandler, FaultLog};
use bank::Banks;
use regs::Regs;
use streams::{StreamTable, s2cr_of};

pub use bank::{FaultModel, TableRoot};
pub use domain::{Domain, DomainConfig, DomainKind, DomainOptions, Paging};
pub use error::{Error, SyncScope};
pub use fault::{ContextFault, ContextRegisters, Format, GlobalFault};
pub use ident::{Identification, ProbeError, StreamMapping};
pub use streams::{StreamError, StreamMatch, StreamOverrides};

/// What is known about an SMMU beyond its registers.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the register window (`reg` of the device tree).
    pub window: u64,
    /// MMU-500 (`arm,mmu-500`): its reset steps are done.
    pub mmu500: bool,
    /// Streams that no device has claimed pass untranslated instead of faulting (Linux
    /// `arm-smmu.disable_bypass=0`).
    pub bypass_unmatched: bool,
    /// Whether walks snoop the CPU's caches (`dma-coherent` at the SMMU's node); `None` believes IDR0.CTTW.
    pub coherent_walk: Option<bool>,
    /// Streams that firmware left running and that must pass untranslated until a device claims them.
    pub preserve: Vec<StreamMatch>,
    /// How long to wait for an invalidation, in microseconds.
    pub tlb_timeout_us: u64,
    /// Faults that are kept for [`SmmuV2::take_faults`].
    pub fault_log: usize,
}

impl Options {
    /// Linux's defaults for an SMMU with this window and `compatible`.
    pub fn new(window: u64, compatible: &str) -> Self {
        Self {
            window,
            mmu500: compatible == "arm,mmu-500",
            bypass_unmatched: false,
            coherent_walk: None,
            preserve: Vec::new(),
            tlb_timeout_us: 1_000_000,
            fault_log: 256,
        }
    }
}

/// Everything that changes.
struct State {
    streams: StreamTable,
    banks: Banks,
}

/// What the driver and its domains share.
struct Shared<R, M, C> {
    regs: Regs<R>,
    memory: M,
    clock: C,
    id: Identification,
    options: Options,
    preserved: usize,
    state: Mutex<State>,
    /// ACTLR.CPRE could not be cleared at the last reset.
    prefetch_locked: core::sync::atomic::AtomicBool,
    domain_numbers: AtomicU32,
    faults: Mutex<FaultLog>,
    handler: Mutex<Option<Arc<dyn FaultHandler>>>,
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Shared<R, M, C> {
    fn coherent_walk(&self) -> bool {
        self.options.coherent_walk.unwrap_or(self.id.coherent_walk)
    }

    /// Writes a group: S2CR before SMR, so that a stream never matches a stale S2CR.
    fn write_group(&self, streams: &StreamTable, index: usize) {
        if let Some((smr, s2cr)) = streams.values(index) {
            self.regs.write_s2cr(index, s2cr);
            if streams.has_smrs() {
                self.regs.write_smr(index, smr);
            }
        }
    }

    /// Takes a group out of matching before its S2CR changes.
    fn write_freed_group(&self, streams: &StreamTable, index: usize) {
        if let Some((smr, s2cr)) = streams.values(index) {
            if streams.has_smrs() {
                self.regs.write_smr(index, smr);
            }
            self.regs.write_s2cr(index, s2cr);
        }
    }

    /// Points a group somewhere else; what it matches stays.
    fn point(&self, state: &mut State, index: usize, s2cr: S2cr, domain: u32) {
        if let Some(entry) = state.streams.entry_mut(index) {
            entry.s2cr = s2cr;
            entry.domain = domain;
        }
        if let Some((_, s2cr)) = state.streams.values(index) {
            self.regs.write_s2cr(index, s2cr);
        }
    }

    /// SCTLR = 0, and whatever is stalled in the bank is terminated. A fault that nobody has looked at yet is taken out of
    /// the registers, so that the next owner of the bank does not get it. Gives the bank's fault handler, to be
    /// dropped without the lock (it may own domains), and that fault.
    fn disable_bank(
        &self,
        state: &mut State,
        bank: u8,
    ) -> (Option<Arc<dyn FaultHandler>>, Option<ContextFault>) {
        let Some(slot) = state.banks.get_mut(bank) else { return (None, None) };
        let registers = slot.registers.take();
        let stage = registers.map(|registers| registers.stage());
        // From here on nothing stalls; what came before is in FSR. What is stalled has to end with an error (CFRE):
        // without it a read would end with zeros, and the device would go on.
        let stalls = registers.is_some_and(|registers| registers.sctlr.cfcfg());
        self.regs.write_cb(bank, cb::SCTLR, Sctlr::new().with_cfre(stalls).into_bits());
        let mut stalled = core::mem::take(&mut slot.deferred);
        let status = Fsr::from_bits(self.regs.read_fsr(bank));
        stalled |= status.ss();
        // SS alone is a fault that was reported when it was deferred.
        let unread = stage.filter(|_| status.into_bits() & Fsr::W1C != 0);
        let fault = unread.map(|stage| self.read_context_fault(bank, stage));
        if let Some(fault) = &fault {
            self.regs.write_cb(bank, cb::FSR, fault.raw.fsr);
        }
        if stalled {
            self.regs.write_cb(bank, cb::RESUME, 1);
        }
        if stalls {
            self.regs.write_cb(bank, cb::SCTLR, 0);
        }
        (slot.handler.take(), fault)
    }
}

/// One SMMU. Clones are handles to the same one.
pub struct SmmuV2<R, M, C> {
    shared: Arc<Shared<R, M, C>>,
}

impl<R, M, C> Clone for SmmuV2<R, M, C> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<R, M, C> fmt::Debug for SmmuV2<R, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SmmuV2").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

/// A device's streams in the stream table (Linux `arm_smmu_master`). Give it back with [`SmmuV2::remove_master`].
#[derive(Debug, PartialEq, Eq)]
pub struct Master {
    entries: Box<[usize]>,
    streams: Box<[StreamMatch]>,
}

impl Master {
    /// A device with these stream table entries; for those who implement [`IommuOps`](crate::ops::IommuOps).
    pub fn new(entries: Box<[usize]>, streams: Box<[StreamMatch]>) -> Self {
        Self { entries, streams }
    }
    /// The stream table entries, one for each stream of the device. Devices that have one in common cannot be told
    /// apart: they share domain and group.
    pub fn entries(&self) -> &[usize] {
        &self.entries
    }
    /// The streams as they were asked for.
    pub fn streams(&self) -> &[StreamMatch] {
        &self.streams
    }
}

/// A stream table entry in use, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamEntry {
    /// Number of the group.
    pub index: usize,
    /// What it matches.
    pub matches: StreamMatch,
    /// Users.
    pub count: u32,
    /// S2CR as written.
    pub s2cr: S2cr,
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> SmmuV2<R, M, C> {
    /// What the SMMU is, with the stream id and mask bits found by probing.
    pub fn identification(&self) -> &Identification {
        &self.shared.id
    }
    /// The options it was probed with.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }
    /// Boot mappings that were preserved (Linux: "preserved N boot mappings").
    pub fn preserved(&self) -> usize {
        self.shared.preserved
    }
    /// True if the MMU-500 prefetcher could not be turned off (Linux: "Failed to disable prefetcher for errata
    /// workarounds, check SACR.CACHE_LOCK").
    pub fn prefetch_locked(&self) -> bool {
        self.shared.prefetch_locked.load(core::sync::atomic::Ordering::Relaxed)
    }
    /// Whether table walks are taken to snoop the CPU's caches.
    pub fn coherent_walk(&self) -> bool {
        self.shared.coherent_walk()
    }
    /// The memory that tables come from.
    pub fn memory(&self) -> &M {
        &self.shared.memory
    }
    /// The clock of waits.
    pub fn clock(&self) -> &C {
        &self.shared.clock
    }

    /// Context banks that a stage 1 domain could still get.
    pub fn free_banks(&self) -> usize {
        let first = usize::from(self.shared.id.stage2_banks);
        let state = self.shared.state.lock();
        state.banks.iter().skip(first).filter(|(_, bank)| !bank.taken && !bank.lost).count()
    }

    /// The stream table entries in use.
    pub fn stream_entries(&self) -> Vec<StreamEntry> {
        let state = self.shared.state.lock();
        let entries = state.streams.entries().iter().enumerate();
        entries
            .filter_map(|(index, entry)| {
                Some(StreamEntry { index, matches: entry.matches?, count: entry.count, s2cr: entry.s2cr })
            })
            .collect()
    }

    /// Enters a device's streams (Linux `arm_smmu_master_alloc_smes`): all or none. They fault or bypass, as unmatched
    /// streams do, until a domain is attached.
    pub fn add_master(&self, streams: &[StreamMatch]) -> Result<Master, Error> {
        let mut state = self.shared.state.lock();
        let entries = state.streams.claim(streams, &self.shared.id)?;
        // Hardware only after every stream has found its place.
        for &index in &entries {
            self.shared.write_group(&state.streams, index);
        }
        Ok(Master { entries: entries.into(), streams: streams.into() })
    }

    /// Takes a device's streams out; entries that nobody else uses become free.
    pub fn remove_master(&self, master: Master) {
        let mut state = self.shared.state.lock();
        for index in state.streams.release(&master.entries) {
            self.shared.write_freed_group(&state.streams, index);
        }
    }

    /// Makes a domain. One with a context bank takes it now.
    pub fn new_domain(
        &self,
        config: DomainConfig<R, M, C>,
        options: DomainOptions,
    ) -> Result<Arc<Domain<R, M, C>>, Error> {
        Domain::new(self.shared.clone(), config, options)
    }

    /// Points all of a device's streams at a domain, wherever they pointed before. The device's transactions see the
    /// old domain or the new one, nothing else. The caller keeps the domain alive: dropping it blocks the streams.
    pub fn attach(&self, master: &Master, domain: &Domain<R, M, C>) -> Result<(), Error> {
        if !Arc::ptr_eq(&self.shared, &domain.shared) {
            return Err(Error::OtherInstance);
        }
        let s2cr = match (domain.bank(), domain.kind()) {
            (Some(bank), _) => s2cr_of(S2crType::Translation).with_cbndx(bank),
            (None, DomainKind::Identity) => s2cr_of(S2crType::Bypass),
            (None, _) => s2cr_of(S2crType::Fault),
        };
        let mut state = self.shared.state.lock();
        for &index in &master.entries {
            let overrides =
                state.streams.entries().get(index).map(|entry| entry.overrides).unwrap_or_default();
            let s2cr = if domain.bank().is_some() { overrides.apply(s2cr) } else { s2cr };
            self.shared.point(&mut state, index, s2cr, domain.number);
        }
        Ok(())
    }

    /// Points a device's streams at no domain: they fault or bypass, as unmatched streams do.
    pub fn detach(&self, master: &Master) {
        let mut state = self.shared.state.lock();
        let unassigned = state.streams.unassigned();
        for &index in &master.entries {
            self.shared.point(&mut state, index, unassigned, 0);
        }
    }

    /// Overrides privilege and instruction/data of a device's streams, now and after later attaches. It has an effect
    /// while they are translated.
    pub fn set_overrides(&self, master: &Master, overrides: StreamOverrides) {
        let mut state = self.shared.state.lock();
        for &index in &master.entries {
            let Some(entry) = state.streams.entry_mut(index) else { continue };
            entry.overrides = overrides;
            if entry.s2cr.kind() == S2crType::Translation {
                let (s2cr, domain) = (overrides.apply(entry.s2cr), entry.domain);
                self.shared.point(&mut state, index, s2cr, domain);
            }
        }
    }

    /// Who is asked about faults of domains without a handler of their own, and told about global faults.
    pub fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        let old = core::mem::replace(&mut *self.shared.handler.lock(), handler);
        // Not under the lock: a handler may own domains, whose end takes locks and waits.
        drop(old);
    }

    /// The faults since the last time.
    pub fn take_faults(&self) -> FaultBatch {
        self.shared.faults.lock().take()
    }

    /// All faults ever.
    pub fn faults_total(&self) -> u64 {
        self.shared.faults.lock().total()
    }
}
