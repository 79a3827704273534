//! One peer: its socket, its messages, our requests to it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::capabilities::{self, PeerVersion};
use super::counters::Counters;
use super::error::{ConnectionError, Problem, RequestError};
use super::function::Function;
use super::input::{Input, Received};
use super::output::Output;
use super::requests::{Completion, Requests, Ticket};
use super::serve::Server;
use super::wire::{self, Command, HEADER_SIZE, Header};

/// Bounds of one connection. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most data in one message, announced to the peer; at most 64 MiB, which is QEMU's own limit.
    pub max_data_xfer_size: usize,
    /// Largest message that is read; a larger one ends the connection. Raised if it is too small for
    /// `max_data_xfer_size`.
    pub max_message: usize,
    /// Descriptors in one message, announced; at most 16.
    pub max_msg_fds: usize,
    /// DMA maps at a time, announced; at most 65535.
    pub max_dma_maps: usize,
    /// While this much output is queued no input is read and no DMA request is taken.
    pub max_output: usize,
    /// DMA messages without reply plus completions not taken; at most 32768.
    pub max_requests: usize,
    /// Largest DMA request, and the most data of all reads under way.
    pub max_dma: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_data_xfer_size: 1 << 20,
            max_message: 2 << 20,
            max_msg_fds: 16,
            max_dma_maps: 65535,
            max_output: 1 << 20,
            max_requests: 1024,
            max_dma: 16 << 20,
        }
    }
}

impl Limits {
    fn clamped(mut self) -> Self {
        self.max_data_xfer_size = self.max_data_xfer_size.clamp(8, 64 << 20);
        let smallest = self.max_data_xfer_size + capabilities::MAX_JSON + 2 * HEADER_SIZE;
        self.max_message = self.max_message.clamp(smallest, u32::MAX as usize);
        self.max_msg_fds = self.max_msg_fds.clamp(1, 16);
        self.max_dma_maps = self.max_dma_maps.clamp(1, 65535);
        self.max_output = self.max_output.max(1);
        self.max_requests = self.max_requests.clamp(1, 32768);
        self.max_dma = self.max_dma.max(1);
        self
    }
}

/// What [`Connection::pump`] leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pumped {
    /// Everything there was is done, or output is in the way: [`Connection::wait`], or poll for
    /// [`Connection::interest`].
    Idle,
    /// The budget is used up and there may be more: pump again without waiting.
    More,
    /// The peer has closed the connection. Give up what it shared: maps and eventfds. Requests under way have
    /// completed with [`DmaFailure::Closed`](super::DmaFailure::Closed).
    Closed,
}

/// What to poll the socket for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Readable.
    pub input: bool,
    /// Writable.
    pub output: bool,
}

/// What [`Connection::wait`] found; nothing when the time was up or a signal came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// There is input, or the end of it: pump.
    pub input: bool,
    /// The queue can move: pump or flush.
    pub output: bool,
}

impl Ready {
    /// Whether there is anything to do.
    pub fn any(self) -> bool {
        self.input || self.output
    }
}

/// A connection with one peer. Nothing blocks except [`Connection::wait`].
///
/// ```no_run
/// # use portcullis_cosim::vfio_user::{Connection, ConnectionError, Function, Pumped};
/// fn serve(connection: &mut Connection, function: &mut dyn Function) -> Result<(), ConnectionError> {
///     loop {
///         match connection.pump(function, 64)? {
///             Pumped::More => continue,
///             Pumped::Closed => return Ok(()),
///             Pumped::Idle => {}
///         }
///         for done in connection.take_completions() {
///             if let Err(failure) = done.result {
///                 eprintln!("DMA {:?}: {failure}", done.ticket);
///             }
///         }
///         let _ = connection.wait(None);
///     }
/// }
/// ```
pub struct Connection {
    stream: UnixStream,
    input: Input,
    output: Output,
    requests: Requests,
    server: Server,
    /// A send of [`Connection::dma_write`] failed; the next pump says so.
    failed: Option<Errno>,
    closed: bool,
}

