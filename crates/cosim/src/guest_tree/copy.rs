//! One node of the board, copied: its registers elsewhere, its references to what is there, its interrupts renumbered.

use std::collections::{HashMap, HashSet};

use dtoolkit::model::{DeviceTreeNode, DeviceTreeProperty};
use portcullis_arch::Pa;
use portcullis_board::Tree;
use portcullis_board::compatible::{CHIP_ADDRESS, Kind, NAME, ZYNQMP};
use portcullis_board::tree::{Node, NodeId};

use super::interrupts::{Spis, shared};
use super::virt::Virt;
use super::{Device, GuestTreeError, LeftOut, Messages, Options, source};

/// Longest base name of a node (the specification's limit for a whole name is 31).
const MAX_BASE_NAME: usize = 20;

/// What is written anew, or means nothing in another tree.
const REPLACED: &[&str] = &[
    "reg",
    "status",
    "phandle",
    "linux,phandle",
    "interrupts",
    "interrupts-extended",
    "interrupt-parent",
    "dma-coherent",
    "dma-noncoherent",
    "iommus",
    "mmu-masters",
    NAME,
    CHIP_ADDRESS,
];

/// Properties that refer to nodes of the board that the guest does not have.
const REFERENCES: &[&str] = &[
    "assigned-clock-parents",
    "assigned-clock-rates",
    "assigned-clocks",
    "clock-names",
    "clocks",
    "dma-names",
    "dmas",
    "gpios",
    "interconnect-names",
    "interconnects",
    "interrupt-map",
    "interrupt-map-mask",
    "iommu-map",
    "iommu-map-mask",
    "mboxes",
    "memory-region",
    "memory-region-names",
    "msi-map",
    "msi-map-mask",
    "msi-parent",
    "nvmem-cell-names",
    "nvmem-cells",
    "nvidia,memory-controller",
    "operating-points-v2",
    "phy-names",
    "phys",
    "power-domain-names",
    "power-domains",
    "reset-names",
    "resets",
    "required-opps",
    "syscon",
];
/// The same by the end of the name.
const REFERENCE_SUFFIXES: &[&str] = &["-supply", "-gpio", "-gpios"];
/// The same by the start of the name.
const REFERENCE_PREFIXES: &[&str] = &["pinctrl-"];
/// Given by the bus to its children, of no meaning for a node without any.
const FOR_CHILDREN: &[&str] = &["ranges", "dma-ranges", "#address-cells", "#size-cells"];

/// The wires that an SMMUv3 gets that has none: those that Linux asks for.
const V3_WIRES: &[&str] = &["eventq", "priq", "gerror"];
const EDGE: u32 = 1;

pub(super) fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

pub(super) fn cells(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_be_bytes()).collect()
}

/// Appends a number of 1 or 2 cells.
pub(super) fn push_number(value: &mut Vec<u8>, number: u64, cells: usize) {
    let bytes = number.to_be_bytes();
    value.extend(if cells == 1 { bytes.get(4..).unwrap_or_default() } else { &bytes });
}

pub(super) fn is_reference(name: &str) -> bool {
    REFERENCES.contains(&name)
        || REFERENCE_SUFFIXES.iter().any(|s| name.ends_with(s))
        || REFERENCE_PREFIXES.iter().any(|s| name.starts_with(s))
}

/// The base of a node's name, if it is one that every tool takes.
pub(super) fn base_name(node: &Node) -> &str {
    let base = node.base_name();
    if source::is_name(base) && base.len() <= MAX_BASE_NAME { base } else { "device" }
}

/// The names of the copies, each with its own address. Those in use come first where two want the same name.
pub(super) fn names(devices: &[Device<'_>], base_of: &HashMap<NodeId, Pa>) -> Vec<String> {
    let placed = |d: &Device<'_>| base_of.get(&d.node.id()).copied();
    let plain = |d: &Device<'_>| {
        let at = placed(d).unwrap_or(d.region.base).get();
        format!("{}@{at:x}", base_name(d.node))
    };
    let mut used: HashSet<String> = devices.iter().filter(|d| placed(d).is_some()).map(plain).collect();
    let mut names = Vec::with_capacity(devices.len());
    for device in devices {
        let mut name = plain(device);
        if placed(device).is_none() {
            let (wanted, mut n) = (name.clone(), 1);
            while !used.insert(name.clone()) {
                name = format!("{wanted},{n}");
                n += 1;
            }
        }
        names.push(name);
    }
    names
}

