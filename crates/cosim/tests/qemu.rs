//! A guest from start to end, with a stand-in for QEMU: a shell script for the process, and a thread of the test for
//! its control sockets.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use portcullis_arch::Pa;
use portcullis_cosim::qemu::{
    ConsoleRead, Control, ControlSockets, Guest, GuestConfig, Launch, Qemu, QemuError, QmpEvent, Reason,
    RunDir, Version, Window,
};

const LONG: Duration = Duration::from_secs(20);

/// A shell script in place of QEMU.
fn stand_in(dir: &Path, body: &str) -> Qemu {
    let program = dir.join("qemu");
    fs::write(&program, format!("#!/bin/sh\n[ \"$1\" = --wait ] && exit\n{body}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    // Another test may have forked while the file was open for writing; until that child runs its own program, this
    // one is "busy".
    while Command::new(&program).arg("--wait").output().is_err_and(|error| error.raw_os_error() == Some(26)) {
        std::thread::sleep(Duration::from_millis(2));
    }
    Qemu { program, version: Version::OLDEST }
}

fn launch() -> Launch {
    Launch {
        guest: GuestConfig::default(),
        functions: Vec::new(),
        device_tree: "/nonexistent/tree".into(),
        kernel: "/nonexistent/kernel".into(),
        initrd: None,
        append: String::new(),
        console: Default::default(),
        no_reboot: true,
    }
}

fn start(base: &Path, body: &str) -> Guest {
    Guest::start(&stand_in(base, body), &launch(), RunDir::below(base).unwrap()).unwrap()
}

fn read_until(guest: &Guest, end: &str) -> String {
    let deadline = Instant::now() + LONG;
    let mut text = String::new();
    while !text.contains(end) {
        assert!(Instant::now() < deadline, "only {text:?} came");
        match guest.console().read(Duration::from_millis(100)) {
            ConsoleRead::Bytes(bytes) => text.push_str(&String::from_utf8_lossy(&bytes)),
            ConsoleRead::Nothing => {}
            ConsoleRead::Ended => panic!("ended after {text:?}"),
        }
    }
    text
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Where process 1 does not wait for orphans, a dead one stays as a zombie.
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

fn wait_until_dead(pid: u32) {
    let deadline = Instant::now() + LONG;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_console_carries_both_ways_and_the_end_is_seen() {
    let base = tempfile::tempdir().unwrap();
    let mut guest = start(base.path(), "echo booted; read word; echo \"got $word\"; echo bye >&2; exit 3");
    read_until(&guest, "booted\n");
    assert!(guest.try_wait().is_none());
    guest.console_input().write(b"hello\n", LONG).unwrap();
    read_until(&guest, "got hello\n");
    assert_eq!(guest.wait(LONG).unwrap().code(), Some(3));
    assert_eq!(guest.stderr().lines, ["bye"]);
    assert_eq!(guest.console().read(LONG), ConsoleRead::Ended);
}

#[test]
fn dropping_a_guest_ends_its_whole_group_and_removes_its_directory() {
    let base = tempfile::tempdir().unwrap();
    let guest = start(base.path(), "sleep 1000 & echo \"child $!\"; trap '' TERM INT; wait");
    let text = read_until(&guest, "\n");
    let child: u32 = text.trim().strip_prefix("child ").unwrap().parse().unwrap();
    let (pid, dir) = (guest.pid(), guest.dir().path().to_owned());
    assert!(is_alive(pid) && is_alive(child) && dir.exists());
    drop(guest);
    wait_until_dead(pid);
    wait_until_dead(child);
    assert!(!dir.exists());
}

#[test]
fn a_guest_survives_the_thread_that_started_it() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().to_owned();
    let mut guest = std::thread::spawn(move || start(&path, "exec sleep 1000")).join().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(guest.try_wait().is_none());
    guest.kill();
    assert!(guest.try_wait().is_some());
}

/// The other half of the test below: starts a guest, says so, and waits to be killed.
#[test]
#[ignore = "run by a_killed_parent_takes_its_guest_along"]
fn a_parent_that_waits_to_be_killed() {
    let Some(base) = std::env::var_os("PORTCULLIS_TEST_BASE") else { return };
    let guest = start(Path::new(&base), "exec sleep 1000");
    println!("guest {} {}", guest.pid(), guest.dir().path().display());
    std::thread::sleep(Duration::from_secs(1000));
}

#[test]
fn a_killed_parent_takes_its_guest_along_and_the_next_run_removes_its_directory() {
    let base = tempfile::tempdir().unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "a_parent_that_waits_to_be_killed"])
        .env("PORTCULLIS_TEST_BASE", base.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
    // The test runner may print its own words on the same line.
    let line = lines.find(|line| line.contains("guest ")).unwrap();
    let mut words = line.split("guest ").last().unwrap().split(' ');
    let pid: u32 = words.next().unwrap().parse().unwrap();
    let dir = PathBuf::from(words.next().unwrap());
    assert!(is_alive(pid) && dir.exists());
    parent.kill().unwrap();
    parent.wait().unwrap();
    wait_until_dead(pid);
    assert!(dir.exists(), "nobody was there to remove it");
    let next = RunDir::below(base.path()).unwrap();
    assert!(!dir.exists() && next.path().exists());
}

#[test]
fn a_qemu_that_ends_at_once_is_reported_with_its_last_words() {
    let base = tempfile::tempdir().unwrap();
    let mut guest = start(base.path(), "echo 'could not open /nonexistent/kernel' >&2; exit 1");
    let begin = Instant::now();
    let error = guest.connect_control(Duration::from_secs(60)).unwrap_err();
    assert!(begin.elapsed() < LONG, "waited although nobody was there");
    let QemuError::Ended { status: Some(status), ref stderr } = error else { panic!("{error}") };
    assert_eq!(status.code(), Some(1));
    assert_eq!(stderr.lines, ["could not open /nonexistent/kernel"]);
    assert!(error.to_string().contains("could not open"), "{error}");
}

#[test]
fn a_qemu_that_never_listens_is_given_up_in_time() {
    let base = tempfile::tempdir().unwrap();
    let mut guest = start(base.path(), "exec sleep 1000");
    let error = guest.connect_control(Duration::from_millis(200)).unwrap_err();
    assert!(
        error.to_string().contains("nobody listens on") && error.to_string().contains("qmp.sock"),
        "{error}"
    );
}

#[test]
fn a_program_that_cannot_run_is_an_error_at_start() {
    let base = tempfile::tempdir().unwrap();
    let qemu = Qemu { program: "/nonexistent/qemu".into(), version: Version::OLDEST };
    let error = Guest::start(&qemu, &launch(), RunDir::below(base.path()).unwrap()).unwrap_err();
    assert!(matches!(error, QemuError::Start { .. }), "{error}");
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0, "its directory stays");
}

#[test]
fn stderr_without_end_does_not_hold_the_guest_or_fill_memory() {
    let base = tempfile::tempdir().unwrap();
    let mut guest =
        start(base.path(), "i=0; while [ $i -lt 20000 ]; do echo \"lost access $i\" >&2; i=$((i+1)); done");
    assert!(guest.wait(LONG).is_some(), "it blocks on stderr");
    let tail = guest.stderr();
    assert_eq!((tail.lines.len(), tail.total), (50, 20_000));
    assert_eq!(tail.lines.last().unwrap(), "lost access 19999");
}

/// What a stand-in for QEMU's control sockets knows.
#[derive(Default)]
struct Machine {
    /// 32-bit words of configuration space; others read as all ones, like an absent function.
    words: HashMap<u64, u32>,
    /// Bits that a write to a word cannot change.
    fixed: HashMap<u64, u32>,
    running: bool,
    log: Vec<String>,
}

const ECAM: Pa = Pa(0x40_1000_0000);
const FUNCTION: u64 = 0x40_1000_8000;
const WINDOW: Window = Window { ecam: ECAM, slot: 1, bar0: Pa(0x3000_0000) };

impl Machine {
    /// Our function: no id, a 32-bit BAR of 16 MiB.
    fn with_function() -> Self {
        let mut machine = Self::default();
        machine.reset();
        machine.fixed.insert(FUNCTION + 0x10, 0x00ff_ffff);
        machine
    }

    fn reset(&mut self) {
        self.words.insert(FUNCTION, 0xffff_ffff);
        self.words.insert(FUNCTION + 4, 0x0010_0000);
        self.words.insert(FUNCTION + 0x10, 0);
    }

    fn qtest(&mut self, line: &str) -> String {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| u64::from_str_radix(words[index].trim_start_matches("0x"), 16).unwrap();
        self.log.push(line.to_owned());
        match words[0] {
            "readl" => format!("OK {:#018x}", self.words.get(&number(1)).copied().unwrap_or(u32::MAX)),
            "writel" => {
                let fixed = self.fixed.get(&number(1)).copied().unwrap_or(0);
                if let Some(word) = self.words.get_mut(&number(1)) {
                    *word = (*word & fixed) | (number(2) as u32 & !fixed);
                }
                "OK".into()
            }
            "writew" => {
                if let Some(word) = self.words.get_mut(&number(1)) {
                    let fixed = self.fixed.get(&number(1)).copied().unwrap_or(0);
                    *word = (*word & (fixed | 0xffff_0000)) | (number(2) as u32 & !fixed & 0xffff);
                }
                "OK".into()
            }
            other => format!("FAIL Unknown command '{other}'"),
        }
    }

    fn qmp(&mut self, command: &str, id: u64) -> Option<String> {
        self.log.push(command.to_owned());
        let done = |value: &str| Some(format!("{{\"return\": {value}, \"id\": {id}}}"));
        match command {
            "cont" => {
                self.running = true;
                Some(format!("{{\"event\": \"RESUME\"}}\n{}", done("{}")?))
            }
            "stop" => {
                self.running = false;
                done("{}")
            }
            "query-status" => {
                done(&format!("{{\"running\": {}, \"status\": \"running\", \"x\": []}}", self.running))
            }
            // QEMU takes it for the end of the machine where a reboot is one.
            "system_reset" if self.log.iter().rfind(|line| line.starts_with("set-action")).is_none() => {
                done("{}")
            }
            "system_reset" => {
                self.reset();
                let reset = "{\"event\": \"RESET\", \"data\": {\"guest\": false, \"reason\": \"host-qmp-system-reset\"}}";
                // As QEMU does it: the answer first, the reset later in its main loop.
                Some(format!("{}\n{{\"event\": \"NOISE\"}}\n{reset}", done("{}")?))
            }
            "quit" => None,
            _ => done("{}"),
        }
    }
}

/// Gives the answer to a line; none closes the connection.
type Answer = Box<dyn FnMut(&str) -> Option<String> + Send>;

/// Serves the two sockets in `dir` as QEMU would.
fn serve(dir: &Path, machine: &Arc<Mutex<Machine>>) -> ControlSockets {
    let sockets = ControlSockets { qtest: dir.join("qtest.sock"), qmp: dir.join("qmp.sock") };
    let conversation = |listener: UnixListener, mut answer: Answer, first: &str| {
        let first = first.to_owned();
        std::thread::spawn(move || {
            let stream: UnixStream = listener.accept().unwrap().0;
            let mut writer = stream.try_clone().unwrap();
            writer.write_all(first.as_bytes()).unwrap();
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let Some(text) = answer(&line) else { return };
                if writeln!(writer, "{text}").is_err() {
                    return;
                }
            }
        });
    };
    let shared = Arc::clone(machine);
    conversation(
        UnixListener::bind(&sockets.qtest).unwrap(),
        Box::new(move |line| Some(shared.lock().unwrap().qtest(line))),
        "",
    );
    let shared = Arc::clone(machine);
    conversation(
        UnixListener::bind(&sockets.qmp).unwrap(),
        Box::new(move |line| {
            let request: serde_json::Value = serde_json::from_str(line).unwrap();
            let mut command = request["execute"].as_str().unwrap().to_owned();
            if let Some(action) = request["arguments"]["reboot"].as_str() {
                command = format!("{command} {action}");
            }
            shared.lock().unwrap().qmp(&command, request["id"].as_u64().unwrap())
        }),
        "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n",
    );
    sockets
}

