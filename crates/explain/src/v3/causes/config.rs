//! Causes before any translation table is read: stream table, STE, context descriptors.

use portcullis_arch::smmuv3::regs::{StrtabBase, StrtabBaseCfg};
use portcullis_arch::smmuv3::{EventCode, L1Std};
use portcullis_bus::Memory;
use portcullis_bus::coherency::Maintenance;
use portcullis_smmuv3::{Explanation, Outcome};

use crate::causes::{Cause, CauseContext, CauseKind};
use crate::v3::causes::named;
use crate::v3::probe::Probe;
use crate::words;

/// An L1STD, STE, L1CD or CD that was read while a newer value was still in the CPU's cache.
pub(super) fn stale_words(e: &Explanation, ctx: &CauseContext<'_>) -> Option<Cause> {
    let places = [
        (e.l1std.map(|(at, _)| at.get()), 8, "level 1 stream table descriptor"),
        (e.ste.map(|(at, _)| at.get()), 64, "stream table entry"),
        (e.l1cd.map(|(at, _)| at.get()), 8, "level 1 context descriptor"),
        (e.cd.map(|(at, _)| at.get()), 64, "context descriptor"),
    ];
    let of = |s: &portcullis_bus::StaleRead| {
        places.iter().find(|(at, len, _)| at.is_some_and(|at| s.pa.wrapping_sub(at & !7) < *len)).map(|p| p.2)
    };
    let (s, what) =
        ctx.stale.iter().filter(|s| s.missing == Maintenance::Clean).find_map(|s| Some((s, of(s)?)))?;
    Some(
        Cause::new(
            CauseKind::TablesNotCleaned,
            format!("the {what} at {:#x} is old: the CPU's new value is still in its cache", s.pa),
            "clean it from the cache after writing it, then CMD_CFGI and CMD_SYNC (IDR0.COHACC=0: table accesses do not snoop; \
             dma-coherent at the SMMU's node is right only where they do)",
        )
        .because(format!("{} read {:#x} there, the CPU had written {:#x}", s.reader, s.seen, s.current)),
    )
}

/// Causes of an event that is not about translation tables.
pub(super) fn causes<M: Memory>(
    probe: &Probe<'_, M>,
    e: &Explanation,
    ctx: &CauseContext<'_>,
    code: Option<EventCode>,
) -> Vec<Cause> {
    let cause = match code {
        Some(EventCode::BadStreamId) => {
            return near_miss(probe, e, ctx).into_iter().chain([bad_stream(e, ctx)]).collect();
        }
        Some(EventCode::SteFetch) => fetch(e, ctx, "stream table entry"),
        Some(EventCode::BadSte) => bad_ste(probe, e, ctx),
        Some(EventCode::BadSubstreamId) => bad_substream(e),
        Some(EventCode::StreamDisabled) => disabled(e),
        Some(EventCode::CdFetch) => fetch(e, ctx, "context descriptor"),
        Some(EventCode::BadCd) => bad_cd(e),
        Some(EventCode::AddrSize) => too_wide(probe, e, ctx),
        Some(EventCode::Permission) => Cause::new(
            CauseKind::SecureInstructionFetch,
            "a secure instruction fetch from non-secure memory, which S_CR0.SIF=1 forbids",
            "drive AxPROT[2]=0 (data) on the master, or write STE.INSTCFG = 2",
        ),
        other => Cause::new(
            CauseKind::NoDomainAttached,
            format!("{}: {}", named(other), e.rule),
            "check the stream's STE",
        )
        .because(ctx.describe(e.from.stream)),
    };
    vec![cause]
}

/// Words of the stream table that are looked at to find out who has a domain.
const BUDGET: usize = 1 << 14;

