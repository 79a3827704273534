//! The description of a machine for a person ([`Display`](fmt::Display)) and for programs (serde).
//!
//! Addresses and stream ids are strings like `"0xfd800000"` in the serialized form, since JSON numbers lose bits of
//! 64-bit addresses.

mod axidma;

use std::fmt;

use portcullis_arch::StreamId;
use portcullis_arch::zynqmp::{self, SmmuPath};
use serde::{Serialize, Serializer};

use crate::machine::{
    Agreement, Chip, DeclaredStream, Kind, MachineDescription, Master, MsiTarget, NodeInfo, PcieHost, Smmu,
    TestDevice,
};
use crate::tree::{Finding, Level, Region};
pub use axidma::{AxiDmaReport, NicReport};

/// A number shown in hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:#x}", self.0))
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl From<StreamId> for Hex {
    fn from(stream: StreamId) -> Self {
        Self(u64::from(stream.get()))
    }
}

/// What `portcullis machine` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `model` of the tree.
    pub model: String,
    /// `compatible` of the root.
    pub compatible: Vec<String>,
    /// The chip whose tables are used, if it is known.
    pub chip: Option<&'static str>,
    /// RAM.
    pub memory: Vec<MemoryReport>,
    /// Reserved memory.
    pub reserved: Vec<MemoryReport>,
    /// SMMUs.
    pub smmus: Vec<SmmuReport>,
    /// DMA channels.
    pub dma_channels: Vec<ChannelReport>,
    /// PL writers.
    pub pl_writers: Vec<WriterReport>,
    /// AXI DMA cores.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub axi_dmas: Vec<AxiDmaReport>,
    /// Network devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicReport>,
    /// PCIe host bridges.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pcie_hosts: Vec<HostReport>,
    /// PCIe test devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub test_devices: Vec<TestDeviceReport>,
    /// Everything that issues DMA, modelled or not.
    pub masters: Vec<MasterReport>,
    /// What was noticed.
    pub findings: Vec<Finding>,
    /// What is not modelled.
    pub not_modelled: Vec<NotModelledReport>,
}

/// A range of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// The node it is from.
    pub path: String,
    /// First address, where it is fixed.
    pub base: Option<Hex>,
    /// Bytes.
    pub size: Hex,
    /// True for reserved memory that must not be mapped.
    pub no_map: bool,
}

/// An SMMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SmmuReport {
    /// Its path.
    pub path: String,
    /// What it is.
    pub kind: &'static str,
    /// First address of its registers.
    pub base: Hex,
    /// Bytes of registers.
    pub size: Hex,
    /// Its status.
    pub status: String,
    /// True if it is in use.
    pub enabled: bool,
    /// What that means for DMA.
    pub meaning: String,
    /// SPI numbers with how often each is listed, global interrupts first.
    pub interrupts: Vec<(u32, usize)>,
    /// Of these, how many are global.
    pub global_interrupts: usize,
    /// True if its walks are coherent.
    pub coherent_walks: bool,
    /// Streams that masters in use declare at it.
    pub declared_streams: usize,
    /// Its interrupts by name, for an SMMUv3.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wires: Vec<(&'static str, u32)>,
    /// Where its messages go: the ITS's doorbell and its device id, for an SMMUv3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<(Hex, Hex)>,
    /// Bits of its stream ids, for an SMMUv3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_bits: Option<u8>,
}

/// A PCIe host bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostReport {
    /// Its path.
    pub path: String,
    /// First address of its configuration space.
    pub base: Hex,
    /// Bytes of configuration space.
    pub size: Hex,
    /// True if it is in use.
    pub enabled: bool,
    /// `iommu-map`: first requester id, how many, path of the SMMU, first stream.
    pub iommu_map: Vec<(Hex, Hex, String, Hex)>,
}

/// A PCIe test device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TestDeviceReport {
    /// Its path.
    pub path: String,
    /// Its requester id, `00:01.0`.
    pub rid: String,
    /// First address of its registers.
    pub base: Hex,
    /// Its stream.
    pub stream: Option<Hex>,
    /// Bits of its process address space ids.
    pub pasid_bits: u8,
    /// It has address translation services.
    pub ats: bool,
    /// It has page requests.
    pub pri: bool,
    /// Its messages: the doorbell and the device id.
    pub messages: Option<(Hex, Hex)>,
    /// True if it is in use.
    pub enabled: bool,
}

