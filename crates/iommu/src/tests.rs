//! The core over the SMMUv2 driver over a register window that remembers.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::{Asid, Iova, Pa, StreamId};
use portcullis_drivers::smmuv2::{Options, SmmuV2};
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio};
use spin::Mutex;

use super::*;

const S2CR: usize = 0xc00;
const fn bank(n: usize, offset: usize) -> usize {
    0x1_0000 + n * 0x1000 + offset
}

struct Rig {
    core: IommuCore,
    smmu: InstanceId,
    mmio: Arc<FakeMmio>,
    memory: Arc<FakeMemory>,
    /// Banks whose TLBSTATUS stays busy.
    stuck: Arc<AtomicBool>,
}

fn smmu(memory: &Arc<FakeMemory>) -> (Arc<dyn IommuOps>, Arc<FakeMmio>, Arc<AtomicBool>) {
    let stuck = Arc::new(AtomicBool::new(false));
    let busy = stuck.clone();
    let mmio = Arc::new(FakeMmio::with_handler(move |registers, access| {
        let page = access.offset & 0xfff;
        match (access.write, access.offset >= 0x1_0000) {
            (true, true) if page == 0x58 => {
                Some(u64::from(registers.get32(access.offset)) & !(access.value & 0x8000_01fe))
            }
            (true, false) if access.offset == 0x48 => {
                Some(u64::from(registers.get32(access.offset)) & !access.value)
            }
            (false, true) if page == 0x7f4 => Some(busy.load(Ordering::Relaxed).into()),
            _ => None,
        }
    }));
    for (offset, value) in
        [(0x00, 0x0020_0001), (0x20, 0x7c01_3e30), (0x24, 0x3000_0010), (0x28, 0x5555), (0x3c, 0x21)]
    {
        mmio.set32(offset, value);
    }
    let options = Options { tlb_timeout_us: 100, ..Options::new(0x2_0000, "arm,mmu-500") };
    let smmu = SmmuV2::probe(mmio.clone(), memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    (Arc::new(smmu), mmio, stuck)
}

fn rig_with(default: DefaultDomain) -> Rig {
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 16 << 20));
    let (ops, mmio, stuck) = smmu(&memory);
    let core = IommuCore::new(default);
    let smmu = core.register("fd800000.iommu", ops);
    mmio.take_log();
    Rig { core, smmu, mmio, memory, stuck }
}

fn rig() -> Rig {
    rig_with(DefaultDomain::Blocked)
}

impl Rig {
    fn device(&self, name: &str, ids: &[u32]) -> Result<DeviceId, Error> {
        let spec = FwSpec::from_cells(ids, 1, None).unwrap();
        self.core.add_device(name, self.smmu, &spec, &[])
    }
    fn masked(&self, name: &str, id: u32, mask: u32) -> Result<DeviceId, Error> {
        let spec = FwSpec::from_cells(&[id, mask], 2, None).unwrap();
        self.core.add_device(name, self.smmu, &spec, &[])
    }
    fn fault(&self, n: usize, stream: u32, iova: u64) {
        self.mmio.set64(bank(n, 0x060), iova);
        self.mmio.set32(bank(n, 0x058), 0x402);
        self.mmio.set32(bank(n, 0x068), 0x3);
        self.mmio.set32(0x1400 + n * 4, stream);
    }
    fn s2cr(&self, n: usize) -> u32 {
        self.mmio.get32(S2CR + n * 4)
    }
    fn process(&self) -> Arc<Process<Arc<FakeMemory>>> {
        Process::new(self.memory.clone(), ProcessConfig::default()).unwrap()
    }
}

