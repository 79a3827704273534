//! The software side of a board: drivers bound to the machine's devices and the IOMMU core over them, as an operating
//! system has it after boot.
//!
//! [`System::boot`] probes the SMMUs of either kind, enters every engine with the streams that its device-tree node (or
//! its bridge's `iommu-map`) declares, and binds an engine driver to each. It takes interrupts when [`System::settle`] is called: engines work, lines rise, handlers run,
//! until nothing moves any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_drivers::gem::{self, Gem};
use portcullis_drivers::ops::{IommuOps, MasterOptions, StreamMatch};
use portcullis_drivers::smmuv2::{self, ProbeError};
use portcullis_drivers::smmuv3::{self, MsiTarget, MsiTargets, Parts};
use portcullis_drivers::testdev::TestDevice;
use portcullis_drivers::zdma::{self, DescriptorPool, POOL_BYTES, ZdmaError};
use portcullis_drivers::{plwriter, zdma::Zdma};
use portcullis_hal::{Block, DmaMemory};
use portcullis_iommu::dma::{Coherent, DmaDevice};
use portcullis_iommu::{DefaultDomain, DeviceId, Domain, FwSpec, InstanceId, IommuCore, Prot};
use thiserror::Error;

use crate::os::Os;
use crate::os::host::DmaOptions;
use crate::sim::{Clock, EngineKind, EngineSlot, Machine, Memory, Registers, SmmuSlot, Stuck};

/// The driver of an SMMUv2 on a board.
pub type Smmu = smmuv2::SmmuV2<Registers, Memory, Clock>;
/// The driver of an SMMUv3 on a board.
pub type SmmuV3 = smmuv3::SmmuV3<Parts<Registers, Memory, Clock>>;

/// The driver of an SMMU.
#[derive(Clone)]
pub enum SmmuDriver {
    /// Of architecture version 2.
    V2(Arc<Smmu>),
    /// Of architecture version 3.
    V3(Arc<SmmuV3>),
}

impl SmmuDriver {
    /// Its face to the IOMMU core.
    pub fn ops(&self) -> Arc<dyn IommuOps> {
        match self {
            Self::V2(driver) => driver.clone(),
            Self::V3(driver) => driver.clone(),
        }
    }
}

/// How to boot the driver of an SMMUv3.
#[derive(Clone, Copy, Debug, Default)]
pub struct V3Options {
    /// Interrupts are messages, where the tree says which ITS takes them; otherwise wires.
    pub messages: bool,
    /// Stream ids that the stream table has room for, as bits; `None` for all that the SMMU has. With 8 or less the table is
    /// linear.
    pub stream_bits: Option<u8>,
    /// Largest queues, as log2 of their entries: commands, events, page requests. `None` for the driver's choice.
    pub queue_log2: Option<[u8; 3]>,
}

