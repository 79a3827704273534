//! The documentation of scenarios has everything that a script can call.

use std::path::Path;

/// The names that are registered with an engine.
fn registered(source: &str) -> Vec<&str> {
    let after = |call: &str| source.split(call).skip(1).map(str::trim_start).collect::<Vec<_>>();
    let calls = ["register_fn(", "register_get("].map(after).concat();
    calls
        .iter()
        .map(|rest| name_of(rest).unwrap_or_else(|| panic!("no name: {}", &rest[..rest.len().min(40)])))
        .collect()
}

fn name_of(rest: &str) -> Option<&str> {
    rest.strip_prefix('"')?.split('"').next()
}

#[test]
fn every_function_of_the_api_is_in_the_documentation() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(root.join("../../docs/scenarios.md")).unwrap();
    let mut count = 0;
    for file in std::fs::read_dir(root.join("src/scenario/api")).unwrap() {
        let path = file.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap();
        for name in registered(&source) {
            count += 1;
            // In a table: `name(arguments)` or, of a property, `name`; perhaps after another in the same cell.
            let found = [format!("`{name}("), format!("`{name}`"), format!(".{name}("), format!(".{name}`")];
            assert!(
                found.iter().any(|f| docs.contains(f)),
                "docs/scenarios.md does not have {name}, of {}",
                path.display()
            );
        }
    }
    assert!(count > 60, "{count}");
}

#[test]
fn the_example_of_the_documentation_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(root.join("../../docs/scenarios.md")).unwrap();
    let example = docs.split("```rust\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("example.rhai");
    std::fs::write(&file, example).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_portcullis"));
    let output = command.args(["run", "zynqmp-thesis"]).arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
