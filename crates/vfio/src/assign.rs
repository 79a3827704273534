//! One group in one virtual machine.

use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::{Ipa, Pa};
use portcullis_drivers::ops::FaultModel;
use spin::Mutex;

use crate::viommu::HostViommu;
use crate::{
    DeviceWindow, EndOfInterrupt, EventSink, Group, Ioas, Limits, VfioDevice, VfioError, ViommuHost, Vm,
};

/// How to give a device away. A machine has one address space, so what is said about that counts with its first device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssignOptions {
    /// The device snoops the CPU's caches (`dma-coherent`), so memory is mapped write-back.
    pub coherent: bool,
    /// Bits of the machine's addresses; what the IOMMU takes if `None`.
    pub ipa_bits: Option<u8>,
    /// Limits of the machine's address space.
    pub limits: Limits,
    /// What a fault does. The default terminates: a guest must not be able to make the hardware wait.
    pub fault_model: FaultModel,
    /// The guest gets a virtual IOMMU for the group ([`Assignment::viommu`]); without it, its device addresses are its
    /// physical addresses.
    pub viommu: bool,
}

/// Where a guest sees a region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedRegion {
    /// The device.
    pub device: String,
    /// Number of the region.
    pub region: usize,
    /// Where in the guest.
    pub ipa: Ipa,
    /// Bytes.
    pub size: u64,
}

/// Which line of a guest an interrupt is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlacedLine {
    /// The device.
    pub device: String,
    /// Number of the interrupt.
    pub interrupt: usize,
    /// The guest's line.
    pub line: u32,
}

#[derive(Default)]
struct State {
    regions: Vec<PlacedRegion>,
    lines: Vec<PlacedLine>,
    viommu: Option<Arc<HostViommu>>,
    released: bool,
}

/// A group that a machine has. Undone by [`Passthrough::release`](crate::Passthrough::release), or when it is dropped.
pub struct Assignment {
    group: Arc<Group>,
    vm: Arc<dyn Vm>,
    ioas: Arc<Ioas>,
    name: String,
    devices: Vec<Arc<VfioDevice>>,
    state: Mutex<State>,
}

impl fmt::Debug for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Assignment").field("device", &self.name).field("vm", &self.vm.name()).finish()
    }
}

/// A host interrupt on its way to a guest's line.
struct Raise {
    vm: Weak<dyn Vm>,
    line: u32,
    /// Where to mask an edge-triggered interrupt, so that an edge before the guest has ended the last one is kept. Others
    /// are masked when they fire.
    edge: Option<(Weak<VfioDevice>, usize)>,
}

impl EventSink for Raise {
    fn signal(&self) {
        if let Some((device, index)) = &self.edge
            && let Some(device) = device.upgrade()
        {
            // A device that was closed meanwhile has nothing to mask.
            let _closed = device.mask(*index);
        }
        if let Some(vm) = self.vm.upgrade() {
            vm.set_line(self.line, true);
        }
    }
}

/// The way back: the guest has ended the interrupt.
struct Unmask {
    vm: Weak<dyn Vm>,
    device: Weak<VfioDevice>,
    index: usize,
}

impl EndOfInterrupt for Unmask {
    fn ended(&self, line: u32) {
        if let Some(vm) = self.vm.upgrade() {
            vm.set_line(line, false);
        }
        if let Some(device) = self.device.upgrade() {
            // A device that was closed meanwhile has nothing to unmask.
            let _closed = device.unmask(self.index);
        }
    }
}

impl Assignment {
    /// Undoes everything if it fails.
    pub(crate) fn new(
        name: &str,
        group: Arc<Group>,
        vm: Arc<dyn Vm>,
        ioas: Arc<Ioas>,
        options: &AssignOptions,
    ) -> Result<Arc<Self>, VfioError> {
        let open = || -> Result<Vec<Arc<VfioDevice>>, VfioError> {
            group.attach(&ioas)?;
            let vfio = |device: &&Arc<crate::PlatformDevice>| {
                group.registry().owner(&device.name) == Ok(crate::Owner::Vfio)
            };
            group.devices().filter(vfio).map(|device| group.open(&device.name)).collect()
        };
        let devices = match open() {
            Ok(devices) => devices,
            Err(error) => {
                // What it could not do is worse than why it had to.
                group.release()?;
                return Err(error);
            }
        };
        let name = name.to_string();
        let assignment = Arc::new(Self { group, vm, ioas, name, devices, state: Mutex::default() });
        match assignment.connect(options) {
            Ok(()) => Ok(assignment),
            Err(error) => {
                assignment.release()?;
                Err(error)
            }
        }
    }

