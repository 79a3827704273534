//! Routing of stalls and page requests.

use alloc::vec;

use portcullis_arch::Iova;
use portcullis_arch::smmuv3::EventRecord;

use super::*;
use crate::smmuv3::cmdq::commands::pri_resp;

/// Commands that would be queued, or a failure to queue them.
#[derive(Default)]
struct Sent {
    commands: Mutex<Vec<Command>>,
    full: Mutex<bool>,
}

impl Answers for Sent {
    fn queue(&self, commands: &[Command]) -> Result<(), Error> {
        if *self.full.lock() {
            return Err(Error::QueueTooSmall { wanted: commands.len(), room: 0 });
        }
        self.commands.lock().extend_from_slice(commands);
        Ok(())
    }
}

impl Sent {
    fn take(&self) -> Vec<Command> {
        core::mem::take(&mut self.commands.lock())
    }
}

/// Streams below 100 have an owner, for substreams below 10.
struct Owners {
    handler: Arc<dyn FaultHandler>,
    reports: Mutex<Vec<FaultReport>>,
    lost: Mutex<Vec<(Source, Lost)>>,
    stopped: Mutex<Vec<(StreamId, SubstreamId)>>,
}

impl Owners {
    fn answering(response: FaultResponse) -> Self {
        Self::asking(move |_: &FaultReport| response)
    }
    fn asking(handler: impl FaultHandler + 'static) -> Self {
        Self {
            handler: Arc::new(handler),
            reports: Mutex::default(),
            lost: Mutex::default(),
            stopped: Mutex::default(),
        }
    }
}

impl Routes for Owners {
    fn handler(&self, stream: StreamId, substream: Option<SubstreamId>) -> Option<Arc<dyn FaultHandler>> {
        let known = stream.get() < 100 && substream.is_none_or(|substream| substream.get() < 10);
        known.then(|| self.handler.clone())
    }
    fn report(&self, report: &FaultReport) {
        self.reports.lock().push(*report);
    }
    fn lost(&self, queue: Source, lost: Lost) {
        self.lost.lock().push((queue, lost));
    }
    fn stopped(&self, stream: StreamId, substream: SubstreamId) {
        self.stopped.lock().push((stream, substream));
    }
}

/// F_TRANSLATION, stalled or not.
fn event(stream: u32, stag: Option<u16>) -> Event {
    let dw1 = stag.map_or(0, |stag| u64::from(stag) | 1 << 31);
    Event::Record(Record::decode(EventRecord([u64::from(stream) << 32 | 0x10, dw1 | 2 << 40, 0x1234, 0])))
}

fn request(stream: u32, substream: Option<u32>, group: u16, last: bool) -> PageRequest {
    PageRequest {
        stream: StreamId(stream),
        substream: substream.map(SubstreamId),
        address: Iova(0x5000),
        read: true,
        write: false,
        execute: false,
        privileged: false,
        group,
        last,
    }
}

fn page(stream: u32, substream: Option<u32>, group: u16, last: bool) -> Page {
    Page::Request(request(stream, substream, group, last))
}

fn router() -> FaultRouter {
    FaultRouter::new(Limits::default())
}

#[test]
fn a_stall_is_answered_as_its_handler_says() {
    let cases = [
        (FaultResponse::Resolved, 5, Some(StallAnswer::Retry)),
        (FaultResponse::Terminate, 5, Some(StallAnswer::Abort)),
        (FaultResponse::Deferred, 5, None),
        // Nobody owns the stream.
        (FaultResponse::Resolved, 100, Some(StallAnswer::Abort)),
    ];
    for (response, stream, answer) in cases {
        let (router, sent, owners) = (router(), Sent::default(), Owners::answering(response));
        router.event(&sent, &owners, &event(stream, Some(0x77))).unwrap();
        let expected: Vec<_> =
            answer.into_iter().map(|answer| resume(StreamId(stream), 0x77, answer)).collect();
        assert_eq!(sent.take(), expected);
        assert_eq!(router.stalled(), usize::from(answer.is_none()));
        assert!(owners.reports.lock()[0].stalled);
    }
}

#[test]
fn a_fault_that_does_not_wait_is_reported_and_not_answered() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Resolved));
    router.event(&sent, &owners, &event(5, None)).unwrap();
    assert_eq!((sent.take(), owners.reports.lock().len()), (vec![], 1));
    router.event(&sent, &owners, &Event::Lost(Lost::Overflow)).unwrap();
    assert_eq!(*owners.lost.lock(), [(Source::Events, Lost::Overflow)]);
}

#[test]
fn a_deferred_stall_is_answered_once_and_later() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Deferred));
    router.event(&sent, &owners, &event(5, Some(1))).unwrap();
    let report = owners.reports.lock()[0];
    router.answer(&sent, &report, FaultResponse::Deferred).unwrap();
    router.answer(&sent, &report, FaultResponse::Resolved).unwrap();
    assert_eq!(sent.take(), [resume(StreamId(5), 1, StallAnswer::Retry)]);
    let again = router.answer(&sent, &report, FaultResponse::Resolved);
    assert_eq!(again, Err(Error::NothingStalled { stream: StreamId(5), stag: 1 }));
}

