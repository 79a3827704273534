//! Real device trees: those of Debian's arm64 kernel, which `scripts/fetch-debian-dtbs` puts into a cache.

mod common;

use std::path::PathBuf;

use common::{file, run};

/// DMA through the SMMU by the first FPD channel; its descriptors in memory as well.
const SCRIPT: &str = r#"//! DMA behind the SMMU
//! On any board with an FPD DMA.
let board = boot(#{ cpu_cache: true });
let channel = board.channel("fpd-dma0");
expect(channel.stream == 0x14e8, "stream 0x14e8");
let domain = board.domain();
domain.map(0x70000000, 0x10000000, 4096);
domain.map(0x70002000, 0x10002000, 4096);
board.attach(channel, domain);
board.fill32(0x10000000, 0xcafebeef, 4096);
board.fill32(0x10002000, 0, 4096);
board.clean(0x10000000, 4096);
board.clean(0x10002000, 4096);
expect(channel.memcpy(0x70002000, 0x70000000, 4096).ok, "copied");
board.invalidate(0x10002000, 4096);
expect(board.count32(0x10002000, 0xcafebeef, 4096) == 1024, "all of it");
expect(!channel.copy(0x70004000, 0x70000000, 4096).ok, "and not where nothing is mapped");
let faults = board.faults();
expect(faults.len() == 1 && faults[0].device == "fpd-dma0", "reported to the channel");
"#;

/// `${PORTCULLIS_CACHE:-${XDG_CACHE_HOME:-~/.cache}}/portcullis/debian-dtbs`, as in the script.
fn trees() -> Vec<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || set("HOME").map(|home| home.join(".cache"));
    let base = set("PORTCULLIS_CACHE").or_else(|| set("XDG_CACHE_HOME")).or_else(home);
    let Some(dir) = base.map(|b| b.join("portcullis/debian-dtbs")) else { return Vec::new() };
    let entries = |dir: PathBuf| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut files: Vec<_> =
        entries(dir).flat_map(entries).filter(|f| f.extension().is_some_and(|e| e == "dtb")).collect();
    files.sort();
    files
}

#[test]
fn dma_runs_behind_the_smmu_of_every_debian_board_once_it_is_protected() {
    let trees = trees();
    if trees.is_empty() {
        eprintln!("skipped: no device trees of Debian in the cache, run scripts/fetch-debian-dtbs");
        return;
    }
    let script = file("debian.rhai", SCRIPT);
    for tree in trees {
        let tree = tree.to_str().unwrap();
        // As it comes, the SMMU is off and nobody is behind it.
        let bare = run(&["run", tree, &script]);
        assert_eq!(bare.code, 1, "{tree}: {}{}", bare.stdout, bare.stderr);
        let ran = run(&["run", tree, &script, "--protect", "/axi/dma-controller@fd500000"]);
        assert_eq!(ran.code, 0, "{tree}: {}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("nothing is mapped at 0x70004000"), "{tree}: {}", ran.stdout);
    }
}
