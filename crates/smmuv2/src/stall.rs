//! Transactions that wait for RESUME, and the fates of those whose masters have not asked yet.

use std::collections::BTreeMap;

use portcullis_bus::{StallState, StallTag};
use serde::{Deserialize, Serialize};

/// Transactions that wait at most (beyond that they are terminated), and fates kept at most (the oldest are given up
/// first: their masters are gone).
const MOST: usize = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    bank: u8,
    /// It is the one that FSR describes.
    recorded: bool,
}

/// What has been decided about a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fate {
    Retry,
    Terminated { abort: bool },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stalls {
    waiting: BTreeMap<u64, Waiting>,
    decided: BTreeMap<u64, Fate>,
    next_tag: u64,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { waiting: BTreeMap::new(), decided: BTreeMap::new(), next_tag: 1 }
    }
}

impl Stalls {
    /// True if one more transaction can wait.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MOST
    }

    /// Parks a transaction in `bank`.
    pub fn wait(&mut self, bank: u8, recorded: bool) -> StallTag {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.waiting.insert(tag, Waiting { bank, recorded });
        StallTag(tag)
    }

    /// True if a transaction waits in `bank`.
    pub fn any_in(&self, bank: usize) -> bool {
        self.waiting.values().any(|w| usize::from(w.bank) == bank)
    }

    /// Decides about all that wait in `bank`; `fate` hears whether it is the recorded one.
    pub fn release(&mut self, bank: u8, fate: impl Fn(bool) -> Fate) {
        let mut decided = std::mem::take(&mut self.decided);
        self.waiting.retain(|tag, w| {
            if w.bank == bank {
                decided.insert(*tag, fate(w.recorded));
            }
            w.bank != bank
        });
        while decided.len() > MOST {
            decided.pop_first();
        }
        self.decided = decided;
    }

    /// Reset: whatever waited is terminated with an abort, and no tag is given out twice.
    pub fn end_all(&mut self) {
        let over = Fate::Terminated { abort: true };
        self.decided.clear();
        self.decided.extend(self.waiting.keys().map(|tag| (*tag, over)));
        self.waiting.clear();
    }

    /// A master asks; the answer, if there is one, is given once.
    pub fn ask(&mut self, tag: StallTag) -> StallState {
        if self.waiting.contains_key(&tag.0) {
            return StallState::Waiting;
        }
        match self.decided.remove(&tag.0) {
            Some(Fate::Retry) => StallState::Retry,
            Some(Fate::Terminated { abort }) => StallState::Terminated { abort },
            None => StallState::Terminated { abort: true },
        }
    }

    /// What is wrong with restored ones, of an SMMU with so many banks.
    pub fn damage(&self, banks: usize) -> Option<&'static str> {
        let last = self.waiting.keys().next_back().max(self.decided.keys().next_back());
        if self.next_tag > 1 << 63 || last.is_some_and(|tag| *tag >= self.next_tag) {
            return Some("a stalled transaction has a tag from the future");
        }
        if self.waiting.values().any(|w| usize::from(w.bank) >= banks) {
            return Some("a stalled transaction names a bank that does not exist");
        }
        if self.waiting.len() > MOST || self.decided.len() > MOST {
            return Some("there are more stalled transactions than there can be");
        }
        if self.waiting.keys().any(|tag| self.decided.contains_key(tag)) {
            return Some("a stalled transaction waits and is decided");
        }
        None
    }
}
