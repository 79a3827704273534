//! Devices in virtual machines: the way in, the way back, and what must not happen in between.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use portcullis_arch::{Iova, Ipa, Pa};
use portcullis_hal::{DmaMemory, Mmio};
use portcullis_iommu::DomainKind;
use spin::Mutex;

use crate::testing::{AxiCore, Host, host};
use crate::{
    AssignOptions, DeviceWindow, EndOfInterrupt, GuestRange, IoasError, PinError, PinMemory, VFIO_DRIVER,
    VfioError, Vm, VmError,
};

const MIB: u64 = 1 << 20;

fn options() -> AssignOptions {
    AssignOptions::default()
}

#[test]
fn a_machine_drives_its_device_through_its_own_addresses() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80, 0xe81, 0xe82]);
    let vm = host.vm("a", 4 * MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    let placed = &assignment.regions()[0];
    assert_eq!((placed.ipa, placed.size), (Ipa(0xa000_0000), 0x1000));
    let regs = vm.bus().window(placed.ipa, placed.size).unwrap();
    regs.write32(0x08, 0x4000_0040);
    assert_eq!(core.registers().get32(0x08), 0x4000_0040);
    let domain = assignment.ioas().domain(host.smmu).unwrap();
    assert_eq!(domain.kind(), DomainKind::Stage2);
    // The device and the guest's CPU mean the same memory by every address of the guest.
    for at in [0x4000_0000u64, 0x4001_2340, 0x403f_ffff] {
        assert_eq!(domain.iova_to_phys(Iova(at)), vm.guest_memory().host_address(Ipa(at)));
        assert!(domain.iova_to_phys(Iova(at)).is_some());
    }
    assert_eq!(domain.iova_to_phys(Iova(0x4040_0000)), None);
    assert_eq!(domain.iova_to_phys(Iova(0xa000_0000)), None, "registers are not for devices");
    assert_eq!(vm.guest_memory().pinned_bytes(), 4 * MIB);
    let again = host.passthrough.assign("dma0", host.vm("b", MIB), options()).unwrap_err();
    assert_eq!(again.to_string(), "device dma0 is assigned to virtual machine a");
}

#[test]
fn an_interrupt_reaches_the_guest_and_the_line_is_open_again_after_its_end() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    let lines: Vec<u32> = assignment.lines().iter().map(|line| line.line).collect();
    assert_eq!(lines, [89, 90], "the host's numbers, as they were free");
    assert_eq!(host.passthrough.interrupt(90), 1);
    assert_eq!(host.passthrough.interrupt(90), 0, "masked until the guest is done");
    assert_eq!(vm.lines().take(), [90]);
    assert!(vm.lines().take().is_empty(), "delivered once");
    vm.lines().end(90);
    assert!(vm.lines().high().is_empty());
    assert_eq!(host.passthrough.interrupt(90), 1, "a line that is still high comes again");
    vm.lines().mask(90, true);
    assert!(vm.lines().take().is_empty());
    vm.lines().mask(90, false);
    assert_eq!(vm.lines().take(), [90]);
    assert_eq!(host.passthrough.interrupt(91), 0);
}

#[test]
fn two_machines_have_an_engine_each_and_nothing_in_common() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80, 0xe81, 0xe82]);
    host.vfio_dma("dma1", &[0xe83, 0xe84, 0xe85]);
    let (a, b) = (host.vm("a", 2 * MIB), host.vm("b", 2 * MIB));
    let for_a = host.passthrough.assign("dma0", a.clone(), options()).unwrap();
    let for_b = host.passthrough.assign("dma1", b.clone(), options()).unwrap();
    assert_eq!(for_b.lines()[0].line, 89, "machines have lines of their own");
    let (of_a, of_b) = (for_a.ioas().domain(host.smmu).unwrap(), for_b.ioas().domain(host.smmu).unwrap());
    let pages = |domain: &portcullis_iommu::Domain| -> Vec<Pa> {
        (0..2 * MIB).step_by(4096).map(|at| domain.iova_to_phys(Iova(0x4000_0000 + at)).unwrap()).collect()
    };
    let (mine, other) = (pages(&of_a), pages(&of_b));
    assert!(mine.iter().all(|page| !other.contains(page)));
    let scattered = mine.windows(2).filter(|pair| pair[1].get() != pair[0].get() + 4096).count();
    assert!(scattered > 16, "guest memory is not contiguous on the host");
}

