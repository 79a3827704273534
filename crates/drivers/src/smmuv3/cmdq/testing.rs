//! An SMMU's queues, as the manual describes them, for tests: it consumes commands when told or when somebody looks, makes
//! errors where it is told to, and writes messages late.

extern crate std;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::cmd::Sync;
use portcullis_arch::smmuv3::regs::{INDEX_MASK, OVERFLOW, PAGE, QueueBase, offset};
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_hal::fake::{FakeClock, FakeMemory};
use portcullis_hal::{Clock, Mmio};
use spin::Mutex;

use super::{CommandOptions, CommandQueue, QueueOptions};
use crate::smmuv3::Parts;

pub(in crate::smmuv3) const ILL: u8 = 1;
pub(in crate::smmuv3) const ABT: u8 = 2;
pub(in crate::smmuv3) const ATC: u8 = 3;

/// What happens when commands are consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::smmuv3) enum Pace {
    /// All at once, when PROD is written.
    Eager,
    /// So many at every access of a register.
    PerAccess(usize),
    /// When the test says so.
    Manual,
}

pub(in crate::smmuv3) struct Device {
    pub registers: BTreeMap<usize, u64>,
    pub pace: Pace,
    /// Everything consumed, in order.
    pub consumed: Vec<Command>,
    /// By how many commands were consumed before: error codes that the next attempts end with.
    pub inject: BTreeMap<usize, VecDeque<u8>>,
    /// Every command with these low 32 bits is illegal.
    pub illegal: Option<u32>,
    /// A message waits for the next command, or for [`FakeSmmu::flush`], before it is written.
    pub late_messages: bool,
    /// Messages are aborted.
    pub abort_messages: bool,
    pending: Option<(Pa, u32)>,
    pub messages: usize,
    pub errors: usize,
    pub prod_writes: usize,
    pub reads: usize,
}

/// See the module.
pub(in crate::smmuv3) struct FakeSmmu {
    pub memory: Arc<FakeMemory>,
    device: Mutex<Device>,
}

pub(in crate::smmuv3) const GERROR_CMDQ: u32 = 1;
pub(in crate::smmuv3) const GERROR_MSI_CMDQ: u32 = 1 << 4;

impl Device {
    pub fn get(&self, at: u64) -> u32 {
        self.registers.get(&(at as usize)).copied().unwrap_or(0) as u32
    }
    pub fn set(&mut self, at: u64, value: u32) {
        self.registers.insert(at as usize, value.into());
    }
    /// Hardware toggles an error only while it is inactive.
    pub fn raise(&mut self, bits: u32) {
        let inactive = !(self.get(offset::GERROR) ^ self.get(offset::GERRORN));
        self.set(offset::GERROR, self.get(offset::GERROR) ^ bits & inactive);
    }
    pub fn active(&self) -> u32 {
        self.get(offset::GERROR) ^ self.get(offset::GERRORN)
    }

    fn send(&mut self, memory: &FakeMemory) {
        let Some((pa, data)) = self.pending.take() else { return };
        self.messages += 1;
        if self.abort_messages {
            self.raise(GERROR_MSI_CMDQ);
        } else {
            memory.device_write(pa, &data.to_le_bytes());
        }
    }

