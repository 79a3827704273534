//! The kernel's side of the replay: registers, queues, tables and entry updates as arm-smmu-v3.c of Linux 6.12 makes them.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{
    AtcCompletion, AtcInvalidation, AtcTicket, AtsDevice, DmaError, DmaFault, DmaPort, Initiator,
    InterruptSink, IrqLevels, Memory, Mmio, PageGroupResponse, SystemMemory,
};
use portcullis_smmuv3::{Caps, Interrupts, Port, SmmuV3, Window, Wires};

pub const RAM: u64 = 0x8000_0000;
const RAM_SIZE: u64 = 256 << 20;
/// The interrupt controller's doorbell (outside of RAM).
const DOORBELL: u64 = 0x0809_0040;

pub const IDR0: u64 = 0x0;
pub const CR0: u64 = 0x20;
pub const CR0ACK: u64 = 0x24;
pub const CR1: u64 = 0x28;
pub const CR2: u64 = 0x2c;
pub const GBPA: u64 = 0x44;
pub const IRQ_CTRL: u64 = 0x50;
pub const IRQ_CTRLACK: u64 = 0x54;
pub const GERROR: u64 = 0x60;
pub const GERRORN: u64 = 0x64;
const GERROR_IRQ_CFG0: u64 = 0x68;
pub const STRTAB_BASE: u64 = 0x80;
const STRTAB_BASE_CFG: u64 = 0x88;
const CMDQ_BASE: u64 = 0x90;
pub const CMDQ_PROD: u64 = 0x98;
pub const CMDQ_CONS: u64 = 0x9c;
const EVENTQ_BASE: u64 = 0xa0;
const EVENTQ_IRQ_CFG0: u64 = 0xb0;
const PRIQ_BASE: u64 = 0xc0;
const PRIQ_IRQ_CFG0: u64 = 0xd0;
pub const EVENTQ_PROD: u64 = 0x1_00a8;
pub const EVENTQ_CONS: u64 = 0x1_00ac;
const PRIQ_PROD: u64 = 0x1_00c8;
const PRIQ_CONS: u64 = 0x1_00cc;

/// What the probe finds.
#[derive(Clone, Debug, Default)]
pub struct Features {
    pub two_level: bool,
    pub two_level_cd: bool,
    pub coherent: bool,
    pub msi: bool,
    pub sev: bool,
    pub stalls: bool,
    pub stall_force: bool,
    pub ats: bool,
    pub pri: bool,
    pub hyp: bool,
    pub stage1: bool,
    pub stage2: bool,
    pub range_inv: bool,
    pub attr_types: bool,
    pub sid_bits: u32,
    pub ssid_bits: u32,
    pub cmdq_log2: u32,
    pub evtq_log2: u32,
    pub priq_log2: u32,
    pub asid_bits: u32,
    pub vmid_bits: u32,
    pub oas: u32,
    pub ias: u32,
    pub pgsizes: u64,
}

#[derive(Default)]
struct Sink {
    levels: IrqLevels,
    messages: Mutex<Vec<(u64, u32)>>,
}

impl InterruptSink for Sink {
    fn set_level(&self, line: u32, high: bool) {
        self.levels.drive(line, high);
    }
    fn message(&self, address: Pa, data: u32) {
        self.messages.lock().unwrap().push((address.get(), data));
    }
}

/// A device's translation cache that answers as it is told.
pub struct FakeAtc {
    completion: Mutex<AtcCompletion>,
    seen: Mutex<Vec<AtcInvalidation>>,
    responses: Mutex<Vec<PageGroupResponse>>,
}

impl FakeAtc {
    pub fn answer(&self, how: AtcCompletion) {
        *self.completion.lock().unwrap() = how;
    }
    pub fn invalidations(&self) -> Vec<AtcInvalidation> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
    pub fn answers(&self) -> Vec<PageGroupResponse> {
        std::mem::take(&mut self.responses.lock().unwrap())
    }
}

impl AtsDevice for FakeAtc {
    fn invalidate(&self, what: AtcInvalidation) -> AtcTicket {
        self.seen.lock().unwrap().push(what);
        AtcTicket(0)
    }
    fn completion(&self, _: AtcTicket) -> AtcCompletion {
        *self.completion.lock().unwrap()
    }
    fn page_response(&self, response: PageGroupResponse) {
        self.responses.lock().unwrap().push(response);
    }
}

/// An I/O page table with its tags.
pub struct Domain {
    pub root: u64,
    start_level: u32,
    pub asid: u64,
    pub vmid: u64,
    stage2: bool,
    input_bits: u64,
    /// Where new tables come from, if not from the allocator.
    arena: Option<u64>,
    tables: Vec<u64>,
    /// What the kernel's own address of a table is above the one in its descriptors.
    above: u64,
}

struct Master {
    cd_table: u64,
    ssid_bits: u64,
    /// Level 1 CD table, with leaves of 1024 CDs.
    two_level: bool,
}

