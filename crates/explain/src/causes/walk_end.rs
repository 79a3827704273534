//! Causes where a walk found descriptors and something is wrong with them: their addresses, access flags, permissions,
//! where they are, or that they are old.

use portcullis_arch::Attributes;
use portcullis_arch::smmuv2::{S2cr, Sctlr, address_bits};
use portcullis_bus::Memory;
use portcullis_bus::coherency::Maintenance;
use portcullis_smmuv2::{Explanation, Outcome};
use portcullis_walk::{Fault, Rule, Step, TableFormat};

use super::translation::virtual_base;
use super::{Cause, CauseContext, CauseKind, layout};
use crate::bank;
use crate::outcome;
use crate::permission::{self, Forbidden, Why};
use crate::probe::{Probe, Register};
use crate::words;

/// A descriptor of this walk was read while a newer value was still in the CPU's cache.
pub(crate) fn stale_tables(walk: &[Step], ctx: &CauseContext<'_>) -> Option<Cause> {
    let places = outcome::descriptor_places(walk);
    let (stale, step) = ctx.stale.iter().filter(|s| s.missing == Maintenance::Clean).find_map(|s| {
        let at = places.iter().position(|p| p.is_some_and(|p| p & !7 == s.pa))?;
        Some((s, walk.get(at)?))
    })?;
    Some(
        Cause::new(
            CauseKind::TablesNotCleaned,
            format!(
                "the level {} descriptor at {:#x} is old: the CPU's new value is still in its cache",
                step.level, step.address
            ),
            "clean each descriptor from the cache after writing it (DC CVAC, then DSB; Linux does so unless the SMMU's node says \
             dma-coherent, which is true only where walks are coherent: IDR0.CTTW or COHACC)",
        )
        .because(format!("{} read {:#x} there, the CPU had written {:#x}", stale.reader, stale.seen, stale.current)),
    )
}

/// Oddities of a transaction that was translated.
pub(super) fn translated(e: &Explanation, ctx: &CauseContext<'_>, pa: u64, size_log2: u8) -> Vec<Cause> {
    let mut found: Vec<Cause> = stale_tables(&e.walk, ctx).into_iter().collect();
    let off = e.bank.filter(|b| e.walk.is_empty() && !Sctlr::from_bits(b.sctlr).m());
    if let Some(b) = off {
        found.push(
            Cause::new(
                CauseKind::TranslationOff,
                format!("context bank {} does not translate (SCTLR.M=0)", b.index),
                "set SCTLR.M after TTBR0, TCR and MAIR are written",
            )
            .because(format!(
                "{:#x} is used as physical address {pa:#x} ({})",
                e.va,
                ctx.place(pa)
            )),
        );
    }
    found.extend(stale_buffer(ctx, pa, size_log2));
    found
}

/// The data of a page was read while a newer value was elsewhere.
pub(crate) fn stale_buffer(ctx: &CauseContext<'_>, pa: u64, size_log2: u8) -> Option<Cause> {
    let page = 1u64.checked_shl(size_log2.into()).unwrap_or(0);
    let first = pa & !page.wrapping_sub(1);
    let s = ctx.stale.iter().find(|s| s.pa.wrapping_sub(first) < page)?;
    let (when, how) = match s.missing {
        Maintenance::Clean => {
            ("the CPU's data was still in its cache when the device read", "dma_sync_*_for_device")
        }
        Maintenance::Invalidate => {
            ("the CPU still held the old line when it read what the device had written", "dma_sync_*_for_cpu")
        }
    };
    let cause = Cause::new(
        CauseKind::BufferNotMaintained,
        format!("stale data in the buffer: {when}"),
        format!(
            "missing: {} ({how}); or a coherent path: a port through the CCI, dma-coherent in the node and cacheable, \
             shareable mappings",
            s.missing
        ),
    );
    Some(
        cause.because(format!("{} saw {:#x} at {:#x}, written was {:#x}", s.reader, s.seen, s.pa, s.current)),
    )
}

