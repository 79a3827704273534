//! The ATC against a fake IOMMU whose page table, answers and timing the test decides.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, AtsPort, AtsReply, AtsTranslation, BusError,
    DmaError, DmaFault, DmaPort, Initiator, Memory, PageGroupResponse, PageRequest, PageResponse, StallState,
    StallTag, SystemMemory,
};

use super::*;
use crate::{PlWriter, PlWriterConfig};

const RAM: u64 = 0x8000_0000;
const A: Attributes = Attributes::DEVICE_DEFAULT;

type Hook = Box<dyn FnMut() + Send>;

#[derive(Default)]
struct Script {
    /// By substream and page number.
    pages: BTreeMap<(Option<u32>, u64), AtsTranslation>,
    /// An answer to every translation request instead of the table's.
    answer: Option<AtsReply>,
    /// The next translated access fails like this.
    fault: Option<DmaError>,
    requests: Vec<(u64, bool)>,
    translated: Vec<(Initiator, u64, usize)>,
    untranslated: usize,
    page_requests: Vec<PageRequest>,
    during_request: Option<Hook>,
    during_access: Option<Hook>,
    during_page_request: Option<Hook>,
}

#[derive(Clone)]
struct Fake {
    memory: SystemMemory,
    script: Arc<Mutex<Script>>,
}

impl Fake {
    fn new() -> Self {
        Self { memory: SystemMemory::new(&[(RAM, 0x100_0000)]).unwrap(), script: Arc::default() }
    }
    fn s(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }
    fn map(&self, substream: Option<u32>, iova: u64, pa: u64, rw: &str) {
        self.map_block(substream, iova, pa, rw, 12, false);
    }
    fn map_block(&self, substream: Option<u32>, iova: u64, pa: u64, rw: &str, size_log2: u8, global: bool) {
        let (read, write, execute) = (rw.contains('r'), rw.contains('w'), rw.contains('x'));
        let t = AtsTranslation { addr: pa, size_log2, read, write, execute, privileged: false, global };
        for page in 0..1u64 << (size_log2 - 12) {
            self.s().pages.insert((substream, (iova >> 12) + page), t);
        }
    }
    fn unmap(&self, substream: Option<u32>, iova: u64) {
        self.s().pages.remove(&(substream, iova >> 12));
    }
    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.memory.read(Pa(addr), A, &mut buf).unwrap();
        buf
    }
    fn requests(&self) -> usize {
        self.s().requests.len()
    }
    fn groups(&self) -> Vec<u16> {
        self.s().page_requests.iter().map(|r| r.group).collect()
    }
    /// Runs a hook without holding the script.
    fn run(&self, pick: fn(&mut Script) -> &mut Option<Hook>) {
        let hook = pick(&mut self.s()).take();
        if let Some(mut hook) = hook {
            hook();
        }
    }
    fn access(&self, from: Initiator, addr: u64, len: usize) -> Result<(), DmaError> {
        self.s().translated.push((from, addr, len));
        self.run(|s| &mut s.during_access);
        let fault = self.s().fault.take();
        fault.map_or(Ok(()), Err)
    }
}

fn bus(e: BusError) -> DmaError {
    DmaError { done: 0, fault: e.into() }
}

impl DmaPort for Fake {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.s().untranslated += 1;
        self.memory.read(Pa(addr.get()), from.attrs, buf).map_err(bus)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.s().untranslated += 1;
        self.memory.write(Pa(addr.get()), from.attrs, buf).map_err(bus)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        // The fake IOMMU knows one stall of its own.
        if tag == StallTag(7) { StallState::Retry } else { StallState::Terminated { abort: true } }
    }
}