#[test]
fn a_machine_with_two_devices_has_one_address_space_until_the_last_one_leaves() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    host.vfio_dma("dma1", &[0xe83]);
    let vm = host.vm("a", MIB);
    let one = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    let two = host.passthrough.assign("dma1", vm.clone(), options()).unwrap();
    assert!(Arc::ptr_eq(one.ioas(), two.ioas()));
    assert_ne!(one.regions()[0].ipa, two.regions()[0].ipa, "the second finds its address taken");
    assert_ne!(one.lines()[0].line, two.lines()[0].line);
    let mixed = AssignOptions { coherent: true, ..options() };
    host.vfio_dma("dma2", &[0xe86]);
    assert!(matches!(host.passthrough.assign("dma2", vm.clone(), mixed), Err(VfioError::Vm(_))));
    host.passthrough.release(&one).unwrap();
    assert_eq!(vm.guest_memory().pinned_bytes(), MIB);
    host.passthrough.release(&two).unwrap();
    assert_eq!(vm.guest_memory().pinned_bytes(), 0);
    assert!(host.passthrough.assignments().is_empty() && vm.bus().windows().is_empty());
}

/// A machine that looks at the hardware whenever something is taken from it.
struct Watched {
    vm: Arc<dyn Vm>,
    watch: Arc<Watch>,
}

struct Watch {
    inner: Arc<dyn PinMemory>,
    log: Mutex<Vec<String>>,
    look: alloc::boxed::Box<dyn Fn() -> String + Send + Sync>,
}

impl Watch {
    fn note(&self, what: &str) {
        let entry = alloc::format!("{what}: {}", (self.look)());
        let mut log = self.log.lock();
        if log.last() != Some(&entry) {
            log.push(entry);
        }
    }
}

impl PinMemory for Watch {
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError> {
        self.inner.pin(pa, len)
    }
    fn unpin(&self, pa: Pa, len: u64) {
        self.note("unpin");
        self.inner.unpin(pa, len);
    }
}

impl Vm for Watched {
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
        self.watch.clone()
    }
    fn place(&self, window: DeviceWindow) -> Result<Ipa, VmError> {
        self.watch.note("place");
        self.vm.place(window)
    }
    fn withdraw(&self, ipa: Ipa) -> Result<(), VmError> {
        self.watch.note("withdraw");
        self.vm.withdraw(ipa)
    }
    fn connect_line(&self, wanted: Option<u32>, eoi: Arc<dyn EndOfInterrupt>) -> Result<u32, VmError> {
        self.vm.connect_line(wanted, eoi)
    }
    fn disconnect_line(&self, line: u32) {
        self.watch.note("disconnect");
        self.vm.disconnect_line(line);
    }
    fn set_line(&self, line: u32, high: bool) {
        self.vm.set_line(line, high);
    }
}

fn watched(host: &Host, core: &AxiCore, vm: Arc<dyn Vm>) -> (Arc<Watched>, Arc<Watch>) {
    let (core, mmio) = (core.clone(), host.mmio.clone());
    let look = move || {
        let blocked = mmio.get32(0xc00) >> 16 & 3 == 2;
        let state = if core.is_stopped() { "stopped" } else { "running" };
        alloc::format!("{state}, {}", if blocked { "blocked" } else { "translated" })
    };
    let watch =
        Arc::new(Watch { inner: vm.pins(), log: Mutex::default(), look: alloc::boxed::Box::new(look) });
    (Arc::new(Watched { vm, watch: watch.clone() }), watch)
}

