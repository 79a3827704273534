//! The driver against Linux's register sequences, and against a channel that runs lists from memory.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_arch::zdma::{Command, Descriptor};
use portcullis_hal::Block;
use portcullis_hal::fake::{FakeClock, FakeMemory, FakeMmio, MmioAccess, Registers};

use super::*;

const POOL_IOVA: u64 = 0x7f00_0000;

type Channel = Zdma<Arc<FakeMmio>, Arc<FakeMemory>>;

struct Rig {
    channel: Channel,
    mmio: Arc<FakeMmio>,
    memory: Arc<FakeMemory>,
    pool: DescriptorPool,
}

/// What the registers do by themselves.
fn behave(registers: &mut Registers, access: MmioAccess) -> Option<u64> {
    let value = access.value;
    match (access.write, access.offset as u32) {
        (true, reg::ISR) => Some(u64::from(registers.get32(access.offset)) & !value),
        (true, reg::IEN) => {
            registers.set32(reg::IMR as usize, registers.get32(reg::IMR as usize) & !(value as u32));
            Some(0)
        }
        (true, reg::IDS) => {
            registers.set32(reg::IMR as usize, registers.get32(reg::IMR as usize) | value as u32);
            Some(0)
        }
        (true, reg::TOTAL_BYTE) => Some(0),
        (true, reg::CTRL2) if value == 1 => {
            registers.set32(reg::STATUS as usize, ChannelState::Busy as u32);
            None
        }
        (false, reg::IRQ_SRC_ACCT | reg::IRQ_DST_ACCT) => {
            registers.set32(access.offset, 0);
            Some(value)
        }
        _ => None,
    }
}

fn rig_with(config: Config, memory: FakeMemory) -> Rig {
    let mmio = Arc::new(FakeMmio::with_handler(behave));
    mmio.set32(reg::IMR as usize, 0xfff);
    mmio.set32(reg::CTRL0 as usize, 0x80);
    mmio.set32(reg::DATA_ATTR as usize, 0x0483_d20f);
    let memory = Arc::new(memory);
    let block = memory.alloc(POOL_BYTES, 64).unwrap();
    let pool = DescriptorPool { block, iova: Iova(POOL_IOVA) };
    let channel = Zdma::new(mmio.clone(), memory.clone(), pool, config).unwrap();
    Rig { channel, mmio, memory, pool }
}

fn rig() -> Rig {
    let rig = rig_with(Config::default(), FakeMemory::plain(0x1000_0000, 1 << 16));
    rig.mmio.take_log();
    rig
}

impl Rig {
    /// A linked descriptor at the channel's address.
    fn descriptor(&self, at: u64) -> Descriptor {
        let pa = self.pool.block.pa.wrapping_add(at - POOL_IOVA);
        Descriptor::from_words([0, 8, 16, 24].map(|i| self.memory.device_load64(pa.wrapping_add(i))))
    }

    /// The list that *_START points to, as (source, destination, bytes, interrupt), up to STOP.
    fn list(&self) -> Vec<(u64, u64, u32, bool)> {
        let mut source = self.mmio.get64(reg::SRC_START_LSB as usize);
        let mut destination = self.mmio.get64(reg::DST_START_LSB as usize);
        let mut list = vec![];
        loop {
            let (s, d) = (self.descriptor(source), self.descriptor(destination));
            assert!(s.control.linked() && d.control.linked());
            assert_eq!((s.size, s.control.intr()), (d.size, false));
            list.push((s.address, d.address, s.size, d.control.intr()));
            if s.control.command() == Command::Stop {
                return list;
            }
            assert_eq!(s.control.command(), Command::Next);
            (source, destination) = (s.next, d.next);
        }
    }

