//! Goals 1, 2, 4, 5, 6, 8, 9 and 14: an SMMUv2 with stage 1 tables, used through its ports.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_arch::{Access, Iova, Pa, StreamId};
use portcullis_board::sim::{Memory, Pool};
use portcullis_bus::{DmaPort, Initiator, Mmio, SystemMemory};
use portcullis_pgtable::{Config as TableConfig, Granule, PageTable, Prot, Stage1};
use portcullis_smmuv2::{Config, Interrupts, Port, SmmuV2};
use portcullis_walk::Tlb;

use super::timing::{Random, against, in_rmw, once, shuffled};
use super::{Figure, Goal};

const POOL: u64 = 0x4000_0000;
const DATA: u64 = 0x8000_0000;
const IOVA: u64 = 0x12_3400_0000;

/// An SMMU whose bank `n` translates stream `n` (and with `many_streams` a whole range of streams) through its own
/// tables.
pub(super) struct Rig {
    memory: SystemMemory,
    smmu: Arc<SmmuV2<SystemMemory>>,
    tables: Vec<PageTable<Stage1, Memory>>,
}

impl Rig {
    pub(super) fn new(banks: usize, tlb_entries: usize, data_bytes: u64) -> Self {
        let memory = SystemMemory::new(&[(POOL, 1 << 26), (DATA, data_bytes)]).expect("valid regions");
        let config = Config { tlb_entries, ..Config::mmu500_zynqmp() };
        let smmu = SmmuV2::new(config, memory.clone(), Interrupts::default()).expect("a valid preset");
        let pool = Arc::new(Pool::new(Pa(POOL), 26));
        let w = smmu.window(false);
        let write = |at: usize, v: u32| w.write32(at as u64, v).expect("inside the window");
        let mut tables = Vec::new();
        for n in 0..banks {
            let dma = Memory::new(memory.clone(), pool.clone());
            let table =
                PageTable::<Stage1, _>::new(dma, TableConfig::new(Granule::K4, 48, 48)).expect("48 bits, 4K");
            let page = 0x1_0000 + n * 0x1000;
            write(0x1000 + gr1::CBA2R + 4 * n, 1);
            write(0x1000 + gr1::CBAR + 4 * n, 0x1_f300);
            write(page + cb::TCR2, 0x0003_8015);
            write(page + cb::TCR, 0x0080_3510);
            w.write64((page + cb::TTBR0) as u64, table.root().get() | (n as u64) << 48).expect("inside");
            write(page + cb::MAIR0, 0xf404_ff44);
            write(page + cb::SCTLR, 0x67);
            write(gr0::S2CR + 4 * n, n as u32);
            write(gr0::SMR + 4 * n, 0x8000_0000 | 0xff << 16 | (n as u32) << 8);
            tables.push(table);
        }
        write(gr0::CR0, 0x0020_1c36);
        Self { memory, smmu, tables }
    }

    /// Maps `pages` pages of 4 KiB in bank `n` from [`IOVA`] on to frames `frame(i)` of the data region.
    pub(super) fn map(&self, n: usize, pages: u64, frame: impl Fn(u64) -> u64) {
        for i in 0..pages {
            let pa = Pa(DATA + (frame(i) << 12));
            self.tables[n].map(Iova(IOVA + (i << 12)), pa, 4096, Prot::RW).expect("free page");
        }
    }

    pub(super) fn port(&self) -> Port<SystemMemory> {
        self.smmu.port(self.memory.clone())
    }
}

fn stream(bank: usize) -> Initiator {
    Initiator::new(StreamId((bank as u32) << 8))
}

/// Translates each address once.
fn translate_all(port: &mut Port<SystemMemory>, from: &Initiator, addresses: &[Iova]) {
    for &va in addresses {
        let t = port.translate(from, va, Access::Read).expect("mapped");
        black_box(t.pa);
    }
}

fn addresses(pages: u64, count: usize, seed: u64) -> Vec<Iova> {
    let order = shuffled(pages, seed);
    order.iter().cycle().take(count).map(|p| Iova(IOVA + (p << 12) + 0x128)).collect()
}

