//! SMMUv3: records, kernel lines, stories and causes.
//!
//! | Module | Of what |
//! |---|---|
//! | [`record`] | event records and page requests, word by word |
//! | [`command`] | commands, command errors and global errors |
//! | [`kernel`] | lines that arm-smmu-v3 prints |
//! | [`lines`] | registers, stream table entries and context descriptors as lines of a story |
//! | [`story`] | a translation, step by step |
//! | [`shape`] | what a CD or an STE says about its tables |
//! | [`probe`] | a copy of the SMMU over patched memory, to try what would be if |
//! | [`permission`] | the bit that forbids |
//! | [`causes`] | why, and what to check |

pub(crate) mod causes;
pub(crate) mod command;
pub(crate) mod kernel;
pub(crate) mod lines;
pub(crate) mod permission;
pub(crate) mod probe;
pub(crate) mod record;
pub(crate) mod shape;
pub(crate) mod story;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
