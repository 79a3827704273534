//! Who may have a device, and what it goes through when it changes hands.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use core::sync::atomic::Ordering;

use portcullis_arch::{Iova, Pa};
use portcullis_hal::Mmio;
use portcullis_hal::fake::FakeMmio;
use portcullis_iommu::{DefaultDomain, DomainKind, Prot, ReservedRegion};

use crate::testing::{FakeDriver, Host, host, host_with};
use crate::{
    EventCounter, HostRange, Interrupt, Ioas, IoasError, IoasOptions, Owner, PlatformDevice, Region,
    Resident, VFIO_DRIVER, VfioError, VfioOptions,
};

fn ioas() -> Arc<Ioas> {
    Ioas::new(Arc::new(Resident), IoasOptions::default())
}

/// S0: two engines, and a proxy node that repeats the first engine's streams.
fn s0() -> (Host, Arc<FakeDriver>, Arc<FakeDriver>) {
    let host = host();
    host.dma("dma0", &[0xe80, 0xe81, 0xe82]);
    host.dma("dma1", &[0xe83, 0xe84, 0xe85]);
    let proxy = PlatformDevice {
        name: "dma-proxy".to_string(),
        compatible: vec!["xlnx,dma_proxy".to_string()],
        device: Some(host.iommu_device("dma-proxy", &[0xe81, 0xe82], &[])),
        regions: vec![],
        interrupts: vec![],
    };
    host.registry.add_device(proxy).unwrap();
    let engine = FakeDriver::new("xilinx-vdma", "xlnx,axi-dma-1.00.a");
    let proxy = FakeDriver::new("dma_proxy", "xlnx,dma_proxy");
    host.registry.add_driver(engine.clone()).unwrap();
    host.registry.add_driver(proxy.clone()).unwrap();
    (host, engine, proxy)
}

#[test]
fn a_device_changes_from_its_host_driver_to_passthrough_and_back() {
    let (host, driver, _) = s0();
    host.registry.bind("dma1", "xilinx-vdma").unwrap();
    let bound = host.registry.bind("dma1", VFIO_DRIVER).unwrap_err();
    assert_eq!(bound.to_string(), "device dma1 is bound to driver xilinx-vdma: unbind it first");
    assert!(matches!(host.registry.take_group("dma1"), Err(VfioError::NotBound { .. })));
    host.registry.unbind("dma1").unwrap();
    host.registry.bind("dma1", VFIO_DRIVER).unwrap();
    let group = host.registry.take_group("dma1").unwrap();
    assert!(matches!(host.registry.unbind("dma1"), Err(VfioError::GroupTaken { .. })));
    assert!(matches!(host.registry.take_group("dma1"), Err(VfioError::GroupTaken { .. })));
    group.release().unwrap();
    host.registry.unbind("dma1").unwrap();
    host.registry.bind("dma1", "xilinx-vdma").unwrap();
    assert_eq!(*driver.log.lock(), ["probe dma1", "remove dma1", "probe dma1"]);
}

#[test]
fn a_driver_that_refuses_leaves_the_owner_as_it_was() {
    let (host, driver, _) = s0();
    driver.refuses.store(true, Ordering::Relaxed);
    let error = host.registry.bind("dma0", "xilinx-vdma").unwrap_err();
    assert_eq!(error.to_string(), "driver xilinx-vdma: probe of device dma0 failed: busy");
    assert_eq!(host.registry.owner("dma0"), Ok(Owner::None));
    driver.refuses.store(false, Ordering::Relaxed);
    host.registry.bind("dma0", "xilinx-vdma").unwrap();
    driver.refuses.store(true, Ordering::Relaxed);
    assert!(host.registry.unbind("dma0").is_err());
    assert_eq!(host.registry.owner("dma0"), Ok(Owner::Host("xilinx-vdma".to_string())));
    let error = host.registry.bind("dma-proxy", "xilinx-vdma").unwrap_err();
    assert_eq!(error.to_string(), "driver xilinx-vdma does not know device dma-proxy (xlnx,dma_proxy)");
}

