//! Mapping.
//!
//! A range is a sequence of runs: neighbouring leaves in one table. A call whose range is one run checks the run's
//! entries and stores them. A longer call first makes all tables and checks all runs, then stores: a call that fails
//! has shown nothing to the hardware, so there is nothing to take back and nothing to flush.

use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;

use crate::geometry::{LAST, SYNCED, TABLE, VALID};
use crate::stage::InputAddress;
use crate::table::PageTable;
use crate::{MapError, Prot, Stage};

/// Neighbouring leaves in one table.
#[derive(Clone, Copy)]
struct Run {
    entry: Pa,
    level: u32,
    count: u64,
    /// The table was made for this run, so its entries are known to be free.
    fresh: bool,
}

impl<S: Stage, M: DmaMemory> PageTable<S, M> {
    /// Maps `[iova, iova + len)` to `[pa, pa + len)` with the largest pages that both addresses and the length allow.
    ///
    /// All or nothing: on an error no translation of the call stays (empty tables may). Replaces nothing: an existing
    /// mapping anywhere in the range is [`MapError::AlreadyMapped`]. Needs no flush, since invalid entries are not
    /// cached; when it returns, a barrier has made the mapping visible to the walker.
    pub fn map(&self, iova: S::Input, pa: Pa, len: u64, prot: Prot<S>) -> Result<(), MapError> {
        let offset = self.check_map(iova, pa, len, prot)?;
        let attributes = S::leaf_bits(prot);
        let pa = pa.get();
        // One page in a table that exists: what most calls are about.
        if len == self.geometry.granule()
            && let Some(entry) = self.page_entry(offset)
        {
            let run = Run { entry, level: LAST, count: 1, fresh: false };
            self.check_free_page(run.entry, offset)?;
            self.commit(run, offset, pa, attributes)?;
            self.mem.wmb();
            return Ok(());
        }
        self.map_more(offset, pa, len, attributes)
    }

    #[inline(never)]
    fn map_more(&self, offset: u64, pa: u64, len: u64, attributes: u64) -> Result<(), MapError> {
        if let Some(mut run) = self.short_run(offset, len) {
            self.check_free(&mut run, offset)?;
            self.commit(run, offset, pa, attributes)?;
            self.mem.wmb();
            return Ok(());
        }
        self.map_runs(offset, pa, len, attributes)
    }

    /// The run, if the range is nothing but pages in one table that exists.
    #[inline]
    fn short_run(&self, offset: u64, len: u64) -> Option<Run> {
        let g = &self.geometry;
        if self.crosses_tables(offset, offset + len) || len >> g.table_shift != 0 {
            return None;
        }
        let entry = self.page_entry(offset)?;
        Some(Run { entry, level: LAST, count: len >> g.granule_log2, fresh: false })
    }

    fn map_runs(&self, offset: u64, pa: u64, len: u64, attributes: u64) -> Result<(), MapError> {
        let run = self.prepare(offset, pa, len)?;
        let mut done = run.count << self.geometry.shift(run.level);
        if done == len {
            self.commit(run, offset, pa, attributes)?;
        } else {
            while done < len {
                let run = self.prepare(offset + done, pa + done, len - done)?;
                done += run.count << self.geometry.shift(run.level);
            }
            done = 0;
            while done < len {
                let mut run = self.locate(offset + done, pa + done, len - done)?;
                if run.level < LAST {
                    self.check_free(&mut run, offset + done)?;
                }
                self.commit(run, offset + done, pa + done, attributes)?;
                done += run.count << self.geometry.shift(run.level);
            }
        }
        self.mem.wmb();
        Ok(())
    }

    #[inline]
    fn check_map(&self, iova: S::Input, pa: Pa, len: u64, prot: Prot<S>) -> Result<u64, MapError> {
        let g = &self.geometry;
        let offset = self.offset(iova);
        let (iova, pa) = (iova.get(), pa.get());
        if (offset | pa | len) & g.page_mask != 0 || len == 0 {
            return Err(MapError::Unaligned { iova, pa, len, granule: g.granule() });
        }
        if !g.contains(offset, len) {
            let (first, last) = g.limits();
            return Err(MapError::InputRange { iova, len, first, last });
        }
        if !g.puts_out(pa, len) {
            return Err(MapError::OutputRange { pa, len, bits: g.output_bits });
        }
        if !prot.read && !prot.write {
            return Err(MapError::NoAccess);
        }
        Ok(offset)
    }

    /// Makes the tables for the run at `offset` and checks that its entries are free.
    #[inline]
    fn prepare(&self, offset: u64, pa: u64, len: u64) -> Result<Run, MapError> {
        let mut run = self.locate(offset, pa, len)?;
        if !run.fresh {
            self.check_free(&mut run, offset)?;
        }
        Ok(run)
    }