    /// The channel reports `isr`, with `counted` transactions and `bytes` written.
    fn report(&self, isr: u32, state: ChannelState, counted: u32, bytes: u32) {
        self.mmio.set32(reg::ISR as usize, isr);
        self.mmio.set32(reg::STATUS as usize, state as u32);
        self.mmio.set32(reg::IRQ_DST_ACCT as usize, counted);
        self.mmio.set32(reg::TOTAL_BYTE as usize, bytes);
    }
}

const DONE: u32 = interrupt::DMA_DONE | interrupt::DST_DSCR_DONE;

#[test]
fn probe_does_what_linux_does() {
    let expected_reads = [reg::ISR, reg::DATA_ATTR, reg::IRQ_SRC_ACCT, reg::IRQ_DST_ACCT];
    for coherent in [false, true] {
        let rig = rig_with(Config { coherent }, FakeMemory::plain(0x1000_0000, 1 << 16));
        let log = rig.mmio.take_log();
        let reads: Vec<u32> = log.iter().filter(|a| !a.write).map(|a| a.offset as u32).collect();
        assert_eq!(reads, expected_reads);
        let writes: Vec<_> = log.iter().filter(|a| a.write).map(|a| (a.offset as u32, a.value)).collect();
        let expected = if coherent {
            vec![(reg::IDS, 0xfff), (reg::ISR, 0), (reg::DSCR_ATTR, 0x1f0), (reg::DATA_ATTR, 0x07c3_df0f)]
        } else {
            vec![(reg::IDS, 0xfff), (reg::ISR, 0), (reg::DATA_ATTR, 0x0483_d20f)]
        };
        assert_eq!(writes, expected);
    }
}

#[test]
fn starting_does_what_linux_does() {
    let rig = rig();
    rig.channel.issue_pending();
    assert!(rig.mmio.take_log().is_empty(), "nothing to start");
    rig.channel.submit_memcpy(Iova(0x6000_2000), Iova(0x6000_0000), 0x1000).unwrap();
    assert!(rig.mmio.take_log().is_empty(), "not before issue_pending");
    rig.channel.issue_pending();
    let expected = [
        (reg::CTRL0, 0xc0),
        (reg::DATA_ATTR, 0x0483_d20f),
        (reg::SRC_START_LSB, POOL_IOVA),
        (reg::SRC_START_MSB, 0),
        (reg::DST_START_LSB, POOL_IOVA + 32),
        (reg::DST_START_MSB, 0),
        (reg::IEN, 0x7fd),
        (reg::TOTAL_BYTE, 0),
        (reg::CTRL2, 1),
    ];
    let expected: Vec<(usize, u64)> = expected.iter().map(|(offset, v)| (*offset as usize, *v)).collect();
    assert_eq!(rig.mmio.take_writes(), expected);
    assert_eq!(rig.list(), [(0x6000_0000, 0x6000_2000, 0x1000, true)]);
    let (source, destination) = (rig.descriptor(POOL_IOVA), rig.descriptor(POOL_IOVA + 32));
    assert_eq!((source.control.into_bits(), destination.control.into_bits()), (0x12, 0x16));
}

#[test]
fn pending_transactions_form_one_list_and_complete_one_by_one() {
    let rig = rig();
    let cookies = [1, 2, 3].map(|n| rig.channel.submit_memcpy(Iova(n << 20), Iova(n << 12), 0x100).unwrap());
    rig.channel.issue_pending();
    let expected =
        [(1 << 12, 1 << 20, 0x100, true), (2 << 12, 2 << 20, 0x100, true), (3 << 12, 3 << 20, 0x100, true)];
    assert_eq!(rig.list(), expected);
    rig.report(interrupt::DST_DSCR_DONE, ChannelState::Busy, 2, 0x240);
    assert_eq!(rig.channel.progress(cookies[2]), Progress::Running { residue: 0x100 - 0x40 });
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 2);
    assert_eq!(rig.channel.progress(cookies[2]), Progress::Running { residue: 0x100 - 0x40 });
    let ok = |cookie| Completion { cookie, result: Ok(()), transferred: 0x100, residue: 0 };
    assert_eq!(rig.channel.take_completions(), [ok(cookies[0]), ok(cookies[1])]);
    rig.report(DONE, ChannelState::Done, 1, 0x300);
    assert_eq!(rig.channel.handle_irq(), Some(Interrupt { status: DONE, completed: 1 }));
    assert_eq!(rig.channel.take_completion(cookies[2]), Some(ok(cookies[2])));
    assert_eq!(rig.channel.progress(cookies[2]), Progress::Unknown);
    assert!(rig.channel.is_idle());
    assert_eq!(rig.channel.handle_irq(), None, "somebody else's interrupt");
}

