//! From a tree to a description: picks the nodes and reads their properties.

use std::collections::HashMap;

use portcullis_arch::zynqmp::{self, PlPort, SmmuPath};
use portcullis_arch::{Pa, StreamId};

use super::{
    Agreement, Chip, DeclaredStream, DmaChannel, Its, MachineDescription, Master, MemoryRegion, NodeInfo,
    NotModelled, PlWriter, ReservedRegion, Smmu, Streams,
};
use crate::compatible::{CHIP_ADDRESS, Kind, NAME, ZYNQMP};
use crate::tree::{self, Node, NodeId, Region, Status, Tree, TreeError};

impl MachineDescription {
    /// Describes the machine of a tree.
    ///
    /// # Errors
    /// A modelled device without `reg`, with a property that makes no sense, or whose registers overlap those of
    /// another one in use, or memory; memory regions that overlap; a `mmu-masters` entry for a master that has
    /// `iommus` too. The message names node and property.
    pub fn from_tree(tree: &Tree) -> Result<Self, TreeError> {
        let builder = Builder::new(tree)?;
        let mut desc = builder.describe()?;
        super::check::overlaps(&desc)?;
        super::check_v3::stream_range(&desc)?;
        super::check::findings(&mut desc);
        Ok(desc)
    }
}

/// Most SMMUs.
const MAX_SMMUS: usize = 64;
/// Most masters.
const MAX_MASTERS: usize = 1024;
/// Most regions of memory, and of reserved memory.
const MAX_REGIONS: usize = 1024;

/// Refuses what no real machine has: later steps compare everything with everything.
fn limit(count: usize, limit: usize, what: &'static str, node: &str) -> Result<(), TreeError> {
    if count > limit {
        return Err(TreeError::Limit { node: node.into(), what, limit: limit as u64 });
    }
    Ok(())
}

pub(super) struct Builder<'t> {
    pub tree: &'t Tree,
    chip: Option<Chip>,
    pub smmus: Vec<&'t Node>,
    /// In the order of [`MachineDescription::its`].
    pub its: Vec<NodeId>,
    /// Legacy streams by master.
    legacy: HashMap<NodeId, Vec<DeclaredStream>>,
}

impl<'t> Builder<'t> {
    fn new(tree: &'t Tree) -> Result<Self, TreeError> {
        let zynqmp = tree.root().is_some_and(|r| r.is_compatible(ZYNQMP));
        let smmus: Vec<&Node> = tree.nodes().iter().filter(|n| n.kind.is_some_and(Kind::is_smmu)).collect();
        limit(smmus.len(), MAX_SMMUS, "SMMUs", "/")?;
        let mut legacy: HashMap<NodeId, Vec<DeclaredStream>> = HashMap::new();
        for (index, smmu) in smmus.iter().enumerate() {
            for entry in &smmu.mmu_masters {
                let both = tree.node(entry.master).filter(|m| !m.iommus.is_empty());
                if let Some(master) = both {
                    let reason = format!("{} has `iommus` too, only one binding can be meant", master.path);
                    return Err(smmu.malformed("mmu-masters", reason));
                }
                let streams = entry.streams.iter().map(|id| DeclaredStream { smmu: index, id: *id, mask: 0 });
                legacy.entry(entry.master).or_default().extend(streams);
            }
        }
        let its: Vec<_> = tree.nodes().iter().filter(|n| n.kind == Some(Kind::Its)).map(Node::id).collect();
        limit(its.len(), MAX_SMMUS, "interrupt translation services", "/")?;
        Ok(Self { tree, chip: zynqmp.then_some(Chip::ZynqMp), smmus, its, legacy })
    }

