//! What a device tree says the machine is: memory, SMMUs, DMA channels, PL writers, PCIe bridges and functions, masters. A description only;
//! nothing runs yet.
//!
//! [`MachineDescription::from_tree`] makes it. Where the tree is a ZynqMP's (`compatible` of the root has
//! `xlnx,zynqmp`), the chip's own tables ([`portcullis_arch::zynqmp`]) say which stream ids each master really sends,
//! and every disagreement with the tree becomes a [`Finding`]: the tree's `iommus` decides what software programs,
//! the chip decides what arrives.
//!
//! To build models from it, take what is in use ([`NodeInfo::available`]): RAM from `memory`; one SMMU at
//! [`Smmu::region`] with its interrupts (`interrupts[..global_interrupts]`, then one per context bank); each engine at its
//! `region`, sending [`Streams::first`]. An engine whose `streams.declared` is empty still passes the SMMU: its stream
//! matches nothing. With no SMMU in use, engines reach memory directly. For drivers, `streams.declared` is the fwspec.
//!
//! A node that is not modelled is never fatal: it is listed in [`MachineDescription::not_modelled`].

mod axidma;
mod build;
mod check;
mod check_v3;
mod v3;

use portcullis_arch::zynqmp::{self, PlPort, SmmuPath};
use portcullis_arch::{Pa, StreamId};

pub use crate::compatible::Kind;
use crate::tree::{Finding, Interrupt, Region, Rid, Status};

/// A chip whose tables Portcullis has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Chip {
    /// Zynq UltraScale+.
    ZynqMp,
}

/// What every described device has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Full path in the tree; also the device's identity elsewhere in the description.
    pub path: String,
    /// Name with unit address; of a device that was moved, the one it had before ([`crate::compatible::NAME`]).
    pub name: String,
    /// Labels, where the tree has them.
    pub labels: Vec<String>,
    /// `phandle`.
    pub phandle: Option<u32>,
    /// `status` of the node.
    pub status: Status,
    /// True if the node and all its parents are okay.
    pub available: bool,
    /// Paths of the parents whose own status keeps the device from being used, outermost first.
    pub disabled_parents: Vec<String>,
}

/// RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// The node it is from.
    pub path: String,
    /// Where it is.
    pub region: Region,
}

/// Memory that the operating system must not use freely.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservedRegion {
    /// The node it is from, or `/memreserve/`.
    pub path: String,
    /// Where it is; `None` if it is to be placed by the operating system (a node with `size` and no `reg`).
    pub region: Option<Region>,
    /// Bytes.
    pub size: u64,
    /// True if it must not even be mapped (`no-map`).
    pub no_map: bool,
    /// `compatible`, such as `shared-dma-pool`.
    pub compatible: Vec<String>,
}

/// What an SMMUv3's model can do (`portcullis,smmu-v3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum SmmuV3Preset {
    /// Everything the model has.
    #[default]
    Full,
    /// A small one of version 3.1.
    Small,
    /// What QEMU's `virt` machine has.
    QemuVirt,
}

/// Where the messages (MSIs) of a device go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiTarget {
    /// Index in [`MachineDescription::its`].
    pub its: usize,
    /// Its device id there.
    pub device: u32,
}

/// What only an SMMUv3 has.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SmmuV3 {
    /// What it can do.
    pub preset: SmmuV3Preset,
    /// One interrupt for everything.
    pub combined: Option<Interrupt>,
    /// The event queue's interrupt.
    pub eventq: Option<Interrupt>,
    /// The page request queue's interrupt.
    pub priq: Option<Interrupt>,
    /// CMD_SYNC's interrupt.
    pub cmdq_sync: Option<Interrupt>,
    /// The global errors' interrupt.
    pub gerror: Option<Interrupt>,
    /// Where its messages go.
    pub msi: Option<MsiTarget>,
    /// A property that says it differs from the architecture in a way that is not modelled.
    pub quirk: Option<String>,
    /// `hisilicon,broken-prefetch-cmd`.
    pub broken_prefetch: bool,
}

/// The translation service of a GICv3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Its {
    /// Its node.
    pub node: NodeInfo,
    /// Its registers.
    pub region: Region,
}

impl SmmuV3Preset {
    /// Bits of stream ids (IDR1.SIDSIZE).
    pub fn stream_bits(self) -> u8 {
        self.caps().sid_bits
    }

