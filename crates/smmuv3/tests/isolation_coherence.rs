//! TLBs and configuration caches: after software has changed tables, STEs or CDs and invalidated that in any legal way
//! (every TLBI that covers it, by address, range, ASID, VMID, all, with VMID wildcards; every CFGI), followed by CMD_SYNC,
//! a port that has been used all the time answers like a port that has just been made.

#[path = "rig/random.rs"]
mod random;
#[path = "isolation/watch.rs"]
mod watch;

use std::collections::{BTreeMap, BTreeSet};

use portcullis_arch::{Access, Attributes, Iova, StreamId, SubstreamId};
use portcullis_bus::Initiator;
use portcullis_smmuv3::{Caps, Httu, Port, StallModel};
use random::Rng;
use watch::{Machine, Watch};

const RAM: u64 = 0x8000_0000;
const STRTAB: u64 = RAM;
const CMDQ: u64 = RAM + 0x1000;
const EVENTQ: u64 = RAM + 0x2000;
const CDS: u64 = RAM + 0x4000;
const TABLES: u64 = RAM + 0x1_0000;
/// IPAs of a VM are this much above the addresses in memory.
const DELTA: u64 = 0x10_0000_0000;
const PAGES: u64 = 48;
const ALL_VMIDS: u64 = 4;

/// One table tree and its tags.
#[derive(Clone, Copy, Debug)]
struct Space {
    stage2: bool,
    root: u64,
    vmid: u64,
    asid: u64,
    el2: bool,
    /// Bits above the region's size: all ones in the upper half.
    high: u64,
    tbi: bool,
    /// Descriptors hold IPAs.
    delta: u64,
}

/// Who uses which spaces.
#[derive(Clone, Copy, Debug)]
struct User {
    sid: u32,
    ssid: Option<u32>,
    stage1: Option<usize>,
}

struct World {
    m: Machine,
    rng: Rng,
    next: u64,
    spaces: Vec<Space>,
    users: Vec<User>,
    e2h: bool,
    vmw: u64,
    commands: BTreeMap<u64, u64>,
    /// Contiguous runs: space and first page.
    runs: BTreeSet<(usize, u64)>,
}

impl World {
    fn table(&mut self, delta_of: Option<u64>) -> u64 {
        let at = self.next;
        self.next += 0x1000;
        self.m.store(at, &[0; 512]);
        if let Some(root2) = delta_of {
            // A VM's tables are in its memory.
            self.map(root2, 0, at + DELTA, 3, Some(at | 3 | 15 << 2 | 3 << 6 | 3 << 8 | 1 << 10));
        }
        at
    }

    /// The address of the entry of `input` at `level`; 48 bits, 4 KiB, from level 0.
    fn entry(&mut self, root: u64, delta: u64, input: u64, level: u32) -> u64 {
        let mut table = root;
        for l in 0.. {
            let at = table + 8 * (input >> (39 - 9 * l) & 511);
            if l == level {
                return at;
            }
            let v = self.m.load(at);
            table = if v & 3 == 3 {
                (v & 0xffff_ffff_f000) - delta
            } else {
                let next = self.table(None);
                if delta != 0 {
                    self.allow(next);
                }
                self.m.store(at, &[(next + delta) | 3]);
                next
            };
        }
        unreachable!()
    }

    /// Stage 2 of the VM maps this page of tables.
    fn allow(&mut self, page: u64) {
        let root2 = self.spaces.iter().find(|s| s.stage2 && s.vmid == 3).unwrap().root;
        let leaf = page | 3 | 15 << 2 | 3 << 6 | 3 << 8 | 1 << 10;
        let at = self.entry(root2, 0, page + DELTA, 3);
        self.m.store(at, &[leaf]);
    }

    fn map(&mut self, root: u64, delta: u64, input: u64, level: u32, leaf: Option<u64>) {
        let at = self.entry(root, delta, input, level);
        self.m.store(at, &[leaf.unwrap_or(0)]);
    }