#[test]
fn a_death_takes_the_registers_then_stops_the_device_then_blocks_it_then_frees_the_memory() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let (machine, watch) = watched(&host, &core, vm.clone());
    let assignment = host.passthrough.assign("dma0", machine, options()).unwrap();
    let secret = vm.guest_memory().alloc(4096, 4096).unwrap();
    vm.guest_memory().write(secret.pa, b"a secret");
    let on_host = vm.guest_memory().host_address(Ipa(secret.pa.get())).unwrap();
    core.start();
    assert!(host.passthrough.reap().is_empty(), "it lives");
    vm.kill();
    let reaped = host.passthrough.reap();
    assert_eq!(reaped, [("dma0".to_string(), "a".to_string(), Ok(()))]);
    let expected = [
        "place: stopped, translated",
        "withdraw: running, translated",
        "disconnect: stopped, translated",
        "unpin: stopped, blocked",
    ];
    assert_eq!(*watch.log.lock(), expected);
    assert!(assignment.is_released());
    let mut seen = [0u8; 8];
    host.memory.read(on_host, &mut seen);
    assert_eq!(&seen, b"a secret", "the machine is still held");
    drop((assignment, vm, watch));
    let live = host.memory.uses_after_free();
    host.memory.read(on_host, &mut seen);
    assert_eq!((seen, host.memory.uses_after_free()), ([0; 8], live + 1), "zeroed, then given back");
    // The next machine gets the engine at once.
    let next = host.vm("c", MIB);
    host.passthrough.assign("dma0", next, options()).unwrap();
}

#[test]
fn a_dead_machine_reaches_nothing() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    let regs = vm.bus().window(assignment.regions()[0].ipa, 0x1000).unwrap();
    let at = vm.guest_memory().alloc(64, 64).unwrap().pa;
    vm.guest_memory().store64(at, 7);
    host.passthrough.interrupt(89);
    core.registers().take_log();
    vm.kill();
    regs.write32(0, 1);
    assert_eq!((regs.read32(0), vm.guest_memory().load64(at)), (u32::MAX, 0));
    assert!(core.registers().take_log().is_empty() && vm.lines().take().is_empty());
    assert!(vm.guest_memory().alloc(64, 64).is_none());
    host.vfio_dma("dma1", &[0xe83]);
    let refused = host.passthrough.assign("dma1", vm, options()).unwrap_err();
    assert_eq!(refused.to_string(), "virtual machine a is dead");
}

#[test]
fn an_engine_that_does_not_stop_is_kept_from_the_memory_and_from_the_next_machine() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    core.start();
    core.stuck(true);
    vm.kill();
    let error = host.passthrough.release(&assignment).unwrap_err();
    assert!(matches!(error, VfioError::Quarantined { .. }), "{error}");
    assert!(host.is_blocked(0));
    assert_eq!(vm.guest_memory().pinned_bytes(), 0, "it is blocked, so its memory is free");
    let next = host.passthrough.assign("dma0", host.vm("c", MIB), options()).unwrap_err();
    assert!(matches!(next, VfioError::Quarantined { .. }), "{next}");
    core.stuck(false);
    host.registry.rescue("dma0").unwrap();
    host.passthrough.assign("dma0", host.vm("d", MIB), options()).unwrap();
}

#[test]
fn memory_that_an_iommu_may_still_reach_is_never_given_to_anybody() {
    let host = host();
    host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let before = host.memory.outstanding();
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    host.tlb_stuck.store(true, Ordering::Relaxed);
    let error = host.passthrough.release(&assignment).unwrap_err();
    assert!(matches!(error, VfioError::Ioas(IoasError::StillReachable(_))), "{error}");
    drop((assignment, vm));
    assert!(host.memory.outstanding() >= before, "lost rather than shared");
}

