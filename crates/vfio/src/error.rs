//! What can go wrong with passthrough.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_drivers::ops::StreamMatch;
use portcullis_iommu::GroupId;
use thiserror::Error;

use crate::{IoasError, ResetError, ViommuError, VmError};

/// Who stands in the way of taking a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupUser {
    /// The device.
    pub device: String,
    /// The host driver that has it; `None` for a device that nobody told the registry about.
    pub driver: Option<String>,
    /// Streams that it shares with the device that was asked for.
    pub shared: Vec<StreamMatch>,
}

impl fmt::Display for GroupUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{} is bound to {driver}", self.device)?,
            None => write!(f, "{} is not under the control of this host", self.device)?,
        }
        for (n, stream) in self.shared.iter().enumerate() {
            write!(f, "{}{stream}", if n == 0 { " and shares stream " } else { ", " })?;
        }
        Ok(())
    }
}

struct Users<'a>(&'a [GroupUser]);

impl fmt::Display for Users<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, user) in self.0.iter().enumerate() {
            write!(f, "{}{user}", if n == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// A request that was not carried out. Unless the variant says otherwise, nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VfioError {
    /// From the IOMMU core.
    #[error(transparent)]
    Iommu(#[from] portcullis_iommu::Error),
    /// From an I/O address space.
    #[error(transparent)]
    Ioas(#[from] IoasError),
    /// From a virtual machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// From a virtual IOMMU.
    #[error(transparent)]
    Viommu(#[from] ViommuError),
    /// The device could not be reset. It has not changed hands.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// No such device.
    #[error("there is no device {0}")]
    UnknownDevice(String),
    /// No such host driver.
    #[error("there is no driver {0}")]
    UnknownDriver(String),
    /// The name is taken.
    #[error("there is a device or driver {0} already")]
    Exists(String),
    /// The device has a driver.
    #[error("device {device} is bound to driver {driver}: unbind it first")]
    Bound {
        /// The device.
        device: String,
        /// Its driver.
        driver: String,
    },
    /// The device has no driver, or not that one.
    #[error("device {device} is not bound to {driver}")]
    NotBound {
        /// The device.
        device: String,
        /// The driver.
        driver: String,
    },
    /// Another call is binding or unbinding it.
    #[error("device {0} is being bound or unbound")]
    Changing(String),
    /// The driver is for other devices.
    #[error("driver {driver} does not know device {device} ({})", .compatible.join(", "))]
    NoMatch {
        /// The device.
        device: String,
        /// The driver.
        driver: String,
        /// What the device is compatible with.
        compatible: Vec<String>,
    },
    /// The host driver refused, in its own words.
    #[error("driver {driver}: {action} of device {device} failed: {reason}")]
    Driver {
        /// The device.
        device: String,
        /// The driver.
        driver: String,
        /// "probe" or "removal".
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// The group belongs to somebody who passes devices through.
    #[error("device {device}: its group {group:?} is given away, release it first")]
    GroupTaken {
        /// The device.
        device: String,
        /// The group.
        group: GroupId,
    },
    /// No IOMMU is in front of the device.
    #[error("device {0} is behind no IOMMU: nothing would confine its DMA")]
    NoIommu(String),
    /// Nobody knows how to stop the device.
    #[error(
        "device {device}: no reset function found for {}, and a reset is required (reset_required)",
        .compatible.join(", ")
    )]
    NoResetFunction {
        /// The device.
        device: String,
        /// What it is compatible with.
        compatible: Vec<String>,
    },
    /// Other devices of the group are in use by the host.
    #[error("group {group:?} of device {device} is not viable: {}", Users(.users))]
    NotViable {
        /// The device that was asked for.
        device: String,
        /// The group.
        group: GroupId,
        /// Who is in the way.
        users: Vec<GroupUser>,
    },
    /// Firmware or the device itself needs a range one to one, which nobody but the host can give.
    #[error(
        "device {device} needs {start:#x}+{len:#x} mapped one to one (a direct reserved region): it cannot be given away"
    )]
    DirectRegion {
        /// The device.
        device: String,
        /// First address.
        start: Iova,
        /// Bytes.
        len: u64,
    },
    /// A device of the group has substreams bound to processes.
    #[error("device {0} has substreams that are bound to processes: unbind them first")]
    SubstreamsBound(String),
    /// The device could not be stopped: it is blocked at the IOMMU and given to nobody
    /// ([`Registry::rescue`](crate::Registry::rescue) tries again).
    #[error("device {device} is quarantined, blocked at the IOMMU and given to nobody: {reason}")]
    Quarantined {
        /// The device.
        device: String,
        /// Why.
        reason: String,
    },
    /// The device is not of this group.
    #[error("device {device} is not in group {group:?}")]
    NotInGroup {
        /// The device.
        device: String,
        /// The group.
        group: GroupId,
    },
    /// The device is open.
    #[error("device {0} is open already")]
    Open(String),
    /// It was closed, or its group was released.
    #[error("device {0} is closed")]
    Closed(String),
    /// The group was released.
    #[error("group {0:?} was released")]
    Released(GroupId),
    /// The group has no address space yet.
    #[error("group {0:?} has no address space: attach one first")]
    NoIoas(GroupId),
    /// The group has one already.
    #[error("group {0:?} is attached to an address space already")]
    Attached(GroupId),
    /// No such region or interrupt.
    #[error("device {device} has no {what} {index}")]
    NoSuch {
        /// The device.
        device: String,
        /// "region" or "interrupt".
        what: &'static str,
        /// The number asked for.
        index: usize,
    },
    /// A register access that the region does not have.
    #[error(
        "region {region} of device {device} has no aligned {bytes}-byte register at {offset:#x} (size {size:#x})"
    )]
    Access {
        /// The device.
        device: String,
        /// The region.
        region: usize,
        /// Where.
        offset: u64,
        /// How wide.
        bytes: usize,
        /// Bytes of the region.
        size: u64,
    },
    /// The device is in a virtual machine.
    #[error("device {device} is assigned to virtual machine {vm}")]
    Assigned {
        /// The device.
        device: String,
        /// The machine.
        vm: String,
    },
}
