//! A machine's events, told: what a transaction did, why it did not get through, and what is likely the cause.

use std::sync::Arc;

use portcullis_arch::{Access, Attributes};
use portcullis_board::sim::{
    AtsEvent, EngineSlot, Event, EventKind, Explanation, Fault, Machine, SmmuModel, TransactionEvent,
};
use portcullis_bus::{DmaFault, Initiator, StaleRead};
use portcullis_explain::{CauseContext, Seen, Story, Unmapped, causes, causes_v3, story, story_v3};
use portcullis_smmuv3::Caps;

use crate::output::{Item, ats};
use crate::scenario::stale_item;

/// Who tells, and what it knows.
pub struct Teller<'a> {
    /// Where it happened.
    pub machine: &'a Machine,
    /// When the machine's clock began.
    pub epoch: u64,
    /// What was unmapped from the domain of a transaction's engine, as far as somebody remembers.
    pub unmapped: &'a dyn Fn(&TransactionEvent) -> Vec<Unmapped>,
}

impl Teller<'_> {
    /// Tells of events, in their order. Returns the stale reads among them.
    pub fn events(&self, events: &[Event], emit: &mut dyn FnMut(Item)) -> Vec<StaleRead> {
        let stale = |e: &Event| match &e.kind {
            EventKind::Stale(s) => Some(s.clone()),
            _ => None,
        };
        let stale: Vec<StaleRead> = events.iter().filter_map(stale).collect();
        // The engine whose translation request was refused last.
        let mut refused: Option<&Arc<str>> = None;
        for event in events {
            match &event.kind {
                EventKind::Transaction(t) => {
                    let asked = refused.take().is_some_and(|engine| **engine == *t.engine);
                    self.transaction(emit, event.at, t, &stale, asked);
                }
                EventKind::Stale(s) => emit(stale_item(s)),
                EventKind::Ats { engine, what } => {
                    let (kind, text, bad) = ats::text(what);
                    if matches!(what, AtsEvent::Request { .. }) {
                        refused = bad.then_some(engine);
                    }
                    emit(Item::Ats { engine: engine.to_string(), what: kind, text, refused: bad });
                }
                EventKind::Message { address, data, lpi } => {
                    let address = format!("{address:#x}");
                    emit(Item::Message { address, data: *data, lpi: *lpi });
                }
                EventKind::Register { .. } | EventKind::Interrupt { .. } | EventKind::Note(_) => {}
            }
        }
        stale
    }

    /// `asked` if the engine asked for a translation and did not get it.
    fn transaction(
        &self,
        emit: &mut dyn FnMut(Item),
        at: u64,
        t: &TransactionEvent,
        stale: &[StaleRead],
        asked: bool,
    ) {
        for (explanation, cached) in &t.translations {
            let story =
                self.tell(&t.engine, explanation, Seen { cached: *cached, passed: self.passed(t), asked });
            emit(Item::Explain { engine: t.engine.to_string(), story });
        }
        emit(transfer(at.saturating_add(self.epoch), t));
        if let Some(fault) = &t.fault {
            emit(self.fault(t, fault, stale, asked));
        } else if let Some((fault, pa)) = self.translated_to_nowhere(t) {
            emit(self.fault(t, &fault, stale, false));
            let text = format!(
                "the IOMMU let it pass; nothing answers at physical {pa:#x}: is the right page mapped?"
            );
            emit(Item::Say { text });
        }
    }

    /// A transaction that got its translation and then no answer from memory.
    fn translated_to_nowhere(&self, t: &TransactionEvent) -> Option<(Fault, u64)> {
        let Some((done, DmaFault::Bus(_))) = t.error else { return None };
        let machine = self.machine;
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
        let machine = self.machine;
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
            unmapped: &(self.unmapped)(t),
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

    /// Looks at what hardware would read, without reports of stale reads: it has not read.
    pub fn quietly<R>(&self, look: impl FnOnce() -> R) -> R {
        match self.machine.memory().cpu_cache() {
            Some(cache) => cache.unreported(look),
            None => look(),
        }
    }

    /// The story of a translation.
    pub fn tell(&self, engine: &str, explanation: &Explanation, seen: Seen) -> Story {
        match explanation {
            Explanation::V2(e) => story(e, seen.cached),
            Explanation::V3(e) => {
                let machine = self.machine;
                let slot = machine.engine(engine).and_then(|e| machine.smmu_at(e.smmu?));
                let caps = slot.and_then(|s| s.model.v3()).map_or_else(Caps::full, |m| m.caps().clone());
                story_v3(e, &caps, &seen)
            }
        }
    }

    /// True if a transaction went through and its engine asks the SMMU each time.
    fn passed(&self, t: &TransactionEvent) -> bool {
        let engine = self.machine.engine(&t.engine);
        t.error.is_none() && engine.is_some_and(|e| e.atc.is_none())
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
