//! The areas of an address space, its tables and groups, and the questions about them that need no hardware.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::Iova;
use portcullis_iommu::{Domain, GroupId, InstanceId, Prot, ReservedRegion};

use super::IoasError;
use crate::HostRange;
use crate::ranges::Counted;

pub(super) struct Slot {
    pub last: u64,
    pub prot: Prot,
    pub memory: Arc<[HostRange]>,
    /// On its way in or out.
    pub moving: bool,
}

pub(super) struct Table {
    pub instance: InstanceId,
    pub domain: Arc<Domain>,
}

#[derive(Default)]
pub(super) struct State {
    pub areas: BTreeMap<u64, Slot>,
    pub pinned: Counted,
    pub tables: Vec<Table>,
    pub groups: Vec<(GroupId, InstanceId, Vec<ReservedRegion>)>,
    /// Maps and unmaps under way.
    pub working: usize,
    pub attaching: bool,
    pub closed: bool,
    /// An IOMMU did not confirm: what is pinned stays so.
    pub tainted: bool,
}

impl State {
    pub fn ready(&self) -> Result<(), IoasError> {
        match (self.closed, self.attaching) {
            (true, _) => Err(IoasError::Closed),
            (_, true) => Err(IoasError::Busy),
            _ => Ok(()),
        }
    }

    pub fn overlapping(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        let below = self.areas.range(..=last).next_back()?;
        (below.1.last >= first).then_some((*below.0, below.1.last))
    }

    pub fn reserved(&self, first: u64, last: u64) -> Option<ReservedRegion> {
        let regions = self.groups.iter().flat_map(|(_, _, regions)| regions);
        regions.copied().find(|region| {
            region.len > 0 && region.start.get() <= last && first <= region.end().saturating_sub(1)
        })
    }

    pub fn domains(&self) -> Vec<Arc<Domain>> {
        self.tables.iter().map(|table| table.domain.clone()).collect()
    }

    /// What all tables translate.
    pub fn aperture(&self) -> (u64, u64) {
        let ranges = self.tables.iter().filter_map(|table| table.domain.input_range());
        ranges
            .fold((0, u64::MAX), |(first, last), (start, end)| (first.max(start.get()), last.min(end.get())))
    }

    /// The page size that suits all tables; 4 KiB before there is one.
    pub fn page(&self) -> u64 {
        let smallest = |table: &Table| 1u64.checked_shl(table.domain.ops().page_sizes().trailing_zeros());
        self.tables.iter().filter_map(smallest).max().unwrap_or(0x1000)
    }

    pub fn check(&self, first: u64, last: u64) -> Result<(), IoasError> {
        let (start, end) = self.aperture();
        let (first, last) = (Iova(first), Iova(last));
        if first.get() < start || last.get() > end {
            return Err(IoasError::Aperture { first, last, start: Iova(start), end: Iova(end) });
        }
        if let Some((there, its_last)) = self.overlapping(first.get(), last.get()) {
            let (there_first, there_last) = (Iova(there), Iova(its_last));
            return Err(IoasError::Exists { first, last, there_first, there_last });
        }
        match self.reserved(first.get(), last.get()) {
            None => Ok(()),
            Some(ReservedRegion { start, len, kind, .. }) => {
                Err(IoasError::Reserved { first, last, start, len, kind })
            }
        }
    }

    /// A free stretch of `len` bytes, from `align` (never 0) up.
    pub fn free(&self, len: u64, align: u64) -> Result<u64, IoasError> {
        let no_room = IoasError::NoRoom { len };
        let (start, end) = self.aperture();
        let up = |at: u64| at.checked_next_multiple_of(align);
        let mut at = up(start.max(1)).ok_or(no_room.clone())?;
        loop {
            let last = at.checked_add(len - 1).filter(|last| *last <= end).ok_or(no_room.clone())?;
            let area = self.overlapping(at, last).map(|(_, last)| last);
            let region = self.reserved(at, last).map(|region| region.end().saturating_sub(1));
            let Some(behind) = area.max(region) else { return Ok(at) };
            at = behind.checked_add(1).and_then(up).ok_or(no_room.clone())?;
        }
    }
}