/// A DMA channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChannelReport {
    /// Its path.
    pub path: String,
    /// "FPD DMA channel 0", where the chip is known.
    pub name: String,
    /// First address of its registers.
    pub base: Hex,
    /// Its shared peripheral interrupt.
    pub spi: Option<u32>,
    /// The stream that it sends.
    pub stream: Option<Hex>,
    /// Bits of its data bus.
    pub bus_width: u32,
    /// Its status.
    pub status: String,
    /// True if it is in use.
    pub enabled: bool,
    /// How the tree's `iommus` compares.
    pub iommus: String,
}

/// A PL writer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WriterReport {
    /// Its path.
    pub path: String,
    /// First address of its registers.
    pub base: Hex,
    /// Its port.
    pub port: &'static str,
    /// AXI ID after reset.
    pub axi_id: u8,
    /// The stream that it sends after reset, if the port is behind the SMMU.
    pub stream: Option<Hex>,
    /// True if it is in use.
    pub enabled: bool,
}

/// A master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MasterReport {
    /// Its path.
    pub path: String,
    /// The chip's name for it, or the node's.
    pub name: String,
    /// True if it is in use.
    pub enabled: bool,
    /// The streams that the chip gives it.
    pub streams: Vec<StreamReport>,
    /// What the tree's `iommus` (or the SMMU's `mmu-masters`) says: stream and mask.
    pub declared: Vec<(Hex, Hex)>,
    /// How the two compare: `agrees`, `missing`, `differs`, `unknown`, `not-behind`.
    pub agreement: &'static str,
    /// Its way to memory, in words.
    pub route: String,
    /// The bit of `IOU_INTERCONNECT_ROUTE` that sends it through the SMMU.
    pub route_bit: Option<u8>,
}

/// A stream id taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StreamReport {
    /// The stream id.
    pub stream: Hex,
    /// Bits 14:10.
    pub tbu: u8,
    /// Bits 9:6.
    pub master: u8,
    /// Bits 5:0.
    pub axi_id: u8,
}

/// A node that is not modelled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotModelledReport {
    /// Its path.
    pub path: String,
    /// Its most specific compatible string.
    pub compatible: String,
    /// Its status.
    pub status: String,
}

/// Makes the report of a machine.
pub fn report(desc: &MachineDescription) -> Report {
    let memory = |path: &str, region: Option<Region>, size: u64, no_map: bool| MemoryReport {
        path: path.into(),
        base: region.map(|r| Hex(r.base.get())),
        size: Hex(size),
        no_map,
    };
    Report {
        model: desc.model.clone(),
        compatible: desc.compatible.clone(),
        chip: desc.chip.map(|Chip::ZynqMp| "zynqmp"),
        memory: desc.memory.iter().map(|m| memory(&m.path, Some(m.region), m.region.size, false)).collect(),
        reserved: desc.reserved.iter().map(|r| memory(&r.path, r.region, r.size, r.no_map)).collect(),
        smmus: desc.smmus.iter().enumerate().map(|(i, s)| smmu(desc, i, s)).collect(),
        dma_channels: desc.dma_channels.iter().map(|c| channel(desc, c)).collect(),
        pl_writers: desc
            .pl_writers
            .iter()
            .map(|w| WriterReport {
                path: w.node.path.clone(),
                base: Hex(w.region.base.get()),
                port: w.port.info().name,
                axi_id: w.axi_id,
                stream: w.streams.actual.first().map(|s| (*s).into()),
                enabled: w.node.available,
            })
            .collect(),
        axi_dmas: axidma::axi_dmas(desc),
        nics: axidma::nics(desc),
        pcie_hosts: desc.pcie_hosts.iter().map(|h| host(desc, h)).collect(),
        test_devices: desc.test_devices.iter().map(|d| test_device(desc, d)).collect(),
        masters: desc.masters.iter().map(master).collect(),
        findings: desc.findings.clone(),
        not_modelled: desc
            .not_modelled
            .iter()
            .map(|n| NotModelledReport {
                path: n.path.clone(),
                compatible: n.compatible.clone(),
                status: n.status.to_string(),
            })
            .collect(),
    }
}

