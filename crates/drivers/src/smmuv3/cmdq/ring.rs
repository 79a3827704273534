//! Who may write which slot of the command queue, and when the hardware hears of it. No memory, no registers.
//!
//! A slot is named by its *position*: a 64-bit count that never wraps. The index registers hold its low bits. Three
//! positions cut the ring, `consumed <= published <= reserved <= consumed + len`:
//!
//! 1. [`reserve`](Ring::reserve) hands out slots by compare-and-swap on `reserved`. `consumed` only grows, so an old
//!    value of it is merely too careful, and the two need not be read as one.
//! 2. The submitter writes its slots and says so by [`fill`](Ring::fill): one bit per slot, which means "filled" as
//!    1 in even laps and as 0 in odd ones and so never needs clearing.
//! 3. [`publish`](Ring::publish) moves `published`, and the PROD register, over all filled slots. Whoever calls
//!    while another thread is at it only leaves a mark for that thread: nobody waits for a submitter that was
//!    interrupted between 1 and 2, except the commands behind its own.
//! 4. [`refresh`](Ring::refresh) reads the CONS register. Its bits are extended by a `consumed` that was read
//!    *before*; a thread that slept for laps in between computes a position that is too small, never one too large.
//!    So the queue cannot wrap under a waiter, and nobody has to hold it back.

use alloc::boxed::Box;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use super::atomics::{Atomic64, Atomics};

/// Bits in a word of the fill map.
const WORD: u64 = 64;

/// What [`Ring::refresh`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Progress {
    /// The hardware has consumed everything before this position.
    pub hardware: u64,
    /// The register value is possible. If not (hardware that is gone reads as ones), nothing was learnt.
    pub plausible: bool,
}

/// What a slot whose command was consumed holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// A command without a message.
    Command,
    /// A CMD_SYNC whose message has not come.
    Pending,
    /// A CMD_SYNC that has sent its message, or sends none. Those before it have sent theirs.
    Complete,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ring<A: Atomics> {
    log2: u32,
    reserved: A::U64,
    consumed: A::U64,
    published: A::U64,
    /// Calls of `publish` that the publishing thread has not answered.
    requests: A::U64,
    filled: Box<[A::U64]>,
}

impl<A: Atomics> Ring<A> {
    /// A ring of `2^log2` slots (at most 2^19, which is what the registers can count).
    pub fn new(log2: u32) -> Self {
        let words = (1u64 << log2).div_ceil(WORD);
        let word = |_| A::U64::new(0);
        Self {
            log2,
            reserved: word(0),
            consumed: word(0),
            published: word(0),
            requests: word(0),
            filled: (0..words).map(word).collect(),
        }
    }

    /// Slots.
    pub fn len(&self) -> u64 {
        1 << self.log2
    }

    /// The slot of a position.
    pub fn slot(&self, position: u64) -> u64 {
        position & (self.len() - 1)
    }

    /// A position as PROD and CONS hold it: index and wrap bit.
    pub fn index(&self, position: u64) -> u32 {
        (position & (2 * self.len() - 1)) as u32
    }

    /// Everything before this position is covered by PROD.
    pub fn published(&self) -> u64 {
        self.published.load(Acquire)
    }

    /// Slots up to here may be in use again. Also: everything before it was consumed.
    pub fn consumed(&self) -> u64 {
        self.consumed.load(Acquire)
    }

    /// Takes `count` slots, or none if there seems to be no room. [`refresh`](Ring::refresh) may find some.
    pub fn reserve(&self, count: u64) -> Option<u64> {
        let mut from = self.reserved.load(Relaxed);
        loop {
            let to = from + count;
            // `from` may be so old that it is below `consumed`; then the exchange fails.
            if to.saturating_sub(self.consumed.load(Acquire)) > self.len() {
                return None;
            }
            match self.reserved.compare_exchange(from, to, Relaxed, Relaxed) {
                Ok(_) => return Some(from),
                Err(now) => from = now,
            }
        }
    }

