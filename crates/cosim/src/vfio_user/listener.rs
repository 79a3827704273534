//! The socket a client connects to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

/// A socket in the file system, readable and writable by its owner only. Removed on drop.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file we made: nothing else is ever removed.
    identity: (u64, u64),
}

/// Why a [`Listener`] cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// A server is there already.
    #[error("{}: another process listens on this socket", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// A file that is not a socket is there; it is left alone.
    #[error("{}: exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Longer than the 107 bytes a socket address has room for.
    #[error("{}: too long for a socket path (107 bytes at most)", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("{}: {doing} failed: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Listener {
    /// Makes the socket. One left behind by a dead server is replaced; a live one is refused, without disturbing it.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ListenError> {
        let path = path.as_ref().to_path_buf();
        let address = SocketAddrUnix::new(&path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => ListenError::PathTooLong { path: path.clone() },
            errno => failed(&path, "naming the socket", errno),
        })?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|errno| failed(&path, "making a socket", errno))?;
        // Before bind: the file is born with this mode, nobody else can slip in.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|errno| failed(&path, "setting the mode", errno))?;
        match bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                remove_dead(&path, &address)?;
                bind(&socket, &address).map_err(|errno| match errno {
                    Errno::ADDRINUSE => ListenError::InUse { path: path.clone() },
                    errno => failed(&path, "binding", errno),
                })?;
            }
            other => other.map_err(|errno| failed(&path, "binding", errno))?,
        }
        let file = fs::symlink_metadata(&path).map_err(|source| ListenError::Io {
            path: path.clone(),
            doing: "looking at it",
            source,
        })?;
        let listener = Self { socket, identity: (file.dev(), file.ino()), path };
        listen(&listener.socket, 8).map_err(|errno| failed(&listener.path, "listening", errno))?;
        Ok(listener)
    }

    /// Waits for a client, at most `timeout` (`None`: for ever; zero: not at all). `None` when none came.
    pub fn accept(&self, timeout: Option<Duration>) -> io::Result<Option<UnixStream>> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => Ok(Some(stream.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket nobody is bound to any more.
fn remove_dead(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_path_buf() });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| failed(path, "making a socket", errno))?;
    // A datagram socket cannot connect to a stream socket: the kernel says "wrong type" when one is bound there and
    // "refused" when none is. A live server never notices; a stream connection would have been its first client.
    match connect(&probe, address) {
        Ok(()) | Err(Errno::PROTOTYPE) => Err(ListenError::InUse { path: path.to_path_buf() }),
        Err(Errno::CONNREFUSED) => fs::remove_file(path).or_else(|source| match source.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(ListenError::Io { path: path.to_path_buf(), doing: "removing a dead socket", source }),
        }),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed(path, "probing an existing socket", errno)),
    }
}

fn failed(path: &Path, doing: &'static str, errno: Errno) -> ListenError {
    ListenError::Io { path: path.to_path_buf(), doing, source: errno.into() }
}