/// How to boot.
#[derive(Clone, Debug, Default)]
pub struct BootOptions {
    /// The domain of a device that nobody has attached.
    pub default_domain: DefaultDomain,
    /// Streams that no device has claimed bypass the SMMU (`arm-smmu.disable_bypass=0`).
    pub bypass_unmatched: bool,
    /// For drivers of SMMUv3s.
    pub v3: V3Options,
    /// The DMA API.
    pub dma: DmaOptions,
    /// Engines without a driver: nobody touches them, and their streams are not entered.
    pub unbound: BTreeSet<String>,
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
    /// The SMMUv3 refused.
    #[error("{path}: {error}")]
    ProbeV3 {
        /// Its node.
        path: String,
        /// Why.
        error: smmuv3::ProbeError,
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
    /// A device's driver did not come up.
    #[error("{device}: {error}")]
    Driver {
        /// Its name.
        device: String,
        /// Why.
        error: String,
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

/// A PCIe test device with its driver.
pub struct Tester {
    /// Its name.
    pub name: Arc<str>,
    /// Its index in [`Machine::engines`].
    pub slot: usize,
    /// Its device at the IOMMU core.
    pub device: Option<DeviceId>,
    /// The event id of its messages, if the tree gives it an ITS.
    pub message: Option<u32>,
    /// The driver.
    pub driver: TestDevice<Registers>,
}

/// A network device with its driver.
pub struct BoundNic {
    /// Its name.
    pub name: Arc<str>,
    /// Its index in [`Machine::engines`].
    pub slot: usize,
    /// Its device at the IOMMU core.
    pub device: Option<DeviceId>,
    /// Its device of the DMA API.
    pub dma: DmaDevice<Memory>,
    /// The driver.
    pub driver: Gem<Registers, Memory>,
    /// Its descriptors.
    _ring: Coherent<Memory>,
}

/// An SMMU with its driver.
pub struct BoundSmmu {
    /// Index in [`MachineDescription::smmus`](crate::MachineDescription::smmus).
    pub index: usize,
    /// Its instance at the IOMMU core.
    pub instance: InstanceId,
    /// The driver.
    pub driver: SmmuDriver,
    /// Interrupt lines that its driver handles. Nobody handles an SMMUv3's `cmdq-sync`: the driver waits for commands by
    /// looking, as Linux does.
    pub lines: Vec<u32>,
    /// Event ids of its messages.
    pub messages: std::ops::Range<u32>,
}

/// A booted board.
pub struct System {
    machine: Arc<Machine>,
    core: IommuCore,
    smmus: Vec<BoundSmmu>,
    channels: Vec<Channel>,
    writers: Vec<Writer>,
    testers: Vec<Tester>,
    nics: Vec<BoundNic>,
    os: Os,
}

/// Event ids of each SMMU: events, page requests, global errors.
const SMMU_MESSAGES: u32 = 3;
/// The first event id of test devices. There are fewer SMMUs than would reach it.
const TESTER_MESSAGES: u32 = 0x1000;

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
            let first = SMMU_MESSAGES * slot.index as u32;
            let driver = match &node.v3 {
                None => SmmuDriver::V2(Arc::new(probe_v2(&machine, slot, node, options)?)),
                Some(v3) => SmmuDriver::V3(Arc::new(probe_v3(&machine, slot, (node, v3), options, first)?)),
            };
            let instance = core.register(&node.node.name, driver.ops());
            let lines = match &node.v3 {
                None => slot.interrupts.clone(),
                Some(v3) => [&v3.combined, &v3.eventq, &v3.priq, &v3.gerror]
                    .into_iter()
                    .filter_map(|wire| wire.as_ref()?.spi())
                    .collect(),
            };
            let messages = first..first + SMMU_MESSAGES;
            smmus.push(BoundSmmu { index: slot.index, instance, driver, lines, messages });
        }
        let (channels, writers, testers, nics) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let lines = smmus.iter().map(|s: &BoundSmmu| (s.instance, s.lines.clone())).collect();
        let os = Os::new(&machine, &core, lines, options.dma);
        let os = os.map_err(|e| BootError::Driver { device: "platform bus".into(), error: e.to_string() })?;
        let mut system = Self { machine, core, smmus, channels, writers, testers, nics, os };
        let proxies: Vec<String> = system.proxies().map(|(name, _)| name).collect();
        for name in options.streams.keys().chain(&options.unbound) {
            if system.machine.engine(name).is_none() && !proxies.contains(name) {
                return Err(BootError::UnknownDevice(name.clone()));
            }
        }
        system.bind_engines(options)?;
        Ok(system)
    }