#[test]
fn the_thesis_maps_two_pages_and_the_device_goes_through_its_bank() {
    let rig = rig();
    let dma = rig.device("fd500000.dma", &[0x14e8]).unwrap();
    assert_eq!(rig.core.domain_kind(dma), Ok(DomainKind::Blocked));
    assert_eq!(rig.s2cr(0), 0x0002_0000);
    let domain = rig.core.paging_domain(rig.smmu).unwrap();
    rig.core.attach_device(dma, &domain).unwrap();
    domain.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
    domain.map(Iova(0x7000_2000), Pa(0x6000_2000), 0x1000, Prot::RW).unwrap();
    assert_eq!(domain.iova_to_phys(Iova(0x7000_2abc)), Some(Pa(0x6000_2abc)));
    assert_eq!(rig.s2cr(0), u32::from(domain.bank().unwrap()));
    assert_eq!(domain.unmap(Iova(0x7000_0000), 0x3000).unwrap(), 0x2000);
    rig.core.detach_device(dma).unwrap();
    assert_eq!(rig.s2cr(0), 0x0002_0000);
    drop(domain);
    rig.core.remove_device(dma).unwrap();
    rig.memory.assert_clean();
}

#[test]
fn devices_that_share_streams_share_a_group_and_others_do_not() {
    let rig = rig();
    // As S0's dma-proxy node, which repeats the streams of the engine.
    let engine = rig.device("a0000000.dma", &[0xe80, 0xe81, 0xe82]).unwrap();
    let proxy = rig.device("dma-proxy", &[0xe81]).unwrap();
    let other = rig.device("a0010000.dma", &[0xe83, 0xe84, 0xe85]).unwrap();
    let group = rig.core.group_of(engine).unwrap();
    assert_eq!(rig.core.group_of(proxy), Ok(group));
    assert_ne!(rig.core.group_of(other), Ok(group));
    assert_eq!(rig.core.devices_of(group), Ok(vec![engine, proxy]));
    let domain = rig.core.paging_domain(rig.smmu).unwrap();
    let error = rig.core.attach_device(engine, &domain).unwrap_err();
    assert!(matches!(&error, Error::GroupNotSingular { others, .. } if others == &["dma-proxy"]), "{error}");
    rig.core.attach_group(group, &domain).unwrap();
    assert!((0..3).all(|n| rig.s2cr(n) == 0) && rig.s2cr(3) == 0x0002_0000);
    // A newcomer to the group meets the domain the group has.
    let late = rig.device("late", &[0xe82]).unwrap();
    assert!(Arc::ptr_eq(&rig.core.domain_of(late).unwrap(), &domain));
    assert_eq!(rig.s2cr(2), 0);
}

#[test]
fn masks_make_groups_too_and_a_device_cannot_join_two() {
    let rig = rig();
    let port = rig.masked("hpc0", 0x200, 0x3f).unwrap();
    let writer = rig.device("b0000000.writer", &[0x203]).unwrap();
    assert_eq!(rig.core.group_of(port), rig.core.group_of(writer));
    let dma = rig.device("dma", &[0x868]).unwrap();
    let error = rig.device("both", &[0x204, 0x868]).unwrap_err();
    let groups = vec![rig.core.group_of(port).unwrap(), rig.core.group_of(dma).unwrap()];
    assert_eq!(error, Error::GroupConflict { device: "both".to_string(), groups });
    assert_eq!(rig.core.devices(), [port, writer, dma]);
    let error = rig.masked("half", 0x868, 0x1).unwrap_err();
    assert!(error.to_string().contains("0x868 mask 0x1 overlaps entry 1, which matches 0x868"), "{error}");
    // Nobody lost anything by it: the entries can be freed and used again.
    for device in [port, writer, dma] {
        rig.core.remove_device(device).unwrap();
    }
    assert_eq!(rig.masked("half", 0x868, 0x1).map(drop), Ok(()));
}

