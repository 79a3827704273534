//! From a context bank's registers to the parameters of its translations (IHI 0062D chapters 2, 13, 16 and 17).

use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::smmuv2::{CbType, Cba2r, Cbar, Sctlr, Tcr2, TcrS1, TcrS1Long, TcrS2, TcrS2Aarch32};
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Attributes};
use portcullis_walk::stage::walk_attributes;
use portcullis_walk::{
    AccessKind, AddressFormat, Context, ContextKey, FlagUpdate, Flat, Nested, Regime, Region, Split, Stage1,
    Stage2, TableFormat, TlbStage,
};

use crate::config::{Aarch32, Config};
use crate::state::{Bank, Regs};

/// Attribute overrides in the common encoding of CR0, S2CR and SCTLR.
pub(crate) struct Overrides {
    pub memory: Option<u8>,
    pub shcfg: u8,
    pub racfg: u8,
    pub wacfg: u8,
    pub transient: u8,
    pub nscfg: Option<u8>,
}

impl Overrides {
    pub fn apply(&self, a: Attributes) -> Attributes {
        let mut a = a;
        if let Some(code) = self.memory {
            a = a.with_memory(MemoryType::from_code(code));
        }
        if let Some(sh) = shcfg(self.shcfg) {
            a = a.with_shareability(sh);
        }
        let (ra, wa) = (Allocate::from_code(self.racfg), Allocate::from_code(self.wacfg));
        if ra != Allocate::Default {
            a = a.with_read_allocate(ra);
        }
        if wa != Allocate::Default {
            a = a.with_write_allocate(wa);
        }
        if self.transient >= 2 {
            a = a.with_transient(self.transient);
        }
        match self.nscfg {
            Some(2) => a = a.with_non_secure(false),
            Some(1 | 3) => a = a.with_non_secure(true),
            _ => {}
        }
        a.consistent()
    }
}

/// SHCFG: 0 keeps, 1 outer, 2 inner, 3 non-shareable.
fn shcfg(code: u8) -> Option<Shareability> {
    match code {
        1 => Some(Shareability::Outer),
        2 => Some(Shareability::Inner),
        3 => Some(Shareability::Non),
        _ => None,
    }
}

/// The translation regime of a stage 1 bank: HYPC and MONC count in banks of CBAR type 1.
pub(crate) fn regime_of(regs: &Regs, bank: &Bank, secure: bool) -> Regime {
    let (cbar, cba2r) = (bank.cbar(), Cba2r::from_bits(bank.cba2r));
    if cbar.kind() != CbType::Stage1Bypass {
        Regime::Guest
    } else if cba2r.monc() && secure && cba2r.va64() {
        Regime::Monitor
    } else if cbar.hypc() && !regs.side[0].cr0().hypmode() {
        Regime::Hyp
    } else {
        Regime::Guest
    }
}

