//! Bytes and descriptors from the socket, cut into messages.
//!
//! A stream socket keeps no message boundaries, and descriptors arrive beside the bytes. What Linux promises (`unix(7)`:
//! ancillary data is a barrier) is that one `recvmsg` never reads past the piece of stream that descriptors were sent with:
//! they belong to the *end* of what it returned. So descriptors are given to the last message that has begun, and no read
//! asks for more than the rest of the message under way plus [`READ_AHEAD`] bytes. That is the size of the smallest message
//! that may carry descriptors, so at most one such message begins in any read and the choice is never a guess, even with a
//! peer that sends several messages at once. The common messages come whole in one call.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use zerocopy::FromBytes;

use super::counters::Counters;
use super::error::ConnectionError;
use super::wire::{self, HEADER_SIZE, Header};

/// Bytes asked for beyond the message under way: a DEVICE_SET_IRQS without data. DMA_MAP, the other message with
/// descriptors, is longer.
const READ_AHEAD: usize = HEADER_SIZE + size_of::<wire::SetIrqs>();

/// Descriptors one `recvmsg` can bring; more are dropped by the kernel, which says so.
const CONTROL_FDS: usize = 16;

/// What is there after an attempt to receive.
pub(super) enum Received {
    /// A whole message: [`Input::message`] has it.
    Message,
    /// Nothing more for now.
    Nothing,
    /// The peer has closed, between messages.
    Closed,
}

/// Descriptors that came with one message.
#[derive(Default)]
pub(super) struct Attached {
    /// Stream offset of the message they belong to.
    at: u64,
    pub(super) fds: Vec<OwnedFd>,
    /// The kernel could not deliver all of them, or there were too many.
    pub(super) lost: bool,
}

pub(super) struct Input {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold data; the message under way starts at 0.
    have: usize,
    /// Stream offset of `buffer[0]`.
    offset: u64,
    attached: Vec<Attached>,
    /// The socket had nothing more when it was last asked.
    drained: bool,
    max_message: usize,
    max_fds: usize,
}

impl Input {
    pub(super) fn new(max_message: usize, max_fds: usize) -> Self {
        Self {
            buffer: vec![0; 4096],
            have: 0,
            offset: 0,
            attached: Vec::new(),
            drained: false,
            max_message,
            max_fds,
        }
    }

    /// Stream offset of the message under way.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The message that [`Received::Message`] announced.
    pub(super) fn message(&self) -> Option<(Header, &[u8])> {
        let (header, rest) = Header::read_from_prefix(self.buffer.get(..self.have)?).ok()?;
        let body = rest.get(..(header.size.get() as usize).checked_sub(HEADER_SIZE)?)?;
        Some((header, body))
    }

    /// Takes the descriptors of the message under way.
    pub(super) fn take_attached(&mut self) -> Attached {
        match self.attached.first() {
            Some(first) if first.at == self.offset => self.attached.remove(0),
            _ => Attached::default(),
        }
    }

    /// Drops the message under way, and its descriptors.
    pub(super) fn consume(&mut self, size: usize) {
        let size = size.min(self.have);
        drop(self.take_attached());
        self.buffer.copy_within(size..self.have, 0);
        self.have -= size;
        self.offset = self.offset.wrapping_add(size as u64);
    }

    /// A new round: ask the socket again.
    pub(super) fn rearm(&mut self) {
        self.drained = false;
    }

    /// Whether a whole message lies in the buffer.
    pub(super) fn has_message(&self) -> bool {
        self.message().is_some()
    }

