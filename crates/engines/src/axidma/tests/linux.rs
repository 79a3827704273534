//! A replay of what Linux `xilinx_dma` does to the registers: probe, prepare, start, interrupt, terminate, remove; in
//! the three variants that its stable versions have. The driver's bookkeeping is re-told here as far as its register
//! accesses depend on it.

use std::collections::VecDeque;

use portcullis_arch::Access;

use super::*;
use crate::testport::Rule;

/// What differs between stable versions.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Version {
    /// 6.1: an interrupt completes everything that is active.
    A,
    /// 6.12 before .117: only what is complete; the next batch starts even if the engine is busy.
    B,
    /// Later: only what is complete; the next batch starts when nothing is active.
    C,
}

const VERSIONS: [Version; 3] = [Version::A, Version::B, Version::C];
/// BD slots of a channel, 128 bytes each, and one more outside of the ring.
const SLOTS: u64 = 32;
const POOLS: [u64; 2] = [RAM + 0x1_0000, RAM + 0x2_0000];
const MAX: u32 = 0x3ff_ffff;
const BLOCKS: [u32; 2] = [MM2S, S2MM];

/// The slots of one descriptor of the dmaengine API.
type Transaction = Vec<u64>;

#[derive(Default)]
struct Channel {
    sg: bool,
    idle: bool,
    err: bool,
    cyclic: bool,
    free: VecDeque<u64>,
    pending: Vec<Transaction>,
    active: VecDeque<Transaction>,
    /// Residue and error flag of each completed transaction.
    done: Vec<(u32, bool)>,
}

struct Driver {
    dma: AxiDma,
    port: TestPort,
    version: Version,
    max: u32,
    channels: [Channel; 2],
}

fn slot(c: usize, n: u64) -> u64 {
    POOLS[c] + 128 * n
}

impl Driver {
    fn probe(dma: AxiDma, port: &TestPort, version: Version) -> Self {
        let mut d = Self { dma, port: port.clone(), version, max: MAX, channels: Default::default() };
        for c in [0, 1] {
            assert_eq!(d.dma.sr(BLOCKS[c]) & 0x7000, 0, "the handler is not ready yet");
            d.channels[c].sg = d.dma.sr(BLOCKS[c]) & 8 != 0;
            d.reset(c);
            for n in 0..SLOTS {
                put(&d.port, slot(c, n), slot(c, (n + 1) % SLOTS), 0, 0);
            }
            d.channels[c].free = (0..SLOTS).collect();
        }
        d
    }

    fn rmw(&mut self, c: usize, clear: u32, set: u32) {
        let value = self.dma.r(BLOCKS[c] + reg::DMACR);
        self.dma.w(BLOCKS[c] + reg::DMACR, value & !clear | set);
    }

    /// The polls of the driver: true if the bits of a register became `value`.
    fn poll(&mut self, at: u32, bits: u32, value: u32) -> bool {
        (0..20).any(|_| {
            self.dma.step(0);
            self.dma.r(at) & bits == value
        })
    }

    fn reset(&mut self, c: usize) {
        self.rmw(c, 0, 4);
        assert!(self.poll(BLOCKS[c] + reg::DMACR, 4, 0), "reset timeout");
        self.rmw(c, 0, 0x7000);
        self.channels[c].err = false;
        self.channels[c].idle = true;
    }

    /// prep_slave_sg and tx_submit.
    fn submit(&mut self, c: usize, mut buffers: Vec<(u64, u32)>) {
        if self.channels[c].err {
            self.reset(c);
        }
        let mut slots = Vec::new();
        let n = buffers.len();
        for (i, (buffer, length)) in buffers.drain(..).enumerate() {
            let channel = &mut self.channels[c];
            let at = slot(c, channel.free.pop_front().unwrap());
            let flags = if i == 0 { SOF } else { 0 } | if i + 1 == n { EOF } else { 0 };
            let control = length & self.max | if c == 0 { flags } else { 0 };
            self.port.put(at + 8, &buffer.to_le_bytes());
            self.port.put(at + 0x18, &control.to_le_bytes());
            slots.push(at);
        }
        if let Some(previous) = self.channels[c].pending.last().and_then(|t| t.last()) {
            // The low word only.
            self.port.put(*previous, &(slots[0] as u32).to_le_bytes());
        }
        self.channels[c].pending.push(slots);
    }

