//! TLBSYNC and sTLBGSYNC: complete exactly when no access that may use an invalidated entry is still running.

mod rig;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{JoinHandle, spawn};

use portcullis_arch::{Access, Iova};
use portcullis_bus::{DmaPort, Initiator, StallState};
use rig::*;

/// An access that runs in a thread of its own until it is told to end.
struct Running {
    end: Sender<()>,
    thread: JoinHandle<u64>,
}

impl Running {
    fn start(r: &Rig, from: Initiator, va: u64) -> Self {
        let (end, ended): (Sender<()>, Receiver<()>) = channel();
        let (started, running) = channel();
        let mut port = r.port();
        let thread = spawn(move || {
            port.with_translation(&from, Iova(va), Access::Read, |t, _| {
                started.send(()).unwrap();
                ended.recv().unwrap();
                t.pa.get()
            })
            .unwrap()
        });
        running.recv().unwrap();
        Self { end, thread }
    }
    fn finish(self) -> u64 {
        self.end.send(()).unwrap();
        self.thread.join().unwrap()
    }
}

fn mapped() -> (Rig, Tables, u64) {
    let (r, mut t, root) = one_domain(LINUX_SCTLR);
    t.page(root, 0x1000, DATA | RW);
    (r, t, root)
}

fn spin(read: impl Fn() -> u32) {
    for _ in 0..10_000_000 {
        if read() & 1 == 0 {
            return;
        }
        std::thread::yield_now();
    }
    panic!("the sync never completes");
}

#[test]
fn a_sync_with_nothing_running_is_complete_at_once() {
    let (r, ..) = mapped();
    assert_eq!(rd(&mut r.port(), SID, 0x1000), Ok(DATA));
    assert_eq!((r.rb(0, TLBSTATUS), r.r(TLBGSTATUS)), (0, 0));
    r.wb(0, TLBSYNC, 0xffff_ffff);
    r.w(TLBGSYNC, 0xffff_ffff);
    assert_eq!((r.rb(0, TLBSTATUS), r.r(TLBGSTATUS)), (0, 0));
}

#[test]
fn a_bank_sync_waits_for_the_access_that_uses_the_old_entry() {
    let (r, mut t, root) = mapped();
    let access = Running::start(&r, stream(SID), 0x1000);
    t.unmap(root, 0x1000);
    r.wb64(0, TLBIVAL, 1);
    assert_eq!(r.rb(0, TLBSTATUS), 0, "no sync was asked for yet");
    r.wb(0, TLBSYNC, 0);
    for _ in 0..100 {
        assert_eq!(r.rb(0, TLBSTATUS), 1, "SACTIVE");
    }
    assert_eq!(rd(&mut r.port(), SID, 0x1000), Err(ABORT), "new accesses do not use it");
    assert_eq!(access.finish(), DATA);
    assert_eq!(r.rb(0, TLBSTATUS), 0);
}

#[test]
fn a_global_sync_waits_too_and_each_side_has_its_own_status() {
    let (r, ..) = mapped();
    let access = Running::start(&r, stream(SID), 0x1000);
    r.w(TLBIALLNSNH, 0);
    r.w(TLBGSYNC, 0);
    assert_eq!((r.r(TLBGSTATUS), r.rs(0x474), r.rs(TLBGSTATUS)), (1, 1, 0), "NS, its alias, secure");
    assert_eq!(r.rb(0, TLBSTATUS), 0, "a bank's status is its own");
    access.finish();
    assert_eq!((r.r(TLBGSTATUS), r.rs(0x474)), (0, 0));
    // Started through the secure alias, it is the non-secure side's.
    let access = Running::start(&r, stream(SID), 0x1000);
    r.ws(0x470, 0);
    assert_eq!((r.r(TLBGSTATUS), r.rs(TLBGSTATUS)), (1, 0));
    access.finish();
    spin(|| r.r(TLBGSTATUS));
    // The secure side's own.
    let access = Running::start(&r, stream(SID), 0x1000);
    r.ws(TLBGSYNC, 0);
    assert_eq!((r.r(TLBGSTATUS), r.rs(0x474), r.rs(TLBGSTATUS)), (0, 0, 1));
    access.finish();
    assert_eq!(r.rs(TLBGSTATUS), 0);
}

