//! QEMU's machine protocol: commands and events as one JSON object per line (QEMU, `docs/interop/qmp-spec.rst`).
//!
//! Answers carry the number of their command, so that a late answer is recognized and dropped.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::control::{ControlError, Failure, connect};
use super::lines::{LineError, Lines};
use super::process::Deadline;

/// Most events kept for [`Qmp::next_event`]; a guest that resets in a loop makes no more than that.
const MAX_EVENTS: usize = 1024;

/// Why QEMU reset or ended the machine (`ShutdownCause` in QEMU's `qapi/run-state.json`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest asked for a reboot.
    GuestReset,
    /// The guest powered off.
    GuestShutdown,
    /// The guest panicked and told a device about it. A kernel that only reboots after a panic is [`Self::GuestReset`].
    GuestPanic,
    /// Our `quit`.
    HostQuit,
    /// Our `system_reset`.
    HostReset,
    /// A signal to QEMU.
    HostSignal,
    /// QEMU met an error.
    HostError,
    /// Another word.
    Other(String),
}

impl Reason {
    fn parse(word: &str) -> Self {
        match word {
            "guest-reset" => Self::GuestReset,
            "guest-shutdown" => Self::GuestShutdown,
            "guest-panic" => Self::GuestPanic,
            "host-qmp-quit" => Self::HostQuit,
            "host-qmp-system-reset" => Self::HostReset,
            "host-signal" => Self::HostSignal,
            "host-error" => Self::HostError,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QmpEvent {
    /// The machine ends, or has stopped instead of ending (see [`super::Launch::no_reboot`]).
    Shutdown(Reason),
    /// The machine was reset.
    Reset(Reason),
    /// The guest panicked; the action that QEMU took.
    GuestPanicked(String),
    /// The processors stopped.
    Stop,
    /// The processors go on.
    Resume,
    /// Any other event, by name.
    Other(String),
}

/// Answer to `query-status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunState {
    /// Whether the processors run.
    pub running: bool,
    /// QEMU's word: `running`, `prelaunch`, `paused`, `shutdown`, ...
    pub status: String,
}

/// A connection to QEMU's QMP socket.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    timeout: Duration,
    next_id: u64,
    events: VecDeque<QmpEvent>,
    lost_events: u64,
    lost: bool,
}

/// A line from QEMU.
enum Message {
    Event(QmpEvent),
    Answer { id: Option<u64>, result: Result<Value, String> },
    Greeting,
}

impl Qmp {
    pub(super) fn connect(
        path: &Path,
        deadline: Deadline,
        timeout: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Self, ControlError> {
        let lines = connect("QMP", path, deadline, give_up)?;
        Self::greet(lines, deadline, timeout, give_up)
    }

    /// Waits for the greeting and leaves the negotiation mode.
    pub(super) fn greet(
        lines: Lines,
        deadline: Deadline,
        timeout: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Self, ControlError> {
        let mut qmp =
            Self { lines, timeout, next_id: 1, events: VecDeque::new(), lost_events: 0, lost: false };
        let greeting = "the greeting";
        loop {
            // In steps: QEMU says nothing before its devices are built, and it may die before.
            let step = Deadline::after(deadline.remaining().min(Duration::from_millis(50)));
            match qmp.receive(greeting, step, timeout) {
                Ok((Message::Greeting, _)) => break,
                Ok((_, line)) => return Err(ControlError::new("QMP", greeting, Failure::Garbage(line))),
                Err(error) if matches!(error.failure(), Failure::Late(_)) => {
                    if give_up() || deadline.is_over() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        qmp.execute("qmp_capabilities", None)?;
        Ok(qmp)
    }

    /// Runs a command and gives its `return`.
    ///
    /// # Errors
    /// [`ControlError`], with QEMU's own words where it refuses.
    pub fn execute(&mut self, command: &str, arguments: Option<Value>) -> Result<Value, ControlError> {
        let fail = |failure| ControlError::new("QMP", command, failure);
        if self.lost {
            return Err(fail(Failure::Lost));
        }
        let deadline = Deadline::after(self.timeout);
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let mut request = Map::new();
        request.insert("execute".into(), json!(command));
        request.insert("id".into(), json!(id));
        if let Some(arguments) = arguments {
            request.insert("arguments".into(), arguments);
        }
        if let Err(error) = self.lines.send(&Value::Object(request).to_string(), deadline) {
            // Part of the line may be on its way: nothing sent after it would be understood.
            self.lost = true;
            return Err(fail(Failure::line(error, self.timeout)));
        }
        loop {
            match self.receive(command, deadline, self.timeout)? {
                (Message::Event(event), _) => self.keep(event),
                (Message::Answer { id: Some(answered), result }, _) if answered == id => {
                    return result.map_err(|text| fail(Failure::Refused(text)));
                }
                // The late answer to a command that was given up.
                (Message::Answer { id: Some(answered), .. }, _) if answered < id => {}
                // QEMU answers without a number what it could not parse.
                (_, line) => return Err(fail(Failure::Garbage(line))),
            }
        }
    }

    /// The next event, waiting for it at most `timeout`; `None` when none came.
    ///
    /// # Errors
    /// [`ControlError`]: the connection closed (QEMU ended), or what came is no QMP.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<QmpEvent>, ControlError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let waiting = "waiting for an event";
        if self.lost {
            return Err(ControlError::new("QMP", waiting, Failure::Lost));
        }
        let deadline = Deadline::after(timeout);
        loop {
            match self.receive(waiting, deadline, timeout) {
                Ok((Message::Event(event), _)) => return Ok(Some(event)),
                Ok((Message::Answer { .. }, _)) => {}
                Ok((Message::Greeting, line)) => {
                    return Err(ControlError::new("QMP", waiting, Failure::Garbage(line)));
                }
                Err(error) if matches!(error.failure(), Failure::Late(_)) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Events dropped because nobody asked for them.
    #[must_use]
    pub fn lost_events(&self) -> u64 {
        self.lost_events
    }

    pub(super) fn keep(&mut self, event: QmpEvent) {
        if self.events.len() >= MAX_EVENTS {
            self.events.pop_front();
            self.lost_events = self.lost_events.saturating_add(1);
        }
        self.events.push_back(event);
    }

    fn receive(
        &mut self,
        command: &str,
        deadline: Deadline,
        timeout: Duration,
    ) -> Result<(Message, String), ControlError> {
        match self.lines.receive(deadline) {
            Ok(line) => match parse(&line) {
                Some(message) => Ok((message, line)),
                None => Err(ControlError::new("QMP", command, Failure::Garbage(line))),
            },
            Err(error) => {
                self.lost |= !matches!(error, LineError::Late);
                Err(ControlError::new("QMP", command, Failure::line(error, timeout)))
            }
        }
    }
}

fn parse(line: &str) -> Option<Message> {
    let Value::Object(object) = serde_json::from_str(line).ok()? else { return None };
    if object.contains_key("QMP") {
        return Some(Message::Greeting);
    }
    if let Some(event) = object.get("event") {
        return Some(Message::Event(event_of(event.as_str()?, object.get("data"))));
    }
    let id = object.get("id").and_then(Value::as_u64);
    if let Some(value) = object.get("return") {
        return Some(Message::Answer { id, result: Ok(value.clone()) });
    }
    let error = object.get("error")?;
    let text = error.get("desc").and_then(Value::as_str).map_or_else(|| error.to_string(), str::to_owned);
    Some(Message::Answer { id, result: Err(text) })
}

fn event_of(name: &str, data: Option<&Value>) -> QmpEvent {
    let word = |key| data.and_then(|data| data.get(key)).and_then(Value::as_str).unwrap_or_default();
    match name {
        "SHUTDOWN" => QmpEvent::Shutdown(Reason::parse(word("reason"))),
        "RESET" => QmpEvent::Reset(Reason::parse(word("reason"))),
        "GUEST_PANICKED" => QmpEvent::GuestPanicked(word("action").to_owned()),
        "STOP" => QmpEvent::Stop,
        "RESUME" => QmpEvent::Resume,
        other => QmpEvent::Other(other.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}}, "capabilities": []}}"#;

    /// A peer that greets, then answers every command by `answer(command, id)`; it closes when that gives `None`.
    fn peer(
        answer: impl Fn(&str, u64) -> Option<String> + Send + 'static,
    ) -> (Result<Qmp, ControlError>, JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            let _ = writeln!(writer, "{GREETING}");
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                let request: Value = serde_json::from_str(&line).unwrap();
                let id = request["id"].as_u64().unwrap();
                let command = request["execute"].as_str().unwrap();
                let Some(text) = (match command {
                    "qmp_capabilities" => Some(format!("{{\"return\": {{}}, \"id\": {id}}}")),
                    other => answer(other, id),
                }) else {
                    return;
                };
                if !text.is_empty() {
                    let _ = writeln!(writer, "{text}");
                }
            }
        });
        let short = Duration::from_millis(200);
        let qmp = Qmp::greet(Lines::new(ours).unwrap(), Deadline::after(short), short, &mut || false);
        (qmp, thread)
    }

    fn failure_of(answer: &'static str) -> ControlError {
        let (qmp, thread) = peer(move |_, _| Some(answer.to_owned()));
        let error = qmp.unwrap().execute("cont", None).unwrap_err();
        thread.join().unwrap();
        error
    }

    #[test]
    fn events_that_come_before_an_answer_are_kept_in_order() {
        let (qmp, _thread) = peer(|_, id| {
            let stop = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#;
            let reset = r#"{"event": "RESET", "data": {"guest": true, "reason": "guest-reset"}}"#;
            Some(format!("{stop}\n{reset}\n{{\"return\": {{\"x\": 7}}, \"id\": {id}}}"))
        });
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.execute("stop", None).unwrap()["x"], 7);
        assert_eq!(qmp.next_event(Duration::ZERO).unwrap(), Some(QmpEvent::Stop));
        assert_eq!(qmp.next_event(Duration::ZERO).unwrap(), Some(QmpEvent::Reset(Reason::GuestReset)));
        assert_eq!(qmp.next_event(Duration::from_millis(20)).unwrap(), None);
    }

    #[test]
    fn every_event_that_callers_act_on_is_recognized() {
        let event = |text: &str| match parse(text) {
            Some(Message::Event(event)) => event,
            _ => panic!("{text}"),
        };
        let shutdown = |reason: &str| {
            event(&format!("{{\"event\":\"SHUTDOWN\",\"data\":{{\"guest\":true,\"reason\":\"{reason}\"}}}}"))
        };
        for (word, reason) in [
            ("guest-reset", Reason::GuestReset),
            ("guest-shutdown", Reason::GuestShutdown),
            ("guest-panic", Reason::GuestPanic),
            ("host-qmp-quit", Reason::HostQuit),
            ("host-qmp-system-reset", Reason::HostReset),
            ("host-signal", Reason::HostSignal),
            ("host-error", Reason::HostError),
            ("snapshot-load", Reason::Other("snapshot-load".into())),
        ] {
            assert_eq!(shutdown(word), QmpEvent::Shutdown(reason));
        }
        assert_eq!(event(r#"{"event":"SHUTDOWN"}"#), QmpEvent::Shutdown(Reason::Other(String::new())));
        assert_eq!(
            event(r#"{"event":"GUEST_PANICKED","data":{"action":"pause"}}"#),
            QmpEvent::GuestPanicked("pause".into())
        );
        assert_eq!(event(r#"{"event":"RESUME"}"#), QmpEvent::Resume);
        assert_eq!(event(r#"{"event":"NIC_RX"}"#), QmpEvent::Other("NIC_RX".into()));
    }

    #[test]
    fn an_error_carries_qemus_words() {
        let (qmp, _thread) = peer(|_, id| {
            let error = "Resetting the Virtual Machine is required";
            Some(format!(
                "{{\"id\": {id}, \"error\": {{\"class\": \"GenericError\", \"desc\": \"{error}\"}}}}"
            ))
        });
        let error = qmp.unwrap().execute("cont", None).unwrap_err();
        assert!(matches!(error.failure(), Failure::Refused(_)));
        assert!(error.to_string().contains("cont") && error.to_string().contains("Resetting"), "{error}");
    }

    #[test]
    fn garbage_is_an_error_that_shows_what_came() {
        for answer in
            ["hello", "[]", "{}", "7", "{\"event\": 7}", "{\"return\": {}}", "{\"return\": {}, \"id\": 99}"]
        {
            let error = failure_of(answer);
            assert!(matches!(error.failure(), Failure::Garbage(_)), "{answer}: {error}");
            assert!(error.to_string().contains("cont") && error.to_string().contains(answer), "{error}");
        }
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_one() {
        let (qmp, _thread) = peer(|command, id| {
            Some(match command {
                "stop" => String::new(),
                _ => format!(
                    "{{\"return\": \"late\", \"id\": {}}}\n{{\"return\": \"mine\", \"id\": {id}}}",
                    id - 1
                ),
            })
        });
        let mut qmp = qmp.unwrap();
        assert!(matches!(qmp.execute("stop", None).unwrap_err().failure(), Failure::Late(_)));
        assert_eq!(qmp.execute("cont", None).unwrap(), json!("mine"));
    }

    #[test]
    fn the_end_of_the_connection_is_told_and_stays() {
        let (qmp, thread) = peer(|_, _| None);
        let mut qmp = qmp.unwrap();
        assert!(matches!(qmp.execute("stop", None).unwrap_err().failure(), Failure::Closed));
        thread.join().unwrap();
        assert!(matches!(qmp.execute("stop", None).unwrap_err().failure(), Failure::Lost));
        assert!(qmp.next_event(Duration::from_secs(100)).is_err());
    }

    #[test]
    fn a_peer_that_does_not_greet_or_greets_with_nonsense_is_refused() {
        for greeting in [None, Some("220 mail.example ESMTP\n"), Some("{\"return\": {}}\n")] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            if let Some(greeting) = greeting {
                theirs.write_all(greeting.as_bytes()).unwrap();
            }
            let short = Duration::from_millis(100);
            let error = Qmp::greet(Lines::new(ours).unwrap(), Deadline::after(short), short, &mut || false)
                .unwrap_err();
            assert!(error.to_string().contains("greeting"), "{error}");
        }
    }

    #[test]
    fn events_that_nobody_fetches_are_bounded() {
        let (qmp, _thread) = peer(|_, id| {
            let flood = "{\"event\": \"STOP\"}\n".repeat(MAX_EVENTS + 10);
            Some(format!("{flood}{{\"return\": {{}}, \"id\": {id}}}"))
        });
        let mut qmp = qmp.unwrap();
        qmp.execute("stop", None).unwrap();
        assert_eq!(qmp.lost_events(), 10);
    }
}
