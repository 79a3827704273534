//! A DMA channel behind the SMMU as its drivers use it: Linux's register sequence and list layout, and our driver's
//! queueing, errors and termination, with every access translated.

mod common;

use common::{Board, RAM, map, segment};
use portcullis_arch::zdma::{interrupt, reg};
use portcullis_arch::{Access, Iova, Pa};
use portcullis_board::sim::EventKind;
use portcullis_drivers::fault::FaultReason;
use portcullis_drivers::zdma::{BusErrorKind, Completion, Progress, TransferError};
use portcullis_hal::Mmio as _;
use portcullis_iommu::Prot;

const FPD: &str = "fpd-dma2";
const IN: u64 = 0x7000_0000;

/// What a channel did since the last call: access, address, bytes.
fn transactions(board: &Board) -> Vec<(Access, u64, usize)> {
    let (events, _) = board.machine().tracer().take();
    let transaction = |kind: EventKind| match kind {
        EventKind::Transaction(t) => Some((t.access, t.iova.get(), t.len)),
        _ => None,
    };
    events.into_iter().filter_map(|e| transaction(e.kind)).collect()
}

/// Linux 6.12 `zynqmp_dma` on one channel: its descriptor pool has an IO virtual address of its own, as
/// `dma_alloc_coherent` gives it.
struct Linux<'a> {
    board: &'a Board,
    pool: (u64, u64),
    pending: Vec<u64>,
    next: u64,
}

impl Linux<'_> {
    fn read(&self, offset: u32) -> u32 {
        let slot = self.board.machine().engine(FPD).unwrap();
        self.board.machine().engine_registers(slot).read32(offset as usize)
    }
    fn write(&self, offset: u32, value: u32) {
        let slot = self.board.machine().engine(FPD).unwrap();
        self.board.machine().engine_registers(slot).write32(offset as usize, value);
    }

    /// zynqmp_dma_init.
    fn init(&self) {
        self.write(reg::IDS, 0xfff);
        let isr = self.read(reg::ISR);
        self.write(reg::ISR, isr);
        let attr = self.read(reg::DATA_ATTR);
        self.write(reg::DATA_ATTR, attr);
        self.read(reg::IRQ_SRC_ACCT);
        self.read(reg::IRQ_DST_ACCT);
    }

    /// prep_memcpy with one descriptor pair, and tx_submit, which links it behind the one before.
    fn submit(&mut self, to: u64, from: u64, len: u32) {
        let slot = self.next;
        self.next += 1;
        for (offset, address, ctrl) in [(0, from, 0x12u32), (32, to, 0x16)] {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(ctrl.to_le_bytes());
            bytes.extend([0; 16]);
            self.board.put(self.pool.1 + slot * 64 + offset, &bytes);
        }
        if let Some(before) = self.pending.last() {
            for offset in [0, 32] {
                let at = self.pool.1 + before * 64 + offset;
                self.board.put(at + 16, &(self.pool.0 + slot * 64 + offset).to_le_bytes());
                let ctrl = self.board.get32(at + 12);
                self.board.put32(at + 12, ctrl & !0x10);
            }
        }
        self.pending.push(slot);
    }

    fn start(&mut self) {
        let ctrl0 = self.read(reg::CTRL0);
        self.write(reg::CTRL0, ctrl0 | 0x40);
        let attr = self.read(reg::DATA_ATTR);
        self.write(reg::DATA_ATTR, attr & !(0xf << 14 | 0xf) | 15 << 14 | 15);
        let first = self.pool.0 + self.pending[0] * 64;
        self.pending.clear();
        self.write(reg::SRC_START_LSB, first as u32);
        self.write(reg::SRC_START_MSB, (first >> 32) as u32);
        self.write(reg::DST_START_LSB, (first + 32) as u32);
        self.write(reg::DST_START_MSB, ((first + 32) >> 32) as u32);
        self.write(reg::IEN, 0x7fd);
        self.write(reg::TOTAL_BYTE, 0);
        self.write(reg::CTRL2, 1);
    }
}

