//! Binding a device, or one of its substreams, to a process: the device's addresses are the process's addresses.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Access, Iova, SubstreamId};
use portcullis_drivers::ops::{DomainSpec, FaultModel, TableRoot};

use crate::manager::{DeviceId, GroupId, InstanceId, IommuCore, State};
use crate::{Domain, Error, FaultReport};

/// An address space that devices can use: [`Process`](crate::Process), or an operating system's own.
///
/// Whoever implements it keeps the domains that [`join`](Self::join) gives, and tells them before memory or tables are
/// freed: `invalidate` after an unmapping, `stop_walks` at the end.
pub trait AddressSpace: Send + Sync {
    /// Its stage 1 table; `None` after exit.
    fn table_root(&self) -> Option<TableRoot>;
    /// A domain uses the table from now on; `false` if the process has exited meanwhile.
    fn join(&self, domain: &Arc<Domain>) -> bool;
    /// It no longer does.
    fn leave(&self, domain: &Arc<Domain>);
    /// A device's access waits because it faulted, or a device asks for a page. `true`: there is a translation now
    /// that allows the access. By default there never is.
    fn page_fault(&self, va: Iova, access: Access) -> bool {
        let (_, _) = (va, access);
        false
    }
    /// The same with all that is known about the access. An answer of `true` lets the device try again, so what will
    /// never be allowed (a fetch from data, say) has to be refused here. By default [`page_fault`](Self::page_fault)
    /// decides, for data that user mode reaches; everything else is refused.
    fn resolve(&self, fault: &FaultReport) -> bool {
        !fault.instruction && !fault.privileged && self.page_fault(fault.iova, fault.access)
    }
}

/// How to bind.
#[derive(Clone, Copy, Debug, Default)]
pub struct BindOptions {
    /// Registers other than those the process tells; for trying out what a wrong T0SZ or address size does.
    pub root: Option<TableRoot>,
    /// Terminate or stall on a fault.
    pub fault_model: FaultModel,
}

/// A group that is bound.
pub(crate) struct Bond {
    space: Arc<dyn AddressSpace>,
    options: BindOptions,
    before: Arc<Domain>,
}

/// A substream that is bound.
pub(crate) struct SubstreamBond {
    pub space: Arc<dyn AddressSpace>,
    options: BindOptions,
    domain: Arc<Domain>,
}

/// Which substream id an address space has with all devices (Linux: a PASID per mm). From 1 up.
#[derive(Default)]
pub(crate) struct Pasids(BTreeMap<SubstreamId, (Arc<dyn AddressSpace>, u32)>);

impl Pasids {
    /// The id of a space, or the lowest free one, within `bits` bits; counted as used once more.
    fn take(&mut self, space: &Arc<dyn AddressSpace>, bits: u8) -> Option<SubstreamId> {
        if let Some((id, (_, users))) = self.0.iter_mut().find(|(_, (owner, _))| same(owner, space)) {
            *users += 1;
            return Some(*id);
        }
        let free = (1..).map(SubstreamId).find(|id| !self.0.contains_key(id))?;
        if u64::from(free.get()) >> bits != 0 {
            return None;
        }
        self.0.insert(free, (space.clone(), 1));
        Some(free)
    }

    /// One use less; gives the space if it was the last, for dropping without a lock.
    fn give_back(&mut self, id: SubstreamId) -> Option<Arc<dyn AddressSpace>> {
        let (_, users) = self.0.get_mut(&id)?;
        *users = users.saturating_sub(1);
        if *users > 0 {
            return None;
        }
        self.0.remove(&id).map(|(space, _)| space)
    }
}

/// Whether two handles are the same address space.
fn same(a: &Arc<dyn AddressSpace>, b: &Arc<dyn AddressSpace>) -> bool {
    core::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn same_options(a: &BindOptions, b: &BindOptions) -> bool {
    a.root == b.root && a.fault_model == b.fault_model
}

impl SubstreamBond {
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }
}

impl Bond {
    pub fn space(&self) -> &Arc<dyn AddressSpace> {
        &self.space
    }
}

