//! Binding a device to a process: the device's addresses are the process's addresses.

use alloc::sync::Arc;

use portcullis_drivers::ops::{DomainSpec, FaultModel, TableRoot};

use crate::manager::{DeviceId, GroupId, IommuCore};
use crate::{Domain, Error};

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

/// Whether two handles are the same address space.
fn same(a: &Arc<dyn AddressSpace>, b: &Arc<dyn AddressSpace>) -> bool {
    core::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn same_options(a: &BindOptions, b: &BindOptions) -> bool {
    a.root == b.root && a.fault_model == b.fault_model
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

    /// Takes a domain without devices from its process, after the hardware has stopped using the tables.
    fn leave_if_unused(&self, space: &Arc<dyn AddressSpace>, domain: &Arc<Domain>) -> Result<(), Error> {
        let used = {
            let state = self.inner.state.lock();
            state.groups.values().any(|group| Arc::ptr_eq(&group.domain, domain))
        };
        if !used {
            domain.ops.stop_walks()?;
            space.leave(domain);
        }
        Ok(())
    }
}
