//! Causes where a walk found descriptors and something is wrong with them, and the search for a shape under which the
//! tables would translate the address.

use portcullis_arch::smmuv3::{Cd, Ste};
use portcullis_arch::vmsa::Granule;
use portcullis_bus::Memory;
use portcullis_smmuv3::{Caps, Explanation, Outcome};
use portcullis_walk::{Fault, Rule, TableFormat};

use crate::causes::layout::{may_begin_at, stage1_sizes, stage2_sizes, tg0, tg1};
use crate::causes::translation::virtual_base;
use crate::causes::{Cause, CauseContext, CauseKind};
use crate::outcome::descriptor_places;
use crate::permission::{Forbidden, Why};
use crate::v3::permission;
use crate::v3::probe::Probe;
use crate::v3::shape::{self, Shape};
use crate::v3::story::{before_the_walk, steps_of_fault};
use crate::words;

/// The words to patch for another CD or STE.
fn words_of(at: u64, words: &[u64; 8]) -> Vec<(u64, u64)> {
    words.iter().enumerate().map(|(n, w)| (at.wrapping_add(8 * n as u64), *w)).collect()
}

/// Where a walk ended well, in RAM if it is known where that is: a misread table gives addresses at random.
fn plausible(e: &Explanation, ctx: &CauseContext<'_>) -> Option<u64> {
    match &e.outcome {
        Outcome::Translated { walked, .. } if !e.walk.is_empty() => {
            (ctx.ram.is_empty() || ctx.is_ram(walked.pa)).then_some(walked.pa)
        }
        _ => None,
    }
}

fn granules(caps: &Caps, current: Granule) -> Vec<Granule> {
    let all = [(Granule::K4, caps.gran4k), (Granule::K64, caps.gran64k), (Granule::K16, caps.gran16k)];
    let mut found: Vec<Granule> = all.into_iter().filter_map(|(g, yes)| yes.then_some(g)).collect();
    found.sort_by_key(|g| *g != current);
    found
}

/// A different description of the tables, in words, and the words of memory that say it.
type Candidate = (String, Vec<(u64, u64)>);

fn cd_candidates(at: u64, cd: &Cd, caps: &Caps, s: &Shape, ips: Option<u8>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for g in granules(caps, s.pages()).into_iter().filter(|g| may_begin_at(s.base, *g)) {
        for &(tsz, level) in stage1_sizes(g) {
            if (tsz, Some(g)) == (s.tsz, s.granule) {
                continue;
            }
            let d = cd.dw0();
            let d = if s.half == 0 {
                d.with_t0sz(tsz).with_tg0(tg0(g))
            } else {
                d.with_t1sz(tsz).with_tg1(tg1(g))
            };
            let d = ips.map_or(d, |code| d.with_ips(code));
            let output = ips.map_or(String::new(), |code| format!(" and IPS = {code}"));
            let text = format!(
                "{} = {tsz}{output} ({}-bit addresses, {} granule, start level {level})",
                s.size_field(),
                64 - tsz,
                words::granule(g)
            );
            found.push((text, words_of(at, &cd.with_dw0(d).0)));
        }
    }
    found
}

fn ste_candidates(at: u64, ste: &Ste, caps: &Caps, s: &Shape, ps: Option<u8>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for g in granules(caps, s.pages()).into_iter().filter(|g| may_begin_at(s.base, *g)) {
        for &(tsz, sl0, level) in stage2_sizes(g) {
            let d = ste.dw2();
            if (tsz, sl0, Some(g)) == (d.s2t0sz(), d.s2sl0(), s.granule) {
                continue;
            }
            let d = d.with_s2t0sz(tsz).with_s2sl0(sl0).with_s2tg(tg0(g));
            let d = ps.map_or(d, |code| d.with_s2ps(code));
            let output = ps.map_or(String::new(), |code| format!(" and S2PS = {code}"));
            let text = format!(
                "STE.S2T0SZ = {tsz}{output} ({}-bit addresses, {} granule, start level {level}), S2SL0 = {sl0}",
                64 - tsz,
                words::granule(g)
            );
            found.push((text, words_of(at, &ste.with_dw2(d).0)));
        }
    }
    found
}

