use portcullis_arch::{Pa, StreamId};

use super::*;
use crate::testing::{Dt, cells, string};

fn base() -> Dt {
    let mut dt = Dt::new();
    dt.prop("/", "#address-cells", cells([2]));
    dt.prop("/", "#size-cells", cells([2]));
    dt.prop("/", "interrupt-parent", cells([1]));
    dt.prop("/gic@f9010000", "compatible", string("arm,gic-400"));
    dt.prop("/gic@f9010000", "#interrupt-cells", cells([3]));
    dt.prop("/gic@f9010000", "phandle", cells([1]));
    dt.prop("/axi", "#address-cells", cells([2]));
    dt.prop("/axi", "#size-cells", cells([2]));
    dt.prop("/axi", "ranges", vec![]);
    dt.prop("/axi/smmu@fd800000", "compatible", string("arm,mmu-500"));
    dt.prop("/axi/smmu@fd800000", "reg", cells([0, 0xFD80_0000, 0, 0x2_0000]));
    dt.prop("/axi/smmu@fd800000", "#iommu-cells", cells([1]));
    dt.prop("/axi/smmu@fd800000", "phandle", cells([2]));
    dt.prop("/axi/dma@fd500000", "compatible", string("xlnx,zynqmp-dma-1.0"));
    dt.prop("/axi/dma@fd500000", "reg", cells([0, 0xFD50_0000, 0, 0x1000]));
    dt.prop("/axi/dma@fd500000", "interrupts", cells([0, 124, 4]));
    dt.prop("/axi/dma@fd500000", "iommus", cells([2, 0x14E8]));
    dt
}

const DMA: &str = "/axi/dma@fd500000";
const SMMU: &str = "/axi/smmu@fd800000";

fn error(dt: &Dt) -> String {
    dt.tree().unwrap_err().to_string()
}

#[test]
fn a_small_tree_is_decoded() {
    let tree = base().tree().unwrap();
    let dma = tree.find(DMA).unwrap();
    assert_eq!(dma.reg, [Region { base: Pa(0xFD50_0000), size: 0x1000 }]);
    assert_eq!(dma.interrupts, [Interrupt::Spi { number: 124, trigger: Trigger::LevelHigh }]);
    assert_eq!(dma.iommus.len(), 1);
    assert_eq!(dma.iommus[0].stream, StreamId(0x14E8));
    assert_eq!(tree.node(dma.iommus[0].iommu).unwrap().path, SMMU);
    assert!(dma.available && !dma.dma_coherent);
    assert!(tree.findings().is_empty());
}

#[test]
fn reg_is_translated_through_every_ranges_above_it() {
    let mut dt = base();
    dt.prop("/axi", "ranges", cells([0, 0x1000_0000, 0x8, 0, 0, 0x2000_0000]));
    dt.prop("/axi/bus", "#address-cells", cells([1]));
    dt.prop("/axi/bus", "#size-cells", cells([1]));
    dt.prop("/axi/bus", "ranges", cells([0x100, 0, 0x1000_0000, 0x1000]));
    dt.prop("/axi/bus/dev@180", "reg", cells([0x180, 0x10]));
    dt.prop("/axi/bus/far@8000", "reg", cells([0x8000, 0x10]));
    for path in [SMMU, DMA] {
        dt.prop(path, "reg", cells([0, 0x1010_0000, 0, 0x1000]));
    }
    let tree = dt.tree().unwrap();
    assert_eq!(tree.find("/axi/bus/dev@180").unwrap().reg, [Region { base: Pa(0x8_0000_0080), size: 0x10 }]);
    assert!(tree.find("/axi/bus/far@8000").unwrap().reg.is_empty());
    assert_eq!(tree.find(DMA).unwrap().reg[0].base, Pa(0x8_0010_0000));
}

#[test]
fn a_modelled_device_that_the_cpu_cannot_reach_is_an_error() {
    let mut dt = base();
    dt.remove("/axi", "ranges");
    assert!(
        error(&dt).starts_with("/axi/smmu@fd800000: property `reg`: the CPU cannot reach"),
        "{}",
        error(&dt)
    );
}

