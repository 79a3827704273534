//! Which TLBI commands forget a range, an address space or everything of a stage.
//!
//! With range invalidation (IDR3.RIL) a command covers (NUM + 1) * 2^SCALE granules. [`range`] writes the number of
//! granules as base-32 digits from the lowest set bit up, so that a range takes at most one command for every five
//! bits of its length. Without, it is one command per leaf, or per granule where the size of the leaves is not known,
//! and from [`Tlbi::max_single`] on everything with the tag.
//!
//! Encodings that are reserved or unpredictable are kept out: a granule, no level, NUM and SCALE zero (a range
//! of one granule at an unknown level); a level whose blocks the range does not start and end at; a level that cannot
//! have leaves. A single granule at an unknown level is a plain invalidation by address for a leaf, and becomes two
//! granules otherwise, as in Linux.

use core::iter;

use portcullis_arch::smmuv3::cmd::Tlbi as Bits;
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_arch::{Asid, Vmid};

/// Granules that ranges can count: more are beyond any address space.
const MAX_GRANULES: u64 = 1 << 36;
/// Largest SCALE without IDR5.DS.
const MAX_SCALE: u32 = 31;

/// Whose TLB entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Stage 1 of an address space at EL1; `vmid` is that of the stage 2 below, or 0.
    Stage1 {
        /// Address space.
        asid: Asid,
        /// Virtual machine.
        vmid: Vmid,
    },
    /// Stage 1 at EL1, all address spaces of a virtual machine.
    Stage1All {
        /// Virtual machine.
        vmid: Vmid,
    },
    /// An address space of EL2 with E2H.
    Hyp {
        /// Address space.
        asid: Asid,
    },
    /// EL2: all of it, whatever address space.
    HypAll,
    /// Stage 2.
    Stage2 {
        /// Virtual machine.
        vmid: Vmid,
        /// There is a stage 1 on top: entries of both stages do not know their IPA and all of the virtual machine's go.
        nested: bool,
    },
}

/// What a TLB invalidation has to know beside the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tlbi {
    /// Whose entries.
    pub scope: Scope,
    /// IDR3.RIL.
    pub ranges: bool,
    /// log2 of the tables' granule: 12, 14 or 16.
    pub granule_log2: u8,
    /// Single invalidations from which on everything goes (Linux: 512 with 4 KiB pages).
    pub max_single: u64,
}

impl Tlbi {
    /// Linux's limits.
    pub fn new(scope: Scope, ranges: bool, granule_log2: u8) -> Self {
        Self { scope, ranges, granule_log2, max_single: 1 << granule_log2.saturating_sub(3) }
    }
}

/// Everything of a scope, both stages for stage 2.
pub fn all(scope: Scope) -> Command {
    let command = Bits::new();
    match scope {
        Scope::Stage1 { asid, vmid } => {
            command.with_opcode(Opcode::TlbiNhAsid as u8).with_asid(asid.get()).with_vmid(vmid.get())
        }
        Scope::Stage1All { vmid } => command.with_opcode(Opcode::TlbiNhAll as u8).with_vmid(vmid.get()),
        Scope::Hyp { asid } => command.with_opcode(Opcode::TlbiEl2Asid as u8).with_asid(asid.get()),
        Scope::HypAll => command.with_opcode(Opcode::TlbiEl2All as u8),
        Scope::Stage2 { vmid, .. } => command.with_opcode(Opcode::TlbiS12Vmall as u8).with_vmid(vmid.get()),
    }
    .into()
}

/// Everything of EL1 of all virtual machines, both stages; legal on every SMMU.
pub fn all_el1() -> Command {
    Bits::new().with_opcode(Opcode::TlbiNsnhAll as u8).into()
}

/// Everything of EL2 (needs IDR0.HYP).
pub fn all_el2() -> Command {
    all(Scope::HypAll)
}

