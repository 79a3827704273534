//! One run through everything that drivers do: all kinds of domains, lists, faults that stall, process address spaces, a
//! loss of power.

use std::sync::Arc;

use portcullis_arch::{Iova, Pa};
use portcullis_drivers::ops::DomainSpec;
use portcullis_iommu::{FaultReport, FaultResponse, Paging, Process, ProcessConfig, Prot};

use super::{Board, RAM, Random, segment};

const IN: u64 = 0x7000_0000;

/// How much of the board snoops the CPU's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coherent {
    /// Nothing: buffers are cleaned and invalidated.
    Nothing,
    /// SMMU and the channels used here: no maintenance at all.
    Everything,
}

/// Runs it; the board must be fresh.
pub fn run(board: &Board, coherent: Coherent) {
    let all = coherent == Coherent::Everything;
    let prot = |p: Prot| if all { p.cached().noexec() } else { p.noexec() };
    let put = |pa: u64, bytes: &[u8]| match all {
        true => board.machine().cpu_write(Pa(pa), bytes).unwrap(),
        false => board.put(pa, bytes),
    };
    let get = |pa: u64, len: usize| match all {
        true => {
            let mut bytes = vec![0; len];
            board.machine().cpu_read(Pa(pa), &mut bytes).unwrap();
            bytes
        }
        false => board.get(pa, len),
    };
    let mut random = Random(42);
    let names = ["lpd-dma0", "lpd-dma1", "lpd-dma2", "lpd-dma3", "lpd-dma4"];
    let check = |name: &str, to: u64, from: u64, len: u64, seed: u64| {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + seed) as u8).collect();
        put(RAM + from, &data);
        put(RAM + to, &vec![0; len as usize]);
        let half = len / 2 + 1;
        let list = |at: u64| [segment(IN + at, half), segment(IN + at + half, len - half)];
        let driver = &board.channel(name).driver;
        let cookie = driver.submit_sg(&list(to), &[segment(IN + from, len)]).unwrap();
        driver.issue_pending();
        board.settle();
        assert_eq!(board.completion(name, cookie).result, Ok(()), "{name}: {:?}", board.faults());
        assert!(get(RAM + to, len as usize) == data, "{name}");
    };

    // Stage 1, stage 2, nested, each with a table that grows, shrinks and changes.
    let pool = board.channel(names[2]).driver.pool();
    let parent = board.stage2();
    parent.map(Iova(pool.block.pa.get()), pool.block.pa, 0x1000, prot(Prot::READ)).unwrap();
    parent.map(Iova(RAM), Pa(RAM), 0x10_0000, prot(Prot::RW)).unwrap();
    let nested = board.system.core().nested_domain(&parent, Paging::default()).unwrap();
    for (name, domain) in names.into_iter().zip([board.stage1(), board.stage2(), nested]) {
        board.attach(name, &domain);
        for round in 0..4 {
            domain.map(Iova(IN), Pa(RAM), 0x4_0000, prot(Prot::RW)).unwrap();
            check(
                name,
                0x2_0000 + random.below(0x8000),
                random.below(0x8000),
                0x1800 + random.below(0x4000),
                round,
            );
            domain.protect(Iova(IN + 0x1000), 0x2000, prot(Prot::READ)).unwrap();
            check(name, 0x2_0000, 0x1000, 0x2000, round);
            assert!(board.copy(name, IN + 0x1000, IN, 64).result.is_err());
            domain.protect(Iova(IN + 0x1000), 0x2000, prot(Prot::RW)).unwrap();
            check(name, 0x1000, 0x2_0000, 0x2000, round);
            assert_eq!(domain.unmap(Iova(IN), 0x4_0000), Ok(0x4_0000));
            assert!(board.copy(name, IN + 0x1000, IN, 64).result.is_err());
        }
        // A block in place of the pages, and tables far apart.
        domain.map(Iova(0x4000_0000), Pa(0x4000_0000), 0x40_0000, prot(Prot::RW)).unwrap();
        domain.map(Iova(IN), Pa(RAM), 0x4_0000, prot(Prot::RW)).unwrap();
        check(name, 0x2_0000, 0, 0x1000, 9);
        domain.unmap(Iova(0x4000_0000), 0x40_0000).unwrap();
    }

    // Faults that stall.
    let stalling = board.stalling();
    let target = Arc::downgrade(&stalling);
    stalling.set_fault_handler(Some(Arc::new(move |report: &FaultReport| {
        let page = report.iova.get() & !0xfff;
        let prot = if all { Prot::RW.cached() } else { Prot::RW };
        match target.upgrade() {
            Some(domain) if (IN..IN + 0x8_0000).contains(&page) => {
                domain.map(Iova(page), Pa(page - IN + RAM), 0x1000, prot.noexec()).unwrap();
                FaultResponse::Resolved
            }
            _ => FaultResponse::Terminate,
        }
    })));
    board.attach(names[3], &stalling);
    check(names[3], 0x4_0123, 0x1_0456, 0x5000, 1);
    assert!(board.copy(names[3], IN + 0x8_0000, IN, 64).result.is_err());

    // Processes come and go.
    for round in 0..3u8 {
        let config = ProcessConfig { coherent_walk: all, ..ProcessConfig::default() };
        let process = Process::new(board.machine().dma_memory(), config).unwrap();
        let va = process.mmap(0x3000, prot(Prot::RW)).unwrap();
        board.system.core().bind(board.device(names[4]), process.clone()).unwrap();
        let data = vec![round + 1; 0x1000];
        process.write(va, &data).unwrap();
        process.write(va.wrapping_add(0x1800), &[0xee; 0x1000]).unwrap();
        if !all {
            process.clean(va, 0x3000).unwrap();
        }
        let copied = board.copy_simple(names[4], va.get() + 0x1800, va.get(), 0x1000);
        assert_eq!(copied.result, Ok(()), "{:?}", board.faults());
        if !all {
            process.invalidate(va.wrapping_add(0x1000), 0x2000).unwrap();
        }
        let mut seen = vec![0; 0x1000];
        process.read(va.wrapping_add(0x1800), &mut seen).unwrap();
        assert!(seen == data);
        let more = process.mmap(0x20_0000, prot(Prot::RW)).unwrap();
        process.munmap(more).unwrap();
        assert!(board.copy_simple(names[4], va.get(), more.get(), 16).result.is_err());
        if round != 1 {
            process.exit().unwrap();
            assert!(board.copy_simple(names[4], va.get(), va.get(), 16).result.is_err());
        }
        board.system.core().unbind(board.device(names[4])).unwrap();
    }

    // The PL writer, and an unknown stream of it.
    let device = board.device("pl-writer0");
    let domain = board.alloc(DomainSpec::Stage1(Paging::default()));
    board.system.core().attach_device(device, &domain).unwrap();
    domain.map(Iova(IN), Pa(RAM), 0x1000, prot(Prot::RW)).unwrap();
    put(RAM + 0x20, &[0; 4]);
    assert!(board.pl_write(IN + 0x20, 0xcafe_beef, 0));
    assert_eq!(get(RAM + 0x20, 4), 0xcafe_beef_u32.to_le_bytes());
    assert!(!board.pl_write(IN + 0x20, 1, 1));

    // Power goes and comes.
    board.machine().smmu().unwrap().reset();
    board.system.smmu().unwrap().1.resume().unwrap();
    check(names[0], 0x2_0000, 0, 0x1000, 11);
    board.faults();
}
