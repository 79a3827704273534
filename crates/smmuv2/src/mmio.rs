//! Register accesses: which page, which register, in which piece (IHI 0062D chapter 8).

use std::sync::Arc;

use portcullis_arch::smmuv2::offset::{cb, gr0, page};
use portcullis_bus::{BusError, Memory, Mmio};

use crate::model::{Live, SmmuV2};

/// The register window for software of one security state. On a ZynqMP only the APU reaches it, which is why ports
/// do not lead here.
pub struct Window<M> {
    smmu: Arc<SmmuV2<M>>,
    secure: bool,
}

impl<M: Memory> Window<M> {
    pub(crate) fn new(smmu: Arc<SmmuV2<M>>, secure: bool) -> Self {
        // Without two security states there is one set of registers, the non-secure one.
        let secure = secure && smmu.config.secure;
        Self { smmu, secure }
    }
}

/// A place in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Global page and offset in it.
    Global(usize, usize),
    /// Context bank and offset in its page.
    Bank(usize, usize),
}

impl<M: Memory> Mmio for Window<M> {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) -> Result<(), BusError> {
        data.fill(0);
        let Some(place) = self.place(offset) else { return Err(BusError::Decode) };
        if !offset.is_multiple_of(data.len().max(1) as u64) {
            return Ok(());
        }
        // One lock for all of an access: an aligned 64-bit access is not torn.
        let mut live = self.smmu.lock();
        if self.denied(&live, place) {
            return Ok(());
        }
        match data {
            [byte] => *byte = live.regs.compindex_byte(&self.smmu.config, place, self.secure, None),
            [_, _, _, _] => data.copy_from_slice(&self.read_word(&mut live, place).to_le_bytes()),
            [_, _, _, _, _, _, _, _] => {
                let (low, high) = data.split_at_mut(4);
                low.copy_from_slice(&self.read_word(&mut live, place).to_le_bytes());
                high.copy_from_slice(&self.read_word(&mut live, place.plus(4)).to_le_bytes());
            }
            _ => {}
        }
        Ok(())
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) -> Result<(), BusError> {
        let Some(place) = self.place(offset) else { return Err(BusError::Decode) };
        if !offset.is_multiple_of(data.len().max(1) as u64) {
            return Ok(());
        }
        let smmu = &*self.smmu;
        let mut live = smmu.lock();
        if self.denied(&live, place) {
            return Ok(());
        }
        if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            let value = u32::from_le_bytes(bytes);
            if is_wide_operation(place) {
                smmu.write_operation(&mut live, place, self.secure, value.into());
            } else if !is_wide_operation(place.minus(4)) {
                smmu.write_word(&mut live, place, self.secure, value);
            }
        } else if let Ok(bytes) = <[u8; 8]>::try_from(data) {
            let value = u64::from_le_bytes(bytes);
            if is_wide_operation(place) {
                smmu.write_operation(&mut live, place, self.secure, value);
            } else {
                smmu.write_word(&mut live, place, self.secure, value as u32);
                smmu.write_word(&mut live, place.plus(4), self.secure, (value >> 32) as u32);
            }
        } else if let [byte] = data {
            live.regs.compindex_byte(&smmu.config, place, self.secure, Some(*byte));
            smmu.log.publish(portcullis_walk::Invalidation::Config);
        }
        smmu.interrupts.update(&smmu.config, &live.regs);
        Ok(())
    }
}

impl<M: Memory> Window<M> {
    fn place(&self, offset: u64) -> Option<Place> {
        let c = &self.smmu.config;
        if offset >= c.window_size() {
            return None;
        }
        let within = (offset & ((1 << c.page_shift()) - 1)) as usize;
        let page = offset >> c.page_shift();
        Some(match page.checked_sub(c.global_pages()) {
            Some(bank) => Place::Bank(bank as usize, within),
            None => Place::Global(page as usize, within),
        })
    }

    /// SCR1.GASRAE takes all global registers, operations included, away from non-secure software.
    fn denied(&self, live: &Live, place: Place) -> bool {
        let global = matches!(place, Place::Global(..));
        global && !self.secure && self.smmu.config.secure && live.regs.scr1().gasrae()
    }

