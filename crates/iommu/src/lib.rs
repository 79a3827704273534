//! The IOMMU core of an operating system: devices and their streams, groups, domains, faults, process address spaces.
//!
//! [`IommuCore`] holds IOMMU instances behind [`IommuOps`], so it knows no hardware.
//! The way of a device: its device tree entry becomes a [`FwSpec`], [`IommuCore::add_device`] puts it into a [group](GroupId)
//! with the default domain, [`IommuCore::alloc_domain`] and [`IommuCore::attach_device`] give it another
//! [`Domain`], and [`Domain::map`] lets it reach memory. [`IommuCore::handle_irq`] takes the IOMMU's interrupts
//! and routes faults to the device that caused them. [`Process`] is a user address space that
//! [`IommuCore::bind`] makes the device's own, and [`IommuCore::bind_substream`] one substream's.
//!
//! | Covered | Not covered |
//! |---|---|
//! | `iommus` with 1 and 2 cells, `stream-match-mask`, the legacy `mmu-masters` | `iommu-map`, ACPI |
//! | groups by shared streams; attach all or revert | groups by PCI isolation |
//! | blocked, identity, paging (stage 1, stage 2), nested, process domains | |
//! | reserved regions, direct ones mapped before attach | |
//! | the DMA API ([`dma`]): coherent, streaming, scatter lists, lazy invalidation, bounce buffers, debug mode | |
//! | several domains, processes and IOMMUs at once; a process per substream, its faults resolved by it | |
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod bind;
pub mod dma;
mod domain;
mod error;
mod fwspec;
pub mod heap;
pub mod iova;
mod manager;
mod process;
mod reserved;
mod route;
#[cfg(test)]
mod substream_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_review;

pub use crate::manager::{DefaultDomain, DeviceId, DeviceInfo, GroupId, InstanceId, IommuCore};
pub use bind::{AddressSpace, BindOptions};
pub use domain::Domain;
pub use error::Error;
pub use fwspec::{FwSpec, FwSpecError};
pub use process::{Process, ProcessConfig, ProcessError};
pub use reserved::{ReservedKind, ReservedRegion, SOFTWARE_MSI, merge};
pub use route::{RoutedBatch, RoutedFault};

pub use portcullis_drivers::fault::{FaultHandler, FaultReason, FaultReport, FaultResponse};
pub use portcullis_drivers::ops::{
    Capabilities, DomainKind, DomainOps, DomainSpec, FaultModel, GuestSte, IommuError, IommuOps,
    MasterOptions, Paging, StreamMatch, StreamOverrides, TableRoot,
};
pub use portcullis_pgtable::{Granule, MemoryKind};

/// Permissions and memory type of a mapping. What stage 2 cannot express (privilege) is dropped there.
pub type Prot = portcullis_pgtable::Prot<portcullis_pgtable::Stage1>;