    /// prep_dma_cyclic and tx_submit: periods of equal length.
    fn submit_cyclic(&mut self, c: usize, buffer: u64, length: u32, periods: u32) {
        let period = length / periods;
        self.submit(c, (0..periods).map(|i| (buffer + u64::from(i * period), period)).collect());
        self.channels[c].cyclic = true;
        self.rmw(c, 0, 0x10);
        let slots = self.channels[c].pending.last().unwrap().clone();
        self.port.put(*slots.last().unwrap(), &(slots[0] as u32).to_le_bytes());
    }

    /// issue_pending: start_transfer.
    fn issue(&mut self, c: usize) {
        let channel = &mut self.channels[c];
        let block = BLOCKS[c];
        if channel.err || channel.pending.is_empty() || !channel.idle {
            return;
        }
        let first = channel.pending[0][0];
        let last = *channel.pending.last().unwrap().last().unwrap();
        let threshold = channel.pending.len() as u32;
        let (sg, cyclic) = (channel.sg, channel.cyclic);
        self.rmw(c, 0xff << 16, threshold << 16);
        if sg {
            self.dma.w64(block + reg::CURDESC, first);
        }
        self.rmw(c, 0xff << 24, 0x7000);
        self.rmw(c, 0, 1);
        if !self.poll(block + reg::DMASR, 1, 0) {
            self.channels[c].err = true;
            return;
        }
        if sg {
            self.dma.w64(block + reg::TAILDESC, if cyclic { slot(c, SLOTS) } else { last });
        } else {
            let word = |at: u64| u32::from_le_bytes(self.port.bytes(first + at, 4).try_into().unwrap());
            let (address, length) = (u64::from(word(8)) | u64::from(word(12)) << 32, word(0x18) & self.max);
            self.dma.transfer(block, address, length);
        }
        let channel = &mut self.channels[c];
        channel.active.extend(channel.pending.drain(..));
        channel.idle = false;
    }

    /// The interrupt handler. True if it was this channel's.
    fn irq(&mut self, c: usize) -> bool {
        let block = BLOCKS[c];
        let bits = self.dma.sr(block) & 0x7000;
        if bits == 0 {
            return false;
        }
        self.dma.w(block + reg::DMASR, bits);
        if bits & ERR != 0 {
            let errors = self.dma.sr(block) & 0x7ff;
            self.dma.w(block + reg::DMASR, errors & 0x990);
            self.dma.r(block + reg::CURDESC);
            self.dma.r(block + reg::TAILDESC);
            self.channels[c].err = true;
        }
        if bits & (IOC | DLY) != 0 {
            let channel = &self.channels[c];
            let look = channel.sg && self.version != Version::A;
            while let Some(transaction) = self.channels[c].active.front() {
                if look && status(&self.port, *transaction.last().unwrap()) & CMPLT == 0 {
                    break;
                }
                self.complete(c);
                if self.channels[c].cyclic {
                    break;
                }
            }
            self.channels[c].idle = true;
            if self.version == Version::B || self.channels[c].active.is_empty() {
                self.issue(c);
            }
        }
        true
    }

    fn complete(&mut self, c: usize) {
        let Some(transaction) = self.channels[c].active.pop_front() else { return };
        let word = |at: u64| u32::from_le_bytes(self.port.bytes(at, 4).try_into().unwrap());
        let residue = transaction.iter().map(|bd| (word(bd + 0x18) & MAX) - (word(bd + 0x1c) & MAX)).sum();
        let err = self.channels[c].err;
        self.channels[c].done.push((residue, err));
        if self.channels[c].cyclic {
            for bd in &transaction {
                self.port.put(bd + 0x1c, &[0; 4]);
            }
            self.channels[c].active.push_back(transaction);
        } else {
            self.release(c, transaction);
        }
    }

