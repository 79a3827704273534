//! Causes of a translation fault: no valid descriptor, or no table for the address.

use portcullis_arch::smmuv2::{Sctlr, TcrS1};
use portcullis_arch::vmsa::Granule;
use portcullis_bus::Memory;
use portcullis_smmuv2::{BankView, Explanation};
use portcullis_walk::{Fault, Step, TableFormat};

use super::{Cause, CauseContext, CauseKind, layout};
use crate::bank;
use crate::mappings::{self, Mapping, Mappings};
use crate::outcome;
use crate::probe::Probe;
use crate::words;

/// Walks spent on finding out what is mapped.
pub(crate) const BUDGET: usize = 8192;

/// Causes by how well they are supported; ranks are compared, their values mean nothing else.
pub(super) fn causes<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let mut ranked: Vec<(u8, Cause)> = Vec::new();
    let Some(b) = outcome::bank_of_stage(e, fault.stage) else { return Vec::new() };
    let steps = outcome::steps_of_stage(e, fault);
    if fault.stage == 2 && e.stage2_bank.is_some() {
        ranked.extend(layout::search(probe, e, ctx, fault).map(|c| (92, c)));
        ranked.push((80, stage2_hole(e, ctx, fault, b)));
    } else {
        let va = e.va.get();
        let granule = bank::granule(b, probe.config(), bank::half(b, probe.config(), va));
        let page = granule.bytes();
        let mapped = |at: Option<u64>| at.and_then(|a| mappings::leaf(&probe.explain(e.from, a, e.access)));
        let below = mapped(va.checked_sub(page));
        let above = mapped(va.checked_add(page));
        if below.is_none() && above.is_none() {
            // Where a neighbour is mapped the tables are read rightly.
            ranked.extend(layout::search(probe, e, ctx, fault).map(|c| (92, c)));
        }
        let all = mappings::search(probe, e.from, va, BUDGET);
        match steps.last() {
            None => {
                let cause = out_of_range(e, fault, b);
                let certain = cause.kind == CauseKind::LayoutMismatch;
                ranked.push((if certain { 90 } else { 70 }, cause));
            }
            Some(step) => {
                if steps.len() == 1 {
                    ranked.extend(empty_table(probe, b, bank::half(b, probe.config(), va), granule));
                }
                ranked.push((65, not_mapped(va, step, &all, no_snoop(probe.config().coherent_walk, "CTTW"))));
            }
        }
        ranked.extend(unmapped(va, ctx));
        ranked.extend(neighbours(va, page, below, above, &all));
        ranked.extend(other_address(va, ctx, &all));
    }
    if ranked.iter().any(|(_, cause)| cause.kind == CauseKind::LayoutMismatch) {
        // Misread tables make everything look unmapped: what else was guessed from them means little.
        ranked.retain(|(rank, _)| *rank >= 80);
    }
    ranked.sort_by_key(|(rank, _)| std::cmp::Reverse(*rank));
    ranked.into_iter().map(|(_, cause)| cause).collect()
}

/// Stage 2 of a nested pair does not map what stage 1 asks for.
fn stage2_hole(e: &Explanation, ctx: &CauseContext<'_>, fault: &Fault, b: &BankView) -> Cause {
    let ipa = fault.ipa;
    let what = if fault.on_stage1_walk {
        format!("stage 2 (bank {}) does not map IPA {ipa:#x}, where a stage 1 table is", b.index)
    } else {
        format!("stage 2 (bank {}) does not map IPA {ipa:#x}, to which stage 1 leads", b.index)
    };
    let mut cause = Cause::new(
        CauseKind::Stage2NotMapped,
        what,
        "map the guest's memory in the stage 2 domain before it uses the device; check that stage 1 holds guest (intermediate) \
         physical addresses",
    );
    if outcome::steps_of_stage(e, fault).is_empty() {
        cause = cause.because(outcome::before_the_walk(e, fault));
    }
    if ctx.is_ram(ipa) {
        cause = cause
            .because(format!("{ipa:#x} is host RAM: stage 1 may hold host physical addresses by mistake"));
    }
    cause
}

