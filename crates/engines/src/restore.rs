//! What can be wrong with a saved state.

use thiserror::Error;

/// A saved state that does not fit. The engine is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// The state was saved in another format.
    #[error("saved state has version {found}, this model reads version {expected}")]
    Version {
        /// The version in the state.
        found: u32,
        /// The version this model reads and writes.
        expected: u32,
    },
    /// A register that this engine does not have.
    #[error("saved state holds a register at offset {0:#x}, which this engine does not have")]
    UnknownRegister(u32),
    /// A value that the engine can never hold.
    #[error("saved state is impossible: {0}")]
    Impossible(&'static str),
}
