//! The stream table: linear, or two levels with 256 entries in each array of the second.
//!
//! Every entry that exists aborts until somebody makes it something else, so that an unknown stream never gets through.

use alloc::collections::BTreeMap;

use portcullis_arch::smmuv3::regs::{StrtabBase, StrtabBaseCfg};
use portcullis_arch::smmuv3::ste::{L1STD_BYTES, STE_BYTES, SteDw0};
use portcullis_arch::smmuv3::{L1Std, Ste};
use portcullis_arch::{Pa, StreamId};
use portcullis_hal::{Block, DmaMemory};

use super::entry::Live;
use super::{Error, Features};

/// StreamID bits below the first level (Linux `STRTAB_SPLIT`).
const SPLIT: u8 = 8;
/// L1STD.Span of an array with 2^SPLIT entries.
const SPAN: u8 = SPLIT + 1;
/// First-level descriptors at most: 1 MiB of them.
const MAX_L1_LOG2: u8 = 17;

/// An STE that aborts without an event.
pub fn abort_ste() -> Ste {
    Ste::default().with_dw0(SteDw0::new().with_v(true))
}

/// Where the entry of a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The STE.
    pub at: Pa,
    /// It is in an array that has just been made: level 1 descriptors that the SMMU has cached are out of date.
    pub fresh: bool,
}

/// The stream table of one SMMU.
#[derive(Debug)]
pub struct StreamTable<M: DmaMemory> {
    memory: M,
    coherent: bool,
    output_bits: u8,
    stream_bits: u8,
    base: Block,
    /// Second-level arrays by the number of their descriptor; `None` for a linear table.
    arrays: Option<BTreeMap<u32, Block>>,
    kept: bool,
}

impl<M: DmaMemory> StreamTable<M> {
    /// A table for stream ids of `stream_bits` bits, all of whose entries abort.
    pub fn new(memory: M, features: &Features, coherent: bool, stream_bits: u8) -> Result<Self, Error> {
        let bits = stream_bits.min(features.stream_bits);
        let two_level = features.two_level_streams && bits > SPLIT;
        let bits = if two_level { bits.min(SPLIT + MAX_L1_LOG2) } else { bits.min(MAX_L1_LOG2) };
        let bytes = if two_level { L1STD_BYTES << (bits - SPLIT) } else { STE_BYTES << bits };
        let table = Self {
            base: allocate(&memory, "the stream table", bytes, 64, features.output_bits)?,
            memory,
            coherent,
            output_bits: features.output_bits,
            stream_bits: bits,
            arrays: two_level.then(BTreeMap::new),
            kept: false,
        };
        if two_level {
            table.publish(table.base.pa, table.base.len);
        } else {
            table.fill(table.base);
        }
        table.memory.wmb();
        Ok(table)
    }

    /// Stream ids that the table has room for, as bits.
    pub fn stream_bits(&self) -> u8 {
        self.stream_bits
    }
    /// True for two levels.
    pub fn is_two_level(&self) -> bool {
        self.arrays.is_some()
    }

    /// Drop frees nothing, because the SMMU may go on using it.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// STRTAB_BASE.
    pub fn base_register(&self) -> u64 {
        StrtabBase::new().with_addr_55_6(self.base.pa.get() >> 6).with_ra(true).into_bits()
    }

    /// STRTAB_BASE_CFG.
    pub fn config_register(&self) -> u32 {
        let config = StrtabBaseCfg::new().with_log2size(self.stream_bits);
        if self.is_two_level() { config.with_fmt(1).with_split(SPLIT) } else { config }.into_bits()
    }

    /// Refuses a stream id that is out of range.
    pub fn check(&self, stream: StreamId) -> Result<(), Error> {
        if u64::from(stream.get()) >> self.stream_bits == 0 {
            Ok(())
        } else {
            Err(Error::StreamRange { stream, bits: self.stream_bits })
        }
    }

    /// The entry of a stream, if there is memory for it already.
    pub fn find(&self, stream: StreamId) -> Option<Pa> {
        self.check(stream).ok()?;
        let (array, index) = match &self.arrays {
            None => (self.base, stream.get()),
            Some(arrays) => (*arrays.get(&(stream.get() >> SPLIT))?, stream.get() & ((1 << SPLIT) - 1)),
        };
        Some(array.pa.wrapping_add(u64::from(index) * STE_BYTES))
    }

    /// The entry of a stream; makes its second-level array on first use. Where the place is fresh, the caller has the
    /// SMMU forget the level 1 descriptor (CMD_CFGI_STE with Leaf = 0), since an invalid one may be cached.
    pub fn place(&mut self, stream: StreamId) -> Result<Place, Error> {
        self.check(stream)?;
        if let Some(at) = self.find(stream) {
            return Ok(Place { at, fresh: false });
        }
        let number = stream.get() >> SPLIT;
        let bytes = STE_BYTES << SPLIT;
        let what = "an array of stream table entries";
        let array = allocate(&self.memory, what, bytes, bytes, self.output_bits)?;
        self.fill(array);
        // The array is there before the descriptor says so.
        self.memory.wmb();
        let descriptor = L1Std::new().with_span(SPAN).with_l2ptr_55_6(array.pa.get() >> 6).into_bits();
        let at = self.base.pa.wrapping_add(u64::from(number) * L1STD_BYTES);
        self.memory.store64(at, descriptor);
        self.publish(at, L1STD_BYTES as usize);
        self.memory.wmb();
        if let Some(arrays) = &mut self.arrays {
            arrays.insert(number, array);
        }
        let index = u64::from(stream.get() & ((1 << SPLIT) - 1));
        Ok(Place { at: array.pa.wrapping_add(index * STE_BYTES), fresh: true })
    }

    /// An entry or a context descriptor at a place, for updates.
    pub fn live(&self, at: Pa) -> Live<'_, M> {
        Live::new(&self.memory, at, self.coherent)
    }

    fn fill(&self, array: Block) {
        let words = abort_ste().0;
        for entry in (0..array.len as u64).step_by(STE_BYTES as usize) {
            for (index, word) in words.into_iter().enumerate().filter(|(_, word)| *word != 0) {
                self.memory.store64(array.pa.wrapping_add(entry + index as u64 * 8), word);
            }
        }
        self.publish(array.pa, array.len);
    }

    fn publish(&self, at: Pa, len: usize) {
        if !self.coherent {
            self.memory.clean(at, len);
        }
    }
}

impl<M: DmaMemory> Drop for StreamTable<M> {
    /// The SMMU must not use it any more.
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for (_, array) in core::mem::take(&mut self.arrays).into_iter().flatten() {
            self.memory.free(array);
        }
        self.memory.free(self.base);
    }
}

/// Zeroed memory for a table, aligned to its size (a power of two) but at least to `align`.
pub fn allocate<M: DmaMemory>(
    memory: &M,
    what: &'static str,
    bytes: u64,
    align: u64,
    output_bits: u8,
) -> Result<Block, Error> {
    let no_memory = Error::NoMemory { what, bytes: usize::try_from(bytes).unwrap_or(usize::MAX) };
    let len = usize::try_from(bytes.max(align)).map_err(|_| no_memory)?;
    let align = len.checked_next_power_of_two().ok_or(no_memory)?;
    let block = memory.alloc(len, align).ok_or(no_memory)?;
    let pa = block.pa.get();
    if pa.checked_add(len as u64 - 1).is_some_and(|last| last >> output_bits == 0) {
        return Ok(block);
    }
    memory.free(block);
    Err(Error::TableAddress { what, pa, bits: output_bits })
}
