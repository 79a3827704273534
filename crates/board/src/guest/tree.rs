//! The device tree that a virtual machine boots with: its memory, its interrupt controller, and the devices it was given, at
//! the addresses and lines where it sees them.

use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

use crate::compatible::{AXI_DMA, DMA_PROXY};
use crate::machine::AxiDma;
use crate::tree::{Tree, TreeError};

/// `compatible` of the interrupt controller of a virtual machine.
const GIC: &str = "arm,gic-400";
/// `compatible` of the paravirtual IOMMU, and of nothing else.
pub const VIOMMU: &str = "portcullis,viommu";
const GIC_PHANDLE: u32 = 1;
const CLOCK_PHANDLE: u32 = 2;
const VIOMMU_PHANDLE: u32 = 3;
/// Of the first core; the others follow.
const CORE_PHANDLE: u32 = 0x10;
/// Where the interrupt controller is. Nobody reads its registers: interrupts come through the virtual machine.
const GIC_BASE: u64 = 0xf901_0000;

/// A core as a virtual machine sees it.
pub struct PlacedCore<'a> {
    /// The host's description of it.
    pub host: &'a AxiDma,
    /// First guest address of its registers.
    pub ipa: u64,
    /// Lines of MM2S and S2MM in the guest.
    pub lines: [Option<u32>; 2],
    /// Its number at the paravirtual IOMMU, if the guest has one.
    pub viommu: Option<u32>,
}

fn cells(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_be_bytes()).collect()
}
fn strings(values: &[&str]) -> Vec<u8> {
    values.iter().flat_map(|s| s.bytes().chain([0])).collect()
}
fn range(base: u64, size: u64) -> Vec<u8> {
    cells(&[(base >> 32) as u32, base as u32, (size >> 32) as u32, size as u32])
}

struct Node(DeviceTreeNode);

impl Node {
    fn new(name: &str) -> Self {
        Self(DeviceTreeNode::new_unchecked(name))
    }
    fn with(mut self, name: &str, value: Vec<u8>) -> Self {
        self.0.add_property(DeviceTreeProperty::new_unchecked(name, value));
        self
    }
    fn child(mut self, child: Self) -> Self {
        self.0.add_child(child.0);
        self
    }
}

fn core_node(core: &PlacedCore<'_>, phandle: u32) -> Node {
    let host = core.host;
    let mut node = Node::new(&format!("dma@{:x}", core.ipa))
        .with("compatible", strings(&[AXI_DMA]))
        .with("reg", range(core.ipa, host.region.size))
        .with("#dma-cells", cells(&[1]))
        .with("phandle", cells(&[phandle]))
        .with("clocks", cells(&[CLOCK_PHANDLE]))
        .with("clock-names", strings(&["s_axi_lite_aclk"]))
        .with("xlnx,addrwidth", cells(&[host.address_bits.into()]))
        .with("xlnx,sg-length-width", cells(&[host.length_bits.into()]));
    if host.scatter_gather {
        node = node.with("xlnx,include-sg", Vec::new());
    }
    if host.dma_coherent {
        node = node.with("dma-coherent", Vec::new());
    }
    if let Some(number) = core.viommu {
        node = node.with("iommus", cells(&[VIOMMU_PHANDLE, number]));
    }
    let kinds = [("xlnx,axi-dma-mm2s-channel", 0), ("xlnx,axi-dma-s2mm-channel", 0x30)];
    for (((compatible, offset), channel), line) in kinds.into_iter().zip(&host.channels).zip(core.lines) {
        let Some(channel) = channel else { continue };
        let mut child = Node::new(&format!("dma-channel@{:x}", core.ipa + offset))
            .with("compatible", strings(&[compatible]))
            .with("xlnx,datawidth", cells(&[channel.data_width]));
        if let Some(line) = line {
            child = child.with("interrupts", cells(&[0, line, 4]));
        }
        if channel.realigns {
            child = child.with("xlnx,include-dre", Vec::new());
        }
        node = node.child(child);
    }
    node
}

