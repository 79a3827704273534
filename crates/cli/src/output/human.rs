//! Items for a person; colours only where the terminal shows them.
//!
//! Lines are wrapped. A row of transfers that differ in their address only is counted, and a fault that was told
//! before with other numbers is told in short (see [`repeat`](super::repeat)); with `--explain` nothing is left out.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use portcullis_explain::{Cause, Line, LineKind, Story};

use super::repeat::Told;
use super::wrap::wrap;
use super::{Item, Report, Sink};

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const fn colour(c: AnsiColor) -> Style {
    Style::new().fg_color(Some(anstyle::Color::Ansi(c)))
}
const GREEN: Style = colour(AnsiColor::Green);
const RED: Style = colour(AnsiColor::Red);
const YELLOW: Style = colour(AnsiColor::Yellow);
const CYAN: Style = colour(AnsiColor::Cyan);

/// Columns before what happens inside a step.
const INDENT: usize = 5;
/// Columns before a story, and before what a cause says.
const STORY: usize = 7;
const CAUSE: usize = 21;
/// Transfers of a row that are printed one by one.
const ROW: u32 = 3;

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

/// Text on standard output.
pub struct Human {
    explain: bool,
    /// The last report at boot.
    boot: String,
    step: u32,
    told: Told,
    /// The stories printed with the last transfer, which its fault need not repeat.
    explained: Vec<Story>,
    /// That transfer was printed: the next story is another one's.
    transferred: bool,
    row: Option<Row>,
    /// The last fault was told in short, so its report is too.
    short: bool,
}

/// Transfers that differ in their address only.
struct Row {
    of: (String, (u32, Option<u32>), &'static str, usize),
    count: u32,
    last: String,
}

/// Writes wrapped text: `head` as it is, then `text` from column `start` on, later lines indented by `indent`.
fn paragraph(
    out: &mut dyn Write,
    head: &str,
    (start, indent): (usize, usize),
    style: Style,
    text: &str,
) -> io::Result<()> {
    write!(out, "{head}")?;
    for (i, line) in wrap(text, start, indent).iter().enumerate() {
        if i > 0 {
            write!(out, "{:indent$}", "")?;
        }
        writeln!(out, "{style}{line}{style:#}")?;
    }
    Ok(())
}

fn indented(out: &mut dyn Write, indent: usize, style: Style, text: &str) -> io::Result<()> {
    text.lines().try_for_each(|line| paragraph(out, &" ".repeat(indent), (indent, indent), style, line))
}

/// Joins lines to paragraphs, one a line; an empty line ends one.
fn paragraphs(lines: &[String]) -> String {
    let mut text = String::new();
    for line in lines {
        match line.trim() {
            "" => text.push('\n'),
            line => {
                if !text.is_empty() && !text.ends_with('\n') {
                    text.push(' ');
                }
                text.push_str(line);
            }
        }
    }
    text
}

/// Title, and those lines of a story that `wanted` says; columns are aligned over the whole story.
fn print_story(out: &mut dyn Write, story: &Story, wanted: impl Fn(&Line) -> bool) -> io::Result<()> {
    indented(out, STORY, BOLD, &story.title)?;
    // `Display` aligns the columns; its lines are the title and then one per step.
    let text = story.to_string();
    for (line, aligned) in story.lines.iter().zip(text.lines().skip(1)).filter(|(l, _)| wanted(l)) {
        let width = |s: &str| s.chars().count();
        let hang = STORY + width(aligned).saturating_sub(width(&line.text));
        paragraph(out, &" ".repeat(STORY), (STORY, hang), style_of(line.kind), aligned)?;
    }
    Ok(())
}

fn print_cause(out: &mut dyn Write, i: usize, cause: &Cause) -> io::Result<()> {
    let head = if i == 0 { "likely cause:" } else { "or:" };
    let head = format!("       {YELLOW}{head:>13}{YELLOW:#} ");
    paragraph(out, &head, (CAUSE, CAUSE), Style::new(), &cause.what)?;
    let notes = cause.evidence.iter().map(|e| ("because:", e)).chain([("check:", &cause.fix)]);
    for (head, text) in notes {
        let (column, head) = (CAUSE + 11, format!("{:CAUSE$}  {head:8} ", ""));
        paragraph(out, &head, (column, column), Style::new(), text)?;
    }
    Ok(())
}

impl Human {
    /// With `explain`, every translation is told.
    pub fn new(explain: bool) -> Self {
        Self {
            explain,
            boot: String::new(),
            step: 0,
            told: Told::default(),
            explained: Vec::new(),
            transferred: false,
            row: None,
            short: false,
        }
    }