/// An address in the tables is too wide.
pub(super) fn address_size<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let Some(b) = outcome::bank_of_stage(e, fault.stage) else { return Vec::new() };
    let n = b.index;
    let steps = outcome::steps_of_stage(e, fault);
    let Some((step, address)) = steps.last().and_then(|s| match s.rule {
        Rule::AddressSize { address, .. } => Some((s, address)),
        _ => None,
    }) else {
        let why = outcome::before_the_walk(e, fault);
        let cause = if Sctlr::from_bits(b.sctlr).m() {
            virtual_base(
                Cause::new(
                    CauseKind::WrongTableBase,
                    format!("bank {n}: {why}"),
                    "write a physical address within PASize into TTBR, and the ASID into bits 63:48",
                ),
                b.ttbr0,
            )
        } else {
            Cause::new(
                CauseKind::TranslationOff,
                format!("bank {n} does not translate: {why}"),
                "set SCTLR.M",
            )
        };
        return vec![cause];
    };
    let needed = words::width(address);
    let c = probe.config();
    let second = e.stage2_bank.is_some_and(|b| Sctlr::from_bits(b.sctlr).m());
    let hardware = match (fault.stage, second) {
        (2, _) => c.pa_bits,
        (_, true) => c.ipa_bits,
        _ => c.ipa_bits.min(c.pa_bits),
    };
    let at = format!("the level {} descriptor at {:#x} is {:#x}", step.level, step.address, step.value);
    let fits = (0..=5).find(|code| {
        let bits = address_bits(*code);
        u32::from(bits) >= needed && bits <= hardware
    });
    let (Some(code), Some((now, now_bits))) = (fits, bank::pasize(b)) else {
        let damaged = Cause::new(
            CauseKind::DamagedDescriptor,
            format!("{address:#x} needs {needed} bits, and this SMMU can put out {hardware} at most"),
            "check what wrote the descriptor, and that TTBR and T0SZ make the walker read tables and not data",
        );
        return layout::search(probe, e, ctx, fault).into_iter().chain([damaged.because(at)]).collect();
    };
    let register = if fault.stage == 2 { "TCR (VTCR)" } else { "TCR2" };
    let size = Cause::new(
        CauseKind::OutputSizeTooSmall,
        format!("PASize = {now} ({now_bits} bits) is too small for {address:#x}, which needs {needed} bits"),
        format!(
            "write PASize = {code} ({} bits) or more into CB{n}.{register}; for a process page table at least TCR_EL1.IPS of the \
             CPU",
            address_bits(code)
        ),
    )
    .because(at);
    match layout::with_pasize(probe, e, ctx, b, code) {
        Some(pa) => {
            let tried = format!("with PASize = {code} these tables translate {:#x} to {pa:#x}", e.va);
            vec![size.because(tried)]
        }
        None => layout::search(probe, e, ctx, fault).into_iter().chain([size]).collect(),
    }
}

/// AF = 0.
pub(super) fn access_flag(e: &Explanation, fault: &Fault) -> Vec<Cause> {
    let steps = outcome::steps_of_stage(e, fault);
    let bank = outcome::bank_of_stage(e, fault.stage);
    let short = bank.is_some_and(|b| bank::format(b) == TableFormat::Short);
    let bit = if short { "AP[0] (AFE=1: the access flag)" } else { "AF (bit 10)" };
    let at = steps.last().map_or_else(String::new, |s| {
        format!(" in the level {} descriptor at {:#x} ({:#x})", s.level, s.address, s.value)
    });
    vec![
        Cause::new(
            CauseKind::AccessFlagClear,
            format!("the access flag is clear: {bit} = 0{at}"),
            "set it when mapping: this SMMU does not set it by itself; in a process page table it is clear until the CPU touches \
             the page, so touch the buffer first, or set SCTLR.AFFD=1 to ignore it",
        )
        .because(format!("stage {} requires it (SCTLR.AFFD=0)", fault.stage)),
    ]
}

/// A descriptor forbids the access: one cause for each kind of rule that does.
pub(super) fn permission<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    fault: &Fault,
    incoming: Attributes,
) -> Vec<Cause> {
    let mut found: Vec<Cause> = Vec::new();
    for reason in permission::forbidden(e, fault, incoming) {
        let cause = forbidden(probe, e, fault, incoming, &reason);
        match found.iter_mut().find(|c| c.kind == cause.kind) {
            Some(known) => known.evidence.insert(0, reason.bit),
            None => found.push(cause),
        }
    }
    found
}

