//! Interrupts: one small object-safe trait for wired lines and messages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::Pa;

/// Where interrupts go: an interrupt controller, an eventfd, a test.
pub trait InterruptSink: Send + Sync {
    /// Drives the wired line `line` to a level. Called on changes only.
    fn set_level(&self, line: u32, high: bool);

    /// A message-signalled interrupt: a 32-bit write of `data` to `address` by a device.
    fn message(&self, _address: Pa, _data: u32) {}
}

/// One wired output of a device. Remembers the level, so that the sink hears of changes only.
pub struct IrqLine {
    wire: Option<(Arc<dyn InterruptSink>, u32)>,
    level: AtomicBool,
}

impl IrqLine {
    /// A line wired to input `line` of `sink`, low at first.
    pub fn new(sink: Arc<dyn InterruptSink>, line: u32) -> Self {
        Self { wire: Some((sink, line)), level: AtomicBool::new(false) }
    }
    /// A line that goes nowhere.
    pub fn unconnected() -> Self {
        Self { wire: None, level: AtomicBool::new(false) }
    }
    /// Drives the line.
    pub fn set(&self, high: bool) {
        if self.level.swap(high, Ordering::AcqRel) != high
            && let Some((sink, line)) = &self.wire
        {
            sink.set_level(*line, high);
        }
    }
    /// A pulse, for edge-triggered inputs: high and low again.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
    /// The level now.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Acquire)
    }
}

/// A sink that remembers the level of each line: for tests and simple boards. Several outputs may share a line, which
/// is high while one of them is.
#[derive(Default)]
pub struct IrqLevels {
    lines: std::sync::Mutex<std::collections::BTreeMap<u32, Line>>,
}

#[derive(Clone, Copy, Default)]
struct Line {
    /// Outputs that drive it high.
    high: u32,
    rises: u64,
}

impl IrqLevels {
    /// The level of `line` now (false if it never moved).
    pub fn level(&self, line: u32) -> bool {
        self.lock().get(&line).is_some_and(|l| l.high > 0)
    }
    /// How often `line` has risen.
    pub fn rises(&self, line: u32) -> u64 {
        self.lock().get(&line).map_or(0, |l| l.rises)
    }
    /// The lines that are high now, ascending.
    pub fn pending(&self) -> Vec<u32> {
        self.lock().iter().filter(|(_, l)| l.high > 0).map(|(n, _)| *n).collect()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<u32, Line>> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl IrqLevels {
    /// One output of a line changes; true if the line does.
    pub fn drive(&self, line: u32, high: bool) -> bool {
        let mut lines = self.lock();
        let l = lines.entry(line).or_default();
        let before = l.high > 0;
        l.high = if high { l.high.saturating_add(1) } else { l.high.saturating_sub(1) };
        let changed = before != (l.high > 0);
        l.rises += u64::from(changed && high);
        changed
    }
}

impl InterruptSink for IrqLevels {
    fn set_level(&self, line: u32, high: bool) {
        self.drive(line, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_line_is_high_while_one_output_is() {
        let sink = Arc::new(IrqLevels::default());
        let (a, b) = (IrqLine::new(sink.clone(), 5), IrqLine::new(sink.clone(), 5));
        a.set(true);
        b.set(true);
        a.set(true);
        a.set(false);
        assert!(sink.level(5));
        assert_eq!((sink.pending(), sink.rises(5)), (vec![5], 1));
        b.set(false);
        assert!(!sink.level(5));
        assert_eq!(sink.pending(), []);
    }
}
