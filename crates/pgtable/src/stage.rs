//! Stage 1 and stage 2 as types: their descriptor attributes and the register fields that go with a table.

use core::fmt::{Debug, LowerHex};
use core::hash::Hash;

use portcullis_arch::{Iova, Ipa, Pa};

use crate::geometry::Geometry;
use crate::{Config, Half, MemoryKind, Prot};

/// MAIR_EL1 that goes with stage 1 tables of this crate: attribute 0 non-cacheable, 1 write-back, 2 Device-nGnRE, 3
/// inner non-cacheable outer write-back. The value Linux writes.
pub const MAIR: u64 = 0xf404_ff44;

/// An input address of a table.
pub trait InputAddress: Copy + Eq + Ord + Hash + Debug + LowerHex + From<u64> + Send + Sync {
    /// The address as a plain number.
    fn get(self) -> u64;
}

impl InputAddress for Iova {
    #[inline]
    fn get(self) -> u64 {
        self.0
    }
}

impl InputAddress for Ipa {
    #[inline]
    fn get(self) -> u64 {
        self.0
    }
}

mod sealed {
    use super::*;

    /// What differs between the stages, for this crate's eyes.
    pub trait Format: Sized {
        /// Attribute bits of a leaf, without address and type.
        fn leaf_bits(prot: Prot<Self>) -> u64
        where
            Self: Stage;
        /// The reverse.
        fn prot(descriptor: u64) -> Prot<Self>
        where
            Self: Stage;
        /// The attribute bits that may not change in a live entry without a break (memory type, shareability).
        const BREAK_BITS: u64;
        /// Start level and register values.
        const STAGE_2: bool;
        fn registers(config: &Config<Self>, geometry: &Geometry, root: Pa) -> <Self as Stage>::Registers
        where
            Self: Stage;
    }
}
pub(crate) use sealed::Format;

/// A translation stage: [`Stage1`] or [`Stage2`].
pub trait Stage: sealed::Format + Copy + Eq + Hash + Debug + Send + Sync + 'static {
    /// What a table of this stage translates.
    type Input: InputAddress;
    /// What the hardware has to be told about a table of this stage.
    type Registers: Copy + Eq + Debug;
}

/// Stage 1: from the address that a device issues ([`Iova`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage1 {}

/// Stage 2: from an intermediate physical address ([`Ipa`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage2 {}

impl Stage for Stage1 {
    type Input = Iova;
    type Registers = Stage1Registers;
}

impl Stage for Stage2 {
    type Input = Ipa;
    type Registers = Stage2Registers;
}

/// Register fields of a stage 1 table. Names without a number stand for the fields of its half (T0SZ or T1SZ, ...).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage1Registers {
    /// Which half: which TTBR, and which fields of TCR.
    pub half: Half,
    /// Base address for TTBR0 or TTBR1, without an ASID.
    pub ttbr: Pa,
    /// T0SZ or T1SZ: 64 minus the input bits.
    pub tsz: u8,
    /// TG0 or TG1, in the encoding of that field.
    pub tg: u8,
    /// Shareability of walks: 3 inner for a coherent walker, else 2 outer.
    pub sh: u8,
    /// Inner cacheability of walks: 1 write-back for a coherent walker, else 0.
    pub irgn: u8,
    /// Outer cacheability of walks, likewise.
    pub orgn: u8,
    /// IPS (PASize of SMMUv2's TCR2): 0 32, 1 36, 2 40, 3 42, 4 44, 5 48 bits.
    pub ips: u8,
    /// Memory attributes: [`MAIR`].
    pub mair: u64,
}

impl Stage1Registers {
    /// The fields of this half at their places in TCR: bits 15:0 for the lower half, 31:16 for the upper one. EPD,
    /// A1 and IPS are the driver's.
    pub const fn tcr(&self) -> u32 {
        let fields = self.tsz as u32
            | (self.irgn as u32) << 8
            | (self.orgn as u32) << 10
            | (self.sh as u32) << 12
            | (self.tg as u32) << 14;
        match self.half {
            Half::Lower => fields,
            Half::Upper => fields << 16,
        }
    }
}

/// Register fields of a stage 2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stage2Registers {
    /// Base address of the first table or tables, without a VMID.
    pub vttbr: Pa,
    /// 64 minus the input bits.
    pub t0sz: u8,
    /// SL0, as encoded for the granule.
    pub sl0: u8,
    /// TG0: 0 4K, 1 64K, 2 16K.
    pub tg: u8,
    /// Shareability of walks: 3 inner for a coherent walker, else 2 outer.
    pub sh: u8,
    /// Inner cacheability of walks: 1 write-back for a coherent walker, else 0.
    pub irgn: u8,
    /// Outer cacheability of walks, likewise.
    pub orgn: u8,
    /// PS (PASize): 0 32, 1 36, 2 40, 3 42, 4 44, 5 48 bits.
    pub ps: u8,
}

