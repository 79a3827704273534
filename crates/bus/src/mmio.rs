//! Register windows: what a CPU access to a device becomes.

use std::sync::{Arc, Mutex, PoisonError};

use crate::memory::BusError;

/// A device's register window. Any offset, size and alignment may arrive; the answer is a value or a bus error,
/// never a panic.
pub trait Mmio: Send + Sync {
    /// Reads `data.len()` bytes at `offset` from the window's start.
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError>;
    /// Writes `data` at `offset`.
    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError>;

    /// A 32-bit read.
    fn read32(&self, offset: u64) -> Result<u32, BusError> {
        let mut b = [0; 4];
        self.mmio_read(offset, &mut b)?;
        Ok(u32::from_le_bytes(b))
    }
    /// A 64-bit read.
    fn read64(&self, offset: u64) -> Result<u64, BusError> {
        let mut b = [0; 8];
        self.mmio_read(offset, &mut b)?;
        Ok(u64::from_le_bytes(b))
    }
    /// A 32-bit write.
    fn write32(&self, offset: u64, value: u32) -> Result<(), BusError> {
        self.mmio_write(offset, &value.to_le_bytes())
    }
    /// A 64-bit write.
    fn write64(&self, offset: u64, value: u64) -> Result<(), BusError> {
        self.mmio_write(offset, &value.to_le_bytes())
    }
}

/// The registers of a device that only takes 32-bit accesses: what most engines implement.
pub trait Registers32: Send {
    /// Reads the register at `offset` (a multiple of 4).
    fn read(&mut self, offset: u32) -> Result<u32, BusError>;
    /// Writes the register at `offset` (a multiple of 4).
    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError>;
}

/// A device shared between the CPU side (registers) and the board (steps).
pub type Shared<T> = Arc<Mutex<T>>;

impl<T: Registers32> Mmio for Mutex<T> {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        let (offset, 4) = (word_offset(offset)?, data.len()) else { return Err(BusError::Slave) };
        let value = self.lock().unwrap_or_else(PoisonError::into_inner).read(offset)?;
        data.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }
    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        let offset = word_offset(offset)?;
        let Ok(bytes) = data.try_into() else { return Err(BusError::Slave) };
        self.lock().unwrap_or_else(PoisonError::into_inner).write(offset, u32::from_le_bytes(bytes))
    }
}

fn word_offset(offset: u64) -> Result<u32, BusError> {
    u32::try_from(offset).ok().filter(|o| o % 4 == 0).ok_or(BusError::Slave)
}
