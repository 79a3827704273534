//! The hardware of a board, running.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Pa, StreamId};
use portcullis_bus::mmio::Shared;
use portcullis_bus::{Activity, BusError, Engine, SystemMemory};
use portcullis_engines::{AtcShared, AxiDma, Gem, PlWriter, TestDev, TestDevBar, Zdma};
use portcullis_smmuv2::SmmuV2;
use portcullis_smmuv3::SmmuV3;

use crate::MachineDescription;
use crate::sim::model::SmmuModel;
use crate::sim::platform::{Clock, Memory, Registers};
use crate::sim::pool::Pool;
use crate::sim::port::SharedTraffic;
use crate::sim::route::{IOU_SLCR, IOU_SLCR_SIZE, IouRoute};
use crate::sim::trace::Tracer;

/// An engine of the machine.
#[derive(Clone)]
pub enum EngineKind {
    /// A ZDMA channel.
    Zdma(Shared<Zdma>),
    /// A PL writer.
    PlWriter(Shared<PlWriter>),
    /// A PCIe test device.
    TestDevice(Shared<TestDev>),
    /// An AXI DMA core with its stream output looped back.
    AxiDma(Shared<AxiDma>),
    /// A network device's transmit DMA.
    Nic(Shared<Gem>),
}

/// An engine in its place.
pub struct EngineSlot {
    /// Short name, such as `fpd-dma0`.
    pub name: Arc<str>,
    /// Path of its device-tree node.
    pub path: String,
    /// Physical address of its registers.
    pub base: Pa,
    /// Size of its register window.
    pub size: u64,
    /// Its stream: what the hardware sends. A PL writer's follows its AXI ID register.
    pub stream: StreamId,
    /// All its streams; of an AXI DMA scatter-gather, MM2S and S2MM.
    pub streams: Vec<StreamId>,
    /// Its interrupts (SPI); of an AXI DMA MM2S and S2MM.
    pub interrupts: Vec<u32>,
    /// The SMMU it is behind (index in [`MachineDescription::smmus`]); `None` if it reaches memory directly, because no SMMU
    /// is on its way or the one there is not in use.
    pub smmu: Option<usize>,
    /// Its DMA is coherent with the CPU's caches.
    pub coherent: bool,
    /// Bits of its data bus; 0 where it does not say.
    pub bus_width: u32,
    /// The model.
    pub engine: EngineKind,
    /// What went through its port; nothing if the ports are plain ([`Options::plain_ports`](crate::sim::Options)).
    pub traffic: SharedTraffic,
    /// Its own translation cache, if it has address translation services.
    pub atc: Option<Arc<AtcShared>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EngineSlot {
    fn step(&self, now: u64) -> Activity {
        match &self.engine {
            EngineKind::Zdma(e) => lock(e).step(now),
            EngineKind::PlWriter(e) => lock(e).step(now),
            EngineKind::TestDevice(e) => lock(e).step(now),
            EngineKind::AxiDma(e) => lock(e).step(now),
            EngineKind::Nic(e) => lock(e).step(now),
        }
    }

    /// Its registers as a bus device.
    pub fn mmio(&self) -> Arc<dyn portcullis_bus::Mmio> {
        match &self.engine {
            EngineKind::Zdma(e) => e.clone(),
            EngineKind::PlWriter(e) => e.clone(),
            EngineKind::TestDevice(e) => Arc::new(TestDevBar(e.clone())),
            EngineKind::AxiDma(e) => e.clone(),
            EngineKind::Nic(e) => e.clone(),
        }
    }

    /// Puts the engine back to its state after reset.
    pub fn reset(&self) {
        match &self.engine {
            EngineKind::Zdma(e) => lock(e).reset(),
            EngineKind::PlWriter(e) => lock(e).reset(),
            EngineKind::TestDevice(e) => lock(e).reset(),
            EngineKind::AxiDma(e) => lock(e).reset(),
            EngineKind::Nic(e) => lock(e).reset(),
        }
    }
}

/// An SMMU in its place.
pub struct SmmuSlot {
    /// Index in [`MachineDescription::smmus`].
    pub index: usize,
    /// Name of its register window in the record: `smmu` for the only one, else its node's name.
    pub name: Arc<str>,
    /// Physical address of its registers.
    pub base: Pa,
    /// Size of its register window.
    pub size: u64,
    /// Its interrupt lines (SPI numbers), each once.
    pub interrupts: Vec<u32>,
    /// The model.
    pub model: SmmuModel,
}

/// Engines that did not come to rest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("after {steps} steps these engines are still at work: {}", engines.join(", "))]
pub struct Stuck {
    /// Steps made.
    pub steps: u64,
    /// Names of the engines.
    pub engines: Vec<String>,
}

/// The hardware of a board.
pub struct Machine {
    pub(crate) description: MachineDescription,
    pub(crate) memory: SystemMemory,
    pub(crate) smmus: Vec<SmmuSlot>,
    pub(crate) engines: Vec<EngineSlot>,
    pub(crate) route: Option<Arc<IouRoute>>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) tracer: Arc<Tracer>,
}

