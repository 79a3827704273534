//! Over the SMMUv2 driver, with a register window that counts what is invalidated.

use portcullis_drivers::ops::{DomainOptions, DomainSpec, IommuOps, Paging};
use portcullis_drivers::smmuv2::{Options, SmmuV2};
use portcullis_hal::fake::{FakeClock, FakeMmio};

use super::*;

use Direction::ToDevice;

const TLBIASID: usize = 0x610;
const TLBIVAL: usize = 0x620;

struct Smmu {
    mmio: Arc<FakeMmio>,
    memory: Arc<FakeMemory>,
    device: DmaDevice<Arc<FakeMemory>>,
}

fn smmu(mode: Mode) -> Smmu {
    let mmio = Arc::new(FakeMmio::with_handler(|registers, access| {
        let status = access.offset == 0x48 && !access.write;
        status.then(|| u64::from(registers.get32(access.offset)) & !access.value)
    }));
    for (offset, value) in
        [(0x00, 0x0020_0001), (0x20, 0x7c01_3e30), (0x24, 0x3000_0010), (0x28, 0x5555), (0x3c, 0x21)]
    {
        mmio.set32(offset, value);
    }
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 8 << 20));
    let options = Options { tlb_timeout_us: 100, ..Options::new(0x2_0000, "arm,mmu-500") };
    let smmu = SmmuV2::probe(mmio.clone(), memory.clone(), Arc::new(FakeClock::new()), options).unwrap();
    let ops = smmu.alloc_domain(DomainSpec::Stage1(Paging::default()), DomainOptions::default()).unwrap();
    let domain = Domain::new(ops, InstanceId(0));
    let space = DmaSpace::new(domain, SpaceConfig { mode, ..SpaceConfig::default() }).unwrap();
    let device = DmaDevice::translated("a0000000.dma", space, memory.clone(), DeviceConfig::default());
    mmio.take_log();
    Smmu { mmio, memory, device }
}

impl Smmu {
    /// How often a register of a context bank was written since the last time.
    fn writes(&self, register: usize) -> usize {
        let log = self.mmio.take_log();
        let to_it = |access: &&portcullis_hal::fake::MmioAccess| {
            access.write && access.offset >= 0x1_0000 && access.offset & 0xfff == register
        };
        log.iter().filter(to_it).count()
    }
}

#[test]
fn strict_unmaps_invalidate_by_address() {
    let rig = smmu(Mode::Strict);
    let pa = rig.memory.alloc(PAGE as usize, PAGE as usize).unwrap().pa;
    let iova = rig.device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.device.space().unwrap().domain().iova_to_phys(iova), Some(pa));
    assert_eq!(rig.mmio.take_log().len(), 0, "mapping touches no register");
    rig.device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
    assert_eq!(rig.writes(TLBIVAL), 1);
}

#[test]
fn lazy_unmaps_touch_no_register_until_the_flush() {
    let rig = smmu(Mode::Lazy);
    let pa = rig.memory.alloc(PAGE as usize, PAGE as usize).unwrap().pa;
    for _ in 0..100 {
        let iova = rig.device.map_single(pa, PAGE, ToDevice, NONE).unwrap();
        rig.device.unmap_single(iova, PAGE, ToDevice, NONE).unwrap();
        assert_eq!(rig.device.space().unwrap().domain().iova_to_phys(iova), None);
    }
    assert_eq!(rig.mmio.take_log().len(), 0);
    rig.device.space().unwrap().flush().unwrap();
    assert_eq!(rig.writes(TLBIASID), 1);
}

#[test]
fn a_whole_table_goes_at_once_even_lazily() {
    let rig = smmu(Mode::Lazy);
    // 4 KiB pages that fill a table: scattered, so that there is no block.
    let half: Vec<_> =
        (0..512).map(|_| rig.memory.alloc(2 * PAGE as usize, PAGE as usize).unwrap().pa).collect();
    let entries: Vec<_> = half.iter().map(|pa| SgEntry { pa: *pa, len: PAGE }).collect();
    let sg = rig.device.map_sg(&entries, ToDevice, NONE).unwrap();
    let tables = rig.memory.outstanding();
    rig.mmio.take_log();
    rig.device.unmap_sg(sg, ToDevice, NONE).unwrap();
    assert_eq!(rig.memory.outstanding(), tables - 1, "the table is freed");
    assert!(rig.writes(TLBIASID) > 0, "so nothing may walk it any more");
}
