//! The proxy with one buffer per channel and blocking transfers.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use portcullis_drivers::dmaengine::{ChannelHandle, Registry};
use portcullis_hal::{Clock, DmaMemory};
use portcullis_iommu::dma::DmaDevice;
use spin::Mutex;

use crate::port::{Flight, Port};
use crate::test::{equal_up_to, pattern};
use crate::{Dma, ProxyError, ProxyStatus, RX_NAME, Side, TX_NAME};

/// Bytes of a channel's buffer.
pub const TEST_SIZE: u64 = 3 * 1024 * 1024;
/// Where in the shared structure the status is.
const STATUS: u64 = TEST_SIZE;
/// Where the length is.
const LENGTH: u64 = TEST_SIZE + 4;
/// Bytes of the shared structure.
const INTERFACE_BYTES: u64 = TEST_SIZE + 8;

/// What a channel shares with its user, by mapping it (`struct dma_proxy_channel_interface`): a buffer of
/// [`TEST_SIZE`] bytes, the status of the last transfer, the length of the next one.
pub struct Interface<M: DmaMemory + Clone + 'static> {
    port: Port<M>,
    flight: Mutex<Option<Flight>>,
}

impl<M: DmaMemory + Clone + 'static> Interface<M> {
    fn new(port: Port<M>) -> Self {
        Self { port, flight: Mutex::new(None) }
    }

    fn check(offset: u64, len: u64) -> Result<(), ProxyError> {
        match offset.checked_add(len) {
            Some(end) if end <= TEST_SIZE => Ok(()),
            _ => Err(ProxyError::Length { len: offset.saturating_add(len), size: TEST_SIZE }),
        }
    }

    /// Copies bytes of the buffer out.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ProxyError> {
        Self::check(offset, bytes.len() as u64)?;
        self.port.read(offset, bytes)
    }
    /// Copies bytes into the buffer.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ProxyError> {
        Self::check(offset, bytes.len() as u64)?;
        self.port.write(offset, bytes)
    }
    /// Sets bytes of the buffer.
    pub fn fill(&self, offset: u64, len: u64, value: u8) -> Result<(), ProxyError> {
        Self::check(offset, len)?;
        self.port.fill(offset, len, value)
    }
    /// The length of the next transfer.
    pub fn length(&self) -> u32 {
        self.port.word(LENGTH)
    }
    /// Sets the length of the next transfer. Anything is possible here, as in shared memory; the transfer
    /// checks.
    pub fn set_length(&self, length: u32) {
        self.port.set_word(LENGTH, length);
    }
    /// How the last transfer went.
    pub fn status(&self) -> ProxyStatus {
        ProxyStatus::from_word(self.port.word(STATUS))
    }
    /// Where the engine finds the buffer.
    pub fn iova(&self) -> portcullis_arch::Iova {
        self.port.iova()
    }
    fn set_status(&self, status: ProxyStatus) {
        self.port.set_word(STATUS, status as u32);
    }
}

/// A loaded dma-proxy.
pub struct Proxy<M: DmaMemory + Clone + 'static, C> {
    tx: Interface<M>,
    rx: Interface<M>,
    clock: C,
    log: Mutex<Vec<String>>,
}

