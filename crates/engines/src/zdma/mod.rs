//! One channel of the ZynqMP's general purpose DMA (ZDMA: "ADMA" in the low power domain, "GDMA" in the full
//! power domain), as UG1087 module ZDMA and UG1085 chapter 19 describe it.
//!
//! Build a [`Zdma`] from a [`ZdmaConfig`], a port and an interrupt line; write its registers
//! ([`Registers32`]) and [`step`](Engine::step) it. Registers are in `registers`, the run's states in `run`,
//! descriptor fetches in `list`, data movement in `transfer`, saving in `state`.
//!
//! | Feature | State |
//! |---|---|
//! | Register map, reset values, access rights, 32-bit accesses | covered |
//! | Undecoded offset: ISR.INV_APB, and a bus error or 0 as ERR_CTRL says | covered; ERR_CTRL resets to 1 (UG1087; QEMU has 0) |
//! | Simple mode: read-write, write-only, read-only, fixed and incrementing bursts | covered; MODE 3 (reserved) acts as read-write |
//! | Scatter-gather: linear, linked and hybrid lists; source and destination independent | covered; fixed bursts and MODE are ignored here, as both are for simple mode only |
//! | Stop, pause, CONT with both CONT_ADDR values, leaving pause with EN = 0 | covered; the reserved CMD 3 acts as stop |
//! | ISR, IMR, IEN, IDS, level interrupt, counters with their wrap bits, TOTAL_BYTE | covered |
//! | Error responses on the four kinds of access, misaligned descriptors | covered: run ends, EN = 0, STATUS = 3, DMA_DONE |
//! | Stalled transactions | covered: parked, retried where they stopped, or ended per AXI burst |
//! | STATUS | Xilinx' driver's encoding (0 done, 1 paused, 2 busy, 3 error), not QEMU's |
//! | DMA_DONE | once per run and last (QEMU: after each source descriptor) |
//! | AxCACHE | from DATA_ATTR and DSCR_ATTR; AxPROT is 0b010 (non-secure, unprivileged, data) |
//! | COHRNT, AXCOHRNT | mark the transaction outer shareable where [`ZdmaConfig::coherent`] is set, else no effect |
//! | AxLEN | sets how much one terminated stall covers; payload otherwise moves in pieces of up to 64 KiB |
//! | Registers changed during a run | descriptor words and CTRL0 were taken at the start; DATA_ATTR, DSCR_ATTR and WR_ONLY_WORDn act from the next access on |
//! | DBG0, DBG1 | covered for this channel alone; the eight channels do not share their buffer here |
//! | Rate control, flow control (FCI), AxQOS, outstanding limits (CTRL1), OVR_FETCH | different: the registers read back, nothing else happens |
//! | Descriptor prefetch | not covered: a descriptor is fetched when it is needed |
//! | Linked descriptor at a multiple of 16 but not 32 | a descriptor error, as UG1085 demands alignment to the size (QEMU accepts it) |
//! | Size 0 | our choice: the descriptor is complete at once, without data; an untouched destination is not completed |
//! | Destination longer than the sources | our choice: not complete, so neither DST_DSCR_DONE nor a count |
//! | EN written 0 while busy | our choice: the run goes on, EN reads 0 |
//! | CONT written when not paused | our choice: kept, and used up by the next pause |
//! | Leaving pause with EN = 0 | our choice: STATUS = 0 without DMA_DONE |
//! | Data already read when an error ends the run | our choice: dropped from the buffer; what TOTAL_BYTE counts is written |
//! | Write-only fill | WORD0..1 (64-bit) or WORD0..3 (128-bit), from the first destination byte on (as QEMU and Xilinx' driver) |
//! | Addresses | 49 bits as the registers have; bits above are dropped (UG1085 names 44 inside descriptors) |
//! | Versal Gen 2 register offsets and parity interrupts | not covered |

mod list;
mod registers;
mod run;
mod state;
#[cfg(test)]
mod tests;
mod transfer;

