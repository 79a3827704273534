//! Typed access to the pages of one SMMU.

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_hal::Mmio;

/// The register window and where its pages are.
#[derive(Debug)]
pub(super) struct Regs<R> {
    mmio: R,
    page_shift: u32,
    global_pages: usize,
}

impl<R: Mmio> Regs<R> {
    /// Before identification: page 0 is all that can be addressed, and it is in the same place in every layout.
    pub fn new(mmio: R) -> Self {
        Self { mmio, page_shift: 12, global_pages: 1 }
    }

    /// Sets the layout that IDR1 tells.
    pub fn set_layout(&mut self, page_shift: u32, global_pages: usize) {
        self.page_shift = page_shift;
        self.global_pages = global_pages;
    }

    pub fn read(&self, offset: usize) -> u32 {
        self.mmio.read32(offset)
    }
    pub fn read64(&self, offset: usize) -> u64 {
        self.mmio.read64(offset)
    }
    pub fn write(&self, offset: usize, value: u32) {
        self.mmio.write32(offset, value);
    }

    fn gr1(&self, offset: usize) -> usize {
        (1 << self.page_shift) + offset
    }
    fn bank(&self, bank: u8, offset: usize) -> usize {
        ((self.global_pages + usize::from(bank)) << self.page_shift) + offset
    }

    pub fn write_cbar(&self, bank: u8, value: u32) {
        self.mmio.write32(self.gr1(gr1::CBAR + usize::from(bank) * 4), value);
    }
    pub fn write_cba2r(&self, bank: u8, value: u32) {
        self.mmio.write32(self.gr1(gr1::CBA2R + usize::from(bank) * 4), value);
    }
    pub fn read_cbfrsynra(&self, bank: u8) -> u32 {
        self.mmio.read32(self.gr1(gr1::CBFRSYNRA + usize::from(bank) * 4))
    }
    pub fn read_smr(&self, index: usize) -> u32 {
        self.mmio.read32(gr0::SMR + index * 4)
    }
    pub fn write_smr(&self, index: usize, value: u32) {
        self.mmio.write32(gr0::SMR + index * 4, value);
    }
    pub fn write_s2cr(&self, index: usize, value: u32) {
        self.mmio.write32(gr0::S2CR + index * 4, value);
    }

    pub fn read_cb(&self, bank: u8, offset: usize) -> u32 {
        self.mmio.read32(self.bank(bank, offset))
    }
    pub fn write_cb(&self, bank: u8, offset: usize, value: u32) {
        self.mmio.write32(self.bank(bank, offset), value);
    }
    pub fn read_cb64(&self, bank: u8, offset: usize) -> u64 {
        self.mmio.read64(self.bank(bank, offset))
    }
    pub fn write_cb64(&self, bank: u8, offset: usize, value: u64) {
        self.mmio.write64(self.bank(bank, offset), value);
    }
    pub fn read_fsr(&self, bank: u8) -> u32 {
        self.read_cb(bank, cb::FSR)
    }
}
