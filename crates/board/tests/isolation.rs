//! Whatever a master does, it reaches what its domain maps and nothing else: random mappings for several masters, random
//! transfers by all kinds of engines, and a shadow of memory that says which bytes may change and be seen.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{Board, RAM, RAM_BYTES, segment};
use portcullis_arch::{Iova, Pa, StreamId};
use portcullis_bus::{DmaError, DmaFault, DmaPort as _, Initiator, StallState, SystemMemory};
use portcullis_drivers::zdma::{BusErrorKind, Segment, TransferError};
use portcullis_iommu::{Domain, DomainSpec, FaultModel, FaultReport, FaultResponse, Paging, Prot};
use portcullis_smmuv2::Port;
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: u64 = 0x1000;
/// Addresses of the masters: a window of this many pages.
const IN: u64 = 0x7000_0000;
const WINDOW: u64 = 32;
/// Pages of RAM that may be mapped; those before and behind are guards.
const FIRST: u64 = 16;
const PAGES: u64 = RAM_BYTES / PAGE - 2 * FIRST;
/// Physical addresses where nothing answers.
const NOWHERE: u64 = 0xa000_0000;

const MASTERS: [&str; 4] = ["fpd-dma0", "fpd-dma7", "lpd-dma3", "pl-writer0"];

#[derive(Clone, Copy, Debug)]
enum Rights {
    Read,
    ReadWrite,
    Write,
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        master: usize,
        at: u64,
        page: u64,
        count: u64,
        rights: Rights,
    },
    MapNowhere {
        master: usize,
        at: u64,
    },
    Unmap {
        master: usize,
        at: u64,
        count: u64,
    },
    Protect {
        master: usize,
        at: u64,
        rights: Rights,
    },
    Copy {
        master: usize,
        to: u64,
        from: u64,
        len: u64,
        simple: bool,
    },
    List {
        master: usize,
        to: Vec<(u64, u64)>,
        from: Vec<(u64, u64)>,
    },
    Write {
        to: u64,
        value: u32,
    },
    /// One long access of a master of its own making, without an engine.
    Burst {
        master: usize,
        at: u64,
        len: u64,
        write: bool,
    },
}

/// A page as a master sees it.
#[derive(Clone, Copy, Debug)]
struct Page {
    pa: u64,
    read: bool,
    write: bool,
}

struct Master {
    name: &'static str,
    domain: Arc<Domain>,
    stage2: bool,
    /// By page number from [`IN`].
    pages: BTreeMap<u64, Page>,
    stream: StreamId,
    port: Port<SystemMemory>,
}

impl Master {
    fn prot(rights: Rights) -> Prot {
        match rights {
            Rights::Read => Prot::READ,
            Rights::ReadWrite => Prot::RW,
            Rights::Write => Prot::WRITE,
        }
        .noexec()
    }

    fn page(&self, pa: u64, rights: Rights) -> Page {
        // Stage 1 has no write-only pages.
        let read = !matches!(rights, Rights::Write) || !self.stage2;
        Page { pa, read, write: !matches!(rights, Rights::Read) }
    }

    fn map(&mut self, at: u64, pa: u64, count: u64, rights: Rights) {
        let count = count.min(WINDOW - at);
        let taken = (at..at + count).any(|n| self.pages.contains_key(&n));
        let result = self.domain.map(Iova(IN + at * PAGE), Pa(pa), count * PAGE, Self::prot(rights));
        assert_eq!(result.is_err(), taken, "{result:?}");
        if !taken {
            for i in 0..count {
                self.pages.insert(at + i, self.page(pa + i * PAGE, rights));
            }
        }
    }

    fn unmap(&mut self, at: u64, count: u64) {
        let count = count.min(WINDOW - at);
        let before = self.pages.len();
        self.pages.retain(|n, _| !(at..at + count).contains(n));
        let gone = (before - self.pages.len()) as u64 * PAGE;
        assert_eq!(self.domain.unmap(Iova(IN + at * PAGE), count * PAGE), Ok(gone));
    }

    fn protect(&mut self, at: u64, rights: Rights) {
        let result = self.domain.protect(Iova(IN + at * PAGE), PAGE, Self::prot(rights));
        assert_eq!(result.is_ok(), self.pages.contains_key(&at), "{result:?}");
        if let Some(page) = self.pages.get(&at).copied() {
            self.pages.insert(at, self.page(page.pa, rights));
        }
    }

    /// Where a byte is, if the master may access it and there is memory.
    fn at(&self, iova: u64, write: bool) -> Option<u64> {
        let offset = iova.checked_sub(IN)?;
        let page = self.pages.get(&(offset / PAGE))?;
        let allowed = if write { page.write } else { page.read };
        (allowed && page.pa != NOWHERE).then_some(page.pa + offset % PAGE)
    }
}

struct World {
    board: Board,
    masters: Vec<Master>,
    shadow: Vec<u8>,
}

