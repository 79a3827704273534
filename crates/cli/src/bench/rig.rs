//! The SMMUs that the benchmarks run on, behind one face.

use std::sync::{Arc, Mutex};

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1};
use portcullis_arch::smmuv3::cd::{CD_BYTES, CdDw0, CdDw1};
use portcullis_arch::smmuv3::cmd::{COMMAND_BYTES, Sync, Tlbi};
use portcullis_arch::smmuv3::regs::{Cr0, offset};
use portcullis_arch::smmuv3::ste::{STE_BYTES, SteDw0, SteDw1, SteDw2, SteDw3};
use portcullis_arch::smmuv3::{Cd, Command, Opcode, Ste, SteConfig};
use portcullis_arch::{Access, Iova, Ipa, Pa, StreamId};
use portcullis_board::sim::{Memory, Pool};
use portcullis_bus::{DmaPort, Initiator, Mmio, SystemMemory};
use portcullis_pgtable::{Config as TableConfig, Granule, PageTable, Prot, Stage, Stage1, Stage2};
use portcullis_smmuv2::{Config, Interrupts, SmmuV2};
use portcullis_smmuv3::{Caps, SmmuV3};
use portcullis_walk::{FaultOutcome, Stats, Translated};

const POOL: u64 = 0x4000_0000;
const POOL_LOG2: u32 = 26;
/// Where the data is.
pub const DATA: u64 = 0x8000_0000;
/// First address that the tables map.
pub const IOVA: u64 = 0x12_3400_0000;
/// Entries of a port's TLB as shipped.
pub const ENTRIES: usize = 8192;

/// What software tells an SMMU to forget, for context 0.
#[derive(Clone, Copy, Debug)]
pub enum Forget {
    /// `count` pages from an address on, one command each.
    Pages(Iova, u64),
    /// `count` pages from an address on, as the SMMU's range command if it has one.
    Range(Iova, u64),
    /// The address space.
    Asid,
    /// Everything.
    All,
}

/// What a device holds.
pub trait Port: DmaPort {
    /// Translates without an access.
    fn translate(&mut self, from: &Initiator, va: Iova) -> Result<Translated, FaultOutcome>;
    /// Counters.
    fn stats(&self) -> Stats;
}

impl Port for portcullis_smmuv2::Port<SystemMemory> {
    #[inline]
    fn translate(&mut self, from: &Initiator, va: Iova) -> Result<Translated, FaultOutcome> {
        self.translate(from, va, Access::Read)
    }
    fn stats(&self) -> Stats {
        self.stats()
    }
}

impl Port for portcullis_smmuv3::Port<SystemMemory> {
    #[inline]
    fn translate(&mut self, from: &Initiator, va: Iova) -> Result<Translated, FaultOutcome> {
        self.translate(from, va, Access::Read)
    }
    fn stats(&self) -> Stats {
        self.stats()
    }
}

/// An SMMU with contexts of stage 1 tables: 4 KiB granule, 48 bits, four levels.
pub trait Rig: std::marker::Sync + Sized {
    /// Its ports.
    type Port: Port;
    /// Its name in the table.
    const NAME: &'static str;
    /// The SMMU has a command for a range of pages.
    const RANGES: bool;

    /// `contexts` contexts, ports with `entries` TLB entries and `data` bytes at [`DATA`].
    fn new(contexts: usize, entries: usize, data: u64) -> Self;
    /// One context of stage 1 tables whose table walks and output go through stage 2 tables that map everything flat with
    /// 4 KiB pages for `data` bytes.
    fn nested(entries: usize, data: u64) -> Self;
    /// The stage 1 tables of a context.
    fn table(&self, context: usize) -> &PageTable<Stage1, Memory>;
    /// A port.
    fn port(&self) -> Self::Port;
    /// A stream of a context.
    fn stream(context: usize) -> Initiator;
    /// 256 streams of context 0.
    fn many_streams() -> Vec<Initiator>;
    /// Invalidates, and returns when the SMMU says that it is complete.
    fn forget(&self, what: Forget);

    /// Maps `pages` pages of 4 KiB in a context from [`IOVA`] on to frames `frame(i)` of the data.
    fn map(&self, context: usize, pages: u64, frame: impl Fn(u64) -> u64) {
        for i in 0..pages {
            let pa = Pa(DATA + (frame(i) << 12));
            self.table(context).map(Iova(IOVA + (i << 12)), pa, 4096, Prot::RW).expect("free page");
        }
    }
}