    fn bind_engines(&mut self, options: &BootOptions) -> Result<(), BootError> {
        let machine = self.machine.clone();
        let memory = machine.dma_memory();
        let bound = |engine: &EngineSlot| !options.unbound.contains(&*engine.name);
        // Without a driver a core is on the platform bus all the same, and can be given away.
        for engine in machine.engines().iter().filter(|e| !bound(e)) {
            if matches!(engine.engine, EngineKind::AxiDma(_)) {
                let streams = self.streams_of(engine, options.streams.get(&*engine.name));
                let device = self.enter(engine, &streams)?;
                self.os.add_core(engine, device, false).map_err(|e| driver_error(&engine.name, e))?;
            }
        }
        for (slot, engine) in machine.engines().iter().enumerate().filter(|(_, e)| bound(e)) {
            let registers = machine.engine_registers(engine);
            let streams = self.streams_of(engine, options.streams.get(&*engine.name));
            let mut pool = None;
            if matches!(engine.engine, EngineKind::Zdma(_)) {
                let no_memory = || BootError::NoMemory { channel: engine.name.to_string() };
                pool = Some(memory.alloc(POOL_BYTES, 4096).ok_or_else(no_memory)?);
            }
            let device = self.enter(engine, &streams)?;
            match &engine.engine {
                EngineKind::AxiDma(_) => {
                    self.os.add_core(engine, device, true).map_err(|e| driver_error(&engine.name, e))?;
                    continue;
                }
                EngineKind::Nic(_) => {
                    self.bind_nic(slot, engine, device, registers)?;
                    continue;
                }
                _ => {}
            }
            match pool {
                Some(block) => {
                    let pool = DescriptorPool { block, iova: Iova(block.pa.get()) };
                    let config = zdma::Config { coherent: engine.coherent };
                    let driver = Zdma::new(registers, memory.clone(), pool, config)
                        .map_err(|error| BootError::Channel { channel: engine.name.to_string(), error })?;
                    let (name, interrupt) = (engine.name.clone(), engine.interrupts.first().copied());
                    self.channels.push(Channel { name, slot, device, interrupt, driver });
                }
                None if matches!(engine.engine, EngineKind::TestDevice(_)) => {
                    self.bind_tester(slot, engine, device, registers);
                }
                None => {
                    let driver = plwriter::PlWriter::new(registers);
                    self.writers.push(Writer { name: engine.name.clone(), slot, device, driver });
                }
            }
        }
        self.bind_proxies(options)
    }

    /// The clients of AXI DMA cores: name and node.
    fn proxies(&self) -> impl Iterator<Item = (String, &crate::machine::DmaProxy)> {
        let nodes = self.machine.description().dma_proxies.iter().enumerate();
        nodes.filter(|(_, p)| p.node.available).map(|(i, p)| (format!("dma-proxy{i}"), p))
    }

    fn bind_proxies(&self, options: &BootOptions) -> Result<(), BootError> {
        for (name, node) in self.proxies() {
            let smmu = node.streams.declared.first().map(|s| s.smmu);
            let declared = node.streams.declared.iter().filter(|s| Some(s.smmu) == smmu);
            let streams = match options.streams.get(&name) {
                Some(ids) => ids.iter().map(|id| StreamMatch::exact(*id)).collect(),
                None => declared.map(|s| StreamMatch::masked(s.id.get(), s.mask)).collect::<Vec<_>>(),
            };
            let device = self.enter_at(&name, smmu, &streams, MasterOptions::default())?;
            let bind = !options.unbound.contains(&name);
            self.os.add_proxy(&name, node, device, bind).map_err(|e| driver_error(&name, e))?;
        }
        Ok(())
    }

    fn bind_nic(
        &mut self,
        slot: usize,
        engine: &EngineSlot,
        device: Option<DeviceId>,
        registers: Registers,
    ) -> Result<(), BootError> {
        let error = |e: &dyn std::fmt::Display| BootError::Driver {
            device: engine.name.to_string(),
            error: e.to_string(),
        };
        let dma =
            self.os.host().dma_device(&engine.name, device, engine.coherent, 44).map_err(|e| error(&e))?;
        let ring = dma.alloc_coherent(gem::POOL_BYTES as u64).map_err(|e| error(&e))?;
        let pa = ring.pa(0).unwrap_or_default();
        let pool = gem::DescriptorPool { block: Block { pa, len: gem::POOL_BYTES }, iova: ring.iova() };
        let driver = Gem::new(registers, self.machine.dma_memory(), pool, engine.coherent);
        let driver = driver.map_err(|e| error(&e))?;
        self.nics.push(BoundNic { name: engine.name.clone(), slot, device, dma, driver, _ring: ring });
        Ok(())
    }

    fn bind_tester(
        &mut self,
        slot: usize,
        engine: &EngineSlot,
        device: Option<DeviceId>,
        registers: Registers,
    ) {
        let driver = TestDevice::new(registers);
        let description = self.machine.description();
        let node = description.test_devices.iter().find(|d| d.node.path == engine.path);
        let its = node.and_then(|d| description.its.get(d.msi?.its)).filter(|its| its.node.available);
        let message = its.map(|its| {
            let data = TESTER_MESSAGES + self.testers.len() as u32;
            driver.use_messages(its.doorbell(), data);
            data
        });
        self.testers.push(Tester { name: engine.name.clone(), slot, device, message, driver });
    }

