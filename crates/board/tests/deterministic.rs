//! A board is a function of what is done to it: the same calls give the same record, event by event.

mod common;

use common::workload::{self, Coherent};
use common::{Board, coherent, thesis};
use portcullis_board::sim::{Machine, Options, Recording};
use portcullis_board::system::{BootOptions, System};

fn record(cpu_cache: bool, kind: Coherent) -> Vec<String> {
    let description = if kind == Coherent::Everything { coherent() } else { thesis() };
    let recording = Recording { registers: true, explain: true };
    let options = Options { cpu_cache, recording, plain_ports: false };
    let machine = Machine::build(description, options).unwrap();
    let board = Board { system: System::boot(machine, &BootOptions::default()).unwrap() };
    workload::run(&board, kind);
    board.events().iter().map(|e| format!("{e:?}")).collect()
}

#[test]
fn the_same_calls_give_the_same_record() {
    for (cpu_cache, kind) in
        [(false, Coherent::Nothing), (true, Coherent::Nothing), (true, Coherent::Everything)]
    {
        let (first, second) = (record(cpu_cache, kind), record(cpu_cache, kind));
        assert!(first.len() > 1000, "{} events", first.len());
        for (i, (a, b)) in first.iter().zip(&second).enumerate() {
            assert_eq!(a, b, "event {i} of {}, cache {cpu_cache}, {kind:?}", first.len());
        }
        assert_eq!(first.len(), second.len());
    }
}

#[test]
fn time_only_goes_forward_and_a_step_takes_some() {
    let board = Board::new();
    workload::run(&board, Coherent::Nothing);
    let events = board.events();
    assert!(events.windows(2).all(|pair| pair[0].at + pair[0].lasted <= pair[1].at));
    let before = board.machine().tracer().now();
    board.machine().step();
    assert!(board.machine().tracer().now() > before);
}

#[test]
fn what_is_not_asked_for_is_not_written_down() {
    let machine = Machine::build(thesis(), Options::default()).unwrap();
    let board = Board { system: System::boot(machine, &BootOptions::default()).unwrap() };
    workload::run(&board, Coherent::Nothing);
    let plain = board.events();
    assert!(plain.iter().all(|e| !matches!(e.kind, portcullis_board::sim::EventKind::Register { .. })));
    let explained = plain.iter().filter(|e| match &e.kind {
        portcullis_board::sim::EventKind::Transaction(t) => !t.translations.is_empty(),
        _ => false,
    });
    assert_eq!(explained.count(), 0);
}