use portcullis_arch::zdma::{Ctrl0, Ctrl2, Rights, interrupt, reg, register_at};
use portcullis_arch::{Attributes, Shareability, StreamId};
use portcullis_bus::mmio::Registers32;
use portcullis_bus::{Activity, BusError, DmaPort, Engine, Initiator, IrqLine, StallState};

use registers::Registers;
use run::{Phase, Run};
pub use state::ZdmaState;

/// The most bytes one [`step`](Engine::step) moves.
pub const STEP_BYTES: usize = 64 * 1024;
/// The most actions (a descriptor fetch, a piece of data, a completion) one [`step`](Engine::step) takes.
pub const STEP_ACTIONS: u32 = 256;

/// AxPROT of every transaction: unprivileged, non-secure, data.
const AXPROT: u8 = 0b010;

/// Width of a channel's data bus: the `xlnx,bus-width` property.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BusWidth {
    /// 64 bits: the channels of the low power domain.
    Bits64,
    /// 128 bits: the channels of the full power domain.
    Bits128,
}

impl BusWidth {
    /// From the device tree's number of bits: 64 or 128.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        match bits {
            64 => Some(Self::Bits64),
            128 => Some(Self::Bits128),
            _ => None,
        }
    }

    /// Bytes in one beat.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bits64 => 8,
            Self::Bits128 => 16,
        }
    }
}

/// What is fixed about a channel when the chip is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZdmaConfig {
    /// The stream that all its transactions belong to.
    pub stream: StreamId,
    /// Width of its data bus.
    pub bus: BusWidth,
    /// Bytes of its common buffer: how much it can have read and not written yet. At least two beats are used.
    pub buffer_bytes: usize,
    /// True if a descriptor's COHRNT bit and DSCR_ATTR.AXCOHRNT have an effect.
    pub coherent: bool,
}

impl ZdmaConfig {
    /// A channel of the low power domain: 64 bits, 2 KiB buffer, can be coherent.
    pub const fn lpd(stream: StreamId) -> Self {
        Self { stream, bus: BusWidth::Bits64, buffer_bytes: 2048, coherent: true }
    }

    /// A channel of the full power domain: 128 bits, 4 KiB buffer, never coherent.
    pub const fn fpd(stream: StreamId) -> Self {
        Self { stream, bus: BusWidth::Bits128, buffer_bytes: 4096, coherent: false }
    }

    /// Beats in the common buffer: what DBG0 reads when it is empty.
    fn buffer_entries(&self) -> usize {
        (self.buffer_bytes / self.bus.bytes()).max(2)
    }
}

/// One DMA channel.
pub struct Zdma {
    config: ZdmaConfig,
    port: Box<dyn DmaPort>,
    irq: IrqLine,
    registers: Registers,
    run: Run,
    /// Room for data on its way; never holds anything between steps.
    scratch: Vec<u8>,
}

impl Zdma {
    /// A channel after power-up, which reaches memory through `port` and drives `irq`.
    pub fn new(config: ZdmaConfig, port: Box<dyn DmaPort>, irq: IrqLine) -> Self {
        let registers = Registers::default();
        Self { config, port, irq, registers, run: Run::default(), scratch: Vec::new() }
    }

    /// What the channel was built with.
    pub fn config(&self) -> &ZdmaConfig {
        &self.config
    }

    /// The level of the interrupt output.
    pub fn irq_level(&self) -> bool {
        self.registers.interrupt()
    }

    /// True while a transaction waits in the IOMMU for software.
    pub fn is_stalled(&self) -> bool {
        self.run.parked.is_some()
    }

    fn ctrl0(&self) -> Ctrl0 {
        Ctrl0::from_bits(self.registers.get(reg::CTRL0))
    }

    fn enabled(&self) -> bool {
        Ctrl2::from_bits(self.registers.get(reg::CTRL2)).en()
    }

    fn drive_irq(&self) {
        self.irq.set(self.registers.interrupt());
    }