/// The streams whose STE is valid and does not abort, as far as the budget goes.
pub(super) fn claimed<M: Memory>(probe: &Probe<'_, M>, e: &Explanation) -> Vec<u32> {
    let cfg = StrtabBaseCfg::from_bits(e.strtab_base_cfg);
    let base = StrtabBase::from_bits(e.strtab_base).addr_55_6() << 6;
    let streams = 1u64 << cfg.log2size().min(32);
    let mut left = BUDGET;
    let mut load = |at: u64| {
        left = left.checked_sub(1)?;
        Some(probe.load64(at).unwrap_or(0))
    };
    let mut found = Vec::new();
    let mut array = |first: u64, at: u64, count: u64, load: &mut dyn FnMut(u64) -> Option<u64>| {
        (0..count).try_for_each(|n| {
            let word = load(at.wrapping_add(n * 64))?;
            if word & 1 != 0 && word >> 3 & 1 != 0 {
                found.push((first + n) as u32);
            }
            Some(())
        })
    };
    if cfg.fmt() != 1 {
        array(0, base, streams, &mut load);
        return found;
    }
    let split = split_of(cfg);
    for n in 0..streams >> split {
        let Some(word) = load(base.wrapping_add(n * 8)) else { break };
        let l1 = L1Std::from_bits(word);
        if (1..=split + 1).contains(&l1.span()) {
            array(n << split, l1.l2ptr_55_6() << 6, 1 << (l1.span() - 1), &mut load);
        }
    }
    found
}

/// SPLIT as far as it counts.
fn split_of(cfg: StrtabBaseCfg) -> u8 {
    match cfg.split() {
        s @ (8 | 10) => s,
        _ => 6,
    }
}

/// Who has a domain, in words.
pub(super) fn claimed_words(streams: &[u32]) -> String {
    if streams.is_empty() {
        return "no stream has a domain".into();
    }
    let shown: Vec<String> = streams.iter().map(|s| format!("{s:#x}")).collect();
    format!("streams that have a domain: {}", words::some_of(&shown, 12))
}

/// A stream that has a domain and was probably meant for this one.
fn near_miss<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Option<Cause> {
    let sid = e.from.stream.get();
    // What hardware is known to send is no mistake.
    let sent = |s: u32| ctx.names.iter().any(|(known, _)| known.get() == s);
    let streams = claimed(probe, e);
    let mut others = streams.iter().copied().filter(|s| !sent(*s));
    let meant = others.find(|s| s & 0xff == sid & 0xff)?;
    Some(
        Cause::new(
            CauseKind::WrongStreamId,
            format!("the STE of stream {meant:#x} was probably meant for stream {sid:#x}: only the bits above 7 differ"),
            format!(
                "the requester id (device and function) is right and the base is not: put {:#x} as the base into iommu-map, or \
                 {sid:#x} into iommus",
                sid & !0xff
            ),
        )
        .because(format!("the hardware sends {}", ctx.describe(e.from.stream)))
        .because(claimed_words(&streams)),
    )
}

/// Where the ids of a stream come from.
const IDS: &str = "check the ids in the device tree: iommus = <&smmu id> for a platform master, for PCIe iommu-map of the host \
                   bridge (id = base + requester id - first requester id, after iommu-map-mask)";

