//! Arm SMMUv3 (IHI 0070) as a register-accurate model.
//!
//! [`SmmuV3`] is the SMMU: build one from [`Caps`] (a preset such as [`Caps::small`], [`Caps::full`] or
//! [`Caps::qemu_virt`], changed as you like) with [`SmmuV3::builder`], trap its registers with [`SmmuV3::mmio_read`] and
//! [`SmmuV3::mmio_write`] (or put a [`SmmuV3::window`] per security state on a bus), give each device a
//! [`SmmuV3::port`], and call [`SmmuV3::poll`] when devices have moved on. [`SmmuV3::explain`] tells the story of a
//! translation without changing anything. `examples/vmm_device.rs` is a whole VMM device; the feature `vm-memory` adds
//! `vmm`, the adapter to rust-vmm's guest memory.
//!
//! ```
//! use portcullis_bus::SystemMemory;
//! use portcullis_smmuv3::{Caps, SmmuV3};
//!
//! let memory = SystemMemory::new(&[(0x8000_0000, 0x10_0000)]).unwrap();
//! let smmu = SmmuV3::builder(Caps::qemu_virt()).memory(memory).build().unwrap();
//! let mut idr5 = [0; 4];
//! smmu.mmio_read(0x14, &mut idr5).unwrap();
//! assert_eq!(u32::from_le_bytes(idr5) & 7, 4); // 44-bit addresses
//! ```
//!
//! Start reading at [`Caps`], then `lookup` (what becomes of a transaction), `registers`, `command`, `event` and `report`
//! (records, queues, interrupts), `stall`, `ats`.
//!
//! | Part | |
//! |---|---|
//! | **Covered** | all registers of both pages with their rights, guards, halves and acknowledgements; the secure interface; linear and two-level stream tables and CD tables, every STE and CD field of v3.0 to v3.3 with its validity rule; abort, bypass, stage 1, stage 2 and nested; substreams with S1DSS; StreamWorlds NS-EL1, EL2, EL2-E2H, Secure and EL3; VMSAv8-64 with 4, 16 and 64 KiB granules, small tables, 52-bit addresses, VMSAv8-32 LPAE; access flag and dirty state by hardware; attribute overrides, forced write-back, XNX, E0PD, PAN, PTWNNC, S_CR0.SIF; every command of what is advertised, range invalidation, VMID wildcards; CMD_SYNC that completes after accesses which used older state, with interrupt or message; command errors and restart; every event record that can happen; stalls with CMD_RESUME and CMD_STALL_TERM; global errors; the page request queue with overflow and automatic answers; ATS, full and split-stage; address translation operations; wired interrupts and messages; save, restore, reset |
//! | **Not covered** | enhanced command queues, MPAM, performance monitors (PMCG), Realm state and granule protection; and, never advertised: everything of v3.4 (permission indirection and overlays, HAFT, EPAN, THE, MTE permissions), 128-bit descriptors, device permission tables, page-based hardware attributes, broadcast TLB maintenance, VATOS, secure EL2 and secure stage 2, preset tables and queues, the dormant hint, AArch32 tables with output sizes below 40 bits |
//! | **Different** | an unknown value at reset is zero; page 0 does not alias the queue indices of page 1; a 64-bit access to two 32-bit registers, other sizes and misaligned accesses are RAZ/WI; with MEV an event is merged with the one before it only, and stalls are never suppressed; F_UUT, the conflict events and E_PAGE_REQUEST do not happen; prefetch commands fetch nothing; TLBs are the ports' own, and a last-level or level-hinted invalidation removes what the plain one does; CFGI commands make ports look up streams of both security states with the same number; the configuration cache is the port's, invalid entries and level 1 descriptors are never kept; a transaction's security state is that of its attributes, streams of an SMMU without a secure interface are non-secure; a stalled transaction beyond IDR5.STALL_MAX waits without a record and is tried again when another has ended, beyond 65536 it is terminated and recorded; a stall whose record had to wait for the event queue is tried again instead if anything was invalidated meanwhile; CMD_ATC_INV for a stream without a device completes at once, more than 256 without an answer hold the queue; more than 4096 commands are executed in several turns ([`SmmuV3::poll`] or any register access); SEV has no processor to wake |
#![forbid(unsafe_code)]

mod atos;
mod ats;
mod caps;
mod command;
mod decision;
mod event;
mod explain;
mod irq;
mod lookup;
mod mmio;
mod model;
mod queue;
mod registers;
mod report;
#[cfg(test)]
mod rig;
mod stall;
mod state;
mod tlbi;
#[cfg(feature = "vm-memory")]
pub mod vmm;

pub use ats::Port;
pub use caps::{Caps, CapsError, Httu, SecureCaps, StallModel, TableEndian};
pub use decision::{BypassReason, SilentAbort};
pub use event::Ending;
pub use explain::{Explanation, Outcome, Recorded};
pub use irq::{Interrupts, Wires};
pub use mmio::Window;
pub use model::{Builder, SmmuV3};
pub use stall::StalledTransaction;
pub use state::{RestoreError, State};
