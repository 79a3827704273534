//! What runs in a virtual machine of this process: a small operating system over the same crates as the host's.
//!
//! [`Guest::boot`] reads the machine's own device tree ([`tree`]), which was made from what it was given, and brings up the same
//! driver and the same client as a host would: on guest addresses, with the machine's interrupt lines.

pub mod aim;
pub mod own_clock;
pub mod tree;

use std::sync::{Arc, Mutex, PoisonError, Weak};

use portcullis_arch::Ipa;
use portcullis_hal::Clock;
use portcullis_iommu::dma::{DeviceConfig, DmaDevice, DmaError, DmaSpace, SpaceConfig};
use portcullis_iommu::{DefaultDomain, DeviceId, FwSpec, IommuCore, StreamMatch};
use portcullis_vfio::{
    Assignment, GuestIommu, GuestLines, GuestMemory, GuestMemoryConfig, LocalVm, LocalVmConfig, ViommuError,
    ViommuHost, VmError,
};
use thiserror::Error;

use crate::MachineDescription;
use crate::os::proxy::{AnyProxy, ProxyError, proxy_of};
use crate::os::stack::{AnyClock, AxiStack, StackError};
use crate::sim::Memory;
use crate::system::System;
use crate::tree::{Tree, TreeError};
use tree::{PlacedCore, guest_tree};

/// The first address of a guest's memory: above all of the host's, so that no address means memory in both.
pub const GUEST_BASE: Ipa = Ipa(0x8_0000_0000);

/// A virtual machine of this process on a board.
pub type BoardVm = LocalVm<Memory>;
/// Its memory.
pub type BoardGuestMemory = GuestMemory<Memory>;