#[test]
fn sixteen_devices_in_sixteen_domains_and_the_seventeenth_is_refused() {
    let rig = rig();
    let channels: Vec<DeviceId> = (0..8)
        .flat_map(|n| [0x14e8 + n, 0x868 + n])
        .map(|id| rig.device(&id.to_string(), &[id]).unwrap())
        .collect();
    let mut domains = Vec::new();
    for (n, channel) in channels.iter().enumerate() {
        let domain = rig.core.paging_domain(rig.smmu).unwrap();
        domain.map(Iova(0x7000_0000), Pa(0x6000_0000 + ((n as u64) << 12)), 0x1000, Prot::RW).unwrap();
        rig.core.attach_device(*channel, &domain).unwrap();
        domains.push(domain);
    }
    for (n, domain) in domains.iter().enumerate() {
        assert_eq!(domain.bank(), Some(n as u8));
        assert_eq!(rig.s2cr(n), n as u32);
        assert_eq!(domain.iova_to_phys(Iova(0x7000_0000)), Some(Pa(0x6000_0000 + ((n as u64) << 12))));
    }
    let error = rig.core.paging_domain(rig.smmu).unwrap_err();
    assert!(error.to_string().starts_with("no free context bank for a stage 1 domain: all 16"), "{error}");
    // One domain for two devices needs no bank more.
    rig.core.attach_device(channels[1], &domains[0]).unwrap();
    domains.remove(1);
    assert_eq!(rig.core.paging_domain(rig.smmu).unwrap().bank(), Some(1));
}

#[test]
fn faults_find_the_device_by_its_stream() {
    let rig = rig();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let handler = |name: &'static str| -> Option<Arc<dyn FaultHandler>> {
        let seen = seen.clone();
        Some(Arc::new(move |report: &FaultReport| {
            seen.lock().push((name, report.iova.get()));
            FaultResponse::Terminate
        }))
    };
    let (a, b) = (rig.device("a", &[0x868]).unwrap(), rig.masked("b", 0x200, 0x3f).unwrap());
    let (of_a, of_b) = (rig.core.paging_domain(rig.smmu).unwrap(), rig.core.paging_domain(rig.smmu).unwrap());
    rig.core.attach_device(a, &of_a).unwrap();
    rig.core.attach_device(b, &of_b).unwrap();
    rig.core.set_fault_handler(a, handler("a")).unwrap();
    of_b.set_fault_handler(handler("domain of b"));
    rig.fault(1, 0x217, 0x5000);
    assert_eq!(rig.core.handle_irq(rig.smmu), Ok(1));
    rig.fault(0, 0x868, 0x6000);
    rig.fault(1, 0x201, 0x7000);
    assert_eq!(rig.core.handle_irq(rig.smmu), Ok(2));
    assert_eq!(*seen.lock(), [("domain of b", 0x5000), ("a", 0x6000), ("domain of b", 0x7000)]);
    rig.core.set_fault_handler(b, handler("b")).unwrap();
    rig.fault(1, 0x200, 0x8000);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert_eq!(seen.lock().last(), Some(&("b", 0x8000)), "the device goes before its domain");
    let faults = rig.core.take_faults().faults;
    let routed: Vec<_> = faults.iter().map(|fault| (fault.device, fault.report.stream)).collect();
    let stream = |id| Some(StreamId(id));
    assert_eq!(
        routed,
        [
            (Some(b), stream(0x217)),
            (Some(a), stream(0x868)),
            (Some(b), stream(0x201)),
            (Some(b), stream(0x200))
        ]
    );
}

#[test]
fn a_stream_of_nobody_is_reported_without_a_device() {
    let rig = rig();
    rig.device("hpc0", &[0x200]).unwrap();
    rig.mmio.set32(0x48, 0x2);
    rig.mmio.set32(0x54, 0x201);
    assert_eq!(rig.core.handle_irq(rig.smmu), Ok(1));
    let fault = rig.core.take_faults().faults.remove(0);
    assert_eq!((fault.device, fault.report.reason), (None, FaultReason::UnknownStream));
}

#[test]
fn two_devices_on_one_stream_are_told_apart_by_nothing_and_the_first_is_named() {
    let rig = rig();
    let first = rig.device("engine", &[0xe80]).unwrap();
    rig.device("proxy", &[0xe80]).unwrap();
    let domain = rig.core.paging_domain(rig.smmu).unwrap();
    rig.core.attach_group(rig.core.group_of(first).unwrap(), &domain).unwrap();
    rig.fault(0, 0xe80, 0x1000);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert_eq!(rig.core.take_faults().faults[0].device, Some(first));
}

