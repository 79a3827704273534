//! A machine for the tests: memory, an SMMU, its two register windows, interrupt lines, and a table builder that
//! shares nothing with the model. Offsets and bits are literal on purpose: they come from the manual, not from the
//! crate under test.
#![allow(dead_code)]

use std::sync::Arc;

use portcullis_arch::{Access, Attributes, Iova, Pa, StreamId};
use portcullis_bus::{
    DmaPort, Initiator, InterruptSink, IrqLevels, IrqLine, Memory, Mmio, StallTag, SystemMemory,
};
use portcullis_smmuv2::{Config, Interrupts, Port, SmmuV2, Window};
use portcullis_walk::{FaultOutcome, Translated};

/// RAM for tables.
pub const TABLES: u64 = 0x4000_0000;
pub const TABLES_SIZE: u64 = 0x20_0000;
/// RAM for data.
pub const DATA: u64 = 0x6000_0000;
pub const DATA_SIZE: u64 = 0x10_0000;

/// Lines of the interrupt sink: context bank n is line n.
pub const GLOBAL_NS: u32 = 200;
pub const GLOBAL_S: u32 = 201;
pub const CONFIG_NS: u32 = 202;
pub const CONFIG_S: u32 = 203;
pub const COMBINED_NS: u32 = 210;
pub const COMBINED_S: u32 = 211;

// Global space 0.
pub const CR0: u64 = 0x000;
pub const SCR1: u64 = 0x004;
pub const CR2: u64 = 0x008;
pub const ACR: u64 = 0x010;
pub const IDR0: u64 = 0x020;
pub const IDR1: u64 = 0x024;
pub const IDR2: u64 = 0x028;
pub const GFAR: u64 = 0x040;
pub const GFSR: u64 = 0x048;
pub const GFSRRESTORE: u64 = 0x04c;
pub const GFSYNR0: u64 = 0x050;
pub const GFSYNR1: u64 = 0x054;
pub const GFSYNR2: u64 = 0x058;
pub const STLBIALL: u64 = 0x060;
pub const TLBIVMID: u64 = 0x064;
pub const TLBIALLNSNH: u64 = 0x068;
pub const TLBIALLH: u64 = 0x06c;
pub const TLBGSYNC: u64 = 0x070;
pub const TLBGSTATUS: u64 = 0x074;
pub const TLBIVAH: u64 = 0x078;
pub const STLBIVALM: u64 = 0x0a0;
pub const STLBIVAM: u64 = 0x0a8;
pub const TLBIVALH64: u64 = 0x0b0;
pub const TLBIVMIDS1: u64 = 0x0b8;
pub const STLBIALLM: u64 = 0x0bc;
pub const TLBIVAH64: u64 = 0x0c0;
pub const GATS: u64 = 0x100;
pub const GPAR: u64 = 0x180;
pub const GATSR: u64 = 0x188;
pub const SMR: u64 = 0x800;
pub const S2CR: u64 = 0xc00;

// A context bank.
pub const SCTLR: u64 = 0x000;
pub const ACTLR: u64 = 0x004;
pub const RESUME: u64 = 0x008;
pub const TCR2: u64 = 0x010;
pub const TTBR0: u64 = 0x020;
pub const TTBR1: u64 = 0x028;
pub const TCR: u64 = 0x030;
pub const CONTEXTIDR: u64 = 0x034;
pub const MAIR0: u64 = 0x038;
pub const MAIR1: u64 = 0x03c;
pub const PAR: u64 = 0x050;
pub const FSR: u64 = 0x058;
pub const FSRRESTORE: u64 = 0x05c;
pub const FAR: u64 = 0x060;
pub const FSYNR0: u64 = 0x068;
pub const FSYNR1: u64 = 0x06c;
pub const IPAFAR: u64 = 0x070;
pub const TLBIVA: u64 = 0x600;
pub const TLBIVAA: u64 = 0x608;
pub const TLBIASID: u64 = 0x610;
pub const TLBIALL: u64 = 0x618;
pub const TLBIVAL: u64 = 0x620;
pub const TLBIVAAL: u64 = 0x628;
pub const TLBIIPAS2: u64 = 0x630;
pub const TLBIIPAS2L: u64 = 0x638;
pub const TLBSYNC: u64 = 0x7f0;
pub const TLBSTATUS: u64 = 0x7f4;
pub const ATS1PR: u64 = 0x800;
pub const ATS1PW: u64 = 0x808;
pub const ATS1UR: u64 = 0x810;
pub const ATS1UW: u64 = 0x818;

