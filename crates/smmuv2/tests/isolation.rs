//! Whatever a master does, no byte outside its domain's mappings is read or written, and an invalidated translation is
//! never used after the sync. A plain map from (domain, page) to memory says what must happen.

mod rig;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use portcullis_arch::{Attributes, Iova, Pa};
use portcullis_bus::{DmaFault, DmaPort, Memory};
use portcullis_smmuv2::Port;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use rig::*;

const DOMAINS: u8 = 4;
const PAGES: u64 = 8;
/// Physical pages that mappings use. Two domains may share one.
const FRAMES: u64 = 24;
/// IOVAs are around here, in 1 GiB, 2 MiB and 4 KiB steps, so that all levels of the tables change.
const PLACES: [u64; 4] = [0, 0x20_0000, 0x4000_0000, 0x7f_ffff_c000];

#[derive(Clone, Debug)]
enum Op {
    Map {
        domain: u8,
        page: u64,
        frame: u64,
        writable: bool,
    },
    /// Clears the descriptor; what happens to the page is undefined until a flush.
    Unmap {
        domain: u8,
        page: u64,
    },
    /// How to flush: by VA, last level, by ASID, all of the VMID, global; then a sync.
    Flush {
        domain: u8,
        how: u8,
    },
    Read {
        domain: u8,
        port: usize,
        page: u64,
        offset: u64,
        len: usize,
    },
    Write {
        domain: u8,
        port: usize,
        page: u64,
        offset: u64,
        len: usize,
        fill: u8,
    },
    Copy {
        domain: u8,
        port: usize,
        from: u64,
        to: u64,
        len: usize,
    },
    /// The domain's stream goes to another domain, or to none.
    Attach {
        stream: u8,
        domain: Option<u8>,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let d = 0..DOMAINS;
    let page = 0..PAGES * PLACES.len() as u64;
    prop_oneof![
        4 => (d.clone(), page.clone(), 0..FRAMES, any::<bool>())
            .prop_map(|(domain, page, frame, writable)| Op::Map { domain, page, frame, writable }),
        2 => (d.clone(), page.clone()).prop_map(|(domain, page)| Op::Unmap { domain, page }),
        2 => (d.clone(), 0u8..6).prop_map(|(domain, how)| Op::Flush { domain, how }),
        4 => (d.clone(), 0..2usize, page.clone(), 0..0x1000u64, 1..0x2800usize)
            .prop_map(|(domain, port, page, offset, len)| Op::Read { domain, port, page, offset, len }),
        4 => (d.clone(), 0..2usize, page.clone(), 0..0x1000u64, 1..0x2800usize, any::<u8>())
            .prop_map(|(domain, port, page, offset, len, fill)| Op::Write { domain, port, page, offset, len, fill }),
        2 => (d.clone(), 0..2usize, page.clone(), page, 1..0x1800usize)
            .prop_map(|(domain, port, from, to, len)| Op::Copy { domain, port, from, to, len }),
        1 => (d.clone(), proptest::option::weighted(0.8, d))
            .prop_map(|(stream, domain)| Op::Attach { stream, domain }),
    ]
}

fn va(page: u64) -> u64 {
    PLACES[(page / PAGES) as usize] + page % PAGES * 0x1000
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    frame: u64,
    writable: bool,
}

struct World {
    r: Rig,
    t: Tables,
    roots: Vec<u64>,
    ports: Vec<Port<portcullis_bus::SystemMemory>>,
    /// What software has mapped, by domain and IOVA page number.
    maps: Vec<BTreeMap<u64, Mapping>>,
    /// Entries changed since the last flush: TLBs may still have the old mapping.
    limbo: Vec<BTreeMap<u64, Vec<Mapping>>>,
    attached: Vec<Option<u8>>,
    /// The content of the frames.
    shadow: Vec<Vec<u8>>,
    /// Bytes that went through, and transfers that were stopped.
    moved: usize,
    stopped: usize,
}

impl World {
    fn new() -> Self {
        let r = Rig::zynqmp_on();
        let mut t = Tables::new(&r);
        let roots: Vec<u64> = (0..DOMAINS).map(|_| t.alloc(1)).collect();
        for d in 0..DOMAINS {
            r.stage1(d, roots[usize::from(d)], LINUX_SCTLR | HUPCF);
            r.group(d.into(), 0x100 + u32::from(d), d.into());
        }
        // Every frame starts with bytes of its own; what lies around them must never change.
        let shadow: Vec<Vec<u8>> = (0..DATA_SIZE / 0x1000).map(|n| vec![n as u8 ^ 0x5a; 0x1000]).collect();
        for (n, bytes) in shadow.iter().enumerate() {
            r.mem.write(Pa(DATA + 0x1000 * n as u64), Attributes::DEVICE_DEFAULT, bytes).unwrap();
        }
        let ports = vec![r.port(), r.port()];
        let none = || vec![BTreeMap::new(); usize::from(DOMAINS)];
        let limbo = vec![BTreeMap::new(); usize::from(DOMAINS)];
        let mut w = Self {
            r,
            t,
            roots,
            ports,
            maps: none(),
            limbo,
            attached: (0..DOMAINS).map(Some).collect(),
            shadow,
            moved: 0,
            stopped: 0,
        };
        for domain in 0..DOMAINS {
            for page in (0..PAGES * PLACES.len() as u64).filter(|p| p % 5 != 3) {
                let frame = (page * 7 + u64::from(domain) * 5) % FRAMES;
                w.set(domain, page, Some(Mapping { frame, writable: page % 4 != 2 }));
            }
        }
        w
    }

