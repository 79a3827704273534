//! `portcullis decode`: what the lines of a kernel log about SMMUs say, in words and field by field.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use portcullis_explain::{Field, KernelLine, KernelMessage, parse_log};

/// A log larger than this is not read as a whole: nobody reads what would come of it.
const MOST: u64 = 64 << 20;

/// The text of a file, or of standard input where there is none or it is `-`. Bytes that are no UTF-8 are replaced.
///
/// # Errors
/// It cannot be read, or is too large; the message names it.
pub fn read(file: Option<&Path>) -> Result<String, String> {
    let file = file.filter(|f| *f != Path::new("-"));
    let name = file.map_or_else(|| "standard input".into(), |f| f.display().to_string());
    let failed = |e: io::Error| format!("cannot read {name}: {e}");
    let mut bytes = Vec::new();
    match file {
        Some(path) => File::open(path).map_err(failed)?.take(MOST + 1).read_to_end(&mut bytes),
        None => io::stdin().lock().take(MOST + 1).read_to_end(&mut bytes),
    }
    .map_err(failed)?;
    if bytes.len() as u64 > MOST {
        return Err(format!("{name} is larger than {} MiB: give the part that matters", MOST >> 20));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a log says about SMMUs, in its order.
pub fn decode(log: &str) -> Vec<KernelLine> {
    parse_log(log)
}

/// The same for a person.
pub fn text(lines: &[KernelLine]) -> String {
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        let next = lines.get(i + 1).map(|l| &l.message);
        let announced = matches!(next, Some(KernelMessage::EventRecord { .. }));
        if announced && matches!(line.message, KernelMessage::EventHead { .. }) {
            continue;
        }
        let (sentence, fields) = words(&line.message);
        let device = line.device.as_deref().map(|d| format!("{d}: ")).unwrap_or_default();
        // Writing to a String does not fail.
        let _ = writeln!(out, "{device}{sentence}");
        for field in fields {
            let _ = writeln!(out, "    {:<12} {}", field.name, field.value);
        }
    }
    out
}

fn words(message: &KernelMessage) -> (String, Vec<Field>) {
    let plain = |text: &str| (text.to_string(), Vec::new());
    match message {
        KernelMessage::ContextFault(line) => match line.record() {
            Some(record) => (record.to_string(), record.fields()),
            None => plain("a context fault of an SMMUv2; the line does not hold FSR and the address"),
        },
        KernelMessage::ContextFsr { fsr, stream } => {
            let stream = stream.map(|s| format!(", stream {s:#x}")).unwrap_or_default();
            (format!("a context fault of an SMMUv2: FSR {fsr:#010x}{stream}"), Vec::new())
        }
        KernelMessage::ContextFsynr0 { fsynr0 } => (format!("... FSYNR0 {fsynr0:#010x}"), Vec::new()),
        KernelMessage::ContextFar { far } => (format!("... address {far:#x}"), Vec::new()),
        KernelMessage::UnknownStream { stream } => (
            format!(
                "stream {stream:#x} sends transactions and no driver has set it up: is `iommus` of its master right?"
            ),
            Vec::new(),
        ),
        KernelMessage::UnexpectedGlobalFault => plain("a global fault of an SMMUv2; its registers follow"),
        KernelMessage::GlobalRegisters(record) => (record.to_string(), record.fields()),
        KernelMessage::EventHead { code } => {
            (format!("an event of code {code:#04x}; its words follow"), Vec::new())
        }
        KernelMessage::Word { value } => {
            (format!("a word that belongs to nothing: {value:#018x}"), Vec::new())
        }
        KernelMessage::EventRecord { record } => (record.to_string(), record.fields()),
        KernelMessage::Event(e) => {
            let client = e.client.as_deref().unwrap_or("a device that the kernel does not know");
            let mut text = format!("{} of {client}, stream {:#x}", e.event, e.stream);
            for (what, value) in [("at", e.iova), ("IPA", e.ipa.filter(|i| *i != 0)), ("fetch of", e.fetch)] {
                if let Some(value) = value {
                    let _ = write!(text, ", {what} {value:#x}");
                }
            }
            (text, Vec::new())
        }
        KernelMessage::EventDetail(d) => {
            let who = if d.privileged { "privileged" } else { "unprivileged" };
            let what = if d.instruction { "instruction fetch" } else { "data access" };
            let way = if d.read { "read" } else { "write" };
            let stall = if d.stall { format!("; it waits with STAG {:#x}", d.stag) } else { String::new() };
            (
                format!("... {who} {what}, {way}, refused by stage {} ({}){stall}", d.stage, d.class),
                Vec::new(),
            )
        }
        KernelMessage::EventsLost => plain("the event queue was full: events are lost"),
        KernelMessage::PageRequestsLost => plain("the page request queue was full: requests are lost"),
        KernelMessage::UnexpectedPageRequest => plain("a page request that no driver waits for; it follows"),
        KernelMessage::PageRequest(p) => {
            let rights: Vec<&str> = [("read", p.read), ("write", p.write), ("execute", p.execute)]
                .into_iter()
                .filter_map(|(name, has)| has.then_some(name))
                .collect();
            let last = if p.last { ", the last of its group" } else { "" };
            (
                format!(
                    "... stream {:#x} substream {:#x} asks for {:#x} to {}, group {}{last}",
                    p.stream,
                    p.substream,
                    p.iova,
                    rights.join(" and "),
                    p.group
                ),
                Vec::new(),
            )
        }
        KernelMessage::GlobalErrors { active } => (active.to_string(), active.fields()),
        KernelMessage::CommandError(e) => (e.to_string(), e.fields()),
        KernelMessage::SkippedCommand => plain("the driver replaced the command by CMD_SYNC"),
        KernelMessage::SyncTimeout { at, prod, cons } => (
            format!(
                "CMD_SYNC at index {at:#x} did not complete within the driver's time: CMDQ_PROD {prod:#x}, CMDQ_CONS {cons:#x}"
            ),
            Vec::new(),
        ),
    }
}
