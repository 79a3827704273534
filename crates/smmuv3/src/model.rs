//! The SMMU itself: its state behind one lock that hits never take, and its face to ports.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use portcullis_arch::smmuv3::EventCode;
use portcullis_arch::{Access, StreamId};
use portcullis_bus::{
    AtsDevice, Initiator, Memory, PageGroupResponse, PageRequest, PageResponse, StallState, StallTag,
};
use portcullis_walk::{
    Context, Fault, FaultOutcome, Invalidation, NoRecord, Resolution, SyncLog, SyncToken, Tbu, Tcu, Updates,
};

use crate::ats::{self, Port};
use crate::caps::{Caps, CapsError};
use crate::command::Stopped;
use crate::decision::{BypassReason, Decision, FaultFlags, TableRegs, Trail, View};
use crate::event::{self, Client, Ending, Judged};
use crate::irq::{Interrupts, Outputs};
use crate::lookup::memo::Memo;
use crate::lookup::{look_up, look_up_remembering};
use crate::mmio::Window;
use crate::registers::Effects;
use crate::report::PageAnswer;
use crate::stall::StalledTransaction;
use crate::state::{Regs, RestoreError, State};

/// What changes: the registers, and synchronisations under way (which are not state: after a restore no access is
/// running, and a CMD_SYNC that waited is at CMDQ_CONS and begins again).
pub(crate) struct Live {
    pub regs: Regs,
    /// What the CMD_SYNC at CONS waits for, per interface.
    pub tokens: [Option<SyncToken>; 2],
    /// What the acknowledgement of CR0 and GBPA waits for, per interface.
    pub settling: [Option<SyncToken>; 2],
    /// Commands consumed so far, by the code of the operation: for those who look at it, no state.
    pub commands: Box<[u64; 256]>,
}

impl Live {
    fn new(regs: Regs) -> Self {
        Self { regs, tokens: [None, None], settling: [None, None], commands: Box::new([0; 256]) }
    }
}

/// An SMMUv3. Shared by reference: registers, ports and interrupts may be used from different threads.
///
/// Its memory and its interrupt sinks are used while the registers are locked: they must not access the registers
/// themselves.
pub struct SmmuV3<M> {
    pub(crate) caps: Caps,
    pub(crate) memory: M,
    pub(crate) log: SyncLog,
    pub(crate) outputs: Outputs,
    devices: RwLock<BTreeMap<u32, Arc<dyn AtsDevice>>>,
    live: Mutex<Live>,
}

/// Makes an [`SmmuV3`].
pub struct Builder<M> {
    caps: Caps,
    memory: Option<M>,
    interrupts: Interrupts,
    doorbell: Range<u64>,
}

impl<M: Memory> Builder<M> {
    /// Memory as the SMMU's own accesses see it: tables, queues, messages.
    #[must_use]
    pub fn memory(self, memory: M) -> Self {
        Self { memory: Some(memory), ..self }
    }

    /// Where interrupts go. Without this they go nowhere, but messages are still written to memory.
    #[must_use]
    pub fn interrupts(self, interrupts: Interrupts) -> Self {
        Self { interrupts, ..self }
    }

    /// Addresses whose messages go to [`Interrupts::messages`] instead of memory: the doorbell of an interrupt
    /// controller.
    #[must_use]
    pub fn msi_doorbell(self, range: Range<u64>) -> Self {
        Self { doorbell: range, ..self }
    }

    /// The SMMU, reset.
    ///
    /// # Errors
    /// The capabilities break a rule of the architecture, or there is no memory.
    pub fn build(self) -> Result<Arc<SmmuV3<M>>, CapsError> {
        let Self { caps, memory, interrupts, doorbell } = self;
        caps.check()?;
        let memory = memory.ok_or(CapsError::NoMemory)?;
        let live = Mutex::new(Live::new(Regs::reset(&caps)));
        Ok(Arc::new(SmmuV3 {
            caps,
            memory,
            log: SyncLog::new(),
            outputs: Outputs { interrupts, doorbell },
            devices: RwLock::default(),
            live,
        }))
    }
}

