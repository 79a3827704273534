//! A complete minimal SMMUv3 device of a virtual machine monitor: the MMIO trap handler in, translated DMA out, messages
//! out, guest memory from `vm-memory`.
//!
//! `cargo run -p portcullis-smmuv3 --features vm-memory --example vmm_device`
//!
//! The part of the guest is played by `guest_driver`, which only writes guest memory and traps, as an operating system
//! would.

use std::error::Error;
use std::sync::{Arc, Mutex};

use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_bus::{DmaPort, Initiator, InterruptSink};
use portcullis_smmuv3::vmm::{GuestRam, PortIommu};
use portcullis_smmuv3::{Caps, Interrupts, SmmuV3, State};
use vm_memory::iommu::IommuMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Ram = GuestRam<GuestMemoryMmap>;
type Anything = Box<dyn Error>;

const SMMU_BASE: u64 = 0x0905_0000;
const SMMU_SIZE: u64 = 0x2_0000;
const GITS_TRANSLATER: u64 = 0x0809_0040;
const RAM_BASE: u64 = 0x4000_0000;

/// The interrupt controller: here it only notes what arrives. A VMM injects it (KVM_SIGNAL_MSI, an irqfd).
#[derive(Default)]
struct Gic(Mutex<Vec<String>>);

impl InterruptSink for Gic {
    fn set_level(&self, line: u32, high: bool) {
        if high {
            self.0.lock().unwrap().push(format!("pulse on SPI {line}"));
        }
    }
    fn message(&self, address: Pa, data: u32) {
        self.0.lock().unwrap().push(format!("message {data} to {address}"));
    }
}

struct Vmm {
    ram: Arc<GuestMemoryMmap>,
    smmu: Arc<SmmuV3<Ram>>,
    gic: Arc<Gic>,
}

impl Vmm {
    fn new() -> Result<Self, Anything> {
        let ram = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(RAM_BASE), 16 << 20)])?);
        let gic = Arc::new(Gic::default());
        let caps = Caps { msi: true, ..Caps::qemu_virt() };
        let interrupts =
            Interrupts::separate(&(gic.clone() as _), [106, 107, 108, 109]).with_messages(gic.clone());
        let smmu = SmmuV3::builder(caps)
            .memory(GuestRam::new(ram.clone()))
            .interrupts(interrupts)
            .msi_doorbell(GITS_TRANSLATER..GITS_TRANSLATER + 4)
            .build()?;
        Ok(Self { ram, smmu, gic })
    }

    /// KVM_EXIT_MMIO: any address, size and bytes that the guest chooses.
    fn mmio_exit(&self, address: u64, data: &mut [u8], is_write: bool) {
        let Some(offset) = address.checked_sub(SMMU_BASE).filter(|o| *o < SMMU_SIZE) else { return };
        // Outside of the window is all that can go wrong, and that was checked.
        let _ = if is_write { self.smmu.mmio_write(offset, data) } else { self.smmu.mmio_read(offset, data) };
    }

    fn save(&self) -> State {
        self.smmu.save()
    }
}

