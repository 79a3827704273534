//! Our requests to the peer (DMA_READ, DMA_WRITE) that wait for their replies.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use zerocopy::FromBytes;

use super::wire::{self, Command, Header};

/// Names one DMA request of ours until its [`Completion`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// The end of a DMA request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which request.
    pub ticket: Ticket,
    /// The data of a read (empty for a write), or why it failed.
    pub result: Result<Vec<u8>, DmaFailure>,
    /// From the request to its last reply.
    pub elapsed: Duration,
}

/// Why a DMA request failed. Of a request split over several messages, the first failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DmaFailure {
    /// The peer refused it. QEMU: EFAULT bus error, ENODEV nothing at the address, EPERM not allowed.
    #[error("the peer refused DMA with {0}")]
    Refused(Errno),
    /// The peer's reply sets the error flag without an errno.
    #[error("the peer refused DMA without saying why")]
    Unexplained,
    /// The reply is for another command, or its data do not have the size asked for.
    #[error("the peer's reply to a DMA request is malformed")]
    Malformed,
    /// The connection ended first.
    #[error("the connection ended before the DMA request was answered")]
    Closed,
}

/// One message on its way.
#[derive(Debug)]
struct Part {
    id: u16,
    ticket: Ticket,
    command: Command,
    sent: Instant,
    /// Where in the request's data it lies.
    offset: usize,
    size: usize,
}

/// One request, of one or more parts.
#[derive(Debug)]
struct Request {
    ticket: Ticket,
    parts: usize,
    started: Instant,
    data: Vec<u8>,
    failure: Option<DmaFailure>,
}

#[derive(Debug, Default)]
pub(super) struct Requests {
    /// In the order they were sent; a peer that answers in order is found at the front.
    parts: VecDeque<Part>,
    /// By ticket, which only grows.
    requests: VecDeque<Request>,
    completions: Vec<Completion>,
    next_id: u16,
    next_ticket: u64,
    /// Bytes of the reads under way and of those nobody took.
    read_bytes: usize,
}

impl Requests {
    /// Messages without a reply.
    pub(super) fn outstanding(&self) -> usize {
        self.parts.len()
    }

    /// Everything that takes room: messages without a reply and completions nobody took.
    pub(super) fn held(&self) -> usize {
        self.parts.len() + self.completions.len()
    }

    /// Bytes of the reads under way and of those nobody took.
    pub(super) fn read_bytes(&self) -> usize {
        self.read_bytes
    }

    pub(super) fn oldest(&self) -> Option<Duration> {
        self.parts.front().map(|part| part.sent.elapsed())
    }

    pub(super) fn take_completions(&mut self) -> Vec<Completion> {
        let taken = std::mem::take(&mut self.completions);
        self.read_bytes -= taken.iter().map(|done| done.result.as_ref().map_or(0, Vec::len)).sum::<usize>();
        taken
    }

    /// Opens a request of `parts` messages; `read` is the size of the data a read brings back.
    pub(super) fn open(&mut self, parts: usize, read: usize) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.read_bytes += read;
        let data = vec![0; read];
        self.requests.push_back(Request { ticket, parts, started: Instant::now(), data, failure: None });
        ticket
    }

    /// Registers one message of a request and gives its id. The caller keeps the number under way far below 65536.
    pub(super) fn add_part(&mut self, ticket: Ticket, command: Command, offset: usize, size: usize) -> u16 {
        let mut id = self.next_id;
        while self.parts.iter().any(|part| part.id == id) {
            id = id.wrapping_add(1);
        }
        self.next_id = id.wrapping_add(1);
        self.parts.push_back(Part { id, ticket, command, sent: Instant::now(), offset, size });
        id
    }

    /// Takes a reply. False when no request of ours has its id.
    pub(super) fn reply(&mut self, header: &Header, body: &[u8]) -> bool {
        let Some(index) = self.parts.iter().position(|part| part.id == header.id.get()) else {
            return false;
        };
        let Some(part) = self.parts.remove(index) else { return false };
        let Ok(index) = self.requests.binary_search_by_key(&part.ticket, |request| request.ticket) else {
            return false;
        };
        let Some(request) = self.requests.get_mut(index) else { return false };
        if let Err(failure) = accept(&part, header, body, &mut request.data) {
            request.failure.get_or_insert(failure);
        }
        request.parts -= 1;
        if request.parts == 0
            && let Some(request) = self.requests.remove(index)
        {
            self.complete(request);
        }
        true
    }

    /// Fails everything under way: the connection has ended.
    pub(super) fn close(&mut self) {
        self.parts.clear();
        while let Some(mut request) = self.requests.pop_front() {
            request.failure.get_or_insert(DmaFailure::Closed);
            self.complete(request);
        }
    }

    fn complete(&mut self, request: Request) {
        if request.failure.is_some() {
            self.read_bytes -= request.data.len();
        }
        self.completions.push(Completion {
            ticket: request.ticket,
            elapsed: request.started.elapsed(),
            result: match request.failure {
                Some(failure) => Err(failure),
                None => Ok(request.data),
            },
        });
    }
}

fn accept(part: &Part, header: &Header, body: &[u8], data: &mut [u8]) -> Result<(), DmaFailure> {
    if header.flags.get() & wire::ERROR != 0 {
        let errno = header.error.get();
        return Err(match i32::try_from(errno) {
            // The range of Linux's errno values; anything else would not be one.
            Ok(errno @ 1..=4095) => DmaFailure::Refused(Errno::from_raw_os_error(errno)),
            _ => DmaFailure::Unexplained,
        });
    }
    if header.command.get() != part.command.number() {
        return Err(DmaFailure::Malformed);
    }
    // The payload of a write's reply is not looked at: the specification has 12 bytes, libvfio-user 16, QEMU none.
    if part.command == Command::DmaRead {
        let (fixed, bytes) = wire::DmaAccess::read_from_prefix(body).map_err(|_| DmaFailure::Malformed)?;
        let target = part
            .offset
            .checked_add(part.size)
            .and_then(|end| data.get_mut(part.offset..end))
            .ok_or(DmaFailure::Malformed)?;
        if fixed.count.get() != part.size as u64 || bytes.len() != part.size {
            return Err(DmaFailure::Malformed);
        }
        target.copy_from_slice(bytes);
    }
    Ok(())
}
