//! What the drivers of the host share, and the driver of AXI DMA cores.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_drivers::dmaengine::{Registry, RequestError};
use portcullis_hal::DmaMemory as _;
use portcullis_iommu::dma::{DeviceConfig, DmaDevice, DmaError, DmaSpace, Mode, SpaceConfig};
use portcullis_iommu::{DeviceId, DomainKind, GroupId, IommuCore, merge};
use portcullis_vfio::{HostDriver, PlatformDevice, RegionWindow};

use super::clock::{HandlerId, Interrupts, SleepingClock};
use super::stack::AxiStack;
use crate::compatible::AXI_DMA;
use crate::machine;
use crate::sim::{Machine, Memory};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How the host uses the DMA API.
#[derive(Clone, Copy, Debug, Default)]
pub struct DmaOptions {
    /// Invalidations are put off (`iommu.strict=0`).
    pub lazy: bool,
    /// Every mapping is remembered, and misuse reported.
    pub debug: bool,
}

/// What drivers of the host have in common.
pub struct Host {
    /// The hardware.
    pub machine: Arc<Machine>,
    /// The IOMMU core.
    pub core: IommuCore,
    /// Who handles which interrupt line.
    pub interrupts: Arc<Interrupts>,
    /// The channels of all engines that have a driver.
    pub channels: Registry,
    options: DmaOptions,
    spaces: Mutex<BTreeMap<GroupId, Arc<DmaSpace>>>,
}

impl Host {
    /// A host without drivers.
    pub fn new(
        machine: Arc<Machine>,
        core: IommuCore,
        interrupts: Arc<Interrupts>,
        options: DmaOptions,
    ) -> Arc<Self> {
        let (channels, spaces) = (Registry::new(), Mutex::default());
        Arc::new(Self { machine, core, interrupts, channels, options, spaces })
    }

    /// The clock for drivers that sleep.
    pub fn clock(&self) -> SleepingClock {
        SleepingClock::new(&self.machine, &self.interrupts)
    }

    /// The addresses of a group's default domain; `None` where the default is not a domain that translates.
    ///
    /// # Errors
    /// The domain has no addresses to give.
    pub fn space(&self, device: DeviceId) -> Result<Option<Arc<DmaSpace>>, DmaError> {
        let Ok(info) = self.core.device(device) else { return Ok(None) };
        let mut spaces = lock(&self.spaces);
        if let Some(space) = spaces.get(&info.group) {
            return Ok(Some(space.clone()));
        }
        if !matches!(info.domain.kind(), DomainKind::Stage1 | DomainKind::Stage2) {
            return Ok(None);
        }
        // Those of all its devices: what one of them cannot use is no address for another.
        let members = self.core.devices_of(info.group).unwrap_or_default();
        let regions = members.into_iter().filter_map(|member| self.core.reserved_regions(member).ok());
        let reserved = merge(regions.flatten());
        let mode = if self.options.lazy { Mode::Lazy } else { Mode::Strict };
        let space =
            DmaSpace::new(info.domain, SpaceConfig { reserved: &reserved, mode, ..Default::default() })?;
        spaces.insert(info.group, space.clone());
        Ok(Some(space))
    }

    /// A device of the DMA API.
    ///
    /// # Errors
    /// Its domain has no addresses to give.
    pub fn dma_device(
        &self,
        name: &str,
        device: Option<DeviceId>,
        coherent: bool,
        bits: u8,
    ) -> Result<DmaDevice<Memory>, DmaError> {
        let config = DeviceConfig {
            max_segment: u64::MAX,
            boundary_mask: u64::MAX,
            debug: self.options.debug,
            ..DeviceConfig::default().mask(bits).coherent(coherent)
        };
        let memory = self.machine.dma_memory();
        Ok(match device.map(|d| self.space(d)).transpose()?.flatten() {
            Some(space) => DmaDevice::translated(name, space, memory, config),
            None => DmaDevice::direct(name, memory, config),
        })
    }

    /// Time has passed: flush queues look whether something is due.
    pub fn tick(&self) {
        let spaces: Vec<_> = lock(&self.spaces).values().cloned().collect();
        for space in spaces {
            // What cannot be flushed stays in the queue, and is tried again.
            let _later = space.tick(self.machine.tracer().now());
        }
    }

