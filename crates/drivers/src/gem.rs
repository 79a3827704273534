//! Driver for the transmit DMA of a Cadence GEM: one frame at a time.
//!
//! [`Gem::new`] takes the MAC out of whatever state it was in, [`Gem::send`] hands it a frame, [`Gem::wait`] waits, bounded,
//! until the frame is out or a bus error has broken it off. Register use follows Linux's `macb`: descriptors of 16 bytes,
//! the first one's used bit cleared last, TSTART with TE set.

use portcullis_arch::gem::{DMACFG_ADDR64, MAX_BUFFER, TxControl, interrupt, ncr, reg, tsr};
use portcullis_arch::{Iova, Pa};
use portcullis_hal::{Block, Clock, DmaMemory, Mmio, Timeout, poll};
use spin::Mutex;
use thiserror::Error;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;
/// Buffers of one frame.
pub const MAX_SEGMENTS: usize = 16;
/// Bytes of memory for descriptors: those of one frame, and one that ends the ring.
pub const POOL_BYTES: usize = (MAX_SEGMENTS + 1) * DESCRIPTOR as usize;
/// How long a frame may take.
const TIMEOUT_US: u64 = 100_000;

/// Memory for descriptors, as the CPU and as the MAC addresses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorPool {
    /// At least [`POOL_BYTES`], aligned to 16.
    pub block: Block,
    /// The same memory as the MAC addresses it.
    pub iova: Iova,
}

/// A frame that was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GemError {
    /// The pool does not fit.
    #[error("descriptors need {POOL_BYTES} bytes at a multiple of 16, not {pool:?}")]
    Pool {
        /// It.
        pool: DescriptorPool,
    },
    /// No buffer, too many, or one of a length that no descriptor holds.
    #[error("a frame has 1 to {MAX_SEGMENTS} buffers of 1 to {MAX_BUFFER} bytes each")]
    Segments,
    /// The frame before is still under way.
    #[error("a frame is under way")]
    Busy,
    /// A bus error, or the IOMMU's abort.
    #[error("a bus error broke the frame off: TSR {tsr:#x}")]
    Bus {
        /// Transmit status.
        tsr: u32,
    },
    /// Neither out nor broken off.
    #[error("{0}")]
    Timeout(Timeout),
}

/// One MAC.
pub struct Gem<R, M> {
    regs: R,
    memory: M,
    pool: DescriptorPool,
    coherent: bool,
    busy: Mutex<bool>,
}

impl<R: Mmio, M: DmaMemory> Gem<R, M> {
    /// Initialises the MAC for sending.
    ///
    /// # Errors
    /// The pool does not fit.
    pub fn new(regs: R, memory: M, pool: DescriptorPool, coherent: bool) -> Result<Self, GemError> {
        if pool.block.len < POOL_BYTES || !pool.block.pa.is_aligned(16) || !pool.iova.is_aligned(16) {
            return Err(GemError::Pool { pool });
        }
        let gem = Self { regs, memory, pool, coherent, busy: Mutex::new(false) };
        gem.write(reg::NCR, 0);
        gem.write(reg::IDR, interrupt::ALL);
        gem.write(reg::DMACFG, DMACFG_ADDR64);
        gem.write(reg::TSR, u32::MAX);
        gem.write(reg::ISR, u32::MAX);
        Ok(gem)
    }
    fn write(&self, offset: u32, value: u32) {
        self.regs.write32(offset as usize, value);
    }
    /// The descriptors.
    pub fn pool(&self) -> &DescriptorPool {
        &self.pool
    }

    /// Hands a frame to the MAC: buffers by the MAC's address, and bytes.
    ///
    /// # Errors
    /// It is no frame, or the one before is still under way.
    pub fn send(&self, segments: &[(Iova, u32)]) -> Result<(), GemError> {
        let fits = |(_, len): &(Iova, u32)| (1..=MAX_BUFFER).contains(len);
        if segments.is_empty() || segments.len() > MAX_SEGMENTS || !segments.iter().all(fits) {
            return Err(GemError::Segments);
        }
        let mut busy = self.busy.lock();
        if *busy {
            return Err(GemError::Busy);
        }
        let at = |i: usize| self.pool.block.pa.wrapping_add(i as u64 * DESCRIPTOR);
        // The end of the ring first, the first descriptor last: the MAC may look at any time.
        self.put(at(segments.len()), Iova(0), TxControl::new().with_used(true).with_wrap(true));
        for (i, (address, len)) in segments.iter().enumerate().rev() {
            let last = i + 1 == segments.len();
            self.put(at(i), *address, TxControl::new().with_length(*len).with_last(last));
        }
        if !self.coherent {
            self.memory.clean(self.pool.block.pa, POOL_BYTES);
        }
        self.memory.wmb();
        self.write(reg::NCR, 0);
        self.write(reg::TBQPH, (self.pool.iova.get() >> 32) as u32);
        self.write(reg::TBQP, self.pool.iova.get() as u32);
        self.write(reg::TSR, u32::MAX);
        self.write(reg::NCR, ncr::TE);
        self.write(reg::NCR, ncr::TE | ncr::TSTART);
        *busy = true;
        Ok(())
    }
    fn put(&self, at: Pa, address: Iova, control: TxControl) {
        self.memory.store64(at.wrapping_add(8), address.get() >> 32);
        let low = address.get() & 0xffff_ffff;
        self.memory.store64(at, u64::from(control.into_bits()) << 32 | low);
    }

    /// Waits until the frame is out.
    ///
    /// # Errors
    /// A bus error broke it off, or it takes too long; the MAC is stopped then.
    pub fn wait(&self, clock: &impl Clock) -> Result<(), GemError> {
        let status = poll(
            clock,
            "GEM TSR.COMP or TSR.BEX",
            TIMEOUT_US,
            || self.regs.read32(reg::TSR as usize).into(),
            |seen: u64| seen as u32 & (tsr::COMP | tsr::BEX) != 0,
        );
        self.write(reg::NCR, 0);
        *self.busy.lock() = false;
        match status.map_err(GemError::Timeout)? as u32 {
            seen if seen & tsr::BEX != 0 => Err(GemError::Bus { tsr: seen }),
            _ => Ok(()),
        }
    }
}
