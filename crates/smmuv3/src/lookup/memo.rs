//! What a port remembers of its look-ups, so that a stream that it has not seen costs the reading of its STE and CD and
//! not their decoding.
//!
//! Nothing is cached that software could notice: STE and CD, their level 1 descriptors and stage 2 of the CD's address are
//! read each time, and a decoded context counts only for the very words that it was decoded from. The registers on which
//! look-ups depend are kept as well; the port begins a new memo when they may have changed.

use std::num::NonZeroU64;

use portcullis_arch::Attributes;
use portcullis_arch::smmuv3::{Cd, Ste};
use portcullis_bus::Initiator;
use portcullis_walk::{Context, Decoded};

use crate::decision::TableRegs;

/// Contexts that a memo keeps at most, of about half a KiB; two with the same hash share a place.
const PLACES: usize = 64;

/// A context, and everything that it follows from besides registers and capabilities.
struct Known {
    /// With the security state, which follows from them.
    attrs: Attributes,
    substream: Option<u32>,
    ste: Ste,
    /// The CD and its index, if stage 1 is on.
    cd: Option<(u32, Cd)>,
    /// The number of the context; `None` if it does not hold for other accesses of the same initiator.
    lasts: Option<NonZeroU64>,
    context: Context,
}

/// The memo of a port.
#[derive(Default)]
pub struct Memo {
    /// Of both interfaces, with the generation at which they were read.
    regs: [Option<(TableRegs, u64)>; 2],
    known: Vec<Option<Box<Known>>>,
    /// Contexts that were kept so far.
    kept: u64,
    /// A context that is not kept.
    answer: Option<Context>,
}

/// Where a memo keeps a context.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(usize);

impl Memo {
    /// The registers of an interface and the generation at which they were read; not the remembered ones if `fresh`.
    #[inline]
    pub(crate) fn registers(
        &mut self,
        secure: bool,
        fresh: bool,
        read: impl FnOnce() -> (TableRegs, u64),
    ) -> (TableRegs, u64) {
        match &mut self.regs[usize::from(secure)] {
            Some(regs) if !fresh => *regs,
            place => *place.insert(read()),
        }
    }

    /// Where a context of these words is, if it is known.
    #[inline]
    pub(crate) fn place(&mut self, from: &Initiator, ste: &Ste) -> Place {
        if self.known.is_empty() {
            self.known.resize_with(PLACES, || None);
        }
        let substream = from.substream.map_or(u64::MAX, |s| u64::from(s.get()));
        let words = ste.0[0] ^ ste.0[2].rotate_left(16) ^ ste.0[3].rotate_left(8);
        let mixed = (words ^ u64::from(from.attrs.bits()) << 32 ^ substream.rotate_left(48))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Place((mixed >> 32) as usize % PLACES)
    }

    /// The context at a place if it is that of this initiator and these words, but for its CD: that is `Some` and still
    /// to be compared, or the context has none.
    #[inline]
    pub(crate) fn find(
        &self,
        place: Place,
        from: &Initiator,
        ste: &Ste,
    ) -> Option<(&Context, Option<(u32, &Cd)>)> {
        let k = self.known.get(place.0)?.as_deref()?;
        let same = k.lasts.is_some()
            && k.attrs == from.attrs
            && k.substream == from.substream.map(|s| s.get())
            && same_words(&k.ste.0, &ste.0);
        same.then(|| (&k.context, k.cd.as_ref().map(|(index, cd)| (*index, cd))))
    }

    /// Keeps a context.
    pub(crate) fn keep(
        &mut self,
        place: Place,
        from: &Initiator,
        ste: &Ste,
        cd: Option<(u32, Cd)>,
        lasts: bool,
        context: Context,
    ) {
        let substream = from.substream.map(|s| s.get());
        self.kept += 1;
        let lasts = NonZeroU64::new(self.kept).filter(|_| lasts);
        let known = Known { attrs: from.attrs, substream, ste: *ste, cd, lasts, context };
        match self.known.get_mut(place.0) {
            Some(Some(old)) => **old = known,
            Some(none) => *none = Some(Box::new(known)),
            None => {}
        }
    }

    /// The context at a place.
    #[inline]
    pub(crate) fn context(&self, place: Place) -> Option<Decoded<'_>> {
        let known = self.known.get(place.0)?.as_deref()?;
        Some(Decoded { context: &known.context, number: known.lasts })
    }

    /// Holds a context for its port without remembering it.
    pub(crate) fn once(&mut self, context: Context) -> Decoded<'_> {
        Decoded { context: self.answer.insert(context), number: None }
    }
}

/// Equality word by word: words that have just been read one by one are slow to read in larger pieces.
#[inline(always)]
pub(crate) fn same_words(a: &[u64; 8], b: &[u64; 8]) -> bool {
    for (a, b) in a.iter().zip(b) {
        if a != b {
            return false;
        }
    }
    true
}
