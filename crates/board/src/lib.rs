//! A machine from a device tree.
//!
//! | Step | Module |
//! |---|---|
//! | bytes or source to a checked tree, overlays | [`tree`] |
//! | which nodes are modelled, and our own bindings | [`compatible`] |
//! | the tree as a machine: memory, SMMUs, DMA channels, masters and their streams | [`machine`] |
//! | the machine for a person and for JSON | [`mod@report`] |
//! | the overlay that puts a master behind the SMMU | [`protect`] |
//! | the hardware, running: models on one bus, with time, interrupts, messages and a record | [`sim`] |
//! | the software on it: drivers bound, interrupts handled | [`system`] |
//!
//! Both kinds of SMMU are one to the rest of the board: [`sim::SmmuModel`], [`sim::Explanation`],
//! [`system::SmmuDriver`].
//!
//! | Simplified | |
//! |---|---|
//! | ITS | a message's data is its event id, unique on the board, and becomes LPI 8192 + id; there are no device tables |
//! | messages of PCIe devices | go to the ITS past the SMMU |
//! | PCIe configuration space | not modelled: the tree says what a function can do, [`system::System::enable_ats`] is its enable bits |
//! | edge triggered lines | remembered until their handler runs, if the tree calls them edges; an edge on a line that the tree calls a level is lost |
//! | CMD_SYNC's interrupt | recorded, and handled by nobody, as in Linux |
//! | stale configuration | seen where the port's TLB still translates what the stream table refuses or passes; not where an old descriptor leads to other tables |
//!
//! ```
//! use portcullis_board::{MachineDescription, Tree, report};
//!
//! # let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/zynqmp-thesis.dtb");
//! let tree = Tree::load(file)?;
//! let machine = MachineDescription::from_tree(&tree)?;
//! assert_eq!(machine.dma_channels.len(), 16);
//! println!("{}", report::report(&machine));
//! # Ok::<(), portcullis_board::TreeError>(())
//! ```
#![forbid(unsafe_code)]

pub mod compatible;
pub mod guest;
pub mod machine;
pub mod os;
pub mod protect;
pub mod report;
pub mod sim;
pub mod system;
pub mod tree;

pub use machine::MachineDescription;
pub use protect::{apply_protect, protect_overlay};
pub use report::{Report, report};
pub use tree::{Finding, Tree, TreeError};

#[cfg(test)]
mod testing;
