//! What is in QEMU's tree that the board's devices meet: the interrupt controller, the host bridge and its windows, the numbers
//! and phandles that are used.

use std::collections::BTreeSet;

use portcullis_arch::Pa;
use portcullis_board::Tree;
use portcullis_board::compatible::Kind;
use portcullis_board::tree::{Interrupt, Node, Region};

use super::GuestTreeError;
use super::copy::push_number;

/// Shared peripheral interrupts of QEMU's `virt`. Its tree does not say how many there are.
pub(super) const SPIS: u32 = 256;
/// Offset of GITS_TRANSLATER in an ITS's registers.
const TRANSLATER: u64 = 0x1_0040;
/// Most windows of a host bridge, and entries of its interrupt map.
const MAX_RANGES: usize = 64;
const MAX_INTERRUPT_MAP: usize = 4096;

/// The ITS.
#[derive(Clone, Copy)]
pub(super) struct Its {
    pub phandle: u32,
    pub translater: Pa,
}

/// One entry of the bridge's `ranges`.
#[derive(Clone, Copy)]
pub(super) struct Range {
    /// The first cell of the PCI address.
    flags: u32,
    pub pci: u64,
    pub cpu: u64,
    pub size: u64,
}

impl Range {
    /// 1: I/O, 2: memory with 32 bits of address, 3: with 64.
    pub fn space(&self) -> u32 {
        self.flags >> 24 & 3
    }
    fn prefetchable(&self) -> bool {
        self.flags & 0x4000_0000 != 0
    }
}

/// QEMU's `virt` machine.
pub(super) struct Virt<'q> {
    pub tree: &'q Tree,
    pub gic_phandle: u32,
    pub gicd: Pa,
    pub its: Option<Its>,
    pub pcie: &'q Node,
    pub ecam: Pa,
    pub ranges: Vec<Range>,
    /// Which of them is the 32-bit memory, where the window goes.
    memory32: usize,
    /// Cells of an address above the bridge.
    parent_cells: usize,
    /// The phandle of a fixed clock.
    pub clock: Option<u32>,
    /// SPI numbers that QEMU's devices use.
    pub spis: BTreeSet<u32>,
}

fn not_virt(node: &str, reason: impl Into<String>) -> GuestTreeError {
    GuestTreeError::NotVirt { node: node.into(), reason: reason.into() }
}

