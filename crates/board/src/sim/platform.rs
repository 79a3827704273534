//! What a board gives to drivers: register windows, memory and a clock, as the traits of `portcullis-hal`.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};

use portcullis_arch::{Attributes, Pa};
use portcullis_bus::{Memory as _, SystemMemory};
use portcullis_hal::{Block, DmaMemory};

use crate::sim::machine::Machine;
use crate::sim::pool::Pool;
use crate::sim::trace::{EventKind, Tracer};

const ATTRS: Attributes = Attributes::DEVICE_DEFAULT;
/// Simulated cost of a register access.
const REGISTER_NS: u64 = 50;

/// A device's register window for a driver. A bus error reads as all ones and is dropped on a write, as a CPU that
/// ignores the external abort would see it.
#[derive(Clone)]
pub struct Registers {
    device: Arc<dyn portcullis_bus::Mmio>,
    name: Arc<str>,
    tracer: Arc<Tracer>,
}

impl Registers {
    /// The window of `device`, called `name` in the record.
    pub fn new(device: Arc<dyn portcullis_bus::Mmio>, name: &str, tracer: Arc<Tracer>) -> Self {
        Self { device, name: name.into(), tracer }
    }

    fn note(&self, offset: usize, size: u8, write: bool, value: u64) {
        if self.tracer.wants_registers() {
            let (device, offset) = (self.name.clone(), offset as u64);
            self.tracer.push(REGISTER_NS, EventKind::Register { device, offset, size, write, value });
        } else {
            self.tracer.advance(REGISTER_NS);
        }
    }
}

impl portcullis_hal::Mmio for Registers {
    fn read32(&self, offset: usize) -> u32 {
        let value = self.device.read32(offset as u64).unwrap_or(u32::MAX);
        self.note(offset, 4, false, value.into());
        value
    }
    fn write32(&self, offset: usize, value: u32) {
        self.note(offset, 4, true, value.into());
        let _ = self.device.write32(offset as u64, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        let value = self.device.read64(offset as u64).unwrap_or(u64::MAX);
        self.note(offset, 8, false, value);
        value
    }
    fn write64(&self, offset: usize, value: u64) {
        self.note(offset, 8, true, value);
        let _ = self.device.write64(offset as u64, value);
    }
}

/// The board's memory for drivers: allocation from the pool, access through the CPU's view.
#[derive(Clone)]
pub struct Memory {
    system: SystemMemory,
    pool: Arc<Pool>,
}

impl Memory {
    /// Memory `system` (the CPU's view) with allocations from `pool`.
    pub fn new(system: SystemMemory, pool: Arc<Pool>) -> Self {
        Self { system, pool }
    }
    /// The pool behind it.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }
}

impl DmaMemory for Memory {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        let block = self.pool.alloc(len, align)?;
        let zeros = [0u8; 4096];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(zeros.len());
            self.write(block.pa.wrapping_add(at as u64), &zeros[..n]);
            at += n;
        }
        Some(block)
    }
    fn free(&self, block: Block) {
        self.pool.free(block);
    }
    #[inline]
    fn load64(&self, pa: Pa) -> u64 {
        self.system.load64(pa, ATTRS).unwrap_or(0)
    }
    #[inline]
    fn store64(&self, pa: Pa, value: u64) {
        // Outside RAM there is nothing to corrupt: the store is dropped, as the trait allows.
        let _ = self.system.store64(pa, value);
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        match self.system.cas64(pa, ATTRS, expected, new) {
            Ok(held) if held == expected => Ok(()),
            Ok(held) => Err(held),
            Err(_) => Err(0),
        }
    }
    #[inline]
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        if self.system.load_run(pa, words).is_err() {
            words.fill(0);
        }
    }
    #[inline]
    fn store_run(&self, pa: Pa, count: usize, first: u64, step: u64) {
        let _ = self.system.store_run(pa, count, first, step);
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        if self.system.read(pa, ATTRS, buf).is_err() {
            buf.fill(0);
        }
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        let _ = self.system.write(pa, ATTRS, buf);
    }
    #[inline]
    fn clean(&self, pa: Pa, len: usize) {
        self.system.clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.system.invalidate(pa, len);
    }
    #[inline]
    fn wmb(&self) {
        fence(Ordering::Release);
    }
}

/// The board's clock: a driver's delay is when engines work.
#[derive(Clone)]
pub struct Clock {
    machine: Weak<Machine>,
    tracer: Arc<Tracer>,
}

impl Clock {
    pub(crate) fn new(machine: Weak<Machine>, tracer: Arc<Tracer>) -> Self {
        Self { machine, tracer }
    }
}

impl portcullis_hal::Clock for Clock {
    fn now_ns(&self) -> u64 {
        self.tracer.now()
    }
    fn delay_us(&self, us: u64) {
        let until = self.tracer.now().saturating_add(us.saturating_mul(1000));
        if let Some(machine) = self.machine.upgrade() {
            machine.run_until(until);
        }
        self.tracer.advance(until.saturating_sub(self.tracer.now()));
    }
}
