//! What travels with a transaction besides its address: memory type, shareability, allocation hints,
//! security state, privilege and instruction/data (IHI 0062D chapter 13 "attributes"; AMBA AxCACHE,
//! AxDOMAIN, AxPROT).

use core::fmt;

/// Whether a transaction reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The master reads memory.
    Read,
    /// The master writes memory.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::Write => "write",
        })
    }
}

/// A memory type in the 4-bit encoding that SMMUv2 (`MemAttr`) and stage 2 descriptors share.
///
/// Bits `[3:2]` = 0 is Device with its kind in `[1:0]`; otherwise `[3:2]` is the outer and `[1:0]` the inner
/// cacheability (1 non-cacheable, 2 write-through, 3 write-back).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct MemoryType(u8);

impl MemoryType {
    /// Device, non-gathering, non-reordering, no early write acknowledgement.
    pub const DEVICE_NGNRNE: Self = Self(0x0);
    /// Device, non-gathering, non-reordering, early write acknowledgement.
    pub const DEVICE_NGNRE: Self = Self(0x1);
    /// Device, non-gathering, reordering.
    pub const DEVICE_NGRE: Self = Self(0x2);
    /// Device, gathering, reordering.
    pub const DEVICE_GRE: Self = Self(0x3);
    /// Normal memory, inner and outer non-cacheable.
    pub const NORMAL_NC: Self = Self(0x5);
    /// Normal memory, inner and outer write-back.
    pub const NORMAL_WB: Self = Self(0xf);

    /// From the 4-bit code. The reserved codes 4, 8 and 12 act as Device-nGnRnE (IHI 0062D, S2CR.MemAttr).
    pub const fn from_code(code: u8) -> Self {
        match code & 0xf {
            0x4 | 0x8 | 0xc => Self::DEVICE_NGNRNE,
            c => Self(c),
        }
    }

    /// Normal memory with the given outer and inner cacheability (1 NC, 2 WT, 3 WB; 0 is taken as 1).
    pub const fn normal(outer: u8, inner: u8) -> Self {
        let o = if outer & 3 == 0 { 1 } else { outer & 3 };
        let i = if inner & 3 == 0 { 1 } else { inner & 3 };
        Self(o << 2 | i)
    }

    /// From a byte of MAIR (DDI 0487 `MAIR_ELx`); write-through and write-back lose their allocation hints,
    /// which [`Attributes`] holds apart.
    pub const fn from_mair(byte: u8) -> Self {
        if byte >> 4 == 0 {
            return Self(byte >> 2 & 3);
        }
        Self::normal(Self::mair_nibble(byte >> 4), Self::mair_nibble(byte & 0xf))
    }

    const fn mair_nibble(nibble: u8) -> u8 {
        match nibble {
            0b0100 => 1,
            0b0000..=0b0011 | 0b1000..=0b1011 => 2,
            _ => 3,
        }
    }

    /// From AMBA AxCACHE: device, non-cacheable or cacheable as `[3:1]` say (AMBA AXI4 table A4-5).
    pub const fn from_axcache(cache: u8) -> Self {
        match cache & 0xf {
            0 => Self::DEVICE_NGNRNE,
            1 => Self::DEVICE_NGNRE,
            2 | 3 => Self::NORMAL_NC,
            c if c & 1 == 0 => Self::normal(2, 2),
            _ => Self::NORMAL_WB,
        }
    }

    /// The 4-bit code.
    pub const fn code(self) -> u8 {
        self.0
    }

    /// True for the four Device types.
    pub const fn is_device(self) -> bool {
        self.0 < 4
    }

    /// True if inner or outer is cacheable, so that a coherent interconnect looks into caches for it.
    pub const fn is_cacheable(self) -> bool {
        !self.is_device() && self.0 != 0x5
    }

    /// The stronger of two types: Device over Normal, nGnRnE over nGnRE over nGRE over GRE, and for Normal NC
    /// over WT over WB, inner and outer apart (IHI 0062D, combining stage 1 and stage 2 attributes).
    pub const fn combine(self, other: Self) -> Self {
        match (self.is_device(), other.is_device()) {
            (true, false) => self,
            (false, true) => other,
            (true, true) => {
                if self.0 < other.0 {
                    self
                } else {
                    other
                }
            }
            (false, false) => {
                let o = if self.0 >> 2 < other.0 >> 2 { self.0 >> 2 } else { other.0 >> 2 };
                let i = if self.0 & 3 < other.0 & 3 { self.0 & 3 } else { other.0 & 3 };
                Self(o << 2 | i)
            }
        }
    }
}