pub struct Linux {
    mem: SystemMemory,
    smmu: Arc<SmmuV3<SystemMemory>>,
    pub w: Window<SystemMemory>,
    sink: Arc<Sink>,
    pub f: Features,
    pub vhe: bool,
    next: u64,
    strtab: u64,
    pub cmdq: u64,
    cmdq_log2: u32,
    prod: u32,
    evtq: u64,
    evtq_log2: u32,
    /// llq.prod and llq.cons of the event queue.
    evt: (u32, u32),
    priq: u64,
    priq_log2: u32,
    next_asid: u64,
    masters: std::collections::BTreeMap<u32, Master>,
    pub msi_polling: bool,
    pub stall_enabled: bool,
    pub ats_enabled: bool,
    /// Commands so far.
    pub issued: u64,
    pub last_lines: Vec<String>,
}

impl Linux {
    pub fn new(caps: Caps) -> Self {
        let mem = SystemMemory::new(&[(RAM, RAM_SIZE)]).unwrap();
        let sink = Arc::new(Sink::default());
        let as_sink: Arc<dyn InterruptSink> = sink.clone();
        let interrupts = Interrupts {
            non_secure: Wires::separate(&as_sink, [1, 2, 3, 4]),
            messages: Some(as_sink),
            ..Interrupts::default()
        };
        let smmu = SmmuV3::builder(caps)
            .memory(mem.clone())
            .interrupts(interrupts)
            .msi_doorbell(DOORBELL..DOORBELL + 4)
            .build()
            .unwrap();
        let w = smmu.window(false);
        Self {
            mem,
            smmu,
            w,
            sink,
            f: Features::default(),
            vhe: false,
            next: RAM + 0x1000,
            strtab: 0,
            cmdq: 0,
            cmdq_log2: 0,
            prod: 0,
            evtq: 0,
            evtq_log2: 0,
            evt: (0, 0),
            priq: 0,
            priq_log2: 0,
            next_asid: 1,
            masters: Default::default(),
            msi_polling: false,
            stall_enabled: false,
            ats_enabled: false,
            issued: 0,
            last_lines: Vec::new(),
        }
    }

    /// Probed and reset.
    pub fn boot(caps: Caps) -> Self {
        let mut m = Self::new(caps);
        m.reset(false);
        m
    }

    /// The same with a host at EL2 with E2H.
    pub fn boot_vhe(caps: Caps) -> Self {
        let mut m = Self::new(caps);
        m.reset(true);
        m
    }

    // Registers.

    pub fn r(&self, at: u64) -> u32 {
        self.w.read32(at).unwrap()
    }
    pub fn r64(&self, at: u64) -> u64 {
        self.w.read64(at).unwrap()
    }
    pub fn w32(&self, at: u64, value: u32) {
        self.w.write32(at, value).unwrap();
    }
    fn w64(&self, at: u64, value: u64) {
        self.w.write64(at, value).unwrap();
    }
    /// arm_smmu_write_reg_sync: the acknowledgement equals what was written, as a whole.
    fn write_reg_sync(&self, value: u32, at: u64, ack: u64) {
        self.w32(at, value);
        assert_eq!(self.r(ack), value, "register {at:#x} is not acknowledged");
    }
    /// arm_smmu_update_gbpa.
    pub fn update_gbpa(&self, set: u32, clear: u32) -> bool {
        let old = self.r(GBPA);
        if old & 1 << 31 != 0 {
            return false;
        }
        self.w32(GBPA, old & !clear | set | 1 << 31);
        self.r(GBPA) & 1 << 31 == 0
    }

    // Memory.

    pub fn alloc(&mut self, size: u64, align: u64) -> u64 {
        let at = self.next.next_multiple_of(align);
        self.next = at + size;
        assert!(self.next <= RAM + RAM_SIZE);
        at
    }
    pub fn store(&self, at: u64, words: &[u64]) {
        for (n, w) in words.iter().enumerate() {
            self.mem.store64(Pa(at + 8 * n as u64), *w).unwrap();
        }
    }
    pub fn load(&self, at: u64) -> u64 {
        self.mem.load64(Pa(at), Attributes::DEVICE_DEFAULT).unwrap()
    }

    // Probe and reset.