/// The status as a person wants it: a device that is okay under a disabled parent is not in use.
fn status(node: &NodeInfo) -> String {
    match node.disabled_parents.last() {
        Some(parent) if node.status == crate::tree::Status::Okay => format!("off ({parent} is off)"),
        _ => node.status.to_string(),
    }
}

fn messages(desc: &MachineDescription, target: Option<MsiTarget>) -> Option<(Hex, Hex)> {
    let target = target?;
    Some((Hex(desc.its.get(target.its)?.doorbell().get()), Hex(target.device.into())))
}

fn host(desc: &MachineDescription, host: &PcieHost) -> HostReport {
    let entry = |(first, stream, count): &(u32, DeclaredStream, u32)| {
        let smmu = desc.smmus.get(stream.smmu).map(|s| s.node.path.clone()).unwrap_or_default();
        (Hex((*first).into()), Hex((*count).into()), smmu, stream.id.into())
    };
    HostReport {
        path: host.node.path.clone(),
        base: Hex(host.region.base.get()),
        size: Hex(host.region.size),
        enabled: host.node.available,
        iommu_map: host.iommu_map.iter().map(entry).collect(),
    }
}

fn test_device(desc: &MachineDescription, device: &TestDevice) -> TestDeviceReport {
    TestDeviceReport {
        path: device.node.path.clone(),
        rid: device.rid.to_string(),
        base: Hex(device.region.base.get()),
        stream: device.streams.first().map(Hex::from),
        pasid_bits: device.pasid_bits,
        ats: device.ats,
        pri: device.pri,
        messages: messages(desc, device.msi),
        enabled: device.node.available,
    }
}

fn smmu(desc: &MachineDescription, index: usize, smmu: &Smmu) -> SmmuReport {
    let mut interrupts: Vec<(u32, usize)> = Vec::new();
    for spi in smmu.interrupts.iter().filter_map(|i| i.spi()) {
        match interrupts.last_mut() {
            Some((last, count)) if *last == spi => *count += 1,
            _ => interrupts.push((spi, 1)),
        }
    }
    let meaning = if smmu.node.available && smmu.v3.is_some() {
        "it translates the masters that have `iommus` or are in an `iommu-map`; Linux aborts every other stream"
    } else if smmu.v3.is_some() {
        "no driver touches it, and after reset it passes all transactions untranslated (CR0.SMMUEN = 0, GBPA.ABORT = \
         0): every master reaches all of memory with physical addresses, and `iommus` has no effect"
    } else if smmu.node.available {
        "it translates the masters that have `iommus`; Linux blocks a stream that no driver has set up \
         (arm-smmu.disable_bypass)"
    } else {
        "no driver touches it, and after reset it passes all transactions untranslated (SCR0.CLIENTPD = 1): every \
         master reaches all of memory with physical addresses, and `iommus` has no effect"
    };
    SmmuReport {
        path: smmu.node.path.clone(),
        kind: match smmu.kind {
            Kind::Mmu500 => "Arm MMU-500 (SMMUv2)",
            Kind::SmmuV3 => "Arm SMMUv3",
            _ => "Arm SMMUv2",
        },
        base: Hex(smmu.region.base.get()),
        size: Hex(smmu.region.size),
        status: status(&smmu.node),
        enabled: smmu.node.available,
        meaning: meaning.into(),
        interrupts,
        global_interrupts: smmu.global_interrupts,
        coherent_walks: smmu.dma_coherent,
        declared_streams: desc.declared_streams(index).count(),
        wires: wires(smmu),
        messages: messages(desc, smmu.v3.as_ref().and_then(|v3| v3.msi)),
        stream_bits: smmu.v3.as_ref().map(|v3| v3.preset.stream_bits()),
    }
}

fn wires(smmu: &Smmu) -> Vec<(&'static str, u32)> {
    let Some(v3) = &smmu.v3 else { return Vec::new() };
    let wires = [
        ("combined", &v3.combined),
        ("eventq", &v3.eventq),
        ("priq", &v3.priq),
        ("cmdq-sync", &v3.cmdq_sync),
        ("gerror", &v3.gerror),
    ];
    wires.into_iter().filter_map(|(name, wire)| Some((name, wire.as_ref()?.spi()?))).collect()
}

