//! An SMMUv3 model with its driver on it and nothing else: memory that can be made to abort, registers and table stores that
//! a test can look in on, real time.
//!
//! [`Rig`] is the hardware, [`Rig::driver`] probes it. A [`Spy`] is called after every store of the driver to memory or to a
//! register, so that a test sees every state that a device could meet.
#![allow(dead_code, missing_docs)]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_board::sim::{Memory as BoardMemory, Pool};
use portcullis_bus::{
    BusError, DmaError, DmaPort as _, Initiator, InterruptSink, Memory, SystemMemory, View,
};
use portcullis_drivers::ops::{MasterOptions, StreamMatch};
use portcullis_drivers::smmuv3::{self, Domain, Options, Parts};
use portcullis_hal::{Block, DmaMemory};
use portcullis_iommu::Prot;
use portcullis_smmuv3::{Caps, Interrupts, Port, SmmuV3};

/// RAM, whose first half the driver allocates from.
pub const BASE: u64 = 0x8000_0000;
pub const BYTES: u64 = 0x400_0000;
/// The half for tests.
pub const RAM: u64 = BASE + BYTES / 2;

/// A random number generator that is the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// Memory of which one range can be made to abort for the SMMU.
#[derive(Clone)]
pub struct Bus {
    ram: SystemMemory,
    bad: Arc<(AtomicU64, AtomicU64)>,
    /// Reads in the range work.
    readable: Arc<AtomicBool>,
}

impl Bus {
    /// Nothing aborts any more.
    pub fn heal(&self) {
        self.bad.1.store(0, Ordering::Relaxed);
    }

    fn check(&self, pa: Pa, len: usize) -> Result<(), BusError> {
        if self.readable.load(Ordering::Relaxed) { Ok(()) } else { self.check_write(pa, len) }
    }

    fn check_write(&self, pa: Pa, len: usize) -> Result<(), BusError> {
        let end = self.bad.1.load(Ordering::Relaxed);
        let bad = pa.get() < end && pa.get() + len as u64 > self.bad.0.load(Ordering::Relaxed);
        if bad { Err(BusError::Decode) } else { Ok(()) }
    }
}

impl Memory for Bus {
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.check(pa, buf.len())?;
        self.ram.read(pa, attrs, buf)
    }
    fn write(&self, pa: Pa, attrs: Attributes, buf: &[u8]) -> Result<(), BusError> {
        self.check_write(pa, buf.len())?;
        self.ram.write(pa, attrs, buf)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        self.check(pa, 8)?;
        self.ram.load64(pa, attrs)
    }
    fn load64s(&self, pa: Pa, attrs: Attributes, words: &mut [u64]) -> Result<(), BusError> {
        self.check(pa, words.len() * 8)?;
        self.ram.load64s(pa, attrs, words)
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        self.check(pa, 4)?;
        self.ram.load32(pa, attrs)
    }
    fn cas64(&self, pa: Pa, attrs: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        self.check(pa, 8)?;
        self.ram.cas64(pa, attrs, expected, new)
    }
}

pub type Model = SmmuV3<Bus>;
type Look = dyn FnMut() + Send;

thread_local!(static LOOKING: Cell<bool> = const { Cell::new(false) });

/// Looks in after every store of the driver.
#[derive(Clone, Default)]
pub struct Spy {
    on: Arc<AtomicBool>,
    look: Arc<Mutex<Option<Box<Look>>>>,
}

impl Spy {
    pub fn set(&self, look: impl FnMut() + Send + 'static) {
        *self.look.lock().unwrap() = Some(Box::new(look));
        self.on.store(true, Ordering::Release);
    }
    pub fn clear(&self) {
        self.on.store(false, Ordering::Release);
        *self.look.lock().unwrap() = None;
    }
    fn call(&self) {
        if self.on.load(Ordering::Acquire) && !LOOKING.replace(true) {
            if let Some(look) = &mut *self.look.lock().unwrap() {
                look();
            }
            LOOKING.set(false);
        }
    }
}

/// The registers for the driver; the model behind them can be replaced.
#[derive(Clone)]
pub struct Regs {
    pub model: Arc<RwLock<Arc<Model>>>,
    spy: Spy,
}

