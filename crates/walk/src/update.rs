//! Descriptors that hardware changes: access flags and dirty state (HTTU, IHI 0070 3.13, DDI 0487 D8.5), and the ways
//! by which a walker reaches a descriptor: in memory itself, or through stage 2.

use portcullis_arch::vmsa::long as bits;
use portcullis_arch::{Access, Attributes, MemoryType, Pa};
use portcullis_bus::{BusError, Memory};

use crate::perms::AccessKind;
use crate::record::{Recorder, Rule, Step};
use crate::stage::{Fault, FaultKind, Leaf, Stage2, Updates};
use crate::translate::check;

/// How often a walker looks again because a descriptor changed between its read and its update. Each time somebody else
/// has changed it; a machine that does so without end gets the external abort of an update that is not possible.
pub(crate) const TRIES: usize = 64;

/// A descriptor where the walker found it.
#[derive(Clone, Copy)]
pub(crate) struct Spot<U> {
    /// Its address in the stage's output space.
    pub address: u64,
    /// Its address in memory.
    pub at: u64,
    /// Attributes of accesses to it.
    pub attrs: Attributes,
    /// What it holds.
    pub value: u64,
    /// How it was reached.
    pub under: U,
}

/// Where a descriptor is in memory.
pub(crate) struct Placed<U> {
    pub at: u64,
    /// Stage 2's attributes for it.
    pub attrs: Option<Attributes>,
    pub under: U,
}

/// The way to the descriptors of a stage.
pub(crate) trait Tables<M, R> {
    /// What is kept of the way for an update.
    type Under: Copy;
    /// Descriptors may be updated or hold 52-bit addresses; where not, the walk compiles to the plain one.
    const FULL: bool;
    /// Descriptors are in memory where the tables say.
    const DIRECT: Option<Self::Under>;

    /// Where the descriptor at `address` is.
    fn place(&self, memory: &M, address: u64, recorder: &mut R) -> Result<Placed<Self::Under>, Fault>;

    /// The fault if the descriptor may not be written.
    fn may_write(&self, address: u64, under: &Self::Under) -> Result<(), Fault>;

    /// Prepares a write of the descriptor at `spot`, which may mark a stage 2 leaf dirty, and says where it is.
    fn before_write(
        &self,
        memory: &M,
        spot: &Spot<Self::Under>,
        recorder: &mut R,
    ) -> Result<Spot<Self::Under>, Fault>;
}

/// Descriptors that are in memory where the tables say.
pub(crate) struct Direct<const FULL: bool>;

impl<M, R, const FULL: bool> Tables<M, R> for Direct<FULL> {
    type Under = ();
    const FULL: bool = FULL;
    const DIRECT: Option<()> = Some(());

    #[inline(always)]
    fn place(&self, _: &M, at: u64, _: &mut R) -> Result<Placed<()>, Fault> {
        Ok(Placed { at, attrs: None, under: () })
    }
    #[inline(always)]
    fn may_write(&self, _: u64, (): &()) -> Result<(), Fault> {
        Ok(())
    }
    #[inline(always)]
    fn before_write(&self, _: &M, spot: &Spot<()>, _: &mut R) -> Result<Spot<()>, Fault> {
        Ok(*spot)
    }
}

/// Stage 1 descriptors whose addresses are IPAs.
pub(crate) struct Through<'a, const FULL: bool> {
    pub stage2: &'a Stage2,
    pub updates: Updates,
}

