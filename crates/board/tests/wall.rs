//! The wall and the house rules, read from the manifests and the first lines of each crate: hardware and software never
//! depend on each other, software is `no_std`, and `unsafe` has one place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Models: they know no driver. Later models belong here on the day they come.
const HARDWARE: [&str; 6] = ["bus", "walk", "smmuv2", "smmuv3", "vtd", "engines"];
/// Drivers: they know no model.
const SOFTWARE: [&str; 6] = ["hal", "pgtable", "drivers", "iommu", "proxy", "vfio"];
/// What both sides know.
const SHARED: [&str; 1] = ["arch"];
/// Where the two sides meet, or who looks at both.
const ABOVE: [&str; 4] = ["board", "explain", "cli", "cosim"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

struct Crate {
    name: String,
    folder: PathBuf,
    /// Crates of this workspace that it names as a dependency of any kind, optional and target-specific ones included.
    depends: BTreeSet<String>,
}

/// The workspace's crates by short name.
fn workspace() -> BTreeMap<String, Crate> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let short = |name: &Value| name.as_str().unwrap().strip_prefix("portcullis-").map(str::to_string);
    let mut crates = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = short(&package["name"]).unwrap_or_else(|| panic!("{} is not ours", package["name"]));
        let dependencies = package["dependencies"].as_array().unwrap();
        let depends = dependencies.iter().filter_map(|d| short(&d["name"])).collect();
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        let folder = manifest.parent().unwrap().to_path_buf();
        crates.insert(name.clone(), Crate { name, folder, depends });
    }
    crates
}

/// Everything that a crate depends on inside of the workspace, however far down, with the way to it.
fn reach(crates: &BTreeMap<String, Crate>, from: &str) -> BTreeMap<String, String> {
    let mut ways = BTreeMap::new();
    let mut todo = vec![(from.to_string(), from.to_string())];
    while let Some((name, way)) = todo.pop() {
        for next in crates.get(&name).map(|c| &c.depends).into_iter().flatten() {
            if !ways.contains_key(next) {
                let way = format!("{way} -> {next}");
                ways.insert(next.clone(), way.clone());
                todo.push((next.clone(), way));
            }
        }
    }
    ways
}

fn breaches(crates: &BTreeMap<String, Crate>) -> Vec<String> {
    let mut found = Vec::new();
    let sides: [(&[&str], &[&str]); 3] = [(&HARDWARE, &SOFTWARE), (&SOFTWARE, &HARDWARE), (&SHARED, &[])];
    for (side, other) in sides {
        for name in side.iter().filter(|name| crates.contains_key(**name)) {
            for (reached, way) in reach(crates, name) {
                let above = ABOVE.contains(&reached.as_str());
                let shared = SHARED.contains(name);
                if other.contains(&reached.as_str()) || above || shared {
                    found.push(way);
                }
            }
        }
    }
    found
}

#[test]
fn hardware_and_software_do_not_know_each_other() {
    let crates = workspace();
    assert_eq!(breaches(&crates), Vec::<String>::new(), "these dependencies go through the wall");
}

#[test]
fn every_crate_has_its_side() {
    let known: BTreeSet<&str> =
        HARDWARE.iter().chain(&SOFTWARE).chain(&SHARED).chain(&ABOVE).copied().collect();
    for name in workspace().keys() {
        assert!(known.contains(name.as_str()), "{name} is on no side: add it to this test");
    }
}

#[test]
fn a_dependency_through_the_wall_is_found_however_far_down() {
    let mut crates = workspace();
    assert!(crates.len() > 8);
    // walk -> bus -> hal
    crates.get_mut("bus").unwrap().depends.insert("hal".into());
    let found = breaches(&crates);
    assert!(found.contains(&"bus -> hal".to_string()), "{found:?}");
    assert!(
        found.iter().any(|way| way.starts_with("smmuv2 -> ") && way.ends_with("bus -> hal")),
        "{found:?}"
    );
    let mut crates = workspace();
    crates.get_mut("pgtable").unwrap().depends.insert("walk".into());
    assert!(breaches(&crates).iter().any(|way| way.ends_with("pgtable -> walk")));
}

#[test]
fn the_freestanding_crate_links_software_only() {
    let manifest = root().join("crates/no-std-check/Cargo.toml");
    let text = std::fs::read_to_string(manifest).unwrap();
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let Some(name) = line.split('=').next().and_then(|n| n.trim().strip_prefix("portcullis-")) else {
            continue;
        };
        assert!(SOFTWARE.contains(&name) || SHARED.contains(&name), "{line}");
    }
    assert!(SOFTWARE.iter().all(|name| text.contains(&format!("portcullis-{name} = "))));
}

/// The crate's own attributes: `#![name(arguments)]` outside of comments.
fn attributes(source: &str) -> BTreeSet<String> {
    let inner = |line: &str| line.strip_prefix("#![")?.strip_suffix(']').map(str::to_string);
    source.lines().filter_map(|line| inner(line.trim())).collect()
}

fn crate_root(krate: &Crate) -> String {
    let files = ["src/lib.rs", "src/main.rs"].map(|file| krate.folder.join(file));
    let file =
        files.iter().find(|file| file.exists()).unwrap_or_else(|| panic!("{} has no root", krate.name));
    std::fs::read_to_string(file).unwrap()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn software_is_no_std() {
    let crates = workspace();
    for name in SOFTWARE.iter().chain(&SHARED) {
        let root = crate_root(&crates[*name]);
        assert!(attributes(&root).contains("no_std"), "{name} does not say #![no_std]");
        // Only tests may bring it back.
        for (n, line) in root.lines().enumerate().filter(|(_, line)| line.contains("extern crate std")) {
            let before = root.lines().nth(n.wrapping_sub(1)).unwrap_or_default();
            assert!(before.contains("cfg(test)"), "{name}: {line}");
        }
    }
}

/// The files that may hold `unsafe`, by crate: guest memory, and what a child does between fork and exec.
const UNSAFE: [(&str, &str); 2] = [("bus", "ram.rs"), ("cosim", "process.rs")];

#[test]
fn unsafe_code_is_in_the_memory_backend_and_where_qemu_is_started_and_nowhere_else() {
    for krate in workspace().values() {
        let attributes = attributes(&crate_root(krate));
        let allowed: Vec<_> =
            UNSAFE.iter().filter(|(k, _)| *k == krate.name).map(|(_, file)| *file).collect();
        let rule = if allowed.is_empty() { "forbid(unsafe_code)" } else { "deny(unsafe_code)" };
        assert!(attributes.contains(rule), "{} does not say #![{rule}]", krate.name);
        let mut files = Vec::new();
        sources(&krate.folder.join("src"), &mut files);
        let found: Vec<_> = files
            .iter()
            .filter(|file| std::fs::read_to_string(file).unwrap().contains("allow(unsafe_code)"))
            .map(|file| file.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(found, allowed, "{}", krate.name);
    }
}

#[test]
fn crates_take_the_workspace_s_lints_and_versions() {
    for krate in workspace().values() {
        let manifest = std::fs::read_to_string(krate.folder.join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{}", krate.name);
        let mut section = "";
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section.ends_with("dependencies]") && line.contains('=') && !line.starts_with('#') {
                assert!(
                    line.contains("workspace = true"),
                    "{}: `{line}` has a version of its own",
                    krate.name
                );
            }
        }
    }
}
