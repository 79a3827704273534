//! Boards and scenarios: those in the binary, and those in files.

use std::path::Path;

use portcullis_board::{Tree, TreeError};
use thiserror::Error;

/// A shipped board.
pub struct Board {
    /// Its name.
    pub name: &'static str,
    /// Its device tree.
    pub dtb: &'static [u8],
    /// Its scenarios, by name.
    pub scenarios: &'static [Script],
}

/// A shipped scenario.
pub struct Script {
    /// Its name.
    pub name: &'static str,
    /// Its source.
    pub source: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/boards.rs"));

/// A scenario to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// Its source.
    pub source: String,
}

impl Scenario {
    /// The comment at the top: the first line is the title, the rest says more.
    pub fn about(&self) -> (String, Vec<String>) {
        let mut lines = self.source.lines().map_while(|l| l.strip_prefix("//! ").or(l.strip_prefix("//!")));
        let title = lines.next().unwrap_or_default().trim().to_string();
        (title, lines.map(str::to_string).collect())
    }
}

/// A board as the command line named it.
#[derive(Debug)]
pub struct Chosen {
    /// Name or file.
    pub name: String,
    /// Its tree.
    pub tree: Tree,
    /// All its scenarios.
    pub scenarios: Vec<Scenario>,
}

/// What the command line named is not there or not usable.
#[derive(Debug, Error)]
pub enum ChooseError {
    /// No such board.
    #[error("there is no board {name:?}: it is neither a shipped board ({shipped}) nor a .dtb or .dts file")]
    NoBoard {
        /// What was asked for.
        name: String,
        /// Names of shipped boards.
        shipped: String,
    },
    /// The device tree is not usable.
    #[error("{0}")]
    Tree(#[from] TreeError),
    /// A scenario is not there.
    #[error("{board} has no scenario {name:?}; it has: {known}")]
    NoScenario {
        /// The board.
        board: String,
        /// What was asked for.
        name: String,
        /// Names of its scenarios.
        known: String,
    },
    /// A scenario file cannot be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
}

/// Finds a board by name or file.
///
/// # Errors
/// Names what is not there, or the node and property of the tree that is wrong.
pub fn choose(name: &str) -> Result<Chosen, ChooseError> {
    if let Some(board) = BOARDS.iter().find(|b| b.name == name) {
        let tree = Tree::from_dtb(board.dtb)?;
        let scenario = |s: &Script| Scenario { name: s.name.into(), source: s.source.into() };
        return Ok(Chosen {
            name: name.into(),
            tree,
            scenarios: board.scenarios.iter().map(scenario).collect(),
        });
    }
    let path = Path::new(name);
    if !path.exists() {
        let shipped = BOARDS.iter().map(|b| b.name).collect::<Vec<_>>().join(", ");
        return Err(ChooseError::NoBoard { name: name.into(), shipped });
    }
    let tree = Tree::load(name)?;
    Ok(Chosen { name: name.into(), tree, scenarios: beside(path)? })
}

/// The scenarios in the folder beside a device tree that has its name.
fn beside(path: &Path) -> Result<Vec<Scenario>, ChooseError> {
    let folder = path.with_extension("");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |error| ChooseError::Read { path: folder.display().to_string(), error };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|e| e == "rhai") {
            files.push(file);
        }
    }
    files.sort();
    files.iter().map(|f| read_scenario(f)).collect()
}

fn read_scenario(file: &Path) -> Result<Scenario, ChooseError> {
    let source = std::fs::read_to_string(file)
        .map_err(|error| ChooseError::Read { path: file.display().to_string(), error })?;
    let name = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Scenario { name, source })
}

impl Chosen {
    /// The scenarios of these names (all if there are none); a name that ends in `.rhai` is a file.
    ///
    /// # Errors
    /// Names the scenario that is not there.
    pub fn select(&self, names: &[String]) -> Result<Vec<Scenario>, ChooseError> {
        if names.is_empty() {
            return Ok(self.scenarios.clone());
        }
        let find = |name: &String| {
            if name.ends_with(".rhai") {
                return read_scenario(Path::new(name));
            }
            self.scenarios.iter().find(|s| s.name == *name).cloned().ok_or_else(|| ChooseError::NoScenario {
                board: self.name.clone(),
                name: name.clone(),
                known: self.scenarios.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", "),
            })
        };
        names.iter().map(find).collect()
    }
}
