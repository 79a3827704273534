//! A device tree, loaded and checked.
//!
//! [`Tree::load`] takes a `.dtb`, or a `.dts` through `dtc`; [`Tree::from_dtb`] takes bytes. Any bytes give a tree
//! or one error that names the node and property, or the offset; never a panic, and never more work than the
//! size of the input justifies. A [`Tree`] is immutable: [`Tree::apply_overlay`] gives a new one, checked
//! again.
//!
//! | What | Decoded into |
//! |---|---|
//! | `reg`, `ranges`, `#address-cells`, `#size-cells` | [`Node::reg`], CPU addresses |
//! | `interrupts`, `interrupts-extended`, `interrupt-parent` | [`Node::interrupts`] |
//! | `iommus`, `#iommu-cells`, `stream-match-mask` | [`Node::iommus`] |
//! | `mmu-masters`, `#stream-id-cells` | [`Node::mmu_masters`] |
//! | `iommu-map`, `iommu-map-mask`, `msi-map`, `msi-map-mask` of a PCIe host bridge that is modelled | [`Node::iommu_map`], [`Node::msi_map`] |
//! | `reg` and `assigned-addresses` below such a bridge | [`Node::rid`], [`Node::bars`] |
//! | `msi-parent` of an SMMUv3 | [`Node::msi_parent`] |
//! | `phandle`, `status`, `compatible`, `dma-coherent`, `__symbols__` | [`Node`] |
//!
//! `interrupt-map` and `dma-ranges` are not evaluated.
//!
//! # What is an error
//!
//! Errors: a damaged blob; two nodes or properties of one name; a phandle that is malformed, 0, -1 or used twice
//! (every reference to it is ambiguous); anything wrong in `iommus` or `mmu-masters` of any node, or in `iommu-map` of a
//! modelled bridge (a missing phandle or `#iommu-cells`, a cut entry, a stream id wider than an MMU-500's 15 bits), since it decides who may reach which
//! memory; anything wrong in `reg` or the interrupts of a node that Portcullis models ([`crate::compatible`]), of
//! memory and of reserved memory. Findings ([`Tree::findings`]): the same in any other node, and an unknown `status`.

mod blob;
mod decode;
mod error;
mod node;
mod pcie;
mod source;

use std::collections::{BTreeMap, HashMap};

use dtoolkit::Node as _;
use dtoolkit::Property as _;
use dtoolkit::error::OverlayError;
use dtoolkit::model::overlay::OverlayApplier;
use dtoolkit::model::{DeviceTree, DeviceTreeNode};

pub use blob::{MAX_BYTES, MAX_DEPTH, MAX_NODES};
pub use error::{Finding, Level, TreeError};
pub use node::{
    Bar, IdMap, Interrupt, IommuSpecifier, LegacyMaster, MapEntry, Node, NodeId, Region, Rid, Status, Trigger,
};

use crate::compatible::Kind;
use decode::Decoder;

/// Largest overlay accepted: the library that applies overlays takes time that grows with their size squared.
pub const MAX_OVERLAY: usize = 256 << 10;
/// Most findings kept.
const MAX_FINDINGS: usize = 200;

/// A checked device tree.
#[derive(Clone, Debug)]
pub struct Tree {
    model: DeviceTree,
    nodes: Vec<Node>,
    paths: HashMap<String, NodeId>,
    phandles: HashMap<u32, NodeId>,
    findings: Vec<Finding>,
}

/// Two trees are equal if they have the same nodes, properties and memory reservations.
impl PartialEq for Tree {
    fn eq(&self, other: &Self) -> bool {
        self.model == other.model
    }
}

impl Tree {
    /// Reads and checks a flattened device tree.
    pub fn from_dtb(bytes: &[u8]) -> Result<Self, TreeError> {
        Self::check(blob::read(bytes)?)
    }

    /// The tree as a blob.
    pub fn to_dtb(&self) -> Vec<u8> {
        self.model.to_dtb()
    }

    /// The tree with an overlay (a `.dtbo` as `dtc -@` makes it) applied.
    pub fn apply_overlay(&self, overlay: &[u8]) -> Result<Self, TreeError> {
        if overlay.len() > MAX_OVERLAY {
            return Err(TreeError::TooLarge { bytes: overlay.len() as u64, limit: MAX_OVERLAY as u64 });
        }
        let overlay = blob::read(overlay)?;
        if !overlay.root.children().any(|c| c.name_without_address() == "fragment") {
            return Err(TreeError::Overlay("it has no fragment@ node, so it is no overlay".into()));
        }
        let mut model = self.model.clone();
        OverlayApplier::new(&mut model).apply_overlay_tree(overlay).map_err(overlay_error)?;
        let after = flatten(&model.root)?;
        // The library lets an overlay replace a phandle, and every reference to the old one would dangle.
        let replaced = after.iter().find_map(|node| {
            let before = self.find(&node.path)?.phandle?;
            (node.phandle != Some(before)).then_some((node, before))
        });
        if let Some((node, before)) = replaced {
            return Err(TreeError::Overlay(format!(
                "it gives {} a new phandle (it puts a label on it), but other nodes refer to it by its phandle \
                 {before:#x}; refer to it by that phandle or by the tree's own label",
                node.path
            )));
        }
        Self::check(model)
    }

