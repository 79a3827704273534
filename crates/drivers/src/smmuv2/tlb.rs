//! TLB maintenance: what to invalidate for a range, and waiting until it is done.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::{Asid, Vmid};
use portcullis_hal::{Clock, DmaMemory, Mmio, poll};
use portcullis_pgtable::Flush;

use super::{Error, Shared, SyncScope};
use crate::tables::TableGuard;

/// Invalidations by address that one call makes at most; beyond that, everything under the ASID or VMID goes. One
/// such operation makes the devices of the domain walk again, sixty-four cost about as much as the walks they save.
const MAX_BY_ADDRESS: u64 = 64;

/// Operand of registers whose value does not matter. Linux writes the same.
const ANY: u32 = u32::MAX;

/// How a domain's TLB entries are tagged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// Stage 1 entries of a bank.
    Stage1(Asid),
    /// Stage 2 entries of a bank.
    Stage2(Vmid),
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Shared<R, M, C> {
    /// Waits until the invalidations made through a bank are complete.
    pub fn sync_bank(&self, bank: u8) -> Result<(), Error> {
        self.regs.write_cb(bank, cb::TLBSYNC, ANY);
        let read = || u64::from(self.regs.read_cb(bank, cb::TLBSTATUS));
        let what = "CBn_TLBSTATUS.SACTIVE == 0";
        poll(&self.clock, what, self.options.tlb_timeout_us, read, |status| status & 1 == 0)
            .map(drop)
            .map_err(|timeout| Error::TlbSync { scope: SyncScope::Bank(bank), timeout })
    }

    /// Waits until all invalidations are complete.
    pub fn sync_global(&self) -> Result<(), Error> {
        self.regs.write(gr0::TLBGSYNC, ANY);
        let read = || u64::from(self.regs.read(gr0::TLBGSTATUS));
        let what = "TLBGSTATUS.GSACTIVE == 0";
        poll(&self.clock, what, self.options.tlb_timeout_us, read, |status| status & 1 == 0)
            .map(drop)
            .map_err(|timeout| Error::TlbSync { scope: SyncScope::Global, timeout })
    }

    /// Everything of hyp and of all VMIDs; at reset.
    pub fn invalidate_everything(&self) {
        self.regs.write(gr0::TLBIALLH, ANY);
        self.regs.write(gr0::TLBIALLNSNH, ANY);
    }

    /// All entries with a tag, waited for.
    pub fn invalidate_tag(&self, bank: u8, tag: Tag) -> Result<(), Error> {
        match tag {
            Tag::Stage1(asid) => {
                self.regs.write_cb(bank, cb::TLBIASID, u32::from(asid.get()));
                self.sync_bank(bank)
            }
            Tag::Stage2(vmid) => {
                self.regs.write(gr0::TLBIVMID, u32::from(vmid.get()));
                self.sync_global()
            }
        }
    }

    /// One invalidation by address; not waited for.
    fn invalidate_address(&self, bank: u8, tag: Tag, address: u64, leaf: bool) {
        match tag {
            Tag::Stage1(asid) => {
                let operand = u64::from(asid.get()) << 48 | address >> 12 & 0xfff_ffff_ffff;
                self.regs.write_cb64(bank, if leaf { cb::TLBIVAL } else { cb::TLBIVA }, operand);
            }
            Tag::Stage2(_) => {
                let operand = address >> 12 & 0xf_ffff_ffff;
                self.regs.write_cb64(bank, if leaf { cb::TLBIIPAS2L } else { cb::TLBIIPAS2 }, operand);
            }
        }
    }
}

/// The flush of one call: operations by address are issued as they come, and waited for once, by
/// [`finish`](Invalidation::finish). Where a table is about to be freed the wait is at once.
pub(super) struct Invalidation<'a, R, M, C> {
    smmu: &'a Shared<R, M, C>,
    bank: u8,
    tag: Tag,
    granule: u64,
    /// How many stages 1 there are on top of this stage 2: combined entries do not know their IPA and have to go by VMID.
    /// Looked at only after the tables have changed, so that one that comes meanwhile is either counted or has never seen
    /// what goes.
    on_top: &'a AtomicU32,
    guard: &'a TableGuard,
    issued: u64,
    everything: bool,
    result: Result<(), Error>,
}

impl<'a, R: Mmio, M: DmaMemory + Clone, C: Clock> Invalidation<'a, R, M, C> {
    pub fn new(
        smmu: &'a Shared<R, M, C>,
        bank: u8,
        tag: Tag,
        granule: u64,
        on_top: &'a AtomicU32,
        guard: &'a TableGuard,
    ) -> Self {
        Self { smmu, bank, tag, granule, on_top, guard, issued: 0, everything: false, result: Ok(()) }
    }

    fn add(&mut self, start: u64, len: u64, step: u64, leaf: bool) {
        let count = len / step.max(1);
        if self.everything || self.issued.saturating_add(count) > MAX_BY_ADDRESS {
            self.everything = true;
            return;
        }
        for i in 0..count {
            self.smmu.invalidate_address(self.bank, self.tag, start.wrapping_add(i * step), leaf);
        }
        self.issued += count;
    }

    /// Whether a stage 1 on top may have used what has just been cleared.
    fn is_below(&self) -> bool {
        fence(Ordering::SeqCst);
        self.on_top.load(Ordering::SeqCst) > 0
    }

    /// Waits for what has been issued.
    fn complete(&mut self) {
        let result = if self.everything {
            self.smmu.invalidate_tag(self.bank, self.tag)
        } else if self.issued > 0 {
            self.smmu.sync_bank(self.bank).and_then(|()| match self.tag {
                Tag::Stage2(vmid) if self.is_below() => {
                    self.smmu.regs.write(gr0::TLBIVMIDS1, u32::from(vmid.get()));
                    self.smmu.sync_global()
                }
                _ => Ok(()),
            })
        } else {
            return;
        };
        (self.issued, self.everything) = (0, false);
        if result.is_err() {
            self.guard.keep();
            self.result = self.result.and(result);
        }
    }

    /// Waits for the rest; an error if any wait of the call timed out.
    pub fn finish(mut self) -> Result<(), Error> {
        self.complete();
        self.result
    }
}

impl<R: Mmio, M: DmaMemory + Clone, C: Clock> Flush for Invalidation<'_, R, M, C> {
    fn leaf(&mut self, iova: u64, len: u64, granule: u64) {
        self.add(iova, len, granule, true);
    }
    fn table(&mut self, iova: u64, len: u64) {
        self.add(iova, len, self.granule, false);
        self.complete();
    }
}
