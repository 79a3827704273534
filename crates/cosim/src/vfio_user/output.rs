//! Messages waiting to be sent.
//!
//! QEMU's client gives a connection up when one read brings only a part of a header. So a `send` either starts at the
//! beginning of a message or goes on in the middle of one, and several messages are joined only up to [`JOINED`] bytes,
//! which a stream socket takes whole or not at all.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use zerocopy::IntoBytes;

use super::counters::Counters;
use super::wire::Header;

/// Most bytes of several messages in one `send`.
const JOINED: usize = 16 << 10;
/// Bytes already sent that are kept at the front of the buffer before the rest is moved up.
const SLACK: usize = 64 << 10;

#[derive(Default)]
pub(super) struct Output {
    buffer: Vec<u8>,
    /// Bytes of `buffer` already sent.
    sent: usize,
    /// Where the unsent messages end in `buffer`.
    ends: VecDeque<usize>,
    /// The peer takes nothing any more; what is queued is thrown away.
    broken: bool,
}

impl Output {
    /// Bytes not sent yet.
    pub(super) fn queued(&self) -> usize {
        self.buffer.len() - self.sent
    }

    /// Whether the peer has stopped taking messages for good.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Queues a message with a zeroed body, to be filled in.
    pub(super) fn reserve(&mut self, header: &Header, body: usize) -> &mut [u8] {
        self.buffer.extend_from_slice(header.as_bytes());
        let start = self.buffer.len();
        self.buffer.resize(start + body, 0);
        self.ends.push_back(start + body);
        self.buffer.get_mut(start..).unwrap_or_default()
    }

    /// Queues a message whose body is two parts.
    pub(super) fn push(&mut self, header: &Header, first: &[u8], second: &[u8]) {
        for part in [header.as_bytes(), first, second] {
            self.buffer.extend_from_slice(part);
        }
        self.ends.push_back(self.buffer.len());
    }

    /// Sends what the socket takes now.
    pub(super) fn flush(&mut self, socket: impl AsFd + Copy, counters: &mut Counters) -> Result<(), Errno> {
        while let Some(&first) = self.ends.front() {
            if self.broken {
                break;
            }
            let limit = self.sent + JOINED;
            let end = self.ends.iter().copied().take_while(|&end| end <= limit).last().unwrap_or(first);
            let Some(bytes) = self.buffer.get(self.sent..end) else { break };
            match send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    counters.sends += 1;
                    counters.bytes_sent += count as u64;
                    self.sent += count;
                    while self.ends.front().is_some_and(|&end| end <= self.sent) {
                        self.ends.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                // The peer is gone. What it sent before may still be read.
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => self.broken = true,
                Err(errno) => return Err(errno),
            }
        }
        self.tidy();
        Ok(())
    }

    fn tidy(&mut self) {
        if self.broken || self.ends.is_empty() {
            self.buffer.clear();
            self.ends.clear();
            self.sent = 0;
        } else if self.sent > SLACK {
            self.buffer.copy_within(self.sent.., 0);
            self.buffer.truncate(self.buffer.len() - self.sent);
            for end in &mut self.ends {
                *end -= self.sent;
            }
            self.sent = 0;
        }
    }
}
