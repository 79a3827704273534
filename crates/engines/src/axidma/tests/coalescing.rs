//! Interrupt threshold and delay timer.

use super::*;

const ONE: u32 = 8 | SOF | EOF;
/// One unit of IRQDelay at 100 MHz, in nanoseconds.
const UNIT: u64 = 1250;

/// A sender with this DMACR, whose ring has `n` packets of one descriptor; the receiver takes them all.
fn sender(port: &TestPort, control: u32, n: usize) -> AxiDma {
    let mut dma = core(port);
    ring(port, TX, &vec![(SRC, ONE); n]);
    dma.w(reg::DMACR, control);
    dma.start(MM2S, TX);
    dma.go(S2MM, RX, ring(port, RX, &vec![(DST, 8); n + 1]));
    dma
}

#[test]
fn the_threshold_counts_packets_not_descriptors() {
    let port = port();
    let mut dma = core(&port);
    let packet = [(SRC, 4 | SOF), (SRC, 4), (SRC, 4 | EOF)];
    ring(&port, TX, &[packet, packet, packet].concat());
    dma.w(reg::DMACR, 0x0002_7000);
    assert_eq!(dma.sr(MM2S) >> 16, 2);
    dma.go(MM2S, TX, TX + 3 * 64);
    dma.settle(2);
    assert_eq!(dma.sr(MM2S), 0x0001_000a, "one packet and a piece");
    dma.tail(MM2S, TX + 5 * 64);
    dma.settle(2);
    assert_eq!(dma.sr(MM2S), 0x0002_100a, "reached and reloaded");
    dma.w(reg::DMASR, IOC);
    dma.tail(MM2S, TX + 8 * 64);
    dma.settle(2);
    assert_eq!((dma.sr(MM2S), dma.irq_levels()[0]), (0x0001_000a, false));
}

#[test]
fn a_changed_threshold_reloads_the_count_and_an_equal_one_does_not() {
    let port = port();
    let mut dma = sender(&port, 0x0003_7000, 4);
    dma.tail(MM2S, TX);
    dma.settle(2);
    assert_eq!(dma.sr(MM2S) >> 16, 2);
    dma.w(reg::DMACR, 0x0003_7001);
    assert_eq!(dma.sr(MM2S) >> 16, 2);
    dma.w(reg::DMACR, 0x0002_7001);
    assert_eq!(dma.sr(MM2S) >> 16, 2);
    dma.tail(MM2S, TX + 2 * 64);
    dma.settle(2);
    assert_eq!(dma.sr(MM2S) & 0xff_7000, 2 << 16 | IOC);
}

#[test]
fn the_line_is_the_or_of_enabled_bits_and_follows_enables_and_acknowledgement() {
    let port = port();
    let mut dma = sender(&port, 0, 4);
    dma.w(reg::DMACR, 0x0001_0001);
    dma.tail(MM2S, TX);
    dma.settle(2);
    assert_eq!((dma.sr(MM2S) & 0x7000, dma.irq_levels()[0]), (IOC, false));
    dma.w(reg::DMACR, 0x0001_1001);
    assert!(dma.irq_levels()[0]);
    dma.w(reg::DMASR, DLY | ERR | 0xfff);
    assert!(dma.irq_levels()[0], "others were acknowledged");
    dma.w(reg::DMASR, IOC);
    assert_eq!((dma.sr(MM2S) & 0x7000, dma.irq_levels()[0]), (0, false));
}