impl Regs {
    fn read(&self, offset: usize, size: usize) -> u64 {
        let model = self.model.read().unwrap().clone();
        let mut bytes = [0; 8];
        model.mmio_read(offset as u64, &mut bytes[..size]).unwrap();
        u64::from_le_bytes(bytes)
    }
    fn write(&self, offset: usize, value: u64, size: usize) {
        let model = self.model.read().unwrap().clone();
        model.mmio_write(offset as u64, &value.to_le_bytes()[..size]).unwrap();
        self.spy.call();
    }
}

impl portcullis_hal::Mmio for Regs {
    fn read32(&self, offset: usize) -> u32 {
        self.read(offset, 4) as u32
    }
    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, value.into(), 4);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.read(offset, 8)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.write(offset, value, 8);
    }
}

/// Memory for the driver.
#[derive(Clone)]
pub struct Mem {
    memory: BoardMemory,
    spy: Spy,
    before: Spy,
}

impl DmaMemory for Mem {
    fn alloc(&self, len: usize, align: usize) -> Option<Block> {
        self.memory.alloc(len, align)
    }
    fn free(&self, block: Block) {
        // Whoever still uses it finds nonsense.
        self.memory.write(block.pa, &vec![0xdb; block.len]);
        self.memory.free(block);
        self.spy.call();
    }
    fn load64(&self, pa: Pa) -> u64 {
        self.before.call();
        self.memory.load64(pa)
    }
    fn load_run(&self, pa: Pa, words: &mut [u64]) {
        self.before.call();
        self.memory.load_run(pa, words);
    }
    fn store64(&self, pa: Pa, value: u64) {
        self.memory.store64(pa, value);
        self.spy.call();
    }
    fn cas64(&self, pa: Pa, expected: u64, new: u64) -> Result<(), u64> {
        let swapped = self.memory.cas64(pa, expected, new);
        self.spy.call();
        swapped
    }
    fn read(&self, pa: Pa, buf: &mut [u8]) {
        self.memory.read(pa, buf);
    }
    fn write(&self, pa: Pa, buf: &[u8]) {
        self.memory.write(pa, buf);
        self.spy.call();
    }
    fn clean(&self, pa: Pa, len: usize) {
        self.memory.clean(pa, len);
    }
    fn invalidate(&self, pa: Pa, len: usize) {
        self.memory.invalidate(pa, len);
    }
    fn wmb(&self) {
        self.memory.wmb();
    }
}

#[derive(Clone)]
pub struct RealTime(Instant);

impl portcullis_hal::Clock for RealTime {
    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
    fn delay_us(&self, us: u64) {
        if us < 20 { std::thread::yield_now() } else { std::thread::sleep(Duration::from_micros(us)) }
    }
}

/// Counts interrupts.
#[derive(Default)]
pub struct Lines(Mutex<BTreeMap<u32, u64>>);

impl InterruptSink for Lines {
    fn set_level(&self, line: u32, high: bool) {
        *self.0.lock().unwrap().entry(line).or_default() += u64::from(high);
    }
}

impl Lines {
    pub fn rises(&self, line: u32) -> u64 {
        self.0.lock().unwrap().get(&line).copied().unwrap_or(0)
    }
}

pub type OnRig = Parts<Regs, Mem, RealTime>;
pub type Driver = smmuv3::SmmuV3<OnRig>;
pub type RigDomain = Domain<OnRig>;

/// What most tests use: everything, with numbers of a reasonable size.
pub fn caps() -> Caps {
    Caps {
        sid_bits: 16,
        ssid_bits: 8,
        secure: None,
        oas_bits: 44,
        ds: false,
        va52: false,
        cmdq_log2: 10,
        eventq_log2: 10,
        priq_log2: 8,
        ..Caps::full()
    }
}

pub struct Rig {
    pub ram: SystemMemory,
    pub bus: Bus,
    pub caps: Caps,
    pub registers: Regs,
    pub pool: Arc<Pool>,
    pub lines: Arc<Lines>,
    pub spy: Spy,
    /// Called before every load of the driver.
    pub before: Spy,
}

pub const LINES: [u32; 4] = [1, 2, 3, 4];

