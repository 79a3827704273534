//! Tests of the channel, each file one side of its behaviour.

mod errors;
mod fuzz;
mod linux;
mod lists;
mod registers;
mod saving;
mod simple;
mod stalls;

use portcullis_arch::StreamId;
use portcullis_arch::zdma::{Command, Control, Descriptor, reg};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{Activity, Engine, IrqLine};

use super::{Zdma, ZdmaConfig};
use crate::testport::TestPort;

/// Start and size of the memory of these tests.
const RAM: u64 = 0x6000_0000;
const RAM_SIZE: u64 = 0x40_0000;
const SRC: u64 = RAM + 0x10_0000;
const DST: u64 = RAM + 0x20_0000;

/// CTRL0 for scatter-gather, as Linux leaves it.
const SG: u32 = 0xc0;

fn port() -> TestPort {
    TestPort::new(RAM, RAM_SIZE)
}

fn fpd(port: &TestPort) -> Zdma {
    let config = ZdmaConfig::fpd(StreamId(0x14e8));
    Zdma::new(config, Box::new(port.clone()), IrqLine::unconnected())
}

fn lpd(port: &TestPort) -> Zdma {
    let config = ZdmaConfig::lpd(StreamId(0x868));
    Zdma::new(config, Box::new(port.clone()), IrqLine::unconnected())
}

impl Zdma {
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
    /// Steps until the channel is idle or stalled; more than `limit` steps are a failure.
    fn settle(&mut self, limit: usize) -> Activity {
        for _ in 0..limit {
            match self.step(0) {
                Activity::Busy => {}
                other => return other,
            }
        }
        panic!("still busy after {limit} steps");
    }
    fn start_lists(&mut self, source: u64, destination: u64) {
        self.w(reg::CTRL0, SG);
        self.w64(reg::SRC_START_LSB, source);
        self.w64(reg::DST_START_LSB, destination);
        self.w(reg::CTRL2, 1);
    }
    fn start_simple(&mut self, mode: u32, source: u64, destination: u64, size: u32) {
        self.w(reg::CTRL0, 0x80 | mode << 4);
        self.w64(reg::SRC_DSCR_WORD0, source);
        self.w(reg::SRC_DSCR_WORD2, size);
        self.w64(reg::DST_DSCR_WORD0, destination);
        self.w(reg::DST_DSCR_WORD2, size);
        self.w(reg::CTRL2, 1);
    }
}

fn control(command: Command, intr: bool) -> Control {
    Control::new().with_command(command).with_intr(intr)
}

fn put_linear(port: &TestPort, at: u64, address: u64, size: usize, control: Control) {
    let d = Descriptor { address, size: size as u32, control, next: 0 };
    port.put(at, &d.linear_bytes());
}

fn put_linked(port: &TestPort, at: u64, address: u64, size: usize, control: Control, next: u64) {
    let d = Descriptor { address, size: size as u32, control: control.with_linked(true), next };
    port.put(at, &d.linked_bytes());
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