impl Machine {
    /// What it was built from.
    pub fn description(&self) -> &MachineDescription {
        &self.description
    }
    /// Memory as the CPU sees it.
    pub fn memory(&self) -> &SystemMemory {
        &self.memory
    }
    /// The SMMUs in use, in the order of the tree.
    pub fn smmus(&self) -> &[SmmuSlot] {
        &self.smmus
    }
    /// The SMMU with this index in the description, if it is in use.
    pub fn smmu_at(&self, index: usize) -> Option<&SmmuSlot> {
        self.smmus.iter().find(|s| s.index == index)
    }
    /// The SMMUv2, if the tree has one that is enabled; the first of several.
    pub fn smmu(&self) -> Option<&Arc<SmmuV2<SystemMemory>>> {
        self.smmus.iter().find_map(|s| s.model.v2())
    }
    /// The SMMUv3, if the tree has one that is enabled; the first of several.
    pub fn smmu_v3(&self) -> Option<&Arc<SmmuV3<SystemMemory>>> {
        self.smmus.iter().find_map(|s| s.model.v3())
    }
    /// Its engines, in the order of the tree.
    pub fn engines(&self) -> &[EngineSlot] {
        &self.engines
    }
    /// The engine of this name or node path.
    pub fn engine(&self, name: &str) -> Option<&EngineSlot> {
        self.engines.iter().find(|e| &*e.name == name || e.path == name)
    }
    /// IOU_INTERCONNECT_ROUTE, on a board with a network device.
    pub fn route(&self) -> Option<u32> {
        Some(self.route.as_ref()?.get())
    }
    /// Its record and clock.
    pub fn tracer(&self) -> &Arc<Tracer> {
        &self.tracer
    }

    /// Memory for drivers.
    pub fn dma_memory(&self) -> Memory {
        Memory::new(self.memory.clone(), self.pool.clone())
    }
    /// The clock for drivers.
    pub fn clock(self: &Arc<Self>) -> Clock {
        Clock::new(Arc::downgrade(self), self.tracer.clone())
    }
    /// The registers of the first SMMU for (non-secure) drivers.
    pub fn smmu_registers(&self) -> Option<Registers> {
        self.smmus.first().map(|s| self.registers_of(s))
    }
    /// An SMMU's registers for (non-secure) drivers.
    pub fn registers_of(&self, smmu: &SmmuSlot) -> Registers {
        Registers::new(smmu.model.window(), &smmu.name, self.tracer.clone())
    }
    /// An engine's registers for drivers.
    pub fn engine_registers(&self, engine: &EngineSlot) -> Registers {
        Registers::new(engine.mmio(), &engine.name, self.tracer.clone())
    }

