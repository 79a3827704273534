//! A replay of what Linux 6.12 `zynqmp_dma` does to the registers: probe, prepare, issue, interrupt, tasklet,
//! terminate. The driver's bookkeeping is re-told here as far as its register accesses depend on it.

use std::collections::VecDeque;

use portcullis_arch::Access;

use super::*;
use crate::testport::Rule;

const POOL: u64 = RAM + 0x2000;
const SLOTS: u64 = 32;

/// Descriptor pairs of one transaction: slot numbers in the pool.
type Transaction = Vec<u64>;

struct Driver {
    z: Zdma,
    port: TestPort,
    coherent: bool,
    free: VecDeque<u64>,
    pending: Vec<Transaction>,
    active: VecDeque<Transaction>,
    done: usize,
    idle: bool,
    err: bool,
    tasklet: bool,
}

impl Driver {
    fn probe(z: Zdma, port: &TestPort, coherent: bool) -> Self {
        let mut d = Self {
            z,
            port: port.clone(),
            coherent,
            free: (0..SLOTS).collect(),
            pending: Vec::new(),
            active: VecDeque::new(),
            done: 0,
            idle: false,
            err: false,
            tasklet: false,
        };
        d.init();
        d
    }

    fn init(&mut self) {
        let z = &mut self.z;
        z.w(reg::IDS, 0xfff);
        let isr = z.r(reg::ISR);
        z.w(reg::ISR, isr);
        if self.coherent {
            z.w(reg::DSCR_ATTR, 0x1f0);
        }
        let mut attr = z.r(reg::DATA_ATTR);
        if self.coherent {
            attr |= 0xf << 22 | 0xf << 8;
        }
        z.w(reg::DATA_ATTR, attr);
        z.r(reg::IRQ_SRC_ACCT);
        z.r(reg::IRQ_DST_ACCT);
        self.idle = true;
    }

    /// prep_memcpy and tx_submit of one transaction of `chunks` pairs.
    fn submit(&mut self, chunks: &[(u64, u64, usize)]) {
        let base = if self.coherent { 0x3 } else { 0x2 };
        let slots: Transaction = chunks.iter().map(|_| self.free.pop_front().unwrap()).collect();
        for (i, (src, dst, len)) in chunks.iter().enumerate() {
            let last = i + 1 == chunks.len();
            let next = slots.get(i + 1).copied();
            let (s, d) = if last { (base | 0x10, base | 0x14) } else { (base, base) };
            for (offset, address, ctrl) in [(0u64, *src, s), (32, *dst, d)] {
                let mut bytes = address.to_le_bytes().to_vec();
                bytes.extend((*len as u32).to_le_bytes());
                bytes.extend(u32::to_le_bytes(ctrl));
                bytes.extend(next.map_or(0, |n| POOL + n * 64 + offset).to_le_bytes());
                bytes.extend([0; 8]);
                self.port.put(POOL + slots[i] * 64 + offset, &bytes);
            }
        }
        if let Some(previous) = self.pending.last().and_then(|t| t.last()) {
            for offset in [0, 32] {
                let at = POOL + previous * 64 + offset;
                self.port.put(at + 16, &(POOL + slots[0] * 64 + offset).to_le_bytes());
                let ctrl = u32::from_le_bytes(self.port.bytes(at + 12, 4).try_into().unwrap());
                self.port.put(at + 12, &(ctrl & !0x10).to_le_bytes());
            }
        }
        self.pending.push(slots);
    }

    fn issue_pending(&mut self) {
        if !self.idle {
            return;
        }
        let z = &mut self.z;
        let ctrl0 = z.r(reg::CTRL0);
        z.w(reg::CTRL0, ctrl0 | 0x40);
        let attr = z.r(reg::DATA_ATTR);
        z.w(reg::DATA_ATTR, attr & !(0xf << 14 | 0xf) | 15 << 14 | 15);
        let Some(first) = self.pending.first().map(|t| t[0]) else { return };
        self.active.extend(self.pending.drain(..));
        z.w64(reg::SRC_START_LSB, POOL + first * 64);
        z.w64(reg::DST_START_LSB, POOL + first * 64 + 32);
        self.idle = false;
        z.w(reg::IEN, 0x7fd);
        z.w(reg::TOTAL_BYTE, 0);
        z.w(reg::CTRL2, 1);
    }

