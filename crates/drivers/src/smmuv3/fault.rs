//! Faults that somebody waits for: stalled transactions and page requests, from the queues to whoever owns the address
//! space, and the answers back.
//!
//! [`FaultRouter::event`] takes what the event queue gives, [`FaultRouter::page`] what the page request queue gives.
//! Both ask [`Routes`] for the [`FaultHandler`], call it without a lock, and queue the answer:
//!
//! | [`FaultResponse`] | stalled transaction | page request group |
//! |---|---|---|
//! | resolved | RESUME, retry | success: the device asks for the translations again |
//! | terminate, or nobody owns the stream or substream | RESUME, abort | invalid request |
//! | deferred | waits for [`FaultRouter::answer_stall`] | waits for [`FaultRouter::answer_group`] |
//!
//! A page request group is answered as a whole, when its last request has come; until then its parts wait here. Both
//! waiting rooms are bounded. A group that has too many parts loses some, a group too many pushes the oldest out,
//! and so does an overflow of the queue with all unfinished ones, whose last request the SMMU may have answered
//! itself: in all three cases the device does not get the translation and asks again. A stalled transaction too
//! many is aborted. RESUME and PRI_RESP need no CMD_SYNC (Linux waits for none either).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::{Access, Iova, StreamId, SubstreamId};
use spin::Mutex;

use super::cmdq::CommandQueue;
use super::cmdq::commands::{PageResponse, StallAnswer, pri_resp, resume};
use super::evtq::{Event, Lost, Record};
use super::priq::{Page, PageRequest};
use super::{Error, Platform};
use crate::fault::{FaultDetail, FaultHandler, FaultReason, FaultReport, FaultResponse};

/// Where answers go.
pub trait Answers {
    /// Queues commands.
    fn queue(&self, commands: &[Command]) -> Result<(), Error>;
}

impl<P: Platform> Answers for CommandQueue<P> {
    fn queue(&self, commands: &[Command]) -> Result<(), Error> {
        self.issue(commands)
    }
}

/// Who owns what, and who wants to know. Called without a lock of the router.
pub trait Routes {
    /// Who answers for a stream, or for one substream of it; `None` if nobody uses it.
    fn handler(&self, stream: StreamId, substream: Option<SubstreamId>) -> Option<Arc<dyn FaultHandler>>;
    /// Every fault, before its handler is asked.
    fn report(&self, report: &FaultReport) {
        let _ = report;
    }
    /// Records of a queue were lost.
    fn lost(&self, queue: Source, lost: Lost) {
        let _ = (queue, lost);
    }
    /// A device has stopped using a substream.
    fn stopped(&self, stream: StreamId, substream: SubstreamId) {
        let _ = (stream, substream);
    }
}

/// Which queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The event queue.
    Events,
    /// The page request queue.
    PageRequests,
}

/// Which transactions of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Whose {
    /// All.
    All,
    /// Those without a substream.
    Main,
    /// Those of one substream.
    Substream(SubstreamId),
}

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Stalled transactions without an answer (IDR5.STALL_MAX, or less).
    pub stalls: usize,
    /// Page request groups, unfinished or without an answer.
    pub groups: usize,
    /// Requests of one group.
    pub group_requests: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { stalls: 1024, groups: 512, group_requests: 64 }
    }
}

type GroupKey = (u32, Option<u32>, u16);

#[derive(Debug)]
struct Group {
    requests: Vec<PageRequest>,
    /// Complete and shown to the handler, which has not answered.
    deferred: bool,
    /// Order of arrival.
    number: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By stream and tag.
    stalls: BTreeMap<(u32, u16), Record>,
    groups: BTreeMap<GroupKey, Group>,
    arrivals: u64,
}

/// See the module.
#[derive(Debug)]
pub struct FaultRouter {
    limits: Limits,
    waiting: Mutex<Waiting>,
}

fn key(stream: StreamId, substream: Option<SubstreamId>, group: u16) -> GroupKey {
    (stream.get(), substream.map(SubstreamId::get), group)
}

