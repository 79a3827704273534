//! A small machine for tests: two pieces of RAM, an MMU-500, page tables written by hand.

use std::cell::Cell;
use std::sync::Arc;

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_arch::{Access, Iova, Pa, StreamId};
use portcullis_bus::{Initiator, Mmio, SystemMemory, View};
use portcullis_smmuv2::{Config, Explanation, Interrupts, SmmuV2, Window};

use crate::{Cause, CauseContext, causes};

/// FPD DMA channel 0.
pub(crate) const STREAM: StreamId = StreamId(0x14e8);
/// RAM for tables, then RAM for data.
pub(crate) const RAM: [(u64, u64); 2] = [(0x1000_0000, 0x10_0000), (0x6000_0000, 0x10_0000)];
/// The first table.
pub(crate) const ROOT: u64 = 0x1000_0000;
/// What Linux writes into a page descriptor of a DMA mapping: AF, nG, AP[1], outer shareable, attribute 0.
pub(crate) const PAGE: u64 = 0xe43;
/// SCTLR as Linux writes it.
pub(crate) const SCTLR: u32 = 0x67;

pub(crate) struct Board {
    pub memory: SystemMemory,
    pub smmu: Arc<SmmuV2<SystemMemory>>,
    pub window: Window<SystemMemory>,
    next_table: Cell<u64>,
}

impl Board {
    /// Stream [`STREAM`] in group 0 and bank 0: stage 1 with 48-bit addresses and 4 KiB pages, as Linux sets it up.
    pub fn new() -> Self {
        Self::over(SystemMemory::new(&RAM).unwrap(), Config::mmu500_zynqmp())
    }

    /// The same over other memory, or another SMMU.
    pub fn over(memory: SystemMemory, config: Config) -> Self {
        let walker = memory.view(View::NonCoherent, "smmu walker");
        let smmu = SmmuV2::new(config, walker, Interrupts::default()).unwrap();
        let window = smmu.window(false);
        let board = Self { memory, smmu, window, next_table: Cell::new(ROOT + 0x1000) };
        board.group(0, STREAM.get(), 0, 0);
        board.bank(0, 0x1_f300);
        board.global(gr0::CR0, 0x0020_1c36);
        board
    }

    pub fn global(&self, at: usize, value: u32) {
        self.window.write32(at as u64, value).unwrap();
    }

    pub fn cb(&self, bank: u64, at: usize, value: u32) {
        self.window.write32(0x1_0000 + bank * 0x1000 + at as u64, value).unwrap();
    }

    pub fn cb64(&self, bank: u64, at: usize, value: u64) {
        self.window.write64(0x1_0000 + bank * 0x1000 + at as u64, value).unwrap();
    }

    /// A valid stream match group.
    pub fn group(&self, n: usize, id: u32, mask: u32, s2cr: u32) {
        self.global(gr0::S2CR + 4 * n, s2cr);
        self.global(gr0::SMR + 4 * n, 1 << 31 | mask << 16 | id);
    }

    /// A stage 1 bank over [`ROOT`], in Linux's order.
    pub fn bank(&self, n: u64, cbar: u32) {
        self.global(0x1000 + gr1::CBA2R + 4 * n as usize, 1);
        self.global(0x1000 + gr1::CBAR + 4 * n as usize, cbar);
        self.cb(n, cb::TCR2, 0x0003_8015);
        self.cb(n, cb::TCR, 0x0080_2010);
        self.cb64(n, cb::TTBR0, ROOT);
        self.cb(n, cb::MAIR0, 0xf404_ff44);
        self.cb(n, cb::MAIR1, 0);
        self.cb(n, cb::SCTLR, SCTLR);
    }

    /// A stage 2 bank `n` over `root`: 40-bit IPAs, start level 1, 48-bit output.
    pub fn stage2_bank(&self, n: u64, root: u64) {
        self.global(0x1000 + gr1::CBA2R + 4 * n as usize, 1);
        self.global(0x1000 + gr1::CBAR + 4 * n as usize, 0);
        self.cb(n, cb::TCR, 0x0005_2059);
        self.cb64(n, cb::TTBR0, root);
        self.cb(n, cb::SCTLR, SCTLR);
    }

    pub fn store(&self, pa: u64, value: u64) {
        self.memory.store64(Pa(pa), value).unwrap();
    }

    pub fn load(&self, pa: u64) -> u64 {
        use portcullis_bus::Memory;
        self.memory.load64(Pa(pa), Default::default()).unwrap()
    }

    /// A fresh table.
    pub fn table(&self) -> u64 {
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
                self.store(at, self.table() | 3);
            }
            table = self.load(at) & 0xffff_ffff_f000;
        }
        table + (va >> 12 & 0x1ff) * 8
    }

    /// Maps a page in the tables of bank 0.
    pub fn map(&self, va: u64, pa: u64) {
        self.map_with(va, pa, PAGE);
    }

    pub fn map_with(&self, va: u64, pa: u64, bits: u64) {
        self.store(self.slot(ROOT, 0, va), pa | bits);
    }

    pub fn explain(&self, va: u64, access: Access) -> Explanation {
        self.smmu.explain(Initiator::new(STREAM), Iova(va), access)
    }

    /// The causes of what happens now, with what a ZynqMP's tools know.
    pub fn causes(&self, e: &Explanation) -> Vec<Cause> {
        causes(&self.smmu, e, &CauseContext { zynqmp: true, ram: &RAM, ..CauseContext::default() })
    }

    pub fn write_causes(&self, va: u64) -> Vec<Cause> {
        self.causes(&self.explain(va, Access::Write))
    }
}
