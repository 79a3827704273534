//! An I/O address space: which memory devices reach under which addresses (iommufd's IOAS, VFIO's container).
//!
//! [`Ioas::map`] makes an area, [`Ioas::unmap`] takes whole areas away, and groups come and go with
//! [`Group::attach`](crate::Group::attach) and [`Group::detach`](crate::Group::detach). Groups behind one IOMMU share a domain;
//! each further IOMMU gets a domain of its own with the same areas. Ranges are named by their first and **last** address.
//!
//! Memory is pinned before the first domain sees it and unpinned after every IOMMU has confirmed that no device reaches it.
//! Where an IOMMU does not confirm, the memory stays pinned for good ([`IoasError::StillReachable`]).

mod error;
mod state;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::{DomainSpec, FaultModel, IommuError, Paging};
use portcullis_iommu::{Domain, GroupId, InstanceId, IommuCore, Prot, ReservedKind, ReservedRegion, merge};
use spin::Mutex;

use crate::{HostRange, PinMemory};
use state::{Slot, State, Table};

pub use error::IoasError;

/// Which stage of translation the areas are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoasStage {
    /// Stage 1 if the IOMMU has it, as for a user program.
    #[default]
    Stage1,
    /// Stage 2, as for a virtual machine: a guest's stage 1 can go on top.
    Stage2,
}

/// How much an address space may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of pinned memory, each page counted once (`RLIMIT_MEMLOCK`).
    pub pinned_bytes: u64,
    /// Areas (`dma_entry_limit` of VFIO's type 1).
    pub areas: usize,
}

impl Default for Limits {
    /// No limit of bytes, 65535 areas.
    fn default() -> Self {
        Self { pinned_bytes: u64::MAX, areas: 65535 }
    }
}

/// How an address space shall be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoasOptions {
    /// The stage.
    pub stage: IoasStage,
    /// Granule, address bits and coherency of the tables.
    pub paging: Paging,
    /// What a fault does.
    pub fault_model: FaultModel,
    /// Limits.
    pub limits: Limits,
}

/// What is mapped somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub first: Iova,
    /// Last address.
    pub last: Iova,
    /// What devices may do.
    pub prot: Prot,
    /// The memory, in order.
    pub memory: Vec<HostRange>,
}

/// An I/O address space.
pub struct Ioas {
    pins: Arc<dyn PinMemory>,
    options: IoasOptions,
    state: Mutex<State>,
}

/// Unmaps up to so many bytes of an area that could not be mapped as a whole.
fn undo(domain: &Domain, first: u64, bytes: u64) -> Result<(), IommuError> {
    if bytes == 0 { Ok(()) } else { domain.unmap(Iova(first), bytes).map(drop) }
}

/// Maps an area, whole or not at all.
fn fill(domain: &Domain, first: u64, memory: &[HostRange], prot: Prot) -> Result<(), IoasError> {
    let mut done = 0u64;
    for range in memory {
        if let Err(error) = domain.map(Iova(first + done), range.pa, range.len, prot) {
            undo(domain, first, done).map_err(IoasError::StillReachable)?;
            return Err(error.into());
        }
        done += range.len;
    }
    Ok(())
}

/// Ranges that follow one another in memory become one, so that large blocks can be used.
fn joined(memory: &[HostRange]) -> Vec<HostRange> {
    let mut all: Vec<HostRange> = Vec::with_capacity(memory.len());
    for range in memory {
        match all.last_mut() {
            Some(last) if last.pa.checked_add(last.len) == Some(range.pa) => last.len += range.len,
            _ => all.push(*range),
        }
    }
    all
}

impl Ioas {
    /// An empty address space for memory of `pins`.
    pub fn new(pins: Arc<dyn PinMemory>, options: IoasOptions) -> Arc<Self> {
        Arc::new(Self { pins, options, state: Mutex::default() })
    }

    /// Maps the memory, one range after the other, from `iova` on. Addresses and lengths are multiples of the page size.
    pub fn map(&self, iova: Iova, memory: &[HostRange], prot: Prot) -> Result<(), IoasError> {
        self.insert(Some(iova), memory, prot).map(drop)
    }

    /// Maps the memory at a free address, which is never 0, and is aligned as the memory is, up to 2 MiB.
    pub fn map_anywhere(&self, memory: &[HostRange], prot: Prot) -> Result<Iova, IoasError> {
        self.insert(None, memory, prot)
    }

