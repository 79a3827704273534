//! Guests and their servers killed, stopped, starved, rebooted and gone mad: each ends in a clear message or goes on.
//!
//! Real QEMU, real kernels: needs what `scripts/linux-kit` fetches, and says so where that is not there. At most two
//! guests run at a time.
//!
//! | Variable | |
//! |---|---|
//! | `PORTCULLIS_NEED_LINUX_KIT` | a missing kit is a failure |
//! | `PORTCULLIS_SCRIBBLE` | seconds of scribbling instead of 20 |
//! | `PORTCULLIS_KERNEL` | the kernel of the kit to use |

mod robust_common;

use std::process::Command;
use std::time::Duration;

use portcullis_board::Tree;
use portcullis_cosim::guest_tree::{self, guest_tree};
use robust_common::{
    Ended, Running, Spec, child, kit, left_in, no_orphans, qemu, script, signal, start, start_with,
};
use rustix::process::Signal;

const SOON: Duration = Duration::from_secs(15);
/// So many copies that it is not at its end when something happens.
const RUNS: &str = "dmatest_begin 100000 && sleep 60";
const FULL: &str = "dmatest_begin 50 && dmatest_end; complaints";

#[test]
fn the_process_that_runs_a_guest() {
    child();
}

/// The moments at which something happens to one of the two.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// QEMU was just started and connects.
    Start,
    /// The kernel boots.
    Boot,
    /// dmatest runs.
    Work,
}

const MOMENTS: [Moment; 3] = [Moment::Start, Moment::Boot, Moment::Work];

fn at(moment: Moment, board: &'static str) -> Running {
    let mut running = start(&Spec::new(board, RUNS));
    match moment {
        Moment::Start => {}
        Moment::Boot => drop(running.awaits("note the window is placed")),
        Moment::Work => drop(running.awaits("mark dmatest-runs pass")),
    }
    if matches!(moment, Moment::Boot) {
        // Into the SMMU's driver, more or less.
        std::thread::sleep(Duration::from_millis(400));
    }
    running
}

#[test]
fn a_killed_qemu_is_said_to_be_killed() {
    if kit().is_none() {
        return;
    }
    for moment in MOMENTS {
        let running = at(moment, "zynqmp-thesis");
        signal(running.qemu(), Signal::KILL);
        let ended = running.ends_clean(SOON, Duration::from_secs(2));
        match moment {
            Moment::Start => {
                let said = ended.errors.iter().chain(&ended.said).any(|line| line.contains("SIGKILL"));
                assert!(said, "{:?}", ended.said);
            }
            _ => assert!(
                ended.outcome()["end"].as_str().unwrap().contains("9"),
                "{:#}",
                ended.outcome()["end"]
            ),
        }
        assert!(!ended.says("panicked at"), "{:?}", ended.said);
    }
}

#[test]
fn a_killed_server_takes_qemu_along_and_the_next_one_cleans_up() {
    if kit().is_none() {
        return;
    }
    for moment in MOMENTS {
        let mut running = at(moment, "smmuv3");
        running.qemu();
        signal(running.pid(), Signal::KILL);
        let dir = std::mem::replace(&mut running.dir, tempfile::tempdir().unwrap());
        assert!(running.ends(SOON).outcomes.is_empty());
        no_orphans(dir.path(), Duration::from_secs(5));
        let left = left_in(dir.path());
        assert!(!left.is_empty(), "nobody could have removed the directory");
        // The next one begins by removing what is left, here with nothing else to do.
        let mut spec = Spec::new("smmuv3", "mark nothing pass");
        spec.limit = Duration::ZERO;
        let next = start_with(&spec, dir, |_| {}).ends_clean(SOON, Duration::from_secs(2));
        assert_eq!(next.outcome()["end"], "Limit");
    }
}

fn stopped(board: &'static str, who: impl FnOnce(&Running) -> rustix::process::Pid) -> Ended {
    // A few seconds of work, of which a part comes after.
    let copies = if board == "smmuv3" { 400 } else { 150 };
    let script = format!("dmatest_begin {copies} && dmatest_end; complaints");
    let mut running = start(&Spec::new(board, &script));
    running.awaits("mark dmatest-runs pass");
    let pid = who(&running);
    signal(pid, Signal::STOP);
    std::thread::sleep(Duration::from_secs(10));
    running.silent("mark dmatest ");
    signal(pid, Signal::CONT);
    let ended = running.ends_clean(robust_common::LONG, Duration::from_secs(2));
    for line in &ended.said {
        if line.starts_with("|   complaint") || line.starts_with("mark") {
            println!("{board}: {line}");
        }
    }
    ended
}

#[test]
fn qemu_may_stand_still_for_ten_seconds() {
    if kit().is_none() {
        return;
    }
    stopped("zynqmp-thesis", Running::qemu).good();
}

#[test]
fn the_server_may_stand_still_for_ten_seconds() {
    if kit().is_none() {
        return;
    }
    stopped("smmuv3", Running::pid).good();
}

