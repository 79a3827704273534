//! Goal 11: the software page tables.

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_board::sim::{Memory, Pool};
use portcullis_bus::SystemMemory;
use portcullis_pgtable::{Config, Granule, NoFlush, PageTable, Prot, Stage1};

use super::timing::in_rmw;
use super::{Figure, Goal};

/// Map and unmap 1, 16 and 512 pages of 4 KiB at once, without invalidation (lazy).
pub fn map_unmap() -> Vec<Figure> {
    let memory = SystemMemory::new(&[(0, 1 << 24)]).expect("valid region");
    let memory = Memory::new(memory, Arc::new(Pool::new(Pa(0), 24)));
    let table = PageTable::<Stage1, _>::new(memory, Config::new(Granule::K4, 48, 48)).expect("48 bits, 4K");
    // A neighbour keeps the last-level table alive, as in a domain in use.
    table.map(Iova(0x1_0000_0000), Pa(0x1000), 4096, Prot::RW).expect("free page");
    [(1u64, 4.2), (16, 8.2), (512, 100.0)]
        .into_iter()
        .map(|(pages, goal)| {
            let len = pages << 12;
            // 512 pages at once are no block: the physical address is off by a page.
            let (iova, pa) = (Iova(0x1_0020_0000), Pa(0x40_0000_1000));
            let n = (1 << 16) / pages;
            let (ns, ratio) = in_rmw(n, || {
                for _ in 0..n {
                    table.map(iova, pa, len, Prot::RW).expect("free");
                    table.unmap(iova, len, &mut NoFlush).expect("mapped");
                }
            });
            Figure {
                goal_number: 11,
                what: format!("map+unmap {pages} x 4K at once (lazy)"),
                figure: ns,
                figure_unit: "ns",
                ratio,
                ratio_unit: "RMW",
                goal: Goal::AtMost(goal),
            }
        })
        .collect()
}
