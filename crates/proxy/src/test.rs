//! `dma-proxy-test`: sends a pattern through the loop again and again, and compares every byte.
//!
//! Arguments, limits and messages are the original's. It uses two threads, which may drift apart; here a round starts
//! both transfers and waits for both. Who calls [`run`] measures the time.

use alloc::format;
use alloc::vec;
use alloc::vec::Vec;

use portcullis_hal::{Clock, DmaMemory};

use crate::{Proxy, ProxyError, ProxyStatus, Side, TEST_SIZE};

/// What the program says about wrong arguments.
pub const USAGE: &str =
    "Usage: dma-proxy-test <# of DMA transfers to perform> <# of bytes in each transfer (< 3MB)>";
/// The first line of its output.
pub const BANNER: &str = "DMA proxy test";
/// The last line of its output.
pub const COMPLETE: &str = "DMA proxy test complete";

/// Bytes that are handled at once; a multiple of 256, so that the pattern repeats.
const PIECE: usize = 4096;

/// The program's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// How many transfers; less than 1 is none.
    pub transfers: i32,
    /// Bytes of each, at most [`TEST_SIZE`]. What is not positive is refused by the driver in every transfer.
    pub bytes: i32,
}

impl Arguments {
    /// Reads them as the original does: two, each by `atoi`, the size cut to [`TEST_SIZE`]. `arguments` is
    /// without the program's name.
    ///
    /// # Errors
    /// [`USAGE`], if there are not two.
    pub fn parse(arguments: &[&str]) -> Result<Self, &'static str> {
        let [transfers, bytes] = arguments else { return Err(USAGE) };
        Ok(Self { transfers: atoi(transfers), bytes: atoi(bytes).min(TEST_SIZE as i32) })
    }
}

/// C's `atoi` as 64-bit systems have it: blanks, a sign, digits, and then anything; no number is 0, and what does not fit
/// loses its upper bits.
fn atoi(text: &str) -> i32 {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (negative, digits) = match text.as_bytes().split_first() {
        Some((b'-', rest)) => (true, rest),
        Some((b'+', rest)) => (false, rest),
        _ => (false, text.as_bytes()),
    };
    let mut value = 0i64;
    for digit in digits.iter().take_while(|byte| byte.is_ascii_digit()) {
        let digit = i64::from(digit - b'0');
        let signed = if negative { -digit } else { digit };
        value = value.saturating_mul(10).saturating_add(signed);
    }
    value as i32
}

/// What came of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Rounds.
    pub transfers: u64,
    /// Bytes of a round.
    pub bytes: u64,
    /// Rounds whose tx transfer had no success.
    pub tx_errors: u64,
    /// Rounds whose rx transfer had no success.
    pub rx_errors: u64,
    /// Bytes that were not those that were sent.
    pub wrong_bytes: u64,
}

impl Summary {
    /// Everything arrived.
    pub fn is_ok(&self) -> bool {
        self.tx_errors == 0 && self.rx_errors == 0 && self.wrong_bytes == 0
    }

    /// Bytes that went through the loop without an error.
    pub fn moved(&self) -> u64 {
        let failed = self.tx_errors.max(self.rx_errors);
        self.transfers.saturating_sub(failed).saturating_mul(self.bytes)
    }
}

/// The program. `report` gets its output line by line. The original prints every wrong byte; this prints the first
/// of a transfer and counts them all.
///
/// # Errors
/// The buffers cannot be reached. What goes wrong with transfers is in the summary.
pub fn run<M: DmaMemory + Clone + 'static, C: Clock>(
    proxy: &Proxy<M, C>,
    arguments: Arguments,
    mut report: impl FnMut(&str),
) -> Result<Summary, ProxyError> {
    report(BANNER);
    let Arguments { transfers, bytes } = arguments;
    // As in the original's loops: of a size that is not positive, no byte is set or compared.
    let size = u64::try_from(bytes).unwrap_or(0).min(TEST_SIZE);
    let (tx, rx) = (proxy.interface(Side::Tx), proxy.interface(Side::Rx));
    let mut summary = Summary { bytes: size, ..Summary::default() };
    let mut received = vec![0; PIECE];
    for counter in 0..transfers.max(0) as u32 {
        pattern(size, counter, |offset, piece| tx.write(offset, piece))?;
        rx.fill(0, size, 0)?;
        for (side, interface) in [(Side::Tx, tx), (Side::Rx, rx)] {
            interface.set_length(bytes as u32);
            // A refusal is the status.
            let _refused = proxy.start(side);
        }
        let (received_status, sent_status) = (proxy.finish(Side::Rx), proxy.finish(Side::Tx));
        summary.transfers += 1;
        if sent_status != ProxyStatus::NoError {
            summary.tx_errors += 1;
            report("Proxy tx transfer error");
        }
        if received_status != ProxyStatus::NoError {
            summary.rx_errors += 1;
            report("Proxy rx transfer error");
        }
        let mut first = None;
        pattern(size, counter, |offset, expected| {
            let Some(received) = received.get_mut(..expected.len()) else { return Ok(()) };
            rx.read(offset, received)?;
            if received != expected {
                let wrong = received.iter().zip(expected).enumerate().filter(|(_, (a, b))| a != b);
                for (i, (data, expected)) in wrong {
                    summary.wrong_bytes += 1;
                    first.get_or_insert((offset + i as u64, *data, *expected));
                }
            }
            Ok(())
        })?;
        if let Some((index, data, expected)) = first {
            report(&format!("buffer not equal, index = {index}, data = {data} expected data = {expected}"));
        }
    }
    report(COMPLETE);
    Ok(summary)
}

/// Hands out the pattern of a round, piece by piece: byte `i` is `counter + i`.
pub(crate) fn pattern(
    size: u64,
    counter: u32,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), ProxyError>,
) -> Result<(), ProxyError> {
    let piece: Vec<u8> = (0..PIECE as u32).map(|i| counter.wrapping_add(i) as u8).collect();
    pieces(size, |offset, len| each(offset, piece.get(..len).unwrap_or_default()))
}

/// The first difference of two buffers: where, and the two bytes.
pub(crate) fn equal_up_to(
    size: u64,
    mut a: impl FnMut(u64, &mut [u8]) -> Result<(), ProxyError>,
    mut b: impl FnMut(u64, &mut [u8]) -> Result<(), ProxyError>,
) -> Result<Option<(u64, u8, u8)>, ProxyError> {
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let mut different = None;
    pieces(size, |offset, len| {
        let (Some(left), Some(right)) = (left.get_mut(..len), right.get_mut(..len)) else { return Ok(()) };
        a(offset, left)?;
        b(offset, right)?;
        if different.is_none() && left != right {
            let found = left.iter().zip(right).enumerate().find(|(_, (a, b))| a != b);
            different = found.map(|(i, (a, b))| (offset + i as u64, *a, *b));
        }
        Ok(())
    })?;
    Ok(different)
}

fn pieces(size: u64, mut each: impl FnMut(u64, usize) -> Result<(), ProxyError>) -> Result<(), ProxyError> {
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(PIECE as u64);
        each(offset, len as usize)?;
        offset += len;
    }
    Ok(())
}
