//! A group that has been taken: blocked until it gets an address space, and whole until it is given back.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_iommu::{DeviceId, Domain, DomainSpec, GroupId, InstanceId};
use spin::Mutex;

use crate::{Ioas, PlatformDevice, Registry, ResetError, VfioDevice, VfioError};

/// What a group and its open devices share.
pub(crate) struct GroupCore {
    pub registry: Registry,
    pub id: GroupId,
    pub instance: InstanceId,
    blocking: Arc<Domain>,
    moves: Mutex<Moves>,
}

/// Where the group has been attached on behalf of its owner.
#[derive(Default)]
struct Moves {
    /// How often. Who puts the group back where it was looks whether somebody else has moved it meanwhile.
    count: u64,
    /// It is not its owner's any more.
    over: bool,
}

impl GroupCore {
    /// Nothing of the group reaches memory any more.
    pub fn block(&self) -> Result<(), VfioError> {
        self.attach(&self.blocking).map(drop)
    }

    /// Attaches the group; gives the number of the move.
    pub fn attach(&self, domain: &Arc<Domain>) -> Result<u64, VfioError> {
        self.attach_after(|| (), domain)
    }

    /// The same after `first`, which is not done either if the group has been released.
    fn attach_after(&self, first: impl FnOnce(), domain: &Arc<Domain>) -> Result<u64, VfioError> {
        let core = self.registry.core();
        // Dropped last: a domain's end may tell its last fault to somebody who comes back here.
        let device = core.devices_of(self.id)?.first().copied();
        let _old = device.and_then(|device| core.domain_of(device).ok());
        let mut moves = self.moves.lock();
        if moves.over {
            return Err(VfioError::Released(self.id));
        }
        first();
        moves.count += 1;
        core.attach_group(self.id, domain)?;
        Ok(moves.count)
    }

    /// The group is going to be somebody else's: what still runs for its owner moves it no more.
    fn end(&self) {
        self.moves.lock().over = true;
    }

    /// Attaches the group where it was before a move, unless it has been moved since.
    fn put_back(&self, after: u64, before: &Arc<Domain>) -> Result<(), VfioError> {
        let moves = self.moves.lock();
        match moves.count == after && !moves.over {
            true => Ok(self.registry.core().attach_group(self.id, before)?),
            false => Ok(()),
        }
    }

    /// Stops a device. One that does not stop is blocked, so that its next access ends its run, and tried again; then
    /// the group is in the domain it had before, unless somebody has moved it meanwhile. One that still does not stop leaves
    /// the group quarantined, if its reset is required.
    pub fn stop(&self, id: DeviceId, device: &PlatformDevice) -> Result<(), VfioError> {
        let Some(driver) = self.registry.reset_driver(device) else { return Ok(()) };
        let clock = self.registry.clock();
        if driver.reset(device, clock).is_ok() {
            return Ok(());
        }
        let before = self.registry.core().domain_of(id)?;
        let blocked = self.attach(&self.blocking)?;
        match driver.reset(device, clock) {
            Ok(()) => self.put_back(blocked, &before),
            Err(error) if self.registry.options(&device.name).reset_required => Err(self.distrust(&error)),
            Err(error) => {
                self.put_back(blocked, &before)?;
                Err(error.into())
            }
        }
    }

    /// The group is blocked, and nobody gets it.
    pub fn distrust(&self, error: &ResetError) -> VfioError {
        let mut refusal = None;
        let mark = || refusal = Some(self.registry.quarantine(self.id, error, &self.blocking));
        // Blocked once more: a guest may have changed its table meanwhile. From now on it cannot.
        match (self.attach_after(mark, &self.blocking), refusal) {
            (Err(error), _) => error,
            (Ok(_), Some(refusal)) => refusal,
            (Ok(_), None) => VfioError::Released(self.id),
        }
    }

    pub fn is_quarantined(&self) -> bool {
        self.registry.is_quarantined(self.id)
    }
}

#[derive(Default)]
struct State {
    ioas: Option<Arc<Ioas>>,
    open: BTreeMap<String, Arc<VfioDevice>>,
    /// Somebody attaches, opens or releases.
    changing: bool,
    released: bool,
}