    /// Ends a row of transfers with their count.
    fn end_row(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let Some(Row { of: (_, _, access, _), count, last }) = self.row.take() else { return Ok(()) };
        match count.checked_sub(ROW) {
            None | Some(0) => Ok(()),
            Some(more) => writeln!(out, "     {DIM}... and {more} more {access}s, to {last}: ok{DIM:#}"),
        }
    }

    fn transfer(&mut self, out: &mut dyn Write, item: &Item) -> io::Result<()> {
        let Item::Transfer { engine, stream, substream, access, iova, len, done, error, .. } = item else {
            return Ok(());
        };
        self.transferred = true;
        let of = (engine.clone(), (*stream, *substream), *access, *len);
        if error.is_none() {
            match &mut self.row {
                Some(row) if row.of == of => {
                    row.count += 1;
                    row.last.clone_from(iova);
                    if row.count > ROW {
                        return Ok(());
                    }
                }
                _ => {
                    self.end_row(out)?;
                    self.row = Some(Row { of, count: 1, last: iova.clone() });
                }
            }
        } else {
            self.end_row(out)?;
        }
        let substream = substream.map_or(String::new(), |s| format!(" substream {s:#x}"));
        let head = format!("     {engine} (stream {stream:#x}{substream}) {access} {iova} +{len}: ");
        let (style, text) = match error {
            None => (GREEN, "ok".to_string()),
            Some(e) => (RED, format!("{e}, {done} of {len} bytes done")),
        };
        paragraph(out, &head, (head.chars().count(), INDENT + 2), style, &text)
    }

    fn fault(
        &mut self,
        out: &mut dyn Write,
        engine: &str,
        story: &Story,
        causes: &[Cause],
    ) -> io::Result<()> {
        let before = self.told.before(engine, story, causes);
        self.short = before.is_some();
        let Some(before) = before else {
            if !self.explained.contains(story) {
                print_story(out, story, |_| true)?;
            }
            return causes.iter().enumerate().try_for_each(|(i, c)| print_cause(out, i, c));
        };
        if self.explain && !self.explained.contains(story) {
            print_story(out, story, |_| true)?;
        } else if !self.explain {
            let telling = |l: &Line| {
                matches!(
                    l.kind,
                    LineKind::BadDescriptor | LineKind::Fault | LineKind::Result | LineKind::Stale
                ) || l.label.starts_with("S2CR")
                    || l.label == "STE[1]"
            };
            print_story(out, story, telling)?;
        }
        let whose = if before == engine { "an earlier one".to_string() } else { format!("that of {before}") };
        let what = causes.first().map(|c| format!(": {}", c.what)).unwrap_or_default();
        let text = format!("as {whose} above, with other ids and addresses{what}");
        let head = format!("{:STORY$}  {DIM}", "");
        paragraph(out, &head, (STORY + 2, STORY + 2), DIM, &text)
    }

    fn report(&self, out: &mut dyn Write, report: &Report) -> io::Result<()> {
        let global = matches!(report.about, "global error" | "records lost");
        let nobody = if global { "the SMMU's driver" } else { "unknown device" };
        let device = report.device.as_deref().unwrap_or(nobody);
        let head = format!("     {RED}reported to {device}{RED:#}: ");
        let start = INDENT + "reported to : ".len() + device.chars().count();
        paragraph(out, &head, (start, INDENT + 2), Style::new(), &report.text)?;
        let lines = if self.short { 1 } else { usize::MAX };
        // The words of the kernel stay as they are: people search for them.
        let mut kernel = report.kernel.iter().take(lines);
        kernel.try_for_each(|line| writeln!(out, "       {DIM}{line}{DIM:#}"))
    }

