//! The `portcullis` command line: boards, their scenarios, reports, and the bench.
//!
//! Exit codes: 0 all well, 1 a scenario failed, 2 the command or its input is wrong.
#![forbid(unsafe_code)]

mod bench;
mod decode;
mod dma_proxy;
mod linux;
mod output;
mod scenario;
mod shipped;
mod tell;

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Parser, Subcommand};
use portcullis_board::sim::{Event, Machine, Options};
use portcullis_board::{MachineDescription, TreeError, protect_overlay, report};
use serde::Serialize;

use crate::output::human::Human;
use crate::output::json::Json;
use crate::output::perfetto::Trace;
use crate::output::{Item, Output, Sink};
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
        trace: Option<PathBuf>,
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
    /// Say what the lines of a kernel log about SMMUs mean: arm-smmu context and global faults, arm-smmu-v3 events (four
    /// raw words are enough), command errors, global errors, page requests.
    Decode {
        /// The log; standard input if there is none.
        file: Option<PathBuf>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Boot a real kernel in QEMU on a board: its own drivers program our SMMUs and engines. Needs what scripts/linux-kit
    /// fetches.
    Linux(linux::LinuxArguments),
    /// Serve a board to a QEMU that you start yourself, and print the arguments and device tree to start it with.
    Serve(linux::ServeArguments),
    /// The test program of dma-proxy: sends so many transfers of so many bytes through an AXI DMA's loop and compares every byte;
    /// on the host or in virtual machines.
    DmaProxyTest(dma_proxy::ProxyTestArguments),
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
        Command::Decode { file, json } => decode(file.as_deref(), json),
        Command::Linux(arguments) => linux::linux(&arguments),
        Command::Serve(arguments) => linux::serve(&arguments),
        Command::DmaProxyTest(arguments) => dma_proxy::test(&arguments).map_err(BadInput),
        Command::Bench { filter, json } => bench(filter.as_deref().unwrap_or(""), json),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(BadInput(message)) => {
            // If standard error cannot be written either, the exit code has to do.
            let _ = writeln!(anstream::stderr(), "portcullis: {message}");
            ExitCode::from(2)
        }
    }
}

/// The result of writing to standard output. A closed pipe is no error: whoever closed it has seen enough.
fn printed(result: io::Result<()>) -> Result<(), BadInput> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(BadInput(format!("standard output: {e}"))),
        _ => Ok(()),
    }
}

fn print(text: &str) -> Result<bool, BadInput> {
    let mut out = anstream::stdout().lock();
    printed(out.write_all(text.as_bytes()).and_then(|()| out.flush()))?;
    Ok(true)
}

fn print_json(value: &impl Serialize) -> Result<bool, BadInput> {
    let text = serde_json::to_string_pretty(value).map_err(|e| BadInput(e.to_string()))?;
    print(&(text + "\n"))
}

fn run(
    board: &str,
    names: &[String],
    protect: &[String],
    json: bool,
    explain: bool,
    trace_file: Option<&Path>,
) -> Result<bool, BadInput> {
    let mut chosen = choose(board)?;
    for node in protect {
        chosen.tree = portcullis_board::apply_protect(&chosen.tree, node)?;
    }
    let scenarios = chosen.select(names)?;
    if scenarios.is_empty() {
        return Err(BadInput(format!("{board} has no scenarios of its own; name a .rhai file")));
    }
    let description = MachineDescription::from_tree(&chosen.tree)?;
    // A board that cannot be built is bad input, not a scenario that fails.
    Machine::build(description.clone(), Options::default()).map_err(|e| BadInput(format!("{board}: {e}")))?;
    let settings = Settings { description, explain, trace: trace_file.is_some() };
    // Opened before the work, so that a path that cannot be written is known at once.
    let mut trace = trace_file.map(TraceFile::create).transpose()?;

    let sink: Box<dyn Sink> = if json { Box::new(Json) } else { Box::new(Human::new(explain)) };
    let output = Rc::new(RefCell::new(Output::new(sink)));
    let (mut passed, mut failed) = (0, Vec::new());
    for scenario in &scenarios {
        let (verdict, events) = scenario::run(scenario, settings.clone(), &output);
        if let Some(trace) = &mut trace {
            trace.add(&scenario.name, &events)?;
        }
        match verdict {
            Verdict::Passed => passed += 1,
            Verdict::Failed(_) | Verdict::Error(_) => failed.push(scenario.name.clone()),
        }
    }
    let good = failed.is_empty();
    output.borrow_mut().emit(&Item::Summary { board: chosen.name, passed, failed });
    if let Some(trace) = trace {
        trace.finish()?;
    }
    let result = output.borrow_mut().finish();
    printed(result)?;
    Ok(good)
}