fn out_of_range(e: &Explanation, fault: &Fault, b: &BankView) -> Cause {
    let n = b.index;
    if !Sctlr::from_bits(b.sctlr).m() {
        return Cause::new(
            CauseKind::TranslationOff,
            format!("bank {n} does not translate (SCTLR.M=0) and {:#x} is too wide for it", e.va),
            "set SCTLR.M after TTBR0 and TCR are written",
        );
    }
    let tsz = TcrS1::from_bits(b.tcr).t0sz();
    let illegal = bank::format(b) == TableFormat::Aarch64 && bank::stage(b) == 1 && !(16..=39).contains(&tsz);
    let (kind, fix) = if illegal {
        (CauseKind::LayoutMismatch, format!("write a T0SZ of 16 to 39 into CB{n}.TCR"))
    } else {
        (
            CauseKind::AddressOutOfRange,
            format!(
                "limit the addresses that are handed out to the size of the tables (dma_set_mask, the domain's aperture), or \
                 lower T0SZ in CB{n}.TCR with tables to match"
            ),
        )
    };
    Cause::new(kind, format!("bank {n}: {}", outcome::before_the_walk(e, fault)), fix)
}

/// The first table holds nothing at all.
fn empty_table<M: Memory>(
    probe: &Probe<'_, M>,
    b: &BankView,
    half: usize,
    granule: Granule,
) -> Option<(u8, Cause)> {
    let base = bank::table_base(b, half, granule);
    let mut words = (0..granule.bytes()).step_by(8).map(|at| probe.load64(base + at, Default::default()));
    if !words.all(|w| w == Ok(0)) {
        return None;
    }
    let ttbr = if half == 0 { b.ttbr0 } else { b.ttbr1 };
    let cause = Cause::new(
        CauseKind::WrongTableBase,
        format!("TTBR{half} of bank {} points to {base:#x}, where everything is zero: no tables", b.index),
        format!(
            "write the physical address of the first table into CB{}.TTBR{half} (and the ASID into bits 63:48); if the CPU wrote \
             the tables through its cache, clean them",
            b.index
        ),
    );
    Some((90, virtual_base(cause, ttbr)))
}

/// Notes that a TTBR looks like a kernel pointer.
pub(crate) fn virtual_base(cause: Cause, ttbr: u64) -> Cause {
    if ttbr >> 48 == 0xffff {
        cause.because(format!("TTBR {ttbr:#x} looks like a kernel virtual address (virt_to_phys is missing)"))
    } else {
        cause
    }
}

/// What to think of where the walker does not look into CPU caches; `bit` is the bit of IDR0 that says so.
pub(crate) fn no_snoop(coherent: bool, bit: &str) -> String {
    if coherent {
        return String::new();
    }
    format!(
        "; this SMMU's walker does not look into CPU caches (IDR0.{bit}=0): clean descriptors after writing them"
    )
}

/// Nothing is mapped at `va`; `walker` is [`no_snoop`].
pub(crate) fn not_mapped(va: u64, step: &Step, all: &Mappings, walker: String) -> Cause {
    let mut cause = Cause::new(
        CauseKind::NotMapped,
        format!("nothing is mapped at {va:#x}"),
        format!(
            "map the buffer before the transfer starts and unmap it only after it has ended (dma_map_*, dma_unmap_*){walker}"
        ),
    )
    .because(format!(
        "the level {} descriptor at {:#x} is {:#x}, which is not valid there",
        step.level, step.address, step.value
    ));
    let below = all.ranges.iter().rfind(|m| m.va <= va);
    let above = all.ranges.iter().find(|m| m.va > va);
    cause = match (below, above) {
        (None, None) if all.complete => cause.because("nothing else is mapped either"),
        (None, None) => cause,
        _ => {
            let near: Vec<String> = [below, above].into_iter().flatten().map(Mapping::to_string).collect();
            cause.because(format!("nearest mappings: {}", words::list(&near)))
        }
    };
    cause
}

/// The address was mapped once.
pub(crate) fn unmapped(va: u64, ctx: &CauseContext<'_>) -> Option<(u8, Cause)> {
    let u = ctx.unmapped.iter().rfind(|u| va.wrapping_sub(u.iova) < u.len)?;
    let ago = match u.ago_ns {
        n @ ..10_000 => format!("{n} ns"),
        n @ ..10_000_000 => format!("{} µs", n / 1000),
        n => format!("{} ms", n / 1_000_000),
    };
    let cause = Cause::new(
        CauseKind::UsedAfterUnmap,
        format!("{va:#x} was mapped, and unmapped {ago} before this access"),
        "unmap a buffer only after the device has finished with it: wait for the completion of the transfer, or stop the device \
         first",
    );
    let range = format!("unmapped was {:#x}..{:#x}", u.iova, u.iova.wrapping_add(u.len));
    Some((89, cause.because(range)))
}

