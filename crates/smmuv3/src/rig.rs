//! A whole SMMU over the tests' memory: registers on, tables of one stream, what it records.

use std::sync::Arc;

use portcullis_arch::smmuv3::regs::{Cr0, Cr2, PAGE, offset};
use portcullis_arch::smmuv3::{Cd, EventCode, EventRecord, Ste};

use crate::ats::Port;
use crate::caps::Caps;
use crate::lookup::tests::{CDS, TABLE, Words};
use crate::model::SmmuV3;

pub const EVENTQ: u64 = 0x60_0000;
pub const PRIQ: u64 = 0x61_0000;
/// TTB0 of the CD that the tests use: level 1.
pub const TTB0: u64 = 0x40_0000;
const L2: u64 = 0x41_0000;
/// Level 3 of the first 2 MiB.
pub const L3: u64 = 0x42_0000;

pub const AF: u64 = 1 << 10;
pub const USER: u64 = 1 << 6;
pub const READ_ONLY: u64 = 1 << 7;
pub const DBM: u64 = 1 << 51;
pub const PXN: u64 = 1 << 53;
pub const UXN: u64 = 1 << 54;

pub struct Rig {
    pub smmu: Arc<SmmuV3<Arc<Words>>>,
    pub memory: Arc<Words>,
}

impl Rig {
    /// Everything on. Stream 0 has this STE, and this is its only CD, whose first 2 MiB are in [`L3`].
    pub fn new(caps: Caps, ste: Ste, cd: Cd) -> Self {
        let memory = Arc::new(Words::default());
        memory.put(TABLE, &ste.0);
        memory.put(CDS, &cd.0);
        memory.put(TTB0, &[L2 | 3]);
        memory.put(L2, &[L3 | 3]);
        let smmu = SmmuV3::builder(caps).memory(memory.clone()).build().unwrap();
        let rig = Self { smmu, memory };
        rig.write(offset::STRTAB_BASE, TABLE, 8);
        rig.write(offset::STRTAB_BASE_CFG, 4, 4);
        rig.write(offset::EVENTQ_BASE, EVENTQ | 6, 8);
        rig.write(offset::PRIQ_BASE, PRIQ | 1, 8);
        rig.write(PAGE + offset::PRIQ_PROD, 0, 4);
        rig.write(offset::CR1, 0xd75, 4);
        rig.enable(true, true);
        rig
    }

    pub fn write(&self, at: u64, value: u64, size: usize) {
        self.smmu.mmio_write(at, &value.to_le_bytes()[..size]).unwrap();
    }

    pub fn read(&self, at: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.smmu.mmio_read(at, &mut bytes[..size]).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub fn enable(&self, smmuen: bool, atschk: bool) {
        let cr0 = Cr0::new().with_smmuen(smmuen).with_eventqen(true).with_priqen(true).with_atschk(atschk);
        self.write(offset::CR0, cr0.into_bits().into(), 4);
    }

    /// CR2, which needs SMMUEN = 0.
    pub fn set_cr2(&self, cr2: Cr2) {
        let cr0 = self.read(offset::CR0, 4);
        self.write(offset::CR0, cr0 & !1, 4);
        self.write(offset::CR2, cr2.into_bits().into(), 4);
        self.write(offset::CR0, cr0, 4);
    }

    pub fn port(&self) -> Port<Arc<Words>> {
        self.smmu.port(self.memory.clone())
    }

    /// A page of the first 2 MiB.
    pub fn page(&self, n: u64, descriptor: u64) {
        self.memory.put(L3 + 8 * n, &[descriptor]);
    }

    /// The records since the last call.
    pub fn events(&self) -> Vec<EventRecord> {
        let (prod, cons) =
            (self.read(PAGE + offset::EVENTQ_PROD, 4), self.read(PAGE + offset::EVENTQ_CONS, 4));
        let mut at = cons;
        let mut found = Vec::new();
        while at != prod {
            let slot = EVENTQ + 32 * (at & 63);
            found.push(EventRecord([0, 8, 16, 24].map(|o| self.memory.get(slot + o))));
            at = (at + 1) & 127;
        }
        self.write(PAGE + offset::EVENTQ_CONS, prod, 4);
        found
    }

    /// Their codes.
    pub fn codes(&self) -> Vec<EventCode> {
        self.events().iter().filter_map(|e| e.code()).collect()
    }
}