fn channel(desc: &MachineDescription, channel: &crate::machine::DmaChannel) -> ChannelReport {
    let name = match channel.chip {
        Some(chip) => format!("{} DMA channel {}", chip.unit.name(), chip.index),
        None => channel.node.name.clone(),
    };
    let iommus = desc.master(&channel.node.path).map_or("missing", |m| word(m.agreement));
    ChannelReport {
        path: channel.node.path.clone(),
        name,
        base: Hex(channel.region.base.get()),
        spi: channel.interrupt.as_ref().and_then(|i| i.spi()),
        stream: channel.streams.first().map(Hex::from),
        bus_width: channel.bus_width,
        status: status(&channel.node),
        enabled: channel.node.available,
        iommus: iommus.into(),
    }
}

fn word(agreement: Agreement) -> &'static str {
    match agreement {
        Agreement::Agrees => "agrees",
        Agreement::NotDeclared => "missing",
        Agreement::Differs => "differs",
        Agreement::Unknown => "unknown",
        Agreement::NotBehind => "not-behind",
    }
}

fn master(m: &Master) -> MasterReport {
    let streams = m.streams.actual.iter().filter_map(|s| {
        let decoded = zynqmp::decode(*s)?;
        Some(StreamReport {
            stream: (*s).into(),
            tbu: decoded.tbu,
            master: decoded.master,
            axi_id: decoded.axi_id,
        })
    });
    let route = match m.path {
        Some(SmmuPath::Tbu(n @ 0..=2)) => format!("TBU {n}, then the CCI"),
        Some(SmmuPath::Tbu(n)) => format!("TBU {n}, then memory"),
        Some(SmmuPath::Unverified(n)) => format!("TBU {n} (not documented)"),
        Some(SmmuPath::Unknown) | None => "not documented".into(),
        Some(SmmuPath::NotBehind) => "not through the SMMU".into(),
    };
    MasterReport {
        path: m.node.path.clone(),
        name: m.title.clone(),
        enabled: m.node.available,
        streams: streams.collect(),
        declared: m.streams.declared.iter().map(|d| (d.id.into(), Hex(u64::from(d.mask)))).collect(),
        agreement: word(m.agreement),
        route,
        route_bit: m.route_bit,
    }
}

/// For a person: sections in the order of the struct.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", self.model, self.compatible.join(", "))?;
        match self.chip {
            Some(_) => writeln!(f, "Chip: Zynq UltraScale+, stream ids below are the chip's own")?,
            None => writeln!(f, "Chip: not known, stream ids below are what the tree says")?,
        }
        writeln!(f, "\nMemory")?;
        for m in &self.memory {
            writeln!(f, "  {}  {}", span(m), m.path)?;
        }
        if !self.reserved.is_empty() {
            writeln!(f, "\nReserved memory")?;
            for m in &self.reserved {
                let no_map = if m.no_map { " (no-map)" } else { "" };
                writeln!(f, "  {}  {}{no_map}", span(m), m.path)?;
            }
        }
        self.smmus(f)?;
        self.channels(f)?;
        self.writers(f)?;
        self.axi_dmas.iter().try_for_each(|d| write!(f, "{d}"))?;
        self.nics.iter().try_for_each(|n| write!(f, "{n}"))?;
        self.pcie(f)?;
        self.masters(f)?;
        self.rest(f)
    }
}

fn columns(s: &StreamReport) -> String {
    format!("{:>7} {:>4} {:>7} {:>7}", s.stream, s.tbu, Hex(s.master.into()), Hex(s.axi_id.into()))
}

fn span(m: &MemoryReport) -> String {
    let size = match m.size.0 {
        n if n != 0 && n.is_multiple_of(1 << 20) => format!("{} MiB", n >> 20),
        n if n != 0 && n.is_multiple_of(1 << 10) => format!("{} KiB", n >> 10),
        n => format!("{n} bytes"),
    };
    match m.base {
        Some(base) => {
            let last = base.0.saturating_add(m.size.0.saturating_sub(1));
            format!("{:#012x}..{last:#012x}  {size:>9}", base.0)
        }
        None => format!("{:26}  {size:>9}", "placed by the OS"),
    }
}