    /// What the model can do. `Full` has the sizes of a real part where the model's limits are the architecture's: 16 bits
    /// of stream ids, and queues that can be filled in a test.
    pub fn caps(self) -> portcullis_smmuv3::Caps {
        use portcullis_smmuv3::Caps;
        match self {
            Self::Full => Caps {
                sid_bits: 16,
                cmdq_log2: 8,
                eventq_log2: 7,
                priq_log2: 7,
                secure: None,
                ..Caps::full()
            },
            Self::Small => Caps::small(),
            Self::QemuVirt => Caps::qemu_virt(),
        }
    }
}

impl Its {
    /// Where messages are written to: GITS_TRANSLATER.
    pub fn doorbell(&self) -> Pa {
        self.region.base.wrapping_add(0x1_0040)
    }
}

/// A PCIe host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcieHost {
    /// Its node.
    pub node: NodeInfo,
    /// Its ECAM window.
    pub region: Region,
    /// `iommu-map`: requester ids and the streams that the bridge makes of them. Targets that are no SMMU that is modelled are
    /// not in it.
    pub iommu_map: Vec<(u32, DeclaredStream, u32)>,
    /// `iommu-map-mask`.
    pub iommu_map_mask: u32,
    /// True if DMA of its devices is coherent.
    pub dma_coherent: bool,
}

/// The PCIe DMA test device ([`crate::compatible::TEST_DEVICE`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestDevice {
    /// Its node.
    pub node: NodeInfo,
    /// BAR 0: its registers.
    pub region: Region,
    /// Its requester id.
    pub rid: Rid,
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// Its streams, by its bridge's `iommu-map`.
    pub streams: Streams,
    /// Bits of its process address space ids; 0 for none.
    pub pasid_bits: u8,
    /// It has address translation services.
    pub ats: bool,
    /// It has page requests.
    pub pri: bool,
    /// Where its messages go, by its bridge's `msi-map`.
    pub msi: Option<MsiTarget>,
}

/// An SMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smmu {
    /// Its node.
    pub node: NodeInfo,
    /// [`Kind::Mmu500`], [`Kind::SmmuV2`] or [`Kind::SmmuV3`].
    pub kind: Kind,
    /// Its registers.
    pub region: Region,
    /// `#iommu-cells`, 1 or 2; 0 if missing, which only legacy trees may do.
    pub iommu_cells: u32,
    /// `stream-match-mask`.
    pub stream_match_mask: u32,
    /// `#global-interrupts`: how many of `interrupts`, from the first, are global; the rest are per context bank.
    pub global_interrupts: usize,
    /// Its interrupts, global ones first.
    pub interrupts: Vec<Interrupt>,
    /// True if its table walks are coherent with the CPU's caches.
    pub dma_coherent: bool,
    /// True if it uses the legacy `mmu-masters` binding.
    pub legacy: bool,
    /// What only an SMMUv3 has; `None` for others.
    pub v3: Option<SmmuV3>,
}

/// One stream that the tree puts behind an SMMU: an entry of `iommus` or `mmu-masters`, or what a bridge's `iommu-map`
/// makes of a requester id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeclaredStream {
    /// Index in [`MachineDescription::smmus`].
    pub smmu: usize,
    /// Stream id.
    pub id: StreamId,
    /// Bits of the id that do not matter.
    pub mask: u32,
}

impl DeclaredStream {
    /// True if the entry matches this stream id.
    pub fn matches(&self, stream: StreamId) -> bool {
        (self.id.get() ^ stream.get()) & !self.mask == 0
    }
}

/// The streams of a master.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Streams {
    /// What the hardware sends, from the chip's tables (or the PL port). Empty where the chip is not known.
    pub actual: Vec<StreamId>,
    /// What the tree says, and thus what software programs into the SMMU.
    pub declared: Vec<DeclaredStream>,
}

impl Streams {
    /// The stream of a master that has one: what the hardware sends, or, where the chip is not known, what the tree
    /// says. `None` if neither tells.
    pub fn first(&self) -> Option<StreamId> {
        self.actual.first().copied().or_else(|| self.declared.first().map(|d| d.id))
    }
}

/// One channel of a general-purpose DMA unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaChannel {
    /// Its node.
    pub node: NodeInfo,
    /// Its registers.
    pub region: Region,
    /// Its interrupt.
    pub interrupt: Option<Interrupt>,
    /// Bits of its data bus (`xlnx,bus-width`), 64 or 128.
    pub bus_width: u32,
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// Its streams. [`Streams::first`] is what the model should send.
    pub streams: Streams,
    /// The channel of the chip that it is, by its address, or by the one it had before it was moved
    /// ([`crate::compatible::CHIP_ADDRESS`]).
    pub chip: Option<&'static zynqmp::ZdmaChannel>,
}

