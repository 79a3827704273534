//! The hardware of a board, running.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::{Pa, StreamId};
use portcullis_bus::mmio::Shared;
use portcullis_bus::{Activity, BusError, Engine, SystemMemory};
use portcullis_engines::{PlWriter, Zdma};
use portcullis_smmuv2::SmmuV2;

use crate::MachineDescription;
use crate::sim::platform::{Clock, Memory, Registers};
use crate::sim::pool::Pool;
use crate::sim::trace::{EventKind, Tracer};

/// An engine of the machine.
#[derive(Clone)]
pub enum EngineKind {
    /// A ZDMA channel.
    Zdma(Shared<Zdma>),
    /// A PL writer.
    PlWriter(Shared<PlWriter>),
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
    /// Its interrupt (SPI), if it has one.
    pub interrupt: Option<u32>,
    /// Its DMA is coherent with the CPU's caches.
    pub coherent: bool,
    /// Bits of its data bus; 0 where it does not say.
    pub bus_width: u32,
    /// The model.
    pub engine: EngineKind,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EngineSlot {
    fn step(&self, now: u64) -> Activity {
        match &self.engine {
            EngineKind::Zdma(e) => lock(e).step(now),
            EngineKind::PlWriter(e) => lock(e).step(now),
        }
    }

    /// Its registers as a bus device.
    pub fn mmio(&self) -> Arc<dyn portcullis_bus::Mmio> {
        match &self.engine {
            EngineKind::Zdma(e) => e.clone(),
            EngineKind::PlWriter(e) => e.clone(),
        }
    }
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
    pub(crate) smmu: Option<Arc<SmmuV2<SystemMemory>>>,
    pub(crate) smmu_interrupts: Vec<u32>,
    pub(crate) engines: Vec<EngineSlot>,
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
    /// The SMMU, if the tree has one that is enabled.
    pub fn smmu(&self) -> Option<&Arc<SmmuV2<SystemMemory>>> {
        self.smmu.as_ref()
    }
    /// The SMMU's interrupt lines (SPI numbers), each once.
    pub fn smmu_interrupts(&self) -> &[u32] {
        &self.smmu_interrupts
    }
    /// Its engines, in the order of the tree.
    pub fn engines(&self) -> &[EngineSlot] {
        &self.engines
    }
    /// The engine of this name or node path.
    pub fn engine(&self, name: &str) -> Option<&EngineSlot> {
        self.engines.iter().find(|e| &*e.name == name || e.path == name)
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
    /// The SMMU's registers for (non-secure) drivers.
    pub fn smmu_registers(&self) -> Option<Registers> {
        let smmu = self.smmu.as_ref()?;
        Some(Registers::new(Arc::new(smmu.window(false)), "smmu", self.tracer.clone()))
    }
    /// An engine's registers for drivers.
    pub fn engine_registers(&self, engine: &EngineSlot) -> Registers {
        Registers::new(engine.mmio(), &engine.name, self.tracer.clone())
    }

    /// A register window by physical address: the device's name, its registers, and the offset of `pa` in them.
    pub fn window_at(&self, pa: Pa) -> Result<(Registers, u64), BusError> {
        if let Some((_, smmu)) = self.description.smmu()
            && let Some(registers) = self.smmu_registers()
            && let Some(offset) = pa.get().checked_sub(smmu.region.base.get())
            && offset < smmu.region.size
        {
            return Ok((registers, offset));
        }
        self.engines
            .iter()
            .find_map(|e| {
                let offset = pa.get().checked_sub(e.base.get()).filter(|o| *o < e.size)?;
                Some((self.engine_registers(e), offset))
            })
            .ok_or(BusError::Decode)
    }

    /// Steps every engine once. True if one worked.
    pub fn step(&self) -> bool {
        let mut worked = false;
        for engine in &self.engines {
            worked |= engine.step(self.tracer.now()) == Activity::Busy;
        }
        self.tracer.advance(10);
        self.note_stale_reads();
        worked
    }

    /// Runs until every engine is idle or stalled.
    ///
    /// # Errors
    /// Some engine still works after `max_steps` steps.
    pub fn run(&self, max_steps: u64) -> Result<(), Stuck> {
        for _ in 0..max_steps {
            if !self.step() {
                return Ok(());
            }
        }
        let now = self.tracer.now();
        let busy = self.engines.iter().filter(|e| e.step(now) == Activity::Busy);
        Err(Stuck { steps: max_steps, engines: busy.map(|e| e.name.to_string()).collect() })
    }

    /// Runs until the engines rest or the clock reaches `until`.
    pub(crate) fn run_until(&self, until: u64) {
        while self.tracer.now() < until && self.step() {}
    }

    fn note_stale_reads(&self) {
        let Some(cache) = self.memory.cpu_cache() else { return };
        for report in cache.take_reports().0 {
            self.tracer.push(0, EventKind::Stale(report));
        }
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
