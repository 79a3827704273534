//! The cases of Linux's io-pgtable self-test: three page-size sets, all pairs of input and output sizes, both stages.

mod common;

use common::{Walker, plain};
use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;
use portcullis_pgtable::{
    Config, Granule, InputAddress, MapError, NoFlush, PageTable, Prot, Stage, Stage1, Stage2, UnmapError,
};

const GIB: u64 = 1 << 30;
const ADDRESS_BITS: [u8; 6] = [32, 36, 40, 42, 44, 48];
const SETS: [(Granule, &[u64]); 3] = [
    (Granule::K4, &[0x1000, 0x20_0000, 0x4000_0000]),
    (Granule::K16, &[0x4000, 0x200_0000]),
    (Granule::K64, &[0x1_0000, 0x2000_0000]),
];

fn run<S: Stage, M: DmaMemory>(table: &PageTable<S, M>, sizes: &[u64], ias: u8, walker: &Walker) {
    let pa_of = |iova: u64| table.lookup(iova.into()).map(|mapping| mapping.pa.get());
    let walked = |iova: u64| walker.walk(iova, |pa| table.memory().load64(Pa(pa))).map(|leaf| leaf.pa);
    let map = |iova: u64, pa: u64, size: u64| table.map(iova.into(), Pa(pa), size, Prot::RW.cached());
    let unmap = |iova: u64, size: u64| table.unmap(iova.into(), size, &mut NoFlush);
    let both = |iova: u64, expected: Option<u64>| {
        assert_eq!(pa_of(iova), expected);
        assert_eq!(walked(iova), expected);
    };
    assert_eq!(table.page_sizes(), sizes.iter().sum::<u64>());

    for empty in [42, GIB + 42, 2 * GIB + 42] {
        both(empty, None);
    }
    let places = || (0..).map(|i| i * GIB).zip(sizes.iter().copied());
    for (iova, size) in places() {
        map(iova, iova, size).unwrap();
        let already = Err(MapError::AlreadyMapped { iova });
        assert_eq!(map(iova, iova + size, size), already, "overlap");
        both(iova + 42, Some(iova + 42));
        assert_eq!(table.lookup(iova.into()).unwrap().page_size, size);
    }
    // Linux up to 6.12 splits a block here; later kernels and this crate do not.
    let page = sizes[0];
    let partial = UnmapError::PartialBlock { block: GIB, size: sizes[1] };
    assert_eq!(unmap(GIB + page, page), Err(partial));
    both(GIB + page + 42, Some(GIB + page + 42));
    for (iova, size) in places() {
        assert_eq!(unmap(iova, size), Ok(size));
        both(iova + 42, None);
        map(iova, iova, size).unwrap();
        both(iova + 42, Some(iova + 42));
        assert_eq!(unmap(iova, size), Ok(size));
    }
    let size = sizes[sizes.len() - 1];
    let iova = (1 << ias) - size;
    map(iova, iova, size).unwrap();
    both(iova + 42, Some(iova + 42));
    both(iova + size - 1, Some(iova + size - 1));
    assert_eq!(unmap(iova, size), Ok(size));
    both(iova + 42, None);
    assert!(S::Input::from(0).get() == 0);
}

#[test]
fn every_page_size_maps_and_unmaps_for_all_formats_and_sizes() {
    let mut runs = 0;
    for (granule, sizes) in SETS {
        for ias in ADDRESS_BITS {
            for oas in ADDRESS_BITS.into_iter().filter(|&oas| oas >= ias) {
                let memory = plain(2 << 20);
                let table = PageTable::new(memory.clone(), Config::<Stage1>::new(granule, ias, oas)).unwrap();
                run(&table, sizes, ias, &Walker::stage1(&table.registers()));
                drop(table);
                let table = PageTable::new(memory.clone(), Config::<Stage2>::new(granule, ias, oas)).unwrap();
                run(&table, sizes, ias, &Walker::stage2(&table.registers()));
                drop(table);
                memory.assert_clean();
                runs += 2;
            }
        }
    }
    assert_eq!(runs, 126);
}