    /// A freed slot is zeroed and linked into the ring again.
    fn release(&mut self, c: usize, transaction: Transaction) {
        for bd in transaction {
            let n = (bd - POOLS[c]) / 128;
            put(&self.port, bd, slot(c, (n + 1) % SLOTS), 0, 0);
            self.channels[c].free.push_back(n);
        }
    }

    /// Returns whether the channel stopped in time.
    fn terminate(&mut self, c: usize) -> bool {
        let mut stopped = true;
        if !self.channels[c].cyclic {
            self.rmw(c, 1, 0);
            stopped = self.poll(BLOCKS[c] + reg::DMASR, 1, 1);
        }
        self.reset(c);
        let channel = &mut self.channels[c];
        let all: Vec<_> = channel.pending.drain(..).chain(channel.active.drain(..)).collect();
        for transaction in all {
            self.release(c, transaction);
        }
        // The free list is in ring order again.
        self.channels[c].free = (0..SLOTS).collect();
        if std::mem::take(&mut self.channels[c].cyclic) {
            self.rmw(c, 0x10, 0);
        }
        stopped
    }

    /// Lets the core work and handles interrupts until there are none.
    fn work(&mut self) {
        for _ in 0..50 {
            self.dma.step(0);
            let [tx, rx] = self.dma.irq_levels();
            if tx {
                assert!(self.irq(0));
            }
            if rx {
                assert!(self.irq(1));
            }
            if !tx && !rx && self.dma.step(0) == Activity::Idle {
                return;
            }
        }
        panic!("interrupt storm");
    }

    fn loop_once(&mut self, length: u32, pieces: u32) {
        let piece = length / pieces;
        let buffers = |base: u64| (0..pieces).map(|i| (base + u64::from(i * piece), piece)).collect();
        self.submit(0, buffers(SRC));
        self.submit(1, buffers(DST));
        self.issue(0);
        self.issue(1);
        self.work();
    }
}

#[test]
fn probe_resets_finds_the_build_and_enables_interrupts_last() {
    for sg in [true, false] {
        let port = port();
        let mut dma = build(AxiDmaConfig { sg, ..s0() }, &port);
        dma.w(reg::DMACR, 0x0003_7001);
        let mut d = Driver::probe(dma, &port, Version::B);
        assert!(d.channels.iter().all(|c| c.sg == sg));
        // Probing the second channel resets the first one too.
        assert_eq!(d.dma.r(reg::DMACR), 0x0001_0002);
        assert_eq!(d.dma.r(S2MM + reg::DMACR), 0x0001_7002);
        assert_eq!(d.dma.irq_levels(), [false; 2]);
    }
}

#[test]
fn loops_go_round_the_ring_though_curdesc_writes_are_ignored_while_running() {
    for version in VERSIONS {
        let port = port();
        let mut d = Driver::probe(core(&port), &port, version);
        let mut random = Random(5);
        for i in 0..40u32 {
            port.put(SRC, &random.bytes(3600));
            d.loop_once(3600, 1 + i % 4);
            assert!(port.bytes(DST, 3600) == port.bytes(SRC, 3600), "{version:?} {i}");
            assert_eq!(d.channels[0].done.len() as u32, i + 1);
            assert_eq!(d.channels[1].done.last(), Some(&(0, false)));
        }
        assert_eq!(d.channels[1].done.len(), 40);
    }
}

#[test]
fn a_batch_of_descriptors_gives_one_interrupt() {
    for version in VERSIONS {
        let port = port();
        let mut d = Driver::probe(core(&port), &port, version);
        port.put(SRC, &Random(6).bytes(5000));
        for i in 0..5 {
            d.submit(0, vec![(SRC + 1000 * i, 1000)]);
            d.submit(1, vec![(DST + 1000 * i, 1000)]);
        }
        d.issue(1);
        d.issue(0);
        d.dma.settle(2);
        assert_eq!((d.dma.sr(MM2S), d.dma.sr(S2MM)), (0x0005_100a, 0x0005_100a));
        d.work();
        assert_eq!(d.channels[0].done.len(), 5);
        assert_eq!(d.channels[1].done, [(0, false); 5]);
        assert_eq!(port.bytes(DST, 5000), port.bytes(SRC, 5000));
    }
}

