//! Boards put into QEMU's `virt`: the guest's tree describes the same SMMUs, engines and streams, and nothing in it collides.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;

use dtoolkit::Node as _;
use dtoolkit::model::{DeviceTreeNode, DeviceTreeProperty};
use portcullis_arch::Pa;
use portcullis_board::compatible::Kind;
use portcullis_board::machine::{DeclaredStream, NodeInfo};
use portcullis_board::tree::{Region, Trigger};
use portcullis_board::{MachineDescription, Tree};
use portcullis_cosim::guest_tree::{
    BUS, GuestTree, GuestTreeError, MAX_WINDOW, Messages, Options, fragments, guest_tree,
};

const BOARDS: [&str; 4] = ["zynqmp-thesis", "zynqmp-thesis-hpc1", "smmuv3", "smmuv3-noncoherent"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn board(name: &str) -> Tree {
    Tree::load(root().join(format!("../../boards/{name}.dtb"))).unwrap()
}

fn virt() -> Tree {
    Tree::load(root().join("tests/guest_tree/virt.dtb")).unwrap()
}

fn make(board: &Tree, qemu: &Tree) -> GuestTree {
    guest_tree(board, qemu, &Options::default()).unwrap()
}

fn error(board: &Tree, qemu: &Tree) -> String {
    guest_tree(board, qemu, &Options::default()).unwrap_err().to_string()
}

fn describe(tree: &Tree) -> MachineDescription {
    MachineDescription::from_tree(tree).unwrap()
}

fn node<'m>(root: &'m mut DeviceTreeNode, path: &str) -> &'m mut DeviceTreeNode {
    let mut node = root;
    for part in path.split('/').filter(|p| !p.is_empty()) {
        if !node.children().any(|c| c.name() == part) {
            node.add_child(DeviceTreeNode::new_unchecked(part));
        }
        node = node.child_mut(part).unwrap();
    }
    node
}

/// The tree with a property set; nodes on the way come into being.
fn with(tree: &Tree, path: &str, name: &str, value: impl Into<Vec<u8>>) -> Tree {
    tree.edit(|model| {
        node(&mut model.root, path).add_property(DeviceTreeProperty::new_unchecked(name, value.into()));
        Ok(())
    })
    .unwrap()
}

fn without(tree: &Tree, path: &str, names: &[&str]) -> Tree {
    tree.edit(|model| {
        for name in names {
            node(&mut model.root, path).remove_property(name);
        }
        Ok(())
    })
    .unwrap()
}

fn without_node(tree: &Tree, parent: &str, name: &str) -> Tree {
    tree.edit(|model| {
        node(&mut model.root, parent).remove_child(name);
        Ok(())
    })
    .unwrap()
}

/// A copy of a node with another name and other properties.
fn with_copy(tree: &Tree, parent: &str, of: &str, name: &str, properties: &[(&str, Vec<u8>)]) -> Tree {
    tree.edit(|model| {
        let parent = node(&mut model.root, parent);
        let mut copy = DeviceTreeNode::new_unchecked(name);
        let original = parent.child_mut(of).unwrap();
        for property in original.properties_mut() {
            copy.add_property(property.clone());
        }
        copy.remove_property("phandle");
        for (name, value) in properties {
            copy.add_property(DeviceTreeProperty::new_unchecked(*name, value.clone()));
        }
        parent.add_child(copy);
        Ok(())
    })
    .unwrap()
}

fn cells<const N: usize>(cells: [u32; N]) -> Vec<u8> {
    cells.into_iter().flat_map(u32::to_be_bytes).collect()
}

fn cell_list(tree: &Tree, path: &str, name: &str) -> Vec<u32> {
    tree.find(path).unwrap().cells(name).unwrap().unwrap()
}

fn left_out<'g>(guest: &'g GuestTree, path: &str) -> Vec<&'g str> {
    guest.left_out.iter().filter(|l| l.path == path).map(|l| l.reason.as_str()).collect()
}

const SMMU2: &str = "/axi/smmu@fd800000";
const FPD0: &str = "/axi/dma-controller@fd500000";
const SMMU3: &str = "/soc/iommu@31000000";

/// What has to be the same on both sides of a device.
fn identity(info: &NodeInfo) -> (&str, &[String], bool) {
    (&info.name, &info.labels, info.available)
}

fn numbers(description: &MachineDescription, declared: &[DeclaredStream]) -> Vec<(String, u32, u32)> {
    let name = |d: &DeclaredStream| description.smmus[d.smmu].node.name.clone();
    declared.iter().map(|d| (name(d), d.id.get(), d.mask)).collect()
}

/// True if the SMMU is not told of this master, since it has too few context banks for all.
fn untold(guest: &GuestTree, board_path: &str) -> bool {
    left_out(guest, board_path).iter().any(|r| r.contains("fewer context banks than masters"))
}