#[test]
fn a_failed_assignment_leaves_no_trace() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let limited = crate::Limits { pinned_bytes: MIB - 1, ..crate::Limits::default() };
    let refused = host.passthrough.assign("dma0", vm.clone(), AssignOptions { limits: limited, ..options() });
    assert!(matches!(refused, Err(VfioError::Ioas(IoasError::PinLimit { .. }))));
    // All of the guest's addresses are memory: no room for registers.
    let mut config = crate::LocalVmConfig::new("full", MIB);
    config.memory.base = Ipa(0xa000_0000);
    config.devices = (Ipa(0xa000_0000), Ipa(0xa000_0fff));
    let full = crate::LocalVm::new(config, host.memory.clone(), host.clock.clone()).unwrap();
    let refused = host.passthrough.assign("dma0", full.clone(), options());
    assert!(matches!(refused, Err(VfioError::Vm(VmError::NoRoom { .. }))));
    for vm in [&vm, &full] {
        assert_eq!((vm.guest_memory().pinned_bytes(), vm.bus().windows().len()), (0, 0));
        assert!(vm.lines().high().is_empty());
    }
    assert!(core.is_stopped() && host.is_blocked(0) && host.passthrough.assignments().is_empty());
    host.registry.unbind("dma0").unwrap();
    host.registry.bind("dma0", VFIO_DRIVER).unwrap();
    host.passthrough.assign("dma0", vm, options()).unwrap();
}

#[test]
fn an_assignment_that_is_dropped_is_undone() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let assignment = host.passthrough.assign("dma0", vm.clone(), options()).unwrap();
    core.start();
    assignment.release().unwrap();
    assignment.release().unwrap();
    assert!(core.is_stopped() && vm.bus().windows().is_empty());
    host.passthrough.release(&assignment).unwrap();
    assert_eq!(vm.guest_memory().pinned_bytes(), 0);
}

#[test]
fn a_guest_cannot_bring_a_quarantined_engine_back_to_memory() {
    let host = host();
    let core = host.vfio_dma("dma0", &[0xe80]);
    let vm = host.vm("a", MIB);
    let with = AssignOptions { viommu: true, ..options() };
    let assignment = host.passthrough.assign("dma0", vm, with).unwrap();
    core.start();
    core.stuck(true);
    assert!(matches!(assignment.devices()[0].reset(), Err(VfioError::Quarantined { .. })));
    let viommu = assignment.viommu().unwrap();
    assert_eq!(viommu.set_table(0, crate::ViommuTable::Bypass), Err(crate::ViommuError::Gone));
    assert!(host.is_blocked(0));
}

#[test]
fn machines_on_two_threads_come_and_go_without_each_other() {
    let host = host();
    let cores = [host.vfio_dma("dma0", &[0xe80]), host.vfio_dma("dma1", &[0xe83])];
    let before = host.memory.outstanding();
    std::thread::scope(|scope| {
        for (name, core) in ["dma0", "dma1"].into_iter().zip(&cores) {
            let host = &host;
            scope.spawn(move || {
                for round in 0..30u64 {
                    let vm = host.vm(name, MIB);
                    let assignment = host.passthrough.assign(name, vm.clone(), options()).unwrap();
                    let memory = vm.guest_memory();
                    let at = memory.alloc(4096, 4096).unwrap().pa;
                    assert_eq!(memory.load64(at), 0);
                    memory.store64(at, round + 1);
                    core.start();
                    assignment.interrupt(assignment.devices()[0].device().interrupts[0].line);
                    for line in vm.lines().take() {
                        vm.lines().end(line);
                    }
                    assert_eq!(memory.load64(at), round + 1);
                    vm.kill();
                    host.passthrough.release(&assignment).unwrap();
                    assert!(core.is_stopped());
                }
            });
        }
    });
    assert!(host.passthrough.assignments().is_empty());
    assert_eq!((host.memory.outstanding(), host.memory.bad_frees()), (before, 0));
}
