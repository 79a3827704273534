//! AXI DMA cores, their clients, and network devices at the chip's own address: from nodes to descriptions.

use portcullis_arch::zynqmp;

use super::build::{Builder, pl_port};
use super::{AxiDma, AxiDmaChannel, DmaProxy, DmaSpecifier, Nic, Streams};
use crate::tree::{Node, TreeError};

/// `compatible` of the channels of an AXI DMA, in the order of the core's register blocks.
const CHANNELS: [&str; 2] = ["xlnx,axi-dma-mm2s-channel", "xlnx,axi-dma-s2mm-channel"];
/// Most entries of `dmas`.
const MAX_DMAS: usize = 64;

impl Builder<'_> {
    pub fn axi_dma(&self, node: &Node) -> Result<AxiDma, TreeError> {
        let width = |name: &'static str, default: u32, low: u32, high: u32| {
            let value = node.cell(name)?.unwrap_or(default);
            let message = || node.malformed(name, format!("{value} is not between {low} and {high}"));
            if (low..=high).contains(&value) { Ok(value as u8) } else { Err(message()) }
        };
        let (port, axi_id) = if node.property("portcullis,pl-port").is_some() {
            let (port, id) = pl_port(node)?;
            if id > 61 {
                let reason = format!("{id}: the core needs three AXI IDs from there, and 63 is the last");
                return Err(node.malformed("portcullis,axi-id", reason));
            }
            (Some(port), id)
        } else {
            (None, 0)
        };
        let declared = self.declared(node);
        let actual = port.map(|p| (axi_id..axi_id + 3).filter_map(|id| p.stream(id)).collect());
        let ax_prot = match node.cell("portcullis,ax-prot")?.unwrap_or(0b010) {
            prot @ 0..=7 => prot as u8,
            other => {
                return Err(node.malformed("portcullis,ax-prot", format!("{other} has more than 3 bits")));
            }
        };
        Ok(AxiDma {
            node: self.info(node),
            region: self.registers(node)?,
            port,
            ax_prot,
            scatter_gather: node.property("xlnx,include-sg").is_some(),
            address_bits: width("xlnx,addrwidth", 32, 32, 64)?,
            length_bits: width("xlnx,sg-length-width", 23, 8, 26)?,
            fifo_bytes: match node.cell("portcullis,fifo-bytes")?.unwrap_or(4096) {
                bytes @ 1..=0x10_0000 => bytes,
                other => {
                    let reason = format!("{other} is not between 1 and 1 MiB");
                    return Err(node.malformed("portcullis,fifo-bytes", reason));
                }
            },
            channels: self.axi_channels(node)?,
            dma_coherent: node.dma_coherent,
            streams: Streams { actual: actual.unwrap_or_default(), declared },
        })
    }

    fn axi_channels(&self, node: &Node) -> Result<[Option<AxiDmaChannel>; 2], TreeError> {
        let mut channels = [None, None];
        for child in node.children().iter().filter_map(|id| self.tree.node(*id)) {
            let which = CHANNELS.iter().position(|c| child.is_compatible(c));
            let Some((which, slot)) = which.and_then(|i| Some((i, channels.get_mut(i)?))) else { continue };
            if slot.is_some() {
                let message = format!("the second `{}` of {}", CHANNELS[which], node.path);
                return Err(TreeError::node(&child.path, message));
            }
            let width = match child.cell("xlnx,datawidth")? {
                Some(width @ (8 | 16 | 32 | 64 | 128 | 256 | 512 | 1024)) => width,
                Some(other) => {
                    return Err(child.malformed("xlnx,datawidth", format!("{other} is no width of a bus")));
                }
                None => {
                    return Err(TreeError::node(
                        &child.path,
                        "it has no `xlnx,datawidth`, which is required",
                    ));
                }
            };
            *slot = Some(AxiDmaChannel {
                path: child.path.clone(),
                interrupt: child.interrupts.first().cloned(),
                data_width: width,
                realigns: child.property("xlnx,include-dre").is_some(),
            });
        }
        Ok(channels)
    }

    pub fn dma_proxy(&self, node: &Node) -> Result<DmaProxy, TreeError> {
        Ok(DmaProxy {
            node: self.info(node),
            dmas: self.dmas(node)?,
            dma_coherent: node.dma_coherent,
            streams: Streams { actual: Vec::new(), declared: self.declared(node) },
        })
    }

    /// `dmas` and `dma-names`: which channels a client uses, and what it calls them.
    fn dmas(&self, node: &Node) -> Result<Vec<DmaSpecifier>, TreeError> {
        let names = node.strings("dma-names")?;
        let cells = node.cells("dmas")?.unwrap_or_default();
        let mut rest = cells.as_slice();
        let mut dmas = Vec::new();
        while let Some((&phandle, after)) = rest.split_first() {
            let Some(provider) = self.tree.by_phandle(phandle) else {
                return Err(node.malformed("dmas", format!("no node has the phandle {phandle:#x}")));
            };
            let count = provider.cell("#dma-cells")?.unwrap_or(0) as usize;
            let Some((own, left)) = after.split_at_checked(count) else {
                let reason = format!("cut off: {} has #dma-cells = <{count}>", provider.path);
                return Err(node.malformed("dmas", reason));
            };
            let Some(name) = names.get(dmas.len()) else {
                let reason = format!("{} names for more entries of `dmas`", names.len());
                return Err(node.malformed("dma-names", reason));
            };
            if dmas.len() == MAX_DMAS {
                return Err(TreeError::Limit {
                    node: node.path.clone(),
                    what: "entries of `dmas`",
                    limit: MAX_DMAS as u64,
                });
            }
            dmas.push(DmaSpecifier {
                name: (*name).to_owned(),
                provider: provider.path.clone(),
                channel: own.first().copied().unwrap_or(0),
            });
            rest = left;
        }
        Ok(dmas)
    }

    pub fn nic(&self, node: &Node) -> Result<Nic, TreeError> {
        let region = self.registers(node)?;
        let route_bit = zynqmp::master_at(region.base).and_then(|located| located.master.route_bit);
        Ok(Nic {
            node: self.info(node),
            region,
            interrupt: node.interrupts.first().cloned(),
            route_bit,
            dma_coherent: node.dma_coherent,
            streams: self.streams(node)?,
        })
    }
}
