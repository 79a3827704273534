//! What the debug mode tells: [`DmaReport`], [`FaultStory`].

use alloc::sync::Arc;
use core::fmt;

use portcullis_arch::Iova;

use super::Direction;
use super::single::Place;

/// Which calls a mapping belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MappingKind {
    /// `map_single`.
    Single,
    /// `map_sg`.
    Sg,
    /// `alloc_coherent`.
    Coherent,
    /// `map_resource`.
    Resource,
}

impl fmt::Display for MappingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Single => "a single buffer",
            Self::Sg => "a scatter list",
            Self::Coherent => "coherent memory",
            Self::Resource => "a device's registers",
        })
    }
}

/// A mapping, and where in the driver it came and went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PastMapping {
    /// First address.
    pub iova: Iova,
    /// Bytes.
    pub len: u64,
    /// Bytes from the first address to the last: more than `len` for a scatter list with gaps.
    pub span: u64,
    /// Direction; `None` for coherent memory.
    pub direction: Option<Direction>,
    /// Kind.
    pub kind: MappingKind,
    /// Where it was mapped.
    pub mapped_at: Place,
    /// Where it was unmapped, if it was.
    pub unmapped_at: Option<Place>,
}

/// What a driver did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Misuse {
    /// The device was let go with the mapping in place; so many in all.
    NotUnmapped {
        /// Mappings left at that time.
        left: usize,
    },
    /// Unmapped again.
    DoubleUnmap,
    /// Unmapped or synced, and nothing was ever mapped there.
    NeverMapped,
    /// Unmapped or synced with another size than it was mapped with.
    WrongSize {
        /// The size that was given.
        given: u64,
    },
    /// Unmapped or synced with another direction.
    WrongDirection {
        /// The direction that was given.
        given: Direction,
    },
    /// Unmapped with the call for another kind.
    WrongKind {
        /// The kind that the call is for.
        given: MappingKind,
    },
    /// The CPU accessed it while the device owned it.
    MissingSync {
        /// Whether it wrote.
        write: bool,
    },
    /// Synced after it was unmapped.
    SyncAfterUnmap,
    /// The device accessed it after it was unmapped.
    UseAfterUnmap,
    /// The device made an access that the direction does not allow.
    WrongAccess {
        /// Whether it wrote.
        write: bool,
    },
    /// The device ran over the end.
    Overrun,
    /// The device accessed what was never mapped.
    WildAccess,
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = |write| if write { "written" } else { "read" };
        match *self {
            Self::NotUnmapped { left } => write!(f, "not unmapped ({left} mappings left)"),
            Self::DoubleUnmap => f.write_str("unmapped twice"),
            Self::NeverMapped => f.write_str("never mapped"),
            Self::WrongSize { given } => write!(f, "wrong size: {given:#x} bytes given"),
            Self::WrongDirection { given } => write!(f, "wrong direction: {given} given"),
            Self::WrongKind { given } => write!(f, "wrong call: it is for {given}"),
            Self::MissingSync { write } => {
                write!(f, "missing sync: {} by the CPU while the device owns it", access(write))
            }
            Self::SyncAfterUnmap => f.write_str("synced after it was unmapped"),
            Self::UseAfterUnmap => f.write_str("used by the device after it was unmapped"),
            Self::WrongAccess { write } => {
                write!(f, "{} by the device against its direction", access(write))
            }
            Self::Overrun => f.write_str("the device ran over its end"),
            Self::WildAccess => f.write_str("accessed by the device, but never mapped"),
        }
    }
}

/// A finding of the debug mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaReport {
    /// Name of the device.
    pub device: Arc<str>,
    /// What is wrong.
    pub misuse: Misuse,
    /// The address that the wrong call or access named.
    pub iova: Iova,
    /// Its bytes.
    pub len: u64,
    /// The mapping that it is about, if there is or was one.
    pub mapping: Option<PastMapping>,
    /// The place of the wrong call; `None` for an access of the device.
    pub at: Option<Place>,
}

impl fmt::Display for DmaReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:#x}+{:#x} {}", self.device, self.iova, self.len, self.misuse)?;
        if let Some(at) = self.at {
            write!(f, ", at {at}")?;
        }
        match &self.mapping {
            Some(mapping) => write!(f, "; {mapping}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for PastMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}+{:#x}", self.kind, self.iova, self.len)?;
        if let Some(direction) = self.direction {
            write!(f, " {direction}")?;
        }
        write!(f, ", mapped at {}", self.mapped_at)?;
        match self.unmapped_at {
            Some(at) => write!(f, ", unmapped at {at}"),
            None => Ok(()),
        }
    }
}

/// What is or was at an address at which a device faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultStory {
    /// This is mapped there: the access does not fit its direction, or the hardware is set up wrongly.
    Live(PastMapping),
    /// This was there last: the device used it after it had been unmapped.
    Gone(PastMapping),
    /// Nothing was there, but this ends right before: the device ran over its end.
    Behind(PastMapping),
    /// Nothing was there.
    Never,
}

impl fmt::Display for FaultStory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live(mapping) => write!(f, "it is in {mapping}"),
            Self::Gone(mapping) => write!(f, "it was in {mapping}"),
            Self::Behind(mapping) => write!(f, "it is right behind {mapping}"),
            Self::Never => f.write_str("nothing was mapped there"),
        }
    }
}
