//! Memory that devices reach must not move or go away: pinning.

use portcullis_arch::Pa;
use thiserror::Error;

/// Memory that cannot be pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{pa:#x}+{len:#x} cannot be pinned: {reason}")]
pub struct PinError {
    /// First address.
    pub pa: Pa,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub reason: &'static str,
}

/// The owner of memory that is mapped for devices.
///
/// An [`Ioas`](crate::Ioas) pins each page once, however often it maps it, and unpins it after the last mapping is gone and
/// no IOMMU can reach it. Neither call may call back into the address space.
pub trait PinMemory: Send + Sync {
    /// Keeps whole pages where they are until they are unpinned as often as they were pinned. All or nothing.
    fn pin(&self, pa: Pa, len: u64) -> Result<(), PinError>;
    /// The reverse; parts of what was pinned in one call can be unpinned in several.
    fn unpin(&self, pa: Pa, len: u64);
}

/// Memory that never moves and that its owner keeps for long enough by other means.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident;

impl PinMemory for Resident {
    fn pin(&self, _: Pa, _: u64) -> Result<(), PinError> {
        Ok(())
    }
    fn unpin(&self, _: Pa, _: u64) {}
}
