//! What a run prints: items, for a person ([`human`]), as JSON lines ([`json`]), and a trace file ([`perfetto`]).

pub mod ats;
pub mod human;
pub mod json;
pub mod perfetto;
mod repeat;
mod wrap;

use std::collections::BTreeMap;
use std::io;

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
        /// Its substream, if it names one.
        substream: Option<u32>,
        /// `read` or `write`.
        access: &'static str,
        /// First address.
        iova: String,
        /// Bytes.
        len: usize,
        /// Bytes done.
        done: usize,
        /// What came back, if not success.
        error: Option<String>,
    },
    /// Why a transaction did not get through, or passed although nothing told it to.
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
        /// Who read.
        reader: String,
        /// The aligned 8 bytes in which the first difference lies.
        pa: String,
        /// What the reader got there.
        seen: String,
        /// What had been written.
        current: String,
        /// `clean` or `invalidate`.
        missing: String,
        /// All of it in a sentence.
        text: String,
    },
    /// Something that a device with address translation services did, or was told.
    Ats {
        /// The engine.
        engine: String,
        /// `request`, `translated`, `page-request`, `page-response` or `invalidation`.
        what: &'static str,
        /// All of it in a sentence.
        text: String,
        /// The device was refused something.
        refused: bool,
    },
    /// An interrupt message arrived.
    Message {
        /// Where it was written to.
        address: String,
        /// What was written: the event id.
        data: u32,
        /// The interrupt that it is.
        lpi: u32,
    },
    /// What the operating system logged about a fault.
    Report(Report),
    /// An expectation.
    Check {
        /// It held.
        ok: bool,
        /// What.
        text: String,
        /// The line of the script.
        line: Option<usize>,
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

/// A fault as the operating system sees it: from the SMMU's registers, after its interrupt.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The device it was routed to.
    pub device: Option<String>,
    /// `fault`, `page request`, `global error` or `records lost`.
    pub about: &'static str,
    /// Why, such as `translation fault`.
    pub reason: String,
    /// The architecture's name of the event, such as `F_TRANSLATION` (SMMUv3).
    pub event: Option<&'static str>,
    /// Its stream.
    pub stream: Option<u32>,
    /// Its substream.
    pub substream: Option<u32>,
    /// The address.
    pub iova: String,
    /// `read` or `write`.
    pub access: String,
    /// 1 or 2.
    pub stage: Option<u8>,
    /// 0 to 3.
    pub level: Option<u8>,
    /// The context bank.
    pub bank: Option<u8>,
    /// It waits for an answer.
    pub stalled: bool,
    /// The fields of the record by name (SMMUv3).
    pub fields: BTreeMap<&'static str, String>,
    /// All of it in a sentence.
    pub text: String,
    /// The lines Linux would print.
    pub kernel: Vec<String>,
}

/// Where items go.
pub trait Sink {
    /// Prints one.
    ///
    /// # Errors
    /// Those of the output.
    fn emit(&mut self, item: &Item) -> io::Result<()>;
}

/// A sink that notices when nobody reads any more. The run goes on: its result and its trace still count.
pub struct Output {
    sink: Box<dyn Sink>,
    error: Option<io::Error>,
}

impl Output {
    /// Output to `sink`.
    pub fn new(sink: Box<dyn Sink>) -> Self {
        Self { sink, error: None }
    }

    /// Prints an item, unless printing failed before.
    pub fn emit(&mut self, item: &Item) {
        if self.error.is_none() {
            self.error = self.sink.emit(item).err();
        }
    }

    /// The error that ended the printing. A closed pipe is none: whoever closed it has seen enough.
    ///
    /// # Errors
    /// Any other error.
    pub fn finish(&mut self) -> io::Result<()> {
        match self.error.take() {
            Some(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
            _ => Ok(()),
        }
    }
}
