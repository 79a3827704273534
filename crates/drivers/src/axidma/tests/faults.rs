//! Errors, resets and stopping: nobody's transaction is lost, and nothing ends while the engine may touch its memory.

use alloc::vec;
use alloc::vec::Vec;

use portcullis_arch::Iova;
use portcullis_arch::axidma::error;

use super::fake::Reset;
use super::*;
use crate::dmaengine::{BusAccess, BusResponse, WaitError};

fn bus(access: BusAccess, response: BusResponse, at: Iova) -> TransferError {
    TransferError::Bus { access, response, at }
}

#[test]
fn an_error_fails_its_transaction_and_those_behind_it_run() {
    for (bit, response) in [(error::DMA_SLAVE, BusResponse::Slave), (error::DMA_DECODE, BusResponse::Decode)]
    {
        let rig = rig();
        let [(a, _), (b, _), (c, _), (d, _)] = [1, 2, 3, 4].map(|fill| rig.buffer(64, fill));
        let before = rig.submit(TX, &[a]);
        let failing = rig.submit(TX, &[d, b]);
        let behind = rig.submit(TX, &[c]);
        rig.core.inner.lock().faults.push((b.address.get(), bit));
        rig.tx().issue_pending();
        rig.run();
        let error = bus(BusAccess::Read, response, b.address);
        assert_eq!(rig.ended(), [(TX, before, Ok(())), (TX, failing, Err(error)), (TX, behind, Ok(()))]);
        let status = rig.tx().status(failing);
        assert_eq!((status.state, status.transferred, status.residue), (State::Failed(error), 64, 64));
        let last = rig.dma.channel(TX).unwrap().last_error().unwrap();
        assert_eq!(last.current, Iova(rig.pool(TX) + 2 * 64));
        assert_eq!(last.names().collect::<Vec<_>>().len(), 1);
        rig.core.inner.lock().stream.clear();
        loops(&rig, 5);
    }
}

#[test]
fn a_descriptor_that_cannot_be_fetched_is_named() {
    let rig = rig();
    let (to, _) = rig.buffer(64, 0);
    let first = rig.pool(RX);
    rig.core.inner.lock().faults.push((first, error::SG_SLAVE));
    let cookie = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    let failed = wait(rig.rx(), cookie, &rig.clock, 100).unwrap_err();
    let error = bus(BusAccess::Descriptor, BusResponse::Slave, Iova(first));
    assert_eq!(failed, WaitError::Failed { error, transferred: 0 });
    assert!(
        std_string(&failed)
            .contains("slave error (an IOMMU may have refused it) on the access to a descriptor")
    );
}

fn std_string(error: &WaitError) -> alloc::string::String {
    alloc::string::ToString::to_string(error)
}

#[test]
fn each_channel_is_told_its_own_error_if_both_failed() {
    // As behind an SMMU that refuses everything of a device after a fault, status writes included.
    let rig = rig();
    let ((from, _), (to, _)) = (rig.buffer(64, 1), rig.buffer(64, 0));
    let faults = [(rig.pool(TX), error::SG_SLAVE), (rig.pool(RX), error::DMA_SLAVE | error::SG_SLAVE)];
    rig.core.inner.lock().faults.extend(faults);
    let (received, sent) = (rig.submit(RX, &[to]), rig.submit(TX, &[from]));
    rig.rx().issue_pending();
    rig.tx().issue_pending();
    rig.core.work();
    assert!(rig.tx().handle_irq());
    let mut ended = rig.ended();
    ended.sort_by_key(|(direction, ..)| *direction);
    let refused = |access, at| Err(bus(access, BusResponse::Slave, at));
    let expected = [
        (TX, sent, refused(BusAccess::Descriptor, Iova(rig.pool(TX)))),
        (RX, received, refused(BusAccess::Write, to.address)),
    ];
    assert_eq!(ended, expected);
    rig.core.inner.lock().faults.clear();
    loops(&rig, 5);
}

#[test]
fn the_other_channel_s_work_is_failed_or_restarted_but_not_lost() {
    let rig = rig();
    let [(a, _), (b, _), (c, _)] = [1, 2, 3].map(|fill| rig.buffer(64, fill));
    let (to, pa) = rig.buffer(64, 0);
    // Received whole, in the middle, not begun.
    let received = [rig.submit(RX, &[to]), rig.submit(RX, &[to]), rig.submit(RX, &[to])];
    rig.rx().issue_pending();
    let sent = [rig.submit(TX, &[a]), rig.submit(TX, &[b])];
    rig.core.inner.lock().faults.push((b.address.get(), error::DMA_SLAVE));
    rig.tx().issue_pending();
    rig.core.work();
    assert!(rig.tx().handle_irq());
    let error = bus(BusAccess::Read, BusResponse::Slave, b.address);
    let mut ended = rig.ended();
    ended.sort_by_key(|(direction, cookie, _)| (*direction, *cookie));
    let expected = [
        (TX, sent[0], Ok(())),
        (TX, sent[1], Err(error)),
        (RX, received[0], Ok(())),
        (RX, received[1], Err(TransferError::EngineReset)),
    ];
    assert_eq!(ended, expected);
    assert_eq!(rig.rx().status(received[2]).state, State::Running);
    rig.submit(TX, &[c]);
    rig.tx().issue_pending();
    rig.run();
    assert_eq!(rig.rx().status(received[2]).state, State::Complete);
    assert_eq!(rig.read(pa, 64), vec![3; 64]);
}