/// A guest that does not come up.
#[derive(Debug, Error)]
pub enum GuestError {
    /// Its virtual machine refused.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its device tree.
    #[error("device tree of the guest: {0}")]
    Tree(#[from] TreeError),
    /// A core's driver.
    #[error("{device}: {error}")]
    Stack {
        /// The core.
        device: String,
        /// Why.
        error: StackError,
    },
    /// A client.
    #[error("{device}: {error}")]
    Proxy {
        /// The client.
        device: String,
        /// Why.
        error: Box<ProxyError>,
    },
    /// Its virtual IOMMU.
    #[error("virtual IOMMU: {0}")]
    Viommu(#[from] ViommuError),
    /// Its own IOMMU core.
    #[error("{device}: {error}")]
    Core {
        /// The device.
        device: String,
        /// Why.
        error: portcullis_iommu::Error,
    },
    /// The DMA API.
    #[error("{device}: {error}")]
    Dma {
        /// The device.
        device: String,
        /// Why.
        error: DmaError,
    },
}

/// Time in a guest: while it passes, the host works and the guest takes its interrupts.
pub struct GuestSleep {
    host: AnyClock,
    lines: GuestLines,
    handlers: Mutex<Vec<(u32, GuestHandler)>>,
}

type GuestHandler = Arc<dyn Fn() -> bool + Send + Sync>;

impl GuestSleep {
    /// Runs the guest's handlers; gives how many had something to do.
    pub fn take_interrupts(&self) -> usize {
        let mut handled = 0;
        for line in self.lines.take() {
            let handlers: Vec<GuestHandler> = {
                let all = self.handlers.lock().unwrap_or_else(PoisonError::into_inner);
                all.iter().filter(|(of, _)| *of == line).map(|(_, h)| h.clone()).collect()
            };
            handled += handlers.iter().filter(|handler| handler()).count();
            self.lines.end(line);
        }
        handled
    }
}

/// Longest time that passes before the guest looks at its lines.
const SLICE_US: u64 = 64;

impl Clock for GuestSleep {
    fn now_ns(&self) -> u64 {
        self.host.now_ns()
    }
    fn delay_us(&self, us: u64) {
        let (mut left, mut slice) = (us, 1);
        while left > 0 {
            let now = left.min(slice);
            self.host.delay_us(now);
            // Nothing came: look less often.
            slice = if self.take_interrupts() > 0 { 1 } else { (slice * 2).min(SLICE_US) };
            left -= now;
        }
    }
}

/// A core in a guest.
pub struct GuestCore {
    /// Its name in the guest.
    pub name: String,
    /// Where the guest sees its registers.
    pub base: u64,
    /// Lines of MM2S and S2MM in the guest.
    pub lines: Vec<u32>,
    /// Its driver.
    pub stack: AxiStack<BoardGuestMemory>,
    /// Its client.
    pub proxy: AnyProxy<BoardGuestMemory>,
    /// The guest's own IOMMU, if it has one.
    pub iommu: Option<GuestSide>,
}

/// A guest's own IOMMU core over the virtual IOMMU of a core's group.
#[derive(Clone)]
pub struct GuestSide {
    /// The guest's IOMMU core.
    pub core: IommuCore,
    /// The core's device there.
    pub device: DeviceId,
    /// The addresses that the guest gives to it.
    pub space: Arc<DmaSpace>,
}

impl GuestSide {
    fn new(
        name: &str,
        host: Arc<dyn ViommuHost>,
        memory: &BoardGuestMemory,
        clock: &Weak<GuestSleep>,
    ) -> Result<Self, GuestError> {
        let core = IommuCore::new(DefaultDomain::Translated);
        let (endpoints, line) = (host.endpoints(), host.info().line);
        let instance = core.register("viommu", GuestIommu::new(host, memory.clone())?);
        let spec = FwSpec { streams: endpoints.into_iter().map(StreamMatch::exact).collect() };
        let error = |error| GuestError::Core { device: name.to_string(), error };
        let device = core.add_device(name, instance, &spec, &[]).map_err(error)?;
        let domain = core.device(device).map_err(error)?.domain;
        let reserved = core.reserved_regions(device).map_err(error)?;
        let config = SpaceConfig { reserved: &reserved, ..SpaceConfig::default() };
        let space = DmaSpace::new(domain, config)
            .map_err(|error| GuestError::Dma { device: name.to_string(), error })?;
        if let Some(line) = line {
            let faults = core.clone();
            let handler = move || faults.handle_irq(instance).is_ok_and(|handled| handled > 0);
            connect(clock, line, Arc::new(handler));
        }
        Ok(Self { core, device, space })
    }
}

/// A guest's operating system.
pub struct Guest {
    vm: Arc<BoardVm>,
    tree: Tree,
    clock: Arc<GuestSleep>,
    cores: Vec<GuestCore>,
}

/// A virtual machine with memory of the board: `bytes`, scattered in an order that `seed` decides.
///
/// # Errors
/// There is not so much memory.
pub fn new_vm(system: &System, name: &str, bytes: u64, seed: u64) -> Result<Arc<BoardVm>, VmError> {
    let memory = GuestMemoryConfig { seed, ..GuestMemoryConfig::new(GUEST_BASE, bytes) };
    let config = LocalVmConfig { memory, ..LocalVmConfig::new(name, bytes) };
    LocalVm::new(config, system.machine().dma_memory(), Arc::new(system.os().host().clock()))
}

impl Guest {
    /// Boots a guest on what its virtual machine has.
    ///
    /// # Errors
    /// Names the device that did not come up.
    pub fn boot(
        system: &System,
        vm: &Arc<BoardVm>,
        assignments: &[Arc<Assignment>],
    ) -> Result<Self, GuestError> {
        Self::boot_with(system, vm, assignments, Arc::new(system.os().host().clock()))
    }

    /// The same with a clock of the host's that lets the guest's own engines work only: for guests on threads.
    ///
    /// # Errors
    /// As [`boot`](Self::boot).
    pub fn boot_with(
        system: &System,
        vm: &Arc<BoardVm>,
        assignments: &[Arc<Assignment>],
        host: AnyClock,
    ) -> Result<Self, GuestError> {
        let tree = Self::tree_of(system, vm, assignments)?;
        let description = MachineDescription::from_tree(&tree)?;
        let clock = Arc::new(GuestSleep { host, lines: vm.lines().clone(), handlers: Mutex::default() });
        let weak = Arc::downgrade(&clock);
        let mut cores = Vec::new();
        for node in &description.axi_dmas {
            let name = node.node.name.clone();
            let registers = Arc::new(vm.bus().window(Ipa(node.region.base.get()), node.region.size)?);
            let viommu = assignments.iter().find_map(|a| {
                let here = a.regions().iter().any(|r| r.ipa.get() == node.region.base.get());
                a.viommu().filter(|_| here)
            });
            let iommu = viommu.map(|host| GuestSide::new(&name, host, vm.guest_memory(), &weak));
            let iommu = iommu.transpose()?;
            let device = |name: &str, coherent| {
                let config = DeviceConfig {
                    max_segment: u64::MAX,
                    boundary_mask: u64::MAX,
                    ..DeviceConfig::default().mask(node.address_bits).coherent(coherent)
                };
                let memory = vm.guest_memory().clone();
                match &iommu {
                    Some(side) => DmaDevice::translated(name, side.space.clone(), memory, config),
                    None => DmaDevice::direct(name, memory, config),
                }
            };
            let error = |error| GuestError::Stack { device: name.clone(), error };
            let dma = device(&name, node.dma_coherent);
            let driver_clock: AnyClock = clock.host.clone();
            let stack = AxiStack::new(&name, node, registers, driver_clock, dma).map_err(error)?;
            let mut lines = Vec::new();
            for (number, channel) in (0..).zip(&node.channels) {
                let line = channel.as_ref().and_then(|c| c.interrupt.as_ref()).and_then(|i| i.spi());
                if let (Some(line), Some(channel)) = (line, stack.numbered(number)) {
                    lines.push(line);
                    connect(&weak, line, Arc::new(move || channel.handle_irq()));
                }
            }
            let client =
                description.dma_proxies.iter().find(|p| p.dmas.iter().any(|s| s.provider == node.node.path));
            let proxy_name = client.map_or_else(|| "dma-proxy".to_string(), |p| p.node.name.clone());
            let coherent = client.is_some_and(|p| p.dma_coherent);
            let proxy = proxy_of(&proxy_name, &stack, device(&proxy_name, coherent), clock.clone());
            let error = |error| GuestError::Proxy { device: proxy_name.clone(), error: Box::new(error) };
            let proxy = proxy.map_err(error)?;
            cores.push(GuestCore { name, base: node.region.base.get(), lines, stack, proxy, iommu });
        }
        Ok(Self { vm: vm.clone(), tree, clock, cores })
    }

    fn tree_of(
        system: &System,
        vm: &Arc<BoardVm>,
        assignments: &[Arc<Assignment>],
    ) -> Result<Tree, GuestError> {
        let mut placed = Vec::new();
        for assignment in assignments {
            let lines = assignment.lines();
            for region in assignment.regions() {
                let Some(host) = system.os().host().axi_node(&region.device) else { continue };
                let line = |i: usize| {
                    let of = |l: &&portcullis_vfio::PlacedLine| l.device == region.device && l.interrupt == i;
                    lines.iter().find(of).map(|l| l.line)
                };
                let viommu = assignment.viommu().and_then(|v| v.endpoints().first().copied());
                placed.push(PlacedCore { host, ipa: region.ipa.get(), lines: [line(0), line(1)], viommu });
            }
        }
        use portcullis_vfio::Vm as _;
        let memory: Vec<_> = vm.memory().iter().map(|r| (r.ipa.get(), r.len)).collect();
        Ok(guest_tree(&vm.name(), &memory, &placed)?)
    }

    /// Its virtual machine.
    pub fn vm(&self) -> &Arc<BoardVm> {
        &self.vm
    }
    /// Its device tree.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
    /// Time as its programs see it.
    pub fn clock(&self) -> &Arc<GuestSleep> {
        &self.clock
    }
    /// Its cores.
    pub fn cores(&self) -> &[GuestCore] {
        &self.cores
    }
}

fn connect(clock: &Weak<GuestSleep>, line: u32, handler: GuestHandler) {
    if let Some(clock) = clock.upgrade() {
        clock.handlers.lock().unwrap_or_else(PoisonError::into_inner).push((line, handler));
    }
}
