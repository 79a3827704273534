//! Tier A: a distribution's kernel as it is, without any module. Its SMMU drivers probe our SMMUs, put masters into groups
//! and domains, and report faults; what they wrote into registers and tables is what Linux's source says, and every fault is
//! told alike by the kernel and by us.
//!
//! Without the kit there is one clear line and every test passes; with PORTCULLIS_NEED_LINUX_KIT=1 they fail.

mod common;

use std::collections::BTreeSet;

use common::faults::{self, Told};
use common::log::{self, Record};
use common::{EAGER, Guest, Report, Seen, Which};
use portcullis_arch::smmuv3::EventCode;
use portcullis_arch::{Access, Iova, StreamId};
use portcullis_board::sim::EngineSlot;
use portcullis_bus::Initiator;
use portcullis_cosim::guest_tree::Messages;
use portcullis_cosim::qemu::Tier;
use portcullis_explain::CauseKind;
use portcullis_smmuv2::GlobalFault;
use portcullis_smmuv3::{Outcome, SilentAbort};

const JOB: &str = include_str!("../jobs/probe.sh");
/// When the job holds still.
const BOOTED: u32 = 1;
const BOUND: u32 = 2;

/// What `arm-smmu` says of the thesis board's MMU-500; lines with tabs are the features.
const V2_LINES: [&str; 10] = [
    "probing hardware configuration...",
    "SMMUv2 with:",
    "\tstage 1 translation",
    "\tstage 2 translation",
    "\tnested translation",
    "\tstream matching with 48 register groups",
    "\t16 context banks (0 stage-2 only)",
    "\tSupported page sizes: 0x61311000",
    "\tStage-1: 48-bit VA -> 48-bit IPA",
    "\tStage-2: 48-bit IPA -> 48-bit PA",
];

/// The first line of `arm-smmu-v3` about our SMMUv3, before the features, and these, since a version.
const V3_FEATURES: [((u32, u32), &str, u32); 2] =
    [((6, 12), "ias 52-bit, oas 52-bit", 0x0070_dfff), ((7, 3), "oas 52-bit", 0x05f0_dfff)];
const V3_QUEUES: [&str; 3] =
    ["allocated 256 entries for cmdq", "allocated 128 entries for evtq", "allocated 128 entries for priq"];

/// io-pgtable-arm.c: attribute 0 non-cacheable, 1 write-back, 2 device, 3 inner write-back outer non-cacheable. The kernel
/// composes it of `int`s, so that the sign of 0xf4 << 24 fills the upper half, attributes that nothing uses.
const MAIR: u64 = 0xffff_ffff_f404_ff44;

/// A channel's translation now.
fn explain(seen: &Seen<'_>, channel: &EngineSlot) -> portcullis_board::sim::Explanation {
    let smmu = &seen.machine.smmus()[channel.smmu.unwrap()];
    smmu.model.explain(Initiator::new(channel.stream), Iova(0x1000), Access::Read)
}

/// Which channels have a driver, or at least a domain: all of them, where the kernel attaches before there are drivers.
fn attached(seen: &Seen<'_>, index: usize, channels: usize) -> bool {
    seen.kernel >= EAGER || (seen.number == BOUND && (index == 0 || index + 1 == channels))
}

