//! A CPU's data cache as DMA meets it: writes that memory has not seen yet, lines that memory has overtaken.
//!
//! The model keeps every line the CPU touched until it is cleaned, invalidated or, past its capacity, evicted
//! in the order of first use. It is meant to make missing cache maintenance visible, not to be fast: boards
//! that do not ask for it have none and pay nothing.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_arch::Pa;

use crate::ram::Ram;
use crate::system::Region;

/// Bytes in a cache line (Cortex-A53, and every core a ZynqMP has).
pub const LINE: u64 = 64;

const MAX_REPORTS: usize = 256;

/// The cache maintenance that would have prevented a stale read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub enum Maintenance {
    /// The CPU's write was still in its cache: clean (write back) before the device reads.
    Clean,
    /// The CPU still held the old line: invalidate before the CPU reads what a device wrote.
    Invalidate,
}

impl fmt::Display for Maintenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean by address (DC CVAC; dma_sync_*_for_device)",
            Self::Invalidate => "invalidate by address (DC IVAC; dma_sync_*_for_cpu)",
        })
    }
}

/// A read that returned old data.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct StaleRead {
    /// Who read: `cpu`, a table walker, a device's port.
    pub reader: Arc<str>,
    /// The aligned 8 bytes in which the first difference lies.
    pub pa: u64,
    /// What the reader got there.
    pub seen: u64,
    /// What was written last by the other side.
    pub current: u64,
    /// What was missing.
    pub missing: Maintenance,
}

impl fmt::Display for StaleRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "stale read by {} at {:#x}: saw {:#018x}, but {:#018x} had been written; missing: {}",
            self.reader, self.pa, self.seen, self.current, self.missing
        )
    }
}

struct Line {
    data: [u8; LINE as usize],
    dirty: u64,
}

#[derive(Default)]
struct State {
    lines: BTreeMap<u64, Line>,
    order: VecDeque<u64>,
    reports: Vec<StaleRead>,
    lost_reports: u64,
}

/// The data cache of a CPU cluster, shared by all its cores.
pub struct CpuCache {
    state: Mutex<State>,
    capacity: usize,
}

