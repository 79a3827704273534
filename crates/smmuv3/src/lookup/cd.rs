//! Context descriptors: validity and stage 1 (IHI 0070 section 5.4).

use portcullis_arch::attrs::Shareability;
use portcullis_arch::smmuv3::{Cd, Ste};
use portcullis_arch::vmsa::Granule;
use portcullis_walk::stage::walk_attributes;
use portcullis_walk::{AddressFormat, FlagUpdate, Region, Split, Stage1, TableFormat};

use super::size;
use super::ste::{World, endian_illegal, first, httu_illegal};
use crate::caps::{Caps, StallModel};
use crate::decision::TableRegs;

/// One of the two halves of a CD, decoded.
struct Half {
    tsz: u8,
    /// `None`: reserved.
    granule: Option<Granule>,
    ttb: u64,
    /// Walks are disabled, or there is no such half.
    off: bool,
    /// IR, OR, SH.
    walk: (u8, u8, u8),
    /// NSCFG.
    non_secure: bool,
    had: bool,
    e0pd: bool,
    tbi: bool,
}

/// EPD has no meaning where there is only one half.
fn halves(cd: &Cd, world: World) -> [Half; 2] {
    let (d0, d1, d2) = (cd.dw0(), cd.dw1(), cd.dw2());
    let single = world.single();
    [
        Half {
            tsz: d0.t0sz(),
            granule: Granule::from_tg0(d0.tg0()),
            ttb: cd.ttb0(),
            off: d0.epd0() && !single,
            walk: (d0.ir0(), d0.or0(), d0.sh0()),
            non_secure: d1.nscfg0(),
            had: d1.had0(),
            e0pd: d1.e0pd0(),
            tbi: d0.tbi0(),
        },
        Half {
            tsz: d0.t1sz(),
            granule: Granule::from_tg1(d0.tg1()),
            ttb: cd.ttb1(),
            off: d0.epd1() || single,
            walk: (d0.ir1(), d0.or1(), d0.sh1()),
            non_secure: d2.nscfg1(),
            had: d2.had1(),
            e0pd: d2.e0pd1(),
            tbi: d0.tbi1() && !single,
        },
    ]
}

/// DS as far as it counts for a half.
fn ds(caps: &Caps, cd: &Cd, granule: Granule) -> bool {
    caps.ds && cd.dw2().ds() && cd.dw0().aa64() && granule != Granule::K64
}

/// The rule that makes a CD ILLEGAL (or V = 0), if there is one. All of them end in C_BAD_CD.
pub(crate) fn illegal(
    caps: &Caps,
    regs: &TableRegs,
    ste: &Ste,
    world: World,
    cd: &Cd,
) -> Option<&'static str> {
    let d = cd.dw0();
    let aa64 = d.aa64();
    let single = world.single();
    let halves = halves(cd, world);
    let walks = halves.iter().any(|h| !h.off);
    first! {
        !cd.valid() => "CD.V = 0",
        d.s() && ste.dw1().s1stalld() => "CD.S = 1 with STE.S1STALLD = 1",
        d.s() && regs.stall_model == StallModel::Terminate => "CD.S = 1 with STALL_MODEL = 1",
        !d.s() && regs.stall_model == StallModel::Forced => "CD.S = 0 with STALL_MODEL = 2",
        !d.a() && caps.abort_only => "CD.A = 0 with IDR0.TERM_MODEL = 1",
        walks && endian_illegal(caps, d.endi()) => "CD.ENDI does not suit IDR0.TTENDIAN",
        !aa64 && !caps.aarch32 => "CD.AA64 = 0, which IDR0.TTF lacks",
        !aa64 && matches!(world, World::El2Host | World::El3) => "CD.AA64 = 0 in an EL2-E2H or EL3 stream",
        aa64 && !caps.aarch64 => "CD.AA64 = 1, which IDR0.TTF lacks",
        aa64 && ste.config().stage2() && !ste.dw2().s2aa64() => "CD.AA64 = 1 over a VMSAv8-32 stage 2",
        aa64 && httu_illegal(caps, d.ha(), d.hd()) => "CD.HA or HD ask for more than IDR0.HTTU",
        !single && !caps.asid16 && d.asid() > 0xff => "CD.ASID has more than 8 bits, IDR0.ASID16 = 0",
    }
    let output_bits = size::effective(caps, d.ips());
    for h in halves.iter().filter(|h| !h.off) {
        if !aa64 {
            first! {
                size::exceeds(h.ttb, 40) => "CD.TTB0 or TTB1 is above 40 bits",
            }
            continue;
        }
        let Some(granule) = h.granule.filter(|&g| size::has(caps, g)) else {
            return Some("CD.TG0 or TG1 is reserved or a granule that IDR5 lacks");
        };
        let ds = ds(caps, cd, granule);
        let least = if caps.va52 && (ds || granule == Granule::K64) { 12 } else { 16 };
        first! {
            h.tsz < least || h.tsz > size::largest_tsz(caps, granule) => "CD.T0SZ or T1SZ is out of range",
            size::exceeds(h.ttb, size::table_limit(granule, ds, output_bits))
                => "CD.TTB0 or TTB1 is above the effective IPS",
        }
    }
    None
}

