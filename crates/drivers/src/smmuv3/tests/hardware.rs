//! An SMMUv3 for tests, written from the fact sheet: registers with acknowledgements, a command queue, and
//! configuration caches of the worst kind. They keep all they have ever read, invalid level 1 descriptors included,
//! until a command makes them forget it.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_hal::fake::{FakeMemory, FakeMmio, MmioAccess, Registers};
use spin::Mutex;

pub const CR0: usize = 0x20;
pub const GBPA: usize = 0x44;
pub const STRTAB_BASE: usize = 0x80;
pub const STRTAB_BASE_CFG: usize = 0x88;
pub const CMDQ_PROD: usize = 0x98;
pub const EVENTQ_BASE: usize = 0xa0;
pub const EVENTQ_PROD: usize = 0x1_00a8;
pub const EVENTQ_CONS: usize = 0x1_00ac;
pub const PRIQ_BASE: usize = 0xc0;
pub const PRIQ_PROD: usize = 0x1_00c8;

pub type Words = [u64; 8];

/// What happened, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Did {
    /// A register was written.
    Write(usize, u64),
    /// A command was consumed.
    Command(u64, u64),
}

/// The inside of the fake.
#[derive(Default)]
pub struct Inside {
    pub log: Vec<Did>,
    stds: BTreeMap<u32, u64>,
    stes: BTreeMap<u32, Words>,
    l1cds: BTreeMap<(u32, u32), u64>,
    cds: BTreeMap<(u32, u32), Words>,
    /// Commands are not consumed.
    pub stopped: bool,
    /// CR0 is not acknowledged.
    pub deaf: bool,
    /// Called with each command, before it takes effect.
    pub watch: Option<Watch>,
}

type Watch = alloc::boxed::Box<dyn FnMut(&Configuration<'_>, [u64; 2]) + Send>;

/// What the SMMU would find if it looked now.
pub struct Configuration<'a> {
    pub memory: &'a FakeMemory,
    pub registers: &'a Registers,
}

impl Configuration<'_> {
    fn word(&self, pa: u64) -> u64 {
        self.memory.device_load64(Pa(pa))
    }

    fn words(&self, pa: u64) -> Words {
        core::array::from_fn(|index| self.word(pa + index as u64 * 8))
    }

    /// The level 1 descriptor of a stream, if there are two levels.
    fn std(&self, sid: u32) -> Option<u64> {
        let base = self.registers.get64(STRTAB_BASE) & 0x00ff_ffff_ffff_ffc0;
        let cfg = self.registers.get32(STRTAB_BASE_CFG);
        (cfg >> 16 & 3 == 1).then(|| self.word(base + u64::from(sid >> 8) * 8))
    }

    fn ste_with(&self, sid: u32, std: Option<u64>) -> Words {
        let cfg = self.registers.get32(STRTAB_BASE_CFG);
        if u64::from(sid) >> (cfg & 0x3f) != 0 {
            return [0; 8];
        }
        let at = match std {
            None => (self.registers.get64(STRTAB_BASE) & 0x00ff_ffff_ffff_ffc0) + u64::from(sid) * 64,
            Some(std) if std & 0x1f == 9 => (std & 0x00ff_ffff_ffff_ffc0) + u64::from(sid & 0xff) * 64,
            Some(_) => return [0; 8],
        };
        self.words(at)
    }

    /// The entry of a stream, uncached.
    pub fn ste(&self, sid: u32) -> Words {
        self.ste_with(sid, self.std(sid))
    }
}

impl Inside {
    /// The entry of a stream as the SMMU has it, all zeroes if there is none.
    fn cached_ste(&mut self, now: &Configuration<'_>, sid: u32) -> Words {
        let std = now.std(sid).map(|std| *self.stds.entry(sid >> 8).or_insert(std));
        let ste = now.ste_with(sid, std);
        *self.stes.entry(sid).or_insert(ste)
    }

    /// The descriptor of a substream as the SMMU has it, all zeroes if there is none.
    fn cached_cd(&mut self, now: &Configuration<'_>, sid: u32, ssid: u32) -> Words {
        let ste = self.cached_ste(now, sid);
        let (base, format, bits) = (ste[0] & 0x00ff_ffff_ffff_ffc0, ste[0] >> 4 & 3, ste[0] >> 59);
        if ste[0] & 1 == 0 || ste[0] >> 1 & 5 != 5 || u64::from(ssid) >> bits != 0 {
            return [0; 8];
        }
        let at = if bits == 0 || format == 0 {
            base + u64::from(ssid) * 64
        } else {
            assert_eq!(format, 2, "only leaves of 64 KiB are expected");
            let descriptor = now.word(base + u64::from(ssid >> 10) * 8);
            let descriptor = *self.l1cds.entry((sid, ssid >> 10)).or_insert(descriptor);
            if descriptor & 1 == 0 {
                return [0; 8];
            }
            (descriptor & 0x00ff_ffff_ffff_f000) + u64::from(ssid & 0x3ff) * 64
        };
        let cd = now.words(at);
        *self.cds.entry((sid, ssid)).or_insert(cd)
    }

    fn command(&mut self, now: &Configuration<'_>, [first, second]: [u64; 2]) {
        if let Some(mut watch) = self.watch.take() {
            watch(now, [first, second]);
            self.watch = Some(watch);
        }
        let (sid, ssid) = ((first >> 32) as u32, (first >> 12) as u32 & 0xf_ffff);
        match first as u8 {
            0x03 => {
                self.stes.remove(&sid);
                self.cds.retain(|(other, _), _| *other != sid);
                self.l1cds.retain(|(other, _), _| *other != sid);
                if second & 1 == 0 {
                    self.stds.remove(&(sid >> 8));
                }
            }
            0x04 => {
                assert_eq!(second & 0x1f, 31);
                (self.stes, self.stds) = Default::default();
                (self.cds, self.l1cds) = Default::default();
            }
            0x05 => {
                self.cds.remove(&(sid, ssid));
                if second & 1 == 0 {
                    self.l1cds.remove(&(sid, ssid >> 10));
                }
            }
            0x46 if first >> 12 & 3 == 1 => {
                // The message of CMD_SYNC.
                let at = Pa(second & 0x00ff_ffff_ffff_fffc);
                now.memory.device_write(at, &((first >> 32) as u32).to_le_bytes());
            }
            _ => {}
        }
    }