    /// Changes a descriptor, and remembers what TLBs may still say.
    fn set(&mut self, domain: u8, page: u64, new: Option<Mapping>) {
        let d = usize::from(domain);
        let number = va(page) >> 12;
        let old = match new {
            Some(m) => self.maps[d].insert(number, m),
            None => self.maps[d].remove(&number),
        };
        if let Some(old) = old {
            self.limbo[d].entry(number).or_default().push(old);
        }
        let leaf = new.map_or(0, |m| (DATA + 0x1000 * m.frame) | RW | if m.writable { 0 } else { READ_ONLY });
        self.t.page(self.roots[d], va(page), leaf);
    }

    fn flush(&mut self, domain: u8, how: u8) {
        let asid = u64::from(domain);
        let d = usize::from(domain);
        match how {
            0 | 1 => {
                let reg = if how == 0 { TLBIVA } else { TLBIVAL };
                for number in self.limbo[d].keys() {
                    self.r.wb64(domain, reg, asid << 48 | number);
                }
            }
            2 => self.r.wb(domain, TLBIASID, domain.into()),
            3 => self.r.wb(domain, TLBIALL, 0),
            4 => self.r.w(TLBIVMID, 0),
            _ => self.r.w(TLBIALLNSNH, 0),
        }
        self.r.wb(domain, TLBSYNC, 0);
        assert_eq!(self.r.rb(domain, TLBSTATUS) & 1, 0);
        self.limbo[d].clear();
    }

    /// The pages of a transfer, as (IOVA page number, first byte, bytes).
    fn pieces(at: u64, len: usize) -> Vec<(u64, usize, usize)> {
        let (mut at, mut left, mut out) = (at, len, Vec::new());
        while left > 0 {
            let inside = (at & 0xfff) as usize;
            let n = left.min(0x1000 - inside);
            out.push((at >> 12, inside, n));
            at += n as u64;
            left -= n;
        }
        out
    }

    /// What may happen to an access to a page: the current mapping, or one from before. `None` is a fault.
    fn outcomes(&self, domain: Option<u8>, number: u64, write: bool) -> Vec<Option<u64>> {
        let Some(d) = domain.map(usize::from) else { return vec![None] };
        let frame = |m: &Mapping| (!write || m.writable).then_some(m.frame);
        let mut all = vec![self.maps[d].get(&number).and_then(frame)];
        if let Some(old) = self.limbo[d].get(&number) {
            all.extend(old.iter().filter_map(|m| frame(m).map(Some)));
        }
        all
    }

