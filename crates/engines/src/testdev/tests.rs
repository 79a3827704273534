//! The test device against memory with bad and stalling addresses.

use std::sync::{Arc, Mutex};

use portcullis_arch::testdev::{PciIdentity, ResultCode, reg};
use portcullis_arch::{Access, Pa, StreamId};
use portcullis_bus::{BusError, IrqLevels, Mmio, StallState};

use super::*;
use crate::RestoreError;
use crate::testport::{Rule, TestPort};

const BASE: u64 = 0x4000_0000;
const MS: u64 = 1_000_000;

fn config() -> TestDevConfig {
    TestDevConfig { extended: true, ..TestDevConfig::new(StreamId(0x100)) }
}

fn device(port: &TestPort, config: TestDevConfig) -> TestDev {
    TestDev::new(config, Box::new(port.clone()), IrqLine::unconnected())
}

fn bar(device: TestDev) -> TestDevBar {
    TestDevBar(Arc::new(Mutex::new(device)))
}

fn step(bar: &TestDevBar, now: u64) -> Activity {
    bar.0.lock().unwrap().step(now)
}

fn start(bar: &TestDevBar, src: u64, dst: u64, size: u64) {
    for (offset, value) in [(reg::SRCADDR, src), (reg::DSTADDR, dst), (reg::SIZE, size), (reg::DOORBELL, 1)] {
        bar.write32(offset, value as u32).unwrap();
    }
}

/// Steps until the device rests.
fn run(bar: &TestDevBar) -> Activity {
    for _ in 0..10_000 {
        match step(bar, 0) {
            Activity::Busy => {}
            rest => return rest,
        }
    }
    panic!("never rests");
}

fn result(bar: &TestDevBar) -> (ResultCode, bool, u32) {
    let (r, done) = bar.0.lock().unwrap().result();
    assert_eq!(bar.read64(reg::RESULT), Ok(u64::from(done) << 32 | u64::from(r.into_bits())));
    (r.code(), r.destination(), done)
}

fn fill(port: &TestPort, at: u64, len: usize) -> Vec<u8> {
    let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
    port.put(at, &data);
    data
}

#[test]
fn the_doorbell_copies_after_the_busy_delay() {
    let port = TestPort::new(BASE, 0x10_0000);
    let data = fill(&port, BASE, 0x3210);
    let bar = bar(device(&port, TestDevConfig { extended: false, ..config() }));
    assert_eq!(step(&bar, 0), Activity::Idle);
    bar.write32(reg::BUSY_DELAY, 1000).unwrap();
    start(&bar, BASE, BASE + 0x8_0000, 0x3210);
    assert_eq!(bar.read64(reg::STATUS), Ok(1));
    assert_eq!(step(&bar, 5 * MS), Activity::Until(1005 * MS));
    assert_eq!(step(&bar, 1004 * MS), Activity::Until(1005 * MS));
    assert!(port.take_log().is_empty());
    assert_eq!(step(&bar, 1005 * MS), Activity::Idle);
    assert_eq!(bar.read64(reg::STATUS), Ok(0));
    assert_eq!(port.bytes(BASE + 0x8_0000, 0x3210), data);
    assert!(port.take_log().iter().all(|s| s.from == Initiator::new(StreamId(0x100))));
    assert_eq!(bar.0.lock().unwrap().config().identity, PciIdentity::DEVICE);
}

#[test]
fn addresses_and_size_are_taken_when_the_delay_ends() {
    let port = TestPort::new(BASE, 0x10_0000);
    let data = fill(&port, BASE, 16);
    let bar = bar(device(&port, config()));
    bar.write32(reg::BUSY_DELAY, 1).unwrap();
    start(&bar, BASE + 0x100, BASE + 0x1000, 4);
    step(&bar, 0);
    // A second doorbell is ignored; its registers are not.
    start(&bar, BASE, BASE + 0x2000, 16);
    assert_eq!(step(&bar, MS), Activity::Idle);
    assert_eq!((port.bytes(BASE + 0x2000, 16), bar.0.lock().unwrap().count()), (data, 1));
    assert_eq!(port.bytes(BASE + 0x1000, 16), [0; 16]);
}