#[test]
fn a_group_is_taken_whole_and_a_refusal_names_who_shares_which_streams() {
    let (host, _, proxy) = s0();
    host.registry.bind("dma0", VFIO_DRIVER).unwrap();
    host.registry.bind("dma-proxy", "dma_proxy").unwrap();
    let error = host.registry.take_group("dma0").unwrap_err();
    let text = error.to_string();
    assert!(text.contains("dma-proxy is bound to dma_proxy and shares stream 0xe81, 0xe82"), "{text}");
    host.registry.unbind("dma-proxy").unwrap();
    let group = host.registry.take_group("dma0").unwrap();
    assert_eq!(group.devices().map(|d| d.name.as_str()).collect::<vec::Vec<_>>(), ["dma0", "dma-proxy"]);
    let error = host.registry.bind("dma-proxy", "dma_proxy").unwrap_err();
    assert!(matches!(error, VfioError::GroupTaken { .. }), "{error}");
    assert_eq!(*proxy.log.lock(), ["probe dma-proxy", "remove dma-proxy"]);
    group.release().unwrap();
    host.registry.bind("dma-proxy", "dma_proxy").unwrap();
}

#[test]
fn a_device_of_the_group_that_nobody_registered_is_in_the_way() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    host.iommu_device("somebody", &[0xe80], &[]);
    let text = host.registry.take_group("dma0").unwrap_err().to_string();
    assert!(text.contains("somebody is not under the control of this host"), "{text}");
}

#[test]
fn a_taken_group_is_blocked_then_in_its_address_space_then_in_its_default_domain() {
    let host = host_with(DefaultDomain::Identity);
    host.vfio_dma("dma0", &[0xe80, 0xe81, 0xe82]);
    let id = host.core.find_device("dma0").unwrap();
    let kind = || host.core.domain_kind(id).unwrap();
    assert_eq!(kind(), DomainKind::Identity);
    let group = host.registry.take_group("dma0").unwrap();
    assert_eq!(kind(), DomainKind::Blocked);
    let ioas = ioas();
    group.attach(&ioas).unwrap();
    assert_eq!(kind(), DomainKind::Stage1);
    assert!(matches!(group.attach(&ioas), Err(VfioError::Attached(_))));
    group.detach().unwrap();
    assert_eq!(kind(), DomainKind::Blocked);
    group.attach(&ioas).unwrap();
    group.release().unwrap();
    assert_eq!(kind(), DomainKind::Identity);
    assert!(ioas.groups().is_empty());
    assert!(matches!(group.attach(&ioas), Err(VfioError::Released(_))));
}

#[test]
fn a_dropped_group_goes_back_to_the_host() {
    let host = host_with(DefaultDomain::Identity);
    let core = host.vfio_dma("dma0", &[0xe80]);
    let (group, ioas) = (host.registry.take_group("dma0").unwrap(), ioas());
    group.attach(&ioas).unwrap();
    let device = group.open("dma0").unwrap();
    core.start();
    drop(group);
    assert!(device.is_closed() && core.is_stopped());
    assert_eq!(host.core.domain_kind(device.id()), Ok(DomainKind::Identity));
    host.registry.unbind("dma0").unwrap();
}

#[test]
fn direct_regions_are_not_given_away() {
    let host = host();
    let region = ReservedRegion::direct(Iova(0x3ed0_0000), 0x4000, Prot::RW);
    let device = host.iommu_device("display", &[0xce3], &[region]);
    let display = PlatformDevice {
        name: "display".to_string(),
        compatible: vec!["xlnx,axi-dma-1.00.a".to_string()],
        device: Some(device),
        regions: vec![],
        interrupts: vec![],
    };
    host.registry.add_device(display).unwrap();
    host.registry.bind("display", VFIO_DRIVER).unwrap();
    let text = host.registry.take_group("display").unwrap_err().to_string();
    assert!(text.starts_with("device display needs 0x3ed00000+0x4000 mapped one to one"), "{text}");
    host.registry.unbind("display").unwrap();
}

#[test]
fn a_device_needs_an_iommu_and_a_reset_function() {
    let host = host();
    let regs = Arc::new(FakeMmio::new());
    let mut nic = PlatformDevice {
        name: "nic".to_string(),
        compatible: vec!["cdns,zynqmp-gem".to_string(), "cdns,gem".to_string()],
        device: None,
        regions: vec![Region::new(Pa(0xff0e_0000), 0x1000, regs)],
        interrupts: vec![Interrupt::level(63)],
    };
    host.registry.add_device(PlatformDevice { name: "bare".to_string(), ..nic.clone() }).unwrap();
    let text = host.registry.bind("bare", VFIO_DRIVER).unwrap_err().to_string();
    assert_eq!(text, "device bare is behind no IOMMU: nothing would confine its DMA");
    nic.device = Some(host.iommu_device("nic", &[0x877], &[]));
    host.registry.add_device(nic).unwrap();
    let text = host.registry.bind("nic", VFIO_DRIVER).unwrap_err().to_string();
    assert!(text.contains("no reset function found for cdns,zynqmp-gem, cdns,gem"), "{text}");
    host.registry.bind_vfio("nic", VfioOptions { reset_required: false }).unwrap();
    let (group, ioas) = (host.registry.take_group("nic").unwrap(), ioas());
    group.attach(&ioas).unwrap();
    let open = group.open("nic").unwrap();
    assert!(matches!(open.reset(), Err(VfioError::NoResetFunction { .. })));
    open.write(0, 0x10, 4, 0x55).unwrap();
    assert_eq!(open.read(0, 0x10, 4), Ok(0x55));
}

