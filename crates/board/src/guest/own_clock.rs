//! Time for a guest on a thread of its own: while it passes, the guest's own engines work, and no others.

use std::sync::Arc;

use portcullis_bus::Activity;
use portcullis_hal::Clock;
use portcullis_vfio::{Assignment, Passthrough};

use crate::sim::Machine;
use crate::system::System;

/// Steps of an engine for each microsecond at most. A step moves up to a few hundred KiB.
const STEPS: usize = 64;

/// The clock. It reads the board's time and moves it only where it has to wait.
pub struct OwnClock {
    machine: Arc<Machine>,
    passthrough: Passthrough,
    slots: Vec<usize>,
    lines: Vec<u32>,
}

impl OwnClock {
    /// Of a guest that was given these.
    pub fn new(system: &System, assignments: &[Arc<Assignment>]) -> Self {
        let machine = system.machine().clone();
        let mine =
            |name: &str| assignments.iter().any(|a| a.devices().iter().any(|d| d.device().name == name));
        let slots = machine.engines().iter().enumerate().filter(|(_, e)| mine(&e.name)).map(|(i, _)| i);
        let slots: Vec<usize> = slots.collect();
        let lines = slots.iter().filter_map(|i| machine.engines().get(*i));
        let lines = lines.flat_map(|e| e.interrupts.clone()).collect();
        Self { passthrough: system.os().passthrough().clone(), slots, lines, machine }
    }
}

impl Clock for OwnClock {
    fn now_ns(&self) -> u64 {
        self.machine.tracer().now()
    }
    fn delay_us(&self, us: u64) {
        let until = self.now_ns().saturating_add(us.saturating_mul(1000));
        for slot in &self.slots {
            for _ in 0..STEPS {
                match self.machine.step_engine(*slot) {
                    Activity::Busy => {}
                    Activity::Until(at) if at <= until => self.machine.tracer().advance_to(at),
                    _ => break,
                }
            }
        }
        let mut heard = 0;
        for line in self.lines.iter().filter(|line| self.machine.tracer().lines().level(**line)) {
            heard += self.passthrough.interrupt(*line);
        }
        if heard == 0 {
            self.machine.tracer().advance_to(until);
        }
    }
}
