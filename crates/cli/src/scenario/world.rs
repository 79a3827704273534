//! A booted board as a scenario holds it, and the way of its events to the output.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use portcullis_arch::{Access, Attributes};
use portcullis_board::sim::{
    AtsEvent, EngineSlot, Event, EventKind, Explanation, Fault, Machine, Options, Recording, SmmuModel,
    TransactionEvent,
};
use portcullis_board::system::System;
use portcullis_bus::{DmaFault, Initiator, StaleRead};
use portcullis_explain::{CauseContext, Seen, Story, Unmapped, causes, causes_v3, story, story_v3};
use portcullis_iommu::{Domain, InstanceId, RoutedFault};
use portcullis_smmuv3::Caps;
use rhai::{Dynamic, Map};

use super::Context;
use super::api::BootRequest;
use super::reports;
use crate::output::{Item, Report, ats};

/// Unmappings that are remembered.
const MAX_UNMAPPED: usize = 1 << 16;

/// A booted board.
pub struct World {
    pub system: System,
    faults: RefCell<Vec<RoutedFault>>,
    /// Faults that a script took and may answer.
    waiting: RefCell<Vec<RoutedFault>>,
    stale: RefCell<Vec<StaleRead>>,
    /// Which domain an engine was attached to last, by a number of the domain.
    attached: RefCell<BTreeMap<String, usize>>,
    /// Domain, first address, bytes and time of each unmapping.
    unmapped: RefCell<Vec<(usize, u64, u64, u64)>>,
    ats: RefCell<Vec<Map>>,
    messages: RefCell<Vec<Map>>,
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
        let world = Rc::new(Self {
            system,
            faults: RefCell::default(),
            waiting: RefCell::default(),
            stale: RefCell::default(),
            attached: RefCell::default(),
            unmapped: RefCell::default(),
            ats: RefCell::default(),
            messages: RefCell::default(),
        });
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
        // The engine whose translation request was refused last.
        let mut refused: Option<&Arc<str>> = None;
        for event in &events {
            match &event.kind {
                EventKind::Transaction(t) => {
                    let asked = refused.take().is_some_and(|engine| **engine == *t.engine);
                    self.transaction(context, event.at, t, &stale, asked);
                }
                EventKind::Stale(s) => context.emit(reports::stale_item(s)),
                EventKind::Ats { engine, what } => {
                    let (kind, text, bad) = ats::text(what);
                    if matches!(what, AtsEvent::Request { .. }) {
                        refused = bad.then_some(engine);
                    }
                    context.emit(Item::Ats { engine: engine.to_string(), what: kind, text, refused: bad });
                    self.ats.borrow_mut().push(reports::ats_map(engine, what));
                }
                EventKind::Message { address, data, lpi } => {
                    let address = format!("{address:#x}");
                    context.emit(Item::Message { address, data: *data, lpi: *lpi });
                    let values = [("data", i64::from(*data)), ("lpi", i64::from(*lpi))];
                    self.messages
                        .borrow_mut()
                        .push(values.map(|(k, v)| (k.into(), v.into())).into_iter().collect());
                }
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

    /// `asked` if the engine asked for a translation and did not get it.
    fn transaction(
        &self,
        context: &Context,
        at: u64,
        t: &TransactionEvent,
        stale: &[StaleRead],
        asked: bool,
    ) {
        for (explanation, cached) in &t.translations {
            let story =
                self.tell(&t.engine, explanation, Seen { cached: *cached, passed: self.passed(t), asked });
            context.emit(Item::Explain { engine: t.engine.to_string(), story });
        }
        context.emit(transfer(at.saturating_add(context.epoch.get()), t));
        if let Some(fault) = &t.fault {
            context.emit(self.fault(t, fault, stale, asked));
        } else if let Some((fault, pa)) = self.translated_to_nowhere(t) {
            context.emit(self.fault(t, &fault, stale, false));
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
        let from = Initiator {
            substream: t.substream,
            ..Initiator::new(t.stream).with_attrs(Attributes::DEVICE_DEFAULT)
        };
        let explanation = self.quietly(|| smmu.explain(from, t.iova.wrapping_add(done as u64), t.access));
        let pa = explanation.output()?;
        Some((Fault { explanation, cached: None }, pa))
    }

    fn fault(&self, t: &TransactionEvent, fault: &Fault, stale: &[StaleRead], asked: bool) -> Item {
        let machine = self.system.machine();
        let ram: Vec<_> = machine.memory().regions().collect();
        let name = |e: &EngineSlot| (e.stream, e.name.to_string());
        let names: Vec<_> = machine.engines().iter().map(name).collect();
        let evidence = CauseContext {
            zynqmp: machine.description().chip.is_some(),
            ram: &ram,
            stale,
            cached: fault.cached,
            passed: self.passed(t),
            names: &names,
            unmapped: &self.unmapped_from(t),
        };
        let slot = machine.engine(&t.engine).and_then(|e| machine.smmu_at(e.smmu?));
        let find = || match (slot.map(|s| &s.model), &fault.explanation) {
            (Some(SmmuModel::V2(model)), Explanation::V2(e)) => causes(model, e, &evidence),
            (Some(SmmuModel::V3(model)), Explanation::V3(e)) => causes_v3(model, e, &evidence),
            _ => Vec::new(),
        };
        Item::Fault {
            engine: t.engine.to_string(),
            story: self.tell(
                &t.engine,
                &fault.explanation,
                Seen { cached: fault.cached, passed: self.passed(t), asked },
            ),
            causes: self.quietly(find),
        }
    }

    /// Remembers that an engine uses a domain, or none that a script unmaps from.
    pub fn note_attached(&self, engine: &str, domain: Option<&Arc<Domain>>) {
        let mut attached = self.attached.borrow_mut();
        match domain {
            Some(domain) => attached.insert(engine.to_string(), Arc::as_ptr(domain).addr()),
            None => attached.remove(engine),
        };
    }

    /// Remembers that something was unmapped now.
    pub fn note_unmapped(&self, domain: &Arc<Domain>, iova: u64, len: u64) {
        let mut unmapped = self.unmapped.borrow_mut();
        if unmapped.len() < MAX_UNMAPPED {
            unmapped.push((Arc::as_ptr(domain).addr(), iova, len, self.now()));
        }
    }

    /// What was unmapped from the domain of a transaction's engine.
    fn unmapped_from(&self, t: &TransactionEvent) -> Vec<Unmapped> {
        let attached = self.attached.borrow();
        let Some(domain) = attached.get(&*t.engine).filter(|_| t.substream.is_none()) else {
            return Vec::new();
        };
        let unmapped = self.unmapped.borrow();
        let here = unmapped.iter().filter(|(of, ..)| of == domain);
        here.map(|&(_, iova, len, at)| Unmapped { iova, len, ago_ns: self.now().saturating_sub(at) })
            .collect()
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
        reports::report(fault, &device, self.queue_indices())
    }

    /// The bits of an index of the SMMUv3's command queue, the wrap bit included.
    fn queue_indices(&self) -> u32 {
        let entries = self.system.smmu_v3().map_or(1, |(_, driver)| driver.commands().entries());
        u32::try_from(2 * entries - 1).unwrap_or(u32::MAX)
    }

    /// The story of a translation.
    pub fn tell(&self, engine: &str, explanation: &Explanation, seen: Seen) -> Story {
        match explanation {
            Explanation::V2(e) => story(e, seen.cached),
            Explanation::V3(e) => {
                let machine = self.system.machine();
                let slot = machine.engine(engine).and_then(|e| machine.smmu_at(e.smmu?));
                let caps = slot.and_then(|s| s.model.v3()).map_or_else(Caps::full, |m| m.caps().clone());
                story_v3(e, &caps, &seen)
            }
        }
    }

    /// True if a transaction went through and its engine asks the SMMU each time.
    fn passed(&self, t: &TransactionEvent) -> bool {
        let engine = self.system.machine().engine(&t.engine);
        t.error.is_none() && engine.is_some_and(|e| e.atc.is_none())
    }

    /// The faults reported since the last call, as maps.
    pub fn take_faults(&self) -> rhai::Array {
        let mut waiting = self.waiting.borrow_mut();
        let faults: Vec<_> = self.faults.borrow_mut().drain(..).collect();
        let map = |fault: RoutedFault| {
            let id = fault.report.stalled.then(|| {
                waiting.push(fault.clone());
                waiting.len() - 1
            });
            Dynamic::from(reports::fault_map(&fault, id, self.queue_indices()))
        };
        faults.into_iter().map(map).collect()
    }

    /// A fault that was taken and that somebody waits for, by the number in its map.
    pub fn waiting(&self, id: usize) -> Option<RoutedFault> {
        self.waiting.borrow().get(id).cloned()
    }

    /// What devices with ATS did since the last call, as maps.
    pub fn take_ats(&self) -> rhai::Array {
        self.ats.borrow_mut().drain(..).map(Dynamic::from).collect()
    }

    /// The messages that arrived since the last call, as maps.
    pub fn take_messages(&self) -> rhai::Array {
        self.messages.borrow_mut().drain(..).map(Dynamic::from).collect()
    }

    /// The stale reads since the last call, as maps.
    pub fn take_stale(&self) -> rhai::Array {
        self.stale.borrow_mut().drain(..).map(|s| Dynamic::from(reports::stale_map(&s))).collect()
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
        substream: t.substream.map(|s| s.get()),
        access: if t.access == Access::Read { "read" } else { "write" },
        iova: format!("{:#x}", t.iova),
        len: t.len,
        done,
        error,
    }
}