    fn insert(&self, at: Option<Iova>, memory: &[HostRange], prot: Prot) -> Result<Iova, IoasError> {
        let mut len = 0u64;
        let start = at.unwrap_or_default();
        for range in memory {
            let sum = len.checked_add(range.len).filter(|_| range.pa.checked_add(range.len).is_some());
            len = sum.ok_or(IoasError::Wraps { iova: start, len: range.len })?;
        }
        if len == 0 || memory.iter().any(|range| range.len == 0) {
            return Err(IoasError::Empty { iova: start });
        }
        let memory: Arc<[HostRange]> = joined(memory).into();
        let (first, domains) = self.enter(at, len, &memory, prot)?;
        let mut result = Ok(());
        let mut filled = Vec::new();
        for domain in domains {
            result = fill(&domain, first, &memory, prot);
            if result.is_err() {
                break;
            }
            filled.push(domain);
        }
        if result.is_err() {
            for domain in filled {
                if let Err(error) = undo(&domain, first, len) {
                    result = Err(IoasError::StillReachable(error));
                }
            }
        }
        let reachable = matches!(result, Err(IoasError::StillReachable(_)));
        let mut state = self.state.lock();
        state.working -= 1;
        match result {
            Ok(()) => {
                if let Some(slot) = state.areas.get_mut(&first) {
                    slot.moving = false;
                }
                Ok(Iova(first))
            }
            Err(error) => {
                state.areas.remove(&first);
                if !reachable {
                    self.unpin(&mut state, &memory);
                }
                Err(error)
            }
        }
    }

    /// Checks, pins, and reserves the area; gives where it is and the domains that have to see it.
    fn enter(
        &self,
        at: Option<Iova>,
        len: u64,
        memory: &Arc<[HostRange]>,
        prot: Prot,
    ) -> Result<(u64, Vec<Arc<Domain>>), IoasError> {
        let mut state = self.state.lock();
        state.ready()?;
        let page = state.page();
        let parts = memory.iter().flat_map(|range| [range.pa.get(), range.len]);
        if let Some(value) = at.map(Iova::get).into_iter().chain(parts).find(|n| !n.is_multiple_of(page)) {
            return Err(IoasError::Unaligned { value, page });
        }
        let first = match at {
            Some(iova) => {
                let last = iova.checked_add(len - 1).ok_or(IoasError::Wraps { iova, len })?;
                state.check(iova.get(), last.get())?;
                iova.get()
            }
            None => {
                let natural = memory.iter().fold(len, |all, range| all | range.pa.get()).trailing_zeros();
                state.free(len, (1u64 << natural.min(21)).max(page))?
            }
        };
        if state.areas.len() >= self.options.limits.areas {
            return Err(IoasError::AreaLimit { limit: self.options.limits.areas });
        }
        self.pin(&mut state, memory)?;
        let slot = Slot { last: first + (len - 1), prot, memory: memory.clone(), moving: true };
        state.areas.insert(first, slot);
        state.working += 1;
        Ok((first, state.domains()))
    }

    fn pin(&self, state: &mut State, memory: &[HostRange]) -> Result<(), IoasError> {
        let ends = |range: &HostRange| (range.pa.get(), range.pa.get() + range.len);
        let mut fresh = Vec::new();
        for range in memory {
            let (start, end) = ends(range);
            fresh.extend(state.pinned.add(start, end));
        }
        let pinned = state.pinned.bytes();
        let limit = self.options.limits.pinned_bytes;
        let mut result = Ok(());
        let mut done = 0;
        if pinned > limit {
            let more: u64 = fresh.iter().map(|(start, end)| end - start).sum();
            result = Err(IoasError::PinLimit { pinned: pinned - more, more, limit });
        }
        for (start, end) in fresh.iter().filter(|_| pinned <= limit) {
            if let Err(error) = self.pins.pin(Pa(*start), end - start) {
                result = Err(error.into());
                break;
            }
            done += 1;
        }
        if result.is_err() {
            for (start, end) in fresh.iter().take(done) {
                self.pins.unpin(Pa(*start), end - start);
            }
            for range in memory {
                let (start, end) = ends(range);
                state.pinned.remove(start, end);
            }
        }
        result
    }

    fn unpin(&self, state: &mut State, memory: &[HostRange]) {
        if state.tainted {
            return;
        }
        for range in memory {
            for (start, end) in state.pinned.remove(range.pa.get(), range.pa.get() + range.len) {
                self.pins.unpin(Pa(start), end - start);
            }
        }
    }

    /// Unmaps all areas in `first..=last`; gives their bytes. No area may lie across either end.
    pub fn unmap(&self, first: Iova, last: Iova) -> Result<u64, IoasError> {
        if last < first {
            return Err(IoasError::Backwards { first, last });
        }
        self.remove(first, last, true)
    }

