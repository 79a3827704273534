//! Stalled transactions: they park, go on exactly where they stopped, or end as software decides.

use portcullis_arch::Access;
use portcullis_bus::StallState;

use super::*;
use crate::testport::Rule;

const LIST: u64 = RAM + 0x1000;
const OTHER: u64 = RAM + 0x8000;

#[test]
fn a_retried_transfer_writes_every_byte_exactly_once() {
    let port = port();
    let mut z = fpd(&port);
    let data = Random(3).bytes(20_000);
    port.put(SRC + 5, &data);
    put_linked(&port, LIST, SRC + 5, 9_000, control(Command::Next, true), LIST + 32);
    put_linked(&port, LIST + 32, SRC + 9_005, 11_000, control(Command::Stop, true), 0);
    put_linked(&port, OTHER, DST + 3, 12_345, control(Command::Next, true), OTHER + 0x20);
    put_linked(&port, OTHER + 0x20, DST + 12_348, 7_655, control(Command::Next, true), 0);
    let stalls = [
        (LIST, Access::Read),
        (LIST + 24, Access::Read),
        (OTHER + 8, Access::Read),
        (OTHER + 0x34, Access::Read),
        (SRC + 5, Access::Read),
        (SRC + 4096, Access::Read),
        (SRC + 20_004, Access::Read),
        (DST + 3, Access::Write),
        (DST + 4097, Access::Write),
        (DST + 12_347, Access::Write),
        (DST + 20_002, Access::Write),
    ];
    for (at, access) in stalls {
        port.add(at..at + 1, access, Rule::Stall);
    }
    port.count_writes();
    z.start_lists(LIST, OTHER);
    for (i, _) in stalls.iter().enumerate() {
        assert_eq!(z.settle(4), Activity::Stalled, "stall {i}");
        let log = port.take_log().len();
        assert_eq!(z.step(0), Activity::Stalled, "no new access while it waits");
        assert!(log > 0 && port.take_log().is_empty());
        assert!(z.is_stalled());
        assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (2, 1));
        assert_eq!(port.waiting(), 1);
        port.resume_all(StallState::Retry);
    }
    assert_eq!(z.settle(4), Activity::Idle);
    assert_eq!(port.bytes(DST + 3, 20_000), data);
    assert!((DST + 3..DST + 20_003).all(|b| port.writes(b) == 1));
    assert_eq!((port.writes(DST + 2), port.writes(DST + 20_003)), (0, 0));
    assert_eq!(z.r(reg::ISR), 0x406);
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (2, 2));
    assert_eq!(z.r(reg::TOTAL_BYTE), 20_000);
}

#[test]
fn a_stall_terminated_with_an_abort_is_an_error() {
    for (at, access, error) in [
        (LIST, Access::Read, 0x40),
        (OTHER, Access::Read, 0x80),
        (SRC + 100, Access::Read, 0x100),
        (DST + 100, Access::Write, 0x200),
    ] {
        let port = port();
        let mut z = fpd(&port);
        put_linear(&port, LIST, SRC, 256, control(Command::Stop, false));
        put_linear(&port, OTHER, DST, 256, control(Command::Next, false));
        port.add(at..at + 1, access, Rule::Stall);
        z.start_lists(LIST, OTHER);
        assert_eq!(z.settle(2), Activity::Stalled);
        port.resume_all(StallState::Terminated { abort: true });
        assert_eq!(z.settle(2), Activity::Idle);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400 | error, 3));
        assert!(!z.is_stalled());
    }
}

#[test]
fn a_read_terminated_without_an_abort_brings_one_burst_of_zeros() {
    let port = port();
    let mut z = fpd(&port);
    port.put(SRC, &[7; 1024]);
    // 16 beats of 16 bytes: the burst that holds SRC + 300 ends at SRC + 512.
    port.add(SRC + 300..SRC + 301, Access::Read, Rule::Stall);
    z.start_simple(0, SRC, DST, 1024);
    assert_eq!(z.settle(2), Activity::Stalled);
    port.resume_all(StallState::Terminated { abort: false });
    port.clear_rules();
    assert_eq!(z.settle(2), Activity::Idle);
    let expected = [vec![7; 300], vec![0; 212], vec![7; 512]].concat();
    assert_eq!(port.bytes(DST, 1024), expected);
    assert_eq!((z.r(reg::ISR), z.r(reg::TOTAL_BYTE)), (0x400, 1024));
}

#[test]
fn a_write_terminated_without_an_abort_ignores_one_burst() {
    let port = port();
    let mut z = lpd(&port);
    port.put(SRC, &[7; 1024]);
    // AWLEN = 2: 4 beats of 8 bytes.
    z.w(reg::DATA_ATTR, 0x0483_d202);
    port.add(DST + 300..DST + 301, Access::Write, Rule::Stall);
    z.start_simple(0, SRC, DST, 1024);
    assert_eq!(z.settle(2), Activity::Stalled);
    port.resume_all(StallState::Terminated { abort: false });
    port.clear_rules();
    assert_eq!(z.settle(2), Activity::Idle);
    let expected = [vec![7; 300], vec![0; 20], vec![7; 704]].concat();
    assert_eq!(port.bytes(DST, 1024), expected);
    assert_eq!((z.r(reg::ISR), z.r(reg::TOTAL_BYTE)), (0x400, 1024), "an ignored write is answered OKAY");
}