fn bad_stream(e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let sid = e.from.stream.get();
    let cfg = StrtabBaseCfg::from_bits(e.strtab_base_cfg);
    let size = format!(
        "STRTAB_BASE_CFG.LOG2SIZE={}: streams below {:#x}",
        cfg.log2size(),
        1u64 << cfg.log2size().min(32)
    );
    let who = ctx.describe(e.from.stream);
    let Some((at, l1)) = e.l1std else {
        return Cause::new(
            CauseKind::StreamIdTooWide,
            format!("stream {sid:#x} is beyond the stream table"),
            format!(
                "make the stream table as large as IDR1.SIDSIZE allows, or as the largest id needs; {IDS}"
            ),
        )
        .because(size)
        .because(who);
    };
    let span = L1Std::from_bits(l1).span();
    let split = split_of(cfg);
    let first = sid >> split << split;
    let range = format!("{first:#x}..{:#x}", u64::from(first) + (1 << split));
    match span {
        0 | 12.. => Cause::new(
            CauseKind::MissingStreamMapping,
            format!("no stream of {range} has a stream table entry: nobody claimed stream {sid:#x}"),
            format!(
                "{IDS}; the SMMU's driver makes the level 2 table when a device with such an id is added (Linux: \
                 arm_smmu_init_sid_strtab)"
            ),
        )
        .because(format!("the L1STD at {at:#x} has Span={span}"))
        .because(who),
        span if span > split + 1 => Cause::new(
            CauseKind::IllegalStreamEntry,
            format!("the level 1 descriptor of streams {range} has Span={span}, more than SPLIT+1={}", split + 1),
            "write Span = SPLIT + 1 at most",
        )
        .because(format!("the L1STD at {at:#x} is {l1:#x}")),
        span => Cause::new(
            CauseKind::StreamIdTooWide,
            format!("stream {sid:#x} is beyond the {} entries that its level 1 descriptor covers", 1u32 << (span - 1)),
            format!("give the level 2 table 2^SPLIT entries (Span=SPLIT+1), as Linux does; {IDS}"),
        )
        .because(format!("the L1STD at {at:#x} has Span={span}: streams from {first:#x} on"))
        .because(who),
    }
}

/// RAM in words, for fetches that went elsewhere.
fn ram(ctx: &CauseContext<'_>) -> Option<String> {
    let ram: Vec<String> =
        ctx.ram.iter().map(|(base, size)| format!("{base:#x}..{:#x}", base.wrapping_add(*size))).collect();
    (!ram.is_empty()).then(|| format!("RAM is {}", ram.join(", ")))
}

fn fetch(e: &Explanation, ctx: &CauseContext<'_>, what: &str) -> Cause {
    let at = match &e.outcome {
        Outcome::Event { record, .. } => record.fetch_addr(),
        _ => 0,
    };
    let base = StrtabBase::from_bits(e.strtab_base).addr_55_6() << 6;
    let pointer = match (what, e.l1std, e.l1cd, e.ste) {
        ("stream table entry", Some((l1, value)), ..) => format!("the L1STD at {l1:#x} is {value:#x}"),
        ("stream table entry", ..) => format!("STRTAB_BASE is {base:#x}"),
        (_, _, Some((l1, value)), _) => format!("the L1CD at {l1:#x} is {value:#x}"),
        (_, _, _, Some((at, ste))) => {
            format!("STE.S1ContextPtr is {:#x} (STE at {at:#x})", ste.s1_context_ptr())
        }
        _ => ctx.describe(e.from.stream),
    };
    Cause::new(
        CauseKind::ConfigOutsideMemory,
        format!("memory refuses the read of the {what} at {at:#x}"),
        "write the physical address of the table (not a virtual one), and keep its memory as long as the SMMU may read it",
    )
    .because(pointer)
    .because_all(ram(ctx))
}