    fn irq(&mut self) {
        let z = &mut self.z;
        let (isr, imr) = (z.r(reg::ISR), z.r(reg::IMR));
        let status = isr & !imr;
        z.w(reg::ISR, isr);
        if status & 0x404 != 0 {
            self.tasklet = true;
        }
        if status & 0x400 != 0 {
            self.idle = true;
        }
        if status & 0x3c1 != 0 {
            self.err = true;
            self.tasklet = true;
        }
        if status & 0x38 != 0 {
            z.w(reg::TOTAL_BYTE, 0);
            z.r(reg::IRQ_DST_ACCT);
            z.r(reg::IRQ_SRC_ACCT);
        }
    }

    fn tasklet(&mut self) {
        if !std::mem::take(&mut self.tasklet) {
            return;
        }
        if std::mem::take(&mut self.err) {
            self.z.w(reg::IDS, 0xfff);
            self.complete();
            self.free_all();
            self.init();
            return;
        }
        for _ in 0..self.z.r(reg::IRQ_DST_ACCT) {
            self.complete();
        }
        if self.idle {
            self.issue_pending();
        }
    }

    fn complete(&mut self) {
        if let Some(t) = self.active.pop_front() {
            self.free.extend(t);
            self.done += 1;
        }
    }

    fn free_all(&mut self) {
        self.free.extend(self.active.drain(..).flatten());
        self.free.extend(self.pending.drain(..).flatten());
    }

    fn terminate_all(&mut self) {
        self.z.w(reg::IDS, 0xfff);
        self.free_all();
    }

    /// The board runs; interrupts are taken as they come.
    fn run(&mut self) {
        for _ in 0..1000 {
            let activity = self.z.step(0);
            if self.z.irq_level() {
                self.irq();
                assert!(!self.z.irq_level(), "the handler acknowledges everything");
                self.tasklet();
            } else if activity != Activity::Busy {
                return;
            }
        }
        panic!("still running");
    }
}

fn filled() -> TestPort {
    let port = port();
    port.put(SRC, &Random(42).bytes(0x8_0000));
    port
}

#[test]
fn probing_leaves_the_channel_quiet() {
    let port = filled();
    let mut d = Driver::probe(lpd(&port), &port, true);
    assert_eq!((d.z.r(reg::IMR), d.z.r(reg::ISR)), (0xfff, 0));
    assert_eq!(d.z.r(reg::DATA_ATTR), 0x07c3_df0f);
    assert_eq!(d.z.r(reg::DSCR_ATTR), 0x1f0);
    // issue_pending with an empty queue writes CTRL0 and DATA_ATTR and starts nothing.
    d.issue_pending();
    d.run();
    assert_eq!((d.z.r(reg::CTRL0), d.z.r(reg::STATUS), d.z.r(reg::ISR)), (0xc0, 0, 0));
    assert!(port.take_log().is_empty() && d.idle);
}

#[test]
fn a_memcpy_is_copied_and_completed_once() {
    for coherent in [false, true] {
        let port = filled();
        let mut d = Driver::probe(lpd(&port), &port, coherent);
        d.submit(&[(SRC + 0x7bf, DST + 0x8ad, 0x3fea)]);
        d.issue_pending();
        d.run();
        assert_eq!(port.bytes(DST + 0x8ad, 0x3fea), port.bytes(SRC + 0x7bf, 0x3fea));
        assert_eq!((d.done, d.idle, d.active.len()), (1, true, 0));
        assert_eq!(d.z.r(reg::TOTAL_BYTE), 0x3fea);
        assert_eq!(d.z.r(reg::ISR), 0);
    }
}

#[test]
fn one_issue_makes_one_list_with_one_count_per_transaction_and_one_done() {
    let port = filled();
    let mut d = Driver::probe(fpd(&port), &port, false);
    for i in 0..10u64 {
        let (src, dst) = (SRC + i * 0x1003, DST + i * 0x1005);
        d.submit(&[(src, dst, 0x801), (src + 0x801, dst + 0x801, 0x7ff), (src + 0x1000, dst + 0x1000, 1)]);
    }
    d.issue_pending();
    // Look at the hardware before the handler does.
    assert_eq!(d.z.settle(4), Activity::Idle);
    assert_eq!(d.z.r(reg::ISR), 0x404);
    assert_eq!(d.z.registers.get(reg::IRQ_DST_ACCT), 10);
    assert_eq!(d.z.registers.get(reg::IRQ_SRC_ACCT), 0, "Linux sets INTR on destinations only");
    d.run();
    assert_eq!((d.done, d.idle, d.free.len()), (10, true, 32));
    for i in 0..10u64 {
        assert_eq!(port.bytes(DST + i * 0x1005, 0x1001), port.bytes(SRC + i * 0x1003, 0x1001));
    }
}

