//! One transfer: everything is read into the device's buffer, then everything is written.

use portcullis_arch::testdev::{ResultCode, TransferResult};
use portcullis_arch::{Attributes, Iova, StreamId, SubstreamId};
use portcullis_bus::{BusError, DmaError, DmaFault, Initiator, StallState, StallTag};
use serde::{Deserialize, Serialize};

use super::{Cause, Outcome, STEP_BYTES, TestDev};

/// What one access moves at most.
const PIECE_BYTES: usize = 64 * 1024;
/// Accesses one step makes at most: a destination that is bad everywhere costs one for each page.
const STEP_ACCESSES: usize = 64;
/// A request never crosses this boundary.
const PAGE: u64 = 4096;

/// A transfer under way: registers as they were when it began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Transfer {
    pub(super) cause: Cause,
    source: u64,
    destination: u64,
    size: u64,
    substream: Option<u32>,
    attrs: u32,
    /// Fails before the first access.
    refused: Option<u8>,
    /// What has been read.
    buffer: Vec<u8>,
    /// Bytes written, or passed over because their page is bad.
    written: u64,
    /// Bytes that have arrived.
    arrived: u64,
    parked: Option<StallTag>,
    /// RESULT, and the bytes that had arrived when it was decided.
    failed: Option<(u32, u32)>,
}

impl Transfer {
    pub(super) fn is_parked(&self) -> bool {
        self.parked.is_some()
    }

    /// True if the parts fit together, for a device with room for `max_bytes`.
    pub(super) fn is_possible(&self, max_bytes: u64) -> bool {
        let have = self.buffer.len() as u64;
        let room = self.refused.is_some() || self.size <= max_bytes;
        room && have <= self.size && self.arrived <= self.written && self.written <= have
    }

    fn reading(&self) -> bool {
        (self.buffer.len() as u64) < self.size
    }

    fn over(&self) -> bool {
        !self.reading() && self.written >= self.size
    }

    /// Address of the next byte of the side at work.
    fn at(&self) -> u64 {
        if self.reading() {
            self.source.wrapping_add(self.buffer.len() as u64)
        } else {
            self.destination.wrapping_add(self.written)
        }
    }

    /// Bytes from the next one to the 4 KiB boundary or the end of the transfer.
    fn to_boundary(&self) -> u64 {
        let done = if self.reading() { self.buffer.len() as u64 } else { self.written };
        (PAGE - self.at() % PAGE).min(self.size - done.min(self.size))
    }

    fn note(&mut self, code: ResultCode) {
        let done = u32::try_from(self.arrived).unwrap_or(u32::MAX);
        let result = TransferResult::new().with_code(code).with_destination(!self.reading());
        self.failed.get_or_insert((result.into_bits(), done));
    }

    fn outcome(&self) -> Outcome {
        let (result, done) = self.failed.unwrap_or_default();
        Outcome { result: TransferResult::from_bits(result), done }
    }

    /// The next bytes were ended without an error: zeros are read, or a write is ignored.
    fn pass_over(&mut self) {
        let n = self.to_boundary();
        if self.reading() {
            self.buffer.resize(self.buffer.len().saturating_add(n as usize), 0);
        } else {
            self.written += n;
            self.arrived += n;
        }
    }
}

impl TestDev {
    /// The transfer that the registers describe now.
    pub(super) fn begin(&self, cause: Cause) -> Transfer {
        let from = self.initiator();
        let refused = if !self.bus_master {
            Some(ResultCode::BusMasterOff)
        } else if self.values.size > self.config.max_bytes as u64 {
            Some(ResultCode::TooLarge)
        } else {
            None
        };
        Transfer {
            cause,
            source: self.values.srcaddr,
            destination: self.values.dstaddr,
            size: self.values.size,
            substream: from.substream.map(SubstreamId::get),
            attrs: from.attrs.bits(),
            refused: refused.map(|r| r as u8),
            buffer: Vec::new(),
            written: 0,
            arrived: 0,
            parked: None,
            failed: None,
        }
    }

    /// Works on a transfer, and keeps it if there is more to do.
    pub(super) fn advance(&mut self, mut t: Transfer, now: u64) {
        if let Some(tag) = t.parked {
            match self.port.stall_state(tag) {
                StallState::Waiting => {
                    self.transfer = Some(t);
                    return;
                }
                StallState::Retry => t.parked = None,
                StallState::Terminated { abort: false } => {
                    t.parked = None;
                    t.pass_over();
                }
                StallState::Terminated { abort: true } => {
                    t.parked = None;
                    if self.fault(&mut t, DmaFault::Terminated) {
                        return self.finish(t.cause, t.outcome(), now);
                    }
                }
            }
        }
        if let Some(code) = t.refused {
            t.note(if code == ResultCode::TooLarge as u8 {
                ResultCode::TooLarge
            } else {
                ResultCode::BusMasterOff
            });
            return self.finish(t.cause, t.outcome(), now);
        }
        let mut bytes = STEP_BYTES;
        let mut accesses = STEP_ACCESSES;
        while !t.over() && t.parked.is_none() {
            if bytes == 0 || accesses == 0 {
                self.transfer = Some(t);
                return;
            }
            accesses -= 1;
            let (n, result) = self.access(&mut t, bytes.min(PIECE_BYTES));
            bytes = bytes.saturating_sub(n);
            if let Err(e) = result
                && self.fault(&mut t, e.fault)
            {
                return self.finish(t.cause, t.outcome(), now);
            }
        }
        if t.parked.is_some() {
            self.transfer = Some(t);
        } else {
            self.finish(t.cause, t.outcome(), now);
        }
    }

    /// Reads or writes the next bytes, at most `limit`. Returns how many it asked for.
    fn access(&mut self, t: &mut Transfer, limit: usize) -> (usize, Result<(), DmaError>) {
        let attrs = Attributes::from_bits(t.attrs);
        let reading = t.reading();
        let from = Initiator {
            stream: StreamId(self.config.stream.get()),
            substream: t.substream.map(SubstreamId),
            attrs: if reading { attrs } else { attrs.with_instruction(false) },
        };
        let at = Iova(t.at());
        if reading {
            let before = t.buffer.len();
            let n = usize::try_from(t.size - before as u64).unwrap_or(usize::MAX).min(limit);
            t.buffer.resize(before + n, 0);
            let result = self.port.read(from, at, t.buffer.get_mut(before..).unwrap_or(&mut []));
            let done = result.err().map_or(n, |e| e.done.min(n));
            t.buffer.truncate(before + done);
            return (n, result);
        }
        let rest = t.buffer.get(t.written as usize..).unwrap_or(&[]);
        let data = rest.get(..limit).unwrap_or(rest);
        let n = data.len();
        let result = self.port.write(from, at, data);
        let done = result.err().map_or(n, |e| e.done.min(n)) as u64;
        t.written += done;
        t.arrived += done;
        (n, result)
    }

    /// The next byte cannot be had. True if the transfer is over.
    fn fault(&self, t: &mut Transfer, fault: DmaFault) -> bool {
        match fault {
            DmaFault::Stalled(tag) => {
                t.parked = Some(tag);
                return false;
            }
            DmaFault::Terminated => t.note(ResultCode::Terminated),
            DmaFault::Bus(BusError::Decode) => t.note(ResultCode::Decode),
            DmaFault::Bus(BusError::Slave) => t.note(ResultCode::Slave),
        }
        if t.reading() || self.config.stop_at_fault {
            return true;
        }
        t.written += t.to_boundary();
        t.over()
    }
}
