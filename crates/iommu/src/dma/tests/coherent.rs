use super::*;

#[test]
fn both_sides_see_writes_without_syncs() {
    let memories = [
        (true, FakeMemory::plain(0x8000_0000, 1 << 20)),
        (false, FakeMemory::non_coherent(0x8000_0000, 1 << 20)),
        (false, FakeMemory::non_coherent_reordering(0x8000_0000, 1 << 20, 7)),
    ];
    for (coherent, memory) in memories {
        let rig = Rig::with(memory, SpaceConfig::default());
        let device = rig.device_with(DeviceConfig::default().coherent(coherent));
        let ring = device.alloc_coherent(0x1800).unwrap();
        assert_eq!((ring.len(), ring.iova().get() & (PAGE - 1)), (0x1800, 0));
        assert_eq!(
            rig.device_read(ring.iova(), 0x1800).unwrap(),
            vec![0; 0x1800],
            "zeroed for the device, too"
        );
        for round in 0..64u32 {
            // Descriptors of 16 bytes, so that both write to one cache line.
            let offset = u64::from(round) * 16;
            ring.write32(offset, round).unwrap();
            assert_eq!(rig.device_read(ring.iova().wrapping_add(offset), 4).unwrap(), round.to_le_bytes());
            rig.device_write(ring.iova().wrapping_add(offset + 8), &[round as u8; 8]).unwrap();
            assert_eq!(ring.read64(offset + 8), Ok(u64::from_le_bytes([round as u8; 8])));
            assert_eq!(ring.read32(offset), Ok(round));
        }
        ring.fill(0, 0x1800, 0xee).unwrap();
        assert_eq!(rig.device_read(ring.iova(), 0x1800).unwrap(), vec![0xee; 0x1800]);
        ring.free().unwrap();
        rig.memory.assert_clean();
    }
}

#[test]
fn accesses_outside_are_refused() {
    let rig = Rig::coherent();
    let ring = rig.device().alloc_coherent(0x100).unwrap();
    for (offset, len) in [(0x100, 1), (0xfd, 4), (u64::MAX, 4), (0, 0x101)] {
        let error = ring.read(offset, &mut vec![0; len]).unwrap_err();
        assert!(matches!(error, DmaError::Bounds { size: 0x100, .. }), "{error}");
    }
    assert!(ring.fill(0x80, 0x81, 0).is_err());
    assert_eq!(ring.pa(0x100), None);
    assert!(rig.device().alloc_coherent(0).is_err());
}

#[test]
fn scattered_memory_is_contiguous_for_the_device() {
    let rig = Rig::coherent();
    // Nothing but holes of one page: every second of the last pages is given back.
    let all: Vec<_> = core::iter::from_fn(|| rig.memory.alloc(PAGE as usize, PAGE as usize)).collect();
    for block in all.iter().step_by(2) {
        rig.memory.free(*block);
    }
    let ring = rig.device().alloc_coherent(4 * PAGE).unwrap();
    ring.write(PAGE - 4, b"over the edge").unwrap();
    assert_eq!(rig.device_read(ring.iova().wrapping_add(PAGE - 4), 13).unwrap(), b"over the edge");
    let mut back = [0; 13];
    ring.read(PAGE - 4, &mut back).unwrap();
    assert_eq!(&back, b"over the edge");
    assert_ne!(ring.pa(PAGE).unwrap(), ring.pa(0).unwrap().wrapping_add(PAGE));
    drop(ring);
    // Without an IOMMU it has to be in one piece.
    let config = DeviceConfig::default().coherent(true);
    let direct = DmaDevice::direct("dma", rig.memory.clone(), config);
    let error = direct.alloc_coherent(4 * PAGE).unwrap_err();
    assert_eq!(error, DmaError::NoMemory { device: "dma".into(), len: 4 * PAGE });
    assert!(direct.alloc_coherent(PAGE).is_ok());
}

#[test]
fn dropping_takes_it_from_the_device_before_the_memory_is_free() {
    let rig = Rig::lazy();
    let device = rig.device();
    let ring = device.alloc_coherent(PAGE).unwrap();
    let iova = ring.iova();
    assert!(rig.device_read(iova, 1).is_some());
    drop(ring);
    assert_eq!(rig.device_read(iova, 1), None, "even in a lazy space");
    rig.memory.assert_clean();
}

#[test]
fn memory_that_may_still_be_reached_is_not_freed() {
    let rig = Rig::coherent();
    let device = rig.device();
    let ring = device.alloc_coherent(PAGE).unwrap();
    rig.domain.dead.store(true, Ordering::Relaxed);
    assert!(matches!(ring.free(), Err(DmaError::Unmap { .. })));
    assert_eq!((rig.memory.outstanding(), device.kept_bytes()), (1, PAGE));
}

#[test]
fn the_coherent_mask_is_its_own() {
    let rig = Rig::coherent();
    let device = rig.device();
    device.set_mask(40).unwrap();
    device.set_coherent_mask(28).unwrap();
    assert!(device.alloc_coherent(PAGE).unwrap().iova() < Iova(1 << 28));
    let direct = DmaDevice::direct("dma", rig.memory.clone(), DeviceConfig::default().coherent(true));
    direct.set_coherent_mask(30).unwrap();
    let error = direct.alloc_coherent(PAGE).unwrap_err();
    assert!(matches!(error, DmaError::BeyondMask { bits: 30, .. }), "{error}");
    rig.memory.assert_clean();
}

#[test]
fn a_failed_allocation_gives_everything_back() {
    let rig = Rig::coherent();
    let device = rig.device();
    rig.tables.fail_after(1);
    assert!(device.alloc_coherent(2 * PAGE).is_err());
    rig.memory.assert_clean();
    rig.tables.fail_never();
    assert_eq!(device.alloc_coherent(2 * PAGE).unwrap().iova(), Iova(0xffff_e000));
}