    /// Unmaps everything; gives the bytes.
    pub fn unmap_all(&self) -> Result<u64, IoasError> {
        self.remove(Iova(0), Iova(u64::MAX), false)
    }

    fn remove(&self, first: Iova, last: Iova, must_be: bool) -> Result<u64, IoasError> {
        let (leaving, domains) = {
            let mut state = self.state.lock();
            state.ready()?;
            let (start, end) = (first.get(), last.get());
            let ends = [state.areas.range(..start).next_back(), state.areas.range(..=end).next_back()];
            let cuts = |(from, slot): &(&u64, &Slot)| {
                **from < start && slot.last >= start || **from <= end && slot.last > end
            };
            if let Some((there, slot)) = ends.into_iter().flatten().find(cuts) {
                let (there_first, there_last) = (Iova(*there), Iova(slot.last));
                return Err(IoasError::Cut { first, last, there_first, there_last });
            }
            if state.areas.range(start..=end).any(|(_, slot)| slot.moving) {
                return Err(IoasError::Busy);
            }
            let mut leaving = Vec::new();
            for (from, slot) in state.areas.range_mut(start..=end) {
                slot.moving = true;
                leaving.push((*from, slot.last, slot.memory.clone()));
            }
            if leaving.is_empty() {
                return if must_be { Err(IoasError::NoArea { first, last }) } else { Ok(0) };
            }
            state.working += 1;
            (leaving, state.domains())
        };
        let mut bytes = 0u64;
        let mut result = Ok(());
        for (from, last, memory) in leaving {
            let len = (last - from).saturating_add(1);
            let mut unmapped = Ok(());
            for domain in &domains {
                unmapped = unmapped.and(domain.unmap(Iova(from), len).map(drop));
            }
            bytes = bytes.saturating_add(len);
            let mut state = self.state.lock();
            state.areas.remove(&from);
            match unmapped {
                Ok(()) => self.unpin(&mut state, &memory),
                Err(error) => result = Err(IoasError::StillReachable(error)),
            }
        }
        self.state.lock().working -= 1;
        result.map(|()| bytes)
    }

    /// Where an address goes.
    pub fn lookup(&self, iova: Iova) -> Option<Pa> {
        let state = self.state.lock();
        let (first, slot) = state.areas.range(..=iova.get()).next_back()?;
        let mut offset = iova.get() - first;
        for range in slot.memory.iter() {
            if offset < range.len {
                return range.pa.checked_add(offset);
            }
            offset -= range.len;
        }
        None
    }

    /// All areas, lowest first.
    pub fn areas(&self) -> Vec<Area> {
        let state = self.state.lock();
        let area = |(first, slot): (&u64, &Slot)| Area {
            first: Iova(*first),
            last: Iova(slot.last),
            prot: slot.prot,
            memory: slot.memory.to_vec(),
        };
        state.areas.iter().map(area).collect()
    }

    /// Bytes that are pinned, each counted once.
    pub fn pinned_bytes(&self) -> u64 {
        self.state.lock().pinned.bytes()
    }

    /// What the devices in it have reserved, sorted and merged.
    pub fn reserved_regions(&self) -> Vec<ReservedRegion> {
        let state = self.state.lock();
        merge(state.groups.iter().flat_map(|(_, _, regions)| regions.iter().copied()))
    }

    /// The groups in it.
    pub fn groups(&self) -> Vec<GroupId> {
        self.state.lock().groups.iter().map(|(group, _, _)| *group).collect()
    }

    /// The domain that its groups behind an IOMMU are in.
    pub fn domain(&self, instance: InstanceId) -> Option<Arc<Domain>> {
        let state = self.state.lock();
        state.tables.iter().find(|table| table.instance == instance).map(|table| table.domain.clone())
    }

    /// True if an IOMMU did not confirm that it has stopped using some of the memory.
    pub fn is_tainted(&self) -> bool {
        self.state.lock().tainted
    }