impl<M: DmaMemory + Clone + 'static, C: Clock> Proxy<M, C> {
    /// Requests the channels that `dmas` calls `dma_proxy_tx` and `dma_proxy_rx`. `device` is the proxy's own.
    pub fn probe(
        registry: &Registry,
        dmas: &[Dma<'_>],
        device: &DmaDevice<M>,
        clock: C,
    ) -> Result<Self, ProxyError> {
        let request = |name: &'static str| {
            let dma = dmas.iter().find(|dma| dma.name == name).ok_or(ProxyError::Missing { name })?;
            dma.request(registry, device.name())
        };
        Self::new(request(TX_NAME)?, request(RX_NAME)?, device, clock)
    }

    /// From two channels. `device` is the proxy's own.
    pub fn new(
        tx: ChannelHandle,
        rx: ChannelHandle,
        device: &DmaDevice<M>,
        clock: C,
    ) -> Result<Self, ProxyError> {
        let interface = |channel, side: Side| {
            Ok::<_, ProxyError>(Interface::new(Port::new(
                channel,
                side.direction(),
                device,
                INTERFACE_BYTES,
            )?))
        };
        let (tx, rx) = (interface(tx, Side::Tx)?, interface(rx, Side::Rx)?);
        Ok(Self { tx, rx, clock, log: Mutex::new(Vec::new()) })
    }

    /// What a channel shares with its user.
    pub fn interface(&self, side: Side) -> &Interface<M> {
        match side {
            Side::Tx => &self.tx,
            Side::Rx => &self.rx,
        }
    }

    /// The clock that transfers are timed by.
    pub fn clock(&self) -> &C {
        &self.clock
    }

    /// What the driver logged since the last call.
    pub fn take_log(&self) -> Vec<String> {
        core::mem::take(&mut *self.log.lock())
    }

    fn note(&self, side: Side, message: &str) {
        let mut log = self.log.lock();
        if log.len() < 1000 {
            log.push(format!("{}: {message}", self.interface(side).port.name()));
        }
    }

    /// Starts a transfer of the length in the shared structure. When it is refused, the status says so as well.
    pub fn start(&self, side: Side) -> Result<(), ProxyError> {
        let interface = self.interface(side);
        let mut flight = interface.flight.lock();
        if flight.is_some() {
            return Err(ProxyError::Busy);
        }
        interface.set_status(ProxyStatus::Busy);
        let len = u64::from(interface.length());
        let started = Interface::<M>::check(0, len)
            .map_err(|_| ProxyError::Length { len, size: TEST_SIZE })
            .and_then(|()| Ok(interface.port.start(0, len)?));
        match started {
            Ok(started) => *flight = Some(started),
            Err(error) => {
                drop(flight);
                interface.set_status(ProxyStatus::Error);
                self.note(side, &error.to_string());
                return Err(error);
            }
        }
        Ok(())
    }

    /// True if [`finish`](Self::finish) would not wait.
    pub fn is_done(&self, side: Side) -> bool {
        let interface = self.interface(side);
        interface.flight.lock().as_ref().is_none_or(Flight::is_over)
    }
    /// Waits for what [`start`](Self::start) started, and gives its status; of what was not started, too.
    pub fn finish(&self, side: Side) -> ProxyStatus {
        let interface = self.interface(side);
        // It stays in its place meanwhile: nobody starts another.
        let flight = interface.flight.lock().clone();
        let Some(flight) = flight else { return interface.status() };
        let (status, message) = interface.port.finish(&flight, &self.clock);
        interface.port.settle(&interface.flight, &flight, STATUS, status);
        if let Some(message) = message {
            self.note(side, &message);
        }
        status
    }

    /// What the user's `ioctl` does, with whatever command: a whole transfer.
    pub fn transfer(&self, side: Side) -> ProxyStatus {
        match self.start(side) {
            Ok(()) => self.finish(side),
            Err(ProxyError::Busy) => ProxyStatus::Busy,
            Err(_) => ProxyStatus::Error,
        }
    }

    /// The test that `internal_test=1` runs at load: [`TEST_SIZE`] bytes from tx to rx. Tells what the module logs, and
    /// whether all is well.
    pub fn internal_test(&self, mut report: impl FnMut(&str)) -> Result<bool, ProxyError> {
        report("Starting internal test");
        pattern(TEST_SIZE, 0, |offset, bytes| self.tx.write(offset, bytes))?;
        self.rx.fill(0, TEST_SIZE, 0)?;
        for side in [Side::Tx, Side::Rx] {
            self.interface(side).set_length(TEST_SIZE as u32);
            // A refusal is in the status, and in the log.
            let _refused = self.start(side);
        }
        let statuses = [Side::Rx, Side::Tx].map(|side| self.finish(side));
        for message in self.take_log() {
            report(&message);
        }
        let different = equal_up_to(
            TEST_SIZE,
            |offset, bytes| self.tx.read(offset, bytes),
            |offset, bytes| self.rx.read(offset, bytes),
        )?;
        if let Some((index, ..)) = different {
            report(&format!("buffers not equal, first index = {index}"));
        }
        report("Internal test complete");
        Ok(different.is_none() && statuses == [ProxyStatus::NoError; 2])
    }
}

impl<M: DmaMemory + Clone + 'static, C> fmt::Debug for Proxy<M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tx, rx) = (self.tx.port.name(), self.rx.port.name());
        f.debug_struct("Proxy").field("tx", &tx).field("rx", &rx).finish_non_exhaustive()
    }
}

impl<M: DmaMemory + Clone + 'static> fmt::Debug for Interface<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interface").field("channel", &self.port.name()).finish_non_exhaustive()
    }
}
