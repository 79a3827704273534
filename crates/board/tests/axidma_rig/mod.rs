//! The board with two AXI DMA cores on HP0, booted with translating default domains.
//!
//! [`Rig::core`] is a core with its driver, [`Rig::begin`] and [`Rig::end`] make a verified loop through one of them: buffers
//! from the board's memory, mapped with the DMA API, every byte compared, and what lies around the target as well.
#![allow(dead_code, missing_docs)]

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_board::os::clock::SleepingClock;
use portcullis_board::os::stack::{AxiStack, Loop, StackChannel};
use portcullis_board::sim::{EventKind, Machine, Memory, Options};
use portcullis_board::system::{BootOptions, System};
use portcullis_board::{MachineDescription, Tree};
use portcullis_bus::StaleRead;
use portcullis_drivers::dmaengine::{Direction, Segment, State, Status, WaitError};
use portcullis_hal::{Block, DmaMemory as _};
use portcullis_iommu::dma::{Direction as Way, DmaAttrs, DmaDevice};
use portcullis_iommu::{DefaultDomain, RoutedFault};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * 1024;
pub const PAGE: u64 = 4096;
pub const NONE: DmaAttrs = DmaAttrs::NONE;
/// What is around a target before and after.
const GUARD: u8 = 0xee;
/// Bytes of it on each side.
const GUARD_BYTES: u64 = 64;

pub fn description() -> MachineDescription {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/zynqmp-hp0-2dma.dtb");
    MachineDescription::from_tree(&Tree::load(file).unwrap()).unwrap()
}

/// Translating default domains, and nobody but the tests uses the cores.
pub fn options() -> BootOptions {
    BootOptions {
        default_domain: DefaultDomain::Translated,
        unbound: ["dma-proxy0", "dma-proxy1"].map(String::from).into(),
        ..BootOptions::default()
    }
}

/// Bytes that tell their place, different for each seed.
pub fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend(x.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// Memory of the board.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    block: Block,
    pub pa: Pa,
    pub len: u64,
}

pub struct Rig {
    pub system: System,
}

/// A loop under way.
pub struct Flight {
    pub core: Arc<AxiStack<Memory>>,
    pub from: Buffer,
    pub to: Buffer,
    pub source: Iova,
    pub target: Iova,
    pub running: Loop<Memory>,
    data: Vec<u8>,
}

pub fn segment(address: Iova, len: u64) -> Segment {
    Segment { address, len }
}

/// A range in pieces.
pub fn pieces(address: Iova, len: u64, piece: u64) -> Vec<Segment> {
    let starts = (0..len).step_by(piece as usize);
    starts.map(|at| segment(address.wrapping_add(at), piece.min(len - at))).collect()
}

impl Rig {
    pub fn new() -> Self {
        Self::with(|_| {})
    }
    /// The board after a change of what its tree says.
    pub fn with(change: impl FnOnce(&mut MachineDescription)) -> Self {
        let mut description = description();
        change(&mut description);
        Self::booted(description, false, &options())
    }
    /// The board with the CPU's cache.
    pub fn cached() -> Self {
        Self::booted(description(), true, &options())
    }
    pub fn booted(description: MachineDescription, cpu_cache: bool, boot: &BootOptions) -> Self {
        let options = Options { cpu_cache, ..Options::default() };
        let machine = Machine::build(description, options).unwrap();
        Self { system: System::boot(machine, boot).unwrap() }
    }

    pub fn machine(&self) -> &Arc<Machine> {
        self.system.machine()
    }
    pub fn memory(&self) -> Memory {
        self.machine().dma_memory()
    }
    pub fn clock(&self) -> SleepingClock {
        self.system.os().host().clock()
    }
    /// A core with the host's driver.
    pub fn core(&self, n: usize) -> Arc<AxiStack<Memory>> {
        self.system.os().axi().get(&format!("axidma{n}")).unwrap()
    }
    pub fn tx(&self, n: usize) -> Arc<StackChannel<Memory>> {
        self.core(n).channel(Direction::MemToDev).unwrap()
    }
    pub fn rx(&self, n: usize) -> Arc<StackChannel<Memory>> {
        self.core(n).channel(Direction::DevToMem).unwrap()
    }
    pub fn settle(&self) {
        self.system.settle().unwrap();
    }

