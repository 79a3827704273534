//! One translation as the hardware made it: which register and which descriptor said what.

use std::fmt;

use portcullis_arch::smmuv2::{Cr0, S2cr, S2crType, Sctlr, Smr};
use portcullis_smmuv2::{BypassReason, Explanation, GlobalFault, Match, Outcome};
use portcullis_walk::{AccessKind, CachedEntry, Rule, Step};
use serde::Serialize;

use crate::bank;
use crate::descriptor::{self, Tables};
use crate::line::{Field, Line, LineKind};
use crate::outcome;
use crate::permission;
use crate::words;

/// A translation, step by step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Story {
    /// Who asks for what.
    pub title: String,
    /// The steps; the last one says how it ended.
    pub lines: Vec<Line>,
}

/// Title and lines, with the columns of registers and those of descriptors aligned. Ends without a newline.
impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title)?;
        let label = self.lines.iter().map(|l| l.label.len()).max().unwrap_or(0);
        let walk = |l: &Line| matches!(l.kind, LineKind::Descriptor | LineKind::BadDescriptor);
        let width = |of_walk: bool| {
            self.lines.iter().filter(|l| walk(l) == of_walk).map(|l| l.value.len()).max().unwrap_or(0)
        };
        let widths = [width(false), width(true)];
        for line in &self.lines {
            f.write_str("\n  ")?;
            line.write(f, label, widths[usize::from(walk(line))])?;
        }
        Ok(())
    }
}

/// Tells the story of an explanation. `cached` is the TLB entry that the transaction would hit
/// ([`Tbu::cached`](portcullis_walk::Tbu::cached)): hardware uses it without looking at the tables.
pub fn story(e: &Explanation, cached: Option<CachedEntry>) -> Story {
    let a = e.from.attrs;
    let title = format!(
        "{} of {:#x} by stream {:#x}: {} {} {}",
        e.access,
        e.va,
        e.from.stream,
        if a.non_secure() { "non-secure" } else { "secure" },
        if a.privileged() { "privileged" } else { "unprivileged" },
        if a.instruction() { "instruction" } else { "data" },
    );
    let mut lines = vec![cr0_line(e)];
    lines.extend(match_line(e));
    if let Some((group, _, s2cr)) = e.group {
        lines.push(s2cr_line(e, group, S2cr::from_bits(s2cr)));
    }
    for b in [&e.bank, &e.stage2_bank].into_iter().flatten() {
        lines.extend(bank::lines(b));
    }
    lines.extend(e.walk.iter().map(|s| step_line(e, s)));
    let stale = cached.and_then(|c| tlb_line(e, c, &mut lines));
    lines.push(stale.unwrap_or_else(|| result_line(e)));
    Story { title, lines }
}

fn cr0_line(e: &Explanation) -> Line {
    let cr0 = Cr0::from_bits(e.cr0);
    let name = if e.secure { "SCR0" } else { "CR0" };
    let text = if cr0.clientpd() {
        "CLIENTPD=1: nothing is translated".into()
    } else {
        let or = |fault: bool| if fault { "fault" } else { "bypass" };
        format!(
            "CLIENTPD=0: unmatched streams {} (USFCFG={}), match conflicts {} (SMCFCFG={})",
            or(cr0.usfcfg()),
            u8::from(cr0.usfcfg()),
            or(cr0.smcfcfg()),
            u8::from(cr0.smcfcfg())
        )
    };
    Line::register32(LineKind::Stream, name, e.cr0, text)
}

/// SMR as id and mask; 16 bits each with EXIDENABLE.
pub(crate) fn smr_id_mask(smr: u32, extended: bool) -> (u32, u32) {
    if extended {
        return (smr & 0xffff, smr >> 16);
    }
    let s = Smr::from_bits(smr);
    (s.id().into(), s.mask().into())
}