fn connected(machine: Machine) -> (Control, Arc<Mutex<Machine>>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let machine = Arc::new(Mutex::new(machine));
    let control = serve(dir.path(), &machine).connect(LONG).unwrap();
    (control, machine, dir)
}

#[test]
fn the_window_is_placed_like_firmware_would() {
    let (mut control, machine, _dir) = connected(Machine::with_function());
    control.place_window(WINDOW).unwrap();
    control.cont().unwrap();
    assert!(control.status().unwrap().running);
    assert_eq!(control.next_event(LONG).unwrap(), Some(QmpEvent::Resume));
    control.stop().unwrap();
    assert!(!control.status().unwrap().running);
    control.quit().unwrap();
    let machine = machine.lock().unwrap();
    assert_eq!(machine.words[&(FUNCTION + 0x10)], 0x3000_0000);
    assert_eq!(machine.words[&(FUNCTION + 4)], 0x0010_0006);
    assert_eq!(machine.log.iter().filter(|line| line.starts_with("writew 0x4010008004 0x6")).count(), 1);
}

#[test]
fn a_64_bit_window_takes_an_address_above_4_gib_and_a_32_bit_one_refuses_it() {
    let far = Window { bar0: Pa(0x80_3000_0000), ..WINDOW };
    let (mut control, _machine, _dir) = connected(Machine::with_function());
    let error = control.place_window(far).unwrap_err().to_string();
    assert!(error.contains("cannot hold"), "{error}");

    let mut wide = Machine::with_function();
    wide.words.insert(FUNCTION + 0x10, 0x4);
    wide.words.insert(FUNCTION + 0x14, 0);
    let (mut control, machine, _dir) = connected(wide);
    control.place_window(far).unwrap();
    let machine = machine.lock().unwrap();
    assert_eq!(machine.words[&(FUNCTION + 0x10)], 0x3000_0004);
    assert_eq!(machine.words[&(FUNCTION + 0x14)], 0x80);
}

