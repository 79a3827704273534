//! What happened on a machine, in order: register accesses, transactions, faults, interrupts, stale reads.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use portcullis_arch::{Access, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{
    AtcInvalidation, AtsReply, DmaFault, InterruptSink, IrqLevels, PageGroupResponse, PageRequest, StaleRead,
    SystemMemory,
};
use portcullis_walk::CachedEntry;

pub use crate::sim::explanation::Explanation;

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// Simulated time in nanoseconds.
    pub at: u64,
    /// How long it took, in nanoseconds.
    pub lasted: u64,
    /// What.
    pub kind: EventKind,
}

/// Kinds of events.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// A register access by the CPU.
    Register {
        /// The device.
        device: Arc<str>,
        /// Offset in its window.
        offset: u64,
        /// Bytes.
        size: u8,
        /// Write or read.
        write: bool,
        /// What was written or read.
        value: u64,
    },
    /// A transaction of an engine.
    Transaction(Box<TransactionEvent>),
    /// Something that a device with address translation services did, or was told.
    Ats {
        /// The engine.
        engine: Arc<str>,
        /// What.
        what: AtsEvent,
    },
    /// An interrupt line changed.
    Interrupt {
        /// SPI number.
        line: u32,
        /// New level.
        high: bool,
    },
    /// A message (MSI) arrived at the ITS.
    Message {
        /// Where it was written to.
        address: Pa,
        /// What: the event id.
        data: u32,
        /// The interrupt that it is: 8192 and up.
        lpi: u32,
    },
    /// A read returned old data.
    Stale(StaleRead),
    /// Somebody says something (a scenario's step).
    Note(String),
}

/// What passes between a device with address translation services and the SMMU.
#[derive(Clone, Debug)]
pub enum AtsEvent {
    /// The device asked for a translation.
    Request {
        /// Its stream.
        stream: StreamId,
        /// Its substream.
        substream: Option<SubstreamId>,
        /// The address.
        iova: Iova,
        /// It promised not to write.
        no_write: bool,
        /// The answer.
        reply: AtsReply,
    },
    /// The device used a translation.
    Translated {
        /// Its stream.
        stream: StreamId,
        /// The translated address.
        address: u64,
        /// Bytes.
        len: usize,
        /// Read or write.
        access: Access,
        /// Bytes done before the fault, and the fault.
        error: Option<(usize, DmaFault)>,
    },
    /// The device asked for a page.
    PageRequest(PageRequest),
    /// The device was answered.
    Response(PageGroupResponse),
    /// The device had to forget translations.
    Invalidation(AtcInvalidation),
}

/// A transaction of an engine, as it came to the port.
#[derive(Clone, Debug)]
pub struct TransactionEvent {
    /// The engine.
    pub engine: Arc<str>,
    /// Its stream.
    pub stream: StreamId,
    /// Its substream.
    pub substream: Option<SubstreamId>,
    /// First address.
    pub iova: Iova,
    /// Bytes asked for.
    pub len: usize,
    /// Read or write.
    pub access: Access,
    /// Bytes done before the fault, and the fault, if one came back to the engine.
    pub error: Option<(usize, DmaFault)>,
    /// The translations of its pages, where they were asked for.
    pub translations: Vec<(Explanation, Option<CachedEntry>)>,
    /// The IOMMU refused it, or let it pass untranslated although nobody told it to, or answered from a TLB entry that the
    /// tables no longer say (then `cached` has it).
    pub fault: Option<Fault>,
}

/// Why a transaction did not get through.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The translation that failed.
    pub explanation: Explanation,
    /// What the port's TLB held for it and allowed this access.
    pub cached: Option<CachedEntry>,
}

/// What is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Recording {
    /// Register accesses.
    pub registers: bool,
    /// The story of every translation, not only of those that fault.
    pub explain: bool,
}

/// Events kept at most; later ones are counted.
const MAX_EVENTS: usize = 1 << 20;

#[derive(Default)]
struct Log {
    events: Vec<Event>,
    lost: u64,
}

/// The record of a machine, and its clock.
pub struct Tracer {
    now: AtomicU64,
    registers: AtomicBool,
    explain: AtomicBool,
    /// Nothing is written down for now.
    muted: AtomicBool,
    log: Mutex<Log>,
    lines: IrqLevels,
    edges: Mutex<Edges>,
    /// Who else hears of interrupts: somebody else's interrupt controller.
    outside: OnceLock<Arc<dyn InterruptSink>>,
}

/// Interrupts that are events and not levels.
#[derive(Default)]
struct Edges {
    /// Lines of which rising edges are remembered, as an interrupt controller is configured.
    lines: BTreeSet<u32>,
    /// Those that have risen and were not taken.
    risen: BTreeSet<u32>,
    /// Addresses that messages are written to.
    doorbells: BTreeSet<u64>,
    /// Event ids of messages that were not taken.
    messages: BTreeSet<u32>,
}

