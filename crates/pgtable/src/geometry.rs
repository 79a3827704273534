//! The shape of a table: levels, indices, block sizes (facts: DDI 0487 D8.2, Linux `arm_lpae_alloc_pgtable`).

use crate::{Concatenation, Config, ConfigError, Granule, Half, Stage};

/// log2 of a descriptor's size.
const DESCRIPTOR_LOG2: u32 = 3;
/// Narrowest input without small translation tables (TxSZ = 39).
const MIN_INPUT_BITS: u8 = 25;
/// Widest addresses without 52-bit extensions.
const MAX_BITS: u8 = 48;
/// Output widths in the order of their IPS and PS codes.
const OUTPUT_BITS: [u8; 6] = [32, 36, 40, 42, 44, 48];
/// The last level of every walk.
pub(crate) const LAST: u32 = 3;

/// The type bits of descriptors.
pub(crate) const VALID: u64 = 1;
pub(crate) const TABLE: u64 = 3;
const PAGE: u64 = 3;
const BLOCK: u64 = 1;
/// A bit that hardware ignores: a table entry that a non-coherent walker is known to see (the bit Linux uses).
pub(crate) const SYNCED: u64 = 1 << 55;
/// Output and next-table addresses, before alignment.
const ADDRESS: u64 = (1 << MAX_BITS) - 1;

/// Everything about a table's shape that does not change. Offsets are input addresses minus the first one.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub granule_log2: u32,
    /// Index bits per level.
    pub stride: u32,
    /// The level of the first table.
    pub start: u32,
    /// The coarsest level with leaves.
    pub first_leaf: u32,
    /// Entries in the first table, concatenated ones counted together.
    pub root_entries: u64,
    /// log2 of what an entry of the first table covers.
    pub root_shift: u32,
    /// Index bits of a table that is not the first.
    pub index_mask: u64,
    /// Where a table descriptor has the next table's address.
    pub next_mask: u64,
    /// Bits of an address inside of a page.
    pub page_mask: u64,
    /// log2 of what a table of the last level translates.
    pub table_shift: u32,
    /// log2 of what a table above those translates.
    pub top_shift: u32,
    /// Bytes of the input range.
    pub input_size: u64,
    /// Bytes of the output range.
    pub output_size: u64,
    pub input_bits: u8,
    pub output_bits: u8,
    /// IPS or PS.
    pub output_code: u8,
    /// First input address.
    pub base: u64,
}

impl Geometry {
    pub fn new<S: Stage>(config: &Config<S>) -> Result<Self, ConfigError> {
        let Config { granule, input_bits, output_bits, .. } = *config;
        if !(MIN_INPUT_BITS..=MAX_BITS).contains(&input_bits) {
            return Err(ConfigError::InputBits { bits: input_bits, granule, max: MAX_BITS });
        }
        let code = OUTPUT_BITS.iter().position(|&bits| bits == output_bits);
        let output_code = code.ok_or(ConfigError::OutputBits { bits: output_bits })? as u8;
        let granule_log2 = granule.log2();
        let stride = granule_log2 - DESCRIPTOR_LOG2;
        let levels = (u32::from(input_bits) - granule_log2).div_ceil(stride);
        let start = LAST + 1 - levels;
        let mut geometry = Self {
            granule_log2,
            stride,
            start,
            first_leaf: start.max(if granule == Granule::K4 { 1 } else { 2 }),
            root_entries: 0,
            root_shift: 0,
            index_mask: (1 << stride) - 1,
            next_mask: ADDRESS & !(granule.size() - 1),
            page_mask: granule.size() - 1,
            table_shift: granule_log2 + stride,
            top_shift: granule_log2 + 2 * stride,
            input_size: 1 << input_bits,
            output_size: 1 << output_bits,
            input_bits,
            output_bits,
            output_code,
            base: match config.half {
                Half::Lower => 0,
                Half::Upper => u64::MAX << input_bits,
            },
        };
        geometry.root_entries = 1 << (u32::from(input_bits) - geometry.shift(start));
        if S::STAGE_2 {
            geometry.concatenate(granule, config.concatenation)?;
        }
        geometry.root_shift = geometry.shift(geometry.start);
        Ok(geometry)
    }

