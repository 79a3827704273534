//! A context bank's registers in words, and the few facts about its format that explanations need.

use portcullis_arch::MemoryType;
use portcullis_arch::smmuv2::{
    CbType, Cba2r, Cbar, Fsr, Sctlr, Tcr2, TcrS1, TcrS1Long, TcrS2, TcrS2Aarch32, address_bits,
};
use portcullis_arch::vmsa::Granule;
use portcullis_smmuv2::{BankView, Config};
use portcullis_walk::TableFormat;
use portcullis_walk::stage::walk_attributes;

use crate::line::{Field, Line, LineKind};
use crate::words;

/// The stage that a bank's tables serve: 1 or 2.
pub(crate) fn stage(bank: &BankView) -> u8 {
    if Cbar::from_bits(bank.cbar).kind() == CbType::Stage2 { 2 } else { 1 }
}

/// The format of a bank's descriptors.
pub(crate) fn format(bank: &BankView) -> TableFormat {
    if Cba2r::from_bits(bank.cba2r).va64() {
        TableFormat::Aarch64
    } else if stage(bank) == 2 || TcrS1Long::from_bits(bank.tcr).eae() {
        TableFormat::Long
    } else {
        TableFormat::Short
    }
}

/// The half of a stage 1 AArch64 address space that `va` selects: 0 for TTBR0, 1 for TTBR1.
pub(crate) fn half(bank: &BankView, config: &Config, va: u64) -> usize {
    const POSITION: [u8; 6] = [32, 36, 40, 42, 44, 48];
    if format(bank) != TableFormat::Aarch64 || stage(bank) == 2 {
        return 0;
    }
    let sep = usize::from(Tcr2::from_bits(bank.tcr2).sep());
    let bits = match POSITION.get(sep) {
        Some(&bits) if bits <= config.upstream_bits => bits,
        None if matches!(config.upstream_bits, 49 | 64) => config.upstream_bits,
        _ => return 0,
    };
    (va >> (bits - 1) & 1) as usize
}

/// The granule of a half of the bank's address space (of all of it at stage 2) on this SMMU.
pub(crate) fn granule(bank: &BankView, config: &Config, half: usize) -> Granule {
    let wanted = match (format(bank), stage(bank)) {
        (TableFormat::Aarch64, 2) => Granule::from_tg0(TcrS2::from_bits(bank.tcr).tg0()),
        (TableFormat::Aarch64, _) if half == 1 => Granule::from_tg1(TcrS1::from_bits(bank.tcr).tg1()),
        (TableFormat::Aarch64, _) => Granule::from_tg0(TcrS1::from_bits(bank.tcr).tg0()),
        _ => return Granule::K4,
    };
    let fallback = implemented(config).next();
    wanted.filter(|&g| implemented(config).any(|i| i == g)).or(fallback).unwrap_or(Granule::K4)
}

/// The granules of an SMMU, in the order in which one stands in for a reserved code.
pub(crate) fn implemented(config: &Config) -> impl Iterator<Item = Granule> {
    let g = config.granules;
    [(Granule::K4, g.k4), (Granule::K64, g.k64), (Granule::K16, g.k16)]
        .into_iter()
        .filter_map(|(granule, yes)| yes.then_some(granule))
}

/// log2 of the bytes that one entry of a table at `level` covers.
pub(crate) fn entry_log2(format: TableFormat, granule: Granule, level: i8) -> u8 {
    match format {
        TableFormat::Short if level <= 1 => 20,
        TableFormat::Short => 12,
        _ => granule.log2() + granule.stride() * (3 - level).clamp(0, 4) as u8,
    }
}

/// The level at which a VMSAv8-64 stage 1 walk of `bits` input bits starts.
pub(crate) fn start_level(granule: Granule, bits: u8) -> i8 {
    4 - bits.saturating_sub(granule.log2()).div_ceil(granule.stride()).clamp(1, 4) as i8
}

/// The output size that the bank's own registers allow, as code and bits; AArch32 has none.
pub(crate) fn pasize(bank: &BankView) -> Option<(u8, u8)> {
    let code = match (format(bank), stage(bank)) {
        (TableFormat::Aarch64, 2) => TcrS2::from_bits(bank.tcr).pasize(),
        (TableFormat::Aarch64, _) => Tcr2::from_bits(bank.tcr2).pasize(),
        _ => return None,
    };
    Some((code, address_bits(code)))
}

