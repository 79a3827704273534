//! Looks for what schemas cannot: registers that overlap, stream ids that do not fit the chip, masters that will be
//! blocked, resources that run out.

use portcullis_arch::StreamId;
use portcullis_arch::zynqmp::{self, SmmuPath};

use super::{Agreement, Chip, MachineDescription, Master, NodeInfo, Smmu};
use crate::compatible::Kind;
use crate::tree::{Finding, Region, TreeError};

/// Refuses devices in use whose registers overlap, or lie in memory. Devices that are not in use may overlap others:
/// trees list alternatives so.
pub(super) fn overlaps(desc: &MachineDescription) -> Result<(), TreeError> {
    let smmus = desc.smmus.iter().map(|d| (&d.node, d.region));
    let channels = desc.dma_channels.iter().map(|d| (&d.node, d.region));
    let writers = desc.pl_writers.iter().map(|d| (&d.node, d.region));
    let cores = desc.axi_dmas.iter().map(|d| (&d.node, d.region));
    let nics = desc.nics.iter().map(|d| (&d.node, d.region));
    let its = desc.its.iter().map(|d| (&d.node, d.region));
    let hosts = desc.pcie_hosts.iter().map(|d| (&d.node, d.region));
    let devices = desc.test_devices.iter().map(|d| (&d.node, d.region));
    let mut windows: Vec<(&NodeInfo, Region)> = smmus
        .chain(channels)
        .chain(writers)
        .chain(cores)
        .chain(nics)
        .chain(its)
        .chain(hosts)
        .chain(devices)
        .filter(|(node, _)| node.available)
        .collect();
    windows.sort_by_key(|(_, region)| *region);
    for pair in windows.windows(2) {
        if let [(a, first), (b, second)] = pair
            && first.overlaps(second)
        {
            let reason = format!("{second} overlaps the registers {first} of {}", a.path);
            return Err(TreeError::property(&b.path, "reg", reason));
        }
    }
    for (node, region) in windows {
        if let Some(m) = desc.memory.iter().find(|m| m.region.overlaps(&region)) {
            let reason = format!("{region} overlaps the memory {} of {}", m.region, m.path);
            return Err(TreeError::property(&node.path, "reg", reason));
        }
    }
    Ok(())
}

/// Adds what comparing the parts with each other and with the chip shows.
pub(super) fn findings(desc: &mut MachineDescription) {
    let mut found = Found(Vec::new());
    if desc.memory.is_empty() {
        found.push(Finding::warning(
            "/",
            None,
            "no memory: the tree leaves it to the boot loader to fill it in",
        ));
    }
    for (index, smmu) in desc.smmus.iter().enumerate() {
        smmu_findings(desc, index, smmu, &mut found);
    }
    for host in &desc.pcie_hosts {
        super::check_v3::host_findings(desc, host, &mut found);
    }
    for channel in &desc.dma_channels {
        channel_findings(channel, &mut found);
    }
    for master in &desc.masters {
        master_findings(desc, master, &mut found);
        super::check_v3::master_findings(desc, master, &mut found);
    }
    for reserved in &desc.reserved {
        if let Some(region) = reserved.region
            && !desc.memory.is_empty()
            && !desc.memory.iter().any(|m| m.region.contains(&region))
        {
            found.push(Finding::note(
                &reserved.path,
                Some("reg"),
                format!("{region} is not inside the memory"),
            ));
        }
    }
    desc.findings.extend(found.0);
}

/// Most findings of this kind; a tree with more is not read by a person.
const MAX_FINDINGS: usize = 1000;

pub(super) struct Found(Vec<Finding>);

impl Found {
    pub fn push(&mut self, finding: Finding) {
        match self.0.len() {
            0..MAX_FINDINGS => self.0.push(finding),
            MAX_FINDINGS => self.0.push(Finding::warning("/", None, "more findings are not shown")),
            _ => {}
        }
    }
}