/// The context of bank `n` for a transaction whose attributes after S2CR are `incoming`.
pub(crate) fn translation(
    config: &Config,
    regs: &Regs,
    n: u8,
    bank: &Bank,
    stage2_bank: Option<&Bank>,
    incoming: Attributes,
    secure: bool,
) -> Context {
    let cbar = bank.cbar();
    let cba2r = Cba2r::from_bits(bank.cba2r);
    let kind = cbar.kind();
    let va64 = cba2r.va64();
    let sctlr = Sctlr::from_bits(bank.sctlr);
    let level = if va64 { 0 } else { 1 };
    let vmid = regs.vmid(config, bank);
    let va_mask = config.upstream_mask();

    if kind == CbType::Stage2 {
        let on = sctlr.m();
        let key = key(secure, Regime::Guest, TlbStage::Stage2, vmid, 0, config.upstream_bits);
        let stage2 = on.then(|| stage2(config, bank));
        let output_bits = if va64 { config.pa_bits } else { config.pa_bits.min(40) };
        // Counts while M is 0; tables have limits of their own.
        let flat = Flat { input_bits: 64, output_bits, stage: 2, level };
        let incoming =
            if on { incoming } else { portcullis_walk::stage::combine(incoming, stage2_off(sctlr)) };
        let stages = Nested { stage1: None, stage2, flat };
        return Context {
            key,
            token: n.into(),
            va_mask,
            stages,
            incoming,
            after: None,
            cacheable: on,
            keeps_hints: false,
        };
    }

    let regime = regime_of(regs, bank, secure);
    let single = regime != Regime::Guest;
    let s2_sctlr = stage2_bank.map(|b| Sctlr::from_bits(b.sctlr));
    let s2_on = s2_sctlr.is_some_and(|s| s.m());
    let limit = if s2_on { config.ipa_bits } else { config.ipa_bits.min(config.pa_bits) };
    let s1_on = sctlr.m();
    let stage1 = s1_on.then(|| stage1(config, regs, bank, limit, single, secure));
    let stage2 = stage2_bank.filter(|_| s2_on).map(|b| stage2(config, b));
    let after = match (kind, s2_sctlr) {
        (CbType::Nested, Some(s)) if !s.m() => Some(stage2_off(s)),
        (CbType::Nested, _) => None,
        // What Linux writes (MemAttr 15, BPSHCFG 3, no hints) changes nothing.
        _ => Some(cbar_attributes(cbar)).filter(|a| *a != NEUTRAL),
    };
    let mut incoming = incoming;
    if s1_on {
        // The descriptors say where a secure stream goes, whatever S2CR.NSCFG says.
        incoming = incoming.with_non_secure(incoming.non_secure() && !secure);
    } else {
        let overrides = Overrides {
            memory: sctlr.mtcfg().then_some(sctlr.memattr()),
            shcfg: sctlr.shcfg(),
            racfg: sctlr.racfg(),
            wacfg: sctlr.wacfg(),
            transient: sctlr.transientcfg(),
            nscfg: secure.then_some(sctlr.nscfg()),
        };
        incoming = overrides.apply(incoming);
        if let Some(after) = after {
            incoming = portcullis_walk::stage::combine(incoming, after);
        }
    }
    let asid = if single { 0 } else { asid(config, bank, va64) };
    let (stage, asid) = match (s1_on, s2_on) {
        (true, true) => (TlbStage::Combined, asid),
        (true, false) => (TlbStage::Stage1, asid),
        // Stage 1 maps flat, so the tables that count are stage 2's, found by IPA.
        (false, _) => (TlbStage::Stage2, 0),
    };
    let vmid = if single { 0 } else { vmid };
    let flat = Flat {
        input_bits: if va64 { 64 } else { 32 },
        output_bits: if va64 { limit } else { limit.min(40) },
        stage: 1,
        level,
    };
    let key = key(secure, regime, stage, vmid, asid, input_bits(config, bank, va64, single).0);
    let stages = Nested { stage1, stage2, flat };
    Context {
        key,
        token: n.into(),
        va_mask,
        stages,
        incoming,
        after,
        cacheable: s1_on || s2_on,
        keeps_hints: false,
    }
}

fn key(secure: bool, regime: Regime, stage: TlbStage, vmid: u16, asid: u16, va_bits: u8) -> ContextKey {
    ContextKey { secure, regime, stage, vmid, asid, va_bits }
}

/// Attributes that leave others as they are when combined: write-back, non-shareable, no hints.
const NEUTRAL: Attributes = Attributes::from_bits(0).with_memory(MemoryType::NORMAL_WB);

/// What a bypassed stage 2 adds (CBAR type 1): memory type, shareability (0 acts as outer), hints.
fn cbar_attributes(cbar: Cbar) -> Attributes {
    Attributes::from_bits(0)
        .with_memory(MemoryType::from_code(cbar.memattr()))
        .with_shareability(shcfg(cbar.bpshcfg()).unwrap_or(Shareability::Outer))
        .with_read_allocate(Allocate::from_code(cbar.racfg()))
        .with_write_allocate(Allocate::from_code(cbar.wacfg()))
}

/// What a stage 2 bank adds while its M is 0: MemAttr always counts, SHCFG 0 acts as non-shareable.
fn stage2_off(sctlr: Sctlr) -> Attributes {
    Attributes::from_bits(0)
        .with_memory(MemoryType::from_code(sctlr.memattr()))
        .with_shareability(shcfg(sctlr.shcfg()).unwrap_or(Shareability::Non))
        .with_read_allocate(Allocate::from_code(sctlr.racfg()))
        .with_write_allocate(Allocate::from_code(sctlr.wacfg()))
}

