use portcullis_arch::Pa;

use super::*;
use crate::testing::{Dt, board_file, cells, have_dtc, string, thesis};
use crate::tree::{Level, Tree, TreeError};

const SMMU: &str = "/axi/smmu@fd800000";
const WRITER: &str = "/axi/pl-writer@b0000000";
const FPD0: &str = "/axi/dma-controller@fd500000";
const LPD0: &str = "/axi/dma-controller@ffa80000";

fn describe(dt: &Dt) -> Result<MachineDescription, TreeError> {
    MachineDescription::from_tree(&dt.tree()?)
}

fn error(dt: &Dt) -> String {
    describe(dt).unwrap_err().to_string()
}

/// The messages about one node.
fn about<'d>(desc: &'d MachineDescription, path: &str) -> Vec<(Level, &'d str)> {
    desc.findings.iter().filter(|f| f.node == path).map(|f| (f.level, f.message.as_str())).collect()
}

fn smmu_phandle(dt: &Dt) -> u32 {
    dt.tree().unwrap().find(SMMU).unwrap().phandle.unwrap()
}

#[test]
fn the_thesis_source_and_its_blob_agree() {
    if !have_dtc("the_thesis_source_and_its_blob_agree") {
        return;
    }
    let source = Tree::load(board_file("zynqmp-thesis.dts")).unwrap();
    assert!(source == thesis(), "compile boards/zynqmp-thesis.dts again, see boards/README.md");
}

#[test]
fn the_thesis_board_is_what_it_should_be() {
    let desc = MachineDescription::from_tree(&thesis()).unwrap();
    assert_eq!(desc.chip, Some(Chip::ZynqMp));
    let [low, high] = desc.memory.as_slice() else { panic!("{:?}", desc.memory) };
    assert_eq!((low.region.base, low.region.size), (Pa(0), 0x8000_0000));
    assert_eq!((high.region.base, high.region.size), (Pa(0x8_0000_0000), 0x8000_0000));
    let [reserved] = desc.reserved.as_slice() else { panic!("{:?}", desc.reserved) };
    assert_eq!(reserved.region.unwrap().base, Pa(0x6000_0000));
    assert!(reserved.no_map);
    let [smmu] = desc.smmus.as_slice() else { panic!("{:?}", desc.smmus) };
    assert_eq!((smmu.kind, smmu.region.base, smmu.region.size), (Kind::Mmu500, Pa(0xFD80_0000), 0x2_0000));
    assert_eq!((smmu.interrupts.len(), smmu.global_interrupts), (17, 1));
    assert!(smmu.node.available && !smmu.dma_coherent);
    assert_eq!(desc.dma_channels.len(), 16);
    for (channel, chip) in desc.dma_channels.iter().zip(&zynqmp::ZDMA_CHANNELS) {
        assert_eq!(channel.chip, Some(chip));
        assert_eq!(channel.bus_width, chip.unit.bus_width());
        assert_eq!(channel.interrupt.as_ref().unwrap().spi(), Some(chip.spi));
        assert_eq!(channel.streams.first(), Some(chip.stream));
        assert_eq!(channel.streams.declared[0].id, chip.stream);
        assert!(!channel.dma_coherent);
    }
    let [writer] = desc.pl_writers.as_slice() else { panic!("{:?}", desc.pl_writers) };
    assert_eq!((writer.port, writer.axi_id, writer.ax_prot), (PlPort::Hpc0, 0, 0b010));
    assert_eq!(writer.streams.actual, [StreamId(0x200)]);
    assert_eq!(desc.masters.len(), 17);
    assert!(desc.masters.iter().all(|m| m.agreement == Agreement::Agrees));
}

#[test]
fn registers_of_devices_in_use_must_not_overlap() {
    let mut dt = Dt::of(&thesis());
    dt.prop(FPD0, "reg", cells([0, 0xFD80_1000, 0, 0x1000]));
    let expected = "/axi/dma-controller@fd500000: property `reg`: 0xfd801000..0xfd801fff overlaps the registers \
                    0xfd800000..0xfd81ffff of /axi/smmu@fd800000";
    assert_eq!(error(&dt), expected);
    dt.prop(FPD0, "status", string("disabled"));
    assert!(describe(&dt).is_ok());
}

