//! Random register accesses over random memory: no panic, no hang, bounded steps, nothing outside.

use std::sync::{Arc, Mutex};

use portcullis_arch::zdma::REGISTERS;
use portcullis_arch::{Attributes, Iova, Pa};
use portcullis_bus::{
    BusError, DmaError, DmaFault, DmaPort, Initiator, IrqLevels, Memory, StallState, StallTag, SystemMemory,
    dma::DirectPort,
};

use super::super::{STEP_ACTIONS, STEP_BYTES};
use super::*;

const LOW: u64 = 0x1_0000;
const SIZE: u64 = 0x1_0000;
const A: Attributes = Attributes::DEVICE_DEFAULT;

#[derive(Default)]
struct Work {
    accesses: u64,
    bytes: u64,
    stalls: u64,
    faults: u64,
}

/// Only `LOW..LOW + SIZE` may be touched; some accesses fault or stall half way.
struct WildPort {
    inner: DirectPort<SystemMemory>,
    random: Random,
    work: Arc<Mutex<Work>>,
}

impl WildPort {
    fn gate(&mut self, addr: Iova, len: usize) -> Result<usize, DmaError> {
        let mut work = self.work.lock().unwrap();
        work.accesses += 1;
        work.bytes += len as u64;
        assert!(len <= STEP_BYTES);
        let end = addr.get().checked_add(len as u64);
        if addr.get() < LOW || end.is_none_or(|e| e > LOW + SIZE) {
            work.faults += 1;
            return Err(DmaError { done: 0, fault: DmaFault::Bus(BusError::Decode) });
        }
        Ok(match self.random.below(16) {
            0 => self.random.below(len as u64 + 1) as usize,
            _ => usize::MAX,
        })
    }

    fn outcome(&mut self, done: usize, len: usize) -> Result<(), DmaError> {
        if done >= len {
            return Ok(());
        }
        let fault = match self.random.below(8) {
            0 => DmaFault::Terminated,
            _ => {
                self.work.lock().unwrap().stalls += 1;
                DmaFault::Stalled(StallTag(self.random.next()))
            }
        };
        Err(DmaError { done, fault })
    }
}

impl DmaPort for WildPort {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        let n = self.gate(addr, buf.len())?.min(buf.len());
        self.inner.read(from, addr, &mut buf[..n])?;
        self.outcome(n, buf.len())
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        let n = self.gate(addr, buf.len())?.min(buf.len());
        self.inner.write(from, addr, &buf[..n])?;
        self.outcome(n, buf.len())
    }
    fn stall_state(&mut self, _: StallTag) -> StallState {
        match self.random.below(8) {
            0 => StallState::Terminated { abort: true },
            1 => StallState::Terminated { abort: false },
            2..5 => StallState::Waiting,
            _ => StallState::Retry,
        }
    }
}

/// Half of memory is random bytes, half is descriptors that point at each other.
fn scramble(memory: &SystemMemory, random: &mut Random) {
    let place = |random: &mut Random| (LOW + random.below(SIZE)) & !15;
    memory.write(Pa(LOW), A, &random.bytes(SIZE as usize / 8)).unwrap();
    for _ in 0..1500 {
        let size = match random.below(8) {
            0 => random.next() as u32,
            _ => random.below(300) as u32,
        };
        let d = Descriptor {
            address: LOW + random.below(SIZE),
            size,
            control: Control::from_bits(random.next() as u32 & 0x1f),
            next: place(random) & !(16 * random.below(2)),
        };
        let at = place(random).min(LOW + SIZE - 32);
        memory.write(Pa(at), A, &d.linked_bytes()).unwrap();
    }
}

#[test]
fn a_million_random_accesses_never_panic_hang_or_leave_memory() {
    let memory = SystemMemory::new(&[(0, LOW + SIZE + 0x1_0000)]).unwrap();
    memory.write(Pa(0), A, &vec![0xa5; LOW as usize]).unwrap();
    memory.write(Pa(LOW + SIZE), A, &[0xa5; 0x1_0000]).unwrap();
    let mut random = Random(0x0bad_cafe_dead_10cc);
    let mut done = [0u64; 4];
    for round in 0..20 {
        let work = Arc::new(Mutex::new(Work::default()));
        let port = WildPort {
            inner: DirectPort::new(memory.clone()),
            random: Random(round + 99),
            work: work.clone(),
        };
        let sink = Arc::new(IrqLevels::default());
        let config = if round % 2 == 0 { ZdmaConfig::fpd(StreamId(1)) } else { ZdmaConfig::lpd(StreamId(1)) };
        let mut z = Zdma::new(config, Box::new(port), IrqLine::new(sink.clone(), 3));
        for i in 0..50_000u64 {
            if i % 10_000 == 0 {
                scramble(&memory, &mut random);
            }
            let offset = match random.below(64) {
                0 => random.next() as u32,
                1..16 => reg::CTRL2,
                _ => REGISTERS[random.below(REGISTERS.len() as u64) as usize].offset,
            };
            let value = match random.below(8) {
                0 => random.next() as u32,
                1..5 => (LOW + random.below(SIZE)) as u32 & !15,
                _ => random.below(0x200) as u32,
            };
            match random.below(4) {
                0 => drop(Registers32::read(&mut z, offset)),
                1 => drop(Registers32::write(&mut z, offset, value)),
                2 => {
                    // What lets runs get somewhere: addresses inside, and small sizes.
                    z.w(reg::SRC_DSCR_WORD1, 0);
                    z.w(reg::DST_DSCR_WORD1, 0);
                    z.w(reg::SRC_START_MSB, 0);
                    z.w(reg::DST_START_MSB, 0);
                    z.w(reg::SRC_DSCR_WORD2, random.below(2000) as u32);
                    z.w(reg::DST_DSCR_WORD2, random.below(2000) as u32);
                    z.w(reg::CTRL2, 1);
                }
                _ => {
                    *work.lock().unwrap() = Work::default();
                    let activity = z.step(i);
                    let work = work.lock().unwrap();
                    // The most a step can take: one beat per access at a fixed address of one byte lane.
                    assert!(work.accesses <= STEP_BYTES as u64 + 2 * u64::from(STEP_ACTIONS));
                    assert!(work.bytes <= 2 * STEP_BYTES as u64 + 64 * u64::from(STEP_ACTIONS));
                    done[3] += work.stalls;
                    assert_eq!(activity == Activity::Stalled, z.is_stalled());
                }
            }
            assert_eq!(sink.level(3), z.irq_level());
            let status = z.r(reg::STATUS);
            if random.below(50) == 0 {
                done[status as usize & 1] += u64::from(z.r(reg::ISR) & 0x400 != 0);
                done[2] += u64::from(z.r(reg::ISR) & 0x3c0 != 0);
                z.w(reg::ISR, 0xfff);
            }
            if random.below(500) == 0 {
                let state = z.save();
                z.restore(state.clone()).unwrap();
                assert_eq!(z.save(), state);
            }
            if random.below(2000) == 0 {
                z.reset();
            }
        }
    }
    assert!(done.iter().all(|n| *n > 1000), "the noise reached runs, errors and stalls: {done:?}");
    let mut guard = vec![0; LOW as usize];
    memory.read(Pa(0), A, &mut guard).unwrap();
    assert!(guard.iter().all(|b| *b == 0xa5));
    let mut guard = vec![0; 0x1_0000];
    memory.read(Pa(LOW + SIZE), A, &mut guard).unwrap();
    assert!(guard.iter().all(|b| *b == 0xa5));
}
