use super::*;

use Direction::{Bidirectional, FromDevice, ToDevice};

fn entry(pa: Pa, len: u64) -> SgEntry {
    SgEntry { pa, len }
}

/// Segments as offsets from the first page.
fn shape(sg: &SgMapping) -> Vec<(u64, u64)> {
    let base = sg.start().unwrap().get() & !(PAGE - 1);
    sg.segments().iter().map(|segment| (segment.iova.get() - base, segment.len)).collect()
}

#[test]
fn scattered_pages_become_one_segment() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pages: Vec<Pa> = (0..4).map(|_| rig.buffer(PAGE as usize)).collect();
    let order = [pages[2], pages[0], pages[3], pages[1]];
    let entries: Vec<_> = order.iter().map(|pa| entry(*pa, PAGE)).collect();
    let sg = device.map_sg(&entries, ToDevice, NONE).unwrap();
    assert_eq!(shape(&sg), [(0, 4 * PAGE)]);
    assert_eq!(sg.len(), 4 * PAGE);
    for (i, pa) in order.iter().enumerate() {
        let iova = sg.start().unwrap().wrapping_add(i as u64 * PAGE);
        assert_eq!(rig.reach(iova, false), Some(*pa));
    }
    let iova = sg.start().unwrap();
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    assert!((0..4).all(|i| rig.reach(iova.wrapping_add(i * PAGE), false).is_none()));
}

#[test]
fn offsets_are_kept_and_part_a_list() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(4 * PAGE as usize);
    let entries = [
        entry(pa.wrapping_add(0x100), 0xf00),
        entry(pa.wrapping_add(2 * PAGE), 0x200),
        entry(pa.wrapping_add(PAGE + 0x80), 0x40),
        entry(pa.wrapping_add(3 * PAGE), PAGE),
    ];
    let sg = device.map_sg(&entries, ToDevice, NONE).unwrap();
    // The first ends its page, so the second goes on; it does not, and the third begins inside of one.
    assert_eq!(shape(&sg), [(0x100, 0x1100), (0x2080, 0x40), (0x3000, PAGE)]);
    let mut bytes = Vec::new();
    for segment in sg.segments() {
        bytes.extend(rig.device_read(segment.iova, segment.len as usize).unwrap());
    }
    let expected: Vec<u8> = entries.iter().flat_map(|e| rig.cpu(e.pa, e.len as usize)).collect();
    assert_eq!(bytes, expected);
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
}

#[test]
fn no_segment_is_longer_than_the_device_can_take() {
    let rig = Rig::coherent();
    let config = DeviceConfig { max_segment: 3 * PAGE - 1, ..DeviceConfig::default().coherent(true) };
    let device = rig.device_with(config);
    let pa = rig.buffer(8 * PAGE as usize);
    let single: Vec<_> = (0..4).map(|i| entry(pa.wrapping_add(i * PAGE), PAGE)).collect();
    let sg = device.map_sg(&single, ToDevice, NONE).unwrap();
    assert_eq!(shape(&sg), [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE)]);
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    // An entry that is longer is cut where the next piece begins aligned.
    let sg = device.map_sg(&[entry(pa, 5 * PAGE)], ToDevice, NONE).unwrap();
    assert_eq!(shape(&sg), [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]);
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
}

#[test]
fn no_segment_crosses_a_boundary() {
    let rig = Rig::coherent();
    let config = DeviceConfig {
        boundary_mask: 4 * PAGE - 1,
        max_segment: 1 << 20,
        ..DeviceConfig::default().coherent(true)
    };
    let device = rig.device_with(config);
    let pa = rig.buffer(16 * PAGE as usize);
    // 3 pages, then 3 that would cross: they begin at the boundary. Then 6, which cannot but cross.
    let entries = [
        entry(pa, 3 * PAGE),
        entry(pa.wrapping_add(4 * PAGE), 3 * PAGE),
        entry(pa.wrapping_add(8 * PAGE), 6 * PAGE),
    ];
    let sg = device.map_sg(&entries, ToDevice, NONE).unwrap();
    for segment in sg.segments() {
        let (first, last) = (segment.iova.get(), segment.iova.get() + segment.len - 1);
        assert_eq!(first / (4 * PAGE), last / (4 * PAGE), "{segment:?}");
    }
    assert_eq!(shape(&sg)[..2], [(0, 3 * PAGE), (4 * PAGE, 3 * PAGE)]);
    assert_eq!(sg.segments().iter().map(|segment| segment.len).sum::<u64>(), 12 * PAGE);
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
}