#[test]
fn a_sync_does_not_wait_for_accesses_that_began_later() {
    let (r, ..) = mapped();
    let before = Running::start(&r, stream(SID), 0x1000);
    r.wb(0, TLBSYNC, 0);
    let after = Running::start(&r, stream(SID), 0x1000);
    assert_eq!(r.rb(0, TLBSTATUS), 1);
    before.finish();
    assert_eq!(r.rb(0, TLBSTATUS), 0);
    after.finish();
}

#[test]
fn a_second_sync_does_not_forget_the_first() {
    let (r, ..) = mapped();
    let first = Running::start(&r, stream(SID), 0x1000);
    r.wb(0, TLBSYNC, 0);
    let second = Running::start(&r, stream(SID), 0x1000);
    r.wb(0, TLBSYNC, 0);
    second.finish();
    assert_eq!(r.rb(0, TLBSTATUS), 1, "the first access still runs");
    first.finish();
    assert_eq!(r.rb(0, TLBSTATUS), 0);
}

#[test]
fn a_port_that_is_gone_is_not_waited_for() {
    let (r, ..) = mapped();
    let access = Running::start(&r, stream(SID), 0x1000);
    access.finish();
    r.w(TLBGSYNC, 0);
    assert_eq!(r.r(TLBGSTATUS), 0);
}

#[test]
fn a_stalled_transaction_does_not_hold_a_sync_up_and_is_not_dropped() {
    let (r, mut t, root) = one_domain(M | CFRE | CFCFG);
    let mut p = r.port();
    let stalled = tag(wr(&mut p, SID, 0x1000));
    r.wb64(0, TLBIVAL, 1);
    r.wb(0, TLBSYNC, 0);
    r.w(TLBGSYNC, 0);
    assert_eq!((r.rb(0, TLBSTATUS), r.r(TLBGSTATUS)), (0, 0));
    assert_eq!(p.stall_state(stalled), StallState::Waiting);
    t.page(root, 0x1000, DATA | RW);
    r.wb(0, FSR, 2);
    r.wb(0, RESUME, 0);
    assert_eq!(p.stall_state(stalled), StallState::Retry);
    assert_eq!(wr(&mut p, SID, 0x1000), Ok(DATA));
}

#[test]
fn a_secure_bank_syncs_for_secure_software_only() {
    let (r, ..) = mapped();
    r.ws(SCR1, 0x0201_3008);
    let access = Running::start(&r, stream(SID), 0x1000);
    r.wb(8, TLBSYNC, 0);
    assert_eq!(r.rs(r.cb(8, TLBSTATUS)), 0, "a non-secure write is ignored");
    r.ws(r.cb(8, TLBSYNC), 0);
    assert_eq!((r.rs(r.cb(8, TLBSTATUS)), r.rb(8, TLBSTATUS)), (1, 0));
    access.finish();
    assert_eq!(r.rs(r.cb(8, TLBSTATUS)), 0);
}

/// Linux's unmap: clear the descriptor, TLBIVAL, TLBSYNC, wait, then reuse the page. A device that writes all the
/// time never touches the page after the wait.
#[test]
fn an_unmapped_page_can_be_reused_after_the_sync() {
    let (r, mut t, root) = one_domain(LINUX_SCTLR | HUPCF);
    t.page(root, 0x1000, DATA | RW);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..2 {
            let mut port = r.port();
            let stop = &stop;
            s.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = port.write(stream(SID), Iova(0x1000), &[0xff; 8]);
                }
            });
        }
        let mut checks = 0;
        for round in 0..100u64 {
            t.page(root, 0x1000, 0);
            r.wb64(0, TLBIVAL, 1);
            r.wb(0, TLBSYNC, 0);
            spin(|| r.rb(0, TLBSTATUS));
            r.poke(DATA, round);
            for _ in 0..50 {
                assert_eq!(r.peek(DATA), round, "written after the sync");
                checks += 1;
            }
            r.wb(0, FSR, 0x8000_01fe);
            t.page(root, 0x1000, DATA | RW);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(checks, 5_000);
    });
}