/// Reboots once, then [`FULL`].
fn rebooting(board: &'static str, first: &str) -> Spec {
    let script = format!("if noted; then\n{FULL}\nelse\nnote\n{first}\nreboot -f\nsleep 30\nfi");
    Spec { reboot: true, append: "mem=960M iomem=relaxed".into(), ..Spec::new(board, &script) }
}

#[test]
fn a_guest_may_reboot() {
    if kit().is_none() {
        return;
    }
    for board in ["zynqmp-thesis", "smmuv3"] {
        // In the middle of its work, too.
        let ended = start(&rebooting(board, "dmatest_begin 100000")).ends_clean(robust_common::LONG, SOON);
        assert_eq!(ended.good().outcome()["reboots"], 1);
        let probes = ended
            .said
            .iter()
            .filter(|l| l.starts_with('|') && l.contains("arm-smmu") && l.contains("-bit"))
            .count();
        assert!(probes >= 2, "{:?}", ended.said);
        println!("{board}: {}", ended.outcome()["guest"]["marks"]);
    }
}

#[test]
fn a_reboot_that_is_not_followed_is_the_end() {
    if kit().is_none() {
        return;
    }
    let ended = start(&Spec::new("smmuv3", "reboot -f; sleep 30")).ends_clean(robust_common::LONG, SOON);
    assert_eq!((&ended.outcome()["end"], &ended.outcome()["good"]), (&"GuestOff".into(), &false.into()));
    assert_eq!(ended.outcome()["reboots"], 0);
}

#[test]
fn a_panic_is_the_end_and_is_told_whether_reboots_are_followed_or_not() {
    if kit().is_none() {
        return;
    }
    for reboot in [false, true] {
        let spec = Spec {
            reboot,
            ..Spec::new("zynqmp-thesis", "mark before pass; echo c > /proc/sysrq-trigger; sleep 30")
        };
        let ended = start(&spec).ends_clean(robust_common::LONG, SOON);
        let outcome = ended.outcome();
        assert!(outcome["guest"]["panic"].as_str().is_some_and(|text| text.contains("sysrq")), "{outcome:#}");
        assert_eq!((&outcome["end"], &outcome["good"]), (&"GuestOff".into(), &false.into()));
    }
}

#[test]
fn a_qemu_that_is_ended_politely_says_by_whom() {
    if kit().is_none() {
        return;
    }
    let running = at(Moment::Work, "smmuv3");
    signal(running.qemu(), Signal::TERM);
    let ended = running.ends_clean(SOON, SOON);
    assert!(ended.outcome()["end"].as_str().unwrap().starts_with("Qemu("), "{:#}", ended.outcome()["end"]);
    assert!(ended.says("somebody ended QEMU with a signal"), "{:?}", ended.said);
}

/// Scribbles over the whole window, then reboots and works; or, where the guest did not survive what it did to itself, a
/// new one works.
fn scribbles(board: &'static str, drivers: bool) {
    if kit().is_none() {
        return;
    }
    let seconds: u64 = std::env::var("PORTCULLIS_SCRIBBLE").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let load = |path: &str| Tree::load(root.join(path)).unwrap();
    let tree = guest_tree(
        &load(&format!("../../boards/{board}.dtb")),
        &load("tests/guest_tree/virt.dtb"),
        &guest_tree::Options { pci_first_slot: 2, ..Default::default() },
    )
    .unwrap();
    let (base, size) = (tree.window.base.get(), tree.window.size);
    let before = if drivers { "load zynqmp_dma\n" } else { "" };
    let first = format!(
        "{before}mark scribble-begins pass\nscribble {seconds} {base:#x} {size:#x} 7\nmark scribbled pass"
    );
    let mut spec = rebooting(board, &first);
    spec.limit = Duration::from_secs(seconds + 40);
    if !drivers {
        // Of the first kernel only the drivers are missing; the second is the same kernel, and has none either.
        spec.append += " initcall_blacklist=arm_smmu_driver_init";
        spec.script = spec.script.replace(FULL, "mark up-again pass");
    }
    let ended = start(&spec).ends_clean(robust_common::LONG + Duration::from_secs(seconds), SOON);
    let what = format!("{board}, {} drivers", if drivers { "with" } else { "without" });
    assert!(!ended.says("panicked at"), "the server panicked: {:?}", ended.said);
    let outcome = ended.outcome();
    let (memory, peak) = (outcome["memory"].as_u64().unwrap(), outcome["peak"].as_u64().unwrap());
    let done = ended.said.iter().find(|l| l.contains("scribble: ") && l.contains(" aborts in")).cloned();
    println!(
        "{what}: {}; end {}, {} reboots, panic {}, longest without a turn's end {:.3} s, memory {memory} KiB, at most {peak} KiB",
        done.as_deref().unwrap_or("(the guest did not survive it)"),
        outcome["end"],
        outcome["reboots"],
        outcome["guest"]["panic"],
        outcome["gap"].as_f64().unwrap(),
    );
    assert!(outcome["gap"].as_f64().unwrap() < 5.0, "{what}: the server stood still");
    assert!(peak < memory + 64 * 1024, "{what}: from {memory} to {peak} KiB");
    assert!(ended.says("mark scribble-begins pass"), "{what}: {:?}", ended.said);
    if outcome["good"] != true {
        println!("{what}: the guest did not come back by itself: {}", outcome["end"]);
        for line in ended.said.iter().rev().take(15).rev() {
            println!("  {line}");
        }
        start(&Spec::new(board, FULL)).ends_clean(robust_common::LONG, SOON).good();
    }
}