/// Everything of the description that does not depend on addresses, numbers of interrupts, and requester ids. Returns the
/// guest's description.
fn assert_same_machine(board: &Tree, made: &GuestTree) -> MachineDescription {
    let (board, guest) = (&describe(board), &describe(&made.tree));
    assert_eq!(board.smmus.len(), guest.smmus.len());
    for (b, g) in board.smmus.iter().zip(&guest.smmus) {
        assert_eq!(identity(&b.node), identity(&g.node));
        assert_eq!(
            (b.kind, b.region.size, b.iommu_cells, b.stream_match_mask, b.global_interrupts, b.dma_coherent),
            (g.kind, g.region.size, g.iommu_cells, g.stream_match_mask, g.global_interrupts, g.dma_coherent)
        );
        if b.node.available {
            assert_eq!(b.interrupts.len(), g.interrupts.len());
        }
        let (bv, gv) = (b.v3.as_ref(), g.v3.as_ref());
        assert_eq!(bv.map(|v| v.preset), gv.map(|v| v.preset));
        assert_eq!(bv.map(|v| v.msi.is_some()), gv.map(|v| v.msi.is_some()));
        let wires = |v: &portcullis_board::machine::SmmuV3| {
            [&v.combined, &v.eventq, &v.priq, &v.cmdq_sync, &v.gerror]
                .map(|w| w.as_ref().map(|w| w.is_edge()))
        };
        assert_eq!(bv.map(wires), gv.map(wires));
    }
    assert_eq!(board.dma_channels.len(), guest.dma_channels.len());
    for (b, g) in board.dma_channels.iter().zip(&guest.dma_channels) {
        assert_eq!(identity(&b.node), identity(&g.node));
        assert_eq!((b.bus_width, b.dma_coherent, b.chip), (g.bus_width, g.dma_coherent, g.chip));
        assert_eq!(b.region.size, g.region.size);
        assert_eq!(b.streams, g.streams);
    }
    assert_eq!(board.pl_writers.len(), guest.pl_writers.len());
    for (b, g) in board.pl_writers.iter().zip(&guest.pl_writers) {
        assert_eq!(identity(&b.node), identity(&g.node));
        assert_eq!(
            (b.port, b.axi_id, b.ax_prot, b.dma_coherent),
            (g.port, g.axi_id, g.ax_prot, g.dma_coherent)
        );
        assert_eq!(b.streams.actual, g.streams.actual);
        let declared = if untold(made, &b.node.path) { &[][..] } else { &b.streams.declared };
        assert_eq!(declared, g.streams.declared);
    }
    assert_eq!(board.test_devices.len(), guest.test_devices.len());
    for (b, g) in board.test_devices.iter().zip(&guest.test_devices) {
        assert_eq!((&b.node.labels, b.node.available), (&g.node.labels, g.node.available));
        assert_eq!(
            (b.pasid_bits, b.ats, b.pri, b.dma_coherent),
            (g.pasid_bits, g.ats, g.pri, g.dma_coherent)
        );
        assert_eq!(numbers(board, &b.streams.declared), numbers(guest, &g.streams.declared));
        assert_eq!(b.region.size, g.region.size);
    }
    let untold: Vec<String> =
        board.masters.iter().filter(|m| untold(made, &m.node.path)).map(|m| m.title.clone()).collect();
    let masters = |d: &MachineDescription| -> Vec<_> {
        let modelled = d.masters.iter().map(|m| {
            let told = (!untold.contains(&m.title)).then(|| (m.agreement, m.streams.declared.clone()));
            let streams = (m.streams.actual.clone(), told);
            (m.title.clone(), m.path, streams, m.can_stall, m.pasid_bits, m.ats, m.pri)
        });
        // The bridge is before our bus in the guest's tree.
        let mut list: Vec<_> = modelled.collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    };
    assert_eq!(masters(board), masters(guest));
    guest.clone()
}

#[test]
fn every_board_is_the_same_machine_in_the_guest() {
    for name in BOARDS {
        let (board, qemu) = (board(name), virt());
        let guest = make(&board, &qemu);
        // What the kernel gets is what the models are built from.
        assert!(Tree::from_dtb(&guest.tree.to_dtb()).unwrap() == guest.tree);
        let (b, g) = (describe(&board), assert_same_machine(&board, &guest));
        // RAM, ITS and GIC are QEMU's.
        assert_eq!(g.memory, describe(&qemu).memory);
        assert!(g.reserved.is_empty());
        assert_eq!(guest.its_translater, Some(Pa(0x0809_0040)));
        assert_eq!(Some(g.its[0].doorbell()), guest.its_translater);
        assert_eq!((guest.gicd, guest.ecam), (Pa(0x0800_0000), Pa(0x40_1000_0000)));
        let warnings: Vec<String> = g.findings.iter().map(ToString::to_string).collect();
        assert!(warnings.is_empty(), "{name}: {warnings:?}");
        assert_eq!(guest.placed.len(), b.smmus.len() + b.dma_channels.len() + b.pl_writers.len());
    }
}

#[test]
fn a_machine_built_from_either_tree_has_engines_of_the_same_names() {
    use portcullis_board::sim::{Machine, Options as Build};
    for name in BOARDS {
        let board = board(name);
        // Less RAM than QEMU's tree says, for speed.
        let guest =
            make(&board, &with(&virt(), "/memory@40000000", "reg", cells([0, 0x4000_0000, 0, 0x100_0000])));
        let (b, g) = (describe(&board), describe(&guest.tree));
        let b = Machine::build(b, Build::default()).unwrap();
        let g = Machine::build(g, Build::default()).unwrap();
        let names = |m: &Machine| -> Vec<_> {
            m.engines().iter().map(|e| (e.name.clone(), e.stream, e.smmu, e.coherent, e.bus_width)).collect()
        };
        assert_eq!(names(&b), names(&g), "{name}");
        let smmus = |m: &Machine| -> Vec<_> { m.smmus().iter().map(|s| (s.name.clone(), s.index)).collect() };
        assert_eq!(smmus(&b), smmus(&g));
        for placed in guest.placed.iter().filter(|p| !p.kind.is_smmu()) {
            let (b, g) = (b.engine(&placed.name).unwrap(), g.engine(&placed.name).unwrap());
            assert_eq!((&b.path, b.base), (&placed.board_path, placed.board_base));
            assert_eq!((&g.path, g.base, g.size), (&placed.guest_path, placed.base, placed.size));
            let numbers: Vec<(u32, u32)> =
                b.interrupts.iter().copied().zip(g.interrupts.iter().copied()).collect();
            assert_eq!(numbers, placed.interrupts);
        }
        for function in &guest.pci {
            assert_eq!(g.engine(&function.name).unwrap().path, function.guest_path);
            assert_eq!(b.engine(&function.name).unwrap().path, function.board_path);
        }
    }
}

