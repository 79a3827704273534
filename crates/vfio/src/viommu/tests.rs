//! A guest with an IOMMU of its own, over a host with an SMMUv2.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Asid, Iova, Ipa, Pa};
use portcullis_drivers::fault::{FaultReason, FaultReport, FaultResponse};
use portcullis_drivers::ops::{DomainSpec, TableRoot};
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::FakeMemory;
use portcullis_iommu::{
    AddressSpace, DefaultDomain, DeviceId, DomainKind, FwSpec, IommuCore, IommuOps, Process, ProcessConfig,
    Prot,
};
use portcullis_pgtable::Granule;
use proptest::prelude::*;
use spin::Mutex;

use super::*;
use crate::testing::{Host, host};
use crate::{AssignOptions, Assignment, GuestMemory, LocalVm};

const MIB: u64 = 1 << 20;
const BASE: u64 = 0x4000_0000;

struct Rig {
    host: Host,
    vm: Arc<LocalVm<Arc<FakeMemory>>>,
    assignment: Arc<Assignment>,
    viommu: Arc<dyn ViommuHost>,
}

struct Guest {
    core: IommuCore,
    device: DeviceId,
}

fn rig() -> Rig {
    let host = host();
    host.vfio_dma("dma0", &[0xe80, 0xe81, 0xe82]);
    let vm = host.vm("a", 2 * MIB);
    let options = AssignOptions { viommu: true, ..AssignOptions::default() };
    let assignment = host.passthrough.assign("dma0", vm.clone(), options).unwrap();
    let viommu = assignment.viommu().unwrap();
    Rig { host, vm, assignment, viommu }
}

impl Rig {
    fn memory(&self) -> GuestMemory<Arc<FakeMemory>> {
        self.vm.guest_memory().clone()
    }

    fn guest(&self) -> Guest {
        let core = IommuCore::new(DefaultDomain::Blocked);
        let iommu = core.register("viommu", GuestIommu::new(self.viommu.clone(), self.memory()).unwrap());
        let spec = FwSpec::from_cells(&self.viommu.endpoints(), 1, None).unwrap();
        let device = core.add_device("dma", iommu, &spec, &[]).unwrap();
        Guest { core, device }
    }

    fn host_domain(&self) -> Arc<portcullis_iommu::Domain> {
        self.host.core.domain_of(self.host.core.find_device("dma0").unwrap()).unwrap()
    }

    /// Walks the guest's stage 1 as the hardware would: every address through stage 2. 4K tables, level 0 first.
    fn walk(&self, va: u64) -> Option<Pa> {
        let root = self.host_domain().table_root()?;
        let stage2 = self.assignment.ioas().domain(self.host.smmu)?;
        let mut table = root.ttbr0.get();
        for level in 0..4u32 {
            let index = va >> (39 - 9 * level) & 0x1ff;
            let at = stage2.iova_to_phys(Iova(table + index * 8))?;
            let entry = self.host.memory.load64(at);
            if entry & 1 == 0 {
                return None;
            }
            let address = entry & 0xffff_ffff_f000;
            if entry & 2 == 0 || level == 3 {
                let mask = (1u64 << (39 - 9 * level)) - 1;
                return stage2.iova_to_phys(Iova(address & !mask | va & mask));
            }
            table = address;
        }
        None
    }
}

