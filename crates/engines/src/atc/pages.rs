//! Page requests: which groups wait for an answer, and which transactions wait for a group.

use std::collections::{BTreeMap, BTreeSet};

use portcullis_arch::{Attributes, Iova, StreamId, SubstreamId};
use portcullis_bus::{Initiator, PageGroupResponse, PageRequest, PageResponse, StallState, StallTag};
use serde::{Deserialize, Serialize};

use crate::RestoreError;

/// Set in every tag that an ATC gives out, so that it is never one of the IOMMU's.
pub(super) const TAG_BIT: u64 = 1 << 63;

const GROUPS: u16 = PageRequest::MAX_GROUP + 1;

/// What a transaction needs, in a shape that can be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Need {
    stream: u32,
    substream: Option<u32>,
    attrs: u32,
    addr: u64,
    write: bool,
}

impl Need {
    fn new(from: &Initiator, addr: Iova, write: bool) -> Self {
        Self {
            stream: from.stream.get(),
            substream: from.substream.map(SubstreamId::get),
            attrs: from.attrs.bits(),
            addr: addr.get(),
            write,
        }
    }

    fn request(&self, group: u16) -> PageRequest {
        let attrs = Attributes::from_bits(self.attrs);
        PageRequest {
            from: Initiator {
                stream: StreamId(self.stream),
                substream: self.substream.map(SubstreamId),
                attrs,
            },
            addr: Iova(self.addr & !0xfff),
            read: !self.write,
            write: self.write,
            execute: !self.write && attrs.instruction(),
            privileged: attrs.privileged(),
            group,
            last: true,
        }
    }
}

/// Where one stalled transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Wait {
    /// For a group number to become free.
    Group,
    /// For the answer to its group.
    Answer(u16),
    /// For the engine to ask: go on.
    Retry,
    /// For the engine to ask: it is over.
    Terminated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Waiting {
    need: Need,
    wait: Wait,
}

/// What a device's page request interface remembers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pages {
    enabled: bool,
    /// A response said that the interface failed; nothing is sent until software enables it again.
    failed: bool,
    /// By tag, so the oldest is first.
    waiting: BTreeMap<u64, Waiting>,
    /// Groups that have been sent and not answered.
    outstanding: BTreeMap<u16, Option<u32>>,
    next_group: u16,
    next_tag: u64,
}

impl Pages {
    pub(super) fn new(enabled: bool) -> Self {
        Self {
            enabled,
            failed: false,
            waiting: BTreeMap::new(),
            outstanding: BTreeMap::new(),
            next_group: 0,
            next_tag: 1,
        }
    }

    pub(super) fn usable(&self) -> bool {
        self.enabled && !self.failed
    }

    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Software sets or clears the Enable bit of the PRI capability.
    pub(super) fn enable(&mut self, enabled: bool) {
        if enabled && (self.failed || !self.enabled) {
            self.failed = false;
            // What was sent before has been abandoned with the interface.
            self.outstanding.clear();
            self.terminate(|w| matches!(w, Wait::Answer(_)));
        }
        self.enabled = enabled;
        if !enabled {
            self.terminate(|w| w == Wait::Group);
        }
    }

    fn terminate(&mut self, which: impl Fn(Wait) -> bool) {
        for w in self.waiting.values_mut().filter(|w| which(w.wait)) {
            w.wait = Wait::Terminated;
        }
    }

    /// A transaction needs a page. The tag it waits with and the request to send now, if any; `None` if there is no room.
    pub(super) fn park(
        &mut self,
        limits: Limits,
        from: &Initiator,
        addr: Iova,
        write: bool,
    ) -> Option<(StallTag, Option<PageRequest>)> {
        if self.waiting.len() >= limits.stalled {
            // An engine that was reset never asks for what it left behind: that goes first.
            let settled = |w: &Waiting| matches!(w.wait, Wait::Retry | Wait::Terminated);
            let abandoned = self.waiting.iter().find(|(_, w)| settled(w)).map(|(tag, _)| *tag)?;
            self.waiting.remove(&abandoned);
        }
        let tag = self.next_tag | TAG_BIT;
        self.next_tag = self.next_tag.wrapping_add(1) & !TAG_BIT;
        self.waiting.insert(tag, Waiting { need: Need::new(from, addr, write), wait: Wait::Group });
        Some((StallTag(tag), self.send(limits, tag)))
    }