#[test]
fn a_doorbell_without_bit_0_or_size_leaves_the_device_idle() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, config()));
    start(&bar, BASE, BASE, 0);
    assert_eq!((bar.read32(reg::STATUS), step(&bar, 0)), (Ok(0), Activity::Idle));
    bar.write32(reg::SIZE, 4).unwrap();
    bar.write32(reg::DOORBELL, 2).unwrap();
    assert_eq!((bar.read32(reg::STATUS), step(&bar, 0)), (Ok(0), Activity::Idle));
}

#[test]
fn accesses_of_8_bytes_are_two_of_4_and_the_upper_one_hits_nothing() {
    let port = TestPort::new(BASE, 0x1000);
    let properties = TestDevConfig {
        extended: false,
        srcaddr: 0x1_2345_6789_abcd,
        size: 0x2_0000_0003,
        busy_delay_ms: 9,
        ..config()
    };
    let bar = bar(device(&port, properties));
    assert_eq!(bar.read64(reg::SRCADDR), Ok(0x6789_abcd));
    assert_eq!(bar.read32(reg::SRCADDR + 4), Ok(0));
    assert_eq!(bar.0.lock().unwrap().values.srcaddr, 0x1_2345_6789_abcd, "a read changes nothing");
    bar.write64(reg::SRCADDR, 0xffff_ffff_8000_1234).unwrap();
    assert_eq!(bar.0.lock().unwrap().values.srcaddr, 0x8000_1234);
    bar.write32(reg::SIZE, 7).unwrap();
    assert_eq!(bar.0.lock().unwrap().values.size, 7, "the upper half is cleared");
    bar.mmio_write(reg::DSTADDR, &[0xaa]).unwrap();
    assert_eq!(bar.read32(reg::DSTADDR), Ok(0xaa));
    let mut two = [0; 2];
    bar.mmio_read(reg::SRCADDR, &mut two).unwrap();
    assert_eq!(two, [0x34, 0x12]);
    bar.mmio_read(reg::SRCADDR + 2, &mut two).unwrap();
    assert_eq!(two, [0, 0]);
    assert_eq!(bar.read32(reg::BUSY_DELAY), Ok(9));
    assert_eq!(bar.read32(reg::DOORBELL), Ok(0));
    bar.write32(reg::STATUS, 1).unwrap();
    assert_eq!(bar.read32(reg::STATUS), Ok(0));
}

#[test]
fn unaligned_and_outside_accesses_are_refused() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, config()));
    for (offset, len) in [(1, 2), (2, 4), (4, 8), (0, 3), (0, 16), (0, 0)] {
        assert_eq!(bar.mmio_read(offset, &mut vec![0; len]), Err(BusError::Slave), "{offset} {len}");
        assert_eq!(bar.mmio_write(offset, &vec![0; len]), Err(BusError::Slave), "{offset} {len}");
    }
    assert_eq!(bar.read32(0x1_0000), Err(BusError::Decode));
    assert_eq!(bar.write64(u64::MAX - 7, 0), Err(BusError::Decode));
    assert_eq!(bar.read32(0xfffc), Ok(0));
}

#[test]
fn the_extension_is_absent_unless_asked_for() {
    let port = TestPort::new(BASE, 0x1000);
    for extended in [false, true] {
        let bar = bar(device(&port, TestDevConfig { extended, ..config() }));
        let values = [
            (reg::PASID_CTRL, 0xe00f_ffff),
            (reg::RESULT, 0),
            (reg::COUNT, 0),
            (reg::IRQ_CTRL, 3),
            (reg::MSI_DATA, u32::MAX),
            (reg::MSI_ADDR_LO, u32::MAX),
            (reg::MSI_ADDR_HI, u32::MAX),
            (reg::SRC_HI, u32::MAX),
            (reg::DST_HI, u32::MAX),
            (0x130, 0),
        ];
        for (offset, value) in values {
            bar.write32(offset, u32::MAX).unwrap();
            assert_eq!(bar.read32(offset), Ok(if extended { value } else { 0 }), "{offset:#x}");
        }
    }
}

