//! A socket that carries lines, with a limit on their length and on every wait.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::process::{Deadline, wait_one};

/// Longest line accepted.
pub(super) const MAX_LINE: usize = 1 << 20;

/// Why there is no line.
#[derive(Debug)]
pub(super) enum LineError {
    /// The time is over; what came so far is kept.
    Late,
    /// The other side is gone.
    Closed,
    /// No end of line within [`MAX_LINE`].
    TooLong,
    /// The system's word.
    Io(io::Error),
}

impl From<io::Error> for LineError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::BrokenPipe | Kind::ConnectionReset | Kind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// A connection that sends and receives lines.
#[derive(Debug)]
pub(super) struct Lines {
    stream: UnixStream,
    /// Received and not yet handed out.
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no end of line.
    searched: usize,
}

impl Lines {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, buffer: Vec::new(), searched: 0 })
    }

    /// Connects as soon as somebody listens on `path`. `Ok(None)` when the time is over or `give_up` says so.
    pub(super) fn connect(
        path: &Path,
        deadline: Deadline,
        give_up: &mut dyn FnMut() -> bool,
    ) -> io::Result<Option<Self>> {
        use rustix::io::Errno;
        let address = SocketAddrUnix::new(path)?;
        loop {
            // Without blocking: a peer whose queue of connections is full would hold us for ever.
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => return Self::new(UnixStream::from(socket)).map(Some),
                Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if give_up() || deadline.is_over() {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends one line; the end of line is added.
    pub(super) fn send(&mut self, line: &str, deadline: Deadline) -> Result<(), LineError> {
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match self.stream.write(rest) {
                Ok(0) => return Err(LineError::Closed),
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !wait_one(&self.stream, PollFlags::OUT, deadline)? {
                        return Err(LineError::Late);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next line without its end; bytes that are not UTF-8 are replaced.
    pub(super) fn receive(&mut self, deadline: Deadline) -> Result<String, LineError> {
        let mut chunk = [0; 4096];
        loop {
            let fresh = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(position) = fresh.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=self.searched + position).collect();
                self.searched = 0;
                line.pop();
                if line.last() == Some(&b'\r') {
                    line.pop();
                }
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > MAX_LINE {
                return Err(LineError::TooLong);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(LineError::Closed),
                Ok(count) => self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !wait_one(&self.stream, PollFlags::IN, deadline)? {
                        return Err(LineError::Late);
                    }
                }
                Err(error) => return Err(error.into()),
            }
            // A peer that sends without a pause and never ends its line must not hold us either.
            if deadline.is_over() && !self.buffer.contains(&b'\n') {
                return Err(LineError::Late);
            }
        }
    }
}
