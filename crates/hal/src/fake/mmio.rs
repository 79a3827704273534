//! A register window that records what a driver does.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use spin::Mutex;

use crate::Mmio;

/// One access of a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// True for a write.
    pub write: bool,
    /// Byte offset in the window.
    pub offset: usize,
    /// Bytes: 4 or 8.
    pub size: u8,
    /// The value written or read.
    pub value: u64,
}

/// The contents of the window, in 32-bit words. What was never set reads as 0.
#[derive(Clone, Debug, Default)]
pub struct Registers(BTreeMap<usize, u32>);

impl Registers {
    /// A 32-bit register.
    pub fn get32(&self, offset: usize) -> u32 {
        self.0.get(&offset).copied().unwrap_or(0)
    }

    /// Sets a 32-bit register.
    pub fn set32(&mut self, offset: usize, value: u32) {
        self.0.insert(offset, value);
    }

    /// A 64-bit register, low word first.
    pub fn get64(&self, offset: usize) -> u64 {
        u64::from(self.get32(offset)) | u64::from(self.get32(offset.wrapping_add(4))) << 32
    }

    /// Sets a 64-bit register, low word first.
    pub fn set64(&mut self, offset: usize, value: u64) {
        self.set32(offset, value as u32);
        self.set32(offset.wrapping_add(4), (value >> 32) as u32);
    }
}

type Handler = Box<dyn FnMut(&mut Registers, MmioAccess) -> Option<u64> + Send>;

struct State {
    registers: Registers,
    log: Vec<MmioAccess>,
    handler: Option<Handler>,
}

/// A register window. Without a handler it behaves as memory: reads give what was written or set last.
pub struct FakeMmio {
    state: Mutex<State>,
}

impl Default for FakeMmio {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeMmio {
    /// A window of zeroes that stores what is written.
    pub fn new() -> Self {
        Self { state: Mutex::new(State { registers: Registers::default(), log: Vec::new(), handler: None }) }
    }

    /// A window with behaviour. `handler(registers, access)` runs for every access, before it takes effect. For a read,
    /// `access.value` is what the registers hold, and `Some` replaces it. For a write, `Some` is what gets stored
    /// instead (for a read-only register: the old value). The handler must not access the window itself.
    pub fn with_handler(
        handler: impl FnMut(&mut Registers, MmioAccess) -> Option<u64> + Send + 'static,
    ) -> Self {
        let mmio = Self::new();
        mmio.state.lock().handler = Some(Box::new(handler));
        mmio
    }

    /// Sets a 32-bit register, unrecorded.
    pub fn set32(&self, offset: usize, value: u32) {
        self.state.lock().registers.set32(offset, value);
    }

    /// Sets a 64-bit register, unrecorded.
    pub fn set64(&self, offset: usize, value: u64) {
        self.state.lock().registers.set64(offset, value);
    }

    /// A 32-bit register, unrecorded and past the handler.
    pub fn get32(&self, offset: usize) -> u32 {
        self.state.lock().registers.get32(offset)
    }

    /// A 64-bit register, unrecorded and past the handler.
    pub fn get64(&self, offset: usize) -> u64 {
        self.state.lock().registers.get64(offset)
    }

    /// All accesses since the start or the last call, oldest first.
    pub fn take_log(&self) -> Vec<MmioAccess> {
        core::mem::take(&mut self.state.lock().log)
    }

    /// The writes since the start or the last call as `(offset, value)`; forgets the reads too.
    pub fn take_writes(&self) -> Vec<(usize, u64)> {
        self.take_log().into_iter().filter(|a| a.write).map(|a| (a.offset, a.value)).collect()
    }

    fn read(&self, offset: usize, size: u8) -> u64 {
        let mut state = self.state.lock();
        let State { registers, log, handler } = &mut *state;
        let held = if size == 8 { registers.get64(offset) } else { registers.get32(offset).into() };
        let mut access = MmioAccess { write: false, offset, size, value: held };
        if let Some(value) = handler.as_mut().and_then(|handler| handler(registers, access)) {
            access.value = value;
        }
        log.push(access);
        access.value
    }

    fn write(&self, offset: usize, size: u8, value: u64) {
        let mut state = self.state.lock();
        let State { registers, log, handler } = &mut *state;
        let access = MmioAccess { write: true, offset, size, value };
        log.push(access);
        let stored = handler.as_mut().and_then(|handler| handler(registers, access)).unwrap_or(value);
        match size {
            8 => registers.set64(offset, stored),
            _ => registers.set32(offset, stored as u32),
        }
    }
}

impl Mmio for FakeMmio {
    fn read32(&self, offset: usize) -> u32 {
        self.read(offset, 4) as u32
    }
    fn write32(&self, offset: usize, value: u32) {
        self.write(offset, 4, value.into());
    }
    fn read64(&self, offset: usize) -> u64 {
        self.read(offset, 8)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.write(offset, 8, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_recorded_in_order_and_halves_make_a_register() {
        let mmio = FakeMmio::new();
        mmio.write32(0x10, 0x1111_2222);
        mmio.write32(0x14, 0x3333_4444);
        assert_eq!(mmio.read64(0x10), 0x3333_4444_1111_2222);
        let log = mmio.take_log();
        assert_eq!(log.len(), 3);
        assert_eq!(log[2], MmioAccess { write: false, offset: 0x10, size: 8, value: 0x3333_4444_1111_2222 });
        assert!(mmio.take_log().is_empty());
    }

    #[test]
    fn a_handler_scripts_reads_and_sees_writes() {
        let mmio = FakeMmio::with_handler(|registers, access| match (access.write, access.offset) {
            (true, 0x0) => {
                registers.set32(0x4, 1);
                None
            }
            (true, 0x8) => Some(u64::from(registers.get32(0x8))),
            (false, 0xc) => Some(0xabcd),
            _ => None,
        });
        assert_eq!(mmio.read32(0x4), 0);
        mmio.write32(0x0, 7);
        mmio.write32(0x8, 7);
        assert_eq!(
            (mmio.read32(0x0), mmio.read32(0x4), mmio.read32(0x8), mmio.read32(0xc)),
            (7, 1, 0, 0xabcd)
        );
        assert_eq!(mmio.take_writes(), [(0x0, 7), (0x8, 7)]);
    }
}
