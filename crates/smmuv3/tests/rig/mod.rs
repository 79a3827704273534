//! A machine for the tests: memory, an SMMU, its register windows, interrupt lines, and builders of tables and commands
//! that share nothing with the model. Offsets and bits are literal on purpose: they come from the manual, not from the
//! crate under test.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{DmaPort, Initiator, InterruptSink, IrqLevels, Memory, Mmio, SystemMemory};
use portcullis_smmuv3::{Caps, Interrupts, Port, SecureCaps, SmmuV3, StallModel, Window, Wires};

pub const RAM: u64 = 0x8000_0000;
pub const RAM_SIZE: u64 = 0x40_0000;
pub const STRTAB: u64 = RAM;
pub const CMDQ: u64 = RAM + 0x1_0000;
pub const EVENTQ: u64 = RAM + 0x2_0000;
pub const PRIQ: u64 = RAM + 0x3_0000;
pub const CDS: u64 = RAM + 0x4_0000;
pub const S_STRTAB: u64 = RAM + 0x5_0000;
pub const S_CMDQ: u64 = RAM + 0x6_0000;
pub const S_EVENTQ: u64 = RAM + 0x7_0000;
pub const TABLES: u64 = RAM + 0x8_0000;
pub const DATA: u64 = RAM + 0x20_0000;
/// Nothing answers here.
pub const NOWHERE: u64 = 0x1_0000_0000;

pub const IDR0: u64 = 0x000;
pub const IDR1: u64 = 0x004;
pub const CR0: u64 = 0x020;
pub const CR0ACK: u64 = 0x024;
pub const CR1: u64 = 0x028;
pub const CR2: u64 = 0x02c;
pub const GBPA: u64 = 0x044;
pub const IRQ_CTRL: u64 = 0x050;
pub const IRQ_CTRLACK: u64 = 0x054;
pub const GERROR: u64 = 0x060;
pub const GERRORN: u64 = 0x064;
pub const GERROR_IRQ: u64 = 0x068;
pub const STRTAB_BASE: u64 = 0x080;
pub const STRTAB_CFG: u64 = 0x088;
pub const CMDQ_BASE: u64 = 0x090;
pub const CMDQ_PROD: u64 = 0x098;
pub const CMDQ_CONS: u64 = 0x09c;
pub const EVENTQ_BASE: u64 = 0x0a0;
pub const EVENTQ_PROD: u64 = 0x1_00a8;
pub const EVENTQ_CONS: u64 = 0x1_00ac;
pub const EVENTQ_IRQ: u64 = 0x0b0;
pub const PRIQ_BASE: u64 = 0x0c0;
pub const PRIQ_PROD: u64 = 0x1_00c8;
pub const PRIQ_CONS: u64 = 0x1_00cc;
pub const PRIQ_IRQ: u64 = 0x0d0;
/// Offset of the secure registers.
pub const S: u64 = 0x8000;
pub const S_EVENTQ_PROD: u64 = 0x80a8;
pub const S_EVENTQ_CONS: u64 = 0x80ac;

pub const SMMUEN: u32 = 1;
pub const PRIQEN: u32 = 2;
pub const EVENTQEN: u32 = 4;
pub const CMDQEN: u32 = 8;
pub const ATSCHK: u32 = 16;

pub const LINE_EVENTQ: u32 = 10;
pub const LINE_PRIQ: u32 = 11;
pub const LINE_SYNC: u32 = 12;
pub const LINE_GERROR: u32 = 13;
pub const LINE_SECURE: u32 = 20;

pub const DOORBELL: u64 = 0x0800_0000;

/// Queue sizes of a started rig, log2.
pub const CMDQ_LOG2: u32 = 6;
pub const EVENTQ_LOG2: u32 = 3;
pub const PRIQ_LOG2: u32 = 2;

pub const SYNC: [u64; 2] = [0x46, 0];

/// Messages that arrived at the doorbell, and levels of wires.
#[derive(Default)]
pub struct Sink {
    pub levels: IrqLevels,
    pub messages: Mutex<Vec<(u64, u32)>>,
}

