//! What a host knows about a device that it may give away.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::{Ipa, Pa};
use portcullis_hal::Mmio;
use portcullis_iommu::DeviceId;

/// A device on the platform bus, from its device tree node.
#[derive(Clone, Debug)]
pub struct PlatformDevice {
    /// Its name, as it is at the IOMMU core.
    pub name: String,
    /// `compatible`, most specific first.
    pub compatible: Vec<String>,
    /// The device at the IOMMU core; `None` if no IOMMU is in front of it, and then it cannot be given away.
    pub device: Option<DeviceId>,
    /// Its registers, in the order of `reg`.
    pub regions: Vec<Region>,
    /// Its interrupts, in the order of `interrupts`.
    pub interrupts: Vec<Interrupt>,
}

/// A range of registers.
#[derive(Clone)]
pub struct Region {
    /// Where it is on the host.
    pub pa: Pa,
    /// Bytes.
    pub size: u64,
    /// Where a guest expects it; `None` for the host's address.
    pub ipa_hint: Option<Ipa>,
    /// Access to it.
    pub registers: Arc<dyn Mmio>,
}

impl Region {
    /// A region that a guest sees where the host has it.
    pub fn new(pa: Pa, size: u64, registers: Arc<dyn Mmio>) -> Self {
        Self { pa, size, ipa_hint: None, registers }
    }

    /// The same, expected by guests at `ipa`.
    pub fn at(mut self, ipa: Ipa) -> Self {
        self.ipa_hint = Some(ipa);
        self
    }

    /// True if whole pages belong to the device, so that a guest may be given them without trapping (Linux sets
    /// `VFIO_REGION_INFO_FLAG_MMAP` for those only).
    pub fn mappable(&self) -> bool {
        self.size > 0 && self.pa.get().is_multiple_of(0x1000) && self.size.is_multiple_of(0x1000)
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.pa, self.size)
    }
}

/// A wired interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Interrupt {
    /// The host's number of the line.
    pub line: u32,
    /// Level (masked when it fires, until its owner has dealt with it) or edge.
    pub level: bool,
}

impl Interrupt {
    /// A level-triggered line.
    pub const fn level(line: u32) -> Self {
        Self { line, level: true }
    }
    /// An edge-triggered line.
    pub const fn edge(line: u32) -> Self {
        Self { line, level: false }
    }
}