/// Looks at running accesses before the caller's core is given away in between.
const QUICK: usize = 8;
/// Longest time until the next look. The end of the access ends it, but for a race that is nearly always won. Longer than the
/// scheduler's tick, so that no timer has to be set up for it.
const PAUSE: Duration = Duration::from_millis(5);

/// STE.MEV of the entry that a look-up read.
fn trail_merges(trail: &Trail) -> bool {
    trail.ste.is_some_and(|(_, ste)| ste.dw1().mev())
}

/// How often a look-up that ends in a fault is made again because something was invalidated meanwhile.
const LOOKS: usize = 16;

impl<M: Memory> SmmuV3<M> {
    /// Starts to build an SMMU with these capabilities.
    pub fn builder(caps: Caps) -> Builder<M> {
        Builder { caps, memory: None, interrupts: Interrupts::default(), doorbell: 0..0 }
    }

    /// Its capabilities.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// The register window as software of one security state sees it.
    pub fn window(self: &Arc<Self>, secure: bool) -> Window<M> {
        Window::new(self.clone(), secure)
    }

    /// A port whose data goes through `memory`.
    pub fn port(self: &Arc<Self>, memory: M) -> Port<M> {
        Port::new(Tbu::new(self.clone(), memory, self.caps.tlb_entries))
    }

    /// Tells the SMMU which device's translation cache belongs to a (non-secure) stream: it gets the stream's
    /// CMD_ATC_INV and CMD_PRI_RESP.
    pub fn attach_ats(&self, stream: StreamId, device: Arc<dyn AtsDevice>) {
        self.devices.write().unwrap_or_else(PoisonError::into_inner).insert(stream.get(), device);
    }

