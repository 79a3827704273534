//! Terminating one channel: the other one goes on if the stream is whole, and is told if it is not.

use alloc::vec;

use super::*;

fn resets(rig: &Rig) -> usize {
    rig.core.take_writes().iter().filter(|(offset, value)| offset % S2MM == 0 && value & 4 != 0).count()
}

#[test]
fn a_sender_that_stops_between_packets_leaves_the_receiver_alone() {
    let rig = rig();
    let ((from, _), (to, pa)) = (rig.buffer(64, 9), rig.buffer(64, 0));
    let received = [rig.submit(RX, &[to]), rig.submit(RX, &[to])];
    rig.rx().issue_pending();
    let cookies = [rig.submit(TX, &[from]), rig.submit(TX, &[from])];
    rig.tx().issue_pending();
    rig.core.step(0);
    rig.core.take_writes();
    assert_eq!(rig.tx().terminate(), Ok(2));
    let writes = rig.core.take_writes();
    assert!(writes.iter().all(|(offset, value)| *offset < S2MM && (*offset != 0 || value & 4 == 0)));
    let expected = [(TX, cookies[0], Ok(())), (TX, cookies[1], Err(TransferError::Terminated))];
    assert_eq!(rig.ended(), expected);
    rig.run();
    assert_eq!(rig.rx().status(received[0]).state, State::Complete);
    assert_eq!(rig.rx().status(received[1]).state, State::Running);
    // The stopped channel starts again from the right descriptor.
    rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    rig.run();
    assert_eq!(rig.rx().status(received[1]).state, State::Complete);
    assert_eq!(rig.read(pa, 64), vec![9; 64]);
    // So does one that has nothing left to send.
    let waiting = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    assert_eq!(rig.tx().terminate(), Ok(0));
    assert_eq!(rig.rx().status(waiting).state, State::Running);
    assert_eq!(resets(&rig), 0);
}

#[test]
fn a_packet_that_is_cut_takes_the_receiver_along() {
    let rig = rig();
    let ((from, _), (to, _)) = (rig.buffer(64, 9), rig.buffer(128, 0));
    let received = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    let sent = rig.submit(TX, &[from, from]);
    rig.tx().issue_pending();
    rig.core.step(0);
    assert_eq!(rig.tx().terminate(), Ok(1));
    let mut ended = rig.ended();
    ended.sort_by_key(|(direction, ..)| *direction);
    let reset = Err(TransferError::EngineReset);
    assert_eq!(ended, [(TX, sent, Err(TransferError::Terminated)), (RX, received, reset)]);
    loops(&rig, 3);
}

#[test]
fn what_was_on_its_way_to_a_terminated_receiver_does_not_reach_the_next_one() {
    let rig = rig();
    let ((from, _), (to, _)) = (rig.buffer(64, 9), rig.buffer(64, 0));
    let received = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    let sent = [rig.submit(TX, &[from]), rig.submit(TX, &[from])];
    rig.tx().issue_pending();
    rig.core.step(0);
    assert_eq!(rig.rx().terminate(), Ok(1));
    let mut ended = rig.ended();
    ended.sort_by_key(|(direction, cookie, _)| (*direction, *cookie));
    let expected = [
        (TX, sent[0], Ok(())),
        (TX, sent[1], Err(TransferError::EngineReset)),
        (RX, received, Err(TransferError::Terminated)),
    ];
    assert_eq!(ended, expected);
    loops(&rig, 3);
}

#[test]
fn an_idle_receiver_stops_alone() {
    let rig = rig();
    loops(&rig, 1);
    rig.core.inner.lock().blocked = true;
    let (from, _) = rig.buffer(64, 9);
    let sent = rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    rig.core.take_writes();
    assert_eq!(rig.rx().terminate(), Ok(0));
    assert_eq!((resets(&rig), rig.tx().status(sent).state), (0, State::Running));
}

