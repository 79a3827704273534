//! Stream table entries: validity, stream world and stage 2 (IHI 0070 section 5.2).

use portcullis_arch::attrs::Shareability;
use portcullis_arch::smmuv3::{Ste, SteConfig};
use portcullis_arch::vmsa::Granule;
use portcullis_walk::stage::walk_attributes;
use portcullis_walk::{AddressFormat, FlagUpdate, Regime, Region, Stage2, TableFormat};

use super::size;
use crate::caps::{Caps, Httu, StallModel, TableEndian};
use crate::decision::TableRegs;

/// StreamWorld: the exception level whose translations a stream uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum World {
    /// NS-EL1, or Secure.
    El1,
    /// EL2 without E2H.
    El2,
    /// EL2-E2H.
    El2Host,
    /// EL3.
    El3,
}

impl World {
    /// One half of an address space, one privilege, no ASIDs.
    pub fn single(self) -> bool {
        matches!(self, Self::El2 | Self::El3)
    }
    /// The TLB's name for it.
    pub fn regime(self) -> Regime {
        match self {
            Self::El1 => Regime::Guest,
            Self::El2 => Regime::Hyp,
            Self::El2Host => Regime::HypHost,
            Self::El3 => Regime::Monitor,
        }
    }
}

/// STRW as far as it counts: only with stage 1 alone, and non-secure only with EL2.
fn strw(caps: &Caps, regs: &TableRegs, ste: &Ste) -> u8 {
    let used = ste.config() == SteConfig::Stage1 && caps.stage1 && (regs.secure || caps.hyp);
    if used { ste.dw1().strw() } else { 0 }
}

/// The stream's world. For a legal STE.
pub(crate) fn world(caps: &Caps, regs: &TableRegs, ste: &Ste) -> World {
    match strw(caps, regs, ste) {
        1 if regs.secure => World::El3,
        2 if regs.secure => World::El1,
        2 if regs.cr2.e2h() => World::El2Host,
        2 => World::El2,
        _ => World::El1,
    }
}

/// STE.EATS as far as it counts: 0 none, 1 full, 2 split stage (section 3.9).
pub(crate) fn eats(caps: &Caps, regs: &TableRegs, ste: &Ste) -> u8 {
    let ignored = !caps.ats || regs.secure || !(ste.config().stage1() || ste.config().stage2());
    match ste.dw1().eats() {
        1 if !ignored => 1,
        2 if !ignored && regs.cr0.atschk() => 2,
        _ => 0,
    }
}

/// The VMID that tags the stream's TLB entries.
pub(crate) fn vmid(caps: &Caps, regs: &TableRegs, ste: &Ste) -> u16 {
    let tagged = caps.stage2 && !regs.secure && world(caps, regs, ste) == World::El1;
    if tagged { ste.dw2().s2vmid() } else { 0 }
}

/// ENDI is not what this implementation reads.
pub(crate) fn endian_illegal(caps: &Caps, big: bool) -> bool {
    match caps.endian {
        TableEndian::Mixed => false,
        TableEndian::Little => big,
        TableEndian::Big => !big,
    }
}

/// {HA, HD} ask for more than HTTU gives.
pub(crate) fn httu_illegal(caps: &Caps, ha: bool, hd: bool) -> bool {
    match caps.httu {
        Httu::None => ha || hd,
        Httu::Access => hd,
        Httu::Dirty => false,
    }
}

/// Returns the rule of the first condition that holds.
macro_rules! first {
    ($($cond:expr => $rule:literal,)*) => {
        $(if $cond { return Some($rule); })*
    };
}
pub(crate) use first;

