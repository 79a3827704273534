//! The guest's RAM: files that the peer told of, mapped here, as the machine's memory.

use std::os::fd::{AsFd, OwnedFd};

use portcullis_bus::{MapError, Ram, RamError, SystemMemory};
use rustix::fs::fstat;
use thiserror::Error;

/// Most ranges that a peer may tell of.
const MAX_RANGES: usize = 4096;

/// RAM that cannot be used.
#[derive(Debug, Error)]
pub enum GuestRamError {
    /// Nothing was told of a range that the device tree calls memory.
    #[error(
        "the guest's memory at {base:#x} (0x{size:x} bytes) is not shared with us as one file: start QEMU with \
         `-object memory-backend-memfd,id=mem,share=on,...` and `-machine ...,memory-backend=mem`"
    )]
    NotShared {
        /// Where it begins.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// The file holds zeroes although QEMU puts its boot loader or the device tree where memory begins: QEMU sends the
    /// descriptor even where it keeps its own copy of every page that is written.
    #[error(
        "the guest's memory at {base:#x} is not shared with us: nothing was written to its file. Start QEMU with `share=on` \
         in `-object memory-backend-memfd,id=mem,share=on,...`"
    )]
    Private {
        /// Where it begins.
        base: u64,
    },
    /// A file cannot be mapped.
    #[error("the guest's memory at {base:#x}: {error}")]
    Map {
        /// Where it begins.
        base: u64,
        /// Why.
        error: RamError,
    },
    /// The ranges do not fit together.
    #[error("the guest's memory: {0}")]
    Layout(#[from] MapError),
    /// More ranges than anybody needs.
    #[error("the peer told of more than {MAX_RANGES} ranges of memory")]
    TooMany,
    /// The peer replaces what is in use.
    #[error("the guest's memory at {base:#x} was replaced by other memory while in use")]
    Replaced {
        /// Where it begins.
        base: u64,
    },
    /// A file of which the host cannot tell what it is.
    #[error("the guest's memory: {0}")]
    Host(#[from] std::io::Error),
}

/// Nothing but zeroes in the page at `offset`.
fn is_blank(file: &OwnedFd, offset: u64) -> Result<bool, GuestRamError> {
    let mut page = [0; 4096];
    let n = rustix::io::pread(file, &mut page, offset).map_err(std::io::Error::from)?;
    Ok(page.iter().take(n).all(|b| *b == 0))
}

/// Which bytes of which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bytes {
    device: u64,
    inode: u64,
    offset: u64,
}

#[derive(Debug)]
struct Range {
    base: u64,
    size: u64,
    bytes: Bytes,
    /// Until the memory is built.
    file: Option<OwnedFd>,
    present: bool,
    /// The block of the built memory that it is part of, by its base.
    block: Option<u64>,
}

impl Range {
    fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// What the peer told of its memory.
#[derive(Default)]
pub struct GuestRam {
    ranges: Vec<Range>,
    memory: Option<SystemMemory>,
}

impl GuestRam {
    /// The peer has mapped `size` bytes of a file at `base`. Ranges without a file, or that may not be written, are no RAM
    /// that devices could use; they are not given to this.
    ///
    /// # Errors
    /// Other memory than before, where memory is in use; too many ranges; a bad file.
    pub fn map(&mut self, base: u64, size: u64, file: OwnedFd, offset: u64) -> Result<(), GuestRamError> {
        let stat = fstat(file.as_fd()).map_err(std::io::Error::from)?;
        let bytes = Bytes { device: stat.st_dev, inode: stat.st_ino, offset };
        if let Some(memory) = &self.memory {
            let known = self.ranges.iter_mut().find(|r| r.base == base && r.size == size && r.bytes == bytes);
            if let Some(range) = known {
                range.present = true;
                if let Some(block) = range.block
                    && self.ranges.iter().filter(|r| r.block == Some(block)).all(|r| r.present)
                {
                    memory.restore(block);
                }
                return Ok(());
            }
            let in_use =
                |r: &&Range| r.block.is_some() && r.base < base.saturating_add(size) && base < r.end();
            return match self.ranges.iter().find(in_use) {
                Some(range) => Err(GuestRamError::Replaced { base: range.base }),
                // Memory that came later: the machine was built without it.
                None => Ok(()),
            };
        }
        if self.ranges.len() >= MAX_RANGES {
            return Err(GuestRamError::TooMany);
        }
        self.ranges.push(Range { base, size, bytes, file: Some(file), present: true, block: None });
        Ok(())
    }

    /// The peer has unmapped everything inside this range.
    pub fn unmap(&mut self, base: u64, size: u64) {
        let inside = |r: &Range| r.base >= base && r.end() <= base.saturating_add(size);
        let Some(memory) = &self.memory else {
            self.ranges.retain(|r| !inside(r));
            return;
        };
        for range in self.ranges.iter_mut().filter(|r| inside(r)) {
            range.present = false;
            if let Some(block) = range.block {
                memory.withdraw(block);
            }
        }
    }

    /// Everything is unmapped.
    pub fn unmap_all(&mut self) {
        self.unmap(0, u64::MAX);
    }

    /// The memory, once it was built.
    pub fn memory(&self) -> Option<&SystemMemory> {
        self.memory.as_ref()
    }

