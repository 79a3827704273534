//! The PCIe test devices of the SMMUv3 board: substreams and processes, address translation services with invalidation,
//! page requests, and messages.

mod common;

use std::sync::Arc;

use common::{Board, RAM_V3 as RAM, Random, map, smmuv3};
use portcullis_arch::testdev::ResultCode;
use portcullis_arch::{Iova, Pa, SubstreamId};
use portcullis_board::sim::{AtsEvent, EventKind, Memory};
use portcullis_board::system::Tester;
use portcullis_bus::{AtsReply, DmaPort as _, PageResponse};
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::testdev::{Pasid, TestDeviceError};
use portcullis_iommu::{
    BindOptions, Domain, FaultModel, FaultReport, FaultResponse, Process, ProcessConfig, Prot,
};

const IN: u64 = 0x1000_0000;
const FIRST: &str = "testdev0";
const SECOND: &str = "testdev1";

/// A board with a stage 1 domain for each test device.
struct Rig {
    board: Board,
    domains: [Arc<Domain>; 2],
}

impl Rig {
    fn new() -> Self {
        let board = Board::of(smmuv3(), false);
        let domains = [FIRST, SECOND].map(|name| {
            let domain = board.stage1();
            board.system.core().attach_device(board.device(name), &domain).unwrap();
            domain
        });
        Self { board, domains }
    }

    fn tester(&self, name: &str) -> &Tester {
        self.board.system.tester(name).unwrap()
    }

    /// A copy that ends, with all interrupts handled.
    fn copy(&self, name: &str, to: u64, from: u64, len: u64) -> Result<(), TestDeviceError> {
        let driver = &self.tester(name).driver;
        driver.start(Iova(to), Iova(from), len).unwrap();
        self.board.settle();
        driver.result()
    }

    fn works(&self, name: &str, to: (u64, u64), from: (u64, u64), len: usize) {
        let mut random = Random(to.0 ^ from.1 ^ len as u64 | 1);
        let data: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        self.board.put(from.1, &data);
        self.board.put(to.1, &vec![0xee; len]);
        assert_eq!(self.copy(name, to.0, from.0, len as u64), Ok(()), "{:?}", self.board.faults());
        assert!(self.board.get(to.1, len) == data, "other bytes arrived");
    }

    fn terminated(&self, name: &str, to: u64, from: u64, destination: bool) {
        let result = self.copy(name, to, from, 16);
        let expected = TestDeviceError::Failed { code: ResultCode::Terminated, destination, done: 0 };
        assert_eq!(result, Err(expected));
    }

    fn process(&self) -> Arc<Process<Memory>> {
        let config = ProcessConfig { coherent_walk: true, ..ProcessConfig::default() };
        Process::new(self.board.machine().dma_memory(), config).unwrap()
    }

    fn bind(&self, name: &str, process: &Arc<Process<Memory>>) -> SubstreamId {
        let core = self.board.system.core();
        let bound = core.bind_substream(self.board.device(name), process.clone(), BindOptions::default());
        bound.unwrap().0
    }

    fn set_pasid(&self, name: &str, pasid: Option<SubstreamId>) {
        let pasid = pasid.map(|id| Pasid::new(id.get()));
        self.tester(name).driver.set_pasid(pasid).unwrap();
    }

    fn atc(&self, name: &str) -> Arc<portcullis_engines::AtcShared> {
        self.board.machine().engine(name).unwrap().atc.clone().unwrap()
    }

    fn ats_events(&self) -> Vec<AtsEvent> {
        let ats = |kind| if let EventKind::Ats { what, .. } = kind { Some(what) } else { None };
        self.board.events().into_iter().filter_map(|e| ats(e.kind)).collect()
    }
}

#[test]
fn each_function_has_its_own_stream_and_domain() {
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x8000);
    map(&rig.domains[1], IN, RAM + 0x1_0000, 0x8000);
    rig.works(FIRST, (IN + 0x4000, RAM + 0x4000), (IN + 1, RAM + 1), 0x2fff);
    rig.works(SECOND, (IN + 0x4000, RAM + 0x1_4000), (IN, RAM + 0x1_0000), 0x3000);
    rig.board.no_faults();
    rig.terminated(FIRST, IN, IN + 0x9000, false);
    let fault = rig.board.fault();
    assert_eq!((fault.report.reason, fault.name.as_deref()), (FaultReason::Translation, Some(FIRST)));
    assert_eq!(fault.report.stream.map(|s| s.get()), Some(0x408));
}

