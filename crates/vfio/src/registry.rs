//! Which driver owns which device: the part of a driver core that passthrough needs.
//!
//! A device is bound to a host driver, to [`VFIO_DRIVER`], or to none. Host drivers are told ([`HostDriver`]); a refusal says
//! who is in the way. While a group is taken, none of its devices can be bound to a host driver.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_drivers::ops::StreamMatch;
use portcullis_hal::Clock;
use portcullis_iommu::{DeviceId, Domain, GroupId, IommuCore, ReservedKind};
use spin::Mutex;

use crate::{Group, GroupUser, PlatformDevice, ResetDriver, ResetDrivers, ResetError, VfioError};

/// The name that the passthrough driver is bound by.
pub const VFIO_DRIVER: &str = "vfio-platform";

/// A driver of the host. Neither call may call back into the registry.
pub trait HostDriver: Send + Sync {
    /// Its name (as `/sys/bus/platform/drivers` has it).
    fn name(&self) -> &str;
    /// The `compatible` strings of its devices.
    fn compatible(&self) -> Vec<String>;
    /// Takes the device into use, or says why not.
    fn probe(&self, device: &PlatformDevice) -> Result<(), String>;
    /// Gives it up: no DMA, no interrupts, no mappings afterwards. After an error it still has it.
    fn remove(&self, device: &PlatformDevice) -> Result<(), String>;
}

/// Who owns a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody.
    None,
    /// A host driver, by name.
    Host(String),
    /// The passthrough driver.
    Vfio,
    /// Somebody is binding or unbinding it now.
    Changing,
}

/// How the passthrough driver treats a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfioOptions {
    /// A device without a reset driver, or whose reset fails, is refused (Linux: `reset_required`, true).
    pub reset_required: bool,
}

impl Default for VfioOptions {
    fn default() -> Self {
        Self { reset_required: true }
    }
}

struct Entry {
    device: Arc<PlatformDevice>,
    owner: Owner,
    options: VfioOptions,
}

/// A group that stays blocked.
struct Quarantine {
    device: String,
    reason: String,
    /// Keeps its streams blocked by a domain that says so.
    _blocking: Arc<Domain>,
}

#[derive(Default)]
struct State {
    devices: BTreeMap<String, Entry>,
    drivers: BTreeMap<String, Arc<dyn HostDriver>>,
    /// The device that each taken group was taken by.
    taken: BTreeMap<GroupId, String>,
    quarantined: BTreeMap<GroupId, Quarantine>,
}

struct Inner {
    core: IommuCore,
    clock: Arc<dyn Clock>,
    resets: ResetDrivers,
    state: Mutex<State>,
}

/// Devices and who owns them. Clones are handles to the same one.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl State {
    fn entry(&self, name: &str) -> Result<&Entry, VfioError> {
        self.devices.get(name).ok_or_else(|| VfioError::UnknownDevice(name.to_string()))
    }
    fn entry_mut(&mut self, name: &str) -> Result<&mut Entry, VfioError> {
        self.devices.get_mut(name).ok_or_else(|| VfioError::UnknownDevice(name.to_string()))
    }
    fn of_device(&self, id: DeviceId) -> Option<&Entry> {
        self.devices.values().find(|entry| entry.device.device == Some(id))
    }
}

impl Entry {
    /// Refuses unless the device has no driver.
    fn unowned(&self) -> Result<(), VfioError> {
        let device = self.device.name.clone();
        match &self.owner {
            Owner::None => Ok(()),
            Owner::Host(driver) => Err(VfioError::Bound { device, driver: driver.clone() }),
            Owner::Vfio => Err(VfioError::Bound { device, driver: VFIO_DRIVER.to_string() }),
            Owner::Changing => Err(VfioError::Changing(device)),
        }
    }
}

impl Registry {
    /// No devices yet; the reset drivers of this crate. `clock` bounds the waits for devices.
    pub fn new(core: IommuCore, clock: Arc<dyn Clock>) -> Self {
        Self::with_resets(core, clock, ResetDrivers::default())
    }

    /// The same with other reset drivers.
    pub fn with_resets(core: IommuCore, clock: Arc<dyn Clock>, resets: ResetDrivers) -> Self {
        Self { inner: Arc::new(Inner { core, clock, resets, state: Mutex::default() }) }
    }

