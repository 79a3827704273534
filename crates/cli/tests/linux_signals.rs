//! `portcullis linux` on a terminal, interrupted: QEMU goes, its directory goes, the terminal is as it was. Needs what
//! `scripts/linux-kit` fetches.

mod common;

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

const LONG: Duration = Duration::from_secs(60);

fn kit() -> bool {
    let ran = common::run(&["linux", "--board", "smmuv3", "--limit", "0", "--quiet"]);
    let there = !ran.stderr.contains("linux-kit");
    assert!(
        there || std::env::var_os("PORTCULLIS_NEED_LINUX_KIT").is_none(),
        "the kit is needed: {}",
        ran.stderr
    );
    if !there {
        eprintln!("SKIPPED, no kit of scripts/linux-kit: {}", ran.stderr);
    }
    there
}

/// The command on a terminal of its own, which it controls.
struct OnTerminal {
    child: Child,
    master: std::fs::File,
    shown: Arc<Mutex<String>>,
    before: Termios,
    dir: tempfile::TempDir,
}

impl OnTerminal {
    fn start(args: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = std::fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("setsid")
            .args(["--ctty", env!("CARGO_BIN_EXE_portcullis"), "linux", "--board", "smmuv3"])
            .args(args)
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("TMPDIR", dir.path())
            .stdin(Stdio::from(slave.try_clone().unwrap()))
            .stdout(Stdio::from(slave.try_clone().unwrap()))
            .stderr(Stdio::from(slave))
            .spawn()
            .unwrap();
        let master = std::fs::File::from(master);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut from, into) = (master.try_clone().unwrap(), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                into.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Self { child, master, shown, before, dir }
    }

    fn awaits(&self, what: impl Fn(&str) -> bool) {
        let until = Instant::now() + LONG;
        while !what(&self.shown.lock().unwrap()) {
            assert!(Instant::now() < until, "{}", self.shown.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end, and that nothing is left; how long that took.
    fn ends(mut self) -> (Duration, String) {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < Duration::from_secs(15), "{}", self.shown.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = begun.elapsed();
        assert!(status.code().is_some(), "{status}");
        let now = modes(&self.master);
        assert_eq!(
            now,
            (self.before.local_modes, self.before.input_modes.bits(), self.before.output_modes.bits())
        );
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 0, "something is left");
        assert_eq!(processes_of(self.dir.path()), Vec::<String>::new());
        let shown = self.shown.lock().unwrap().clone();
        assert!(!shown.contains("panicked at"), "{shown}");
        (took, shown)
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

fn modes(terminal: impl AsFd) -> (LocalModes, u32, u32) {
    let t = tcgetattr(terminal).unwrap();
    (t.local_modes, t.input_modes.bits(), t.output_modes.bits())
}

fn processes_of(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let commands = processes.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    commands.map(|c| String::from_utf8_lossy(&c).into_owned()).filter(|c| c.contains(dir)).collect()
}

#[test]
fn ctrl_c_ends_it_and_everything_it_started() {
    if !kit() {
        return;
    }
    // While the kernel boots, and while dmatest runs.
    for moment in ["Booting Linux", "dmatest: Started"] {
        let mut running = OnTerminal::start(&["--iterations", "100000"]);
        running.awaits(|shown| shown.contains(moment));
        running.master.write_all(b"\x03").unwrap();
        let (took, shown) = running.ends();
        println!("{moment}: over after {took:?}");
        assert!(shown.contains("ended as asked"), "{shown}");
    }
}

#[test]
fn a_signal_in_the_middle_of_a_shell_gives_the_terminal_back() {
    if !kit() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let running = OnTerminal::start(&["--interactive"]);
        running.awaits(|shown| shown.contains("portcullis: up"));
        assert!(!modes(&running.master).0.contains(LocalModes::ICANON), "the terminal is not raw");
        // `setsid` has become the command.
        kill_process(Pid::from_raw(running.child.id() as i32).unwrap(), signal).unwrap();
        let (took, _) = running.ends();
        println!("{signal:?}: over after {took:?}");
    }
}