impl FaultRouter {
    /// A router that nothing waits in.
    pub fn new(limits: Limits) -> Self {
        Self { limits, waiting: Mutex::default() }
    }

    /// Stalled transactions that wait for an answer.
    pub fn stalled(&self) -> usize {
        self.waiting.lock().stalls.len()
    }

    /// Page request groups that wait for their last request or for an answer.
    pub fn groups(&self) -> usize {
        self.waiting.lock().groups.len()
    }

    /// Takes an event. An error means that the answer could not be queued: the transaction still waits, for
    /// [`answer_stall`](Self::answer_stall).
    pub fn event(&self, answers: &impl Answers, routes: &impl Routes, event: &Event) -> Result<(), Error> {
        let record = match event {
            Event::Lost(lost) => {
                routes.lost(Source::Events, *lost);
                return Ok(());
            }
            Event::Record(record) => record,
        };
        let room = record.stall.is_none_or(|stag| self.admit_stall(record, stag));
        let report = event_report(record);
        routes.report(&report);
        let handler = routes.handler(record.stream, record.substream);
        let response = match handler {
            Some(handler) if room => handler.fault(&report),
            Some(_) | None => FaultResponse::Terminate,
        };
        match (record.stall, response) {
            (None, _) | (_, FaultResponse::Deferred) => Ok(()),
            (Some(stag), response) if room => self.answer_stall(answers, record.stream, stag, response),
            (Some(stag), _) => answers.queue(&[resume(record.stream, stag, StallAnswer::Abort)]),
        }
    }

    /// Before the handler is called: it may pass the fault to a thread that answers at once.
    fn admit_stall(&self, record: &Record, stag: u16) -> bool {
        let mut waiting = self.waiting.lock();
        let place = (record.stream.get(), stag);
        // A tag comes again only after its answer, so an entry of that name is one whose answer got lost.
        let room = waiting.stalls.len() < self.limits.stalls || waiting.stalls.contains_key(&place);
        if room {
            waiting.stalls.insert(place, *record);
        }
        room
    }

    /// Answers a stalled transaction. [`FaultResponse::Deferred`] leaves it as it is.
    pub fn answer_stall(
        &self,
        answers: &impl Answers,
        stream: StreamId,
        stag: u16,
        response: FaultResponse,
    ) -> Result<(), Error> {
        let answer = match response {
            FaultResponse::Resolved => StallAnswer::Retry,
            FaultResponse::Terminate => StallAnswer::Abort,
            FaultResponse::Deferred => return Ok(()),
        };
        let place = (stream.get(), stag);
        let Some(record) = self.waiting.lock().stalls.remove(&place) else {
            return Err(Error::NothingStalled { stream, stag });
        };
        let queued = answers.queue(&[resume(stream, stag, answer)]);
        if queued.is_err() {
            self.waiting.lock().stalls.entry(place).or_insert(record);
        }
        queued
    }

    /// Takes a page request, a stop marker or an overflow. An error means that the answer could not be queued: the group
    /// still waits, for [`answer_group`](Self::answer_group).
    pub fn page(&self, answers: &impl Answers, routes: &impl Routes, page: &Page) -> Result<(), Error> {
        match page {
            Page::Lost(lost) => {
                self.waiting.lock().groups.retain(|_, group| group.deferred);
                routes.lost(Source::PageRequests, *lost);
                Ok(())
            }
            Page::Stop { stream, substream, .. } => {
                self.drop_unfinished(*stream, Some(*substream));
                routes.stopped(*stream, *substream);
                Ok(())
            }
            Page::Request(request) if !request.last => {
                self.hold(*request);
                Ok(())
            }
            Page::Request(request) => self.finish(answers, routes, *request),
        }
    }

    fn drop_unfinished(&self, stream: StreamId, substream: Option<SubstreamId>) {
        let whose = (stream.get(), substream.map(SubstreamId::get));
        self.waiting
            .lock()
            .groups
            .retain(|&(stream, substream, _), group| group.deferred || (stream, substream) != whose);
    }

