//! Tenants with disjoint memory behind one SMMU. Each writes what it likes into tables of its own (stage 1 of nested
//! streams) and sends what it likes (any address, substream, privilege, ATS translated or not): nothing of another tenant
//! or of the kernel is read or written, and events name nobody but the sender.

#[path = "rig/random.rs"]
mod random;
#[path = "isolation/watch.rs"]
mod watch;

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{AtsPort, AtsReply, DmaPort, Initiator, Memory, Mmio, PageRequest, StallState};
use portcullis_bus::{DmaFault, StallTag};
use portcullis_smmuv3::{Caps, Port};
use random::Rng;
use watch::{Machine, Watch};

const RAM: u64 = 0x8000_0000;
const SIZE: u64 = 0x100_0000;
const STRTAB: u64 = RAM;
const CMDQ: u64 = RAM + 0x1_0000;
const EVENTQ: u64 = RAM + 0x2_0000;
const PRIQ: u64 = RAM + 0x3_0000;
/// The kernel's CDs and tables.
const KERNEL: u64 = RAM + 0x4_0000;
const KERNEL_END: u64 = RAM + 0x40_0000;
/// One MiB for each tenant.
const fn home(n: u64) -> u64 {
    RAM + 0x40_0000 + n * 0x10_0000
}
const HOME: u64 = 0x10_0000;
const PAGES: u64 = HOME / 0x1000;
/// Where a nested tenant's memory is in its own eyes.
const IPA: u64 = 0x4000_0000;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The kernel's stage 1.
    Stage1,
    /// The kernel's stage 1, with two processes and full ATS. The device is trusted with what it was granted.
    FullAts,
    /// The kernel's stage 2.
    Stage2,
    /// The kernel's stage 2 under whatever the tenant writes.
    Nested,
    /// The same with split-stage ATS.
    NestedAts,
}

const KINDS: [Kind; 6] =
    [Kind::Stage1, Kind::FullAts, Kind::Stage2, Kind::Nested, Kind::NestedAts, Kind::Nested];

struct World {
    m: Machine,
    rng: Rng,
    next: u64,
}

impl World {
    fn table(&mut self) -> u64 {
        let at = self.next;
        self.next += 0x1000;
        assert!(self.next <= KERNEL_END);
        self.m.store(at, &[0; 512]);
        at
    }

