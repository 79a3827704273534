//! A booted board as a scenario holds it, and the way of its events to the output.

use std::collections::BTreeMap;
use std::rc::Rc;

use portcullis_arch::Access;
use portcullis_board::sim::{EngineSlot, Event, EventKind, Machine, Options, Recording, TransactionEvent};
use portcullis_board::system::{BootOptions, System};
use portcullis_bus::{DmaFault, StaleRead};
use portcullis_drivers::fault::FaultDetail;
use portcullis_explain::{CauseContext, causes, story};
use portcullis_iommu::{DefaultDomain, RoutedFault};
use rhai::{Dynamic, Map};

use super::Context;
use crate::output::Item;

/// What a script asked for at boot.
#[derive(Default)]
pub struct BootRequest {
    pub cpu_cache: bool,
    pub options: BootOptions,
    /// Nodes whose `dma-coherent` is turned on or off.
    pub coherent: BTreeMap<String, bool>,
}

/// A booted board.
pub struct World {
    pub system: System,
    faults: std::cell::RefCell<Vec<RoutedFault>>,
    stale: std::cell::RefCell<Vec<StaleRead>>,
}

impl BootRequest {
    /// Reads the map that a script passed to `boot`.
    pub fn from_map(map: Map) -> Result<Self, String> {
        let mut request = Self::default();
        for (key, value) in map {
            let wrong = |want: &str| format!("boot: {key} must be {want}");
            match key.as_str() {
                "cpu_cache" => request.cpu_cache = value.as_bool().map_err(|_| wrong("true or false"))?,
                "bypass_unmatched" => {
                    request.options.bypass_unmatched = value.as_bool().map_err(|_| wrong("true or false"))?;
                }
                "default_domain" => {
                    let name = value.into_string().map_err(|_| wrong("a string"))?;
                    request.options.default_domain = match name.as_str() {
                        "blocked" => DefaultDomain::Blocked,
                        "identity" => DefaultDomain::Identity,
                        "translated" => DefaultDomain::Translated,
                        _ => return Err(wrong("\"blocked\", \"identity\" or \"translated\"")),
                    };
                }
                "streams" => {
                    let map =
                        value.try_cast::<Map>().ok_or_else(|| wrong("a map of device name to stream ids"))?;
                    for (device, ids) in map {
                        let ids =
                            ids.into_typed_array::<i64>().map_err(|_| wrong("a map of lists of numbers"))?;
                        let ids = ids.into_iter().map(u32::try_from).collect::<Result<_, _>>();
                        let ids = ids.map_err(|_| wrong("a map of lists of stream ids"))?;
                        request.options.streams.insert(device.to_string(), ids);
                    }
                }
                "coherent" => {
                    let map = value
                        .try_cast::<Map>()
                        .ok_or_else(|| wrong("a map of device name to true or false"))?;
                    for (device, on) in map {
                        let on = on.as_bool().map_err(|_| wrong("a map of device name to true or false"))?;
                        request.coherent.insert(device.to_string(), on);
                    }
                }
                other => {
                    let known = "cpu_cache, bypass_unmatched, default_domain, streams, coherent";
                    return Err(format!("boot: there is no option {other:?}; there are {known}"));
                }
            }
        }
        Ok(request)
    }
}

impl World {
    /// Builds the machine and boots its software.
    pub fn boot(context: &Context, request: &BootRequest) -> Result<Rc<Self>, String> {
        let mut description = context.settings.description.clone();
        for (name, on) in &request.coherent {
            let smmus = description.smmus.iter_mut().map(|s| (&s.node, &mut s.dma_coherent));
            let channels = description.dma_channels.iter_mut().map(|c| (&c.node, &mut c.dma_coherent));
            let writers = description.pl_writers.iter_mut().map(|w| (&w.node, &mut w.dma_coherent));
            let mut found = false;
            for (node, coherent) in smmus.chain(channels).chain(writers) {
                if node.name == *name || node.path == *name || node.labels.contains(name) {
                    *coherent = *on;
                    found = true;
                }
            }
            if !found {
                return Err(format!("boot: coherent names {name:?}, which is no node of this board"));
            }
        }
        let recording =
            Recording { registers: context.settings.registers, explain: context.settings.explain };
        let options = Options { cpu_cache: request.cpu_cache, recording, plain_ports: false };
        let machine = Machine::build(description, options).map_err(|e| e.to_string())?;
        let system = System::boot(machine, &request.options).map_err(|e| e.to_string())?;
        if !context.booted.replace(true) {
            context.emit(Item::Boot { text: system.describe() });
        }
        let world = Rc::new(Self { system, faults: Default::default(), stale: Default::default() });
        world.drain(context);
        Ok(world)
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
        let stale: Vec<StaleRead> = events
            .iter()
            .filter_map(|e| match &e.kind {
                EventKind::Stale(s) => Some(s.clone()),
                _ => None,
            })
            .collect();
        for event in &events {
            self.print(context, event, &stale);
        }
        if lost > 0 {
            context.emit(Item::Say { text: format!("{lost} more events were not kept") });
        }
        for fault in &batch.faults {
            context.emit(report(fault));
        }
        if batch.lost > 0 {
            context.emit(Item::Say { text: format!("{} more fault reports were not kept", batch.lost) });
        }
        self.stale.borrow_mut().extend(stale);
        self.faults.borrow_mut().extend(batch.faults);
        context.trace.borrow_mut().extend(events);
    }

