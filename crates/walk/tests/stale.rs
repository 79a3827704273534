//! Real threads: one changes a mapping, invalidates, waits for the synchronisation and then poisons the old page, as often
//! as it can; the others read and write through their ports all the time. No reader ever sees poison, and no writer
//! ever writes into a page that was taken from it.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::unit::{FROM, Setting, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Iova, Pa};
use portcullis_bus::{DmaPort, Memory, SystemMemory};
use portcullis_walk::{Context, Invalidation, Scope, StageScope, TlbStage};

const TABLES: [u64; 2] = [0x1000, 0x2000];
const POOL: u64 = 0x10_0000;
const PAGES: u64 = 8;
const PAGE: usize = 4096;
/// Two pages next to each other, so that transfers cross from one into the other.
const VA: u64 = 0x5000;
const POISON: u8 = 0xee;
const GOOD: u8 = 0x11;

fn table(which: usize) -> Context {
    let s1 = stage1(Some(region(TABLES[which], Granule::K4, 3, 21)), None);
    context(key(TlbStage::Stage1, which as u16), only1(s1))
}

fn fill(m: &SystemMemory, page: u64, byte: u8) {
    m.write(Pa(page), A, &[byte; PAGE]).unwrap();
}

fn changes(unit: &Unit, m: &SystemMemory, until: Instant) -> u64 {
    let mut r = Random(9);
    let mut rounds = 0;
    let mut current = [POOL, POOL + PAGE as u64];
    let mut which = 0;
    while Instant::now() < until {
        rounds += 1;
        // Fresh pages, none of those in use.
        let mut fresh = current;
        for f in &mut fresh {
            while current.contains(f) {
                *f = POOL + r.below(PAGES) * PAGE as u64;
            }
        }
        if fresh[0] == fresh[1] {
            continue;
        }
        fresh.iter().for_each(|&p| fill(m, p, GOOD));
        let scope = Scope {
            secure: false,
            regime: None,
            vmid: Some(0),
            asid: Some(which as u16),
            stages: StageScope::Stage1AndCombined,
        };
        // A new table and configuration now and then, else new entries in the same table.
        let swap = rounds % 5 == 0;
        let into = if swap { 1 - which } else { which };
        for (i, page) in fresh.iter().enumerate() {
            let at = TABLES[into] + (VA / PAGE as u64 + i as u64) * 8;
            m.store64(Pa(at), page | d::PAGE | d::AF | d::USER | d::NG).unwrap();
        }
        if swap {
            which = into;
            unit.log.publish(Invalidation::Contexts(Scope { asid: Some(into as u16), ..scope }));
            unit.configure(1, Setting::Translate(std::sync::Arc::new(table(into))));
        } else {
            match rounds % 4 {
                0 => unit.log.publish(Invalidation::Everything),
                1 => unit.log.publish(Invalidation::Contexts(scope)),
                _ => {
                    (0..2).for_each(|i| unit.log.publish(Invalidation::Address(scope, VA + i * PAGE as u64)))
                }
            }
            if rounds % 16 == 0 {
                (0..300).for_each(|_| unit.log.publish(Invalidation::Address(scope, 0)));
            }
        }
        let mut sync = unit.log.begin_sync();
        while !sync.poll() {
            std::thread::yield_now();
        }
        let old = std::mem::replace(&mut current, fresh);
        old.iter().for_each(|&p| fill(m, p, POISON));
        std::thread::yield_now();
        let mut now = [0; PAGE];
        for p in old {
            m.read(Pa(p), A, &mut now).unwrap();
            assert!(now.iter().all(|&b| b == POISON), "a write reached a page that was given away");
        }
    }
    rounds
}

#[test]
fn no_port_uses_a_page_that_was_given_away() {
    let m = SystemMemory::new(&[(0, 0x20_0000)]).unwrap();
    for i in 0..2u64 {
        let page = POOL + i * PAGE as u64;
        fill(&m, page, GOOD);
        let at = TABLES[0] + (VA / PAGE as u64 + i) * 8;
        m.store64(Pa(at), page | d::PAGE | d::AF | d::USER | d::NG).unwrap();
    }
    let unit = Unit::new(m.clone(), table(0));
    let stop = AtomicBool::new(false);
    let accesses = AtomicU64::new(0);
    let until = Instant::now() + Duration::from_secs(2);
    let rounds = std::thread::scope(|s| {
        for role in 0..3 {
            let mut port = unit.port(64);
            let (stop, accesses) = (&stop, &accesses);
            s.spawn(move || {
                let mut buf = vec![0; 2 * PAGE];
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    match role {
                        0 => {
                            port.read(FROM, Iova(VA), &mut buf).unwrap();
                            assert!(
                                buf.iter().all(|&b| b == GOOD),
                                "a reader saw a page that was given away"
                            );
                        }
                        1 => port.write(FROM, Iova(VA), &vec![GOOD; 2 * PAGE]).unwrap(),
                        _ => {
                            let seen = port
                                .with_translation(&FROM, Iova(VA + 8 * (n % 512)), Access::Read, |t, m| {
                                    let mut b = [0; 8];
                                    m.read(t.pa, t.attrs, &mut b).map(|()| b)
                                })
                                .unwrap()
                                .unwrap();
                            assert_eq!(seen, [GOOD; 8], "a reader saw a page that was given away");
                        }
                    }
                }
                accesses.fetch_add(n, Ordering::Relaxed);
            });
        }
        let rounds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| changes(&unit, &m, until)));
        stop.store(true, Ordering::Relaxed);
        rounds.unwrap()
    });
    assert!(unit.faults().is_empty());
    assert!(rounds > 10 && accesses.into_inner() > 100, "{rounds}");
}

/// The same with nothing but flags, many times faster: this is where a missing barrier shows.
#[test]
fn no_access_runs_in_a_page_that_was_given_away() {
    let m = SystemMemory::new(&[(0, 0x20_0000)]).unwrap();
    let unit = Unit::new(m.clone(), table(0));
    let entry = |page: u64| (POOL + page * PAGE as u64) | d::PAGE | d::AF | d::USER | d::NG;
    let at = Pa(TABLES[0] + VA / PAGE as u64 * 8);
    m.store64(at, entry(0)).unwrap();
    let given_away: [AtomicBool; 2] = [AtomicBool::new(false), AtomicBool::new(true)];
    let (stop, seen) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut rounds = 0u64;
    let mut port = unit.port(64);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                port.with_translation(&FROM, Iova(VA), Access::Read, |t, _| {
                    let flag = &given_away[usize::from(t.pa.get() != POOL)];
                    if (0..60).any(|_| flag.load(Ordering::Relaxed)) {
                        seen.store(true, Ordering::Relaxed);
                    }
                })
                .unwrap();
            }
        });
        let until = Instant::now() + Duration::from_secs(1);
        let scope = Scope {
            secure: false,
            regime: None,
            vmid: None,
            asid: None,
            stages: StageScope::Stage1AndCombined,
        };
        while Instant::now() < until {
            for new in [1, 0] {
                given_away[new].store(false, Ordering::Relaxed);
                m.store64(at, entry(new as u64)).unwrap();
                unit.log.publish(Invalidation::Address(scope, VA));
                let mut sync = unit.log.begin_sync();
                while !sync.poll() {
                    std::hint::spin_loop();
                }
                given_away[1 - new].store(true, Ordering::Relaxed);
                rounds += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(!seen.into_inner(), "an access ran in a page that was given away");
    assert!(rounds > 20, "{rounds}");
}
