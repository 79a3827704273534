//! From a description to a machine.

use std::sync::{Arc, Mutex};

use portcullis_arch::zynqmp::{SmmuPath, ZdmaUnit};
use portcullis_arch::{Pa, StreamId};
use portcullis_bus::dma::DirectPort;
use portcullis_bus::{DmaPort, IrqLine, MapError, SystemMemory, View};
use portcullis_engines::zdma::BusWidth;
use portcullis_engines::{PlWriter, PlWriterConfig, Zdma, ZdmaConfig};
use portcullis_smmuv2::{Config, ConfigError, Interrupts, SmmuV2};
use portcullis_smmuv3::CapsError;
use thiserror::Error;

use crate::MachineDescription;
use crate::machine::{DmaChannel, PlWriter as PlWriterNode, Smmu, Streams};
use crate::sim::machine::{EngineKind, EngineSlot, Machine, SmmuSlot};
use crate::sim::model::SmmuModel;
use crate::sim::pool::Pool;
use crate::sim::port::{SharedTraffic, TracingPort};
use crate::sim::route::IouRoute;
use crate::sim::trace::{Recording, Tracer};
use crate::tree::Interrupt;

/// Lines of the CPU's data cache where it is modelled: 1 MiB, as a Zynq UltraScale+ has.
const CACHE_LINES: usize = 16384;

/// How to build a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Model the CPU's data cache, so that missing maintenance shows.
    pub cpu_cache: bool,
    /// What to write down.
    pub recording: Recording,
    /// Ports without a record of transactions, for speed.
    pub plain_ports: bool,
}

/// A description that no machine can be made of.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BuildError {
    /// The tree has no memory.
    #[error("the device tree has no memory node with a size")]
    NoMemory,
    /// The memory regions are not usable.
    #[error("{path}: {error}")]
    Memory {
        /// The node.
        path: String,
        /// Why.
        error: MapError,
    },
    /// The SMMU cannot be built.
    #[error("{path}: {error}")]
    Smmu {
        /// The node.
        path: String,
        /// Why.
        error: ConfigError,
    },
    /// The SMMUv3 cannot be built.
    #[error("{path}: {error}")]
    SmmuV3 {
        /// The node.
        path: String,
        /// Why.
        error: CapsError,
    },
    /// The tree says that a device differs from what is modelled.
    #[error("{path}: `{property}`: registers of this kind are not modelled")]
    Quirk {
        /// The node.
        path: String,
        /// The property.
        property: String,
    },
    /// There is no room for the drivers' own memory.
    #[error("no free RAM of 1 MiB is left outside reserved memory for the drivers")]
    NoPool,
}

impl Machine {
    /// Builds the machine of a description.
    ///
    /// # Errors
    /// Names the node that does not fit.
    pub fn build(description: MachineDescription, options: Options) -> Result<Arc<Self>, BuildError> {
        let regions: Vec<_> =
            description.memory.iter().map(|m| (m.region.base.get(), m.region.size)).collect();
        if regions.is_empty() {
            return Err(BuildError::NoMemory);
        }
        let memory = if options.cpu_cache {
            SystemMemory::with_cpu_cache(&regions, CACHE_LINES)
        } else {
            SystemMemory::new(&regions)
        }
        .map_err(|error| BuildError::Memory { path: node_of(&description, &error), error })?;
        Self::build_on(description, options, memory)
    }

    /// Builds the machine of a description on memory that somebody else provides, whatever the description says about
    /// memory. [`Options::cpu_cache`] is theirs then.
    ///
    /// # Errors
    /// Names the node that does not fit.
    pub fn build_on(
        description: MachineDescription,
        options: Options,
        memory: SystemMemory,
    ) -> Result<Arc<Self>, BuildError> {
        let tracer = Tracer::new(options.recording);
        for its in description.its.iter().filter(|its| its.node.available) {
            tracer.add_doorbell(its.doorbell());
        }
        let pool = Arc::new(place_pool(&description, &memory)?);

        let smmus = build_smmus(&description, &memory, &tracer)?;
        let wiring =
            Wiring { description: &description, memory: &memory, smmus: &smmus, tracer: &tracer, options };
        let mut engines = Vec::new();
        for (i, c) in description.dma_channels.iter().enumerate().filter(|(_, c)| c.node.available) {
            engines.push(wiring.channel(i, c));
        }
        for (i, w) in description.pl_writers.iter().enumerate().filter(|(_, w)| w.node.available) {
            engines.push(wiring.writer(i, w));
        }
        for (i, d) in description.test_devices.iter().enumerate().filter(|(_, d)| d.node.available) {
            engines.push(wiring.test_device(i, d));
        }
        for (i, d) in description.axi_dmas.iter().enumerate().filter(|(_, d)| d.node.available) {
            engines.push(wiring.axi_dma(i, d));
        }
        let route = (!description.nics.is_empty()).then(Arc::<IouRoute>::default);
        for (i, n) in description.nics.iter().enumerate().filter(|(_, n)| n.node.available) {
            engines.push(wiring.nic(i, n, route.as_ref()));
        }
        Ok(Arc::new(Self { description, memory, smmus, engines, route, pool, tracer }))
    }
}

