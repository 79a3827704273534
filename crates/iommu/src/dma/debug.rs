//! The debug mode's memory: every mapping of a device, and the last ones that are gone (Linux `kernel/dma/debug.c`).

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::{Iova, Pa};
use spin::Mutex;

use super::report::{DmaReport, FaultStory, MappingKind, Misuse, PastMapping};
use super::single::Place;
use super::{Direction, DmaError, SgEntry};

/// Mappings that are remembered after they are gone.
const PAST: usize = 1024;
/// Reports that are kept.
const REPORTS: usize = 256;
/// How far behind a mapping an access counts as running over its end.
const OVERRUN: u64 = 0x1_0000;

/// Who may touch a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    Device,
    Cpu,
}

struct Record {
    mapping: PastMapping,
    /// The memory behind it; none for what the CPU may always touch.
    memory: Vec<SgEntry>,
    owner: Owner,
}

#[derive(Default)]
struct State {
    /// By address, then by order: without an IOMMU a buffer may be mapped more than once.
    live: BTreeMap<(u64, u64), Record>,
    past: VecDeque<PastMapping>,
    reports: Vec<DmaReport>,
    next: u64,
}

pub(super) struct Ledger {
    device: Arc<str>,
    state: Mutex<State>,
}

fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    a < b.saturating_add(b_len) && b < a.saturating_add(a_len)
}

fn holds(mapping: &PastMapping, iova: Iova) -> bool {
    iova.get().checked_sub(mapping.iova.get()).is_some_and(|offset| offset < mapping.span)
}

impl State {
    /// The mapping that begins at an address; the one that fits best, if there are several.
    fn best(&self, kind: MappingKind, iova: Iova, len: u64, direction: Option<Direction>) -> Option<u64> {
        let score = |record: &Record| {
            let mapping = &record.mapping;
            (mapping.kind == kind, mapping.len == len, mapping.direction == direction)
        };
        let here = self.live.range((iova.get(), 0)..=(iova.get(), u64::MAX));
        here.max_by_key(|(_, record)| score(record)).map(|((_, number), _)| *number)
    }

    /// The mapping that has an address in it.
    fn holding(&self, iova: Iova) -> Option<&Record> {
        let below = self.live.range(..=(iova.get(), u64::MAX)).rev();
        // Coherent and single mappings do not overlap behind an IOMMU; without one, any will do.
        below.map(|(_, record)| record).find(|record| holds(&record.mapping, iova))
    }

    fn gone(&self, iova: Iova) -> Option<&PastMapping> {
        self.past.iter().rev().find(|mapping| holds(mapping, iova))
    }

    fn report(&mut self, report: DmaReport) {
        if self.reports.len() < REPORTS {
            self.reports.push(report);
        }
    }
}

impl Ledger {
    pub fn new(device: Arc<str>) -> Self {
        Self { device, state: Mutex::default() }
    }

    fn about(
        &self,
        misuse: Misuse,
        iova: Iova,
        len: u64,
        mapping: Option<PastMapping>,
        at: Option<Place>,
    ) -> DmaReport {
        DmaReport { device: self.device.clone(), misuse, iova, len, mapping, at }
    }

    pub fn mapped(
        &self,
        kind: MappingKind,
        iova: Iova,
        len: u64,
        direction: Option<Direction>,
        memory: &[SgEntry],
        at: Place,
    ) {
        let span = len;
        self.insert(
            PastMapping { iova, len, span, direction, kind, mapped_at: at, unmapped_at: None },
            memory,
        );
    }

    /// A scatter list, whose addresses may have gaps.
    pub fn mapped_sg(
        &self,
        iova: Iova,
        (len, span): (u64, u64),
        direction: Direction,
        memory: &[SgEntry],
        at: Place,
    ) {
        let (kind, direction) = (MappingKind::Sg, Some(direction));
        self.insert(
            PastMapping { iova, len, span, direction, kind, mapped_at: at, unmapped_at: None },
            memory,
        );
    }

    fn insert(&self, mapping: PastMapping, memory: &[SgEntry]) {
        let mut state = self.state.lock();
        let number = state.next;
        state.next = number.wrapping_add(1);
        let record = Record { mapping, memory: memory.to_vec(), owner: Owner::Device };
        state.live.insert((mapping.iova.get(), number), record);
    }

    /// Notes an unmap, and gives the length to unmap: that of the mapping, whatever the caller said. An error if it
    /// must not be done at all.
    pub fn unmapped(
        &self,
        kind: MappingKind,
        iova: Iova,
        len: u64,
        direction: Option<Direction>,
        at: Place,
    ) -> Result<u64, DmaError> {
        let mut state = self.state.lock();
        let Some(number) = state.best(kind, iova, len, direction) else {
            let gone = state.past.iter().rev().find(|mapping| mapping.iova == iova).copied();
            let around = state.holding(iova).map(|record| record.mapping);
            let misuse = match (gone, around) {
                (_, Some(_)) | (None, None) => Misuse::NeverMapped,
                (Some(_), None) => Misuse::DoubleUnmap,
            };
            let report = self.about(misuse, iova, len, around.or(gone), Some(at));
            state.report(report);
            return Err(DmaError::NotMapped { device: self.device.clone(), iova, len });
        };
        let key = (iova.get(), number);
        let Some(record) = state.live.get(&key) else { return Ok(len) };
        let mapping = record.mapping;
        if mapping.kind != kind {
            let report = self.about(Misuse::WrongKind { given: kind }, iova, len, Some(mapping), Some(at));
            state.report(report);
            return Err(DmaError::OtherKind { device: self.device.clone(), iova, mapped: mapping.kind });
        }
        if mapping.len != len {
            let misuse = Misuse::WrongSize { given: len };
            let report = self.about(misuse, iova, len, Some(mapping), Some(at));
            state.report(report);
        }
        if let Some(given) = direction
            && mapping.direction != direction
        {
            let misuse = Misuse::WrongDirection { given };
            let report = self.about(misuse, iova, len, Some(mapping), Some(at));
            state.report(report);
        }
        state.live.remove(&key);
        if state.past.len() >= PAST {
            state.past.pop_front();
        }
        state.past.push_back(PastMapping { unmapped_at: Some(at), ..mapping });
        Ok(mapping.len)
    }

