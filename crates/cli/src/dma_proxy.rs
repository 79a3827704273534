//! `portcullis dma-proxy-test`: the test program of dma-proxy, on the host of a board or in its virtual machines.
//!
//! Its two arguments are read as the original program reads them, wrong ones included. What comes before them is ours.

use std::sync::Arc;
use std::time::Instant;

use portcullis_board::MachineDescription;
use portcullis_board::guest::own_clock::OwnClock;
use portcullis_board::guest::{Guest, new_vm};
use portcullis_board::os::proxy::LoopClient;
use portcullis_board::sim::{Machine, Options};
use portcullis_board::system::{BootOptions, System};
use portcullis_iommu::DefaultDomain;
use portcullis_proxy::test::{Arguments, Summary, USAGE};
use portcullis_vfio::{AssignOptions, VFIO_DRIVER, Vm};

use crate::shipped::choose;

/// Memory of a virtual machine: two buffers of 3 MiB, descriptors, and room.
const VM_BYTES: u64 = 16 << 20;

/// What was asked for.
#[derive(clap::Args)]
pub struct ProxyTestArguments {
    /// Run it in so many virtual machines (0 to 2), each with an engine of its own, at the same time.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    vms: usize,
    /// Without virtual machines: which proxy of the host, 0 or 1.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    proxy: usize,
    /// A shipped board, or a .dtb or .dts file.
    #[arg(long, default_value = "zynqmp-hp0-2dma")]
    board: String,
    /// Number of transfers, and bytes of each (below 3 MB).
    #[arg(value_name = "TRANSFERS BYTES", trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// A client with what keeps it alive.
struct Program<'a> {
    title: String,
    client: &'a dyn LoopClient,
}

/// Runs it and prints; `Ok(false)` if a byte was wrong or a transfer failed.
///
/// # Errors
/// The board does not have what is needed.
pub fn test(arguments: &ProxyTestArguments) -> Result<bool, String> {
    let words: Vec<&str> = arguments.rest.iter().map(String::as_str).collect();
    let parsed = match Arguments::parse(&words) {
        Ok(parsed) => parsed,
        Err(_) => {
            println!("{USAGE}");
            return Ok(false);
        }
    };
    let chosen = choose(&arguments.board).map_err(|e| e.to_string())?;
    let description = MachineDescription::from_tree(&chosen.tree).map_err(|e| e.to_string())?;
    if description.dma_proxies.is_empty() {
        return Err(format!("{}: no dma-proxy in its tree", arguments.board));
    }
    let options = Options { plain_ports: true, ..Options::default() };
    let text = |e: &dyn std::fmt::Display| format!("{}: {e}", arguments.board);
    let machine = Machine::build(description, options).map_err(|e| text(&e))?;
    // Nobody reads the record of a run that is as long as one likes.
    machine.tracer().mute(true);
    let boot = BootOptions { default_domain: DefaultDomain::Translated, ..BootOptions::default() };
    let system = System::boot(machine, &boot).map_err(|e| text(&e))?;
    match arguments.vms {
        0 => on_host(&system, arguments.proxy, parsed),
        vms @ 1..=2 => in_vms(&system, vms, parsed),
        more => Err(format!("--vms {more}: 0, 1 or 2")),
    }
}

fn on_host(system: &System, number: usize, arguments: Arguments) -> Result<bool, String> {
    let name = format!("dma-proxy{number}");
    let Some(client) = system.os().proxies().get(&name) else {
        return Err(format!("the board has no {name}; it has: {}", system.os().proxies().names().join(", ")));
    };
    run_all(&[Program { title: name, client: &*client }], arguments)
}

fn in_vms(system: &System, vms: usize, arguments: Arguments) -> Result<bool, String> {
    let mut guests = Vec::new();
    for (number, name) in ["A", "B"].into_iter().take(vms).enumerate() {
        guests.push(guest(system, number, name)?);
    }
    let client = |guest: &Guest| guest.cores().first().map(|core| core.proxy.clone());
    let clients: Vec<_> = guests.iter().filter_map(|g| Some((g.vm().name(), client(g)?))).collect();
    let programs: Vec<_> = clients
        .iter()
        .map(|(name, client)| Program { title: format!("machine {name}"), client: &**client })
        .collect();
    run_all(&programs, arguments)
}

/// A machine that has engine `number`, and runs on a thread of its own.
pub fn guest(system: &System, number: usize, name: &str) -> Result<Guest, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (engine, proxy) = (format!("axidma{number}"), format!("dma-proxy{number}"));
    let os = system.os();
    os.registry().unbind(&proxy).map_err(|e| text(&e))?;
    os.registry().unbind(&engine).map_err(|e| text(&e))?;
    os.registry().bind(&engine, VFIO_DRIVER).map_err(|e| text(&e))?;
    let vm = new_vm(system, name, VM_BYTES, number as u64 + 1).map_err(|e| text(&e))?;
    let dynamic: Arc<dyn Vm> = vm.clone();
    let assignment = os.passthrough().assign(&engine, dynamic, AssignOptions::default());
    let assignments = [assignment.map_err(|e| text(&e))?];
    let clock = Arc::new(OwnClock::new(system, &assignments));
    Guest::boot_with(system, &vm, &assignments, clock).map_err(|e| text(&e))
}

/// Each program on a thread of its own; their output comes when they are done.
fn run_all(programs: &[Program<'_>], arguments: Arguments) -> Result<bool, String> {
    let start = Instant::now();
    let run = |program: &Program<'_>| {
        let mut lines = Vec::new();
        let result = program.client.run(arguments, &mut |line| lines.push(line.to_string()));
        (result, lines, start.elapsed().as_secs_f64())
    };
    let run = &run;
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = programs.iter().map(|p| scope.spawn(move || run(p))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| "a program panicked".to_string())).collect()
    });
    let (mut good, mut moved) = (true, 0);
    let seconds = start.elapsed().as_secs_f64();
    for (program, result) in programs.iter().zip(results) {
        let (summary, lines, took) = result?;
        let before = if programs.len() > 1 { format!("{}: ", program.title) } else { String::new() };
        for line in lines {
            println!("{before}{line}");
        }
        let summary: Summary = summary?;
        good &= summary.is_ok();
        moved += summary.moved();
        println!("{before}{}", told(&summary, took));
    }
    if programs.len() > 1 {
        println!("together: {:.1} MB/s", moved as f64 / seconds.max(1e-9) / 1e6);
    }
    Ok(good)
}

fn told(summary: &Summary, seconds: f64) -> String {
    let Summary { transfers, bytes, .. } = *summary;
    let rate = summary.moved() as f64 / seconds.max(1e-9) / 1e6;
    let verdict = if summary.is_ok() {
        "all verified".to_string()
    } else {
        format!(
            "{} tx errors, {} rx errors, {} wrong bytes",
            summary.tx_errors, summary.rx_errors, summary.wrong_bytes
        )
    };
    format!(
        "{transfers} transfers of {bytes} bytes, {verdict}: {rate:.1} MB/s, writing and comparing included"
    )
}