/// The first interrupt that messages become; event id 0.
pub const FIRST_LPI: u32 = 8192;

impl Tracer {
    /// A record that begins at time 0.
    pub fn new(recording: Recording) -> Arc<Self> {
        Arc::new(Self {
            now: AtomicU64::new(0),
            registers: AtomicBool::new(recording.registers),
            explain: AtomicBool::new(recording.explain),
            muted: AtomicBool::new(false),
            log: Mutex::default(),
            lines: IrqLevels::default(),
            edges: Mutex::default(),
            outside: OnceLock::new(),
        })
    }

    fn edges(&self) -> MutexGuard<'_, Edges> {
        self.edges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rising edges of `line` are remembered until they are taken.
    pub fn configure_edge(&self, line: u32) {
        self.edges().lines.insert(line);
    }

    /// Interrupts of this machine go to `sink` as well: lines when they change, messages to any address. Once.
    pub fn forward_interrupts(&self, sink: Arc<dyn InterruptSink>) {
        let _ = self.outside.set(sink);
    }

    /// Messages to `address` are interrupts.
    pub fn add_doorbell(&self, address: Pa) {
        self.edges().doorbells.insert(address.get());
    }

    /// Whether messages to `address` are interrupts.
    pub fn is_doorbell(&self, address: Pa) -> bool {
        self.edges().doorbells.contains(&address.get())
    }

    /// Takes the edges that were remembered, and the event ids of messages that arrived.
    pub fn take_edges(&self) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let mut edges = self.edges();
        (std::mem::take(&mut edges.risen), std::mem::take(&mut edges.messages))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Simulated time in nanoseconds.
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    /// Lets time pass.
    pub fn advance(&self, ns: u64) {
        self.now.fetch_add(ns, Ordering::Relaxed);
    }

    /// Lets time pass until `at`, unless it is later already.
    pub fn advance_to(&self, at: u64) {
        self.now.fetch_max(at, Ordering::Relaxed);
    }

    /// Writes nothing down until it is told otherwise: for thousands of accesses of which the sum is what matters.
    pub fn mute(&self, muted: bool) {
        self.muted.store(muted, Ordering::Relaxed);
    }

    /// True if nothing is written down.
    pub fn is_muted(&self) -> bool {
        self.muted.load(Ordering::Relaxed)
    }

    /// True if register accesses are written down.
    pub fn wants_registers(&self) -> bool {
        self.registers.load(Ordering::Relaxed) && !self.is_muted()
    }

    /// True if every translation is to be explained.
    pub fn wants_explanations(&self) -> bool {
        self.explain.load(Ordering::Relaxed) && !self.is_muted()
    }

    /// Writes an event down that lasted `lasted` nanoseconds from now, and lets that time pass.
    pub fn push(&self, lasted: u64, kind: EventKind) {
        let at = self.now.fetch_add(lasted, Ordering::Relaxed);
        if self.is_muted() {
            return;
        }
        let mut log = self.lock();
        if log.events.len() < MAX_EVENTS {
            log.events.push(Event { at, lasted, kind });
        } else {
            log.lost += 1;
        }
    }

    /// Writes down the stale reads that a memory has seen.
    pub fn note_stale_reads(&self, memory: &SystemMemory) {
        let Some(cache) = memory.cpu_cache() else { return };
        let (reports, lost) = cache.take_reports();
        for report in reports {
            self.push(0, EventKind::Stale(report));
        }
        if lost > 0 {
            self.lock().lost += lost;
        }
    }

    /// The events since the last call, and how many more there were than are kept.
    pub fn take(&self) -> (Vec<Event>, u64) {
        let mut log = self.lock();
        (std::mem::take(&mut log.events), std::mem::take(&mut log.lost))
    }

    /// The interrupt lines.
    pub fn lines(&self) -> &IrqLevels {
        &self.lines
    }
}

impl InterruptSink for Tracer {
    fn set_level(&self, line: u32, high: bool) {
        if self.lines.drive(line, high) {
            self.push(0, EventKind::Interrupt { line, high });
            let mut edges = self.edges();
            if high && edges.lines.contains(&line) {
                edges.risen.insert(line);
            }
            drop(edges);
            if let Some(outside) = self.outside.get() {
                outside.set_level(line, high);
            }
        }
    }

    fn message(&self, address: Pa, data: u32) {
        let known = {
            let mut edges = self.edges();
            let known = edges.doorbells.contains(&address.get());
            if known {
                edges.messages.insert(data);
            }
            known
        };
        if let Some(outside) = self.outside.get() {
            outside.message(address, data);
        }
        // Elsewhere nothing listens.
        if known {
            self.push(0, EventKind::Message { address, data, lpi: FIRST_LPI.saturating_add(data) });
        }
    }
}
