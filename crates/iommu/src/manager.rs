//! Instances, devices and groups: [`IommuCore`].

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::SubstreamId;
use portcullis_drivers::fault::{FaultHandler, FaultReport, FaultResponse};
use portcullis_drivers::ops::{
    DomainKind, DomainOptions, DomainSpec, FaultModel, GuestSte, IommuOps, Master, MasterOptions, Paging,
    StreamMatch, StreamOverrides, TableRoot,
};
use spin::Mutex;

use crate::bind::{Bond, Pasids, SubstreamBond};
use crate::route::{RoutedBatch, RoutedLog, Router};
use crate::{Domain, Error, FwSpec, ReservedKind, ReservedRegion, SOFTWARE_MSI, merge};

/// An IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub u32);
/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);
/// A group: devices that the IOMMU cannot tell apart, and that therefore share a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// The domain of a group that nobody has attached to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DefaultDomain {
    /// Every access faults. A device with direct regions gets a translating domain instead.
    #[default]
    Blocked,
    /// Accesses pass untranslated.
    Identity,
    /// A stage 1 domain of its own, empty but for direct regions.
    Translated,
}

/// What is known about a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its number.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// The IOMMU it is behind.
    pub instance: InstanceId,
    /// Its group.
    pub group: GroupId,
    /// Its streams.
    pub streams: Vec<StreamMatch>,
    /// Its stream table entries.
    pub entries: Vec<usize>,
    /// The domain it is attached to.
    pub domain: Arc<Domain>,
}

pub(crate) struct Device {
    pub name: String,
    pub instance: InstanceId,
    pub master: Master,
    pub group: GroupId,
    pub reserved: Vec<ReservedRegion>,
    pub handler: Option<Arc<dyn FaultHandler>>,
    /// What its substreams are bound to.
    pub substreams: BTreeMap<SubstreamId, SubstreamBond>,
}

pub(crate) struct Group {
    pub instance: InstanceId,
    pub devices: Vec<DeviceId>,
    pub domain: Arc<Domain>,
    pub default: Arc<Domain>,
    pub bond: Option<Bond>,
}

struct Instance {
    name: String,
    ops: Arc<dyn IommuOps>,
}

/// What changes. Domains are never dropped under its lock: that may wait for hardware.
pub(crate) struct State {
    instances: Vec<Instance>,
    pub devices: BTreeMap<DeviceId, Device>,
    pub groups: BTreeMap<GroupId, Group>,
    pub pasids: Pasids,
    next: u32,
}

pub(crate) struct Inner {
    pub state: Mutex<State>,
    pub log: Mutex<RoutedLog>,
    default: DefaultDomain,
}

/// The core. Clones are handles to the same one.
#[derive(Clone)]
pub struct IommuCore {
    pub(crate) inner: Arc<Inner>,
}

impl fmt::Debug for IommuCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuCore").finish_non_exhaustive()
    }
}

impl Default for IommuCore {
    fn default() -> Self {
        Self::new(DefaultDomain::default())
    }
}

impl State {
    pub fn ops(&self, instance: InstanceId) -> Result<Arc<dyn IommuOps>, Error> {
        let found = self.instances.get(instance.0 as usize);
        found.map(|instance| instance.ops.clone()).ok_or(Error::UnknownInstance(instance))
    }
    pub fn device(&self, id: DeviceId) -> Result<&Device, Error> {
        self.devices.get(&id).ok_or(Error::UnknownDevice(id))
    }
    pub fn group(&self, id: GroupId) -> Result<&Group, Error> {
        self.groups.get(&id).ok_or(Error::UnknownGroup(id))
    }

    fn name_of(&self, id: DeviceId) -> String {
        self.devices.get(&id).map(|device| device.name.clone()).unwrap_or_default()
    }

    /// The group of a device, if it is alone in it.
    pub fn singular_group(&self, id: DeviceId) -> Result<GroupId, Error> {
        let device = self.device(id)?;
        let group = self.group(device.group)?;
        if group.devices.len() == 1 {
            return Ok(device.group);
        }
        let others = group.devices.iter().filter(|other| **other != id).map(|other| self.name_of(*other));
        Err(Error::GroupNotSingular {
            device: device.name.clone(),
            group: device.group,
            others: others.collect(),
        })
    }