/// A taken group. Release it with [`release`](Self::release); dropping it does the same and tells nobody what failed.
pub struct Group {
    core: Arc<GroupCore>,
    members: Vec<(DeviceId, Arc<PlatformDevice>)>,
    state: Mutex<State>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("id", &self.core.id).finish_non_exhaustive()
    }
}

impl Group {
    /// Blocks the group and quiets its devices.
    pub(crate) fn take(
        registry: Registry,
        id: GroupId,
        members: Vec<(DeviceId, Arc<PlatformDevice>)>,
    ) -> Result<Arc<Self>, VfioError> {
        let iommu = registry.core();
        let first = members.first().map(|(device, _)| *device);
        let instance = iommu.device(first.ok_or(VfioError::Released(id))?)?.instance;
        let blocking = iommu.alloc_domain(instance, DomainSpec::Blocked)?;
        iommu.attach_group(id, &blocking)?;
        let core = Arc::new(GroupCore { registry, id, instance, blocking, moves: Mutex::default() });
        for (device, platform) in &members {
            let Err(error) = core.stop(*device, platform) else { continue };
            if core.is_quarantined() || core.registry.options(&platform.name).reset_required {
                if !core.is_quarantined() {
                    core.registry.core().detach_group(id)?;
                }
                return Err(error);
            }
        }
        Ok(Arc::new(Self { core, members, state: Mutex::default() }))
    }

    pub(crate) fn shared(&self) -> &Arc<GroupCore> {
        &self.core
    }
    /// Its number.
    pub fn id(&self) -> GroupId {
        self.core.id
    }
    /// The IOMMU it is behind.
    pub fn instance(&self) -> InstanceId {
        self.core.instance
    }
    /// The registry it was taken from.
    pub fn registry(&self) -> &Registry {
        &self.core.registry
    }
    /// Its devices.
    pub fn devices(&self) -> impl Iterator<Item = &Arc<PlatformDevice>> {
        self.members.iter().map(|(_, device)| device)
    }
    /// Its devices' numbers at the IOMMU core.
    pub fn device_ids(&self) -> impl Iterator<Item = DeviceId> {
        self.members.iter().map(|(id, _)| *id)
    }
    /// True if a device of it could not be stopped.
    pub fn is_quarantined(&self) -> bool {
        self.core.is_quarantined()
    }
    /// The address space that it is in.
    pub fn ioas(&self) -> Option<Arc<Ioas>> {
        self.state.lock().ioas.clone()
    }
    /// The devices that are open.
    pub fn open_devices(&self) -> Vec<Arc<VfioDevice>> {
        self.state.lock().open.values().cloned().collect()
    }

    /// Begins a change of the group that must not be interrupted by another.
    fn begin(&self) -> Result<(), VfioError> {
        let mut state = self.state.lock();
        if state.released {
            return Err(VfioError::Released(self.core.id));
        }
        if state.changing {
            return Err(VfioError::Changing(
                self.members.first().map_or_else(String::new, |m| m.1.name.clone()),
            ));
        }
        state.changing = true;
        Ok(())
    }

    fn refuse_quarantined(&self) -> Result<(), VfioError> {
        for device in self.devices() {
            if let Some(reason) = self.core.registry.quarantined(&device.name)? {
                return Err(VfioError::Quarantined { device: device.name.clone(), reason });
            }
        }
        Ok(())
    }

    /// Puts the group into an address space: from now on its devices reach what is mapped there. An address space can hold
    /// groups behind different IOMMUs; each IOMMU has a table of its own.
    pub fn attach(&self, ioas: &Arc<Ioas>) -> Result<(), VfioError> {
        self.begin()?;
        let attached = self.attach_to(ioas);
        let mut state = self.state.lock();
        state.changing = false;
        if attached.is_ok() {
            state.ioas = Some(ioas.clone());
        }
        attached
    }

    fn attach_to(&self, ioas: &Arc<Ioas>) -> Result<(), VfioError> {
        if self.ioas().is_some() {
            return Err(VfioError::Attached(self.core.id));
        }
        self.refuse_quarantined()?;
        ioas.attach_group(self.core.registry.core(), self.core.id, self.core.instance)
    }

