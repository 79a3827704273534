//! Which `compatible` strings Portcullis models.
//!
//! A node that carries one of these is read strictly: what is malformed in it is an error. Everything else is
//! listed as not modelled.

/// What a modelled node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Arm MMU-500.
    Mmu500,
    /// Another Arm SMMU of architecture version 2.
    SmmuV2,
    /// An Arm SMMU of architecture version 3, see [`SMMU_V3`].
    SmmuV3,
    /// The interrupt translation service of a GICv3: where messages become interrupts.
    Its,
    /// A PCIe host bridge with an ECAM window, see [`PCIE_HOST`].
    PcieHost,
    /// The PCIe DMA test device, see [`TEST_DEVICE`].
    TestDevice,
    /// One channel of the ZynqMP's general-purpose DMA.
    Zdma,
    /// The writer IP in the programmable logic, see [`PL_WRITER`].
    PlWriter,
    /// An AXI DMA core in the programmable logic, see [`AXI_DMA`].
    AxiDma,
    /// A client of two channels of it, see [`DMA_PROXY`].
    DmaProxy,
    /// A network device, as far as its transmit DMA goes, see [`NIC`].
    Nic,
}

/// The compatible string of the PL writer: an AXI master in the programmable logic that writes one word per trigger,
/// after the IP of a master's thesis that has no published device-tree binding. The binding is ours:
///
/// | Property | Meaning |
/// |---|---|
/// | `reg` | its register window (0x1000 bytes) |
/// | `portcullis,pl-port` | string, required: the port it is connected to: `hpc0`, `hpc1`, `hp0` .. `hp3`, `lpd`, `ace`, `acp` |
/// | `portcullis,axi-id` | cell, 0 to 63, default 0: the AXI ID it drives after reset, the low bits of its stream id |
/// | `portcullis,ax-prot` | cell, 0 to 7, default 2: AxPROT as wired: bit 0 privileged, bit 1 non-secure, bit 2 instruction |
/// | `iommus`, `dma-coherent` | as for any master |
pub const PL_WRITER: &str = "portcullis,pl-writer";
/// The compatible string of an SMMUv3. Linux's binding, and one property of ours:
///
/// | Property | Meaning |
/// |---|---|
/// | `reg` | its two register pages, at least 128 KiB |
/// | `#iommu-cells` | 1: the stream id |
/// | `interrupts`, `interrupt-names` | `combined`, or some of `eventq`, `priq`, `cmdq-sync`, `gerror`; edge triggered |
/// | `msi-parent` | the ITS and the device id of its messages |
/// | `dma-coherent` | its table walks and queues snoop the CPU's caches |
/// | `hisilicon,broken-prefetch-cmd` | noted: the model's prefetches work |
/// | `cavium,cn9900-broken-page1-regspace` | refused when the machine is built: the model has its page 1 |
/// | `portcullis,smmu-v3` | string: what the model can do: `full` (the default), `small` (version 3.1) or `qemu-virt` |
///
/// A master may have `pasid-num-bits` (substreams) and `dma-can-stall`, as in Linux.
pub const SMMU_V3: &str = "arm,smmu-v3";
/// The compatible string of a PCIe host bridge. Its `reg` is the ECAM window, which is not modelled: the endpoints are
/// those that the tree lists as child nodes (`reg` is the configuration address, `assigned-addresses` gives the base address
/// registers). `iommu-map`, `iommu-map-mask`, `msi-map` and `msi-map-mask` turn a requester id into a stream id
/// and into the device id of messages. An endpoint's own properties say what a driver would read from its capabilities:
///
/// | Property of an endpoint | Meaning |
/// |---|---|
/// | `portcullis,ats`, `portcullis,pri` | it has address translation services, and page requests |
/// | `pasid-num-bits` | cell: bits of its process address space ids, 0 to 20 |
pub const PCIE_HOST: &str = "pci-host-ecam-generic";
/// The compatible strings of the PCIe DMA test device: its PCI ids, or ours.
pub const TEST_DEVICE: [&str; 2] = ["portcullis,pcie-testdev", "pci1ae0,6b"];
/// The compatible string of a ZDMA channel.
pub const ZDMA: &str = "xlnx,zynqmp-dma-1.0";
/// The compatible string of an AXI DMA core. Linux's binding (`xilinx_dma.txt`), and what the tree has to say about its wires:
///
/// | Property | Meaning |
/// |---|---|
/// | `reg` | its register window (0x1000 bytes) |
/// | `xlnx,include-sg` | built with scatter-gather; without it, direct mode |
/// | `xlnx,addrwidth` | cell, 32 to 64, default 32: bits of its addresses |
/// | `xlnx,sg-length-width` | cell, 8 to 26, default 23: bits of its length fields |
/// | `portcullis,pl-port`, `portcullis,axi-id`, `portcullis,ax-prot` | as of [`PL_WRITER`]; scatter-gather, MM2S and S2MM have this AXI ID and the two behind it |
/// | `portcullis,fifo-bytes` | cell, 1 to 1 MiB, default 4096: the FIFO that loops its stream output back to its input |
/// | child `xlnx,axi-dma-mm2s-channel`, `xlnx,axi-dma-s2mm-channel` | `interrupts`, `xlnx,datawidth` (required), `xlnx,include-dre` |
///
/// Without a port, its streams are the first three of `iommus`, in the order above.
pub const AXI_DMA: &str = "xlnx,axi-dma-1.00.a";
/// The compatible string of a dma-proxy: a client without hardware of its own. `dmas` names its channels, `dma-names` how it
/// calls them (`dma_proxy_tx`, `dma_proxy_rx`). Its buffers are mapped for **its own** device, so its `iommus` have to be those of
/// the core that uses them.
pub const DMA_PROXY: &str = "xlnx,dma_proxy";
/// The compatible string of a Cadence GEM of which the transmit DMA is modelled; give it before the usual ones. On a Zynq
/// UltraScale+ its way to memory passes the SMMU if its bit of IOU_INTERCONNECT_ROUTE is set.
pub const NIC: &str = "portcullis,gem";
/// The compatible string of the whole chip, in the root node.
pub const ZYNQMP: &str = "xlnx,zynqmp";