    /// Refuses to take a bound group's domain away from under the process.
    pub fn not_bound(&self, group: &Group) -> Result<(), Error> {
        match (&group.bond, group.devices.first()) {
            (Some(_), Some(device)) => Err(Error::Bound { device: self.name_of(*device) }),
            _ => Ok(()),
        }
    }

    /// Attaches all devices of a group, or none; direct regions are mapped first. Gives the old domain, for dropping
    /// without the lock.
    pub fn attach(&mut self, id: GroupId, domain: &Arc<Domain>) -> Result<Arc<Domain>, Error> {
        let group = self.group(id)?;
        if group.instance != domain.instance {
            return Err(Error::OtherInstance { domain: domain.instance, device: group.instance });
        }
        let ops = self.ops(group.instance)?;
        let members = || group.devices.iter().filter_map(|device| self.devices.get(device));
        let default = Arc::ptr_eq(domain, &group.default);
        for device in members() {
            map_direct_regions(device, domain, default)?;
        }
        for (done, device) in members().enumerate() {
            if let Err(error) = ops.attach(&device.master, &*domain.ops) {
                for back in members().take(done) {
                    // It was attached there before, so there is nothing that could refuse it.
                    let _cannot_fail = ops.attach(&back.master, &*group.domain.ops);
                }
                return Err(error.into());
            }
        }
        let group = self.groups.get_mut(&id).ok_or(Error::UnknownGroup(id))?;
        Ok(core::mem::replace(&mut group.domain, domain.clone()))
    }

    fn next_id(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1);
        self.next
    }
}

/// A domain with a table of the driver.
fn paging_spec(ops: &dyn IommuOps) -> DomainSpec {
    if ops.capabilities().stage1 {
        DomainSpec::Stage1(Paging::default())
    } else {
        DomainSpec::Stage2(Paging::default())
    }
}

/// Maps what a device needs to have mapped. What its owner may give up is there in its default domain only, as in Linux
/// (`iommu_create_device_direct_mappings`): a domain of somebody else's choice holds nothing of the host's.
fn map_direct_regions(device: &Device, domain: &Domain, default: bool) -> Result<(), Error> {
    let direct = |region: &&ReservedRegion| match region.kind {
        ReservedKind::Direct => true,
        ReservedKind::DirectRelaxable => default,
        _ => false,
    };
    for region in device.reserved.iter().filter(direct) {
        if !domain.map_direct(region)? {
            return Err(Error::DirectRegion {
                device: device.name.clone(),
                start: region.start,
                len: region.len,
                kind: domain.kind(),
            });
        }
    }
    Ok(())
}

impl IommuCore {
    /// A core without IOMMUs.
    pub fn new(default: DefaultDomain) -> Self {
        let state = State {
            instances: Vec::new(),
            devices: BTreeMap::new(),
            groups: BTreeMap::new(),
            pasids: Pasids::default(),
            next: 0,
        };
        let log = Mutex::new(RoutedLog::default());
        Self { inner: Arc::new(Inner { state: Mutex::new(state), log, default }) }
    }

    /// Adds an IOMMU, after its driver has probed it. The core takes its faults from now on.
    pub fn register(&self, name: &str, ops: Arc<dyn IommuOps>) -> InstanceId {
        let instance = {
            let mut state = self.inner.state.lock();
            let instance = InstanceId(state.instances.len() as u32);
            state.instances.push(Instance { name: name.to_string(), ops: ops.clone() });
            instance
        };
        let router = Router { core: Arc::downgrade(&self.inner), instance };
        ops.set_fault_handler(Some(Arc::new(router)));
        instance
    }

    /// The driver of an IOMMU.
    pub fn ops(&self, instance: InstanceId) -> Result<Arc<dyn IommuOps>, Error> {
        self.inner.state.lock().ops(instance)
    }