#[test]
fn direct_regions_are_mapped_before_the_attach() {
    let rig = rig();
    let region = ReservedRegion::direct(Iova(0x3ed0_0000), 0x4000, Prot::RW);
    let spec = FwSpec::from_cells(&[0xce3], 1, None).unwrap();
    let display = rig.core.add_device("display", rig.smmu, &spec, &[region]).unwrap();
    // Blocked is the default here, but not for such a device.
    let default = rig.core.domain_of(display).unwrap();
    assert_eq!(
        (default.kind(), default.iova_to_phys(Iova(0x3ed0_3fff))),
        (DomainKind::Stage1, Some(Pa(0x3ed0_3fff)))
    );
    let own = rig.core.paging_domain(rig.smmu).unwrap();
    own.map(Iova(0x3ed0_1000), Pa(0x3ed0_1000), 0x1000, Prot::RW).unwrap();
    rig.core.attach_device(display, &own).unwrap();
    let direct = |at| own.iova_to_phys(Iova(at)) == Some(Pa(at));
    assert!((0x3ed0_0000..0x3ed0_4000).step_by(0x1000).all(direct), "around what was there");
    assert!(!direct(0x3ed0_4000));
    let blocked = rig.core.alloc_domain(rig.smmu, DomainSpec::Blocked).unwrap();
    let error = rig.core.attach_device(display, &blocked).unwrap_err();
    assert!(error.to_string().contains("display needs 0x3ed00000+0x4000 mapped one to one"), "{error}");
    assert_eq!(rig.core.domain_kind(display), Ok(DomainKind::Stage1));
    let kinds: Vec<_> =
        rig.core.reserved_regions(display).unwrap().iter().map(|region| region.kind).collect();
    assert_eq!(kinds, [ReservedKind::SoftwareMsi, ReservedKind::Direct]);
}

#[test]
fn a_direct_region_of_any_size_is_decided_at_once() {
    let rig = rig();
    let spec = FwSpec::from_cells(&[0xce3], 1, None).unwrap();
    let add = |start, len| {
        let region = ReservedRegion::direct(Iova(start), len, Prot::RW);
        rig.core.add_device("display", rig.smmu, &spec, &[region])
    };
    assert!(matches!(add(0, u64::MAX), Err(Error::Iommu(_))), "more than the domain has");
    assert!(matches!(add(u64::MAX - 5, 5), Err(Error::Iommu(_))));
    rig.core.remove_device(add(0, 1 << 40).unwrap()).unwrap();
    rig.memory.assert_clean();
}

#[test]
fn a_direct_region_that_collides_stops_the_attach_and_changes_nothing() {
    let rig = rig();
    let region = ReservedRegion::direct(Iova(0x1000), 0x1000, Prot::RW);
    let spec = FwSpec::from_cells(&[0xce3], 1, None).unwrap();
    let display = rig.core.add_device("display", rig.smmu, &spec, &[region]).unwrap();
    let before = rig.s2cr(0);
    let domain = rig.core.paging_domain(rig.smmu).unwrap();
    domain.map(Iova(0x1000), Pa(0x9000), 0x1000, Prot::RW).unwrap();
    assert!(matches!(rig.core.attach_device(display, &domain), Err(Error::Iommu(_))));
    assert_eq!(rig.s2cr(0), before);
}

#[test]
fn a_domain_of_another_iommu_is_refused() {
    let rig = rig();
    let (second, _mmio, _stuck) = smmu(&rig.memory);
    let second = rig.core.register("second", second);
    let device = rig.device("dma", &[0x868]).unwrap();
    let domain = rig.core.paging_domain(second).unwrap();
    assert_eq!(
        rig.core.attach_device(device, &domain),
        Err(Error::OtherInstance { domain: second, device: rig.smmu })
    );
    assert_eq!(rig.core.paging_domain(InstanceId(7)).unwrap_err(), Error::UnknownInstance(InstanceId(7)));
    assert_eq!(rig.core.instance_name(second).as_deref(), Some("second"));
}

