//! Registers of the global pages (IHI 0062D chapters 9 to 11; DDI 0517 for MMU-500's page 2).

use portcullis_arch::smmuv2::offset::{gr0, gr1, page};
use portcullis_arch::smmuv2::{Cr0, Gfsr, Gfsynr0, Idr0, Idr1, Idr2, S2cr, Scr1};
use portcullis_bus::Memory;
use portcullis_walk::Invalidation;

use crate::config::Config;
use crate::fault::retry_all;
use crate::matching::{extension_on, groups_of, non_secure_groups};
use crate::model::{Live, SmmuV2};
use crate::state::Regs;

/// CR0 bits that MMU-500 fixes: SMCFCFG (1), GSE, STALLD, GCFGFIE, GCFGFRE (0).
const MMU500_CR0_FIXED: u32 = 0x0020_0330;
/// SCR1 bits that MMU-500 fixes: NSCAFRO, NSNUMIRPTO.
const MMU500_SCR1_FIXED: u32 = 0x10ff_0000;
/// Fields of SCR1.
const SCR1_MASK: u32 = 0x3fff_ffff;
/// Fields of CBAR: IRPTNDX belongs to SMMUv1.
pub(crate) const CBAR_MASK: u32 = 0x00ff_ffff;
/// Fields of S2CR that are stored (31:30 are implementation defined).
const S2CR_MASK: u32 = 0x3fff_ffff;

