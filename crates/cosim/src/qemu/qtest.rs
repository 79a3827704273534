//! QEMU's test socket: reads and writes of guest-physical addresses from outside, while the processor is stopped.
//!
//! One line per command, one line per answer (QEMU, `docs/devel/testing/qtest.rst` and the comment in its
//! `system/qtest.c`): `readl 0x4010008000` gives `OK 0x00000000ffffffff`. Answers carry no number, so that after a
//! timeout nobody could tell which command the next line answers: the connection is not used again.

use std::path::Path;
use std::time::Duration;

use portcullis_arch::Pa;

use super::control::{ControlError, Failure, connect};
use super::lines::Lines;
use super::process::Deadline;

/// A connection to QEMU's qtest socket.
#[derive(Debug)]
pub struct Qtest {
    lines: Lines,
    timeout: Duration,
    lost: bool,
}

/// The widths of an access: command letter, bytes, largest value.
const WIDTHS: [(char, u8, u64); 4] =
    [('b', 1, 0xff), ('w', 2, 0xffff), ('l', 4, 0xffff_ffff), ('q', 8, 0xffff_ffff_ffff_ffff)];

impl Qtest {
    pub(super) fn connect(
        path: &Path,
        deadline: Deadline,
        timeout: Duration,
        give_up: &mut dyn FnMut() -> bool,
    ) -> Result<Self, ControlError> {
        Ok(Self::over(connect("qtest", path, deadline, give_up)?, timeout))
    }

    pub(super) fn over(lines: Lines, timeout: Duration) -> Self {
        Self { lines, timeout, lost: false }
    }

    /// Reads 16 bits of guest-physical memory or a register.
    ///
    /// # Errors
    /// [`ControlError`], as for every other access.
    pub fn readw(&mut self, address: Pa) -> Result<u16, ControlError> {
        self.read(2, address).map(|value| value as u16)
    }

    /// Reads 32 bits.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn readl(&mut self, address: Pa) -> Result<u32, ControlError> {
        self.read(4, address).map(|value| value as u32)
    }

    /// Reads 64 bits.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn readq(&mut self, address: Pa) -> Result<u64, ControlError> {
        self.read(8, address)
    }

    /// Writes 16 bits.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn writew(&mut self, address: Pa, value: u16) -> Result<(), ControlError> {
        self.write(2, address, value.into())
    }

    /// Writes 32 bits.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn writel(&mut self, address: Pa, value: u32) -> Result<(), ControlError> {
        self.write(4, address, value.into())
    }

    /// Writes 64 bits.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn writeq(&mut self, address: Pa, value: u64) -> Result<(), ControlError> {
        self.write(8, address, value)
    }

    fn read(&mut self, bytes: u8, address: Pa) -> Result<u64, ControlError> {
        let (letter, limit) = width(bytes);
        let command = format!("read{letter} {:#x}", address.get());
        let reply = self.command(&command)?;
        let value = reply
            .strip_prefix("OK 0x")
            .and_then(|digits| u64::from_str_radix(digits.trim_end(), 16).ok())
            .filter(|value| *value <= limit);
        value.ok_or_else(|| ControlError::new("qtest", &command, Failure::Garbage(reply)))
    }

    fn write(&mut self, bytes: u8, address: Pa, value: u64) -> Result<(), ControlError> {
        let (letter, _) = width(bytes);
        let command = format!("write{letter} {:#x} {value:#x}", address.get());
        let reply = self.command(&command)?;
        if reply.trim_end() == "OK" {
            Ok(())
        } else {
            Err(ControlError::new("qtest", &command, Failure::Garbage(reply)))
        }
    }

    /// Sends a command and gives the line that answers it, which begins with `OK`.
    fn command(&mut self, command: &str) -> Result<String, ControlError> {
        let fail = |failure| ControlError::new("qtest", command, failure);
        if self.lost {
            return Err(fail(Failure::Lost));
        }
        let deadline = Deadline::after(self.timeout);
        // From here to the whole answer, an early return leaves the answer in the pipe.
        self.lost = true;
        self.lines.send(command, deadline).map_err(|error| fail(Failure::line(error, self.timeout)))?;
        loop {
            let line =
                self.lines.receive(deadline).map_err(|error| fail(Failure::line(error, self.timeout)))?;
            // Reports of interrupt lines come on their own, between the answers.
            if line.starts_with("IRQ ") {
                continue;
            }
            if line == "OK" || line.starts_with("OK ") {
                self.lost = false;
                return Ok(line);
            }
            if ["FAIL", "ERR"].iter().any(|word| line.starts_with(word)) {
                self.lost = false;
                return Err(fail(Failure::Refused(line)));
            }
            return Err(fail(Failure::Garbage(line)));
        }
    }
}