fn look_at_v2(seen: &Seen<'_>) {
    if ![BOOTED, BOUND].contains(&seen.number) {
        return;
    }
    let channels = common::channels(seen.machine);
    assert_eq!(channels.len(), 16);
    let mut used = BTreeSet::new();
    for (i, channel) in channels.iter().enumerate() {
        let e = explain(seen, channel);
        let e = e.v2().unwrap();
        // CLIENTPD=0, GFRE, GFIE, USFCFG, VMIDPNE, PTM (smmuv2.md 6.1); MMU-500 fixes GCFGFRE and GCFGFIE at 0.
        assert_eq!(e.cr0, 0x0020_1c06);
        if !attached(seen, i, channels.len()) {
            let portcullis_smmuv2::Outcome::Global { fault, abort, .. } = e.outcome else { panic!("{e:?}") };
            assert_eq!((fault, abort), (GlobalFault::UnidentifiedStream, true));
            assert_eq!(e.group, None);
            continue;
        }
        let (group, smr, s2cr) = e.group.unwrap();
        let bank = e.bank.unwrap();
        let n = u32::from(bank.index);
        assert!(used.insert((group, bank.index)), "two channels share group {group} or bank {n}");
        // VALID and the stream, no mask. TYPE=0: translate.
        assert_eq!((smr, s2cr), (1 << 31 | channel.stream.get(), n), "{}", channel.name);
        // TYPE=1: stage 1 with stage 2 bypass, BPSHCFG=3, MemAttr=0xf, no VMID.
        assert_eq!((bank.cbar, bank.cba2r), (0x0001_f300, 1));
        // CFIE, CFRE, AFE, TRE, M. Linux writes ASIDPNE as well, which MMU-500 does not have.
        assert_eq!(bank.sctlr, 0x67);
        // T0SZ=16, walks outer shareable and not cacheable (the SMMU is not coherent), EPD1.
        assert_eq!(bank.tcr, 0x0080_2010);
        // PASize=5, AS, SEP=7; MMU-500 fixes TBI at ones.
        assert_eq!(bank.tcr2, 0x0003_8015 | 0x60);
        assert_eq!(
            (bank.ttbr0 >> 48, bank.ttbr1),
            (n.into(), u64::from(n) << 48),
            "the ASID is the bank's number"
        );
        let root = bank.ttbr0 & 0xffff_ffff_ffff;
        assert!(root != 0 && root.is_multiple_of(0x1000));
        assert_eq!((bank.mair, bank.fsr & 0x1ff), (MAIR, 0));
    }
    // The writer is in no tree that the kernel has.
    let writer = Initiator::new(StreamId(0x200));
    let e = seen.machine.smmus()[0].model.explain(writer, Iova(0), Access::Write);
    assert_eq!(e.v2().unwrap().group, None);
}

fn look_at_v3(seen: &Seen<'_>) {
    if ![BOOTED, BOUND].contains(&seen.number) {
        return;
    }
    let channels = common::channels(seen.machine);
    assert_eq!(channels.len(), 4);
    let mut asids = BTreeSet::new();
    for (i, channel) in channels.iter().enumerate() {
        let e = explain(seen, channel);
        let e = e.v3().unwrap();
        // SMMUEN, PRIQEN, EVENTQEN, CMDQEN, ATSCHK.
        assert_eq!(e.cr0, 0x1f);
        // Two levels, SPLIT=8, 16 bits of stream id; RA.
        assert_eq!((e.strtab_base_cfg, e.strtab_base >> 62), (0x0001_0210, 1));
        if !attached(seen, i, channels.len()) {
            // Entries come 256 at a time, all of them abort, when the first of them is needed.
            if seen.number == BOOTED {
                assert_eq!(e.l1std.unwrap().1, 0);
                let Outcome::Event { record, .. } = e.outcome else { panic!("{e:?}") };
                assert_eq!(record.code(), Some(EventCode::BadStreamId));
            } else {
                assert_eq!(e.ste.unwrap().1.0, [1, 0, 0, 0, 0, 0, 0, 0]);
                let Outcome::Silent(why) = e.outcome else { panic!("{e:?}") };
                assert_eq!(why, SilentAbort::Stream);
            }
            continue;
        }
        assert_eq!(e.l1std.unwrap().1 & 0x1f, 9, "256 entries");
        let (ste, cd) = (e.ste.unwrap().1, e.cd.unwrap().1);
        let can_stall = u64::from(i + 1 != channels.len());
        // V, Config=101, linear, one CD.
        assert_eq!(ste.0[0] & !0x00ff_ffff_ffff_ffc0, 0xb, "{ste:x?}");
        assert_ne!(ste.s1_context_ptr(), 0);
        // S1DSS=2, S1CIR=S1COR=1, S1CSH=3; S1STALLD where stalls are not allowed; EATS=0, STRW=0.
        assert_eq!(ste.0[1], 0xd6 | (1 - can_stall) << 27, "{ste:x?}");
        assert_eq!(ste.0[2..], [0; 6]);
        // T0SZ=16, write-back inner shareable walks, EPD1, V, 48 bits, AA64, R, A, ASET; S where stalls are allowed.
        let asid = cd.dw0().asid();
        assert_eq!(cd.0[0], u64::from(asid) << 48 | 0xe205_c000_3510 | can_stall << 44, "{cd:x?}");
        assert!(asid != 0 && asids.insert(asid));
        assert!(cd.0[1] != 0 && cd.0[1] == cd.ttb0());
        assert_eq!(cd.0[2..], [0, MAIR, 0, 0, 0, 0]);
    }
}

