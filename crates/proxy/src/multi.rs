//! The proxy with many buffers per channel, whose transfers are started and finished one by one.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use portcullis_drivers::dmaengine::{Direction, Registry};
use portcullis_hal::{Clock, DmaMemory};
use portcullis_iommu::dma::DmaDevice;
use spin::Mutex;

use crate::port::{Flight, Port};
use crate::test::equal_up_to;
use crate::{Dma, ProxyError, ProxyStatus, RX_NAME, TX_NAME};

/// Buffers of a channel.
pub const BUFFER_COUNT: usize = 32;
/// Bytes of a buffer.
pub const BUFFER_SIZE: u64 = 128 * 1024;
/// Bytes from one buffer's structure to the next: buffer, status and length, aligned to 1024.
pub const BUFFER_STRIDE: u64 = 0x20400;
/// Bytes that the test at load moves.
pub const MULTI_TEST_SIZE: u64 = 1024;
const STATUS: u64 = BUFFER_SIZE;
const LENGTH: u64 = BUFFER_SIZE + 4;

struct MultiChannel<M: DmaMemory + Clone + 'static> {
    name: String,
    port: Port<M>,
    flights: [Mutex<Option<Flight>>; BUFFER_COUNT],
}

/// A loaded dma-proxy of the newer kind. Channels are numbered as in `dma-names`, buffers from 0.
pub struct MultiProxy<M: DmaMemory + Clone + 'static, C> {
    channels: Vec<MultiChannel<M>>,
    clock: C,
    log: Mutex<Vec<String>>,
}

