//! Steering a running QEMU: stop, go on, reset, quit, and placing the register window.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use portcullis_arch::Pa;
use serde_json::json;

use super::lines::{LineError, Lines, MAX_LINE};
use super::process::Deadline;
use super::qmp::{Qmp, QmpEvent, Reason, RunState};
use super::qtest::Qtest;
use super::run_dir::{RunDir, RunDirError};

/// How long QEMU may take for one command. A read of configuration space goes through our own server.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest piece of foreign text in an error message.
const SHOWN: usize = 200;

/// A command to QEMU that failed.
#[derive(Debug)]
pub struct ControlError {
    channel: &'static str,
    command: String,
    failure: Failure,
}

/// What went wrong with a command.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nobody listens.
    NobodyThere { path: PathBuf, source: Option<io::Error> },
    /// No answer in time.
    Late(Duration),
    /// QEMU closed the connection.
    Closed,
    /// A line without end.
    TooLong,
    /// The system's word.
    Io(io::Error),
    /// QEMU says no.
    Refused(String),
    /// Not an answer at all.
    Garbage(String),
    /// The connection was given up before.
    Lost,
    /// What is at the window's place is not what it should be.
    Window(String),
}

impl Failure {
    pub(super) fn line(error: LineError, timeout: Duration) -> Self {
        match error {
            LineError::Late => Self::Late(timeout),
            LineError::Closed => Self::Closed,
            LineError::TooLong => Self::TooLong,
            LineError::Io(error) => Self::Io(error),
        }
    }
}

impl ControlError {
    pub(super) fn new(channel: &'static str, command: &str, failure: Failure) -> Self {
        Self { channel, command: command.to_owned(), failure }
    }

    pub(super) fn failure(&self) -> &Failure {
        &self.failure
    }

    /// Whether QEMU is gone, rather than wrong or slow.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(self.failure, Failure::Closed | Failure::Lost | Failure::NobodyThere { .. })
    }
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QEMU, {}, {}: ", self.channel, self.command)?;
        match &self.failure {
            Failure::NobodyThere { path, source: None } => write!(f, "nobody listens on {}", path.display()),
            Failure::NobodyThere { path, source: Some(error) } => write!(f, "{}: {error}", path.display()),
            Failure::Late(timeout) => write!(f, "no answer within {} s", timeout.as_secs_f32()),
            Failure::Closed => write!(f, "the connection was closed"),
            Failure::TooLong => write!(f, "a line of more than {MAX_LINE} bytes came back"),
            Failure::Io(error) => write!(f, "{error}"),
            Failure::Refused(text) => write!(f, "refused: {}", Shown(text)),
            Failure::Garbage(text) => write!(f, "an answer that makes no sense came back: {}", Shown(text)),
            Failure::Lost => write!(f, "not sent, an earlier command got no proper answer"),
            Failure::Window(text) => write!(f, "{text}"),
        }
    }
}

impl std::error::Error for ControlError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.failure {
            Failure::Io(error) | Failure::NobodyThere { source: Some(error), .. } => Some(error),
            _ => None,
        }
    }
}

/// Foreign text, cut to a bearable length and without control characters.
struct Shown<'a>(&'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars().take(SHOWN) {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        if self.0.chars().nth(SHOWN).is_some() { write!(f, "...") } else { Ok(()) }
    }
}

pub(super) fn connect(
    channel: &'static str,
    path: &Path,
    deadline: Deadline,
    give_up: &mut dyn FnMut() -> bool,
) -> Result<Lines, ControlError> {
    let nobody = |source| {
        ControlError::new(channel, "connecting", Failure::NobodyThere { path: path.to_owned(), source })
    };
    Lines::connect(path, deadline, give_up).map_err(|error| nobody(Some(error)))?.ok_or_else(|| nobody(None))
}

/// Where QEMU listens for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSockets {
    /// The qtest socket.
    pub qtest: PathBuf,
    /// The QMP socket.
    pub qmp: PathBuf,
}

