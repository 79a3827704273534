//! Driver for Arm SMMUv3 (IHI 0070), as non-secure software.
//!
//! Start with [`SmmuV3::probe`], which identifies, resets and enables an SMMU. Then: [`SmmuV3::add_master`] enters a
//! device's streams, [`SmmuV3::new_domain`] makes a [`Domain`], [`SmmuV3::attach`] points the streams at it, and
//! [`Domain::map`] lets the device reach memory. [`SmmuV3::attach_substream`] gives one substream of the device an
//! address space of its own, such as a process's. [`SmmuV3::handle_irq`] belongs to every interrupt of the SMMU.
//!
//! | Covered | Not covered |
//! |---|---|
//! | linear and two-level stream tables and context descriptor tables | secure streams |
//! | stage 1, stage 2, nested (own or guest's tables, guest's descriptors), identity, blocked, process domains | VMSAv8-32, 52-bit addresses |
//! | substreams, shared domains, ATS, page requests, stalls | split-stage ATS, hardware flag updates |
//! | updates of live entries that the hardware never sees half done | ECMDQ, MPAM, PMCG, Realm |
//! | take-over of an SMMU that is on; streams that must go on working | |
//!
//! The order of register accesses is that of Linux's `arm-smmu-v3` (6.12). Where the two differ on purpose: streams
//! without substreams use a context descriptor of the domain, so that changing from one stage 1 domain to another is a
//! change of one word and hitless; a level 1 descriptor that has just been filled is invalidated, since hardware may
//! cache an invalid one; firmware's streams keep the regions they need, not everything.
//!
//! Reading on, in the source: `entry` updates live entries, `streams` knows who uses what, `domain` maps and unmaps, `ste`
//! and `context` make its entries and descriptors, `flush` gathers invalidations, [`cmdq`] is the command queue and
//! [`fault`] routes what waits for an answer.

mod cdtab;
pub mod cmdq;
mod context;
mod domain;
mod entry;
mod error;
pub mod evtq;
pub mod fault;
mod flush;
pub mod gerror;
mod guest;
mod ident;
mod ids;
mod irq;
mod link;
mod platform;
pub mod priq;
mod reset;
mod ste;
mod streams;
mod strtab;
#[cfg(test)]
mod tests;
pub mod tlbi;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use portcullis_arch::{Iova, Pa, StreamId, SubstreamId};
use portcullis_hal::{Clock, DmaMemory, Mmio};
use portcullis_pgtable::{Prot, Stage1};
use spin::Mutex;

use crate::fault::{FaultBatch, FaultHandler, FaultLog};
use crate::ops::{DomainKind, DomainOptions, Master, MasterOptions, Paging, StreamMatch, StreamOverrides};
use cmdq::{CommandOptions, CommandQueue, QueueOptions};

use evtq::EventQueue;
use fault::{FaultRouter, Limits};
use ids::Identifiers;
use link::Link;
use priq::PriQueue;
use streams::{ConfigLock, Configuration};
use strtab::StreamTable;

pub use domain::{Domain, DomainConfig};
pub use error::{Error, QueueRegisters};
pub use flush::Tag;
pub use ident::{Features, ProbeError, StallModel};
pub use platform::{Parts, Platform};
pub use ste::GuestSte;

/// Where an interrupt goes as a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiTarget {
    /// The doorbell; a multiple of 4.
    pub address: u64,
    /// What is written there.
    pub data: u32,
}

impl MsiTarget {
    /// Bits of an address.
    const ADDRESS: u64 = (1 << 56) - 4;
}

/// Interrupts that are sent as messages. Those without a target stay on their wires.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiTargets {
    /// Events.
    pub events: Option<MsiTarget>,
    /// Page requests.
    pub requests: Option<MsiTarget>,
    /// Global errors.
    pub gerror: Option<MsiTarget>,
}

/// A range that a device of the firmware uses, one to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectRegion {
    /// First address, a multiple of the page size.
    pub start: Iova,
    /// Bytes, likewise.
    pub len: u64,
    /// What is allowed.
    pub prot: Prot<Stage1>,
}

/// A stream that firmware left running, and that must go on until a device claims it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preserved {
    /// The stream.
    pub stream: StreamId,
    /// What it uses. Nothing else is reachable; without any region everything is.
    pub regions: Vec<DirectRegion>,
}