    fn step(&mut self, memory: &FakeMemory) -> bool {
        let base =
            QueueBase::from_bits(self.registers.get(&(offset::CMDQ_BASE as usize)).copied().unwrap_or(0));
        let len = 1u32 << base.log2size();
        let mask = 2 * len - 1;
        let cons = self.get(offset::CMDQ_CONS) & mask;
        let prod = self.get(offset::CMDQ_PROD) & mask;
        if cons == prod || self.active() & GERROR_CMDQ != 0 {
            return false;
        }
        assert!(
            prod.wrapping_sub(cons) & mask <= len,
            "PROD {prod:#x} is more than a queue ahead of CONS {cons:#x}"
        );
        let pa = Pa(base.address() + u64::from(cons & (len - 1)) * 16);
        let command = Command([memory.device_load64(pa), memory.device_load64(Pa(pa.get() + 8))]);
        let attempt = self.consumed.len();
        let mut error = self.inject.get_mut(&attempt).and_then(VecDeque::pop_front).unwrap_or(0);
        if command.opcode().is_none() || self.illegal == Some(command.0[0] as u32) {
            error = ILL;
        }
        let sync = Sync::from(command);
        if command.opcode() == Some(Opcode::Sync) && sync.cs() == 3 {
            error = ILL;
        }
        if error != 0 {
            self.errors += 1;
            self.set(offset::CMDQ_CONS, cons | u32::from(error) << 24);
            self.raise(GERROR_CMDQ);
            return false;
        }
        if command.opcode() == Some(Opcode::Sync) {
            self.send(memory);
            if sync.cs() == 1 && sync.msiaddr_55_2() != 0 {
                assert_eq!((sync.msh(), sync.msiattr()), (3, 0xf));
                self.pending = Some((Pa(sync.msiaddr_55_2() << 2), sync.msidata()));
            }
        }
        self.consumed.push(command);
        self.set(offset::CMDQ_CONS, (cons + 1) & mask);
        if !self.late_messages {
            self.send(memory);
        }
        true
    }
}

impl FakeSmmu {
    pub fn new(memory: FakeMemory, pace: Pace) -> Arc<Self> {
        Arc::new(Self {
            memory: Arc::new(memory),
            device: Mutex::new(Device {
                registers: BTreeMap::new(),
                pace,
                consumed: Vec::new(),
                inject: BTreeMap::new(),
                illegal: None,
                late_messages: false,
                abort_messages: false,
                pending: None,
                messages: 0,
                errors: 0,
                prod_writes: 0,
                reads: 0,
            }),
        })
    }

    /// Looks at or changes the device.
    pub fn with<T>(&self, work: impl FnOnce(&mut Device) -> T) -> T {
        work(&mut self.device.lock())
    }

    /// Consumes up to `count` commands.
    pub fn step(&self, count: usize) -> usize {
        let mut device = self.device.lock();
        (0..count).take_while(|_| device.step(&self.memory)).count()
    }

    /// Writes a message that waits.
    pub fn flush(&self) {
        self.device.lock().send(&self.memory);
    }

    /// Everything consumed so far, without CMD_SYNCs.
    pub fn commands(&self) -> Vec<Command> {
        let all = self.with(|device| device.consumed.clone());
        all.into_iter().filter(|command| command.opcode() != Some(Opcode::Sync)).collect()
    }

    /// Puts a record into an output queue of `words`-word entries, whose registers are at `base`, `prod` and `cons`; tells
    /// whether there was room.
    pub fn record(&self, [base, prod, cons]: [u64; 3], words: &[u64]) -> bool {
        let mut device = self.device.lock();
        let queue = QueueBase::from_bits(device.registers.get(&(base as usize)).copied().unwrap_or(0));
        let len = 1u32 << queue.log2size();
        let mask = 2 * len - 1;
        let (at, taken) = (device.get(prod), device.get(cons));
        if (at ^ taken) & mask == len {
            let flags = at & !OVERFLOW | !taken & OVERFLOW;
            device.set(prod, flags);
            return false;
        }
        let pa = queue.address() + u64::from(at & (len - 1)) * words.len() as u64 * 8;
        for (i, word) in words.iter().enumerate() {
            self.memory.device_store64(Pa(pa + i as u64 * 8), *word);
        }
        device.set(prod, at & OVERFLOW | (at & INDEX_MASK).wrapping_add(1) & mask);
        true
    }

    fn access(&self) {
        let mut device = self.device.lock();
        if let Pace::PerAccess(count) = device.pace {
            for _ in 0..count {
                device.step(&self.memory);
            }
        }
    }
}

