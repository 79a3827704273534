//! Real threads: devices hammer their mappings through warm ports while the driver changes them. When a call of the driver
//! has returned, no access reaches what it took away, not even one that was under way.
//!
//! The driver waits in real time here: the board's own clock counts steps of a machine that nobody else drives.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{Random, thesis};
use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_board::sim::{Machine, Options};
use portcullis_bus::{DmaPort as _, Initiator, Memory as _, View};
use portcullis_drivers::smmuv2;
use portcullis_iommu::{
    DefaultDomain, DeviceId, Domain, DomainSpec, FaultModel, FwSpec, InstanceId, IommuCore, Paging, Prot,
    StreamMatch,
};

const IN: u64 = 0x7000_0000;
const RAM: u64 = 0x6000_0000;
/// In every byte of a page that its new owner has taken.
const TAKEN: u8 = 0xa5;
/// In every byte that devices write.
const WRITTEN: u8 = 0x11;

const CHANNELS: [&str; 3] = ["fpd-dma0", "fpd-dma1", "lpd-dma0"];

/// One of these tests at a time: they need the processors.
static ALONE: Mutex<()> = Mutex::new(());

struct RealTime(Instant);

impl portcullis_hal::Clock for RealTime {
    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
    fn delay_us(&self, us: u64) {
        std::thread::sleep(Duration::from_micros(us));
    }
}

/// A machine with the driver of its SMMU and the four devices.
struct System {
    machine: Arc<Machine>,
    core: IommuCore,
    instance: InstanceId,
    devices: [DeviceId; 3],
}

fn boot() -> System {
    let machine = Machine::build(thesis(), Options::default()).unwrap();
    let registers = machine.smmu_registers().unwrap();
    let options = smmuv2::Options::new(0x2_0000, "arm,mmu-500");
    let clock = RealTime(Instant::now());
    let driver = smmuv2::SmmuV2::probe(registers, machine.dma_memory(), clock, options).unwrap();
    let core = IommuCore::new(DefaultDomain::Blocked);
    let instance = core.register("smmu", Arc::new(driver));
    let devices = CHANNELS.map(|name| {
        let stream = machine.engine(name).unwrap().stream;
        let spec = FwSpec { streams: vec![StreamMatch::exact(stream.get())] };
        core.add_device(name, instance, &spec, &[]).unwrap()
    });
    System { machine, core, instance, devices }
}

/// What the hammering threads tell.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Accesses that got through.
    through: AtomicU64,
    /// Accesses that were refused.
    refused: AtomicU64,
    /// Reads that returned what belongs to somebody else.
    leaked: AtomicU64,
}

/// One device: reads and writes of all sizes in `len` bytes from [`IN`].
fn hammer(system: &System, name: &str, len: u64, shared: &Shared) {
    let machine = &system.machine;
    let stream: StreamId = machine.engine(name).unwrap().stream;
    let mut port = machine.smmu().unwrap().port(machine.memory().view(View::NonCoherent, name));
    let (from, mut random) = (Initiator::new(stream), Random(u64::from(stream.get())));
    let mut buf = vec![0; len.min(0x4_0000) as usize];
    while !shared.stop.load(Ordering::Relaxed) {
        let at = random.below(len);
        let longest = (len - at).min(buf.len() as u64);
        // Mostly long ones: they are under way when the driver calls.
        let n = if random.below(4) == 0 { 1 + random.below(longest) } else { longest } as usize;
        let result = if random.below(2) == 0 {
            buf[..n].fill(WRITTEN);
            port.write(from, Iova(IN + at), &buf[..n])
        } else {
            let result = port.read(from, Iova(IN + at), &mut buf[..n]);
            let got = result.err().map_or(n, |e| e.done);
            if buf[..got].contains(&TAKEN) {
                shared.leaked.fetch_add(1, Ordering::Relaxed);
            }
            result
        };
        let counter = if result.is_ok() { &shared.through } else { &shared.refused };
        if counter.fetch_add(1, Ordering::Relaxed).is_multiple_of(32) {
            std::thread::yield_now();
        }
    }
}

/// Waits until `counter` has grown by a few.
fn wait_for(counter: &AtomicU64, limit: Instant) {
    let before = counter.load(Ordering::Relaxed);
    while counter.load(Ordering::Relaxed) < before + 5 && Instant::now() < limit {
        std::thread::yield_now();
    }
}

/// The new owner fills the memory, and finds nothing but that in it, now and a little later.
fn take_over(system: &System, pa: u64, len: usize, round: u64) {
    let memory = system.machine.memory();
    memory.write(Pa(pa), Default::default(), &vec![TAKEN; len]).unwrap();
    let mut seen = vec![0; len];
    for _ in 0..3 {
        std::thread::yield_now();
        memory.read(Pa(pa), Default::default(), &mut seen).unwrap();
        let changed = seen.iter().position(|b| *b != TAKEN);
        assert_eq!(changed, None, "round {round}: a device wrote into memory that was taken away");
    }
    memory.write(Pa(pa), Default::default(), &vec![0; len]).unwrap();
}

