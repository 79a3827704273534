//! A board for a QEMU that somebody else starts.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portcullis_board::Tree;
use portcullis_board::sim;

use super::control::{Progress, Steering};
use super::{LinuxError, PATIENCE, PCI_SLOT, WINDOW_SLOT, plan, write};
use crate::guest_tree::{self, GuestTree, PciFunction, fragments, guest_tree};
use crate::qemu::{self, Console, ControlSockets, FunctionSocket, GuestConfig, Launch, QemuError};
use crate::session::{Session, SessionError, Summary, Turn};
use crate::vfio_user::{Connection, Limits, Listener};

/// A board that waits for its guest.
pub struct Served {
    tree: GuestTree,
    sim: sim::Options,
    window: Listener,
    functions: VecDeque<(Listener, PciFunction)>,
    control: ControlSockets,
    device_tree: PathBuf,
    arguments: String,
}

/// `path` with more behind its name.
fn beside(path: &Path, more: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(more);
    name.into()
}

impl Served {
    /// Listens at `socket`, and beside it for the board's PCI functions; writes the guest's tree to `socket` with `.dtb` behind it.
    /// `virt` is the tree that QEMU makes for this machine.
    ///
    /// # Errors
    /// The guest's tree cannot be made, or a file or socket cannot.
    pub fn listen(
        board: &Tree,
        virt: &Tree,
        options: guest_tree::Options,
        sim: sim::Options,
        guest: GuestConfig,
        socket: &Path,
    ) -> Result<Self, LinuxError> {
        let tree = guest_tree(board, virt, &guest_tree::Options { pci_first_slot: PCI_SLOT, ..options })?;
        let window = Listener::bind(socket)?;
        let mut sockets =
            vec![FunctionSocket { socket: socket.into(), slot: WINDOW_SLOT, id: "window".into() }];
        let mut functions = VecDeque::new();
        for (i, function) in tree.pci.iter().enumerate() {
            let path = beside(socket, &format!(".pci{i}"));
            functions.push_back((Listener::bind(&path)?, function.clone()));
            sockets.push(FunctionSocket { socket: path, slot: function.slot, id: format!("pci{i}") });
        }
        let device_tree = beside(socket, ".dtb");
        write(&device_tree, &tree.tree.to_dtb())?;
        let control = ControlSockets { qtest: beside(socket, ".qtest"), qmp: beside(socket, ".qmp") };
        let launch = Launch {
            guest,
            functions: sockets,
            device_tree: device_tree.clone(),
            kernel: "KERNEL".into(),
            initrd: Some("INITRD".into()),
            append: "console=ttyAMA0".into(),
            console: Console::Captured,
            no_reboot: true,
        };
        let words = qemu::arguments(&launch, &control).map_err(QemuError::from)?;
        Ok(Self { tree, sim, window, functions, control, device_tree, arguments: qemu::shell_words(&words) })
    }

    /// The arguments to start QEMU with; `KERNEL` and `INITRD` stand for one's own.
    pub fn arguments(&self) -> &str {
        &self.arguments
    }

    /// Where the guest's tree was written.
    pub fn device_tree(&self) -> &Path {
        &self.device_tree
    }

    /// What was put into QEMU's own tree, as source.
    pub fn fragments(&self) -> String {
        fragments(&self.tree)
    }

    /// The guest's tree.
    pub fn tree(&self) -> &GuestTree {
        &self.tree
    }

    /// Waits for a QEMU and serves it until it goes, or until `stop` becomes true. `each` is called again and again with the
    /// session and what there is to know.
    ///
    /// # Errors
    /// The connection broke, or the guest's memory is not usable.
    pub fn serve(
        mut self,
        stop: &AtomicBool,
        each: &mut dyn FnMut(&Session, Option<String>),
    ) -> Result<Option<Summary>, LinuxError> {
        let failed = |error| LinuxError::Session { error, stderr: Vec::new() };
        let stream = loop {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let stream = self.window.accept(Some(Duration::from_millis(100)));
            if let Some(stream) = stream.map_err(|e| failed(SessionError::Host(e)))? {
                break stream;
            }
        };
        let connection =
            Connection::new(stream, Limits::default()).map_err(|e| failed(SessionError::Host(e)))?;
        let mut session = Session::new(plan(&self.tree, self.sim)?, connection);
        let windows =
            vec![qemu::Window { ecam: self.tree.ecam, slot: WINDOW_SLOT, bar0: self.tree.window.base }];
        let control = self.control.clone();
        let steering = Steering::start(
            move |timeout| control.connect(timeout).map_err(|e| e.to_string()),
            windows,
            false,
        );
        while !stop.load(Ordering::Relaxed) {
            if let Some((listener, _)) = self.functions.front()
                && let Some(stream) =
                    listener.accept(Some(Duration::ZERO)).map_err(|e| failed(SessionError::Host(e)))?
                && let Some((_, function)) = self.functions.pop_front()
            {
                let connection = Connection::new(stream, Limits::default());
                session.add_function(function, connection.map_err(|e| failed(SessionError::Host(e)))?);
            }
            let turn = session.turn(PATIENCE).map_err(failed)?;
            let note = steering.progress().and_then(|progress| match progress {
                Progress::Running => Some("the window is placed, the guest runs".into()),
                Progress::Rebooted => Some("the guest rebooted: the window is placed again".into()),
                Progress::Off => None,
                Progress::Panicked(text) => Some(format!("the guest's kernel panicked: {text}")),
                Progress::Ending(reason) => Some(super::ending(&reason)),
                Progress::Failed(text) => Some(format!("QEMU's control sockets: {text}")),
            });
            each(&session, note);
            if turn == Turn::Closed {
                break;
            }
        }
        steering.end();
        Ok(Some(session.summary()))
    }
}