#[test]
fn a_place_that_is_not_ours_is_left_alone() {
    type Change = fn(&mut Machine);
    let cases: [(Change, Window, &str); 7] = [
        (|_| {}, Window { slot: 2, ..WINDOW }, "no function of ours"),
        (|_| {}, Window { slot: 32, ..WINDOW }, "no such slot"),
        (|_| {}, Window { ecam: Pa(u64::MAX - 0xfff), ..WINDOW }, "no such slot"),
        (|machine| machine.words.extend([(FUNCTION, 0x1000_1af4)]), WINDOW, "device 1af4:1000"),
        (|_| {}, Window { bar0: Pa(0x3000_0008), ..WINDOW }, "cannot hold"),
        (|_| {}, Window { bar0: Pa(0x3010_0000), ..WINDOW }, "reads back 0x30000000"),
        (|machine| machine.fixed.extend([(FUNCTION + 4, 0x4)]), WINDOW, "command register reads back 0x2"),
    ];
    for (change, window, reason) in cases {
        let mut machine = Machine::with_function();
        change(&mut machine);
        let (mut control, machine, _dir) = connected(machine);
        let error = control.place_window(window).unwrap_err().to_string();
        assert!(error.contains(reason), "{error} lacks {reason:?}");
        let touched = machine.lock().unwrap().log.iter().any(|line| line.starts_with("write"));
        let expected = reason.contains("reads back");
        assert_eq!(touched, expected, "{reason}");
    }
}

