//! A private directory for one run: sockets and device trees.
//!
//! It is named for the process (`portcullis-<pid>-<n>`), readable by its owner only, locked while it is in use and
//! removed when it is dropped. A process that was killed leaves its directory behind; the next one to start removes
//! it, when the process is gone and the lock free. The lock is what tells in a container, where a process number
//! means nothing outside.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::FlockOperation;
use rustix::process::Pid;

/// Bytes of `sun_path` in `struct sockaddr_un`, with the zero byte at its end.
pub(super) const SUN_PATH: usize = 108;
/// Longest name of a socket that [`RunDir::new`] leaves room for.
const NAME_ROOM: usize = 24;
const PREFIX: &str = "portcullis-";

/// A private directory, removed when it is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Holds the lock; the kernel lets go of it when this process ends, however it ends.
    _lock: File,
}

/// Why there is no directory, or no room in it.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// It cannot be made.
    #[error("cannot make a private directory below {}: {source}", .base.display())]
    Create {
        /// Where.
        base: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The path of a socket would not fit.
    #[error(
        "{} has {length} bytes, and the path of a socket has at most {}: set TMPDIR to a shorter directory",
        .path.display(),
        SUN_PATH - 1
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// QEMU's command line is JSON in parts, and JSON is UTF-8.
    #[error("{path:?} is not UTF-8, which QEMU needs: set TMPDIR to another directory")]
    NotUtf8 {
        /// The path.
        path: PathBuf,
    },
    /// A name with a slash in it.
    #[error("{name:?} is no plain file name")]
    BadName {
        /// The name.
        name: String,
    },
}

impl RunDir {
    /// A fresh directory below `$XDG_RUNTIME_DIR`, or below the directory for temporary files where that is not
    /// usable. Directories that dead processes of the same user left there are removed first.
    ///
    /// # Errors
    /// [`RunDirError`] of the last place tried.
    pub fn new() -> Result<Self, RunDirError> {
        let runtime =
            std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        if let Some(dir) = runtime.and_then(|base| Self::below(&base).ok()) {
            return Ok(dir);
        }
        Self::below(&std::env::temp_dir())
    }