#[test]
fn an_answer_that_cannot_be_queued_is_kept_for_another_try() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Resolved));
    *sent.full.lock() = true;
    assert!(router.event(&sent, &owners, &event(5, Some(1))).is_err());
    assert!(router.page(&sent, &owners, &page(5, Some(3), 7, true)).is_err());
    assert_eq!((router.stalled(), router.groups()), (1, 1));
    *sent.full.lock() = false;
    router.answer_stall(&sent, StreamId(5), 1, FaultResponse::Resolved).unwrap();
    router.answer_group(&sent, StreamId(5), Some(SubstreamId(3)), 7, PageResponse::Success).unwrap();
    assert_eq!((sent.take().len(), router.stalled(), router.groups()), (2, 0, 0));
}

#[test]
fn a_stall_too_many_is_aborted() {
    let router = FaultRouter::new(Limits { stalls: 2, ..Limits::default() });
    let (sent, owners) = (Sent::default(), Owners::answering(FaultResponse::Deferred));
    for stag in 0..3 {
        router.event(&sent, &owners, &event(5, Some(stag))).unwrap();
    }
    assert_eq!(sent.take(), [resume(StreamId(5), 2, StallAnswer::Abort)]);
    assert_eq!((router.stalled(), owners.reports.lock().len()), (2, 3));
}

#[test]
fn a_group_is_answered_once_when_its_last_request_has_come() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Resolved));
    for _ in 0..3 {
        router.page(&sent, &owners, &page(5, Some(3), 0x1ff, false)).unwrap();
        // Another group and another substream do not mix with it.
        router.page(&sent, &owners, &page(5, Some(3), 1, false)).unwrap();
        router.page(&sent, &owners, &page(5, None, 0x1ff, false)).unwrap();
    }
    assert!(owners.reports.lock().is_empty() && sent.take().is_empty());
    router.page(&sent, &owners, &page(5, Some(3), 0x1ff, true)).unwrap();
    assert_eq!(owners.reports.lock().len(), 4);
    let success = pri_resp(StreamId(5), Some(SubstreamId(3)), 0x1ff, PageResponse::Success);
    assert_eq!(sent.take(), [success]);
    assert_eq!(router.groups(), 2);
    router.page(&sent, &owners, &page(5, None, 0x1ff, true)).unwrap();
    assert_eq!(sent.take(), [pri_resp(StreamId(5), None, 0x1ff, PageResponse::Success)]);
}

#[test]
fn one_page_that_cannot_be_had_makes_the_group_invalid() {
    let (router, sent) = (router(), Sent::default());
    let count = Mutex::new(0);
    let owners = Owners::asking(move |_: &FaultReport| {
        *count.lock() += 1;
        if *count.lock() == 2 { FaultResponse::Terminate } else { FaultResponse::Resolved }
    });
    router.page(&sent, &owners, &page(5, None, 1, false)).unwrap();
    router.page(&sent, &owners, &page(5, None, 1, false)).unwrap();
    router.page(&sent, &owners, &page(5, None, 1, true)).unwrap();
    assert_eq!(sent.take(), [pri_resp(StreamId(5), None, 1, PageResponse::Invalid)]);
    assert_eq!(owners.reports.lock().len(), 3);
}

#[test]
fn an_unknown_substream_or_stream_is_answered_invalid() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Resolved));
    router.page(&sent, &owners, &page(5, Some(10), 2, true)).unwrap();
    router.page(&sent, &owners, &page(100, None, 2, true)).unwrap();
    let expected = [
        pri_resp(StreamId(5), Some(SubstreamId(10)), 2, PageResponse::Invalid),
        pri_resp(StreamId(100), None, 2, PageResponse::Invalid),
    ];
    assert_eq!(sent.take(), expected);
}

#[test]
fn a_deferred_group_waits_for_one_answer() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Deferred));
    router.page(&sent, &owners, &page(5, Some(3), 4, false)).unwrap();
    router.page(&sent, &owners, &page(5, Some(3), 4, true)).unwrap();
    assert_eq!((sent.take(), router.groups()), (vec![], 1));
    let report = owners.reports.lock()[1];
    router.answer(&sent, &report, FaultResponse::Resolved).unwrap();
    assert_eq!(sent.take(), [pri_resp(StreamId(5), Some(SubstreamId(3)), 4, PageResponse::Success)]);
    let again = router.answer(&sent, &report, FaultResponse::Terminate);
    assert_eq!(again, Err(Error::NothingRequested { stream: StreamId(5), group: 4 }));
    // A group that is not complete cannot be answered either.
    router.page(&sent, &owners, &page(5, None, 9, false)).unwrap();
    assert!(router.answer_group(&sent, StreamId(5), None, 9, PageResponse::Success).is_err());
}