#[test]
fn what_is_issued_meanwhile_starts_when_the_run_is_over() {
    let rig = rig();
    rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    let second = rig.channel.submit_memcpy(Iova(0x4000), Iova(0x3000), 0x100).unwrap();
    rig.channel.issue_pending();
    assert_eq!(rig.channel.progress(second), Progress::Queued);
    assert_eq!(rig.list().len(), 1, "a running list is never touched");
    rig.report(DONE, ChannelState::Done, 1, 0x100);
    rig.channel.handle_irq();
    assert_eq!(rig.list(), [(0x3000, 0x4000, 0x100, true)]);
    assert_eq!(rig.channel.channel_state(), ChannelState::Busy);
}

#[test]
fn lists_are_cut_at_the_boundaries_of_both_sides_and_below_the_size_field() {
    let rig = rig();
    let segment = |address, len| Segment { address: Iova(address), len };
    rig.channel
        .submit_sg(&[segment(0x9000, 0x300)], &[segment(0x1001, 0x100), segment(0x2003, 0x200)])
        .unwrap();
    rig.channel.submit_memcpy(Iova(0x8000_0000), Iova(0x4000_0000), 0x4000_0000).unwrap();
    rig.channel.issue_pending();
    let expected = [
        (0x1001, 0x9000, 0x100, false),
        (0x2003, 0x9100, 0x200, true),
        (0x4000_0000, 0x8000_0000, 0x3fff_f000, false),
        (0x7fff_f000, 0xbfff_f000, 0x1000, true),
    ];
    assert_eq!(rig.list(), expected);
}

#[test]
fn what_no_descriptor_can_express_is_refused() {
    let rig = rig();
    let memcpy = |to, from, len| rig.channel.submit_memcpy(Iova(to), Iova(from), len).unwrap_err();
    assert_eq!(memcpy(0, 0, 0), ZdmaError::Empty);
    assert!(matches!(memcpy(0, 1 << 44, 1), ZdmaError::AddressRange { .. }));
    assert!(matches!(memcpy(u64::MAX, 0, 2), ZdmaError::AddressRange { .. }));
    let simple = rig.channel.start_simple(Iova(1 << 49), Iova(0), 1).unwrap_err();
    assert_eq!(simple.to_string(), "0x2000000000000+0x1 does not fit into 49 address bits");
    assert_eq!(memcpy(0, 0, 33 << 30), ZdmaError::TooManyDescriptors { needed: 33 });
    let one = Segment { address: Iova(0), len: 1 };
    let error = rig.channel.submit_sg(&[one, one], &[one]).unwrap_err();
    assert_eq!(error.to_string(), "the source has 1 bytes and the destination 2");
    assert_eq!(rig.channel.submit_sg(&[], &[]).unwrap_err(), ZdmaError::Empty);
}

#[test]
fn descriptors_run_out_and_come_back() {
    let rig = rig();
    for _ in 0..32 {
        rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 1).unwrap();
    }
    let error = rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 1).unwrap_err();
    assert_eq!(error, ZdmaError::PoolEmpty { needed: 1, free: 0 });
    rig.channel.issue_pending();
    rig.report(DONE, ChannelState::Done, 32, 32);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 32);
    rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 32 << 29).unwrap();
}

