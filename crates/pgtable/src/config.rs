//! What a caller chooses about a page table.

use core::fmt;
use core::marker::PhantomData;

use crate::{Stage, Stage1, Stage2};

/// Translation granule: the size of a page and of a full table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granule {
    /// 4 KiB pages; blocks of 2 MiB and 1 GiB.
    K4,
    /// 16 KiB pages; blocks of 32 MiB.
    K16,
    /// 64 KiB pages; blocks of 512 MiB.
    K64,
}

impl Granule {
    /// log2 of the size: 12, 14 or 16.
    #[inline]
    pub const fn log2(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn size(self) -> u64 {
        1 << self.log2()
    }

    /// TG0 of TCR and VTCR: 0 is 4K, 1 is 64K, 2 is 16K.
    pub const fn tg0(self) -> u8 {
        match self {
            Self::K4 => 0,
            Self::K64 => 1,
            Self::K16 => 2,
        }
    }

    /// TG1 of TCR: 1 is 16K, 2 is 4K, 3 is 64K.
    pub const fn tg1(self) -> u8 {
        match self {
            Self::K16 => 1,
            Self::K4 => 2,
            Self::K64 => 3,
        }
    }
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}K", self.size() >> 10)
    }
}

/// Which part of a stage 1 address space a table translates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Half {
    /// From 0 up (TTBR0, the T0SZ fields).
    #[default]
    Lower,
    /// The addresses that end at the top of 64 bits (TTBR1, the T1SZ fields).
    Upper,
}

/// Whether a stage 2 table starts one level lower, with up to 16 first tables side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Concatenation {
    /// As Linux: only where it gets rid of a walk that starts at level 0 (`arm_64_lpae_alloc_pgtable_s2`).
    #[default]
    Linux,
    /// Always; refused where the first table would have one entry or more than 16.
    Forced,
    /// Never; refused where the architecture has no such walk (16K with 48 bits).
    Never,
}

/// What a page table shall be like. Stage 1 adds [`half`](Config::half), stage 2
/// [`concatenation`](Config::concatenation).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config<S: Stage> {
    /// Page size.
    pub granule: Granule,
    /// Width of input addresses (Linux: ias), 25 to 48.
    pub input_bits: u8,
    /// Width of output addresses (Linux: oas): 32, 36, 40, 42, 44 or 48.
    pub output_bits: u8,
    /// True if the hardware walker snoops the CPU's caches (`dma-coherent` at the SMMU's node). Otherwise every
    /// descriptor is cleaned to memory after it has been stored.
    pub coherent_walk: bool,
    pub(crate) half: Half,
    pub(crate) concatenation: Concatenation,
    stage: PhantomData<S>,
}

impl<S: Stage> Config<S> {
    /// A table of the lower half or with Linux's concatenation, for a coherent walker.
    pub const fn new(granule: Granule, input_bits: u8, output_bits: u8) -> Self {
        Self {
            granule,
            input_bits,
            output_bits,
            coherent_walk: true,
            half: Half::Lower,
            concatenation: Concatenation::Linux,
            stage: PhantomData,
        }
    }

    /// The same for a walker that snoops (`true`) or does not snoop the CPU's caches.
    pub const fn coherent_walk(mut self, coherent: bool) -> Self {
        self.coherent_walk = coherent;
        self
    }
}

impl Config<Stage1> {
    /// The same for the given part of the address space.
    pub const fn half(mut self, half: Half) -> Self {
        self.half = half;
        self
    }
}

impl Config<Stage2> {
    /// The same with the given choice of start level.
    pub const fn concatenation(mut self, concatenation: Concatenation) -> Self {
        self.concatenation = concatenation;
        self
    }
}
