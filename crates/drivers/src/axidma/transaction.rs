//! What a channel has under way.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use portcullis_arch::Iova;

use super::error::HardwareError;
use super::ring::{Chunk, Ring};
use crate::dmaengine::{Completion, Cookie, Notifier, Record, TransferError};

/// A transaction on its way.
#[derive(Debug)]
pub(super) struct Transaction {
    pub cookie: Cookie,
    pub notifier: Option<Notifier>,
    pub chunks: Vec<Chunk>,
    pub len: u64,
    /// The first slot in the ring.
    pub first: usize,
    pub cyclic: Option<Cyclic>,
}

/// How far a cyclic transaction has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cyclic {
    /// Descriptors of a period.
    pub chunks: usize,
    /// Bytes of a period.
    pub period: u64,
    /// The period that ends next.
    pub next: usize,
    /// Bytes moved since the start.
    pub total: u64,
}

impl Cyclic {
    /// Bytes from the period that ends next to the end of the ring.
    pub fn residue(&self, len: u64) -> u64 {
        len.saturating_sub(self.period.saturating_mul(self.next as u64))
    }
}

/// What a channel is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nothing.
    Idle,
    /// The running transactions.
    Running,
    /// It was told to stop and may not have stopped.
    Stopping,
}

/// One channel.
#[derive(Debug)]
pub(super) struct Channel {
    /// Of a core with scatter-gather.
    pub ring: Option<Ring>,
    pub mode: Mode,
    /// RS is set.
    pub on: bool,
    /// Everything goes when the channel has stopped.
    pub terminating: bool,
    /// What ended the oldest running transaction, until the reset is through.
    pub failure: Option<TransferError>,
    pub submitted: VecDeque<Transaction>,
    pub issued: VecDeque<Transaction>,
    pub running: VecDeque<Transaction>,
    pub record: Record,
    pub last_error: Option<HardwareError>,
    /// To be delivered without the lock.
    pub news: Vec<(Option<Notifier>, Completion)>,
}

impl Channel {
    pub fn new(ring: Option<Ring>) -> Self {
        Self {
            ring,
            mode: Mode::Idle,
            on: false,
            terminating: false,
            failure: None,
            submitted: VecDeque::new(),
            issued: VecDeque::new(),
            running: VecDeque::new(),
            record: Record::new(),
            last_error: None,
            news: Vec::new(),
        }
    }

    /// How many transactions are not over.
    pub fn outstanding(&self) -> usize {
        self.submitted.len() + self.issued.len() + self.running.len()
    }

    /// All transactions that are not over, oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Transaction> {
        self.running.iter().chain(&self.issued).chain(&self.submitted)
    }

    /// Ends the oldest transaction.
    pub fn complete(
        &mut self,
        transaction: Transaction,
        transferred: u64,
        result: Result<(), TransferError>,
    ) {
        let Transaction { cookie, notifier, chunks, len, first: _, cyclic } = transaction;
        if let Some(ring) = &mut self.ring {
            ring.give_back(chunks.len());
        }
        let residue = match cyclic {
            Some(cyclic) => cyclic.residue(len),
            None => len.saturating_sub(transferred),
        };
        let completion = Completion { cookie, result, transferred, residue, ongoing: false };
        self.record.end(completion);
        self.news.push((notifier, completion));
    }

    /// The start of the buffer that a descriptor describes, or of the oldest transaction.
    pub fn buffer_at(&self, descriptor: Iova) -> Iova {
        let Some(front) = self.running.front() else { return Iova(0) };
        let index = self.ring.and_then(|ring| {
            let slot = ring.slot_at(descriptor)?;
            Some((slot + ring.slots() - front.first) % ring.slots())
        });
        let chunk = index.and_then(|index| front.chunks.get(index)).or(front.chunks.first());
        chunk.map_or(Iova(0), |chunk| chunk.address)
    }
}
