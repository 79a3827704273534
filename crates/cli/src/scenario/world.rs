//! A booted board as a scenario holds it, and the way of its events to the output.

use std::cell::RefCell;
use std::rc::Rc;

use portcullis_arch::{Access, Attributes};
use portcullis_board::sim::{
    EngineSlot, Event, EventKind, Fault, Machine, Options, Recording, TransactionEvent,
};
use portcullis_board::system::System;
use portcullis_bus::coherency::Maintenance;
use portcullis_bus::{DmaFault, Initiator, StaleRead};
use portcullis_drivers::fault::FaultDetail;
use portcullis_explain::{CauseContext, causes, story};
use portcullis_iommu::{InstanceId, RoutedFault};
use portcullis_smmuv2::Outcome;
use rhai::{Dynamic, Map};

use super::Context;
use super::api::BootRequest;
use crate::output::{Item, Report};

/// A booted board.
pub struct World {
    pub system: System,
    faults: RefCell<Vec<RoutedFault>>,
    stale: RefCell<Vec<StaleRead>>,
}

impl World {
    /// Builds the machine and boots its software.
    pub fn boot(context: &Context, request: &BootRequest) -> Result<Rc<Self>, String> {
        let mut description = context.settings.description.clone();
        request.change(&mut description)?;
        let recording = Recording { registers: context.settings.trace, explain: context.settings.explain };
        let options = Options { cpu_cache: request.cpu_cache, recording, plain_ports: false };
        let machine = Machine::build(description, options).map_err(|e| format!("boot: {e}"))?;
        let system = System::boot(machine, &request.options).map_err(|e| format!("boot: {e}"))?;
        if !context.booted.replace(true) {
            context.emit(Item::Boot { text: system.describe() });
        }
        let world = Rc::new(Self { system, faults: RefCell::default(), stale: RefCell::default() });
        world.drain(context);
        Ok(world)
    }

    /// Simulated time since boot in nanoseconds.
    pub fn now(&self) -> u64 {
        self.system.machine().tracer().now()
    }

    /// Lets everything come to rest and prints what happened.
    pub fn settle(&self, context: &Context) -> Result<(), String> {
        let result = self.system.settle().map_err(|e| e.to_string());
        self.drain(context);
        result
    }

    /// Prints what happened since the last time.
    pub fn drain(&self, context: &Context) {
        let (events, lost) = self.system.machine().tracer().take();
        let batch = self.system.core().take_faults();
        let stale = |e: &Event| match &e.kind {
            EventKind::Stale(s) => Some(s.clone()),
            _ => None,
        };
        let stale: Vec<StaleRead> = events.iter().filter_map(stale).collect();
        for event in &events {
            match &event.kind {
                EventKind::Transaction(t) => self.transaction(context, event.at, t, &stale),
                EventKind::Stale(s) => context.emit(stale_item(s)),
                EventKind::Register { .. } | EventKind::Interrupt { .. } | EventKind::Note(_) => {}
            }
        }
        if lost > 0 {
            context.emit(Item::Say { text: format!("{lost} more events were not kept") });
        }
        for fault in &batch.faults {
            context.emit(Item::Report(self.report(fault)));
        }
        if batch.lost > 0 {
            context.emit(Item::Say { text: format!("{} more fault reports were not kept", batch.lost) });
        }
        self.stale.borrow_mut().extend(stale);
        self.faults.borrow_mut().extend(batch.faults);
        context.keep(events);
    }

    fn transaction(&self, context: &Context, at: u64, t: &TransactionEvent, stale: &[StaleRead]) {
        for (explanation, cached) in &t.translations {
            let story = story(explanation, *cached);
            context.emit(Item::Explain { engine: t.engine.to_string(), story });
        }
        context.emit(transfer(at.saturating_add(context.epoch.get()), t));
        if let Some(fault) = &t.fault {
            context.emit(self.fault(t, fault, stale));
        } else if let Some((fault, pa)) = self.translated_to_nowhere(t) {
            context.emit(self.fault(t, &fault, stale));
            let text = format!(
                "the IOMMU let it pass; nothing answers at physical {pa:#x}: is the right page mapped?"
            );
            context.emit(Item::Say { text });
        }
    }

    /// A transaction that got its translation and then no answer from memory.
    fn translated_to_nowhere(&self, t: &TransactionEvent) -> Option<(Fault, u64)> {
        let Some((done, DmaFault::Bus(_))) = t.error else { return None };
        let machine = self.system.machine();
        let smmu = &machine.smmu_at(machine.engine(&t.engine)?.smmu?)?.model;
        let from = Initiator::new(t.stream).with_attrs(Attributes::DEVICE_DEFAULT);
        let explanation = self.quietly(|| smmu.explain(from, t.iova.wrapping_add(done as u64), t.access));
        let pa = match &explanation.outcome {
            Outcome::Translated { walked, .. } => walked.pa,
            Outcome::Bypass { pa, .. } => pa.get(),
            _ => return None,
        };
        Some((Fault { explanation, cached: None }, pa))
    }

