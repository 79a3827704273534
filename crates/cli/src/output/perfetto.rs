//! A trace file in the JSON trace event format, which Perfetto's viewer opens: one process per scenario, one track
//! per engine and register window, simulated time.

use std::collections::BTreeMap;
use std::io::{self, Write};

use portcullis_board::sim::{Event, EventKind};
use serde_json::{Value, json};

use super::ats;

/// Writes the events of a run to a file as they come.
pub struct Trace<W> {
    file: W,
    scenarios: u32,
    events: u64,
    /// Tracks of the scenario under way.
    tracks: BTreeMap<String, u32>,
}

impl<W: Write> Trace<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// Those of the file.
    pub fn new(mut file: W) -> io::Result<Self> {
        file.write_all(b"{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
        Ok(Self { file, scenarios: 0, events: 0, tracks: BTreeMap::new() })
    }

    fn put(&mut self, event: &Value) -> io::Result<()> {
        let comma = if self.events > 0 { "," } else { "" };
        self.events += 1;
        write!(self.file, "{comma}\n{event}")
    }

    /// Adds the events of one scenario.
    ///
    /// # Errors
    /// Those of the file.
    pub fn add(&mut self, scenario: &str, events: &[Event]) -> io::Result<()> {
        self.begin(scenario)?;
        self.more(events)
    }

    /// Begins a scenario.
    ///
    /// # Errors
    /// Those of the file.
    pub fn begin(&mut self, scenario: &str) -> io::Result<()> {
        self.scenarios += 1;
        self.tracks.clear();
        let pid = self.scenarios;
        self.put(&json!({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": scenario}}))
    }

    /// Adds events of the scenario that was begun last.
    ///
    /// # Errors
    /// Those of the file.
    pub fn more(&mut self, events: &[Event]) -> io::Result<()> {
        let pid = self.scenarios;
        for event in events {
            let (track, name, args) = describe(&event.kind);
            let next = self.tracks.len() as u32 + 1;
            let tid = *self.tracks.entry(track.clone()).or_insert(next);
            if tid == next {
                let args = json!({"name": track});
                self.put(&json!({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": args}))?;
            }
            let (ts, dur) = (event.at as f64 / 1000.0, event.lasted as f64 / 1000.0);
            self.put(&if event.lasted > 0 {
                json!({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args})
            } else {
                json!({"ph": "i", "s": "t", "pid": pid, "tid": tid, "name": name, "ts": ts, "args": args})
            })?;
        }
        Ok(())
    }

    /// Ends the trace and gives the file back.
    ///
    /// # Errors
    /// Those of the file.
    pub fn finish(mut self) -> io::Result<W> {
        self.file.write_all(b"\n]}\n")?;
        self.file.flush()?;
        Ok(self.file)
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
            format!("{} {:#x}", t.access, t.iova),
            json!({
                "stream": format!("{:#x}", t.stream),
                "substream": t.substream.map(|s| format!("{s:#x}")),
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
        EventKind::Ats { engine, what } => {
            let (kind, text, refused) = ats::text(what);
            (engine.to_string(), format!("ATS {kind}"), json!({"text": text, "refused": refused}))
        }
        EventKind::Message { address, data, lpi } => (
            "interrupts".into(),
            format!("LPI {lpi}"),
            json!({"address": format!("{address:#x}"), "data": data, "lpi": lpi}),
        ),
        EventKind::Stale(s) => ("stale reads".into(), "stale read".into(), json!({"text": s.to_string()})),
        EventKind::Note(text) => ("steps".into(), text.clone(), json!({})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_json_with_one_track_per_source() {
        let note = |at, text: &str| Event { at, lasted: 0, kind: EventKind::Note(text.into()) };
        let high = Event { at: 1500, lasted: 0, kind: EventKind::Interrupt { line: 155, high: true } };
        let mut trace = Trace::new(Vec::new()).unwrap();
        trace.add("one", &[note(0, "a \"quoted\" step"), high, note(2000, "b")]).unwrap();
        trace.add("two", &[]).unwrap();
        let value: Value = serde_json::from_slice(&trace.finish().unwrap()).unwrap();
        let events = value["traceEvents"].as_array().unwrap();
        let tracks = events.iter().filter(|e| e["name"] == "thread_name").count();
        let processes = events.iter().filter(|e| e["name"] == "process_name").count();
        assert_eq!((tracks, processes, events.len()), (2, 2, 7));
        assert_eq!(events[4]["ts"], 1.5);
    }

    #[test]
    fn a_trace_of_nothing_is_json() {
        let bytes = Trace::new(Vec::new()).unwrap().finish().unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap()["traceEvents"], json!([]));
    }
}
