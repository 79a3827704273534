//! A small machine for tests: two pieces of RAM, an SMMUv3, its tables written by hand.

use std::cell::Cell;
use std::sync::Arc;

use portcullis_arch::smmuv3::regs::offset;
use portcullis_arch::{Access, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{Initiator, Memory, Mmio, SystemMemory, View};
use portcullis_smmuv3::{Caps, Explanation, SmmuV3};

use crate::testing::{PAGE, RAM, ROOT};
use crate::{Cause, CauseContext, causes_v3};

/// The stream that has an entry.
pub(crate) const STREAM: u32 = 0x10;
/// The linear stream table.
pub(crate) const STREAMS: u64 = 0x1008_0000;
/// The STE of [`STREAM`].
pub(crate) const STE: u64 = STREAMS + STREAM as u64 * 64;
/// The context descriptors.
pub(crate) const CDS: u64 = 0x1009_0000;
/// The first table of stage 2.
pub(crate) const ROOT2: u64 = 0x100a_0000;
const EVENTQ: u64 = 0x100b_0000;
/// STE word 0 for stage 1: V, Config = 0b101, one CD.
pub(crate) const STE0: u64 = CDS | 5 << 1 | 1;
/// STE word 1 as Linux writes it, with S1STALLD: S1DSS = 2, CD fetches write-back, inner shareable.
pub(crate) const STE1: u64 = 1 << 27 | 3 << 6 | 1 << 4 | 1 << 2 | 2;
/// CD word 0 as Linux writes it: 48 bits, 4 KiB, EPD1, 48-bit output, A, R, ASET, ASID 1.
pub(crate) const CD0: u64 = 16
    | 1 << 8
    | 1 << 10
    | 3 << 12
    | 1 << 30
    | 1 << 31
    | 5 << 32
    | 1 << 41
    | 1 << 45
    | 1 << 46
    | 1 << 47
    | 1 << 48;
/// STE word 2: VMID 1, 40 bits from level 1, 4 KiB, 48-bit output, S2AA64, S2R.
pub(crate) const STE2: u64 =
    1 | 24 << 32 | 1 << 38 | 1 << 40 | 1 << 42 | 3 << 44 | 5 << 48 | 1 << 51 | 1 << 58;

pub(crate) struct Board {
    pub memory: SystemMemory,
    pub smmu: Arc<SmmuV3<SystemMemory>>,
    next_table: Cell<u64>,
}

/// A full SMMU without a secure side, stalls and terminates.
pub(crate) fn caps() -> Caps {
    Caps { secure: None, sid_bits: 16, ..Caps::full() }
}

impl Board {
    /// [`STREAM`] has stage 1 with one CD.
    pub fn new() -> Self {
        Self::over(SystemMemory::new(&RAM).unwrap(), caps())
    }

    pub fn over(memory: SystemMemory, caps: Caps) -> Self {
        let walker = memory.view(View::NonCoherent, "smmu walker");
        let smmu = SmmuV3::builder(caps).memory(walker).build().unwrap();
        let board = Self { memory, smmu, next_table: Cell::new(ROOT + 0x1000) };
        board.put(STE, &[STE0, STE1, 0, 0]);
        board.put(CDS, &[CD0, ROOT, 0, 0xf404_ff44]);
        board.reg64(offset::STRTAB_BASE, STREAMS);
        board.reg(offset::STRTAB_BASE_CFG, 5);
        board.reg(offset::CR2, 2);
        board.reg64(offset::EVENTQ_BASE, EVENTQ | 4);
        board.reg(0x1_00a8, 0);
        board.reg(0x1_00ac, 0);
        board.reg(offset::CR0, 0xd);
        board
    }

    pub fn reg(&self, at: u64, value: u32) {
        self.smmu.window(false).write32(at, value).unwrap();
    }

    pub fn reg64(&self, at: u64, value: u64) {
        self.smmu.window(false).write64(at, value).unwrap();
    }

    /// With SMMUEN = 0 meanwhile.
    pub fn reg_off(&self, at: u64, value: u32) {
        self.reg(offset::CR0, 0xc);
        self.reg(at, value);
        self.reg(offset::CR0, 0xd);
    }

    pub fn put(&self, at: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            self.memory.store64(Pa(at + 8 * i as u64), *word).unwrap();
        }
    }

    pub fn load(&self, pa: u64) -> u64 {
        self.memory.load64(Pa(pa), Default::default()).unwrap()
    }

    fn table(&self) -> u64 {
        let at = self.next_table.get();
        self.next_table.set(at + 0x1000);
        at
    }

    /// Address of the level 3 descriptor of `va` in tables that start at `level` in `root`.
    pub fn slot(&self, root: u64, level: u32, va: u64) -> u64 {
        let mut table = root;
        for level in level..3 {
            let at = table + (va >> (39 - 9 * level) & 0x1ff) * 8;
            if self.load(at) == 0 {
                self.put(at, &[self.table() | 3]);
            }
            table = self.load(at) & 0xffff_ffff_f000;
        }
        table + (va >> 12 & 0x1ff) * 8
    }

    pub fn map(&self, va: u64, pa: u64) {
        self.map_with(va, pa, PAGE);
    }

    pub fn map_with(&self, va: u64, pa: u64, bits: u64) {
        self.put(self.slot(ROOT, 0, va), &[pa | bits]);
    }

    /// A page of stage 2, readable and writable.
    pub fn map2(&self, ipa: u64, pa: u64) {
        self.put(self.slot(ROOT2, 1, ipa), &[pa | 0x7ff]);
    }

    /// Stage 2 only, or both.
    pub fn stage2(&self, nested: bool) {
        let config = if nested { 7 } else { 6 };
        self.put(STE, &[CDS | config << 1 | 1, STE1, STE2, ROOT2]);
        if nested {
            // Stage 1's tables and CD one to one. `table` may add some meanwhile.
            for at in (ROOT..ROOT + 0x2_0000).step_by(0x1000).chain([CDS]) {
                self.map2(at, at);
            }
        }
    }

    pub fn explain(&self, va: u64, access: Access) -> Explanation {
        self.smmu.explain(Initiator::new(StreamId(STREAM)), Iova(va), access)
    }

    pub fn explain_with(&self, substream: u32, va: u64) -> Explanation {
        let from = Initiator { substream: Some(SubstreamId(substream)), ..Initiator::new(StreamId(STREAM)) };
        self.smmu.explain(from, Iova(va), Access::Read)
    }

    pub fn causes(&self, e: &Explanation) -> Vec<Cause> {
        causes_v3(&self.smmu, e, &CauseContext { ram: &RAM, ..CauseContext::default() })
    }

    pub fn write_causes(&self, va: u64) -> Vec<Cause> {
        self.causes(&self.explain(va, Access::Write))
    }

    pub fn read_causes(&self, va: u64) -> Vec<Cause> {
        self.causes(&self.explain(va, Access::Read))
    }
}