#[test]
fn a_bus_error_fails_the_transaction_that_met_it_and_the_next_ones_run() {
    let cases = [
        (interrupt::AXI_RD_DATA, BusErrorKind::SourceRead),
        (interrupt::AXI_WR_DATA, BusErrorKind::DestinationWrite),
        (interrupt::AXI_RD_SRC_DSCR, BusErrorKind::SourceDescriptor),
        (interrupt::AXI_RD_DST_DSCR, BusErrorKind::DestinationDescriptor),
    ];
    for (bit, kind) in cases {
        let rig = rig();
        let [first, second, third] =
            [1, 2, 3].map(|n| rig.channel.submit_memcpy(Iova(n << 20), Iova(n << 12), 0x1000).unwrap());
        rig.channel.issue_pending();
        rig.mmio.set32(reg::SRC_CUR_PYLD_LSB as usize, 0x2800);
        rig.mmio.set32(reg::DST_CUR_PYLD_LSB as usize, 0x20_0800);
        rig.report(bit | DONE, ChannelState::Error, 1, 0x1800);
        assert_eq!(rig.channel.handle_irq().unwrap().completed, 2);
        let completions = rig.channel.take_completions();
        assert_eq!((completions[0].cookie, completions[0].result), (first, Ok(())));
        let position = Position { source: Iova(0x2800), destination: Iova(0x20_0800) };
        let expected = Completion {
            cookie: second,
            result: Err(TransferError::Bus { kind, position }),
            transferred: 0x800,
            residue: 0x800,
        };
        assert_eq!(completions[1], expected);
        assert_eq!(rig.list(), [(0x3000, 0x30_0000, 0x1000, true)], "the third is started again");
        rig.report(DONE, ChannelState::Done, 1, 0x1000);
        rig.channel.handle_irq();
        assert_eq!(rig.channel.take_completion(third).unwrap().result, Ok(()));
    }
}

#[test]
fn what_an_error_left_undone_keeps_its_order() {
    let rig = rig();
    for n in 1..=3 {
        rig.channel.submit_memcpy(Iova(n << 20), Iova(n << 12), 0x1000).unwrap();
    }
    rig.channel.issue_pending();
    rig.channel.submit_memcpy(Iova(4 << 20), Iova(4 << 12), 0x1000).unwrap();
    rig.channel.issue_pending();
    rig.report(interrupt::AXI_RD_DATA | DONE, ChannelState::Error, 0, 0);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 1);
    let sources: Vec<u64> = rig.list().iter().map(|entry| entry.0).collect();
    assert_eq!(sources, [2 << 12, 3 << 12, 4 << 12]);
}

#[test]
fn an_error_is_dealt_with_when_the_channel_has_come_to_rest() {
    let rig = rig();
    let cookie = rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    rig.report(interrupt::AXI_RD_DATA, ChannelState::Busy, 0, 0);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 0);
    rig.report(interrupt::DMA_DONE, ChannelState::Error, 0, 0x10);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 1);
    let completion = rig.channel.take_completion(cookie).unwrap();
    assert_eq!((completion.transferred, completion.residue), (0x10, 0xf0));
    let text = completion.result.unwrap_err().to_string();
    assert!(text.starts_with("bus error on the read of source data"), "{text}");
}

#[test]
fn counter_overflows_and_stray_accesses_end_nothing() {
    let rig = rig();
    let cookie = rig.channel.submit_memcpy(Iova(0), Iova(1 << 40), 5 << 30).unwrap();
    rig.channel.issue_pending();
    rig.report(interrupt::BYTE_CNT_OVRFL, ChannelState::Busy, 0, 0x1000);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 0);
    let left = (5 << 30) - (1 << 32) - 0x1000;
    assert_eq!(rig.channel.residue(cookie), Some(left), "TOTAL_BYTE has 32 bits");
    rig.report(interrupt::INV_APB, ChannelState::Busy, 0, 0x1000);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 0);
    rig.report(DONE, ChannelState::Done, 1, 0x4000_0000);
    assert_eq!(rig.channel.handle_irq().unwrap().completed, 1);
}