/// The rule that makes an STE ILLEGAL (or V = 0), if there is one. All of them end in C_BAD_STE.
pub(crate) fn illegal(caps: &Caps, regs: &TableRegs, ste: &Ste) -> Option<&'static str> {
    let (d0, d1, d2) = (ste.dw0(), ste.dw1(), ste.dw2());
    let config = ste.config();
    first! {
        !ste.valid() => "STE.V = 0",
    }
    if config == SteConfig::Abort {
        return None;
    }
    let (s1, s2) = (config.stage1(), config.stage2());
    let substreams = caps.ssid_bits != 0;
    let strw = strw(caps, regs, ste);
    let ats = caps.ats && !regs.secure && (s1 || s2);
    let vmid_counts = caps.stage2 && !regs.secure && (s1 || s2) && strw == 0;
    first! {
        s1 && !caps.stage1 => "STE.Config asks for stage 1, which IDR0.S1P lacks",
        s2 && !caps.stage2 => "STE.Config asks for stage 2, which IDR0.S2P lacks",
        s2 && regs.secure => "STE.Config asks for a secure stage 2, which S_IDR1.SEL2 lacks",
        !regs.secure && strw & 1 != 0 => "STE.STRW is reserved",
        regs.secure && strw & 2 != 0 => "STE.STRW is reserved, or asks for S-EL2, which S_IDR1.SEL2 lacks",
        ats && d1.eats() == 1 && s2 && d2.s2s() => "STE.EATS = 1 with S2S = 1",
        ats && d1.eats() == 2 && config != SteConfig::Nested => "STE.EATS = 2 without two stages",
        ats && d1.eats() == 2 && d2.s2s() => "STE.EATS = 2 with S2S = 1",
        ats && d1.eats() == 2 && !caps.split_stage_ats => "STE.EATS = 2 with IDR0.NS1ATS = 1",
        s1 && d1.s1stalld() && regs.stall_model != StallModel::Both => "STE.S1STALLD = 1 with STALL_MODEL other than 0",
        s1 && substreams && d0.s1cdmax() > caps.ssid_bits => "STE.S1CDMax is more than IDR1.SSIDSIZE",
        s1 && substreams && d0.s1cdmax() != 0 && matches!(d0.s1fmt(), 1 | 2) && !caps.cd2l
            => "STE.S1Fmt is two-level, which IDR0.CD2L lacks",
        s1 && !s2 && size::exceeds(ste.s1_context_ptr(), caps.oas_bits) => "STE.S1ContextPtr is above OAS",
        vmid_counts && !caps.vmid16 && d2.s2vmid() > 0xff => "STE.S2VMID has more than 8 bits, IDR0.VMID16 = 0",
    }
    if s2 { illegal_stage2(caps, regs, ste) } else { None }
}

/// S2DS as far as it counts.
fn s2ds(caps: &Caps, ste: &Ste) -> bool {
    let tg = Granule::from_tg0(ste.dw2().s2tg());
    caps.ds && ste.dw2().s2aa64() && ste.dw3().s2ds() && tg != Some(Granule::K64)
}

/// S2SL0 with S2SL0_2, where that one counts, above it.
fn start_code(ste: &Ste, granule: Granule, ds: bool) -> u8 {
    let high = ds && granule == Granule::K4 && ste.dw3().s2sl0_2();
    ste.dw2().s2sl0() | u8::from(high) << 2
}

/// Start level of a VMSAv8-32 stage 2.
fn start_aarch32(t0sz: i8, sl0: u8) -> Option<i8> {
    match sl0 {
        1 if (-8..=1).contains(&t0sz) => Some(1),
        0 if (-2..=7).contains(&t0sz) => Some(2),
        _ => None,
    }
}

/// S2T0SZ of VMSAv8-32: four bits with a sign.
fn t0sz_aarch32(ste: &Ste) -> i8 {
    (ste.dw2().s2t0sz() << 4) as i8 >> 4
}

