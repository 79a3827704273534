//! The DMA API: how a driver makes memory reachable for its device (Linux `dma-mapping.h`, `dma-iommu.c`).
//!
//! A [`DmaSpace`] is the address space of a translating [`Domain`](crate::Domain): the I/O virtual addresses that are
//! free in it, and the invalidations that are still owed. All devices of the domain share it. A [`DmaDevice`] is what a
//! driver holds: the space or none, what the device can address, and whether it sees the CPU's caches. Start with
//! [`DmaDevice::translated`] or [`DmaDevice::direct`], then [`DmaDevice::map_single`].
//!
//! ```text
//! IOMMU domain ── DmaSpace ──┬── DmaDevice ── map_single, map_sg, map_resource, alloc_coherent, sync_*
//!                            └── DmaLocal, one CPU's own part: the same for single buffers without shared cache lines
//! no IOMMU ───────────────────── DmaDevice::direct: addresses are physical, checked against the mask
//! ```
//!
//! | Covered | Not covered |
//! |---|---|
//! | coherent memory, single buffers, scatter lists, registers of other devices | per-device coherent pools |
//! | strict and lazy invalidation (per-CPU rings of 255, 10 ms) | the single shared queue |
//! | cache maintenance for devices that do not snoop | highmem |
//! | bounce buffers: untrusted devices, buffers that share cache lines with others' data | bouncing below a mask |
//! | a debug mode that remembers every mapping and reports misuse, see [`DmaReport`] | |
//!
//! # Who owns a mapped buffer
//!
//! From `map_*` on the device does; the CPU may touch it again after `unmap_*`, or between `sync_*_for_cpu` and
//! `sync_*_for_device`. On a device that does not snoop, breaking this shows as stale data.
//!
//! # Lazy mode is a trade
//!
//! In [`Mode::Strict`] no access of the device to the buffer is possible once `unmap_*` has returned without an error.
//! In [`Mode::Lazy`] one that has the translation cached may still reach the buffer until the next flush, which is when
//! 255 mappings of a CPU wait, or when [`DmaSpace::tick`] finds that the oldest waits for 10 ms. The I/O virtual
//! address is given to nobody else before a flush that began after the unmap is complete, and neither are page tables
//! or bounce buffers; but the caller's own memory is the caller's, as in Linux: whoever frees it at once lets a
//! misbehaving device see or change its next use for that long. Do not use it for devices that are not trusted
//! ([`DeviceConfig::untrusted`] makes the device's own unmaps strict).

mod bounce;
mod coherent;
mod config;
mod debug;
mod device;
mod error;
mod local;
mod report;
mod retire;
mod sg;
mod single;
mod space;
#[cfg(test)]
mod tests;

pub use coherent::Coherent;
pub use config::{DeviceConfig, Mode, SpaceConfig};
pub use device::DmaDevice;
pub use error::DmaError;
pub use local::{DmaLocal, LocalStatistics};
pub use report::{DmaReport, FaultStory, MappingKind, Misuse, PastMapping};
pub use sg::{SgMapping, SgSegment};
pub use space::{DmaSpace, SpaceStatistics};

use core::fmt;

use portcullis_arch::Pa;

/// Which way data goes (Linux `enum dma_data_direction`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The device reads memory.
    ToDevice,
    /// The device writes memory.
    FromDevice,
    /// Both.
    Bidirectional,
}

impl Direction {
    /// Whether the device reads.
    pub const fn device_reads(self) -> bool {
        matches!(self, Self::ToDevice | Self::Bidirectional)
    }
    /// Whether the device writes.
    pub const fn device_writes(self) -> bool {
        matches!(self, Self::FromDevice | Self::Bidirectional)
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ToDevice => "to device",
            Self::FromDevice => "from device",
            Self::Bidirectional => "bidirectional",
        })
    }
}

/// What a caller asks for beyond the usual (Linux `DMA_ATTR_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DmaAttrs {
    /// No cache maintenance and no bounce copies in this call; the caller syncs what it needs.
    pub skip_cpu_sync: bool,
    /// Only privileged accesses of the device are allowed.
    pub privileged: bool,
}

impl DmaAttrs {
    /// Nothing special.
    pub const NONE: Self = Self { skip_cpu_sync: false, privileged: false };
    /// The caller syncs (Linux `DMA_ATTR_SKIP_CPU_SYNC`).
    pub const SKIP_CPU_SYNC: Self = Self { skip_cpu_sync: true, privileged: false };
}

/// One piece of a scatter list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SgEntry {
    /// Where it is in memory.
    pub pa: Pa,
    /// Bytes.
    pub len: u64,
}
