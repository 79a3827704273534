//! The guest's device tree, from QEMU's own and the board's.
//!
//! [`guest_tree`] takes the tree that describes a board and the tree that QEMU's `virt` machine makes of itself
//! (`-machine ...,dumpdtb=FILE`), and puts the board's SMMUs and DMA engines into the second, with their registers in one
//! window. The window is a PCI BAR, so it lies in what was PCI memory: the guest kernel is told of less PCI memory, QEMU still
//! decodes all of it. The result is what the guest kernel boots with, and at the same time what the models are built
//! from ([`portcullis_board::MachineDescription`]): both sides have one description.
//!
//! | Of the board | In the guest |
//! |---|---|
//! | SMMUs, DMA channels, PL writers in use | below `/portcullis`, in the order of the board's tree; registers in the window, in the order of the board's addresses |
//! | the same, not in use | there too, still not in use, where the board has them: numbers and names of the others stay |
//! | PCIe test devices | functions of QEMU's host bridge, in slots of their own; served on sockets of their own |
//! | interrupts | the board's SPI numbers where QEMU has not used them, else the next free ones from 100 up |
//! | messages of an SMMUv3 | QEMU's ITS, device id 0: QEMU delivers our messages with no other |
//! | names, addresses on a known chip | [`compatible::NAME`](portcullis_board::compatible::NAME), [`CHIP_ADDRESS`](portcullis_board::compatible::CHIP_ADDRESS) |
//! | `iommus` of a PL writer | left out if the SMMUv2 has fewer context banks than masters: newer kernels attach all at once |
//! | RAM, reserved memory, clocks, everything not modelled | left out: the guest has QEMU's |
//!
//! What is left out is listed with reasons in [`GuestTree::left_out`]. Any two trees give a result or one error.
//!
//! | Step | File |
//! |---|---|
//! | what is in QEMU's tree: interrupt controller, host bridge, what is used | `virt.rs` |
//! | where registers go | `window.rs` |
//! | which numbers interrupts get | `interrupts.rs` |
//! | one node, copied | `copy.rs` |
//! | PCI functions | `pci.rs` |
//! | the result as source | `source.rs` |

mod copy;
mod error;
mod interrupts;
mod pci;
mod source;
mod virt;
mod window;

use std::collections::{HashMap, HashSet};

use dtoolkit::Node as _;
use dtoolkit::model::{DeviceTreeNode, DeviceTreeProperty};
use portcullis_arch::zynqmp::ZdmaUnit;
use portcullis_arch::{Pa, StreamId};
use portcullis_board::compatible::Kind;
use portcullis_board::machine::{Master, NodeInfo, Streams};
use portcullis_board::tree::{Node, NodeId, Region, Rid};
use portcullis_board::{MachineDescription, Tree};

pub use error::GuestTreeError;
pub use source::fragments;

use copy::Copier;
use interrupts::Spis;
use virt::Virt;

/// The node that the board's devices are below.
pub const BUS: &str = "/portcullis";
/// Smallest window: a page of every kernel.
pub const MIN_WINDOW: u64 = 0x1_0000;
/// Largest window.
pub const MAX_WINDOW: u64 = 0x0800_0000;
/// The name of the bus without the slash.
const BUS_NAME: &str = "portcullis";

/// How an SMMUv3 reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Messages {
    /// As the board says: an SMMUv3 that has `msi-parent` there sends messages. Its wires stay, as on the board; Linux takes
    /// messages where it can.
    #[default]
    AsBoard,
    /// By wires: no SMMUv3 has `msi-parent`.
    Wired,
    /// By messages: the first SMMUv3 in use has `msi-parent`, whatever the board says. An error without an ITS.
    Messages,
}

/// How to make a guest tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the window should be; by default at the last multiple of 256 MiB of the 32-bit PCI memory after which it fits,
    /// which is 0x3000_0000 on `virt`. A multiple of the window's size.
    pub window_base: Option<u64>,
    /// How an SMMUv3 reports.
    pub messages: Messages,
    /// Take the PCIe test devices along.
    pub pci: bool,
    /// The slot of the first of them on QEMU's bus 0; each gets the next one, function 0.
    pub pci_first_slot: u8,
}

/// The board as it is; the test devices from slot 2 on, after the window's.
impl Default for Options {
    fn default() -> Self {
        Self { window_base: None, messages: Messages::AsBoard, pci: true, pci_first_slot: 2 }
    }
}

