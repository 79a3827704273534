//! Runs the built command as a user does.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// What a command left behind.
pub struct Ran {
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(o: Output) -> Self {
        Self {
            code: o.status.code().unwrap_or(-1),
            stdout: String::from_utf8(o.stdout).unwrap(),
            stderr: String::from_utf8(o.stderr).unwrap(),
        }
    }
}

/// The command, with nothing of the environment that changes its output.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.args(args).stdin(Stdio::null());
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "RUST_BACKTRACE"] {
        command.env_remove(name);
    }
    command
}

pub fn run(args: &[&str]) -> Ran {
    command(args).output().unwrap().into()
}

impl Ran {
    /// Bad input: exit code 2, nothing on standard output, one message that has these words.
    #[track_caller]
    pub fn is_refused(&self, words: &[&str]) {
        assert_eq!(self.code, 2, "{}{}", self.stdout, self.stderr);
        assert_eq!(self.stdout, "");
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("portcullis: "), "{}", self.stderr);
        self.is_calm();
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in: {}", self.stderr);
        }
    }

    /// No panic, no backtrace.
    #[track_caller]
    pub fn is_calm(&self) {
        for text in [&self.stdout, &self.stderr] {
            for word in ["panicked", "RUST_BACKTRACE", "stack backtrace", "overflowed its stack"] {
                assert!(!text.contains(word), "{text}");
            }
        }
    }

    /// The objects of `--json` output, one a line.
    #[track_caller]
    pub fn lines(&self) -> Vec<Value> {
        let parse = |l: &str| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"));
        self.stdout.lines().map(parse).collect()
    }

    /// The one value of `--json` output of a listing.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }
}

/// The objects of one kind.
pub fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|l| l["kind"] == kind).collect()
}

/// A file for a test, with these contents.
pub fn file(name: &str, contents: impl AsRef<[u8]>) -> String {
    let path = path(name);
    std::fs::write(&path, contents).unwrap();
    path
}

/// A path for a test, where nothing is.
pub fn path(name: &str) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_file(&path);
    path.to_str().unwrap().to_string()
}

/// A file of `boards/`.
pub fn board_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../boards").join(name)
}

/// The compiled tree of the shipped board.
pub fn thesis() -> Vec<u8> {
    std::fs::read(board_file("zynqmp-thesis.dtb")).unwrap()
}

/// Replaces the only place where `from` is by `to`, of the same length.
#[track_caller]
pub fn patch(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let places: Vec<_> = (0..bytes.len()).filter(|i| bytes[*i..].starts_with(from)).collect();
    let [place] = places[..] else { panic!("{from:x?} is at {places:?}") };
    bytes[place..place + to.len()].copy_from_slice(to);
    bytes
}

/// True if `dtc` is there; says so when a test is skipped.
pub fn have_dtc(test: &str) -> bool {
    let found = Command::new("dtc").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: {test} needs dtc (Debian: device-tree-compiler)");
    }
    found
}

/// Runs a script on the shipped board.
pub fn script(name: &str, source: &str) -> Ran {
    script_on("zynqmp-thesis", name, source)
}

/// Runs a script on a board.
pub fn script_on(board: &str, name: &str, source: &str) -> Ran {
    run(&["run", board, &file(&format!("{name}.rhai"), source)])
}
