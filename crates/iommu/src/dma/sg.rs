//! Scatter lists: many pieces of memory, one range of addresses, few segments.

use alloc::vec::Vec;
use core::panic::Location;

use portcullis_arch::{Iova, Pa};
use portcullis_hal::DmaMemory;

use super::debug::Owner;
use super::device::Inner;
use super::single::Place;
use super::space::{Part, ReleaseError};
use super::{Direction, DmaAttrs, DmaError, MappingKind, SgEntry};

/// What a device is told: bytes that are contiguous for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SgSegment {
    /// First address.
    pub iova: Iova,
    /// Bytes.
    pub len: u64,
}

/// A mapped scatter list. It has to be given back to [`DmaDevice::unmap_sg`](super::DmaDevice::unmap_sg); dropping it
/// leaves the mapping, as forgetting to unmap does.
#[derive(Debug)]
#[must_use = "the mapping stays until it is given to unmap_sg"]
pub struct SgMapping {
    segments: Vec<SgSegment>,
    len: u64,
    how: How,
}

#[derive(Debug)]
enum How {
    /// One range of addresses, with the list as it was.
    Range { base: Iova, size: u64, entries: Vec<SgEntry> },
    /// Each entry for itself: some bounce.
    Singles(Vec<SgSegment>),
    /// No IOMMU.
    Direct(Vec<SgEntry>),
}

impl SgMapping {
    /// What to tell the device, in order.
    pub fn segments(&self) -> &[SgSegment] {
        &self.segments
    }
    /// Bytes in all segments.
    pub fn len(&self) -> u64 {
        self.len
    }
    /// Never: an empty list cannot be mapped.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }
    /// The first address.
    pub fn start(&self) -> Option<Iova> {
        self.segments.first().map(|segment| segment.iova)
    }
}

/// Joins what is contiguous, as far as a device's limits allow.
struct Segments {
    max: u64,
    /// `max` for a piece that has to be cut: the next one shall begin aligned.
    cut: u64,
    boundary_mask: u64,
    out: Vec<SgSegment>,
}

impl Segments {
    fn new(max_segment: u64, boundary_mask: u64, granule: u64) -> Self {
        // Less than a cache line or a boundary that is no power of two makes no sense, and shall not make a million
        // segments.
        let max = max_segment.max(64);
        let cut = if max >= granule { max & !(granule - 1) } else { max & !63 };
        Self { max, cut, boundary_mask: whole_mask(boundary_mask), out: Vec::new() }
    }

    fn push(&mut self, mut iova: Iova, mut len: u64) {
        if let Some(last) = self.out.last_mut()
            && last.iova.wrapping_add(last.len) == iova
            && iova.get() & self.boundary_mask != 0
            && last.len.checked_add(len).is_some_and(|joint| joint <= self.max)
            && self.boundary_mask - (iova.get() & self.boundary_mask) >= len - 1
        {
            last.len += len;
            return;
        }
        while len > 0 {
            let to_boundary = (self.boundary_mask - (iova.get() & self.boundary_mask)).saturating_add(1);
            let limit = if len > self.max { self.cut } else { self.max };
            let piece = len.min(limit).min(to_boundary);
            self.out.push(SgSegment { iova, len: piece });
            iova = iova.wrapping_add(piece);
            len -= piece;
        }
    }
}

/// The largest `2^n - 1` that is not more, at least a cache line.
fn whole_mask(mask: u64) -> u64 {
    match mask.checked_add(1) {
        None => mask,
        Some(size) => (1u64 << size.max(64).ilog2()) - 1,
    }
}

/// An entry in the range: where, and its whole pages.
struct Placed {
    at: u64,
    offset: u64,
    size: u64,
    entry: SgEntry,
}

