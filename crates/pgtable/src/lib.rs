//! The software side of page tables: map, unmap, protect and look up in the VMSAv8-64 format that Arm SMMUs walk.
//!
//! [`PageTable<Stage1, M>`](PageTable) translates [`Iova`](portcullis_arch::Iova) and
//! [`PageTable<Stage2, M>`](PageTable) translates [`Ipa`](portcullis_arch::Ipa), each to
//! [`Pa`](portcullis_arch::Pa), with tables in memory of any [`DmaMemory`](portcullis_hal::DmaMemory).
//!
//! | Covered | Not covered |
//! |---|---|
//! | 4K, 16K, 64K granules; input and output of up to 48 bits | 52-bit addresses (LPA, DS) |
//! | every page and block size of 48-bit tables, largest first | the contiguous hint |
//! | stage 1 for TTBR0 or TTBR1; stage 2 with concatenated first tables | AArch32 short and long formats |
//! | walkers that are coherent with the CPU, and walkers that are not | hardware dirty state (DBM) |
//!
//! Descriptors carry the values Linux writes (`io-pgtable-arm`), so that a dump of one is a dump of the other.
//! Calls on disjoint ranges may run at the same time without a lock; see [`PageTable`] for what happens when
//! ranges overlap. Start with [`Config`], then [`PageTable::new`], then [`PageTable::registers`] for what to
//! write to the hardware; [`Flush`] is how unmapping reaches the TLBs.
//!
//! ```
//! use std::sync::Arc;
//!
//! use portcullis_arch::{Iova, Pa};
//! use portcullis_hal::fake::FakeMemory;
//! use portcullis_pgtable::{Config, Granule, NoFlush, PageTable, Prot, Stage1};
//!
//! let memory = Arc::new(FakeMemory::plain(0x8000_0000, 1 << 20));
//! let config = Config::<Stage1>::new(Granule::K4, 48, 48);
//! let table = PageTable::new(memory, config).unwrap();
//! table.map(Iova(0x7000_0000), Pa(0x6000_0000), 0x1000, Prot::RW).unwrap();
//! assert_eq!(table.lookup(Iova(0x7000_0042)).unwrap().pa, Pa(0x6000_0042));
//! assert_eq!(table.unmap(Iova(0x7000_0000), 0x1000, &mut NoFlush), Ok(0x1000));
//! ```
#![no_std]
#![forbid(unsafe_code)]

mod config;
mod error;
mod flush;
mod geometry;
mod map;
mod prot;
mod protect;
mod stage;
mod table;
mod unmap;

pub use config::{Concatenation, Config, Granule, Half};
pub use error::{ConfigError, MapError, ProtectError, UnmapError};
pub use flush::{Flush, LazyFlush, NoFlush};
pub use prot::{MemoryKind, Prot};
pub use stage::{InputAddress, MAIR, Stage, Stage1, Stage1Registers, Stage2, Stage2Registers};
pub use table::{Mapping, PageTable};