/// A device of the board with its registers in the window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// What it is.
    pub kind: Kind,
    /// Its node on the board.
    pub board_path: String,
    /// Its node in the guest's tree.
    pub guest_path: String,
    /// What a machine built from either tree calls it: `smmu`, `fpd-dma0`, `pl-writer0`.
    pub name: String,
    /// Where the board has its registers.
    pub board_base: Pa,
    /// Where the guest has them.
    pub base: Pa,
    /// Bytes of registers.
    pub size: u64,
    /// Its SPI numbers, on the board and in the guest, in the order of the node. An interrupt that the board does not have (wires of an
    /// SMMUv3 that had messages only) is not in it.
    pub interrupts: Vec<(u32, u32)>,
}

/// A PCIe test device of the board, to be served as a function of QEMU's host bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Its node on the board.
    pub board_path: String,
    /// Its node in the guest's tree.
    pub guest_path: String,
    /// What a machine built from the guest's tree calls it: `testdev0`; one built from the board's tree does too, unless it counts
    /// others that are not in use.
    pub name: String,
    /// Its requester id on the board.
    pub board_rid: Rid,
    /// Its requester id in the guest: bus 0, its slot, function 0.
    pub rid: Rid,
    /// Its slot in the guest.
    pub slot: u8,
    /// The streams that the SMMUs see, on the board and in the guest.
    pub streams: Vec<StreamId>,
    /// Bits of its process address space ids; 0 for none.
    pub pasid_bits: u8,
    /// It has address translation services.
    pub ats: bool,
    /// It has page requests.
    pub pri: bool,
    /// BAR 0 in the guest's tree. The models are built with it; the guest kernel assigns its own.
    pub bar: Region,
}

/// Something of the board that the guest does not have, or not in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// The node on the board.
    pub path: String,
    /// What, and why.
    pub reason: String,
}

/// A guest's device tree, and what is known about it.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestTree {
    /// The tree, checked; [`Tree::to_dtb`] is what QEMU takes.
    pub tree: Tree,
    /// The register window: what BAR 0 of the window's function has to be set to, and its size, a power of two.
    pub window: Region,
    /// The configuration space of QEMU's host bridge; a function of bus 0 is at `slot << 15`.
    pub ecam: Pa,
    /// The devices in the window, in the order of their addresses.
    pub placed: Vec<Placed>,
    /// What the guest does not have of the board.
    pub left_out: Vec<LeftOut>,
    /// Where messages are written to (GITS_TRANSLATER), if QEMU's machine has an ITS.
    pub its_translater: Option<Pa>,
    /// The distributor of QEMU's interrupt controller.
    pub gicd: Pa,
    /// The PCI functions, in the order of their slots.
    pub pci: Vec<PciFunction>,
    /// QEMU's host bridge.
    pcie_path: String,
    /// The properties of the bridge that are not QEMU's any more.
    pcie_changed: Vec<&'static str>,
}

impl GuestTree {
    /// The offset in the window at which a device has its registers.
    pub fn offset(&self, placed: &Placed) -> u64 {
        placed.base.get().wrapping_sub(self.window.base.get())
    }
}

