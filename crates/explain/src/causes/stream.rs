//! Causes before any table is read: the stream match registers, S2CR, CBAR.

use portcullis_arch::smmuv2::{CbType, Cbar, Cr0, S2cr, S2crType, Smr};
use portcullis_arch::{StreamId, zynqmp};
use portcullis_bus::Memory;
use portcullis_smmuv2::{BypassReason, Explanation, GlobalFault};

use super::{Cause, CauseContext, CauseKind};
use crate::probe::Probe;
use crate::story::smr_id_mask;
use crate::words;

/// A group as matching sees it.
#[derive(Clone, Copy, Debug)]
struct Group {
    n: u16,
    valid: bool,
    id: u32,
    mask: u32,
}

impl Group {
    fn matches(&self, stream: u32) -> bool {
        (self.id ^ stream) & !self.mask == 0
    }
    fn show(&self) -> String {
        if self.mask == 0 {
            format!("SMR[{}]={:#x}", self.n, self.id)
        } else {
            format!("SMR[{}]={:#x} mask {:#x}", self.n, self.id, self.mask)
        }
    }
}

fn groups<M: Memory>(probe: &Probe<'_, M>, e: &Explanation) -> Vec<Group> {
    let extended = Cr0::from_bits(e.cr0).exidenable();
    (0..probe.config().stream_groups)
        .map(|n| {
            let (smr, s2cr) = probe.group(n);
            let (id, mask) = smr_id_mask(smr, extended);
            let valid =
                if extended { S2cr::from_bits(s2cr).exidvalid() } else { Smr::from_bits(smr).valid() };
            Group { n, valid, id, mask }
        })
        .collect()
}

/// Where an untranslated access would go.
fn untranslated<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> String {
    let pa = e.va.get() & ((1u64 << probe.config().pa_bits.min(63)) - 1);
    let harm = match (ctx.is_ram(pa), e.access) {
        (true, portcullis_arch::Access::Write) => ": it would overwrite whatever is there",
        _ => "",
    };
    format!("physical address {pa:#x} ({}){harm}", ctx.place(pa))
}

/// Causes of a transaction that passes untranslated.
pub(super) fn bypass<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    reason: BypassReason,
    pa: u64,
) -> Vec<Cause> {
    let used = format!("{:#x} is used as physical address {pa:#x} ({})", e.va, ctx.place(pa));
    let (why, fix) = match reason {
        BypassReason::ClientDisabled => (
            "the SMMU is off (CR0.CLIENTPD=1), as after reset",
            "write CR0 with CLIENTPD=0 after setting up all SMR, S2CR and context banks",
        ),
        BypassReason::Unmatched => (
            "no stream match register holds the stream, and unmatched streams bypass (CR0.USFCFG=0)",
            "set CR0.USFCFG=1 (Linux: arm-smmu.disable_bypass=1) so that a wrong stream id faults and does not reach memory",
        ),
        BypassReason::Conflict => (
            "several stream match registers hold the stream, and conflicts bypass (CR0.SMCFCFG=0)",
            "make the stream match registers disjoint",
        ),
        BypassReason::Stream => (
            "S2CR of the stream says bypass (TYPE=1): an identity domain",
            "attach a translating domain (Linux: iommu.passthrough=0, or a DMA domain for the group)",
        ),
    };
    let mut found = match reason {
        BypassReason::Unmatched => unmatched(probe, e, ctx),
        BypassReason::Conflict => vec![conflict(probe, e, ctx)],
        _ => Vec::new(),
    };
    found.insert(0, Cause::new(CauseKind::Bypass, format!("not translated: {why}"), fix).because(used));
    found
}

