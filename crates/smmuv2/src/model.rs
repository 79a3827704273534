//! The SMMU itself: its state behind one lock that hits never take, and its face to ports.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Access, StreamId};
use portcullis_bus::{Initiator, Memory, StallState, StallTag};
use portcullis_walk::{
    Context, Decoded, Fault, FaultKind, FaultOutcome, Invalidation, Resolution, SyncLog, SyncToken, Tbu, Tcu,
};

use crate::config::{Config, ConfigError};
use crate::decide::{Decision, Trail, decide};
use crate::fault::{self, Origin};
use crate::irq::{Interrupts, context_level};
use crate::memo::Memo;
use crate::mmio::Window;
use crate::state::{Bank, Regs, RestoreError, State};

/// A port of an [`SmmuV2`] whose walks and whose data go through `M`.
pub type Port<M> = Tbu<SmmuV2<M>, M>;

/// A secure fetch from non-secure memory through a bank whose stages are off (SCR1.SIF).
pub(crate) const SECURE_FETCH: Fault = Fault::new(FaultKind::Permission, 1, 0);

/// What changes: the registers, and synchronisations under way (which are not state: after a restore no access is
/// running).
pub(crate) struct Live {
    pub regs: Regs,
    /// Per bank.
    pub bank_sync: Vec<SyncToken>,
    /// Non-secure, secure.
    pub global_sync: [SyncToken; 2],
}

/// An SMMUv2. Shared by reference: registers, ports and interrupts may be used from different threads.
pub struct SmmuV2<M> {
    pub(crate) config: Config,
    pub(crate) walker: M,
    pub(crate) log: SyncLog,
    pub(crate) interrupts: Interrupts,
    live: Mutex<Live>,
}