/// Names of the fault bits in an FSR, in the order of checks.
pub(crate) fn fsr_names(fsr: u32) -> Vec<&'static str> {
    let f = Fsr::from_bits(fsr);
    [
        (f.tf(), "TF"),
        (f.asf(), "ASF"),
        (f.aff(), "AFF"),
        (f.pf(), "PF"),
        (f.ef(), "EF"),
        (f.tlbmcf(), "TLBMCF"),
        (f.tlblkf(), "TLBLKF"),
        (f.uut(), "UUT"),
        (f.ss(), "SS"),
        (f.multi(), "MULTI"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect()
}

/// The registers of a bank as lines of a story.
pub(crate) fn lines(bank: &BankView) -> Vec<Line> {
    let n = bank.index;
    let register =
        |name: &str, value, text| Line::register32(LineKind::Bank, format!("CB{n}.{name}"), value, text);
    let wide =
        |name: &str, value, text| Line::register64(LineKind::Bank, format!("CB{n}.{name}"), value, text);
    let cbar = Cbar::from_bits(bank.cbar);
    let mut lines = vec![
        Line::register32(LineKind::Bank, format!("CBAR[{n}]"), bank.cbar, cbar_text(cbar)).with_fields(vec![
            Field::new("bank", n),
            Field::new("TYPE", cbar.type_code()),
            Field::new("VMID", cbar.vmid()),
        ]),
        Line::register32(LineKind::Bank, format!("CBA2R[{n}]"), bank.cba2r, cba2r_text(bank)),
    ];
    let sctlr = Sctlr::from_bits(bank.sctlr);
    lines.push(register("SCTLR", bank.sctlr, sctlr_text(bank, sctlr)).with_fields(vec![
        Field::new("M", u8::from(sctlr.m())),
        Field::new("CFRE", u8::from(sctlr.cfre())),
        Field::new("CFCFG", u8::from(sctlr.cfcfg())),
        Field::new("HUPCF", u8::from(sctlr.hupcf())),
    ]));
    if sctlr.m() {
        lines.push(register("TCR", bank.tcr, tcr_text(bank)));
        if stage(bank) == 1 && format(bank) == TableFormat::Aarch64 {
            lines.push(register("TCR2", bank.tcr2, tcr2_text(bank)));
        }
        let halves = [bank.ttbr0, bank.ttbr1];
        for (half, ttbr) in halves.into_iter().enumerate().filter(|(half, _)| half_in_use(bank, *half)) {
            lines.push(wide(["TTBR0", "TTBR1"][half], ttbr, ttbr_text(bank, half, ttbr)));
        }
    }
    if bank.fsr != 0 {
        let text = format!("a fault is recorded: {}", words::list(&fsr_names(bank.fsr)));
        lines.push(register("FSR", bank.fsr, text));
    }
    lines
}

fn cbar_text(cbar: Cbar) -> String {
    let vmid = cbar.vmid();
    match cbar.kind() {
        CbType::Stage2 => format!("stage 2 context, VMID {vmid}"),
        CbType::Stage1Bypass => {
            let hyp = if cbar.hypc() { ", hyp context" } else { "" };
            let neutral = cbar.memattr() == 0xf && cbar.bpshcfg() == 3;
            let adds = if neutral {
                String::new()
            } else {
                format!(", adds {} BPSHCFG={}", MemoryType::from_code(cbar.memattr()), cbar.bpshcfg())
            };
            format!("stage 1, stage 2 bypassed, VMID {vmid}{hyp}{adds}")
        }
        CbType::Stage1Fault => "stage 1, stage 2 faults: every transaction is refused".into(),
        CbType::Nested => format!("stage 1, then stage 2 in bank {}, VMID {vmid}", cbar.s2_cbndx()),
    }
}

fn cba2r_text(bank: &BankView) -> String {
    let monitor = if Cba2r::from_bits(bank.cba2r).monc() { ", monitor context" } else { "" };
    let format = match format(bank) {
        TableFormat::Aarch64 => "VA64=1: AArch64 descriptors",
        TableFormat::Long => "VA64=0: AArch32 long descriptors",
        TableFormat::Short => "VA64=0, TCR.EAE=0: AArch32 short descriptors",
    };
    format!("{format}{monitor}")
}

/// What SCTLR makes of a fault: `terminated with an abort (CFRE=1)`.
pub(crate) fn on_fault(sctlr: u32) -> &'static str {
    let s = Sctlr::from_bits(sctlr);
    match (s.cfcfg(), s.cfre()) {
        (true, _) => "stalled (CFCFG=1)",
        (false, true) => "terminated with an abort (CFRE=1)",
        (false, false) => "terminated without an abort, reads give zero and writes vanish (CFRE=0)",
    }
}

