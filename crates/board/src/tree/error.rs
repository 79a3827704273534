//! What can be wrong with a device tree: errors that stop, findings that do not.
//!
//! The rule: an error is what leaves the meaning of something Portcullis models, or of an `iommus`, unknown. Linux
//! would fail to probe that device, or probe it wrongly. The same trouble in a node that Portcullis does not model
//! is a [`Finding`], since what is not modelled is never fatal.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use thiserror::Error;

/// Why a device tree cannot be used. Every message names the file, the offset, or the node and property.
#[derive(Debug, Error)]
pub enum TreeError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// An error in a file, with the file's name in front.
    #[error("{}: {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<TreeError>,
    },
    /// Too many bytes for a device tree.
    #[error("too large for a device tree: {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// Size of the input.
        bytes: u64,
        /// Largest size accepted.
        limit: u64,
    },
    /// The bytes are not a flattened device tree, or a damaged one.
    #[error("not a valid flattened device tree: {reason} (at offset {offset:#x}{})", in_node(node))]
    Blob {
        /// Byte offset of the trouble.
        offset: usize,
        /// Path of the node being read, empty before the first.
        node: String,
        /// What is wrong there.
        reason: String,
    },
    /// More of something than any real tree has.
    #[error("{node}: too much for a device tree: {what}, the limit is {limit}")]
    Limit {
        /// Node at which the limit was passed.
        node: String,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A property has a value that cannot be right.
    #[error("{node}: property `{property}`: {reason}")]
    Property {
        /// Path of the node.
        node: String,
        /// Name of the property.
        property: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A node is wrong as a whole.
    #[error("{node}: {reason}")]
    Node {
        /// Path of the node.
        node: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An overlay does not fit the tree.
    #[error("the overlay cannot be applied: {0}")]
    Overlay(String),
    /// `dtc` is not installed.
    #[error(
        "device tree source needs the device tree compiler `{program}`, which was not found on PATH: install it \
         (Debian: package device-tree-compiler) or give a compiled .dtb"
    )]
    DtcMissing {
        /// The program that was looked for.
        program: String,
    },
    /// `dtc` refused the source.
    #[error("dtc cannot compile this: {message}")]
    Dtc {
        /// What dtc printed, shortened.
        message: String,
    },
    /// No node has this name.
    #[error("no node is called `{name}`{}", if similar.is_empty() { String::new() } else {
        format!("; perhaps one of: {}", similar.join(", ")) })]
    NoSuchNode {
        /// What was looked for.
        name: String,
        /// Paths of nodes that it could mean.
        similar: Vec<String>,
    },
    /// Several nodes have this name.
    #[error("`{name}` is the name of several nodes, give a path: {}", paths.join(", "))]
    AmbiguousNode {
        /// What was looked for.
        name: String,
        /// The nodes.
        paths: Vec<String>,
    },
}

fn in_node(node: &str) -> String {
    if node.is_empty() { String::new() } else { format!(", in node {node}") }
}

impl TreeError {
    pub(crate) fn property(node: &str, property: &str, reason: impl Into<String>) -> Self {
        Self::Property { node: node.into(), property: property.into(), reason: reason.into() }
    }
    pub(crate) fn node(node: &str, reason: impl Into<String>) -> Self {
        Self::Node { node: node.into(), reason: reason.into() }
    }
    pub(crate) fn in_file(self, path: &std::path::Path) -> Self {
        Self::InFile { path: path.into(), source: Box::new(self) }
    }
}

/// How much a [`Finding`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Worth knowing.
    Note,
    /// Something will not work, or not as it looks.
    Warning,
}

/// Something noticed in a device tree that does not stop anybody.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// Path of the node.
    pub node: String,
    /// The property, if it is about one.
    pub property: Option<String>,
    /// What was noticed, and what follows from it.
    pub message: String,
}

impl Finding {
    pub(crate) fn new(level: Level, node: &str, property: Option<&str>, message: impl Into<String>) -> Self {
        Self { level, node: node.into(), property: property.map(str::to_owned), message: message.into() }
    }
    pub(crate) fn note(node: &str, property: Option<&str>, message: impl Into<String>) -> Self {
        Self::new(Level::Note, node, property, message)
    }
    pub(crate) fn warning(node: &str, property: Option<&str>, message: impl Into<String>) -> Self {
        Self::new(Level::Warning, node, property, message)
    }
}

/// `warning: /axi/x: iommus: message`.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.level {
            Level::Note => "note: ",
            Level::Warning => "warning: ",
        })?;
        write!(f, "{}: ", self.node)?;
        if let Some(property) = &self.property {
            write!(f, "{property}: ")?;
        }
        f.write_str(&self.message)
    }
}
