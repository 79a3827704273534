use portcullis_arch::{Pa, StreamId};

use super::*;
use crate::testing::{Dt, board_file, cells, have_dtc, string, thesis};
use crate::tree::{Level, Tree, TreeError};

const SMMU: &str = "/soc/iommu@31000000";
const PCIE: &str = "/pcie@50000000";
const FIRST: &str = "/pcie@50000000/testdev@1,0";
const SECOND: &str = "/pcie@50000000/testdev@2,0";
const DMA0: &str = "/soc/dma-controller@30000000";
const DMA1: &str = "/soc/dma-controller@30010000";

fn board() -> Dt {
    Dt::of(&Tree::load(board_file("smmuv3.dtb")).unwrap())
}

fn describe(dt: &Dt) -> Result<MachineDescription, TreeError> {
    MachineDescription::from_tree(&dt.tree()?)
}

fn error(dt: &Dt) -> String {
    describe(dt).unwrap_err().to_string()
}

fn about(desc: &MachineDescription, path: &str) -> Vec<(Level, String)> {
    desc.findings.iter().filter(|f| f.node == path).map(|f| (f.level, f.message.clone())).collect()
}

fn says(dt: &Dt, path: &str, expected: &str) {
    let desc = describe(dt).unwrap();
    let found = about(&desc, path);
    assert!(found.iter().any(|(_, m)| m.contains(expected)), "{expected}: {found:?}");
}

fn phandle(dt: &Dt, path: &str) -> u32 {
    dt.tree().unwrap().find(path).unwrap().phandle.unwrap()
}

#[test]
fn sources_and_blobs_agree() {
    if !have_dtc("sources_and_blobs_agree") {
        return;
    }
    for name in ["smmuv3", "smmuv3-noncoherent"] {
        let source = Tree::load(board_file(&format!("{name}.dts"))).unwrap();
        let blob = Tree::load(board_file(&format!("{name}.dtb"))).unwrap();
        assert!(source == blob, "compile boards/{name}.dts again, see boards/README.md");
    }
}

#[test]
fn the_board_is_what_it_should_be() {
    let desc = describe(&board()).unwrap();
    assert_eq!(desc.findings, []);
    let [smmu] = desc.smmus.as_slice() else { panic!("{:?}", desc.smmus) };
    assert_eq!((smmu.kind, smmu.region.base, smmu.dma_coherent), (Kind::SmmuV3, Pa(0x3100_0000), true));
    let v3 = smmu.v3.as_ref().unwrap();
    let spi = |i: &Option<Interrupt>| i.as_ref().and_then(Interrupt::spi);
    assert_eq!(
        [spi(&v3.eventq), spi(&v3.priq), spi(&v3.cmdq_sync), spi(&v3.gerror)],
        [64, 65, 66, 67].map(Some)
    );
    assert_eq!((v3.preset, v3.msi), (SmmuV3Preset::Full, Some(MsiTarget { its: 0, device: 0x1_0000 })));
    assert_eq!(desc.its[0].doorbell(), Pa(0x2f03_0040));
    let streams: Vec<_> = desc.dma_channels.iter().filter_map(|c| c.streams.first()).collect();
    assert_eq!(streams, [0x10, 0x11, 0x12, 0x13].map(StreamId));
    let stalls: Vec<_> = desc.masters.iter().map(|m| m.can_stall).collect();
    assert_eq!(stalls, [true, true, true, false, false, false]);
    let [first, second] = desc.test_devices.as_slice() else { panic!("{:?}", desc.test_devices) };
    assert_eq!((first.rid.to_string(), second.rid.to_string()), ("00:01.0".into(), "00:02.0".into()));
    assert_eq!(first.streams.first(), Some(StreamId(0x408)));
    assert_eq!(second.streams.first(), Some(StreamId(0x410)));
    assert_eq!((first.region.base, second.region.base), (Pa(0x4000_0000), Pa(0x4001_0000)));
    assert!(first.ats && first.pri && first.dma_coherent && first.pasid_bits == 16);
    assert_eq!(second.msi, Some(MsiTarget { its: 0, device: 0x10 }));
    assert_eq!(desc.declared_streams(0).count(), 6);
    let text = crate::report(&desc).to_string();
    assert!(text.contains("16 bits of stream ids; interrupts: eventq SPI 64 priq SPI 65"), "{text}");
    assert!(
        text.contains("0x100 requester ids from 0x0 are streams from 0x400 of /soc/iommu@31000000"),
        "{text}"
    );
}

