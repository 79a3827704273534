//! The object-safe face of an IOMMU driver: [`IommuOps`] for an instance, [`DomainOps`] for a domain.
//!
//! An operating system's IOMMU core holds instances of different drivers behind these two traits. They are what Linux
//! calls `iommu_ops` and `iommu_domain_ops`. [`smmuv2`] implements them.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::any::Any;

use portcullis_arch::{Asid, Iova, Pa, SubstreamId};
use portcullis_hal::{Clock, DmaMemory, Mmio};
use portcullis_pgtable::{ConfigError, MapError, Prot, ProtectError, Stage1, UnmapError};
use thiserror::Error;

use crate::fault::{FaultBatch, FaultHandler, FaultReport, FaultResponse};
use crate::smmuv2::{self, Domain, DomainConfig, SmmuV2, StreamMapping};
use crate::smmuv3::{self, SmmuV3};

pub use crate::smmuv2::{
    DomainKind, DomainOptions, FaultModel, Master, Paging, StreamMatch, StreamOverrides, TableRoot,
};
pub use crate::smmuv3::GuestSte;

/// What a device can do, and may do, beyond plain accesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MasterOptions {
    /// Bits of its substream ids (`pasid-num-bits`); 0 for none. No more are used than the IOMMU has.
    pub substream_bits: u8,
    /// It bears that a faulting access waits until software has dealt with it (`dma-can-stall`).
    pub can_stall: bool,
    /// It may ask for translations and keep them (ATS).
    pub ats: bool,
}