#[test]
fn registers_are_in_the_window_in_the_order_of_the_boards_addresses() {
    let guest = make(&board("zynqmp-thesis"), &virt());
    assert_eq!(guest.window, Region { base: Pa(0x3000_0000), size: 0x20_0000 });
    let expected: Vec<(&str, u64)> =
        guest.placed.iter().map(|p| (p.name.as_str(), guest.offset(p))).collect();
    assert_eq!(expected[..3], [("pl-writer0", 0), ("fpd-dma0", 0x1_0000), ("fpd-dma1", 0x2_0000)]);
    // The SMMU is at a multiple of its size.
    assert_eq!(expected[9..11], [("smmu", 0xA_0000), ("lpd-dma0", 0xC_0000)]);
    assert_eq!(expected[17], ("lpd-dma7", 0x13_0000));
    assert!(guest.placed.windows(2).all(|p| p[0].board_base < p[1].board_base && p[0].base < p[1].base));
    let fpd0 = &guest.placed[1];
    assert_eq!(fpd0.guest_path, "/portcullis/dma-controller@30010000");
    assert_eq!(guest.tree.find(&fpd0.guest_path).unwrap().reg, [Region { base: fpd0.base, size: 0x1000 }]);
    assert_eq!(guest.tree.find(&fpd0.guest_path).unwrap().labels, ["fpd_dma_chan1"]);
    let guest = make(&board("smmuv3"), &virt());
    assert_eq!(guest.window, Region { base: Pa(0x3000_0000), size: 0x8_0000 });
}

