//! Guests for tests with real kernels: the kit, at most two guests at a time, what a guest and its board said.
//!
//! A job (`jobs/*.sh`) prints sections (`portcullis: begin <name>` ... `portcullis: end <name>`), such as the kernel's log,
//! and marks. Where it is to hold still while somebody looks at the machine, it writes a number into a register of a DMA
//! channel that nobody uses, the mailbox, and waits until it reads 0 there; [`Guest::look`] is called with that number.

#![allow(dead_code)] // Each test binary uses a part of it.

pub mod faults;
pub mod log;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex, Once};
use std::time::{Duration, Instant};

use portcullis_arch::zdma;
use portcullis_board::Tree;
use portcullis_board::sim::{EngineKind, EngineSlot, Event, EventKind, Machine};
use portcullis_cosim::guest_tree::Messages;
use portcullis_cosim::linux::{self, GuestFile, Job, Look, Observer, Outcome};
use portcullis_cosim::qemu::{Kernel, Kit, Qemu, Tier};

use faults::Fault;
use log::{Interrupts, Record};

/// What all jobs source.
const COMMON: &str = include_str!("../../jobs/common.sh");
/// Guests at a time.
const GUESTS: usize = 2;
/// Longest time for a guest; one takes about ten seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(240);
/// The channel (from 0, by address) whose register is the mailbox.
const MAILBOX: usize = 2;
const CONSOLE_SHOWN: usize = 6000;

/// The kernels of a tier, and the QEMU to run them.
pub struct Kernels {
    pub qemu: Qemu,
    pub kernels: Vec<Kernel>,
}

/// A line that is shown although the test passes.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The kernels of the kit that have this tier. Without them: one clear line and `None`, or a failure if
/// PORTCULLIS_NEED_LINUX_KIT is set to 1.
pub fn kernels(tier: Tier) -> Option<Kernels> {
    static ONCE: Once = Once::new();
    let found = Kit::default_dir().ok_or_else(|| "HOME is not set, so there is no kit".to_string());
    let found = found.and_then(|dir| Kit::load(&dir).map_err(|e| e.to_string())).and_then(|kit| {
        let qemu = Qemu::find(None, Some(&kit)).map_err(|e| e.to_string())?;
        let all: Vec<Kernel> = kit.kernels().to_vec();
        let kernels: Vec<Kernel> = all.iter().filter(|k| k.tiers.contains(&tier)).cloned().collect();
        // A kernel of one's own has neither tier; one of Debian's has both.
        let lacking: Vec<&str> = all
            .iter()
            .filter(|k| !k.tiers.contains(&tier) && !k.tiers.contains(&Tier::C))
            .map(|k| k.name.as_str())
            .collect();
        if kernels.is_empty() || (needed() && !lacking.is_empty()) {
            let which = if lacking.is_empty() { "no kernel".into() } else { lacking.join(", ") };
            return Err(format!(
                "the kit in {} lacks tier {tier:?} ({which}): run scripts/linux-kit",
                kit.dir().display()
            ));
        }
        Ok(Kernels { qemu, kernels })
    });
    match found {
        Ok(kernels) => Some(kernels),
        Err(why) if needed() => panic!("PORTCULLIS_NEED_LINUX_KIT is set: {why}"),
        Err(why) => {
            ONCE.call_once(|| say(&format!("SKIPPED: tests with real kernels (tier {tier:?}): {why}")));
            None
        }
    }
}

fn needed() -> bool {
    std::env::var_os("PORTCULLIS_NEED_LINUX_KIT").is_some_and(|v| v == "1")
}

/// The right to run a guest.
struct Permit;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Permit {
    fn new() -> Self {
        let mut running = RUNNING.lock().unwrap_or_else(|e| e.into_inner());
        while *running >= GUESTS {
            running = ENDED.wait(running).unwrap_or_else(|e| e.into_inner());
        }
        *running += 1;
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(|e| e.into_inner()) -= 1;
        ENDED.notify_one();
    }
}

/// Kernels from this version on attach every master to a domain when its SMMU registers; older ones when a driver binds.
pub const EAGER: (u32, u32) = (6, 15);

/// The machine of a guest that holds still.
pub struct Seen<'a> {
    pub machine: &'a Machine,
    /// The kernel's version.
    pub kernel: (u32, u32),
    /// The number that the job gave.
    pub number: u32,
}

