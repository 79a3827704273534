//! Every shipped scenario passes; what they are and in which order they run.

mod common;

use common::{board_file, run};

fn names(args: &[&str]) -> Vec<String> {
    let list = run(args).json();
    list.as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap().to_string()).collect()
}

#[test]
fn every_scenario_of_every_board_passes_on_its_own() {
    let mut failed = Vec::new();
    for board in names(&["boards", "--json"]) {
        let scenarios = names(&["scenarios", &board, "--json"]);
        assert!(!scenarios.is_empty(), "{board}");
        for scenario in scenarios {
            let ran = run(&["run", &board, &scenario]);
            let summary = format!("{board}: 1 passed, 0 failed");
            if ran.code != 0 || !ran.stdout.contains(&summary) || !ran.stderr.is_empty() {
                failed.push(format!("{board} {scenario}:\n{}{}", ran.stdout, ran.stderr));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn the_experiments_come_first_and_the_troubles_follow() {
    let boards = [
        "smmuv3",
        "smmuv3-noncoherent",
        "smmuv3-tour",
        "zynqmp-hp0-2dma",
        "zynqmp-thesis",
        "zynqmp-thesis-hpc1",
    ];
    assert_eq!(names(&["boards", "--json"]), boards);
    let expected = [
        "ps-dma",
        "ps-smmu-map",
        "pl-smmu-map",
        "pl-process",
        "wrong-stream-id",
        "unmapped-address",
        "instruction-fetch",
        "t0sz-mismatch",
        "pasize-mismatch",
        "cbar-type",
        "stale-tables",
        "stale-buffer",
        "many-domains",
        "stall-resume",
    ];
    assert_eq!(names(&["scenarios", "zynqmp-thesis", "--json"]), expected);
    // The same from files as from the binary.
    let file = board_file("zynqmp-thesis.dtb");
    assert_eq!(names(&["scenarios", file.to_str().unwrap(), "--json"]), expected);
}

#[test]
fn the_board_with_two_cores_shows_what_it_is_for() {
    let expected = [
        "host-loop",
        "two-vms",
        "isolation",
        "handover",
        "nested",
        "shared-group",
        "nic-behind-smmu",
        "uncached-or-stale",
        "heap-sharing",
        "first-map",
        "lazy-window",
        "heaps",
    ];
    assert_eq!(names(&["scenarios", "zynqmp-hp0-2dma", "--json"]), expected);
    let report = run(&["machine", "zynqmp-hp0-2dma"]).stdout;
    for text in [
        "AXI DMA /amba-pl/dma@a0010000 at 0xa0010000 on hp0: scatter-gather, 64 address bits",
        "streams 0xe83 0xe84 0xe85",
        "used by /dma-proxy-1",
        "bit 3 of IOU_INTERCONNECT_ROUTE",
    ] {
        assert!(report.contains(text), "{text:?} is not in:\n{report}");
    }
}

#[test]
fn the_tour_is_a_board_of_its_own_over_the_tree_of_another() {
    let expected = [
        "linear-table",
        "two-level-table",
        "bypass",
        "abort",
        "stage1",
        "stage2",
        "nested",
        "shared-domain",
        "three-processes",
        "stall-resume",
        "page-request",
        "ats-invalidation",
        "msi-events",
        "queue-overflow",
        "command-error",
        "privilege-override",
        "instruction-override",
        "stale-config",
    ];
    assert_eq!(names(&["scenarios", "smmuv3-tour", "--json"]), expected);
    let report = |board: &str| run(&["machine", board]).stdout;
    assert_eq!(report("smmuv3-tour"), report("smmuv3"));
    assert!(report("smmuv3-tour").contains("Arm SMMUv3 at 0x31000000"), "{}", report("smmuv3"));
    let ran = run(&["run", "smmuv3-tour"]);
    assert!(ran.stdout.ends_with(&format!("smmuv3-tour: {} passed, 0 failed\n", expected.len())));
}

#[test]
fn running_a_board_runs_all_of_it_and_ends_with_a_summary() {
    let all = names(&["scenarios", "zynqmp-thesis", "--json"]);
    let ran = run(&["run", "zynqmp-thesis"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let passed: Vec<_> = ran.stdout.lines().filter_map(|l| l.strip_prefix("  passed ")).collect();
    let passed: Vec<_> = passed.iter().map(|l| l.split(':').next().unwrap()).collect();
    assert_eq!(passed, all);
    assert_eq!(ran.stdout.lines().last().unwrap(), format!("zynqmp-thesis: {} passed, 0 failed", all.len()));
}

#[test]
fn scenarios_run_in_the_order_they_are_named() {
    let ran = run(&["run", "zynqmp-thesis", "t0sz-mismatch", "ps-dma"]);
    assert_eq!(ran.code, 0);
    let at = |what: &str| ran.stdout.find(what).unwrap();
    assert!(at("passed t0sz-mismatch") < at("passed ps-dma"));
    assert!(ran.stdout.ends_with("zynqmp-thesis: 2 passed, 0 failed\n"));
}

#[test]
fn every_scenario_passes_with_explanations_and_a_trace_as_well() {
    for board in ["zynqmp-thesis", "smmuv3-tour", "smmuv3", "smmuv3-noncoherent"] {
        let trace = common::path(&format!("explained-{board}.json"));
        let ran = run(&["run", board, "--explain", "--trace", &trace]);
        assert_eq!(ran.code, 0, "{}", ran.stdout.lines().last().unwrap_or_default());
    }
}

#[test]
fn a_source_tree_runs_as_its_blob_does() {
    if !common::have_dtc("a_source_tree_runs_as_its_blob_does") {
        return;
    }
    let source = board_file("zynqmp-thesis-hpc1.dts");
    let (source, board) = (source.to_str().unwrap(), "zynqmp-thesis-hpc1");
    let (from_source, shipped) = (run(&["run", source]), run(&["run", board]));
    assert_eq!(from_source.code, 0);
    assert_eq!(from_source.stdout.replace(source, board), shipped.stdout);
}

#[test]
fn every_shipped_source_compiles_to_the_blob_beside_it() {
    if !common::have_dtc("every_shipped_source_compiles_to_the_blob_beside_it") {
        return;
    }
    let boards = run(&["boards", "--json"]).json();
    let own = boards.as_array().unwrap().iter().filter(|b| b["name"] == b["tree"]);
    for board in own.map(|b| b["name"].as_str().unwrap()) {
        let report = |extension: &str| {
            let file = board_file(&format!("{board}.{extension}"));
            run(&["machine", file.to_str().unwrap(), "--json"]).json()
        };
        assert_eq!(report("dts"), report("dtb"), "compile {board}.dts again, see boards/README.md");
    }
}
