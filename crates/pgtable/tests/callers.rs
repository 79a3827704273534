//! Allocation failures at every place, and callers at the same time on disjoint ranges.

mod common;

use std::thread;

use common::plain;
use portcullis_arch::{Iova, Pa};
use portcullis_pgtable::{Config, Granule, MapError, NoFlush, PageTable, Prot, Stage1};

const MIB: u64 = 1 << 20;

#[test]
fn a_map_that_runs_out_of_memory_leaves_nothing_behind() {
    // Pages, blocks and pages again, over several tables at several levels.
    let (iova, pa, len) = (0x7f_ffff_f000, 0x3f_ffff_f000, 7 * MIB);
    for n in 0.. {
        let memory = plain(1 << 20);
        let table = PageTable::new(memory.clone(), Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
        table.map(Iova(0), Pa(0), 0x1000, Prot::RW).unwrap();
        memory.fail_after(n);
        let result = table.map(Iova(iova), Pa(pa), len, Prot::RW);
        memory.fail_never();
        if result.is_ok() {
            assert_eq!(n, 5, "tables of level 1, 2 and 3 before, and level 2 and 3 behind the boundary");
            break;
        }
        assert!(matches!(result, Err(MapError::NoMemory { iova: at }) if at >= iova && at < iova + len));
        for at in (iova..iova + len).step_by(0x1000) {
            assert_eq!(table.lookup(Iova(at)), None, "failed at allocation {n}");
        }
        assert_eq!(table.lookup(Iova(0)).unwrap().pa, Pa(0));
        assert_eq!(memory.outstanding(), table.table_count());
        // The same call works once there is memory.
        table.map(Iova(iova), Pa(pa), len, Prot::RW).unwrap();
        assert_eq!(table.lookup(Iova(iova + len - 1)).unwrap().pa, Pa(pa + len - 1));
        drop(table);
        memory.assert_clean();
    }
}

#[test]
fn a_map_that_meets_a_mapping_leaves_nothing_behind() {
    for obstacle in [0x1000, 0x20_0000, 0x3f_f000, 0x60_0000, 0x7f_f000] {
        let memory = plain(1 << 20);
        let table = PageTable::new(memory, Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
        table.map(Iova(obstacle), Pa(0x5000), 0x1000, Prot::RW).unwrap();
        let result = table.map(Iova(0x1000), Pa(0x1000), 0x7f_f000, Prot::RW);
        assert_eq!(result, Err(MapError::AlreadyMapped { iova: obstacle }));
        let mapped = (0..0x80_0000).step_by(0x1000).filter(|&at| table.lookup(Iova(at)).is_some());
        assert_eq!(mapped.collect::<Vec<_>>(), [obstacle]);
    }
}

#[test]
fn threads_share_one_last_level_table() {
    let memory = plain(1 << 20);
    let table = PageTable::new(memory.clone(), Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
    thread::scope(|scope| {
        for me in 0..4 {
            let table = &table;
            scope.spawn(move || {
                for round in 0..300u64 {
                    for page in (me..512).step_by(4) {
                        let pa = (round << 32) + page * 0x1000;
                        table.map(Iova(page * 0x1000), Pa(pa), 0x1000, Prot::RW).unwrap();
                    }
                    for page in (me..512).step_by(4) {
                        let pa = (round << 32) + page * 0x1000;
                        assert_eq!(table.lookup(Iova(page * 0x1000)).unwrap().pa, Pa(pa));
                        assert_eq!(table.unmap(Iova(page * 0x1000), 0x1000, &mut NoFlush), Ok(0x1000));
                        assert_eq!(table.lookup(Iova(page * 0x1000)), None);
                    }
                }
            });
        }
    });
    assert_eq!(table.table_count(), 4);
    drop(table);
    memory.assert_clean();
}

#[test]
fn threads_make_and_free_tables_side_by_side() {
    let memory = plain(16 << 20);
    let table = PageTable::new(memory.clone(), Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
    thread::scope(|scope| {
        for me in 0..4 {
            let table = &table;
            scope.spawn(move || {
                for round in 0..400u64 {
                    // Every thread has its own 2M; all hang in the same tables, which the first one has to make.
                    let iova = ((round % 4) << 30) | (me * 2 * MIB);
                    let pa = iova + 0x1000 * (round % 3);
                    table.map(Iova(iova), Pa(pa), 2 * MIB, Prot::RW).unwrap();
                    assert_eq!(table.lookup(Iova(iova + 2 * MIB - 1)).unwrap().pa, Pa(pa + 2 * MIB - 1));
                    assert_eq!(table.unmap(Iova(iova), 2 * MIB, &mut NoFlush), Ok(2 * MIB));
                }
            });
        }
    });
    assert_eq!(table.table_count(), 6, "all last-level tables are gone");
    drop(table);
    memory.assert_clean();
}