impl Connection {
    /// Takes over a connected socket and makes it non-blocking.
    pub fn new(stream: UnixStream, limits: Limits) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let limits = limits.clamped();
        Ok(Self {
            stream,
            input: Input::new(limits.max_message, limits.max_msg_fds),
            output: Output::default(),
            requests: Requests::default(),
            server: Server::new(limits),
            failed: None,
            closed: false,
        })
    }

    /// Handles at most `budget` messages that are there and sends what the socket takes. Never waits.
    ///
    /// After an error or [`Pumped::Closed`] the connection has ended and further calls return `Closed`.
    pub fn pump(&mut self, function: &mut dyn Function, budget: usize) -> Result<Pumped, ConnectionError> {
        if self.closed {
            return Ok(Pumped::Closed);
        }
        let outcome = self.pump_open(function, budget);
        if matches!(outcome, Err(_) | Ok(Pumped::Closed)) {
            self.end();
        }
        outcome
    }

    fn pump_open(&mut self, function: &mut dyn Function, budget: usize) -> Result<Pumped, ConnectionError> {
        if let Some(errno) = self.failed.take() {
            return Err(send_failed(errno));
        }
        self.send()?;
        self.input.rearm();
        for _ in 0..budget {
            if self.is_stalled() {
                self.server.counters.stalls += 1;
                return Ok(Pumped::Idle);
            }
            match self.input.receive(&self.stream, &mut self.server.counters)? {
                Received::Message => self.handle(function)?,
                Received::Nothing if self.output.is_broken() => return Ok(Pumped::Closed),
                Received::Nothing => return Ok(Pumped::Idle),
                Received::Closed => return Ok(Pumped::Closed),
            }
        }
        Ok(Pumped::More)
    }

    /// Handles the whole message at the front of the input.
    fn handle(&mut self, function: &mut dyn Function) -> Result<(), ConnectionError> {
        let attached = self.input.take_attached();
        let offset = self.input.offset();
        let Some((header, body)) = self.input.message() else { return Ok(()) };
        let size = header.size.get() as usize;
        let outcome = if header.is_reply() {
            self.server.counters.fds_closed += attached.fds.len() as u64;
            if self.requests.reply(&header, body) {
                self.server.counters.replies_received += 1;
            } else {
                self.server.counters.unknown_replies += 1;
                self.server.problem = Some(Problem {
                    offset,
                    id: header.id.get(),
                    command: header.command.get(),
                    errno: None,
                    what: "a reply to nothing that was asked",
                });
            }
            Ok(())
        } else {
            self.server.serve(offset, &header, body, attached, &mut self.output, function)
        };
        self.input.consume(size);
        self.send()?;
        outcome
    }

    fn send(&mut self) -> Result<(), ConnectionError> {
        self.output.flush(&self.stream, &mut self.server.counters).map_err(send_failed)
    }

    fn is_stalled(&self) -> bool {
        self.output.queued() >= self.server.limits.max_output
    }

    fn end(&mut self) {
        self.closed = true;
        self.requests.close();
        // Tells the peer now, even if this value lives on.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Sends what the socket takes of the queue. Pump does this too.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        if self.closed {
            return Ok(());
        }
        self.send()
    }

    /// What to poll [`AsFd::as_fd`] for after [`Pumped::Idle`].
    pub fn interest(&self) -> Interest {
        Interest { input: !self.is_stalled(), output: self.output.queued() > 0 }
    }

    /// Waits until there is something for [`Connection::pump`] to do, at most `timeout` (`None`: for ever).
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Ready> {
        let interest = self.interest();
        if self.closed || self.failed.is_some() || interest.input && self.input.has_message() {
            return Ok(Ready { input: true, output: false });
        }
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, interest.input);
        events.set(PollFlags::OUT, interest.output);
        // A time too long for the clock is for ever.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = [PollFd::new(&self.stream, events)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => Ok(Ready::default()),
            Ok(_) => {
                let found = fds.iter().fold(PollFlags::empty(), |all, fd| all | fd.revents());
                let ended = found.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
                Ok(Ready {
                    input: ended || found.contains(PollFlags::IN),
                    output: found.contains(PollFlags::OUT),
                })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Asks the peer to write `data` at a DMA address. Queued and, if the socket takes it, sent; the reply is never waited
    /// for. Split into messages the peer accepts.
    pub fn dma_write(&mut self, address: u64, data: &[u8]) -> Result<Ticket, RequestError> {
        let chunk = self.admit(address, data.len(), 0)?;
        let ticket = self.requests.open(data.len().div_ceil(chunk), 0);
        let mut offset = 0;
        for piece in data.chunks(chunk) {
            self.request(ticket, Command::DmaWrite, address, offset, piece.len(), piece);
            offset += piece.len();
        }
        self.start();
        Ok(ticket)
    }

    /// Asks the peer for `size` bytes at a DMA address; they come with the [`Completion`].
    pub fn dma_read(&mut self, address: u64, size: usize) -> Result<Ticket, RequestError> {
        let chunk = self.admit(address, size, size)?;
        let ticket = self.requests.open(size.div_ceil(chunk), size);
        let mut offset = 0;
        while offset < size {
            let piece = chunk.min(size - offset);
            self.request(ticket, Command::DmaRead, address, offset, piece, &[]);
            offset += piece;
        }
        self.start();
        Ok(ticket)
    }

    /// Whether a request can be taken; the largest piece of it in one message.
    fn admit(&self, address: u64, size: usize, read: usize) -> Result<usize, RequestError> {
        if self.closed || self.failed.is_some() || self.output.is_broken() {
            return Err(RequestError::Closed);
        }
        let limits = &self.server.limits;
        let peer = self.server.peer.as_ref().ok_or(RequestError::NotNegotiated)?;
        let chunk =
            usize::try_from(peer.max_data_xfer_size).unwrap_or(usize::MAX).min(limits.max_data_xfer_size);
        if chunk == 0 {
            return Err(RequestError::PeerRefuses);
        }
        let limit = limits.max_dma.min(chunk.saturating_mul(limits.max_requests));
        let last = (size as u64).checked_sub(1).and_then(|rest| address.checked_add(rest));
        if last.is_none() || size > limit {
            return Err(RequestError::Size { address, size, limit });
        }
        let full = self.requests.held() + size.div_ceil(chunk) > limits.max_requests
            || self.requests.read_bytes() + read > limits.max_dma
            || self.is_stalled();
        if full {
            let (outstanding, queued) = (self.requests.held(), self.output.queued());
            return Err(RequestError::Full { outstanding, queued });
        }
        Ok(chunk)
    }

    fn request(
        &mut self,
        ticket: Ticket,
        command: Command,
        address: u64,
        offset: usize,
        size: usize,
        data: &[u8],
    ) {
        let id = self.requests.add_part(ticket, command, offset, size);
        let fixed = wire::DmaAccess {
            address: address.wrapping_add(offset as u64).into(),
            count: (size as u64).into(),
        };
        let header = Header::request(id, command, 0, size_of_val(&fixed) + data.len());
        self.output.push(&header, fixed.as_bytes(), data);
        self.server.counters.dma_sent += 1;
    }

    fn start(&mut self) {
        if let Err(errno) = self.output.flush(&self.stream, &mut self.server.counters) {
            self.failed = Some(errno);
        }
    }

    /// The DMA requests that have ended since the last call. Those not taken count against
    /// [`Limits::max_requests`].
    pub fn take_completions(&mut self) -> Vec<Completion> {
        self.requests.take_completions()
    }

    /// DMA messages without a reply.
    pub fn outstanding(&self) -> usize {
        self.requests.outstanding()
    }

    /// How long the oldest DMA message has been without a reply.
    pub fn oldest_outstanding(&self) -> Option<Duration> {
        self.requests.oldest()
    }

    /// Bytes in the output queue.
    pub fn queued(&self) -> usize {
        self.output.queued()
    }

    /// What the peer said of itself; `None` before VERSION.
    pub fn peer(&self) -> Option<&PeerVersion> {
        self.server.peer.as_ref()
    }

    /// What went over the connection so far.
    pub fn counters(&self) -> &Counters {
        &self.server.counters
    }

    /// The last message that was refused or made no sense, and what was wrong with it.
    pub fn last_problem(&self) -> Option<&Problem> {
        self.server.problem.as_ref()
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.closed
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn send_failed(errno: Errno) -> ConnectionError {
    ConnectionError::Io { doing: "sending", source: errno.into() }
}
