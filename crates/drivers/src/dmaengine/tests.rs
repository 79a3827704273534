//! Registry, callbacks and waiting, with a channel that only remembers.

use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_hal::fake::FakeClock;
use spin::Mutex;

use super::*;
use alloc::boxed::Box;

#[derive(Default)]
struct Memo {
    name: &'static str,
    memcpy: bool,
    record: Mutex<Record>,
    pending: Mutex<Vec<(Cookie, Option<Notifier>)>>,
    stuck: AtomicBool,
}

impl Memo {
    fn new(name: &'static str, memcpy: bool) -> Arc<Self> {
        Arc::new(Self { name, memcpy, ..Self::default() })
    }
    fn end(&self, result: Result<(), TransferError>) -> usize {
        let pending = core::mem::take(&mut *self.pending.lock());
        let mut news = vec![];
        for (cookie, notifier) in pending {
            let completion = Completion { cookie, result, transferred: 4, residue: 0, ongoing: false };
            self.record.lock().end(completion);
            news.push((notifier, completion));
        }
        let count = news.len();
        deliver(news);
        count
    }
}

impl DmaChannel for Memo {
    fn name(&self) -> &str {
        self.name
    }
    fn caps(&self) -> Caps {
        Caps {
            memcpy: self.memcpy,
            slave: !self.memcpy,
            cyclic: false,
            direction: (!self.memcpy).then_some(Direction::DevToMem),
            address_bits: 32,
            align: 1,
            max_segment: 4096,
            max_segments: 4,
            pause: false,
            residue: ResidueGranularity::Descriptor,
        }
    }
    fn prep_memcpy_sg(&self, to: &[Segment], from: &[Segment]) -> Result<Descriptor, ChannelError> {
        Ok(Descriptor::new(Work::Memcpy { to: to.to_vec(), from: from.to_vec() }))
    }
    fn submit(&self, _: Descriptor, callback: Option<Callback>) -> Result<Cookie, ChannelError> {
        let cookie = self.record.lock().issue();
        self.pending.lock().push((cookie, callback.map(Notifier::new)));
        Ok(cookie)
    }
    fn issue_pending(&self) {}
    fn status(&self, cookie: Cookie) -> Status {
        match self.pending.lock().iter().any(|(other, _)| *other == cookie) {
            true => Status { state: State::Running, transferred: 0, residue: 4 },
            false => self.record.lock().status(cookie),
        }
    }
    fn terminate(&self) -> Result<usize, ChannelError> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(ChannelError::Busy { what: "a stall" });
        }
        Ok(self.end(Err(TransferError::Terminated)))
    }
    fn handle_irq(&self) -> bool {
        false
    }
}

fn cell(provider: &str, cell: u32) -> ChannelRequest<'_> {
    ChannelRequest::Cell { provider, cell }
}

#[test]
fn a_channel_has_one_client_at_a_time() {
    let registry = Registry::new();
    registry.register("dma@a0000000", 0, Memo::new("dma@a0000000 MM2S", false)).unwrap();
    registry.register("dma@a0000000", 1, Memo::new("dma@a0000000 S2MM", false)).unwrap();
    let again = registry.register("dma@a0000000", 1, Memo::new("x", false)).unwrap_err();
    assert_eq!(again.to_string(), "dma@a0000000 has a channel 1 already");
    let held = registry.request(cell("dma@a0000000", 1), "dma_proxy").unwrap();
    assert_eq!(held.name(), "dma@a0000000 S2MM");
    let refused = registry.request(cell("dma@a0000000", 1), "audio").unwrap_err();
    assert_eq!(refused.to_string(), "dma@a0000000 S2MM is in use by dma_proxy");
    assert!(matches!(registry.unregister("dma@a0000000"), Err(RequestError::InUse { .. })));
    let other = registry.request(cell("dma@b0000000", 0), "audio").unwrap_err();
    assert_eq!(other.to_string(), "there is no DMA engine dma@b0000000; there are: dma@a0000000");
    let beyond = registry.request(cell("dma@a0000000", 2), "audio").unwrap_err();
    assert_eq!(beyond.to_string(), "dma@a0000000 has no channel 2");
    held.release().unwrap();
    drop(registry.request(cell("dma@a0000000", 1), "audio").unwrap());
    assert!(registry.channels().iter().all(|(.., owner)| owner.is_none()));
    registry.unregister("dma@a0000000").unwrap();
}

#[test]
fn any_free_channel_that_can_do_it_is_found() {
    let registry = Registry::new();
    registry.register("axi", 1, Memo::new("axi", false)).unwrap();
    registry.register("zdma0", 0, Memo::new("zdma0", true)).unwrap();
    registry.register("zdma1", 0, Memo::new("zdma1", true)).unwrap();
    let request = |capability| registry.request(ChannelRequest::Capable(capability), "dmatest");
    let first = request(Capability::Memcpy).unwrap();
    let second = request(Capability::Memcpy).unwrap();
    assert_eq!((first.name(), second.name()), ("zdma0", "zdma1"));
    assert!(matches!(request(Capability::Memcpy), Err(RequestError::InUse { .. })));
    assert_eq!(request(Capability::Slave(Direction::DevToMem)).unwrap().name(), "axi");
    let none = request(Capability::Cyclic(Direction::DevToMem)).unwrap_err();
    assert_eq!(none.to_string(), "no engine can do cyclic transfers from device to memory");
}

