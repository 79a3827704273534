//! What can be wrong with a request. Addresses are input addresses of the table (an IOVA or an IPA) unless named pa.

use thiserror::Error;

use crate::Granule;

/// A configuration no table can be built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// The input size has no legal walk.
    #[error("input addresses of {bits} bits are not possible with a {granule} granule; 25 to {max} are")]
    InputBits {
        /// What was asked for.
        bits: u8,
        /// With this granule.
        granule: Granule,
        /// The widest possible.
        max: u8,
    },
    /// The output size has no encoding.
    #[error("output addresses of {bits} bits have no encoding; 32, 36, 40, 42, 44 and 48 have")]
    OutputBits {
        /// What was asked for.
        bits: u8,
    },
    /// The walk cannot start one level lower, or must.
    #[error(
        "a {granule} stage 2 table of {bits} input bits has {entries} entries at its first level {level}: concatenation \
         of tables at the next level is not possible as asked for (1 < entries <= 16)"
    )]
    Concatenation {
        /// Granule asked for.
        granule: Granule,
        /// Input bits asked for.
        bits: u8,
        /// The start level without concatenation.
        level: u8,
        /// Entries in the first table without concatenation.
        entries: u64,
    },
    /// No memory for the first table.
    #[error("no memory for a first table of {bytes} bytes")]
    NoMemory {
        /// The size.
        bytes: u64,
    },
    /// The platform's memory for tables lies where the walker cannot reach.
    #[error("the table at pa {pa:#x} does not fit into {bits} address bits")]
    TableAddress {
        /// Where the platform put it.
        pa: u64,
        /// Output bits of the configuration.
        bits: u8,
    },
}

/// A range that was not mapped. Nothing of the call stays, except empty tables that the next call uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MapError {
    /// An address or the length is not a multiple of the granule, or the length is zero.
    #[error(
        "iova {iova:#x}, pa {pa:#x} and length {len:#x} must be multiples of {granule:#x}, the length not zero"
    )]
    Unaligned {
        /// Input address.
        iova: u64,
        /// Output address.
        pa: u64,
        /// Length in bytes.
        len: u64,
        /// Granule in bytes.
        granule: u64,
    },
    /// Not all of the range is an input of this table.
    #[error("iova {iova:#x}+{len:#x} is outside of this table, which translates {first:#x}..={last:#x}")]
    InputRange {
        /// Input address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the table.
        first: u64,
        /// Last address of the table.
        last: u64,
    },
    /// Not all of the memory can be expressed as an output.
    #[error("pa {pa:#x}+{len:#x} does not fit into {bits} output bits")]
    OutputRange {
        /// Output address.
        pa: u64,
        /// Length in bytes.
        len: u64,
        /// Output bits of the table.
        bits: u8,
    },
    /// Neither reads nor writes were asked for.
    #[error("a mapping needs read or write permission")]
    NoAccess,
    /// There is a mapping already.
    #[error("iova {iova:#x} is mapped already")]
    AlreadyMapped {
        /// The first such address in the range.
        iova: u64,
    },
    /// No memory for a table.
    #[error("no memory for a page table for iova {iova:#x}")]
    NoMemory {
        /// The address it was for.
        iova: u64,
    },
    /// The platform's memory for tables lies where the walker cannot reach.
    #[error("the table at pa {pa:#x} does not fit into {bits} address bits")]
    TableAddress {
        /// Where the platform put it.
        pa: u64,
        /// Output bits of the table.
        bits: u8,
    },
    /// An overlapping call ran at the same time. Only this error leaves parts of the range mapped: unmap the range.
    #[error("iova {iova:#x} was changed by another call at the same time")]
    Raced {
        /// Where it was noticed.
        iova: u64,
    },
}

/// A range that was not unmapped; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum UnmapError {
    /// The address or the length is not a multiple of the granule, or the length is zero.
    #[error("iova {iova:#x} and length {len:#x} must be multiples of {granule:#x}, the length not zero")]
    Unaligned {
        /// Input address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Granule in bytes.
        granule: u64,
    },
    /// Not all of the range is an input of this table.
    #[error("iova {iova:#x}+{len:#x} is outside of this table, which translates {first:#x}..={last:#x}")]
    InputRange {
        /// Input address.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// First address of the table.
        first: u64,
        /// Last address of the table.
        last: u64,
    },
    /// The range begins or ends inside of a block. Blocks are not split: unmap the whole block.
    #[error("the range begins or ends inside of the block {block:#x}+{size:#x}, which cannot be split")]
    PartialBlock {
        /// First address of the block.
        block: u64,
        /// Its size in bytes.
        size: u64,
    },
}

/// A range whose protection was not changed; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProtectError {
    /// The range is not acceptable, for the same reasons as for unmapping.
    #[error(transparent)]
    Range(#[from] UnmapError),
    /// There is a hole in the range.
    #[error("iova {iova:#x} is not mapped")]
    NotMapped {
        /// The first address of it.
        iova: u64,
    },
    /// Neither reads nor writes were asked for; unmap instead.
    #[error("a mapping needs read or write permission")]
    NoAccess,
}
