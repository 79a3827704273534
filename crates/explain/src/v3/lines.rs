//! Registers, level 1 descriptors, stream table entries and context descriptors as lines of a story: the fields that
//! decide, with what they decide.

use portcullis_arch::MemoryType;
use portcullis_arch::smmuv3::regs::{Cr0, Gbpa, StrtabBase, StrtabBaseCfg};
use portcullis_arch::smmuv3::{Cd, L1Cd, L1Std, Ste, SteConfig};
use portcullis_smmuv3::{Caps, Explanation};
use portcullis_walk::stage::walk_attributes;

use crate::line::{Field, Line, LineKind};
use crate::v3::shape::{self, Shape};

/// A word in memory.
fn word(kind: LineKind, label: impl Into<String>, at: u64, value: u64, text: String) -> Line {
    let mut line = Line::new(kind, label, text);
    line.value = format!("[{at:#x}] = {value:#018x}");
    line.with_fields(vec![Field::hex("address", at), Field::hex("value", value)])
}

fn more(mut line: Line, fields: Vec<Field>) -> Line {
    line.fields.extend(fields);
    line
}

/// CR0, and GBPA while the SMMU is off.
pub(crate) fn registers(e: &Explanation) -> Vec<Line> {
    let name = |n: &str| if e.secure { format!("S_{n}") } else { n.to_owned() };
    let (cr0, gbpa) = (Cr0::from_bits(e.cr0), Gbpa::from_bits(e.gbpa));
    let on = cr0.smmuen();
    let off = |what: &str, set: bool| if set { String::new() } else { format!("; {what}=0") };
    let text = if on {
        let queues = off("EVENTQEN", cr0.eventqen()) + &off("CMDQEN", cr0.cmdqen());
        format!("SMMUEN=1: the stream table decides{queues}")
    } else {
        "SMMUEN=0: nothing is translated, GBPA decides".into()
    };
    let bit = |name, set: bool| Field::new(name, u8::from(set));
    let fields = vec![
        bit("SMMUEN", on),
        bit("PRIQEN", cr0.priqen()),
        bit("EVENTQEN", cr0.eventqen()),
        bit("CMDQEN", cr0.cmdqen()),
        bit("ATSCHK", cr0.atschk()),
    ];
    let first = Line::register32(LineKind::Stream, name("CR0"), e.cr0, text).with_fields(fields);
    if !on {
        let text = if gbpa.abort() { "ABORT=1: everything is aborted" } else { "ABORT=0: everything passes" };
        let line = Line::register32(LineKind::Stream, name("GBPA"), e.gbpa, text.into());
        return vec![first, line.with_fields(vec![bit("ABORT", gbpa.abort())])];
    }
    let cfg = StrtabBaseCfg::from_bits(e.strtab_base_cfg);
    let base = StrtabBase::from_bits(e.strtab_base).addr_55_6() << 6;
    let two = cfg.fmt() == 1;
    let streams = format!("2^{} streams", cfg.log2size());
    let text = if two {
        format!("two-level table at {base:#x}, {streams}, SPLIT={}", cfg.split())
    } else {
        format!("linear table at {base:#x}, {streams}")
    };
    let second = Line::register32(LineKind::Stream, name("STRTAB_CFG"), e.strtab_base_cfg, text);
    let fields = vec![
        Field::hex("STRTAB_BASE", e.strtab_base),
        Field::new("FMT", cfg.fmt()),
        Field::new("SPLIT", cfg.split()),
        Field::new("LOG2SIZE", cfg.log2size()),
    ];
    vec![first, second.with_fields(fields)]
}

/// The level 1 stream table descriptor.
pub(crate) fn l1std(at: u64, value: u64) -> Line {
    let d = L1Std::from_bits(value);
    let text = match d.span() {
        0 => "Span=0: no streams here".into(),
        s @ 1..=11 => {
            format!("Span={s}: {} streams, their entries at {:#x}", 1u32 << (s - 1), d.l2ptr_55_6() << 6)
        }
        s => format!("Span={s} is reserved and acts as 0: no streams here"),
    };
    more(
        word(LineKind::Stream, "L1STD", at, value, text),
        vec![Field::new("Span", d.span()), Field::hex("L2Ptr", d.l2ptr_55_6() << 6)],
    )
}

const CONFIGS: [&str; 8] =
    ["abort", "abort", "abort", "abort", "bypass", "stage 1", "stage 2", "stage 1, then stage 2"];

