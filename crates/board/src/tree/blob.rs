//! Bytes to nodes: reads a flattened device tree with every step checked.
//!
//! `dtoolkit` has a reader too. This one exists because the bytes may be hostile: its work is linear in the size of
//! the blob and its recursion bounded, it names the node in each message, and it takes the long node and property
//! names that real trees have (the specification's limit of 31 characters is not enforced by `dtc`). What it
//! produces is `dtoolkit`'s in-memory model, which applies overlays and writes blobs.

use std::collections::HashSet;

use dtoolkit::memreserve::MemoryReservation;
use dtoolkit::model::{DeviceTree, DeviceTreeNode, DeviceTreeProperty};

use super::error::TreeError;

/// Largest blob accepted.
pub const MAX_BYTES: usize = 16 << 20;
/// Deepest nesting of nodes, as in Linux.
pub const MAX_DEPTH: usize = 64;
/// Most nodes.
pub const MAX_NODES: usize = 32_768;
/// Most properties.
pub const MAX_PROPERTIES: usize = 262_144;
/// Longest name of a node or property, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest path, in bytes.
pub const MAX_PATH: usize = 1024;
/// Most entries of the memory reservation block.
pub const MAX_RESERVATIONS: usize = 1024;

const MAGIC: u32 = 0xD00D_FEED;
const HEADER: usize = 40;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// Reads a blob. Bytes after the size that its header gives are ignored, as boot loaders leave them there.
pub fn read(bytes: &[u8]) -> Result<DeviceTree, TreeError> {
    if bytes.len() > MAX_BYTES {
        return Err(TreeError::TooLarge { bytes: bytes.len() as u64, limit: MAX_BYTES as u64 });
    }
    let header = Header::read(bytes)?;
    let mut tree = DeviceTree::new();
    tree.memory_reservations = header.reservations()?;
    tree.root = Reader { header: &header, at: 0, path: String::new(), nodes: 0, properties: 0 }.root()?;
    Ok(tree)
}

fn be32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
}

fn be64(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
}

fn blob(offset: usize, reason: impl Into<String>) -> TreeError {
    TreeError::Blob { offset, node: String::new(), reason: reason.into() }
}

/// The blob's blocks.
struct Header<'a> {
    bytes: &'a [u8],
    reservations: usize,
    structure: &'a [u8],
    structure_offset: usize,
    strings: &'a [u8],
}

impl<'a> Header<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, TreeError> {
        let field = |offset: usize| be32(bytes, offset).map(|v| v as usize);
        let short =
            || blob(bytes.len(), format!("{} bytes are too few for the header of {HEADER}", bytes.len()));
        let magic = be32(bytes, 0).ok_or_else(short)?;
        if magic != MAGIC {
            let hint =
                if bytes.starts_with(b"/dts-v1/") { "; this is source, name the file .dts" } else { "" };
            return Err(blob(0, format!("it starts with {magic:#010x} instead of {MAGIC:#010x}{hint}")));
        }
        let (
            Some(total),
            Some(structure),
            Some(strings),
            Some(reservations),
            Some(version),
            Some(compatible),
        ) = (field(4), field(8), field(12), field(16), field(20), field(24))
        else {
            return Err(short());
        };
        let (Some(strings_size), Some(structure_size)) = (field(32), field(36)) else {
            return Err(short());
        };
        if version < 17 || compatible > 17 {
            return Err(blob(20, format!("version {version} (compatible to {compatible}) instead of 17")));
        }
        if total < HEADER || total > bytes.len() {
            let reason = format!("its header gives a size of {total} bytes, but there are {}", bytes.len());
            return Err(blob(4, reason));
        }
        let bytes = bytes.get(..total).unwrap_or(bytes);
        let block = |name: &str, field: usize, offset: usize, size: usize| {
            offset.checked_add(size).and_then(|end| bytes.get(offset..end)).ok_or_else(|| {
                blob(field, format!("the {name} block of {size} bytes at {offset:#x} is outside the blob"))
            })
        };
        if !structure.is_multiple_of(4) {
            return Err(blob(8, format!("the structure block at {structure:#x} is not 4-byte aligned")));
        }
        Ok(Self {
            bytes,
            reservations,
            structure: block("structure", 8, structure, structure_size)?,
            structure_offset: structure,
            strings: block("strings", 12, strings, strings_size)?,
        })
    }

    fn reservations(&self) -> Result<Vec<MemoryReservation>, TreeError> {
        let mut list = Vec::new();
        let mut at = self.reservations;
        loop {
            let (Some(address), Some(size)) =
                (be64(self.bytes, at), at.checked_add(8).and_then(|at| be64(self.bytes, at)))
            else {
                return Err(blob(at, "the memory reservation block does not end"));
            };
            if address == 0 && size == 0 {
                return Ok(list);
            }
            if list.len() == MAX_RESERVATIONS {
                return Err(TreeError::Limit {
                    node: "/memreserve/".into(),
                    what: "memory reservations",
                    limit: MAX_RESERVATIONS as u64,
                });
            }
            list.push(MemoryReservation::new(address, size));
            at += 16;
        }
    }
}