/// What is known about an SMMU beyond its registers.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the register window (`reg` of the device tree).
    pub window: u64,
    /// Whether the SMMU snoops the CPU's caches (`dma-coherent` at the SMMU's node); `None` believes IDR0.COHACC.
    pub coherent: Option<bool>,
    /// Stream ids that the stream table has room for, as bits; `None` for all that the SMMU has.
    pub stream_bits: Option<u8>,
    /// Largest queues, as log2 of their entries: commands, events, page requests.
    pub queue_log2: [u8; 3],
    /// Streams use the EL2 translation regime with ASIDs (a host with VHE).
    pub el2: bool,
    /// Streams that firmware left running.
    pub preserve: Vec<Preserved>,
    /// Interrupts as messages.
    pub msi: Option<MsiTargets>,
    /// How long to wait for anything, in microseconds.
    pub timeout_us: u64,
    /// Faults that are kept for [`SmmuV3::take_faults`].
    pub fault_log: usize,
}

impl Options {
    /// Linux's defaults for an SMMU with this window, with queues of at most 4096 commands and 2048 records.
    pub fn new(window: u64) -> Self {
        Self {
            window,
            coherent: None,
            stream_bits: None,
            queue_log2: [12, 11, 11],
            el2: false,
            preserve: Vec::new(),
            msi: None,
            timeout_us: 1_000_000,
            fault_log: 256,
        }
    }
}

/// Domains by stream and substream.
type RouteMap = BTreeMap<(u32, Option<u32>), Arc<Link>>;

/// What the driver and its domains share.
struct Shared<P: Platform> {
    platform: Arc<P>,
    features: Features,
    options: Options,
    coherent: bool,
    was_enabled: bool,
    queue: CommandQueue<Arc<P>>,
    events: EventQueue<Arc<P>>,
    requests: Option<PriQueue<Arc<P>>>,
    /// The SMMU takes commands, and may have cached what it was shown.
    queue_runs: AtomicBool,
    config: ConfigLock<P::Memory>,
    /// Who is asked about faults, by stream and substream.
    routes: Mutex<RouteMap>,
    asids: Mutex<Identifiers>,
    vmids: Mutex<Identifiers>,
    domain_numbers: AtomicU32,
    router: FaultRouter,
    /// Answers that could not be queued.
    unanswered: AtomicU32,
    faults: Mutex<FaultLog>,
    handler: Mutex<Option<Arc<dyn FaultHandler>>>,
}

impl<P: Platform> Shared<P> {
    fn is_enabled(&self) -> bool {
        self.queue_runs.load(Ordering::Acquire)
    }

    /// Streams use the EL2 regime.
    fn el2(&self) -> bool {
        self.options.el2 && self.features.hyp
    }
}

impl<P: Platform> Drop for Shared<P> {
    /// Everything aborts, and then the tables are freed. If the SMMU does not stop, they are not.
    fn drop(&mut self) {
        if self.disable().is_err() {
            self.queue.keep_memory();
            self.events.keep_memory();
            self.requests.iter().for_each(PriQueue::keep_memory);
            self.config.keep_memory();
        }
    }
}

/// One SMMU. Clones are handles to the same one.
pub struct SmmuV3<P: Platform> {
    shared: Arc<Shared<P>>,
    /// Domains of streams that firmware left running. Not in `shared`, which they hold on to.
    preserved: Arc<Mutex<BTreeMap<u32, Arc<Domain<P>>>>>,
}

impl<P: Platform> Clone for SmmuV3<P> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), preserved: self.preserved.clone() }
    }
}

impl<P: Platform> fmt::Debug for SmmuV3<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SmmuV3").field("features", &self.shared.features).finish_non_exhaustive()
    }
}

impl<R, M, C> SmmuV3<Parts<R, M, C>>
where
    R: Mmio + 'static,
    M: DmaMemory + Clone + 'static,
    C: Clock + 'static,
{
    /// As [`probe_on`](Self::probe_on), with the platform's three parts.
    pub fn probe(registers: R, memory: M, clock: C, options: Options) -> Result<Self, ProbeError> {
        Self::probe_on(Parts { registers, memory, clock }, options)
    }
}