impl<M: DmaMemory + Clone + 'static, C: Clock> MultiProxy<M, C> {
    /// Requests every channel of `dmas`. `device` is the proxy's own.
    pub fn probe(
        registry: &Registry,
        dmas: &[Dma<'_>],
        device: &DmaDevice<M>,
        clock: C,
    ) -> Result<Self, ProxyError> {
        let open = |dma: &Dma<'_>| {
            let channel = dma.request(registry, device.name())?;
            // The original asks for "memory to device" always, and relies on drivers that know better.
            let direction = channel.caps().direction.unwrap_or(Direction::MemToDev);
            let port = Port::new(channel, direction, device, BUFFER_STRIDE * BUFFER_COUNT as u64)?;
            let flights = [const { Mutex::new(None) }; BUFFER_COUNT];
            Ok(MultiChannel { name: dma.name.to_string(), port, flights })
        };
        let channels = dmas.iter().map(open).collect::<Result<Vec<_>, ProxyError>>()?;
        Ok(Self { channels, clock, log: Mutex::new(Vec::new()) })
    }

    /// The number of a channel.
    pub fn channel(&self, name: &str) -> Option<usize> {
        self.channels.iter().position(|channel| channel.name == name)
    }

    /// The way a channel goes.
    pub fn direction(&self, channel: usize) -> Option<Direction> {
        self.channels.get(channel).map(|channel| channel.port.direction())
    }

    /// What the driver logged since the last call.
    pub fn take_log(&self) -> Vec<String> {
        core::mem::take(&mut *self.log.lock())
    }

    fn note(&self, message: String) {
        let mut log = self.log.lock();
        if log.len() < 1000 {
            log.push(message);
        }
    }

    /// A buffer, its place in the channel's memory, and what is under way with it.
    #[expect(clippy::type_complexity, reason = "three things of one place")]
    fn buffer(
        &self,
        channel: usize,
        buffer: usize,
    ) -> Result<(&MultiChannel<M>, u64, &Mutex<Option<Flight>>), ProxyError> {
        let no_channel = ProxyError::Index { what: "channel", index: channel };
        let found = self.channels.get(channel).ok_or(no_channel)?;
        let flight = found.flights.get(buffer).ok_or(ProxyError::Index { what: "buffer", index: buffer })?;
        Ok((found, buffer as u64 * BUFFER_STRIDE, flight))
    }

    fn inside(&self, channel: usize, buffer: usize, offset: u64, len: u64) -> Result<u64, ProxyError> {
        let (_, at, _) = self.buffer(channel, buffer)?;
        match offset.checked_add(len) {
            Some(end) if end <= BUFFER_SIZE => Ok(at + offset),
            _ => Err(ProxyError::Length { len: offset.saturating_add(len), size: BUFFER_SIZE }),
        }
    }

    /// Copies bytes of a buffer out.
    pub fn read(
        &self,
        channel: usize,
        buffer: usize,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), ProxyError> {
        let at = self.inside(channel, buffer, offset, bytes.len() as u64)?;
        self.buffer(channel, buffer)?.0.port.read(at, bytes)
    }
    /// Copies bytes into a buffer.
    pub fn write(&self, channel: usize, buffer: usize, offset: u64, bytes: &[u8]) -> Result<(), ProxyError> {
        let at = self.inside(channel, buffer, offset, bytes.len() as u64)?;
        self.buffer(channel, buffer)?.0.port.write(at, bytes)
    }
    /// Sets the length of a buffer's next transfer, which checks it.
    pub fn set_length(&self, channel: usize, buffer: usize, length: u32) -> Result<(), ProxyError> {
        let (found, at, _) = self.buffer(channel, buffer)?;
        found.port.set_word(at + LENGTH, length);
        Ok(())
    }
    /// How a buffer's last transfer went.
    pub fn status(&self, channel: usize, buffer: usize) -> Result<ProxyStatus, ProxyError> {
        let (found, at, _) = self.buffer(channel, buffer)?;
        Ok(ProxyStatus::from_word(found.port.word(at + STATUS)))
    }

    /// `START_XFER`: starts a buffer's transfer and returns.
    pub fn start(&self, channel: usize, buffer: usize) -> Result<(), ProxyError> {
        let (found, at, flight) = self.buffer(channel, buffer)?;
        let mut flight = flight.lock();
        if flight.is_some() {
            return Err(ProxyError::Busy);
        }
        let len = u64::from(found.port.word(at + LENGTH));
        let started = match len <= BUFFER_SIZE {
            true => found.port.start(at, len).map_err(ProxyError::from),
            false => Err(ProxyError::Length { len, size: BUFFER_SIZE }),
        };
        match started {
            Ok(started) => *flight = Some(started),
            Err(error) => {
                drop(flight);
                found.port.set_word(at + STATUS, ProxyStatus::Error as u32);
                self.note(format!("{}: {error}", found.name));
                return Err(error);
            }
        }
        Ok(())
    }

    /// `FINISH_XFER`: waits for a buffer's transfer.
    pub fn finish(&self, channel: usize, buffer: usize) -> Result<ProxyStatus, ProxyError> {
        let (found, at, place) = self.buffer(channel, buffer)?;
        let flight = {
            let place = place.lock();
            // It stays in its place meanwhile: nobody starts another.
            let Some(flight) = place.clone() else { return self.status(channel, buffer) };
            found.port.set_word(at + STATUS, ProxyStatus::Busy as u32);
            flight
        };
        let (status, message) = found.port.finish(&flight, &self.clock);
        found.port.settle(place, &flight, at + STATUS, status);
        if let Some(message) = message {
            self.note(format!("{}: {message}", found.name));
        }
        Ok(status)
    }

    /// `XFER`: both.
    pub fn transfer(&self, channel: usize, buffer: usize) -> Result<ProxyStatus, ProxyError> {
        self.start(channel, buffer)?;
        self.finish(channel, buffer)
    }

    /// The test at load: [`MULTI_TEST_SIZE`] bytes of counting words from `dma_proxy_tx` to `dma_proxy_rx`.
    pub fn internal_test(&self, mut report: impl FnMut(&str)) -> Result<bool, ProxyError> {
        let [tx, rx] = [TX_NAME, RX_NAME].map(|name| self.channel(name).ok_or(ProxyError::Missing { name }));
        let (tx, rx) = (tx?, rx?);
        report("Starting internal test");
        let words = 0..MULTI_TEST_SIZE as u32 / 4;
        let sent: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        self.write(tx, 0, 0, &sent)?;
        self.write(rx, 0, 0, &[0; MULTI_TEST_SIZE as usize])?;
        for channel in [tx, rx] {
            self.set_length(channel, 0, MULTI_TEST_SIZE as u32)?;
            // A refusal is in the status, and in the log.
            let _refused = self.start(channel, 0);
        }
        let statuses = [self.finish(rx, 0)?, self.finish(tx, 0)?];
        for message in self.take_log() {
            report(&message);
        }
        let different = equal_up_to(
            MULTI_TEST_SIZE,
            |offset, bytes| self.read(tx, 0, offset, bytes),
            |offset, bytes| self.read(rx, 0, offset, bytes),
        )?;
        if let Some((index, ..)) = different {
            report(&format!("buffers not equal, first index = {}", index / 4));
        }
        report("Internal test complete");
        Ok(different.is_none() && statuses == [ProxyStatus::NoError; 2])
    }
}

impl<M: DmaMemory + Clone + 'static, C> fmt::Debug for MultiProxy<M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.channels.iter().map(|channel| &*channel.name).collect();
        f.debug_struct("MultiProxy").field("channels", &names).finish_non_exhaustive()
    }
}