#[test]
fn unfinished_groups_are_bounded_and_make_room_oldest_first() {
    let router = FaultRouter::new(Limits { groups: 4, group_requests: 2, ..Limits::default() });
    let (sent, owners) = (Sent::default(), Owners::answering(FaultResponse::Resolved));
    for group in 0..10 {
        for _ in 0..5 {
            router.page(&sent, &owners, &page(5, None, group, false)).unwrap();
        }
    }
    assert_eq!(router.groups(), 4);
    // Every Last is answered, whatever became of the rest.
    for group in 0..10 {
        router.page(&sent, &owners, &page(5, None, group, true)).unwrap();
    }
    assert_eq!((sent.take().len(), router.groups()), (10, 0));
    // The first one to come without a group of its own took the place of the oldest that was left.
    assert!((3 * 3 + 7..=4 * 3 + 6).contains(&owners.reports.lock().len()));
}

#[test]
fn deferred_groups_do_not_make_room_for_others_and_those_are_asked_again() {
    let router = FaultRouter::new(Limits { groups: 2, ..Limits::default() });
    let (sent, owners) = (Sent::default(), Owners::answering(FaultResponse::Deferred));
    for group in 0..3 {
        router.page(&sent, &owners, &page(5, None, group, true)).unwrap();
    }
    assert_eq!(sent.take(), [pri_resp(StreamId(5), None, 2, PageResponse::Success)]);
    router.page(&sent, &owners, &page(5, None, 9, false)).unwrap();
    assert_eq!(router.groups(), 2);
}

#[test]
fn devices_that_never_finish_do_not_keep_others_from_waiting() {
    let router = FaultRouter::new(Limits { groups: 3, ..Limits::default() });
    let (sent, owners) = (Sent::default(), Owners::answering(FaultResponse::Deferred));
    for group in 0..3 {
        router.page(&sent, &owners, &page(6, None, group, false)).unwrap();
    }
    router.page(&sent, &owners, &page(5, None, 1, true)).unwrap();
    assert!(sent.take().is_empty());
    router.answer_group(&sent, StreamId(5), None, 1, PageResponse::Success).unwrap();
}

#[test]
fn an_overflow_drops_unfinished_groups_and_a_stop_marker_those_of_its_substream() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Deferred));
    router.page(&sent, &owners, &page(5, Some(1), 0, true)).unwrap();
    router.page(&sent, &owners, &page(5, Some(1), 1, false)).unwrap();
    router.page(&sent, &owners, &page(5, Some(2), 1, false)).unwrap();
    let stop = Page::Stop { stream: StreamId(5), substream: SubstreamId(1), group: 0 };
    router.page(&sent, &owners, &stop).unwrap();
    assert_eq!((router.groups(), &owners.stopped.lock()[..]), (2, &[(StreamId(5), SubstreamId(1))][..]));
    router.page(&sent, &owners, &Page::Lost(Lost::Overflow)).unwrap();
    assert_eq!(router.groups(), 1);
    assert_eq!(*owners.lost.lock(), [(Source::PageRequests, Lost::Overflow)]);
    assert!(sent.take().is_empty());
}

#[test]
fn refusing_a_stream_answers_everything_that_waits_for_it() {
    let (router, sent, owners) = (router(), Sent::default(), Owners::answering(FaultResponse::Deferred));
    for stream in [5, 6] {
        router.event(&sent, &owners, &event(stream, Some(1))).unwrap();
        router.page(&sent, &owners, &page(stream, Some(2), 3, true)).unwrap();
        router.page(&sent, &owners, &page(stream, Some(4), 3, true)).unwrap();
        router.page(&sent, &owners, &page(stream, Some(2), 4, false)).unwrap();
    }
    router.refuse(&sent, StreamId(6), Whose::Substream(SubstreamId(2))).unwrap();
    assert_eq!(sent.take(), [pri_resp(StreamId(6), Some(SubstreamId(2)), 3, PageResponse::Invalid)]);
    router.refuse(&sent, StreamId(5), Whose::All).unwrap();
    let expected = [
        resume(StreamId(5), 1, StallAnswer::Abort),
        pri_resp(StreamId(5), Some(SubstreamId(2)), 3, PageResponse::Invalid),
        pri_resp(StreamId(5), Some(SubstreamId(4)), 3, PageResponse::Invalid),
    ];
    assert_eq!(sent.take(), expected);
    assert_eq!((router.stalled(), router.groups()), (1, 1));
}

#[test]
fn a_handler_may_have_answered_from_another_thread_before_it_returns() {
    let router = Arc::new(router());
    let sent = Arc::new(Sent::default());
    let (inner, outer) = (router.clone(), sent.clone());
    let owners = Owners::asking(move |report: &FaultReport| {
        inner.answer(&*outer, report, FaultResponse::Resolved).unwrap();
        FaultResponse::Deferred
    });
    router.event(&*sent, &owners, &event(5, Some(1))).unwrap();
    router.page(&*sent, &owners, &page(5, None, 1, true)).unwrap();
    assert_eq!((sent.take().len(), router.stalled(), router.groups()), (2, 0, 0));
}
