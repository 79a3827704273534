//! What a script in the guest says on its console: lines that begin with `portcullis:`; and the kernel's last words.
//!
//! | Line | |
//! |---|---|
//! | `portcullis: up <seconds> <release> cpus=<n>` | the kit's `/init` has begun |
//! | `portcullis: mark <name> <pass\|fail> [<text>]` | something was looked at |
//! | `portcullis: done <status>` | the script ended |
//! | `Kernel panic - not syncing: <text>` | the kernel gives up |

use serde::Serialize;

/// Longest line that is looked at, and most marks that are kept.
const MAX_LINE: usize = 4096;
const MAX_MARKS: usize = 10_000;
const PREFIX: &str = "portcullis: ";
const PANIC: &str = "Kernel panic - not syncing: ";

/// Something that a script looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// What.
    pub name: String,
    /// It is as it should be.
    pub pass: bool,
    /// More about it.
    pub text: String,
}

/// What was said so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Marks {
    /// The kernel's release, once it is up.
    pub release: Option<String>,
    /// Seconds since boot when it was up, as the guest says it.
    pub up: Option<String>,
    /// Marks, in their order.
    pub marks: Vec<Mark>,
    /// How the script ended.
    pub done: Option<i32>,
    /// Why the kernel panicked, in its own words.
    pub panic: Option<String>,
    /// The line under way.
    #[serde(skip)]
    line: Vec<u8>,
}

impl Marks {
    /// More of the console.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &b in bytes {
            if b == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.line(&String::from_utf8_lossy(&line));
            } else if self.line.len() < MAX_LINE {
                self.line.push(b);
            }
        }
    }

    fn line(&mut self, line: &str) {
        // The kernel's lines may come in between, but never in the middle of ours.
        if let Some(at) = line.find(PANIC) {
            let words = line.get(at + PANIC.len()..).unwrap_or_default().trim();
            self.panic.get_or_insert_with(|| words.into());
        }
        let Some(at) = line.find(PREFIX) else { return };
        let mut words = line.get(at + PREFIX.len()..).unwrap_or_default().trim_end().splitn(4, ' ');
        let mut word = || words.next().unwrap_or_default().to_string();
        match word().as_str() {
            "up" => {
                self.up = Some(word());
                self.release = Some(word());
            }
            "mark" if self.marks.len() < MAX_MARKS => {
                let (name, pass) = (word(), word());
                self.marks.push(Mark { name, pass: pass == "pass", text: word() });
            }
            "done" => self.done = word().parse().ok(),
            _ => {}
        }
    }

    /// The script came to its end with status 0, looked at something, and found everything well, and the kernel lived.
    pub fn is_good(&self) -> bool {
        self.panic.is_none()
            && self.done == Some(0)
            && !self.marks.is_empty()
            && self.marks.iter().all(|m| m.pass)
    }

    /// A mark by its name; the last one of several.
    pub fn get(&self, name: &str) -> Option<&Mark> {
        self.marks.iter().rfind(|m| m.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_whatever_the_pieces_are() {
        let log = b"[    0.5] x\r\nportcullis: up 1.25 6.12.1-arm64 cpus=1\r\nportcullis: mark probe pass two words\r\n\
            portcullis: mark groups fail\r\nportcullis: done 0\r\n";
        for n in 1..log.len() {
            let mut marks = Marks::default();
            log.chunks(n).for_each(|c| marks.feed(c));
            assert_eq!(marks.release.as_deref(), Some("6.12.1-arm64"));
            assert_eq!(marks.get("probe").unwrap().text, "two words");
            assert!(!marks.get("groups").unwrap().pass && !marks.is_good());
            assert_eq!(marks.done, Some(0));
        }
    }

    #[test]
    fn the_first_panic_is_kept() {
        let mut marks = Marks::default();
        marks.feed(b"[    3.1] Kernel panic - not syncing: sysrq triggered crash\r\n[    3.2] Kernel panic - not syncing: b\n");
        assert_eq!(marks.panic.as_deref(), Some("sysrq triggered crash"));
    }

    #[test]
    fn nothing_looked_at_is_not_good() {
        let mut marks = Marks::default();
        marks.feed(b"portcullis: done 0\n");
        assert!(!marks.is_good());
        marks.feed(b"portcullis: mark a pass\n");
        assert!(marks.is_good());
        marks.feed(&vec![b'x'; 100_000]);
        assert!(marks.line.len() <= MAX_LINE);
    }
}