impl InterruptSink for Sink {
    fn set_level(&self, line: u32, high: bool) {
        self.levels.drive(line, high);
    }
    fn message(&self, address: Pa, data: u32) {
        self.messages.lock().unwrap().push((address.get(), data));
    }
}

pub struct Rig {
    pub mem: SystemMemory,
    pub smmu: Arc<SmmuV3<SystemMemory>>,
    pub ns: Window<SystemMemory>,
    pub s: Window<SystemMemory>,
    pub sink: Arc<Sink>,
    next_table: u64,
}

pub fn attrs() -> Attributes {
    Attributes::DEVICE_DEFAULT
}

/// A v3.2 part of moderate size.
pub fn caps() -> Caps {
    Caps { sid_bits: 16, ssid_bits: 8, secure: None, ..Caps::full() }
}

/// The same with a secure interface.
pub fn secure_caps() -> Caps {
    Caps { secure: Some(SecureCaps { sid_bits: 8, msi: true }), ..caps() }
}

/// The same without stalls.
pub fn terminating_caps() -> Caps {
    Caps { stall_model: StallModel::Terminate, stall_max: 0, ..caps() }
}

pub fn from(sid: u32) -> Initiator {
    Initiator::new(StreamId(sid))
}

pub fn with_ssid(sid: u32, ssid: u32) -> Initiator {
    Initiator { substream: Some(SubstreamId(ssid)), ..from(sid) }
}

impl Rig {
    pub fn new(caps: Caps) -> Self {
        let mem = SystemMemory::new(&[(RAM, RAM_SIZE)]).unwrap();
        let sink = Arc::new(Sink::default());
        let as_sink: Arc<dyn InterruptSink> = sink.clone();
        let interrupts = Interrupts {
            non_secure: Wires::separate(&as_sink, [LINE_EVENTQ, LINE_PRIQ, LINE_SYNC, LINE_GERROR]),
            secure: Wires::combined(as_sink.clone(), LINE_SECURE),
            messages: Some(as_sink),
        };
        let smmu = SmmuV3::builder(caps)
            .memory(mem.clone())
            .interrupts(interrupts)
            .msi_doorbell(DOORBELL..DOORBELL + 0x1000)
            .build()
            .unwrap();
        let (ns, s) = (smmu.window(false), smmu.window(true));
        Self { mem, smmu, ns, s, sink, next_table: TABLES }
    }

    /// Everything on, as an operating system leaves it: 64 streams, queues of the sizes above.
    pub fn started(caps: Caps) -> Self {
        let r = Self::new(caps);
        r.start();
        r
    }

    pub fn start(&self) {
        self.w(CR1, 0xd75);
        self.w(CR2, 0x2);
        self.w64(STRTAB_BASE, STRTAB | 1 << 62);
        self.w(STRTAB_CFG, 6);
        self.w64(CMDQ_BASE, CMDQ | u64::from(CMDQ_LOG2));
        self.w64(EVENTQ_BASE, EVENTQ | u64::from(EVENTQ_LOG2));
        let mut cr0 = SMMUEN | CMDQEN | EVENTQEN;
        if self.smmu.caps().pri {
            self.w64(PRIQ_BASE, PRIQ | u64::from(PRIQ_LOG2));
            cr0 |= PRIQEN | ATSCHK;
        }
        let irqs = if self.smmu.caps().pri { 7 } else { 5 };
        self.w(IRQ_CTRL, irqs);
        self.w(CR0, cr0);
        assert_eq!(self.r(CR0ACK), cr0);
        assert_eq!(self.r(IRQ_CTRLACK), irqs);
    }

    /// The same for the secure interface.
    pub fn start_secure(&self) {
        self.s.write32(S + CR1, 0xd75).unwrap();
        self.s.write32(S + CR2, 0x2).unwrap();
        self.s.write64(S + STRTAB_BASE, S_STRTAB).unwrap();
        self.s.write32(S + STRTAB_CFG, 6).unwrap();
        self.s.write64(S + CMDQ_BASE, S_CMDQ | u64::from(CMDQ_LOG2)).unwrap();
        self.s.write64(S + EVENTQ_BASE, S_EVENTQ | u64::from(EVENTQ_LOG2)).unwrap();
        self.s.write32(S + IRQ_CTRL, 5).unwrap();
        self.s.write32(S + CR0, SMMUEN | CMDQEN | EVENTQEN).unwrap();
    }

