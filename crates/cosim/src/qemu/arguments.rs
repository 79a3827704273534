//! The command line: one description, used to start QEMU and to tell people how to start it themselves.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::control::ControlSockets;
use super::run_dir::SUN_PATH;

/// A mebibyte: the unit of `-m` that every QEMU takes.
const MIB: u64 = 1 << 20;
/// How long QEMU's client waits for an answer of our server, in milliseconds. Long, because a person may have the
/// server in a debugger; a request that times out breaks the connection for good.
const ANSWER_MS: u64 = 600_000;

/// The machine: QEMU's `virt` with RAM that the models can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// Number of processors.
    pub cpus: u32,
    /// RAM in bytes, whole mebibytes.
    pub memory: u64,
    /// The processor, for `-cpu`.
    pub cpu: String,
    /// Version of the interrupt controller: 2, 3 or 4.
    pub gic_version: u8,
    /// Whether there is an ITS, for message-signalled interrupts.
    pub its: bool,
    /// More arguments, put last.
    pub extra: Vec<OsString>,
}

impl Default for GuestConfig {
    /// One Cortex-A72 (48-bit addresses, 16-bit ASIDs), 1 GiB, GICv3 with ITS.
    fn default() -> Self {
        Self {
            cpus: 1,
            memory: 1 << 30,
            cpu: "cortex-a72".into(),
            gic_version: 3,
            its: true,
            extra: Vec::new(),
        }
    }
}

/// A PCI function that we serve on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionSocket {
    /// Where we listen.
    pub socket: PathBuf,
    /// Device number on bus 0: 1 to 31, 0 is the host bridge.
    pub slot: u8,
    /// QEMU's name for the device.
    pub id: String,
}

/// Where the guest's serial console goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Console {
    /// To [`super::Guest::console`]; typing goes through [`super::Guest::console_input`].
    #[default]
    Captured,
    /// The same, and what is typed on our own terminal goes to the guest, QEMU's monitor beside it: Ctrl-A x ends
    /// QEMU, Ctrl-A c switches to the monitor.
    Terminal,
}

/// Everything that starts a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The machine.
    pub guest: GuestConfig,
    /// The functions we serve.
    pub functions: Vec<FunctionSocket>,
    /// The guest's device tree.
    pub device_tree: PathBuf,
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
    /// Where the console goes.
    pub console: Console,
    /// A reboot and a power-off of the guest end QEMU. When false they stop the machine, the caller hears
    /// [`super::QmpEvent::Shutdown`] and says [`super::Control::restart`] or [`super::Control::quit`].
    pub no_reboot: bool,
}

/// A launch that QEMU could not be started with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// RAM is not a whole number of mebibytes.
    #[error("{0:#x} bytes of RAM are not a whole number of mebibytes above zero")]
    Memory(u64),
    /// No processors.
    #[error("a guest needs a processor")]
    NoProcessor,
    /// The name of the processor is empty.
    #[error("the name of the processor is empty")]
    NoProcessorName,
    /// Interrupt controller.
    #[error("GIC version {version}{} does not exist on this machine", if *its { " with an ITS" } else { "" })]
    Gic {
        /// Version asked for.
        version: u8,
        /// Whether an ITS was asked for.
        its: bool,
    },
    /// A slot outside 1 to 31.
    #[error("function {id}: slot {slot} is not between 1 and 31")]
    Slot {
        /// The function.
        id: String,
        /// Its slot.
        slot: u8,
    },
    /// Two functions in a slot, or two with one name.
    #[error("function {id}: its slot {slot} or its name is used twice")]
    Twice {
        /// The function.
        id: String,
        /// Its slot.
        slot: u8,
    },
    /// A name that QEMU does not take.
    #[error("{0:?} is no name for a device: a letter, then letters, digits, '-', '.' or '_'")]
    Id(String),
    /// A path that cannot be given to QEMU.
    #[error(
        "{0:?} cannot be given to QEMU: a socket's path is UTF-8 and shorter than 108 bytes, no path has a zero in it"
    )]
    Path(PathBuf),
}