/// What to do about a rule that an STE or CD breaks, by the field that the rule names.
const ADVICE: &[(&str, &str)] = &[
    ("S1STALLD", "write STE.S1STALLD=0 unless IDR0.STALL_MODEL is 0"),
    ("S1CDMax", "write STE.S1CDMax of at most IDR1.SSIDSIZE"),
    ("S1Fmt", "use a linear CD table (STE.S1Fmt=0) where IDR0.CD2L is 0"),
    ("S1ContextPtr", "write the physical address of the CD table into STE.S1ContextPtr"),
    (
        "EATS",
        "write STE.EATS=1 for full ATS without stage 2 stalls; 2 needs both stages, S2S=0 and IDR0.NS1ATS=0",
    ),
    ("STRW", "write STE.STRW=0 (EL1), or 2 (EL2) where IDR0.HYP is 1"),
    ("S2VMID", "use VMIDs below 256 where IDR0.VMID16 is 0"),
    ("S2TTB", "write the physical address of stage 2's first table, within S2PS, into STE.S2TTB"),
    (
        "S2T0SZ",
        "write S2T0SZ, S2SL0 and S2TG that belong together: IPA bits = 64 - S2T0SZ, start level by S2SL0",
    ),
    ("S2TG", "use a granule that IDR5 has"),
    ("S2S", "write STE.S2S as IDR0.STALL_MODEL demands: 0 for terminate only, 1 for stall forced"),
    (
        "CD.S =",
        "write CD.S as IDR0.STALL_MODEL demands: 0 for terminate only (or STE.S1STALLD=1), 1 for stall forced",
    ),
    ("CD.A", "write CD.A=1 where IDR0.TERM_MODEL is 1"),
    ("ASID", "use ASIDs below 256 where IDR0.ASID16 is 0"),
    (
        "T0SZ",
        "write a T0SZ of 16 to 39 (to 48 with IDR3.STT, from 12 with 52-bit addresses), or EPD=1 for a half that is not used",
    ),
    ("TG0", "use a granule that IDR5 has, or EPD=1 for a half that is not used"),
    (
        "TTB0",
        "write the physical address of the first table, within IPS, into CD.TTB0 or TTB1; ASIDs are in a field of their own",
    ),
    ("ENDI", "build tables in the endianness that IDR0.TTENDIAN has"),
    ("HA", "enable hardware updates only as far as IDR0.HTTU goes"),
    ("AA64", "use the table format that IDR0.TTF has"),
    ("FWB", "use VMSAv8-64 for stage 2 with S2FWB"),
];

fn advice(rule: &str, otherwise: &str) -> String {
    let known = ADVICE.iter().find(|(field, _)| rule.contains(field));
    known.map_or(otherwise, |(_, text)| text).to_owned()
}

fn bad_ste<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let (sid, Some((at, ste))) = (e.from.stream, e.ste) else {
        return Cause::new(CauseKind::IllegalStreamEntry, e.rule, "check the stream's STE");
    };
    let at = at.get();
    if ste.valid() {
        let fix = advice(
            e.rule,
            "the SMMU lacks a feature that the STE asks for: read IDR0 to IDR5 before writing it",
        );
        return Cause::new(
            CauseKind::IllegalStreamEntry,
            format!("the STE of stream {sid:#x} is illegal: {}", e.rule),
            fix,
        )
        .because(format!("the STE at {at:#x} has word 0 = {:#x}, word 1 = {:#x}", ste.0[0], ste.0[1]));
    }
    let snoop = if probe.caps().coherent {
        "; write V last, with a barrier before it"
    } else {
        "; write V last, and clean the entry from the cache (IDR0.COHACC=0)"
    };
    let cause = Cause::new(
        CauseKind::InvalidStreamEntry,
        format!("the STE of stream {sid:#x} is not valid (V=0): no domain was attached, or the table was never written"),
        format!("attach a domain; fill a new stream table with V=1, Config=abort before CR0.SMMUEN=1{snoop}. {IDS}"),
    )
    .because(ctx.describe(sid));
    if ste.0 == [0; 8] {
        cause.because(format!("the whole entry at {at:#x} is zero"))
    } else {
        cause.because(format!(
            "word 0 of the entry at {at:#x} is {:#x}; other words are not zero, so it was in use once",
            ste.0[0]
        ))
    }
}

