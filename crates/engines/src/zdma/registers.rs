//! The register file of a channel: what is stored, and what an access to each kind of register does to it.

use portcullis_arch::zdma::{ErrCtrl, REGISTERS, Register, Rights, interrupt, reg};

const WORDS: usize = reg::CTRL2 as usize / 4 + 1;

/// Stored register values, by word offset. Offsets that hold nothing stay 0.
#[derive(Clone)]
pub(super) struct Registers {
    words: [u32; WORDS],
}

impl Default for Registers {
    fn default() -> Self {
        let mut registers = Self { words: [0; WORDS] };
        for r in &REGISTERS {
            registers.set(r.offset, r.reset);
        }
        registers
    }
}

impl Registers {
    pub(super) fn get(&self, offset: u32) -> u32 {
        self.words.get(offset as usize / 4).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, offset: u32, value: u32) {
        if let Some(word) = self.words.get_mut(offset as usize / 4) {
            *word = value;
        }
    }

    /// Two registers as one address, low word first.
    pub(super) fn get64(&self, low: u32) -> u64 {
        u64::from(self.get(low + 4)) << 32 | u64::from(self.get(low))
    }

    /// Reads and clears.
    pub(super) fn take(&mut self, offset: u32) -> u32 {
        let value = self.get(offset);
        self.set(offset, 0);
        value
    }

    /// A write by software.
    pub(super) fn write(&mut self, register: &Register, value: u32) {
        let value = value & register.mask;
        let old = self.get(register.offset);
        match (register.offset, register.rights) {
            (reg::IEN, _) => self.set(reg::IMR, self.get(reg::IMR) & !value),
            (reg::IDS, _) => self.set(reg::IMR, self.get(reg::IMR) | value),
            (_, Rights::ReadWrite) => self.set(register.offset, value),
            (_, Rights::WriteOneToClear) => self.set(register.offset, old & !value),
            (_, Rights::ClearOnWrite) => self.set(register.offset, 0),
            (_, Rights::ReadOnly | Rights::ClearOnRead | Rights::WriteOnly) => {}
        }
    }

    /// Sets ISR bits: sticky, masked or not.
    pub(super) fn raise(&mut self, bits: u32) {
        self.set(reg::ISR, self.get(reg::ISR) | bits & interrupt::ALL);
    }

    /// The interrupt output: any bit of ISR that IMR does not mask.
    pub(super) fn interrupt(&self) -> bool {
        self.get(reg::ISR) & !self.get(reg::IMR) != 0
    }

    pub(super) fn apb_error(&self) -> bool {
        ErrCtrl::from_bits(self.get(reg::ERR_CTRL)).apb_error()
    }

    /// Counts a completed descriptor in an 8-bit accounting counter.
    pub(super) fn account(&mut self, counter: u32, wrapped: u32) {
        let count = (self.get(counter) + 1) & 0xff;
        self.set(counter, count);
        if count == 0 {
            self.raise(wrapped);
        }
    }

    /// Counts bytes written to the destination.
    pub(super) fn count_bytes(&mut self, bytes: usize) {
        // One piece is far below 2^32 bytes, so the counter wraps at most once.
        let (total, wrapped) = self.get(reg::TOTAL_BYTE).overflowing_add(bytes as u32);
        self.set(reg::TOTAL_BYTE, total);
        if wrapped {
            self.raise(interrupt::BYTE_CNT_OVRFL);
        }
    }
}