impl<P: Platform> SmmuV3<P> {
    /// Identifies an SMMU, resets it and turns translation on (Linux `arm_smmu_device_probe`).
    ///
    /// If firmware left it on, nothing gets through from the moment it is turned off until it is on again. Afterwards
    /// every stream aborts, except the preserved ones.
    pub fn probe_on(platform: P, options: Options) -> Result<Self, ProbeError> {
        let features = Features::read(platform.registers(), options.window)?;
        let platform = Arc::new(platform);
        let coherent = options.coherent.unwrap_or(features.coherent);
        let [cmdq_log2, evtq_log2, priq_log2] = options.queue_log2;
        let queue = |log2: u8, most: u8| QueueOptions {
            log2: log2.min(most),
            coherent,
            address_bits: features.output_bits,
        };
        let commands = CommandOptions {
            queue: queue(cmdq_log2, features.cmdq_log2),
            msi: features.msi,
            timeout_us: options.timeout_us,
        };
        let bits = options.stream_bits.unwrap_or(features.stream_bits);
        let memory = platform.memory().clone();
        let cr0 = portcullis_arch::smmuv3::regs::Cr0::from_bits(
            platform.registers().read32(portcullis_arch::smmuv3::regs::offset::CR0 as usize),
        );
        let shared = Arc::new(Shared {
            queue: CommandQueue::new(platform.clone(), commands)?,
            events: EventQueue::new(platform.clone(), queue(evtq_log2, features.evtq_log2))?,
            requests: match features.pri {
                true => Some(PriQueue::new(platform.clone(), queue(priq_log2, features.priq_log2))?),
                false => None,
            },
            queue_runs: AtomicBool::new(false),
            config: ConfigLock::new(Configuration::new(StreamTable::new(memory, &features, coherent, bits)?)),
            routes: Mutex::default(),
            asids: Mutex::new(Identifiers::new("ASIDs", features.asid_bits)),
            vmids: Mutex::new(Identifiers::new("VMIDs", features.vmid_bits)),
            domain_numbers: AtomicU32::new(0),
            router: FaultRouter::new(Limits::default()),
            unanswered: AtomicU32::new(0),
            faults: Mutex::new(FaultLog::new(options.fault_log)),
            handler: Mutex::new(None),
            platform,
            features,
            coherent,
            was_enabled: cr0.smmuen(),
            options,
        });
        let smmu = Self { shared, preserved: Arc::default() };
        let cr0 = smmu.shared.prepare()?;
        smmu.preserve()?;
        smmu.shared.enable(cr0)?;
        Ok(smmu)
    }

    /// Enters the streams of firmware, before translation is on.
    fn preserve(&self) -> Result<(), Error> {
        for Preserved { stream, regions } in &self.shared.options.preserve {
            let config = if regions.is_empty() {
                DomainConfig::Identity
            } else if self.shared.features.stage1 {
                DomainConfig::Stage1(Paging::default())
            } else {
                DomainConfig::Stage2(Paging::default())
            };
            let domain = self.new_domain(config, DomainOptions::default())?;
            for DirectRegion { start, len, prot } in regions {
                domain.map(*start, Pa(start.get()), *len, *prot)?;
            }
            {
                let mut config = self.shared.configuration()?;
                self.shared.enter_preserved(&mut config, *stream)?;
                self.shared.attach_stream(&mut config, *stream, &domain)?;
            }
            let _an_earlier_entry_for_it = self.preserved.lock().insert(stream.get(), domain);
        }
        Ok(())
    }

    /// Programs everything again after the SMMU lost its registers. Domains, attachments and mappings are as before:
    /// they are in memory.
    pub fn resume(&self) -> Result<(), Error> {
        let cr0 = self.shared.prepare()?;
        self.shared.enable(cr0)
    }

    /// Turns translation off; **every stream aborts** from now on, until [`resume`](Self::resume). Tells whether
    /// streams were translated.
    pub fn shutdown(&self) -> Result<bool, Error> {
        self.shared.disable()?;
        let translates = |link: &Arc<Link>| !matches!(link.kind, DomainKind::Blocked | DomainKind::Identity);
        Ok(self.shared.routes.lock().values().any(translates))
    }

    /// What the SMMU is.
    pub fn features(&self) -> &Features {
        &self.shared.features
    }
    /// The options it was probed with.
    pub fn options(&self) -> &Options {
        &self.shared.options
    }
    /// True if translation was on when the driver came.
    pub fn was_enabled(&self) -> bool {
        self.shared.was_enabled
    }
    /// Whether the SMMU is taken to snoop the CPU's caches.
    pub fn coherent(&self) -> bool {
        self.shared.coherent
    }
    /// Stream ids that the stream table has room for, as bits.
    pub fn stream_bits(&self) -> Result<u8, Error> {
        Ok(self.shared.configuration()?.table.stream_bits())
    }
    /// The platform.
    pub fn platform(&self) -> &P {
        &self.shared.platform
    }
    /// The command queue.
    pub fn commands(&self) -> &CommandQueue<Arc<P>> {
        &self.shared.queue
    }

    /// Enters a device's streams, all or none. They abort until a domain is attached; a stream that firmware left
    /// running goes on as it was until then.
    pub fn add_master(&self, streams: &[StreamMatch], options: MasterOptions) -> Result<Master, Error> {
        if streams.is_empty() {
            return Err(Error::NoStream);
        }
        let mut config = self.shared.configuration()?;
        for wanted in streams {
            let stream = StreamId(wanted.id);
            if wanted.mask != 0 {
                return Err(Error::StreamMask { stream, mask: wanted.mask });
            }
            config.table.check(stream)?;
        }
        for (done, wanted) in streams.iter().enumerate() {
            if let Err(error) = self.shared.claim(&mut config, StreamId(wanted.id), options) {
                for back in streams.iter().take(done) {
                    self.shared.release(&mut config, StreamId(back.id))?;
                }
                return Err(error);
            }
        }
        let entries = streams.iter().map(|stream| stream.id as usize).collect();
        Ok(Master::new(entries, streams.into()))
    }

