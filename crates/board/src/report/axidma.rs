//! The part of the report about AXI DMA cores, their clients, and network devices.

use std::fmt;

use serde::Serialize;

use super::Hex;
use crate::MachineDescription;

/// An AXI DMA core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AxiDmaReport {
    /// Its path.
    pub path: String,
    /// First address of its registers.
    pub base: Hex,
    /// The PL port it is connected to, if the tree says.
    pub port: Option<&'static str>,
    /// Built with scatter-gather.
    pub scatter_gather: bool,
    /// Bits of addresses.
    pub address_bits: u8,
    /// Bits of length fields.
    pub length_bits: u8,
    /// Streams that it sends: scatter-gather, MM2S, S2MM.
    pub streams: Vec<Hex>,
    /// SPIs of MM2S and S2MM.
    pub spis: Vec<Option<u32>>,
    /// Paths of the clients of its channels.
    pub clients: Vec<String>,
    /// True if it is in use.
    pub enabled: bool,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NicReport {
    /// Its path.
    pub path: String,
    /// First address of its registers.
    pub base: Hex,
    /// Its bit in IOU_INTERCONNECT_ROUTE.
    pub route_bit: Option<u8>,
    /// True if the tree gives it `iommus`.
    pub declared: bool,
    /// True if it is in use.
    pub enabled: bool,
}

pub(super) fn axi_dmas(desc: &MachineDescription) -> Vec<AxiDmaReport> {
    let one = |d: &crate::machine::AxiDma| AxiDmaReport {
        path: d.node.path.clone(),
        base: Hex(d.region.base.get()),
        port: d.port.map(|p| p.info().name),
        scatter_gather: d.scatter_gather,
        address_bits: d.address_bits,
        length_bits: d.length_bits,
        streams: d.sends().into_iter().map(Hex::from).collect(),
        spis: d.channels.iter().map(|c| c.as_ref()?.interrupt.as_ref()?.spi()).collect(),
        clients: desc
            .dma_proxies
            .iter()
            .filter(|p| p.dmas.iter().any(|s| s.provider == d.node.path))
            .map(|p| p.node.path.clone())
            .collect(),
        enabled: d.node.available,
    };
    desc.axi_dmas.iter().map(one).collect()
}

pub(super) fn nics(desc: &MachineDescription) -> Vec<NicReport> {
    let one = |n: &crate::machine::Nic| NicReport {
        path: n.node.path.clone(),
        base: Hex(n.region.base.get()),
        route_bit: n.route_bit,
        declared: !n.streams.declared.is_empty(),
        enabled: n.node.available,
    };
    desc.nics.iter().map(one).collect()
}

fn off(enabled: bool) -> &'static str {
    if enabled { "" } else { ", off" }
}

impl fmt::Display for AxiDmaReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.scatter_gather { "scatter-gather" } else { "direct mode" };
        let port = self.port.map(|p| format!(" on {p}")).unwrap_or_default();
        let (path, base) = (&self.path, self.base);
        write!(f, "\nAXI DMA {path} at {base}{port}: {mode}, {} address bits, ", self.address_bits)?;
        writeln!(f, "{} length bits{}", self.length_bits, off(self.enabled))?;
        let streams: Vec<_> = self.streams.iter().map(Hex::to_string).collect();
        let spis: Vec<_> = self.spis.iter().map(|s| s.map_or("-".into(), |n| n.to_string())).collect();
        write!(f, "  streams {} (descriptors, MM2S, S2MM), SPI {}", streams.join(" "), spis.join(" "))?;
        match self.clients.as_slice() {
            [] => writeln!(f, "; no client"),
            clients => writeln!(f, "; used by {}", clients.join(", ")),
        }
    }
}

impl fmt::Display for NicReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\nNetwork device {} at {}: ", self.path, self.base)?;
        match (self.route_bit, self.declared) {
            (None, _) => write!(f, "its way to memory is fixed")?,
            (Some(bit), true) => write!(
                f,
                "its `iommus` hold only while bit {bit} of IOU_INTERCONNECT_ROUTE (0xff180408) is set"
            )?,
            (Some(bit), false) => write!(
                f,
                "without `iommus` it works only while bit {bit} of IOU_INTERCONNECT_ROUTE (0xff180408) is clear"
            )?,
        }
        writeln!(f, "{}", off(self.enabled))
    }
}
