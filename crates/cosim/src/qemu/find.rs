//! Finding a QEMU that can do it, and asking it for its own device tree.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::arguments::{GuestConfig, LaunchError};
use super::control::ControlError;
use super::kit::Kit;
use super::process::{self, Finished, RunError};
use super::run_dir::{RunDir, RunDirError};
use super::stderr::StderrTail;
use super::version::Version;

/// The program's name in the directories of `PATH`.
const PROGRAM: &str = "qemu-system-aarch64";
/// The device that speaks vfio-user.
const DEVICE: &str = "vfio-user-pci";
/// How long QEMU may take to answer a question about itself; on a loaded machine its start takes seconds.
const QUESTION: Duration = Duration::from_secs(60);
/// Most output of such an answer; the list of devices has some 50 KiB.
const ANSWER: usize = 4 << 20;
/// Largest device tree; QEMU's own limit is 1 MiB.
const MAX_TREE: u64 = 4 << 20;
/// Bytes of its header, version 17.
const HEADER: usize = 40;
/// First word of a flattened device tree (Devicetree Specification, 5.2).
const TREE_MAGIC: u32 = 0xd00d_feed;

/// A QEMU that is new enough and has `vfio-user-pci`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program.
    pub program: PathBuf,
    /// What it says about itself.
    pub version: Version,
}

/// A program that was looked at and not taken.
#[derive(Debug)]
pub struct Rejected {
    /// Where.
    pub program: PathBuf,
    /// Why not.
    pub reason: String,
}

/// What can go wrong with QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// No usable program.
    #[error("{}", NotFound(.tried))]
    NotFound {
        /// Everything that was looked at.
        tried: Vec<Rejected>,
    },
    /// It could not be asked for its device tree.
    #[error("{} gave no device tree of its machine: {reason}", .program.display())]
    Tree {
        /// The program.
        program: PathBuf,
        /// What happened.
        reason: String,
    },
    /// It could not be started.
    #[error("{} cannot be started: {source}", .program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It ended before it answered.
    #[error("QEMU ended{} before it answered; its last words:\n{stderr}", Ended(.status))]
    Ended {
        /// How it ended, where that is known.
        status: Option<ExitStatus>,
        /// What it said.
        stderr: StderrTail,
    },
    /// The description of the guest is wrong.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// No private directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// It does not answer as it should.
    #[error(transparent)]
    Control(#[from] ControlError),
}

struct NotFound<'a>(&'a [Rejected]);

impl fmt::Display for NotFound<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let oldest = Version::OLDEST;
        write!(f, "no usable QEMU: {}.{} or newer with {DEVICE} is needed", oldest.major, oldest.minor)?;
        if self.0.is_empty() {
            write!(f, ", and there is no {PROGRAM} in PATH")?;
        }
        for Rejected { program, reason } in self.0 {
            write!(f, "\n  {}: {reason}", program.display())?;
        }
        write!(f, "\nrun scripts/linux-kit, which fetches one, or name another with --qemu")
    }
}

struct Ended<'a>(&'a Option<ExitStatus>);

impl fmt::Display for Ended<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(status) => write!(f, " ({status})"),
            None => Ok(()),
        }
    }
}

impl Qemu {
    /// The program named, or else the kit's, or else the first in `PATH`. Each is asked for its version and its
    /// devices; one that is named and not usable is an error, the others only give way to the next.
    ///
    /// # Errors
    /// [`QemuError::NotFound`] says what was found where, and what to do.
    pub fn find(explicit: Option<&Path>, kit: Option<&Kit>) -> Result<Self, QemuError> {
        Self::find_in(explicit, kit, std::env::var_os("PATH").as_deref())
    }

    fn find_in(explicit: Option<&Path>, kit: Option<&Kit>, path: Option<&OsStr>) -> Result<Self, QemuError> {
        let candidates = match explicit {
            // A plain name is looked for like a command.
            Some(name) if name.components().count() == 1 && !name.is_absolute() => {
                vec![in_path(name.as_os_str(), path).unwrap_or_else(|| name.to_owned())]
            }
            Some(program) => vec![std::path::absolute(program).unwrap_or_else(|_| program.to_owned())],
            None => {
                let kit = kit.map(|kit| kit.qemu().0.to_owned());
                kit.into_iter().chain(in_path(OsStr::new(PROGRAM), path)).collect()
            }
        };
        let mut tried = Vec::new();
        for program in candidates {
            match check(&program) {
                Ok(version) => return Ok(Self { program, version }),
                Err(reason) => tried.push(Rejected { program, reason }),
            }
        }
        Err(QemuError::NotFound { tried })
    }

