//! The kit: a QEMU and guest kernels that `scripts/linux-kit` put into the cache directory.
//!
//! `kit.json` says what is there. It is read as if a stranger had written it: a path that leaves the kit's directory,
//! by `..`, by being absolute or through a symbolic link, is refused.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

/// The only format of `kit.json` there is.
const FORMAT: u64 = 1;
/// Largest `kit.json` accepted; a real one has some hundred bytes.
const MAX_MANIFEST: u64 = 1 << 20;

/// What a kernel of the kit is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// A distribution's kernel and its own modules.
    A,
    /// The same kernel with drivers of its own source built out of tree.
    B,
    /// A kernel built for this: shared virtual addresses, iommufd, DMA heaps.
    C,
}

/// One guest kernel with its initial file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Short name: `6.12`, `7.2`, `own`.
    pub name: String,
    /// What `uname -r` prints in the guest.
    pub release: String,
    /// The package and version it came from.
    pub package: String,
    /// The kernel image, for `-kernel`.
    pub image: PathBuf,
    /// The initial file system, for `-initrd`.
    pub initrd: PathBuf,
    /// What it can be used for.
    pub tiers: Vec<Tier>,
}

/// The kit, checked: every file that it names was there when it was loaded.
#[derive(Clone, Debug)]
pub struct Kit {
    dir: PathBuf,
    qemu_program: PathBuf,
    qemu_version: String,
    kernels: Vec<Kernel>,
    default: usize,
}

/// Why there is no usable kit.
#[derive(Debug, thiserror::Error)]
pub enum KitError {
    /// No `kit.json`.
    #[error("there is no kit in {}: run scripts/linux-kit, which fetches QEMU and guest kernels", .dir.display())]
    Absent {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// `kit.json` cannot be read.
    #[error("{}: {source}", .path.display())]
    Unreadable {
        /// The manifest.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `kit.json` is there and makes no sense.
    #[error(
        "{} is not a manifest that this version understands ({reason}): run scripts/linux-kit again",
        .path.display()
    )]
    Malformed {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A path leaves the kit's directory.
    #[error("{}: {field} is {path:?}, which is not inside the kit: run scripts/linux-kit again", .manifest.display())]
    Outside {
        /// The manifest.
        manifest: PathBuf,
        /// Which entry.
        field: String,
        /// The path as written.
        path: String,
    },
    /// A file is missing.
    #[error(
        "{}: {field} names {}, which is no file: run scripts/linux-kit again",
        .manifest.display(),
        .path.display()
    )]
    Missing {
        /// The manifest.
        manifest: PathBuf,
        /// Which entry.
        field: String,
        /// The file.
        path: PathBuf,
    },
    /// No kernel of that name.
    #[error("the kit has no kernel {name:?}; it has {}: run scripts/linux-kit to get more", .there.join(", "))]
    NoSuchKernel {
        /// The name asked for.
        name: String,
        /// The names there are.
        there: Vec<String>,
    },
}

#[derive(Deserialize)]
struct Format {
    format: u64,
}

#[derive(Deserialize)]
struct RawKit {
    qemu: RawQemu,
    kernels: Vec<RawKernel>,
    default: String,
}

#[derive(Deserialize)]
struct RawQemu {
    version: String,
    program: String,
}

#[derive(Deserialize)]
struct RawKernel {
    name: String,
    release: String,
    #[serde(default)]
    package: String,
    image: String,
    initrd: String,
    tiers: Vec<Tier>,
}

impl Kit {
    /// Reads and checks `dir/kit.json`.
    ///
    /// # Errors
    /// [`KitError`]; each says to run `scripts/linux-kit` where that helps.
    pub fn load(dir: &Path) -> Result<Self, KitError> {
        let manifest = dir.join("kit.json");
        let text = match File::open(&manifest) {
            Ok(file) => {
                let mut text = Vec::new();
                file.take(MAX_MANIFEST + 1)
                    .read_to_end(&mut text)
                    .map_err(|source| KitError::Unreadable { path: manifest.clone(), source })?;
                text
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Err(KitError::Absent { dir: dir.to_owned() });
            }
            Err(source) => return Err(KitError::Unreadable { path: manifest, source }),
        };
        let malformed = |reason: String| KitError::Malformed { path: manifest.clone(), reason };
        if text.len() as u64 > MAX_MANIFEST {
            return Err(malformed(format!("more than {MAX_MANIFEST} bytes")));
        }
        // The format first: a newer one may have another shape altogether.
        let format: Format = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if format.format != FORMAT {
            return Err(malformed(format!("format {}, expected {FORMAT}", format.format)));
        }
        let raw: RawKit = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;

        let files = Files { dir, manifest: &manifest };
        let qemu_program = files.resolve("qemu.program", &raw.qemu.program)?;
        let mut kernels: Vec<Kernel> = Vec::with_capacity(raw.kernels.len());
        for kernel in raw.kernels {
            if kernel.name.is_empty() || kernels.iter().any(|other| other.name == kernel.name) {
                return Err(malformed(format!("a kernel name is empty or used twice: {:?}", kernel.name)));
            }
            let field = |what: &str| format!("{what} of kernel {}", kernel.name);
            let image = files.resolve(&field("image"), &kernel.image)?;
            let initrd = files.resolve(&field("initrd"), &kernel.initrd)?;
            kernels.push(Kernel {
                name: kernel.name,
                release: kernel.release,
                package: kernel.package,
                image,
                initrd,
                tiers: kernel.tiers,
            });
        }
        let default = kernels
            .iter()
            .position(|kernel| kernel.name == raw.default)
            .ok_or_else(|| malformed(format!("the default kernel {:?} is not in the list", raw.default)))?;
        Ok(Self { dir: dir.to_owned(), qemu_program, qemu_version: raw.qemu.version, kernels, default })
    }

