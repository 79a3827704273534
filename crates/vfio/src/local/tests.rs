//! A guest's memory, bus and lines.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::{Ipa, Pa};
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio};
use portcullis_hal::{Block, Clock, DmaMemory, Mmio};
use proptest::prelude::*;

use super::*;
use crate::Region;
use crate::window::RegionWindow;

const BASE: u64 = 0x4000_0000;

fn host() -> Arc<FakeMemory> {
    Arc::new(FakeMemory::plain(0x1000_0000, 8 << 20))
}

fn memory(host: &Arc<FakeMemory>, bytes: u64, block: u64) -> GuestMemory<Arc<FakeMemory>> {
    let config = GuestMemoryConfig { block, ..GuestMemoryConfig::new(Ipa(BASE), bytes) };
    GuestMemory::new("a", host.clone(), config).unwrap()
}

#[test]
fn guest_memory_is_contiguous_for_the_guest_and_scattered_on_the_host() {
    let host = host();
    let memory = memory(&host, 0x10_0000, 0x1000);
    let pages: Vec<u64> =
        (0..256).map(|n| memory.host_address(Ipa(BASE + n * 0x1000)).unwrap().get()).collect();
    let in_order = pages.windows(2).filter(|pair| pair[1] == pair[0] + 0x1000).count();
    assert!(in_order < 16, "{in_order} of 255 neighbours are neighbours on the host");
    let text: Vec<u8> = (0..10_000u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    memory.write(Pa(BASE + 0x1ff3), &text);
    let mut back = vec![0; text.len()];
    memory.read(Pa(BASE + 0x1ff3), &mut back);
    assert_eq!(back, text);
    let mut part = [0; 16];
    host.read(Pa(pages[2]), &mut part);
    assert_eq!(part, text[13..29], "the third page of the guest is where its table says");
}

#[test]
fn runs_of_words_cross_blocks() {
    let host = host();
    let memory = memory(&host, 0x1_0000, 0x1000);
    memory.store_run(Pa(BASE + 0xf80), 600, 100, 3);
    let mut words = [0; 600];
    memory.load_run(Pa(BASE + 0xf80), &mut words);
    assert!(words.iter().enumerate().all(|(n, word)| *word == 100 + 3 * n as u64));
    assert_eq!(memory.load64(Pa(BASE + 0xf80 + 599 * 8)), 100 + 3 * 599);
    assert_eq!(memory.cas64(Pa(BASE + 0xf80), 100, 7), Ok(()));
    assert_eq!(memory.cas64(Pa(BASE + 0xf80), 100, 8), Err(7));
}

proptest! {
    /// Whatever a guest asks for, and however it lies about where it is: nothing but its own memory changes.
    #[test]
    fn no_address_leads_out_of_the_guest(
        requests in proptest::collection::vec((any::<u64>(), 0usize..9000, 0u8..8, 0u64..0x2_0000), 1..40)
    ) {
        let host = host();
        let fence = host.alloc(0x1000, 0x1000).unwrap();
        let memory = memory(&host, 0x1_0000, 0x1000);
        let behind = host.alloc(0x1000, 0x1000).unwrap();
        host.take_stray();
        let bytes = vec![0xa5; 9000];
        for (wild, len, what, near) in requests {
            // Half of the addresses are around the memory.
            let at = if wild % 2 == 0 { wild } else { (BASE - 0x4000) + near };
            let pa = Pa(at);
            match what {
                0 => memory.write(pa, &bytes[..len]),
                1 => {
                    let mut buf = vec![0x77; len];
                    memory.read(pa, &mut buf);
                    for (n, byte) in buf.iter().enumerate() {
                        let inside = at.checked_add(n as u64).is_some_and(|a| (BASE..BASE + 0x1_0000).contains(&a));
                        prop_assert!(inside || *byte == 0);
                    }
                }
                2 => memory.store64(pa, u64::MAX),
                3 => { memory.load64(pa); }
                4 => { let _ = memory.cas64(pa, 0, u64::MAX); }
                5 => memory.store_run(pa, len, u64::MAX, 0),
                6 => { memory.clean(pa, len); memory.invalidate(pa, len); memory.free(Block { pa, len }); }
                _ => { memory.load_run(pa, &mut vec![0; len]); }
            }
        }
        let mut seen = [1; 0x1000];
        for block in [fence, behind] {
            host.read(block.pa, &mut seen);
            prop_assert_eq!(seen, [0; 0x1000]);
        }
        prop_assert_eq!((host.stray_accesses(), host.uses_after_free(), host.bad_frees()), (0, 0, 0));
    }
}

trait TakeStray {
    fn take_stray(&self);
}
impl TakeStray for Arc<FakeMemory> {
    fn take_stray(&self) {
        assert_eq!(self.stray_accesses(), 0);
    }
}

#[test]
fn memory_goes_back_zeroed_unless_it_is_pinned() {
    let host = host();
    let memory = memory(&host, 0x4000, 0x1000);
    let pages: Vec<Pa> = (0..4).map(|n| memory.host_address(Ipa(BASE + n * 0x1000)).unwrap()).collect();
    for n in 0..4 {
        memory.store64(Pa(BASE + n * 0x1000), 0x5ec2e7);
    }
    let pins = memory.pins();
    pins.pin(pages[1], 0x1000).unwrap();
    pins.pin(pages[2], 0x1000).unwrap();
    pins.unpin(pages[2], 0x1000);
    drop(memory);
    assert_eq!(host.outstanding(), 4, "somebody who pins holds the memory");
    drop(pins);
    assert_eq!(host.outstanding(), 1);
    assert_eq!(pages.iter().map(|pa| host.load64(*pa)).collect::<Vec<_>>(), [0, 0x5ec2e7, 0, 0]);
}

#[test]
fn only_the_machine_s_own_memory_can_be_pinned() {
    let host = host();
    let (a, b) = (memory(&host, 0x4000, 0x1000), memory(&host, 0x4000, 0x1000));
    let pins = a.pins();
    for n in 0..4 {
        assert!(pins.pin(a.host_address(Ipa(BASE + n * 0x1000)).unwrap(), 0x1000).is_ok());
        let foreign = b.host_address(Ipa(BASE + n * 0x1000)).unwrap();
        assert!(pins.pin(foreign, 0x1000).is_err());
    }
    assert!(pins.pin(Pa(0x1000_0000), 8 << 20).is_err());
    assert!(pins.pin(Pa(u64::MAX - 0xfff), 0x1000).is_err() && pins.pin(Pa(0), 0).is_err());
}

#[test]
fn layouts_that_cannot_be_and_hosts_without_memory_are_refused() {
    let host = host();
    let new = |config| GuestMemory::new("a", host.clone(), config).unwrap_err();
    let good = GuestMemoryConfig::new(Ipa(BASE), 0x10_0000);
    for config in [
        GuestMemoryConfig { block: 0x800, ..good },
        GuestMemoryConfig { block: 0x3000, ..good },
        GuestMemoryConfig { bytes: 0, ..good },
        GuestMemoryConfig { bytes: 0x1_8000, ..good },
        GuestMemoryConfig { base: Ipa(BASE + 0x1000), ..good },
        GuestMemoryConfig { base: Ipa(!0xffff), ..good },
    ] {
        assert!(matches!(new(config), VmError::Layout { .. }), "{config:?}");
    }
    let error = new(GuestMemoryConfig { bytes: 64 << 20, ..good });
    assert!(matches!(error, VmError::NoMemory { got, .. } if got > 0), "{error}");
    host.assert_clean();
}

#[test]
fn the_guest_s_own_allocator_gives_zeroed_pieces_and_leaves_the_beginning_alone() {
    let host = host();
    let config = GuestMemoryConfig { kept_free: 0x8000, ..GuestMemoryConfig::new(Ipa(BASE), 0x2_0000) };
    let memory = GuestMemory::new("a", host, config).unwrap();
    let a = memory.alloc(0x3000, 0x1000).unwrap();
    assert_eq!(a.pa, Pa(BASE + 0x8000));
    memory.write(a.pa, &[0xff; 0x3000]);
    memory.free(a);
    let b = memory.alloc(0x2000, 0x1000).unwrap();
    assert_eq!((b.pa, memory.load64(b.pa), memory.outstanding()), (a.pa, 0, 1));
    assert_eq!(memory.alloc(0x2_0000, 64), None);
    assert_eq!(memory.alloc(0, 64), None);
}

fn window(device: &str, wanted: u64, size: u64, regs: &Arc<FakeMmio>) -> DeviceWindow {
    let region = Region::new(Pa(0xa000_0000), size, regs.clone());
    DeviceWindow {
        device: device.into(),
        region: 0,
        size,
        wanted: Ipa(wanted),
        registers: RegionWindow::new(&region),
        host: None,
    }
}

#[test]
fn windows_go_where_they_are_wanted_or_where_there_is_room() {
    let vm = LocalVm::new(LocalVmConfig::new("a", 0x10_0000), host(), Arc::new(FakeClock::new())).unwrap();
    let regs = Arc::new(FakeMmio::new());
    assert_eq!(vm.place(window("one", 0xa000_0000, 0x1000, &regs)), Ok(Ipa(0xa000_0000)));
    assert_eq!(vm.place(window("two", 0xa000_0800, 0x1000, &regs)), Ok(Ipa(0x1000_0000)));
    assert_eq!(
        vm.place(window("three", BASE + 0x1000, 0x2000, &regs)),
        Ok(Ipa(0x1000_1000)),
        "not in memory"
    );
    assert!(matches!(vm.place(window("big", 0xa000_0000, 0x4000_0000, &regs)), Err(VmError::NoRoom { .. })));
    assert!(vm.place(window("none", 0, 0, &regs)).is_err());
    assert!(vm.place(window("end", u64::MAX, 0x4000_0000, &regs)).is_err());
    let mmio = vm.bus().window(Ipa(0x1000_1010), 0x100).unwrap();
    mmio.write32(0xfc, 5);
    mmio.write32(0x100, 6);
    assert_eq!((regs.get32(0x10c), mmio.read32(0x100), mmio.read64(0xfc)), (5, u32::MAX, u64::MAX));
    assert!(vm.bus().window(Ipa(0x1000_2ff0), 0x20).is_err());
    assert!(vm.bus().window(Ipa(0xffff_ffff_ffff_fff0), 0x20).is_err());
    vm.withdraw(Ipa(0x1000_0000)).unwrap();
    assert!(matches!(vm.withdraw(Ipa(0x1000_0000)), Err(VmError::NoWindow { .. })));
    assert_eq!(vm.place(window("four", 0xa000_0000, 0x1000, &regs)), Ok(Ipa(0x1000_0000)));
}

#[test]
fn guest_lines_run_out_and_only_what_was_taken_can_be_ended() {
    let config = LocalVmConfig { lines: 2, ..LocalVmConfig::new("a", 0x10_0000) };
    let vm = LocalVm::new(config, host(), Arc::new(FakeClock::new())).unwrap();
    let ended = Arc::new(core::sync::atomic::AtomicU32::new(0));
    let count = ended.clone();
    let eoi: Arc<dyn EndOfInterrupt> = Arc::new(move |_| {
        count.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(vm.connect_line(Some(1), eoi.clone()), Ok(1));
    assert!(vm.connect_line(Some(1), eoi.clone()).is_err() && vm.connect_line(Some(2), eoi.clone()).is_err());
    assert_eq!(vm.connect_line(None, eoi.clone()), Ok(0));
    let error = vm.connect_line(None, eoi).unwrap_err();
    assert_eq!(error.to_string(), "virtual machine a has no free interrupt line");
    vm.set_line(0, true);
    vm.set_line(77, true);
    vm.lines().end(0);
    assert_eq!(ended.load(core::sync::atomic::Ordering::Relaxed), 0);
    assert_eq!(vm.lines().take(), [0]);
    vm.lines().end(0);
    vm.lines().end(0);
    assert_eq!(ended.load(core::sync::atomic::Ordering::Relaxed), 1);
    assert_eq!(vm.lines().take(), [0], "it is still high");
    vm.disconnect_line(0);
    assert!(vm.lines().high().is_empty());
}

#[test]
fn a_guest_s_time_begins_with_the_guest() {
    let clock = Arc::new(FakeClock::new());
    clock.advance_us(1000);
    let vm = LocalVm::new(LocalVmConfig::new("a", 0x10_0000), host(), clock.clone()).unwrap();
    assert_eq!(vm.clock().now_ns(), 0);
    vm.clock().delay_us(5);
    assert_eq!((vm.clock().now_ns(), clock.now_ns()), (5_000, 1_005_000));
}

#[test]
fn machines_can_go_to_other_threads() {
    fn check<T: Send + Sync>() {}
    check::<LocalVm<Arc<FakeMemory>>>();
    check::<crate::Assignment>();
    check::<crate::Passthrough>();
}
