//! What a mapping allows and how its memory is accessed.

use core::fmt;
use core::marker::PhantomData;

use crate::{Stage, Stage1};

/// How the memory of a mapping is accessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Normal non-cacheable (Linux: no flag).
    #[default]
    NonCached,
    /// Normal write-back, snooped (Linux: `IOMMU_CACHE`).
    Cached,
    /// Device-nGnRE (Linux: `IOMMU_MMIO`).
    Device,
}

/// Permissions and memory type of a mapping in a table of stage `S`.
///
/// The constants are Linux's defaults: non-cached, executable, open to unprivileged accesses. Narrow or change them
/// with the methods: `Prot::RW.cached().noexec()`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prot<S: Stage> {
    /// Reads are allowed. Stage 1 has no write-only pages: there a write-only request becomes read and write, as in
    /// Linux.
    pub read: bool,
    /// Writes are allowed.
    pub write: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
    /// The memory type.
    pub memory: MemoryKind,
    pub(crate) privileged: bool,
    stage: PhantomData<S>,
}

impl<S: Stage> Prot<S> {
    /// Read only.
    pub const READ: Self = Self::new(true, false);
    /// Write only (stage 1: read and write).
    pub const WRITE: Self = Self::new(false, true);
    /// Read and write.
    pub const RW: Self = Self::new(true, true);

    /// The given accesses with Linux's defaults for the rest.
    pub const fn new(read: bool, write: bool) -> Self {
        Self {
            read,
            write,
            execute: true,
            memory: MemoryKind::NonCached,
            privileged: false,
            stage: PhantomData,
        }
    }

    /// The same for the given type of memory.
    pub const fn memory(mut self, memory: MemoryKind) -> Self {
        self.memory = memory;
        self
    }

    /// The same, cached (Linux `IOMMU_CACHE`).
    pub const fn cached(self) -> Self {
        self.memory(MemoryKind::Cached)
    }

    /// The same for device registers (Linux `IOMMU_MMIO`).
    pub const fn device(self) -> Self {
        self.memory(MemoryKind::Device)
    }

    /// The same without instruction fetches (Linux `IOMMU_NOEXEC`).
    pub const fn noexec(mut self) -> Self {
        self.execute = false;
        self
    }
}

impl Prot<Stage1> {
    /// The same for privileged accesses only (Linux `IOMMU_PRIV`). Stage 2 does not know privilege.
    pub const fn privileged(mut self) -> Self {
        self.privileged = true;
        self
    }

    /// True if unprivileged accesses are refused.
    pub const fn is_privileged(self) -> bool {
        self.privileged
    }
}

impl<S: Stage> fmt::Debug for Prot<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flag = |on: bool, c: char| if on { c } else { '-' };
        write!(
            f,
            "{}{}{}{} {:?}",
            flag(self.read, 'r'),
            flag(self.write, 'w'),
            flag(self.execute, 'x'),
            flag(self.privileged, 'p'),
            self.memory
        )
    }
}