    /// Where `scripts/linux-kit` puts the kit: `$PORTCULLIS_CACHE`, else `$XDG_CACHE_HOME`, else `~/.cache`, and below
    /// that `portcullis/linux-kit`. `None` without a home directory.
    #[must_use]
    pub fn default_dir() -> Option<PathBuf> {
        default_dir(|name| std::env::var_os(name))
    }

    /// The kit's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kit's QEMU. Its version is the manifest's word; [`super::Qemu::find`] asks the program itself.
    #[must_use]
    pub fn qemu(&self) -> (&Path, &str) {
        (&self.qemu_program, &self.qemu_version)
    }

    /// Every kernel, in the manifest's order.
    #[must_use]
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }

    /// The kernel with this name or this release, or the default one.
    ///
    /// # Errors
    /// [`KitError::NoSuchKernel`] with the names there are.
    pub fn kernel(&self, name: Option<&str>) -> Result<&Kernel, KitError> {
        let found = match name {
            None => self.kernels.get(self.default),
            Some(name) => self
                .kernels
                .iter()
                .find(|kernel| kernel.name == name)
                .or_else(|| self.kernels.iter().find(|kernel| kernel.release == name)),
        };
        found.ok_or_else(|| KitError::NoSuchKernel {
            name: name.unwrap_or_default().to_owned(),
            there: self.kernels.iter().map(|kernel| kernel.name.clone()).collect(),
        })
    }
}

fn default_dir(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    // Like the shell's ${X:-Y}: empty is the same as unset.
    let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("PORTCULLIS_CACHE")
        .or_else(|| set("XDG_CACHE_HOME"))
        .or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("portcullis").join("linux-kit"))
}

struct Files<'a> {
    dir: &'a Path,
    manifest: &'a Path,
}