impl CpuCache {
    /// A cache of at most `lines` lines of 64 bytes (at least one).
    pub fn new(lines: usize) -> Self {
        Self { state: Mutex::default(), capacity: lines.max(1) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stale reads seen since the last call, and how many more there were than are kept.
    pub fn take_reports(&self) -> (Vec<StaleRead>, u64) {
        let mut s = self.lock();
        (std::mem::take(&mut s.reports), std::mem::take(&mut s.lost_reports))
    }

    /// Number of lines held now.
    pub fn lines(&self) -> usize {
        self.lock().lines.len()
    }

    pub(crate) fn cpu_read(&self, region: &Region, offset: usize, buf: &mut [u8], reader: &Arc<str>) {
        let mut s = self.lock();
        for_lines(region, offset, buf.len(), |line, at, range| {
            let out = &mut buf[range];
            s.fill(line, region, self.capacity);
            let Some(l) = s.lines.get(&line) else { return };
            out.copy_from_slice(&l.data[at..at + out.len()]);
            let mut memory = [0; LINE as usize];
            read_line(region, line, &mut memory);
            for (i, byte) in memory.iter_mut().enumerate() {
                if l.dirty >> i & 1 != 0 {
                    *byte = l.data[i];
                }
            }
            let data = l.data;
            s.compare(reader, line, at..at + out.len(), &data, &memory, Maintenance::Invalidate);
        });
    }

    pub(crate) fn cpu_write(&self, region: &Region, offset: usize, buf: &[u8]) {
        let mut s = self.lock();
        for_lines(region, offset, buf.len(), |line, at, range| {
            let bytes = &buf[range];
            s.fill(line, region, self.capacity);
            let Some(l) = s.lines.get_mut(&line) else { return };
            l.data[at..at + bytes.len()].copy_from_slice(bytes);
            l.dirty |= mask(at, bytes.len());
        });
    }

    /// A device that does not look into the cache reads `buf` from memory: were there newer bytes here?
    pub(crate) fn check_device_read(&self, region: &Region, offset: usize, buf: &[u8], reader: &Arc<str>) {
        let mut s = self.lock();
        if s.lines.is_empty() {
            return;
        }
        for_lines(region, offset, buf.len(), |line, at, range| {
            let Some(l) = s.lines.get(&line) else { return };
            let mut memory = [0; LINE as usize];
            read_line(region, line, &mut memory);
            let n = range.len();
            memory[at..at + n].copy_from_slice(&buf[range]);
            let mut newest = memory;
            for (i, byte) in newest.iter_mut().enumerate() {
                if l.dirty >> i & 1 != 0 {
                    *byte = l.data[i];
                }
            }
            s.compare(reader, line, at..at + n, &memory, &newest, Maintenance::Clean);
        });
    }

    /// A coherent master is about to access memory: dirty lines go to memory first, and on a write they go away.
    pub(crate) fn snoop(&self, region: &Region, offset: usize, len: usize, write: bool) {
        let mut s = self.lock();
        if s.lines.is_empty() {
            return;
        }
        for_lines(region, offset, len, |line, _, _| {
            s.clean_line(line, region);
            if write {
                s.lines.remove(&line);
            }
        });
    }

    pub(crate) fn maintain(&self, region: &Region, offset: usize, len: usize, clean: bool, invalidate: bool) {
        let mut s = self.lock();
        for_lines(region, offset, len, |line, _, _| {
            if clean {
                s.clean_line(line, region);
            }
            if invalidate {
                s.lines.remove(&line);
            }
        });
    }
}

impl State {
    fn fill(&mut self, line: u64, region: &Region, capacity: usize) {
        if self.lines.contains_key(&line) {
            return;
        }
        while self.lines.len() >= capacity {
            let Some(oldest) = self.order.pop_front() else { break };
            if oldest >= region.base && oldest - region.base < region.ram.len() as u64 {
                self.clean_line(oldest, region);
                self.lines.remove(&oldest);
            } else {
                // A line of another region: keep it, it is written back when that region is touched.
                self.order.push_back(oldest);
                break;
            }
        }
        let mut data = [0; LINE as usize];
        read_line(region, line, &mut data);
        self.lines.insert(line, Line { data, dirty: 0 });
        self.order.push_back(line);
        if self.order.len() > 2 * capacity.max(self.lines.len()) {
            let lines = &self.lines;
            self.order.retain(|l| lines.contains_key(l));
        }
    }

    fn clean_line(&mut self, line: u64, region: &Region) {
        let Some(l) = self.lines.get_mut(&line) else { return };
        if l.dirty == 0 {
            return;
        }
        l.dirty = 0;
        let offset = (line - region.base) as usize;
        let n = (region.ram.len() - offset).min(LINE as usize);
        // In range by construction: a line is only held for an address inside its region.
        let _ = region.ram.write(offset, &l.data[..n]);
    }

    fn compare(
        &mut self,
        reader: &Arc<str>,
        line: u64,
        range: std::ops::Range<usize>,
        seen: &[u8; LINE as usize],
        current: &[u8; LINE as usize],
        missing: Maintenance,
    ) {
        let Some(i) = range.clone().find(|&i| seen[i] != current[i]) else { return };
        let word = i & !7;
        let get = |b: &[u8; LINE as usize]| {
            b[word..word + 8].iter().rev().fold(0u64, |v, &x| v << 8 | u64::from(x))
        };
        let report = StaleRead {
            reader: reader.clone(),
            pa: line + word as u64,
            seen: get(seen),
            current: get(current),
            missing,
        };
        if self.reports.contains(&report) {
            return;
        }
        if self.reports.len() >= MAX_REPORTS {
            self.lost_reports += 1;
            return;
        }
        self.reports.push(report);
    }
}

fn mask(at: usize, len: usize) -> u64 {
    if len >= 64 { u64::MAX } else { ((1u64 << len) - 1) << at }
}

fn read_line(region: &Region, line: u64, data: &mut [u8; LINE as usize]) {
    let offset = (line - region.base) as usize;
    let n = Ram::len(&region.ram).saturating_sub(offset).min(LINE as usize);
    // In range by construction, as in `clean_line`.
    let _ = region.ram.read(offset, &mut data[..n]);
}

/// Calls `f(line address, offset in line, range in the buffer)` for each line the access touches. Region bases
/// are page aligned, so lines never straddle two regions.
fn for_lines(
    region: &Region,
    offset: usize,
    len: usize,
    mut f: impl FnMut(u64, usize, std::ops::Range<usize>),
) {
    let mut pa = region.base + offset as u64;
    let mut done = 0;
    while done < len {
        let line = pa & !(LINE - 1);
        let at = (pa - line) as usize;
        let n = (LINE as usize - at).min(len - done);
        f(line, at, done..done + n);
        done += n;
        pa += n as u64;
    }
}

/// The address range of a maintenance operation, for messages.
pub(crate) fn lines_of(pa: Pa, len: usize) -> u64 {
    (pa.get() % LINE + len as u64).div_ceil(LINE)
}