    pub(crate) fn ats_device(&self, stream: u32) -> Option<Arc<dyn AtsDevice>> {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).get(&stream).cloned()
    }

    /// Goes on with commands that wait for something or for their turn. True if there is more to do: call again when
    /// devices have moved on. Register accesses do the same by themselves.
    pub fn poll(&self) -> bool {
        let mut live = self.lock();
        self.turn(&mut live) != Stopped::Idle
    }

    /// The transactions that are stalled now, oldest first.
    pub fn stalled(&self) -> Vec<StalledTransaction> {
        self.lock().regs.stalls.list()
    }

    /// Puts every register back to its reset value. Stalled transactions are terminated with an abort.
    pub fn reset(&self) {
        let mut live = self.lock();
        let mut regs = Regs::reset(&self.caps);
        regs.stalls =
            std::mem::replace(&mut live.regs.stalls, crate::stall::Stalls::new(self.caps.stall_max));
        regs.stalls.end_all();
        let commands = live.commands.clone();
        *live = Live { commands, ..Live::new(regs) };
        self.log.publish(Invalidation::Everything);
    }

    /// Commands that were consumed since the model was made, by the code of their operation; those that were refused are
    /// not counted.
    pub fn commands_done(&self) -> Vec<(u8, u64)> {
        let live = self.lock();
        (0..=u8::MAX).zip(live.commands.iter().copied()).filter(|(_, n)| *n > 0).collect()
    }

    /// Everything it remembers, including the positions in its queues and stalled transactions. TLBs are not part of it:
    /// an empty TLB is always correct.
    pub fn save(&self) -> State {
        State::new(&self.caps, &self.lock().regs)
    }

    /// Goes back to a saved state.
    ///
    /// # Errors
    /// The state is of another version or capabilities, or damaged; nothing has changed then.
    pub fn restore(&self, state: State) -> Result<(), RestoreError> {
        let regs = state.into_regs(&self.caps)?;
        let mut live = self.lock();
        *live = Live::new(regs);
        self.log.publish(Invalidation::Everything);
        Ok(())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a transaction belongs to a secure stream: it says so, and there is a secure interface. Without one every
    /// stream is non-secure.
    pub(crate) fn is_secure(&self, from: &Initiator) -> bool {
        self.caps.secure.is_some() && !from.attrs.non_secure()
    }

    /// The registers on which look-ups of a security state depend, and the generation at which they are these.
    pub(crate) fn table_regs(&self, secure: bool) -> (TableRegs, u64) {
        let live = self.lock();
        (live.regs.table_regs(&self.caps, secure), self.log.generation())
    }

    /// What a register write has set in motion.
    pub(crate) fn apply(&self, live: &mut Live, side: usize, effects: Effects) {
        if effects.forget {
            self.log.publish(Invalidation::Everything);
        }
        if effects.disabled {
            live.regs.stalls.terminate(side == 1, None);
        }
        if effects.cmdq_off {
            // The CMD_SYNC at CONS begins again when the queue is on again.
            live.tokens[side] = None;
        }
        if effects.config {
            self.log.publish(Invalidation::Config);
            let token = self.log.begin_sync();
            match &mut live.settling[side] {
                Some(earlier) => earlier.merge(token),
                none => *none = Some(token),
            }
        }
    }

    /// One turn of everything that goes on by itself, bounded, without waiting.
    fn turn(&self, live: &mut Live) -> Stopped {
        let mut stopped = Stopped::Idle;
        let sides = if self.caps.secure.is_some() { 0..2 } else { 0..1 };
        for side in sides {
            if live.regs.side[side].in_transition() {
                let settled = live.settling[side].as_mut().is_none_or(SyncToken::poll);
                live.regs.side[side].acknowledge(settled);
                if settled {
                    live.settling[side] = None;
                } else {
                    stopped = stopped.max(Stopped::Access);
                }
            }
            stopped = stopped.max(self.consume(live, side));
            self.flush(live, side);
        }
        stopped
    }

    /// A turn, and while running accesses are what it waits for more of them, with the lock let go in between so that they can
    /// end, until `patience` is over.
    pub(crate) fn drive<'a>(
        &'a self,
        mut live: MutexGuard<'a, Live>,
        patience: Duration,
    ) -> MutexGuard<'a, Live> {
        let mut end = None;
        for look in 0.. {
            if self.turn(&mut live) != Stopped::Access || patience.is_zero() {
                break;
            }
            if look < QUICK {
                drop(live);
                std::hint::spin_loop();
            } else {
                // The access belongs to a thread that does not run.
                let now = Instant::now();
                let left = end.get_or_insert(now + patience).saturating_duration_since(now);
                if left.is_zero() {
                    break;
                }
                let waits_for =
                    live.tokens.iter().chain(&live.settling).flatten().find(|t| !t.is_over()).cloned();
                drop(live);
                if let Some(token) = waits_for {
                    token.pause(left.min(PAUSE));
                }
            }
            live = self.lock();
        }
        live
    }

    /// Writes what a judged fault demands and says how the transaction ends.
    fn finish(&self, live: &mut Live, from: &Initiator, judged: Judged) -> FaultOutcome {
        let secure = self.is_secure(from);
        let side = usize::from(secure);
        let Judged { record, recorded, ending, merge } = judged;
        // Nothing stalls any more once SMMUEN is 0.
        let may_stall = live.regs.side[side].cr0().smmuen() && live.regs.stalls.has_room();
        if ending == Ending::Stall && may_stall {
            let (stream, now) = ((secure, from.stream.get()), self.log.generation());
            let tag = live.regs.stalls.wait(stream, now, |stag| event::stalled(record, stag));
            self.flush(live, side);
            return FaultOutcome::Stall(tag);
        }
        if recorded && live.regs.side[side].cr0().smmuen() {
            self.record(live, side, record, merge);
        }
        FaultOutcome::Terminate { abort: ending != Ending::ZeroIgnore }
    }

    /// GATOS_CTRL.RUN was set: makes the operation and clears RUN.
    pub(crate) fn operate(&self, side: usize) {
        let mut live = self.lock();
        let par = self.operation(&live.regs, side);
        let i = &mut live.regs.side[side];
        (i.gatos_par, i.gatos_ctrl) = (par, 0);
    }

    /// Takes a device's page request, and answers it where the SMMU does that by itself.
    pub(crate) fn page_request(&self, request: &PageRequest) {
        let secure = self.is_secure(&request.from);
        let answer = self.take_page_request(&mut self.lock(), secure, request);
        let response = match answer {
            PageAnswer::Nothing => return,
            PageAnswer::Say(response) => response,
            PageAnswer::Overflow => self.overflow_answer(request),
        };
        if let Some(device) = self.ats_device(request.from.stream.get()) {
            device.page_response(response);
        }
    }

    /// The answer to the last request of a group while the queue overflows.
    fn overflow_answer(&self, request: &PageRequest) -> PageGroupResponse {
        let group = request.group & PageRequest::MAX_GROUP;
        let answer = |code, substream| PageGroupResponse { substream, group, code };
        let substream = request.from.substream;
        if substream.is_none() || self.caps.pps {
            return answer(PageResponse::Success, substream);
        }
        // STE.PPAR says whether the PASID is named.
        let regs = self.lock().regs.table_regs(&self.caps, false);
        let view = View { updates: Updates::Pretend, ..View::new(&self.caps, regs, &self.memory) };
        let from = Initiator { substream: None, ..request.from };
        let (decision, trail) = look_up(&view, &from, request.addr.get(), Access::Read, &mut NoRecord);
        let unusable = matches!(&decision, Decision::Fault(f) if f.code == EventCode::BadSte);
        match trail.ste {
            Some((_, ste)) if !unusable => {
                answer(PageResponse::Success, substream.filter(|_| ste.dw1().ppar()))
            }
            _ => answer(PageResponse::Failure, None),
        }
    }
}

