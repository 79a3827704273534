//! Boards and scenarios: those in the binary, and those in files.
//!
//! A board's scenarios are the `.rhai` files in the folder that has its name. A file `order` in that folder lists the
//! names that come first, one a line; the others follow by name. A folder with a file `board` has scenarios for the
//! tree of the board that this file names.

use std::path::Path;

use portcullis_board::{Tree, TreeError};
use thiserror::Error;

/// A shipped board.
pub struct Board {
    /// Its name.
    pub name: &'static str,
    /// The name of its device tree: its own, or another board's.
    pub tree: &'static str,
    /// Its device tree.
    pub dtb: &'static [u8],
    /// Contents of its file `order`.
    pub order: &'static str,
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
        let text = |line: &str| {
            let text = line.strip_prefix("//!")?;
            Some(text.strip_prefix(' ').unwrap_or(text).trim_end().to_string())
        };
        let mut lines = self.source.lines().map_while(text);
        (lines.next().unwrap_or_default(), lines.collect())
    }
}

/// A board as the command line named it.
#[derive(Debug)]
pub struct Chosen {
    /// Name or file.
    pub name: String,
    /// Its tree.
    pub tree: Tree,
    /// All its scenarios, in the order to run them.
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
    #[error("{board} has no scenario {name:?}; {known}")]
    NoScenario {
        /// The board.
        board: String,
        /// What was asked for.
        name: String,
        /// What it has instead.
        known: String,
    },
    /// A scenario file, or the folder it should be in, cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
}

impl ChooseError {
    fn read(path: &Path, error: std::io::Error) -> Self {
        Self::Read { path: path.display().to_string(), error }
    }
}

/// Finds a board by name or file.
///
/// # Errors
/// Names what is not there, or the node and property of the tree that is wrong.
pub fn choose(name: &str) -> Result<Chosen, ChooseError> {
    if let Some(board) = BOARDS.iter().find(|b| b.name == name) {
        let tree = Tree::from_dtb(board.dtb)?;
        let scenario = |s: &Script| Scenario { name: s.name.into(), source: s.source.into() };
        let scenarios = sorted(board.scenarios.iter().map(scenario).collect(), board.order);
        return Ok(Chosen { name: name.into(), tree, scenarios });
    }
    let path = Path::new(name);
    if !path.exists() {
        let shipped = BOARDS.iter().map(|b| b.name).collect::<Vec<_>>().join(", ");
        return Err(ChooseError::NoBoard { name: name.into(), shipped });
    }
    let tree = Tree::load(name)?;
    Ok(Chosen { name: name.into(), tree, scenarios: beside(path)? })
}

/// The names that an `order` file lists.
fn listed(order: &str) -> impl Iterator<Item = &str> {
    order.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'))
}

/// The scenarios that `order` lists, in its order, then the others by name.
fn sorted(mut scenarios: Vec<Scenario>, order: &str) -> Vec<Scenario> {
    let place = |name: &str| listed(order).position(|l| l == name).unwrap_or(usize::MAX);
    scenarios.sort_by_cached_key(|s| (place(&s.name), s.name.clone()));
    scenarios
}

/// The scenarios in the folder beside a device tree that has its name.
fn beside(path: &Path) -> Result<Vec<Scenario>, ChooseError> {
    let folder = path.with_extension("");
    if folder == path || !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut scenarios = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(|e| ChooseError::read(&folder, e))? {
        let file = entry.map_err(|e| ChooseError::read(&folder, e))?.path();
        if file.extension().is_some_and(|e| e == "rhai") {
            scenarios.push(read_scenario(&file)?);
        }
    }
    let order = folder.join("order");
    let order = if order.is_file() { read(&order)? } else { String::new() };
    Ok(sorted(scenarios, &order))
}

fn read(file: &Path) -> Result<String, ChooseError> {
    std::fs::read_to_string(file).map_err(|e| ChooseError::read(file, e))
}

fn read_scenario(file: &Path) -> Result<Scenario, ChooseError> {
    let name = file.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Scenario { name, source: read(file)? })
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
            self.scenarios.iter().find(|s| s.name == *name).cloned().ok_or_else(|| self.no_scenario(name))
        };
        names.iter().map(find).collect()
    }

    fn no_scenario(&self, name: &str) -> ChooseError {
        let names: Vec<_> = self.scenarios.iter().map(|s| s.name.as_str()).collect();
        let known = if names.is_empty() {
            "it has none of its own; name a .rhai file".to_string()
        } else {
            format!("it has: {}", names.join(", "))
        };
        ChooseError::NoScenario { board: self.name.clone(), name: name.into(), known }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_scenarios_come_first_and_the_others_by_name() {
        let scenario = |name: &str| Scenario { name: name.into(), source: String::new() };
        let all = ["c", "b", "a", "z"].map(scenario).to_vec();
        let order = "# first the last\nz\n\nnot-there\nc\n";
        let names: Vec<_> = sorted(all, order).into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["z", "c", "a", "b"]);
    }

    #[test]
    fn every_name_in_an_order_file_is_a_scenario() {
        for board in BOARDS {
            for name in listed(board.order) {
                assert!(board.scenarios.iter().any(|s| s.name == name), "{}: {name}", board.name);
            }
        }
    }

    #[test]
    fn every_shipped_scenario_has_a_title_and_says_more() {
        for board in BOARDS {
            for s in board.scenarios {
                let scenario = Scenario { name: s.name.into(), source: s.source.into() };
                let (title, about) = scenario.about();
                assert!(!title.is_empty() && !about.is_empty(), "{}: {}", board.name, s.name);
            }
        }
    }
}