/// The output size code that lets every address of this SMMU through.
fn widest(caps: &Caps) -> u8 {
    (0..=6).find(|code| shape::address_bits(*code) >= caps.oas_bits).unwrap_or(5)
}

/// A description under which the tables translate the address that they do not translate now.
pub(super) fn search<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Option<Cause> {
    let caps = probe.caps();
    let s = shape::of_stage(e, caps, fault.stage)?;
    if s.format != TableFormat::Aarch64 || s.off {
        return None;
    }
    let narrow = s.output_bits < caps.oas_bits;
    for code in [None, Some(widest(caps))].into_iter().filter(|c| c.is_none() || narrow) {
        let candidates = match (fault.stage, e.cd, e.ste) {
            (1, Some((at, cd)), _) => cd_candidates(at.get(), &cd, caps, &s, code),
            (2, _, Some((at, ste))) => ste_candidates(at.get(), &ste, caps, &s, code),
            _ => return None,
        };
        for (text, words) in candidates {
            let tried = probe.with(&words, e.from, e.va.get(), e.access);
            if let Some(pa) = plausible(&tried, ctx) {
                return Some(found(&s, &text, e.va.get(), pa));
            }
        }
    }
    None
}

fn found(s: &Shape, text: &str, va: u64, pa: u64) -> Cause {
    let (whose, fix) = if s.stage == 2 {
        (
            "the STE",
            "write the size, start level and granule that the tables were built for into the STE".to_owned(),
        )
    } else {
        (
            "the CD",
            "write the size and granule that the tables were built for into the CD; for a process page table take them from the \
             CPU's TCR_EL1 (T0SZ = 64 - VA_BITS, TG0, IPS); then CMD_CFGI_CD, CMD_SYNC"
                .to_owned(),
        )
    };
    let output = format!("{} = {}", s.output_field(), s.size_code);
    Cause::new(
        CauseKind::LayoutMismatch,
        format!("the tables are of another shape than {whose} says: {}, {output}", s.text()),
        fix,
    )
    .because(format!("with {text} these tables translate {va:#x} to {pa:#x}"))
}

/// An address in the tables, or the input of a stream without stage 1, is too wide.
pub(super) fn address_size<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let caps = probe.caps();
    let steps = steps_of_fault(e, fault);
    let wide = steps.last().and_then(|s| match s.rule {
        Rule::AddressSize { address, .. } => Some((s, address)),
        _ => None,
    });
    let (Some((step, address)), Some(s)) = (wide, shape::of_stage(e, caps, fault.stage)) else {
        let why = before_the_walk(e, caps, fault);
        let fix = "limit the master's addresses (dma_set_mask), or translate them";
        return vec![Cause::new(CauseKind::AddressOutOfRange, why, fix)];
    };
    let needed = words::width(address);
    let at = format!("the level {} descriptor at {:#x} is {:#x}", step.level, step.address, step.value);
    let fits = (0..=6).find(|code| {
        let bits = shape::address_bits(*code);
        u32::from(bits) >= needed && bits <= caps.oas_bits
    });
    let Some(code) = fits.filter(|_| s.format == TableFormat::Aarch64) else {
        let damaged = Cause::new(
            CauseKind::DamagedDescriptor,
            format!("{address:#x} needs {needed} bits, and this SMMU can put out {} at most", caps.oas_bits),
            "check what wrote the descriptor, and that the table's address and size make the walker read tables and not data",
        );
        return search(probe, e, ctx, fault).into_iter().chain([damaged.because(at)]).collect();
    };
    let field = s.output_field();
    let size = Cause::new(
        CauseKind::OutputSizeTooSmall,
        format!("{field} = {} ({} bits) is too small for {address:#x}, which needs {needed} bits", s.size_code, s.output_bits),
        format!(
            "write {field} = {code} ({} bits) or more; for a process page table at least TCR_EL1.IPS of the CPU",
            shape::address_bits(code)
        ),
    )
    .because(at);
    let words = match (fault.stage, e.cd, e.ste) {
        (2, _, Some((at, ste))) => words_of(at.get(), &ste.with_dw2(ste.dw2().with_s2ps(code)).0),
        (_, Some((at, cd)), _) => words_of(at.get(), &cd.with_dw0(cd.dw0().with_ips(code)).0),
        _ => return vec![size],
    };
    let tried = probe.with(&words, e.from, e.va.get(), e.access);
    match plausible(&tried, &CauseContext { ram: &[], ..*ctx }) {
        Some(pa) => {
            let text = format!("with {field} = {code} these tables translate {:#x} to {pa:#x}", e.va);
            vec![size.because(text)]
        }
        None => search(probe, e, ctx, fault).into_iter().chain([size]).collect(),
    }
}