    /// The tree after `edit` has changed it, checked again.
    ///
    /// # Errors
    /// What `edit` returns, or what is wrong with the changed tree, as [`Tree::from_dtb`].
    pub fn edit(
        &self,
        edit: impl FnOnce(&mut DeviceTree) -> Result<(), TreeError>,
    ) -> Result<Self, TreeError> {
        let mut model = self.model.clone();
        edit(&mut model)?;
        Self::check(model)
    }

    /// The memory reservation block (`/memreserve/`).
    pub fn memory_reservations(&self) -> impl Iterator<Item = Region> {
        self.model
            .memory_reservations
            .iter()
            .map(|r| Region { base: portcullis_arch::Pa(r.address()), size: r.size() })
    }

    /// All nodes, parents before children, in the order of the file.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }
    /// The root node.
    pub fn root(&self) -> Option<&Node> {
        self.nodes.first()
    }
    /// A node by its identity. `None` for an identity from another tree.
    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0 as usize)
    }
    /// A node by its full path.
    pub fn find(&self, path: &str) -> Option<&Node> {
        self.node(*self.paths.get(path)?)
    }
    /// A node by its phandle.
    pub fn by_phandle(&self, phandle: u32) -> Option<&Node> {
        self.node(*self.phandles.get(&phandle)?)
    }
    /// A phandle that no node has yet.
    pub fn unused_phandle(&self) -> Option<u32> {
        let next = self.phandles.keys().max().copied().unwrap_or(0).checked_add(1)?;
        (next != u32::MAX).then_some(next)
    }
    /// What was noticed while checking.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The node a person means: a path, a label (with or without `&`), an alias, or a node's name with or without
    /// unit address where only one node has it.
    pub fn resolve(&self, name: &str) -> Result<&Node, TreeError> {
        let bare = name.strip_prefix('&').unwrap_or(name);
        if let Some(node) = self.find(bare) {
            return Ok(node);
        }
        if let Some(node) = self.nodes.iter().find(|n| n.labels.iter().any(|l| l == bare)) {
            return Ok(node);
        }
        if let Some(aliases) = self.find("/aliases")
            && let Ok(Some(path)) = aliases.string(bare)
            && let Some(node) = self.find(path)
        {
            return Ok(node);
        }
        let named = |matches: &dyn Fn(&Node) -> bool| self.nodes.iter().filter(|n| matches(n)).collect();
        let mut found: Vec<&Node> = named(&|n| n.name() == bare);
        if found.is_empty() {
            found = named(&|n| n.base_name() == bare);
        }
        match found.as_slice() {
            [node] => Ok(node),
            [] => {
                let word = bare.rsplit('/').next().unwrap_or(bare).split('@').next().unwrap_or(bare);
                let near: Vec<&Node> = named(&|n| word.len() >= 3 && n.name().contains(word));
                let similar = near.iter().take(8).map(|n| n.path.clone()).collect();
                Err(TreeError::NoSuchNode { name: name.into(), similar })
            }
            many => Err(TreeError::AmbiguousNode {
                name: name.into(),
                paths: many.iter().take(20).map(|n| n.path.clone()).collect(),
            }),
        }
    }

    fn check(model: DeviceTree) -> Result<Self, TreeError> {
        let mut nodes = flatten(&model.root)?;
        let mut findings = Findings(Vec::new());
        let mut paths = HashMap::new();
        let mut phandles: HashMap<u32, NodeId> = HashMap::new();
        for node in &nodes {
            paths.insert(node.path.clone(), node.id);
            if let Some(phandle) = node.phandle
                && let Some(first) = phandles.insert(phandle, node.id)
            {
                let first = nodes.get(first.0 as usize).map_or("", |n| &n.path);
                let reason = format!("{phandle:#x} is the phandle of {first} already");
                return Err(node.malformed("phandle", reason));
            }
            if let Status::Other(text) = &node.status
                && !(text == "reserved" || text == "fail" || text.starts_with("fail-"))
            {
                findings.add(&node.path, "status", format!("`{text}` is unknown, taken as not available"));
            }
        }
        let mut labels: Vec<(NodeId, String)> = Vec::new();
        if let Some(symbols) = paths.get("/__symbols__").and_then(|id| nodes.get(id.0 as usize)) {
            for label in symbols.properties.keys() {
                if let Ok(Some(path)) = symbols.string(label)
                    && let Some(id) = paths.get(path)
                {
                    labels.push((*id, label.clone()));
                }
            }
        }
        for (id, label) in labels {
            if let Some(node) = nodes.get_mut(id.0 as usize) {
                node.labels.push(label);
            }
        }
        let decoded = decode_all(&nodes, &phandles, &mut findings)?;
        for (node, references) in nodes.iter_mut().zip(decoded) {
            node.reg = references.reg;
            node.interrupts = references.interrupts;
            node.iommus = references.iommus;
            node.mmu_masters = references.mmu_masters;
            node.rid = references.rid;
            node.bars = references.bars;
            node.iommu_map = references.iommu_map;
            node.msi_map = references.msi_map;
            node.msi_parent = references.msi_parent;
        }
        Ok(Self { model, nodes, paths, phandles, findings: findings.0 })
    }
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, node: &str, property: &str, message: impl Into<String>) {
        match self.0.len() {
            0..MAX_FINDINGS => self.0.push(Finding::warning(node, Some(property), message)),
            MAX_FINDINGS => self.0.push(Finding::warning("/", None, "more findings are not shown")),
            _ => {}
        }
    }
    /// Keeps an error in a node that is not modelled as a finding. A limit stays an error.
    fn soften<T: Default>(&mut self, strict: bool, result: Result<T, TreeError>) -> Result<T, TreeError> {
        match result {
            Err(TreeError::Property { node, property, reason }) if !strict => {
                self.add(&node, &property, reason);
                Ok(T::default())
            }
            other => other,
        }
    }
}

