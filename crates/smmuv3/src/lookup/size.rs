//! Sizes: address size codes, granules, start levels and table alignment (IHI 0070 section 3.4, DDI 0487 D8.2).

use portcullis_arch::smmuv3::regs::ADDRESS_BITS;
use portcullis_arch::vmsa::Granule;
use portcullis_walk::AddressFormat;

use crate::caps::Caps;

/// The effective size of an IPS or S2PS code. Reserved codes act as the largest that the architecture version knows.
pub(crate) fn effective(caps: &Caps, code: u8) -> u8 {
    let most = if caps.revision == 0 { 5 } else { 6 };
    ADDRESS_BITS[usize::from(code.min(most))].min(caps.oas_bits)
}

/// True if this implementation has the granule.
pub(crate) fn has(caps: &Caps, granule: Granule) -> bool {
    match granule {
        Granule::K4 => caps.gran4k,
        Granule::K16 => caps.gran16k,
        Granule::K64 => caps.gran64k,
    }
}

/// The largest TxSZ or S2T0SZ.
pub(crate) fn largest_tsz(caps: &Caps, granule: Granule) -> u8 {
    match (caps.stt, granule) {
        (false, _) => 39,
        (true, Granule::K64) => 47,
        (true, _) => 48,
    }
}

/// Where descriptors keep addresses. `ds` is the effective value of CD.DS or STE.S2DS.
pub(crate) fn format(caps: &Caps, granule: Granule, ds: bool) -> AddressFormat {
    match granule {
        Granule::K64 if caps.oas_bits > 48 => AddressFormat::Lpa64K,
        Granule::K64 => AddressFormat::Bits48,
        _ if ds => AddressFormat::Ds,
        _ => AddressFormat::Bits48,
    }
}

/// The most bits that the address of a first table may have.
pub(crate) fn table_limit(granule: Granule, ds: bool, output_bits: u8) -> u8 {
    if granule == Granule::K64 || ds { output_bits } else { output_bits.min(48) }
}

/// True if `address` has more than `bits` bits.
pub(crate) fn exceeds(address: u64, bits: u8) -> bool {
    bits < 64 && address >> bits != 0
}

/// The address with its low `log2` bits clear.
pub(crate) fn align(address: u64, log2: u32) -> u64 {
    u64::MAX.checked_shl(log2).unwrap_or(0) & address
}

/// Where stage 1 starts for an input of `bits` bits.
pub(crate) fn stage1_start(granule: Granule, bits: u8) -> i8 {
    let levels = bits.saturating_sub(granule.log2()).div_ceil(granule.stride());
    4 - levels.clamp(1, 5) as i8
}

/// Where stage 2 starts: `code` is S2SL0 with S2SL0_2 above it. `None` if it is reserved.
pub(crate) fn stage2_start(granule: Granule, code: u8, ds: bool, stt: bool) -> Option<i8> {
    match (granule, code) {
        (Granule::K4, 0..=2) => Some(2 - code as i8),
        (Granule::K4, 3) if stt => Some(3),
        (Granule::K4, 4) if ds => Some(-1),
        (Granule::K16, 0..=2) | (Granule::K64, 0..=2) => Some(3 - code as i8),
        (Granule::K16, 3) if ds => Some(0),
        _ => None,
    }
}

/// True if stage 2 may start at `level` for an input of `bits` bits: up to 16 tables in a row, but one at level -1 and at
/// level 0 of the 16 KiB granule.
pub(crate) fn stage2_fits(granule: Granule, level: i8, bits: u8, ds: bool) -> bool {
    let (g, stride) = (granule.log2(), granule.stride());
    let below = g + stride * (3 - level).unsigned_abs();
    let single = level == -1 || (granule == Granule::K16 && level == 0);
    let most = below + stride + if single { 0 } else { 4 };
    let limit = if ds || granule == Granule::K64 { 52 } else { 48 };
    (below + 1..=most.min(limit)).contains(&bits)
}

/// The address of a first table without the bits below its alignment: its size, and at least 64 bytes where addresses
/// have 52 bits.
pub(crate) fn first_table(address: u64, granule: Granule, level: i8, input_bits: u8, output_bits: u8) -> u64 {
    let below =
        u32::from(granule.log2()) + u32::from(granule.stride()) * u32::from((3 - level).unsigned_abs());
    let own = u32::from(input_bits).saturating_sub(below) + 3;
    align(address, own.max(if output_bits >= 52 { 6 } else { 0 }))
}