#[test]
fn scribbling_over_smmuv2_with_drivers() {
    scribbles("zynqmp-thesis", true);
}

#[test]
fn scribbling_over_smmuv2_without_drivers() {
    scribbles("zynqmp-thesis", false);
}

#[test]
fn scribbling_over_smmuv3_with_drivers() {
    scribbles("smmuv3", true);
}

#[test]
fn scribbling_over_smmuv3_without_drivers() {
    scribbles("smmuv3", false);
}

#[test]
fn two_guests_at_once_in_one_process() {
    if kit().is_none() {
        return;
    }
    let spec = Spec { guests: 2, ..Spec::new("smmuv3", FULL) };
    let ended = start(&spec).ends_clean(robust_common::LONG, SOON);
    assert_eq!(ended.good().outcomes.len(), 2);
}

#[test]
fn two_guests_at_once_in_two_processes() {
    if kit().is_none() {
        return;
    }
    // In one directory: neither takes the other's for one that was left behind.
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().to_path_buf();
    let first = start_with(&Spec::new("zynqmp-thesis", FULL), dir, |_| {});
    let second = start_with(&Spec::new("smmuv3", FULL), tempfile::tempdir().unwrap(), |command| {
        command.env("XDG_RUNTIME_DIR", &shared);
    });
    second.ends(robust_common::LONG).good();
    first.ends_clean(robust_common::LONG, SOON).good();
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    if kit().is_none() {
        return;
    }
    let spec = Spec::new("smmuv3", "mark never fail");
    let nowhere = start_with(&spec, tempfile::tempdir().unwrap(), |command| {
        command.env("XDG_RUNTIME_DIR", "/nonexistent/runtime").env("TMPDIR", "/nonexistent/tmp");
    })
    .ends_clean(SOON, SOON);
    assert!(
        nowhere.error().contains("cannot make a private directory below /nonexistent/tmp"),
        "{}",
        nowhere.error()
    );

    // A full disk, in a mount namespace of its own: first for QEMU's own tree, then for the initial file system.
    let may = Command::new("unshare").args(["-m", "mount", "-t", "tmpfs", "none", "/mnt"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED, the full disk: no mount namespaces here");
        return;
    }
    for (size, names) in [("16k", "device tree"), ("2m", "initrd")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_path_buf();
        let full = start_with(&spec, dir, |command| {
            let mut inside = Command::new("unshare");
            let text = format!("mount -t tmpfs -o size={size} none {} && exec \"$0\" \"$@\"", path.display());
            inside.args(["-m", "sh", "-c", &text]).arg(command.get_program()).args(command.get_args());
            for (name, value) in command.get_envs() {
                inside.env(name, value.unwrap_or_default());
            }
            inside.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
            *command = inside;
        })
        .ends_clean(SOON, SOON);
        println!("{size}: {}", full.error());
        assert!(full.error().contains(names), "{}", full.error());
    }
}

#[test]
fn a_qemu_that_cannot_do_it_is_refused_with_the_reason() {
    let Some(kit) = kit() else { return };
    let real = qemu(&kit).program;
    let dir = tempfile::tempdir().unwrap();
    let old = script(dir.path(), "old", "echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2)'");
    let without = script(
        dir.path(),
        "without",
        "case $1 in --version) echo 'QEMU emulator version 11.0.0';; *) echo 'name \"vfio-pci\", bus PCI';; esac",
    );
    let silent = script(
        dir.path(),
        "silent",
        &format!("case \"$*\" in *-kernel*) exit 0;; esac; exec {} \"$@\"", real.display()),
    );
    // QEMU as it is started by people who do not know: memory of its own.
    let unshared = script(
        dir.path(),
        "unshared",
        &format!(
            "for a do shift; a=$(printf %s \"$a\" | sed 's/\"share\":true/\"share\":false/'); set -- \"$@\" \"$a\"; done\nexec {} \"$@\"",
            real.display()
        ),
    );
    for (program, words) in [
        (old, ["10.0", "too old"]),
        (without, ["without", "vfio-user-pci"]),
        (silent, ["ended", "before it connected"]),
        (unshared, ["memory-backend-memfd", "share=on"]),
    ] {
        let spec = Spec { qemu: Some(program), ..Spec::new("smmuv3", "mark never fail") };
        let ended = start(&spec).ends_clean(Duration::from_secs(60), SOON);
        println!("{}", ended.error());
        assert!(words.iter().all(|word| ended.error().contains(word)), "{}", ended.error());
    }
}