impl<M: DmaMemory + Clone> Inner<M> {
    pub fn map_sg(
        &self,
        entries: &[SgEntry],
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<SgMapping, DmaError> {
        let mut total: u64 = 0;
        for entry in entries {
            let fits = entry.len > 0 && entry.pa.checked_add(entry.len).is_some();
            total = total
                .checked_add(entry.len)
                .filter(|_| fits)
                .ok_or_else(|| self.no_buffer(entry.pa, entry.len))?;
        }
        if entries.is_empty() {
            return Err(self.no_buffer(Pa(0), 0));
        }
        let bounces = |entry: &SgEntry| self.must_bounce(entry.pa, entry.len, direction);
        let (segments, how) = if entries.iter().any(bounces) {
            self.map_singles(entries, direction, attrs)?
        } else {
            if !self.config.coherent && !attrs.skip_cpu_sync {
                for entry in entries {
                    self.clean(entry.pa, entry.len);
                }
            }
            match self.part() {
                Some(mut part) => self.map_range(&mut part, entries, direction, attrs)?,
                None => self.map_direct(entries)?,
            }
        };
        let sg = SgMapping { segments, len: total, how };
        if let (Some(ledger), Some(start)) = (&self.ledger, sg.start()) {
            let end = match (&sg.how, sg.segments.last()) {
                (How::Range { .. }, Some(last)) => last.iova.get().wrapping_add(last.len),
                _ => start.get().wrapping_add(total),
            };
            let span = end.wrapping_sub(start.get());
            ledger.mapped_sg(start, (total, span), direction, entries, at);
        }
        Ok(sg)
    }

    /// All entries in one range of addresses, each from a page boundary on.
    fn map_range(
        &self,
        part: &mut impl Part,
        entries: &[SgEntry],
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(Vec<SgSegment>, How), DmaError> {
        let granule = part.space().granule;
        let boundary = whole_mask(self.config.boundary_mask);
        let mut placed = Vec::with_capacity(entries.len());
        let mut end: u64 = 0;
        for entry in entries {
            let too_long = || self.no_buffer(entry.pa, entry.len);
            let (offset, size) = part.space().pages(entry.pa.get(), entry.len).ok_or_else(too_long)?;
            // An entry that would cross a boundary begins there. The range is aligned to its size, so this holds before
            // its address is known.
            let pad = boundary.wrapping_sub(end).wrapping_add(1) & boundary;
            if pad != 0 && pad < size - 1 && size - 1 <= boundary {
                end = end.checked_add(pad).ok_or_else(too_long)?;
            }
            placed.push(Placed { at: end, offset, size, entry: *entry });
            end = end.checked_add(size).ok_or_else(too_long)?;
        }
        let base = self.addresses(part, end, self.limit())?;
        if let Err(error) = self.map_pieces(part, base, &placed, self.prot(direction, attrs)) {
            // What was mapped before the failure goes. Nothing of it is not an error.
            if let Err(ReleaseError::Nothing) = part.release(base, end, true) {
                let _taken_back = part.free(base, end);
            }
            return Err(error);
        }
        let mut segments = Segments::new(self.config.max_segment, self.config.boundary_mask, granule);
        for piece in &placed {
            segments.push(base.wrapping_add(piece.at + piece.offset), piece.entry.len);
        }
        let how = How::Range { base, size: end, entries: entries.to_vec() };
        Ok((segments.out, how))
    }

    /// Maps neighbours in memory at once.
    fn map_pieces(
        &self,
        part: &mut impl Part,
        base: Iova,
        placed: &[Placed],
        prot: crate::Prot,
    ) -> Result<(), DmaError> {
        let map = |run: (u64, u64, u64)| {
            let (at, pa, len) = run;
            let (iova, pa) = (base.wrapping_add(at), Pa(pa));
            part.space().domain.map(iova, pa, len, prot).map_err(|error| DmaError::Map {
                device: self.name.clone(),
                iova,
                pa,
                len,
                error,
            })
        };
        let mut run: Option<(u64, u64, u64)> = None;
        for piece in placed {
            let page = piece.entry.pa.get() - piece.offset;
            run = match run {
                Some((at, pa, len)) if at + len == piece.at && pa.checked_add(len) == Some(page) => {
                    Some((at, pa, len + piece.size))
                }
                Some(done) => {
                    map(done)?;
                    Some((piece.at, page, piece.size))
                }
                None => Some((piece.at, page, piece.size)),
            };
        }
        run.map_or(Ok(()), map)
    }

    fn map_direct(&self, entries: &[SgEntry]) -> Result<(Vec<SgSegment>, How), DmaError> {
        let mut segments = Segments::new(self.config.max_segment, self.config.boundary_mask, 0x1000);
        for entry in entries {
            segments.push(self.direct_address(entry.pa, entry.len, self.mask_bits())?, entry.len);
        }
        Ok((segments.out, How::Direct(entries.to_vec())))
    }

    fn map_singles(
        &self,
        entries: &[SgEntry],
        direction: Direction,
        attrs: DmaAttrs,
    ) -> Result<(Vec<SgSegment>, How), DmaError> {
        let mut singles: Vec<SgSegment> = Vec::with_capacity(entries.len());
        for entry in entries {
            match self.map_unnoted(self.part().as_mut(), entry.pa, entry.len, direction, attrs) {
                Ok(iova) => singles.push(SgSegment { iova, len: entry.len }),
                Err(error) => {
                    for done in singles {
                        // The error that is told is the one that came first.
                        let _first = self.unmap_unnoted(
                            self.part().as_mut(),
                            done.iova,
                            done.len,
                            direction,
                            DmaAttrs::SKIP_CPU_SYNC,
                        );
                    }
                    return Err(error);
                }
            }
        }
        let granule = self.space.as_ref().map_or(0x1000, |space| space.granule);
        let mut segments = Segments::new(self.config.max_segment, self.config.boundary_mask, granule);
        for single in &singles {
            segments.push(single.iova, single.len);
        }
        Ok((segments.out, How::Singles(singles)))
    }

    pub fn unmap_sg(
        &self,
        sg: SgMapping,
        direction: Direction,
        attrs: DmaAttrs,
        at: Place,
    ) -> Result<(), DmaError> {
        if let (Some(ledger), Some(start)) = (&self.ledger, sg.start()) {
            ledger.unmapped(MappingKind::Sg, start, sg.len, Some(direction), at)?;
        }
        let entries = match sg.how {
            How::Singles(singles) => {
                let mut result = Ok(());
                for single in singles {
                    let one =
                        self.unmap_unnoted(self.part().as_mut(), single.iova, single.len, direction, attrs);
                    result = result.and(one);
                }
                return result;
            }
            How::Range { base, size, entries } => {
                self.displace(self.part().as_mut(), base, size, false)?;
                entries
            }
            How::Direct(entries) => entries,
        };
        if !self.config.coherent && !attrs.skip_cpu_sync && direction.device_writes() {
            for entry in &entries {
                self.invalidate(entry.pa, entry.len);
            }
        }
        Ok(())
    }

    pub fn sync_sg(
        &self,
        sg: &SgMapping,
        direction: Direction,
        for_cpu: bool,
        at: &'static Location<'static>,
    ) -> Result<(), DmaError> {
        if let (Some(ledger), Some(start)) = (&self.ledger, sg.start()) {
            let owner = if for_cpu { Owner::Cpu } else { Owner::Device };
            ledger.synced(start, sg.len, direction, owner, at)?;
        }
        match &sg.how {
            How::Singles(singles) => {
                for single in singles {
                    self.sync_unnoted(single.iova, single.len, direction, for_cpu)?;
                }
            }
            How::Range { entries, .. } | How::Direct(entries) => {
                for entry in entries {
                    if for_cpu && direction.device_writes() {
                        self.invalidate(entry.pa, entry.len);
                    } else if !for_cpu {
                        self.clean(entry.pa, entry.len);
                    }
                }
            }
        }
        Ok(())
    }
}