impl<M: Memory> SmmuV2<M> {
    /// Builds an SMMU. `walker` is memory as its table walker sees it.
    ///
    /// # Errors
    /// The configuration is not legal; the error names the value.
    pub fn new(config: Config, walker: M, interrupts: Interrupts) -> Result<Arc<Self>, ConfigError> {
        config.check()?;
        let live = Live::new(Regs::reset(&config));
        Ok(Arc::new(Self { config, walker, log: SyncLog::new(), interrupts, live: Mutex::new(live) }))
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The register window as software of one security state sees it.
    pub fn window(self: &Arc<Self>, secure: bool) -> Window<M> {
        Window::new(self.clone(), secure)
    }

    /// A port whose data goes through `memory`.
    pub fn port(self: &Arc<Self>, memory: M) -> Port<M> {
        let entries = self.config.tlb_entries;
        Tbu::new(self.clone(), memory, entries)
    }

    /// Puts every register back to its reset value. Stalled transactions are terminated with an abort.
    pub fn reset(&self) {
        let mut live = self.lock();
        let mut regs = Regs::reset(&self.config);
        regs.stalls = std::mem::take(&mut live.regs.stalls);
        regs.stalls.end_all();
        *live = Live::new(regs);
        self.log.publish(Invalidation::Everything);
        self.interrupts.update(&self.config, &live.regs);
    }

    /// Everything it remembers. TLBs are not part of it: an empty TLB is always correct.
    pub fn save(&self) -> State {
        State::new(&self.config, &self.lock().regs)
    }

    /// Goes back to a saved state.
    ///
    /// # Errors
    /// The state is of another version or configuration, or damaged; nothing has changed then.
    pub fn restore(&self, state: State) -> Result<(), RestoreError> {
        let regs = state.into_regs(&self.config)?;
        let mut live = self.lock();
        *live = Live::new(regs);
        self.log.publish(Invalidation::Everything);
        self.interrupts.update(&self.config, &live.regs);
        Ok(())
    }

    /// The level of a context bank's interrupt output now.
    pub fn context_interrupt(&self, bank: u8) -> bool {
        let live = self.lock();
        let level = |b: &Bank| context_level(&self.config, b.sctlr, b.fsr());
        live.regs.banks.get(usize::from(bank)).is_some_and(level)
    }

    /// The stream whose fault a bank has recorded, if it has one.
    pub fn faulting_stream(&self, bank: u8) -> Option<StreamId> {
        let live = self.lock();
        let b = live.regs.banks.get(usize::from(bank)).filter(|b| b.fsr != 0)?;
        Some(fault::stream_of(b.cbfrsynra))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn new(regs: Regs) -> Self {
        let bank_sync = regs.banks.iter().map(|_| SyncToken::default()).collect();
        Self { regs, bank_sync, global_sync: Default::default() }
    }
}

impl<M: Memory> Tcu for SmmuV2<M> {
    type Walker = M;
    type Memo = Memo;

    fn log(&self) -> &SyncLog {
        &self.log
    }

    fn walker(&self) -> &M {
        &self.walker
    }

    fn resolve<'m>(&self, memo: &'m mut Memo, from: &Initiator, va: u64, access: Access) -> Resolution<'m> {
        let over = Resolution::Refused(FaultOutcome::Terminate { abort: true });
        let passes = |attrs| {
            // Bypass truncates to the output size and never faults on it.
            Resolution::Bypass { attrs, mask: (1 << self.config.pa_bits) - 1, strict: false }
        };
        if let (Some(regs), contexts) = memo.parts() {
            // What passes is decided without the lock: if a fault or a register write has changed that, the port will
            // look again, and its mark is up. Everything else is decided by the registers themselves.
            match decide(&self.config, regs, contexts, from, access) {
                (Decision::Translate(place), Trail { only_this: false, .. }) => {
                    return memo.context(place).map_or(over, Resolution::Translate);
                }
                (Decision::Bypass { attrs, .. }, Trail { only_this: false, .. }) => return passes(attrs),
                _ => {}
            }
        }
        let mut live = self.lock();
        let contexts = memo.looked(&live.regs);
        let (decision, trail) = decide(&self.config, &live.regs, contexts, from, access);
        let origin = Origin { from, va, access, operation: false };
        if trail.only_this {
            // The port may use the answer now, but not keep it.
            self.log.publish(Invalidation::Config);
        }
        match decision {
            Decision::Bypass { attrs, .. } => passes(attrs),
            Decision::Translate(place) => memo.context(place).map_or(over, Resolution::Translate),
            Decision::Global { fault, nested } => {
                let what = (fault, nested);
                let outcome = fault::global(&self.config, &mut live.regs, what, origin, trail.secure);
                self.interrupts.update(&self.config, &live.regs);
                Resolution::Refused(outcome)
            }
            Decision::SecureFetch(place) => {
                let Some(Decoded { context, .. }) = memo.context(place) else { return over };
                let outcome = fault::context(&self.config, &mut live.regs, context, origin, SECURE_FETCH);
                self.log.publish(Invalidation::Config);
                self.interrupts.update(&self.config, &live.regs);
                Resolution::Refused(outcome)
            }
            Decision::Blocked { bank, stall, abort } => {
                Resolution::Refused(fault::blocked(&mut live.regs, bank, stall, abort))
            }
        }
    }

    fn fault(
        &self,
        from: &Initiator,
        va: u64,
        access: Access,
        context: &Context,
        seen: Option<u64>,
        fault: Fault,
    ) -> FaultOutcome {
        let mut live = self.lock();
        if seen.is_some_and(|seen| seen != self.log.generation()) {
            return FaultOutcome::Retry;
        }
        let origin = Origin { from, va, access, operation: false };
        let outcome = fault::context(&self.config, &mut live.regs, context, origin, fault);
        // Every port looks at the bank again, so that HUPCF = 0 stops hits as well.
        self.log.publish(Invalidation::Config);
        self.interrupts.update(&self.config, &live.regs);
        outcome
    }

    fn stall_state(&self, tag: StallTag) -> StallState {
        self.lock().regs.stalls.ask(tag)
    }
}
