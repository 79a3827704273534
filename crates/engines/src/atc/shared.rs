//! What the device's ports and the SMMU share: the cache, the marks of accesses under way, the page requests.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Iova, SubstreamId};
use portcullis_bus::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, Initiator, PageGroupResponse, PageRequest,
    StallState, StallTag,
};
use serde::{Deserialize, Serialize};

use super::AtcConfig;
use super::cache::{Block, Cache, Key, Range};
use super::pages::{Limits, Pages};
use crate::RestoreError;

const VERSION: u32 = 1;

/// Set in the tickets of invalidations that a hung device never saw.
const UNSEEN: u64 = 1 << 63;

/// What an ATC has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtcStats {
    /// Accesses (or parts of one, per block) that found their translation.
    pub hits: u64,
    /// Translation requests sent.
    pub requests: u64,
    /// Translation requests that were answered UR.
    pub unsupported: u64,
    /// Translation requests that were answered CA.
    pub aborted: u64,
    /// Translations granted with a size that no completion can carry.
    pub malformed: u64,
    /// Translations forgotten for want of room.
    pub evicted: u64,
    /// Invalidations carried out.
    pub invalidations: u64,
    /// Page requests sent.
    pub page_requests: u64,
    /// Page responses to no outstanding group (status bit UPRGI of the PRI capability).
    pub unexpected_responses: u64,
}

/// An access under way.
#[derive(Clone, Copy, Debug)]
struct Mark {
    key: Key,
    /// The input addresses whose translation it uses; everything, while the translation is still being asked for.
    range: Range,
    /// The first invalidation that took this translation away: it is not done before the access is.
    first_hit: Option<u64>,
}

struct State {
    cache: Cache,
    pages: Pages,
    ats: bool,
    hung: bool,
    /// One place per port; a free place is `None`.
    marks: Vec<Option<Place>>,
    next_ticket: u64,
    stats: AtcStats,
}

#[derive(Default)]
struct Place {
    mark: Option<Mark>,
}

/// The translation cache of one device function: the SMMU's end ([`AtsDevice`]) of every [`AtcPort`](super::AtcPort)
/// of the function, and the knobs that software has in configuration space.
pub struct AtcShared {
    config: AtcConfig,
    state: Mutex<State>,
}

/// What an access finds before it goes out.
pub(super) enum Found {
    /// ATS is off: the access goes untranslated.
    Off,
    /// A translation; the access is marked.
    Hit(Block),
    /// None: ask. The access is marked.
    Ask,
}

impl AtcShared {
    /// An empty ATC.
    pub fn new(config: AtcConfig) -> Arc<Self> {
        let state = State {
            cache: Cache::new(config.capacity),
            pages: Pages::new(config.pri),
            ats: config.ats,
            hung: false,
            marks: Vec::new(),
            next_ticket: 1,
            stats: AtcStats::default(),
        };
        Arc::new(Self { config, state: Mutex::new(state) })
    }

    /// What the ATC was built with.
    pub fn config(&self) -> &AtcConfig {
        &self.config
    }

    /// Sets or clears the Enable bit of the ATS capability. While it is clear, accesses go out untranslated; clearing it
    /// empties the cache.
    pub fn enable_ats(&self, enabled: bool) {
        let mut s = self.lock();
        s.ats = enabled;
        if !enabled {
            s.cache.clear();
        }
    }

    /// Sets or clears the Enable bit of the PRI capability. Enabling it after a Response Failure makes page requests
    /// possible again; transactions that waited for lost answers are terminated.
    pub fn enable_pri(&self, enabled: bool) {
        self.lock().pages.enable(enabled);
    }

    /// True after a Response Failure, until page requests are enabled again (status bit RF of the PRI capability).
    pub fn pri_failed(&self) -> bool {
        self.lock().pages.failed()
    }

    /// Makes the device stop answering invalidations while it goes on with its DMA, or lets it answer again: for tests of
    /// what software does about a broken device. Its translations stay in use while it hangs; when it answers again it
    /// forgets all of them, but the invalidations it missed stay timed out.
    pub fn hang(&self, hung: bool) {
        let mut s = self.lock();
        if s.hung && !hung {
            s.cache.clear();
        }
        s.hung = hung;
    }

    /// Translations that are cached now.
    pub fn cached(&self) -> usize {
        self.lock().cache.len()
    }

    /// Page request groups that wait for an answer.
    pub fn outstanding_page_requests(&self) -> usize {
        self.lock().pages.outstanding()
    }

    /// What the ATC has done so far.
    pub fn stats(&self) -> AtcStats {
        self.lock().stats
    }

    /// The state now. Cached translations are not part of it: an empty cache is always right.
    pub fn save(&self) -> AtcState {
        let s = self.lock();
        let State { cache: _, pages, ats, hung, marks: _, next_ticket, stats } = &*s;
        AtcState {
            version: VERSION,
            pages: pages.clone(),
            ats: *ats,
            hung: *hung,
            next_ticket: *next_ticket,
            stats: *stats,
        }
    }