impl Stage2Registers {
    /// The fields at their places in VTCR (SMMUv2's TCR of a stage 2 bank, SMMUv3's STE.VTCR below bit 19).
    pub const fn vtcr(&self) -> u32 {
        self.t0sz as u32
            | (self.sl0 as u32) << 6
            | (self.irgn as u32) << 8
            | (self.orgn as u32) << 10
            | (self.sh as u32) << 12
            | (self.tg as u32) << 14
            | (self.ps as u32) << 16
    }
}

/// SH, IRGN and ORGN of walks.
const fn walk_attributes(coherent: bool) -> (u8, u8) {
    if coherent { (3, 1) } else { (2, 0) }
}

const AF: u64 = 1 << 10;
const SH: u64 = 3 << 8;
const SH_OUTER: u64 = 2 << 8;
const SH_INNER: u64 = 3 << 8;

const fn shareability(memory: MemoryKind) -> u64 {
    match memory {
        MemoryKind::Cached => SH_INNER,
        MemoryKind::NonCached | MemoryKind::Device => SH_OUTER,
    }
}

mod s1 {
    pub(super) const ATTR_INDEX: u64 = 7 << 2;
    pub(super) const AP_UNPRIVILEGED: u64 = 1 << 6;
    pub(super) const AP_READ_ONLY: u64 = 1 << 7;
    pub(super) const NOT_GLOBAL: u64 = 1 << 11;
    pub(super) const XN: u64 = 3 << 53;
    pub(super) const UXN: u64 = 1 << 54;
}

impl Format for Stage1 {
    const BREAK_BITS: u64 = s1::ATTR_INDEX | SH;
    const STAGE_2: bool = false;

    #[inline]
    fn leaf_bits(prot: Prot<Self>) -> u64 {
        let index = match prot.memory {
            MemoryKind::NonCached => 0,
            MemoryKind::Cached => 1,
            MemoryKind::Device => 2,
        };
        AF | s1::NOT_GLOBAL
            | shareability(prot.memory)
            | index << 2
            | if prot.privileged { 0 } else { s1::AP_UNPRIVILEGED }
            | if prot.write { 0 } else { s1::AP_READ_ONLY }
            | if prot.execute { 0 } else { s1::XN }
    }

    fn prot(descriptor: u64) -> Prot<Self> {
        let mut prot = Prot::new(true, descriptor & s1::AP_READ_ONLY == 0);
        prot.privileged = descriptor & s1::AP_UNPRIVILEGED == 0;
        prot.execute = descriptor & s1::UXN == 0;
        prot.memory = match (descriptor & s1::ATTR_INDEX) >> 2 {
            1 => MemoryKind::Cached,
            2 => MemoryKind::Device,
            _ => MemoryKind::NonCached,
        };
        prot
    }

    fn registers(config: &Config<Self>, geometry: &Geometry, root: Pa) -> Stage1Registers {
        let (sh, rgn) = walk_attributes(config.coherent_walk);
        Stage1Registers {
            half: config.half,
            ttbr: root,
            tsz: 64 - config.input_bits,
            tg: match config.half {
                Half::Lower => config.granule.tg0(),
                Half::Upper => config.granule.tg1(),
            },
            sh,
            irgn: rgn,
            orgn: rgn,
            ips: geometry.output_code,
            mair: MAIR,
        }
    }
}

mod s2 {
    pub(super) const MEM_ATTR: u64 = 0xf << 2;
    pub(super) const READ: u64 = 1 << 6;
    pub(super) const WRITE: u64 = 1 << 7;
    /// Bit 54 alone: with and without XNX it means executable for nobody. Linux sets bit 53 too, which makes the
    /// page executable for privileged accesses where the hardware has XNX.
    pub(super) const XN: u64 = 1 << 54;
}

impl Format for Stage2 {
    const BREAK_BITS: u64 = s2::MEM_ATTR | SH;
    const STAGE_2: bool = true;

    #[inline]
    fn leaf_bits(prot: Prot<Self>) -> u64 {
        let mem_attr = match prot.memory {
            MemoryKind::NonCached => 0x5,
            MemoryKind::Cached => 0xf,
            MemoryKind::Device => 0x1,
        };
        AF | shareability(prot.memory)
            | mem_attr << 2
            | if prot.read { s2::READ } else { 0 }
            | if prot.write { s2::WRITE } else { 0 }
            | if prot.execute { 0 } else { s2::XN }
    }

    fn prot(descriptor: u64) -> Prot<Self> {
        let mut prot = Prot::new(descriptor & s2::READ != 0, descriptor & s2::WRITE != 0);
        prot.execute = descriptor & s2::XN == 0;
        prot.memory = match (descriptor & s2::MEM_ATTR) >> 2 {
            0xf => MemoryKind::Cached,
            0..=3 => MemoryKind::Device,
            _ => MemoryKind::NonCached,
        };
        prot
    }

    fn registers(config: &Config<Self>, geometry: &Geometry, root: Pa) -> Stage2Registers {
        let (sh, rgn) = walk_attributes(config.coherent_walk);
        Stage2Registers {
            vttbr: root,
            t0sz: 64 - config.input_bits,
            sl0: geometry.sl0(config.granule),
            tg: config.granule.tg0(),
            sh,
            irgn: rgn,
            orgn: rgn,
            ps: geometry.output_code,
        }
    }
}
