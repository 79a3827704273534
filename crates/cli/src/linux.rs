//! `portcullis linux`: a board under a real kernel, with the guest's console, our explanations between its lines, and a
//! summary.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use clap::Args;
use portcullis_board::Tree;
use portcullis_board::sim::{Event, Machine, Options, Recording, TransactionEvent};
use portcullis_cosim::guest_tree::Messages;
use portcullis_cosim::linux::{self, GuestFile, Job, Observer, Outcome, Started};
use portcullis_cosim::qemu::{Console, GuestConfig, Kernel, Kit, Qemu};
use portcullis_cosim::session::Summary;
use portcullis_explain::{KernelMessage, parse_log};

use crate::output::human::Human;
use crate::output::perfetto::Trace;
use crate::output::{Item, Output};
use crate::shipped::choose;
use crate::tell::Teller;
use crate::{BadInput, decode};

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GREEN: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Green)));
const RED: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Red)));
const CYAN: Style = Style::new().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Cyan)));

/// What a kernel runs on.
#[derive(Args)]
pub struct GuestArguments {
    /// The QEMU to use (10.1 or newer); by default the kit's, then the one in PATH.
    #[arg(long, value_name = "FILE")]
    pub qemu: Option<PathBuf>,
    /// Processors of the guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub cpus: u32,
    /// MiB of memory of the guest.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(128..=65536))]
    pub memory: u64,
    /// SMMUv3s report by wires only, although the board has them send messages.
    #[arg(long)]
    pub wired: bool,
}

/// The arguments of `portcullis linux`.
#[derive(Args)]
pub struct LinuxArguments {
    /// A shipped board (see `boards`), or a .dtb or .dts file.
    #[arg(long, value_name = "BOARD")]
    pub board: String,
    #[command(flatten)]
    pub guest: GuestArguments,
    /// A kernel of the kit by its name, such as 6.12, or an arm64 kernel image.
    #[arg(long, value_name = "NAME|FILE")]
    pub kernel: Option<String>,
    /// An initial file system instead of the kit's. With it nothing is run in the guest but its own /init, unless a script is
    /// named.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// More for the kernel's command line.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// A shell script to run in the guest instead of the tour (SMMU, groups, dmatest).
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// Verified copies of dmatest per channel in the tour.
    #[arg(long, value_name = "N")]
    pub iterations: Option<u32>,
    /// A shell on the guest's console; Ctrl-A x ends it.
    #[arg(long)]
    pub interactive: bool,
    /// Tell of every transaction and every translation, not of faults only.
    #[arg(long)]
    pub explain: bool,
    /// Write every register access and transaction to a file that Perfetto's viewer opens.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Follow reboots of the guest instead of ending.
    #[arg(long)]
    pub reboot: bool,
    /// End the guest after this many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub limit: Option<u64>,
    /// Do not show the guest's console.
    #[arg(long)]
    pub quiet: bool,
    /// Print the summary as JSON, and nothing else.
    #[arg(long)]
    pub json: bool,
}

impl GuestArguments {
    /// The kit, if it is there; the error says how to get it.
    fn kit() -> Result<Kit, BadInput> {
        let dir =
            Kit::default_dir().ok_or_else(|| BadInput("HOME is not set: where would the kit be?".into()))?;
        Kit::load(&dir).map_err(|e| BadInput(e.to_string()))
    }

    fn config(&self) -> GuestConfig {
        GuestConfig { cpus: self.cpus, memory: self.memory << 20, ..GuestConfig::default() }
    }

    fn tree(&self) -> portcullis_cosim::guest_tree::Options {
        let messages = if self.wired { Messages::Wired } else { Messages::AsBoard };
        portcullis_cosim::guest_tree::Options { messages, ..Default::default() }
    }
}

fn read(path: &Path) -> Result<String, BadInput> {
    std::fs::read_to_string(path).map_err(|e| BadInput(format!("cannot read {}: {e}", path.display())))
}