    fn print(&self, context: &Context, event: &Event, stale: &[StaleRead]) {
        match &event.kind {
            EventKind::Transaction(t) => {
                for (explanation, cached) in &t.translations {
                    let story = story(explanation, *cached);
                    context.emit(Item::Explain { engine: t.engine.to_string(), story });
                }
                context.emit(transfer(event.at, t));
                if let (Some(f), Some(smmu)) = (&t.fault, self.system.machine().smmu()) {
                    let description = self.system.machine().description();
                    let ram: Vec<_> = self.system.machine().memory().regions().collect();
                    let name = |e: &EngineSlot| (e.stream, e.name.to_string());
                    let names: Vec<_> = self.system.machine().engines().iter().map(name).collect();
                    let evidence = CauseContext {
                        zynqmp: description.chip.is_some(),
                        ram: &ram,
                        stale,
                        cached: f.cached,
                        names: &names,
                    };
                    context.emit(Item::Fault {
                        engine: t.engine.to_string(),
                        story: story(&f.explanation, f.cached),
                        causes: causes(smmu, &f.explanation, &evidence),
                    });
                }
            }
            EventKind::Stale(s) => context.emit(Item::Stale { text: s.to_string() }),
            EventKind::Register { .. } | EventKind::Interrupt { .. } | EventKind::Note(_) => {}
        }
    }

    /// The faults reported since the last call, as maps.
    pub fn take_faults(&self) -> rhai::Array {
        self.faults.borrow_mut().drain(..).map(|f| Dynamic::from(fault_map(&f))).collect()
    }

    /// The stale reads since the last call, as maps.
    pub fn take_stale(&self) -> rhai::Array {
        let map = |s: StaleRead| {
            let mut m = Map::new();
            m.insert("reader".into(), s.reader.to_string().into());
            m.insert("pa".into(), (s.pa as i64).into());
            m.insert("seen".into(), (s.seen as i64).into());
            m.insert("current".into(), (s.current as i64).into());
            m.insert("missing".into(), format!("{:?}", s.missing).to_lowercase().into());
            m.insert("text".into(), s.to_string().into());
            Dynamic::from(m)
        };
        self.stale.borrow_mut().drain(..).map(map).collect()
    }
}

fn transfer(at: u64, t: &TransactionEvent) -> Item {
    let done = t.error.map_or(t.len, |(n, _)| n);
    let error = t.error.map(|(_, e)| match e {
        DmaFault::Stalled(_) => "stalled".to_string(),
        e => e.to_string(),
    });
    Item::Transfer {
        at_ns: at,
        engine: t.engine.to_string(),
        stream: t.stream.get(),
        access: if t.access == Access::Read { "read".into() } else { "write".into() },
        iova: format!("{:#x}", t.iova),
        len: t.len,
        done,
        error,
    }
}

fn report(fault: &RoutedFault) -> Item {
    let kernel = match &fault.report.detail {
        FaultDetail::SmmuV2Context(c) => c.linux_lines("fd800000.iommu").to_string(),
        FaultDetail::SmmuV2Global(g) => g.linux_lines("fd800000.iommu").to_string(),
        _ => String::new(),
    };
    Item::Report {
        device: fault.name.clone(),
        text: fault.report.to_string(),
        kernel: kernel.lines().map(str::to_string).collect(),
    }
}

fn fault_map(fault: &RoutedFault) -> Map {
    let r = &fault.report;
    let mut m = Map::new();
    let mut put = |key: &str, value: Dynamic| {
        m.insert(key.into(), value);
    };
    put("reason", r.reason.to_string().into());
    put("device", fault.name.clone().map_or(Dynamic::UNIT, Into::into));
    put("stream", r.stream.map_or(Dynamic::UNIT, |s| i64::from(s.get()).into()));
    put("iova", (r.iova.get() as i64).into());
    put("access", r.access.to_string().into());
    put("instruction", r.instruction.into());
    put("privileged", r.privileged.into());
    put("stage", r.stage.map_or(Dynamic::UNIT, |s| i64::from(s).into()));
    put("level", r.level.map_or(Dynamic::UNIT, |s| i64::from(s).into()));
    put("bank", r.bank.map_or(Dynamic::UNIT, |s| i64::from(s).into()));
    put("stalled", r.stalled.into());
    put("text", r.to_string().into());
    m
}