/// Everything that the driver said about this device up to the first master, in order.
fn probe_lines<'a>(boot: &'a [Record], driver: &str) -> Vec<&'a str> {
    log::of(boot, driver).into_iter().filter(|l| !l.starts_with("\tpreserved")).collect()
}

fn assert_v3_probe(r: &Report, boot: &[Record], messages: bool) {
    let mut lines = probe_lines(boot, "arm-smmu-v3");
    if !messages {
        assert_eq!(lines.pop(), Some("msi_domain absent - falling back to wired irqs"));
    }
    let (since, sizes, features) = *V3_FEATURES.iter().rfind(|(since, ..)| *since <= r.version()).unwrap();
    let (said, bits) = lines[0].split_once(" (features 0x").unwrap();
    let bits = u32::from_str_radix(bits.trim_end_matches(')'), 16).unwrap();
    assert_eq!(said, sizes);
    if since == r.version() {
        assert_eq!(bits, features, "{bits:#x}");
    } else {
        // A kernel that was not there when this was written may know more features, and lacks none.
        assert_eq!(bits & features, features, "{bits:#x}");
    }
    assert_eq!(lines[1..], V3_QUEUES);
}

/// The groups, as number, type and devices.
fn groups<'a>(r: &'a Report, section: &str) -> Vec<(&'a str, &'a str, Vec<&'a str>)> {
    let words = |l: &'a str| {
        let mut words = l.split_whitespace();
        (words.next().unwrap(), words.next().unwrap(), words.collect())
    };
    r.section(section).into_iter().map(words).collect()
}

fn assert_groups(r: &Report, channels: usize, kind: &str) {
    let dma = |section| -> Vec<_> {
        let all = groups(r, section);
        all.into_iter()
            .filter(|(_, _, devices)| devices.iter().any(|d| d.ends_with(".dma-controller")))
            .collect()
    };
    let (boot, bound) = (dma("groups-boot"), dma("groups-bound"));
    let eager = r.version() >= EAGER;
    assert_eq!(boot.len(), if eager { channels } else { 0 });
    assert_eq!(bound.len(), if eager { channels } else { 2 });
    for (number, is, devices) in boot.iter().chain(&bound) {
        assert_eq!((*is, devices.len()), (kind, 1), "group {number}: {devices:?}");
    }
}

/// What is expected of every guest: the policy, a clean log, faults told alike.
fn assert_common(r: &Report, kind: &str, writer: bool) -> Vec<Told> {
    let boot = r.log("boot");
    let policy = if kind == "DMA-FQ" { "lazy" } else { "strict" };
    let line = format!("iommu: DMA domain TLB invalidation policy: {policy} mode");
    assert!(boot.iter().any(|r| r.text.starts_with(&line)), "{boot:#?}");
    r.assert_clean(&["boot", "bound"], |_| false);
    let mut strays = vec!["stray-read", "stray-write", "stray-first", "stray-second"];
    strays.extend(writer.then_some("stray-writer"));
    r.assert_clean(&strays, |record| portcullis_explain::parse_line(&record.text).is_some());
    for stray in &strays {
        let told = faults::by_kernel(&r.log(stray));
        let silent = *stray == "stray-second" && r.version() < EAGER && !writer;
        assert_eq!(told.len(), usize::from(!silent), "{stray}: {told:#?}");
    }
    let all: Vec<Record> = strays.iter().flat_map(|s| r.log(s)).collect();
    faults::assert_same(&all, &r.faults);
    assert_eq!(r.held, 3);
    faults::by_kernel(&all)
}

