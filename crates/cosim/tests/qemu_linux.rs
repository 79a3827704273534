//! The kit's QEMU and kernels, without any function of ours: finding, starting, steering, ending.
//!
//! Needs what `scripts/linux-kit` fetches; without it every test here says so and passes.
#![cfg(feature = "linux")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use portcullis_arch::Pa;
use portcullis_cosim::qemu::{
    ConsoleRead, Control, Guest, GuestConfig, Kit, Launch, Qemu, QemuError, QmpEvent, Reason, RunDir, Window,
};

const LONG: Duration = Duration::from_secs(120);

/// The kit, or a clear line and nothing.
fn kit() -> Option<(Kit, Qemu)> {
    match Kit::default_dir().map(|dir| Kit::load(&dir)) {
        Some(Ok(kit)) => {
            let qemu = Qemu::find(None, Some(&kit)).unwrap();
            assert_eq!(qemu.program, kit.qemu().0, "the kit's QEMU is not usable");
            Some((kit, qemu))
        }
        Some(Err(error)) => {
            println!("SKIPPED: {error}");
            None
        }
        None => {
            println!("SKIPPED: no home directory, so no kit: run scripts/linux-kit");
            None
        }
    }
}

struct Running {
    guest: Guest,
    control: Control,
    text: String,
}

/// QEMU with the kit's kernel and QEMU's own device tree, stopped.
fn start(base: &Path, kernel: Option<&str>, change: impl FnOnce(&mut Launch)) -> Option<Running> {
    let (kit, qemu) = kit()?;
    let kernel = kit.kernel(kernel).unwrap();
    let dir = RunDir::below(base).unwrap();
    let mut launch = Launch {
        guest: GuestConfig::default(),
        functions: Vec::new(),
        device_tree: dir.file("virt.dtb").unwrap(),
        kernel: kernel.image.clone(),
        initrd: Some(kernel.initrd.clone()),
        append: "console=ttyAMA0 panic=-1".into(),
        console: Default::default(),
        no_reboot: true,
    };
    change(&mut launch);
    fs::write(&launch.device_tree, qemu.device_tree(&launch.guest).unwrap()).unwrap();
    let mut guest = Guest::start(&qemu, &launch, dir).unwrap();
    let control = guest.connect_control(LONG).unwrap();
    Some(Running { guest, control, text: String::new() })
}

impl Running {
    /// Reads the console up to `end`, from where the last call stopped.
    fn read_until(&mut self, end: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(position) = self.text.find(end) {
                return self.text.drain(..position + end.len()).collect();
            }
            assert!(
                Instant::now() < deadline,
                "no {end:?} at the end of {:?}",
                self.text.lines().rev().take(5).collect::<Vec<_>>()
            );
            match self.guest.console().read(Duration::from_millis(100)) {
                ConsoleRead::Bytes(bytes) => self.text.push_str(&String::from_utf8_lossy(&bytes)),
                ConsoleRead::Nothing => {}
                ConsoleRead::Ended => panic!("ended: {:?}\n{}", self.text, self.guest.stderr()),
            }
        }
    }

    fn next_shutdown(&mut self) -> Reason {
        let deadline = Instant::now() + LONG;
        while Instant::now() < deadline {
            if let Some(QmpEvent::Shutdown(reason)) =
                self.control.next_event(Duration::from_millis(100)).unwrap()
            {
                return reason;
            }
        }
        panic!("no SHUTDOWN");
    }
}

#[test]
fn the_tree_of_the_machine_has_the_host_bridge_and_the_controller() {
    let Some((_, qemu)) = kit() else { return };
    for (its, memory, cpus) in [(true, 1u64 << 30, 1), (true, 6 << 30, 4), (false, 256 << 20, 2)] {
        let config = GuestConfig { its, memory, cpus, ..GuestConfig::default() };
        let blob = qemu.device_tree(&config).unwrap();
        let tree = dtoolkit::model::DeviceTree::from_fdt(&dtoolkit::fdt::Fdt::new(&blob).unwrap());
        let text = tree.to_string();
        assert!(text.contains("pcie@10000000"), "{text}");
        assert!(text.contains("arm,gic-v3"));
        assert_eq!(text.contains("arm,gic-v3-its"), its);
        assert!(text.contains(&format!("cpu@{}", cpus - 1)) && !text.contains(&format!("cpu@{cpus}")));
    }
}

#[test]
fn an_impossible_machine_is_refused_with_qemus_own_words() {
    let Some((_, qemu)) = kit() else { return };
    let config = GuestConfig { cpu: "pentium".into(), ..GuestConfig::default() };
    let error = qemu.device_tree(&config).unwrap_err().to_string();
    assert!(error.contains("pentium"), "{error}");

    let base = tempfile::tempdir().unwrap();
    let launch = Launch {
        guest: GuestConfig::default(),
        functions: Vec::new(),
        device_tree: "/nonexistent/tree".into(),
        kernel: "/nonexistent/kernel".into(),
        initrd: None,
        append: String::new(),
        console: Default::default(),
        no_reboot: true,
    };
    let mut guest = Guest::start(&qemu, &launch, RunDir::below(base.path()).unwrap()).unwrap();
    let error = guest.connect_control(LONG).unwrap_err();
    let QemuError::Ended { status: Some(status), .. } = error else { panic!("{error}") };
    assert!(!status.success());
    assert!(error.to_string().contains("/nonexistent"), "{error}");
}