    fn initiator(&self, axcache: u8, coherent: bool) -> Initiator {
        let attrs = Attributes::from_axi(axcache, AXPROT);
        let coherent = coherent && self.config.coherent;
        let attrs = if coherent { attrs.with_shareability(Shareability::Outer) } else { attrs };
        Initiator::new(self.config.stream).with_attrs(attrs)
    }

    fn undecoded<T>(&mut self, otherwise: T) -> Result<T, BusError> {
        self.registers.raise(interrupt::INV_APB);
        self.drive_irq();
        if self.registers.apb_error() { Err(BusError::Slave) } else { Ok(otherwise) }
    }

    /// The registers that show the run instead of holding a value.
    fn live(&self, offset: u32) -> Option<u32> {
        let (source, destination) = (&self.run.source, &self.run.destination);
        let occupied = self.run.staged.rest().len().div_ceil(self.config.bus.bytes());
        let entries = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).min(0x1ff);
        Some(match offset {
            reg::STATUS => self.run.phase as u32,
            reg::SRC_CUR_PYLD_LSB => source.at as u32,
            reg::SRC_CUR_PYLD_MSB => (source.at >> 32) as u32,
            reg::DST_CUR_PYLD_LSB => destination.at as u32,
            reg::DST_CUR_PYLD_MSB => (destination.at >> 32) as u32,
            reg::SRC_CUR_DSCR_LSB => source.current as u32,
            reg::SRC_CUR_DSCR_MSB => (source.current >> 32) as u32,
            reg::DST_CUR_DSCR_LSB => destination.current as u32,
            reg::DST_CUR_DSCR_MSB => (destination.current >> 32) as u32,
            reg::DBG0 => entries(self.config.buffer_entries().saturating_sub(occupied)),
            reg::DBG1 => entries(occupied),
            _ => return None,
        })
    }
}

impl Registers32 for Zdma {
    fn read(&mut self, offset: u32) -> Result<u32, BusError> {
        let Some(register) = register_at(offset) else { return self.undecoded(0) };
        if let Some(value) = self.live(offset) {
            return Ok(value);
        }
        Ok(match register.rights {
            Rights::WriteOnly => 0,
            Rights::ClearOnRead => self.registers.take(offset),
            _ => self.registers.get(offset),
        })
    }

    fn write(&mut self, offset: u32, value: u32) -> Result<(), BusError> {
        let Some(register) = register_at(offset) else { return self.undecoded(()) };
        let was_enabled = self.enabled();
        self.registers.write(register, value);
        match offset {
            reg::CTRL0 => self.leave_pause(),
            reg::CTRL2 => {
                if self.enabled() && !was_enabled && !self.run.is_live() {
                    self.start();
                }
                self.leave_pause();
            }
            _ => {}
        }
        self.drive_irq();
        Ok(())
    }
}

impl Engine for Zdma {
    fn step(&mut self, _now: u64) -> Activity {
        if self.run.phase != Phase::Busy {
            return Activity::Idle;
        }
        if let Some(parked) = self.run.parked {
            match self.port.stall_state(parked.tag) {
                StallState::Waiting => return Activity::Stalled,
                StallState::Retry => self.run.parked = None,
                StallState::Terminated { abort: true } => self.fail(parked.access),
                StallState::Terminated { abort: false } => {
                    self.run.parked = None;
                    self.pass_over(parked.access);
                }
            }
        }
        let mut bytes = STEP_BYTES;
        let mut actions = STEP_ACTIONS;
        while self.run.phase == Phase::Busy && self.run.parked.is_none() && bytes > 0 && actions > 0 {
            bytes = bytes.saturating_sub(self.advance(bytes));
            actions -= 1;
        }
        self.drive_irq();
        match (self.run.phase, self.run.parked) {
            (Phase::Busy, Some(_)) => Activity::Stalled,
            (Phase::Busy, None) => Activity::Busy,
            _ => Activity::Idle,
        }
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
        self.run = Run::default();
        self.drive_irq();
    }
}
