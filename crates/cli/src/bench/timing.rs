//! Timing: samples, medians, the RMW.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Samples per figure.
const SAMPLES: usize = 9;

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

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// Median nanoseconds per operation, and the median ratio to `reference` sampled right before each sample.
pub fn against(n: u64, mut f: impl FnMut(), mut reference: impl FnMut() -> f64) -> (f64, f64) {
    f();
    let mut figures = Vec::with_capacity(SAMPLES);
    let mut ratios = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let unit = reference();
        let figure = once(n, &mut f);
        figures.push(figure);
        ratios.push(figure / unit);
    }
    (median(figures), median(ratios))
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