/// The overrides of an STE that change something.
pub(crate) fn overrides(ste: &Ste) -> Vec<String> {
    let d = ste.dw1();
    let mut found = Vec::new();
    match d.privcfg() {
        2 => found.push("PRIVCFG=2 unprivileged".to_owned()),
        3 => found.push("PRIVCFG=3 privileged".into()),
        _ => {}
    }
    match d.instcfg() {
        2 => found.push("INSTCFG=2 data".into()),
        3 => found.push("INSTCFG=3 instruction (reads only)".into()),
        _ => {}
    }
    if ste.config().stage1() {
        return found;
    }
    if d.mtcfg() {
        found.push(format!("MemAttr={:#x} {}", d.memattr(), MemoryType::from_code(d.memattr())));
    }
    match d.shcfg() {
        1 => {}
        code => found.push(format!("SHCFG={code} {}", portcullis_arch::Shareability::from_code(code))),
    }
    if d.alloccfg() & 8 != 0 {
        found.push(format!("ALLOCCFG={:#06b}", d.alloccfg()));
    }
    found
}

/// The stream table entry, one line for each word that decides something.
pub(crate) fn ste(at: u64, ste: &Ste, caps: &Caps) -> Vec<Line> {
    let (d0, d1, d2) = (ste.dw0(), ste.dw1(), ste.dw2());
    let config = ste.config();
    let label = |n: usize| if n == 0 { "STE".to_owned() } else { format!("STE[{n}]") };
    let line = |n: usize, text: String| {
        let value = ste.0.get(n).copied().unwrap_or_default();
        word(LineKind::Stream, label(n), at.wrapping_add(8 * n as u64), value, text)
    };
    let mut text = format!("V={}", u8::from(d0.v()));
    if d0.v() {
        let code = usize::from(d0.config());
        text += &format!(" Config={code:#05b}: {}", CONFIGS.get(code).copied().unwrap_or_default());
        if config.stage1() {
            text += &format!("; CDs at {:#x}", ste.s1_context_ptr());
            text += &match (d0.s1cdmax(), d0.s1fmt()) {
                (0, _) => ", one, no substreams (S1CDMax=0)".into(),
                (n, 1) => format!(", 2^{n}, two-level with 4 KiB leaves"),
                (n, 2) => format!(", 2^{n}, two-level with 64 KiB leaves"),
                (n, _) => format!(", 2^{n}, linear"),
            };
        }
    } else {
        text += ": not valid";
    }
    let fields = vec![
        Field::new("V", u8::from(d0.v())),
        Field::new("Config", d0.config()),
        Field::new("S1Fmt", d0.s1fmt()),
        Field::new("S1CDMax", d0.s1cdmax()),
        Field::hex("S1ContextPtr", ste.s1_context_ptr()),
    ];
    let mut lines = vec![more(line(0, text), fields)];
    if !d0.v() || config == SteConfig::Abort {
        return lines;
    }
    let mut parts = Vec::new();
    if config.stage1() && d0.s1cdmax() != 0 {
        parts.push(match d1.s1dss() {
            1 => "S1DSS=1: without a substream stage 1 is bypassed".to_owned(),
            2 => "S1DSS=2: without a substream CD 0".into(),
            n => format!("S1DSS={n}: without a substream terminated"),
        });
    }
    if config == SteConfig::Stage1 {
        parts.extend((d1.strw() != 0).then(|| format!("STRW={}", d1.strw())));
    }
    parts
        .extend((config.stage1() && d1.s1stalld()).then(|| "S1STALLD=1: stage 1 faults do not stall".into()));
    parts.extend((d1.eats() != 0).then(|| format!("EATS={}", d1.eats())));
    parts.extend(overrides(ste));
    if !parts.is_empty() {
        let fields = vec![
            Field::new("S1DSS", d1.s1dss()),
            Field::new("STRW", d1.strw()),
            Field::new("EATS", d1.eats()),
            Field::new("S1STALLD", u8::from(d1.s1stalld())),
            Field::new("PRIVCFG", d1.privcfg()),
            Field::new("INSTCFG", d1.instcfg()),
            Field::new("MTCFG", u8::from(d1.mtcfg())),
            Field::new("SHCFG", d1.shcfg()),
        ];
        lines.push(more(line(1, parts.join(", ")), fields));
    }
    if config.stage2() {
        let s = shape::of_ste(ste, caps);
        let walks = walk_attributes(d2.s2ir0(), d2.s2or0(), d2.s2sh0(), true);
        let ends = match (d2.s2s(), d2.s2r()) {
            (true, _) => "a fault stalls (S2S=1)",
            (false, true) => "a fault aborts and is recorded (S2R=1)",
            (false, false) => "a fault aborts unrecorded (S2R=0)",
        };
        let extra = match (d2.s2ha(), d2.s2hd(), d2.s2affd()) {
            (true, true, _) => ", hardware sets access flag and dirty state",
            (true, ..) => ", hardware sets the access flag",
            (_, _, true) => ", no access flag faults (S2AFFD=1)",
            _ => "",
        };
        let text = format!(
            "VMID {}, {}, {}-bit output, walks {} {}; {ends}{extra}",
            d2.s2vmid(),
            s.text(),
            s.output_bits,
            walks.memory(),
            walks.shareability()
        );
        let fields = vec![
            Field::new("S2VMID", d2.s2vmid()),
            Field::new("S2T0SZ", d2.s2t0sz()),
            Field::new("S2SL0", d2.s2sl0()),
            Field::new("S2TG", d2.s2tg()),
            Field::new("S2PS", d2.s2ps()),
            Field::new("S2S", u8::from(d2.s2s())),
            Field::new("S2R", u8::from(d2.s2r())),
        ];
        lines.push(more(line(2, text), fields));
        let base = vec![Field::hex("S2TTB", ste.s2ttb())];
        lines.push(more(line(3, format!("stage 2's first table at {:#x}", ste.s2ttb())), base));
    } else if config == SteConfig::Stage1 && caps.stage2 && d2.s2vmid() != 0 {
        let fields = vec![Field::new("S2VMID", d2.s2vmid())];
        lines.push(more(line(2, format!("VMID {} (a tag only)", d2.s2vmid())), fields));
    }
    lines
}