impl fmt::Display for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CACHE: [&str; 4] = ["?", "NC", "WT", "WB"];
        match self.0 {
            0 => f.write_str("Device-nGnRnE"),
            1 => f.write_str("Device-nGnRE"),
            2 => f.write_str("Device-nGRE"),
            3 => f.write_str("Device-GRE"),
            c if c >> 2 == c & 3 => write!(f, "Normal-{}", CACHE[usize::from(c & 3)]),
            c => write!(f, "Normal-o{}-i{}", CACHE[usize::from(c >> 2)], CACHE[usize::from(c & 3)]),
        }
    }
}

impl fmt::Debug for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Shareability, in the encoding of descriptors and TCR.SH (1 is reserved and acts as outer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Shareability {
    /// Not shared with other observers.
    Non = 0,
    /// Shared within the outer domain.
    Outer = 2,
    /// Shared within the inner domain.
    Inner = 3,
}

impl Shareability {
    /// From the 2-bit descriptor code.
    pub const fn from_code(code: u8) -> Self {
        match code & 3 {
            0 => Self::Non,
            3 => Self::Inner,
            _ => Self::Outer,
        }
    }

    /// The stronger of two: outer over inner over non-shareable.
    pub const fn combine(self, other: Self) -> Self {
        match (self, other) {
            (Self::Outer, _) | (_, Self::Outer) => Self::Outer,
            (Self::Inner, _) | (_, Self::Inner) => Self::Inner,
            _ => Self::Non,
        }
    }
}

impl fmt::Display for Shareability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Non => "non-shareable",
            Self::Outer => "outer-shareable",
            Self::Inner => "inner-shareable",
        })
    }
}

/// An allocation hint (RACFG / WACFG codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Allocate {
    /// No statement: keep what came in.
    Default = 0,
    /// Allocate in caches.
    Yes = 2,
    /// Do not allocate.
    No = 3,
}

impl Allocate {
    /// From the 2-bit RACFG/WACFG code; the reserved code 1 acts as default.
    pub const fn from_code(code: u8) -> Self {
        match code & 3 {
            2 => Self::Yes,
            3 => Self::No,
            _ => Self::Default,
        }
    }
}

/// The attributes of one transaction, packed into one word.
///
/// | Bits | Meaning |
/// |---|---|
/// | 3:0 | [`MemoryType`] code |
/// | 5:4 | [`Shareability`] code |
/// | 7:6 / 9:8 | read / write [`Allocate`] hint |
/// | 11:10 | transient hint (0 default, 2 non-transient, 3 transient) |
/// | 12 | non-secure |
/// | 13 | privileged |
/// | 14 | instruction fetch |
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Attributes(u32);

impl Attributes {
    /// What a master sends that says nothing of its own: Normal write-back, non-shareable, default hints,
    /// non-secure, unprivileged, data (AxPROT = 0b010).
    pub const DEVICE_DEFAULT: Self = Self(0x100f);

