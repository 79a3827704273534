//! The window: offsets inside BAR 0, the devices behind them, and a count of what was touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use portcullis_board::sim::{EventKind, Machine, Tracer};
use portcullis_bus::{BusError, Mmio};
use serde::Serialize;

/// Simulated cost of a register access in nanoseconds.
const REGISTER_NS: u64 = 50;

/// A device in the window.
struct Device {
    name: Arc<str>,
    /// Offset in the window.
    base: u64,
    size: u64,
    registers: Arc<dyn Mmio>,
    touched: BTreeMap<u64, Touches>,
    refused: u64,
}

#[derive(Clone, Copy, Default)]
struct Touches {
    reads: u64,
    writes: u64,
}

/// What the guest did to a device's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceTouches {
    /// The device.
    pub name: String,
    /// Its address in the guest.
    pub base: u64,
    /// Different registers read or written.
    pub registers: usize,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Accesses that the device answered with a bus error.
    pub refused: u64,
}

/// The registers of a machine's SMMUs and engines, as one window.
pub struct Window {
    base: u64,
    size: u64,
    /// By offset.
    devices: Vec<Device>,
    tracer: Arc<Tracer>,
    outside: u64,
}

impl Window {
    /// The window of `size` bytes at guest address `base` onto a machine. Devices that are not in it are left out.
    pub fn new(machine: &Machine, base: u64, size: u64) -> Self {
        let smmus = machine.smmus().iter().map(|s| (s.name.clone(), s.base, s.size, s.model.window()));
        let engines = machine.engines().iter().map(|e| (e.name.clone(), e.base, e.size, e.mmio()));
        let mut devices: Vec<Device> = smmus
            .chain(engines)
            .filter_map(|(name, at, len, registers)| {
                let offset = at.get().checked_sub(base)?;
                let inside = offset.checked_add(len).is_some_and(|end| end <= size);
                inside.then(|| Device {
                    name,
                    base: offset,
                    size: len,
                    registers,
                    touched: BTreeMap::new(),
                    refused: 0,
                })
            })
            .collect();
        devices.sort_by_key(|d| d.base);
        Self { base, size, devices, tracer: machine.tracer().clone(), outside: 0 }
    }

    /// Reads registers. Where nothing is, or a device refuses, all bits are ones.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut at = 0;
        while let Some(rest) = data.get_mut(at..).filter(|rest| !rest.is_empty()) {
            let here = offset.wrapping_add(at as u64);
            let n = piece(here, rest.len());
            let Some(part) = rest.get_mut(..n) else { return };
            self.access(here, n, None, |registers, offset| {
                let result = registers.mmio_read(offset, part);
                if result.is_err() {
                    part.fill(0xff);
                }
                (result, value(part))
            })
            .unwrap_or_else(|| part_ones(data, at, n));
            at += n;
        }
    }

    /// Writes registers. Where nothing is, nothing happens.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut at = 0;
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            let here = offset.wrapping_add(at as u64);
            let n = piece(here, rest.len());
            let Some(part) = rest.get(..n) else { return };
            let _ = self.access(here, n, Some(value(part)), |registers, offset| {
                (registers.mmio_write(offset, part), 0)
            });
            at += n;
        }
    }

    /// Finds the device, counts and records; `None` if there is none.
    fn access(
        &mut self,
        at: u64,
        len: usize,
        written: Option<u64>,
        go: impl FnOnce(&dyn Mmio, u64) -> (Result<(), BusError>, u64),
    ) -> Option<()> {
        let i = self.devices.partition_point(|d| d.base <= at);
        let device = i.checked_sub(1).and_then(|i| self.devices.get_mut(i));
        let Some(device) = device.filter(|d| at - d.base < d.size) else {
            self.outside += 1;
            return None;
        };
        let offset = at - device.base;
        let touches = device.touched.entry(offset & !3).or_default();
        match written {
            Some(_) => touches.writes += 1,
            None => touches.reads += 1,
        }
        let note = |value| {
            if self.tracer.wants_registers() {
                let (size, write) = (len as u8, written.is_some());
                let kind = EventKind::Register { device: device.name.clone(), offset, size, write, value };
                self.tracer.push(REGISTER_NS, kind);
            }
        };
        // A write is written down before what it causes, a read with what it found.
        if let Some(value) = written {
            note(value);
        }
        let (result, read) = go(&*device.registers, offset);
        if written.is_none() {
            note(read);
        }
        device.refused += u64::from(result.is_err());
        Some(())
    }

    /// What was touched so far, devices in the order of their addresses.
    pub fn touches(&self) -> Vec<DeviceTouches> {
        let of = |d: &Device| DeviceTouches {
            name: d.name.to_string(),
            base: self.base + d.base,
            registers: d.touched.len(),
            reads: d.touched.values().map(|t| t.reads).sum(),
            writes: d.touched.values().map(|t| t.writes).sum(),
            refused: d.refused,
        };
        self.devices.iter().map(of).collect()
    }

    /// Accesses where no device is.
    pub fn outside(&self) -> u64 {
        self.outside
    }

    /// Bytes of the window.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Bytes that go to a device at once: naturally aligned, 8 at most.
fn piece(at: u64, len: usize) -> usize {
    let aligned = 1usize << at.trailing_zeros().min(3);
    let whole = 1usize << len.min(8).ilog2();
    aligned.min(whole)
}

fn value(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

fn part_ones(data: &mut [u8], at: usize, n: usize) {
    if let Some(part) = data.get_mut(at..at + n) {
        part.fill(0xff);
    }
}

#[cfg(test)]
mod tests {
    use super::piece;

    #[test]
    fn pieces_are_naturally_aligned_and_cover_everything() {
        assert_eq!((piece(0, 8), piece(4, 8), piece(0, 16), piece(2, 4), piece(1, 8)), (8, 4, 8, 2, 1));
        assert_eq!((piece(0, 3), piece(0, 7), piece(8, 5)), (2, 4, 4));
        for at in 0..16u64 {
            for len in 1..40usize {
                let mut done = 0;
                while done < len {
                    let n = piece(at + done as u64, len - done);
                    assert!((at + done as u64).is_multiple_of(n as u64) && n <= len - done);
                    done += n;
                }
            }
        }
    }
}
