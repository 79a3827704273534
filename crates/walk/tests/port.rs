//! A port's reads, writes and copies against a reference that moves byte by byte, over random page mappings.

mod common;

use std::collections::HashMap;

use common::unit::{FROM, OnFault, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Iova, Pa};
use portcullis_bus::{
    BusError, CopyError, CopySide, DmaError, DmaFault, DmaPort, Memory, StallState, StallTag, SystemMemory,
};
use portcullis_walk::{Tbu, TlbStage};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const TABLE: u64 = 0x1000;
/// Data: pages of RAM from 1 MiB, with a hole in the middle of them.
const DATA: u64 = MIB;
const PAGES: u64 = 96;
const HOLE: std::ops::Range<u64> = 40..44;
/// The pages that devices see.
const VA: u64 = 0x8000;
const VPAGES: u64 = 64;

fn memory() -> SystemMemory {
    let hole = (DATA + HOLE.start * PAGE, DATA + HOLE.end * PAGE);
    SystemMemory::new(&[(0, 0x10_000), (DATA, hole.0 - DATA), (hole.1, DATA + PAGES * PAGE - hole.1)])
        .unwrap()
}

struct Bench {
    unit: std::sync::Arc<Unit>,
    port: Tbu<Unit, SystemMemory>,
    memory: SystemMemory,
    /// The reference: what memory holds, what the tables map (page, writable), what a refused access does.
    bytes: HashMap<u64, Vec<u8>>,
    map: HashMap<u64, (u64, bool)>,
    ignore: bool,
}

#[derive(Debug, PartialEq)]
enum Stop {
    Fault,
    Bus,
}

impl Bench {
    fn new(r: &mut Random, entries: usize) -> Self {
        let memory = memory();
        let s1 = stage1(Some(region(TABLE, Granule::K4, 3, 21)), None);
        let unit = Unit::new(memory.clone(), context(key(TlbStage::Stage1, 1), only1(s1)));
        let port = unit.port(entries);
        let mut bytes = HashMap::new();
        for page in (0..PAGES).filter(|p| !HOLE.contains(p)) {
            let data: Vec<u8> = (0..PAGE / 8).flat_map(|_| r.next().to_le_bytes()).collect();
            memory.write(Pa(DATA + page * PAGE), A, &data).unwrap();
            bytes.insert(page, data);
        }
        Self { unit, port, memory, bytes, map: HashMap::new(), ignore: false }
    }

    /// Maps runs of pages, some read only, some onto the hole, with gaps. Sources get the physical pages below
    /// `half` and destinations those above, so that a copy never overlaps itself.
    fn map_at_random(&mut self, r: &mut Random, half: u64) {
        let mut v = 0;
        while v < VPAGES {
            let end = if v < VPAGES / 2 { VPAGES / 2 } else { VPAGES };
            let n = (1 + r.below(6)).min(end - v);
            let (low, high) = if v < VPAGES / 2 { (0, half) } else { (half, PAGES) };
            if r.below(5) != 0 {
                let first = low + r.below(high - low - n);
                let writable = r.below(4) != 0;
                for i in 0..n {
                    self.map_page(v + i, Some((first + i, writable)));
                }
            } else {
                (0..n).for_each(|i| self.map_page(v + i, None));
            }
            v += n;
        }
    }

    fn map_page(&mut self, v: u64, to: Option<(u64, bool)>) {
        let entry = to.map_or(0, |(page, writable)| {
            (DATA + page * PAGE) | d::PAGE | d::AF | d::USER | if writable { 0 } else { d::RO }
        });
        self.memory.store64(Pa(TABLE + (VA / PAGE + v) * 8), entry).unwrap();
        match to {
            Some(to) => self.map.insert(v, to),
            None => self.map.remove(&v),
        };
    }