    /// A leaf for page `page` of a space, or none.
    fn leaf(&mut self, s: &Space, level: u32) -> Option<u64> {
        let r = &mut self.rng;
        if r.one_in(4) {
            return None;
        }
        let kind = if level == 3 { 3 } else { 1 };
        // VMs see 48 pages of data at the IPAs that stage 2 changes.
        let out = match (s.delta != 0, level) {
            (true, _) => r.below(PAGES) << 12,
            (false, 3) => RAM + 0x40_0000 + (r.below(512) << 12),
            _ => r.below(64) << 21,
        };
        let af = u64::from(!r.one_in(8)) << 10;
        let flags = r.next() & (1 << 51 | 1 << 54 | 1 << 53);
        let perms = if s.stage2 {
            r.pick(&[3u64, 3, 1, 2]) << 6 | 15 << 2
        } else {
            r.pick(&[1u64, 1, 3, 0]) << 6 | u64::from(!r.one_in(3)) << 11
        };
        Some(out | kind | af | flags | perms | 3 << 8)
    }

    fn new(seed: u64, httu: bool) -> Self {
        let mut rng = Rng(seed);
        let caps = Caps {
            sid_bits: 4,
            ssid_bits: 4,
            secure: None,
            stall_model: StallModel::Terminate,
            stall_max: 0,
            httu: if httu { Httu::Dirty } else { Httu::None },
            ril: true,
            tlb_entries: rng.pick(&[16, 256, 8192]),
            ..Caps::full()
        };
        let e2h = rng.one_in(2);
        let m = Machine::new(caps, CMDQ, EVENTQ);
        let spaces = Vec::new();
        let mut w = Self {
            m,
            rng,
            next: TABLES,
            spaces,
            users: Vec::new(),
            e2h,
            vmw: 0,
            commands: BTreeMap::new(),
            runs: BTreeSet::new(),
        };
        let flags = if httu { 3 << 42 } else { 0 };
        let s2flags = if httu { 3 << 55 } else { 0 };
        let top = 0xffff_0000_0000_0000u64;
        // (stage 2, VMID, ASID, EL2, upper half, TBI, in a VM)
        let kinds = [
            (true, 2, 0, false, false, false, false),
            (true, 3, 0, false, false, false, false),
            (false, 1, 1, false, false, false, false),
            (false, 1, 2, false, true, false, false),
            (false, 3, 1, false, false, false, true),
            (false, 3, 2, false, false, true, true),
            (false, 0, 7, true, false, false, false),
            (false, 1, 5, false, false, true, false),
            (false, 1, 6, false, false, false, false),
        ];
        for (stage2, vmid, asid, el2, upper, tbi, vm) in kinds {
            let root = w.table(None);
            let delta = if vm { DELTA } else { 0 };
            let high = if upper { top } else { 0 };
            w.spaces.push(Space { stage2, root, vmid, asid, el2, high, tbi, delta });
            if vm {
                w.allow(root);
            }
        }
        // CD n is for space n.
        for (n, s) in w.spaces.clone().iter().enumerate() {
            if s.stage2 {
                continue;
            }
            let at = CDS + 64 * n as u64;
            if s.delta != 0 {
                w.allow(at & !0xfff);
            }
            w.m.store(at, &w.cd(s, flags));
        }
        let s2 = |vmid: u64, root: u64| {
            let two = vmid | 16 << 32 | 2 << 38 | 1 << 40 | 1 << 42 | 3 << 44 | 5 << 48 | 1 << 51 | s2flags;
            [two | 1 << 58, root]
        };
        let one = 2 | 1 << 2 | 1 << 4 | 3 << 6;
        let ptr = |n: usize| CDS + 64 * n as u64;
        let roots: Vec<u64> = w.spaces.iter().map(|s| s.root).collect();
        let ste = |sid: u64, zero: u64, one: u64, [two, three]: [u64; 2]| {
            w.m.store(STRTAB + 64 * sid, &[zero, one, two, three, 0, 0, 0, 0]);
        };
        ste(0, 1 | 6 << 1, 0, s2(2, roots[0]));
        ste(1, 1 | 5 << 1 | ptr(2), one, [1, 0]);
        ste(2, 1 | 5 << 1 | ptr(3), one, [1, 0]);
        ste(3, 1 | 7 << 1 | (ptr(4) + DELTA), one, s2(3, roots[1]));
        ste(4, 1 | 7 << 1 | (ptr(5) + DELTA), one, s2(3, roots[1]));
        ste(5, 1 | 5 << 1 | ptr(6), one | 2 << 30, [0, 0]);
        // 16 CDs from CDS on, of which this one uses two by substream.
        ste(6, 1 | 5 << 1 | CDS | 4 << 59, one, [1, 0]);
        ste(7, 1 | 6 << 1, 0, s2(3, roots[1]));
        let user = |sid, ssid, stage1| User { sid, ssid, stage1 };
        w.users = vec![
            user(0, None, None),
            user(1, None, Some(2)),
            user(2, None, Some(3)),
            user(3, None, Some(4)),
            user(4, None, Some(5)),
            user(5, None, Some(6)),
            user(6, Some(7), Some(7)),
            user(6, Some(8), Some(8)),
            user(7, None, None),
        ];
        for n in 0..w.spaces.len() {
            for page in 0..PAGES {
                let s = w.spaces[n];
                let leaf = w.leaf(&s, 3);
                w.map(s.root, s.delta, page << 12, 3, leaf);
            }
        }
        w.m.start(STRTAB, 4, 2 | u32::from(e2h));
        w
    }

