//! Mapping and unmapping a 4K buffer through the DMA API, beside one uncontended `fetch_add`: strict, lazy, with a part
//! of one's own, and with two threads on one domain. The domain has a real page table and no TLB to wait for, so
//! strict and lazy differ only by what the API itself does.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_arch::{Asid, Iova, Pa};
use portcullis_hal::{Block, DmaMemory};
use portcullis_iommu::dma::{DeviceConfig, Direction, DmaAttrs, DmaDevice, DmaSpace, Mode, SpaceConfig};
use portcullis_iommu::{Domain, DomainKind, DomainOps, Granule, InstanceId, IommuError, Prot, TableRoot};
use portcullis_pgtable::{Config, NoFlush, PageTable, Stage1};

const WORDS: usize = 4 << 20;
const PAGE: u64 = 0x1000;

/// Memory from address 0 on, with a free list of 4K tables.
#[derive(Clone)]
struct Arena(Arc<(Vec<AtomicU64>, Mutex<Vec<u64>>)>);

impl Arena {
    fn new() -> Self {
        let tables = (0..WORDS as u64 / 512).rev().map(|table| table * 4096);
        Self(Arc::new(((0..WORDS).map(|_| AtomicU64::new(0)).collect(), Mutex::new(tables.collect()))))
    }
    #[inline]
    fn run(&self, pa: Pa, len: usize) -> &[AtomicU64] {
        let first = (pa.get() / 8) as usize;
        &self.0.0[first..first + len]
    }
}

impl DmaMemory for Arena {
    fn alloc(&self, len: usize, _align: usize) -> Option<Block> {
        let pa = Pa(self.0.1.lock().ok()?.pop()?);
        for word in self.run(pa, len / 8) {
            word.store(0, Ordering::Relaxed);
        }
        Some(Block { pa, len })
    }
    fn free(&self, block: Block) {
        if let Ok(mut free) = self.0.1.lock() {
            free.push(block.pa.get());
        }
    }
    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.0.0[(pa.get() / 8) as usize].load(Ordering::Acquire)
    }
    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        self.0.0[(pa.get() / 8) as usize].store(value, Ordering::Release);
    }
    #[inline]
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let word = &self.0.0[(pa.get() / 8) as usize];
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

/// A domain without a TLB.
struct Tables(PageTable<Stage1, Arena>);

fn refused() -> IommuError {
    IommuError::Unsupported { what: "room" }
}

impl DomainOps for Tables {
    fn kind(&self) -> DomainKind {
        DomainKind::Stage1
    }
    fn bank(&self) -> Option<u8> {
        None
    }
    fn asid(&self) -> Option<Asid> {
        None
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot) -> Result<(), IommuError> {
        self.0.map(iova, pa, len, prot).map_err(|_| refused())
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.0.unmap(iova, len, &mut NoFlush).map_err(|_| refused())
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.0.unmap(iova, len, &mut NoFlush).map_err(|_| refused())
    }
    fn protect(&self, _: Iova, _: u64, _: Prot) -> Result<(), IommuError> {
        Err(refused())
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        Some(self.0.lookup(iova)?.pa)
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        Some(self.0.input_range())
    }
    fn page_sizes(&self) -> u64 {
        self.0.page_sizes()
    }
    fn table_root(&self) -> Option<TableRoot> {
        None
    }
    fn invalidate(&self, _: Iova, _: u64) -> Result<(), IommuError> {
        Ok(())
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        Ok(())
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Ok(())
    }
}

fn device(mode: Mode) -> (DmaDevice<Arena>, Arc<DmaSpace>) {
    let arena = Arena::new();
    let table = PageTable::new(arena.clone(), Config::new(Granule::K4, 48, 48)).unwrap();
    let domain = Domain::new(Arc::new(Tables(table)), InstanceId(0));
    let space = DmaSpace::new(domain, SpaceConfig { mode, ..SpaceConfig::default() }).unwrap();
    let config = DeviceConfig::default().coherent(true).mask(48);
    (DmaDevice::translated("bench", space.clone(), arena, config), space)
}

const TO: Direction = Direction::ToDevice;

/// `threads` threads, each with a part of its own, each `n` times; the time until the last is ready.
fn together(device: &DmaDevice<Arena>, space: &Arc<DmaSpace>, threads: usize, n: u64) -> Duration {
    let barrier = Barrier::new(threads);
    let work = || {
        let mut local = space.local();
        let mut go = |n| {
            for _ in 0..n {
                let pa = black_box(Pa(0x1234_5000));
                let iova = local.map_single(device, pa, PAGE, TO, DmaAttrs::NONE).unwrap();
                local.unmap_single(device, iova, PAGE, TO, DmaAttrs::NONE).unwrap();
            }
        };
        go(1000);
        barrier.wait();
        let start = Instant::now();
        go(n);
        start.elapsed()
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).max().unwrap_or_default()
    })
}

fn dma(c: &mut Criterion) {
    let word = AtomicU64::new(0);
    c.bench_function("fetch_add", |b| b.iter(|| black_box(&word).fetch_add(1, Ordering::SeqCst)));
    for (name, mode) in [("strict", Mode::Strict), ("lazy", Mode::Lazy)] {
        let (device, space) = device(mode);
        c.bench_function(&format!("map+unmap 4K, {name}"), |b| {
            b.iter(|| {
                let iova = device.map_single(black_box(Pa(0x1234_5000)), PAGE, TO, DmaAttrs::NONE).unwrap();
                device.unmap_single(iova, PAGE, TO, DmaAttrs::NONE).unwrap();
            })
        });
        let mut local = space.local();
        c.bench_function(&format!("map+unmap 4K, {name}, own part"), |b| {
            b.iter(|| {
                let pa = black_box(Pa(0x1234_5000));
                let iova = local.map_single(&device, pa, PAGE, TO, DmaAttrs::NONE).unwrap();
                local.unmap_single(&device, iova, PAGE, TO, DmaAttrs::NONE).unwrap();
            })
        });
        for threads in [1, 2] {
            c.bench_function(&format!("map+unmap 4K, {name}, {threads} threads with own parts, each"), |b| {
                b.iter_custom(|n| together(&device, &space, threads, n))
            });
        }
    }
}

criterion_group!(benches, dma);
criterion_main!(benches);