impl Report {
    fn smmus(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.smmus.is_empty() {
            return writeln!(f, "\nSMMU: none in this tree");
        }
        for s in &self.smmus {
            let state = if s.enabled { "ENABLED" } else { "DISABLED" };
            writeln!(f, "\nSMMU {} is {state} (status {})", s.path, s.status)?;
            writeln!(f, "  {} at {}, {} bytes of registers", s.kind, s.base, s.size)?;
            if let Some(bits) = s.stream_bits {
                write!(f, "  {bits} bits of stream ids; interrupts:")?;
                for (name, spi) in &s.wires {
                    write!(f, " {name} SPI {spi}")?;
                }
                if let Some((doorbell, device)) = s.messages {
                    write!(f, ", messages to {doorbell} as device {device}")?;
                }
            } else {
                write!(f, "  interrupts: {} global;", s.global_interrupts)?;
                for (spi, count) in &s.interrupts {
                    write!(f, " SPI {spi} x {count}")?;
                }
            }
            let walks = if s.coherent_walks { "coherent" } else { "not coherent" };
            writeln!(f, "; table walks are {walks}")?;
            writeln!(f, "  {} stream(s) declared by masters in use", s.declared_streams)?;
            writeln!(f, "  {}: {}", if s.enabled { "so" } else { "so there is no protection" }, s.meaning)?;
        }
        Ok(())
    }

    fn channels(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nDMA channels: {}", self.dma_channels.len())?;
        if !self.dma_channels.is_empty() {
            writeln!(
                f,
                "  {:<18} {:<11} {:>4} {:>7} {:>5}  {:<9} {:<8} node",
                "channel", "base", "SPI", "stream", "bits", "status", "iommus"
            )?;
        }
        for c in &self.dma_channels {
            writeln!(
                f,
                "  {:<18} {:<11} {:>4} {:>7} {:>5}  {:<9} {:<8} {}",
                c.name,
                c.base,
                c.spi.map_or("-".into(), |n| n.to_string()),
                c.stream.map_or("-".into(), |s| s.to_string()),
                c.bus_width,
                c.status,
                c.iommus,
                c.path
            )?;
        }
        Ok(())
    }

    fn writers(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for w in &self.pl_writers {
            let stream = w.stream.map_or("no stream".into(), |s| format!("stream {s}"));
            let off = if w.enabled { "" } else { ", off" };
            writeln!(
                f,
                "\nPL writer {} at {} on {}: {stream} with AXI ID {} after reset{off}",
                w.path, w.base, w.port, w.axi_id
            )?;
        }
        Ok(())
    }

    fn pcie(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for h in &self.pcie_hosts {
            let off = if h.enabled { "" } else { ", off" };
            writeln!(f, "\nPCIe host bridge {} with ECAM at {}{off}", h.path, h.base)?;
            for (first, count, smmu, stream) in &h.iommu_map {
                writeln!(f, "  {count} requester ids from {first} are streams from {stream} of {smmu}")?;
            }
        }
        for d in &self.test_devices {
            let stream = d.stream.map_or("no stream".into(), |s| format!("stream {s}"));
            let off = if d.enabled { "" } else { ", off" };
            write!(f, "  test device {} {} at {}: {stream}, ", d.rid, d.path, d.base)?;
            write!(f, "{} bits of PASID", d.pasid_bits)?;
            for (name, has) in [("ATS", d.ats), ("PRI", d.pri), ("MSI", d.messages.is_some())] {
                if has {
                    write!(f, ", {name}")?;
                }
            }
            writeln!(f, "{off}")?;
        }
        Ok(())
    }