    fn cd(&self, s: &Space, flags: u64) -> [u64; 8] {
        let half = if s.high != 0 { 1 << 14 } else { 1 << 30 };
        let zero = 16
            | 1 << 8
            | 1 << 10
            | 3 << 12
            | 16 << 16
            | 2 << 22
            | 5 << 24
            | 3 << 28
            | half
            | 1 << 31
            | 5 << 32
            | u64::from(s.tbi) << 38
            | 1 << 41
            | 3 << 45
            | s.asid << 48
            | flags;
        let root = s.root + s.delta;
        [zero, root, root, 0xff, 0, 0, 0, 0]
    }

    fn command(&mut self, command: [u64; 2]) {
        *self.commands.entry(command[0] & 0xff).or_insert(0) += 1;
        self.m.command(command);
    }

    /// The VMID field of a command that means `vmid`: with wildcards the low bits say nothing.
    fn vmid(&mut self, vmid: u64) -> u64 {
        let low = (1 << self.vmw) - 1;
        (vmid & !low | self.rng.next() & low) << 32
    }

    /// Invalidates `count` pages from `input` on of a stage 1 space. `plain`: no global leaf was or is there.
    fn tlbi_stage1(&mut self, s: &Space, input: u64, count: u64, plain: bool, level: u64) {
        let va = input | s.high;
        let (vmid, asid) = (self.vmid(s.vmid), s.asid << 48);
        let leaf = self.rng.below(2);
        let by_address: &[u64] = if s.el2 { &[0x22, 0x23] } else { &[0x12, 0x13] };
        let opcode = self.rng.pick(by_address);
        let base = opcode | if s.el2 { 0 } else { vmid } | if opcode & 1 == 0 { asid } else { 0 };
        match self.rng.below(9) {
            0..3 => {
                // One by one.
                for n in 0..count {
                    let at = va + (n << 12) * if level == 3 { 1 } else { 512 };
                    self.command([base, at & !0xfff | leaf]);
                }
            }
            3..6 => {
                // A range that covers it, from a multiple of its own size, or exactly.
                let pages = count * if level == 3 { 1 } else { 512 };
                let scale = self.rng.below(7);
                let num = pages.div_ceil(1 << scale).min(32) - 1;
                if (num + 1) << scale < pages {
                    return self.tlbi_stage1(s, input, count, plain, level);
                }
                let ttl = if leaf == 1 && self.rng.one_in(2) { level << 8 } else { 0 };
                if num == 0 && scale == 0 && ttl == 0 {
                    return self.tlbi_stage1(s, input, count, plain, level);
                }
                self.command([base | num << 12 | scale << 20, va & !0xfff | 1 << 10 | ttl | leaf]);
            }
            6 if plain && !s.el2 => self.command([0x11 | vmid | asid, 0]),
            6 if plain && self.e2h => self.command([0x21 | asid, 0]),
            _ if s.el2 => self.command([0x20, 0]),
            _ => {
                let opcode = self.rng.pick(&[0x10, 0x28, 0x30]);
                self.command([opcode | vmid, 0]);
            }
        }
    }

    fn tlbi_stage2(&mut self, s: &Space, input: u64) {
        let vmid = self.vmid(s.vmid);
        match self.rng.below(4) {
            0 | 1 => {
                let (num, scale) = (self.rng.below(4), self.rng.below(3));
                let fields = if self.rng.one_in(2) && (num | scale) != 0 {
                    (num << 12 | scale << 20, 1 << 10)
                } else {
                    (0, 0)
                };
                self.command([0x2a | vmid | fields.0, input & !0xfff | fields.1 | 1]);
                // Combined entries.
                let vmid = self.vmid(s.vmid);
                self.command([0x10 | vmid, 0]);
            }
            2 => self.command([0x28 | vmid, 0]),
            _ => self.command([0x30, 0]),
        }
    }

