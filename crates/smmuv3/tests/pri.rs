//! The page request queue: records, interrupts, overflow and the SMMU's own answers.

mod rig;

use std::sync::{Arc, Mutex};

use portcullis_arch::{Iova, StreamId, SubstreamId};
use portcullis_bus::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, AtsPort, Initiator, PageGroupResponse, PageRequest,
    PageResponse,
};
use portcullis_smmuv3::Caps;
use rig::*;

#[derive(Default)]
struct Device(Mutex<Vec<PageGroupResponse>>);

impl AtsDevice for Device {
    fn invalidate(&self, _: AtcInvalidation) -> AtcTicket {
        AtcTicket(0)
    }
    fn completion(&self, _: AtcTicket) -> AtcCompletion {
        AtcCompletion::Done
    }
    fn page_response(&self, response: PageGroupResponse) {
        self.0.lock().unwrap().push(response);
    }
}

struct Pri {
    r: Rig,
    device: Arc<Device>,
}

impl Pri {
    fn new(caps: Caps) -> Self {
        let r = Rig::started(caps);
        let device = Arc::new(Device::default());
        r.smmu.attach_ats(StreamId(5), device.clone());
        Self { r, device }
    }
    fn ask(&self, ssid: Option<u32>, group: u16, last: bool) {
        let from = Initiator { substream: ssid.map(SubstreamId), ..from(5) };
        self.r.port().page_request(PageRequest {
            from,
            addr: Iova(0x1234_5000),
            read: true,
            write: false,
            execute: false,
            privileged: false,
            group,
            last,
        });
    }
    fn answers(&self) -> Vec<(Option<u32>, u16, PageResponse)> {
        let all = std::mem::take(&mut *self.device.0.lock().unwrap());
        all.into_iter().map(|a| (a.substream.map(|s| s.get()), a.group, a.code)).collect()
    }
    fn record(&self, n: u64) -> [u64; 2] {
        [0, 1].map(|w| self.r.load(PRIQ + 16 * n + 8 * w))
    }
}

use PageResponse::{Failure, Success};

#[test]
fn requests_are_written_to_the_queue() {
    let p = Pri::new(caps());
    p.ask(None, 7, true);
    p.ask(Some(3), 0x1ff, false);
    assert_eq!(p.record(0), [1 << 62 | 1 << 60 | 5, 0x1234_5007]);
    assert_eq!(p.record(1), [1 << 63 | 1 << 60 | 3 << 32 | 5, 0x1234_51ff]);
    assert_eq!((p.r.r(PRIQ_PROD), p.r.rises(LINE_PRIQ), p.answers()), (2, 1, vec![]));
}

#[test]
fn overflow_answers_groups_and_writes_nothing_until_acknowledged() {
    let p = Pri::new(caps());
    for n in 0..4 {
        p.ask(None, n, false);
    }
    assert_eq!(p.r.r(PRIQ_PROD), 4, "full, nothing lost");
    p.ask(None, 10, false);
    assert_eq!((p.r.r(PRIQ_PROD), p.answers()), (1 << 31 | 4, vec![]), "not the last of its group: dropped");
    p.ask(None, 10, true);
    assert_eq!(p.answers(), [(None, 10, Success)]);
    // Room, but not acknowledged.
    p.r.w(PRIQ_CONS, 4);
    p.ask(None, 11, true);
    assert_eq!((p.r.r(PRIQ_PROD), p.answers()), (1 << 31 | 4, vec![(None, 11, Success)]));
    p.r.w(PRIQ_CONS, 1 << 31 | 4);
    p.ask(None, 12, true);
    assert_eq!((p.r.r(PRIQ_PROD), p.answers()), (1 << 31 | 5, vec![]));
    assert_eq!(p.r.r(GERROR), 0);
}

