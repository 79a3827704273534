//! Goals 1 to 10 and 14: an SMMU with stage 1 tables (and nested ones), used through its ports. The same code measures each
//! [`Rig`].

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portcullis_arch::{Iova, Pa};
use portcullis_bus::{DmaPort, Initiator};
use portcullis_pgtable::{NoFlush, Prot};
use portcullis_walk::Tlb;

use super::rig::{DATA, ENTRIES, Forget, IOVA, Port, Rig};
use super::timing::{
    Random, against, in_rmw, median, once, samples, scaling, shuffled, stay_on_cpu, together,
};
use super::{Figure, Goal};

/// Translates each address once.
fn translate_all(port: &mut impl Port, from: &Initiator, addresses: &[Iova]) {
    for &va in addresses {
        let t = port.translate(from, va).expect("mapped");
        black_box(t.pa);
    }
}

fn addresses(pages: u64, count: usize, seed: u64) -> Vec<Iova> {
    let order = shuffled(pages, seed);
    order.iter().cycle().take(count).map(|p| Iova(IOVA + (p << 12) + 0x128)).collect()
}

fn figure<R: Rig>(n: u32, what: &str, ns: f64, ratio: f64, goal: f64) -> Figure {
    Figure {
        goal_number: n,
        what: format!("{} {what}", R::NAME),
        figure: ns,
        figure_unit: "ns",
        ratio,
        ratio_unit: "RMW",
        goal: Goal::AtMost(goal),
    }
}

/// Goal 1.
pub fn hits<R: Rig>() -> Vec<Figure> {
    const N: usize = 1 << 18;
    let rig = R::new(1, ENTRIES, 1 << 26);
    let frames = shuffled(4096, 7);
    rig.map(0, 4096, |i| frames[i as usize]);
    let mut port = rig.port();
    let from = R::stream(0);
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
        figure::<R>(1, "translate, TLB hit, 64 pages", ns64, r64, 1.0),
        figure::<R>(1, "translate, TLB hit, 4096 pages", ns4096, r4096, 1.0),
        Figure {
            ratio: spread,
            ratio_unit: "x 64 p.",
            ..figure::<R>(1, "4096 pages against 64 pages", ns4096, spread, 1.3)
        },
    ]
}

/// Translations a second that `threads` threads make together, each with its own port, stream and bank.
fn throughput<R: Rig>(rig: &R, threads: usize) -> f64 {
    together(threads, |n| {
        let mut port = rig.port();
        let list = addresses(64, 4096, n as u64 + 1);
        move || {
            translate_all(&mut port, &R::stream(n), &list);
            list.len() as u64
        }
    })
}

/// Goal 2.
pub fn threads<R: Rig>() -> Vec<Figure> {
    let rig = R::new(2, ENTRIES, 1 << 26);
    for n in 0..2 {
        rig.map(n, 64, |i| i + 1000 * n as u64);
    }
    let (best, ratio) = scaling(|threads| throughput(&rig, threads));
    vec![Figure {
        goal_number: 2,
        what: format!("{} two devices on two threads, total", R::NAME),
        figure: best / 1e6,
        figure_unit: "M/s",
        ratio,
        ratio_unit: "x one",
        goal: Goal::AtLeast(1.8),
    }]
}

/// Goals 4, 5 and 6.
pub fn misses<R: Rig>() -> Vec<Figure> {
    const N: usize = 1 << 16;
    // A TLB of one set, and 64 pages in a cycle: every access misses, every table line is in the host's cache.
    let rig = R::new(1, 4, 1 << 30);
    rig.map(0, 64, |i| i);
    let mut port = rig.port();
    let from = R::stream(0);
    let cycle: Vec<Iova> = (0..N as u64).map(|i| Iova(IOVA + ((i % 64) << 12))).collect();
    let (ns, r) = in_rmw(N as u64, || translate_all(&mut port, &from, &cycle));
    assert!(port.stats().hits * 100 < port.stats().walks, "the miss benchmark must miss");
    let miss = figure::<R>(4, "TLB miss, configuration cached, 4 levels", ns, r, 7.0);

    // More streams than a port keeps, each access another stream and another page.
    let streams = R::many_streams();
    let mut port = rig.port();
    let (ns, r) = in_rmw(N as u64, || {
        for (i, &va) in cycle.iter().enumerate() {
            black_box(port.translate(&streams[i % 256], va).expect("mapped").pa);
        }
    });
    assert!(port.stats().resolutions * 2 > port.stats().walks, "the cold benchmark must look streams up");
    let cold = figure::<R>(6, "nothing cached (stream, context, walk)", ns, r, 14.0);

    let rig = R::new(1, ENTRIES, 1 << 30);
    let frames = shuffled(1 << 18, 11);
    rig.map(0, 1 << 18, |i| frames[i as usize]);
    let mut port = rig.port();
    let mut random = Random::new(17);
    let list: Vec<Iova> = (0..N).map(|_| Iova(IOVA + ((random.next() % (1 << 18)) << 12))).collect();
    let (ns, r) = in_rmw(N as u64, || translate_all(&mut port, &from, &list));
    let wide = figure::<R>(5, "random over 1 GiB of 4K pages", ns, r, 12.0);
    vec![miss, wide, cold]
}