#[test]
fn nothing_ends_while_the_core_is_stuck_in_reset() {
    let rig = rig();
    let (to, _) = rig.buffer(64, 1);
    let cookie = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    rig.core.inner.lock().reset = Reset::Never;
    let error = rig.rx().terminate().unwrap_err();
    assert!(matches!(error, ChannelError::AxiDma(AxiDmaError::Reset { .. })), "{error}");
    assert!(rig.ended().is_empty(), "its memory is not safe");
    assert_eq!(rig.rx().status(cookie).state, State::Running);
    let descriptor = rig.tx().prep_slave_sg(&[to], TX).unwrap();
    let refused = rig.tx().submit(descriptor, None);
    assert_eq!(refused, Err(ChannelError::AxiDma(AxiDmaError::Stuck)));
    assert!(rig.dma.stop().is_err());
    rig.core.inner.lock().reset = Reset::AtOnce;
    assert_eq!(rig.rx().terminate(), Ok(1));
    assert_eq!(rig.ended(), [(RX, cookie, Err(TransferError::Terminated))]);
    loops(&rig, 3);
}

#[test]
fn a_core_that_leaves_reset_late_is_found_by_the_next_interrupt() {
    let rig = rig();
    let ((bad, _), (good, _)) = (rig.buffer(64, 1), rig.buffer(64, 2));
    rig.core.inner.lock().faults.push((bad.address.get(), error::DMA_SLAVE));
    let [failing, behind] = [rig.submit(TX, &[bad]), rig.submit(TX, &[good])];
    rig.tx().issue_pending();
    rig.core.work();
    rig.core.inner.lock().reset = Reset::Never;
    assert!(rig.tx().handle_irq());
    assert!(rig.ended().is_empty());
    assert!(!rig.tx().handle_irq(), "still in reset");
    // It comes out by itself.
    rig.core.inner.lock().reset = Reset::AtOnce;
    portcullis_hal::Mmio::write32(&*rig.core, 0, 4);
    assert!(rig.tx().handle_irq());
    rig.run();
    let error = bus(BusAccess::Read, BusResponse::Slave, bad.address);
    assert_eq!(rig.ended(), [(TX, failing, Err(error)), (TX, behind, Ok(()))]);
}

#[test]
fn a_channel_that_does_not_start_fails_what_it_was_given() {
    let rig = rig();
    rig.core.inner.lock().starts = false;
    let (from, _) = rig.buffer(64, 1);
    let cookie = rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    assert_eq!(rig.ended(), [(TX, cookie, Err(TransferError::NotStarted))]);
    rig.core.inner.lock().starts = true;
    loops(&rig, 2);
}

#[test]
fn stop_leaves_a_core_that_is_quiet_and_masked() {
    let rig = rig();
    let (to, _) = rig.buffer(64, 0);
    rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    rig.dma.stop().unwrap();
    rig.core.work();
    assert_eq!(rig.core.lines(), [false; 2]);
    let control = portcullis_hal::Mmio::read32(&*rig.core, S2MM as usize);
    assert_eq!(control & 0x7001, 0);
}

#[test]
fn a_callback_may_terminate_when_the_next_transaction_has_failed() {
    let rig = rig();
    let ((good, _), (bad, _)) = (rig.buffer(64, 1), rig.buffer(64, 2));
    rig.core.inner.lock().faults.push((bad.address.get(), error::DMA_SLAVE));
    let (channel, said) = (rig.dma.channel(TX).unwrap().clone(), Arc::new(Mutex::new(None)));
    let says = said.clone();
    let callback: Callback = Box::new(move |_| *says.lock() = Some(channel.terminate()));
    rig.tx().submit(rig.tx().prep_slave_sg(&[good], TX).unwrap(), Some(callback)).unwrap();
    let failing = rig.submit(TX, &[bad]);
    rig.tx().issue_pending();
    rig.core.work();
    assert!(rig.tx().handle_irq());
    assert_eq!(*said.lock(), Some(Ok(0)));
    assert_eq!(rig.clock.delays(), 0, "it must not wait for the reset that its caller is about to do");
    assert_eq!(rig.ended(), [(TX, failing, Err(bus(BusAccess::Read, BusResponse::Slave, bad.address)))]);
}