/// A writer in the programmable logic ([`crate::compatible::PL_WRITER`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlWriter {
    /// Its node.
    pub node: NodeInfo,
    /// Its registers.
    pub region: Region,
    /// The PL port it is connected to.
    pub port: PlPort,
    /// AXI ID after reset.
    pub axi_id: u8,
    /// AxPROT as wired: bit 0 privileged, bit 1 non-secure, bit 2 instruction.
    pub ax_prot: u8,
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// Its streams: [`Streams::actual`] is the port's base plus [`axi_id`](Self::axi_id); other AXI IDs give
    /// other streams, see [`PlPort::stream`].
    pub streams: Streams,
}

/// One channel of an [`AxiDma`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AxiDmaChannel {
    /// Path of its node.
    pub path: String,
    /// Its interrupt.
    pub interrupt: Option<Interrupt>,
    /// Bits of its stream (`xlnx,datawidth`).
    pub data_width: u32,
    /// It moves data of any alignment (`xlnx,include-dre`).
    pub realigns: bool,
}

/// An AXI DMA core in the programmable logic ([`crate::compatible::AXI_DMA`]), its stream output looped back to its input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AxiDma {
    /// Its node.
    pub node: NodeInfo,
    /// Its registers.
    pub region: Region,
    /// The PL port it is connected to, if the tree says.
    pub port: Option<PlPort>,
    /// AxPROT as wired: bit 0 privileged, bit 1 non-secure, bit 2 instruction.
    pub ax_prot: u8,
    /// Built with scatter-gather.
    pub scatter_gather: bool,
    /// Bits of its addresses, 32 to 64.
    pub address_bits: u8,
    /// Bits of its length fields, 8 to 26.
    pub length_bits: u8,
    /// Bytes of the FIFO from its stream output to its input.
    pub fifo_bytes: u32,
    /// MM2S and S2MM, where the tree has them.
    pub channels: [Option<AxiDmaChannel>; 2],
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// Its streams: scatter-gather, MM2S, S2MM.
    pub streams: Streams,
}

impl AxiDma {
    /// The streams that it sends: of scatter-gather, MM2S and S2MM. Where the port is not known, what the tree says; a master
    /// that the tree does not give a stream of its own sends the first.
    pub fn sends(&self) -> [StreamId; 3] {
        let first = self.streams.first().unwrap_or_default();
        [0, 1, 2].map(|i| {
            let declared = || self.streams.declared.get(i).map(|d| d.id);
            self.streams.actual.get(i).copied().or_else(declared).unwrap_or(first)
        })
    }
}

/// A channel that a client uses: an entry of `dmas`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaSpecifier {
    /// What the client calls it (`dma-names`).
    pub name: String,
    /// Path of the provider's node.
    pub provider: String,
    /// The channel's number there; of an AXI DMA, 0 is MM2S and 1 is S2MM.
    pub channel: u32,
}

/// A dma-proxy ([`crate::compatible::DMA_PROXY`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaProxy {
    /// Its node.
    pub node: NodeInfo,
    /// Its channels.
    pub dmas: Vec<DmaSpecifier>,
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// The streams that the tree gives it. It sends none itself.
    pub streams: Streams,
}

/// A network device ([`crate::compatible::NIC`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// Its node.
    pub node: NodeInfo,
    /// Its registers.
    pub region: Region,
    /// Its interrupt.
    pub interrupt: Option<Interrupt>,
    /// Its bit in IOU_INTERCONNECT_ROUTE, if the chip knows it.
    pub route_bit: Option<u8>,
    /// True if the tree says that its DMA is coherent.
    pub dma_coherent: bool,
    /// Its streams.
    pub streams: Streams,
}

/// How the tree's stream ids of a master compare with the chip's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Agreement {
    /// Every stream that the hardware sends is declared.
    Agrees,
    /// Not declared: the tree does not put the master behind the SMMU.
    NotDeclared,
    /// Something that the hardware sends is not declared.
    Differs,
    /// Nothing to compare with: the chip's tables do not know the master, or its path is not documented.
    Unknown,
    /// The master's path does not pass the SMMU.
    NotBehind,
}

