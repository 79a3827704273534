//! ATS with a device's own translation cache on the other side: translations, invalidations, page requests.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portcullis_arch::{Iova, StreamId};
use portcullis_bus::{DmaFault, DmaPort, StallState, SystemMemory};
use portcullis_engines::atc::{AtcConfig, AtcPort, AtcShared};
use portcullis_smmuv3::Port;
use rig::*;

const EATS_FULL: u64 = 1 << 28;
const PAGE: u64 = 0x1000;
const TLBI_ALL: [u64; 2] = [0x30, 0];
const ATC_INV: [u64; 2] = [0x40 | 1 << 32, PAGE];

/// Stream 1 does full ATS and has page `PAGE` at `DATA`; the root of its tables, and its device.
fn with_ats() -> (Rig, u64, Arc<AtcShared>, AtcPort<Port<SystemMemory>>) {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    let dw1 = STRTAB + 64 + 8;
    r.store(dw1, &[r.load(dw1) | EATS_FULL]);
    r.cfgi_all();
    r.map(root, PAGE, DATA | RW);
    let atc = AtcShared::new(AtcConfig::default());
    r.smmu.attach_ats(StreamId(1), atc.clone());
    let port = AtcPort::new(atc.clone(), r.port());
    (r, root, atc, port)
}

#[test]
fn a_device_keeps_translations_until_they_are_taken_away_and_asks_for_pages() {
    let (mut r, root, atc, mut port) = with_ats();
    let me = from(1);
    port.write(me, Iova(PAGE + 8), &7u64.to_le_bytes()).unwrap();
    port.write(me, Iova(PAGE + 16), &8u64.to_le_bytes()).unwrap();
    assert_eq!((r.load(DATA + 8), r.load(DATA + 16), atc.cached()), (7, 8, 1));
    // Unmapped, but the device still has it: that is what ATC_INV is for.
    r.map(root, PAGE, 0);
    r.tlbi_all();
    port.write(me, Iova(PAGE + 8), &9u64.to_le_bytes()).unwrap();
    r.command(ATC_INV);
    r.command(SYNC);
    while r.smmu.poll() {}
    assert_eq!((r.command_error(), atc.cached()), (None, 0));
    let refused = port.write(me, Iova(PAGE + 8), &10u64.to_le_bytes()).unwrap_err();
    let DmaFault::Stalled(tag) = refused.fault else { panic!("{refused:?}") };
    assert_eq!(r.events(), [[0; 4]; 0], "a translation request records no translation fault");
    // Write, Last; the group is in the low bits of the second word.
    assert_eq!(r.r(PRIQ_PROD), 1);
    assert_eq!(r.load(PRIQ) & 0xffff_ffff, 1);
    assert_eq!(r.load(PRIQ) >> 58, 0b01_1000, "Last and W, no SSV");
    let group = r.load(PRIQ + 8) & 0x1ff;
    assert_eq!(port.stall_state(tag), StallState::Waiting);
    r.map(root, PAGE, DATA | RW);
    r.command([0x41 | 1 << 32, group | 2 << 12]);
    while r.smmu.poll() {}
    assert_eq!(port.stall_state(tag), StallState::Retry);
    port.write(me, Iova(PAGE + 8), &10u64.to_le_bytes()).unwrap();
    assert_eq!(r.load(DATA + 8), 10);
}

#[test]
fn no_translated_write_lands_on_the_old_page_after_the_sync() {
    let (mut r, root, _atc, port) = with_ats();
    let pages = [DATA, DATA + 0x1000];
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    // What has gone wrong, told once the device has stopped.
    let mut wrong = None;
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut port = port;
            let mut n = 1u64;
            while !stop.load(Ordering::Relaxed) {
                if port.write(from(1), Iova(PAGE), &n.to_le_bytes()).is_ok() {
                    n += 1;
                }
                written.store(n, Ordering::Relaxed);
            }
        });
        for round in 0..200usize {
            let (old, new) = (pages[round % 2], pages[(round + 1) % 2]);
            r.map(root, PAGE, new | RW);
            r.command(TLBI_ALL);
            r.command(SYNC);
            r.command(ATC_INV);
            r.command(SYNC);
            while r.smmu.poll() {
                std::thread::yield_now();
            }
            let last = r.load(old);
            let progress = written.load(Ordering::Relaxed);
            let patience = Instant::now() + Duration::from_secs(20);
            while written.load(Ordering::Relaxed) < progress + 3 && Instant::now() < patience {
                std::thread::yield_now();
            }
            if r.load(old) != last || r.command_error().is_some() {
                wrong = Some((round, last, r.load(old), r.command_error()));
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(wrong, None);
}
