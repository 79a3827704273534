//! Configuration space of a PCI function.

/// Bytes of configuration space.
pub const CONFIG_BYTES: usize = 4096;

const COMMAND: usize = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const BAR0: usize = 0x10;

/// Configuration space, of which the peer may change some bits.
pub struct Config {
    bytes: Box<[u8]>,
    writable: Box<[u8]>,
}

fn put(into: &mut [u8], at: usize, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        if let Some(place) = into.get_mut(at.saturating_add(i)) {
            *place = *b;
        }
    }
}

impl Config {
    /// Zeroes, with `set` written into it; bits that are one in `writable` may be changed.
    pub fn new(set: &[(usize, &[u8])], writable: &[(usize, &[u8])]) -> Self {
        let mut config = Self { bytes: vec![0; CONFIG_BYTES].into(), writable: vec![0; CONFIG_BYTES].into() };
        for (at, bytes) in set {
            put(&mut config.bytes, *at, bytes);
        }
        for (at, bytes) in writable {
            put(&mut config.writable, *at, bytes);
        }
        config
    }

    /// Reads; beyond the end there is nothing but zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, b) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            *b = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (i, b) in data.iter().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
            if let (Some(place), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *place = *place & !mask | b & mask;
            }
        }
    }

    /// Two bytes.
    pub fn word(&self, at: usize) -> u16 {
        let mut b = [0; 2];
        self.read(at as u64, &mut b);
        u16::from_le_bytes(b)
    }

    /// The function answers memory accesses.
    pub fn memory_on(&self) -> bool {
        self.word(COMMAND) & COMMAND_MEMORY != 0
    }

    /// The function may write to memory.
    pub fn master_on(&self) -> bool {
        self.word(COMMAND) & COMMAND_MASTER != 0
    }

    /// The address in BAR 0 (32 bits).
    pub fn bar0(&self) -> u32 {
        u32::from(self.word(BAR0) & !0xf) | u32::from(self.word(BAR0 + 2)) << 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_writable_changes() {
        let mut c = Config::new(&[(0, &[0xe0, 0x1a])], &[(4, &[6, 0]), (0x10, &[0xf0, 0xff, 0xff, 0xff])]);
        c.write(0, &[0xff; 8]);
        c.write(0x10, &[0xff, 0, 0, 0x30]);
        assert_eq!((c.word(0), c.word(2), c.word(4)), (0x1ae0, 0, 6));
        assert!(c.memory_on() && c.master_on());
        assert_eq!(c.bar0(), 0x3000_00f0);
        c.write(CONFIG_BYTES as u64 - 1, &[1, 2, 3]);
        c.write(u64::MAX, &[1, 2]);
        let mut b = [7; 4];
        c.read(CONFIG_BYTES as u64 - 2, &mut b);
        assert_eq!(b, [0; 4]);
    }
}
