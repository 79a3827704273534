//! The address translation cache (ATC) of a device: gives any engine ATS and page requests by wrapping its port.
//!
//! [`AtcPort`] is a [`DmaPort`] over an [`AtsPort`]: on a miss it asks the IOMMU for a translation, keeps it, and sends
//! the access translated. [`AtcShared`] is what the IOMMU sees of it ([`AtsDevice`](portcullis_bus::AtsDevice)). Rules
//! from the PCI Express Base Specification, chapter 10.
//!
//! ```
//! use portcullis_bus::{AtsPort, DmaPort};
//! use portcullis_engines::atc::{AtcConfig, AtcPort, AtcShared};
//!
//! fn with_ats<P: AtsPort + 'static>(tbu: P) -> (Box<dyn DmaPort>, std::sync::Arc<AtcShared>) {
//!     let atc = AtcShared::new(AtcConfig::default());
//!     (Box::new(AtcPort::new(atc.clone(), tbu)), atc) // the port for the engine, the ATC for the IOMMU
//! }
//! ```
//!
//! | Feature | State |
//! |---|---|
//! | Translation requests with No Write, Privileged and Execute; block sizes from 4 KiB to 2^63 bytes | covered |
//! | Cache per stream and substream, global translations, oldest out when full | covered; a data request's translation is not used for an instruction or privileged request |
//! | A cached translation that does not allow the access | asks again before it asks for the page |
//! | UR, CA, or a size that no completion can carry | the access is terminated |
//! | Invalidation of a range, of a substream, of all | covered; new accesses miss at once, the completion waits for accesses that use the old translation |
//! | An invalidation while a translation is being asked for | the answer serves that one access and is not kept |
//! | Completions | in order: an access that keeps one invalidation pending keeps later ones pending too |
//! | Page requests | covered: one page and one group per stalled access, bounded, group numbers reused only after their answer |
//! | Response Success / Invalid / Failure | retry / terminate / terminate everything that waits, no more requests until PRI is enabled again |
//! | Stop marker | [`AtcPort::stop_substream`] |
//! | Device that does not answer | [`AtcShared::hang`] |
//! | Groups of more than one request; prefetching of translations; Smallest Translation Unit above 4 KiB | not covered |
//! | Access without a substream | unprivileged data, as on PCIe; other attributes go through |
//! | Which function | one `AtcShared` is one function: an invalidation that names no stream goes for all of its streams |
//! | Cost of a hit | two short uncontended locks per block and access; never held while the IOMMU works |

mod cache;
mod pages;
mod shared;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use portcullis_arch::Iova;
use portcullis_bus::{
    AtsPort, AtsReply, DmaError, DmaFault, DmaPort, Initiator, PageRequest, StallState, StallTag,
};

use cache::Block;
use pages::TAG_BIT;
use shared::Found;
pub use shared::{AtcShared, AtcState, AtcStats};

/// What is fixed about an ATC, and how its enable bits stand at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtcConfig {
    /// Translations it keeps; with 0 it asks for every block of every access.
    pub capacity: usize,
    /// ATS is enabled.
    pub ats: bool,
    /// Page requests are enabled.
    pub pri: bool,
    /// Page requests that may wait for an answer at a time; more than 512 cannot be told apart.
    pub page_requests: u16,
    /// Accesses that may be stalled at a time (one per engine is enough); one more is terminated.
    pub stalled: usize,
}

impl Default for AtcConfig {
    /// 64 translations, ATS and page requests enabled, 32 page requests, 64 stalled accesses.
    fn default() -> Self {
        Self { capacity: 64, ats: true, pri: true, page_requests: 32, stalled: 64 }
    }
}

/// A port that translates through the device's own cache. Several ports may share one [`AtcShared`].
///
/// A tag of [`DmaFault::Stalled`] with bit 63 set is the ATC's own: the access waits for a page request. Other tags are
/// the IOMMU's and are asked about there.
pub struct AtcPort<P> {
    port: P,
    shared: Arc<AtcShared>,
    /// Where the access under way is marked.
    place: usize,
}

/// Where an access goes.
enum Target {
    /// To the IOMMU, which translates it.
    Untranslated(Iova),
    /// To this translated address.
    Translated(u64),
}

/// How an access is to be sent: the target, and how many bytes from there belong to one translation.
type Way = Result<(Target, usize), DmaFault>;

impl<P: AtsPort> AtcPort<P> {
    /// A port that uses the cache `shared` and reaches the IOMMU through `port`.
    pub fn new(shared: Arc<AtcShared>, port: P) -> Self {
        let place = shared.plug();
        Self { port, shared, place }
    }

    /// The way to the IOMMU.
    pub fn inner(&self) -> &P {
        &self.port
    }

    /// The cache.
    pub fn shared(&self) -> &Arc<AtcShared> {
        &self.shared
    }

    /// The device stops using `from.substream`: accesses of it that still wait to ask for a page are over, and the stop
    /// marker follows the requests that are on their way. Does nothing without a substream.
    pub fn stop_substream(&mut self, from: Initiator) {
        if let Some(substream) = from.substream {
            self.shared.stop(substream);
            self.port.page_request(PageRequest::stop_marker(from));
        }
    }

