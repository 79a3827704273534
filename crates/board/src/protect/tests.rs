use std::io::Write as _;
use std::process::{Command, Stdio};

use portcullis_arch::StreamId;

use super::*;
use crate::testing::{Dt, cells, have_dtc, string, thesis};

/// A tree as Debian ships them: SMMU off, no labels, some masters without `iommus`.
fn linux_like() -> Dt {
    let mut dt = Dt::new();
    dt.prop("/", "#address-cells", cells([2]));
    dt.prop("/", "#size-cells", cells([2]));
    dt.prop("/", "compatible", string("xlnx,zynqmp"));
    dt.prop("/memory@0", "device_type", string("memory"));
    dt.prop("/memory@0", "reg", cells([0, 0, 0, 0x8000_0000]));
    dt.prop("/axi", "#address-cells", cells([2]));
    dt.prop("/axi", "#size-cells", cells([2]));
    dt.prop("/axi", "ranges", vec![]);
    dt.prop("/axi/iommu@fd800000", "compatible", string("arm,mmu-500"));
    dt.prop("/axi/iommu@fd800000", "reg", cells([0, 0xFD80_0000, 0, 0x2_0000]));
    dt.prop("/axi/iommu@fd800000", "#iommu-cells", cells([1]));
    dt.prop("/axi/iommu@fd800000", "status", string("disabled"));
    dt.prop("/axi/dma-controller@fd500000", "compatible", string("xlnx,zynqmp-dma-1.0"));
    dt.prop("/axi/dma-controller@fd500000", "reg", cells([0, 0xFD50_0000, 0, 0x1000]));
    dt.prop("/axi/dma-controller@fd500000", "xlnx,bus-width", cells([128]));
    dt.prop("/axi/dma-controller@fd500000", "status", string("disabled"));
    dt.prop("/axi/ethernet@ff0e0000", "compatible", string("cdns,zynqmp-gem"));
    dt.prop("/axi/ethernet@ff0e0000", "reg", cells([0, 0xFF0E_0000, 0, 0x1000]));
    dt.prop("/axi/usb@ff9d0000", "status", string("disabled"));
    dt.prop("/axi/usb@ff9d0000", "#address-cells", cells([2]));
    dt.prop("/axi/usb@ff9d0000", "#size-cells", cells([2]));
    dt.prop("/axi/usb@ff9d0000", "ranges", vec![]);
    dt.prop("/axi/usb@ff9d0000/usb@fe200000", "compatible", string("snps,dwc3"));
    dt.prop("/axi/usb@ff9d0000/usb@fe200000", "reg", cells([0, 0xFE20_0000, 0, 0x4_0000]));
    dt
}

