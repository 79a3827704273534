//! Puts a master behind the SMMU: as an overlay in source for a person, or at once on a tree.
//!
//! Both make the same changes: the SMMU's status becomes okay (and `#iommu-cells` 1 if it is missing), the master gets
//! `iommus` with every stream id that the chip gives it (an `iommus` that has them all is kept), and it and its parents become okay. The overlay refers
//! to nodes by path, and to the SMMU by its phandle; where the SMMU has none, the overlay makes one.

use std::fmt::Write as _;

use dtoolkit::Node as _;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};
use portcullis_arch::StreamId;
use portcullis_arch::zynqmp::{self, SmmuPath};

use crate::machine::{Agreement, MachineDescription, Master, Smmu};
use crate::tree::{Tree, TreeError};

/// What has to change.
struct Plan<'m> {
    smmu: &'m Smmu,
    /// Index of the SMMU in the description.
    index: usize,
    master: &'m Master,
    /// The streams that `iommus` will list, with masks.
    streams: Vec<(StreamId, u32)>,
    /// `#iommu-cells` of the SMMU after the change.
    cells: u32,
}

impl<'m> Plan<'m> {
    fn new(desc: &'m MachineDescription, name: &str) -> Result<Self, TreeError> {
        let master = find(desc, name)?;
        let path = &master.node.path;
        if let Some(rid) = master.rid {
            let reason = format!(
                "a PCI function ({rid}): the `iommu-map` of its host bridge says which SMMU it is behind, as which stream"
            );
            return Err(TreeError::node(path, reason));
        }
        let Some((index, smmu)) = desc.smmu() else {
            return Err(TreeError::node(
                path,
                "the tree has no SMMU (arm,mmu-500, arm,smmu-v2 or arm,smmu-v3) to put it behind",
            ));
        };
        if smmu.legacy {
            return Err(TreeError::property(
                &smmu.node.path,
                "mmu-masters",
                "the SMMU uses the legacy binding; masters with `iommus` cannot be mixed with it",
            ));
        }
        // What the tree says is kept where it is right, or where nobody knows better.
        let keep = matches!(master.agreement, Agreement::Agrees | Agreement::Unknown);
        let streams: Vec<(StreamId, u32)> = if keep {
            master.streams.declared.iter().map(|d| (d.id, d.mask)).collect()
        } else {
            master.streams.actual.iter().map(|s| (*s, 0)).collect()
        };
        match master.path {
            Some(SmmuPath::NotBehind) => {
                let reason = format!("{} does not pass the SMMU, nothing can put it behind it", master.title);
                return Err(TreeError::node(path, reason));
            }
            Some(SmmuPath::Unknown) => {
                let reason = format!("no document says through which TBU {} passes", master.title);
                return Err(TreeError::node(path, reason));
            }
            _ if streams.is_empty() => {
                return Err(TreeError::node(path, "no stream id is known for it"));
            }
            _ => {}
        }
        let cells = if smmu.iommu_cells == 2 { 2 } else { 1 };
        Ok(Self { smmu, index, master, streams, cells })
    }

    /// Nodes whose status must become okay so that the master is used.
    fn enable(&self) -> impl Iterator<Item = &str> {
        let parents = self.smmu.node.disabled_parents.iter().chain(&self.master.node.disabled_parents);
        parents.map(String::as_str)
    }
}

/// The master that a person means: by path, label (with or without `&`), name with or without unit address, or the
/// chip's name for it.
fn find<'m>(desc: &'m MachineDescription, name: &str) -> Result<&'m Master, TreeError> {
    let bare = name.strip_prefix('&').unwrap_or(name);
    let base = |m: &&Master| m.node.name.split('@').next() == Some(bare);
    let tests: [&dyn Fn(&&Master) -> bool; 5] = [
        &|m| m.node.path == bare,
        &|m| m.node.labels.iter().any(|l| l == bare),
        &|m| m.node.name == bare,
        &|m| m.title.eq_ignore_ascii_case(bare),
        &base,
    ];
    for test in tests {
        let found: Vec<&Master> = desc.masters.iter().filter(|m| test(m)).collect();
        match found.as_slice() {
            [] => {}
            [one] => return Ok(one),
            many => {
                let paths = many.iter().take(20).map(|m| m.node.path.clone()).collect();
                return Err(TreeError::AmbiguousNode { name: name.into(), paths });
            }
        }
    }
    if let Some(node) = desc.not_modelled.iter().find(|n| n.path == bare) {
        let reason = "it is no master that is known: it has no `iommus` and the chip's tables do not list it";
        return Err(TreeError::node(&node.path, reason));
    }
    let similar = desc.masters.iter().take(40).map(|m| m.node.path.clone()).collect();
    Err(TreeError::NoSuchNode { name: name.into(), similar })
}