#[test]
fn a_guest_s_mapping_leads_through_both_stages_to_its_own_memory() {
    let rig = rig();
    assert_eq!(rig.host_domain().kind(), DomainKind::Stage2, "bypass until the guest knows of its IOMMU");
    let guest = rig.guest();
    assert_eq!(rig.host_domain().kind(), DomainKind::Blocked);
    let domain = guest.core.paging_domain(guest.core.device(guest.device).unwrap().instance).unwrap();
    guest.core.attach_device(guest.device, &domain).unwrap();
    assert_eq!(rig.host_domain().kind(), DomainKind::Nested);
    let buffer = rig.memory().alloc(0x3000, 0x1000).unwrap();
    domain.map(Iova(0x7000_0000), buffer.pa, 0x3000, Prot::RW).unwrap();
    for offset in [0u64, 0x1008, 0x2ff8] {
        let expected = rig.memory().host_address(Ipa(buffer.pa.get() + offset));
        assert!(expected.is_some());
        assert_eq!(rig.walk(0x7000_0000 + offset), expected);
    }
    rig.host.mmio.take_log();
    assert_eq!(domain.unmap(Iova(0x7000_0000), 0x3000).unwrap(), 0x3000);
    assert_eq!(rig.walk(0x7000_0000), None);
    let synced = rig.host.mmio.take_writes().iter().any(|(offset, _)| offset & 0xfff == 0x7f0);
    assert!(synced, "the host's TLB was invalidated before the unmap returned");
    guest.core.detach_device(guest.device).unwrap();
    assert_eq!(rig.host_domain().kind(), DomainKind::Blocked);
}

#[test]
fn a_guest_s_process_shares_its_addresses_with_the_device() {
    let rig = rig();
    let guest = rig.guest();
    let info = rig.viommu.info();
    let config = ProcessConfig {
        pa_bits: info.ipa_bits,
        coherent_walk: info.coherent_walk,
        ..ProcessConfig::default()
    };
    let process = Process::new(rig.memory(), config).unwrap();
    let va = process.mmap(0x5000, Prot::RW.noexec()).unwrap();
    process.write(va, b"for the device").unwrap();
    guest.core.bind(guest.device, process.clone() as Arc<dyn AddressSpace>).unwrap();
    let mut seen = [0; 14];
    rig.host.memory.read(rig.walk(va.get()).unwrap(), &mut seen);
    assert_eq!(&seen, b"for the device");
    process.munmap(va).unwrap();
    assert_eq!(rig.walk(va.get()), None);
    process.exit().unwrap();
    assert_eq!(rig.host_domain().kind(), DomainKind::Blocked, "no walk of a table that was freed");
    guest.core.unbind(guest.device).unwrap();
    assert_eq!(rig.memory().outstanding(), 0);
}

#[test]
fn faults_of_stage_1_reach_the_guest_and_those_of_stage_2_do_not() {
    let rig = rig();
    let guest = rig.guest();
    let instance = guest.core.device(guest.device).unwrap().instance;
    let domain = guest.core.paging_domain(instance).unwrap();
    guest.core.attach_device(guest.device, &domain).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    domain.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        log.lock().push((report.reason, report.iova, report.stream.unwrap().get()));
        FaultResponse::Terminate
    })));
    let bank = rig.host_domain().bank().unwrap();
    rig.host.fault(bank, 0xe81, 0x1234_5000);
    let line = rig.viommu.info().line.unwrap();
    assert_eq!(rig.vm.lines().take(), [line]);
    assert_eq!(guest.core.handle_irq(instance), Ok(1));
    rig.vm.lines().end(line);
    assert!(rig.vm.lines().high().is_empty());
    assert_eq!(*seen.lock(), [(FaultReason::Translation, Iova(0x1234_5000), 0)], "with the guest's stream");
    assert_eq!(guest.core.take_faults().faults[0].name.as_deref(), Some("dma"));
    let parent = rig.assignment.ioas().domain(rig.host.smmu).unwrap().bank().unwrap();
    rig.host.fault(parent, 0xe81, 0x9999_0000);
    assert!(rig.vm.lines().take().is_empty());
    assert_eq!(rig.host.core.take_faults().faults.len(), 2, "the host has seen both");
}

#[test]
fn a_guest_that_fetches_no_faults_costs_the_host_nothing() {
    let rig = rig();
    let guest = rig.guest();
    let domain = guest.core.paging_domain(guest.core.device(guest.device).unwrap().instance).unwrap();
    guest.core.attach_device(guest.device, &domain).unwrap();
    let bank = rig.host_domain().bank().unwrap();
    for n in 0..100 {
        rig.host.fault(bank, 0xe80, n << 12);
    }
    let (faults, lost) = rig.viommu.take_faults();
    assert_eq!((faults.len(), lost), (64, 36));
    assert_eq!(rig.viommu.take_faults(), (Vec::new(), 0));
}