/// True if the board is a chip whose streams and routes are known.
pub(super) fn is_zynqmp(board: &Tree) -> bool {
    board.root().is_some_and(|r| r.is_compatible(ZYNQMP))
}

/// Copies nodes.
pub(super) struct Copier<'a, 'q> {
    pub board: &'a Tree,
    pub virt: &'a Virt<'q>,
    pub options: Options,
    /// The new phandles of the board's nodes that are copied.
    pub phandles: &'a HashMap<NodeId, u32>,
    pub clock: u32,
    pub spis: Spis,
    /// Nodes of the board whose `iommus` are not copied.
    pub untold: HashSet<String>,
    pub left_out: &'a mut Vec<LeftOut>,
    /// The board is a chip that is known.
    pub chip: bool,
    /// The SMMU that has the ITS's device id 0.
    pub messages: Option<String>,
}

impl<'a, 'q> Copier<'a, 'q> {
    fn left_out(&mut self, node: &Node, reason: impl Into<String>) {
        self.left_out.push(LeftOut { path: node.path.clone(), reason: reason.into() });
    }

    /// A device of the board with the given name, at `base` if it is in use. Returns its interrupts, on the board and in
    /// the guest, as well.
    pub fn copy(
        &mut self,
        device: &Device<'_>,
        name: String,
        base: Option<Pa>,
    ) -> Result<(DeviceTreeNode, Vec<(u32, u32)>), GuestTreeError> {
        let node = device.node;
        let mut out = Out(DeviceTreeNode::new_unchecked(name));
        if let Some(compatible) = node.property("compatible") {
            out.add("compatible", compatible.to_vec());
        }
        let mut reg = Vec::new();
        push_number(&mut reg, base.unwrap_or(device.region.base).get(), 2);
        push_number(&mut reg, device.region.size, 2);
        out.add("reg", reg);
        let interrupts = self.interrupts(device, base.is_some(), &mut out)?;
        let dropped = self.properties(device, base.is_some(), &mut out);
        let in_use = base.is_some();
        if !dropped.is_empty() && in_use {
            self.left_out(
                node,
                format!("{}: the guest does not have what they refer to", dropped.join(", ")),
            );
        }
        if node.reg.len() > 1 && in_use {
            self.left_out(node, "`reg`: registers after the first range are not modelled");
        }
        if let Some(phandle) = self.phandles.get(&node.id()) {
            out.add("phandle", cells(&[*phandle]));
        }
        out.add(if node.dma_coherent { "dma-coherent" } else { "dma-noncoherent" }, Vec::new());
        if base.is_none() {
            out.add("status", text("disabled"));
        }
        self.iommus(node, in_use, &mut out);
        match device.kind {
            Kind::Mmu500 | Kind::SmmuV2 => {
                // Linux refuses an SMMU without.
                out.default("#global-interrupts", cells(&[1]));
                out.default("#iommu-cells", cells(&[1]));
            }
            Kind::SmmuV3 => {
                out.default("#iommu-cells", cells(&[1]));
                if in_use {
                    self.messages(node, &mut out)?;
                }
            }
            Kind::Zdma => {
                // Its driver wants both, and does not care how fast they are.
                out.add("clocks", cells(&[self.clock, self.clock]));
                out.add("clock-names", [text("clk_main"), text("clk_apb")].concat());
                out.default("#dma-cells", cells(&[1]));
            }
            _ => {}
        }
        out.add(NAME, text(&device.info.name));
        if self.chip {
            let mut address = Vec::new();
            push_number(&mut address, device.region.base.get(), 2);
            out.add(CHIP_ADDRESS, address);
        } else if let Some(address) = node.property(CHIP_ADDRESS) {
            out.add(CHIP_ADDRESS, address.to_vec());
        }
        Ok((out.0, interrupts))
    }

    fn interrupts(
        &mut self,
        device: &Device<'_>,
        in_use: bool,
        out: &mut Out,
    ) -> Result<Vec<(u32, u32)>, GuestTreeError> {
        let mut numbers = Vec::new();
        if !in_use {
            return Ok(numbers);
        }
        let mut value = Vec::new();
        for (entry, interrupt) in device.node.interrupts.iter().enumerate() {
            let found = shared(self.board, interrupt)
                .and_then(|(number, flags)| Some((number, self.spis.get(number)?, flags)));
            let Some((number, guest, flags)) = found else {
                return Err(GuestTreeError::Interrupt { node: device.node.path.clone(), entry });
            };
            value.extend(cells(&[0, guest, flags]));
            numbers.push((number, guest));
        }
        if !value.is_empty() {
            out.add("interrupts", value);
        }
        Ok(numbers)
    }