/// What a driver does between two looks at a register.
fn wait() {
    std::thread::sleep(std::time::Duration::from_micros(1));
}

fn table_config<S: Stage>() -> TableConfig<S> {
    TableConfig::new(Granule::K4, 48, 48)
}

fn memory(data: u64) -> (SystemMemory, Arc<Pool>) {
    let memory = SystemMemory::new(&[(POOL, 1 << POOL_LOG2), (DATA, data)]).expect("valid regions");
    (memory, Arc::new(Pool::new(Pa(POOL), POOL_LOG2)))
}

/// Stage 2 tables that map the pool and the data flat, page by page: the physical address is off by nothing, and a
/// contiguous mapping of whole blocks is avoided by mapping single pages.
fn flat_stage2(memory: &SystemMemory, pool: &Arc<Pool>, data: u64) -> PageTable<Stage2, Memory> {
    let dma = Memory::new(memory.clone(), pool.clone());
    let table = PageTable::<Stage2, _>::new(dma, table_config()).expect("48 bits, 4K");
    for (base, size) in [(POOL, 1 << POOL_LOG2), (DATA, data)] {
        for at in (base..base + size).step_by(4096) {
            table.map(Ipa(at), Pa(at), 4096, Prot::RW).expect("free page");
        }
    }
    table
}

/// MMU-500 as in a Zynq UltraScale+.
pub struct V2 {
    memory: SystemMemory,
    smmu: Arc<SmmuV2<SystemMemory>>,
    tables: Vec<PageTable<Stage1, Memory>>,
    /// Keeps the tables.
    _stage2: Option<PageTable<Stage2, Memory>>,
}

impl V2 {
    fn write(&self, at: usize, v: u32) {
        self.smmu.window(false).write32(at as u64, v).expect("inside the window");
    }

    fn build(contexts: usize, entries: usize, data: u64, nested: bool) -> Self {
        let (memory, pool) = memory(data);
        let config = Config { tlb_entries: entries, ..Config::mmu500_zynqmp() };
        let smmu = SmmuV2::new(config, memory.clone(), Interrupts::default()).expect("a valid preset");
        let mut rig = Self { memory, smmu, tables: Vec::new(), _stage2: None };
        let w = rig.smmu.window(false);
        for n in 0..contexts {
            let dma = Memory::new(rig.memory.clone(), pool.clone());
            let table = PageTable::<Stage1, _>::new(dma, table_config()).expect("48 bits, 4K");
            let page = 0x1_0000 + n * 0x1000;
            rig.write(0x1000 + gr1::CBA2R + 4 * n, 1);
            // Nested: type 3 with the next bank as stage 2.
            let cbar = if nested { 0x3_0000 | 0x100 } else { 0x1_f300 };
            rig.write(0x1000 + gr1::CBAR + 4 * n, cbar);
            rig.write(page + cb::TCR2, 0x0003_8015);
            rig.write(page + cb::TCR, 0x0080_3510);
            w.write64((page + cb::TTBR0) as u64, table.root().get() | (n as u64) << 48).expect("inside");
            rig.write(page + cb::MAIR0, 0xf404_ff44);
            rig.write(page + cb::SCTLR, 0x167);
            rig.write(gr0::S2CR + 4 * n, n as u32);
            rig.write(gr0::SMR + 4 * n, 0x8000_0000 | 0xff << 16 | (n as u32) << 8);
            rig.tables.push(table);
        }
        if nested {
            let table = flat_stage2(&rig.memory, &pool, data);
            let page = 0x1_0000 + 0x1000;
            rig.write(0x1000 + gr1::CBA2R + 4, 1);
            rig.write(0x1000 + gr1::CBAR + 4, 0);
            // T0SZ 16, SL0 2 (level 0), 48-bit output.
            rig.write(page + cb::TCR, 5 << 16 | 0x3500 | 2 << 6 | 16);
            w.write64((page + cb::TTBR0) as u64, table.root().get()).expect("inside");
            rig.write(page + cb::SCTLR, 0x167);
            rig._stage2 = Some(table);
        }
        rig.write(gr0::CR0, 0x0020_1c36);
        rig
    }
}

