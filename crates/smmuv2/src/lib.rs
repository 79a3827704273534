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
//! | **Covered** | both global spaces and all context bank registers with their rights, reset values, halves and 64-bit accesses; secure and non-secure copies with the +0x400 alias, SCR1's splits, GASRAE; stream matching, indexing, compressed indexing, extended ids and groups; translate, bypass and fault streams with all overrides; all four CBAR types; AArch64 (4K, 16K, 64K), AArch32 long and short at stage 1, AArch64 and AArch32 at stage 2, nested; the checks of section 3.8.4 in their order; global and context faults with every syndrome; HUPCF and CFCFG in all combinations, stalls and RESUME, STALLD and GSE (where they exist: not on an MMU-500); SCR1.SIF; every TLB invalidation and sync; address translation operations; hyp and monitor contexts; 8 and 16-bit ASIDs and VMIDs; MMU-500's fixed bits, ACTLR and CACHE_LOCK, TBUQOS, TBU_PWR_STATUS, identification; save, restore, reset |
//! | **Not covered** | performance monitors (page 3 and the bank view read as zero, writes are ignored); the SSD table (the security state comes with each transaction, as on MMU-500); HAFDBS, E2H, DIPAN and broadcast TLB maintenance from CPUs (not advertised, except IDR0.BTM in the ZynqMP preset, whose document says 1); configuration access faults (such accesses are RAZ/WI); external faults in GFSR, TLB match conflict, TLB lock and unsupported transaction faults (never happen here, their bits come through the restore registers only); barrier, FB and BPVMID fields are stored and have no effect, as are all implementation defined bits but CACHE_LOCK; MMU-500's integration registers (RAZ/WI) |
//! | **Different** | an 8-byte access to two 32-bit registers acts as two accesses under one lock, low word first; other sizes read zero and are ignored; an unknown value at reset is zero; each port has its own TLB and there is no shared one; last-level invalidations remove what the all-level ones do; stream match conflicts are always detected, also where IDR1.SMCD is 0; GFSYNR0.NSATTR is set in the secure copy only, as logs of MMU-500 systems show; a register write takes effect at the next transaction of each port; an address translation operation that meets a stage 2 fault is terminated even where that bank stalls; a nested context whose stage 2 is off reports an output that only stage 2 would refuse (above OAS where IAS is larger, or 40 bits for AArch32) as an address size fault of stage 1; a fault that 64 rewrites of the registers keep from being recorded is recorded as it is; more than 65536 stalled transactions at once are terminated |
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
mod memo;
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