#[test]
fn nested_domains_through_the_core() {
    let rig = rig();
    let device = rig.device("dma", &[0x868]).unwrap();
    let guest = rig.core.alloc_domain(rig.smmu, DomainSpec::Stage2(Paging::default())).unwrap();
    guest.map(Iova(0x8000_0000), Pa(0x6000_0000), 0x10_0000, Prot::RW).unwrap();
    let nested = rig.core.nested_domain(&guest, Paging::default()).unwrap();
    nested.map(Iova(0x1000), Pa(0x8000_5000), 0x1000, Prot::RW).unwrap();
    rig.core.attach_device(device, &nested).unwrap();
    assert_eq!(nested.iova_to_phys(Iova(0x1010)), Some(Pa(0x6000_5010)));
    // A fault of stage 2 is recorded in the parent's bank, and still finds the device.
    rig.fault(usize::from(guest.bank().unwrap()), 0x868, 0x1000);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert_eq!(rig.core.take_faults().faults[0].device, Some(device));
}

#[test]
fn the_default_domain_is_the_cores_choice() {
    for (default, kind) in [
        (DefaultDomain::Blocked, DomainKind::Blocked),
        (DefaultDomain::Identity, DomainKind::Identity),
        (DefaultDomain::Translated, DomainKind::Stage1),
    ] {
        let rig = rig_with(default);
        let device = rig.device("dma", &[0x868]).unwrap();
        assert_eq!(rig.core.domain_kind(device), Ok(kind));
        rig.core.remove_device(device).unwrap();
        rig.memory.assert_clean();
    }
}

#[test]
fn a_process_and_a_device_see_the_same_memory() {
    let rig = rig();
    let writer = rig.device("b0000000.writer", &[0x200]).unwrap();
    let before = rig.core.paging_domain(rig.smmu).unwrap();
    rig.core.attach_device(writer, &before).unwrap();
    let process = rig.process();
    let buffer = process.mmap(0x1800, Prot::RW.cached().noexec()).unwrap();
    process.write(buffer.wrapping_add(0xffe), b"spans two pages").unwrap();
    let mut back = [0; 15];
    process.read(buffer.wrapping_add(0xffe), &mut back).unwrap();
    assert_eq!(&back, b"spans two pages");
    let domain = rig.core.bind(writer, process.clone()).unwrap();
    assert_eq!((domain.kind(), rig.s2cr(0)), (DomainKind::Process, u32::from(domain.bank().unwrap())));
    assert_eq!(rig.core.is_bound(writer), Ok(true));
    let n = usize::from(domain.bank().unwrap());
    let root = process.table_root().unwrap();
    assert_eq!(rig.mmio.get64(bank(n, 0x20)) & 0xffff_ffff_ffff, root.ttbr0.get());
    assert_eq!(
        rig.core.attach_device(writer, &before),
        Err(Error::Bound { device: "b0000000.writer".to_string() })
    );
    assert!(matches!(rig.core.bind(writer, rig.process()), Err(Error::Bound { .. })));
    rig.core.unbind(writer).unwrap();
    assert!(Arc::ptr_eq(&rig.core.domain_of(writer).unwrap(), &before));
    assert!(matches!(rig.core.unbind(writer), Err(Error::NotBound { .. })));
    drop(domain);
    assert_eq!(rig.mmio.get32(bank(n, 0)), 0, "the bank is free again");
    assert!(process.domains().is_empty());
}

#[test]
fn unbind_moves_the_stream_and_stops_walks_before_the_process_forgets_the_device() {
    let rig = rig();
    let device = rig.device("dma", &[0x868]).unwrap();
    let process = rig.process();
    let domain = rig.core.bind(device, process.clone()).unwrap();
    rig.mmio.take_log();
    rig.core.unbind(device).unwrap();
    let offsets: Vec<usize> = rig.mmio.take_writes().iter().map(|write| write.0).collect();
    assert_eq!(offsets, [S2CR, bank(0, 0x030), bank(0, 0x610), bank(0, 0x7f0)]);
    assert!(process.domains().is_empty());
    drop(domain);
    // If the hardware does not confirm, the process goes on telling it, and keeps its tables at exit.
    rig.core.bind(device, process.clone()).unwrap();
    rig.stuck.store(true, Ordering::Relaxed);
    assert!(matches!(rig.core.unbind(device), Err(Error::Iommu(_))));
    assert_eq!((process.domains().len(), rig.core.is_bound(device)), (1, Ok(false)));
    assert!(process.exit().is_err());
}