/// The addresses of a list of segments, one by one.
fn bytes(list: &[(u64, u64)]) -> impl Iterator<Item = u64> + '_ {
    list.iter().flat_map(|&(at, len)| at..at + len)
}

impl World {
    fn new(stages: [bool; 4], stall: bool, seed: u64) -> Self {
        let board = Board::new();
        let mut masters = Vec::new();
        for (name, stage2) in MASTERS.into_iter().zip(stages) {
            let spec = if stage2 { DomainSpec::Stage2 } else { DomainSpec::Stage1 };
            let model = FaultModel { stall, ..FaultModel::default() };
            let core = board.system.core();
            let domain = core.alloc_domain_with(board.instance(), spec(Paging::default()), model).unwrap();
            domain.set_fault_handler(Some(Arc::new(|_: &FaultReport| FaultResponse::Terminate)));
            core.attach_device(board.device(name), &domain).unwrap();
            if let Some(channel) = board.system.channel(name) {
                board.system.map_descriptors(channel, &domain).unwrap();
            }
            let stream = board.machine().engine(name).unwrap().stream;
            let port = board.machine().smmu().unwrap().port(board.machine().memory().clone());
            masters.push(Master { name, domain, stage2, pages: BTreeMap::new(), stream, port });
        }
        let mut random = common::Random(seed | 1);
        // Most pages are there from the start, each somewhere else.
        for master in &mut masters {
            for at in 0..WINDOW {
                let (page, rights) = (RAM + (FIRST + random.below(PAGES)) * PAGE, random.below(16));
                match rights {
                    0..2 => {}
                    2 => master.map(at, page, 1, Rights::Read),
                    3 => master.map(at, page, 1, Rights::Write),
                    _ => master.map(at, page, 1, Rights::ReadWrite),
                }
            }
        }
        let shadow: Vec<u8> = (0..RAM_BYTES).map(|_| random.next() as u8).collect();
        board.put(RAM, &shadow);
        Self { board, masters, shadow }
    }

    /// What a copy does to memory: bytes in order until the first that is refused. `None` if source and destination
    /// share memory, where the order would matter.
    fn expect(
        &mut self,
        master: usize,
        to: &[(u64, u64)],
        from: &[(u64, u64)],
    ) -> Option<(u64, Option<bool>)> {
        let m = &self.masters[master];
        let (mut moves, mut ended) = (Vec::new(), None);
        for (to, from) in bytes(to).zip(bytes(from)) {
            match (m.at(from, false), m.at(to, true)) {
                (Some(from), Some(to)) => moves.push((to, from)),
                (None, _) => ended = Some(false),
                (_, None) => ended = Some(true),
            }
            if ended.is_some() {
                break;
            }
        }
        let mut sources: Vec<u64> = moves.iter().map(|m| m.1).collect();
        sources.sort_unstable();
        if moves.iter().any(|(to, _)| sources.binary_search(to).is_ok()) {
            return None;
        }
        for &(to, from) in &moves {
            self.shadow[(to - RAM) as usize] = self.shadow[(from - RAM) as usize];
        }
        Some((moves.len() as u64, ended))
    }

    fn copy(&mut self, master: usize, to: &[(u64, u64)], from: &[(u64, u64)], simple: bool) {
        let name = self.masters[master].name;
        let Some((moved, ended)) = self.expect(master, to, from) else { return };
        let driver = &self.board.channel(name).driver;
        let cookie = if simple {
            driver.start_simple(Iova(to[0].0), Iova(from[0].0), to[0].1 as u32).unwrap()
        } else {
            let segments = |list: &[(u64, u64)]| -> Vec<Segment> {
                list.iter().map(|&(at, len)| segment(at, len)).collect()
            };
            let cookie = driver.submit_sg(&segments(to), &segments(from)).unwrap();
            driver.issue_pending();
            cookie
        };
        self.board.settle();
        let done = self.board.completion(name, cookie);
        assert_eq!(done.transferred, moved, "{done:?}");
        match (ended, done.result) {
            (None, Ok(())) => {}
            (Some(write), Err(TransferError::Bus { kind, .. })) => {
                let expected = if write { BusErrorKind::DestinationWrite } else { BusErrorKind::SourceRead };
                assert_eq!(kind, expected);
            }
            other => panic!("{other:?}"),
        }
    }