    /// A fresh directory below `base`.
    ///
    /// # Errors
    /// [`RunDirError`].
    pub fn below(base: &Path) -> Result<Self, RunDirError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let failed = |source| RunDirError::Create { base: base.to_owned(), source };
        // An absolute path: QEMU may be started with another working directory.
        let base = &std::path::absolute(base).map_err(failed)?;
        remove_stale(base);
        // A number may be taken by a directory of an earlier process with our pid whose lock somebody still holds.
        for _ in 0..1000 {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
            if path.to_str().is_none() {
                return Err(RunDirError::NotUtf8 { path });
            }
            check_length(&path, NAME_ROOM + 1)?;
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(error)),
            }
            // Between these two lines a process of another pid namespace may take the directory for stale.
            let lock = File::open(&path).and_then(|file| {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                Ok(file)
            });
            match lock {
                Ok(lock) if same_directory(&lock, &path) => return Ok(Self { path, _lock: lock }),
                _ => {
                    // Gone or taken: whatever is there is not ours any more, or empty.
                    let _ = fs::remove_dir(&path);
                }
            }
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it.
    ///
    /// # Errors
    /// [`RunDirError::BadName`].
    pub fn file(&self, name: &str) -> Result<PathBuf, RunDirError> {
        if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
            return Err(RunDirError::BadName { name: name.to_owned() });
        }
        Ok(self.path.join(name))
    }

    /// The path of a socket in it, which is sure to fit a socket's address. Names of up to 24 bytes always do.
    ///
    /// # Errors
    /// [`RunDirError::TooLong`], [`RunDirError::BadName`].
    pub fn socket(&self, name: &str) -> Result<PathBuf, RunDirError> {
        let path = self.file(name)?;
        check_length(&path, 0)?;
        Ok(path)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Nobody can be told in a destructor; the next run removes what is left.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Whether `path` with `more` bytes fits a socket's address.
fn check_length(path: &Path, more: usize) -> Result<(), RunDirError> {
    let length = path.as_os_str().len() + more;
    if length < SUN_PATH { Ok(()) } else { Err(RunDirError::TooLong { path: path.to_owned(), length }) }
}

fn same_directory(open: &File, path: &Path) -> bool {
    match (open.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => open.dev() == there.dev() && open.ino() == there.ino(),
        _ => false,
    }
}

/// The process that a directory is named for.
fn owner(name: &str) -> Option<Pid> {
    let (pid, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(pid) || !digits(number) {
        return None;
    }
    Pid::from_raw(pid.parse().ok()?)
}

/// Removes directories whose process is gone. What cannot be removed is left: it is not this run's business.
fn remove_stale(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(owner) else { continue };
        // Only "no such process" means gone; "not permitted" means somebody else's, alive.
        if rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH) {
            continue;
        }
        let path = entry.path();
        // Anybody can make names in a shared temporary directory: ours are real directories of our own user.
        let ours = fs::symlink_metadata(&path)
            .is_ok_and(|data| data.is_dir() && data.uid() == rustix::process::geteuid().as_raw());
        let Ok(file) = File::open(&path) else { continue };
        if ours
            && same_directory(&file, &path)
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// A process number that is not in use: that of a child that has ended and was waited for.
    fn dead_pid() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn it_is_private_and_goes_with_everything_in_it() {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::below(base.path()).unwrap();
        let other = RunDir::below(base.path()).unwrap();
        assert_ne!(dir.path(), other.path());
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let _socket = std::os::unix::net::UnixListener::bind(dir.socket("function-0.sock").unwrap()).unwrap();
        fs::write(dir.file("board.dtb").unwrap(), "x").unwrap();
        let path = dir.path().to_owned();
        drop(dir);
        assert!(!path.exists());
        assert!(other.path().exists());
    }

    #[test]
    fn what_a_dead_process_left_is_removed_and_nothing_else() {
        let base = tempfile::tempdir().unwrap();
        let stale = base.path().join(format!("{PREFIX}{}-0", dead_pid()));
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("q.sock"), "").unwrap();
        let locked = base.path().join(format!("{PREFIX}{}-7", dead_pid()));
        fs::create_dir(&locked).unwrap();
        let lock = File::open(&locked).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let link = base.path().join(format!("{PREFIX}{}-1", dead_pid()));
        symlink(elsewhere.path(), &link).unwrap();
        let others =
            ["portcullis-x-0", "portcullis-1", "portcullis-1-0", "portcullis--1-0", "portcullis-0-0", "else"];
        for name in others {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        let alive = RunDir::below(base.path()).unwrap();
        let again = RunDir::below(base.path()).unwrap();
        assert!(!stale.exists(), "the stale one stays");
        assert!(locked.exists(), "a locked one went");
        assert!(alive.path().exists() && again.path().exists());
        assert!(link.symlink_metadata().is_ok() && elsewhere.path().exists(), "a link was followed");
        for name in others {
            assert!(base.path().join(name).exists(), "{name} went");
        }
    }

    #[test]
    fn a_base_too_long_for_sockets_is_refused_with_the_remedy() {
        let base = tempfile::tempdir().unwrap();
        let long = base.path().join("x".repeat(100));
        fs::create_dir(&long).unwrap();
        let error = RunDir::below(&long).unwrap_err();
        assert!(matches!(error, RunDirError::TooLong { .. }), "{error}");
        assert!(error.to_string().contains("TMPDIR"));
        assert_eq!(fs::read_dir(&long).unwrap().count(), 0);
    }

    #[test]
    fn names_stay_inside_and_fit() {
        let base = tempfile::tempdir().unwrap();
        let nowhere = RunDir::below(&base.path().join("none")).unwrap_err();
        assert!(matches!(nowhere, RunDirError::Create { .. }), "{nowhere}");
        let dir = RunDir::below(base.path()).unwrap();
        for name in ["", ".", "..", "../x", "a/b", "a\0b"] {
            assert!(matches!(dir.socket(name), Err(RunDirError::BadName { .. })), "{name:?}");
        }
        assert!(dir.socket(&"n".repeat(NAME_ROOM)).is_ok());
        assert!(matches!(dir.socket(&"n".repeat(120)), Err(RunDirError::TooLong { .. })));
    }
}
