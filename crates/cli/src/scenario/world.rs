//! A booted board as a scenario holds it, and the way of its events to the output.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use portcullis_board::sim::{EventKind, Machine, Options, Recording, TransactionEvent};
use portcullis_board::system::System;
use portcullis_bus::StaleRead;
use portcullis_explain::Unmapped;
use portcullis_iommu::{Domain, InstanceId, RoutedFault};
use rhai::{Dynamic, Map};

use super::Context;
use super::api::BootRequest;
use super::reports;
use super::vms::Vms;
use crate::output::{Item, Report};
use crate::tell::Teller;

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
    /// Virtual machines and what they have.
    pub vms: Vms,
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
            vms: Vms::default(),
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
        let stale = self.teller(context, |teller| teller.events(&events, &mut |item| context.emit(item)));
        for event in &events {
            match &event.kind {
                EventKind::Ats { engine, what } => {
                    self.ats.borrow_mut().push(reports::ats_map(engine, what));
                }
                EventKind::Message { data, lpi, .. } => {
                    let values = [("data", i64::from(*data)), ("lpi", i64::from(*lpi))];
                    self.messages
                        .borrow_mut()
                        .push(values.map(|(k, v)| (k.into(), v.into())).into_iter().collect());
                }
                _ => {}
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

    /// Somebody who tells what happened on this machine.
    pub fn teller<R>(&self, context: &Context, tell: impl FnOnce(Teller<'_>) -> R) -> R {
        let unmapped = |t: &TransactionEvent| self.unmapped_from(t);
        tell(Teller { machine: self.system.machine(), epoch: context.epoch.get(), unmapped: &unmapped })
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

    /// Prints one fault of many.
    pub fn tell_fault(&self, context: &Context, fault: &RoutedFault) {
        context.emit(Item::Report(self.report(fault)));
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
