//! Would the tables translate the address if the bank described them otherwise? Tried on a copy of the registers with
//! other sizes (that is, start levels), granules and output sizes.

use portcullis_arch::smmuv2::offset::cb;
use portcullis_arch::smmuv2::{Tcr2, TcrS1, TcrS2, address_code};
use portcullis_arch::vmsa::Granule;
use portcullis_bus::Memory;
use portcullis_smmuv2::{BankView, Explanation, Outcome};
use portcullis_walk::{Fault, TableFormat};

use super::{Cause, CauseContext, CauseKind};
use crate::bank;
use crate::outcome;
use crate::probe::{Probe, Register};
use crate::words;

/// Stage 1 sizes that start each level with its largest table: (TSZ, start level) by granule.
pub(crate) fn stage1_sizes(granule: Granule) -> &'static [(u8, i8)] {
    match granule {
        Granule::K4 => &[(25, 1), (16, 0), (34, 2)],
        Granule::K16 => &[(17, 1), (28, 2), (16, 0), (39, 3)],
        Granule::K64 => &[(22, 2), (16, 1), (35, 3)],
    }
}

/// Stage 2 sizes: (T0SZ, SL0, start level). Smaller starts with several tables in a row are left out except the
/// usual 40 bits.
pub(crate) fn stage2_sizes(granule: Granule) -> &'static [(u8, u8, i8)] {
    match granule {
        Granule::K4 => &[(25, 1, 1), (24, 1, 1), (16, 2, 0), (34, 0, 2)],
        Granule::K16 => &[(17, 2, 1), (28, 1, 2)],
        Granule::K64 => &[(22, 1, 2), (16, 2, 1), (35, 0, 3)],
    }
}

/// Tables may begin there: with one of a granule's size, at a multiple of it. What hardware reads elsewhere is not the
/// table but what lies before it.
pub(crate) fn may_begin_at(base: u64, granule: Granule) -> bool {
    base & (granule.bytes() - 1) & !0xf == 0
}

/// A different description of the tables.
struct Candidate {
    text: String,
    changes: Vec<(Register, u32)>,
}

/// True if a walk ended well, in RAM if it is known where that is: a misread table gives addresses at random.
fn plausible(e: &Explanation, ctx: &CauseContext<'_>) -> Option<u64> {
    match e.outcome {
        Outcome::Translated { walked, .. } if !e.walk.is_empty() => {
            (ctx.ram.is_empty() || ctx.is_ram(walked.pa)).then_some(walked.pa)
        }
        _ => None,
    }
}

/// The output size code that lets every address of this SMMU through.
fn widest<M: Memory>(probe: &Probe<'_, M>) -> u8 {
    address_code(probe.config().pa_bits).unwrap_or(5)
}

fn candidates<M: Memory>(probe: &Probe<'_, M>, b: &BankView, half: usize, wide: bool) -> Vec<Candidate> {
    let mut found = Vec::new();
    let current = bank::granule(b, probe.config(), half);
    let mut granules: Vec<Granule> = bank::implemented(probe.config()).collect();
    granules.sort_by_key(|g| *g != current);
    let code = widest(probe);
    let output = if wide { format!(" and PASize = {code}") } else { String::new() };
    let base = if half == 0 { b.ttbr0 } else { b.ttbr1 };
    for g in granules.into_iter().filter(|g| may_begin_at(base, *g)) {
        let name = |tsz: u8, level: i8, field: &str| {
            format!(
                "{field} = {tsz}{output} ({}-bit addresses, {} granule, start level {level})",
                64 - tsz,
                words::granule(g)
            )
        };
        if bank::stage(b) == 2 {
            let t = TcrS2::from_bits(b.tcr);
            for &(tsz, sl0, level) in stage2_sizes(g) {
                if (tsz, sl0, g) == (t.t0sz(), t.sl0(), current) {
                    continue;
                }
                let t = t.with_t0sz(tsz).with_sl0(sl0).with_tg0(tg0(g));
                let t = if wide { t.with_pasize(code) } else { t };
                found.push(Candidate {
                    text: format!("{}, SL0 = {sl0}", name(tsz, level, "T0SZ")),
                    changes: vec![(Register::Bank(b.index, cb::TCR), t.into_bits())],
                });
            }
            continue;
        }
        let t = TcrS1::from_bits(b.tcr);
        for &(tsz, level) in stage1_sizes(g) {
            let now = if half == 0 { t.t0sz() } else { t.t1sz() };
            if (tsz, g) == (now, current) {
                continue;
            }
            let t =
                if half == 0 { t.with_t0sz(tsz).with_tg0(tg0(g)) } else { t.with_t1sz(tsz).with_tg1(tg1(g)) };
            let mut changes = vec![(Register::Bank(b.index, cb::TCR), t.into_bits())];
            if wide {
                let tcr2 = Tcr2::from_bits(b.tcr2).with_pasize(code).into_bits();
                changes.push((Register::Bank(b.index, cb::TCR2), tcr2));
            }
            found
                .push(Candidate { text: name(tsz, level, if half == 0 { "T0SZ" } else { "T1SZ" }), changes });
        }
    }
    found
}