impl AtsPort for Fake {
    fn translation_request(&mut self, from: Initiator, addr: Iova, no_write: bool) -> AtsReply {
        let none = AtsTranslation {
            addr: 0,
            size_log2: 12,
            read: false,
            write: false,
            execute: false,
            privileged: false,
            global: false,
        };
        let reply = {
            let mut s = self.s();
            s.requests.push((addr.get(), no_write));
            let key = (from.substream.map(SubstreamId::get), addr.get() >> 12);
            let found = s.pages.get(&key).copied().unwrap_or(none);
            let asked = AtsTranslation {
                write: found.write && !no_write,
                execute: found.execute && from.attrs.instruction(),
                ..found
            };
            s.answer.unwrap_or(AtsReply::Granted(asked))
        };
        self.run(|s| &mut s.during_request);
        reply
    }
    fn read_translated(&mut self, from: Initiator, addr: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        self.access(from, addr, buf.len())?;
        self.memory.read(Pa(addr), from.attrs, buf).map_err(bus)
    }
    fn write_translated(&mut self, from: Initiator, addr: u64, buf: &[u8]) -> Result<(), DmaError> {
        self.access(from, addr, buf.len())?;
        self.memory.write(Pa(addr), from.attrs, buf).map_err(bus)
    }
    fn page_request(&mut self, request: PageRequest) {
        self.s().page_requests.push(request);
        self.run(|s| &mut s.during_page_request);
    }
}

fn setup(config: AtcConfig) -> (Fake, Arc<AtcShared>, AtcPort<Fake>) {
    let fake = Fake::new();
    let atc = AtcShared::new(config);
    (fake.clone(), atc.clone(), AtcPort::new(atc, fake))
}

fn plain() -> Initiator {
    Initiator::new(StreamId(5))
}

fn sub(n: u32) -> Initiator {
    Initiator { substream: Some(SubstreamId(n)), ..plain() }
}

fn tag_of(result: Result<(), DmaError>) -> StallTag {
    match result {
        Err(DmaError { fault: DmaFault::Stalled(tag), .. }) => tag,
        other => panic!("not stalled: {other:?}"),
    }
}

fn answer(atc: &AtcShared, group: u16, code: PageResponse) {
    atc.page_response(PageGroupResponse { substream: None, group, code });
}

const TERMINATED: Result<(), DmaError> = Err(DmaError { done: 0, fault: DmaFault::Terminated });

#[test]
fn a_translation_is_asked_for_once_and_used_for_its_whole_block() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map_block(None, 0x20_0000, RAM, "rw", 21, false);
    port.write(plain(), Iova(0x20_1000), &[1; 0x3000]).unwrap();
    port.write(plain(), Iova(0x3f_fffe), &[2; 2]).unwrap();
    assert_eq!(fake.bytes(RAM + 0x1000, 0x3000), [1; 0x3000]);
    assert_eq!(fake.bytes(RAM + 0x1f_fffe, 2), [2; 2]);
    assert_eq!((fake.requests(), fake.s().translated.len(), atc.cached()), (1, 2, 1));
    assert_eq!((atc.stats().hits, atc.stats().requests), (1, 1));
}

#[test]
fn an_access_is_split_where_translations_end() {
    let (fake, _, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM + 0x5000, "rw");
    fake.map(None, 0x2000, RAM + 0x3000, "rw");
    let data: Vec<u8> = (0..=255).cycle().take(0x1800).collect();
    port.write(plain(), Iova(0x1400), &data).unwrap();
    assert_eq!(fake.bytes(RAM + 0x5400, 0xc00), data[..0xc00]);
    assert_eq!(fake.bytes(RAM + 0x3000, 0xc00), data[0xc00..]);
    let mut back = vec![0; 0x1800];
    port.read(plain(), Iova(0x1400), &mut back).unwrap();
    assert_eq!(back, data);
    port.read(plain(), Iova(0xdead_0000), &mut []).unwrap();
}

#[test]
fn a_read_promises_not_to_write_and_a_later_write_asks_again() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM, "rw");
    port.read(plain(), Iova(0x1000), &mut [0; 4]).unwrap();
    port.write(plain(), Iova(0x1000), &[1; 4]).unwrap();
    port.read(plain(), Iova(0x1000), &mut [0; 4]).unwrap();
    assert_eq!(fake.s().requests, [(0x1000, true), (0x1000, false)]);
    assert_eq!(atc.cached(), 1);
}

#[test]
fn streams_substreams_and_privileges_have_their_own_translations() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    for (n, tag) in [None, Some(1), Some(2)].into_iter().enumerate() {
        fake.map(tag, 0x1000, RAM + 0x1000 * n as u64, "rwx");
    }
    let mut one = |from: Initiator| {
        port.read(from, Iova(0x1000), &mut [0; 1]).unwrap();
        fake.s().translated.last().unwrap().1 - RAM
    };
    assert_eq!([one(plain()), one(sub(1)), one(sub(2))], [0, 0x1000, 0x2000]);
    let privileged = sub(1).with_attrs(A.with_privileged(true));
    let fetch = sub(1).with_attrs(A.with_instruction(true));
    let other_stream = Initiator { stream: StreamId(6), ..sub(1) };
    for from in [privileged, fetch, other_stream] {
        let before = fake.requests();
        assert_eq!(one(from), 0x1000);
        one(from);
        assert_eq!(fake.requests(), before + 1, "{from:?}");
    }
    assert_eq!(atc.cached(), 6);
}

