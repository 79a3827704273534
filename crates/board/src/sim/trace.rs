//! What happened on a machine, in order: register accesses, transactions, faults, interrupts, stale reads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Access, Iova, StreamId};
use portcullis_bus::{DmaFault, InterruptSink, IrqLevels, StaleRead, SystemMemory};
use portcullis_smmuv2::Explanation;
use portcullis_walk::CachedEntry;

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
    /// An interrupt line changed.
    Interrupt {
        /// SPI number.
        line: u32,
        /// New level.
        high: bool,
    },
    /// A read returned old data.
    Stale(StaleRead),
    /// Somebody says something (a scenario's step).
    Note(String),
}

/// A transaction of an engine, as it came to the port.
#[derive(Clone, Debug)]
pub struct TransactionEvent {
    /// The engine.
    pub engine: Arc<str>,
    /// Its stream.
    pub stream: StreamId,
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
    log: Mutex<Log>,
    lines: IrqLevels,
}

impl Tracer {
    /// A record that begins at time 0.
    pub fn new(recording: Recording) -> Arc<Self> {
        Arc::new(Self {
            now: AtomicU64::new(0),
            registers: AtomicBool::new(recording.registers),
            explain: AtomicBool::new(recording.explain),
            log: Mutex::default(),
            lines: IrqLevels::default(),
        })
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

    /// True if register accesses are written down.
    pub fn wants_registers(&self) -> bool {
        self.registers.load(Ordering::Relaxed)
    }

    /// True if every translation is to be explained.
    pub fn wants_explanations(&self) -> bool {
        self.explain.load(Ordering::Relaxed)
    }

    /// Writes an event down that lasted `lasted` nanoseconds from now, and lets that time pass.
    pub fn push(&self, lasted: u64, kind: EventKind) {
        let at = self.now.fetch_add(lasted, Ordering::Relaxed);
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
        }
    }
}
