//! IOU_SLCR.IOU_INTERCONNECT_ROUTE: which way the network and storage devices of a Zynq UltraScale+ take to memory.
//!
//! Each of eight masters has a bit. Set, its transactions take the coherent route, which passes the SMMU; clear, the direct
//! one, which does not. Boot firmware decides; out of reset the direct route is taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use portcullis_arch::{Iova, Pa};
use portcullis_bus::dma::CopyError;
use portcullis_bus::{BusError, DmaError, DmaPort, Initiator, Mmio, StallState, StallTag};

/// Where IOU_SLCR is.
pub const IOU_SLCR: Pa = Pa(0xff18_0000);
/// Bytes of its window.
pub const IOU_SLCR_SIZE: u64 = 0x1000;
/// The register's offset.
pub const ROUTE: u64 = 0x408;
/// GEM0 to GEM3, SD0, SD1, QSPI, NAND.
const IMPLEMENTED: u32 = 0xff;

/// The register. Every other offset of IOU_SLCR reads 0 and ignores writes.
#[derive(Debug, Default)]
pub struct IouRoute(AtomicU32);

impl IouRoute {
    /// The register's value.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}

impl Mmio for IouRoute {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        if data.len() != 4 || !offset.is_multiple_of(4) {
            return Err(BusError::Slave);
        }
        let value = if offset == ROUTE { self.get() } else { 0 };
        data.copy_from_slice(&value.to_le_bytes());
        Ok(())
    }
    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        let bytes: [u8; 4] = data.try_into().map_err(|_| BusError::Slave)?;
        if !offset.is_multiple_of(4) {
            return Err(BusError::Slave);
        }
        if offset == ROUTE {
            self.0.store(u32::from_le_bytes(bytes) & IMPLEMENTED, Ordering::Release);
        }
        Ok(())
    }
}

/// A port with two ways, of which a bit of the register chooses one for each transaction.
pub struct RoutedPort {
    pub route: Arc<IouRoute>,
    pub bit: u8,
    /// Through the SMMU.
    pub coherent: Box<dyn DmaPort>,
    /// Past it.
    pub direct: Box<dyn DmaPort>,
}

impl RoutedPort {
    fn way(&mut self) -> &mut dyn DmaPort {
        let set = self.route.get().checked_shr(self.bit.into()).unwrap_or(0) & 1 != 0;
        if set { &mut *self.coherent } else { &mut *self.direct }
    }
}

impl DmaPort for RoutedPort {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.way().read(from, addr, buf)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.way().write(from, addr, buf)
    }
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        self.way().copy(src, dst, len)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        // Only the SMMU stalls, and what it stalled it answers, whatever the register says now.
        self.coherent.stall_state(tag)
    }
}
