use alloc::string::ToString;

use super::*;

use Direction::{Bidirectional, FromDevice, ToDevice};

fn watched(rig: &Rig) -> DmaDevice<Arc<FakeMemory>> {
    rig.device_with(DeviceConfig::default().coherent(true).debug())
}

/// The only report.
#[track_caller]
fn only(device: &DmaDevice<Arc<FakeMemory>>) -> DmaReport {
    let mut reports = device.take_reports();
    assert_eq!(reports.len(), 1, "{reports:#?}");
    reports.remove(0)
}

#[test]
fn a_correct_driver_is_not_reported() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(2 * PAGE as usize);
    device.write_buffer(pa, b"data");
    let iova = device.map_single(pa, PAGE, Bidirectional, NONE).unwrap();
    device.sync_single_for_cpu(iova, 16, FromDevice).unwrap();
    device.write_buffer(pa, b"more");
    device.sync_single_for_device(iova, 16, Bidirectional).unwrap();
    device.unmap_single(iova, PAGE, Bidirectional, NONE).unwrap();
    device.read_buffer(pa, &mut [0; 4]);
    let entries = [SgEntry { pa, len: 64 }, SgEntry { pa: pa.wrapping_add(PAGE), len: PAGE }];
    let sg = device.map_sg(&entries, ToDevice, NONE).unwrap();
    device.sync_sg_for_cpu(&sg, ToDevice).unwrap();
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    let iova = device.map_resource(Pa(0xa000_0000), 16, ToDevice).unwrap();
    device.unmap_resource(iova, 16, ToDevice).unwrap();
    drop(device.alloc_coherent(PAGE).unwrap());
    assert_eq!(device.teardown(), 0);
    assert_eq!(device.take_reports(), []);
}

#[test]
fn mappings_that_are_left_are_reported_with_where_they_were_made() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, 0x80, ToDevice, NONE).unwrap();
    let line = line!() - 1;
    device.map_single(pa, 0x40, ToDevice, NONE).unwrap();
    assert_eq!(device.mapping_count(), 2);
    assert_eq!(device.teardown(), 2);
    let reports = device.take_reports();
    assert_eq!(reports.len(), 2);
    let report = reports.iter().find(|report| report.iova == iova).unwrap();
    assert_eq!(report.misuse, Misuse::NotUnmapped { left: 2 });
    let mapping = report.mapping.unwrap();
    assert_eq!((mapping.mapped_at.line(), mapping.len), (line, 0x80));
    assert!(mapping.mapped_at.file().ends_with("debug.rs"));
    let text = report.to_string();
    assert!(text.starts_with("a0000000.dma: 0xfffff000+0x80 not unmapped (2 mappings left), at "), "{text}");
    assert!(text.contains("a single buffer 0xfffff000+0x80 to device, mapped at "), "{text}");
}

#[test]
fn a_double_unmap_names_all_three_places() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert!(device.unmap_single(iova, PAGE, ToDevice, NONE).is_err());
    let line = line!() - 1;
    let report = only(&device);
    assert_eq!(report.misuse, Misuse::DoubleUnmap);
    let mapping = report.mapping.unwrap();
    let lines = [mapping.mapped_at.line(), mapping.unmapped_at.unwrap().line(), report.at.unwrap().line()];
    assert_eq!(lines, [line - 2, line - 1, line]);
}

#[test]
fn what_was_never_mapped_is_not_unmapped() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(2 * PAGE as usize);
    assert!(device.unmap_single(Iova(0x5000), PAGE, ToDevice, NONE).is_err());
    assert_eq!(only(&device).misuse, Misuse::NeverMapped);
    // In the middle of something: the report says of what.
    let iova = device.map_single(pa, 2 * PAGE, ToDevice, NONE).unwrap();
    assert!(device.unmap_single(iova.wrapping_add(PAGE), PAGE, ToDevice, NONE).is_err());
    let report = only(&device);
    assert_eq!((report.misuse, report.mapping.unwrap().iova), (Misuse::NeverMapped, iova));
    assert!(rig.device_read(iova.wrapping_add(PAGE), 1).is_some(), "nothing was torn");
}

#[test]
fn a_wrong_size_is_reported_and_does_no_harm() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let upper = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    let lower = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(lower.wrapping_add(PAGE), upper);
    device.unmap_single(lower, 2 * PAGE, ToDevice, NONE).unwrap();
    let report = only(&device);
    assert_eq!(report.misuse, Misuse::WrongSize { given: 2 * PAGE });
    assert_eq!(report.mapping.unwrap().len, PAGE);
    assert!(rig.device_read(upper, 1).is_some(), "the neighbour is still mapped");
}

#[test]
fn wrong_directions_are_reported() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    device.sync_single_for_cpu(iova, 4, FromDevice).unwrap();
    assert_eq!(only(&device).misuse, Misuse::WrongDirection { given: FromDevice });
    device.unmap_single(iova, PAGE, Bidirectional, NONE).unwrap();
    let report = only(&device);
    assert_eq!(report.misuse, Misuse::WrongDirection { given: Bidirectional });
    assert_eq!(report.mapping.unwrap().direction, Some(ToDevice));
}