impl ControlSockets {
    /// The two sockets in a run's directory.
    ///
    /// # Errors
    /// [`RunDirError::TooLong`].
    pub fn in_dir(dir: &RunDir) -> Result<Self, RunDirError> {
        Ok(Self { qtest: dir.socket("qtest.sock")?, qmp: dir.socket("qmp.sock")? })
    }

    /// Connects to a QEMU, waiting at most `timeout` until it listens and has built its devices. It builds its devices
    /// only while somebody serves their vfio-user sockets. Works from any thread.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn connect(&self, timeout: Duration) -> Result<Control, ControlError> {
        self.connect_unless(timeout, &mut || false)
    }

    pub(super) fn connect_unless(
        &self,
        timeout: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Control, ControlError> {
        let deadline = Deadline::after(timeout);
        let qmp = Qmp::connect(&self.qmp, deadline, COMMAND_TIMEOUT, give_up)?;
        let qtest = Qtest::connect(&self.qtest, deadline, COMMAND_TIMEOUT, give_up)?;
        Ok(Control { qtest, qmp })
    }
}

/// A function's window and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Base of the PCIe host bridge's configuration space: the first `reg` of the `pcie` node in QEMU's own device
    /// tree. With `virt`'s defaults 0x40_1000_0000; another value without high memory.
    pub ecam: Pa,
    /// Device number on bus 0.
    pub slot: u8,
    /// Where BAR 0 goes.
    pub bar0: Pa,
}

/// PCI configuration space, type 0 header (PCI Local Bus Specification 3.0, 6.1 and 6.2.5).
const ID: u64 = 0x00;
const COMMAND: u64 = 0x04;
const BAR0: u64 = 0x10;
const BAR1: u64 = 0x14;
/// Memory space enable and bus master enable.
const MEMORY_AND_MASTER: u16 = 0x6;
/// What an absent function reads as, and what our functions show so that nobody else claims them.
const NO_ID: u32 = 0xffff_ffff;

/// A connection to a running QEMU.
#[derive(Debug)]
pub struct Control {
    /// Reads and writes of guest-physical addresses.
    pub qtest: Qtest,
    /// Commands and events.
    pub qmp: Qmp,
}

impl Control {
    /// Programs BAR 0 of a function and lets it decode memory and master the bus, as firmware would.
    ///
    /// The function must show no vendor id: that is how ours hide from the guest's own enumeration, and it keeps this
    /// from moving the BAR of somebody else's device.
    ///
    /// # Errors
    /// [`ControlError`] that says what was read where something else was expected.
    pub fn place_window(&mut self, window: Window) -> Result<(), ControlError> {
        let Window { ecam, slot, bar0 } = window;
        let what = format!("placing the window of slot {slot} at {:#x}", bar0.get());
        let wrong = |text: String| Err(ControlError::new("qtest", &what, Failure::Window(text)));
        // ECAM: bus [27:20], device [19:15], function [14:12] (PCI Express Base Specification, 7.2.2).
        let base = ecam.checked_add(u64::from(slot) << 15).filter(|_| slot < 32);
        let Some(function) = base.filter(|base| base.checked_add(0x1000).is_some()) else {
            return wrong("there is no such slot".into());
        };
        let at = |register: u64| function.wrapping_add(register);

        let id = self.qtest.readl(at(ID))?;
        if id != NO_ID {
            return wrong(format!("the slot holds device {:04x}:{:04x}, not ours", id & 0xffff, id >> 16));
        }
        let kind = self.qtest.readl(at(BAR0))? & 0xf;
        let wide = kind & 0x6 == 0x4;
        if kind & 1 != 0 {
            return wrong("no function of ours is there: BAR 0 is not a memory BAR".into());
        }
        let (low, high) = (bar0.get() as u32, (bar0.get() >> 32) as u32);
        if low & 0xf != 0 || (high != 0 && !wide) {
            return wrong("BAR 0 cannot hold that address".into());
        }
        self.qtest.writel(at(BAR0), low)?;
        let read = self.qtest.readl(at(BAR0))? & !0xf;
        if read != low {
            return wrong(format!(
                "BAR 0 reads back {read:#x}: absent, or the address is not aligned to its size"
            ));
        }
        if wide {
            self.qtest.writel(at(BAR1), high)?;
            let read = self.qtest.readl(at(BAR1))?;
            if read != high {
                return wrong(format!("the upper half of BAR 0 reads back {read:#x}"));
            }
        }
        self.qtest.writew(at(COMMAND), MEMORY_AND_MASTER)?;
        let command = self.qtest.readl(at(COMMAND))? as u16;
        if command & MEMORY_AND_MASTER != MEMORY_AND_MASTER {
            return wrong(format!(
                "the command register reads back {command:#x}, expected {MEMORY_AND_MASTER:#x}"
            ));
        }
        Ok(())
    }

