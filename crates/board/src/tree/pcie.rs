//! Decodes what a PCIe host bridge and the functions below it say: requester ids, base address registers, and the maps
//! from requester ids to stream ids and to the device ids of messages.
//!
//! Addresses of PCI have three cells: flags with bus, device and function in the first, then 64 bits. The shapes are
//! those of the PCI Bus Binding to Open Firmware; the maps are Linux's `of_map_id`.

use portcullis_arch::Pa;

use super::decode::{Decoder, stream_bits};
use super::error::TreeError;
use super::node::{Bar, IdMap, MapEntry, Node, NodeId, Region, Rid};
use crate::compatible::Kind;

/// Requester ids have 16 bits.
const RIDS: u32 = 1 << 16;
/// Most entries of a map: every machine known has fewer than ten.
const MAX_MAP: usize = 256;

/// Which map.
pub(super) struct MapNames {
    map: &'static str,
    mask: &'static str,
    /// The property of a target that says how many cells it takes.
    cells: &'static str,
}

pub(super) const IOMMU_MAP: MapNames =
    MapNames { map: "iommu-map", mask: "iommu-map-mask", cells: "#iommu-cells" };
pub(super) const MSI_MAP: MapNames = MapNames { map: "msi-map", mask: "msi-map-mask", cells: "#msi-cells" };