/// A guest to be run.
#[derive(Clone, Copy)]
pub struct Guest<'a> {
    pub board: &'a str,
    pub script: &'a str,
    /// Shell assignments for the script.
    pub parameters: &'a str,
    pub append: &'a str,
    pub cpus: u32,
    pub messages: Messages,
    /// Changes the board before it is used.
    pub edit: &'a (dyn Fn(Tree) -> Tree + Sync),
    /// Looks at the machine while the guest holds still.
    pub look: &'a (dyn Fn(&Seen<'_>) + Sync),
}

impl Default for Guest<'_> {
    fn default() -> Self {
        Self {
            board: "smmuv3",
            script: "",
            parameters: "",
            append: "",
            cpus: 1,
            messages: Messages::AsBoard,
            edit: &|board| board,
            look: &|_| {},
        }
    }
}

/// What a guest and its board said.
pub struct Report {
    pub kernel: Kernel,
    pub outcome: Outcome,
    pub console: String,
    /// Transactions that the IOMMU refused, in their order.
    pub faults: Vec<Fault>,
    /// Transactions of which nobody was told because there were too many.
    pub lost: u64,
    /// How often the guest held still.
    pub held: u32,
    pub took: Duration,
}

impl Guest<'_> {
    /// Runs it on every kernel, two at a time, and gives each report to `check`. Fails if a guest did not come to its end
    /// with every mark passed.
    pub fn on_every_kernel(&self, tier: Tier, name: &str, check: impl Fn(&Report) + Sync) {
        let Some(found) = kernels(tier) else { return };
        self.on(&found.kernels, &found.qemu, name, check);
    }

    /// The same on the kernel with this number among those of the tier; the newest is the last.
    pub fn on_kernel(&self, which: Which, tier: Tier, name: &str, check: impl Fn(&Report) + Sync) {
        let Some(mut found) = kernels(tier) else { return };
        found.kernels.sort_by_key(|k| log::version(&k.release));
        let one = match which {
            Which::Oldest => found.kernels.first(),
            Which::Newest => found.kernels.last(),
        };
        let one: Vec<Kernel> = one.into_iter().cloned().collect();
        self.on(&one, &found.qemu, name, check);
    }

    fn on(&self, kernels: &[Kernel], qemu: &Qemu, name: &str, check: impl Fn(&Report) + Sync) {
        std::thread::scope(|scope| {
            for kernel in kernels {
                let check = &check;
                let thread =
                    std::thread::Builder::new().name(format!("{name}, {} on {}", kernel.name, self.board));
                thread
                    .spawn_scoped(scope, move || {
                        let report = self.run(kernel, qemu);
                        say(&format!(
                            "{name}: {} on {}, {} CPUs: {:.1} s",
                            kernel.name,
                            self.board,
                            self.cpus,
                            report.took.as_secs_f64()
                        ));
                        let shown = Shown(&report);
                        assert!(
                            report.outcome.is_good(),
                            "{:?}: {:#?}",
                            report.outcome.end,
                            report.outcome.marks
                        );
                        assert_eq!(report.lost, 0, "events were lost");
                        check(&report);
                        drop(shown);
                    })
                    .unwrap();
            }
        });
    }

    fn run(&self, kernel: &Kernel, qemu: &Qemu) -> Report {
        let _permit = Permit::new();
        let begun = Instant::now();
        let board =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../boards/{}.dtb", self.board));
        let mut job = Job::new((self.edit)(Tree::load(board).unwrap()), kernel, self.script);
        job.files.push(GuestFile::text("common.sh", COMMON));
        job.files.push(GuestFile::text("parameters", self.parameters));
        job.tree.messages = self.messages;
        job.guest.cpus = self.cpus;
        // Words of the kernel would come in the middle of ours.
        job.append = format!("quiet {}", self.append);
        job.limit = Some(LIMIT);
        let kernel_version = log::version(&kernel.release);
        let mut watcher = Watcher {
            guest: self,
            kernel: kernel_version,
            console: Vec::new(),
            faults: Vec::new(),
            lost: 0,
            held: 0,
        };
        let outcome = linux::run(&job, qemu, &mut watcher, &AtomicBool::new(false));
        let console = String::from_utf8_lossy(&watcher.console).replace('\r', "");
        let outcome = outcome.unwrap_or_else(|error| panic!("{error}\n{}", tail(&console)));
        Report {
            kernel: kernel.clone(),
            outcome,
            console,
            faults: watcher.faults,
            lost: watcher.lost,
            held: watcher.held,
            took: begun.elapsed(),
        }
    }
}