    /// The IOMMU core.
    pub fn core(&self) -> &IommuCore {
        &self.inner.core
    }

    /// The clock of the waits.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.inner.clock
    }

    /// Enters a device, without a driver.
    pub fn add_device(&self, device: PlatformDevice) -> Result<(), VfioError> {
        let mut state = self.inner.state.lock();
        if state.devices.contains_key(&device.name) {
            return Err(VfioError::Exists(device.name));
        }
        let (name, device) = (device.name.clone(), Arc::new(device));
        state.devices.insert(name, Entry { device, owner: Owner::None, options: VfioOptions::default() });
        Ok(())
    }

    /// Enters a driver of the host.
    pub fn add_driver(&self, driver: Arc<dyn HostDriver>) -> Result<(), VfioError> {
        let name = driver.name().to_string();
        let mut state = self.inner.state.lock();
        if name == VFIO_DRIVER || state.drivers.contains_key(&name) {
            return Err(VfioError::Exists(name));
        }
        state.drivers.insert(name, driver);
        Ok(())
    }

    /// A device.
    pub fn device(&self, name: &str) -> Result<Arc<PlatformDevice>, VfioError> {
        Ok(self.inner.state.lock().entry(name)?.device.clone())
    }

    /// The names of all devices.
    pub fn devices(&self) -> Vec<String> {
        self.inner.state.lock().devices.keys().cloned().collect()
    }

    /// Who owns a device.
    pub fn owner(&self, name: &str) -> Result<Owner, VfioError> {
        Ok(self.inner.state.lock().entry(name)?.owner.clone())
    }

    /// How a device can be reset.
    pub fn reset_driver(&self, device: &PlatformDevice) -> Option<Arc<dyn ResetDriver>> {
        self.inner.resets.of(device).cloned()
    }

    /// Binds a device to a host driver, or to [`VFIO_DRIVER`] with its default options.
    pub fn bind(&self, device: &str, driver: &str) -> Result<(), VfioError> {
        if driver == VFIO_DRIVER {
            return self.bind_vfio(device, VfioOptions::default());
        }
        let (found, host) = {
            let mut state = self.inner.state.lock();
            let host = state.drivers.get(driver).cloned();
            let host = host.ok_or_else(|| VfioError::UnknownDriver(driver.to_string()))?;
            let entry = state.entry(device)?;
            entry.unowned()?;
            let found = entry.device.clone();
            let knows = host.compatible();
            if !found.compatible.iter().any(|name| knows.contains(name)) {
                return Err(VfioError::NoMatch {
                    device: device.to_string(),
                    driver: driver.to_string(),
                    compatible: found.compatible.clone(),
                });
            }
            if let Some(id) = found.device {
                self.host_may_use(&state, device, self.inner.core.group_of(id)?)?;
            }
            state.entry_mut(device)?.owner = Owner::Changing;
            (found, host)
        };
        let probed = host.probe(&found);
        let mut state = self.inner.state.lock();
        state.entry_mut(device)?.owner = match probed {
            Ok(()) => Owner::Host(driver.to_string()),
            Err(_) => Owner::None,
        };
        probed.map_err(|reason| VfioError::Driver {
            device: device.to_string(),
            driver: driver.to_string(),
            action: "probe",
            reason,
        })
    }

    /// A host driver does DMA in the group's default domain (Linux `iommu_device_use_default_domain`).
    fn host_may_use(&self, state: &State, device: &str, group: GroupId) -> Result<(), VfioError> {
        if let Some(quarantine) = state.quarantined.get(&group) {
            return Err(quarantine.refusal());
        }
        if state.taken.contains_key(&group) {
            return Err(VfioError::GroupTaken { device: device.to_string(), group });
        }
        Ok(())
    }

    /// Binds a device to the passthrough driver.
    pub fn bind_vfio(&self, device: &str, options: VfioOptions) -> Result<(), VfioError> {
        let mut state = self.inner.state.lock();
        let entry = state.entry(device)?;
        entry.unowned()?;
        if entry.device.device.is_none() {
            return Err(VfioError::NoIommu(device.to_string()));
        }
        if options.reset_required && self.inner.resets.of(&entry.device).is_none() {
            let compatible = entry.device.compatible.clone();
            return Err(VfioError::NoResetFunction { device: device.to_string(), compatible });
        }
        let entry = state.entry_mut(device)?;
        (entry.owner, entry.options) = (Owner::Vfio, options);
        Ok(())
    }

    /// Takes a device from its driver, whichever it is.
    pub fn unbind(&self, device: &str) -> Result<(), VfioError> {
        let (found, driver) = {
            let mut state = self.inner.state.lock();
            let entry = state.entry(device)?;
            match entry.owner.clone() {
                Owner::None => {
                    let driver = "any driver".to_string();
                    return Err(VfioError::NotBound { device: device.to_string(), driver });
                }
                Owner::Changing => return Err(VfioError::Changing(device.to_string())),
                Owner::Vfio => {
                    if let Some(id) = entry.device.device {
                        let group = self.inner.core.group_of(id)?;
                        if state.taken.contains_key(&group) {
                            return Err(VfioError::GroupTaken { device: device.to_string(), group });
                        }
                    }
                    state.entry_mut(device)?.owner = Owner::None;
                    return Ok(());
                }
                Owner::Host(name) => {
                    let driver = state.drivers.get(&name).cloned();
                    let driver = driver.ok_or_else(|| VfioError::UnknownDriver(name.clone()))?;
                    let entry = state.entry_mut(device)?;
                    entry.owner = Owner::Changing;
                    (entry.device.clone(), driver)
                }
            }
        };
        let removed = driver.remove(&found);
        let name = driver.name().to_string();
        self.inner.state.lock().entry_mut(device)?.owner = match removed {
            Ok(()) => Owner::None,
            Err(_) => Owner::Host(name.clone()),
        };
        removed.map_err(|reason| VfioError::Driver {
            device: device.to_string(),
            driver: name,
            action: "removal",
            reason,
        })
    }

    /// Takes the whole group of a device that is bound to [`VFIO_DRIVER`]. Every other device of it must be bound to
    /// [`VFIO_DRIVER`] or to nothing. The group is blocked at the IOMMU, and all its devices that can be reset are reset.
    ///
    /// # Errors
    /// Refusals change nothing. A device that does not stop although it is blocked is [`VfioError::Quarantined`] if its
    /// reset is required.
    pub fn take_group(&self, device: &str) -> Result<Arc<Group>, VfioError> {
        let core = &self.inner.core;
        let (id, members) = {
            let mut state = self.inner.state.lock();
            let entry = state.entry(device)?;
            if entry.owner != Owner::Vfio {
                let driver = VFIO_DRIVER.to_string();
                return Err(VfioError::NotBound { device: device.to_string(), driver });
            }
            let asked = entry.device.device.ok_or_else(|| VfioError::NoIommu(device.to_string()))?;
            let id = core.group_of(asked)?;
            self.host_may_use(&state, device, id)?;
            let devices = core.devices_of(id)?;
            self.viable(&state, device, asked, id, &devices)?;
            let members =
                devices.iter().filter_map(|device| Some((*device, state.of_device(*device)?.device.clone())));
            let members: Vec<_> = members.collect();
            state.taken.insert(id, device.to_string());
            (id, members)
        };
        let give_back = |error| {
            self.inner.state.lock().taken.remove(&id);
            error
        };
        self.may_be_given_away(&members).map_err(give_back)?;
        Group::take(self.clone(), id, members).map_err(give_back)
    }

    /// Refuses if a device of the group is somebody's.
    fn viable(
        &self,
        state: &State,
        device: &str,
        asked: DeviceId,
        group: GroupId,
        devices: &[DeviceId],
    ) -> Result<(), VfioError> {
        let core = &self.inner.core;
        let mine = core.device(asked)?.streams;
        let mut users = Vec::new();
        for other in devices.iter().filter(|other| **other != asked) {
            let driver = match state.of_device(*other).map(|entry| &entry.owner) {
                Some(Owner::None | Owner::Vfio) => continue,
                Some(Owner::Host(driver)) => Some(driver.clone()),
                Some(Owner::Changing) => Some("a driver that comes or goes".to_string()),
                None => None,
            };
            let info = core.device(*other)?;
            let shares = |stream: &&StreamMatch| mine.iter().any(|own| own.overlaps(stream));
            let shared = info.streams.iter().filter(shares).copied().collect();
            users.push(GroupUser { device: info.name, driver, shared });
        }
        match users.is_empty() {
            true => Ok(()),
            false => Err(VfioError::NotViable { device: device.to_string(), group, users }),
        }
    }

    fn may_be_given_away(&self, members: &[(DeviceId, Arc<PlatformDevice>)]) -> Result<(), VfioError> {
        let core = &self.inner.core;
        for (id, device) in members {
            if !core.bound_substreams(*id)?.is_empty() {
                return Err(VfioError::SubstreamsBound(device.name.clone()));
            }
            let direct = core.reserved_regions(*id)?.into_iter().find(|r| r.kind == ReservedKind::Direct);
            if let Some(region) = direct {
                let (start, len) = (region.start, region.len);
                return Err(VfioError::DirectRegion { device: device.name.clone(), start, len });
            }
        }
        Ok(())
    }

    pub(crate) fn options(&self, device: &str) -> VfioOptions {
        self.inner.state.lock().devices.get(device).map(|entry| entry.options).unwrap_or_default()
    }

    /// The group is nobody's any more.
    pub(crate) fn group_released(&self, group: GroupId) {
        self.inner.state.lock().taken.remove(&group);
    }

    /// The group stays blocked, and nobody gets it.
    pub(crate) fn quarantine(&self, group: GroupId, error: &ResetError, blocking: &Arc<Domain>) -> VfioError {
        let reason = error.to_string();
        let quarantine = Quarantine { device: error.device.clone(), reason, _blocking: blocking.clone() };
        let refusal = quarantine.refusal();
        let old = self.inner.state.lock().quarantined.insert(group, quarantine);
        drop(old);
        refusal
    }

    pub(crate) fn is_quarantined(&self, group: GroupId) -> bool {
        self.inner.state.lock().quarantined.contains_key(&group)
    }

    /// Why a device's group is quarantined, if it is.
    pub fn quarantined(&self, device: &str) -> Result<Option<String>, VfioError> {
        let state = self.inner.state.lock();
        let Some(id) = state.entry(device)?.device.device else { return Ok(None) };
        let group = self.inner.core.group_of(id)?;
        Ok(state.quarantined.get(&group).map(|quarantine| quarantine.reason.clone()))
    }

    /// Tries once more to reset the devices of a quarantined group. When all have stopped, the group is free again and back in
    /// its default domain. The owner must have released it.
    pub fn rescue(&self, device: &str) -> Result<(), VfioError> {
        let core = &self.inner.core;
        let (group, members) = {
            let mut state = self.inner.state.lock();
            let id = state.entry(device)?.device.device;
            let id = id.ok_or_else(|| VfioError::NoIommu(device.to_string()))?;
            let group = core.group_of(id)?;
            if state.taken.contains_key(&group) {
                return Err(VfioError::GroupTaken { device: device.to_string(), group });
            }
            if !state.quarantined.contains_key(&group) {
                return Ok(());
            }
            let members: Vec<_> = core
                .devices_of(group)?
                .into_iter()
                .filter_map(|id| Some(state.of_device(id)?.device.clone()))
                .collect();
            state.taken.insert(group, device.to_string());
            (group, members)
        };
        let reset = members.iter().try_for_each(|device| match self.reset_driver(device) {
            Some(driver) => driver.reset(device, self.clock()),
            None => Ok(()),
        });
        let freed = match reset {
            Ok(()) => core.detach_group(group).map_err(VfioError::from),
            Err(error) => Err(error.into()),
        };
        let mut state = self.inner.state.lock();
        state.taken.remove(&group);
        let quarantine = if freed.is_ok() { state.quarantined.remove(&group) } else { None };
        drop(state);
        drop(quarantine);
        freed
    }
}

impl Quarantine {
    fn refusal(&self) -> VfioError {
        VfioError::Quarantined { device: self.device.clone(), reason: self.reason.clone() }
    }
}