/// What engines are connected to.
pub(super) struct Wiring<'a> {
    pub description: &'a MachineDescription,
    pub memory: &'a SystemMemory,
    smmus: &'a [SmmuSlot],
    pub tracer: &'a Arc<Tracer>,
    pub options: Options,
}

impl Wiring<'_> {
    /// The SMMU on a master's way, if it is in use: the one that its node names, or else the chip's. A master of which
    /// nobody knows a stream is not known to pass one.
    pub fn smmu_of(&self, streams: &Streams) -> Option<&SmmuSlot> {
        streams.first()?;
        let index = match streams.declared.first() {
            Some(declared) => declared.smmu,
            None => self.description.smmu()?.0,
        };
        self.smmus.iter().find(|s| s.index == index)
    }

    pub fn port(
        &self,
        name: &str,
        coherent: bool,
        smmu: Option<&SmmuSlot>,
        traffic: &SharedTraffic,
    ) -> Box<dyn DmaPort> {
        let view = self.memory.view(if coherent { View::Coherent } else { View::NonCoherent }, name);
        let tracer = || self.tracer.clone();
        match (smmu.map(|s| &s.model), self.options.plain_ports) {
            (Some(SmmuModel::V2(model)), true) => Box::new(model.port(view)),
            (Some(SmmuModel::V2(model)), false) => {
                Box::new(TracingPort::new(model.port(view), tracer(), name).counting(traffic.clone()))
            }
            (Some(SmmuModel::V3(model)), true) => Box::new(model.port(view)),
            (Some(SmmuModel::V3(model)), false) => {
                Box::new(TracingPort::v3(model.port(view), tracer(), name).counting(traffic.clone()))
            }
            (None, true) => Box::new(DirectPort::new(view)),
            (None, false) => Box::new(TracingPort::direct(view, tracer(), name).counting(traffic.clone())),
        }
    }

    fn channel(&self, i: usize, c: &DmaChannel) -> EngineSlot {
        let name = channel_name(c, i);
        let smmu = self.smmu_of(&c.streams);
        let stream = c.streams.first().unwrap_or_default();
        let irq = c.interrupt.as_ref().and_then(spi);
        let line = irq.map_or_else(IrqLine::unconnected, |n| IrqLine::new(self.tracer.clone(), n));
        let mut config = if c.bus_width == 128 { ZdmaConfig::fpd(stream) } else { ZdmaConfig::lpd(stream) };
        if let Some(bus) = BusWidth::from_bits(c.bus_width) {
            config.bus = bus;
        }
        config.coherent &= c.dma_coherent;
        let traffic = SharedTraffic::default();
        let zdma = Zdma::new(config, self.port(&name, c.dma_coherent, smmu, &traffic), line);
        EngineSlot {
            name: name.into(),
            path: c.node.path.clone(),
            base: c.region.base,
            size: c.region.size,
            stream,
            streams: vec![stream],
            interrupts: irq.into_iter().collect(),
            smmu: smmu.map(|s| s.index),
            coherent: c.dma_coherent,
            bus_width: c.bus_width,
            engine: EngineKind::Zdma(Arc::new(Mutex::new(zdma))),
            traffic,
            atc: None,
        }
    }

    fn writer(&self, i: usize, w: &PlWriterNode) -> EngineSlot {
        let name = format!("pl-writer{i}");
        let behind = w.port.info().path != SmmuPath::NotBehind;
        let smmu = self.smmu_of(&w.streams).filter(|_| behind);
        let stream = w.streams.first().unwrap_or_default();
        // What the port adds its AXI IDs to; without a port that is known, the stream that the tree names.
        let base = w.port.stream_base().unwrap_or(StreamId(stream.get() & !0x3f));
        let config = PlWriterConfig { axprot: w.ax_prot, axi_id: w.axi_id, port_base: base };
        let traffic = SharedTraffic::default();
        let writer = PlWriter::new(config, self.port(&name, w.dma_coherent, smmu, &traffic));
        EngineSlot {
            name: name.into(),
            path: w.node.path.clone(),
            base: w.region.base,
            size: w.region.size,
            stream,
            streams: vec![stream],
            interrupts: Vec::new(),
            smmu: smmu.map(|s| s.index),
            coherent: w.dma_coherent,
            bus_width: 32,
            engine: EngineKind::PlWriter(Arc::new(Mutex::new(writer))),
            traffic,
            atc: None,
        }
    }
}