    /// arm_smmu_device_hw_probe.
    pub fn probe(&self) -> Features {
        let (idr0, idr1, idr3, idr5) = (self.r(0), self.r(4), self.r(0xc), self.r(0x14));
        let _iidr = self.r(0x18);
        let bit = |reg: u32, n: u32| reg >> n & 1 != 0;
        let field = |reg: u32, hi: u32, lo: u32| reg >> lo & ((2u32 << (hi - lo)) - 1);
        assert!(field(idr1, 30, 28) == 0, "embedded implementation");
        assert!(matches!(field(idr0, 22, 21), 0 | 2 | 3));
        assert!(bit(idr0, 0) || bit(idr0, 1), "no translation support");
        let ttf = field(idr0, 3, 2);
        assert!(ttf & 2 != 0, "AArch64 table format not supported");
        let mut pgsizes = 0;
        for (n, sizes) in
            [(6, 1u64 << 16 | 1 << 29), (5, 1 << 14 | 1 << 25), (4, 1 << 12 | 1 << 21 | 1 << 30)]
        {
            if bit(idr5, n) {
                pgsizes |= sizes;
            }
        }
        let oas = [32, 36, 40, 42, 44, 48, 52][field(idr5, 2, 0) as usize];
        let stall = field(idr0, 25, 24);
        let f = Features {
            two_level: field(idr0, 28, 27) == 1,
            two_level_cd: bit(idr0, 19),
            coherent: bit(idr0, 4),
            msi: bit(idr0, 13),
            sev: bit(idr0, 14),
            stalls: stall == 0 || stall == 2,
            stall_force: stall == 2,
            ats: bit(idr0, 10),
            pri: bit(idr0, 16),
            hyp: bit(idr0, 9),
            stage1: bit(idr0, 1),
            stage2: bit(idr0, 0),
            range_inv: bit(idr3, 10),
            attr_types: bit(idr1, 27),
            sid_bits: field(idr1, 5, 0),
            ssid_bits: field(idr1, 10, 6),
            cmdq_log2: field(idr1, 25, 21).min(18),
            evtq_log2: field(idr1, 20, 16).min(17),
            priq_log2: field(idr1, 15, 11).min(18),
            asid_bits: if bit(idr0, 12) { 16 } else { 8 },
            vmid_bits: if bit(idr0, 18) { 16 } else { 8 },
            oas,
            ias: if ttf == 3 { oas.max(40) } else { oas },
            pgsizes,
        };
        assert!(f.cmdq_log2 > 6, "command queue size <= 64 entries not supported");
        // A stream table of up to 256 entries is linear, whatever is supported.
        Features { two_level: f.two_level && f.sid_bits > 8, ..f }
    }

    /// arm_smmu_init_structures and arm_smmu_device_reset, arm_smmu_setup_irqs in its place.
    pub fn reset(&mut self, vhe: bool) {
        self.f = self.probe();
        self.vhe = vhe;
        let f = self.f.clone();
        (self.cmdq_log2, self.evtq_log2, self.priq_log2) = (f.cmdq_log2, f.evtq_log2, f.priq_log2);
        self.cmdq = self.alloc(16 << f.cmdq_log2, 16 << f.cmdq_log2);
        self.evtq = self.alloc(32 << f.evtq_log2, 32 << f.evtq_log2);
        self.prod = 0;
        self.evt = (0, 0);
        let cfg = if f.two_level {
            // At most 2^17 level 1 descriptors.
            let l1 = (f.sid_bits - 8).min(17);
            self.strtab = self.alloc(8 << l1, 8 << l1);
            1 << 16 | 8 << 6 | (l1 + 8)
        } else {
            let size = 64u64 << f.sid_bits;
            self.strtab = self.alloc(size, size);
            for sid in 0..1u64 << f.sid_bits {
                self.store(self.strtab + 64 * sid, &[1, 0, 0, 0, 0, 0, 0, 0]);
            }
            f.sid_bits
        };
        if self.r(CR0) & 1 != 0 {
            assert!(self.update_gbpa(1 << 20, 0), "SMMU currently enabled! Resetting...");
        }
        self.write_reg_sync(0, CR0, CR0ACK);
        self.w32(CR1, 0xd75);
        self.w32(CR2, 0x6 | u32::from(vhe));
        self.w64(STRTAB_BASE, self.strtab | 1 << 62);
        self.w32(STRTAB_BASE_CFG, cfg);
        self.w64(CMDQ_BASE, 1 << 62 | self.cmdq | u64::from(self.cmdq_log2));
        self.w32(CMDQ_PROD, 0);
        self.w32(CMDQ_CONS, 0);
        let mut cr0 = 1 << 3;
        self.write_reg_sync(cr0, CR0, CR0ACK);
        self.msi_polling = f.msi && f.coherent;
        self.command([0x04, 31]);
        self.sync();
        if f.hyp {
            self.command([0x20, 0]);
            self.sync();
        }
        self.command([0x30, 0]);
        self.sync();
        self.w64(EVENTQ_BASE, 1 << 62 | self.evtq | u64::from(self.evtq_log2));
        self.w32(EVENTQ_PROD, 0);
        self.w32(EVENTQ_CONS, 0);
        cr0 |= 1 << 2;
        self.write_reg_sync(cr0, CR0, CR0ACK);
        if f.pri {
            self.priq = self.alloc(16 << f.priq_log2, 16 << f.priq_log2);
            self.w64(PRIQ_BASE, 1 << 62 | self.priq | u64::from(self.priq_log2));
            self.w32(PRIQ_PROD, 0);
            self.w32(PRIQ_CONS, 0);
            cr0 |= 1 << 1;
            self.write_reg_sync(cr0, CR0, CR0ACK);
        }
        if f.ats {
            cr0 |= 1 << 4;
            self.write_reg_sync(cr0, CR0, CR0ACK);
        }
        self.setup_irqs();
        cr0 |= 1;
        self.write_reg_sync(cr0, CR0, CR0ACK);
    }