    fn read_word(&self, live: &mut Live, place: Place) -> u32 {
        match place {
            Place::Global(page, at) => self.smmu.read_global(live, page, at, self.secure),
            Place::Bank(n, at) => self.smmu.read_bank(live, n, at, self.secure),
        }
    }
}

impl Place {
    fn plus(self, n: usize) -> Self {
        match self {
            Self::Global(p, o) => Self::Global(p, o + n),
            Self::Bank(b, o) => Self::Bank(b, o + n),
        }
    }
    fn minus(self, n: usize) -> Self {
        match self {
            Self::Global(p, o) => Self::Global(p, o.wrapping_sub(n)),
            Self::Bank(b, o) => Self::Bank(b, o.wrapping_sub(n)),
        }
    }
}

/// The 64-bit write-only operation registers: a 64-bit write operates, a 32-bit write to the low word operates
/// zero-extended, one to the high word is ignored.
fn is_wide_operation(place: Place) -> bool {
    match place {
        Place::Global(0, at) => {
            matches!(at, gr0::STLBIVALM | gr0::STLBIVAM | gr0::TLBIVALH64 | gr0::TLBIVAH64) || is_gats(at)
        }
        Place::Global(..) => false,
        Place::Bank(_, at) => {
            matches!(
                at,
                cb::TLBIVA | cb::TLBIVAA | cb::TLBIVAL | cb::TLBIVAAL | cb::TLBIIPAS2 | cb::TLBIIPAS2L
            ) || (at.is_multiple_of(8) && (cb::ATS1PR..=cb::ATS1UW).contains(&at))
        }
    }
}

/// The eight global address translation operations, also through the secure alias.
pub(crate) fn is_gats(at: usize) -> bool {
    let at = if at >= gr0::NS_ALIAS { at - gr0::NS_ALIAS } else { at };
    at.is_multiple_of(8) && (gr0::GATS1UR..=gr0::GATS12PW).contains(&at)
}

impl<M: Memory> SmmuV2<M> {
    fn write_word(&self, live: &mut Live, place: Place, secure: bool, value: u32) {
        match place {
            Place::Global(page, at) => self.write_global(live, page, at, secure, value),
            Place::Bank(n, at) => self.write_bank(live, n, at, secure, value),
        }
    }

    fn write_operation(&self, live: &mut Live, place: Place, secure: bool, value: u64) {
        match place {
            Place::Global(_, at) if is_gats(at) => {
                self.global_translation_operation(&mut live.regs, at, secure, value);
            }
            Place::Global(_, at) => self.global_invalidation(&live.regs, at, secure, value),
            Place::Bank(n, at) if at >= cb::ATS1PR => {
                self.bank_translation_operation(&mut live.regs, n, at, secure, value);
            }
            Place::Bank(n, at) => self.bank_invalidation(&live.regs, n, at, secure, value),
        }
    }
}

impl crate::state::Regs {
    /// Reads (or writes, then reads) one byte of the compressed index table.
    fn compindex_byte(&mut self, c: &crate::Config, place: Place, secure: bool, write: Option<u8>) -> u8 {
        let Place::Global(page @ page::COMPINDEX.., at) = place else { return 0 };
        if page >= page::COMPINDEX + page::COMPINDEX_PAGES
            || !self.side[usize::from(secure)].cr2().compindexenable()
        {
            return 0;
        }
        let index = ((page - page::COMPINDEX) << c.page_shift()) + at;
        let Some(byte) = self.compindex.get_mut(index) else { return 0 };
        if let Some(value) = write {
            *byte = value;
        }
        *byte
    }

    /// Reads (or writes, then reads) four bytes of it.
    pub(crate) fn compindex_word(
        &mut self,
        c: &crate::Config,
        page: usize,
        at: usize,
        secure: bool,
        w: Option<u32>,
    ) -> u32 {
        let bytes: [u8; 4] = std::array::from_fn(|i| {
            let byte = w.map(|v| v.to_le_bytes()[i]);
            self.compindex_byte(c, Place::Global(page, at + i), secure, byte)
        });
        u32::from_le_bytes(bytes)
    }
}
