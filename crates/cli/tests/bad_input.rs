//! Bad input: exit code 2 and one message that names what is wrong; never a panic.

mod common;

use std::process::Stdio;

use common::{Ran, command, file, patch, path, run, thesis};

/// Everything that takes a board.
const USES: [&[&str]; 3] = [&["run"], &["scenarios"], &["machine"]];

#[track_caller]
fn every_use_refuses(board: &str, words: &[&str]) {
    for before in USES {
        run(&[before, &[board]].concat()).is_refused(words);
    }
}

#[test]
fn an_unknown_board_is_refused_with_the_boards_there_are() {
    every_use_refuses("no-such-board", &["\"no-such-board\"", "zynqmp-thesis", ".dtb or .dts"]);
}

#[test]
fn an_unknown_scenario_is_refused_with_those_there_are() {
    let ran = run(&["run", "zynqmp-thesis", "ps-dma", "no-such"]);
    ran.is_refused(&["\"no-such\"", "it has: ps-dma, ps-smmu-map"]);
    let ran = run(&["run", "zynqmp-thesis", "no-such.rhai"]);
    ran.is_refused(&["cannot read no-such.rhai"]);
    let board = file("alone.dtb", thesis());
    run(&["run", &board]).is_refused(&["no scenarios of its own", ".rhai"]);
    run(&["run", &board, "ps-dma"]).is_refused(&["\"ps-dma\"", "none of its own"]);
}

#[test]
fn a_truncated_tree_is_refused_wherever_it_ends() {
    let tree = thesis();
    for length in [0, 1, 4, 39, 40, 100, tree.len() / 2, tree.len() - 1] {
        let board = file(&format!("truncated-{length}.dtb"), &tree[..length]);
        every_use_refuses(&board, &[&board, "not a valid flattened device tree"]);
    }
}

#[test]
fn garbage_is_refused() {
    let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let board = file("garbage.dtb", &noise);
    every_use_refuses(&board, &[&board, "not a valid flattened device tree"]);
    // With a header that is right, at every place.
    let tree = thesis();
    for at in (56..tree.len()).step_by(tree.len() / 40) {
        let mut damaged = tree.clone();
        let end = (at + 64).min(damaged.len());
        damaged[at..end].copy_from_slice(&noise[..end - at]);
        let ran = run(&["machine", &file("damaged.dtb", damaged)]);
        ran.is_calm();
        assert!(ran.code == 0 || ran.code == 2, "at {at}: {}", ran.stderr);
        assert!(ran.stderr.lines().count() <= 1, "at {at}: {}", ran.stderr);
    }
}

/// The cells of a property.
fn cells<const N: usize>(cells: [u32; N]) -> Vec<u8> {
    cells.into_iter().flat_map(u32::to_be_bytes).collect()
}

/// The phandle of the shipped board's SMMU, from the `iommus` of its PL writer.
fn smmu_phandle(tree: &[u8]) -> u32 {
    (1..100).find(|p| tree.windows(8).any(|w| w == cells([*p, 0x200]))).unwrap()
}

#[test]
fn a_missing_phandle_is_refused_by_node_and_property() {
    let tree = thesis();
    let phandle = smmu_phandle(&tree);
    let broken = patch(tree, &cells([phandle, 0x200]), &cells([0x7777, 0x200]));
    let board = file("phandle.dtb", broken);
    every_use_refuses_but_scenarios(&board, &["/axi/pl-writer@b0000000", "`iommus`", "0x7777"]);
}

#[test]
fn overlapping_registers_are_refused_by_node_and_property() {
    let to = cells([0, 0xffa8_0000, 0, 0x1000]);
    let broken = patch(thesis(), &cells([0, 0xffa9_0000, 0, 0x1000]), &to);
    let board = file("overlap.dtb", broken);
    every_use_refuses_but_scenarios(&board, &["dma-controller@ffa", "`reg`", "overlap"]);
}

#[test]
fn a_board_that_cannot_be_built_is_refused() {
    let memory = |size| cells([0, 0, 0, size, 8, 0, 0, 0x8000_0000]);
    let board = file("odd-memory.dtb", patch(thesis(), &memory(0x8000_0000), &memory(0x7fff_f001)));
    let script = file("any.rhai", "expect(true, \"\");\n");
    let ran = run(&["run", &board, &script]);
    ran.is_refused(&["/memory@0", "0x7ffff001"]);
}

