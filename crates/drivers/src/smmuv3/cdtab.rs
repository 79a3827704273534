//! Tables of context descriptors, one per stream with substreams: linear, or two levels with leaves of 1024.

use alloc::collections::BTreeMap;

use portcullis_arch::smmuv3::L1Cd;
use portcullis_arch::smmuv3::cd::{CD_BYTES, L1CD_BYTES};
use portcullis_arch::{Pa, SubstreamId};
use portcullis_hal::{Block, DmaMemory};

use super::strtab::{Place, allocate};
use super::{Error, Features};

/// Substream bits below the first level: leaves of 64 KiB (Linux `CTXDESC_L2_ENTRIES`).
const SPLIT: u8 = 10;

/// STE.S1Fmt.
const LINEAR: u8 = 0;
const TWO_LEVEL_64K: u8 = 2;

/// The context descriptors of a stream.
#[derive(Debug)]
pub struct CdTable<M: DmaMemory> {
    memory: M,
    coherent: bool,
    output_bits: u8,
    substream_bits: u8,
    base: Block,
    /// Leaves by the number of their descriptor; `None` for a linear table.
    leaves: Option<BTreeMap<u32, Block>>,
    kept: bool,
}

impl<M: DmaMemory> CdTable<M> {
    /// A table for substream ids of `substream_bits` bits, all of whose descriptors are invalid. Linear up to 1024 of
    /// them, or if the SMMU has no other.
    pub fn new(memory: M, features: &Features, coherent: bool, substream_bits: u8) -> Result<Self, Error> {
        let two_level = features.two_level_cd && substream_bits > SPLIT;
        let bytes =
            if two_level { L1CD_BYTES << (substream_bits - SPLIT) } else { CD_BYTES << substream_bits };
        let base = allocate(&memory, "a context descriptor table", bytes, 64, features.output_bits)?;
        if !coherent {
            memory.clean(base.pa, base.len);
        }
        memory.wmb();
        Ok(Self {
            memory,
            coherent,
            output_bits: features.output_bits,
            substream_bits,
            base,
            leaves: two_level.then(BTreeMap::new),
            kept: false,
        })
    }

    /// Drop frees nothing, because the SMMU may go on using it.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// STE.S1ContextPtr.
    pub fn base(&self) -> Pa {
        self.base.pa
    }
    /// STE.S1Fmt.
    pub fn format(&self) -> u8 {
        if self.leaves.is_some() { TWO_LEVEL_64K } else { LINEAR }
    }
    /// STE.S1CDMax.
    pub fn substream_bits(&self) -> u8 {
        self.substream_bits
    }
    /// The descriptor of a substream that is in range, if there is memory for it already.
    pub fn find(&self, substream: SubstreamId) -> Option<Pa> {
        let id = substream.get();
        if u64::from(id) >> self.substream_bits != 0 {
            return None;
        }
        let (array, index) = match &self.leaves {
            None => (self.base, id),
            Some(leaves) => (*leaves.get(&(id >> SPLIT))?, id & ((1 << SPLIT) - 1)),
        };
        Some(array.pa.wrapping_add(u64::from(index) * CD_BYTES))
    }

    /// The descriptor of a substream that is in range; makes its leaf on first use. Where the place is fresh, the caller
    /// has the SMMU forget the level 1 descriptor (CMD_CFGI_CD with Leaf = 0), since an invalid one may be cached.
    pub fn place(&mut self, substream: SubstreamId) -> Result<Place, Error> {
        if let Some(at) = self.find(substream) {
            return Ok(Place { at, fresh: false });
        }
        let (number, index) = (substream.get() >> SPLIT, substream.get() & ((1 << SPLIT) - 1));
        let bytes = CD_BYTES << SPLIT;
        let what = "a leaf of a context descriptor table";
        let leaf = allocate(&self.memory, what, bytes, bytes, self.output_bits)?;
        self.publish(leaf.pa, leaf.len);
        // The leaf is there before the descriptor says so.
        self.memory.wmb();
        let at = self.base.pa.wrapping_add(u64::from(number) * L1CD_BYTES);
        let descriptor = L1Cd::new().with_v(true).with_l2ptr_55_12(leaf.pa.get() >> 12).into_bits();
        self.memory.store64(at, descriptor);
        self.publish(at, L1CD_BYTES as usize);
        self.memory.wmb();
        if let Some(leaves) = &mut self.leaves {
            leaves.insert(number, leaf);
        }
        Ok(Place { at: leaf.pa.wrapping_add(u64::from(index) * CD_BYTES), fresh: true })
    }

    fn publish(&self, at: Pa, len: usize) {
        if !self.coherent {
            self.memory.clean(at, len);
        }
    }
}

impl<M: DmaMemory> Drop for CdTable<M> {
    /// No STE points to it any more.
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for (_, leaf) in core::mem::take(&mut self.leaves).into_iter().flatten() {
            self.memory.free(leaf);
        }
        self.memory.free(self.base);
    }
}
