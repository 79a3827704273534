//! A port that writes down what goes through it, and why it did not.

use std::sync::{Arc, Mutex, PoisonError};

use portcullis_arch::{Access, Iova};
use portcullis_bus::dma::DirectPort;
use portcullis_bus::{
    CopyError, CopySide, DmaError, DmaFault, DmaPort, Initiator, StallState, StallTag, SystemMemory,
};
use portcullis_engines::AtcPort;
use portcullis_smmuv3::SmmuV3;
use portcullis_walk::{AccessKind, CachedEntry, Stats, Tcu as _};

use crate::sim::ats::AtsRecorder;
use crate::sim::explanation::Explanation;
use crate::sim::trace::{EventKind, Fault, Tracer, TransactionEvent};

/// Simulated cost of a transaction: 100 ns, and 8 bytes a nanosecond.
pub(crate) fn cost(len: usize) -> u64 {
    100 + len as u64 / 8
}

/// Pages of one transaction whose translation is looked at.
const MAX_PAGES: usize = 1024;

/// A port behind an SMMU, and how to look at what it would do.
trait Behind: DmaPort {
    /// What the SMMU would do, whatever TLBs hold.
    fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation;
    /// Memory as the SMMU's walker sees it.
    fn walker(&self) -> &SystemMemory;
    /// What the port's TLB would answer.
    fn cached(&mut self, from: &Initiator, va: Iova) -> Option<CachedEntry>;
    /// What the port did so far.
    fn stats(&self) -> Stats;
    /// True if the device has translations of its own, so that the SMMU is not always asked.
    fn has_own_translations(&self) -> bool {
        false
    }
}

impl Behind for portcullis_smmuv2::Port<SystemMemory> {
    fn stats(&self) -> Stats {
        self.stats()
    }
    fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        self.tcu().explain(from, va, access).into()
    }
    fn walker(&self) -> &SystemMemory {
        self.tcu().walker()
    }
    fn cached(&mut self, from: &Initiator, va: Iova) -> Option<CachedEntry> {
        self.cached(from, va)
    }
}

impl Behind for portcullis_smmuv3::Port<SystemMemory> {
    fn stats(&self) -> Stats {
        self.stats()
    }
    fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        self.smmu().explain(from, va, access).into()
    }
    fn walker(&self) -> &SystemMemory {
        self.smmu().walker()
    }
    fn cached(&mut self, from: &Initiator, va: Iova) -> Option<CachedEntry> {
        self.cached(from, va)
    }
}

/// A port with the device's own translation cache in front.
struct WithAtc {
    port: AtcPort<AtsRecorder<portcullis_smmuv3::Port<SystemMemory>>>,
    model: Arc<SmmuV3<SystemMemory>>,
}

impl DmaPort for WithAtc {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.port.read(from, addr, buf)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.port.write(from, addr, buf)
    }
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        self.port.copy(src, dst, len)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.port.stall_state(tag)
    }
}

impl Behind for WithAtc {
    fn stats(&self) -> Stats {
        self.port.inner().inner().stats()
    }
    fn explain(&self, from: Initiator, va: Iova, access: Access) -> Explanation {
        self.model.explain(from, va, access).into()
    }
    fn walker(&self) -> &SystemMemory {
        self.model.walker()
    }
    fn cached(&mut self, _: &Initiator, _: Iova) -> Option<CachedEntry> {
        None
    }
    fn has_own_translations(&self) -> bool {
        true
    }
}

/// Where an engine's transactions go.
enum Way {
    Smmu(Box<dyn Behind>),
    Direct(DirectPort<SystemMemory>),
}

/// What went through an engine's port. It is brought up to date after every transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Transactions, both sides of a copy counted.
    pub transactions: u64,
    /// Bytes read and written.
    pub bytes: u64,
    /// Transactions that ended with an error, those that wait for software not counted.
    pub errors: u64,
    /// What the port's TLB and walker did; nothing if no SMMU is on the way.
    pub port: Stats,
}

/// [`Traffic`] that the port writes and others read.
pub type SharedTraffic = Arc<Mutex<Traffic>>;

/// An engine's port with a record of its transactions.
pub struct TracingPort {
    way: Way,
    memory: SystemMemory,
    tracer: Arc<Tracer>,
    engine: Arc<str>,
    traffic: SharedTraffic,
}

/// What the TLB will answer instead of the tables.
fn used(explanation: &Explanation, cached: Option<CachedEntry>) -> Option<CachedEntry> {
    let incoming = explanation.incoming()?;
    cached.filter(|c| c.perms.allows(AccessKind::new(explanation.access(), incoming)))
}

impl TracingPort {
    fn of(memory: SystemMemory, way: Way, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self { way, memory, tracer, engine: engine.into(), traffic: SharedTraffic::default() }
    }

    /// Counts into `traffic`.
    pub fn counting(self, traffic: SharedTraffic) -> Self {
        Self { traffic, ..self }
    }

    /// Wraps the port of an SMMUv2 that the engine called `engine` is behind.
    pub fn new(port: portcullis_smmuv2::Port<SystemMemory>, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self::of(port.memory().clone(), Way::Smmu(Box::new(port)), tracer, engine)
    }

    /// The same for an SMMUv3.
    pub fn v3(port: portcullis_smmuv3::Port<SystemMemory>, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self::of(port.memory().clone(), Way::Smmu(Box::new(port)), tracer, engine)
    }

