//! Builds small device trees for tests, property by property.

use dtoolkit::Node as _;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

use crate::tree::{Tree, TreeError};

/// A tree under construction. Nodes come into being when a property is set.
#[derive(Clone)]
pub struct Dt(DeviceTree);

impl Dt {
    pub fn new() -> Self {
        Self(DeviceTree::new())
    }
    pub fn of(tree: &Tree) -> Self {
        let mut model = DeviceTree::new();
        tree.edit(|m| {
            model = m.clone();
            Ok(())
        })
        .unwrap();
        Self(model)
    }
    fn node(&mut self, path: &str) -> &mut DeviceTreeNode {
        let mut node = &mut self.0.root;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            if !node.children().any(|c| c.name() == name) {
                node.add_child(DeviceTreeNode::new_unchecked(name));
            }
            node = node.child_mut(name).unwrap();
        }
        node
    }
    pub fn prop(&mut self, path: &str, name: &str, value: Vec<u8>) {
        self.node(path).add_property(DeviceTreeProperty::new_unchecked(name, value));
    }
    pub fn remove(&mut self, path: &str, name: &str) {
        self.node(path).remove_property(name);
    }
    pub fn blob(&self) -> Vec<u8> {
        self.0.to_dtb()
    }
    pub fn tree(&self) -> Result<Tree, TreeError> {
        Tree::from_dtb(&self.blob())
    }
}

pub fn cells<const N: usize>(cells: [u32; N]) -> Vec<u8> {
    cells.into_iter().flat_map(u32::to_be_bytes).collect()
}

pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// A file of `boards/`.
pub fn board_file(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../boards").join(name)
}

/// The board of the thesis, from its compiled tree.
pub fn thesis() -> Tree {
    Tree::load(board_file("zynqmp-thesis.dtb")).unwrap()
}

/// True if `dtc` is there; says so when a test is skipped.
pub fn have_dtc(test: &str) -> bool {
    let found = std::process::Command::new("dtc").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: {test} needs dtc (Debian: device-tree-compiler)");
    }
    found
}