#[test]
fn nothing_is_coherent_on_the_board_that_says_so() {
    let tree = Tree::load(board_file("smmuv3-noncoherent.dtb")).unwrap();
    let desc = MachineDescription::from_tree(&tree).unwrap();
    assert!(!desc.smmus[0].dma_coherent && desc.masters.iter().all(|m| !m.dma_coherent));
    assert_eq!(desc.masters.len(), 6);
    assert_eq!(desc.findings, []);
}

#[test]
fn an_smmuv3_has_two_pages_one_cell_and_named_interrupts() {
    for (property, value, expected) in [
        ("reg", cells([0, 0x3100_0000, 0, 0x1_0000]), "0x10000 bytes, its two register pages need 0x20000"),
        ("#iommu-cells", cells([2]), "2, an SMMUv3 takes 1"),
        ("portcullis,smmu-v3", string("mmu-900"), "`mmu-900` is no model"),
        ("interrupts", cells([0, 64, 1]), "4 names for 1 interrupts"),
        ("interrupt-names", b"eventq\0eventq\0".to_vec(), "`eventq` twice"),
        ("msi-parent", cells([0x77]), "no node has the phandle 0x77"),
    ] {
        let mut dt = board();
        dt.prop(SMMU, property, value);
        let error = error(&dt);
        assert!(error.starts_with(SMMU) && error.contains(expected), "{property}: {error}");
    }
    let mut dt = board();
    dt.remove(SMMU, "#iommu-cells");
    assert!(error(&dt).contains("has no `#iommu-cells`"), "{}", error(&dt));
    let mut dt = board();
    dt.prop(SMMU, "interrupt-names", b"eventq\0priq\0cmdq-sync\0nonsense\0".to_vec());
    says(&dt, SMMU, "interrupts without one of the names");
    dt.prop(SMMU, "interrupts", cells([0, 64, 4, 0, 65, 1, 0, 66, 1, 0, 67, 1]));
    says(&dt, SMMU, "a level triggered interrupt of it is lost");
    dt.remove(SMMU, "msi-parent");
    says(&dt, SMMU, "no `gerror` and no `msi-parent`");
    dt.prop(SMMU, "interrupt-names", b"eventq\0combined\0".to_vec());
    says(&dt, SMMU, "`combined` with others");
}

#[test]
fn quirks_are_named() {
    let mut dt = board();
    dt.prop(SMMU, "cavium,cn9900-broken-page1-regspace", vec![]);
    dt.prop(SMMU, "reg", cells([0, 0x3100_0000, 0, 0x1_0000]));
    says(&dt, SMMU, "a machine with it is not built");
    let mut dt = board();
    dt.prop(SMMU, "hisilicon,broken-prefetch-cmd", vec![]);
    says(&dt, SMMU, "the model's prefetches work");
}

#[test]
fn streams_that_the_smmu_does_not_have_are_refused() {
    let mut dt = board();
    let smmu = phandle(&dt, SMMU);
    dt.prop(DMA0, "iommus", cells([smmu, 0x1_0000]));
    assert_eq!(
        error(&dt),
        format!(
            "{DMA0}: property `iommus`: stream 0x10000 is out of range: {SMMU} has 16 bits of stream ids"
        )
    );
    let mut dt = board();
    dt.prop(PCIE, "iommu-map", cells([0, smmu, 0xff80, 0x100]));
    assert!(error(&dt).contains("`iommu-map`: stream 0x1007f is out of range"), "{}", error(&dt));
    // The small one has 8 bits, and with it off nobody cares.
    let mut dt = board();
    dt.prop(SMMU, "portcullis,smmu-v3", string("small"));
    assert!(error(&dt).contains("has 8 bits of stream ids"), "{}", error(&dt));
    dt.prop(SMMU, "status", string("disabled"));
    assert!(describe(&dt).is_ok());
}