/// AF = 0.
pub(super) fn access_flag<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, fault: &Fault) -> Vec<Cause> {
    let at = steps_of_fault(e, fault).last().map_or_else(String::new, |s| {
        format!(" in the level {} descriptor at {:#x} ({:#x})", s.level, s.address, s.value)
    });
    let (affd, ha) = if fault.stage == 2 { ("STE.S2AFFD", "STE.S2HA") } else { ("CD.AFFD", "CD.HA") };
    let by_hardware = if probe.caps().httu == portcullis_smmuv3::Httu::None {
        "this SMMU does not set it by itself (IDR0.HTTU=0)".to_owned()
    } else {
        format!("or write {ha}=1 and let the SMMU set it (IDR0.HTTU)")
    };
    vec![
        Cause::new(
            CauseKind::AccessFlagClear,
            format!("the access flag is clear: AF (bit 10) = 0{at}"),
            format!(
                "set it when mapping; {by_hardware}; in a process page table it is clear until the CPU touches the page, so touch \
                 the buffer first, or set {affd}=1 to ignore it"
            ),
        )
        .because(format!("stage {} requires it ({affd}=0, {ha}=0)", fault.stage)),
    ]
}

/// A descriptor forbids the access: one cause for each kind of rule that does.
pub(super) fn permission<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, fault: &Fault) -> Vec<Cause> {
    let mut found: Vec<Cause> = Vec::new();
    for reason in permission::forbidden(e, fault) {
        let cause = forbidden(probe, e, fault, &reason);
        match found.iter_mut().find(|c| c.kind == cause.kind) {
            Some(known) => known.evidence.insert(0, reason.bit),
            None => found.push(cause),
        }
    }
    found
}

