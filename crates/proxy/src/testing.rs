//! A pair of channels that are each other's loop, in memory of the tests, and the tests of the proxy on them.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::Pa;
use portcullis_drivers::dmaengine::{
    BusAccess, BusResponse, Callback, Caps, ChannelError, Completion, Cookie, Descriptor, Direction,
    DmaChannel, Notifier, Record, Registry, ResidueGranularity, Segment, State, Status, TransferError, Work,
    deliver,
};
use portcullis_hal::fake::{FakeClock, FakeMemory};
use portcullis_iommu::dma::{DeviceConfig, DmaDevice};
use spin::Mutex;

use crate::test::{Arguments, USAGE, run};
use crate::*;

type Meanwhile = alloc::boxed::Box<dyn FnOnce() + Send>;
type Pending = (Cookie, Segment, Option<Notifier>);

/// What one channel has to do.
#[derive(Default)]
struct Queue {
    record: Record,
    submitted: Vec<Pending>,
    issued: Vec<Pending>,
}

/// Two channels with a wire between them.
struct Wire {
    memory: Arc<FakeMemory>,
    queues: [Mutex<Queue>; 2],
    /// Turned on: the loop adds one to the byte at this offset.
    corrupt: Mutex<Option<usize>>,
    dead: Mutex<bool>,
    refuses_writes: Mutex<bool>,
    stuck: Mutex<bool>,
    /// What another processor does when somebody waits.
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl Wire {
    /// Moves what both sides are ready for.
    fn work(&self) {
        let mut news = vec![];
        while !*self.dead.lock() {
            let (mut tx, mut rx) = (self.queues[0].lock(), self.queues[1].lock());
            if tx.issued.is_empty() || rx.issued.is_empty() {
                break;
            }
            let (from, to) = (tx.issued.remove(0), rx.issued.remove(0));
            let len = from.1.len.min(to.1.len) as usize;
            let mut data = vec![0; len];
            self.memory.device_read(Pa(from.1.address.get()), &mut data);
            if let Some(byte) = self.corrupt.lock().and_then(|at| data.get_mut(at)) {
                *byte = byte.wrapping_add(1);
            }
            let at = to.1.address;
            let bus = TransferError::Bus { access: BusAccess::Write, response: BusResponse::Slave, at };
            let received = match *self.refuses_writes.lock() {
                true => Err(bus),
                false => {
                    self.memory.device_write(Pa(at.get()), &data);
                    Ok(())
                }
            };
            for ((cookie, _, notifier), queue, result) in
                [(from, &mut tx.record, Ok(())), (to, &mut rx.record, received)]
            {
                let completion =
                    Completion { cookie, result, transferred: len as u64, residue: 0, ongoing: false };
                queue.end(completion);
                news.push((notifier, completion));
            }
        }
        deliver(news);
    }
}

struct End {
    wire: Arc<Wire>,
    direction: Direction,
}

impl End {
    fn queue(&self) -> &Mutex<Queue> {
        &self.wire.queues[usize::from(self.direction == Direction::DevToMem)]
    }
}

impl DmaChannel for End {
    fn name(&self) -> &str {
        if self.direction == Direction::MemToDev { "loop MM2S" } else { "loop S2MM" }
    }
    fn caps(&self) -> Caps {
        Caps {
            memcpy: false,
            slave: true,
            cyclic: false,
            direction: Some(self.direction),
            address_bits: 32,
            align: 1,
            max_segment: 1 << 26,
            max_segments: 8,
            pause: false,
            residue: ResidueGranularity::Descriptor,
        }
    }
    fn prep_slave_sg(&self, segments: &[Segment], direction: Direction) -> Result<Descriptor, ChannelError> {
        if direction != self.direction {
            return Err(ChannelError::Direction { asked: direction, channel: self.direction });
        }
        if segments.iter().any(|segment| segment.len == 0) {
            return Err(ChannelError::Empty);
        }
        Ok(Descriptor::new(Work::Slave { segments: segments.to_vec(), direction }))
    }
    fn submit(&self, descriptor: Descriptor, callback: Option<Callback>) -> Result<Cookie, ChannelError> {
        let Work::Slave { segments, .. } = descriptor.into_work() else { panic!("not ours") };
        let mut queue = self.queue().lock();
        let cookie = queue.record.issue();
        queue.submitted.push((cookie, segments[0], callback.map(Notifier::new)));
        Ok(cookie)
    }
    fn issue_pending(&self) {
        let mut queue = self.queue().lock();
        let submitted = core::mem::take(&mut queue.submitted);
        queue.issued.extend(submitted);
    }
    fn status(&self, cookie: Cookie) -> Status {
        let queue = self.queue().lock();
        match queue.issued.iter().any(|(other, ..)| *other == cookie) {
            true => Status { state: State::Running, transferred: 0, residue: 0 },
            false => queue.record.status(cookie),
        }
    }
    fn terminate(&self) -> Result<usize, ChannelError> {
        if *self.wire.stuck.lock() {
            return Err(ChannelError::Busy { what: "a stall" });
        }
        let issued = core::mem::take(&mut self.queue().lock().issued);
        let result = Err(TransferError::Terminated);
        let end = |(cookie, _, notifier): Pending| {
            (notifier, Completion { cookie, result, transferred: 0, residue: 0, ongoing: false })
        };
        let news: Vec<_> = issued.into_iter().map(end).collect();
        let count = news.len();
        deliver(news);
        Ok(count)
    }
    fn handle_irq(&self) -> bool {
        false
    }
}

struct Rig {
    wire: Arc<Wire>,
    registry: Registry,
    device: DmaDevice<Arc<FakeMemory>>,
    clock: Arc<FakeClock>,
}

const DMAS: [Dma<'_>; 2] = [
    Dma { name: TX_NAME, provider: "dma@a0000000", cell: 0 },
    Dma { name: RX_NAME, provider: "dma@a0000000", cell: 1 },
];

fn rig() -> Rig {
    // Not coherent: what is not cleaned and invalidated shows.
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 32 << 20));
    let wire = Arc::new(Wire {
        memory: memory.clone(),
        queues: Default::default(),
        corrupt: Mutex::new(None),
        dead: Mutex::new(false),
        refuses_writes: Mutex::new(false),
        stuck: Mutex::new(false),
        meanwhile: Mutex::new(None),
    });
    let registry = Registry::new();
    for (cell, direction) in [(0, Direction::MemToDev), (1, Direction::DevToMem)] {
        registry.register("dma@a0000000", cell, Arc::new(End { wire: wire.clone(), direction })).unwrap();
    }
    let device = DmaDevice::direct("dma_proxy", memory, DeviceConfig::default());
    let works = wire.clone();
    let clock = Arc::new(FakeClock::with_hook(move |_| {
        let meanwhile = works.meanwhile.lock().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        works.work();
    }));
    Rig { wire, registry, device, clock }
}