#[test]
fn a_list_that_cannot_be_mapped_leaves_nothing() {
    let rig = Rig::coherent();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    // The last entry is beyond what the table can name.
    let entries = [entry(pa, PAGE), entry(Pa(1 << 45), PAGE)];
    let error = device.map_sg(&entries, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::Map { pa: Pa(0x2000_0000_0000), .. }), "{error}");
    assert_eq!(rig.reach(Iova(0xffff_e000), false), None);
    let sg = device.map_sg(&[entry(pa, PAGE), entry(pa, PAGE)], ToDevice, NONE).unwrap();
    assert_eq!(sg.start(), Some(Iova(0xffff_e000)), "the addresses are free again");
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    for bad in [&[][..], &[entry(pa, 0)], &[entry(pa, u64::MAX)], &[entry(pa, PAGE), entry(Pa(u64::MAX), 2)]]
    {
        let error = device.map_sg(bad, ToDevice, NONE).unwrap_err();
        assert!(matches!(error, DmaError::Length { .. }), "{error}");
    }
}

#[test]
fn without_an_iommu_each_entry_is_itself_and_neighbours_join() {
    let rig = Rig::coherent();
    let device = DmaDevice::direct("dma", rig.memory.clone(), DeviceConfig::default().coherent(true));
    let pa = rig.buffer(4 * PAGE as usize);
    let entries =
        [entry(pa, PAGE), entry(pa.wrapping_add(PAGE), PAGE), entry(pa.wrapping_add(3 * PAGE), 0x20)];
    let sg = device.map_sg(&entries, ToDevice, NONE).unwrap();
    assert_eq!(shape(&sg), [(0, 2 * PAGE), (3 * PAGE, 0x20)]);
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    let error = device.map_sg(&[entry(pa, PAGE), entry(Pa(1 << 32), 4)], ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::BeyondMask { .. }), "{error}");
}

#[test]
fn lists_are_synced_for_devices_that_do_not_snoop() {
    let rig = Rig::non_coherent();
    let device = rig.device_with(DeviceConfig::default());
    let (one, two) = (rig.buffer(PAGE as usize), rig.buffer(PAGE as usize));
    let entries = [entry(two, PAGE), entry(one, PAGE)];
    let sg = device.map_sg(&entries, Bidirectional, NONE).unwrap();
    let iova = sg.start().unwrap();
    assert_eq!(rig.device_read(iova.wrapping_add(PAGE), 8).unwrap(), pattern(8));
    rig.device_write(iova, b"written").unwrap();
    assert_eq!(rig.cpu(two, 7), pattern(7), "stale without the sync");
    device.sync_sg_for_cpu(&sg, Bidirectional).unwrap();
    assert_eq!(rig.cpu(two, 7), b"written");
    rig.memory.write(one, b"answer");
    assert_ne!(rig.device_read(iova.wrapping_add(PAGE), 6).unwrap(), b"answer");
    device.sync_sg_for_device(&sg, Bidirectional).unwrap();
    assert_eq!(rig.device_read(iova.wrapping_add(PAGE), 6).unwrap(), b"answer");
    rig.device_write(iova, b"last").unwrap();
    device.unmap_sg(sg, Bidirectional, NONE).unwrap();
    assert_eq!(rig.cpu(two, 4), b"last");
}

#[test]
fn an_untrusted_device_gets_bounced_entries_one_by_one() {
    let rig = Rig::coherent();
    let config = DeviceConfig { untrusted: true, ..DeviceConfig::default().coherent(true) };
    let device = rig.device_with(config);
    let pa = rig.buffer(2 * PAGE as usize);
    let entries = [entry(pa, PAGE), entry(pa.wrapping_add(PAGE + 0x40), 0x40)];
    let sg = device.map_sg(&entries, FromDevice, NONE).unwrap();
    assert_eq!(sg.segments().len(), 2);
    assert_eq!(device.bounced_bytes(), PAGE);
    rig.device_write(sg.segments()[1].iova, &[9; 0x40]).unwrap();
    assert_ne!(rig.cpu(entries[1].pa, 0x40), [9; 0x40]);
    device.sync_sg_for_cpu(&sg, FromDevice).unwrap();
    assert_eq!(rig.cpu(entries[1].pa, 0x40), [9; 0x40]);
    device.unmap_sg(sg, FromDevice, NONE).unwrap();
    assert_eq!(device.bounced_bytes(), 0);
}
