//! What a walk read and which rule decided: the same code that translates can tell its story.

use portcullis_bus::BusError;

/// Why a descriptor led where it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Points to the next table.
    Table {
        /// Address of the next table.
        next: u64,
    },
    /// A leaf: block or page of `1 << size_log2` bytes at `output`.
    Leaf {
        /// Output address of the leaf's first byte.
        output: u64,
        /// log2 of its size in bytes, a contiguous run counted as one.
        size_log2: u8,
    },
    /// Bit 0 is clear, or the type is reserved at this level.
    Invalid,
    /// The address in it does not fit the output size.
    AddressSize {
        /// The address.
        address: u64,
        /// The output size in bits.
        bits: u8,
    },
    /// The access flag is clear.
    AccessFlag,
    /// Hardware changed the descriptor: it set the access flag, or made it writable for the first write.
    Update {
        /// What the descriptor holds now.
        new: u64,
    },
    /// Memory refused the read, or the update.
    External(BusError),
}

/// One descriptor read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// 1 or 2.
    pub stage: u8,
    /// Lookup level.
    pub level: i8,
    /// Address of the descriptor in this stage's output space (the IPA for a nested stage 1 walk).
    pub address: u64,
    /// The descriptor; 0 if it could not be read.
    pub value: u64,
    /// What followed from it.
    pub rule: Rule,
}

/// Sees each descriptor as the walker reads it.
pub trait Recorder {
    /// It ignores every step, so that none needs to be made for it.
    const SILENT: bool = false;
    /// One descriptor was read.
    fn step(&mut self, step: Step);
}

/// Does not care: walks compile as if there were no recorder.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoRecord;

impl Recorder for NoRecord {
    const SILENT: bool = true;
    #[inline(always)]
    fn step(&mut self, _: Step) {}
}

/// Keeps every step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The steps in the order in which the walker made them.
    pub steps: Vec<Step>,
}

impl Recorder for Trace {
    fn step(&mut self, step: Step) {
        self.steps.push(step);
    }
}