    /// The name of an IOMMU.
    pub fn instance_name(&self, instance: InstanceId) -> Option<String> {
        let state = self.inner.state.lock();
        state.instances.get(instance.0 as usize).map(|instance| instance.name.clone())
    }

    /// Enters a device (Linux `iommu_probe_device`): its streams into the IOMMU's stream table, itself into a group, its
    /// group into the default domain. Devices that share a stream table entry share the group.
    pub fn add_device(
        &self,
        name: &str,
        instance: InstanceId,
        spec: &FwSpec,
        reserved: &[ReservedRegion],
    ) -> Result<DeviceId, Error> {
        self.add_device_with(name, instance, spec, reserved, MasterOptions::default())
    }

    /// The same for a device that has substreams, bears stalls, or keeps translations (`pasid-num-bits`,
    /// `dma-can-stall`, ATS).
    pub fn add_device_with(
        &self,
        name: &str,
        instance: InstanceId,
        spec: &FwSpec,
        reserved: &[ReservedRegion],
        options: MasterOptions,
    ) -> Result<DeviceId, Error> {
        let ops = self.ops(instance)?;
        let master = ops.add_device(&spec.streams, options)?;
        let mut spare = Vec::new();
        let result = self.enter(name, instance, master, reserved, &ops, &mut spare);
        // Only now: the core is not locked.
        drop(spare);
        result.map_err(|(master, error)| {
            // The error that came first is the cause.
            let _it_blocks_the_streams = ops.remove_device(master);
            error
        })
    }

    fn enter(
        &self,
        name: &str,
        instance: InstanceId,
        master: Master,
        reserved: &[ReservedRegion],
        ops: &Arc<dyn IommuOps>,
        spare: &mut Vec<Arc<Domain>>,
    ) -> Result<DeviceId, (Master, Error)> {
        let mut state = self.inner.state.lock();
        let shares = |device: &&Device| {
            let common = |entry: &usize| master.entries().contains(entry);
            device.instance == instance && device.master.entries().iter().any(common)
        };
        let mut groups: Vec<GroupId> =
            state.devices.values().filter(shares).map(|device| device.group).collect();
        groups.sort_unstable();
        groups.dedup();
        let device = |group| Device {
            name: name.to_string(),
            instance,
            master,
            group,
            reserved: reserved.to_vec(),
            handler: None,
            substreams: BTreeMap::new(),
        };
        let (group, new_domain) = match *groups {
            [] => {
                let needs_map = reserved.iter().any(|region| region.kind == ReservedKind::Direct);
                let spec = match self.inner.default {
                    DefaultDomain::Blocked if !needs_map => DomainSpec::Blocked,
                    DefaultDomain::Identity => DomainSpec::Identity,
                    _ => paging_spec(&**ops),
                };
                match ops.alloc_domain(spec, DomainOptions::default()) {
                    Ok(domain) => (GroupId(state.next_id()), Some(Domain::new(domain, instance))),
                    Err(error) => return Err((device(GroupId(0)).master, error.into())),
                }
            }
            [group] => (group, None),
            _ => {
                let error = Error::GroupConflict { device: name.to_string(), groups };
                return Err((device(GroupId(0)).master, error));
            }
        };
        let device = device(group);
        let domain = match (&new_domain, state.groups.get(&group)) {
            (Some(domain), _) => domain.clone(),
            (None, Some(group)) => group.domain.clone(),
            (None, None) => return Err((device.master, Error::UnknownGroup(group))),
        };
        let default = state.groups.get(&group).is_none_or(|group| Arc::ptr_eq(&group.default, &domain));
        let attached = map_direct_regions(&device, &domain, default)
            .and_then(|()| Ok(ops.attach(&device.master, &*domain.ops)?));
        if let Err(error) = attached {
            spare.extend([Some(domain), new_domain].into_iter().flatten());
            return Err((device.master, error));
        }
        let id = DeviceId(state.next_id());
        state.devices.insert(id, device);
        match new_domain {
            Some(domain) => {
                let default = domain.clone();
                state
                    .groups
                    .insert(group, Group { instance, devices: [id].into(), domain, default, bond: None });
            }
            None => {
                if let Some(group) = state.groups.get_mut(&group) {
                    group.devices.push(id);
                }
            }
        }
        Ok(id)
    }