impl Rig for V2 {
    type Port = portcullis_smmuv2::Port<SystemMemory>;
    const NAME: &'static str = "SMMUv2";
    const RANGES: bool = false;

    fn new(contexts: usize, entries: usize, data: u64) -> Self {
        Self::build(contexts, entries, data, false)
    }
    fn nested(entries: usize, data: u64) -> Self {
        Self::build(1, entries, data, true)
    }
    fn table(&self, context: usize) -> &PageTable<Stage1, Memory> {
        &self.tables[context]
    }
    fn port(&self) -> Self::Port {
        self.smmu.port(self.memory.clone())
    }
    fn stream(context: usize) -> Initiator {
        Initiator::new(StreamId((context as u32) << 8))
    }
    fn many_streams() -> Vec<Initiator> {
        (0..256).map(|i| Initiator::new(StreamId(i))).collect()
    }
    fn forget(&self, what: Forget) {
        const BANK: u64 = 0x1_0000;
        let w = self.smmu.window(false);
        let page = |va: Iova| {
            w.write64(BANK + cb::TLBIVAL as u64, va.get() >> 12).expect("inside the window");
        };
        match what {
            Forget::Pages(va, count) | Forget::Range(va, count) => {
                (0..count).for_each(|i| page(va.wrapping_add(i << 12)))
            }
            Forget::Asid => self.write(BANK as usize + cb::TLBIASID, 0),
            Forget::All => self.write(gr0::TLBIALLNSNH, 0),
        }
        self.write(BANK as usize + cb::TLBSYNC, 0);
        while w.read32(BANK + cb::TLBSTATUS as u64).expect("inside the window") & 1 != 0 {
            wait();
        }
    }
}

/// The shipped full SMMUv3: linear stream table, one CD per context.
pub struct V3 {
    memory: SystemMemory,
    smmu: Arc<SmmuV3<SystemMemory>>,
    tables: Vec<PageTable<Stage1, Memory>>,
    queue: Mutex<Queue>,
    /// Keeps the tables.
    _stage2: Option<PageTable<Stage2, Memory>>,
}

/// The command queue's producer.
struct Queue {
    base: u64,
    prod: u32,
}

impl Queue {
    const LOG2: u32 = 10;
}

/// Streams of one context.
const STREAMS: u64 = 256;

impl V3 {
    fn build(contexts: usize, entries: usize, data: u64, nested: bool) -> Self {
        let (memory, pool) = memory(data);
        let caps = Caps { tlb_entries: entries, ..Caps::full() };
        let smmu = SmmuV3::builder(caps).memory(memory.clone()).build().expect("a valid preset");
        let w = smmu.window(false);
        let streams = (STREAMS * contexts as u64).next_power_of_two();
        let block = |bytes: u64| pool.alloc(bytes as usize, bytes as usize).expect("room").pa.get();
        let (strtab, queue) = (block(streams * STE_BYTES), block(COMMAND_BYTES << Queue::LOG2));
        let store = |at: u64, words: &[u64]| {
            for (i, word) in words.iter().enumerate() {
                memory.store64(Pa(at + 8 * i as u64), *word).expect("memory");
            }
        };
        let stage2 = nested.then(|| flat_stage2(&memory, &pool, data));
        let mut tables = Vec::new();
        for n in 0..contexts as u64 {
            let dma = Memory::new(memory.clone(), pool.clone());
            let table = PageTable::<Stage1, _>::new(dma, table_config()).expect("48 bits, 4K");
            let cd = block(CD_BYTES);
            let word0 = CdDw0::new()
                .with_t0sz(16)
                .with_ir0(1)
                .with_or0(1)
                .with_sh0(3)
                .with_epd1(true)
                .with_v(true)
                .with_ips(5)
                .with_aa64(true)
                .with_r(true)
                .with_a(true)
                .with_asid(n as u16);
            let word1 = CdDw1::new().with_ttb0_51_4(table.root().get() >> 4);
            store(cd, &Cd::default().with_dw0(word0).with_dw1(word1).with_mair(0xf404_ff44).0);
            let config = if nested { SteConfig::Nested } else { SteConfig::Stage1 };
            let mut ste = Ste::default().with_dw0(
                SteDw0::new().with_v(true).with_config(config.code()).with_s1contextptr_55_6(cd >> 6),
            );
            ste = ste.with_dw1(SteDw1::new().with_s1cir(1).with_s1cor(1).with_s1csh(3).with_shcfg(1));
            if let Some(stage2) = &stage2 {
                let word2 = SteDw2::new()
                    .with_s2vmid(1)
                    .with_s2t0sz(16)
                    .with_s2sl0(2)
                    .with_s2ir0(1)
                    .with_s2or0(1)
                    .with_s2sh0(3)
                    .with_s2ps(5)
                    .with_s2aa64(true)
                    .with_s2r(true);
                ste = ste.with_dw2(word2);
                ste = ste.with_dw3(SteDw3::new().with_s2ttb_51_4(stage2.root().get() >> 4));
            }
            for i in 0..STREAMS {
                store(strtab + (n * STREAMS + i) * STE_BYTES, &ste.0);
            }
            tables.push(table);
        }
        let write = |at: u64, v: u32| w.write32(at, v).expect("inside the window");
        let write64 = |at: u64, v: u64| w.write64(at, v).expect("inside the window");
        write(offset::CR1, 0xd75);
        write64(offset::STRTAB_BASE, strtab);
        write(offset::STRTAB_BASE_CFG, streams.trailing_zeros());
        write64(offset::CMDQ_BASE, queue | u64::from(Queue::LOG2));
        write(offset::CMDQ_PROD, 0);
        write(offset::CMDQ_CONS, 0);
        write(offset::CR0, Cr0::new().with_cmdqen(true).with_smmuen(true).into_bits());
        let queue = Mutex::new(Queue { base: queue, prod: 0 });
        Self { memory, smmu, tables, queue, _stage2: stage2 }
    }
}

