//! Guests in processes of their own, so that a test can kill, stop and starve either side and look at what is left.
//!
//! [`start`] runs this test binary again; there [`child`] runs the job and says on its standard output what happens, in
//! lines that begin with `@`. Each has a directory of its own for sockets, in which nothing may be left at the end.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use portcullis_board::Tree;
use portcullis_cosim::linux::{self, GuestFile, Job, Look, Observer, Outcome};
use portcullis_cosim::qemu::{Kit, Qemu};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The name of the test that is the child.
pub const CHILD: &str = "the_process_that_runs_a_guest";
const SPEC: &str = "PORTCULLIS_ROBUST_JOB";
/// Longest time for a job, and for what a test waits for.
pub const LONG: Duration = Duration::from_secs(150);

/// Shell functions for the guests' scripts.
pub const PRELUDE: &str = include_str!("prelude.sh");

/// What to run.
#[derive(Clone)]
pub struct Spec {
    pub board: &'static str,
    pub script: String,
    pub reboot: bool,
    pub append: String,
    pub qemu: Option<PathBuf>,
    /// That many at once, each in a thread.
    pub guests: usize,
    pub limit: Duration,
}

impl Spec {
    pub fn new(board: &'static str, script: &str) -> Self {
        let script = format!("{PRELUDE}\n{script}\n");
        Self { board, script, reboot: false, append: String::new(), qemu: None, guests: 1, limit: LONG }
    }
}

/// The kit, or one clear line.
pub fn kit() -> Option<Kit> {
    let found = Kit::default_dir().ok_or("HOME is not set".to_string());
    match found.and_then(|dir| Kit::load(&dir).map_err(|e| e.to_string())) {
        Ok(kit) => Some(kit),
        Err(why) => {
            assert!(std::env::var_os("PORTCULLIS_NEED_LINUX_KIT").is_none(), "the kit is needed: {why}");
            eprintln!("SKIPPED, no kit of scripts/linux-kit: {why}");
            None
        }
    }
}

pub fn qemu(kit: &Kit) -> Qemu {
    Qemu::find(None, Some(kit)).unwrap()
}

/// At most two guests at a time.
pub struct Slots(usize);

static FREE: (Mutex<usize>, Condvar) = (Mutex::new(2), Condvar::new());

impl Slots {
    pub fn take(count: usize) -> Self {
        let mut free = FREE.0.lock().unwrap();
        while *free < count {
            free = FREE.1.wait(free).unwrap();
        }
        *free -= count;
        Self(count)
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        *FREE.0.lock().unwrap() += self.0;
        FREE.1.notify_all();
    }
}

/// A process that runs a guest.
pub struct Running {
    child: std::process::Child,
    lines: Receiver<String>,
    /// Everything it said.
    pub said: Vec<String>,
    pub dir: tempfile::TempDir,
    _slots: Slots,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// For each guest.
    pub outcomes: Vec<Value>,
    pub errors: Vec<String>,
    pub said: Vec<String>,
}

pub fn start(spec: &Spec) -> Running {
    start_with(spec, tempfile::tempdir().unwrap(), |_| {})
}

/// Starts it with `dir` for its sockets; the command may be changed.
pub fn start_with(spec: &Spec, dir: tempfile::TempDir, change: impl FnOnce(&mut Command)) -> Running {
    let slots = Slots::take(spec.guests);
    let value = json!({
        "board": spec.board, "script": spec.script, "reboot": spec.reboot, "append": spec.append,
        "qemu": spec.qemu, "guests": spec.guests, "limit": spec.limit.as_secs(),
    });
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([CHILD, "--exact", "--nocapture", "--test-threads=1"])
        .env(SPEC, value.to_string())
        .env("XDG_RUNTIME_DIR", dir.path())
        .env("TMPDIR", dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    change(&mut command);
    let mut child = command.spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in stdout.split(b'\n').map_while(Result::ok) {
            // The test harness says the test's name before our first line, on the same line.
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(at) = line.find('@')
                && send.send(line[at + 1..].trim_end().to_string()).is_err()
            {
                return;
            }
        }
    });
    Running { child, lines, said: Vec::new(), dir, _slots: slots }
}