    /// Contiguous runs of these pages are taken apart: break before make.
    fn break_runs(&mut self, n: usize, pages: std::ops::RangeInclusive<u64>) {
        let s = self.spaces[n];
        for first in (0..PAGES).step_by(16) {
            if first > *pages.end() || first + 15 < *pages.start() || !self.runs.remove(&(n, first)) {
                continue;
            }
            for p in first..first + 16 {
                self.map(s.root, 0, p << 12, 3, None);
            }
            self.tlbi_stage1(&s, first << 12, 16, true, 3);
            self.command([0x46, 0]);
        }
    }

    /// Software changes something and invalidates it. Returns the input addresses concerned.
    fn change(&mut self) -> Vec<u64> {
        let n = self.rng.below(self.spaces.len() as u64) as usize;
        let s = self.spaces[n];
        let page = self.rng.below(PAGES);
        let mut touched = vec![page << 12];
        match self.rng.below(12) {
            // One page.
            0..6 => {
                self.break_runs(n, page..=page);
                let at = self.entry(s.root, s.delta, page << 12, 3);
                let old = self.m.load(at);
                let leaf = self.leaf(&s, 3);
                self.m.store(at, &[leaf.unwrap_or(0)]);
                let global = |v: u64| v & 1 != 0 && v & 1 << 11 == 0;
                if s.stage2 {
                    self.tlbi_stage2(&s, page << 12);
                } else {
                    self.tlbi_stage1(&s, page << 12, 1, !global(old) && !global(leaf.unwrap_or(0)), 3);
                }
            }
            // Several pages at once.
            6 if !s.stage2 => {
                let count = 1 + self.rng.below(PAGES - page);
                self.break_runs(n, page..=page + count - 1);
                for p in page..page + count {
                    let leaf = self.leaf(&s, 3);
                    self.map(s.root, s.delta, p << 12, 3, leaf);
                    touched.push(p << 12);
                }
                self.tlbi_stage1(&s, page << 12, count, false, 3);
            }
            // A run of 16 pages with the contiguous hint, or away with it: break before make.
            7 if !s.stage2 && s.delta == 0 => {
                let first = page & !15;
                self.break_runs(n, page..=page);
                for p in first..first + 16 {
                    self.map(s.root, 0, p << 12, 3, None);
                    touched.push(p << 12);
                }
                self.tlbi_stage1(&s, first << 12, 16, false, 3);
                self.command([0x46, 0]);
                let out = RAM + 0x40_0000 + (self.rng.below(32) << 16);
                for p in 0..16 {
                    let leaf = (out + (p << 12)) | 3 | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11 | 1 << 52;
                    self.map(s.root, 0, (first + p) << 12, 3, Some(leaf));
                }
                self.runs.insert((n, first));
            }
            // A block of 2 MiB next to the pages.
            8 if s.delta == 0 => {
                let input = (1 + self.rng.below(3)) << 21;
                let leaf = self.leaf(&s, 2);
                self.map(s.root, 0, input, 2, leaf);
                touched = vec![input, input + 0x1f_f000, input + 0x12_3000];
                if s.stage2 {
                    self.tlbi_stage2(&s, input);
                    if self.rng.one_in(2) {
                        self.tlbi_stage2(&s, input + 0x5_5000);
                    }
                } else {
                    self.tlbi_stage1(&s, input, 1, false, 2);
                }
            }
            // A CD of which everything is new but the tags.
            9 if !s.stage2 => {
                let at = CDS + 64 * n as u64;
                let zero = self.m.load(at) ^ self.rng.pick(&[1u64 << 36, 1 << 35, 1 << 31, 3 << 45]);
                self.m.store(at, &[zero]);
                let users: Vec<User> = self.users.iter().filter(|u| u.stage1 == Some(n)).copied().collect();
                for u in users {
                    let sid = u64::from(u.sid) << 32;
                    let ssid = u64::from(u.ssid.unwrap_or(0)) << 12;
                    match self.rng.below(5) {
                        0 | 1 => self.command([0x05 | ssid | sid, 1]),
                        2 => self.command([0x06 | sid, 0]),
                        3 => self.command([0x03 | sid, 1]),
                        _ => self.command([0x04 | sid, 31]),
                    }
                }
                self.tlbi_stage1(&s, 0, PAGES, false, 3);
                self.command([if s.el2 { 0x20 } else { 0x30 }, 0]);
            }
            // An STE goes and comes back.
            10 => {
                let broken = (0..8).find(|sid| self.m.load(STRTAB + 64 * sid) & 1 == 0);
                let sid = broken.unwrap_or(self.rng.below(8));
                let at = STRTAB + 64 * sid;
                let zero = self.m.load(at);
                self.m.store(at, &[zero ^ 1]);
                let range = self.rng.below(4);
                match self.rng.below(3) {
                    0 => self.command([0x03 | sid << 32, 1]),
                    1 => self.command([0x04 | sid << 32, range]),
                    _ => self.command([0x04, 31]),
                }
            }
            // VMID wildcards for the commands that follow.
            11 => {
                self.vmw = self.rng.below(3);
                let cr0 = self.m.r(0x20) & !(7 << 6) | (self.vmw as u32) << 6;
                use portcullis_bus::Mmio;
                self.m.w.write32(0x20, cr0).unwrap();
                assert_eq!(self.m.r(0x24), cr0);
            }
            _ => {}
        }
        self.command([0x46, 0]);
        touched
    }