impl Files<'_> {
    /// The file that an entry names, if it lies inside the kit and is there.
    fn resolve(&self, field: &str, written: &str) -> Result<PathBuf, KitError> {
        let outside = || KitError::Outside {
            manifest: self.manifest.to_owned(),
            field: field.to_owned(),
            path: written.to_owned(),
        };
        let relative = Path::new(written);
        let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if written.is_empty() || written.contains('\0') || !relative.components().all(plain) {
            return Err(outside());
        }
        let path = self.dir.join(relative);
        let missing = || KitError::Missing {
            manifest: self.manifest.to_owned(),
            field: field.to_owned(),
            path: path.clone(),
        };
        let (Ok(real), Ok(root)) = (path.canonicalize(), self.dir.canonicalize()) else {
            return Err(missing());
        };
        if !real.starts_with(&root) {
            return Err(outside());
        }
        if !real.is_file() {
            return Err(missing());
        }
        // The real path: it is absolute, so that it means the same from every working directory.
        Ok(real)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use serde_json::{Value, json};

    use super::*;

    fn manifest() -> Value {
        json!({
            "format": 1,
            "made_by": "a newer script may say more",
            "qemu": { "version": "11.1.3", "package": "qemu-system-arm", "program": "qemu/qemu-system-aarch64" },
            "kernels": [
                { "name": "6.12", "release": "6.12.107+deb13-arm64", "package": "linux-image", "image": "k/6/vmlinuz",
                  "initrd": "k/6/initrd.gz", "tiers": ["a", "b"] },
                { "name": "own", "release": "7.2.13", "image": "./k/7/vmlinuz", "initrd": "k/7/initrd.gz", "tiers": ["c"] },
            ],
            "default": "6.12",
        })
    }

    fn kit_with(manifest: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in
            ["qemu/qemu-system-aarch64", "k/6/vmlinuz", "k/6/initrd.gz", "k/7/vmlinuz", "k/7/initrd.gz"]
        {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        fs::write(dir.path().join("kit.json"), manifest).unwrap();
        dir
    }

    fn load(manifest: &Value) -> Result<Kit, KitError> {
        let dir = kit_with(manifest.to_string().as_bytes());
        Kit::load(dir.path())
    }

    #[test]
    fn kernels_are_found_by_name_by_release_and_by_default() {
        let kit = load(&manifest()).unwrap();
        assert_eq!(kit.kernel(None).unwrap().name, "6.12");
        assert_eq!(kit.kernel(Some("own")).unwrap().tiers, [Tier::C]);
        assert_eq!(kit.kernel(Some("6.12.107+deb13-arm64")).unwrap().name, "6.12");
        assert!(kit.qemu().0.is_absolute());
        let error = kit.kernel(Some("5.4")).unwrap_err().to_string();
        assert!(error.contains("\"5.4\"") && error.contains("6.12, own"), "{error}");
    }

    #[test]
    fn an_absent_kit_tells_which_script_to_run() {
        let dir = tempfile::tempdir().unwrap();
        let error = Kit::load(&dir.path().join("none")).unwrap_err();
        assert!(matches!(error, KitError::Absent { .. }));
        assert!(error.to_string().contains("scripts/linux-kit"));
    }

    #[test]
    fn paths_that_leave_the_kit_are_refused() {
        for path in ["../etc/passwd", "/etc/passwd", "k/../../x", "", "a\0b", "/"] {
            let mut value = manifest();
            value["kernels"][0]["image"] = json!(path);
            let error = load(&value).unwrap_err();
            assert!(matches!(error, KitError::Outside { .. }), "{path:?}: {error}");
        }
    }

    #[test]
    fn a_symbolic_link_out_of_the_kit_is_refused_and_one_inside_is_not() {
        let outside = tempfile::NamedTempFile::new().unwrap();
        let mut value = manifest();
        value["qemu"]["program"] = json!("qemu/link");
        let dir = kit_with(value.to_string().as_bytes());
        let link = dir.path().join("qemu/link");
        symlink(outside.path(), &link).unwrap();
        assert!(matches!(Kit::load(dir.path()).unwrap_err(), KitError::Outside { .. }));
        fs::remove_file(&link).unwrap();
        symlink("qemu-system-aarch64", &link).unwrap();
        assert!(Kit::load(dir.path()).is_ok());
    }

    #[test]
    fn a_missing_file_and_a_directory_in_its_place_are_named() {
        for path in ["k/6/nothing", "k/6"] {
            let mut value = manifest();
            value["kernels"][0]["initrd"] = json!(path);
            let error = load(&value).unwrap_err();
            assert!(matches!(error, KitError::Missing { .. }), "{error}");
            assert!(error.to_string().contains("initrd of kernel 6.12"), "{error}");
        }
    }

    #[test]
    fn nonsense_in_the_manifest_is_an_error_and_never_a_panic() {
        let whole = manifest().to_string();
        let dir = kit_with(b"");
        for end in 0..whole.len() {
            fs::write(dir.path().join("kit.json"), &whole.as_bytes()[..end]).unwrap();
            assert!(Kit::load(dir.path()).is_err(), "cut at {end}");
        }
        let broken = [
            json!([]),
            json!({ "format": 2 }),
            json!({ "format": "1" }),
            json!({ "format": 1, "qemu": {}, "kernels": [], "default": "x" }),
            {
                let mut value = manifest();
                value["default"] = json!("7.2");
                value
            },
            {
                let mut value = manifest();
                value["kernels"][1]["name"] = json!("6.12");
                value
            },
            {
                let mut value = manifest();
                value["kernels"][1]["tiers"] = json!(["z"]);
                value
            },
        ];
        for value in broken {
            assert!(matches!(load(&value).unwrap_err(), KitError::Malformed { .. }), "{value}");
        }
        for bytes in [&b"\xff\xfe"[..], "[".repeat(100_000).as_bytes(), &vec![b' '; 2 << 20]] {
            let dir = kit_with(bytes);
            assert!(matches!(Kit::load(dir.path()).unwrap_err(), KitError::Malformed { .. }));
        }
    }

    #[test]
    fn the_default_directory_follows_the_script() {
        let with = |pairs: &[(&str, &str)]| {
            default_dir(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
        };
        let home = ("HOME", "/home/u");
        assert_eq!(with(&[home]), Some("/home/u/.cache/portcullis/linux-kit".into()));
        assert_eq!(with(&[home, ("XDG_CACHE_HOME", "/c")]), Some("/c/portcullis/linux-kit".into()));
        assert_eq!(with(&[home, ("XDG_CACHE_HOME", "")]), Some("/home/u/.cache/portcullis/linux-kit".into()));
        assert_eq!(
            with(&[home, ("XDG_CACHE_HOME", "/c"), ("PORTCULLIS_CACHE", "/p")]),
            Some("/p/portcullis/linux-kit".into())
        );
        assert_eq!(with(&[]), None);
    }
}