#[test]
fn the_blocking_copy_waits_for_a_device_with_a_delay() {
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x2000);
    rig.board.put(RAM, b"after two milliseconds");
    let driver = &rig.tester(FIRST).driver;
    driver.set_delay(2);
    let clock = rig.board.machine().clock();
    let before = rig.board.machine().tracer().now();
    assert_eq!(driver.copy(Iova(IN + 0x1000), Iova(IN), 22, &clock, 10_000), Ok(()));
    assert!(rig.board.machine().tracer().now() - before >= 2_000_000);
    assert_eq!(rig.board.get(RAM + 0x1000, 22), b"after two milliseconds");
    driver.set_delay(1000);
    let late = driver.copy(Iova(IN + 0x1000), Iova(IN), 22, &clock, 10_000);
    assert!(matches!(late, Err(TestDeviceError::Timeout(_))), "{late:?}");
}

#[test]
fn the_end_of_a_transfer_is_a_message() {
    let rig = Rig::new();
    map(&rig.domains[1], IN, RAM, 0x2000);
    assert_eq!(rig.copy(SECOND, IN + 0x1000, IN, 16), Ok(()));
    let data = rig.tester(SECOND).message.unwrap();
    let is = |e: &portcullis_board::sim::Event| matches!(e.kind, EventKind::Message { data: d, lpi, .. } if d == data && lpi == 8192 + data);
    assert_eq!(rig.board.events().iter().filter(|e| is(e)).count(), 1);
    assert_ne!(rig.tester(FIRST).message, Some(data));
}

