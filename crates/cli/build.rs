//! Puts the shipped boards and their scenarios into the binary, so that it runs from anywhere.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn sorted(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
    // By name: a board comes before the variants that are named after it.
    paths.sort_by_key(|p| stem(p));
    Ok(paths)
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

fn main() -> io::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(io::Error::other)?);
    let boards = root.join("../../boards").canonicalize()?;
    println!("cargo::rerun-if-changed={}", boards.display());
    let mut out = String::from("pub(crate) const BOARDS: &[Board] = &[\n");
    for entry in sorted(&boards)? {
        // A tree, or a folder of scenarios for another board's tree, which its file `board` names.
        let (name, dtb) = if has_extension(&entry, "dtb") {
            (stem(&entry), entry)
        } else if entry.join("board").is_file() {
            let tree = fs::read_to_string(entry.join("board"))?;
            (stem(&entry), boards.join(format!("{}.dtb", tree.trim())))
        } else {
            continue;
        };
        let scenarios = boards.join(&name);
        let order = scenarios.join("order");
        let order = if order.is_file() { fs::read_to_string(order)? } else { String::new() };
        let _ = writeln!(
            out,
            "Board {{ name: {name:?}, tree: {:?}, dtb: include_bytes!({:?}), order: {order:?}, scenarios: &[",
            stem(&dtb),
            dtb.display().to_string()
        );
        if scenarios.is_dir() {
            println!("cargo::rerun-if-changed={}", scenarios.display());
            for script in sorted(&scenarios)?.iter().filter(|p| has_extension(p, "rhai")) {
                let _ = writeln!(
                    out,
                    "Script {{ name: {:?}, source: include_str!({:?}) }},",
                    stem(script),
                    script.display().to_string()
                );
            }
        }
        out.push_str("] },\n");
    }
    out.push_str("];\n");
    let target = PathBuf::from(env::var("OUT_DIR").map_err(io::Error::other)?).join("boards.rs");
    fs::write(target, out)
}