#[test]
fn overlapping_ranges_are_copied_as_if_read_at_once() {
    let port = TestPort::new(BASE, 0x20_0000);
    let len = 3 * STEP_BYTES / 2;
    let data = fill(&port, BASE, len);
    let bar = bar(device(&port, config()));
    start(&bar, BASE, BASE + 0x1001, len as u64);
    assert_eq!(step(&bar, 0), Activity::Busy, "larger than a step");
    assert_eq!(bar.read32(reg::STATUS), Ok(1));
    assert_eq!(run(&bar), Activity::Idle);
    assert_eq!(port.bytes(BASE + 0x1001, len), data);
}

#[test]
fn a_bad_source_page_suppresses_the_write() {
    let port = TestPort::new(BASE, 0x10_0000);
    fill(&port, BASE, 0x4000);
    port.add(BASE + 0x2000..BASE + 0x2001, Access::Read, Rule::Terminate);
    let bar = bar(device(&port, config()));
    start(&bar, BASE, BASE + 0x8000, 0x4000);
    assert_eq!(run(&bar), Activity::Idle);
    assert_eq!(port.bytes(BASE + 0x8000, 0x4000), [0; 0x4000]);
    assert_eq!((bar.read32(reg::STATUS), result(&bar)), (Ok(0), (ResultCode::Terminated, false, 0)));
    assert_eq!(port.take_log().len(), 1, "one fault, not one for each page");
    start(&bar, 0x1000, BASE, 4);
    run(&bar);
    assert_eq!(result(&bar), (ResultCode::Decode, false, 0));
    start(&bar, BASE, BASE, 4);
    run(&bar);
    assert_eq!((result(&bar), bar.read32(reg::COUNT)), ((ResultCode::Ok, false, 0), Ok(3)));
}

#[test]
fn a_bad_destination_page_leaves_the_others_written() {
    for stop_at_fault in [false, true] {
        let port = TestPort::new(BASE, 0x10_0000);
        let data = fill(&port, BASE, 0x4000);
        port.add(BASE + 0x9000..BASE + 0x9010, Access::Write, Rule::Terminate);
        let bar = bar(device(&port, TestDevConfig { stop_at_fault, ..config() }));
        start(&bar, BASE, BASE + 0x8800, 0x4000);
        assert_eq!(run(&bar), Activity::Idle);
        assert_eq!(port.bytes(BASE + 0x8800, 0x800), data[..0x800]);
        assert_eq!(port.bytes(BASE + 0x9000, 0x1000), [0; 0x1000]);
        let rest = if stop_at_fault { vec![0; 0x2800] } else { data[0x1800..].to_vec() };
        assert_eq!(port.bytes(BASE + 0xa000, 0x2800), rest);
        assert_eq!(result(&bar), (ResultCode::Terminated, true, 0x800));
    }
}

#[test]
fn a_size_beyond_the_buffer_moves_nothing() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, TestDevConfig { max_bytes: 16, ..config() }));
    for (size, code) in
        [(16, ResultCode::Ok), (17, ResultCode::TooLarge), (0xffff_ffff, ResultCode::TooLarge)]
    {
        port.take_log();
        start(&bar, BASE, BASE + 0x100, size);
        assert_eq!((run(&bar), bar.read32(reg::STATUS)), (Activity::Idle, Ok(0)));
        assert_eq!((result(&bar).0, port.take_log().is_empty()), (code, code != ResultCode::Ok));
    }
}

#[test]
fn without_bus_mastering_a_transfer_fails_and_status_clears() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, config()));
    bar.0.lock().unwrap().set_bus_master(false);
    start(&bar, BASE, BASE + 0x100, 4);
    run(&bar);
    assert_eq!((result(&bar), port.take_log().len()), ((ResultCode::BusMasterOff, false, 0), 0));
}

