//! CMD_SYNC, CR0ACK and GBPA.Update come only after accesses that used the old state have ended, and nobody hangs.

mod rig;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use portcullis_arch::{Access, Iova};
use portcullis_bus::{AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, PageGroupResponse};
use rig::*;

/// Does something at the end, also if an assertion fails before: no thread is left waiting then.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs `during` while another thread is inside an access of stream 1.
fn during_an_access(r: &Rig, during: impl FnOnce()) {
    let (inside, leave) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut p = r.port();
            p.with_translation(&from(1), Iova(0x1000), Access::Read, |_, _| {
                inside.wait();
                leave.wait();
            })
            .unwrap();
        });
        inside.wait();
        let _leave = AtEnd(|| {
            leave.wait();
        });
        during();
    });
}

#[test]
fn a_sync_waits_for_the_access_that_runs() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    during_an_access(&r, || {
        r.command([0x30, 0]);
        assert_eq!(r.cons().0, 1, "an invalidation is consumed at once");
        r.command([0x46 | 1 << 12 | 9 << 32, DATA + 8]);
        assert_eq!(r.cons().0, 1);
        assert_eq!((r.load(DATA + 8), r.rises(LINE_SYNC)), (0, 0));
        assert!(r.smmu.poll(), "there is more to do");
        // Registers answer meanwhile.
        assert_eq!(r.r(CR0ACK), r.r(CR0));
    });
    while r.smmu.poll() {}
    assert_eq!((r.cons().0, r.load(DATA + 8), r.rises(LINE_SYNC)), (2, 9, 1));
}

#[test]
fn cr0ack_and_gbpa_update_wait_for_the_access_that_runs() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    let on = r.r(CR0);
    during_an_access(&r, || {
        r.w(GBPA, 0x8010_0000);
        assert_eq!(r.r(GBPA), 0x8010_0000, "reads back at once, with Update");
        r.w(GBPA, 0x8000_0000);
        assert_eq!(r.r(GBPA), 0x8010_0000, "ignored while Update is set");
        r.w(CR0, on & !SMMUEN);
        assert_eq!((r.r(CR0), r.r(CR0ACK)), (on & !SMMUEN, on));
        r.w(STRTAB_CFG, 0);
        assert_eq!(r.r(STRTAB_CFG), 6, "the guard looks at CR0ACK too");
        r.w(CR0, on);
        assert_eq!(r.r(CR0), on & !SMMUEN, "a field in transition does not change");
        r.w(CR0, on & !SMMUEN & !CMDQEN);
        assert_eq!(r.r(CR0ACK), on & !CMDQEN, "others do");
    });
    while r.smmu.poll() {}
    assert_eq!((r.r(CR0ACK), r.r(GBPA)), (on & !SMMUEN & !CMDQEN, 0x10_0000));
    r.w(STRTAB_CFG, 0);
    assert_eq!(r.r(STRTAB_CFG), 0);
}

#[test]
fn turning_the_queue_off_gives_up_the_sync_that_waits() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    let on = r.r(CR0);
    during_an_access(&r, || {
        r.command(SYNC);
        r.w(CR0, on & !CMDQEN);
        assert_eq!((r.r(CR0ACK), r.cons().0), (on & !CMDQEN, 0), "CONS shows the first unprocessed command");
    });
    r.w(CR0, on);
    while r.smmu.poll() {}
    assert_eq!(r.cons().0, 1);
}

/// A thread that translates all the time, while another unmaps, invalidates, synchronises and looks: never an access
/// through the old translation after the CMD_SYNC.
#[test]
fn nothing_is_accessed_through_the_old_translation_after_a_sync() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A);
    r.map(root, 0x1000, DATA | RW);
    let leaf = {
        let mut t = root;
        for shift in [39, 30, 21] {
            t = r.load(t + (0x1000u64 >> shift & 511) * 8) & 0xffff_ffff_f000;
        }
        t + 8
    };
    let stop = AtomicBool::new(false);
    let r = &r;
    std::thread::scope(|s| {
        let stop = &stop;
        let _stop = AtEnd(|| stop.store(true, Ordering::Relaxed));
        for _ in 0..2 {
            s.spawn(move || {
                let mut p = r.port();
                while !stop.load(Ordering::Relaxed) {
                    let _ = write4(&mut p, from(1), 0x1000, 0xbad);
                }
            });
        }
        for n in 0..300 {
            r.store(leaf, &[0]);
            if n % 2 == 0 {
                r.command([0x12 | 1 << 48, 0x1000]);
            } else {
                r.command([0x30, 0]);
            }
            r.command(SYNC);
            while r.smmu.poll() {
                std::thread::yield_now();
            }
            r.store(DATA, &[0]);
            std::thread::sleep(Duration::from_micros(20));
            assert_eq!(r.load(DATA), 0, "round {n}");
            r.store(leaf, &[DATA | RW]);
        }
    });
}

