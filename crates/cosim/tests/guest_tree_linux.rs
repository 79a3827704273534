//! Boards put into the tree that a real QEMU makes, and shown to a real kernel. Needs what `scripts/linux-kit` fetches.
#![cfg(feature = "linux")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use portcullis_board::{MachineDescription, Tree};
use portcullis_cosim::guest_tree::{GuestTree, Options, fragments, guest_tree};

const BOARDS: [&str; 4] = ["zynqmp-thesis", "zynqmp-thesis-hpc1", "smmuv3", "smmuv3-noncoherent"];
/// Longest time for one run of QEMU.
const LIMIT: Duration = Duration::from_secs(120);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

struct Kit {
    qemu: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

/// The kit, or a line that says why the test is skipped.
fn kit(test: &str) -> Option<Kit> {
    let found = find_kit();
    if found.is_none() {
        eprintln!("skipped: {test} needs the kit of scripts/linux-kit");
    }
    found
}

fn find_kit() -> Option<Kit> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("PORTCULLIS_CACHE").or_else(|| std::env::var_os("XDG_CACHE_HOME"));
    let dir = cache.map(PathBuf::from).or_else(home)?.join("portcullis/linux-kit");
    let manifest = std::fs::read(dir.join("kit.json")).ok()?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).ok()?;
    let path = |value: &serde_json::Value| Some(dir.join(value.as_str()?));
    let kernel = &manifest["kernels"][0];
    Some(Kit {
        qemu: path(&manifest["qemu"]["program"])?,
        kernel: path(&kernel["image"])?,
        initrd: path(&kernel["initrd"])?,
    })
}

/// Runs QEMU's `virt` until it ends, or for [`LIMIT`].
fn run(kit: &Kit, machine: &str, arguments: &[&str]) -> Output {
    let mut child = Command::new(&kit.qemu)
        .args(["-M", &format!("virt,memory-backend=mem{machine}")])
        .args(["-object", "memory-backend-memfd,id=mem,size=1G,share=on", "-m", "1G", "-cpu", "cortex-a72"])
        .args(["-nodefaults", "-nographic", "-no-reboot"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > LIMIT {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn dump(kit: &Kit, machine: &str, dir: &Path) -> Tree {
    let file = dir.join("virt.dtb");
    let output = run(kit, &format!("{machine},dumpdtb={}", file.display()), &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Tree::load(file).unwrap()
}

fn make(name: &str, qemu: &Tree) -> GuestTree {
    let board = Tree::load(root().join(format!("../../boards/{name}.dtb"))).unwrap();
    let guest = guest_tree(&board, qemu, &Options::default()).unwrap();
    let (board, in_guest) =
        (MachineDescription::from_tree(&board).unwrap(), MachineDescription::from_tree(&guest.tree).unwrap());
    let counts = |d: &MachineDescription| {
        (d.smmus.len(), d.dma_channels.len(), d.pl_writers.len(), d.test_devices.len(), d.masters.len())
    };
    assert_eq!(counts(&board), counts(&in_guest));
    guest
}

#[test]
fn every_board_fits_into_the_tree_of_a_real_qemu() {
    let Some(kit) = kit("every_board_fits_into_the_tree_of_a_real_qemu") else { return };
    let dir = tempfile::tempdir().unwrap();
    for (machine, its) in [
        (",gic-version=3,its=on", true),
        (",gic-version=3,its=off", false),
        (",gic-version=2", false),
        (",gic-version=3,highmem=off", true),
    ] {
        let qemu = dump(&kit, machine, dir.path());
        for name in BOARDS {
            let guest = make(name, &qemu);
            assert_eq!(guest.window.base.get(), 0x3000_0000, "{machine}");
            assert_eq!(guest.gicd.get(), 0x0800_0000);
            assert_eq!(guest.its_translater.map(|a| a.get()), its.then_some(0x0809_0040), "{machine}");
            let high = !machine.contains("highmem=off");
            assert_eq!(guest.ecam.get(), if high { 0x40_1000_0000 } else { 0x3f00_0000 });
            for placed in &guest.placed {
                assert!(placed.interrupts.iter().all(|(board, guest)| board == guest), "{placed:?}");
            }
        }
    }
    let own = dump(&kit, ",gic-version=3,iommu=smmuv3", dir.path());
    let board = Tree::load(root().join("../../boards/smmuv3.dtb")).unwrap();
    let message = guest_tree(&board, &own, &Options::default()).unwrap_err().to_string();
    assert!(message.contains("start it without `iommu=smmuv3`"), "{message}");
}

/// A cpio archive (`newc`) with the script that the kit's first process runs.
fn overlay(script: &str) -> Vec<u8> {
    let mut archive = Vec::new();
    let entries = [("overlay", 0o040_755, ""), ("overlay/run", 0o100_755, script), ("TRAILER!!!", 0, "")];
    for (ino, (name, mode, data)) in entries.into_iter().enumerate() {
        let fields = [ino + 1, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.iter().flat_map(|f| format!("{f:08x}").into_bytes()));
        for part in [format!("{name}\0").as_bytes(), data.as_bytes()] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}

#[test]
fn a_real_kernel_takes_the_tree() {
    let Some(kit) = kit("a_real_kernel_takes_the_tree") else { return };
    let dir = tempfile::tempdir().unwrap();
    let machine = ",gic-version=3,its=on";
    let qemu = dump(&kit, machine, dir.path());
    for name in ["zynqmp-thesis", "smmuv3"] {
        let guest = make(name, &qemu);
        let file = dir.path().join("guest.dtb");
        std::fs::write(&file, guest.tree.to_dtb()).unwrap();
        let initrd = dir.path().join("initrd");
        let script = "ls -1 /sys/bus/platform/devices; cat /proc/iomem";
        std::fs::write(&initrd, [std::fs::read(&kit.initrd).unwrap(), overlay(script)].concat()).unwrap();
        let (file, kernel, initrd) =
            (file.to_str().unwrap(), kit.kernel.to_str().unwrap(), initrd.to_str().unwrap());
        // Nobody serves the window here: the SMMU's driver reads ones, complains, and that is all.
        let append = "console=ttyAMA0 panic=-1";
        let output = run(
            &kit,
            machine,
            &["-dtb", file, "-kernel", kernel, "-initrd", initrd, "-append", append, "-serial", "stdio"],
        );
        let console = String::from_utf8_lossy(&output.stdout).replace('\r', "");
        assert!(
            console.contains("portcullis: done 0"),
            "{console}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(console.contains("MEM 0x0010000000..0x002fffffff"), "{console}");
        for placed in &guest.placed {
            // Linux names a platform device by its address.
            let (base, _) = placed.guest_path.rsplit_once('@').unwrap();
            let device = format!("{:x}.{}", placed.base.get(), base.rsplit_once('/').unwrap().1);
            assert!(console.lines().any(|l| l == device), "{device} is missing in {console}");
        }
        let complaint = console.lines().find(|l| l.contains("OF: ") && l.contains("rror"));
        assert_eq!(complaint, None, "{}", fragments(&guest));
    }
}
