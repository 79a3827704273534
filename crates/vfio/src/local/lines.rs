//! A guest's interrupt lines: a small level-sensitive controller.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;

use crate::{EndOfInterrupt, VmError};

struct Line {
    eoi: Arc<dyn EndOfInterrupt>,
    high: bool,
    masked: bool,
    /// Taken and not yet ended: not delivered again before that.
    active: bool,
}

#[derive(Default)]
struct State {
    lines: BTreeMap<u32, Line>,
    dead: bool,
}

/// The lines. Clones are handles to the same ones.
#[derive(Clone)]
pub struct GuestLines {
    vm: String,
    count: u32,
    state: Arc<Mutex<State>>,
}

impl GuestLines {
    pub(super) fn new(vm: &str, count: u32) -> Self {
        Self { vm: vm.to_string(), count, state: Arc::default() }
    }

    pub(super) fn connect(&self, wanted: Option<u32>, eoi: Arc<dyn EndOfInterrupt>) -> Result<u32, VmError> {
        let mut state = self.state.lock();
        if state.dead {
            return Err(VmError::Dead { vm: self.vm.clone() });
        }
        let free = |line: &u32| *line < self.count && !state.lines.contains_key(line);
        let found = match wanted {
            Some(line) => Some(line).filter(|line| free(line)),
            None => (0..self.count).find(|line| free(line)),
        };
        let line = found.ok_or_else(|| VmError::NoLine { vm: self.vm.clone(), wanted })?;
        state.lines.insert(line, Line { eoi, high: false, masked: false, active: false });
        Ok(line)
    }

    pub(super) fn disconnect(&self, line: u32) {
        let old = self.state.lock().lines.remove(&line);
        drop(old);
    }

    pub(super) fn set(&self, line: u32, high: bool) {
        if let Some(line) = self.state.lock().lines.get_mut(&line) {
            line.high = high;
        }
    }

    pub(super) fn kill(&self) {
        self.state.lock().dead = true;
    }

    /// The guest masks or unmasks a line at its controller.
    pub fn mask(&self, line: u32, masked: bool) {
        if let Some(line) = self.state.lock().lines.get_mut(&line) {
            line.masked = masked;
        }
    }

    /// The lines that interrupt the guest now, lowest first. Each is delivered once until [`end`](Self::end).
    pub fn take(&self) -> Vec<u32> {
        let mut state = self.state.lock();
        if state.dead {
            return Vec::new();
        }
        let mut taken = Vec::new();
        for (number, line) in &mut state.lines {
            if line.high && !line.masked && !line.active {
                line.active = true;
                taken.push(*number);
            }
        }
        taken
    }

    /// The guest is done with an interrupt that it took: whoever drives the line hears of it, and raises it again if there
    /// is cause.
    pub fn end(&self, line: u32) {
        let eoi = {
            let mut state = self.state.lock();
            if state.dead {
                return;
            }
            let Some(found) = state.lines.get_mut(&line).filter(|found| found.active) else { return };
            found.active = false;
            found.eoi.clone()
        };
        eoi.ended(line);
    }

    /// The lines that are high, masked or not.
    pub fn high(&self) -> Vec<u32> {
        let state = self.state.lock();
        state.lines.iter().filter(|(_, line)| line.high).map(|(number, _)| *number).collect()
    }
}

impl fmt::Debug for GuestLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestLines").field("high", &self.high()).finish()
    }
}