    fn setup_irqs(&self) {
        self.write_reg_sync(0, IRQ_CTRL, IRQ_CTRLACK);
        let mut sources = vec![(EVENTQ_IRQ_CFG0, 0x100), (GERROR_IRQ_CFG0, 0x101)];
        if self.f.pri {
            sources.push((PRIQ_IRQ_CFG0, 0x102));
        }
        for (at, _) in &sources {
            self.w64(*at, 0);
        }
        if self.f.msi {
            for (at, data) in sources {
                self.w64(at, DOORBELL);
                self.w32(at + 8, data);
                self.w32(at + 12, 1);
            }
        }
        self.write_reg_sync(if self.f.pri { 7 } else { 5 }, IRQ_CTRL, IRQ_CTRLACK);
    }

    /// arm_smmu_device_disable, which is also the shutdown.
    pub fn disable(&self) {
        self.write_reg_sync(0, CR0, CR0ACK);
    }

    /// Event queue interrupts since the boot: messages where there are some.
    pub fn event_interrupts(&self) -> u64 {
        let wire = self.sink.levels.rises(1);
        if self.f.msi {
            let messages = self.sink.messages.lock().unwrap();
            let n = messages.iter().filter(|m| **m == (DOORBELL, 0x100)).count() as u64;
            assert_eq!(wire, n, "an enabled source drives both");
        }
        wire
    }

    // Commands.

    /// One command; returns where it is.
    pub fn command(&mut self, command: [u64; 2]) -> u64 {
        self.commands(&[command])
    }

    pub fn commands(&mut self, commands: &[[u64; 2]]) -> u64 {
        let mut at = 0;
        for command in commands {
            let mask = (1 << self.cmdq_log2) - 1;
            let full = (self.prod ^ self.r(CMDQ_CONS)) & (2 * mask + 1) == mask + 1;
            assert!(!full, "the queue does not drain");
            at = self.cmdq + 16 * u64::from(self.prod & mask);
            self.store(at, command);
            self.prod = (self.prod + 1) & (2 * mask + 1);
            self.issued += 1;
        }
        self.w32(CMDQ_PROD, self.prod);
        at
    }

    /// The CMD_SYNC that polls its own first word, at the place where it will be.
    pub fn sync_command(&self) -> [u64; 2] {
        let mask = (1 << self.cmdq_log2) - 1;
        let at = self.cmdq + 16 * u64::from(self.prod & mask);
        [0x46 | 1 << 12 | 3 << 22 | 0xf << 24, at & 0xf_ffff_ffff_fffc]
    }

    /// CMD_SYNC, and its completion. Returns where it was.
    pub fn sync(&mut self) -> u64 {
        if self.msi_polling {
            let command = self.sync_command();
            let at = self.command(command);
            assert_eq!(self.load(at) as u32, 0, "CMD_SYNC timeout");
            at
        } else {
            let at = self.command([0x46 | 2 << 12, 0]);
            assert_eq!(self.r(CMDQ_CONS) & 0xf_ffff, self.prod, "CMD_SYNC timeout");
            at
        }
    }

    /// arm_smmu_gerror_handler. Returns what it prints.
    pub fn gerror_handler(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let (gerror, gerrorn) = (self.r(GERROR), self.r(GERRORN));
        let active = gerror ^ gerrorn;
        if active & 0x1fd == 0 {
            return lines;
        }
        lines.push(format!("unexpected global error reported (0x{active:08x}), this could be serious"));
        if active & 1 != 0 {
            let cons = self.r(CMDQ_CONS);
            let what = ["No error", "Illegal command", "Abort on command fetch", "ATC invalidate timeout"];
            let idx = (cons >> 24 & 0x7f) as usize;
            lines.push(format!("CMDQ error (cons 0x{cons:08x}): {}", what[idx]));
            if idx == 1 {
                let at = self.cmdq + 16 * u64::from(cons & ((1 << self.cmdq_log2) - 1));
                lines.push("skipping command in error state:".into());
                lines.extend([0, 8].map(|o| format!("\t0x{:016x}", self.load(at + o))));
                self.store(at, &[0x46 | 2 << 12, 0]);
            }
        }
        self.w32(GERRORN, gerror);
        lines
    }

    // The other queues.

    /// arm_smmu_evtq_thread. Returns the records, and whether it says "EVTQ overflow detected -- events lost".
    fn evtq_thread(&mut self) -> (Vec<[u64; 4]>, bool) {
        let size = 1u32 << self.evtq_log2;
        let mut records = Vec::new();
        let mut overflow = false;
        loop {
            let (prod, mut cons) = self.evt;
            while prod & (2 * size - 1) != cons & (2 * size - 1) {
                let at = self.evtq + 32 * u64::from(cons & (size - 1));
                records.push([0, 8, 16, 24].map(|o| self.load(at + o)));
                cons = cons & 1 << 31 | (cons + 1) & (2 * size - 1);
                self.w32(EVENTQ_CONS, cons);
            }
            let new = self.r(EVENTQ_PROD);
            overflow |= (new ^ prod) >> 31 != 0;
            self.evt = (new, cons);
            if new & (2 * size - 1) == cons & (2 * size - 1) {
                break;
            }
        }
        // queue_sync_cons_ovf.
        let (prod, cons) = self.evt;
        if (prod ^ cons) >> 31 != 0 {
            self.evt.1 = prod & 1 << 31 | cons & !(1 << 31);
            self.w32(EVENTQ_CONS, self.evt.1);
        }
        (records, overflow)
    }

