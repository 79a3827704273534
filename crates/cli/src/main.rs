//! The `portcullis` command line: boards, their scenarios, reports, and the bench.
//!
//! Exit codes: 0 all well, 1 a scenario failed, 2 the command or its input is wrong.
#![forbid(unsafe_code)]

mod bench;
mod output;
mod scenario;
mod shipped;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use portcullis_board::{MachineDescription, TreeError, protect_overlay, report};
use serde::Serialize;

use crate::output::human::Human;
use crate::output::json::Json;
use crate::output::perfetto::Trace;
use crate::output::{Item, Sink};
use crate::scenario::{Settings, Verdict};
use crate::shipped::{BOARDS, ChooseError, choose};

/// DMA isolation, runnable: SMMUs, DMA engines, their drivers, and every translation explained.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a board's scenarios and show every step, transfer and fault.
    Run {
        /// A shipped board (see `boards`), or a .dtb or .dts file.
        board: String,
        /// Names of scenarios, or .rhai files; all of the board's if there are none.
        scenarios: Vec<String>,
        /// Put a node behind the SMMU first (path, label or name); may be repeated.
        #[arg(long, value_name = "NODE")]
        protect: Vec<String>,
        /// Print one JSON object a line.
        #[arg(long)]
        json: bool,
        /// Print the story of every translation: each register and descriptor read, and the rule applied.
        #[arg(long)]
        explain: bool,
        /// Write every register access and transaction to a file that Perfetto's viewer opens.
        #[arg(long, value_name = "FILE")]
        trace: Option<std::path::PathBuf>,
    },
    /// List the shipped boards.
    Boards {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List a board's scenarios.
    Scenarios {
        /// A shipped board, or a .dtb or .dts file.
        board: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say what a device tree describes: memory, SMMUs, DMA engines, the stream ids of its masters, findings.
    Machine {
        /// A shipped board, or a .dtb or .dts file.
        board: String,
        /// Print the overlay that puts a master behind the SMMU instead (path, label or name).
        #[arg(long, value_name = "NODE")]
        protect: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Measure the performance goals.
    Bench {
        /// Only groups whose name contains this.
        filter: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A wrong command or input, in one message.
struct BadInput(String);

impl From<ChooseError> for BadInput {
    fn from(e: ChooseError) -> Self {
        Self(e.to_string())
    }
}

impl From<TreeError> for BadInput {
    fn from(e: TreeError) -> Self {
        Self(e.to_string())
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run { board, scenarios, protect, json, explain, trace } => {
            run(&board, &scenarios, &protect, json, explain, trace.as_deref())
        }
        Command::Boards { json } => boards(json),
        Command::Scenarios { board, json } => scenarios(&board, json),
        Command::Machine { board, protect, json } => machine(&board, protect.as_deref(), json),
        Command::Bench { filter, json } => bench(filter.as_deref().unwrap_or(""), json),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(BadInput(message)) => {
            anstream::eprintln!("portcullis: {message}");
            ExitCode::from(2)
        }
    }
}

fn print_json(value: &impl Serialize) -> Result<bool, BadInput> {
    let text = serde_json::to_string_pretty(value).map_err(|e| BadInput(e.to_string()))?;
    anstream::println!("{text}");
    Ok(true)
}

fn run(
    board: &str,
    names: &[String],
    protect: &[String],
    json: bool,
    explain: bool,
    trace_file: Option<&std::path::Path>,
) -> Result<bool, BadInput> {
    let mut chosen = choose(board)?;
    for node in protect {
        chosen.tree = portcullis_board::apply_protect(&chosen.tree, node)?;
    }
    let scenarios = chosen.select(names)?;
    if scenarios.is_empty() {
        return Err(BadInput(format!("{board} has no scenarios; name a .rhai file")));
    }
    let description = MachineDescription::from_tree(&chosen.tree)?;
    // Open it before the work, so that a path that cannot be written is known at once.
    let file = match trace_file {
        Some(path) => {
            let file =
                std::fs::File::create(path).map_err(|e| BadInput(format!("{}: {e}", path.display())))?;
            Some((path, file))
        }
        None => None,
    };
    let mut sink: Box<dyn Sink> = if json { Box::new(Json) } else { Box::new(Human::default()) };
    let mut trace = Trace::default();
    let (mut passed, mut failed) = (0, Vec::new());
    for scenario in &scenarios {
        let settings = Settings { description: description.clone(), explain, registers: file.is_some() };
        let (verdict, back, events) = scenario::run(scenario, settings, sink);
        sink = back;
        if file.is_some() {
            trace.add(&scenario.name, &events);
        }
        match verdict {
            Verdict::Passed => passed += 1,
            Verdict::Failed(_) | Verdict::Error(_) => failed.push(scenario.name.clone()),
        }
    }
    let good = failed.is_empty();
    sink.emit(&Item::Summary { board: chosen.name, passed, failed });
    if let Some((path, mut file)) = file {
        use std::io::Write as _;
        let written = file.write_all(trace.finish().as_bytes());
        written.map_err(|e| BadInput(format!("{}: {e}", path.display())))?;
    }
    Ok(good)
}

fn boards(json: bool) -> Result<bool, BadInput> {
    let mut list = Vec::new();
    for board in BOARDS {
        let chosen = choose(board.name)?;
        let description = MachineDescription::from_tree(&chosen.tree)?;
        list.push(serde_json::json!({
            "name": board.name,
            "model": description.model,
            "scenarios": board.scenarios.len(),
        }));
        if !json {
            let n = board.scenarios.len();
            anstream::println!("{:<20} {} ({n} scenarios)", board.name, description.model);
        }
    }
    if json { print_json(&list) } else { Ok(true) }
}

fn scenarios(board: &str, json: bool) -> Result<bool, BadInput> {
    let chosen = choose(board)?;
    let about = |s: &shipped::Scenario| {
        let (title, about) = s.about();
        serde_json::json!({ "name": s.name, "title": title, "about": about })
    };
    if json {
        return print_json(&chosen.scenarios.iter().map(about).collect::<Vec<_>>());
    }
    for s in &chosen.scenarios {
        anstream::println!("{:<20} {}", s.name, s.about().0);
    }
    Ok(true)
}

fn machine(board: &str, protect: Option<&str>, json: bool) -> Result<bool, BadInput> {
    let chosen = choose(board)?;
    let description = MachineDescription::from_tree(&chosen.tree)?;
    if let Some(node) = protect {
        let overlay = protect_overlay(&description, node)?;
        if json {
            return print_json(&serde_json::json!({ "overlay": overlay }));
        }
        anstream::print!("{overlay}");
        return Ok(true);
    }
    let report = report::report(&description);
    if json {
        return print_json(&report);
    }
    anstream::print!("{report}");
    Ok(true)
}

fn bench(filter: &str, json: bool) -> Result<bool, BadInput> {
    if !bench::names().any(|n| n.contains(filter)) {
        let names: Vec<_> = bench::names().collect();
        return Err(BadInput(format!(
            "no bench has {filter:?} in its name; there are: {}",
            names.join(", ")
        )));
    }
    let figures = bench::run(filter);
    if json {
        return print_json(&figures);
    }
    anstream::print!("{}", bench::table(&figures));
    Ok(true)
}
