//! Tier B: Debian's kernel with drivers of its own source built for it. `zynqmp_dma` and `dmatest` on every channel, drivers
//! that go and come again, a user program on vfio whose mapping is torn away, and a driver whose descriptors are not where
//! it says, while the rest goes on.
//!
//! Without the kit there is one clear line and every test passes; with PORTCULLIS_NEED_LINUX_KIT=1 they fail.

mod common;

use std::collections::BTreeSet;

use common::faults;
use common::{Guest, Report, Seen, Which};
use dtoolkit::model::DeviceTreeProperty;
use portcullis_arch::{Access, Iova, StreamId};
use portcullis_board::Tree;
use portcullis_board::sim::Explanation;
use portcullis_bus::Initiator;
use portcullis_cosim::qemu::Tier;
use portcullis_explain::CauseKind;
use portcullis_smmuv2::Outcome as V2;
use portcullis_smmuv3::Outcome as V3;

const JOB: &str = include_str!("../jobs/drivers.sh");
/// The registers of a channel that has a driver are disturbed from outside.
const APPEND: &str = "iomem=relaxed";
/// Where `vfio-zdma` has its buffer and looks for nothing (programs/zdma.h).
const BUFFER: u64 = 0x7000_0000;
const NOT_MAPPED: u64 = 0x7f00_0000;
/// Where the job says that the source descriptors are.
const SOURCE_LIST: u64 = 0x00de_ad00;

/// Copies on every channel and run. Sixteen channels of the one board, four of the other.
const V2_COPIES: &str = "iterations=30\nmeanwhile=20\nrefused=1\n";
const V3_COPIES: &str = "iterations=100\nmeanwhile=100\n";

/// The thesis board with its last channel coherent. Nothing on it is, and vfio refuses a device whose DMA does not snoop
/// (IOMMU_CAP_CACHE_COHERENCY, since 6.2): `vfio-platform: probe failed with error -22`.
fn with_a_coherent_channel(board: Tree) -> Tree {
    let edited = board.edit(|model| {
        let channel =
            model.root.child_mut("axi").and_then(|axi| axi.child_mut("dma-controller@ffaf0000")).unwrap();
        channel.add_property(DeviceTreeProperty::new_unchecked("dma-coherent", Vec::<u8>::new()));
        Ok(())
    });
    edited.unwrap()
}

/// The second channel is bypassed meanwhile, because its group is to have an identity domain.
fn look(seen: &Seen<'_>) {
    let channels = common::channels(seen.machine);
    let model = &seen.machine.smmus()[0].model;
    match model.explain(Initiator::new(channels[1].stream), Iova(0x1234), Access::Write) {
        Explanation::V2(e) => {
            let V2::Bypass { reason, pa, .. } = &e.outcome else { panic!("{e:?}") };
            assert_eq!((*reason, pa.get()), (portcullis_smmuv2::BypassReason::Stream, 0x1234));
            // TYPE=1.
            assert_eq!(e.group.unwrap().2 >> 16 & 3, 1);
        }
        Explanation::V3(e) => {
            let V3::Bypass { pa, .. } = &e.outcome else { panic!("{e:?}") };
            let ste = e.ste.unwrap().1;
            // Config=100 and, with attribute overrides, SHCFG=1: as they come.
            assert_eq!((pa.get(), ste.0[0] & 0xf, ste.0[1] >> 44 & 3), (0x1234, 0x9, 1), "{ste:x?}");
        }
    }
}

/// What must not be: what `vfio-zdma` asks for where nothing is mapped, or not any more, and the driver's descriptors.
const REFUSED: [(u64, Access); 4] = [
    (NOT_MAPPED, Access::Read),
    (NOT_MAPPED, Access::Write),
    (BUFFER, Access::Read),
    (SOURCE_LIST, Access::Read),
];

fn check(r: &Report) {
    let quiet = ["boot", "bound", "copies", "rebound", "vfio-begin", "meanwhile", "after"];
    r.assert_clean(&quiet, |_| false);
    let told = |record: &common::log::Record| portcullis_explain::parse_line(&record.text).is_some();
    r.assert_clean(&["vfio-log"], told);
    r.assert_clean(&["scribble-log"], |record| told(record) || record.text.contains("has errors"));

    let accounts = |f: &faults::Fault| (f.explanation().va().get(), f.explanation().access());
    assert_eq!(r.faults.iter().map(accounts).collect::<Vec<_>>(), REFUSED);
    let streams: BTreeSet<StreamId> = r.faults.iter().map(|f| f.explanation().from().stream).collect();
    assert_eq!(streams.len(), 1, "only the disturbed channel is refused");
    let both: Vec<_> = ["vfio-log", "scribble-log"].iter().flat_map(|s| r.log(s)).collect();
    faults::assert_same(&both, &r.faults);
    for fault in r.faults.iter().filter(|f| faults::by_us(std::slice::from_ref(f)).len() == 1) {
        assert!(fault.causes.iter().any(|c| c.kind == CauseKind::NotMapped), "{:#?}", fault.causes);
    }

    let interrupts = r.interrupts("interrupts");
    let copies = r.marks_number("copies") + r.marks_number("rebound");
    assert!(interrupts.count(&["zynqmp-dma"]) >= copies, "an interrupt for each copy");
    let engines: u64 = r.outcome.summary.engines.iter().map(|e| e.transactions).sum();
    assert!(engines > copies);
    assert_eq!(r.outcome.summary.outside, 0);
    assert_eq!(r.held, 1);
}

fn v2<'a>(cpus: u32, parameters: &'a str, append: &'a str) -> Guest<'a> {
    Guest {
        board: "zynqmp-thesis",
        script: JOB,
        parameters,
        append,
        cpus,
        edit: &with_a_coherent_channel,
        look: &look,
        ..Guest::default()
    }
}

fn v3<'a>(cpus: u32, parameters: &'a str, append: &'a str) -> Guest<'a> {
    Guest { board: "smmuv3", script: JOB, parameters, append, cpus, look: &look, ..Guest::default() }
}

#[test]
fn on_the_thesis_board_thousands_of_copies_are_right_whatever_happens_to_one_channel() {
    let parameters = format!("{V2_COPIES}type=DMA\n");
    v2(1, &parameters, APPEND).on_every_kernel(Tier::B, "SMMUv2, drivers", check);
}

#[test]
fn the_same_with_four_processors() {
    let parameters = format!("{V2_COPIES}type=DMA\n");
    v2(4, &parameters, APPEND).on_every_kernel(Tier::B, "SMMUv2, drivers", check);
}

#[test]
fn behind_an_smmuv3_thousands_of_copies_are_right_whatever_happens_to_one_channel() {
    let parameters = format!("{V3_COPIES}type=DMA\n");
    v3(1, &parameters, APPEND).on_every_kernel(Tier::B, "SMMUv3, drivers", check);
}

#[test]
fn the_same_behind_an_smmuv3_with_four_processors() {
    let parameters = format!("{V3_COPIES}type=DMA\n");
    v3(4, &parameters, APPEND).on_every_kernel(Tier::B, "SMMUv3, drivers", check);
}

#[test]
fn lazy_invalidation_is_as_good() {
    let append = format!("{APPEND} iommu.strict=0");
    let parameters = format!("{V2_COPIES}type=DMA-FQ\n");
    v2(1, &parameters, &append).on_kernel(Which::Newest, Tier::B, "SMMUv2, drivers, lazy", check);
    let parameters = format!("{V3_COPIES}type=DMA-FQ\n");
    v3(1, &parameters, &append).on_kernel(Which::Oldest, Tier::B, "SMMUv3, drivers, lazy", check);
}