    pub fn events(&mut self) -> Vec<[u64; 4]> {
        self.evtq_thread().0
    }

    /// What the event thread prints, and whether it saw an overflow.
    pub fn take_events(&mut self) -> (Vec<String>, bool) {
        let (records, overflow) = self.evtq_thread();
        let mut lines = Vec::new();
        for r in records {
            lines.push(format!("event 0x{:02x} received:", r[0] as u8));
            lines.extend(r.map(|w| format!("\t0x{w:016x}")));
        }
        self.last_lines = lines.clone();
        (lines, overflow)
    }

    /// arm_smmu_priq_thread without a consumer. Returns what it prints.
    pub fn priq_thread(&mut self) -> Vec<String> {
        let size = 1u32 << self.priq_log2;
        let mut lines = Vec::new();
        while self.r(PRIQ_PROD) != self.r(PRIQ_CONS) {
            let cons = self.r(PRIQ_CONS);
            let at = self.priq + 16 * u64::from(cons & (size - 1));
            let [a, b] = [self.load(at), self.load(at + 8)];
            self.w32(PRIQ_CONS, cons & 1 << 31 | (cons + 1) & (2 * size - 1));
            let (sid, ssv, last) = (a & 0xffff_ffff, a >> 63 & 1 != 0, a >> 62 & 1 != 0);
            let ssid = if ssv { a >> 32 & 0xf_ffff } else { 0 };
            let flag = |n: u32, s: &'static str| if a >> n & 1 != 0 { s } else { "" };
            lines.push("unexpected PRI request received:".into());
            lines.push(format!(
                "\tsid 0x{sid:08x}.0x{ssid:05x}: [{}{}] {}privileged {}{}{} access at iova 0x{:016x}",
                b & 0x1ff,
                flag(62, "L"),
                if a >> 58 & 1 != 0 { "" } else { "un" },
                flag(60, "R"),
                flag(61, "W"),
                flag(59, "X"),
                b & !0xfff,
            ));
            if last {
                self.command([0x41 | u64::from(ssv) << 11 | ssid << 12 | sid << 32, b & 0x1ff]);
            }
        }
        lines
    }

    pub fn assert_quiet(&mut self) {
        assert_eq!(self.r(GERROR), self.r(GERRORN));
        assert_eq!(self.events(), [[0; 4]; 0]);
        assert_eq!(self.r(CMDQ_CONS) & 0xf_ffff, self.r(CMDQ_PROD));
    }

    // Devices.

    pub fn port(&self) -> Port<SystemMemory> {
        self.smmu.port(self.mem.clone())
    }

    pub fn ats_device(&self, sid: u32) -> Arc<FakeAtc> {
        let device = Arc::new(FakeAtc {
            completion: Mutex::new(AtcCompletion::Done),
            seen: Mutex::default(),
            responses: Mutex::default(),
        });
        self.smmu.attach_ats(StreamId(sid), device.clone());
        device
    }

    pub fn add_master(&mut self, sid: u32) {
        self.add_master_with_ssids(sid, 0);
    }

    /// arm_smmu_probe_device, and the CD table of the first attach.
    pub fn add_master_with_ssids(&mut self, sid: u32, ssid_bits: u64) {
        if self.f.two_level {
            let l1 = self.strtab + 8 * u64::from(sid >> 8);
            if self.load(l1) == 0 {
                let l2 = self.alloc(64 << 8, 64 << 8);
                for n in 0..256 {
                    self.store(l2 + 64 * n, &[1, 0, 0, 0, 0, 0, 0, 0]);
                }
                // Span 9; no invalidation.
                self.store(l1, &[l2 | 9]);
            }
        }
        let two_level = self.f.two_level_cd && ssid_bits > 10;
        let cd_table = if two_level {
            self.alloc(8 << (ssid_bits - 10), 0x1000)
        } else {
            self.alloc(64 << ssid_bits, (64u64 << ssid_bits).max(64))
        };
        self.masters.insert(sid, Master { cd_table, ssid_bits, two_level });
    }

    fn ste_at(&self, sid: u32) -> u64 {
        if self.f.two_level {
            let l1 = self.load(self.strtab + 8 * u64::from(sid >> 8));
            (l1 & 0xf_ffff_ffff_ffc0) + 64 * u64::from(sid & 255)
        } else {
            self.strtab + 64 * u64::from(sid)
        }
    }

    // Entries.

