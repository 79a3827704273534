//! How an SMMU tells its ports to forget, and learns that they have.
//!
//! Each invalidation gets a *generation*, kept in one shared word that ports only read, and an entry in a bounded
//! log. A port compares the generation with the one it has caught up to before each access: equal means its
//! TLB holds nothing that was invalidated. Otherwise it applies the entries that it missed (or forgets all if the
//! log has moved on), so the cost falls on what is invalidated, not on the size of the TLB.
//!
//! A port marks itself as inside an access with a plain store before it looks at the generation. An SMMU that must
//! report completion (TLBSYNC, CMD_SYNC) publishes the generation, makes every core pass a barrier, and then waits for
//! the ports that were inside an access to leave it. The barrier is `membarrier` on Linux, so that the port's side
//! needs none; elsewhere each side uses a fence. The pair is the store-buffering (Dekker) pattern: either the
//! port sees the new generation, or the SMMU sees the port's mark.
//!
//! Who waits for an access of a thread that does not run gives its core away ([`SyncToken::pause`]) and is woken by the port that
//! leaves.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::Duration;

use crate::tlb::{ContextKey, Regime, TlbStage};

/// Which stages' entries an invalidation by VMID or of everything removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StageScope {
    /// Stage 1, stage 2 and combined entries.
    All,
    /// Stage 1 and combined entries.
    Stage1AndCombined,
    /// Stage 2 entries.
    Stage2,
}

impl StageScope {
    fn covers(self, stage: TlbStage) -> bool {
        match self {
            Self::All => true,
            Self::Stage1AndCombined => stage != TlbStage::Stage2,
            Self::Stage2 => stage == TlbStage::Stage2,
        }
    }
}

/// The contexts that an invalidation concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scope {
    /// Security state.
    pub secure: bool,
    /// Regime, or all regimes of the security state.
    pub regime: Option<Regime>,
    /// VMID, or any.
    pub vmid: Option<u16>,
    /// ASID, or any.
    pub asid: Option<u16>,
    /// Stages.
    pub stages: StageScope,
}

impl Scope {
    /// True if entries of `key` are concerned, the ASID left aside.
    pub fn covers_but_asid(&self, key: &ContextKey) -> bool {
        self.secure == key.secure
            && self.regime.is_none_or(|r| r == key.regime)
            && self.vmid.is_none_or(|v| v == key.vmid)
            && self.stages.covers(key.stage)
    }
    /// True if the ASID matches as well.
    pub fn covers_asid(&self, key: &ContextKey) -> bool {
        self.asid.is_none_or(|a| a == key.asid)
    }
}

/// One thing to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invalidation {
    /// Registers changed: look up the configuration of every stream again. TLB entries stay.
    Config,
    /// Every TLB entry, whatever its tags.
    Everything,
    /// Entries of these contexts. With an ASID, global entries stay.
    Contexts(Scope),
    /// Entries of these contexts that cover an input address. With an ASID, also global entries of other ASIDs.
    Address(Scope, u64),
    /// The same for all addresses from `start` to `last`.
    Range {
        /// The contexts.
        scope: Scope,
        /// First address.
        start: u64,
        /// Last address.
        last: u64,
        /// log2 of the granule whose entries must go; 0 for any.
        granule_log2: u8,
    },
    /// The configuration of these streams, whatever their substream. TLB entries and other streams stay.
    Streams {
        /// First stream.
        first: u32,
        /// Last stream.
        last: u32,
    },
    /// The configuration of one substream of a stream. `None` is the one that transactions without a substream use;
    /// these are forgotten in any case, because they may share the configuration of substream 0.
    Substream {
        /// Stream.
        stream: u32,
        /// Substream.
        substream: Option<u32>,
    },
}

/// A port's mark, odd while it is inside an access. One cache line of its own.
#[repr(align(128))]
#[derive(Debug, Default)]
pub struct InFlight {
    mark: AtomicU64,
    /// Somebody waits for the access to end.
    awaited: AtomicBool,
    waiters: Mutex<Vec<Thread>>,
}

impl InFlight {
    /// The port enters (odd) or leaves (even) an access. Only the owning port calls this.
    #[inline]
    pub(crate) fn set(&self, mark: u64, order: Ordering) {
        self.mark.store(mark, order);
    }

