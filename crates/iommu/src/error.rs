//! What can go wrong in the core.

use alloc::string::String;
use alloc::vec::Vec;

use portcullis_arch::{Iova, SubstreamId};
use portcullis_drivers::ops::{DomainKind, IommuError};
use thiserror::Error;

use crate::manager::{DeviceId, GroupId, InstanceId};

/// A request that the core did not fulfil. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// The driver refused.
    #[error(transparent)]
    Iommu(#[from] IommuError),
    /// No such IOMMU.
    #[error("there is no IOMMU {0:?}")]
    UnknownInstance(InstanceId),
    /// No such device.
    #[error("there is no device {0:?}")]
    UnknownDevice(DeviceId),
    /// No such group.
    #[error("there is no group {0:?}")]
    UnknownGroup(GroupId),
    /// A device shares streams with devices of different groups, which would have to become one.
    #[error("the streams of device {device} belong to different groups already: {groups:?}")]
    GroupConflict {
        /// Its name.
        device: String,
        /// The groups.
        groups: Vec<GroupId>,
    },
    /// A device cannot change its domain without the others of its group.
    #[error("device {device} shares group {group:?} with {others:?}: attach the group")]
    GroupNotSingular {
        /// Its name.
        device: String,
        /// The group.
        group: GroupId,
        /// Names of the others.
        others: Vec<String>,
    },
    /// Domain and device belong to different IOMMUs.
    #[error("the domain was made for IOMMU {domain:?}, the device is behind {device:?}")]
    OtherInstance {
        /// Of the domain.
        domain: InstanceId,
        /// Of the device.
        device: InstanceId,
    },
    /// The device needs a range mapped one to one, and the domain cannot do that.
    #[error("device {device} needs {start:#x}+{len:#x} mapped one to one, which a {kind} domain cannot do")]
    DirectRegion {
        /// Its name.
        device: String,
        /// Start of the range.
        start: Iova,
        /// Its bytes.
        len: u64,
        /// The kind of domain.
        kind: DomainKind,
    },
    /// The device is bound to a process.
    #[error("device {device} is bound to a process: unbind it first")]
    Bound {
        /// Its name.
        device: String,
    },
    /// The device is not bound.
    #[error("device {device} is not bound to a process")]
    NotBound {
        /// Its name.
        device: String,
    },
    /// The device has no substreams, or not that one.
    #[error("device {device} has {bits} bits of substream ids, {substream} is not one it can use")]
    Substream {
        /// Its name.
        device: String,
        /// The substream.
        substream: SubstreamId,
        /// Bits of its substream ids, as far as the IOMMU has them too.
        bits: u8,
    },
    /// The substream belongs to another process.
    #[error("substream {substream} of device {device} is bound to another process")]
    SubstreamBound {
        /// Its name.
        device: String,
        /// The substream.
        substream: SubstreamId,
    },
    /// The substream is not bound.
    #[error("substream {substream} of device {device} is not bound to a process")]
    SubstreamNotBound {
        /// Its name.
        device: String,
        /// The substream.
        substream: SubstreamId,
    },
    /// The process has no address space any more.
    #[error("the process has exited")]
    ProcessExited,
}