/// The tree of a virtual machine called `name`, with `memory` (address, bytes) and `cores`, each with a dma-proxy.
///
/// # Errors
/// What is wrong with the tree; nothing is, as long as the parts do not overlap.
pub fn guest_tree(name: &str, memory: &[(u64, u64)], cores: &[PlacedCore<'_>]) -> Result<Tree, TreeError> {
    let memory_cells = memory.iter().flat_map(|(base, size)| range(*base, *size)).collect();
    let first = memory.first().map_or(0, |(base, _)| *base);
    let mut root = Node::new("")
        .with("model", strings(&[&format!("virtual machine {name}")]))
        .with("compatible", strings(&["portcullis,vm"]))
        .with("#address-cells", cells(&[2]))
        .with("#size-cells", cells(&[2]))
        .with("interrupt-parent", cells(&[GIC_PHANDLE]))
        .child(
            Node::new(&format!("memory@{first:x}"))
                .with("device_type", strings(&["memory"]))
                .with("reg", memory_cells),
        )
        .child(
            Node::new(&format!("interrupt-controller@{GIC_BASE:x}"))
                .with("compatible", strings(&[GIC]))
                .with("reg", range(GIC_BASE, 0x1_0000))
                .with("#address-cells", cells(&[0]))
                .with("#interrupt-cells", cells(&[3]))
                .with("interrupt-controller", Vec::new())
                .with("phandle", cells(&[GIC_PHANDLE])),
        )
        .child(
            Node::new("clock")
                .with("compatible", strings(&["fixed-clock"]))
                .with("#clock-cells", cells(&[0]))
                .with("clock-frequency", cells(&[100_000_000]))
                .with("phandle", cells(&[CLOCK_PHANDLE])),
        );
    if cores.iter().any(|core| core.viommu.is_some()) {
        root = root.child(
            Node::new("viommu")
                .with("compatible", strings(&[VIOMMU]))
                .with("#iommu-cells", cells(&[1]))
                .with("phandle", cells(&[VIOMMU_PHANDLE])),
        );
    }
    for (i, core) in cores.iter().enumerate() {
        let phandle = CORE_PHANDLE.saturating_add(u32::try_from(i).unwrap_or(0));
        let mut proxy = Node::new(&format!("dma-proxy-{i}"))
            .with("compatible", strings(&[DMA_PROXY]))
            .with("dmas", cells(&[phandle, 0, phandle, 1]))
            .with("dma-names", strings(&["dma_proxy_tx", "dma_proxy_rx"]));
        if let Some(number) = core.viommu {
            proxy = proxy.with("iommus", cells(&[VIOMMU_PHANDLE, number]));
        }
        root = root.child(core_node(core, phandle)).child(proxy);
    }
    let mut tree = DeviceTree::new();
    tree.root = root.0;
    Tree::from_dtb(&tree.to_dtb())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MachineDescription;
    use crate::testing::board_file;

    #[test]
    fn a_guest_sees_its_core_where_it_was_placed_and_none_of_the_hosts_streams() {
        let blob = std::fs::read(board_file("zynqmp-hp0-2dma.dtb")).unwrap();
        let host = MachineDescription::from_tree(&Tree::from_dtb(&blob).unwrap()).unwrap();
        let core = PlacedCore {
            host: &host.axi_dmas[1],
            ipa: 0xa000_0000,
            lines: [Some(40), Some(41)],
            viommu: None,
        };
        let tree = guest_tree("A", &[(0x8_0000_0000, 0x100_0000)], &[core]).unwrap();
        let guest = MachineDescription::from_tree(&tree).unwrap();
        let dma = &guest.axi_dmas[0];
        assert_eq!((dma.region.base.get(), dma.address_bits, dma.length_bits), (0xa000_0000, 64, 26));
        assert!(dma.scatter_gather && !dma.dma_coherent && dma.streams.declared.is_empty());
        let lines = dma.channels.iter().flatten().map(|c| c.interrupt.as_ref().and_then(|i| i.spi()));
        assert_eq!(lines.collect::<Vec<_>>(), [Some(40), Some(41)]);
        let proxy = &guest.dma_proxies[0];
        assert_eq!(proxy.dmas[0].name, "dma_proxy_tx");
        assert!(proxy.dmas.iter().all(|d| d.provider == dma.node.path));
        assert_eq!(guest.findings, []);
    }
}