/// A request that an IOMMU driver did not fulfil.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IommuError {
    /// From an SMMUv2.
    #[error(transparent)]
    SmmuV2(#[from] smmuv2::Error),
    /// From an SMMUv3.
    #[error(transparent)]
    SmmuV3(#[from] smmuv3::Error),
    /// This kind of IOMMU cannot do that.
    #[error("this kind of IOMMU has no {what}")]
    Unsupported {
        /// "substreams" or the like.
        what: &'static str,
    },
    /// The domain was made by another driver.
    #[error("the domain belongs to another kind of IOMMU than the device")]
    ForeignDomain,
    /// From a virtual IOMMU: its host refused.
    #[error("the host of the virtual IOMMU refused: {reason}")]
    Virtual {
        /// Why.
        reason: &'static str,
    },
    /// A virtual IOMMU's page table cannot be made.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A range cannot be mapped in a virtual IOMMU's page table.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A range cannot be unmapped from it.
    #[error(transparent)]
    Unmap(#[from] UnmapError),
    /// A range's protection cannot be changed in it.
    #[error(transparent)]
    Protect(#[from] ProtectError),
}

impl IommuError {
    /// The reason, if a range could not be mapped because of the page table.
    pub fn map_error(&self) -> Option<MapError> {
        match self {
            Self::SmmuV2(smmuv2::Error::Map(error))
            | Self::SmmuV3(smmuv3::Error::Map(error))
            | Self::Map(error) => Some(*error),
            _ => None,
        }
    }
}

/// What domain to make; the counterpart of [`smmuv2::DomainConfig`] without its types.
#[derive(Clone)]
pub enum DomainSpec {
    /// Every transaction faults.
    Blocked,
    /// Transactions pass untranslated.
    Identity,
    /// Stage 1 with a table of the driver.
    Stage1(Paging),
    /// Stage 2 with a table of the driver.
    Stage2(Paging),
    /// Stage 1 with a table of the driver, on top of a stage 2 domain.
    Nested(Arc<dyn DomainOps>, Paging),
    /// Stage 1 with the table of a guest, on top of a stage 2 domain.
    NestedGuest(Arc<dyn DomainOps>, TableRoot),
    /// Stage 1 as a guest configures it, with context descriptors of its own, on top of a stage 2 domain (SMMUv3).
    Guest(Arc<dyn DomainOps>, GuestSte),
    /// Stage 1 with the table of a process.
    Process(TableRoot),
}

/// What an IOMMU can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Stage 1 domains.
    pub stage1: bool,
    /// Stage 2 domains.
    pub stage2: bool,
    /// Nested domains.
    pub nested: bool,
    /// Table walks snoop the CPU's caches.
    pub coherent_walk: bool,
    /// Page and block sizes of all table formats, as a bit map.
    pub page_sizes: u64,
    /// Stream table entries, if their number is a limit.
    pub stream_groups: Option<usize>,
    /// Context banks, if their number is a limit.
    pub contexts: Option<usize>,
    /// Contexts that are free now.
    pub free_contexts: Option<usize>,
    /// Bits of substream ids, 0 for none.
    pub substream_bits: u8,
    /// A faulting access can be made to wait for software.
    pub stall: bool,
    /// Devices may ask for translations and keep them.
    pub ats: bool,
    /// Devices may ask for pages.
    pub page_requests: bool,
}

/// One IOMMU.
pub trait IommuOps: Send + Sync {
    /// What it is, as its driver's log says it.
    fn describe(&self) -> String;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// Enters a device's streams, all or none.
    fn add_device(&self, streams: &[StreamMatch], options: MasterOptions) -> Result<Master, IommuError>;
    /// Takes a device's streams out. After an error they may still be translated.
    fn remove_device(&self, master: Master) -> Result<(), IommuError>;
    /// Makes a domain.
    fn alloc_domain(
        &self,
        spec: DomainSpec,
        options: DomainOptions,
    ) -> Result<Arc<dyn DomainOps>, IommuError>;
    /// Points all of a device's streams at a domain. The caller keeps the domain alive.
    fn attach(&self, master: &Master, domain: &dyn DomainOps) -> Result<(), IommuError>;
    /// Points a device's streams at no domain.
    fn detach(&self, master: &Master) -> Result<(), IommuError>;
    /// Points one substream of a device at a domain. The caller keeps the domain alive.
    fn attach_substream(
        &self,
        master: &Master,
        substream: SubstreamId,
        domain: &dyn DomainOps,
    ) -> Result<(), IommuError> {
        let (_, _, _) = (master, substream, domain);
        Err(IommuError::Unsupported { what: "substreams" })
    }
    /// Points a substream at no domain.
    fn detach_substream(&self, master: &Master, substream: SubstreamId) -> Result<(), IommuError> {
        let (_, _) = (master, substream);
        Err(IommuError::Unsupported { what: "substreams" })
    }
    /// Bits of substream ids that a device can use; 0 for none.
    fn substream_bits(&self, master: &Master) -> u8 {
        let _ = master;
        0
    }
    /// Overrides what a device's streams say about privilege and instruction/data.
    fn set_overrides(&self, master: &Master, overrides: StreamOverrides) -> Result<(), IommuError>;
    /// For any interrupt of the IOMMU; gives how many faults it handled.
    fn handle_irq(&self) -> usize;
    /// Who is asked about faults of domains without their own handler.
    fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>);
    /// The faults since the last time.
    fn take_faults(&self) -> FaultBatch;
    /// The answer to a fault that a handler deferred.
    fn answer(&self, report: &FaultReport, response: FaultResponse) -> Result<(), IommuError>;
    /// The answer to a deferred fault of a context bank.
    fn resume_stalled(&self, bank: u8, response: FaultResponse) -> Result<(), IommuError> {
        let (_, _) = (bank, response);
        Err(IommuError::Unsupported { what: "context banks" })
    }
    /// Programs everything again after a loss of power.
    fn resume(&self) -> Result<(), IommuError>;
    /// Turns translation off; tells whether domains were in use.
    fn shutdown(&self) -> Result<bool, IommuError>;
}

/// One domain. Dropping the last reference blocks the streams still attached and frees what it has.
pub trait DomainOps: Any + Send + Sync {
    /// The kind.
    fn kind(&self) -> DomainKind;
    /// The context bank, if it has one.
    fn bank(&self) -> Option<u8>;
    /// The tag of its stage 1 TLB entries, if it has one.
    fn asid(&self) -> Option<Asid>;
    /// Maps `[iova, iova + len)` to `[pa, pa + len)`; all or nothing.
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError>;
    /// Unmaps; afterwards no device of the domain reaches the memory. Gives the bytes that were mapped.
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError>;
    /// Unmaps, and leaves what the TLB knows about the pages to a later
    /// [`invalidate_all`](DomainOps::invalidate_all): until that is complete, devices may still reach the memory. Tables
    /// that are freed are invalidated at once. A driver without lazy mode does all of it at once.
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        self.unmap(iova, len)
    }
    /// Changes what existing mappings allow.
    fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError>;
    /// Where an address goes.
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa>;
    /// First and last address that can be mapped.
    fn input_range(&self) -> Option<(Iova, Iova)>;
    /// Page and block sizes as a bit map.
    fn page_sizes(&self) -> u64;
    /// The stage 1 table as the hardware got it.
    fn table_root(&self) -> Option<TableRoot>;
    /// Invalidates a range whose table entries somebody else has changed, and waits.
    fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError>;
    /// Invalidates everything, and waits.
    fn invalidate_all(&self) -> Result<(), IommuError>;
    /// Stops walks of a table that somebody else is going to free.
    fn stop_walks(&self) -> Result<(), IommuError>;
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> DomainOps for Domain<R, M, C> {
    fn kind(&self) -> DomainKind {
        self.kind()
    }
    fn bank(&self) -> Option<u8> {
        self.bank()
    }
    fn asid(&self) -> Option<Asid> {
        self.asid()
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        Ok(self.map(iova, pa, len, prot)?)
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.unmap(iova, len)?)
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.unmap_lazy(iova, len)?)
    }
    fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        Ok(self.protect(iova, len, prot)?)
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        self.iova_to_phys(iova)
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        self.input_range()
    }
    fn page_sizes(&self) -> u64 {
        self.page_sizes()
    }
    fn table_root(&self) -> Option<TableRoot> {
        self.table_root()
    }
    fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError> {
        Ok(self.invalidate(iova, len)?)
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        Ok(self.invalidate_all()?)
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Ok(self.stop_walks()?)
    }
}

