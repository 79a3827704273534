//! Transactions that wait for CMD_RESUME, and the fates of those whose masters have not asked yet (IHI 0070 section
//! 3.12.2).
//!
//! A transaction that stalls gets a STAG and an event record. The record may have to wait until the event queue can be
//! written; if anything was invalidated meanwhile, or if no STAG was free, the transaction is tried again instead.

use std::collections::{BTreeMap, BTreeSet};

use portcullis_arch::smmuv3::EventRecord;
use portcullis_bus::{StallState, StallTag};
use serde::{Deserialize, Serialize};

/// Transactions that wait at most (beyond that they are terminated), and fates kept at most (the oldest are given up
/// first: their masters are gone).
const MOST: usize = 1 << 16;

/// Where a stalled transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    /// Its record is in the event queue.
    Recorded { stag: u16 },
    /// Its record waits for the event queue.
    Unwritten {
        stag: u16,
        record: [u64; 4],
        /// The invalidations that had happened when it stalled.
        seen: u64,
    },
    /// As many as there can be have stalled before it: it is tried again when one of them is gone.
    Behind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    secure: bool,
    stream: u32,
    stage: Stage,
}

/// What has been decided about a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Fate {
    Retry,
    Terminated { abort: bool },
}

/// A transaction that is stalled now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StalledTransaction {
    /// The tag that its master knows.
    pub tag: StallTag,
    /// Security state of its stream.
    pub secure: bool,
    /// StreamID.
    pub stream: u32,
    /// STAG of its event record; `None` if it waits for others to go first.
    pub stag: Option<u16>,
    /// Its record has been written to the event queue.
    pub recorded: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stalls {
    waiting: BTreeMap<u64, Waiting>,
    decided: BTreeMap<u64, Fate>,
    next_tag: u64,
    next_stag: u16,
    /// Most STAGs in use.
    most: u16,
    /// In use now, by which transaction.
    used: BTreeMap<u16, u64>,
    /// Transactions whose records wait, with their security state.
    unwritten: BTreeSet<(bool, u64)>,
    /// Transactions that wait for a STAG.
    behind: BTreeSet<u64>,
}

impl Stalls {
    pub fn new(most: u16) -> Self {
        Self {
            waiting: BTreeMap::new(),
            decided: BTreeMap::new(),
            next_tag: 1,
            next_stag: 0,
            most,
            used: BTreeMap::new(),
            unwritten: BTreeSet::new(),
            behind: BTreeSet::new(),
        }
    }

