//! A small walker that knows nothing of the crate but its register values. Written from the descriptor format, so that
//! a table, its registers and this reading of them check each other.
#![allow(dead_code)]

use std::sync::Arc;

use portcullis_arch::Pa;
use portcullis_hal::fake::FakeMemory;
use portcullis_pgtable::{Half, Stage1Registers, Stage2Registers};

pub const MEMORY: u64 = 0x8000_0000;

pub fn plain(len: usize) -> Arc<FakeMemory> {
    Arc::new(FakeMemory::plain(MEMORY, len))
}

/// What a walker needs to know.
#[derive(Clone, Copy, Debug)]
pub struct Walker {
    root: u64,
    granule_log2: u32,
    input_bits: u32,
    start: u32,
    first: u64,
}

/// A leaf that a walk ended at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub descriptor: u64,
    pub level: u32,
    /// The translated address.
    pub pa: u64,
    pub size: u64,
}

impl Walker {
    pub fn stage1(r: &Stage1Registers) -> Self {
        let granule_log2 = match (r.half, r.tg) {
            (Half::Lower, 0) | (Half::Upper, 2) => 12,
            (Half::Lower, 2) | (Half::Upper, 1) => 14,
            (Half::Lower, 1) | (Half::Upper, 3) => 16,
            other => panic!("reserved granule {other:?}"),
        };
        let input_bits = 64 - u32::from(r.tsz);
        let mut start = 3;
        while granule_log2 + (4 - start) * (granule_log2 - 3) < input_bits {
            start -= 1;
        }
        let first = if r.half == Half::Upper { u64::MAX << input_bits } else { 0 };
        Self { root: r.ttbr.get(), granule_log2, input_bits, start, first }
    }

    pub fn stage2(r: &Stage2Registers) -> Self {
        let (granule_log2, start) = match r.tg {
            0 => (12, 2 - u32::from(r.sl0)),
            1 => (16, 3 - u32::from(r.sl0)),
            2 => (14, 3 - u32::from(r.sl0)),
            other => panic!("reserved granule {other}"),
        };
        let input_bits = 64 - u32::from(r.t0sz);
        // Legal combinations of start level and size (up to 16 tables side by side).
        let stride = granule_log2 - 3;
        assert!(granule_log2 + (3 - start) * stride < input_bits);
        assert!(input_bits <= granule_log2 + (4 - start) * stride + 4);
        assert!(granule_log2 > 12 || start < 3);
        assert!(granule_log2 != 14 || start > 0);
        Self { root: r.vttbr.get(), granule_log2, input_bits, start, first: 0 }
    }

    /// The start level that follows from the registers.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// Translates through words that `load` gives; `None` for a translation fault.
    pub fn walk(&self, iova: u64, load: impl Fn(u64) -> u64) -> Option<Leaf> {
        let input = iova.wrapping_sub(self.first);
        if input >> self.input_bits != 0 {
            return None;
        }
        let stride = self.granule_log2 - 3;
        let mut table = self.root;
        for level in self.start..=3 {
            let shift = self.granule_log2 + (3 - level) * stride;
            let mut index = input >> shift;
            if level != self.start {
                index %= 1 << stride;
            }
            let descriptor = load(table + index * 8);
            let block_allowed = level == 2 || level == 1 && self.granule_log2 == 12;
            match descriptor & 3 {
                3 if level < 3 => table = descriptor & 0xffff_ffff_ffff & (u64::MAX << self.granule_log2),
                3 => return Some(leaf(descriptor, level, shift, input)),
                1 if block_allowed => return Some(leaf(descriptor, level, shift, input)),
                1 => panic!("reserved descriptor {descriptor:#x} at level {level} for {iova:#x}"),
                _ => return None,
            }
        }
        None
    }

    /// As a device sees it.
    pub fn device(&self, memory: &FakeMemory, iova: u64) -> Option<Leaf> {
        self.walk(iova, |pa| memory.device_load64(Pa(pa)))
    }
}

fn leaf(descriptor: u64, level: u32, shift: u32, input: u64) -> Leaf {
    let size = 1u64 << shift;
    let output = descriptor & 0xffff_ffff_ffff & !(size - 1);
    Leaf { descriptor, level, pa: output | (input & (size - 1)), size }
}
