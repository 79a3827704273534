//! The driver on the model, seen by devices that never rest: take-over of an SMMU that is on, changes of entries in use,
//! many threads, errors of the command queue.

mod smmuv3_rig;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use portcullis_arch::smmuv3::cd::{CdDw0, CdDw1};
use portcullis_arch::smmuv3::regs::CommandError;
use portcullis_arch::smmuv3::ste::{SteDw0, SteDw1};
use portcullis_arch::smmuv3::{Cd, Command, Ste};
use portcullis_arch::{Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::DmaPort as _;
use portcullis_drivers::ops::{DomainOptions, Master, Paging, TableRoot};
use portcullis_drivers::smmuv3::{DirectRegion, DomainConfig, Error, Options, Preserved};
use portcullis_hal::Mmio as _;
use portcullis_pgtable::{Config, Granule, PageTable, Stage1};
use portcullis_smmuv3::Caps;
use smmuv3_rig::{
    BASE, Driver, RAM, Random, Rig, RigDomain, caps, exact, from, from_substream, map, plain, read64, rw,
    with_substreams, write64,
};

/// Where the stage before the driver has its tables and queue.
const OLD: u64 = RAM + 0x100_0000;
/// What its devices use: pages that tell who was reached.
const DISPLAY: u64 = RAM + 0x10_0000;
const SECRET: u64 = RAM + 0x20_0000;

const BYPASSING: u32 = 5;
const PRESERVED: u32 = 7;
const UNKNOWN: u32 = 9;
const BEYOND: u32 = 0x321;

/// Programs the SMMU as firmware does: a linear table of 16 streams, some of which bypass and one that has a table of its
/// own in which everything is mapped one to one.
fn previous_stage(rig: &Rig, two_level: bool) {
    let regs = &rig.registers;
    let entry = |stream: u32| OLD + u64::from(stream) * 64;
    for stream in [BYPASSING, UNKNOWN] {
        rig.put64(entry(stream), SteDw0::new().with_v(true).with_config(4).into_bits());
    }
    // One gigabyte block, level 1 of a 39-bit table, for 0x8000_0000.
    let (cd, table) = (OLD + 0x4000, OLD + 0x5000);
    rig.put64(table + 2 * 8, BASE | 0x401 | 1 << 6 | 3 << 8 | 1 << 2);
    let dw0 = CdDw0::new().with_t0sz(25).with_epd1(true).with_v(true).with_ips(2).with_aa64(true);
    let dw0 = dw0.with_a(true).with_r(true).with_asid(1).with_ir0(1).with_or0(1).with_sh0(3);
    let cd_words =
        Cd::default().with_mair(0xff04_ff44).with_dw0(dw0).with_dw1(CdDw1::new().with_ttb0_51_4(table >> 4));
    for (i, word) in cd_words.0.into_iter().enumerate() {
        rig.put64(cd + i as u64 * 8, word);
    }
    let dw0 = SteDw0::new().with_v(true).with_config(5).with_s1contextptr_55_6(cd >> 6);
    let ste = Ste::default().with_dw0(dw0).with_dw1(SteDw1::new().with_s1stalld(true));
    for (i, word) in ste.0.into_iter().enumerate() {
        rig.put64(entry(PRESERVED) + i as u64 * 8, word);
    }
    regs.write32(0x28, 0xd75);
    if two_level {
        rig.put64(OLD + 0x8000, OLD | 5);
        regs.write64(0x80, OLD + 0x8000);
        regs.write32(0x88, 1 << 16 | 8 << 6 | 16);
    } else {
        regs.write64(0x80, OLD);
        regs.write32(0x88, 4);
    }
    regs.write64(0x90, (OLD + 0xc000) | 4);
    regs.write32(0x98, 0);
    regs.write32(0x9c, 0);
    regs.write32(0x20, 0x9);
    // A command error that nobody has looked at.
    rig.put64(OLD + 0xc000, 0xff);
    regs.write32(0x98, 1);
    assert_eq!(rig.reg(0x60) & 1, 1);
}

#[test]
fn a_live_smmu_is_taken_over_without_letting_anybody_through() {
    for (two_level, regions) in [(false, true), (true, true), (true, false)] {
        let rig = Rig::new(caps());
        rig.put64(DISPLAY, 1);
        rig.put64(SECRET, 2);
        previous_stage(&rig, two_level);
        let mut port = rig.port();
        for stream in [BYPASSING, PRESERVED, UNKNOWN] {
            assert_eq!(read64(&mut port, from(stream), SECRET), Ok(2), "{stream}");
        }
        assert!(read64(&mut port, from(BEYOND), SECRET).is_err());

        // From the moment that everything aborts (GBPA) or later, nobody ever gets through again, except the preserved
        // device to what it needs. Looked at with warm and with cold caches, after every store.
        let shut = Arc::new(AtomicBool::new(false));
        let (seen, preserved) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        {
            let (model, bus, shut, seen, kept) =
                (rig.model(), rig.bus.clone(), shut.clone(), seen.clone(), preserved.clone());
            let mut countdown = 400u64;
            rig.spy.set(move || {
                let mut cold = model.port(bus.clone());
                let through = |port: &mut _, stream| read64(port, from(stream), SECRET).is_ok();
                let mut gbpa = [0; 4];
                model.mmio_read(0x44, &mut gbpa).unwrap();
                let aborts = u32::from_le_bytes(gbpa) >> 20 & 1 != 0;
                if aborts && !shut.load(Ordering::Relaxed) {
                    // The old tables are in use until CR0 is written.
                    let mut cr0 = [0; 4];
                    model.mmio_read(0x20, &mut cr0).unwrap();
                    shut.store(u32::from_le_bytes(cr0) & 1 == 0, Ordering::Relaxed);
                }
                if !shut.load(Ordering::Relaxed) {
                    return;
                }
                seen.fetch_add(1, Ordering::Relaxed);
                countdown = countdown.saturating_sub(1);
                if countdown == 0 && !seen.load(Ordering::Relaxed).is_multiple_of(64) {
                    return;
                }
                for port in [&mut cold, &mut port] {
                    for stream in [BYPASSING, UNKNOWN, BEYOND] {
                        assert!(!through(port, stream), "stream {stream} got through");
                    }
                    if regions {
                        assert!(!through(port, PRESERVED), "the preserved stream got beyond its region");
                    }
                    match read64(port, from(PRESERVED), DISPLAY) {
                        Ok(value) => {
                            assert_eq!(value, 1);
                            kept.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => assert_eq!(kept.load(Ordering::Relaxed), 0, "lost again"),
                    }
                }
            });
        }
        let region = DirectRegion { start: Iova(DISPLAY), len: 0x1_0000, prot: rw() };
        let regions = if regions { vec![region] } else { Vec::new() };
        let options = Options {
            preserve: vec![Preserved { stream: StreamId(PRESERVED), regions: regions.clone() }],
            ..Rig::options()
        };
        let driver = rig.driver_with(options);
        assert!(driver.was_enabled() && shut.load(Ordering::Relaxed));
        assert!(preserved.load(Ordering::Relaxed) > 0);

        // Other devices come; the preserved one goes on until it is claimed and attached, and then goes over in one step.
        let other = driver.add_master(&exact(BYPASSING + 1), plain()).unwrap();
        let domain = driver.new_domain(DomainConfig::Stage1(Paging::default()), Default::default()).unwrap();
        map(&domain, DISPLAY, DISPLAY, 0x1000);
        driver.attach(&other, &domain).unwrap();
        let master = driver.add_master(&exact(PRESERVED), plain()).unwrap();
        if regions.is_empty() {
            rig.spy.clear();
        }
        driver.attach(&master, &domain).unwrap();
        rig.spy.clear();
        let mut port = rig.port();
        assert_eq!(read64(&mut port, from(PRESERVED), DISPLAY), Ok(1));
        assert!(read64(&mut port, from(PRESERVED), DISPLAY + 0x1000).is_err());
        driver.remove_master(master).unwrap();
        assert!(read64(&mut port, from(PRESERVED), DISPLAY).is_err());
        assert!(seen.load(Ordering::Relaxed) > 50);
    }
}

#[test]
fn a_driver_that_goes_leaves_nothing_open_and_the_next_one_takes_over() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let used = rig.pool.outstanding();
    let master = driver.add_master(&exact(3), with_substreams(4)).unwrap();
    let domain = driver.new_domain(DomainConfig::Stage1(Paging::default()), Default::default()).unwrap();
    map(&domain, 0x1000, RAM, 0x1000);
    driver.attach(&master, &domain).unwrap();
    let mut port = rig.port();
    assert!(read64(&mut port, from(3), 0x1000).is_ok());
    drop((master, domain));
    drop(driver);
    assert!(used > 0);
    assert_eq!(rig.pool.outstanding(), 0, "memory was not given back");
    assert!(read64(&mut port, from(3), 0x1000).is_err());
    assert!(read64(&mut port, from(3), RAM).is_err());
    let driver = rig.driver();
    assert!(!driver.was_enabled());
    let master = driver.add_master(&exact(3), plain()).unwrap();
    let domain = driver.new_domain(DomainConfig::Stage2(Paging::default()), Default::default()).unwrap();
    map(&domain, 0x1000, RAM, 0x1000);
    driver.attach(&master, &domain).unwrap();
    assert!(read64(&mut port, from(3), 0x1000).is_ok());
}

/// A physical page that holds its own address, for each domain of a test.
fn own_page(rig: &Rig, n: u64) -> u64 {
    let pa = RAM + n * 0x1000;
    rig.put64(pa, pa);
    pa
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Blocked,
    Identity,
    Stage1,
    Stage2,
    Nested,
}

/// A domain of each kind; all translate [`AT`] to a page of their own.
const AT: u64 = RAM + 0x80_0000;

struct Target {
    kind: Kind,
    domain: Arc<RigDomain>,
    page: Option<u64>,
    _below: Option<Arc<RigDomain>>,
}

fn target(rig: &Rig, driver: &Driver, kind: Kind, n: u64) -> Target {
    let make = |config| driver.new_domain(config, DomainOptions::default()).unwrap();
    let own = own_page(rig, n);
    let (domain, page, below) = match kind {
        Kind::Blocked => (make(DomainConfig::Blocked), None, None),
        Kind::Identity => {
            rig.put64(AT, AT);
            (make(DomainConfig::Identity), Some(AT), None)
        }
        Kind::Stage1 => (make(DomainConfig::Stage1(Paging::default())), Some(own), None),
        Kind::Stage2 => (make(DomainConfig::Stage2(Paging::default())), Some(own), None),
        Kind::Nested => {
            let below = make(DomainConfig::Stage2(Paging::default()));
            map(&below, 0x5000, own, 0x1000);
            let domain = make(DomainConfig::Nested(below.clone(), Paging::default()));
            map(&domain, AT, 0x5000, 0x1000);
            (domain, Some(own), Some(below))
        }
    };
    if matches!(kind, Kind::Stage1 | Kind::Stage2) {
        map(&domain, AT, own, 0x1000);
    }
    Target { kind, domain, page, _below: below }
}

/// Where the driver's documentation promises that no access fails: one word decides.
fn is_hitless(old: Kind, new: Kind, substreams: bool) -> bool {
    use Kind::{Identity, Stage1, Stage2};
    match (old, new) {
        (Identity, Identity) => true,
        (Stage1, Stage1) => !substreams,
        (Stage1, Identity) | (Identity, Stage1) => true,
        (Stage2, Identity) | (Identity, Stage2) => true,
        _ => false,
    }
}

#[derive(Default)]
struct Watch {
    old: Option<u64>,
    new: Option<u64>,
    hitless: bool,
    looks: u64,
    bad: Vec<String>,
}

#[test]
fn at_every_store_of_an_attach_devices_see_the_old_domain_or_the_new_one() {
    use Kind::{Blocked, Identity, Nested, Stage1, Stage2};
    for options in [plain(), with_substreams(4), smmuv3_rig::stalling()] {
        let rig = Rig::new(caps());
        let driver = rig.driver();
        let master = driver.add_master(&exact(2), options).unwrap();
        let kinds = [Stage1, Stage1, Identity, Stage2, Stage2, Nested, Nested, Blocked, Identity];
        let targets: Vec<Target> =
            kinds.iter().zip(1..).map(|(kind, n)| target(&rig, &driver, *kind, n)).collect();
        let watch = Arc::new(Mutex::new(Watch::default()));
        let (model, bus, seen) = (rig.model(), rig.bus.clone(), watch.clone());
        let mut warm = rig.port();
        let look = move || {
            let mut watch = seen.lock().unwrap();
            let mut cold = model.port(bus.clone());
            for (name, port) in [("cold", &mut cold), ("warm", &mut warm)] {
                let got = read64(port, from(2), AT);
                watch.looks += 1;
                let fine = match got {
                    Ok(value) => Some(value) == watch.old || Some(value) == watch.new,
                    Err(_) => !watch.hitless,
                };
                if !fine {
                    let text = format!("{name}: {got:x?}, old {:x?}, new {:x?}", watch.old, watch.new);
                    watch.bad.push(text);
                }
            }
        };
        let mut before: Option<&Target> = None;
        let mut random = Random(99);
        rig.spy.set(look);
        for _ in 0..150 {
            let next = &targets[random.below(targets.len() as u64) as usize];
            let hitless = before.is_some_and(|b| {
                is_hitless(b.kind, next.kind, options.substream_bits > 0)
                    || Arc::ptr_eq(&b.domain, &next.domain) && b.page.is_some()
            });
            *watch.lock().unwrap() =
                Watch { old: before.and_then(|b| b.page), new: next.page, hitless, ..Watch::default() };
            driver.attach(&master, &next.domain).unwrap();
            {
                let mut watch = watch.lock().unwrap();
                let from_kind = before.map(|b| b.kind);
                assert!(
                    watch.bad.is_empty(),
                    "{options:?} {from_kind:?} -> {:?}: {:#?}",
                    next.kind,
                    watch.bad
                );
                *watch = Watch::default();
            }
            // Afterwards there is only the new one.
            let mut port = rig.port();
            assert_eq!(read64(&mut port, from(2), AT).ok(), next.page, "{:?}", next.kind);
            before = Some(next);
        }
        rig.spy.clear();
        driver.handle_irq();
        driver.detach(&master).unwrap();
        drop(targets);
        assert_eq!(driver.tags_in_use(), (0, 0));
    }
}

/// An address space that is not the driver's, with one page.
fn process_table(rig: &Rig, page: u64) -> (PageTable<Stage1, smmuv3_rig::Mem>, TableRoot) {
    let table = PageTable::new(rig.memory(), Config::new(Granule::K4, 48, 44).coherent_walk(true)).unwrap();
    table.map(Iova(AT), Pa(page), 0x1000, rw()).unwrap();
    let root = TableRoot::from_registers(&table.registers(), Granule::K4);
    (table, root)
}

#[test]
fn substreams_come_and_go_without_disturbing_the_device_or_each_other() {
    // At every store: the main domain is the old one or the new one and never absent, the two substreams that stay go on.
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let master = driver.add_master(&exact(2), with_substreams(8)).unwrap();
    let mains: Vec<Target> = [Kind::Stage1, Kind::Identity, Kind::Blocked]
        .iter()
        .zip(1..)
        .map(|(kind, n)| target(&rig, &driver, *kind, n))
        .collect();
    let pages: Vec<u64> = (0..4).map(|n| own_page(&rig, 20 + n)).collect();
    let tables: Vec<_> = pages.iter().map(|page| process_table(&rig, *page)).collect();
    let processes: Vec<_> = tables
        .iter()
        .map(|(_, root)| driver.new_domain(DomainConfig::Process(*root), DomainOptions::default()).unwrap())
        .collect();
    let mut now = 1;
    driver.attach(&master, &mains[now].domain).unwrap();

    // Pages that the main domain may give now, and whether it may give nothing; then substreams that must go on.
    type Now = (Vec<u64>, bool, Vec<(u32, u64)>);
    let state: Arc<Mutex<Now>> = Arc::default();
    let bad: Arc<Mutex<Vec<String>>> = Arc::default();
    let (model, bus, shown, errors) = (rig.model(), rig.bus.clone(), state.clone(), bad.clone());
    let mut warm = rig.port();
    let set = |main: &[&Target], substreams: Vec<(u32, u64)>| {
        let may_fail = main.iter().any(|t| t.page.is_none());
        *state.lock().unwrap() = (main.iter().filter_map(|t| t.page).collect(), may_fail, substreams);
    };
    set(&[&mains[now]], vec![]);
    rig.spy.set(move || {
        let (main, may_fail, substreams) = &*shown.lock().unwrap();
        let mut cold = model.port(bus.clone());
        for (name, port) in [("cold", &mut cold), ("warm", &mut warm)] {
            let got = read64(port, from(2), AT);
            if !got.map_or(*may_fail, |value| main.contains(&value)) {
                errors.lock().unwrap().push(format!("{name} main {got:x?}, allowed {main:x?}"));
            }
            for (substream, page) in substreams {
                let got = read64(port, from_substream(2, *substream), AT);
                if got != Ok(*page) {
                    errors
                        .lock()
                        .unwrap()
                        .push(format!("{name} substream {substream} {got:x?}, not {page:x}"));
                }
            }
        }
    });
    let check = |what: &str| {
        let bad = core::mem::take(&mut *bad.lock().unwrap());
        assert!(bad.is_empty(), "{what}: {bad:#?}");
    };
    let mut random = Random(5);
    let mut bound = [false; 4];
    for round in 0..250 {
        let staying = |bound: &[bool; 4], but: usize| -> Vec<(u32, u64)> {
            (0..4).filter(|i| bound[*i] && *i != but).map(|i| (i as u32 + 1, pages[i])).collect()
        };
        if random.below(3) == 0 {
            let next = random.below(3) as usize;
            set(&[&mains[now], &mains[next]], staying(&bound, 9));
            driver.attach(&master, &mains[next].domain).unwrap();
            check(&format!("round {round}: main {:?} -> {:?} {bound:?}", mains[now].kind, mains[next].kind));
            now = next;
        } else {
            let i = random.below(4) as usize;
            set(&[&mains[now]], staying(&bound, i));
            let substream = SubstreamId(i as u32 + 1);
            if bound[i] {
                driver.detach_substream(&master, substream).unwrap();
            } else {
                driver.attach_substream(&master, substream, &processes[i]).unwrap();
            }
            check(&format!("round {round}: substream {i} {bound:?} beside {:?}", mains[now].kind));
            bound[i] = !bound[i];
        }
        set(&[&mains[now]], staying(&bound, 9));
        let mut port = rig.port();
        for i in 0..4 {
            let expected = bound[i].then_some(pages[i]);
            let got = read64(&mut port, from_substream(2, i as u32 + 1), AT).ok();
            assert_eq!(got, expected, "round {round} substream {i}");
        }
    }
    // One process ends while the others go on.
    for (i, process) in processes.iter().enumerate() {
        if !bound[i] {
            driver.attach_substream(&master, SubstreamId(i as u32 + 1), process).unwrap();
        }
    }
    set(&[&mains[now]], vec![(1, pages[0]), (2, pages[1]), (4, pages[3])]);
    processes[2].stop_walks().unwrap();
    check("the end of a process");
    rig.spy.clear();
    let mut port = rig.port();
    assert!(read64(&mut port, from_substream(2, 3), AT).is_err());
    driver.handle_irq();
    let faults = driver.take_faults().faults;
    assert!(faults.iter().all(|f| f.substream != Some(SubstreamId(3)) || f.stage != Some(1)), "{faults:?}");
}

/// What a device's thread tells.
#[derive(Default)]
struct Told {
    stop: AtomicBool,
    through: AtomicU64,
    failed: AtomicU64,
    wrong: AtomicU64,
}

struct StopAtEnd<'a>(&'a Told);
impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_device_at_work_never_notices_a_hitless_change() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let master = driver.add_master(&exact(2), plain()).unwrap();
    let targets: Vec<Target> = [Kind::Stage1, Kind::Stage1, Kind::Identity, Kind::Stage1]
        .iter()
        .zip(1..)
        .map(|(kind, n)| target(&rig, &driver, *kind, n))
        .collect();
    driver.attach(&master, &targets[0].domain).unwrap();
    let told = Told::default();
    // The pages that are right now: old and new.
    let right = [AtomicU64::new(targets[0].page.unwrap()), AtomicU64::new(targets[0].page.unwrap())];
    let any: Vec<u64> = targets.iter().filter_map(|t| t.page).collect();
    let mut changes = 0;
    std::thread::scope(|scope| {
        let _end = StopAtEnd(&told);
        for _ in 0..2 {
            let mut port = rig.port();
            let (told, any) = (&told, &any);
            scope.spawn(move || {
                while !told.stop.load(Ordering::Relaxed) {
                    match read64(&mut port, from(2), AT) {
                        Ok(value) if any.contains(&value) => told.through.fetch_add(1, Ordering::Relaxed),
                        Ok(_) => told.wrong.fetch_add(1, Ordering::Relaxed),
                        Err(_) => told.failed.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
        let end = Instant::now() + Duration::from_millis(600);
        let mut random = Random(8);
        let mut port = rig.port();
        while Instant::now() < end {
            let next = &targets[random.below(4) as usize];
            driver.attach(&master, &next.domain).unwrap();
            right[0].store(next.page.unwrap(), Ordering::Relaxed);
            // The old one is not reached any more, warm or not.
            assert_eq!(read64(&mut port, from(2), AT).ok(), next.page);
            changes += 1;
        }
    });
    assert_eq!((told.failed.into_inner(), told.wrong.into_inner()), (0, 0));
    assert!(changes > 20 && told.through.into_inner() > 100, "{changes}");
    driver.handle_irq();
    assert!(driver.take_faults().faults.is_empty());
}

/// In every byte of memory that was taken away.
const TAKEN: u8 = 0xa5;

fn many_threads(caps: Caps, by_message: bool) {
    const MAPPERS: u64 = 3;
    const LEN: u64 = 0x4000;
    let rig = Rig::new(caps);
    let options = Options { queue_log2: [7, 8, 8], ..Rig::options() };
    let driver = rig.driver_with(options);
    assert_eq!(driver.commands().completes_by_message(), by_message);
    let shared =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let second =
        driver.new_domain(DomainConfig::Stage2(Paging::default()), DomainOptions::default()).unwrap();
    // Mapper 0 and 1 work on one domain with two devices, mapper 2 on another.
    let masters: Vec<Master> = (1..=3).map(|s| driver.add_master(&exact(s), plain()).unwrap()).collect();
    driver.attach(&masters[0], &shared).unwrap();
    driver.attach(&masters[1], &shared).unwrap();
    driver.attach(&masters[2], &second).unwrap();
    let told = Told::default();
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for stream in 1..=3u32 {
            let (told, mut port) = (&told, rig.port());
            scope.spawn(move || {
                let mut random = Random(u64::from(stream));
                let mut buf = vec![0; LEN as usize];
                while !told.stop.load(Ordering::Relaxed) {
                    let area = if stream == 3 { 2 } else { random.below(2) };
                    let at = Iova(0x10_0000 * (area + 1) + random.below(4) * 0x1000);
                    let n = 1 + random.below(0x1000) as usize;
                    let result = if random.below(2) == 0 {
                        buf[..n].fill(0x11);
                        port.write(from(stream), at, &buf[..n])
                    } else {
                        let result = port.read(from(stream), at, &mut buf[..n]);
                        let got = result.err().map_or(n, |e| e.done);
                        if buf[..got].contains(&TAKEN) {
                            told.wrong.fetch_add(1, Ordering::Relaxed);
                        }
                        result
                    };
                    let counter = if result.is_ok() { &told.through } else { &told.failed };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _end = StopAtEnd(&told);
        // For a while, and until there was something to see: on a busy machine that takes longer.
        let begun = Instant::now();
        let over = || {
            let enough = rounds.load(Ordering::Relaxed) > 20
                && told.through.load(Ordering::Relaxed) > 0
                && told.failed.load(Ordering::Relaxed) > 0;
            begun.elapsed() > Duration::from_millis(900) && enough
                || begun.elapsed() > Duration::from_secs(60)
        };
        std::thread::scope(|mappers| {
            for m in 0..MAPPERS {
                let domain = if m == 2 { &second } else { &shared };
                let (rig, rounds, told, over) = (&rig, &rounds, &told, &over);
                mappers.spawn(move || {
                    let pa = RAM + m * 0x10_0000;
                    let mut random = Random(m + 77);
                    while !over() {
                        let iova = 0x10_0000 * (m + 1);
                        map(domain, iova, pa, LEN);
                        for _ in 0..random.below(50) {
                            std::thread::yield_now();
                        }
                        if random.below(4) == 0 {
                            domain
                                .protect(Iova(iova), LEN, portcullis_iommu::Prot::READ.noexec().cached())
                                .unwrap();
                            rig.put(pa, &[0x22; LEN as usize]);
                            let mut seen = vec![0; LEN as usize];
                            portcullis_bus::Memory::read(&rig.ram, Pa(pa), Default::default(), &mut seen)
                                .unwrap();
                            assert!(seen.iter().all(|b| *b == 0x22), "written through a read-only page");
                        }
                        assert_eq!(domain.unmap(Iova(iova), LEN).unwrap(), LEN);
                        rig.put(pa, &[TAKEN; LEN as usize]);
                        for _ in 0..3 {
                            let mut seen = vec![0; LEN as usize];
                            portcullis_bus::Memory::read(&rig.ram, Pa(pa), Default::default(), &mut seen)
                                .unwrap();
                            assert!(seen.iter().all(|b| *b == TAKEN), "written after unmap returned");
                            std::thread::yield_now();
                        }
                        assert_eq!(told.wrong.load(Ordering::Relaxed), 0, "read after unmap returned");
                        rig.put(pa, &[0; LEN as usize]);
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            // Somebody drains the events of all the refused accesses.
            mappers.spawn(|| {
                while !over() {
                    driver.handle_irq();
                    std::thread::yield_now();
                }
            });
        });
    });
    assert_eq!(told.wrong.load(Ordering::Relaxed), 0);
    let (through, failed) = (told.through.into_inner(), told.failed.into_inner());
    assert!(through > 0 && failed > 0 && rounds.into_inner() > 10, "{through} {failed}");
    assert_eq!(rig.reg(0x60), rig.reg(0x64), "a global error is left");
}

#[test]
fn many_threads_unmap_at_once_with_completion_by_message() {
    many_threads(caps(), true);
}

#[test]
fn many_threads_unmap_at_once_with_completion_by_cons() {
    many_threads(
        Caps {
            msi: false,
            sev: false,
            ril: false,
            revision: 1,
            fwb: false,
            bbml: 0,
            e0pd: false,
            ptwnnc: false,
            ..caps()
        },
        false,
    );
}

#[test]
fn illegal_commands_hurt_nobody_but_whoever_issued_them() {
    let rig = Rig::new(caps());
    let driver = rig.driver_with(Options { queue_log2: [6, 8, 8], ..Rig::options() });
    let domain =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let master = driver.add_master(&exact(4), plain()).unwrap();
    driver.attach(&master, &domain).unwrap();
    let illegal = Command([0xff, 0x1234]);
    let refused = |result: Result<(), Error>| matches!(result, Err(Error::Command { code: CommandError::Ill, command }) if command == illegal);
    assert!(refused(driver.commands().issue_sync(&[illegal])));
    driver.commands().issue(&[illegal]).unwrap();
    std::thread::scope(|scope| {
        for t in 0..3u64 {
            let (driver, domain) = (&driver, &domain);
            scope.spawn(move || {
                let good = Command([0x30, 0]);
                // No more failures than the driver can tell apart for a thread that sleeps meanwhile (64).
                for i in 0..if t == 0 { 60 } else { 150 } {
                    if t == 0 {
                        let mut batch = vec![good; (i % 70) as usize];
                        batch.push(illegal);
                        assert!(refused(driver.commands().issue_sync(&batch)), "{i}");
                    } else {
                        let iova = 0x10_0000 * t;
                        map(domain, iova, RAM, 0x3000);
                        assert_eq!(domain.unmap(Iova(iova), 0x3000), Ok(0x3000));
                    }
                }
            });
        }
    });
    assert!(driver.handle_irq() > 0);
    assert!(driver.take_faults().faults.len() > 1);
    assert_eq!(rig.reg(0x60), rig.reg(0x64));
}

#[test]
fn a_queue_page_that_aborts_is_tried_again_and_given_up_at_last() {
    let rig = Rig::new(caps());
    let driver = rig.driver_with(Options { timeout_us: 300_000, ..Rig::options() });
    let domain =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let master = driver.add_master(&exact(4), plain()).unwrap();
    driver.attach(&master, &domain).unwrap();
    map(&domain, 0x1000, RAM, 0x2000);
    let queue = u64::from(rig.reg(0x90)) & !0x1f | u64::from(rig.reg(0x94) & 0xff_ffff) << 32;
    rig.make_bad(queue..queue + 0x4000);
    let start = Instant::now();
    let result = domain.unmap(Iova(0x1000), 0x1000);
    assert!(matches!(result, Err(Error::Command { .. } | Error::CommandQueue { .. })), "{result:?}");
    assert!(start.elapsed() < Duration::from_secs(5));
    // Tables may still be in use: nothing that an old translation leads to is given back by the driver.
    std::thread::scope(|scope| {
        for t in 0..3u64 {
            let domain = &domain;
            scope.spawn(move || {
                map(domain, 0x100_0000 * (t + 1), RAM, 0x1000);
                assert!(domain.unmap(Iova(0x100_0000 * (t + 1)), 0x1000).is_err());
            });
        }
    });
    assert!(start.elapsed() < Duration::from_secs(8));
    rig.make_bad(0..0);
    assert!(driver.commands().is_stuck());
    assert!(driver.commands().restart());
    driver.commands().issue_sync(&[]).unwrap();
    assert_eq!(domain.unmap(Iova(0x2000), 0x1000), Ok(0x1000));
    let mut port = rig.port();
    assert!(read64(&mut port, from(4), 0x1000).is_err());
    driver.handle_irq();
    assert!(!driver.take_faults().faults.is_empty());
    map(&domain, 0x1000, RAM, 0x1000);
    assert!(write64(&mut port, from(4), 0x1000, 5).is_ok());
}

#[test]
fn a_queue_page_that_aborts_for_a_moment_is_not_noticed() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let domain =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let queue = u64::from(rig.reg(0x90)) & !0x1f | u64::from(rig.reg(0x94) & 0xff_ffff) << 32;
    for looks in 1..6 {
        map(&domain, 0x1000, RAM, 0x1000);
        // The page is bad until the driver has acknowledged the error a few times.
        let (bus, mut left) = (Arc::new(AtomicU64::new(0)), looks);
        let ends = bus.clone();
        rig.make_bad(queue..queue + 0x4000);
        let rig_bus = rig.bus.clone();
        rig.spy.set(move || {
            left -= i64::from(left > 0);
            if left == 0 {
                rig_bus.heal();
                ends.fetch_add(1, Ordering::Relaxed);
            }
        });
        let result = domain.unmap(Iova(0x1000), 0x1000);
        rig.spy.clear();
        rig.make_bad(0..0);
        assert_eq!(result, Ok(0x1000), "{looks}");
        assert!(bus.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn completion_by_message_is_given_up_when_messages_abort() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let domain =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let master = driver.add_master(&exact(4), plain()).unwrap();
    driver.attach(&master, &domain).unwrap();
    assert!(driver.commands().completes_by_message());
    let queue = u64::from(rig.reg(0x90)) & !0x1f | u64::from(rig.reg(0x94) & 0xff_ffff) << 32;
    rig.make_unwritable(queue..queue + 0x4000);
    for _ in 0..50 {
        map(&domain, 0x1000, RAM, 0x1000);
        let mut port = rig.port();
        read64(&mut port, from(4), 0x1000).unwrap();
        assert_eq!(domain.unmap(Iova(0x1000), 0x1000), Ok(0x1000));
        assert!(read64(&mut port, from(4), 0x1000).is_err());
    }
    assert!(!driver.commands().completes_by_message());
    driver.handle_irq();
    assert_eq!(rig.reg(0x60), rig.reg(0x64));
}