#[test]
fn munmap_reaches_the_tlb_before_the_pages_are_freed() {
    let rig = rig();
    let device = rig.device("dma", &[0x868]).unwrap();
    let process = Process::new(
        rig.memory.clone(),
        ProcessConfig { asid: Some(Asid(0x77)), ..ProcessConfig::default() },
    )
    .unwrap();
    let va = process.mmap(0x2000, Prot::RW).unwrap();
    rig.core.bind(device, process.clone()).unwrap();
    rig.mmio.take_log();
    assert_eq!(process.munmap(va), Ok(0x2000));
    let operand = |page: u64| (0x77 << 48) | ((va.get() >> 12) + page);
    let expected =
        [(bank(0, 0x600), operand(0)), (bank(0, 0x600), operand(1)), (bank(0, 0x7f0), 0xffff_ffff)];
    assert_eq!(rig.mmio.take_writes(), expected);
    assert_eq!(process.munmap(va), Err(ProcessError::NotMapped { va }));
    // When the hardware does not answer, the pages are lost rather than reused.
    let va = process.mmap(0x1000, Prot::RW).unwrap();
    let before = rig.memory.outstanding();
    rig.stuck.store(true, Ordering::Relaxed);
    assert!(matches!(process.munmap(va), Err(ProcessError::Device(_))));
    assert_eq!(rig.memory.outstanding(), before);
    rig.stuck.store(false, Ordering::Relaxed);
}

#[test]
fn process_exit_stops_walks_then_invalidates_then_frees_and_unbind_follows() {
    let rig = rig();
    let (a, b) = (rig.device("a", &[0x868]).unwrap(), rig.device("b", &[0x869]).unwrap());
    let process = rig.process();
    process.mmap(0x5000, Prot::RW).unwrap();
    let domain = rig.core.bind(a, process.clone()).unwrap();
    assert!(Arc::ptr_eq(&rig.core.bind(b, process.clone()).unwrap(), &domain), "one process, one bank");
    rig.mmio.take_log();
    process.exit().unwrap();
    let log: Vec<_> =
        rig.mmio.take_log().iter().map(|access| (access.write, access.offset, access.value)).collect();
    let tcr = u64::from(rig.mmio.get32(bank(0, 0x30)));
    assert_ne!(tcr & 1 << 7, 0, "EPD0: every access faults from now on");
    let expected = [
        (true, bank(0, 0x30), tcr),
        (true, bank(0, 0x610), 0),
        (true, bank(0, 0x7f0), 0xffff_ffff),
        (false, bank(0, 0x7f4), 0),
    ];
    assert_eq!(log, expected);
    rig.memory.assert_clean();
    assert_eq!((process.exit(), process.has_exited()), (Ok(()), true));
    assert!(rig.mmio.take_log().is_empty(), "once");
    assert_eq!(process.mmap(0x1000, Prot::RW), Err(ProcessError::Exited));
    // Still bound: a late access is a fault of the right device, not of somebody's memory.
    rig.fault(0, 0x869, 0x1000);
    rig.core.handle_irq(rig.smmu).unwrap();
    assert_eq!(rig.core.take_faults().faults[0].device, Some(b));
    rig.core.unbind(a).unwrap();
    rig.core.unbind(b).unwrap();
    assert_eq!((rig.s2cr(0), rig.s2cr(1)), (0x0002_0000, 0x0002_0000));
    assert_eq!(rig.core.bind(a, process).unwrap_err(), Error::ProcessExited);
}

