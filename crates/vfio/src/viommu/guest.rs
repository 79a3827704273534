//! The guest's driver of a virtual IOMMU.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;

use portcullis_arch::StreamId;
use portcullis_drivers::fault::{
    FaultBatch, FaultDetail, FaultHandler, FaultLog, FaultReport, FaultResponse,
};
use portcullis_drivers::ops::{
    Capabilities, DomainOps, DomainOptions, DomainSpec, IommuError, IommuOps, Master, MasterOptions,
    StreamMatch, StreamOverrides,
};
use portcullis_hal::DmaMemory;
use spin::Mutex;

use super::domain::GuestDomain;
use super::{ViommuError, ViommuHost, ViommuTable};

/// Faults that are kept.
const CAPACITY: usize = 256;

/// What an endpoint is used for.
struct Endpoint<M: DmaMemory> {
    number: u32,
    /// Devices that have it.
    devices: usize,
    /// Not owned: the core keeps domains.
    domain: Option<alloc::sync::Weak<GuestDomain<M>>>,
}

/// A virtual IOMMU's driver: stage 1 domains with tables in memory `M`, which is the guest's.
///
/// Its streams are the host's endpoints. All endpoints are blocked when it begins.
pub struct GuestIommu<M: DmaMemory> {
    host: Arc<dyn ViommuHost>,
    memory: M,
    endpoints: Mutex<Vec<Endpoint<M>>>,
    /// Domains by their address, to find one again from what the core has.
    domains: Mutex<BTreeMap<usize, alloc::sync::Weak<GuestDomain<M>>>>,
    handler: Mutex<Option<Arc<dyn FaultHandler>>>,
    log: Mutex<FaultLog>,
}

impl<M: DmaMemory + Clone + 'static> GuestIommu<M> {
    /// Takes the virtual IOMMU into use.
    pub fn new(host: Arc<dyn ViommuHost>, memory: M) -> Result<Arc<Self>, ViommuError> {
        let mut endpoints = Vec::new();
        for number in host.endpoints() {
            host.set_table(number, ViommuTable::Blocked)?;
            endpoints.push(Endpoint { number, devices: 0, domain: None });
        }
        Ok(Arc::new(Self {
            host,
            memory,
            endpoints: Mutex::new(endpoints),
            domains: Mutex::default(),
            handler: Mutex::new(None),
            log: Mutex::new(FaultLog::new(CAPACITY)),
        }))
    }

    /// The host's side.
    pub fn host(&self) -> &Arc<dyn ViommuHost> {
        &self.host
    }

    /// The endpoint with a place in the list.
    fn number(&self, entry: usize) -> Result<u32, IommuError> {
        let endpoints = self.endpoints.lock();
        let found = endpoints.get(entry).map(|endpoint| endpoint.number);
        found.ok_or(IommuError::Virtual { reason: "there is no such endpoint" })
    }

    fn key(domain: &GuestDomain<M>) -> usize {
        core::ptr::from_ref(domain).addr()
    }

    /// Notes where an endpoint points; gives where it pointed.
    fn pointed(&self, entry: usize, domain: Option<&GuestDomain<M>>) -> Option<Arc<GuestDomain<M>>> {
        let weak = domain.and_then(|domain| self.domains.lock().get(&Self::key(domain)).cloned());
        let mut endpoints = self.endpoints.lock();
        let endpoint = endpoints.get_mut(entry)?;
        core::mem::replace(&mut endpoint.domain, weak)?.upgrade()
    }
}