fn match_line(e: &Explanation) -> Option<Line> {
    let extended = Cr0::from_bits(e.cr0).exidenable();
    Some(match (e.matched.as_ref()?, e.group) {
        (Match::Group(_), Some((n, smr, _))) if extended || Smr::from_bits(smr).valid() => {
            let (id, mask) = smr_id_mask(smr, extended);
            let text = if mask == 0 {
                format!("ID {id:#x}: matches")
            } else {
                format!("ID {id:#x}, mask {mask:#x} (bits ignored): matches")
            };
            Line::register32(LineKind::Stream, format!("SMR[{n}]"), smr, text).with_fields(vec![
                Field::new("group", n),
                Field::hex("ID", id),
                Field::hex("MASK", mask),
            ])
        }
        (Match::Group(n), _) => Line::new(LineKind::Stream, "stream", format!("the index selects S2CR[{n}]"))
            .with_fields(vec![Field::new("group", n)]),
        (Match::None, _) => Line::new(LineKind::Stream, "SMR", "no group matches the stream"),
        (Match::Conflict(a, b), _) => {
            Line::new(LineKind::Stream, "SMR", format!("groups {a} and {b} both match the stream"))
        }
    })
}

fn s2cr_line(e: &Explanation, group: u16, s: S2cr) -> Line {
    let text = match s.kind() {
        S2crType::Translation => format!("translate in context bank {}", s.cbndx()),
        S2crType::Bypass => "bypass translation".into(),
        S2crType::Fault => "TYPE=2: every transaction faults".into(),
        S2crType::Reserved => "TYPE=3 (reserved): every transaction faults".into(),
    };
    let overrides = overrides(e, s);
    let text = if overrides.is_empty() { text } else { format!("{text}; {}", overrides.join(", ")) };
    Line::register32(LineKind::Stream, format!("S2CR[{group}]"), s.into_bits(), text).with_fields(vec![
        Field::new("TYPE", s.type_code()),
        Field::new("CBNDX", s.cbndx()),
        Field::new("PRIVCFG", s.privcfg()),
        Field::new("INSTCFG", s.instcfg()),
    ])
}

/// The attribute overrides of S2CR that have an effect on this stream.
fn overrides(e: &Explanation, s: S2cr) -> Vec<String> {
    let mut found = Vec::new();
    if s.kind() == S2crType::Translation {
        match s.privcfg() {
            0 => {}
            3 => found.push("PRIVCFG=3 privileged".to_owned()),
            code => found.push(format!("PRIVCFG={code} unprivileged")),
        }
        match s.instcfg() {
            0 => {}
            2 => found.push("INSTCFG=2 data".to_owned()),
            code => found.push(format!("INSTCFG={code} instruction (reads only)")),
        }
    }
    // A stage 1 that translates replaces memory attributes by those of its descriptors.
    let replaced = e.bank.is_some_and(|b| bank::stage(&b) == 1 && Sctlr::from_bits(b.sctlr).m());
    if matches!(s.kind(), S2crType::Fault | S2crType::Reserved) || replaced {
        return found;
    }
    if s.mtcfg() {
        found.push(format!(
            "MemAttr={:#x} {}",
            s.memattr(),
            portcullis_arch::MemoryType::from_code(s.memattr())
        ));
    }
    let codes = [("SHCFG", s.shcfg()), ("RACFG", s.racfg()), ("WACFG", s.wacfg())];
    found.extend(codes.iter().filter(|(_, c)| *c != 0).map(|(n, c)| format!("{n}={c}")));
    if e.secure && s.nscfg() != 0 {
        found.push(format!("NSCFG={}", s.nscfg()));
    }
    found
}

fn step_line(e: &Explanation, step: &Step) -> Line {
    let tables = Tables::of_bank(outcome::bank_of_stage(e, step.stage));
    descriptor_line("", step, &tables)
}

/// A descriptor that was read; `what` stands before its stage and level.
pub(crate) fn descriptor_line(what: &str, step: &Step, tables: &Tables) -> Line {
    let decoded = descriptor::decode(step, tables);
    let good = matches!(step.rule, Rule::Table { .. } | Rule::Leaf { .. } | Rule::Update { .. });
    let kind = if good { LineKind::Descriptor } else { LineKind::BadDescriptor };
    let mut line = Line::new(kind, format!("{what}S{} L{}", step.stage, step.level), decoded.text);
    line.value = format!("[{:#x}] = {:#018x}", step.address, step.value);
    line.fields = vec![
        Field::new("stage", step.stage),
        Field::new("level", step.level),
        Field::hex("address", step.address),
        Field::hex("value", step.value),
    ];
    line.fields.extend(decoded.fields);
    line
}