    /// Notes a sync of a mapping or a part of it.
    pub fn synced(
        &self,
        iova: Iova,
        len: u64,
        direction: Direction,
        owner: Owner,
        at: Place,
    ) -> Result<(), DmaError> {
        let mut state = self.state.lock();
        let key = state.holding(iova).map(|record| record.mapping).and_then(|mapping| {
            let here = (mapping.iova.get(), 0)..=(mapping.iova.get(), u64::MAX);
            state.live.range(here).next().map(|(key, _)| *key)
        });
        let Some((key, record)) = key.and_then(|key| state.live.get_mut(&key).map(|record| (key, record)))
        else {
            let gone = state.gone(iova).copied();
            let misuse = if gone.is_some() { Misuse::SyncAfterUnmap } else { Misuse::NeverMapped };
            let report = self.about(misuse, iova, len, gone, Some(at));
            state.report(report);
            return Err(DmaError::NotMapped { device: self.device.clone(), iova, len });
        };
        let mapping = record.mapping;
        // What is synced in parts counts as synced: the parts that matter are the caller's to know.
        record.owner = owner;
        let offset = iova.get().wrapping_sub(key.0);
        if offset.checked_add(len).is_none_or(|end| end > mapping.len) {
            let report = self.about(Misuse::WrongSize { given: len }, iova, len, Some(mapping), Some(at));
            state.report(report);
        }
        let fits = match mapping.direction {
            // A buffer for both ways may be synced for one.
            None | Some(Direction::Bidirectional) => true,
            Some(mapped) => mapped == direction,
        };
        if !fits {
            let misuse = Misuse::WrongDirection { given: direction };
            let report = self.about(misuse, iova, len, Some(mapping), Some(at));
            state.report(report);
        }
        Ok(())
    }

    /// The CPU is about to touch memory.
    pub fn cpu_access(&self, pa: Pa, len: u64, write: bool, at: Place) {
        let mut state = self.state.lock();
        let in_it =
            |record: &&Record| record.memory.iter().any(|e| overlap(e.pa.get(), e.len, pa.get(), len));
        let wrong = |record: &&Record| {
            // Reading what the device only reads as well is harmless.
            let harmless = !write && record.mapping.direction == Some(Direction::ToDevice);
            record.owner == Owner::Device && !harmless
        };
        let found = state.live.values().filter(in_it).find(wrong).map(|record| record.mapping);
        if let Some(mapping) = found {
            let misuse = Misuse::MissingSync { write };
            let report = self.about(misuse, mapping.iova, len, Some(mapping), Some(at));
            state.report(report);
        }
    }

    /// The driver lets go of the device.
    pub fn teardown(&self, at: Place) -> usize {
        let mut state = self.state.lock();
        let left = state.live.len();
        let mappings: Vec<PastMapping> = state.live.values().map(|record| record.mapping).collect();
        for mapping in mappings {
            let misuse = Misuse::NotUnmapped { left };
            let report = self.about(misuse, mapping.iova, mapping.len, Some(mapping), Some(at));
            state.report(report);
        }
        left
    }

    pub fn story(&self, iova: Iova) -> FaultStory {
        let state = self.state.lock();
        if let Some(record) = state.holding(iova) {
            return FaultStory::Live(record.mapping);
        }
        if let Some(mapping) = state.gone(iova) {
            return FaultStory::Gone(*mapping);
        }
        let below = state.live.range(..=(iova.get(), u64::MAX)).next_back();
        match below.map(|(_, record)| record.mapping) {
            Some(mapping) if iova.get() - mapping.iova.get() < mapping.span.saturating_add(OVERRUN) => {
                FaultStory::Behind(mapping)
            }
            _ => FaultStory::Never,
        }
    }

    /// The device faulted.
    pub fn fault(&self, iova: Iova, write: bool) -> FaultStory {
        let story = self.story(iova);
        let (misuse, mapping) = match story {
            FaultStory::Live(mapping) => (Misuse::WrongAccess { write }, Some(mapping)),
            FaultStory::Gone(mapping) => (Misuse::UseAfterUnmap, Some(mapping)),
            FaultStory::Behind(mapping) => (Misuse::Overrun, Some(mapping)),
            FaultStory::Never => (Misuse::WildAccess, None),
        };
        let report = self.about(misuse, iova, 1, mapping, None);
        self.state.lock().report(report);
        story
    }

    pub fn take(&self) -> Vec<DmaReport> {
        core::mem::take(&mut self.state.lock().reports)
    }

    pub fn count(&self) -> usize {
        self.state.lock().live.len()
    }
}
