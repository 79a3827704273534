//! Items for a person; colours only where the terminal shows them.

use std::io::Write;

use anstyle::{AnsiColor, Style};
use portcullis_explain::{LineKind, Story};

use super::{Item, Sink};

/// Text on standard output.
#[derive(Default)]
pub struct Human {
    step: u32,
}

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const fn colour(c: AnsiColor) -> Style {
    Style::new().fg_color(Some(anstyle::Color::Ansi(c)))
}
const GREEN: Style = colour(AnsiColor::Green);
const RED: Style = colour(AnsiColor::Red);
const YELLOW: Style = colour(AnsiColor::Yellow);
const CYAN: Style = colour(AnsiColor::Cyan);

/// The colour of a story's line.
const fn style_of(kind: LineKind) -> Style {
    match kind {
        LineKind::Fault | LineKind::BadDescriptor => RED,
        LineKind::Stale => YELLOW,
        LineKind::Result => GREEN,
        LineKind::Descriptor => CYAN,
        LineKind::Stream | LineKind::Bank | LineKind::Tlb => Style::new(),
    }
}

fn print_story(out: &mut impl Write, story: &Story) -> std::io::Result<()> {
    // `Display` aligns the columns; its lines are the title and then one per step.
    let text = story.to_string();
    for (i, line) in text.lines().enumerate() {
        let style = match i.checked_sub(1).and_then(|n| story.lines.get(n)) {
            Some(l) => style_of(l.kind),
            None => BOLD,
        };
        writeln!(out, "       {style}{line}{style:#}")?;
    }
    Ok(())
}

impl Human {
    fn print(&mut self, out: &mut impl Write, item: &Item) -> std::io::Result<()> {
        match item {
            Item::Start { scenario, title, about } => {
                self.step = 0;
                writeln!(out, "\n{BOLD}{scenario}{BOLD:#}: {title}")?;
                for line in about {
                    writeln!(out, "  {DIM}{line}{DIM:#}")?;
                }
            }
            Item::Step { text } => {
                self.step += 1;
                writeln!(out, "  {BOLD}{}. {text}{BOLD:#}", self.step)?;
            }
            Item::Say { text } => writeln!(out, "     {text}")?,
            Item::Boot { text } => {
                for line in text.lines() {
                    writeln!(out, "     {DIM}smmu: {line}{DIM:#}")?;
                }
            }
            Item::Transfer { engine, stream, access, iova, len, done, error, .. } => {
                write!(out, "     {engine} (stream {stream:#x}) {access} {iova} +{len}: ")?;
                match error {
                    None => writeln!(out, "{GREEN}ok{GREEN:#}")?,
                    Some(e) => writeln!(out, "{RED}{e}{RED:#}, {done} of {len} bytes done")?,
                }
            }
            Item::Explain { story, .. } => print_story(out, story)?,
            Item::Fault { story, causes, .. } => {
                print_story(out, story)?;
                for (i, cause) in causes.iter().enumerate() {
                    let head = if i == 0 { "likely cause:" } else { "or:" };
                    let text = cause.to_string();
                    let mut lines = text.lines();
                    writeln!(
                        out,
                        "       {YELLOW}{head:>13}{YELLOW:#} {}",
                        lines.next().unwrap_or_default()
                    )?;
                    for line in lines {
                        writeln!(out, "                     {line}")?;
                    }
                }
            }
            Item::Stale { text } => writeln!(out, "     {YELLOW}{text}{YELLOW:#}")?,
            Item::Report { device, text, kernel } => {
                let device = device.as_deref().unwrap_or("unknown device");
                writeln!(out, "     {RED}reported to {device}{RED:#}: {text}")?;
                for line in kernel {
                    writeln!(out, "       {DIM}{line}{DIM:#}")?;
                }
            }
            Item::Check { ok: true, text } => writeln!(out, "     {GREEN}✓{GREEN:#} {text}")?,
            Item::Check { ok: false, text } => writeln!(out, "     {RED}✗ {text}{RED:#}")?,
            Item::End { scenario, passed, checks, failed, error } => match (passed, error) {
                (true, _) => {
                    writeln!(out, "  {GREEN}passed{GREEN:#} {scenario}: {checks} expectations held")?
                }
                (false, Some(e)) => writeln!(out, "  {RED}failed{RED:#} {scenario}: {e}")?,
                (false, None) => {
                    writeln!(
                        out,
                        "  {RED}failed{RED:#} {scenario}: {failed} of {checks} expectations did not hold"
                    )?;
                }
            },
            Item::Summary { board, passed, failed } => {
                let style = if failed.is_empty() { GREEN } else { RED };
                write!(out, "\n{style}{board}: {passed} passed, {} failed{style:#}", failed.len())?;
                if failed.is_empty() { writeln!(out)? } else { writeln!(out, " ({})", failed.join(", "))? }
            }
        }
        Ok(())
    }
}

impl Sink for Human {
    fn emit(&mut self, item: &Item) {
        // A closed pipe ends the printing, not the run.
        let _ = self.print(&mut anstream::stdout().lock(), item);
    }
}