#[test]
fn malformed_reg_of_a_modelled_node_is_an_error_and_of_another_a_finding() {
    let mut dt = base();
    dt.prop("/axi/uart@ff000000", "compatible", string("cdns,uart-r1p12"));
    dt.prop("/axi/uart@ff000000", "reg", cells([0, 0xFF00_0000, 0]));
    let tree = dt.tree().unwrap();
    let finding = tree.findings()[0].to_string();
    assert!(
        finding.starts_with("warning: /axi/uart@ff000000: reg: 3 cells, not a multiple of the 4"),
        "{finding}"
    );

    dt.prop(DMA, "reg", cells([0, 0xFD50_0000, 0]));
    assert!(error(&dt).starts_with("/axi/dma@fd500000: property `reg`: 3 cells"), "{}", error(&dt));
    dt.prop(DMA, "reg", vec![1, 2, 3]);
    assert!(error(&dt).contains("3 bytes, not a whole number of 4-byte cells"), "{}", error(&dt));
    dt.prop(DMA, "reg", cells([u32::MAX, u32::MAX, 0, 0x1000]));
    assert!(error(&dt).contains("pass the end of the address space"), "{}", error(&dt));
}

#[test]
fn trouble_in_iommus_names_the_entry() {
    for (value, iommu_cells, expected) in [
        (cells([9, 0x200]), 1, "entry 0: no node has the phandle 0x9"),
        (cells([2, 0x200, 2]), 1, "entry 1: cut short, /axi/smmu@fd800000 wants 1 cells"),
        (
            cells([2, 0x8000]),
            1,
            "entry 0: the stream id 0x8000 is wider than the 15 bits of /axi/smmu@fd800000",
        ),
        (cells([2, 0x200, 0x8000]), 2, "entry 0: the mask 0x8000 is wider"),
        (cells([1, 0x200]), 1, "entry 0: /gic@f9010000 has no `#iommu-cells`"),
        (cells([2, 0x200]), 3, "property `#iommu-cells`: 3, an SMMU takes 1 or 2"),
        (vec![], 1, "empty"),
        (vec![0, 0, 0, 2, 0], 1, "5 bytes, not a whole number"),
    ] {
        let mut dt = base();
        dt.prop(SMMU, "#iommu-cells", cells([iommu_cells]));
        // On a node that is not modelled as well: iommus decides who may reach which memory.
        dt.remove(DMA, "iommus");
        dt.prop("/axi/ethernet@ff0e0000", "iommus", value);
        assert!(error(&dt).contains(expected), "{} / {expected}", error(&dt));
    }
}

#[test]
fn iommus_with_two_cells_and_several_entries_give_masks() {
    let mut dt = base();
    dt.prop(SMMU, "#iommu-cells", cells([2]));
    dt.prop(DMA, "iommus", cells([2, 0x200, 0x3F, 2, 0x14E8, 0]));
    let tree = dt.tree().unwrap();
    let got: Vec<_> = tree.find(DMA).unwrap().iommus.iter().map(|i| (i.stream.get(), i.mask)).collect();
    assert_eq!(got, [(0x200, 0x3F), (0x14E8, 0)]);
}

#[test]
fn stream_match_mask_of_the_smmu_applies_to_one_cell_specifiers() {
    let mut dt = base();
    dt.prop(SMMU, "stream-match-mask", cells([0x7C00]));
    assert_eq!(dt.tree().unwrap().find(DMA).unwrap().iommus[0].mask, 0x7C00);
}

#[test]
fn legacy_masters_are_read_with_the_masters_own_count() {
    let mut dt = base();
    dt.remove(DMA, "iommus");
    dt.prop(DMA, "phandle", cells([7]));
    dt.prop(DMA, "#stream-id-cells", cells([2]));
    dt.prop(SMMU, "mmu-masters", cells([7, 0x14E8, 0x14E9]));
    let tree = dt.tree().unwrap();
    let masters = &tree.find(SMMU).unwrap().mmu_masters;
    assert_eq!(masters.len(), 1);
    assert_eq!(tree.node(masters[0].master).unwrap().path, DMA);
    assert_eq!(masters[0].streams, [StreamId(0x14E8), StreamId(0x14E9)]);

    dt.prop(SMMU, "mmu-masters", cells([7, 0x14E8]));
    assert!(error(&dt).contains("`mmu-masters`: entry 0: cut short, /axi/dma@fd500000 has 2 stream ids"));
    dt.remove(DMA, "#stream-id-cells");
    assert!(error(&dt).contains("has no `#stream-id-cells`"));
}

