//! Errors: what is reported where, and that only a reset helps.

use portcullis_arch::Access;

use super::*;
use crate::testport::Rule;

const SLV: u32 = 1 << 29;
const DEC: u32 = 1 << 30;
const INT: u32 = 1 << 28;
/// An address where no memory answers.
const NOWHERE: u64 = 0x1000_0000;

/// A loop of one packet of 100 bytes; `prepare` spoils it. Returns DMASR's error and interrupt bits and BD status,
/// of MM2S and of S2MM.
fn run(prepare: impl FnOnce(&TestPort)) -> [(u32, u32); 2] {
    let port = port();
    let mut dma = core(&port);
    let tx = ring(&port, TX, &[(SRC, 100 | SOF | EOF)]);
    let rx = ring(&port, RX, &[(DST, 200)]);
    prepare(&port);
    dma.go(S2MM, RX, rx);
    dma.go(MM2S, TX, tx);
    assert_eq!(dma.settle(3), Activity::Idle);
    [(MM2S, TX), (S2MM, RX)].map(|(block, bd)| {
        let status_register = dma.sr(block);
        if status_register & 0x770 != 0 {
            assert_eq!(status_register & 3, 1, "halted");
            assert_eq!(dma.r(block + reg::DMACR) & 1, 0, "RS is cleared");
            assert_eq!(dma.r64(block + reg::CURDESC), bd, "frozen at the descriptor");
            assert!(dma.irq_levels()[usize::from(block == S2MM)]);
        }
        (status_register & 0x7770, status(&port, bd))
    })
}

fn terminate(at: u64, len: u64, access: Access) -> impl FnOnce(&TestPort) {
    move |port| port.add(at..at + len, access, Rule::Terminate)
}

#[test]
fn the_iommu_terminates_each_kind_of_access() {
    use Access::{Read, Write};
    let good = CMPLT | 100;
    let got = (IOC, CMPLT | RXSOF | RXEOF | 100);
    let armed = (0, 0);
    // A packet that ends early has no TLAST: the receiver waits on.
    assert_eq!(run(|_| {}), [(IOC, good), got]);
    assert_eq!(run(terminate(TX, 64, Read)), [(1 << 9 | ERR, 0), armed]);
    assert_eq!(run(terminate(RX, 64, Read)), [(IOC, good), (1 << 9 | ERR, 0)]);
    assert_eq!(run(terminate(SRC + 40, 1, Read)), [(1 << 5 | ERR, CMPLT | SLV | 40), armed]);
    assert_eq!(run(terminate(DST + 40, 1, Write)), [(IOC, good), (1 << 5 | ERR, CMPLT | SLV | RXSOF | 40)]);
    assert_eq!(run(terminate(TX + 0x1c, 4, Write)), [(1 << 9 | ERR, 0), got]);
    assert_eq!(run(terminate(RX + 0x1c, 4, Write)), [(IOC, good), (1 << 9 | ERR, 0)]);
    // A payload error whose report is lost shows both.
    let both = run(|port| {
        terminate(SRC, 1, Read)(port);
        terminate(TX + 0x1c, 4, Write)(port);
    });
    assert_eq!(both, [(1 << 9 | 1 << 5 | ERR, 0), armed]);
}

#[test]
fn nothing_answers_is_a_decode_error() {
    let good = CMPLT | 100;
    let armed = (0, 0);
    let source = run(|port| put(port, TX, TX, NOWHERE, 100 | SOF | EOF));
    assert_eq!(source, [(1 << 6 | ERR, CMPLT | DEC), armed]);
    let destination = run(|port| put(port, RX, RX, NOWHERE, 100));
    assert_eq!(destination, [(IOC, good), (1 << 6 | ERR, CMPLT | DEC)]);
    for (block, other) in [(MM2S, S2MM), (S2MM, MM2S)] {
        let mut dma = core(&port());
        dma.go(block, NOWHERE, NOWHERE);
        dma.settle(2);
        assert_eq!((dma.sr(block), dma.r64(block + reg::CURDESC)), (0x0001_4409, NOWHERE), "SGDecErr");
        assert_eq!(dma.sr(other), 0x0001_0009);
    }
}

