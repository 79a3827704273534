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
                let mut polls = [PollFd::new(&file, PollFlags::IN), PollFd::new(&stopped, PollFlags::IN)];
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixStream;
    use std::process::{Child, ChildStdout, Command, Stdio};

    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    use super::*;

    /// A program that gives back what is typed to it.
    fn echo() -> (Child, ConsoleInput, BufReader<ChildStdout>) {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = ConsoleInput::new(child.stdin.take().unwrap()).unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        (child, input, output)
    }

    #[test]
    fn a_terminal_is_raw_while_it_is_the_guests_and_as_before_afterwards() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal = rustix::fs::open(
            &name,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        let before = tcgetattr(&terminal).unwrap();
        assert!(before.local_modes.contains(cooked));

        let (mut child, input, mut output) = echo();
        let keyboard = Keyboard::over(terminal.try_clone().unwrap(), input).unwrap();
        let during = tcgetattr(&terminal).unwrap();
        assert!(!during.local_modes.intersects(cooked));
        assert_eq!(during.output_modes & OutputModes::OPOST, before.output_modes & OutputModes::OPOST);
        // A Ctrl-C is a byte for the guest, not a signal for us.
        std::fs::File::from(master.try_clone().unwrap()).write_all(b"a\x03b\n").unwrap();
        let mut line = Vec::new();
        output.read_until(b'\n', &mut line).unwrap();
        assert_eq!(line, b"a\x03b\n");

        drop(keyboard);
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.input_modes, before.input_modes);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_is_no_terminal_is_carried_too_and_does_not_hold_the_end() {
        let (mut typing, stdin) = UnixStream::pair().unwrap();
        let (mut child, input, mut output) = echo();
        let keyboard = Keyboard::over(stdin.into(), input).unwrap();
        typing.write_all(b"uname\n").unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "uname\n");
        drop(keyboard);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
