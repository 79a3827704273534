//! Context descriptors and their level 1 table (IHI 0070 sections 5.3 and 5.4).

use bitfield_struct::bitfield;

use super::ste::words;

/// A level 1 context descriptor, 8 bytes.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct L1Cd {
    /// Valid.
    pub v: bool,
    #[bits(11)]
    __: u16,
    /// Bits 55:12 of the level 2 table's address.
    #[bits(44)]
    pub l2ptr_55_12: u64,
    __: u8,
}

/// Bytes of a context descriptor.
pub const CD_BYTES: u64 = 64;
/// Bytes of a level 1 context descriptor.
pub const L1CD_BYTES: u64 = 8;

/// A context descriptor: eight 64-bit words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Cd(pub [u64; 8]);

impl Cd {
    words! {
        /// Word 0.
        dw0 with_dw0 0 CdDw0;
        /// Word 1.
        dw1 with_dw1 1 CdDw1;
        /// Word 2.
        dw2 with_dw2 2 CdDw2;
        /// Word 5.
        dw5 with_dw5 5 CdDw5;
    }
    /// V.
    pub const fn valid(&self) -> bool {
        self.dw0().v()
    }
    /// TTB0 as an address, bits 51:4.
    pub const fn ttb0(&self) -> u64 {
        self.dw1().ttb0_51_4() << 4
    }
    /// TTB1 as an address, bits 51:4.
    pub const fn ttb1(&self) -> u64 {
        self.dw2().ttb1_51_4() << 4
    }
    /// MAIR0 in the low, MAIR1 in the high half.
    pub const fn mair(&self) -> u64 {
        self.0[3]
    }
    /// Replaces MAIR0 and MAIR1.
    pub const fn with_mair(mut self, mair: u64) -> Self {
        self.0[3] = mair;
        self
    }
}

/// CD word 0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CdDw0 {
    /// TTB0 covers 2^(64 - T0SZ) bytes.
    #[bits(6)]
    pub t0sz: u8,
    /// 0 4K, 1 64K, 2 16K, 3 reserved.
    #[bits(2)]
    pub tg0: u8,
    /// Walk inner cacheability.
    #[bits(2)]
    pub ir0: u8,
    /// Walk outer cacheability.
    #[bits(2)]
    pub or0: u8,
    /// Walk shareability.
    #[bits(2)]
    pub sh0: u8,
    /// No walks of TTB0.
    pub epd0: bool,
    /// Big-endian tables.
    pub endi: bool,
    /// TTB1 covers 2^(64 - T1SZ) bytes.
    #[bits(6)]
    pub t1sz: u8,
    /// 1 16K, 2 4K, 3 64K, 0 reserved.
    #[bits(2)]
    pub tg1: u8,
    /// Walk inner cacheability.
    #[bits(2)]
    pub ir1: u8,
    /// Walk outer cacheability.
    #[bits(2)]
    pub or1: u8,
    /// Walk shareability.
    #[bits(2)]
    pub sh1: u8,
    /// No walks of TTB1.
    pub epd1: bool,
    /// Valid.
    pub v: bool,
    /// Intermediate address size code.
    #[bits(3)]
    pub ips: u8,
    /// No access flag faults.
    pub affd: bool,
    /// Writable memory is execute never.
    pub wxn: bool,
    /// Unprivileged-writable memory is privileged execute never (VMSAv8-32).
    pub uwxn: bool,
    /// Top byte ignored, TTB0.
    pub tbi0: bool,
    /// Top byte ignored, TTB1.
    pub tbi1: bool,
    /// Privileged access never.
    pub pan: bool,
    /// VMSAv8-64.
    pub aa64: bool,
    /// Hardware dirty state.
    pub hd: bool,
    /// Hardware access flag.
    pub ha: bool,
    /// Stall.
    pub s: bool,
    /// Record.
    pub r: bool,
    /// Abort.
    pub a: bool,
    /// The ASID is not shared with CPUs.
    pub aset: bool,
    /// ASID.
    pub asid: u16,
}

/// CD word 1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CdDw1 {
    /// Secure only.
    pub nscfg0: bool,
    /// Hierarchical attributes of TTB0 off.
    pub had0: bool,
    /// Unprivileged accesses through TTB0 fault.
    pub e0pd0: bool,
    /// Access flag in table descriptors.
    pub haft: bool,
    /// Bits 51:4 of TTB0.
    #[bits(48)]
    pub ttb0_51_4: u64,
    #[bits(6)]
    __: u8,
    /// Permission indirection without contiguous hint.
    pub pnch: bool,
    /// Enhanced PAN.
    pub epan: bool,
    /// Page-based hardware attributes of TTB0.
    #[bits(4)]
    pub hwu0: u8,
}

/// CD word 2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CdDw2 {
    /// Secure only.
    pub nscfg1: bool,
    /// Hierarchical attributes of TTB1 off.
    pub had1: bool,
    /// Unprivileged accesses through TTB1 fault.
    pub e0pd1: bool,
    /// Attribute index extension.
    pub aie: bool,
    /// Bits 51:4 of TTB1.
    #[bits(48)]
    pub ttb1_51_4: u64,
    #[bits(6)]
    __: u8,
    /// 52-bit addresses with 4K and 16K.
    pub ds: bool,
    /// Permission indirection.
    pub pie: bool,
    /// Page-based hardware attributes of TTB1.
    #[bits(4)]
    pub hwu1: u8,
}

/// CD word 5.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CdDw5 {
    /// Implementation defined.
    pub impdef: u32,
    /// MPAM partition.
    pub partid: u16,
    /// MPAM performance group.
    pub pmg: u8,
    __: u8,
}
