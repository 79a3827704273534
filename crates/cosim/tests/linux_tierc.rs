//! Tier C: the small kernel of our own that `scripts/linux-kit --tier c` builds, for what Debian's is built without. SVA, user
//! space drivers on iommufd, DMA heaps, stalled transactions that nobody handles; each seen from the kernel's side and from
//! the board's.
//!
//! Without the kernel there is one clear line and every test passes; with PORTCULLIS_NEED_LINUX_KIT=c they fail.
#![cfg(feature = "linux")]

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use dtoolkit::model::DeviceTreeProperty;
use portcullis_arch::StreamId;
use portcullis_board::Tree;
use portcullis_board::sim::{AtsEvent, Event, EventKind, Machine, TransactionEvent};
use portcullis_cosim::linux::{self, GuestFile, Job, Observer, Outcome};
use portcullis_cosim::qemu::{Kernel, Kit, Qemu, Tier};
use portcullis_explain::{KernelMessage, PageRequestLine, parse_log};

/// What all jobs source.
const COMMON: &str = include_str!("../jobs/common.sh");
/// Longest time for a guest; one takes a few seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(150);
/// The streams of the two PCI functions and of the first and the last DMA channel.
const FUNCTIONS: [u32; 2] = [0x408, 0x410];
const FIRST_CHANNEL: u32 = 0x10;
const LAST_CHANNEL: u32 = 0x13;

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The kernel, or one clear line.
fn kernel() -> Option<(Kernel, Qemu)> {
    static ONCE: Once = Once::new();
    let found = Kit::default_dir().ok_or_else(|| "HOME is not set, so there is no kit".to_string());
    let found = found.and_then(|dir| Kit::load(&dir).map_err(|e| e.to_string())).and_then(|kit| {
        let own = kit.kernels().iter().find(|k| k.tiers.contains(&Tier::C)).cloned();
        let own = own.ok_or_else(|| {
            format!(
                "the kit in {} has no kernel of our own: run scripts/linux-kit --tier c",
                kit.dir().display()
            )
        })?;
        Ok((own, Qemu::find(None, Some(&kit)).map_err(|e| e.to_string())?))
    });
    match found {
        Ok(found) => Some(found),
        Err(why) if std::env::var_os("PORTCULLIS_NEED_LINUX_KIT").is_some_and(|v| v == "c") => {
            panic!("PORTCULLIS_NEED_LINUX_KIT is c: {why}")
        }
        Err(why) => {
            ONCE.call_once(|| say(&format!("SKIPPED: tests with real kernels (tier C): {why}")));
            None
        }
    }
}