fn forbidden<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    fault: &Fault,
    incoming: Attributes,
    reason: &Forbidden,
) -> Cause {
    let s2cr = S2cr::from_bits(e.group.map_or(0, |(_, _, s)| s));
    let try_it = |changed: S2cr, name: &str| {
        let (group, ..) = e.group?;
        let tried = probe.with(&[(Register::S2cr(group), changed.into_bits())], |p| {
            p.explain(e.from, e.va.get(), e.access)
        });
        match tried.outcome {
            Outcome::Translated { walked, .. } => {
                Some(format!("with S2CR[{group}].{name} the access is translated to {:#x}", walked.pa))
            }
            _ => None,
        }
    };
    let table_walk = if fault.on_stage1_walk { " of a stage 1 table" } else { "" };
    let cause = match (reason.why, fault.stage) {
        (Why::ReadOnly | Why::WriteOnly | Why::TableInDevice, 2) => Cause::new(
            CauseKind::Stage2Forbids,
            format!("stage 2 forbids the {}{table_walk} of IPA {:#x}", e.access, fault.ipa),
            "give the stage 2 mapping the rights that the guest's device needs (S2AP), and map its tables as Normal memory",
        ),
        (Why::ReadOnly, _) => Cause::new(
            CauseKind::ReadOnly,
            format!("a write to {:#x}, which is mapped read-only", e.va),
            "map the buffer for writing by the device: DMA_FROM_DEVICE or DMA_BIDIRECTIONAL (IOMMU_WRITE); or the master writes \
             where it should read",
        ),
        (Why::WriteOnly | Why::TableInDevice, _) => Cause::new(
            CauseKind::WriteOnly,
            format!("a read of {:#x}, which is mapped write-only", e.va),
            "map the buffer for reading by the device (DMA_TO_DEVICE, IOMMU_READ)",
        ),
        (Why::PrivilegedOnly, _) => {
            let source = match s2cr.privcfg() {
                0 => "AxPROT[0]=0 and S2CR.PRIVCFG=0 leaves it so".to_owned(),
                code => format!("S2CR.PRIVCFG={code} makes it so"),
            };
            Cause::new(
                CauseKind::PrivilegedOnly,
                format!("an unprivileged access to {:#x}, which only privileged ones may touch", e.va),
                "map it for unprivileged accesses (AP[1]=1; not IOMMU_PRIV), or make the stream privileged (S2CR.PRIVCFG=3)",
            )
            .because(format!("the access is unprivileged: {source}"))
            .because_all(try_it(s2cr.with_privcfg(3), "PRIVCFG = 3 (privileged)"))
        }
        (Why::ExecuteNever | Why::WritableExecuteNever, stage) => {
            let source = match s2cr.instcfg() {
                0 => "the master drives AxPROT[2]=1 and S2CR.INSTCFG=0 leaves it so".to_owned(),
                code => format!("S2CR.INSTCFG={code} turns every read into an instruction fetch"),
            };
            let privilege = if incoming.privileged() { "a privileged" } else { "an unprivileged" };
            Cause::new(
                CauseKind::InstructionFetch,
                format!("data at {:#x} is read as {privilege} instruction fetch, which stage {stage} forbids", e.va),
                "write S2CR.INSTCFG = 2 (data), or make the master drive AxPROT[2]=0 (data); page tables of processes mark data \
                 execute never",
            )
            .because(format!("it is an instruction fetch because {source}"))
            .because_all(try_it(s2cr.with_instcfg(2), "INSTCFG = 2 (data)"))
        }
        (Why::Secure | Why::PrivilegedAccessNever, _) => Cause::new(
            CauseKind::SecureInstructionFetch,
            format!("a secure instruction fetch of {:#x} from non-secure memory", e.va),
            "drive AxPROT[2]=0 (data), or write S2CR.INSTCFG = 2",
        ),
    };
    Cause { evidence: std::iter::once(reason.bit.clone()).chain(cause.evidence).collect(), ..cause }
}