impl<M: Memory> Tcu for SmmuV3<M> {
    type Walker = M;
    type Memo = Memo;

    fn log(&self) -> &SyncLog {
        &self.log
    }

    fn walker(&self) -> &M {
        &self.memory
    }

    fn resolve<'m>(&self, memo: &'m mut Memo, from: &Initiator, va: u64, access: Access) -> Resolution<'m> {
        if ats::is_own(from) {
            return self.resolve_ats(memo, from, va, access);
        }
        let secure = self.is_secure(from);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let (regs, seen) = memo.registers(secure, attempt > 1, || self.table_regs(secure));
            // Tables are read without the lock: the port's mark is up, so what is invalidated from here on is not
            // reported complete before the port has looked again.
            let view = View::new(&self.caps, regs, &self.memory);
            let mut trail = Trail::default();
            let decided = look_up_remembering(&view, memo, from, va, access, &mut trail);
            let over = Resolution::Refused(FaultOutcome::Terminate { abort: true });
            let decision = match decided {
                Ok(place) => {
                    if trail.only_this {
                        // The port may use the answer now, but not keep it.
                        self.log.publish(Invalidation::Config);
                    }
                    return memo.context(place).map_or(over, Resolution::Translate);
                }
                Err(decision) => decision,
            };
            let judged = match decision {
                // Never: it is in the memo.
                Decision::Silent(_) | Decision::Translate(_) => return over,
                Decision::Bypass { attrs, reason, limit_bits } => {
                    let mask = 1u64.checked_shl(limit_bits.into()).map_or(u64::MAX, |size| size - 1);
                    if va & !mask == 0 {
                        if trail.only_this {
                            self.log.publish(Invalidation::Config);
                        }
                        return Resolution::Bypass { attrs, mask, strict: true };
                    }
                    if reason == BypassReason::Disabled {
                        return over;
                    }
                    let record = event::out_of_range(&Client::new(from, va, access, attrs));
                    Judged { record, recorded: true, ending: Ending::Abort, merge: trail_merges(&trail) }
                }
                Decision::Fault(fault) => event::config_fault(from, va, access, &fault, regs.cr2.recinvsid()),
            };
            let mut live = self.lock();
            if attempt < LOOKS && self.log.generation() != seen {
                continue;
            }
            return Resolution::Refused(self.finish(&mut live, from, judged));
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
        let from = &ats::shown(from);
        let client = Client::new(from, va, access, context.incoming);
        let judged = event::walk_fault(&client, &fault, FaultFlags::from_bits(context.token), false);
        self.finish(&mut live, from, judged)
    }

    fn stall_state(&self, tag: StallTag) -> StallState {
        let mut live = self.lock();
        // A master that asks is one that steps: let the command that decides about it run.
        self.turn(&mut live);
        live.regs.stalls.ask(tag)
    }
}
