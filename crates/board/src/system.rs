//! The software side of a board: drivers bound to the machine's devices and the IOMMU core over them, as an operating
//! system has it after boot.
//!
//! [`System::boot`] probes the SMMU, enters every engine with the streams that its device-tree node declares, and binds an
//! engine driver to each. It takes interrupts when [`System::settle`] is called: engines work, lines rise, handlers run,
//! until nothing moves any more.

use std::collections::BTreeMap;
use std::sync::Arc;

use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_drivers::ops::{IommuOps, StreamMatch};
use portcullis_drivers::smmuv2::{self, ProbeError};
use portcullis_drivers::zdma::{self, DescriptorPool, POOL_BYTES, ZdmaError};
use portcullis_drivers::{plwriter, zdma::Zdma};
use portcullis_hal::DmaMemory;
use portcullis_iommu::{DefaultDomain, DeviceId, Domain, FwSpec, InstanceId, IommuCore, Prot};
use thiserror::Error;

use crate::machine::Streams;
use crate::sim::{Clock, EngineKind, EngineSlot, Machine, Memory, Registers, Stuck};

/// The SMMU driver on a board.
pub type Smmu = smmuv2::SmmuV2<Registers, Memory, Clock>;

/// How to boot.
#[derive(Clone, Debug, Default)]
pub struct BootOptions {
    /// The domain of a device that nobody has attached.
    pub default_domain: DefaultDomain,
    /// Streams that no device has claimed bypass the SMMU (`arm-smmu.disable_bypass=0`).
    pub bypass_unmatched: bool,
    /// Streams to use for a device instead of those of its node: what a mistake in the device tree would be.
    pub streams: BTreeMap<String, Vec<u32>>,
}

/// A board on which the software does not start.
#[derive(Debug, Error)]
pub enum BootError {
    /// The SMMU refused.
    #[error("{path}: {error}")]
    Probe {
        /// Its node.
        path: String,
        /// Why.
        error: ProbeError,
    },
    /// A device could not be entered.
    #[error("{device}: {error}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        error: portcullis_iommu::Error,
    },
    /// A channel's driver refused.
    #[error("{channel}: {error}")]
    Channel {
        /// Its name.
        channel: String,
        /// Why.
        error: ZdmaError,
    },
    /// No memory for a channel's descriptors.
    #[error("{channel}: no memory for descriptors")]
    NoMemory {
        /// The channel.
        channel: String,
    },
    /// A boot option names a device that the board does not have.
    #[error("there is no device {0:?} on this board")]
    UnknownDevice(String),
}

/// A DMA channel with its driver.
pub struct Channel {
    /// Its name, as [`EngineSlot::name`](crate::sim::EngineSlot::name).
    pub name: Arc<str>,
    /// Its index in [`Machine::engines`].
    pub slot: usize,
    /// Its device at the IOMMU core; `None` if the tree does not put it behind an IOMMU.
    pub device: Option<DeviceId>,
    /// Its interrupt.
    pub interrupt: Option<u32>,
    /// The driver.
    pub driver: Zdma<Registers, Memory>,
}

/// A PL writer with its driver.
pub struct Writer {
    /// Its name.
    pub name: Arc<str>,
    /// Its index in [`Machine::engines`].
    pub slot: usize,
    /// Its device at the IOMMU core.
    pub device: Option<DeviceId>,
    /// The driver.
    pub driver: plwriter::PlWriter<Registers>,
}

/// An SMMU with its driver.
pub struct BoundSmmu {
    /// Index in [`MachineDescription::smmus`](crate::MachineDescription::smmus).
    pub index: usize,
    /// Its instance at the IOMMU core.
    pub instance: InstanceId,
    /// The driver.
    pub driver: Arc<Smmu>,
}

/// A booted board.
pub struct System {
    machine: Arc<Machine>,
    core: IommuCore,
    smmus: Vec<BoundSmmu>,
    channels: Vec<Channel>,
    writers: Vec<Writer>,
}

/// Rounds of work and interrupts that [`System::settle`] makes at most.
const ROUNDS: u64 = 100_000;
/// Steps of the machine in one round.
const STEPS: u64 = 1_000_000;