    fn memory(&self, frame: u64) -> Vec<u8> {
        let mut b = vec![0; 0x1000];
        self.r.mem.read(Pa(DATA + 0x1000 * frame), Attributes::DEVICE_DEFAULT, &mut b).unwrap();
        b
    }

    fn write(&mut self, domain: u8, port: usize, at: u64, data: &[u8]) {
        let who = stream(0x100 + u32::from(domain));
        let target = self.attached[usize::from(domain)];
        // A frame that could be written twice would not show its first bytes any more.
        let mut frames: Vec<u64> = Vec::new();
        let mut len = 0;
        for (number, _, n) in Self::pieces(at, data.len()) {
            let here: Vec<u64> = self.outcomes(target, number, true).into_iter().flatten().collect();
            if here.iter().any(|f| frames.contains(f)) {
                break;
            }
            frames.extend(here);
            len += n;
        }
        let data = &data[..len];
        let result = self.ports[port].write(who, Iova(at), data);
        let done = match result {
            Ok(()) => data.len(),
            Err(e) => {
                assert_eq!(e.fault, DmaFault::Terminated);
                self.stopped += 1;
                e.done
            }
        };
        self.moved += done;
        let mut so_far = 0;
        for (number, inside, n) in Self::pieces(at, data.len()) {
            let outcomes = self.outcomes(target, number, true);
            if so_far >= done {
                assert!(outcomes.contains(&None), "refused, but page {number:#x} is writable");
                break;
            }
            let bytes = &data[so_far..so_far + n];
            // One of the possible frames has it, and only there.
            let hit = outcomes.into_iter().flatten().find(|f| self.memory(*f)[inside..inside + n] == *bytes);
            let frame = hit.unwrap_or_else(|| panic!("page {number:#x} was written somewhere else"));
            self.shadow[frame as usize][inside..inside + n].copy_from_slice(bytes);
            so_far += n;
        }
    }

    fn read(&mut self, domain: u8, port: usize, at: u64, len: usize) -> Vec<u8> {
        let who = stream(0x100 + u32::from(domain));
        let target = self.attached[usize::from(domain)];
        let mut b = vec![0xee; len];
        let done = match self.ports[port].read(who, Iova(at), &mut b) {
            Ok(()) => len,
            Err(e) => {
                assert_eq!(e.fault, DmaFault::Terminated);
                self.stopped += 1;
                e.done
            }
        };
        self.moved += done;
        let mut so_far = 0;
        for (number, inside, n) in Self::pieces(at, len) {
            let outcomes = self.outcomes(target, number, false);
            if so_far >= done {
                assert!(outcomes.contains(&None), "refused, but page {number:#x} is mapped");
                break;
            }
            let got = &b[so_far..so_far + n];
            let right =
                outcomes.into_iter().flatten().any(|f| self.shadow[f as usize][inside..inside + n] == *got);
            assert!(right, "page {number:#x} was read from somewhere else");
            so_far += n;
        }
        assert!(b[done..].iter().all(|v| *v == 0xee), "bytes after the fault");
        b.truncate(done);
        b
    }

