//! What a driver holds of the DMA API: [`DmaDevice`].

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::panic::Location;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use portcullis_arch::{Iova, Pa};
use portcullis_hal::DmaMemory;

use super::bounce::BouncePool;
use super::config::last_of;
use super::debug::Ledger;
use super::report::{DmaReport, FaultStory};
use super::space::Part;
use super::{Coherent, DeviceConfig, Direction, DmaAttrs, DmaError, DmaSpace, SgEntry, SgMapping};
use crate::Prot;
use crate::iova::{IovaError, Preference};

/// A device, as the DMA API knows it. Clones are handles to the same one.
///
/// ```
/// use std::sync::Arc;
///
/// use portcullis_arch::{Iova, Pa};
/// use portcullis_hal::{DmaMemory, fake::FakeMemory};
/// use portcullis_iommu::dma::{DeviceConfig, Direction, DmaAttrs, DmaDevice};
///
/// let memory = Arc::new(FakeMemory::non_coherent(0x8000_0000, 1 << 20));
/// let device = DmaDevice::direct("a0000000.dma", memory.clone(), DeviceConfig::default());
/// let buffer = memory.alloc(0x1000, 0x1000).unwrap();
/// memory.write(buffer.pa, b"to the device");
/// let address = device.map_single(buffer.pa, 0x1000, Direction::ToDevice, DmaAttrs::NONE)?;
/// assert_eq!(address, Iova(buffer.pa.get())); // no IOMMU
/// device.unmap_single(address, 0x1000, Direction::ToDevice, DmaAttrs::NONE)?;
/// # Ok::<(), portcullis_iommu::dma::DmaError>(())
/// ```
pub struct DmaDevice<M: DmaMemory + Clone> {
    pub(super) inner: Arc<Inner<M>>,
}

pub(super) struct Inner<M: DmaMemory + Clone> {
    pub name: Arc<str>,
    pub memory: M,
    pub config: DeviceConfig,
    pub space: Option<Arc<DmaSpace>>,
    /// It snoops, is trusted, and is not watched: a mapping is nothing but an address.
    pub plain: bool,
    mask_bits: AtomicU8,
    /// The last address of streaming mappings: what `mask_bits` and the space say.
    limit: AtomicU64,
    coherent_mask_bits: AtomicU8,
    preference: Preference,
    pub bounce: BouncePool,
    pub ledger: Option<Ledger>,
    /// Bytes of memory that cannot be freed, because the device may still reach them.
    pub kept: AtomicU64,
}

impl<M: DmaMemory + Clone> Clone for DmaDevice<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<M: DmaMemory + Clone> DmaDevice<M> {
    /// A device whose accesses the domain of `space` translates. `memory` is the CPU's way to its buffers.
    pub fn translated(name: &str, space: Arc<DmaSpace>, memory: M, config: DeviceConfig) -> Self {
        Self::build(name, Some(space), memory, config)
    }

    /// A device without an IOMMU, or with an identity domain: its addresses are physical.
    pub fn direct(name: &str, memory: M, config: DeviceConfig) -> Self {
        Self::build(name, None, memory, config)
    }

