//! Arm SMMUv2 (IHI 0062D) and MMU-500 as a register-accurate model.
//!
//! [`SmmuV2`] is the SMMU: build one from a [`Config`] (or the preset [`Config::mmu500_zynqmp`]), put its register
//! window on a bus ([`SmmuV2::window`] per security state), give each device a [`SmmuV2::port`], wire the
//! [`Interrupts`]. Reads of tables go through the [`Memory`](portcullis_bus::Memory) given to it. [`SmmuV2::explain`] tells
//! the story of a translation without changing anything.
//!
//! Start reading at [`Config`], then `decide` (what becomes of a transaction), `context` (registers to
//! translation parameters) and `fault`.
//!
//! | Part | |
//! |---|---|
//! | **Covered** | both global spaces and all context bank registers; secure and non-secure copies with the +0x400 alias; stream matching, indexing, compressed indexing, extended ids and groups; translate, bypass and fault streams with all overrides; all four CBAR types; AArch64 (4K, 16K, 64K), AArch32 long and short at stage 1, AArch64 and AArch32 at stage 2, nested; context and global faults, terminate and stall; every TLB invalidation, sync; address translation operations; hyp and monitor contexts; save, restore, reset |
//! | **Not covered** | performance monitors (page 3 and the bank view read as zero, writes are ignored); the SSD table (the security state comes with each transaction, as on MMU-500); HAFDBS, E2H, DIPAN and broadcast TLB maintenance from CPUs (not advertised, except IDR0.BTM in the ZynqMP preset, whose document says 1); configuration access faults (such accesses are RAZ/WI); TLB match conflict and TLB lock faults (never happen here, their bits can be set through FSRRESTORE only); barrier and FB fields are stored and have no effect |
//! | **Different** | an 8-byte access to two 32-bit registers acts as two accesses, low word first; other sizes read zero and are ignored; an unknown value at reset is zero; each port has its own TLB and there is no shared one; a register write takes effect at the next transaction of each port; a faulting transaction that meets HUPCF = 0 in a terminating bank whose fault was recorded in the meantime is terminated without MULTI |
#![forbid(unsafe_code)]

mod ats;
mod bank;
mod config;
mod context;
mod decide;
mod explain;
mod fault;
mod global;
mod irq;
mod matching;
mod mmio;
mod model;
mod stall;
mod state;
mod tlbi;

pub use config::{Aarch32, Config, ConfigError, Granules};
pub use decide::{BypassReason, GlobalFault};
pub use explain::{BankView, Explanation, Outcome};
pub use irq::Interrupts;
pub use matching::Match;
pub use mmio::Window;
pub use model::{Port, SmmuV2};
pub use state::{RestoreError, State};