/// MMU-500's peripheral (4 to 7, 0 to 3) and component identification.
const MMU500_IDS: [u32; 12] = [0x04, 0, 0, 0, 0x81, 0xb4, 0x1b, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

mod page2 {
    pub const TBUQOS0: usize = 0x100;
    pub const TBU_PWR_STATUS: usize = 0x204;
}

/// Which copy of a banked register an access means, and the register's plain offset.
fn side_of(at: usize, secure: bool) -> (usize, usize) {
    let aliased = (gr0::NS_ALIAS..gr0::SMR).contains(&at);
    match (secure, aliased) {
        (true, true) => (0, at - gr0::NS_ALIAS),
        (true, false) => (1, at),
        (false, _) => (0, at),
    }
}

/// The registers that secure software finds again at +0x400.
fn has_alias(at: usize) -> bool {
    matches!(
        at,
        gr0::CR0 | gr0::CR2 | gr0::ACR | 0x40..=0x5b | gr0::TLBGSYNC | gr0::TLBGSTATUS | 0x100..=0x13f | 0x180..=0x18b
    )
}

/// Replaces the low or high half of a 64-bit register.
pub(crate) fn set_half(reg: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *reg = *reg & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

/// The low or high half of a 64-bit register.
pub(crate) fn half(reg: u64, high: bool) -> u32 {
    if high { (reg >> 32) as u32 } else { reg as u32 }
}

/// GFAR keeps the bits that the bus delivers.
pub(crate) fn gfar_mask(c: &Config) -> u64 {
    c.upstream_mask()
}

impl<M: Memory> SmmuV2<M> {
    pub(crate) fn read_global(&self, live: &mut Live, page: usize, at: usize, secure: bool) -> u32 {
        match page {
            0 => self.read_space0(live, at, secure),
            1 => self.read_space1(&live.regs, at, secure),
            page::IMPDEF => self.read_page2(&live.regs, at),
            page::EXSMR | page::EXS2CR if self.config.extended_groups() => {
                let (index, ok) = extended_group(&self.config, &live.regs, at, secure);
                let bank = if page == page::EXSMR { &live.regs.smr } else { &live.regs.s2cr };
                bank.get(index).filter(|_| ok).copied().unwrap_or(0)
            }
            p if (page::COMPINDEX..page::COMPINDEX + page::COMPINDEX_PAGES).contains(&p) => {
                live.regs.compindex_word(&self.config, page, at, secure, None)
            }
            _ => 0,
        }
    }

    pub(crate) fn write_global(&self, live: &mut Live, page: usize, at: usize, secure: bool, value: u32) {
        match page {
            0 => self.write_space0(live, at, secure, value),
            1 => self.write_space1(&mut live.regs, at, secure, value),
            page::IMPDEF if self.config.mmu500 => {
                let n = at.wrapping_sub(page2::TBUQOS0) / 4;
                if at >= page2::TBUQOS0 && n < live.regs.tbuqos.len() {
                    live.regs.tbuqos[n] = value;
                }
            }
            page::EXSMR | page::EXS2CR if self.config.extended_groups() => {
                let (index, ok) = extended_group(&self.config, &live.regs, at, secure);
                if ok {
                    self.write_group(&mut live.regs, index, page == page::EXSMR, value);
                }
            }
            p if (page::COMPINDEX..page::COMPINDEX + page::COMPINDEX_PAGES).contains(&p) => {
                live.regs.compindex_word(&self.config, page, at, secure, Some(value));
                self.log.publish(Invalidation::Config);
            }
            _ => {}
        }
    }

    fn read_page2(&self, regs: &Regs, at: usize) -> u32 {
        if !self.config.mmu500 {
            return 0;
        }
        match at {
            page2::TBU_PWR_STATUS => (1u32 << self.config.tbus.min(31)) - 1,
            page2::TBUQOS0.. => regs.tbuqos.get((at - page2::TBUQOS0) / 4).copied().unwrap_or(0),
            _ => 0,
        }
    }

    fn read_space0(&self, live: &mut Live, at: usize, secure: bool) -> u32 {
        let c = &self.config;
        if let Some((index, smr)) = group_at(c, &live.regs, at, secure) {
            let bank = if smr { &live.regs.smr } else { &live.regs.s2cr };
            return if smr && !c.stream_matching { 0 } else { bank.get(index).copied().unwrap_or(0) };
        }
        if (gr0::PIDR4..gr0::PIDR4 + 4 * MMU500_IDS.len()).contains(&at) {
            return if c.mmu500 { MMU500_IDS[(at - gr0::PIDR4) / 4] } else { 0 };
        }
        let (s, reg) = side_of(at, secure);
        if reg != at && !has_alias(reg) {
            return 0;
        }
        let side = &live.regs.side[s];
        match reg {
            gr0::CR0 => side.cr0,
            gr0::SCR1 if secure => live.regs.scr1,
            gr0::CR2 => side.cr2,
            gr0::ACR => side.acr,
            gr0::IDR0 => self.idr0_for(&live.regs, secure).into_bits(),
            gr0::IDR1 => self.idr1_for(&live.regs, secure).into_bits(),
            gr0::IDR2 => self.idr2_for(&live.regs, secure).into_bits(),
            gr0::IDR7 => c.revision.into(),
            gr0::GFAR | 0x44 => half(side.gfar, reg == 0x44),
            gr0::GFSR => side.gfsr,
            gr0::GFSYNR0 => side.gfsynr[0],
            gr0::GFSYNR1 => side.gfsynr[1] & stream_mask(c, secure),
            gr0::GFSYNR2 => side.gfsynr[2],
            gr0::TLBGSTATUS => u32::from(!live.global_sync[s].poll()),
            gr0::GPAR | 0x184 if c.translation_ops => half(side.gpar, reg == 0x184),
            _ => 0,
        }
    }

    fn idr0_for(&self, regs: &Regs, secure: bool) -> Idr0 {
        let id = self.config.idr0();
        if secure || !self.config.secure {
            return id;
        }
        id.with_ses(false).with_numsmrg(regs.scr1().nsnumsmrgo().min(id.numsmrg()))
    }

    fn idr1_for(&self, regs: &Regs, secure: bool) -> Idr1 {
        let id = self.config.idr1();
        if secure || !self.config.secure {
            return id;
        }
        id.with_ssdtp(0).with_numssdndxb(0).with_numcb(regs.scr1().nsnumcbo().min(id.numcb()))
    }

    fn idr2_for(&self, regs: &Regs, secure: bool) -> Idr2 {
        let id = self.config.idr2();
        if secure || !self.config.secure || !self.config.extended_groups() {
            return id;
        }
        id.with_exnumsmrg(non_secure_groups(&self.config, regs) as u16)
    }

    fn write_space0(&self, live: &mut Live, at: usize, secure: bool, value: u32) {
        let c = &self.config;
        if let Some((index, smr)) = group_at(c, &live.regs, at, secure) {
            self.write_group(&mut live.regs, index, smr, value);
            return;
        }
        let (s, reg) = side_of(at, secure);
        if reg != at && !has_alias(reg) {
            return;
        }
        let side = &mut live.regs.side[s];
        match reg {
            gr0::CR0 => {
                side.cr0 = cr0_write(c, side.cr0, value, s == 1);
                self.log.publish(Invalidation::Config);
            }
            gr0::SCR1 if secure => {
                let value = scr1_write(c, live.regs.scr1, value);
                self.write_scr1(&mut live.regs, value);
            }
            gr0::CR2 => {
                side.cr2 = value & cr2_mask(c, s == 1);
                self.log.publish(Invalidation::Config);
            }
            gr0::ACR => side.acr = value & acr_mask(c, s == 1),
            gr0::GFAR | 0x44 => {
                set_half(&mut side.gfar, reg == 0x44, value);
                side.gfar &= gfar_mask(c);
            }
            gr0::GFSR => side.gfsr &= !value,
            gr0::GFSRRESTORE => side.gfsr = value & Gfsr::MASK,
            gr0::GFSYNR0 => side.gfsynr[0] = value & gfsynr0_mask(c, s == 1),
            gr0::GFSYNR1 => {
                let mask = stream_mask(c, secure);
                side.gfsynr[1] = side.gfsynr[1] & !mask | value & mask;
            }
            gr0::GFSYNR2 => side.gfsynr[2] = value,
            gr0::TLBGSYNC => {
                let token = self.log.begin_sync();
                live.global_sync[s].merge(token);
            }
            gr0::GPAR | 0x184 if c.translation_ops => set_half(&mut side.gpar, reg == 0x184, value),
            _ => self.global_invalidation(&live.regs, at, secure, value.into()),
        }
    }

    /// A change of ownership retries what is stalled in banks that change hands.
    fn write_scr1(&self, regs: &mut Regs, value: u32) {
        let (old, new) = (regs.scr1().nsnumcbo(), Scr1::from_bits(value).nsnumcbo());
        regs.scr1 = value;
        for n in old.min(new)..old.max(new) {
            retry_all(regs, n);
        }
        self.log.publish(Invalidation::Config);
    }

    fn write_group(&self, regs: &mut Regs, index: usize, smr: bool, value: u32) {
        let c = &self.config;
        if smr {
            if c.stream_matching
                && let Some(r) = regs.smr.get_mut(index)
            {
                *r = value & smr_mask(c);
            }
        } else if let Some(r) = regs.s2cr.get_mut(index) {
            *r = value & s2cr_mask(c);
        }
        self.log.publish(Invalidation::Config);
    }

    fn read_space1(&self, regs: &Regs, at: usize, secure: bool) -> u32 {
        let Some((n, base)) = self.bank_register(regs, at, secure) else { return 0 };
        let Some(bank) = regs.banks.get(n) else { return 0 };
        match base {
            gr1::CBAR => bank.cbar,
            gr1::CBFRSYNRA => bank.cbfrsynra & stream_mask(&self.config, secure),
            _ => bank.cba2r,
        }
    }

    fn write_space1(&self, regs: &mut Regs, at: usize, secure: bool, value: u32) {
        let Some((n, base)) = self.bank_register(regs, at, secure) else { return };
        let c = &self.config;
        let Some(bank) = regs.banks.get_mut(n) else { return };
        match base {
            gr1::CBAR => bank.cbar = value & CBAR_MASK,
            gr1::CBFRSYNRA => {
                let mask = stream_mask(c, secure);
                bank.cbfrsynra = bank.cbfrsynra & !mask | value & mask;
                return;
            }
            _ => bank.cba2r = cba2r_write(c, value),
        }
        retry_all(regs, n as u8);
        self.log.publish(Invalidation::Config);
    }

    /// The bank and register of an offset in global space 1, if this security state may touch it.
    fn bank_register(&self, regs: &Regs, at: usize, secure: bool) -> Option<(usize, usize)> {
        let base = match at {
            gr1::CBAR..0x200 => gr1::CBAR,
            gr1::CBFRSYNRA..0x600 => gr1::CBFRSYNRA,
            gr1::CBA2R..0xa00 => gr1::CBA2R,
            _ => return None,
        };
        let n = (at - base) / 4;
        let allowed = n < regs.banks.len() && (secure || !regs.bank_is_secure(&self.config, n));
        allowed.then_some((n, base))
    }
}

/// The StreamID of a fault, and for secure software the SSD index above it, in GFSYNR1 and CBFRSYNRA. MMU-500 has
/// 15 bits of each.
pub(crate) fn stream_mask(c: &Config, secure: bool) -> u32 {
    let id = if c.mmu500 { 0x7fff } else { 0xffff };
    if secure { id << 16 | id } else { id }
}

/// NESTED is in the non-secure copy of GFSYNR0, NSSTATE in the secure one; ATS is read only on MMU-500.
pub(crate) fn gfsynr0_mask(c: &Config, secure: bool) -> u32 {
    let one_side = if secure { Gfsynr0::new().with_nested(true) } else { Gfsynr0::new().with_nsstate(true) };
    let ats = Gfsynr0::new().with_ats(c.mmu500);
    0xff7f & !one_side.into_bits() & !ats.into_bits()
}

/// The S2WC2EN, IPA2PA_CEN and DP4K bits exist in the non-secure copy only. The register is MMU-500's.
pub(crate) fn acr_mask(c: &Config, secure: bool) -> u32 {
    match (c.mmu500, secure) {
        (false, _) => 0,
        (true, false) => 0x0f01_071c,
        (true, true) => 0x0c01_0704,
    }
}

pub(crate) fn scr1_write(c: &Config, old: u32, value: u32) -> u32 {
    let fixed = if c.mmu500 { MMU500_SCR1_FIXED } else { 0x00ff_0000 };
    let absent = if c.compressed_index { 0 } else { Scr1::new().with_nscompindexdisable(true).into_bits() };
    value & SCR1_MASK & !fixed & !absent | old & fixed
}

/// VA64 is fixed where only one kind of format exists; MONC needs a secure side.
pub(crate) fn cba2r_write(c: &Config, value: u32) -> u32 {
    let vmid = if c.vmid16 { 0xffff_0000 } else { 0 };
    let monitor = if c.secure { 2 } else { 0 };
    let value = value & (1 | monitor | vmid);
    match (c.aarch32 == crate::Aarch32::None, c.aarch64()) {
        (true, _) => value | 1,
        (_, false) => value & !1,
        _ => value,
    }
}

pub(crate) fn s2cr_mask(c: &Config) -> u32 {
    let exidvalid = S2cr::new().with_exidvalid(!c.extended_ids).into_bits();
    S2CR_MASK & !exidvalid
}

pub(crate) fn smr_mask(c: &Config) -> u32 {
    if c.extended_ids {
        return 0xffff_ffff;
    }
    let id = (1u32 << c.stream_id_bits) - 1;
    0x8000_0000 | id << 16 | id
}

pub(crate) fn cr0_write(c: &Config, old: u32, value: u32, secure: bool) -> u32 {
    let mut new = Cr0::from_bits(value);
    // Configuration access faults and E2H contexts do not exist.
    new = new.with_gcfgfre(false).with_gcfgfie(false).with_hypmode(false);
    new = new.with_exidenable(new.exidenable() && c.extended_ids);
    new = new.with_vmid16en(new.vmid16en() && c.vmid16 && !secure);
    if secure {
        new = new.with_vmidpne(false);
    } else {
        new = new.with_nscfg(0);
    }
    if c.mmu500 {
        return new.into_bits() & !MMU500_CR0_FIXED | old & MMU500_CR0_FIXED;
    }
    new.into_bits()
}

pub(crate) fn cr2_mask(c: &Config, secure: bool) -> u32 {
    let extended = if c.extended_groups() { 0x8000_0000 | if secure { 0x47ff_0000 } else { 0 } } else { 0 };
    let compressed = if c.compressed_index { 0x2000_0000 } else { 0 };
    0xff | extended | compressed
}

/// The group that an offset of global space 0 names, and whether it is its SMR; only if it exists for this side.
fn group_at(c: &Config, regs: &Regs, at: usize, secure: bool) -> Option<(usize, bool)> {
    let (n, smr) = match at {
        gr0::SMR..0xa00 => ((at - gr0::SMR) / 4, true),
        gr0::S2CR..0xe00 => ((at - gr0::S2CR) / 4, false),
        _ => return None,
    };
    // With more than 128 groups these registers are the last 128 of them.
    let first = regs.smr.len().saturating_sub(128);
    let index = if c.extended_groups() { first + n } else { n };
    let owned = groups_of(c, regs, secure).contains(&index) || (secure && index < regs.smr.len());
    owned.then_some((index, smr))
}

fn extended_group(c: &Config, regs: &Regs, at: usize, secure: bool) -> (usize, bool) {
    let index = at / 4;
    (index, extension_on(c, regs, secure) && (secure || groups_of(c, regs, false).contains(&index)))
}