fn sctlr_text(bank: &BankView, s: Sctlr) -> String {
    let mut text = String::from(if s.m() { "M=1 translates" } else { "M=0 addresses pass unchanged" });
    let flags = [
        (s.affd(), ", AFFD=1 no access flag faults"),
        (s.e(), ", E=1 big-endian tables"),
        (s.wxn() && stage(bank) == 1, ", WXN=1"),
        (s.uwxn() && stage(bank) == 1, ", UWXN=1"),
        (s.ptw() && stage(bank) == 2, ", PTW=1"),
    ];
    flags.iter().filter(|(set, _)| *set).for_each(|(_, name)| text.push_str(name));
    text.push_str("; a fault is ");
    text.push_str(on_fault(bank.sctlr));
    if !s.hupcf() {
        text.push_str("; after one, all are refused until FSR is cleared (HUPCF=0)");
    }
    text
}

fn half_in_use(bank: &BankView, half: usize) -> bool {
    match (stage(bank), format(bank), half) {
        (2, _, 1) => false,
        (_, _, 0) => true,
        (_, TableFormat::Aarch64, _) => !TcrS1::from_bits(bank.tcr).epd1(),
        (_, TableFormat::Long, _) => {
            let t = TcrS1Long::from_bits(bank.tcr);
            !t.epd1() && (t.t0sz() > 0 || t.t1sz() > 0)
        }
        (_, TableFormat::Short, _) => TcrS1Long::from_bits(bank.tcr).t0sz() > 0,
    }
}

fn walk_text(irgn: u8, orgn: u8, sh: u8) -> String {
    let a = walk_attributes(irgn, orgn, sh, true);
    format!("walks {} {}", a.memory(), a.shareability())
}

fn tcr_text(bank: &BankView) -> String {
    let size = |name: &str, tsz: u8, bits: i16| format!("{name}={tsz}: {bits}-bit addresses");
    match (format(bank), stage(bank)) {
        (TableFormat::Aarch64, 1) => {
            let t = TcrS1::from_bits(bank.tcr);
            let one = |name, tsz: u8, granule: Option<Granule>, walks| {
                let Some(g) = granule else { return format!("{name}={tsz}, reserved granule code") };
                if !(16..=39).contains(&tsz) {
                    return format!("{name}={tsz} is illegal (16 to 39): every address faults");
                }
                let level = start_level(g, 64 - tsz);
                let size = size(name, tsz, 64 - i16::from(tsz));
                format!("{size}, {} granule, start level {level}, {walks}", words::granule(g))
            };
            let low = if t.epd0() {
                "TTBR0 off (EPD0=1)".into()
            } else {
                one("T0SZ", t.t0sz(), Granule::from_tg0(t.tg0()), walk_text(t.irgn0(), t.orgn0(), t.sh0()))
            };
            let high = if t.epd1() {
                "TTBR1 off (EPD1=1)".into()
            } else {
                one("T1SZ", t.t1sz(), Granule::from_tg1(t.tg1()), walk_text(t.irgn1(), t.orgn1(), t.sh1()))
            };
            format!("{low}; {high}")
        }
        (TableFormat::Aarch64, _) => {
            let t = TcrS2::from_bits(bank.tcr);
            let granule = Granule::from_tg0(t.tg0()).map_or("reserved".into(), words::granule);
            let size = size("T0SZ", t.t0sz(), 64 - i16::from(t.t0sz()));
            let walks = walk_text(t.irgn0(), t.orgn0(), t.sh0());
            let out = address_bits(t.pasize());
            format!(
                "{size}, {granule} granule, SL0={}, PASize={}: {out}-bit output, {walks}",
                t.sl0(),
                t.pasize()
            )
        }
        (_, 2) => {
            let t = TcrS2Aarch32::from_bits(bank.tcr);
            let t0sz = (t.t0sz() << 4) as i8 >> 4;
            format!("T0SZ={t0sz}: {}-bit addresses, SL0={}", 32 - i16::from(t0sz), t.sl0())
        }
        (TableFormat::Long, _) => {
            let t = TcrS1Long::from_bits(bank.tcr);
            let off = |epd: bool| if epd { " (off)" } else { "" };
            format!("T0SZ={}{}, T1SZ={}{}", t.t0sz(), off(t.epd0()), t.t1sz(), off(t.epd1()))
        }
        (TableFormat::Short, _) => {
            let t = TcrS1Long::from_bits(bank.tcr);
            let off = |pd: bool, n| if pd { format!(", TTBR{n} off (PD{n}=1)") } else { String::new() };
            format!("N={}{}{}", t.t0sz(), off(t.pd0(), 0), off(t.pd1(), 1))
        }
    }
}