    pub fn r(&self, at: u64) -> u32 {
        self.ns.read32(at).unwrap()
    }
    pub fn w(&self, at: u64, value: u32) {
        self.ns.write32(at, value).unwrap();
    }
    pub fn r64(&self, at: u64) -> u64 {
        self.ns.read64(at).unwrap()
    }
    pub fn w64(&self, at: u64, value: u64) {
        self.ns.write64(at, value).unwrap();
    }

    pub fn port(&self) -> Port<SystemMemory> {
        self.smmu.port(self.mem.clone())
    }

    pub fn store(&self, at: u64, words: &[u64]) {
        for (n, w) in words.iter().enumerate() {
            self.mem.store64(Pa(at + 8 * n as u64), *w).unwrap();
        }
    }
    pub fn load(&self, at: u64) -> u64 {
        self.mem.load64(Pa(at), attrs()).unwrap()
    }

    /// Queues a command without telling the SMMU, at PROD + `ahead`.
    pub fn put(&self, ahead: u32, command: [u64; 2]) {
        let mask = (1 << CMDQ_LOG2) - 1;
        let index = u64::from((self.r(CMDQ_PROD) + ahead) & mask);
        self.store(CMDQ + 16 * index, &command);
    }
    /// Moves PROD by `count`.
    pub fn kick(&self, count: u32) {
        let mask = (2 << CMDQ_LOG2) - 1;
        self.w(CMDQ_PROD, (self.r(CMDQ_PROD) + count) & mask);
    }
    /// Queues a command.
    pub fn command(&self, command: [u64; 2]) {
        self.put(0, command);
        self.kick(1);
    }
    /// Queues a command on the secure queue.
    pub fn secure_command(&self, command: [u64; 2]) {
        let mask = (1 << CMDQ_LOG2) - 1;
        let prod = self.s.read32(S + CMDQ_PROD).unwrap();
        self.store(S_CMDQ + 16 * u64::from(prod & mask), &command);
        self.s.write32(S + CMDQ_PROD, (prod + 1) & ((2 << CMDQ_LOG2) - 1)).unwrap();
    }
    /// CMDQ_CONS without ERR, and ERR.
    pub fn cons(&self) -> (u32, u32) {
        let cons = self.r(CMDQ_CONS);
        (cons & 0xf_ffff, cons >> 24)
    }
    /// The command error that is active, if any.
    pub fn command_error(&self) -> Option<u32> {
        let active = (self.r(GERROR) ^ self.r(GERRORN)) & 1 != 0;
        active.then(|| self.cons().1)
    }
    /// Acknowledges all global errors.
    pub fn acknowledge(&self) {
        self.w(GERRORN, self.r(GERROR));
    }
    pub fn cfgi_all(&self) {
        self.command([0x04, 31]);
        self.command(SYNC);
        assert_eq!(self.command_error(), None);
    }
    pub fn tlbi_all(&self) {
        self.command([0x30, 0]);
        self.command(SYNC);
        assert_eq!(self.command_error(), None);
    }

    /// Reads and consumes all events.
    pub fn events(&self) -> Vec<[u64; 4]> {
        self.take_events(EVENTQ, &self.ns, EVENTQ_PROD, EVENTQ_CONS)
    }
    pub fn secure_events(&self) -> Vec<[u64; 4]> {
        self.take_events(S_EVENTQ, &self.s, S_EVENTQ_PROD, S_EVENTQ_CONS)
    }
    fn take_events(&self, queue: u64, w: &Window<SystemMemory>, prod: u64, cons: u64) -> Vec<[u64; 4]> {
        let mut out = Vec::new();
        loop {
            let (p, c) = (w.read32(prod).unwrap() & 0xf_ffff, w.read32(cons).unwrap());
            if p == c & 0xf_ffff {
                return out;
            }
            let at = queue + 32 * u64::from(c & ((1 << EVENTQ_LOG2) - 1));
            out.push([0, 1, 2, 3].map(|n| self.load(at + 8 * n)));
            let next = (c + 1) & ((2 << EVENTQ_LOG2) - 1) | c & 1 << 31;
            w.write32(cons, next).unwrap();
        }
    }

