//! The platform bus of the host: devices that change hands. AXI DMA cores and their clients have drivers of the host, can lose
//! them, and can be given to virtual machines.
//!
//! [`Os::registry`] says who owns what, [`Os::passthrough`] gives devices away. A driver of the host is a
//! [`HostDriver`](portcullis_vfio::HostDriver); [`stack`] is what host and guests have in common.

pub mod clock;
pub mod heaps;
pub mod host;
pub mod proxy;
pub mod stack;

use std::sync::Arc;

use portcullis_iommu::{DeviceId, InstanceId, IommuCore};
use portcullis_vfio::{Interrupt, Passthrough, PlatformDevice, Region, Registry, VfioError};

use crate::compatible::{AXI_DMA, DMA_PROXY};
use crate::machine::DmaProxy;
use crate::sim::{EngineSlot, Machine};
use clock::Interrupts;
use heaps::BoardHeap;
use host::{AXI_DRIVER, AxiHost, DmaOptions, Host};
use proxy::{PROXY_DRIVER, ProxyHost};

/// The platform bus.
pub struct Os {
    host: Arc<Host>,
    registry: Registry,
    passthrough: Passthrough,
    axi: Arc<AxiHost>,
    proxies: Arc<ProxyHost>,
    heaps: Vec<BoardHeap>,
}

impl Os {
    /// A bus without devices, with the drivers of the host.
    ///
    /// # Errors
    /// A driver is there twice: never.
    pub fn new(
        machine: &Arc<Machine>,
        core: &IommuCore,
        smmus: Vec<(InstanceId, Vec<u32>)>,
        options: DmaOptions,
    ) -> Result<Self, VfioError> {
        let interrupts = Interrupts::new(machine, core.clone(), smmus);
        let host = Host::new(machine.clone(), core.clone(), interrupts, options);
        let registry = Registry::new(core.clone(), Arc::new(machine.clock()));
        let passthrough = Passthrough::new(registry.clone());
        let of_guests = passthrough.clone();
        host.interrupts.listen(Arc::new(move |line| of_guests.interrupt(line)));
        let (axi, proxies) = (AxiHost::new(host.clone()), ProxyHost::new(host.clone()));
        registry.add_driver(axi.clone())?;
        registry.add_driver(proxies.clone())?;
        let heaps = heaps::heaps(machine);
        Ok(Self { host, registry, passthrough, axi, proxies, heaps })
    }

    /// Enters a core and binds its driver.
    pub(crate) fn add_core(
        &self,
        engine: &EngineSlot,
        device: Option<DeviceId>,
        bind: bool,
    ) -> Result<(), VfioError> {
        let registers = Arc::new(self.host.machine.engine_registers(engine));
        self.registry.add_device(PlatformDevice {
            name: engine.name.to_string(),
            compatible: vec![AXI_DMA.to_string()],
            device,
            regions: vec![Region::new(engine.base, engine.size, registers)],
            interrupts: engine.interrupts.iter().map(|line| Interrupt::level(*line)).collect(),
        })?;
        if bind { self.registry.bind(&engine.name, AXI_DRIVER) } else { Ok(()) }
    }

    /// Enters a client and binds its driver. Bind the cores first.
    pub(crate) fn add_proxy(
        &self,
        name: &str,
        node: &DmaProxy,
        device: Option<DeviceId>,
        bind: bool,
    ) -> Result<(), VfioError> {
        self.proxies.describe(name, node);
        self.registry.add_device(PlatformDevice {
            name: name.to_string(),
            compatible: vec![DMA_PROXY.to_string()],
            device,
            regions: Vec::new(),
            interrupts: Vec::new(),
        })?;
        if bind { self.registry.bind(name, PROXY_DRIVER) } else { Ok(()) }
    }

    /// What the drivers of the host share.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }
    /// Who owns which device.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }
    /// Devices in virtual machines.
    pub fn passthrough(&self) -> &Passthrough {
        &self.passthrough
    }
    /// The host's driver of AXI DMA cores.
    pub fn axi(&self) -> &Arc<AxiHost> {
        &self.axi
    }
    /// The dma-buf heaps.
    pub fn heaps(&self) -> &[BoardHeap] {
        &self.heaps
    }
    /// The host's driver of dma-proxies.
    pub fn proxies(&self) -> &Arc<ProxyHost> {
        &self.proxies
    }
}