    /// The description of a core by the name of its engine.
    pub fn axi_node(&self, name: &str) -> Option<&machine::AxiDma> {
        let engine = self.machine.engine(name)?;
        self.machine.description().axi_dmas.iter().find(|d| d.node.path == engine.path)
    }
}

/// The host's driver of AXI DMA cores.
pub struct AxiHost {
    host: Arc<Host>,
    cores: Mutex<BTreeMap<String, Bound>>,
}

/// A core that the driver has.
struct Bound {
    stack: Arc<AxiStack<Memory>>,
    /// The driver's way to it, which ends with the binding: somebody may keep the stack.
    registers: Arc<RegionWindow>,
    handlers: Vec<HandlerId>,
}

/// Its name on the platform bus, which is Linux's.
pub const AXI_DRIVER: &str = "xilinx-vdma";

impl AxiHost {
    /// The driver, without devices.
    pub fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self { host, cores: Mutex::default() })
    }
    /// A core that it has, by name.
    pub fn get(&self, name: &str) -> Option<Arc<AxiStack<Memory>>> {
        lock(&self.cores).get(name).map(|bound| bound.stack.clone())
    }

    /// Enters the channels of a core. As in `dmas`: the provider is named by its node.
    fn offer(&self, path: &str, stack: &AxiStack<Memory>) -> Result<(), String> {
        for number in 0..2 {
            if let Some(channel) = stack.numbered(number) {
                self.host.channels.register(path, number, channel).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

impl HostDriver for AxiHost {
    fn name(&self) -> &str {
        AXI_DRIVER
    }
    fn compatible(&self) -> Vec<String> {
        vec![AXI_DMA.to_string()]
    }
    fn probe(&self, device: &PlatformDevice) -> Result<(), String> {
        let node = self.host.axi_node(&device.name).ok_or("no node of the tree describes it")?;
        let path = &node.node.path;
        if self.host.channels.channels().iter().any(|(provider, ..)| provider == path) {
            return Err(format!("{path} has channels already"));
        }
        let registers = RegionWindow::new(device.regions.first().ok_or("it has no registers")?);
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let dma = self
            .host
            .dma_device(&device.name, device.device, node.dma_coherent, node.address_bits)
            .map_err(|e| text(&e))?;
        let clock = Arc::new(self.host.machine.clock());
        let stack = AxiStack::new(&device.name, node, registers.clone(), clock, dma).map_err(|e| text(&e))?;
        let stack = Arc::new(stack);
        self.offer(path, &stack)?;
        let mut handlers = Vec::new();
        for (number, interrupt) in (0..).zip(&device.interrupts) {
            if let Some(channel) = stack.numbered(number) {
                let handler = move || channel.handle_irq();
                handlers.push(self.host.interrupts.add(interrupt.line, Arc::new(handler)));
            }
        }
        lock(&self.cores).insert(device.name.clone(), Bound { stack, registers, handlers });
        Ok(())
    }
    fn remove(&self, device: &PlatformDevice) -> Result<(), String> {
        let node = self.host.axi_node(&device.name).ok_or("no node of the tree describes it")?;
        match self.host.channels.unregister(&node.node.path) {
            Ok(()) | Err(RequestError::NoProvider { .. }) => {}
            Err(error) => return Err(error.to_string()),
        }
        let Some(bound) = lock(&self.cores).remove(&device.name) else { return Ok(()) };
        if let Err(error) = bound.stack.driver().stop() {
            self.offer(&node.node.path, &bound.stack)?;
            lock(&self.cores).insert(device.name.clone(), bound);
            return Err(error.to_string());
        }
        for handler in &bound.handlers {
            self.host.interrupts.remove(*handler);
        }
        // Whoever has kept a channel cannot start it again.
        let quiet = bound.registers.revoke();
        if !quiet {
            lock(&self.cores).insert(device.name.clone(), bound);
            return Err("somebody does not come back from its registers".to_string());
        }
        // The descriptors go last.
        drop(bound);
        Ok(())
    }
}

/// The bytes that a CPU without a device would read, for showing what is in memory.
pub fn bytes_at(memory: &Memory, pa: portcullis_arch::Pa, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(pa, &mut bytes);
    bytes
}