/// The level 1 context descriptor.
pub(crate) fn l1cd(at: u64, value: u64) -> Line {
    let d = L1Cd::from_bits(value);
    let text = if d.v() {
        format!("V=1: context descriptors at {:#x}", d.l2ptr_55_12() << 12)
    } else {
        "V=0: no context descriptors here".into()
    };
    let fields = vec![Field::new("V", u8::from(d.v())), Field::hex("L2Ptr", d.l2ptr_55_12() << 12)];
    more(word(LineKind::Bank, "L1CD", at, value, text), fields)
}

fn half(shape: &Shape) -> String {
    if shape.off { format!("TTB{} off (EPD{}=1)", shape.half, shape.half) } else { shape.text() }
}

/// What A, R and S make of a fault.
pub(crate) fn on_fault(cd: &Cd) -> &'static str {
    let d = cd.dw0();
    match (d.s(), d.a(), d.r()) {
        (true, ..) => "stalls (S=1)",
        (_, true, true) => "aborts and is recorded (A=1 R=1)",
        (_, true, false) => "aborts unrecorded (A=1 R=0)",
        (_, false, true) => "reads zeros, ignores writes and is recorded (A=0 R=1)",
        (_, false, false) => "reads zeros, ignores writes, unrecorded (A=0 R=0)",
    }
}

/// The context descriptor.
pub(crate) fn cd(at: u64, cd: &Cd, caps: &Caps, va: u64) -> Vec<Line> {
    let d = cd.dw0();
    let line = |n: usize, text: String| {
        let label = if n == 0 { "CD".to_owned() } else { format!("CD[{n}]") };
        let value = cd.0.get(n).copied().unwrap_or_default();
        word(LineKind::Bank, label, at.wrapping_add(8 * n as u64), value, text)
    };
    if !d.v() {
        return vec![more(line(0, "V=0: not valid".into()), vec![Field::new("V", 0)])];
    }
    let halves = [0, 1].map(|n| shape::half_of_cd(cd, caps, n));
    let flags = [
        (!d.aa64(), ", AArch32 tables"),
        (d.ha() && d.hd(), ", hardware sets access flag and dirty state"),
        (d.ha() && !d.hd(), ", hardware sets the access flag"),
        (d.affd(), ", no access flag faults (AFFD=1)"),
        (d.wxn(), ", WXN=1"),
        (d.uwxn(), ", UWXN=1"),
        (d.pan(), ", PAN=1"),
        (d.endi(), ", big-endian tables"),
        (d.tbi0(), ", top byte ignored (TBI0)"),
    ];
    let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, text)| *text).collect();
    let text = format!(
        "V=1 ASID {}; {}; {}; {}-bit output{flags}; a fault {}",
        d.asid(),
        half(&halves[0]),
        half(&halves[1]),
        halves[0].output_bits,
        on_fault(cd)
    );
    let bit = |name, set: bool| Field::new(name, u8::from(set));
    let fields = vec![
        bit("V", true),
        Field::new("ASID", d.asid()),
        bit("AA64", d.aa64()),
        Field::new("T0SZ", d.t0sz()),
        Field::new("TG0", d.tg0()),
        bit("EPD0", d.epd0()),
        Field::new("T1SZ", d.t1sz()),
        Field::new("TG1", d.tg1()),
        bit("EPD1", d.epd1()),
        Field::new("IPS", d.ips()),
        bit("A", d.a()),
        bit("R", d.r()),
        bit("S", d.s()),
    ];
    let mut lines = vec![more(line(0, text), fields)];
    let used = halves[shape::selected(cd, va)];
    if !used.off {
        let name = ["TTB0", "TTB1"][used.half];
        let text = format!("{name}: first table at {:#x}", used.base);
        lines.push(more(line(1 + used.half, text), vec![Field::hex(name, used.base)]));
    }
    lines
}