impl Rig {
    pub fn new(caps: Caps) -> Self {
        let regions = [(BASE, BYTES)];
        // Where nothing snoops there is a CPU cache that can be noticed.
        let ram = match caps.coherent {
            true => SystemMemory::new(&regions),
            false => SystemMemory::with_cpu_cache(&regions, 1 << 14),
        }
        .unwrap();
        let bus =
            Bus { ram: ram.view(View::NonCoherent, "smmu"), bad: Arc::default(), readable: Arc::default() };
        let lines = Arc::new(Lines::default());
        let model = build(&caps, &bus, &lines);
        let spy = Spy::default();
        let registers = Regs { model: Arc::new(RwLock::new(model)), spy: spy.clone() };
        let pool = Arc::new(Pool::new(Pa(BASE), (BYTES / 2).trailing_zeros()));
        Self { ram, bus, caps, registers, pool, lines, spy, before: Spy::default() }
    }

    pub fn model(&self) -> Arc<Model> {
        self.registers.model.read().unwrap().clone()
    }

    /// Another SMMU of the same kind on the same bus.
    pub fn another(&self) -> Arc<Model> {
        build(&self.caps, &self.bus, &self.lines)
    }

    pub fn memory(&self) -> Mem {
        Mem {
            memory: BoardMemory::new(self.ram.clone(), self.pool.clone()),
            spy: self.spy.clone(),
            before: self.before.clone(),
        }
    }

    pub fn options() -> Options {
        Options { timeout_us: 2_000_000, ..Options::new(0x2_0000) }
    }

    pub fn driver(&self) -> Driver {
        self.driver_with(Self::options())
    }

    pub fn driver_with(&self, options: Options) -> Driver {
        Driver::probe(self.registers.clone(), self.memory(), RealTime(Instant::now()), options).unwrap()
    }

    pub fn port(&self) -> Port<Bus> {
        self.model().port(self.bus.clone())
    }

    /// From here on the SMMU and devices cannot reach a range; an empty one ends this.
    pub fn make_bad(&self, range: Range<u64>) {
        self.bus.bad.0.store(range.start, Ordering::Relaxed);
        self.bus.bad.1.store(range.end, Ordering::Relaxed);
    }

    /// The same for writes only.
    pub fn make_unwritable(&self, range: Range<u64>) {
        self.bus.readable.store(true, Ordering::Relaxed);
        self.make_bad(range);
    }

    pub fn put(&self, pa: u64, bytes: &[u8]) {
        self.ram.write(Pa(pa), Attributes::default(), bytes).unwrap();
    }
    pub fn put64(&self, pa: u64, value: u64) {
        self.put(pa, &value.to_le_bytes());
    }
    pub fn get64(&self, pa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.ram.read(Pa(pa), Attributes::default(), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
    pub fn reg(&self, offset: usize) -> u32 {
        portcullis_hal::Mmio::read32(&self.registers, offset)
    }
}

fn build(caps: &Caps, bus: &Bus, lines: &Arc<Lines>) -> Arc<Model> {
    let sink: Arc<dyn InterruptSink> = lines.clone();
    let interrupts = Interrupts::separate(&sink, LINES);
    SmmuV3::builder(caps.clone()).memory(bus.clone()).interrupts(interrupts).build().unwrap()
}

pub fn from(stream: u32) -> Initiator {
    Initiator::new(StreamId(stream))
}

pub fn from_substream(stream: u32, substream: u32) -> Initiator {
    Initiator { substream: Some(SubstreamId(substream)), ..from(stream) }
}

pub fn exact(stream: u32) -> [StreamMatch; 1] {
    [StreamMatch::exact(stream)]
}

pub fn read64(port: &mut Port<Bus>, from: Initiator, at: u64) -> Result<u64, DmaError> {
    let mut bytes = [0; 8];
    port.read(from, Iova(at), &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

pub fn write64(port: &mut Port<Bus>, from: Initiator, at: u64, value: u64) -> Result<(), DmaError> {
    port.write(from, Iova(at), &value.to_le_bytes())
}

pub fn rw() -> Prot {
    Prot::RW.noexec().cached()
}

pub fn map(domain: &RigDomain, iova: u64, pa: u64, len: u64) {
    domain.map(Iova(iova), Pa(pa), len, rw()).unwrap();
}

pub fn plain() -> MasterOptions {
    MasterOptions::default()
}
pub fn with_substreams(bits: u8) -> MasterOptions {
    MasterOptions { substream_bits: bits, ..MasterOptions::default() }
}
pub fn stalling() -> MasterOptions {
    MasterOptions { can_stall: true, ..MasterOptions::default() }
}