impl State {
    fn bind_substream(
        &mut self,
        device: DeviceId,
        substream: SubstreamId,
        domain: &Arc<Domain>,
        space: &Arc<dyn AddressSpace>,
        options: BindOptions,
    ) -> Result<(), Error> {
        let known = self.device(device)?;
        let ops = self.ops(known.instance)?;
        if known.substreams.contains_key(&substream) {
            return Err(Error::SubstreamBound { device: known.name.clone(), substream });
        }
        let bits = ops.substream_bits(&known.master);
        if u64::from(substream.get()) >> bits != 0 {
            return Err(Error::Substream { device: known.name.clone(), substream, bits });
        }
        ops.attach_substream(&known.master, substream, &*domain.ops)?;
        if let Some(known) = self.devices.get_mut(&device) {
            let bond = SubstreamBond { space: space.clone(), options, domain: domain.clone() };
            known.substreams.insert(substream, bond);
        }
        Ok(())
    }
}

impl IommuCore {
    /// Binds a device that is alone in its group to a process (Linux `iommu_sva_bind_device`). On an IOMMU with one
    /// address space per stream this takes the place of the device's domain until [`unbind`](Self::unbind).
    ///
    /// Devices of one process behind the same IOMMU share a domain and its context bank. Bindings of one process must
    /// not begin and end at the same time.
    pub fn bind(&self, device: DeviceId, space: Arc<dyn AddressSpace>) -> Result<Arc<Domain>, Error> {
        self.bind_with(device, space, BindOptions::default())
    }

    /// The same with options.
    pub fn bind_with(
        &self,
        device: DeviceId,
        space: Arc<dyn AddressSpace>,
        options: BindOptions,
    ) -> Result<Arc<Domain>, Error> {
        let root = options.root.or(space.table_root()).ok_or(Error::ProcessExited)?;
        let (group, instance, shared) = {
            let state = self.inner.state.lock();
            let id = state.singular_group(device)?;
            let group = state.group(id)?;
            state.not_bound(group)?;
            let like_this = |bond: &Bond| same(&bond.space, &space) && same_options(&bond.options, &options);
            let shared = state
                .groups
                .values()
                .find(|other| other.instance == group.instance && other.bond.as_ref().is_some_and(like_this));
            (id, group.instance, shared.map(|group| group.domain.clone()))
        };
        let domain = match shared {
            Some(domain) => domain,
            None => {
                let domain =
                    self.alloc_domain_with(instance, DomainSpec::Process(root), options.fault_model)?;
                if !space.join(&domain) {
                    return Err(Error::ProcessExited);
                }
                domain
            }
        };
        match self.attach_bond(group, &domain, &space, options) {
            Ok(()) => Ok(domain),
            Err(error) => {
                self.leave_if_unused(&space, &domain)?;
                Err(error)
            }
        }
    }

    fn attach_bond(
        &self,
        group: GroupId,
        domain: &Arc<Domain>,
        space: &Arc<dyn AddressSpace>,
        options: BindOptions,
    ) -> Result<(), Error> {
        let mut state = self.inner.state.lock();
        state.not_bound(state.group(group)?)?;
        let before = state.attach(group, domain)?;
        if let Some(group) = state.groups.get_mut(&group) {
            group.bond = Some(Bond { space: space.clone(), options, before });
        }
        Ok(())
    }

    /// Ends a binding: the device is attached to the domain it had before. Works before and after the process has
    /// exited. If an invalidation does not complete, that is the error; the binding has ended, and the process goes on
    /// taking its tables for used.
    pub fn unbind(&self, device: DeviceId) -> Result<(), Error> {
        let (space, domain) = {
            let mut state = self.inner.state.lock();
            let name = state.device(device)?.name.clone();
            // The whole group: devices may have joined it since.
            let id = state.device(device)?.group;
            let bond = state.groups.get_mut(&id).and_then(|group| group.bond.take());
            let Some(bond) = bond else { return Err(Error::NotBound { device: name }) };
            match state.attach(id, &bond.before) {
                Ok(domain) => (bond.space, domain),
                Err(error) => {
                    if let Some(group) = state.groups.get_mut(&id) {
                        group.bond = Some(bond);
                    }
                    return Err(error);
                }
            }
        };
        self.leave_if_unused(&space, &domain)
    }

    /// True if the device is bound to a process.
    pub fn is_bound(&self, device: DeviceId) -> Result<bool, Error> {
        let state = self.inner.state.lock();
        Ok(state.group(state.device(device)?.group)?.bond.is_some())
    }

