//! One node of a checked tree, and the decoded forms of its properties.

use std::collections::BTreeMap;
use std::fmt;

use portcullis_arch::{Pa, StreamId};

use super::error::TreeError;
use crate::compatible::Kind;

/// Names a node of one [`Tree`](super::Tree); of no use with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) u32);

/// A range of physical addresses as the CPU sees them. `base + size` does not pass 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region {
    /// First address.
    pub base: Pa,
    /// Bytes.
    pub size: u64,
}

impl Region {
    /// Last address (`base` for an empty region).
    pub fn last(&self) -> Pa {
        self.base.wrapping_add(self.size.saturating_sub(1))
    }
    /// True if the two share a byte.
    pub fn overlaps(&self, other: &Region) -> bool {
        self.size != 0 && other.size != 0 && self.base <= other.last() && other.base <= self.last()
    }
    /// True if `inner` lies in this region.
    pub fn contains(&self, inner: &Region) -> bool {
        self.size != 0 && inner.base >= self.base && inner.last() <= self.last()
    }
}

/// `0xfd800000..0xfd81ffff`.
impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.base, self.last())
    }
}

/// The `status` property.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// `okay`, or no property.
    Okay,
    /// `disabled`.
    Disabled,
    /// `reserved`, `fail` or something unknown, which systems treat as not available.
    Other(String),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Okay => "okay",
            Self::Disabled => "disabled",
            Self::Other(s) => s,
        })
    }
}

/// How an interrupt line signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// Flags 1.
    EdgeRising,
    /// Flags 2.
    EdgeFalling,
    /// Flags 4.
    LevelHigh,
    /// Flags 8.
    LevelLow,
    /// Other flags, as they are.
    Other(u32),
}

/// One interrupt of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Interrupt {
    /// A shared peripheral interrupt of a GIC.
    Spi {
        /// SPI number; the GIC's interrupt id is 32 more.
        number: u32,
        /// How it signals.
        trigger: Trigger,
    },
    /// A private peripheral interrupt of a GIC.
    Ppi {
        /// PPI number; the GIC's interrupt id is 16 more.
        number: u32,
        /// How it signals.
        trigger: Trigger,
    },
    /// An interrupt of another kind of controller, or of a kind that a GICv2 does not have.
    Other {
        /// The controller.
        controller: NodeId,
        /// Its specifier, raw.
        cells: Vec<u32>,
    },
}

impl Interrupt {
    /// The SPI number, if it is one.
    pub fn spi(&self) -> Option<u32> {
        match self {
            Self::Spi { number, .. } => Some(*number),
            _ => None,
        }
    }
    /// True if it is signalled by a rising edge.
    pub fn is_edge(&self) -> bool {
        matches!(
            self,
            Self::Spi { trigger: Trigger::EdgeRising, .. } | Self::Ppi { trigger: Trigger::EdgeRising, .. }
        )
    }
}

/// One entry of `iommus`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IommuSpecifier {
    /// The IOMMU's node.
    pub iommu: NodeId,
    /// The stream id (first cell; 0 for an IOMMU that needs no cell).
    pub stream: StreamId,
    /// Bits of the stream id that do not matter: the second cell, or `stream-match-mask` of the SMMU.
    pub mask: u32,
    /// The cells as they are.
    pub cells: Vec<u32>,
}

/// One entry of an SMMU's legacy `mmu-masters`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LegacyMaster {
    /// The master's node.
    pub master: NodeId,
    /// Its stream ids, as many as its `#stream-id-cells` says.
    pub streams: Vec<StreamId>,
}

/// The configuration address of a PCI function: its requester id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rid(pub u16);

/// `01:02.3`.
impl fmt::Display for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bus, device, function) = (self.0 >> 8, self.0 >> 3 & 0x1f, self.0 & 7);
        f.pad(&format!("{bus:02x}:{device:02x}.{function}"))
    }
}

/// One entry of `iommu-map` or `msi-map`: `count` requester ids from `first` become ids from `base` at `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapEntry {
    /// First requester id.
    pub first: u32,
    /// The IOMMU's or interrupt controller's node.
    pub target: NodeId,
    /// First id there. The last one fits into 32 bits.
    pub base: u32,
    /// How many; at least 1.
    pub count: u32,
}

/// `iommu-map` or `msi-map` of a host bridge, with its mask.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IdMap {
    /// Bits of the requester id that are looked up.
    pub mask: u32,
    /// The entries; the first that covers an id counts, as in Linux.
    pub entries: Vec<MapEntry>,
}

impl Default for IdMap {
    fn default() -> Self {
        Self { mask: 0xffff, entries: Vec::new() }
    }
}

impl IdMap {
    /// Where a requester id goes, and as what; `None` in a gap.
    pub fn look_up(&self, rid: Rid) -> Option<(NodeId, u32)> {
        let id = u32::from(rid.0) & self.mask;
        self.entries.iter().find_map(|e| {
            let offset = id.checked_sub(e.first).filter(|o| *o < e.count)?;
            Some((e.target, e.base.checked_add(offset)?))
        })
    }
}