/// Ports, registers and commands from many threads at once: all of them come to an end.
#[test]
fn many_threads_do_not_hold_each_other_up() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    r.stage1(2, STALL);
    let r = &r;
    let on = r.r(CR0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let stop = &stop;
        let _stop = AtEnd(|| stop.store(true, Ordering::Relaxed));
        for sid in [1, 2, 3] {
            s.spawn(move || {
                let mut p = r.port();
                while !stop.load(Ordering::Relaxed) {
                    let _ = write4(&mut p, from(sid), 0x1000, 1);
                    let _ = read4(&mut p, from(sid), 0x5000);
                }
            });
        }
        s.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                r.events();
                r.smmu.poll();
                let _ = r.smmu.stalled();
            }
        });
        for n in 0..400 {
            match n % 8 {
                0 => r.w(CR0, on & !SMMUEN),
                1 => r.w(CR0, on),
                2 => r.w(GBPA, 0x8000_1000),
                3 => r.command([0x45 | 2 << 32, 0]),
                4 => r.command([0x04, 31]),
                _ => r.command([0x30, 0]),
            }
            r.command(SYNC);
            while r.cons().0 != r.r(CMDQ_PROD) {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(r.r(GERROR), 0);
}

/// A device that answers invalidations as it is told.
#[derive(Default)]
struct Device {
    done: AtomicBool,
    hangs: AtomicBool,
    seen: std::sync::Mutex<Vec<AtcInvalidation>>,
    answers: std::sync::Mutex<Vec<PageGroupResponse>>,
}

impl AtsDevice for Device {
    fn invalidate(&self, what: AtcInvalidation) -> AtcTicket {
        let mut seen = self.seen.lock().unwrap();
        seen.push(what);
        AtcTicket(seen.len() as u64)
    }
    fn completion(&self, _: AtcTicket) -> AtcCompletion {
        if self.hangs.load(Ordering::Relaxed) {
            AtcCompletion::TimedOut
        } else if self.done.load(Ordering::Relaxed) {
            AtcCompletion::Done
        } else {
            AtcCompletion::Pending
        }
    }
    fn page_response(&self, response: PageGroupResponse) {
        self.answers.lock().unwrap().push(response);
    }
}

fn with_device() -> (Rig, Arc<Device>) {
    let r = Rig::started(caps());
    let device = Arc::new(Device::default());
    r.smmu.attach_ats(portcullis_arch::StreamId(5), device.clone());
    (r, device)
}

#[test]
fn a_sync_waits_for_atc_invalidations() {
    let (r, device) = with_device();
    r.command([0x40 | 5 << 32, 0x1234_5000]);
    assert_eq!(r.cons().0, 1);
    r.command(SYNC);
    assert_eq!(r.cons().0, 1);
    assert!(r.smmu.poll());
    device.done.store(true, Ordering::Relaxed);
    assert_eq!(r.cons().0, 2, "a register access is enough");
    assert!(!r.smmu.poll());
}

#[test]
fn atc_invalidations_have_their_span_and_pasid() {
    let (r, device) = with_device();
    device.done.store(true, Ordering::Relaxed);
    r.command([0x40 | 5 << 32, 0x1234_5000]);
    r.command([0x40 | 5 << 32 | 1 << 11 | 3 << 12, 0x1234_5000 | 4]);
    r.command([0x40 | 5 << 32 | 1 << 11 | 1 << 9 | 3 << 12, 0x1234_5000 | 52]);
    r.command([0x40 | 5 << 32 | 1 << 9, 51]);
    r.command([0x40 | 6 << 32, 52]);
    let substream = Some(portcullis_arch::SubstreamId(3));
    let seen = device.seen.lock().unwrap().clone();
    assert_eq!(
        seen,
        [
            AtcInvalidation { substream: None, global: false, addr: 0x1234_5000, size_log2: 12 },
            AtcInvalidation { substream, global: false, addr: 0x1234_0000, size_log2: 16 },
            AtcInvalidation { substream, global: true, addr: 0, size_log2: 64 },
            AtcInvalidation { substream: None, global: false, addr: 0, size_log2: 63 },
        ]
    );
    r.w(CR0, CMDQEN);
    r.command([0x40 | 5 << 32, 52]);
    r.command([0x41 | 5 << 32, 2 << 12]);
    assert_eq!(device.seen.lock().unwrap().len(), 4, "ignored while SMMUEN = 0");
    assert_eq!(device.answers.lock().unwrap().len(), 0);
}

#[test]
fn an_atc_invalidation_that_times_out_is_an_error_of_the_sync() {
    let (r, device) = with_device();
    device.hangs.store(true, Ordering::Relaxed);
    r.command([0x40 | 5 << 32, 52]);
    assert_eq!(r.command_error(), None);
    r.command(SYNC);
    assert_eq!((r.command_error(), r.cons().0), (Some(3), 1));
    r.acknowledge();
    assert_eq!((r.command_error(), r.cons().0), (None, 2), "the retried CMD_SYNC passes");
}

#[test]
fn many_invalidations_without_an_answer_hold_the_queue_and_not_the_memory() {
    let (r, device) = with_device();
    for _ in 0..300 {
        r.command([0x40 | 5 << 32, 52]);
    }
    assert_ne!(r.cons().0, r.r(CMDQ_PROD));
    assert_eq!(device.seen.lock().unwrap().len(), 256);
    device.done.store(true, Ordering::Relaxed);
    assert_eq!(r.cons().0, r.r(CMDQ_PROD));
}

#[test]
fn page_responses_reach_the_device() {
    let (r, device) = with_device();
    r.command([0x41 | 5 << 32, 0x1ff | 2 << 12]);
    r.command([0x41 | 5 << 32 | 1 << 11 | 7 << 12, 0x12 | 1 << 12]);
    r.command([0x41 | 5 << 32, 3]);
    use portcullis_bus::PageResponse::{Failure, Invalid, Success};
    let answers = device.answers.lock().unwrap().clone();
    assert_eq!(
        answers.iter().map(|a| (a.group, a.code)).collect::<Vec<_>>(),
        [(0x1ff, Success), (0x12, Invalid), (3, Failure)]
    );
    assert_eq!(answers[1].substream, Some(portcullis_arch::SubstreamId(7)));
}
