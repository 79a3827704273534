//! What a device tree says the machine is: memory, SMMUs, DMA channels, PL writers, masters. A description only;
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

mod build;
mod check;

use portcullis_arch::StreamId;
use portcullis_arch::zynqmp::{self, PlPort, SmmuPath};

pub use crate::compatible::Kind;
use crate::tree::{Finding, Interrupt, Region, Status};

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
    /// Name with unit address.
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

/// An SMMU of architecture version 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Smmu {
    /// Its node.
    pub node: NodeInfo,
    /// [`Kind::Mmu500`] or [`Kind::SmmuV2`].
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
}

/// One stream that the tree puts behind an SMMU: an entry of `iommus` or `mmu-masters`.
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
    /// The channel of the chip that it is, by its address.
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
