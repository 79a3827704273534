//! What went over a connection, in numbers.

use super::wire::Command;

/// Numbers of one connection since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    requests: [u64; Command::ALL.len()],
    /// Requests with a command number the specification does not know.
    pub unknown_commands: u64,
    /// Requests that wanted no reply (posted).
    pub posted: u64,
    /// Register writes inside REGION_WRITE_MULTI messages.
    pub batched_writes: u64,
    /// Requests refused: an error reply was sent, or would have been had they wanted one.
    pub refused: u64,
    /// Replies sent, error replies included.
    pub replies_sent: u64,
    /// DMA_READ and DMA_WRITE messages sent.
    pub dma_sent: u64,
    /// Replies that matched a request of ours.
    pub replies_received: u64,
    /// Replies that matched none.
    pub unknown_replies: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// `recvmsg` calls that brought bytes.
    pub receives: u64,
    /// `send` calls that took bytes.
    pub sends: u64,
    /// File descriptors received.
    pub fds_received: u64,
    /// Of these, closed at once because the message had no use for them.
    pub fds_closed: u64,
    /// Times input was left alone because the output queue was over its limit.
    pub stalls: u64,
}

impl Counters {
    /// Requests of a command received.
    pub fn requests(&self, command: Command) -> u64 {
        usize::from(command.number())
            .checked_sub(1)
            .and_then(|index| self.requests.get(index))
            .copied()
            .unwrap_or(0)
    }

    pub(super) fn count_request(&mut self, number: u16) {
        match usize::from(number).checked_sub(1).and_then(|index| self.requests.get_mut(index)) {
            Some(count) => *count += 1,
            None => self.unknown_commands += 1,
        }
    }
}