    /// arm_smmu_write_entry. `probe` sees every single store.
    fn write_entry(
        &mut self,
        at: u64,
        target: [u64; 8],
        used: impl Fn(&[u64; 8]) -> [u64; 8],
        mut sync: impl FnMut(&mut Self),
        mut probe: impl FnMut(&Self),
    ) {
        let mut entry: [u64; 8] = std::array::from_fn(|n| self.load(at + 8 * n as u64));
        let (now, then) = (used(&entry), used(&target));
        let mut unused: [u64; 8] = std::array::from_fn(|n| entry[n] & now[n] | target[n] & !now[n]);
        let differs: Vec<usize> = (0..8).filter(|&n| (unused[n] ^ target[n]) & then[n] != 0).collect();
        let mut set = |m: &mut Self, words: [u64; 8], range: std::ops::Range<usize>| {
            let mut changed = false;
            for n in range {
                if entry[n] != words[n] {
                    entry[n] = words[n];
                    m.store(at + 8 * n as u64, &[words[n]]);
                    probe(m);
                    changed = true;
                }
            }
            if changed {
                sync(m);
                probe(m);
            }
        };
        match differs[..] {
            [] => set(self, target, 0..8),
            [critical] => {
                unused[critical] = self.load(at + 8 * critical as u64);
                set(self, unused, 0..8);
                set(self, target, critical..critical + 1);
                set(self, target, 0..8);
            }
            _ => {
                let mut none = target;
                none[0] = 0;
                set(self, none, 0..1);
                set(self, target, 1..8);
                set(self, target, 0..1);
            }
        }
    }

    pub fn write_ste(&mut self, sid: u32, target: [u64; 8], probe: impl FnMut(&Self)) {
        let sync = |m: &mut Self| {
            m.command([0x03 | u64::from(sid) << 32, 1]);
            m.sync();
        };
        self.write_entry(self.ste_at(sid), target, ste_used, sync, probe);
        // Prefetch, as the driver still does.
        self.command([0x01 | u64::from(sid) << 32, 0]);
    }

    pub fn cfgi_cd(&mut self, sid: u32, ssid: u32) {
        self.command([0x05 | u64::from(ssid) << 12 | u64::from(sid) << 32, 1]);
        self.sync();
    }

    pub fn write_cd(&mut self, sid: u32, ssid: u32, target: [u64; 8], probe: impl FnMut(&Self)) {
        let (table, two_level) = (self.masters[&sid].cd_table, self.masters[&sid].two_level);
        let at = if two_level {
            let l1 = table + 8 * u64::from(ssid >> 10);
            if self.load(l1) & 1 == 0 {
                let leaf = self.alloc(64 << 10, 64 << 10);
                self.store(l1, &[leaf | 1]);
                // An invalid L1CD may be cached.
                self.command([0x05 | u64::from(ssid) << 12 | u64::from(sid) << 32, 0]);
                self.sync();
            }
            (self.load(l1) & 0xf_ffff_ffff_f000) + 64 * u64::from(ssid & 1023)
        } else {
            table + 64 * u64::from(ssid)
        };
        self.write_entry(at, target, cd_used, |m| m.cfgi_cd(sid, ssid), probe);
    }

    pub fn clear_cd(&mut self, sid: u32, ssid: u32, probe: impl FnMut(&Self)) {
        self.write_cd(sid, ssid, [0; 8], probe);
    }

    pub fn identity_ste(&self) -> [u64; 8] {
        [1 | 4 << 1, if self.f.attr_types { 1 << 44 } else { 0 }, 0, 0, 0, 0, 0, 0]
    }

    /// arm_smmu_make_cdtable_ste.
    fn cdtable_ste(&self, sid: u32) -> [u64; 8] {
        let m = &self.masters[&sid];
        let fmt = if m.two_level { 2 } else { 0 };
        let stalld = self.f.stalls && !self.f.stall_force && !self.stall_enabled;
        let one = 2
            | 1 << 2
            | 1 << 4
            | 3 << 6
            | u64::from(stalld) << 27
            | u64::from(self.ats_enabled) << 28
            | if self.vhe { 2 << 30 } else { 0 };
        [1 | 5 << 1 | fmt << 4 | m.cd_table | m.ssid_bits << 59, one, 0, 0, 0, 0, 0, 0]
    }

    /// arm_smmu_make_s2_domain_ste, or the host's half of a nested one.
    pub fn stage2_ste(&self, d: &Domain, nested: bool) -> [u64; 8] {
        let config = if nested { 7 } else { 6 };
        let shcfg = if self.f.attr_types { 1 << 44 } else { 0 };
        // ~start & 3, one more for 4 KiB.
        let sl0 = u64::from(!(d.start_level + 1) & 3);
        let vtcr = (64 - d.input_bits) | sl0 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | 5 << 16;
        let two = d.vmid | vtcr << 32 | 1 << 51 | 1 << 54 | 1 << 58 | u64::from(self.stall_enabled) << 57;
        [1 | config << 1, shcfg, two, d.root, 0, 0, 0, 0]
    }

    /// arm_smmu_make_s1_cd and arm_smmu_make_sva_cd.
    pub fn cd_of(&self, d: &Domain, force_stall: bool) -> [u64; 8] {
        let ips = [32, 36, 40, 42, 44, 48].iter().position(|b| *b == self.f.ias.min(48)).unwrap() as u64;
        let stall = self.stall_enabled || force_stall || self.f.stall_force;
        let zero = 16
            | 1 << 8
            | 1 << 10
            | 3 << 12
            | 1 << 30
            | 1 << 31
            | ips << 32
            | 1 << 41
            | u64::from(stall) << 44
            | 1 << 45
            | 1 << 46
            | 1 << 47
            | d.asid << 48;
        [zero, d.root, 0, 0xf404_ff44, 0, 0, 0, 0]
    }

