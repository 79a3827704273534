//! One line of a story: a kind to colour by, aligned columns to read, named fields for machines.

use std::fmt;

use serde::{Serialize, Serializer};

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LineKind {
    /// A register that decides what becomes of the stream: CR0, SMR, S2CR.
    Stream,
    /// A register of a context bank.
    Bank,
    /// A descriptor that led on.
    Descriptor,
    /// A descriptor that ended the walk with a fault.
    BadDescriptor,
    /// A TLB entry.
    Tlb,
    /// A TLB entry that says something else than the tables.
    Stale,
    /// The transaction went through.
    Result,
    /// The transaction did not go through.
    Fault,
}

/// A named value of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, in the architecture's spelling where it has one.
    pub name: &'static str,
    /// Value; addresses and registers in hexadecimal with `0x`.
    pub value: String,
}

impl Field {
    pub(crate) fn new(name: &'static str, value: impl fmt::Display) -> Self {
        Self { name, value: value.to_string() }
    }
    pub(crate) fn hex(name: &'static str, value: impl fmt::LowerHex) -> Self {
        Self { name, value: format!("{value:#x}") }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it is about.
    pub kind: LineKind,
    /// First column: the register, `S1 L0`, `result`.
    pub label: String,
    /// Second column: the value that was read; may be empty.
    pub value: String,
    /// What it means.
    pub text: String,
    /// The same for machines; a JSON object.
    #[serde(serialize_with = "as_map")]
    pub fields: Vec<Field>,
}

fn as_map<S: Serializer>(fields: &[Field], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(fields.iter().map(|f| (f.name, &f.value)))
}

impl Line {
    pub(crate) fn new(kind: LineKind, label: impl Into<String>, text: impl Into<String>) -> Self {
        let (label, text) = (label.into(), text.into());
        Self { kind, label, value: String::new(), text, fields: Vec::new() }
    }
    pub(crate) fn register32(kind: LineKind, label: impl Into<String>, value: u32, text: String) -> Self {
        Self { value: format!("{value:#010x}"), ..Self::new(kind, label, text) }
    }
    pub(crate) fn register64(kind: LineKind, label: impl Into<String>, value: u64, text: String) -> Self {
        Self { value: format!("{value:#018x}"), ..Self::new(kind, label, text) }
    }
    pub(crate) fn with_fields(self, fields: Vec<Field>) -> Self {
        Self { fields, ..self }
    }

    /// Writes the line with its first two columns padded to these widths, without a newline.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, f: &mut impl fmt::Write, label: usize, value: usize) -> fmt::Result {
        write!(f, "{:label$}  ", self.label)?;
        if !self.value.is_empty() {
            write!(f, "{:value$}  ", self.value)?;
        }
        f.write_str(&self.text)
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, 0, 0)
    }
}