fn forbidden<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, fault: &Fault, reason: &Forbidden) -> Cause {
    let d1 = e.ste.map(|(_, s)| s.dw1()).unwrap_or_default();
    let can_override = probe.caps().attr_perms_override;
    let (privcfg, instcfg) = if can_override { (d1.privcfg(), d1.instcfg()) } else { (0, 0) };
    let try_it = |changed: portcullis_arch::smmuv3::ste::SteDw1, name: &str| {
        let (at, ste) = e.ste.filter(|_| can_override)?;
        let tried = probe.with(&words_of(at.get(), &ste.with_dw1(changed).0), e.from, e.va.get(), e.access);
        match tried.outcome {
            Outcome::Translated { walked, .. } => {
                Some(format!("with STE.{name} the access is translated to {:#x}", walked.pa))
            }
            _ => None,
        }
    };
    let attrs = permission::incoming(e);
    let privilege = if attrs.privileged() { "a privileged" } else { "an unprivileged" };
    let whose = match (fault.on_stage1_walk, e.cd.is_none()) {
        (_, true) if fault.stage == 2 => " for the context descriptor",
        (true, _) => " for a stage 1 table",
        _ => "",
    };
    let cause = match (reason.why, fault.stage) {
        (Why::ReadOnly | Why::WriteOnly | Why::TableInDevice, 2) => {
            let what =
                if fault.write { "update of a table".to_owned() } else { format!("{}{whose}", e.access) };
            Cause::new(
                CauseKind::Stage2Forbids,
                format!("stage 2 forbids the {what} of IPA {:#x}", fault.ipa),
                "give the stage 2 mapping the rights that the guest's device needs (S2AP), map its tables as Normal memory, and \
                 writable where stage 1 has hardware updates (CD.HA, CD.HD)",
            )
        }
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
            let source = match privcfg {
                2 => "STE.PRIVCFG=2 makes it so".to_owned(),
                code => format!("the master says so (AxPROT[0]=0) and STE.PRIVCFG={code} leaves it"),
            };
            Cause::new(
                CauseKind::PrivilegedOnly,
                format!("an unprivileged access to {:#x}, which only privileged ones may touch", e.va),
                "map it for unprivileged accesses (AP[1]=1; not IOMMU_PRIV), or make the stream privileged (STE.PRIVCFG=3)",
            )
            .because(format!("the access is unprivileged: {source}"))
            .because_all(try_it(d1.with_privcfg(3), "PRIVCFG = 3 (privileged)"))
        }
        (Why::PrivilegedAccessNever, _) => {
            let source = match privcfg {
                3 => "STE.PRIVCFG=3 makes it so".to_owned(),
                code => format!("the master says so (AxPROT[0]=1) and STE.PRIVCFG={code} leaves it"),
            };
            Cause::new(
                CauseKind::PrivilegedOnly,
                format!("a privileged access to {:#x}, which is a page of user memory (CD.PAN=1)", e.va),
                "make the stream unprivileged (STE.PRIVCFG=2), or write CD.PAN=0",
            )
            .because(format!("the access is privileged: {source}"))
            .because_all(try_it(d1.with_privcfg(2), "PRIVCFG = 2 (unprivileged)"))
        }
        (Why::ExecuteNever | Why::WritableExecuteNever, stage) => {
            let source = match instcfg {
                3 => "STE.INSTCFG=3 turns every read into an instruction fetch".to_owned(),
                code => format!("the master drives AxPROT[2]=1 and STE.INSTCFG={code} leaves it so"),
            };
            Cause::new(
                CauseKind::InstructionFetch,
                format!("data at {:#x} is read as {privilege} instruction fetch, which stage {stage} forbids", e.va),
                "write STE.INSTCFG = 2 (data), or make the master drive AxPROT[2]=0 (data); page tables of processes mark data \
                 execute never",
            )
            .because(format!("it is an instruction fetch because {source}"))
            .because_all(try_it(d1.with_instcfg(2), "INSTCFG = 2 (data)"))
        }
        (Why::Secure, _) => Cause::new(
            CauseKind::SecureInstructionFetch,
            format!("a secure instruction fetch of {:#x} from non-secure memory", e.va),
            "drive AxPROT[2]=0 (data), or write STE.INSTCFG = 2",
        ),
    };
    Cause { evidence: std::iter::once(reason.bit.clone()).chain(cause.evidence).collect(), ..cause }
}

/// Memory refused the read or the update of a descriptor.
pub(super) fn external<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    fault: &Fault,
) -> Vec<Cause> {
    let mut found: Vec<Cause> = search(probe, e, ctx, fault).into_iter().collect();
    let Some(s) = shape::of_stage(e, probe.caps(), fault.stage) else { return found };
    let steps = steps_of_fault(e, fault);
    let Some(step) = steps.last() else { return found };
    let walk = if e.walk.is_empty() { &e.cd_walk } else { &e.walk };
    let place = walk.len().checked_sub(1).and_then(|i| *descriptor_places(walk).get(i)?);
    let at = place.unwrap_or(step.address);
    let ram: Vec<String> =
        ctx.ram.iter().map(|(base, size)| format!("{base:#x}..{:#x}", base.wrapping_add(*size))).collect();
    let cause = match steps.len().checked_sub(2).and_then(|i| steps.get(i)) {
        None => virtual_base(
            Cause::new(
                CauseKind::WrongTableBase,
                format!("{} points to {at:#x}, where no memory answers", s.base_field()),
                format!("write the physical address of the first table into {}", s.base_field()),
            ),
            s.base,
        ),
        Some(parent) => Cause::new(
            CauseKind::TableOutsideMemory,
            format!("the level {} table is at {at:#x}, where no memory answers", step.level),
            "check what wrote the descriptor that points there, and that the first table's address and size make the walker read \
             tables and not data",
        )
        .because(format!("the level {} descriptor at {:#x} is {:#x}", parent.level, parent.address, parent.value)),
    };
    let cause = match step.rule {
        Rule::External(error) => cause.because(error.to_string()),
        _ => cause,
    };
    found.push(if ram.is_empty() { cause } else { cause.because(format!("RAM is {}", ram.join(", "))) });
    found
}