#[test]
fn devices_are_reset_when_their_group_is_taken_when_they_are_opened_and_when_they_are_closed() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    core.start();
    let group = host.registry.take_group("dma0").unwrap();
    assert!(core.is_stopped(), "what the host left running reaches nobody's memory");
    assert!(matches!(group.open("dma0"), Err(VfioError::NoIoas(_))));
    group.attach(&ioas()).unwrap();
    core.start();
    let device = group.open("dma0").unwrap();
    assert!(core.is_stopped());
    assert!(matches!(group.open("dma0"), Err(VfioError::Open(_))));
    assert!(matches!(group.open("dma1"), Err(VfioError::NotInGroup { .. })));
    core.start();
    device.close().unwrap();
    assert!(core.is_stopped());
    assert!(matches!(device.read(0, 0, 4), Err(VfioError::Closed(_))));
    group.open("dma0").unwrap();
}

#[test]
fn a_device_that_only_stops_when_its_dma_is_refused_is_blocked_for_that_moment() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    group.attach(&ioas()).unwrap();
    let device = group.open("dma0").unwrap();
    let mmio = host.mmio.clone();
    core.start();
    core.stuck_unless(move || mmio.get32(0xc00) >> 16 & 3 == 2);
    device.reset().unwrap();
    assert!(core.is_stopped());
    assert!(!host.is_blocked(0), "and then it is where it was");
}

#[test]
fn a_device_that_does_not_stop_is_quarantined_until_it_does() {
    let host = host_with(DefaultDomain::Identity);
    let core = host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    group.attach(&ioas()).unwrap();
    let device = group.open("dma0").unwrap();
    core.start();
    core.stuck(true);
    let error = device.close().unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("device dma0 is quarantined, blocked at the IOMMU and given to nobody"),
        "{text}"
    );
    assert!(text.contains("waiting for DMACR.Reset == 0"), "{text}");
    assert!(host.is_blocked(0) && group.is_quarantined());
    assert!(matches!(group.open("dma0"), Err(VfioError::Quarantined { .. })));
    group.release().unwrap();
    assert!(host.is_blocked(0), "not even the host's default domain");
    assert!(matches!(host.registry.take_group("dma0"), Err(VfioError::Quarantined { .. })));
    host.registry.unbind("dma0").unwrap();
    host.registry.add_driver(FakeDriver::new("xilinx-vdma", "xlnx,axi-dma-1.00.a")).unwrap();
    assert!(matches!(host.registry.bind("dma0", "xilinx-vdma"), Err(VfioError::Quarantined { .. })));
    assert!(host.registry.rescue("dma0").is_err());
    core.stuck(false);
    host.registry.rescue("dma0").unwrap();
    assert_eq!(host.registry.quarantined("dma0"), Ok(None));
    assert_eq!(host.core.domain_kind(device.id()), Ok(DomainKind::Identity));
    host.registry.bind("dma0", "xilinx-vdma").unwrap();
}

#[test]
fn a_group_whose_device_does_not_stop_cannot_be_taken() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    core.start();
    core.stuck(true);
    assert!(matches!(host.registry.take_group("dma0"), Err(VfioError::Quarantined { .. })));
    core.stuck(false);
    host.registry.rescue("dma0").unwrap();
    host.registry.take_group("dma0").unwrap();
}

#[test]
fn registers_are_checked_for_bounds_and_width() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    group.attach(&ioas()).unwrap();
    let device = group.open("dma0").unwrap();
    device.write(0, 0x08, 4, 0x1000).unwrap();
    assert_eq!(device.read(0, 0x08, 4), Ok(0x1000));
    for (offset, bytes) in
        [(0x1000, 4), (0xffe, 4), (2, 4), (0, 1), (0, 2), (4, 8), (0, 0), (u64::MAX - 3, 4)]
    {
        assert!(
            matches!(device.read(0, offset, bytes), Err(VfioError::Access { .. })),
            "{offset:#x} {bytes}"
        );
        assert!(device.write(0, offset, bytes, 0).is_err());
    }
    let text = device.read(0, 0x1000, 4).unwrap_err().to_string();
    assert_eq!(text, "region 0 of device dma0 has no aligned 4-byte register at 0x1000 (size 0x1000)");
    assert!(matches!(device.read(1, 0, 4), Err(VfioError::NoSuch { what: "region", index: 1, .. })));
    assert!(device.device().regions[0].mappable());
}

