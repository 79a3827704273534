//! Telling a client that something has ended: callbacks that run without locks, a signal to wait for, bounded waits.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

use portcullis_hal::{Clock, Timeout, poll};
use spin::Mutex;

use super::{Completion, Cookie, DmaChannel, State, Status, WaitError};

/// Called once when a transaction has ended; of a cyclic one after every period too, with
/// [`ongoing`](Completion::ongoing). Calls for one transaction neither overlap nor swap places.
pub type Callback = Box<dyn FnMut(&Completion) + Send>;

/// A transaction's callback, shared by all contexts that may have news for it.
///
/// No lock is held while the callback runs. Whoever brings news while it runs (the callback itself, by terminating its
/// channel, or another processor) leaves them to the one who runs it.
#[derive(Clone)]
pub struct Notifier(Arc<Mutex<Slot>>);

struct Slot {
    /// Away while it runs.
    callback: Option<Callback>,
    news: VecDeque<Completion>,
}

impl Notifier {
    /// For a callback.
    pub fn new(callback: Callback) -> Self {
        Self(Arc::new(Mutex::new(Slot { callback: Some(callback), news: VecDeque::new() })))
    }

    /// Tells it. Call without holding locks.
    pub fn notify(&self, completion: Completion) {
        let mut callback = {
            let mut slot = self.0.lock();
            slot.news.push_back(completion);
            let Some(callback) = slot.callback.take() else { return };
            callback
        };
        loop {
            let next = {
                let mut slot = self.0.lock();
                let next = slot.news.pop_front();
                if next.is_none() {
                    slot.callback = Some(callback);
                    return;
                }
                next
            };
            if let Some(completion) = next {
                callback(&completion);
            }
        }
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notifier")
    }
}

/// Runs callbacks in order. Drivers collect the news under their lock and call this after dropping it.
pub fn deliver(news: Vec<(Option<Notifier>, Completion)>) {
    for (notifier, completion) in news {
        if let Some(notifier) = notifier {
            notifier.notify(completion);
        }
    }
}

/// Something that happens, is counted, and can be waited for (Linux `struct completion`).
#[derive(Debug, Default)]
pub struct Signal {
    count: AtomicU32,
}

impl Signal {
    /// Not raised.
    pub const fn new() -> Self {
        Self { count: AtomicU32::new(0) }
    }

    /// Raises it once (`complete`).
    pub fn complete(&self) {
        // Fails only when the count would overflow: then it is raised more than enough.
        let _saturated =
            self.count.fetch_update(Ordering::Release, Ordering::Relaxed, |count| count.checked_add(1));
    }

    /// Forgets what was raised (`reinit_completion`).
    pub fn reinit(&self) {
        self.count.store(0, Ordering::Release);
    }

    /// Takes one raise if there is one (`try_wait_for_completion`).
    pub fn try_wait(&self) -> bool {
        self.count.fetch_update(Ordering::Acquire, Ordering::Relaxed, |count| count.checked_sub(1)).is_ok()
    }

    /// Waits for one raise and takes it (`wait_for_completion_timeout`). Interrupts have to be delivered meanwhile: by
    /// another processor, or by [`Clock::delay_us`].
    pub fn wait(&self, clock: &impl Clock, timeout_us: u64) -> Result<(), Timeout> {
        poll(clock, "completion", timeout_us, || u64::from(self.try_wait()), |taken| taken == 1).map(drop)
    }
}

/// Waits until a transaction is over. It calls the channel's handler as well, so it needs no interrupt line. An ended
/// transaction that did not succeed is an error.
pub fn wait(
    channel: &(impl DmaChannel + ?Sized),
    cookie: Cookie,
    clock: &impl Clock,
    timeout_us: u64,
) -> Result<Status, WaitError> {
    let look = || {
        channel.handle_irq();
        u64::from(channel.status(cookie).is_over())
    };
    let waited = poll(clock, "the end of a DMA transaction", timeout_us, look, |over| over == 1);
    let status = channel.status(cookie);
    match (waited, status.state) {
        (_, State::Complete) => Ok(status),
        (_, State::Failed(error)) => Err(WaitError::Failed { error, transferred: status.transferred }),
        (Err(timeout), _) => Err(WaitError::Timeout { timeout, residue: status.residue }),
        (Ok(_), _) => Err(WaitError::Unknown { cookie }),
    }
}