/// A node that issues DMA, modelled or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Its node.
    pub node: NodeInfo,
    /// The chip's name for it, or the node's name.
    pub title: String,
    /// First address of its registers, if it has any.
    pub region: Option<Region>,
    /// Its way to memory, where the chip's tables know it.
    pub path: Option<SmmuPath>,
    /// Its bit in `IOU_INTERCONNECT_ROUTE`, for the masters that need it set to pass the SMMU.
    pub route_bit: Option<u8>,
    /// Its streams.
    pub streams: Streams,
    /// How the two kinds of streams compare.
    pub agreement: Agreement,
    /// True if its DMA is coherent.
    pub dma_coherent: bool,
    /// Its requester id, if it is a PCI function.
    pub rid: Option<Rid>,
    /// Bits of its substream ids (`pasid-num-bits`); 0 for none.
    pub pasid_bits: u8,
    /// Its transactions may be stalled (`dma-can-stall`).
    pub can_stall: bool,
    /// It has address translation services.
    pub ats: bool,
    /// It has page requests.
    pub pri: bool,
}

/// A node with a `compatible` that Portcullis does not model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotModelled {
    /// Its path.
    pub path: String,
    /// Its most specific compatible string.
    pub compatible: String,
    /// Its status.
    pub status: Status,
}

/// The machine that a tree describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineDescription {
    /// `model` of the root.
    pub model: String,
    /// `compatible` of the root.
    pub compatible: Vec<String>,
    /// The chip, if Portcullis knows it.
    pub chip: Option<Chip>,
    /// RAM, ascending, without overlaps.
    pub memory: Vec<MemoryRegion>,
    /// Reserved memory.
    pub reserved: Vec<ReservedRegion>,
    /// SMMUs, enabled or not.
    pub smmus: Vec<Smmu>,
    /// DMA channels, enabled or not, in the order of the tree.
    pub dma_channels: Vec<DmaChannel>,
    /// PL writers, enabled or not.
    pub pl_writers: Vec<PlWriter>,
    /// AXI DMA cores, enabled or not, in the order of the tree.
    pub axi_dmas: Vec<AxiDma>,
    /// Clients of their channels, enabled or not.
    pub dma_proxies: Vec<DmaProxy>,
    /// Network devices, enabled or not.
    pub nics: Vec<Nic>,
    /// Interrupt translation services, enabled or not.
    pub its: Vec<Its>,
    /// PCIe host bridges, enabled or not.
    pub pcie_hosts: Vec<PcieHost>,
    /// PCIe test devices, enabled or not.
    pub test_devices: Vec<TestDevice>,
    /// Every node that issues DMA as far as the chip's tables, `iommus` or `mmu-masters` tell, including the modelled
    /// ones, in the order of the tree.
    pub masters: Vec<Master>,
    /// What is in the tree and not in the model.
    pub not_modelled: Vec<NotModelled>,
    /// What was noticed, in this order: by the tree, then by comparing.
    pub findings: Vec<Finding>,
    /// A phandle that no node has yet.
    pub unused_phandle: Option<u32>,
}

impl MachineDescription {
    /// The master with this path.
    pub fn master(&self, path: &str) -> Option<&Master> {
        self.masters.iter().find(|m| m.node.path == path)
    }
    /// The streams of the engine with this path, as its own description has them.
    pub fn engine_streams(&self, path: &str) -> Option<&Streams> {
        let channels = self.dma_channels.iter().map(|c| (&c.node, &c.streams));
        let writers = self.pl_writers.iter().map(|w| (&w.node, &w.streams));
        let testers = self.test_devices.iter().map(|d| (&d.node, &d.streams));
        let cores = self.axi_dmas.iter().map(|d| (&d.node, &d.streams));
        let nics = self.nics.iter().map(|n| (&n.node, &n.streams));
        let mut all = channels.chain(writers).chain(testers).chain(cores).chain(nics);
        all.find(|(node, _)| node.path == path).map(|(_, streams)| streams)
    }
    /// The SMMU that masters of the chip are behind: the one in use, or else the first.
    pub fn smmu(&self) -> Option<(usize, &Smmu)> {
        let mut all = self.smmus.iter().enumerate();
        all.clone().find(|(_, s)| s.node.available).or_else(|| all.next())
    }
    /// All streams that masters in use declare at this SMMU, with the master that declares each.
    pub fn declared_streams(&self, smmu: usize) -> impl Iterator<Item = (&Master, &DeclaredStream)> {
        self.masters
            .iter()
            .filter(|m| m.node.available)
            .flat_map(|m| m.streams.declared.iter().map(move |d| (m, d)))
            .filter(move |(_, d)| d.smmu == smmu)
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_axidma;
#[cfg(test)]
mod tests_v3;