/// A TLB entry that this access would use and that does not say what the tables say.
pub(crate) fn stale_entry(e: &Explanation, cached: &CachedEntry) -> bool {
    match e.outcome {
        Outcome::Translated { walked, incoming } => {
            cached.perms.allows(AccessKind::new(e.access, incoming)) && walked.pa != cached.pa.get()
        }
        // An entry that forbids the access is not used: the port walks again.
        Outcome::Fault { incoming, .. } => cached.perms.allows(AccessKind::new(e.access, incoming)),
        _ => false,
    }
}

/// Adds the TLB's line. If the entry is stale, returns the line that ends the story instead of the tables' result.
fn tlb_line(e: &Explanation, cached: CachedEntry, lines: &mut Vec<Line>) -> Option<Line> {
    let size = words::size(cached.size_log2);
    let entry = format!("holds {:#x} -> {:#x} ({size}, {})", e.va, cached.pa, cached.perms);
    let fields = || vec![Field::hex("pa", cached.pa), Field::new("size", 1u64 << cached.size_log2.min(63))];
    if stale_entry(e, &cached) {
        let tables = match e.outcome {
            Outcome::Translated { walked, .. } => format!("the tables say {:#x}", walked.pa),
            _ => "the tables no longer map it".into(),
        };
        let text = format!("{entry}, but {tables}: missing TLB invalidation");
        lines.push(Line::new(LineKind::Stale, "TLB", text).with_fields(fields()));
        let text = format!("{:#x} from the stale TLB entry; the tables are not looked at", cached.pa);
        return Some(Line::new(LineKind::Stale, "result", text).with_fields(fields()));
    }
    let same = matches!(e.outcome, Outcome::Translated { walked, .. } if walked.pa == cached.pa.get());
    let text = if same { format!("{entry}, as the tables say") } else { format!("{entry}, not used") };
    lines.push(Line::new(LineKind::Tlb, "TLB", text).with_fields(fields()));
    None
}

