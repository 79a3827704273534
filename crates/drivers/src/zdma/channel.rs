//! A ZDMA channel behind the interface of all DMA engines.

use alloc::collections::BTreeMap;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_hal::{Clock, DmaMemory, Mmio};
use spin::Mutex;

use super::list::{DESCRIPTOR_BITS, MAX_CHUNK, split};
use super::{BusErrorKind, POOL_DESCRIPTORS, Position, Progress, Segment, Zdma, ZdmaError};
use crate::dmaengine::{
    BusAccess, BusResponse, Callback, Caps, ChannelError, Completion, Cookie, Descriptor, DmaChannel,
    Notifier, Record, ResidueGranularity, State, Status, TransferError, Work, deliver,
};

/// How long a channel may take to stop, in microseconds: descriptors hold up to 1 GiB.
const STOP_TIMEOUT_US: u64 = 1_000_000;

/// [`Zdma`] as a [`DmaChannel`]. The driver beneath can be used directly too: completions of transactions that were
/// submitted there stay there. Terminating ends them all.
pub struct ZdmaChannel<R, M, C> {
    name: String,
    zdma: Arc<Zdma<R, M>>,
    clock: C,
    state: Mutex<Outstanding>,
}

#[derive(Debug, Default)]
struct Outstanding {
    callbacks: BTreeMap<Cookie, Option<Notifier>>,
    record: Record,
}

impl<R: Mmio, M: DmaMemory, C: Clock> ZdmaChannel<R, M, C> {
    /// Puts `zdma` behind the interface. `name` is for messages, `clock` bounds [`terminate`](DmaChannel::terminate).
    pub fn new(name: &str, zdma: Arc<Zdma<R, M>>, clock: C) -> Self {
        Self { name: name.to_string(), zdma, clock, state: Mutex::new(Outstanding::default()) }
    }

    /// The driver beneath.
    pub fn zdma(&self) -> &Arc<Zdma<R, M>> {
        &self.zdma
    }

    /// Takes over what has ended in the driver and tells the clients. Gives how many.
    fn collect(&self) -> usize {
        let mut news = Vec::new();
        {
            let mut state = self.state.lock();
            let Outstanding { callbacks, record } = &mut *state;
            callbacks.retain(|&cookie, notifier| {
                let Some(ended) = self.zdma.take_completion(cookie) else { return true };
                let completion = convert(&ended);
                record.end(completion);
                news.push((notifier.take(), completion));
                false
            });
        }
        let ended = news.len();
        deliver(news);
        ended
    }
}

fn check(to: &[Segment], from: &[Segment]) -> Result<(), ChannelError> {
    let (chunks, _) = split(to, from, DESCRIPTOR_BITS)?;
    if chunks.len() > POOL_DESCRIPTORS {
        return Err(ChannelError::TooManySegments { needed: chunks.len(), max: POOL_DESCRIPTORS });
    }
    Ok(())
}

fn convert(ended: &super::Completion) -> Completion {
    let super::Completion { cookie, result, transferred, residue } = *ended;
    Completion { cookie, result: result.map_err(Into::into), transferred, residue, ongoing: false }
}

impl From<super::TransferError> for TransferError {
    fn from(error: super::TransferError) -> Self {
        match error {
            super::TransferError::Terminated => Self::Terminated,
            super::TransferError::Incomplete { .. } => Self::Incomplete,
            super::TransferError::Bus { kind, position: Position { source, destination } } => {
                let (access, at) = match kind {
                    BusErrorKind::SourceDescriptor => (BusAccess::Descriptor, source),
                    BusErrorKind::DestinationDescriptor => (BusAccess::Descriptor, destination),
                    BusErrorKind::SourceRead => (BusAccess::Read, source),
                    BusErrorKind::DestinationWrite => (BusAccess::Write, destination),
                };
                Self::Bus { access, response: BusResponse::Unknown, at }
            }
        }
    }
}

impl<R: Mmio, M: DmaMemory, C: Clock> DmaChannel for ZdmaChannel<R, M, C> {
    fn name(&self) -> &str {
        &self.name
    }

    fn caps(&self) -> Caps {
        Caps {
            memcpy: true,
            slave: false,
            cyclic: false,
            direction: None,
            address_bits: DESCRIPTOR_BITS,
            align: 1,
            max_segment: MAX_CHUNK,
            max_segments: POOL_DESCRIPTORS,
            pause: false,
            residue: ResidueGranularity::Burst,
        }
    }

    fn prep_memcpy_sg(&self, to: &[Segment], from: &[Segment]) -> Result<Descriptor, ChannelError> {
        check(to, from)?;
        Ok(Descriptor::new(Work::Memcpy { to: to.to_vec(), from: from.to_vec() }))
    }

    fn submit(&self, descriptor: Descriptor, callback: Option<Callback>) -> Result<Cookie, ChannelError> {
        let Work::Memcpy { to, from } = descriptor.work() else {
            return Err(ChannelError::Unsupported { what: "transfers with a stream" });
        };
        // Held across the submission, so that nobody collects before the callback is known.
        let mut state = self.state.lock();
        let cookie = self.zdma.submit_sg(to, from).map_err(|error| match error {
            ZdmaError::PoolEmpty { needed, free } => ChannelError::NoDescriptors { needed, free },
            error => error.into(),
        })?;
        state.callbacks.insert(cookie, callback.map(Notifier::new));
        Ok(cookie)
    }

    fn issue_pending(&self) {
        self.zdma.issue_pending();
    }

    fn status(&self, cookie: Cookie) -> Status {
        let state = self.state.lock();
        if !state.callbacks.contains_key(&cookie) {
            return state.record.status(cookie);
        }
        let residue = self.zdma.residue(cookie).unwrap_or_default();
        match self.zdma.progress(cookie) {
            Progress::Queued => Status { state: State::Queued, transferred: 0, residue },
            Progress::Running { residue: left } => Status {
                state: State::Running,
                transferred: self.zdma.requested(cookie).unwrap_or_default().saturating_sub(left),
                residue: left,
            },
            Progress::Complete(ended) => convert(&ended).into(),
            Progress::Unknown => Status::UNKNOWN,
        }
    }

    fn terminate(&self) -> Result<usize, ChannelError> {
        let ended = self.zdma.terminate(&self.clock, STOP_TIMEOUT_US);
        self.collect();
        Ok(ended?)
    }

    fn handle_irq(&self) -> bool {
        let ours = self.zdma.handle_irq().is_some();
        // Somebody may have called the driver's own handler.
        self.collect() > 0 || ours
    }
}

impl<R, M, C> fmt::Debug for ZdmaChannel<R, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZdmaChannel").field("name", &self.name).finish_non_exhaustive()
    }
}
