//! Children that cannot outlive us, and children that cannot take for ever.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};

/// A point in time after which waiting is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Instant);

impl Deadline {
    /// After `timeout`, at most a year from now.
    pub(super) fn after(timeout: Duration) -> Self {
        Self(Instant::now() + timeout.min(Duration::from_secs(365 * 24 * 3600)))
    }

    pub(super) fn remaining(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub(super) fn is_over(self) -> bool {
        self.remaining().is_zero()
    }
}

/// Waits until one of `fds` is ready; `false` when the time is over.
pub(super) fn wait_any(fds: &mut [PollFd<'_>], deadline: Deadline) -> io::Result<bool> {
    loop {
        let remaining = deadline.remaining();
        let timeout = Timespec::try_from(remaining).map_err(|_| io::ErrorKind::InvalidInput)?;
        match rustix::event::poll(fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until `fd` is ready; `false` when the time is over.
pub(super) fn wait_one(fd: impl AsFd, flags: PollFlags, deadline: Deadline) -> io::Result<bool> {
    wait_any(&mut [PollFd::new(&fd, flags)], deadline)
}

/// Makes the child of `command` die with the thread that spawns it, and gives it a process group of its own.
///
/// The kernel kills the child (`PR_SET_PDEATHSIG`) when the spawning *thread* ends, so that thread has to live as
/// long as the child should: see [`spawn_kept`]. The setting survives `execve`, also of a script that ends in
/// `exec`; it does not survive a set-user-ID program. A program that the child itself starts is not covered.
#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    command.process_group(0);
    let before_exec = move || -> io::Result<()> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have died before the line above: then nobody will send the signal any more.
        if rustix::process::getppid() != Some(parent) {
            return Err(rustix::io::Errno::CANCELED.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only functions that are safe in a signal handler may run, since another thread
    // may have held a lock at the fork. The closure makes two system calls without libc's state, compares integers
    // and converts an error number; it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(before_exec);
    }
}

/// The thread that a running child depends on. Dropping it lets the thread end, and the kernel kills the child.
#[derive(Debug)]
pub(super) struct Keeper {
    _release: mpsc::Sender<()>,
}

/// Starts a child that lives until it is told to end or this process ends, whichever thread asked for it.
pub(super) fn spawn_kept(mut command: Command) -> io::Result<(Child, Keeper)> {
    let (release, released) = mpsc::channel::<()>();
    let (send, receive) = mpsc::sync_channel(1);
    std::thread::Builder::new().name("qemu-keeper".into()).spawn(move || {
        die_with_parent(&mut command);
        let child = command.spawn();
        drop(command);
        let started = child.is_ok();
        if send.send(child).is_ok() && started {
            // Ends with an error when the keeper is dropped: nobody ever sends.
            let _ = released.recv();
        }
    })?;
    let child = receive.recv().map_err(|_| io::Error::other("the thread that starts QEMU ended"))??;
    Ok((child, Keeper { _release: release }))
}

/// Kills the process group of a child that has not been waited for. The child itself is killed whatever happens.
pub(super) fn kill_group(child: &mut Child) {
    // The number is the child's and the group's as long as nobody waited for it.
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    }
    let _ = child.kill();
}

/// What a short-lived program left behind.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// Why a short-lived program gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("cannot be started: {0}")]
    Spawn(io::Error),
    #[error("did not end within {} s", .0.as_secs_f32())]
    Late(Duration),
    #[error("wrote more than {0} bytes")]
    TooMuch(usize),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Runs a program to its end, within `timeout`, with at most `limit` bytes on each of stdout and stderr.
pub(super) fn run(mut command: Command, timeout: Duration, limit: usize) -> Result<Finished, RunError> {
    let deadline = Deadline::after(timeout);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // This thread waits for the child, so the child may depend on this thread.
    die_with_parent(&mut command);
    let mut child = Reaped(command.spawn().map_err(RunError::Spawn)?);
    let (Some(mut stdout), Some(mut stderr)) = (child.0.stdout.take(), child.0.stderr.take()) else {
        return Err(RunError::Io(io::ErrorKind::BrokenPipe.into()));
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let (out_ready, err_ready) =
            readable([out_open.then(|| stdout.as_fd()), err_open.then(|| stderr.as_fd())], deadline)?
                .ok_or(RunError::Late(timeout))?;
        if out_ready {
            out_open = read_some(&mut stdout, &mut out, limit)?;
        }
        if err_ready {
            err_open = read_some(&mut stderr, &mut err, limit)?;
        }
    }
    loop {
        if let Some(status) = child.0.try_wait()? {
            return Ok(Finished { status, stdout: out, stderr: err });
        }
        if deadline.is_over() {
            return Err(RunError::Late(timeout));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Which of two descriptors can be read without waiting; `None` when the time is over.
fn readable(fds: [Option<BorrowedFd<'_>>; 2], deadline: Deadline) -> io::Result<Option<(bool, bool)>> {
    let mut polls: Vec<PollFd<'_>> =
        fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    if deadline.is_over() || !wait_any(&mut polls, deadline)? {
        return Ok(None);
    }
    let mut answers = polls.iter().map(|poll| !poll.revents().is_empty());
    let [first, second] = fds.map(|fd| fd.is_some() && answers.next().unwrap_or(false));
    Ok(Some((first, second)))
}

/// Reads once; `false` at the end.
fn read_some(from: &mut impl Read, into: &mut Vec<u8>, limit: usize) -> Result<bool, RunError> {
    let mut buffer = [0; 8192];
    match from.read(&mut buffer) {
        Ok(0) => Ok(false),
        Ok(count) => {
            into.extend_from_slice(buffer.get(..count).unwrap_or_default());
            if into.len() > limit { Err(RunError::TooMuch(limit)) } else { Ok(true) }
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// A child that is killed and waited for when it goes out of scope.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            kill_group(&mut self.0);
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_and_status_of_a_short_program_come_back() {
        let done = run(sh("echo out; echo err >&2; exit 3"), Duration::from_secs(10), 100).unwrap();
        assert_eq!((done.stdout.as_slice(), done.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(done.status.code(), Some(3));
    }

    #[test]
    fn a_program_that_does_not_end_is_killed_with_its_children() {
        let start = Instant::now();
        let marker = tempfile::tempdir().unwrap();
        let pid_file = marker.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
        let error = run(sh(&script), Duration::from_millis(500), 100).unwrap_err();
        assert!(matches!(error, RunError::Late(_)), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5));
        let pid: i32 = std::fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        let pid = Pid::from_raw(pid).unwrap();
        let deadline = Deadline::after(Duration::from_secs(5));
        while rustix::process::test_kill_process(pid).is_ok() && !is_zombie(pid) {
            assert!(!deadline.is_over(), "the child's child lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where process 1 does not wait for orphans they stay as zombies.
    fn is_zombie(pid: Pid) -> bool {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
    }

    #[test]
    fn a_program_that_closes_its_output_and_stays_is_killed_too() {
        let error = run(sh("exec >&- 2>&-; exec sleep 1000"), Duration::from_millis(300), 100).unwrap_err();
        assert!(matches!(error, RunError::Late(_)), "{error}");
    }

    #[test]
    fn a_program_that_talks_without_end_is_cut_off() {
        let error = run(sh("exec yes"), Duration::from_secs(10), 10_000).unwrap_err();
        assert!(matches!(error, RunError::TooMuch(10_000)), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_said_so() {
        let error = run(Command::new("/nonexistent/qemu"), Duration::from_secs(1), 100).unwrap_err();
        assert!(matches!(error, RunError::Spawn(_)), "{error}");
        assert!(spawn_kept(Command::new("/nonexistent/qemu")).is_err());
    }

    #[test]
    fn a_kept_child_outlives_the_thread_that_asked_and_not_its_keeper() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let (mut child, keeper) = std::thread::spawn(move || spawn_kept(command).unwrap()).join().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none(), "it died with the thread that asked for it");
        drop(keeper);
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }

    #[test]
    fn a_kept_child_leads_a_group_of_its_own() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let (mut child, _keeper) = spawn_kept(command).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(rustix::process::getpgid(Some(pid)).unwrap(), pid);
        kill_group(&mut child);
        child.wait().unwrap();
    }
}