impl<'q> Virt<'q> {
    pub fn of(tree: &'q Tree) -> Result<Self, GuestTreeError> {
        let root = tree.root().ok_or_else(|| not_virt("/", "no root node"))?;
        refuse_what_is_in_the_way(tree)?;
        let cells = |node: &Node, name: &str| node.cell(name).map_err(GuestTreeError::Qemu);

        let gic_phandle = cells(root, "interrupt-parent")?
            .ok_or_else(|| not_virt("/", "no `interrupt-parent`, so no interrupt controller is known"))?;
        let gic = tree.by_phandle(gic_phandle);
        let gic = gic.filter(|n| n.available && n.compatible.iter().any(|c| c.contains("gic")));
        let gic = gic.ok_or_else(|| not_virt("/", "its `interrupt-parent` is no GIC"))?;
        if cells(gic, "#interrupt-cells")? != Some(3) {
            return Err(not_virt(&gic.path, "`#interrupt-cells` is not 3"));
        }
        let gicd =
            gic.reg.first().ok_or_else(|| not_virt(&gic.path, "no `reg` that the CPU can reach"))?.base;

        let its = tree.nodes().iter().find(|n| n.kind == Some(Kind::Its) && n.available);
        let its = its.and_then(|n| {
            let base = n.reg.first()?.base.get();
            Some(Its { phandle: n.phandle?, translater: Pa(base.checked_add(TRANSLATER)?) })
        });

        let hosts = || tree.nodes().iter().filter(|n| n.kind == Some(Kind::PcieHost) && n.available);
        let pcie = match (hosts().next(), hosts().count()) {
            (Some(host), 1) => host,
            (_, 0) => {
                return Err(not_virt(
                    "/",
                    "no PCIe host bridge (pci-host-ecam-generic): start QEMU with `-machine virt`",
                ));
            }
            (_, n) => return Err(not_virt("/", format!("{n} PCIe host bridges, it must be one"))),
        };
        if pcie.parent() != Some(root.id()) {
            return Err(not_virt(&pcie.path, "the host bridge is not directly below the root node"));
        }
        if !super::source::is_name(pcie.name()) {
            return Err(not_virt(&pcie.path, "no name for a node"));
        }
        let ecam = pcie.reg.first().ok_or_else(|| not_virt(&pcie.path, "no `reg`"))?.base;
        for (name, expected) in [("#address-cells", 3), ("#size-cells", 2)] {
            if cells(pcie, name)? != Some(expected) {
                return Err(not_virt(&pcie.path, format!("`{name}` is not {expected}")));
            }
        }
        let parent_cells = match cells(root, "#address-cells")?.unwrap_or(2) {
            n @ 1..=2 => n as usize,
            n => return Err(not_virt("/", format!("`#address-cells` is {n} instead of 1 or 2"))),
        };
        let ranges = ranges(pcie, parent_cells)?;
        let memory32 = ranges
            .iter()
            .position(|r| r.space() == 2 && !r.prefetchable())
            .ok_or_else(|| not_virt(&pcie.path, "`ranges` has no 32-bit memory"))?;
        if let Some(r) = ranges.get(memory32).filter(|r| r.pci != r.cpu) {
            let reason =
                format!("its 32-bit memory is at {:#x} on the bus and at {:#x} for the CPU", r.pci, r.cpu);
            return Err(not_virt(&pcie.path, reason));
        }
        Ok(Self {
            tree,
            gic_phandle,
            gicd,
            its,
            pcie,
            ecam,
            ranges,
            memory32,
            parent_cells,
            clock: clock(tree),
            spis: used_spis(tree, gic)?,
        })
    }

    /// The 32-bit PCI memory. What is outside of 32 bits is not counted.
    pub fn memory32(&self) -> Region {
        let range = self.ranges.get(self.memory32);
        let (base, size) = range.map_or((0, 0), |r| (r.cpu, r.size));
        Region { base: Pa(base), size: size.min((1u64 << 32).saturating_sub(base)) }
    }

    /// `ranges` of the bridge with the 32-bit memory ending at `end`.
    pub fn ranges_before(&self, end: u64) -> Vec<u8> {
        let mut value = Vec::new();
        for (index, range) in self.ranges.iter().enumerate() {
            let size = if index == self.memory32 { end.saturating_sub(range.cpu) } else { range.size };
            value.extend(range.flags.to_be_bytes());
            push_number(&mut value, range.pci, 2);
            push_number(&mut value, range.cpu, self.parent_cells);
            push_number(&mut value, size, 2);
        }
        value
    }
}

/// The board's devices must be the only ones of their kinds: a machine built from the tree numbers them.
fn refuse_what_is_in_the_way(tree: &Tree) -> Result<(), GuestTreeError> {
    for node in tree.nodes() {
        let reason = match node.kind {
            Some(kind) if kind.is_smmu() => "QEMU has an SMMU of its own: start it without `iommu=smmuv3`",
            Some(Kind::TestDevice | Kind::Zdma | Kind::PlWriter) => {
                "a device of a board is in it already: give the tree as QEMU dumps it"
            }
            _ if node.path == super::BUS => "it is in the way: give the tree as QEMU dumps it",
            _ => continue,
        };
        return Err(not_virt(&node.path, reason));
    }
    Ok(())
}

