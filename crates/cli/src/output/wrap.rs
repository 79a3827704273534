//! Lines that fit a page.

/// Columns that a line of output has at most, where its words allow it.
pub const WIDTH: usize = 116;

/// Breaks `text` at spaces: its first line begins in column `start`, the others in column `indent`.
///
/// A word longer than a line stays whole. Spaces inside a line stay as they are.
pub fn wrap(text: &str, start: usize, indent: usize) -> Vec<String> {
    let mut words = text.split(' ');
    let mut line = words.next().unwrap_or_default().to_string();
    let mut column = start + line.chars().count();
    let mut lines = Vec::new();
    for word in words {
        let length = word.chars().count();
        if column + 1 + length > WIDTH && !line.trim_start().is_empty() {
            lines.push(std::mem::replace(&mut line, word.to_string()));
            column = indent + length;
        } else {
            line.push(' ');
            line.push_str(word);
            column += 1 + length;
        }
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_at_spaces_and_nothing_is_lost() {
        let text = "word ".repeat(100);
        let lines = wrap(text.trim_end(), 20, 10);
        assert!(lines.len() > 1);
        assert!(lines.iter().enumerate().all(|(i, l)| l.len() + if i == 0 { 20 } else { 10 } <= WIDTH));
        assert_eq!(lines.join(" "), text.trim_end());
    }

    #[test]
    fn a_word_without_end_stays_whole() {
        let word = "x".repeat(3 * WIDTH);
        assert_eq!(wrap(&format!("a {word} b"), 0, 0), ["a".to_string(), word, "b".to_string()]);
    }

    #[test]
    fn columns_inside_a_line_stay() {
        assert_eq!(wrap("  a   b", 0, 0), ["  a   b"]);
        assert_eq!(wrap("", 4, 4), [""]);
    }
}
