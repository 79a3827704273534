//! What a port remembers of the registers, so that a stream that it has not seen costs neither the lock nor the decoding
//! of its bank. The port begins a new memo whenever registers may have changed.

use std::num::NonZeroU64;

use portcullis_arch::Attributes;
use portcullis_walk::{Context, Decoded};

use crate::stall::Stalls;
use crate::state::Regs;

/// Contexts that a memo keeps at most, of about half a KiB; two with the same hash share a place.
const PLACES: usize = 64;
/// Look-ups under the lock before the registers are copied: software that changes registers all the time would make a
/// port copy them for nothing.
const LOOKS: u8 = 4;

/// A context, and what it follows from besides registers.
struct Known {
    bank: u8,
    secure: bool,
    /// After S2CR.
    incoming: Attributes,
    number: NonZeroU64,
    context: Context,
}

/// The memo of a port.
#[derive(Default)]
pub struct Memo {
    looks: u8,
    /// A copy without stalled transactions. Faults may have been cleared since, and only that: whatever else has a say
    /// in what becomes of a transaction makes the port begin a new memo when it changes.
    regs: Option<Box<Regs>>,
    contexts: Contexts,
}

impl Memo {
    /// The registers if they have been copied, and the contexts.
    pub(crate) fn parts(&mut self) -> (Option<&Regs>, &mut Contexts) {
        (self.regs.as_deref(), &mut self.contexts)
    }

    /// Counts a look-up under the lock, in these registers.
    pub(crate) fn looked(&mut self, regs: &Regs) -> &mut Contexts {
        self.looks = self.looks.saturating_add(1);
        if self.looks == LOOKS {
            // Naming every field makes a new one break the build until it is handled here.
            let Regs { side, scr1, smr, s2cr, compindex, banks, stalls: _, tbuqos } = regs;
            self.regs = Some(Box::new(Regs {
                side: side.clone(),
                scr1: *scr1,
                smr: smr.clone(),
                s2cr: s2cr.clone(),
                compindex: compindex.clone(),
                banks: banks.clone(),
                stalls: Stalls::default(),
                tbuqos: *tbuqos,
            }));
        }
        &mut self.contexts
    }

    /// The context at a place.
    pub(crate) fn context(&self, place: Place) -> Option<Decoded<'_>> {
        self.contexts.get(place)
    }
}

/// Where a context is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place(usize);

/// Decoded contexts of one state of the registers.
#[derive(Default)]
pub(crate) struct Contexts {
    places: Vec<Option<Box<Known>>>,
    /// Contexts that were decoded so far.
    decoded: u64,
}

impl Contexts {
    /// Finds the context of a bank for transactions whose attributes after S2CR are `incoming`; takes it from `decode` if
    /// it is new.
    pub fn find(
        &mut self,
        bank: u8,
        secure: bool,
        incoming: Attributes,
        decode: impl FnOnce() -> Context,
    ) -> (Place, &Context) {
        if self.places.is_empty() {
            self.places.resize_with(PLACES, || None);
        }
        let mixed = (u64::from(incoming.bits()) << 8 | u64::from(bank)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let at = (mixed >> 32) as usize % PLACES;
        let place = &mut self.places[at];
        let same = |k: &Known| k.bank == bank && k.secure == secure && k.incoming == incoming;
        if !place.as_deref().is_some_and(same) {
            *place = None;
        }
        let known = place.get_or_insert_with(|| {
            self.decoded += 1;
            let number = NonZeroU64::MIN.saturating_add(self.decoded);
            Box::new(Known { bank, secure, incoming, number, context: decode() })
        });
        (Place(at), &known.context)
    }

    /// The context at a place.
    pub fn get(&self, place: Place) -> Option<Decoded<'_>> {
        let known = self.places.get(place.0)?.as_deref()?;
        Some(Decoded { context: &known.context, number: Some(known.number) })
    }
}
