//! Our own terminal as the guest's keyboard.
//!
//! QEMU never sees the terminal: it would make it non-blocking for every program that shares it, us included. We put
//! it into raw mode, carry what is typed to QEMU, and restore it at the end.

use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

use super::console::ConsoleInput;
use super::process::{Deadline, wait_any};

/// How long a guest may take to accept what was typed before it is dropped.
const PATIENCE: Duration = Duration::from_secs(1);

/// The running bridge; dropping it stops it and restores the terminal.
#[derive(Debug)]
pub(super) struct Keyboard {
    /// Closing this end tells the thread to stop.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    _raw: Option<Raw>,
}

/// A terminal in raw mode.
#[derive(Debug)]
struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// `None` where `fd` is no terminal.
    fn enter(fd: impl AsFd) -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(&fd) else { return Ok(None) };
        let terminal = fd.as_fd().try_clone_to_owned()?;
        let mut raw = before.clone();
        raw.make_raw();
        // Keep the translation of line ends: we print to the same terminal.
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}

impl Keyboard {
    /// Carries what comes from our stdin to `input`.
    pub(super) fn start(input: ConsoleInput) -> io::Result<Self> {
        Self::over(io::stdin().as_fd().try_clone_to_owned()?, input)
    }

    fn over(from: OwnedFd, input: ConsoleInput) -> io::Result<Self> {
        let raw = Raw::enter(&from)?;
        let (stopped, stop) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let thread = std::thread::Builder::new().name("keyboard".into()).spawn(move || {
            let mut file = std::fs::File::from(from);
            let mut buffer = [0; 1024];
            loop {
                let mut polls =
                    [PollFd::new(&file, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
                match wait_any(&mut polls, Deadline::after(Duration::MAX)) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(_) => return,
                }
                let [_, stop] = polls;
                if !stop.revents().is_empty() {
                    return;
                }
                let count = match file.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => return,
                };
                match input.write(buffer.get(..count).unwrap_or_default(), PATIENCE) {
                    Err(error) if error.kind() != io::ErrorKind::TimedOut => return,
                    _ => {}
                }
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread), _raw: raw })
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
