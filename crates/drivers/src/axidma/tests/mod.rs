//! The driver against Linux's register sequences, and against a small core that runs descriptors from memory.

mod fake;
mod faults;
mod terminate;

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::axidma::{Descriptor as Bd, MM2S, S2MM, reg};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::fake::{FakeClock, FakeMemory};
use spin::Mutex;

use self::fake::{FakeCore, OFFSET};
use super::*;
use crate::dmaengine::{
    Callback, ChannelError, Completion, Cookie, DmaChannel, Segment, State, TransferError, wait,
};

type Dma = AxiDma<Arc<FakeCore>, Arc<FakeMemory>, Arc<FakeClock>>;
const TX: Direction = Direction::MemToDev;
const RX: Direction = Direction::DevToMem;
const DESCRIPTORS: usize = 8;

struct Rig {
    dma: Dma,
    core: Arc<FakeCore>,
    memory: Arc<FakeMemory>,
    clock: Arc<FakeClock>,
    ended: Arc<Mutex<Vec<(Direction, Completion)>>>,
}

struct Build {
    memory: FakeMemory,
    sg: bool,
    config: Config,
    channel: ChannelConfig,
}

impl Default for Build {
    fn default() -> Self {
        let config = Config { address_bits: 40, length_bits: 8, ..Config::default() };
        let channel = ChannelConfig { data_width: 32, ..ChannelConfig::default() };
        Self { memory: FakeMemory::plain(0x1000_0000, 1 << 20), sg: true, config, channel }
    }
}

fn rig() -> Rig {
    build(Build::default())
}

fn build(build: Build) -> Rig {
    let Build { memory, sg, mut config, channel } = build;
    let memory = Arc::new(memory);
    let core = Arc::new(FakeCore::new(memory.clone(), sg, config.address_bits > 32));
    let pool = || {
        let block = memory.alloc(pool_bytes(DESCRIPTORS), 64).unwrap();
        DescriptorPool { block, iova: Iova(block.pa.get() + OFFSET) }
    };
    config.mm2s = Some(ChannelConfig { pool: Some(pool()), ..channel });
    config.s2mm = Some(ChannelConfig { pool: Some(pool()), ..channel });
    let device = core.clone();
    let clock = Arc::new(FakeClock::with_hook(move |_| device.work()));
    let dma = AxiDma::new("dma@a0000000", core.clone(), memory.clone(), clock.clone(), config).unwrap();
    Rig { dma, core, memory, clock, ended: Arc::default() }
}

impl Rig {
    fn tx(&self) -> &dyn DmaChannel {
        &**self.dma.channel(TX).unwrap()
    }
    fn rx(&self) -> &dyn DmaChannel {
        &**self.dma.channel(RX).unwrap()
    }

    /// A buffer, as the engine and as the CPU addresses it.
    fn buffer(&self, len: usize, fill: u8) -> (Segment, Pa) {
        let block = self.memory.alloc(len, 64).unwrap();
        self.memory.write(block.pa, &vec![fill; len]);
        self.memory.clean(block.pa, len);
        self.memory.wmb();
        (Segment { address: Iova(block.pa.get() + OFFSET), len: len as u64 }, block.pa)
    }

    fn read(&self, pa: Pa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.invalidate(pa, len);
        self.memory.read(pa, &mut bytes);
        bytes
    }

    fn callback(&self, direction: Direction) -> Callback {
        let ended = self.ended.clone();
        Box::new(move |completion| ended.lock().push((direction, *completion)))
    }

    fn submit(&self, direction: Direction, segments: &[Segment]) -> Cookie {
        let channel = self.dma.channel(direction).unwrap();
        let descriptor = channel.prep_slave_sg(segments, direction).unwrap();
        channel.submit(descriptor, Some(self.callback(direction))).unwrap()
    }

    /// Delivers interrupts while there are any.
    fn interrupts(&self) {
        for _ in 0..100 {
            let [tx, rx] = self.core.lines();
            if tx {
                assert!(self.tx().handle_irq());
            }
            if rx {
                assert!(self.rx().handle_irq());
            }
            if !tx && !rx {
                return;
            }
            self.core.work();
        }
        panic!("an interrupt that nobody silences");
    }

    fn run(&self) {
        self.core.work();
        self.interrupts();
    }

    fn ended(&self) -> Vec<(Direction, Cookie, Result<(), TransferError>)> {
        let ended = ::core::mem::take(&mut *self.ended.lock());
        ended.into_iter().map(|(direction, c)| (direction, c.cookie, c.result)).collect()
    }

