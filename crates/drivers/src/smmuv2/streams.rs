//! Which stream goes where: the software copy of SMRn and S2CRn, and the overlap rule.
//!
//! Two valid entries that match the same StreamID are a stream match conflict, so an entry is shared or refused,
//! never doubled (Linux `arm_smmu_find_sme`): a request that an existing entry covers uses that entry, any other
//! overlap is an error, and everything else takes the first free group.

use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::StreamId;
use portcullis_arch::smmuv2::{S2cr, S2crType, Smr};
use thiserror::Error;

use super::ident::{Identification, StreamMapping};

/// Streams of a device: all ids that equal [`id`](Self::id) in the bits that [`mask`](Self::mask) does not ignore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamMatch {
    /// StreamID.
    pub id: u32,
    /// 1 = the bit does not matter.
    pub mask: u32,
}

impl StreamMatch {
    /// One stream.
    pub const fn exact(id: u32) -> Self {
        Self { id, mask: 0 }
    }
    /// All streams whose id equals `id` where `mask` has zeros.
    pub const fn masked(id: u32, mask: u32) -> Self {
        Self { id, mask }
    }
    /// True if the stream is one of these.
    pub const fn matches(&self, stream: StreamId) -> bool {
        (self.id ^ stream.get()) & !self.mask == 0
    }
    /// True if every stream of `other` is one of these.
    pub const fn covers(&self, other: &Self) -> bool {
        other.mask & !self.mask == 0 && (self.id ^ other.id) & !self.mask == 0
    }
    /// True if there is a stream that both match.
    pub const fn overlaps(&self, other: &Self) -> bool {
        (self.id ^ other.id) & !(self.mask | other.mask) == 0
    }
}

impl fmt::Display for StreamMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.id)?;
        if self.mask == 0 { Ok(()) } else { write!(f, " mask {:#x}", self.mask) }
    }
}

/// A device's streams that cannot be entered. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StreamError {
    /// The device has no stream.
    #[error("the device has no stream id")]
    Empty,
    /// The id has bits that the hardware does not compare.
    #[error("stream ID {id:#x} out of range for SMMU ({limit:#x})")]
    IdRange {
        /// The id.
        id: u32,
        /// Bits that exist, or the highest index.
        limit: u32,
    },
    /// The mask has bits that the hardware does not have.
    #[error("SMR mask {mask:#x} out of range for SMMU ({limit:#x})")]
    MaskRange {
        /// The mask.
        mask: u32,
        /// Bits that exist.
        limit: u32,
    },
    /// Some streams of the new entry are matched by an existing one, but not all.
    #[error("stream match {new} overlaps entry {index}, which matches {existing}")]
    Overlap {
        /// What was asked for.
        new: StreamMatch,
        /// What is there.
        existing: StreamMatch,
        /// Number of the existing group.
        index: usize,
    },
    /// All groups are in use.
    #[error("no free stream match group for stream {new}: all {groups} are in use")]
    NoFreeGroup {
        /// What was asked for.
        new: StreamMatch,
        /// Groups that exist.
        groups: usize,
    },
}

/// One stream match group in software.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// What the SMR matches; `None` while free.
    pub matches: Option<StreamMatch>,
    /// Users: a device counts once per entry of its list.
    pub count: u32,
    /// A mapping of the firmware that must survive until a device claims it.
    pub preserved: bool,
    pub s2cr: S2cr,
    pub overrides: StreamOverrides,
    /// The domain that `s2cr` belongs to; 0 for none.
    pub domain: u32,
}

/// All groups in software.
#[derive(Debug)]
pub(super) struct StreamTable {
    entries: Vec<Entry>,
    mapping: StreamMapping,
    exid: bool,
    unassigned: S2cr,
}

/// How PRIVCFG and INSTCFG override what streams send, and nothing else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOverrides {
    /// Privilege: `None` as sent, else privileged or not.
    pub privileged: Option<bool>,
    /// Instruction or data, for reads: `None` as sent, else instruction or not. The hardware treats writes as data
    /// always.
    pub instruction: Option<bool>,
}

impl StreamOverrides {
    /// Into an S2CR of the translation type.
    pub(super) fn apply(self, s2cr: S2cr) -> S2cr {
        let code = |choice: Option<bool>| match choice {
            None => 0,
            Some(false) => 2,
            Some(true) => 3,
        };
        s2cr.with_privcfg(code(self.privileged)).with_instcfg(code(self.instruction))
    }
}

/// S2CR for a type without a context bank.
pub(super) fn s2cr_of(kind: S2crType) -> S2cr {
    S2cr::new().with_type_code(kind as u8)
}