/// Commands that forget the entries for `[start, start + len)`, in the order they are to be queued. No SYNC.
///
/// `leaf`: the size (log2) of the leaves that were there, if they all had that size and no table went; `None` forgets
/// walk caches too. A range that is cut in the middle of a granule or a leaf is widened to it.
pub fn range(tlbi: Tlbi, start: u64, len: u64, leaf: Option<u8>) -> Commands {
    let page = tlbi.granule_log2.clamp(12, 16);
    let first = start >> page;
    let last = start.saturating_add(len.saturating_sub(1)) >> page;
    let mut commands = Commands {
        tlbi,
        page,
        at: first,
        left: 0,
        step: 1,
        single: true,
        ttl: 0,
        leaf: leaf.is_some(),
        all: false,
    };
    if len == 0 {
        return commands;
    }
    // In units of leaves, if it is known which level they are of.
    let level = leaf.and_then(|log2| level_of(page, log2));
    let unit = match (leaf, level) {
        (Some(log2), Some(_)) => u32::from(log2 - page),
        _ => 0,
    };
    let first = first >> unit << unit;
    let granules = (last >> unit << unit) + (1 << unit) - first;
    commands.at = first;
    commands.left = granules;
    if tlbi.ranges {
        commands.single = granules == 1 && level.is_none() && leaf.is_some();
        commands.ttl = level.unwrap_or(0);
        // The first command would be for one granule, which is reserved without a level.
        if !commands.single && level.is_none() && granules % 32 == 1 {
            commands.left += 1;
        }
        commands.all = commands.left >= MAX_GRANULES;
    } else {
        commands.step = 1 << unit;
        commands.all = granules >> unit >= tlbi.max_single.max(1);
    }
    if commands.all {
        commands.left = 1;
    }
    commands
}

/// The TTL value of leaves of a size: a level from 1 to 3 that has leaves without 52-bit addresses.
fn level_of(page: u8, leaf_log2: u8) -> Option<u8> {
    let stride = page - 3;
    let above = leaf_log2.checked_sub(page)?;
    if above % stride != 0 {
        return None;
    }
    match (page, above / stride) {
        (_, 0) => Some(3),
        (_, 1) => Some(2),
        (12, 2) => Some(1),
        _ => None,
    }
}

/// See [`range`].
#[derive(Clone, Debug)]
pub struct Commands {
    tlbi: Tlbi,
    /// log2 of the granule.
    page: u8,
    /// Next granule.
    at: u64,
    /// Granules to go.
    left: u64,
    /// Granules of one single invalidation.
    step: u64,
    /// By address, not by range.
    single: bool,
    ttl: u8,
    leaf: bool,
    /// Everything of the scope instead.
    all: bool,
}

impl Commands {
    fn bits(&self) -> Bits {
        let bits = Bits::new().with_leaf(self.leaf).with_addr_63_12(self.at << (self.page - 12));
        match self.tlbi.scope {
            Scope::Stage1 { asid, vmid } => {
                bits.with_opcode(Opcode::TlbiNhVa as u8).with_asid(asid.get()).with_vmid(vmid.get())
            }
            Scope::Stage1All { vmid } => bits.with_opcode(Opcode::TlbiNhVaa as u8).with_vmid(vmid.get()),
            Scope::Hyp { asid } => bits.with_opcode(Opcode::TlbiEl2Va as u8).with_asid(asid.get()),
            Scope::HypAll => bits.with_opcode(Opcode::TlbiEl2Vaa as u8),
            Scope::Stage2 { vmid, .. } => {
                let bits = bits.with_opcode(Opcode::TlbiS2Ipa as u8).with_vmid(vmid.get());
                bits.with_addr_63_12(bits.addr_63_12() & ((1 << 40) - 1))
            }
        }
    }

    /// The command that ends a range of stage 2 below a stage 1.
    fn combined(&mut self) -> Option<Command> {
        match self.tlbi.scope {
            Scope::Stage2 { vmid, nested: true } if !self.all => {
                self.tlbi.scope = Scope::Stage2 { vmid, nested: false };
                Some(all(Scope::Stage1All { vmid }))
            }
            _ => None,
        }
    }
}

impl Iterator for Commands {
    type Item = Command;

    fn next(&mut self) -> Option<Command> {
        if self.left == 0 {
            // Nothing was asked for if nothing has been given.
            return if self.step == 0 { self.combined() } else { None };
        }
        if self.all {
            self.left = 0;
            return Some(all(self.tlbi.scope));
        }
        let mut bits = self.bits();
        let mut step = self.step;
        if !self.single {
            let scale = self.left.trailing_zeros().min(MAX_SCALE);
            let units = (self.left >> scale & 31).max(1);
            step = units << scale;
            let tg = (self.page - 10) / 2;
            bits = bits.with_tg(tg).with_ttl(self.ttl).with_scale(scale as u8).with_num(units as u8 - 1);
        }
        self.at = self.at.wrapping_add(step);
        self.left = self.left.saturating_sub(step);
        if self.left == 0 {
            // Marks the range as done, for `combined`.
            self.step = 0;
        }
        Some(bits.into())
    }
}

impl iter::FusedIterator for Commands {}

#[cfg(test)]
mod tests;
