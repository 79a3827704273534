//! Arm SMMUv3 (IHI 0070): registers, in-memory structures, commands and event records.
//!
//! [`regs`] holds the offsets and register fields, [`ste`] and [`cd`] the stream table entry and the context descriptor with
//! their level 1 tables, [`cmd`] the commands, [`event`] the event and page request records.

pub mod cd;
pub mod cmd;
pub mod event;
pub mod regs;
pub mod ste;

pub use cd::{Cd, L1Cd};
pub use cmd::{Command, Opcode};
pub use event::{EventClass, EventCode, EventRecord, PriRecord};
pub use ste::{L1Std, Ste, SteConfig};
