//! The story of a translation by an SMMUv3: registers, stream table, context descriptor, tables, and how it ended.

use portcullis_arch::smmuv3::{EventClass, EventCode};
use portcullis_smmuv3::{BypassReason, Caps, Ending, Explanation, Outcome, Recorded, SilentAbort};
use portcullis_walk::{AccessKind, CachedEntry, Fault, FaultKind};

use crate::line::{Field, Line, LineKind};
use crate::outcome::fault_name;
use crate::story::{Story, descriptor_line};
use crate::v3::{lines, permission, shape};
use crate::words;

/// What was seen of the transaction besides its explanation. The default saw nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The TLB entry of the port that the transaction would hit: hardware uses it without looking at the tables.
    pub cached: Option<CachedEntry>,
    /// The transaction went through, and the device has no translations of its own (ATS). If registers and tables would
    /// refuse it, the port still used what it had looked up before.
    pub passed: bool,
    /// The device asked for the translation first (ATS), and this is what became of the request.
    pub asked: bool,
}

/// What hardware used in place of what registers and tables say now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Stale {
    /// A TLB entry: the walk would end differently.
    Tlb(CachedEntry),
    /// A TLB entry that the tables contradict, behind an STE or CD that would refuse by itself: the configuration cache is
    /// old as well.
    Both(CachedEntry),
    /// An STE or CD, or their absence.
    Config,
}

/// Finds out whether hardware used something old.
pub(crate) fn stale(e: &Explanation, seen: &Seen) -> Option<Stale> {
    let allowed =
        |incoming| seen.cached.filter(|c: &CachedEntry| c.perms.allows(AccessKind::new(e.access, incoming)));
    match &e.outcome {
        Outcome::Translated { walked, incoming, .. } => {
            allowed(*incoming).filter(|c| c.pa.get() != walked.pa).map(Stale::Tlb)
        }
        Outcome::Event { record, fault, ending, .. } => {
            let dw1 = record.dw1();
            let attrs = e.from.attrs.with_privileged(dw1.pnu()).with_instruction(dw1.ind());
            let walk = fault.is_some() && dw1.class() != EventClass::Cd as u8;
            match (allowed(attrs), walk) {
                (Some(c), true) => Some(Stale::Tlb(c)),
                (Some(c), false) if seen.passed => Some(Stale::Both(c)),
                _ if seen.passed && *ending == Ending::Abort => Some(Stale::Config),
                _ => None,
            }
        }
        Outcome::Silent(_) if seen.passed => Some(seen.cached.map_or(Stale::Config, Stale::Both)),
        Outcome::Bypass { pa, .. } => seen.cached.filter(|c| c.pa != *pa && seen.passed).map(Stale::Both),
        Outcome::Silent(_) => None,
    }
}

/// Tells the story of an explanation by an SMMU with these capabilities.
pub fn story_v3(e: &Explanation, caps: &Caps, seen: &Seen) -> Story {
    let a = e.from.attrs;
    let substream = e.from.substream.map_or(String::new(), |s| format!(" substream {s:#x}"));
    let title = format!(
        "{} of {:#x} by stream {:#x}{substream}: {} {} {}",
        e.access,
        e.va,
        e.from.stream,
        if e.secure { "secure" } else { "non-secure" },
        if a.privileged() { "privileged" } else { "unprivileged" },
        if a.instruction() { "instruction" } else { "data" },
    );
    let mut all = lines::registers(e);
    all.extend(e.l1std.map(|(at, value)| lines::l1std(at.get(), value)));
    if let Some((at, ste)) = &e.ste {
        all.extend(lines::ste(at.get(), ste, caps));
    }
    all.extend(e.cd_walk.iter().map(|step| descriptor_line("CD ", step, &shape::tables(e, step))));
    all.extend(e.l1cd.map(|(at, value)| lines::l1cd(at.get(), value)));
    if let Some((at, cd)) = &e.cd {
        all.extend(lines::cd(at.get(), cd, caps, e.va.get()));
    }
    all.extend(e.walk.iter().map(|step| descriptor_line("", step, &shape::tables(e, step))));
    let ending = match stale(e, seen) {
        Some(stale) => stale_lines(e, stale, &mut all),
        None => {
            all.extend(seen.cached.map(|c| tlb_line(e, &c)));
            result_line(e, caps, seen.asked)
        }
    };
    all.push(ending);
    Story { title, lines: all }
}

fn entry(e: &Explanation, c: &CachedEntry) -> (String, Vec<Field>) {
    let size = words::size(c.size_log2);
    let text = format!("holds {:#x} -> {:#x} ({size}, {})", e.va, c.pa, c.perms);
    (text, vec![Field::hex("pa", c.pa), Field::new("size", 1u64 << c.size_log2.min(63))])
}