    /// Walks to the first entry of the run at `offset`, making tables on the way.
    #[inline]
    fn locate(&self, offset: u64, pa: u64, len: u64) -> Result<Run, MapError> {
        let g = &self.geometry;
        let mut target = g.leaf_level(offset, pa, len);
        let mut table = self.root.get();
        let mut level = g.start;
        let mut fresh = false;
        loop {
            let index = g.index(level, offset);
            let entry = Pa(table + index * 8);
            if level == target {
                // Where a table hangs in place of a block, its smaller pages are used.
                if level == LAST || !g.is_table(level, self.mem.load64(entry)) {
                    let count = (len >> g.shift(level)).min(g.entries(level) - index);
                    return Ok(Run { entry, level, count, fresh });
                }
                target += 1;
            }
            let mut value = self.mem.load64(entry);
            fresh = false;
            if value & VALID == 0 {
                (value, fresh) = self.install(entry, value, offset)?;
            }
            if !g.is_table(level, value) {
                return Err(MapError::AlreadyMapped { iova: self.input(offset) });
            }
            if !self.coherent && value & SYNCED == 0 {
                // Somebody else has installed it just now and has perhaps not cleaned it yet.
                self.publish(entry, 1);
            }
            table = g.next(value);
            level += 1;
        }
    }

    /// Installs an empty table at an invalid entry, or takes the one somebody else installs first. Gives the entry's
    /// value and whether the table is ours.
    #[cold]
    fn install(&self, entry: Pa, seen: u64, offset: u64) -> Result<(u64, bool), MapError> {
        let g = &self.geometry;
        let len = g.table_len() as usize;
        let block = self.mem.alloc(len, len).ok_or(MapError::NoMemory { iova: self.input(offset) })?;
        let pa = block.pa.get();
        if !g.puts_out(pa, g.table_len()) {
            self.mem.free(block);
            return Err(MapError::TableAddress { pa, bits: g.output_bits });
        }
        if !self.coherent {
            self.mem.clean(block.pa, len);
        }
        // The table is visible as empty before an entry points to it.
        self.mem.wmb();
        let value = pa | TABLE;
        match self.mem.cas64(entry, seen, value) {
            Ok(()) if self.coherent => Ok((value, true)),
            Ok(()) => {
                self.publish(entry, 1);
                self.mem.wmb();
                let _changed_meanwhile = self.mem.cas64(entry, value, value | SYNCED);
                // The walker ignores the bit. Cleaned all the same, so that memory and cache agree for whoever compares.
                self.publish(entry, 1);
                Ok((value | SYNCED, true))
            }
            Err(theirs) => {
                self.mem.free(block);
                if theirs & VALID == 0 {
                    return Err(MapError::Raced { iova: self.input(offset) });
                }
                Ok((theirs, false))
            }
        }
    }

    /// Checks that a run's entries are free; ends it before an entry with a table.
    #[inline]
    fn check_free(&self, run: &mut Run, offset: u64) -> Result<(), MapError> {
        if run.count > 1 {
            return self.check_several(run, offset);
        }
        self.check_free_page(run.entry, offset)
    }

    /// The same for one entry.
    #[inline(always)]
    fn check_free_page(&self, entry: Pa, offset: u64) -> Result<(), MapError> {
        match self.mem.load64(entry) & VALID {
            0 => Ok(()),
            _ => Err(MapError::AlreadyMapped { iova: self.input(offset) }),
        }
    }

    fn check_several(&self, run: &mut Run, offset: u64) -> Result<(), MapError> {
        let g = &self.geometry;
        let (level, mut end) = (run.level, None);
        let checked = self.each_chunk(run.entry, run.count, |first, words| {
            if words.iter().fold(0, |any, word| any | word) & VALID == 0 {
                return Ok(());
            }
            for (&word, index) in words.iter().zip(first..) {
                if g.is_table(level, word) && index > 0 {
                    end = Some(index);
                    return Err(None);
                }
                if word & VALID != 0 {
                    let iova = self.input(offset + (index << g.shift(level)));
                    return Err(Some(MapError::AlreadyMapped { iova }));
                }
            }
            Ok(())
        });
        if let Some(index) = end {
            run.count = index;
        }
        match checked {
            Err(Some(error)) => Err(error),
            Ok(()) | Err(None) => Ok(()),
        }
    }

    /// Stores a run's descriptors. The barrier is the caller's.
    #[inline(always)]
    fn commit(&self, run: Run, offset: u64, pa: u64, attributes: u64) -> Result<(), MapError> {
        let first = pa | attributes | self.geometry.leaf_type(run.level);
        if run.count == 1 && run.level == LAST {
            self.mem.store64(run.entry, first);
            self.publish(run.entry, 1);
            return Ok(());
        }
        self.commit_several(run, offset, first)
    }

    fn commit_several(&self, run: Run, offset: u64, first: u64) -> Result<(), MapError> {
        let g = &self.geometry;
        let step = g.size(run.level);
        if run.level == LAST {
            self.mem.store_run(run.entry, run.count as usize, first, step);
        } else {
            // An entry here can become a table; a plain store could lose one.
            for index in 0..run.count {
                let at = index << g.shift(run.level);
                if self.mem.cas64(run.entry.wrapping_add(index * 8), 0, first + at).is_err() {
                    return Err(MapError::Raced { iova: self.input(offset + at) });
                }
            }
        }
        self.publish(run.entry, run.count);
        Ok(())
    }
}
