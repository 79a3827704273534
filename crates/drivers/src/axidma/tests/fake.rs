//! A small AXI DMA with a loopback, as PG021 describes it: works when told, on the devices' view of memory.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_arch::axidma::{
    DMACR_RESET, DMASR_RESET_DIRECT, DMASR_RESET_SG, Descriptor, S2MM, error, irq, reg,
};
use portcullis_hal::Mmio;
use portcullis_hal::fake::FakeMemory;
use spin::Mutex;

/// What the engine adds to a physical address.
pub const OFFSET: u64 = 0x70_0000_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    AtOnce,
    Never,
}

#[derive(Clone, Debug, Default)]
struct Side {
    control: u32,
    status: u32,
    /// CURDESC: the descriptor in work, or the last one that was.
    current: u64,
    /// The link of that one, once it is done.
    next: Option<u64>,
    tail: u64,
    address: u64,
    length: u32,
    go: bool,
    packets: u32,
}

pub struct Inner {
    sides: [Side; 2],
    pub writes: Vec<(u32, u32)>,
    /// Packets between the sides, and whether they are whole.
    pub stream: VecDeque<(Vec<u8>, bool)>,
    building: Vec<u8>,
    pub reset: Reset,
    /// Addresses that answer with an error, and DMASR's bit for it.
    pub faults: Vec<(u64, u32)>,
    /// Whether RS = 0 halts a channel that has work.
    pub halts: bool,
    pub starts: bool,
    /// MM2S waits, as if its stream were not ready.
    pub blocked: bool,
    pub sg: bool,
    pub wide: bool,
    pub interrupts: [u32; 2],
}

pub struct FakeCore {
    memory: Arc<FakeMemory>,
    pub inner: Mutex<Inner>,
}

impl FakeCore {
    pub fn new(memory: Arc<FakeMemory>, sg: bool, wide: bool) -> Self {
        let mut inner = Inner {
            sides: Default::default(),
            writes: vec![],
            stream: VecDeque::new(),
            building: vec![],
            reset: Reset::AtOnce,
            faults: vec![],
            halts: true,
            starts: true,
            blocked: false,
            sg,
            wide,
            interrupts: [0; 2],
        };
        inner.clear();
        Self { memory, inner: Mutex::new(inner) }
    }

    /// The register writes since the last call.
    pub fn take_writes(&self) -> Vec<(u32, u32)> {
        core::mem::take(&mut self.inner.lock().writes)
    }

    /// Level of the two interrupt lines.
    pub fn lines(&self) -> [bool; 2] {
        let inner = self.inner.lock();
        [0, 1].map(|i| inner.sides[i].status & inner.sides[i].control & irq::ALL != 0)
    }

    /// Works until there is nothing to do.
    pub fn work(&self) {
        while self.step(0) | self.step(1) {}
    }

    /// One descriptor, or one direct transfer, of a side.
    pub fn step(&self, i: usize) -> bool {
        let mut inner = self.inner.lock();
        let mut side = inner.sides[i].clone();
        if !side.go || side.control & 1 == 0 || i == 0 && inner.blocked {
            return false;
        }
        if !inner.sg {
            return inner.transfer(&self.memory, i, side.address, side.length as usize, true).is_some_and(
                |moved| {
                    inner.sides[i].length = moved as u32;
                    inner.sides[i].go = false;
                    inner.sides[i].status |= 2;
                    inner.raise(i, irq::IOC);
                    true
                },
            );
        }
        if let Some(next) = side.next.take() {
            side.current = next;
            (inner.sides[i].current, inner.sides[i].next) = (next, None);
        }
        if let Some(&(_, bit)) = inner.faults.iter().find(|(at, _)| *at == side.current) {
            inner.error(i, bit);
            return true;
        }
        let mut bytes = [0; 32];
        let pa = Pa(side.current - OFFSET);
        self.memory.device_read(pa, &mut bytes);
        let bd = Descriptor::from_bytes(&bytes);
        let cyclic = side.control & 0x10 != 0;
        if bd.status.complete() && !cyclic {
            inner.error(i, error::SG_INTERNAL);
            return true;
        }
        let (len, eof) = (bd.control.length() as usize, bd.control.eof());
        let Some(moved) = inner.transfer(&self.memory, i, bd.buffer, len, eof) else { return false };
        if inner.sides[i].status & error::ALL != 0 {
            return true;
        }
        let ended = if i == 0 { eof } else { inner.building.is_empty() };
        let status = (moved as u32) | 1 << 31 | u32::from(i == 1 && ended) << 26;
        self.memory.device_write(pa.wrapping_add(0x1c), &status.to_le_bytes());
        let side = &mut inner.sides[i];
        if side.current == side.tail && !cyclic {
            (side.go, side.status) = (false, side.status | 2);
        }
        side.next = Some(bd.next);
        if ended {
            side.packets -= 1;
            if side.packets == 0 {
                side.packets = side.control >> 16 & 0xff;
                inner.raise(i, irq::IOC);
            }
        }
        true
    }
}

