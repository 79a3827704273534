//! What hangs at the programmable logic and at the chip's switches: AXI DMA cores and network devices.

use std::sync::{Arc, Mutex};

use portcullis_arch::zynqmp::SmmuPath;
use portcullis_bus::{DmaPort, IrqLine};
use portcullis_engines::axidma::AxiDmaStreams;
use portcullis_engines::{AxiDma, AxiDmaConfig, Gem, GemConfig};

use crate::machine::{AxiDma as AxiDmaNode, Nic};
use crate::sim::build::{Wiring, spi};
use crate::sim::machine::{EngineKind, EngineSlot};
use crate::sim::port::SharedTraffic;
use crate::sim::route::{IouRoute, RoutedPort};
use crate::tree::Interrupt;

impl Wiring<'_> {
    fn line(&self, interrupt: Option<&Interrupt>) -> IrqLine {
        interrupt.and_then(spi).map_or_else(IrqLine::unconnected, |n| IrqLine::new(self.tracer.clone(), n))
    }

    pub(super) fn axi_dma(&self, i: usize, d: &AxiDmaNode) -> EngineSlot {
        let name = format!("axidma{i}");
        let behind = d.port.is_none_or(|p| p.info().path != SmmuPath::NotBehind);
        let smmu = self.smmu_of(&d.streams).filter(|_| behind);
        let [sg, mm2s, s2mm] = d.sends();
        let interrupt =
            |i: usize| d.channels.get(i).and_then(Option::as_ref).and_then(|c| c.interrupt.as_ref());
        let config = AxiDmaConfig {
            sg: d.scatter_gather,
            address_bits: d.address_bits,
            length_bits: d.length_bits,
            streams: AxiDmaStreams { sg, mm2s, s2mm },
            axprot: d.ax_prot,
            coherent: d.dma_coherent,
            fifo_bytes: d.fifo_bytes as usize,
            ..AxiDmaConfig::s0(sg)
        };
        let traffic = SharedTraffic::default();
        let port = self.port(&name, d.dma_coherent, smmu, &traffic);
        let core = AxiDma::new(config, port, self.line(interrupt(0)), self.line(interrupt(1)));
        let width = d.channels.iter().flatten().map(|c| c.data_width).max();
        EngineSlot {
            name: name.into(),
            path: d.node.path.clone(),
            base: d.region.base,
            size: d.region.size,
            stream: sg,
            streams: vec![sg, mm2s, s2mm],
            interrupts: [0, 1].into_iter().filter_map(interrupt).filter_map(spi).collect(),
            smmu: smmu.map(|s| s.index),
            coherent: d.dma_coherent,
            bus_width: width.unwrap_or(0),
            engine: EngineKind::AxiDma(Arc::new(Mutex::new(core))),
            traffic,
            atc: None,
        }
    }

    /// A network device. Whether it is behind the SMMU is for the register to say: the slot tells what the tree believes.
    pub(super) fn nic(&self, i: usize, n: &Nic, route: Option<&Arc<IouRoute>>) -> EngineSlot {
        let name = format!("nic{i}");
        let smmu = self.smmu_of(&n.streams);
        let stream = n.streams.first().unwrap_or_default();
        let traffic = SharedTraffic::default();
        let through = self.port(&name, n.dma_coherent, smmu, &traffic);
        let port: Box<dyn DmaPort> = match (route, n.route_bit) {
            (Some(route), Some(bit)) => Box::new(RoutedPort {
                route: route.clone(),
                bit,
                coherent: through,
                direct: self.port(&name, n.dma_coherent, None, &traffic),
            }),
            _ => through,
        };
        let config = GemConfig { stream, coherent: n.dma_coherent };
        let gem = Gem::new(config, port, self.line(n.interrupt.as_ref()));
        EngineSlot {
            name: name.into(),
            path: n.node.path.clone(),
            base: n.region.base,
            size: n.region.size,
            stream,
            streams: vec![stream],
            interrupts: n.interrupt.as_ref().and_then(spi).into_iter().collect(),
            smmu: smmu.map(|s| s.index),
            coherent: n.dma_coherent,
            bus_width: 64,
            engine: EngineKind::Nic(Arc::new(Mutex::new(gem))),
            traffic,
            atc: None,
        }
    }
}