/// The page before, or after, is mapped.
pub(crate) fn neighbours(
    va: u64,
    page: u64,
    below: Option<(u64, u8)>,
    above: Option<(u64, u8)>,
    all: &Mappings,
) -> Option<(u8, Cause)> {
    let first = va & !(page - 1);
    if below.is_some() {
        let run = all.ranges.iter().find(|m| m.contains(first.wrapping_sub(1)));
        let run = run.map_or(format!("the page before {first:#x} is mapped"), |m| format!("mapped is {m}"));
        let cause = Cause::new(
            CauseKind::PastTheEnd,
            format!("{va:#x} is just past the end of a mapping, which ends at {first:#x}"),
            "compare the transfer's length and start with what was mapped: a length in other units, an offset not added to the \
             size, a prefetching master, or a scatter-gather entry that was not mapped",
        );
        return Some((85, cause.because(run)));
    }
    above?;
    let next = first.wrapping_add(page);
    let run = all.ranges.iter().find(|m| m.contains(next));
    let run = run.map_or(format!("the page at {next:#x} is mapped"), |m| format!("mapped is {m}"));
    let cause = Cause::new(
        CauseKind::BeforeTheBegin,
        format!("{va:#x} is just before a mapping"),
        "check the start address: an offset subtracted twice, or a buffer that is not page aligned and mapped without its first \
         page",
    );
    Some((84, cause.because(run)))
}

/// The address looks like one of another kind.
pub(crate) fn other_address(va: u64, ctx: &CauseContext<'_>, all: &Mappings) -> Vec<(u8, Cause)> {
    let mut found = Vec::new();
    if va >> 32 == 0 {
        let whole = all.ranges.iter().filter(|m| m.end() >> 32 != 0).find_map(|m| {
            let high = [m.va, m.end().wrapping_sub(1)].map(|a| a & !0xffff_ffff | va);
            high.into_iter().find(|a| m.contains(*a)).map(|a| (a, m))
        });
        if let Some((a, m)) = whole {
            let cause = Cause::new(
                CauseKind::TruncatedAddress,
                format!(
                    "{va:#x} is the lower half of {a:#x}, which is mapped: the upper 32 bits are missing"
                ),
                "write the engine's high address register as well, or limit its addresses to 32 bits (dma_set_mask)",
            );
            found.push((88, cause.because(format!("mapped is {m}"))));
        }
    }
    let mapped_from = all.ranges.iter().find_map(|m| m.address_of(va));
    if let Some(iova) = mapped_from {
        let cause = Cause::new(
            CauseKind::PhysicalAddress,
            format!(
                "{va:#x} is a physical address: it is mapped at DMA address {iova:#x}, which the device should use"
            ),
            "give the device the address that dma_map_* or the allocator returned, not the physical one",
        );
        found.push((88, cause));
    } else if ctx.is_ram(va) {
        // DMA addresses often look like RAM; if those that are mapped do not, this one is odd.
        let usual = all.ranges.iter().any(|m| ctx.is_ram(m.va));
        let cause = Cause::new(
            CauseKind::PhysicalAddress,
            format!("{va:#x} is an address of RAM: perhaps the device was given a physical address"),
            "give the device the address that dma_map_* or the allocator returned, not the physical one",
        );
        let cause = if usual { cause } else { cause.because("no mapped DMA address looks like this") };
        found.push((if usual { 50 } else { 70 }, cause));
    }
    found.extend(cpu_pointer(va));
    found
}

