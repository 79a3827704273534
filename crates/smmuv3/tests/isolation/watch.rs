//! An SMMU whose walks and whose data are watched apart.
#![allow(dead_code)]

use std::sync::{Arc, Mutex};

use portcullis_arch::{Attributes, Pa};
use portcullis_bus::{BusError, Memory, Mmio, SystemMemory};
use portcullis_smmuv3::{Caps, Port, SmmuV3, Window};

/// One access: address, bytes, and what was written where a word changed.
pub type Seen = (u64, u64, Option<u64>);

/// Memory that keeps a log of accesses.
#[derive(Clone)]
pub struct Watch {
    pub mem: SystemMemory,
    log: Arc<Mutex<Vec<Seen>>>,
}

impl Watch {
    pub fn on(mem: &SystemMemory) -> Self {
        Self { mem: mem.clone(), log: Arc::default() }
    }
    fn note(&self, pa: Pa, len: usize, new: Option<u64>) {
        self.log.lock().unwrap().push((pa.get(), len as u64, new));
    }
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Memory for Watch {
    fn read(&self, pa: Pa, a: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.note(pa, buf.len(), None);
        self.mem.read(pa, a, buf)
    }
    fn write(&self, pa: Pa, a: Attributes, buf: &[u8]) -> Result<(), BusError> {
        self.note(pa, buf.len(), Some(0));
        self.mem.write(pa, a, buf)
    }
    fn load64(&self, pa: Pa, a: Attributes) -> Result<u64, BusError> {
        self.note(pa, 8, None);
        self.mem.load64(pa, a)
    }
    fn load32(&self, pa: Pa, a: Attributes) -> Result<u32, BusError> {
        self.note(pa, 4, None);
        self.mem.load32(pa, a)
    }
    fn cas64(&self, pa: Pa, a: Attributes, old: u64, new: u64) -> Result<u64, BusError> {
        let held = self.mem.cas64(pa, a, old, new)?;
        self.note(pa, 8, (held == old).then_some(new));
        Ok(held)
    }
}

/// An SMMU whose walks and whose data are watched apart.
pub struct Machine {
    pub mem: SystemMemory,
    pub walks: Watch,
    pub data: Watch,
    pub smmu: Arc<SmmuV3<Watch>>,
    pub w: Window<Watch>,
    pub cmdq: u64,
    pub eventq: u64,
}

const CMDQ_LOG2: u32 = 6;
const EVENTQ_LOG2: u32 = 6;

impl Machine {
    /// With 8 MiB of memory.
    pub fn new(caps: Caps, cmdq: u64, eventq: u64) -> Self {
        Self::with_memory(caps, cmdq, eventq, 0x8000_0000, 0x80_0000)
    }

    pub fn with_memory(caps: Caps, cmdq: u64, eventq: u64, base: u64, size: u64) -> Self {
        let mem = SystemMemory::new(&[(base, size)]).unwrap();
        let (walks, data) = (Watch::on(&mem), Watch::on(&mem));
        let smmu = SmmuV3::builder(caps).memory(walks.clone()).build().unwrap();
        let w = smmu.window(false);
        Self { mem, walks, data, smmu, w, cmdq, eventq }
    }

    pub fn start(&self, strtab: u64, cfg: u32, cr2: u32) {
        let w = |at, v| self.w.write32(at, v).unwrap();
        w(0x20, 0);
        w(0x28, 0xd75);
        w(0x2c, cr2);
        self.w.write64(0x80, strtab).unwrap();
        w(0x88, cfg);
        self.w.write64(0x90, self.cmdq | u64::from(CMDQ_LOG2)).unwrap();
        self.w.write64(0xa0, self.eventq | u64::from(EVENTQ_LOG2)).unwrap();
        let ats = self.smmu.caps().ats;
        w(0x20, 0xd | if ats { 0x10 } else { 0 });
        assert_eq!(self.r(0x24) & 0xd, 0xd);
    }

    pub fn r(&self, at: u64) -> u32 {
        self.w.read32(at).unwrap()
    }
    pub fn store(&self, at: u64, words: &[u64]) {
        for (n, w) in words.iter().enumerate() {
            self.mem.store64(Pa(at + 8 * n as u64), *w).unwrap();
        }
    }
    pub fn load(&self, at: u64) -> u64 {
        self.mem.load64(Pa(at), Attributes::DEVICE_DEFAULT).unwrap()
    }
    pub fn command(&self, command: [u64; 2]) {
        let prod = self.r(0x98);
        self.store(self.cmdq + 16 * u64::from(prod & ((1 << CMDQ_LOG2) - 1)), &command);
        self.w.write32(0x98, (prod + 1) & ((2 << CMDQ_LOG2) - 1)).unwrap();
        assert_eq!(self.r(0x60), self.r(0x64), "{command:x?} is an error");
    }
    pub fn events(&self) -> Vec<[u64; 4]> {
        let mut found = Vec::new();
        let prod = self.r(0x1_00a8);
        let mut cons = self.r(0x1_00ac);
        while cons != prod {
            let at = self.eventq + 32 * u64::from(cons & ((1 << EVENTQ_LOG2) - 1));
            found.push([0, 8, 16, 24].map(|o| self.load(at + o)));
            cons = (cons + 1) & ((2 << EVENTQ_LOG2) - 1);
        }
        self.w.write32(0x1_00ac, cons).unwrap();
        found
    }
    pub fn port(&self) -> Port<Watch> {
        self.smmu.port(self.data.clone())
    }
}