#[test]
fn maps_are_checked_entry_by_entry() {
    let dt = board();
    let (smmu, dma) = (phandle(&dt, SMMU), 0x99);
    for (map, expected) in [
        (vec![0, smmu, 0x400], "3 cells, not a multiple of 4"),
        (vec![], "0 cells, not a multiple of 4"),
        (vec![0, 0x55, 0x400, 1], "entry 0: no node has the phandle 0x55"),
        (vec![0, dma, 0x400, 1], "has no `#iommu-cells`"),
        (vec![0, smmu, 0x400, 0], "entry 0: it covers no requester id"),
        (
            vec![0, smmu, 0x400, 1, 0xff00, smmu, 0x500, 0x101],
            "entry 1: 0x101 requester ids from 0xff00 pass",
        ),
        (vec![0, smmu, u32::MAX, 2], "0x2 ids from 0xffffffff pass 32 bits"),
    ] {
        let mut dt = dt.clone();
        dt.prop(DMA0, "phandle", cells([dma]));
        dt.prop(PCIE, "iommu-map", map.iter().flat_map(|c| c.to_be_bytes()).collect());
        let error = error(&dt);
        assert!(error.starts_with(PCIE) && error.contains(expected), "{expected}: {error}");
    }
    let mut dt = board();
    dt.prop(PCIE, "iommu-map-mask", cells([0xff]));
    dt.prop(PCIE, "iommu-map", cells([0x100, smmu, 0x400, 0x100]));
    assert!(
        error(&dt).contains("iommu-map-mask 0xff ignores bits of the requester id 0x100"),
        "{}",
        error(&dt)
    );
}

#[test]
fn masks_gaps_and_overlaps() {
    let mut dt = board();
    let smmu = phandle(&dt, SMMU);
    // Device numbers only: functions of all buses look alike.
    dt.prop(PCIE, "iommu-map-mask", cells([0xf8]));
    dt.prop(FIRST, "reg", cells([0x3_0900, 0, 0, 0, 0]));
    let desc = describe(&dt).unwrap();
    assert_eq!(desc.test_devices[0].rid.to_string(), "03:01.1");
    assert_eq!(desc.test_devices[0].streams.first(), Some(StreamId(0x408)));

    let mut dt = board();
    dt.prop(PCIE, "iommu-map", cells([0, smmu, 0x400, 0x10]));
    says(&dt, SECOND, "its requester id 00:02.0 is in a gap");
    assert_eq!(describe(&dt).unwrap().test_devices[1].streams.first(), None);

    let mut dt = board();
    dt.prop(PCIE, "iommu-map", cells([0, smmu, 0x400, 0x10, 0x8, smmu, 0x800, 0x100]));
    says(&dt, PCIE, "entries 0 and 1 cover the same requester ids: entry 0 counts");
    let desc = describe(&dt).unwrap();
    let streams: Vec<_> = desc.test_devices.iter().filter_map(|d| d.streams.first()).collect();
    assert_eq!(streams, [0x408, 0x808].map(StreamId));

    let mut dt = board();
    dt.prop(PCIE, "iommu-map", cells([0, smmu, 0x400, 0x10, 0x10, smmu, 0x400, 0x10]));
    says(&dt, PCIE, "entries 0 and 1 make one stream of different requester ids");

    let mut dt = board();
    dt.remove(PCIE, "iommu-map");
    says(&dt, PCIE, "missing: no device of the bridge is behind an SMMU");
}

