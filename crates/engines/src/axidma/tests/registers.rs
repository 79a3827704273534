//! The register map as software sees it, against the manual's literal values.

use std::sync::{Arc, Mutex};

use portcullis_bus::{BusError, IrqLevels, mmio::Mmio};

use super::*;

/// Offset in a block, what reads after writing ones, of an SG and of a direct build.
const ONES: [(u32, u32, u32); 9] = [
    (0x00, 0xffff_701b, 0xffff_701b),
    (0x04, 0x00ff_000a, 0x00ff_0000),
    (0x08, 0, 0),
    (0x0c, 0, 0),
    (0x10, 0xffff_ffc0, 0),
    (0x14, 0xffff_ffff, 0),
    (0x18, 0, 0xffff_ffff),
    (0x1c, 0, 0xffff_ffff),
    (0x28, 0, 0x03ff_ffff),
];

#[test]
fn reset_values() {
    for (sg, dmasr) in [(true, 0x0001_0009), (false, 0x0001_0001)] {
        let mut dma = build(AxiDmaConfig { sg, ..s0() }, &port());
        for block in [MM2S, S2MM] {
            let values: Vec<u32> = (0..0x30).step_by(4).map(|at| dma.r(block + at)).collect();
            assert_eq!(values[..2], [0x0001_0002, dmasr]);
            assert!(values[2..].iter().all(|v| *v == 0));
        }
        assert_eq!(dma.irq_levels(), [false; 2]);
    }
}

#[test]
fn only_the_bits_that_exist_can_be_written() {
    for sg in [true, false] {
        for block in [MM2S, S2MM] {
            let mut dma = build(AxiDmaConfig { sg, ..s0() }, &port());
            for (at, in_sg, in_direct) in ONES {
                // All but the reset bit. RS is set from the first write on, which makes CURDESC read-only.
                dma.w(block + at, if at == 0 { !4 } else { !0 });
                assert_eq!(dma.r(block + at), if sg { in_sg } else { in_direct }, "{sg} {block:#x} {at:#x}");
            }
        }
    }
}

#[test]
fn curdesc_is_writable_only_while_halted() {
    let mut dma = core(&port());
    dma.w64(reg::CURDESC, u64::MAX);
    assert_eq!(dma.r64(reg::CURDESC), !0x3f);
    dma.start(MM2S, TX);
    dma.w64(reg::CURDESC, RX);
    assert_eq!(dma.r64(reg::CURDESC), TX);
    dma.w(reg::DMACR, 0);
    dma.w64(reg::CURDESC, RX);
    assert_eq!(dma.r64(reg::CURDESC), RX);
}

#[test]
fn a_core_of_32_bits_has_no_upper_halves() {
    let port = port();
    let mut dma = build(AxiDmaConfig { address_bits: 32, ..s0() }, &port);
    for at in [reg::CURDESC, reg::TAILDESC] {
        dma.w64(at, u64::MAX);
        assert_eq!((dma.r(at), dma.r(at + 4)), (0xffff_ffc0, 0));
    }
    let mut dma = build(AxiDmaConfig { address_bits: 40, sg: false, ..s0() }, &port);
    dma.w64(reg::ADDRESS, u64::MAX);
    assert_eq!(dma.r64(reg::ADDRESS), 0xff_ffff_ffff);
}

#[test]
fn the_length_has_as_many_bits_as_the_core_was_built_with() {
    let port = port();
    for (bits, expected) in [(8, 0xff), (14, 0x3fff), (26, 0x3ff_ffff), (40, 0x3ff_ffff), (1, 0xff)] {
        let mut dma = build(AxiDmaConfig { sg: false, length_bits: bits, ..s0() }, &port);
        dma.w(reg::DMACR, 1);
        dma.w(reg::LENGTH, u32::MAX);
        assert_eq!(dma.r(reg::LENGTH), expected, "{bits}");
    }
}

#[test]
fn a_threshold_of_0_is_stored_as_1() {
    let mut dma = core(&port());
    dma.w(reg::DMACR, 0x0000_7000);
    assert_eq!((dma.r(reg::DMACR), dma.sr(MM2S)), (0x0001_7002, 0x0001_0009));
}

#[test]
fn halted_clears_on_rs_alone_and_nothing_is_fetched() {
    let port = port();
    let mut dma = core(&port);
    dma.start(MM2S, TX);
    assert_eq!(dma.sr(MM2S), 0x0001_000a, "not halted, idle");
    assert_eq!(dma.settle(1), Activity::Idle);
    assert!(port.take_log().is_empty());
    let mut dma = direct(&port);
    dma.w(reg::DMACR, 1);
    assert_eq!(dma.sr(MM2S), 0x0001_0000, "not idle before the first transfer");
}

