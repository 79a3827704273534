//! Arm SMMUv2 (IHI 0062D) and MMU-500 (DDI 0517): register offsets and fields.
//!
//! [`offset`] says where each register is; the bit fields are in [`global`] (global spaces 0 and 1) and
//! [`context`] (one context bank). Names are the architecture's without the `SMMU_` prefix; "s" registers exist
//! once per security state.

pub mod context;
pub mod global;
pub mod offset;

pub use context::{AtsOperand, Fsr, Fsynr0, Sctlr, Tcr2, TcrS1, TcrS1Long, TcrS2, TcrS2Aarch32};
pub use global::{
    Acr, CbType, Cba2r, Cbar, Cr0, Cr2, Gfsr, Gfsynr0, Idr0, Idr1, Idr2, S2cr, S2crType, Scr1, Smr,
};

/// Decodes an IAS/OAS/UBS/PASize size code into bits: 0=32, 1=36, 2=40, 3=42, 4=44, 5 and above=48.
pub const fn address_bits(code: u8) -> u8 {
    match code {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}

/// The size code for an address width, or `None` if the architecture has no code for it.
pub const fn address_code(bits: u8) -> Option<u8> {
    Some(match bits {
        32 => 0,
        36 => 1,
        40 => 2,
        42 => 3,
        44 => 4,
        48 => 5,
        _ => return None,
    })
}