    fn consume(&mut self, memory: &FakeMemory, registers: &mut Registers) {
        let base = registers.get64(0x90);
        let mask = (1u32 << (base & 0x1f)) - 1;
        let wrap = mask << 1 | 1;
        while !self.stopped && registers.get32(0x24) & 8 != 0 {
            let cons = registers.get32(0x9c) & wrap;
            if cons == registers.get32(CMDQ_PROD) & wrap {
                break;
            }
            let at = Pa((base & 0x00ff_ffff_ffff_ffe0) + u64::from(cons & mask) * 16);
            let words = [memory.device_load64(at), memory.device_load64(at.wrapping_add(8))];
            self.log.push(Did::Command(words[0], words[1]));
            self.command(&Configuration { memory, registers }, words);
            registers.set32(0x9c, (cons + 1) & wrap);
        }
    }
}

/// The fake.
#[derive(Clone)]
pub struct Hardware {
    pub inside: Arc<Mutex<Inside>>,
    pub mmio: Arc<FakeMmio>,
    pub memory: Arc<FakeMemory>,
}

impl Hardware {
    /// With these IDR0, IDR1, IDR3 and IDR5.
    pub fn new(memory: Arc<FakeMemory>, ids: [u32; 4]) -> Self {
        let inside = Arc::new(Mutex::new(Inside::default()));
        let (hardware, seen) = (inside.clone(), memory.clone());
        let mmio =
            FakeMmio::with_handler(move |registers, access| hardware.lock().access(&seen, registers, access));
        let mmio = Arc::new(mmio);
        for (offset, value) in [0x00, 0x04, 0x0c, 0x14].into_iter().zip(ids) {
            mmio.set32(offset, value);
        }
        Self { inside, mmio, memory }
    }

    /// What a transaction's configuration is, as the SMMU has it cached or finds it: STE and CD.
    pub fn look(&self, sid: u32, ssid: Option<u32>) -> (Words, Words) {
        let registers = self.registers();
        let now = Configuration { memory: &self.memory, registers: &registers };
        let mut inside = self.inside.lock();
        let ste = inside.cached_ste(&now, sid);
        (ste, inside.cached_cd(&now, sid, ssid.unwrap_or(0)))
    }

    /// STE.Config as the SMMU has it; `None` for an invalid entry.
    pub fn config(&self, sid: u32) -> Option<u64> {
        let ste = self.look(sid, None).0;
        (ste[0] & 1 != 0).then_some(ste[0] >> 1 & 7)
    }

    fn registers(&self) -> Registers {
        let mut registers = Registers::default();
        registers.set64(STRTAB_BASE, self.mmio.get64(STRTAB_BASE));
        registers.set32(STRTAB_BASE_CFG, self.mmio.get32(STRTAB_BASE_CFG));
        registers
    }

    /// Puts a record of `N` words into the queue with these registers.
    pub fn put<const N: usize>(&self, base: usize, prod: usize, words: [u64; N]) {
        let queue = self.mmio.get64(base);
        let (log2, index) = (queue & 0x1f, self.mmio.get32(prod));
        let slot = u64::from(index) & ((1 << log2) - 1);
        let at = Pa((queue & 0x00ff_ffff_ffff_ffe0) + slot * N as u64 * 8);
        for (index, word) in words.into_iter().enumerate() {
            self.memory.device_store64(at.wrapping_add(index as u64 * 8), word);
        }
        self.mmio.set32(prod, (index + 1) & ((2 << log2) - 1));
    }

    /// An event record.
    pub fn event(&self, words: [u64; 4]) {
        self.put(EVENTQ_BASE, EVENTQ_PROD, words);
    }

    /// A page request.
    pub fn request(&self, words: [u64; 2]) {
        self.put(PRIQ_BASE, PRIQ_PROD, words);
    }

    pub fn take(&self) -> Vec<Did> {
        core::mem::take(&mut self.inside.lock().log)
    }

    /// The commands since the last time, without the words that say how a CMD_SYNC signals.
    pub fn commands(&self) -> Vec<(u64, u64)> {
        let commands = self.take().into_iter().filter_map(|did| match did {
            Did::Command(first, _) if first as u8 == 0x46 => Some((0x46, 0)),
            Did::Command(first, second) => Some((first, second)),
            Did::Write(..) => None,
        });
        commands.collect()
    }
}

impl Inside {
    fn access(&mut self, memory: &FakeMemory, registers: &mut Registers, access: MmioAccess) -> Option<u64> {
        let MmioAccess { write, offset, value, .. } = access;
        if !write {
            return None;
        }
        self.log.push(Did::Write(offset, value));
        match offset {
            0x00..0x20 => return Some(registers.get32(offset).into()),
            CR0 if !self.deaf => {
                registers.set32(CR0, value as u32);
                registers.set32(0x24, value as u32);
                self.consume(memory, registers);
            }
            0x50 => registers.set32(0x54, value as u32),
            GBPA => return Some(value & !(1 << 31)),
            CMDQ_PROD => {
                registers.set32(CMDQ_PROD, value as u32);
                self.consume(memory, registers);
            }
            _ => {}
        }
        None
    }
}
