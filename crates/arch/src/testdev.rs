//! The PCIe DMA test device (system S3): identity, registers, and this project's extension block.
//!
//! Offsets up to 0x30 and the identity are those of the published device model `pcie-testdev`. The block from 0x100 up
//! is this project's own: substreams, results, interrupts and the upper address halves, which 32-bit writes cannot
//! reach in the original.

use bitfield_struct::bitfield;

/// Size in bytes of BAR0 (64-bit, prefetchable memory).
pub const BAR0_BYTES: u64 = 0x1_0000;
/// PCI class code: base class 0xff (no class fits).
pub const CLASS: u32 = 0xff_0000;

/// What configuration space says about who the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciIdentity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

impl PciIdentity {
    /// The identity of the published device model.
    pub const DEVICE: Self =
        Self { vendor: 0x1ae0, device: 0x006b, subsystem_vendor: 0x1ae0, subsystem: 0x00be };
    /// The same with the vendor and device that the published driver binds to.
    pub const DRIVER: Self = Self { vendor: 0x1b36, device: 0x0010, ..Self::DEVICE };
}

/// Offsets of the registers from the start of BAR0. Storage is 64 bits wide, but an access of 8 bytes arrives as two of
/// 4, and the upper one hits no register.
pub mod reg {
    /// Source bus address.
    pub const SRCADDR: u64 = 0x00;
    /// Destination bus address.
    pub const DSTADDR: u64 = 0x08;
    /// Bytes to move.
    pub const SIZE: u64 = 0x10;
    /// Bit 0 starts a transfer; reads as 0.
    pub const DOORBELL: u64 = 0x18;
    /// 0 idle, 1 busy; read-only. Never an error.
    pub const STATUS: u64 = 0x20;
    /// Milliseconds between doorbell and transfer.
    pub const BUSY_DELAY: u64 = 0x28;
    /// Bit 0: the device makes transfers by itself.
    pub const AGGRESSIVE: u64 = 0x30;

    /// Extension: [`PasidCtrl`](super::PasidCtrl).
    pub const PASID_CTRL: u64 = 0x100;
    /// Extension: [`TransferResult`](super::TransferResult) of the last transfer; read-only.
    pub const RESULT: u64 = 0x108;
    /// Extension: bytes that arrived before the fault of the last transfer, 0 if there was none; read-only.
    pub const RESULT_DONE: u64 = 0x10c;
    /// Extension: transfers that ended, whatever their result; wraps; read-only.
    pub const COUNT: u64 = 0x110;
    /// Extension: [`IrqCtrl`](super::IrqCtrl).
    pub const IRQ_CTRL: u64 = 0x118;
    /// Extension: what an interrupt message writes.
    pub const MSI_DATA: u64 = 0x11c;
    /// Extension: where an interrupt message goes, low half.
    pub const MSI_ADDR_LO: u64 = 0x120;
    /// Extension: where an interrupt message goes, high half.
    pub const MSI_ADDR_HI: u64 = 0x124;
    /// Extension: the upper half of SRCADDR; write it after SRCADDR, which clears it.
    pub const SRC_HI: u64 = 0x128;
    /// Extension: the upper half of DSTADDR; write it after DSTADDR, which clears it.
    pub const DST_HI: u64 = 0x12c;
}

/// Extension register PASID_CTRL: on whose behalf transfers are made.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct PasidCtrl {
    /// `[19:0]` the PASID (substream).
    #[bits(20)]
    pub pasid: u32,
    #[bits(9)]
    __: u32,
    /// `[29]` reads are instruction fetches.
    pub execute: bool,
    /// `[30]` accesses are privileged.
    pub privileged: bool,
    /// `[31]` accesses carry the PASID; bits 30 and 29 say nothing without it.
    pub enable: bool,
}

/// How a transfer ended: bits 7:0 of RESULT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ResultCode {
    /// Everything arrived.
    #[default]
    Ok = 0,
    /// The IOMMU terminated an access.
    Terminated = 1,
    /// Nothing answers at an address.
    Decode = 2,
    /// The target refused an access.
    Slave = 3,
    /// SIZE is more than the device has room for; nothing was read.
    TooLarge = 4,
    /// Bus mastering is off; nothing was read.
    BusMasterOff = 5,
}

impl ResultCode {
    const fn into_bits(self) -> u8 {
        self as u8
    }
    const fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Ok,
            2 => Self::Decode,
            3 => Self::Slave,
            4 => Self::TooLarge,
            5 => Self::BusMasterOff,
            _ => Self::Terminated,
        }
    }
}

/// Extension register RESULT. Zero if the transfer was carried out.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct TransferResult {
    /// `[7:0]` what happened first.
    #[bits(8, default = ResultCode::Ok)]
    pub code: ResultCode,
    /// `[8]` the destination side failed; otherwise the source side.
    pub destination: bool,
    #[bits(23)]
    __: u32,
}

/// Extension register IRQ_CTRL: what happens when a transfer ends.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Hash)]
pub struct IrqCtrl {
    /// `[0]` an interrupt is raised.
    pub enable: bool,
    /// `[1]` as a message (MSI_DATA to MSI_ADDR); otherwise the wire goes high until PENDING is cleared.
    pub message: bool,
    #[bits(29)]
    __: u32,
    /// `[31]` the wire is high; write 1 to clear.
    pub pending: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_documentation_says() {
        assert_eq!(PasidCtrl::new().with_pasid(0xfffff).into_bits(), 0xf_ffff);
        assert_eq!(PasidCtrl::new().with_execute(true).into_bits(), 1 << 29);
        assert_eq!(PasidCtrl::new().with_privileged(true).into_bits(), 1 << 30);
        assert_eq!(PasidCtrl::new().with_enable(true).into_bits(), 1 << 31);
        let r = TransferResult::new().with_code(ResultCode::Slave).with_destination(true);
        assert_eq!(r.into_bits(), 0x103);
        assert_eq!(IrqCtrl::new().with_pending(true).with_message(true).into_bits(), 1 << 31 | 2);
    }
}
