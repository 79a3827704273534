//! What can go wrong between two owners of a device: refusals at the worst moment, calls that cross each other, memory that
//! somebody else had before.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use portcullis_arch::smmuv2::offset::gr0;
use portcullis_arch::{Iova, Ipa, Pa};
use portcullis_drivers::fault::{FaultBatch, FaultHandler, FaultReport, FaultResponse};
use portcullis_drivers::ops::{
    Capabilities, DomainOps, DomainOptions, DomainSpec, IommuError, IommuOps, Master, MasterOptions,
    StreamMatch, StreamOverrides, TableRoot,
};
use portcullis_hal::fake::{FakeClock, FakeMemory};
use portcullis_hal::{Block, Clock, DmaMemory, Mmio};
use portcullis_iommu::{DefaultDomain, DomainKind, FwSpec, IommuCore, Prot, ReservedKind, ReservedRegion};
use spin::Mutex;

use crate::ranges::Counted;
use crate::testing::{Host, axi_device, host, host_with, smmu};
use crate::viommu::{ViommuFault, ViommuInfo};
use crate::*;

const MIB: u64 = 1 << 20;

/// An IOMMU that does not take a device into a domain while it is told to refuse.
struct Refusing {
    inner: Arc<dyn IommuOps>,
    refuses: Arc<AtomicBool>,
}

impl IommuOps for Refusing {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn add_device(&self, streams: &[StreamMatch], options: MasterOptions) -> Result<Master, IommuError> {
        self.inner.add_device(streams, options)
    }
    fn remove_device(&self, master: Master) -> Result<(), IommuError> {
        self.inner.remove_device(master)
    }
    fn alloc_domain(
        &self,
        spec: DomainSpec,
        options: DomainOptions,
    ) -> Result<Arc<dyn DomainOps>, IommuError> {
        self.inner.alloc_domain(spec, options)
    }
    fn attach(&self, master: &Master, domain: &dyn DomainOps) -> Result<(), IommuError> {
        match self.refuses.load(Ordering::Relaxed) {
            true => Err(IommuError::Unsupported { what: "will" }),
            false => self.inner.attach(master, domain),
        }
    }
    fn detach(&self, master: &Master) -> Result<(), IommuError> {
        self.inner.detach(master)
    }
    fn set_overrides(&self, master: &Master, overrides: StreamOverrides) -> Result<(), IommuError> {
        self.inner.set_overrides(master, overrides)
    }
    fn handle_irq(&self) -> usize {
        self.inner.handle_irq()
    }
    fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        self.inner.set_fault_handler(handler);
    }
    fn take_faults(&self) -> FaultBatch {
        self.inner.take_faults()
    }
    fn answer(&self, report: &FaultReport, response: FaultResponse) -> Result<(), IommuError> {
        self.inner.answer(report, response)
    }
    fn resume(&self) -> Result<(), IommuError> {
        self.inner.resume()
    }
    fn shutdown(&self) -> Result<bool, IommuError> {
        self.inner.shutdown()
    }
}

#[derive(Default)]
struct Book(Mutex<Counted>);

impl PinMemory for Book {
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError> {
        self.0.lock().add(pa.get(), pa.get() + len);
        Ok(())
    }
    fn unpin(&self, pa: Pa, len: u64) {
        self.0.lock().remove(pa.get(), pa.get() + len);
    }
}

type Step = Box<dyn FnOnce() -> Result<(), ()> + Send>;

/// A reset that does what it is told, call by call; then it succeeds.
#[derive(Default)]
struct Told(Mutex<VecDeque<Step>>);

impl Told {
    fn next(&self, step: impl FnOnce() -> Result<(), ()> + Send + 'static) {
        self.0.lock().push_back(Box::new(step));
    }
}

impl ResetDriver for Told {
    fn compatible(&self) -> &[&'static str] {
        &["xlnx,axi-dma-1.00.a"]
    }
    fn reset(&self, device: &PlatformDevice, _: &Arc<dyn Clock>) -> Result<(), ResetError> {
        let step = self.0.lock().pop_front();
        let result = step.map_or(Ok(()), |step| step());
        if let Some(region) = device.regions.first() {
            region.registers.write32(0x10, 1);
        }
        result.map_err(|()| ResetError {
            device: device.name.clone(),
            what: ResetFailure::Unrecognised { kind: "anything" },
            registers: Vec::new(),
        })
    }
}