fn board() -> Tree {
    Tree::load(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../boards/smmuv3.dtb")).unwrap()
}

/// The board with a second function that has no translation services and whose transactions may wait for software: what
/// Linux's driver wants for faults of processes (its page requests end in `arm_smmu_handle_ppr`, which denies all).
fn board_with_stalling_function() -> Tree {
    let edited = board().edit(|model| {
        let function =
            model.root.child_mut("pcie@50000000").and_then(|host| host.child_mut("testdev@2,0")).unwrap();
        function.remove_property("portcullis,ats").unwrap();
        function.remove_property("portcullis,pri").unwrap();
        function.add_property(DeviceTreeProperty::new_unchecked("dma-can-stall", Vec::<u8>::new()));
        Ok(())
    });
    edited.unwrap()
}

/// What happened on the board.
#[derive(Default)]
struct Seen {
    console: Vec<u8>,
    /// Transactions that were refused, or stalled.
    faults: Vec<TransactionEvent>,
    /// Substreams that asked for translations, and how many requests were granted.
    asking: BTreeSet<u32>,
    granted: u64,
    translated: u64,
    invalidations: u64,
    page_requests: u64,
    responses: u64,
}

impl Observer for Seen {
    fn console(&mut self, bytes: &[u8]) {
        self.console.extend(bytes);
    }
    fn events(&mut self, _: &Machine, events: &[Event], lost: u64) {
        assert_eq!(lost, 0, "events were lost");
        for event in events {
            match &event.kind {
                EventKind::Transaction(t) if t.fault.is_some() => self.faults.push((**t).clone()),
                EventKind::Ats { what, .. } => match what {
                    AtsEvent::Request { substream, reply, .. } => {
                        self.asking.extend(substream.map(|s| s.get()));
                        self.granted += u64::from(
                            matches!(reply, portcullis_bus::AtsReply::Granted(t) if t.has_access()),
                        );
                    }
                    AtsEvent::Translated { error, .. } => {
                        assert!(error.is_none(), "a translation that the SMMU gave was refused: {event:?}");
                        self.translated += 1;
                    }
                    AtsEvent::PageRequest(_) => self.page_requests += 1,
                    AtsEvent::Response(_) => self.responses += 1,
                    AtsEvent::Invalidation(_) => self.invalidations += 1,
                },
                _ => {}
            }
        }
    }
}

/// What a guest and its board said.
struct Report {
    outcome: Outcome,
    console: String,
    seen: Seen,
}

/// One guest at a time: these machines have two processors.
static ALONE: Mutex<()> = Mutex::new(());

fn run(name: &str, board: Tree, script: &str, parameters: &str, cpus: u32) -> Option<Report> {
    let (kernel, qemu) = kernel()?;
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut job = Job::new(board, &kernel, script);
    job.files.push(GuestFile::text("common.sh", COMMON));
    job.files.push(GuestFile::text("parameters", parameters));
    job.guest.cpus = cpus;
    // Words of the kernel would come in the middle of ours. What is built in takes these only here.
    job.append = "quiet vfio_platform.reset_required=0 iommufd.allow_unsafe_interrupts=1".into();
    job.limit = Some(LIMIT);
    let mut seen = Seen::default();
    let outcome = linux::run(&job, &qemu, &mut seen, &AtomicBool::new(false));
    let console = String::from_utf8_lossy(&seen.console).replace('\r', "");
    let outcome = outcome.unwrap_or_else(|error| panic!("{error}\n{console}"));
    say(&format!("{name}: {} with {cpus} CPUs: {:.1} s", kernel.release, outcome.summary.seconds));
    assert!(outcome.is_good(), "{:?}: {:#?}\n{console}", outcome.end, outcome.marks);
    Some(Report { outcome, console, seen })
}

impl Report {
    /// Commands of this name that the SMMU consumed.
    fn commands(&self, name: &str) -> u64 {
        self.outcome.summary.commands.iter().filter(|(n, _)| n == name).map(|(_, n)| n).sum()
    }

    /// A section of the console.
    fn section(&self, name: &str) -> String {
        let (begin, end) = (format!("portcullis: begin {name}"), format!("portcullis: end {name}"));
        let mut lines = self.console.lines().skip_while(|l| l.trim_end() != begin);
        assert!(lines.next().is_some(), "the guest has no section {name}\n{}", self.console);
        lines.take_while(|l| l.trim_end() != end).map(|l| format!("{l}\n")).collect()
    }

    /// The event records that the SMMU's driver printed in a section of the kernel's log.
    fn kernel_events(&self, name: &str) -> Vec<[u64; 4]> {
        let records = parse_log(&self.section(name)).into_iter().filter_map(|line| match line.message {
            KernelMessage::EventRecord { record } => Some(record.0),
            _ => None,
        });
        records.collect()
    }

    /// The kernel found no fault with itself, in any section.
    fn assert_sound(&self) {
        for word in [
            "WARNING:",
            "BUG:",
            "Oops",
            "Call trace",
            "Unable to handle",
            "rcu: INFO",
            "timeout",
            "CMDQ error",
        ] {
            assert!(!self.console.contains(word), "{word}\n{}", self.console);
        }
    }
}

fn stream(event: &[u64; 4]) -> u32 {
    (event[0] >> 32) as u32
}

fn code(event: &[u64; 4]) -> u8 {
    event[0] as u8
}

/// F_TRANSLATION and C_BAD_CD.
const F_TRANSLATION: u8 = 0x10;
const C_BAD_CD: u8 = 0x0a;
/// Bit 31 of an event's second word: stalled.
const STALLED: u64 = 1 << 31;

#[test]
fn processes_share_their_address_spaces_with_a_function_that_caches_translations() {
    let parameters = "function=0000:00:02.0\nflags=\n";
    let Some(r) = run("sva with ATS", board(), include_str!("../jobs/tierc-sva.sh"), parameters, 1) else {
        return;
    };
    r.assert_sound();
    // The parent's PASID, and the one of each child: given back, so it is the next one's.
    assert_eq!(Vec::from_iter(&r.seen.asking), [&1, &2]);
    assert!(r.seen.granted > 0 && r.seen.translated > 0);
    assert!(r.commands("AtcInv") > 0 && r.seen.invalidations > 0, "{:?}", r.outcome.summary.commands);
    assert_eq!(r.commands("Resume"), 0, "a translation request never stalls");
    // Translation requests that find nothing are answered and not recorded: nor are those of a PASID without a context, as
    // Linux leaves CR2.REC_CFG_ATS at 0.
    for section in ["sva", "pri"] {
        assert_eq!(r.kernel_events(section), [[0; 4]; 0]);
    }
    // The kernel's driver leaves page requests off. With them it denies, and the function asks no more.
    assert!(!r.section("sva").contains("unexpected PRI request"));
    let asked: Vec<PageRequestLine> = parse_log(&r.section("pri"))
        .into_iter()
        .filter_map(|line| match line.message {
            KernelMessage::PageRequest(request) => Some(request),
            _ => None,
        })
        .collect();
    let [request] = asked.as_slice() else { panic!("{asked:?}\n{}", r.section("pri")) };
    assert!(
        request.stream == FUNCTIONS[0] && request.substream > 0 && request.last && request.write,
        "{request:?}"
    );
    assert_eq!((r.seen.page_requests, r.seen.responses, r.commands("PriResp")), (1, 1, 1));
}

#[test]
fn a_function_whose_transactions_stall_gets_pages_that_nobody_touched() {
    for cpus in [1, 4] {
        let parameters = format!("function=0000:00:03.0\nflags=-f\ncpus={cpus}\n");
        let script = include_str!("../jobs/tierc-sva.sh");
        let Some(r) = run("sva with stalls", board_with_stalling_function(), script, &parameters, cpus)
        else {
            return;
        };
        r.assert_sound();
        assert!(r.seen.asking.is_empty());
        let stalled: Vec<_> = r.seen.faults.iter().filter(|t| t.stream == StreamId(FUNCTIONS[1])).collect();
        assert!(stalled.iter().any(|t| t.substream.is_some()), "{stalled:?}");
        // Each page of four buffers: brought in, refused twice, copied for the writer. And one of the DMA API's.
        assert!(r.commands("Resume") > 4 * 16, "{:?}", r.outcome.summary.commands);
        // Faults of processes are no news for the log. Those of nobody are: after an unmapping by the DMA API, and with a
        // PASID that has no context any more.
        let events: Vec<(u8, u32)> = r.kernel_events("sva").iter().map(|e| (code(e), stream(e))).collect();
        assert_eq!(events, [F_TRANSLATION, C_BAD_CD, C_BAD_CD].map(|code| (code, FUNCTIONS[1])));
    }
}

#[test]
fn user_space_drives_devices_through_iommufd() {
    let script = include_str!("../jobs/tierc-iommufd.sh");
    let Some(r) = run("iommufd", board_with_stalling_function(), script, "", 1) else { return };
    r.assert_sound();
    // With ATS the device is told and nobody else.
    assert_eq!(r.kernel_events("0000:00:02.0"), [[0; 4]; 0]);
    assert!(r.commands("AtcInv") > 0 && r.seen.granted > 0);
    // Without, both sides tell of the same access: the one after the unmapping.
    let events = r.kernel_events("0000:00:03.0");
    assert_eq!(events.len(), 1, "{events:x?}");
    assert_eq!((code(&events[0]), stream(&events[0])), (F_TRANSLATION, FUNCTIONS[1]));
    let ours: Vec<u64> =
        r.seen.faults.iter().filter(|t| t.stream == StreamId(FUNCTIONS[1])).map(|t| t.iova.get()).collect();
    assert!(!ours.is_empty() && ours.iter().all(|a| *a == events[0][2]), "{ours:x?} {events:x?}");
    for event in r.kernel_events("channel") {
        assert_eq!((code(&event), stream(&event)), (F_TRANSLATION, LAST_CHANNEL), "{event:x?}");
    }
    assert!(!r.kernel_events("channel").is_empty());
}

#[test]
fn heaps_feed_channels_and_a_stall_that_nobody_handles_is_ended() {
    let script = include_str!("../jobs/tierc-heaps.sh");
    let Some(r) = run("heaps", board(), script, "", 1) else { return };
    r.assert_sound();
    for section in ["copies", "after"] {
        assert_eq!(r.kernel_events(section), [[0; 4]; 0]);
    }
    // The kernel has no handler for the domain of the DMA API: it says so, and ends the transaction.
    let stalls = r.kernel_events("stray-stalling");
    assert!(!stalls.is_empty());
    for event in &stalls {
        assert_eq!((code(event), stream(event), event[1] & STALLED), (F_TRANSLATION, FIRST_CHANNEL, STALLED));
    }
    assert_eq!(r.commands("Resume"), stalls.len() as u64);
    let plain = r.kernel_events("stray");
    assert!(!plain.is_empty());
    for event in &plain {
        assert_eq!((code(event), stream(event), event[1] & STALLED), (F_TRANSLATION, LAST_CHANNEL, 0));
    }
    // Our side tells of the same streams and addresses.
    for (events, of) in [(&stalls, FIRST_CHANNEL), (&plain, LAST_CHANNEL)] {
        let ours: BTreeSet<u64> =
            r.seen.faults.iter().filter(|t| t.stream == StreamId(of)).map(|t| t.iova.get()).collect();
        let theirs: BTreeSet<u64> = events.iter().map(|e| e[2]).collect();
        assert_eq!(ours, theirs);
    }
}