    /// Finds out where `len` bytes at `addr` go and marks the access; it stays marked until it is ended.
    fn resolve(&mut self, from: &Initiator, addr: Iova, len: usize, write: bool) -> Way {
        let block = match self.shared.begin(self.place, from, addr, write) {
            Found::Off => return Ok((Target::Untranslated(addr), len)),
            Found::Hit(block) => block,
            Found::Ask => self.ask(from, addr, write)?,
        };
        let (at, room) = block.translate(addr.get());
        Ok((Target::Translated(at), usize::try_from(room).unwrap_or(usize::MAX).min(len)))
    }

    fn ask(&mut self, from: &Initiator, addr: Iova, write: bool) -> Result<Block, DmaFault> {
        let translation = match self.port.translation_request(*from, addr, !write) {
            AtsReply::Granted(t) => t,
            AtsReply::Unsupported => {
                self.shared.refused(|s| &mut s.unsupported);
                return Err(DmaFault::Terminated);
            }
            AtsReply::Aborted => {
                self.shared.refused(|s| &mut s.aborted);
                return Err(DmaFault::Terminated);
            }
        };
        if !translation.has_access() {
            return Err(self.ask_for_page(from, addr, write));
        }
        let Some(block) = Block::new(addr.get(), translation) else {
            self.shared.refused(|s| &mut s.malformed);
            return Err(DmaFault::Terminated);
        };
        self.shared.granted(self.place, from, block);
        if block.allows(write, from.attrs.instruction()) {
            Ok(block)
        } else {
            Err(self.ask_for_page(from, addr, write))
        }
    }

    fn ask_for_page(&mut self, from: &Initiator, addr: Iova, write: bool) -> DmaFault {
        let Some((tag, request)) = self.shared.park(from, addr, write) else { return DmaFault::Terminated };
        // The answer may come before this returns; the transaction already waits for it.
        if let Some(request) = request {
            self.port.page_request(request);
        }
        DmaFault::Stalled(tag)
    }

    /// Carries out `len` bytes at `addr`, block by block.
    fn transfer(
        &mut self,
        from: Initiator,
        addr: Iova,
        len: usize,
        write: bool,
        mut access: impl FnMut(&mut P, Initiator, Target, std::ops::Range<usize>) -> Result<(), DmaError>,
    ) -> Result<(), DmaError> {
        let requester = as_on_pcie(from, write);
        let mut done = 0;
        while done < len {
            let way = self.resolve(&requester, addr.wrapping_add(done as u64), len - done, write);
            let result = way.map_err(|fault| DmaError { done, fault }).and_then(|(target, n)| {
                let end = done + n;
                let from = if matches!(target, Target::Untranslated(_)) { from } else { requester };
                let sent = access(&mut self.port, from, target, done..end);
                sent.map(|()| end)
                    .map_err(|e| DmaError { done: done + e.done.min(n), fault: foreign(e.fault) })
            });
            self.shared.end(self.place);
            done = result?;
        }
        Ok(())
    }
}

/// Privilege and instruction travel in the PASID prefix: a request without one has neither. Only a read fetches
/// instructions.
fn as_on_pcie(from: Initiator, write: bool) -> Initiator {
    let (attrs, pasid) = (from.attrs, from.substream.is_some());
    let (privileged, instruction) = (pasid && attrs.privileged(), pasid && !write && attrs.instruction());
    from.with_attrs(attrs.with_privileged(privileged).with_instruction(instruction))
}

/// A fault of the IOMMU. A tag that looks like the ATC's could never be asked about.
fn foreign(fault: DmaFault) -> DmaFault {
    match fault {
        DmaFault::Stalled(tag) if is_page_request(tag) => DmaFault::Terminated,
        other => other,
    }
}

impl<P: AtsPort> DmaPort for AtcPort<P> {
    fn read(&mut self, from: Initiator, addr: Iova, buf: &mut [u8]) -> Result<(), DmaError> {
        self.transfer(from, addr, buf.len(), false, |port, from, target, range| {
            let buf = buf.get_mut(range).unwrap_or(&mut []);
            match target {
                Target::Untranslated(at) => port.read(from, at, buf),
                Target::Translated(at) => port.read_translated(from, at, buf),
            }
        })
    }

    fn write(&mut self, from: Initiator, addr: Iova, buf: &[u8]) -> Result<(), DmaError> {
        self.transfer(from, addr, buf.len(), true, |port, from, target, range| {
            let buf = buf.get(range).unwrap_or(&[]);
            match target {
                Target::Untranslated(at) => port.write(from, at, buf),
                Target::Translated(at) => port.write_translated(from, at, buf),
            }
        })
    }

    fn stall_state(&mut self, tag: StallTag) -> StallState {
        if !is_page_request(tag) {
            return self.port.stall_state(tag);
        }
        let (state, request) = self.shared.stall_state(tag);
        if let Some(request) = request {
            self.port.page_request(request);
        }
        state
    }
}

impl<P> Drop for AtcPort<P> {
    fn drop(&mut self) {
        self.shared.unplug(self.place);
    }
}

/// True if a stall tag is an ATC's: the access waits for a page request, not for a stall of the IOMMU.
pub const fn is_page_request(tag: StallTag) -> bool {
    tag.0 & TAG_BIT != 0
}