struct Rig {
    core: IommuCore,
    registry: Registry,
    reset: Arc<Told>,
    refuses: Arc<AtomicBool>,
    device: portcullis_iommu::DeviceId,
    memory: Arc<FakeMemory>,
    axi: crate::testing::AxiCore,
}

fn rig() -> Rig {
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 16 << 20));
    let refuses = Arc::new(AtomicBool::new(false));
    let core = IommuCore::new(DefaultDomain::Translated);
    let ops = Arc::new(Refusing { inner: smmu(&memory).0, refuses: refuses.clone() });
    let instance = core.register("iommu", ops);
    let spec = FwSpec::from_cells(&[0xe80], 1, None).unwrap();
    let device = core.add_device("dma0", instance, &spec, &[]).unwrap();
    let reset = Arc::new(Told::default());
    let resets = ResetDrivers::none().with(reset.clone());
    let registry = Registry::with_resets(core.clone(), Arc::new(FakeClock::new()), resets);
    let axi = crate::testing::AxiCore::new();
    registry.add_device(PlatformDevice { device: Some(device), ..axi_device("dma0", &axi) }).unwrap();
    Rig { core, registry, reset, refuses, device, memory, axi }
}

fn at(pa: u64, len: u64) -> HostRange {
    HostRange { pa: Pa(pa), len }
}

#[test]
fn memory_stays_pinned_as_long_as_a_group_that_cannot_be_blocked_reaches_it() {
    let rig = rig();
    rig.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let book = Arc::new(Book::default());
    let ioas = Ioas::new(book.clone(), IoasOptions::default());
    let block = rig.memory.alloc(0x4000, 0x1000).unwrap();
    ioas.map(Iova(0x1_0000), &[at(block.pa.get(), 0x4000)], Prot::RW).unwrap();
    let group = rig.registry.take_group("dma0").unwrap();
    group.attach(&ioas).unwrap();
    rig.refuses.store(true, Ordering::Relaxed);
    assert!(group.release().is_err());
    drop((group, ioas));
    let reached = rig.core.domain_of(rig.device).unwrap().iova_to_phys(Iova(0x1_0000));
    assert_eq!(reached, Some(block.pa), "it is where it was");
    assert_eq!(book.0.lock().bytes(), 0x4000, "so its memory is still in use");
}

#[test]
fn a_reset_that_its_owner_asked_for_does_not_outlive_the_release() {
    let rig = rig();
    rig.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let ioas = Ioas::new(Arc::new(Resident), IoasOptions::default());
    let group = rig.registry.take_group("dma0").unwrap();
    group.attach(&ioas).unwrap();
    let device = group.open("dma0").unwrap();
    // The first try fails. While the second, of the blocked device, is under way, the device is taken away.
    rig.reset.next(|| Err(()));
    let other = group.clone();
    rig.reset.next(move || {
        other.release().unwrap();
        Ok(())
    });
    let _whatever = device.reset();
    let now = rig.core.domain_of(rig.device).unwrap();
    assert!(ioas.groups().is_empty() && group.is_released());
    let its = ioas.domain(group.instance());
    assert!(its.is_none_or(|its| !Arc::ptr_eq(&its, &now)), "not in the address space of its last owner");
    let fresh = rig.registry.take_group("dma0").unwrap();
    fresh.release().unwrap();
    assert!(Arc::ptr_eq(&now, &rig.core.domain_of(rig.device).unwrap()), "in its default domain");
}

