//! What to look for in a tree with an SMMUv3 or a PCIe host bridge: streams that do not exist, gaps and overlaps of maps,
//! interrupts that nobody gets.

use super::check::Found;
use super::{MachineDescription, Master, PcieHost, Smmu, SmmuV3};
use crate::tree::{Finding, TreeError};

/// Refuses streams that an SMMUv3 in use does not have: nobody could program them.
pub(super) fn stream_range(desc: &MachineDescription) -> Result<(), TreeError> {
    let bits = |smmu: usize| {
        let smmu = desc.smmus.get(smmu).filter(|s| s.node.available)?;
        Some((smmu.v3.as_ref()?.preset.stream_bits(), &smmu.node.path))
    };
    let refuse = |node: &str, property: &str, id: u64, bits: u8, smmu: &str| {
        let reason = format!("stream {id:#x} is out of range: {smmu} has {bits} bits of stream ids");
        Err(TreeError::property(node, property, reason))
    };
    for host in desc.pcie_hosts.iter().filter(|h| h.node.available) {
        for (_, stream, count) in &host.iommu_map {
            let last = u64::from(stream.id.get()) + u64::from(*count) - 1;
            if let Some((bits, smmu)) = bits(stream.smmu)
                && last >> bits != 0
            {
                return refuse(&host.node.path, "iommu-map", last, bits, smmu);
            }
        }
    }
    for master in desc.masters.iter().filter(|m| m.node.available) {
        for stream in &master.streams.declared {
            if let Some((bits, smmu)) = bits(stream.smmu)
                && u64::from(stream.id.get()) >> bits != 0
            {
                return refuse(&master.node.path, "iommus", stream.id.get().into(), bits, smmu);
            }
        }
    }
    Ok(())
}

pub(super) fn smmu_findings(smmu: &Smmu, v3: &SmmuV3, found: &mut Found) {
    let path = smmu.node.path.as_str();
    if let Some(quirk) = &v3.quirk {
        let message = "registers of this kind are not modelled: a machine with it is not built";
        found.push(Finding::warning(path, Some(quirk), message));
    }
    if v3.broken_prefetch {
        let message = "noted: the model's prefetches work, a driver that avoids them loses nothing but time";
        found.push(Finding::note(path, Some("hisilicon,broken-prefetch-cmd"), message));
    }
    let wires = [&v3.combined, &v3.eventq, &v3.priq, &v3.cmdq_sync, &v3.gerror];
    let known = wires.iter().filter(|w| w.is_some()).count();
    if known < smmu.interrupts.len() {
        let message =
            "interrupts without one of the names combined, eventq, priq, cmdq-sync, gerror are not used";
        found.push(Finding::warning(path, Some("interrupt-names"), message));
    }
    if v3.combined.is_some() && known > 1 {
        let message = "`combined` with others: a driver uses the combined interrupt only";
        found.push(Finding::warning(path, Some("interrupt-names"), message));
    }
    for (name, wire) in [("eventq", &v3.eventq), ("gerror", &v3.gerror)] {
        if wire.is_none() && v3.combined.is_none() && v3.msi.is_none() {
            let message = format!("no `{name}` and no `msi-parent`: what it would report is not noticed");
            found.push(Finding::warning(path, Some("interrupt-names"), message));
        }
    }
    if wires.iter().any(|w| w.as_ref().is_some_and(|i| !i.is_edge())) {
        let message = "SMMUv3 signals with edges; a level triggered interrupt of it is lost";
        found.push(Finding::warning(path, Some("interrupts"), message));
    }
}

/// Masters with properties that nothing makes use of, functions in a gap of their bridge's map.
pub(super) fn master_findings(desc: &MachineDescription, master: &Master, found: &mut Found) {
    let path = master.node.path.as_str();
    let v3 = |smmu: usize| desc.smmus.get(smmu).is_some_and(|s| s.v3.is_some());
    let behind = master.streams.declared.iter().any(|d| v3(d.smmu));
    if let Some(rid) = master.rid
        && master.node.available
        && master.streams.declared.is_empty()
        && desc.pcie_hosts.iter().any(|h| !h.iommu_map.is_empty() && path.starts_with(&h.node.path))
    {
        let message = format!(
            "its requester id {rid} is in a gap of the bridge's `iommu-map`: it reaches memory untranslated, or not at all"
        );
        found.push(Finding::warning(path, Some("reg"), message));
    }
    for (property, set) in [("pasid-num-bits", master.pasid_bits > 0), ("dma-can-stall", master.can_stall)] {
        if set && !behind {
            let message = "no SMMUv3 is in front of the master, so this has no effect";
            found.push(Finding::note(path, Some(property), message));
        }
    }
    if master.can_stall && master.rid.is_some() {
        let message =
            "transactions of PCI must not be stalled: a stalled one can block those that would resolve it";
        found.push(Finding::warning(path, Some("dma-can-stall"), message));
    }
    if master.pri && !master.ats {
        let message = "page requests need `portcullis,ats`";
        found.push(Finding::warning(path, Some("portcullis,pri"), message));
    }
}

/// Entries of `iommu-map` that hide each other, or make one stream of several requester ids.
pub(super) fn host_findings(desc: &MachineDescription, host: &PcieHost, found: &mut Found) {
    let path = host.node.path.as_str();
    let overlap = |a: u32, b: u32, a_count: u32, b_count: u32| {
        a < b.saturating_add(b_count) && b < a.saturating_add(a_count)
    };
    for (i, (first, stream, count)) in host.iommu_map.iter().enumerate() {
        for (j, (other, other_stream, other_count)) in host.iommu_map.iter().enumerate().skip(i + 1) {
            if overlap(*first, *other, *count, *other_count) {
                let message = format!("entries {i} and {j} cover the same requester ids: entry {i} counts");
                found.push(Finding::warning(path, Some("iommu-map"), message));
            } else if stream.smmu == other_stream.smmu
                && overlap(stream.id.get(), other_stream.id.get(), *count, *other_count)
            {
                let message = format!("entries {i} and {j} make one stream of different requester ids");
                found.push(Finding::warning(path, Some("iommu-map"), message));
            }
        }
    }
    if host.iommu_map.is_empty()
        && host.node.available
        && desc.smmus.iter().any(|s| s.node.available && s.v3.is_some())
        && desc.masters.iter().any(|m| m.rid.is_some() && m.node.path.starts_with(path))
    {
        let message = "missing: no device of the bridge is behind an SMMU";
        found.push(Finding::warning(path, Some("iommu-map"), message));
    }
}