#[test]
fn registers_must_not_lie_in_memory_and_memory_must_not_overlap() {
    let mut dt = Dt::of(&thesis());
    dt.prop(FPD0, "reg", cells([0, 0x7FFF_F000, 0, 0x1000]));
    assert!(
        error(&dt).contains("`reg`: 0x7ffff000..0x7fffffff overlaps the memory 0x0..0x7fffffff of /memory@0")
    );
    let mut dt = Dt::of(&thesis());
    dt.prop("/memory@40000000", "device_type", string("memory"));
    dt.prop("/memory@40000000", "reg", cells([0, 0x4000_0000, 0, 0x1000]));
    assert!(
        error(&dt).starts_with("/memory@40000000: property `reg`: memory 0x40000000..0x40000fff overlaps")
    );
}

#[test]
fn what_a_modelled_device_needs_is_asked_for_by_name() {
    for (path, property, expected) in [
        (FPD0, "reg", "it has no `reg`"),
        (FPD0, "xlnx,bus-width", "it has no `xlnx,bus-width`"),
        (WRITER, "portcullis,pl-port", "it has no `portcullis,pl-port`; give one of hpc0, hpc1, hp0"),
    ] {
        let mut dt = Dt::of(&thesis());
        dt.remove(path, property);
        assert!(error(&dt).starts_with(&format!("{path}: {expected}")), "{}", error(&dt));
    }
    for (path, property, value, expected) in [
        (FPD0, "xlnx,bus-width", cells([32]), "32 instead of 64 or 128"),
        (WRITER, "portcullis,pl-port", string("hp9"), "`hp9` is no port"),
        (WRITER, "portcullis,axi-id", cells([64]), "64 has more than 6 bits"),
        (WRITER, "portcullis,ax-prot", cells([8]), "8 has more than 3 bits"),
    ] {
        let mut dt = Dt::of(&thesis());
        dt.prop(path, property, value);
        assert!(
            error(&dt).starts_with(&format!("{path}: property `{property}`: {expected}")),
            "{}",
            error(&dt)
        );
    }
}

#[test]
fn the_writers_stream_follows_its_port_and_axi_id() {
    for (port, axi_id, stream) in [("hpc1", 0, Some(0x240)), ("hp0", 5, Some(0xE85)), ("acp", 0, None)] {
        let mut dt = Dt::of(&thesis());
        dt.prop(WRITER, "portcullis,pl-port", string(port));
        dt.prop(WRITER, "portcullis,axi-id", cells([axi_id]));
        let desc = describe(&dt).unwrap();
        assert_eq!(desc.pl_writers[0].streams.actual.first().map(|s| s.get()), stream, "{port}");
        let agreement = if stream.is_some() { Agreement::Differs } else { Agreement::NotBehind };
        assert_eq!(desc.master(WRITER).unwrap().agreement, agreement);
        assert!(!about(&desc, WRITER).is_empty());
    }
}

#[test]
fn a_mask_over_the_port_covers_every_axi_id() {
    let mut dt = Dt::of(&thesis());
    let smmu = smmu_phandle(&dt);
    for n in 0..8 {
        for base in [0xFD50_0000u32, 0xFFA8_0000] {
            dt.remove(&format!("/axi/dma-controller@{:x}", base + n * 0x1_0000), "iommus");
        }
    }
    dt.prop(SMMU, "#iommu-cells", cells([2]));
    dt.prop(WRITER, "iommus", cells([smmu, 0x200, 0x3F]));
    dt.prop(WRITER, "portcullis,axi-id", cells([9]));
    assert_eq!(describe(&dt).unwrap().master(WRITER).unwrap().agreement, Agreement::Agrees);
}

#[test]
fn shared_and_conflicting_streams_are_told_apart() {
    let mut dt = Dt::of(&thesis());
    let smmu = smmu_phandle(&dt);
    dt.prop("/axi/dma-controller@fd510000", "iommus", cells([smmu, 0x14E8, smmu, 0x14E9]));
    let desc = describe(&dt).unwrap();
    let found = about(&desc, "/axi/dma-controller@fd510000");
    assert!(found.iter().any(|(_, m)| m.contains("both land in one group")), "{found:?}");

    let mut dt = Dt::new();
    dt.prop("/", "compatible", string("xlnx,zynqmp"));
    dt.prop("/s", "compatible", string("arm,mmu-500"));
    dt.prop("/s", "reg", cells([0, 0xFD80_0000, 0x2_0000]));
    dt.prop("/s", "#iommu-cells", cells([2]));
    dt.prop("/s", "phandle", cells([1]));
    dt.prop("/a", "iommus", cells([1, 0x200, 0x3]));
    dt.prop("/b", "iommus", cells([1, 0x200, 0xC]));
    let desc = describe(&dt).unwrap();
    assert!(
        about(&desc, "/b").iter().any(|(_, m)| m.contains("stream match conflict")),
        "{:?}",
        desc.findings
    );
}