#[test]
fn a_stalled_transfer_parks_and_goes_on_where_it_was() {
    let port = TestPort::new(BASE, 0x10_0000);
    let data = fill(&port, BASE, 0x3000);
    port.add(BASE + 0x1000..BASE + 0x1001, Access::Read, Rule::Stall);
    port.add(BASE + 0xa000..BASE + 0xa001, Access::Write, Rule::Stall);
    let b = bar(device(&port, config()));
    start(&b, BASE, BASE + 0x8000, 0x3000);
    for _ in 0..2 {
        assert_eq!((step(&b, 0), b.read32(reg::STATUS)), (Activity::Stalled, Ok(1)));
    }
    port.resume_all(StallState::Retry);
    assert_eq!(step(&b, 0), Activity::Stalled);
    // The write's stall survives a save.
    let json = serde_json::to_string(&b.0.lock().unwrap().save()).unwrap();
    let b = bar(device(&port, config()));
    b.0.lock().unwrap().restore(serde_json::from_str(&json).unwrap()).unwrap();
    assert!(b.0.lock().unwrap().is_stalled());
    port.count_writes();
    port.resume_all(StallState::Retry);
    assert_eq!((step(&b, 0), result(&b)), (Activity::Idle, (ResultCode::Ok, false, 0)));
    assert_eq!(port.bytes(BASE + 0x8000, 0x3000), data);
    assert_eq!((port.writes(BASE + 0x9fff), port.writes(BASE + 0xa000)), (0, 1));
}

#[test]
fn a_terminated_stall_is_a_fault_or_passed_over_to_the_page_boundary() {
    for (access, abort) in
        [(Access::Read, true), (Access::Read, false), (Access::Write, true), (Access::Write, false)]
    {
        let port = TestPort::new(BASE, 0x10_0000);
        let mut data = fill(&port, BASE, 0x3000);
        let at = if access == Access::Read { BASE } else { BASE + 0x8000 } + 0x1000;
        port.add(at..at + 1, access, Rule::Stall);
        let bar = bar(device(&port, config()));
        start(&bar, BASE, BASE + 0x8000, 0x3000);
        assert_eq!(step(&bar, 0), Activity::Stalled);
        port.clear_rules();
        port.resume_all(StallState::Terminated { abort });
        assert_eq!(run(&bar), Activity::Idle);
        data[0x1000..0x2000].fill(0);
        let expected = match (access, abort) {
            (Access::Read, true) => (vec![0; 0x3000], (ResultCode::Terminated, false, 0)),
            (Access::Write, true) => (data, (ResultCode::Terminated, true, 0x1000)),
            (_, false) => (data, (ResultCode::Ok, false, 0)),
        };
        assert_eq!((port.bytes(BASE + 0x8000, 0x3000), result(&bar)), expected, "{access} {abort}");
    }
}

#[test]
fn aggressive_mode_ticks_from_power_up_and_turns_bus_mastering_on() {
    let port = TestPort::new(BASE, 0x1000);
    let attack = TestDevConfig {
        aggressive: true,
        aggression_delay_ms: 2000,
        bus_master: false,
        srcaddr: 0x9f000,
        dstaddr: 0x9fb00,
        size: 1,
        busy_delay_ms: 77,
        ..config()
    };
    let bar = bar(device(&port, attack));
    assert_eq!(step(&bar, 10), Activity::Until(2000 * MS + 10));
    assert_eq!(step(&bar, 2000 * MS + 10), Activity::Until(4000 * MS + 10));
    assert_eq!((bar.read32(reg::COUNT), result(&bar).0), (Ok(2), ResultCode::Decode));
    assert_eq!(port.take_log().iter().map(|s| s.addr).collect::<Vec<_>>(), [0x9f000; 2]);
    // Off: the timer that runs still ticks once.
    bar.write32(reg::AGGRESSIVE, 0).unwrap();
    assert_eq!(step(&bar, 4000 * MS + 10), Activity::Idle);
    assert_eq!(bar.read32(reg::COUNT), Ok(3));
    bar.0.lock().unwrap().reset();
    assert_eq!((bar.read32(reg::AGGRESSIVE), bar.read32(reg::COUNT)), (Ok(1), Ok(0)));
}

