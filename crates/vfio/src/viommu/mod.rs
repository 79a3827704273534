//! A paravirtual IOMMU: a guest makes stage 1 tables in its own memory, and the host puts them on top of the stage 2 of its
//! machine.
//!
//! [`ViommuHost`] is all that passes between the two, and whatever comes from the guest is checked there. What a guest can
//! reach by any table it makes is its own memory, because every address in it goes through stage 2. [`GuestIommu`] is the
//! guest's driver: an [`IommuOps`](portcullis_iommu::IommuOps) like any other, so a guest has the same domains and the same
//! [`Process`](portcullis_iommu::Process) address spaces as a host.
//!
//! There is one virtual IOMMU for each group that a machine has, and its devices are one endpoint, as they share their streams
//! on the host.

mod domain;
mod guest;
mod host;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use portcullis_arch::{Access, Iova};
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::ops::TableRoot;
use portcullis_pgtable::Granule;
use thiserror::Error;

pub use guest::GuestIommu;
pub(crate) use host::HostViommu;

/// What a virtual IOMMU can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViommuInfo {
    /// 4K tables.
    pub granule_4k: bool,
    /// 16K tables.
    pub granule_16k: bool,
    /// 64K tables.
    pub granule_64k: bool,
    /// Bits of the addresses that devices issue.
    pub va_bits: u8,
    /// Bits of guest physical addresses: 32, 36, 40, 42, 44 or 48.
    pub ipa_bits: u8,
    /// Table walks snoop the guest's caches.
    pub coherent_walk: bool,
    /// The interrupt line for faults.
    pub line: Option<u32>,
}

impl ViommuInfo {
    /// Whether tables of a granule can be walked.
    pub const fn supports(&self, granule: Granule) -> bool {
        match granule {
            Granule::K4 => self.granule_4k,
            Granule::K16 => self.granule_16k,
            Granule::K64 => self.granule_64k,
        }
    }

    /// The smallest granule.
    pub const fn smallest_granule(&self) -> Granule {
        match (self.granule_4k, self.granule_16k) {
            (true, _) => Granule::K4,
            (_, true) => Granule::K16,
            _ => Granule::K64,
        }
    }
}

/// What an endpoint's transactions meet before stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViommuTable {
    /// They fault.
    Blocked,
    /// Nothing: device addresses are guest physical addresses. The state at the beginning.
    Bypass,
    /// A stage 1 table; every address in it is a guest physical one.
    Stage1(TableRoot),
}

/// A request of a guest that its host did not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ViommuError {
    /// No such endpoint.
    #[error("there is no endpoint {0}")]
    UnknownEndpoint(u32),
    /// The table cannot be walked.
    #[error("{0}")]
    BadTable(&'static str),
    /// The IOMMU has no nested translation.
    #[error("the IOMMU cannot put a guest's stage 1 on top of stage 2")]
    NotNested,
    /// The IOMMU refused; the host knows more.
    #[error("the host's IOMMU refused")]
    Refused,
    /// An invalidation did not complete: the table may still be in use.
    #[error("the host's IOMMU did not confirm an invalidation")]
    Unconfirmed,
    /// The device has been taken away.
    #[error("the device has been taken away")]
    Gone,
}

impl ViommuError {
    /// In the words of an IOMMU driver.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::UnknownEndpoint(_) => "there is no such endpoint",
            Self::BadTable(reason) => reason,
            Self::NotNested => "its IOMMU cannot put a guest's stage 1 on top of stage 2",
            Self::Refused => "its IOMMU refused",
            Self::Unconfirmed => "its IOMMU did not confirm an invalidation",
            Self::Gone => "the device has been taken away",
        }
    }
}

/// A fault of a guest's stage 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViommuFault {
    /// Who.
    pub endpoint: u32,
    /// Why.
    pub reason: FaultReason,
    /// The address as the device issued it.
    pub iova: Iova,
    /// Read or write.
    pub access: Access,
    /// A privileged access.
    pub privileged: bool,
    /// An instruction fetch.
    pub instruction: bool,
    /// Table level of the fault.
    pub level: Option<u8>,
}

/// The host's side of a virtual IOMMU, as its guest sees it.
pub trait ViommuHost: Send + Sync {
    /// What it can do.
    fn info(&self) -> ViommuInfo;
    /// The endpoints: the stream ids that a guest's device tree names.
    fn endpoints(&self) -> Vec<u32>;
    /// What an endpoint's transactions meet from now on. When it returns `Ok`, the table that was there before is not used
    /// any more.
    fn set_table(&self, endpoint: u32, table: ViommuTable) -> Result<(), ViommuError>;
    /// The guest has changed its table: what is cached of a range, or of everything, is dropped before this returns.
    fn invalidate(&self, endpoint: u32, range: Option<(Iova, u64)>) -> Result<(), ViommuError>;
    /// The faults since the last time, oldest first, and how many did not fit.
    fn take_faults(&self) -> (Vec<ViommuFault>, u64);
}
