//! A clock that moves only when asked.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::Clock;

/// A clock that starts at 0 and moves by what [`Clock::delay_us`] and [`advance_us`](FakeClock::advance_us) ask.
#[derive(Default)]
pub struct FakeClock {
    now_ns: AtomicU64,
    delays: AtomicU64,
    hook: Option<Box<dyn Fn(u64) + Send + Sync>>,
}

impl FakeClock {
    /// A clock at 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// A clock that calls `hook(now_ns)` after every delay: the moment when the test's device works.
    pub fn with_hook(hook: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { hook: Some(Box::new(hook)), ..Self::default() }
    }

    /// Lets time pass without anybody waiting.
    pub fn advance_us(&self, us: u64) {
        self.now_ns.fetch_add(us.saturating_mul(1000), Ordering::Relaxed);
    }

    /// How many delays were asked for.
    pub fn delays(&self) -> u64 {
        self.delays.load(Ordering::Relaxed)
    }
}

impl Clock for FakeClock {
    fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }

    fn delay_us(&self, us: u64) {
        self.delays.fetch_add(1, Ordering::Relaxed);
        self.advance_us(us);
        if let Some(hook) = &self.hook {
            hook(self.now_ns());
        }
    }
}