#[test]
fn a_channel_that_does_not_stop_is_not_handed_out_again() {
    let registry = Registry::new();
    let memo = Memo::new("zdma", true);
    registry.register("zdma", 0, memo.clone()).unwrap();
    let held = registry.request(cell("zdma", 0), "vm a").unwrap();
    memo.stuck.store(true, Ordering::Relaxed);
    assert!(held.release().is_err());
    let refused = registry.request(cell("zdma", 0), "vm b").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "zdma did not stop when vm a released it: the channel is busy with a stall"
    );
}

#[test]
fn what_a_channel_that_does_not_stop_may_use_is_kept_while_there_is_a_registry() {
    let (registry, memory) = (Registry::new(), Arc::new(()));
    let memo = Memo::new("zdma", true);
    registry.register("zdma", 0, memo.clone()).unwrap();
    let held = registry.request(cell("zdma", 0), "proxy").unwrap();
    memo.stuck.store(true, Ordering::Relaxed);
    held.keep(memory.clone());
    drop(held);
    registry.unregister("zdma").unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(registry);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn releasing_ends_what_is_under_way() {
    let registry = Registry::new();
    let memo = Memo::new("zdma", true);
    registry.register("zdma", 0, memo.clone()).unwrap();
    let held = registry.request(cell("zdma", 0), "client").unwrap();
    let result = Arc::new(Mutex::new(None));
    let seen = result.clone();
    let descriptor = held.prep_memcpy(Iova(0), Iova(64), 4).unwrap();
    held.submit(descriptor, Some(Box::new(move |completion| *seen.lock() = Some(completion.result))))
        .unwrap();
    drop(held);
    assert_eq!(*result.lock(), Some(Err(TransferError::Terminated)));
}

#[test]
fn news_that_come_while_a_callback_runs_are_delivered_after_it() {
    let order = Arc::new(Mutex::new(vec![]));
    let own: Arc<Mutex<Option<Notifier>>> = Arc::default();
    let (seen, inner) = (order.clone(), own.clone());
    let news =
        |n| Completion { cookie: Cookie(n), result: Ok(()), transferred: 0, residue: 0, ongoing: true };
    let notifier = Notifier::new(Box::new(move |completion| {
        seen.lock().push(completion.cookie.0 * 10);
        if completion.cookie.0 == 1 {
            let again = inner.lock().clone().unwrap();
            again.notify(Completion { cookie: Cookie(2), ..*completion });
        }
        seen.lock().push(completion.cookie.0 * 10 + 1);
    }));
    *own.lock() = Some(notifier.clone());
    notifier.notify(news(1));
    assert_eq!(*order.lock(), [10, 11, 20, 21]);
    *own.lock() = None;
}

#[test]
fn a_signal_is_taken_once_per_raise_and_waits_are_bounded() {
    let clock = FakeClock::new();
    let signal = Signal::new();
    let timeout = signal.wait(&clock, 3_000_000).unwrap_err();
    assert!(timeout.waited_us >= 3_000_000);
    signal.complete();
    signal.complete();
    assert!(signal.wait(&clock, 1).is_ok() && signal.try_wait() && !signal.try_wait());
    signal.complete();
    signal.reinit();
    assert!(!signal.try_wait());
    let raised = Arc::new(Signal::new());
    let device = raised.clone();
    let clock = FakeClock::with_hook(move |now| {
        if now > 50_000 {
            device.complete()
        }
    });
    raised.wait(&clock, 3_000_000).unwrap();
    assert!(clock.delays() < 10);
}

#[test]
fn waiting_tells_success_failure_timeout_and_unknown_apart() {
    let (memo, clock) = (Memo::new("zdma", true), FakeClock::new());
    let submit = || memo.submit(memo.prep_memcpy(Iova(0), Iova(64), 4).unwrap(), None).unwrap();
    let cookie = submit();
    let timeout = wait(&*memo, cookie, &clock, 100).unwrap_err();
    assert!(timeout.to_string().contains("the end of a DMA transaction"), "{timeout}");
    assert!(timeout.to_string().ends_with("4 bytes are left"), "{timeout}");
    memo.end(Ok(()));
    assert_eq!(wait(&*memo, cookie, &clock, 100).unwrap().transferred, 4);
    let failing = submit();
    memo.end(Err(TransferError::EngineReset));
    let failed = wait(&*memo, failing, &clock, 100).unwrap_err();
    assert_eq!(failed, WaitError::Failed { error: TransferError::EngineReset, transferred: 4 });
    assert_eq!(wait(&*memo, Cookie(9), &clock, 1), Err(WaitError::Unknown { cookie: Cookie(9) }));
}

#[test]
fn the_record_forgets_the_oldest() {
    let mut record = Record::new();
    for _ in 0..1100 {
        let cookie = record.issue();
        record.end(Completion { cookie, result: Ok(()), transferred: 0, residue: 0, ongoing: false });
    }
    assert_eq!(record.status(Cookie(1)).state, State::Unknown);
    let of_one_ring = 1101 - crate::axidma::DEFAULT_DESCRIPTORS as u64;
    assert_eq!(record.status(Cookie(of_one_ring)).state, State::Complete);
    assert_eq!(record.status(Cookie(1100)).state, State::Complete);
}