/// The arguments of `portcullis serve`.
#[derive(Args)]
pub struct ServeArguments {
    /// A shipped board (see `boards`), or a .dtb or .dts file.
    pub board: String,
    #[command(flatten)]
    pub guest: GuestArguments,
    /// Where QEMU connects; the guest's tree and QEMU's control sockets get the same name with more behind it.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The tree that QEMU makes for its machine (`-machine ...,dumpdtb=FILE`), instead of asking a QEMU for it.
    #[arg(long, value_name = "FILE")]
    pub virt: Option<PathBuf>,
    /// Tell of every transaction and every translation, not of faults only.
    #[arg(long)]
    pub explain: bool,
}

/// Serves a board to a QEMU that somebody else starts.
pub fn serve(arguments: &ServeArguments) -> Result<bool, BadInput> {
    let a = arguments;
    let text = |e: &dyn std::fmt::Display| BadInput(e.to_string());
    let board = choose(&a.board)?;
    let virt = match &a.virt {
        Some(path) => Tree::load(path)?,
        None => {
            let kit = GuestArguments::kit();
            let qemu = Qemu::find(a.guest.qemu.as_deref(), kit.as_ref().ok()).map_err(|e| text(&e))?;
            Tree::from_dtb(&qemu.device_tree(&a.guest.config()).map_err(|e| text(&e))?)?
        }
    };
    let sim = Options { recording: Recording { registers: false, explain: a.explain }, ..Options::default() };
    let socket = std::path::absolute(&a.socket).map_err(|e| text(&e))?;
    let served = linux::Served::listen(&board.tree, &virt, a.guest.tree(), sim, a.guest.config(), &socket)
        .map_err(|e| text(&e))?;
    crate::print(&format!(
        "{BOLD}1. start QEMU (10.1 or newer) with these arguments, and your own KERNEL and INITRD{BOLD:#}\n\n\
         qemu-system-aarch64 {}\n\n\
         {BOLD}2. its device tree is in {} and has these additions{BOLD:#}\n\n{}\n\
         {BOLD}3. QEMU waits until the window is placed: that is done from here as soon as it connects{BOLD:#}\n\n\
         waiting at {} (Ctrl-C ends)\n",
        served.arguments(),
        served.device_tree().display(),
        served.fragments(),
        socket.display(),
    ))?;
    let stop = stop_flag()?;
    let mut watcher = Watcher::new(a.explain, true);
    let summary = served
        .serve(&stop, &mut |session, note| {
            if let Some(note) = note {
                watcher.note(&note);
            }
            let (events, lost) = session.take_events();
            if let Some(machine) = session.machine()
                && !events.is_empty()
            {
                watcher.events(machine, &events, lost);
            }
        })
        .map_err(|e| text(&e))?;
    match summary {
        Some(s) => {
            let board = board_summary(&s, watcher.faults, watcher.lost);
            crate::print(&format!("\n{BOLD}summary{BOLD:#} after {:.1} s\n{board}", s.seconds))
        }
        None => crate::print("nobody came\n"),
    }
}

