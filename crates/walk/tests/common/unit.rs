//! An SMMU with nothing but settable configuration, so that ports can be tested without a model.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use portcullis_arch::{Access, Attributes, StreamId};
use portcullis_bus::{Initiator, StallState, StallTag, SystemMemory};
use portcullis_walk::{
    Context, ContextKey, Decoded, Fault, FaultOutcome, Invalidation, Nested, Regime, Resolution, SyncLog,
    Tbu, Tcu, TlbStage,
};

/// Configuration of substream n is that of "stream" SUBSTREAM | n.
pub const SUBSTREAM: u32 = 1 << 31;

pub const FROM: Initiator = Initiator::new(StreamId(1));

pub fn key(stage: TlbStage, asid: u16) -> ContextKey {
    ContextKey { secure: false, regime: Regime::Guest, stage, vmid: 0, asid, va_bits: 49 }
}

pub fn context(key: ContextKey, stages: Nested) -> Context {
    let incoming = Attributes::DEVICE_DEFAULT;
    Context {
        key,
        token: 0,
        va_mask: (1 << 49) - 1,
        stages,
        incoming,
        after: None,
        cacheable: true,
        keeps_hints: false,
    }
}

#[derive(Clone)]
pub enum Setting {
    Bypass(u64),
    /// Bypass that refuses what does not fit, without an abort.
    Strict(u64),
    Translate(Arc<Context>),
    Refuse(FaultOutcome),
}

#[derive(Clone, Copy)]
pub enum OnFault {
    Abort,
    Ignore,
    Stall,
}

pub struct State {
    pub streams: HashMap<u32, Setting>,
    pub on_fault: OnFault,
    pub faults: Vec<(u64, Access, Fault)>,
    pub stalls: HashMap<u64, StallState>,
    /// Answers this many faults with a demand to look again.
    pub retries: usize,
    /// The next stream looked up changes its configuration to this while the port is about to use the old one.
    pub changes_to: Option<Setting>,
    next_tag: u64,
}

pub struct Unit {
    pub log: SyncLog,
    pub walker: SystemMemory,
    pub state: Mutex<State>,
}

impl Unit {
    pub fn new(walker: SystemMemory, stages: Context) -> Arc<Self> {
        let streams = HashMap::from([(1, Setting::Translate(Arc::new(stages)))]);
        let state = State {
            streams,
            on_fault: OnFault::Abort,
            faults: Vec::new(),
            stalls: HashMap::new(),
            retries: 0,
            changes_to: None,
            next_tag: 1,
        };
        Arc::new(Self { log: SyncLog::new(), walker, state: Mutex::new(state) })
    }

    pub fn port(self: &Arc<Self>, entries: usize) -> Tbu<Unit, SystemMemory> {
        Tbu::new(self.clone(), self.walker.clone(), entries)
    }

    pub fn configure(&self, stream: u32, setting: Setting) {
        self.state.lock().unwrap().streams.insert(stream, setting);
        self.log.publish(Invalidation::Config);
    }

    pub fn on_fault(&self, what: OnFault) {
        self.state.lock().unwrap().on_fault = what;
    }

    pub fn faults(&self) -> Vec<(u64, Access, Fault)> {
        std::mem::take(&mut self.state.lock().unwrap().faults)
    }

    /// RESUME for every stalled transaction.
    pub fn resume(&self, with: StallState) {
        self.state.lock().unwrap().stalls.values_mut().for_each(|s| *s = with);
    }
}

impl Tcu for Unit {
    type Walker = SystemMemory;
    /// The context handed out last.
    type Memo = Option<Context>;

    fn log(&self) -> &SyncLog {
        &self.log
    }
    fn walker(&self) -> &SystemMemory {
        &self.walker
    }
    fn resolve<'m>(
        &self,
        memo: &'m mut Option<Context>,
        from: &Initiator,
        va: u64,
        _: Access,
    ) -> Resolution<'m> {
        let attrs = from.attrs;
        let mut state = self.state.lock().unwrap();
        let name = from.substream.map_or(from.stream.get(), |s| SUBSTREAM | s.get());
        let now = state.streams.get(&name).cloned();
        if let Some(later) = state.changes_to.take() {
            state.streams.insert(from.stream.get(), later);
            self.log.publish(Invalidation::Config);
        }
        match now {
            Some(Setting::Bypass(mask)) => Resolution::Bypass { attrs, mask, strict: false },
            Some(Setting::Strict(mask)) if va & !mask != 0 => {
                Resolution::Refused(FaultOutcome::Terminate { abort: false })
            }
            Some(Setting::Strict(mask)) => Resolution::Bypass { attrs, mask, strict: true },
            Some(Setting::Translate(c)) => {
                let incoming = c
                    .incoming
                    .with_privileged(from.attrs.privileged())
                    .with_instruction(from.attrs.instruction());
                let context = memo.insert(Context { incoming, ..(*c).clone() });
                Resolution::Translate(Decoded { context, number: None })
            }
            Some(Setting::Refuse(outcome)) => Resolution::Refused(outcome),
            None => Resolution::Refused(FaultOutcome::Terminate { abort: true }),
        }
    }
    fn fault(
        &self,
        _: &Initiator,
        va: u64,
        access: Access,
        _: &Context,
        seen: Option<u64>,
        fault: Fault,
    ) -> FaultOutcome {
        let mut state = self.state.lock().unwrap();
        if seen.is_some_and(|s| s != self.log.generation()) {
            return FaultOutcome::Retry;
        }
        if state.retries > 0 {
            state.retries -= 1;
            return FaultOutcome::Retry;
        }
        state.faults.push((va, access, fault));
        match state.on_fault {
            OnFault::Abort => FaultOutcome::Terminate { abort: true },
            OnFault::Ignore => FaultOutcome::Terminate { abort: false },
            OnFault::Stall => {
                let tag = state.next_tag;
                state.next_tag += 1;
                state.stalls.insert(tag, StallState::Waiting);
                FaultOutcome::Stall(StallTag(tag))
            }
        }
    }
    fn stall_state(&self, tag: StallTag) -> StallState {
        let mut state = self.state.lock().unwrap();
        match state.stalls.get(&tag.0).copied() {
            Some(StallState::Waiting) => StallState::Waiting,
            Some(done) => {
                state.stalls.remove(&tag.0);
                done
            }
            None => StallState::Terminated { abort: true },
        }
    }
}
