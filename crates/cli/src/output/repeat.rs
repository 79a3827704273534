//! Faults that were told before: the same story with other numbers.

use std::collections::BTreeMap;

use portcullis_explain::{Cause, Story};

/// Replaces numbers by `#`, so that what is left is the shape of a text.
///
/// A number is what begins with a digit and is not part of a name (the 1 of `TTBR1`). The value of a field (`PASize=5`)
/// stays: with another one it would be another story.
fn shape(text: &str, out: &mut String) {
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let begins = c.is_ascii_digit() && (!before.is_alphanumeric() || out.ends_with("CB"));
        let length = match begins {
            true => rest.find(|c: char| !c.is_ascii_hexdigit() && c != 'x').unwrap_or(rest.len()),
            false => c.len_utf8(),
        };
        let (head, tail) = rest.split_at(length);
        let value = before == '=' && !head.starts_with("0x");
        out.push_str(if begins && !value { "#" } else { head });
        before = head.chars().last().unwrap_or(' ');
        rest = tail;
    }
    out.push('\n');
}

/// The faults of a scenario that were told in full.
#[derive(Default)]
pub struct Told(BTreeMap<String, String>);

impl Told {
    /// Who had the same fault before, with other numbers; remembers it if nobody did.
    pub fn before(&mut self, engine: &str, story: &Story, causes: &[Cause]) -> Option<String> {
        let mut key = String::new();
        shape(&story.title, &mut key);
        for line in &story.lines {
            for text in [&line.label, &line.text] {
                shape(text, &mut key);
            }
        }
        for cause in causes {
            shape(&cause.to_string(), &mut key);
        }
        let before = self.0.get(&key).cloned();
        if before.is_none() {
            self.0.insert(key, engine.to_string());
        }
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape_of(text: &str) -> String {
        let mut out = String::new();
        shape(text, &mut out);
        out
    }

    #[test]
    fn numbers_are_no_part_of_a_shape_and_names_are() {
        assert_eq!(shape_of("SMR[3] 0x800014e8: ID 0x14e8, 4 KiB"), "SMR[#] #: ID #, # KiB\n");
        assert_eq!(shape_of("CB12.TTBR0 in bank 12"), "CB#.TTBR0 in bank #\n");
        assert_ne!(shape_of("read of 0x10"), shape_of("write of 0x10"));
        assert_ne!(shape_of("UXN=1 AF=1"), shape_of("UXN=0 AF=1"));
        assert_eq!(shape_of("AP[2:1]=0b01"), "AP[#:#]=0b01\n");
    }

    #[test]
    fn the_same_fault_with_other_numbers_was_told_before_and_another_was_not() {
        let story = |title: &str| Story { title: title.into(), lines: Vec::new() };
        let mut told = Told::default();
        assert_eq!(told.before("a", &story("read of 0x10"), &[]), None);
        assert_eq!(told.before("b", &story("read of 0x20"), &[]), Some("a".into()));
        assert_eq!(told.before("b", &story("write of 0x20"), &[]), None);
    }
}
