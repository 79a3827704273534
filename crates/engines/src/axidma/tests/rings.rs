//! Scatter-gather: packets, the tail pointer, cyclic rings.

use super::*;

#[test]
fn a_packet_over_several_descriptors_arrives_in_order_with_its_boundaries() {
    let port = port();
    let mut dma = core(&port);
    let data = Random(1).bytes(100_000);
    port.put(SRC, &data);
    let tx = ring(&port, TX, &[(SRC, 30_000 | SOF), (SRC + 30_000, 1), (SRC + 30_001, 69_999 | EOF)]);
    let rx = ring(&port, RX, &[(DST, 65_536), (DST + 65_536, 65_536), (DST, 1)]);
    dma.go(MM2S, TX, tx);
    dma.go(S2MM, RX, rx);
    assert_eq!(dma.settle(3), Activity::Idle);
    assert_eq!(port.bytes(DST, 100_000), data);
    assert_eq!(statuses(&port, TX, 3), [CMPLT | 30_000, CMPLT | 1, CMPLT | 69_999]);
    assert_eq!(statuses(&port, RX, 3), [CMPLT | RXSOF | 65_536, CMPLT | RXEOF | 34_464, 0]);
    assert_eq!(dma.sr(MM2S), 0x0001_100a, "idle, IOC");
    assert_eq!(dma.sr(S2MM), 0x0001_1008, "one descriptor is still armed");
    assert_eq!(dma.r64(reg::CURDESC), tx);
    assert_eq!(dma.r64(S2MM + reg::CURDESC), rx);
}

#[test]
fn nothing_but_status_is_written_into_a_descriptor() {
    let port = port();
    let mut dma = core(&port);
    let tx = ring(&port, TX, &[(SRC, 16 | SOF | EOF), (SRC, 16)]);
    let rx = ring(&port, RX, &[(DST, 64), (DST, 64)]);
    port.count_writes();
    dma.go(MM2S, TX, tx);
    dma.go(S2MM, RX, rx);
    dma.settle(2);
    for base in [TX, RX] {
        assert!((base..base + 128).all(|at| port.writes(at)
            == u32::from(at % 64 >= 0x1c && at % 64 < 0x20 && (at < base + 64 || base == TX))));
    }
}

#[test]
fn a_short_packet_closes_its_buffer_and_the_next_one_goes_to_the_next() {
    let port = port();
    let mut dma = core(&port);
    port.put(SRC, &Random(2).bytes(300));
    let tx =
        ring(&port, TX, &[(SRC, 5 | SOF | EOF), (SRC + 100, 64 | SOF | EOF), (SRC + 200, 1 | SOF | EOF)]);
    let rx = ring(&port, RX, &[(DST, 64), (DST + 64, 64), (DST + 128, 64), (DST + 192, 64)]);
    dma.go(S2MM, RX, rx);
    dma.go(MM2S, TX, tx);
    dma.settle(2);
    let one = CMPLT | RXSOF | RXEOF;
    assert_eq!(statuses(&port, RX, 4), [one | 5, one | 64, one | 1, 0]);
    assert_eq!(port.bytes(DST, 5), port.bytes(SRC, 5));
    assert_eq!(port.bytes(DST + 5, 59), [0; 59]);
    assert_eq!(port.bytes(DST + 64, 64), port.bytes(SRC + 100, 64));
    assert_eq!(port.bytes(DST + 128, 2), [port.bytes(SRC + 200, 1)[0], 0]);
}

#[test]
fn a_full_buffer_without_tlast_is_complete_but_no_packet() {
    let port = port();
    let mut dma = core(&port);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 64 | SOF)]));
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 64)]));
    dma.settle(2);
    assert_eq!((status(&port, TX), status(&port, RX)), (CMPLT | 64, CMPLT | RXSOF | 64));
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_000a, 0x0001_000a), "idle, no interrupt");
}

#[test]
fn the_sender_waits_for_room_and_the_order_of_starting_does_not_matter() {
    let data = Random(3).bytes(50_000);
    for receiver_first in [true, false] {
        let port = port();
        let mut dma = core(&port);
        port.put(SRC, &data);
        let tx = ring(&port, TX, &[(SRC, 50_000 | SOF | EOF)]);
        let rx = ring(&port, RX, &[(DST, 50_000)]);
        let order =
            if receiver_first { [(S2MM, RX, rx), (MM2S, TX, tx)] } else { [(MM2S, TX, tx), (S2MM, RX, rx)] };
        dma.go(order[0].0, order[0].1, order[0].2);
        assert_eq!(dma.settle(2), Activity::Idle);
        assert_eq!(dma.fifo_level(), if receiver_first { 0 } else { 4096 });
        assert_eq!((status(&port, TX), status(&port, RX)), (0, 0));
        dma.go(order[1].0, order[1].1, order[1].2);
        assert_eq!(dma.settle(2), Activity::Idle);
        assert_eq!(port.bytes(DST, 50_000), data);
        assert_eq!(status(&port, RX), CMPLT | RXSOF | RXEOF | 50_000);
    }
}