fn bad_substream(e: &Explanation) -> Cause {
    let ssid = e.from.substream.map_or(0, |s| s.get());
    let Some((at, ste)) = e.ste else {
        return Cause::new(CauseKind::SubstreamsOff, e.rule, "check the stream's STE");
    };
    let d = ste.dw0();
    if let Some((at, value)) = e.l1cd {
        return Cause::new(
            CauseKind::SubstreamNotBound,
            format!("nobody is bound to substream {ssid:#x}: its level 1 context descriptor is not valid"),
            "bind the process (iommu_sva_bind_device) before the device uses its PASID, and stop the device before unbinding",
        )
        .because(format!("the L1CD at {at:#x} is {value:#x}"));
    }
    let max = d.s1cdmax();
    let cause = if ste.config().stage1() && max != 0 {
        Cause::new(
            CauseKind::SubstreamsOff,
            format!(
                "substream {ssid:#x} is beyond the {:#x} context descriptors of the stream (S1CDMax={max})",
                1u64 << max
            ),
            "give the device a PASID below 2^S1CDMax; S1CDMax follows pasid-num-bits of its node (PCIe: its PASID capability) \
             and IDR1.SSIDSIZE",
        )
    } else {
        let why = if ste.config().stage1() { "S1CDMax=0" } else { "stage 1 is off" };
        Cause::new(
            CauseKind::SubstreamsOff,
            format!("a transaction with substream {ssid:#x}, but the stream takes no substreams ({why})"),
            "say pasid-num-bits in the device's node, and attach a stage 1 domain; or switch PASIDs off in the device",
        )
    };
    cause.because(format!("{} (STE at {at:#x})", e.rule))
}

fn disabled(e: &Explanation) -> Cause {
    let s1dss = e.ste.map_or(0, |(_, s)| s.dw1().s1dss());
    let (what, fix) = if e.from.substream.is_some() {
        (
            "a transaction with substream 0, which S1DSS=2 keeps for transactions without one".to_owned(),
            "use PASIDs from 1 on: with S1DSS=2 context descriptor 0 belongs to the DMA API",
        )
    } else {
        (
            format!("a transaction without a substream, which S1DSS={s1dss} terminates"),
            "let the device send a PASID with every transaction, or write S1DSS=2 and attach a domain for its own DMA \
             (descriptor fetches and MSIs often have no PASID)",
        )
    };
    Cause::new(CauseKind::StreamDisabled, what, fix).because(e.rule)
}

fn bad_cd(e: &Explanation) -> Cause {
    let Some((at, cd)) = e.cd else {
        return Cause::new(CauseKind::IllegalContextDescriptor, e.rule, "check the context descriptor");
    };
    if cd.valid() {
        return Cause::new(
            CauseKind::IllegalContextDescriptor,
            format!("the context descriptor is illegal: {}", e.rule),
            advice(
                e.rule,
                "the SMMU lacks a feature that the CD asks for: read IDR0 to IDR5 before writing it",
            ),
        )
        .because(format!("the CD at {at:#x} has word 0 = {:#x}, word 1 = {:#x}", cd.0[0], cd.0[1]));
    }
    let empty = format!("the CD at {at:#x} has V=0");
    match e.from.substream {
        Some(ssid) => Cause::new(
            CauseKind::SubstreamNotBound,
            format!("nobody is bound to substream {ssid:#x}: its context descriptor is not valid"),
            "bind the process (iommu_sva_bind_device) before the device uses its PASID, and stop the device before unbinding; a \
             PASID that outlives its process is a bug of the device's driver",
        )
        .because(empty),
        None => Cause::new(
            CauseKind::InvalidContextDescriptor,
            format!("the context descriptor of stream {:#x} is not valid (V=0)", e.from.stream),
            "write the CD, then CMD_CFGI_CD and CMD_SYNC, before the STE points to it",
        )
        .because(empty),
    }
}

/// F_ADDR_SIZE of an address that no stage 1 translates.
fn too_wide<M: Memory>(probe: &Probe<'_, M>, e: &Explanation, ctx: &CauseContext<'_>) -> Cause {
    let bits = probe.caps().oas_bits;
    Cause::new(
        CauseKind::AddressOutOfRange,
        format!("{:#x} needs {} bits, and this SMMU puts out {bits} (OAS) for a stream that stage 1 does not translate", e.va, words::width(e.va.get())),
        "limit the master's addresses (dma_set_mask), or translate them",
    )
    .because(ctx.describe(e.from.stream))
}