    /// Takes a device out. Its streams fault (or bypass, as the IOMMU's options say) afterwards, unless others share
    /// them.
    pub fn remove_device(&self, id: DeviceId) -> Result<(), Error> {
        let mut spare = None;
        let (ops, master) = {
            let mut state = self.inner.state.lock();
            let device = state.device(id)?;
            let group_id = device.group;
            let group = state.group(group_id)?;
            if group.devices.len() == 1 {
                state.not_bound(group)?;
            }
            if !device.substreams.is_empty() {
                return Err(Error::Bound { device: device.name.clone() });
            }
            let ops = state.ops(device.instance)?;
            if let Some(group) = state.groups.get_mut(&group_id) {
                group.devices.retain(|device| *device != id);
                if group.devices.is_empty() {
                    spare = state.groups.remove(&group_id);
                }
            }
            let Some(device) = state.devices.remove(&id) else { return Err(Error::UnknownDevice(id)) };
            (ops, device.master)
        };
        let removed = ops.remove_device(master);
        drop(spare);
        Ok(removed?)
    }

    /// Makes a domain for devices behind an IOMMU.
    pub fn alloc_domain(&self, instance: InstanceId, spec: DomainSpec) -> Result<Arc<Domain>, Error> {
        self.alloc_domain_with(instance, spec, FaultModel::default())
    }

    /// The same with a choice of what faults do.
    pub fn alloc_domain_with(
        &self,
        instance: InstanceId,
        spec: DomainSpec,
        fault_model: FaultModel,
    ) -> Result<Arc<Domain>, Error> {
        let ops = self.ops(instance)?;
        // Faults come to the core through the instance, which knows the device.
        let domain = ops.alloc_domain(spec, DomainOptions { fault_model, handler: None })?;
        Ok(Domain::new(domain, instance))
    }

    /// A domain with the hardware's widest addresses, of stage 1 if it has one: what most callers want.
    pub fn paging_domain(&self, instance: InstanceId) -> Result<Arc<Domain>, Error> {
        self.alloc_domain(instance, paging_spec(&*self.ops(instance)?))
    }

    /// A stage 1 domain on top of a stage 2 domain.
    pub fn nested_domain(&self, parent: &Arc<Domain>, paging: Paging) -> Result<Arc<Domain>, Error> {
        self.alloc_domain(parent.instance, DomainSpec::Nested(parent.ops.clone(), paging))
    }

    /// A stage 1 domain with a guest's table, on top of a stage 2 domain.
    pub fn nested_guest_domain(&self, parent: &Arc<Domain>, root: TableRoot) -> Result<Arc<Domain>, Error> {
        self.alloc_domain(parent.instance, DomainSpec::NestedGuest(parent.ops.clone(), root))
    }

    /// Stage 1 as a guest configures it, context descriptors included, on top of a stage 2 domain.
    pub fn guest_domain(&self, parent: &Arc<Domain>, guest: GuestSte) -> Result<Arc<Domain>, Error> {
        self.alloc_domain(parent.instance, DomainSpec::Guest(parent.ops.clone(), guest))
    }

    /// Attaches a device that is alone in its group (Linux `iommu_attach_device`).
    pub fn attach_device(&self, device: DeviceId, domain: &Arc<Domain>) -> Result<(), Error> {
        let group = self.inner.state.lock().singular_group(device)?;
        self.attach_group(group, domain)
    }

    /// Attaches all devices of a group, or none.
    pub fn attach_group(&self, group: GroupId, domain: &Arc<Domain>) -> Result<(), Error> {
        let old = {
            let mut state = self.inner.state.lock();
            let bound = state.group(group)?;
            state.not_bound(bound)?;
            state.attach(group, domain)?
        };
        drop(old);
        Ok(())
    }

    /// Puts a device that is alone in its group back into its default domain.
    pub fn detach_device(&self, device: DeviceId) -> Result<(), Error> {
        let group = self.inner.state.lock().singular_group(device)?;
        self.detach_group(group)
    }

