//! The page request queue: what devices with ATS ask for, drained and decoded.
//!
//! After an overflow the SMMU writes nothing more until it is acknowledged, and answers or drops what comes: draining
//! acknowledges, and reports it as [`Page::Lost`]. Requests that were dropped are asked for again by the device.

use portcullis_arch::smmuv3::PriRecord;
use portcullis_arch::smmuv3::regs::{PAGE, offset};
use portcullis_arch::{Iova, StreamId, SubstreamId};

use super::cmdq::QueueOptions;
use super::evtq::{Item, Lost, OutputQueue, Registers};
use super::{Error, Platform};

/// What the page request queue tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// A request.
    Request(PageRequest),
    /// A device has stopped using a substream, and all its requests for it have come before. Not to be answered.
    Stop {
        /// The stream.
        stream: StreamId,
        /// The substream.
        substream: SubstreamId,
        /// Page request group, of no meaning.
        group: u16,
    },
    /// Requests were lost.
    Lost(Lost),
}

/// A page request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// The stream.
    pub stream: StreamId,
    /// The substream, if there is one.
    pub substream: Option<SubstreamId>,
    /// The page.
    pub address: Iova,
    /// To be read.
    pub read: bool,
    /// To be written.
    pub write: bool,
    /// To be executed.
    pub execute: bool,
    /// By privileged accesses.
    pub privileged: bool,
    /// Group that it belongs to (nine bits), which is answered as a whole.
    pub group: u16,
    /// The last one of its group.
    pub last: bool,
}

impl Page {
    /// From the two words.
    pub fn decode(record: PriRecord) -> Self {
        let (dw0, dw1) = (record.dw0(), record.dw1());
        let stream = StreamId(dw0.sid());
        let group = dw1.prg_index();
        let ssv = dw0.ssv();
        let (read, write, last) = (dw0.r(), dw0.w(), dw0.last());
        if ssv && last && !read && !write {
            return Self::Stop { stream, substream: SubstreamId(dw0.ssid()), group };
        }
        Self::Request(PageRequest {
            stream,
            substream: ssv.then_some(SubstreamId(dw0.ssid())),
            address: Iova(dw1.addr_63_12() << 12),
            read,
            write,
            execute: ssv && dw0.x(),
            privileged: ssv && dw0.privileged(),
            group,
            last,
        })
    }
}

/// The page request queue of one SMMU.
#[derive(Debug)]
pub struct PriQueue<P: Platform> {
    queue: OutputQueue<P, 2>,
}

impl<P: Platform> PriQueue<P> {
    /// Allocates the queue. It is not used before [`program`](Self::program).
    pub fn new(platform: P, options: QueueOptions) -> Result<Self, Error> {
        let registers = Registers {
            base: offset::PRIQ_BASE as usize,
            prod: (PAGE + offset::PRIQ_PROD) as usize,
            cons: (PAGE + offset::PRIQ_CONS) as usize,
        };
        Ok(Self { queue: OutputQueue::new(platform, "the page request queue", options, registers)? })
    }

    /// Writes PRIQ_BASE, PROD and CONS; for a queue that is disabled. It is empty afterwards.
    pub fn program(&self) {
        self.queue.program();
    }

    /// Requests that the queue holds at most.
    pub fn entries(&self) -> usize {
        self.queue.entries()
    }

    /// Drop will not free the queue's memory: for an SMMU that could not be turned off.
    pub fn keep_memory(&self) {
        self.queue.keep_memory();
    }

    /// Takes everything out, oldest first; gives how many. `each` is called without a lock. Ends after two queues
    /// full, for the sake of others.
    pub fn drain(&self, mut each: impl FnMut(Page)) -> usize {
        self.queue.drain(|item| {
            each(match item {
                Item::Words(words) => Page::decode(PriRecord(words)),
                Item::Lost(lost) => Page::Lost(lost),
            });
        })
    }
}

#[cfg(test)]
mod tests;
