use portcullis_hal::Block;

use super::*;
use crate::iova::IovaError;
use crate::{ReservedKind, ReservedRegion, SOFTWARE_MSI};

use Direction::{Bidirectional, FromDevice, ToDevice};

#[test]
fn a_mapped_buffer_is_reached_at_its_offset_and_not_after_the_unmap() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(2 * PAGE as usize).wrapping_add(0x40);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(iova.get() & (PAGE - 1), 0x40);
    assert_eq!(rig.device_read(iova, PAGE as usize).unwrap(), rig.cpu(pa, PAGE as usize));
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.device_read(iova, 1), None, "strict: nothing is left in the TLB");
}

#[test]
fn a_device_cannot_write_what_it_only_reads() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let read = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.device_write(read, &[1]), None);
    let both = device.map_single(pa, PAGE, Bidirectional, NONE).unwrap();
    assert_eq!(rig.device_write(both, &[1]), Some(()));
    assert!(rig.device_read(both, 1).is_some());
}

/// More than the caches of the allocator keep: such a range comes from the tree, at a known place.
const LARGE: u64 = 64 * PAGE;

#[test]
fn the_mask_limits_addresses_and_they_come_from_the_top() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(LARGE as usize);
    assert_eq!(device.map_single(pa, LARGE, ToDevice, NONE), Ok(Iova(0xfffc_0000)));
    device.set_mask(24).unwrap();
    assert_eq!(device.map_single(pa, LARGE, ToDevice, NONE), Ok(Iova(0xfc_0000)));
    device.set_mask(64).unwrap();
    assert_eq!(device.map_single(pa, LARGE, ToDevice, NONE), Ok(Iova(0xff_fffc_0000)));
    let error = device.set_mask(12).unwrap_err();
    assert!(matches!(error, DmaError::Mask { bits: 12, .. }), "{error}");
}

#[test]
fn pci_devices_get_addresses_below_4_gib_until_there_are_none() {
    let reserved = [ReservedRegion {
        start: Iova(PAGE),
        len: (1 << 32) - PAGE - 2 * LARGE,
        kind: ReservedKind::Reserved,
        prot: Prot::RW,
    }];
    let config = SpaceConfig { reserved: &reserved, ..SpaceConfig::default() };
    let rig = Rig::with(FakeMemory::plain(0x8000_0000, 1 << 20), config);
    let config = DeviceConfig { prefer_32bit: true, ..DeviceConfig::default().coherent(true).mask(64) };
    let device = rig.device_with(config);
    let pa = rig.buffer(LARGE as usize);
    let map = || device.map_single(pa, LARGE, ToDevice, NONE).unwrap().get();
    let below = [map(), map()];
    assert_eq!(below, [0xfffc_0000, 0xfff8_0000]);
    assert!(map() > 1 << 32);
    device.unmap_single(Iova(below[0]), LARGE, ToDevice, NONE).unwrap();
    assert!(map() > 1 << 32, "once they have run out, it stays so");
}

#[test]
fn page_0_and_reserved_windows_are_never_handed_out() {
    let config = SpaceConfig {
        reserved: &[SOFTWARE_MSI],
        limit: Some(Iova(SOFTWARE_MSI.end() + 300 * PAGE - 1)),
        ..SpaceConfig::default()
    };
    let rig = Rig::with(FakeMemory::plain(0x8000_0000, 1 << 20), config);
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let iovas: Vec<_> = (0..300).map(|_| device.map_single(pa, PAGE, ToDevice, NONE).unwrap()).collect();
    assert!(!iovas.iter().any(|iova| SOFTWARE_MSI.overlaps(*iova, PAGE)));
    assert!(iovas.iter().any(|iova| iova.get() >= SOFTWARE_MSI.end()));
    assert!(iovas.iter().any(|iova| *iova < SOFTWARE_MSI.start));
    assert_eq!(rig.space.range().0, Iova(PAGE));
}

#[test]
fn running_out_of_addresses_says_so_and_leaves_nothing_behind() {
    let config = SpaceConfig { limit: Some(Iova(4 * PAGE - 1)), ..SpaceConfig::default() };
    let rig = Rig::with(FakeMemory::plain(0x8000_0000, 1 << 20), config);
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let iovas: Vec<_> = (0..3).map(|_| device.map_single(pa, PAGE, ToDevice, NONE).unwrap()).collect();
    let error = device.map_single(pa, PAGE, ToDevice, NONE).unwrap_err();
    let full = IovaError::Full { len: PAGE, limit: Iova(4 * PAGE - 1), free: 0, largest: 0, handles: 0 };
    assert_eq!(error, DmaError::Iova { device: "a0000000.dma".into(), error: full });
    for iova in iovas {
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    }
    assert!(device.map_single(pa, PAGE, ToDevice, NONE).is_ok());
}

#[test]
fn no_table_memory_gives_the_address_back() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    rig.tables.fail_after(0);
    let error = device.map_single(pa, PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::Map { iova: Iova(0xffff_f000), .. }), "{error}");
    rig.tables.fail_never();
    assert_eq!(device.map_single(pa, PAGE, ToDevice, NONE), Ok(Iova(0xffff_f000)));
}