#[test]
fn a_reset_for_the_last_owner_does_nothing_to_the_next_one() {
    let rig = rig();
    rig.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let group = rig.registry.take_group("dma0").unwrap();
    group.attach(&Ioas::new(Arc::new(Resident), IoasOptions::default())).unwrap();
    let device = group.open("dma0").unwrap();
    let (registry, axi, next) = (rig.registry.clone(), rig.axi.clone(), Arc::new(Mutex::new(None)));
    let place = next.clone();
    rig.reset.next(|| Err(()));
    rig.reset.next(move || {
        group.release().unwrap();
        let theirs = registry.take_group("dma0").unwrap();
        let ioas = Ioas::new(Arc::new(Resident), IoasOptions::default());
        theirs.attach(&ioas).unwrap();
        let open = theirs.open("dma0").unwrap();
        *place.lock() = Some((theirs, ioas, open));
        axi.registers().take_log();
        Err(())
    });
    assert_eq!(device.reset(), Err(VfioError::Closed("dma0".to_string())));
    assert!(rig.axi.registers().take_writes().is_empty(), "their registers");
    let (theirs, ioas, _open) = next.lock().take().unwrap();
    assert!(!theirs.is_quarantined());
    let its = ioas.domain(theirs.instance()).unwrap();
    assert!(Arc::ptr_eq(&its, &rig.core.domain_of(rig.device).unwrap()), "their memory");
}

#[test]
fn a_device_whose_reset_is_not_required_works_although_it_failed() {
    let rig = rig();
    rig.registry.bind_vfio("dma0", VfioOptions { reset_required: false }).unwrap();
    let ioas = Ioas::new(Arc::new(Resident), IoasOptions::default());
    let group = rig.registry.take_group("dma0").unwrap();
    group.attach(&ioas).unwrap();
    rig.reset.next(|| Err(()));
    rig.reset.next(|| Err(()));
    group.open("dma0").unwrap();
    let its = ioas.domain(group.instance()).unwrap();
    assert!(Arc::ptr_eq(&its, &rig.core.domain_of(rig.device).unwrap()));
}

/// Registers in which one write takes the device away from whoever writes.
struct Trap(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Mmio for Trap {
    fn read32(&self, _: usize) -> u32 {
        0
    }
    fn write32(&self, _: usize, _: u32) {
        let trap = self.0.lock().take();
        if let Some(trap) = trap {
            trap();
        }
    }
    fn read64(&self, _: usize) -> u64 {
        0
    }
    fn write64(&self, _: usize, _: u64) {}
}

#[test]
fn a_device_that_somebody_is_still_in_goes_to_nobody() {
    let host = host_with(DefaultDomain::Translated);
    let id = host.iommu_device("dma0", &[0xe80], &[]);
    let trap = Arc::new(Trap(Mutex::new(None)));
    let reset = Arc::new(Told::default());
    let clock = host.clock.clone() as Arc<dyn Clock>;
    let registry = Registry::with_resets(host.core.clone(), clock, ResetDrivers::none().with(reset));
    let mut device = axi_device("dma0", &crate::testing::AxiCore::new());
    device.device = Some(id);
    device.regions = Vec::from([Region::new(Pa(0xa000_0000), 0x1000, trap.clone())]);
    registry.add_device(device).unwrap();
    registry.bind("dma0", VFIO_DRIVER).unwrap();
    let group = registry.take_group("dma0").unwrap();
    group.attach(&Ioas::new(Arc::new(Resident), IoasOptions::default())).unwrap();
    let window = group.open("dma0").unwrap().region(0).unwrap();
    let other = group.clone();
    let result = Arc::new(Mutex::new(None));
    let seen = result.clone();
    *trap.0.lock() = Some(Box::new(move || *seen.lock() = Some(other.release())));
    window.write32(0, 1);
    let result = result.lock().take().unwrap();
    assert!(matches!(result, Err(VfioError::Quarantined { .. })), "{result:?}");
    assert_eq!(host.core.domain_kind(id), Ok(DomainKind::Blocked), "what it starts reaches nothing");
    assert!(registry.take_group("dma0").is_err());
    registry.rescue("dma0").unwrap();
    assert_eq!(host.core.domain_kind(id), Ok(DomainKind::Stage1));
}

#[test]
fn a_machine_does_not_get_what_firmware_left_mapped_for_the_host() {
    let host = host_with(DefaultDomain::Translated);
    let region = ReservedRegion {
        kind: ReservedKind::DirectRelaxable,
        ..ReservedRegion::direct(Iova(0x3ed0_0000), 0x4000, Prot::RW)
    };
    let id = host.iommu_device("dma0", &[0xe80], &[region]);
    let reached = |id| host.core.domain_of(id).unwrap().iova_to_phys(Iova(0x3ed0_0000));
    assert_eq!(reached(id), Some(Pa(0x3ed0_0000)), "the host's driver may rely on it");
    let axi = crate::testing::AxiCore::new();
    host.registry.add_device(PlatformDevice { device: Some(id), ..axi_device("dma0", &axi) }).unwrap();
    host.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let assignment = host.passthrough.assign("dma0", host.vm("a", MIB), AssignOptions::default()).unwrap();
    assert_eq!(reached(id), None, "stage 2 is the machine's memory and nothing else");
    assert!(assignment.ioas().reserved_regions().iter().all(|r| r.kind != ReservedKind::DirectRelaxable));
    host.passthrough.release(&assignment).unwrap();
    assert_eq!(reached(id), Some(Pa(0x3ed0_0000)));
}

#[test]
fn a_new_guest_s_memory_shows_its_devices_nothing_of_whoever_had_it_before() {
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 2 << 20));
    // All of it was somebody's, and his secret is in memory, not only in a cache.
    let mut secrets = Vec::new();
    while let Some(block) = memory.alloc(0x1_0000, 0x1_0000) {
        memory.write(block.pa, &[0x5a; 0x1_0000]);
        memory.clean(block.pa, block.len);
        memory.wmb();
        secrets.push(block);
    }
    for block in secrets {
        memory.free(block);
    }
    let guest = GuestMemory::new("a", memory.clone(), GuestMemoryConfig::new(Ipa(0x4000_0000), MIB)).unwrap();
    let mut seen = [0xff; 64];
    for page in (0..MIB).step_by(0x1000) {
        let pa = guest.host_address(Ipa(0x4000_0000 + page)).unwrap();
        memory.device_read(pa, &mut seen);
        assert_eq!(seen, [0; 64], "page {page:#x}");
    }
}

