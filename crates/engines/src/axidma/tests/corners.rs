//! Corner cases of the tail pointer, of stopping and of starting again.

use super::*;

const ONE: u32 = 8 | SOF | EOF;
const DONE: u32 = CMPLT | 8;

#[test]
fn a_descriptor_beyond_the_tail_is_neither_fetched_nor_executed() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 4]);
    dma.go(MM2S, TX, TX);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 4), [DONE, 0, 0, 0]);
    assert!(port.take_log().iter().all(|s| s.addr < TX + 64 || s.addr >= SRC));
}

#[test]
fn on_a_wide_core_the_low_half_of_the_tail_starts_and_moves_nothing() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 4]);
    dma.start(MM2S, TX);
    dma.w(reg::TAILDESC, TX as u32);
    dma.settle(1);
    assert!(port.take_log().is_empty());
    dma.w(reg::TAILDESC_MSB, 0);
    // Queued up to the first; the low half of a new tail does not count before its high half.
    dma.w(reg::TAILDESC, (TX + 128) as u32);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 4), [DONE, 0, 0, 0]);
    dma.w(reg::TAILDESC_MSB, 0);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 4), [DONE, DONE, DONE, 0]);
}

#[test]
fn a_tail_written_while_halted_starts_nothing() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 2]);
    dma.tail(MM2S, TX + 64);
    dma.start(MM2S, TX);
    dma.settle(1);
    assert!(port.take_log().is_empty());
    assert_eq!((dma.r64(reg::TAILDESC), dma.sr(MM2S) & 3), (TX + 64, 2));
    dma.tail(MM2S, TX + 64);
    dma.settle(1);
    assert_eq!(statuses(&port, TX, 2), [DONE; 2]);
}

#[test]
fn the_same_tail_again_walks_the_ring_until_it_comes_round() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 3]);
    dma.go(MM2S, TX, TX);
    dma.settle(2);
    port.put(TX + bd::STATUS, &[0; 4]);
    dma.tail(MM2S, TX);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 3), [DONE; 3]);
    assert_eq!((dma.sr(MM2S), dma.r64(reg::CURDESC)), (0x0001_100a, TX));
}

#[test]
fn a_tail_behind_the_engine_makes_it_run_into_a_completed_descriptor() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 4]);
    dma.go(MM2S, TX, TX + 64);
    dma.settle(2);
    // Neither of these will ever be met: the ring's first descriptor is still complete.
    dma.tail(MM2S, TX + 64);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 4), [DONE; 4]);
    assert_eq!(dma.sr(MM2S) & 0x7773, 1 | 1 << 8 | IOC | ERR, "SGIntErr");
    assert_eq!(dma.r64(reg::CURDESC), TX);
}

#[test]
fn a_tail_written_while_the_last_descriptor_is_in_work_loses_nothing() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, 10_000 | SOF | EOF), (SRC, ONE), (SRC, ONE)]);
    dma.go(MM2S, TX, TX);
    dma.settle(1);
    assert_eq!(dma.fifo_level(), 4096, "in work");
    dma.tail(MM2S, TX + 128);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 20_000); 4]));
    dma.settle(3);
    assert_eq!(statuses(&port, TX, 3), [CMPLT | 10_000, DONE, DONE]);
    assert_eq!(dma.sr(MM2S) & 3, 2);
}

#[test]
fn stopping_an_idle_channel_halts_it_at_once() {
    let port = port();
    let mut dma = core(&port);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, ONE)]));
    dma.settle(2);
    dma.w(reg::DMACR, 0x7000);
    assert_eq!(dma.sr(MM2S), 0x0001_1009);
    // Queued, but not begun.
    dma.go(MM2S, TX, TX);
    dma.w(reg::DMACR, 0x7000);
    assert_eq!(dma.sr(MM2S) & 3, 1);
}

#[test]
fn stopping_finishes_the_descriptor_in_work_and_no_other() {
    let port = port();
    let mut dma = core(&port);
    let tx = ring(&port, TX, &[(SRC, 300_000 | SOF | EOF), (SRC, ONE)]);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 400_000); 2]));
    dma.go(MM2S, TX, tx);
    assert_eq!(dma.step(0), Activity::Busy);
    dma.w(reg::DMACR, 0x7000);
    assert_eq!(dma.sr(MM2S) & 3, 0, "with some lag");
    dma.settle(2);
    assert_eq!(dma.sr(MM2S) & 3, 1);
    assert_eq!(statuses(&port, TX, 2), [CMPLT | 300_000, 0]);
    assert_eq!(dma.sr(S2MM) & 3, 0, "the other channel is not concerned");
}

#[test]
fn a_starved_receiver_halts_at_once_or_when_data_comes() {
    for halt_when_starved in [true, false] {
        let port = port();
        let mut dma = build(AxiDmaConfig { halt_when_starved, ..s0() }, &port);
        dma.go(S2MM, RX, ring(&port, RX, &[(DST, 64), (DST, 64)]));
        dma.settle(1);
        dma.w(S2MM + reg::DMACR, 0x7000);
        assert_eq!(dma.settle(1), Activity::Idle);
        assert_eq!(dma.sr(S2MM) & 3, u32::from(halt_when_starved));
        assert_eq!(status(&port, RX), 0);
        dma.go(MM2S, TX, ring(&port, TX, &[(SRC, ONE)]));
        dma.settle(2);
        assert_eq!(dma.sr(S2MM) & 3, 1);
        assert_eq!(status(&port, RX), if halt_when_starved { 0 } else { DONE | RXSOF | RXEOF });
    }
}

#[test]
fn a_new_start_begins_at_curdesc() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, ONE); 4]);
    dma.go(MM2S, TX, TX);
    dma.settle(2);
    dma.w(reg::DMACR, 0x7000);
    dma.go(MM2S, TX + 128, TX + 128);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 4), [DONE, 0, DONE, 0]);
}

#[test]
fn setting_rs_again_before_the_halt_goes_on() {
    let port = port();
    let mut dma = build(AxiDmaConfig { halt_when_starved: false, ..s0() }, &port);
    ring(&port, TX, &[(SRC, 10_000 | SOF | EOF), (SRC, ONE)]);
    dma.go(MM2S, TX, TX + 64);
    dma.settle(1);
    dma.w(reg::DMACR, 0x7000);
    dma.settle(1);
    dma.w(reg::DMACR, 0x7001);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 20_000); 3]));
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 2), [CMPLT | 10_000, DONE]);
    assert_eq!(dma.sr(MM2S) & 3, 2);
}

#[test]
fn an_endless_ring_is_worked_on_in_bounded_steps() {
    let port = port();
    let mut dma = core(&port);
    for (block, base, buffer) in [(MM2S, TX, SRC), (S2MM, RX, DST)] {
        ring(&port, base, &[(buffer, 1 | EOF)]);
        dma.w(block + reg::DMACR, 0x11);
        dma.w64(block + reg::CURDESC, base);
        dma.w(block + reg::DMACR, 0x10);
        dma.go(block, base, RAM);
    }
    port.take_log();
    assert_eq!(dma.step(0), Activity::Busy);
    assert!(port.take_log().len() <= 2 * super::super::STEP_ACTIONS as usize);
}