#[test]
fn a_run_that_ends_without_counting_is_not_taken_for_success() {
    let rig = rig();
    let cookie = rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    rig.report(interrupt::DMA_DONE, ChannelState::Done, 0, 0x80);
    rig.channel.handle_irq();
    let result = rig.channel.take_completion(cookie).unwrap().result;
    assert!(matches!(result, Err(TransferError::Incomplete { .. })));
}

#[test]
fn terminate_cuts_the_list_waits_and_clears_what_is_left() {
    let rig = rig();
    let cookies = [1, 2].map(|n| rig.channel.submit_memcpy(Iova(n << 20), Iova(n << 12), 0x1000).unwrap());
    rig.channel.issue_pending();
    let queued = rig.channel.submit_memcpy(Iova(0x9000), Iova(0x8000), 0x1000).unwrap();
    rig.mmio.take_log();
    // The channel stops at the second look, in the middle of the second transaction.
    let mmio = rig.mmio.clone();
    let clock = FakeClock::with_hook(move |_| {
        mmio.set32(reg::STATUS as usize, ChannelState::Done as u32);
        mmio.set32(reg::ISR as usize, DONE);
        mmio.set32(reg::IRQ_DST_ACCT as usize, 1);
        mmio.set32(reg::TOTAL_BYTE as usize, 0x1400);
    });
    assert_eq!(rig.channel.terminate(&clock, 1000), Ok(3));
    let writes = rig.mmio.take_writes();
    let expected = [(reg::IDS as usize, 0xfff), (reg::CTRL2 as usize, 0)];
    assert_eq!(writes[..2], expected);
    assert!(
        writes.contains(&(reg::ISR as usize, u64::from(DONE))),
        "old status would complete new transfers"
    );
    for slot in 0..2 {
        let source = rig.descriptor(POOL_IOVA + slot * 64);
        assert_eq!((source.control.command(), source.size), (Command::Stop, 1));
    }
    let completions = rig.channel.take_completions();
    let results: Vec<_> = completions.iter().map(|c| (c.cookie, c.result, c.residue)).collect();
    let terminated = Err(TransferError::Terminated);
    let expected = [(cookies[0], Ok(()), 0), (cookies[1], terminated, 0xc00), (queued, terminated, 0x1000)];
    assert_eq!(results, expected);
    assert_eq!(rig.mmio.get32(reg::IRQ_DST_ACCT as usize), 0);
    // And the channel is as new.
    let cookie = rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x10).unwrap();
    rig.channel.issue_pending();
    rig.report(DONE, ChannelState::Done, 1, 0x10);
    assert_eq!(rig.channel.wait(cookie, &clock, 10).unwrap().result, Ok(()));
}

#[test]
fn a_channel_that_does_not_stop_stays_unusable_until_it_does() {
    let rig = rig();
    rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    let clock = FakeClock::new();
    let error = rig.channel.terminate(&clock, 200).unwrap_err();
    assert!(error.to_string().contains("waiting for ZDMA STATUS.STATE != busy"), "{error}");
    rig.channel.submit_memcpy(Iova(0x4000), Iova(0x3000), 0x100).unwrap();
    rig.mmio.take_log();
    rig.channel.issue_pending();
    assert!(rig.mmio.take_writes().is_empty());
    assert_eq!(rig.channel.start_simple(Iova(0), Iova(0x100), 4), Err(ZdmaError::Busy));
    rig.mmio.set32(reg::STATUS as usize, ChannelState::Done as u32);
    assert_eq!(rig.channel.terminate(&clock, 200), Ok(2));
    assert!(rig.channel.is_idle());
}

