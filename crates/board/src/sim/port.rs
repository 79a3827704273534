//! A port that writes down what goes through it, and why it did not.

use std::sync::Arc;

use portcullis_arch::{Access, Iova};
use portcullis_bus::{
    CopyError, CopySide, DmaError, DmaFault, DmaPort, Initiator, StallState, StallTag, SystemMemory,
};
use portcullis_smmuv2::{BypassReason, Outcome, Port};

use crate::sim::trace::{EventKind, Fault, Tracer, TransactionEvent};

/// Simulated cost of a transaction: 100 ns, and 8 bytes a nanosecond.
fn cost(len: usize) -> u64 {
    100 + len as u64 / 8
}

/// Pages of one transaction whose translation is looked at.
const MAX_PAGES: usize = 1024;

/// A port of the SMMU with a record of its transactions.
pub struct TracingPort {
    port: Port<SystemMemory>,
    tracer: Arc<Tracer>,
    engine: Arc<str>,
}

impl TracingPort {
    /// Wraps `port` of the engine called `engine`.
    pub fn new(port: Port<SystemMemory>, tracer: Arc<Tracer>, engine: &str) -> Self {
        Self { port, tracer, engine: engine.into() }
    }

    /// Looks at the translations that a transaction is about to use: all of them if the tracer wants that, and the
    /// first one that fails in any case.
    fn look(&mut self, from: Initiator, iova: Iova, len: usize, access: Access) -> TransactionEvent {
        let mut event = TransactionEvent {
            engine: self.engine.clone(),
            stream: from.stream,
            iova,
            len,
            access,
            error: None,
            translations: Vec::new(),
            fault: None,
        };
        let explain = self.tracer.wants_explanations();
        let mut at = 0;
        for _ in 0..MAX_PAGES {
            if at >= len {
                break;
            }
            let va = iova.wrapping_add(at as u64);
            let cached = self.port.cached(&from, va);
            let explanation = self.port.tcu().explain(from, va, access);
            let size = match &explanation.outcome {
                Outcome::Translated { walked, .. } => 1u64 << walked.size_log2,
                _ => 4096,
            };
            let refused = match &explanation.outcome {
                Outcome::Translated { .. } => false,
                Outcome::Bypass { reason, .. } => {
                    matches!(reason, BypassReason::Unmatched | BypassReason::Conflict)
                }
                _ => true,
            };
            let hit_disagrees = match (&explanation.outcome, &cached) {
                (Outcome::Translated { walked, .. }, Some(c)) => c.pa.get() != walked.pa,
                (Outcome::Fault { .. }, Some(_)) => true,
                _ => false,
            };
            if (refused || hit_disagrees) && event.fault.is_none() {
                event.fault = Some(Fault { explanation: explanation.clone(), cached });
            }
            if explain {
                event.translations.push((explanation, cached));
            }
            if refused && !hit_disagrees {
                break;
            }
            at += usize::try_from(size - (va.get() & (size - 1))).unwrap_or(len);
        }
        event
    }

    fn report(&self, mut event: TransactionEvent, error: Option<(usize, DmaFault)>) {
        event.error = error;
        self.tracer.push(cost(event.len), EventKind::Transaction(Box::new(event)));
    }
}

impl DmaPort for TracingPort {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let event = self.look(from, addr, buf.len(), Access::Read);
        let result = self.port.read(from, addr, buf);
        self.report(event, result.err().map(|e| (e.done, e.fault)));
        result
    }

    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let event = self.look(from, addr, buf.len(), Access::Write);
        let result = self.port.write(from, addr, buf);
        self.report(event, result.err().map(|e| (e.done, e.fault)));
        result
    }

    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        let read = self.look(src.0, src.1, len, Access::Read);
        let write = self.look(dst.0, dst.1, len, Access::Write);
        let result = self.port.copy(src, dst, len);
        let error = |side| result.err().filter(|e| e.side == side).map(|e| (e.error.done, e.error.fault));
        self.report(read, error(CopySide::Source));
        self.report(write, error(CopySide::Destination));
        result
    }

    fn stall_state(&mut self, tag: StallTag) -> StallState {
        self.port.stall_state(tag)
    }
}