    /// Where one byte goes: a page of RAM and an offset, nowhere (`None`), or an error.
    fn place(&self, va: u64, write: bool) -> Result<Option<(u64, usize)>, Stop> {
        let v = va.wrapping_sub(VA) / PAGE;
        let to = self.map.get(&v).filter(|(_, writable)| *writable || !write);
        match to {
            None if self.ignore => Ok(None),
            None => Err(Stop::Fault),
            Some((page, _)) if HOLE.contains(page) => Err(Stop::Bus),
            Some((page, _)) => Ok(Some((*page, (va % PAGE) as usize))),
        }
    }

    fn get(&self, va: u64) -> Result<u8, Stop> {
        Ok(self.place(va, false)?.map_or(0, |(page, at)| self.bytes[&page][at]))
    }

    fn put(&mut self, va: u64, byte: u8) -> Result<(), Stop> {
        if let Some((page, at)) = self.place(va, true)? {
            self.bytes.get_mut(&page).unwrap()[at] = byte;
        }
        Ok(())
    }

    /// All of RAM is what the reference says: nothing outside of the mappings was touched.
    fn check_memory(&self) {
        let mut now = vec![0; PAGE as usize];
        for (page, want) in &self.bytes {
            self.memory.read(Pa(DATA + page * PAGE), A, &mut now).unwrap();
            assert!(now == *want, "page {page}");
        }
    }

    fn check(&mut self, got: Result<(), DmaError>, want: Result<(), (usize, Stop)>, first: u64) {
        let faults = self.unit.faults();
        match (got, want) {
            (Ok(()), Ok(())) => assert!(faults.is_empty() || self.ignore),
            (Err(e), Err((done, stop))) => {
                assert_eq!(e.done, done);
                match stop {
                    Stop::Bus => assert_eq!(e.fault, DmaFault::Bus(BusError::Decode)),
                    Stop::Fault => {
                        assert_eq!(e.fault, DmaFault::Terminated);
                        assert_eq!(faults.iter().map(|f| f.0).collect::<Vec<_>>(), [first + done as u64]);
                    }
                }
            }
            (got, want) => panic!("{got:?} and {want:?}"),
        }
    }

    fn span(r: &mut Random) -> (u64, usize) {
        let va = VA - PAGE + r.below((VPAGES + 2) * PAGE);
        let len = match r.below(4) {
            0 => r.below(17),
            1 => r.below(3 * PAGE),
            2 => PAGE * r.below(4),
            _ => r.below(24 * PAGE),
        };
        (va, len as usize)
    }

    fn one_read(&mut self, r: &mut Random) {
        let (va, len) = Self::span(r);
        let mut want = vec![0xa5; len];
        let mut stop = Ok(());
        for (i, byte) in want.iter_mut().enumerate() {
            match self.get(va + i as u64) {
                Ok(b) => *byte = b,
                Err(e) => {
                    stop = Err((i, e));
                    break;
                }
            }
        }
        let mut buf = vec![0xa5; len];
        let got = self.port.read(FROM, Iova(va), &mut buf);
        self.check(got, stop, va);
        assert!(buf == want, "read of {len} at {va:#x}");
    }

    fn one_write(&mut self, r: &mut Random) {
        let (va, len) = Self::span(r);
        let data: Vec<u8> = (0..len).map(|_| r.next() as u8).collect();
        let stop = (0..len).try_for_each(|i| self.put(va + i as u64, data[i]).map_err(|e| (i, e)));
        let got = self.port.write(FROM, Iova(va), &data);
        self.check(got, stop, va);
    }

    fn one_copy(&mut self, r: &mut Random) {
        let half = VPAGES / 2 * PAGE;
        let (src, dst) = (VA + r.below(half), VA + half + r.below(half));
        let len = r.below(16 * PAGE).min(VA + half - src) as usize;
        let mut stop = Ok(());
        for i in 0..len {
            let moved = match self.get(src + i as u64) {
                Err(e) => Err((CopySide::Source, src, i, e)),
                Ok(byte) => self.put(dst + i as u64, byte).map_err(|e| (CopySide::Destination, dst, i, e)),
            };
            if moved.is_err() {
                stop = moved;
                break;
            }
        }
        let got = self.port.copy((FROM, Iova(src)), (FROM, Iova(dst)), len);
        match (got, stop) {
            (Err(CopyError { side, error }), Err((want, first, done, e))) => {
                assert_eq!(side, want);
                self.check(Err(error), Err((done, e)), first);
            }
            (got, stop) => {
                assert!(got.is_ok() && stop.is_ok(), "{got:?} {stop:?}");
                self.unit.faults();
            }
        }
    }
}

