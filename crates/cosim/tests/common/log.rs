//! What a kernel prints: its log with priorities (`dmesg -r`), /proc/interrupts.

use std::collections::BTreeMap;

/// Priorities (linux/kern_levels.h): 4 is a warning, lower is worse.
const WARNING: u8 = 4;
/// What a kernel prints when it finds fault with itself, whatever the priority.
const OWN_FAULTS: [&str; 7] =
    ["WARNING:", "BUG:", "Oops", "Call trace", "Unable to handle", "rcu: INFO", "Internal error"];
/// Drivers that have to be content.
const DRIVERS: [&str; 3] = ["arm-smmu", "iommu", "zynqmp-dma"];

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub level: u8,
    /// Without priority and time.
    pub text: String,
}

impl Record {
    /// From `<6>[    1.183983] arm-smmu ...`.
    pub fn read(line: &str) -> Option<Self> {
        let (priority, rest) = line.trim_end().strip_prefix('<')?.split_once('>')?;
        let text = match rest.strip_prefix('[').and_then(|r| r.split_once("] ")) {
            Some((time, text)) if time.trim().parse::<f64>().is_ok() => text,
            _ => rest,
        };
        Some(Self { level: priority.parse::<u32>().ok()? as u8 & 7, text: text.into() })
    }

    /// Something that a kernel must not have to say.
    pub fn is_trouble(&self) -> bool {
        OWN_FAULTS.iter().any(|w| self.text.contains(w))
            || (self.level <= WARNING && DRIVERS.iter().any(|d| self.text.contains(d)))
    }

    /// What the device's driver says, without driver and device.
    pub fn of<'a>(&'a self, driver: &str) -> Option<&'a str> {
        let (_, text) = self.text.strip_prefix(driver)?.strip_prefix(' ')?.split_once(": ")?;
        Some(text)
    }
}

/// What a driver says in these records.
pub fn of<'a>(records: &'a [Record], driver: &str) -> Vec<&'a str> {
    records.iter().filter_map(|r| r.of(driver)).collect()
}

/// The records as one text, for a parser of logs.
pub fn text(records: &[Record]) -> String {
    records.iter().map(|r| format!("{}\n", r.text)).collect()
}

/// `6.12.117+deb13-arm64` as (6, 12).
pub fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-', '+']).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// /proc/interrupts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interrupts {
    /// By everything that follows the counts: chip, number, trigger, names.
    lines: BTreeMap<String, u64>,
}

impl Interrupts {
    pub fn read(lines: &[&str]) -> Self {
        let mut found = Self::default();
        for line in lines {
            let Some((_, rest)) = line.split_once(':') else { continue };
            let words: Vec<&str> = rest.split_whitespace().collect();
            let cpus = words.iter().take_while(|w| w.bytes().all(|b| b.is_ascii_digit())).count();
            // The number of a GIC's interrupt follows its name, so only counts come first.
            let count = words.iter().take(cpus).filter_map(|w| w.parse::<u64>().ok()).sum();
            found.lines.insert(words[cpus..].join(" "), count);
        }
        found
    }

    /// Lines that contain all of these words, and their counts together.
    pub fn count(&self, words: &[&str]) -> u64 {
        self.matching(words).map(|(_, n)| n).sum()
    }

    /// Whether there is such a line.
    pub fn has(&self, words: &[&str]) -> bool {
        self.matching(words).next().is_some()
    }

    fn matching(&self, words: &[&str]) -> impl Iterator<Item = (&String, &u64)> {
        self.lines.iter().filter(|(l, _)| words.iter().all(|w| l.contains(w)))
    }
}