#[test]
fn a_descriptor_read_terminated_without_an_abort_is_zeros() {
    let port = port();
    let mut z = fpd(&port);
    // The first descriptor reads as zeros: linear, size 0, the next one follows.
    put_linear(&port, LIST, SRC, 64, control(Command::Stop, false));
    put_linear(&port, LIST + 16, SRC, 32, control(Command::Stop, true));
    put_linear(&port, OTHER, DST, 64, control(Command::Next, false));
    port.put(SRC, &[9; 64]);
    port.add(LIST + 4..LIST + 5, Access::Read, Rule::Stall);
    z.start_lists(LIST, OTHER);
    assert_eq!(z.settle(2), Activity::Stalled);
    port.resume_all(StallState::Terminated { abort: false });
    assert_eq!(z.settle(2), Activity::Idle);
    assert_eq!((z.r(reg::ISR), z.r(reg::TOTAL_BYTE)), (0x402, 32));
}

#[test]
fn stalls_in_fixed_bursts_and_other_modes_resume_where_they_were() {
    // Mode, DATA_ATTR, where it stalls.
    for (mode, attr, access, at) in [
        (0, 0x0083_d20f, Access::Write, DST + 100),
        (0, 0x0083_d20f, Access::Read, SRC),
        (0, 0x0483_c20f, Access::Write, DST),
        (0, 0x0483_c20f, Access::Read, SRC + 100),
        (1, 0x0483_d20f, Access::Write, DST + 101),
        (2, 0x0483_d20f, Access::Read, SRC + 101),
    ] {
        let run = |stall: bool| {
            let port = port();
            let mut z = fpd(&port);
            port.put(SRC, &Random(5).bytes(1000));
            for i in 0..4 {
                z.w(reg::WR_ONLY_WORD0 + 4 * i, 0x0302_0100 + i * 0x0404_0404);
            }
            if stall {
                port.add(at..at + 1, access, Rule::Stall);
            }
            port.count_writes();
            z.w(reg::DATA_ATTR, attr);
            z.start_simple(mode, SRC, DST, 1000);
            if stall {
                assert_eq!(z.settle(2), Activity::Stalled, "mode {mode} {attr:#x}");
                if access == Access::Write && mode == 0 {
                    assert_ne!(z.r(reg::DBG1), 0, "data waits in the buffer");
                    assert_eq!(z.r(reg::DBG0) + z.r(reg::DBG1), 0x100);
                }
                port.resume_all(StallState::Retry);
            }
            assert_eq!(z.settle(2), Activity::Idle);
            let writes: Vec<u32> = (DST..DST + 1000).map(|b| port.writes(b)).collect();
            let reads: usize =
                port.take_log().iter().filter(|s| s.access == Access::Read).map(|s| s.len).sum();
            (port.bytes(DST, 1000), writes, z.r(reg::TOTAL_BYTE), z.r(reg::ISR), reads)
        };
        let (plain, stalled) = (run(false), run(true));
        assert_eq!((plain.0, plain.1, plain.2, plain.3), (stalled.0, stalled.1, stalled.2, stalled.3));
        if access == Access::Write {
            assert_eq!(plain.4, stalled.4, "a source that may be a FIFO is not read twice");
        }
    }
}

#[test]
fn passing_over_a_stall_in_the_other_modes_ends() {
    for (mode, attr, access, at) in [
        (0, 0x0083_d20f, Access::Write, DST + 100),
        (0, 0x0083_d20f, Access::Read, SRC),
        (0, 0x0483_c20f, Access::Write, DST),
        (1, 0x0483_d20f, Access::Write, DST + 101),
        (1, 0x0483_c20f, Access::Write, DST),
        (2, 0x0483_d20f, Access::Read, SRC + 101),
        (2, 0x0083_d20f, Access::Read, SRC),
    ] {
        let port = port();
        let mut z = fpd(&port);
        z.w(reg::DATA_ATTR, attr);
        port.add(at..at + 1, access, Rule::Stall);
        z.start_simple(mode, SRC, DST, 1000);
        let mut rounds = 0;
        while z.settle(2) == Activity::Stalled {
            port.resume_all(StallState::Terminated { abort: false });
            rounds += 1;
            assert!(rounds < 10, "mode {mode} {attr:#x}");
        }
        assert!(rounds > 0);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400, 0));
        assert_eq!(z.r(reg::TOTAL_BYTE), if mode == 2 { 0 } else { 1000 });
    }
}

#[test]
fn reset_forgets_a_stalled_transaction() {
    let port = port();
    let mut z = fpd(&port);
    port.add(SRC..SRC + 1, Access::Read, Rule::Stall);
    z.start_simple(0, SRC, DST, 16);
    assert_eq!(z.step(0), Activity::Stalled);
    z.reset();
    port.resume_all(StallState::Retry);
    assert_eq!(z.step(0), Activity::Idle);
    assert_eq!((z.r(reg::STATUS), z.r(reg::ISR), z.is_stalled()), (0, 0, false));
}