    fn build(name: &str, space: Option<Arc<DmaSpace>>, memory: M, config: DeviceConfig) -> Self {
        let name: Arc<str> = name.into();
        let inner = Inner {
            plain: config.coherent && !config.untrusted && !config.debug,
            limit: AtomicU64::new(limit_in(space.as_deref(), config.mask_bits)),
            ledger: config.debug.then(|| Ledger::new(name.clone())),
            name,
            memory,
            space,
            mask_bits: AtomicU8::new(config.mask_bits),
            coherent_mask_bits: AtomicU8::new(config.coherent_mask_bits),
            preference: Preference::new(config.prefer_32bit),
            bounce: BouncePool::new(config.bounce_limit),
            kept: AtomicU64::new(0),
            config,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }
    /// The space it is in; `None` if its addresses are physical.
    pub fn space(&self) -> Option<&Arc<DmaSpace>> {
        self.inner.space.as_ref()
    }
    /// What it was made with.
    pub fn config(&self) -> &DeviceConfig {
        &self.inner.config
    }
    /// The CPU's way to its buffers.
    pub fn memory(&self) -> &M {
        &self.inner.memory
    }
    /// Whether it sees what is in the CPU's caches.
    pub fn is_coherent(&self) -> bool {
        self.inner.config.coherent
    }

    /// Says how many address bits the device drives, for streaming and coherent memory (Linux
    /// `dma_set_mask_and_coherent`).
    pub fn set_mask(&self, bits: u8) -> Result<(), DmaError> {
        self.inner.check_mask(bits)?;
        let limit = limit_in(self.inner.space.as_deref(), bits);
        self.inner.mask_bits.store(bits, Ordering::Relaxed);
        self.inner.limit.store(limit, Ordering::Relaxed);
        self.inner.coherent_mask_bits.store(bits, Ordering::Relaxed);
        Ok(())
    }

    /// The same for coherent memory only (Linux `dma_set_coherent_mask`).
    pub fn set_coherent_mask(&self, bits: u8) -> Result<(), DmaError> {
        self.inner.check_mask(bits)?;
        self.inner.coherent_mask_bits.store(bits, Ordering::Relaxed);
        Ok(())
    }

    /// Memory of the API's own that device and CPU see alike without syncs, zeroed (Linux `dma_alloc_coherent`). Whole
    /// pages; contiguous for the device.
    #[track_caller]
    pub fn alloc_coherent(&self, len: u64) -> Result<Coherent<M>, DmaError> {
        Coherent::alloc(&self.inner, len, Location::caller())
    }

    /// Makes a buffer reachable (Linux `dma_map_single`). It belongs to the device until
    /// [`unmap_single`](Self::unmap_single).
    #[track_caller]
    pub fn map_single(
        &self,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<Iova, DmaError> {
        let mut part = self.inner.part();
        self.inner.map_buffer(part.as_mut(), pa, len, direction, attrs, Location::caller())
    }

    /// Takes back a buffer, with the length and direction that it was mapped with (Linux `dma_unmap_single`). After
    /// [`DmaError::Unmap`] the device may still reach the memory.
    #[track_caller]
    pub fn unmap_single(
        &self,
        iova: Iova,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(), DmaError> {
        let mut part = self.inner.part();
        self.inner.unmap_buffer(part.as_mut(), iova, len, direction, attrs, Location::caller())
    }

    /// Makes a scatter list reachable, with as few segments as the device's limits allow (Linux `dma_map_sgtable`).
    #[track_caller]
    pub fn map_sg(
        &self,
        entries: &[SgEntry],
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<SgMapping, DmaError> {
        self.inner.map_sg(entries, direction, attrs, Location::caller())
    }

    /// Takes back a scatter list (Linux `dma_unmap_sgtable`).
    #[track_caller]
    pub fn unmap_sg(&self, sg: SgMapping, direction: Direction, attrs: DmaAttrs) -> Result<(), DmaError> {
        self.inner.unmap_sg(sg, direction, attrs, Location::caller())
    }

    /// Makes the registers of another device reachable, for peer-to-peer (Linux `dma_map_resource`).
    #[track_caller]
    pub fn map_resource(&self, pa: Pa, len: u64, direction: Direction) -> Result<Iova, DmaError> {
        self.inner.map_resource(pa, len, direction, Location::caller())
    }

    /// Takes back what [`map_resource`](Self::map_resource) gave.
    #[track_caller]
    pub fn unmap_resource(&self, iova: Iova, len: u64, direction: Direction) -> Result<(), DmaError> {
        self.inner.unmap_resource(iova, len, direction, Location::caller())
    }

    /// Lends a mapped buffer, or a part of it, to the CPU: what the device wrote can be read (Linux
    /// `dma_sync_single_for_cpu`).
    #[track_caller]
    pub fn sync_single_for_cpu(&self, iova: Iova, len: u64, direction: Direction) -> Result<(), DmaError> {
        self.inner.sync_single(iova, len, direction, true, Location::caller())
    }

    /// Gives it back to the device: what the CPU wrote can be read (Linux `dma_sync_single_for_device`).
    #[track_caller]
    pub fn sync_single_for_device(&self, iova: Iova, len: u64, direction: Direction) -> Result<(), DmaError> {
        self.inner.sync_single(iova, len, direction, false, Location::caller())
    }

    /// Lends a mapped scatter list to the CPU.
    #[track_caller]
    pub fn sync_sg_for_cpu(&self, sg: &SgMapping, direction: Direction) -> Result<(), DmaError> {
        self.inner.sync_sg(sg, direction, true, Location::caller())
    }

    /// Gives a mapped scatter list back to the device.
    #[track_caller]
    pub fn sync_sg_for_device(&self, sg: &SgMapping, direction: Direction) -> Result<(), DmaError> {
        self.inner.sync_sg(sg, direction, false, Location::caller())
    }

    /// Bytes of memory that were not freed, because an unmap failed and the device may still reach them.
    pub fn kept_bytes(&self) -> u64 {
        self.inner.kept.load(Ordering::Relaxed)
    }

    /// Bytes of bounce buffers in use.
    pub fn bounced_bytes(&self) -> u64 {
        self.inner.bounce.used()
    }
}

/// The debug mode ([`DeviceConfig::debug`]). Without it these do nothing.
impl<M: DmaMemory + Clone> DmaDevice<M> {
    /// What was found since the last time, oldest first. Panics never; at most 256 are kept.
    pub fn take_reports(&self) -> Vec<DmaReport> {
        self.inner.ledger.as_ref().map(Ledger::take).unwrap_or_default()
    }

    /// Mappings that exist now.
    pub fn mapping_count(&self) -> usize {
        self.inner.ledger.as_ref().map_or(0, Ledger::count)
    }

    /// The driver lets go of the device (Linux `dma_debug_device_change`): reports every mapping that is left, and gives
    /// their number.
    #[track_caller]
    pub fn teardown(&self) -> usize {
        self.inner.ledger.as_ref().map_or(0, |ledger| ledger.teardown(Location::caller()))
    }

    /// Says that the CPU is about to read or write memory directly. A report if the device owns it.
    #[track_caller]
    pub fn debug_cpu_access(&self, pa: Pa, len: u64, write: bool) {
        if let Some(ledger) = &self.inner.ledger {
            ledger.cpu_access(pa, len, write, Location::caller());
        }
    }

    /// Reads a buffer as a driver does, telling the debug mode.
    #[track_caller]
    pub fn read_buffer(&self, pa: Pa, buffer: &mut [u8]) {
        self.debug_cpu_access(pa, buffer.len() as u64, false);
        self.inner.memory.read(pa, buffer);
    }

    /// Writes a buffer as a driver does, telling the debug mode.
    #[track_caller]
    pub fn write_buffer(&self, pa: Pa, bytes: &[u8]) {
        self.debug_cpu_access(pa, bytes.len() as u64, true);
        self.inner.memory.write(pa, bytes);
    }

    /// What is or was mapped at an address at which the device faulted.
    pub fn explain_fault(&self, iova: Iova) -> Option<FaultStory> {
        self.inner.ledger.as_ref().map(|ledger| ledger.story(iova))
    }

    /// The same, and a report of it. For a fault handler.
    pub fn report_fault(&self, iova: Iova, write: bool) -> Option<FaultStory> {
        self.inner.ledger.as_ref().map(|ledger| ledger.fault(iova, write))
    }
}

impl<M: DmaMemory + Clone> Inner<M> {
    pub fn part(&self) -> Option<super::space::CpuPart<'_>> {
        self.space.as_deref().map(DmaSpace::cpu_part)
    }

    #[inline]
    pub fn of_space(&self, space: &Arc<DmaSpace>) -> Result<(), DmaError> {
        match &self.space {
            Some(own) if Arc::ptr_eq(own, space) => Ok(()),
            _ => Err(DmaError::OtherSpace { device: self.name.clone() }),
        }
    }

    pub fn mask_bits(&self) -> u8 {
        self.mask_bits.load(Ordering::Relaxed)
    }

    pub fn coherent_mask_bits(&self) -> u8 {
        self.coherent_mask_bits.load(Ordering::Relaxed)
    }

    fn check_mask(&self, bits: u8) -> Result<(), DmaError> {
        let first = self.space.as_ref().map_or(0xfff, |space| space.first.get());
        if last_of(bits) <= first {
            return Err(DmaError::Mask { device: self.name.clone(), bits, first });
        }
        Ok(())
    }

    /// The address that a device without an IOMMU uses.
    pub fn direct_address(&self, pa: Pa, len: u64, bits: u8) -> Result<Iova, DmaError> {
        match pa.get().checked_add(len.saturating_sub(1)) {
            Some(last) if last <= last_of(bits) => Ok(Iova(pa.get())),
            _ => Err(DmaError::BeyondMask { device: self.name.clone(), pa, len, bits }),
        }
    }

    /// The last address of coherent memory.
    pub fn coherent_limit(&self) -> u64 {
        limit_in(self.space.as_deref(), self.coherent_mask_bits())
    }

    /// The last address of streaming mappings.
    #[inline]
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Free addresses at or below a limit.
    #[inline(always)]
    pub fn addresses(&self, part: &mut impl Part, size: u64, limit: u64) -> Result<Iova, DmaError> {
        let alloc = |limit, last_try| part.alloc(size, limit, last_try);
        self.preference.alloc(Iova(limit), alloc).map_err(|error| self.iova_error(error))
    }

    #[cold]
    #[inline(never)]
    pub fn iova_error(&self, error: IovaError) -> DmaError {
        DmaError::Iova { device: self.name.clone(), error }
    }

    #[cold]
    #[inline(never)]
    pub fn no_buffer(&self, pa: Pa, len: u64) -> DmaError {
        DmaError::Length { device: self.name.clone(), pa, len }
    }

    /// Permissions of a mapping (Linux `dma_info_to_prot`).
    #[inline]
    pub fn prot(&self, direction: Direction, attrs: DmaAttrs) -> Prot {
        let mut prot = Prot::new(direction.device_reads(), direction.device_writes());
        if self.config.coherent {
            prot = prot.cached();
        }
        if attrs.privileged {
            prot = prot.privileged();
        }
        prot
    }

    /// Makes the device see what the CPU wrote. Also before the device writes: a dirty line that is evicted later would
    /// overwrite its data.
    pub fn clean(&self, pa: Pa, len: u64) {
        if !self.config.coherent {
            self.memory.clean(pa, bytes(len));
        }
        self.memory.wmb();
    }

    /// Makes the CPU see what the device wrote.
    pub fn invalidate(&self, pa: Pa, len: u64) {
        if !self.config.coherent {
            self.memory.invalidate(pa, bytes(len));
        }
    }
}

impl<M: DmaMemory + Clone> fmt::Debug for DmaDevice<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaDevice")
            .field("name", &self.inner.name)
            .field("translated", &self.inner.space.is_some())
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

/// The last address that the device drives and the space has.
fn limit_in(space: Option<&DmaSpace>, bits: u8) -> u64 {
    last_of(bits).min(space.map_or(u64::MAX, |space| space.last.get()))
}

/// A length as the memory wants it. What is longer than the address space of the CPU is not memory.
pub(super) fn bytes(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