    fn burst(&mut self, master: usize, at: u64, len: u64, write: bool) {
        let m = &mut self.masters[master];
        let places: Vec<u64> = (at..at + len).map_while(|iova| m.at(iova, write)).collect();
        let from = Initiator::new(m.stream);
        let mut buf: Vec<u8> = (0..len).map(|i| (at + i * 3) as u8).collect();
        let result = match write {
            true => m.port.write(from, Iova(at), &buf),
            false => m.port.read(from, Iova(at), &mut buf),
        };
        assert_eq!(result.err().map_or(len as usize, |e| e.done), places.len(), "{result:?}");
        for (&place, byte) in places.iter().zip(&buf) {
            let shadow = &mut self.shadow[(place - RAM) as usize];
            match write {
                true => *shadow = *byte,
                false => assert_eq!(byte, shadow, "read of {place:#x}"),
            }
        }
        if let Err(DmaError { fault: DmaFault::Stalled(tag), .. }) = result {
            self.board.system.take_interrupts();
            let state = self.masters[master].port.stall_state(tag);
            assert_eq!(state, StallState::Terminated { abort: true });
        }
        self.board.system.take_interrupts();
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Map { master, at, page, count, rights } => {
                let count = (*count).min(PAGES - page);
                self.masters[*master].map(*at, RAM + (FIRST + page) * PAGE, count, *rights);
            }
            Op::MapNowhere { master, at } => self.masters[*master].map(*at, NOWHERE, 1, Rights::ReadWrite),
            Op::Unmap { master, at, count } => self.masters[*master].unmap(*at, *count),
            Op::Protect { master, at, rights } => self.masters[*master].protect(*at, *rights),
            Op::Copy { master, to, from, len, simple } => {
                self.copy(*master, &[(IN + to, *len)], &[(IN + from, *len)], *simple);
            }
            Op::List { master, to, from } => {
                // As many bytes on both sides.
                let total = |list: &[(u64, u64)]| list.iter().map(|s| s.1).sum::<u64>();
                let mut lists = [to.clone(), from.clone()];
                let less = total(to).min(total(from));
                for list in &mut lists {
                    let mut left = less;
                    for s in list.iter_mut() {
                        s.0 += IN;
                        s.1 = s.1.min(left);
                        left -= s.1;
                    }
                    list.retain(|s| s.1 > 0);
                }
                self.copy(*master, &lists[0], &lists[1], false);
            }
            Op::Burst { master, at, len, write } => self.burst(*master, IN + at, *len, *write),
            Op::Write { to, value } => {
                let at = self.masters[3].at(IN + to, true);
                assert_eq!(self.board.pl_write(IN + to, *value, 0), at.is_some());
                if let Some(at) = at {
                    let at = (at - RAM) as usize;
                    self.shadow[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        let now = self.board.get(RAM, RAM_BYTES as usize);
        if let Some(at) = now.iter().zip(&self.shadow).position(|(a, b)| a != b) {
            panic!("byte {:#x} is {:#x} and should be {:#x}", RAM + at as u64, now[at], self.shadow[at]);
        }
    }
}

fn rights() -> impl Strategy<Value = Rights> {
    prop_oneof![1 => Just(Rights::Read), 4 => Just(Rights::ReadWrite), 1 => Just(Rights::Write)]
}

fn address() -> impl Strategy<Value = u64> {
    // Also a little before and behind the window.
    let page = (0..WINDOW + 2).prop_map(|n| n * PAGE);
    (page, prop_oneof![Just(0), 0..PAGE, Just(PAGE - 1)]).prop_map(|(page, offset)| page + offset)
}

fn op() -> impl Strategy<Value = Op> {
    let list = || vec((address(), prop_oneof![1u64..64, 1..PAGE, Just(2 * PAGE)]), 1..6);
    let at = || 0..WINDOW;
    prop_oneof![
        6 => (0usize..4, at(), 0..PAGES, prop_oneof![Just(1u64), 1u64..12], rights())
            .prop_map(|(master, at, page, count, rights)| Op::Map { master, at, page, count, rights }),
        1 => (0usize..4, at()).prop_map(|(master, at)| Op::MapNowhere { master, at }),
        3 => (0usize..4, at(), 1u64..6).prop_map(|(master, at, count)| Op::Unmap { master, at, count }),
        2 => (0usize..4, at(), rights()).prop_map(|(master, at, rights)| Op::Protect { master, at, rights }),
        5 => (0usize..3, address(), address(), prop_oneof![1u64..64, 1..5 * PAGE], any::<bool>())
            .prop_map(|(master, to, from, len, simple)| Op::Copy { master, to, from, len, simple }),
        5 => (0usize..3, list(), list()).prop_map(|(master, to, from)| Op::List { master, to, from }),
        4 => (0usize..4, address(), prop_oneof![1u64..64, 1..5 * PAGE], any::<bool>())
            .prop_map(|(master, at, len, write)| Op::Burst { master, at, len, write }),
        2 => (address(), any::<u32>()).prop_map(|(to, value)| Op::Write { to: to & !3, value }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn exactly_the_mapped_bytes_change(
        stages in any::<[bool; 4]>(), stall in any::<bool>(), seed in any::<u64>(), ops in vec(op(), 20..80),
    ) {
        let mut world = World::new(stages, stall, seed);
        for op in &ops {
            world.apply(op);
        }
    }
}