// SCTLR bits.
pub const M: u32 = 1 << 0;
pub const TRE: u32 = 1 << 1;
pub const AFE: u32 = 1 << 2;
pub const AFFD: u32 = 1 << 3;
pub const CFRE: u32 = 1 << 5;
pub const CFIE: u32 = 1 << 6;
pub const CFCFG: u32 = 1 << 7;
pub const HUPCF: u32 = 1 << 8;

/// What Linux writes for 4K pages, 48 bits, non-coherent walks.
pub const LINUX_TCR: u32 = 0x0080_2010;
pub const LINUX_TCR2: u32 = 0x0003_8015;
pub const LINUX_MAIR0: u32 = 0xf404_ff44;
pub const LINUX_CBAR: u32 = 0x0001_f300;

// Leaf attributes, stage 1, in the VMSAv8-64 format: valid page, AF, inner shareable, MAIR index 1 (write-back).
pub const PAGE: u64 = 0x707;
pub const NG: u64 = 1 << 11;
pub const USER: u64 = 1 << 6;
pub const READ_ONLY: u64 = 1 << 7;
pub const AF: u64 = 1 << 10;
pub const PXN: u64 = 1 << 53;
pub const UXN: u64 = 1 << 54;
/// A user read-write page as Linux maps it.
pub const RW: u64 = PAGE | NG | USER;
/// Stage 2: write-back, read and write, AF.
pub const S2_RW: u64 = 0x3 | 0xf << 2 | 0xc0 | 3 << 8 | AF;

pub type Smmu = SmmuV2<SystemMemory>;

pub struct Rig {
    pub mem: SystemMemory,
    pub smmu: Arc<Smmu>,
    pub irqs: Arc<IrqLevels>,
    /// Non-secure and secure software's window.
    pub ns: Window<SystemMemory>,
    pub s: Window<SystemMemory>,
    /// Offset of context bank 0, and the page size.
    banks: u64,
    page: u64,
}

pub fn memory() -> SystemMemory {
    SystemMemory::new(&[(TABLES, TABLES_SIZE), (DATA, DATA_SIZE)]).unwrap()
}

impl Rig {
    pub fn new(config: Config) -> Self {
        Self::with_memory(config, memory())
    }

    /// The SMMU of a Zynq UltraScale+.
    pub fn zynqmp() -> Self {
        Self::new(Config::mmu500_zynqmp())
    }

    /// The same with translation on and unmatched streams faulting, as Linux leaves it.
    pub fn zynqmp_on() -> Self {
        let r = Self::zynqmp();
        r.w(CR0, 0x0020_1c36);
        r
    }

    /// A plain SMMUv2 with everything, translation on, aborts and interrupts for global faults.
    pub fn plain_on() -> Self {
        let r = Self::new(Config::default());
        r.w(CR0, 0x0020_0406);
        r
    }

    pub fn with_memory(config: Config, mem: SystemMemory) -> Self {
        let page = if config.page_64k { 0x1_0000 } else { 0x1000 };
        let banks = config.window_size() / 2;
        let irqs = Arc::new(IrqLevels::default());
        let line = |n| IrqLine::new(irqs.clone() as Arc<dyn InterruptSink>, n);
        let wires = Interrupts {
            global: [line(GLOBAL_NS), line(GLOBAL_S)],
            config: [line(CONFIG_NS), line(CONFIG_S)],
            context: (0..u32::from(config.context_banks)).map(line).collect(),
            combined: [line(COMBINED_NS), line(COMBINED_S)],
        };
        let smmu = SmmuV2::new(config, mem.clone(), wires).unwrap();
        let (ns, s) = (smmu.window(false), smmu.window(true));
        Self { mem, smmu, irqs, ns, s, banks, page }
    }

    pub fn port(&self) -> Port<SystemMemory> {
        self.smmu.port(self.mem.clone())
    }

