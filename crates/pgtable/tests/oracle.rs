//! The same mappings built by the `aarch64-paging` crate: both tables, walked by one walker, have the same leaves.

mod common;

use aarch64_paging::Mapping;
use aarch64_paging::descriptor::{El1Attributes as S1, PhysicalAddress, Stage2Attributes as S2};
use aarch64_paging::paging::{Constraints, El1And0, MemoryRegion, Stage2 as Stage2Regime, VaRange};
use aarch64_paging::target::TargetAllocator;
use common::{Leaf, Walker, plain};
use portcullis_arch::{Iova, Ipa, Pa};
use portcullis_hal::DmaMemory;
use portcullis_pgtable::{Concatenation, Config, Granule, PageTable, Prot, Stage1, Stage2};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Where the other crate believes its tables to be.
const THEIRS: u64 = 0x1_0000_0000;

/// iova, pa, len
const RANGES: [(u64, u64, u64); 7] = [
    (0x7000_0000, 0x6000_0000, 0x1000),
    (0x7000_2000, 0x6000_2000, 0x1000),
    (0x4000_0000, 0x8000_0000, GIB / 2),
    (0x1_0020_0000, 0x2_0040_0000, 3 * MIB),
    (0x2_0000_0000, 0x4_0000_0000, 2 * GIB + 5 * MIB),
    (0x3_0001_0000, 0x5_0000_3000, 4 * MIB),
    (0x7f_ffff_f000, 0xfff_ffff_f000, 0x1000),
];

fn word(image: &[u8], pa: u64) -> u64 {
    let at = (pa - THEIRS) as usize;
    u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
}

/// Compares the leaves of all ranges, one by one, and the holes at their ends.
fn compare(ours: impl Fn(u64) -> Option<Leaf>, theirs: impl Fn(u64) -> Option<Leaf>) {
    for (iova, pa, len) in RANGES {
        let mut at = iova;
        while at < iova + len {
            let leaf = ours(at).unwrap();
            assert_eq!(Some(leaf), theirs(at), "at {at:#x}");
            assert_eq!(leaf.pa, pa + (at - iova));
            at += leaf.size;
        }
        assert_eq!(at, iova + len);
        assert_eq!(ours(iova - 1), theirs(iova - 1));
        assert_eq!(ours(iova + len), theirs(iova + len));
    }
}

#[test]
fn stage_1_leaves_equal_those_of_aarch64_paging() {
    let common = S1::VALID | S1::ACCESSED | S1::NON_GLOBAL;
    let user = common | S1::USER;
    let cached = user | S1::ATTRIBUTE_INDEX_1 | S1::INNER_SHAREABLE;
    let cases: [(Prot<Stage1>, S1); 6] = [
        (Prot::RW.cached(), cached),
        (Prot::READ.cached(), cached | S1::READ_ONLY),
        (Prot::RW.cached().noexec(), cached | S1::UXN | S1::PXN),
        (Prot::RW, user | S1::ATTRIBUTE_INDEX_0 | S1::OUTER_SHAREABLE),
        (Prot::RW.device(), user | S1::ATTRIBUTE_INDEX_2 | S1::OUTER_SHAREABLE),
        (Prot::RW.privileged(), common | S1::ATTRIBUTE_INDEX_0 | S1::OUTER_SHAREABLE),
    ];
    for (bits, level) in [(48, 0), (39, 1)] {
        for (prot, flags) in cases {
            let memory = plain(4 << 20);
            let table = PageTable::new(memory.clone(), Config::<Stage1>::new(Granule::K4, bits, 44)).unwrap();
            let allocator = TargetAllocator::new(THEIRS);
            let mut other = Mapping::with_asid_and_va_range(allocator, 0, level, El1And0, VaRange::Lower);
            for (iova, pa, len) in RANGES {
                table.map(Iova(iova), Pa(pa), len, prot).unwrap();
                let region = MemoryRegion::new(iova as usize, (iova + len) as usize);
                let pa = PhysicalAddress(pa as usize);
                other.map_range(&region, pa, flags, Constraints::NO_CONTIGUOUS_HINT).unwrap();
            }
            let image = other.translation().as_bytes();
            let registers = table.registers();
            let walker = Walker::stage1(&registers);
            let root = Pa(other.root_address().0 as u64);
            let their_walker =
                Walker::stage1(&portcullis_pgtable::Stage1Registers { ttbr: root, ..registers });
            compare(
                |iova| walker.walk(iova, |pa| memory.load64(Pa(pa))),
                |iova| their_walker.walk(iova, |pa| word(&image, pa)),
            );
        }
    }
}

#[test]
fn stage_2_leaves_equal_those_of_aarch64_paging() {
    let common = S2::VALID | S2::ACCESS_FLAG;
    let wb = S2::MEMATTR_NORMAL_INNER_WB | S2::MEMATTR_NORMAL_OUTER_WB | S2::SH_INNER;
    let nc = S2::MEMATTR_NORMAL_INNER_NC | S2::MEMATTR_NORMAL_OUTER_NC | S2::SH_OUTER;
    let cases: [(Prot<Stage2>, S2); 5] = [
        (Prot::RW.cached(), common | wb | S2::S2AP_ACCESS_RW),
        (Prot::READ.cached(), common | wb | S2::S2AP_ACCESS_RO),
        (Prot::WRITE.cached(), common | wb | S2::S2AP_ACCESS_WO),
        (Prot::RW.noexec(), common | nc | S2::S2AP_ACCESS_RW | S2::XN),
        (Prot::RW.device(), common | S2::MEMATTR_DEVICE_nGnRE | S2::SH_OUTER | S2::S2AP_ACCESS_RW),
    ];
    for (prot, flags) in cases {
        let memory = plain(4 << 20);
        let config = Config::<Stage2>::new(Granule::K4, 39, 44).concatenation(Concatenation::Never);
        let table = PageTable::new(memory.clone(), config).unwrap();
        let mut other = Mapping::new(TargetAllocator::new(THEIRS), 1, Stage2Regime);
        for (ipa, pa, len) in RANGES {
            table.map(Ipa(ipa), Pa(pa), len, prot).unwrap();
            let region = MemoryRegion::new(ipa as usize, (ipa + len) as usize);
            let pa = PhysicalAddress(pa as usize);
            other.map_range(&region, pa, flags, Constraints::NO_CONTIGUOUS_HINT).unwrap();
        }
        let image = other.translation().as_bytes();
        let registers = table.registers();
        let walker = Walker::stage2(&registers);
        let vttbr = Pa(other.root_address().0 as u64);
        let their_walker = Walker::stage2(&portcullis_pgtable::Stage2Registers { vttbr, ..registers });
        compare(
            |ipa| walker.walk(ipa, |pa| memory.load64(Pa(pa))),
            |ipa| their_walker.walk(ipa, |pa| word(&image, pa)),
        );
    }
}