#[test]
fn a_restart_places_the_windows_after_the_reset_and_before_the_guest_runs() {
    let (mut control, machine, _dir) = connected(Machine::with_function());
    control.place_window(WINDOW).unwrap();
    control.cont().unwrap();
    machine.lock().unwrap().log.clear();
    control.restart(&[WINDOW]).unwrap();
    let machine = machine.lock().unwrap();
    let order: Vec<usize> = [
        "stop",
        "set-action reset",
        "system_reset",
        "set-action shutdown",
        "writel 0x4010008010 0x30000000",
        "cont",
    ]
    .iter()
    .map(|wanted| machine.log.iter().position(|line| line == wanted).expect(wanted))
    .collect();
    assert!(order.is_sorted(), "{:?}", machine.log);
    assert!(machine.running);
    assert_eq!(machine.words[&(FUNCTION + 0x10)], 0x3000_0000);
    drop(machine);
    let events: Vec<_> =
        std::iter::from_fn(|| control.next_event(Duration::from_millis(50)).unwrap()).collect();
    assert!(events.contains(&QmpEvent::Other("NOISE".into())), "an event was lost: {events:?}");
    assert!(
        !events.contains(&QmpEvent::Reset(Reason::HostReset)),
        "our own reset is not the caller's business"
    );
}

#[test]
fn a_connection_is_made_as_soon_as_somebody_listens_and_from_another_thread() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = ControlSockets { qtest: dir.path().join("qtest.sock"), qmp: dir.path().join("qmp.sock") };
    let connecting = std::thread::spawn(move || sockets.connect(LONG));
    std::thread::sleep(Duration::from_millis(50));
    serve(dir.path(), &Arc::new(Mutex::new(Machine::with_function())));
    let mut control = connecting.join().unwrap().unwrap();
    assert_eq!(control.qtest.readl(Pa(FUNCTION)).unwrap(), u32::MAX);
}

#[test]
fn a_listener_that_never_accepts_does_not_hold_us() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = ControlSockets { qtest: dir.path().join("qtest.sock"), qmp: dir.path().join("qmp.sock") };
    let _silent = UnixListener::bind(&sockets.qmp).unwrap();
    let begin = Instant::now();
    let error = sockets.connect(Duration::from_millis(200)).unwrap_err();
    assert!(error.to_string().contains("greeting"), "{error}");
    assert!(begin.elapsed() < LONG);
}