#[test]
fn what_is_not_decoded_reads_0_and_other_sizes_are_refused() {
    let mut dma = core(&port());
    for at in [0x20, 0x24, 0x2c, 0x50, 0x54, 0x5c, 0x60, 0xffc, 0x1000, !3] {
        dma.w(at, u32::MAX);
        assert_eq!(dma.r(at), 0, "{at:#x}");
    }
    assert_eq!(dma.r(0), 0x0001_0002);
    let window = Mutex::new(dma);
    assert_eq!(window.mmio_read(0, &mut [0; 8]), Err(BusError::Slave));
    assert_eq!(window.mmio_write(2, &[0; 4]), Err(BusError::Slave));
}

#[test]
fn a_reset_of_either_channel_resets_the_core_and_wins_over_rs() {
    for block in [MM2S, S2MM] {
        let port = port();
        let sink = Arc::new(IrqLevels::default());
        let line = |n| IrqLine::new(sink.clone(), n);
        let mut dma = AxiDma::new(s0(), Box::new(port.clone()), line(89), line(90));
        let fresh = dma.registers();
        let tx = ring(&port, TX, &[(SRC, 100 | SOF | EOF), (SRC, 100 | SOF | EOF)]);
        let rx = ring(&port, RX, &[(DST, 100)]);
        dma.go(MM2S, TX, tx);
        dma.go(S2MM, RX, rx);
        assert_eq!(dma.settle(3), Activity::Idle);
        assert_eq!((dma.irq_levels(), sink.pending()), ([true; 2], vec![89, 90]));
        assert_eq!(dma.fifo_level(), 100);
        dma.w(block + reg::DMACR, 0x0001_7007);
        assert_eq!(dma.registers(), fresh);
        assert_eq!((dma.irq_levels(), sink.pending()), ([false; 2], vec![]));
        assert_eq!(dma.fifo_level(), 0);
    }
}

#[test]
fn data_in_the_fifo_survives_a_reset_where_the_fifo_is_not_reset_with_the_core() {
    let port = port();
    let mut dma = build(AxiDmaConfig { fifo_reset_with_core: false, ..s0() }, &port);
    port.put(SRC, b"fragment");
    ring(&port, TX, &[(SRC, 8 | SOF), (SRC, 8 | EOF)]);
    dma.go(MM2S, TX, TX);
    dma.settle(2);
    dma.w(reg::DMACR, 4);
    assert_eq!(dma.fifo_level(), 8);
    port.put(SRC, b"new data");
    let tx = ring(&port, TX, &[(SRC, 8 | SOF | EOF)]);
    let rx = ring(&port, RX, &[(DST, 100)]);
    dma.go(S2MM, RX, rx);
    dma.go(MM2S, TX, tx);
    dma.settle(2);
    assert_eq!(port.bytes(DST, 16), b"fragmentnew data");
    assert_eq!(status(&port, RX), CMPLT | RXSOF | RXEOF | 16);
    Engine::reset(&mut dma);
    assert_eq!(dma.fifo_level(), 0);
}

#[test]
fn each_master_has_its_stream_and_the_configured_attributes() {
    use portcullis_arch::{Access, Attributes, Shareability};
    for coherent in [false, true] {
        let port = port();
        let mut dma = build(AxiDmaConfig { coherent, axcache: 0xf, ..s0() }, &port);
        dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 10 | SOF | EOF)]));
        dma.go(S2MM, RX, ring(&port, RX, &[(DST, 10)]));
        dma.settle(2);
        let attrs = Attributes::from_axi(0xf, 0b010);
        let attrs = if coherent { attrs.with_shareability(Shareability::Outer) } else { attrs };
        let log: Vec<_> = port.take_log();
        assert!(log.iter().all(|s| s.from.attrs == attrs && s.from.substream.is_none()));
        let seen =
            |addr| log.iter().filter(move |s| s.addr == addr).map(|s| (s.from.stream.0, s.access, s.len));
        assert_eq!(seen(TX).collect::<Vec<_>>(), [(0xe80, Access::Read, 32)]);
        assert_eq!(seen(RX).collect::<Vec<_>>(), [(0xe80, Access::Read, 32)]);
        assert_eq!(seen(SRC).collect::<Vec<_>>(), [(0xe81, Access::Read, 10)]);
        assert_eq!(seen(DST).collect::<Vec<_>>(), [(0xe82, Access::Write, 10)]);
        assert_eq!(seen(TX + 0x1c).collect::<Vec<_>>(), [(0xe80, Access::Write, 4)]);
        assert_eq!(seen(RX + 0x1c).collect::<Vec<_>>(), [(0xe80, Access::Write, 4)]);
        assert_eq!(log.len(), 6);
    }
}
