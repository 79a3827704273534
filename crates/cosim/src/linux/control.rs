//! The thread at QEMU's control sockets: places the windows, lets the guest run, follows reboots.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::qemu::{Control, ControlError, QmpEvent, Reason, Window};

/// How long QEMU may take to build its devices.
const CONNECT: Duration = Duration::from_secs(30);
/// How long a wait for an event lasts: how late the end can be noticed.
const LOOK: Duration = Duration::from_millis(50);

/// What happened at the control sockets.
#[derive(Debug)]
pub enum Progress {
    /// The windows are placed and the guest runs.
    Running,
    /// The guest has rebooted and runs again.
    Rebooted,
    /// The guest powered off.
    Off,
    /// The guest's kernel told a device that it panicked.
    Panicked(String),
    /// QEMU ends, and the guest did not ask for it.
    Ending(Reason),
    /// It does not go on.
    Failed(String),
}

/// The thread, from outside.
pub struct Steering {
    progress: Receiver<Progress>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Steering {
    /// Connects within the time that `connect` is given, places `windows`, lets the guest run, and follows what QEMU says.
    /// With `reboots` QEMU was started so that a reboot stops it, and is told to go on; otherwise a reboot ends it.
    pub fn start(
        connect: impl FnOnce(Duration) -> Result<Control, String> + Send + 'static,
        windows: Vec<Window>,
        reboots: bool,
    ) -> Self {
        let (send, progress) = channel();
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::Builder::new().name("qemu-control".into()).spawn(move || {
            let control = match connect(CONNECT) {
                Ok(control) => control,
                Err(error) => {
                    let _ = send.send(Progress::Failed(error));
                    return;
                }
            };
            if let Err(error) = steer(control, &windows, reboots, &send, &ended)
                && !ended.load(Ordering::Relaxed)
            {
                let _ = send.send(Progress::Failed(error.to_string()));
            }
        });
        // Without the thread nothing is ever placed: the receiver says so at once.
        Self { progress, end, thread: thread.ok() }
    }

    /// What happened since the last call.
    pub fn progress(&self) -> Option<Progress> {
        if self.thread.is_none() {
            return Some(Progress::Failed("no thread could be started for QEMU's control sockets".into()));
        }
        self.progress.try_recv().ok()
    }

    /// What happened and was not fetched, once QEMU is gone: waits a moment for the thread to have seen it all.
    pub fn last(&self, timeout: Duration) -> Vec<Progress> {
        let begun = Instant::now();
        while self.thread.as_ref().is_some_and(|t| !t.is_finished()) && begun.elapsed() < timeout {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.progress.try_iter().collect()
    }

    /// The thread need not go on.
    pub fn end(&self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

impl Drop for Steering {
    fn drop(&mut self) {
        self.end();
    }
}

fn steer(
    mut control: Control,
    windows: &[Window],
    reboots: bool,
    send: &Sender<Progress>,
    end: &AtomicBool,
) -> Result<(), ControlError> {
    for window in windows {
        control.place_window(*window)?;
    }
    control.cont()?;
    let say = |progress| {
        let _ = send.send(progress);
    };
    say(Progress::Running);
    while !end.load(Ordering::Relaxed) {
        match control.next_event(LOOK)? {
            Some(QmpEvent::Shutdown(Reason::GuestReset)) if reboots => {
                control.restart(windows)?;
                say(Progress::Rebooted);
            }
            Some(QmpEvent::Shutdown(reason)) => {
                let _ = control.quit();
                match reason {
                    Reason::GuestShutdown | Reason::GuestReset | Reason::HostQuit => {}
                    Reason::GuestPanic => say(Progress::Panicked("QEMU was told so".into())),
                    reason => say(Progress::Ending(reason)),
                }
                say(Progress::Off);
                return Ok(());
            }
            Some(QmpEvent::GuestPanicked(text)) => say(Progress::Panicked(text)),
            Some(_) | None => {}
        }
    }
    Ok(())
}