/// Causes of a global fault.
pub(super) fn global<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: GlobalFault,
    nested: bool,
) -> Vec<Cause> {
    match (fault, nested) {
        (GlobalFault::UnidentifiedStream, _) => unmatched(probe, e, ctx),
        (GlobalFault::StreamMatchConflict, _) => vec![conflict(probe, e, ctx)],
        (GlobalFault::InvalidContext, false) => vec![faulting_group(e, ctx)],
        (GlobalFault::InvalidContext, true) => vec![unusable_bank(probe, e, ctx)],
        (GlobalFault::UnimplementedBank, _) => vec![missing_bank(probe, e, ctx, nested)],
        (GlobalFault::Permission, _) => vec![
            Cause::new(
                CauseKind::SecureInstructionFetch,
                "a secure instruction fetch from non-secure memory, which SCR1.SIF=1 forbids",
                "drive AxPROT[2]=0 (data) and AxPROT[1]=1 (non-secure) on the master",
            )
            .because(ctx.describe(e.from.stream)),
        ],
    }
}

/// Why no group matches: near misses first, then that there is none.
fn unmatched<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Vec<Cause> {
    let stream = e.from.stream;
    let raw = stream.get();
    let all = groups(probe, e);
    let valid: Vec<&Group> = all.iter().filter(|g| g.valid).collect();
    let shown: Vec<String> = valid.iter().map(|g| g.show()).collect();
    let mut facts = vec![format!("the hardware sends {}", ctx.describe(stream))];
    facts.push(if shown.is_empty() {
        "no stream match register is valid".into()
    } else {
        format!("valid stream match registers: {}", words::some_of(&shown, 12))
    });
    facts.push(format!("bypass would have sent it to {}", untranslated(probe, e, ctx)));

    let bits = if Cr0::from_bits(e.cr0).exidenable() { 16 } else { probe.config().stream_id_bits };
    if raw >> bits.min(31) != 0 {
        let cause = Cause::new(
            CauseKind::StreamIdTooWide,
            format!("stream {raw:#x} needs more than the {bits} bits of this SMMU's stream ids"),
            "check how the master's stream id is composed",
        );
        return vec![cause.because_all(facts)];
    }
    let mut found: Vec<Cause> = Vec::new();
    if let Some(g) = all.iter().find(|g| g.valid && g.matches(raw)) {
        let (side, prot) = if e.secure { ("secure", 0) } else { ("non-secure", 1) };
        found.push(
            Cause::new(
                CauseKind::OtherSecurityState,
                format!("{} holds the stream, but not for {side} transactions", g.show()),
                format!(
                    "the master drives AxPROT[1]={prot}; groups are split between the security states by SCR1.NSNUMSMRGO"
                ),
            )
            .because_all(facts.clone()),
        );
    }
    if let Some(g) = all.iter().find(|g| !g.valid && g.id == raw && raw != 0) {
        found.push(
            Cause::new(
                CauseKind::InvalidStreamMatch,
                format!("{} holds the stream but is not valid", g.show()),
                "set SMR.VALID (bit 31) after S2CR is written",
            )
            .because_all(facts.clone()),
        );
    }
    let misses = valid.iter().filter_map(|g| near_miss(g, stream, ctx).map(|(distance, m)| (distance, g, m)));
    if let Some((_, g, miss)) = misses.min_by_key(|(distance, ..)| *distance) {
        found.push(
            Cause::new(
                CauseKind::WrongStreamId,
                format!("{} was probably meant for stream {raw:#x}: {miss}", g.show()),
                format!(
                    "put {raw:#x} into the device tree (iommus = <&smmu {raw:#x}>) in place of {:#x}",
                    g.id
                ),
            )
            .because_all(facts.clone()),
        );
    }
    let none = Cause::new(
        CauseKind::MissingStreamMapping,
        format!("no stream match register holds stream {raw:#x}: its master has no domain"),
        format!(
            "give the master's node iommus = <&smmu {raw:#x}>, and check that its driver or the SMMU driver attached a domain; \
             masters that send several ids need all of them, or a mask"
        ),
    );
    found.push(if found.is_empty() { none.because_all(facts) } else { none });
    found
}