#[test]
fn the_call_for_another_kind_is_refused() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let sg = device.map_sg(&[SgEntry { pa, len: PAGE }], ToDevice, NONE).unwrap();
    let error = device.unmap_single(sg.start().unwrap(), PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::OtherKind { mapped: MappingKind::Sg, .. }), "{error}");
    assert_eq!(only(&device).misuse, Misuse::WrongKind { given: MappingKind::Single });
    device.unmap_sg(sg, ToDevice, NONE).unwrap();
    let ring = device.alloc_coherent(PAGE).unwrap();
    assert!(device.unmap_resource(ring.iova(), PAGE, ToDevice).is_err());
    assert_eq!(only(&device).misuse, Misuse::WrongKind { given: MappingKind::Resource });
}

#[test]
fn a_missing_sync_is_reported_also_on_a_device_that_snoops() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, FromDevice, NONE).unwrap();
    device.read_buffer(pa.wrapping_add(0x800), &mut [0; 8]);
    let line = line!() - 1;
    let report = only(&device);
    assert_eq!((report.misuse, report.at.unwrap().line()), (Misuse::MissingSync { write: false }, line));
    device.sync_single_for_cpu(iova, PAGE, FromDevice).unwrap();
    device.read_buffer(pa, &mut [0; 8]);
    assert_eq!(device.take_reports(), []);
    device.sync_single_for_device(iova, PAGE, FromDevice).unwrap();
    device.write_buffer(pa, b"too early");
    assert_eq!(only(&device).misuse, Misuse::MissingSync { write: true });
    // Both may read what the device only reads.
    let other = rig.buffer(PAGE as usize);
    device.map_single(other, PAGE, ToDevice, NONE).unwrap();
    device.read_buffer(other, &mut [0; 8]);
    assert_eq!(device.take_reports(), []);
    device.debug_cpu_access(other, 8, true);
    assert_eq!(only(&device).misuse, Misuse::MissingSync { write: true });
}

#[test]
fn a_missing_sync_in_a_scatter_list_is_found_by_its_memory() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let (one, two) = (rig.buffer(PAGE as usize), rig.buffer(PAGE as usize));
    let entries = [SgEntry { pa: one, len: 0x100 }, SgEntry { pa: two, len: PAGE }];
    let sg = device.map_sg(&entries, FromDevice, NONE).unwrap();
    device.read_buffer(one.wrapping_add(0x100), &mut [0; 8]);
    assert_eq!(device.take_reports(), [], "that is behind the entry");
    device.read_buffer(two.wrapping_add(0x800), &mut [0; 8]);
    assert_eq!(only(&device).mapping.unwrap().kind, MappingKind::Sg);
    device.unmap_sg(sg, FromDevice, NONE).unwrap();
}

#[test]
fn syncing_after_the_unmap_is_reported() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert!(device.sync_single_for_device(iova, 16, ToDevice).is_err());
    assert_eq!(only(&device).misuse, Misuse::SyncAfterUnmap);
}

#[test]
fn a_fault_tells_which_mapping_was_there_last() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, 0x100, ToDevice, NONE).unwrap();
    let Some(FaultStory::Live(mapping)) = device.explain_fault(iova.wrapping_add(0xff)) else { panic!() };
    assert_eq!(mapping.direction, Some(ToDevice));
    assert!(matches!(device.explain_fault(iova.wrapping_add(0x100)), Some(FaultStory::Behind(_))));
    assert_eq!(device.explain_fault(Iova(0x5000)), Some(FaultStory::Never));
    device.unmap_single(iova, 0x100, ToDevice, NONE).unwrap();
    let line = line!() - 1;
    let Some(FaultStory::Gone(mapping)) = device.report_fault(iova.wrapping_add(8), false) else { panic!() };
    assert_eq!(mapping.unmapped_at.unwrap().line(), line);
    let report = only(&device);
    assert_eq!((report.misuse, report.at), (Misuse::UseAfterUnmap, None));
    assert!(
        report.to_string().contains("used by the device after it was unmapped; a single buffer"),
        "{report}"
    );
}

#[test]
fn the_same_memory_may_be_mapped_twice_without_an_iommu() {
    let rig = Rig::coherent();
    let config = DeviceConfig::default().coherent(true).debug();
    let device = DmaDevice::direct("dma", rig.memory.clone(), config);
    let pa = rig.buffer(PAGE as usize);
    let one = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    let two = device.map_single(pa, 64, Bidirectional, NONE).unwrap();
    assert_eq!(one, two);
    device.unmap_single(one, PAGE, ToDevice, NONE).unwrap();
    device.unmap_single(two, 64, Bidirectional, NONE).unwrap();
    assert_eq!(device.take_reports(), []);
    assert!(device.unmap_single(two, 64, Bidirectional, NONE).is_err());
    assert_eq!(only(&device).misuse, Misuse::DoubleUnmap);
}

#[test]
fn reports_and_memory_of_the_past_are_bounded() {
    let rig = Rig::coherent();
    let device = watched(&rig);
    for i in 0..2000 {
        assert!(device.unmap_single(Iova(0x10_0000 + i * PAGE), PAGE, ToDevice, NONE).is_err());
    }
    assert_eq!(device.take_reports().len(), 256);
    let pa = rig.buffer(PAGE as usize);
    for _ in 0..2000 {
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    }
    assert_eq!((device.mapping_count(), device.take_reports().len()), (0, 0));
}
