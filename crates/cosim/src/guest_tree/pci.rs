//! PCIe test devices: functions of QEMU's host bridge, each in a slot of its own.
//!
//! Their nodes are children of the bridge's node, as on the board: a machine is built from them, and the guest kernel finds
//! them by slot and function and keeps them as the devices' nodes. Entries of `iommu-map` cover exactly their requester
//! ids, so that QEMU's own functions stay outside of our SMMUs.

use std::collections::{HashMap, HashSet};

use dtoolkit::model::{DeviceTreeNode, DeviceTreeProperty};
use portcullis_arch::Pa;
use portcullis_board::compatible::NAME;
use portcullis_board::machine::TestDevice;
use portcullis_board::tree::{NodeId, Region, Rid};
use portcullis_board::{MachineDescription, Tree};

use super::copy::{base_name, cells, is_reference, push_number, text};
use super::virt::Virt;
use super::{GuestTreeError, LeftOut, Options, PciFunction, Phandles, source};

/// Slots of bus 0.
const SLOTS: u8 = 32;
/// Smallest BAR of memory that the registers fit in.
const MIN_BAR: u64 = 0x1000;
/// BAR 0 in configuration space.
const BAR0: u32 = 0x10;
/// Properties that are written anew, or that a function of QEMU's bridge does not have.
const REPLACED: &[&str] = &[
    "reg",
    "assigned-addresses",
    "status",
    "phandle",
    "linux,phandle",
    "interrupts",
    "interrupts-extended",
    "interrupt-names",
    "interrupt-parent",
    "dma-coherent",
    "dma-noncoherent",
    "iommus",
    "ranges",
    "dma-ranges",
    NAME,
];