impl<R: Mmio + 'static, M: DmaMemory + Clone + 'static, C: Clock + 'static> IommuOps for SmmuV2<R, M, C> {
    fn describe(&self) -> String {
        self.identification().to_string()
    }

    fn capabilities(&self) -> Capabilities {
        let id = self.identification();
        Capabilities {
            stage1: id.stage1,
            stage2: id.stage2,
            nested: id.nested,
            coherent_walk: self.coherent_walk(),
            page_sizes: id.page_sizes(),
            stream_groups: match id.streams {
                StreamMapping::Matching { groups } => Some(usize::from(groups)),
                StreamMapping::Indexing { .. } => None,
            },
            contexts: Some(usize::from(id.context_banks)),
            free_contexts: Some(self.free_banks()),
            substream_bits: 0,
            stall: true,
            ats: false,
            page_requests: false,
        }
    }

    fn add_device(&self, streams: &[StreamMatch], _: MasterOptions) -> Result<Master, IommuError> {
        Ok(self.add_master(streams)?)
    }

    fn remove_device(&self, master: Master) -> Result<(), IommuError> {
        self.remove_master(master);
        Ok(())
    }

    fn alloc_domain(
        &self,
        spec: DomainSpec,
        options: DomainOptions,
    ) -> Result<Arc<dyn DomainOps>, IommuError> {
        let parent = |parent: Arc<dyn DomainOps>| {
            let any: Arc<dyn Any + Send + Sync> = parent;
            any.downcast::<Domain<R, M, C>>().map_err(|_| IommuError::ForeignDomain)
        };
        let config = match spec {
            DomainSpec::Blocked => DomainConfig::Blocked,
            DomainSpec::Identity => DomainConfig::Identity,
            DomainSpec::Stage1(paging) => DomainConfig::Stage1(paging),
            DomainSpec::Stage2(paging) => DomainConfig::Stage2(paging),
            DomainSpec::Nested(domain, paging) => DomainConfig::Nested(parent(domain)?, paging),
            DomainSpec::NestedGuest(domain, root) => DomainConfig::NestedGuest(parent(domain)?, root),
            DomainSpec::Process(root) => DomainConfig::Process(root),
            DomainSpec::Guest(..) => {
                return Err(IommuError::Unsupported { what: "context descriptors" });
            }
        };
        Ok(self.new_domain(config, options)?)
    }

    fn attach(&self, master: &Master, domain: &dyn DomainOps) -> Result<(), IommuError> {
        let any: &dyn Any = domain;
        let domain = any.downcast_ref::<Domain<R, M, C>>().ok_or(IommuError::ForeignDomain)?;
        Ok(self.attach(master, domain)?)
    }

    fn detach(&self, master: &Master) -> Result<(), IommuError> {
        self.detach(master);
        Ok(())
    }

    fn set_overrides(&self, master: &Master, overrides: StreamOverrides) -> Result<(), IommuError> {
        self.set_overrides(master, overrides);
        Ok(())
    }

    fn handle_irq(&self) -> usize {
        self.handle_irq()
    }

    fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        self.set_fault_handler(handler);
    }

    fn take_faults(&self) -> FaultBatch {
        self.take_faults()
    }

    fn answer(&self, report: &FaultReport, response: FaultResponse) -> Result<(), IommuError> {
        match report.bank {
            Some(bank) => Ok(self.resume_stalled(bank, response)?),
            None => Err(IommuError::Unsupported { what: "stalled transaction without a context bank" }),
        }
    }

    fn resume_stalled(&self, bank: u8, response: FaultResponse) -> Result<(), IommuError> {
        Ok(self.resume_stalled(bank, response)?)
    }

    fn resume(&self) -> Result<(), IommuError> {
        Ok(self.resume()?)
    }

    fn shutdown(&self) -> Result<bool, IommuError> {
        Ok(self.shutdown())
    }
}