    /// From the packed word (see the type's table); reserved codes are normalised.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & 0x7fff)
            .with_memory(MemoryType::from_code(bits as u8 & 0xf))
            .with_shareability(Shareability::from_code((bits >> 4) as u8))
    }
    /// The packed word.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.0
    }
    /// From the AXI side-band signals: AxCACHE\[3:0\] and AxPROT\[2:0\].
    pub const fn from_axi(axcache: u8, axprot: u8) -> Self {
        Self(0)
            .with_memory(MemoryType::from_axcache(axcache))
            .with_privileged(axprot & 1 != 0)
            .with_non_secure(axprot & 2 != 0)
            .with_instruction(axprot & 4 != 0)
    }
    /// The bits that tables never decide alone: non-secure, privileged, instruction.
    #[inline]
    pub const fn security_privilege_bits(self) -> u32 {
        self.0 & 0x7000
    }
    /// With these of the [`security_privilege_bits`](Self::security_privilege_bits) set as well: what a transaction adds
    /// to the attributes of a leaf. A non-secure transaction stays non-secure whatever the leaf says.
    #[inline]
    pub const fn or_bits(self, bits: u32) -> Self {
        Self(self.0 | bits & 0x7000)
    }
    const fn field(self, shift: u32, mask: u32, value: u32) -> Self {
        Self(self.0 & !(mask << shift) | (value & mask) << shift)
    }
    /// The memory type.
    pub const fn memory(self) -> MemoryType {
        MemoryType::from_code(self.0 as u8 & 0xf)
    }
    /// Replaces the memory type.
    pub const fn with_memory(self, memory: MemoryType) -> Self {
        self.field(0, 0xf, memory.0 as u32)
    }
    /// The shareability.
    pub const fn shareability(self) -> Shareability {
        Shareability::from_code((self.0 >> 4) as u8)
    }
    /// Replaces the shareability.
    pub const fn with_shareability(self, sh: Shareability) -> Self {
        self.field(4, 3, sh as u32)
    }
    /// The read allocation hint.
    pub const fn read_allocate(self) -> Allocate {
        Allocate::from_code((self.0 >> 6) as u8)
    }
    /// Replaces the read allocation hint.
    pub const fn with_read_allocate(self, a: Allocate) -> Self {
        self.field(6, 3, a as u32)
    }
    /// The write allocation hint.
    pub const fn write_allocate(self) -> Allocate {
        Allocate::from_code((self.0 >> 8) as u8)
    }
    /// Replaces the write allocation hint.
    pub const fn with_write_allocate(self, a: Allocate) -> Self {
        self.field(8, 3, a as u32)
    }
    /// The transient hint: 0 default, 2 non-transient, 3 transient.
    pub const fn transient(self) -> u8 {
        (self.0 >> 10 & 3) as u8
    }
    /// Replaces the transient hint.
    pub const fn with_transient(self, code: u8) -> Self {
        self.field(10, 3, code as u32)
    }
    /// True for a non-secure transaction (AxPROT\[1\]).
    #[inline]
    pub const fn non_secure(self) -> bool {
        self.0 >> 12 & 1 != 0
    }
    /// Replaces the security state.
    pub const fn with_non_secure(self, ns: bool) -> Self {
        self.field(12, 1, ns as u32)
    }
    /// True for a privileged transaction (AxPROT\[0\]).
    #[inline]
    pub const fn privileged(self) -> bool {
        self.0 >> 13 & 1 != 0
    }
    /// Replaces the privilege.
    pub const fn with_privileged(self, privileged: bool) -> Self {
        self.field(13, 1, privileged as u32)
    }
    /// True for an instruction fetch (AxPROT\[2\]).
    #[inline]
    pub const fn instruction(self) -> bool {
        self.0 >> 14 & 1 != 0
    }
    /// Replaces instruction/data.
    pub const fn with_instruction(self, instruction: bool) -> Self {
        self.field(14, 1, instruction as u32)
    }
    /// The attributes of one access: a write is never an instruction fetch.
    #[inline]
    pub const fn of(self, access: Access) -> Self {
        match access {
            Access::Read => self,
            Access::Write => self.with_instruction(false),
        }
    }
    /// Device memory, and Normal memory that is non-cacheable inside and out, is always outer shareable and
    /// carries no allocation hints (IHI 0062D attribute combining; DDI 0487 D8.6).
    pub const fn consistent(self) -> Self {
        if self.memory().is_cacheable() {
            self
        } else {
            self.with_shareability(Shareability::Outer)
                .with_read_allocate(Allocate::Default)
                .with_write_allocate(Allocate::Default)
        }
    }
}

impl Default for Attributes {
    fn default() -> Self {
        Self::DEVICE_DEFAULT
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {} {}",
            self.memory(),
            self.shareability(),
            if self.non_secure() { "non-secure" } else { "secure" },
            if self.privileged() { "privileged" } else { "unprivileged" },
            if self.instruction() { "instruction" } else { "data" }
        )
    }
}

impl fmt::Debug for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attributes({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_memory_type_wins() {
        assert_eq!(MemoryType::NORMAL_WB.combine(MemoryType::NORMAL_NC), MemoryType::NORMAL_NC);
        assert_eq!(MemoryType::DEVICE_GRE.combine(MemoryType::NORMAL_NC), MemoryType::DEVICE_GRE);
        assert_eq!(MemoryType::DEVICE_GRE.combine(MemoryType::DEVICE_NGNRE), MemoryType::DEVICE_NGNRE);
        assert_eq!(MemoryType::normal(3, 1).combine(MemoryType::normal(2, 3)), MemoryType::normal(2, 1));
    }

    #[test]
    fn linux_mair_bytes_decode() {
        assert_eq!(MemoryType::from_mair(0x44), MemoryType::NORMAL_NC);
        assert_eq!(MemoryType::from_mair(0xff), MemoryType::NORMAL_WB);
        assert_eq!(MemoryType::from_mair(0x04), MemoryType::DEVICE_NGNRE);
        assert_eq!(MemoryType::from_mair(0xf4), MemoryType::normal(3, 1));
    }

    #[test]
    fn packed_fields_do_not_overlap() {
        let a = Attributes::from_bits(0)
            .with_memory(MemoryType::NORMAL_WB)
            .with_shareability(Shareability::Inner)
            .with_read_allocate(Allocate::Yes)
            .with_write_allocate(Allocate::No)
            .with_transient(3)
            .with_non_secure(true)
            .with_privileged(true)
            .with_instruction(true);
        assert_eq!(a.bits(), 0x7fbf);
        assert_eq!(a.write_allocate(), Allocate::No);
        assert_eq!(Attributes::from_axi(0xf, 0b010).bits(), Attributes::DEVICE_DEFAULT.bits());
    }
}
