extern crate std;

use super::*;
use crate::dma::retire::RING;

use Direction::ToDevice;

const MS: u64 = 1_000_000;

fn reached(rig: &Rig, iova: Iova) -> bool {
    rig.device_read(iova, 1).is_some()
}

#[test]
fn the_window_is_open_until_the_flush_and_no_longer() {
    let rig = Rig::lazy();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova), "lazy: the TLB still knows it");
    rig.space.flush().unwrap();
    assert!(!reached(&rig, iova));
    assert_eq!(rig.flushes(), 1);
}

#[test]
fn no_address_is_used_again_before_a_flush_that_began_later() {
    let rig = Rig::lazy();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let mut waiting = Vec::new();
    for _ in 0..RING {
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        assert!(!waiting.contains(&iova), "{iova} is still in the TLB");
        assert!(reached(&rig, iova));
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
        waiting.push(iova);
    }
    assert_eq!(rig.flushes(), 0);
    assert_eq!(rig.space.statistics().waiting, RING);
    rig.space.flush().unwrap();
    assert_eq!(rig.space.statistics().waiting, 0);
    let again = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(waiting.contains(&again), "after the flush they are free");
}

#[test]
fn a_full_ring_flushes_at_once() {
    let rig = Rig::lazy();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    for _ in 0..4 * RING {
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    }
    assert_eq!(rig.flushes(), 3);
}

#[test]
fn the_timer_flushes_what_waits_for_10_ms() {
    let rig = Rig::lazy();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    rig.space.tick(100 * MS).unwrap();
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.space.tick(105 * MS), Ok(false));
    assert!(reached(&rig, iova));
    assert_eq!(rig.space.tick(110 * MS), Ok(true));
    assert!(!reached(&rig, iova));
    assert_eq!(rig.space.tick(150 * MS), Ok(false), "nothing waits");
    assert_eq!(rig.flushes(), 1);
}