fn run(seed: u64, entries: usize, ignore: bool) {
    let mut r = Random(seed);
    let mut b = Bench::new(&mut r, entries);
    b.ignore = ignore;
    b.unit.on_fault(if ignore { OnFault::Ignore } else { OnFault::Abort });
    b.map_at_random(&mut r, PAGES / 2);
    for _ in 0..60 {
        match r.below(3) {
            0 => b.one_read(&mut r),
            1 => b.one_write(&mut r),
            _ => b.one_copy(&mut r),
        }
    }
    b.check_memory();
}

#[test]
fn transfers_equal_the_byte_by_byte_reference() {
    for seed in 0..48 {
        // A TLB of four entries merges runs as well as a large one.
        run(seed, [4, 64, 8192][seed as usize % 3], false);
    }
}

#[test]
fn refused_pages_read_as_zero_and_ignore_writes_if_the_smmu_says_so() {
    for seed in 1000..1024 {
        run(seed, [4, 8192][seed as usize % 2], true);
    }
}

#[test]
fn a_stalled_transfer_goes_on_where_it_stopped() {
    for seed in 0..60 {
        let mut r = Random(seed);
        let mut b = Bench::new(&mut r, 64);
        b.unit.on_fault(OnFault::Stall);
        let pages = 12;
        for v in 0..pages {
            b.map_page(v, (r.below(3) != 0).then(|| (v + 2 * r.below(2), true)));
        }
        let len = (pages * PAGE) as usize - 100;
        let data: Vec<u8> = (0..len).map(|_| r.next() as u8).collect();
        let (mut done, mut stalls) = (0, 0);
        while done < len {
            let at = VA + 50 + done as u64;
            let Err(e) = b.port.write(FROM, Iova(at), &data[done..]) else { break };
            let DmaFault::Stalled(tag) = e.fault else { panic!("{e:?}") };
            assert!(!b.map.contains_key(&((at + e.done as u64 - VA) / PAGE)), "it stalled at a hole");
            assert_eq!(b.port.stall_state(tag), StallState::Waiting);
            done += e.done;
            stalls += 1;
            assert!(b.unit.log.begin_sync().poll(), "a stalled access is not waited for");
            b.map_page((VA + 50 + done as u64 - VA) / PAGE, Some((20 + stalls, true)));
            b.unit.resume(StallState::Retry);
            assert_eq!(b.port.stall_state(tag), StallState::Retry);
            assert_eq!(b.port.stall_state(tag), StallState::Terminated { abort: true }, "used up");
        }
        assert_eq!(b.unit.faults().len(), stalls as usize, "each stall was reported once");
        for (i, byte) in data.iter().enumerate() {
            b.put(VA + 50 + i as u64, *byte).unwrap();
        }
        // Pages may be mapped twice, so the reference wrote them in the same order.
        b.check_memory();
    }
}

