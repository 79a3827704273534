//! Timing: samples, medians, the RMW, and whether the machine is quiet.
//!
//! A virtual CPU shares its core with whatever else the host runs there, and the neighbour of a hardware thread takes a third of
//! plain computation but hardly anything of an atomic: a ratio to the RMW does not cancel that. So a fixed computation is timed
//! before and after each sample, on as many threads as the sample uses. A sample counts if it ran near its best both times. What
//! is measured has no say in that.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Samples per figure.
const SAMPLES: usize = 9;
/// The fixed computation may take so much longer than the fastest in this run.
const QUIET: f64 = 1.1;
/// How long a figure waits for quiet moments. Then it takes what it gets.
const PATIENCE: Duration = Duration::from_secs(4);

/// Bits of the fastest pace so far. (The order of positive floats is that of their bits.)
static BEST: AtomicU64 = AtomicU64::new(u64::MAX);
static TAKEN: AtomicU64 = AtomicU64::new(0);
static COUNTED: AtomicU64 = AtomicU64::new(0);
static IMPATIENT: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds of a fixed computation that keeps a core busy without memory: six chains side by side.
fn pace() -> f64 {
    const N: u64 = 10_000;
    let mut lanes = black_box([1u64, 2, 3, 4, 5, 6]);
    let ns = once(N, || {
        for i in 0..N {
            lanes.iter_mut().for_each(|lane| *lane = lane.rotate_left(7) ^ i);
        }
    });
    black_box(lanes);
    ns
}

/// Keeps the calling thread on the `n`th of the CPUs that this process may use. The scheduler would else begin with both threads of
/// a short measurement on one of them, and move one away milliseconds later.
pub fn stay_on_cpu(n: usize) {
    #[cfg(target_os = "linux")]
    {
        use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
        let Ok(allowed) = sched_getaffinity(None) else { return };
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).cycle();
        if let Some(cpu) = cpus.nth(n) {
            let mut one = CpuSet::new();
            one.set(cpu);
            // Where that is not allowed, the scheduler decides.
            let _ = sched_setaffinity(None, &one);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = n;
}

/// True if as many threads keep the best pace now.
fn quiet(threads: usize) -> bool {
    let middle = || {
        let mut paces: Vec<f64> = (0..5).map(|_| pace()).collect();
        paces.sort_by(f64::total_cmp);
        BEST.fetch_min(paces[0].to_bits(), Ordering::Relaxed);
        paces[2]
    };
    let slowest = if threads == 1 {
        middle()
    } else {
        let barrier = Barrier::new(threads);
        let work = |n| {
            stay_on_cpu(n);
            barrier.wait();
            middle()
        };
        std::thread::scope(|scope| {
            let work = &work;
            let all: Vec<_> = (0..threads).map(|n| scope.spawn(move || work(n))).collect();
            all.into_iter().map(|thread| thread.join().unwrap_or(f64::MAX)).fold(0.0, f64::max)
        })
    };
    is_quiet(slowest)
}

/// The fastest pace so far.
pub fn best_pace() -> f64 {
    f64::from_bits(BEST.load(Ordering::Relaxed))
}

/// True if a pace is as good as the fastest so far.
pub fn is_quiet(pace: f64) -> bool {
    pace <= QUIET * best_pace()
}

/// `count` samples of something that runs on `threads` threads, from quiet moments as far as there are any.
pub fn samples<T>(count: usize, threads: usize, mut take: impl FnMut() -> T) -> Vec<T> {
    let end = Instant::now() + PATIENCE;
    let (mut counted, mut others) = (Vec::new(), Vec::new());
    while counted.len() < count && (Instant::now() < end || counted.len() + others.len() < count) {
        while !quiet(threads) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
        let sample = take();
        TAKEN.fetch_add(1, Ordering::Relaxed);
        if quiet(threads) { counted.push(sample) } else { others.push(sample) }
    }
    COUNTED.fetch_add(counted.len() as u64, Ordering::Relaxed);
    if counted.len() < count.div_ceil(3) {
        IMPATIENT.fetch_add(1, Ordering::Relaxed);
        counted.append(&mut others);
    }
    counted
}

/// Looks for the best pace before anything is compared with it.
pub fn find_best_pace() {
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        quiet(2);
    }
}