#[test]
fn the_delay_timer_reports_packets_below_the_threshold() {
    let port = port();
    let mut dma = sender(&port, 0x0405_7000, 4);
    dma.tail(MM2S, TX + 64);
    assert_eq!(dma.step(1000), Activity::Until(1000 + 4 * UNIT));
    assert_eq!(dma.sr(MM2S), 0x0003_000a);
    assert_eq!(dma.step(1000 + 2 * UNIT), Activity::Until(1000 + 4 * UNIT));
    assert_eq!(dma.sr(MM2S), 0x0203_000a, "the timer's value");
    assert_eq!(dma.step(999 + 4 * UNIT), Activity::Until(1000 + 4 * UNIT));
    assert_eq!(dma.step(1000 + 4 * UNIT), Activity::Idle);
    assert_eq!((dma.sr(MM2S), dma.irq_levels()[0]), (0x0005_200a, true), "reported, threshold reloaded");
    dma.w(reg::DMASR, DLY);
    assert_eq!(dma.step(90_000), Activity::Idle, "once");
    assert_eq!(dma.sr(MM2S), 0x0005_000a);
}

#[test]
fn the_next_packet_starts_the_timer_again() {
    let port = port();
    let mut dma = sender(&port, 0x0405_7000, 4);
    dma.tail(MM2S, TX);
    dma.step(0);
    dma.tail(MM2S, TX + 64);
    assert_eq!(dma.step(3 * UNIT), Activity::Until(7 * UNIT));
    assert_eq!(dma.step(5 * UNIT), Activity::Until(7 * UNIT));
}

#[test]
fn the_timer_stands_still_inside_a_packet() {
    let port = port();
    let mut dma = core(&port);
    dma.w(S2MM + reg::DMACR, 0x0405_7000);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 64); 3]));
    ring(&port, TX, &[(SRC, ONE), (SRC, 4 | SOF), (SRC, 4 | EOF)]);
    dma.go(MM2S, TX, TX + 64);
    assert_eq!(dma.step(0), Activity::Idle, "the second packet has begun");
    dma.tail(MM2S, TX + 128);
    assert_eq!(dma.step(9 * UNIT), Activity::Until(13 * UNIT));
}

#[test]
fn the_threshold_interrupt_stops_the_timer() {
    let port = port();
    let mut dma = sender(&port, 0x0402_7000, 4);
    dma.tail(MM2S, TX + 64);
    assert_eq!(dma.step(0), Activity::Idle);
    assert_eq!(dma.step(100 * UNIT), Activity::Idle);
    assert_eq!(dma.sr(MM2S) & 0x7000, IOC);
}

#[test]
fn the_timer_does_not_run_while_stopped_or_while_its_interrupt_is_pending() {
    let port = port();
    let mut dma = sender(&port, 0x0409_7000, 4);
    dma.tail(MM2S, TX);
    assert_eq!(dma.step(0), Activity::Until(4 * UNIT));
    dma.step(4 * UNIT);
    dma.tail(MM2S, TX + 64);
    assert_eq!(dma.step(5 * UNIT), Activity::Idle, "pending");
    dma.w(reg::DMASR, DLY);
    assert_eq!(dma.step(20 * UNIT), Activity::Until(24 * UNIT));
    dma.w(reg::DMACR, 0x0409_7000);
    assert_eq!(dma.step(30 * UNIT), Activity::Idle, "stopped");
    assert_eq!(dma.sr(MM2S) & 0x7000, 0);
}

#[test]
fn data_and_status_are_visible_before_the_interrupt() {
    // The interrupt line rises at the end of the step that wrote both; a stalled status write holds it back.
    use crate::testport::Rule;
    let port = port();
    let mut dma = sender(&port, 0x0001_7000, 1);
    port.add(RX + bd::STATUS..RX + bd::STATUS + 4, portcullis_arch::Access::Write, Rule::Stall);
    dma.tail(MM2S, TX);
    assert_eq!(dma.settle(2), Activity::Stalled);
    assert_eq!((dma.sr(S2MM) & 0x7002, dma.irq_levels()), (0, [true, false]));
    port.resume_all(portcullis_bus::StallState::Retry);
    dma.settle(2);
    assert_eq!((status(&port, RX), dma.irq_levels()), (CMPLT | RXSOF | RXEOF | 8, [true, true]));
}