/// Why a group's id may be a mistake for `stream`, and how far they are apart.
fn near_miss(g: &Group, stream: StreamId, ctx: &CauseContext<'_>) -> Option<(u32, String)> {
    let raw = stream.get();
    let differ = (g.id ^ raw) & !g.mask;
    if !ctx.zynqmp {
        // Two neighbours are two devices; one bit elsewhere looks like a mistake.
        return (differ.count_ones() == 1 && differ > 0x3f)
            .then(|| (100, format!("they differ in bit {} only", differ.trailing_zeros())));
    }
    let meant = StreamId(g.id);
    let (theirs, ours) = (zynqmp::decode(meant)?, zynqmp::decode(stream)?);
    if zynqmp::likely_meant(meant) == Some(stream) {
        return Some((
            0,
            format!("its TBU number is {}, but this master enters through TBU {}", theirs.tbu, ours.tbu),
        ));
    }
    let master = ours.source?;
    match theirs.source {
        Some(m) if m == master && master.count == 64 => Some((
            10 + (differ & 0x3f).count_ones(),
            format!(
                "the same port with AXI ID {:#x} in place of {:#x}; several masters or ids behind one port need a mask of 0x3f \
                 or one entry each",
                theirs.axi_id, ours.axi_id
            ),
        )),
        Some(m) if m.count == 64 && master.count == 64 && theirs.axi_id == ours.axi_id => {
            Some((20, format!("it names port {}, but the transaction came through {}", m.name, master.name)))
        }
        Some(_) => None,
        None => {
            let parts = [
                (differ & 0x7c00 != 0, "TBU number [14:10]"),
                (differ & 0x03c0 != 0, "master [9:6]"),
                (differ & 0x003f != 0, "AXI ID [5:0]"),
            ];
            let wrong: Vec<&str> = parts.iter().filter(|(d, _)| *d).map(|(_, n)| *n).collect();
            let distance = 5 + 10 * wrong.len() as u32 + differ.count_ones();
            (wrong.len() <= 2).then(|| {
                (
                    distance,
                    format!(
                        "no master of this chip sends {:#x}; they differ in {}",
                        g.id,
                        words::list(&wrong)
                    ),
                )
            })
        }
    }
}

fn conflict<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let raw = e.from.stream.get();
    let both: Vec<String> =
        groups(probe, e).iter().filter(|g| g.valid && g.matches(raw)).map(Group::show).collect();
    Cause::new(
        CauseKind::StreamMatchConflict,
        format!("{} all match stream {raw:#x}", words::list(&both)),
        "make them disjoint: two entries may not overlap in the bits that neither masks; remove the one entry that the other \
         covers",
    )
    .because(ctx.describe(e.from.stream))
}

fn faulting_group(e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let (group, _, s2cr) = e.group.unwrap_or_default();
    let kind = S2cr::from_bits(s2cr).kind();
    let name = if kind == S2crType::Reserved { "TYPE=3, reserved" } else { "TYPE=2" };
    Cause::new(
        CauseKind::NoDomainAttached,
        format!("S2CR[{group}] of the stream says fault ({name}): no domain is attached, or a blocking one is"),
        format!("attach a domain: S2CR[{group}] needs TYPE=0 and CBNDX; Linux writes it at attach and fault type at reset"),
    )
    .because(ctx.describe(e.from.stream))
}

fn unusable_bank<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let c = probe.config();
    let (what, fix) = match (&e.bank, &e.stage2_bank) {
        (Some(b), Some(second)) => (
            format!(
                "bank {} is nested on bank {}, whose CBAR is {:#x} and CBA2R {:#x}",
                b.index, second.index, second.cbar, second.cba2r
            ),
            "the stage 2 bank needs CBAR.TYPE=0, and VA64=1 if the stage 1 bank has it".into(),
        ),
        (Some(b), None) => {
            let kind = Cbar::from_bits(b.cbar).kind();
            let why = match kind {
                _ if e.secure && kind != CbType::Stage1Bypass => "secure banks allow TYPE=1 only",
                CbType::Stage1Fault => "TYPE=2 refuses every transaction; it is the value after reset",
                _ if b.index < c.stage2_only_banks => "this bank can do stage 2 only (IDR1.NUMS2CB)",
                _ => "this SMMU does not implement that stage (IDR0)",
            };
            let n = b.index;
            (
                format!("CBAR[{n}]={:#x} (TYPE={}) cannot be used: {why}", b.cbar, b.cbar >> 16 & 3),
                format!("program bank {n} before S2CR points to it: CBAR.TYPE=1 for stage 1, 0 for stage 2"),
            )
        }
        _ => ("the context bank cannot be used".into(), "check S2CR.CBNDX and CBAR".into()),
    };
    Cause::new(CauseKind::UnusableBank, what, fix).because(ctx.describe(e.from.stream))
}