    /// Opens a device: resets it, which must succeed if its reset is required.
    pub fn open(&self, name: &str) -> Result<Arc<VfioDevice>, VfioError> {
        let found = self.members.iter().find(|(_, device)| device.name == name);
        let (id, device) =
            found.ok_or_else(|| VfioError::NotInGroup { device: name.to_string(), group: self.core.id })?;
        self.begin()?;
        let opened = self.open_member(*id, device);
        let mut state = self.state.lock();
        state.changing = false;
        if let Ok(opened) = &opened {
            state.open.insert(name.to_string(), opened.clone());
        }
        opened
    }

    fn open_member(&self, id: DeviceId, device: &Arc<PlatformDevice>) -> Result<Arc<VfioDevice>, VfioError> {
        let registry = &self.core.registry;
        if registry.owner(&device.name)? != crate::Owner::Vfio {
            let driver = crate::VFIO_DRIVER.to_string();
            return Err(VfioError::NotBound { device: device.name.clone(), driver });
        }
        let closed = {
            let mut state = self.state.lock();
            if state.ioas.is_none() {
                return Err(VfioError::NoIoas(self.core.id));
            }
            match state.open.get(&device.name) {
                Some(open) if !open.is_closed() => return Err(VfioError::Open(device.name.clone())),
                _ => state.open.remove(&device.name),
            }
        };
        drop(closed);
        self.refuse_quarantined()?;
        let required = registry.options(&device.name).reset_required;
        if required && registry.reset_driver(device).is_none() {
            let compatible = device.compatible.clone();
            return Err(VfioError::NoResetFunction { device: device.name.clone(), compatible });
        }
        match self.core.stop(id, device) {
            Err(error) if required => Err(error),
            _ => Ok(VfioDevice::new(self.core.clone(), id, device.clone())),
        }
    }

    /// Closes all open devices, which stops them.
    fn close_all(&self) -> Result<(), VfioError> {
        let open = core::mem::take(&mut self.state.lock().open);
        let mut result = Ok(());
        for device in open.values() {
            result = result.and(device.close());
        }
        result
    }

    /// Closes all devices and takes the group out of its address space. It is blocked afterwards.
    ///
    /// # Errors
    /// It is out of it all the same; memory that it might still reach stays pinned.
    pub fn detach(&self) -> Result<(), VfioError> {
        self.begin()?;
        let result = self.detach_from();
        self.state.lock().changing = false;
        result
    }

    fn detach_from(&self) -> Result<(), VfioError> {
        let closed = self.close_all();
        let Some(ioas) = self.ioas() else { return closed };
        // Blocked first: what is unmapped or unpinned later is out of reach already.
        self.core.block()?;
        // What the IOMMU has recorded so far is this owner's, and the next one shall not be told of it.
        let _handled = self.core.registry.core().handle_irq(self.core.instance);
        let detached = ioas.detach_group(self.core.id, self.core.instance);
        self.state.lock().ioas = None;
        closed.and(detached.map_err(VfioError::from))
    }

    /// Gives the group back to the host: devices are closed (stopped and reset), the address space is left, the default domain
    /// is attached again. A quarantined group stays blocked instead.
    ///
    /// # Errors
    /// The group is released all the same, except when the IOMMU refuses to block it.
    pub fn release(&self) -> Result<(), VfioError> {
        self.begin()?;
        let result = self.detach_from();
        if self.ioas().is_some() {
            self.state.lock().changing = false;
            return result;
        }
        self.core.end();
        let back = match self.core.is_quarantined() {
            true => Ok(()),
            false => self.core.registry.core().detach_group(self.core.id).map_err(VfioError::from),
        };
        {
            let mut state = self.state.lock();
            (state.changing, state.released) = (false, true);
        }
        self.core.registry.group_released(self.core.id);
        result.and(back)
    }

    /// True after [`release`](Self::release).
    pub fn is_released(&self) -> bool {
        self.state.lock().released
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.is_released() {
            // There is nobody to tell; what failed stays blocked or pinned.
            let _told_to_nobody = self.release();
        }
    }
}
