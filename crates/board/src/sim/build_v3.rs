//! The parts of a machine that came with SMMUv3: the SMMU itself, and PCIe test devices with translation caches of their
//! own.

use std::sync::{Arc, Mutex};

use portcullis_bus::{AtsDevice, DmaPort, InterruptSink, IrqLine, SystemMemory, View};
use portcullis_engines::{AtcConfig, AtcPort, AtcShared, TestDev, TestDevConfig};
use portcullis_smmuv3::{Interrupts, SmmuV3, Wires};

use crate::MachineDescription;
use crate::machine::{Smmu, SmmuV3 as Node, TestDevice};
use crate::sim::ats::{AtcRecorder, AtsRecorder};
use crate::sim::build::{BuildError, Wiring, spi};
use crate::sim::machine::{EngineKind, EngineSlot, SmmuSlot};
use crate::sim::port::{SharedTraffic, TracingPort};
use crate::sim::trace::Tracer;
use crate::tree::Interrupt;

/// Bytes of a doorbell: GITS_TRANSLATER.
const DOORBELL_BYTES: u64 = 4;

/// Builds an SMMUv3.
pub(super) fn smmu(
    description: &MachineDescription,
    s: &Smmu,
    v3: &Node,
    memory: &SystemMemory,
    walker: &str,
    tracer: &Arc<Tracer>,
) -> Result<Arc<SmmuV3<SystemMemory>>, BuildError> {
    let path = || s.node.path.clone();
    if let Some(quirk) = &v3.quirk {
        return Err(BuildError::Quirk { path: path(), property: quirk.clone() });
    }
    let mut caps = v3.preset.caps();
    caps.coherent = s.dma_coherent;
    let view = if s.dma_coherent { View::Coherent } else { View::NonCoherent };
    let sink: Arc<dyn InterruptSink> = tracer.clone();
    let line = |interrupt: &Option<Interrupt>| {
        let Some(number) = interrupt.as_ref().and_then(spi) else { return IrqLine::unconnected() };
        // What the tree calls a level is one to the interrupt controller as well, and then a pulse is lost.
        if interrupt.as_ref().is_some_and(Interrupt::is_edge) {
            tracer.configure_edge(number);
        }
        IrqLine::new(sink.clone(), number)
    };
    let wires = Wires {
        eventq: line(&v3.eventq),
        priq: line(&v3.priq),
        cmdq_sync: line(&v3.cmdq_sync),
        gerror: line(&v3.gerror),
        combined: line(&v3.combined),
    };
    let interrupts = Interrupts { non_secure: wires, ..Interrupts::default() }.with_messages(sink.clone());
    let mut builder = SmmuV3::builder(caps).memory(memory.view(view, walker)).interrupts(interrupts);
    let its = v3.msi.and_then(|msi| description.its.get(msi.its)).filter(|its| its.node.available);
    if let Some(its) = its {
        let doorbell = its.doorbell().get();
        builder = builder.msi_doorbell(doorbell..doorbell.saturating_add(DOORBELL_BYTES));
    }
    builder.build().map_err(|error| BuildError::SmmuV3 { path: path(), error })
}

impl Wiring<'_> {
    /// A PCIe test device. Its messages go to the ITS past the SMMU: where a doorbell is mapped to is not modelled.
    pub(super) fn test_device(&self, i: usize, d: &TestDevice) -> EngineSlot {
        let name = format!("testdev{i}");
        let smmu = self.smmu_of(&d.streams);
        let stream = d.streams.first().unwrap_or_default();
        let config = TestDevConfig { extended: true, ..TestDevConfig::new(stream) };
        let traffic = SharedTraffic::default();
        let (port, atc) = self.pci_port(&name, d, smmu, &traffic);
        let device = TestDev::new(config, port, IrqLine::unconnected()).with_messages(self.tracer.clone());
        EngineSlot {
            name: name.into(),
            path: d.node.path.clone(),
            base: d.region.base,
            size: d.region.size,
            stream,
            streams: vec![stream],
            interrupts: Vec::new(),
            smmu: smmu.map(|s| s.index),
            coherent: d.dma_coherent,
            bus_width: 0,
            traffic,
            engine: EngineKind::TestDevice(Arc::new(Mutex::new(device))),
            atc,
        }
    }

    /// The port of a PCI function, and its translation cache. The cache is off until software enables it, as on PCI. Without
    /// an SMMUv3 on the way there is nobody who would translate.
    fn pci_port(
        &self,
        name: &str,
        d: &TestDevice,
        smmu: Option<&SmmuSlot>,
        traffic: &SharedTraffic,
    ) -> (Box<dyn DmaPort>, Option<Arc<AtcShared>>) {
        let Some((model, slot)) = smmu.and_then(|s| Some((s.model.v3()?, s))).filter(|_| d.ats) else {
            return (self.port(name, d.dma_coherent, smmu, traffic), None);
        };
        let view = if d.dma_coherent { View::Coherent } else { View::NonCoherent };
        let memory = self.memory.view(view, name);
        let atc = AtcShared::new(AtcConfig { ats: false, pri: false, ..AtcConfig::default() });
        let port = model.port(memory.clone());
        let plain = self.options.plain_ports;
        for stream in d.streams.declared.iter().filter(|s| s.smmu == slot.index) {
            let device: Arc<dyn AtsDevice> = if plain {
                atc.clone()
            } else {
                let (tracer, engine) = (self.tracer.clone(), name.into());
                Arc::new(AtcRecorder { device: atc.clone(), tracer, engine })
            };
            model.attach_ats(stream.id, device);
        }
        if plain {
            return (Box::new(AtcPort::new(atc.clone(), port)), Some(atc));
        }
        let port = AtcPort::new(atc.clone(), AtsRecorder::new(port, self.tracer.clone(), name));
        let port = TracingPort::with_atc(port, model.clone(), memory, self.tracer.clone(), name);
        (Box::new(port.counting(traffic.clone())), Some(atc))
    }
}