    /// A page in the kernel's tables, 48 bits from level 0.
    fn map(&mut self, root: u64, input: u64, leaf: u64) {
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = table + 8 * (input >> shift & 511);
            let v = self.m.load(at);
            table = if v & 1 != 0 {
                v & 0xffff_ffff_f000
            } else {
                let next = self.table();
                self.m.store(at, &[next | 3]);
                next
            };
        }
        self.m.store(table + 8 * (input >> 12 & 511), &[leaf]);
    }

    fn stage1_leaf(&mut self, page: u64) -> u64 {
        let flags = self.rng.next() & (1 << 7 | 1 << 11 | 1 << 51 | 1 << 53 | 1 << 54);
        page | 3 | 1 << 6 | 3 << 8 | u64::from(!self.rng.one_in(6)) << 10 | flags
    }
    fn stage2_leaf(&mut self, page: u64) -> u64 {
        let access = self.rng.pick(&[3u64, 3, 3, 1]) << 6;
        page | 3
            | 15 << 2
            | access
            | 3 << 8
            | u64::from(!self.rng.one_in(6)) << 10
            | self.rng.next() & 1 << 51
    }

    /// A CD of the kernel for some pages of tenant `n`.
    fn kernel_cd(&mut self, at: u64, n: u64, asid: u64) {
        let root = self.table();
        for _ in 0..40 {
            let (va, page) = (self.rng.below(64) << 12, home(n) + (self.rng.below(PAGES) << 12));
            let leaf = self.stage1_leaf(page);
            self.map(root, va, leaf);
        }
        let flags = self.rng.next() & (7 << 44 | 3 << 42);
        let zero =
            16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | asid << 48 | flags;
        self.m.store(at, &[zero, root, 0, 0xff, 0, 0, 0, 0]);
    }

    fn build(seed: u64) -> Self {
        let caps = Caps { sid_bits: 8, ssid_bits: 4, secure: None, ..Caps::full() };
        let m = Machine::with_memory(caps, CMDQ, EVENTQ, RAM, SIZE);
        let mut w = Self { m, rng: Rng(seed), next: KERNEL + 0x4000 };
        for (n, kind) in (0u64..).zip(KINDS) {
            let cds = KERNEL + 0x400 * n;
            let zero;
            let mut one = 1 << 2 | 1 << 4 | 3 << 6 | w.rng.next() & (3 | 15 << 48 | 1 << 19);
            let two = (n + 1)
                | 16 << 32
                | 2 << 38
                | 1 << 40
                | 1 << 42
                | 3 << 44
                | 5 << 48
                | 1 << 51
                | w.rng.next() & (3 << 53 | 3 << 55 | 1 << 58);
            let mut three = 0;
            match kind {
                Kind::Stage1 => {
                    w.kernel_cd(cds, n, n + 1);
                    zero = 1 | 5 << 1 | cds;
                }
                Kind::FullAts => {
                    for ssid in 0..3 {
                        w.kernel_cd(cds + 64 * ssid, n, 0x10 + ssid);
                    }
                    zero = 1 | 5 << 1 | cds | 2 << 59;
                    // Without a substream: process 0 (S1DSS = 1 would pass everything).
                    one = one & !3 | 2 | 1 << 28;
                }
                Kind::Stage2 | Kind::Nested | Kind::NestedAts => {
                    three = w.table();
                    for page in 0..PAGES {
                        let leaf = w.stage2_leaf(home(n) + (page << 12));
                        if !w.rng.one_in(20) {
                            w.map(three, IPA + (page << 12), leaf);
                        }
                    }
                    if kind == Kind::Stage2 {
                        zero = 1 | 6 << 1;
                    } else {
                        // Its CDs are in its memory, of either format.
                        zero = 1 | 7 << 1 | w.rng.below(3) << 4 | IPA | w.rng.below(5) << 59;
                        one |= if kind == Kind::NestedAts { 2 << 28 } else { 0 };
                    }
                }
            }
            let two =
                if kind == Kind::Stage2 || kind == Kind::Nested { two | w.rng.below(2) << 57 } else { two };
            w.m.store(STRTAB + 64 * n, &[zero, one, two, three, 0, 0, 0, 0]);
        }
        for (n, kind) in (0u64..).zip(KINDS) {
            if matches!(kind, Kind::Nested | Kind::NestedAts) {
                w.tidy(n);
            }
        }
        w.m.w.write64(0xc0, PRIQ | 4).unwrap();
        w.m.start(STRTAB, 3, 2);
        w.m.w.write32(0x20, 0x1f).unwrap();
        w
    }

    /// A nested tenant puts its house in order: CDs and tables that work.
    fn tidy(&mut self, n: u64) {
        let flags = self.rng.next() & (7 << 44 | 3 << 42);
        for cd in 0..16 {
            let zero =
                16 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 48 | flags;
            self.m.store(home(n) + 64 * cd, &[zero, IPA + 0x1000, 0, 0xff, 0, 0, 0, 0]);
        }
        for level in 1..4 {
            self.m.store(home(n) + 0x1000 * level, &[(IPA + 0x1000 * (level + 1)) | 3]);
        }
        for page in 0..64 {
            let target = IPA + (self.rng.below(PAGES) << 12);
            let leaf = self.stage1_leaf(target);
            self.m.store(home(n) + 0x4000 + 8 * page, &[leaf]);
        }
    }

    /// A nested tenant writes something into its memory: CDs, L1CDs, tables, with its own addresses or anybody's.
    fn tamper(&mut self, n: u64) {
        let r = &mut self.rng;
        let anywhere = match r.below(6) {
            0 => r.next() & 0xffff_ffff_f000,
            1 => (RAM + r.below(SIZE)) & !0xfff,
            _ => IPA + (r.below(32) << 12),
        };
        let (at, value) = match r.below(8) {
            0 => {
                let words = [
                    (16 + r.below(24))
                        | r.below(4) << 6
                        | 1 << 8
                        | 1 << 10
                        | 3 << 12
                        | u64::from(r.one_in(8)) << 14
                        | (16 + r.below(24)) << 16
                        | 2 << 22
                        | r.below(2) << 30
                        | 1 << 31
                        | r.below(7) << 32
                        | r.next() & (3 << 35 | 3 << 38 | 3 << 42 | 7 << 44)
                        | 1 << 41
                        | r.below(3) << 48,
                    anywhere,
                    IPA + (r.below(32) << 12),
                    r.next(),
                ];
                let cd = r.below(64);
                self.m.store(home(n) + 64 * cd, &words);
                return;
            }
            1 => (r.below(64) * 8, r.next()),
            2 => (r.below(8) * 8, anywhere | 1),
            3 => (r.below(32 * 512) * 8, r.next()),
            4..6 => {
                (r.below(32 * 512) * 8, anywhere | 3 | r.next() & 0x0078_0000_0000_07fc | 1 << 10 | 1 << 6)
            }
            _ => (r.below(8) << 12 | r.below(8) << 3, anywhere | 3),
        };
        self.m.store(home(n) + at, &[value]);
    }

    fn address(&mut self, n: u64) -> u64 {
        let r = &mut self.rng;
        match r.below(8) {
            0 => random::address(r),
            1 => RAM + r.below(SIZE),
            2 => home(n) + r.below(HOME),
            3 => IPA + r.below(HOME),
            4 => r.next() & 0xffff_ffff_ffff,
            _ => r.below(64) << 12 | r.below(0x1000),
        }
    }

    /// What belongs to tenant `n`, and what of the kernel's is read for it.
    fn check(&mut self, n: u64, who: &str) {
        let mine = home(n)..home(n) + HOME;
        let inside = |at: u64, len: u64| mine.contains(&at) && at + len <= mine.end;
        for (at, len, _) in self.m.data.take() {
            assert!(inside(at, len), "{who}: data at {at:#x}");
        }
        for (at, len, new) in self.m.walks.take() {
            let own = inside(at, len);
            let queue = (EVENTQ..EVENTQ + 0x800).contains(&at) || (PRIQ..PRIQ + 0x100).contains(&at);
            let ok = match (new.is_some(), len) {
                // Records.
                (true, 16 | 32) => queue,
                // Flags of descriptors, in its own tables or in those that the kernel made for it.
                (true, _) => own || (KERNEL + 0x4000..KERNEL_END).contains(&at),
                // Its own STE and no other.
                _ => own || at & !63 == STRTAB + 64 * n || (KERNEL..KERNEL_END).contains(&at),
            };
            assert!(ok, "{who}: the SMMU at {at:#x}, {len} bytes, wrote {new:x?}");
        }
        for e in self.m.events() {
            assert_eq!(e[0] >> 32, n, "{who}: event {e:x?}");
        }
        self.m.walks.take();
    }
}