/// The functions with their nodes, and the bridge's `iommu-map`.
#[derive(Default)]
pub(super) struct Functions {
    pub list: Vec<PciFunction>,
    pub nodes: Vec<DeviceTreeNode>,
    pub iommu_map: Vec<u8>,
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, GuestTreeError> {
    Err(GuestTreeError::Pci { reason: reason.into() })
}

#[expect(clippy::too_many_arguments, reason = "one step of `guest_tree`, called once")]
pub(super) fn functions(
    board: &Tree,
    description: &MachineDescription,
    virt: &Virt<'_>,
    window: &Region,
    options: &Options,
    renamed: &HashMap<NodeId, u32>,
    phandles: &mut Phandles,
    left_out: &mut Vec<LeftOut>,
) -> Result<Functions, GuestTreeError> {
    let mut out = Functions::default();
    let used = || description.test_devices.iter().enumerate().filter(|(_, d)| d.node.available);
    if !options.pci {
        left_out.extend(used().map(|(_, d)| LeftOut {
            path: d.node.path.clone(),
            reason: "PCI functions are switched off".into(),
        }));
        return Ok(out);
    }
    let count = used().count();
    if count == 0 {
        return Ok(out);
    }
    let first = options.pci_first_slot;
    if first == 0 || count > usize::from(SLOTS.saturating_sub(first)) {
        return refuse(format!("{count} from slot {first} on, there are slots 1 to {}", SLOTS - 1));
    }
    for name in ["iommu-map", "iommu-map-mask"] {
        if virt.pcie.property(name).is_some() {
            let reason = format!("has `{name}`: start QEMU without an IOMMU of its own");
            return Err(GuestTreeError::NotVirt { node: virt.pcie.path.clone(), reason });
        }
    }
    let children = virt.pcie.children().iter().filter_map(|id| virt.tree.node(*id));
    let (rids, mut names): (HashSet<Option<Rid>>, HashSet<String>) =
        children.map(|c| (c.rid, c.name().to_owned())).unzip();
    let mut bars = Bars::of(virt, window);
    for (slot, (_, device)) in (first..SLOTS).zip(used()) {
        let rid = Rid(u16::from(slot) << 3);
        if rids.contains(&Some(rid)) {
            return refuse(format!("slot {slot} has a node in QEMU's device tree already"));
        }
        let Some(node) = board.find(&device.node.path) else { continue };
        let mut name = format!("{}@{slot:x},0", base_name(node));
        if !names.insert(name.clone()) {
            name = format!("testdev@{slot:x},0");
            if !names.insert(name.clone()) {
                return refuse(format!("{name} is in QEMU's device tree already"));
            }
        }
        let bar = bars.next(device.region.size)?;
        let mut copy = DeviceTreeNode::new_unchecked(name.clone());
        let mut add =
            |name: &str, value: Vec<u8>| copy.add_property(DeviceTreeProperty::new_unchecked(name, value));
        for (name, value) in node.properties() {
            if !REPLACED.contains(&name) && !is_reference(name) && source::is_property(name) {
                add(name, value.to_vec());
            }
        }
        let configuration = u32::from(rid.0) << 8;
        add("reg", cells(&[configuration, 0, 0, 0, 0]));
        let mut assigned = cells(&[bar.flags | configuration | BAR0]);
        push_number(&mut assigned, bar.pci, 2);
        push_number(&mut assigned, bar.region.size, 2);
        add("assigned-addresses", assigned);
        add(if device.dma_coherent { "dma-coherent" } else { "dma-noncoherent" }, Vec::new());
        add(NAME, text(&device.node.name));
        if node.phandle.is_some() {
            add("phandle", cells(&[phandles.next()?]));
        }
        let streams = map_stream(board, description, device, rid, renamed, &mut out.iommu_map);
        if streams > 1 {
            left_out.push(LeftOut {
                path: device.node.path.clone(),
                reason: format!("{streams} streams: a requester id has one, the first"),
            });
        }
        out.nodes.push(copy);
        out.list.push(PciFunction {
            board_path: device.node.path.clone(),
            guest_path: format!("{}/{name}", virt.pcie.path),
            name: format!("testdev{}", out.list.len()),
            board_rid: device.rid,
            rid,
            slot,
            streams: device.streams.declared.iter().take(1).map(|d| d.id).collect(),
            pasid_bits: device.pasid_bits,
            ats: device.ats,
            pri: device.pri,
            bar: bar.region,
        });
    }
    Ok(out)
}

/// Adds the function's entry to `iommu-map`. Returns how many streams the board gives it.
fn map_stream(
    board: &Tree,
    description: &MachineDescription,
    device: &TestDevice,
    rid: Rid,
    renamed: &HashMap<NodeId, u32>,
    map: &mut Vec<u8>,
) -> usize {
    let declared = &device.streams.declared;
    let entry = declared.first().and_then(|d| {
        let smmu = board.find(&description.smmus.get(d.smmu)?.node.path)?;
        Some((*renamed.get(&smmu.id())?, d.id.get()))
    });
    if let Some((phandle, stream)) = entry {
        map.extend(cells(&[rid.0.into(), phandle, stream, 1]));
    }
    declared.len()
}

/// A BAR: where it is on the bus and for the CPU.
struct Bar {
    flags: u32,
    pci: u64,
    region: Region,
}

/// Hands out addresses of the bridge's memory: of the 64-bit one if there is one, else of what is left of the 32-bit one.
struct Bars {
    flags: u32,
    /// From bus to CPU addresses.
    offset: u64,
    next: u64,
    end: u64,
}

impl Bars {
    fn of(virt: &Virt<'_>, window: &Region) -> Self {
        // Not relocatable; prefetchable in 64 bits.
        match virt.ranges.iter().find(|r| r.space() == 3) {
            Some(r) => Self {
                flags: 0xc300_0000,
                offset: r.cpu.wrapping_sub(r.pci),
                next: r.pci,
                end: r.pci.saturating_add(r.size),
            },
            None => Self {
                flags: 0x8200_0000,
                offset: 0,
                next: virt.memory32().base.get(),
                end: window.base.get(),
            },
        }
    }

    fn next(&mut self, size: u64) -> Result<Bar, GuestTreeError> {
        let full = || GuestTreeError::Pci {
            reason: format!("no room for a BAR of {size:#x} bytes in the PCI memory of QEMU's host bridge"),
        };
        let size = size.max(MIN_BAR).checked_next_power_of_two().ok_or_else(full)?;
        let pci = self.next.checked_next_multiple_of(size).ok_or_else(full)?;
        self.next = pci.checked_add(size).filter(|end| *end <= self.end).ok_or_else(full)?;
        Ok(Bar { flags: self.flags, pci, region: Region { base: Pa(pci.wrapping_add(self.offset)), size } })
    }
}