    /// Memory with guard bytes around it, `offset` bytes behind the beginning of a page.
    pub fn buffer(&self, offset: u64, len: u64) -> Buffer {
        let lead = (offset + GUARD_BYTES).next_multiple_of(PAGE) + offset % PAGE;
        let whole = lead + len + GUARD_BYTES;
        let block = self.memory().alloc(whole as usize, PAGE as usize).unwrap();
        let buffer = Buffer { block, pa: block.pa.wrapping_add(lead), len };
        let guards = [buffer.pa.get() - GUARD_BYTES, buffer.pa.get() + len];
        for at in guards {
            self.put(Pa(at), &[GUARD; GUARD_BYTES as usize]);
        }
        buffer
    }
    pub fn free(&self, buffer: Buffer) {
        self.memory().free(buffer.block);
    }
    /// The CPU writes, without any maintenance.
    pub fn put(&self, pa: Pa, bytes: &[u8]) {
        self.memory().write(pa, bytes);
    }
    /// The CPU reads, without any maintenance.
    pub fn get(&self, pa: Pa, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory().read(pa, &mut bytes);
        bytes
    }
    pub fn guards_hold(&self, buffer: &Buffer) -> bool {
        let guards = [buffer.pa.get() - GUARD_BYTES, buffer.pa.get() + buffer.len];
        guards.into_iter().all(|at| self.get(Pa(at), GUARD_BYTES).iter().all(|b| *b == GUARD))
    }

    /// Starts a loop of `len` bytes through a core, between buffers that begin somewhere in a page: from, to.
    pub fn begin(&self, core: usize, offsets: (u64, u64), len: u64) -> Flight {
        let core = self.core(core);
        let (from, to) = (self.buffer(offsets.0, len), self.buffer(offsets.1, len));
        let data = pattern(from.pa.get() ^ len, len);
        self.put(from.pa, &data);
        let source = core.dma().map_single(from.pa, len, Way::ToDevice, NONE).unwrap();
        let target = core.dma().map_single(to.pa, len, Way::FromDevice, NONE).unwrap();
        let running = core.begin(&[segment(target, len)], &[segment(source, len)]).unwrap();
        Flight { core, from, to, source, target, running, data }
    }

    /// Waits for a loop, and gives its memory back.
    pub fn finish(&self, flight: Flight) -> Result<u64, WaitError> {
        let ended = flight.running.wait(&self.clock(), 1_000_000);
        let Flight { core, from, to, source, target, data, .. } = flight;
        core.dma().unmap_single(source, from.len, Way::ToDevice, NONE).unwrap();
        core.dma().unmap_single(target, to.len, Way::FromDevice, NONE).unwrap();
        if ended.is_ok() {
            assert!(self.get(to.pa, to.len) == data, "{}: other bytes arrived", core.dma().name());
            assert!(self.guards_hold(&to), "{}: bytes around the target changed", core.dma().name());
        }
        self.free(from);
        self.free(to);
        ended
    }

    /// Waits for a loop, which works.
    pub fn end(&self, flight: Flight) {
        let len = flight.from.len;
        match self.finish(flight) {
            Ok(arrived) => assert_eq!(arrived, len),
            Err(error) => panic!("a loop of {len} bytes: {error}; {:#?}", self.faults()),
        }
    }

    /// A loop that works.
    pub fn loops(&self, core: usize, len: u64) {
        let flight = self.begin(core, (0, 0), len);
        self.end(flight);
    }

    /// Maps a buffer with the same data as always.
    pub fn map(&self, dma: &DmaDevice<Memory>, len: u64, way: Way) -> (Buffer, Iova) {
        let buffer = self.buffer(0, len);
        self.put(buffer.pa, &pattern(buffer.pa.get(), len));
        let iova = dma.map_single(buffer.pa, len, way, NONE).unwrap();
        (buffer, iova)
    }

    /// The faults since the last time, after the SMMU's interrupt.
    pub fn faults(&self) -> Vec<RoutedFault> {
        self.system.take_interrupts();
        let batch = self.system.core().take_faults();
        assert_eq!(batch.lost, 0);
        batch.faults
    }
    /// The one fault since the last time.
    pub fn fault(&self) -> RoutedFault {
        let faults = self.faults();
        let [fault] = faults.as_slice() else { panic!("{} faults: {faults:#?}", faults.len()) };
        fault.clone()
    }
    pub fn no_faults(&self) {
        let faults = self.faults();
        assert!(faults.is_empty(), "{faults:#?}");
    }

    /// Reads that returned old data since the last time.
    pub fn stale(&self) -> Vec<StaleRead> {
        self.machine().tracer().note_stale_reads(self.machine().memory());
        let (events, _) = self.machine().tracer().take();
        let stale = |kind| if let EventKind::Stale(stale) = kind { Some(stale) } else { None };
        events.into_iter().filter_map(|e| stale(e.kind)).collect()
    }
}

/// A transaction that has ended well.
pub fn complete(len: u64) -> Status {
    Status { state: State::Complete, transferred: len, residue: 0 }
}
