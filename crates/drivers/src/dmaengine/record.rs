//! A driver's memory of its transactions: numbers for new ones, and how the last ones ended.

use alloc::collections::VecDeque;

use super::{Completion, Cookie, Status};

/// How many ended transactions are remembered: more than a channel has under way at once, so that whoever submitted all
/// of them finds the end of each.
const REMEMBERED: usize = 1024;

/// Hands out cookies and remembers the last 1024 completions, so that [`status`](Self::status) can be asked after the end.
#[derive(Debug)]
pub struct Record {
    next: u64,
    ended: VecDeque<Completion>,
}

impl Default for Record {
    fn default() -> Self {
        Self::new()
    }
}

impl Record {
    /// Nothing yet; the first cookie is 1.
    pub fn new() -> Self {
        Self { next: 1, ended: VecDeque::new() }
    }

    /// A cookie for a new transaction.
    pub fn issue(&mut self) -> Cookie {
        let cookie = Cookie(self.next);
        self.next = self.next.wrapping_add(1);
        cookie
    }

    /// Remembers an end.
    pub fn end(&mut self, completion: Completion) {
        if self.ended.len() >= REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(completion);
    }

    /// How an ended transaction ended; unknown for all others.
    pub fn status(&self, cookie: Cookie) -> Status {
        let found = self.ended.iter().rev().find(|completion| completion.cookie == cookie);
        found.map_or(Status::UNKNOWN, |completion| (*completion).into())
    }
}