#[test]
fn every_kernel_of_the_kit_boots_when_it_is_let_go_and_ends_by_itself() {
    let Some((kit, _)) = kit() else { return };
    for kernel in kit.kernels() {
        let base = tempfile::tempdir().unwrap();
        let mut running = start(base.path(), Some(&kernel.name), |launch| launch.guest.cpus = 2).unwrap();
        let state = running.control.status().unwrap();
        assert_eq!((state.running, state.status.as_str()), (false, "prelaunch"));
        assert_eq!(
            running.guest.console().read(Duration::from_millis(300)),
            ConsoleRead::Nothing,
            "it runs already"
        );
        running.control.cont().unwrap();
        let boot = running.read_until("portcullis: up ");
        assert!(boot.contains(&kernel.release), "{boot}");
        let line = running.read_until("\n");
        assert!(line.contains(&kernel.release) && line.contains("cpus=2"), "{line}");
        running.guest.console_input().write(b"exit\n", LONG).unwrap();
        assert!(running.guest.wait(LONG).unwrap().success(), "{}", running.guest.stderr());
    }
}

#[test]
fn a_running_guest_is_stopped_let_go_and_ended_from_outside() {
    let base = tempfile::tempdir().unwrap();
    let Some(mut running) = start(base.path(), None, |_| {}) else { return };
    running.control.cont().unwrap();
    running.read_until("portcullis: up ");
    running.control.stop().unwrap();
    assert!(!running.control.status().unwrap().running);
    running.control.cont().unwrap();
    assert!(running.control.status().unwrap().running);
    running.guest.console_input().write(b"echo $((6*7))-is-it\n", LONG).unwrap();
    running.read_until("42-is-it");
    running.control.quit().unwrap();
    assert!(running.guest.wait(LONG).unwrap().success());
    let error = running.control.status().unwrap_err();
    assert!(error.is_closed(), "{error}");
}

#[test]
fn a_reboot_stops_the_machine_until_it_is_restarted_and_a_power_off_until_it_is_ended() {
    let base = tempfile::tempdir().unwrap();
    let Some(mut running) = start(base.path(), None, |launch| launch.no_reboot = false) else { return };
    running.control.cont().unwrap();
    for _ in 0..2 {
        running.read_until("portcullis: up ");
        running.read_until("/ #");
        running.guest.console_input().write(b"reboot -f\n", LONG).unwrap();
        assert_eq!(running.next_shutdown(), Reason::GuestReset);
        assert!(!running.control.status().unwrap().running);
        let begin = Instant::now();
        running.control.restart(&[]).unwrap();
        println!("restart took {:?}", begin.elapsed());
        running.read_until("Booting Linux");
    }
    running.read_until("/ #");
    running.guest.console_input().write(b"exit\n", LONG).unwrap();
    assert_eq!(running.next_shutdown(), Reason::GuestShutdown);
    assert!(running.guest.try_wait().is_none(), "it ended instead of stopping");
    running.control.quit().unwrap();
    assert!(running.guest.wait(LONG).is_some());
}

#[test]
fn a_panic_reboots_and_so_ends_a_guest_that_may_not() {
    let base = tempfile::tempdir().unwrap();
    let Some(mut running) = start(base.path(), None, |_| {}) else { return };
    running.control.cont().unwrap();
    running.read_until("/ #");
    running.guest.console_input().write(b"echo c > /proc/sysrq-trigger\n", LONG).unwrap();
    running.read_until("Kernel panic");
    assert!(running.guest.wait(LONG).unwrap().success());
}

#[test]
fn only_a_slot_of_ours_takes_a_window() {
    let base = tempfile::tempdir().unwrap();
    let add = |launch: &mut Launch| {
        launch.guest.extra = ["-device", "virtio-rng-pci,addr=2"].map(Into::into).to_vec();
    };
    let Some(mut running) = start(base.path(), None, add) else { return };
    let window = |slot| Window { ecam: Pa(0x40_1000_0000), slot, bar0: Pa(0x3000_0000) };
    for (slot, reason) in [(0, "device 1b36:0008"), (1, "no function of ours"), (2, "device 1af4:1005")] {
        let error = running.control.place_window(window(slot)).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}

/// The other half of the test below.
#[test]
#[ignore = "run by a_killed_parent_takes_qemu_along"]
fn a_parent_of_qemu_that_waits_to_be_killed() {
    let Some(base) = std::env::var_os("PORTCULLIS_TEST_BASE").map(PathBuf::from) else { return };
    let Some(mut running) = start(&base, None, |_| {}) else { return };
    running.control.cont().unwrap();
    println!("guest {} ", running.guest.pid());
    std::thread::sleep(Duration::from_secs(1000));
}

#[test]
fn a_killed_parent_takes_qemu_along() {
    if kit().is_none() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "a_parent_of_qemu_that_waits_to_be_killed"])
        .env("PORTCULLIS_TEST_BASE", base.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains("guest ")).unwrap();
    let pid: u32 = line.split("guest ").last().unwrap().trim().parse().unwrap();
    let program = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(
        program.contains("qemu-system-aarch64") && !program.starts_with("/bin/sh"),
        "a wrapper stays: {program}"
    );
    parent.kill().unwrap();
    parent.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    // A zombie has no command line.
    while fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|text| !text.is_empty()) {
        assert!(Instant::now() < deadline, "QEMU lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}