impl StreamTable {
    pub fn new(id: &Identification, bypass_unassigned: bool) -> Self {
        let groups = match id.streams {
            StreamMapping::Matching { groups } => groups,
            StreamMapping::Indexing { streams } => streams,
        };
        let unassigned = s2cr_of(if bypass_unassigned { S2crType::Bypass } else { S2crType::Fault });
        let free = Entry {
            matches: None,
            count: 0,
            preserved: false,
            s2cr: unassigned,
            overrides: StreamOverrides::default(),
            domain: 0,
        };
        Self {
            entries: alloc::vec![free; usize::from(groups)],
            mapping: id.streams,
            exid: id.extended_ids,
            unassigned,
        }
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
    pub fn entry_mut(&mut self, index: usize) -> Option<&mut Entry> {
        self.entries.get_mut(index)
    }
    pub fn unassigned(&self) -> S2cr {
        self.unassigned
    }
    pub fn has_smrs(&self) -> bool {
        matches!(self.mapping, StreamMapping::Matching { .. })
    }

    /// The SMR and S2CR values of a group. With 16-bit ids the valid bit is in S2CR.
    pub fn values(&self, index: usize) -> Option<(u32, u32)> {
        let entry = self.entries.get(index)?;
        let valid = entry.matches.is_some();
        let (id, mask) = entry.matches.map_or((0, 0), |m| (m.id, m.mask));
        Some(if self.exid {
            (mask << 16 | id & 0xffff, entry.s2cr.with_exidvalid(valid).into_bits())
        } else {
            let smr = Smr::new().with_valid(valid).with_mask(mask as u16 & 0x7fff);
            (smr.with_id(id as u16 & 0x7fff).into_bits(), entry.s2cr.into_bits())
        })
    }

    pub fn first_free(&self) -> Option<usize> {
        self.entries.iter().position(|entry| entry.matches.is_none())
    }

    /// The group for a request: one that covers it, or the first free one.
    fn find(&self, new: &StreamMatch, id: &Identification) -> Result<usize, StreamError> {
        if let StreamMapping::Indexing { streams } = self.mapping {
            let limit = u32::from(streams).saturating_sub(1);
            if new.mask != 0 {
                return Err(StreamError::MaskRange { mask: new.mask, limit: 0 });
            }
            return if new.id <= limit {
                Ok(new.id as usize)
            } else {
                Err(StreamError::IdRange { id: new.id, limit })
            };
        }
        let limit = u32::from(id.stream_id_mask);
        if new.id & !limit != 0 {
            return Err(StreamError::IdRange { id: new.id, limit });
        }
        let limit = u32::from(id.stream_mask_mask);
        if new.mask & !limit != 0 {
            return Err(StreamError::MaskRange { mask: new.mask, limit });
        }
        let mut free = None;
        for (index, entry) in self.entries.iter().enumerate() {
            match entry.matches {
                None => free = free.or(Some(index)),
                Some(existing) if existing.covers(new) => return Ok(index),
                Some(existing) if existing.overlaps(new) => {
                    return Err(StreamError::Overlap { new: *new, existing, index });
                }
                Some(_) => {}
            }
        }
        free.ok_or(StreamError::NoFreeGroup { new: *new, groups: self.entries.len() })
    }

    /// Takes groups for all of a device's streams, or none. Hardware is not touched; the caller programs the
    /// groups afterwards.
    pub fn claim(&mut self, streams: &[StreamMatch], id: &Identification) -> Result<Vec<usize>, StreamError> {
        if streams.is_empty() {
            return Err(StreamError::Empty);
        }
        let mut chosen = Vec::with_capacity(streams.len());
        for stream in streams {
            let found = self.find(stream, id);
            match found {
                Ok(index) => {
                    self.take(index, *stream);
                    chosen.push(index);
                }
                Err(error) => {
                    self.release(&chosen);
                    return Err(error);
                }
            }
        }
        Ok(chosen)
    }

    fn take(&mut self, index: usize, stream: StreamMatch) {
        if let Some(entry) = self.entries.get_mut(index) {
            entry.matches = entry.matches.or(Some(stream));
            entry.count = entry.count.saturating_add(1);
        }
    }

    /// Gives groups back; returns those that became free.
    pub fn release(&mut self, entries: &[usize]) -> Vec<usize> {
        let mut freed = Vec::new();
        for &index in entries {
            let unassigned = self.unassigned;
            if let Some(entry) = self.entries.get_mut(index) {
                entry.count = entry.count.saturating_sub(1);
                if entry.count == 0 && !entry.preserved {
                    entry.matches = None;
                    entry.s2cr = unassigned;
                    entry.overrides = StreamOverrides::default();
                    entry.domain = 0;
                    freed.push(index);
                }
            }
        }
        freed
    }

    /// Enters a stream that firmware uses and that must go on working untranslated.
    pub fn preserve(&mut self, stream: StreamMatch, id: &Identification) -> Result<(), StreamError> {
        // Mask bits are not probed yet; what a preserved mapping needs is trusted.
        let mut trusted = *id;
        trusted.stream_mask_mask = u16::MAX;
        let index = self.find(&stream, &trusted)?;
        if let Some(entry) = self.entries.get_mut(index)
            && entry.matches.is_none()
        {
            entry.matches = Some(stream);
            entry.preserved = true;
            entry.s2cr = s2cr_of(S2crType::Bypass);
        }
        Ok(())
    }

    /// The groups that point to a domain.
    pub fn of_domain(&self, domain: u32) -> Vec<usize> {
        let of = |(index, entry): (usize, &Entry)| (entry.domain == domain).then_some(index);
        self.entries.iter().enumerate().filter_map(of).collect()
    }
}