#[test]
fn off_and_on_inside_one_delay_makes_two_chains_and_timers_are_bounded() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, TestDevConfig { aggression_delay_ms: 10, size: 0, ..config() }));
    let toggle = |n| {
        for _ in 0..n {
            bar.write32(reg::AGGRESSIVE, 0).unwrap();
            bar.write32(reg::AGGRESSIVE, 1).unwrap();
        }
    };
    toggle(1);
    assert_eq!(step(&bar, 0), Activity::Until(10 * MS));
    toggle(1);
    assert_eq!(step(&bar, MS), Activity::Until(10 * MS));
    assert_eq!(step(&bar, 10 * MS), Activity::Until(11 * MS));
    assert_eq!(step(&bar, 11 * MS), Activity::Until(20 * MS));
    toggle(1000);
    assert_eq!(bar.0.lock().unwrap().timers.len(), MAX_TIMERS);
    start(&bar, BASE, BASE, 4);
    assert_eq!(bar.read32(reg::STATUS), Ok(0), "no timer for the doorbell");
}

#[test]
fn a_tick_does_not_wait_for_the_doorbell_and_drops_its_status_early() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, TestDevConfig { aggression_delay_ms: 100, ..config() }));
    bar.write32(reg::BUSY_DELAY, 5).unwrap();
    start(&bar, BASE, BASE + 0x100, 4);
    bar.write32(reg::AGGRESSIVE, 1).unwrap();
    assert_eq!((step(&bar, 0), bar.read32(reg::STATUS)), (Activity::Until(5 * MS), Ok(0)));
    step(&bar, 5 * MS);
    assert_eq!(bar.read32(reg::COUNT), Ok(2));
}

#[test]
fn time_passes_between_ticks_without_a_delay() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, TestDevConfig { aggressive: true, ..config() }));
    assert_eq!(step(&bar, 0), Activity::Until(1000));
}