#[test]
fn the_pasid_of_an_automatic_answer_is_ppar_s_or_pps_s_choice() {
    for (pps, ppar, expected) in [(false, false, None), (false, true, Some(9)), (true, false, Some(9))] {
        let p = Pri::new(Caps { pps, ..caps() });
        p.r.ste(5, [1, u64::from(ppar) << 18, 0, 0, 0, 0, 0, 0]);
        for n in 0..5 {
            p.ask(Some(9), n, false);
        }
        p.ask(Some(9), 6, true);
        assert_eq!(p.answers(), [(expected, 6, Success)]);
    }
    // An STE that cannot be used.
    let p = Pri::new(caps());
    for n in 0..5 {
        p.ask(Some(9), n, false);
    }
    p.ask(Some(9), 6, true);
    assert_eq!(p.answers(), [(None, 6, Failure)]);
    assert_eq!(p.r.events().len(), 0, "looking at the STE records nothing");
}

#[test]
fn a_queue_that_is_off_answers_failure() {
    for cr0 in [SMMUEN | CMDQEN | EVENTQEN, PRIQEN | CMDQEN] {
        let p = Pri::new(caps());
        p.r.w(CR0, cr0);
        assert_eq!(p.r.r(CR0ACK), cr0);
        p.ask(Some(3), 8, true);
        assert_eq!((p.answers(), p.r.r(PRIQ_PROD)), (vec![(None, 8, Failure)], 0));
    }
    let p = Pri::new(secure_caps());
    let secure = from(5).with_attrs(attrs().with_non_secure(false));
    p.r.port().page_request(PageRequest { read: true, group: 3, ..PageRequest::stop_marker(secure) });
    assert_eq!((p.answers(), p.r.r(PRIQ_PROD)), (vec![(None, 3, Failure)], 0), "a secure stream");
}

#[test]
fn stop_markers_are_never_answered() {
    let p = Pri::new(caps());
    let marker = PageRequest::stop_marker(with_ssid(5, 3));
    p.r.port().page_request(marker);
    assert_eq!(p.record(0), [1 << 63 | 1 << 62 | 3 << 32 | 5, 0]);
    for n in 0..5 {
        p.ask(None, n, false);
    }
    p.r.port().page_request(marker);
    p.r.w(CR0, CMDQEN);
    p.r.port().page_request(marker);
    assert_eq!(p.answers(), []);
}

#[test]
fn a_refused_write_is_a_global_error_and_answered() {
    let p = Pri::new(caps());
    p.r.w(CR0, SMMUEN);
    p.r.w64(PRIQ_BASE, NOWHERE | 2);
    p.r.w(CR0, SMMUEN | PRIQEN);
    p.ask(None, 1, true);
    assert_eq!((p.r.r(GERROR), p.r.r(PRIQ_PROD), p.answers()), (8, 0, vec![(None, 1, Failure)]));
    p.ask(None, 2, true);
    assert_eq!(p.answers(), [(None, 2, Failure)], "while the error is active");
}

#[test]
fn the_interrupt_comes_for_the_first_request_or_for_each_last_one() {
    let p = Pri::new(caps());
    p.ask(None, 1, false);
    p.ask(None, 1, true);
    assert_eq!(p.r.rises(LINE_PRIQ), 1);
    let p = Pri::new(caps());
    p.r.w(IRQ_CTRL, 0);
    p.r.w64(PRIQ_IRQ, DOORBELL);
    p.r.w(PRIQ_IRQ + 8, 0x77);
    p.r.w(PRIQ_IRQ + 12, 1 << 31);
    p.r.w(IRQ_CTRL, 7);
    p.ask(None, 1, false);
    assert_eq!(p.r.rises(LINE_PRIQ), 0);
    p.ask(None, 1, true);
    p.ask(None, 2, true);
    assert_eq!((p.r.rises(LINE_PRIQ), p.r.messages()), (2, vec![(DOORBELL, 0x77); 2]));
    p.ask(None, 3, false);
    p.ask(None, 3, true);
    assert_eq!(p.r.rises(LINE_PRIQ), 3, "also when it is dropped because of overflow");
    p.r.w(CR0, CMDQEN);
    p.ask(None, 3, true);
    assert_eq!(p.r.rises(LINE_PRIQ), 3, "not when it is dropped for another reason");
}

#[test]
fn overflow_without_pri_is_no_matter() {
    let c = Caps { pri: false, priq_log2: 0, ..caps() };
    let p = Pri::new(c);
    p.ask(None, 1, true);
    assert_eq!(p.answers(), [(None, 1, Failure)]);
}
