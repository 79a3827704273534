use super::*;

use Direction::{Bidirectional, FromDevice, ToDevice};

fn untrusted() -> DeviceConfig {
    DeviceConfig { untrusted: true, ..DeviceConfig::default().coherent(true) }
}

#[test]
fn an_untrusted_device_sees_nothing_around_its_buffer() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let page = rig.buffer(PAGE as usize);
    let iova = device.map_single(page.wrapping_add(0x200), 0x100, ToDevice, NONE).unwrap();
    assert_eq!(iova.get() & (PAGE - 1), 0x200);
    let seen = rig.device_read(Iova(iova.get() - 0x200), PAGE as usize).unwrap();
    assert_eq!(seen[0x200..0x300], rig.cpu(page, PAGE as usize)[0x200..0x300]);
    assert!(seen[..0x200].iter().chain(&seen[0x300..]).all(|byte| *byte == 0));
    device.unmap_single(iova, 0x100, ToDevice, NONE).unwrap();
    assert_eq!(rig.device_read(iova, 1), None);
    assert_eq!(rig.memory.outstanding(), 1, "only the driver's own page is left");
}

#[test]
fn whole_pages_do_not_bounce() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let pa = rig.buffer(2 * PAGE as usize);
    let iova = device.map_single(pa, 2 * PAGE, FromDevice, NONE).unwrap();
    assert_eq!(rig.reach(iova, true), Some(pa));
    assert_eq!(device.bounced_bytes(), 0);
}

#[test]
fn what_the_device_wrote_comes_back_and_what_it_left_out_stays() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let page = rig.buffer(PAGE as usize);
    let before = rig.cpu(page, PAGE as usize);
    let iova = device.map_single(page.wrapping_add(0x10), 0x20, FromDevice, NONE).unwrap();
    rig.device_write(iova.wrapping_add(8), b"device").unwrap();
    rig.device_write(Iova(iova.get() + 0x100), b"outside").unwrap();
    assert_eq!(rig.cpu(page, PAGE as usize), before);
    device.unmap_single(iova, 0x20, FromDevice, NONE).unwrap();
    let mut expected = before;
    expected[0x18..0x1e].copy_from_slice(b"device");
    assert_eq!(rig.cpu(page, PAGE as usize), expected);
}

#[test]
fn nothing_comes_back_from_what_the_device_only_reads() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let page = rig.buffer(PAGE as usize);
    let iova = device.map_single(page, 0x20, ToDevice, NONE).unwrap();
    rig.memory.write(page, b"changed by the CPU");
    device.unmap_single(iova, 0x20, ToDevice, NONE).unwrap();
    assert_eq!(rig.cpu(page, 18), b"changed by the CPU");
}

#[test]
fn syncs_copy_in_their_direction() {
    for (rig, coherent) in [(Rig::coherent(), true), (Rig::non_coherent(), false)] {
        let device = rig.device_with(DeviceConfig { coherent, ..untrusted() });
        let page = rig.buffer(PAGE as usize);
        let buffer = page.wrapping_add(0x40);
        let iova = device.map_single(buffer, 0x30, Bidirectional, NONE).unwrap();
        rig.device_write(iova, b"from device").unwrap();
        device.sync_single_for_cpu(iova, 0x30, Bidirectional).unwrap();
        assert_eq!(rig.cpu(buffer, 11), b"from device");
        rig.memory.write(buffer.wrapping_add(0x10), b"from the CPU");
        assert_ne!(rig.device_read(iova.wrapping_add(0x10), 12).unwrap(), b"from the CPU");
        device.sync_single_for_device(iova.wrapping_add(0x10), 0x10, Bidirectional).unwrap();
        assert_eq!(rig.device_read(iova.wrapping_add(0x10), 12).unwrap(), b"from the CPU");
        device.unmap_single(iova, 0x30, Bidirectional, NONE).unwrap();
        assert_eq!(device.bounced_bytes(), 0);
    }
}

#[test]
fn a_shared_cache_line_is_not_torn_by_a_device_that_does_not_snoop() {
    let rig = Rig::non_coherent();
    let device = rig.device_with(DeviceConfig::default());
    let page = rig.buffer(PAGE as usize);
    let buffer = page.wrapping_add(0x10);
    let iova = device.map_single(buffer, 0x20, FromDevice, NONE).unwrap();
    assert_ne!(rig.reach(iova, true), Some(buffer), "it shares a line with others' data");
    rig.device_write(iova, &[0xaa; 0x20]).unwrap();
    // The CPU uses the rest of the line meanwhile.
    rig.memory.write(page, b"neighbour");
    device.unmap_single(iova, 0x20, FromDevice, NONE).unwrap();
    assert_eq!(rig.cpu(page, 9), b"neighbour");
    assert_eq!(rig.cpu(buffer, 0x20), [0xaa; 0x20]);
    // What the device only reads shares lines without harm.
    let iova = device.map_single(buffer, 0x20, ToDevice, NONE).unwrap();
    assert_eq!(rig.reach(iova, false), Some(buffer));
}

#[test]
fn the_pool_is_bounded_and_says_so() {
    let rig = Rig::coherent();
    let device = rig.device_with(DeviceConfig { bounce_limit: 2 * PAGE, ..untrusted() });
    let pa = rig.buffer(PAGE as usize);
    let map = || device.map_single(pa, 16, ToDevice, NONE);
    let iova = map().unwrap();
    map().unwrap();
    let error = map().unwrap_err();
    let expected =
        DmaError::BounceFull { device: "a0000000.dma".into(), len: PAGE, used: 2 * PAGE, limit: 2 * PAGE };
    assert_eq!(error, expected);
    device.unmap_single(iova, 16, ToDevice, NONE).unwrap();
    assert!(map().is_ok());
}

#[test]
fn a_failed_map_gives_the_bounce_buffer_back() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let pa = rig.buffer(PAGE as usize);
    rig.tables.fail_after(0);
    assert!(device.map_single(pa, 16, ToDevice, NONE).is_err());
    assert_eq!((device.bounced_bytes(), rig.memory.outstanding()), (0, 1));
}

#[test]
fn a_bounce_buffer_that_may_still_be_reached_is_not_freed() {
    let rig = Rig::coherent();
    let device = rig.device_with(untrusted());
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, 16, ToDevice, NONE).unwrap();
    rig.domain.dead.store(true, Ordering::Relaxed);
    assert!(device.unmap_single(iova, 16, ToDevice, NONE).is_err());
    assert_eq!(rig.memory.outstanding(), 2);
    assert_eq!(device.kept_bytes(), PAGE);
}