    /// The flattened device tree of the bare machine, as QEMU would give it to a kernel: the host bridge, the
    /// interrupt controller and the devices that the guest's tree keeps.
    ///
    /// # Errors
    /// [`QemuError::Tree`] with QEMU's own words.
    pub fn device_tree(&self, guest: &GuestConfig) -> Result<Vec<u8>, QemuError> {
        let failed = |reason: String| QemuError::Tree { program: self.program.clone(), reason };
        let dir = RunDir::new()?;
        let file = dir.file("virt.dtb")?;
        let mut command = Command::new(&self.program);
        command.args(guest.dump_arguments(&file)?);
        let done = process::run(command, QUESTION, ANSWER).map_err(|error| failed(error.to_string()))?;
        if !done.status.success() {
            return Err(failed(said(&done)));
        }
        let mut tree = Vec::new();
        std::fs::File::open(&file)
            .and_then(|file| file.take(MAX_TREE + 1).read_to_end(&mut tree))
            .map_err(|error| failed(format!("it ended well and wrote none: {error}")))?;
        let size = tree.len();
        Some(tree)
            .filter(|tree| tree.len() as u64 <= MAX_TREE)
            .and_then(without_free_space)
            .ok_or_else(|| failed(format!("what it wrote ({size} bytes) is no flattened device tree")))
    }
}

/// The tree without the free space behind it; `None` where the header makes no sense.
///
/// QEMU writes its whole buffer of 1 MiB. Given back with `-dtb` it would grow beyond the 2 MiB that an arm64 kernel
/// takes, and such a kernel stops before its first message.
fn without_free_space(mut tree: Vec<u8>) -> Option<Vec<u8>> {
    let word = |at: usize| tree.get(at..)?.first_chunk().copied().map(u32::from_be_bytes);
    let (magic, structure, strings) = (word(0)?, word(8)?, word(12)?);
    let (strings_size, structure_size) = (word(32)?, word(36)?);
    let end = structure.checked_add(structure_size)?.max(strings.checked_add(strings_size)?);
    let length = usize::try_from(end).ok()?;
    if magic != TREE_MAGIC || length > tree.len() || length < HEADER {
        return None;
    }
    tree.truncate(length);
    tree.get_mut(4..8)?.copy_from_slice(&end.to_be_bytes());
    Some(tree)
}

/// The file that a command name stands for.
fn in_path(name: &OsStr, path: Option<&OsStr>) -> Option<PathBuf> {
    // An empty entry means the working directory; nobody wants a QEMU from there by accident.
    std::env::split_paths(path?)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|file| rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok() && file.is_file())
}

/// The version of a usable program, or what is wrong with it.
fn check(program: &Path) -> Result<Version, String> {
    let ask = |arguments: &[&str]| -> Result<String, String> {
        let mut command = Command::new(program);
        command.args(arguments);
        let done = process::run(command, QUESTION, ANSWER).map_err(|error: RunError| error.to_string())?;
        if done.status.success() {
            Ok(String::from_utf8_lossy(&done.stdout).into_owned())
        } else {
            Err(format!("with {}: {}", arguments.join(" "), said(&done)))
        }
    };
    let version = ask(&["--version"])?;
    let Some(version) = Version::parse(&version) else {
        let first: String = version.lines().next().unwrap_or_default().chars().take(80).collect();
        return Err(format!("not QEMU, it says {first:?}"));
    };
    if version < Version::OLDEST {
        return Err(format!("version {version}, too old"));
    }
    let devices = ask(&["-device", "help"])?;
    if !devices.contains(&format!("\"{DEVICE}\"")) {
        return Err(format!("version {version}, built without {DEVICE}"));
    }
    Ok(version)
}