#[test]
fn counts_are_there_before_done_whenever_the_handler_looks() {
    let port = filled();
    let mut d = Driver::probe(fpd(&port), &port, false);
    // Larger than one step, so that the first transaction completes in an earlier step than the list.
    d.submit(&[(SRC, DST, 0x1_8000)]);
    d.submit(&[(SRC + 0x1_8000, DST + 0x1_8000, 0x1_8000)]);
    d.issue_pending();
    let mut seen = Vec::new();
    while !d.idle {
        d.z.step(0);
        if d.z.irq_level() {
            let isr = d.z.r(reg::ISR);
            d.irq();
            let before = d.done;
            d.tasklet();
            seen.push((isr, d.done - before));
        }
    }
    assert_eq!(seen, [(0x4, 1), (0x404, 1)]);
}

#[test]
fn transactions_submitted_during_a_run_form_the_next_list() {
    let port = filled();
    let mut d = Driver::probe(fpd(&port), &port, false);
    d.submit(&[(SRC, DST, 0x3_0000)]);
    d.issue_pending();
    d.z.step(0);
    d.submit(&[(SRC + 0x3_0000, DST + 0x3_0000, 100)]);
    d.submit(&[(SRC + 0x4_0000, DST + 0x4_0000, 100)]);
    d.issue_pending();
    d.run();
    assert_eq!((d.done, d.idle), (3, true));
    assert_eq!(port.bytes(DST, 0x3_0064), port.bytes(SRC, 0x3_0064));
    assert_eq!(port.bytes(DST + 0x4_0000, 100), port.bytes(SRC + 0x4_0000, 100));
}

#[test]
fn after_a_fault_the_driver_loses_the_rest_and_can_start_again() {
    let port = filled();
    let mut d = Driver::probe(fpd(&port), &port, false);
    port.add(DST + 0x1800..DST + 0x1801, Access::Write, Rule::Terminate);
    for i in 0..3 {
        d.submit(&[(SRC + i * 0x1000, DST + i * 0x1000, 0x1000)]);
    }
    d.issue_pending();
    assert_eq!(d.z.settle(4), Activity::Idle);
    assert_eq!((d.z.r(reg::ISR), d.z.r(reg::STATUS), d.z.r(reg::CTRL2)), (0x604, 3, 0));
    d.run();
    assert_eq!(d.done, 1, "the first is completed, the others vanish");
    assert!(d.idle && d.active.is_empty());
    port.clear_rules();
    port.take_log();
    // The CTRL0 write of the next start must not run the old list.
    d.issue_pending();
    d.run();
    assert!(port.take_log().is_empty());
    d.submit(&[(SRC, DST + 0x4000, 0x1000)]);
    d.issue_pending();
    d.run();
    assert_eq!(port.bytes(DST + 0x4000, 0x1000), port.bytes(SRC, 0x1000));
    assert_eq!(d.done, 2);
}

#[test]
fn after_terminate_all_the_engine_still_writes_and_stays_masked() {
    let port = filled();
    let mut d = Driver::probe(fpd(&port), &port, false);
    d.submit(&[(SRC, DST, 0x2_0000)]);
    d.issue_pending();
    d.z.step(0);
    d.terminate_all();
    assert_eq!(d.z.settle(4), Activity::Idle);
    assert_eq!(port.bytes(DST, 0x2_0000), port.bytes(SRC, 0x2_0000), "EN was not cleared");
    assert!(!d.z.irq_level() && d.z.r(reg::ISR) == 0x404);
    // Not idle for the driver: later starts return early.
    d.submit(&[(SRC, DST + 0x4_0000, 16)]);
    d.issue_pending();
    d.run();
    assert_eq!((d.done, port.bytes(DST + 0x4_0000, 16)), (0, vec![0; 16]));
    // The channel is freed and requested again: the old bits interrupt at once, the old count completes early.
    d.free_all();
    d.idle = true;
    d.submit(&[(SRC, DST + 0x4_0000, 0x2_0000)]);
    d.issue_pending();
    assert!(d.z.irq_level(), "before anything has moved");
    d.irq();
    d.tasklet();
    assert_eq!((d.done, d.z.r(reg::TOTAL_BYTE)), (1, 0));
}