#[test]
fn the_kernel_is_told_of_the_pci_memory_before_the_window_only() {
    let qemu = virt();
    let guest = make(&board("smmuv3"), &qemu);
    let (before, after) =
        (cell_list(&qemu, "/pcie@10000000", "ranges"), cell_list(&guest.tree, "/pcie@10000000", "ranges"));
    assert_eq!(before[7..14], [0x200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2eff_0000]);
    assert_eq!(after[7..14], [0x200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2000_0000]);
    assert_eq!((&before[..7], &before[14..]), (&after[..7], &after[14..]));
    // Elsewhere if asked for.
    let options = Options { window_base: Some(0x2000_0000), ..Options::default() };
    let guest = guest_tree(&board("smmuv3"), &qemu, &options).unwrap();
    assert_eq!(guest.window.base, Pa(0x2000_0000));
    assert_eq!(cell_list(&guest.tree, "/pcie@10000000", "ranges")[13], 0x1000_0000);
    for (base, expected) in [
        (
            0x2000_1000,
            "the register window of 0x80000 bytes at 0x20001000: its base must be a multiple of its size",
        ),
        (0x1000_0000, "leave the first 0x100000 bytes of it to PCI devices"),
        (0x3ef8_0000, "it must lie in QEMU's 32-bit PCI memory 0x10000000..0x3efeffff"),
        (0xffff_ffff_fff8_0000, "it must lie in QEMU's 32-bit PCI memory"),
    ] {
        let options = Options { window_base: Some(base), ..Options::default() };
        let message = guest_tree(&board("smmuv3"), &qemu, &options).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_smaller_bridge_gets_the_window_at_its_end_or_is_refused() {
    let ranges = |size: u32| {
        with(
            &virt(),
            "/pcie@10000000",
            "ranges",
            cells([0x200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, size]),
        )
    };
    let guest = make(&board("smmuv3"), &ranges(0x40_0000));
    assert_eq!(guest.window, Region { base: Pa(0x1038_0000), size: 0x8_0000 });
    // The test devices are in what is left of the same memory.
    assert_eq!(guest.pci[1].bar, Region { base: Pa(0x1001_0000), size: 0x1_0000 });
    let message = error(&board("smmuv3"), &ranges(0x10_0000));
    assert!(message.contains("leave the first 0x100000 bytes"), "{message}");
}

#[test]
fn what_is_copied_refers_to_what_is_in_the_guest() {
    for name in BOARDS {
        let qemu = virt();
        let guest = make(&board(name), &qemu);
        let old: HashSet<u32> = qemu.nodes().iter().filter_map(|n| n.phandle).collect();
        let new = guest.tree.nodes().iter().filter(|n| n.path.starts_with(BUS)).filter_map(|n| n.phandle);
        for phandle in new {
            assert!(!old.contains(&phandle), "{phandle:#x} is QEMU's");
        }
        for placed in &guest.placed {
            let copy = guest.tree.find(&placed.guest_path).unwrap();
            for spec in &copy.iommus {
                assert!(guest.tree.node(spec.iommu).unwrap().path.starts_with(BUS));
            }
            if placed.kind == Kind::Zdma {
                assert_eq!(copy.cells("clocks").unwrap().unwrap(), [0x8000, 0x8000]);
                assert_eq!(copy.strings("clock-names").unwrap(), ["clk_main", "clk_apb"]);
                assert_eq!(copy.cell("#dma-cells").unwrap(), Some(1));
            }
        }
    }
    // The board's SMMU has phandle 0x8002, which is QEMU's GIC.
    // Give it to the SMMU, and what the SMMU had to the GIC.
    let board = board("zynqmp-thesis");
    let (smmu, gic) =
        (board.find(SMMU2).unwrap().phandle.unwrap(), cell_list(&board, "/", "interrupt-parent")[0]);
    let board = board
        .edit(|model| {
            let set = |node: &mut DeviceTreeNode, name: &str, value: Vec<u8>| {
                node.add_property(DeviceTreeProperty::new_unchecked(name, value));
            };
            set(&mut model.root, "interrupt-parent", cells([smmu]));
            for child in node(&mut model.root, "/axi").children_mut() {
                let streams =
                    child.property_mut("iommus").map(|p| dtoolkit::Property::value(&&*p)[4..].to_vec());
                if let Some(stream) = streams {
                    set(child, "iommus", [cells([0x8002]), stream].concat());
                }
                match child.property_mut("phandle").map(|p| dtoolkit::Property::value(&&*p).to_vec()) {
                    Some(p) if p == cells([smmu]) => set(child, "phandle", cells([0x8002])),
                    Some(p) if p == cells([gic]) => set(child, "phandle", cells([smmu])),
                    _ => {}
                }
            }
            Ok(())
        })
        .unwrap();
    let guest = make(&board, &virt());
    let smmu = guest.placed.iter().find(|p| p.kind.is_smmu()).unwrap();
    assert_eq!(guest.tree.find(&smmu.guest_path).unwrap().phandle, Some(0x8005));
    assert_eq!(cell_list(&guest.tree, "/portcullis/dma-controller@30010000", "iommus"), [0x8005, 0x14e8]);
    assert_eq!(cell_list(&guest.tree, BUS, "interrupt-parent"), [0x8002]);
    assert_same_machine(&board, &guest);
}

#[test]
fn interrupts_keep_their_numbers_unless_qemu_uses_them() {
    let guest = make(&board("zynqmp-thesis"), &virt());
    for placed in &guest.placed {
        assert!(placed.interrupts.iter().all(|(board, guest)| board == guest), "{placed:?}");
    }
    let smmu = guest.placed.iter().find(|p| p.kind.is_smmu()).unwrap();
    assert_eq!(smmu.interrupts, [(155, 155); 17]);
    assert_eq!(cell_list(&guest.tree, &smmu.guest_path, "interrupts")[..6], [0, 155, 4, 0, 155, 4]);
    assert!(guest.tree.find(&smmu.guest_path).unwrap().interrupts.iter().all(|i| i.spi() == Some(155)));

    // 3: a PCI pin of QEMU's; 16: virtio; 300: more than `virt` has; 100: kept, so the others come after it.
    let mut board = board("zynqmp-thesis");
    for (n, spi) in [3u32, 16, 300, 100, 3].into_iter().enumerate() {
        board = with(&board, &format!("/axi/dma-controller@fd5{n}0000"), "interrupts", cells([0, spi, 1]));
    }
    let guest = make(&board, &virt());
    let of = |name: &str| guest.placed.iter().find(|p| p.name == name).unwrap();
    let numbers: Vec<_> = (0..5).map(|n| of(&format!("fpd-dma{n}")).interrupts.clone()).collect();
    assert_eq!(numbers, [[(3, 101)], [(16, 102)], [(300, 103)], [(100, 100)], [(3, 101)]]);
    let first = &guest.tree.find(&of("fpd-dma0").guest_path).unwrap().interrupts[0];
    assert!(first.is_edge() && first.spi() == Some(101));
    // Nobody shares a number with QEMU.
    let used = |tree: &Tree, ours: bool| -> BTreeSet<u32> {
        let nodes = tree.nodes().iter().filter(|n| n.path.starts_with(BUS) == ours);
        nodes.flat_map(|n| n.interrupts.iter().filter_map(|i| i.spi())).collect()
    };
    assert!(used(&guest.tree, true).is_disjoint(&used(&guest.tree, false)));
}

#[test]
fn an_interrupt_that_is_no_shared_one_is_refused_and_a_partitioned_one_is_not() {
    let private = with(&board("zynqmp-thesis"), FPD0, "interrupts", cells([1, 9, 4]));
    assert_eq!(
        error(&private, &virt()),
        format!("{FPD0}: interrupt 0 is no shared peripheral interrupt of a GIC, only these reach the guest")
    );
    // A GICv3 with partitions of CPUs has four cells.
    let board = board("smmuv3");
    let mut four = board.clone();
    for channel in 0..4u32 {
        four = without(&four, &format!("/soc/dma-controller@300{channel}0000"), &["interrupts"]);
    }
    four = without(&four, SMMU3, &["interrupts", "interrupt-names"]);
    four = with(&four, "/interrupt-controller@2f000000", "#interrupt-cells", cells([4]));
    four = with(&four, "/soc/dma-controller@30000000", "interrupts", cells([0, 55, 4, 0]));
    let guest = make(&four, &virt());
    let dma0 = guest.placed.iter().find(|p| p.name == "dma0").unwrap();
    assert_eq!(dma0.interrupts, [(55, 55)]);
    assert_eq!(cell_list(&guest.tree, &dma0.guest_path, "interrupts"), [0, 55, 4]);
    assert_eq!(
        guest.tree.find(&dma0.guest_path).unwrap().interrupts,
        [portcullis_board::tree::Interrupt::Spi { number: 55, trigger: Trigger::LevelHigh }]
    );
}

#[test]
fn when_no_number_is_left_the_error_says_for_what() {
    let mut board = board("zynqmp-thesis");
    let lines: Vec<u8> = (300..600u32).flat_map(|n| cells([0, n, 4])).collect();
    board = with(&board, SMMU2, "interrupts", lines);
    let message = error(&board, &virt());
    assert!(message.starts_with("no interrupt number is left for the board's SPI "), "{message}");
    assert!(message.ends_with("QEMU's `virt` has 256 shared peripheral interrupts"), "{message}");
}

#[test]
fn messages_go_to_qemus_its_with_device_id_0() {
    let guest_smmu =
        |guest: &GuestTree| guest.placed.iter().find(|p| p.kind.is_smmu()).unwrap().guest_path.clone();
    let of = |messages: Messages, qemu: &Tree, board: &Tree| {
        guest_tree(board, qemu, &Options { messages, ..Options::default() })
    };
    let (board, qemu) = (board("smmuv3"), virt());
    let guest = of(Messages::AsBoard, &qemu, &board).unwrap();
    let path = guest_smmu(&guest);
    assert_eq!(cell_list(&guest.tree, &path, "msi-parent"), [0x8003, 0]);
    // The wires stay.
    assert_eq!(guest.tree.find(&path).unwrap().strings("interrupt-names").unwrap().len(), 4);
    assert_eq!(describe(&guest.tree).smmus[0].v3.as_ref().unwrap().msi.unwrap().device, 0);

    let guest = of(Messages::Wired, &qemu, &board).unwrap();
    let smmu = guest.tree.find(&guest_smmu(&guest)).unwrap();
    assert_eq!((smmu.property("msi-parent"), smmu.interrupts.len()), (None, 4));

    // Without wires on the board, the wired guest gets some.
    let quiet = without(&board, SMMU3, &["interrupts", "interrupt-names"]);
    let guest = of(Messages::Wired, &qemu, &quiet).unwrap();
    let smmu = guest.tree.find(&guest_smmu(&guest)).unwrap();
    assert_eq!(smmu.strings("interrupt-names").unwrap(), ["eventq", "priq", "gerror"]);
    assert!(smmu.interrupts.iter().all(|i| i.is_edge()));
    assert_eq!(guest.placed.iter().find(|p| p.kind.is_smmu()).unwrap().interrupts, []);

    let wired = without(&board, SMMU3, &["msi-parent"]);
    let guest = of(Messages::AsBoard, &qemu, &wired).unwrap();
    assert_eq!(guest.tree.find(&guest_smmu(&guest)).unwrap().property("msi-parent"), None);
    let guest = of(Messages::Messages, &qemu, &wired).unwrap();
    assert_eq!(cell_list(&guest.tree, &guest_smmu(&guest), "msi-parent"), [0x8003, 0]);

    let no_its =
        without_node(&without(&qemu, "/pcie@10000000", &["msi-map"]), "/intc@8000000", "its@8080000");
    let guest = of(Messages::AsBoard, &no_its, &board).unwrap();
    assert_eq!(guest.its_translater, None);
    assert_eq!(guest.tree.find(&guest_smmu(&guest)).unwrap().property("msi-parent"), None);
    assert!(left_out(&guest, SMMU3)[0].contains("no ITS (`gic-version=3,its=on`)"));
    let message = of(Messages::Messages, &no_its, &board).unwrap_err().to_string();
    assert!(message.contains("start QEMU with `gic-version=3,its=on`"), "{message}");
}

#[test]
fn the_second_smmu_with_messages_has_wires_only_and_both_keep_their_names() {
    let second = [("reg", cells([0, 0x3200_0000, 0, 0x2_0000]))];
    let board = with_copy(&board("smmuv3"), "/soc", "iommu@31000000", "iommu@32000000", &second);
    let guest = make(&board, &virt());
    let smmus: Vec<_> = guest.placed.iter().filter(|p| p.kind.is_smmu()).collect();
    assert_eq!((&*smmus[0].name, &*smmus[1].name), ("iommu@31000000", "iommu@32000000"));
    assert!(guest.tree.find(&smmus[0].guest_path).unwrap().property("msi-parent").is_some());
    assert!(guest.tree.find(&smmus[1].guest_path).unwrap().property("msi-parent").is_none());
    let reasons = left_out(&guest, "/soc/iommu@32000000");
    assert!(reasons[0].contains("device id 0 only, and /soc/iommu@31000000 has it"), "{reasons:?}");
    // They share the board's lines, so they share them in the guest.
    assert_eq!(smmus[0].interrupts, smmus[1].interrupts);
}

#[test]
fn test_devices_become_functions_in_slots_of_their_own() {
    let board = board("smmuv3");
    let guest = make(&board, &virt());
    let smmu = guest.tree.find("/portcullis/iommu@30040000").unwrap().phandle.unwrap();
    assert_eq!(
        cell_list(&guest.tree, "/pcie@10000000", "iommu-map"),
        [0x10, smmu, 0x408, 1, 0x18, smmu, 0x410, 1]
    );
    let [first, second] = guest.pci.as_slice() else { panic!("{:?}", guest.pci) };
    assert_eq!((&*first.name, first.slot, first.rid.0, first.board_rid.0), ("testdev0", 2, 0x10, 0x8));
    assert_eq!((&*second.name, second.slot, second.rid.0, second.board_rid.0), ("testdev1", 3, 0x18, 0x10));
    assert_eq!((first.pasid_bits, first.ats, first.pri), (16, true, true));
    assert_eq!(first.streams, [portcullis_arch::StreamId(0x408)]);
    assert_eq!(first.guest_path, "/pcie@10000000/testdev@2,0");
    // In the 64-bit memory of the bridge.
    assert_eq!(first.bar, Region { base: Pa(0x80_0000_0000), size: 0x1_0000 });
    let devices = describe(&guest.tree).test_devices;
    assert_eq!((devices[1].rid, devices[1].region), (second.rid, second.bar));
    assert_eq!(describe(&guest.tree).test_devices[0].node.labels, ["testdev0"]);

    let options = Options { pci_first_slot: 30, ..Options::default() };
    let guest = guest_tree(&board, &virt(), &options).unwrap();
    assert_eq!(guest.pci[1].rid.0, 31 << 3);
    assert_eq!(guest.pci[1].guest_path, "/pcie@10000000/testdev@1f,0");
    for slot in [0, 31, 32, 255] {
        let options = Options { pci_first_slot: slot, ..Options::default() };
        let message = guest_tree(&board, &virt(), &options).unwrap_err().to_string();
        assert!(message.contains("there are slots 1 to 31"), "{message}");
    }

    let options = Options { pci: false, ..Options::default() };
    let guest = guest_tree(&board, &virt(), &options).unwrap();
    assert!(guest.pci.is_empty() && describe(&guest.tree).test_devices.is_empty());
    assert!(guest.tree.find("/pcie@10000000").unwrap().property("iommu-map").is_none());
    assert_eq!(left_out(&guest, "/pcie@50000000/testdev@1,0"), ["PCI functions are switched off"]);
}

#[test]
fn a_bridge_that_cannot_take_functions_is_refused() {
    let map = with(&virt(), "/apb-pclk", "#iommu-cells", cells([1]));
    let map = with(&map, "/pcie@10000000", "iommu-map", cells([0, 0x8000, 0, 1]));
    assert!(
        error(&board("smmuv3"), &map).contains("has `iommu-map`: start QEMU without an IOMMU of its own")
    );
    // The thesis board has no functions, so nothing is in the way there.
    assert!(guest_tree(&board("zynqmp-thesis"), &map, &Options::default()).is_ok());
    let taken = with(&virt(), "/pcie@10000000/nic@2,0", "reg", cells([0x1000, 0, 0, 0, 0]));
    assert!(error(&board("smmuv3"), &taken).contains("slot 2 has a node in QEMU's device tree already"));
}

#[test]
fn coherence_is_the_boards_whatever_the_root_of_qemus_tree_says() {
    assert!(virt().root().unwrap().dma_coherent);
    for (name, coherent) in [("smmuv3", true), ("smmuv3-noncoherent", false), ("zynqmp-thesis", false)] {
        let guest = make(&board(name), &virt());
        for placed in &guest.placed {
            let copy = guest.tree.find(&placed.guest_path).unwrap();
            assert_eq!(copy.dma_coherent, coherent, "{}", copy.path);
            assert_eq!(copy.property("dma-coherent").is_some(), coherent);
        }
    }
}

#[test]
fn what_the_guest_cannot_have_is_listed_with_reasons() {
    let mut board = board("zynqmp-thesis");
    board = with(&board, FPD0, "clocks", cells([9, 9]));
    board = with(&board, FPD0, "power-domains", cells([0x8002, 1]));
    board = with(&board, "/axi/pl-writer@b0000000", "resets", cells([9]));
    board = with(&board, "/axi/pl-writer@b0000000", "vcc-supply", cells([9]));
    board = with(&board, "/axi/ethernet@ff0e0000", "compatible", *b"cdns,gem\0");
    board = with(&board, "/axi/ethernet@ff0e0000", "reg", cells([0, 0xFF0E_0000, 0, 0x1000]));
    let smmu = board.find(SMMU2).unwrap().phandle.unwrap();
    board = with(&board, "/axi/ethernet@ff0e0000", "iommus", cells([smmu, 0x877]));
    let guest = make(&board, &virt());
    assert!(left_out(&guest, "/reserved-memory/experiment@60000000")[0].starts_with("reserved memory"));
    assert_eq!(left_out(&guest, FPD0), ["`power-domains`: the guest does not have what they refer to"]);
    assert!(
        left_out(&guest, "/axi/pl-writer@b0000000")
            .contains(&"`resets`, `vcc-supply`: the guest does not have what they refer to")
    );
    assert_eq!(left_out(&guest, "/axi/ethernet@ff0e0000"), ["a master that is not modelled"]);
    let writer = guest.tree.find("/portcullis/pl-writer@30000000").unwrap();
    assert!(writer.property("resets").is_none() && writer.property("vcc-supply").is_none());
    assert_eq!(writer.string("portcullis,pl-port").unwrap(), Some("hpc0"));
}

#[test]
fn the_legacy_binding_is_left_out_and_said_to_be() {
    let mut board = board("zynqmp-thesis");
    let smmu = board.find(SMMU2).unwrap().phandle.unwrap();
    assert!(smmu != 0x7000);
    for path in
        board.nodes().iter().filter(|n| !n.iommus.is_empty()).map(|n| n.path.clone()).collect::<Vec<_>>()
    {
        board = without(&board, &path, &["iommus"]);
    }
    board = with(&board, FPD0, "phandle", cells([0x7000]));
    board = with(&board, FPD0, "#stream-id-cells", cells([1]));
    board = with(&board, SMMU2, "mmu-masters", cells([0x7000, 0x14e8]));
    let board = without(&board, SMMU2, &["#iommu-cells", "#global-interrupts"]);
    let guest = make(&board, &virt());
    assert!(left_out(&guest, SMMU2)[0].starts_with("`mmu-masters`: the legacy binding is not copied"));
    let smmu = guest.tree.find("/portcullis/smmu@300a0000").unwrap();
    assert!(smmu.mmu_masters.is_empty());
    // Linux refuses an SMMU without this one.
    assert_eq!(smmu.cell("#global-interrupts").unwrap(), Some(1));
}

#[test]
fn what_is_not_in_use_stays_so_and_takes_no_room() {
    let mut board = board("smmuv3");
    board = with(&board, "/soc/dma-controller@30000000", "status", *b"disabled\0");
    // In the way of the name of one that is moved.
    let taken = [("reg", cells([0, 0x3001_0000, 0, 0x1000])), ("status", b"disabled\0".to_vec())];
    board = with_copy(&board, "/soc", "dma-controller@30010000", "dma-controller@x", &taken);
    let guest = make(&board, &virt());
    assert_same_machine(&board, &guest);
    assert!(guest.placed.iter().all(|p| p.board_path != "/soc/dma-controller@30000000"));
    // The others keep their numbers.
    let dma1 = guest.placed.iter().find(|p| p.name == "dma1").unwrap();
    assert_eq!((&*dma1.board_path, dma1.base), ("/soc/dma-controller@30010000", Pa(0x3000_0000)));
    assert!(!guest.tree.find("/portcullis/dma-controller@30010000,1").unwrap().available);

    let all_off = with(&board, "/soc", "status", *b"disabled\0");
    assert!(matches!(guest_tree(&all_off, &virt(), &Options::default()), Err(GuestTreeError::NoDevices)));
}

#[test]
fn an_smmu_that_is_off_stays_in_front_of_its_masters() {
    let board = with(&board("zynqmp-thesis"), SMMU2, "status", *b"disabled\0");
    let guest = make(&board, &virt());
    assert_same_machine(&board, &guest);
    assert!(guest.placed.iter().all(|p| !p.kind.is_smmu()));
}

#[test]
fn a_board_with_wrong_stream_ids_is_as_wrong_in_the_guest() {
    let board = board("zynqmp-thesis");
    let smmu = board.find(SMMU2).unwrap().phandle.unwrap();
    let board = with(&board, FPD0, "iommus", cells([smmu, 0x868]));
    let guest = make(&board, &virt());
    assert_same_machine(&board, &guest);
    let channel = &describe(&guest.tree).dma_channels[0];
    assert_eq!(channel.streams.actual[0].get(), 0x14e8);
    assert_eq!(channel.streams.declared[0].id.get(), 0x868);
}

#[test]
fn more_registers_than_the_largest_window_has_are_refused_by_name() {
    let big = with(&board("zynqmp-thesis"), FPD0, "reg", cells([0, 0x9000_0000, 0, 0x1000_0000]));
    let message = error(&big, &virt());
    assert_eq!(
        message,
        format!(
            "{FPD0}: its registers end 0x10000000 bytes into the window, which can have 0x8000000 at most"
        )
    );
    let mut many = board("zynqmp-thesis");
    for n in 0..3u32 {
        let reg = cells([1, n << 26, 0, 0x400_0000]);
        many = with_copy(&many, "/axi", "pl-writer@b0000000", &format!("pl-writer@1{n}"), &[("reg", reg)]);
    }
    let message = error(&many, &virt());
    assert!(message.starts_with("/axi/pl-writer@1"), "{message}");
    // What just fits does.
    let fits = with(&board("zynqmp-thesis"), FPD0, "reg", cells([0, 0x9000_0000, 0, 0x400_0000]));
    let guest = make(&fits, &virt());
    assert_eq!(guest.window, Region { base: Pa(0x3000_0000), size: MAX_WINDOW });
}

#[test]
fn a_tree_that_is_not_virts_is_refused_with_what_is_missing() {
    let board = board("smmuv3");
    let refused = |qemu: &Tree, expected: &str| {
        let message = error(&board, qemu);
        assert!(message.starts_with("QEMU's device tree: ") && message.contains(expected), "{message}");
    };
    let qemu = virt();
    refused(&board, "/soc/dma-controller@30000000: a device of a board is in it already");
    refused(&make(&board, &qemu).tree, "give the tree as QEMU dumps it");
    let smmu = with(&qemu, "/smmuv3@9050000", "reg", cells([0, 0x905_0000, 0, 0x2_0000]));
    refused(
        &with(&smmu, "/smmuv3@9050000", "compatible", *b"arm,smmu-v3\0"),
        "start it without `iommu=smmuv3`",
    );
    let nothing = Tree::from_dtb(&dtoolkit::model::DeviceTree::new().to_dtb()).unwrap();
    refused(&nothing, "no `interrupt-parent`");
    refused(&with(&qemu, "/", "interrupt-parent", cells([0x8000])), "its `interrupt-parent` is no GIC");
    refused(&without_node(&qemu, "/", "pcie@10000000"), "start QEMU with `-machine virt`");
    refused(
        &with(&qemu, "/pcie@10000000", "ranges", cells([0x100_0000, 0, 0, 0, 0, 0, 0])),
        "no 32-bit memory",
    );
    refused(&with(&qemu, "/pcie@10000000", "ranges", cells([1, 2])), "`ranges` has 2 cells");
    let elsewhere = cells([0x200_0000, 0, 0x1000_0000, 0, 0x5000_0000, 0, 0x1000_0000]);
    refused(&with(&qemu, "/pcie@10000000", "ranges", elsewhere), "0x10000000 on the bus and at 0x50000000");
    refused(
        &with(&qemu, "/pcie@10000000", "interrupt-map", cells([0, 0, 0, 1, 0x8002, 0, 0, 0])),
        "cut short",
    );
    refused(&with(&qemu, "/portcullis", "ranges", Vec::new()), "/portcullis: it is in the way");
    let last = with(&qemu, "/pl061@9030000", "phandle", cells([0xffff_fffe]));
    assert_eq!(error(&board, &last), "no phandle is left in QEMU's device tree");
}

#[test]
fn a_master_that_no_driver_is_for_costs_no_context_bank_when_there_are_too_few() {
    const WRITER: &str = "/axi/pl-writer@b0000000";
    // 17 masters, 16 banks: a kernel that attaches all of them at once runs out.
    let full = board("zynqmp-thesis");
    let guest = make(&full, &virt());
    assert!(untold(&guest, WRITER));
    let copy = guest.tree.find("/portcullis/pl-writer@30000000").unwrap();
    assert!(copy.property("iommus").is_none());
    // The hardware sends what it sent.
    assert_eq!(
        describe(&guest.tree).pl_writers[0].streams.actual,
        describe(&full).pl_writers[0].streams.actual
    );
    let one_less = with(&full, FPD0, "status", *b"disabled\0");
    let guest = make(&one_less, &virt());
    assert!(!untold(&guest, WRITER));
    assert_eq!(guest.tree.find("/portcullis/pl-writer@30000000").unwrap().iommus.len(), 1);
}

#[test]
fn the_bridge_says_that_it_has_ats_where_a_function_does() {
    let bridge =
        |guest: &GuestTree| guest.tree.find("/pcie@10000000").unwrap().property("ats-supported").is_some();
    let board = board("smmuv3");
    assert!(bridge(&make(&board, &virt())));
    let mut plain = board.clone();
    for function in ["testdev@1,0", "testdev@2,0"] {
        plain = without(&plain, &format!("/pcie@50000000/{function}"), &["portcullis,ats"]);
    }
    assert!(!bridge(&make(&plain, &virt())));
    assert!(!bridge(&guest_tree(&board, &virt(), &Options { pci: false, ..Options::default() }).unwrap()));
}

#[test]
fn a_controller_of_messages_that_takes_no_device_id_is_no_obstacle() {
    // QEMU's GICv2m has no `#msi-cells`, and the bridge's `msi-map` names it.
    let qemu = without(&virt(), "/intc@8000000/its@8080000", &["#msi-cells"]);
    let qemu = with(&qemu, "/intc@8000000/its@8080000", "compatible", *b"arm,gic-v2m-frame\0");
    let guest = make(&board("smmuv3"), &qemu);
    assert_eq!(guest.its_translater, None);
    assert!(left_out(&guest, SMMU3)[0].contains("no ITS"));
}

#[test]
fn a_machine_without_a_clock_gets_one() {
    let qemu = with(&virt(), "/apb-pclk", "compatible", *b"something,else\0");
    let guest = make(&board("zynqmp-thesis"), &qemu);
    let clock = guest.tree.find("/portcullis/clock").unwrap();
    let phandle = clock.phandle.unwrap();
    assert_eq!(cell_list(&guest.tree, "/portcullis/dma-controller@30010000", "clocks"), [phandle, phandle]);
}

#[test]
fn qemus_own_nodes_are_untouched() {
    let qemu = virt();
    let guest = make(&board("smmuv3"), &qemu);
    for node in qemu.nodes() {
        let after = guest.tree.find(&node.path).unwrap();
        let changed: Vec<_> = node
            .properties()
            .filter(|(name, value)| after.property(name) != Some(*value))
            .map(|(n, _)| n)
            .collect();
        let expected: &[&str] = if node.path == "/pcie@10000000" { &["ranges"] } else { &[] };
        assert_eq!(changed, expected, "{}", node.path);
    }
}

#[test]
fn the_fragments_compiled_with_qemus_source_give_the_guests_tree() {
    let dtc = |args: &[&str], input: &[u8]| -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("in");
        std::fs::write(&file, input).unwrap();
        let output = std::process::Command::new("dtc").args(args).arg(&file).output().ok()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Some(output.stdout)
    };
    let virt_dtb = std::fs::read(root().join("tests/guest_tree/virt.dtb")).unwrap();
    let Some(mut source) = dtc(&["-q", "-I", "dtb", "-O", "dts"], &virt_dtb) else {
        eprintln!("skipped: the_fragments_compiled_with_qemus_source_give_the_guests_tree needs dtc");
        return;
    };
    let fixture = Tree::load(root().join("tests/guest_tree/virt.dts")).unwrap();
    let fixture = without_node(&fixture, "/", "__symbols__");
    assert!(fixture == virt(), "compile tests/guest_tree/virt.dts again");
    let length = source.len();
    for name in BOARDS {
        let guest = make(&board(name), &virt());
        source.truncate(length);
        source.extend(fragments(&guest).bytes());
        let compiled = dtc(&["-q", "-@", "-I", "dts", "-O", "dtb"], &source).unwrap();
        assert!(Tree::from_dtb(&compiled).unwrap() == guest.tree, "{name}:\n{}", fragments(&guest));
    }
}

/// A small generator; the same numbers every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }
    fn cell(&mut self, tree: &Tree) -> u32 {
        let phandles: Vec<u32> = tree.nodes().iter().filter_map(|n| n.phandle).collect();
        match self.below(8) {
            0 => 0,
            1 => u32::MAX,
            2 => 1 << self.below(32),
            3 | 4 => phandles.get(self.below(phandles.len())).copied().unwrap_or(1),
            5 => self.below(8) as u32,
            6 => self.next() as u32 & 0xffff_0000,
            _ => self.next() as u32,
        }
    }
    /// The tree with one property of one node changed, removed or moved to another node; `None` if that is no tree.
    fn mutate(&mut self, tree: &Tree) -> Option<Tree> {
        let from = &tree.nodes()[self.below(tree.nodes().len())];
        let properties: Vec<(&str, &[u8])> = from.properties().collect();
        let (name, value) = properties.get(self.below(properties.len()))?;
        let (mut path, mut value) = (from.path.clone(), value.to_vec());
        let remove = match self.below(8) {
            0 => true,
            1 => {
                path.clone_from(&tree.nodes()[self.below(tree.nodes().len())].path);
                false
            }
            2 => {
                value.truncate(self.below(value.len() + 1));
                false
            }
            3 => {
                value.extend(self.cell(tree).to_be_bytes());
                false
            }
            _ => {
                let at = self.below(value.len() / 4) * 4;
                let cell = self.cell(tree).to_be_bytes();
                value.get_mut(at..at + 4)?.copy_from_slice(&cell);
                false
            }
        };
        let changed = tree.edit(|model| {
            let node = node(&mut model.root, &path);
            if remove {
                node.remove_property(name);
            } else {
                node.add_property(DeviceTreeProperty::new_unchecked(*name, value));
            }
            Ok(())
        });
        changed.ok()
    }
}