impl Launch {
    fn check(&self) -> Result<(), LaunchError> {
        self.guest.check()?;
        let mut slots = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for FunctionSocket { socket: _, slot, id } in &self.functions {
            if !(1..=31).contains(slot) {
                return Err(LaunchError::Slot { id: id.clone(), slot: *slot });
            }
            let mut letters = id.chars();
            if !letters.next().is_some_and(|c| c.is_ascii_alphabetic())
                || !letters.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
            {
                return Err(LaunchError::Id(id.clone()));
            }
            if !slots.insert(*slot) || !ids.insert(id) {
                return Err(LaunchError::Twice { id: id.clone(), slot: *slot });
            }
        }
        let files = [Some(&self.device_tree), Some(&self.kernel), self.initrd.as_ref()];
        for path in files.into_iter().flatten() {
            if path.as_os_str().is_empty() || path.as_os_str().as_encoded_bytes().contains(&0) {
                return Err(LaunchError::Path(path.clone()));
            }
        }
        Ok(())
    }
}

impl GuestConfig {
    fn check(&self) -> Result<(), LaunchError> {
        if self.cpus == 0 {
            return Err(LaunchError::NoProcessor);
        }
        if self.cpu.is_empty() {
            return Err(LaunchError::NoProcessorName);
        }
        if self.memory == 0 || !self.memory.is_multiple_of(MIB) {
            return Err(LaunchError::Memory(self.memory));
        }
        if !(2..=4).contains(&self.gic_version) || (self.its && self.gic_version < 3) {
            return Err(LaunchError::Gic { version: self.gic_version, its: self.its });
        }
        Ok(())
    }

    fn machine(&self) -> String {
        let its = if self.its { "on" } else { "off" };
        // `its` is a property of GICv3 machines only by meaning; the machine takes it in any case.
        format!("virt,gic-version={},its={its},memory-backend=ram", self.gic_version)
    }

    /// The arguments that decide what the machine looks like: the same for a dump of its tree and for a run.
    fn machine_arguments(&self, machine: OsString) -> Vec<OsString> {
        // Without a shared backend QEMU offers RAM without a file descriptor, and the models could not reach it.
        let ram =
            json!({ "qom-type": "memory-backend-memfd", "id": "ram", "size": self.memory, "share": true });
        let mut list = Arguments::default();
        list.option("-machine", machine);
        list.option("-accel", "tcg");
        list.option("-object", ram.to_string());
        list.option("-m", format!("{}M", self.memory / MIB));
        list.option("-cpu", &self.cpu);
        list.option("-smp", self.cpus.to_string());
        list.option("-display", "none");
        list.0.push("-nodefaults".into());
        list.0
    }

    /// The arguments that make QEMU write its own device tree to `file` and end.
    pub(super) fn dump_arguments(&self, file: &Path) -> Result<Vec<OsString>, LaunchError> {
        self.check()?;
        let mut machine = OsString::from(self.machine());
        machine.push(",dumpdtb=");
        machine.push(value(file)?);
        let mut arguments = self.machine_arguments(machine);
        arguments.extend(self.extra.iter().cloned());
        Ok(arguments)
    }
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
    }
}

/// A path inside a `key=value,...` list, where a comma is written twice.
fn value(path: &Path) -> Result<String, LaunchError> {
    let text = path.to_str().filter(|text| !text.is_empty() && !text.contains('\0'));
    text.map(|text| text.replace(',', ",,")).ok_or_else(|| LaunchError::Path(path.to_owned()))
}

fn socket_path(path: &Path) -> Result<&str, LaunchError> {
    let fits = |text: &&str| !text.is_empty() && text.len() < SUN_PATH && !text.contains('\0');
    path.to_str().filter(fits).ok_or_else(|| LaunchError::Path(path.to_owned()))
}

