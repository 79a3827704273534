//! What an SMMUv2 did with a transaction, and why, in words that a bring-up engineer can act on.
//!
//! | Question | Start at |
//! |---|---|
//! | What happened, register by register and descriptor by descriptor? | [`story`] |
//! | Why, and what is to be checked or fixed? | [`causes`] |
//! | What do these fault registers mean? | [`ContextRecord`], [`GlobalRecord`] |
//! | What does this line of a kernel log say? | [`parse_line`] |
//! | What do the tables of this stream map? | [`mappings`] |
//!
//! Everything is text for a person (`Display`) and data for a machine (`Serialize`) at once; nothing here writes colours.
//! Nothing changes the SMMU that is asked: experiments ("with T0SZ = 25 these tables translate the address") are
//! carried out on a copy of its registers.
#![forbid(unsafe_code)]

mod bank;
mod causes;
mod descriptor;
mod kernel_log;
mod line;
mod mappings;
mod outcome;
mod permission;
mod probe;
mod record;
mod story;
mod words;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod testing;

pub use causes::{Cause, CauseContext, CauseKind, causes};
pub use kernel_log::{ContextLine, KernelLine, KernelMessage, parse_line};
pub use line::{Field, Line, LineKind};
pub use mappings::{Mapping, Mappings, mappings};
pub use record::{ContextRecord, GlobalRecord};
pub use story::{Story, story};
