//! Real device trees: those of Debian's arm64 kernel, which `scripts/fetch-debian-dtbs` puts into a cache.

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use portcullis_arch::zynqmp::ZDMA_CHANNELS;
use portcullis_board::machine::Agreement;
use portcullis_board::{MachineDescription, Tree, apply_protect, protect_overlay, report};
use portcullis_drivers::fault::FaultReason;

/// `${PORTCULLIS_CACHE:-${XDG_CACHE_HOME:-~/.cache}}/portcullis/debian-dtbs`, as in the script.
fn cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let base = set("PORTCULLIS_CACHE")
        .or_else(|| set("XDG_CACHE_HOME"))
        .or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("portcullis/debian-dtbs"))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for version in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        for file in std::fs::read_dir(version.path()).into_iter().flatten().flatten() {
            if file.path().extension().is_some_and(|e| e == "dtb") {
                files.push(file.path());
            }
        }
    }
    files.sort();
    files
}

fn compile(source: &str) -> Option<Vec<u8>> {
    let mut child = Command::new("dtc")
        .args(["-@", "-q", "-I", "dts", "-O", "dtb", "-o", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "dtc refuses\n{source}");
    Some(output.stdout)
}

#[test]
fn every_debian_zynqmp_dtb_loads() {
    let dir = cache();
    let files = dir.as_deref().map(files).unwrap_or_default();
    if files.is_empty() {
        eprintln!("skipped: no device trees of Debian in the cache, run scripts/fetch-debian-dtbs");
        return;
    }
    for file in &files {
        let name = file.display();
        let tree = Tree::load(file).unwrap_or_else(|e| panic!("{e}"));
        let desc = MachineDescription::from_tree(&tree).unwrap_or_else(|e| panic!("{name}: {e}"));
        is_a_zynqmp_with_its_smmu_off(&desc, &name.to_string());
        for master in [
            "FPD DMA channel 0",
            "LPD DMA channel 7",
            "dma-controller@fd540000",
            "GEM3",
            "SATA",
            "DisplayPort DMA",
            "/axi/pcie@fd0e0000",
            "USB0",
        ] {
            is_protected(&tree, &desc, master, &name.to_string());
        }
    }
    eprintln!("{} device trees", files.len());
}

/// A machine of the tree, with one channel behind the SMMU, runs DMA through a domain and nowhere else.
#[test]
fn a_protected_channel_of_a_debian_tree_runs_dma_through_its_domain() {
    let dir = cache();
    let files = dir.as_deref().map(files).unwrap_or_default();
    if files.is_empty() {
        eprintln!("skipped: no device trees of Debian in the cache, run scripts/fetch-debian-dtbs");
        return;
    }
    let mut ran = 0;
    for file in &files {
        let name = file.display();
        let tree = Tree::load(file).unwrap();
        for (node, channel) in [("FPD DMA channel 0", "fpd-dma0"), ("LPD DMA channel 7", "lpd-dma7")] {
            let protected = apply_protect(&tree, node).unwrap();
            let description = MachineDescription::from_tree(&protected).unwrap();
            let Some(memory) = description.memory.iter().map(|m| m.region).find(|r| r.size >= 0x1000_0000)
            else {
                // The boot loader of this board says how much memory there is.
                continue;
            };
            let ram = memory.base.get() + 0x100_0000;
            let board = common::Board::of(description, false);
            assert!(board.system.device(channel).is_some(), "{name}: {channel}");
            let domain = board.domain_for(channel);
            common::map(&domain, 0x5_0000_0000, ram, 0x4000);
            board.works(channel, (0x5_0000_2001, ram + 0x2001), (0x5_0000_0000, ram), 0x1800);
            board.refused(channel, (ram, ram), 0x5_0000_0000, FaultReason::Translation, ram);
            ran += 1;
        }
    }
    assert!(ran > 0, "no tree has memory");
    eprintln!("{ran} machines");
}

fn is_a_zynqmp_with_its_smmu_off(desc: &MachineDescription, name: &str) {
    let [smmu] = desc.smmus.as_slice() else { panic!("{name}: {} SMMUs", desc.smmus.len()) };
    assert!(!smmu.node.available, "{name}");
    assert_eq!(smmu.interrupts.len(), 17, "{name}");
    assert_eq!(desc.dma_channels.len(), 16, "{name}");
    for chip in &ZDMA_CHANNELS {
        let channel = desc.dma_channels.iter().find(|c| c.chip == Some(chip));
        let channel = channel.unwrap_or_else(|| panic!("{name}: no channel at {}", chip.base));
        assert_eq!(channel.bus_width, chip.unit.bus_width(), "{name}");
        assert_eq!(channel.interrupt.as_ref().and_then(|i| i.spi()), Some(chip.spi), "{name}");
        assert_eq!(channel.streams.actual, [chip.stream], "{name}");
    }
    for master in &desc.masters {
        // Linux wrote the ids where it has them; they must be those that our tables compute.
        assert_ne!(master.agreement, Agreement::Differs, "{name}: {}", master.node.path);
        assert!(!master.streams.actual.is_empty() || !master.streams.declared.is_empty(), "{name}");
    }
    assert!(desc.masters.len() >= 16 + 12, "{name}: {} masters", desc.masters.len());
    assert!(!desc.not_modelled.is_empty(), "{name}");
    let text = report(desc).to_string();
    assert!(text.contains("is DISABLED"), "{name}: {text}");
    assert!(text.contains("  FPD DMA channel 0           0x14e8    5     0x3    0x28  "), "{name}: {text}");
}

fn is_protected(tree: &Tree, desc: &MachineDescription, master: &str, name: &str) {
    let source = protect_overlay(desc, master).unwrap_or_else(|e| panic!("{name}: {e}"));
    let path = source.split(' ').nth(2).unwrap();
    let after = apply_protect(tree, path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let after = MachineDescription::from_tree(&after).unwrap();
    let protected = after.master(path).unwrap();
    assert!(after.smmus[0].node.available && protected.node.available, "{name}: {path}");
    assert_eq!(protected.agreement, Agreement::Agrees, "{name}: {path}");
    let Some(overlay) = compile(&source) else {
        eprintln!("skipped: dtc is not installed, the overlay source is not compiled");
        return;
    };
    let merged = tree.apply_overlay(&overlay).unwrap_or_else(|e| panic!("{name}: {e}\n{source}"));
    let merged = MachineDescription::from_tree(&merged).unwrap();
    assert_eq!(merged.masters, after.masters, "{name}: {path}");
}