#[test]
fn a_completed_descriptor_is_an_sg_internal_error_and_is_not_written() {
    let stale = CMPLT | 7;
    let spoil = |at: u64| move |port: &TestPort| port.put(at + 0x1c, &stale.to_le_bytes());
    assert_eq!(run(spoil(TX)), [(1 << 8 | ERR, stale), (0, 0)]);
    assert_eq!(run(spoil(RX)), [(IOC, CMPLT | 100), (1 << 8 | ERR, stale)]);
}

#[test]
fn a_descriptor_without_length_is_a_dma_internal_error() {
    assert_eq!(run(|port| put(port, TX, TX, SRC, SOF | EOF)), [(1 << 4 | ERR, CMPLT | INT), (0, 0)]);
    assert_eq!(run(|port| put(port, RX, RX, DST, 0)), [(IOC, CMPLT | 100), (1 << 4 | ERR, CMPLT | INT)]);
    // As is one whose length has only bits that the core was built without.
    let port = port();
    let mut dma = build(AxiDmaConfig { length_bits: 14, ..s0() }, &port);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 0x4000 | SOF | EOF)]));
    dma.settle(2);
    assert_eq!(dma.sr(MM2S) & 0x7770, 1 << 4 | ERR);
}

/// A sender that died in the middle of its packet.
fn dead(port: &TestPort) -> AxiDma {
    let mut dma = core(port);
    port.add(SRC + 40..SRC + 41, Access::Read, Rule::Terminate);
    dma.go(MM2S, TX, ring(port, TX, &[(SRC, 100 | SOF | EOF)]));
    dma.settle(2);
    dma
}

#[test]
fn err_irq_can_be_acknowledged_while_the_error_bits_stay() {
    let mut dma = dead(&port());
    assert_eq!(dma.sr(MM2S), 0x0001_4029);
    dma.w(reg::DMASR, 0xffff_ffff);
    assert_eq!((dma.sr(MM2S), dma.irq_levels()), (0x0001_0029, [false; 2]));
    dma.settle(1);
    assert_eq!(dma.sr(MM2S), 0x0001_0029, "an event, not a level");
}

#[test]
fn only_a_reset_recovers() {
    let port = port();
    let mut dma = dead(&port);
    port.clear_rules();
    ring(&port, TX, &[(SRC, 100 | SOF | EOF)]);
    dma.go(MM2S, RX, RX);
    dma.settle(1);
    assert_eq!((dma.sr(MM2S) & 0x23, dma.r(reg::DMACR) & 1), (0x21, 0), "RS does not stick");
    assert_eq!(dma.r64(reg::CURDESC), TX, "frozen");
    dma.w(S2MM + reg::DMACR, 4);
    dma.go(MM2S, TX, TX);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 100)]));
    dma.settle(2);
    assert_eq!((dma.sr(MM2S), dma.sr(S2MM)), (0x0001_100a, 0x0001_100a));
    assert_eq!(dma.fifo_level(), 0, "the fragment went with the reset");
}

#[test]
fn a_dead_sender_leaves_a_fragment_without_tlast() {
    let port = port();
    let mut dma = dead(&port);
    assert_eq!(dma.fifo_level(), 40);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 100)]));
    dma.settle(2);
    assert_eq!((dma.fifo_level(), status(&port, RX)), (0, 0));
    assert_eq!(dma.sr(S2MM) & 3, 0, "waits for the rest");
}

#[test]
fn a_dead_receiver_lets_the_sender_fill_the_fifo() {
    let port = port();
    let mut dma = core(&port);
    port.put(SRC, &Random(1).bytes(20_000));
    port.add(DST + 1000..DST + 1001, Access::Write, Rule::Terminate);
    dma.go(S2MM, RX, ring(&port, RX, &[(DST, 20_000)]));
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 20_000 | SOF | EOF)]));
    dma.settle(2);
    assert_eq!(status(&port, RX), CMPLT | SLV | RXSOF | 1000);
    assert_eq!(port.bytes(DST, 1000), port.bytes(SRC, 1000));
    assert_eq!((dma.fifo_level(), status(&port, TX), dma.sr(MM2S) & 0x7773), (4096, 0, 0));
}
