//! A small client, for tests and tools: it blocks, it is simple, and it says everything a client can say.
//!
//! It answers the server's DMA requests while it waits for a reply of its own, from the memory it shared with
//! [`Peer::share`]. Requests outside that memory are kept in [`Peer::written`] and answered as [`Peer::outside`] says, so
//! that a test can watch interrupts arrive as writes. [`Peer::send_raw`] sends any bytes and descriptors at all.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::{self, Command, HEADER_SIZE, Header};

/// Largest message taken from a server.
const MAX_MESSAGE: usize = 68 << 20;
/// Most descriptors in one message.
const MAX_FDS: usize = 64;

/// Why a [`Peer`] got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The server refused the request.
    #[error("the server refuses {command} with {errno}")]
    Refused {
        /// The request.
        command: Command,
        /// Why.
        errno: Errno,
    },
    /// The server broke the protocol.
    #[error("the server's message makes no sense: {0}")]
    Protocol(&'static str),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The socket failed; `WouldBlock` when the server did not answer in time.
    #[error("vfio-user client socket: {0}")]
    Io(#[from] io::Error),
}

/// A message from the server.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub body: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// What VERSION answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerVersion {
    /// Major version.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// The JSON text, without its NUL.
    pub capabilities: String,
}

/// A region, as the server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionReply {
    /// See [`wire::region_flags`].
    pub flags: u32,
    /// Bytes.
    pub size: u64,
}

/// A DMA_WRITE outside shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// First DMA address.
    pub address: u64,
    /// The bytes.
    pub data: Vec<u8>,
}

/// What to answer to DMA outside shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// Writes succeed, reads give zeros.
    Accept,
    /// An error reply.
    Refuse(Errno),
    /// No answer at all, inside shared memory too.
    Silent,
}

struct Shared {
    iova: u64,
    size: u64,
    memory: File,
}

/// A vfio-user client.
pub struct Peer {
    stream: UnixStream,
    next_id: u16,
    shared: Vec<Shared>,
    /// Answers that came while waiting for another.
    early: VecDeque<Message>,
    /// What to answer to DMA outside shared memory.
    pub outside: Outside,
    /// The DMA writes outside shared memory.
    pub written: Vec<Written>,
}

type Result<T> = std::result::Result<T, PeerError>;

impl Peer {
    /// What QEMU's client proposes in VERSION.
    pub const CAPABILITIES: &'static str = r#"{"capabilities":{"migration":{"max_bitmap_size":268435456,"pgsize":4096},"max_msg_fds":16,"max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535,"write_multiple":true}}"#;