/// A tree that is well formed and wrong: its list of scenarios can be read all the same.
#[track_caller]
fn every_use_refuses_but_scenarios(board: &str, words: &[&str]) {
    let script = file("unused.rhai", "expect(true, \"\");\n");
    run(&["run", board, &script]).is_refused(words);
    run(&["machine", board]).is_refused(words);
    run(&["machine", board, "--protect", "pl_writer"]).is_refused(words);
}

#[test]
fn source_without_dtc_is_refused_with_what_to_install() {
    let source = common::board_file("zynqmp-thesis.dts");
    let ran: Ran = command(&["machine", source.to_str().unwrap()]).env("PATH", "").output().unwrap().into();
    ran.is_refused(&["zynqmp-thesis.dts", "dtc", "device-tree-compiler"]);
}

#[test]
fn source_that_does_not_compile_is_refused_with_its_line() {
    if !common::have_dtc("source_that_does_not_compile_is_refused_with_its_line") {
        return;
    }
    let source = file("broken.dts", "/dts-v1/;\n/ {\n\tmodel = ;\n};\n");
    every_use_refuses(&source, &["broken.dts", ":3."]);
}

#[test]
fn a_file_that_cannot_be_read_is_refused() {
    every_use_refuses(env!("CARGO_TARGET_TMPDIR"), &["cannot read", env!("CARGO_TARGET_TMPDIR")]);
    let folder = path("folder.rhai");
    let _ = std::fs::create_dir(&folder);
    run(&["run", "zynqmp-thesis", &folder]).is_refused(&["cannot read", "folder.rhai"]);
    let binary = file("binary.rhai", [0xff, 0xfe, 0x00]);
    run(&["run", "zynqmp-thesis", &binary]).is_refused(&["cannot read", "binary.rhai", "UTF-8"]);
    every_use_refuses("/dev/null", &["/dev/null"]);
}

#[cfg(unix)]
#[test]
fn a_file_without_permission_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let board = file("secret.dtb", thesis());
    std::fs::set_permissions(&board, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&board).is_ok() {
        eprintln!("skipped: this user reads files whatever their permissions are");
        return;
    }
    every_use_refuses(&board, &["cannot read", "secret.dtb"]);
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_before_the_run() {
    let trace = path("no-such-folder/trace.json");
    run(&["run", "zynqmp-thesis", "t0sz-mismatch", "--trace", &trace]).is_refused(&["cannot write", &trace]);
    let folder = env!("CARGO_TARGET_TMPDIR");
    run(&["run", "zynqmp-thesis", "t0sz-mismatch", "--trace", folder]).is_refused(&["cannot write", folder]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for args in
        [&["run", "zynqmp-thesis", "t0sz-mismatch"][..], &["machine", "zynqmp-thesis"], &["boards", "--json"]]
    {
        let ran: Ran = command(args).stdout(full()).output().unwrap().into();
        ran.is_refused(&["standard output"]);
    }
    let ran = run(&["run", "zynqmp-thesis", "t0sz-mismatch", "--trace", "/dev/full"]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("cannot write /dev/full"), "{}", ran.stderr);
    ran.is_calm();
}

#[test]
fn a_closed_pipe_is_quiet() {
    for args in [
        &["run", "zynqmp-thesis"][..],
        &["run", "zynqmp-thesis", "--json"],
        &["run", "zynqmp-thesis", "unmapped-address", "--explain"],
        &["machine", "zynqmp-thesis"],
        &["machine", "zynqmp-thesis", "--json"],
        &["scenarios", "zynqmp-thesis"],
        &["--help"],
    ] {
        let mut child = command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        assert_eq!(output.status.code(), Some(0), "{args:?}");
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in
        [&[][..], &["no-such-command"], &["run"], &["run", "zynqmp-thesis", "--no-such-option"], &["machine"]]
    {
        let ran = run(args);
        assert_eq!(ran.code, 2, "{args:?}");
        assert_eq!(ran.stdout, "", "{args:?}");
        assert!(ran.stderr.contains("Usage:"), "{args:?}: {}", ran.stderr);
    }
    run(&["bench", "no-such-group"]).is_refused(&["\"no-such-group\""]);
    run(&["machine", "zynqmp-thesis", "--protect", "nobody"]).is_refused(&["`nobody`"]);
    run(&["run", "zynqmp-thesis", "--protect", "nobody"]).is_refused(&["`nobody`"]);
}
