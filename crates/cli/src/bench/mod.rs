//! `portcullis bench`: the performance goals, measured through the public API, each against a reference timed in the
//! same process.
//!
//! The unit is one uncontended atomic `fetch_add` (RMW). Every figure is the median of several samples, and the RMW is
//! timed again next to each sample. Samples count only from moments in which the machine is quiet: the module `timing` says how that is told.

mod dma;
mod pages;
mod peers;
mod port;
mod rig;
mod start;
mod timing;

use serde::Serialize;

use rig::{V2, V3};

/// What a figure is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// At most so many of the unit.
    AtMost(f64),
    /// At least so many of the unit.
    AtLeast(f64),
    /// No goal: a peer or a reference.
    None,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Number of the goal in the list of performance goals; 0 for references and peers.
    pub goal_number: u32,
    /// What was measured.
    pub what: String,
    /// The figure, in `figure_unit`.
    pub figure: f64,
    /// Its unit.
    pub figure_unit: &'static str,
    /// The figure as a ratio to the reference.
    pub ratio: f64,
    /// The unit of the ratio.
    pub ratio_unit: &'static str,
    /// The goal for the ratio.
    pub goal: Goal,
}

impl Figure {
    /// True if the goal is met (or there is none).
    pub fn met(&self) -> bool {
        match self.goal {
            Goal::AtMost(g) => self.ratio <= g,
            Goal::AtLeast(g) => self.ratio >= g,
            Goal::None => true,
        }
    }
}

/// A group of measurements.
type Suite = (&'static str, fn() -> Vec<Figure>);

const SUITES: [Suite; 24] = [
    ("hit-v2", port::hits::<V2>),
    ("hit-v3", port::hits::<V3>),
    ("threads-v2", port::threads::<V2>),
    ("threads-v3", port::threads::<V3>),
    ("churn-v2", port::invalidated::<V2>),
    ("churn-v3", port::invalidated::<V3>),
    ("miss-v2", port::misses::<V2>),
    ("miss-v3", port::misses::<V3>),
    ("nested-v2", port::nested::<V2>),
    ("nested-v3", port::nested::<V3>),
    ("copy-v2", port::copies::<V2>),
    ("copy-v3", port::copies::<V3>),
    ("read8-v2", port::small_reads::<V2>),
    ("read8-v3", port::small_reads::<V3>),
    ("invalidate-v2", port::invalidations::<V2>),
    ("invalidate-v3", port::invalidations::<V3>),
    ("pagetable", pages::map_unmap),
    ("iova", dma::addresses),
    ("dma", dma::mappings),
    ("loop", dma::loops),
    ("vms", dma::machines),
    ("memory", port::memory),
    ("start", start::start),
    ("peers", peers::peers),
];

/// Names of the groups, for messages.
pub fn names() -> impl Iterator<Item = &'static str> {
    SUITES.iter().map(|s| s.0)
}

/// A line of the table, and how it was taken.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The line.
    #[serde(flatten)]
    pub figure: Figure,
    /// Its group found too few moments in which the machine was quiet, so that other samples count as well.
    pub busy: bool,
}

/// Runs every group whose name contains `filter`. Where a later group finds out that the machine can be quieter than a group thought,
/// that one runs once more.
pub fn run(filter: &str) -> Vec<Row> {
    timing::find_best_pace();
    let one = |suite: fn() -> Vec<Figure>| {
        let before = timing::impatient();
        let figures = suite();
        let busy = timing::impatient() != before;
        let rows = figures.into_iter().map(|figure| Row { figure, busy }).collect::<Vec<_>>();
        (rows, timing::best_pace())
    };
    let wanted: Vec<_> = SUITES.iter().filter(|(name, _)| name.contains(filter)).collect();
    let first: Vec<_> = wanted.iter().map(|(_, suite)| one(*suite)).collect();
    let again = wanted.iter().zip(first).map(
        |((_, suite), (rows, pace))| {
            if timing::is_quiet(pace) { rows } else { one(*suite).0 }
        },
    );
    again.flatten().collect()
}

/// The table for a person.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::from(
        "goal  what                                                    figure          ratio          goal\n",
    );
    for Row { figure: f, busy } in rows {
        let number = if f.goal_number == 0 { "-".into() } else { f.goal_number.to_string() };
        let (goal, verdict) = match f.goal {
            Goal::AtMost(g) => (format!("<= {g}"), if f.met() { "met" } else { "MISSED" }),
            Goal::AtLeast(g) => (format!(">= {g}"), if f.met() { "met" } else { "MISSED" }),
            Goal::None => (String::new(), ""),
        };
        let busy = if *busy { " (busy machine)" } else { "" };
        let line = format!(
            "{number:>4}  {:<52} {:>9.2} {:<6} {:>7.2} {:<8} {goal:<9} {verdict}{busy}",
            f.what, f.figure, f.figure_unit, f.ratio, f.ratio_unit
        );
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out.push_str(&timing::remark());
    out
}