/// Figures so far that found too few quiet moments.
pub fn impatient() -> u64 {
    IMPATIENT.load(Ordering::Relaxed)
}

/// What a reader has to know about the samples of this run.
pub fn remark() -> String {
    let [taken, counted] = [&TAKEN, &COUNTED].map(|n| n.load(Ordering::Relaxed));
    let others = "the others count only in rows of a busy machine";
    format!("{counted} of {taken} samples were taken while the machine was quiet; {others}\n")
}

/// Nanoseconds per call of `f`, which makes `n` of what is measured.
pub fn once(n: u64, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_nanos() as f64 / n as f64
}

/// Nanoseconds of one uncontended fetch_add.
pub fn rmw() -> f64 {
    const N: u64 = 400_000;
    let word = AtomicU64::new(0);
    once(N, || {
        for _ in 0..N {
            black_box(&word).fetch_add(1, Ordering::SeqCst);
        }
    })
}

/// The value in the middle.
pub fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// Median nanoseconds per operation, and the median ratio to `reference` sampled right before each sample.
pub fn against(n: u64, mut f: impl FnMut(), mut reference: impl FnMut() -> f64) -> (f64, f64) {
    f();
    let both = samples(SAMPLES, 1, || {
        let unit = reference();
        let figure = once(n, &mut f);
        (figure, figure / unit)
    });
    let (figures, ratios) = both.into_iter().unzip();
    (median(figures), median(ratios))
}

/// What `threads` threads make a second together, each on a CPU of its own. `prepare(n)` gives the work of thread `n`: calls that make
/// as many as they return, some microseconds each.
pub fn together<W: FnMut() -> u64>(threads: usize, prepare: impl Fn(usize) -> W + Sync) -> f64 {
    const TIME: Duration = Duration::from_millis(30);
    let barrier = Barrier::new(threads);
    let thread = |n| {
        stay_on_cpu(n);
        let mut work = prepare(n);
        work();
        barrier.wait();
        let (start, mut made) = (Instant::now(), 0);
        loop {
            made += work();
            let elapsed = start.elapsed();
            if elapsed >= TIME {
                return made as f64 / elapsed.as_secs_f64();
            }
        }
    };
    std::thread::scope(|scope| {
        let thread = &thread;
        let all: Vec<_> = (0..threads).map(|n| scope.spawn(move || thread(n))).collect();
        all.into_iter().map(|t| t.join().unwrap_or_default()).sum()
    })
}

/// `rate(1)` and `rate(2)`, threads, again and again: the best rate of two, and the median ratio.
pub fn scaling(mut rate: impl FnMut(usize) -> f64) -> (f64, f64) {
    let both = samples(SAMPLES, 2, || {
        let (one, two) = (rate(1), rate(2));
        (two, two / one)
    });
    let (rates, ratios): (Vec<f64>, Vec<f64>) = both.into_iter().unzip();
    (rates.into_iter().fold(0.0, f64::max), median(ratios))
}

/// [`against`] the RMW.
pub fn in_rmw(n: u64, f: impl FnMut()) -> (f64, f64) {
    against(n, f, rmw)
}

/// A small fixed-seed generator, so that every run makes the same accesses.
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// The numbers below `n` in a random order.
pub fn shuffled(n: u64, seed: u64) -> Vec<u64> {
    let mut v: Vec<u64> = (0..n).collect();
    let mut r = Random::new(seed);
    for i in (1..v.len()).rev() {
        v.swap(i, (r.next() % (i as u64 + 1)) as usize);
    }
    v
}
