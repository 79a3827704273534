//! Why no guest tree can be made.

use portcullis_board::TreeError;
use thiserror::Error;

/// Why a board and a QEMU machine do not make one guest tree.
#[derive(Debug, Error)]
pub enum GuestTreeError {
    /// The board's tree cannot be described.
    #[error("the board's device tree: {0}")]
    Board(TreeError),
    /// QEMU's tree cannot be described.
    #[error("QEMU's device tree: {0}")]
    Qemu(TreeError),
    /// QEMU's tree is not that of a `virt` machine, or not of one that can take the board.
    #[error("QEMU's device tree: {node}: {reason}")]
    NotVirt {
        /// The node.
        node: String,
        /// What is missing there, or in the way.
        reason: String,
    },
    /// The board has no device that could be placed.
    #[error(
        "the board has no SMMU, DMA channel or PL writer in use: there is nothing that a guest could drive"
    )]
    NoDevices,
    /// The registers of the devices do not fit into the largest window.
    #[error("{node}: its registers end {needed:#x} bytes into the window, which can have {limit:#x} at most")]
    TooManyDevices {
        /// The first node that does not fit.
        node: String,
        /// Where its registers would end.
        needed: u64,
        /// Largest window.
        limit: u64,
    },
    /// The window cannot be where it should be.
    #[error("the register window of {size:#x} bytes at {base:#x}: {reason}")]
    Window {
        /// Where it should be.
        base: u64,
        /// Its size.
        size: u64,
        /// Why not.
        reason: String,
    },
    /// An interrupt of the board that no guest could receive.
    #[error(
        "{node}: interrupt {entry} is no shared peripheral interrupt of a GIC, only these reach the guest"
    )]
    Interrupt {
        /// The node on the board.
        node: String,
        /// Which entry of its interrupts.
        entry: usize,
    },
    /// No interrupt numbers are left.
    #[error("no interrupt number is left for {what}: QEMU's `virt` has {limit} shared peripheral interrupts")]
    NoInterrupts {
        /// For what.
        what: String,
        /// How many the machine has.
        limit: u32,
    },
    /// QEMU's tree uses the last phandle.
    #[error("no phandle is left in QEMU's device tree")]
    NoPhandles,
    /// The PCI functions do not fit.
    #[error("the PCI functions of the board: {reason}")]
    Pci {
        /// Why not.
        reason: String,
    },
    /// The tree that was made does not describe a machine.
    #[error("the guest's device tree: {0}")]
    Guest(TreeError),
}