#[test]
fn what_is_issued_while_the_engine_works_starts_from_the_handler() {
    for version in VERSIONS {
        let port = port();
        let mut d = Driver::probe(core(&port), &port, version);
        port.put(SRC, &Random(7).bytes(30_000));
        for i in 0..3u64 {
            d.submit(0, vec![(SRC + 10_000 * i, 10_000)]);
            d.issue(0);
            d.dma.settle(2);
        }
        assert_eq!((d.channels[0].active.len(), d.channels[0].pending.len()), (1, 2));
        for i in 0..3u64 {
            d.submit(1, vec![(DST + 10_000 * i, 10_000)]);
            d.issue(1);
            d.work();
        }
        assert_eq!((d.channels[0].done.len(), d.channels[1].done.len()), (3, 3), "{version:?}");
        assert_eq!(port.bytes(DST, 30_000), port.bytes(SRC, 30_000));
    }
}

#[test]
fn a_short_packet_leaves_a_residue() {
    let port = port();
    let mut d = Driver::probe(core(&port), &port, Version::C);
    d.submit(1, vec![(DST, 5000)]);
    d.issue(1);
    d.submit(0, vec![(SRC, 1234)]);
    d.issue(0);
    d.work();
    assert_eq!(d.channels[1].done, [(5000 - 1234, false)]);
}

#[test]
fn direct_mode_moves_one_descriptor_per_issue() {
    for version in VERSIONS {
        let port = port();
        let mut d = Driver::probe(direct(&port), &port, version);
        for i in 0..5 {
            port.put(SRC, &Random(i + 1).bytes(3000));
            d.submit(1, vec![(DST, 3000)]);
            d.submit(0, vec![(SRC, 3000)]);
            d.issue(1);
            d.issue(0);
            d.work();
            assert_eq!(port.bytes(DST, 3000), port.bytes(SRC, 3000));
        }
        assert_eq!((d.channels[0].done.len(), d.channels[1].done.len()), (5, 5));
    }
}

#[test]
fn cyclic_runs_interrupt_once_per_round_until_terminated() {
    for version in VERSIONS {
        let port = port();
        let mut d = Driver::probe(core(&port), &port, version);
        port.put(SRC, &Random(8).bytes(400));
        d.submit_cyclic(1, DST, 400, 4);
        d.issue(1);
        for round in 0..3 {
            d.submit(0, vec![(SRC, 400)]);
            d.issue(0);
            d.work();
            assert_eq!(d.channels[1].done, vec![(0, false); round + 1], "{version:?}");
        }
        assert_eq!(port.bytes(DST, 400), port.bytes(SRC, 400));
        d.terminate(1);
        assert_eq!((d.dma.r(S2MM + reg::DMACR), d.dma.sr(S2MM)), (0x0001_7002, 0x0001_0009));
        // An ordinary run follows. The reset was core-wide, so the sender starts from its own reset too.
        d.terminate(0);
        d.loop_once(1000, 2);
        assert_eq!(d.channels[1].done.len(), 4);
    }
}

#[test]
fn a_cyclic_sender_fills_the_stream_round_after_round() {
    let port = port();
    let mut d = Driver::probe(core(&port), &port, Version::B);
    d.submit_cyclic(0, SRC, 1000, 2);
    d.issue(0);
    d.work();
    assert_eq!(d.channels[0].done, [(0, false)], "one interrupt was seen, four packets are in the FIFO");
    assert_eq!(d.dma.fifo_level(), 4096);
    d.terminate(0);
    assert_eq!(d.dma.fifo_level(), 0);
}

#[test]
fn terminate_stops_in_time_unless_the_receiver_starves_as_on_real_cores() {
    for (halt_when_starved, expected) in [(true, true), (false, false)] {
        let port = port();
        let dma = build(AxiDmaConfig { halt_when_starved, ..s0() }, &port);
        let mut d = Driver::probe(dma, &port, Version::B);
        d.submit(1, vec![(DST, 100)]);
        d.issue(1);
        d.work();
        assert_eq!(d.terminate(1), expected, "or it prints: Cannot stop channel");
        assert!(d.terminate(0), "an idle channel stops");
        d.loop_once(100, 1);
        assert_eq!(d.channels[1].done, [(0, false)]);
    }
}

