//! Addresses below 4 GiB first: what PCI devices get as long as there are any.

use core::sync::atomic::{AtomicBool, Ordering};

use portcullis_arch::Iova;

use super::IovaError;

/// The last address of 32 bits.
const LAST_32BIT: u64 = 0xffff_ffff;

/// Whether a device is given addresses of 32 bits although it can do more (Linux `pci_32bit_workaround`). Some devices claim
/// more than they can, and short addresses spare dual address cycles. Once that fails, the preference is given up for good: the
/// next attempts would search a full space in vain.
#[derive(Debug)]
pub struct Preference(AtomicBool);

impl Preference {
    /// With or without the preference.
    pub fn new(prefer_32bit: bool) -> Self {
        Self(AtomicBool::new(prefer_32bit))
    }

    /// True as long as short addresses are tried first.
    pub fn is_32bit(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Allocates at or below `limit`. `alloc` gets the limit to use and whether this is the last try: only then should it have caches
    /// given back ([`IovaDomain::alloc`](super::IovaDomain::alloc)), before that it should not
    /// ([`try_alloc`](super::IovaDomain::try_alloc)).
    #[inline(always)]
    pub fn alloc(
        &self,
        limit: Iova,
        mut alloc: impl FnMut(Iova, bool) -> Result<Iova, IovaError>,
    ) -> Result<Iova, IovaError> {
        if limit.get() > LAST_32BIT && self.is_32bit() {
            match alloc(Iova(LAST_32BIT), false) {
                Err(IovaError::Full { .. }) => self.0.store(false, Ordering::Relaxed),
                done => return done,
            }
        }
        alloc(limit, true)
    }
}