    /// Continues from a saved state, with an empty cache. On an error nothing changes. No access may be under way.
    pub fn restore(&self, state: AtcState) -> Result<(), RestoreError> {
        let AtcState { version, pages, ats, hung, next_ticket, stats } = state;
        if version != VERSION {
            return Err(RestoreError::Version { found: version, expected: VERSION });
        }
        pages.check(self.limits())?;
        if next_ticket & UNSEEN != 0 {
            return Err(RestoreError::Impossible("a next invalidation ticket out of range"));
        }
        let mut s = self.lock();
        s.cache.clear();
        (s.pages, s.ats, s.hung, s.next_ticket, s.stats) = (pages, ats, hung, next_ticket, stats);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> Limits {
        Limits { requests: usize::from(self.config.page_requests), stalled: self.config.stalled }
    }

    /// A place for the marks of a new port.
    pub(super) fn plug(&self) -> usize {
        let mut s = self.lock();
        let free = s.marks.iter().position(Option::is_none);
        let place = free.unwrap_or_else(|| {
            s.marks.push(None);
            s.marks.len() - 1
        });
        if let Some(p) = s.marks.get_mut(place) {
            *p = Some(Place::default());
        }
        place
    }

    pub(super) fn unplug(&self, place: usize) {
        if let Some(p) = self.lock().marks.get_mut(place) {
            *p = None;
        }
    }

    /// Begins an access: looks its translation up and marks it.
    pub(super) fn begin(&self, place: usize, from: &Initiator, addr: Iova, write: bool) -> Found {
        let mut s = self.lock();
        if !s.ats {
            return Found::Off;
        }
        let key = Key::of(from);
        let hit = s.cache.look_up(key, addr.get());
        let hit = hit.filter(|b| b.allows(write, from.attrs.instruction()));
        match hit {
            Some(_) => s.stats.hits += 1,
            None => s.stats.requests += 1,
        }
        // An answer that is still to come may be for any block around the address and for every substream.
        let (key, range) = hit.map_or((key.global(), Range::ALL), |b| (b.owner(key), b.range));
        s.mark(place, Some(Mark { key, range, first_hit: None }));
        hit.map_or(Found::Ask, Found::Hit)
    }

    /// A translation was granted to the access that is marked at `place`. It is kept, unless it was taken away while the
    /// answer was on its way.
    pub(super) fn granted(&self, place: usize, from: &Initiator, block: Block) {
        let mut s = self.lock();
        let ats = s.ats;
        let Some(mark) = s.marks.get_mut(place).and_then(Option::as_mut).and_then(|p| p.mark.as_mut()) else {
            return;
        };
        if mark.first_hit.is_some() || !ats {
            return;
        }
        let key = Key::of(from);
        (mark.key, mark.range) = (block.owner(key), block.range);
        s.stats.evicted += s.cache.insert(key, block);
    }

    /// Ends the access that is marked at `place`.
    pub(super) fn end(&self, place: usize) {
        self.lock().mark(place, None);
    }

    /// A translation request came back without a translation.
    pub(super) fn refused(&self, count: impl FnOnce(&mut AtcStats) -> &mut u64) {
        let mut s = self.lock();
        *count(&mut s.stats) += 1;
    }

    /// A transaction has not the access it needs: the tag it waits with and the page request to send, or `None` if it
    /// cannot wait.
    pub(super) fn park(
        &self,
        from: &Initiator,
        addr: Iova,
        write: bool,
    ) -> Option<(StallTag, Option<PageRequest>)> {
        let mut s = self.lock();
        if !s.pages.usable() {
            return None;
        }
        let parked = s.pages.park(self.limits(), from, addr, write);
        s.stats.page_requests += u64::from(matches!(parked, Some((_, Some(_)))));
        parked
    }

    pub(super) fn stall_state(&self, tag: StallTag) -> (StallState, Option<PageRequest>) {
        let mut s = self.lock();
        let answer = s.pages.state(self.limits(), tag);
        s.stats.page_requests += u64::from(answer.1.is_some());
        answer
    }

    pub(super) fn stop(&self, substream: SubstreamId) {
        self.lock().pages.stop(substream);
    }
}

impl State {
    fn mark(&mut self, place: usize, mark: Option<Mark>) {
        if let Some(p) = self.marks.get_mut(place).and_then(Option::as_mut) {
            p.mark = mark;
        }
    }

    fn marked(&mut self) -> impl Iterator<Item = &mut Mark> {
        self.marks.iter_mut().flatten().filter_map(|p| p.mark.as_mut())
    }
}

impl AtsDevice for AtcShared {
    fn invalidate(&self, what: AtcInvalidation) -> AtcTicket {
        let mut s = self.lock();
        let ticket = s.next_ticket;
        s.next_ticket = s.next_ticket.wrapping_add(1) & !UNSEEN;
        if s.hung {
            return AtcTicket(ticket | UNSEEN);
        }
        let range = Range::around(what.addr, what.size_log2);
        s.cache.invalidate(&what, range);
        s.stats.invalidations += 1;
        let hit = s.marked().filter(|m| m.key.tag.is_hit_by(&what) && m.range.overlaps(range));
        for mark in hit {
            mark.first_hit.get_or_insert(ticket);
        }
        AtcTicket(ticket)
    }

    fn completion(&self, ticket: AtcTicket) -> AtcCompletion {
        let mut s = self.lock();
        if s.hung || ticket.0 & UNSEEN != 0 {
            return AtcCompletion::TimedOut;
        }
        if ticket.0 >= s.next_ticket {
            return AtcCompletion::Done;
        }
        // An access that an earlier invalidation hit keeps later ones pending as well: they complete in order.
        if s.marked().any(|m| m.first_hit.is_some_and(|first| first <= ticket.0)) {
            return AtcCompletion::Pending;
        }
        AtcCompletion::Done
    }

    fn page_response(&self, response: PageGroupResponse) {
        let mut s = self.lock();
        if !s.pages.respond(&response) {
            s.stats.unexpected_responses += 1;
        }
    }
}

/// Everything about an ATC that changes at run time, except the translations it could ask for again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtcState {
    version: u32,
    pages: Pages,
    ats: bool,
    hung: bool,
    next_ticket: u64,
    stats: AtcStats,
}