    /// Binds one substream of a device to a process (Linux `iommu_sva_bind_device`): transactions with that substream use
    /// the process's addresses, all others go on as before. The process has the same substream id with all devices.
    /// Faults of the device are resolved by the process ([`AddressSpace::page_fault`]) where the device waits for
    /// them; `options.fault_model.stall` makes it wait if it can.
    ///
    /// Devices of one process behind the same IOMMU share a domain. Bindings of one process must not begin and end at
    /// the same time.
    pub fn bind_substream(
        &self,
        device: DeviceId,
        space: Arc<dyn AddressSpace>,
        options: BindOptions,
    ) -> Result<(SubstreamId, Arc<Domain>), Error> {
        let root = options.root.or(space.table_root()).ok_or(Error::ProcessExited)?;
        let (substream, instance, shared) = {
            let mut state = self.inner.state.lock();
            state.singular_group(device)?;
            let known = state.device(device)?;
            let instance = known.instance;
            let bits = state.ops(instance)?.substream_bits(&known.master);
            let name = known.name.clone();
            let like_this =
                |bond: &&SubstreamBond| same(&bond.space, &space) && same_options(&bond.options, &options);
            let bonds = state.devices.values().filter(|other| other.instance == instance);
            let shared = bonds.flat_map(|other| other.substreams.values()).find(like_this);
            let shared = shared.map(|bond| bond.domain.clone());
            let substream = state.pasids.take(&space, bits).ok_or(Error::Substream {
                device: name,
                substream: SubstreamId(1),
                bits,
            })?;
            (substream, instance, shared)
        };
        let result = self.bind_to(device, substream, instance, &space, root, options, shared);
        if result.is_err() {
            let unused = self.inner.state.lock().pasids.give_back(substream);
            drop(unused);
        }
        result.map(|domain| (substream, domain))
    }

    #[allow(clippy::too_many_arguments)] // One step of `bind_substream`.
    fn bind_to(
        &self,
        device: DeviceId,
        substream: SubstreamId,
        instance: InstanceId,
        space: &Arc<dyn AddressSpace>,
        root: TableRoot,
        options: BindOptions,
        shared: Option<Arc<Domain>>,
    ) -> Result<Arc<Domain>, Error> {
        let domain = match shared {
            Some(domain) => domain,
            None => {
                let spec = DomainSpec::Process(root);
                let domain = self.alloc_domain_with(instance, spec, options.fault_model)?;
                if !space.join(&domain) {
                    return Err(Error::ProcessExited);
                }
                domain
            }
        };
        let attached = {
            let mut state = self.inner.state.lock();
            state.bind_substream(device, substream, &domain, space, options)
        };
        match attached {
            Ok(()) => Ok(domain),
            Err(error) => {
                self.leave_if_unused(space, &domain)?;
                Err(error)
            }
        }
    }

    /// Ends the binding of a substream: its transactions fault, the device's others go on. Works before and after the
    /// process has exited.
    pub fn unbind_substream(&self, device: DeviceId, substream: SubstreamId) -> Result<(), Error> {
        let (bond, unused) = {
            let mut state = self.inner.state.lock();
            let known = state.device(device)?;
            let not_bound = Error::SubstreamNotBound { device: known.name.clone(), substream };
            if !known.substreams.contains_key(&substream) {
                return Err(not_bound);
            }
            let ops = state.ops(known.instance)?;
            ops.detach_substream(&known.master, substream)?;
            let bond = state.devices.get_mut(&device).and_then(|known| known.substreams.remove(&substream));
            (bond.ok_or(not_bound)?, state.pasids.give_back(substream))
        };
        let left = self.leave_if_unused(&bond.space, &bond.domain);
        drop(unused);
        left
    }

    /// The substreams of a device that are bound.
    pub fn bound_substreams(&self, device: DeviceId) -> Result<Vec<SubstreamId>, Error> {
        Ok(self.inner.state.lock().device(device)?.substreams.keys().copied().collect())
    }

    /// Takes a domain without devices from its process, after the hardware has stopped using the tables.
    fn leave_if_unused(&self, space: &Arc<dyn AddressSpace>, domain: &Arc<Domain>) -> Result<(), Error> {
        let used = {
            let state = self.inner.state.lock();
            let bonds = state.devices.values().flat_map(|device| device.substreams.values());
            let mut domains = bonds.map(|bond| &bond.domain);
            domains.any(|other| Arc::ptr_eq(other, domain))
                || state.groups.values().any(|group| Arc::ptr_eq(&group.domain, domain))
        };
        if !used {
            domain.ops.stop_walks()?;
            space.leave(domain);
        }
        Ok(())
    }
}