#[derive(Default)]
struct References {
    reg: Vec<Region>,
    interrupts: Vec<Interrupt>,
    iommus: Vec<IommuSpecifier>,
    mmu_masters: Vec<LegacyMaster>,
    rid: Option<Rid>,
    bars: Vec<Bar>,
    iommu_map: IdMap,
    msi_map: IdMap,
    msi_parent: Option<(NodeId, u32)>,
}

fn decode_all(
    nodes: &[Node],
    phandles: &HashMap<u32, NodeId>,
    findings: &mut Findings,
) -> Result<Vec<References>, TreeError> {
    let mut decoder = Decoder::new(nodes, phandles);
    let mut all: Vec<References> = Vec::with_capacity(nodes.len());
    // The bridge that a node is below, by node.
    let mut hosts: Vec<Option<NodeId>> = Vec::with_capacity(nodes.len());
    for node in nodes {
        let strict = is_strict(node);
        let above = node.parent.and_then(|p| nodes.get(p.0 as usize));
        let host = match above {
            Some(parent) if parent.kind == Some(Kind::PcieHost) => Some(parent.id),
            Some(parent) => hosts.get(parent.id.0 as usize).copied().flatten(),
            None => None,
        };
        hosts.push(host);
        let reg = if host.is_some() { Ok(Vec::new()) } else { decoder.reg(node) };
        let interrupts = decoder.interrupts(node);
        let mut references = References {
            reg: findings.soften(strict, reg)?,
            interrupts: findings.soften(strict, interrupts)?,
            iommus: decoder.iommus(node)?,
            mmu_masters: decoder.mmu_masters(node)?,
            ..References::default()
        };
        if let Some(host) = host.and_then(|id| nodes.get(id.0 as usize)) {
            let (rid, bars) = (decoder.rid(node), decoder.bars(node, host));
            references.rid = findings.soften(strict, rid)?;
            references.bars = findings.soften(strict, bars)?;
        }
        match node.kind {
            Some(Kind::PcieHost) => {
                references.iommu_map = decoder.id_map(node, &pcie::IOMMU_MAP)?;
                references.msi_map = decoder.id_map(node, &pcie::MSI_MAP)?;
            }
            Some(Kind::SmmuV3) => references.msi_parent = decoder.msi_parent(node)?,
            _ => {}
        }
        let reachable = host.is_none() && !is_reserved(node);
        if strict && node.property("reg").is_some() && references.reg.is_empty() && reachable {
            let reason =
                "the CPU cannot reach this address: a `ranges` above it is missing or does not cover it";
            return Err(node.malformed("reg", reason));
        }
        all.push(references);
    }
    Ok(all)
}

