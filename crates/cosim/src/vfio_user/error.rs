//! What can go wrong: with the stream, with one request of the peer, with one request of ours.

use std::io;

use rustix::io::Errno;

use super::wire::Command;

/// A [`Function`](super::Function) says no; the peer gets the errno in an error reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused with {0}")]
pub struct Refusal(pub Errno);

impl Refusal {
    /// EINVAL.
    pub const INVALID: Self = Self(Errno::INVAL);
    /// ENOTSUP.
    pub const NOT_SUPPORTED: Self = Self(Errno::NOTSUP);
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        Self(errno)
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// The end of a connection: framing is lost, or the socket failed. `offset` counts the bytes of the stream before the message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// A size field below the header's own 16 bytes: where the next message starts is unknown.
    #[error("vfio-user message {id:#06x} ({}) at byte {offset} of the stream: size field is {size}, less than the header's 16", name(*.command))]
    SizeTooSmall {
        /// Stream offset of the message.
        offset: u64,
        /// Its message id.
        id: u16,
        /// Its command number.
        command: u16,
        /// Its size field.
        size: u32,
    },
    /// A size field above [`Limits::max_message`](super::Limits::max_message).
    #[error("vfio-user message {id:#06x} ({}) at byte {offset} of the stream: size field is {size}, the limit is {limit}", name(*.command))]
    SizeTooLarge {
        /// Stream offset of the message.
        offset: u64,
        /// Its message id.
        id: u16,
        /// Its command number.
        command: u16,
        /// Its size field.
        size: u32,
        /// The limit.
        limit: usize,
    },
    /// The type bits of the flags field say neither request nor reply.
    #[error("vfio-user message {id:#06x} ({}) at byte {offset} of the stream: flags field is {flags:#x}, its type is neither request (0) nor reply (1)", name(*.command))]
    Type {
        /// Stream offset of the message.
        offset: u64,
        /// Its message id.
        id: u16,
        /// Its command number.
        command: u16,
        /// Its flags field.
        flags: u32,
    },
    /// The peer closed the socket inside a message.
    #[error("the vfio-user peer closed the connection inside the message at byte {offset} of the stream: {have} bytes came{}", expected(*.size))]
    Truncated {
        /// Stream offset of the message.
        offset: u64,
        /// Bytes of it that came.
        have: usize,
        /// Its size, when the header came whole.
        size: Option<u32>,
    },
    /// The peer proposed a version we do not speak. It got an error reply (EPROTONOSUPPORT).
    #[error("the vfio-user peer proposes version {major}.{minor}; only 0.x is spoken here")]
    Version {
        /// Proposed major version.
        major: u16,
        /// Proposed minor version.
        minor: u16,
    },
    /// The socket failed.
    #[error("vfio-user socket: {doing} failed: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn name(command: u16) -> &'static str {
    Command::from_number(command).map_or("unknown command", Command::name)
}

fn expected(size: Option<u32>) -> String {
    size.map_or_else(String::new, |size| format!(" of {size}"))
}

/// Why a DMA request of ours was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// VERSION has not been exchanged yet.
    #[error("no DMA request before the peer has negotiated a version")]
    NotNegotiated,
    /// The connection has ended.
    #[error("the vfio-user connection has ended")]
    Closed,
    /// Too many requests or queued bytes; try again after the peer has answered some.
    #[error("the vfio-user peer does not keep up: {outstanding} requests and {queued} bytes are waiting")]
    Full {
        /// Messages without reply, and completions not taken yet.
        outstanding: usize,
        /// Bytes in the output queue.
        queued: usize,
    },
    /// No bytes, more than [`Limits::max_dma`](super::Limits::max_dma), or past the end of the address space.
    #[error("a DMA request of {size} bytes at {address:#x}; 1 to {limit} bytes are possible")]
    Size {
        /// First address.
        address: u64,
        /// Bytes.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// The peer's `max_data_xfer_size` is 0.
    #[error("the vfio-user peer accepts no data transfers")]
    PeerRefuses,
}

/// The last thing a peer got wrong that did not end the connection; see [`Connection::last_problem`](super::Connection::last_problem).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Stream offset of the message.
    pub offset: u64,
    /// Its message id.
    pub id: u16,
    /// Its command number.
    pub command: u16,
    /// The errno it was answered with; `None` for a message that gets no answer (a reply).
    pub errno: Option<Errno>,
    /// What was wrong.
    pub what: &'static str,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "vfio-user message {:#06x} ({}) at byte {} of the stream: {}",
            self.id,
            name(self.command),
            self.offset,
            self.what
        )?;
        match self.errno {
            Some(errno) => write!(f, "; refused with {errno}"),
            None => Ok(()),
        }
    }
}