/// QEMU's arguments, without the program: it starts with its processors stopped (`-S`), listens on the two control
/// sockets and connects to the functions' sockets.
///
/// # Errors
/// [`LaunchError`] for what QEMU would refuse or misunderstand.
pub fn arguments(launch: &Launch, control: &ControlSockets) -> Result<Vec<OsString>, LaunchError> {
    launch.check()?;
    let mut list = Arguments(launch.guest.machine_arguments(launch.guest.machine().into()));
    list.option(
        "-serial",
        match launch.console {
            Console::Captured => "stdio",
            Console::Terminal => "mon:stdio",
        },
    );
    for FunctionSocket { socket, slot, id } in &launch.functions {
        // JSON, because the short form of -device cannot express a socket's address.
        let device = json!({
            "driver": "vfio-user-pci",
            "id": id,
            "bus": "pcie.0",
            "addr": format!("{slot:#x}"),
            "rombar": 0,
            "x-msg-timeout": ANSWER_MS,
            "socket": { "type": "unix", "path": socket_path(socket)? },
        });
        list.option("-device", device.to_string());
    }
    list.0.push("-S".into());
    socket_path(&control.qtest)?;
    socket_path(&control.qmp)?;
    list.option("-qtest", format!("unix:{},server=on,wait=off", value(&control.qtest)?));
    list.option("-qtest-log", "none");
    list.option("-qmp", format!("unix:{},server=on,wait=off", value(&control.qmp)?));
    list.option(
        "-action",
        if launch.no_reboot { "reboot=shutdown,shutdown=poweroff" } else { "reboot=shutdown,shutdown=pause" },
    );
    list.option("-dtb", &launch.device_tree);
    list.option("-kernel", &launch.kernel);
    if let Some(initrd) = &launch.initrd {
        list.option("-initrd", initrd);
    }
    list.option("-append", &launch.append);
    list.0.extend(launch.guest.extra.iter().cloned());
    Ok(list.0)
}

