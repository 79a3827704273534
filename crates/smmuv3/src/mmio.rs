//! Register accesses.

use std::sync::Arc;
use std::time::Duration;

use portcullis_bus::{BusError, Memory, Mmio};

use crate::model::SmmuV3;
use crate::registers::{self, WINDOW};

/// The register window, both pages, as software of one security state sees it.
pub struct Window<M> {
    smmu: Arc<SmmuV3<M>>,
    secure: bool,
}

impl<M: Memory> Window<M> {
    pub(crate) fn new(smmu: Arc<SmmuV3<M>>, secure: bool) -> Self {
        Self { smmu, secure }
    }

    /// Bytes of the window.
    pub const SIZE: u64 = WINDOW;
}

impl<M: Memory> Mmio for Window<M> {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        self.smmu.access_read(self.secure, offset, data)
    }
    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        self.smmu.access_write(self.secure, offset, data)
    }
}

impl<M: Memory> SmmuV3<M> {
    /// Reads `data.len()` bytes at `offset` of the register window, as non-secure software. What no register answers reads
    /// as zero.
    ///
    /// # Errors
    /// The offset is outside of the window.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        self.access_read(false, offset, data)
    }

    /// Writes `data` at `offset` of the register window, as non-secure software. Commands that this lets the SMMU see run
    /// before it returns, as far as they can.
    ///
    /// # Errors
    /// The offset is outside of the window.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        self.access_write(false, offset, data)
    }

    fn access_read(&self, secure: bool, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        data.fill(0);
        if offset >= WINDOW {
            return Err(BusError::Decode);
        }
        let live = self.drive(self.lock(), Duration::ZERO);
        let Some(place) = registers::place(&self.caps, offset, data.len(), secure) else { return Ok(()) };
        let value = registers::value(&self.caps, &live.regs, place) >> place.shift;
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn access_write(&self, secure: bool, offset: u64, data: &[u8]) -> Result<(), BusError> {
        if offset >= WINDOW {
            return Err(BusError::Decode);
        }
        let mut live = self.lock();
        let mut operation = None;
        if let Some(place) = registers::place(&self.caps, offset, data.len(), secure) {
            let mut bytes = [0; 8];
            bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            let given = u64::from_le_bytes(bytes);
            // A half of a 64-bit register leaves the other half as it is.
            let value = if place.wide && data.len() == 4 {
                let old = registers::value(&self.caps, &live.regs, place);
                old & !(u64::from(u32::MAX) << place.shift) | given << place.shift
            } else {
                given
            };
            let effects = registers::write(&self.caps, &mut live.regs, place, value);
            self.apply(&mut live, place.side, effects);
            operation = effects.operation.then_some(place.side);
        }
        drop(self.drive(live, PATIENCE));
        if let Some(side) = operation {
            self.operate(side);
        }
        Ok(())
    }
}

/// How long a write waits for running accesses before it leaves the rest for later.
const PATIENCE: Duration = Duration::from_millis(250);