    /// The CD of a process whose address space is gone: EPD0, no R, no S.
    pub fn released_cd(&self, d: &Domain) -> [u64; 8] {
        let [zero, ..] = self.cd_of(d, false);
        let gone = 0x3fff | 3 << 44;
        [zero & !gone | 1 << 14, 0, 0, 0xf404_ff44, 0, 0, 0, 0]
    }

    /// The CD of substream 0, then the STE. `probe` sees every store of the STE.
    pub fn attach_stage1(&mut self, sid: u32, d: &Domain, probe: impl FnMut(&Self)) {
        let cd = self.cd_of(d, false);
        self.write_cd(sid, 0, cd, |_| {});
        let ste = self.cdtable_ste(sid);
        self.write_ste(sid, ste, probe);
    }

    // Page tables.

    fn domain(&mut self, stage2: bool, input_bits: u64, start_level: u32, arena: Option<u64>) -> Domain {
        let mut d = Domain {
            root: 0,
            start_level,
            asid: 0,
            vmid: 0,
            stage2,
            input_bits,
            arena,
            tables: Vec::new(),
            above: 0,
        };
        let entries = 1u64 << (input_bits - u64::from(12 + 9 * (3 - start_level)));
        d.root = self.new_table(&mut d, (8 * entries).max(0x1000));
        d
    }

    fn new_table(&mut self, d: &mut Domain, size: u64) -> u64 {
        let at = match &mut d.arena {
            None => self.alloc(size, size),
            Some(next) => {
                let at = next.next_multiple_of(size);
                *next = at + size;
                at
            }
        };
        d.tables.push(at);
        at
    }

    pub fn dma_domain(&mut self) -> Domain {
        let d = self.domain(false, 48, 0, None);
        self.tag(d)
    }
    /// The same with its tables from this address on.
    pub fn dma_domain_at(&mut self, at: u64) -> Domain {
        let d = self.domain(false, 48, 0, Some(at));
        self.tag(d)
    }
    fn tag(&mut self, d: Domain) -> Domain {
        self.next_asid += 1;
        Domain { asid: self.next_asid - 1, ..d }
    }
    /// Odd VMIDs have 48-bit IPAs from level 0, even ones 42 bits from eight tables at level 1.
    pub fn stage2_domain(&mut self, vmid: u64) -> Domain {
        let (bits, start) = if vmid % 2 == 1 { (48, 0) } else { (42, 1) };
        Domain { vmid, ..self.domain(true, bits, start, None) }
    }

    /// The tables of a guest, in the addresses that it sees.
    pub fn rebase(&mut self, d: &mut Domain, ipa: impl Fn(u64) -> u64) {
        d.above = d.root - ipa(d.root);
        for t in &d.tables {
            for n in 0..512 {
                let at = t + 8 * n;
                let v = self.load(at);
                if v & 1 != 0 {
                    let address = v & 0xffff_ffff_f000;
                    self.store(at, &[v & !0xffff_ffff_f000 | ipa(address)]);
                }
            }
        }
    }

    /// Where the entry of `iova` at `level` is; tables are made on the way if wanted.
    fn entry(&mut self, d: &mut Domain, iova: u64, level: u32, make: bool) -> Option<u64> {
        let mut table = d.root;
        for l in d.start_level..=level {
            let shift = 12 + 9 * (3 - l);
            let mask = if l == d.start_level { u64::MAX } else { 511 };
            let at = table + 8 * (iova >> shift & mask);
            if l == level {
                return Some(at);
            }
            let v = self.load(at);
            if v & 3 == 3 {
                table = (v & 0xffff_ffff_f000) + d.above;
            } else if make {
                table = self.new_table(d, 0x1000);
                self.store(at, &[(table - d.above) | 3]);
            } else {
                return None;
            }
        }
        None
    }

    fn level_of(size: u64) -> u32 {
        3 - (size.trailing_zeros() - 12) / 9
    }

    pub fn map(&mut self, d: &mut Domain, iova: u64, pa: u64, size: u64, write: bool) {
        let level = Self::level_of(size);
        let kind = if level == 3 { 3 } else { 1 };
        let leaf = if d.stage2 {
            kind | 0xf << 2 | 1 << 6 | u64::from(write) << 7 | 3 << 8 | 1 << 10
        } else {
            kind | 1 << 2 | 1 << 6 | u64::from(!write) << 7 | 3 << 8 | 1 << 10 | 1 << 11
        };
        let at = self.entry(d, iova, level, true).unwrap();
        self.store(at, &[pa | leaf]);
    }

    pub fn clear_leaves(&mut self, d: &mut Domain, iova: u64, size: u64, granule: u64) {
        for n in 0..size / granule {
            if let Some(at) = self.entry(d, iova + n * granule, Self::level_of(granule), false) {
                self.store(at, &[0]);
            }
        }
    }