impl System {
    /// Boots the software of a machine.
    ///
    /// # Errors
    /// Names the device that did not come up.
    pub fn boot(machine: Arc<Machine>, options: &BootOptions) -> Result<Self, BootError> {
        let core = IommuCore::new(options.default_domain);
        let mut smmus = Vec::new();
        for slot in machine.smmus() {
            let Some(node) = machine.description().smmus.get(slot.index) else { continue };
            let compatible = match node.kind {
                crate::compatible::Kind::Mmu500 => "arm,mmu-500",
                _ => "arm,smmu-v2",
            };
            let driver = Smmu::probe(
                machine.registers_of(slot),
                machine.dma_memory(),
                machine.clock(),
                smmuv2::Options {
                    bypass_unmatched: options.bypass_unmatched,
                    coherent_walk: Some(node.dma_coherent),
                    ..smmuv2::Options::new(node.region.size, compatible)
                },
            )
            .map_err(|error| BootError::Probe { path: node.node.path.clone(), error })?;
            let driver = Arc::new(driver);
            let instance = core.register(&node.node.name, driver.clone());
            smmus.push(BoundSmmu { index: slot.index, instance, driver });
        }
        let mut system = Self { machine, core, smmus, channels: Vec::new(), writers: Vec::new() };
        for name in options.streams.keys() {
            if system.machine.engine(name).is_none() {
                return Err(BootError::UnknownDevice(name.clone()));
            }
        }
        system.bind_engines(options)?;
        Ok(system)
    }

    fn bind_engines(&mut self, options: &BootOptions) -> Result<(), BootError> {
        let machine = self.machine.clone();
        let memory = machine.dma_memory();
        for (slot, engine) in machine.engines().iter().enumerate() {
            let registers = machine.engine_registers(engine);
            let streams = self.streams_of(engine, options.streams.get(&*engine.name));
            let mut pool = None;
            if matches!(engine.engine, EngineKind::Zdma(_)) {
                let no_memory = || BootError::NoMemory { channel: engine.name.to_string() };
                pool = Some(memory.alloc(POOL_BYTES, 4096).ok_or_else(no_memory)?);
            }
            let device = self.enter(engine, &streams)?;
            match pool {
                Some(block) => {
                    let pool = DescriptorPool { block, iova: Iova(block.pa.get()) };
                    let config = zdma::Config { coherent: engine.coherent };
                    let driver = Zdma::new(registers, memory.clone(), pool, config)
                        .map_err(|error| BootError::Channel { channel: engine.name.to_string(), error })?;
                    let (name, interrupt) = (engine.name.clone(), engine.interrupt);
                    self.channels.push(Channel { name, slot, device, interrupt, driver });
                }
                None => {
                    let driver = plwriter::PlWriter::new(registers);
                    self.writers.push(Writer { name: engine.name.clone(), slot, device, driver });
                }
            }
        }
        Ok(())
    }

    /// The streams that software believes a device has at the SMMU in front of it.
    fn streams_of(&self, engine: &EngineSlot, instead: Option<&Vec<u32>>) -> Vec<StreamMatch> {
        if let Some(ids) = instead {
            return ids.iter().map(|id| StreamMatch::exact(*id)).collect();
        }
        let d = self.machine.description();
        let none = Streams::default();
        let streams = d
            .dma_channels
            .iter()
            .map(|c| (&c.node.path, &c.streams))
            .chain(d.pl_writers.iter().map(|w| (&w.node.path, &w.streams)))
            .find(|(path, _)| **path == engine.path)
            .map_or(&none, |(_, s)| s);
        let here = streams.declared.iter().filter(|s| Some(s.smmu) == engine.smmu);
        here.map(|s| StreamMatch::masked(s.id.get(), s.mask)).collect()
    }

    /// Enters a device, if an SMMU is in front of it and software knows streams of it.
    fn enter(&self, engine: &EngineSlot, streams: &[StreamMatch]) -> Result<Option<DeviceId>, BootError> {
        let Some(smmu) = self.smmus.iter().find(|s| Some(s.index) == engine.smmu) else { return Ok(None) };
        if streams.is_empty() {
            return Ok(None);
        }
        let spec = FwSpec { streams: streams.to_vec() };
        let device = self.core.add_device(&engine.name, smmu.instance, &spec, &[]);
        device.map(Some).map_err(|error| BootError::Device { device: engine.name.to_string(), error })
    }