fn tag_of(r: Result<(), portcullis_bus::DmaError>) -> Option<StallTag> {
    match r {
        Err(e) => match e.fault {
            DmaFault::Stalled(tag) => Some(tag),
            _ => None,
        },
        Ok(()) => None,
    }
}

fn run(seed: u64, steps: usize) -> [u64; 4] {
    let mut w = World::build(seed);
    let mut ports: Vec<Port<Watch>> = KINDS.iter().map(|_| w.m.port()).collect();
    // What each process of the ATS tenant has been granted.
    let mut seen = [0; 4];
    for step in 0..steps {
        let n = w.rng.below(KINDS.len() as u64);
        let kind = KINDS[n as usize];
        let nested = matches!(kind, Kind::Nested | Kind::NestedAts);
        if nested {
            for _ in 0..w.rng.below(3) {
                w.tamper(n);
            }
            if w.rng.one_in(40) {
                w.tidy(n);
            }
            if w.rng.one_in(8) {
                w.m.command([0x04, 31]);
                w.m.command([0x30, 0]);
                w.m.command([0x46, 0]);
            }
        }
        w.m.walks.take();
        let attrs = Attributes::DEVICE_DEFAULT
            .with_privileged(w.rng.one_in(3))
            .with_instruction(w.rng.one_in(3))
            .with_non_secure(!w.rng.one_in(4));
        let ssid = w.rng.one_in(2).then(|| SubstreamId(w.rng.below(18) as u32));
        let from = Initiator { stream: StreamId(n as u32), substream: ssid, attrs };
        let va = w.address(n);
        let who = format!("seed {seed} step {step}: {kind:?} {from:?} {va:#x}");
        let port = &mut ports[n as usize];
        let mut buf = [0u8; 48];
        let result = match w.rng.below(11) {
            0 | 10 => {
                if let AtsReply::Granted(t) = port.translation_request(from, Iova(va), w.rng.one_in(2)) {
                    seen[2] += u64::from(t.has_access());
                    if kind == Kind::FullAts && t.has_access() {
                        assert!((home(n)..home(n) + HOME).contains(&t.addr), "{who}: {t:x?}");
                        seen[3] += 1;
                        let mut b = [0; 8];
                        if t.read {
                            port.read_translated(from, t.addr, &mut b).unwrap();
                        }
                        if t.write {
                            port.write_translated(from, t.addr, &b).unwrap();
                        }
                    } else {
                        assert!(!t.has_access() || kind == Kind::NestedAts, "{who}: ATS is not for it");
                    }
                }
                Ok(())
            }
            // Whatever address a device claims to be translated. Full ATS trusts it.
            1..3 if kind != Kind::FullAts => {
                if w.rng.one_in(2) {
                    port.read_translated(from, va, &mut buf)
                } else {
                    port.write_translated(from, va, &[0x5a; 24])
                }
            }
            3 => {
                port.page_request(PageRequest {
                    from,
                    addr: Iova(va),
                    read: true,
                    write: false,
                    execute: false,
                    privileged: false,
                    group: 3,
                    last: true,
                });
                let prod = w.m.r(0x1_00c8);
                w.m.w.write32(0x1_00cc, prod).unwrap();
                Ok(())
            }
            4..7 => port.read(from, Iova(va), &mut buf),
            7 => {
                let to = w.address(n);
                port.copy((from, Iova(va)), (from, Iova(to)), 40).map_err(|e| e.error)
            }
            _ => port.write(from, Iova(va), &[0xa5; 24]),
        };
        seen[usize::from(result.is_err())] += 1;
        if let Some(tag) = tag_of(result) {
            w.m.command([0x45 | n << 32, 0]);
            assert!(
                matches!(ports[n as usize].stall_state(tag), StallState::Terminated { abort: true }),
                "{who}"
            );
            // The command queue was read and is the kernel's.
            let events = w.m.events();
            assert!(events.iter().all(|e| e[0] >> 32 == n), "{who}: {events:x?}");
            let data = w.m.data.take();
            assert!(data.iter().all(|(at, len, _)| { *at >= home(n) && at + len <= home(n) + HOME }));
            w.m.walks.take();
            continue;
        }
        w.check(n, &who);
    }
    seen
}

