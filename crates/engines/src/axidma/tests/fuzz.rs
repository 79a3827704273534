//! Random register accesses over random memory: no panic, no hang, bounded steps, nothing outside.

use std::sync::{Arc, Mutex};

use portcullis_arch::axidma::REGISTERS;
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
}

/// Only `LOW..LOW + SIZE` may be touched; some accesses fault or stall half way, or claim nonsense.
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
        let end = addr.get().checked_add(len as u64);
        if addr.get() < LOW || end.is_none_or(|e| e > LOW + SIZE) {
            return Err(DmaError { done: 0, fault: DmaFault::Bus(BusError::Decode) });
        }
        Ok(match self.random.below(16) {
            0 if self.random.below(2) == 0 => self.random.below(len as u64 + 1) as usize,
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
        // A port must not claim more than was asked for. This one sometimes does.
        let done = if self.random.below(50) == 0 { len + self.random.below(9) as usize } else { done };
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
    fn copy(
        &mut self,
        src: (Initiator, Iova),
        dst: (Initiator, Iova),
        len: usize,
    ) -> Result<(), portcullis_bus::CopyError> {
        use portcullis_bus::{CopyError, CopySide};
        let mut buf = vec![0; len.min(3000)];
        let mut at = 0;
        while at < len {
            let n = buf.len().min(len - at);
            let failed =
                |side, e: DmaError| CopyError { side, error: DmaError { done: at + e.done, fault: e.fault } };
            let (source, destination) = (src.1.wrapping_add(at as u64), dst.1.wrapping_add(at as u64));
            self.read(src.0, source, &mut buf[..n]).map_err(|e| failed(CopySide::Source, e))?;
            self.write(dst.0, destination, &buf[..n]).map_err(|e| failed(CopySide::Destination, e))?;
            at += n;
        }
        Ok(())
    }
    fn stall_state(&mut self, _: StallTag) -> StallState {
        match self.random.below(8) {
            0 => StallState::Terminated { abort: true },
            1 | 2 => StallState::Terminated { abort: false },
            3 | 4 => StallState::Waiting,
            _ => StallState::Retry,
        }
    }
}

/// Half of memory is random bytes, half is descriptors that point at each other.
fn scramble(memory: &SystemMemory, random: &mut Random) {
    let place = |random: &mut Random| (LOW + random.below(SIZE)) & !63;
    memory.write(Pa(LOW), A, &random.bytes(SIZE as usize / 8)).unwrap();
    for _ in 0..4000 {
        let length = match random.below(8) {
            0 => random.next() as u32 & 0x3ff_ffff,
            _ => random.below(300) as u32,
        };
        let d = Descriptor {
            next: place(random),
            buffer: LOW + random.below(SIZE),
            control: BdControl::from_bits(length | random.next() as u32 & 0xfc00_0000),
            status: BdStatus::from_bits(if random.below(30) == 0 { random.next() as u32 } else { 0 }),
        };
        memory.write(Pa(place(random)), A, &d.bytes()).unwrap();
    }
}

fn config(round: u64) -> AxiDmaConfig {
    AxiDmaConfig {
        sg: !round.is_multiple_of(3),
        address_bits: [64, 32, 40, 0][round as usize % 4],
        length_bits: [26, 8, 14, 99][round as usize / 2 % 4],
        fifo_bytes: [4096, 0, 100, 1][round as usize % 4],
        fifo_reset_with_core: round.is_multiple_of(2),
        halt_when_starved: round % 4 < 2,
        sg_clock_hz: [100_000_000, u64::MAX, 1, 0][round as usize / 3 % 4],
        ..s0()
    }
}

#[test]
fn random_accesses_never_panic_hang_or_leave_memory() {
    let memory = SystemMemory::new(&[(0, LOW + SIZE + 0x1_0000)]).unwrap();
    memory.write(Pa(0), A, &vec![0xa5; LOW as usize]).unwrap();
    memory.write(Pa(LOW + SIZE), A, &[0xa5; 0x1_0000]).unwrap();
    let mut random = Random(0x0bad_cafe_dead_10cc);
    let mut done = [0u64; 4];
    for round in 0..24 {
        let work = Arc::new(Mutex::new(Work::default()));
        let port = WildPort {
            inner: DirectPort::new(memory.clone()),
            random: Random(round + 99),
            work: work.clone(),
        };
        let sink = Arc::new(IrqLevels::default());
        let line = |n| IrqLine::new(sink.clone(), n);
        let mut dma = AxiDma::new(config(round), Box::new(port), line(0), line(1));
        let mut now = 0;
        for i in 0..16_000u64 {
            if i % 4000 == 0 {
                scramble(&memory, &mut random);
            }
            let pause = if random.below(1000) == 0 { 1 << 40 } else { 5000 };
            now += random.below(pause);
            let block = [MM2S, S2MM][random.below(2) as usize];
            let offset = match random.below(64) {
                0 => random.next() as u32,
                _ => block + REGISTERS[random.below(REGISTERS.len() as u64) as usize].offset,
            };
            let value = match random.below(8) {
                0 => random.next() as u32,
                1..5 => (LOW + random.below(SIZE)) as u32,
                _ => random.below(0x200) as u32,
            };
            match random.below(4) {
                0 => drop(Registers32::read(&mut dma, offset)),
                1 => drop(Registers32::write(&mut dma, offset, value)),
                2 => {
                    // What lets runs get somewhere: addresses inside, and small sizes.
                    if dma.sr(block) & 0x770 != 0 {
                        done[0] += 1;
                        dma.w(block + reg::DMACR, 4);
                    }
                    let coalescing = (random.below(5) as u32) << 16 | (random.below(3) as u32) << 24;
                    let cyclic = if random.below(4) == 0 { 0x10 } else { 0 };
                    let first = LOW + random.below(SIZE);
                    let last = if random.below(2) == 0 { first } else { LOW + random.below(SIZE) };
                    dma.w64(block + reg::CURDESC, first);
                    dma.w(block + reg::DMACR, 0x7001 | coalescing | cyclic);
                    dma.w64(block + reg::TAILDESC, last);
                    dma.transfer(block, LOW + random.below(SIZE), random.below(2000) as u32);
                }
                _ => {
                    *work.lock().unwrap() = Work::default();
                    let activity = dma.step(now);
                    let work = work.lock().unwrap();
                    // An action is one access, or a copy whose pieces here are 3000 bytes.
                    let pieces = 2 * (STEP_BYTES as u64 / 3000 + 1);
                    assert!(work.accesses <= u64::from(STEP_ACTIONS) * 2 + pieces);
                    assert!(work.bytes <= 2 * STEP_BYTES as u64 + 32 * u64::from(STEP_ACTIONS));
                    done[3] += work.stalls;
                    if activity == Activity::Stalled {
                        assert!(dma.is_stalled());
                    }
                    if activity == Activity::Idle {
                        assert!(!dma.is_stalled());
                    }
                    if let Activity::Until(at) = activity {
                        assert!(at > now);
                    }
                }
            }
            let levels = dma.irq_levels();
            assert_eq!([sink.level(0), sink.level(1)], levels);
            for (block, level) in [(MM2S, levels[0]), (S2MM, levels[1])] {
                let s = dma.sr(block);
                assert!(s & 0x770 == 0 || s & 3 == 1, "an error halts");
                assert_eq!(level, s & dma.r(block + reg::DMACR) & 0x7000 != 0);
                if random.below(50) == 0 {
                    done[1] += u64::from(s & IOC != 0);
                    done[2] += u64::from(s & DLY != 0);
                    dma.w(block + reg::DMASR, 0x7000);
                }
            }
            assert!(dma.fifo_level() <= dma.config().fifo_bytes.max(1));
            if random.below(100) == 0 {
                let state = dma.save();
                dma.restore(state.clone()).unwrap();
                assert_eq!(dma.save(), state);
            }
            if random.below(2000) == 0 {
                Engine::reset(&mut dma);
            }
        }
    }
    assert!(done.iter().all(|n| *n > 10), "the noise reached errors, packets, delays and stalls: {done:?}");
    for guard in [0, LOW + SIZE] {
        let mut bytes = vec![0; 0x1_0000];
        memory.read(Pa(guard), A, &mut bytes).unwrap();
        assert!(bytes.iter().all(|b| *b == 0xa5));
    }
}