    fn print(&mut self, out: &mut dyn Write, item: &Item) -> io::Result<()> {
        if !matches!(item, Item::Transfer { .. }) {
            self.end_row(out)?;
        }
        match item {
            Item::Start { scenario, title, about } => {
                (self.step, self.told, self.short) = (0, Told::default(), false);
                self.explained.clear();
                writeln!(out)?;
                let start = scenario.chars().count() + 2;
                paragraph(out, &format!("{BOLD}{scenario}{BOLD:#}: "), (start, 2), Style::new(), title)?;
                indented(out, 2, DIM, &paragraphs(about))
            }
            Item::Step { text } => {
                self.step += 1;
                indented(out, 2, BOLD, &format!("{}. {text}", self.step))
            }
            Item::Say { text } => indented(out, INDENT, Style::new(), text),
            // The same board comes up the same way each time.
            Item::Boot { text } if self.boot == *text => Ok(()),
            Item::Boot { text } => {
                self.boot.clone_from(text);
                let mut lines = text.lines();
                lines.try_for_each(|line| writeln!(out, "     {DIM}smmu: {line}{DIM:#}"))
            }
            Item::Transfer { .. } => self.transfer(out, item),
            Item::Explain { story, .. } => {
                if std::mem::take(&mut self.transferred) {
                    self.explained.clear();
                }
                self.explained.push(story.clone());
                print_story(out, story, |_| true)
            }
            Item::Fault { engine, story, causes } => self.fault(out, engine, story, causes),
            Item::Stale { text, .. } => indented(out, INDENT, YELLOW, text),
            Item::Ats { engine, text, refused, .. } => {
                let style = if *refused { RED } else { DIM };
                paragraph(out, "     ", (INDENT, INDENT + 2), style, &format!("{engine}: {text}"))
            }
            Item::Message { address, data, lpi } => {
                writeln!(out, "     {DIM}message: {data:#x} written to {address}, LPI {lpi}{DIM:#}")
            }
            Item::Report(report) => self.report(out, report),
            Item::Check { ok: true, text, .. } => {
                let head = format!("     {GREEN}✓{GREEN:#} ");
                paragraph(out, &head, (INDENT + 2, INDENT + 2), Style::new(), text.trim_end())
            }
            Item::Check { ok: false, text, line } => {
                let line = line.map(|n| format!(" (line {n})")).unwrap_or_default();
                let head = format!("     {RED}✗{RED:#} ");
                paragraph(out, &head, (INDENT + 2, INDENT + 2), RED, &format!("{}{line}", text.trim_end()))
            }
            Item::End { scenario, passed: true, checks, .. } => {
                writeln!(out, "  {GREEN}passed{GREEN:#} {scenario}: {checks} expectations held")
            }
            Item::End { scenario, checks, failed, error, .. } => {
                let why = match error {
                    Some(error) => error.clone(),
                    None => format!("{failed} of {checks} expectations did not hold"),
                };
                let start = 11 + scenario.chars().count();
                let head = format!("  {RED}failed{RED:#} {scenario}: ");
                paragraph(out, &head, (start, INDENT), Style::new(), &why)
            }
            Item::Summary { board, passed, failed } => {
                let style = if failed.is_empty() { GREEN } else { RED };
                let names =
                    if failed.is_empty() { String::new() } else { format!(" ({})", failed.join(", ")) };
                writeln!(out, "\n{style}{board}: {passed} passed, {} failed{style:#}{names}", failed.len())
            }
        }
    }
}

impl Sink for Human {
    fn emit(&mut self, item: &Item) -> io::Result<()> {
        let mut out = anstream::stdout().lock();
        self.print(&mut out, item)
    }
}