impl<M: DmaMemory + Clone + 'static> IommuOps for GuestIommu<M> {
    fn describe(&self) -> String {
        let info = self.host.info();
        let walk = if info.coherent_walk { "coherent" } else { "non-coherent" };
        format!(
            "virtual IOMMU: stage 1 over its host's stage 2, {} bit addresses to {} bit physical ones, {} pages, {walk} walk",
            info.va_bits,
            info.ipa_bits,
            info.smallest_granule(),
        )
    }

    fn capabilities(&self) -> Capabilities {
        let info = self.host.info();
        let sizes = [
            (info.granule_4k, 1u64 << 12 | 1 << 21 | 1 << 30),
            (info.granule_16k, 1 << 14 | 1 << 25),
            (info.granule_64k, 1 << 16 | 1 << 29),
        ];
        Capabilities {
            stage1: true,
            stage2: false,
            nested: false,
            coherent_walk: info.coherent_walk,
            page_sizes: sizes.iter().filter(|(has, _)| *has).fold(0, |all, (_, sizes)| all | sizes),
            stream_groups: Some(self.endpoints.lock().len()),
            contexts: None,
            free_contexts: None,
            substream_bits: 0,
            stall: false,
            ats: false,
            page_requests: false,
        }
    }

    fn add_device(&self, streams: &[StreamMatch], _: MasterOptions) -> Result<Master, IommuError> {
        let mut endpoints = self.endpoints.lock();
        let mut entries = Vec::new();
        for stream in streams {
            let found = endpoints.iter().position(|e| *stream == StreamMatch::exact(e.number));
            entries.push(found.ok_or(IommuError::Virtual { reason: "there is no such endpoint" })?);
        }
        if entries.is_empty() {
            return Err(IommuError::Virtual { reason: "the device has no endpoint" });
        }
        for entry in &entries {
            if let Some(endpoint) = endpoints.get_mut(*entry) {
                endpoint.devices += 1;
            }
        }
        Ok(Master::new(entries.into_boxed_slice(), streams.into()))
    }

    fn remove_device(&self, master: Master) -> Result<(), IommuError> {
        let mut result = Ok(());
        for &entry in master.entries() {
            let unused = {
                let mut endpoints = self.endpoints.lock();
                let Some(endpoint) = endpoints.get_mut(entry) else { continue };
                endpoint.devices = endpoint.devices.saturating_sub(1);
                endpoint.devices == 0
            };
            if unused {
                let number = self.number(entry)?;
                match self.host.set_table(number, ViommuTable::Blocked) {
                    Ok(()) | Err(ViommuError::Gone) => {
                        if let Some(old) = self.pointed(entry, None) {
                            old.leave(number);
                        }
                    }
                    Err(error) => result = Err(error.into()),
                }
            }
        }
        result
    }

    fn alloc_domain(
        &self,
        spec: DomainSpec,
        options: DomainOptions,
    ) -> Result<Arc<dyn DomainOps>, IommuError> {
        if options.fault_model.stall {
            return Err(IommuError::Unsupported { what: "stalls" });
        }
        let domain = GuestDomain::new(self.host.clone(), &self.memory, spec)?;
        let mut domains = self.domains.lock();
        domains.retain(|_, domain| domain.strong_count() > 0);
        domains.insert(Self::key(&domain), Arc::downgrade(&domain));
        Ok(domain)
    }

    fn attach(&self, master: &Master, domain: &dyn DomainOps) -> Result<(), IommuError> {
        let any: &dyn Any = domain;
        let domain = any.downcast_ref::<GuestDomain<M>>().ok_or(IommuError::ForeignDomain)?;
        if !self.domains.lock().contains_key(&Self::key(domain)) {
            return Err(IommuError::ForeignDomain);
        }
        for &entry in master.entries() {
            let number = self.number(entry)?;
            domain.join(number)?;
            if let Some(old) = self.pointed(entry, Some(domain))
                && Self::key(&old) != Self::key(domain)
            {
                old.leave(number);
            }
        }
        Ok(())
    }

    fn detach(&self, master: &Master) -> Result<(), IommuError> {
        for &entry in master.entries() {
            let number = self.number(entry)?;
            self.host.set_table(number, ViommuTable::Blocked)?;
            if let Some(old) = self.pointed(entry, None) {
                old.leave(number);
            }
        }
        Ok(())
    }

    fn set_overrides(&self, _: &Master, overrides: StreamOverrides) -> Result<(), IommuError> {
        match overrides == StreamOverrides::default() {
            true => Ok(()),
            false => Err(IommuError::Unsupported { what: "overrides of what streams say" }),
        }
    }

    fn handle_irq(&self) -> usize {
        let (faults, _lost_at_the_host) = self.host.take_faults();
        for fault in &faults {
            let report = FaultReport {
                reason: fault.reason,
                stream: Some(StreamId(fault.endpoint)),
                substream: None,
                iova: fault.iova,
                ipa: None,
                access: fault.access,
                privileged: fault.privileged,
                instruction: fault.instruction,
                stage: Some(1),
                level: fault.level,
                bank: None,
                stalled: false,
                detail: FaultDetail::Virtual,
            };
            let handler = self.handler.lock().clone();
            if let Some(handler) = handler {
                // It is terminated already, whatever the answer.
                let _too_late = handler.fault(&report);
            }
            self.log.lock().push(report);
        }
        faults.len()
    }

    fn set_fault_handler(&self, handler: Option<Arc<dyn FaultHandler>>) {
        let old = core::mem::replace(&mut *self.handler.lock(), handler);
        drop(old);
    }

    fn take_faults(&self) -> FaultBatch {
        self.log.lock().take()
    }

    fn answer(&self, _: &FaultReport, _: FaultResponse) -> Result<(), IommuError> {
        Err(IommuError::Unsupported { what: "stalled transactions" })
    }

    fn resume(&self) -> Result<(), IommuError> {
        let all: Vec<_> = {
            let endpoints = self.endpoints.lock();
            endpoints.iter().map(|e| (e.number, e.domain.as_ref().and_then(|d| d.upgrade()))).collect()
        };
        for (number, domain) in all {
            let table = domain.as_ref().map_or(ViommuTable::Blocked, |domain| domain.as_table());
            self.host.set_table(number, table)?;
        }
        Ok(())
    }

    fn shutdown(&self) -> Result<bool, IommuError> {
        let all: Vec<_> = {
            let endpoints = self.endpoints.lock();
            endpoints.iter().map(|e| (e.number, e.domain.is_some())).collect()
        };
        for (number, _) in &all {
            self.host.set_table(*number, ViommuTable::Blocked)?;
        }
        Ok(all.iter().any(|(_, used)| *used))
    }
}

impl<M: DmaMemory> fmt::Debug for GuestIommu<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestIommu").field("info", &self.host.info()).finish_non_exhaustive()
    }
}
