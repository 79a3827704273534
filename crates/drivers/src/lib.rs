//! Drivers for IOMMUs and DMA engines: `no_std`, no panics, every wait bounded.
//!
//! | Module | Hardware |
//! |---|---|
//! | [`smmuv2`] | Arm SMMUv2 and MMU-500: streams, context banks, domains, TLB maintenance, faults |
//! | [`smmuv3`] | Arm SMMUv3: stream table, context descriptors, substreams, command and event queues, page requests |
//! | [`zdma`] | the general purpose DMA of the Zynq UltraScale+ (LPD and FPD) |
//! | [`gem`] | the transmit DMA of a Cadence GEM |
//! | [`axidma`] | the AXI DMA of programmable logic: memory to stream and back, scatter-gather and direct |
//! | [`plwriter`] | a small bus master in programmable logic that writes one word |
//! | [`testdev`] | the PCIe DMA test device, with substreams |
//!
//! A driver is an instance over the traits of `portcullis-hal`: registers, memory, time. [`ops`] is the object-safe
//! face that every IOMMU driver shows to the operating system's IOMMU core, [`fault`] what all of them say about
//! a fault, and [`dmaengine`] the face that every DMA engine shows to its clients. Drivers use spin locks. They hold
//! none while they wait, drop what a caller gave them, or call a fault handler or a client; but they do hold one across
//! register accesses. So `handle_irq` may run when time passes, and must not run from inside of a register access: a
//! kernel calls it from a thread, or masks interrupts around the other calls.
//!
//! One lock is different: changing stream table entries or context descriptors of an SMMUv3 (attach, detach, the end of a
//! domain) has to wait for the SMMU at every step, and holds that SMMU's configuration lock meanwhile. Mapping, unmapping
//! and interrupts do not need it, and whoever waits for it too long gets an error instead of hanging.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod axidma;
pub mod dmaengine;
pub mod fault;
pub mod gem;
pub mod ops;
pub mod plwriter;
pub mod smmuv2;
pub mod smmuv3;
pub mod tables;
pub mod testdev;
pub mod zdma;
