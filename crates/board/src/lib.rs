//! A machine from a device tree.
//!
//! | Step | Module |
//! |---|---|
//! | bytes or source to a checked tree, overlays | [`tree`] |
//! | which nodes are modelled, and our own bindings | [`compatible`] |
//! | the tree as a machine: memory, SMMUs, DMA channels, masters and their streams | [`machine`] |
//! | the machine for a person and for JSON | [`mod@report`] |
//! | the overlay that puts a master behind the SMMU | [`protect`] |
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
pub mod machine;
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