impl<P: smmuv3::Platform> DomainOps for smmuv3::Domain<P> {
    fn kind(&self) -> DomainKind {
        self.kind()
    }
    fn bank(&self) -> Option<u8> {
        None
    }
    fn asid(&self) -> Option<Asid> {
        self.asid()
    }
    fn map(&self, iova: Iova, pa: Pa, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        Ok(self.map(iova, pa, len, prot)?)
    }
    fn unmap(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.unmap(iova, len)?)
    }
    fn unmap_lazy(&self, iova: Iova, len: u64) -> Result<u64, IommuError> {
        Ok(self.unmap_lazy(iova, len)?)
    }
    fn protect(&self, iova: Iova, len: u64, prot: Prot<Stage1>) -> Result<(), IommuError> {
        Ok(self.protect(iova, len, prot)?)
    }
    fn iova_to_phys(&self, iova: Iova) -> Option<Pa> {
        self.iova_to_phys(iova)
    }
    fn input_range(&self) -> Option<(Iova, Iova)> {
        self.input_range()
    }
    fn page_sizes(&self) -> u64 {
        self.page_sizes()
    }
    fn table_root(&self) -> Option<TableRoot> {
        self.table_root()
    }
    fn invalidate(&self, iova: Iova, len: u64) -> Result<(), IommuError> {
        Ok(self.invalidate(iova, len)?)
    }
    fn invalidate_all(&self) -> Result<(), IommuError> {
        Ok(self.invalidate_all()?)
    }
    fn stop_walks(&self) -> Result<(), IommuError> {
        Ok(self.stop_walks()?)
    }
}

