//! A platform for tests: memory that misbehaves as real memory does, registers that record, a clock that obeys.
//!
//! [`FakeMemory`] is a heap of physical memory with two views, the CPU's and the devices'. It comes in kinds that
//! differ in when a CPU's store reaches the devices, so that a missing clean or barrier fails a test; it counts leaks
//! and uses of freed blocks, and can run out of memory when told. [`FakeMmio`] is a register window whose reads a
//! test scripts and whose accesses it inspects. [`FakeClock`] moves only when asked.

mod clock;
mod memory;
mod mmio;

pub use clock::FakeClock;
pub use memory::FakeMemory;
pub use mmio::{FakeMmio, MmioAccess, Registers};