    /// Connects to a server's socket.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(UnixStream::connect(path)?)
    }

    /// Uses a connected socket; an answer may take 10 seconds.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self {
            stream,
            next_id: 0,
            shared: Vec::new(),
            early: VecDeque::new(),
            outside: Outside::Accept,
            written: Vec::new(),
        })
    }

    /// How long an answer may take (`None`: for ever).
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        Ok(self.stream.set_read_timeout(timeout)?)
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Negotiates version 0.0 with [`Peer::CAPABILITIES`].
    pub fn version(&mut self) -> Result<ServerVersion> {
        self.version_with(0, 0, Self::CAPABILITIES)
    }

    /// Negotiates.
    pub fn version_with(&mut self, major: u16, minor: u16, capabilities: &str) -> Result<ServerVersion> {
        let fixed = wire::Version { major: major.into(), minor: minor.into() };
        let body = [fixed.as_bytes(), capabilities.as_bytes(), &[0]].concat();
        let answer = self.request(Command::Version, &body, &[])?;
        let (version, text) = split::<wire::Version>(&answer.body)?;
        let Some((0, text)) = text.split_last() else {
            return Err(PeerError::Protocol("version data without a terminating NUL"));
        };
        Ok(ServerVersion {
            major: version.major.get(),
            minor: version.minor.get(),
            capabilities: String::from_utf8_lossy(text).into_owned(),
        })
    }

    /// Flags (see [`wire::device_flags`]), number of regions, number of interrupt indexes.
    pub fn device_info(&mut self) -> Result<(u32, u32, u32)> {
        let asked = wire::DeviceInfo { argsz: 16.into(), ..Default::default() };
        let answer = self.request(Command::DeviceGetInfo, asked.as_bytes(), &[])?;
        let (info, _) = split::<wire::DeviceInfo>(&answer.body)?;
        Ok((info.flags.get(), info.num_regions.get(), info.num_irqs.get()))
    }

    /// Flags and size of a region.
    pub fn region_info(&mut self, index: u32) -> Result<RegionReply> {
        let asked = wire::RegionInfo { argsz: 32.into(), index: index.into(), ..Default::default() };
        let answer = self.request(Command::DeviceGetRegionInfo, asked.as_bytes(), &[])?;
        let (info, _) = split::<wire::RegionInfo>(&answer.body)?;
        Ok(RegionReply { flags: info.flags.get(), size: info.size.get() })
    }

    /// Flags (see [`wire::irq_flags`]) and number of interrupts of an index.
    pub fn irq_info(&mut self, index: u32) -> Result<(u32, u32)> {
        let asked = wire::IrqInfo { argsz: 16.into(), index: index.into(), ..Default::default() };
        let answer = self.request(Command::DeviceGetIrqInfo, asked.as_bytes(), &[])?;
        let (info, _) = split::<wire::IrqInfo>(&answer.body)?;
        Ok((info.flags.get(), info.count.get()))
    }

    /// Sets interrupts; `flags` as in [`wire::set_irqs_flags`].
    pub fn set_irqs(
        &mut self,
        flags: u32,
        index: u32,
        start: u32,
        count: u32,
        data: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        let fixed = wire::SetIrqs {
            argsz: ((size_of::<wire::SetIrqs>() + data.len()) as u32).into(),
            flags: flags.into(),
            index: index.into(),
            start: start.into(),
            count: count.into(),
        };
        let body = [fixed.as_bytes(), data].concat();
        self.request(Command::DeviceSetIrqs, &body, fds).map(drop)
    }

    /// Makes a memfd of `size` bytes and maps it at `iova`, readable and writable. The file is the memory.
    pub fn share(&mut self, iova: u64, size: u64) -> Result<File> {
        let memory =
            File::from(memfd_create("vfio-user-peer", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
        memory.set_len(size)?;
        self.map(iova, size, 0, wire::map_flags::READ | wire::map_flags::WRITE, Some(memory.as_fd()))?;
        self.shared.push(Shared { iova, size, memory: memory.try_clone()? });
        Ok(memory)
    }

    /// Maps a range, with or without a descriptor.
    pub fn map(
        &mut self,
        iova: u64,
        size: u64,
        offset: u64,
        flags: u32,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let body = wire::DmaMap {
            argsz: 32.into(),
            flags: flags.into(),
            offset: offset.into(),
            address: iova.into(),
            size: size.into(),
        };
        let fds: Vec<_> = fd.into_iter().collect();
        self.request(Command::DmaMap, body.as_bytes(), &fds).map(drop)
    }

    /// Unmaps a range.
    pub fn unmap(&mut self, iova: u64, size: u64) -> Result<()> {
        self.unmap_with(iova, size, 0)?;
        self.shared.retain(|shared| shared.iova != iova);
        Ok(())
    }

    /// Unmaps everything.
    pub fn unmap_all(&mut self) -> Result<()> {
        self.unmap_with(0, 0, wire::unmap_flags::ALL)?;
        self.shared.clear();
        Ok(())
    }

    fn unmap_with(&mut self, iova: u64, size: u64, flags: u32) -> Result<()> {
        let body =
            wire::DmaUnmap { argsz: 24.into(), flags: flags.into(), address: iova.into(), size: size.into() };
        self.request(Command::DmaUnmap, body.as_bytes(), &[]).map(drop)
    }

    /// Reads from a region.
    pub fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        let fixed = access(region, offset, data.len());
        let answer = self.request(Command::RegionRead, fixed.as_bytes(), &[])?;
        let (_, bytes) = split::<wire::RegionAccess>(&answer.body)?;
        if bytes.len() != data.len() {
            return Err(PeerError::Protocol("a read's reply has another size than was asked for"));
        }
        data.copy_from_slice(bytes);
        Ok(())
    }

    /// Reads a 32-bit register.
    pub fn read_u32(&mut self, region: u32, offset: u64) -> Result<u32> {
        let mut data = [0; 4];
        self.read(region, offset, &mut data)?;
        Ok(u32::from_le_bytes(data))
    }

    /// Writes to a region and waits for the answer.
    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let body = [access(region, offset, data.len()).as_bytes(), data].concat();
        self.request(Command::RegionWrite, &body, &[]).map(drop)
    }

    /// Writes to a region without an answer, as QEMU does for registers.
    pub fn post(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        let body = [access(region, offset, data.len()).as_bytes(), data].concat();
        self.send(Command::RegionWrite, wire::NO_REPLY, &body, &[]).map(drop)
    }

    /// Several writes of at most 8 bytes in one message. With `answered`, how many were done.
    pub fn write_multiple(&mut self, writes: &[(u32, u64, &[u8])], answered: bool) -> Result<u64> {
        let count = wire::WriteCount { count: (writes.len() as u64).into() };
        let mut body = count.as_bytes().to_vec();
        for &(region, offset, bytes) in writes {
            let mut data = [0; 8];
            data.get_mut(..bytes.len())
                .ok_or(PeerError::Protocol("a batched write has at most 8 bytes"))?
                .copy_from_slice(bytes);
            let one = wire::WriteOne {
                offset: offset.into(),
                region: region.into(),
                count: (bytes.len() as u32).into(),
                data,
            };
            body.extend_from_slice(one.as_bytes());
        }
        if !answered {
            self.send(Command::RegionWriteMulti, wire::NO_REPLY, &body, &[])?;
            return Ok(0);
        }
        let answer = self.request(Command::RegionWriteMulti, &body, &[])?;
        Ok(split::<wire::WriteCount>(&answer.body)?.0.count.get())
    }

    /// Resets the device.
    pub fn reset(&mut self) -> Result<()> {
        self.request(Command::DeviceReset, &[], &[]).map(drop)
    }

    /// Answers the server's DMA requests until none came for `quiet`. How many.
    pub fn answer_dma(&mut self, quiet: Duration) -> Result<usize> {
        let before = self.stream.read_timeout()?;
        // A timeout of zero would mean for ever.
        self.stream.set_read_timeout(Some(quiet.max(Duration::from_millis(1))))?;
        let mut answered = 0;
        // A server that never falls silent is left after a while.
        let end = Instant::now() + quiet.saturating_mul(50) + Duration::from_secs(1);
        let outcome = loop {
            if Instant::now() > end {
                break Ok(answered);
            }
            match self.receive() {
                Ok(message) if message.header.is_command() => {
                    answered += 1;
                    if let Err(error) = self.answer(&message) {
                        break Err(error);
                    }
                }
                Ok(message) => self.early.push_back(message),
                Err(PeerError::Io(error))
                    if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
                {
                    break Ok(answered);
                }
                Err(error) => break Err(error),
            }
        };
        self.stream.set_read_timeout(before)?;
        outcome
    }

    /// Sends a request and returns its reply, answering the server's DMA requests meanwhile.
    pub fn request(&mut self, command: Command, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        let id = self.send(command, 0, body, fds)?;
        loop {
            let position = self.early.iter().position(|message| message.header.id.get() == id);
            let message = match position.and_then(|index| self.early.remove(index)) {
                Some(message) => message,
                None => self.receive()?,
            };
            if message.header.is_command() {
                self.answer(&message)?;
            } else if message.header.id.get() != id {
                self.early.push_back(message);
            } else if message.header.flags.get() & wire::ERROR != 0 {
                let errno = Errno::from_raw_os_error(message.header.error.get().clamp(1, 4095) as i32);
                return Err(PeerError::Refused { command, errno });
            } else if message.header.command.get() != command.number() {
                return Err(PeerError::Protocol("the reply is for another command"));
            } else {
                return Ok(message);
            }
        }
    }

    /// Sends a request with any flags and returns its id.
    pub fn send(&mut self, command: Command, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<u16> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let header = Header::request(id, command, flags, body.len());
        self.send_raw(&[header.as_bytes(), body].concat(), fds)?;
        Ok(id)
    }

    /// Sends bytes, the descriptors with the first of them.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut rest = bytes;
        let mut fds = fds;
        while !rest.is_empty() {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(PeerError::Protocol("too many descriptors for one message"));
            }
            match sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
                Ok(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    fds = &[];
                }
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(PeerError::Closed),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        Ok(())
    }

    /// The next message of the server, whatever it is.
    pub fn receive(&self) -> Result<Message> {
        let mut fds = Vec::new();
        let mut head = [0; HEADER_SIZE];
        self.fill(&mut head, &mut fds)?;
        let header = Header::read_from_bytes(&head).map_err(|_| PeerError::Protocol("no header"))?;
        let size = (header.size.get() as usize)
            .checked_sub(HEADER_SIZE)
            .filter(|&size| size <= MAX_MESSAGE)
            .ok_or(PeerError::Protocol("a size field out of range"))?;
        let mut body = vec![0; size];
        self.fill(&mut body, &mut fds)?;
        Ok(Message { header, body, fds })
    }

    fn fill(&self, mut space: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<()> {
        while !space.is_empty() {
            let mut control_space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut control_space);
            let received =
                recvmsg(&self.stream, &mut [IoSliceMut::new(space)], &mut control, RecvFlags::CMSG_CLOEXEC);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            match received {
                Ok(received) if received.bytes == 0 => return Err(PeerError::Closed),
                Ok(received) => space = space.get_mut(received.bytes..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(PeerError::Closed),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
        Ok(())
    }

    /// Answers one DMA request.
    pub fn answer(&mut self, message: &Message) -> Result<()> {
        if self.outside == Outside::Silent {
            return Ok(());
        }
        let header = &message.header;
        let (body, data) = match self.dma(message) {
            Ok(answer) => answer,
            Err(PeerError::Refused { errno, .. }) => {
                let reply = header.error_reply(errno.raw_os_error().unsigned_abs());
                return self.send_raw(reply.as_bytes(), &[]);
            }
            Err(error) => return Err(error),
        };
        let reply = header.reply(size_of_val(&body) + data.len());
        self.send_raw(&[reply.as_bytes(), body.as_bytes(), &data].concat(), &[])
    }

    /// Carries out one DMA request; the payload of its reply.
    fn dma(&mut self, message: &Message) -> Result<(wire::DmaAccess, Vec<u8>)> {
        let command = Command::from_number(message.header.command.get())
            .filter(|command| matches!(command, Command::DmaRead | Command::DmaWrite))
            .ok_or(PeerError::Protocol("a server asks for DMA_READ and DMA_WRITE only"))?;
        let (fixed, data) = split::<wire::DmaAccess>(&message.body)?;
        let (address, count) = (fixed.address.get(), fixed.count.get());
        let size = usize::try_from(count)
            .ok()
            .filter(|&size| size <= MAX_MESSAGE)
            .ok_or(PeerError::Protocol("a DMA count out of range"))?;
        if command == Command::DmaWrite && data.len() != size {
            return Err(PeerError::Protocol("a DMA write's data do not have the size of its count"));
        }
        let place = self.shared.iter().find_map(|shared| {
            let offset = address.checked_sub(shared.iova)?;
            (offset.checked_add(count)? <= shared.size).then_some((&shared.memory, offset))
        });
        let mut read = if command == Command::DmaRead { vec![0; size] } else { Vec::new() };
        match (place, self.outside) {
            (Some((memory, offset)), _) if command == Command::DmaWrite => {
                memory.write_all_at(data, offset)?
            }
            (Some((memory, offset)), _) => memory.read_exact_at(&mut read, offset)?,
            (None, Outside::Refuse(errno)) => return Err(PeerError::Refused { command, errno }),
            (None, _) if command == Command::DmaWrite => {
                self.written.push(Written { address, data: data.to_vec() });
            }
            (None, _) => {}
        }
        Ok((fixed, read))
    }
}

fn access(region: u32, offset: u64, size: usize) -> wire::RegionAccess {
    wire::RegionAccess { offset: offset.into(), region: region.into(), count: (size as u32).into() }
}

fn split<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<(T, &[u8])> {
    T::read_from_prefix(body).map_err(|_| PeerError::Protocol("a payload shorter than its structure"))
}
