//! The contiguous runs that a port remembers.

use portcullis_arch::{Access, Attributes, Pa};

use crate::tbu::Translated;

/// Several pages whose output is contiguous: one entry for what the TLB has several of, so that a copy looks up a buffer and
/// not each of its pages. Every invalidation, whatever it names, forgets all of them.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    pub(crate) key: [u64; 2],
    pub(crate) access: Access,
    pub(crate) va: u64,
    pub(crate) len: u64,
    pub(crate) pa: Pa,
    pub(crate) attrs: Attributes,
}

/// The runs that a port remembers.
#[derive(Default)]
pub(crate) struct KnownRuns {
    runs: [Option<Known>; KNOWN_RUNS],
    next: usize,
}

impl KnownRuns {
    /// What is left of a run from `va` on.
    #[inline]
    pub(crate) fn find(&self, key: [u64; 2], va: u64, access: Access) -> Option<Translated> {
        self.runs.iter().flatten().find_map(|run| {
            let offset = va.wrapping_sub(run.va);
            let same = run.key == key && run.access == access && offset < run.len;
            same.then(|| Translated {
                pa: run.pa.wrapping_add(offset),
                left: run.len - offset,
                attrs: run.attrs,
            })
        })
    }
    pub(crate) fn remember(&mut self, known: Known) {
        // A longer run takes the place of its beginning.
        let begins = |run: &Option<Known>| {
            run.is_some_and(|r| r.key == known.key && r.access == known.access && r.va == known.va)
        };
        let at = self.runs.iter().position(begins).unwrap_or(self.next);
        self.next = (at + 1) % KNOWN_RUNS;
        if let Some(place) = self.runs.get_mut(at) {
            *place = Some(known);
        }
    }
    pub(crate) fn forget(&mut self) {
        self.runs = [None; KNOWN_RUNS];
    }
}

/// Runs that a port remembers: source and destination of two copies.
const KNOWN_RUNS: usize = 4;