impl Rig {
    fn proxy(&self) -> Proxy<Arc<FakeMemory>, Arc<FakeClock>> {
        Proxy::probe(&self.registry, &DMAS, &self.device, self.clock.clone()).unwrap()
    }
    fn multi(&self) -> MultiProxy<Arc<FakeMemory>, Arc<FakeClock>> {
        MultiProxy::probe(&self.registry, &DMAS, &self.device, self.clock.clone()).unwrap()
    }
    fn run(&self, arguments: &[&str]) -> (test::Summary, Vec<String>) {
        let mut lines = vec![];
        let arguments = Arguments::parse(arguments).unwrap();
        let summary = run(&self.proxy(), arguments, |line| lines.push(line.to_string())).unwrap();
        (summary, lines)
    }
}

#[test]
fn the_program_sends_and_verifies_every_transfer() {
    for bytes in ["1", "255", "4097", "65536"] {
        let (summary, lines) = rig().run(&["3", bytes]);
        assert!(summary.is_ok());
        assert_eq!((summary.transfers, summary.moved()), (3, 3 * bytes.parse::<u64>().unwrap()));
        assert_eq!(lines, ["DMA proxy test", "DMA proxy test complete"]);
    }
}

#[test]
fn sizes_above_the_buffer_are_cut_to_it() {
    let (summary, _) = rig().run(&["1", "99999999"]);
    assert_eq!(summary.bytes, 3 * 1024 * 1024);
    assert!(summary.is_ok());
}

#[test]
fn the_pattern_of_a_round_is_counter_plus_index() {
    let rig = rig();
    let proxy = rig.proxy();
    run(&proxy, Arguments { transfers: 3, bytes: 300 }, |_| ()).unwrap();
    let mut bytes = [0; 300];
    proxy.interface(Side::Rx).read(0, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1], bytes[253], bytes[254]), (2, 3, 255, 0));
}