#[test]
fn without_a_substream_a_request_is_unprivileged_data() {
    let (fake, _, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM, "r");
    let loud = plain().with_attrs(A.with_privileged(true).with_instruction(true));
    port.read(loud, Iova(0x1000), &mut [0; 1]).unwrap();
    assert_eq!(fake.s().translated[0].0, plain());
}

#[test]
fn an_instruction_read_needs_execute_permission() {
    let (fake, _, mut port) = setup(AtcConfig { pri: false, ..AtcConfig::default() });
    let fetch = sub(1).with_attrs(A.with_instruction(true));
    fake.map(Some(1), 0x1000, RAM, "r");
    assert_eq!(port.read(fetch, Iova(0x1000), &mut [0; 1]), TERMINATED);
    port.read(sub(1), Iova(0x1000), &mut [0; 1]).unwrap();
    fake.map(Some(1), 0x1000, RAM, "rx");
    port.read(fetch, Iova(0x1000), &mut [0; 1]).unwrap();
}

#[test]
fn a_global_translation_serves_every_substream() {
    let (fake, _, mut port) = setup(AtcConfig::default());
    fake.map_block(Some(1), 0x1000, RAM, "r", 12, true);
    port.read(sub(1), Iova(0x1000), &mut [0; 1]).unwrap();
    port.read(sub(2), Iova(0x1000), &mut [0; 1]).unwrap();
    assert_eq!(fake.requests(), 1);
}

#[test]
fn the_cache_never_holds_more_than_its_capacity() {
    let (fake, atc, mut port) = setup(AtcConfig { capacity: 4, ..AtcConfig::default() });
    for page in 0..20 {
        fake.map(None, page << 12, RAM + (page << 12), "rw");
    }
    port.write(plain(), Iova(0), &[3; 20 << 12]).unwrap();
    assert_eq!((atc.cached(), atc.stats().evicted), (4, 16));
    let (fake, atc, mut port) = setup(AtcConfig { capacity: 0, ..AtcConfig::default() });
    fake.map(None, 0, RAM, "rw");
    port.write(plain(), Iova(0), &[3; 8]).unwrap();
    port.write(plain(), Iova(0), &[3; 8]).unwrap();
    assert_eq!((atc.cached(), fake.requests()), (0, 2));
}

#[test]
fn a_refused_or_malformed_answer_terminates_after_what_was_done() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM, "rw");
    let malformed = |size_log2| {
        AtsReply::Granted(AtsTranslation {
            addr: u64::MAX,
            size_log2,
            read: true,
            write: true,
            execute: true,
            privileged: true,
            global: true,
        })
    };
    let answers = [
        AtsReply::Unsupported,
        AtsReply::Aborted,
        malformed(0),
        malformed(11),
        malformed(64),
        malformed(255),
    ];
    for reply in answers {
        port.write(plain(), Iova(0x1000), &[1; 1]).unwrap();
        fake.s().answer = Some(reply);
        let result = port.write(plain(), Iova(0x1f00), &[1; 0x200]);
        assert_eq!(result, Err(DmaError { done: 0x100, fault: DmaFault::Terminated }), "{reply:?}");
        fake.s().answer = None;
    }
    let s = atc.stats();
    assert_eq!((s.unsupported, s.aborted, s.malformed, s.page_requests), (1, 1, 4, 0));
    // The largest blocks are fine, wherever they point to.
    fake.s().answer = Some(malformed(63));
    let bus = Err(DmaError { done: 0, fault: BusError::Decode.into() });
    assert_eq!(port.write(plain(), Iova(u64::MAX), &[1; 2]), bus);
}

