//! The circular queues (IHI 0070 section 3.5): indices with a wrap bit, capped sizes, aligned bases.

use portcullis_arch::attrs::{MemoryType, Shareability};
use portcullis_arch::smmuv3::regs::{Cr1, INDEX_MASK, OVERFLOW, QueueBase};
use portcullis_arch::{Attributes, Pa};
use serde::{Deserialize, Serialize};

/// One queue's registers. What is above the indices (OVFLG, OVACKFLG, CMDQ_CONS.ERR) stays where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Queue {
    pub base: u64,
    pub prod: u32,
    pub cons: u32,
}

/// What a queue is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// log2 of the most entries.
    pub most_log2: u8,
    /// Bytes of an entry.
    pub entry: u64,
    /// Address bits that exist.
    pub output_mask: u64,
}

impl Queue {
    /// Bits of the base register.
    pub const BASE: u64 = 1 << 62 | 0x00ff_ffff_ffff_ffff;

    fn log2(&self, shape: Shape) -> u8 {
        QueueBase::from_bits(self.base).log2size().min(shape.most_log2)
    }

    /// Mask of an index with its wrap bit.
    pub fn mask(&self, shape: Shape) -> u32 {
        ((2u32 << self.log2(shape)) - 1) & INDEX_MASK
    }

    pub fn is_empty(&self, shape: Shape) -> bool {
        (self.prod ^ self.cons) & self.mask(shape) == 0
    }

    /// Same index, different wrap.
    pub fn is_full(&self, shape: Shape) -> bool {
        (self.prod ^ self.cons) & self.mask(shape) == 1 << self.log2(shape)
    }

    /// Address of the entry with this index.
    pub fn entry(&self, shape: Shape, index: u32) -> Pa {
        let size = (shape.entry << self.log2(shape)).max(32);
        let base = QueueBase::from_bits(self.base).address() & shape.output_mask & !(size - 1);
        let index = u64::from(index & (self.mask(shape) >> 1));
        Pa(base + index * shape.entry)
    }

    /// PROD one further, wrap included.
    pub fn advance_prod(&mut self, shape: Shape) {
        self.prod = step(self.prod, self.mask(shape));
    }

    /// CONS one further, wrap included.
    pub fn advance_cons(&mut self, shape: Shape) {
        self.cons = step(self.cons, self.mask(shape));
    }

    /// Overflow that software has not acknowledged.
    pub fn overflowed(&self) -> bool {
        (self.prod ^ self.cons) & OVERFLOW != 0
    }

    /// Something was lost: OVFLG becomes different from OVACKFLG, once.
    pub fn overflow(&mut self) {
        if !self.overflowed() {
            self.prod ^= OVERFLOW;
        }
    }
}

fn step(index: u32, mask: u32) -> u32 {
    (index & !mask) | (index & mask).wrapping_add(1) & mask
}

/// Attributes of the SMMU's accesses to its queues (CR1.QUEUE_*).
pub(crate) fn attributes(cr1: Cr1, secure: bool) -> Attributes {
    // 0 and 3 are non-cacheable, 1 write-back, 2 write-through; MemoryType counts 1, 3, 2.
    let cache = |code: u8| [1u8, 3, 2, 1][usize::from(code & 3)];
    let shareability = match cr1.queue_sh() {
        1 => Shareability::Non,
        code => Shareability::from_code(code),
    };
    Attributes::DEVICE_DEFAULT
        .with_memory(MemoryType::normal(cache(cr1.queue_oc()), cache(cr1.queue_ic())))
        .with_shareability(shareability)
        .with_privileged(true)
        .with_non_secure(!secure)
        .consistent()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { most_log2: 4, entry: 32, output_mask: (1 << 40) - 1 };

    fn queue(log2: u64) -> Queue {
        Queue { base: 1 << 62 | 0x8000_0000 | log2, prod: 0, cons: 0 }
    }

    #[test]
    fn a_queue_is_full_after_so_many_entries_and_wraps() {
        let mut q = queue(2);
        assert!(q.is_empty(SHAPE));
        for n in 0..4 {
            assert!(!q.is_full(SHAPE));
            assert_eq!(q.entry(SHAPE, q.prod), Pa(0x8000_0000 + 32 * n));
            q.advance_prod(SHAPE);
        }
        assert!(q.is_full(SHAPE));
        assert_eq!(q.prod, 4);
        for _ in 0..4 {
            q.advance_cons(SHAPE);
        }
        assert!(q.is_empty(SHAPE));
        for _ in 0..4 {
            q.advance_prod(SHAPE);
        }
        assert_eq!((q.prod, q.is_full(SHAPE)), (0, true), "the wrap bit has turned twice");
    }

    #[test]
    fn the_size_is_capped_and_the_base_aligned_to_the_capped_size() {
        let q = Queue { base: 0x8000_0000 | 0x3e0 | 31, ..queue(0) };
        assert_eq!(q.mask(SHAPE), 0x1f);
        assert_eq!(q.entry(SHAPE, 0x1f), Pa(0x8000_0000 + 0x200 + 15 * 32), "512 bytes long");
        let small = Queue { base: 0x8000_0020, ..queue(0) };
        assert_eq!(small.entry(Shape { entry: 16, ..SHAPE }, 0), Pa(0x8000_0020), "32 bytes at least");
    }

    #[test]
    fn addresses_above_the_output_size_are_truncated() {
        let q = Queue { base: 0x00ff_0000_8000_0000, ..queue(0) };
        assert_eq!(q.entry(SHAPE, 0), Pa(0x8000_0000));
    }

    #[test]
    fn the_largest_queue_uses_all_index_bits() {
        let q = Queue { base: 19, ..queue(0) };
        assert_eq!(q.mask(Shape { most_log2: 19, ..SHAPE }), 0xf_ffff);
    }

    #[test]
    fn overflow_toggles_once() {
        let mut q = queue(0);
        q.overflow();
        q.overflow();
        assert_eq!(q.prod, OVERFLOW);
        q.cons |= OVERFLOW;
        q.overflow();
        assert_eq!(q.prod, 0);
    }

    #[test]
    fn cr1_decodes() {
        // Linux: 0xd75, inner shareable write-back throughout.
        let a = attributes(Cr1::from_bits(0xd75), false);
        assert_eq!((a.memory(), a.shareability()), (MemoryType::NORMAL_WB, Shareability::Inner));
        let nc = attributes(Cr1::from_bits(0x30), true);
        assert_eq!((nc.memory(), nc.shareability()), (MemoryType::NORMAL_NC, Shareability::Outer));
        assert!(!nc.non_secure());
    }
}
