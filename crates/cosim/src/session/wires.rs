//! Interrupts of the machine, as writes to the guest's interrupt controller.
//!
//! There is no wire from here into QEMU, but a device may write to memory, and the registers of the GIC distributor are
//! memory: a shared peripheral interrupt that rises becomes a write to GICD_ISPENDR, a message a write to where it was
//! addressed. An interrupt that was set pending that way is not pending any more once the CPU has taken it. A line that
//! stays high is therefore set pending again from time to time, as a level would be, and one that falls is cleared.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use portcullis_arch::Pa;
use portcullis_bus::InterruptSink;

/// GICD_ISPENDR0 and GICD_ICPENDR0 (IHI 0069, 12.9).
const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
/// The first shared peripheral interrupt.
const FIRST_SPI: u32 = 32;
/// How long a high line is left alone after it was set pending: first, and at most.
const AGAIN: Duration = Duration::from_millis(2);
const AGAIN_AT_MOST: Duration = Duration::from_millis(50);
/// Messages that wait for the peer; more are lost and counted. An SMMU sends none while its last one is not handled.
const MAX_MESSAGES: usize = 4096;

/// A 32-bit write into the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub address: u64,
    /// What.
    pub value: u32,
}

#[derive(Debug, Default)]
struct Line {
    high: bool,
    edge: bool,
    /// To be set pending.
    rose: bool,
    /// Was set pending since it rose, and has fallen.
    fell: bool,
    /// It was set pending then, and this long is it left alone.
    pended: Option<(Instant, Duration)>,
    rises: u64,
}

#[derive(Default)]
struct State {
    lines: BTreeMap<u32, Line>,
    messages: VecDeque<Write>,
    sent: u64,
    lost: u64,
}

/// The interrupt lines of a machine, on their way to a GIC.
pub struct Wires {
    gicd: u64,
    edges: BTreeSet<u32>,
    state: Mutex<State>,
}

/// What went over the wires.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct WireCounts {
    /// How often each shared peripheral interrupt rose.
    pub lines: BTreeMap<u32, u64>,
    /// Messages sent.
    pub messages: u64,
    /// Messages that were lost because the peer took none.
    pub lost: u64,
}

impl Wires {
    /// Wires to the GIC whose distributor is at `gicd`; the interrupts in `edges` are edge triggered.
    pub fn new(gicd: Pa, edges: BTreeSet<u32>) -> Self {
        Self { gicd: gicd.get(), edges, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writes that are due, at most `room`.
    pub fn take(&self, now: Instant, room: usize) -> Vec<Write> {
        let mut state = self.lock();
        let mut writes = Vec::new();
        let messages = state.messages.len().min(room);
        writes.extend(state.messages.drain(..messages));
        state.sent += writes.len() as u64;
        for (&line, l) in &mut state.lines {
            if writes.len() >= room {
                break;
            }
            let late = l.high && !l.edge && l.pended.is_some_and(|(at, wait)| now.duration_since(at) >= wait);
            if l.rose || late {
                let wait = match l.pended {
                    Some((_, wait)) if !l.rose => (wait * 2).min(AGAIN_AT_MOST),
                    _ => AGAIN,
                };
                l.rose = false;
                l.pended = Some((now, wait));
                writes.push(self.bit(ISPENDR, line));
            } else if std::mem::take(&mut l.fell) {
                writes.push(self.bit(ICPENDR, line));
            }
        }
        writes
    }

    /// When [`take`](Self::take) has something to give although nothing happens.
    pub fn next(&self) -> Option<Instant> {
        let state = self.lock();
        let due = |l: &Line| l.pended.filter(|_| l.high && !l.edge).map(|(at, wait)| at + wait);
        state.lines.values().filter_map(due).min()
    }

    /// The guest begins again: nothing is pending.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.messages.clear();
        for l in state.lines.values_mut() {
            *l = Line { edge: l.edge, rises: l.rises, ..Line::default() };
        }
    }

    /// What happened so far.
    pub fn counts(&self) -> WireCounts {
        let state = self.lock();
        let lines = state.lines.iter().filter(|(_, l)| l.rises > 0).map(|(n, l)| (*n, l.rises)).collect();
        WireCounts { lines, messages: state.sent, lost: state.lost }
    }

    fn bit(&self, register: u64, line: u32) -> Write {
        let id = line.saturating_add(FIRST_SPI);
        Write { address: self.gicd.wrapping_add(register + u64::from(id / 32) * 4), value: 1 << (id % 32) }
    }
}

impl InterruptSink for Wires {
    fn set_level(&self, line: u32, high: bool) {
        let edge = self.edges.contains(&line);
        let mut state = self.lock();
        let l = state.lines.entry(line).or_default();
        l.edge = edge;
        l.high = high;
        if high {
            l.rises += 1;
            l.rose = true;
            l.fell = false;
        } else if !edge {
            // What the guest has not been told of it need not forget.
            l.fell = !std::mem::take(&mut l.rose) && l.pended.is_some();
            l.pended = None;
        }
    }