#[test]
fn a_pasid_travels_with_every_access_and_only_reads_are_fetches() {
    let port = TestPort::new(BASE, 0x1000);
    let bar = bar(device(&port, config()));
    bar.write32(reg::PASID_CTRL, 0xe001_2345).unwrap();
    start(&bar, BASE, BASE + 0x100, 4);
    run(&bar);
    let log = port.take_log();
    assert!(log.iter().all(|s| s.from.substream == Some(SubstreamId(0x1_2345)) && s.from.attrs.privileged()));
    assert_eq!(log.iter().map(|s| s.from.attrs.instruction()).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn the_upper_address_halves_reach_all_of_memory() {
    let port = TestPort::new(0x80_4000_0000, 0x1000);
    let data = fill(&port, 0x80_4000_0000, 8);
    let bar = bar(device(&port, config()));
    for (offset, value) in
        [(0x00, 0x4000_0000), (0x08, 0x4000_0100), (0x128, 0x80), (0x12c, 0x80), (0x10, 8), (0x18, 1)]
    {
        bar.write32(offset, value).unwrap();
    }
    run(&bar);
    assert_eq!(port.bytes(0x80_4000_0100, 8), data);
}

#[test]
fn the_wire_rises_on_completion_until_it_is_acknowledged() {
    let port = TestPort::new(BASE, 0x1000);
    let lines = Arc::new(IrqLevels::default());
    let irq = IrqLine::new(lines.clone(), 9);
    let bar = bar(TestDev::new(config(), Box::new(port.clone()), irq));
    start(&bar, BASE, BASE + 0x100, 4);
    run(&bar);
    assert!(!lines.level(9), "not enabled");
    bar.write32(reg::IRQ_CTRL, 1).unwrap();
    start(&bar, 0, BASE + 0x100, 4);
    run(&bar);
    assert_eq!((lines.level(9), bar.read32(reg::IRQ_CTRL)), (true, Ok(0x8000_0001)));
    bar.write32(reg::IRQ_CTRL, 0x8000_0001).unwrap();
    assert_eq!((lines.level(9), lines.rises(9), bar.read32(reg::IRQ_CTRL)), (false, 1, Ok(1)));
}

#[test]
fn a_message_is_a_write_through_the_port_or_goes_to_the_sink() {
    #[derive(Default)]
    struct Sink(Mutex<Vec<(Pa, u32)>>);
    impl InterruptSink for Sink {
        fn set_level(&self, _: u32, _: bool) {}
        fn message(&self, address: Pa, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }
    let port = TestPort::new(BASE, 0x1000);
    let ring = |device: TestDev, address: u64| {
        let bar = bar(device);
        for (offset, value) in
            [(reg::IRQ_CTRL, 3), (reg::MSI_DATA, 0x1234), (reg::MSI_ADDR_LO, address as u32)]
        {
            bar.write32(offset, value).unwrap();
        }
        start(&bar, BASE, BASE + 0x100, 4);
        run(&bar);
        assert_eq!(bar.read32(reg::IRQ_CTRL), Ok(3), "a message has no level");
        bar.0.lock().unwrap().lost_messages()
    };
    assert_eq!(ring(device(&port, config()), BASE + 0x800), 0);
    assert_eq!(port.bytes(BASE + 0x800, 4), 0x1234u32.to_le_bytes());
    assert_eq!(ring(device(&port, config()), 0x100), 1);
    let sink = Arc::new(Sink::default());
    assert_eq!(ring(device(&port, config()).with_messages(sink.clone()), 0x100), 0);
    assert_eq!(*sink.0.lock().unwrap(), [(Pa(0x100), 0x1234)]);
}

#[test]
fn an_impossible_state_is_refused() {
    let port = TestPort::new(BASE, 0x1000);
    port.add(BASE..BASE + 1, Access::Read, Rule::Stall);
    let bar = bar(device(&port, config()));
    start(&bar, BASE, BASE + 0x100, 64);
    step(&bar, 0);
    let json = serde_json::to_string(&bar.0.lock().unwrap().save()).unwrap();
    let mut small = device(&port, TestDevConfig { max_bytes: 32, ..config() });
    assert!(small.restore(serde_json::from_str(&json).unwrap()).is_err());
    for (from, to) in [("\"written\":0", "\"written\":1"), ("\"arrived\":0", "\"arrived\":1")] {
        let bad = json.replacen(from, to, 1);
        assert_ne!(bad, json);
        assert!(device(&port, config()).restore(serde_json::from_str(&bad).unwrap()).is_err(), "{to}");
    }
    let bad = json.replacen("\"version\":1", "\"version\":2", 1);
    let refused = device(&port, config()).restore(serde_json::from_str(&bad).unwrap());
    assert_eq!(refused, Err(RestoreError::Version { found: 2, expected: 1 }));
}

#[test]
fn random_register_accesses_never_panic_and_always_come_to_an_end() {
    let port = TestPort::new(BASE, 0x4000);
    port.add(BASE + 0x1000..BASE + 0x1800, Access::Read, Rule::Terminate);
    port.add(BASE + 0x2000..BASE + 0x2800, Access::Write, Rule::Terminate);
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    for extended in [false, true] {
        let bar = bar(device(&port, TestDevConfig { extended, max_bytes: 0x2000, ..config() }));
        let mut now = 0u64;
        for round in 0..60_000 {
            let offset = match next() % 4 {
                0 => next(),
                1 => next() % 0x1_0010,
                2 => 0x100 + next() % 0x40,
                _ => (next() % 7) * 8,
            };
            let len = [1, 2, 4, 4, 8, 3, 0, 16][(next() % 8) as usize];
            let value = [next(), BASE + next() % 0x5000, next() % 0x3000, 1][(next() % 4) as usize];
            let mut data = [0; 16];
            data[..8].copy_from_slice(&value.to_le_bytes());
            if next() % 3 == 0 {
                let _ = bar.mmio_read(offset, &mut data[..len]);
            } else {
                let _ = bar.mmio_write(offset, &data[..len]);
            }
            if round % 977 == 0 {
                port.add(BASE + 0x3000..BASE + 0x3001, Access::Write, Rule::Stall);
            }
            now = now.saturating_add(next() % (2 * MS));
            if step(&bar, now) == Activity::Stalled && next() % 2 == 0 {
                let decided = [
                    StallState::Retry,
                    StallState::Terminated { abort: true },
                    StallState::Terminated { abort: false },
                ];
                port.resume_all(decided[(next() % 3) as usize]);
                port.clear_rules();
            }
            if round % 64 == 0 {
                port.take_log();
            }
        }
        assert!(bar.0.lock().unwrap().count() > 100);
        let mut d = bar.0.lock().unwrap();
        d.values.aggressive = false;
        port.clear_rules();
        port.resume_all(StallState::Retry);
        let rests = (0..1000).any(|_| d.step(u64::MAX) == Activity::Idle);
        assert!(rests, "comes to rest");
    }
}