    fn describe(&self) -> Result<MachineDescription, TreeError> {
        let root = self.tree.root();
        let mut desc = MachineDescription {
            model: root
                .and_then(|r| r.string("model").ok().flatten())
                .unwrap_or("(no model name)")
                .to_owned(),
            compatible: root.map(|r| r.compatible.clone()).unwrap_or_default(),
            chip: self.chip,
            memory: self.memory()?,
            reserved: self.reserved()?,
            smmus: Vec::new(),
            dma_channels: Vec::new(),
            pl_writers: Vec::new(),
            axi_dmas: Vec::new(),
            dma_proxies: Vec::new(),
            nics: Vec::new(),
            its: Vec::new(),
            pcie_hosts: Vec::new(),
            test_devices: Vec::new(),
            masters: Vec::new(),
            not_modelled: Vec::new(),
            findings: self.tree.findings().to_vec(),
            unused_phandle: self.tree.unused_phandle(),
        };
        for node in self.tree.nodes() {
            match node.kind {
                Some(kind @ (Kind::Mmu500 | Kind::SmmuV2 | Kind::SmmuV3)) => {
                    desc.smmus.push(self.smmu(node, kind)?);
                }
                Some(Kind::Its) => {
                    desc.its.push(Its { node: self.info(node), region: self.registers(node)? });
                }
                Some(Kind::PcieHost) => desc.pcie_hosts.push(self.pcie_host(node)?),
                Some(Kind::TestDevice) => desc.test_devices.push(self.test_device(node)?),
                Some(Kind::Zdma) => desc.dma_channels.push(self.dma_channel(node)?),
                Some(Kind::PlWriter) => desc.pl_writers.push(self.pl_writer(node)?),
                Some(Kind::AxiDma) => desc.axi_dmas.push(self.axi_dma(node)?),
                Some(Kind::DmaProxy) => desc.dma_proxies.push(self.dma_proxy(node)?),
                Some(Kind::Nic) => desc.nics.push(self.nic(node)?),
                None => {
                    if let (Some(compatible), true) = (node.compatible.first(), node.parent().is_some()) {
                        desc.not_modelled.push(NotModelled {
                            path: node.path.clone(),
                            compatible: compatible.clone(),
                            status: node.status.clone(),
                        });
                    }
                }
            }
            desc.masters.extend(self.master(node)?);
            limit(desc.masters.len(), MAX_MASTERS, "masters", &node.path)?;
            limit(desc.dma_channels.len(), MAX_MASTERS, "DMA channels", &node.path)?;
            limit(desc.test_devices.len(), MAX_MASTERS, "test devices", &node.path)?;
            limit(desc.axi_dmas.len(), MAX_MASTERS, "AXI DMA cores", &node.path)?;
            limit(desc.dma_proxies.len(), MAX_MASTERS, "DMA proxies", &node.path)?;
            limit(desc.nics.len(), MAX_MASTERS, "network devices", &node.path)?;
            limit(desc.pcie_hosts.len(), MAX_SMMUS, "PCIe host bridges", &node.path)?;
        }
        Ok(desc)
    }

    pub fn info(&self, node: &Node) -> NodeInfo {
        let mut disabled_parents = Vec::new();
        let mut above = node.parent();
        while let Some(parent) = above.and_then(|id| self.tree.node(id)) {
            if parent.status != Status::Okay {
                disabled_parents.push(parent.path.clone());
            }
            above = parent.parent();
        }
        disabled_parents.reverse();
        NodeInfo {
            path: node.path.clone(),
            name: name(node),
            labels: node.labels.clone(),
            phandle: node.phandle,
            status: node.status.clone(),
            available: node.available,
            disabled_parents,
        }
    }

    fn memory(&self) -> Result<Vec<MemoryRegion>, TreeError> {
        let mut memory: Vec<MemoryRegion> = Vec::new();
        let nodes = self.tree.nodes().iter().filter(|n| tree::is_memory(n) && n.available);
        for node in nodes {
            let used = node.reg.iter().filter(|r| r.size != 0);
            memory.extend(used.map(|r| MemoryRegion { path: node.path.clone(), region: *r }));
            limit(memory.len(), MAX_REGIONS, "memory regions", &node.path)?;
        }
        memory.sort_by_key(|m| m.region);
        for pair in memory.windows(2) {
            if let [a, b] = pair
                && a.region.overlaps(&b.region)
            {
                let reason = format!("memory {} overlaps memory {} of {}", b.region, a.region, a.path);
                return Err(TreeError::property(&b.path, "reg", reason));
            }
        }
        Ok(memory)
    }

    fn reserved(&self) -> Result<Vec<ReservedRegion>, TreeError> {
        let mut reserved = Vec::new();
        for region in self.tree.memory_reservations() {
            reserved.push(ReservedRegion {
                path: "/memreserve/".into(),
                size: region.size,
                region: Some(region),
                no_map: false,
                compatible: Vec::new(),
            });
        }
        let children = self.tree.find("/reserved-memory").map(Node::children).unwrap_or_default();
        for node in children.iter().filter_map(|id| self.tree.node(*id)).filter(|n| n.available) {
            let common = ReservedRegion {
                path: node.path.clone(),
                region: None,
                size: 0,
                no_map: node.property("no-map").is_some(),
                compatible: node.compatible.clone(),
            };
            if node.reg.is_empty() {
                let size = node.cells("size").ok().flatten().unwrap_or_default();
                let size = size.iter().fold(0u64, |n, cell| n << 32 | u64::from(*cell));
                reserved.push(ReservedRegion { size, ..common.clone() });
            }
            reserved.extend(node.reg.iter().map(|region| ReservedRegion {
                region: Some(*region),
                size: region.size,
                ..common.clone()
            }));
            limit(reserved.len(), MAX_REGIONS, "reserved memory regions", &node.path)?;
        }
        Ok(reserved)
    }