impl Rig for V3 {
    type Port = portcullis_smmuv3::Port<SystemMemory>;
    const NAME: &'static str = "SMMUv3";
    const RANGES: bool = true;

    fn new(contexts: usize, entries: usize, data: u64) -> Self {
        Self::build(contexts, entries, data, false)
    }
    fn nested(entries: usize, data: u64) -> Self {
        Self::build(1, entries, data, true)
    }
    fn table(&self, context: usize) -> &PageTable<Stage1, Memory> {
        &self.tables[context]
    }
    fn port(&self) -> Self::Port {
        self.smmu.port(self.memory.clone())
    }
    fn stream(context: usize) -> Initiator {
        Initiator::new(StreamId(context as u32 * STREAMS as u32))
    }
    fn many_streams() -> Vec<Initiator> {
        (0..STREAMS as u32).map(|i| Initiator::new(StreamId(i))).collect()
    }
    fn forget(&self, what: Forget) {
        let mut queue = self.queue.lock().expect("no panic under the lock");
        let mut put = |command: Command| {
            let at = queue.base + u64::from(queue.prod & ((1 << Queue::LOG2) - 1)) * COMMAND_BYTES;
            for (i, word) in command.0.into_iter().enumerate() {
                self.memory.store64(Pa(at + 8 * i as u64), word).expect("memory");
            }
            queue.prod = (queue.prod + 1) & ((2 << Queue::LOG2) - 1);
        };
        let va = Tlbi::new().with_opcode(Opcode::TlbiNhVa as u8).with_leaf(true);
        match what {
            Forget::Pages(first, count) => (0..count).for_each(|i| {
                put(va.with_addr_63_12((first.get() >> 12) + i).into());
            }),
            Forget::Range(first, count) => {
                // As Linux: 2^scale granules, at most 32 of them a command.
                let (mut at, mut left) = (first.get() >> 12, count);
                while left != 0 {
                    let scale = left.trailing_zeros();
                    let num = (left >> scale) & 31;
                    let range = va.with_tg(1).with_ttl(3).with_scale(scale as u8).with_num(num as u8 - 1);
                    put(range.with_addr_63_12(at).into());
                    (at, left) = (at + (num << scale), left - (num << scale));
                }
            }
            Forget::Asid => put(Tlbi::new().with_opcode(Opcode::TlbiNhAsid as u8).into()),
            Forget::All => put(Tlbi::new().with_opcode(Opcode::TlbiNsnhAll as u8).into()),
        }
        put(Sync::new().with_opcode(Opcode::Sync as u8).into());
        let w = self.smmu.window(false);
        w.write32(offset::CMDQ_PROD, queue.prod).expect("inside the window");
        while w.read32(offset::CMDQ_CONS).expect("inside the window") != queue.prod {
            wait();
        }
    }
}
