//! The event queue: records of faults and configuration errors, drained and decoded.
//!
//! [`EventQueue::drain`] gives every record as an [`Event`]. If the SMMU had to drop some because the queue was full,
//! that is an event too, behind the records that were in the queue by then, and acknowledged. [`decode`] turns the
//! four words into a [`Record`].

pub mod decode;
mod output;
#[cfg(test)]
mod tests;

use portcullis_arch::smmuv3::EventRecord;
use portcullis_arch::smmuv3::regs::{PAGE, offset};

use super::cmdq::QueueOptions;
use super::{Error, Platform};
pub use decode::Record;
pub(super) use output::{Item, OutputQueue, Registers};

/// What the event queue tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A record.
    Record(Record),
    /// Records were lost.
    Lost(Lost),
}

/// Why records of a queue were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The queue was full. Nobody knows how many. Stalled transactions are not among them.
    Overflow,
    /// The queue's indices made no sense, and what was in it has been dropped.
    Indices {
        /// PROD as read.
        prod: u32,
        /// CONS as it was.
        cons: u32,
    },
}

/// The event queue of one SMMU.
#[derive(Debug)]
pub struct EventQueue<P: Platform> {
    queue: OutputQueue<P, 4>,
}

impl<P: Platform> EventQueue<P> {
    /// Allocates the queue. It is not used before [`program`](Self::program).
    pub fn new(platform: P, options: QueueOptions) -> Result<Self, Error> {
        let registers = Registers {
            base: offset::EVENTQ_BASE as usize,
            prod: (PAGE + offset::EVENTQ_PROD) as usize,
            cons: (PAGE + offset::EVENTQ_CONS) as usize,
        };
        Ok(Self { queue: OutputQueue::new(platform, "the event queue", options, registers)? })
    }

    /// Writes EVENTQ_BASE, PROD and CONS; for a queue that is disabled. It is empty afterwards.
    pub fn program(&self) {
        self.queue.program();
    }

    /// Records that the queue holds at most.
    pub fn entries(&self) -> usize {
        self.queue.entries()
    }

    /// Drop will not free the queue's memory: for an SMMU that could not be turned off.
    pub fn keep_memory(&self) {
        self.queue.keep_memory();
    }

    /// Takes all events out, oldest first; gives how many. `each` is called without a lock. Threads that drain at the
    /// same time share the events between them. Ends after two queues full, for the sake of others.
    pub fn drain(&self, mut each: impl FnMut(Event)) -> usize {
        self.queue.drain(|item| {
            each(match item {
                Item::Words(words) => Event::Record(Record::decode(EventRecord(words))),
                Item::Lost(lost) => Event::Lost(lost),
            });
        })
    }
}
