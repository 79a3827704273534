//! Context descriptors: what a domain puts there, the ones it has itself, and the end of a process whose table it uses.
//!
//! A stream without substreams uses a descriptor of the domain: one for streams that may stall, one for others. A stream
//! with substreams has a table of descriptors of its own ([`super::cdtab`]).

use alloc::boxed::Box;
use core::sync::atomic::Ordering;

use portcullis_arch::SubstreamId;
use portcullis_arch::smmuv3::cd::{CdDw0, CdDw1};
use portcullis_arch::smmuv3::{Cd, Command};
use portcullis_hal::{Block, DmaMemory};

use super::cmdq::commands::cfgi_cd;
use super::entry::{Live, update};
use super::flush::Tag;
use super::ste::CdPointer;
use super::streams::Configuration;
use super::{Domain, Error, Platform, StallModel};

/// The context descriptors that a domain has itself, for streams without substreams: one for streams that stall on a
/// fault and one for others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cds(pub [Option<Block>; 2]);

impl<P: Platform> Domain<P> {
    /// The context descriptor of the domain's stage 1.
    pub(super) fn cd(&self, can_stall: bool) -> Option<Cd> {
        let (root, Tag::Stage1 { asid, .. }) = (self.root?, self.tag?) else { return None };
        let stopped = self.stopped.load(Ordering::Acquire);
        let forced = self.shared.features.stall_model == StallModel::Stall;
        let dw0 = CdDw0::new()
            .with_epd1(true)
            .with_v(true)
            .with_ips(root.ips & 7)
            .with_aa64(true)
            .with_s(forced || can_stall && self.fault_model.stall && !stopped)
            .with_r(!stopped)
            .with_a(true)
            .with_aset(root.asid.is_none())
            .with_asid(asid.get());
        let walk = Cd::default().with_mair(root.mair);
        Some(if stopped {
            // Accesses of a process that has ended fault, without a record of each.
            walk.with_dw0(dw0.with_epd0(true))
        } else {
            walk.with_dw0(
                dw0.with_t0sz(root.t0sz & 0x3f)
                    .with_tg0(root.granule.tg0())
                    .with_ir0(root.irgn & 3)
                    .with_or0(root.orgn & 3)
                    .with_sh0(root.sh & 3),
            )
            .with_dw1(CdDw1::new().with_ttb0_51_4(root.ttbr0.get() >> 4 & ((1 << 48) - 1)))
        })
    }

    /// The domain's own context descriptor for streams that stall or that do not, made on first use. The caller holds
    /// the configuration lock.
    pub(super) fn own_cd(&self, can_stall: bool) -> Result<CdPointer, Error> {
        let none = Error::NoContext { kind: self.kind() };
        let (cd, memory) = (self.cd(can_stall).ok_or(none)?, self.cd_memory.as_ref().ok_or(none)?);
        let index = usize::from(can_stall);
        let existing = self.cds.lock().0.get(index).copied().flatten();
        let block = match existing {
            Some(block) => block,
            None => {
                let bytes = size_of::<Cd>();
                let no_memory = Error::NoMemory { what: "a context descriptor", bytes };
                let block = memory.alloc(bytes, bytes).ok_or(no_memory)?;
                let bits = self.shared.features.output_bits;
                if block.pa.get() >> bits != 0 {
                    memory.free(block);
                    return Err(Error::TableAddress {
                        what: "a context descriptor",
                        pa: block.pa.get(),
                        bits,
                    });
                }
                Live::new(memory, block.pa, self.shared.coherent).fill(&cd);
                if let Some(slot) = self.cds.lock().0.get_mut(index) {
                    *slot = Some(block);
                }
                block
            }
        };
        Ok(CdPointer { at: block.pa, format: 0, bits: 0 })
    }

    /// Stops walks of a process or guest table for good, because its owner is going to free it (CD.EPD0; the
    /// descriptor stays valid, so that streams and substreams that share its table go on undisturbed). Accesses fault
    /// from then on. When it returns without an error, the table is not used any more.
    pub fn stop_walks(&self) -> Result<(), Error> {
        let Some(Tag::Stage1 { asid, .. }) = self.tag else {
            return self.invalidate_all();
        };
        let result = {
            let mut config = self.shared.configuration()?;
            self.stopped.store(true, Ordering::Release);
            self.shared.asids.lock().forget_root(asid.get());
            self.stop_own_cds().and_then(|()| self.stop_table_cds(&mut config))
        };
        if result.is_err() {
            self.guard.keep();
        }
        self.invalidate_all().and(result)
    }

    fn stop_own_cds(&self) -> Result<(), Error> {
        let cds = *self.cds.lock();
        let users = self.link.users();
        let commands: Box<[Command]> = users
            .iter()
            .filter(|user| user.own_cd)
            .map(|user| cfgi_cd(user.stream, SubstreamId(0), true))
            .collect();
        for (index, block) in cds.0.iter().enumerate() {
            let (Some(block), Some(cd), Some(memory)) = (block, self.cd(index == 1), &self.cd_memory) else {
                continue;
            };
            let live = Live::new(memory, block.pa, self.shared.coherent);
            update(&live, &cd, &mut || self.shared.sync(&commands))?;
        }
        Ok(())
    }

    fn stop_table_cds(&self, config: &mut Configuration<P::Memory>) -> Result<(), Error> {
        for user in self.link.users().iter().filter(|user| !user.own_cd) {
            let substream = user.substream.unwrap_or_default();
            let can_stall = config.stream(user.stream)?.options.can_stall;
            if let Some(cd) = self.cd(can_stall) {
                self.shared.write_cd(config, user.stream, substream, &cd)?;
            }
        }
        Ok(())
    }
}
