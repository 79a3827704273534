//! What a change of a domain's tables makes the SMMU and the devices forget: [`Gather`].

use alloc::sync::Arc;
use core::sync::atomic::{AtomicU32, Ordering, fence};

use portcullis_arch::smmuv3::Command;
use portcullis_arch::{Asid, Vmid};
use portcullis_pgtable::Flush;

use super::cmdq::Batch;
use super::link::{Link, atc_commands};
use super::tlbi::{self, Scope, Tlbi};
use super::{Error, Platform, Shared};
use crate::tables::TableGuard;

/// How a domain's TLB entries are tagged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// Stage 1 entries; the VMID of the stage 2 below, or 0.
    Stage1 {
        /// ASID.
        asid: Asid,
        /// VMID.
        vmid: Vmid,
        /// Entries of EL2-E2H.
        el2: bool,
    },
    /// Stage 2 entries.
    Stage2(Vmid),
    /// All stage 1 entries over a stage 2: the guest has the ASIDs.
    Guest(Vmid),
}

impl Tag {
    /// The command that invalidates everything with the tag.
    pub fn all(self) -> Command {
        tlbi::all(self.scope())
    }

    fn scope(self) -> Scope {
        match self {
            Self::Stage1 { asid, el2: true, .. } => Scope::Hyp { asid },
            Self::Stage1 { asid, vmid, el2: false } => Scope::Stage1 { asid, vmid },
            // What a stage 1 on top needs is added once, at the end of a call.
            Self::Stage2(vmid) => Scope::Stage2 { vmid, nested: false },
            Self::Guest(vmid) => Scope::Stage1All { vmid },
        }
    }
}

/// The flush of one call: commands are queued as they come, and waited for once, by [`finish`](Gather::finish). Where
/// a table is about to be freed the wait is at once. Devices that keep translations are told after the TLB has
/// forgotten them: the other way round they could ask for them again.
pub struct Gather<'a, P: Platform> {
    shared: &'a Shared<P>,
    link: &'a Link,
    tag: Tag,
    granule: u64,
    /// How many stages 1 there are on top of this stage 2: their combined entries do not know their IPA and have to go by
    /// VMID. Looked at only after the tables have changed, so that one that comes meanwhile is either counted or has
    /// never seen what goes.
    on_top: &'a AtomicU32,
    guard: &'a TableGuard,
    batch: Option<Batch<'a, Arc<P>>>,
    issued: u64,
    /// Everything under the tag goes, instead of what was queued.
    everything: bool,
    /// Devices forget everything.
    all_addresses: bool,
    /// First and last address that devices have to forget.
    span: Option<(u64, u64)>,
    result: Result<(), Error>,
}

impl<'a, P: Platform> Gather<'a, P> {
    pub fn new(
        shared: &'a Shared<P>,
        link: &'a Link,
        tag: Tag,
        granule: u64,
        on_top: &'a AtomicU32,
        guard: &'a TableGuard,
    ) -> Self {
        Self {
            shared,
            link,
            tag,
            granule,
            on_top,
            guard,
            batch: None,
            issued: 0,
            everything: false,
            all_addresses: false,
            span: None,
            result: Ok(()),
        }
    }

    /// Everything under the tag goes.
    pub fn everything(&mut self) {
        (self.everything, self.all_addresses) = (true, true);
    }

    /// Queues what makes the TLB forget a range; `leaf` is the size of its leaves, if no table went with them.
    fn add(&mut self, start: u64, len: u64, leaf: Option<u64>) {
        let last = start.saturating_add(len.saturating_sub(1));
        let (low, high) = self.span.unwrap_or((start, last));
        self.span = Some((low.min(start), high.max(last)));
        let log2 = |bytes: u64| bytes.trailing_zeros() as u8;
        let ranges = self.shared.features.range_invalidation;
        let tlbi = Tlbi::new(self.tag.scope(), ranges, log2(self.granule));
        // One by one, or in ranges that are few.
        let count = if ranges { 1 } else { len / leaf.unwrap_or(self.granule).max(1) };
        if self.everything || self.issued.saturating_add(count) > tlbi.max_single {
            self.everything = true;
            return;
        }
        self.issued += count;
        if !self.shared.is_enabled() {
            return;
        }
        let batch = self.batch.get_or_insert_with(|| self.shared.queue.batch());
        for command in tlbi::range(tlbi, start, len, leaf.map(log2)) {
            batch.push(command);
        }
    }

    /// Waits for what has been queued.
    fn complete(&mut self) {
        let result = self.tlb().and_then(|()| self.atc());
        if result.is_err() {
            self.guard.keep();
            self.result = self.result.and(result);
        }
        (self.issued, self.everything, self.all_addresses, self.span) = (0, false, false, None);
    }

    fn tlb(&mut self) -> Result<(), Error> {
        if !self.shared.is_enabled() {
            return Ok(());
        }
        // The tables were changed before anybody is looked for who may have used them.
        fence(Ordering::SeqCst);
        let batch = self.batch.get_or_insert_with(|| self.shared.queue.batch());
        if self.everything {
            batch.push(self.tag.all());
            return batch.submit_sync();
        }
        if let (true, Tag::Stage2(vmid)) = (self.on_top.load(Ordering::SeqCst) > 0, self.tag) {
            batch.push(Tag::Guest(vmid).all());
        }
        batch.submit_sync()
    }

    fn atc(&mut self) -> Result<(), Error> {
        if !self.link.has_ats() {
            return Ok(());
        }
        let range = if self.all_addresses { None } else { self.span };
        let commands = atc_commands(self.link, range);
        self.shared.sync(&commands)
    }

    /// Waits for the rest; an error if anything of the call has not become complete.
    pub fn finish(mut self) -> Result<(), Error> {
        if self.everything || self.issued > 0 {
            self.complete();
        }
        self.result
    }
}

impl<P: Platform> Flush for Gather<'_, P> {
    fn leaf(&mut self, iova: u64, len: u64, granule: u64) {
        self.add(iova, len, Some(granule));
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.add(iova, len, None);
        self.complete();
    }
}