impl<M: Memory, R: Recorder, const FULL: bool> Tables<M, R> for Through<'_, FULL> {
    type Under = (Leaf, Spot<()>);
    const FULL: bool = FULL;
    const DIRECT: Option<Self::Under> = None;

    #[inline]
    fn place(&self, memory: &M, address: u64, recorder: &mut R) -> Result<Placed<Self::Under>, Fault> {
        let on_walk = |f: Fault| Fault { on_stage1_walk: true, ..f };
        let (leaf, spot) =
            self.stage2.walk::<_, _, FULL>(memory, address, self.updates, recorder).map_err(on_walk)?;
        self.stage2.check_structure(&leaf, address, false).map_err(on_walk)?;
        let attrs = if leaf.attrs.memory().is_device() && self.stage2.device_walks_as_nc {
            leaf.attrs.with_memory(MemoryType::NORMAL_NC)
        } else {
            leaf.attrs
        };
        Ok(Placed { at: leaf.at(address), attrs: Some(attrs), under: (leaf, spot) })
    }

    #[cold]
    fn may_write(&self, address: u64, (leaf, _): &Self::Under) -> Result<(), Fault> {
        let write = AccessKind::new(Access::Write, Attributes::DEVICE_DEFAULT);
        check(leaf.perms, write, 2, leaf.level, address).map_err(on_update)
    }

    #[cold]
    fn before_write(
        &self,
        memory: &M,
        placed: &Spot<Self::Under>,
        recorder: &mut R,
    ) -> Result<Spot<Self::Under>, Fault> {
        let address = placed.address;
        let (mut leaf, mut spot) = placed.under;
        for _ in 0..TRIES {
            Tables::<M, R>::may_write(self, address, &(leaf, spot))?;
            let mark = leaf.clean;
            let (s2, updates) = (self.stage2, self.updates);
            if !mark || s2.mark_dirty(memory, &leaf, &spot, address, updates, recorder).map_err(on_update)? {
                let value = if mark { dirty_stage2(spot.value) } else { spot.value };
                let under = (Leaf { clean: false, ..leaf }, Spot { value, ..spot });
                return Ok(Spot { at: leaf.at(address), under, ..*placed });
            }
            (leaf, spot) = s2.walk::<_, _, FULL>(memory, address, updates, recorder).map_err(on_update)?;
        }
        Err(on_update(contended(2, leaf.level, address, spot.at)))
    }
}

/// A stage 2 fault of the update of a stage 1 descriptor.
fn on_update(f: Fault) -> Fault {
    Fault { on_stage1_walk: true, write: true, ..f }
}

/// The fault of an update that others keep overtaking.
#[cold]
pub(crate) fn contended(stage: u8, level: i8, ipa: u64, at: u64) -> Fault {
    Fault { fetch: at, ..Fault::new(FaultKind::External, stage, level).with_ipa(ipa) }
}

/// Changes a descriptor from `old` to `new` if it still holds `old`: `None` if it did, or what it holds instead.
pub(crate) fn change<M: Memory>(
    memory: &M,
    at: (u64, Attributes),
    (old, new): (u64, u64),
    big_endian: bool,
    updates: Updates,
) -> Result<Option<u64>, BusError> {
    if updates == Updates::Pretend {
        return Ok(None);
    }
    let bytes = |v: u64| if big_endian { v.swap_bytes() } else { v };
    let held = bytes(memory.cas64(Pa(at.0), at.1, bytes(old), bytes(new))?);
    Ok((held != old).then_some(held))
}

/// A stage 1 leaf made writable.
pub(crate) fn dirty_stage1(value: u64) -> u64 {
    value & !bits::AP_READ_ONLY | bits::AF
}

/// A stage 2 leaf made writable.
pub(crate) fn dirty_stage2(value: u64) -> u64 {
    value | bits::S2AP_WRITE | bits::AF
}

/// Marks a leaf dirty. False if its descriptor has changed in another way meanwhile.
#[cold]
pub(crate) fn mark<M: Memory, R: Recorder, U>(
    memory: &M,
    spot: &Spot<U>,
    new: u64,
    big_endian: bool,
    updates: Updates,
    step: impl FnOnce(Rule) -> Step,
    recorder: &mut R,
) -> Result<bool, BusError> {
    match change(memory, (spot.at, spot.attrs), (spot.value, new), big_endian, updates) {
        Ok(None) => {
            recorder.step(step(Rule::Update { new }));
            Ok(true)
        }
        Ok(Some(now)) => Ok(now == new),
        Err(e) => {
            recorder.step(step(Rule::External(e)));
            Err(e)
        }
    }
}