    fn descriptor(&self, iova: u64) -> Bd {
        let mut bytes = [0; 32];
        self.memory.device_read(Pa(iova - OFFSET), &mut bytes);
        Bd::from_bytes(&bytes)
    }

    fn pool(&self, direction: Direction) -> u64 {
        self.dma.channel(direction).unwrap().pool().unwrap().iova.get()
    }
}

#[test]
fn probe_resets_the_core_once_and_enables_interrupts() {
    let rig = rig();
    assert!(rig.dma.has_scatter_gather());
    let expected = [
        (MM2S + reg::DMACR, 0x0001_0006),
        (MM2S + reg::DMACR, 0x0001_7002),
        (S2MM + reg::DMACR, 0x0001_7002),
    ];
    assert_eq!(rig.core.take_writes(), expected);
    assert!(!rig.tx().handle_irq(), "somebody else's interrupt");
    let caps = rig.tx().caps();
    assert_eq!((caps.direction, caps.align, caps.max_segment, caps.max_segments), (Some(TX), 4, 192, 8));
}

#[test]
fn a_start_writes_curdesc_then_rs_then_the_upper_tail_last() {
    let rig = rig();
    rig.core.take_writes();
    let (segment, _) = rig.buffer(0x40, 1);
    rig.submit(TX, &[segment]);
    rig.submit(TX, &[segment]);
    assert!(rig.core.take_writes().is_empty(), "not before issue_pending");
    rig.tx().issue_pending();
    let pool = rig.pool(TX);
    let (low, high) = (pool as u32, (pool >> 32) as u32);
    let expected = [
        (reg::DMACR, 0x0002_7002),
        (reg::CURDESC, low),
        (reg::CURDESC_MSB, high),
        (reg::DMACR, 0x0002_7003),
        (reg::TAILDESC, low + 0x40),
        (reg::TAILDESC_MSB, high),
    ];
    assert_eq!(rig.core.take_writes(), expected);
    let bd = rig.descriptor(pool);
    assert_eq!((bd.next, bd.buffer), (pool + 0x40, segment.address.get()));
    assert_eq!((bd.control.into_bits(), bd.status.into_bits()), (0x0c00_0040, 0));

    // The running core goes on behind the last descriptor.
    rig.submit(TX, &[segment]);
    rig.tx().issue_pending();
    assert!(rig.core.take_writes().is_empty(), "a running batch is left alone");
    rig.run();
    let expected = [
        (reg::DMASR, 0x1000),
        (reg::DMACR, 0x0001_7003),
        (reg::TAILDESC, low + 0x80),
        (reg::TAILDESC_MSB, high),
        (reg::DMASR, 0x1000),
    ];
    assert_eq!(rig.core.take_writes(), expected);
    assert_eq!(rig.ended().len(), 3);
    assert!(rig.dma.is_idle());
}

#[test]
fn a_core_of_32_bits_gets_no_upper_halves() {
    let memory = Arc::new(FakeMemory::plain(0x1000_0000, 1 << 16));
    let block = memory.alloc(pool_bytes(4), 64).unwrap();
    let core = Arc::new(FakeCore::new(memory.clone(), true, false));
    let pool = Some(DescriptorPool { block, iova: Iova(block.pa.get()) });
    let config = Config { mm2s: Some(ChannelConfig { pool, ..Default::default() }), ..Default::default() };
    let dma = AxiDma::new("dma", core.clone(), memory, Arc::new(FakeClock::new()), config).unwrap();
    core.take_writes();
    let tx = dma.channel(TX).unwrap();
    let segment = Segment { address: Iova(0x1000), len: 4 };
    tx.submit(tx.prep_slave_sg(&[segment], TX).unwrap(), None).unwrap();
    tx.issue_pending();
    let offsets: Vec<u32> = core.take_writes().iter().map(|(offset, _)| *offset).collect();
    assert_eq!(offsets, [reg::DMACR, reg::CURDESC, reg::DMACR, reg::TAILDESC]);
    assert!(dma.channel(RX).is_none());
    let far = Segment { address: Iova(0xffff_fffc), len: 8 };
    assert!(matches!(tx.prep_slave_sg(&[far], TX), Err(ChannelError::AddressRange { bits: 32, .. })));
    let pool = Some(DescriptorPool { block, iova: Iova(1 << 32) });
    let config = Config { mm2s: Some(ChannelConfig { pool, ..Default::default() }), ..Default::default() };
    let memory = Arc::new(FakeMemory::plain(0, 64));
    let error = AxiDma::new("dma", core, memory, Arc::new(FakeClock::new()), config).unwrap_err();
    assert!(matches!(error, AxiDmaError::Pool { channel: TX, .. }));
}