    /// Offset of a register of a context bank.
    pub fn cb(&self, bank: u8, reg: u64) -> u64 {
        self.banks + u64::from(bank) * self.page + reg
    }
    pub fn cbar(&self, bank: u8) -> u64 {
        self.page + 4 * u64::from(bank)
    }
    pub fn cbfrsynra(&self, bank: u8) -> u64 {
        self.page + 0x400 + 4 * u64::from(bank)
    }
    pub fn cba2r(&self, bank: u8) -> u64 {
        self.page + 0x800 + 4 * u64::from(bank)
    }

    // Non-secure accesses.
    pub fn r(&self, offset: u64) -> u32 {
        self.ns.read32(offset).unwrap()
    }
    pub fn w(&self, offset: u64, value: u32) {
        self.ns.write32(offset, value).unwrap();
    }
    pub fn r64(&self, offset: u64) -> u64 {
        self.ns.read64(offset).unwrap()
    }
    pub fn w64(&self, offset: u64, value: u64) {
        self.ns.write64(offset, value).unwrap();
    }
    // Secure accesses.
    pub fn rs(&self, offset: u64) -> u32 {
        self.s.read32(offset).unwrap()
    }
    pub fn ws(&self, offset: u64, value: u32) {
        self.s.write32(offset, value).unwrap();
    }

    // Registers of a bank, non-secure.
    pub fn rb(&self, bank: u8, reg: u64) -> u32 {
        self.r(self.cb(bank, reg))
    }
    pub fn wb(&self, bank: u8, reg: u64, value: u32) {
        self.w(self.cb(bank, reg), value);
    }
    pub fn rb64(&self, bank: u8, reg: u64) -> u64 {
        self.r64(self.cb(bank, reg))
    }
    pub fn wb64(&self, bank: u8, reg: u64, value: u64) {
        self.w64(self.cb(bank, reg), value);
    }

    /// Group `n`: valid, exactly `id`, to `s2cr`. S2CR first, as software must.
    pub fn group(&self, n: u64, id: u32, s2cr: u32) {
        self.w(S2CR + 4 * n, s2cr);
        self.w(SMR + 4 * n, 0x8000_0000 | id);
    }

    /// Makes `bank` a stage 1 AArch64 bank as Linux does (4K, 48 bits, ASID = bank), with `sctlr`.
    pub fn stage1(&self, bank: u8, root: u64, sctlr: u32) {
        self.w(self.cba2r(bank), 1);
        self.w(self.cbar(bank), LINUX_CBAR);
        self.wb(bank, TCR2, LINUX_TCR2);
        self.wb(bank, TCR, LINUX_TCR);
        self.wb64(bank, TTBR0, root | u64::from(bank) << 48);
        self.wb64(bank, TTBR1, u64::from(bank) << 48);
        self.wb(bank, MAIR0, LINUX_MAIR0);
        self.wb(bank, MAIR1, 0);
        self.wb(bank, SCTLR, sctlr);
    }

    /// Makes `bank` a stage 2 AArch64 bank: 4K, 40 bits from level 1 (two tables in a row), PASize 48.
    pub fn stage2(&self, bank: u8, root: u64, vmid: u32, sctlr: u32) {
        self.w(self.cba2r(bank), 1);
        self.w(self.cbar(bank), vmid);
        self.wb(bank, TCR, 0x8005_3558);
        self.wb64(bank, TTBR0, root);
        self.wb(bank, SCTLR, sctlr);
    }

    /// Turns `bank`, set up by [`stage1`](Rig::stage1), into a nested one on top of `stage2`.
    pub fn nest(&self, bank: u8, stage2: u8, vmid: u32) {
        self.w(self.cbar(bank), 0x0003_0000 | u32::from(stage2) << 8 | vmid);
    }

    pub fn poke(&self, pa: u64, value: u64) {
        self.mem.store64(Pa(pa), value).unwrap();
    }
    pub fn peek(&self, pa: u64) -> u64 {
        self.mem.load64(Pa(pa), Attributes::DEVICE_DEFAULT).unwrap()
    }
}

/// A non-secure, unprivileged data stream.
pub fn stream(id: u32) -> Initiator {
    Initiator::new(StreamId(id))
}

pub fn secure(id: u32) -> Initiator {
    Initiator::new(StreamId(id)).with_attrs(Attributes::DEVICE_DEFAULT.with_non_secure(false))
}