fn is_short(config: &Config, bank: &Bank) -> bool {
    config.aarch32 == Aarch32::ShortAndLong && !TcrS1Long::from_bits(bank.tcr).eae()
}

/// FSR.FORMAT of a bank: 0 AArch32 short, 1 AArch32 long, 2 AArch64.
pub(crate) fn format_code(config: &Config, bank: &Bank) -> u8 {
    if Cba2r::from_bits(bank.cba2r).va64() {
        2
    } else if bank.cbar().kind() == CbType::Stage2 || !is_short(config, bank) {
        1
    } else {
        0
    }
}

/// The ASID of a stage 1 bank.
pub(crate) fn asid(config: &Config, bank: &Bank, va64: bool) -> u16 {
    if va64 {
        let a1 = TcrS1::from_bits(bank.tcr).a1();
        let asid = (bank.ttbr[usize::from(a1)] >> 48) as u16;
        return if Tcr2::from_bits(bank.tcr2).as16() { asid } else { asid & 0xff };
    }
    if is_short(config, bank) {
        return bank.contextidr as u16 & 0xff;
    }
    let a1 = TcrS1Long::from_bits(bank.tcr).a1();
    (bank.ttbr[usize::from(a1)] >> 48) as u16 & 0xff
}

/// The input address bits up to the sign extension position, and whether the top one is a sign.
fn input_bits(config: &Config, bank: &Bank, va64: bool, single: bool) -> (u8, bool) {
    const POSITION: [u8; 6] = [32, 36, 40, 42, 44, 48];
    let upstream = config.upstream_bits;
    if !va64 || single {
        return (64, false);
    }
    let sep = Tcr2::from_bits(bank.tcr2).sep();
    match POSITION.get(usize::from(sep)) {
        Some(&bits) if bits <= upstream => (bits, true),
        Some(_) => (64, false),
        None if upstream == 49 => (49, true),
        None if upstream == 64 => (64, true),
        None => (64, false),
    }
}

/// The granule of a TG code, or one that is implemented if the code is reserved or its granule is not.
fn granule(config: &Config, wanted: Option<Granule>) -> Granule {
    let g = config.granules;
    let has = |k: Granule| match k {
        Granule::K4 => g.k4,
        Granule::K16 => g.k16,
        Granule::K64 => g.k64,
    };
    let fallback = [Granule::K4, Granule::K64, Granule::K16].into_iter().find(|&k| has(k));
    wanted.filter(|&k| has(k)).or(fallback).unwrap_or(Granule::K4)
}

