//! A running QEMU.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::arguments::{Console, Launch, arguments};
use super::console::{ConsoleInput, ConsoleStream};
use super::control::{Control, ControlSockets};
use super::find::{Qemu, QemuError};
use super::process::{Deadline, Keeper, kill_group, spawn_kept};
use super::run_dir::RunDir;
use super::stderr::{Stderr, StderrTail};
use super::terminal::Keyboard;

/// A running QEMU. Dropping it kills QEMU, restores the terminal and removes the run's directory.
///
/// QEMU does not outlive this process, even when that is killed: the kernel then kills QEMU. For that the program
/// must be QEMU itself or a script that ends in `exec`.
#[derive(Debug)]
pub struct Guest {
    // The order is the order of the end: terminal, QEMU (in `drop`), its keeper, the directory.
    keyboard: Option<Keyboard>,
    child: Child,
    status: Option<ExitStatus>,
    _keeper: Keeper,
    console: ConsoleStream,
    input: ConsoleInput,
    stderr: Stderr,
    sockets: ControlSockets,
    dir: RunDir,
}

/// What another thread needs to connect to QEMU's control sockets.
#[derive(Clone, Debug)]
pub struct Connector {
    sockets: ControlSockets,
    stderr: Stderr,
}

impl Connector {
    /// Connects as soon as QEMU has built its devices, for which somebody must serve its functions meanwhile.
    ///
    /// # Errors
    /// [`QemuError::Ended`] as soon as QEMU ends instead, with its last words; [`QemuError::Control`].
    pub fn connect(&self, timeout: Duration) -> Result<Control, QemuError> {
        let ended = || self.stderr.ended();
        self.sockets.connect_unless(timeout, &mut || ended()).map_err(|error| {
            // It closes its sockets a moment before it is gone.
            if error.is_closed() || ended() {
                let stderr = self.stderr.last_words();
                if ended() {
                    return QemuError::Ended { status: None, stderr };
                }
            }
            error.into()
        })
    }
}

impl Guest {
    /// Starts QEMU with its processors stopped. Does not wait for it: QEMU now connects to the functions of `launch`
    /// and waits there for the answers of our server. `dir` holds its control sockets and lives as long as it.
    ///
    /// # Errors
    /// [`QemuError::Start`], [`QemuError::Launch`], [`QemuError::RunDir`].
    pub fn start(qemu: &Qemu, launch: &Launch, dir: RunDir) -> Result<Self, QemuError> {
        let failed = |source| QemuError::Start { program: qemu.program.clone(), source };
        let sockets = ControlSockets::in_dir(&dir)?;
        let mut command = Command::new(&qemu.program);
        command.args(arguments(launch, &sockets)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (child, keeper) = spawn_kept(command).map_err(failed)?;
        let mut started = Started(Some(child));
        let pipes = started
            .0
            .as_mut()
            .and_then(|child| child.stdin.take().zip(child.stdout.take()).zip(child.stderr.take()));
        let lost = || failed(io::ErrorKind::BrokenPipe.into());
        let ((stdin, stdout), stderr) = pipes.ok_or_else(lost)?;
        let input = ConsoleInput::new(stdin).map_err(failed)?;
        let console = ConsoleStream::start(stdout).map_err(failed)?;
        let stderr = Stderr::start(stderr).map_err(failed)?;
        let keyboard = match launch.console {
            Console::Captured => None,
            Console::Terminal => Some(Keyboard::start(input.clone()).map_err(failed)?),
        };
        let child = started.0.take().ok_or_else(lost)?;
        Ok(Self { keyboard, child, status: None, _keeper: keeper, console, input, stderr, sockets, dir })
    }

    /// What another thread needs to connect.
    #[must_use]
    pub fn connector(&self) -> Connector {
        Connector { sockets: self.sockets.clone(), stderr: self.stderr.clone() }
    }

    /// Connects from this thread: see [`Connector::connect`].
    ///
    /// # Errors
    /// As [`Connector::connect`]; a QEMU that ended is reported with its status.
    pub fn connect_control(&mut self, timeout: Duration) -> Result<Control, QemuError> {
        self.connector().connect(timeout).map_err(|error| match error {
            QemuError::Ended { stderr, .. } => {
                QemuError::Ended { status: self.wait(Duration::from_millis(500)), stderr }
            }
            error => error,
        })
    }

    /// How QEMU ended, or `None` while it runs.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = match self.child.try_wait() {
                Ok(status) => status,
                // Where SIGCHLD is ignored the kernel forgets how a child ended: it is gone, and nobody knows how.
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::CHILD.raw_os_error()) => {
                    Some(ExitStatus::from_raw(0xff00))
                }
                Err(_) => None,
            };
        }
        self.status
    }

    /// Waits at most `timeout` for QEMU to end.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let deadline = Deadline::after(timeout);
        loop {
            let status = self.try_wait();
            if status.is_some() || deadline.is_over() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2).min(deadline.remaining()));
        }
    }

    /// Ends QEMU at once, and waits until it is gone. The guest is not asked; nothing it holds is worth saving.
    pub fn kill(&mut self) {
        if self.try_wait().is_none() {
            kill_group(&mut self.child);
            self.status = self.child.wait().ok();
        }
    }

    /// The process number of QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last lines of QEMU's stderr, all of them once it has ended.
    pub fn stderr(&mut self) -> StderrTail {
        if self.try_wait().is_some() { self.stderr.last_words() } else { self.stderr.tail() }
    }

    /// What the guest prints, in both modes of [`Console`]: showing it is the caller's.
    #[must_use]
    pub fn console(&self) -> &ConsoleStream {
        &self.console
    }

    /// The guest's keyboard.
    #[must_use]
    pub fn console_input(&self) -> &ConsoleInput {
        &self.input
    }

    /// Gives the terminal back before the end, for a last word of our own.
    pub fn release_terminal(&mut self) {
        self.keyboard = None;
    }

    /// The run's directory.
    #[must_use]
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.keyboard = None;
        self.kill();
    }
}

/// A child that is killed unless it is taken out: what happens between its start and the whole [`Guest`].
struct Started(Option<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            kill_group(child);
            let _ = child.wait();
        }
    }
}