    /// Takes a device's streams out; those that no other device has abort.
    pub fn remove_master(&self, master: Master) -> Result<(), Error> {
        let mut config = self.shared.configuration()?;
        for stream in streams_of(&master) {
            self.shared.release(&mut config, stream)?;
        }
        Ok(())
    }

    /// Makes a domain.
    pub fn new_domain(
        &self,
        config: DomainConfig<P>,
        options: DomainOptions,
    ) -> Result<Arc<Domain<P>>, Error> {
        Domain::new(self.shared.clone(), config, options)
    }

    /// Points all of a device's streams at a domain, wherever they pointed before. Where only one word of a stream's
    /// entry decides, its transactions see the old domain or the new one and nothing else. The caller keeps the domain
    /// alive: dropping it blocks the streams.
    ///
    /// An error of the command queue leaves streams with the old domain, the new one, or blocked.
    pub fn attach(&self, master: &Master, domain: &Domain<P>) -> Result<(), Error> {
        self.check_instance(domain)?;
        let mut config = self.shared.configuration()?;
        for stream in streams_of(master) {
            self.shared.prepare_stream(&mut config, stream, domain)?;
        }
        for stream in streams_of(master) {
            self.shared.attach_stream(&mut config, stream, domain)?;
        }
        drop(config);
        for stream in streams_of(master) {
            let preserved = self.preserved.lock().remove(&stream.get());
            // Not under a lock: its end waits for the hardware.
            drop(preserved);
        }
        Ok(())
    }

    /// Points a device's streams at no domain: they abort. Substreams go on.
    pub fn detach(&self, master: &Master) -> Result<(), Error> {
        let mut config = self.shared.configuration()?;
        streams_of(master).try_for_each(|stream| self.shared.detach_stream(&mut config, stream))
    }

    /// Points a substream of all of a device's streams at a stage 1 or process domain (Linux
    /// `arm_smmu_set_pasid`). Transactions without a substream go on with the domain of the device, which has to be a
    /// stage 1, process, identity or blocked domain.
    pub fn attach_substream(
        &self,
        master: &Master,
        substream: SubstreamId,
        domain: &Domain<P>,
    ) -> Result<(), Error> {
        self.check_instance(domain)?;
        let mut config = self.shared.configuration()?;
        for (done, stream) in streams_of(master).enumerate() {
            if let Err(error) = self.shared.attach_substream(&mut config, stream, substream, domain) {
                for back in streams_of(master).take(done) {
                    self.shared.detach_substream(&mut config, back, substream)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Points a substream at nothing: its transactions fault.
    pub fn detach_substream(&self, master: &Master, substream: SubstreamId) -> Result<(), Error> {
        let mut config = self.shared.configuration()?;
        streams_of(master).try_for_each(|stream| self.shared.detach_substream(&mut config, stream, substream))
    }

    fn check_instance(&self, domain: &Domain<P>) -> Result<(), Error> {
        if Arc::ptr_eq(&self.shared, &domain.shared) { Ok(()) } else { Err(Error::OtherInstance) }
    }

    /// Overrides privilege and instruction/data of a device's streams, now and after later attaches. Without an effect
    /// on an SMMU without IDR1.ATTR_PERMS_OVR.
    pub fn set_overrides(&self, master: &Master, overrides: StreamOverrides) -> Result<(), Error> {
        let mut config = self.shared.configuration()?;
        streams_of(master).try_for_each(|stream| self.shared.override_stream(&mut config, stream, overrides))
    }

    /// Bits of substream ids that all of a device's streams have.
    pub fn substream_bits(&self, master: &Master) -> Result<u8, Error> {
        let config = self.shared.configuration()?;
        let mut least = u8::MAX;
        for stream in streams_of(master) {
            least = least.min(config.stream(stream)?.options.substream_bits);
        }
        Ok(least)
    }

    /// What kind of domain a stream uses; `None` for one that nobody has entered.
    pub fn stream_domain(&self, stream: StreamId) -> Option<DomainKind> {
        let config = self.shared.configuration().ok()?;
        Some(config.stream(stream).ok()?.main_kind())
    }

    /// ASIDs and VMIDs in use.
    pub fn tags_in_use(&self) -> (usize, usize) {
        (self.shared.asids.lock().in_use(), self.shared.vmids.lock().in_use())
    }

    /// Who is asked about faults of domains without a handler of their own, and told about everything else.
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

fn streams_of(master: &Master) -> impl Iterator<Item = StreamId> {
    master.entries().iter().map(|&entry| StreamId(entry as u32))
}