fn tlb_line(e: &Explanation, c: &CachedEntry) -> Line {
    let (text, fields) = entry(e, c);
    let same = matches!(e.outcome, Outcome::Translated { walked, .. } if walked.pa == c.pa.get());
    let rest = if same { "as the tables say" } else { "not used" };
    Line::new(LineKind::Tlb, "TLB", format!("{text}, {rest}")).with_fields(fields)
}

/// What registers and tables say now, in a few words.
pub(crate) fn tables_say(e: &Explanation) -> String {
    match &e.outcome {
        Outcome::Translated { walked, .. } => format!("the tables say {:#x}", walked.pa),
        Outcome::Event { fault: Some(fault), .. } if !e.walk.is_empty() => match fault.kind {
            FaultKind::Translation => "the tables no longer map it",
            FaultKind::Permission => "the tables no longer allow it",
            FaultKind::External => "the tables cannot be read",
            FaultKind::AccessFlag | FaultKind::AddressSize => "the tables now say otherwise",
        }
        .into(),
        Outcome::Event { record, .. } => {
            format!("the configuration says {}: {}", record.code().map_or("event", EventCode::name), e.rule)
        }
        Outcome::Silent(_) => format!("the configuration says abort: {}", e.rule),
        Outcome::Bypass { .. } => format!("the configuration says bypass: {}", e.rule),
    }
}

/// Adds the lines of what is old and returns the one that ends the story instead of the tables' result.
fn stale_lines(e: &Explanation, stale: Stale, all: &mut Vec<Line>) -> Line {
    let say = tables_say(e);
    match stale {
        Stale::Tlb(c) => {
            let (text, fields) = entry(e, &c);
            let text = format!("{text}, but {say}: missing TLB invalidation");
            all.push(Line::new(LineKind::Stale, "TLB", text).with_fields(fields.clone()));
            let text = format!("{:#x} from the stale TLB entry; the tables are not looked at", c.pa);
            Line::new(LineKind::Stale, "result", text).with_fields(fields)
        }
        Stale::Both(c) => {
            let (text, fields) = entry(e, &c);
            let text = format!("{text}, but {say}: missing CMD_CFGI and TLB invalidation");
            all.push(Line::new(LineKind::Stale, "TLB", text).with_fields(fields.clone()));
            let text = format!("{:#x} by the stale configuration and TLB entry", c.pa);
            Line::new(LineKind::Stale, "result", text).with_fields(fields)
        }
        Stale::Config => {
            let text = format!("holds an older STE or CD, but {say}: missing CMD_CFGI");
            all.push(Line::new(LineKind::Stale, "cache", text));
            Line::new(LineKind::Stale, "result", "it went through by the stale configuration".to_owned())
        }
    }
}

fn result_line(e: &Explanation, caps: &Caps, asked: bool) -> Line {
    match &e.outcome {
        Outcome::Bypass { reason, pa, attrs } => {
            let why = match reason {
                BypassReason::Disabled => "the SMMU is off (SMMUEN=0) and GBPA.ABORT=0",
                BypassReason::Stream => "STE.Config says bypass",
                BypassReason::Translated => "the device has translated it (ATS)",
                BypassReason::NoSubstream => "STE.S1DSS lets transactions without a substream bypass stage 1",
            };
            Line::new(LineKind::Result, "result", format!("{pa:#x} untranslated: {why}; {attrs}"))
                .with_fields(vec![Field::hex("pa", *pa), Field::new("attributes", attrs)])
        }
        Outcome::Silent(why) => {
            let why = match why {
                SilentAbort::Disabled => "the SMMU is off (SMMUEN=0) and GBPA.ABORT=1",
                SilentAbort::DisabledRange => "the SMMU is off and the address is wider than its output",
                SilentAbort::Stream => "STE.Config says abort",
            };
            let fields = vec![Field::new("recorded", 0)];
            Line::new(LineKind::Fault, "fault", format!("aborted without an event: {why}"))
                .with_fields(fields)
        }
        Outcome::Translated { walked, outgoing, .. } => {
            let page = format!("page of {}, {}", words::size(walked.size_log2), walked.perms);
            Line::new(LineKind::Result, "result", format!("{:#x}; {page}; {outgoing}", walked.pa))
                .with_fields(vec![
                    Field::hex("pa", walked.pa),
                    Field::new("size", 1u64.checked_shl(walked.size_log2.into()).unwrap_or(0)),
                    Field::new("permissions", walked.perms),
                    Field::new("attributes", outgoing),
                ])
        }
        Outcome::Event { record, recorded, ending, fault } => {
            let name = record.code().map_or("event", EventCode::name);
            let mut text = format!("{name}: ");
            match fault {
                Some(fault) => text += &fault_text(e, caps, fault),
                None if e.rule.is_empty() => text += "refused",
                None => text += e.rule,
            }
            text += match ending {
                _ if asked && fault.is_some_and(|f| f.kind != FaultKind::External) => {
                    "; the device's translation request gets no access, which is no event"
                }
                _ if asked => "; the device's translation request is refused",
                Ending::Abort => "; the client gets an abort",
                Ending::ZeroIgnore => "; reads give zeros, writes vanish",
                Ending::Stall => "; it waits for CMD_RESUME",
            };
            text += match recorded {
                _ if asked => "",
                Recorded::Now => ", recorded",
                Recorded::Later => ", the record waits for room in the event queue",
                Recorded::Overflow => ", the record is lost: the event queue is full",
                Recorded::Lost => ", the record is lost: the event queue is off or at an error",
                Recorded::Suppressed => ", not recorded",
            };
            let words: Vec<String> = record.0.iter().map(|w| format!("{w:#018x}")).collect();
            let mut fields = vec![Field::new("event", name), Field::new("record", words.join(" "))];
            if let Some(fault) = fault {
                fields.extend([Field::new("stage", fault.stage), Field::new("level", fault.level)]);
                fields.extend((fault.stage == 2).then(|| Field::hex("ipa", fault.ipa)));
            }
            Line::new(LineKind::Fault, "fault", text).with_fields(fields)
        }
    }
}