pub(crate) fn tg0(g: Granule) -> u8 {
    match g {
        Granule::K4 => 0,
        Granule::K64 => 1,
        Granule::K16 => 2,
    }
}

pub(crate) fn tg1(g: Granule) -> u8 {
    match g {
        Granule::K16 => 1,
        Granule::K4 => 2,
        Granule::K64 => 3,
    }
}

/// What the bank says now, in the words of a candidate.
fn now(b: &BankView, half: usize, granule: Granule) -> String {
    if bank::stage(b) == 2 {
        let t = TcrS2::from_bits(b.tcr);
        return format!(
            "T0SZ = {} ({} granule), SL0 = {}, PASize = {}",
            t.t0sz(),
            words::granule(granule),
            t.sl0(),
            t.pasize()
        );
    }
    let t = TcrS1::from_bits(b.tcr);
    let (field, tsz) = if half == 0 { ("T0SZ", t.t0sz()) } else { ("T1SZ", t.t1sz()) };
    let bits = 64 - tsz.min(63);
    let level = bank::start_level(granule, bits);
    let granule = words::granule(granule);
    let pasize = Tcr2::from_bits(b.tcr2).pasize();
    format!(
        "{field} = {tsz} ({bits}-bit addresses, {granule} granule, start level {level}), PASize = {pasize}"
    )
}

/// A description under which the tables translate the address that they do not translate now.
pub(super) fn search<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Option<Cause> {
    let b = outcome::bank_of_stage(e, fault.stage)?;
    if bank::format(b) != TableFormat::Aarch64 {
        return None;
    }
    let half = bank::half(b, probe.config(), e.va.get());
    let granule = bank::granule(b, probe.config(), half);
    let narrow = bank::pasize(b).is_some_and(|(_, bits)| bits < probe.config().pa_bits);
    let all = [false, true].into_iter().filter(|&wide| !wide || narrow);
    for candidate in all.flat_map(|wide| candidates(probe, b, half, wide)) {
        let tried = probe.with(&candidate.changes, |p| p.explain(e.from, e.va.get(), e.access));
        if let Some(pa) = plausible(&tried, ctx) {
            return Some(found(b, fault.stage, half, granule, &candidate.text, e.va.get(), pa));
        }
    }
    None
}

fn found(b: &BankView, stage: u8, half: usize, granule: Granule, text: &str, va: u64, pa: u64) -> Cause {
    let fix = if stage == 2 {
        format!(
            "write the size, start level and granule that the tables were built for into CB{}.TCR",
            b.index
        )
    } else {
        format!(
            "write the size and granule that the tables were built for into CB{}.TCR; for a process page table take them from \
             the CPU's TCR_EL1 (T0SZ = 64 - VA_BITS, TG0, and IPS for TCR2.PASize)",
            b.index
        )
    };
    Cause::new(
        CauseKind::LayoutMismatch,
        format!("the tables are of another shape than bank {} says: {}", b.index, now(b, half, granule)),
        fix,
    )
    .because(format!("with {text} these tables translate {va:#x} to {pa:#x}"))
}

/// The result with another output size code in the bank.
pub(super) fn with_pasize<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    b: &BankView,
    code: u8,
) -> Option<u64> {
    let change = if bank::stage(b) == 2 {
        (Register::Bank(b.index, cb::TCR), TcrS2::from_bits(b.tcr).with_pasize(code).into_bits())
    } else {
        (Register::Bank(b.index, cb::TCR2), Tcr2::from_bits(b.tcr2).with_pasize(code).into_bits())
    };
    let ctx = CauseContext { ram: &[], ..*ctx };
    plausible(&probe.with(&[change], |p| p.explain(e.from, e.va.get(), e.access)), &ctx)
}
