//! Which half of a stage 1 address space an input address lies in.

use crate::stage::{canonical, exceeds, low};

/// How a stage 1 input address selects TTBR0 or TTBR1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// AArch64: an address of `va_bits` bits as it comes from the bus, sign-extended from its top bit if `signed`.
    /// Region 0 holds addresses whose upper bits are all 0, region 1 those with all 1.
    Aarch64 {
        /// Bits that the bus delivers, or up to the sign extension position; higher bits must be 0.
        va_bits: u8,
        /// The top bit of these is the sign.
        signed: bool,
        /// T0SZ and T1SZ region sizes in bits.
        region_bits: [u8; 2],
    },
    /// AArch32 long: T0SZ and T1SZ.
    Long {
        /// T0SZ and T1SZ.
        tsz: [u8; 2],
    },
    /// AArch32 short: N = T0SZ.
    Short {
        /// T0SZ.
        n: u8,
    },
    /// AArch64 in an SMMUv3: VA\[55\] picks the region, and all bits from the top (63, or 55 where the top byte is
    /// ignored) down to the region's size must equal it.
    Smmuv3 {
        /// Region sizes in bits (64 - TxSZ), at most 55.
        region_bits: [u8; 2],
        /// The top byte of addresses of this half is ignored (TBI).
        tbi: [bool; 2],
        /// Only region 0 exists: bits above its size must be 0 (EL2 without E2H, EL3).
        single: bool,
    },
}

impl Split {
    /// The region (0 or 1) of `va` and the bits that its tables resolve, or `None` if it lies in neither.
    #[inline(always)]
    pub fn select(self, va: u64) -> Option<(usize, u64)> {
        match self {
            Self::Aarch64 { va_bits, signed, region_bits } => {
                if exceeds(va, va_bits) {
                    return None;
                }
                let extend = 64 - u32::from(va_bits.clamp(1, 64));
                let x = if signed { ((va << extend) as i64 >> extend) as u64 } else { va };
                let half = (x >> 63) as usize;
                let bits = region_bits[half];
                let top = if bits >= 64 { 0 } else { x >> bits };
                let want = if half == 0 || bits >= 64 { 0 } else { u64::MAX >> bits };
                let inside = if bits >= 64 { x } else { x & ((1 << bits) - 1) };
                (top == want).then_some((half, inside))
            }
            Self::Smmuv3 { region_bits, tbi, single } => {
                let half = (va >> 55 & 1) as usize;
                let bits = region_bits[half].min(55);
                let extended = if tbi[half] { canonical(va) } else { va };
                let want = if half == 0 { 0 } else { u64::MAX >> bits };
                let inside = va & low(bits);
                (extended >> bits == want && !(single && half == 1)).then_some((half, inside))
            }
            _ => self.select_aarch32(va),
        }
    }

    fn select_aarch32(self, va: u64) -> Option<(usize, u64)> {
        match self {
            Self::Long { tsz: [t0, t1] } => {
                if va >> 32 != 0 {
                    return None;
                }
                let size = |sz: u8| 1u64 << (32 - sz.min(32));
                let below = |sz: u8| va < size(sz);
                let above = |sz: u8| va >= (1 << 32) - size(sz);
                let half = match (t0, t1) {
                    (0, 0) => 0,
                    (m, 0) => usize::from(!below(m)),
                    (0, n) => usize::from(above(n)),
                    (m, _) if below(m) => 0,
                    (_, n) if above(n) => 1,
                    _ => return None,
                };
                Some((half, va & (size([t0, t1][half]) - 1)))
            }
            Self::Short { n } => {
                if va >> 32 != 0 {
                    return None;
                }
                let half = usize::from(n > 0 && va >> (32 - n.min(32)) != 0);
                Some((half, va))
            }
            _ => None,
        }
    }

    /// log2 of the largest naturally aligned block that lies in region `half` as a whole. The AArch32 regions without
    /// a size of their own begin or end in the middle of what one descriptor can cover.
    #[inline]
    pub(crate) fn block_limit(self, half: usize) -> u8 {
        match (self, half) {
            (Self::Aarch64 { region_bits: [bits, _], .. }, 0) => bits,
            (Self::Aarch64 { region_bits: [_, bits], .. }, _) => bits,
            (Self::Long { tsz: [0, t1] }, 0) => 32u8.saturating_sub(t1),
            (Self::Long { tsz: [t0, 0] }, 1) => 32u8.saturating_sub(t0),
            (Self::Long { tsz }, _) => 32u8.saturating_sub(tsz[half & 1]),
            (Self::Short { n }, _) => 32u8.saturating_sub(n),
            (Self::Smmuv3 { region_bits, .. }, half) => region_bits[half & 1].min(55),
        }
    }
}
