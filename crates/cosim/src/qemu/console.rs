//! The guest's serial console: bytes out, bytes in.
//!
//! A thread takes what QEMU writes as it comes, so that QEMU never waits for us. What nobody fetches is kept up to a
//! limit, then the oldest is dropped and counted.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::process::{ChildStdin, ChildStdout};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;

use super::process::{Deadline, wait_one};

/// Bytes kept for a reader that lags: minutes of a kernel's boot messages.
const KEPT: usize = 4 << 20;

/// One look at the console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleRead {
    /// Everything that came since the last look.
    Bytes(Vec<u8>),
    /// Nothing came in time.
    Nothing,
    /// QEMU closed the console, and everything was read.
    Ended,
}

/// What the guest prints. Clones share one stream: each byte goes to one of them.
#[derive(Clone, Debug)]
pub struct ConsoleStream {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    lost: u64,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that hold the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConsoleStream {
    pub(super) fn start(stdout: ChildStdout) -> io::Result<Self> {
        Self::over(stdout, KEPT)
    }

    fn over(mut from: impl Read + Send + 'static, limit: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit });
        let writer = Arc::clone(&shared);
        std::thread::Builder::new().name("guest-console".into()).spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                let mut state = writer.lock();
                state.bytes.extend(buffer.get(..count).unwrap_or_default());
                let over = state.bytes.len().saturating_sub(writer.limit);
                state.bytes.drain(..over);
                state.lost = state.lost.saturating_add(over as u64);
                drop(state);
                writer.changed.notify_all();
            }
            writer.lock().ended = true;
            writer.changed.notify_all();
        })?;
        Ok(Self { shared })
    }

    /// Everything that came since the last look; waits at most `timeout` when there is nothing.
    #[must_use]
    pub fn read(&self, timeout: Duration) -> ConsoleRead {
        let deadline = Deadline::after(timeout);
        let mut state = self.shared.lock();
        loop {
            if !state.bytes.is_empty() {
                return ConsoleRead::Bytes(std::mem::take(&mut state.bytes).into());
            }
            if state.ended {
                return ConsoleRead::Ended;
            }
            let remaining = deadline.remaining();
            if remaining.is_zero() {
                return ConsoleRead::Nothing;
            }
            state =
                self.shared.changed.wait_timeout(state, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Bytes dropped because nobody fetched them in time.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }
}

/// Typing on the guest's console. Clones type on the same one.
#[derive(Clone, Debug)]
pub struct ConsoleInput {
    pipe: Arc<ChildStdin>,
}

impl ConsoleInput {
    pub(super) fn new(pipe: ChildStdin) -> io::Result<Self> {
        // Our end only: a pipe's two ends are two open files.
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Self { pipe: Arc::new(pipe) })
    }

    /// Types `bytes`. A guest that does not read its console takes some thousand bytes and then no more.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when not all was taken in time, [`io::ErrorKind::BrokenPipe`] when QEMU is gone.
    pub fn write(&self, bytes: &[u8], timeout: Duration) -> io::Result<()> {
        let deadline = Deadline::after(timeout);
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::io::write(self.pipe.as_fd(), rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if !wait_one(self.pipe.as_fd(), PollFlags::OUT, deadline)? {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn everything(stream: &ConsoleStream) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match stream.read(LONG) {
                ConsoleRead::Bytes(bytes) => all.extend(bytes),
                ConsoleRead::Ended => return all,
                ConsoleRead::Nothing => panic!("stalled after {} bytes", all.len()),
            }
        }
    }

    #[test]
    fn bytes_come_out_as_they_went_in_and_the_end_is_told() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let stream = ConsoleStream::over(io::Cursor::new(bytes.clone()), KEPT).unwrap();
        assert_eq!(everything(&stream), bytes);
        assert_eq!(stream.read(Duration::ZERO), ConsoleRead::Ended);
        assert_eq!(stream.lost(), 0);
    }

    #[test]
    fn what_nobody_fetches_is_bounded_and_the_newest_stays() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 1000) as u8).collect();
        let stream = ConsoleStream::over(io::Cursor::new(bytes.clone()), 10_000).unwrap();
        while !stream.shared.lock().ended {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(everything(&stream), &bytes[90_000..]);
        assert_eq!(stream.lost(), 90_000);
    }

    #[test]
    fn a_silent_console_gives_nothing_in_time() {
        let (_open, silent) = std::os::unix::net::UnixStream::pair().unwrap();
        let stream = ConsoleStream::over(silent, KEPT).unwrap();
        assert_eq!(stream.read(Duration::from_millis(30)), ConsoleRead::Nothing);
    }

    #[test]
    fn typing_to_a_guest_that_does_not_read_ends_in_time() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::piped()).spawn().unwrap();
        let input = ConsoleInput::new(child.stdin.take().unwrap()).unwrap();
        let error = input.write(&vec![b'x'; 1 << 20], Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        child.kill().unwrap();
        child.wait().unwrap();
        let error = input.write(b"x", LONG).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