fn smmu_findings(desc: &MachineDescription, index: usize, smmu: &Smmu, found: &mut Found) {
    let path = smmu.node.path.as_str();
    let mmu500 = matches!((desc.chip, smmu.kind), (Some(Chip::ZynqMp), Kind::Mmu500));
    if !smmu.node.available {
        let behind = desc
            .declared_streams(index)
            .map(|(m, _)| &m.node.path)
            .collect::<std::collections::BTreeSet<_>>();
        let effect = match behind.len() {
            0 => "no master in use has `iommus` for it".to_owned(),
            n => format!("the `iommus` of {n} master(s) in use have no effect"),
        };
        let message = format!(
            "the SMMU is {}: nobody programs it, it passes every transaction untranslated; {effect}",
            smmu.node.status
        );
        found.push(Finding::warning(path, Some("status"), message));
    }
    if let Some(v3) = &smmu.v3 {
        super::check_v3::smmu_findings(smmu, v3, found);
        if smmu.iommu_cells == 0 {
            found.push(Finding::warning(
                path,
                Some("#iommu-cells"),
                "missing: no master can refer to this SMMU",
            ));
        }
        stream_findings(desc, index, smmu, false, found);
        return;
    }
    let globals = smmu.global_interrupts;
    if mmu500 && smmu.interrupts.len() != globals + zynqmp::smmu::CONTEXT_BANKS {
        let message = format!(
            "{} interrupts with #global-interrupts = {globals}; SMMUv2 has one per context bank, so this chip needs {} \
             (the shared line repeated)",
            smmu.interrupts.len(),
            globals + zynqmp::smmu::CONTEXT_BANKS
        );
        found.push(Finding::warning(path, Some("interrupts"), message));
    }
    if globals == 0 || globals > smmu.interrupts.len() {
        let message =
            format!("{globals} with {} interrupts: global faults are not reported", smmu.interrupts.len());
        found.push(Finding::warning(path, Some("#global-interrupts"), message));
    }
    if mmu500 && let Some(other) = smmu.interrupts.iter().find(|i| i.spi() != Some(zynqmp::smmu::SPI)) {
        let message = format!("{other:?} is not the chip's SMMU interrupt, SPI {}", zynqmp::smmu::SPI);
        found.push(Finding::warning(path, Some("interrupts"), message));
    }
    if mmu500 && (smmu.region.base, smmu.region.size) != (zynqmp::smmu::BASE, zynqmp::smmu::SIZE) {
        let message = format!("{} is not where the chip has its SMMU, {}", smmu.region, zynqmp::smmu::BASE);
        found.push(Finding::warning(path, Some("reg"), message));
    }
    if smmu.legacy {
        let message = "the legacy binding: current kernels ignore it unless built for it, and then give the masters \
                       identity domains by default";
        found.push(Finding::note(path, Some("mmu-masters"), message));
    } else if smmu.iommu_cells == 0 {
        found.push(Finding::warning(path, Some("#iommu-cells"), "missing: no master can refer to this SMMU"));
    }
    stream_findings(desc, index, smmu, mmu500, found);
}

/// Stream match entries: too many, or matching each other's streams.
fn stream_findings(desc: &MachineDescription, index: usize, smmu: &Smmu, mmu500: bool, found: &mut Found) {
    let path = smmu.node.path.as_str();
    let declared: Vec<_> = desc.declared_streams(index).collect();
    let mut entries: Vec<(u32, u32)> = declared.iter().map(|(_, d)| (d.id.get() & !d.mask, d.mask)).collect();
    entries.sort_unstable();
    entries.dedup();
    if mmu500 && entries.len() > zynqmp::smmu::STREAM_MATCH_GROUPS {
        let message = format!(
            "the masters in use need {} stream match entries, the SMMU has {}",
            entries.len(),
            zynqmp::smmu::STREAM_MATCH_GROUPS
        );
        found.push(Finding::warning(path, None, message));
    }
    // Quadratic: what a real SMMU can hold, and no more, is compared.
    for (i, (a, first)) in declared.iter().enumerate().take(256) {
        for (b, second) in declared.iter().take(256).skip(i + 1) {
            let common = !(first.mask | second.mask);
            if (first.id.get() ^ second.id.get()) & common != 0 {
                continue;
            }
            let same =
                (first.id.get() & !first.mask, first.mask) == (second.id.get() & !second.mask, second.mask);
            let contained =
                same || first.mask & second.mask == first.mask || first.mask & second.mask == second.mask;
            if a.node.path == b.node.path {
                if same {
                    let message = format!("stream {} is listed twice", second.id);
                    found.push(Finding::note(&b.node.path, Some("iommus"), message));
                }
            } else if contained {
                let message = format!(
                    "shares stream {} (mask {:#x}) with {}: both land in one group and one domain",
                    second.id, second.mask, a.node.path
                );
                found.push(Finding::warning(&b.node.path, Some("iommus"), message));
            } else {
                let message = format!(
                    "stream {} (mask {:#x}) overlaps stream {} (mask {:#x}) of {}: a stream that matches both is a \
                     stream match conflict",
                    second.id, second.mask, first.id, first.mask, a.node.path
                );
                found.push(Finding::warning(&b.node.path, Some("iommus"), message));
            }
        }
    }
}