/// The source of an overlay that puts `node` behind the SMMU.
///
/// `node` is a path, a label, a node name, or the chip's name ("FPD DMA channel 0"). Compile the result with
/// `dtc -@ -I dts -O dtb`; its comments say what else the board needs.
///
/// # Errors
/// No such master, several of that name, no SMMU in the tree, or a master that does not pass the SMMU.
pub fn protect_overlay(desc: &MachineDescription, node: &str) -> Result<String, TreeError> {
    let plan = Plan::new(desc, node)?;
    let mut dts = comments(desc, &plan);
    dts.push_str("/dts-v1/;\n/plugin/;\n\n/ {\n");
    let mut fragment = 0;
    let mut add = |target: &str, label: &str, body: &[String]| {
        let target = target.replace('\\', "\\\\").replace('"', "\\\"");
        let lines: String = body.iter().map(|l| format!("\t\t\t{l}\n")).collect();
        let _ = write!(
            dts,
            "\tfragment@{fragment} {{\n\t\ttarget-path = \"{target}\";\n\n\t\t{label}__overlay__ {{\n{lines}\t\t}};\n\t}};\n"
        );
        fragment += 1;
    };
    let okay = || "status = \"okay\";".to_owned();
    let mut enabled: Vec<&str> = Vec::new();
    for parent in plan.enable() {
        if !enabled.contains(&parent) {
            enabled.push(parent);
            add(parent, "", &[okay()]);
        }
    }
    let mut smmu = vec![okay()];
    if plan.smmu.iommu_cells == 0 {
        smmu.push(format!("#iommu-cells = <{}>;", plan.cells));
    }
    let (label, reference) = match plan.smmu.node.phandle {
        Some(phandle) => ("", format!("{phandle:#x}")),
        None => ("smmu: ", "&smmu".to_owned()),
    };
    add(&plan.smmu.node.path, label, &smmu);
    let entries: Vec<String> = plan
        .streams
        .iter()
        .map(|(id, mask)| match plan.cells {
            2 => format!("<{reference} {id} {mask:#x}>"),
            _ => format!("<{reference} {id}>"),
        })
        .collect();
    add(&plan.master.node.path, "", &[format!("iommus = {};", entries.join(", ")), okay()]);
    dts.push_str("};\n");
    Ok(dts)
}