#[test]
fn senseless_lengths_are_refused() {
    let device = Rig::coherent().device();
    for (pa, len) in [(0x1000, 0), (u64::MAX - 1, 2), (0x1000, u64::MAX)] {
        let error = device.map_single(Pa(pa), len, ToDevice, NONE).unwrap_err();
        assert!(matches!(error, DmaError::Length { .. }), "{error}");
    }
}

#[test]
fn unmapping_twice_is_an_error_and_does_not_free_twice() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    let error = device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::NotMapped { .. }), "{error}");
    let one = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    let other = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_ne!(one, other);
}

#[test]
fn an_address_whose_invalidation_failed_is_never_used_again() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    rig.domain.dead.store(true, Ordering::Relaxed);
    let error = device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::Unmap { .. }), "{error}");
    rig.domain.dead.store(false, Ordering::Relaxed);
    assert_ne!(device.map_single(pa, PAGE, ToDevice, NONE), Ok(iova));
    assert_eq!(rig.space.statistics().quarantined, PAGE);
}

#[test]
fn without_an_iommu_addresses_are_physical_and_the_mask_is_checked() {
    let memory = Arc::new(FakeMemory::plain(0x8000_0000, 1 << 20));
    let config = DeviceConfig::default().coherent(true);
    let device = DmaDevice::direct("dma", memory.clone(), config);
    let Block { pa, .. } = memory.alloc(PAGE as usize, PAGE as usize).unwrap();
    assert_eq!(device.map_single(pa, PAGE, ToDevice, NONE), Ok(Iova(pa.get())));
    device.unmap_single(Iova(pa.get()), PAGE, ToDevice, NONE).unwrap();
    let error = device.map_single(Pa(0xffff_f800), PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::BeyondMask { bits: 32, .. }), "{error}");
    device.set_mask(33).unwrap();
    assert!(device.map_single(Pa(0xffff_f800), PAGE, ToDevice, NONE).is_ok());
}

#[test]
fn registers_of_another_device_are_mapped_as_such() {
    let rig = Rig::coherent();
    let device = rig.device();
    let iova = device.map_resource(Pa(0xa000_0030), 4, FromDevice).unwrap();
    let mapping = rig.domain.table.lookup(iova).unwrap();
    assert_eq!(mapping.pa, Pa(0xa000_0030));
    assert_eq!(mapping.prot.memory, crate::MemoryKind::Device);
    device.unmap_resource(iova, 4, FromDevice).unwrap();
    assert!(rig.domain.table.lookup(iova).is_none());
}

#[test]
fn a_device_that_does_not_snoop_sees_what_the_cpu_wrote_before_the_map() {
    let rig = Rig::non_coherent();
    let device = rig.device_with(DeviceConfig::default());
    let pa = rig.buffer(PAGE as usize);
    let skipped = device.map_single(pa, PAGE, ToDevice, DmaAttrs::SKIP_CPU_SYNC).unwrap();
    assert_ne!(rig.device_read(skipped, 16).unwrap(), pattern(16), "stale without the sync");
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.device_read(iova, PAGE as usize).unwrap(), pattern(PAGE as usize));
    rig.memory.write(pa, b"new");
    assert_ne!(rig.device_read(iova, 3).unwrap(), b"new", "stale without the sync");
    device.sync_single_for_device(iova, 3, ToDevice).unwrap();
    assert_eq!(rig.device_read(iova, 3).unwrap(), b"new");
}

#[test]
fn the_cpu_sees_what_a_device_that_does_not_snoop_wrote_after_a_sync_or_the_unmap() {
    let rig = Rig::non_coherent();
    let device = rig.device_with(DeviceConfig::default());
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, FromDevice, NONE).unwrap();
    rig.device_write(iova, b"first").unwrap();
    assert_eq!(rig.cpu(pa, 5), pattern(5), "stale without the sync");
    device.sync_single_for_cpu(iova, 5, FromDevice).unwrap();
    assert_eq!(rig.cpu(pa, 5), b"first");
    device.sync_single_for_device(iova, 5, FromDevice).unwrap();
    rig.device_write(iova.wrapping_add(0x800), b"second").unwrap();
    device.unmap_single(iova, PAGE, FromDevice, NONE).unwrap();
    assert_eq!(rig.cpu(pa.wrapping_add(0x800), 6), b"second");
}

#[test]
fn syncs_of_a_part_reach_the_right_memory() {
    let rig = Rig::non_coherent();
    let device = rig.device_with(DeviceConfig::default());
    let pa = rig.buffer(4 * PAGE as usize);
    let iova = device.map_single(pa, 4 * PAGE, Bidirectional, NONE).unwrap();
    rig.memory.write(pa.wrapping_add(0x2100), b"part");
    device.sync_single_for_device(iova.wrapping_add(0x2100), 4, Bidirectional).unwrap();
    assert_eq!(rig.device_read(iova.wrapping_add(0x2100), 4).unwrap(), b"part");
    let error = device.sync_single_for_cpu(Iova(0x1000), 4, FromDevice).unwrap_err();
    assert!(matches!(error, DmaError::NotMapped { .. }), "{error}");
}

#[test]
fn a_domain_without_a_table_has_no_space() {
    let rig = Rig::coherent();
    let config = SpaceConfig { limit: Some(Iova(PAGE - 1)), ..SpaceConfig::default() };
    let error = space_over(&rig.domain, config).unwrap_err();
    assert!(matches!(error, DmaError::Space(IovaError::BadConfig { .. })), "{error}");
}