/// Memory refused the read of a descriptor.
pub(super) fn external<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let mut found: Vec<Cause> = layout::search(probe, e, ctx, fault).into_iter().collect();
    let Some(b) = outcome::bank_of_stage(e, fault.stage) else { return found };
    let steps = outcome::steps_of_stage(e, fault);
    let Some(step) = steps.last() else { return found };
    let place = e.walk.len().checked_sub(1).and_then(|i| *outcome::descriptor_places(&e.walk).get(i)?);
    let at = place.unwrap_or(step.address);
    let ram: Vec<String> =
        ctx.ram.iter().map(|(base, size)| format!("{base:#x}..{:#x}", base.wrapping_add(*size))).collect();
    let cause = match steps.len().checked_sub(2).and_then(|i| steps.get(i)) {
        None => {
            let ttbr = [b.ttbr0, b.ttbr1][bank::half(b, probe.config(), e.va.get())];
            let cause = Cause::new(
                CauseKind::WrongTableBase,
                format!("TTBR {ttbr:#x} of bank {} points to {at:#x}, where no memory answers", b.index),
                "write the physical address of the first table into TTBR",
            );
            virtual_base(cause, ttbr)
        }
        Some(parent) => Cause::new(
            CauseKind::TableOutsideMemory,
            format!("the level {} table is at {at:#x}, where no memory answers", step.level),
            "check what wrote the descriptor that points there, and that TTBR and T0SZ make the walker read tables and not data",
        )
        .because(format!(
            "the level {} descriptor at {:#x} is {:#x}",
            parent.level, parent.address, parent.value
        )),
    };
    let cause = match step.rule {
        Rule::External(error) => cause.because(error.to_string()),
        _ => cause,
    };
    found.push(if ram.is_empty() { cause } else { cause.because(format!("RAM is {}", ram.join(", "))) });
    found
}

#[cfg(test)]
mod tests {
    use portcullis_arch::smmuv2::offset::cb;
    use portcullis_arch::{Access, Iova};
    use portcullis_bus::{DmaPort, Initiator, SystemMemory, View};
    use portcullis_smmuv2::Config;

    use super::*;
    use crate::testing::{Board, PAGE, RAM, ROOT, SCTLR, STREAM};
    use crate::{causes, story};

    const PXN_UXN: u64 = 3 << 53;

    fn read_causes(board: &Board, va: u64) -> Vec<Cause> {
        board.causes(&board.explain(va, Access::Read))
    }

    #[test]
    fn a_small_pasize_is_named_with_one_that_fits() {
        let board = Board::new();
        // 40 bits, and a page at a 41-bit address.
        board.cb(0, cb::TCR2, 0x0003_8012);
        board.map(0x7000_0000, 0x100_6000_0000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::OutputSizeTooSmall);
        let text = found[0].to_string();
        assert!(
            text.contains("PASize = 2 (40 bits) is too small for 0x10060000000, which needs 41 bits"),
            "{text}"
        );
        assert!(
            text.contains("with PASize = 3 these tables translate 0x70000000 to 0x10060000000"),
            "{text}"
        );
        assert!(text.contains("PASize = 3 (42 bits) or more into CB0.TCR2"), "{text}");
    }

    #[test]
    fn an_address_that_no_pasize_fits_is_a_damaged_descriptor() {
        let c = Config { pa_bits: 40, ipa_bits: 40, ..Config::mmu500_zynqmp() };
        let board = Board::over(SystemMemory::new(&RAM).unwrap(), c);
        board.map(0x7000_0000, 0x8000_6000_0000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::DamagedDescriptor);
        assert!(found[0].what.contains("needs 48 bits, and this SMMU can put out 40"), "{}", found[0]);
    }

    #[test]
    fn a_ttbr_outside_of_pasize_is_named() {
        let board = Board::new();
        board.cb(0, cb::TCR2, 0x0003_8010);
        board.cb64(0, cb::TTBR0, 0xffff_8000_1234_5000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::WrongTableBase);
        assert!(found[0].to_string().contains("looks like a kernel virtual address"), "{}", found[0]);
    }