#[test]
fn tenants_stay_in_their_memory() {
    let mut all = [0; 4];
    for seed in 0..12 {
        let seen = run(seed, 8000);
        all.iter_mut().zip(seen).for_each(|(a, s)| *a += s);
    }
    assert!(all.iter().all(|n| *n > 100), "completed, refused, translations, granted: {all:?}");
}

/// Memory outside of every tenant is as it was.
#[test]
fn the_kernels_memory_is_untouched_but_for_flags_and_records() {
    let mut w = World::build(99);
    let words = |w: &World| -> Vec<u64> {
        let pages = (STRTAB..STRTAB + 0x1000).step_by(8).chain((KERNEL..KERNEL_END).step_by(8));
        pages.map(|at| w.m.mem.load64(Pa(at), Attributes::DEVICE_DEFAULT).unwrap()).collect()
    };
    let before = words(&w);
    let mut p = w.m.port();
    for _ in 0..4000 {
        let n = w.rng.below(KINDS.len() as u64);
        if matches!(KINDS[n as usize], Kind::Nested | Kind::NestedAts) {
            w.tamper(n);
        }
        let va = w.address(n);
        let _ = p.write(Initiator::new(StreamId(n as u32)), Iova(va), &[0xee; 16]);
        w.m.command([0x45 | n << 32, 0]);
        w.m.events();
    }
    // AF, dirty state of stage 1 (AP[2] cleared) and of stage 2 (S2AP[1] set).
    let flags = 1 << 10 | 1 << 7;
    for (a, b) in before.iter().zip(words(&w)) {
        assert_eq!(a & !flags, b & !flags);
    }
}