    fn connect(&self, options: &AssignOptions) -> Result<(), VfioError> {
        for device in &self.devices {
            for (index, interrupt) in device.device().interrupts.iter().enumerate() {
                let vm = Arc::downgrade(&self.vm);
                let eoi = Arc::new(Unmask { vm: vm.clone(), device: Arc::downgrade(device), index });
                let line = match self.vm.connect_line(Some(interrupt.line), eoi.clone()) {
                    Err(_) if self.vm.is_alive() => self.vm.connect_line(None, eoi)?,
                    connected => connected?,
                };
                let placed = PlacedLine { device: device.device().name.clone(), interrupt: index, line };
                self.state.lock().lines.push(placed);
                let edge = (!interrupt.level).then(|| (Arc::downgrade(device), index));
                device.set_trigger(index, Some(Arc::new(Raise { vm, line, edge })))?;
            }
        }
        if options.viommu {
            let viommu = HostViommu::new(&self.group, &self.ioas, &self.vm, options.coherent)?;
            self.state.lock().viommu = Some(viommu);
        }
        // Last of all: now the guest can start them.
        for device in &self.devices {
            for (number, region) in device.device().regions.iter().enumerate() {
                let window = DeviceWindow {
                    device: device.device().name.clone(),
                    region: number,
                    size: region.size,
                    wanted: region.ipa_hint.unwrap_or(Ipa(region.pa.get())),
                    registers: device.region(number)?,
                    host: region.mappable().then_some(Pa(region.pa.get())),
                };
                let device = window.device.clone();
                let ipa = self.vm.place(window)?;
                let placed = PlacedRegion { device, region: number, ipa, size: region.size };
                self.state.lock().regions.push(placed);
            }
        }
        Ok(())
    }

    /// The device it was made for; its group may have more.
    pub fn device(&self) -> &str {
        &self.name
    }
    /// The machine.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }
    /// The machine's address space.
    pub fn ioas(&self) -> &Arc<Ioas> {
        &self.ioas
    }
    /// The group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }
    /// The devices that are open.
    pub fn devices(&self) -> &[Arc<VfioDevice>] {
        &self.devices
    }
    /// Where the guest sees the registers.
    pub fn regions(&self) -> Vec<PlacedRegion> {
        self.state.lock().regions.clone()
    }
    /// Which lines the guest has.
    pub fn lines(&self) -> Vec<PlacedLine> {
        self.state.lock().lines.clone()
    }
    /// The group's virtual IOMMU, if it was asked for.
    pub fn viommu(&self) -> Option<Arc<dyn ViommuHost>> {
        let viommu = self.state.lock().viommu.clone()?;
        Some(viommu)
    }
    /// For the host's interrupt handler: the line is high, or had an edge. Gives how many devices of the group were told.
    pub fn interrupt(&self, line: u32) -> usize {
        self.devices.iter().map(|device| device.host_line(line)).sum()
    }
    /// True after [`release`](Self::release).
    pub fn is_released(&self) -> bool {
        self.state.lock().released
    }

    /// Takes the group back, dead machine or not. In this order: the guest loses the registers and its say in the IOMMU; the
    /// devices are closed, that is masked, stopped and cleared; the group is blocked and leaves the machine's memory; it goes back to the host.
    ///
    /// # Errors
    /// The first thing that went wrong; the rest has been done all the same. [`VfioError::Quarantined`]: the device did
    /// not stop, and its group stays blocked.
    pub fn release(&self) -> Result<(), VfioError> {
        let (regions, lines, viommu) = {
            let mut state = self.state.lock();
            if core::mem::replace(&mut state.released, true) {
                return Ok(());
            }
            let regions = core::mem::take(&mut state.regions);
            (regions, core::mem::take(&mut state.lines), state.viommu.take())
        };
        let mut result = Ok(());
        for region in regions {
            // The window is revoked below in any case.
            result = result.and(self.vm.withdraw(region.ipa).map_err(VfioError::from));
        }
        if let Some(viommu) = &viommu {
            viommu.close();
        }
        for device in &self.devices {
            result = result.and(device.close());
        }
        for line in lines {
            self.vm.disconnect_line(line.line);
        }
        let released = self.group.release();
        drop(viommu);
        result.and(released)
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _blocked_on_error = self.release();
    }
}