fn v2(append: &'static str) -> Guest<'static> {
    Guest { board: "zynqmp-thesis", script: JOB, append, look: &look_at_v2, ..Guest::default() }
}

fn check_v2(r: &Report, kind: &str) {
    assert_eq!(probe_lines(&r.log("boot"), "arm-smmu"), V2_LINES);
    assert_groups(r, 16, kind);
    let told = assert_common(r, kind, true);
    // A stream in no tree, on an AXI ID of the writer's that nobody was told of.
    let writer = Told::Global { gfsr: 2, stream: 0x205, access: Access::Write };
    assert_eq!(told.last(), Some(&writer));
    let kinds: Vec<CauseKind> = r.faults.last().unwrap().causes.iter().map(|c| c.kind).collect();
    assert!(kinds.contains(&CauseKind::MissingStreamMapping), "{kinds:?}");
    let contexts = told.iter().filter(|t| matches!(t, Told::Context { .. })).count();
    // The second channel has no domain before there is a driver, where the kernel is not eager.
    assert_eq!(contexts, if r.version() >= EAGER { 4 } else { 3 });
    // One wire for all; every fault that was printed was an interrupt.
    let wire = ["GICv3", "Level", "arm-smmu"];
    assert_eq!(r.interrupts("interrupts-boot").count(&wire), 0);
    assert!(r.interrupts("interrupts-end").count(&wire) >= told.len() as u64);
    assert_eq!(r.outcome.summary.interrupts.messages, 0);
}

fn v3(messages: Messages, append: &'static str) -> Guest<'static> {
    Guest { board: "smmuv3", script: JOB, append, messages, look: &look_at_v3, ..Guest::default() }
}

fn check_v3(r: &Report, kind: &str, messages: bool) {
    assert_v3_probe(r, &r.log("boot"), messages);
    assert_groups(r, 4, kind);
    let told = assert_common(r, kind, false);
    assert!(told.iter().all(|t| faults::code(t) == Some(EventCode::Translation)), "{told:#?}");
    for fault in r.faults.iter().filter(|f| faults::by_us(std::slice::from_ref(f)).len() == 1) {
        let kinds: Vec<CauseKind> = fault.causes.iter().map(|c| c.kind).collect();
        assert!(kinds.contains(&CauseKind::NotMapped), "{kinds:?}");
    }
    let (boot, end) = (r.interrupts("interrupts-boot"), r.interrupts("interrupts-end"));
    let (here, not_here) = if messages { ("ITS", "GICv3") } else { ("GICv3", "ITS") };
    for name in ["arm-smmu-v3-evtq", "arm-smmu-v3-gerror", "arm-smmu-v3-priq"] {
        assert!(boot.has(&[here, "Edge", name]) && !boot.has(&[not_here, name]), "{boot:#?}");
        let count = end.count(&[here, name]);
        // Records that come together are one interrupt.
        let expected = if name.ends_with("evtq") { 1..=told.len() as u64 } else { 0..=0 };
        assert!(expected.contains(&count), "{name}: {count}");
    }
    let sent = r.outcome.summary.interrupts.messages;
    assert_eq!(sent, if messages { end.count(&["ITS", "arm-smmu-v3-evtq"]) } else { 0 });
}

#[test]
fn the_v2_driver_programs_our_smmu_as_its_source_says_and_tells_of_every_fault() {
    v2("").on_every_kernel(Tier::A, "SMMUv2", |r| check_v2(r, "DMA"));
}

#[test]
fn the_v3_driver_programs_our_smmu_as_its_source_says_and_hears_of_every_fault_by_message() {
    v3(Messages::AsBoard, "").on_every_kernel(Tier::A, "SMMUv3, messages", |r| check_v3(r, "DMA", true));
}

#[test]
fn the_v3_driver_hears_of_every_fault_by_wire() {
    v3(Messages::Wired, "").on_every_kernel(Tier::A, "SMMUv3, wires", |r| check_v3(r, "DMA", false));
}

#[test]
fn lazy_invalidation_changes_nothing_of_it() {
    v2("iommu.strict=0").on_kernel(Which::Oldest, Tier::A, "SMMUv2, lazy", |r| check_v2(r, "DMA-FQ"));
    v3(Messages::AsBoard, "iommu.strict=0")
        .on_kernel(Which::Newest, Tier::A, "SMMUv3, lazy", |r| check_v3(r, "DMA-FQ", true));
}