/// What the overlay does, and what it does not do.
fn comments(desc: &MachineDescription, plan: &Plan<'_>) -> String {
    let mut text = String::new();
    let mut line = |l: &str| {
        text.push_str("// ");
        text.push_str(l);
        text.push('\n');
    };
    let m = plan.master;
    line(&format!("Puts {} ({}) behind the SMMU {}.", m.node.path, m.title, plan.smmu.node.path));
    for (stream, _) in &plan.streams {
        match zynqmp::decode(*stream) {
            Some(decoded) if desc.chip.is_some() => line(&format!("Stream {stream}: {decoded}.")),
            _ => line(&format!("Stream {stream}.")),
        }
    }
    if let Some(phandle) = plan.smmu.node.phandle {
        line(&format!("{phandle:#x} is the phandle of the SMMU in the tree that this was made for."));
    }
    if desc.chip.is_some() {
        line(&format!(
            "Boot code must unmask the SMMU's interrupts: write {:#x} to {:#x}.",
            zynqmp::smmu_reg::INTERRUPTS,
            zynqmp::smmu_reg::BASE.get() + zynqmp::smmu_reg::IER_0
        ));
    }
    let route = |m: &Master| {
        m.route_bit
            .map(|bit| format!("bit {bit} of IOU_INTERCONNECT_ROUTE ({})", zynqmp::IOU_INTERCONNECT_ROUTE))
    };
    if let Some(bit) = route(m) {
        line(&format!("It passes the SMMU only while {bit} is set."));
    }
    if plan.smmu.node.available {
        return text;
    }
    let others = || desc.masters.iter().filter(|o| o.node.available && o.node.path != m.node.path);
    let declares = |o: &&Master| o.streams.declared.iter().any(|d| d.smmu == plan.index);
    let mut heading =
        Some("The tree already has `iommus` at these masters in use, so they go behind it too:");
    for other in others().filter(declares) {
        if let Some(heading) = heading.take() {
            line(heading);
        }
        let needs = route(other).map(|bit| format!(" (needs {bit})")).unwrap_or_default();
        line(&format!("  {} ({}){needs}", other.node.path, other.title));
    }
    let mut heading =
        Some("These masters in use have no `iommus`; Linux blocks their DMA once the SMMU is on:");
    let blocked = |o: &&Master| o.agreement == Agreement::NotDeclared && !o.streams.actual.is_empty();
    for other in others().filter(blocked) {
        if let Some(heading) = heading.take() {
            line(heading);
        }
        line(&format!("  {} ({})", other.node.path, other.title));
    }
    text
}

/// The tree with `node` behind the SMMU: what applying [`protect_overlay`] gives, without `dtc`.
///
/// # Errors
/// As [`protect_overlay`], and as [`MachineDescription::from_tree`].
pub fn apply_protect(tree: &Tree, node: &str) -> Result<Tree, TreeError> {
    let desc = MachineDescription::from_tree(tree)?;
    // An alias is known to the tree only.
    let path = tree.resolve(node).map(|n| n.path.clone());
    let plan = match path {
        Ok(path) if desc.master(&path).is_some() => Plan::new(&desc, &path)?,
        _ => Plan::new(&desc, node)?,
    };
    let phandle = plan
        .smmu
        .node
        .phandle
        .or(desc.unused_phandle)
        .ok_or_else(|| TreeError::node(&plan.smmu.node.path, "no phandle is left to give it"))?;
    tree.edit(|model| {
        for path in plan.enable() {
            set(model, path, "status", text("okay"))?;
        }
        let smmu = &plan.smmu.node;
        set(model, &smmu.path, "status", text("okay"))?;
        if smmu.phandle.is_none() {
            set(model, &smmu.path, "phandle", phandle.to_be_bytes().to_vec())?;
        }
        if plan.smmu.iommu_cells == 0 {
            set(model, &smmu.path, "#iommu-cells", plan.cells.to_be_bytes().to_vec())?;
        }
        let mut iommus = Vec::new();
        for (stream, mask) in &plan.streams {
            iommus.extend(phandle.to_be_bytes());
            iommus.extend(stream.get().to_be_bytes());
            if plan.cells == 2 {
                iommus.extend(mask.to_be_bytes());
            }
        }
        set(model, &plan.master.node.path, "iommus", iommus)?;
        set(model, &plan.master.node.path, "status", text("okay"))
    })
}

fn text(value: &str) -> Vec<u8> {
    [value.as_bytes(), &[0]].concat()
}

fn set(model: &mut DeviceTree, path: &str, name: &str, value: Vec<u8>) -> Result<(), TreeError> {
    let mut node: &mut DeviceTreeNode = &mut model.root;
    // Not the library's own lookup, which takes `axi` for `axi@0` too.
    for part in path.split('/').filter(|p| !p.is_empty()) {
        node = node
            .children_mut()
            .find(|c| c.name() == part)
            .ok_or_else(|| TreeError::NoSuchNode { name: path.into(), similar: Vec::new() })?;
    }
    node.add_property(DeviceTreeProperty::new_unchecked(name, value));
    Ok(())
}

#[cfg(test)]
mod tests;