#[test]
fn linux_s_list_is_fetched_and_copied_in_order_through_the_smmu() {
    let board = Board::new();
    let domain = board.stage1();
    board.system.core().attach_device(board.device(FPD), &domain).unwrap();
    // The pool far above its memory, to see that descriptor addresses are translated as well.
    let pool = (0xff_fff0_0000, RAM + 0xf_0000);
    domain.map(Iova(pool.0), Pa(pool.1), 0x1000, Prot::READ.noexec()).unwrap();
    map(&domain, IN, RAM, 0x2_0000);
    let mut linux = Linux { board: &board, pool, pending: Vec::new(), next: 0 };
    linux.init();
    let copies = [(0x1_0000u64, 0x100u64, 0x80u32), (0x1_1003, 0x2201, 0x1234), (0x1_4000, 0x8000, 0x1000)];
    for (i, (to, from, len)) in (1u8..).zip(copies) {
        board.put(RAM + from, &vec![i; len as usize]);
        linux.submit(IN + to, IN + from, len);
    }
    transactions(&board);
    linux.start();
    board.machine().run(1000).unwrap();

    let mut expected = Vec::new();
    for (i, (to, from, len)) in (0..).zip(copies) {
        for list in [0, 32] {
            // A linked descriptor takes two reads of 16 bytes.
            let at = pool.0 + i * 64 + list;
            expected.extend([(Access::Read, at, 16), (Access::Read, at + 16, 16)]);
        }
        expected.extend([(Access::Read, IN + from, len as usize), (Access::Write, IN + to, len as usize)]);
    }
    assert_eq!(transactions(&board), expected);
    for (i, (to, _, len)) in (1u8..).zip(copies) {
        assert_eq!(board.get(RAM + to, len as usize), vec![i; len as usize]);
    }
    // One count per transaction, and the end of the run once and last.
    let isr = linux.read(reg::ISR);
    assert_eq!(isr & !interrupt::SRC_DSCR_DONE, interrupt::DMA_DONE | interrupt::DST_DSCR_DONE);
    assert_eq!(linux.read(reg::IRQ_DST_ACCT), 3);
    assert_eq!(linux.read(reg::TOTAL_BYTE), copies.iter().map(|c| c.2).sum::<u32>());
    assert_eq!((linux.read(reg::STATUS), linux.read(reg::CTRL2)), (0, 0));
    board.no_faults();
}

#[test]
fn linux_sees_done_and_one_error_bit_when_the_smmu_refuses() {
    let (pool, data) = (0x10_0000u64, IN);
    // What is missing, and the bit for it.
    let cases = [
        ("source descriptor", pool, interrupt::AXI_RD_SRC_DSCR),
        ("source", data, interrupt::AXI_RD_DATA),
        ("destination", data + 0x1000, interrupt::AXI_WR_DATA),
    ];
    for (what, missing, bit) in cases {
        let board = Board::new();
        let domain = board.stage1();
        board.system.core().attach_device(board.device(FPD), &domain).unwrap();
        for (iova, pa) in [(pool, RAM + 0x8000), (data, RAM), (data + 0x1000, RAM + 0x1000)] {
            if iova != missing {
                map(&domain, iova, pa, 0x1000);
            }
        }
        let mut linux = Linux { board: &board, pool: (pool, RAM + 0x8000), pending: Vec::new(), next: 0 };
        linux.init();
        linux.submit(data + 0x1000, data, 0x40);
        linux.start();
        board.machine().run(1000).unwrap();
        let isr = linux.read(reg::ISR);
        assert_eq!(isr & !interrupt::SRC_DSCR_DONE, bit | interrupt::DMA_DONE, "{what}");
        assert_eq!((linux.read(reg::STATUS), linux.read(reg::CTRL2)), (3, 0), "{what}");
        assert_eq!((linux.read(reg::IRQ_DST_ACCT), linux.read(reg::TOTAL_BYTE)), (0, 0), "{what}");
        board.system.take_interrupts();
        let fault = board.fault();
        assert_eq!((fault.report.reason, fault.report.iova.get()), (FaultReason::Translation, missing));
    }
}