#[test]
fn without_ats_an_access_goes_untranslated() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(None, RAM, RAM + 0x1000, "rw");
    port.write(plain(), Iova(RAM), &[1; 4]).unwrap();
    atc.enable_ats(false);
    assert_eq!(atc.cached(), 0);
    port.write(plain(), Iova(RAM), &[2; 4]).unwrap();
    assert_eq!((fake.requests(), fake.s().untranslated), (1, 1));
    assert_eq!((fake.bytes(RAM, 4), fake.bytes(RAM + 0x1000, 4)), (vec![2; 4], vec![1; 4]));
}

#[test]
fn an_invalidated_translation_is_asked_for_again() {
    let (fake, atc, mut port) = setup(AtcConfig { pri: false, ..AtcConfig::default() });
    fake.map(None, 0x1000, RAM, "rw");
    port.write(plain(), Iova(0x1000), &[1; 4]).unwrap();
    fake.unmap(None, 0x1000);
    port.write(plain(), Iova(0x1000), &[2; 4]).unwrap();
    let ticket =
        atc.invalidate(AtcInvalidation { substream: None, global: false, addr: 0x1000, size_log2: 12 });
    assert_eq!(atc.completion(ticket), AtcCompletion::Done);
    assert_eq!(port.write(plain(), Iova(0x1000), &[3; 4]), TERMINATED);
    assert_eq!(fake.bytes(RAM, 4), [2; 4]);
}

/// What completions say while an access is under way, for several invalidations made then.
fn completions_during(
    hit_first: bool,
    what: Vec<AtcInvalidation>,
) -> (Vec<AtcCompletion>, Vec<AtcCompletion>, usize) {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(Some(1), 0x1000, RAM, "rw");
    if hit_first {
        port.write(sub(1), Iova(0x1000), &[1; 4]).unwrap();
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (inner, out) = (atc.clone(), seen.clone());
    let hook: Hook = Box::new(move || {
        let tickets: Vec<AtcTicket> = what.iter().map(|w| inner.invalidate(*w)).collect();
        *out.lock().unwrap() = tickets.into_iter().map(|t| (t, inner.completion(t))).collect();
    });
    if hit_first {
        fake.s().during_access = Some(hook);
    } else {
        fake.s().during_request = Some(hook);
    }
    port.write(sub(1), Iova(0x1000), &[1; 4]).unwrap();
    let seen = seen.lock().unwrap();
    let after = seen.iter().map(|(t, _)| atc.completion(*t)).collect();
    (seen.iter().map(|(_, c)| *c).collect(), after, atc.cached())
}

#[test]
fn an_invalidation_during_an_access_completes_after_it() {
    use AtcCompletion::{Done, Pending};
    let at = |substream: Option<u32>, addr, size_log2| AtcInvalidation {
        substream: substream.map(SubstreamId),
        global: false,
        addr,
        size_log2,
    };
    let other_page = at(Some(1), 0x2000, 12);
    let other_substream = at(Some(2), 0, 64);
    let untagged = at(None, 0, 64);
    let mine = at(Some(1), 0x1000, 12);
    let (during, after, cached) = completions_during(true, vec![other_page, other_substream, untagged, mine]);
    assert_eq!(during, [Done, Done, Done, Pending]);
    assert_eq!((after, cached), (vec![Done; 4], 0));
    let everyone = AtcInvalidation { global: true, ..other_substream };
    assert_eq!(completions_during(true, vec![everyone]).0, [Pending]);
}

#[test]
fn an_answer_overtaken_by_an_invalidation_is_not_kept() {
    use AtcCompletion::{Done, Pending};
    let all = AtcInvalidation::all_of(Some(SubstreamId(1)));
    assert_eq!(completions_during(false, vec![all]), (vec![Pending], vec![Done], 0));
    // The answer's block is not known yet: any range of the substream may be it.
    let far = AtcInvalidation { addr: 0x5000_0000, size_log2: 12, ..all };
    assert_eq!(completions_during(false, vec![far]), (vec![Pending], vec![Done], 0));
    assert_eq!(completions_during(false, vec![AtcInvalidation::all_of(None)]), (vec![Done], vec![Done], 1));
}

#[test]
fn an_access_through_a_global_translation_is_hit_by_any_substreams_invalidation() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map_block(Some(1), 0x1000, RAM, "rw", 12, true);
    port.read(sub(1), Iova(0x1000), &mut [0; 1]).unwrap();
    let ticket = Arc::new(Mutex::new(None));
    let (inner, out) = (atc.clone(), ticket.clone());
    fake.s().during_access = Some(Box::new(move || {
        let t = inner.invalidate(AtcInvalidation::all_of(Some(SubstreamId(9))));
        *out.lock().unwrap() = Some((t, inner.completion(t)));
    }));
    port.read(sub(1), Iova(0x1000), &mut [0; 1]).unwrap();
    let (t, during) = ticket.lock().unwrap().unwrap();
    assert_eq!((during, atc.completion(t)), (AtcCompletion::Pending, AtcCompletion::Done));
}