fn loops(rig: &Rig, rounds: usize) {
    for round in 0..rounds {
        let fill = round as u8;
        let ((from, _), (more, _)) = (rig.buffer(500, fill), rig.buffer(64, !fill));
        let (to, pa) = rig.buffer(564, 0x55);
        let received = rig.submit(RX, &[to]);
        rig.rx().issue_pending();
        let sent = rig.submit(TX, &[from, more]);
        rig.tx().issue_pending();
        let status = wait(rig.rx(), received, &rig.clock, 1000).unwrap();
        assert_eq!((status.transferred, status.residue), (564, 0));
        wait(rig.tx(), sent, &rig.clock, 1000).unwrap();
        assert_eq!(rig.read(pa, 564), [vec![fill; 500], vec![!fill; 64]].concat());
        assert_eq!(rig.ended().len(), 2);
    }
    assert!(rig.dma.is_idle());
}

#[test]
fn packets_loop_round_and_round_the_ring_whatever_the_memory_is() {
    loops(&rig(), 20);
    for seed in 0..4 {
        let memory = FakeMemory::non_coherent_reordering(0x1000_0000, 1 << 20, seed);
        loops(&build(Build { memory, ..Build::default() }), 20);
        let memory = FakeMemory::reordering(0x1000_0000, 1 << 20, seed);
        let config = Config { coherent: true, ..Build::default().config };
        loops(&build(Build { memory, config, ..Build::default() }), 20);
    }
    loops(&build(Build { memory: FakeMemory::non_coherent(0x1000_0000, 1 << 20), ..Build::default() }), 20);
}

#[test]
fn segments_are_cut_into_one_packet() {
    let rig = rig();
    let (long, _) = rig.buffer(500, 1);
    let (short, _) = rig.buffer(64, 2);
    rig.submit(TX, &[long, short]);
    rig.tx().issue_pending();
    let bds: Vec<Bd> = (0..4).map(|n| rig.descriptor(rig.pool(TX) + n * 64)).collect();
    let lens: Vec<u32> = bds.iter().map(|bd| bd.control.length()).collect();
    assert_eq!(lens, [192, 192, 116, 64]);
    let flags: Vec<_> = bds.iter().map(|bd| (bd.control.sof(), bd.control.eof())).collect();
    assert_eq!(flags, [(true, false), (false, false), (false, false), (false, true)]);
    assert_eq!(bds[1].buffer, long.address.get() + 192);
    rig.submit(RX, &[long]);
    rig.rx().issue_pending();
    assert_eq!(rig.descriptor(rig.pool(RX)).control.into_bits(), 192, "S2MM has no flags");
}

#[test]
fn a_batch_costs_one_interrupt_and_callbacks_come_in_order() {
    let rig = rig();
    let (segment, _) = rig.buffer(0x40, 1);
    let cookies: Vec<Cookie> = (0..5).map(|_| rig.submit(TX, &[segment])).collect();
    assert_eq!(rig.tx().status(cookies[4]).state, State::Queued);
    rig.tx().issue_pending();
    assert_eq!(rig.tx().status(cookies[4]).state, State::Running);
    rig.run();
    assert_eq!(rig.core.inner.lock().interrupts, [1, 0]);
    let expected: Vec<_> = cookies.iter().map(|cookie| (TX, *cookie, Ok(()))).collect();
    assert_eq!(rig.ended(), expected);
    assert_eq!(rig.tx().status(cookies[0]).state, State::Complete);
    assert_eq!(rig.tx().status(Cookie(99)).state, State::Unknown);
}

#[test]
fn a_short_packet_ends_its_transaction_with_a_residue() {
    let rig = rig();
    let ((from, _), (to, pa)) = (rig.buffer(100, 7), rig.buffer(192, 0));
    let received = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    rig.run();
    let status = rig.rx().status(received);
    assert_eq!((status.state, status.transferred, status.residue), (State::Complete, 100, 92));
    assert_eq!(rig.read(pa, 101), [vec![7; 100], vec![0]].concat());
}

#[test]
fn a_packet_over_two_receive_transactions_ends_both() {
    let rig = rig();
    let (from, _) = rig.buffer(192, 7);
    let (to, _) = rig.buffer(128, 0);
    let cookies = [rig.submit(RX, &[to]), rig.submit(RX, &[to])];
    rig.rx().issue_pending();
    rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    rig.run();
    let moved = cookies.map(|cookie| rig.rx().status(cookie).transferred);
    assert_eq!(moved, [128, 64], "one packet, one interrupt, two transactions");
}