#[test]
fn a_window_that_somebody_kept_is_dead_after_the_close() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    group.attach(&ioas()).unwrap();
    let device = group.open("dma0").unwrap();
    let window = device.region(0).unwrap();
    window.write32(0x08, 0x40);
    device.close().unwrap();
    core.registers().take_log();
    window.write32(0x00, 1);
    assert_eq!(window.read32(0x08), u32::MAX);
    assert!(core.registers().take_log().is_empty());
}

#[test]
fn a_level_line_is_masked_when_it_fires_and_fires_again_after_the_unmask() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    group.attach(&ioas()).unwrap();
    let device = group.open("dma0").unwrap();
    assert_eq!(device.interrupt(0), Ok(false), "nobody listens");
    assert!(device.enabled_lines().is_empty());
    let events = EventCounter::new();
    device.set_trigger(0, Some(events.clone())).unwrap();
    assert_eq!(device.enabled_lines(), [(0, Interrupt::level(89))]);
    assert_eq!((device.interrupt(0), device.interrupt(0)), (Ok(true), Ok(false)));
    assert_eq!((events.take(), device.is_masked(0)), (1, Ok(true)));
    assert!(device.enabled_lines().is_empty(), "the host is not kept busy");
    device.unmask(0).unwrap();
    assert_eq!((device.interrupt(0), events.take()), (Ok(true), 1));
    device.trigger(0).unwrap();
    assert_eq!(events.take(), 1, "its owner can try out the way");
    device.set_trigger(0, None).unwrap();
    assert_eq!((device.interrupt(0), device.is_masked(0)), (Ok(false), Ok(false)));
    assert!(matches!(device.mask(2), Err(VfioError::NoSuch { what: "interrupt", index: 2, .. })));
    device.set_trigger(1, Some(events.clone())).unwrap();
    device.close().unwrap();
    assert_eq!((device.interrupt(1), events.take()), (Ok(false), 0), "a closed device tells nobody");
}

#[test]
fn an_edge_that_came_while_masked_fires_at_the_unmask() {
    let host = host();
    let regs = Arc::new(FakeMmio::new());
    let device = PlatformDevice {
        name: "timer".to_string(),
        compatible: vec!["a-timer".to_string()],
        device: Some(host.iommu_device("timer", &[0x900], &[])),
        regions: vec![Region::new(Pa(0xf000_0000), 0x100, regs)],
        interrupts: vec![Interrupt::edge(40)],
    };
    assert!(!device.regions[0].mappable(), "a part of a page is not the device's alone");
    host.registry.add_device(device).unwrap();
    host.registry.bind_vfio("timer", VfioOptions { reset_required: false }).unwrap();
    let group = host.registry.take_group("timer").unwrap();
    group.attach(&ioas()).unwrap();
    let (device, events) = (group.open("timer").unwrap(), EventCounter::new());
    device.set_trigger(0, Some(events.clone())).unwrap();
    assert_eq!((device.interrupt(0), device.interrupt(0), events.take()), (Ok(true), Ok(true), 2));
    device.mask(0).unwrap();
    assert_eq!((device.interrupt(0), events.take()), (Ok(false), 0));
    device.unmask(0).unwrap();
    assert_eq!(events.take(), 1);
}

#[test]
fn an_address_space_whose_iommu_does_not_confirm_keeps_its_memory() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let group = host.registry.take_group("dma0").unwrap();
    let ioas = ioas();
    group.attach(&ioas).unwrap();
    ioas.map(Iova(0x10_0000), &[HostRange { pa: Pa(0x1100_0000), len: 0x2000 }], Prot::RW).unwrap();
    host.tlb_stuck.store(true, Ordering::Relaxed);
    let error = group.release().unwrap_err();
    assert!(matches!(error, VfioError::Ioas(IoasError::StillReachable(_))), "{error}");
    assert!(group.is_released() && ioas.is_tainted());
    ioas.unmap_all().unwrap();
    assert_eq!(ioas.pinned_bytes(), 0x2000);
}