fn illegal_stage2(caps: &Caps, regs: &TableRegs, ste: &Ste) -> Option<&'static str> {
    let d2 = ste.dw2();
    let aa64 = d2.s2aa64();
    first! {
        d2.s2s() && regs.stall_model == StallModel::Terminate => "STE.S2S = 1 with STALL_MODEL = 1",
        !d2.s2s() && regs.stall_model == StallModel::Forced => "STE.S2S = 0 with STALL_MODEL = 2",
        aa64 && !caps.aarch64 => "STE.S2AA64 = 1, which IDR0.TTF lacks",
        !aa64 && !caps.aarch32 => "STE.S2AA64 = 0, which IDR0.TTF lacks",
        caps.fwb && ste.dw1().s2fwb() && !aa64 => "STE.S2FWB = 1 with VMSAv8-32",
        httu_illegal(caps, d2.s2ha(), d2.s2hd()) => "STE.S2HA or S2HD ask for more than IDR0.HTTU",
        !aa64 && (d2.s2ha() || d2.s2hd()) => "STE.S2HA or S2HD with VMSAv8-32",
        endian_illegal(caps, d2.s2endi()) => "STE.S2ENDI does not suit IDR0.TTENDIAN",
    }
    if !aa64 {
        first! {
            size::exceeds(ste.s2ttb(), 40) => "STE.S2TTB is above 40 bits",
            start_aarch32(t0sz_aarch32(ste), d2.s2sl0()).is_none() => "STE.S2T0SZ and S2SL0 do not suit each other",
        }
        return None;
    }
    let Some(granule) = Granule::from_tg0(d2.s2tg()).filter(|&g| size::has(caps, g)) else {
        return Some("STE.S2TG is reserved or a granule that IDR5 lacks");
    };
    let ds = s2ds(caps, ste);
    let tsz = d2.s2t0sz();
    let wide = ds || granule == Granule::K64;
    let least = 64u8.saturating_sub(caps.ias_bits()).max(if wide { 12 } else { 16 });
    let ttb_bits = size::table_limit(granule, ds, size::effective(caps, d2.s2ps()));
    let level = size::stage2_start(granule, start_code(ste, granule, ds), ds, caps.stt);
    first! {
        size::exceeds(ste.s2ttb(), ttb_bits) => "STE.S2TTB is above the effective S2PS",
        tsz < least || tsz > size::largest_tsz(caps, granule) => "STE.S2T0SZ is out of range",
        level.is_none_or(|l| !size::stage2_fits(granule, l, 64 - tsz, ds))
            => "STE.S2T0SZ, S2SL0 and S2TG do not suit each other",
    }
    None
}

/// Stage 2 of an STE that is legal and has it.
pub(crate) fn stage2(caps: &Caps, ste: &Ste) -> Stage2 {
    let (d1, d2) = (ste.dw1(), ste.dw2());
    let walk_attrs = walk_attributes(d2.s2ir0(), d2.s2or0(), d2.s2sh0(), true);
    let nested = ste.config() == SteConfig::Nested;
    let ds = s2ds(caps, ste);
    let (format, region, output_bits);
    if d2.s2aa64() {
        let granule = Granule::from_tg0(d2.s2tg()).unwrap_or(Granule::K4);
        let bits = 64 - d2.s2t0sz();
        output_bits = size::effective(caps, d2.s2ps());
        format = TableFormat::Aarch64;
        region =
            size::stage2_start(granule, start_code(ste, granule, ds), ds, caps.stt).map(|level| Region {
                base: size::first_table(ste.s2ttb(), granule, level, bits, output_bits),
                granule,
                start_level: level,
                input_bits: bits,
                walk_attrs,
                flat_attributes: true,
                address: size::format(caps, granule, ds),
            });
    } else {
        let t0sz = t0sz_aarch32(ste);
        let bits = (32 - t0sz) as u8;
        output_bits = 40;
        format = TableFormat::Long;
        region = start_aarch32(t0sz, d2.s2sl0()).map(|level| Region {
            base: size::first_table(ste.s2ttb(), Granule::K4, level, bits, 40),
            granule: Granule::K4,
            start_level: level,
            input_bits: bits,
            walk_attrs,
            flat_attributes: true,
            address: AddressFormat::Bits48,
        });
    }
    let flags = if d2.s2aa64() {
        FlagUpdate { access: d2.s2ha(), dirty: d2.s2ha() && d2.s2hd() }
    } else {
        FlagUpdate::OFF
    };
    Stage2 {
        format,
        region,
        input_limit_bits: 64,
        output_bits,
        affd: d2.s2affd() && !flags.access,
        big_endian: d2.s2endi(),
        protect_walks: d2.s2ptw() && nested,
        device_walks_as_nc: caps.ptwnnc,
        range_fault_level: 0,
        flags,
        xnx: caps.xnx,
        fwb: caps.fwb && d1.s2fwb(),
        leaf_hints: false,
        sh_override: ds.then(|| Shareability::from_code(d2.s2sh0())),
    }
}