impl Running {
    fn next(&mut self, until: Instant) -> Result<String, RecvTimeoutError> {
        let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now()))?;
        self.said.push(line.clone());
        Ok(line)
    }

    /// Waits for a line that begins so; the rest of it.
    pub fn awaits(&mut self, what: &str) -> String {
        let until = Instant::now() + LONG;
        loop {
            match self.next(until) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(what) {
                        return rest.to_string();
                    }
                }
                Err(why) => panic!("no line {what:?}, {why}; so far:\n{}", self.said.join("\n")),
            }
        }
    }

    /// It has not said anything that begins so.
    pub fn silent(&mut self, what: &str) {
        while let Ok(line) = self.lines.try_recv() {
            self.said.push(line);
        }
        assert!(!self.said.iter().any(|line| line.starts_with(what)), "too early: {what}");
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    /// Its QEMU that serves the guest, as soon as there is one.
    pub fn qemu(&self) -> Pid {
        let until = Instant::now() + LONG;
        loop {
            // The one that is asked for its own tree has no functions.
            let found = processes_with(&["vfio-user-pci", self.dir.path().to_str().unwrap()]);
            if let Some((pid, _)) = found.first() {
                return *pid;
            }
            assert!(Instant::now() < until, "no QEMU was started");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for its end: at most `limit` from now.
    pub fn ends(mut self, limit: Duration) -> Ended {
        let until = Instant::now() + limit;
        loop {
            match self.next(until) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    panic!("it did not end within {limit:?}:\n{}", self.said.join("\n"));
                }
            }
        }
        let _ = self.child.wait();
        let with = |what: &str| -> Vec<&str> {
            self.said.iter().filter_map(|line| line.strip_prefix(what)).collect()
        };
        let outcomes = with("outcome ").iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        let errors = with("error ").iter().map(|text| (*text).to_string()).collect();
        Ended { outcomes, errors, said: std::mem::take(&mut self.said) }
    }

    /// Ends it and makes sure that no process and no socket is left, within `grace`.
    pub fn ends_clean(mut self, limit: Duration, grace: Duration) -> Ended {
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        let ended = self.ends(limit);
        no_orphans(dir.path(), grace);
        let left = left_in(dir.path());
        assert!(left.is_empty(), "left behind: {left:?}");
        ended
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The only outcome.
    pub fn outcome(&self) -> &Value {
        let [outcome] = self.outcomes.as_slice() else {
            panic!("not one outcome:\n{}", self.said.join("\n"));
        };
        outcome
    }

    pub fn error(&self) -> &str {
        let [error] = self.errors.as_slice() else { panic!("not one error:\n{}", self.said.join("\n")) };
        error
    }

    /// Everything that the guest looked at was well, and it went off by itself.
    pub fn good(&self) -> &Self {
        for outcome in &self.outcomes {
            assert_eq!(outcome["good"], true, "{outcome:#}\n{}", self.said.join("\n"));
        }
        assert!(!self.outcomes.is_empty(), "{}", self.said.join("\n"));
        self
    }

    pub fn says(&self, text: &str) -> bool {
        self.said.iter().any(|line| line.contains(text))
    }
}

pub fn signal(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
}

/// Processes (not zombies) with all these words in their command line.
pub fn processes_with(words: &[&str]) -> Vec<(Pid, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if words.iter().all(|word| command.contains(word))
            && let Some(pid) = Pid::from_raw(pid)
        {
            found.push((pid, command));
        }
    }
    found
}