fn missing_bank<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    nested: bool,
) -> Cause {
    let banks = probe.config().context_banks;
    let (n, register) = match (nested, &e.bank, e.group) {
        (true, Some(b), _) => (Cbar::from_bits(b.cbar).s2_cbndx(), format!("CBAR[{}].CBNDX", b.index)),
        (_, _, Some((g, _, s2cr))) => (S2cr::from_bits(s2cr).cbndx(), format!("S2CR[{g}].CBNDX")),
        _ => (0, "CBNDX".into()),
    };
    let what = if n >= banks {
        format!("{register}={n}, but this SMMU has {banks} context banks")
    } else {
        let side = if e.secure { "non-secure" } else { "secure" };
        format!("{register}={n}, but that bank belongs to the {side} side (SCR1.NSNUMCBO)")
    };
    let fix =
        format!("write the number of a bank between 0 and {} that this side owns", banks.saturating_sub(1));
    Cause::new(CauseKind::MissingBank, what, fix).because(ctx.describe(e.from.stream))
}

#[cfg(test)]
mod tests {
    use portcullis_arch::smmuv2::offset::gr0;
    use portcullis_arch::{Access, Iova};
    use portcullis_bus::Initiator;

    use super::*;
    use crate::testing::{Board, STREAM};

    fn causes_of(board: &Board, stream: u32) -> Vec<Cause> {
        let from = Initiator::new(StreamId(stream));
        board.causes(&board.smmu.explain(from, Iova(0x6000_0000), Access::Write))
    }

    fn joined(c: &Cause) -> String {
        c.to_string()
    }

    #[test]
    fn hp0_without_its_tbu_number_is_recognised() {
        let board = Board::new();
        board.group(1, 0x280, 0, 0);
        let found = causes_of(&board, 0xe80);
        assert_eq!(found[0].kind, CauseKind::WrongStreamId);
        let text = joined(&found[0]);
        assert!(text.contains("SMR[1]=0x280 was probably meant for stream 0xe80"), "{text}");
        assert!(text.contains("enters through TBU 3"), "{text}");
        assert!(text.contains("S_AXI_HP0_FPD id 0"), "{text}");
        assert!(text.contains("SMR[0]=0x14e8, SMR[1]=0x280"), "{text}");
        assert!(text.contains("physical address 0x60000000 (RAM): it would overwrite"), "{text}");
        assert!(text.contains("iommus = <&smmu 0xe80>"), "{text}");
    }

    #[test]
    fn the_thesis_pattern_hpc1_and_another_axi_id_are_near_misses_of_hpc0() {
        for (wrong, word) in
            [(0x080, "no master of this chip sends 0x80"), (0x240, "S_AXI_HPC1_FPD"), (0x205, "AXI ID 0x5")]
        {
            let board = Board::new();
            board.group(1, wrong, 0, 0);
            let found = causes_of(&board, 0x200);
            assert_eq!(found[0].kind, CauseKind::WrongStreamId, "{wrong:#x}");
            assert!(found[0].what.contains(word), "{}", found[0].what);
        }
    }

    #[test]
    fn another_channel_of_its_own_is_not_a_near_miss() {
        let found = causes_of(&Board::new(), 0x14e9);
        assert_eq!(found[0].kind, CauseKind::MissingStreamMapping);
        let text = joined(&found[0]);
        assert!(text.contains("FPD DMA channel 1"), "{text}");
        assert!(text.contains("iommus = <&smmu 0x14e9>"), "{text}");
    }

    #[test]
    fn names_from_the_board_are_used() {
        let board = Board::new();
        let names = [(StreamId(0x14e9), "/axi/dma-controller@fd510000".to_owned())];
        let ctx = CauseContext { names: &names, ..CauseContext::default() };
        let e = board.smmu.explain(Initiator::new(StreamId(0x14e9)), Iova(0), Access::Read);
        let found = crate::causes(&board.smmu, &e, &ctx);
        assert!(found[0].evidence[0].contains("dma-controller@fd510000"), "{}", found[0]);
    }

