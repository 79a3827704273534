//! The driver on the model when devices fault: storms that overflow the event queue, stalls in numbers, page requests of
//! several processes.

mod smmuv3_rig;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use portcullis_arch::{Iova, StreamId, SubstreamId};
use portcullis_bus::{DmaFault, DmaPort as _, Initiator, StallState, StallTag};
use portcullis_drivers::fault::{FaultDetail, FaultReport, FaultResponse};
use portcullis_drivers::ops::{DomainOptions, FaultModel, MasterOptions, Paging, StreamMatch};
use portcullis_drivers::smmuv3::fault::Source;
use portcullis_drivers::smmuv3::{DomainConfig, Options};
use portcullis_engines::{AtcConfig, AtcPort, AtcShared};
use portcullis_iommu::{
    BindOptions, DefaultDomain, DeviceId, FwSpec, InstanceId, IommuCore, Process, ProcessConfig, Prot,
};
use portcullis_smmuv3::Port;
use smmuv3_rig::{
    Bus, Driver, Mem, RAM, Random, Rig, RigDomain, caps, exact, from, from_substream, map, plain, read64, rw,
    stalling, write64,
};

const IN: u64 = 0x1000_0000;
const STALL: FaultModel = FaultModel { stall: true, keep_processing: false };

fn lost(report: &FaultReport) -> bool {
    matches!(report.detail, FaultDetail::SmmuV3Lost(Source::Events, _))
}