/// A machine with something that happens just before a line goes low.
struct Sly {
    vm: Arc<dyn Vm>,
    before_low: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Vm for Sly {
    fn name(&self) -> String {
        self.vm.name()
    }
    fn is_alive(&self) -> bool {
        self.vm.is_alive()
    }
    fn memory(&self) -> Vec<GuestRange> {
        self.vm.memory()
    }
    fn pins(&self) -> Arc<dyn PinMemory> {
        self.vm.pins()
    }
    fn place(&self, window: DeviceWindow) -> Result<Ipa, VmError> {
        self.vm.place(window)
    }
    fn withdraw(&self, ipa: Ipa) -> Result<(), VmError> {
        self.vm.withdraw(ipa)
    }
    fn connect_line(&self, wanted: Option<u32>, eoi: Arc<dyn EndOfInterrupt>) -> Result<u32, VmError> {
        self.vm.connect_line(wanted, eoi)
    }
    fn disconnect_line(&self, line: u32) {
        self.vm.disconnect_line(line);
    }
    fn set_line(&self, line: u32, high: bool) {
        if !high {
            let then = self.before_low.lock().take();
            if let Some(then) = then {
                then();
            }
        }
        self.vm.set_line(line, high);
    }
}

#[test]
fn a_fault_that_comes_while_the_last_one_ends_still_interrupts_the_guest() {
    let host = Arc::new(host());
    host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", 2 * MIB);
    let sly = Arc::new(Sly { vm: vm.clone(), before_low: Mutex::new(None) });
    let options = AssignOptions { viommu: true, ..AssignOptions::default() };
    let assignment = host.passthrough.assign("dma0", sly.clone(), options).unwrap();
    let viommu = assignment.viommu().unwrap();
    let guest = IommuCore::new(DefaultDomain::Translated);
    let ops = GuestIommu::new(viommu.clone(), vm.guest_memory().clone()).unwrap();
    let instance = guest.register("viommu", ops);
    let spec = FwSpec::from_cells(&viommu.endpoints(), 1, None).unwrap();
    guest.add_device("dma", instance, &spec, &[]).unwrap();
    let dma0 = host.core.find_device("dma0").unwrap();
    let bank = host.core.domain_of(dma0).unwrap().bank().unwrap();
    let fault = |host: &Host, iova| host.fault(bank, 0xe80, iova);
    fault(&host, 0x1000);
    let [line] = vm.lines().take()[..] else { panic!("one line") };
    assert_eq!(viommu.take_faults().0.len(), 1);
    let again = host.clone();
    *sly.before_low.lock() = Some(Box::new(move || again.fault(bank, 0xe80, 0x2000)));
    vm.lines().end(line);
    assert_eq!(vm.lines().take(), [line], "the second is told as well");
    assert_eq!(viommu.take_faults().0.len(), 1);
}

/// The host's side of a virtual IOMMU, which writes down what it is asked.
#[derive(Default)]
struct Scribe {
    log: Mutex<Vec<String>>,
    unconfirmed: AtomicBool,
}

impl ViommuHost for Scribe {
    fn info(&self) -> ViommuInfo {
        ViommuInfo {
            granule_4k: true,
            granule_16k: false,
            granule_64k: false,
            va_bits: 48,
            ipa_bits: 40,
            coherent_walk: true,
            line: None,
        }
    }
    fn endpoints(&self) -> Vec<u32> {
        Vec::from([0])
    }
    fn set_table(&self, _: u32, table: ViommuTable) -> Result<(), ViommuError> {
        let name = match table {
            ViommuTable::Blocked => "blocked",
            ViommuTable::Bypass => "bypass",
            ViommuTable::Stage1(_) => "stage 1",
        };
        self.log.lock().push(name.to_string());
        match table {
            ViommuTable::Stage1(_) if self.unconfirmed.load(Ordering::Relaxed) => {
                Err(ViommuError::Unconfirmed)
            }
            _ => Ok(()),
        }
    }
    fn invalidate(&self, _: u32, _: Option<(Iova, u64)>) -> Result<(), ViommuError> {
        self.log.lock().push("invalidate".to_string());
        Ok(())
    }
    fn take_faults(&self) -> (Vec<ViommuFault>, u64) {
        (Vec::new(), 0)
    }
}

type Hook = Box<dyn FnOnce() + Send>;

/// Memory in which something happens just before a word becomes 0.
#[derive(Clone)]
struct Hooked {
    inner: Arc<FakeMemory>,
    hook: Arc<Mutex<Option<Hook>>>,
}

impl DmaMemory for Hooked {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        self.inner.alloc(len, align)
    }
    fn free(&self, block: Block) {
        self.inner.free(block);
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.inner.load64(pa)
    }
    fn store64(&self, pa: Pa, value: u64) {
        let hook = if value == 0 { self.hook.lock().take() } else { None };
        if let Some(hook) = hook {
            hook();
        }
        self.inner.store64(pa, value);
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        self.inner.cas64(pa, expected, new)
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.inner.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.inner.write(pa, buf);
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.inner.clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.inner.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.inner.wmb();
    }
}