#[test]
fn the_residue_shrinks_with_every_descriptor() {
    let rig = rig();
    let (segment, _) = rig.buffer(500, 1);
    let cookie = rig.submit(TX, &[segment]);
    rig.tx().issue_pending();
    let residue = || rig.tx().status(cookie).residue;
    assert_eq!(residue(), 500);
    rig.core.step(0);
    assert_eq!(residue(), 308);
    rig.core.step(0);
    assert_eq!(rig.tx().status(cookie).transferred, 384);
}

#[test]
fn what_the_channel_cannot_do_is_refused() {
    let rig = rig();
    let tx = |address, len| rig.tx().prep_slave_sg(&[Segment { address: Iova(address), len }], TX);
    assert_eq!(tx(0x1000, 0), Err(ChannelError::Empty));
    assert_eq!(rig.tx().prep_slave_sg(&[], TX), Err(ChannelError::Empty));
    assert_eq!(tx(0x1002, 4), Err(ChannelError::Alignment { address: Iova(0x1002), align: 4 }));
    assert!(matches!(tx(1 << 40, 4), Err(ChannelError::AddressRange { bits: 40, .. })));
    assert!(matches!(tx(u64::MAX - 3, 8), Err(ChannelError::AddressRange { .. })));
    assert!(tx((1 << 40) - 4, 4).is_ok());
    assert_eq!(tx(0x1000, 9 * 192), Err(ChannelError::TooManySegments { needed: 9, max: 8 }));
    assert!(matches!(tx(0x1000, 1 << 38), Err(ChannelError::TooManySegments { .. })));
    let segment = Segment { address: Iova(0x1000), len: 4 };
    let wrong = rig.tx().prep_slave_sg(&[segment], RX);
    assert_eq!(wrong, Err(ChannelError::Direction { asked: RX, channel: TX }));
    assert!(matches!(rig.tx().prep_memcpy(Iova(0), Iova(64), 4), Err(ChannelError::Unsupported { .. })));
    assert!(matches!(rig.tx().pause(), Err(ChannelError::Unsupported { what: "pause" })));
    assert!(rig.tx().prep_cyclic(Iova(0x1000), 256, 64, TX).is_ok());
    let period = rig.tx().prep_cyclic(Iova(0x1000), 256, 100, TX);
    assert_eq!(period, Err(ChannelError::Period { len: 256, period: 100 }));
    // A descriptor of one channel is checked again by the other.
    let foreign = rig.rx().submit(rig.tx().prep_slave_sg(&[segment], TX).unwrap(), None);
    assert_eq!(foreign, Err(ChannelError::Direction { asked: TX, channel: RX }));
    for _ in 0..DESCRIPTORS {
        rig.submit(TX, &[segment]);
    }
    let full = rig.tx().submit(rig.tx().prep_slave_sg(&[segment], TX).unwrap(), None);
    assert_eq!(full, Err(ChannelError::NoDescriptors { needed: 1, free: 0 }));
    assert_eq!(rig.tx().terminate(), Ok(DESCRIPTORS));
    assert!(rig.ended().iter().all(|(.., result)| *result == Err(TransferError::Terminated)));
}

#[test]
fn cores_that_do_not_exist_are_refused() {
    let new = |config| {
        let memory = Arc::new(FakeMemory::plain(0x1000, 0x1000));
        let core = Arc::new(FakeCore::new(memory.clone(), true, true));
        AxiDma::new("dma", core, memory, Arc::new(FakeClock::new()), config).unwrap_err()
    };
    let mm2s = Some(ChannelConfig::default());
    assert_eq!(new(Config::default()), AxiDmaError::NoChannel);
    assert_eq!(new(Config { mm2s, ..Config::default() }), AxiDmaError::NoPool { channel: TX });
    let bits =
        |address_bits, length_bits| new(Config { address_bits, length_bits, mm2s, ..Config::default() });
    assert_eq!(bits(65, 26), AxiDmaError::Parameter { what: "xlnx,addrwidth", value: 65 });
    assert_eq!(bits(32, 27), AxiDmaError::Parameter { what: "xlnx,sg-length-width", value: 27 });
}

