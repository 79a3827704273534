//! Scenarios: Rhai scripts that use a booted board and say what they expect.
//!
//! [`run`] runs one script. `api` is what scripts can call; [`World`] is what they call it on. Scripts are bounded: a
//! runaway loop ends with an error that names the line.

mod api;
mod world;

use std::cell::RefCell;
use std::rc::Rc;

use portcullis_board::MachineDescription;
use rhai::{Engine, EvalAltResult};

use crate::output::{Item, Sink};
use crate::shipped::Scenario;
pub use world::World;

/// Operations that a script may make.
const MAX_OPERATIONS: u64 = 50_000_000;

/// What scripts are run with.
#[derive(Clone)]
pub struct Settings {
    /// The board.
    pub description: MachineDescription,
    /// Print the story of every translation.
    pub explain: bool,
    /// Write register accesses down, for a trace file.
    pub registers: bool,
}

/// How a scenario ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every expectation held.
    Passed,
    /// So many expectations did not hold.
    Failed(u32),
    /// The script is wrong, or asked for something that failed.
    Error(String),
}

/// What all API functions share.
pub struct Context {
    pub settings: Settings,
    pub sink: RefCell<Box<dyn Sink>>,
    pub failures: RefCell<u32>,
    pub checks: RefCell<u32>,
    pub world: RefCell<Option<Rc<World>>>,
    pub trace: RefCell<Vec<portcullis_board::sim::Event>>,
    /// The SMMU driver's report is printed once.
    pub booted: std::cell::Cell<bool>,
}

impl Context {
    /// Prints an item.
    pub fn emit(&self, item: Item) {
        self.sink.borrow_mut().emit(&item);
    }
}

/// Runs one scenario; what happens goes to `sink`. Also returns the sink, and the events for a trace file.
pub fn run(
    scenario: &Scenario,
    settings: Settings,
    sink: Box<dyn Sink>,
) -> (Verdict, Box<dyn Sink>, Vec<portcullis_board::sim::Event>) {
    let context = Rc::new(Context {
        settings,
        sink: RefCell::new(sink),
        failures: RefCell::new(0),
        checks: RefCell::new(0),
        world: RefCell::new(None),
        trace: RefCell::new(Vec::new()),
        booted: std::cell::Cell::new(false),
    });
    let (title, about) = scenario.about();
    context.emit(Item::Start { scenario: scenario.name.clone(), title, about });
    let result = {
        let mut engine = Engine::new();
        engine.set_max_operations(MAX_OPERATIONS);
        engine.set_max_call_levels(64);
        engine.set_max_expr_depths(128, 64);
        engine.set_max_string_size(1 << 20);
        engine.set_max_array_size(1 << 16);
        engine.set_max_map_size(1 << 12);
        api::register(&mut engine, &context);
        engine.run(&scenario.source)
    };
    if let Some(world) = context.world.take() {
        world.drain(&context);
    }
    let failures = *context.failures.borrow();
    let verdict = match result {
        Err(e) => Verdict::Error(describe(&e)),
        Ok(()) if failures > 0 => Verdict::Failed(failures),
        Ok(()) if *context.checks.borrow() == 0 => Verdict::Error("the script expects nothing".into()),
        Ok(()) => Verdict::Passed,
    };
    context.emit(Item::End {
        scenario: scenario.name.clone(),
        passed: verdict == Verdict::Passed,
        checks: *context.checks.borrow(),
        failed: failures,
        error: match &verdict {
            Verdict::Error(e) => Some(e.clone()),
            _ => None,
        },
    });
    let trace = context.trace.take();
    // The engine, and with it every closure that held the context, is gone.
    match Rc::try_unwrap(context) {
        Ok(c) => (verdict, c.sink.into_inner(), trace),
        Err(c) => (verdict, c.sink.replace(Box::new(crate::output::Nowhere)), trace),
    }
}

/// A script error in one line, with the line of the script.
fn describe(error: &EvalAltResult) -> String {
    let position = error.position();
    let text = error.to_string();
    match position.line() {
        Some(line) if !text.contains("line ") => format!("line {line}: {text}"),
        _ => text,
    }
}