    /// Gives the transaction `tag` a group if it waits for one and one is free.
    fn send(&mut self, limits: Limits, tag: u64) -> Option<PageRequest> {
        let usable = self.usable();
        let w = self.waiting.get_mut(&tag).filter(|w| usable && w.wait == Wait::Group)?;
        if self.outstanding.len() >= limits.requests {
            return None;
        }
        let mut groups = (0..GROUPS).map(|i| self.next_group.wrapping_add(i) % GROUPS);
        let group = groups.find(|g| !self.outstanding.contains_key(g))?;
        self.next_group = (group + 1) % GROUPS;
        self.outstanding.insert(group, w.need.substream);
        w.wait = Wait::Answer(group);
        Some(w.need.request(group))
    }

    /// What became of a transaction, and the page request that can be sent now.
    pub(super) fn state(&mut self, limits: Limits, tag: StallTag) -> (StallState, Option<PageRequest>) {
        let over = StallState::Terminated { abort: true };
        let Some(w) = self.waiting.get(&tag.0) else { return (over, None) };
        let state = match w.wait {
            Wait::Group | Wait::Answer(_) => StallState::Waiting,
            Wait::Retry => StallState::Retry,
            Wait::Terminated => over,
        };
        if state == StallState::Waiting {
            return (state, self.send(limits, tag.0));
        }
        self.waiting.remove(&tag.0);
        (state, None)
    }

    /// Takes an answer. False if no such group is outstanding.
    pub(super) fn respond(&mut self, response: &PageGroupResponse) -> bool {
        let Some(&substream) = self.outstanding.get(&response.group) else { return false };
        if self.failed || response.substream.is_some_and(|s| substream != Some(s.get())) {
            return false;
        }
        self.outstanding.remove(&response.group);
        let decided = match response.code {
            PageResponse::Success => Wait::Retry,
            PageResponse::Invalid | PageResponse::Failure => Wait::Terminated,
        };
        for w in self.waiting.values_mut().filter(|w| w.wait == Wait::Answer(response.group)) {
            w.wait = decided;
        }
        if response.code == PageResponse::Failure {
            self.failed = true;
            self.terminate(|w| matches!(w, Wait::Group | Wait::Answer(_)));
        }
        true
    }

    /// A substream stops: what has not been sent for it never will be.
    pub(super) fn stop(&mut self, substream: SubstreamId) {
        for w in self.waiting.values_mut().filter(|w| w.need.substream == Some(substream.get())) {
            if w.wait == Wait::Group {
                w.wait = Wait::Terminated;
            }
        }
    }

    /// Checks a restored state against what this device can hold.
    pub(super) fn check(&self, limits: Limits) -> Result<(), RestoreError> {
        let groups = self.waiting.values().filter_map(|w| match w.wait {
            Wait::Answer(g) => Some(g),
            _ => None,
        });
        let groups: Vec<u16> = groups.collect();
        let distinct: BTreeSet<&u16> = groups.iter().collect();
        let rules = [
            (self.waiting.len() > limits.stalled, "more stalled transactions than the ATC holds"),
            (
                self.outstanding.len() > limits.requests,
                "more page requests than the ATC may have outstanding",
            ),
            (self.outstanding.keys().any(|g| *g >= GROUPS), "a page request group above 511"),
            (self.next_group >= GROUPS, "a next page request group above 511"),
            (self.waiting.keys().any(|t| t & TAG_BIT == 0), "a stall tag that is not the ATC's"),
            (distinct.len() != groups.len(), "two transactions that wait for one group"),
        ];
        match rules.iter().find(|r| r.0) {
            Some((_, what)) => Err(RestoreError::Impossible(what)),
            None => Ok(()),
        }
    }
}

/// How much may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) requests: usize,
    pub(super) stalled: usize,
}