#[test]
fn a_cyclic_transfer_calls_back_per_period_until_terminated() {
    let rig = rig();
    let (ring, pa) = rig.buffer(4 * 64, 0);
    for n in 0..4u8 {
        rig.memory.write(pa.wrapping_add(u64::from(n) * 64), &[n + 1; 64]);
    }
    let descriptor = rig.tx().prep_cyclic(ring.address, ring.len, 64, TX).unwrap();
    let cookie = rig.tx().submit(descriptor, Some(rig.callback(TX))).unwrap();
    let (segment, _) = rig.buffer(0x40, 1);
    let refused = rig.tx().submit(rig.tx().prep_slave_sg(&[segment], TX).unwrap(), None);
    assert_eq!(refused, Err(ChannelError::Busy { what: "a cyclic transfer" }));
    rig.core.take_writes();
    rig.tx().issue_pending();
    let pool = rig.pool(TX);
    let writes = rig.core.take_writes();
    assert_eq!(writes[3], (reg::DMACR, 0x0001_7013));
    assert_eq!(writes[4], (reg::TAILDESC, (pool + 64 * DESCRIPTORS as u64) as u32), "off the ring");
    for period in 1..=6 {
        rig.core.step(0);
        assert!(rig.tx().handle_irq());
        assert_eq!(rig.tx().status(cookie).transferred, period * 64);
    }
    assert_eq!(rig.tx().status(cookie).residue, 2 * 64);
    let packets: Vec<u8> = rig.core.inner.lock().stream.iter().map(|(packet, _)| packet[0]).collect();
    assert_eq!(packets, [1, 2, 3, 4, 1, 2], "one packet per period");
    assert!(rig.ended.lock().iter().all(|(_, completion)| completion.ongoing));
    assert_eq!(rig.tx().terminate(), Ok(1));
    let last = rig.ended.lock().pop().unwrap().1;
    assert_eq!(
        (last.ongoing, last.result, last.transferred),
        (false, Err(TransferError::Terminated), 6 * 64)
    );
    rig.core.inner.lock().stream.clear();
    loops(&build(Build::default()), 1);
    rig.ended.lock().clear();
    loops(&rig, 5);
}

#[test]
fn a_callback_may_terminate_its_own_channel() {
    let rig = rig();
    let (ring, _) = rig.buffer(4 * 64, 0);
    let channel = rig.dma.channel(TX).unwrap().clone();
    let ended = rig.ended.clone();
    let callback: Callback = Box::new(move |completion| {
        ended.lock().push((TX, *completion));
        if completion.ongoing {
            channel.terminate().unwrap();
        }
    });
    let descriptor = rig.tx().prep_cyclic(ring.address, ring.len, 64, TX).unwrap();
    let cookie = rig.tx().submit(descriptor, Some(callback)).unwrap();
    rig.tx().issue_pending();
    rig.core.step(0);
    rig.tx().handle_irq();
    assert_eq!(rig.ended(), [(TX, cookie, Ok(())), (TX, cookie, Err(TransferError::Terminated))]);
}

#[test]
fn without_scatter_gather_transfers_go_one_by_one() {
    let config = Config { length_bits: 16, ..Build::default().config };
    let rig = build(Build { sg: false, config, ..Build::default() });
    assert!(!rig.dma.has_scatter_gather());
    rig.core.take_writes();
    let ((a, _), (b, _)) = (rig.buffer(100, 1), rig.buffer(200, 2));
    let [(to_a, pa_a), (to_b, pa_b)] = [rig.buffer(256, 0), rig.buffer(256, 0)];
    let sent = [rig.submit(TX, &[a]), rig.submit(TX, &[b])];
    let received = [rig.submit(RX, &[to_a]), rig.submit(RX, &[to_b])];
    rig.tx().issue_pending();
    let (low, high) = (a.address.get() as u32, (a.address.get() >> 32) as u32);
    let expected = [
        (reg::DMACR, 0x0001_7002),
        (reg::DMACR, 0x0001_7003),
        (reg::ADDRESS, low),
        (reg::ADDRESS_MSB, high),
        (reg::LENGTH, 100),
    ];
    assert_eq!(rig.core.take_writes(), expected);
    rig.rx().issue_pending();
    rig.run();
    for (n, len) in [100, 200].into_iter().enumerate() {
        assert_eq!(rig.tx().status(sent[n]).state, State::Complete);
        let status = rig.rx().status(received[n]);
        assert_eq!((status.state, status.transferred), (State::Complete, len));
    }
    assert_eq!((rig.read(pa_a, 100), rig.read(pa_b, 200)), (vec![1; 100], vec![2; 200]));
    let two = rig.tx().prep_slave_sg(&[a, b], TX);
    assert_eq!(two, Err(ChannelError::TooManySegments { needed: 2, max: 1 }));
    assert!(matches!(rig.tx().prep_cyclic(a.address, 64, 64, TX), Err(ChannelError::Unsupported { .. })));
}
