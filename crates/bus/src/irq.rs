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
    /// The level now.
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Acquire)
    }
}

/// A sink that remembers the level of each line: for tests and simple boards.
#[derive(Default)]
pub struct IrqLevels {
    lines: std::sync::Mutex<std::collections::BTreeMap<u32, (bool, u64)>>,
}

impl IrqLevels {
    /// The level of `line` now (false if it never moved).
    pub fn level(&self, line: u32) -> bool {
        self.lock().get(&line).is_some_and(|l| l.0)
    }
    /// How often `line` has risen.
    pub fn rises(&self, line: u32) -> u64 {
        self.lock().get(&line).map_or(0, |l| l.1)
    }
    /// The lines that are high now, ascending.
    pub fn pending(&self) -> Vec<u32> {
        self.lock().iter().filter(|(_, l)| l.0).map(|(n, _)| *n).collect()
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<u32, (bool, u64)>> {
        self.lines.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl InterruptSink for IrqLevels {
    fn set_level(&self, line: u32, high: bool) {
        let mut lines = self.lock();
        let l = lines.entry(line).or_default();
        if high && !l.0 {
            l.1 += 1;
        }
        l.0 = high;
    }
}
