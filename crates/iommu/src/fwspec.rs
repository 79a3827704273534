//! Which streams a device has, from the cells of a device tree (bindings `iommu.txt`, `arm,smmu.yaml`).

use alloc::vec::Vec;

use portcullis_drivers::ops::StreamMatch;
use thiserror::Error;

/// A device's streams at one IOMMU (Linux `iommu_fwspec`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FwSpec {
    /// In the order of the property.
    pub streams: Vec<StreamMatch>,
}

/// Cells that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FwSpecError {
    /// `#iommu-cells` is neither 1 nor 2.
    #[error("#iommu-cells = <{cells}>: an Arm SMMU has 1 (stream id) or 2 (stream id and mask)")]
    IommuCells {
        /// Its value.
        cells: u32,
    },
    /// An entry is cut off.
    #[error("{count} cells are not a multiple of #iommu-cells = <{cells}>")]
    Truncated {
        /// Cells there are.
        count: usize,
        /// Cells per entry.
        cells: u32,
    },
    /// `mmu-masters` names a node that is not there.
    #[error("mmu-masters: phandle {phandle:#x} names no node with #stream-id-cells")]
    UnknownMaster {
        /// The phandle.
        phandle: u32,
    },
    /// `mmu-masters` ends inside of an entry.
    #[error(
        "mmu-masters: the entry for phandle {phandle:#x} needs {needed} stream ids (#stream-id-cells), {there} are left"
    )]
    TruncatedMaster {
        /// The phandle.
        phandle: u32,
        /// `#stream-id-cells`.
        needed: u32,
        /// Cells left.
        there: usize,
    },
}

impl FwSpec {
    /// From the cells of `iommus` that follow the phandle of one IOMMU; several entries for the same IOMMU one after
    /// the other. With one cell per entry, `stream_match_mask` (a property of the IOMMU) is the mask of each.
    pub fn from_cells(
        cells: &[u32],
        iommu_cells: u32,
        stream_match_mask: Option<u32>,
    ) -> Result<Self, FwSpecError> {
        let entry = match iommu_cells {
            1 | 2 => iommu_cells as usize,
            cells => return Err(FwSpecError::IommuCells { cells }),
        };
        let entries = cells.chunks_exact(entry);
        if !entries.remainder().is_empty() {
            return Err(FwSpecError::Truncated { count: cells.len(), cells: iommu_cells });
        }
        let default = stream_match_mask.unwrap_or(0);
        let stream = |entry: &[u32]| match *entry {
            [id] => Some(StreamMatch::masked(id, default)),
            [id, mask] => Some(StreamMatch::masked(id, mask)),
            _ => None,
        };
        Ok(Self { streams: entries.filter_map(stream).collect() })
    }

    /// Adds the streams of another entry for the same IOMMU.
    pub fn extend(&mut self, other: &Self) {
        self.streams.extend_from_slice(&other.streams);
    }

    /// From the legacy `mmu-masters` of an IOMMU: a list of a phandle and as many stream ids as that node's
    /// `#stream-id-cells` says, which `stream_id_cells` looks up. Gives (phandle, streams) in order.
    pub fn from_mmu_masters(
        cells: &[u32],
        stream_id_cells: impl Fn(u32) -> Option<u32>,
    ) -> Result<Vec<(u32, Self)>, FwSpecError> {
        let mut masters = Vec::new();
        let mut rest = cells;
        while let Some((&phandle, after)) = rest.split_first() {
            let needed = stream_id_cells(phandle).ok_or(FwSpecError::UnknownMaster { phandle })?;
            let Some((ids, left)) = after.split_at_checked(needed as usize) else {
                return Err(FwSpecError::TruncatedMaster { phandle, needed, there: after.len() });
            };
            let streams = ids.iter().copied().map(StreamMatch::exact).collect();
            masters.push((phandle, Self { streams }));
            rest = left;
        }
        Ok(masters)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn iommus_with_one_and_two_cells() {
        let spec = FwSpec::from_cells(&[0xe80, 0xe81], 1, None).unwrap();
        assert_eq!(spec.streams, [StreamMatch::exact(0xe80), StreamMatch::exact(0xe81)]);
        let spec = FwSpec::from_cells(&[0x200, 0x3f], 2, Some(0xff)).unwrap();
        assert_eq!(spec.streams, [StreamMatch::masked(0x200, 0x3f)]);
        let spec = FwSpec::from_cells(&[0x868], 1, Some(0x7)).unwrap();
        assert_eq!(spec.streams, [StreamMatch::masked(0x868, 0x7)]);
    }

    #[test]
    fn senseless_cells_are_named() {
        assert_eq!(FwSpec::from_cells(&[1], 3, None), Err(FwSpecError::IommuCells { cells: 3 }));
        assert_eq!(FwSpec::from_cells(&[1], 0, None), Err(FwSpecError::IommuCells { cells: 0 }));
        assert_eq!(
            FwSpec::from_cells(&[1, 2, 3], 2, None),
            Err(FwSpecError::Truncated { count: 3, cells: 2 })
        );
    }

    #[test]
    fn legacy_masters() {
        // As in the thesis: several DMA channels, each with one stream.
        let count = |phandle| match phandle {
            0x10 => Some(1),
            0x11 => Some(2),
            _ => None,
        };
        let masters = FwSpec::from_mmu_masters(&[0x10, 0x14e8, 0x11, 0x868, 0x869], count).unwrap();
        let exact = StreamMatch::exact;
        let expected = vec![
            (0x10, FwSpec { streams: vec![exact(0x14e8)] }),
            (0x11, FwSpec { streams: vec![exact(0x868), exact(0x869)] }),
        ];
        assert_eq!(masters, expected);
        let unknown = FwSpec::from_mmu_masters(&[0x12, 1], count);
        assert_eq!(unknown, Err(FwSpecError::UnknownMaster { phandle: 0x12 }));
        let short = FwSpec::from_mmu_masters(&[0x11, 1], count);
        assert_eq!(short, Err(FwSpecError::TruncatedMaster { phandle: 0x11, needed: 2, there: 1 }));
    }
}