    /// Makes room for a group, if need be by dropping the oldest unfinished one: devices that never finish theirs must
    /// not keep others out.
    fn make_room(&self, groups: &mut BTreeMap<GroupKey, Group>) -> bool {
        if groups.len() >= self.limits.groups {
            let unfinished = groups.iter().filter(|(_, group)| !group.deferred);
            let Some((&oldest, _)) = unfinished.min_by_key(|(_, group)| group.number) else { return false };
            groups.remove(&oldest);
        }
        true
    }

    /// Adds a request to its group.
    fn hold(&self, request: PageRequest) {
        let mut waiting = self.waiting.lock();
        let Waiting { groups, arrivals, .. } = &mut *waiting;
        let key = key(request.stream, request.substream, request.group);
        if !groups.contains_key(&key) && !self.make_room(groups) {
            return;
        }
        let group = groups.entry(key).or_insert_with(|| {
            *arrivals += 1;
            Group { requests: Vec::new(), deferred: false, number: *arrivals }
        });
        if group.requests.len() < self.limits.group_requests {
            group.requests.push(request);
        }
    }

    /// The last request of a group has come.
    fn finish(&self, answers: &impl Answers, routes: &impl Routes, last: PageRequest) -> Result<(), Error> {
        let PageRequest { stream, substream, group, .. } = last;
        let key = key(stream, substream, group);
        let (requests, room) = {
            let mut waiting = self.waiting.lock();
            let Waiting { groups, arrivals, .. } = &mut *waiting;
            let mut requests = groups.remove(&key).map_or_else(Vec::new, |group| group.requests);
            requests.push(last);
            // Entered as deferred before the handler is called: it may pass the requests to a thread that answers at
            // once.
            let room = self.make_room(groups);
            if room {
                *arrivals += 1;
                groups.insert(key, Group { requests: Vec::new(), deferred: true, number: *arrivals });
            }
            (requests, room)
        };
        let mut response = Some(PageResponse::Success);
        for request in &requests {
            let report = page_report(request);
            routes.report(&report);
            let handler = routes.handler(stream, substream);
            let answer = handler.map_or(FaultResponse::Terminate, |handler| handler.fault(&report));
            response = match (response, answer) {
                (Some(PageResponse::Invalid), _) | (_, FaultResponse::Terminate) => {
                    Some(PageResponse::Invalid)
                }
                (None, _) | (_, FaultResponse::Deferred) => None,
                (Some(response), FaultResponse::Resolved) => Some(response),
            };
        }
        match response {
            None if room => Ok(()),
            // No room to wait: the device asks again.
            None => answers.queue(&[pri_resp(stream, substream, group, PageResponse::Success)]),
            Some(response) if room => self.answer_group(answers, stream, substream, group, response),
            Some(response) => answers.queue(&[pri_resp(stream, substream, group, response)]),
        }
    }

    /// Answers a page request group.
    pub fn answer_group(
        &self,
        answers: &impl Answers,
        stream: StreamId,
        substream: Option<SubstreamId>,
        group: u16,
        response: PageResponse,
    ) -> Result<(), Error> {
        let key = key(stream, substream, group);
        let entry = {
            let mut waiting = self.waiting.lock();
            match waiting.groups.get(&key) {
                Some(found) if found.deferred => waiting.groups.remove(&key),
                _ => None,
            }
        };
        let Some(entry) = entry else { return Err(Error::NothingRequested { stream, group }) };
        let queued = answers.queue(&[pri_resp(stream, substream, group, response)]);
        if queued.is_err() {
            self.waiting.lock().groups.entry(key).or_insert(entry);
        }
        queued
    }

    /// Every stalled transaction has ended, because translation was turned off: there is nothing to answer.
    pub fn forget_stalls(&self) {
        self.waiting.lock().stalls.clear();
    }

