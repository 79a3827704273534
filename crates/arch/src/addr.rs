//! Address spaces and identifiers as types, so that an IPA cannot be handed to something that wants a PA.

use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address as a plain number.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }
            /// The address `bytes` further on, or `None` past the end of the 64-bit space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(a) => Some(Self(a)),
                    None => None,
                }
            }
            /// The address `bytes` further on, wrapping at 2^64 as an address bus does.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
            /// True if the address is a multiple of `align` (a power of two).
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & (align - 1) == 0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub $int);

        impl $name {
            /// The identifier as a plain number.
            #[inline]
            pub const fn get(self) -> $int {
                self.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
        impl From<$int> for $name {
            fn from(value: $int) -> Self {
                Self(value)
            }
        }
    };
}

address!(
    /// An address as a device issues it: the input of an SMMU (a virtual address, or an IOVA of the DMA API).
    Iova
);
address!(
    /// An intermediate physical address: the output of stage 1 and the input of stage 2.
    Ipa
);
address!(
    /// A physical address: what leaves the SMMU towards memory.
    Pa
);
identifier!(
    /// The number by which an SMMU tells one bus master from another (up to 32 bits; 15 or 16 on SMMUv2).
    StreamId, u32
);
identifier!(
    /// A number that tells apart the address spaces of one stream (PASID on PCIe; SMMUv3 only).
    SubstreamId, u32
);
identifier!(
    /// Address space identifier: tags the TLB entries of one stage 1 address space.
    Asid, u16
);
identifier!(
    /// Virtual machine identifier: tags the TLB entries of one stage 2 address space.
    Vmid, u16
);
