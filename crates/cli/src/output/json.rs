//! One JSON object a line.

use std::io::{self, Write};

use super::{Item, Sink};

/// JSON lines on standard output.
pub struct Json;

impl Sink for Json {
    fn emit(&mut self, item: &Item) -> io::Result<()> {
        let mut line = serde_json::to_string(item)?;
        line.push('\n');
        io::stdout().write_all(line.as_bytes())
    }
}