    /// Answers whatever a deferred report was about.
    pub fn answer(
        &self,
        answers: &impl Answers,
        report: &FaultReport,
        response: FaultResponse,
    ) -> Result<(), Error> {
        match (report.detail, response) {
            (FaultDetail::SmmuV3Event(Record { stream, stall: Some(stag), .. }), response) => {
                self.answer_stall(answers, stream, stag, response)
            }
            (FaultDetail::SmmuV3Page(_), FaultResponse::Deferred) => Ok(()),
            (FaultDetail::SmmuV3Page(PageRequest { stream, substream, group, .. }), response) => {
                let response = match response {
                    FaultResponse::Resolved => PageResponse::Success,
                    FaultResponse::Terminate | FaultResponse::Deferred => PageResponse::Invalid,
                };
                self.answer_group(answers, stream, substream, group, response)
            }
            // Nothing waits.
            _ => Ok(()),
        }
    }

    /// Answers everything that waits for a stream, or for a part of it, with a refusal: before it is taken from its
    /// owner. What comes later finds no handler.
    pub fn refuse(&self, answers: &impl Answers, stream: StreamId, whose: Whose) -> Result<(), Error> {
        let whose = |candidate: Option<u32>| match whose {
            Whose::All => true,
            Whose::Main => candidate.is_none(),
            Whose::Substream(substream) => candidate == Some(substream.get()),
        };
        let (stalls, groups): (Vec<_>, Vec<_>) = {
            let mut waiting = self.waiting.lock();
            waiting.groups.retain(|&(s, sub, _), group| group.deferred || s != stream.get() || !whose(sub));
            let stalls = waiting.stalls.iter();
            let stalls = stalls.filter(|((s, _), record)| {
                *s == stream.get() && whose(record.substream.map(SubstreamId::get))
            });
            let groups = waiting.groups.keys().filter(|(s, sub, _)| *s == stream.get() && whose(*sub));
            (stalls.map(|((_, stag), _)| *stag).collect(), groups.copied().collect())
        };
        // Somebody else answering in the meantime is as good.
        let unless_answered = |result| match result {
            Err(Error::NothingStalled { .. } | Error::NothingRequested { .. }) => Ok(()),
            other => other,
        };
        let mut result = Ok(());
        for stag in stalls {
            let answered = self.answer_stall(answers, stream, stag, FaultResponse::Terminate);
            result = result.and(unless_answered(answered));
        }
        for (_, substream, group) in groups {
            let substream = substream.map(SubstreamId);
            let answered = self.answer_group(answers, stream, substream, group, PageResponse::Invalid);
            result = result.and(unless_answered(answered));
        }
        result
    }
}

/// An event as a report.
pub fn event_report(record: &Record) -> FaultReport {
    let wanted = record.wanted;
    FaultReport {
        reason: record.fault_reason(),
        stream: Some(record.stream),
        substream: record.substream,
        iova: record.input.unwrap_or(Iova(0)),
        ipa: record.ipa,
        access: wanted.map_or(Access::Read, |wanted| wanted.access),
        privileged: wanted.is_some_and(|wanted| wanted.privileged),
        instruction: wanted.is_some_and(|wanted| wanted.instruction),
        stage: record.stage,
        level: None,
        bank: None,
        stalled: record.stall.is_some(),
        detail: FaultDetail::SmmuV3Event(*record),
    }
}

/// A page request as a report; it counts as stalled because somebody waits.
pub fn page_report(request: &PageRequest) -> FaultReport {
    FaultReport {
        reason: FaultReason::Translation,
        stream: Some(request.stream),
        substream: request.substream,
        iova: request.address,
        ipa: None,
        access: if request.write { Access::Write } else { Access::Read },
        privileged: request.privileged,
        instruction: request.execute,
        stage: None,
        level: None,
        bank: None,
        stalled: true,
        detail: FaultDetail::SmmuV3Page(*request),
    }
}

#[cfg(test)]
mod tests;
