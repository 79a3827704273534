//! Passthrough: a device leaves its host driver and belongs to a user program or a virtual machine, IOMMU in between.
//!
//! | Piece | What it is (Linux) |
//! |---|---|
//! | [`Registry`] | which driver owns which [`PlatformDevice`]: bind, unbind (the driver core, `vfio-platform`) |
//! | [`Group`] | devices that share streams, taken as a whole (`vfio_group`, `iommu_group_claim_dma_owner`) |
//! | [`Ioas`] | an I/O address space: areas, pinned memory, limits; a table for each IOMMU in it (iommufd) |
//! | [`VfioDevice`] | an open device: regions, interrupts as events, reset |
//! | [`ResetDriver`] | how a kind of device is stopped: mask, stop, wait, clear (`vfio_platform_reset`) |
//! | [`Passthrough`], [`Assignment`] | a device in a virtual machine, and the way back |
//! | [`Vm`], [`LocalVm`] | a virtual machine, and one inside of this process |
//! | [`ViommuHost`], [`GuestIommu`] | a paravirtual IOMMU: a guest's own stage 1 over the stage 2 of its machine |
//!
//! Start with [`Passthrough::assign`]. The order that everything here keeps: nobody can touch a device while it changes hands,
//! the device is stopped before memory is taken away from it, and memory is unpinned only after the IOMMU has confirmed that
//! the device cannot reach it. A device that cannot be stopped stays blocked and is given to nobody
//! ([`VfioError::Quarantined`]).
//!
//! | Covered | Not covered |
//! |---|---|
//! | platform devices: memory regions, wired interrupts, resets by compatible | PCI functions, message interrupts |
//! | groups, direct regions, several IOMMUs for one address space | dirty tracking, live migration |
//! | a guest's own stage 1 tables, processes of a guest | substreams of a guest |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod assign;
mod device;
mod error;
mod group;
mod ioas;
mod irq;
mod local;
mod open;
mod passthrough;
mod pin;
mod ranges;
mod registry;
mod reset;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_review;
mod viommu;
mod vm;
mod window;

pub use assign::{AssignOptions, Assignment, PlacedLine, PlacedRegion};
pub use device::{Interrupt, PlatformDevice, Region};
pub use error::{GroupUser, VfioError};
pub use group::Group;
pub use ioas::{Area, Ioas, IoasError, IoasOptions, IoasStage, Limits};
pub use irq::{EventCounter, EventSink};
pub use local::{
    GuestBus, GuestClock, GuestLines, GuestMemory, GuestMemoryConfig, GuestMmio, LocalVm, LocalVmConfig,
};
pub use open::VfioDevice;
pub use passthrough::Passthrough;
pub use pin::{PinError, PinMemory, Resident};
pub use registry::{HostDriver, Owner, Registry, VFIO_DRIVER, VfioOptions};
pub use reset::{AxiDmaReset, ResetDriver, ResetDrivers, ResetError, ResetFailure, ZdmaReset};
pub use viommu::{GuestIommu, ViommuError, ViommuFault, ViommuHost, ViommuInfo, ViommuTable};
pub use vm::{DeviceWindow, EndOfInterrupt, GuestRange, HostRange, Vm, VmError};
pub use window::RegionWindow;