/// What a guest's driver does to the registers and to its memory.
fn guest_driver(vmm: &Vmm) -> Result<(), Anything> {
    const STRTAB: u64 = RAM_BASE;
    const CD: u64 = RAM_BASE + 0x1000;
    const CMDQ: u64 = RAM_BASE + 0x2000;
    const EVENTQ: u64 = RAM_BASE + 0x3000;
    const TABLE: u64 = RAM_BASE + 0x4000;
    let w32 = |offset: u64, v: u32| vmm.mmio_exit(SMMU_BASE + offset, &mut v.to_le_bytes(), true);
    let w64 = |offset: u64, v: u64| vmm.mmio_exit(SMMU_BASE + offset, &mut v.to_le_bytes(), true);
    let r32 = |offset: u64| {
        let mut b = [0; 4];
        vmm.mmio_exit(SMMU_BASE + offset, &mut b, false);
        u32::from_le_bytes(b)
    };
    let put = |at: u64, words: &[u64]| -> Result<(), Anything> {
        for (n, w) in words.iter().enumerate() {
            vmm.ram.write_obj(w.to_le(), GuestAddress(at + 8 * n as u64))?;
        }
        Ok(())
    };
    println!("guest: IDR0 = {:#010x}, IDR5 = {:#010x}", r32(0), r32(0x14));
    // Stream 3: stage 1, one CD. The CD: 39-bit addresses (T0SZ 25), 4 KiB, R and A set, ASID 1.
    put(STRTAB + 3 * 64, &[1 | 5 << 1 | CD, 0xd4])?;
    let tcr = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 4 << 32;
    put(CD, &[tcr | 1 << 41 | 3 << 45 | 1 << 48, TABLE, 0, 0xff])?;
    // IOVA 0x10000 to the guest page 0x40800000, three levels.
    put(TABLE, &[(TABLE + 0x1000) | 3])?;
    put(TABLE + 0x1000, &[(TABLE + 0x2000) | 3])?;
    put(TABLE + 0x2000 + 8 * 0x10, &[0x4080_0000 | 0xf43])?;
    // Registers, in Linux's order.
    w32(0x28, 0xd75);
    w32(0x2c, 0x2);
    w64(0x80, STRTAB | 1 << 62);
    w32(0x88, 4);
    w64(0x90, CMDQ | 6 | 1 << 62);
    w32(0x20, 8);
    put(CMDQ, &[0x04, 31, 0x30, 0, 0x46, 0])?; // CFGI_ALL, TLBI_NSNH_ALL, SYNC
    w32(0x98, 3);
    println!("guest: commands consumed up to {}", r32(0x9c));
    w64(0xa0, EVENTQ | 5 | 1 << 62);
    w64(0xb0, GITS_TRANSLATER);
    w32(0xb8, 77);
    w32(0x50, 4);
    w32(0x20, 0xd);
    println!("guest: CR0ACK = {:#x}", r32(0x24));
    Ok(())
}

fn main() -> Result<(), Anything> {
    let vmm = Vmm::new()?;
    guest_driver(&vmm)?;

    // A device model of the VMM holds a port and does DMA.
    let device = Initiator::new(StreamId(3));
    let mut port = vmm.smmu.port(GuestRam::new(vmm.ram.clone()));
    port.write(device, Iova(0x1_0010), b"hello, guest")?;
    let mut seen = [0; 12];
    vmm.ram.read_slice(&mut seen, GuestAddress(0x4080_0010))?;
    println!(
        "device: wrote to IOVA 0x10010; guest memory at 0x40800010 now holds {:?}",
        str::from_utf8(&seen)?
    );

    // One page further nothing is mapped: an event in the guest's queue, and its message.
    let refused = port.write(device, Iova(0x1_1000), b"out of bounds");
    println!("device: IOVA 0x11000: {}", refused.err().map_or("written".into(), |e| e.to_string()));
    let event: u64 = vmm.ram.read_obj(GuestAddress(RAM_BASE + 0x3000))?;
    println!("guest: event {:#04x} of stream {}", event & 0xff, event >> 32);
    println!("interrupt controller: {:?}", vmm.gic.0.lock().unwrap());

    // The same for device models written against vm-memory's GuestMemory.
    let iommu = PortIommu::new(vmm.smmu.port(GuestRam::new(vmm.ram.clone())), device);
    let behind = IommuMemory::new((*vmm.ram).clone(), iommu, true, ());
    let word: u32 = behind.read_obj(GuestAddress(0x1_0010))?;
    println!("virtio: reads {word:#x} at IOVA 0x10010");

    // Migration: the state is one serialisable value.
    let state = vmm.save();
    vmm.smmu.restore(state)?;
    port.read(device, Iova(0x1_0010), &mut seen)?;
    println!("after restore the device reads {:?}", str::from_utf8(&seen)?);
    Ok(())
}