fn is_reserved(node: &Node) -> bool {
    node.path.starts_with("/reserved-memory/")
}

/// True for nodes in which anything malformed is an error.
fn is_strict(node: &Node) -> bool {
    node.kind.is_some() || is_memory(node) || is_reserved(node)
}

/// True for nodes that describe RAM.
pub(crate) fn is_memory(node: &Node) -> bool {
    node.property("device_type") == Some(b"memory\0") || (node.path.starts_with("/memory@"))
}

/// Lists the nodes, parents first, and decodes what needs no other node.
fn flatten(root: &DeviceTreeNode) -> Result<Vec<Node>, TreeError> {
    let mut nodes: Vec<Node> = Vec::new();
    let mut open: Vec<(&DeviceTreeNode, Option<NodeId>, usize)> = vec![(root, None, 1)];
    while let Some((model, parent, depth)) = open.pop() {
        let id = NodeId(nodes.len() as u32);
        let above = parent.and_then(|p| nodes.get_mut(p.0 as usize));
        let path = match &above {
            None => "/".to_owned(),
            Some(above) if above.path == "/" => format!("/{}", model.name()),
            Some(above) => format!("{}/{}", above.path, model.name()),
        };
        // An overlay can deepen and widen a tree past what one blob may be.
        for (what, is, limit) in [
            ("nested nodes", depth, MAX_DEPTH),
            ("nodes", nodes_after(id), MAX_NODES),
            ("bytes of a path", path.len(), blob::MAX_PATH),
        ] {
            if is > limit {
                return Err(TreeError::Limit { node: path, what, limit: limit as u64 });
            }
        }
        let inherited = above.as_ref().is_none_or(|a| a.available);
        let coherent = above.as_ref().is_some_and(|a| a.dma_coherent);
        if let Some(above) = above {
            above.children.push(id);
        }
        nodes.push(decode_alone(id, parent, path, model, inherited, coherent)?);
        let children: Vec<_> = model.children().collect();
        open.extend(children.into_iter().rev().map(|c| (c, Some(id), depth + 1)));
    }
    Ok(nodes)
}

fn nodes_after(id: NodeId) -> usize {
    id.0 as usize + 1
}

fn decode_alone(
    id: NodeId,
    parent: Option<NodeId>,
    path: String,
    model: &DeviceTreeNode,
    parent_available: bool,
    parent_coherent: bool,
) -> Result<Node, TreeError> {
    let properties: BTreeMap<String, Vec<u8>> =
        model.properties().map(|p| (p.name().to_owned(), p.value().to_vec())).collect();
    let mut node = Node {
        id,
        parent,
        children: Vec::new(),
        path,
        labels: Vec::new(),
        compatible: Vec::new(),
        kind: None,
        phandle: None,
        status: Status::Okay,
        available: parent_available,
        reg: Vec::new(),
        interrupts: Vec::new(),
        iommus: Vec::new(),
        mmu_masters: Vec::new(),
        rid: None,
        bars: Vec::new(),
        iommu_map: IdMap::default(),
        msi_map: IdMap::default(),
        msi_parent: None,
        dma_coherent: parent_coherent,
        properties,
    };
    // A malformed `compatible` cannot make a node a modelled one, and Linux ignores it just so.
    node.compatible = node.strings("compatible").unwrap_or_default().into_iter().map(str::to_owned).collect();
    node.kind = Kind::of(&node.compatible);
    node.phandle = match node.cell("phandle")? {
        Some(phandle) => Some(phandle),
        None => node.cell("linux,phandle")?,
    };
    if let Some(phandle @ (0 | u32::MAX)) = node.phandle {
        return Err(node.malformed("phandle", format!("{phandle:#x} is not allowed")));
    }
    node.status = match node.string("status")? {
        None | Some("okay" | "ok") => Status::Okay,
        Some("disabled") => Status::Disabled,
        Some(other) => Status::Other(other.to_owned()),
    };
    node.available = parent_available && node.status == Status::Okay;
    if node.properties.contains_key("dma-coherent") {
        node.dma_coherent = true;
    } else if node.properties.contains_key("dma-noncoherent") {
        node.dma_coherent = false;
    }
    Ok(node)
}

fn overlay_error(error: OverlayError) -> TreeError {
    TreeError::Overlay(match error {
        OverlayError::UnresolvedSymbol(label) => format!(
            "it refers to the label `{label}`, which the tree does not have; a tree compiled without `dtc -@` has \
             no labels at all, use paths (&{{/path}}) instead"
        ),
        OverlayError::TargetNotFound(target) => format!("the tree has no node {target}"),
        other => other.to_string(),
    })
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