/// Puts the devices of a board into QEMU's tree.
///
/// # Errors
/// A board or a QEMU machine that does not fit, see [`GuestTreeError`]. What merely cannot be taken along is in
/// [`GuestTree::left_out`].
pub fn guest_tree(board: &Tree, qemu: &Tree, options: &Options) -> Result<GuestTree, GuestTreeError> {
    let description = MachineDescription::from_tree(board).map_err(GuestTreeError::Board)?;
    let virt = Virt::of(qemu)?;
    let devices = devices(board, &description);
    let placed_order: Vec<&Device<'_>> = {
        let mut used: Vec<_> = devices.iter().filter(|d| d.info.available).collect();
        used.sort_by_key(|d| d.region.base);
        used
    };
    if placed_order.is_empty() {
        return Err(GuestTreeError::NoDevices);
    }
    let (window, bases) = window::place(&placed_order, virt.memory32(), options.window_base)?;
    let base_of: HashMap<NodeId, Pa> = placed_order.iter().map(|d| d.node.id()).zip(bases).collect();
    let spis = Spis::assign(board, &placed_order, &virt.spis)?;

    let mut phandles = Phandles::new(qemu)?;
    let mut renamed: HashMap<NodeId, u32> = HashMap::new();
    for device in devices.iter().filter(|d| d.node.phandle.is_some()) {
        renamed.insert(device.node.id(), phandles.next()?);
    }
    let clock = match virt.clock {
        Some(phandle) => Clock { phandle, ours: false },
        None => Clock { phandle: phandles.next()?, ours: true },
    };

    let mut left_out = left_out(board, &description);
    let untold = untold(&description);
    let mut copier = Copier {
        board,
        virt: &virt,
        options: *options,
        phandles: &renamed,
        clock: clock.phandle,
        spis,
        untold,
        left_out: &mut left_out,
        chip: copy::is_zynqmp(board),
        messages: None,
    };
    let mut bus = bus_node(&virt, &clock);
    let names = copy::names(&devices, &base_of);
    let mut placed = Vec::new();
    let mut copies = Vec::new();
    for (device, name) in devices.iter().zip(names) {
        let guest_path = format!("{BUS}/{name}");
        let (node, interrupts) = copier.copy(device, name, base_of.get(&device.node.id()).copied())?;
        bus.add_child(node);
        copies.push((device.node, guest_path.clone()));
        if let Some(base) = base_of.get(&device.node.id()) {
            placed.push(Placed {
                kind: device.kind,
                board_path: device.node.path.clone(),
                guest_path,
                name: device.name.clone(),
                board_base: device.region.base,
                base: *base,
                size: device.region.size,
                interrupts,
            });
        }
    }
    placed.sort_by_key(|p| p.base);

    let functions =
        pci::functions(board, &description, &virt, &window, options, &renamed, &mut phandles, &mut left_out)?;
    let mut pcie_changed = vec!["ranges"];
    pcie_changed.extend((!functions.iommu_map.is_empty()).then_some("iommu-map"));
    // Linux takes no device's word for it: without this it leaves ATS off (`arm_smmu_ats_supported`).
    let ats = functions.list.iter().any(|f| f.ats) && !functions.iommu_map.is_empty();
    pcie_changed.extend(ats.then_some("ats-supported"));
    let functions_of_board =
        functions.list.iter().filter_map(|f| Some((board.find(&f.board_path)?, f.guest_path.clone())));
    let symbols = symbols(copies.into_iter().chain(functions_of_board));
    let ranges = virt.ranges_before(window.base.get());
    let iommu_map = functions.iommu_map;
    let nodes = functions.nodes;
    let pcie_name = virt.pcie.name().to_owned();
    let edited = qemu
        .edit(move |model| {
            if let Some(pcie) = model.root.child_mut(&pcie_name) {
                pcie.add_property(DeviceTreeProperty::new_unchecked("ranges", ranges));
                if !iommu_map.is_empty() {
                    pcie.add_property(DeviceTreeProperty::new_unchecked("iommu-map", iommu_map));
                }
                if ats {
                    pcie.add_property(DeviceTreeProperty::new_unchecked("ats-supported", Vec::<u8>::new()));
                }
                for node in nodes {
                    pcie.add_child(node);
                }
            }
            model.root.add_child(bus);
            add_symbols(&mut model.root, symbols);
            Ok(())
        })
        .map_err(GuestTreeError::Guest)?;
    // What the kernel gets is the blob, so the blob is what is checked.
    let tree = Tree::from_dtb(&edited.to_dtb()).map_err(GuestTreeError::Guest)?;
    MachineDescription::from_tree(&tree).map_err(GuestTreeError::Guest)?;
    Ok(GuestTree {
        tree,
        window,
        ecam: virt.ecam,
        placed,
        left_out,
        its_translater: virt.its.map(|its| its.translater),
        gicd: virt.gicd,
        pci: functions.list,
        pcie_path: virt.pcie.path.clone(),
        pcie_changed,
    })
}

/// A device of the board that is modelled and no PCI function.
struct Device<'b> {
    node: &'b Node,
    info: &'b NodeInfo,
    kind: Kind,
    region: Region,
    name: String,
}

/// The devices, in the order of the board's tree.
fn devices<'b>(board: &'b Tree, description: &'b MachineDescription) -> Vec<Device<'b>> {
    let mut devices: Vec<Device<'b>> = Vec::new();
    let mut add = |info: &'b NodeInfo, kind: Kind, region: Region, name: String| {
        if let Some(node) = board.find(&info.path) {
            devices.push(Device { node, info, kind, region, name });
        }
    };
    let alone = description.smmus.iter().filter(|s| s.node.available).count() == 1;
    for smmu in &description.smmus {
        let name = if alone && smmu.node.available { "smmu".into() } else { smmu.node.name.clone() };
        add(&smmu.node, smmu.kind, smmu.region, name);
    }
    for (index, channel) in description.dma_channels.iter().enumerate() {
        let name = match channel.chip {
            Some(chip) if chip.unit == ZdmaUnit::Fpd => format!("fpd-dma{}", chip.index),
            Some(chip) => format!("lpd-dma{}", chip.index),
            None => format!("dma{index}"),
        };
        add(&channel.node, Kind::Zdma, channel.region, name);
    }
    for (index, writer) in description.pl_writers.iter().enumerate() {
        add(&writer.node, Kind::PlWriter, writer.region, format!("pl-writer{index}"));
    }
    devices.sort_by_key(|d| d.node.id());
    devices
}