#[test]
fn an_exit_that_the_hardware_does_not_confirm_keeps_everything() {
    let rig = rig();
    let device = rig.device("dma", &[0x868]).unwrap();
    let process = rig.process();
    process.mmap(0x1000, Prot::RW).unwrap();
    let blocks = rig.memory.outstanding();
    rig.core.bind(device, process.clone()).unwrap();
    rig.stuck.store(true, Ordering::Relaxed);
    assert!(matches!(process.exit(), Err(ProcessError::Device(_))));
    assert_eq!((rig.memory.outstanding(), rig.memory.uses_after_free()), (blocks, 0));
    assert_eq!(process.mmap(0x1000, Prot::RW), Err(ProcessError::Exited));
}

#[test]
fn dropping_the_process_is_exit() {
    let rig = rig();
    let process = rig.process();
    process.mmap(0x3000, Prot::RW).unwrap();
    drop(process);
    rig.memory.assert_clean();
}

#[test]
fn other_registers_can_be_tried_out_on_the_same_process() {
    let rig = rig();
    let device = rig.device("dma", &[0x200]).unwrap();
    let config = ProcessConfig { va_bits: 39, pa_bits: 40, ..ProcessConfig::default() };
    let process = Process::new(rig.memory.clone(), config).unwrap();
    let right = process.table_root().unwrap();
    assert_eq!((right.t0sz, right.ips), (25, 2));
    let wrong = BindOptions { root: Some(TableRoot { t0sz: 16, ..right }), ..BindOptions::default() };
    rig.core.bind_with(device, process.clone(), wrong).unwrap();
    assert_eq!(rig.mmio.get32(bank(0, 0x30)) & 0x3f, 16);
    rig.core.unbind(device).unwrap();
    rig.core.bind(device, process).unwrap();
    assert_eq!(rig.mmio.get32(bank(0, 0x30)) & 0x3f, 25);
}

#[test]
fn a_reservation_takes_memory_only_where_it_is_touched() {
    let rig = rig();
    let process = Process::new(rig.memory.clone(), ProcessConfig::default()).unwrap();
    let before = rig.memory.outstanding();
    // Most of the address space: no list of its pages could be held.
    let va = process.reserve(1 << 46, Prot::RW).unwrap();
    assert_eq!(rig.memory.outstanding(), before);
    let far = va.wrapping_add((1 << 46) - 0x1000);
    assert_eq!(process.fault_in(far), Ok(true));
    assert_eq!(process.fault_in(far), Ok(false));
    assert!(matches!(process.fault_in(va.wrapping_add(1 << 46)), Err(ProcessError::NotMapped { .. })));
    process.munmap(va).unwrap();
    assert_eq!(process.lookup(far), None);
}

#[test]
fn a_page_can_come_at_the_fault_of_a_stalled_device() {
    let rig = rig();
    let device = rig.device("dma", &[0x200]).unwrap();
    let process = rig.process();
    let va = process.reserve(0x4000, Prot::RW).unwrap();
    assert_eq!(process.lookup(va), None);
    let pager = process.clone();
    let handler: Arc<dyn FaultHandler> =
        Arc::new(move |report: &FaultReport| match pager.fault_in(report.iova) {
            Ok(_) => FaultResponse::Resolved,
            Err(_) => FaultResponse::Terminate,
        });
    rig.core.set_fault_handler(device, Some(handler)).unwrap();
    let stall = BindOptions {
        fault_model: FaultModel { stall: true, keep_processing: false },
        ..BindOptions::default()
    };
    rig.core.bind_with(device, process.clone(), stall).unwrap();
    for (iova, resume) in [(va.get() + 0x2008, 0), (0x1000, 1)] {
        rig.fault(0, 0x200, iova);
        rig.mmio.set32(bank(0, 0x058), 0x4000_0402);
        rig.core.handle_irq(rig.smmu).unwrap();
        assert_eq!(rig.mmio.get32(bank(0, 0x008)), resume);
        rig.mmio.set32(bank(0, 0x058), 0);
    }
    assert!(process.lookup(va.wrapping_add(0x2008)).is_some());
    assert_eq!((process.fault_in(va.wrapping_add(0x2000)), process.lookup(va)), (Ok(false), None));
    rig.core.set_fault_handler(device, None).unwrap();
}