    fn message(&self, address: Pa, data: u32) {
        let mut state = self.lock();
        if state.messages.len() < MAX_MESSAGES {
            state.messages.push_back(Write { address: address.get(), value: data });
        } else {
            state.lost += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wires() -> Wires {
        Wires::new(Pa(0x800_0000), BTreeSet::from([100]))
    }

    #[test]
    fn a_line_becomes_pending_where_the_gic_has_its_bit() {
        let w = wires();
        let now = Instant::now();
        w.set_level(110, true);
        // Interrupt id 142: word 4, bit 14.
        assert_eq!(w.take(now, 8), [Write { address: 0x800_0210, value: 1 << 14 }]);
        assert_eq!(w.take(now, 8), []);
        w.set_level(110, false);
        assert_eq!(w.take(now, 8), [Write { address: 0x800_0290, value: 1 << 14 }]);
        assert_eq!(w.take(now, 8), []);
    }

    #[test]
    fn a_level_that_stays_is_pending_again_and_an_edge_is_not() {
        let w = wires();
        let now = Instant::now();
        w.set_level(110, true);
        w.set_level(100, true);
        w.set_level(100, false);
        assert_eq!(w.take(now, 8).len(), 2);
        assert_eq!(w.next(), Some(now + AGAIN));
        assert_eq!(w.take(now + AGAIN, 8), [Write { address: 0x800_0210, value: 1 << 14 }]);
        assert_eq!(w.take(now + AGAIN * 2, 8), [], "each time twice as late");
        w.set_level(110, false);
        assert_eq!(w.next(), None);
        assert_eq!(w.counts().lines, BTreeMap::from([(100, 1), (110, 1)]));
    }

    #[test]
    fn a_level_that_came_and_went_unseen_is_nothing_and_an_edge_is_kept() {
        let w = wires();
        for line in [100, 110] {
            w.set_level(line, true);
            w.set_level(line, false);
        }
        assert_eq!(w.take(Instant::now(), 8), [Write { address: 0x800_0210, value: 1 << 4 }]);
    }

    #[test]
    fn nothing_is_lost_when_there_is_no_room() {
        let w = wires();
        w.message(Pa(0x808_0040), 5);
        w.set_level(100, true);
        assert_eq!(w.take(Instant::now(), 0), []);
        assert_eq!(w.take(Instant::now(), 1), [Write { address: 0x808_0040, value: 5 }]);
        assert_eq!(w.take(Instant::now(), 1), [Write { address: 0x800_0210, value: 1 << 4 }]);
        for i in 0..MAX_MESSAGES as u32 + 3 {
            w.message(Pa(0x808_0040), i);
        }
        assert_eq!(w.counts().lost, 3);
    }
}
