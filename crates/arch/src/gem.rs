//! Cadence Gigabit Ethernet MAC: the registers and descriptors of its transmit DMA, as far as Portcullis models it.
//!
//! Names and positions are those of Linux's `macb.h` and of UG1085's GEM registers.

use bitfield_struct::bitfield;

/// Register offsets.
pub mod reg {
    /// Network control.
    pub const NCR: u32 = 0x000;
    /// Network configuration; stored, without effect here.
    pub const NCFGR: u32 = 0x004;
    /// DMA configuration.
    pub const DMACFG: u32 = 0x010;
    /// Transmit status, write one to clear.
    pub const TSR: u32 = 0x014;
    /// Transmit queue base: the first descriptor.
    pub const TBQP: u32 = 0x01c;
    /// Interrupt status, write one to clear.
    pub const ISR: u32 = 0x024;
    /// Writing one enables an interrupt.
    pub const IER: u32 = 0x028;
    /// Writing one disables an interrupt.
    pub const IDR: u32 = 0x02c;
    /// Interrupt mask: one for disabled.
    pub const IMR: u32 = 0x030;
    /// Octets transmitted without error, low.
    pub const OCTTXL: u32 = 0x100;
    /// Octets transmitted without error, high.
    pub const OCTTXH: u32 = 0x104;
    /// Frames transmitted without error.
    pub const TXCNT: u32 = 0x108;
    /// Upper half of the transmit queue base.
    pub const TBQPH: u32 = 0x4c8;
}

/// Bits of NCR.
pub mod ncr {
    /// Transmit enable.
    pub const TE: u32 = 1 << 3;
    /// Start transmission; reads 0.
    pub const TSTART: u32 = 1 << 9;
    /// Halt after the frame under way; reads 0.
    pub const THALT: u32 = 1 << 10;
}

/// Bits of TSR.
pub mod tsr {
    /// A descriptor with its used bit set was read.
    pub const UBR: u32 = 1 << 0;
    /// Transmission goes on.
    pub const TGO: u32 = 1 << 3;
    /// A bus error broke a frame off.
    pub const BEX: u32 = 1 << 4;
    /// A frame is out.
    pub const COMP: u32 = 1 << 5;
}

/// Bits of ISR, IER, IDR and IMR.
pub mod interrupt {
    /// A used descriptor was read.
    pub const TXUBR: u32 = 1 << 3;
    /// A bus error broke a frame off.
    pub const TXERR: u32 = 1 << 6;
    /// A frame is out.
    pub const TCOMP: u32 = 1 << 7;
    /// All of them.
    pub const ALL: u32 = TXUBR | TXERR | TCOMP;
}

/// DMACFG.ADDR64: descriptors have 16 bytes, with the upper half of the address in their third word.
pub const DMACFG_ADDR64: u32 = 1 << 30;
/// Longest frame in one go: what the length field of a descriptor holds.
pub const MAX_BUFFER: u32 = 0x3fff;

/// The second word of a transmit descriptor; the first is the buffer's address (low half).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct TxControl {
    /// Bits 13:0: bytes of the buffer.
    #[bits(14)]
    pub length: u32,
    /// Reserved.
    #[bits(1)]
    _reserved0: u8,
    /// Bit 15: the last buffer of a frame.
    pub last: bool,
    /// Reserved, and checksum fields.
    #[bits(11)]
    _reserved1: u16,
    /// Bit 27: a bus error broke the frame off.
    pub bus_error: bool,
    /// Reserved.
    #[bits(2)]
    _reserved2: u8,
    /// Bit 30: the descriptor behind is the first one again.
    pub wrap: bool,
    /// Bit 31: software's. The MAC clears nothing and sets it when the frame is out.
    pub used: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_of_macb_h() {
        assert_eq!(TxControl::new().with_used(true).into_bits(), 1 << 31);
        assert_eq!(TxControl::new().with_wrap(true).into_bits(), 1 << 30);
        assert_eq!(TxControl::new().with_bus_error(true).into_bits(), 1 << 27);
        assert_eq!(TxControl::new().with_last(true).into_bits(), 1 << 15);
        assert_eq!(TxControl::new().with_length(0x3fff).into_bits(), 0x3fff);
    }
}