#[test]
fn arguments_are_read_as_atoi_reads_them() {
    let parse = |transfers, bytes| Arguments::parse(&[transfers, bytes]).unwrap();
    assert_eq!(parse("10", "4096"), Arguments { transfers: 10, bytes: 4096 });
    assert_eq!(parse(" +7x", "0x100"), Arguments { transfers: 7, bytes: 0 });
    assert_eq!(parse("many", "-1"), Arguments { transfers: 0, bytes: -1 });
    assert_eq!(parse("\t-3", "3145729"), Arguments { transfers: -3, bytes: 3145728 });
    assert_eq!(parse("4294967297", "2147483648").transfers, 1);
    assert_eq!(parse("1", "2147483648").bytes, i32::MIN);
    assert_eq!(parse("", "- 5"), Arguments { transfers: 0, bytes: 0 });
    for wrong in [&[][..], &["1"], &["1", "2", "3"]] {
        assert_eq!(Arguments::parse(wrong), Err(USAGE));
    }
}

#[test]
fn sizes_that_are_no_sizes_fail_every_transfer_and_touch_nothing() {
    for bytes in ["0", "-1", "none"] {
        let (summary, lines) = rig().run(&["2", bytes]);
        assert_eq!((summary.tx_errors, summary.rx_errors, summary.moved()), (2, 2, 0), "{bytes}");
        let errors = ["Proxy tx transfer error", "Proxy rx transfer error"];
        assert_eq!(lines[1..5], [errors, errors].concat());
    }
    let (summary, lines) = rig().run(&["-5", "100"]);
    assert_eq!((summary.transfers, lines.len()), (0, 2));
}

#[test]
fn a_wrong_byte_is_named() {
    let rig = rig();
    *rig.wire.corrupt.lock() = Some(5000);
    let (summary, lines) = rig.run(&["2", "6000"]);
    assert_eq!((summary.wrong_bytes, summary.is_ok()), (2, false));
    assert_eq!(lines[1], "buffer not equal, index = 5000, data = 137 expected data = 136");
}

#[test]
fn a_transfer_that_never_ends_times_out_and_gives_the_buffer_back() {
    let rig = rig();
    *rig.wire.dead.lock() = true;
    let proxy = rig.proxy();
    proxy.interface(Side::Rx).set_length(64);
    assert_eq!(proxy.transfer(Side::Rx), ProxyStatus::Timeout);
    assert_eq!(proxy.interface(Side::Rx).status(), ProxyStatus::Timeout);
    assert_eq!(proxy.take_log(), ["loop S2MM: DMA timed out"]);
    assert!(rig.wire.queues[1].lock().issued.is_empty(), "it was terminated");
    use portcullis_hal::Clock;
    let waited = rig.clock.now_ns() / 1_000_000;
    assert!((3000..7000).contains(&waited), "{waited} ms");
    *rig.wire.dead.lock() = false;
    assert!(run(&proxy, Arguments { transfers: 1, bytes: 64 }, |_| ()).unwrap().is_ok());
}

#[test]
fn an_error_of_the_engine_is_an_error_and_no_timeout() {
    let rig = rig();
    *rig.wire.refuses_writes.lock() = true;
    let proxy = rig.proxy();
    let mut lines = vec![];
    let arguments = Arguments { transfers: 1, bytes: 64 };
    let summary = run(&proxy, arguments, |line| lines.push(line.to_string())).unwrap();
    assert_eq!((summary.tx_errors, summary.rx_errors, summary.wrong_bytes), (0, 1, 63));
    assert_eq!(lines[1], "Proxy rx transfer error");
    let log = proxy.take_log();
    assert!(log[0].starts_with("loop S2MM: DMA returned completion callback status of: error (slave error"));
}

#[test]
fn the_length_in_shared_memory_is_not_trusted() {
    let rig = rig();
    let proxy = rig.proxy();
    for length in [TEST_SIZE as u32 + 1, u32::MAX] {
        proxy.interface(Side::Rx).set_length(length);
        assert!(matches!(proxy.start(Side::Rx), Err(ProxyError::Length { .. })));
        assert_eq!(proxy.interface(Side::Rx).status(), ProxyStatus::Error);
    }
    let rx = proxy.interface(Side::Rx);
    assert!(rx.write(TEST_SIZE - 1, &[0; 2]).is_err() && rx.read(u64::MAX, &mut [0; 2]).is_err());
    rx.set_length(64);
    proxy.start(Side::Rx).unwrap();
    assert!(matches!(proxy.start(Side::Rx), Err(ProxyError::Busy)));
    assert_eq!(rx.status(), ProxyStatus::Busy);
}

