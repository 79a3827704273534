//! The ring of buffer descriptors of one channel in memory, and cutting transfers into them.
//!
//! Slot `n` always links to slot `n + 1`, the last one to the first, and slots are used strictly in this order: an idle
//! engine that gets a new tail goes on at the link of the last descriptor it processed. Only a cyclic transfer
//! links its last slot to its first, and the link is rewritten when the slot is used next. One more slot lies behind the
//! ring: the tail that a cyclic transfer never reaches.

use alloc::vec::Vec;

use portcullis_arch::axidma::{BdControl, BdStatus, Descriptor, bd};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::DmaMemory;

use crate::dmaengine::{DescriptorPool, Segment};

/// Bytes from one descriptor to the next: a cache line each, so that cleaning one touches no other.
pub const BD_BYTES: usize = bd::ALIGN as usize;

/// Bytes that a channel's pool has for `descriptors` buffer descriptors.
pub const fn pool_bytes(descriptors: usize) -> usize {
    (descriptors + 1) * BD_BYTES
}

/// A piece of a transfer that one descriptor holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub address: Iova,
    pub len: u32,
    pub sof: bool,
    pub eof: bool,
}

/// Cuts a packet into pieces of at most `max` bytes; stops after `limit` + 1 pieces. SOF and EOF at its ends.
pub(super) fn split(segments: &[Segment], max: u64, limit: usize, out: &mut Vec<Chunk>) {
    let first = out.len();
    'segments: for segment in segments {
        let mut done = 0;
        while done < segment.len {
            if out.len() > limit {
                break 'segments;
            }
            let len = (segment.len - done).min(max);
            let address = segment.address.wrapping_add(done);
            out.push(Chunk { address, len: len as u32, sof: false, eof: false });
            done += len;
        }
    }
    if let Some(chunk) = out.get_mut(first) {
        chunk.sof = true;
    }
    if let Some(chunk) = out.last_mut() {
        chunk.eof = true;
    }
}

/// The ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pool: DescriptorPool,
    coherent: bool,
    /// Slots in the ring.
    slots: usize,
    /// The slot that is used next.
    head: usize,
    free: usize,
}

impl Ring {
    pub fn new(pool: DescriptorPool, coherent: bool) -> Self {
        let slots = (pool.block.len / BD_BYTES).saturating_sub(1);
        Self { pool, coherent, slots, head: 0, free: slots }
    }

    pub fn slots(&self) -> usize {
        self.slots
    }
    pub fn free(&self) -> usize {
        self.free
    }
    pub fn pool(&self) -> DescriptorPool {
        self.pool
    }

    /// Takes `count` slots in a row; gives the first.
    pub fn take(&mut self, count: usize) -> Option<usize> {
        let free = self.free.checked_sub(count)?;
        let first = self.head;
        self.head = self.slot(first, count);
        self.free = free;
        Some(first)
    }

    /// Gives the oldest `count` slots back.
    pub fn give_back(&mut self, count: usize) {
        self.free = (self.free + count).min(self.slots);
    }

    /// The slot `n` behind `first`.
    pub fn slot(&self, first: usize, n: usize) -> usize {
        (first + n) % self.slots.max(1)
    }

    fn offset(slot: usize) -> u64 {
        (slot * BD_BYTES) as u64
    }
    fn pa(&self, slot: usize) -> Pa {
        self.pool.block.pa.wrapping_add(Self::offset(slot))
    }
    /// Where the engine finds a slot.
    pub fn iova(&self, slot: usize) -> Iova {
        self.pool.iova.wrapping_add(Self::offset(slot))
    }
    /// A descriptor that is not in the ring.
    pub fn beyond(&self) -> Iova {
        self.iova(self.slots)
    }
    /// The slot at an address of the engine.
    pub fn slot_at(&self, iova: Iova) -> Option<usize> {
        let offset = iova.get().checked_sub(self.pool.iova.get())?;
        let slot = usize::try_from(offset / BD_BYTES as u64).ok()?;
        (slot < self.slots).then_some(slot)
    }

    /// Writes a transfer's descriptors; [`publish`](Self::publish) makes them visible.
    pub fn write(
        &self,
        memory: &impl DmaMemory,
        first: usize,
        chunks: &[Chunk],
        to_stream: bool,
        cyclic: bool,
    ) {
        for (n, chunk) in chunks.iter().enumerate() {
            let slot = self.slot(first, n);
            let back = cyclic && n + 1 == chunks.len();
            let next = if back { first } else { self.slot(slot, 1) };
            let control = BdControl::new()
                .with_length(chunk.len & ((1 << 26) - 1))
                .with_sof(to_stream && chunk.sof)
                .with_eof(to_stream && chunk.eof);
            let descriptor = Descriptor {
                next: self.iova(next).get(),
                buffer: chunk.address.get(),
                control,
                status: BdStatus::new(),
            };
            let words = descriptor.words();
            for (i, pair) in words.as_chunks::<2>().0.iter().enumerate() {
                let word = u64::from(pair[1]) << 32 | u64::from(pair[0]);
                memory.store64(self.pa(slot).wrapping_add(i as u64 * 8), word);
            }
            self.clean(memory, slot);
        }
    }

    fn clean(&self, memory: &impl DmaMemory, slot: usize) {
        if !self.coherent {
            memory.clean(self.pa(slot), BD_BYTES);
        }
    }

    /// Orders what was written before the register write that follows.
    pub fn publish(&self, memory: &impl DmaMemory) {
        memory.wmb();
    }

    fn control_and_status(&self, memory: &impl DmaMemory, slot: usize) -> u64 {
        if !self.coherent {
            memory.invalidate(self.pa(slot), BD_BYTES);
        }
        memory.load64(self.pa(slot).wrapping_add(bd::CONTROL))
    }

    /// What the engine wrote into a slot.
    pub fn status(&self, memory: &impl DmaMemory, slot: usize) -> BdStatus {
        BdStatus::from_bits((self.control_and_status(memory, slot) >> 32) as u32)
    }

    /// Clears STATUS, for the next round of a cyclic transfer.
    pub fn clear_status(&self, memory: &impl DmaMemory, slot: usize) {
        let control = self.control_and_status(memory, slot) & u64::from(u32::MAX);
        memory.store64(self.pa(slot).wrapping_add(bd::CONTROL), control);
        self.clean(memory, slot);
    }
}