/// A node whose end has not been seen yet.
struct Open<'a> {
    node: DeviceTreeNode,
    /// Length of the path without this node.
    parent_path: usize,
    properties: HashSet<&'a str>,
    children: HashSet<&'a str>,
}

struct Reader<'h, 'a> {
    header: &'h Header<'a>,
    at: usize,
    path: String,
    nodes: usize,
    properties: usize,
}

impl<'a> Reader<'_, 'a> {
    fn root(mut self) -> Result<DeviceTreeNode, TreeError> {
        let mut open: Vec<Open<'a>> = Vec::new();
        loop {
            let start = self.at;
            match self.word()? {
                NOP => {}
                BEGIN_NODE => {
                    let node = self.begin(start, open.last_mut())?;
                    open.push(node);
                    if open.len() > MAX_DEPTH {
                        return Err(self.limit("nested nodes", MAX_DEPTH));
                    }
                }
                PROP => {
                    let Some(node) = open.last_mut() else {
                        return Err(self.error(start, "a property outside of any node"));
                    };
                    if !node.children.is_empty() {
                        return Err(self.error(start, "a property after a child node"));
                    }
                    let (name, value) = self.property(start)?;
                    if !node.properties.insert(name) {
                        return Err(TreeError::property(self.path(), name, "given twice"));
                    }
                    node.node.add_property(DeviceTreeProperty::new_unchecked(name, value));
                }
                END_NODE => {
                    let Some(done) = open.pop() else {
                        return Err(self.error(start, "a node ends that has not begun"));
                    };
                    self.path.truncate(done.parent_path);
                    match open.last_mut() {
                        Some(parent) => parent.node.add_child(done.node),
                        None => return self.finish(done.node),
                    }
                }
                END => return Err(self.error(start, "the tree ends inside a node")),
                other => {
                    return Err(self.error(start, format!("{other:#x} is no token of the structure block")));
                }
            }
        }
    }

    fn begin(&mut self, start: usize, parent: Option<&mut Open<'a>>) -> Result<Open<'a>, TreeError> {
        let rest = self.header.structure.get(self.at..).unwrap_or_default();
        let name = self.text(start, rest, "node name")?;
        self.at = (self.at + name.len() + 1).next_multiple_of(4);
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.limit("nodes", MAX_NODES));
        }
        let parent_path = self.path.len();
        match parent {
            None if !name.is_empty() => {
                return Err(self.error(start, format!("the root node has the name `{name}`")));
            }
            None => {}
            Some(_) if name.is_empty() || name.contains('/') => {
                return Err(self.error(start, format!("`{name}` is no name for a node")));
            }
            Some(parent) => {
                if !parent.children.insert(name) {
                    return Err(TreeError::node(self.path(), format!("two child nodes are called `{name}`")));
                }
                self.path.push('/');
                self.path.push_str(name);
                if self.path.len() > MAX_PATH {
                    return Err(self.limit("bytes of a path", MAX_PATH));
                }
            }
        }
        Ok(Open {
            node: DeviceTreeNode::new_unchecked(name),
            parent_path,
            properties: HashSet::new(),
            children: HashSet::new(),
        })
    }

    fn property(&mut self, start: usize) -> Result<(&'a str, &'a [u8]), TreeError> {
        self.properties += 1;
        if self.properties > MAX_PROPERTIES {
            return Err(self.limit("properties", MAX_PROPERTIES));
        }
        let len = self.word()? as usize;
        let name = self.word()? as usize;
        let Some(rest) = self.header.strings.get(name..) else {
            return Err(
                self.error(start, format!("a property's name at {name:#x} is outside the strings block"))
            );
        };
        let name = self.text(start, rest, "property name")?;
        if name.is_empty() {
            return Err(self.error(start, "a property without a name"));
        }
        let value = self.at.checked_add(len).and_then(|end| self.header.structure.get(self.at..end));
        let Some(value) = value else {
            return Err(
                self.error(start, format!("property `{name}` of {len} bytes passes the end of the tree"))
            );
        };
        self.at = (self.at + len).next_multiple_of(4);
        Ok((name, value))
    }

    /// A NUL-terminated name at the start of `from`.
    fn text(&self, start: usize, from: &'a [u8], what: &str) -> Result<&'a str, TreeError> {
        let window = from.get(..=MAX_NAME).unwrap_or(from);
        let Some(end) = window.iter().position(|b| *b == 0) else {
            return Err(self.error(start, format!("a {what} of more than {MAX_NAME} bytes, or cut short")));
        };
        match window.get(..end).map(std::str::from_utf8) {
            Some(Ok(name)) if name.bytes().all(|b| b.is_ascii_graphic()) => Ok(name),
            _ => Err(self.error(start, format!("a {what} holds bytes that no name has"))),
        }
    }

    fn finish(mut self, root: DeviceTreeNode) -> Result<DeviceTreeNode, TreeError> {
        loop {
            let start = self.at;
            match self.word()? {
                NOP => {}
                END => return Ok(root),
                other => return Err(self.error(start, format!("{other:#x} after the end of the root node"))),
            }
        }
    }

    fn word(&mut self) -> Result<u32, TreeError> {
        let word = be32(self.header.structure, self.at)
            .ok_or_else(|| self.error(self.at, "the structure block ends too early"))?;
        self.at += 4;
        Ok(word)
    }

    fn path(&self) -> &str {
        if self.path.is_empty() { "/" } else { &self.path }
    }

    fn error(&self, at: usize, reason: impl Into<String>) -> TreeError {
        let node = if self.nodes == 0 { "" } else { self.path() };
        TreeError::Blob {
            offset: self.header.structure_offset.saturating_add(at),
            node: node.into(),
            reason: reason.into(),
        }
    }

    fn limit(&self, what: &'static str, limit: usize) -> TreeError {
        TreeError::Limit { node: self.path().into(), what, limit: limit as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> DeviceTree {
        let mut tree = DeviceTree::new();
        let mut child = DeviceTreeNode::new("dev@1000").unwrap();
        child.add_property(DeviceTreeProperty::new("reg", vec![0x1000u32, 0x100]).unwrap());
        tree.root.add_child(child);
        tree.memory_reservations.push(MemoryReservation::new(0x1000, 0x2000));
        tree
    }

    #[test]
    fn what_the_library_writes_is_read_back() {
        let tree = sample();
        assert_eq!(read(&tree.to_dtb()).unwrap(), tree);
    }

    #[test]
    fn bytes_after_the_tree_are_ignored() {
        let tree = sample();
        let mut bytes = tree.to_dtb();
        bytes.extend([0xAA; 100]);
        assert_eq!(read(&bytes).unwrap(), tree);
    }

    #[test]
    fn a_cut_file_says_how_much_is_missing() {
        let bytes = sample().to_dtb();
        let message = read(&bytes[..bytes.len() - 1]).unwrap_err().to_string();
        assert!(message.contains(&format!("a size of {} bytes", bytes.len())), "{message}");
        assert!(read(&[]).unwrap_err().to_string().contains("0 bytes are too few"));
    }

    #[test]
    fn source_given_as_a_blob_is_recognised() {
        let message = read(b"/dts-v1/;\n/ { };                                ").unwrap_err().to_string();
        assert!(message.contains("name the file .dts"), "{message}");
    }

    #[test]
    fn damage_inside_a_node_names_the_node_and_offset() {
        let tree = sample();
        let mut bytes = tree.to_dtb();
        // The last token but one inside /dev@1000 is its END_NODE.
        let structure = be32(&bytes, 8).unwrap() as usize;
        let size = be32(&bytes, 36).unwrap() as usize;
        let end_node = structure + size - 12;
        bytes[end_node + 3] = 7;
        let message = read(&bytes).unwrap_err().to_string();
        assert!(message.contains("0x7 is no token"), "{message}");
        assert!(message.contains(&format!("{end_node:#x}, in node /dev@1000")), "{message}");
    }

    #[test]
    fn nesting_is_bounded() {
        let mut structure = Vec::new();
        let root = [BEGIN_NODE, 0];
        let child = [BEGIN_NODE, u32::from_be_bytes(*b"a\0\0\0")];
        for word in root.into_iter().chain(std::iter::repeat_n(child, 500_000).flatten()) {
            structure.extend(word.to_be_bytes());
        }
        let error = read(&with_structure(&structure)).unwrap_err();
        assert!(matches!(error, TreeError::Limit { what: "nested nodes", limit: 64, .. }), "{error}");
    }

    #[test]
    fn the_number_of_nodes_is_bounded() {
        let mut structure = Vec::new();
        structure.extend([0, 0, 0, 1, 0, 0, 0, 0]);
        for n in 0..MAX_NODES {
            structure.extend(BEGIN_NODE.to_be_bytes());
            let mut name = format!("n{n:06}").into_bytes();
            name.push(0);
            structure.extend(name);
            structure.extend(END_NODE.to_be_bytes());
        }
        let error = read(&with_structure(&structure)).unwrap_err();
        assert!(matches!(error, TreeError::Limit { what: "nodes", .. }), "{error}");
    }

    #[test]
    fn two_children_of_one_name_are_an_error() {
        let child = [BEGIN_NODE, u32::from_be_bytes(*b"abc\0"), END_NODE];
        let words = [BEGIN_NODE, 0].into_iter().chain(child).chain(child).chain([END_NODE, END]);
        let structure: Vec<u8> = words.flat_map(u32::to_be_bytes).collect();
        let message = read(&with_structure(&structure)).unwrap_err().to_string();
        assert_eq!(message, "/: two child nodes are called `abc`");
    }

    fn with_structure(structure: &[u8]) -> Vec<u8> {
        let size = structure.len() as u32;
        let header = [MAGIC, 56 + size, 56, 56 + size, 40, 17, 16, 0, 0, size];
        let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_be_bytes).collect();
        bytes.extend([0; 16]);
        bytes.extend(structure);
        bytes
    }
}