fn scribed() -> (Arc<Scribe>, Arc<GuestIommu<Hooked>>, Arc<Master>, Hooked) {
    let memory =
        Hooked { inner: Arc::new(FakeMemory::plain(0x4000_0000, 1 << 20)), hook: Arc::new(Mutex::new(None)) };
    let scribe = Arc::new(Scribe::default());
    let iommu = GuestIommu::new(scribe.clone(), memory.clone()).unwrap();
    let master = iommu.add_device(&[StreamMatch::exact(0)], Default::default()).unwrap();
    (scribe, iommu, Arc::new(master), memory)
}

#[test]
fn an_unmap_is_told_to_an_endpoint_that_came_while_it_was_under_way() {
    let (scribe, iommu, master, memory) = scribed();
    let domain = iommu.alloc_domain(DomainSpec::Stage1(Default::default()), Default::default()).unwrap();
    domain.map(Iova(0x1000), Pa(0x4000_0000), 0x1000, Prot::RW).unwrap();
    let (joining, its) = (iommu.clone(), domain.clone());
    *memory.hook.lock() = Some(Box::new(move || joining.attach(&master, &*its).unwrap()));
    assert_eq!(domain.unmap(Iova(0x1000), 0x1000).unwrap(), 0x1000);
    // The endpoint's device may have used the entry just before it was cleared.
    assert_eq!(*scribe.log.lock(), ["blocked", "stage 1", "invalidate"]);
}

