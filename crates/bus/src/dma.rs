//! DMA as an engine issues it: who asks, through which port, and what can come back.

use portcullis_arch::{Attributes, Iova, Pa, StreamId, SubstreamId};
use thiserror::Error;

use crate::memory::BusError;

/// Who issues a transaction, and the side-band signals it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Initiator {
    /// The stream the transaction belongs to.
    pub stream: StreamId,
    /// The substream (PASID), where the master has them.
    pub substream: Option<SubstreamId>,
    /// Memory type, shareability, hints, security, privilege and instruction/data as the master drives them.
    pub attrs: Attributes,
}

impl Initiator {
    /// An initiator with default attributes (AxPROT = 0b010: unprivileged, non-secure, data).
    pub const fn new(stream: StreamId) -> Self {
        Self { stream, substream: None, attrs: Attributes::DEVICE_DEFAULT }
    }
    /// The same with other attributes.
    pub const fn with_attrs(self, attrs: Attributes) -> Self {
        Self { attrs, ..self }
    }
}

/// Names one stalled transaction, from the stall until it is retried or terminated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct StallTag(pub u64);

/// What became of a stalled transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StallState {
    /// Software has not decided yet: ask again later.
    Waiting,
    /// Issue the rest of the transaction again. The tag is used up.
    Retry,
    /// The transaction is over. The tag is used up.
    Terminated {
        /// True: the master gets an error response. False: a read returns zeros and a write is ignored.
        abort: bool,
    },
}

/// Why a transaction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, serde::Serialize, serde::Deserialize)]
pub enum DmaFault {
    /// The IOMMU terminated it with an abort (SLVERR at the master).
    #[error("terminated by the IOMMU with an abort")]
    Terminated,
    /// Memory refused it.
    #[error("{0}")]
    Bus(#[from] BusError),
    /// It waits in the IOMMU for software; ask [`DmaPort::stall_state`].
    #[error("stalled by the IOMMU")]
    Stalled(StallTag),
}

/// A transaction that did not complete: the first `done` bytes were transferred, the rest were not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, serde::Serialize, serde::Deserialize)]
#[error("{fault} after {done} bytes")]
pub struct DmaError {
    /// Bytes transferred before the fault.
    pub done: usize,
    /// What happened then.
    pub fault: DmaFault,
}

/// Which side of a copy failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum CopySide {
    /// Reading.
    Source,
    /// Writing.
    Destination,
}

/// A copy that did not complete: `error.done` bytes arrived at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
#[error("{side:?}: {error}")]
pub struct CopyError {
    /// The side that failed.
    pub side: CopySide,
    /// How it failed.
    pub error: DmaError,
}

/// The place where an engine plugs in: the TBU in front of it, or plain memory where there is no IOMMU.
///
/// A transfer may span any number of pages; it is carried out in address order. It takes `&mut self` because
/// a port belongs to one device: that is what lets a hit take no lock.
pub trait DmaPort: Send {
    /// Reads `buf.len()` bytes at `addr`.
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError>;

    /// Writes `buf` at `addr`.
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError>;

    /// Moves `len` bytes, reading and writing piece by piece in address order.
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        let mut buf = [0u8; 4096];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(buf.len());
            let read = self.read(src.0, src.1.wrapping_add(at as u64), &mut buf[..n]);
            let have = read.err().map_or(n, |e| e.done);
            self.write(dst.0, dst.1.wrapping_add(at as u64), &buf[..have]).map_err(|e| CopyError {
                side: CopySide::Destination,
                error: DmaError { done: at + e.done, fault: e.fault },
            })?;
            if let Err(e) = read {
                let error = DmaError { done: at + e.done, fault: e.fault };
                return Err(CopyError { side: CopySide::Source, error });
            }
            at += n;
        }
        Ok(())
    }

    /// What became of the stalled transaction `tag`. A tag that was never given out, or is used up, is
    /// [`StallState::Terminated`] with an abort.
    fn stall_state(&mut self, tag: StallTag) -> StallState;
}

impl<P: DmaPort + ?Sized> DmaPort for Box<P> {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        (**self).read(from, addr, buf)
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        (**self).write(from, addr, buf)
    }
    fn copy(&mut self, src: (Initiator, Iova), dst: (Initiator, Iova), len: usize) -> Result<(), CopyError> {
        (**self).copy(src, dst, len)
    }
    fn stall_state(&mut self, tag: StallTag) -> StallState {
        (**self).stall_state(tag)
    }
}

/// A port without an IOMMU: the address is the physical address.
pub struct DirectPort<M> {
    memory: M,
}

impl<M: crate::Memory> DirectPort<M> {
    /// A port straight onto `memory`.
    pub fn new(memory: M) -> Self {
        Self { memory }
    }

    /// Transfers `len` bytes at `addr`: in one piece if memory takes it, or else up to the 4 KiB boundary (which no AXI burst
    /// crosses) where it is refused.
    fn transfer(
        &mut self,
        addr: Iova,
        len: usize,
        mut access: impl FnMut(&M, Pa, std::ops::Range<usize>) -> Result<(), BusError>,
    ) -> Result<(), DmaError> {
        let mut done = 0;
        let mut end = len;
        while done < len {
            let pa = Pa(addr.get().wrapping_add(done as u64));
            match access(&self.memory, pa, done..end) {
                Ok(()) => (done, end) = (end, len),
                Err(e) => {
                    let boundary = done + 4096 - (pa.get() & 4095) as usize;
                    if end <= boundary {
                        return Err(DmaError { done, fault: e.into() });
                    }
                    end = boundary;
                }
            }
        }
        Ok(())
    }
}

impl<M: crate::Memory> DmaPort for DirectPort<M> {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.transfer(addr, buf.len(), |memory, pa, range| memory.read(pa, from.attrs, &mut buf[range]))
    }
    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.transfer(addr, buf.len(), |memory, pa, range| memory.write(pa, from.attrs, &buf[range]))
    }
    fn stall_state(&mut self, _: StallTag) -> StallState {
        StallState::Terminated { abort: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Memory, SystemMemory};

    #[test]
    fn what_lies_before_the_end_of_memory_is_transferred() {
        let memory = SystemMemory::new(&[(0x1000, 0x3000)]).unwrap();
        let from = Initiator::new(StreamId(0));
        let mut port = DirectPort::new(memory.clone());
        let refused = |done| Err(DmaError { done, fault: BusError::Decode.into() });
        assert_eq!(port.write(from, Iova(0x1ff0), &[7; 0x3000]), refused(0x2010));
        let mut last = [0; 1];
        memory.read(Pa(0x3fff), from.attrs, &mut last).unwrap();
        assert_eq!(last, [7]);
        assert_eq!(port.read(from, Iova(0xfff), &mut [0; 2]), refused(0));
        assert_eq!(port.read(from, Iova(u64::MAX), &mut [0; 2]), refused(0));
        let copied = port.copy((from, Iova(0x1000)), (from, Iova(0x3f80)), 0x100);
        assert_eq!(copied.map_err(|e| (e.side, e.error.done)), Err((CopySide::Destination, 0x80)));
    }
}