/// A fault in tables: what, where, and by which bit or range.
fn fault_text(e: &Explanation, caps: &Caps, fault: &Fault) -> String {
    let mut text = format!("{}, stage {} level {}", fault_name(fault.kind), fault.stage, fault.level);
    if fault.stage == 2 {
        let what = match (e.walk.is_empty() && e.cd.is_none(), fault.on_stage1_walk) {
            (true, _) if e.ste.is_some_and(|(_, s)| s.config().stage1()) => ", of a context descriptor",
            (_, true) => ", of a stage 1 table",
            _ => "",
        };
        text += &format!(" (IPA {:#x}{what})", fault.ipa);
    }
    if fault.kind == FaultKind::Permission {
        let bits: Vec<String> = permission::forbidden(e, fault).into_iter().map(|f| f.bit).collect();
        text += &format!(": {}", words::list(&bits));
    } else if steps_of_fault(e, fault).is_empty() {
        text += &format!(": {}", before_the_walk(e, caps, fault));
    }
    text
}

/// The steps of the walk that met `fault`: all of stage 1, or the last walk of stage 2.
pub(crate) fn steps_of_fault<'a>(e: &'a Explanation, fault: &Fault) -> Vec<&'a portcullis_walk::Step> {
    if fault.stage == 1 {
        return e.walk.iter().filter(|s| s.stage == 1).collect();
    }
    let of_cd = e.walk.is_empty() && !e.cd_walk.is_empty() && e.cd.is_none();
    let walk = if of_cd { &e.cd_walk } else { &e.walk };
    // A stage 1 step stands between any two walks of stage 2; two on the way to a CD are told apart by their levels.
    let mut last: Vec<&portcullis_walk::Step> = Vec::new();
    for step in walk.iter().rev().take_while(|s| s.stage == 2) {
        if last.last().is_some_and(|l| l.level <= step.level && l.address != step.address) {
            break;
        }
        last.push(step);
    }
    last.reverse();
    last
}

/// Why a fault happened before any descriptor was read.
pub(crate) fn before_the_walk(e: &Explanation, caps: &Caps, fault: &Fault) -> String {
    let input = if fault.stage == 2 { fault.ipa } else { e.va.get() };
    let Some(ste) = e.ste.map(|(_, s)| s) else { return format!("{input:#x} is not translatable") };
    if fault.kind == FaultKind::AddressSize {
        let bits =
            if ste.config().stage1() || ste.config().stage2() { caps.ias_bits() } else { caps.oas_bits };
        return format!(
            "{input:#x} needs {} bits, and without stage 1 {bits} are allowed",
            words::width(input)
        );
    }
    if fault.stage == 2 {
        let s = shape::of_ste(&ste, caps);
        return format!("{input:#x} is outside of the {} bits of {}={}", s.bits, s.size_field(), s.tsz);
    }
    let Some(cd) = e.cd.map(|(_, c)| c) else { return format!("{input:#x} is not translatable") };
    let side = |n: usize| {
        let s = shape::half_of_cd(&cd, caps, n);
        if s.off {
            format!("TTB{n} is off (EPD{n}=1)")
        } else {
            format!("TTB{n} covers {} bits (T{n}SZ={})", s.bits, s.tsz)
        }
    };
    let half = shape::half_of_cd(&cd, caps, shape::selected(&cd, input));
    let e0pd = [cd.dw1().e0pd0(), cd.dw2().e0pd1()][half.half];
    let canonical = !half.off && half.bits < 64 && {
        let top = (input << 8) as i64 >> 8;
        let top = if [cd.dw0().tbi0(), cd.dw0().tbi1()][half.half] { top } else { input as i64 };
        matches!(top >> half.bits, 0 | -1)
    };
    if e0pd && canonical {
        return format!("E0PD{}=1: unprivileged accesses through TTB{0} fault", half.half);
    }
    format!("{input:#x} is in no table's range: {}, {}", side(0), side(1))
}
