//! Tests of the core, each file one side of its behaviour.

mod coalescing;
mod corners;
mod direct;
mod errors;
mod fuzz;
mod linux;
mod paths;
mod registers;
mod rings;
mod saving;
mod stalls;

use portcullis_arch::StreamId;
use portcullis_arch::axidma::{BdControl, BdStatus, Descriptor, MM2S, S2MM, bd, reg};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{Activity, Engine, IrqLine};

use super::{AxiDma, AxiDmaConfig};
use crate::testport::TestPort;

/// Start and size of the memory of these tests.
const RAM: u64 = 0x6000_0000;
const RAM_SIZE: u64 = 0x40_0000;
const TX: u64 = RAM + 0x1000;
const RX: u64 = RAM + 0x8000;
const SRC: u64 = RAM + 0x10_0000;
const DST: u64 = RAM + 0x20_0000;

/// CONTROL flags of an outgoing packet.
const SOF: u32 = 1 << 27;
const EOF: u32 = 1 << 26;
/// STATUS flags of an incoming packet.
const RXSOF: u32 = 1 << 27;
const RXEOF: u32 = 1 << 26;
const CMPLT: u32 = 1 << 31;

const IOC: u32 = 1 << 12;
const DLY: u32 = 1 << 13;
const ERR: u32 = 1 << 14;

fn port() -> TestPort {
    TestPort::new(RAM, RAM_SIZE)
}

fn build(config: AxiDmaConfig, port: &TestPort) -> AxiDma {
    AxiDma::new(config, Box::new(port.clone()), IrqLine::unconnected(), IrqLine::unconnected())
}

fn s0() -> AxiDmaConfig {
    AxiDmaConfig::s0(StreamId(0xe80))
}

fn core(port: &TestPort) -> AxiDma {
    build(s0(), port)
}

fn direct(port: &TestPort) -> AxiDma {
    build(AxiDmaConfig { sg: false, ..s0() }, port)
}

impl AxiDma {
    fn r(&mut self, offset: u32) -> u32 {
        Registers32::read(self, offset).unwrap()
    }
    fn w(&mut self, offset: u32, value: u32) {
        Registers32::write(self, offset, value).unwrap();
    }
    fn w64(&mut self, low: u32, value: u64) {
        self.w(low, value as u32);
        self.w(low + 4, (value >> 32) as u32);
    }
    fn r64(&mut self, low: u32) -> u64 {
        u64::from(self.r(low)) | u64::from(self.r(low + 4)) << 32
    }
    fn sr(&mut self, block: u32) -> u32 {
        self.r(block + reg::DMASR)
    }
    /// Steps until the core rests; more than `limit` steps are a failure.
    fn settle(&mut self, limit: usize) -> Activity {
        for _ in 0..limit {
            match self.step(0) {
                Activity::Busy => {}
                other => return other,
            }
        }
        panic!("still busy after {limit} steps");
    }
    /// CURDESC and RS.
    fn start(&mut self, block: u32, first: u64) {
        self.w64(block + reg::CURDESC, first);
        let control = self.r(block + reg::DMACR);
        self.w(block + reg::DMACR, control | 0x7001);
    }
    fn tail(&mut self, block: u32, last: u64) {
        self.w64(block + reg::TAILDESC, last);
    }
    /// Everything: CURDESC, RS and TAILDESC.
    fn go(&mut self, block: u32, first: u64, last: u64) {
        self.start(block, first);
        self.tail(block, last);
    }
    /// A direct transfer.
    fn transfer(&mut self, block: u32, address: u64, length: u32) {
        self.w64(block + reg::ADDRESS, address);
        self.w(block + reg::LENGTH, length);
    }
    /// All registers of both blocks.
    fn registers(&mut self) -> Vec<u32> {
        (0..0x60).step_by(4).map(|offset| self.r(offset)).collect()
    }
}

fn put(port: &TestPort, at: u64, next: u64, buffer: u64, control: u32) {
    let d = Descriptor { next, buffer, control: BdControl::from_bits(control), status: BdStatus::new() };
    port.put(at, &d.bytes());
}

/// A ring of descriptors 64 bytes apart: buffer and CONTROL of each. Returns the address of the last one.
fn ring(port: &TestPort, base: u64, buffers: &[(u64, u32)]) -> u64 {
    let n = buffers.len() as u64;
    for (i, (buffer, control)) in (0..).zip(buffers) {
        put(port, base + 64 * i, base + 64 * ((i + 1) % n), *buffer, *control);
    }
    base + 64 * (n - 1)
}

fn status(port: &TestPort, at: u64) -> u32 {
    u32::from_le_bytes(port.bytes(at + bd::STATUS, 4).try_into().unwrap())
}

/// STATUS of the first `n` descriptors of a ring.
fn statuses(port: &TestPort, base: u64, n: u64) -> Vec<u32> {
    (0..n).map(|i| status(port, base + 64 * i)).collect()
}

/// A xorshift generator with a fixed seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}