/// Addresses as Linux on arm64 hands them out to the kernel and to processes.
fn cpu_pointer(va: u64) -> Option<(u8, Cause)> {
    // A bus of 49 bits delivers a kernel pointer as 0x1_ffff_....
    let kernel = va >> 48 == 0xffff || va >> 47 == 0b11;
    let user = (0xaaaa_0000_0000..1 << 48).contains(&va)
        || (0x55_0000_0000..0x56_0000_0000).contains(&va)
        || (0x7f_0000_0000..0x80_0000_0000).contains(&va);
    if kernel {
        let cause = Cause::new(
            CauseKind::CpuVirtualAddress,
            format!("{va:#x} looks like a kernel virtual address"),
            "map the buffer (dma_map_single, dma_alloc_coherent) and give the device the address that this returns",
        );
        return Some((95, cause));
    }
    user.then(|| {
        let cause = Cause::new(
            CauseKind::CpuVirtualAddress,
            format!("{va:#x} looks like a pointer of a process"),
            "map the buffer and give the device its DMA address; if the bank is meant to use the process's page table, check that \
             TTBR0 holds its pgd and that the page is present: touch or pin it first",
        );
        (72, cause)
    })
}

#[cfg(test)]
mod tests {
    use portcullis_arch::smmuv2::offset::cb;
    use portcullis_bus::{SystemMemory, View};
    use portcullis_smmuv2::Config;

    use super::*;
    use crate::causes::{Unmapped, causes as causes_of};
    use crate::testing::{Board, PAGE, RAM, ROOT, STREAM};

    fn kinds(found: &[Cause]) -> Vec<CauseKind> {
        found.iter().map(|c| c.kind).collect()
    }