impl<P: smmuv3::Platform> IommuOps for SmmuV3<P> {
    fn describe(&self) -> String {
        self.features().to_string()
    }

    fn capabilities(&self) -> Capabilities {
        let features = self.features();
        Capabilities {
            stage1: features.stage1,
            stage2: features.stage2,
            nested: features.nested(),
            coherent_walk: self.coherent(),
            page_sizes: features.page_sizes(),
            stream_groups: None,
            contexts: None,
            free_contexts: None,
            substream_bits: features.substream_bits,
            stall: features.can_stall(),
            ats: features.ats,
            page_requests: features.pri,
        }
    }

    fn add_device(&self, streams: &[StreamMatch], options: MasterOptions) -> Result<Master, IommuError> {
        Ok(self.add_master(streams, options)?)
    }

    fn remove_device(&self, master: Master) -> Result<(), IommuError> {
        Ok(self.remove_master(master)?)
    }

    fn alloc_domain(
        &self,
        spec: DomainSpec,
        options: DomainOptions,
    ) -> Result<Arc<dyn DomainOps>, IommuError> {
        use smmuv3::DomainConfig as Config;
        let parent = |parent: Arc<dyn DomainOps>| {
            let any: Arc<dyn Any + Send + Sync> = parent;
            any.downcast::<smmuv3::Domain<P>>().map_err(|_| IommuError::ForeignDomain)
        };
        let config = match spec {
            DomainSpec::Blocked => Config::Blocked,
            DomainSpec::Identity => Config::Identity,
            DomainSpec::Stage1(paging) => Config::Stage1(paging),
            DomainSpec::Stage2(paging) => Config::Stage2(paging),
            DomainSpec::Nested(domain, paging) => Config::Nested(parent(domain)?, paging),
            DomainSpec::NestedGuest(domain, root) => Config::NestedGuest(parent(domain)?, root),
            DomainSpec::Guest(domain, guest) => Config::Guest(parent(domain)?, guest),
            DomainSpec::Process(root) => Config::Process(root),
        };
        Ok(self.new_domain(config, options)?)
    }

    fn attach(&self, master: &Master, domain: &dyn DomainOps) -> Result<(), IommuError> {
        let any: &dyn Any = domain;
        let domain = any.downcast_ref::<smmuv3::Domain<P>>().ok_or(IommuError::ForeignDomain)?;
        Ok(self.attach(master, domain)?)
    }

    fn detach(&self, master: &Master) -> Result<(), IommuError> {
        Ok(self.detach(master)?)
    }

    fn attach_substream(
        &self,
        master: &Master,
        substream: SubstreamId,
        domain: &dyn DomainOps,
    ) -> Result<(), IommuError> {
        let any: &dyn Any = domain;
        let domain = any.downcast_ref::<smmuv3::Domain<P>>().ok_or(IommuError::ForeignDomain)?;
        Ok(self.attach_substream(master, substream, domain)?)
    }

    fn detach_substream(&self, master: &Master, substream: SubstreamId) -> Result<(), IommuError> {
        Ok(self.detach_substream(master, substream)?)
    }

    fn substream_bits(&self, master: &Master) -> u8 {
        self.substream_bits(master).unwrap_or(0)
    }

    fn set_overrides(&self, master: &Master, overrides: StreamOverrides) -> Result<(), IommuError> {
        Ok(self.set_overrides(master, overrides)?)
    }

    fn handle_irq(&self) -> usize {
        self.handle_irq()
    }

    fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        self.set_fault_handler(handler);
    }

    fn take_faults(&self) -> FaultBatch {
        self.take_faults()
    }

    fn answer(&self, report: &FaultReport, response: FaultResponse) -> Result<(), IommuError> {
        Ok(self.answer(report, response)?)
    }

    fn resume(&self) -> Result<(), IommuError> {
        Ok(self.resume()?)
    }

    fn shutdown(&self) -> Result<bool, IommuError> {
        Ok(self.shutdown()?)
    }
}
