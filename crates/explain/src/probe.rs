//! A copy of an SMMU's registers over the same memory, to read what has no accessor and to try what would be if.

use std::sync::Arc;

use portcullis_arch::smmuv2::offset::{cb, gr0, gr1, page};
use portcullis_arch::smmuv2::{Cr2, Fsr};
use portcullis_arch::{Access, Attributes, Iova, Pa};
use portcullis_bus::{BusError, Initiator, Memory, Mmio};
use portcullis_smmuv2::{Config, Explanation, Interrupts, SmmuV2, Window};
use portcullis_walk::Tcu;

/// Memory that belongs to somebody else. Only the copy's walker uses it, and walkers only read.
pub(crate) struct Borrowed<'a, M>(&'a M);

impl<M: Memory> Memory for Borrowed<'_, M> {
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        self.0.read(pa, attrs, buf)
    }
    fn write(&self, _: Pa, _: Attributes, _: &[u8]) -> Result<(), BusError> {
        Err(BusError::Slave)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        self.0.load64(pa, attrs)
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        self.0.load32(pa, attrs)
    }
    fn cas64(&self, _: Pa, _: Attributes, _: u64, _: u64) -> Result<u64, BusError> {
        Err(BusError::Slave)
    }
}

/// The copy. Its window is the secure one, which reaches every register.
pub(crate) struct Probe<'a, M: Memory> {
    smmu: Arc<SmmuV2<Borrowed<'a, M>>>,
    window: Window<Borrowed<'a, M>>,
}

/// A register of the copy.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Register {
    /// Of a context bank, by bank and offset.
    Bank(u8, usize),
    /// S2CR of a group.
    S2cr(u16),
}

impl<'a, M: Memory> Probe<'a, M> {
    /// `None` only if the model refuses its own configuration and state.
    pub fn of(smmu: &'a SmmuV2<M>) -> Option<Self> {
        let copy = SmmuV2::new(smmu.config().clone(), Borrowed(smmu.walker()), Interrupts::default()).ok()?;
        copy.restore(smmu.save()).ok()?;
        let window = copy.window(true);
        Some(Self { smmu: copy, window })
    }

    pub fn config(&self) -> &Config {
        self.smmu.config()
    }

    /// A descriptor-sized word as the table walker sees it.
    pub fn load64(&self, pa: u64, attrs: Attributes) -> Result<u64, BusError> {
        self.smmu.walker().load64(Pa(pa), attrs)
    }

    fn page(&self, n: u64) -> u64 {
        n << if self.config().page_64k { 16 } else { 12 }
    }

    fn bank_offset(&self, bank: u8, at: usize) -> u64 {
        self.page(self.config().global_pages() + u64::from(bank)) + at as u64
    }

    fn read32(&self, offset: u64) -> u32 {
        self.window.read32(offset).unwrap_or(0)
    }

    fn write32(&self, offset: u64, value: u32) {
        // The offset is inside the window by construction, and registers do not refuse writes.
        let _ = self.window.write32(offset, value);
    }

    pub fn bank32(&self, bank: u8, at: usize) -> u32 {
        self.read32(self.bank_offset(bank, at))
    }

    pub fn bank64(&self, bank: u8, at: usize) -> u64 {
        u64::from(self.bank32(bank, at)) | u64::from(self.bank32(bank, at + 4)) << 32
    }

    pub fn cbfrsynra(&self, bank: u8) -> u32 {
        self.read32(self.page(1) + gr1::CBFRSYNRA as u64 + 4 * u64::from(bank))
    }

    /// A register of global space 0 that exists once per security state.
    pub fn banked32(&self, at: usize, secure: bool) -> u32 {
        let alias = if self.config().secure && !secure { gr0::NS_ALIAS } else { 0 };
        self.read32((at + alias) as u64)
    }

    /// Where a group's registers are. With more than 128 groups the last 128 are in global space 0, and all of them in
    /// pages of their own while EXSMRGENABLE is set.
    fn group_offset(&self, group: u16, smr: bool) -> Option<u64> {
        let groups = self.config().stream_groups;
        let at = 4 * u64::from(group);
        if groups > 128 && Cr2::from_bits(self.banked32(gr0::CR2, self.config().secure)).exsmrgenable() {
            let own = if smr { page::EXSMR } else { page::EXS2CR };
            return Some(self.page(own as u64) + at);
        }
        let first = u64::from(groups.saturating_sub(128));
        let at = at.checked_sub(4 * first)?;
        Some(at + if smr { gr0::SMR } else { gr0::S2CR } as u64)
    }

    /// SMR and S2CR of a group.
    pub fn group(&self, group: u16) -> (u32, u32) {
        let get = |smr| self.group_offset(group, smr).map_or(0, |at| self.read32(at));
        (get(true), get(false))
    }

    /// Forgets recorded faults and stalled transactions, which would stand before any other answer.
    pub fn clear_faults(&self) {
        for bank in 0..self.config().context_banks {
            if self.bank32(bank, cb::FSR) & (Fsr::W1C | Fsr::new().with_ss(true).into_bits()) != 0 {
                self.write32(self.bank_offset(bank, cb::FSR), Fsr::W1C);
                self.write32(self.bank_offset(bank, cb::RESUME), 1);
            }
        }
    }

    pub fn explain(&self, from: Initiator, va: u64, access: Access) -> Explanation {
        self.smmu.explain(from, Iova(va), access)
    }

    /// Runs `f` while registers have other values, and puts the old ones back.
    pub fn with<R>(&self, changes: &[(Register, u32)], f: impl FnOnce(&Self) -> R) -> R {
        let places: Vec<(u64, u32, u32)> = changes
            .iter()
            .filter_map(|(register, value)| {
                let at = match *register {
                    Register::Bank(bank, at) => self.bank_offset(bank, at),
                    Register::S2cr(group) => self.group_offset(group, false)?,
                };
                Some((at, self.read32(at), *value))
            })
            .collect();
        places.iter().for_each(|(at, _, new)| self.write32(*at, *new));
        let result = f(self);
        places.iter().rev().for_each(|(at, old, _)| self.write32(*at, *old));
        result
    }
}