    /// The hardware.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }
    /// The IOMMU core.
    pub fn core(&self) -> &IommuCore {
        &self.core
    }
    /// The SMMU's instance at the core and its driver; the first of several.
    pub fn smmu(&self) -> Option<(InstanceId, &Arc<Smmu>)> {
        self.smmus.first().map(|s| (s.instance, &s.driver))
    }
    /// All SMMUs in use, in the order of [`Machine::smmus`].
    pub fn smmus(&self) -> &[BoundSmmu] {
        &self.smmus
    }
    /// The DMA channels.
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }
    /// The PL writers.
    pub fn writers(&self) -> &[Writer] {
        &self.writers
    }
    /// A channel by name.
    pub fn channel(&self, name: &str) -> Option<&Channel> {
        self.channels.iter().find(|c| &*c.name == name)
    }
    /// A PL writer by name.
    pub fn writer(&self, name: &str) -> Option<&Writer> {
        self.writers.iter().find(|w| &*w.name == name)
    }
    /// A device by the name of its engine.
    pub fn device(&self, name: &str) -> Option<DeviceId> {
        self.core.find_device(name)
    }
    /// The name of the device that declared a stream.
    pub fn owner_of(&self, stream: StreamId) -> Option<String> {
        let devices = self.core.devices().into_iter();
        devices.filter_map(|d| self.core.device(d).ok()).find_map(|d| {
            let mine = |s: &StreamMatch| (s.id ^ stream.get()) & !s.mask == 0;
            d.streams.iter().any(mine).then_some(d.name)
        })
    }

    /// Makes a channel's descriptors reachable in a domain, at their own address, so that scatter-gather lists work in it.
    /// A page that is there already is left as it is.
    pub fn map_descriptors(
        &self,
        channel: &Channel,
        domain: &Domain,
    ) -> Result<(), portcullis_iommu::IommuError> {
        let pool = channel.driver.pool();
        if domain.iova_to_phys(pool.iova).is_some() {
            return Ok(());
        }
        let pages = domain.ops().page_sizes();
        let page = 1u64 << pages.trailing_zeros().min(63);
        let (first, end) = (pool.iova.get() & !(page - 1), pool.iova.get() + pool.block.len as u64);
        let len = (end - first).next_multiple_of(page);
        let prot = Prot::READ.noexec();
        // A channel that snoops writes its lists without cleaning them, so its fetches have to stay cacheable.
        let coherent = self.machine.engines().get(channel.slot).is_some_and(|e| e.coherent);
        let prot = if coherent { prot.cached() } else { prot };
        domain.map(Iova(first), Pa(pool.block.pa.get() & !(page - 1)), len, prot)
    }

    /// Lets engines work and interrupts be handled until nothing moves.
    ///
    /// # Errors
    /// Some engine works without end, or some interrupt comes again and again although it is handled each time.
    pub fn settle(&self) -> Result<(), Stuck> {
        for _ in 0..ROUNDS {
            self.machine.run(STEPS)?;
            if self.take_interrupts() == 0 && !self.machine.step() {
                return Ok(());
            }
        }
        self.machine.run(STEPS)?;
        let lines = self.machine.tracer().lines().pending();
        let engines =
            lines.iter().map(|line| format!("whoever raises interrupt {line} again and again")).collect();
        Err(Stuck { steps: ROUNDS, engines })
    }

    /// Runs the handlers of all lines that are high. Returns how many of them had something to do.
    pub fn take_interrupts(&self) -> usize {
        let mut handled = 0;
        for line in self.machine.tracer().lines().pending() {
            for (slot, smmu) in self.machine.smmus().iter().zip(&self.smmus) {
                if slot.interrupts.contains(&line) {
                    handled += self.core.handle_irq(smmu.instance).unwrap_or(0);
                }
            }
            for channel in self.channels.iter().filter(|c| c.interrupt == Some(line)) {
                handled += usize::from(channel.driver.handle_irq().is_some());
            }
        }
        handled
    }

    /// What the SMMUs can do, in a line each.
    pub fn describe(&self) -> String {
        if self.smmus.is_empty() {
            return "no SMMU in use: devices reach memory directly".to_string();
        }
        let one = |s: &BoundSmmu| IommuOps::describe(&*s.driver);
        self.smmus.iter().map(one).collect::<Vec<_>>().join("\n")
    }
}
