//! From a description to a machine.

use std::sync::{Arc, Mutex};

use portcullis_arch::Pa;
use portcullis_arch::zynqmp::ZdmaUnit;
use portcullis_bus::dma::DirectPort;
use portcullis_bus::{DmaPort, IrqLine, MapError, SystemMemory, View};
use portcullis_engines::zdma::BusWidth;
use portcullis_engines::{PlWriter, PlWriterConfig, Zdma, ZdmaConfig};
use portcullis_smmuv2::{Config, ConfigError, Interrupts, SmmuV2};
use thiserror::Error;

use crate::MachineDescription;
use crate::machine::{DmaChannel, Smmu};
use crate::sim::machine::{EngineKind, EngineSlot, Machine};
use crate::sim::pool::Pool;
use crate::sim::port::TracingPort;
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
        let tracer = Tracer::new(options.recording);
        let pool = Arc::new(place_pool(&description, &memory)?);

        let mut smmu = None;
        let mut smmu_interrupts = Vec::new();
        if let Some((_, s)) = description.smmu().filter(|(_, s)| s.node.available) {
            let path = || s.node.path.clone();
            smmu = Some(
                build_smmu(s, &memory, &tracer).map_err(|error| BuildError::Smmu { path: path(), error })?,
            );
            smmu_interrupts = s.interrupts.iter().filter_map(spi).collect();
            smmu_interrupts.sort_unstable();
            smmu_interrupts.dedup();
        }

        let port = |name: &str, coherent: bool, behind: bool| -> Box<dyn DmaPort> {
            let view = memory.view(if coherent { View::Coherent } else { View::NonCoherent }, name);
            match &smmu {
                Some(smmu) if behind && options.plain_ports => Box::new(smmu.port(view)),
                Some(smmu) if behind => Box::new(TracingPort::new(smmu.port(view), tracer.clone(), name)),
                _ => Box::new(DirectPort::new(view)),
            }
        };
        let mut engines = Vec::new();
        for (i, c) in description.dma_channels.iter().enumerate() {
            let Some(stream) = c.streams.first() else { continue };
            if !c.node.available {
                continue;
            }
            let name = channel_name(c, i);
            let irq = c.interrupt.as_ref().and_then(spi);
            let line = irq.map_or_else(IrqLine::unconnected, |n| IrqLine::new(tracer.clone(), n));
            let mut config =
                if c.bus_width == 128 { ZdmaConfig::fpd(stream) } else { ZdmaConfig::lpd(stream) };
            if let Some(bus) = BusWidth::from_bits(c.bus_width) {
                config.bus = bus;
            }
            config.coherent &= c.dma_coherent;
            let zdma = Zdma::new(config, port(&name, c.dma_coherent, true), line);
            engines.push(EngineSlot {
                name: name.into(),
                path: c.node.path.clone(),
                base: c.region.base,
                size: c.region.size,
                stream,
                interrupt: irq,
                coherent: c.dma_coherent,
                bus_width: c.bus_width,
                engine: EngineKind::Zdma(Arc::new(Mutex::new(zdma))),
            });
        }
        for (i, w) in description.pl_writers.iter().enumerate() {
            let Some(stream) = w.streams.first() else { continue };
            if !w.node.available {
                continue;
            }
            let name = format!("pl-writer{i}");
            let base = portcullis_arch::StreamId(stream.get() & !0x3f);
            let config = PlWriterConfig { axprot: w.ax_prot, ..PlWriterConfig::new(base) };
            let writer = PlWriter::new(config, port(&name, w.dma_coherent, true));
            engines.push(EngineSlot {
                name: name.into(),
                path: w.node.path.clone(),
                base: w.region.base,
                size: w.region.size,
                stream,
                interrupt: None,
                coherent: w.dma_coherent,
                bus_width: 32,
                engine: EngineKind::PlWriter(Arc::new(Mutex::new(writer))),
            });
        }
        Ok(Arc::new(Self { description, memory, smmu, smmu_interrupts, engines, pool, tracer }))
    }
}

fn build_smmu(
    s: &Smmu,
    memory: &SystemMemory,
    tracer: &Arc<Tracer>,
) -> Result<Arc<SmmuV2<SystemMemory>>, ConfigError> {
    let config = match s.kind {
        crate::compatible::Kind::Mmu500 => Config::mmu500_zynqmp(),
        _ => Config::default(),
    };
    let view = if s.dma_coherent { View::Coherent } else { View::NonCoherent };
    let walker = memory.view(view, "smmu table walker");
    let line = |i: usize| s.interrupts.get(i).and_then(spi).map(|n| IrqLine::new(tracer.clone(), n));
    let first = s.interrupts.first().and_then(spi);
    let combined = s.interrupts.iter().all(|i| spi(i) == first);
    let interrupts = match first {
        None => Interrupts::default(),
        Some(n) if combined => Interrupts::combined(tracer.clone(), n),
        Some(_) => {
            let mut wires = Interrupts::default();
            if s.global_interrupts > 0 {
                wires.global[0] = line(0).unwrap_or_else(IrqLine::unconnected);
            }
            wires.context = (s.global_interrupts..s.interrupts.len()).filter_map(line).collect();
            wires
        }
    };
    SmmuV2::new(config, walker, interrupts)
}

/// The SPI number of an interrupt; private interrupts of a CPU are not wired to devices here.
fn spi(interrupt: &Interrupt) -> Option<u32> {
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
        let base = (start + (end - start) / 4).next_multiple_of(size);
        if base + size <= end {
            return Ok(Pool::new(Pa(base), order));
        }
    }
    Err(BuildError::NoPool)
}
