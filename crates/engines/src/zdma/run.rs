//! The state of a run: UG1085 "Channel Disabled", "Channel Paused", and how a channel moves between them.

use portcullis_arch::zdma::{ADDRESS_MASK, Command, Control, Ctrl2, Mode, SIZE_MASK, State, interrupt, reg};
use portcullis_bus::{DmaFault, StallTag};
use serde::{Deserialize, Serialize};

use super::Zdma;

/// Where the channel is; the numbers are those of STATUS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Phase {
    #[default]
    Done = State::Done as isize,
    Paused = State::Paused as isize,
    Busy = State::Busy as isize,
    Error = State::Error as isize,
}

/// What a run does, fixed when it starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Plan {
    #[default]
    ScatterGather,
    SimpleCopy,
    SimpleFill,
    SimpleRead,
}

/// The two lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Which {
    Source,
    Destination,
}

/// The four kinds of access; each has its own error bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum AccessKind {
    Descriptor(Which),
    Payload(Which),
}

impl AccessKind {
    fn error_bit(self) -> u32 {
        match self {
            Self::Descriptor(Which::Source) => interrupt::AXI_RD_SRC_DSCR,
            Self::Descriptor(Which::Destination) => interrupt::AXI_RD_DST_DSCR,
            Self::Payload(Which::Source) => interrupt::AXI_RD_DATA,
            Self::Payload(Which::Destination) => interrupt::AXI_WR_DATA,
        }
    }
}

/// A transaction that waits in the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Parked {
    pub(super) tag: StallTag,
    pub(super) access: AccessKind,
}

/// The progress of one side: the descriptor in work and the way to the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Side {
    /// A descriptor is in work: `at`, `left` and `control` are its.
    pub(super) loaded: bool,
    /// Address of the next payload byte.
    pub(super) at: u64,
    /// Payload bytes to go.
    pub(super) left: u32,
    /// Word 3 of the descriptor.
    pub(super) control: u32,
    /// Address of the descriptor in work, or of the last one.
    pub(super) current: u64,
    /// Address of the descriptor to fetch next.
    pub(super) next: u64,
    /// What has been fetched of it.
    pub(super) fetched: [u8; 32],
    /// How many bytes of `fetched` are valid.
    pub(super) have: u8,
}

impl Side {
    fn list(start: u64) -> Self {
        let start = start & ADDRESS_MASK;
        Self { current: start, next: start, ..Self::default() }
    }

    fn register(at: u64, left: u32, control: u32) -> Self {
        Self { loaded: true, at: at & ADDRESS_MASK, left: left & SIZE_MASK, control, ..Self::default() }
    }

    pub(super) fn control(&self) -> Control {
        Control::from_bits(self.control)
    }

    /// `bytes` of payload are done; `fixed` keeps the address.
    pub(super) fn consume(&mut self, bytes: usize, fixed: bool) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.left);
        self.left -= bytes;
        if !fixed {
            self.at = self.at.wrapping_add(u64::from(bytes)) & ADDRESS_MASK;
        }
    }
}

/// Data that has been read and not written yet: the channel's part of the common buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Staged {
    pub(super) data: Vec<u8>,
    pub(super) written: usize,
}

impl Staged {
    pub(super) fn rest(&self) -> &[u8] {
        self.data.get(self.written..).unwrap_or(&[])
    }

    pub(super) fn into_rest(mut self) -> Vec<u8> {
        self.data.drain(..self.written.min(self.data.len()));
        self.data
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.written = self.written.saturating_add(bytes);
        if self.rest().is_empty() {
            self.clear();
        }
    }

    pub(super) fn clear(&mut self) {
        self.data.clear();
        self.written = 0;
    }
}

/// Everything a run consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) phase: Phase,
    pub(super) plan: Plan,
    pub(super) source: Side,
    pub(super) destination: Side,
    pub(super) staged: Staged,
    /// Write-only mode: which byte of the fill data comes next.
    pub(super) fill_at: usize,
    pub(super) parked: Option<Parked>,
}

impl Run {
    /// Busy or paused: not to be started.
    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Busy | Phase::Paused)
    }

    pub(super) fn peek(&self, which: Which) -> &Side {
        match which {
            Which::Source => &self.source,
            Which::Destination => &self.destination,
        }
    }

    pub(super) fn side(&mut self, which: Which) -> &mut Side {
        match which {
            Which::Source => &mut self.source,
            Which::Destination => &mut self.destination,
        }
    }
}

