//! What was added to QEMU's tree and changed in it, as source: for people who start QEMU themselves.

use std::fmt::Write as _;

use portcullis_board::Tree;
use portcullis_board::tree::Node;

use super::{BUS, GuestTree};

/// Bytes that names of nodes have beside letters and digits.
const NAME_BYTES: &[u8] = b",._+-@";
/// The same for properties.
const PROPERTY_BYTES: &[u8] = b",._+?#-";
/// Cells on one line.
const CELLS_PER_LINE: usize = 12;
/// Longest name that is written.
const MAX_NAME: usize = 64;

fn only(name: &str, others: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || others.contains(&b))
}

/// True for what a device tree compiler takes as the name of a node.
pub(super) fn is_name(name: &str) -> bool {
    only(name, NAME_BYTES) && !name.starts_with('@')
}

/// True for what a device tree compiler takes as the name of a property.
pub(super) fn is_property(name: &str) -> bool {
    only(name, PROPERTY_BYTES)
}

/// True for what a device tree compiler takes as a label.
pub(super) fn is_label(label: &str) -> bool {
    only(label, b"_") && !label.starts_with(|c: char| c.is_ascii_digit())
}

/// Device tree source of what the guest's tree has more than QEMU's, and differently.
///
/// It is written to be put after the source of QEMU's own tree (`dtc -I dtb -O dts`), and the two compiled together. Its
/// phandles fit the tree that [`guest_tree`](super::guest_tree) was given, so QEMU must be started with the same machine options.
pub fn fragments(guest: &GuestTree) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "// The register window: {}, BAR 0 of its function.", guest.window);
    for placed in &guest.placed {
        let _ = writeln!(
            text,
            "// {} is {} of the board, there at {}.",
            placed.guest_path, placed.board_path, placed.board_base
        );
    }
    text.push_str("/ {\n");
    if let Some(pcie) = guest.tree.find(&guest.pcie_path) {
        let _ = writeln!(text, "\t{} {{", pcie.name());
        let changed = pcie.properties().filter(|(name, _)| guest.pcie_changed.contains(name));
        properties(&mut text, changed, 2);
        for function in &guest.pci {
            if let Some(node) = guest.tree.find(&function.guest_path) {
                let _ = writeln!(
                    text,
                    "\n\t\t// {} of the board, there {}.",
                    function.board_path, function.board_rid
                );
                write_node(&mut text, &guest.tree, node, 2);
            }
        }
        text.push_str("\t};\n\n");
    }
    if let Some(bus) = guest.tree.find(BUS) {
        write_node(&mut text, &guest.tree, bus, 1);
    }
    text.push_str("};\n");
    text
}

fn indent(text: &mut String, depth: usize) {
    text.extend(std::iter::repeat_n('\t', depth));
}

/// A node with its children. Only what [`guest_tree`](super::guest_tree) made comes here, which is two levels deep.
fn write_node(text: &mut String, tree: &Tree, node: &Node, depth: usize) {
    indent(text, depth);
    for label in node.labels.iter().filter(|l| is_label(l)) {
        let _ = write!(text, "{label}: ");
    }
    let _ = writeln!(text, "{} {{", node.name());
    properties(text, node.properties(), depth + 1);
    for child in node.children().iter().filter_map(|id| tree.node(*id)) {
        text.push('\n');
        write_node(text, tree, child, depth + 1);
    }
    indent(text, depth);
    text.push_str("};\n");
}

fn properties<'n>(text: &mut String, list: impl Iterator<Item = (&'n str, &'n [u8])>, depth: usize) {
    let mut list: Vec<_> = list.collect();
    // What a node is comes first.
    list.sort_by_key(|(name, _)| match *name {
        "compatible" => 0,
        "reg" => 1,
        _ => 2,
    });
    for (name, value) in list {
        indent(text, depth);
        text.push_str(name);
        write_value(text, value, depth);
        text.push_str(";\n");
    }
}

/// A value as strings if it can be some, as cells if it has whole ones, else as bytes: whichever it is, the bytes are the same.
fn write_value(text: &mut String, value: &[u8], depth: usize) {
    if value.is_empty() {
        return;
    }
    text.push_str(" = ");
    if let Some(strings) = strings(value) {
        let quoted: Vec<String> =
            strings.iter().map(|s| format!("\"{}\"", s.replace('\\', "\\\\").replace('"', "\\\""))).collect();
        text.push_str(&quoted.join(", "));
        return;
    }
    let (cells, rest) = value.as_chunks::<4>();
    if !rest.is_empty() {
        text.push('[');
        for (i, byte) in value.iter().enumerate() {
            let _ = write!(text, "{}{byte:02x}", if i == 0 { "" } else { " " });
        }
        text.push(']');
        return;
    }
    text.push('<');
    for (i, cell) in cells.iter().enumerate() {
        if i > 0 && i.is_multiple_of(CELLS_PER_LINE) {
            text.push('\n');
            indent(text, depth + 1);
        } else if i > 0 {
            text.push(' ');
        }
        let _ = write!(text, "{:#x}", u32::from_be_bytes(*cell));
    }
    text.push('>');
}

/// The strings of a value that consists of printable ones and nothing else.
fn strings(value: &[u8]) -> Option<Vec<&str>> {
    let text = std::str::from_utf8(value.strip_suffix(&[0])?).ok()?;
    let strings: Vec<&str> = text.split('\0').collect();
    let printable = |s: &&str| !s.is_empty() && s.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
    strings.iter().all(printable).then_some(strings)
}