    fn fault(&self, t: &TransactionEvent, fault: &Fault, stale: &[StaleRead]) -> Item {
        let machine = self.system.machine();
        let ram: Vec<_> = machine.memory().regions().collect();
        let name = |e: &EngineSlot| (e.stream, e.name.to_string());
        let names: Vec<_> = machine.engines().iter().map(name).collect();
        let evidence = CauseContext {
            zynqmp: machine.description().chip.is_some(),
            ram: &ram,
            stale,
            cached: fault.cached,
            names: &names,
        };
        let slot = machine.engine(&t.engine).and_then(|e| machine.smmu_at(e.smmu?));
        let find = || slot.map(|s| causes(&s.model, &fault.explanation, &evidence)).unwrap_or_default();
        Item::Fault {
            engine: t.engine.to_string(),
            story: story(&fault.explanation, fault.cached),
            causes: self.quietly(find),
        }
    }

    /// Looks at what hardware would read, without reports of stale reads: it has not read.
    pub fn quietly<R>(&self, look: impl FnOnce() -> R) -> R {
        match self.system.machine().memory().cpu_cache() {
            Some(cache) => cache.unreported(look),
            None => look(),
        }
    }

    /// The name that Linux gives to an SMMU: unit address and name of its node.
    fn device_name(&self, instance: InstanceId) -> String {
        let bound = self.system.smmus().iter().find(|s| s.instance == instance);
        let node = bound.and_then(|b| self.system.machine().description().smmus.get(b.index));
        let Some(smmu) = node else { return "smmu".into() };
        let name = smmu.node.name.split('@').next().unwrap_or_default();
        format!("{:x}.{name}", smmu.region.base)
    }

    fn report(&self, fault: &RoutedFault) -> Report {
        let device = self.device_name(fault.instance);
        let kernel = match &fault.report.detail {
            FaultDetail::SmmuV2Context(c) => c.linux_lines(&device).to_string(),
            FaultDetail::SmmuV2Global(g) => g.linux_lines(&device).to_string(),
            _ => String::new(),
        };
        let r = &fault.report;
        Report {
            device: fault.name.clone(),
            reason: r.reason.to_string(),
            stream: r.stream.map(|s| s.get()),
            iova: format!("{:#x}", r.iova),
            access: r.access.to_string(),
            stage: r.stage,
            level: r.level,
            bank: r.bank,
            stalled: r.stalled,
            text: r.to_string(),
            kernel: kernel.lines().map(str::to_string).collect(),
        }
    }

    /// The faults reported since the last call, as maps.
    pub fn take_faults(&self) -> rhai::Array {
        self.faults.borrow_mut().drain(..).map(|f| Dynamic::from(fault_map(&f))).collect()
    }

    /// The stale reads since the last call, as maps.
    pub fn take_stale(&self) -> rhai::Array {
        self.stale.borrow_mut().drain(..).map(|s| Dynamic::from(stale_map(&s))).collect()
    }
}

fn transfer(at_ns: u64, t: &TransactionEvent) -> Item {
    let done = t.error.map_or(t.len, |(n, _)| n);
    let error = t.error.map(|(_, e)| match e {
        DmaFault::Stalled(_) => "stalled".to_string(),
        e => e.to_string(),
    });
    Item::Transfer {
        at_ns,
        engine: t.engine.to_string(),
        stream: t.stream.get(),
        access: if t.access == Access::Read { "read" } else { "write" },
        iova: format!("{:#x}", t.iova),
        len: t.len,
        done,
        error,
    }
}

fn missing(s: &StaleRead) -> &'static str {
    match s.missing {
        Maintenance::Clean => "clean",
        Maintenance::Invalidate => "invalidate",
    }
}

fn stale_item(s: &StaleRead) -> Item {
    Item::Stale {
        reader: s.reader.to_string(),
        pa: format!("{:#x}", s.pa),
        seen: format!("{:#x}", s.seen),
        current: format!("{:#x}", s.current),
        missing: missing(s).into(),
        text: s.to_string(),
    }
}

fn stale_map(s: &StaleRead) -> Map {
    let values: [(&str, Dynamic); 6] = [
        ("reader", s.reader.to_string().into()),
        ("pa", (s.pa as i64).into()),
        ("seen", (s.seen as i64).into()),
        ("current", (s.current as i64).into()),
        ("missing", missing(s).into()),
        ("text", s.to_string().into()),
    ];
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}

fn fault_map(fault: &RoutedFault) -> Map {
    let r = &fault.report;
    let number = |n: Option<u8>| n.map_or(Dynamic::UNIT, |n| i64::from(n).into());
    let values: [(&str, Dynamic); 12] = [
        ("reason", r.reason.to_string().into()),
        ("device", fault.name.clone().map_or(Dynamic::UNIT, Into::into)),
        ("stream", r.stream.map_or(Dynamic::UNIT, |s| i64::from(s.get()).into())),
        ("iova", (r.iova.get() as i64).into()),
        ("access", r.access.to_string().into()),
        ("instruction", r.instruction.into()),
        ("privileged", r.privileged.into()),
        ("stage", number(r.stage)),
        ("level", number(r.level)),
        ("bank", number(r.bank)),
        ("stalled", r.stalled.into()),
        ("text", r.to_string().into()),
    ];
    values.into_iter().map(|(key, value)| (key.into(), value)).collect()
}