fn stage1(config: &Config, regs: &Regs, bank: &Bank, limit: u8, single: bool, secure: bool) -> Stage1 {
    let sctlr = Sctlr::from_bits(bank.sctlr);
    let va64 = Cba2r::from_bits(bank.cba2r).va64();
    let tcr2 = Tcr2::from_bits(bank.tcr2);
    let (format, regions, split, output_bits);
    if va64 {
        let tcr = TcrS1::from_bits(bank.tcr);
        let halves = [
            (tcr.t0sz(), tcr.epd0(), Granule::from_tg0(tcr.tg0()), (tcr.irgn0(), tcr.orgn0(), tcr.sh0())),
            (
                tcr.t1sz(),
                tcr.epd1() || single,
                Granule::from_tg1(tcr.tg1()),
                (tcr.irgn1(), tcr.orgn1(), tcr.sh1()),
            ),
        ];
        let had = [tcr2.had0(), tcr2.had1()].map(|h| h && config.hierarchy_disable);
        let ns = [tcr2.nscfg0(), tcr2.nscfg1()];
        regions = [0, 1].map(|i| {
            let (tsz, epd, tg, (irgn, orgn, sh)) = halves[i];
            if epd || !(16..=39).contains(&tsz) {
                return None;
            }
            let granule = granule(config, tg);
            let attrs = walk_attributes(irgn, orgn, sh, !secure || ns[i]);
            Some(region64(bank.ttbr[i], granule, 64 - tsz, attrs, had[i]))
        });
        let (va_bits, signed) = input_bits(config, bank, va64, single);
        // A region out of the legal sizes faults anyway; its size only has to be harmless.
        let size = |tsz: u8| 64 - tsz.clamp(16, 63);
        split = Split::Aarch64 { va_bits, signed, region_bits: [size(tcr.t0sz()), size(tcr.t1sz())] };
        output_bits = config.limited(tcr2.pasize(), limit);
        format = TableFormat::Aarch64;
    } else if is_short(config, bank) {
        let tcr = TcrS1Long::from_bits(bank.tcr);
        let n = tcr.t0sz();
        let off = [tcr.pd0(), tcr.pd1()];
        let ns = [tcr.nscfg0(), tcr.nscfg1()];
        regions = [0, 1].map(|i| {
            let bits = if i == 0 { 32 - n } else { 32 };
            (!off[i]).then(|| region_short(bank.ttbr[i], bits, !secure || ns[i]))
        });
        split = Split::Short { n };
        output_bits = limit.min(40);
        format = TableFormat::Short;
    } else {
        let tcr = TcrS1Long::from_bits(bank.tcr);
        let halves = [
            (tcr.t0sz(), tcr.epd0(), (tcr.irgn0(), tcr.orgn0(), tcr.sh0()), tcr.nscfg0()),
            (tcr.t1sz(), tcr.epd1() || single, (tcr.irgn1(), tcr.orgn1(), tcr.sh1()), tcr.nscfg1()),
        ];
        regions = [0, 1].map(|i| {
            let (tsz, epd, (irgn, orgn, sh), ns) = halves[i];
            let attrs = walk_attributes(irgn, orgn, sh, !secure || ns);
            let had = [tcr2.had0(), tcr2.had1()][i] && config.hierarchy_disable;
            (!epd).then(|| region_long(bank.ttbr[i], if tsz < 2 { 1 } else { 2 }, 32 - tsz, attrs, had))
        });
        // Hyp has no TTBR1: what lies above TTBR0's part faults there, and T1SZ has no meaning.
        split = Split::Long { tsz: [tcr.t0sz(), if single { 0 } else { tcr.t1sz() }] };
        output_bits = limit.min(40);
        format = TableFormat::Long;
    }
    Stage1 {
        format,
        regions,
        split,
        output_bits,
        mair: u64::from(bank.mair[1]) << 32 | u64::from(bank.mair[0]),
        range_fault_level: if va64 { 0 } else { 1 },
        affd: sctlr.affd(),
        wxn: sctlr.wxn(),
        uwxn: sctlr.uwxn() && !single,
        uwxn_for_all: true,
        big_endian: sctlr.e(),
        single_privilege: single,
        tex_remap: sctlr.tre(),
        access_flag_enable: sctlr.afe(),
        secure,
        secure_fetch_only: secure && regs.scr1().sif(),
        flags: FlagUpdate::OFF,
        e0pd: [false; 2],
        pan: false,
        sh_override: [None; 2],
    }
}

/// A VMSAv8-64 stage 1 region: the start level follows from size and granule.
fn region64(
    ttbr: u64,
    granule: Granule,
    input_bits: u8,
    walk_attrs: Attributes,
    flat_attributes: bool,
) -> Region {
    let (g, stride) = (granule.log2(), granule.stride());
    let levels = input_bits.saturating_sub(g).div_ceil(stride).clamp(1, 4);
    let start_level = 4 - levels as i8;
    let base = table_base(ttbr, 48, first_table_log2(g, stride, start_level, input_bits));
    Region {
        base,
        granule,
        start_level,
        input_bits,
        walk_attrs,
        flat_attributes,
        address: AddressFormat::Bits48,
    }
}

fn region_long(
    ttbr: u64,
    start_level: i8,
    input_bits: u8,
    walk_attrs: Attributes,
    flat_attributes: bool,
) -> Region {
    let base = table_base(ttbr, 40, first_table_log2(12, 9, start_level, input_bits));
    Region {
        base,
        granule: Granule::K4,
        start_level,
        input_bits,
        walk_attrs,
        flat_attributes,
        address: AddressFormat::Bits48,
    }
}

fn region_short(ttbr: u64, input_bits: u8, non_secure: bool) -> Region {
    let t = ttbr as u32;
    let irgn = ((t & 1) << 1 | (t >> 6) & 1) as u8;
    let orgn = (t >> 3) as u8 & 3;
    let sh = match (t >> 1 & 1, t >> 5 & 1) {
        (0, _) => 0,
        (_, 0) => 2,
        _ => 3,
    };
    Region {
        base: table_base(ttbr & 0xffff_ffff, 32, u32::from(input_bits) - 20 + 2),
        granule: Granule::K4,
        start_level: 1,
        input_bits,
        walk_attrs: walk_attributes(irgn, orgn, sh, non_secure),
        flat_attributes: false,
        address: AddressFormat::Bits48,
    }
}

