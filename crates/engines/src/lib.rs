//! Register-accurate models of DMA engines: the AXI DMA (system S0), the ZynqMP's ZDMA and the PL writer of the thesis
//! (system S2), the PCIe test device (system S3), and the translation cache that gives any of them ATS.
//!
//! An engine is programmed through [`portcullis_bus::mmio::Registers32`], works in bounded steps through
//! [`portcullis_bus::Engine`] and reaches memory through the [`portcullis_bus::DmaPort`] it was built with. It
//! owns no thread and no clock and keeps no log: whoever wants to see its transactions observes them at the port.
//! A transaction that the IOMMU stalls parks in the engine and goes on, exactly where it was, when it is retried.
//!
//! Start with [`zdma`] (one channel), [`axidma`], [`plwriter`] or [`testdev`], and with [`atc`] for ATS; each says in a table what it covers.
#![forbid(unsafe_code)]

pub mod atc;
pub mod axidma;
pub mod gem;
pub mod plwriter;
mod restore;
pub mod testdev;
#[cfg(test)]
mod testport;
pub mod zdma;

pub use atc::{AtcConfig, AtcPort, AtcShared, AtcState, AtcStats};
pub use axidma::{AxiDma, AxiDmaConfig, AxiDmaState, AxiDmaStreams};
pub use gem::{Gem, GemConfig};
pub use plwriter::{PlWriter, PlWriterConfig, PlWriterState};
pub use restore::RestoreError;
pub use testdev::{TestDev, TestDevBar, TestDevConfig, TestDevState};
pub use zdma::{BusWidth, Zdma, ZdmaConfig, ZdmaState};