fn good_root() -> TableRoot {
    TableRoot {
        ttbr0: Pa(BASE),
        t0sz: 16,
        granule: Granule::K4,
        ips: 2,
        sh: 2,
        irgn: 0,
        orgn: 0,
        mair: 0xff44,
        asid: Some(Asid(7)),
    }
}

#[test]
fn tables_that_cannot_be_walked_are_refused_with_a_reason() {
    let rig = rig();
    let good = good_root();
    rig.viommu.set_table(0, ViommuTable::Stage1(good)).unwrap();
    let attached = rig.host_domain();
    for root in [
        TableRoot { t0sz: 0, ..good },
        TableRoot { t0sz: 15, ..good },
        TableRoot { t0sz: 40, ..good },
        TableRoot { t0sz: 255, ..good },
        TableRoot { ttbr0: Pa(BASE + 8), ..good },
        TableRoot { ttbr0: Pa(1 << 50), ..good },
        TableRoot { ttbr0: Pa(u64::MAX), ..good },
        TableRoot { ips: 6, ..good },
        TableRoot { ips: 200, ..good },
        TableRoot { sh: 1, ..good },
        TableRoot { irgn: 4, ..good },
        TableRoot { orgn: 255, ..good },
    ] {
        let refused = rig.viommu.set_table(0, ViommuTable::Stage1(root));
        assert!(matches!(refused, Err(ViommuError::BadTable(_))), "{root:?}");
    }
    let unknown = Err(ViommuError::UnknownEndpoint(1));
    assert_eq!(rig.viommu.set_table(1, ViommuTable::Bypass), unknown);
    assert_eq!(rig.viommu.invalidate(1, None), unknown);
    assert!(Arc::ptr_eq(&attached, &rig.host_domain()), "nothing has changed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// A guest that talks nonsense to its virtual IOMMU: no panic, no leak of context banks, and the group never leaves the
    /// machine's stage 2.
    #[test]
    fn nonsense_of_a_guest_stays_with_the_guest(
        calls in proptest::collection::vec(
            (0u8..4, any::<u32>(), any::<(u64, u8, u8, u8, u8, u8)>(), any::<Option<(u64, u64)>>()), 1..60)
    ) {
        let rig = rig();
        let free = |rig: &Rig| rig.host.core.ops(rig.host.smmu).unwrap().capabilities().free_contexts.unwrap();
        let before = free(&rig);
        for (call, endpoint, (ttbr0, t0sz, ips, sh, irgn, orgn), range) in calls {
            let endpoint = if endpoint % 8 == 0 { endpoint } else { 0 };
            let granule = [Granule::K4, Granule::K16, Granule::K64][usize::from(t0sz) % 3];
            let garbage = TableRoot { ttbr0: Pa(ttbr0), t0sz, granule, ips, sh, irgn, orgn, ..good_root() };
            let sane = TableRoot { ttbr0: Pa(ttbr0 & 0xff_ffff_ffc0), t0sz: 16 + t0sz % 24, granule, ..good_root() };
            let table = match call {
                0 => ViommuTable::Stage1(garbage),
                1 => ViommuTable::Stage1(sane),
                2 => ViommuTable::Bypass,
                _ => ViommuTable::Blocked,
            };
            let _ = rig.viommu.set_table(endpoint, table);
            let _ = rig.viommu.invalidate(endpoint, range.map(|(iova, len)| (Iova(iova), len)));
            let domain = rig.host_domain();
            let stage2 = rig.assignment.ioas().domain(rig.host.smmu).unwrap();
            let inside = match domain.kind() {
                DomainKind::Blocked | DomainKind::Nested => true,
                DomainKind::Stage2 => Arc::ptr_eq(&domain, &stage2),
                _ => false,
            };
            prop_assert!(inside, "{:?}", domain);
            drop(domain);
            prop_assert!(free(&rig) + 1 >= before);
        }
        rig.host.passthrough.release(&rig.assignment).unwrap();
        prop_assert!(rig.host.is_blocked(0));
    }
}

#[test]
fn nothing_is_attached_for_a_guest_after_its_device_has_gone() {
    let rig = rig();
    let guest = rig.guest();
    let domain = guest.core.paging_domain(guest.core.device(guest.device).unwrap().instance).unwrap();
    guest.core.attach_device(guest.device, &domain).unwrap();
    domain.map(Iova(0x1000), Pa(BASE), 0x1000, Prot::RW).unwrap();
    rig.host.passthrough.release(&rig.assignment).unwrap();
    assert_eq!(rig.viommu.set_table(0, ViommuTable::Bypass), Err(ViommuError::Gone));
    assert_eq!(rig.viommu.set_table(0, ViommuTable::Stage1(good_root())), Err(ViommuError::Gone));
    assert_eq!(rig.host_domain().kind(), DomainKind::Blocked);
    assert_eq!(domain.unmap(Iova(0x1000), 0x1000).unwrap(), 0x1000, "the guest can still tidy up");
    let error = guest.core.detach_device(guest.device).unwrap_err();
    assert!(error.to_string().contains("the device has been taken away"), "{error}");
    assert_eq!(rig.vm.guest_memory().pinned_bytes(), 0);
}

#[test]
fn a_guest_s_driver_refuses_what_its_host_does_not_have() {
    let rig = rig();
    let iommu = GuestIommu::new(rig.viommu.clone(), rig.memory()).unwrap();
    let core = IommuCore::new(DefaultDomain::Blocked);
    let instance = core.register("viommu", iommu.clone());
    assert!(iommu.describe().contains("stage 1 over its host's stage 2"), "{}", iommu.describe());
    for ids in [&[1u32][..], &[], &[0xe80]] {
        let spec = FwSpec::from_cells(ids, 1, None).unwrap();
        assert!(core.add_device("x", instance, &spec, &[]).is_err(), "{ids:?}");
    }
    assert!(core.alloc_domain(instance, DomainSpec::Stage2(Default::default())).is_err());
    // Two devices at one endpoint are one group, as on the host.
    let spec = FwSpec::from_cells(&[0], 1, None).unwrap();
    let (a, b) = (core.add_device("a", instance, &spec, &[]), core.add_device("b", instance, &spec, &[]));
    assert_eq!(core.group_of(a.unwrap()), core.group_of(b.unwrap()));
    // A domain of another virtual IOMMU is foreign.
    let other = GuestIommu::new(rig.viommu.clone(), rig.memory()).unwrap();
    let foreign = other.alloc_domain(DomainSpec::Blocked, Default::default()).unwrap();
    let master = iommu.add_device(&[portcullis_iommu::StreamMatch::exact(0)], Default::default()).unwrap();
    assert_eq!(iommu.attach(&master, &*foreign), Err(portcullis_iommu::IommuError::ForeignDomain));
}

#[test]
fn a_domain_that_is_dropped_blocks_its_endpoint_before_its_tables_are_freed() {
    let rig = rig();
    let iommu = GuestIommu::new(rig.viommu.clone(), rig.memory()).unwrap();
    let master = iommu.add_device(&[portcullis_iommu::StreamMatch::exact(0)], Default::default()).unwrap();
    let domain = iommu.alloc_domain(DomainSpec::Stage1(Default::default()), Default::default()).unwrap();
    iommu.attach(&master, &*domain).unwrap();
    domain.map(Iova(0x1000), Pa(BASE), 0x1000, Prot::RW).unwrap();
    assert_eq!(rig.host_domain().kind(), DomainKind::Nested);
    drop(domain);
    assert_eq!(rig.host_domain().kind(), DomainKind::Blocked);
    assert_eq!(rig.memory().outstanding(), 0);
}

#[test]
fn without_nested_translation_there_is_no_virtual_iommu() {
    let rig = rig();
    let stage1 = crate::Ioas::new(Arc::new(crate::Resident), Default::default());
    let vm = rig.vm.clone() as Arc<dyn crate::Vm>;
    let refused = HostViommu::new(rig.assignment.group(), &stage1, &vm, false);
    assert!(matches!(refused.err(), Some(crate::VfioError::Viommu(ViommuError::NotNested))));
}