fn result_line(e: &Explanation) -> Line {
    match &e.outcome {
        Outcome::Bypass { reason, pa, attrs } => {
            let why = match reason {
                BypassReason::ClientDisabled => "the SMMU is off (CLIENTPD=1)",
                BypassReason::Unmatched => "no group matches and unmatched streams bypass (USFCFG=0)",
                BypassReason::Conflict => "several groups match and conflicts bypass (SMCFCFG=0)",
                BypassReason::Stream => "S2CR says bypass",
            };
            let text = format!("{pa:#x} untranslated: {why}; {attrs}");
            Line::new(LineKind::Result, "result", text)
                .with_fields(vec![Field::hex("pa", *pa), Field::new("attributes", attrs)])
        }
        Outcome::Translated { walked, incoming } => {
            let attrs = outcome::outgoing(e, walked, *incoming);
            let page = if e.walk.is_empty() {
                "every stage is off, the address passes unchanged".into()
            } else {
                format!("page of {}, {}", words::size(walked.size_log2), walked.perms)
            };
            Line::new(LineKind::Result, "result", format!("{:#x}; {page}; {attrs}", walked.pa)).with_fields(
                vec![
                    Field::hex("pa", walked.pa),
                    Field::new("size", 1u64.checked_shl(walked.size_log2.into()).unwrap_or(0)),
                    Field::new("permissions", walked.perms),
                    Field::new("attributes", attrs),
                ],
            )
        }
        Outcome::Global { fault, nested, abort } => {
            let client = if *abort { "an abort (GFRE=1)" } else { "zeros, writes vanish (GFRE=0)" };
            let text = format!("{}; the client gets {client}", global_text(*fault, *nested));
            Line::new(LineKind::Fault, "fault", text)
                .with_fields(vec![Field::new("GFSR", global_name(*fault)), Field::new("nested", nested)])
        }
        Outcome::Blocked { bank, stall } => {
            let fate = if *stall { "waits for RESUME" } else { "is terminated" };
            let text = format!(
                "refused: bank {bank} still holds an earlier fault and HUPCF=0; this transaction {fate} unrecorded"
            );
            Line::new(LineKind::Fault, "fault", text).with_fields(vec![Field::new("bank", bank)])
        }
        Outcome::Fault { fault, incoming } => {
            let recorded = outcome::bank_of_stage(e, fault.stage);
            let mut text =
                format!("{}, stage {} level {}", outcome::fault_name(fault.kind), fault.stage, fault.level);
            if fault.stage == 2 {
                let walk = if fault.on_stage1_walk { ", a stage 1 table" } else { "" };
                text += &format!(" (IPA {:#x}{walk})", fault.ipa);
            }
            let read_one = !outcome::steps_of_stage(e, fault).is_empty();
            if fault.kind == portcullis_walk::FaultKind::Permission {
                let bits: Vec<String> =
                    permission::forbidden(e, fault, *incoming).into_iter().map(|f| f.bit).collect();
                text += &format!(": {}", words::list(&bits));
            } else if !read_one {
                text += &format!(": {}", outcome::before_the_walk(e, fault));
            }
            let bit = outcome::fsr_bit(fault.kind);
            let mut fields = vec![
                Field::new("FSR", bit),
                Field::new("stage", fault.stage),
                Field::new("level", fault.level),
            ];
            if let Some(b) = recorded {
                text += &format!("; recorded in bank {} as FSR.{bit}, {}", b.index, bank::on_fault(b.sctlr));
                fields.push(Field::new("bank", b.index));
            }
            if fault.stage == 2 {
                fields.push(Field::hex("ipa", fault.ipa));
            }
            Line::new(LineKind::Fault, "fault", text).with_fields(fields)
        }
    }
}

/// GFSR's name of a global fault.
pub(crate) fn global_name(fault: GlobalFault) -> &'static str {
    match fault {
        GlobalFault::InvalidContext => "ICF",
        GlobalFault::UnidentifiedStream => "USF",
        GlobalFault::StreamMatchConflict => "SMCF",
        GlobalFault::UnimplementedBank => "UCBF",
        GlobalFault::Permission => "PF",
    }
}

fn global_text(fault: GlobalFault, nested: bool) -> String {
    let why = match (fault, nested) {
        (GlobalFault::InvalidContext, false) => "S2CR sends the stream to no context",
        (GlobalFault::InvalidContext, true) => "the bank's CBAR.TYPE cannot be used",
        (GlobalFault::UnidentifiedStream, _) => "no group matches the stream",
        (GlobalFault::StreamMatchConflict, _) => "several groups match the stream",
        (GlobalFault::UnimplementedBank, false) => "the context bank of S2CR does not exist for this stream",
        (GlobalFault::UnimplementedBank, true) => "the stage 2 bank of CBAR does not exist for this stream",
        (GlobalFault::Permission, _) => "a secure instruction fetch from non-secure memory (SCR1.SIF)",
    };
    format!("global fault {}: {why}", global_name(fault))
}

#[cfg(test)]
mod tests {
    use portcullis_arch::smmuv2::offset::{cb, gr0};
    use portcullis_arch::{Access, Attributes, Iova};
    use portcullis_bus::Initiator;

    use super::*;
    use crate::testing::{Board, PAGE, ROOT, SCTLR, STREAM};

    fn told(board: &Board, va: u64, access: Access) -> String {
        story(&board.explain(va, access), None).to_string()
    }