    /// The streams that software believes a device has at the SMMU in front of it.
    fn streams_of(&self, engine: &EngineSlot, instead: Option<&Vec<u32>>) -> Vec<StreamMatch> {
        if let Some(ids) = instead {
            return ids.iter().map(|id| StreamMatch::exact(*id)).collect();
        }
        let streams = self.machine.description().engine_streams(&engine.path);
        let here = streams.into_iter().flat_map(|s| &s.declared).filter(|s| Some(s.smmu) == engine.smmu);
        here.map(|s| StreamMatch::masked(s.id.get(), s.mask)).collect()
    }

    /// Enters a device, if an SMMU is in front of it and software knows streams of it.
    fn enter(&self, engine: &EngineSlot, streams: &[StreamMatch]) -> Result<Option<DeviceId>, BootError> {
        self.enter_at(&engine.name, engine.smmu, streams, self.options_of(engine))
    }

    fn enter_at(
        &self,
        name: &str,
        smmu: Option<usize>,
        streams: &[StreamMatch],
        options: MasterOptions,
    ) -> Result<Option<DeviceId>, BootError> {
        let Some(smmu) = self.smmus.iter().find(|s| Some(s.index) == smmu) else { return Ok(None) };
        if streams.is_empty() {
            return Ok(None);
        }
        let spec = FwSpec { streams: streams.to_vec() };
        let device = self.core.add_device_with(name, smmu.instance, &spec, &[], options);
        device.map(Some).map_err(|error| BootError::Device { device: name.to_string(), error })
    }

    /// What the tree says that a device can do beyond plain accesses.
    fn options_of(&self, engine: &EngineSlot) -> MasterOptions {
        let Some(master) = self.machine.description().master(&engine.path) else {
            return MasterOptions::default();
        };
        MasterOptions {
            substream_bits: master.pasid_bits,
            can_stall: master.can_stall,
            ats: master.ats && engine.atc.is_some(),
        }
    }

    /// Enables or disables a device's address translation services and page requests, as software does in its configuration
    /// space. They are off after boot; enable them when the device is attached to a domain that translates. False if
    /// the device has no translation cache.
    pub fn enable_ats(&self, name: &str, ats: bool, page_requests: bool) -> bool {
        let engine = self.machine.engine(name);
        let Some((atc, engine)) = engine.and_then(|e| Some((e.atc.as_ref()?, e))) else { return false };
        let pri = self.machine.description().master(&engine.path).is_some_and(|m| m.pri);
        atc.enable_pri(page_requests && ats && pri);
        atc.enable_ats(ats);
        true
    }