    pub fn registers(&self, node: &Node) -> Result<Region, TreeError> {
        match node.reg.first() {
            Some(region) if region.size != 0 => Ok(*region),
            Some(_) => Err(node.malformed("reg", "its size is 0")),
            None => {
                Err(TreeError::node(&node.path, "it has no `reg`, so nobody knows where its registers are"))
            }
        }
    }

    /// Where the chip has the registers of a node: at its own address, or, for a device that was moved, where it says.
    fn on_chip(&self, node: &Node) -> Result<Option<Pa>, TreeError> {
        if self.chip == Some(Chip::ZynqMp) {
            return Ok(node.reg.first().map(|r| r.base));
        }
        if node.kind.is_none() {
            return Ok(None);
        }
        let Some(cells) = node.cells(CHIP_ADDRESS)? else { return Ok(None) };
        match cells.as_slice() {
            [high, low] => Ok(Some(Pa(u64::from(*high) << 32 | u64::from(*low)))),
            _ => Err(node.malformed(CHIP_ADDRESS, format!("{} cells instead of 2", cells.len()))),
        }
    }

    fn smmu(&self, node: &Node, kind: Kind) -> Result<Smmu, TreeError> {
        let legacy = !node.mmu_masters.is_empty();
        let v3 = if kind == Kind::SmmuV3 { Some(self.smmu_v3(node)?) } else { None };
        Ok(Smmu {
            node: self.info(node),
            kind,
            v3,
            region: self.registers(node)?,
            iommu_cells: node.cell("#iommu-cells")?.unwrap_or(0),
            stream_match_mask: node.cell("stream-match-mask")?.unwrap_or(0),
            global_interrupts: node.cell("#global-interrupts")?.unwrap_or(1) as usize,
            interrupts: node.interrupts.clone(),
            dma_coherent: node.dma_coherent,
            legacy,
        })
    }

    fn dma_channel(&self, node: &Node) -> Result<DmaChannel, TreeError> {
        let region = self.registers(node)?;
        let bus_width = match node.cell("xlnx,bus-width")? {
            Some(width @ (64 | 128)) => width,
            Some(other) => {
                return Err(node.malformed("xlnx,bus-width", format!("{other} instead of 64 or 128")));
            }
            None => return Err(TreeError::node(&node.path, "it has no `xlnx,bus-width`, which is required")),
        };
        Ok(DmaChannel {
            node: self.info(node),
            region,
            interrupt: node.interrupts.first().cloned(),
            bus_width,
            dma_coherent: node.dma_coherent,
            streams: self.streams(node)?,
            chip: self.on_chip(node)?.and_then(zynqmp::zdma_channel_at),
        })
    }

    fn pl_writer(&self, node: &Node) -> Result<PlWriter, TreeError> {
        let region = self.registers(node)?;
        let (port, axi_id) = pl_port(node)?;
        let ax_prot = match node.cell("portcullis,ax-prot")?.unwrap_or(0b010) {
            prot @ 0..=7 => prot as u8,
            other => {
                return Err(node.malformed("portcullis,ax-prot", format!("{other} has more than 3 bits")));
            }
        };
        Ok(PlWriter {
            node: self.info(node),
            region,
            port,
            axi_id,
            ax_prot,
            dma_coherent: node.dma_coherent,
            streams: Streams {
                actual: port.stream(axi_id).into_iter().collect(),
                declared: self.declared(node),
            },
        })
    }

    /// What the tree puts behind the SMMUs that are modelled.
    pub fn declared(&self, node: &Node) -> Vec<DeclaredStream> {
        let mut declared: Vec<DeclaredStream> = node
            .iommus
            .iter()
            .filter_map(|spec| {
                let smmu = self.smmus.iter().position(|s| s.id() == spec.iommu)?;
                Some(DeclaredStream { smmu, id: spec.stream, mask: spec.mask })
            })
            .collect();
        declared.extend(self.legacy.get(&node.id()).into_iter().flatten());
        declared.extend(self.mapped(node));
        declared
    }