/// Goal 8.
pub fn copies<R: Rig>() -> Vec<Figure> {
    const LEN: usize = 64 << 10;
    const N: u64 = 2000;
    let run = |what: &str, frame: &dyn Fn(u64) -> u64, goal: f64| {
        let rig = R::new(1, ENTRIES, 1 << 24);
        rig.map(0, 64, frame);
        let mut port = rig.port();
        let from = R::stream(0);
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
            what: format!("{} {what}", R::NAME),
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
        run("DMA copy 64 KiB, scattered 4K pages", &scattered, 0.85),
        run("DMA copy 64 KiB, contiguous 4K pages", &|i| i, 0.95),
    ]
}

/// Goal 9.
pub fn small_reads<R: Rig>() -> Vec<Figure> {
    const N: usize = 1 << 17;
    let rig = R::new(1, ENTRIES, 1 << 24);
    rig.map(0, 64, |i| i * 5 % 64);
    let mut port = rig.port();
    let from = R::stream(0);
    let list = addresses(64, N, 3);
    let (ns, r) = in_rmw(N as u64, || {
        for &va in &list {
            let mut word = [0; 8];
            port.read(from, va, &mut word).expect("mapped");
            black_box(word);
        }
    });
    vec![figure::<R>(9, "8-byte DMA read through a translation", ns, r, 3.5)]
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

/// Goal 7.
pub fn nested<R: Rig>() -> Vec<Figure> {
    const N: usize = 1 << 15;
    let rig = R::nested(4, 1 << 22);
    rig.map(0, 64, |i| i);
    let mut port = rig.port();
    let from = R::stream(0);
    let cycle: Vec<Iova> = (0..N as u64).map(|i| Iova(IOVA + ((i % 64) << 12))).collect();
    let (ns, r) = in_rmw(N as u64, || translate_all(&mut port, &from, &cycle));
    assert!(port.stats().hits * 100 < port.stats().walks, "the miss benchmark must miss");
    vec![figure::<R>(7, "nested TLB miss, 4 levels over 4 levels", ns, r, 30.0)]
}

/// Frames that the page of goal 3 moves through; frame `n % MOVES` belongs to its `n`th mapping.
const MOVES: u64 = 1 << 12;

/// What a run of goal 3 counted.
struct Churn {
    translations_a_second: f64,
    invalidations_a_second: f64,
}

/// `threads` threads translate, each in a context of its own; if `churn`, another one moves a page of context 0 to another
/// frame about 10 000 times a second, invalidates it and waits for completion. Every thread of context 0 looks at that
/// page as well: it must never see a frame older than the last invalidation that was complete before it looked.
fn contended<R: Rig>(rig: &R, threads: usize, churn: bool) -> Churn {
    let (stop, total, moved) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let moving = Iova(IOVA + (64 << 12));
    let table = rig.table(0);
    table.map(moving, Pa(DATA), 4096, Prot::RW).expect("free page");
    rig.forget(Forget::All);
    let start = Instant::now();
    std::thread::scope(|s| {
        for n in 0..threads {
            let (stop, total, moved) = (&stop, &total, &moved);
            let mut port = rig.port();
            let list = addresses(64, 512, n as u64 + 1);
            s.spawn(move || {
                stay_on_cpu(n);
                let from = R::stream(n);
                let mut done = 0;
                while !stop.load(Ordering::Relaxed) {
                    translate_all(&mut port, &from, &list);
                    done += list.len() as u64;
                    if n == 0 && churn {
                        let at_least = moved.load(Ordering::Acquire);
                        // For a moment the page is absent, and that is no stale translation.
                        if let Ok(t) = port.translate(&from, moving) {
                            let age = (at_least % MOVES + MOVES - (t.pa.get() - DATA) / 4096) % MOVES;
                            assert!(age == 0 || age > MOVES / 2, "stale by {age} invalidations");
                        }
                    }
                }
                total.fetch_add(done, Ordering::Relaxed);
            });
        }
        let end = start + Duration::from_millis(60);
        if churn {
            let mut n = 0u64;
            while Instant::now() < end {
                n += 1;
                table.unmap(moving, 4096, &mut NoFlush).expect("mapped");
                table.map(moving, Pa(DATA + (n % MOVES) * 4096), 4096, Prot::RW).expect("free");
                rig.forget(Forget::Pages(moving, 1));
                moved.store(n, Ordering::Release);
                // 10 000 a second, ten at a time, without keeping a core busy in between.
                if n.is_multiple_of(10) {
                    let next = start + Duration::from_micros(100 * n);
                    std::thread::sleep(next.saturating_duration_since(Instant::now()));
                }
            }
        } else {
            std::thread::sleep(end - start);
        }
        stop.store(true, Ordering::Relaxed);
    });
    table.unmap(moving, 4096, &mut NoFlush).expect("mapped");
    let seconds = start.elapsed().as_secs_f64();
    Churn {
        translations_a_second: total.into_inner() as f64 / seconds,
        invalidations_a_second: moved.into_inner() as f64 / seconds,
    }
}

/// Goal 3.
pub fn invalidated<R: Rig>() -> Vec<Figure> {
    let rig = R::new(2, ENTRIES, 1 << 26);
    for n in 0..2 {
        rig.map(n, 64, |i| i + 5000 + 1000 * n as u64);
    }
    let mut rates = Vec::new();
    let (best, ratio) = scaling(|threads| {
        let run = contended(&rig, threads, threads == 2);
        if threads == 2 {
            rates.push(run.invalidations_a_second);
        }
        run.translations_a_second
    });
    let rate = median(rates);
    vec![Figure {
        goal_number: 3,
        what: format!("{} two threads, a third invalidates {:.1}k/s", R::NAME, rate / 1e3),
        figure: best / 1e6,
        figure_unit: "M/s",
        ratio,
        ratio_unit: "x one",
        goal: Goal::AtLeast(1.5),
    }]
}

/// Goal 10: the whole way of an invalidation: commands or register writes, completion, and the port's catching up at its
/// next access. The TLB holds 4096 pages each time.
pub fn invalidations<R: Rig>() -> Vec<Figure> {
    const PAGES: u64 = 4096;
    let rig = R::new(2, ENTRIES, 1 << 26);
    rig.map(0, PAGES, |i| i);
    rig.map(1, 1, |i| i);
    let mut port = rig.port();
    let (from, other) = (R::stream(0), R::stream(1));
    let all: Vec<Iova> = (0..PAGES).map(|i| Iova(IOVA + (i << 12))).collect();
    let mut measure = |what: &str, pages: u64, goal: Goal, forget: &dyn Fn(u64) -> Forget| {
        let mut round = 0;
        let mut one = || {
            translate_all(&mut port, &from, &all);
            translate_all(&mut port, &other, &all[..1]);
            let unit = super::timing::rmw();
            let first = round * 97 % (PAGES - 512);
            round += 1;
            let ns = once(pages, || {
                rig.forget(forget(first));
                // Catches up, and hits in a context that was not touched (unless everything went).
                translate_all(&mut port, &other, &all[..1]);
            });
            (unit, ns)
        };
        let both = samples(33, 1, || {
            // So short that it counts whether the way was taken lately.
            for _ in 0..3 {
                one();
            }
            let (unit, ns) = one();
            (ns, ns / unit)
        });
        let (figures, ratios) = both.into_iter().unzip();
        let (ns, ratio) = (median(figures), median(ratios));
        Figure { goal, ..figure::<R>(10, what, ns, ratio, 0.0) }
    };
    let at = |page: u64| Iova(IOVA + (page << 12));
    let goal = Goal::AtMost(20.0);
    let mut figures = vec![
        measure("invalidate one page, 64 in a batch, per page", 64, goal, &|p| Forget::Pages(at(p), 64)),
        measure("invalidate one page with its own completion", 1, Goal::None, &|p| Forget::Pages(at(p), 1)),
    ];
    if R::RANGES {
        figures.push(measure("invalidate a range of 512 pages, per page", 512, goal, &|p| {
            Forget::Range(at(p), 512)
        }));
    }
    figures.push(measure("invalidate an ASID with 4096 pages", 1, Goal::None, &|_| Forget::Asid));
    figures.push(measure("invalidate everything", 1, Goal::None, &|_| Forget::All));
    figures
}
