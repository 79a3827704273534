//! Stalled transactions: a channel parks, the other goes on; and what software's decision makes of it.

use portcullis_arch::Access::{Read, Write};
use portcullis_bus::StallState;

use super::*;
use crate::testport::Rule;

fn both(port: &TestPort, length: u32) -> AxiDma {
    let mut dma = core(port);
    port.put(SRC, &Random(9).bytes(length as usize));
    dma.go(S2MM, RX, ring(port, RX, &[(DST, length)]));
    dma.go(MM2S, TX, ring(port, TX, &[(SRC, length | SOF | EOF)]));
    dma
}

fn stall(port: &TestPort, at: u64, access: portcullis_arch::Access) {
    port.add(at..at + 1, access, Rule::Stall);
}

#[test]
fn a_retried_loop_moves_every_byte_exactly_once() {
    let port = port();
    let places = [
        (RX, Read),
        (TX + 20, Read),
        (SRC, Read),
        (SRC + 5000, Read),
        (SRC + 19_999, Read),
        (DST, Write),
        (DST + 5001, Write),
        (DST + 19_998, Write),
        (TX + 0x1c, Write),
        (RX + 0x1c, Write),
    ];
    for (at, access) in places {
        stall(&port, at, access);
    }
    port.count_writes();
    let mut dma = both(&port, 20_000);
    let mut stalls = 0;
    while dma.settle(4) == Activity::Stalled {
        assert!(dma.is_stalled());
        port.take_log();
        assert_eq!(dma.step(0), Activity::Stalled);
        assert!(port.take_log().is_empty(), "no new access while it waits");
        stalls += port.waiting();
        port.resume_all(StallState::Retry);
    }
    assert_eq!(stalls, places.len());
    assert!(!dma.is_stalled());
    assert_eq!(port.bytes(DST, 20_000), port.bytes(SRC, 20_000));
    assert!((DST..DST + 20_000).all(|b| port.writes(b) == 1));
    assert_eq!((port.writes(DST + 20_000), port.writes(TX + 0x1c), port.writes(RX + 0x1c)), (0, 1, 1));
    assert_eq!((status(&port, TX), status(&port, RX)), (CMPLT | 20_000, CMPLT | RXSOF | RXEOF | 20_000));
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_100a, 0x0001_100a));
}

#[test]
fn the_other_channel_goes_on_as_far_as_the_fifo_reaches() {
    let port = port();
    stall(&port, DST + 100, Write);
    let mut dma = both(&port, 20_000);
    assert_eq!(dma.settle(3), Activity::Stalled);
    assert_eq!(dma.fifo_level(), 4096);
    assert_eq!((dma.sr(MM2S) & 3, dma.sr(S2MM) & 3), (0, 0));
}

#[test]
fn a_stall_terminated_with_an_abort_is_a_slave_error() {
    for (at, access, registers, bds) in [
        (TX, Read, [1 << 9, 0], [0, 0]),
        (RX, Read, [0, 1 << 9], [CMPLT | 100, 0]),
        (SRC + 30, Read, [1 << 5, 0], [CMPLT | 1 << 29 | 30, 0]),
        (DST + 30, Write, [0, 1 << 5], [CMPLT | 100, CMPLT | RXSOF | 1 << 29 | 30]),
        (TX + 0x1c, Write, [1 << 9, 0], [0, CMPLT | RXSOF | RXEOF | 100]),
        (RX + 0x1c, Write, [0, 1 << 9], [CMPLT | 100, 0]),
    ] {
        let port = port();
        stall(&port, at, access);
        let mut dma = both(&port, 100);
        assert_eq!(dma.settle(3), Activity::Stalled);
        port.resume_all(StallState::Terminated { abort: true });
        assert_eq!(dma.settle(3), Activity::Idle);
        assert_eq!([dma.sr(MM2S), dma.sr(S2MM)].map(|s| s & 0x770), registers, "{at:#x}");
        assert_eq!([status(&port, TX), status(&port, RX)], bds, "{at:#x}");
    }
}

#[test]
fn a_read_terminated_without_abort_is_one_burst_of_zeros() {
    let port = port();
    stall(&port, SRC + 70, Read);
    let mut dma = both(&port, 200);
    dma.settle(3);
    port.resume_all(StallState::Terminated { abort: false });
    dma.settle(3);
    let mut expected = port.bytes(SRC, 200);
    expected[70..128].fill(0);
    assert_eq!(port.bytes(DST, 200), expected);
    assert_eq!((status(&port, TX), dma.sr(MM2S)), (CMPLT | 200, 0x0001_100a));
}

#[test]
fn a_write_terminated_without_abort_loses_one_burst() {
    let port = port();
    stall(&port, DST + 70, Write);
    let mut dma = both(&port, 200);
    dma.settle(3);
    port.resume_all(StallState::Terminated { abort: false });
    dma.settle(3);
    let mut expected = port.bytes(SRC, 200);
    expected[70..128].fill(0);
    assert_eq!(port.bytes(DST, 200), expected);
    assert_eq!((status(&port, RX), dma.sr(S2MM)), (CMPLT | RXSOF | RXEOF | 200, 0x0001_100a));
}

#[test]
fn a_fetch_that_reads_zeros_is_a_descriptor_without_length() {
    let port = port();
    stall(&port, TX, Read);
    let mut dma = both(&port, 100);
    dma.settle(3);
    port.resume_all(StallState::Terminated { abort: false });
    dma.settle(3);
    assert_eq!((dma.sr(MM2S) & 0x770, status(&port, TX)), (1 << 4, CMPLT | 1 << 28));
}

#[test]
fn a_status_write_that_gets_lost_is_not_noticed() {
    let port = port();
    stall(&port, RX + 0x1c, Write);
    let mut dma = both(&port, 100);
    dma.settle(3);
    port.resume_all(StallState::Terminated { abort: false });
    dma.settle(3);
    assert_eq!((dma.sr(S2MM), status(&port, RX)), (0x0001_100a, 0));
}

#[test]
fn a_stopped_channel_halts_when_its_stall_is_decided() {
    let port = port();
    stall(&port, SRC + 50, Read);
    let mut dma = both(&port, 100);
    dma.settle(3);
    dma.w(MM2S + reg::DMACR, 0x7000);
    assert_eq!(dma.settle(2), Activity::Stalled);
    assert_eq!(dma.sr(MM2S) & 3, 0);
    port.resume_all(StallState::Retry);
    dma.settle(3);
    assert_eq!((dma.sr(MM2S) & 3, status(&port, TX)), (1, CMPLT | 100));
}

#[test]
fn a_reset_forgets_a_stall() {
    let port = port();
    stall(&port, SRC + 50, Read);
    let mut dma = both(&port, 100);
    dma.settle(3);
    dma.w(S2MM + reg::DMACR, 4);
    assert!(!dma.is_stalled());
    assert_eq!(dma.settle(1), Activity::Idle);
    assert_eq!((dma.sr(MM2S), status(&port, TX)), (0x0001_0009, 0));
}