    #[test]
    fn an_entry_that_is_not_valid_is_named() {
        let board = Board::new();
        board.global(gr0::SMR + 4, 0x868);
        let found = causes_of(&board, 0x868);
        assert_eq!(found[0].kind, CauseKind::InvalidStreamMatch);
        assert!(found[0].what.contains("SMR[1]=0x868"));
    }

    #[test]
    fn a_group_of_the_other_security_state_is_named() {
        let board = Board::new();
        let from = Initiator::new(STREAM);
        let from = from.with_attrs(from.attrs.with_non_secure(false));
        let secure = board.smmu.window(true);
        portcullis_bus::Mmio::write32(&secure, 0, 0x0020_0c36).unwrap();
        let found = board.causes(&board.smmu.explain(from, Iova(0), Access::Read));
        assert_eq!(found[0].kind, CauseKind::OtherSecurityState);
        assert!(found[0].what.contains("SMR[0]=0x14e8 holds the stream, but not for secure"), "{}", found[0]);
    }

    #[test]
    fn an_id_that_is_too_wide_is_named() {
        assert_eq!(causes_of(&Board::new(), 0x1_0000)[0].kind, CauseKind::StreamIdTooWide);
    }

    #[test]
    fn unmatched_bypass_says_what_memory_is_hit() {
        let board = Board::new();
        board.global(gr0::CR0, 0x0020_1836);
        let found = causes_of(&board, 0x14e9);
        assert_eq!(found[0].kind, CauseKind::Bypass);
        assert!(found[0].evidence[0].contains("physical address 0x60000000 (RAM)"), "{}", found[0]);
        assert_eq!(found[1].kind, CauseKind::MissingStreamMapping);
        board.global(gr0::CR0, 0x0020_0001);
        let found = causes_of(&board, 0x14e8);
        assert!(found[0].what.contains("CLIENTPD"), "{}", found[0]);
    }

    #[test]
    fn a_conflict_names_both_groups() {
        let board = Board::new();
        board.group(7, 0x14e0, 0x1f, 0);
        let found = causes_of(&board, 0x14e8);
        assert_eq!(found[0].kind, CauseKind::StreamMatchConflict);
        assert_eq!(found[0].what, "SMR[0]=0x14e8 and SMR[7]=0x14e0 mask 0x1f all match stream 0x14e8");
    }

    #[test]
    fn a_faulting_s2cr_is_a_missing_domain() {
        let board = Board::new();
        board.group(0, 0x14e8, 0, 0x2_0000);
        let found = causes_of(&board, 0x14e8);
        assert_eq!(found[0].kind, CauseKind::NoDomainAttached);
        assert!(found[0].what.contains("S2CR[0]"));
    }

    #[test]
    fn banks_that_do_not_exist_or_cannot_be_used_are_named() {
        let board = Board::new();
        board.group(0, 0x14e8, 0, 16);
        let found = causes_of(&board, 0x14e8);
        assert_eq!(found[0].kind, CauseKind::MissingBank);
        assert_eq!(found[0].what, "S2CR[0].CBNDX=16, but this SMMU has 16 context banks");
        board.group(0, 0x14e8, 0, 5);
        let found = causes_of(&board, 0x14e8);
        assert_eq!(found[0].kind, CauseKind::UnusableBank);
        assert!(found[0].what.contains("CBAR[5]=0x20000 (TYPE=2)"), "{}", found[0]);
        // Nested on a bank that is not a stage 2 bank.
        board.bank(5, 0x3_0600);
        let found = causes_of(&board, 0x14e8);
        assert!(found[0].what.contains("bank 5 is nested on bank 6"), "{}", found[0]);
        board.bank(5, 0x3_1000);
        let found = causes_of(&board, 0x14e8);
        assert_eq!(found[0].what, "CBAR[5].CBNDX=16, but this SMMU has 16 context banks");
    }
}
