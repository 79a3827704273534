//! A device that writes down what it was asked, and a connection to it over a socket pair.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use portcullis_cosim::vfio_user::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub const BAR_SIZE: u64 = 0x1000;

/// BAR 0 of 4 KiB, BAR 2 read-only, a configuration space of 256 bytes, INTA and 4 MSI-X.
#[derive(Default)]
pub struct Device {
    pub bar: Vec<u8>,
    pub config: Vec<u8>,
    pub calls: Vec<String>,
    pub quiet: bool,
    pub accesses: u64,
    pub fds: Vec<OwnedFd>,
    pub refuse: bool,
}

impl Device {
    pub fn new() -> Self {
        Self { bar: (0..BAR_SIZE).map(|i| i as u8).collect(), config: vec![0xff; 256], ..Self::default() }
    }

    fn log(&mut self, call: impl FnOnce() -> String) {
        self.accesses += 1;
        if !self.quiet {
            self.calls.push(call());
        }
    }

    fn verdict(&self) -> Result<(), Refusal> {
        if self.refuse { Err(Refusal(Errno::BUSY)) } else { Ok(()) }
    }
}

impl Function for Device {
    fn region(&self, index: u32) -> RegionInfo {
        match index {
            pci::BAR0 => RegionInfo::read_write(BAR_SIZE),
            2 => RegionInfo { size: 16, read: true, write: false },
            pci::CONFIG => RegionInfo::read_write(256),
            _ => RegionInfo::ABSENT,
        }
    }

    fn irq(&self, index: u32) -> IrqInfo {
        match index {
            pci::INTX => IrqInfo::INTX,
            pci::MSIX => IrqInfo::messages(4),
            _ => IrqInfo::ABSENT,
        }
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) {
        self.log(|| format!("read {region} {offset:#x} {}", data.len()));
        let from = match region {
            pci::BAR0 => &self.bar,
            2 => &vec![0x22; 16],
            pci::CONFIG => &self.config,
            _ => panic!("region {region}"),
        };
        data.copy_from_slice(&from[offset as usize..][..data.len()]);
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        self.log(|| format!("write {region} {offset:#x} {data:02x?}"));
        let into = match region {
            pci::BAR0 => &mut self.bar,
            pci::CONFIG => &mut self.config,
            _ => panic!("region {region}"),
        };
        into[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn set_irqs(&mut self, request: SetIrqs) -> Result<(), Refusal> {
        let SetIrqs { index, start, count, action, .. } = request;
        let data = match &request.data {
            IrqData::Eventfds(fds) => format!("{} eventfds", fds.len()),
            other => format!("{other:?}"),
        };
        self.log(|| format!("irqs {index} {start}+{count} {action:?} {data}"));
        if let IrqData::Eventfds(fds) = request.data {
            self.fds.extend(fds);
        }
        self.verdict()
    }

    fn dma_map(&mut self, map: DmaMap) -> Result<(), Refusal> {
        let DmaMap { iova, size, offset, readable, writable, fd } = map;
        assert!(size > 0 && iova.checked_add(size - 1).is_some() && offset.checked_add(size).is_some());
        let access = format!("{}{}", if readable { "r" } else { "-" }, if writable { "w" } else { "-" });
        let with = if fd.is_some() { "fd" } else { "no fd" };
        self.log(|| format!("map {iova:#x}+{size:#x} @{offset:#x} {access} {with}"));
        self.fds.extend(fd);
        self.verdict()
    }

    fn dma_unmap(&mut self, unmap: DmaUnmap) -> Result<(), Refusal> {
        self.log(|| match unmap {
            DmaUnmap::Range { iova, size } => format!("unmap {iova:#x}+{size:#x}"),
            DmaUnmap::All => "unmap all".into(),
        });
        self.verdict()
    }

    fn reset(&mut self) {
        self.log(|| "reset".into());
    }
}

/// A connection and the other end of its socket.
pub struct Wire {
    pub peer: UnixStream,
    pub connection: Connection,
    pub device: Device,
}

impl Wire {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        let (peer, ours) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        Self { peer, connection: Connection::new(ours, limits).unwrap(), device: Device::new() }
    }

    /// With the version already negotiated, as a peer without capabilities.
    pub fn negotiated() -> Self {
        Self::negotiated_with(Limits::default())
    }

    pub fn negotiated_with(limits: Limits) -> Self {
        let mut wire = Self::with(limits);
        let answer = wire.exchange(VERSION);
        assert!(answer.len() > 20);
        wire
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(send_with(&self.peer, bytes, fds), Ok(bytes.len()));
    }

    pub fn pump(&mut self) -> Result<Pumped, ConnectionError> {
        loop {
            match self.connection.pump(&mut self.device, 64)? {
                Pumped::More => {}
                other => return Ok(other),
            }
        }
    }

    /// Everything that came back so far.
    pub fn received(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut some = [0; 65536];
        while let Ok(count @ 1..) = self.peer.read(&mut some) {
            all.extend_from_slice(&some[..count]);
        }
        all
    }

    /// Sends hexadecimal bytes, pumps, and returns what came back.
    pub fn exchange(&mut self, text: &str) -> Vec<u8> {
        self.exchange_with(text, &[])
    }

    pub fn exchange_with(&mut self, text: &str, fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        self.send(&hex(text), fds);
        assert_eq!(self.pump().unwrap(), Pumped::Idle);
        self.received()
    }

    pub fn calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.device.calls)
    }
}

/// VERSION 0.0 without data, id 1.
pub const VERSION: &str = "0100 0100 14000000 00000000 00000000  0000 0000";

/// Bytes from hexadecimal digits; spaces and line ends are for the reader.
pub fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|byte| (byte as char).to_digit(16).expect("a hexadecimal digit") as u8)
        .collect();
    assert!(digits.len().is_multiple_of(2));
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

pub fn send_with(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// A small deterministic generator (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// How many messages a fuzz test sends: `PORTCULLIS_FUZZ`, or a number that keeps the tests quick.
pub fn fuzz_messages() -> u64 {
    std::env::var("PORTCULLIS_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000)
}
