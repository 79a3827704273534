//! A queue that the SMMU fills: indices, overflow, memory. The event queue and the page request queue are two of them.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::smmuv3::regs::{OVERFLOW, QueueBase};
use portcullis_hal::{Block, DmaMemory, Mmio};
use spin::Mutex;

use super::Lost;
use crate::smmuv3::cmdq::{QueueOptions, allocate};
use crate::smmuv3::{Error, Platform};

/// Records that are copied under the lock at once.
const PIECE: usize = 16;

/// Offsets of a queue's registers.
#[derive(Clone, Copy, Debug)]
pub(in crate::smmuv3) struct Registers {
    pub base: usize,
    pub prod: usize,
    pub cons: usize,
}

/// What a queue gives.
#[derive(Clone, Copy, Debug)]
pub(in crate::smmuv3) enum Item<const WORDS: usize> {
    /// An entry.
    Words([u64; WORDS]),
    /// Entries are missing.
    Lost(Lost),
}

/// A queue of entries of `WORDS` 64-bit words.
pub(in crate::smmuv3) struct OutputQueue<P: Platform, const WORDS: usize> {
    platform: P,
    registers: Registers,
    block: Block,
    log2: u8,
    coherent: bool,
    keep_memory: AtomicBool,
    /// CONS as written last.
    cons: Mutex<u32>,
}

impl<P: Platform, const WORDS: usize> fmt::Debug for OutputQueue<P, WORDS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, log2, coherent, .. } = self;
        f.debug_struct("OutputQueue")
            .field("block", block)
            .field("log2", log2)
            .field("coherent", coherent)
            .finish_non_exhaustive()
    }
}

/// What one look at the queue found.
struct Piece<const WORDS: usize> {
    entries: [[u64; WORDS]; PIECE],
    count: usize,
    lost: Option<Lost>,
    /// There may be more.
    more: bool,
}

impl<P: Platform, const WORDS: usize> OutputQueue<P, WORDS> {
    const BYTES: usize = WORDS * 8;

    pub fn new(
        platform: P,
        what: &'static str,
        options: QueueOptions,
        registers: Registers,
    ) -> Result<Self, Error> {
        let (block, log2) = allocate(&platform, what, options, Self::BYTES, 0)?;
        Ok(Self {
            platform,
            registers,
            block,
            log2,
            coherent: options.coherent,
            keep_memory: AtomicBool::new(false),
            cons: Mutex::new(0),
        })
    }

    pub fn program(&self) {
        let mut cons = self.cons.lock();
        let base = QueueBase::new()
            .with_allocate(true)
            .with_addr_55_5(self.block.pa.get() >> 5)
            .with_log2size(self.log2);
        let registers = self.platform.registers();
        registers.write64(self.registers.base, base.into_bits());
        registers.write32(self.registers.prod, 0);
        registers.write32(self.registers.cons, 0);
        *cons = 0;
    }

    pub fn entries(&self) -> usize {
        1 << self.log2
    }

    pub fn keep_memory(&self) {
        self.keep_memory.store(true, Ordering::Relaxed);
    }

    /// Index and wrap bit.
    fn index_mask(&self) -> u32 {
        (2 << self.log2) - 1
    }

    fn read(&self, index: u32) -> [u64; WORDS] {
        let slot = index & ((1 << self.log2) - 1);
        let pa = self.block.pa.wrapping_add(u64::from(slot) * Self::BYTES as u64);
        let memory = self.platform.memory();
        if !self.coherent {
            memory.invalidate(pa, Self::BYTES);
        }
        core::array::from_fn(|word| memory.load64(pa.wrapping_add(word as u64 * 8)))
    }

    /// Copies up to a piece of the queue out, and gives the slots back.
    fn take(&self) -> Piece<WORDS> {
        let mut piece = Piece { entries: [[0; WORDS]; PIECE], count: 0, lost: None, more: false };
        let mut held = self.cons.lock();
        let cons = *held;
        let prod = self.platform.registers().read32(self.registers.prod);
        let mask = self.index_mask();
        let mut index = cons & mask;
        let filled = (prod & mask).wrapping_sub(index) & mask;
        let mut acknowledged = cons & OVERFLOW;
        if filled > 1 << self.log2 {
            piece.lost = Some(Lost::Indices { prod, cons });
            (index, acknowledged) = (prod & mask, prod & OVERFLOW);
        } else {
            for (entry, _) in piece.entries.iter_mut().zip(0..filled) {
                *entry = self.read(index);
                index = index.wrapping_add(1) & mask;
                piece.count += 1;
            }
            piece.more = (piece.count as u32) < filled;
            // What was dropped came after what is in the queue.
            if !piece.more && prod & OVERFLOW != acknowledged {
                piece.lost = Some(Lost::Overflow);
                acknowledged = prod & OVERFLOW;
            }
        }
        let new = index | acknowledged;
        if new != cons {
            // The entries have been read before their slots are given back.
            self.platform.memory().wmb();
            self.platform.registers().write32(self.registers.cons, new);
            *held = new;
            piece.more |= true;
        }
        piece
    }

    /// Takes out what there is, up to two queues full; `each` is called without the lock.
    pub fn drain(&self, mut each: impl FnMut(Item<WORDS>)) -> usize {
        let mut given = 0;
        // Every piece gives something, so this many are enough.
        for _ in 0..2 * self.entries() {
            let piece = self.take();
            for words in piece.entries.iter().take(piece.count) {
                each(Item::Words(*words));
            }
            if let Some(lost) = piece.lost {
                each(Item::Lost(lost));
            }
            given += piece.count + usize::from(piece.lost.is_some());
            if !piece.more || given >= 2 * self.entries() {
                break;
            }
        }
        given
    }
}

impl<P: Platform, const WORDS: usize> Drop for OutputQueue<P, WORDS> {
    fn drop(&mut self) {
        if !*self.keep_memory.get_mut() {
            self.platform.memory().free(self.block);
        }
    }
}