fn tcr2_text(bank: &BankView) -> String {
    let t = Tcr2::from_bits(bank.tcr2);
    let asid = if t.as16() { "16-bit" } else { "8-bit" };
    format!("PASize={}: {}-bit output addresses, {asid} ASIDs", t.pasize(), address_bits(t.pasize()))
}

/// Address of the first table of a half: TTBR without ASID and below the table's own alignment.
pub(crate) fn table_base(bank: &BankView, half: usize, granule: Granule) -> u64 {
    let ttbr = if half == 0 { bank.ttbr0 } else { bank.ttbr1 };
    let (bits, level, width) = match (format(bank), stage(bank)) {
        (TableFormat::Short, _) => {
            let n = if half == 0 { TcrS1Long::from_bits(bank.tcr).t0sz() } else { 0 };
            return ttbr & 0xffff_ffff & !((1 << (14 - n.min(7))) - 1);
        }
        (TableFormat::Aarch64, 2) => {
            let t = TcrS2::from_bits(bank.tcr);
            let top = if granule == Granule::K4 { 2 } else { 3 };
            (64 - t.t0sz().min(63), top - t.sl0() as i8, 48)
        }
        (TableFormat::Aarch64, _) => {
            let t = TcrS1::from_bits(bank.tcr);
            let bits = 64 - if half == 0 { t.t0sz() } else { t.t1sz() }.clamp(16, 39);
            (bits, start_level(granule, bits), 48)
        }
        (TableFormat::Long, 2) => {
            let t = TcrS2Aarch32::from_bits(bank.tcr);
            ((32 - ((t.t0sz() << 4) as i8 >> 4)) as u8, if t.sl0() == 1 { 1 } else { 2 }, 40)
        }
        (TableFormat::Long, _) => {
            let t = TcrS1Long::from_bits(bank.tcr);
            let tsz = if half == 0 { t.t0sz() } else { t.t1sz() };
            (32 - tsz, if tsz < 2 { 1 } else { 2 }, 40)
        }
    };
    let entries = bits.saturating_sub(entry_log2(TableFormat::Aarch64, granule, level));
    ttbr & ((1 << width) - 1) & !((8u64 << entries.min(40)) - 1)
}

fn ttbr_text(bank: &BankView, half: usize, ttbr: u64) -> String {
    let tcr = TcrS1::from_bits(bank.tcr);
    let code = if half == 0 { Granule::from_tg0(tcr.tg0()) } else { Granule::from_tg1(tcr.tg1()) };
    let aarch64 = format(bank) == TableFormat::Aarch64;
    let base = table_base(bank, half, code.filter(|_| aarch64).unwrap_or(Granule::K4));
    let asid = match (format(bank), stage(bank)) {
        (TableFormat::Short, _) => ", ASID in CONTEXTIDR".into(),
        // TCR.A1 is in the same place in both formats.
        (_, 1) if usize::from(tcr.a1()) == half => {
            let wide = aarch64 && Tcr2::from_bits(bank.tcr2).as16();
            format!(", ASID {}", ttbr >> 48 & if wide { 0xffff } else { 0xff })
        }
        _ => String::new(),
    };
    format!("first table at {base:#x}{asid}")
}