    /// A register window by physical address: the device's name, its registers, and the offset of `pa` in them.
    pub fn window_at(&self, pa: Pa) -> Result<(Registers, u64), BusError> {
        let inside = |base: Pa, size: u64| pa.get().checked_sub(base.get()).filter(|o| *o < size);
        let smmu = self.smmus.iter().find_map(|s| Some((self.registers_of(s), inside(s.base, s.size)?)));
        let engine =
            || self.engines.iter().find_map(|e| Some((self.engine_registers(e), inside(e.base, e.size)?)));
        let route = || {
            let offset = inside(IOU_SLCR, IOU_SLCR_SIZE)?;
            let route = self.route.as_ref()?.clone();
            Some((Registers::new(route, "iou_slcr", self.tracer.clone()), offset))
        };
        smmu.or_else(engine).or_else(route).ok_or(BusError::Decode)
    }

    /// Steps one engine, by its index in [`Machine::engines`], and says what it did. The clock does not move: whoever owns
    /// the engine alone lets it work so, on a thread of its own.
    pub fn step_engine(&self, slot: usize) -> Activity {
        self.engines.get(slot).map_or(Activity::Idle, |e| e.step(self.tracer.now()))
    }
    /// Steps every engine once. True if one worked and has more to do.
    pub fn step(&self) -> bool {
        self.step_all() == Activity::Busy
    }

    /// Steps every engine once, and SMMUs that wait for something, and says what the most active engine did.
    fn step_all(&self) -> Activity {
        let rank = |a: &Activity| match a {
            Activity::Busy => (0, 0),
            Activity::Until(at) => (1, *at),
            Activity::Stalled => (2, 0),
            Activity::Idle => (3, 0),
        };
        let done = self.engines.iter().map(|e| e.step(self.tracer.now())).min_by_key(rank);
        for smmu in &self.smmus {
            smmu.model.poll();
        }
        self.tracer.advance(10);
        self.note_stale_reads();
        done.unwrap_or(Activity::Idle)
    }

    /// Steps every engine up to `max_steps` times, while one works and has more to do, and says what the most active one
    /// did last. The clock goes on with the steps only: whoever calls this lets time pass.
    pub fn work(&self, max_steps: u32) -> Activity {
        let mut activity = Activity::Idle;
        for _ in 0..max_steps {
            activity = self.step_all();
            if activity != Activity::Busy {
                break;
            }
        }
        activity
    }

    /// Runs until every engine is idle or stalled; time passes where they wait for it.
    ///
    /// # Errors
    /// Some engine still works after `max_steps` steps.
    pub fn run(&self, max_steps: u64) -> Result<(), Stuck> {
        for _ in 0..max_steps {
            match self.step_all() {
                Activity::Busy => {}
                Activity::Until(at) => self.tracer.advance_to(at),
                Activity::Stalled | Activity::Idle => return Ok(()),
            }
        }
        let now = self.tracer.now();
        let at_work = |e: &&EngineSlot| matches!(e.step(now), Activity::Busy | Activity::Until(_));
        let engines: Vec<String> = self.engines.iter().filter(at_work).map(|e| e.name.to_string()).collect();
        if engines.is_empty() { Ok(()) } else { Err(Stuck { steps: max_steps, engines }) }
    }

    /// Runs until the engines rest or so many nanoseconds have passed. For engines that work without end.
    pub fn run_for(&self, ns: u64) {
        self.run_until(self.tracer.now().saturating_add(ns));
    }

    /// Runs until the engines rest or the clock reaches `until`.
    pub(crate) fn run_until(&self, until: u64) {
        while self.tracer.now() < until {
            match self.step_all() {
                Activity::Busy => {}
                Activity::Until(at) if at < until => self.tracer.advance_to(at),
                _ => return,
            }
        }
    }

    fn note_stale_reads(&self) {
        self.tracer.note_stale_reads(&self.memory);
    }

    /// The CPU reads memory; stale reads are written down.
    pub fn cpu_read(&self, pa: Pa, buf: &mut [u8]) -> Result<(), BusError> {
        let result = portcullis_bus::Memory::read(&self.memory, pa, Default::default(), buf);
        self.note_stale_reads();
        result
    }

    /// The CPU writes memory.
    pub fn cpu_write(&self, pa: Pa, buf: &[u8]) -> Result<(), BusError> {
        portcullis_bus::Memory::write(&self.memory, pa, Default::default(), buf)
    }
}