/// Runs a kernel on a board.
pub fn linux(arguments: &LinuxArguments) -> Result<bool, BadInput> {
    let a = arguments;
    let board = choose(&a.board)?;
    // A kernel and an initial file system of one's own need no kit, unless QEMU comes from it.
    let kit = GuestArguments::kit();
    let kernel = kernel(a, kit.as_ref())?;
    let qemu = Qemu::find(a.guest.qemu.as_deref(), kit.as_ref().ok()).map_err(|e| BadInput(e.to_string()))?;

    let mut files = Vec::new();
    if let Some(script) = &a.script {
        files.push(GuestFile::text("run", &read(script)?));
    } else if !a.interactive && a.initrd.is_none() {
        files.push(GuestFile::text("run", linux::TOUR));
    }
    if let Some(n) = a.iterations {
        files.push(GuestFile::text("parameters", &format!("iterations={n}\n")));
    }
    let recording = Recording { registers: a.trace.is_some(), explain: a.explain };
    let job = Job {
        tree: a.guest.tree(),
        sim: Options { recording, ..Options::default() },
        guest: a.guest.config(),
        files,
        append: a.append.clone(),
        console: if a.interactive { Console::Terminal } else { Console::Captured },
        reboot: a.reboot,
        limit: a.limit.map(Duration::from_secs),
        ..Job::new(board.tree, &kernel, "")
    };
    let stop = stop_flag()?;
    let mut watcher = Watcher {
        raw: a.interactive,
        trace: a.trace.as_deref().map(open_trace).transpose()?,
        ..Watcher::new(a.explain, !a.quiet && !a.json)
    };
    let outcome = linux::run(&job, &qemu, &mut watcher, &stop).map_err(|e| BadInput(e.to_string()))?;
    if let Some((path, trace)) = watcher.trace.take() {
        trace.finish().map_err(|e| BadInput(format!("cannot write {}: {e}", path.display())))?;
    }
    let off = outcome.end == linux::End::GuestOff && outcome.marks.panic.is_none();
    let good = if a.files_asked() { outcome.is_good() } else { off };
    if a.json {
        let value = serde_json::json!({
            "good": good,
            "end": format!("{:?}", outcome.end),
            "guest": outcome.marks,
            "board": outcome.summary,
            "faults": watcher.faults,
            "reboots": outcome.reboots,
        });
        crate::print_json(&value)?;
    } else {
        crate::print(&summary(&outcome, watcher.faults, watcher.lost, good))?;
    }
    Ok(good)
}

impl LinuxArguments {
    /// Something was run of which a result is expected.
    fn files_asked(&self) -> bool {
        self.script.is_some() || (!self.interactive && self.initrd.is_none())
    }
}

/// The kernel that was asked for: a file, or one of the kit by its name.
fn kernel(a: &LinuxArguments, kit: Result<&Kit, &BadInput>) -> Result<Kernel, BadInput> {
    let file = a.kernel.as_deref().map(Path::new).filter(|p| p.is_file());
    let of_kit = |name| match kit {
        Ok(kit) => kit.kernel(name).cloned().map_err(|e| BadInput(e.to_string())),
        Err(e) => Err(BadInput(e.0.clone())),
    };
    let mut kernel = match (file, &a.initrd) {
        (Some(image), Some(initrd)) => Kernel {
            name: "own".into(),
            release: String::new(),
            package: String::new(),
            image: image.into(),
            initrd: initrd.clone(),
            tiers: Vec::new(),
        },
        (Some(image), None) => Kernel { image: image.into(), ..of_kit(None)? },
        (None, _) => of_kit(a.kernel.as_deref())?,
    };
    if let Some(initrd) = &a.initrd {
        kernel.initrd = initrd.clone();
    }
    Ok(kernel)
}

/// A flag that Ctrl-C and a polite kill set.
pub fn stop_flag() -> Result<Arc<AtomicBool>, BadInput> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        // The second time ends the process at once.
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())
            .and_then(|_| signal_hook::flag::register(signal, flag.clone()))
            .map_err(|e| BadInput(format!("signals: {e}")))?;
    }
    Ok(flag)
}

type TraceTo<'a> = (&'a Path, Trace<BufWriter<File>>);

fn open_trace(path: &Path) -> Result<TraceTo<'_>, BadInput> {
    let failed = |e: io::Error| BadInput(format!("cannot write {}: {e}", path.display()));
    let mut trace = Trace::new(BufWriter::new(File::create(path).map_err(failed)?)).map_err(failed)?;
    trace.begin("guest").map_err(failed)?;
    Ok((path, trace))
}

/// Shows what happens.
struct Watcher<'a> {
    shown: bool,
    /// The console goes to the terminal as it is.
    raw: bool,
    explain: bool,
    line: Vec<u8>,
    /// Lines of the SMMU's driver that belong together.
    log: String,
    output: Output,
    trace: Option<TraceTo<'a>>,
    faults: u64,
    lost: u64,
}

/// Longest line that is looked at.
const MAX_LINE: usize = 4096;

