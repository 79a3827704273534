//! Save and restore at any point of a run changes nothing.

use portcullis_arch::Access;
use portcullis_arch::zdma::REGISTERS;
use portcullis_bus::StallState;

use super::*;
use crate::RestoreError;
use crate::testport::Rule;

const LIST: u64 = RAM + 0x1000;
const OTHER: u64 = RAM + 0x8000;

/// Through text and into a new channel on the same port.
fn move_over(z: &Zdma, port: &TestPort) -> Zdma {
    let json = serde_json::to_string(&z.save()).unwrap();
    let mut new = fpd(port);
    new.restore(serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!(new.save(), z.save());
    assert_eq!(new.irq_level(), z.irq_level());
    new
}

/// Runs to the end, moving over after the actions that `when` picks, and returns everything visible.
fn run(when: impl Fn(usize) -> bool, start: impl Fn(&TestPort, &mut Zdma)) -> (Vec<u8>, Vec<u32>) {
    let port = port();
    let mut z = fpd(&port);
    port.put(SRC, &Random(77).bytes(150_000));
    z.w(reg::IEN, 0x7fd);
    start(&port, &mut z);
    for i in 0..100 {
        let activity = z.step(0);
        if when(i) {
            z = move_over(&z, &port);
        }
        match activity {
            Activity::Stalled => port.resume_all(StallState::Retry),
            Activity::Idle if z.r(reg::STATUS) == 1 => z.w(reg::CTRL0, SG | 2),
            Activity::Idle => break,
            _ => {}
        }
    }
    let registers = REGISTERS.iter().map(|r| z.r(r.offset)).collect();
    (port.bytes(DST, 200_000), registers)
}

fn lists(port: &TestPort, z: &mut Zdma) {
    put_linked(port, LIST, SRC, 70_000, control(Command::Pause, true), LIST + 0x40);
    put_linked(port, LIST + 0x40, SRC + 70_000, 80_000, control(Command::Stop, true), 0);
    put_linear(port, OTHER, DST + 1, 100_000, control(Command::Next, true));
    put_linear(port, OTHER + 16, DST + 110_000, 50_000, control(Command::Next, true));
    for (at, access) in [
        (LIST + 8, Access::Read),
        (LIST + 0x50, Access::Read),
        (OTHER + 4, Access::Read),
        (SRC + 50, Access::Read),
        (DST + 99_999, Access::Write),
    ] {
        port.add(at..at + 1, access, Rule::Stall);
    }
    z.start_lists(LIST, OTHER);
}

#[test]
fn a_run_of_lists_with_pauses_and_stalls_survives_moving_at_any_step() {
    let expected = run(|_| false, lists);
    for at in 0..15 {
        assert_eq!(run(|i| i == at, lists), expected, "moved after step {at}");
    }
    assert_eq!(run(|_| true, lists), expected);
}

#[test]
fn data_in_the_buffer_and_the_fill_position_survive() {
    for (mode, attr) in [(0, 0x0083_d20f), (0, 0x0483_c20f), (1, 0x0483_d20f), (2, 0x0483_d20f)] {
        let start = |port: &TestPort, z: &mut Zdma| {
            z.w(reg::DATA_ATTR, attr);
            z.w(reg::WR_ONLY_WORD0, 0x0403_0201);
            for at in [DST, DST + 77, SRC + 33] {
                port.add(at..at + 1, Access::Write, Rule::Stall);
                port.add(at..at + 1, Access::Read, Rule::Stall);
            }
            z.start_simple(mode, SRC, DST, 1000);
        };
        let expected = run(|_| false, start);
        assert_eq!(run(|_| true, start), expected, "mode {mode} {attr:#x}");
    }
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let port = port();
    let mut z = fpd(&port);
    port.add(SRC + 50..SRC + 51, Access::Read, Rule::Stall);
    z.start_simple(0, SRC, DST, 1000);
    assert_eq!(z.step(0), Activity::Stalled);
    let good = serde_json::to_value(z.save()).unwrap();
    let edit = |path: &str, value: serde_json::Value| {
        let mut state = good.clone();
        *state.pointer_mut(path).unwrap() = value;
        serde_json::from_value::<super::super::ZdmaState>(state).unwrap()
    };
    let version = z.restore(edit("/version", 2.into()));
    assert_eq!(version, Err(RestoreError::Version { found: 2, expected: 1 }));
    let register = z.restore(edit("/registers/0/0", 0x8.into()));
    assert_eq!(register, Err(RestoreError::UnknownRegister(8)));
    for (path, value) in [
        ("/run/source/left", serde_json::json!(0x4000_0000u32)),
        ("/run/source/at", serde_json::json!(1u64 << 49)),
        ("/run/destination/next", serde_json::json!(u64::MAX)),
        ("/run/destination/have", serde_json::json!(33)),
        ("/run/destination/left", serde_json::json!(1)),
        ("/run/staged/written", serde_json::json!(1)),
        ("/run/fill_at", serde_json::json!(16)),
        ("/run/phase", serde_json::json!("Done")),
        ("/run/source/loaded", serde_json::json!(false)),
    ] {
        assert!(matches!(z.restore(edit(path, value)), Err(RestoreError::Impossible(_))), "{path}");
    }
    assert_eq!(serde_json::to_value(z.save()).unwrap(), good);
}
