//! Changing a live stream table entry or context descriptor without ever showing the hardware a mixture.
//!
//! The SMMU reads an entry in 64-bit words, in any order and at any time, and keeps what it has read until it is told
//! to forget it. So an entry can be changed under it if, at every moment, the bits that it *uses* are all old or all
//! new. [`update`] finds out which bits are in use and does it in up to three steps, with a sync (configuration
//! invalidation and CMD_SYNC) after each that changed something:
//!
//! 1. words get their new values in all bits that the old entry does not use;
//! 2. the one word whose used bits differ is stored: at this moment the entry becomes the new one;
//! 3. what only the old entry used becomes zero.
//!
//! If the used bits of more than one word differ, no order of stores is right. Then the entry is made invalid first
//! (word 0, sync), the others follow (sync), and word 0 makes it valid again (sync). Accesses meanwhile fault.
//!
//! The rules which bits are in use are IHI 0070 sections 5.2 and 5.4; the published cases and their numbers of syncs
//! are the tests below.

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::cd::{CdDw0, CdDw1};
use portcullis_arch::smmuv3::ste::{SteDw0, SteDw1, SteDw2};
use portcullis_arch::smmuv3::{Cd, Ste, SteConfig};
use portcullis_hal::DmaMemory;

/// 64-bit words of an STE and of a CD.
pub const WORDS: usize = 8;
const BYTES: usize = WORDS * 8;

/// An STE or a CD.
pub trait Entry: Copy + PartialEq {
    /// As it lies in memory.
    fn words(&self) -> [u64; WORDS];
    /// From memory.
    fn from_words(words: [u64; WORDS]) -> Self;
    /// The bits that the hardware looks at, given what the others say.
    fn used(&self) -> [u64; WORDS];
}

/// A word with the given fields set, as bits.
macro_rules! mask {
    ($word:ident { $($setter:ident($value:expr)),* $(,)? }) => {
        $word::new()$(.$setter($value))*.into_bits()
    };
}

/// V of an STE and Config.
const STE_ALWAYS: u64 = mask!(SteDw0 { with_v(true), with_config(7) });
/// Where CDs are.
const STE_CD_TABLE: u64 =
    mask!(SteDw0 { with_s1fmt(3), with_s1contextptr_55_6((1 << 50) - 1), with_s1cdmax(0x1f) });
/// How transactions and CD fetches of stage 1 are treated.
const STE_STAGE1: u64 = mask!(SteDw1 {
    with_s1dss(3),
    with_s1cir(3),
    with_s1cor(3),
    with_s1csh(3),
    with_s1pie(true),
    with_s1mpam(true),
    with_s1stalld(true),
    with_eats(3),
    with_strw(3),
    with_ppar(true),
});
/// How transactions of stage 2 are treated.
const STE_STAGE2: u64 = mask!(SteDw1 { with_s2hwu(0xf), with_s2fwb(true), with_eats(3), with_ppar(true) });
/// Attributes of what is not translated by stage 1. With stage 1 on, they come from its tables (section 13.5).
const STE_ATTRIBUTES: u64 =
    mask!(SteDw1 { with_memattr(0xf), with_mtcfg(true), with_alloccfg(0xf), with_shcfg(3) });
/// What every stream has that is not aborted.
const STE_PASSING: u64 = mask!(SteDw1 {
    with_dre(true),
    with_cont(0xf),
    with_dcp(true),
    with_mev(true),
    with_nscfg(3),
    with_privcfg(3),
    with_instcfg(3),
    with_impdef(0xfff),
});
/// The tag of stage 1 entries too.
const STE_VMID: u64 = mask!(SteDw2 { with_s2vmid(0xffff) });
/// S1DSS: transactions without a substream bypass stage 1.
pub const S1DSS_BYPASS: u8 = 1;

impl Entry for Ste {
    fn words(&self) -> [u64; WORDS] {
        self.0
    }
    fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }
    fn used(&self) -> [u64; WORDS] {
        let mut used = [0; WORDS];
        used[0] = mask!(SteDw0 { with_v(true) });
        if !self.valid() {
            return used;
        }
        used[0] = STE_ALWAYS;
        let config = self.config();
        if config == SteConfig::Abort {
            return used;
        }
        used[1] = STE_PASSING;
        if config.stage1() {
            used[0] |= STE_CD_TABLE;
            used[1] |= STE_STAGE1;
            used[2] |= STE_VMID;
        }
        if !config.stage1() || config.stage2() || self.dw1().s1dss() == S1DSS_BYPASS {
            used[1] |= STE_ATTRIBUTES;
        }
        if config.stage2() {
            used[1] |= STE_STAGE2;
            // The table, and behind it secure stage 2, MPAM and permission indirection, which this driver never sets.
            used[2..].fill(u64::MAX);
        }
        used
    }
}