    /// Maps everything that was told of. Each of the `needed` ranges must be inside one run of one file, and something must
    /// be in the first of them.
    ///
    /// # Errors
    /// Says which memory is missing or cannot be mapped.
    pub fn build(
        &mut self,
        needed: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<SystemMemory, GuestRamError> {
        self.ranges.sort_by_key(|r| r.base);
        // Ranges that follow one another in the guest and in the file are one block.
        let mut blocks: Vec<(u64, u64, usize)> = Vec::new();
        for (i, range) in self.ranges.iter().enumerate() {
            let joins = |&(base, size, first): &(u64, u64, usize)| {
                let start = self.ranges.get(first).map(|r| r.bytes);
                let next = start.map(|b| Bytes { offset: b.offset.wrapping_add(size), ..b });
                base.checked_add(size) == Some(range.base) && next == Some(range.bytes)
            };
            match blocks.last_mut() {
                Some(last) if joins(last) => last.1 = last.1.saturating_add(range.size),
                _ => blocks.push((range.base, range.size, i)),
            }
        }
        let mut mapped = Vec::new();
        for (base, size) in needed {
            let end = base.checked_add(size);
            let holds =
                |&&(b, s, _): &&(u64, u64, usize)| b <= base && end.is_some_and(|e| e <= b.saturating_add(s));
            let missing = GuestRamError::NotShared { base, size };
            let &(block, len, first) = blocks.iter().find(holds).ok_or(missing)?;
            if mapped.iter().any(|(b, _)| *b == block) {
                continue;
            }
            let range = self.ranges.get(first).and_then(|r| Some((r.file.as_ref()?, r.bytes.offset)));
            let (file, offset) = range.ok_or(GuestRamError::NotShared { base, size })?;
            let bytes = usize::try_from(len).unwrap_or(usize::MAX);
            let ram =
                Ram::map(file, offset, bytes).map_err(|error| GuestRamError::Map { base: block, error })?;
            // Only now: it is a memfd, of which a read does not wait.
            if mapped.is_empty() && is_blank(file, offset.saturating_add(base - block))? {
                return Err(GuestRamError::Private { base });
            }
            for range in
                self.ranges.iter_mut().filter(|r| r.base >= block && r.end() <= block.saturating_add(len))
            {
                range.block = Some(block);
            }
            mapped.push((block, ram));
        }
        let memory = SystemMemory::from_blocks(mapped)?;
        for range in &mut self.ranges {
            range.file = None;
        }
        self.memory = Some(memory.clone());
        Ok(memory)
    }
}

#[cfg(test)]
mod tests {
    use portcullis_arch::{Attributes, Pa};
    use portcullis_bus::{BusError, Memory as _};
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    const A: Attributes = Attributes::DEVICE_DEFAULT;

    fn memfd(size: u64) -> OwnedFd {
        let file = memfd_create("ram", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        rustix::io::pwrite(&file, &[0xd0, 0x0d, 0xfe, 0xed], 0).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        file
    }

    #[test]
    fn neighbours_of_one_file_are_one_block() {
        let file = memfd(0x8000);
        let mut ram = GuestRam::default();
        ram.map(0x4000_4000, 0x4000, file.try_clone().unwrap(), 0x4000).unwrap();
        ram.map(0x4000_0000, 0x4000, file.try_clone().unwrap(), 0).unwrap();
        let memory = ram.build([(0x4000_0000, 0x8000)]).unwrap();
        memory.write(Pa(0x4000_3ffc), A, &[7; 8]).unwrap();
        ram.unmap(0x4000_4000, 0x4000);
        assert_eq!(
            memory.load64(Pa(0x4000_0000), A),
            Err(BusError::Decode),
            "a part is gone: nothing answers"
        );
        ram.map(0x4000_4000, 0x4000, file.try_clone().unwrap(), 0x4000).unwrap();
        let mut b = [0; 8];
        memory.read(Pa(0x4000_3ffc), A, &mut b).unwrap();
        assert_eq!(b, [7; 8]);
        let other = ram.map(0x4000_4000, 0x4000, memfd(0x8000), 0x4000);
        assert!(matches!(other, Err(GuestRamError::Replaced { .. })));
        ram.map(0x8000_0000, 0x4000, memfd(0x8000), 0).unwrap();
        assert!(memory.load64(Pa(0x8000_0000), A).is_err(), "too late for this machine");
    }

    #[test]
    fn a_file_that_nobody_writes_to_is_not_shared() {
        let file = memfd(0x8000);
        rustix::io::pwrite(&file, &[0; 8], 0).unwrap();
        let mut ram = GuestRam::default();
        ram.map(0x4000_0000, 0x8000, file, 0).unwrap();
        let error = ram.build([(0x4000_0000, 0x8000)]).map(drop).unwrap_err();
        assert!(matches!(error, GuestRamError::Private { .. }) && error.to_string().contains("share=on"));
    }

    #[test]
    fn memory_that_is_missing_or_in_pieces_is_named() {
        let mut ram = GuestRam::default();
        ram.map(0x4000_0000, 0x4000, memfd(0x4000), 0).unwrap();
        ram.map(0x4000_4000, 0x4000, memfd(0x4000), 0).unwrap();
        let error = ram.build([(0x4000_0000, 0x8000)]).map(drop).unwrap_err().to_string();
        assert!(error.contains("0x40000000") && error.contains("memory-backend-memfd"), "{error}");
        let mut ram = GuestRam::default();
        ram.map(0x4000_0000, 0x8000, memfd(0x4000), 0).unwrap();
        assert!(matches!(ram.build([(0x4000_0000, 0x8000)]), Err(GuestRamError::Map { .. })));
    }
}