/// The bits of an address that are not ignored (TBI): all, or the 56 low ones where every address ignores its top byte.
pub(crate) fn va_bits(world: World, cd: &Cd) -> u8 {
    let [low, high] = halves(cd, world);
    let both = low.tbi && (high.tbi || world.single());
    if cd.dw0().aa64() && both { 56 } else { 64 }
}

/// Stage 1 of a legal CD.
pub(crate) fn stage1(caps: &Caps, regs: &TableRegs, world: World, cd: &Cd) -> Stage1 {
    let d = cd.dw0();
    let aa64 = d.aa64();
    let (secure, single) = (regs.secure, world.single());
    let halves = halves(cd, world);
    let output_bits = if aa64 { size::effective(caps, d.ips()) } else { 40 };
    let region = |h: &Half| {
        if h.off {
            return None;
        }
        let (ir, or, sh) = h.walk;
        let walk_attrs = walk_attributes(ir, or, sh, !secure || h.non_secure);
        let (granule, bits, level, address);
        if aa64 {
            granule = h.granule?;
            bits = 64 - h.tsz.min(63);
            level = size::stage1_start(granule, bits);
            address = size::format(caps, granule, ds(caps, cd, granule));
        } else {
            granule = Granule::K4;
            bits = 32 - (h.tsz & 7);
            level = if h.tsz & 7 < 2 { 1 } else { 2 };
            address = AddressFormat::Bits48;
        }
        Some(Region {
            base: size::first_table(h.ttb, granule, level, bits, output_bits),
            granule,
            start_level: level,
            input_bits: bits,
            walk_attrs,
            flat_attributes: caps.hierarchy_disable && h.had,
            address,
        })
    };
    let sh_override = |h: &Half| {
        let ds = h.granule.is_some_and(|g| ds(caps, cd, g));
        ds.then(|| Shareability::from_code(h.walk.2))
    };
    let [low, high] = &halves;
    let split = if aa64 {
        // The size of a half that is off only has to be harmless: every address of it faults.
        let bits = |h: &Half| 64 - if h.off { 16 } else { h.tsz.min(63) };
        Split::Smmuv3 { region_bits: [bits(low), bits(high)], tbi: [low.tbi, high.tbi], single }
    } else {
        // EL2 has no TTB1: what lies above TTB0's part faults.
        Split::Long { tsz: [low.tsz & 7, if single { 0 } else { high.tsz & 7 }] }
    };
    let flags = if aa64 { FlagUpdate { access: d.ha(), dirty: d.ha() && d.hd() } } else { FlagUpdate::OFF };
    Stage1 {
        format: if aa64 { TableFormat::Aarch64 } else { TableFormat::Long },
        regions: [region(low), region(high)],
        split,
        output_bits,
        mair: cd.mair(),
        range_fault_level: 0,
        affd: d.affd() && !flags.access,
        wxn: d.wxn(),
        uwxn: d.uwxn() && !aa64 && !single,
        uwxn_for_all: false,
        big_endian: d.endi(),
        single_privilege: single,
        tex_remap: false,
        access_flag_enable: false,
        secure,
        secure_fetch_only: secure && regs.cr0.sif(),
        flags,
        e0pd: [low, high].map(|h| caps.e0pd && aa64 && h.e0pd && !single),
        pan: d.pan() && !single,
        sh_override: [sh_override(low), sh_override(high)],
    }
}