/// A base address register of a PCI function, as `assigned-addresses` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bar {
    /// Offset of the register in configuration space: 0x10 for BAR 0.
    pub register: u8,
    /// Where the CPU sees it.
    pub region: Region,
}

/// One node, with the properties that everybody needs decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub(super) id: NodeId,
    pub(super) parent: Option<NodeId>,
    pub(super) children: Vec<NodeId>,
    /// Full path, `/` for the root.
    pub path: String,
    /// Labels, where the tree carries `__symbols__`.
    pub labels: Vec<String>,
    /// `compatible`, most specific first.
    pub compatible: Vec<String>,
    /// What Portcullis models it as.
    pub kind: Option<Kind>,
    /// `phandle` (or `linux,phandle`).
    pub phandle: Option<u32>,
    /// `status` of the node itself.
    pub status: Status,
    /// True if the node and all its parents are okay: a system would use it.
    pub available: bool,
    /// `reg`, translated to CPU addresses. Empty for nodes on buses that the CPU cannot address, such as I2C.
    pub reg: Vec<Region>,
    /// `interrupts` or `interrupts-extended`.
    pub interrupts: Vec<Interrupt>,
    /// `iommus`.
    pub iommus: Vec<IommuSpecifier>,
    /// `mmu-masters`, on an SMMU.
    pub mmu_masters: Vec<LegacyMaster>,
    /// The configuration address, below a PCIe host bridge.
    pub rid: Option<Rid>,
    /// `assigned-addresses`, below a PCIe host bridge; those that the CPU can reach.
    pub bars: Vec<Bar>,
    /// `iommu-map`, on a PCIe host bridge.
    pub iommu_map: IdMap,
    /// `msi-map`, on a PCIe host bridge.
    pub msi_map: IdMap,
    /// `msi-parent`: the controller and the first cell of the specifier (0 where it has none), on an SMMUv3.
    pub msi_parent: Option<(NodeId, u32)>,
    /// True if DMA of the device (or the walks of an SMMU) is coherent: `dma-coherent` here or at the nearest parent
    /// that says something, as in Linux.
    pub dma_coherent: bool,
    pub(super) properties: BTreeMap<String, Vec<u8>>,
}

impl Node {
    /// Its identity in its tree.
    pub fn id(&self) -> NodeId {
        self.id
    }
    /// Its parent; `None` for the root.
    pub fn parent(&self) -> Option<NodeId> {
        self.parent
    }
    /// Its children in order.
    pub fn children(&self) -> &[NodeId] {
        &self.children
    }
    /// Name with unit address; empty for the root.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }
    /// Name without unit address.
    pub fn base_name(&self) -> &str {
        self.name().split('@').next().unwrap_or_default()
    }
    /// True if `compatible` has this string.
    pub fn is_compatible(&self, with: &str) -> bool {
        self.compatible.iter().any(|c| c == with)
    }
    /// The value of a property, raw.
    pub fn property(&self, name: &str) -> Option<&[u8]> {
        self.properties.get(name).map(Vec::as_slice)
    }
    /// The names and values of all properties.
    pub fn properties(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.properties.iter().map(|(name, value)| (name.as_str(), value.as_slice()))
    }
    /// A property of one cell.
    pub fn cell(&self, name: &str) -> Result<Option<u32>, TreeError> {
        let Some(value) = self.property(name) else { return Ok(None) };
        match value.try_into() {
            Ok(bytes) => Ok(Some(u32::from_be_bytes(bytes))),
            Err(_) => Err(self.malformed(name, format!("{} bytes instead of one cell of 4", value.len()))),
        }
    }
    /// A property that is a list of cells.
    pub fn cells(&self, name: &str) -> Result<Option<Vec<u32>>, TreeError> {
        let Some(value) = self.property(name) else { return Ok(None) };
        let (cells, rest) = value.as_chunks::<4>();
        if !rest.is_empty() {
            let reason = format!("{} bytes, not a whole number of 4-byte cells", value.len());
            return Err(self.malformed(name, reason));
        }
        Ok(Some(cells.iter().map(|c| u32::from_be_bytes(*c)).collect()))
    }
    /// A property that is one string.
    pub fn string(&self, name: &str) -> Result<Option<&str>, TreeError> {
        let Some(value) = self.property(name) else { return Ok(None) };
        let text = value.strip_suffix(&[0]).and_then(|t| std::str::from_utf8(t).ok());
        match text {
            Some(text) if !text.contains('\0') => Ok(Some(text)),
            _ => Err(self.malformed(name, "not one string that ends with NUL")),
        }
    }
    /// A property that is a list of strings.
    pub fn strings(&self, name: &str) -> Result<Vec<&str>, TreeError> {
        let Some(value) = self.property(name) else { return Ok(Vec::new()) };
        match value.strip_suffix(&[0]).and_then(|t| std::str::from_utf8(t).ok()) {
            Some(text) => Ok(text.split('\0').collect()),
            None => Err(self.malformed(name, "not a list of strings that end with NUL")),
        }
    }
    pub(crate) fn malformed(&self, property: &str, reason: impl Into<String>) -> TreeError {
        TreeError::property(&self.path, property, reason)
    }
}
