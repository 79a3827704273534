//! The PL writer: a small bus master in the programmable logic that writes one 32-bit word.
//!
//! Types, offsets and bits only. The offsets 0x30 to 0x44 are those of the thesis (system S2); what the
//! registers read back, and [`Status`] in particular, is this project's choice, because the original design is
//! not public.

use bitfield_struct::bitfield;

/// Size in bytes of the register window.
pub const WINDOW: u64 = 0x1_0000;
/// Where the thesis' design has it in the address map.
pub const THESIS_BASE: u64 = 0xb000_0000;
/// Bits of the AXI ID that a PL port carries into the stream ID.
pub const AXI_ID_MASK: u32 = 0x3f;

/// Offsets of the registers from the start of the window.
pub mod reg {
    /// Destination address, low. Bits 1:0 read as 0: the IP writes whole words.
    pub const DESTINATION_LOW: u32 = 0x30;
    /// Destination address, high.
    pub const DESTINATION_HIGH: u32 = 0x34;
    /// The word to write.
    pub const DATA: u32 = 0x38;
    /// AxCACHE in bits 3:0.
    pub const CACHE: u32 = 0x3c;
    /// AXI ID in bits 5:0.
    pub const AXI_ID: u32 = 0x40;
    /// A write with bit 0 set starts a write; reads as [`Status`](super::Status).
    pub const TRIGGER: u32 = 0x44;
}

/// One register of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Register {
    /// Its name.
    pub name: &'static str,
    /// Offset in bytes.
    pub offset: u32,
    /// The bits that read back; all reset to 0.
    pub mask: u32,
}

/// Every register, by ascending offset.
pub const REGISTERS: [Register; 6] = [
    Register { name: "DESTINATION_LOW", offset: reg::DESTINATION_LOW, mask: 0xffff_fffc },
    Register { name: "DESTINATION_HIGH", offset: reg::DESTINATION_HIGH, mask: u32::MAX },
    Register { name: "DATA", offset: reg::DATA, mask: u32::MAX },
    Register { name: "CACHE", offset: reg::CACHE, mask: 0xf },
    Register { name: "AXI_ID", offset: reg::AXI_ID, mask: AXI_ID_MASK },
    Register { name: "TRIGGER", offset: reg::TRIGGER, mask: 0x37 },
];

/// An AXI write response (AMBA AXI4 A3.4.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Response {
    /// Success.
    #[default]
    Okay = 0,
    /// Exclusive success; never seen here.
    ExOkay = 1,
    /// The target, or an IOMMU on the way, refused it.
    SlvErr = 2,
    /// Nothing answers at the address.
    DecErr = 3,
}

impl Response {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Okay,
            1 => Self::ExOkay,
            2 => Self::SlvErr,
            _ => Self::DecErr,
        }
    }
}

/// What TRIGGER reads back. A new start clears DONE, ERROR and RESPONSE.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct Status {
    /// `[0]` a write is under way: no response has come yet.
    pub busy: bool,
    /// `[1]` a response has come.
    pub done: bool,
    /// `[2]` that response was an error.
    pub error: bool,
    __: bool,
    /// `[5:4]` the response.
    #[bits(2, default = Response::Okay)]
    pub response: Response,
    #[bits(26)]
    __: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offsets_are_those_of_the_thesis() {
        let offsets: [(&str, u32); 6] = [
            ("DESTINATION_LOW", 0x30),
            ("DESTINATION_HIGH", 0x34),
            ("DATA", 0x38),
            ("CACHE", 0x3c),
            ("AXI_ID", 0x40),
            ("TRIGGER", 0x44),
        ];
        assert_eq!(REGISTERS.map(|r| (r.name, r.offset)), offsets);
    }

    #[test]
    fn status_bits_fill_the_documented_mask() {
        let all =
            Status::new().with_busy(true).with_done(true).with_error(true).with_response(Response::DecErr);
        assert_eq!(all.into_bits(), 0x37);
    }
}