#[test]
fn two_processes_share_a_device_by_substream_and_one_exits() {
    let rig = Rig::new();
    let (a, b) = (rig.process(), rig.process());
    let (pa, pb) = (rig.bind(FIRST, &a), rig.bind(FIRST, &b));
    assert_ne!(pa, pb);
    // The same address in both, and other memory; and the device's own domain goes on beside them.
    let va = Iova(0x5000_0000);
    for (process, text) in [(&a, b"of process a"), (&b, b"of process b")] {
        process.mmap_at(va, 0x2000, Prot::RW.noexec()).unwrap();
        process.write(va, text).unwrap();
        process.write(va.wrapping_add(0x1000), &[0; 12]).unwrap();
    }
    map(&rig.domains[0], IN, RAM, 0x4000);
    for (process, pasid, text) in [(&a, pa, b"of process a"), (&b, pb, b"of process b")] {
        rig.set_pasid(FIRST, Some(pasid));
        assert_eq!(rig.copy(FIRST, va.get() + 0x1000, va.get(), 12), Ok(()), "{:?}", rig.board.faults());
        let mut read = [0; 12];
        process.read(va.wrapping_add(0x1000), &mut read).unwrap();
        assert_eq!(&read, text);
    }
    rig.set_pasid(FIRST, None);
    rig.works(FIRST, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    rig.board.no_faults();

    // One exits: its substream faults, the other one and the device go on.
    a.exit().unwrap();
    rig.set_pasid(FIRST, Some(pa));
    rig.terminated(FIRST, va.get() + 0x1000, va.get(), false);
    let faults = rig.board.faults();
    assert!(faults.iter().all(|f| f.name.as_deref() == Some(FIRST)), "{faults:?}");
    rig.set_pasid(FIRST, Some(pb));
    assert_eq!(rig.copy(FIRST, va.get() + 0x1000, va.get(), 12), Ok(()));
    let core = rig.board.system.core();
    core.unbind_substream(rig.board.device(FIRST), pa).unwrap();
    core.unbind_substream(rig.board.device(FIRST), pb).unwrap();
    rig.terminated(FIRST, va.get() + 0x1000, va.get(), false);
    rig.set_pasid(FIRST, None);
    rig.works(FIRST, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
}

#[test]
fn a_translation_is_kept_by_the_device_until_it_is_invalidated() {
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x4000);
    assert!(rig.board.system.enable_ats(FIRST, true, false));
    rig.works(FIRST, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    let atc = rig.atc(FIRST);
    let before = atc.stats();
    assert!(before.requests >= 2 && atc.cached() >= 1, "{before:?}");
    rig.board.events();
    // Translations are there: nobody is asked again.
    rig.works(FIRST, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 0x1000);
    assert_eq!(atc.stats().requests, before.requests);
    let events = rig.ats_events();
    assert!(
        !events.is_empty() && events.iter().all(|e| matches!(e, AtsEvent::Translated { error: None, .. })),
        "{events:?}"
    );

    // Unmapping takes them away before it returns.
    rig.domains[0].unmap(Iova(IN), 0x1000).unwrap();
    let events = rig.ats_events();
    assert!(events.iter().any(|e| matches!(e, AtsEvent::Invalidation(_))), "{events:?}");
    assert!(atc.stats().invalidations > before.invalidations);
    rig.terminated(FIRST, IN + 0x1000, IN, false);
    // A translation request that finds nothing is no event of the SMMU.
    rig.board.no_faults();
    let no_access =
        |e: &AtsEvent| matches!(e, AtsEvent::Request { reply: AtsReply::Granted(t), .. } if !t.has_access());
    assert!(rig.ats_events().iter().any(no_access));
}

#[test]
fn ats_of_substreams_is_invalidated_with_them() {
    let rig = Rig::new();
    rig.board.system.enable_ats(FIRST, true, false);
    let process = rig.process();
    let pasid = rig.bind(FIRST, &process);
    let va = process.mmap(0x2000, Prot::RW.noexec()).unwrap();
    process.write(va, b"shared").unwrap();
    process.write(va.wrapping_add(0x1000), b"------").unwrap();
    rig.set_pasid(FIRST, Some(pasid));
    assert_eq!(rig.copy(FIRST, va.get() + 0x1000, va.get(), 6), Ok(()), "{:?}", rig.board.faults());
    let mut read = [0; 6];
    process.read(va.wrapping_add(0x1000), &mut read).unwrap();
    assert_eq!(&read, b"shared");
    assert!(rig.atc(FIRST).cached() > 0);
    process.munmap(va).unwrap();
    assert_eq!(rig.atc(FIRST).cached(), 0);
    rig.terminated(FIRST, va.get() + 0x1000, va.get(), false);
}

#[test]
fn ats_where_the_stream_does_not_have_it_is_refused_and_reported() {
    let rig = Rig::new();
    let identity = rig.board.alloc(portcullis_iommu::DomainSpec::Identity);
    rig.board.system.core().attach_device(rig.board.device(SECOND), &identity).unwrap();
    rig.works(SECOND, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
    rig.board.system.enable_ats(SECOND, true, false);
    rig.terminated(SECOND, RAM + 0x1000, RAM, false);
    let refused = |e: &AtsEvent| matches!(e, AtsEvent::Request { reply: AtsReply::Unsupported, .. });
    assert!(rig.ats_events().iter().any(refused));
    assert_eq!(rig.board.faults().len(), 1);
    // Software turns it off again for such a domain.
    rig.board.system.enable_ats(SECOND, false, false);
    rig.works(SECOND, (RAM + 0x1000, RAM + 0x1000), (RAM, RAM), 64);
}

#[test]
fn a_device_that_does_not_answer_an_invalidation_is_noticed() {
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x4000);
    rig.board.system.enable_ats(FIRST, true, false);
    rig.works(FIRST, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    rig.atc(FIRST).hang(true);
    let unmapped = rig.domains[0].unmap(Iova(IN), 0x1000);
    assert!(unmapped.is_err(), "{unmapped:?}");
    // The queue goes on.
    rig.atc(FIRST).hang(false);
    map(&rig.domains[1], IN, RAM, 0x4000);
    rig.works(SECOND, (IN + 0x1000, RAM + 0x1000), (IN, RAM), 64);
    assert_eq!(rig.domains[1].unmap(Iova(IN), 0x1000).unwrap(), 0x1000);
}

#[test]
fn a_page_request_is_resolved_by_the_process() {
    let rig = Rig::new();
    assert!(rig.board.system.enable_ats(FIRST, true, true));
    let process = rig.process();
    let pasid = rig.bind(FIRST, &process);
    // Memory that nobody has touched: the pages come when they are asked for.
    let va = process.reserve(0x4000, Prot::RW.noexec()).unwrap();
    assert!(process.fault_in(va).unwrap());
    process.write(va, b"on demand").unwrap();
    rig.set_pasid(FIRST, Some(pasid));
    assert_eq!(rig.copy(FIRST, va.get() + 0x2000, va.get(), 9), Ok(()), "{:?}", rig.board.faults());
    let mut read = [0; 9];
    process.read(va.wrapping_add(0x2000), &mut read).unwrap();
    assert_eq!(&read, b"on demand");
    let events = rig.ats_events();
    let requests = events.iter().filter(|e| matches!(e, AtsEvent::PageRequest(_))).count();
    let success = |e: &&AtsEvent| matches!(e, AtsEvent::Response(r) if r.code == PageResponse::Success);
    assert!(requests >= 1, "{events:?}");
    assert_eq!(events.iter().filter(success).count(), requests);
    assert_eq!(rig.atc(FIRST).outstanding_page_requests(), 0);

    // Outside of the process there is nothing to be had.
    rig.terminated(FIRST, 0x7f00_0000_0000, va.get(), true);
    let invalid = |e: &AtsEvent| matches!(e, AtsEvent::Response(r) if r.code == PageResponse::Invalid);
    assert!(rig.ats_events().iter().any(invalid));
}

#[test]
fn a_page_request_is_answered_by_the_owner_of_the_domain() {
    let rig = Rig::new();
    let model = FaultModel { stall: true, ..FaultModel::default() };
    let spec = portcullis_iommu::DomainSpec::Stage1(portcullis_iommu::Paging::default());
    let core = rig.board.system.core();
    let domain = core.alloc_domain_with(rig.board.instance(), spec, model).unwrap();
    core.attach_device(rig.board.device(FIRST), &domain).unwrap();
    map(&domain, IN, RAM, 0x1000);
    let mapper = domain.clone();
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        let page = report.iova.get() & !0xfff;
        mapper.map(Iova(page), Pa(RAM + (page - IN)), 0x1000, Prot::RW.noexec()).unwrap();
        FaultResponse::Resolved
    })));
    rig.board.system.enable_ats(FIRST, true, true);
    rig.works(FIRST, (IN + 0x3000, RAM + 0x3000), (IN, RAM), 0x800);
}

