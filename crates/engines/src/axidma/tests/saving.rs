//! Save and restore at any point changes nothing.

use portcullis_arch::Access;

use super::paths::outcome;
use super::*;
use crate::RestoreError;
use crate::testport::Rule;

/// Through text and into a new core on the same port.
fn move_over(dma: &mut AxiDma, port: &TestPort) {
    let json = serde_json::to_string(&dma.save()).unwrap();
    let mut new = build(*dma.config(), port);
    new.cut_through = dma.cut_through;
    new.restore(serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!(new.save(), dma.save());
    assert_eq!(new.irq_levels(), dma.irq_levels());
    *dma = new;
}

#[test]
fn random_runs_survive_moving_after_any_step() {
    for seed in 0..200 {
        let expected = outcome(seed, true, |_, _| {});
        assert_eq!(outcome(seed, true, move_over), expected, "after every step, seed {seed}");
        let mut steps = 0;
        let once = |dma: &mut AxiDma, port: &TestPort| {
            steps += 1;
            if steps % 3 == seed % 3 {
                move_over(dma, port);
            }
        };
        assert_eq!(outcome(seed, true, once), expected, "now and then, seed {seed}");
    }
}

#[test]
fn the_delay_timer_survives() {
    let port = port();
    let mut dma = core(&port);
    dma.w(reg::DMACR, 0x0402_7000);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 8 | SOF | EOF)]));
    assert_eq!(dma.step(100), Activity::Until(5100));
    move_over(&mut dma, &port);
    assert_eq!(dma.step(5099), Activity::Until(5100));
    move_over(&mut dma, &port);
    assert_eq!(dma.step(5100), Activity::Idle);
    assert!(dma.irq_levels()[0]);
}

#[test]
fn impossible_states_are_refused_and_change_nothing() {
    let port = port();
    let mut dma = core(&port);
    port.add(SRC + 50..SRC + 51, Access::Read, Rule::Stall);
    dma.go(MM2S, TX, ring(&port, TX, &[(SRC, 100 | SOF | EOF)]));
    assert_eq!(dma.settle(2), Activity::Stalled);
    let good = serde_json::to_value(dma.save()).unwrap();
    let edit = |path: &str, value: serde_json::Value| {
        let mut state = good.clone();
        *state.pointer_mut(path).unwrap() = value;
        serde_json::from_value::<super::super::AxiDmaState>(state).unwrap()
    };
    let version = dma.restore(edit("/version", 2.into()));
    assert_eq!(version, Err(RestoreError::Version { found: 2, expected: 1 }));
    for (path, value) in [
        ("/mm2s/control", serde_json::json!(0x0001_0005)),
        ("/mm2s/control", serde_json::json!(0x3)),
        ("/mm2s/status", serde_json::json!(1)),
        ("/mm2s/status", serde_json::json!(1 << 4)),
        ("/mm2s/halted", serde_json::json!(true)),
        ("/mm2s/current", serde_json::json!(1)),
        ("/mm2s/threshold_left", serde_json::json!(2)),
        ("/mm2s/length", serde_json::json!(0x400_0000)),
        ("/mm2s/work/left", serde_json::json!(0x400_0000)),
        ("/mm2s/work/left", serde_json::json!(u32::MAX)),
        ("/mm2s/work/left", serde_json::json!(0)),
        ("/mm2s/work/error", serde_json::json!(1 << 5)),
        ("/mm2s/work/next", serde_json::json!(4)),
        ("/mm2s/work/voided", serde_json::json!(51)),
        ("/s2mm/parked", serde_json::json!(7)),
        ("/s2mm/queued", serde_json::json!(true)),
        ("/fifo/data", serde_json::json!(vec![0; 4097])),
        ("/fifo/ends", serde_json::json!([51])),
        ("/fifo/ends", serde_json::json!([20, 20])),
    ] {
        let result = dma.restore(edit(path, value.clone()));
        assert!(matches!(result, Err(RestoreError::Impossible(_))), "{path} {value}");
    }
    assert_eq!(serde_json::to_value(dma.save()).unwrap(), good);
}