/// The end of what a failed program said.
fn said(done: &Finished) -> String {
    let text = String::from_utf8_lossy(&done.stderr);
    let lines: Vec<&str> = text.lines().collect();
    let last: Vec<String> = lines
        .iter()
        .skip(lines.len().saturating_sub(5))
        .map(|line| line.chars().take(300).collect())
        .collect();
    format!("{}: {}", done.status, if last.is_empty() { "(no message)".into() } else { last.join("; ") })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A shell script in place of QEMU.
    fn script(dir: &Path, name: &str, body: &str) -> PathBuf {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        // Another test may have forked while the file was open for writing; until that child runs its own program,
        // this one is "busy".
        while Command::new(&path).arg("--wait").output().is_err_and(|error| error.raw_os_error() == Some(26))
        {
            std::thread::sleep(Duration::from_millis(2));
        }
        path
    }

    fn qemu_saying(version: &str, device: &str) -> String {
        format!(
            "case \"$1\" in --version) echo 'QEMU emulator version {version}';;\n\
             -device) echo 'name \"{device}\", bus PCI';; esac"
        )
    }

    #[test]
    fn the_first_usable_one_is_taken_named_before_kit_before_path() {
        let dir = tempfile::tempdir().unwrap();
        let named = script(dir.path(), "mine", &qemu_saying("11.2.0", DEVICE));
        let kit_dir = dir.path().join("kit");
        script(&kit_dir, "qemu/q", &qemu_saying("11.1.3", DEVICE));
        for file in ["k", "i"] {
            fs::write(kit_dir.join(file), "x").unwrap();
        }
        let manifest = r#"{"format":1,"qemu":{"version":"11.1.3","program":"qemu/q"},"default":"k","kernels":[
            {"name":"k","release":"k","image":"k","initrd":"i","tiers":["a"]}]}"#;
        fs::write(kit_dir.join("kit.json"), manifest).unwrap();
        let kit = Kit::load(&kit_dir).unwrap();
        script(dir.path(), &format!("bin/{PROGRAM}"), &qemu_saying("10.1.0", DEVICE));
        let path = std::env::join_paths([dir.path().join("empty"), dir.path().join("bin")]).unwrap();

        let version = |explicit, kit| Qemu::find_in(explicit, kit, Some(&path)).unwrap().version.to_string();
        assert_eq!(version(Some(&named), Some(&kit)), "11.2.0");
        assert_eq!(version(None, Some(&kit)), "11.1.3");
        assert_eq!(version(None, None), "10.1.0");
        assert_eq!(version(Some(Path::new(PROGRAM)), Some(&kit)), "10.1.0");
        // The kit's is broken: PATH has the next word.
        fs::remove_file(kit_dir.join("qemu/q")).unwrap();
        assert_eq!(version(None, Some(&kit)), "10.1.0");
    }

    #[test]
    fn the_error_says_what_was_found_where_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let cases = [
            (qemu_saying("10.0.2 (Debian 1:10.0.2)", DEVICE), "version 10.0.2, too old"),
            (qemu_saying("11.1.3", "vfio-pci"), "version 11.1.3, built without vfio-user-pci"),
            ("echo GNU bash, version 5.2".to_owned(), "not QEMU"),
            ("echo cannot find libpixman >&2; exit 127".to_owned(), "libpixman"),
        ];
        for (number, (body, expected)) in cases.iter().enumerate() {
            let program = script(dir.path(), &format!("q{number}"), body);
            let error = Qemu::find(Some(&program), None).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(program.to_str().unwrap()), "{error}");
            assert!(error.contains("scripts/linux-kit") && error.contains("10.1 or newer"), "{error}");
        }
        let error = Qemu::find(Some(Path::new("/nonexistent/q")), None).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/q: cannot be started"), "{error}");
        let error = Qemu::find_in(None, None, Some(OsStr::new("/nonexistent"))).unwrap_err().to_string();
        assert!(error.contains("no qemu-system-aarch64 in PATH"), "{error}");
        assert!(Qemu::find_in(None, None, None).is_err());
    }

    #[test]
    fn the_tree_is_what_qemu_wrote_and_nonsense_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let tree = |body: &str, name: &str| {
            let program = script(dir.path(), name, body);
            let qemu = Qemu { program, version: Version::OLDEST };
            qemu.device_tree(&GuestConfig::default())
        };
        let take_file = "file=$(echo \"$2\" | sed 's/.*dumpdtb=//')\n";
        // Magic, 56 bytes, structure at 40 of 8 bytes, strings at 48 of 4 bytes; then free space.
        let words = [TREE_MAGIC, 56, 40, 48, 40, 17, 16, 0, 4, 8, 1, 9, 0x6e61_6d65, 0, 0, 0];
        let blob = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
        let dump = dir.path().join("dump");
        fs::write(&dump, blob(&words)).unwrap();
        let good = tree(&format!("{take_file}cp {} \"$file\"", dump.display()), "good").unwrap();
        let mut expected = words[..13].to_vec();
        expected[1] = 52;
        assert_eq!(good, blob(&expected));
        for (index, value) in [(0, 7), (2, u32::MAX), (3, 61), (8, u32::MAX), (9, 100)] {
            let mut broken = words;
            broken[index] = value;
            assert_eq!(without_free_space(blob(&broken)), None, "word {index} = {value:#x}");
        }
        assert_eq!(without_free_space(blob(&words[..9])), None);
        for (name, body, expected) in [
            ("nothing", "exit 0".to_owned(), "wrote none"),
            ("text", format!("{take_file}echo hello > \"$file\""), "no flattened"),
            ("big", format!("{take_file}head -c 9000000 /dev/zero > \"$file\""), "no flattened"),
            ("fail", "echo 'unsupported machine type: virt' >&2; exit 1".to_owned(), "unsupported machine"),
        ] {
            let error = tree(&body, name).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