#[test]
fn the_internal_test_says_what_the_module_says() {
    let rig = rig();
    let proxy = rig.proxy();
    let mut lines = vec![];
    assert!(proxy.internal_test(|line| lines.push(line.to_string())).unwrap());
    assert_eq!(lines, ["Starting internal test", "Internal test complete"]);
    *rig.wire.corrupt.lock() = Some(4097);
    lines.clear();
    assert!(!proxy.internal_test(|line| lines.push(line.to_string())).unwrap());
    assert_eq!(lines[1], "buffers not equal, first index = 4097");
}

#[test]
fn channels_are_requested_by_name_and_given_back() {
    let rig = rig();
    let missing = Proxy::probe(&rig.registry, &DMAS[..1], &rig.device, rig.clock.clone()).unwrap_err();
    assert_eq!(missing.to_string(), "dma-names has no dma_proxy_rx");
    let crossed = [Dma { name: TX_NAME, ..DMAS[1] }, Dma { name: RX_NAME, ..DMAS[0] }];
    let wrong = Proxy::probe(&rig.registry, &crossed, &rig.device, rig.clock.clone()).unwrap_err();
    assert_eq!(wrong.to_string(), "loop S2MM cannot send");
    let proxy = rig.proxy();
    let taken = Proxy::probe(&rig.registry, &DMAS, &rig.device, rig.clock.clone()).unwrap_err();
    assert_eq!(taken.to_string(), "channel dma_proxy_tx: loop MM2S is in use by dma_proxy");
    drop(proxy);
    drop(rig.proxy());
    assert_eq!(rig.wire.memory.outstanding(), 0);
}

#[test]
fn memory_of_a_channel_that_does_not_stop_is_kept() {
    let rig = rig();
    let proxy = rig.proxy();
    *rig.wire.stuck.lock() = true;
    drop(proxy);
    assert_eq!(rig.wire.memory.outstanding(), 2);
    let refused = Proxy::probe(&rig.registry, &DMAS, &rig.device, rig.clock.clone()).unwrap_err();
    assert!(refused.to_string().contains("did not stop when dma_proxy released it"), "{refused}");
}

#[test]
fn many_buffers_are_started_at_once_and_finished_in_order() {
    let rig = rig();
    let proxy = rig.multi();
    let (tx, rx) = (proxy.channel(TX_NAME).unwrap(), proxy.channel(RX_NAME).unwrap());
    for buffer in 0..BUFFER_COUNT {
        for channel in [tx, rx] {
            proxy.set_length(channel, buffer, 1000).unwrap();
        }
        proxy.write(tx, buffer, 0, &[buffer as u8 + 1; 1000]).unwrap();
        proxy.start(rx, buffer).unwrap();
        proxy.start(tx, buffer).unwrap();
    }
    assert!(matches!(proxy.start(rx, 3), Err(ProxyError::Busy)));
    for buffer in 0..BUFFER_COUNT {
        assert_eq!(proxy.finish(rx, buffer).unwrap(), ProxyStatus::NoError);
        assert_eq!(proxy.finish(tx, buffer).unwrap(), ProxyStatus::NoError);
        let mut bytes = [0; 1001];
        proxy.read(rx, buffer, 0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[999], bytes[1000]), (buffer as u8 + 1, buffer as u8 + 1, 0));
    }
    assert_eq!(BUFFER_STRIDE % 1024, 0);
}

#[test]
fn the_newer_proxy_checks_what_users_hand_it() {
    let rig = rig();
    let proxy = rig.multi();
    assert!(matches!(proxy.start(2, 0), Err(ProxyError::Index { what: "channel", index: 2 })));
    assert!(matches!(proxy.finish(0, 32), Err(ProxyError::Index { what: "buffer", index: 32 })));
    proxy.set_length(0, 0, BUFFER_SIZE as u32 + 1).unwrap();
    assert!(matches!(proxy.transfer(0, 0), Err(ProxyError::Length { .. })));
    assert_eq!(proxy.status(0, 0).unwrap(), ProxyStatus::Error);
    assert!(proxy.write(0, 0, BUFFER_SIZE - 1, &[0; 2]).is_err(), "the status is behind it");
    assert_eq!(proxy.direction(1), Some(Direction::DevToMem));
}