fn figure(n: u32, what: &str, ns: f64, ratio: f64, goal: f64) -> Figure {
    Figure {
        goal_number: n,
        what: what.into(),
        figure: ns,
        figure_unit: "ns",
        ratio,
        ratio_unit: "RMW",
        goal: Goal::AtMost(goal),
    }
}

/// Goal 1.
pub fn hits() -> Vec<Figure> {
    const N: usize = 1 << 18;
    let rig = Rig::new(1, Config::mmu500_zynqmp().tlb_entries, 1 << 26);
    let frames = shuffled(4096, 7);
    rig.map(0, 4096, |i| frames[i as usize]);
    let mut port = rig.port();
    let from = stream(0);
    let few = addresses(64, N, 3);
    let many = addresses(4096, N, 5);
    let (ns64, r64) = in_rmw(N as u64, || translate_all(&mut port, &from, &few));
    let (ns4096, r4096) = in_rmw(N as u64, || translate_all(&mut port, &from, &many));
    let (_, spread) = against(
        N as u64,
        || translate_all(&mut port, &from, &many),
        // A second port, so that neither run warms the other.
        {
            let mut other = rig.port();
            let few = few.clone();
            translate_all(&mut other, &from, &few);
            move || once(N as u64, || translate_all(&mut other, &from, &few))
        },
    );
    vec![
        figure(1, "SMMUv2 translate, TLB hit, 64 pages", ns64, r64, 1.0),
        figure(1, "SMMUv2 translate, TLB hit, 4096 pages", ns4096, r4096, 1.0),
        Figure {
            ratio: spread,
            ratio_unit: "x 64 p.",
            ..figure(1, "SMMUv2 4096 pages against 64 pages", ns4096, spread, 1.3)
        },
    ]
}

/// Translations that `threads` threads make together in a fixed time, each with its own port, stream and bank.
fn throughput(rig: &Rig, threads: usize) -> f64 {
    let stop = AtomicBool::new(false);
    let total = AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|s| {
        for n in 0..threads {
            let (stop, total) = (&stop, &total);
            let mut port = rig.port();
            let list = addresses(64, 4096, n as u64 + 1);
            s.spawn(move || {
                let from = stream(n);
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    translate_all(&mut port, &from, &list);
                    done += list.len() as u64;
                }
                total.fetch_add(done, Ordering::Relaxed);
            });
        }
        std::thread::sleep(Duration::from_millis(120));
        stop.store(true, Ordering::Relaxed);
    });
    total.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64()
}

/// Goal 2.
pub fn threads() -> Vec<Figure> {
    let rig = Rig::new(2, Config::mmu500_zynqmp().tlb_entries, 1 << 26);
    for n in 0..2 {
        rig.map(n, 64, |i| i + 1000 * n as u64);
    }
    let mut ratios = Vec::new();
    let mut best = 0.0f64;
    for _ in 0..5 {
        let one = throughput(&rig, 1);
        let two = throughput(&rig, 2);
        best = best.max(two);
        ratios.push(two / one);
    }
    ratios.sort_by(f64::total_cmp);
    vec![Figure {
        goal_number: 2,
        what: "SMMUv2 two devices on two threads, total".into(),
        figure: best / 1e6,
        figure_unit: "M/s",
        ratio: ratios[ratios.len() / 2],
        ratio_unit: "x one",
        goal: Goal::AtLeast(1.8),
    }]
}