#[test]
fn a_ticket_never_given_out_is_done_and_a_dropped_port_holds_nothing_up() {
    let (_, atc, port) = setup(AtcConfig::default());
    assert_eq!(atc.completion(AtcTicket(99)), AtcCompletion::Done);
    let other = AtcPort::new(atc.clone(), Fake::new());
    assert_eq!((port.place, other.place), (0, 1));
    drop(port);
    assert_eq!(AtcPort::new(atc, Fake::new()).place, 0);
}

#[test]
fn a_hung_device_times_out_and_goes_on_with_what_it_has() {
    let (fake, atc, mut port) = setup(AtcConfig { pri: false, ..AtcConfig::default() });
    fake.map(None, 0x1000, RAM, "rw");
    port.write(plain(), Iova(0x1000), &[1; 4]).unwrap();
    fake.unmap(None, 0x1000);
    atc.hang(true);
    let ticket = atc.invalidate(AtcInvalidation::all_of(None));
    assert_eq!(atc.completion(ticket), AtcCompletion::TimedOut);
    port.write(plain(), Iova(0x1000), &[2; 4]).unwrap();
    assert_eq!(fake.bytes(RAM, 4), [2; 4], "the danger of a device that does not answer");
    atc.hang(false);
    assert_eq!(port.write(plain(), Iova(0x1000), &[3; 4]), TERMINATED);
    assert_eq!(atc.completion(ticket), AtcCompletion::TimedOut);
    let next = atc.invalidate(AtcInvalidation::all_of(None));
    assert_eq!(atc.completion(next), AtcCompletion::Done);
}

#[test]
fn a_missing_page_is_asked_for_and_the_access_goes_on_after_success() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(Some(3), 0x1000, RAM, "rw");
    let result = port.write(sub(3), Iova(0x1ff0), &[9; 0x20]);
    assert_eq!(result.map_err(|e| e.done), Err(0x10));
    let tag = tag_of(result);
    assert!(is_page_request(tag) && !is_page_request(StallTag(7)));
    let asked = fake.s().page_requests[0];
    let expected = PageRequest {
        from: sub(3),
        addr: Iova(0x2000),
        read: false,
        write: true,
        execute: false,
        privileged: false,
        group: 0,
        last: true,
    };
    assert_eq!(asked, expected);
    assert_eq!(port.stall_state(tag), StallState::Waiting);
    fake.map(Some(3), 0x2000, RAM + 0x4000, "rw");
    atc.page_response(PageGroupResponse {
        substream: Some(SubstreamId(3)),
        group: 0,
        code: PageResponse::Success,
    });
    assert_eq!(port.stall_state(tag), StallState::Retry);
    port.write(sub(3), Iova(0x2000), &[9; 0x10]).unwrap();
    assert_eq!(fake.bytes(RAM + 0x4000, 0x10), [9; 0x10]);
    assert_eq!(port.stall_state(tag), StallState::Terminated { abort: true }, "the tag is used up");
}

#[test]
fn a_privileged_fetch_says_so_in_its_page_request() {
    let (fake, _, mut port) = setup(AtcConfig::default());
    let from = sub(1).with_attrs(A.with_privileged(true).with_instruction(true));
    tag_of(port.read(from, Iova(0x7123), &mut [0; 1]));
    let r = fake.s().page_requests[0];
    assert_eq!((r.addr, r.read, r.write, r.execute, r.privileged), (Iova(0x7000), true, false, true, true));
}

#[test]
fn an_answer_that_comes_at_once_is_not_lost() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    let (f, a) = (fake.clone(), atc.clone());
    fake.s().during_page_request = Some(Box::new(move || {
        f.map(None, 0x1000, RAM, "rw");
        answer(&a, 0, PageResponse::Success);
    }));
    let tag = tag_of(port.write(plain(), Iova(0x1000), &[1; 1]));
    assert_eq!(port.stall_state(tag), StallState::Retry);
    port.write(plain(), Iova(0x1000), &[1; 1]).unwrap();
}

