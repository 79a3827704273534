//! Address Translation Services: a device that asks for translations and keeps them itself.
//!
//! Two directions. The device holds an [`AtsPort`]: it asks for translations, sends accesses that are already
//! translated, and asks for pages (PRI). The SMMU holds the device's [`AtsDevice`]: it takes translations away again
//! and answers page requests. Shapes follow the PCI Express Base Specification, chapter 10 (Address Translation
//! Services), and the Arm SMMUv3 architecture, sections 3.9 and 8.
//!
//! Start with [`AtsPort::translation_request`]; `portcullis_engines::atc` is the device's half for any engine.

use portcullis_arch::{Iova, SubstreamId};

use crate::dma::{DmaError, DmaPort, Initiator};

/// The answer to a translation request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtsReply {
    /// A translation completion with data.
    Granted(AtsTranslation),
    /// Unsupported Request (UR): ATS is not enabled for this stream.
    Unsupported,
    /// Completer Abort (CA): the SMMU could not translate (a configuration error or an external abort).
    Aborted,
}

/// One block of translated addresses and what the device may do with it. With neither `read` nor `write` there is no
/// access, and `addr` says nothing: the device should ask for the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct AtsTranslation {
    /// The first byte of the block, aligned to its size: a physical address, or an intermediate physical address
    /// where translation is split between ATS and the SMMU (split-stage ATS).
    pub addr: u64,
    /// The size of the block: 2^`size_log2` bytes, at least 12 on the wire.
    pub size_log2: u8,
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
    /// The device may fetch instructions (only with a substream).
    pub execute: bool,
    /// The translation was made for a privileged request (only with a substream).
    pub privileged: bool,
    /// The translation holds for every substream of the stream.
    pub global: bool,
}

impl AtsTranslation {
    /// False if the device has no access at all.
    pub const fn has_access(&self) -> bool {
        self.read || self.write
    }
}

/// A page request (PRI): the device wants software to make a page accessible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRequest {
    /// The stream and substream that want the page.
    pub from: Initiator,
    /// The page's address (the low 12 bits say nothing).
    pub addr: Iova,
    /// Read access is wanted.
    pub read: bool,
    /// Write access is wanted.
    pub write: bool,
    /// Instruction fetch is wanted.
    pub execute: bool,
    /// Privileged access is wanted.
    pub privileged: bool,
    /// The page request group, 0..=511.
    pub group: u16,
    /// This is the last request of its group: software answers the group now.
    pub last: bool,
}

impl PageRequest {
    /// The largest group number (9 bits).
    pub const MAX_GROUP: u16 = 0x1ff;

    /// The stop marker of `from.substream`: no request of that substream is on its way behind it. It gets no answer.
    pub const fn stop_marker(from: Initiator) -> Self {
        Self {
            from,
            addr: Iova(0),
            read: false,
            write: false,
            execute: false,
            privileged: false,
            group: 0,
            last: true,
        }
    }

    /// True for a stop marker: the last of its group, no access wanted, and a substream that stops.
    pub const fn is_stop_marker(&self) -> bool {
        self.last && !self.read && !self.write && self.from.substream.is_some()
    }
}

/// How software answers a page request group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageResponse {
    /// All pages of the group are there: ask for the translations again.
    Success,
    /// At least one page cannot be had. The device may go on to use page requests.
    Invalid,
    /// Something is broken: the device must stop using page requests until software enables them again.
    Failure,
}

/// The answer to one page request group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageGroupResponse {
    /// The substream, where the request had one and the answer names it (PRG response PASID required).
    pub substream: Option<SubstreamId>,
    /// The group that is answered.
    pub group: u16,
    /// The answer.
    pub code: PageResponse,
}

/// Which translations a device must forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AtcInvalidation {
    /// The substream whose translations go; `None`: those made without a substream.
    pub substream: Option<SubstreamId>,
    /// The translations of every substream go, global ones included. Says nothing if `substream` is `None`.
    pub global: bool,
    /// The first byte of the range, aligned to its size.
    pub addr: u64,
    /// The size of the range: 2^`size_log2` bytes; 64 is the whole address space.
    pub size_log2: u8,
}

impl AtcInvalidation {
    /// Everything of one substream, or everything that was translated without one.
    pub const fn all_of(substream: Option<SubstreamId>) -> Self {
        Self { substream, global: false, addr: 0, size_log2: 64 }
    }
}

/// Names one invalidation of one device, until its completion has been asked for and is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct AtcTicket(pub u64);

/// How far an invalidation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AtcCompletion {
    /// No access of the device uses the old translations any more.
    Done,
    /// One still may: ask again later.
    Pending,
    /// The device does not answer.
    TimedOut,
}

/// The port of a device that does ATS. Untranslated accesses go through [`DmaPort`].
pub trait AtsPort: DmaPort {
    /// Asks for the translation of `addr`. With `no_write` the device promises not to write, so that the page need not
    /// be marked dirty.
    fn translation_request(&mut self, from: Initiator, addr: Iova, no_write: bool) -> AtsReply;
    /// Reads at a translated address (within the block that was granted).
    fn read_translated(&mut self, from: Initiator, addr: u64, buf: &mut [u8]) -> Result<(), DmaError>;
    /// Writes at a translated address (within the block that was granted).
    fn write_translated(&mut self, from: Initiator, addr: u64, buf: &[u8]) -> Result<(), DmaError>;
    /// Asks for a page. The answer comes later, through [`AtsDevice::page_response`]; it may come before this returns.
    fn page_request(&mut self, request: PageRequest);
}

impl<P: AtsPort + ?Sized> AtsPort for Box<P> {
    fn translation_request(&mut self, from: Initiator, addr: Iova, no_write: bool) -> AtsReply {
        (**self).translation_request(from, addr, no_write)
    }
    fn read_translated(&mut self, from: Initiator, addr: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        (**self).read_translated(from, addr, buf)
    }
    fn write_translated(&mut self, from: Initiator, addr: u64, buf: &[u8]) -> Result<(), DmaError> {
        (**self).write_translated(from, addr, buf)
    }
    fn page_request(&mut self, request: PageRequest) {
        (**self).page_request(request);
    }
}

/// The translation cache of a device, as the SMMU sees it.
///
/// The SMMU calls these, possibly with its own lock held: an implementation must not call back into the SMMU and must
/// not wait for a DMA in progress (it answers [`AtcCompletion::Pending`] instead).
pub trait AtsDevice: Send + Sync {
    /// Takes translations away. New accesses do not use them from here on.
    fn invalidate(&self, what: AtcInvalidation) -> AtcTicket;
    /// How far the invalidation `ticket` has come. A ticket that was never given out is `Done`.
    fn completion(&self, ticket: AtcTicket) -> AtcCompletion;
    /// Answers a page request group. A group that is not outstanding is ignored.
    fn page_response(&self, response: PageGroupResponse);
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_arch::StreamId;

    #[test]
    fn a_stop_marker_needs_a_substream_and_no_access() {
        let from = Initiator::new(StreamId(1));
        let with = Initiator { substream: Some(SubstreamId(3)), ..from };
        assert!(PageRequest::stop_marker(with).is_stop_marker());
        assert!(!PageRequest::stop_marker(from).is_stop_marker());
        assert!(!PageRequest { read: true, ..PageRequest::stop_marker(with) }.is_stop_marker());
    }
}
