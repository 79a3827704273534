//! What a port keeps of a stream's configuration: its slots, and what their last walk said.

use std::num::NonZeroU64;

use portcullis_arch::{Access, Attributes};
use portcullis_bus::Initiator;

use crate::long::{Alike, Usual};
use crate::perms::Perms;
use crate::tbu::Context;
use crate::tlb::{ContextIndex, Entry, Sizes, Tlb};

pub(crate) struct Cached {
    pub(crate) context: Box<Context>,
    /// The memo's number for it.
    pub(crate) number: Option<NonZeroU64>,
    pub(crate) index: ContextIndex,
    pub(crate) usual: Option<Usual>,
    pub(crate) seen: Seen,
}

/// What the leaf of the last walk said, so that the next one, which most often leads to a leaf that says the same, need not ask
/// again. Descriptors are read all the same; only what follows from their words is known.
pub(crate) struct Seen {
    pub(crate) alike: Alike,
    pub(crate) perms: Perms,
    pub(crate) global: bool,
    /// Where its attributes are in the port's table.
    pub(crate) attrs: u8,
}

impl Seen {
    pub(crate) const NOTHING: Self = Self { alike: Alike::NOTHING, perms: Perms(0), global: false, attrs: 0 };
}

impl Cached {
    pub(crate) fn new(context: &Context, number: Option<NonZeroU64>, index: ContextIndex) -> Self {
        let usual = Self::usual(context);
        Self { context: Box::new(context.clone()), number, index, usual, seen: Seen::NOTHING }
    }

    /// Becomes another context in the same memory.
    pub(crate) fn take(&mut self, context: &Context, number: Option<NonZeroU64>, index: ContextIndex) {
        *self.context = context.clone();
        (self.number, self.index) = (number, index);
        (self.usual, self.seen) = (Self::usual(context), Seen::NOTHING);
    }

    fn usual(context: &Context) -> Option<Usual> {
        Usual::of(&context.stages).filter(|_| context.cacheable && context.after.is_none())
    }
}

pub(crate) enum Config {
    Bypass { attrs: Attributes, mask: u64, strict: bool },
    Translate(Cached),
}

/// What a hit needs of a slot, in one cache line (with the first of its page sizes).
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Hot {
    pub(crate) key: [u64; 2],
    /// The slot counts only while this equals the port's stamp.
    pub(crate) stamp: u64,
    pub(crate) va_mask: u64,
    /// Of reads and writes.
    pub(crate) overlay: [u32; 2],
    /// Bits of [`Perms`] that a read and a write need; 0 for streams that are not translated.
    pub(crate) need: [u8; 2],
    /// The outgoing attributes are the tables' with `overlay`; otherwise they take a computation.
    pub(crate) simple: bool,
    pub(crate) sizes: Sizes,
}

impl Hot {
    pub(crate) fn new(key: [u64; 2], stamp: u64) -> Self {
        let sizes = Sizes::default();
        Self { key, stamp, va_mask: 0, overlay: [0; 2], need: [0; 2], simple: false, sizes }
    }
}

#[repr(C, align(64))]
pub(crate) struct Slot {
    pub(crate) hot: Hot,
    pub(crate) config: Config,
}

impl Slot {
    /// Of no initiator: ports' stamps begin with 1.
    pub(crate) fn empty() -> Self {
        let config = Config::Bypass { attrs: Attributes::DEVICE_DEFAULT, mask: 0, strict: false };
        Self { hot: Hot::new([0; 2], 0), config }
    }
}

/// The second word of an initiator without a substream.
pub(crate) const NO_SUBSTREAM: u64 = u64::MAX;

/// Forgets the configuration of the initiators whose stream and substream `named` names.
pub(crate) fn forget_slots(slots: &mut [Slot], named: impl Fn(u32, u64) -> bool) {
    for slot in slots {
        if named(slot.hot.key[0] as u32, slot.hot.key[1]) {
            slot.hot.stamp = 0;
        }
    }
}

/// An initiator as two words, for one comparison.
#[inline(always)]
pub(crate) fn key_of(from: &Initiator) -> [u64; 2] {
    let substream = from.substream.map_or(NO_SUBSTREAM, |s| u64::from(s.get()));
    [u64::from(from.stream.get()) | u64::from(from.attrs.bits()) << 32, substream]
}

/// The outgoing attributes where they are more than the tables' with an overlay.
#[inline(never)]
pub(crate) fn outgoing_of(slot: &Slot, tables: Attributes, access: Access) -> Attributes {
    match &slot.config {
        Config::Translate(c) => c.context.outgoing(tables).of(access),
        Config::Bypass { attrs, .. } => attrs.of(access),
    }
}

/// Fills the TLB for a slot.
#[inline(always)]
pub(crate) fn keep(tlb: &mut Tlb, stamp: &mut u64, slot: &mut Slot, input: u64, entry: Entry) {
    let Config::Translate(c) = &slot.config else { return };
    let epoch = tlb.epoch();
    tlb.fill_with(c.index, &mut slot.hot.sizes, input, entry);
    if tlb.epoch() != epoch {
        // The TLB started over: every other slot is looked up again when it is next needed.
        *stamp += 1;
        slot.hot.stamp = *stamp;
    }
}