#[test]
fn two_masters_with_one_stream_share_a_group() {
    let mut dt = board();
    let smmu = phandle(&dt, SMMU);
    dt.prop(DMA1, "iommus", cells([smmu, 0x10]));
    says(&dt, DMA1, "shares stream 0x10 (mask 0x0) with /soc/dma-controller@30000000");
    dt.prop(DMA1, "iommus", cells([smmu, 0x408]));
    says(&dt, FIRST, "both land in one group and one domain");
}

#[test]
fn functions_need_a_configuration_address_and_bar_0() {
    for (property, value, expected) in [
        ("reg", cells([0x0800, 0, 0, 0]), "4 cells, below a PCIe bridge it is 3 of address and 2 of size"),
        ("reg", cells([0x0200_0810, 0, 0, 0, 0]), "is not a configuration address"),
        ("assigned-addresses", cells([0xc300_0810, 0, 0x4000_0000]), "3 cells, not a multiple of 5"),
        (
            "assigned-addresses",
            cells([0xc300_0810, 0, 0x3fff_0000, 0, 0x1_0000]),
            "no `assigned-addresses` with BAR 0",
        ),
        ("assigned-addresses", cells([0xc300_0810, 0, 0x4000_0000, 0, 0x100]), "BAR 0 has 0x100 bytes"),
        ("assigned-addresses", cells([0xc300_0810, 0, 0x4001_0000, 0, 0x1_0000]), "overlaps the registers"),
        (
            "assigned-addresses",
            cells([0xc300_0810, !0, !0, 0, 0x1_0000]),
            "pass the end of the address space",
        ),
        ("pasid-num-bits", cells([21]), "substream ids have at most 20 bits"),
    ] {
        let mut dt = board();
        dt.prop(FIRST, property, value);
        let error = error(&dt);
        assert!(error.contains("testdev@") && error.contains(expected), "{property}: {error}");
    }
    let mut dt = board();
    dt.prop("/soc/stray", "compatible", string("portcullis,pcie-testdev"));
    assert!(error(&dt).contains("not below a PCIe host bridge"), "{}", error(&dt));
}

#[test]
fn functions_that_are_not_modelled_are_masters_and_bridges_are_not() {
    let mut dt = board();
    dt.prop("/pcie@50000000/pci@3,0", "reg", cells([0x1800, 0, 0, 0, 0]));
    dt.prop("/pcie@50000000/pci@3,0", "device_type", string("pci"));
    dt.prop("/pcie@50000000/pci@3,0/net@0,0", "reg", cells([0x1_0000, 0, 0, 0, 0]));
    dt.prop("/pcie@50000000/pci@3,0/net@0,0", "compatible", string("pci8086,10d3"));
    dt.prop(PCIE, "iommu-map", cells([0, phandle(&dt, SMMU), 0x400, 0x200]));
    let desc = describe(&dt).unwrap();
    assert!(desc.master("/pcie@50000000/pci@3,0").is_none());
    let net = desc.master("/pcie@50000000/pci@3,0/net@0,0").unwrap();
    assert_eq!((net.rid, net.streams.first()), (Some(crate::tree::Rid(0x100)), Some(StreamId(0x500))));
    assert!(
        crate::protect_overlay(&desc, &net.node.path)
            .unwrap_err()
            .to_string()
            .contains("a PCI function (01:00.0)")
    );
}

#[test]
fn properties_without_effect_are_noted() {
    let mut dt = Dt::of(&thesis());
    dt.prop("/axi/dma-controller@fd500000", "dma-can-stall", vec![]);
    dt.prop("/axi/dma-controller@fd500000", "pasid-num-bits", cells([4]));
    let desc = describe(&dt).unwrap();
    let found = about(&desc, "/axi/dma-controller@fd500000");
    assert_eq!(
        found.iter().filter(|(l, m)| *l == Level::Note && m.contains("no SMMUv3")).count(),
        2,
        "{found:?}"
    );
    let mut dt = board();
    dt.prop(FIRST, "dma-can-stall", vec![]);
    dt.remove(FIRST, "portcullis,ats");
    says(&dt, FIRST, "transactions of PCI must not be stalled");
    says(&dt, FIRST, "page requests need `portcullis,ats`");
}