fn channel_findings(channel: &super::DmaChannel, found: &mut Found) {
    let path = channel.node.path.as_str();
    let Some(chip) = channel.chip else { return };
    let unit = chip.unit;
    // One that was moved to other addresses has other interrupts as well.
    let moved = channel.region.base != chip.base;
    let spi = channel.interrupt.as_ref().and_then(|i| i.spi());
    if !moved && spi != Some(chip.spi) {
        let message =
            format!("the interrupt of {} DMA channel {} is SPI {}", unit.name(), chip.index, chip.spi);
        found.push(Finding::warning(path, Some("interrupts"), message));
    }
    if channel.bus_width != unit.bus_width() {
        let message =
            format!("{}, but {} DMA is {} bits wide", channel.bus_width, unit.name(), unit.bus_width());
        found.push(Finding::warning(path, Some("xlnx,bus-width"), message));
    }
    if channel.dma_coherent && !unit.can_be_coherent() {
        let message = "the FPD DMA has no path through the CCI: its DMA is not coherent whatever the tree says, and \
                       software that believes it reads stale data";
        found.push(Finding::warning(path, Some("dma-coherent"), message));
    }
}

fn master_findings(desc: &MachineDescription, master: &Master, found: &mut Found) {
    let path = master.node.path.as_str();
    if desc.chip != Some(Chip::ZynqMp) {
        return;
    }
    let behind = |d: &super::DeclaredStream| desc.smmus.get(d.smmu).is_some_and(|s| s.node.available);
    let translated = master.node.available && master.streams.declared.iter().any(behind);
    let declared = &master.streams.declared;
    match master.agreement {
        Agreement::Differs => {
            let missing: Vec<StreamId> = master
                .streams
                .actual
                .iter()
                .filter(|s| !declared.iter().any(|d| d.matches(**s)))
                .copied()
                .collect();
            let message = format!(
                "{} sends stream {}, which is not declared: its transactions do not match and fault as an unknown \
                 stream id (or bypass the SMMU, where that is allowed)",
                master.title,
                list(&missing)
            );
            found.push(Finding::warning(path, Some("iommus"), message));
        }
        Agreement::NotBehind if !declared.is_empty() => {
            let message = format!("{} does not pass the SMMU: its DMA is never translated", master.title);
            found.push(Finding::warning(path, Some("iommus"), message));
        }
        Agreement::NotDeclared
            if master.node.available
                && master.path.is_some()
                && desc.smmus.iter().any(|s| s.node.available) =>
        {
            let message = format!(
                "{} has no `iommus` while the SMMU is on: Linux blocks streams that it does not know, so its DMA fails",
                master.title
            );
            found.push(Finding::warning(path, None, message));
        }
        _ => {}
    }
    for d in declared.iter().filter(|d| d.mask == 0 && !master.streams.actual.contains(&d.id)) {
        if let Some(finding) = foreign_stream(master, d.id, path) {
            found.push(finding);
        }
    }
    if matches!(master.path, Some(SmmuPath::Unverified(_))) && !declared.is_empty() {
        let message = format!("no public document says through which TBU {} passes", master.title);
        found.push(Finding::note(path, Some("iommus"), message));
    }
    if translated && let Some(bit) = master.route_bit {
        let message = format!(
            "{} passes the SMMU only while bit {bit} of IOU_INTERCONNECT_ROUTE ({}) is set; without it its IO virtual \
             addresses go to memory as they are",
            master.title,
            zynqmp::IOU_INTERCONNECT_ROUTE
        );
        found.push(Finding::note(path, Some("iommus"), message));
    }
}

/// What to say of a declared stream that the master does not send.
fn foreign_stream(master: &Master, id: StreamId, path: &str) -> Option<Finding> {
    let decoded = zynqmp::decode(id)?;
    if let Some(meant) = zynqmp::likely_meant(id)
        && let Some(right) = zynqmp::decode(meant)
    {
        // SATA: Linux's trees list four ids, the manual two. Ids next to the real ones do no harm.
        if master.agreement == Agreement::Agrees {
            return None;
        }
        let message = format!(
            "no master sends stream {id}: its TBU bits (14:10) say {}, but {} enters through TBU {}; {meant} may be meant",
            decoded.tbu,
            right.name().unwrap_or_default(),
            right.tbu
        );
        return Some(Finding::warning(path, Some("iommus"), message));
    }
    match decoded.source {
        Some(source) if !master.title.starts_with(source.name) && !master.title.ends_with(source.name) => {
            Some(Finding::note(path, Some("iommus"), format!("stream {id} is that of {decoded}")))
        }
        Some(_) => None,
        None if master.agreement == Agreement::Agrees => {
            Some(Finding::note(path, Some("iommus"), format!("stream {id} is sent by no master of the chip")))
        }
        None => Some(Finding::warning(path, Some("iommus"), format!("stream {id} is that of {decoded}"))),
    }
}

fn list(ids: &[StreamId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