#[test]
fn the_newer_proxy_times_out_before_it_asks_the_engine() {
    let rig = rig();
    let proxy = rig.multi();
    *rig.wire.dead.lock() = true;
    proxy.set_length(1, 7, 64).unwrap();
    assert_eq!(proxy.transfer(1, 7).unwrap(), ProxyStatus::Timeout);
    *rig.wire.dead.lock() = false;
    let mut lines = vec![];
    assert!(proxy.internal_test(|line| lines.push(line.to_string())).unwrap());
    assert_eq!(lines, ["Starting internal test", "dma_proxy_rx: DMA timed out", "Internal test complete"]);
}

#[test]
fn two_threads_may_use_the_two_sides() {
    extern crate std;
    let rig = rig();
    let proxy = rig.proxy();
    for side in [Side::Tx, Side::Rx] {
        proxy.interface(side).set_length(4096);
    }
    proxy.interface(Side::Tx).fill(0, 4096, 7).unwrap();
    let both = |work: fn(&Proxy<_, _>, Side) -> ProxyStatus| {
        std::thread::scope(|scope| {
            let proxy = &proxy;
            let sides = [Side::Tx, Side::Rx].map(|side| scope.spawn(move || work(proxy, side)));
            sides.map(|thread| thread.join().unwrap())
        })
    };
    let started = both(|proxy, side| {
        proxy.start(side).unwrap();
        proxy.interface(side).status()
    });
    assert_eq!(started, [ProxyStatus::Busy; 2]);
    assert_eq!(both(|proxy, side| proxy.finish(side)), [ProxyStatus::NoError; 2]);
    let mut bytes = [0; 4096];
    proxy.interface(Side::Rx).read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn a_buffer_is_busy_while_somebody_waits_for_its_transfer() {
    let rig = rig();
    let proxy = Arc::new(rig.proxy());
    for side in [Side::Tx, Side::Rx] {
        proxy.interface(side).set_length(64);
        proxy.start(side).unwrap();
    }
    let (other, seen) = (proxy.clone(), Arc::new(Mutex::new(None)));
    let sees = seen.clone();
    let meanwhile = move || {
        let refused = matches!(other.start(Side::Rx), Err(ProxyError::Busy));
        *sees.lock() = Some((refused, other.is_done(Side::Rx)));
    };
    *rig.wire.meanwhile.lock() = Some(alloc::boxed::Box::new(meanwhile));
    assert_eq!(proxy.finish(Side::Rx), ProxyStatus::NoError);
    assert_eq!(*seen.lock(), Some((true, false)));
    assert_eq!(proxy.finish(Side::Tx), ProxyStatus::NoError);
}

#[test]
fn two_may_wait_for_one_transfer() {
    let rig = rig();
    let proxy = Arc::new(rig.proxy());
    for side in [Side::Tx, Side::Rx] {
        proxy.interface(side).set_length(64);
        proxy.start(side).unwrap();
    }
    let (other, seen) = (proxy.clone(), Arc::new(Mutex::new(None)));
    let sees = seen.clone();
    let meanwhile = move || *sees.lock() = Some(other.finish(Side::Rx));
    *rig.wire.meanwhile.lock() = Some(alloc::boxed::Box::new(meanwhile));
    assert_eq!(proxy.finish(Side::Rx), ProxyStatus::NoError);
    assert_eq!(*seen.lock(), Some(ProxyStatus::NoError));
}

#[test]
fn an_old_transfer_is_not_forgotten_before_somebody_finishes_it() {
    let rig = rig();
    let proxy = rig.multi();
    let round = |buffer| {
        for channel in [0, 1] {
            proxy.set_length(channel, buffer, 8).unwrap();
            proxy.start(channel, buffer).unwrap();
        }
    };
    round(0);
    for _ in 0..300 {
        round(1);
        assert_eq!([0, 1].map(|channel| proxy.finish(channel, 1).unwrap()), [ProxyStatus::NoError; 2]);
    }
    assert_eq!([0, 1].map(|channel| proxy.finish(channel, 0).unwrap()), [ProxyStatus::NoError; 2]);
}
