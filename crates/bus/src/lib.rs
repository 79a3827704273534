//! What hardware models plug into: physical memory, DMA transactions, register windows, interrupts, steps.
//!
//! Traits first. A model sees memory as [`Memory`], sends DMA through a [`DmaPort`], is programmed through
//! [`Mmio`] and signals through [`IrqLine`]; it never sees a thread, a clock or a socket of the host.
//! [`SystemMemory`] is the implementation that boards use: RAM regions in one address space, with an optional
//! model of a CPU's caches ([`CpuCache`]) that shows what missing cache maintenance does.
//!
//! Start with [`dma`] to write an engine and with [`memory`] to embed a model in a VMM.
#![deny(unsafe_code)]

pub mod ats;
pub mod coherency;
pub mod dma;
pub mod irq;
pub mod memory;
pub mod mmio;
mod ram;
pub mod step;
pub mod system;

pub use ats::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, AtsPort, AtsReply, AtsTranslation,
    PageGroupResponse, PageRequest, PageResponse,
};
pub use coherency::{CpuCache, StaleRead};
pub use dma::{CopyError, CopySide, DmaError, DmaFault, DmaPort, Initiator, StallState, StallTag};
pub use irq::{InterruptSink, IrqLevels, IrqLine};
pub use memory::{BusError, Memory};
pub use mmio::Mmio;
pub use ram::Ram;
#[cfg(feature = "shared")]
pub use ram::RamError;
pub use step::{Activity, Engine};
pub use system::{MapError, SystemMemory, View};