    fn check_memory(&self) {
        for (n, want) in self.shadow.iter().enumerate() {
            assert!(self.memory(n as u64) == *want, "frame {n} has changed");
        }
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Map { domain, page, frame, writable } => {
                self.set(domain, page, Some(Mapping { frame, writable }));
                // Software flushes before it relies on a changed mapping; a new one needs nothing.
            }
            Op::Unmap { domain, page } => self.set(domain, page, None),
            Op::Flush { domain, how } => self.flush(domain, how),
            Op::Read { domain, port, page, offset, len } => {
                self.read(domain, port, va(page) + offset, len);
            }
            Op::Write { domain, port, page, offset, len, fill } => {
                // Bytes that differ from place to place, so that a misplaced one is noticed.
                let data: Vec<u8> = (0..len).map(|i| fill.wrapping_add((i / 7) as u8)).collect();
                self.write(domain, port, va(page) + offset, &data);
            }
            Op::Copy { domain, port, from, to, len } => {
                if self.limbo.iter().all(BTreeMap::is_empty) {
                    self.copy(domain, port, va(from), va(to), len);
                }
            }
            Op::Attach { stream, domain } => {
                let s2cr = domain.map_or(0x0002_0000, u32::from);
                self.r.w(S2CR + 4 * u64::from(stream), s2cr);
                self.attached[usize::from(stream)] = domain;
            }
        }
        for n in 0..DOMAINS {
            self.r.wb(n, FSR, 0x8000_01fe);
        }
        self.r.w(GFSR, 0x8000_01ff);
    }

    /// A copy with nothing in limbo: exactly the source's bytes up to the first fault of either side.
    fn copy(&mut self, domain: u8, port: usize, from: u64, to: u64, len: usize) {
        let who = stream(0x100 + u32::from(domain));
        let target = self.attached[usize::from(domain)];
        let byte = |w: &Self, at: u64, write| {
            w.outcomes(target, at >> 12, write)[0].map(|f| (f as usize, (at & 0xfff) as usize))
        };
        // Overlapping ranges have no defined result: leave them out.
        let frames = |w: &Self, at, write| -> Vec<u64> {
            Self::pieces(at, len).iter().filter_map(|p| w.outcomes(target, p.0, write)[0]).collect()
        };
        let (source, sink) = (frames(self, from, false), frames(self, to, true));
        if source.iter().any(|f| sink.contains(f))
            || sink.iter().enumerate().any(|(i, f)| sink[..i].contains(f))
        {
            return;
        }
        let done = match self.ports[port].copy((who, Iova(from)), (who, Iova(to)), len) {
            Ok(()) => len,
            Err(e) => e.error.done,
        };
        for i in 0..len as u64 {
            let (s, d) = (byte(self, from + i, false), byte(self, to + i, true));
            match (s, d) {
                (Some((f, at)), Some((g, to))) if (i as usize) < done => {
                    self.shadow[g][to] = self.shadow[f][at];
                }
                (Some(_), Some(_)) => panic!("stopped before byte {i} for no reason"),
                _ => {
                    assert_eq!(i as usize, done, "the first byte that cannot be copied");
                    break;
                }
            }
        }
    }
}

static MOVED: AtomicUsize = AtomicUsize::new(0);
static STOPPED: AtomicUsize = AtomicUsize::new(0);

#[test]
fn a_master_reaches_its_mappings_and_nothing_else() {
    random_use_of_domains();
    let (moved, stopped) = (MOVED.load(Relaxed), STOPPED.load(Relaxed));
    assert!(
        moved > 4_000_000 && stopped > 1000,
        "too dull: {moved} bytes moved, {stopped} transfers stopped"
    );
}

proptest! {
    #![proptest_config(Config {
        cases: 400,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..Config::default()
    })]

    fn random_use_of_domains(ops in proptest::collection::vec(op(), 1..160)) {
        let mut w = World::new();
        for op in &ops {
            w.step(op);
        }
        w.check_memory();
        MOVED.fetch_add(w.moved, Relaxed);
        STOPPED.fetch_add(w.stopped, Relaxed);
        // After a flush of everything, what is unmapped is out of reach and what is mapped is not.
        for d in 0..DOMAINS {
            w.flush(d, 2);
        }
        for s in 0..DOMAINS {
            for page in 0..PAGES * PLACES.len() as u64 {
                w.read(s, 0, va(page), 8);
                w.write(s, 1, va(page) + 0xff0, &[s, 1, 2, 3]);
                w.step(&Op::Flush { domain: s, how: 2 });
            }
        }
        w.check_memory();
    }
}