#[test]
fn a_copy_that_stalls_leaves_one_tag_and_no_trace() {
    let mut r = Random(5);
    for source in [true, false] {
        let mut b = Bench::new(&mut r, 64);
        b.unit.on_fault(OnFault::Stall);
        for v in 0..8 {
            b.map_page(v, Some((v, true)));
            b.map_page(32 + v, Some((60 + v, true)));
        }
        b.map_page(if source { 3 } else { 35 }, None);
        let (src, dst) = (Iova(VA + 10), Iova(VA + 32 * PAGE + 10));
        let len = 6 * PAGE as usize;
        let e = b.port.copy((FROM, src), (FROM, dst), len).unwrap_err();
        assert_eq!(e.error.done, 3 * PAGE as usize - 10);
        assert_eq!(e.side, if source { CopySide::Source } else { CopySide::Destination });
        assert_eq!(b.unit.state.lock().unwrap().stalls.len(), 1);
        b.map_page(if source { 3 } else { 35 }, Some((if source { 3 } else { 63 }, true)));
        let done = e.error.done as u64;
        let rest = (FROM, src.wrapping_add(done));
        b.port.copy(rest, (FROM, dst.wrapping_add(done)), len - done as usize).unwrap();
        for i in 0..len as u64 {
            let byte = b.get(VA + 10 + i).unwrap();
            b.put(VA + 32 * PAGE + 10 + i, byte).unwrap();
        }
        b.check_memory();
    }
}

#[test]
fn bytes_before_a_hole_in_memory_are_transferred_however_they_are_mapped() {
    // One block of 2 MiB over RAM of 1.5 MiB, and the same range by pages.
    for block in [true, false] {
        let memory = SystemMemory::new(&[(0, 0x10_000), (2 * MIB, 3 * MIB / 2)]).unwrap();
        let leaf = d::AF | d::USER;
        memory
            .store64(Pa(0x2000), if block { (2 * MIB) | d::BLOCK | leaf } else { 0x3000 | d::TABLE })
            .unwrap();
        for i in 0..512 {
            memory.store64(Pa(0x3000 + i * 8), (2 * MIB + i * PAGE) | d::PAGE | leaf).unwrap();
        }
        let s1 = stage1(Some(region(0x2000, Granule::K4, 2, 30)), None);
        let unit = Unit::new(memory.clone(), context(key(TlbStage::Stage1, 1), only1(s1)));
        let mut port = unit.port(64);
        let data = vec![7; 2 * MIB as usize - 24];
        let e = port.write(FROM, Iova(24), &data).unwrap_err();
        let want = 3 * MIB as usize / 2 - 24;
        assert_eq!((e.done, e.fault), (want, DmaFault::Bus(BusError::Decode)), "block: {block}");
        let mut back = vec![0; want];
        memory.read(Pa(2 * MIB + 24), A, &mut back).unwrap();
        assert!(back.iter().all(|&b| b == 7));
        let mut buf = vec![0; data.len()];
        assert_eq!(port.read(FROM, Iova(24), &mut buf).unwrap_err().done, want);
        let e = port.copy((FROM, Iova(24)), (FROM, Iova(24)), data.len()).unwrap_err();
        assert_eq!((e.side, e.error.done), (CopySide::Source, want));
    }
}

#[test]
fn an_address_that_leaves_the_bus_comes_back_at_its_bottom() {
    let mut r = Random(1);
    let mut b = Bench::new(&mut r, 64);
    // Page 511 of TTBR0's half of 21 bits is not next to page 0; the bus has 49 bits and no upper half is mapped.
    b.map_page(0, Some((1, true)));
    let mut buf = [0; 8];
    let above = Iova((1 << 49) + VA);
    b.port.read(FROM, above, &mut buf).unwrap();
    assert_eq!(buf[..], b.bytes[&1][..8]);
    let top = Iova(u64::MAX - 3);
    assert_eq!(b.port.read(FROM, top, &mut buf).unwrap_err().done, 0);
}

#[test]
fn nothing_is_translated_for_an_empty_transfer() {
    let mut r = Random(1);
    let mut b = Bench::new(&mut r, 64);
    b.port.read(FROM, Iova(0), &mut []).unwrap();
    b.port.write(FROM, Iova(0), &[]).unwrap();
    b.port.copy((FROM, Iova(0)), (FROM, Iova(0)), 0).unwrap();
    assert!(b.unit.faults().is_empty());
    assert_eq!(b.port.stats().resolutions, 0);
    assert_eq!(b.port.stall_state(StallTag(77)), StallState::Terminated { abort: true });
    assert!(b.port.translate(&FROM, Iova(0), Access::Read).is_err());
}