/// Runs `change` again and again for a while, with devices at work.
fn with_devices(len: u64, change: impl Fn(&System, &Shared, u64)) {
    let _one_at_a_time = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let system = boot();
    let shared = Shared::default();
    let mut rounds = 0;
    std::thread::scope(|scope| {
        struct Stop<'a>(&'a Shared);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Ordering::Relaxed);
            }
        }
        let _when_this_ends = Stop(&shared);
        for name in CHANNELS {
            let (system, shared) = (&system, &shared);
            scope.spawn(move || hammer(system, name, len, shared));
        }
        let end = Instant::now() + Duration::from_millis(800);
        while Instant::now() < end {
            change(&system, &shared, rounds);
            rounds += 1;
        }
    });
    let (through, refused) = (shared.through.into_inner(), shared.refused.into_inner());
    assert_eq!(shared.leaked.into_inner(), 0, "reads of memory that was taken away");
    assert!(rounds > 3 && through > 100 && refused > 10, "{rounds} rounds, {through} / {refused}");
    eprintln!("{rounds} rounds, {through} accesses through, {refused} refused");
}

/// A domain in which a fault does not stop the others.
fn domain(system: &System, spec: DomainSpec) -> Arc<Domain> {
    let model = FaultModel { keep_processing: true, ..FaultModel::default() };
    system.core.alloc_domain_with(system.instance, spec, model).unwrap()
}

fn attach_all(system: &System, domain: &Arc<Domain>) {
    for device in system.devices {
        system.core.attach_device(device, domain).unwrap();
    }
}

fn after_unmap_nothing_is_reached(spec: fn(Paging) -> DomainSpec, pages: u64) {
    let len = pages * 0x1000;
    let state = std::sync::OnceLock::new();
    with_devices(len, |system, shared, round| {
        let domain: &Arc<Domain> = state.get_or_init(|| {
            let domain = domain(system, spec(Paging::default()));
            attach_all(system, &domain);
            domain
        });
        let limit = Instant::now() + Duration::from_millis(100);
        // Scattered, so that no two pages are one run.
        let page = |i: u64| RAM + (i * 7 + round) % 64 * 0x2000;
        for i in 0..pages {
            domain.map(Iova(IN + i * 0x1000), Pa(page(i)), 0x1000, Prot::RW.noexec()).unwrap();
        }
        wait_for(&shared.through, limit);
        assert_eq!(domain.unmap(Iova(IN), len), Ok(len));
        for i in 0..pages {
            take_over(system, page(i), 0x1000, round);
        }
    });
    drop(state);
}

#[test]
fn after_a_stage_1_unmap_of_one_page_no_port_reaches_it() {
    after_unmap_nothing_is_reached(DomainSpec::Stage1, 1);
}

#[test]
fn after_a_stage_1_unmap_of_many_pages_no_port_reaches_them() {
    after_unmap_nothing_is_reached(DomainSpec::Stage1, 8);
}

#[test]
fn after_a_stage_2_unmap_no_port_reaches_the_pages() {
    after_unmap_nothing_is_reached(DomainSpec::Stage2, 3);
}

#[test]
fn accesses_that_are_under_way_have_ended_when_unmap_returns() {
    let state = std::sync::OnceLock::new();
    // One block: a single access of 256 KiB runs for a while with one translation.
    let len = 0x20_0000;
    with_devices(len, |system, shared, round| {
        let domain: &Arc<Domain> = state.get_or_init(|| {
            let domain = domain(system, DomainSpec::Stage1(Paging::default()));
            attach_all(system, &domain);
            domain
        });
        let limit = Instant::now() + Duration::from_millis(100);
        domain.map(Iova(IN), Pa(0x4000_0000), len, Prot::RW.noexec()).unwrap();
        wait_for(&shared.through, limit);
        assert_eq!(domain.unmap(Iova(IN), len), Ok(len));
        take_over(system, 0x4000_0000, len as usize, round);
    });
    drop(state);
}

#[test]
fn when_a_domain_is_gone_no_port_reaches_what_it_mapped() {
    with_devices(0x4000, |system, shared, round| {
        let limit = Instant::now() + Duration::from_millis(100);
        let domain = domain(system, DomainSpec::Stage1(Paging::default()));
        domain.map(Iova(IN), Pa(RAM + round % 16 * 0x4000), 0x4000, Prot::RW.noexec()).unwrap();
        attach_all(system, &domain);
        wait_for(&shared.through, limit);
        for device in system.devices {
            system.core.detach_device(device).unwrap();
        }
        // The next domain gets the same bank and ASID: this is where an entry that was left behind would show.
        drop(domain);
        take_over(system, RAM + round % 16 * 0x4000, 0x4000, round);
        wait_for(&shared.refused, limit);
        // Global faults are recorded for one at a time.
        system.core.handle_irq(system.instance).unwrap();
    });
}

#[test]
fn after_protect_no_port_writes() {
    let state = std::sync::OnceLock::new();
    with_devices(0x2000, |system, shared, round| {
        let domain: &Arc<Domain> = state.get_or_init(|| {
            let domain = domain(system, DomainSpec::Stage1(Paging::default()));
            attach_all(system, &domain);
            domain.map(Iova(IN), Pa(RAM), 0x2000, Prot::RW.noexec()).unwrap();
            domain
        });
        let limit = Instant::now() + Duration::from_millis(100);
        domain.protect(Iova(IN), 0x2000, Prot::RW.noexec()).unwrap();
        wait_for(&shared.through, limit);
        domain.protect(Iova(IN), 0x2000, Prot::READ.noexec()).unwrap();
        let memory = system.machine.memory();
        memory.write(Pa(RAM), Default::default(), &[0x77; 0x2000]).unwrap();
        wait_for(&shared.through, limit);
        let mut seen = vec![0; 0x2000];
        memory.read(Pa(RAM), Default::default(), &mut seen).unwrap();
        assert!(seen.iter().all(|b| *b == 0x77), "round {round}: a write after protect returned");
    });
    drop(state);
}