#[test]
fn addresses_of_a_process_do_not_collide() {
    let rig = rig();
    let process = rig.process();
    let at = |va| process.mmap_at(Iova(va), 0x2000, Prot::RW);
    at(0x40_0000).unwrap();
    for taken in [0x40_0000, 0x3f_f000, 0x40_1000] {
        assert!(matches!(at(taken), Err(ProcessError::Range { .. })), "{taken:#x}");
    }
    assert!(matches!(at(0x40_0123), Err(ProcessError::Range { .. })));
    assert!(matches!(at(u64::MAX - 0xfff), Err(ProcessError::Range { .. })));
    assert!(matches!(at((1 << 48) - 0x1000), Err(ProcessError::Range { .. })));
    at(0x3f_e000).unwrap();
    let (a, b) = (process.mmap(1, Prot::RW).unwrap(), process.mmap(0x3000, Prot::RW).unwrap());
    assert_eq!(b.get() - a.get(), 0x1000);
    process.munmap(a).unwrap();
    assert_eq!(process.mmap(0x1000, Prot::RW), Ok(a), "the gap is used again");
    assert!(matches!(process.mmap(1 << 48, Prot::RW), Err(ProcessError::NoRoom { .. })));
    assert!(matches!(process.mmap(0, Prot::RW), Err(ProcessError::NoRoom { .. })));
    assert!(process.write(Iova(0x40_1fff), b"ab").is_err(), "runs out of the area");
    let mut byte = [0xff];
    process.read(Iova(0x40_1fff), &mut byte).unwrap();
    assert_eq!(byte, [0], "and nothing was written");
}

#[test]
fn memory_that_runs_out_leaves_a_process_as_it_was() {
    let rig = rig();
    let process = rig.process();
    let tables = process.table_count();
    rig.memory.fail_after(5);
    assert!(process.mmap(0x10_0000, Prot::RW).is_err());
    rig.memory.fail_never();
    let pages = rig.memory.outstanding() - process.table_count();
    assert_eq!((tables, pages), (1, 0), "pages are given back, empty tables may stay");
    drop(process);
    rig.memory.assert_clean();
}

#[test]
fn tables_can_be_cleaned_by_hand_for_a_walker_that_does_not_snoop() {
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 1 << 20));
    let walk = |process: &Process<Arc<FakeMemory>>, va: u64| {
        let mut table = process.table_root().unwrap().ttbr0;
        for shift in [39, 30, 21, 12] {
            let entry = memory.device_load64(table.wrapping_add((va >> shift & 0x1ff) * 8));
            table = Pa(entry & 0xffff_ffff_f000);
        }
        table
    };
    let config = ProcessConfig { coherent_walk: true, ..ProcessConfig::default() };
    let process = Process::new(memory.clone(), config).unwrap();
    let va = process.mmap(0x1000, Prot::RW).unwrap();
    assert_ne!(Some(walk(&process, va.get())), process.lookup(va), "the tables are in the CPU's cache");
    process.clean_tables();
    assert_eq!(Some(walk(&process, va.get())), process.lookup(va));
    let process = Process::new(memory.clone(), ProcessConfig::default()).unwrap();
    let va = process.mmap(0x1000, Prot::RW).unwrap();
    assert_eq!(Some(walk(&process, va.get())), process.lookup(va));
    // Data is the caller's business either way.
    process.write(va, &[0x5a; 8]).unwrap();
    let pa = process.lookup(va).unwrap();
    assert_ne!(memory.device_load64(pa), 0x5a5a_5a5a_5a5a_5a5a);
    process.clean(va, 8).unwrap();
    assert_eq!(memory.device_load64(pa), 0x5a5a_5a5a_5a5a_5a5a);
    memory.device_store64(pa, 7);
    process.invalidate(va, 8).unwrap();
    assert_eq!(memory.load64(pa), 7);
}