#[test]
fn phandles_are_unique_and_well_formed() {
    let mut dt = base();
    dt.prop(DMA, "phandle", cells([1]));
    assert_eq!(
        error(&dt),
        "/axi/dma@fd500000: property `phandle`: 0x1 is the phandle of /gic@f9010000 already"
    );
    dt.prop(DMA, "phandle", cells([0]));
    assert!(error(&dt).contains("0x0 is not allowed"));
    dt.prop(DMA, "phandle", vec![1, 2]);
    assert!(error(&dt).contains("2 bytes instead of one cell"));
}

#[test]
fn trouble_with_interrupts_is_named() {
    for (node, property, value, expected) in [
        (DMA, "interrupts", cells([0, 988, 4]), "SPI 988 does not exist"),
        (DMA, "interrupts", cells([1, 16, 4]), "PPI 16 does not exist"),
        (DMA, "interrupts", cells([0, 124]), "cut short, /gic@f9010000 wants 3 cells"),
        (DMA, "interrupt-parent", cells([55]), "no node has the phandle 0x37"),
        ("/gic@f9010000", "#interrupt-cells", cells([0]), "0 cells, 1 to 8 make sense"),
    ] {
        let mut dt = base();
        dt.prop(node, property, value);
        assert!(error(&dt).contains(expected), "{} / {expected}", error(&dt));
    }
    let mut dt = base();
    dt.remove("/", "interrupt-parent");
    assert!(error(&dt).contains("no `interrupt-parent` here or at any parent"));
}

#[test]
fn interrupt_parents_that_go_in_a_circle_are_found() {
    let mut dt = base();
    dt.prop("/axi/a", "phandle", cells([10]));
    dt.prop("/axi/b", "phandle", cells([11]));
    dt.prop("/axi/a", "interrupt-parent", cells([11]));
    dt.prop("/axi/b", "interrupt-parent", cells([10]));
    dt.prop(DMA, "interrupt-parent", cells([10]));
    assert!(error(&dt).contains("the interrupt parents go in a circle"), "{}", error(&dt));
}

#[test]
fn interrupts_extended_may_name_several_controllers() {
    let mut dt = base();
    dt.prop("/other", "phandle", cells([5]));
    dt.prop("/other", "#interrupt-cells", cells([1]));
    dt.prop(DMA, "interrupts-extended", cells([5, 3, 1, 1, 9, 0xF04]));
    let tree = dt.tree().unwrap();
    let other = tree.find("/other").unwrap().id();
    assert_eq!(
        tree.find(DMA).unwrap().interrupts,
        [
            Interrupt::Other { controller: other, cells: vec![3] },
            Interrupt::Ppi { number: 9, trigger: Trigger::LevelHigh }
        ]
    );
}

#[test]
fn a_disabled_parent_makes_its_children_unavailable() {
    let mut dt = base();
    dt.prop("/axi", "status", string("disabled"));
    let tree = dt.tree().unwrap();
    let dma = tree.find(DMA).unwrap();
    assert_eq!((dma.status.clone(), dma.available), (Status::Okay, false));
}

#[test]
fn dma_coherent_is_inherited_until_something_says_otherwise() {
    let mut dt = base();
    dt.prop("/axi", "dma-coherent", vec![]);
    dt.prop(DMA, "dma-noncoherent", vec![]);
    let tree = dt.tree().unwrap();
    assert!(tree.find(SMMU).unwrap().dma_coherent);
    assert!(!tree.find(DMA).unwrap().dma_coherent);
}

