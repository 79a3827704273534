//! What an SMMU did with a transaction, and why, in words that a bring-up engineer can act on.
//!
//! | Question | Start at |
//! |---|---|
//! | What happened, register by register and descriptor by descriptor? | [`story`], [`story_v3`] |
//! | Why, and what is to be checked or fixed? | [`causes`], [`causes_v3`] |
//! | What do these fault registers of an SMMUv2 mean? | [`ContextRecord`], [`GlobalRecord`] |
//! | What do these words of an SMMUv3's queues mean? | [`EventWords`], [`PageRequestWords`], [`CommandWords`] |
//! | What is wrong with an SMMUv3's command queue, or with all of it? | [`CommandError`], [`GlobalErrors`] |
//! | What does this line of a kernel log say, or this log? | [`parse_line`], [`parse_log`] |
//! | What do the tables of this stream map? | [`mappings`] |
//!
//! Everything is text for a person (`Display`) and data for a machine (`Serialize`) at once; nothing here writes colours.
//! Nothing changes the SMMU that is asked: experiments ("with T0SZ = 25 these tables translate the address") are
//! carried out on a copy of its registers, for SMMUv3 over memory with other words in the STE or CD.
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
mod v3;
mod words;

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod testing;

pub use causes::{Cause, CauseContext, CauseKind, Unmapped, causes};
pub use kernel_log::{ContextLine, KernelLine, KernelMessage, parse_line};
pub use line::{Field, Line, LineKind};
pub use mappings::{Mapping, Mappings, mappings};
pub use record::{ContextRecord, GlobalRecord};
pub use story::{Story, story};
pub use v3::causes::causes_v3;
pub use v3::command::{CommandError, CommandWords, GlobalErrors};
pub use v3::kernel::{EventDetailLine, EventLine, PageRequestLine, parse_log};
pub use v3::record::{EventWords, PageRequestWords};
pub use v3::story::{Seen, story_v3};