fn ranges(pcie: &Node, parent_cells: usize) -> Result<Vec<Range>, GuestTreeError> {
    let cells = pcie.cells("ranges").map_err(GuestTreeError::Qemu)?.unwrap_or_default();
    let entry = 3 + parent_cells + 2;
    let (count, rest) = (cells.len() / entry, cells.len() % entry);
    if rest != 0 || count == 0 || count > MAX_RANGES {
        let reason = format!("`ranges` has {} cells, not 1 to {MAX_RANGES} entries of {entry}", cells.len());
        return Err(not_virt(&pcie.path, reason));
    }
    let number = |cells: &[u32]| cells.iter().fold(0u64, |n, c| n << 32 | u64::from(*c));
    let decode = |entry: &[u32]| -> Option<Range> {
        let (flags, rest) = entry.split_first()?;
        let (pci, rest) = rest.split_at_checked(2)?;
        let (cpu, size) = rest.split_at_checked(parent_cells)?;
        Some(Range { flags: *flags, pci: number(pci), cpu: number(cpu), size: number(size) })
    };
    let ranges: Vec<Range> = cells.chunks_exact(entry).filter_map(decode).collect();
    for (index, r) in ranges.iter().enumerate() {
        if r.pci.checked_add(r.size).is_none() || r.cpu.checked_add(r.size).is_none() {
            return Err(not_virt(
                &pcie.path,
                format!("`ranges` entry {index} passes the end of the address space"),
            ));
        }
    }
    Ok(ranges)
}

/// The phandle of a clock that costs nothing to refer to: QEMU's `apb-pclk`.
fn clock(tree: &Tree) -> Option<u32> {
    let usable = |n: &&Node| {
        n.available && n.is_compatible("fixed-clock") && n.cell("#clock-cells").ok().flatten() == Some(0)
    };
    tree.nodes().iter().filter(usable).find_map(|n| n.phandle)
}

/// The SPI numbers of all nodes, and of the PCI interrupt pins.
fn used_spis(tree: &Tree, gic: &Node) -> Result<BTreeSet<u32>, GuestTreeError> {
    let mut used: BTreeSet<u32> = BTreeSet::new();
    for node in tree.nodes() {
        used.extend(node.interrupts.iter().filter_map(Interrupt::spi));
        if node.property("interrupt-map").is_some() {
            used.extend(mapped_spis(tree, node, gic)?);
        }
    }
    Ok(used)
}

/// The SPI numbers in an `interrupt-map`: entries of a child address and interrupt, a controller, and an address and an
/// interrupt there.
fn mapped_spis(tree: &Tree, node: &Node, gic: &Node) -> Result<Vec<u32>, GuestTreeError> {
    let cell = |node: &Node, name: &str, default: u32| -> Result<usize, GuestTreeError> {
        match node.cell(name).map_err(GuestTreeError::Qemu)?.unwrap_or(default) {
            n @ 0..=8 => Ok(n as usize),
            n => Err(not_virt(&node.path, format!("`{name}` is {n}"))),
        }
    };
    let child = cell(node, "#address-cells", 2)? + cell(node, "#interrupt-cells", 1)?;
    let cells = node.cells("interrupt-map").map_err(GuestTreeError::Qemu)?.unwrap_or_default();
    let cut = || not_virt(&node.path, "`interrupt-map` is cut short");
    let mut spis = Vec::new();
    let mut left = cells.as_slice();
    for _ in 0..MAX_INTERRUPT_MAP {
        if left.is_empty() {
            return Ok(spis);
        }
        let (phandle, rest) = left.get(child..).and_then(<[u32]>::split_first).ok_or_else(cut)?;
        let Some(controller) = tree.by_phandle(*phandle) else {
            return Err(not_virt(
                &node.path,
                format!("`interrupt-map`: no node has the phandle {phandle:#x}"),
            ));
        };
        let address = cell(controller, "#address-cells", 0)?;
        let count = cell(controller, "#interrupt-cells", 1)?;
        let (spec, rest) = rest.get(address..).and_then(|r| r.split_at_checked(count)).ok_or_else(cut)?;
        if let [0, number, ..] = spec
            && controller.id() == gic.id()
        {
            spis.push(*number);
        }
        left = rest;
    }
    Err(not_virt(&node.path, format!("`interrupt-map` has more than {MAX_INTERRUPT_MAP} entries")))
}