    pub fn streams(&self, node: &Node) -> Result<Streams, TreeError> {
        let actual: Vec<StreamId> = match self.on_chip(node)?.and_then(zynqmp::master_at) {
            Some(located) => located.streams().collect(),
            None => Vec::new(),
        };
        Ok(Streams { actual, declared: self.declared(node) })
    }

    fn master(&self, node: &Node) -> Result<Option<Master>, TreeError> {
        let located = self.on_chip(node)?.and_then(zynqmp::master_at);
        let writer = node.kind == Some(Kind::PlWriter);
        // Every function below a bridge that is modelled is a master, but for bridges.
        let function = self.function(node);
        let named = !node.iommus.is_empty() || self.legacy.contains_key(&node.id());
        if located.is_none() && !writer && node.kind != Some(Kind::AxiDma) && function.is_none() && !named {
            return Ok(None);
        }
        let core = core_port(node)?;
        let (title, path, route_bit, streams) = if let Some((port, ids)) = core {
            let actual = ids.filter_map(|id| port.stream(id)).collect();
            let title = format!("AXI DMA on {}", port.info().signal);
            (title, Some(port.info().path), None, Streams { actual, declared: self.declared(node) })
        } else if writer {
            let (port, axi_id) = pl_port(node)?;
            let actual = port.stream(axi_id).into_iter().collect();
            let title = format!("PL writer on {}", port.info().signal);
            (title, Some(port.info().path), None, Streams { actual, declared: self.declared(node) })
        } else if let Some(located) = located {
            let m = located.master;
            let title = if located.count < m.count {
                format!("{} {}", m.name, located.first)
            } else {
                m.name.to_owned()
            };
            (title, Some(m.path), m.route_bit, self.streams(node)?)
        } else {
            let streams = Streams { actual: Vec::new(), declared: self.declared(node) };
            (name(node), None, None, streams)
        };
        Ok(Some(Master {
            node: self.info(node),
            title,
            rid: function,
            pasid_bits: super::v3::pasid_bits(node)?,
            can_stall: node.property("dma-can-stall").is_some(),
            ats: node.property("portcullis,ats").is_some(),
            pri: node.property("portcullis,pri").is_some(),
            region: node.reg.first().copied().or_else(|| node.bars.first().map(|b| b.region)),
            path,
            route_bit,
            agreement: agreement(path, &streams),
            streams,
            dma_coherent: node.dma_coherent,
        }))
    }
}

/// The name of a device: that of its node, or, for a device that was moved, the one it had before.
fn name(node: &Node) -> String {
    match node.string(NAME) {
        Ok(Some(before)) if node.kind.is_some() && !before.is_empty() => before.to_owned(),
        _ => node.name().to_owned(),
    }
}

pub(super) fn pl_port(node: &Node) -> Result<(PlPort, u8), TreeError> {
    const PORT: &str = "portcullis,pl-port";
    let names = || zynqmp::PL_PORTS.map(|p| p.name).join(", ");
    let Some(name) = node.string(PORT)? else {
        return Err(TreeError::node(&node.path, format!("it has no `{PORT}`; give one of {}", names())));
    };
    let Some(port) = PlPort::from_name(name) else {
        return Err(node.malformed(PORT, format!("`{name}` is no port; give one of {}", names())));
    };
    match node.cell("portcullis,axi-id")?.unwrap_or(0) {
        id @ 0..=63 => Ok((port, id as u8)),
        other => Err(node.malformed("portcullis,axi-id", format!("{other} has more than 6 bits"))),
    }
}

/// The port of an AXI DMA core that says it, and the AXI IDs it sends.
fn core_port(node: &Node) -> Result<Option<(PlPort, std::ops::Range<u8>)>, TreeError> {
    if node.kind != Some(Kind::AxiDma) || node.property("portcullis,pl-port").is_none() {
        return Ok(None);
    }
    let (port, id) = pl_port(node)?;
    Ok(Some((port, id..id.saturating_add(3).min(64))))
}

fn agreement(path: Option<SmmuPath>, streams: &Streams) -> Agreement {
    match path {
        Some(SmmuPath::NotBehind) => Agreement::NotBehind,
        _ if streams.declared.is_empty() => Agreement::NotDeclared,
        _ if streams.actual.is_empty() => Agreement::Unknown,
        _ => {
            let declared = |id: &StreamId| streams.declared.iter().any(|d| d.matches(*id));
            if streams.actual.iter().all(declared) { Agreement::Agrees } else { Agreement::Differs }
        }
    }
}
