//! A CPU's data cache as DMA meets it: writes that memory has not seen yet, lines that memory has overtaken.
//!
//! The model keeps every line the CPU touched until it is cleaned, invalidated or, past its capacity, evicted
//! in the order of first use. It is meant to make missing cache maintenance visible, not to be fast: boards
//! that do not ask for it have none and pay nothing.

use std::collections::BTreeMap;
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
    /// When it came: its key in [`State::order`].
    since: u64,
}

#[derive(Default)]
struct State {
    lines: BTreeMap<u64, Line>,
    /// The lines by when they came.
    order: BTreeMap<u64, u64>,
    /// Lines that ever came.
    fills: u64,
    reports: Vec<StaleRead>,
    lost_reports: u64,
    /// How many lookers are inside [`CpuCache::unreported`].
    quiet: u32,
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

    /// The CPU reads through the cache. `all` is the whole of memory: room is made by writing back whatever is oldest.
    pub(crate) fn cpu_read(
        &self,
        all: &[Region],
        region: &Region,
        offset: usize,
        buf: &mut [u8],
        reader: &Arc<str>,
    ) {
        let mut s = self.lock();
        s.read(self.capacity, all, region, offset, buf, reader);
    }

    /// The CPU writes into the cache.
    pub(crate) fn cpu_write(&self, all: &[Region], region: &Region, offset: usize, buf: &[u8]) {
        let mut s = self.lock();
        s.write(self.capacity, all, region, offset, buf);
    }

    /// The CPU replaces an aligned word by `new` if it holds `expected`, in one piece; gives what it held.
    pub(crate) fn cpu_cas64(
        &self,
        all: &[Region],
        region: &Region,
        offset: usize,
        (expected, new): (u64, u64),
        reader: &Arc<str>,
    ) -> u64 {
        let mut s = self.lock();
        let mut word = [0; 8];
        s.read(self.capacity, all, region, offset, &mut word, reader);
        let held = u64::from_le_bytes(word);
        if held == expected {
            s.write(self.capacity, all, region, offset, &new.to_le_bytes());
        }
        held
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

    /// A coherent master has read `buf` from memory: what the CPU wrote since is put in its place.
    pub(crate) fn snoop_read(&self, region: &Region, offset: usize, buf: &mut [u8]) {
        let s = self.lock();
        if s.lines.is_empty() {
            return;
        }
        for_lines(region, offset, buf.len(), |line, at, range| {
            let Some(l) = s.lines.get(&line) else { return };
            for (i, byte) in (at..).zip(&mut buf[range]) {
                if l.dirty >> i & 1 != 0 {
                    *byte = l.data[i];
                }
            }
        });
    }

    /// A coherent master is about to write to memory: dirty lines go there first, and all lines go away.
    pub(crate) fn snoop_write(&self, region: &Region, offset: usize, len: usize) {
        let mut s = self.lock();
        if s.lines.is_empty() {
            return;
        }
        for_lines(region, offset, len, |line, _, _| {
            s.clean_line(line, region);
            s.drop_line(line);
        });
    }

    /// Runs `look` without reports of stale reads: for whoever looks at what hardware would read, but has not read.
    pub fn unreported<R>(&self, look: impl FnOnce() -> R) -> R {
        struct Loud<'a>(&'a CpuCache);
        impl Drop for Loud<'_> {
            fn drop(&mut self) {
                self.0.lock().quiet -= 1;
            }
        }
        self.lock().quiet += 1;
        let _until_here = Loud(self);
        look()
    }

    pub(crate) fn maintain(&self, region: &Region, offset: usize, len: usize, clean: bool, invalidate: bool) {
        let mut s = self.lock();
        for_lines(region, offset, len, |line, _, _| {
            if clean {
                s.clean_line(line, region);
            }
            if invalidate {
                s.drop_line(line);
            }
        });
    }
}

impl State {
    fn read(
        &mut self,
        capacity: usize,
        all: &[Region],
        region: &Region,
        offset: usize,
        buf: &mut [u8],
        reader: &Arc<str>,
    ) {
        for_lines(region, offset, buf.len(), |line, at, range| {
            let out = &mut buf[range];
            self.fill(line, region, all, capacity);
            let Some(l) = self.lines.get(&line) else { return };
            out.copy_from_slice(&l.data[at..at + out.len()]);
            let mut memory = [0; LINE as usize];
            read_line(region, line, &mut memory);
            for (i, byte) in memory.iter_mut().enumerate() {
                if l.dirty >> i & 1 != 0 {
                    *byte = l.data[i];
                }
            }
            let data = l.data;
            self.compare(reader, line, at..at + out.len(), &data, &memory, Maintenance::Invalidate);
        });
    }

    fn write(&mut self, capacity: usize, all: &[Region], region: &Region, offset: usize, buf: &[u8]) {
        for_lines(region, offset, buf.len(), |line, at, range| {
            let bytes = &buf[range];
            self.fill(line, region, all, capacity);
            let Some(l) = self.lines.get_mut(&line) else { return };
            l.data[at..at + bytes.len()].copy_from_slice(bytes);
            l.dirty |= mask(at, bytes.len());
        });
    }

    /// Brings a line in, and makes room for it.
    fn fill(&mut self, line: u64, region: &Region, all: &[Region], capacity: usize) {
        if self.lines.contains_key(&line) {
            return;
        }
        while self.lines.len() >= capacity {
            let Some((_, &oldest)) = self.order.first_key_value() else { break };
            let inside = |r: &&Region| oldest >= r.base && oldest - r.base < r.ram.len() as u64;
            if let Some(owner) = all.iter().find(inside) {
                self.clean_line(oldest, owner);
            }
            self.drop_line(oldest);
        }
        let mut data = [0; LINE as usize];
        read_line(region, line, &mut data);
        self.fills += 1;
        self.lines.insert(line, Line { data, dirty: 0, since: self.fills });
        self.order.insert(self.fills, line);
    }

    /// Forgets a line, dirty or not.
    fn drop_line(&mut self, line: u64) {
        if let Some(l) = self.lines.remove(&line) {
            self.order.remove(&l.since);
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
        if self.quiet > 0 {
            return;
        }
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