impl Watcher<'_> {
    fn new(explain: bool, shown: bool) -> Self {
        Self {
            shown,
            raw: false,
            explain,
            line: Vec::new(),
            log: String::new(),
            output: Output::new(Box::new(Human::new(explain))),
            trace: None,
            faults: 0,
            lost: 0,
        }
    }

    fn say(&mut self, style: Style, text: &str) {
        if self.shown {
            let mut out = anstream::stdout().lock();
            let _ = writeln!(out, "{style}{text}{style:#}");
        }
    }

    fn console_line(&mut self, line: &str) {
        self.say(DIM, &format!("| {}", line.trim_end()));
        // What the kernel says about SMMUs, in words, as soon as another line follows.
        if line.contains("arm-smmu") {
            self.log += line;
            self.log.push('\n');
        } else {
            self.explain_log();
        }
    }

    fn explain_log(&mut self) {
        if self.log.is_empty() {
            return;
        }
        let log = std::mem::take(&mut self.log);
        let mut lines = parse_log(&log);
        lines.retain(|l| !matches!(l.message, KernelMessage::Word { .. }));
        if !lines.is_empty() {
            // The fields one by one are for `portcullis decode`.
            let text = decode::text(&lines);
            let sentences: Vec<&str> = text.lines().filter(|l| self.explain || !l.starts_with(' ')).collect();
            self.say(CYAN, &format!("  the kernel says: {}", sentences.join("\n  ")));
        }
    }
}

impl Observer for Watcher<'_> {
    fn started(&mut self, started: &Started<'_>) {
        let tree = started.tree;
        self.say(BOLD, &format!("QEMU {}: {}", started.qemu.version, started.qemu.program.display()));
        let (base, size) = (tree.window.base, tree.window.size);
        self.say(
            Style::new(),
            &format!("registers of the board in the guest: {base:#x}, {} KiB", size >> 10),
        );
        for placed in &tree.placed {
            let irqs: Vec<String> = placed.interrupts.iter().map(|(_, guest)| guest.to_string()).collect();
            let irqs = if irqs.is_empty() { String::new() } else { format!(", SPI {}", shorten(&irqs)) };
            self.say(
                Style::new(),
                &format!("  {:<12} {:#x} (board {:#x}){irqs}", placed.name, placed.base, placed.board_base),
            );
        }
        for function in &tree.pci {
            self.say(Style::new(), &format!("  {:<12} PCI 00:{:02x}.0", function.name, function.slot));
        }
        for left in &tree.left_out {
            self.say(DIM, &format!("  left out: {}: {}", left.path, left.reason));
        }
    }

    fn console(&mut self, bytes: &[u8]) {
        if self.raw {
            let mut out = io::stdout().lock();
            let _ = out.write_all(bytes).and_then(|()| out.flush());
            return;
        }
        for &b in bytes {
            if b == b'\n' {
                let line = std::mem::take(&mut self.line);
                let line = String::from_utf8_lossy(&line).into_owned();
                self.console_line(&line);
            } else if self.line.len() < MAX_LINE {
                self.line.push(b);
            }
        }
    }

    fn events(&mut self, machine: &Machine, events: &[Event], lost: u64) {
        self.lost += lost;
        if let Some((path, trace)) = &mut self.trace
            && let Err(e) = trace.more(events)
        {
            let text = format!("cannot write {}: {e}", path.display());
            self.trace = None;
            self.say(RED, &text);
        }
        let teller = Teller { machine, epoch: 0, unmapped: &|_: &TransactionEvent| Vec::new() };
        let (explain, shown) = (self.explain, self.shown && !self.raw);
        let (output, faults) = (&mut self.output, &mut self.faults);
        let mut transfer = None;
        teller.events(events, &mut |item| {
            let fault = matches!(item, Item::Fault { .. });
            *faults += u64::from(fault);
            match item {
                // Shown if something is wrong with it.
                Item::Transfer { .. } if !explain => transfer = Some(item),
                Item::Message { .. } | Item::Ats { .. } if !explain => {}
                item if shown => {
                    if fault && let Some(transfer) = transfer.take() {
                        output.emit(&transfer);
                    }
                    output.emit(&item);
                }
                _ => {}
            }
        });
    }

    fn note(&mut self, text: &str) {
        if !self.raw {
            self.say(BOLD, text);
        }
    }
}