#[test]
fn without_scatter_gather_too_only_a_whole_packet_leaves_the_receiver_alone() {
    for (whole, resets_expected) in [(true, 0), (false, 1)] {
        let config = Config { length_bits: 16, ..Build::default().config };
        let rig = build(Build { sg: false, config, ..Build::default() });
        let ((from, _), (to, _)) = (rig.buffer(64, 9), rig.buffer(64, 0));
        let received = rig.submit(RX, &[to]);
        rig.rx().issue_pending();
        let sent = rig.submit(TX, &[from]);
        rig.tx().issue_pending();
        if whole {
            rig.core.step(0);
        }
        rig.core.take_writes();
        assert_eq!(rig.tx().terminate(), Ok(1));
        assert_eq!(resets(&rig), resets_expected);
        let state = if whole { State::Complete } else { State::Failed(TransferError::Terminated) };
        assert_eq!(rig.tx().status(sent).state, state);
        let state = if whole { State::Running } else { State::Failed(TransferError::EngineReset) };
        assert_eq!(rig.rx().status(received).state, state);
    }
}

#[test]
fn packets_counted_before_a_stop_do_not_count_after_it() {
    let rig = rig();
    let ((from, _), (to, _)) = (rig.buffer(64, 9), rig.buffer(64, 0));
    rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    let three = || {
        let cookies = [0; 3].map(|_| rig.submit(TX, &[from]));
        rig.tx().issue_pending();
        cookies
    };
    three();
    rig.core.step(0);
    assert_eq!(rig.tx().terminate(), Ok(3));
    let cookies = three();
    for _ in 0..3 {
        rig.core.step(0);
        if rig.core.lines()[0] {
            rig.tx().handle_irq();
        }
    }
    assert_eq!(cookies.map(|cookie| rig.tx().status(cookie).state), [State::Complete; 3]);
}

#[test]
fn a_starving_receiver_is_reset() {
    let rig = rig();
    rig.core.inner.lock().halts = false;
    let (to, _) = rig.buffer(64, 0);
    let received = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    assert_eq!(rig.rx().terminate(), Ok(1), "alone");
    assert_eq!(rig.ended(), [(RX, received, Err(TransferError::Terminated))]);

    // With the other channel busy.
    let (from, _) = rig.buffer(64, 0);
    rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    rig.core.inner.lock().blocked = true;
    let sent = rig.submit(TX, &[from]);
    let behind = rig.submit(TX, &[to]);
    rig.tx().issue_pending();
    assert_eq!(rig.rx().terminate(), Ok(1));
    assert_eq!(rig.clock.delays(), 0, "nothing to wait for");
    let ended = rig.ended();
    assert_eq!(ended.iter().filter(|(direction, ..)| *direction == RX).count(), 1);
    assert!(ended.contains(&(TX, sent, Err(TransferError::EngineReset))), "{ended:?}");
    rig.core.inner.lock().blocked = false;
    rig.run();
    assert_eq!(rig.tx().status(behind).state, State::Complete);
}

#[test]
fn a_sender_that_does_not_stop_is_reset_after_a_bounded_wait() {
    let rig = rig();
    let ((from, _), (to, _)) = (rig.buffer(64, 0), rig.buffer(64, 0));
    let received = rig.submit(RX, &[to]);
    rig.rx().issue_pending();
    rig.core.inner.lock().halts = false;
    rig.core.inner.lock().blocked = true;
    rig.submit(TX, &[from]);
    rig.tx().issue_pending();
    assert_eq!(rig.tx().terminate(), Ok(1));
    assert!(rig.clock.delays() > 0);
    assert_eq!(rig.rx().status(received).state, State::Failed(TransferError::EngineReset));
}

#[test]
fn all_that_was_issued_fails_if_the_channel_does_not_start() {
    let rig = build(Build { sg: false, ..Build::default() });
    rig.core.inner.lock().starts = false;
    let (from, _) = rig.buffer(64, 1);
    let cookies = [rig.submit(TX, &[from]), rig.submit(TX, &[from])];
    rig.tx().issue_pending();
    assert_eq!(rig.ended(), cookies.map(|cookie| (TX, cookie, Err(TransferError::NotStarted))));
}