/// What the guest cannot have, whatever QEMU's machine is.
fn left_out(board: &Tree, description: &MachineDescription) -> Vec<LeftOut> {
    let mut list = Vec::new();
    let mut add = |path: &str, reason: &str| list.push(LeftOut { path: path.into(), reason: reason.into() });
    for reserved in &description.reserved {
        add(&reserved.path, "reserved memory of the board: the guest's RAM is QEMU's");
    }
    for smmu in description.smmus.iter().filter(|s| s.legacy) {
        add(
            &smmu.node.path,
            "`mmu-masters`: the legacy binding is not copied, today's kernels are not built for it; give the masters `iommus`",
        );
    }
    for master in description.masters.iter().filter(|m| m.node.available) {
        let kind = board.find(&master.node.path).and_then(|n| n.kind);
        if kind.is_none() {
            add(&master.node.path, "a master that is not modelled");
        }
    }
    list
}

/// PL writers whose `iommus` the guest's tree does not have, by their nodes on the board.
///
/// Linux 6.12 attaches a master to a domain when a driver binds to it. Newer kernels (7.3) attach all of them when the SMMU
/// registers, which takes a context bank each, and give the SMMU up with -ENOSPC when banks run out. Where an SMMUv2 has
/// fewer banks than masters, the masters that no driver of Linux is for must not cost one. What the hardware sends, and
/// that it comes to the SMMU, is the chip's and the same without the property.
fn untold(description: &MachineDescription) -> HashSet<String> {
    let mut paths = HashSet::new();
    for (index, smmu) in
        description.smmus.iter().enumerate().filter(|(_, s)| s.node.available && s.v3.is_none())
    {
        let banks = smmu.interrupts.len().saturating_sub(smmu.global_interrupts);
        let declared = |streams: &Streams| streams.declared.iter().any(|d| d.smmu == index);
        let behind = |m: &&Master| m.node.available && declared(&m.streams);
        if description.masters.iter().filter(behind).count() > banks {
            let writers = description
                .pl_writers
                .iter()
                .filter(|w| declared(&w.streams) && !w.streams.actual.is_empty());
            paths.extend(writers.map(|w| w.node.path.clone()));
        }
    }
    paths
}

/// Phandles that QEMU's tree does not use.
struct Phandles(u32);

impl Phandles {
    fn new(qemu: &Tree) -> Result<Self, GuestTreeError> {
        qemu.unused_phandle().map(Self).ok_or(GuestTreeError::NoPhandles)
    }
    fn next(&mut self) -> Result<u32, GuestTreeError> {
        let next = self.0;
        if next == u32::MAX {
            return Err(GuestTreeError::NoPhandles);
        }
        self.0 = next + 1;
        Ok(next)
    }
}

/// The clock of the DMA channels: their driver wants two, of any rate.
struct Clock {
    phandle: u32,
    /// QEMU's tree has none, so it becomes a node of ours.
    ours: bool,
}

fn bus_node(virt: &Virt<'_>, clock: &Clock) -> DeviceTreeNode {
    let mut bus = DeviceTreeNode::new_unchecked(BUS_NAME);
    let mut add =
        |name: &str, value: Vec<u8>| bus.add_property(DeviceTreeProperty::new_unchecked(name, value));
    add("compatible", copy::text("simple-bus"));
    add("#address-cells", copy::cells(&[2]));
    add("#size-cells", copy::cells(&[2]));
    add("ranges", Vec::new());
    add("interrupt-parent", copy::cells(&[virt.gic_phandle]));
    if clock.ours {
        let mut node = DeviceTreeNode::new_unchecked("clock");
        let mut add =
            |name: &str, value: Vec<u8>| node.add_property(DeviceTreeProperty::new_unchecked(name, value));
        add("compatible", copy::text("fixed-clock"));
        add("#clock-cells", copy::cells(&[0]));
        add("clock-frequency", copy::cells(&[100_000_000]));
        add("phandle", copy::cells(&[clock.phandle]));
        bus.add_child(node);
    }
    bus
}

/// The board's labels of what was copied, with the new paths.
fn symbols<'b>(copies: impl Iterator<Item = (&'b Node, String)>) -> Vec<(String, String)> {
    let mut symbols = Vec::new();
    for (node, path) in copies {
        let labels = node.labels.iter().filter(|l| source::is_label(l));
        symbols.extend(labels.map(|label| (label.clone(), path.clone())));
    }
    symbols
}

fn add_symbols(root: &mut DeviceTreeNode, symbols: Vec<(String, String)>) {
    const NAME: &str = "__symbols__";
    if symbols.is_empty() {
        return;
    }
    if !root.children().any(|c| c.name() == NAME) {
        root.add_child(DeviceTreeNode::new_unchecked(NAME));
    }
    let Some(node) = root.child_mut(NAME) else { return };
    for (label, path) in symbols {
        if node.property_mut(&label).is_none() {
            node.add_property(DeviceTreeProperty::new_unchecked(label, copy::text(&path)));
        }
    }
}
