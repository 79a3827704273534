//! A second archive behind the guest's initial file system: what the guest is to do.
//!
//! Linux unpacks one cpio archive after another out of the memory that the boot loader names, compressed ones among plain
//! ones, each beginning at a multiple of four bytes (its documentation of the initramfs buffer format).

use std::io;

use cpio::newc;

/// A file for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// Its path below `/overlay`.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// It is a program.
    pub executable: bool,
}

impl GuestFile {
    /// A text file.
    pub fn text(name: &str, text: &str) -> Self {
        Self { name: name.into(), bytes: text.as_bytes().to_vec(), executable: false }
    }
}

/// The archive of these files.
///
/// # Errors
/// A file of more than 4 GiB.
pub fn archive(files: &[GuestFile]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let directory = newc::Builder::new("overlay").mode(0o040_755).nlink(2).ino(1).write(&mut out, 0);
    directory.finish()?;
    for (i, file) in files.iter().enumerate() {
        let too_large =
            |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{} is too large", file.name));
        let len = u32::try_from(file.bytes.len()).map_err(too_large)?;
        let mode = if file.executable { 0o100_755 } else { 0o100_644 };
        let name = format!("overlay/{}", file.name);
        let mut writer = newc::Builder::new(&name).mode(mode).ino(i as u32 + 2).write(&mut out, len);
        io::Write::write_all(&mut writer, &file.bytes)?;
        writer.finish()?;
    }
    newc::trailer(&mut out)?;
    Ok(out)
}

/// An initial file system with these files behind it.
///
/// # Errors
/// As for [`archive`].
pub fn behind(mut initrd: Vec<u8>, files: &[GuestFile]) -> io::Result<Vec<u8>> {
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    initrd.extend(archive(files)?);
    Ok(initrd)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn what_is_put_in_comes_out() {
        let files = [GuestFile::text("run", "echo hello\n"), GuestFile::text("parameters", "")];
        let bytes = behind(vec![1, 2, 3, 4, 5], &files).unwrap();
        assert_eq!(bytes[..8], [1, 2, 3, 4, 5, 0, 0, 0]);
        let mut rest = &bytes[8..];
        let mut seen = Vec::new();
        loop {
            let mut entry = newc::Reader::new(rest).unwrap();
            if entry.entry().is_trailer() {
                break;
            }
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            seen.push((entry.entry().name().to_string(), entry.entry().mode(), text));
            rest = entry.finish().unwrap();
        }
        let expected = [
            ("overlay", 0o040_755, ""),
            ("overlay/run", 0o100_644, "echo hello\n"),
            ("overlay/parameters", 0o100_644, ""),
        ];
        assert_eq!(seen, expected.map(|(n, m, t)| (n.to_string(), m, t.to_string())));
    }
}