    /// Leaves away, TLB and (if the master has ATS) ATC invalidated.
    pub fn unmap(&mut self, d: &mut Domain, sid: u32, iova: u64, size: u64, granule: u64) {
        self.clear_leaves(d, iova, size, granule);
        self.inv_range(d, iova, size, granule, true);
        if self.ats_enabled {
            self.atc_inv(sid, iova, size.next_power_of_two().trailing_zeros() as u64 - 12);
        }
    }

    /// The table below a level 2 entry goes.
    pub fn unmap_table(&mut self, d: &mut Domain, iova: u64) {
        let at = self.entry(d, iova, 2, false).unwrap();
        self.store(at, &[0]);
        self.inv_range(d, iova, 2 << 20, 0x1000, false);
    }

    /// __arm_smmu_tlb_inv_range with its batches of 64.
    fn inv_range(&mut self, d: &Domain, iova: u64, size: u64, granule: u64, leaf: bool) {
        let base = match (d.stage2, self.vhe) {
            (true, _) => 0x2a | d.vmid << 32,
            (false, true) => 0x22 | d.asid << 48,
            (false, false) => 0x12 | d.asid << 48,
        };
        let mut batch = Vec::new();
        let (mut at, end) = (iova, iova + size);
        let mut pages = size >> 12;
        let mut fields = 0;
        if self.f.range_inv {
            fields = 1 << 10;
            if leaf {
                fields |= (4 - (u64::from(granule.trailing_zeros()) - 3) / 9) << 8;
            } else if pages & 31 == 1 {
                pages += 1;
            }
        }
        while at < end {
            let (mut zero, step) = (base, granule);
            let step = if self.f.range_inv {
                let scale = u64::from(pages.trailing_zeros());
                let num = pages >> scale & 31;
                zero |= (num - 1) << 12 | scale << 20;
                pages -= num << scale;
                num << scale << 12
            } else {
                step
            };
            batch.push([zero, at | fields | u64::from(leaf)]);
            if batch.len() == 64 {
                self.commands(&batch);
                batch.clear();
            }
            at += step;
        }
        if !batch.is_empty() {
            self.commands(&batch);
        }
        self.sync();
    }

    pub fn tlb_flush_asid(&mut self, d: &Domain) {
        let opcode = if self.vhe { 0x21 } else { 0x11 };
        self.command([opcode | d.asid << 48, 0]);
        self.sync();
    }

    pub fn atc_inv(&mut self, sid: u32, iova: u64, size: u64) {
        self.command([0x40 | u64::from(sid) << 32, iova & !0xfff | size]);
        self.sync();
    }
}

/// arm_smmu_get_ste_used.
fn ste_used(e: &[u64; 8]) -> [u64; 8] {
    let mut used = [1, 0, 0, 0, 0, 0, 0, 0];
    if e[0] & 1 == 0 {
        return used;
    }
    used[0] |= 7 << 1;
    let config = e[0] >> 1 & 7;
    if config & 4 == 0 {
        return used;
    }
    const SHCFG: u64 = 3 << 44;
    if config & 1 != 0 {
        used[0] |= 3 << 4 | 0xf_ffff_ffff_ffc0 | 0x1f << 59;
        used[1] |= 0xff | 1 << 27 | 3 << 28 | 3 << 30;
        used[2] |= 0xffff;
        if e[1] & 3 == 1 {
            used[1] |= SHCFG;
        }
    }
    if config & 2 != 0 {
        used[1] |= 1 << 25 | 3 << 28 | SHCFG;
        used[2] |= 0xffff | 0x7_ffff << 32 | 1 << 51 | 1 << 52 | 1 << 54 | 1 << 57 | 1 << 58;
        used[3] |= 0xf_ffff_ffff_fff0;
    }
    if config == 4 {
        used[1] |= SHCFG;
    }
    used
}

/// arm_smmu_get_cd_used.
fn cd_used(e: &[u64; 8]) -> [u64; 8] {
    if e[0] & 1 << 31 == 0 {
        return [1 << 31, 0, 0, 0, 0, 0, 0, 0];
    }
    let mut used = [u64::MAX; 8];
    if e[0] & 1 << 14 != 0 {
        used[0] &= !0x3fff;
        used[1] &= !0xf_ffff_ffff_fff0;
    }
    used
}

pub fn from(sid: u32) -> Initiator {
    Initiator::new(StreamId(sid))
}

pub fn with_ssid(sid: u32, ssid: u32) -> Initiator {
    Initiator { substream: Some(SubstreamId(ssid)), ..from(sid) }
}

pub fn read4(p: &mut Port<SystemMemory>, from: Initiator, va: u64) -> Result<u32, DmaError> {
    let mut b = [0xee; 4];
    p.read(from, Iova(va), &mut b)?;
    Ok(u32::from_le_bytes(b))
}

pub fn write4(p: &mut Port<SystemMemory>, from: Initiator, va: u64, value: u32) -> Result<(), DmaError> {
    p.write(from, Iova(va), &value.to_le_bytes())
}

pub fn aborted<T>(result: Result<T, DmaError>) -> bool {
    matches!(result, Err(DmaError { fault: DmaFault::Terminated, .. }))
}
