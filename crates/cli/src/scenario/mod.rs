//! Scenarios: Rhai scripts that boot a board, drive it and say what they expect.
//!
//! [`run`] runs one script. `api` is what scripts can call; [`World`] is what they call it on. Scripts are bounded: a
//! runaway loop ends with an error that names the line.

mod api;
mod reports;
mod vms;
mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use portcullis_board::MachineDescription;
use portcullis_board::sim::Event;
use rhai::{Engine, EvalAltResult, Position};

use crate::output::{Item, Output};
use crate::shipped::Scenario;
pub use reports::stale_item;
pub use world::World;

/// Operations that a script may make; the shipped ones make some thousands.
const MAX_OPERATIONS: u64 = 5_000_000;
/// How long a script may run. It is there for scripts whose single operations are long; no other one notices it.
const MAX_TIME: Duration = Duration::from_secs(60);
/// Calls of a script's functions inside each other.
const MAX_CALLS: usize = 32;

/// What scripts are run with.
#[derive(Clone)]
pub struct Settings {
    /// The board.
    pub description: MachineDescription,
    /// Print the story of every translation.
    pub explain: bool,
    /// Keep all events, for a trace file.
    pub trace: bool,
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
    output: Rc<RefCell<Output>>,
    failures: Cell<u32>,
    checks: Cell<u32>,
    /// The board that was booted last.
    pub world: RefCell<Option<Rc<World>>>,
    /// What happened so far, if it is kept.
    trace: RefCell<Vec<Event>>,
    /// The SMMU driver's report is printed once.
    pub booted: Cell<bool>,
    /// Simulated time at which the current board was booted: its own clock began at 0 then.
    pub epoch: Cell<u64>,
}

impl Context {
    /// Prints an item.
    pub fn emit(&self, item: Item) {
        self.output.borrow_mut().emit(&item);
    }

    /// Counts and prints an expectation of this line of the script.
    pub fn check(&self, ok: bool, text: &str, line: Option<usize>) {
        self.checks.set(self.checks.get() + 1);
        self.failures.set(self.failures.get() + u32::from(!ok));
        self.emit(Item::Check { ok, text: text.into(), line });
    }

    /// Keeps events for the trace file, if there is one.
    pub fn keep(&self, events: Vec<Event>) {
        if self.settings.trace {
            let epoch = self.epoch.get();
            let later = |e: Event| Event { at: e.at.saturating_add(epoch), ..e };
            self.trace.borrow_mut().extend(events.into_iter().map(later));
        }
    }
}

/// Runs one scenario and prints what happens to `output`. Returns how it ended, and the events for a trace file.
pub fn run(scenario: &Scenario, settings: Settings, output: &Rc<RefCell<Output>>) -> (Verdict, Vec<Event>) {
    let context = Rc::new(Context {
        settings,
        output: output.clone(),
        failures: Cell::new(0),
        checks: Cell::new(0),
        world: RefCell::new(None),
        trace: RefCell::new(Vec::new()),
        booted: Cell::new(false),
        epoch: Cell::new(0),
    });
    let (title, about) = scenario.about();
    context.emit(Item::Start { scenario: scenario.name.clone(), title, about });
    let result = engine(&context).run(&scenario.source);
    if let Some(world) = context.world.take() {
        world.drain(&context);
    }
    let verdict = match result {
        Err(mut e) => Verdict::Error(describe(&mut e)),
        Ok(()) if context.failures.get() > 0 => Verdict::Failed(context.failures.get()),
        Ok(()) if context.checks.get() == 0 => Verdict::Error("the script expects nothing".into()),
        Ok(()) => Verdict::Passed,
    };
    let error = match &verdict {
        Verdict::Error(e) => Some(e.clone()),
        Verdict::Passed | Verdict::Failed(_) => None,
    };
    context.emit(Item::End {
        scenario: scenario.name.clone(),
        passed: verdict == Verdict::Passed,
        checks: context.checks.get(),
        failed: context.failures.get(),
        error,
    });
    (verdict, context.trace.take())
}

/// An engine with the API, its limits, and no way to files or standard output.
fn engine(context: &Rc<Context>) -> Engine {
    let mut engine = Engine::new();
    engine.disable_symbol("import").disable_symbol("eval");
    engine.set_max_operations(MAX_OPERATIONS);
    engine.set_max_call_levels(MAX_CALLS);
    engine.set_max_expr_depths(64, 32);
    engine.set_max_string_size(1 << 20);
    engine.set_max_array_size(1 << 16);
    engine.set_max_map_size(1 << 12);
    let end = Instant::now() + MAX_TIME;
    engine.on_progress(move |operations| {
        let late = operations % 256 == 0 && Instant::now() > end;
        late.then(|| format!("the script runs for more than {} seconds", MAX_TIME.as_secs()).into())
    });
    api::register(&mut engine, context);
    engine
}

/// A script error in one line, with the line of the script.
fn describe(error: &mut EvalAltResult) -> String {
    let (error, position) = innermost(error);
    let text = match error {
        EvalAltResult::ErrorRuntime(value, _) | EvalAltResult::ErrorTerminated(value, _) => value.to_string(),
        EvalAltResult::ErrorTooManyOperations(_) => {
            format!("the script makes more than {MAX_OPERATIONS} operations: a loop without an end?")
        }
        EvalAltResult::ErrorStackOverflow(_) => {
            format!("functions call each other more than {MAX_CALLS} deep: a recursion without an end?")
        }
        other => {
            let _ = other.take_position();
            other.to_string()
        }
    };
    let text = text.replace(['\n', '\r'], " ");
    match (position.line(), position.position()) {
        (Some(line), Some(column)) => format!("line {line}, column {column}: {text}"),
        (Some(line), None) => format!("line {line}: {text}"),
        _ => text,
    }
}

/// The error inside of function calls, and the innermost position that is known.
fn innermost(error: &mut EvalAltResult) -> (&mut EvalAltResult, Position) {
    let position = error.position();
    match error {
        EvalAltResult::ErrorInFunctionCall(_, _, inner, _) => {
            let (inner, deeper) = innermost(inner);
            (inner, if deeper.is_none() { position } else { deeper })
        }
        other => (other, position),
    }
}