#[test]
fn an_invalid_response_ends_one_access_and_page_requests_go_on() {
    let (_, atc, mut port) = setup(AtcConfig::default());
    let one = tag_of(port.write(plain(), Iova(0x1000), &[1; 1]));
    let two = tag_of(port.write(plain(), Iova(0x2000), &[1; 1]));
    answer(&atc, 0, PageResponse::Invalid);
    assert_eq!(port.stall_state(one), StallState::Terminated { abort: true });
    assert_eq!(port.stall_state(two), StallState::Waiting);
    tag_of(port.write(plain(), Iova(0x3000), &[1; 1]));
    assert!(!atc.pri_failed());
}

#[test]
fn a_failure_response_stops_page_requests_until_they_are_enabled_again() {
    let (fake, atc, mut port) = setup(AtcConfig { page_requests: 2, ..AtcConfig::default() });
    let tags: Vec<_> = (1..=3).map(|p| tag_of(port.write(plain(), Iova(p << 12), &[1; 1]))).collect();
    answer(&atc, 1, PageResponse::Failure);
    for tag in tags {
        assert_eq!(port.stall_state(tag), StallState::Terminated { abort: true });
    }
    assert!(atc.pri_failed());
    assert_eq!(port.write(plain(), Iova(0x1000), &[1; 1]), TERMINATED);
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(atc.stats().unexpected_responses, 1, "no answers are expected any more");
    assert_eq!(fake.groups(), [0, 1]);
    atc.enable_pri(true);
    assert!(!atc.pri_failed());
    tag_of(port.write(plain(), Iova(0x1000), &[1; 1]));
    assert_eq!((atc.outstanding_page_requests(), fake.groups()), (1, vec![0, 1, 2]));
}

#[test]
fn without_page_requests_a_missing_page_terminates() {
    let (fake, atc, mut port) = setup(AtcConfig { pri: false, ..AtcConfig::default() });
    fake.map(None, 0x1000, RAM, "r");
    assert_eq!(port.read(plain(), Iova(0x2000), &mut [0; 1]), TERMINATED);
    assert_eq!(port.write(plain(), Iova(0x1000), &[0; 1]), TERMINATED);
    port.read(plain(), Iova(0x1000), &mut [0; 1]).unwrap();
    atc.enable_pri(true);
    let tag = tag_of(port.write(plain(), Iova(0x1000), &[0; 1]));
    atc.enable_pri(false);
    assert_eq!(port.stall_state(tag), StallState::Waiting, "what was sent is still answered");
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(port.stall_state(tag), StallState::Retry);
}

#[test]
fn outstanding_requests_are_bounded_and_the_next_goes_out_when_one_is_answered() {
    let limits = AtcConfig { page_requests: 2, stalled: 3, ..AtcConfig::default() };
    let (fake, atc, mut port) = setup(limits);
    let tags: Vec<_> = (1..=3).map(|p| tag_of(port.write(plain(), Iova(p << 12), &[1; 1]))).collect();
    assert_eq!(fake.groups(), [0, 1]);
    assert_eq!(port.write(plain(), Iova(0x9000), &[1; 1]), TERMINATED, "no room for a fourth");
    assert_eq!(port.stall_state(tags[2]), StallState::Waiting);
    assert_eq!(fake.groups().len(), 2);
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(port.stall_state(tags[2]), StallState::Waiting);
    assert_eq!(fake.groups(), [0, 1, 2]);
    assert_eq!(fake.s().page_requests[2].addr, Iova(0x3000));
    // The engine of the first was reset and never asks: its place is used when it is needed.
    tag_of(port.write(plain(), Iova(0x9000), &[1; 1]));
    assert_eq!(port.stall_state(tags[0]), StallState::Terminated { abort: true });
}

