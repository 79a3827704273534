//! Cores that change hands, looked at from the side of whoever had them before.

mod axidma_rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axidma_rig::{KIB, NONE, PAGE, Rig, segment};
use portcullis_arch::Iova;
use portcullis_board::guest::{Guest, new_vm};
use portcullis_board::os::host::AXI_DRIVER;
use portcullis_drivers::dmaengine::Registry;
use portcullis_hal::{DmaMemory as _, Mmio as _};
use portcullis_iommu::dma::{DeviceConfig, Direction as Way, DmaDevice};
use portcullis_vfio::{AssignOptions, Assignment, VFIO_DRIVER};

const GUEST_BYTES: u64 = 16 << 20;

fn give(rig: &Rig, core: &str) -> (Guest, Arc<Assignment>) {
    let registry = rig.system.os().registry();
    registry.unbind(core).unwrap();
    registry.bind(core, VFIO_DRIVER).unwrap();
    let vm = new_vm(&rig.system, "A", GUEST_BYTES, 7).unwrap();
    let assignment =
        rig.system.os().passthrough().assign(core, vm.clone(), AssignOptions::default()).unwrap();
    (Guest::boot(&rig.system, &vm, std::slice::from_ref(&assignment)).unwrap(), assignment)
}

#[test]
fn a_driver_that_lost_its_core_cannot_start_it_in_somebody_else_s_machine() {
    let rig = Rig::new();
    // Kept by a client that does not know.
    let kept = rig.core(0);
    let (guest, _assignment) = give(&rig, "axidma0");
    let registers = guest.vm().bus().window(portcullis_arch::Ipa(guest.cores()[0].base), 0x1000).unwrap();
    let before: Vec<u32> = (0..0x60).step_by(4).map(|at| registers.read32(at)).collect();
    // Any address of the guest's: what is aimed there would hit its memory.
    let at = guest.vm().guest_memory().range().0.get();
    let begun = kept.begin(&[segment(Iova(at), KIB)], &[segment(Iova(at + PAGE), KIB)]);
    if let Ok(running) = begun {
        assert!(running.wait(&rig.clock(), 100).is_err());
    }
    let after: Vec<u32> = (0..0x60).step_by(4).map(|at| registers.read32(at)).collect();
    assert_eq!(before, after, "its registers are the guest's");
    rig.no_faults();
}

#[test]
fn a_driver_that_goes_takes_only_its_own_handlers_with_it() {
    let rig = Rig::new();
    let os = rig.system.os();
    let line = os.registry().device("axidma0").unwrap().interrupts[0].line;
    let heard = Arc::new(AtomicUsize::new(0));
    let counter = heard.clone();
    // Another device on the same line.
    os.host().interrupts.add(
        line,
        Arc::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            false
        }),
    );
    os.registry().unbind("axidma0").unwrap();
    os.registry().bind("axidma0", AXI_DRIVER).unwrap();
    rig.loops(0, 64 * KIB);
    assert!(heard.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_probe_that_fails_leaves_nothing_behind() {
    let rig = Rig::new();
    let os = rig.system.os();
    let path = os.host().axi_node("axidma0").unwrap().node.path.clone();
    os.registry().unbind("axidma0").unwrap();
    let free = rig.memory().pool().outstanding();
    // Somebody else has entered a channel under the core's name.
    let other = rig.core(1).numbered(1).unwrap();
    os.host().channels.register(&path, 1, other).unwrap();
    assert!(os.registry().bind("axidma0", AXI_DRIVER).is_err());
    let left = |channels: &Registry| channels.channels().iter().filter(|(p, ..)| *p == path).count();
    assert_eq!(left(&os.host().channels), 1, "only the other's");
    assert_eq!(rig.memory().pool().outstanding(), free);
    os.host().channels.unregister(&path).unwrap();
    os.registry().bind("axidma0", AXI_DRIVER).unwrap();
    rig.loops(0, 64 * KIB);
}

#[test]
fn a_buffer_that_the_host_freed_while_a_machine_had_the_core_is_not_reachable_afterwards() {
    let rig = Rig::new();
    let info = rig.system.core().device(rig.system.device("axidma0").unwrap()).unwrap();
    let host = rig.system.os().host();
    let space = host.space(info.id).unwrap().unwrap();
    assert!(Arc::ptr_eq(space.domain(), &info.domain));
    let client =
        DmaDevice::translated("client", space.clone(), rig.memory(), DeviceConfig::default().mask(64));
    let block = rig.memory().alloc(PAGE as usize, PAGE as usize).unwrap();
    let iova = client.map_single(block.pa, PAGE, Way::Bidirectional, NONE).unwrap();
    let (guest, assignment) = give(&rig, "axidma0");
    client.unmap_single(iova, PAGE, Way::Bidirectional, NONE).unwrap();
    assert_eq!(space.domain().iova_to_phys(iova), None);
    let same = host.space(info.id).unwrap().unwrap();
    assert!(Arc::ptr_eq(&same, &space), "not the machine's");
    rig.system.os().passthrough().release(&assignment).unwrap();
    drop(guest);
    let registry = rig.system.os().registry();
    registry.unbind("axidma0").unwrap();
    registry.bind("axidma0", AXI_DRIVER).unwrap();
    let to = rig.core(0).dma().map_single(block.pa, PAGE, Way::FromDevice, NONE).unwrap();
    let from = Iova(iova.get() - 0x100_0000);
    let running = rig.core(0).begin(&[segment(to, KIB)], &[segment(from, KIB)]);
    assert!(running.unwrap().wait(&rig.clock(), 1000).is_err(), "what was never mapped");
}