#[test]
fn a_table_that_the_host_took_although_it_complained_is_out_of_use_before_it_is_freed() {
    let (scribe, iommu, master, _) = scribed();
    let domain = iommu.alloc_domain(DomainSpec::Stage1(Default::default()), Default::default()).unwrap();
    scribe.unconfirmed.store(true, Ordering::Relaxed);
    assert!(iommu.attach(&master, &*domain).is_err());
    drop(domain);
    assert_eq!(*scribe.log.lock(), ["blocked", "stage 1", "blocked"]);
}

#[test]
fn an_unmap_from_stage_2_reaches_a_stage_1_that_came_while_it_was_under_way() {
    let memory =
        Hooked { inner: Arc::new(FakeMemory::plain(0x1000_0000, 4 << 20)), hook: Arc::new(Mutex::new(None)) };
    let (iommu, mmio, _) = smmu(&memory);
    let parent = iommu.alloc_domain(DomainSpec::Stage2(Default::default()), Default::default()).unwrap();
    parent.map(Iova(0x1000), Pa(0x8000_0000), 0x1000, Prot::RW).unwrap();
    let table = iommu.alloc_domain(DomainSpec::Stage1(Default::default()), Default::default()).unwrap();
    let root = TableRoot { asid: None, ..table.table_root().unwrap() };
    let nested = Arc::new(Mutex::new(None));
    let (coming, below, place) = (iommu.clone(), parent.clone(), nested.clone());
    *memory.hook.lock() = Some(Box::new(move || {
        let spec = DomainSpec::NestedGuest(below, root);
        *place.lock() = Some(coming.alloc_domain(spec, Default::default()).unwrap());
    }));
    mmio.take_log();
    assert_eq!(parent.unmap(Iova(0x1000), 0x1000).unwrap(), 0x1000);
    assert!(nested.lock().is_some());
    let combined = mmio.take_writes().iter().any(|(offset, _)| *offset == gr0::TLBIVMIDS1);
    assert!(combined, "its device may have used the entry just before it was cleared");
}

#[test]
fn an_edge_that_comes_before_the_guest_has_ended_the_last_one_is_not_lost() {
    let host = host();
    let id = host.iommu_device("dma0", &[0xe80], &[]);
    let mut device = axi_device("dma0", &crate::testing::AxiCore::new());
    (device.device, device.interrupts) = (Some(id), Vec::from([Interrupt::edge(95)]));
    host.registry.add_device(device).unwrap();
    host.registry.bind("dma0", VFIO_DRIVER).unwrap();
    let vm = host.vm("a", MIB);
    let _assignment = host.passthrough.assign("dma0", vm.clone(), AssignOptions::default()).unwrap();
    for _ in 0..3 {
        host.passthrough.interrupt(95);
        assert_eq!(vm.lines().take(), [95]);
        // The guest has looked at the device already.
        host.passthrough.interrupt(95);
        vm.lines().end(95);
        assert_eq!(vm.lines().take(), [95]);
        vm.lines().end(95);
        assert_eq!(vm.lines().take(), []);
    }
}

#[test]
fn interrupts_that_come_after_the_release_reach_nobody() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), AssignOptions::default()).unwrap();
    let device = assignment.devices()[0].clone();
    let heard = Arc::new(AtomicUsize::new(0));
    let counter = heard.clone();
    device.set_trigger(0, Some(Arc::new(move || _ = counter.fetch_add(1, Ordering::Relaxed)))).unwrap();
    host.passthrough.release(&assignment).unwrap();
    assert_eq!((assignment.interrupt(89), host.passthrough.interrupt(89)), (0, 0));
    assert!(device.trigger(0).is_err() && device.unmask(0).is_err());
    assert!(device.set_trigger(0, Some(Arc::new(|| ()))).is_err());
    assert_eq!((heard.load(Ordering::Relaxed), vm.lines().high().len()), (0, 0));
}