    #[test]
    fn an_address_in_the_blue_was_never_mapped() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let found = board.write_causes(0x7100_0000);
        assert_eq!(kinds(&found), [CauseKind::NotMapped]);
        let text = found[0].to_string();
        assert!(text.contains("nothing is mapped at 0x71000000"), "{text}");
        assert!(text.contains("level 2 descriptor at"), "{text}");
        assert!(text.contains("nearest mappings: 0x70000000..0x70001000 -> 0x60000000 (4 KiB)"), "{text}");
        assert!(text.contains("IDR0.CTTW=0"), "{text}");
    }

    #[test]
    fn an_unmapping_is_remembered_if_somebody_knows_of_it() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let e = board.explain(0x7000_1008, portcullis_arch::Access::Read);
        let unmapped = [
            Unmapped { iova: 0x7000_1000, len: 0x1000, ago_ns: 50_000 },
            Unmapped { iova: 0x7000_1000, len: 0x2000, ago_ns: 1234 },
            Unmapped { iova: 0x7000_2000, len: 0x1000, ago_ns: 1 },
        ];
        let found =
            causes_of(&board.smmu, &e, &CauseContext { unmapped: &unmapped, ..CauseContext::default() });
        assert_eq!(found[0].kind, CauseKind::UsedAfterUnmap);
        assert!(found[0].what.contains("0x70001008 was mapped, and unmapped 1234 ns before"), "{}", found[0]);
        let found = causes_of(&board.smmu, &e, &CauseContext::default());
        assert_eq!(found[0].kind, CauseKind::PastTheEnd);
    }

    #[test]
    fn an_overrun_is_named_with_the_mapping_it_left() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.map(0x7000_1000, 0x6000_1000);
        let found = board.write_causes(0x7000_2003);
        assert_eq!(found[0].kind, CauseKind::PastTheEnd);
        assert!(
            found[0].what.contains("0x70002003 is just past the end of a mapping, which ends at 0x70002000"),
            "{}",
            found[0]
        );
        assert!(found[0].evidence[0].contains("0x70000000..0x70002000 -> 0x60000000 (8 KiB)"));
        let found = board.write_causes(0x6fff_f000);
        assert_eq!(found[0].kind, CauseKind::BeforeTheBegin);
    }

    #[test]
    fn a_physical_address_is_recognised_by_its_reverse_mapping() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let found = board.write_causes(0x6000_0010);
        assert_eq!(found[0].kind, CauseKind::PhysicalAddress);
        assert!(found[0].what.contains("mapped at DMA address 0x70000010"), "{}", found[0]);
        // RAM that is mapped nowhere.
        let found = board.write_causes(0x6008_0000);
        assert_eq!(found[0].kind, CauseKind::PhysicalAddress);
        assert!(found[0].what.contains("is an address of RAM"), "{}", found[0]);
    }

    #[test]
    fn a_missing_upper_half_is_recognised() {
        let board = Board::new();
        board.map(0x7f_8000_0000, 0x6000_0000);
        let found = board.write_causes(0x8000_0020);
        assert_eq!(found[0].kind, CauseKind::TruncatedAddress);
        assert!(found[0].what.contains("lower half of 0x7f80000020"), "{}", found[0]);
    }

    #[test]
    fn pointers_of_the_cpu_are_recognised() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let found = board.write_causes(0xffff_8000_1234_5000);
        assert_eq!(found[0].kind, CauseKind::CpuVirtualAddress);
        assert_eq!(found[1].kind, CauseKind::AddressOutOfRange);
        assert!(found[1].what.contains("TTBR1 is off (EPD1=1)"), "{}", found[1]);
        let found = board.write_causes(0xaaaa_b000_0000);
        assert_eq!(found[0].kind, CauseKind::CpuVirtualAddress);
        assert!(found[0].what.contains("pointer of a process"), "{}", found[0]);
    }

    /// Three-level tables as a kernel with 39-bit addresses builds them.
    fn process_tables(board: &Board, va: u64, pa: u64) {
        board.store(board.slot(ROOT, 1, va), pa | PAGE);
    }

    #[test]
    fn a_48_bit_walk_over_39_bit_tables_is_found_out() {
        let board = Board::new();
        process_tables(&board, 0x7f_b000_1000, 0x6000_3000);
        let found = board.write_causes(0x7f_b000_1080);
        assert_eq!(found[0].kind, CauseKind::LayoutMismatch);
        let text = found[0].to_string();
        assert_eq!(found.len(), 1);
        assert!(text.contains("T0SZ = 16 (48-bit addresses, 4 KiB granule, start level 0)"), "{text}");
        assert!(
            text.contains(
                "with T0SZ = 25 (39-bit addresses, 4 KiB granule, start level 1) these tables translate 0x7fb0001080 \
                 to 0x60003080"
            ),
            "{text}"
        );
        // The cure works, and the experiment left the registers alone.
        assert!(board.write_causes(0x7f_b000_1080)[0].kind == CauseKind::LayoutMismatch);
        board.cb(0, cb::TCR, 0x0080_2019);
        assert_eq!(board.write_causes(0x7f_b000_1080), []);
    }

    #[test]
    fn a_wrong_granule_is_found_out() {
        let board = Board::new();
        // 64 KiB granule, 42 bits: level 2 has 8192 entries, then level 3.
        let (l2, l3) = (ROOT, 0x1002_0000);
        board.store(l2 + 8 * (0x7000_0000 >> 29), l3 | 3);
        board.store(l3 + 8 * (0x7000_0000 >> 16 & 0x1fff), 0x6000_0000 | PAGE);
        let found = board.write_causes(0x7000_1234);
        assert_eq!(found[0].kind, CauseKind::LayoutMismatch, "{}", found[0]);
        assert!(found[0].evidence[0].contains("64 KiB granule, start level 2"), "{}", found[0]);
        assert!(found[0].evidence[0].ends_with("to 0x60001234"), "{}", found[0]);
    }

    #[test]
    fn what_lies_before_a_table_is_not_taken_for_tables_of_a_larger_granule() {
        let board = Board::new();
        // Empty tables of 4 KiB in the middle of 64: a walk for 64 KiB tables would begin 32 KiB before.
        let (root, l3) = (ROOT + 0x8000, 0x1002_0000);
        board.store(ROOT + 8 * (0x7000_0000 >> 29), l3 | 3);
        board.store(l3 + 8 * (0x7000_0000 >> 16 & 0x1fff), 0x6000_0000 | PAGE);
        board.cb64(0, cb::TTBR0, root);
        let kinds = kinds(&board.write_causes(0x7000_1234));
        assert!(!kinds.contains(&CauseKind::LayoutMismatch), "{kinds:?}");
        board.cb64(0, cb::TTBR0, ROOT);
        assert_eq!(board.write_causes(0x7000_1234)[0].kind, CauseKind::LayoutMismatch);
    }

    #[test]
    fn an_illegal_size_is_named() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.cb(0, cb::TCR, 0x0080_2000 | 40);
        let found = board.write_causes(0x7000_0000);
        // The tables are fine, so the first cause says which size they have.
        assert_eq!(kinds(&found), [CauseKind::LayoutMismatch, CauseKind::LayoutMismatch]);
        assert!(found[0].evidence[0].contains("T0SZ = 16"), "{}", found[0]);
        assert!(found[1].what.contains("T0SZ=40 is illegal"), "{}", found[1]);
    }

    #[test]
    fn a_table_of_zeros_is_a_wrong_ttbr() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.cb64(0, cb::TTBR0, 0xffff_0000_6000_4000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::WrongTableBase);
        let text = found[0].to_string();
        assert!(text.contains("points to 0x60004000, where everything is zero"), "{text}");
        assert!(text.contains("looks like a kernel virtual address"), "{text}");
    }

    #[test]
    fn tables_that_the_cpu_did_not_clean_are_the_first_cause() {
        let memory = SystemMemory::with_cpu_cache(&RAM, 1024).unwrap();
        let board = Board::over(memory, Config::mmu500_zynqmp());
        board.map(0x7000_0000, 0x6000_0000);
        let cache = board.memory.cpu_cache().unwrap();
        let e = board.explain(0x7000_0000, portcullis_arch::Access::Write);
        let (stale, _) = cache.take_reports();
        let ctx = CauseContext { ram: &RAM, stale: &stale, ..CauseContext::default() };
        let found = causes_of(&board.smmu, &e, &ctx);
        assert_eq!(found[0].kind, CauseKind::TablesNotCleaned);
        let text = found[0].to_string();
        assert!(text.contains("level 0 descriptor at 0x10000000"), "{text}");
        assert!(text.contains("0x10001003"), "{text}");
        board.memory.clean(portcullis_arch::Pa(ROOT), 0x10_0000);
        let e = board.explain(0x7000_0000, portcullis_arch::Access::Write);
        assert_eq!(causes_of(&board.smmu, &e, &CauseContext::default()), []);
    }

    #[test]
    fn stage_2_holes_say_whose_address_is_missing() {
        let board = Board::new();
        board.bank(0, 0x3_0100);
        let root2 = board.table();
        board.stage2_bank(1, root2);
        board.map(0x7000_0000, 0x4000_0000);
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::Stage2NotMapped);
        assert!(found[0].what.contains("IPA 0x10000000, where a stage 1 table is"), "{}", found[0]);
        assert!(found[0].evidence[0].contains("host RAM"), "{}", found[0]);
        // Stage 1's tables mapped one to one, the data not.
        for at in (ROOT..ROOT + 0x8000).step_by(0x1000) {
            board.store(board.slot(root2, 1, at), at | 0x7fd);
            board.store(board.slot(root2, 1, at), at | 0x7ff);
        }
        let found = board.write_causes(0x7000_0000);
        assert_eq!(found[0].kind, CauseKind::Stage2NotMapped);
        assert!(found[0].what.contains("IPA 0x40000000, to which stage 1 leads"), "{}", found[0]);
        board.store(board.slot(root2, 1, 0x4000_0000), 0x6000_0000 | 0x7ff);
        assert_eq!(board.write_causes(0x7000_0000), []);
    }

    #[test]
    fn a_recorded_fault_does_not_hide_the_answer() {
        use portcullis_bus::{DmaPort, Initiator};
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let mut port = board.smmu.port(board.memory.view(View::NonCoherent, "dma"));
        let e = board.explain(0x7000_1000, portcullis_arch::Access::Write);
        port.write(Initiator::new(STREAM), portcullis_arch::Iova(0x7000_1000), &[0; 8]).unwrap_err();
        assert_eq!(board.causes(&e)[0].kind, CauseKind::PastTheEnd);
        // Explained afterwards, the bank is blocked; the fault it holds is explained with it.
        let e = board.explain(0x7000_0000, portcullis_arch::Access::Read);
        let found = board.causes(&e);
        assert_eq!(kinds(&found)[..2], [CauseKind::UnclearedFault, CauseKind::PastTheEnd]);
        let text = found[0].to_string();
        assert!(text.contains("earlier fault (TF)"), "{text}");
        assert!(text.contains("unprivileged write of 0x70001000 by stream 0x14e8"), "{text}");
        assert!(text.contains("would be translated to 0x60000000"), "{text}");
        assert_eq!(crate::ContextRecord::read(&board.smmu, 0).fsr, 0x402);
    }
}
