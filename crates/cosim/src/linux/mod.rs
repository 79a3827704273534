//! A kernel on a board: everything that `portcullis linux` does, as a library.
//!
//! [`run`] starts QEMU with the board's tree put into its own ([`crate::guest_tree`]), serves the board
//! ([`crate::session`]) and tells an [`Observer`] what happens until the guest powers off. The caller's thread serves;
//! a second one speaks with QEMU's control sockets, which answer only while somebody serves.

mod control;
pub mod marks;
mod overlay;
mod serve;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use portcullis_board::sim::{self, Event, Machine};
use portcullis_board::{MachineDescription, Tree, TreeError};
use thiserror::Error;

use crate::guest_tree::{self, GuestTree, GuestTreeError, PciFunction, guest_tree};
use crate::qemu::{
    self, Console, ConsoleRead, FunctionSocket, Guest, GuestConfig, Kernel, Launch, Qemu, QemuError, Reason,
    RunDir, RunDirError,
};
use crate::session::{Plan, Session, SessionError, Summary, Turn};
use crate::vfio_user::{Connection, Limits, ListenError, Listener};
use control::{Progress, Steering};
use marks::Marks;
pub use overlay::{GuestFile, archive, behind};
pub use serve::Served;

/// The slot of the window's function on QEMU's bus 0.
pub const WINDOW_SLOT: u8 = 1;
/// The slot of the board's first PCI function.
pub const PCI_SLOT: u8 = 2;
/// What runs in the guest when nobody asks for anything else.
pub const TOUR: &str = include_str!("../../jobs/tour.sh");
/// How long QEMU may take to connect, and to end.
const START: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(10);
/// How long a QEMU that seems to be gone may take to be so, or what it said to reach us.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a turn may wait when nothing happens: how late the console can be.
const PATIENCE: Duration = Duration::from_millis(5);
/// Events are told of at least this often, in turns.
const EVERY: u32 = 64;

/// What to run.
#[derive(Clone, Debug)]
pub struct Job {
    /// The board.
    pub board: Tree,
    /// How its tree gets into the guest's. The slot of PCI functions is [`PCI_SLOT`].
    pub tree: guest_tree::Options,
    /// What is recorded.
    pub sim: sim::Options,
    /// The machine that QEMU is asked for.
    pub guest: GuestConfig,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: Option<PathBuf>,
    /// Put behind the initial file system, below `/overlay`; the kit's `/init` runs the one called `run`.
    pub files: Vec<GuestFile>,
    /// Added to the kernel's command line.
    pub append: String,
    /// Where the guest's console goes.
    pub console: Console,
    /// A reboot of the guest is followed; otherwise it ends QEMU.
    pub reboot: bool,
    /// The guest is ended after this time.
    pub limit: Option<Duration>,
}

impl Job {
    /// `script` on a kernel of the kit, on one processor with 1 GiB.
    pub fn new(board: Tree, kernel: &Kernel, script: &str) -> Self {
        Self {
            board,
            tree: guest_tree::Options { pci_first_slot: PCI_SLOT, ..guest_tree::Options::default() },
            sim: sim::Options::default(),
            guest: GuestConfig::default(),
            kernel: kernel.image.clone(),
            initrd: Some(kernel.initrd.clone()),
            files: vec![GuestFile::text("run", script)],
            append: String::new(),
            console: Console::Captured,
            reboot: false,
            limit: None,
        }
    }
}

/// Who is told what happens. All calls come from the thread that called [`run`].
pub trait Observer {
    /// QEMU was started.
    fn started(&mut self, started: &Started<'_>) {
        let _ = started;
    }
    /// The guest printed something.
    fn console(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }
    /// The machine recorded something; `lost` more events were not kept.
    fn events(&mut self, machine: &Machine, events: &[Event], lost: u64) {
        let _ = (machine, events, lost);
    }
    /// Something to know.
    fn note(&mut self, text: &str) {
        let _ = text;
    }
    /// Called again and again while the guest runs: a chance to look, and to ask for the end with `false`.
    fn tick(&mut self, look: &mut Look<'_>) -> bool {
        let _ = look;
        true
    }
}