#[test]
fn the_engine_pauses_at_the_tail_and_resumes_at_the_next_descriptor() {
    let port = port();
    let mut dma = core(&port);
    ring(&port, TX, &[(SRC, 8 | SOF | EOF); 6]);
    dma.go(MM2S, TX, TX + 64);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 6), [CMPLT | 8, CMPLT | 8, 0, 0, 0, 0]);
    assert_eq!((dma.sr(MM2S) & 3, dma.r64(reg::CURDESC)), (2, TX + 64));
    dma.w64(reg::CURDESC, TX);
    dma.tail(MM2S, TX + 3 * 64);
    assert_eq!(dma.sr(MM2S) & 3, 0);
    dma.settle(2);
    assert_eq!(statuses(&port, TX, 6), [CMPLT | 8, CMPLT | 8, CMPLT | 8, CMPLT | 8, 0, 0]);
    assert_eq!((dma.sr(MM2S) & 3, dma.r64(reg::CURDESC)), (2, TX + 3 * 64));
}

#[test]
fn a_single_descriptor_may_be_the_tail() {
    let port = port();
    let mut dma = core(&port);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 8 | SOF | EOF)]));
    dma.settle(2);
    assert_eq!((status(&port, TX), dma.sr(MM2S)), (CMPLT | 8, 0x0001_100a));
}

#[test]
fn cyclic_rings_ignore_tail_and_completion_until_stopped() {
    let port = port();
    let mut dma = core(&port);
    port.put(SRC, &Random(4).bytes(128));
    ring(&port, TX, &[(SRC, 64 | SOF), (SRC + 64, 64 | EOF)]);
    ring(&port, RX, &[(DST, 64), (DST + 64, 64)]);
    for (block, first) in [(MM2S, TX), (S2MM, RX)] {
        dma.w(block + reg::DMACR, 0x10);
        dma.start(block, first);
        dma.tail(block, RAM);
    }
    for _ in 0..10 {
        assert_eq!(dma.step(0), Activity::Busy);
    }
    assert_eq!(statuses(&port, TX, 2), [CMPLT | 64; 2]);
    assert_eq!(statuses(&port, RX, 2), [CMPLT | RXSOF | 64, CMPLT | RXEOF | 64]);
    assert_eq!(port.bytes(DST, 128), port.bytes(SRC, 128));
    assert_eq!((dma.sr(MM2S) & 0x5777, dma.sr(S2MM) & 0x5777), (IOC, IOC));
    dma.w(MM2S + reg::DMACR, 0x7010);
    dma.w(S2MM + reg::DMACR, 0x7010);
    assert_eq!(dma.settle(3), Activity::Idle);
    assert_eq!((dma.sr(MM2S) & 3, dma.sr(S2MM) & 3), (1, 1));
}

#[test]
fn addresses_and_links_above_4_gib_are_used_by_wide_cores_only() {
    let port = TestPort::new(0x8_0000_0000, 0x40_0000);
    let high = |at: u64| at - RAM + 0x8_0000_0000;
    let mut dma = core(&port);
    port.put(high(SRC), b"abcdefgh");
    let tx = ring(&port, high(TX), &[(high(SRC), 4 | SOF), (high(SRC) + 4, 4 | EOF)]);
    let rx = ring(&port, high(RX), &[(high(DST), 100)]);
    dma.go(MM2S, high(TX), tx);
    dma.go(S2MM, high(RX), rx);
    dma.settle(2);
    assert_eq!(port.bytes(high(DST), 8), b"abcdefgh");

    let port = super::port();
    let mut dma = build(AxiDmaConfig { address_bits: 32, ..s0() }, &port);
    port.put(SRC, b"abcdefgh");
    let up = |at: u64| at | 7 << 32;
    put(&port, TX, up(TX + 64), up(SRC), 4 | SOF);
    put(&port, TX + 64, up(TX), up(SRC + 4), 4 | EOF);
    put(&port, RX, 0, up(DST), 100);
    dma.start(MM2S, TX);
    dma.w(MM2S + reg::TAILDESC, (TX + 64) as u32);
    dma.start(S2MM, RX);
    dma.w(S2MM + reg::TAILDESC, RX as u32);
    dma.settle(2);
    assert_eq!(port.bytes(DST, 8), b"abcdefgh");
}