    #[test]
    fn a_translated_write_is_told_from_stream_to_output() {
        let board = Board::new();
        board.group(3, 0x14ea, 1, 0);
        board.map_with(0x7000_2000, 0x6000_2000, PAGE | 3 << 53);
        let from = Initiator::new(portcullis_arch::StreamId(0x14eb));
        let e = board.smmu.explain(from, Iova(0x7000_2010), Access::Write);
        let expected = "\
write of 0x70002010 by stream 0x14eb: non-secure unprivileged data
  CR0        0x00201c06          CLIENTPD=0: unmatched streams fault (USFCFG=1), match conflicts fault (SMCFCFG=1)
  SMR[3]     0x800114ea          ID 0x14ea, mask 0x1 (bits ignored): matches
  S2CR[3]    0x00000000          translate in context bank 0
  CBAR[0]    0x0001f300          stage 1, stage 2 bypassed, VMID 0
  CBA2R[0]   0x00000001          VA64=1: AArch64 descriptors
  CB0.SCTLR  0x00000067          M=1 translates; a fault is terminated with an abort (CFRE=1); after one, all are refused until FSR is cleared (HUPCF=0)
  CB0.TCR    0x00802010          T0SZ=16: 48-bit addresses, 4 KiB granule, start level 0, walks Normal-NC outer-shareable; TTBR1 off (EPD1=1)
  CB0.TCR2   0x00038075          PASize=5: 48-bit output addresses, 16-bit ASIDs
  CB0.TTBR0  0x0000000010000000  first table at 0x10000000, ASID 0
  S1 L0      [0x10000000] = 0x0000000010001003  table -> 0x10001000
  S1 L1      [0x10001008] = 0x0000000010002003  table -> 0x10002000
  S1 L2      [0x10002c00] = 0x0000000010003003  table -> 0x10003000
  S1 L3      [0x10003010] = 0x0060000060002e43  page -> 0x60002000, 4 KiB; AP[2:1]=0b01(rw) UXN=1 PXN=1 AF=1 nG=1 AttrIndx=0(Normal-NC) SH=outer-shareable
  result     0x60002010; page of 4 KiB, privileged rw-, unprivileged rw-; Normal-NC outer-shareable non-secure unprivileged data";
        assert_eq!(story(&e, None).to_string(), expected);
    }

    #[test]
    fn json_has_kinds_and_named_fields() {
        let board = Board::new();
        let json = serde_json::to_value(story(&board.explain(0x7000_0000, Access::Read), None)).unwrap();
        let lines = json["lines"].as_array().unwrap();
        assert_eq!(lines[1]["fields"], serde_json::json!({ "group": "0", "ID": "0x14e8", "MASK": "0x0" }));
        let walk = &lines[lines.len() - 2];
        assert_eq!(walk["kind"], "bad-descriptor");
        assert_eq!(walk["fields"]["address"], "0x10000000");
        assert_eq!(walk["fields"]["kind"], "invalid");
        assert_eq!(lines[lines.len() - 1]["fields"]["FSR"], "TF");
    }

    #[test]
    fn faults_say_where_they_are_recorded() {
        let board = Board::new();
        board.map_with(0x7000_0000, 0x6000_0000, PAGE | 1 << 7);
        let text = told(&board, 0x7000_0000, Access::Write);
        assert!(
            text.ends_with(
                "fault      permission fault, stage 1 level 3: AP[2] = 1 (read-only) in the level 3 page descriptor at \
                 0x10003000; recorded in bank 0 as FSR.PF, terminated with an abort (CFRE=1)"
            ),
            "{text}"
        );
        board.cb(0, cb::SCTLR, SCTLR | 1 << 7);
        assert!(told(&board, 0x7000_0000, Access::Write).ends_with("FSR.PF, stalled (CFCFG=1)"));
        let text = told(&board, 1 << 48, Access::Write);
        assert!(
            text.contains("0x1000000000000 is in no table's range: TTBR0 covers 48 bits (T0SZ=16)"),
            "{text}"
        );
        board.global(gr0::CR0, 0x0020_0001);
        let text = told(&board, 0x7000_0000, Access::Write);
        assert!(text.contains("0x70000000 untranslated: the SMMU is off (CLIENTPD=1)"), "{text}");
    }