#[test]
fn a_group_number_is_used_again_only_after_its_answer() {
    let (fake, atc, mut port) = setup(AtcConfig { stalled: 4, page_requests: 4, ..AtcConfig::default() });
    let held = tag_of(port.write(plain(), Iova(0x1000), &[1; 1]));
    for n in 1..2000u64 {
        let tag = tag_of(port.write(plain(), Iova(0x2000), &[1; 1]));
        let group = fake.s().page_requests.last().unwrap().group;
        assert!((1..512).contains(&group), "{n}: {group}");
        answer(&atc, group, PageResponse::Success);
        assert_eq!(port.stall_state(tag), StallState::Retry);
    }
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(port.stall_state(held), StallState::Retry);
    let (fake, _, mut port) = setup(AtcConfig { stalled: 600, page_requests: 600, ..AtcConfig::default() });
    for n in 0..600u64 {
        tag_of(port.write(plain(), Iova(n << 12), &[1; 1]));
    }
    let mut groups = fake.groups();
    groups.sort_unstable();
    assert_eq!(groups, (0..512).collect::<Vec<u16>>());
}

#[test]
fn answers_to_nothing_or_to_another_substream_are_counted_and_ignored() {
    let (_, atc, mut port) = setup(AtcConfig::default());
    let tag = tag_of(port.write(sub(4), Iova(0x1000), &[1; 1]));
    for (group, substream) in [(1, None), (0xffff, None), (0, Some(SubstreamId(5)))] {
        for code in [PageResponse::Success, PageResponse::Invalid, PageResponse::Failure] {
            atc.page_response(PageGroupResponse { substream, group, code });
        }
    }
    assert_eq!((atc.stats().unexpected_responses, port.stall_state(tag)), (9, StallState::Waiting));
    assert!(!atc.pri_failed());
}

#[test]
fn a_stopped_substream_sends_its_marker_and_no_more_requests() {
    let (fake, _, mut port) = setup(AtcConfig { page_requests: 1, ..AtcConfig::default() });
    let sent = tag_of(port.write(sub(1), Iova(0x1000), &[1; 1]));
    let queued = tag_of(port.write(sub(1), Iova(0x2000), &[1; 1]));
    let other = tag_of(port.write(sub(2), Iova(0x2000), &[1; 1]));
    port.stop_substream(plain());
    port.stop_substream(sub(1));
    let last = *fake.s().page_requests.last().unwrap();
    assert!(last.is_stop_marker());
    assert_eq!((last.from, fake.s().page_requests.len()), (sub(1), 2));
    assert_eq!(port.stall_state(queued), StallState::Terminated { abort: true });
    assert_eq!(port.stall_state(sent), StallState::Waiting);
    assert_eq!(port.stall_state(other), StallState::Waiting);
}

#[test]
fn faults_and_tags_of_the_iommu_pass_through() {
    let (fake, _, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM, "rw");
    fake.s().fault = Some(DmaError { done: 3, fault: DmaFault::Stalled(StallTag(7)) });
    let result = port.write(plain(), Iova(0x1000), &[1; 8]);
    assert_eq!(result, Err(DmaError { done: 3, fault: DmaFault::Stalled(StallTag(7)) }));
    assert_eq!(port.stall_state(StallTag(7)), StallState::Retry);
    // A tag that only an ATC could have given, and more bytes than were asked for.
    fake.s().fault = Some(DmaError { done: 99, fault: DmaFault::Stalled(StallTag(1 << 63)) });
    let result = port.write(plain(), Iova(0x1000), &[1; 8]);
    assert_eq!(result, Err(DmaError { done: 8, fault: DmaFault::Terminated }));
}

#[test]
fn a_copy_stalls_at_the_missing_page_and_resumes_there() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x1000, RAM, "r");
    fake.map(None, 0x2000, RAM + 0x1000, "r");
    fake.map(None, 0x8000, RAM + 0x2000, "rw");
    fake.memory.write(Pa(RAM), A, &[5; 0x2000]).unwrap();
    let e = port.copy((plain(), Iova(0x1000)), (plain(), Iova(0x8000)), 0x2000).unwrap_err();
    assert_eq!(e.error.done, 0x1000);
    fake.map(None, 0x9000, RAM + 0x3000, "rw");
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(port.stall_state(tag_of(Err(e.error))), StallState::Retry);
    port.copy((plain(), Iova(0x2000)), (plain(), Iova(0x9000)), 0x1000).unwrap();
    assert_eq!(fake.bytes(RAM + 0x2000, 0x2000), [5; 0x2000]);
}

