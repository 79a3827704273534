//! What QEMU says on stderr: the last lines and a count.
//!
//! QEMU prints two lines for every access that a dead server leaves unanswered, so a guest can make it print without
//! end. All of it is read, little of it is kept.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::process::Deadline;

/// Lines kept.
const LINES: usize = 50;
/// Bytes kept of a line.
const WIDTH: usize = 1000;

/// The last lines of stderr.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StderrTail {
    /// At most 50 lines of at most 1000 bytes.
    pub lines: Vec<String>,
    /// How many lines there were in all.
    pub total: u64,
}

impl fmt::Display for StderrTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left_out = self.total.saturating_sub(self.lines.len() as u64);
        if left_out > 0 {
            writeln!(f, "({left_out} lines before)")?;
        }
        if self.lines.is_empty() { write!(f, "(nothing)") } else { write!(f, "{}", self.lines.join("\n")) }
    }
}

/// The thread that reads, seen from the others.
#[derive(Clone, Debug)]
pub(super) struct Stderr {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<String>,
    total: u64,
    /// A line whose end has not come.
    partial: Vec<u8>,
    ended: bool,
}

impl State {
    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.end_line();
            } else if self.partial.len() < WIDTH {
                self.partial.push(*byte);
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.partial);
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if self.lines.len() >= LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
        self.total = self.total.saturating_add(1);
    }
}

impl Stderr {
    pub(super) fn start(mut from: impl Read + Send + 'static) -> io::Result<Self> {
        let stderr = Self { shared: Arc::default() };
        let writer = stderr.clone();
        std::thread::Builder::new().name("qemu-stderr".into()).spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => writer.lock().take(buffer.get(..count).unwrap_or_default()),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            let mut state = writer.lock();
            if !state.partial.is_empty() {
                state.end_line();
            }
            state.ended = true;
            writer.shared.1.notify_all();
        })?;
        Ok(stderr)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether QEMU has closed its stderr, which it does when it ends.
    pub(super) fn ended(&self) -> bool {
        self.lock().ended
    }

    pub(super) fn tail(&self) -> StderrTail {
        let state = self.lock();
        StderrTail { lines: state.lines.iter().cloned().collect(), total: state.total }
    }

    /// The tail of a QEMU that has ended; waits a moment for the last lines to arrive.
    pub(super) fn last_words(&self) -> StderrTail {
        let deadline = Deadline::after(Duration::from_millis(500));
        let mut state = self.lock();
        while !state.ended && !deadline.is_over() {
            let waited = self.shared.1.wait_timeout(state, deadline.remaining());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        self.tail()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fifty_lines_stay_and_all_are_counted() {
        let text: String = (0..100_000).map(|i| format!("line {i}\n")).collect();
        let stderr = Stderr::start(io::Cursor::new(text)).unwrap();
        let tail = stderr.last_words();
        assert_eq!(tail.total, 100_000);
        assert_eq!(tail.lines.len(), 50);
        assert_eq!(tail.lines.last().unwrap(), "line 99999");
        assert!(tail.to_string().starts_with("(99950 lines before)\nline 99950\n"), "{tail}");
        assert!(stderr.ended());
    }

    #[test]
    fn a_line_without_end_is_cut_and_bytes_that_are_no_text_are_replaced() {
        let mut bytes = vec![b'x'; 3_000_000];
        bytes.extend(b"\n\xff\xfe last");
        let tail = Stderr::start(io::Cursor::new(bytes)).unwrap().last_words();
        assert_eq!(tail.lines, ["x".repeat(WIDTH), "\u{fffd}\u{fffd} last".to_owned()]);
    }

    #[test]
    fn an_open_stderr_is_not_waited_for_without_end() {
        let (_open, silent) = std::os::unix::net::UnixStream::pair().unwrap();
        let stderr = Stderr::start(silent).unwrap();
        assert_eq!(stderr.last_words(), StderrTail::default());
        assert!(!stderr.ended());
    }
}