    #[test]
    fn overrides_are_told_where_they_count() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        // INSTCFG=3, PRIVCFG=2, MemAttr=0 with MTCFG: the last is replaced by the descriptor's.
        board.group(0, STREAM.get(), 0, 3 << 26 | 2 << 24 | 1 << 11);
        let text = told(&board, 0x7000_0000, Access::Read);
        assert!(
            text.contains("bank 0; PRIVCFG=2 unprivileged, INSTCFG=3 instruction (reads only)\n"),
            "{text}"
        );
        board.cb(0, cb::SCTLR, SCTLR & !1);
        let text = told(&board, 0x7000_0000, Access::Read);
        assert!(text.contains("MemAttr=0x0 Device-nGnRnE"), "{text}");
        assert!(text.contains("every stage is off, the address passes unchanged; Device-nGnRnE"), "{text}");
    }

    #[test]
    fn a_nested_walk_tells_both_stages_with_their_own_fields() {
        let board = Board::new();
        board.bank(0, 0x3_0100);
        let root2 = board.table();
        board.stage2_bank(1, root2);
        board.map(0x7000_0000, 0x4000_0000);
        for at in (ROOT..ROOT + 0x8000).step_by(0x1000) {
            board.store(board.slot(root2, 1, at), at | 0x7ff);
        }
        let text = told(&board, 0x7000_0000, Access::Write);
        assert!(text.contains("stage 1, then stage 2 in bank 1, VMID 0"), "{text}");
        assert!(text.contains("S2AP=0b11(rw) XN=0 AF=1 MemAttr=0xf(Normal-WB) SH=inner-shareable"), "{text}");
        assert!(text.contains("stage 2 level 1 (IPA 0x40000000)"), "{text}");
        assert!(text.contains("recorded in bank 1 as FSR.TF"), "{text}");
    }

    #[test]
    fn output_attributes_are_those_that_the_port_sends() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.map_with(0x7000_1000, 0x6000_1000, PAGE & !0x300 | 0x300 | 1 << 2);
        let root2 = board.table();
        board.stage2_bank(1, root2);
        for at in (ROOT..ROOT + 0xa000).step_by(0x1000).chain([0x6000_0000, 0x6000_1000]) {
            board.store(board.slot(root2, 1, at), at | 0x7ff);
        }
        let mut seen = 0;
        for cbar in [0x1_f300, 0x1_5200, 0x1_0000, 0x3_0100] {
            for (sctlr, sctlr2) in [(SCTLR, SCTLR), (SCTLR & !1, SCTLR), (SCTLR, SCTLR & !1 | 0x4_0000)] {
                for s2cr in [0, 3 << 26, 3 << 24 | 1 << 11 | 5 << 12] {
                    board.bank(0, cbar);
                    board.cb(0, cb::SCTLR, sctlr);
                    board.cb(1, cb::SCTLR, sctlr2);
                    board.group(0, STREAM.get(), 0, s2cr);
                    let mut port = board.smmu.port(board.memory.clone());
                    for va in [0x7000_0000, 0x7000_1000, 0x6000_0000] {
                        let from = Initiator::new(STREAM).with_attrs(Attributes::from_axi(0xf, 0b011));
                        let e = board.smmu.explain(from, Iova(va), Access::Read);
                        let Outcome::Translated { walked, incoming } = e.outcome else { continue };
                        let sent = port.translate(&from, Iova(va), Access::Read).unwrap();
                        assert_eq!(
                            outcome::outgoing(&e, &walked, incoming),
                            sent.attrs,
                            "{}",
                            story(&e, None)
                        );
                        assert_eq!(walked.pa, sent.pa.get());
                        seen += 1;
                    }
                }
            }
        }
        assert!(seen > 40, "{seen}");
    }

    #[test]
    fn a_tlb_entry_that_agrees_is_only_mentioned() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let mut port = board.smmu.port(board.memory.clone());
        let from = Initiator::new(STREAM);
        port.translate(&from, Iova(0x7000_0000), Access::Write).unwrap();
        let cached = port.cached(&from, Iova(0x7000_0000));
        let s = story(&board.explain(0x7000_0000, Access::Write), cached);
        let n = s.lines.len();
        assert_eq!((s.lines[n - 2].kind, s.lines[n - 1].kind), (LineKind::Tlb, LineKind::Result));
        assert!(s.lines[n - 2].text.ends_with("as the tables say"), "{}", s.lines[n - 2]);
    }
}