/// Goals 4, 5 and 6.
pub fn misses() -> Vec<Figure> {
    const N: usize = 1 << 16;
    // A TLB of one set, and 64 pages in a cycle: every access misses, every table line is in the host's cache.
    let rig = Rig::new(1, 4, 1 << 30);
    rig.map(0, 64, |i| i);
    let mut port = rig.port();
    let from = stream(0);
    let cycle: Vec<Iova> = (0..N as u64).map(|i| Iova(IOVA + ((i % 64) << 12))).collect();
    let (ns, r) = in_rmw(N as u64, || translate_all(&mut port, &from, &cycle));
    assert!(port.stats().hits * 100 < port.stats().walks, "the miss benchmark must miss");
    let miss = figure(4, "SMMUv2 TLB miss, configuration cached, 4 levels", ns, r, 7.0);

    // More streams than a port keeps, each access another stream and another page.
    let streams: Vec<Initiator> = (0..256).map(|i| Initiator::new(StreamId(i))).collect();
    let mut port = rig.port();
    let (ns, r) = in_rmw(N as u64, || {
        for (i, &va) in cycle.iter().enumerate() {
            black_box(port.translate(&streams[i % 256], va, Access::Read).expect("mapped").pa);
        }
    });
    assert!(port.stats().resolutions * 2 > port.stats().walks, "the cold benchmark must look streams up");
    let cold = figure(6, "SMMUv2 nothing cached (stream, context, walk)", ns, r, 14.0);

    let rig = Rig::new(1, Config::mmu500_zynqmp().tlb_entries, 1 << 30);
    let frames = shuffled(1 << 18, 11);
    rig.map(0, 1 << 18, |i| frames[i as usize]);
    let mut port = rig.port();
    let mut random = Random::new(17);
    let list: Vec<Iova> = (0..N).map(|_| Iova(IOVA + ((random.next() % (1 << 18)) << 12))).collect();
    let (ns, r) = in_rmw(N as u64, || translate_all(&mut port, &from, &list));
    let wide = figure(5, "SMMUv2 random over 1 GiB of 4K pages", ns, r, 12.0);
    vec![miss, wide, cold]
}

/// Goal 8.
pub fn copies() -> Vec<Figure> {
    const LEN: usize = 64 << 10;
    const N: u64 = 2000;
    let run = |what: &str, frame: &dyn Fn(u64) -> u64, goal: f64| {
        let rig = Rig::new(1, Config::mmu500_zynqmp().tlb_entries, 1 << 24);
        rig.map(0, 64, frame);
        let mut port = rig.port();
        let from = stream(0);
        let (src, dst) = ((from, Iova(IOVA)), (from, Iova(IOVA + (32 << 12))));
        let source = vec![1u8; LEN];
        let mut target = vec![0u8; LEN];
        let (ns, ratio) = against(
            N,
            || {
                for _ in 0..N {
                    port.copy(src, dst, LEN).expect("mapped");
                }
            },
            || {
                once(N, || {
                    for _ in 0..N {
                        black_box(&mut target[..]).copy_from_slice(black_box(&source[..]));
                    }
                })
            },
        );
        Figure {
            goal_number: 8,
            what: what.into(),
            figure: LEN as f64 / ns,
            figure_unit: "GB/s",
            ratio: 1.0 / ratio,
            ratio_unit: "memcpy",
            goal: Goal::AtLeast(goal),
        }
    };
    let frames = shuffled(64, 23);
    let scattered = move |i: u64| frames[i as usize] * 3;
    vec![
        run("SMMUv2 DMA copy 64 KiB, scattered 4K pages", &scattered, 0.85),
        run("SMMUv2 DMA copy 64 KiB, contiguous 4K pages", &|i| i, 0.95),
    ]
}

/// Goal 9.
pub fn small_reads() -> Vec<Figure> {
    const N: usize = 1 << 17;
    let rig = Rig::new(1, Config::mmu500_zynqmp().tlb_entries, 1 << 24);
    rig.map(0, 64, |i| i * 5 % 64);
    let mut port = rig.port();
    let from = stream(0);
    let list = addresses(64, N, 3);
    let (ns, r) = in_rmw(N as u64, || {
        for &va in &list {
            let mut word = [0; 8];
            port.read(from, va, &mut word).expect("mapped");
            black_box(word);
        }
    });
    vec![figure(9, "SMMUv2 8-byte DMA read through a translation", ns, r, 3.5)]
}

/// Goal 14.
pub fn memory() -> Vec<Figure> {
    let bytes = Tlb::bytes_per_entry() as f64;
    vec![Figure {
        goal_number: 14,
        what: "model memory per TLB entry".into(),
        figure: bytes,
        figure_unit: "B",
        ratio: bytes,
        ratio_unit: "B",
        goal: Goal::AtMost(16.0),
    }]
}