fn width(bytes: u8) -> (char, u64) {
    let found = WIDTHS.iter().find(|(_, width, _)| *width == bytes);
    found.map_or(('q', u64::MAX), |(letter, _, limit)| (*letter, *limit))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use super::*;

    /// A peer that answers every command with the next of `answers`, then closes. Gives back what it was sent.
    fn peer(answers: Vec<Vec<u8>>) -> (Qtest, JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            let mut heard = Vec::new();
            for answer in answers {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    break;
                }
                heard.push(line.trim_end().to_owned());
                let _ = writer.write_all(&answer);
            }
            heard
        });
        (Qtest::over(Lines::new(ours).unwrap(), Duration::from_millis(300)), thread)
    }

    fn text(answers: &[&str]) -> Vec<Vec<u8>> {
        answers.iter().map(|answer| answer.as_bytes().to_vec()).collect()
    }

    #[test]
    fn every_width_is_written_and_read_as_qemu_expects() {
        let (mut qtest, thread) = peer(text(&[
            "OK 0x00000000000012ab\n",
            "OK 0xffffffff\n",
            "OK 0xffffffffffffffff\r\n",
            "OK\n",
            "OK\n",
            "OK\n",
        ]));
        assert_eq!(qtest.readw(Pa(0x10)).unwrap(), 0x12ab);
        assert_eq!(qtest.readl(Pa(0x40_1000_8000)).unwrap(), u32::MAX);
        assert_eq!(qtest.readq(Pa(0x18)).unwrap(), u64::MAX);
        qtest.writew(Pa(0x4), 6).unwrap();
        qtest.writel(Pa(0x10), 0x3000_0000).unwrap();
        qtest.writeq(Pa(0x20), u64::MAX).unwrap();
        let heard = thread.join().unwrap();
        let expected = [
            "readw 0x10",
            "readl 0x4010008000",
            "readq 0x18",
            "writew 0x4 0x6",
            "writel 0x10 0x30000000",
            "writeq 0x20 0xffffffffffffffff",
        ];
        assert_eq!(heard, expected);
    }

    #[test]
    fn reports_of_interrupts_between_answers_are_passed_over() {
        let (mut qtest, _thread) = peer(text(&["IRQ raise 3\nIRQ lower 3\nOK 0x7\n"]));
        assert_eq!(qtest.readl(Pa(0)).unwrap(), 7);
    }

    #[test]
    fn a_refusal_names_the_command_and_the_connection_stays() {
        let (mut qtest, _thread) = peer(text(&["FAIL Unknown command 'readl'\n", "OK 0x1\n"]));
        let error = qtest.readl(Pa(0x10)).unwrap_err();
        assert!(
            error.to_string().contains("readl 0x10") && error.to_string().contains("FAIL Unknown"),
            "{error}"
        );
        assert_eq!(qtest.readl(Pa(0x10)).unwrap(), 1);
    }

    #[test]
    fn garbage_stalls_and_an_early_end_are_errors_that_name_the_command() {
        let cases: [&[u8]; 10] = [
            b"hello\n",
            b"OK\n",
            b"OK 0xzz\n",
            b"OK 17\n",
            b"OK 0x1ffffffff\n",
            b"OK 0x11111111111111111111\n",
            b"\xff\xfe\n",
            b"\n",
            b"OK 0x1",
            b"",
        ];
        for case in cases {
            let (mut qtest, thread) = peer(vec![case.to_vec()]);
            let error = qtest.readl(Pa(0x10)).unwrap_err();
            assert!(error.to_string().contains("readl 0x10"), "{case:?}: {error}");
            drop(qtest);
            thread.join().unwrap();
        }
    }

    #[test]
    fn after_a_stall_the_next_command_is_not_answered_by_the_late_line() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut qtest = Qtest::over(Lines::new(ours).unwrap(), Duration::from_millis(50));
        let error = qtest.readl(Pa(0x10)).unwrap_err();
        assert!(matches!(error.failure(), Failure::Late(_)), "{error}");
        theirs.write_all(b"OK 0x1\n").unwrap();
        let error = qtest.readl(Pa(0x20)).unwrap_err();
        assert!(matches!(error.failure(), Failure::Lost), "{error}");
    }

    #[test]
    fn a_line_without_end_is_cut_off() {
        let (mut qtest, thread) = peer(vec![vec![b'x'; 3 << 20]]);
        let error = qtest.readl(Pa(0x10)).unwrap_err();
        assert!(matches!(error.failure(), Failure::TooLong | Failure::Late(_)), "{error}");
        drop(qtest);
        thread.join().unwrap();
    }
}