    /// Starts one level lower where the choice and the architecture want it.
    fn concatenate(&mut self, granule: Granule, choice: Concatenation) -> Result<(), ConfigError> {
        // No level 3 start with 4K pages (SL0 = 3 needs small translation tables).
        let lowest = if granule == Granule::K4 { LAST - 1 } else { LAST };
        let possible = (2..=16).contains(&self.root_entries) && self.start < lowest;
        // SL0 has no code for level 0 with 16K pages.
        let needed = granule == Granule::K16 && self.start == 0;
        let wanted = match choice {
            Concatenation::Linux => self.start == 0 && possible,
            Concatenation::Forced => true,
            Concatenation::Never => false,
        };
        if wanted != possible && (wanted || needed) || needed && !wanted {
            return Err(ConfigError::Concatenation {
                granule,
                bits: self.input_bits,
                level: self.start as u8,
                entries: self.root_entries,
            });
        }
        if wanted {
            self.start += 1;
            self.root_entries <<= self.stride;
            self.first_leaf = self.first_leaf.max(self.start);
        }
        Ok(())
    }

    /// SL0 of VTCR: 4K 2 - start, else 3 - start.
    pub fn sl0(&self, granule: Granule) -> u8 {
        let top = if granule == Granule::K4 { 2 } else { 3 };
        u32::saturating_sub(top, self.start) as u8
    }

    /// log2 of what one entry of `level` covers.
    #[inline]
    pub fn shift(&self, level: u32) -> u32 {
        self.granule_log2 + (LAST - level) * self.stride
    }

    /// What one entry of `level` covers, in bytes.
    #[inline]
    pub fn size(&self, level: u32) -> u64 {
        1 << self.shift(level)
    }

    #[inline]
    pub fn granule(&self) -> u64 {
        self.page_mask + 1
    }

    /// Bytes of the first table.
    pub fn root_len(&self) -> u64 {
        self.root_entries << DESCRIPTOR_LOG2
    }

    /// Bytes of every other table.
    #[inline]
    pub fn table_len(&self) -> u64 {
        self.granule()
    }

    /// Entries of a table at `level`.
    #[inline]
    pub fn entries(&self, level: u32) -> u64 {
        if level == self.start { self.root_entries } else { 1 << self.stride }
    }

    /// Index of an offset in its table at `level`.
    #[inline]
    pub fn index(&self, level: u32, offset: u64) -> u64 {
        (offset >> self.shift(level)) & (self.entries(level) - 1)
    }

    /// True if a valid descriptor at `level` points to a table.
    #[inline]
    pub fn is_table(&self, level: u32, descriptor: u64) -> bool {
        level < LAST && descriptor & TABLE == TABLE
    }

    /// The table a descriptor points to.
    #[inline]
    pub fn next(&self, descriptor: u64) -> u64 {
        descriptor & self.next_mask
    }

    /// The output address of a leaf at `level`.
    #[inline]
    pub fn output(&self, level: u32, descriptor: u64) -> u64 {
        descriptor & ADDRESS & !(self.size(level) - 1)
    }

    /// The type bits of a leaf at `level`.
    #[inline]
    pub fn leaf_type(&self, level: u32) -> u64 {
        if level == LAST { PAGE } else { BLOCK }
    }

    /// The coarsest level whose leaves fit at `offset` and `pa` and are not longer than `len`.
    #[inline]
    pub fn leaf_level(&self, offset: u64, pa: u64, len: u64) -> u32 {
        let mut level = LAST;
        while level > self.first_leaf {
            let size = self.size(level - 1);
            if len < size || (offset | pa) & (size - 1) != 0 {
                break;
            }
            level -= 1;
        }
        level
    }

    /// True if all of `[offset, offset + len)` is an input.
    #[inline]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        within(offset, len, self.input_size)
    }

    /// True if all of `[pa, pa + len)` is an output.
    #[inline]
    pub fn puts_out(&self, pa: u64, len: u64) -> bool {
        within(pa, len, self.output_size)
    }

    /// First and last input address.
    pub fn limits(&self) -> (u64, u64) {
        (self.base, self.base.wrapping_add((1 << self.input_bits) - 1))
    }
}

/// True if all of `[start, start + len)` is below `end`.
#[inline]
fn within(start: u64, len: u64, end: u64) -> bool {
    start < end && len <= end - start
}