#[test]
fn waiting_is_bounded() {
    let rig = rig();
    let cookie = rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    let clock = FakeClock::new();
    let Err(ZdmaError::Timeout { timeout, status, .. }) = rig.channel.wait(cookie, &clock, 3000) else {
        panic!("it cannot have ended")
    };
    assert!(timeout.waited_us >= 3000);
    assert_eq!(status, ChannelState::Busy as u32);
    assert_eq!(
        rig.channel.wait(Cookie(99), &clock, 10),
        Err(ZdmaError::UnknownCookie { cookie: Cookie(99) })
    );
}

#[test]
fn simple_mode_uses_the_registers() {
    let rig = rig();
    let cookie = rig.channel.start_simple(Iova(0x1_6000_2000), Iova(0x6000_0000), 0x20).unwrap();
    let expected = [
        (reg::CTRL0, 0x80),
        (reg::SRC_DSCR_WORD0, 0x6000_0000),
        (reg::SRC_DSCR_WORD1, 0),
        (reg::SRC_DSCR_WORD2, 0x20),
        (reg::SRC_DSCR_WORD3, 0),
        (reg::DST_DSCR_WORD0, 0x6000_2000),
        (reg::DST_DSCR_WORD1, 1),
        (reg::DST_DSCR_WORD2, 0x20),
        (reg::DST_DSCR_WORD3, 0),
        (reg::IEN, 0x7fd),
        (reg::TOTAL_BYTE, 0),
        (reg::CTRL2, 1),
    ];
    let expected: Vec<(usize, u64)> = expected.iter().map(|(offset, v)| (*offset as usize, *v)).collect();
    assert_eq!(rig.mmio.take_writes(), expected);
    assert_eq!(rig.channel.start_simple(Iova(0), Iova(0x100), 4), Err(ZdmaError::Busy));
    rig.report(interrupt::DMA_DONE, ChannelState::Done, 0, 0x20);
    rig.channel.handle_irq();
    assert_eq!(rig.channel.take_completion(cookie).unwrap().result, Ok(()));
    let too_long = rig.channel.start_simple(Iova(0), Iova(1 << 32), 0x4000_0000);
    assert_eq!(too_long, Err(ZdmaError::TooLong { len: 0x4000_0000 }));
}

#[test]
fn descriptors_reach_an_engine_that_does_not_snoop() {
    let memory = FakeMemory::non_coherent(0x1000_0000, 1 << 16);
    let rig = rig_with(Config::default(), memory);
    rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 0x100).unwrap();
    rig.channel.issue_pending();
    // `list` reads as the engine does.
    assert_eq!(rig.list(), [(0x1000, 0x2000, 0x100, true)]);
}

#[test]
fn a_pool_that_does_not_do_is_refused_and_a_good_one_comes_back() {
    let mmio = Arc::new(FakeMmio::new());
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 1 << 16));
    let pool = |pa, len, iova| DescriptorPool { block: Block { pa: Pa(pa), len }, iova: Iova(iova) };
    for bad in [pool(0x1000_0000, 2047, 0), pool(0x1000_0020, 2048, 0), pool(0x1000_0000, 2048, 32)] {
        let error = Zdma::new(mmio.clone(), memory.clone(), bad, Config::default()).unwrap_err();
        assert_eq!(error, ZdmaError::Pool { pool: bad });
    }
    let rig = rig();
    rig.channel.submit_memcpy(Iova(0x2000), Iova(0x1000), 1).unwrap();
    rig.channel.issue_pending();
    let channel = rig.channel.release().unwrap_err();
    rig.mmio.set32(reg::STATUS as usize, 0);
    channel.terminate(&FakeClock::new(), 10).unwrap();
    rig.memory.free(channel.release().unwrap().block);
    rig.memory.assert_clean();
}