/// log2 of the size of the first table in bytes.
fn first_table_log2(granule_log2: u8, stride: u8, start_level: i8, input_bits: u8) -> u32 {
    let shift = u32::from(granule_log2) + u32::from(stride) * (3 - start_level).unsigned_abs() as u32;
    u32::from(input_bits).saturating_sub(shift) + 3
}

fn table_base(ttbr: u64, bits: u32, align_log2: u32) -> u64 {
    ttbr & ((1 << bits) - 1) & !((1 << align_log2) - 1)
}

/// Decodes a stage 2 bank whose M is set.
fn stage2(config: &Config, bank: &Bank) -> Stage2 {
    let sctlr = Sctlr::from_bits(bank.sctlr);
    let va64 = Cba2r::from_bits(bank.cba2r).va64();
    let (format, region, input_limit_bits, output_bits);
    if va64 {
        let tcr = TcrS2::from_bits(bank.tcr);
        let granule = granule(config, Granule::from_tg0(tcr.tg0()));
        let start_level = match granule {
            Granule::K4 => 2 - tcr.sl0() as i8,
            _ => 3 - tcr.sl0() as i8,
        };
        let bits = 64 - tcr.t0sz().min(63);
        let legal =
            tcr.sl0() < 3 && (16..=39).contains(&tcr.t0sz()) && stage2_size_legal(granule, start_level, bits);
        let attrs = walk_attributes(tcr.irgn0(), tcr.orgn0(), tcr.sh0(), true);
        region = legal.then(|| Region {
            base: table_base(
                bank.ttbr[0],
                48,
                first_table_log2(granule.log2(), granule.stride(), start_level, bits),
            ),
            granule,
            start_level,
            input_bits: bits,
            walk_attrs: attrs,
            flat_attributes: true,
            address: AddressFormat::Bits48,
        });
        input_limit_bits = config.ipa_bits;
        output_bits = config.limited(tcr.pasize(), config.pa_bits);
        format = TableFormat::Aarch64;
    } else {
        let tcr = TcrS2Aarch32::from_bits(bank.tcr);
        let t0sz = (tcr.t0sz() << 4) as i8 >> 4;
        let bits = (32 - t0sz) as u8;
        let attrs = walk_attributes(tcr.irgn0(), tcr.orgn0(), tcr.sh0(), true);
        let start_level = match tcr.sl0() {
            1 if (-8..=1).contains(&t0sz) => Some(1),
            0 if (-2..=7).contains(&t0sz) => Some(2),
            _ => None,
        };
        region = start_level.map(|l| region_long(bank.ttbr[0], l, bits, attrs, true));
        input_limit_bits = config.ipa_bits.min(40);
        output_bits = config.pa_bits.min(40);
        format = TableFormat::Long;
    }
    Stage2 {
        format,
        region,
        input_limit_bits,
        output_bits,
        affd: sctlr.affd(),
        big_endian: sctlr.e(),
        protect_walks: sctlr.ptw(),
        device_walks_as_nc: false,
        range_fault_level: if va64 { 0 } else { 1 },
        flags: FlagUpdate::OFF,
        xnx: false,
        fwb: false,
        leaf_hints: true,
        sh_override: None,
    }
}

/// The sizes that a stage 2 start level can serve: up to 16 tables in a row (DDI 0487 D8.2, IHI 0062D VTCR.SL0).
fn stage2_size_legal(granule: Granule, start_level: i8, bits: u8) -> bool {
    let (g, stride) = (granule.log2(), granule.stride());
    let below = g + stride * (3 - start_level).unsigned_abs();
    let least = below + 1;
    let most = (below + stride + 4).min(48);
    // A 4K walk from level 0 has 512 entries at most, which is all of 48 bits.
    (least..=most).contains(&bits)
}

/// The kind of access a context sees.
pub(crate) fn kind_of(context: &Context, access: Access) -> AccessKind {
    AccessKind::new(access, context.incoming)
}
