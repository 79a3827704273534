//! Page-table descriptors: VMSAv8-64 and the AArch32 long format (DDI 0487 D8.3, G5.5), and the AArch32 short format
//! (DDI 0487 G5.4). Bit positions only; what they mean together is the business of the walker on the hardware
//! side and of the page-table code on the software side.

/// Bits of 64-bit descriptors: VMSAv8-64 and AArch32 long.
pub mod long {
    /// Type field.
    pub const TYPE: u64 = 0b11;
    /// Type of a block descriptor (levels above the last).
    pub const TYPE_BLOCK: u64 = 0b01;
    /// Type of a table descriptor, and of a page descriptor at the last level.
    pub const TYPE_TABLE_OR_PAGE: u64 = 0b11;
    /// Output address and next-table address, bits 47:12 (low bits are zero above the granule).
    pub const ADDRESS: u64 = 0x0000_ffff_ffff_f000;
    /// Stage 1 leaf: index into MAIR, bits 4:2.
    pub const ATTR_INDEX_SHIFT: u32 = 2;
    /// Stage 2 leaf: MemAttr, bits 5:2.
    pub const S2_MEMATTR_SHIFT: u32 = 2;
    /// Stage 1 leaf: non-secure.
    pub const NS: u64 = 1 << 5;
    /// Stage 1 leaf: AP\[1\], unprivileged access allowed.
    pub const AP_UNPRIVILEGED: u64 = 1 << 6;
    /// Stage 1 leaf: AP\[2\], read only.
    pub const AP_READ_ONLY: u64 = 1 << 7;
    /// Stage 2 leaf: reads allowed.
    pub const S2AP_READ: u64 = 1 << 6;
    /// Stage 2 leaf: writes allowed.
    pub const S2AP_WRITE: u64 = 1 << 7;
    /// Leaf: shareability, bits 9:8.
    pub const SH_SHIFT: u32 = 8;
    /// Leaf: access flag.
    pub const AF: u64 = 1 << 10;
    /// Stage 1 leaf: not global.
    pub const NG: u64 = 1 << 11;
    /// Leaf: dirty bit modifier, read-only means not written yet.
    pub const DBM: u64 = 1 << 51;
    /// Leaf: part of a contiguous run.
    pub const CONTIGUOUS: u64 = 1 << 52;
    /// Stage 1 leaf: privileged execute never.
    pub const PXN: u64 = 1 << 53;
    /// Leaf: (unprivileged) execute never.
    pub const UXN: u64 = 1 << 54;
    /// Stage 1 table: PXN for all below.
    pub const PXN_TABLE: u64 = 1 << 59;
    /// Stage 1 table: UXN for all below.
    pub const UXN_TABLE: u64 = 1 << 60;
    /// Stage 1 table: no unprivileged access below.
    pub const AP_TABLE_PRIVILEGED: u64 = 1 << 61;
    /// Stage 1 table: no writes below.
    pub const AP_TABLE_READ_ONLY: u64 = 1 << 62;
    /// Stage 1 table: non-secure for all below.
    pub const NS_TABLE: u64 = 1 << 63;
    /// SMMUv2 stage 2 leaf: read allocation hint, bits 61:60.
    pub const S2_RACFG_SHIFT: u32 = 60;
    /// SMMUv2 stage 2 leaf: write allocation hint, bits 63:62.
    pub const S2_WACFG_SHIFT: u32 = 62;
}

/// Bits of 32-bit descriptors (AArch32 short).
pub mod short {
    /// Type field.
    pub const TYPE: u32 = 0b11;
    /// Level 1 type of a table descriptor.
    pub const TYPE_TABLE: u32 = 0b01;
    /// Bit that tells sections and supersections, and at level 2 small pages.
    pub const TYPE_SECTION_OR_SMALL: u32 = 0b10;
    /// Level 2 type of a large page.
    pub const TYPE_LARGE: u32 = 0b01;
    /// Level 1 section: this is a supersection.
    pub const SUPERSECTION: u32 = 1 << 18;
    /// Level 1 table: base of the level 2 table, bits 31:10.
    pub const TABLE_BASE: u32 = 0xffff_fc00;
    /// Level 1 table: privileged execute never.
    pub const TABLE_PXN: u32 = 1 << 2;
    /// Level 1 table: non-secure.
    pub const TABLE_NS: u32 = 1 << 3;
    /// Section: privileged execute never.
    pub const SECTION_PXN: u32 = 1 << 0;
    /// Section: execute never.
    pub const SECTION_XN: u32 = 1 << 4;
    /// Section: non-secure.
    pub const SECTION_NS: u32 = 1 << 19;
    /// Section: not global.
    pub const SECTION_NG: u32 = 1 << 17;
    /// Section: shareable.
    pub const SECTION_S: u32 = 1 << 16;
    /// Small page: execute never.
    pub const SMALL_XN: u32 = 1 << 0;
    /// Large page: execute never.
    pub const LARGE_XN: u32 = 1 << 15;
    /// Page: not global.
    pub const PAGE_NG: u32 = 1 << 11;
    /// Page: shareable.
    pub const PAGE_S: u32 = 1 << 10;
}

/// A translation granule of VMSAv8-64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Granule {
    /// 4 KiB.
    K4 = 12,
    /// 16 KiB.
    K16 = 14,
    /// 64 KiB.
    K64 = 16,
}

impl Granule {
    /// log2 of the granule's size in bytes.
    pub const fn log2(self) -> u8 {
        self as u8
    }
    /// Address bits that one level resolves.
    pub const fn stride(self) -> u8 {
        self as u8 - 3
    }
    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self as u8
    }
    /// From TCR.TG0 and VTCR.TG0: 0 4K, 1 64K, 2 16K; 3 is reserved.
    pub const fn from_tg0(code: u8) -> Option<Self> {
        match code & 3 {
            0 => Some(Self::K4),
            1 => Some(Self::K64),
            2 => Some(Self::K16),
            _ => None,
        }
    }
    /// From TCR.TG1: 1 16K, 2 4K, 3 64K; 0 is reserved.
    pub const fn from_tg1(code: u8) -> Option<Self> {
        match code & 3 {
            1 => Some(Self::K16),
            2 => Some(Self::K4),
            3 => Some(Self::K64),
            _ => None,
        }
    }
    /// True if a leaf at `level` is a block that VMSAv8-64 allows with 48-bit addresses, or a page at level 3.
    pub const fn leaf_allowed(self, level: i8) -> bool {
        match self {
            Self::K4 => level >= 1,
            Self::K16 | Self::K64 => level >= 2,
        }
    }
    /// log2 of the number of entries in a contiguous run at `level`.
    pub const fn contiguous_log2(self, level: i8) -> u8 {
        match (self, level) {
            (Self::K4, _) => 4,
            (Self::K16, 3) => 7,
            _ => 5,
        }
    }
}
