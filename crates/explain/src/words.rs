//! Small things that every sentence needs: sizes, levels, names of codes.

use portcullis_arch::vmsa::Granule;

/// `1 << log2` bytes as a person says it: `4 KiB`, `2 MiB`.
pub(crate) fn size(log2: u8) -> String {
    bytes(1u64.checked_shl(log2.into()).unwrap_or(0))
}

/// A number of bytes in the largest unit that divides it.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = UNITS.iter().find(|(shift, _)| n != 0 && n.trailing_zeros() >= *shift);
    unit.map_or_else(|| format!("{n} bytes"), |(shift, name)| format!("{} {name}", n >> shift))
}

/// `4 KiB`, `16 KiB` or `64 KiB`.
pub(crate) fn granule(g: Granule) -> String {
    size(g.log2())
}

/// Bits needed to hold an address.
pub(crate) fn width(address: u64) -> u32 {
    64 - address.leading_zeros()
}

/// The items with commas, and "and" before the last.
pub(crate) fn list<S: AsRef<str>>(items: &[S]) -> String {
    match items {
        [] => String::new(),
        [one] => one.as_ref().to_owned(),
        [first @ .., last] => {
            let first: Vec<&str> = first.iter().map(AsRef::as_ref).collect();
            format!("{} and {}", first.join(", "), last.as_ref())
        }
    }
}

/// The first `most` items, and how many more there are.
pub(crate) fn some_of(items: &[String], most: usize) -> String {
    let shown = items.get(..most).unwrap_or(items).join(", ");
    match items.len().saturating_sub(most) {
        0 => shown,
        n => format!("{shown} and {n} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_use_the_largest_unit_that_divides_them() {
        assert_eq!(size(12), "4 KiB");
        assert_eq!(size(30), "1 GiB");
        assert_eq!(bytes(0x3000), "12 KiB");
        assert_eq!(bytes(5), "5 bytes");
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(size(200), "0 bytes");
    }

    #[test]
    fn lists_read_like_sentences() {
        assert_eq!(list(&["a", "b", "c"]), "a, b and c");
        assert_eq!(some_of(&["a".into(), "b".into(), "c".into()], 2), "a, b and 1 more");
    }
}
