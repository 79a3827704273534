//! QEMU's version.

use std::fmt;

/// A version as `qemu-system-aarch64 --version` prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number; 0 where there is none.
    pub patch: u32,
}

impl Version {
    /// The first QEMU with `vfio-user-pci`.
    pub const OLDEST: Self = Self { major: 10, minor: 1, patch: 0 };

    /// Reads the version out of the first line of `--version`: `QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)`.
    ///
    /// `None` where the text does not come from QEMU or has no version.
    #[must_use]
    pub fn parse(output: &str) -> Option<Self> {
        let first = output.lines().next()?;
        let (before, after) = first.split_once("version ")?;
        if !before.contains("QEMU") {
            return None;
        }
        let number = after.split(|c: char| !(c.is_ascii_digit() || c == '.')).next()?;
        let mut parts = number.split('.');
        let major = parts.next()?.parse().ok()?;
        let minor = parts.next()?.parse().ok()?;
        let patch = match parts.next() {
            None | Some("") => 0,
            Some(text) => text.parse().ok()?,
        };
        Some(Self { major, minor, patch })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(major: u32, minor: u32, patch: u32) -> Option<Version> {
        Some(Version { major, minor, patch })
    }

    #[test]
    fn versions_of_distributions_and_of_git_are_read() {
        let cases = [
            ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\nCopyright (c)", version(11, 1, 3)),
            ("QEMU emulator version 10.0.2 (qemu-10.0.2-1.fc42)", version(10, 0, 2)),
            ("QEMU emulator version 10.1", version(10, 1, 0)),
            ("QEMU emulator version 10.1.50 (v10.1.0-123-gabcdef)", version(10, 1, 50)),
            ("QEMU emulator version 11.0.0-rc2", version(11, 0, 0)),
            ("QEMU emulator version 10.1.", version(10, 1, 0)),
        ];
        for (text, expected) in cases {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn text_of_another_program_is_no_version() {
        for text in [
            "",
            "\n",
            "GNU bash, version 5.2.37(1)-release",
            "QEMU emulator",
            "QEMU emulator version ",
            "QEMU emulator version eleven",
            "QEMU emulator version 11",
            "QEMU emulator version 99999999999999999999.1.1",
            "QEMU emulator version ..",
        ] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_oldest_usable_version_is_10_1() {
        assert!(version(10, 0, 99) < Some(Version::OLDEST));
        assert!(version(10, 1, 0) >= Some(Version::OLDEST));
        assert!(version(9, 2, 0) < Some(Version::OLDEST));
    }
}
