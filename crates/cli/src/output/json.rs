//! One JSON object a line.

use std::io::Write;

use super::{Item, Sink};

/// JSON lines on standard output.
pub struct Json;

impl Sink for Json {
    fn emit(&mut self, item: &Item) {
        // A closed pipe ends the printing, not the run.
        if let Ok(line) = serde_json::to_string(item) {
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
}