impl Decoder<'_> {
    /// The requester id in `reg` of a function.
    pub fn rid(&mut self, node: &Node) -> Result<Option<Rid>, TreeError> {
        let Some(mut cells) = self.cells(node, "reg")? else { return Ok(None) };
        let count = cells.left.len();
        if count == 0 || !count.is_multiple_of(5) {
            let reason = format!("{count} cells, below a PCIe bridge it is 3 of address and 2 of size each");
            return Err(node.malformed("reg", reason));
        }
        let Some(first) = cells.one() else { return Ok(None) };
        // Space code 0 is configuration space, register 0.
        if first & 0x0300_00ff != 0 {
            let reason = format!("the first entry {first:#x} is not a configuration address");
            return Err(node.malformed("reg", reason));
        }
        Ok(Some(Rid((first >> 8) as u16)))
    }

    /// `assigned-addresses` of a function, as the CPU sees them through the bridge's `ranges`.
    pub fn bars(&mut self, node: &Node, host: &Node) -> Result<Vec<Bar>, TreeError> {
        const NAME: &str = "assigned-addresses";
        let Some(mut cells) = self.cells(node, NAME)? else { return Ok(Vec::new()) };
        if !cells.left.len().is_multiple_of(5) {
            let reason = format!("{} cells, not a multiple of 5", cells.left.len());
            return Err(node.malformed(NAME, reason));
        }
        if cells.left.len() > 5 * 7 {
            return Err(node.malformed(NAME, "more entries than a function has base address registers"));
        }
        let mut bars = Vec::new();
        while let (Some(flags), Some(base), Some(size)) = (cells.one(), cells.number(2), cells.number(2)) {
            if base.checked_add(size).is_none() {
                let reason = format!("{size:#x} bytes at {base:#x} pass the end of the address space");
                return Err(node.malformed(NAME, reason));
            }
            // 2: memory with 32 bits of address, 3: with 64.
            if !matches!(flags >> 24 & 3, 2 | 3) || size == 0 {
                continue;
            }
            if let Some(base) = self.through_bridge(node, host, base, size)? {
                bars.push(Bar { register: flags as u8, region: Region { base: Pa(base), size } });
            }
        }
        Ok(bars)
    }

    /// A PCI memory address as the CPU sees it.
    fn through_bridge(
        &mut self,
        node: &Node,
        host: &Node,
        base: u64,
        size: u64,
    ) -> Result<Option<u64>, TreeError> {
        let (Some(mut ranges), Some(above)) = (self.cells(host, "ranges")?, self.parent(host)) else {
            return Ok(None);
        };
        let (child, child_size) = self.bus_cells(host)?;
        let (parent, _) = self.bus_cells(above)?;
        let entry = child + parent + child_size;
        if child != 3 || parent > 2 || child_size > 2 {
            return Ok(None);
        }
        if entry == 0 || !ranges.left.len().is_multiple_of(entry) {
            let reason = format!("{} cells, not a multiple of {entry}", ranges.left.len());
            return Err(host.malformed("ranges", reason));
        }
        self.step(node, ranges.left.len() / entry)?;
        while let (Some(flags), Some(from), Some(to), Some(len)) =
            (ranges.one(), ranges.number(2), ranges.number(parent), ranges.number(child_size))
        {
            if matches!(flags >> 24 & 3, 2 | 3)
                && let Some(offset) = base.checked_sub(from)
                && offset.checked_add(size).is_some_and(|end| end <= len)
            {
                let Some(cpu) = to.checked_add(offset).filter(|cpu| cpu.checked_add(size).is_some()) else {
                    return Ok(None);
                };
                return self.translate(node, above, cpu, size);
            }
        }
        Ok(None)
    }

    /// `iommu-map` or `msi-map`: each entry is the first requester id, a phandle, the first id there, and how many.
    pub fn id_map(&mut self, node: &Node, names: &MapNames) -> Result<IdMap, TreeError> {
        let mask = node.cell(names.mask)?.unwrap_or(RIDS - 1);
        let mut map = IdMap { mask, entries: Vec::new() };
        let Some(mut cells) = self.cells(node, names.map)? else { return Ok(map) };
        let count = cells.left.len();
        if count == 0 || !count.is_multiple_of(4) {
            let reason = format!("{count} cells, not a multiple of 4 (requester id, phandle, id, how many)");
            return Err(node.malformed(names.map, reason));
        }
        while let (Some(first), Some(phandle), Some(base), Some(count)) =
            (cells.one(), cells.one(), cells.one(), cells.one())
        {
            let entry = map.entries.len();
            let fail = |reason: String| Err(node.malformed(names.map, format!("entry {entry}: {reason}")));
            if entry >= MAX_MAP {
                return fail(format!("more than {MAX_MAP} entries"));
            }
            let target = self.target(node, names.map, entry, phandle)?;
            match target.cell(names.cells)? {
                // A GICv2m frame takes no device id and does not say so; Linux does not ask.
                None if names.map == MSI_MAP.map => {}
                None => return fail(format!("{} has no `{}`", target.path, names.cells)),
                Some(1) => {}
                // Linux reads one cell of id per entry whatever the target says.
                Some(2) if target.kind.is_some_and(|k| matches!(k, Kind::Mmu500 | Kind::SmmuV2)) => {}
                Some(n) => return fail(format!("{} takes {n} cells, a map has one per entry", target.path)),
            }
            if count == 0 {
                return fail("it covers no requester id".into());
            }
            if first & !mask != 0 {
                return fail(format!("{} {mask:#x} ignores bits of the requester id {first:#x}", names.mask));
            }
            if first.checked_add(count).is_none_or(|end| end > RIDS) {
                return fail(format!("{count:#x} requester ids from {first:#x} pass the last one, 0xffff"));
            }
            let Some(last) = base.checked_add(count - 1) else {
                return fail(format!("{count:#x} ids from {base:#x} pass 32 bits"));
            };
            if let Some(kind) = target.kind.filter(|k| k.is_smmu()) {
                let bits = stream_bits(kind);
                if u64::from(last) >> bits != 0 {
                    return fail(format!(
                        "the stream id {last:#x} is wider than the {bits} bits of {}",
                        target.path
                    ));
                }
            }
            map.entries.push(MapEntry { first, target: target.id, base, count });
        }
        Ok(map)
    }

    /// `msi-parent`: the first controller and its device id.
    pub fn msi_parent(&mut self, node: &Node) -> Result<Option<(NodeId, u32)>, TreeError> {
        const NAME: &str = "msi-parent";
        let Some(mut cells) = self.cells(node, NAME)? else { return Ok(None) };
        let Some(phandle) = cells.one() else { return Err(node.malformed(NAME, "empty")) };
        let controller = self.target(node, NAME, 0, phandle)?;
        let count = match controller.cell("#msi-cells")?.unwrap_or(0) {
            n @ 0..=4 => n as usize,
            n => return Err(controller.malformed("#msi-cells", format!("{n} cells, at most 4 make sense"))),
        };
        let Some(spec) = cells.many(count) else {
            let reason = format!("cut short, {} wants {count} cells after the phandle", controller.path);
            return Err(node.malformed(NAME, reason));
        };
        Ok(Some((controller.id, spec.first().copied().unwrap_or(0))))
    }
}