    /// Receives until a message is whole or the socket has nothing more.
    pub(super) fn receive(
        &mut self,
        socket: impl AsFd + Copy,
        counters: &mut Counters,
    ) -> Result<Received, ConnectionError> {
        loop {
            let missing = match self.missing()? {
                Some(0) => return Ok(Received::Message),
                Some(missing) => missing,
                None => 0,
            };
            if self.drained {
                return Ok(Received::Nothing);
            }
            let want = missing + READ_AHEAD;
            let end = self.have + want;
            if self.buffer.len() < end {
                self.buffer.resize(end, 0);
            }
            let Some(space) = self.buffer.get_mut(self.have..end) else { return Ok(Received::Nothing) };
            let (got, fds, lost) = match receive_once(socket, space) {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {
                    self.drained = true;
                    return Ok(Received::Nothing);
                }
                // The peer died with something of ours unread.
                Err(Errno::CONNRESET | Errno::PIPE) => (0, Vec::new(), false),
                Err(errno) => {
                    return Err(ConnectionError::Io { doing: "receiving", source: io::Error::from(errno) });
                }
            };
            if got == 0 {
                return self.ended();
            }
            counters.receives += 1;
            counters.bytes_received += got as u64;
            self.have += got;
            // A short read empties the socket, unless descriptors stopped it.
            self.drained = got < want && fds.is_empty() && !lost;
            if !fds.is_empty() || lost {
                self.attach(fds, lost, counters);
            }
        }
    }

    /// Bytes the message under way still lacks; `None` when its header is not whole.
    fn missing(&self) -> Result<Option<usize>, ConnectionError> {
        let Some((header, _)) =
            self.buffer.get(..self.have).and_then(|bytes| Header::read_from_prefix(bytes).ok())
        else {
            return Ok(None);
        };
        let (id, command, size) = (header.id.get(), header.command.get(), header.size.get());
        let offset = self.offset;
        if (size as usize) < HEADER_SIZE {
            return Err(ConnectionError::SizeTooSmall { offset, id, command, size });
        }
        if !header.is_command() && !header.is_reply() {
            let flags = header.flags.get();
            return Err(ConnectionError::Type { offset, id, command, flags });
        }
        if size as usize > self.max_message {
            let limit = self.max_message;
            return Err(ConnectionError::SizeTooLarge { offset, id, command, size, limit });
        }
        Ok(Some((size as usize).saturating_sub(self.have)))
    }

    fn ended(&self) -> Result<Received, ConnectionError> {
        if self.have == 0 {
            return Ok(Received::Closed);
        }
        let size = self
            .buffer
            .get(..self.have)
            .and_then(|bytes| Header::read_from_prefix(bytes).ok())
            .map(|(header, _)| header.size.get());
        Err(ConnectionError::Truncated { offset: self.offset, have: self.have, size })
    }

    /// Gives descriptors to the last message that has begun.
    fn attach(&mut self, fds: Vec<OwnedFd>, lost: bool, counters: &mut Counters) {
        counters.fds_received += fds.len() as u64;
        let at = self.offset.wrapping_add(self.last_start() as u64);
        if self.attached.last().is_none_or(|last| last.at != at) {
            self.attached.push(Attached { at, ..Attached::default() });
        }
        let Some(entry) = self.attached.last_mut() else { return };
        entry.lost |= lost;
        for fd in fds {
            if entry.fds.len() < self.max_fds {
                entry.fds.push(fd);
            } else {
                entry.lost = true;
                counters.fds_closed += 1;
            }
        }
    }

    /// Where in the buffer the last message that has begun starts.
    fn last_start(&self) -> usize {
        let mut start = 0;
        while let Some(bytes) = self.buffer.get(start..self.have)
            && let Ok((header, _)) = Header::read_from_prefix(bytes)
        {
            let size = header.size.get() as usize;
            if size < HEADER_SIZE || size >= bytes.len() {
                break;
            }
            start += size;
        }
        start
    }
}

fn receive_once(socket: impl AsFd, space: &mut [u8]) -> Result<(usize, Vec<OwnedFd>, bool), Errno> {
    let mut control_space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONTROL_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut control_space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(socket, &mut [IoSliceMut::new(space)], &mut control, flags)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds, received.flags.contains(ReturnFlags::CTRUNC)))
}