/// The words quoted for a POSIX shell, separated by spaces. Bytes that are not UTF-8 are replaced.
#[must_use]
pub fn shell_words(words: &[OsString]) -> String {
    let quoted = words.iter().map(|word| {
        let word = word.to_string_lossy();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.into_owned()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;

    fn launch() -> Launch {
        Launch {
            guest: GuestConfig { cpus: 4, ..GuestConfig::default() },
            functions: vec![FunctionSocket { socket: "/run/p/f0.sock".into(), slot: 1, id: "window".into() }],
            device_tree: "/run/p/board.dtb".into(),
            kernel: "/kit/vmlinuz".into(),
            initrd: Some("/kit/initrd.gz".into()),
            append: "console=ttyAMA0 panic=-1".into(),
            console: Console::Captured,
            no_reboot: true,
        }
    }

    fn control() -> ControlSockets {
        ControlSockets { qtest: "/run/p/qtest.sock".into(), qmp: "/run/p/qmp.sock".into() }
    }

    #[test]
    fn the_command_line_of_one_launch() {
        let expected = [
            "-machine",
            "virt,gic-version=3,its=on,memory-backend=ram",
            "-accel",
            "tcg",
            "-object",
            r#"{"id":"ram","qom-type":"memory-backend-memfd","share":true,"size":1073741824}"#,
            "-m",
            "1024M",
            "-cpu",
            "cortex-a72",
            "-smp",
            "4",
            "-display",
            "none",
            "-nodefaults",
            "-serial",
            "stdio",
            "-device",
            r#"{"addr":"0x1","bus":"pcie.0","driver":"vfio-user-pci","id":"window","rombar":0,"socket":{"path":"/run/p/f0.sock","type":"unix"},"x-msg-timeout":600000}"#,
            "-S",
            "-qtest",
            "unix:/run/p/qtest.sock,server=on,wait=off",
            "-qtest-log",
            "none",
            "-qmp",
            "unix:/run/p/qmp.sock,server=on,wait=off",
            "-action",
            "reboot=shutdown,shutdown=poweroff",
            "-dtb",
            "/run/p/board.dtb",
            "-kernel",
            "/kit/vmlinuz",
            "-initrd",
            "/kit/initrd.gz",
            "-append",
            "console=ttyAMA0 panic=-1",
        ];
        assert_eq!(arguments(&launch(), &control()).unwrap(), expected);
    }

    #[test]
    fn a_terminal_has_the_monitor_beside_it_and_reboots_pause() {
        let launch = Launch { console: Console::Terminal, no_reboot: false, ..launch() };
        let arguments = arguments(&launch, &control()).unwrap();
        assert!(arguments.windows(2).any(|pair| pair == ["-serial", "mon:stdio"]));
        assert!(arguments.windows(2).any(|pair| pair == ["-action", "reboot=shutdown,shutdown=pause"]));
    }

    #[test]
    fn a_comma_or_a_quote_in_a_path_stays_part_of_the_path() {
        let control = ControlSockets { qtest: "/run/a,b/q".into(), ..control() };
        let mut launch = launch();
        launch.functions[0].socket = "/run/a,\"b/f".into();
        launch.guest.extra = vec!["-name".into(), "x".into()];
        let arguments = arguments(&launch, &control).unwrap();
        assert!(arguments.contains(&"unix:/run/a,,b/q,server=on,wait=off".into()));
        let device = arguments
            .iter()
            .find_map(|word| word.to_str()?.starts_with("{\"addr\"").then_some(word))
            .unwrap();
        let device: serde_json::Value = serde_json::from_str(device.to_str().unwrap()).unwrap();
        assert_eq!(device["socket"]["path"], "/run/a,\"b/f");
        assert_eq!(arguments[arguments.len() - 2..], ["-name", "x"]);
        let dump = launch.guest.dump_arguments(Path::new("/t/a,b")).unwrap();
        assert_eq!(dump[1], "virt,gic-version=3,its=on,memory-backend=ram,dumpdtb=/t/a,,b");
    }

    #[test]
    fn what_qemu_would_refuse_is_refused_here_with_a_reason() {
        type Change = fn(&mut Launch);
        let cases: [(Change, &str); 14] = [
            (|launch| launch.guest.cpus = 0, "processor"),
            (|launch| launch.guest.cpu.clear(), "processor"),
            (|launch| launch.guest.memory = 0, "mebibytes"),
            (|launch| launch.guest.memory = (1 << 30) + 1, "mebibytes"),
            (|launch| launch.guest.gic_version = 2, "GIC version 2 with an ITS"),
            (|launch| launch.guest.gic_version = 9, "GIC"),
            (|launch| launch.functions[0].slot = 0, "slot 0"),
            (|launch| launch.functions[0].slot = 32, "slot 32"),
            (|launch| launch.functions[0].id = "0x".into(), "no name"),
            (|launch| launch.functions[0].id = "a,b".into(), "no name"),
            (
                |launch| launch.functions.push(FunctionSocket { slot: 2, ..launch.functions[0].clone() }),
                "twice",
            ),
            (
                |launch| {
                    launch.functions.push(FunctionSocket { id: "b".into(), ..launch.functions[0].clone() })
                },
                "twice",
            ),
            (|launch| launch.functions[0].socket = "x".repeat(108).into(), "108"),
            (|launch| launch.functions[0].socket = OsString::from_vec(vec![b'/', 0xff]).into(), "UTF-8"),
        ];
        for (change, reason) in cases {
            let mut launch = launch();
            change(&mut launch);
            let error = arguments(&launch, &control()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error} lacks {reason}");
        }
    }

    #[test]
    fn a_shell_gives_the_words_back() {
        let words: Vec<OsString> =
            ["plain", "two words", "", "it's", "$HOME `x` \"y\"", "*", "~", "a\nb", "{\"a\":1}", "a=b,c"]
                .map(OsString::from)
                .to_vec();
        let script = format!("for word in {}; do printf '%s\\0' \"$word\"; done", shell_words(&words));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let back: Vec<&[u8]> = output.stdout.strip_suffix(b"\0").unwrap().split(|byte| *byte == 0).collect();
        let sent: Vec<&[u8]> = words.iter().map(|word| word.as_encoded_bytes()).collect();
        assert_eq!(back, sent);
        assert_eq!(shell_words(&["-m".into(), "1024M".into()]), "-m 1024M");
    }
}