pub(in crate::smmuv3) const EVENTQ: [u64; 3] =
    [offset::EVENTQ_BASE, PAGE + offset::EVENTQ_PROD, PAGE + offset::EVENTQ_CONS];
pub(in crate::smmuv3) const PRIQ: [u64; 3] =
    [offset::PRIQ_BASE, PAGE + offset::PRIQ_PROD, PAGE + offset::PRIQ_CONS];

impl Mmio for FakeSmmu {
    fn read32(&self, at: usize) -> u32 {
        self.access();
        let mut device = self.device.lock();
        device.reads += 1;
        device.get(at as u64)
    }
    fn write32(&self, at: usize, value: u32) {
        let eager = {
            let mut device = self.device.lock();
            assert!(
                ![offset::GERROR, offset::CR0ACK].contains(&(at as u64)),
                "a write to a read only register, {at:#x}"
            );
            device.set(at as u64, value);
            device.prod_writes += usize::from(at as u64 == offset::CMDQ_PROD);
            device.pace == Pace::Eager
        };
        if eager && [offset::CMDQ_PROD, offset::GERRORN].contains(&(at as u64)) {
            self.step(usize::MAX);
        }
        self.access();
    }
    fn read64(&self, at: usize) -> u64 {
        self.device.lock().registers.get(&at).copied().unwrap_or(0)
    }
    fn write64(&self, at: usize, value: u64) {
        self.device.lock().registers.insert(at, value);
    }
}

/// Host time, for tests with threads.
#[derive(Debug)]
pub(in crate::smmuv3) struct HostClock(std::time::Instant);

impl HostClock {
    pub fn new() -> Self {
        Self(std::time::Instant::now())
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
    fn delay_us(&self, us: u64) {
        if us < 50 {
            std::thread::yield_now()
        } else {
            std::thread::sleep(std::time::Duration::from_micros(us))
        }
    }
}

pub(in crate::smmuv3) type FakePlatform = Parts<Arc<FakeSmmu>, Arc<FakeMemory>, Arc<FakeClock>>;
pub(in crate::smmuv3) type Threaded = Parts<Arc<FakeSmmu>, Arc<FakeMemory>, Arc<HostClock>>;

pub(in crate::smmuv3) fn platform(smmu: &Arc<FakeSmmu>) -> FakePlatform {
    Parts { registers: smmu.clone(), memory: smmu.memory.clone(), clock: Arc::new(FakeClock::new()) }
}

/// A clock that lets the SMMU consume `count` commands at every delay.
pub(in crate::smmuv3) fn platform_with_steps(smmu: &Arc<FakeSmmu>, count: usize) -> FakePlatform {
    let device = smmu.clone();
    let clock = FakeClock::with_hook(move |_| {
        if device.step(count) == 0 {
            device.flush();
        }
    });
    Parts { registers: smmu.clone(), memory: smmu.memory.clone(), clock: Arc::new(clock) }
}

pub(in crate::smmuv3) fn threaded(smmu: &Arc<FakeSmmu>) -> Threaded {
    Parts { registers: smmu.clone(), memory: smmu.memory.clone(), clock: Arc::new(HostClock::new()) }
}

pub(in crate::smmuv3) fn options(log2: u8, coherent: bool, msi: bool) -> CommandOptions {
    CommandOptions { queue: QueueOptions { log2, coherent, address_bits: 48 }, msi, timeout_us: 1_000_000 }
}

/// A programmed queue.
pub(in crate::smmuv3) fn queue<P: crate::smmuv3::Platform>(
    platform: P,
    options: CommandOptions,
) -> CommandQueue<P> {
    let queue = CommandQueue::new(platform, options).unwrap();
    queue.program();
    queue
}

pub(in crate::smmuv3) const BASE: u64 = 0x8000_0000;

pub(in crate::smmuv3) fn plain() -> FakeMemory {
    FakeMemory::plain(BASE, 1 << 18)
}
