//! A trace file in the JSON trace event format, which Perfetto's viewer opens: one process per scenario, one track
//! per engine and register window, simulated time.

use std::collections::BTreeMap;

use portcullis_board::sim::{Event, EventKind};
use serde_json::{Value, json};

/// Collects the events of a run.
#[derive(Default)]
pub struct Trace {
    events: Vec<Value>,
    scenarios: u32,
}

impl Trace {
    /// Adds the events of one scenario.
    pub fn add(&mut self, scenario: &str, events: &[Event]) {
        self.scenarios += 1;
        let pid = self.scenarios;
        self.events.push(json!({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": scenario}}));
        let mut tracks = BTreeMap::new();
        for event in events {
            let (track, name, args) = describe(&event.kind);
            let next = tracks.len() as u32 + 1;
            let tid = *tracks.entry(track.clone()).or_insert_with(|| {
                let args = json!({"name": track});
                self.events
                    .push(json!({"ph": "M", "pid": pid, "tid": next, "name": "thread_name", "args": args}));
                next
            });
            let (ts, dur) = (event.at as f64 / 1000.0, event.lasted as f64 / 1000.0);
            self.events.push(if event.lasted > 0 {
                json!({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args})
            } else {
                json!({"ph": "i", "s": "t", "pid": pid, "tid": tid, "name": name, "ts": ts, "args": args})
            });
        }
    }

    /// The file's contents.
    pub fn finish(self) -> String {
        json!({"displayTimeUnit": "ns", "traceEvents": self.events}).to_string()
    }
}

/// Track, name and arguments of an event.
fn describe(kind: &EventKind) -> (String, String, Value) {
    match kind {
        EventKind::Register { device, offset, size, write, value } => (
            format!("registers of {device}"),
            format!("{} {offset:#x}", if *write { "write" } else { "read" }),
            json!({"offset": format!("{offset:#x}"), "bytes": size, "value": format!("{value:#x}")}),
        ),
        EventKind::Transaction(t) => (
            t.engine.to_string(),
            format!("{} {}", t.access, t.iova),
            json!({
                "stream": format!("{:#x}", t.stream),
                "iova": format!("{:#x}", t.iova),
                "bytes": t.len,
                "result": t.error.map_or_else(|| "ok".to_string(), |(n, e)| format!("{e} after {n} bytes")),
            }),
        ),
        EventKind::Interrupt { line, high } => (
            "interrupts".into(),
            format!("SPI {line} {}", if *high { "high" } else { "low" }),
            json!({"line": line}),
        ),
        EventKind::Stale(s) => ("stale reads".into(), "stale read".into(), json!({"text": s.to_string()})),
        EventKind::Note(text) => ("steps".into(), text.clone(), json!({})),
    }
}
