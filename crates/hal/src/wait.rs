//! Bounded waiting: every wait of a driver goes through [`poll`].

use core::fmt;

use crate::Clock;

/// A wait that ran out: what was waited for, how long, and the value seen last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    /// What was waited for, as "REGISTER.FIELD == value".
    pub what: &'static str,
    /// How long, in microseconds.
    pub waited_us: u64,
    /// The last value of the register.
    pub seen: u64,
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "timed out after {} us waiting for {} (last read {:#x})",
            self.waited_us, self.what, self.seen
        )
    }
}

impl core::error::Error for Timeout {}

/// Reads until `done(value)` or until `timeout_us` have passed: ten reads at once, then with delays that double
/// from 1 us (the pattern of Linux's `arm_smmu_tlb_sync`).
pub fn poll(
    clock: &impl Clock,
    what: &'static str,
    timeout_us: u64,
    mut read: impl FnMut() -> u64,
    done: impl Fn(u64) -> bool,
) -> Result<u64, Timeout> {
    let mut seen = 0;
    for _ in 0..10 {
        seen = read();
        if done(seen) {
            return Ok(seen);
        }
    }
    let start = clock.now_ns();
    let mut delay = 1;
    let mut waited_us = 0;
    while waited_us < timeout_us {
        clock.delay_us(delay);
        seen = read();
        if done(seen) {
            return Ok(seen);
        }
        // A clock that stands still must not make the wait endless, so the delays asked for count as well.
        waited_us = (clock.now_ns().saturating_sub(start) / 1000).max(waited_us + delay);
        delay = (delay * 2).min(timeout_us.max(1));
    }
    Err(Timeout { what, waited_us, seen })
}
