//! Changing what existing mappings allow.

use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;

use crate::geometry::VALID;
use crate::table::{CHUNK, PageTable};
use crate::{Flush, Prot, ProtectError, Stage};

/// Neighbouring leaves in one table, as they are.
struct Leaves {
    entry: Pa,
    level: u32,
    /// Offset of the first.
    at: u64,
    count: usize,
    words: [u64; CHUNK],
}

impl<S: Stage, M: DmaMemory> PageTable<S, M> {
    /// Gives every mapping of `[iova, iova + len)` the protection `prot`; addresses stay.
    ///
    /// All of the range must be mapped, and blocks must be inside of it as a whole; otherwise nothing changes.
    /// Permissions change in place and are reported by `flush.leaf`. Where the memory type changes, the old leaves
    /// are taken out and flushed by `flush.table` before the new ones go in (break-before-make): a device that
    /// accesses the range at that moment faults.
    pub fn protect(
        &self,
        iova: S::Input,
        len: u64,
        prot: Prot<S>,
        flush: &mut impl Flush,
    ) -> Result<(), ProtectError> {
        let offset = self.check_range(iova, len)?;
        if !prot.read && !prot.write {
            return Err(ProtectError::NoAccess);
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            at = self.end_of(&self.leaves(at, end)?);
        }
        let attributes = S::leaf_bits(prot);
        at = offset;
        while at < end {
            let leaves = self.leaves(at, end)?;
            self.change(&leaves, attributes, flush);
            at = self.end_of(&leaves);
        }
        Ok(())
    }

    fn end_of(&self, leaves: &Leaves) -> u64 {
        leaves.at + ((leaves.count as u64) << self.geometry.shift(leaves.level))
    }

    /// Reads the leaves from `at` on, as many as one table and one chunk have.
    fn leaves(&self, at: u64, end: u64) -> Result<Leaves, ProtectError> {
        let g = &self.geometry;
        let first = self.leaf_entry(at);
        let (level, size) = (first.level, g.size(first.level));
        if first.value & VALID == 0 {
            return Err(ProtectError::NotMapped { iova: self.input(at) });
        }
        if at & (size - 1) != 0 || end - at < size {
            return Err(self.partial(at & !(size - 1), size).into());
        }
        let limit = ((end - at) >> g.shift(level)).min(g.entries(level) - g.index(level, at));
        let mut words = [0; CHUNK];
        let count = (limit as usize).min(CHUNK);
        self.mem.load_run(first.pa, &mut words[..count]);
        let is_leaf = |&word: &u64| word & VALID != 0 && !g.is_table(level, word);
        let leaves = words[..count].iter().take_while(|word| is_leaf(word)).count();
        if leaves == 0 {
            // Only if somebody unmaps the range at this moment.
            return Err(ProtectError::NotMapped { iova: self.input(at) });
        }
        Ok(Leaves { entry: first.pa, level, at, count: leaves, words })
    }

    fn change(&self, leaves: &Leaves, attributes: u64, flush: &mut impl Flush) {
        let g = &self.geometry;
        let &Leaves { entry, level, at, count, ref words } = leaves;
        let size = g.size(level);
        let len = (count as u64) << g.shift(level);
        let new = |word| g.output(level, word) | attributes | g.leaf_type(level);
        let words = &words[..count];
        if words.iter().all(|&word| word == new(word)) {
            return;
        }
        let incompatible = words.iter().any(|&word| (word ^ attributes) & S::BREAK_BITS != 0);
        if incompatible {
            self.mem.store_run(entry, count, 0, 0);
            self.publish(entry, count as u64);
            self.mem.wmb();
            flush.table(self.input(at), len);
        }
        for (i, &word) in words.iter().enumerate() {
            self.mem.store64(entry.wrapping_add(i as u64 * 8), new(word));
        }
        self.publish(entry, count as u64);
        self.mem.wmb();
        if !incompatible {
            flush.leaf(self.input(at), len, size);
        }
    }
}
