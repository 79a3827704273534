//! The locks and words that the caches are written over, so that the same code runs on the CPU's and in a model checker.

use core::sync::atomic::{AtomicU64, Ordering};

/// A family of them.
pub(super) trait Family {
    /// A lock.
    type Mutex<T: Send>: Lock<T>;
    /// A word that is read often and changed rarely.
    type Word: Word;
}

/// A lock around a value.
pub(super) trait Lock<T> {
    fn new(value: T) -> Self;
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R;
}

/// A counter. Nothing is published through it, so all of it is relaxed.
pub(super) trait Word {
    fn new() -> Self;
    fn load(&self) -> u64;
    fn increment(&self);
}

/// The CPU's.
#[derive(Debug)]
pub(super) struct Native;

impl Family for Native {
    type Mutex<T: Send> = spin::Mutex<T>;
    type Word = AtomicU64;
}

impl<T: Send> Lock<T> for spin::Mutex<T> {
    fn new(value: T) -> Self {
        Self::new(value)
    }
    #[inline]
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.lock())
    }
}

impl Word for AtomicU64 {
    fn new() -> Self {
        Self::new(0)
    }
    #[inline]
    fn load(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }
    fn increment(&self) {
        self.fetch_add(1, Ordering::Relaxed);
    }
}
