//! IOVA allocation and free, beside one uncontended `fetch_add`: from a cache through an owned handle and through the shared
//! face, and from the tree with 10 000 allocations of random sizes in use.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use portcullis_arch::Iova;
use portcullis_iommu::iova::{IovaConfig, IovaDomain};

const LIMIT: Iova = Iova((1 << 48) - 1);

fn domain(cpus: usize) -> Arc<IovaDomain> {
    let config = IovaConfig { granule: 4096, first: Iova(0), last: LIMIT, cpus };
    Arc::new(IovaDomain::new(config).expect("48 bits of 4K pages"))
}

/// A fixed-seed generator.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

fn cached(c: &mut Criterion) {
    let word = AtomicU64::new(0);
    c.bench_function("fetch_add", |b| b.iter(|| black_box(&word).fetch_add(1, Ordering::SeqCst)));
    let shared = domain(1);
    c.bench_function("cached alloc+free, shared", |b| {
        b.iter(|| {
            let iova = shared.alloc(0, black_box(4096), LIMIT).expect("room");
            shared.free(0, black_box(iova), 4096).expect("in use");
        });
    });
    let mut local = shared.local();
    c.bench_function("cached alloc+free, owned", |b| {
        b.iter(|| {
            let iova = local.alloc(black_box(4096), LIMIT).expect("room");
            local.free(black_box(iova), 4096).expect("in use");
        });
    });
}

/// Sizes of 1 to `largest` pages, without caches.
fn tree(c: &mut Criterion) {
    for largest in [64, 1024] {
        let domain = domain(0);
        let mut random = Random(7);
        let mut live: Vec<(Iova, u64)> = Vec::new();
        while live.len() < 10_000 {
            let len = (1 + random.below(largest)) * 4096;
            live.push((domain.alloc(0, len, LIMIT).expect("room"), len));
        }
        let mut step = || {
            let i = random.below(live.len() as u64) as usize;
            let (iova, len) = live[i];
            domain.free(0, iova, len).expect("in use");
            let len = (1 + random.below(largest)) * 4096;
            live[i] = (domain.alloc(0, len, LIMIT).expect("room"), len);
        };
        (0..200_000).for_each(|_| step());
        c.bench_function(&format!("tree alloc+free, 10k live of 1 to {largest} pages"), |b| {
            b.iter(&mut step)
        });
    }
}

criterion_group!(benches, cached, tree);
criterion_main!(benches);
