//! What a server offers: one PCI function, behind a trait.

use std::os::fd::OwnedFd;

use super::error::Refusal;
use super::pci;

/// One PCI function. Every method is called from [`Connection::pump`](super::Connection::pump), in the caller's thread.
///
/// The connection has checked what the protocol says: a region access lies inside the region and the region allows it, an
/// interrupt range lies inside its index, a map overlaps no other, an unmap names one whole map.
pub trait Function {
    /// How many regions and interrupt indexes there are. The default is a PCI function that can be reset.
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { regions: pci::REGIONS, irqs: pci::IRQS, pci: true, reset: true }
    }

    /// Size and permissions of a region; `index` is below [`DeviceInfo::regions`]. [`RegionInfo::ABSENT`] when there is none.
    fn region(&self, index: u32) -> RegionInfo;

    /// Count and abilities of an interrupt index; `index` is below [`DeviceInfo::irqs`].
    fn irq(&self, index: u32) -> IrqInfo;

    /// Reads from a region, of any size (0 excepted) and alignment. `data` is zero on entry.
    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]);

    /// Writes to a region, of any size (0 excepted) and alignment.
    fn write(&mut self, region: u32, offset: u64, data: &[u8]);

    /// Sets, clears, masks, unmasks or triggers interrupts.
    fn set_irqs(&mut self, request: SetIrqs) -> Result<(), Refusal>;

    /// The client shares memory.
    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refusal>;

    /// The client takes shared memory back. When this returns, nothing may touch the range any more.
    fn dma_unmap(&mut self, unmap: DmaUnmap) -> Result<(), Refusal>;

    /// Resets the function. Only called when [`DeviceInfo::reset`] is set.
    fn reset(&mut self);
}

/// Answer to DEVICE_GET_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number of regions; QEMU wants at least 9 of a PCI device.
    pub regions: u32,
    /// Number of interrupt indexes; QEMU wants at least 3 of a PCI device.
    pub irqs: u32,
    /// It is a PCI device; the protocol knows no other.
    pub pci: bool,
    /// DEVICE_RESET works.
    pub reset: bool,
}

/// Answer to DEVICE_GET_REGION_INFO. Regions are never mappable: every access is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Bytes; 0 for a region that does not exist.
    pub size: u64,
    /// The client may read.
    pub read: bool,
    /// The client may write.
    pub write: bool,
}

impl RegionInfo {
    /// A region the function does not have.
    pub const ABSENT: Self = Self { size: 0, read: false, write: false };

    /// A region of `size` bytes that can be read and written.
    pub const fn read_write(size: u64) -> Self {
        Self { size, read: true, write: true }
    }
}

/// Answer to DEVICE_GET_IRQ_INFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Interrupts of this index; 0 when there are none.
    pub count: u32,
    /// Eventfds can be set.
    pub eventfd: bool,
    /// Mask and unmask are supported.
    pub maskable: bool,
    /// Masks itself when it fires, until the client unmasks it (INTx).
    pub automasked: bool,
    /// The set cannot grow without disabling the index first.
    pub noresize: bool,
}

impl IrqInfo {
    /// An index without interrupts.
    pub const ABSENT: Self =
        Self { count: 0, eventfd: false, maskable: false, automasked: false, noresize: false };
    /// The level-triggered INTA.
    pub const INTX: Self =
        Self { count: 1, eventfd: true, maskable: true, automasked: true, noresize: false };

    /// `count` message interrupts (MSI or MSI-X).
    pub const fn messages(count: u32) -> Self {
        Self { count, eventfd: true, maskable: false, automasked: false, noresize: true }
    }
}

/// DEVICE_SET_IRQS: `action` on interrupts `start .. start + count` of `index`.
#[derive(Debug)]
pub struct SetIrqs {
    /// Interrupt index, see [`pci`].
    pub index: u32,
    /// First interrupt.
    pub start: u32,
    /// Interrupts; inside the index. 0 only for [`SetIrqs::disables_all`].
    pub count: u32,
    /// What to do.
    pub action: IrqAction,
    /// To which of them, or with which descriptors.
    pub data: IrqData,
}

impl SetIrqs {
    /// The special case "trigger, no data, count 0": forget every descriptor of the index.
    pub fn disables_all(&self) -> bool {
        self.count == 0
    }
}

/// What DEVICE_SET_IRQS does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask; with descriptors, the descriptors to signal when the guest masks.
    Mask,
    /// Unmask; with descriptors, the descriptors to signal when the guest unmasks.
    Unmask,
    /// Fire; with descriptors, the descriptors to signal when the device fires.
    Trigger,
}

/// The data of DEVICE_SET_IRQS.
#[derive(Debug)]
pub enum IrqData {
    /// All interrupts of the range.
    None,
    /// One flag per interrupt of the range.
    Bool(Vec<bool>),
    /// One eventfd per interrupt of the range, or none at all: forget the ones set before.
    Eventfds(Vec<OwnedFd>),
}

/// DMA_MAP: the client's memory `iova .. iova + size`.
#[derive(Debug)]
pub struct DmaMap {
    /// First DMA address.
    pub iova: u64,
    /// Bytes; not 0, and `iova + size - 1` does not overflow.
    pub size: u64,
    /// Where the range starts in `fd`; `offset + size` does not overflow.
    pub offset: u64,
    /// The device may read.
    pub readable: bool,
    /// The device may write.
    pub writable: bool,
    /// The memory itself, to be mapped. Without it the range can only be reached by DMA_READ and DMA_WRITE.
    pub fd: Option<OwnedFd>,
}

/// DMA_UNMAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaUnmap {
    /// One map, exactly as [`Function::dma_map`] was given it.
    Range {
        /// First DMA address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// Every map there is.
    All,
}