    /// True if one more transaction can wait.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < MOST
    }

    /// Parks a transaction. `record` makes its event record from the STAG; the invalidations up to `seen` have
    /// happened.
    pub fn wait(
        &mut self,
        (secure, stream): (bool, u32),
        seen: u64,
        record: impl FnOnce(u16) -> EventRecord,
    ) -> StallTag {
        let tag = self.next_tag;
        self.next_tag += 1;
        let stage = match self.free_stag() {
            Some(stag) => {
                self.used.insert(stag, tag);
                self.unwritten.insert((secure, tag));
                Stage::Unwritten { stag, record: record(stag).0, seen }
            }
            None => {
                self.behind.insert(tag);
                Stage::Behind
            }
        };
        self.waiting.insert(tag, Waiting { secure, stream, stage });
        StallTag(tag)
    }

    fn free_stag(&mut self) -> Option<u16> {
        if self.used.len() >= usize::from(self.most) {
            return None;
        }
        // The search is short: only STAGs of transactions that wait since the last turn of the counter are passed.
        while self.used.contains_key(&self.next_stag) {
            self.next_stag = self.next_stag.wrapping_add(1);
        }
        let stag = self.next_stag;
        self.next_stag = stag.wrapping_add(1);
        Some(stag)
    }

    /// The oldest transaction of this security state whose record waits for the event queue.
    fn first_unwritten(&self, secure: bool) -> Option<u64> {
        self.unwritten.range((secure, 0)..=(secure, u64::MAX)).next().map(|(_, tag)| *tag)
    }

    /// True if records of this security state wait for the event queue.
    pub fn has_unwritten(&self, secure: bool) -> bool {
        self.first_unwritten(secure).is_some()
    }

    /// The event queue can take a record: the oldest unwritten one whose transaction nothing has changed for. Those that
    /// an invalidation since (`now`) may have changed something for are tried again.
    pub fn next_unwritten(&mut self, secure: bool, now: u64) -> Option<(u64, [u64; 4])> {
        loop {
            let tag = self.first_unwritten(secure)?;
            match self.waiting.get(&tag)?.stage {
                Stage::Unwritten { record, seen, .. } if seen == now => return Some((tag, record)),
                _ => self.decide(tag, Fate::Retry),
            }
        }
    }

    /// The record of `tag` has been written.
    pub fn written(&mut self, tag: u64) {
        if let Some(w) = self.waiting.get_mut(&tag)
            && let Stage::Unwritten { stag, .. } = w.stage
        {
            w.stage = Stage::Recorded { stag };
            self.unwritten.remove(&(w.secure, tag));
        }
    }

    fn decide(&mut self, tag: u64, fate: Fate) {
        let Some(w) = self.waiting.remove(&tag) else { return };
        self.unwritten.remove(&(w.secure, tag));
        self.behind.remove(&tag);
        if let Stage::Recorded { stag } | Stage::Unwritten { stag, .. } = w.stage {
            self.used.remove(&stag);
        }
        self.decided.insert(tag, fate);
        while self.decided.len() > MOST {
            self.decided.pop_first();
        }
    }

    /// STAGs are free again: those that waited for one are tried again, oldest first.
    fn let_others_in(&mut self) {
        let free = usize::from(self.most).saturating_sub(self.used.len());
        let next: Vec<u64> = self.behind.iter().take(free).copied().collect();
        for tag in next {
            self.decide(tag, Fate::Retry);
        }
    }

    /// CMD_RESUME: decides about the transaction with this STAG if it belongs to the stream.
    pub fn resume(&mut self, (secure, stream): (bool, u32), stag: u16, fate: Fate) {
        let Some(tag) = self.used.get(&stag).copied() else { return };
        if self.waiting.get(&tag).is_some_and(|w| w.secure == secure && w.stream == stream) {
            self.decide(tag, fate);
            self.let_others_in();
        }
    }

    /// CMD_STALL_TERM (one stream) and SMMUEN = 0 (all streams): aborts what waits.
    pub fn terminate(&mut self, secure: bool, stream: Option<u32>) {
        let hit = |(tag, w): (&u64, &Waiting)| {
            (w.secure == secure && stream.is_none_or(|s| s == w.stream)).then_some(*tag)
        };
        let over: Vec<u64> = self.waiting.iter().filter_map(hit).collect();
        for tag in &over {
            self.decide(*tag, Fate::Terminated { abort: true });
        }
        if !over.is_empty() {
            self.let_others_in();
        }
    }

    /// Reset: whatever waited is terminated with an abort, and no tag is given out twice.
    pub fn end_all(&mut self) {
        self.terminate(false, None);
        self.terminate(true, None);
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

    /// What waits, oldest first.
    pub fn list(&self) -> Vec<StalledTransaction> {
        let one = |(tag, w): (&u64, &Waiting)| {
            let (stag, recorded) = match w.stage {
                Stage::Recorded { stag } => (Some(stag), true),
                Stage::Unwritten { stag, .. } => (Some(stag), false),
                Stage::Behind => (None, false),
            };
            StalledTransaction { tag: StallTag(*tag), secure: w.secure, stream: w.stream, stag, recorded }
        };
        self.waiting.iter().map(one).collect()
    }

    /// What is wrong with restored ones, of an SMMU that can hold `most`.
    pub fn damage(&self, most: u16) -> Option<&'static str> {
        let Self { waiting, decided, next_tag, next_stag: _, most: held, used, unwritten, behind } = self;
        let last = waiting.keys().next_back().max(decided.keys().next_back());
        let stag_of = |w: &Waiting| match w.stage {
            Stage::Recorded { stag } | Stage::Unwritten { stag, .. } => Some(stag),
            Stage::Behind => None,
        };
        let tagged = waiting.values().filter_map(stag_of).count();
        let stage = |tag: &u64| waiting.get(tag).map(|w| (w.secure, w.stage));
        let count = |f: fn(&Stage) -> bool| waiting.values().filter(|w| f(&w.stage)).count();
        let rules = [
            (
                *next_tag == 0 || *next_tag > 1 << 63 || last.is_some_and(|tag| tag >= next_tag),
                "a stalled transaction has a tag from the future",
            ),
            (
                waiting.len() > MOST
                    || decided.len() > MOST
                    || *held != most
                    || used.len() > usize::from(most),
                "there are more stalled transactions than there can be",
            ),
            (
                waiting.keys().any(|tag| decided.contains_key(tag)),
                "a stalled transaction waits and is decided",
            ),
            (
                tagged != used.len()
                    || used.iter().any(|(stag, tag)| waiting.get(tag).and_then(stag_of) != Some(*stag)),
                "the STAGs in use and the stalled transactions do not agree",
            ),
            (
                count(|s| matches!(s, Stage::Unwritten { .. })) != unwritten.len()
                    || count(|s| *s == Stage::Behind) != behind.len()
                    || !unwritten.iter().all(|(secure, tag)| {
                        stage(tag)
                            .is_some_and(|(s, at)| s == *secure && matches!(at, Stage::Unwritten { .. }))
                    })
                    || !behind.iter().all(|tag| stage(tag).is_some_and(|(_, at)| at == Stage::Behind)),
                "the stalled transactions that wait are not those that are listed",
            ),
        ];
        rules.iter().find(|(bad, _)| *bad).map(|(_, what)| *what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(stag: u16) -> EventRecord {
        EventRecord([0x10, stag.into(), 0, 0])
    }

    fn stall(s: &mut Stalls, stream: u32) -> StallTag {
        let tag = s.wait((false, stream), 0, record);
        s.written(tag.0);
        tag
    }

    #[test]
    fn a_stag_counts_only_with_its_stream() {
        let mut s = Stalls::new(4);
        let tag = stall(&mut s, 7);
        let stag = s.list()[0].stag.unwrap();
        s.resume((false, 8), stag, Fate::Retry);
        s.resume((true, 7), stag, Fate::Retry);
        s.resume((false, 7), stag + 1, Fate::Retry);
        assert_eq!(s.ask(tag), StallState::Waiting);
        s.resume((false, 7), stag, Fate::Terminated { abort: false });
        assert_eq!(s.ask(tag), StallState::Terminated { abort: false });
        assert_eq!(s.ask(tag), StallState::Terminated { abort: true }, "the answer is given once");
    }

    #[test]
    fn one_more_than_stall_max_waits_without_a_stag_and_is_tried_again() {
        let mut s = Stalls::new(2);
        let (_a, b, c) = (stall(&mut s, 1), stall(&mut s, 1), stall(&mut s, 2));
        assert_eq!(s.list()[2].stag, None);
        let stag = s.list()[1].stag.unwrap();
        s.resume((false, 1), stag, Fate::Retry);
        assert_eq!((s.ask(b), s.ask(c)), (StallState::Retry, StallState::Retry));
        assert_eq!(s.list().len(), 1);
    }

    #[test]
    fn stags_in_use_are_passed_when_the_counter_turns() {
        let mut s = Stalls::new(3);
        let _first = stall(&mut s, 1);
        for _ in 0..70_000 {
            let tag = stall(&mut s, 2);
            let stag = s.list()[1].stag.unwrap();
            assert_ne!(stag, 0);
            s.resume((false, 2), stag, Fate::Retry);
            assert_eq!(s.ask(tag), StallState::Retry);
        }
    }

    #[test]
    fn an_unwritten_record_is_dropped_for_a_retry_once_something_was_invalidated() {
        let mut s = Stalls::new(8);
        let a = s.wait((false, 1), 5, record);
        assert!(s.has_unwritten(false) && !s.has_unwritten(true));
        assert_eq!(s.next_unwritten(false, 5), Some((a.0, record(0).0)));
        assert_eq!(s.next_unwritten(false, 6), None);
        assert_eq!(s.ask(a), StallState::Retry);
    }

    #[test]
    fn terminating_a_stream_leaves_others() {
        let mut s = Stalls::new(8);
        let (a, b) = (stall(&mut s, 1), stall(&mut s, 2));
        s.terminate(false, Some(1));
        assert_eq!((s.ask(a), s.ask(b)), (StallState::Terminated { abort: true }, StallState::Waiting));
        s.terminate(false, None);
        assert_eq!(s.ask(b), StallState::Terminated { abort: true });
        assert_eq!(s.damage(8), None);
        assert!(s.damage(9).is_some());
    }
}