    /// Puts a group back into its default domain.
    pub fn detach_group(&self, group: GroupId) -> Result<(), Error> {
        let default = self.inner.state.lock().group(group)?.default.clone();
        self.attach_group(group, &default)
    }

    /// The group of a device.
    pub fn group_of(&self, device: DeviceId) -> Result<GroupId, Error> {
        Ok(self.inner.state.lock().device(device)?.group)
    }

    /// The devices of a group.
    pub fn devices_of(&self, group: GroupId) -> Result<Vec<DeviceId>, Error> {
        Ok(self.inner.state.lock().group(group)?.devices.clone())
    }

    /// The domain that a device is attached to.
    pub fn domain_of(&self, device: DeviceId) -> Result<Arc<Domain>, Error> {
        let state = self.inner.state.lock();
        Ok(state.group(state.device(device)?.group)?.domain.clone())
    }

    /// Everything about a device.
    pub fn device(&self, id: DeviceId) -> Result<DeviceInfo, Error> {
        let state = self.inner.state.lock();
        let device = state.device(id)?;
        Ok(DeviceInfo {
            id,
            name: device.name.clone(),
            instance: device.instance,
            group: device.group,
            streams: device.master.streams().to_vec(),
            entries: device.master.entries().to_vec(),
            domain: state.group(device.group)?.domain.clone(),
        })
    }

    /// All devices.
    pub fn devices(&self) -> Vec<DeviceId> {
        self.inner.state.lock().devices.keys().copied().collect()
    }

    /// The device with a name.
    pub fn find_device(&self, name: &str) -> Option<DeviceId> {
        let state = self.inner.state.lock();
        state.devices.iter().find(|(_, device)| device.name == name).map(|(id, _)| *id)
    }

    /// The reserved regions of a device and the interrupt window, sorted and merged.
    pub fn reserved_regions(&self, device: DeviceId) -> Result<Vec<ReservedRegion>, Error> {
        let state = self.inner.state.lock();
        Ok(merge(state.device(device)?.reserved.iter().copied().chain([SOFTWARE_MSI])))
    }

    /// Overrides what a device's streams say about privilege and instruction/data.
    pub fn set_overrides(&self, device: DeviceId, overrides: StreamOverrides) -> Result<(), Error> {
        let state = self.inner.state.lock();
        let device = state.device(device)?;
        Ok(state.ops(device.instance)?.set_overrides(&device.master, overrides)?)
    }

    /// Who is asked about a device's faults; goes before its domain's handler.
    pub fn set_fault_handler(
        &self,
        device: DeviceId,
        handler: Option<Arc<dyn FaultHandler>>,
    ) -> Result<(), Error> {
        let old = {
            let mut state = self.inner.state.lock();
            let device = state.devices.get_mut(&device).ok_or(Error::UnknownDevice(device))?;
            core::mem::replace(&mut device.handler, handler)
        };
        // A handler may own domains.
        drop(old);
        Ok(())
    }

    /// For any interrupt of an IOMMU; gives how many faults it handled.
    pub fn handle_irq(&self, instance: InstanceId) -> Result<usize, Error> {
        Ok(self.ops(instance)?.handle_irq())
    }

    /// The answer to a fault that a handler deferred.
    pub fn resume_stalled(
        &self,
        instance: InstanceId,
        bank: u8,
        response: FaultResponse,
    ) -> Result<(), Error> {
        Ok(self.ops(instance)?.resume_stalled(bank, response)?)
    }

    /// The same for any kind of IOMMU.
    pub fn answer(
        &self,
        instance: InstanceId,
        report: &FaultReport,
        response: FaultResponse,
    ) -> Result<(), Error> {
        Ok(self.ops(instance)?.answer(report, response)?)
    }

    /// The faults of all IOMMUs with their devices, since the last time.
    pub fn take_faults(&self) -> RoutedBatch {
        self.inner.log.lock().take()
    }

    /// The kind of domain that a device is attached to.
    pub fn domain_kind(&self, device: DeviceId) -> Result<DomainKind, Error> {
        Ok(self.domain_of(device)?.kind())
    }
}