pub type Result<T = Translated> = std::result::Result<T, FaultOutcome>;

pub const ABORT: FaultOutcome = FaultOutcome::Terminate { abort: true };
pub const SILENT: FaultOutcome = FaultOutcome::Terminate { abort: false };

/// One read or write at an address, translated only: the output address.
pub fn go(port: &mut Port<SystemMemory>, from: Initiator, va: u64, access: Access) -> Result<u64> {
    port.translate(&from, Iova(va), access).map(|t| t.pa.get())
}
pub fn rd(port: &mut Port<SystemMemory>, id: u32, va: u64) -> Result<u64> {
    go(port, stream(id), va, Access::Read)
}
pub fn wr(port: &mut Port<SystemMemory>, id: u32, va: u64) -> Result<u64> {
    go(port, stream(id), va, Access::Write)
}

pub fn tag(r: Result<u64>) -> StallTag {
    match r {
        Err(FaultOutcome::Stall(t)) => t,
        other => panic!("not stalled: {other:?}"),
    }
}

/// Reads through the port.
pub fn fetch(port: &mut Port<SystemMemory>, id: u32, va: u64) -> u64 {
    let mut b = [0; 8];
    port.read(stream(id), Iova(va), &mut b).unwrap();
    u64::from_le_bytes(b)
}

/// Builds tables of 64-bit descriptors with 4K granules, page by page from the front of the table RAM.
pub struct Tables {
    mem: SystemMemory,
    next: u64,
}

impl Tables {
    pub fn new(rig: &Rig) -> Self {
        Self::at(rig, TABLES)
    }
    pub fn at(rig: &Rig, first: u64) -> Self {
        Self { mem: rig.mem.clone(), next: first }
    }
    /// `n` zeroed pages in a row, aligned to their size.
    pub fn alloc(&mut self, n: u64) -> u64 {
        let size = 0x1000 * n;
        let at = self.next.next_multiple_of(size);
        self.next = at + size;
        self.mem.write(Pa(at), Attributes::DEVICE_DEFAULT, &vec![0; size as usize]).unwrap();
        at
    }
    fn load(&self, pa: u64) -> u64 {
        self.mem.load64(Pa(pa), Attributes::DEVICE_DEFAULT).unwrap()
    }
    pub fn store(&self, pa: u64, value: u64) {
        self.mem.store64(Pa(pa), value).unwrap();
    }
    /// Address of the descriptor for `va` at `level`, with the tables above made as needed.
    pub fn slot(&mut self, root: u64, start: u32, va: u64, level: u32) -> u64 {
        let mut table = root;
        for l in start..=level {
            // The first table may be several in a row.
            let mask = if l == start { 0x1fff } else { 0x1ff };
            let at = table + 8 * (va >> (39 - 9 * l) & mask);
            if l == level {
                return at;
            }
            if self.load(at) & 1 == 0 {
                let next = self.alloc(1);
                self.store(at, next | 3);
            }
            table = self.load(at) & 0xffff_ffff_f000;
        }
        unreachable!()
    }
    /// Maps a page: stage 1 from level 0.
    pub fn page(&mut self, root: u64, va: u64, leaf: u64) {
        let at = self.slot(root, 0, va & 0xffff_ffff_ffff, 3);
        self.store(at, leaf);
    }
    /// Maps a page: stage 2 from level 1.
    pub fn page2(&mut self, root: u64, ipa: u64, leaf: u64) {
        let at = self.slot(root, 1, ipa, 3);
        self.store(at, leaf);
    }
    pub fn unmap(&mut self, root: u64, va: u64) {
        self.page(root, va, 0);
    }
}

/// A ZynqMP SMMU, translation on, where bank 0 serves stream 0x14e8 (FPD DMA 0) with `sctlr`, and its root table.
pub fn one_domain(sctlr: u32) -> (Rig, Tables, u64) {
    let rig = Rig::zynqmp_on();
    let mut t = Tables::new(&rig);
    let root = t.alloc(1);
    rig.stage1(0, root, sctlr);
    rig.group(0, SID, 0);
    (rig, t, root)
}

/// FPD DMA channel 0.
pub const SID: u32 = 0x14e8;
/// SCTLR as Linux writes it, without ASIDPNE.
pub const LINUX_SCTLR: u32 = 0x67;