/// The SMMUs in use. The first one is the chip's where there are several.
fn build_smmus(
    description: &MachineDescription,
    memory: &SystemMemory,
    tracer: &Arc<Tracer>,
) -> Result<Vec<SmmuSlot>, BuildError> {
    let in_use = || description.smmus.iter().enumerate().filter(|(_, s)| s.node.available);
    let alone = in_use().count() == 1;
    let mut smmus = Vec::new();
    for (index, s) in in_use() {
        let name: Arc<str> = if alone { "smmu".into() } else { s.node.name.as_str().into() };
        let walker = format!("{name} table walker");
        let path = || s.node.path.clone();
        let model = match &s.v3 {
            Some(v3) => SmmuModel::V3(super::build_v3::smmu(description, s, v3, memory, &walker, tracer)?),
            None => SmmuModel::V2(
                build_smmu(s, memory, &walker, tracer)
                    .map_err(|error| BuildError::Smmu { path: path(), error })?,
            ),
        };
        let mut interrupts: Vec<u32> = s.interrupts.iter().filter_map(spi).collect();
        interrupts.sort_unstable();
        interrupts.dedup();
        let (base, size) = (s.region.base, s.region.size);
        smmus.push(SmmuSlot { index, name, base, size, interrupts, model });
    }
    Ok(smmus)
}

/// A generic SMMU has as many context banks as its window has room for.
fn generic_config(s: &Smmu) -> Config {
    let banks = (s.region.size / 0x2000).clamp(1, 128) as u8;
    Config { context_banks: banks, coherent_walk: s.dma_coherent, ..Config::default() }
}

fn build_smmu(
    s: &Smmu,
    memory: &SystemMemory,
    walker: &str,
    tracer: &Arc<Tracer>,
) -> Result<Arc<SmmuV2<SystemMemory>>, ConfigError> {
    let config = match s.kind {
        crate::compatible::Kind::Mmu500 => Config::mmu500_zynqmp(),
        _ => generic_config(s),
    };
    let view = if s.dma_coherent { View::Coherent } else { View::NonCoherent };
    let walker = memory.view(view, walker);
    // A line that is not wired keeps its place: the next one belongs to the next context bank.
    let line = |i: &Interrupt| {
        spi(i).map_or_else(IrqLine::unconnected, |number| IrqLine::new(tracer.clone(), number))
    };
    let first = s.interrupts.first().and_then(spi);
    let combined = s.interrupts.iter().all(|i| spi(i) == first);
    let interrupts = match first {
        Some(n) if combined => Interrupts::combined(tracer.clone(), n),
        _ => {
            let (global, context) = s.interrupts.split_at(s.global_interrupts.min(s.interrupts.len()));
            let mut wires = Interrupts::default();
            if let Some(global) = global.first() {
                wires.global[0] = line(global);
            }
            wires.context = context.iter().map(line).collect();
            wires
        }
    };
    SmmuV2::new(config, walker, interrupts)
}

/// The SPI number of an interrupt; private interrupts of a CPU are not wired to devices here.
pub(super) fn spi(interrupt: &Interrupt) -> Option<u32> {
    match interrupt {
        Interrupt::Spi { number, .. } => Some(*number),
        _ => None,
    }
}

/// The name of a channel: `fpd-dma0` to `lpd-dma7` on the chip we know, else a number in the order of the tree.
fn channel_name(c: &DmaChannel, index: usize) -> String {
    match c.chip {
        Some(chip) => {
            let unit = if chip.unit == ZdmaUnit::Fpd { "fpd" } else { "lpd" };
            format!("{unit}-dma{}", chip.index)
        }
        None => format!("dma{index}"),
    }
}

/// The memory node that an error is about, as far as it tells.
fn node_of(description: &MachineDescription, error: &MapError) -> String {
    let at = match error {
        MapError::Overlap(_, _, base, _) | MapError::Bad(base, _) => *base,
    };
    let node = description.memory.iter().find(|m| m.region.base.get() == at);
    node.map_or_else(|| "/memory".to_string(), |m| m.path.clone())
}

/// A block for the drivers' own memory, away from reserved memory: up to 256 MiB, in the middle of the largest free
/// stretch so that low addresses stay free for experiments.
fn place_pool(description: &MachineDescription, memory: &SystemMemory) -> Result<Pool, BuildError> {
    let mut free: Vec<(u64, u64)> = memory.regions().map(|(b, s)| (b, b + s)).collect();
    for r in description.reserved.iter().filter_map(|r| r.region.as_ref()) {
        let (start, end) = (r.base.get(), r.base.get().saturating_add(r.size));
        free = free
            .into_iter()
            .flat_map(|(a, b)| [(a, b.min(start)), (a.max(end), b)])
            .filter(|(a, b)| a < b)
            .collect();
    }
    let (start, end) = free.into_iter().max_by_key(|(a, b)| b - a).ok_or(BuildError::NoPool)?;
    for order in (20..=28).rev() {
        let size = 1u64 << order;
        let base = (start + (end - start) / 4).checked_next_multiple_of(size);
        if let Some(base) = base
            && base.checked_add(size).is_some_and(|last| last <= end)
        {
            return Ok(Pool::new(Pa(base), order));
        }
    }
    Err(BuildError::NoPool)
}