/// What was started.
pub struct Started<'a> {
    /// The guest's tree and what is where.
    pub tree: &'a GuestTree,
    /// QEMU's version and command line.
    pub qemu: &'a Qemu,
    /// The command line for a shell.
    pub command: String,
}

/// A look at a running guest.
pub struct Look<'a> {
    /// The board behind the window.
    pub session: &'a Session,
    /// What the guest's script said so far.
    pub marks: &'a Marks,
    /// The process number of QEMU.
    pub qemu: u32,
    /// Since QEMU was started.
    pub elapsed: Duration,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off, or rebooted where that is the end.
    GuestOff,
    /// QEMU ended in another way.
    Qemu(ExitStatus),
    /// The time was over.
    Limit,
    /// Somebody wanted the end.
    Asked,
}

/// What became of a job.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// What the board saw.
    pub summary: Summary,
    /// What the guest's script said.
    pub marks: Marks,
    /// Reboots that were followed.
    pub reboots: u32,
    /// The last lines that QEMU wrote to its standard error.
    pub stderr: Vec<String>,
}

impl Outcome {
    /// The guest came to its own end, and everything that its script looked at was well.
    pub fn is_good(&self) -> bool {
        self.end == End::GuestOff && self.marks.is_good()
    }
}

/// Why a job could not be run to its end.
#[derive(Debug, Error)]
pub enum LinuxError {
    /// The guest's tree cannot be made.
    #[error("{0}")]
    GuestTree(#[from] GuestTreeError),
    /// QEMU's own tree, or the guest's, is not usable.
    #[error("the guest's device tree: {0}")]
    Tree(#[from] TreeError),
    /// QEMU.
    #[error("{0}")]
    Qemu(#[from] QemuError),
    /// The directory for sockets.
    #[error("{0}")]
    RunDir(#[from] RunDirError),
    /// A socket.
    #[error("{0}")]
    Listen(#[from] ListenError),
    /// A file.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// QEMU ended before it connected, or did not connect in time.
    #[error("QEMU {}; it said: {}", unconnected(*status), if stderr.is_empty() { "nothing".into() } else { stderr.join("; ") })]
    NoConnection {
        /// How it ended, if it did.
        status: Option<ExitStatus>,
        /// What it wrote to its standard error.
        stderr: Vec<String>,
    },
    /// The session with QEMU.
    #[error("{error}{}", if stderr.is_empty() { String::new() } else { format!("; QEMU said: {}", stderr.join("; ")) })]
    Session {
        /// Why.
        error: SessionError,
        /// What QEMU wrote to its standard error.
        stderr: Vec<String>,
    },
    /// QEMU's control sockets.
    #[error("{0}")]
    Control(String),
}

fn unconnected(status: Option<ExitStatus>) -> String {
    match status {
        Some(status) => format!("ended ({status}) before it connected to our socket"),
        None => format!("did not connect to our socket within {} seconds", START.as_secs()),
    }
}

/// Runs a job. `stop` ends it when it becomes true.
///
/// # Errors
/// [`LinuxError`]; a guest that fails in its own way is an [`Outcome`].
pub fn run(
    job: &Job,
    qemu: &Qemu,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Outcome, LinuxError> {
    let virt = Tree::from_dtb(&qemu.device_tree(&job.guest)?)?;
    let options = guest_tree::Options { pci_first_slot: PCI_SLOT, ..job.tree };
    let tree = guest_tree(&job.board, &virt, &options)?;
    let dir = RunDir::new()?;

    let device_tree = dir.file("guest.dtb")?;
    write(&device_tree, &tree.tree.to_dtb())?;
    let initrd = match (&job.initrd, job.files.is_empty()) {
        (Some(path), false) => {
            let base = std::fs::read(path).map_err(|error| LinuxError::File { path: path.clone(), error })?;
            let file = dir.file("initrd")?;
            let bytes =
                behind(base, &job.files).map_err(|error| LinuxError::File { path: file.clone(), error })?;
            write(&file, &bytes)?;
            Some(file)
        }
        (initrd, _) => initrd.clone(),
    };

    let mut listeners = vec![listen(&dir, "window.sock", WINDOW_SLOT, "window")?];
    for (i, function) in tree.pci.iter().enumerate() {
        listeners.push(listen(&dir, &format!("pci{i}.sock"), function.slot, &format!("pci{i}"))?);
    }
    let launch = Launch {
        guest: job.guest.clone(),
        functions: listeners.iter().map(|(_, socket)| socket.clone()).collect(),
        device_tree,
        kernel: job.kernel.clone(),
        initrd,
        append: format!("console=ttyAMA0 panic=-1 {}", job.append).trim_end().into(),
        console: job.console,
        no_reboot: !job.reboot,
    };
    let plan = plan(&tree, job.sim)?;
    let command = shown(qemu, &launch, &dir)?;
    let mut guest = Guest::start(qemu, &launch, dir)?;
    observer.started(&Started { tree: &tree, qemu, command });
    let mut listeners = listeners.into_iter().map(|(listener, _)| listener);
    let stream = match listeners.next() {
        Some(listener) => first_connection(&listener, &mut guest, stop)?,
        None => None,
    };
    let Some(stream) = stream else {
        return Ok(Outcome { end: End::Asked, ..Outcome::nothing() });
    };
    let connection = connect(stream, &mut guest)?;
    let session = Session::new(plan, connection);
    let windows = vec![qemu::Window { ecam: tree.ecam, slot: WINDOW_SLOT, bar0: tree.window.base }];
    let connector = guest.connector();
    let steer = move |timeout| connector.connect(timeout).map_err(|e| e.to_string());
    let steering = Steering::start(steer, windows, job.reboot);
    Run {
        job,
        observer,
        stop,
        session,
        guest,
        steering,
        awaited: listeners.zip(tree.pci.iter().cloned()).collect(),
        marks: Marks::default(),
        reboots: 0,
        begun: Instant::now(),
    }
    .until_the_end()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), LinuxError> {
    std::fs::write(path, bytes).map_err(|error| LinuxError::File { path: path.into(), error })
}

fn listen(dir: &RunDir, name: &str, slot: u8, id: &str) -> Result<(Listener, FunctionSocket), LinuxError> {
    let path = dir.socket(name)?;
    let listener = Listener::bind(&path)?;
    Ok((listener, FunctionSocket { socket: path, slot, id: id.into() }))
}

/// The command line, for people.
fn shown(qemu: &Qemu, launch: &Launch, dir: &RunDir) -> Result<String, LinuxError> {
    let sockets = qemu::ControlSockets::in_dir(dir)?;
    let mut words = vec![qemu.program.clone().into_os_string()];
    words.extend(qemu::arguments(launch, &sockets).map_err(QemuError::from)?);
    Ok(qemu::shell_words(&words))
}

/// What is served to a guest with this tree.
///
/// # Errors
/// The tree describes no machine.
pub fn plan(tree: &GuestTree, options: sim::Options) -> Result<Plan, LinuxError> {
    let description = MachineDescription::from_tree(&tree.tree)?;
    let interrupts = tree.tree.nodes().iter().flat_map(|n| &n.interrupts);
    let edges = Plan::edges(interrupts);
    Ok(Plan { description, options, window: (tree.window.base, tree.window.size), gicd: tree.gicd, edges })
}

/// QEMU's connection to the window; `None` if somebody wants the end first.
fn first_connection(
    listener: &Listener,
    guest: &mut Guest,
    stop: &AtomicBool,
) -> Result<Option<UnixStream>, LinuxError> {
    let begun = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let stream = listener.accept(Some(Duration::from_millis(50)));
        match stream.map_err(|error| session_error(SessionError::Host(error), guest))? {
            None => {
                let status = guest.try_wait();
                if status.is_some() || begun.elapsed() > START {
                    guest.kill();
                    return Err(LinuxError::NoConnection { status, stderr: guest.stderr().lines });
                }
            }
            some => return Ok(some),
        }
    }
    Ok(None)
}

fn connect(stream: UnixStream, guest: &mut Guest) -> Result<Connection, LinuxError> {
    Connection::new(stream, Limits::default())
        .map_err(|error| session_error(SessionError::Host(error), guest))
}

fn session_error(error: SessionError, guest: &mut Guest) -> LinuxError {
    guest.kill();
    LinuxError::Session { error, stderr: guest.stderr().lines }
}

impl Outcome {
    fn nothing() -> Self {
        Self {
            end: End::Asked,
            summary: Summary::default(),
            marks: Marks::default(),
            reboots: 0,
            stderr: Vec::new(),
        }
    }
}

fn panicked(text: &str) -> String {
    format!("the guest's kernel panicked: {text}")
}

/// Why QEMU ends although the guest did not ask for it.
fn ending(reason: &Reason) -> String {
    match reason {
        Reason::HostSignal => "somebody ended QEMU with a signal".into(),
        Reason::HostError => "QEMU ends because of an error".into(),
        Reason::Other(word) => format!("QEMU ends: {word}"),
        reason => format!("QEMU ends: {reason:?}"),
    }
}

/// A guest that runs.
struct Run<'a> {
    job: &'a Job,
    observer: &'a mut dyn Observer,
    stop: &'a AtomicBool,
    session: Session,
    guest: Guest,
    steering: Steering,
    /// Functions that QEMU has not connected to yet: it does so one after the other, each when the one before was answered.
    awaited: VecDeque<(Listener, PciFunction)>,
    marks: Marks,
    reboots: u32,
    begun: Instant,
}

impl Run<'_> {
    fn until_the_end(mut self) -> Result<Outcome, LinuxError> {
        let end = self.serve();
        self.steering.end();
        let end = match end {
            Ok(end) => end,
            Err(error) => {
                self.tell();
                return Err(error);
            }
        };
        // What it wrote last comes after it has closed the connection.
        let status = if matches!(end, End::GuestOff | End::Qemu(_)) { self.await_exit() } else { None };
        self.guest.kill();
        self.guest.release_terminal();
        self.tell();
        let end = match (end, status) {
            (End::GuestOff, Some(status)) if !status.success() => End::Qemu(status),
            (end, _) => end,
        };
        Ok(Outcome {
            end,
            summary: self.session.summary(),
            marks: std::mem::take(&mut self.marks),
            reboots: self.reboots,
            stderr: self.guest.stderr().lines,
        })
    }

    fn serve(&mut self) -> Result<End, LinuxError> {
        let mut turns = 0u32;
        loop {
            self.accept()?;
            match self.session.turn(PATIENCE) {
                Ok(Turn::Open) => {}
                Ok(Turn::Closed) => return self.closed(),
                // A QEMU that was killed may leave half a message.
                Err(SessionError::Connection(error)) if self.guest.wait(LAST_WORDS).is_some() => {
                    self.observer.note(&format!("the connection to QEMU: {error}"));
                    return self.closed();
                }
                Err(error) => return Err(session_error(error, &mut self.guest)),
            }
            turns = turns.wrapping_add(1);
            if !turns.is_multiple_of(EVERY) && !self.session.is_idle() {
                continue;
            }
            self.tell();
            if let Some(end) = self.steer()? {
                return Ok(end);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Ok(End::Asked);
            }
            if self.job.limit.is_some_and(|limit| self.begun.elapsed() > limit) {
                return Ok(End::Limit);
            }
            let mut look = Look {
                session: &self.session,
                marks: &self.marks,
                qemu: self.guest.pid(),
                elapsed: self.begun.elapsed(),
            };
            if !self.observer.tick(&mut look) {
                return Ok(End::Asked);
            }
        }
    }

    /// Waits until QEMU is gone, for it has closed the window's connection or was told to quit. Until then its other
    /// functions are answered.
    fn await_exit(&mut self) -> Option<ExitStatus> {
        let begun = Instant::now();
        loop {
            let status = self.guest.wait(Duration::from_millis(2));
            if status.is_some() || begun.elapsed() > END {
                return status;
            }
            // There is nobody left to tell of an error.
            let _ = self.session.turn(Duration::ZERO);
        }
    }

    /// QEMU has closed the window's connection: why?
    fn closed(&mut self) -> Result<End, LinuxError> {
        let Some(status) = self.await_exit() else {
            self.guest.kill();
            let text =
                format!("QEMU gave up the window and went on: it was ended after {} seconds", END.as_secs());
            return Err(LinuxError::Control(text));
        };
        let mut end = if status.success() { End::GuestOff } else { End::Qemu(status) };
        for progress in self.steering.last(LAST_WORDS) {
            match progress {
                Progress::Ending(reason) => {
                    self.observer.note(&ending(&reason));
                    end = End::Qemu(status);
                }
                Progress::Panicked(text) => self.observer.note(&panicked(&text)),
                // It came after the connection was closed, or says that QEMU is gone.
                Progress::Running | Progress::Rebooted | Progress::Off | Progress::Failed(_) => {}
            }
        }
        Ok(end)
    }

    /// The next function that QEMU connects to.
    fn accept(&mut self) -> Result<(), LinuxError> {
        let Some((listener, _)) = self.awaited.front() else { return Ok(()) };
        let stream = listener.accept(Some(Duration::ZERO));
        let stream = stream.map_err(|error| session_error(SessionError::Host(error), &mut self.guest))?;
        if let Some(stream) = stream
            && let Some((_, function)) = self.awaited.pop_front()
        {
            let connection = connect(stream, &mut self.guest)?;
            self.session.add_function(function, connection);
        }
        Ok(())
    }

    /// Tells the observer what came.
    fn tell(&mut self) {
        // Everything that is there comes at once. A guest that prints without end must not hold us here.
        if let ConsoleRead::Bytes(bytes) = self.guest.console().read(Duration::ZERO) {
            self.marks.feed(&bytes);
            self.observer.console(&bytes);
        }
        let (events, lost) = self.session.take_events();
        if let Some(machine) = self.session.machine()
            && (!events.is_empty() || lost > 0)
        {
            self.observer.events(machine, &events, lost);
        }
    }

    /// What the thread at the control sockets has to say.
    fn steer(&mut self) -> Result<Option<End>, LinuxError> {
        while let Some(progress) = self.steering.progress() {
            match progress {
                Progress::Running => self.observer.note("the window is placed, the guest runs"),
                Progress::Rebooted => {
                    self.reboots += 1;
                    // It would most likely panic again, for ever.
                    if let Some(text) = &self.marks.panic {
                        self.observer.note(&panicked(text));
                        return Ok(Some(End::GuestOff));
                    }
                    self.observer.note("the guest rebooted: the window is placed again");
                }
                Progress::Off => return Ok(Some(End::GuestOff)),
                Progress::Panicked(text) => self.observer.note(&panicked(&text)),
                Progress::Ending(reason) => {
                    self.observer.note(&ending(&reason));
                    if let Some(status) = self.await_exit() {
                        return Ok(Some(End::Qemu(status)));
                    }
                }
                Progress::Failed(text) => {
                    // A QEMU that ended says so at its own sockets as well.
                    if let Some(status) = self.guest.wait(LAST_WORDS) {
                        return Ok(Some(if status.success() { End::GuestOff } else { End::Qemu(status) }));
                    }
                    self.guest.kill();
                    return Err(LinuxError::Control(text));
                }
            }
        }
        if let Some(status) = self.guest.try_wait() {
            return Ok(Some(if status.success() { End::GuestOff } else { End::Qemu(status) }));
        }
        Ok(None)
    }
}