/// Three transactions queued at once; the middle one is refused.
fn three_with_a_bad_one(break_it: impl Fn(&Board, &portcullis_iommu::Domain)) -> (Board, [Completion; 3]) {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x4000);
    map(&domain, IN + 0x8000, RAM + 0x8000, 0x4000);
    break_it(&board, &domain);
    let driver = &board.channel(FPD).driver;
    let cookies = [0u64, 1, 2].map(|i| {
        board.put(RAM + i * 0x1000, &[i as u8 + 1; 0x1000]);
        let (to, from) = (Iova(IN + 0x8000 + i * 0x1000), Iova(IN + i * 0x1000));
        driver.submit_memcpy(to, from, 0x1000).unwrap()
    });
    driver.issue_pending();
    board.settle();
    let done = cookies.map(|c| board.completion(FPD, c));
    assert!(driver.is_idle());
    (board, done)
}

#[test]
fn a_refused_transaction_fails_alone_and_the_next_one_runs() {
    for (missing, kind) in
        [(IN + 0x1000, BusErrorKind::SourceRead), (IN + 0x9000, BusErrorKind::DestinationWrite)]
    {
        let (board, done) = three_with_a_bad_one(|_, domain| {
            domain.unmap(Iova(missing), 0x1000).unwrap();
        });
        let result = |i: usize| (done[i].result.is_ok(), done[i].transferred);
        assert_eq!((result(0), result(2)), ((true, 0x1000), (true, 0x1000)), "{done:?}");
        let Err(TransferError::Bus { kind: seen, position }) = done[1].result else { panic!("{done:?}") };
        assert_eq!((seen, done[1].transferred, done[1].residue), (kind, 0, 0x1000));
        assert_eq!(position.destination, Iova(IN + 0x9000));
        assert_eq!(board.fault().report.iova, Iova(missing));
        for (i, expected) in [(0, 1), (1, 0), (2, 3)] {
            assert_eq!(board.get(RAM + 0x8000 + i * 0x1000, 0x1000), vec![expected; 0x1000]);
        }
    }
}

#[test]
fn without_its_descriptors_a_channel_fails_everything_one_by_one() {
    let (board, done) = three_with_a_bad_one(|board, domain| {
        let pool = board.channel(FPD).driver.pool();
        domain.unmap(pool.iova, 0x1000).unwrap();
    });
    for c in &done {
        let Err(TransferError::Bus { kind: BusErrorKind::SourceDescriptor, .. }) = c.result else {
            panic!("{c:?}")
        };
        assert_eq!((c.transferred, c.residue), (0, 0x1000));
    }
    assert_eq!(board.faults().len(), 3);
}

#[test]
fn a_destination_list_on_a_page_that_is_missing_is_told_apart() {
    let board = Board::new();
    let domain = board.stage1();
    board.system.core().attach_device(board.device(FPD), &domain).unwrap();
    map(&domain, IN, RAM, 0x2000);
    // The pool's first source descriptor at the end of one page, its destination on the next: not as our driver lays
    // it out, but as the hardware allows.
    map(&domain, 0x10_0000, RAM + 0x8000, 0x1000);
    let linux = Linux { board: &board, pool: (0x10_0fe0, RAM + 0x8fe0), pending: Vec::new(), next: 0 };
    let mut linux = linux;
    linux.init();
    linux.submit(IN + 0x1000, IN, 0x40);
    linux.start();
    board.machine().run(1000).unwrap();
    let isr = linux.read(reg::ISR);
    assert_eq!(isr & interrupt::AXI_ERRORS, interrupt::AXI_RD_DST_DSCR);
    board.system.take_interrupts();
    assert_eq!(board.fault().report.iova, Iova(0x10_1000));
}