    /// A group joins. The caller has it taken and blocked.
    pub(crate) fn attach_group(
        &self,
        core: &IommuCore,
        group: GroupId,
        instance: InstanceId,
    ) -> Result<(), crate::VfioError> {
        let mut regions = Vec::new();
        for device in core.devices_of(group)? {
            let reserved = core.reserved_regions(device)?;
            // What the device can give up it has given up now.
            regions.extend(reserved.into_iter().filter(|r| r.kind != ReservedKind::DirectRelaxable));
        }
        let known = {
            let mut state = self.state.lock();
            state.ready()?;
            if state.working > 0 {
                return Err(IoasError::Busy.into());
            }
            for region in regions.iter().filter(|region| region.len > 0) {
                let (first, last) = (region.start.get(), region.end().saturating_sub(1));
                if let Some((area, its_last)) = state.overlapping(first, last) {
                    let (first, last) = (Iova(area), Iova(its_last));
                    let ReservedRegion { start, len, kind, .. } = *region;
                    return Err(IoasError::Reserved { first, last, start, len, kind }.into());
                }
            }
            state.attaching = true;
            state.tables.iter().find(|table| table.instance == instance).map(|table| table.domain.clone())
        };
        let attached = self.join(core, group, instance, known);
        let mut state = self.state.lock();
        state.attaching = false;
        let fresh = attached?;
        state.tables.extend(fresh.map(|domain| Table { instance, domain }));
        state.groups.push((group, instance, merge(regions)));
        Ok(())
    }

    /// Gives the domain if it had to be made.
    fn join(
        &self,
        core: &IommuCore,
        group: GroupId,
        instance: InstanceId,
        known: Option<Arc<Domain>>,
    ) -> Result<Option<Arc<Domain>>, crate::VfioError> {
        if let Some(domain) = known {
            core.attach_group(group, &domain)?;
            return Ok(None);
        }
        let stage1 = core.ops(instance)?.capabilities().stage1;
        let spec = match self.options.stage {
            IoasStage::Stage1 if stage1 => DomainSpec::Stage1(self.options.paging),
            _ => DomainSpec::Stage2(self.options.paging),
        };
        let domain = core.alloc_domain_with(instance, spec, self.options.fault_model)?;
        // Nobody maps or unmaps meanwhile.
        let areas: Vec<_> = {
            let state = self.state.lock();
            state.areas.iter().map(|(first, slot)| (*first, slot.memory.clone(), slot.prot)).collect()
        };
        for (first, memory, prot) in areas {
            fill(&domain, first, &memory, prot)?;
        }
        core.attach_group(group, &domain)?;
        Ok(Some(domain))
    }

    /// A group leaves. The caller has blocked it.
    pub(crate) fn detach_group(&self, group: GroupId, instance: InstanceId) -> Result<(), IoasError> {
        let spare = {
            let mut state = self.state.lock();
            state.groups.retain(|(other, _, _)| *other != group);
            let needed = state.groups.iter().any(|(_, other, _)| *other == instance);
            let index = state.tables.iter().position(|table| table.instance == instance && !needed);
            match index {
                // Somebody maps or unmaps in it: it goes with the last group that is not, or at the end.
                Some(_) if state.working > 0 => None,
                Some(index) => Some(state.tables.swap_remove(index)),
                None => None,
            }
        };
        let domain = match &spare {
            Some(table) => Some(table.domain.clone()),
            None => self.domain(instance),
        };
        // Accesses that were translated before the group was blocked are over when this returns.
        let confirmed = domain.map_or(Ok(()), |domain| domain.ops().invalidate_all());
        drop(spare);
        confirmed.map_err(|error| {
            self.state.lock().tainted = true;
            IoasError::StillReachable(error)
        })
    }

    /// Unmaps everything for good. Refused while groups are in it.
    pub fn close(&self) -> Result<(), IoasError> {
        {
            let state = self.state.lock();
            if !state.groups.is_empty() {
                return Err(IoasError::InUse(state.groups.len()));
            }
            if state.closed {
                return Ok(());
            }
        }
        self.unmap_all()?;
        let tables = {
            let mut state = self.state.lock();
            if !state.areas.is_empty() {
                return Err(IoasError::Busy);
            }
            state.closed = true;
            core::mem::take(&mut state.tables)
        };
        drop(tables);
        Ok(())
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        // A group that could not be blocked is attached to its domain for good.
        state.tainted |= !state.groups.is_empty();
        // Domains first: dropping them waits until nothing uses their tables.
        let domains = core::mem::take(&mut state.tables);
        for table in &domains {
            if table.domain.ops().invalidate_all().is_err() {
                state.tainted = true;
            }
        }
        drop(domains);
        if state.tainted {
            return;
        }
        let areas = core::mem::take(&mut state.areas);
        drop(areas);
        for (start, end) in state.pinned.take_all() {
            self.pins.unpin(Pa(start), end - start);
        }
    }
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state.lock();
        f.debug_struct("Ioas")
            .field("areas", &state.areas.len())
            .field("pinned", &state.pinned.bytes())
            .field("groups", &state.groups)
            .finish()
    }
}