#[test]
fn the_timer_covers_local_rings_once() {
    let rig = Rig::lazy();
    let device = rig.device();
    let mut local = rig.space.local();
    let pa = rig.buffer(PAGE as usize);
    let iova = local.map_single(&device, pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    local.unmap_single(&device, iova, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    rig.space.tick(100 * MS).unwrap();
    rig.space.tick(110 * MS).unwrap();
    assert!(!reached(&rig, iova));
    rig.space.tick(130 * MS).unwrap();
    assert_eq!(rig.space.tick(150 * MS), Ok(false));
    assert_eq!(rig.flushes(), 1, "an address that waits in a local ring is flushed once");
}

#[test]
fn a_local_part_gives_no_address_out_again_before_its_flush() {
    let rig = Rig::lazy();
    let device = rig.device();
    let mut local = rig.space.local();
    let pa = rig.buffer(PAGE as usize);
    for round in 0..3 {
        let mut waiting = Vec::new();
        while rig.flushes() == round {
            let iova = local.map_single(&device, pa, PAGE, ToDevice, NONE).unwrap();
            assert!(!waiting.contains(&iova), "{iova} is still in the TLB");
            assert!(reached(&rig, iova));
            local.unmap_single(&device, iova, PAGE, ToDevice, NONE).unwrap();
            waiting.push(iova);
        }
        assert!(waiting.len() >= RING);
    }
    drop(local);
    let pages = (rig.space.range().1.get() + 1 - rig.space.range().0.get()) / PAGE;
    assert!(pages > RING as u64);
    assert_eq!(rig.space.statistics().quarantined, 0);
}

#[test]
fn dropping_a_local_part_closes_its_window() {
    let rig = Rig::lazy();
    let device = rig.device();
    let mut local = rig.space.local();
    let pa = rig.buffer(PAGE as usize);
    let iova = local.map_single(&device, pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    local.unmap_single(&device, iova, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(local.statistics().waiting, 1);
    drop(local);
    assert!(!reached(&rig, iova));
}

#[test]
fn a_local_part_and_the_space_may_unmap_for_each_other() {
    let rig = Rig::lazy();
    let device = rig.device();
    let mut local = rig.space.local();
    let pa = rig.buffer(PAGE as usize);
    let one = local.map_single(&device, pa, PAGE, ToDevice, NONE).unwrap();
    let other = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_ne!(one, other);
    device.unmap_single(one, PAGE, ToDevice, NONE).unwrap();
    local.unmap_single(&device, other, PAGE, ToDevice, NONE).unwrap();
    local.flush().unwrap();
    rig.space.flush().unwrap();
    assert!(!reached(&rig, one) && !reached(&rig, other));
}

#[test]
fn a_device_of_another_space_is_refused() {
    let (rig, other) = (Rig::lazy(), Rig::lazy());
    let pa = rig.buffer(PAGE as usize);
    let error = rig.space.local().map_single(&other.device(), pa, PAGE, ToDevice, NONE).unwrap_err();
    assert!(matches!(error, DmaError::OtherSpace { .. }), "{error}");
}

#[test]
fn when_a_flush_fails_the_space_becomes_strict_and_keeps_what_waited() {
    let rig = Rig::lazy();
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    let mut waiting = Vec::new();
    for _ in 0..RING {
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
        waiting.push(iova);
    }
    rig.domain.stuck.store(true, Ordering::Relaxed);
    let last = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, last));
    device.unmap_single(last, PAGE, ToDevice, NONE).unwrap();
    assert!(!reached(&rig, last), "it was invalidated by itself");
    assert_eq!(rig.space.mode(), Mode::Strict);
    assert_eq!(rig.space.statistics().failed_flushes, 1);
    for _ in 0..8 {
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        assert!(!waiting.contains(&iova));
    }
    // The timer tries again.
    assert!(matches!(rig.space.tick(100 * MS), Err(DmaError::Flush(_))));
    rig.domain.stuck.store(false, Ordering::Relaxed);
    rig.space.tick(120 * MS).unwrap();
    assert_eq!(rig.space.tick(140 * MS), Ok(false));
    assert_eq!(rig.space.statistics().waiting, 0);
}

#[test]
fn untrusted_devices_are_never_lazy() {
    let rig = Rig::lazy();
    let config = DeviceConfig { untrusted: true, ..DeviceConfig::default().coherent(true) };
    let device = rig.device_with(config);
    let pa = rig.buffer(PAGE as usize);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert!(!reached(&rig, iova));
}

#[test]
fn a_space_that_goes_leaves_nothing_reachable() {
    let rig = Rig::lazy();
    let pa = rig.buffer(PAGE as usize);
    let space = space_over(&rig.domain, SpaceConfig { mode: Mode::Lazy, ..Default::default() }).unwrap();
    let config = DeviceConfig::default().coherent(true);
    let device = DmaDevice::translated("other", space, rig.memory.clone(), config);
    let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert!(reached(&rig, iova));
    device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    drop(device);
    assert!(!reached(&rig, iova));
}

#[test]
fn cpus_have_rings_of_their_own() {
    use core::sync::atomic::AtomicUsize;
    static CPU: AtomicUsize = AtomicUsize::new(0);
    let config = SpaceConfig {
        mode: Mode::Lazy,
        cpus: 2,
        current_cpu: || CPU.load(Ordering::Relaxed),
        ..SpaceConfig::default()
    };
    let rig = Rig::with(FakeMemory::plain(0x8000_0000, 1 << 20), config);
    let device = rig.device();
    let pa = rig.buffer(PAGE as usize);
    for i in 0..2 * RING {
        CPU.store(i, Ordering::Relaxed);
        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    }
    assert_eq!(rig.flushes(), 0);
    assert_eq!(rig.space.statistics().waiting, 2 * RING);
}

/// Threads that map, let the device fill the TLB, unmap: whatever the TLB then says about an address that is handed out
/// must be about the page it was handed out for.
#[test]
fn threads_never_meet_a_stale_translation() {
    let rig = Rig::lazy();
    let device = rig.device();
    let buffers: Vec<Pa> = (0..4).map(|_| rig.buffer(16 * PAGE as usize)).collect();
    let (rig, device) = (&rig, &device);
    let check = |iova: Iova, pa: Pa| assert_eq!(rig.reach(iova, false), Some(pa), "stale at {iova}");
    std::thread::scope(|scope| {
        for (who, base) in buffers.iter().enumerate() {
            scope.spawn(move || {
                let mut local = rig.space.local();
                for i in 0..3000 {
                    let pa = base.wrapping_add(i % 16 * PAGE);
                    if who % 2 == 0 {
                        let iova = local.map_single(device, pa, PAGE, ToDevice, NONE).unwrap();
                        check(iova, pa);
                        local.unmap_single(device, iova, PAGE, ToDevice, NONE).unwrap();
                    } else {
                        let iova = device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
                        check(iova, pa);
                        device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            for now in 0..200 {
                rig.space.tick(now * 4 * MS).unwrap();
                std::thread::yield_now();
            }
        });
    });
    rig.space.flush().unwrap();
    assert_eq!(rig.space.statistics().bad_frees, 0);
}