    /// Both answers to one transaction.
    fn compare(&mut self, old: &mut Port<Watch>, u: &User, input: u64, step: &str) {
        let s = u.stage1.map(|n| self.spaces[n]);
        let top = match s {
            Some(s) if s.tbi && self.rng.one_in(2) => self.rng.below(256) << 56,
            _ => 0,
        };
        let va = input & 0xffff_ffff_ffff | s.map_or(0, |s| s.high) | top;
        let attrs = Attributes::DEVICE_DEFAULT
            .with_privileged(self.rng.one_in(3))
            .with_instruction(self.rng.one_in(4));
        let from = Initiator { stream: StreamId(u.sid), substream: u.ssid.map(SubstreamId), attrs };
        let access = if self.rng.one_in(2) { Access::Read } else { Access::Write };
        let a = old.translate(&from, Iova(va), access);
        let first = self.m.events();
        let b = self.m.port().translate(&from, Iova(va), access);
        let second = self.m.events();
        let page = |t: portcullis_walk::Translated| (t.pa, t.attrs);
        assert_eq!(a.map(page), b.map(page), "{step}: {u:?} {va:#x} {access}");
        assert_eq!(first, second, "{step}: {u:?} {va:#x} {access}");
    }
}

fn run(seed: u64, httu: bool, steps: usize) -> (BTreeMap<u64, u64>, u64) {
    let mut w = World::new(seed, httu);
    let mut ports = [w.m.port(), w.m.port(), w.m.port()];
    for step in 0..steps {
        let touched = w.change();
        let what = format!("seed {seed} step {step} httu {httu}");
        let p = w.rng.below(3) as usize;
        for at in touched.into_iter().take(6) {
            for n in 0..w.users.len() {
                let (u, inside) = (w.users[n], w.rng.below(0x1000));
                w.compare(&mut ports[p], &u, at | inside, &what);
            }
        }
        for _ in 0..12 {
            let n = w.rng.below(w.users.len() as u64) as usize;
            let (u, at) = (w.users[n], w.rng.below(PAGES + 1) << 12);
            let at = if w.rng.one_in(8) { at << 9 } else { at };
            let p = w.rng.below(3) as usize;
            w.compare(&mut ports[p], &u, at, &what);
        }
    }
    let hits = ports.iter().map(|p| p.stats().hits).sum();
    assert!(w.spaces.iter().all(|s| s.vmid < ALL_VMIDS));
    (w.commands, hits)
}

#[test]
fn a_port_answers_like_an_uncached_one_after_any_legal_invalidation() {
    let mut commands = BTreeMap::new();
    let mut hits = 0;
    for seed in 0..16 {
        for httu in [false, true] {
            let (seen, n) = run(seed, httu, 500);
            hits += n;
            for (opcode, count) in seen {
                *commands.entry(opcode).or_insert(0) += count;
            }
        }
    }
    for opcode in [3, 4, 5, 6, 0x10, 0x11, 0x12, 0x13, 0x20, 0x21, 0x22, 0x23, 0x28, 0x2a, 0x30] {
        assert!(commands.contains_key(&opcode), "{opcode:#x} was never used: {commands:x?}");
    }
    assert!(hits > 10_000, "{hits}");
}

#[test]
#[ignore = "a long run"]
fn the_same_for_long() {
    for seed in 100..400 {
        run(seed, seed % 2 == 0, 2000);
    }
}
