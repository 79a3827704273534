//! The atomics that [`Ring`](super::ring::Ring) is written over, so that the same code runs on the CPU's and in a model checker.

use core::sync::atomic::{AtomicU64, Ordering};

/// A family of atomics.
pub(super) trait Atomics {
    /// A 64-bit word.
    type U64: Atomic64;
}

/// The operations of a 64-bit atomic that are used.
pub(super) trait Atomic64 {
    fn new(value: u64) -> Self;
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    fn fetch_add(&self, value: u64, order: Ordering) -> u64;
    fn fetch_xor(&self, value: u64, order: Ordering) -> u64;
    fn fetch_max(&self, value: u64, order: Ordering) -> u64;
    fn compare_exchange(&self, old: u64, new: u64, ok: Ordering, fail: Ordering) -> Result<u64, u64>;
}

/// Implements [`Atomic64`] for a type that has the methods already.
macro_rules! atomic64 {
    ($type:ty) => {
        impl $crate::smmuv3::cmdq::atomics::Atomic64 for $type {
            fn new(value: u64) -> Self {
                <$type>::new(value)
            }
            fn load(&self, order: core::sync::atomic::Ordering) -> u64 {
                <$type>::load(self, order)
            }
            fn store(&self, value: u64, order: core::sync::atomic::Ordering) {
                <$type>::store(self, value, order);
            }
            fn fetch_add(&self, value: u64, order: core::sync::atomic::Ordering) -> u64 {
                <$type>::fetch_add(self, value, order)
            }
            fn fetch_xor(&self, value: u64, order: core::sync::atomic::Ordering) -> u64 {
                <$type>::fetch_xor(self, value, order)
            }
            fn fetch_max(&self, value: u64, order: core::sync::atomic::Ordering) -> u64 {
                <$type>::fetch_max(self, value, order)
            }
            fn compare_exchange(
                &self,
                old: u64,
                new: u64,
                ok: core::sync::atomic::Ordering,
                fail: core::sync::atomic::Ordering,
            ) -> Result<u64, u64> {
                <$type>::compare_exchange(self, old, new, ok, fail)
            }
        }
    };
}
#[cfg(test)]
pub(super) use atomic64;

/// The CPU's atomics.
#[derive(Debug)]
pub(super) struct Native;

impl Atomics for Native {
    type U64 = AtomicU64;
}

atomic64!(AtomicU64);