/// A property of any modelled node: a string, the name of the node on the board that it was taken from. It counts instead of the
/// node's own name wherever a device is named, so that a device that was moved to other addresses keeps its name.
pub const NAME: &str = "portcullis,name";
/// A property of any modelled node in a tree that is not a ZynqMP's: two cells, the address at which a Zynq UltraScale+ has the
/// registers of this device. The chip's tables then know the device as if it were there: which channel it is, which stream
/// ids it sends.
pub const CHIP_ADDRESS: &str = "portcullis,chip-address";

const TABLE: &[(&str, Kind)] = &[
    ("arm,mmu-500", Kind::Mmu500),
    ("arm,smmu-v2", Kind::SmmuV2),
    (SMMU_V3, Kind::SmmuV3),
    ("arm,gic-v3-its", Kind::Its),
    (PCIE_HOST, Kind::PcieHost),
    (TEST_DEVICE[0], Kind::TestDevice),
    (TEST_DEVICE[1], Kind::TestDevice),
    (ZDMA, Kind::Zdma),
    (PL_WRITER, Kind::PlWriter),
    (AXI_DMA, Kind::AxiDma),
    (DMA_PROXY, Kind::DmaProxy),
    (NIC, Kind::Nic),
];

impl Kind {
    /// What a node with these compatible strings, most specific first, is.
    pub fn of<S: AsRef<str>>(compatible: &[S]) -> Option<Self> {
        compatible.iter().find_map(|c| TABLE.iter().find(|(s, _)| *s == c.as_ref()).map(|(_, kind)| *kind))
    }
    /// True for SMMUs.
    pub fn is_smmu(self) -> bool {
        matches!(self, Self::Mmu500 | Self::SmmuV2 | Self::SmmuV3)
    }
}