#[test]
fn disagreement_with_the_chip_is_found() {
    let mut dt = Dt::of(&thesis());
    dt.prop(FPD0, "xlnx,bus-width", cells([64]));
    dt.prop(FPD0, "interrupts", cells([0, 99, 4]));
    dt.prop(FPD0, "dma-coherent", vec![]);
    dt.prop(LPD0, "dma-coherent", vec![]);
    dt.prop(SMMU, "interrupts", cells([0, 155, 4, 0, 155, 4]));
    dt.remove("/axi/dma-controller@fd510000", "iommus");
    let desc = describe(&dt).unwrap();
    let fpd = about(&desc, FPD0);
    for expected in ["128 bits wide", "is SPI 124", "no path through the CCI"] {
        assert!(fpd.iter().any(|(_, m)| m.contains(expected)), "{expected}: {fpd:?}");
    }
    assert!(about(&desc, LPD0).is_empty());
    assert!(about(&desc, SMMU)[0].1.starts_with("2 interrupts with #global-interrupts = 1"));
    assert!(about(&desc, "/axi/dma-controller@fd510000")[0].1.contains("its DMA fails"));
}

#[test]
fn legacy_masters_have_streams_too() {
    let mut dt = Dt::of(&thesis());
    let smmu = smmu_phandle(&dt);
    let channels = dt.tree().unwrap();
    for node in channels.nodes().iter().filter(|n| !n.iommus.is_empty()) {
        dt.remove(&node.path, "iommus");
    }
    dt.prop(FPD0, "phandle", cells([smmu + 100]));
    dt.prop(FPD0, "#stream-id-cells", cells([1]));
    dt.prop(SMMU, "mmu-masters", cells([smmu + 100, 0x14E8]));
    let desc = describe(&dt).unwrap();
    assert!(desc.smmus[0].legacy);
    assert_eq!(desc.master(FPD0).unwrap().agreement, Agreement::Agrees);
    assert_eq!(desc.dma_channels[0].streams.declared[0].id, StreamId(0x14E8));

    dt.prop(FPD0, "iommus", cells([smmu, 0x14E8]));
    assert!(error(&dt).contains("has `iommus` too, only one binding can be meant"));
}

#[test]
fn what_is_not_modelled_is_listed() {
    let mut dt = Dt::of(&thesis());
    dt.prop("/axi/serial@ff000000", "compatible", string("cdns,uart-r1p12"));
    dt.prop("/axi/serial@ff000000", "reg", vec![1, 2, 3]);
    let desc = describe(&dt).unwrap();
    let listed: Vec<_> = desc.not_modelled.iter().map(|n| n.compatible.as_str()).collect();
    assert_eq!(listed, ["simple-bus", "arm,gic-400", "cdns,uart-r1p12"]);
    assert_eq!(about(&desc, "/axi/serial@ff000000").len(), 1);
}

#[test]
fn a_device_that_was_moved_keeps_its_name_and_its_place_on_the_chip() {
    let mut dt = Dt::of(&thesis());
    dt.prop("/", "compatible", string("linux,dummy-virt"));
    dt.prop(FPD0, "reg", cells([0, 0xC000_0000, 0, 0x1000]));
    dt.prop(FPD0, "interrupts", cells([0, 40, 4]));
    let moved = |dt: &Dt| describe(dt).unwrap().dma_channels[0].clone();
    assert_eq!((moved(&dt).chip, moved(&dt).streams.actual.len()), (None, 0));
    dt.prop(FPD0, "portcullis,chip-address", cells([0, 0xFD50_0000]));
    dt.prop(FPD0, "portcullis,name", string("dma@here"));
    let channel = moved(&dt);
    assert_eq!((channel.chip, &*channel.node.name), (Some(&zynqmp::ZDMA_CHANNELS[0]), "dma@here"));
    assert_eq!(channel.streams.actual, [StreamId(0x14E8)]);
    let desc = describe(&dt).unwrap();
    assert_eq!(desc.master(FPD0).unwrap().title, "FPD DMA channel 0");
    assert_eq!(about(&desc, FPD0), []);
    dt.prop(FPD0, "portcullis,chip-address", cells([0]));
    assert!(
        error(&dt).ends_with("property `portcullis,chip-address`: 1 cells instead of 2"),
        "{}",
        error(&dt)
    );
}