#[test]
fn terminating_a_running_channel_stops_it_and_what_it_moved_is_known() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    // Long segments: the engine moves 64 KiB in a step.
    map(&domain, IN, 0x4000_0000, 0x100_0000);
    map(&domain, IN + 0x100_0000, 0x5000_0000, 0x100_0000);
    board.put(0x4000_0000, &vec![0x5a; 0x100_0000]);
    let driver = &board.channel(FPD).driver;
    let part = 0x20_0000;
    let segments = |at: u64| [0u64, 1, 2, 3].map(|i| segment(at + i * part, part));
    let running = driver.submit_sg(&segments(IN + 0x100_0000), &segments(IN)).unwrap();
    let queued = driver.submit_memcpy(Iova(IN), Iova(IN + 0x1000), 0x1000).unwrap();
    driver.issue_pending();
    for _ in 0..5 {
        assert!(board.machine().step());
    }
    assert!(matches!(driver.progress(running), Progress::Running { .. }));
    assert_eq!(driver.terminate(&board.machine().clock(), 1_000_000), Ok(2));
    let done = board.completion(FPD, running);
    assert_eq!(done.result, Err(TransferError::Terminated));
    assert!(done.transferred >= 0x1_0000 && done.transferred < 4 * part, "{done:?}");
    let moved = done.transferred as usize;
    assert_eq!(board.completion(FPD, queued).result, Err(TransferError::Terminated));
    let seen = board.get(0x5000_0000, 4 * part as usize);
    assert!(seen[..moved].iter().all(|b| *b == 0x5a) && seen[moved..].iter().all(|b| *b == 0), "{done:?}");
    // It is over: nothing moves any more, and the memory can be reused.
    board.settle();
    assert!(board.get(0x5000_0000, 4 * part as usize) == seen);
    domain.unmap(Iova(IN + 0x100_0000), 0x100_0000).unwrap();
    board.settle();
    board.no_faults();
    map(&domain, IN + 0x100_0000, RAM, 0x1000);
    board.works(FPD, (IN + 0x100_0000, RAM), (IN, 0x4000_0000), 0x1000);
}

#[test]
fn taking_the_mapping_away_from_a_running_channel_ends_it_with_an_error_and_nothing_else() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, 0x4000_0000, 0x80_0000);
    map(&domain, IN + 0x100_0000, 0x5000_0000, 0x80_0000);
    board.put(0x4000_0000, &vec![0x5a; 0x80_0000]);
    let cookie = board.start(FPD, IN + 0x100_0000, IN, 0x80_0000);
    for _ in 0..20 {
        assert!(board.machine().step());
    }
    domain.unmap(Iova(IN + 0x100_0000), 0x80_0000).unwrap();
    // The memory has a new owner.
    board.put(0x5000_0000, &vec![0x77; 0x80_0000]);
    board.settle();
    let done = board.completion(FPD, cookie);
    let Err(TransferError::Bus { kind: BusErrorKind::DestinationWrite, .. }) = done.result else {
        panic!("{done:?}")
    };
    assert!(done.transferred > 0 && done.residue > 0);
    assert!(board.get(0x5000_0000, 0x80_0000).iter().all(|b| *b == 0x77));
    assert_eq!(board.fault().report.iova, Iova(IN + 0x100_0000 + done.transferred));
}

#[test]
fn a_mapping_that_leads_nowhere_is_a_bus_error_without_an_smmu_fault() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x1000);
    map(&domain, IN + 0x1000, 0xa000_0000, 0x1000);
    let done = board.copy(FPD, IN + 0x1000, IN, 0x100);
    let Err(TransferError::Bus { kind: BusErrorKind::DestinationWrite, .. }) = done.result else {
        panic!("{done:?}")
    };
    board.no_faults();
    // Half of it reaches memory.
    let done = board.copy(FPD, IN + 0x800, IN, 0x1000);
    assert_eq!((done.transferred, done.residue, done.result.is_err()), (0x800, 0x800, true));
    board.no_faults();
}

#[test]
fn waiting_without_interrupts_works_behind_the_smmu() {
    let board = Board::new();
    let domain = board.domain_for(FPD);
    map(&domain, IN, RAM, 0x4000);
    board.put(RAM, &[9; 0x1000]);
    let (driver, clock) = (&board.channel(FPD).driver, board.machine().clock());
    let cookie = board.start(FPD, IN + 0x1000, IN, 0x1000);
    assert_eq!(driver.wait(cookie, &clock, 10_000).unwrap().result, Ok(()));
    assert_eq!(board.get(RAM + 0x1000, 0x1000), vec![9; 0x1000]);
    let cookie = board.start(FPD, IN + 0x4000, IN, 0x1000);
    assert!(driver.wait(cookie, &clock, 10_000).unwrap().result.is_err());
}