    /// Declares reserved slots as written. The caller's stores, and whatever makes them visible to the hardware, come
    /// before.
    pub fn fill(&self, from: u64, count: u64) {
        let (mut at, end) = (from, from + count);
        while at < end {
            let slot = self.slot(at);
            let bits = (end - at).min(WORD - slot % WORD).min(self.len() - slot);
            let mask = (u64::MAX >> (WORD - bits)) << (slot % WORD);
            if let Some(word) = self.filled.get((slot / WORD) as usize) {
                word.fetch_xor(mask, Release);
            }
            at += bits;
        }
    }

    /// The end of the filled slots from a position on.
    fn filled_until(&self, from: u64) -> u64 {
        let mut at = from;
        loop {
            let slot = self.slot(at);
            let bits = (WORD - slot % WORD).min(self.len() - slot);
            let Some(word) = self.filled.get((slot / WORD) as usize) else { return at };
            let odd_lap = at >> self.log2 & 1 != 0;
            let word = word.load(Acquire) ^ if odd_lap { u64::MAX } else { 0 };
            let run = u64::from((word >> (slot % WORD)).trailing_ones()).min(bits);
            at += run;
            if run < bits {
                return at;
            }
        }
    }

    /// Makes all filled slots known to the hardware, if only by telling the thread that is doing so already.
    /// `write_prod` gets values for PROD in order, never from two threads at once.
    pub fn publish(&self, mut write_prod: impl FnMut(u32)) {
        if self.requests.fetch_add(1, AcqRel) != 0 {
            return;
        }
        let mut seen = 1;
        loop {
            let from = self.published.load(Relaxed);
            let to = self.filled_until(from);
            if to != from {
                // Before the register, so that no CONS is ever seen above it.
                self.published.store(to, Release);
                write_prod(self.index(to));
            }
            // A slot filled before its request was counted has been looked at; a later request means another look.
            match self.requests.compare_exchange(seen, 0, AcqRel, Acquire) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Reads CONS by `read_cons` and frees what is consumed. `pinned(from, to)` gives the first consumed position in
    /// `[from, to)` whose slot must not be written yet, or `to`.
    pub fn refresh(
        &self,
        mut read_cons: impl FnMut() -> u32,
        mut pinned: impl FnMut(u64, u64) -> u64,
    ) -> Progress {
        let mask = 2 * self.len() - 1;
        let mut base = self.consumed.load(Acquire);
        loop {
            let hardware = base + (u64::from(read_cons()).wrapping_sub(base) & mask);
            let plausible = hardware <= self.published.load(Acquire);
            let free = if plausible { pinned(base, hardware).min(hardware) } else { base };
            // An exchange, if only to learn how far others are by now.
            let seen = self.consumed.fetch_max(free, AcqRel);
            if seen.saturating_sub(base) < self.len() {
                let hardware = if plausible { hardware.max(seen) } else { seen };
                return Progress { hardware, plausible };
            }
            // The queue has turned in between, perhaps so far that the register has been misread. Others got on.
            base = seen;
        }
    }

    /// For [`refresh`](Ring::refresh): the last consumed CMD_SYNC of `[from, to)` if its message is still to come, else
    /// `to`. A slot that is in use again while this looks was free before, and so was everything in front of it.
    pub fn pinned(from: u64, to: u64, look: impl Fn(u64) -> Left) -> u64 {
        for position in (from..to).rev() {
            match look(position) {
                Left::Command => {}
                Left::Pending => return position,
                Left::Complete => return to,
            }
        }
        to
    }

    /// Takes everything that PROD covers as consumed: after the hardware was reset. No other thread may be inside.
    pub fn restart(&self) -> u32 {
        let published = self.published.load(Acquire);
        self.consumed.fetch_max(published, AcqRel);
        self.index(published)
    }
}