#[test]
fn nodes_are_found_by_path_label_alias_and_name() {
    let mut dt = base();
    dt.prop("/__symbols__", "fpd_dma_chan1", string(DMA));
    dt.prop("/aliases", "dma0", string(DMA));
    dt.prop("/axi/dma@fd510000", "compatible", string("x"));
    let tree = dt.tree().unwrap();
    for name in [DMA, "fpd_dma_chan1", "&fpd_dma_chan1", "dma0", "dma@fd500000"] {
        assert_eq!(tree.resolve(name).unwrap().path, DMA, "{name}");
    }
    assert_eq!(tree.resolve("smmu").unwrap().path, SMMU);
    let ambiguous = tree.resolve("dma").unwrap_err().to_string();
    assert_eq!(
        ambiguous,
        "`dma` is the name of several nodes, give a path: /axi/dma@fd500000, /axi/dma@fd510000"
    );
    let missing = tree.resolve("dma@fd5f0000").unwrap_err().to_string();
    assert!(missing.contains("perhaps one of: /axi/dma@fd500000"), "{missing}");
}

#[test]
fn an_overlay_changes_the_tree_and_the_result_is_checked() {
    let tree = base().tree().unwrap();
    let mut overlay = Dt::new();
    overlay.prop("/fragment@0", "target-path", string(DMA));
    overlay.prop("/fragment@0/__overlay__", "status", string("disabled"));
    let merged = tree.apply_overlay(&overlay.blob()).unwrap();
    assert!(!merged.find(DMA).unwrap().available);
    assert!(tree.find(DMA).unwrap().available);

    overlay.prop("/fragment@0/__overlay__", "iommus", cells([99, 1]));
    let error = tree.apply_overlay(&overlay.blob()).unwrap_err().to_string();
    assert!(error.contains("no node has the phandle 0x63"), "{error}");

    overlay.prop("/fragment@0", "target-path", string("/nowhere"));
    let error = tree.apply_overlay(&overlay.blob()).unwrap_err().to_string();
    assert_eq!(error, "the overlay cannot be applied: the tree has no node /nowhere");
    let error = tree.apply_overlay(&base().blob()).unwrap_err().to_string();
    assert!(error.contains("it is no overlay"), "{error}");
}

#[test]
fn an_overlay_that_would_break_references_is_refused() {
    let tree = base().tree().unwrap();
    let mut overlay = Dt::new();
    overlay.prop("/fragment@0", "target-path", string(SMMU));
    overlay.prop("/fragment@0/__overlay__", "phandle", cells([1]));
    let error = tree.apply_overlay(&overlay.blob()).unwrap_err().to_string();
    assert!(error.contains("gives /axi/smmu@fd800000 a new phandle") && error.contains("0x2"), "{error}");
}

#[test]
fn a_label_that_the_tree_lacks_is_named_when_an_overlay_needs_it() {
    let tree = base().tree().unwrap();
    let mut overlay = Dt::new();
    overlay.prop("/fragment@0", "target", cells([u32::MAX]));
    overlay.prop("/fragment@0/__overlay__", "status", string("okay"));
    overlay.prop("/__fixups__", "smmu", string("/fragment@0:target:0"));
    let error = tree.apply_overlay(&overlay.blob()).unwrap_err().to_string();
    assert!(error.contains("the label `smmu`") && error.contains("dtc -@"), "{error}");
}

#[test]
fn lookups_are_limited_however_they_are_spread() {
    // Sixty buses of a thousand ranges each above five thousand addresses: 300 million comparisons.
    let mut dt = Dt::new();
    let mut path = String::new();
    for depth in 0..60 {
        path.push_str(&format!("/b{depth}"));
        dt.prop(&path, "#address-cells", cells([1]));
        dt.prop(&path, "#size-cells", cells([1]));
        let ranges = (0..1000).flat_map(|n| [n * 16, 0, n * 16, 16]);
        let ranges = if depth == 0 {
            ranges.flat_map(u32::to_be_bytes).collect()
        } else {
            ranges.enumerate().filter(|(i, _)| i % 4 != 1).flat_map(|(_, c)| c.to_be_bytes()).collect()
        };
        dt.prop(&path, "ranges", ranges);
    }
    for n in 0..5 {
        let regs = (0..1000).flat_map(|n: u32| [n * 16, 16]).flat_map(u32::to_be_bytes).collect();
        dt.prop(&format!("{path}/dev{n}"), "reg", regs);
    }
    let error = error(&dt);
    assert!(error.contains("too much for a device tree: entries to look up"), "{error}");
}