/// A row of numbers, of which many are the same.
fn shorten(words: &[String]) -> String {
    match words {
        [first, rest @ ..] if rest.len() > 1 && rest.iter().all(|w| w == first) => {
            format!("{first} ({} times)", words.len())
        }
        _ => words.join(" "),
    }
}

fn summary(outcome: &Outcome, faults: u64, lost: u64, good: bool) -> String {
    let mut text = String::new();
    let marks = &outcome.marks;
    text += &format!("\n{BOLD}summary{BOLD:#}\n");
    if let Some(release) = &marks.release {
        text += &format!("  kernel {release}, up after {} s\n", marks.up.as_deref().unwrap_or("?"));
    }
    text += &board_summary(&outcome.summary, faults, lost);
    for mark in &marks.marks {
        let (style, word) = if mark.pass { (GREEN, "pass") } else { (RED, "FAIL") };
        text += &format!("  {style}{word}{style:#} {:<16} {}\n", mark.name, mark.text);
    }
    if outcome.reboots > 0 {
        text += &format!("  {} reboots of the guest were followed\n", outcome.reboots);
    }
    let end = match outcome.end {
        linux::End::GuestOff if marks.panic.is_some() => {
            format!("the guest's kernel panicked: {}", marks.panic.as_deref().unwrap_or_default())
        }
        linux::End::GuestOff => match marks.done {
            Some(0) => "the guest's script ended well and powered off".into(),
            Some(n) => format!("the guest's script ended with status {n}"),
            None => "the guest is off".into(),
        },
        linux::End::Qemu(status) => format!("QEMU ended: {status}"),
        linux::End::Limit => "the time was over, QEMU was ended".into(),
        linux::End::Asked => "ended as asked".into(),
    };
    let style = if good { GREEN } else { RED };
    text += &format!("{style}{end}, after {:.1} s{style:#}\n", outcome.summary.seconds);
    if !good {
        for line in outcome.stderr.iter().rev().take(5).rev() {
            text += &format!("  QEMU: {line}\n");
        }
    }
    text
}

/// What the board saw.
fn board_summary(s: &Summary, faults: u64, lost: u64) -> String {
    let mut text = String::new();
    for d in s.devices.iter().filter(|d| d.reads + d.writes > 0) {
        let refused = if d.refused > 0 { format!(", {} refused", d.refused) } else { String::new() };
        text += &format!(
            "  {:<12} {} registers touched: {} reads, {} writes{refused}\n",
            d.name, d.registers, d.reads, d.writes
        );
    }
    if !s.commands.is_empty() {
        let all: u64 = s.commands.iter().map(|(_, n)| n).sum();
        let list: Vec<String> = s.commands.iter().map(|(name, n)| format!("{name} {n}")).collect();
        text += &format!("  {all} commands: {}\n", list.join(", "));
    }
    for e in &s.engines {
        let rate = e.hit_rate().map_or("nothing translated".into(), |r| {
            format!("{} translations, {:.1} % of them TLB hits", e.hits + e.walks, 100.0 * r)
        });
        let errors = if e.errors > 0 { format!(", {} refused", e.errors) } else { String::new() };
        text += &format!(
            "  {:<12} stream {:#x}: {} transactions, {} KiB, {rate}{errors}\n",
            e.engine,
            e.stream,
            e.transactions,
            e.bytes >> 10
        );
    }
    let irqs: Vec<String> = s.interrupts.lines.iter().map(|(line, n)| format!("SPI {line} {n}")).collect();
    text += &format!(
        "  interrupts: {}{}{} messages\n",
        irqs.join(", "),
        if irqs.is_empty() { "" } else { ", " },
        s.interrupts.messages
    );
    text += &format!("  faults explained: {faults}\n");
    if s.outside > 0 {
        text += &format!("  {} accesses to the window where no device is\n", s.outside);
    }
    if lost + s.interrupts.lost > 0 {
        text += &format!("  {lost} events were not kept, {} messages lost\n", s.interrupts.lost);
    }
    text
}