#[test]
fn any_two_trees_give_a_result_that_loads_or_one_error() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let boards: Vec<Tree> = BOARDS.iter().map(|n| board(n)).collect();
    let qemu = virt();
    let (mut made, mut refused) = (0, 0);
    for round in 0..3000 {
        let mut board = boards[round % boards.len()].clone();
        let mut other = qemu.clone();
        for _ in 0..random.below(6) {
            board = random.mutate(&board).unwrap_or(board);
        }
        for _ in 0..random.below(4) {
            other = random.mutate(&other).unwrap_or(other);
        }
        let options = Options {
            window_base: (random.below(4) == 0).then(|| random.next() << random.below(64)),
            messages: [Messages::AsBoard, Messages::Wired, Messages::Messages][random.below(3)],
            pci: random.below(4) != 0,
            pci_first_slot: if random.below(4) == 0 { random.next() as u8 } else { 2 },
        };
        match guest_tree(&board, &other, &options) {
            Ok(guest) => {
                made += 1;
                assert!(Tree::from_dtb(&guest.tree.to_dtb()).unwrap() == guest.tree);
                assert!(guest.window.size.is_power_of_two() && guest.window.size <= MAX_WINDOW);
                assert_eq!(guest.window.base.get() % guest.window.size, 0);
                for placed in &guest.placed {
                    assert!(guest.window.contains(&Region { base: placed.base, size: placed.size }));
                }
                assert!(!fragments(&guest).is_empty());
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    assert!(made > 300 && refused > 300, "{made} made, {refused} refused: the mutations test nothing");
}
