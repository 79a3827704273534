//! The AXI stream between the channels: bytes in order, and where packets end.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// A FIFO of bytes; some of them carry TLAST.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fifo {
    data: VecDeque<u8>,
    /// Bytes that ever left it.
    left: u64,
    /// For every byte with TLAST in it, how many bytes will have left when that one has. Ascending.
    ends: VecDeque<u64>,
}

impl Fifo {
    pub(super) fn len(&self) -> usize {
        self.data.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Bytes that come out before the first TLAST, that byte included; everything if there is none.
    fn packet(&self) -> usize {
        let whole = self.data.len();
        self.ends.front().map_or(whole, |end| whole.min(end.wrapping_sub(self.left) as usize))
    }

    /// The bytes at the front, as far as they are of one packet and lie in one piece.
    pub(super) fn front(&self) -> &[u8] {
        let (piece, _) = self.data.as_slices();
        piece.get(..self.packet()).unwrap_or(piece)
    }

    /// Puts bytes in; the last of them carries TLAST if `last`.
    pub(super) fn push(&mut self, bytes: &[u8], last: bool) {
        self.data.extend(bytes);
        if last {
            self.ends.push_back(self.left.wrapping_add(self.data.len() as u64));
        }
    }

    /// Takes `n` bytes of one packet out. True if the last of them carries TLAST.
    pub(super) fn pop(&mut self, n: usize) -> bool {
        let n = n.min(self.packet());
        self.data.drain(..n);
        self.left = self.left.wrapping_add(n as u64);
        let last = n > 0 && self.ends.front() == Some(&self.left);
        if last {
            self.ends.pop_front();
        }
        last
    }

    /// What is wrong with a saved FIFO, if anything.
    pub(super) fn check(&self, room: usize) -> Result<(), &'static str> {
        let Self { data, left, ends } = self;
        if data.len() > room {
            return Err("more data in the FIFO than it holds");
        }
        let mut before = 0;
        for end in ends {
            let at = end.wrapping_sub(*left);
            if at <= before || at > data.len() as u64 {
                return Err("a packet in the FIFO that ends outside of it");
            }
            before = at;
        }
        Ok(())
    }
}