/// No process has `dir` in its command line any more, after `grace` at the latest.
pub fn no_orphans(dir: &Path, grace: Duration) {
    let until = Instant::now() + grace;
    loop {
        let left = processes_with(&[dir.to_str().unwrap()]);
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < until, "still there after {grace:?}: {left:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What is in a directory.
pub fn left_in(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().flatten().map(|entry| entry.path()).collect()
}

/// An executable shell script.
pub fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join(name);
    // Renamed into place: a file that is open for writing cannot be executed, and a fork elsewhere may hold it open.
    let draft = dir.join(format!("{name}.draft"));
    std::fs::write(&draft, format!("#!/bin/sh\n{text}")).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    let copied = Command::new("cp").arg(&draft).arg(&path).status().unwrap();
    assert!(copied.success());
    std::fs::remove_file(draft).unwrap();
    path
}

/// What the child does: nothing, unless it is one.
pub fn child() {
    let Ok(spec) = std::env::var(SPEC) else { return };
    let spec: Value = serde_json::from_str(&spec).unwrap();
    let guests = spec["guests"].as_u64().unwrap();
    if guests == 1 {
        run(&spec);
    } else {
        std::thread::scope(|scope| {
            for _ in 0..guests {
                scope.spawn(|| run(&spec));
            }
        });
    }
}

fn say(line: &str) {
    // The other end may be gone.
    let _ = writeln!(std::io::stdout().lock(), "@{}", line.trim_end().replace('\n', "; "));
}

fn run(spec: &Value) {
    let text = |name: &str| spec[name].as_str().unwrap_or_default().to_string();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../boards/{}.dtb", text("board")));
    let kit = kit().unwrap();
    let named = spec["qemu"].as_str().map(Path::new);
    let qemu = match Qemu::find(named, Some(&kit)) {
        Ok(qemu) => qemu,
        Err(error) => return say(&format!("error {error}")),
    };
    let kernel = kit.kernel(std::env::var("PORTCULLIS_KERNEL").ok().as_deref()).unwrap();
    let job = Job {
        append: text("append"),
        reboot: spec["reboot"].as_bool().unwrap(),
        limit: Some(Duration::from_secs(spec["limit"].as_u64().unwrap())),
        files: vec![GuestFile::text("run", &text("script"))],
        ..Job::new(Tree::load(path).unwrap(), kernel, "")
    };
    let mut watcher = Watcher::default();
    say("begins");
    match linux::run(&job, &qemu, &mut watcher, &AtomicBool::new(false)) {
        Ok(outcome) => say(&format!("outcome {}", told(&outcome, &watcher))),
        Err(error) => say(&format!("error {error}")),
    }
}

fn told(outcome: &Outcome, watcher: &Watcher) -> Value {
    json!({
        "good": outcome.is_good(), "end": format!("{:?}", outcome.end), "guest": outcome.marks,
        "board": outcome.summary, "reboots": outcome.reboots, "stderr": outcome.stderr,
        "gap": watcher.gap.as_secs_f64(), "memory": watcher.memory, "peak": watcher.peak,
    })
}

/// Private memory of this process in KiB: the guest's is shared.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

#[derive(Default)]
struct Watcher {
    line: Vec<u8>,
    /// Marks that were told of.
    marks: usize,
    last: Option<Instant>,
    /// The longest time without a tick.
    gap: Duration,
    /// Private memory at the guest's first mark, and the most since.
    memory: Option<u64>,
    peak: u64,
    looked: Option<Instant>,
}

impl Observer for Watcher {
    fn started(&mut self, _: &linux::Started<'_>) {
        say("started");
    }

    fn console(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                say(&format!("| {}", String::from_utf8_lossy(&std::mem::take(&mut self.line))));
            } else {
                self.line.push(byte);
            }
        }
    }

    fn note(&mut self, text: &str) {
        say(&format!("note {text}"));
    }

    fn tick(&mut self, look: &mut Look<'_>) -> bool {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.gap = self.gap.max(now - last);
        }
        for mark in look.marks.marks.iter().skip(self.marks) {
            say(&format!("mark {} {} {}", mark.name, if mark.pass { "pass" } else { "fail" }, mark.text));
        }
        self.marks = look.marks.marks.len();
        let due = self.looked.is_none_or(|at| now - at > Duration::from_millis(200));
        if self.marks > 0 && due {
            self.looked = Some(now);
            let memory = memory();
            self.memory.get_or_insert(memory);
            self.peak = self.peak.max(memory);
        }
        true
    }
}