impl Zdma {
    /// EN was written 1 while the channel was disabled.
    pub(super) fn start(&mut self) {
        let ctrl0 = self.ctrl0();
        self.run = Run { phase: Phase::Busy, ..Run::default() };
        if ctrl0.scatter_gather() {
            self.rewind();
            return;
        }
        let registers = &self.registers;
        let side = |at, size, control| {
            Side::register(registers.get64(at), registers.get(size), registers.get(control))
        };
        self.run.source = side(reg::SRC_DSCR_WORD0, reg::SRC_DSCR_WORD2, reg::SRC_DSCR_WORD3);
        self.run.destination = side(reg::DST_DSCR_WORD0, reg::DST_DSCR_WORD2, reg::DST_DSCR_WORD3);
        match ctrl0.mode() {
            Mode::WriteOnly => self.run.plan = Plan::SimpleFill,
            Mode::ReadOnly => self.run.plan = Plan::SimpleRead,
            Mode::ReadWrite | Mode::Reserved => {
                self.run.plan = Plan::SimpleCopy;
                // The source's size governs.
                self.run.destination.left = self.run.source.left;
            }
        }
    }

    /// Both lists begin at their START registers.
    fn rewind(&mut self) {
        self.run.source = Side::list(self.registers.get64(reg::SRC_START_LSB));
        self.run.destination = Side::list(self.registers.get64(reg::DST_START_LSB));
    }

    /// Leaves the pause state if CONT says so.
    pub(super) fn leave_pause(&mut self) {
        let ctrl0 = self.ctrl0();
        if self.run.phase != Phase::Paused || !ctrl0.cont() {
            return;
        }
        self.registers.set(reg::CTRL0, ctrl0.with_cont(false).into_bits());
        if !self.enabled() {
            self.run.phase = Phase::Done;
            return;
        }
        self.run.phase = Phase::Busy;
        if ctrl0.cont_addr() {
            self.rewind();
        }
    }

    /// The source descriptor is read and all its data is written.
    pub(super) fn source_done(&mut self) {
        let control = self.run.source.control();
        self.run.source.loaded = false;
        if control.intr() {
            self.registers.raise(interrupt::SRC_DSCR_DONE);
            self.registers.account(reg::IRQ_SRC_ACCT, interrupt::IRQ_SRC_ACCT_ERR);
        }
        if self.run.plan != Plan::ScatterGather {
            return self.finish(Phase::Done);
        }
        match control.command() {
            Command::Next => {}
            Command::Pause => {
                self.run.phase = Phase::Paused;
                self.registers.raise(interrupt::DMA_PAUSE);
                self.leave_pause();
            }
            Command::Stop | Command::Reserved => self.finish(Phase::Done),
        }
    }

    /// The destination descriptor is full, and its write response has come.
    pub(super) fn destination_done(&mut self) {
        self.run.destination.loaded = false;
        if self.run.destination.control().intr() {
            self.registers.raise(interrupt::DST_DSCR_DONE);
            self.registers.account(reg::IRQ_DST_ACCT, interrupt::IRQ_DST_ACCT_ERR);
        }
    }

    /// The run is over: disabled, and DMA_DONE comes after everything else.
    pub(super) fn finish(&mut self, phase: Phase) {
        self.run.phase = phase;
        self.run.parked = None;
        self.run.staged.clear();
        self.registers.set(reg::CTRL2, Ctrl2::new().into_bits());
        self.registers.raise(interrupt::DMA_DONE);
    }

    /// An access came back with an error response.
    pub(super) fn fail(&mut self, access: AccessKind) {
        self.registers.raise(access.error_bit());
        self.finish(Phase::Error);
    }

    /// An access did not complete: it parks if it is stalled, and ends the run otherwise.
    pub(super) fn fault(&mut self, access: AccessKind, fault: DmaFault) {
        match fault {
            DmaFault::Stalled(tag) => self.run.parked = Some(Parked { tag, access }),
            DmaFault::Terminated | DmaFault::Bus(_) => self.fail(access),
        }
    }
}