#[test]
fn an_event_queue_that_overflows_is_reported_and_goes_on() {
    let rig = Rig::new(caps());
    let driver = rig.driver_with(Options { queue_log2: [6, 4, 4], fault_log: 100_000, ..Rig::options() });
    let domain =
        driver.new_domain(DomainConfig::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    for stream in 1..5 {
        let master = driver.add_master(&exact(stream), plain()).unwrap();
        driver.attach(&master, &domain).unwrap();
    }
    map(&domain, IN, RAM, 0x1000);
    let mut port = rig.port();
    let mut random = Random(3);
    let mut total = (0u64, 0u64, 0u64);
    for _ in 0..300 {
        let storm = random.below(60);
        for i in 0..storm {
            assert!(read64(&mut port, from(1 + random.below(4) as u32), IN + 0x1_0000 + i * 0x1000).is_err());
        }
        driver.handle_irq();
        let batch = driver.take_faults();
        let overflows = batch.faults.iter().filter(|f| lost(f)).count() as u64;
        let records = batch.faults.len() as u64 - overflows;
        assert_eq!(batch.lost, 0);
        assert_eq!(records, storm.min(16));
        assert_eq!(overflows, u64::from(storm > 16), "{storm}");
        total = (total.0 + records, total.1 + overflows, total.2 + storm);
        assert!(read64(&mut port, from(1), IN).is_ok());
        assert_eq!(driver.handle_irq(), 0);
    }
    assert!(total.1 > 50, "{total:?}");

    // The same with a storm that never rests.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let (mut seen, mut overflows) = (0, 0);
    std::thread::scope(|scope| {
        for stream in 1..3 {
            let (stop, sent, mut port) = (&stop, &sent, rig.port());
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    assert!(read64(&mut port, from(stream), IN + 0x5000).is_err());
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let end = std::time::Instant::now() + std::time::Duration::from_millis(400);
        while std::time::Instant::now() < end || overflows == 0 || seen < 100 {
            driver.handle_irq();
            for fault in driver.take_faults().faults {
                if lost(&fault) { overflows += 1 } else { seen += 1 }
            }
            // Work goes on meanwhile.
            map(&domain, IN + 0x20_0000, RAM, 0x1000);
            assert_eq!(domain.unmap(Iova(IN + 0x20_0000), 0x1000), Ok(0x1000));
        }
        stop.store(true, Ordering::Relaxed);
    });
    driver.handle_irq();
    for fault in driver.take_faults().faults {
        if lost(&fault) { overflows += 1 } else { seen += 1 }
    }
    let sent = sent.into_inner();
    assert!(seen <= sent && (overflows > 0 || seen == sent), "{seen} of {sent}, {overflows} overflows");
    assert_eq!(driver.handle_irq(), 0);
}

/// A device that has stalled.
struct Waiting {
    port: Port<Bus>,
    stream: u32,
    tag: StallTag,
    at: u64,
}

fn stall(rig: &Rig, from: Initiator, at: u64) -> Waiting {
    let mut port = rig.port();
    let Err(error) = write64(&mut port, from, at, at) else { panic!("it went through") };
    let DmaFault::Stalled(tag) = error.fault else { panic!("{error:?}") };
    Waiting { port, stream: from.stream.get(), tag, at }
}

type Reports = Arc<Mutex<Vec<FaultReport>>>;

/// A handler that keeps reports for later.
fn deferring() -> (Reports, Arc<dyn portcullis_drivers::fault::FaultHandler>) {
    let reports = Reports::default();
    let keep = reports.clone();
    let handler = move |report: &FaultReport| {
        keep.lock().unwrap().push(*report);
        FaultResponse::Deferred
    };
    (reports, Arc::new(handler))
}

fn stalling_domain(
    driver: &Driver,
    handler: Arc<dyn portcullis_drivers::fault::FaultHandler>,
) -> Arc<RigDomain> {
    let options = DomainOptions { fault_model: STALL, handler: Some(handler) };
    driver.new_domain(DomainConfig::Stage1(Paging::default()), options).unwrap()
}

#[test]
fn stalls_of_many_devices_are_resolved_in_any_order() {
    for seed in 1..=6u64 {
        let rig = Rig::new(caps());
        // The event queue is far smaller than what stalls.
        let driver = rig.driver_with(Options { queue_log2: [6, 4, 4], ..Rig::options() });
        let (reports, handler) = deferring();
        let domain = stalling_domain(&driver, handler);
        let masters: Vec<_> = (0..100)
            .map(|s| {
                let master = driver.add_master(&exact(s + 1), stalling()).unwrap();
                driver.attach(&master, &domain).unwrap();
                master
            })
            .collect();
        let mut waiting: Vec<Option<Waiting>> =
            (0..100).map(|s| Some(stall(&rig, from(s + 1), IN + u64::from(s) * 0x1000))).collect();
        let mut random = Random(seed);
        for _ in 0..20 {
            driver.handle_irq();
        }
        assert_eq!(reports.lock().unwrap().len(), 100);
        assert_eq!(driver.waiting().0, 100);
        let mut order = reports.lock().unwrap().clone();
        random.shuffle(&mut order);
        for report in order {
            let slot = report.stream.unwrap().get() as usize - 1;
            let mut device = waiting[slot].take().unwrap();
            assert_eq!(report.iova.get() & !0xfff, device.at);
            assert_eq!(device.port.stall_state(device.tag), StallState::Waiting);
            match random.below(4) {
                0 => {
                    driver.answer(&report, FaultResponse::Terminate).unwrap();
                    driver.commands().issue_sync(&[]).unwrap();
                    let ended = device.port.stall_state(device.tag);
                    assert_eq!(ended, StallState::Terminated { abort: true });
                }
                1 => {
                    // Its domain goes away under it.
                    driver.detach(&masters[slot]).unwrap();
                    driver.commands().issue_sync(&[]).unwrap();
                    let ended = device.port.stall_state(device.tag);
                    assert_eq!(ended, StallState::Terminated { abort: true });
                    assert!(driver.answer(&report, FaultResponse::Resolved).is_err());
                    assert!(write64(&mut device.port, from(device.stream), device.at, 1).is_err());
                }
                2 => {
                    // Retried in vain: it stalls again, and is helped then.
                    driver.answer(&report, FaultResponse::Resolved).unwrap();
                    driver.commands().issue_sync(&[]).unwrap();
                    assert_eq!(device.port.stall_state(device.tag), StallState::Retry);
                    let again = stall(&rig, from(device.stream), device.at);
                    driver.handle_irq();
                    let report = *reports.lock().unwrap().last().unwrap();
                    assert_eq!(report.stream, Some(StreamId(device.stream)));
                    resolve(&driver, &domain, &report, again);
                }
                _ => resolve(&driver, &domain, &report, device),
            }
        }
        assert_eq!(driver.waiting(), (0, 0));
        assert!(rig.model().stalled().is_empty());
    }
}

fn resolve(driver: &Driver, domain: &RigDomain, report: &FaultReport, mut device: Waiting) {
    if domain.iova_to_phys(Iova(device.at)).is_none() {
        map(domain, device.at, RAM + (device.at - IN), 0x1000);
    }
    driver.answer(report, FaultResponse::Resolved).unwrap();
    driver.commands().issue_sync(&[]).unwrap();
    assert_eq!(device.port.stall_state(device.tag), StallState::Retry);
    assert_eq!(write64(&mut device.port, from(device.stream), device.at, device.at), Ok(()));
}

#[test]
fn whatever_ends_the_use_of_a_domain_ends_what_is_stalled_in_it() {
    // Detaching the device's domain while a substream goes on, detaching the substream, dropping the domain, taking the
    // device out, turning translation off.
    for way in 0..6 {
        let rig = Rig::new(caps());
        let driver = rig.driver();
        let (reports, handler) = deferring();
        let main = stalling_domain(&driver, handler.clone());
        let sub = stalling_domain(&driver, handler.clone());
        let options = MasterOptions { substream_bits: 4, ..stalling() };
        let master = driver.add_master(&exact(1), options).unwrap();
        driver.attach(&master, &main).unwrap();
        driver.attach_substream(&master, SubstreamId(3), &sub).unwrap();
        let mut of_main = stall(&rig, from(1), IN);
        let mut of_sub = stall(&rig, from_substream(1, 3), IN + 0x1000);
        let handled = way % 2 == 0;
        if handled {
            driver.handle_irq();
            assert_eq!(reports.lock().unwrap().len(), 2);
        }
        let (mut main, mut sub) = (Some(main), Some(sub));
        let (main_ends, sub_ends) = match way / 2 {
            0 => {
                driver.detach(&master).unwrap();
                (true, false)
            }
            1 => {
                driver.detach_substream(&master, SubstreamId(3)).unwrap();
                (false, true)
            }
            _ => {
                drop((main.take(), sub.take()));
                (true, true)
            }
        };
        if !handled {
            driver.handle_irq();
        }
        driver.commands().issue_sync(&[]).unwrap();
        let terminated = StallState::Terminated { abort: true };
        let expected = |ends| if ends { terminated } else { StallState::Waiting };
        assert_eq!(of_main.port.stall_state(of_main.tag), expected(main_ends), "way {way}: main");
        assert_eq!(of_sub.port.stall_state(of_sub.tag), expected(sub_ends), "way {way}: substream");
        drop(master);
        driver.shutdown().unwrap();
        for device in [&mut of_main, &mut of_sub] {
            assert_ne!(device.port.stall_state(device.tag), StallState::Waiting);
        }
    }
}

#[test]
fn a_loss_of_power_ends_stalls_and_nothing_else() {
    let rig = Rig::new(caps());
    let driver = rig.driver();
    let (reports, handler) = deferring();
    let domain = stalling_domain(&driver, handler);
    let master = driver.add_master(&exact(1), stalling()).unwrap();
    driver.attach(&master, &domain).unwrap();
    map(&domain, IN, RAM, 0x1000);
    for power in [true, false, true] {
        let mut device = stall(&rig, from(1), IN + 0x5000);
        driver.handle_irq();
        let report = reports.lock().unwrap().pop().unwrap();
        assert_eq!(driver.waiting().0, 1);
        if power {
            rig.model().reset();
        } else {
            assert!(driver.shutdown().unwrap());
            assert!(write64(&mut device.port, from(1), IN, 1).is_err());
        }
        driver.resume().unwrap();
        assert_eq!(device.port.stall_state(device.tag), StallState::Terminated { abort: true });
        assert_eq!(driver.waiting(), (0, 0));
        // A late answer is for nobody, and above all not for the next stall.
        let again = stall(&rig, from(1), IN + 0x6000);
        let _it_may_be_an_error = driver.answer(&report, FaultResponse::Terminate);
        driver.handle_irq();
        let report = reports.lock().unwrap().pop().unwrap();
        resolve(&driver, &domain, &report, again);
        assert_eq!(domain.unmap(Iova(IN + 0x6000), 0x1000), Ok(0x1000));
        let mut port = rig.port();
        assert_eq!(write64(&mut port, from(1), IN, 2), Ok(()));
    }
}

/// The core over the driver, with devices that have ATS and page requests.
struct Core {
    rig: Rig,
    driver: Arc<Driver>,
    core: IommuCore,
    instance: InstanceId,
}

struct Device {
    id: DeviceId,
    stream: u32,
    atc: Arc<AtcShared>,
    port: AtcPort<Port<Bus>>,
}

fn core(options: Options) -> Core {
    let rig = Rig::new(caps());
    let driver = Arc::new(rig.driver_with(options));
    let core = IommuCore::new(DefaultDomain::Blocked);
    let instance = core.register("smmu", driver.clone());
    Core { rig, driver, core, instance }
}

impl Core {
    fn device(&self, stream: u32) -> Device {
        let options = MasterOptions { substream_bits: 6, can_stall: false, ats: true };
        let spec = FwSpec { streams: vec![StreamMatch::exact(stream)] };
        let id =
            self.core.add_device_with(&format!("d{stream}"), self.instance, &spec, &[], options).unwrap();
        let atc = AtcShared::new(AtcConfig::default());
        self.rig.model().attach_ats(StreamId(stream), atc.clone());
        let port = AtcPort::new(atc.clone(), self.rig.port());
        Device { id, stream, atc, port }
    }

    fn process(&self) -> Arc<Process<Mem>> {
        let config = ProcessConfig { coherent_walk: true, pa_bits: 44, ..ProcessConfig::default() };
        Process::new(self.rig.memory(), config).unwrap()
    }

    fn bind(&self, device: &Device, process: &Arc<Process<Mem>>) -> SubstreamId {
        let options = BindOptions { fault_model: STALL, ..BindOptions::default() };
        self.core.bind_substream(device.id, process.clone(), options).unwrap().0
    }

    fn irq(&self) {
        for _ in 0..4 {
            self.core.handle_irq(self.instance).unwrap();
        }
        self.driver.commands().issue_sync(&[]).unwrap();
    }
}

impl Device {
    fn from(&self, substream: SubstreamId) -> Initiator {
        from_substream(self.stream, substream.get())
    }
    fn write(&mut self, substream: SubstreamId, at: u64, value: u64) -> Result<(), DmaFault> {
        let from = self.from(substream);
        self.port.write(from, Iova(at), &value.to_le_bytes()).map_err(|e| e.fault)
    }
    /// Writes, and waits for the page if it has to.
    fn write_at_last(
        &mut self,
        core: &Core,
        substream: SubstreamId,
        at: u64,
        value: u64,
    ) -> Result<(), DmaFault> {
        for _ in 0..8 {
            let DmaFault::Stalled(tag) = (match self.write(substream, at, value) {
                Err(fault) => fault,
                Ok(()) => return Ok(()),
            }) else {
                return Err(DmaFault::Terminated);
            };
            core.irq();
            match self.port.stall_state(tag) {
                StallState::Retry => {}
                other => {
                    assert_eq!(other, StallState::Terminated { abort: true });
                    return Err(DmaFault::Terminated);
                }
            }
        }
        panic!("it asks for the page again and again")
    }
}

#[test]
fn processes_page_on_demand_and_exit_with_requests_outstanding() {
    for seed in 1..=4u64 {
        let core = core(Rig::options());
        let mut devices = [core.device(1), core.device(2)];
        let mut random = Random(seed);
        let mut processes: Vec<(Arc<Process<Mem>>, u64, [SubstreamId; 2])> = (0..4)
            .map(|_| {
                let process = core.process();
                let va = process.reserve(0x4_0000, rw()).unwrap().get();
                let ids = [core.bind(&devices[0], &process), core.bind(&devices[1], &process)];
                (process, va, ids)
            })
            .collect();
        for _ in 0..60 {
            let d = random.below(2) as usize;
            let (process, va, ids) = &processes[random.below(4) as usize];
            let at = (va + random.below(0x4_0000)) & !7;
            let value = random.next();
            assert_eq!(devices[d].write_at_last(&core, ids[d], at, value), Ok(()));
            let mut read = [0; 8];
            process.read(Iova(at), &mut read).unwrap();
            assert_eq!(u64::from_le_bytes(read), value);
        }
        // Outside of the process, and a PASID that nobody has.
        let (_, _, ids) = &processes[0];
        assert_eq!(devices[0].write_at_last(&core, ids[0], 0x7fff_0000_0000, 1), Err(DmaFault::Terminated));
        assert_eq!(devices[0].write_at_last(&core, SubstreamId(60), 0x1000, 1), Err(DmaFault::Terminated));

        // Requests of every process wait in the queue when one of them exits, one is unbound, one unmaps what was asked
        // for, and one goes on.
        let mut tags = Vec::new();
        for (process, va, ids) in &mut processes {
            let fresh = process.reserve(0x4000, rw()).unwrap().get();
            for (d, device) in devices.iter_mut().enumerate() {
                let Err(DmaFault::Stalled(tag)) = device.write(ids[d], fresh, 1) else {
                    panic!("no request")
                };
                tags.push((d, tag));
            }
            *va = fresh;
        }
        processes[0].0.exit().unwrap();
        for (device, id) in devices.iter().zip(processes[1].2) {
            core.core.unbind_substream(device.id, id).unwrap();
        }
        processes[2].0.munmap(Iova(processes[2].1)).unwrap();
        core.irq();
        for (i, (d, tag)) in tags.into_iter().enumerate() {
            let state = devices[d].port.stall_state(tag);
            let good = i / 2 == 3;
            let expected = if good { StallState::Retry } else { StallState::Terminated { abort: true } };
            assert_eq!(state, expected, "process {} device {d}", i / 2);
        }
        for device in &devices {
            assert_eq!(device.atc.outstanding_page_requests(), 0);
            assert!(!device.atc.pri_failed());
        }
        let (_, va, ids) = &processes[3];
        assert_eq!(devices[1].write_at_last(&core, ids[1], *va, 7), Ok(()));
        assert_eq!(core.driver.waiting(), (0, 0));
        for (device, id) in devices.iter().zip(processes[0].2) {
            core.core.unbind_substream(device.id, id).unwrap();
        }
    }
}

#[test]
fn a_device_that_is_bound_while_the_process_unmaps_does_not_keep_the_page() {
    let core = Arc::new(core(Rig::options()));
    let device = core.device(1);
    let process = core.process();
    let va = process.mmap(0x1000, rw()).unwrap();
    let warm = Arc::new(Mutex::new((core.rig.port(), None)));
    let (keep, owner, space, id) = (warm.clone(), core.clone(), process.clone(), device.id);
    core.rig.before.set(move || {
        let (port, bound) = &mut *keep.lock().unwrap();
        if bound.is_none() {
            let options = BindOptions::default();
            let (substream, _) = owner.core.bind_substream(id, space.clone(), options).unwrap();
            read64(port, from_substream(1, substream.get()), va.get()).unwrap();
            *bound = Some(substream);
        }
    });
    process.munmap(va).unwrap();
    core.rig.before.clear();
    let (port, bound) = &mut *warm.lock().unwrap();
    assert!(read64(port, from_substream(1, bound.unwrap().get()), va.get()).is_err());
}

#[test]
fn a_page_request_queue_that_overflows_loses_nobody_for_good() {
    let core = core(Options { queue_log2: [6, 6, 2], ..Rig::options() });
    let mut devices: Vec<Device> = (1..=8).map(|stream| core.device(stream)).collect();
    let process = core.process();
    let va = process.reserve(0x10_0000, rw()).unwrap().get();
    let ids: Vec<_> = devices.iter().map(|device| core.bind(device, &process)).collect();
    for round in 0..10u64 {
        let mut open: Vec<(usize, u64)> = (0..8).map(|d| (d, va + (round * 8 + d as u64) * 0x1000)).collect();
        for _ in 0..20 {
            let mut tags = Vec::new();
            open.retain(|&(d, at)| match devices[d].write(ids[d], at, at) {
                Ok(()) => false,
                Err(DmaFault::Stalled(tag)) => {
                    tags.push((d, tag));
                    true
                }
                Err(other) => panic!("{other:?}"),
            });
            core.irq();
            for (d, tag) in tags {
                assert_eq!(devices[d].port.stall_state(tag), StallState::Retry, "device {d}");
            }
        }
        assert!(open.is_empty(), "round {round}: {open:?}");
    }
    let lost = core.driver.faults_total();
    assert!(lost > 0);
    assert_eq!(core.driver.waiting(), (0, 0));
}

#[test]
fn a_refused_access_in_a_process_is_not_retried_for_ever() {
    // A stalling device fetches instructions from a page that is there but not executable, writes to a read-only one,
    // and reads a privileged-only one.
    let rig = Rig::new(caps());
    let driver = Arc::new(rig.driver());
    let core = IommuCore::new(DefaultDomain::Blocked);
    let instance = core.register("smmu", driver.clone());
    let options = MasterOptions { substream_bits: 4, can_stall: true, ats: false };
    let spec = FwSpec { streams: vec![StreamMatch::exact(1)] };
    let id = core.add_device_with("d", instance, &spec, &[], options).unwrap();
    let config = ProcessConfig { coherent_walk: true, pa_bits: 44, ..ProcessConfig::default() };
    let process = Process::new(rig.memory(), config).unwrap();
    let bound = BindOptions { fault_model: STALL, ..BindOptions::default() };
    let (substream, _) = core.bind_substream(id, process.clone(), bound).unwrap();
    let data = process.mmap(0x1000, rw()).unwrap().get();
    let constant = process.mmap(0x1000, Prot::READ.noexec().cached()).unwrap().get();
    let privileged = process.mmap(0x1000, rw().privileged()).unwrap().get();
    let lazy = process.reserve(0x1000, rw()).unwrap().get();
    let plain = from_substream(1, substream.get());
    let fetch = plain.with_attrs(plain.attrs.with_instruction(true));
    let mut port = rig.port();
    for (what, from, at, write, fine) in [
        ("fetch from data", fetch, data, false, false),
        ("fetch from data that is not there yet", fetch, lazy, false, false),
        ("write to a constant", plain, constant, true, false),
        ("read of a privileged page", plain, privileged, false, false),
        ("write to data", plain, data, true, true),
    ] {
        let mut rounds = 0;
        let ended = loop {
            let result =
                if write { write64(&mut port, from, at, 1) } else { read64(&mut port, from, at).map(|_| ()) };
            let Err(error) = result else { break true };
            let DmaFault::Stalled(tag) = error.fault else { panic!("{what}: {error:?}") };
            core.handle_irq(instance).unwrap();
            driver.commands().issue_sync(&[]).unwrap();
            match port.stall_state(tag) {
                StallState::Terminated { .. } => break false,
                StallState::Retry => rounds += 1,
                StallState::Waiting => panic!("{what}: nobody has answered"),
            }
            assert!(rounds < 5, "{what}: retried again and again");
        };
        assert_eq!(ended, fine, "{what}");
    }
}
