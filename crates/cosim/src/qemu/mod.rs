//! Finding, starting and steering QEMU.
//!
//! QEMU is somebody else's program and the guest is somebody else's kernel, so everything here is bounded: every wait
//! has a time limit, every line and every buffer a size, and QEMU never outlives the process that started it.
//!
//! | What | Module | Start at |
//! |---|---|---|
//! | guest kernels and a QEMU that `scripts/linux-kit` fetched | `kit` | [`Kit::load`] |
//! | a QEMU that is new enough and has `vfio-user-pci`; its own device tree | `find` | [`Qemu::find`] |
//! | the command line | `arguments` | [`arguments()`], [`Launch`] |
//! | a private directory for sockets | `run_dir` | [`RunDir`] |
//! | the running process: its console, its last words, its end | `guest`, `console`, `stderr`, `terminal`, `process` | [`Guest::start`] |
//! | stop, go on, reset; placing the register window before the kernel runs | `control`, `qmp`, `qtest` | [`Control`] |
//!
//! # The order of things
//!
//! 1. [`Kit::load`], [`Qemu::find`], [`Qemu::device_tree`] (the tree of the bare machine, to be extended).
//! 2. [`RunDir::new`]; listen on a socket for every vfio-user function.
//! 3. [`Guest::start`]: QEMU starts with its processor stopped. It connects to the functions while it builds its
//!    devices and waits there for our answers, so another thread must serve them from now on.
//! 4. [`Guest::connector`] → [`Connector::connect`]: answers as soon as QEMU has built its devices.
//! 5. [`Control::place_window`] for each window, then [`Control::cont`].
//! 6. [`Control::next_event`], [`Guest::console`], [`Guest::try_wait`] until the end.
//!
//! # A guest that reboots
//!
//! A reset clears the BARs, and firmware or Linux would not find the window again: it shows no vendor id. With
//! [`Launch::no_reboot`] a reboot ends QEMU. Without it QEMU stops the machine at the moment of the reboot and says
//! so ([`QmpEvent::Shutdown`] with [`Reason::GuestReset`]); [`Control::restart`] then resets it, places the windows
//! and lets it go on, so that the new kernel never runs without them. The price: with `no_reboot` off a guest that
//! powers off stops too instead of ending QEMU ([`Reason::GuestShutdown`]), and the caller says [`Control::quit`].
//!
//! # Ctrl-C
//!
//! QEMU runs in a process group of its own, so a Ctrl-C on the terminal reaches only us. Dropping a [`Guest`] ends
//! QEMU and removes its directory. If we are killed without a chance to do that, the kernel kills QEMU, and the next
//! [`RunDir::new`] removes what was left.

mod arguments;
mod console;
mod control;
mod find;
mod guest;
mod kit;
mod lines;
mod process;
mod qmp;
mod qtest;
mod run_dir;
mod stderr;
mod terminal;
mod version;

pub use arguments::{Console, FunctionSocket, GuestConfig, Launch, LaunchError, arguments, shell_words};
pub use console::{ConsoleInput, ConsoleRead, ConsoleStream};
pub use control::{Control, ControlError, ControlSockets, Window};
pub use find::{Qemu, QemuError, Rejected};
pub use guest::{Connector, Guest};
pub use kit::{Kernel, Kit, KitError, Tier};
pub use qmp::{Qmp, QmpEvent, Reason, RunState};
pub use qtest::Qtest;
pub use run_dir::{RunDir, RunDirError};
pub use stderr::StderrTail;
pub use version::Version;
