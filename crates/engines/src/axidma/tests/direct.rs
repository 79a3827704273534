//! Direct mode: the build without a scatter-gather engine.

use portcullis_arch::Access;

use super::*;
use crate::testport::Rule;

fn running(port: &TestPort) -> AxiDma {
    let mut dma = direct(port);
    dma.w(MM2S + reg::DMACR, 0x7001);
    dma.w(S2MM + reg::DMACR, 0x7001);
    dma
}

#[test]
fn a_loop_completes_with_idle_and_ioc_on_both_sides() {
    let port = port();
    let mut dma = running(&port);
    let data = Random(1).bytes(60_000);
    port.put(SRC, &data);
    dma.transfer(S2MM, DST, 65_536);
    dma.transfer(MM2S, SRC, 60_000);
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_0000, 0x0001_0000));
    assert_eq!(dma.settle(2), Activity::Idle);
    assert_eq!(port.bytes(DST, 60_001)[..60_000], data);
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_1002, 0x0001_1002));
    assert_eq!((dma.r(MM2S + reg::LENGTH), dma.r(S2MM + reg::LENGTH)), (60_000, 60_000), "what was written");
    assert_eq!(dma.irq_levels(), [true; 2]);
}

#[test]
fn ioc_comes_with_every_transfer_whatever_the_threshold() {
    let port = port();
    let mut dma = running(&port);
    dma.w(MM2S + reg::DMACR, 0x0009_7001);
    for _ in 0..3 {
        dma.transfer(MM2S, SRC, 8);
        dma.settle(2);
        assert_eq!(dma.sr(MM2S) & 0x7003, IOC | 2);
        dma.w(MM2S + reg::DMASR, IOC);
    }
}

#[test]
fn length_is_ignored_while_halted_or_busy_and_zero_starts_nothing() {
    let port = port();
    let mut dma = direct(&port);
    dma.transfer(MM2S, SRC, 100);
    assert_eq!(dma.settle(1), Activity::Idle);
    dma.w(MM2S + reg::DMACR, 0x7001);
    assert_eq!(dma.settle(1), Activity::Idle);
    dma.transfer(MM2S, SRC, 0);
    assert_eq!(dma.settle(1), Activity::Idle);
    assert!(port.take_log().is_empty());
    dma.transfer(MM2S, SRC, 10_000);
    dma.settle(1);
    dma.transfer(MM2S, SRC, 5);
    assert_eq!((dma.r(MM2S + reg::LENGTH), dma.fifo_level()), (10_000, 4096));
}

#[test]
fn a_packet_longer_than_length_is_an_internal_error() {
    let port = port();
    let mut dma = running(&port);
    dma.transfer(MM2S, SRC, 100);
    dma.transfer(S2MM, DST, 99);
    dma.settle(2);
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_1002, 0x0001_4011), "errors 10");
    assert_eq!((dma.r(S2MM + reg::LENGTH), dma.fifo_level()), (99, 1));
    let mut dma = running(&port);
    dma.transfer(MM2S, SRC, 100);
    dma.transfer(S2MM, DST, 100);
    dma.settle(2);
    assert_eq!(dma.sr(S2MM), 0x0001_1002, "an exact fit is none");
}

#[test]
fn errors_of_memory_and_iommu() {
    // What is terminated or where nothing answers, and the two DMASRs.
    let slave = |at, access| (SRC, DST, Some((at, access)));
    for ((source, destination, rule), expected) in [
        (slave(SRC + 5, Access::Read), [0x0001_4021, 0x0001_0000]),
        (slave(DST + 5, Access::Write), [0x0001_1002, 0x0001_4031]),
        ((0x1000_0000, DST, None), [0x0001_4041, 0x0001_0000]),
        ((SRC, 0x1000_0000, None), [0x0001_1002, 0x0001_4051]),
    ] {
        let port = port();
        let mut dma = running(&port);
        if let Some((at, access)) = rule {
            port.add(at..at + 1, access, Rule::Terminate);
        }
        dma.transfer(S2MM, destination, 100);
        dma.transfer(MM2S, source, 100);
        dma.settle(2);
        assert_eq!([dma.sr(MM2S), dma.sr(S2MM)], expected);
        assert!(port.take_log().iter().all(|s| s.addr >= SRC || s.addr == 0x1000_0000), "no descriptors");
    }
}

#[test]
fn stopping_and_starting_again_is_as_before_the_first_transfer() {
    let port = port();
    let mut dma = running(&port);
    dma.transfer(MM2S, SRC, 8);
    dma.settle(2);
    dma.w(MM2S + reg::DMACR, 0x7000);
    assert_eq!(dma.sr(MM2S) & 3, 1);
    dma.w(MM2S + reg::DMACR, 0x7001);
    assert_eq!(dma.sr(MM2S) & 3, 0);
}
