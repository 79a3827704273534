//! Decodes the properties that refer to other nodes: `reg` through `ranges`, interrupts, `iommus`, `mmu-masters`.
//!
//! Works on the flat list of nodes and counts its steps, so that a hostile tree of the permitted size cannot keep
//! it busy.

use std::collections::HashMap;

use portcullis_arch::{Pa, StreamId};

use super::error::TreeError;
use super::node::{Interrupt, IommuSpecifier, LegacyMaster, Node, NodeId, Region, Trigger};
use crate::compatible::Kind;

/// Most entries in one property.
const MAX_ENTRIES: usize = 4096;
/// Steps for one tree: comparisons of ranges, entries decoded, parents climbed.
const MAX_STEPS: u64 = 50_000_000;
/// Shared peripheral interrupts of a GICv2.
const SPIS: u32 = 988;
/// Private peripheral interrupts of a GICv2.
const PPIS: u32 = 16;

/// Bits of a stream match register's ID and MASK, or of a stream id.
pub(super) fn stream_bits(kind: Kind) -> u32 {
    match kind {
        Kind::Mmu500 => 15,
        // The architecture's limit. How many a particular SMMU has is checked with the machine.
        Kind::SmmuV3 => 32,
        // 16 with extended stream ids (SIDR0.EXIDS), which a device tree does not tell.
        _ => 16,
    }
}

/// A cursor over the cells of a property.
pub(super) struct Cells<'a> {
    pub left: &'a [[u8; 4]],
}

impl<'a> Cells<'a> {
    pub fn take(&mut self, count: usize) -> Option<&'a [[u8; 4]]> {
        let (head, tail) = self.left.split_at_checked(count)?;
        self.left = tail;
        Some(head)
    }
    pub fn one(&mut self) -> Option<u32> {
        self.take(1)?.first().map(|c| u32::from_be_bytes(*c))
    }
    pub fn many(&mut self, count: usize) -> Option<Vec<u32>> {
        Some(self.take(count)?.iter().map(|c| u32::from_be_bytes(*c)).collect())
    }
    /// A number of 0, 1 or 2 cells.
    pub fn number(&mut self, cells: usize) -> Option<u64> {
        Some(self.take(cells)?.iter().fold(0, |n, c| n << 32 | u64::from(u32::from_be_bytes(*c))))
    }
}

pub(super) struct Decoder<'t> {
    pub nodes: &'t [Node],
    pub phandles: &'t HashMap<u32, NodeId>,
    pub steps: u64,
}

impl<'t> Decoder<'t> {
    pub fn new(nodes: &'t [Node], phandles: &'t HashMap<u32, NodeId>) -> Self {
        Self { nodes, phandles, steps: MAX_STEPS }
    }

