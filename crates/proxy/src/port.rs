//! One channel with its memory: what both shapes of the proxy share.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_drivers::dmaengine::{
    Callback, Capability, ChannelError, ChannelHandle, ChannelRequest, Completion, Cookie, Direction,
    Registry, Segment,
};
use portcullis_hal::{Clock, DmaMemory, poll};
use portcullis_iommu::dma::{Coherent, DmaDevice};
use spin::Mutex;

use crate::ProxyError;

/// The channel that sends, in `dma-names` and in `/dev`.
pub const TX_NAME: &str = "dma_proxy_tx";
/// The channel that receives.
pub const RX_NAME: &str = "dma_proxy_rx";
/// How long a transfer may take.
pub const TIMEOUT_MS: u64 = 3000;

/// One entry of the proxy's `dmas` and `dma-names`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dma<'a> {
    /// Its name.
    pub name: &'a str,
    /// The engine, as the [`Registry`] knows it.
    pub provider: &'a str,
    /// The engine's channel. AXI DMA: 0 = MM2S, 1 = S2MM.
    pub cell: u32,
}

impl Dma<'_> {
    /// Requests the channel for a client.
    pub(crate) fn request(&self, registry: &Registry, client: &str) -> Result<ChannelHandle, ProxyError> {
        let request = ChannelRequest::Cell { provider: self.provider, cell: self.cell };
        let refused = |error| ProxyError::Request { name: self.name.to_string(), error: Box::new(error) };
        registry.request(request, client).map_err(refused)
    }
}

/// Which of the two channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Memory to stream.
    Tx,
    /// Stream to memory.
    Rx,
}

impl Side {
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Tx => Direction::MemToDev,
            Self::Rx => Direction::DevToMem,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tx => "tx",
            Self::Rx => "rx",
        })
    }
}

/// How the last transfer of a buffer went (`enum proxy_status`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ProxyStatus {
    /// All is well.
    NoError = 0,
    /// Under way.
    Busy = 1,
    /// It took more than [`TIMEOUT_MS`].
    Timeout = 2,
    /// The engine refused it or failed.
    Error = 3,
}

impl ProxyStatus {
    /// From the word in shared memory, where a user may have written anything.
    pub fn from_word(word: u32) -> Self {
        let all = [Self::NoError, Self::Busy, Self::Timeout];
        all.into_iter().find(|status| *status as u32 == word).unwrap_or(Self::Error)
    }
}

/// A transfer on its way. It keeps its end itself: a channel remembers its last transactions only, and a user may ask
/// after any number of them.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    cookie: Cookie,
    end: Arc<Mutex<Option<Completion>>>,
}

impl Flight {
    /// True if nothing more will happen to it.
    pub fn is_over(&self) -> bool {
        self.end.lock().is_some()
    }
}

/// A channel and the memory that it works on.
pub(crate) struct Port<M: DmaMemory + Clone + 'static> {
    channel: ChannelHandle,
    direction: Direction,
    /// Gone only while this is dropped.
    memory: Option<Coherent<M>>,
    iova: Iova,
}

impl<M: DmaMemory + Clone + 'static> Port<M> {
    /// Allocates `len` bytes for a channel that goes in `direction`.
    pub fn new(
        channel: ChannelHandle,
        direction: Direction,
        device: &DmaDevice<M>,
        len: u64,
    ) -> Result<Self, ProxyError> {
        if !channel.caps().has(Capability::Slave(direction)) {
            let what = if direction == Direction::MemToDev { "send" } else { "receive" };
            return Err(ProxyError::WrongChannel { channel: channel.name().to_string(), what });
        }
        let memory = device.alloc_coherent(len)?;
        let iova = memory.iova();
        Ok(Self { channel, direction, memory: Some(memory), iova })
    }

    pub fn name(&self) -> &str {
        self.channel.name()
    }
    pub fn direction(&self) -> Direction {
        self.direction
    }
    /// Where the engine finds the memory.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Copies bytes out of the memory; nothing outside of it.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ProxyError> {
        match &self.memory {
            Some(memory) => Ok(memory.read(offset, bytes)?),
            None => Ok(()),
        }
    }
    /// Copies bytes into the memory; nothing outside of it.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ProxyError> {
        match &self.memory {
            Some(memory) => Ok(memory.write(offset, bytes)?),
            None => Ok(()),
        }
    }
    pub fn fill(&self, offset: u64, len: u64, value: u8) -> Result<(), ProxyError> {
        match &self.memory {
            Some(memory) => Ok(memory.fill(offset, len, value)?),
            None => Ok(()),
        }
    }
    /// A word of the memory's control part.
    pub fn word(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        // Inside of the memory, so it cannot fail.
        let _inside = self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    pub fn set_word(&self, offset: u64, word: u32) {
        let _inside = self.write(offset, &word.to_le_bytes());
    }

    /// Starts a transfer of a part of the memory.
    pub fn start(&self, offset: u64, len: u64) -> Result<Flight, ChannelError> {
        let segment = Segment { address: self.iova.wrapping_add(offset), len };
        let descriptor = self.channel.prep_slave_sg(&[segment], self.direction)?;
        let end = Arc::new(Mutex::new(None));
        let told = end.clone();
        let callback: Callback = Box::new(move |completion| *told.lock() = Some(*completion));
        let cookie = self.channel.submit(descriptor, Some(callback))?;
        self.channel.issue_pending();
        Ok(Flight { cookie, end })
    }

    /// Waits for a transfer. Time first, then the engine's word, as the original does it. Gives what to log, too.
    pub fn finish(&self, flight: &Flight, clock: &impl Clock) -> (ProxyStatus, Option<String>) {
        let over = || u64::from(flight.is_over());
        if poll(clock, "the end of a transfer", TIMEOUT_MS * 1000, over, |over| over == 1).is_err() {
            let mut message = String::from("DMA timed out");
            if let Err(error) = self.channel.terminate() {
                message = format!("{message}, and {} does not stop: {error}", self.name());
            }
            return (ProxyStatus::Timeout, Some(message));
        }
        let end = *flight.end.lock();
        match end.map(|completion| completion.result) {
            Some(Err(error)) => {
                let message = format!("DMA returned completion callback status of: error ({error})");
                (ProxyStatus::Error, Some(message))
            }
            // The wait is over, so it has ended.
            Some(Ok(())) | None => (ProxyStatus::NoError, None),
        }
    }

    /// Sets the status of a transfer that [`finish`](Self::finish) waited for, and makes room for the next. Somebody
    /// else who waited may have done so already, and the next may run.
    pub fn settle(&self, place: &Mutex<Option<Flight>>, ended: &Flight, at: u64, status: ProxyStatus) {
        let mut now = place.lock();
        if now.as_ref().is_some_and(|now| now.cookie == ended.cookie) {
            self.set_word(at, status as u32);
            *now = None;
        }
    }
}

impl<M: DmaMemory + Clone + 'static> Drop for Port<M> {
    fn drop(&mut self) {
        if self.channel.terminate().is_err() {
            // The engine may still use it. The channel's registry keeps it, and the reason.
            self.channel.keep(self.memory.take());
        }
    }
}