    /// Lets the processors run.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn cont(&mut self) -> Result<(), ControlError> {
        self.qmp.execute("cont", None).map(drop)
    }

    /// Stops the processors.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn stop(&mut self) -> Result<(), ControlError> {
        self.qmp.execute("stop", None).map(drop)
    }

    /// Resets the machine and waits until that is done; a stopped one stays stopped. The BARs are cleared: see
    /// [`Self::restart`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn system_reset(&mut self) -> Result<(), ControlError> {
        // Our QEMU turns every reset into an end (`-action reboot=shutdown`), this one too if it is not told otherwise.
        self.on_reboot("reset")?;
        let done = self.reset_now();
        let back = self.on_reboot("shutdown");
        done.and(back)
    }

    fn on_reboot(&mut self, action: &str) -> Result<(), ControlError> {
        self.qmp.execute("set-action", Some(json!({ "reboot": action }))).map(drop)
    }

    fn reset_now(&mut self) -> Result<(), ControlError> {
        self.qmp.execute("system_reset", None)?;
        // The reset happens in QEMU's main loop, after the answer; its event says that it is done. Other events are
        // for the caller, in their order.
        let deadline = Deadline::after(COMMAND_TIMEOUT);
        let mut others = Vec::new();
        let done = loop {
            match self.qmp.next_event(deadline.remaining()) {
                Ok(Some(QmpEvent::Reset(Reason::HostReset))) => break Ok(()),
                Ok(Some(event)) => others.push(event),
                Ok(None) => {
                    break Err(ControlError::new("QMP", "system_reset", Failure::Late(COMMAND_TIMEOUT)));
                }
                Err(error) => break Err(error),
            }
        };
        for event in others {
            self.qmp.keep(event);
        }
        done
    }

    /// Resets the machine, places the windows and lets it run: the answer to a guest's reboot. The processors are
    /// stopped all the while, so that the guest never runs without its windows.
    ///
    /// # Errors
    /// [`ControlError`]; the machine may be left stopped.
    pub fn restart(&mut self, windows: &[Window]) -> Result<(), ControlError> {
        // Harmless where it is stopped already.
        self.stop()?;
        self.system_reset()?;
        for window in windows {
            self.place_window(*window)?;
        }
        self.cont()
    }

    /// Ends QEMU. A connection that closes before the answer is as good.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn quit(&mut self) -> Result<(), ControlError> {
        match self.qmp.execute("quit", None) {
            Err(error) if !error.is_closed() => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the processors run, and QEMU's word for the state.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn status(&mut self) -> Result<RunState, ControlError> {
        let value = self.qmp.execute("query-status", None)?;
        let running = value.get("running").and_then(serde_json::Value::as_bool);
        let status = value.get("status").and_then(serde_json::Value::as_str);
        match (running, status) {
            (Some(running), Some(status)) => Ok(RunState { running, status: status.to_owned() }),
            _ => Err(ControlError::new("QMP", "query-status", Failure::Garbage(value.to_string()))),
        }
    }

    /// The next event, waiting at most `timeout`; `None` when none came.
    ///
    /// # Errors
    /// [`ControlError`]; [`ControlError::is_closed`] when QEMU is gone.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<QmpEvent>, ControlError> {
        self.qmp.next_event(timeout)
    }
}
