//! Single buffers, and registers of other devices.

use core::panic::Location;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::IommuError;
use portcullis_hal::DmaMemory;

use super::bounce::Overrun;
use super::debug::Owner;
use super::device::Inner;
use super::space::{Part, ReleaseError};
use super::{Direction, DmaAttrs, DmaError, MappingKind, SgEntry};
use crate::Prot;

/// The place in the driver that called.
pub(super) type Place = &'static Location<'static>;

impl<M: DmaMemory + Clone> Inner<M> {
    /// Maps a buffer; `part` is `None` for a device without an IOMMU.
    #[inline]
    pub fn map_buffer(
        &self,
        part: Option<&mut impl Part>,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<Iova, DmaError> {
        if self.plain && len != 0 && pa.checked_add(len).is_some() {
            return self.place(part, pa, len, self.prot(direction, attrs));
        }
        self.map_noted(part, pa, len, direction, attrs, at)
    }

    #[inline(never)]
    fn map_noted(
        &self,
        part: Option<&mut impl Part>,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<Iova, DmaError> {
        let iova = self.map_unnoted(part, pa, len, direction, attrs)?;
        if let Some(ledger) = &self.ledger {
            ledger.mapped(MappingKind::Single, iova, len, Some(direction), &[SgEntry { pa, len }], at);
        }
        Ok(iova)
    }

    /// The same without the debug mode's knowledge.
    pub fn map_unnoted(
        &self,
        part: Option<&mut impl Part>,
        pa: Pa,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<Iova, DmaError> {
        if len == 0 || pa.checked_add(len).is_none() {
            return Err(self.no_buffer(pa, len));
        }
        if self.must_bounce(pa, len, direction) {
            return self.map_bounced(part, pa, len, direction, attrs);
        }
        if !self.config.coherent && !attrs.skip_cpu_sync {
            self.clean(pa, len);
        }
        self.place(part, pa, len, self.prot(direction, attrs))
    }

    /// Gives memory an address that the device can use.
    #[inline(always)]
    pub fn place(
        &self,
        part: Option<&mut impl Part>,
        pa: Pa,
        len: u64,
        prot: Prot,
    ) -> Result<Iova, DmaError> {
        let Some(part) = part else {
            self.memory.wmb();
            return self.direct_address(pa, len, self.mask_bits());
        };
        let (offset, size) = part.space().pages(pa.get(), len).ok_or_else(|| self.no_buffer(pa, len))?;
        let base = self.addresses(part, size, self.limit())?;
        let page = Pa(pa.get() - offset);
        if let Err(error) = part.space().ops.map(base, page, size, prot) {
            return Err(self.not_placed(part, base, page, size, error));
        }
        Ok(base.wrapping_add(offset))
    }

    #[cold]
    #[inline(never)]
    fn not_placed(&self, part: &mut impl Part, iova: Iova, pa: Pa, len: u64, error: IommuError) -> DmaError {
        // All or nothing: nobody has seen the address, and it is given back as it came.
        let _taken_back = part.free(iova, len);
        DmaError::Map { device: self.name.clone(), iova, pa, len, error }
    }

    /// Takes the address of memory back.
    #[inline(always)]
    pub fn displace(
        &self,
        part: Option<&mut impl Part>,
        iova: Iova,
        len: u64,
        strict: bool,
    ) -> Result<(), DmaError> {
        let Some(part) = part else { return Ok(()) };
        let (offset, size) = part.space().pages(iova.get(), len).ok_or_else(|| self.not_mapped(iova, len))?;
        let base = Iova(iova.get() - offset);
        part.release(base, size, strict || self.config.untrusted)
            .map_err(|error| self.not_displaced(iova, len, error))
    }

    #[cold]
    #[inline(never)]
    fn not_displaced(&self, iova: Iova, len: u64, error: ReleaseError) -> DmaError {
        match error {
            ReleaseError::Nothing => self.not_mapped(iova, len),
            ReleaseError::Iova(error) => self.iova_error(error),
            ReleaseError::Iommu(error) => DmaError::Unmap { device: self.name.clone(), iova, len, error },
        }
    }

    /// Unmaps a buffer.
    #[inline]
    pub fn unmap_buffer(
        &self,
        part: Option<&mut impl Part>,
        iova: Iova,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<(), DmaError> {
        if self.plain {
            return self.displace(part, iova, len, false);
        }
        self.unmap_noted(part, iova, len, direction, attrs, at)
    }

    #[inline(never)]
    fn unmap_noted(
        &self,
        part: Option<&mut impl Part>,
        iova: Iova,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<(), DmaError> {
        let len = match &self.ledger {
            Some(ledger) => ledger.unmapped(MappingKind::Single, iova, len, Some(direction), at)?,
            None => len,
        };
        self.unmap_unnoted(part, iova, len, direction, attrs)
    }

    /// The same without the debug mode's knowledge.
    pub fn unmap_unnoted(
        &self,
        part: Option<&mut impl Part>,
        iova: Iova,
        len: u64,
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(), DmaError> {
        if self.bounce.in_use()
            && let Some(slot) = self.bounce.take(iova)
        {
            return self.unmap_bounced(part, slot, iova, direction, attrs);
        }
        if self.config.coherent || attrs.skip_cpu_sync || !direction.device_writes() {
            return self.displace(part, iova, len, false);
        }
        let pa = self.memory_at(iova, len)?;
        self.displace(part, iova, len, false)?;
        // After the unmap: what the device still wrote until then is read as well.
        self.invalidate(pa, len);
        Ok(())
    }

    /// The memory behind an address (Linux `iommu_iova_to_phys`).
    pub fn memory_at(&self, iova: Iova, len: u64) -> Result<Pa, DmaError> {
        match &self.space {
            Some(space) => space.domain.iova_to_phys(iova).ok_or_else(|| self.not_mapped(iova, len)),
            None => Ok(Pa(iova.get())),
        }
    }

    pub fn map_resource(&self, pa: Pa, len: u64, direction: Direction, at: Place) -> Result<Iova, DmaError> {
        if len == 0 || pa.checked_add(len).is_none() {
            return Err(self.no_buffer(pa, len));
        }
        let prot = Prot::new(direction.device_reads(), direction.device_writes()).device();
        let iova = self.place(self.part().as_mut(), pa, len, prot)?;
        if let Some(ledger) = &self.ledger {
            ledger.mapped(MappingKind::Resource, iova, len, Some(direction), &[], at);
        }
        Ok(iova)
    }

    pub fn unmap_resource(
        &self,
        iova: Iova,
        len: u64,
        direction: Direction,
        at: Place,
    ) -> Result<(), DmaError> {
        let len = match &self.ledger {
            Some(ledger) => ledger.unmapped(MappingKind::Resource, iova, len, Some(direction), at)?,
            None => len,
        };
        self.displace(self.part().as_mut(), iova, len, false)
    }

    pub fn sync_single(
        &self,
        iova: Iova,
        len: u64,
        direction: Direction,
        for_cpu: bool,
        at: Place,
    ) -> Result<(), DmaError> {
        if let Some(ledger) = &self.ledger {
            ledger.synced(iova, len, direction, if for_cpu { Owner::Cpu } else { Owner::Device }, at)?;
        }
        self.sync_unnoted(iova, len, direction, for_cpu)
    }

    /// The same without the debug mode's knowledge.
    pub fn sync_unnoted(
        &self,
        iova: Iova,
        len: u64,
        direction: Direction,
        for_cpu: bool,
    ) -> Result<(), DmaError> {
        let bounced = self.bounce.find(iova, len).map_err(|Overrun| self.not_mapped(iova, len))?;
        if for_cpu {
            if !direction.device_writes() {
                return Ok(());
            }
            if let Some((original, slot)) = bounced {
                // Cache first: the copy reads what the device wrote.
                self.invalidate(slot, len);
                self.copy(slot, original, len);
            } else if !self.config.coherent {
                self.invalidate(self.memory_at(iova, len)?, len);
            }
        } else if let Some((original, slot)) = bounced {
            // Copy first: the device then sees it in memory.
            if direction.device_reads() {
                self.copy(original, slot, len);
            }
            self.clean(slot, len);
        } else if !self.config.coherent {
            self.clean(self.memory_at(iova, len)?, len);
        } else {
            self.memory.wmb();
        }
        Ok(())
    }

    #[cold]
    pub fn not_mapped(&self, iova: Iova, len: u64) -> DmaError {
        DmaError::NotMapped { device: self.name.clone(), iova, len }
    }
}