pub(crate) fn dtc(source: &str) -> Vec<u8> {
    let mut child = Command::new("dtc")
        .args(["-@", "-q", "-I", "dts", "-O", "dtb", "-o", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "dtc refuses\n{source}");
    output.stdout
}

/// Everything but phandles is equal, and `iommus` means the same.
fn same_machine(a: &Tree, b: &Tree) {
    let a = MachineDescription::from_tree(a).unwrap();
    let b = MachineDescription::from_tree(b).unwrap();
    assert_eq!(a.masters, b.masters);
    assert_eq!(a.dma_channels, b.dma_channels);
    assert_eq!(a.smmus[0].node.available, b.smmus[0].node.available);
}

#[test]
fn a_protected_channel_is_translated_and_the_tree_is_otherwise_unchanged() {
    let tree = linux_like().tree().unwrap();
    let path = "/axi/dma-controller@fd500000";
    let after = apply_protect(&tree, path).unwrap();
    let desc = MachineDescription::from_tree(&after).unwrap();
    let master = desc.master(path).unwrap();
    assert!(master.node.available && desc.smmus[0].node.available);
    assert_eq!(master.agreement, Agreement::Agrees);
    assert_eq!(master.streams.declared[0].id, StreamId(0x14E8));
    for node in tree.nodes().iter().filter(|n| n.path != path && n.path != "/axi/iommu@fd800000") {
        let same = after.find(&node.path).unwrap();
        assert_eq!(same.properties().collect::<Vec<_>>(), node.properties().collect::<Vec<_>>());
    }
}

#[test]
fn the_overlay_compiles_applies_and_does_the_same() {
    if !have_dtc("the_overlay_compiles_applies_and_does_the_same") {
        return;
    }
    let without_phandle = linux_like();
    let mut with_phandle = linux_like();
    with_phandle.prop("/axi/iommu@fd800000", "phandle", cells([0x0E]));
    let mut two_cells = linux_like();
    two_cells.prop("/axi/iommu@fd800000", "#iommu-cells", cells([2]));
    let mut no_cells = linux_like();
    no_cells.remove("/axi/iommu@fd800000", "#iommu-cells");
    for dt in [without_phandle, with_phandle, two_cells, no_cells] {
        let tree = dt.tree().unwrap();
        let desc = MachineDescription::from_tree(&tree).unwrap();
        for node in ["dma-controller@fd500000", "GEM3", "/axi/usb@ff9d0000/usb@fe200000"] {
            let source = protect_overlay(&desc, node).unwrap();
            let merged = tree.apply_overlay(&dtc(&source)).unwrap();
            same_machine(&merged, &apply_protect(&tree, node).unwrap());
            let after = MachineDescription::from_tree(&merged).unwrap();
            let master = find(&after, node).unwrap();
            assert!(master.node.available, "{source}");
            assert_eq!(master.agreement, Agreement::Agrees, "{source}");
        }
    }
}

#[test]
fn the_overlay_says_what_else_the_board_needs() {
    let tree = linux_like().tree().unwrap();
    let desc = MachineDescription::from_tree(&tree).unwrap();
    let source = protect_overlay(&desc, "GEM3").unwrap();
    assert!(source.contains("Stream 0x877: GEM3 (TBU 2,"), "{source}");
    assert!(source.contains("bit 3 of IOU_INTERCONNECT_ROUTE (0xff180408)"), "{source}");
    assert!(source.contains("write 0x8000001f to 0xfd5f0018"), "{source}");
    let source = protect_overlay(&desc, "FPD DMA channel 0").unwrap();
    assert!(
        source.contains("Linux blocks their DMA once the SMMU is on:\n//   /axi/ethernet@ff0e0000 (GEM3)"),
        "{source}"
    );
}

#[test]
fn a_name_that_is_no_master_is_refused_with_names_that_are() {
    let tree = linux_like().tree().unwrap();
    let desc = MachineDescription::from_tree(&tree).unwrap();
    let error = protect_overlay(&desc, "ethernet@ff0b0000").unwrap_err().to_string();
    assert!(
        error.contains("perhaps one of: /axi/dma-controller@fd500000, /axi/ethernet@ff0e0000"),
        "{error}"
    );
    let mut no_smmu = linux_like();
    no_smmu.prop("/axi/iommu@fd800000", "compatible", string("x,y"));
    let desc = MachineDescription::from_tree(&no_smmu.tree().unwrap()).unwrap();
    let error = protect_overlay(&desc, "GEM3").unwrap_err().to_string();
    assert!(error.starts_with("/axi/ethernet@ff0e0000: the tree has no SMMU"), "{error}");
}

#[test]
fn a_writer_on_a_port_behind_the_smmu_cannot_be_protected() {
    let mut dt = Dt::of(&thesis());
    dt.prop("/axi/pl-writer@b0000000", "portcullis,pl-port", string("ace"));
    let desc = MachineDescription::from_tree(&dt.tree().unwrap()).unwrap();
    let error = protect_overlay(&desc, "pl_writer").unwrap_err().to_string();
    assert!(error.contains("does not pass the SMMU"), "{error}");
}

#[test]
fn protecting_twice_changes_nothing_more() {
    let once = apply_protect(&linux_like().tree().unwrap(), "GEM3").unwrap();
    assert_eq!(apply_protect(&once, "GEM3").unwrap(), once);
}

#[test]
fn ids_next_to_the_right_ones_are_kept_and_wrong_ones_are_not() {
    let mut dt = linux_like();
    dt.prop("/axi/iommu@fd800000", "phandle", cells([0x0E]));
    dt.prop("/axi/ahci@fd0c0000", "reg", cells([0, 0xFD0C_0000, 0, 0x2000]));
    dt.prop("/axi/ahci@fd0c0000", "iommus", cells([0x0E, 0x4C0, 0x0E, 0x4C1, 0x0E, 0x4C2]));
    dt.prop("/axi/ethernet@ff0e0000", "iommus", cells([0x0E, 0x77]));
    let desc = MachineDescription::from_tree(&dt.tree().unwrap()).unwrap();
    let source = protect_overlay(&desc, "SATA").unwrap();
    assert!(source.contains("iommus = <0xe 0x4c0>, <0xe 0x4c1>, <0xe 0x4c2>;"), "{source}");
    let source = protect_overlay(&desc, "GEM3").unwrap();
    assert!(source.contains("iommus = <0xe 0x877>;"), "{source}");
}