#[test]
fn an_iommu_fault_is_an_error_without_completion_and_terminate_recovers() {
    for version in VERSIONS {
        for (at, access, channel) in
            [(SRC, Access::Read, 0), (DST + 100, Access::Write, 1), (POOLS[1], Access::Read, 1)]
        {
            let port = port();
            let mut d = Driver::probe(core(&port), &port, version);
            port.add(at..at + 1, access, Rule::Terminate);
            d.loop_once(3000, 1);
            assert!(
                d.channels[channel].err && d.channels[channel].done.is_empty(),
                "the client sees a timeout"
            );
            assert!(d.dma.irq_levels() == [false; 2], "acknowledged");
            port.clear_rules();
            // The client terminates both channels, and the core is as new.
            d.terminate(0);
            d.terminate(1);
            let before = d.channels[1].done.len();
            port.put(SRC, &Random(11).bytes(3000));
            d.loop_once(3000, 3);
            assert_eq!(port.bytes(DST, 3000), port.bytes(SRC, 3000), "{version:?} {at:#x}");
            assert_eq!(d.channels[1].done[before..], [(0, false)]);
        }
    }
}

#[test]
fn a_client_that_submits_again_after_a_fault_without_terminating() {
    // What the failed receive looks like when the next one completes: 6.1 completes it, later ones if its status was
    // written (a payload error), and never get past it if it was not (a fetch error).
    for (version, at, access, completed) in [
        (Version::A, DST, Access::Write, 2),
        (Version::A, POOLS[1], Access::Read, 2),
        (Version::B, DST, Access::Write, 2),
        (Version::B, POOLS[1], Access::Read, 0),
        (Version::C, DST, Access::Write, 2),
        (Version::C, POOLS[1], Access::Read, 0),
    ] {
        let port = port();
        let mut d = Driver::probe(core(&port), &port, version);
        port.add(at..at + 1, access, Rule::Terminate);
        d.loop_once(500, 1);
        assert_eq!((d.channels[0].done.len(), d.channels[1].err), (1, true));
        port.clear_rules();
        port.put(SRC, &Random(12).bytes(500));
        d.submit(1, vec![(DST, 500)]);
        assert!(!d.channels[1].err, "the core was reset");
        assert_eq!(d.dma.fifo_level(), 0);
        d.issue(1);
        d.submit(0, vec![(SRC, 500)]);
        d.issue(0);
        d.work();
        assert_eq!(d.channels[1].done.len(), completed, "{version:?} {at:#x}");
        assert_eq!(port.bytes(DST, 500), port.bytes(SRC, 500), "the transfer itself is done");
    }
}

#[test]
fn a_reset_of_one_channel_kills_the_transfer_of_the_other_without_an_interrupt() {
    let port = port();
    let mut d = Driver::probe(core(&port), &port, Version::B);
    d.submit(0, vec![(SRC, 10_000)]);
    d.issue(0);
    d.work();
    d.terminate(1);
    d.work();
    assert!(d.channels[0].done.is_empty());
    assert_eq!(d.dma.sr(MM2S), 0x0001_0009);
    assert!(d.terminate(0), "halted already");
}

#[test]
fn removal_masks_interrupts_and_leaves_the_rest() {
    let port = port();
    let mut d = Driver::probe(core(&port), &port, Version::B);
    d.loop_once(100, 1);
    d.submit(0, vec![(SRC, 100)]);
    d.issue(0);
    d.dma.settle(2);
    for c in [0, 1] {
        d.rmw(c, 0x7000, 0);
    }
    assert_eq!(d.dma.irq_levels(), [false; 2]);
    assert_eq!((d.dma.sr(MM2S), d.dma.r(reg::DMACR)), (0x0001_100a, 0x0001_0003));
    // A new life of the driver resets before it listens; the stale bit is gone then, but not before.
    d.dma.w(reg::DMACR, 4);
    let mut again = Driver::probe(d.dma, &port, Version::C);
    again.loop_once(100, 1);
    assert_eq!(again.channels[1].done, [(0, false)]);
}
