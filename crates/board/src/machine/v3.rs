//! What came with SMMUv3: its interrupts and messages by name, PCIe host bridges, functions and their streams.

use super::build::Builder;
use super::{DeclaredStream, MsiTarget, PcieHost, SmmuV3, SmmuV3Preset, Streams, TestDevice};
use crate::compatible::Kind;
use crate::tree::{Node, NodeId, Rid, TreeError};

/// Both register pages, without which Linux refuses.
const PAGES: u64 = 0x2_0000;
/// Bytes of the test device's registers that somebody uses.
const TEST_DEVICE_BYTES: u64 = 0x1000;
/// The property that says what an SMMUv3 can do.
const PRESET: &str = "portcullis,smmu-v3";
/// The property of a Cavium ThunderX2, whose registers are elsewhere.
const CAVIUM: &str = "cavium,cn9900-broken-page1-regspace";

/// `pasid-num-bits`; 0 for none.
pub(super) fn pasid_bits(node: &Node) -> Result<u8, TreeError> {
    const NAME: &str = "pasid-num-bits";
    match node.cell(NAME)? {
        None => Ok(0),
        Some(bits @ 0..=20) => Ok(bits as u8),
        Some(bits) => Err(node.malformed(NAME, format!("{bits}, substream ids have at most 20 bits"))),
    }
}

impl Builder<'_> {
    pub(super) fn smmu_v3(&self, node: &Node) -> Result<SmmuV3, TreeError> {
        let quirk = node.property(CAVIUM).is_some().then(|| CAVIUM.to_owned());
        let region = self.registers(node)?;
        if region.size < PAGES && quirk.is_none() {
            let reason = format!("{:#x} bytes, its two register pages need {PAGES:#x}", region.size);
            return Err(node.malformed("reg", reason));
        }
        let preset = match node.string(PRESET)? {
            None | Some("full") => SmmuV3Preset::Full,
            Some("small") => SmmuV3Preset::Small,
            Some("qemu-virt") => SmmuV3Preset::QemuVirt,
            Some(other) => {
                let reason = format!("`{other}` is no model; give one of full, small, qemu-virt");
                return Err(node.malformed(PRESET, reason));
            }
        };
        let mut v3 = SmmuV3 {
            preset,
            quirk,
            broken_prefetch: node.property("hisilicon,broken-prefetch-cmd").is_some(),
            msi: self.msi_target(node.msi_parent),
            ..SmmuV3::default()
        };
        let names = node.strings("interrupt-names")?;
        if names.len() > node.interrupts.len() {
            let reason = format!("{} names for {} interrupts", names.len(), node.interrupts.len());
            return Err(node.malformed("interrupt-names", reason));
        }
        for (name, interrupt) in names.iter().zip(&node.interrupts) {
            let place = match *name {
                "combined" => &mut v3.combined,
                "eventq" => &mut v3.eventq,
                "priq" => &mut v3.priq,
                "cmdq-sync" => &mut v3.cmdq_sync,
                "gerror" => &mut v3.gerror,
                // Unknown names are a finding.
                _ => continue,
            };
            if place.is_some() {
                return Err(node.malformed("interrupt-names", format!("`{name}` twice")));
            }
            *place = Some(interrupt.clone());
        }
        Ok(v3)
    }

    fn msi_target(&self, target: Option<(NodeId, u32)>) -> Option<MsiTarget> {
        let (controller, device) = target?;
        let its = self.its.iter().position(|its| *its == controller)?;
        Some(MsiTarget { its, device })
    }

    /// The host bridge that a node is below.
    fn host(&self, node: &Node) -> Option<&Node> {
        let mut above = node.parent();
        while let Some(parent) = above.and_then(|id| self.tree.node(id)) {
            if parent.kind == Some(Kind::PcieHost) {
                return Some(parent);
            }
            above = parent.parent();
        }
        None
    }

    /// The requester id of a function that issues DMA by itself: below a host bridge, and no bridge.
    pub(super) fn function(&self, node: &Node) -> Option<Rid> {
        let rid = node.rid?;
        let bridge = node.property("device_type") == Some(b"pci\0") || !node.children().is_empty();
        (!bridge || node.kind == Some(Kind::TestDevice)).then_some(rid)
    }

    /// The stream that a bridge makes of a function's requester id.
    pub(super) fn mapped(&self, node: &Node) -> Option<DeclaredStream> {
        let rid = self.function(node)?;
        let (target, id) = self.host(node)?.iommu_map.look_up(rid)?;
        let smmu = self.smmus.iter().position(|s| s.id() == target)?;
        Some(DeclaredStream { smmu, id: portcullis_arch::StreamId(id), mask: 0 })
    }

    pub(super) fn pcie_host(&self, node: &Node) -> Result<PcieHost, TreeError> {
        let entries = node.iommu_map.entries.iter().filter_map(|e| {
            let smmu = self.smmus.iter().position(|s| s.id() == e.target)?;
            let stream = DeclaredStream { smmu, id: portcullis_arch::StreamId(e.base), mask: 0 };
            Some((e.first, stream, e.count))
        });
        Ok(PcieHost {
            node: self.info(node),
            region: self.registers(node)?,
            iommu_map: entries.collect(),
            iommu_map_mask: node.iommu_map.mask,
            dma_coherent: node.dma_coherent,
        })
    }

    pub(super) fn test_device(&self, node: &Node) -> Result<TestDevice, TreeError> {
        let Some(rid) = node.rid else {
            let reason = "it is not below a PCIe host bridge (pci-host-ecam-generic), or has no `reg`";
            return Err(TreeError::node(&node.path, reason));
        };
        let Some(bar) = node.bars.iter().find(|b| b.register == 0x10) else {
            let reason = "it has no `assigned-addresses` with BAR 0 (register 0x10) inside a memory range of its bridge";
            return Err(TreeError::node(&node.path, reason));
        };
        if bar.region.size < TEST_DEVICE_BYTES {
            let reason =
                format!("BAR 0 has {:#x} bytes, the registers need {TEST_DEVICE_BYTES:#x}", bar.region.size);
            return Err(node.malformed("assigned-addresses", reason));
        }
        Ok(TestDevice {
            node: self.info(node),
            region: bar.region,
            rid,
            dma_coherent: node.dma_coherent,
            streams: Streams { actual: Vec::new(), declared: self.declared(node) },
            pasid_bits: pasid_bits(node)?,
            ats: node.property("portcullis,ats").is_some(),
            pri: node.property("portcullis,pri").is_some(),
            msi: self.host(node).and_then(|host| self.msi_target(host.msi_map.look_up(rid))),
        })
    }
}