    /// The port leaves an access.
    #[inline(always)]
    pub(crate) fn leave(&self, mark: u64) {
        self.set(mark, Ordering::Release);
        if self.awaited.load(Ordering::Relaxed) {
            self.wake();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake(&self) {
        let mut waiters = lock(&self.waiters);
        self.awaited.store(false, Ordering::Relaxed);
        waiters.drain(..).for_each(|thread| thread.unpark());
    }

    /// Has the port wake a thread when it leaves its access.
    fn awaited_by(&self, thread: Thread) {
        let mut waiters = lock(&self.waiters);
        waiters.push(thread);
        self.awaited.store(true, Ordering::Relaxed);
    }

    fn no_longer_awaited_by(&self, thread: &Thread) {
        let mut waiters = lock(&self.waiters);
        waiters.retain(|waiter| waiter.id() != thread.id());
        self.awaited.store(!waiters.is_empty(), Ordering::Relaxed);
    }
}

const LOG: usize = 256;

#[derive(Default)]
struct Log {
    /// Generation of the newest entry.
    newest: u64,
    entries: VecDeque<Invalidation>,
}

#[repr(align(128))]
struct Generation(AtomicU64);

/// The SMMU's side: the generation, the log and the list of ports.
pub struct SyncLog {
    generation: Generation,
    log: Mutex<Log>,
    ports: Mutex<Vec<Weak<InFlight>>>,
    asymmetric: bool,
}

impl Default for SyncLog {
    fn default() -> Self {
        Self::new()
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SyncLog {
    /// An empty log.
    pub fn new() -> Self {
        Self {
            generation: Generation(AtomicU64::new(0)),
            log: Mutex::default(),
            ports: Mutex::default(),
            asymmetric: asymmetric_barrier_available(),
        }
    }

    /// True if ports need no fence of their own.
    pub fn asymmetric(&self) -> bool {
        self.asymmetric
    }

    /// The newest generation.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.0.load(Ordering::Acquire)
    }

    /// Publishes an invalidation. It is complete once a later [`begin_sync`](SyncLog::begin_sync) has finished.
    pub fn publish(&self, what: Invalidation) {
        let mut log = lock(&self.log);
        if log.entries.len() == LOG {
            log.entries.pop_front();
        }
        log.entries.push_back(what);
        log.newest += 1;
        self.generation.0.store(log.newest, Ordering::Release);
    }

    /// Gives the entries after generation `seen` to `apply` in order and returns the generation reached; `None` is
    /// given to `apply` first if some are no longer there, and then everything must be forgotten.
    pub fn catch_up(&self, seen: u64, mut apply: impl FnMut(Option<Invalidation>)) -> u64 {
        let log = lock(&self.log);
        let held = log.entries.len();
        match usize::try_from(log.newest.saturating_sub(seen)) {
            Ok(missed) if missed <= held => {
                log.entries.iter().skip(held - missed).for_each(|&e| apply(Some(e)))
            }
            _ => apply(None),
        }
        log.newest
    }

    /// Adds a port.
    pub fn register(&self) -> Arc<InFlight> {
        let port = Arc::new(InFlight::default());
        let mut ports = lock(&self.ports);
        ports.retain(|p| p.strong_count() > 0);
        // The last accesses of a port that is gone happen before any synchronisation that does not see it any more.
        fence(Ordering::Acquire);
        ports.push(Arc::downgrade(&port));
        port
    }

    /// Starts to wait for all accesses that may use what was invalidated before this call.
    pub fn begin_sync(&self) -> SyncToken {
        let ports: Vec<Arc<InFlight>> = lock(&self.ports).iter().filter_map(Weak::upgrade).collect();
        if ports.is_empty() {
            // As in `register`.
            fence(Ordering::SeqCst);
            return SyncToken::default();
        }
        heavy_barrier(self.asymmetric);
        let waiting = ports
            .into_iter()
            .filter_map(|p| {
                let mark = p.mark.load(Ordering::Acquire);
                (mark & 1 != 0).then_some((p, mark))
            })
            .collect();
        SyncToken { waiting }
    }
}

/// A synchronisation under way.
#[derive(Clone, Debug, Default)]
pub struct SyncToken {
    waiting: Vec<(Arc<InFlight>, u64)>,
}

impl SyncToken {
    /// True once every access that was running when the synchronisation began has ended. Never blocks.
    pub fn poll(&mut self) -> bool {
        self.waiting.retain(|(p, mark)| p.mark.load(Ordering::Acquire) == *mark);
        self.waiting.is_empty()
    }

    /// True if nothing was left at the last [`poll`](SyncToken::poll).
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Gives the caller's core away until one of the accesses that are waited for has ended, but at most for `limit`. For accesses
    /// of threads that do not run: those of threads that do have ended before this begins.
    ///
    /// A port that leaves its access looks whether somebody waits, but without a barrier. If it looks just before its leaving
    /// becomes visible it may miss the caller, who then waits for `limit`. It may also return early.
    pub fn pause(&self, limit: Duration) {
        if self.waiting.is_empty() {
            return;
        }
        let me = thread::current();
        self.waiting.iter().for_each(|(port, _)| port.awaited_by(me.clone()));
        fence(Ordering::SeqCst);
        if self.waiting.iter().all(|(port, mark)| port.mark.load(Ordering::Acquire) == *mark) {
            thread::park_timeout(limit);
        }
        self.waiting.iter().for_each(|(port, _)| port.no_longer_awaited_by(&me));
    }

    /// Adds what a later synchronisation waits for. One entry per port is enough: a port that has left its newer
    /// access has left the older one too, so however often software asks, a token holds no more than there are ports.
    pub fn merge(&mut self, other: SyncToken) {
        for (port, mark) in other.waiting {
            match self.waiting.iter_mut().find(|(p, _)| Arc::ptr_eq(p, &port)) {
                Some((_, m)) => *m = mark.max(*m),
                None => self.waiting.push((port, mark)),
            }
        }
    }
}

/// The port's side of the barrier: orders its mark before its look at the generation.
#[inline(always)]
pub(crate) fn light_barrier(asymmetric: bool) {
    if asymmetric { compiler_fence(Ordering::SeqCst) } else { fence(Ordering::SeqCst) }
}

fn heavy_barrier(asymmetric: bool) {
    fence(Ordering::SeqCst);
    if asymmetric {
        barrier_on_all_cores();
    }
}

#[cfg(target_os = "linux")]
mod os {
    use rustix::thread::{MembarrierCommand, MembarrierQuery, membarrier, membarrier_query};

    pub fn register() -> bool {
        membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED)
            && membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
            && membarrier(MembarrierCommand::PrivateExpedited).is_ok()
    }

    pub fn barrier() -> bool {
        membarrier(MembarrierCommand::PrivateExpedited).is_ok()
    }
}

#[cfg(not(target_os = "linux"))]
mod os {
    pub fn register() -> bool {
        false
    }
    pub fn barrier() -> bool {
        false
    }
}

fn asymmetric_barrier_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(os::register)
}

fn barrier_on_all_cores() {
    // Registration succeeded, so by the kernel's contract this does not fail; if it ever did, waiting is the safe
    // way out: every core passes a context switch in far less.
    if !os::barrier() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_falls_behind_is_told_to_forget_everything() {
        let log = SyncLog::new();
        for _ in 0..LOG + 1 {
            log.publish(Invalidation::Config);
        }
        let mut told = Vec::new();
        let now = log.catch_up(0, |e| told.push(e));
        assert_eq!((now, told.len(), told[0]), (LOG as u64 + 1, 1, None));
        told.clear();
        log.catch_up(now - 2, |e| told.push(e));
        assert_eq!(told, [Some(Invalidation::Config); 2]);
    }

    #[test]
    fn a_sync_waits_for_the_access_that_runs_and_not_for_later_ones() {
        let log = SyncLog::new();
        let port = log.register();
        port.set(1, Ordering::Relaxed);
        let mut sync = log.begin_sync();
        assert!(!sync.poll());
        port.set(2, Ordering::Release);
        port.set(3, Ordering::Relaxed);
        assert!(sync.poll(), "the access that was running has ended; the next one is not waited for");
        drop(port);
        assert!(log.begin_sync().poll());
    }

    #[test]
    fn a_pause_ends_with_the_access_that_is_waited_for() {
        let log = SyncLog::new();
        let port = log.register();
        port.set(1, Ordering::Relaxed);
        let mut sync = log.begin_sync();
        let begin = std::time::Instant::now();
        thread::scope(|scope| {
            let port = &port;
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(20));
                port.leave(2);
            });
            // Rarely, the port does not see who waits.
            while !sync.poll() {
                sync.pause(Duration::from_secs(60));
            }
        });
        assert!(begin.elapsed() < Duration::from_secs(50), "woken, and not by the clock");
        assert!(!port.awaited.load(Ordering::Relaxed));
        assert!(lock(&port.waiters).is_empty());
        sync.pause(Duration::ZERO);
    }

    #[test]
    fn a_pause_gives_up_and_leaves_nothing_behind() {
        let log = SyncLog::new();
        let port = log.register();
        port.set(1, Ordering::Relaxed);
        let sync = log.begin_sync();
        sync.pause(Duration::from_millis(1));
        assert!(lock(&port.waiters).is_empty());
        assert!(!port.awaited.load(Ordering::Relaxed));
        // Over before the pause begins.
        port.leave(2);
        sync.pause(Duration::from_secs(60));
        // Nothing to wait for.
        SyncToken::default().pause(Duration::from_secs(60));
    }

    #[test]
    fn a_token_stays_small_however_often_software_synchronises() {
        let log = SyncLog::new();
        let ports = [log.register(), log.register()];
        let mut token = SyncToken::default();
        for round in 0..1000 {
            ports.iter().for_each(|p| p.set(2 * round + 1, Ordering::Relaxed));
            token.merge(log.begin_sync());
        }
        assert_eq!(token.waiting.len(), 2);
        ports[0].set(2000, Ordering::Release);
        assert!(!token.poll(), "the second port is still inside");
        ports[1].set(2000, Ordering::Release);
        assert!(token.poll());
    }
}
