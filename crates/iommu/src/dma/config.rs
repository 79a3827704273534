//! What is said about a space and about a device.

use portcullis_arch::Iova;

use crate::ReservedRegion;

/// When the TLB forgets what has been unmapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Before `unmap` returns (Linux `iommu.strict=1`).
    #[default]
    Strict,
    /// With many others, at most about 10 ms later (Linux `iommu.strict=0`, domain type DMA-FQ).
    Lazy,
}

/// What a [`DmaSpace`](super::DmaSpace) shall be like.
#[derive(Clone, Copy, Debug)]
pub struct SpaceConfig<'a> {
    /// Ranges that are never handed out.
    pub reserved: &'a [ReservedRegion],
    /// Strict or lazy.
    pub mode: Mode,
    /// CPUs that map at the same time; 0 is 1.
    pub cpus: usize,
    /// On which of them the caller runs. A wrong answer costs time, never correctness.
    pub current_cpu: fn() -> usize,
    /// Last address of the bus between device and IOMMU, if it is narrower than the domain.
    pub limit: Option<Iova>,
}

impl Default for SpaceConfig<'_> {
    /// Strict, one CPU, nothing reserved.
    fn default() -> Self {
        Self { reserved: &[], mode: Mode::Strict, cpus: 1, current_cpu: || 0, limit: None }
    }
}

/// What a device is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Address bits the device can drive (Linux `dma_mask`).
    pub mask_bits: u8,
    /// The same for coherent memory (Linux `coherent_dma_mask`).
    pub coherent_mask_bits: u8,
    /// It sees what is in the CPU's caches (`dma-coherent`).
    pub coherent: bool,
    /// Longest segment of a scatter list, in bytes (Linux `max_segment_size`).
    pub max_segment: u64,
    /// No segment crosses a multiple of this plus one, which is a power of two (Linux `segment_boundary_mask`).
    pub boundary_mask: u64,
    /// It may be hostile: it gets whole pages that hold nothing but its buffer, and never lazily.
    pub untrusted: bool,
    /// Addresses below 4 GiB first, since higher ones make longer transactions (PCI).
    pub prefer_32bit: bool,
    /// Most bytes of bounce buffers at once.
    pub bounce_limit: u64,
    /// Remember every mapping and report misuse.
    pub debug: bool,
}

impl Default for DeviceConfig {
    /// Linux's defaults: 32 bits, no snooping, segments of 64 KiB inside of 4 GiB.
    fn default() -> Self {
        Self {
            mask_bits: 32,
            coherent_mask_bits: 32,
            coherent: false,
            max_segment: 0x1_0000,
            boundary_mask: 0xffff_ffff,
            untrusted: false,
            prefer_32bit: false,
            bounce_limit: 4 << 20,
            debug: false,
        }
    }
}

impl DeviceConfig {
    /// The same with that many address bits, coherent memory included.
    pub const fn mask(mut self, bits: u8) -> Self {
        (self.mask_bits, self.coherent_mask_bits) = (bits, bits);
        self
    }
    /// The same for a device that snoops, or does not.
    pub const fn coherent(mut self, coherent: bool) -> Self {
        self.coherent = coherent;
        self
    }
    /// The same with the debug mode.
    pub const fn debug(mut self) -> Self {
        self.debug = true;
        self
    }
}

/// The last address that so many bits reach.
pub(super) const fn last_of(bits: u8) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}