    fn masters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nMasters and the streams they send: {}", self.masters.len())?;
        if !self.masters.is_empty() {
            writeln!(
                f,
                "  {:<26} {:>7} {:>4} {:>7} {:>7}  {:<10}  {:<20} node",
                "master", "stream", "TBU", "master", "AXI ID", "iommus", "route"
            )?;
        }
        for m in &self.masters {
            let off = if m.enabled { "" } else { "  (off)" };
            // Where no chip's tables say what the hardware sends, the tree is all there is.
            let by_tree = self.chip.is_none() && m.streams.is_empty();
            let declared =
                m.declared.first().filter(|(_, mask)| by_tree && m.declared.len() == 1 && mask.0 == 0);
            let verdict = match m.agreement {
                "differs" => "DIFFERS",
                _ if declared.is_some() => "declared",
                other => other,
            };
            let route = if by_tree { "as the tree says" } else { m.route.as_str() };
            let stream = declared.map_or("-".into(), |(id, _)| id.to_string());
            let first = m
                .streams
                .first()
                .map_or_else(|| format!("{stream:>7} {:>4} {:>7} {:>7}", "", "", ""), columns);
            writeln!(f, "  {:<26} {first}  {verdict:<10}  {route:<20} {}{off}", m.name, m.path)?;
            for s in m.streams.iter().skip(1) {
                writeln!(f, "  {:<26} {}", "", columns(s))?;
            }
            if m.agreement == "differs" || (m.agreement == "unknown" && declared.is_none()) {
                let declared: Vec<String> = m
                    .declared
                    .iter()
                    .map(|(id, mask)| if mask.0 == 0 { id.to_string() } else { format!("{id} mask {mask}") })
                    .collect();
                writeln!(f, "  {:<26} the tree says {}", "", declared.join(", "))?;
            }
        }
        Ok(())
    }

    fn rest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let warnings = self.findings.iter().filter(|x| x.level == Level::Warning).count();
        writeln!(f, "\nFindings: {warnings} warning(s), {} note(s)", self.findings.len() - warnings)?;
        for finding in &self.findings {
            writeln!(f, "  {finding}")?;
        }
        writeln!(f, "\nNot modelled: {} node(s)", self.not_modelled.len())?;
        for n in &self.not_modelled {
            let off = if n.status == "okay" { "" } else { "  (off)" };
            writeln!(f, "  {:<34} {}{off}", n.compatible, n.path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Dt, cells, string, thesis};

    fn of(dt: &Dt) -> Report {
        report(&MachineDescription::from_tree(&dt.tree().unwrap()).unwrap())
    }

    #[test]
    fn the_thesis_board_is_reported_without_warnings() {
        let report = report(&MachineDescription::from_tree(&thesis()).unwrap());
        assert_eq!(report.dma_channels.len(), 16);
        let first = &report.dma_channels[0];
        assert_eq!(
            (first.base, first.spi, first.stream, first.bus_width, first.iommus.as_str()),
            (Hex(0xFD50_0000), Some(124), Some(Hex(0x14E8)), 128, "agrees")
        );
        assert_eq!(report.smmus[0].interrupts, [(155, 17)]);
        assert!(report.smmus[0].enabled);
        assert_eq!(report.findings.iter().filter(|x| x.level == Level::Warning).count(), 0, "{report}");
        let text = report.to_string();
        assert!(
            text.contains("  LPD DMA channel 7  0xffaf0000    84   0x86f    64  okay      agrees"),
            "{text}"
        );
        let writer = "  PL writer on S_AXI_HPC0_FPD   0x200    0     0x8     0x0  agrees ";
        assert!(text.contains(writer), "{text}");
    }

    #[test]
    fn a_disabled_smmu_is_said_to_protect_nothing() {
        let mut dt = Dt::of(&thesis());
        dt.prop("/axi/smmu@fd800000", "status", string("disabled"));
        let text = of(&dt).to_string();
        assert!(text.contains("SMMU /axi/smmu@fd800000 is DISABLED (status disabled)"), "{text}");
        assert!(text.contains("every master reaches all of memory"), "{text}");
        assert!(text.contains("the `iommus` of 17 master(s) in use have no effect"), "{text}");
    }

    #[test]
    fn a_wrong_stream_id_is_a_finding_that_names_the_right_one() {
        let mut dt = Dt::of(&thesis());
        let smmu = dt.tree().unwrap().find("/axi/smmu@fd800000").unwrap().phandle.unwrap();
        dt.prop("/axi/pl-writer@b0000000", "portcullis,pl-port", string("hp0"));
        dt.prop("/axi/pl-writer@b0000000", "iommus", cells([smmu, 0x280]));
        let text = of(&dt).to_string();
        assert!(text.contains("  0xe80    3     0xa     0x0  DIFFERS "), "{text}");
        assert!(text.contains("the tree says 0x280"), "{text}");
        assert!(text.contains("S_AXI_HP0_FPD enters through TBU 3; 0xe80 may be meant"), "{text}");
    }

    #[test]
    fn json_has_addresses_as_strings() {
        let json = serde_json::to_value(report(&MachineDescription::from_tree(&thesis()).unwrap())).unwrap();
        assert_eq!(json["smmus"][0]["base"], "0xfd800000");
        assert_eq!(json["dma_channels"][8]["stream"], "0x868");
        assert_eq!(json["masters"][16]["streams"][0]["tbu"], 0);
    }
}