/// A trace with the name of its file, for messages.
struct TraceFile<'a> {
    path: &'a Path,
    trace: Trace<BufWriter<File>>,
}

impl<'a> TraceFile<'a> {
    fn create(path: &'a Path) -> Result<Self, BadInput> {
        let file = File::create(path).map_err(|e| Self::failed(path, e))?;
        let trace = Trace::new(BufWriter::new(file)).map_err(|e| Self::failed(path, e))?;
        Ok(Self { path, trace })
    }

    fn failed(path: &Path, error: io::Error) -> BadInput {
        BadInput(format!("cannot write {}: {error}", path.display()))
    }

    fn add(&mut self, scenario: &str, events: &[Event]) -> Result<(), BadInput> {
        self.trace.add(scenario, events).map_err(|e| Self::failed(self.path, e))
    }

    fn finish(self) -> Result<(), BadInput> {
        self.trace.finish().map(|_| ()).map_err(|e| Self::failed(self.path, e))
    }
}

fn boards(json: bool) -> Result<bool, BadInput> {
    let (mut list, mut text) = (Vec::new(), String::new());
    for board in BOARDS {
        let chosen = choose(board.name)?;
        let description = MachineDescription::from_tree(&chosen.tree)?;
        let scenarios = board.scenarios.len();
        text += &format!(
            "{:<20} {} ({scenarios} scenario{})\n",
            board.name,
            description.model,
            if scenarios == 1 { "" } else { "s" }
        );
        list.push(serde_json::json!({
            "name": board.name,
            "tree": board.tree,
            "model": description.model,
            "scenarios": scenarios,
        }));
    }
    if json { print_json(&list) } else { print(&text) }
}

fn scenarios(board: &str, json: bool) -> Result<bool, BadInput> {
    let chosen = choose(board)?;
    let (mut list, mut text) = (Vec::new(), String::new());
    for s in &chosen.scenarios {
        let (title, about) = s.about();
        text += &format!("{:<20} {title}\n", s.name);
        list.push(serde_json::json!({ "name": s.name, "title": title, "about": about }));
    }
    if json { print_json(&list) } else { print(&text) }
}

fn machine(board: &str, protect: Option<&str>, json: bool) -> Result<bool, BadInput> {
    let chosen = choose(board)?;
    let description = MachineDescription::from_tree(&chosen.tree)?;
    if let Some(node) = protect {
        let overlay = protect_overlay(&description, node)?;
        return if json { print_json(&serde_json::json!({ "overlay": overlay })) } else { print(&overlay) };
    }
    let report = report::report(&description);
    if json { print_json(&report) } else { print(&report.to_string()) }
}

fn decode(file: Option<&Path>, json: bool) -> Result<bool, BadInput> {
    let lines = decode::decode(&decode::read(file).map_err(BadInput)?);
    if json {
        return print_json(&lines);
    }
    if lines.is_empty() {
        return print("no line of this log is about a fault of an SMMU\n");
    }
    print(&decode::text(&lines))
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
    if json { print_json(&figures) } else { print(&bench::table(&figures)) }
}