#[test]
fn an_engine_on_the_model_s_port_translates_like_the_board() {
    // A port outside of the board's engines, as an embedder makes it.
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x1000);
    rig.board.put(RAM, b"bytes");
    let smmu = rig.board.machine().smmu_v3().unwrap();
    let mut port = smmu.port(rig.board.machine().memory().clone());
    let from = portcullis_bus::Initiator::new(portcullis_arch::StreamId(0x408));
    let mut read = [0; 5];
    port.read(from, Iova(IN), &mut read).unwrap();
    assert_eq!(&read, b"bytes");
}

#[test]
fn an_aggressive_device_is_stopped_by_the_smmu_again_and_again() {
    let rig = Rig::new();
    map(&rig.domains[0], IN, RAM, 0x1000);
    let driver = &rig.tester(FIRST).driver;
    driver.mask();
    driver.set_transfer(Iova(IN), Iova(IN + 0x5000), 16).unwrap();
    driver.set_aggressive(true);
    rig.board.system.run_for(50_000);
    driver.set_aggressive(false);
    rig.board.settle();
    let faults = rig.board.system.core().take_faults();
    assert!(driver.count() > 10, "{}", driver.count());
    assert_eq!(faults.faults.len() as u64 + faults.lost, u64::from(driver.count()));
    assert!(faults.faults.iter().all(|f| f.report.iova == Iova(IN + 0x5000)));
}
