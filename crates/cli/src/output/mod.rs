//! What a run prints: items, for a person ([`human`]), as JSON lines ([`json`]), and a trace file ([`perfetto`]).

pub mod human;
pub mod json;
pub mod perfetto;

use portcullis_explain::{Cause, Story};
use serde::Serialize;

/// One thing to print.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Item {
    /// A scenario begins.
    Start {
        /// Its name.
        scenario: String,
        /// Its title.
        title: String,
        /// More about it.
        about: Vec<String>,
    },
    /// A numbered step.
    Step {
        /// What is about to happen.
        text: String,
    },
    /// Something to know.
    Say {
        /// What.
        text: String,
    },
    /// The SMMU driver's report at boot.
    Boot {
        /// What came up.
        text: String,
    },
    /// A transaction of an engine.
    Transfer {
        /// Simulated time in nanoseconds.
        at_ns: u64,
        /// The engine.
        engine: String,
        /// Its stream.
        stream: u32,
        /// `read` or `write`.
        access: String,
        /// First address.
        iova: String,
        /// Bytes.
        len: usize,
        /// Bytes done.
        done: usize,
        /// What came back, if not success.
        error: Option<String>,
    },
    /// Why a transaction did not get through (or passed although nothing told it to).
    Fault {
        /// The engine.
        engine: String,
        /// Every step to the fault.
        story: Story,
        /// Likely causes, the likeliest first.
        causes: Vec<Cause>,
    },
    /// The story of a translation.
    Explain {
        /// The engine.
        engine: String,
        /// Every step.
        story: Story,
    },
    /// A read returned old data.
    Stale {
        /// What and why.
        text: String,
    },
    /// What the operating system logged about a fault.
    Report {
        /// The device it was routed to.
        device: Option<String>,
        /// The report.
        text: String,
        /// The lines Linux would print.
        kernel: Vec<String>,
    },
    /// An expectation.
    Check {
        /// It held.
        ok: bool,
        /// What.
        text: String,
    },
    /// A scenario ended.
    End {
        /// Its name.
        scenario: String,
        /// All held.
        passed: bool,
        /// Expectations.
        checks: u32,
        /// Those that did not hold.
        failed: u32,
        /// The script's error.
        error: Option<String>,
    },
    /// All scenarios ended.
    Summary {
        /// The board.
        board: String,
        /// Scenarios that passed.
        passed: usize,
        /// Names of those that did not.
        failed: Vec<String>,
    },
}

/// Where items go.
pub trait Sink {
    /// Prints one.
    fn emit(&mut self, item: &Item);
}

/// Prints nothing.
pub struct Nowhere;

impl Sink for Nowhere {
    fn emit(&mut self, _: &Item) {}
}