#[test]
fn any_engine_gets_ats_by_its_port() {
    use portcullis_bus::mmio::Registers32;
    use portcullis_bus::{Activity, Engine};
    let (fake, atc, port) = setup(AtcConfig::default());
    let mut w = PlWriter::new(PlWriterConfig::new(StreamId(0x200)), Box::new(port));
    for (offset, value) in [(0x30, 0x1000), (0x38, 0xcafe_beef), (0x44, 1)] {
        w.write(offset, value).unwrap();
    }
    assert_eq!(w.step(0), Activity::Stalled);
    fake.map(None, 0x1000, RAM, "rw");
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(w.step(0), Activity::Idle);
    assert_eq!(fake.bytes(RAM, 4), 0xcafe_beefu32.to_le_bytes());
}

#[test]
fn stalled_accesses_survive_save_and_restore() {
    let (fake, atc, mut port) = setup(AtcConfig::default());
    fake.map(None, 0x5000, RAM, "rw");
    port.write(plain(), Iova(0x5000), &[1; 1]).unwrap();
    let tag = tag_of(port.write(sub(1), Iova(0x1000), &[1; 1]));
    let json = serde_json::to_string(&atc.save()).unwrap();
    let (_, atc, mut port) = setup(AtcConfig::default());
    atc.restore(serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!((atc.cached(), port.stall_state(tag)), (0, StallState::Waiting));
    answer(&atc, 0, PageResponse::Success);
    assert_eq!(port.stall_state(tag), StallState::Retry);
    let small = AtcShared::new(AtcConfig { stalled: 0, ..AtcConfig::default() });
    assert!(small.restore(serde_json::from_str(&json).unwrap()).is_err());
    let other = json.replacen("\"version\":1", "\"version\":8", 1);
    let refused = atc.restore(serde_json::from_str(&other).unwrap());
    assert_eq!(refused, Err(crate::RestoreError::Version { found: 8, expected: 1 }));
}

/// Random accesses, maps, unmaps with invalidation, and answers: no access ever uses a translation after the
/// invalidation that took it away, and every bound holds.
#[test]
fn random_use_never_reaches_an_unmapped_page() {
    let config = AtcConfig { capacity: 6, page_requests: 3, stalled: 5, ..AtcConfig::default() };
    let (fake, atc, mut port) = setup(config);
    let mut x = 0x1234_5678_9abc_def1u64;
    let mut next = move |n: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) % n
    };
    let mut tags = Vec::new();
    for _ in 0..20_000 {
        let tag = [None, Some(1), Some(2)][next(3) as usize];
        let from = tag.map_or(plain(), sub);
        let page = next(8);
        match next(6) {
            0 => fake.map(tag, page << 12, RAM + next(64) * 0x1000, ["r", "rw", "rwx"][next(3) as usize]),
            1 => {
                fake.unmap(tag, page << 12);
                let substream = tag.map(SubstreamId);
                let size_log2 = [12, 13, 64][next(3) as usize];
                let what = AtcInvalidation { substream, global: next(2) == 0, addr: page << 12, size_log2 };
                let ticket = atc.invalidate(what);
                assert_eq!(atc.completion(ticket), AtcCompletion::Done);
            }
            2 => {
                let code =
                    [PageResponse::Success, PageResponse::Invalid, PageResponse::Failure][next(3) as usize];
                let recent = fake.s().page_requests.iter().rev().nth(next(4) as usize).map(|r| r.group);
                answer(&atc, recent.unwrap_or(next(600) as u16), code);
                if atc.pri_failed() {
                    atc.enable_pri(true);
                }
            }
            3 => {
                if let Some(tag) = tags.pop() {
                    port.stall_state(tag);
                }
            }
            _ => {
                let mapped = fake.s().pages.contains_key(&(tag, page));
                let at = (page << 12) + next(0xff0);
                match port.write(from, Iova(at), &[1; 8]) {
                    Ok(()) => assert!(mapped, "stale translation of page {page} of {tag:?}"),
                    Err(DmaError { fault: DmaFault::Stalled(t), .. }) => tags.push(t),
                    Err(_) => {}
                }
            }
        }
        assert!(atc.cached() <= 6 && atc.outstanding_page_requests() <= 3);
    }
    assert!(atc.stats().hits > 100 && atc.stats().page_requests > 100, "{:?}", atc.stats());
}