    fn node(&self, id: NodeId) -> Option<&'t Node> {
        self.nodes.get(id.0 as usize)
    }

    pub fn parent(&self, node: &Node) -> Option<&'t Node> {
        self.node(node.parent?)
    }

    pub fn step(&mut self, node: &Node, steps: usize) -> Result<(), TreeError> {
        self.steps = self.steps.checked_sub(steps as u64).ok_or_else(|| TreeError::Limit {
            node: node.path.clone(),
            what: "entries to look up",
            limit: MAX_STEPS,
        })?;
        Ok(())
    }

    pub fn cells<'n>(&mut self, node: &'n Node, property: &str) -> Result<Option<Cells<'n>>, TreeError> {
        let Some(value) = node.property(property) else { return Ok(None) };
        let (cells, rest) = value.as_chunks::<4>();
        if !rest.is_empty() {
            let reason = format!("{} bytes, not a whole number of 4-byte cells", value.len());
            return Err(node.malformed(property, reason));
        }
        self.step(node, cells.len())?;
        Ok(Some(Cells { left: cells }))
    }

    pub fn target(
        &self,
        node: &Node,
        property: &str,
        entry: usize,
        phandle: u32,
    ) -> Result<&'t Node, TreeError> {
        self.phandles.get(&phandle).and_then(|id| self.node(*id)).ok_or_else(|| {
            node.malformed(property, format!("entry {entry}: no node has the phandle {phandle:#x}"))
        })
    }

    /// `#address-cells` and `#size-cells` for the children of a node.
    pub fn bus_cells(&self, bus: &Node) -> Result<(usize, usize), TreeError> {
        let read = |name: &str, default: u32| match bus.cell(name)?.unwrap_or(default) {
            n @ 0..=4 => Ok(n as usize),
            n => Err(bus.malformed(name, format!("{n} cells, at most 4 make sense"))),
        };
        Ok((read("#address-cells", 2)?, read("#size-cells", 1)?))
    }

    /// `reg` in CPU addresses; empty where the CPU cannot address the node.
    pub fn reg(&mut self, node: &Node) -> Result<Vec<Region>, TreeError> {
        let (Some(mut cells), Some(bus)) = (self.cells(node, "reg")?, self.parent(node)) else {
            return Ok(Vec::new());
        };
        let (address_cells, size_cells) = self.bus_cells(bus)?;
        let entry_cells = address_cells + size_cells;
        let count = cells.left.len();
        if count == 0 || entry_cells == 0 || !count.is_multiple_of(entry_cells) {
            let reason = format!(
                "{count} cells, not a multiple of the {entry_cells} that {} asks for (#address-cells = \
                 {address_cells}, #size-cells = {size_cells})",
                bus.path
            );
            return Err(node.malformed("reg", reason));
        }
        if count / entry_cells > MAX_ENTRIES {
            return Err(node.malformed("reg", format!("more than {MAX_ENTRIES} entries")));
        }
        if !(1..=2).contains(&address_cells) || !(1..=2).contains(&size_cells) {
            return Ok(Vec::new());
        }
        let mut regions = Vec::new();
        while let (Some(base), Some(size)) = (cells.number(address_cells), cells.number(size_cells)) {
            if base.checked_add(size).is_none() {
                let reason = format!("{size:#x} bytes at {base:#x} pass the end of the address space");
                return Err(node.malformed("reg", reason));
            }
            match self.translate(node, bus, base, size)? {
                Some(base) => regions.push(Region { base: Pa(base), size }),
                None => return Ok(Vec::new()),
            }
        }
        Ok(regions)
    }

    /// Translates an address on `bus` through the `ranges` up to the root.
    pub fn translate(
        &mut self,
        node: &Node,
        bus: &Node,
        base: u64,
        size: u64,
    ) -> Result<Option<u64>, TreeError> {
        let mut bus = bus;
        let mut base = base;
        while let Some(above) = self.parent(bus) {
            let Some(mut ranges) = self.cells(bus, "ranges")? else { return Ok(None) };
            if !ranges.left.is_empty() {
                let (child, child_size) = self.bus_cells(bus)?;
                let (parent, _) = self.bus_cells(above)?;
                let entry = child + parent + child_size;
                if entry == 0 || !ranges.left.len().is_multiple_of(entry) {
                    let reason = format!("{} cells, not a multiple of {entry}", ranges.left.len());
                    return Err(bus.malformed("ranges", reason));
                }
                if child > 2 || parent > 2 || child_size > 2 {
                    return Ok(None);
                }
                self.step(node, ranges.left.len() / entry)?;
                let mut found = None;
                while let (Some(from), Some(to), Some(len)) =
                    (ranges.number(child), ranges.number(parent), ranges.number(child_size))
                {
                    if let Some(offset) = base.checked_sub(from)
                        && offset.checked_add(size).is_some_and(|end| end <= len)
                    {
                        let cpu = to.checked_add(offset);
                        found = cpu.filter(|cpu| cpu.checked_add(size).is_some());
                        break;
                    }
                }
                match found {
                    Some(cpu) => base = cpu,
                    None => return Ok(None),
                }
            }
            bus = above;
        }
        Ok(Some(base))
    }

    /// `interrupts-extended`, or `interrupts` with the interrupt parent.
    pub fn interrupts(&mut self, node: &Node) -> Result<Vec<Interrupt>, TreeError> {
        let mut list = Vec::new();
        if let Some(mut cells) = self.cells(node, "interrupts-extended")? {
            while let Some(phandle) = cells.one() {
                if phandle == 0 {
                    continue;
                }
                let controller = self.target(node, "interrupts-extended", list.len(), phandle)?;
                self.interrupt(node, "interrupts-extended", controller, &mut cells, &mut list)?;
            }
        } else if let Some(mut cells) = self.cells(node, "interrupts")? {
            if cells.left.is_empty() {
                return Err(node.malformed("interrupts", "empty"));
            }
            let controller = self.interrupt_parent(node)?;
            while !cells.left.is_empty() {
                self.interrupt(node, "interrupts", controller, &mut cells, &mut list)?;
            }
        }
        Ok(list)
    }

    fn interrupt_parent(&mut self, node: &Node) -> Result<&'t Node, TreeError> {
        // A chain longer than the tree is deep goes in circles.
        let mut at = node;
        for _ in 0..super::blob::MAX_DEPTH {
            self.step(node, 1)?;
            let next = match at.cell("interrupt-parent")? {
                Some(phandle) => self.target(at, "interrupt-parent", 0, phandle)?,
                None => self.parent(at).ok_or_else(|| {
                    node.malformed("interrupts", "no `interrupt-parent` here or at any parent")
                })?,
            };
            if next.property("#interrupt-cells").is_some() {
                return Ok(next);
            }
            at = next;
        }
        Err(node.malformed("interrupts", "the interrupt parents go in a circle"))
    }

    fn interrupt(
        &mut self,
        node: &Node,
        property: &str,
        controller: &Node,
        cells: &mut Cells<'_>,
        list: &mut Vec<Interrupt>,
    ) -> Result<(), TreeError> {
        let entry = list.len();
        let fail = |reason: String| Err(node.malformed(property, format!("entry {entry}: {reason}")));
        if entry >= MAX_ENTRIES {
            return fail(format!("more than {MAX_ENTRIES} entries"));
        }
        let Some(count) = controller.cell("#interrupt-cells")? else {
            return fail(format!("{} has no `#interrupt-cells`", controller.path));
        };
        if count == 0 || count > 8 {
            return Err(controller.malformed("#interrupt-cells", format!("{count} cells, 1 to 8 make sense")));
        }
        let Some(spec) = cells.many(count as usize) else {
            return fail(format!("cut short, {} wants {count} cells", controller.path));
        };
        let gic = controller.compatible.iter().any(|c| c.contains("gic"));
        list.push(match spec.as_slice() {
            [0, number, flags] if gic => {
                if *number >= SPIS {
                    return fail(format!("SPI {number} does not exist, the last is {}", SPIS - 1));
                }
                Interrupt::Spi { number: *number, trigger: trigger(*flags) }
            }
            [1, number, flags] if gic => {
                if *number >= PPIS {
                    return fail(format!("PPI {number} does not exist, the last is {}", PPIS - 1));
                }
                Interrupt::Ppi { number: *number, trigger: trigger(*flags) }
            }
            _ => Interrupt::Other { controller: controller.id, cells: spec },
        });
        Ok(())
    }

    /// `iommus`.
    pub fn iommus(&mut self, node: &Node) -> Result<Vec<IommuSpecifier>, TreeError> {
        let mut list: Vec<IommuSpecifier> = Vec::new();
        let Some(mut cells) = self.cells(node, "iommus")? else { return Ok(list) };
        if cells.left.is_empty() {
            return Err(node.malformed("iommus", "empty"));
        }
        while let Some(phandle) = cells.one() {
            let entry = list.len();
            let fail = |reason: String| Err(node.malformed("iommus", format!("entry {entry}: {reason}")));
            if entry >= MAX_ENTRIES {
                return fail(format!("more than {MAX_ENTRIES} entries"));
            }
            let iommu = self.target(node, "iommus", entry, phandle)?;
            let Some(count) = iommu.cell("#iommu-cells")? else {
                return fail(format!("{} has no `#iommu-cells`, so it is no IOMMU", iommu.path));
            };
            let smmu = iommu.kind.filter(|kind| kind.is_smmu());
            match smmu {
                Some(Kind::SmmuV3) if count != 1 => {
                    return Err(iommu.malformed("#iommu-cells", format!("{count}, an SMMUv3 takes 1")));
                }
                Some(_) if !(1..=2).contains(&count) => {
                    return Err(iommu.malformed("#iommu-cells", format!("{count}, an SMMU takes 1 or 2")));
                }
                _ => {}
            }
            if count > 8 {
                return Err(iommu.malformed("#iommu-cells", format!("{count} cells, at most 8 make sense")));
            }
            let Some(spec) = cells.many(count as usize) else {
                return fail(format!("cut short, {} wants {count} cells after the phandle", iommu.path));
            };
            let stream = spec.first().copied().unwrap_or(0);
            let mask = match spec.get(1) {
                Some(mask) => *mask,
                None if smmu.is_some_and(|kind| kind != Kind::SmmuV3) => {
                    iommu.cell("stream-match-mask")?.unwrap_or(0)
                }
                None => 0,
            };
            if let Some(kind) = smmu {
                let bits = stream_bits(kind);
                for (what, value) in [("stream id", stream), ("mask", mask)] {
                    if u64::from(value) >> bits != 0 {
                        return fail(format!(
                            "the {what} {value:#x} is wider than the {bits} bits of {}",
                            iommu.path
                        ));
                    }
                }
            }
            list.push(IommuSpecifier { iommu: iommu.id, stream: StreamId(stream), mask, cells: spec });
        }
        Ok(list)
    }

    /// `mmu-masters`: phandles, each followed by as many stream ids as that node's `#stream-id-cells` says.
    pub fn mmu_masters(&mut self, node: &Node) -> Result<Vec<LegacyMaster>, TreeError> {
        const NAME: &str = "mmu-masters";
        let mut list: Vec<LegacyMaster> = Vec::new();
        let Some(mut cells) = self.cells(node, NAME)? else { return Ok(list) };
        let bits = stream_bits(node.kind.unwrap_or(Kind::SmmuV2));
        while let Some(phandle) = cells.one() {
            let entry = list.len();
            let fail = |reason: String| Err(node.malformed(NAME, format!("entry {entry}: {reason}")));
            if entry >= MAX_ENTRIES {
                return fail(format!("more than {MAX_ENTRIES} entries"));
            }
            let master = self.target(node, NAME, entry, phandle)?;
            let Some(count) = master.cell("#stream-id-cells")? else {
                return fail(format!("{} has no `#stream-id-cells`", master.path));
            };
            let Some(ids) = cells.many(count as usize) else {
                return fail(format!("cut short, {} has {count} stream ids", master.path));
            };
            if let Some(id) = ids.iter().find(|id| u64::from(**id) >> bits != 0) {
                return fail(format!("the stream id {id:#x} is wider than {bits} bits"));
            }
            let streams = ids.into_iter().map(StreamId).collect();
            list.push(LegacyMaster { master: master.id, streams });
        }
        Ok(list)
    }
}

fn trigger(flags: u32) -> Trigger {
    // Bits 15:8 are the CPU mask of a private interrupt.
    match flags & 0xFF {
        1 => Trigger::EdgeRising,
        2 => Trigger::EdgeFalling,
        4 => Trigger::LevelHigh,
        8 => Trigger::LevelLow,
        other => Trigger::Other(other),
    }
}