    /// Copies what is neither replaced nor a reference. Returns the names of references that are gone.
    fn properties(&mut self, device: &Device<'_>, in_use: bool, out: &mut Out) -> Vec<String> {
        let mut dropped = Vec::new();
        for (name, value) in device.node.properties() {
            let replaced = REPLACED.contains(&name) || FOR_CHILDREN.contains(&name) || name == "compatible";
            let names_of_dropped = (name == "reg-names" && device.node.reg.len() > 1)
                || (name == "interrupt-names" && (!in_use || device.node.interrupts.is_empty()));
            if replaced || names_of_dropped {
                continue;
            }
            if is_reference(name) {
                // The clocks of a channel and the messages of an SMMUv3 get others.
                let another = (device.kind == Kind::Zdma && matches!(name, "clocks" | "clock-names"))
                    || (device.kind == Kind::SmmuV3 && name == "msi-parent");
                if !another {
                    dropped.push(format!("`{name}`"));
                }
            } else if !source::is_property(name) {
                dropped.push("a property whose name no compiler takes".into());
            } else {
                out.add(name, value.to_vec());
            }
        }
        dropped
    }

    fn iommus(&mut self, node: &Node, in_use: bool, out: &mut Out) {
        if self.untold.contains(&node.path) {
            self.left_out(
                node,
                "`iommus`: the SMMU has fewer context banks than masters, newer kernels attach every one at once, and Linux has no driver for this one; \
                 its transactions come to the SMMU, as a stream that nobody told it of",
            );
            return;
        }
        let mut value = Vec::new();
        for spec in &node.iommus {
            match self.phandles.get(&spec.iommu) {
                Some(phandle) => {
                    value.extend(cells(&[*phandle]));
                    value.extend(cells(&spec.cells));
                }
                None if !in_use => {}
                None => {
                    let iommu = self.board.node(spec.iommu).map_or("?", |n| &n.path);
                    let reason = format!("`iommus`: {iommu} is no SMMU that is modelled");
                    self.left_out(node, reason);
                }
            }
        }
        if !value.is_empty() {
            out.add("iommus", value);
        }
    }

    /// An SMMUv3's way to report: messages if it shall have them and can, wires in any case if it has them or nothing else.
    fn messages(&mut self, node: &Node, out: &mut Out) -> Result<(), GuestTreeError> {
        let wanted = match self.options.messages {
            Messages::AsBoard => node.property("msi-parent").is_some(),
            Messages::Wired => false,
            Messages::Messages => true,
        };
        let mut sends = false;
        match (wanted, self.virt.its, &self.messages) {
            (false, ..) => {}
            (true, None, _) if self.options.messages == Messages::Messages => {
                let reason =
                    "messages are asked for, and there is no ITS: start QEMU with `gic-version=3,its=on`";
                return Err(GuestTreeError::NotVirt { node: "/".into(), reason: reason.into() });
            }
            (true, None, _) => {
                self.left_out(
                    node,
                    "`msi-parent`: QEMU's machine has no ITS (`gic-version=3,its=on`), it has wires only",
                );
            }
            (true, Some(_), Some(first)) => {
                let reason = format!(
                    "`msi-parent`: QEMU delivers our messages with device id 0 only, and {first} has it; it has wires only"
                );
                self.left_out(node, reason);
            }
            (true, Some(its), None) => {
                out.add("msi-parent", cells(&[its.phandle, 0]));
                self.messages = Some(node.path.clone());
                sends = true;
            }
        }
        if !sends && node.interrupts.is_empty() {
            let mut value = Vec::new();
            for wire in V3_WIRES {
                let spi = self.spis.free(&format!("{wire} of {}", node.path))?;
                value.extend(cells(&[0, spi, EDGE]));
            }
            out.add("interrupts", value);
            out.add("interrupt-names", V3_WIRES.iter().flat_map(|w| text(w)).collect());
        }
        Ok(())
    }
}

/// A node in the making.
struct Out(DeviceTreeNode);

impl Out {
    fn add(&mut self, name: &str, value: Vec<u8>) {
        self.0.add_property(DeviceTreeProperty::new_unchecked(name, value));
    }
    fn default(&mut self, name: &str, value: Vec<u8>) {
        if self.0.property_mut(name).is_none() {
            self.add(name, value);
        }
    }
}