    #[test]
    fn both_size_and_pasize_wrong_are_found_together() {
        let board = Board::new();
        board.cb(0, cb::TCR2, 0x0003_8010);
        board.store(board.slot(ROOT, 1, 0x7f_b000_1000), 0x100_6000_0000 | PAGE);
        let e = board.explain(0x7f_b000_1000, Access::Write);
        let found = causes(&board.smmu, &e, &CauseContext::default());
        assert_eq!(found[0].kind, CauseKind::LayoutMismatch);
        assert!(found[0].evidence[0].contains("T0SZ = 25 and PASize = 5"), "{}", found[0]);
    }

    #[test]
    fn a_write_to_a_read_only_page_names_ap2() {
        let board = Board::new();
        board.map_with(0x7000_0000, 0x6000_0000, PAGE | 1 << 7);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::ReadOnly);
        let text = found[0].to_string();
        assert!(text.contains("AP[2] = 1 (read-only) in the level 3 page descriptor at 0x10003"), "{text}");
        assert!(text.contains("DMA_FROM_DEVICE"), "{text}");
    }

    #[test]
    fn a_read_only_table_is_found_above_a_writable_page() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.store(ROOT, board.load(ROOT) | 1 << 62);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::ReadOnly);
        assert!(found[0].evidence[0].contains("APTable[1] = 1"), "{}", found[0]);
        assert!(found[0].evidence[0].contains("level 0 table descriptor at 0x10000000"), "{}", found[0]);
    }

    #[test]
    fn an_unprivileged_access_to_a_kernel_page_names_ap1_and_privcfg() {
        let board = Board::new();
        board.map_with(0x7000_0000, 0x6000_0000, PAGE & !(1 << 6));
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::PrivilegedOnly);
        let text = found[0].to_string();
        assert!(text.contains("AP[1] = 0"), "{text}");
        assert!(
            text.contains("with S2CR[0].PRIVCFG = 3 (privileged) the access is translated to 0x60000000"),
            "{text}"
        );
    }

    #[test]
    fn instcfg_and_axprot_are_told_apart() {
        let board = Board::new();
        board.map_with(0x7000_0000, 0x6000_0000, PAGE | PXN_UXN);
        board.group(0, STREAM.get(), 0, 3 << 26);
        let found = read_causes(&board, 0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::InstructionFetch);
        let text = found[0].to_string();
        assert!(text.contains("UXN = 1 (execute never) in the level 3 page descriptor"), "{text}");
        assert!(text.contains("S2CR.INSTCFG=3 turns every read"), "{text}");
        assert!(
            text.contains("with S2CR[0].INSTCFG = 2 (data) the access is translated to 0x60000000"),
            "{text}"
        );
        // Writes are data whatever INSTCFG says.
        assert_eq!(board.write_causes(0x7000_0000), []);
        board.group(0, STREAM.get(), 0, 0);
        let from = Initiator::new(STREAM);
        let from = from.with_attrs(from.attrs.with_instruction(true));
        let found = board.causes(&board.smmu.explain(from, Iova(0x7000_0000), Access::Read));
        assert!(found[0].to_string().contains("the master drives AxPROT[2]=1"), "{}", found[0]);
    }

    #[test]
    fn a_privileged_fetch_from_user_writable_memory_is_forbidden_without_a_pxn_bit() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.group(0, STREAM.get(), 0, 3 << 26 | 3 << 24);
        let found = read_causes(&board, 0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::InstructionFetch);
        assert!(found[0].evidence[0].contains("AP[2:1] = 0b01"), "{}", found[0]);
    }

    #[test]
    fn a_clear_access_flag_is_named() {
        let board = Board::new();
        board.map_with(0x7000_0000, 0x6000_0000, PAGE & !(1 << 10));
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::AccessFlagClear);
        assert!(found[0].what.contains("AF (bit 10) = 0 in the level 3 descriptor"), "{}", found[0]);
    }

    #[test]
    fn a_table_where_no_memory_is_names_who_points_there() {
        let board = Board::new();
        board.store(ROOT, 0x2000_0003);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::TableOutsideMemory);
        let text = found[0].to_string();
        assert!(text.contains("the level 1 table is at 0x20000008, where no memory answers"), "{text}");
        assert!(text.contains("the level 0 descriptor at 0x10000000 is 0x20000003"), "{text}");
        assert!(text.contains("RAM is 0x10000000..0x10100000"), "{text}");
        board.cb64(0, cb::TTBR0, 0x3000_0000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::WrongTableBase);
        assert!(found[0].what.contains("points to 0x30000000"), "{}", found[0]);
    }

    #[test]
    fn stage_2_permissions_are_named() {
        let board = Board::new();
        board.bank(0, 0x3_0100);
        let root2 = board.table();
        board.stage2_bank(1, root2);
        board.map(0x7000_0000, 0x4000_0000);
        for at in (ROOT..ROOT + 0x9000).step_by(0x1000) {
            board.store(board.slot(root2, 1, at), at | 0x7ff);
        }
        board.store(board.slot(root2, 1, 0x4000_0000), 0x6000_0000 | 0x77f);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::Stage2Forbids);
        let text = found[0].to_string();
        assert!(text.contains("stage 2 forbids the write of IPA 0x40000000"), "{text}");
        assert!(text.contains("S2AP[1] = 0 (no writes) in stage 2's the level 3"), "{text}");
    }

    #[test]
    fn a_bank_that_does_not_translate_is_noticed() {
        let board = Board::new();
        board.cb(0, cb::SCTLR, SCTLR & !1);
        let found = board.write_causes(0x6000_0000);
        assert_eq!(found[0].kind, CauseKind::TranslationOff);
        assert!(found[0].evidence[0].contains("(RAM)"), "{}", found[0]);
    }

    #[test]
    fn a_tlb_entry_that_outlived_its_descriptor_is_the_first_cause() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let mut port = board.smmu.port(board.memory.view(View::NonCoherent, "dma"));
        let from = Initiator::new(STREAM);
        port.write(from, Iova(0x7000_0000), &[1]).unwrap();
        board.store(board.slot(ROOT, 0, 0x7000_0000), 0);
        let cached = port.cached(&from, Iova(0x7000_0000));
        let e = board.explain(0x7000_0000, Access::Write);
        let ctx = CauseContext { cached, ..CauseContext::default() };
        let found = causes(&board.smmu, &e, &ctx);
        assert_eq!(found[0].kind, CauseKind::MissingTlbInvalidation);
        assert!(found[0].to_string().contains("TLBIVA"), "{}", found[0]);
        let told = story(&e, cached).to_string();
        assert!(told.contains("but the tables no longer map it: missing TLB invalidation"), "{told}");
        assert!(
            told.ends_with("result     0x60000000 from the stale TLB entry; the tables are not looked at"),
            "{told}"
        );
        port.write(from, Iova(0x7000_0000), &[1]).unwrap();
    }

    #[test]
    fn stale_data_in_a_translated_buffer_names_the_maintenance() {
        let memory = SystemMemory::with_cpu_cache(&RAM, 1024).unwrap();
        let board = Board::over(memory, Config::mmu500_zynqmp());
        board.map(0x7000_0000, 0x6000_0000);
        board.memory.clean(portcullis_arch::Pa(ROOT), 0x10_0000);
        board.store(0x6000_0040, 0xcafe_beef);
        let mut port = board.smmu.port(board.memory.view(View::NonCoherent, "fpd-dma0"));
        port.read(Initiator::new(STREAM), Iova(0x7000_0040), &mut [0; 8]).unwrap();
        let (stale, _) = board.memory.cpu_cache().unwrap().take_reports();
        let e = board.explain(0x7000_0040, Access::Read);
        let found = causes(&board.smmu, &e, &CauseContext { stale: &stale, ..CauseContext::default() });
        assert_eq!(found[0].kind, CauseKind::BufferNotMaintained);
        assert!(
            found[0].to_string().contains("fpd-dma0 saw 0x0 at 0x60000040, written was 0xcafebeef"),
            "{}",
            found[0]
        );
        assert!(found[0].fix.contains("dma_sync_*_for_device"));
    }
}
