//! Unmapping: clear, tell the flush, and only then free what hung below.

use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;

use crate::geometry::{LAST, VALID};
use crate::table::{Entry, PageTable};
use crate::{Flush, Stage, UnmapError};

impl<S: Stage, M: DmaMemory> PageTable<S, M> {
    /// Removes every mapping of `[iova, iova + len)`; returns how many bytes were mapped. Holes are not an error.
    ///
    /// A block is removed whole or not at all: a range that begins or ends inside of one is
    /// [`UnmapError::PartialBlock`], and nothing has changed. (Splitting would replace a live block by a table, which
    /// no SMMU without BBML2 can bear while a device uses it; Linux has given it up as well.)
    ///
    /// A table that the range covers completely is detached, `flush.table` is called for it, and then its memory is
    /// freed. All other leaves are reported by `flush.leaf`, run by run.
    pub fn unmap(&self, iova: S::Input, len: u64, flush: &mut impl Flush) -> Result<u64, UnmapError> {
        let offset = self.check_range(iova, len)?;
        // One page in a table that exists: what most calls are about.
        if len == self.geometry.granule()
            && let Some(entry) = self.page_entry(offset)
        {
            return Ok(self.clear_page(entry, offset, flush));
        }
        self.unmap_more(offset, len, flush)
    }

    #[inline(never)]
    fn unmap_more(&self, offset: u64, len: u64, flush: &mut impl Flush) -> Result<u64, UnmapError> {
        let end = offset + len;
        if self.crosses_tables(offset, end) {
            self.check_cut(offset, end)?;
        } else if len >> self.geometry.table_shift == 0
            && let Some(entry) = self.page_entry(offset)
        {
            return Ok(self.clear_pages(entry, len >> self.geometry.granule_log2, offset, flush));
        }
        self.unmap_entries(offset, end, flush)
    }

    fn unmap_entries(&self, offset: u64, end: u64, flush: &mut impl Flush) -> Result<u64, UnmapError> {
        let g = &self.geometry;
        let mut at = offset;
        let mut unmapped = 0;
        while at < end {
            let mut table = self.root.get();
            let mut level = g.start;
            loop {
                let size = g.size(level);
                let index = g.index(level, at);
                let pa = Pa(table + index * 8);
                if level == LAST {
                    let count = ((end - at) >> g.granule_log2).min(g.entries(level) - index);
                    unmapped += self.clear_pages(pa, count, at, flush);
                    at += count << g.granule_log2;
                    break;
                }
                let value = self.mem.load64(pa);
                if !g.is_table(level, value) {
                    if value & VALID != 0 && (at & (size - 1) != 0 || end - at < size) {
                        // Only the first entry: ranges of several runs have been checked before any change.
                        return Err(self.partial(at & !(size - 1), size));
                    }
                    let (next, bytes) = self.clear_blocks(Entry { pa, level, value }, at, end, flush);
                    at = next;
                    unmapped += bytes;
                    break;
                }
                if at & (size - 1) == 0 && end - at >= size {
                    unmapped += self.detach(Entry { pa, level, value }, at, flush);
                    at += size;
                    break;
                }
                table = g.next(value);
                level += 1;
            }
        }
        Ok(unmapped)
    }

    /// True if a range may begin and end in different leaves that are larger than a page.
    #[inline]
    pub(crate) fn crosses_tables(&self, offset: u64, end: u64) -> bool {
        (offset ^ (end - 1)) >> self.geometry.table_shift != 0
    }

    /// Clears an entry of a last-level table.
    #[inline(always)]
    fn clear_page(&self, entry: Pa, at: u64, flush: &mut impl Flush) -> u64 {
        if self.mem.load64(entry) & VALID == 0 {
            return 0;
        }
        self.mem.store64(entry, 0);
        self.publish(entry, 1);
        self.mem.wmb();
        let granule = self.geometry.granule();
        flush.leaf(self.input(at), granule, granule);
        granule
    }

    /// Clears `count` entries of a last-level table.
    #[inline]
    fn clear_pages(&self, entry: Pa, count: u64, at: u64, flush: &mut impl Flush) -> u64 {
        if count == 1 {
            return self.clear_page(entry, at, flush);
        }
        let granule = self.geometry.granule();
        let valid = self.count_valid(entry, count);
        if valid == 0 {
            return 0;
        }
        self.mem.store_run(entry, count as usize, 0, 0);
        self.publish(entry, count);
        self.mem.wmb();
        flush.leaf(self.input(at), count * granule, granule);
        valid * granule
    }

    fn count_valid(&self, entry: Pa, count: u64) -> u64 {
        let mut valid = 0;
        let Ok(()) = self.each_chunk(entry, count, |_, words| {
            valid += words.iter().map(|word| word & VALID).sum::<u64>();
            Ok::<_, core::convert::Infallible>(())
        });
        valid
    }

    /// Clears blocks and skips holes from `first` on, up to a table, the end of this table, or the end of the range.
    /// Gives where it stopped and the bytes that were mapped.
    fn clear_blocks(&self, first: Entry, at: u64, end: u64, flush: &mut impl Flush) -> (u64, u64) {
        let g = &self.geometry;
        let (level, size) = (first.level, g.size(first.level));
        let start = at & !(size - 1);
        let limit = g.entries(level) - g.index(level, at);
        let mut count = 0;
        let mut cleared = 0;
        let mut last = 0;
        while count < limit && start + (count << g.shift(level)) < end {
            let entry = first.pa.wrapping_add(count * 8);
            let value = if count == 0 { first.value } else { self.mem.load64(entry) };
            if g.is_table(level, value) {
                break;
            }
            // Failing means that somebody else changed the entry, and has to answer for it.
            if value & VALID != 0 && self.mem.cas64(entry, value, 0).is_ok() {
                cleared += 1;
                last = count + 1;
            }
            count += 1;
        }
        if cleared > 0 {
            self.publish(first.pa, last);
            self.mem.wmb();
            flush.leaf(self.input(start), last << g.shift(level), size);
        }
        (end.min(start + (count << g.shift(level))), cleared << g.shift(level))
    }

    /// Takes a table out, flushes what it translated, frees it and all below it. Gives the bytes that were mapped.
    fn detach(&self, entry: Entry, at: u64, flush: &mut impl Flush) -> u64 {
        let g = &self.geometry;
        if self.mem.cas64(entry.pa, entry.value, 0).is_err() {
            return 0;
        }
        if entry.level + 1 < LAST {
            self.forget_tops();
        }
        self.publish(entry.pa, 1);
        self.mem.wmb();
        flush.table(self.input(at), g.size(entry.level));
        let mut bytes = 0;
        self.for_each_table(g.next(entry.value), entry.level + 1, &mut |table, level| {
            if level == LAST {
                bytes += self.count_valid(Pa(table), g.entries(level)) << g.granule_log2;
            } else {
                for index in 0..g.entries(level) {
                    let value = self.mem.load64(Pa(table + index * 8));
                    if value & VALID != 0 && !g.is_table(level, value) {
                        bytes += g.size(level);
                    }
                }
            }
            self.free_table(table);
        });
        bytes
    }
}
