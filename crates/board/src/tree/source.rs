//! Files: `.dtb` as they are, `.dts` through the device tree compiler.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use super::blob::MAX_BYTES;
use super::{Tree, TreeError};

/// The device tree compiler.
const DTC: &str = "dtc";
/// How much of what dtc prints is kept.
const MAX_MESSAGE: u64 = 4096;

impl Tree {
    /// Loads a file: a blob, or source (`.dts`, `.dtso`) through `dtc`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TreeError> {
        let path = path.as_ref();
        Self::from_dtb(&blob_of(path, DTC)?).map_err(|e| e.in_file(path))
    }

    /// Loads a file and applies overlays to it, in order. Overlays may be `.dtbo` or source.
    pub fn load_with_overlays<P: AsRef<Path>>(
        path: impl AsRef<Path>,
        overlays: &[P],
    ) -> Result<Self, TreeError> {
        let mut tree = Self::load(path)?;
        for overlay in overlays {
            let overlay = overlay.as_ref();
            let blob = blob_of(overlay, DTC)?;
            tree = tree.apply_overlay(&blob).map_err(|e| e.in_file(overlay))?;
        }
        Ok(tree)
    }
}

/// The blob that a file holds or compiles to.
pub(super) fn blob_of(path: &Path, dtc: &str) -> Result<Vec<u8>, TreeError> {
    let source = path.extension().is_some_and(|e| e == "dts" || e == "dtso" || e == "dtsi");
    if source { compile(path, dtc) } else { read(path) }.map_err(|error| match error {
        TreeError::Read { .. } => error,
        other => other.in_file(path),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, TreeError> {
    let failed = |source| TreeError::Read { path: path.into(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() > MAX_BYTES {
        return Err(TreeError::TooLarge { bytes: bytes.len() as u64, limit: MAX_BYTES as u64 });
    }
    Ok(bytes)
}

fn compile(path: &Path, dtc: &str) -> Result<Vec<u8>, TreeError> {
    let failed = |source| TreeError::Read { path: path.into(), source };
    // dtc's own message for a missing file is less clear.
    std::fs::File::open(path).map_err(failed)?;
    // A file name that begins with a dash would be an option.
    let file = if path.is_relative() { Path::new(".").join(path) } else { path.to_path_buf() };
    let mut child = Command::new(dtc)
        .args(["-@", "-I", "dts", "-O", "dtb", "-o", "-"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => TreeError::DtcMissing { program: dtc.into() },
            _ => TreeError::Dtc { message: format!("it cannot be started: {source}") },
        })?;
    let errors = child.stderr.take();
    // Both pipes are read at once, or dtc could block on the one that nobody reads.
    let messages = std::thread::spawn(move || {
        let mut kept = Vec::new();
        if let Some(mut errors) = errors {
            let _ = errors.by_ref().take(MAX_MESSAGE).read_to_end(&mut kept);
            let _ = std::io::copy(&mut errors, &mut std::io::sink());
        }
        kept
    });
    let mut blob = Vec::new();
    let read = match child.stdout.take() {
        Some(output) => output.take(MAX_BYTES as u64 + 1).read_to_end(&mut blob),
        None => Ok(0),
    };
    if blob.len() > MAX_BYTES {
        let _ = child.kill();
    }
    let status = child.wait();
    let messages = messages.join().unwrap_or_default();
    if blob.len() > MAX_BYTES {
        return Err(TreeError::TooLarge { bytes: blob.len() as u64, limit: MAX_BYTES as u64 });
    }
    match (status, read) {
        (Ok(status), Ok(_)) if status.success() => Ok(blob),
        _ => Err(TreeError::Dtc { message: explain(&String::from_utf8_lossy(&messages), path) }),
    }
}

/// The errors of what dtc printed, without its warnings, and a hint where the reason is a usual one.
fn explain(printed: &str, path: &Path) -> String {
    let errors: Vec<&str> =
        printed.lines().filter(|l| !l.contains("Warning") && !l.trim().is_empty()).collect();
    let mut message = if errors.is_empty() { printed.trim().to_owned() } else { errors.join("; ") };
    let preprocess = std::fs::read_to_string(path)
        .is_ok_and(|text| text.lines().any(|l| l.starts_with("#include") || l.starts_with("#define")));
    if preprocess {
        message.push_str(" (it uses the C preprocessor: run it through `cpp -nostdinc -undef -x assembler-with-cpp` first)");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_compiler_is_said_to_be_missing() {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../../boards/zynqmp-thesis.dts");
        let error = blob_of(Path::new(source), "no-such-dtc").unwrap_err().to_string();
        assert!(error.contains("`no-such-dtc`, which was not found on PATH"), "{error}");
        assert!(error.contains("zynqmp-thesis.dts"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        for name in ["/nowhere/board.dtb", "/nowhere/board.dts"] {
            let error = Tree::load(name).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cannot read {name}: ")), "{error}");
        }
    }

    #[test]
    fn warnings_of_dtc_are_left_out_of_its_errors() {
        let printed = "a.dts:1.2-3.4: Warning (x): y\nError: a.dts:9.1-2 syntax error\nFATAL ERROR: no\n";
        assert_eq!(
            explain(printed, Path::new("/nowhere")),
            "Error: a.dts:9.1-2 syntax error; FATAL ERROR: no"
        );
    }
}
