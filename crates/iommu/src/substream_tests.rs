//! The core over the SMMUv3 driver: processes by substream, whose faults they resolve, and regions that have to be there
//! first. The SMMU is a window that acknowledges and consumes.

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Iova, Pa, StreamId, SubstreamId};
use portcullis_drivers::smmuv3::{Error as SmmuError, Options, SmmuV3};
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio};
use spin::Mutex;

use super::*;

const BASE: u64 = 0x8000_0000;

struct Rig {
    core: IommuCore,
    smmu: InstanceId,
    mmio: Arc<FakeMmio>,
    memory: Arc<FakeMemory>,
    commands: Arc<Mutex<Vec<[u64; 2]>>>,
}

/// Both stages, ATS, page requests, stalls, 8-bit streams and substreams, ranges, 48 bits, 4K; not coherent, no
/// messages.
const IDS: [(usize, u32); 4] = [
    (0x00, 0b11 | 2 << 2 | 1 << 10 | 1 << 12 | 1 << 16 | 2 << 21 | 1 << 27),
    (0x04, 8 | 8 << 6 | 7 << 11 | 7 << 16 | 7 << 21),
    (0x0c, 1 << 10),
    (0x14, 5 | 1 << 4),
];

fn rig_with(default: DefaultDomain) -> Rig {
    let memory = Arc::new(FakeMemory::non_coherent(BASE, 32 << 20));
    let commands = Arc::new(Mutex::new(Vec::new()));
    let (seen, consumed) = (memory.clone(), commands.clone());
    let mmio = Arc::new(FakeMmio::with_handler(move |registers, access| {
        match (access.write, access.offset) {
            (true, 0x20 | 0x50) => registers.set32(access.offset + 4, access.value as u32),
            (true, 0x44) => return Some(access.value & !(1 << 31)),
            (true, 0x98) => {
                let base = registers.get64(0x90);
                let (at, size) = (base & 0x00ff_ffff_ffff_ffe0, 1u32 << (base & 0x1f));
                let mut cons = registers.get32(0x9c);
                // CMDQEN is off while the queue is programmed.
                while registers.get32(0x24) & 8 != 0 && cons != access.value as u32 {
                    let at = at + u64::from(cons & (size - 1)) * 16;
                    let word = |at| seen.device_load64(Pa(at));
                    consumed.lock().push([word(at), word(at + 8)]);
                    cons = (cons + 1) & (2 * size - 1);
                }
                registers.set32(0x9c, cons);
            }
            _ => {}
        }
        None
    }));
    IDS.iter().for_each(|(offset, value)| mmio.set32(*offset, *value));
    let options = Options { timeout_us: 1000, ..Options::new(0x2_0000) };
    let smmu = SmmuV3::probe(mmio.clone(), memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    let core = IommuCore::new(default);
    let smmu = core.register("smmu", Arc::new(smmu));
    commands.lock().clear();
    Rig { core, smmu, mmio, memory, commands }
}

fn rig() -> Rig {
    rig_with(DefaultDomain::Blocked)
}

const PASIDS: MasterOptions = MasterOptions { substream_bits: 8, can_stall: true, ats: false };
const STALL: BindOptions =
    BindOptions { root: None, fault_model: FaultModel { stall: true, keep_processing: false } };

impl Rig {
    fn device_with(
        &self,
        name: &str,
        id: u32,
        reserved: &[ReservedRegion],
        options: MasterOptions,
    ) -> Result<DeviceId, Error> {
        let spec = FwSpec::from_cells(&[id], 1, None).unwrap();
        self.core.add_device_with(name, self.smmu, &spec, reserved, options)
    }
    fn device(&self, name: &str, id: u32) -> DeviceId {
        self.device_with(name, id, &[], PASIDS).unwrap()
    }
    fn process(&self) -> Arc<Process<Arc<FakeMemory>>> {
        Process::new(self.memory.clone(), ProcessConfig::default()).unwrap()
    }
    fn commands(&self) -> Vec<[u64; 2]> {
        core::mem::take(&mut *self.commands.lock())
    }
    /// A record in a queue.
    fn put(&self, base: usize, prod: usize, words: &[u64]) {
        let queue = self.mmio.get64(base);
        let (at, size) = (queue & 0x00ff_ffff_ffff_ffe0, 1u32 << (queue & 0x1f));
        let index = self.mmio.get32(prod);
        let at = at + u64::from(index & (size - 1)) * words.len() as u64 * 8;
        for (index, word) in words.iter().enumerate() {
            self.memory.device_store64(Pa(at + index as u64 * 8), *word);
        }
        self.mmio.set32(prod, (index + 1) & (2 * size - 1));
    }
    /// F_TRANSLATION of a stalled access of stream 5.
    fn stalled(&self, substream: u64, iova: Iova, read: bool, stag: u64) {
        let second = 1 << 31 | stag | u64::from(read) << 35 | 2 << 40;
        let words = [5 << 32 | substream << 12 | 1 << 11 | 0x10, second, iova.get(), 0];
        self.put(0xa0, 0x1_00a8, &words);
    }
    /// The last page request of group 1 of stream 5.
    fn request(&self, substream: u64, iova: Iova, write: bool) {
        let first = 5 | substream << 32 | 1 << 60 | u64::from(write) << 61 | 1 << 62 | 1 << 63;
        self.put(0xc0, 0x1_00c8, &[first, iova.get() & !0xfff | 1]);
    }
    #[track_caller]
    fn end(self) {
        let Self { core, memory, mmio, .. } = self;
        drop(core);
        drop(mmio);
        memory.assert_clean();
    }
}

#[test]
fn processes_share_a_device_by_substream_and_exit_one_by_one() {
    let rig = rig();
    let device = rig.device("dma", 5);
    let main = rig.core.paging_domain(rig.smmu).unwrap();
    rig.core.attach_device(device, &main).unwrap();
    let processes = [rig.process(), rig.process(), rig.process()];
    let mut domains = Vec::new();
    for (index, process) in processes.iter().enumerate() {
        process.mmap(0x3000, Prot::RW.cached()).unwrap();
        let (substream, domain) = rig.core.bind_substream(device, process.clone(), STALL).unwrap();
        assert_eq!(substream, SubstreamId(index as u32 + 1));
        assert_eq!(domain.table_root(), process.table_root());
        domains.push(domain);
    }
    let ids = [SubstreamId(1), SubstreamId(2), SubstreamId(3)];
    assert_eq!(rig.core.bound_substreams(device).unwrap(), ids);
    assert!(Arc::ptr_eq(&rig.core.domain_of(device).unwrap(), &main), "the device's own domain goes on");

    processes[1].exit().unwrap();
    assert!(!rig.core.is_bound(device).unwrap());
    assert_eq!(rig.core.bound_substreams(device).unwrap().len(), 3, "bound until it is unbound");
    // The others still find their pages.
    assert!(processes[0].lookup(Iova(1 << 46)).is_some());
    for id in ids {
        rig.core.unbind_substream(device, id).unwrap();
    }
    let error = rig.core.unbind_substream(device, SubstreamId(1)).unwrap_err();
    assert!(matches!(error, Error::SubstreamNotBound { .. }));
    assert!(processes.iter().all(|process| process.domains().is_empty()));
    drop((domains, processes, main));
    rig.core.remove_device(device).unwrap();
    rig.end();
}

#[test]
fn a_process_has_the_same_substream_with_every_device() {
    let rig = rig();
    let devices = [rig.device("a", 5), rig.device("b", 6)];
    let (first, second) = (rig.process(), rig.process());
    let (one, domain) = rig.core.bind_substream(devices[0], first.clone(), STALL).unwrap();
    let (two, _) = rig.core.bind_substream(devices[0], second.clone(), STALL).unwrap();
    let (again, shared) = rig.core.bind_substream(devices[1], first.clone(), STALL).unwrap();
    assert_eq!((one, two, again), (SubstreamId(1), SubstreamId(2), SubstreamId(1)));
    assert!(Arc::ptr_eq(&domain, &shared));
    let error = rig.core.bind_substream(devices[1], first.clone(), STALL).unwrap_err();
    assert_eq!(error, Error::SubstreamBound { device: "b".into(), substream: one });
    rig.core.unbind_substream(devices[0], one).unwrap();
    assert_eq!(first.domains().len(), 1, "the other device uses it still");
    rig.core.unbind_substream(devices[1], one).unwrap();
    assert!(first.domains().is_empty());
    // A free number is used again.
    let (third, _) = rig.core.bind_substream(devices[0], first.clone(), STALL).unwrap();
    assert_eq!(third, one);
}

#[test]
fn a_waiting_access_is_resolved_by_the_process_or_refused() {
    let rig = rig();
    let device = rig.device("dma", 5);
    let process = rig.process();
    let heap = process.reserve(0x4000, Prot::RW.cached()).unwrap();
    let text = process.reserve(0x1000, Prot::READ.cached()).unwrap();
    rig.core.bind_substream(device, process.clone(), STALL).unwrap();
    let resume = |stag: u64, retry: bool| [5 << 32 | 0x44 | if retry { 1 << 12 } else { 1 << 13 }, stag];
    let cases = [
        (1, heap.wrapping_add(0x1234), false, true),
        (1, heap.wrapping_add(0x1234), true, true),
        (1, text, true, true),
        (1, text, false, false),
        (1, Iova(0x1000), true, false),
        (2, heap, true, false),
    ];
    rig.commands();
    for (stag, (substream, iova, read, resolved)) in cases.into_iter().enumerate() {
        rig.stalled(substream, iova, read, stag as u64);
        assert_eq!(rig.core.handle_irq(rig.smmu), Ok(1));
        assert_eq!(rig.commands(), [resume(stag as u64, resolved)], "{iova:?}");
    }
    assert!(process.lookup(heap.wrapping_add(0x1234)).is_some());
    assert!(process.lookup(heap).is_none(), "only the page that was asked for");
    let faults = rig.core.take_faults().faults;
    assert_eq!(faults.len(), cases.len());
    assert_eq!((faults[0].device, faults[0].response), (Some(device), FaultResponse::Resolved));
    assert_eq!(faults[0].report.substream, Some(SubstreamId(1)));
}

#[test]
fn a_page_request_is_answered_by_the_process() {
    let rig = rig();
    let ats = MasterOptions { substream_bits: 8, can_stall: false, ats: true };
    let device = rig.device_with("nic", 5, &[], ats).unwrap();
    let process = rig.process();
    let heap = process.reserve(0x4000, Prot::RW.cached()).unwrap();
    rig.core.bind_substream(device, process.clone(), BindOptions::default()).unwrap();
    rig.commands();
    let answer = |substream: u64, code: u64| [[5 << 32 | substream << 12 | 1 << 11 | 0x41, 1 | code << 12]];
    for (substream, iova, code) in [(1, heap, 2), (1, Iova(0x1000), 1), (9, heap, 1)] {
        rig.request(substream, iova, true);
        rig.core.handle_irq(rig.smmu).unwrap();
        assert_eq!(rig.commands(), answer(substream, code), "substream {substream} {iova:?}");
    }
    assert!(process.lookup(heap).is_some());
}

#[test]
fn a_handler_of_the_device_goes_before_the_process() {
    let rig = rig();
    let device = rig.device("dma", 5);
    let process = rig.process();
    let heap = process.reserve(0x1000, Prot::RW).unwrap();
    rig.core.bind_substream(device, process.clone(), STALL).unwrap();
    let refuse = |_: &FaultReport| FaultResponse::Terminate;
    rig.core.set_fault_handler(device, Some(Arc::new(refuse))).unwrap();
    rig.stalled(1, heap, true, 7);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert!(process.lookup(heap).is_none());
    let deferred = |_: &FaultReport| FaultResponse::Deferred;
    rig.core.set_fault_handler(device, Some(Arc::new(deferred))).unwrap();
    rig.commands();
    rig.stalled(1, heap, true, 8);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert!(rig.commands().is_empty());
    let report = rig.core.take_faults().faults[1].report;
    rig.core.answer(rig.smmu, &report, FaultResponse::Resolved).unwrap();
    assert_eq!(rig.commands(), [[5 << 32 | 0x44 | 1 << 12, 8]]);
    assert!(rig.core.resume_stalled(rig.smmu, 0, FaultResponse::Resolved).is_err());
}

#[test]
fn devices_without_substreams_are_not_bound_by_one() {
    let rig = rig();
    let plain = rig.device_with("plain", 5, &[], MasterOptions::default()).unwrap();
    let error = rig.core.bind_substream(plain, rig.process(), STALL).unwrap_err();
    assert_eq!(error, Error::Substream { device: "plain".into(), substream: SubstreamId(1), bits: 0 });
    // As a whole it can be.
    let process = rig.process();
    let domain = rig.core.bind(plain, process.clone()).unwrap();
    assert_eq!((rig.core.is_bound(plain), domain.kind()), (Ok(true), DomainKind::Process));
    rig.core.unbind(plain).unwrap();
    // One bit is one substream, since 0 is for transactions without.
    let one = MasterOptions { substream_bits: 1, ..PASIDS };
    let small = rig.device_with("small", 6, &[], one).unwrap();
    rig.core.bind_substream(small, process, STALL).unwrap();
    let error = rig.core.bind_substream(small, rig.process(), STALL).unwrap_err();
    assert!(matches!(error, Error::Substream { bits: 1, .. }), "{error}");
    let error = rig.core.remove_device(small).unwrap_err();
    assert_eq!(error, Error::Bound { device: "small".into() });
    rig.core.unbind_substream(small, SubstreamId(1)).unwrap();
    rig.core.remove_device(small).unwrap();
}

#[test]
fn a_main_domain_that_leaves_no_room_for_substreams_is_refused() {
    let rig = rig();
    let device = rig.device("dma", 5);
    rig.core.bind_substream(device, rig.process(), STALL).unwrap();
    let stage2 = rig.core.alloc_domain(rig.smmu, DomainSpec::Stage2(Paging::default())).unwrap();
    let refused = SmmuError::SubstreamsBelow { stream: StreamId(5), kind: DomainKind::Stage2 };
    assert_eq!(rig.core.attach_device(device, &stage2), Err(Error::Iommu(refused.into())));
    let identity = rig.core.alloc_domain(rig.smmu, DomainSpec::Identity).unwrap();
    rig.core.attach_device(device, &identity).unwrap();
}

#[test]
fn direct_regions_are_mapped_before_the_first_attach_and_the_msi_window_is_reserved() {
    let rig = rig();
    let region = ReservedRegion::direct(Iova(0x4010_0000), 0x3000, Prot::RW);
    let device = rig.device_with("gpu", 5, &[region], MasterOptions::default()).unwrap();
    let domain = rig.core.domain_of(device).unwrap();
    assert_eq!(domain.kind(), DomainKind::Stage1, "not blocked");
    assert_eq!(domain.iova_to_phys(Iova(0x4010_2fff)), Some(Pa(0x4010_2fff)));
    let other = rig.core.paging_domain(rig.smmu).unwrap();
    // A part of it is there already, one to one.
    other.map(Iova(0x4010_1000), Pa(0x4010_1000), 0x1000, Prot::RW).unwrap();
    rig.core.attach_device(device, &other).unwrap();
    assert_eq!(other.iova_to_phys(Iova(0x4010_0000)), Some(Pa(0x4010_0000)));
    let blocked = rig.core.alloc_domain(rig.smmu, DomainSpec::Blocked).unwrap();
    assert!(matches!(rig.core.attach_device(device, &blocked), Err(Error::DirectRegion { .. })));
    let reserved = rig.core.reserved_regions(device).unwrap();
    assert_eq!(reserved[0], SOFTWARE_MSI);
    assert_eq!((SOFTWARE_MSI.start, SOFTWARE_MSI.len), (Iova(0x0800_0000), 1 << 20));
    assert_eq!(reserved[1], region);
}

#[test]
fn every_kind_of_domain_works_through_the_core() {
    let rig = rig();
    let device = rig.device_with("dma", 5, &[], MasterOptions::default()).unwrap();
    let parent = rig.core.alloc_domain(rig.smmu, DomainSpec::Stage2(Paging::default())).unwrap();
    let guest = GuestSte { dw0: 1 | 5 << 1 | 0x4000, dw1: 2 };
    let domains = [
        rig.core.paging_domain(rig.smmu).unwrap(),
        rig.core.alloc_domain(rig.smmu, DomainSpec::Identity).unwrap(),
        parent.clone(),
        rig.core.nested_domain(&parent, Paging::default()).unwrap(),
        rig.core.guest_domain(&parent, guest).unwrap(),
    ];
    for domain in &domains {
        rig.core.attach_device(device, domain).unwrap();
        assert_eq!(rig.core.domain_kind(device), Ok(domain.kind()));
    }
    domains[3].map(Iova(0x1000), Pa(0x2000), 0x1000, Prot::RW).unwrap();
    assert_eq!(domains[3].unmap(Iova(0x1000), 0x1000), Ok(0x1000));
    let other = super::InstanceId(9);
    assert_eq!(rig.core.handle_irq(other), Err(Error::UnknownInstance(other)));
    rig.core.remove_device(device).unwrap();
    drop((domains, parent));
    rig.end();
}
