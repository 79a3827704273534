//! Terminating one channel of a core whose stream is not empty: nobody receives what was meant for somebody else.

mod axidma_rig;

use axidma_rig::{KIB, MIB, Rig, segment};
use portcullis_drivers::dmaengine::{Cookie, Direction, DmaChannel, Segment, State, TransferError};
use portcullis_iommu::dma::Direction as Way;

fn send(channel: &dyn DmaChannel, segments: &[Segment]) -> Cookie {
    let direction = channel.caps().direction.unwrap_or(Direction::MemToDev);
    let descriptor = channel.prep_slave_sg(segments, direction).unwrap();
    let cookie = channel.submit(descriptor, None).unwrap();
    channel.issue_pending();
    cookie
}

const RESET: State = State::Failed(TransferError::EngineReset);
const TERMINATED: State = State::Failed(TransferError::Terminated);

#[test]
fn a_packet_for_a_terminated_receiver_does_not_reach_the_next_one() {
    let rig = Rig::new();
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, MIB, Way::ToDevice);
    let (_, target) = rig.map(&dma, 4 * KIB, Way::FromDevice);
    // Too small for the packet, so that it never ends.
    let received = send(&*rx, &[segment(target, 4 * KIB)]);
    let sent = send(&*tx, &[segment(source, MIB)]);
    rig.settle();
    assert_eq!((tx.status(sent).state, rx.status(received).state), (State::Running, State::Running));
    assert_eq!(rx.terminate(), Ok(1));
    assert_eq!(tx.status(sent).state, RESET);
    assert_ne!(rx.status(received).state, State::Running);
    assert!(rig.core(0).driver().is_idle());
    rig.loops(0, 4 * KIB);
    rig.loops(0, 64 * KIB);
    rig.no_faults();
}

#[test]
fn the_beginning_of_a_cut_packet_is_not_received_with_the_next_one() {
    let rig = Rig::with(|d| d.axi_dmas[0].length_bits = 14);
    let (tx, rx, dma) = (rig.tx(0), rig.rx(0), rig.core(0).dma().clone());
    let (_, source) = rig.map(&dma, 3 * MIB, Way::ToDevice);
    let (_, target) = rig.map(&dma, 3 * MIB, Way::FromDevice);
    let received = send(&*rx, &[segment(target, 3 * MIB)]);
    let sent = send(&*tx, &[segment(source, 3 * MIB)]);
    rig.system.run_for(30);
    let so_far = tx.status(sent).transferred;
    assert!(so_far > 0 && so_far < 3 * MIB, "{so_far}");
    assert_eq!(tx.terminate(), Ok(1));
    assert_eq!((tx.status(sent).state, rx.status(received).state), (TERMINATED, RESET));
    rig.loops(0, 64 * KIB);
    rig.no_faults();
}
