//! A table remembers where its tables above the last level are, and forgets it before they are freed.

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_hal::fake::FakeMemory;
use portcullis_pgtable::{Config, Granule, NoFlush, PageTable, Prot, Stage1};

#[test]
fn a_page_can_be_mapped_again_after_all_tables_around_it_were_freed() {
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        for (bits, coherent) in [(39, true), (48, true), (48, false)] {
            let memory = Arc::new(FakeMemory::plain(0x8000_0000, 16 << 20));
            let config = Config::new(granule, bits, 40).coherent_walk(coherent);
            let mut table = PageTable::<Stage1, _>::new(memory.clone(), config).unwrap();
            let size = granule.size();
            // What a table above the last level translates, or less where there are fewer levels.
            let span = (size * (size / 8) * (size / 8)).min(1 << (bits - 1));
            for round in 0..4u64 {
                let (iova, pa) = (Iova(span + round * size), Pa(0x4000_0000 + round * size));
                table.map(iova, pa, size, Prot::RW).unwrap();
                table.unmap(iova, size, &mut NoFlush).unwrap();
                table.map(iova, pa, size, Prot::RW).unwrap();
                assert_eq!(table.lookup(iova).unwrap().pa, pa);
                if round % 2 == 0 {
                    assert_eq!(table.unmap(Iova(span), span, &mut NoFlush), Ok(size));
                } else {
                    table.unmap(iova, size, &mut NoFlush).unwrap();
                    assert!(table.free_empty_tables(&mut NoFlush) > 0);
                }
                // Whoever gets the memory of the tables that are gone writes something into it.
                let reused: Vec<_> = (0..3)
                    .filter_map(|_| {
                        let block = portcullis_hal::DmaMemory::alloc(&memory, size as usize, size as usize)?;
                        portcullis_hal::DmaMemory::write(&memory, block.pa, &vec![0xff; size as usize]);
                        Some(block)
                    })
                    .collect();
                assert_eq!(table.lookup(iova).map(|m| m.pa), None);
                for block in reused {
                    portcullis_hal::DmaMemory::free(&memory, block);
                }
            }
            drop(table);
            memory.assert_clean();
        }
    }
}
