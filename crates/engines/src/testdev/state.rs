//! Saving and restoring a test device.

use serde::{Deserialize, Serialize};

use super::transfer::Transfer;
use super::{MAX_TIMERS, TestDev, Timer, Values};
use crate::RestoreError;

const VERSION: u32 = 1;

/// Everything about a [`TestDev`] that changes at run time, a transfer under way included. What it was built with is not
/// part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestDevState {
    version: u32,
    values: Values,
    bus_master: bool,
    timers: Vec<Timer>,
    transfer: Option<Transfer>,
    lost_messages: u64,
}

impl TestDev {
    /// The state now.
    pub fn save(&self) -> TestDevState {
        let Self {
            config: _,
            port: _,
            irq: _,
            messages: _,
            values,
            bus_master,
            timers,
            transfer,
            lost_messages,
        } = self;
        TestDevState {
            version: VERSION,
            values: values.clone(),
            bus_master: *bus_master,
            timers: timers.clone(),
            transfer: transfer.clone(),
            lost_messages: *lost_messages,
        }
    }

    /// Continues from a saved state. On an error nothing changes.
    pub fn restore(&mut self, state: TestDevState) -> Result<(), RestoreError> {
        let TestDevState { version, values, bus_master, timers, transfer, lost_messages } = state;
        if version != VERSION {
            return Err(RestoreError::Version { found: version, expected: VERSION });
        }
        if timers.len() > MAX_TIMERS {
            return Err(RestoreError::Impossible("more timers than the device has"));
        }
        if transfer.as_ref().is_some_and(|t| !t.is_possible(self.config.max_bytes as u64)) {
            return Err(RestoreError::Impossible("a transfer whose parts do not fit together"));
        }
        self.values = values;
        self.bus_master = bus_master;
        self.timers = timers;
        self.transfer = transfer;
        self.lost_messages = lost_messages;
        self.drive_irq();
        Ok(())
    }
}