/// Ignored while EPD0 = 1.
const CD_WALK0: u64 = mask!(CdDw0 { with_t0sz(0x3f), with_tg0(3), with_ir0(3), with_or0(3), with_sh0(3) });
const CD_TTB0: u64 = mask!(CdDw1 { with_ttb0_51_4((1 << 48) - 1) });

impl Entry for Cd {
    fn words(&self) -> [u64; WORDS] {
        self.0
    }
    fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }
    fn used(&self) -> [u64; WORDS] {
        if !self.valid() {
            let mut used = [0; WORDS];
            used[0] = mask!(CdDw0 { with_v(true) });
            return used;
        }
        let mut used = [u64::MAX; WORDS];
        if self.dw0().epd0() {
            used[0] &= !CD_WALK0;
            used[1] &= !CD_TTB0;
        }
        used
    }
}

/// An entry in memory that the SMMU may be using.
pub struct Live<'a, M> {
    memory: &'a M,
    at: Pa,
    coherent: bool,
}

impl<'a, M: DmaMemory> Live<'a, M> {
    /// The entry at `at`. `coherent`: the SMMU snoops the CPU's caches.
    pub fn new(memory: &'a M, at: Pa, coherent: bool) -> Self {
        Self { memory, at, coherent }
    }

    /// What is in memory.
    pub fn read<T: Entry>(&self) -> T {
        let mut words = [0; WORDS];
        self.memory.load_run(self.at, &mut words);
        T::from_words(words)
    }

    /// Fills an entry that the SMMU does not look at. It is visible when this returns.
    pub fn fill<T: Entry>(&self, entry: &T) {
        for (index, word) in entry.words().into_iter().enumerate() {
            self.memory.store64(self.at.wrapping_add(index as u64 * 8), word);
        }
        self.publish();
    }

    /// Stores the words of `range` that differ from `new`; true if there were any. They are visible when this returns.
    fn set(&self, current: &mut [u64; WORDS], new: &[u64; WORDS], words: core::ops::Range<usize>) -> bool {
        let mut changed = false;
        for index in words {
            if let (Some(current), Some(new)) = (current.get_mut(index), new.get(index))
                && *current != *new
            {
                self.memory.store64(self.at.wrapping_add(index as u64 * 8), *new);
                *current = *new;
                changed = true;
            }
        }
        if changed {
            self.publish();
        }
        changed
    }

    fn publish(&self) {
        if !self.coherent {
            self.memory.clean(self.at, BYTES);
        }
        self.memory.wmb();
    }
}

/// Turns the entry in memory into `target`, whatever it was. Everything that `target` points to has been stored. When
/// `sync` returns without an error, the SMMU has forgotten what it knew of the entry.
///
/// After an error of a sync the entry is functionally the old one, the new one, or invalid, and may be updated again.
/// Which of them the SMMU uses is unknown, since it may not have forgotten anything.
pub fn update<T: Entry, M: DmaMemory, E>(
    live: &Live<'_, M>,
    target: &T,
    sync: &mut impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    // What the entry will point to is visible before the entry.
    live.memory.wmb();
    let old: T = live.read();
    let mut current = old.words();
    let (used, wanted, new) = (old.used(), target.used(), target.words());

    // The entry with its unused bits prepared, and the words that are not right then.
    let mut prepared = current;
    let mut critical = None;
    let mut count = 0;
    for (index, word) in prepared.iter_mut().enumerate() {
        *word = *word & used[index] | new[index] & !used[index];
        if (*word ^ new[index]) & wanted[index] != 0 {
            critical = Some(index);
            count += 1;
        }
    }
    match critical {
        None => step(live, &mut current, &new, 0..WORDS, sync),
        Some(word) if count == 1 => {
            prepared[word] = current[word];
            step(live, &mut current, &prepared, 0..WORDS, sync)?;
            step(live, &mut current, &new, word..word + 1, sync)?;
            step(live, &mut current, &new, 0..WORDS, sync)
        }
        Some(_) => {
            let mut invalid = current;
            invalid[0] = 0;
            step(live, &mut current, &invalid, 0..1, sync)?;
            step(live, &mut current, &new, 1..WORDS, sync)?;
            step(live, &mut current, &new, 0..1, sync)
        }
    }
}

fn step<M: DmaMemory, E>(
    live: &Live<'_, M>,
    current: &mut [u64; WORDS],
    new: &[u64; WORDS],
    words: core::ops::Range<usize>,
    sync: &mut impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    if live.set(current, new, words) { sync() } else { Ok(()) }
}

#[cfg(test)]
mod tests;
