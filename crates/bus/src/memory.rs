//! The small trait through which models reach memory.

use portcullis_arch::{Attributes, Pa};
use thiserror::Error;

/// Why a bus access was refused. On AMBA both arrive at the master as an error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error, serde::Serialize, serde::Deserialize)]
pub enum BusError {
    /// Nothing answers at this address (DECERR).
    #[error("no memory or device answers at this address (DECERR)")]
    Decode,
    /// The target refused the access (SLVERR).
    #[error("the target refused the access (SLVERR)")]
    Slave,
}

/// Physical memory as a bus master sees it. Every access can abort.
///
/// Accesses are little-endian byte transfers. [`load64`](Memory::load64), [`load32`](Memory::load32) and
/// [`cas64`](Memory::cas64) are single-copy atomic and need natural alignment; the others promise no
/// atomicity beyond that of single bytes. An access that crosses the end of what is mapped transfers nothing.
pub trait Memory: Send + Sync {
    /// Reads `buf.len()` bytes at `pa`.
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError>;
    /// Writes `buf` at `pa`.
    fn write(&self, pa: Pa, attrs: Attributes, buf: &[u8]) -> Result<(), BusError>;
    /// Reads an aligned 64-bit word in one piece; misaligned addresses are refused as [`BusError::Slave`].
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError>;
    /// Consecutive [`load64`](Memory::load64)s, in address order, each word once: what a model reads a record with. At the
    /// first word that is refused it ends.
    fn load64s(&self, pa: Pa, attrs: Attributes, words: &mut [u64]) -> Result<(), BusError> {
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.load64(pa.wrapping_add(8 * i as u64), attrs)?;
        }
        Ok(())
    }
    /// Reads an aligned 32-bit word in one piece; misaligned addresses are refused as [`BusError::Slave`].
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError>;
    /// Replaces the aligned 64-bit word at `pa` by `new` if it holds `expected`; returns what it held.
    fn cas64(&self, pa: Pa, attrs: Attributes, expected: u64, new: u64) -> Result<u64, BusError>;
    /// Moves `len` bytes from `src` to `dst`. The error says which side refused; nothing is written if
    /// the source refuses. The ranges must not overlap if the result is to be defined.
    fn copy(
        &self,
        src: (Pa, Attributes),
        dst: (Pa, Attributes),
        len: usize,
    ) -> Result<(), (crate::CopySide, BusError)> {
        let mut buf = [0u8; 4096];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(buf.len());
            self.read(src.0.wrapping_add(at as u64), src.1, &mut buf[..n])
                .map_err(|e| (crate::CopySide::Source, e))?;
            self.write(dst.0.wrapping_add(at as u64), dst.1, &buf[..n])
                .map_err(|e| (crate::CopySide::Destination, e))?;
            at += n;
        }
        Ok(())
    }
}

impl<M: Memory + ?Sized> Memory for std::sync::Arc<M> {
    fn read(&self, pa: Pa, attrs: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        (**self).read(pa, attrs, buf)
    }
    fn write(&self, pa: Pa, attrs: Attributes, buf: &[u8]) -> Result<(), BusError> {
        (**self).write(pa, attrs, buf)
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        (**self).load64(pa, attrs)
    }
    fn load64s(&self, pa: Pa, attrs: Attributes, words: &mut [u64]) -> Result<(), BusError> {
        (**self).load64s(pa, attrs, words)
    }
    fn load32(&self, pa: Pa, attrs: Attributes) -> Result<u32, BusError> {
        (**self).load32(pa, attrs)
    }
    fn cas64(&self, pa: Pa, attrs: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        (**self).cas64(pa, attrs, expected, new)
    }
    fn copy(
        &self,
        src: (Pa, Attributes),
        dst: (Pa, Attributes),
        len: usize,
    ) -> Result<(), (crate::CopySide, BusError)> {
        (**self).copy(src, dst, len)
    }
}
