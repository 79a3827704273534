//! A device's interrupts as events (`vfio_platform_irq.c`).
//!
//! A level-triggered line is masked at the moment it fires and stays masked until its owner unmasks it: the owner cannot
//! quieten the device before it has run, and the host must not be kept busy by the line meanwhile.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::Interrupt;

/// Who wants to know that an interrupt came. Closures are sinks.
pub trait EventSink: Send + Sync {
    /// It came. Called without a lock.
    fn signal(&self);
}

impl<F: Fn() + Send + Sync> EventSink for F {
    fn signal(&self) {
        self();
    }
}

/// An event that counts, as an eventfd does.
#[derive(Debug, Default)]
pub struct EventCounter(AtomicU64);

impl EventCounter {
    /// A counter at 0.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }
    /// How often it was signalled since the last time.
    pub fn take(&self) -> u64 {
        self.0.swap(0, Ordering::AcqRel)
    }
}

impl EventSink for EventCounter {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }
}

/// One line of an open device.
pub(crate) struct Line {
    pub interrupt: Interrupt,
    sink: Option<Arc<dyn EventSink>>,
    masked: bool,
    /// An edge came while it was masked.
    missed: bool,
}

impl Line {
    pub fn new(interrupt: Interrupt) -> Self {
        Self { interrupt, sink: None, masked: false, missed: false }
    }

    /// Whom to tell; gives the old one, for dropping without a lock.
    pub fn set_sink(&mut self, sink: Option<Arc<dyn EventSink>>) -> Option<Arc<dyn EventSink>> {
        if sink.is_none() {
            (self.masked, self.missed) = (false, false);
        }
        core::mem::replace(&mut self.sink, sink)
    }

    /// The line is high (or had an edge); gives the sink to tell. `None`: masked, or nobody listens.
    pub fn fire(&mut self) -> Option<Arc<dyn EventSink>> {
        let sink = self.sink.clone()?;
        if self.masked {
            self.missed |= !self.interrupt.level;
            return None;
        }
        self.masked = self.interrupt.level;
        Some(sink)
    }

    /// The event without the hardware (`VFIO_IRQ_SET_ACTION_TRIGGER` by its owner).
    pub fn trigger(&self) -> Option<Arc<dyn EventSink>> {
        self.sink.clone()
    }

    pub fn mask(&mut self) {
        self.masked = true;
    }

    /// A line that is still high fires again when the host looks at it next; an edge that was missed fires now.
    pub fn unmask(&mut self) -> Option<Arc<dyn EventSink>> {
        self.masked = false;
        if core::mem::take(&mut self.missed) { self.sink.clone() } else { None }
    }

    pub fn is_masked(&self) -> bool {
        self.masked
    }

    /// Whether the host should look at the line at all.
    pub fn is_enabled(&self) -> bool {
        self.sink.is_some() && !self.masked
    }
}
