//! Mapping and unmapping 4K pages in a 48-bit stage 1 table, beside one uncontended `fetch_add`.
//!
//! `lazy` flushes nothing, as with a flush queue behind it.

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::{Block, DmaMemory};
use portcullis_pgtable::{Config, Granule, NoFlush, PageTable, Prot, Stage1};

const WORDS: usize = 4 << 20;

/// Memory from address 0 on, with a free list of 4K tables.
struct Arena {
    words: Vec<AtomicU64>,
    free: Mutex<Vec<u64>>,
}

impl Arena {
    fn new() -> Self {
        let tables = (0..WORDS as u64 / 512).rev().map(|table| table * 4096);
        Self { words: (0..WORDS).map(|_| AtomicU64::new(0)).collect(), free: Mutex::new(tables.collect()) }
    }

    #[inline]
    fn run(&self, pa: Pa, len: usize) -> &[AtomicU64] {
        let first = (pa.get() / 8) as usize;
        &self.words[first..first + len]
    }
}

impl DmaMemory for Arena {
    fn alloc(&self, len: usize, _align: usize) -> Option<Block> {
        let pa = Pa(self.free.lock().ok()?.pop()?);
        for word in self.run(pa, len / 8) {
            word.store(0, Ordering::Relaxed);
        }
        Some(Block { pa, len })
    }
    fn free(&self, block: Block) {
        if let Ok(mut free) = self.free.lock() {
            free.push(block.pa.get());
        }
    }
    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.words[(pa.get() / 8) as usize].load(Ordering::Acquire)
    }
    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        self.words[(pa.get() / 8) as usize].store(value, Ordering::Release);
    }
    #[inline]
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let word = &self.words[(pa.get() / 8) as usize];
        word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire).map(drop)
    }
    #[inline]
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        let run = self.run(pa, words.len());
        for (to, from) in words.iter_mut().zip(run) {
            *to = from.load(Ordering::Acquire);
        }
    }
    #[inline]
    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        let mut value = first;
        for word in self.run(pa, count) {
            word.store(value, Ordering::Release);
            value = value.wrapping_add(step);
        }
    }
    fn read(&self, _: Pa, _: &mut [u8]) {}
    fn write(&self, _: Pa, _: &[u8]) {}
    fn clean(&self, _: Pa, _: usize) {}
    fn invalidate(&self, _: Pa, _: usize) {}
    #[inline]
    fn wmb(&self) {
        std::sync::atomic::fence(Ordering::Release);
    }
}

fn map_unmap(c: &mut Criterion) {
    let word = AtomicU64::new(0);
    c.bench_function("fetch_add", |b| b.iter(|| black_box(&word).fetch_add(1, Ordering::SeqCst)));

    let table = PageTable::new(Arena::new(), Config::<Stage1>::new(Granule::K4, 48, 48)).unwrap();
    let prot = Prot::RW.cached();
    // A neighbour keeps the tables on the way alive, as in a table that is in use.
    table.map(Iova(0x7000_0000), Pa(0), 0x1000, prot).unwrap();
    let cases = [
        ("map+unmap 1 page, lazy", 0x7000_3000, 1),
        ("map+unmap 16 pages, lazy", 0x7001_0000, 16),
        // Neither run covers a whole table.
        ("map+unmap 512 pages over two tables, lazy", 0x7010_0000, 512),
        // One run in a table that is made and freed every time.
        ("map+unmap 512 pages of one new table, lazy", 0x7060_0000, 512),
    ];
    table.map(Iova(0x7040_0000), Pa(0), 0x1000, prot).unwrap();
    table.map(Iova(0x703f_f000), Pa(0), 0x1000, prot).unwrap();
    for (name, iova, pages) in cases {
        let len = pages * 0x1000;
        c.bench_function(name, |b| {
            b.iter(|| {
                table.map(black_box(Iova(iova)), black_box(Pa(0x1234_5000)), len, prot).unwrap();
                table.unmap(black_box(Iova(iova)), len, &mut NoFlush).unwrap()
            })
        });
    }
    c.bench_function("lookup", |b| b.iter(|| table.lookup(black_box(Iova(0x7000_0123)))));
}

criterion_group!(benches, map_unmap);
criterion_main!(benches);
