//! What the bits mean: register maps, in-memory records and descriptors of the hardware that Portcullis
//! models and drives.
//!
//! This crate is `no_std`, holds types and tables only, and has no behaviour: a model and a driver that both
//! use it can still disagree about what the hardware *does*, which is the point. Start with [`addr`] for the
//! address spaces, [`attrs`] for what travels with a transaction, [`smmuv2`] for the SMMU's registers and
//! [`vmsa`] for page-table descriptors; [`zdma`], [`axidma`] and [`plwriter`] are DMA engines and [`zynqmp`] is the chip
//! that holds them.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod attrs;
pub mod axidma;
pub mod gem;
pub mod plwriter;
pub mod smmuv2;
pub mod smmuv3;
pub mod testdev;
pub mod vmsa;
pub mod zdma;
pub mod zynqmp;

pub use addr::{Asid, Iova, Ipa, Pa, StreamId, SubstreamId, Vmid};
pub use attrs::{Access, Attributes, MemoryType, Shareability};
