//! Ranges of a device's addresses that are not free for use (Linux `iommu_resv_region`).

use alloc::vec::Vec;

use portcullis_arch::Iova;

use crate::Prot;

/// Why a range is reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReservedKind {
    /// Firmware or the device itself uses it: must be mapped one to one before any attach, and forbids blocking.
    Direct,
    /// As direct, but the owner of the device may give it up: mapped in its default domain only.
    DirectRelaxable,
    /// Must not be mapped: the address does not reach the IOMMU.
    Reserved,
    /// Hardware takes writes there as interrupts.
    Msi,
    /// Where software maps the doorbell for interrupts.
    SoftwareMsi,
}

/// A reserved range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// First address.
    pub start: Iova,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub kind: ReservedKind,
    /// How direct regions are mapped.
    pub prot: Prot,
}

/// The window that Linux keeps for interrupts behind every Arm SMMU.
pub const SOFTWARE_MSI: ReservedRegion = ReservedRegion {
    start: Iova(0x0800_0000),
    len: 0x10_0000,
    kind: ReservedKind::SoftwareMsi,
    prot: Prot::WRITE.noexec().device(),
};

impl ReservedRegion {
    /// A range that must be mapped one to one.
    pub const fn direct(start: Iova, len: u64, prot: Prot) -> Self {
        Self { start, len, kind: ReservedKind::Direct, prot }
    }

    /// First address behind it; the end of the address space if there is none.
    pub const fn end(&self) -> u64 {
        self.start.get().saturating_add(self.len)
    }

    /// True if it has an address of `[iova, iova + len)`.
    pub const fn overlaps(&self, iova: Iova, len: u64) -> bool {
        iova.get() < self.end() && self.start.get() < iova.get().saturating_add(len)
    }
}

/// Sorts by start, then kind; regions of one kind (and protection) that overlap or touch become one (Linux
/// `iommu_insert_resv_region`).
pub fn merge(regions: impl IntoIterator<Item = ReservedRegion>) -> Vec<ReservedRegion> {
    let mut all: Vec<ReservedRegion> = regions.into_iter().collect();
    all.sort_by_key(|region| (region.start, region.kind));
    let mut merged: Vec<ReservedRegion> = Vec::with_capacity(all.len());
    for region in all {
        let joins = |other: &&mut ReservedRegion| {
            other.kind == region.kind && other.prot == region.prot && region.start.get() <= other.end()
        };
        match merged.iter_mut().rev().find(joins) {
            Some(other) => other.len = other.end().max(region.end()) - other.start.get(),
            None => merged.push(region),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_one_kind_merge_and_others_stay_apart() {
        let region = |start, len, kind| ReservedRegion { start: Iova(start), len, kind, prot: Prot::RW };
        use ReservedKind::{Direct, Reserved};
        let merged = merge([
            region(0x3000, 0x1000, Direct),
            region(0x1000, 0x1000, Direct),
            region(0x1800, 0x1000, Reserved),
            region(0x2000, 0x1000, Direct),
            region(0x8000, 0x1000, Direct),
        ]);
        let expected = [
            region(0x1000, 0x3000, Direct),
            region(0x1800, 0x1000, Reserved),
            region(0x8000, 0x1000, Direct),
        ];
        assert_eq!(merged, expected);
        assert!(merged[0].overlaps(Iova(0x3fff), 1) && !merged[0].overlaps(Iova(0x4000), 1));
    }
}