    /// The same for an engine with a translation cache of its own, on a port of `model` onto `memory`.
    pub(crate) fn with_atc(
        port: AtcPort<AtsRecorder<portcullis_smmuv3::Port<SystemMemory>>>,
        model: Arc<SmmuV3<SystemMemory>>,
        memory: SystemMemory,
        tracer: Arc<Tracer>,
        engine: &str,
    ) -> Self {
        Self::of(memory, Way::Smmu(Box::new(WithAtc { port, model })), tracer, engine)
    }

    /// Wraps the port of an engine that reaches memory without an SMMU.
    pub fn direct(memory: SystemMemory, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self::of(memory.clone(), Way::Direct(DirectPort::new(memory)), tracer, engine)
    }

    fn port(&mut self) -> &mut dyn DmaPort {
        match &mut self.way {
            Way::Smmu(port) => &mut **port,
            Way::Direct(port) => port,
        }
    }

    /// Looks at the translations that a transaction is about to use: all of them if the tracer wants that, and the
    /// first one that fails in any case. The look is not part of the machine: it leaves no trace in SMMU or caches.
    fn look(&mut self, from: Initiator, iova: Iova, len: usize, access: Access) -> TransactionEvent {
        let mut event = TransactionEvent {
            engine: self.engine.clone(),
            stream: from.stream,
            substream: from.substream,
            iova,
            len,
            access,
            error: None,
            translations: Vec::new(),
            fault: None,
        };
        if self.tracer.is_muted() {
            return event;
        }
        let Way::Smmu(port) = &mut self.way else { return event };
        let explain = self.tracer.wants_explanations();
        let mut at = 0;
        for _ in 0..MAX_PAGES {
            if at >= len {
                break;
            }
            let va = iova.wrapping_add(at as u64);
            let explanation = explain_quietly(&**port, from, va, access);
            let cached = used(&explanation, port.cached(&from, va));
            let (size_log2, stale) = match (explanation.walked(), &cached) {
                (Some(walked), Some(c)) => (c.size_log2, c.pa.get() != walked.pa),
                (Some(walked), None) => (walked.size_log2, false),
                (None, Some(c)) => (c.size_log2, true),
                (None, None) => (12, false),
            };
            let refused = explanation.is_fault();
            if (refused || stale) && event.fault.is_none() {
                event.fault = Some(Fault { explanation: explanation.clone(), cached });
            }
            if explain {
                event.translations.push((explanation, cached));
            }
            if refused && !stale {
                break;
            }
            let size = 1u64 << size_log2;
            at += usize::try_from(size - (va.get() & (size - 1))).unwrap_or(len);
        }
        event
    }

    /// Writes a transaction down of which `done` bytes went through, and which ended with `error` or with none of its own.
    fn report(&mut self, mut event: TransactionEvent, done: usize, error: Option<DmaFault>) {
        event.error = error.map(|fault| (done, fault));
        if let (None, Some(fault), Way::Smmu(port)) = (error, &mut event.fault, &mut self.way) {
            let (from, va) = (fault.explanation.from(), fault.explanation.va());
            let offset = va.get().wrapping_sub(event.iova.get());
            if offset >= done as u64 || port.has_own_translations() {
                // The other side of the copy ended it before, or the device did not ask.
                event.fault = None;
            } else if fault.cached.is_none() {
                // It went through all the same: the port knew an entry again as soon as it had looked up the stream.
                fault.cached = used(&fault.explanation, port.cached(&from, va));
            }
        }
        {
            let mut traffic = self.traffic.lock().unwrap_or_else(PoisonError::into_inner);
            traffic.transactions += 1;
            traffic.bytes += done as u64;
            traffic.errors += u64::from(error.is_some_and(|e| !matches!(e, DmaFault::Stalled(_))));
            if let Way::Smmu(port) = &self.way {
                traffic.port = port.stats();
            }
        }
        // What was stale on the way comes before what it led to.
        self.tracer.note_stale_reads(&self.memory);
        self.tracer.push(cost(done), EventKind::Transaction(Box::new(event)));
    }

    fn end(&mut self, event: TransactionEvent, result: Result<(), DmaError>) -> Result<(), DmaError> {
        match result {
            Ok(()) => {
                let len = event.len;
                self.report(event, len, None);
            }
            Err(e) => self.report(event, e.done, Some(e.fault)),
        }
        result
    }
}

/// Explains without reports of stale reads: nobody has read anything yet.
fn explain_quietly(port: &dyn Behind, from: Initiator, va: Iova, access: Access) -> Explanation {
    let explain = || port.explain(from, va, access);
    match port.walker().cpu_cache() {
        Some(cache) => cache.unreported(explain),
        None => explain(),
    }
}

impl DmaPort for TracingPort {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let event = self.look(from, addr, buf.len(), Access::Read);
        let result = self.port().read(from, addr, buf);
        self.end(event, result)
    }

    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let event = self.look(from, addr, buf.len(), Access::Write);
        let result = self.port().write(from, addr, buf);
        self.end(event, result)
    }

    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        let read = self.look(src.0, src.1, len, Access::Read);
        let mut write = self.look(dst.0, dst.1, len, Access::Write);
        let result = self.port().copy(src, dst, len);
        let done = result.err().map_or(len, |e| e.error.done);
        let error = |side| result.err().filter(|e| e.side == side).map(|e| e.error.fault);
        let read_error = error(CopySide::Source);
        self.report(read, done, read_error);
        if read_error.is_some() {
            // What was not read is not written.
            write.len = done;
        }
        if write.len > 0 || len == 0 {
            self.report(write, done, error(CopySide::Destination));
        }
        result
    }

    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.port().stall_state(tag)
    }
}