impl Inner {
    fn clear(&mut self) {
        let status = if self.sg { DMASR_RESET_SG } else { DMASR_RESET_DIRECT };
        self.sides = [0, 1].map(|_| Side { control: DMACR_RESET, status, packets: 1, ..Side::default() });
        self.building.clear();
        // The FIFO hangs on the same reset, as in S0.
        self.stream.clear();
    }

    fn raise(&mut self, i: usize, bit: u32) {
        self.sides[i].status |= bit;
        self.interrupts[i] += 1;
    }

    fn error(&mut self, i: usize, bit: u32) {
        let side = &mut self.sides[i];
        side.status |= bit | 1;
        (side.control, side.go) = (side.control & !1, false);
        self.raise(i, irq::ERROR);
    }

    /// Moves a buffer; `None` if the stream has nothing.
    fn transfer(&mut self, memory: &FakeMemory, i: usize, at: u64, len: usize, eof: bool) -> Option<usize> {
        let fault = self.faults.iter().find(|(fault, _)| *fault == at).copied();
        if i == 0 {
            if let Some((_, bit)) = fault {
                self.error(0, bit);
                return Some(0);
            }
            let mut data = vec![0; len];
            memory.device_read(Pa(at - OFFSET), &mut data);
            match self.stream.back_mut() {
                Some((packet, whole)) if !*whole => {
                    packet.extend(data);
                    *whole = eof;
                }
                _ => self.stream.push_back((data, eof)),
            }
            return Some(len);
        }
        if self.building.is_empty() {
            // Only whole packets cross.
            if !self.stream.front().is_some_and(|(_, whole)| *whole) {
                return None;
            }
            self.building = self.stream.pop_front()?.0;
        }
        if let Some((_, bit)) = fault {
            self.error(1, bit);
            return Some(0);
        }
        let n = len.min(self.building.len());
        let data: Vec<u8> = self.building.drain(..n).collect();
        memory.device_write(Pa(at - OFFSET), &data);
        Some(n)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.writes.push((offset, value));
        let (i, offset) = if offset < S2MM { (0, offset) } else { (1, offset - S2MM) };
        let (wide, halts, starts) = (self.wide, self.halts, self.starts);
        let side = &mut self.sides[i];
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let halted = side.status & 1 != 0;
        match offset {
            reg::DMACR if value & 4 != 0 => match self.reset {
                Reset::AtOnce => self.clear(),
                Reset::Never => {
                    for side in &mut self.sides {
                        side.control |= 4;
                    }
                }
            },
            reg::DMACR => {
                if value >> 16 & 0xff != side.control >> 16 & 0xff {
                    side.packets = value >> 16 & 0xff;
                }
                side.control = value | 2;
                if value & 1 == 1 && starts {
                    side.status &= !1;
                } else if value & 1 == 0 && (!side.go || halts) {
                    (side.go, side.next, side.status) = (false, None, side.status & !2 | 1);
                }
            }
            reg::DMASR => side.status &= !(value & irq::ALL),
            reg::CURDESC if halted => side.current = low(side.current),
            reg::CURDESC_MSB if halted => side.current = high(side.current),
            reg::TAILDESC => {
                side.tail = low(side.tail);
                if !wide && !halted {
                    (side.go, side.status) = (true, side.status & !2);
                }
            }
            reg::TAILDESC_MSB => {
                side.tail = high(side.tail);
                if wide && !halted {
                    (side.go, side.status) = (true, side.status & !2);
                }
            }
            reg::ADDRESS => side.address = low(side.address),
            reg::ADDRESS_MSB => side.address = high(side.address),
            reg::LENGTH => {
                side.length = value;
                (side.go, side.status) = (!halted, side.status & !2);
            }
            _ => {}
        }
    }

    fn read(&self, offset: u32) -> u32 {
        let (side, offset) =
            if offset < S2MM { (&self.sides[0], offset) } else { (&self.sides[1], offset - S2MM) };
        match offset {
            reg::DMACR => side.control,
            reg::DMASR => side.status,
            reg::CURDESC => side.current as u32,
            reg::CURDESC_MSB => (side.current >> 32) as u32,
            reg::TAILDESC => side.tail as u32,
            reg::TAILDESC_MSB => (side.tail >> 32) as u32,
            reg::LENGTH => side.length,
            _ => 0,
        }
    }
}

impl Mmio for FakeCore {
    fn read32(&self, offset: usize) -> u32 {
        self.inner.lock().read(offset as u32)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.inner.lock().write(offset as u32, value);
    }
    fn read64(&self, _: usize) -> u64 {
        panic!("32-bit accesses only")
    }
    fn write64(&self, _: usize, _: u64) {
        panic!("32-bit accesses only")
    }
}