/// Registers that read as anything: whatever the channel says, the driver answers or goes on.
#[test]
fn no_register_value_makes_the_driver_panic_or_hang() {
    for seed in 0..500u64 {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mmio = Arc::new(FakeMmio::with_handler(move |_, access| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (!access.write).then_some(random & 0xffff_ffff)
        }));
        let memory = Arc::new(FakeMemory::plain(0x1000_0000, 1 << 16));
        let block = memory.alloc(POOL_BYTES, 64).unwrap();
        let pool = DescriptorPool { block, iova: Iova(POOL_IOVA) };
        let channel = Zdma::new(mmio, memory.clone(), pool, Config::default()).unwrap();
        let clock = FakeClock::new();
        let mut submitted = 0;
        let mut ended = 0;
        for round in 0..20 {
            submitted += usize::from(channel.submit_memcpy(Iova(0x10_0000), Iova(round), 1 << 31).is_ok());
            channel.issue_pending();
            channel.handle_irq();
            if let Ok(cookie) = channel.start_simple(Iova(0), Iova(0x100), 4) {
                submitted += 1;
                ended += usize::from(channel.wait(cookie, &clock, 5).is_ok());
            }
            let _it_may_time_out = channel.terminate(&clock, 2);
            ended += channel.take_completions().len();
        }
        assert!(ended <= submitted);
        if channel.terminate(&clock, 100).is_ok() {
            ended += channel.take_completions().len();
            assert_eq!(ended, submitted, "each transaction ends exactly once");
        }
    }
}

#[test]
fn behind_the_common_interface_transactions_call_back_and_report_what_was_wrong() {
    use crate::dmaengine::{BusAccess, BusResponse, ChannelError, DmaChannel, State, TransferError};
    let Rig { channel, mmio, .. } = rig();
    let clock = Arc::new(FakeClock::new());
    let channel = ZdmaChannel::new("zdma0", Arc::new(channel), clock);
    let seen = Arc::new(Mutex::new(vec![]));
    let copy = |from| {
        let seen = seen.clone();
        let descriptor = channel.prep_memcpy(Iova(0x2000), Iova(from), 0x100).unwrap();
        let callback = move |ended: &crate::dmaengine::Completion| seen.lock().push(*ended);
        channel.submit(descriptor, Some(alloc::boxed::Box::new(callback))).unwrap()
    };
    let (good, bad) = (copy(0x1000), copy(0x8000));
    assert_eq!(channel.status(bad).state, State::Queued);
    channel.issue_pending();
    mmio.set32(reg::TOTAL_BYTE as usize, 0x140);
    let status = channel.status(bad);
    assert_eq!((status.state, status.transferred, status.residue), (State::Running, 0x40, 0xc0));
    mmio.set32(reg::ISR as usize, interrupt::AXI_RD_DATA | DONE);
    mmio.set32(reg::IRQ_DST_ACCT as usize, 1);
    mmio.set32(reg::SRC_CUR_PYLD_LSB as usize, 0x8040);
    assert!(channel.handle_irq());
    let error =
        TransferError::Bus { access: BusAccess::Read, response: BusResponse::Unknown, at: Iova(0x8040) };
    let results: Vec<_> = seen.lock().iter().map(|ended| (ended.cookie, ended.result)).collect();
    assert_eq!(results, [(good, Ok(())), (bad, Err(error))]);
    assert_eq!(channel.status(good).state, State::Complete);
    assert_eq!(channel.status(bad).state, State::Failed(error));
    assert!(!channel.handle_irq());
    assert!(matches!(channel.pause(), Err(ChannelError::Unsupported { .. })));
    let direction = crate::dmaengine::Direction::MemToDev;
    assert!(channel.prep_slave_sg(&[Segment { address: Iova(0), len: 4 }], direction).is_err());
    let last = copy(0x1000);
    assert_eq!(channel.terminate(), Ok(1));
    assert_eq!(channel.status(last).state, State::Failed(TransferError::Terminated));
}