    /// The hardware.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }
    /// The IOMMU core.
    pub fn core(&self) -> &IommuCore {
        &self.core
    }
    /// The instance of the first SMMU at the core.
    pub fn iommu(&self) -> Option<InstanceId> {
        self.smmus.first().map(|s| s.instance)
    }
    /// The instance of the SMMUv2 at the core and its driver; the first of several.
    pub fn smmu(&self) -> Option<(InstanceId, &Arc<Smmu>)> {
        self.smmus.iter().find_map(|s| match &s.driver {
            SmmuDriver::V2(driver) => Some((s.instance, driver)),
            SmmuDriver::V3(_) => None,
        })
    }
    /// The instance of the SMMUv3 at the core and its driver; the first of several.
    pub fn smmu_v3(&self) -> Option<(InstanceId, &Arc<SmmuV3>)> {
        self.smmus.iter().find_map(|s| match &s.driver {
            SmmuDriver::V3(driver) => Some((s.instance, driver)),
            SmmuDriver::V2(_) => None,
        })
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
    /// The PCIe test devices.
    pub fn testers(&self) -> &[Tester] {
        &self.testers
    }
    /// A PCIe test device by name.
    pub fn tester(&self, name: &str) -> Option<&Tester> {
        self.testers.iter().find(|t| &*t.name == name)
    }
    /// The network devices.
    pub fn nics(&self) -> &[BoundNic] {
        &self.nics
    }
    /// A network device by name.
    pub fn nic(&self, name: &str) -> Option<&BoundNic> {
        self.nics.iter().find(|n| &*n.name == name)
    }
    /// The platform bus: AXI DMA cores, their clients, passthrough.
    pub fn os(&self) -> &Os {
        &self.os
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

    /// Lets engines work and interrupts be handled for so many nanoseconds: for engines that never rest.
    pub fn run_for(&self, ns: u64) {
        let until = self.machine.tracer().now().saturating_add(ns);
        while self.machine.tracer().now() < until {
            let before = self.machine.tracer().now();
            // Interrupts are late by a microsecond at most.
            self.machine.run_until(until.min(before.saturating_add(1000)));
            if self.take_interrupts() == 0 && self.machine.tracer().now() == before {
                self.machine.tracer().advance_to(until);
            }
        }
    }

    /// Runs the handlers of all lines that are high, of edges that came, and of messages. Returns how many of them had
    /// something to do.
    pub fn take_interrupts(&self) -> usize {
        let mut handled = 0;
        let (edges, messages) = self.machine.tracer().take_edges();
        for smmu in &self.smmus {
            let wired = smmu.lines.iter().any(|line| edges.contains(line));
            if wired || messages.range(smmu.messages.clone()).next().is_some() {
                handled += self.core.handle_irq(smmu.instance).unwrap_or(0);
            }
        }
        for line in self.machine.tracer().lines().pending() {
            for smmu in self.smmus.iter().filter(|s| s.lines.contains(&line)) {
                handled += self.core.handle_irq(smmu.instance).unwrap_or(0);
            }
            for channel in self.channels.iter().filter(|c| c.interrupt == Some(line)) {
                handled += usize::from(channel.driver.handle_irq().is_some());
            }
        }
        // The SMMUs' lines were looked at above.
        handled += self.os.host().interrupts.take_devices();
        self.os.host().tick();
        handled
    }

    /// What the SMMUs can do, in a line each.
    pub fn describe(&self) -> String {
        if self.smmus.is_empty() {
            return "no SMMU in use: devices reach memory directly".to_string();
        }
        let one = |s: &BoundSmmu| s.driver.ops().describe();
        self.smmus.iter().map(one).collect::<Vec<_>>().join("\n")
    }
}

fn driver_error(device: &str, error: impl std::fmt::Display) -> BootError {
    BootError::Driver { device: device.to_string(), error: error.to_string() }
}

fn probe_v2(
    machine: &Arc<Machine>,
    slot: &SmmuSlot,
    node: &crate::machine::Smmu,
    options: &BootOptions,
) -> Result<Smmu, BootError> {
    let compatible = match node.kind {
        crate::compatible::Kind::Mmu500 => "arm,mmu-500",
        _ => "arm,smmu-v2",
    };
    let options = smmuv2::Options {
        bypass_unmatched: options.bypass_unmatched,
        coherent_walk: Some(node.dma_coherent),
        ..smmuv2::Options::new(node.region.size, compatible)
    };
    Smmu::probe(machine.registers_of(slot), machine.dma_memory(), machine.clock(), options)
        .map_err(|error| BootError::Probe { path: node.node.path.clone(), error })
}

/// `first` is the event id of its first message.
fn probe_v3(
    machine: &Arc<Machine>,
    slot: &SmmuSlot,
    (node, v3): (&crate::machine::Smmu, &crate::machine::SmmuV3),
    options: &BootOptions,
    first: u32,
) -> Result<SmmuV3, BootError> {
    let defaults = smmuv3::Options::new(node.region.size);
    let its = v3.msi.and_then(|msi| machine.description().its.get(msi.its));
    let msi = its.filter(|its| options.v3.messages && its.node.available).map(|its| {
        let to = |n| Some(MsiTarget { address: its.doorbell().get(), data: first + n });
        MsiTargets { events: to(0), requests: to(1), gerror: to(2) }
    });
    let options = smmuv3::Options {
        coherent: Some(node.dma_coherent),
        stream_bits: options.v3.stream_bits,
        queue_log2: options.v3.queue_log2.unwrap_or(defaults.queue_log2),
        msi,
        ..defaults
    };
    SmmuV3::probe(machine.registers_of(slot), machine.dma_memory(), machine.clock(), options)
        .map_err(|error| BootError::ProbeV3 { path: node.node.path.clone(), error })
}