    pub fn rises(&self, line: u32) -> u64 {
        self.sink.levels.rises(line)
    }
    pub fn messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.sink.messages.lock().unwrap())
    }

    pub fn ste(&self, sid: u32, words: [u64; 8]) {
        self.store(STRTAB + 64 * u64::from(sid), &words);
    }
    pub fn cd(&self, index: u64, words: [u64; 8]) {
        self.store(CDS + 64 * index, &words);
    }

    /// A zeroed page for a table.
    pub fn table(&mut self) -> u64 {
        let at = self.next_table;
        self.next_table += 0x1000;
        assert!(at < DATA);
        self.store(at, &[0; 512]);
        at
    }

    /// Writes `leaf` for the 4 KiB page of `va` (48 bits, 4 levels) below `root`, making tables on the way.
    pub fn map(&mut self, root: u64, va: u64, leaf: u64) {
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = table + (va >> shift & 511) * 8;
            let d = self.load(at);
            table = if d & 1 != 0 {
                d & 0xffff_ffff_f000
            } else {
                let next = self.table();
                self.store(at, &[next | 3]);
                next
            };
        }
        self.store(table + (va >> 12 & 511) * 8, &[leaf]);
    }

    /// A stream with stage 1: T0SZ 16, 4 KiB, TTB1 off, and `flags` (A, R, S in bits 46, 45, 44) in its CD, which is CD
    /// number `sid`. Returns the root table.
    pub fn stage1(&mut self, sid: u32, flags: u64) -> u64 {
        let root = self.table();
        self.cd(u64::from(sid), cd(root, flags));
        let ptr = CDS + 64 * u64::from(sid);
        self.ste(sid, [1 | 5 << 1 | ptr, 1 << 2 | 1 << 4 | 3 << 6, 0, 0, 0, 0, 0, 0]);
        root
    }

    /// A stream with stage 2 only: 48-bit IPAs from level 0, VMID 7, `flags` (R 58, S 57).
    pub fn stage2(&mut self, sid: u32, flags: u64) -> u64 {
        let root = self.table();
        self.ste(sid, [1 | 6 << 1, 0, s2_dw2(flags), root, 0, 0, 0, 0]);
        root
    }
}

/// Word 2 of an STE: S2VMID 7, S2T0SZ 16, S2SL0 2 (level 0), 4 KiB, 48 bits, AArch64.
pub fn s2_dw2(flags: u64) -> u64 {
    7 | 16 << 32 | 2 << 38 | 1 << 40 | 1 << 42 | 3 << 44 | 5 << 48 | 1 << 51 | flags
}

/// A CD: T0SZ 16, 4 KiB, EPD1, valid, IPS 48 bits, AArch64, ASID 1, MAIR 0 = write-back.
pub fn cd(root: u64, flags: u64) -> [u64; 8] {
    let dw0 = 16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 48 | flags;
    [dw0, root, 0, 0xff, 0, 0, 0, 0]
}

pub const A: u64 = 1 << 46;
pub const R: u64 = 1 << 45;
pub const STALL: u64 = 1 << 44;

/// Page, AF, inner shareable, unprivileged, nG: read and write.
pub const RW: u64 = 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11;
/// The same, read-only.
pub const RO: u64 = RW | 1 << 7;
/// Stage 2: page, AF, write-back, inner shareable, read and write.
pub const S2_RW: u64 = 3 | 0xf << 2 | 3 << 6 | 3 << 8 | 1 << 10;
pub const S2_RO: u64 = S2_RW & !(2 << 6);

/// What a 4-byte read through a port gives.
pub fn read4(
    port: &mut Port<SystemMemory>,
    from: Initiator,
    va: u64,
) -> Result<u32, portcullis_bus::DmaError> {
    let mut b = [0xee; 4];
    port.read(from, Iova(va), &mut b)?;
    Ok(u32::from_le_bytes(b))
}

pub fn write4(
    port: &mut Port<SystemMemory>,
    from: Initiator,
    va: u64,
    value: u32,
) -> Result<(), portcullis_bus::DmaError> {
    port.write(from, Iova(va), &value.to_le_bytes())
}