/// Which of several kernels.
#[derive(Clone, Copy, Debug)]
pub enum Which {
    Oldest,
    Newest,
}

/// Shows the console if a check fails.
struct Shown<'a>(&'a Report);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let name = std::thread::current();
            say(&format!("--- {}, its console:\n{}\n---", name.name().unwrap_or("?"), tail(&self.0.console)));
        }
    }
}

fn tail(text: &str) -> &str {
    let mut from = text.len().saturating_sub(CONSOLE_SHOWN);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text.get(from..).unwrap_or_default()
}

struct Watcher<'a> {
    guest: &'a Guest<'a>,
    kernel: (u32, u32),
    console: Vec<u8>,
    faults: Vec<Fault>,
    lost: u64,
    held: u32,
}

/// The DMA channels, by the addresses of their registers.
pub fn channels(machine: &Machine) -> Vec<&EngineSlot> {
    let zdma = |e: &&EngineSlot| matches!(e.engine, EngineKind::Zdma(_));
    let mut channels: Vec<&EngineSlot> = machine.engines().iter().filter(zdma).collect();
    channels.sort_by_key(|e| e.base);
    channels
}

impl Observer for Watcher<'_> {
    fn console(&mut self, bytes: &[u8]) {
        self.console.extend(bytes);
    }
    fn events(&mut self, machine: &Machine, events: &[Event], lost: u64) {
        self.lost += lost;
        for event in events {
            if let EventKind::Transaction(t) = &event.kind {
                self.faults.extend(Fault::of(machine, t));
            }
        }
    }
    fn tick(&mut self, look: &mut Look<'_>) -> bool {
        let Some(machine) = look.session.machine() else { return true };
        let channels = channels(machine);
        let Some(mailbox) = channels.get(MAILBOX) else { return true };
        let (registers, at) = (mailbox.mmio(), u64::from(zdma::reg::SRC_DSCR_WORD0));
        let number = registers.read32(at).unwrap();
        // Until the guest has written there is what was there after reset.
        if number >> 16 == 0x4c00 {
            self.held += 1;
            (self.guest.look)(&Seen { machine, kernel: self.kernel, number: number & 0xffff });
            registers.write32(at, 0).unwrap();
        }
        true
    }
}

impl Report {
    /// Which kernel it was, as two numbers.
    pub fn version(&self) -> (u32, u32) {
        log::version(&self.kernel.release)
    }

    /// The lines of a section.
    pub fn section(&self, name: &str) -> Vec<&str> {
        let (begin, end) = (format!("portcullis: begin {name}"), format!("portcullis: end {name}"));
        let mut lines = self.console.lines().skip_while(|l| l.trim_end() != begin);
        assert!(lines.next().is_some(), "the guest has no section {name}");
        lines.take_while(|l| l.trim_end() != end).collect()
    }

    /// A section that is (a part of) the kernel's log.
    pub fn log(&self, name: &str) -> Vec<Record> {
        let records: Vec<Record> = self.section(name).into_iter().filter_map(Record::read).collect();
        assert!(!records.is_empty() || self.section(name).is_empty(), "section {name} is not a kernel's log");
        records
    }

    /// A section that is /proc/interrupts.
    pub fn interrupts(&self, name: &str) -> Interrupts {
        Interrupts::read(&self.section(name))
    }

    /// The first number in a mark's text.
    pub fn marks_number(&self, name: &str) -> u64 {
        let text = &self.outcome.marks.get(name).unwrap().text;
        text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap()
    }

    /// Fails if the kernel found fault with itself or its SMMU driver, other than in records that `expected` is true for.
    pub fn assert_clean(&self, names: &[&str], expected: impl Fn(&Record) -> bool) {
        for name in names {
            let bad: Vec<Record> =
                self.log(name).into_iter().filter(|r| r.is_trouble() && !expected(r)).collect();
            assert!(bad.is_empty(), "{name}: {bad:#?}");
        }
    }
}
