//! Guest memory of `vm-memory` as the SMMU's, and a port as its `Iommu`.
#![cfg(feature = "vm-memory")]

use std::sync::Arc;

use portcullis_arch::{Attributes, Pa, StreamId};
use portcullis_bus::{BusError, Initiator, Memory, Mmio};
use portcullis_smmuv3::vmm::{GuestRam, PortIommu};
use portcullis_smmuv3::{Caps, SmmuV3};
use vm_memory::iommu::{Iommu, IommuMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

const RAM: u64 = 0x4000_0000;
const A: Attributes = Attributes::DEVICE_DEFAULT;

fn ram() -> Arc<GuestMemoryMmap> {
    // Two regions with a hole between them, and one that adjoins the second.
    let ranges = [
        (GuestAddress(RAM), 0x10_0000),
        (GuestAddress(RAM + 0x20_0000), 0x1000),
        (GuestAddress(RAM + 0x20_1000), 0x1000),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

#[test]
fn guest_memory_is_read_and_written_all_or_nothing() {
    let m = GuestRam::new(ram());
    m.write(Pa(RAM + 0x20_0ffe), A, &[1, 2, 3, 4]).unwrap();
    let mut b = [0; 4];
    m.read(Pa(RAM + 0x20_0ffe), A, &mut b).unwrap();
    assert_eq!(b, [1, 2, 3, 4], "across adjoining regions");
    assert_eq!(m.write(Pa(RAM + 0xf_fffe), A, &[9; 4]), Err(BusError::Decode));
    m.read(Pa(RAM + 0xf_fffc), A, &mut b).unwrap();
    assert_eq!(b, [0; 4], "nothing was written");
    for pa in [0, RAM - 1, RAM + 0x10_0000, u64::MAX, u64::MAX - 3] {
        assert_eq!(m.read(Pa(pa), A, &mut b), Err(BusError::Decode), "{pa:#x}");
    }
}

#[test]
fn words_are_little_endian_aligned_and_atomic() {
    let m = GuestRam::new(ram());
    m.write(Pa(RAM), A, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    assert_eq!(m.load64(Pa(RAM), A), Ok(0x0807_0605_0403_0201));
    assert_eq!(m.load32(Pa(RAM + 4), A), Ok(0x0807_0605));
    assert_eq!(m.cas64(Pa(RAM), A, 1, 2), Ok(0x0807_0605_0403_0201));
    assert_eq!(m.cas64(Pa(RAM), A, 0x0807_0605_0403_0201, 0x55), Ok(0x0807_0605_0403_0201));
    assert_eq!(m.load64(Pa(RAM), A), Ok(0x55));
    assert_eq!(m.load64(Pa(RAM + 4), A), Err(BusError::Slave));
    assert_eq!(m.load32(Pa(RAM + 2), A), Err(BusError::Slave));
    assert_eq!(m.cas64(Pa(RAM + 1), A, 0, 0), Err(BusError::Slave));
    assert_eq!(m.load64(Pa(0), A), Err(BusError::Decode));
    assert_eq!(m.cas64(Pa(0), A, 0, 0), Err(BusError::Decode));
}

/// Stream 1: IOVA 0x1000 to RAM + 0x8000 and 0x2000 to RAM + 0xc000 (read-only), behind each other in IOVA space.
fn machine() -> (Arc<GuestMemoryMmap>, PortIommu<GuestRam<GuestMemoryMmap>>, u64) {
    let mem = ram();
    let put = |at: u64, words: &[u64]| {
        for (n, w) in words.iter().enumerate() {
            mem.write_obj(*w, GuestAddress(at + 8 * n as u64)).unwrap();
        }
    };
    let table = RAM + 0x1_0000;
    put(RAM + 64, &[1 | 5 << 1 | (RAM + 0x1000), 0xd4]);
    let dw0 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 4 << 32 | 1 << 41 | 3 << 45;
    put(RAM + 0x1000, &[dw0, table, 0, 0xff]);
    put(table, &[(table + 0x1000) | 3]);
    put(table + 0x1000, &[(table + 0x2000) | 3]);
    put(table + 0x2008, &[(RAM + 0x8000) | 0x743, (RAM + 0xc000) | 0x7c3]);
    let smmu = SmmuV3::builder(Caps::qemu_virt()).memory(GuestRam::new(mem.clone())).build().unwrap();
    let w = smmu.window(false);
    w.write64(0x80, RAM).unwrap();
    w.write32(0x88, 4).unwrap();
    w.write64(0x90, (RAM + 0x3000) | 4).unwrap();
    w.write64(0xa0, (RAM + 0x4000) | 4).unwrap();
    w.write32(0x20, 0xd).unwrap();
    let port = smmu.port(GuestRam::new(mem.clone()));
    (mem, PortIommu::new(port, Initiator::new(StreamId(1))), table)
}

#[test]
fn a_port_translates_for_iommu_memory() {
    let (mem, iommu, _) = machine();
    let behind = IommuMemory::new((*mem).clone(), iommu, true, ());
    mem.write_slice(b"abcd", GuestAddress(RAM + 0x8ffe)).unwrap();
    mem.write_slice(b"efgh", GuestAddress(RAM + 0xc000)).unwrap();
    let mut b = [0; 6];
    behind.read_slice(&mut b, GuestAddress(0x1ffe)).unwrap();
    assert_eq!(&b, b"abefgh");
    behind.write_slice(b"xy", GuestAddress(0x1100)).unwrap();
    mem.read_slice(&mut b[..2], GuestAddress(RAM + 0x8100)).unwrap();
    assert_eq!(&b[..2], b"xy");
    assert!(behind.write_slice(b"xy", GuestAddress(0x2000)).is_err(), "read-only");
    assert!(behind.read_slice(&mut b, GuestAddress(0x2ffe)).is_err(), "the end is not mapped");
    assert!(behind.read_slice(&mut b, GuestAddress(u64::MAX - 2)).is_err());
    assert!(behind.check_range(GuestAddress(0x1000), 0x2000, Permissions::Read));
    assert!(!behind.check_range(GuestAddress(0x1000), 0x2000, Permissions::ReadWrite));
    assert!(behind.check_range(GuestAddress(0x1000), 0, Permissions::Read));
}

#[test]
fn an_invalidation_is_seen_at_once() {
    let (mem, iommu, table) = machine();
    let first = |i: &PortIommu<_>| {
        i.translate(GuestAddress(0x1000), 16, Permissions::Read).map(|mut t| t.next().unwrap().base.0)
    };
    assert_eq!(first(&iommu).unwrap(), RAM + 0x8000);
    mem.write_obj((RAM + 0x9000) | 0x743u64, GuestAddress(table + 0x2008)).unwrap();
    assert_eq!(first(&iommu).unwrap(), RAM + 0x8000, "the port may still hold it");
    mem.write_obj(0x30u64, GuestAddress(RAM + 0x3000)).unwrap();
    mem.write_obj(0x46u64, GuestAddress(RAM + 0x3010)).unwrap();
    iommu.smmu().mmio_write(0x98, &2u32.to_le_bytes()).unwrap();
    assert_eq!(first(&iommu).unwrap(), RAM + 0x9000);
}
