//! Driver for one channel of the Zynq UltraScale+ general purpose DMA (LPD "ADMA", FPD "GDMA").
//!
//! Start with [`Zdma::new`]; then [`submit_memcpy`](Zdma::submit_memcpy) or [`submit_sg`](Zdma::submit_sg) and
//! [`issue_pending`](Zdma::issue_pending), with [`handle_irq`](Zdma::handle_irq) at every interrupt, or
//! [`wait`](Zdma::wait) without any. Each transaction ends as one [`Completion`]. [`ZdmaChannel`] puts a channel behind
//! the interface of all DMA engines, [`DmaChannel`](crate::dmaengine::DmaChannel).
//!
//! The register sequences are those of Linux's `zynqmp_dma`; the results are not. Where they differ:
//!
//! | | Linux 6.12 | here |
//! |---|---|---|
//! | bus error | the first active transaction "succeeds", the others vanish | it fails with the kind of error and the position; those behind it are started again |
//! | [`terminate`](Zdma::terminate) | masks interrupts, the engine goes on writing memory | waits until the engine has stopped, then clears what it left behind |
//! | residue | none | from TOTAL_BYTE |
//! | chunk of 1 GiB | does not fit the size field | chunks end below |
//! | nothing to start | touches CTRL0 and DATA_ATTR | nothing |

mod channel;
mod error;
mod list;
#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use portcullis_arch::Iova;
use portcullis_arch::zdma::{
    Ctrl0, Ctrl2, DataAttr, DscrAttr, SIZE_MASK, State as ChannelState, interrupt, reg,
};
use portcullis_hal::{Clock, DmaMemory, Mmio, poll};
use spin::Mutex;

use list::{Chunk, split};

pub use crate::dmaengine::{Cookie, DescriptorPool, Segment};
pub use channel::ZdmaChannel;
pub use error::{BusErrorKind, Position, TransferError, ZdmaError};

/// Descriptor pairs in a pool (Linux `ZYNQMP_DMA_NUM_DESCS`).
pub const POOL_DESCRIPTORS: usize = 32;
/// Bytes of a channel's [`DescriptorPool`]: one source and one destination descriptor of 32 bytes each per pair.
pub const POOL_BYTES: usize = POOL_DESCRIPTORS * 64;
/// Completions that are kept until somebody takes them.
const MAX_COMPLETIONS: usize = 1024;
/// All but SRC_DSCR_DONE and DMA_PAUSE.
const ENABLED: u32 = interrupt::ALL & !(interrupt::SRC_DSCR_DONE | interrupt::DMA_PAUSE);
/// After these IRQ_DST_ACCT may have counted.
const ENDS: u32 = interrupt::DST_DSCR_DONE | interrupt::DMA_DONE;
/// ARLEN and AWLEN that Linux writes: 16 beats.
const BURST_LENGTH: u8 = 15;

/// What the device tree says about a channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `dma-coherent`: descriptors and data are snooped. Low power domain only.
    pub coherent: bool,
}

/// How a transaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which.
    pub cookie: Cookie,
    /// Success, or what was wrong.
    pub result: Result<(), TransferError>,
    /// Bytes that had reached the destination.
    pub transferred: u64,
    /// Bytes that had not.
    pub residue: u64,
}

/// How a transaction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Submitted, not issued or not started.
    Queued,
    /// Started; bytes left.
    Running {
        /// Bytes that have not reached the destination.
        residue: u64,
    },
    /// Over, not taken yet.
    Complete(Completion),
    /// Never submitted, or its completion was taken.
    Unknown,
}

/// What an interrupt was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupt {
    /// ISR bits that were set and not masked.
    pub status: u32,
    /// Transactions that ended.
    pub completed: usize,
}

/// A transaction on its way.
#[derive(Debug)]
struct Transaction {
    cookie: Cookie,
    chunks: Vec<Chunk>,
    len: u64,
}

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Idle,
    List,
    Simple,
    /// Told to stop, and has not yet.
    Stopping,
}

#[derive(Debug)]
struct State {
    /// Descriptor pairs in use, one bit each.
    used: u32,
    submitted: VecDeque<Transaction>,
    issued: VecDeque<Transaction>,
    running: VecDeque<Transaction>,
    mode: Mode,
    /// Bytes of transactions of this run that are complete.
    run_bytes: u64,
    /// Times that TOTAL_BYTE went past 2^32 in this run.
    wraps: u64,
    /// AXI errors of this run.
    errors: u32,
    completions: VecDeque<Completion>,
    next_cookie: u64,
}

/// One DMA channel.
pub struct Zdma<R, M> {
    regs: R,
    memory: M,
    pool: DescriptorPool,
    config: Config,
    state: Mutex<State>,
}

impl<R: Mmio, M: DmaMemory> Zdma<R, M> {
    /// Initialises a channel (Linux `zynqmp_dma_init`).
    pub fn new(regs: R, memory: M, pool: DescriptorPool, config: Config) -> Result<Self, ZdmaError> {
        if pool.block.len < POOL_BYTES || !pool.block.pa.is_aligned(64) || !pool.iova.is_aligned(64) {
            return Err(ZdmaError::Pool { pool });
        }
        let state = State {
            used: 0,
            submitted: VecDeque::new(),
            issued: VecDeque::new(),
            running: VecDeque::new(),
            mode: Mode::Idle,
            run_bytes: 0,
            wraps: 0,
            errors: 0,
            completions: VecDeque::new(),
            next_cookie: 1,
        };
        let channel = Self { regs, memory, pool, config, state: Mutex::new(state) };
        channel.init();
        Ok(channel)
    }

    fn read(&self, offset: u32) -> u32 {
        self.regs.read32(offset as usize)
    }
    fn write(&self, offset: u32, value: u32) {
        self.regs.write32(offset as usize, value);
    }
    fn read_address(&self, low: u32, high: u32) -> Iova {
        Iova(u64::from(self.read(high)) << 32 | u64::from(self.read(low)))
    }
    fn write_address(&self, low: u32, high: u32, address: u64) {
        self.write(low, address as u32);
        self.write(high, (address >> 32) as u32);
    }

    /// Masks interrupts, forgets old ones, sets attributes, clears counters.
    fn init(&self) {
        self.write(reg::IDS, interrupt::ALL);
        let old = self.read(reg::ISR);
        self.write(reg::ISR, old);
        if self.config.coherent {
            self.write(reg::DSCR_ATTR, DscrAttr::new().with_coherent(true).with_axcache(0xf).into_bits());
        }
        let data = DataAttr::from_bits(self.read(reg::DATA_ATTR));
        let data = if self.config.coherent { data.with_arcache(0xf).with_awcache(0xf) } else { data };
        self.write(reg::DATA_ATTR, data.into_bits());
        let _cleared_by_reading = (self.read(reg::IRQ_SRC_ACCT), self.read(reg::IRQ_DST_ACCT));
    }

    /// Queues a copy of `len` bytes. Any alignment; the ranges must not overlap.
    pub fn submit_memcpy(&self, to: Iova, from: Iova, len: u64) -> Result<Cookie, ZdmaError> {
        self.submit_sg(&[Segment { address: to, len }], &[Segment { address: from, len }])
    }

    /// Queues a copy from a list of segments to another of the same total size.
    pub fn submit_sg(&self, to: &[Segment], from: &[Segment]) -> Result<Cookie, ZdmaError> {
        let (mut chunks, len) = split(to, from, list::DESCRIPTOR_BITS)?;
        if chunks.len() > POOL_DESCRIPTORS {
            return Err(ZdmaError::TooManyDescriptors { needed: chunks.len() });
        }
        let mut state = self.state.lock();
        let free = POOL_DESCRIPTORS - state.used.count_ones() as usize;
        if chunks.len() > free {
            return Err(ZdmaError::PoolEmpty { needed: chunks.len(), free });
        }
        for chunk in &mut chunks {
            chunk.slot = state.used.trailing_ones() as u8;
            state.used |= 1 << chunk.slot;
        }
        let cookie = state.new_cookie();
        state.submitted.push_back(Transaction { cookie, chunks, len });
        Ok(cookie)
    }

    /// Starts everything that was submitted: now, or when what is running is through.
    pub fn issue_pending(&self) {
        let mut state = self.state.lock();
        let submitted = core::mem::take(&mut state.submitted);
        state.issued.extend(submitted);
        self.start(&mut state);
    }

    /// Copies `len` bytes with the descriptor in registers instead of memory, and starts at once. The channel must be
    /// idle. Registers have room for 49 address bits, descriptors in memory for 44.
    pub fn start_simple(&self, to: Iova, from: Iova, len: u32) -> Result<Cookie, ZdmaError> {
        let segment = |address| Segment { address, len: u64::from(len) };
        if len > SIZE_MASK {
            return Err(ZdmaError::TooLong { len: u64::from(len) });
        }
        let (_, bytes) = split(&[segment(to)], &[segment(from)], list::REGISTER_BITS)?;
        let mut state = self.state.lock();
        if state.mode != Mode::Idle {
            return Err(ZdmaError::Busy);
        }
        let ctrl0 = Ctrl0::from_bits(self.read(reg::CTRL0)).with_scatter_gather(false);
        self.write(reg::CTRL0, ctrl0.into_bits());
        let coherent = u32::from(self.config.coherent);
        for (word0, word1, address) in [
            (reg::SRC_DSCR_WORD0, reg::SRC_DSCR_WORD1, from.get()),
            (reg::DST_DSCR_WORD0, reg::DST_DSCR_WORD1, to.get()),
        ] {
            self.write_address(word0, word1, address);
            self.write(word1 + 4, len);
            self.write(word1 + 8, coherent);
        }
        let cookie = state.new_cookie();
        // It uses no descriptor of the pool.
        state.running.push_back(Transaction { cookie, chunks: Vec::new(), len: bytes });
        self.enable(&mut state, Mode::Simple);
        Ok(cookie)
    }

    /// Starts all issued transactions as one hardware list, if the channel is idle (Linux
    /// `zynqmp_dma_start_transfer`).
    fn start(&self, state: &mut State) {
        if state.mode != Mode::Idle || state.issued.is_empty() {
            return;
        }
        let issued = core::mem::take(&mut state.issued);
        state.running.extend(issued);
        let chunks = state.running.iter().map(|transaction| transaction.chunks.as_slice());
        let first = list::write(&self.memory, &self.pool, self.config.coherent, chunks);
        let ctrl0 = Ctrl0::from_bits(self.read(reg::CTRL0)).with_scatter_gather(true);
        self.write(reg::CTRL0, ctrl0.into_bits());
        let data = DataAttr::from_bits(self.read(reg::DATA_ATTR));
        self.write(reg::DATA_ATTR, data.with_arlen(BURST_LENGTH).with_awlen(BURST_LENGTH).into_bits());
        self.write_address(reg::SRC_START_LSB, reg::SRC_START_MSB, first.source);
        self.write_address(reg::DST_START_LSB, reg::DST_START_MSB, first.destination);
        self.enable(state, Mode::List);
    }

    fn enable(&self, state: &mut State, mode: Mode) {
        state.mode = mode;
        (state.run_bytes, state.wraps, state.errors) = (0, 0, 0);
        self.write(reg::IEN, ENABLED);
        self.write(reg::TOTAL_BYTE, 0);
        self.write(reg::CTRL2, Ctrl2::new().with_en(true).into_bits());
    }

    /// Handles an interrupt of the channel (Linux `zynqmp_dma_irq_handler` and its tasklet); `None` if it was somebody
    /// else's. Starts what is issued when the channel has become idle.
    pub fn handle_irq(&self) -> Option<Interrupt> {
        let mut state = self.state.lock();
        let isr = self.read(reg::ISR);
        let imr = self.read(reg::IMR);
        self.write(reg::ISR, isr);
        let status = isr & !imr;
        if status == 0 {
            return None;
        }
        let before = state.completions.len();
        if status & interrupt::BYTE_CNT_OVRFL != 0 {
            state.wraps = state.wraps.saturating_add(1);
        }
        if status & interrupt::IRQ_SRC_ACCT_ERR != 0 {
            let _cleared_by_reading = self.read(reg::IRQ_SRC_ACCT);
        }
        if state.mode == Mode::Stopping {
            return Some(Interrupt { status, completed: 0 });
        }
        state.errors |= status & interrupt::AXI_ERRORS;
        if state.errors == 0 && state.mode == Mode::List && status & ENDS != 0 {
            let count = self.read(reg::IRQ_DST_ACCT) as usize;
            self.succeed(&mut state, count);
        }
        if status & interrupt::DMA_DONE != 0 {
            self.run_over(&mut state);
        }
        Some(Interrupt { status, completed: state.completions.len().saturating_sub(before) })
    }

    /// The oldest `count` running transactions are through.
    fn succeed(&self, state: &mut State, count: usize) {
        for _ in 0..count {
            let Some(transaction) = state.running.pop_front() else { return };
            state.run_bytes += transaction.len;
            let len = transaction.len;
            self.complete(state, transaction, len, Ok(()));
        }
    }

    /// The engine has come to rest. After an error, DMA_DONE comes when the accesses under way have ended; before that
    /// the channel could not be started again.
    fn run_over(&self, state: &mut State) {
        match core::mem::take(&mut state.errors) {
            0 => {
                if state.mode == Mode::Simple {
                    self.succeed(state, 1);
                }
                // The hardware counts a transaction before it reports the end of the run.
                while let Some(transaction) = state.running.pop_front() {
                    let position = self.position();
                    self.complete(state, transaction, 0, Err(TransferError::Incomplete { position }));
                }
            }
            errors => self.failed(state, errors),
        }
        state.mode = Mode::Idle;
        self.start(state);
    }

    /// A run that a bus error ended. Those that were counted are complete, the next one is the one that failed, and the
    /// rest has not begun: it goes back to the head of the queue.
    fn failed(&self, state: &mut State, errors: u32) {
        let count = self.read(reg::IRQ_DST_ACCT) as usize;
        self.succeed(state, count);
        let moved = self.total_bytes(state).saturating_sub(state.run_bytes);
        let error = TransferError::Bus { kind: BusErrorKind::from_status(errors), position: self.position() };
        if let Some(transaction) = state.running.pop_front() {
            let moved = moved.min(transaction.len);
            self.complete(state, transaction, moved, Err(error));
        }
        let rest = core::mem::take(&mut state.running);
        for transaction in rest.into_iter().rev() {
            state.issued.push_front(transaction);
        }
        self.init();
    }

    fn complete(
        &self,
        state: &mut State,
        transaction: Transaction,
        transferred: u64,
        result: Result<(), TransferError>,
    ) {
        for chunk in &transaction.chunks {
            state.used &= !(1 << chunk.slot);
        }
        if state.completions.len() >= MAX_COMPLETIONS {
            state.completions.pop_front();
        }
        state.completions.push_back(Completion {
            cookie: transaction.cookie,
            result,
            transferred,
            residue: transaction.len.saturating_sub(transferred),
        });
    }

    /// Bytes that this run has written.
    fn total_bytes(&self, state: &State) -> u64 {
        (state.wraps << 32).wrapping_add(u64::from(self.read(reg::TOTAL_BYTE)))
    }

    fn position(&self) -> Position {
        Position {
            source: self.read_address(reg::SRC_CUR_PYLD_LSB, reg::SRC_CUR_PYLD_MSB),
            destination: self.read_address(reg::DST_CUR_PYLD_LSB, reg::DST_CUR_PYLD_MSB),
        }
    }

    /// How a transaction stands.
    pub fn progress(&self, cookie: Cookie) -> Progress {
        let state = self.state.lock();
        if let Some(completion) = state.completions.iter().find(|completion| completion.cookie == cookie) {
            return Progress::Complete(*completion);
        }
        let mut before = state.run_bytes;
        for transaction in &state.running {
            if transaction.cookie == cookie {
                let moved = self.total_bytes(&state).saturating_sub(before).min(transaction.len);
                return Progress::Running { residue: transaction.len - moved };
            }
            before += transaction.len;
        }
        let queued = |queue: &VecDeque<Transaction>| queue.iter().any(|other| other.cookie == cookie);
        if queued(&state.submitted) || queued(&state.issued) { Progress::Queued } else { Progress::Unknown }
    }

    /// Bytes of a transaction that have not reached the destination; `None` if it is unknown.
    pub fn residue(&self, cookie: Cookie) -> Option<u64> {
        match self.progress(cookie) {
            Progress::Running { residue } => Some(residue),
            Progress::Complete(completion) => Some(completion.residue),
            Progress::Queued => {
                let state = self.state.lock();
                let mut all = state.submitted.iter().chain(&state.issued);
                all.find(|transaction| transaction.cookie == cookie).map(|transaction| transaction.len)
            }
            Progress::Unknown => None,
        }
    }

    /// Bytes of a transaction that is not over; `None` for all others.
    pub fn requested(&self, cookie: Cookie) -> Option<u64> {
        let state = self.state.lock();
        let mut all = state.submitted.iter().chain(&state.issued).chain(&state.running);
        all.find(|transaction| transaction.cookie == cookie).map(|transaction| transaction.len)
    }

    /// Takes all completions, oldest first.
    pub fn take_completions(&self) -> Vec<Completion> {
        self.state.lock().completions.drain(..).collect()
    }

    /// Takes the completion of one transaction.
    pub fn take_completion(&self, cookie: Cookie) -> Option<Completion> {
        let mut state = self.state.lock();
        let index = state.completions.iter().position(|completion| completion.cookie == cookie)?;
        state.completions.remove(index)
    }

    /// Waits for a transaction without interrupts: looks at ISR as the handler does. Takes its completion.
    pub fn wait(&self, cookie: Cookie, clock: &impl Clock, timeout_us: u64) -> Result<Completion, ZdmaError> {
        let look = || {
            self.handle_irq();
            let waiting = matches!(self.progress(cookie), Progress::Queued | Progress::Running { .. });
            u64::from(waiting)
        };
        poll(clock, "ZDMA transaction complete", timeout_us, look, |waiting| waiting == 0).map_err(
            |timeout| ZdmaError::Timeout {
                timeout,
                status: self.read(reg::STATUS),
                isr: self.read(reg::ISR),
            },
        )?;
        self.take_completion(cookie).ok_or(ZdmaError::UnknownCookie { cookie })
    }

    /// Stops the channel and ends all transactions, submitted ones included, with [`TransferError::Terminated`]. Gives
    /// how many there were.
    ///
    /// The engine has no abort: a write of EN = 0 while it runs is not documented to stop it. So the list in memory
    /// is cut as well: every source descriptor that the engine has not read yet becomes a last one of one byte (a
    /// byte of the requested copy). The engine then ends with the descriptor that it has, whose size bounds the wait.
    /// When this returns `Ok`, no transfer is under way and the memory can be reused. On [`ZdmaError::Timeout`] the engine
    /// still runs, for example because an access is stalled in the IOMMU: resolve that and call again; until then
    /// nothing can be started and no buffer may be reused.
    pub fn terminate(&self, clock: &impl Clock, timeout_us: u64) -> Result<usize, ZdmaError> {
        if self.stop() {
            // Without the lock: time may pass only in here, and with it interrupt handlers may run.
            let read = || u64::from(self.read(reg::STATUS));
            let stopped = |status: u64| status & 3 != ChannelState::Busy as u64;
            poll(clock, "ZDMA STATUS.STATE != busy", timeout_us, read, stopped).map_err(|timeout| {
                ZdmaError::Timeout { timeout, status: self.read(reg::STATUS), isr: self.read(reg::ISR) }
            })?;
        }
        let mut state = self.state.lock();
        let before = state.completions.len();
        let counted = self.read(reg::IRQ_DST_ACCT) as usize;
        self.succeed(&mut state, counted);
        let mut moved = self.total_bytes(&state).saturating_sub(state.run_bytes);
        let running = core::mem::take(&mut state.running);
        let queued =
            core::mem::take(&mut state.issued).into_iter().chain(core::mem::take(&mut state.submitted));
        for transaction in running.into_iter().chain(queued) {
            let bytes = moved.min(transaction.len);
            moved -= bytes;
            self.complete(&mut state, transaction, bytes, Err(TransferError::Terminated));
        }
        self.init();
        self.write(reg::TOTAL_BYTE, 0);
        state.mode = Mode::Idle;
        Ok(state.completions.len().saturating_sub(before))
    }

    /// Masks interrupts and tells the engine to stop; false if it is not running.
    fn stop(&self) -> bool {
        let mut state = self.state.lock();
        self.write(reg::IDS, interrupt::ALL);
        if state.mode == Mode::Idle {
            return false;
        }
        state.mode = Mode::Stopping;
        let chunks = state.running.iter().flat_map(|transaction| &transaction.chunks);
        list::cut(&self.memory, &self.pool, self.config.coherent, chunks);
        self.write(reg::CTRL2, Ctrl2::new().into_bits());
        self.leave_pause();
        true
    }

    /// CONT while EN = 0 takes a paused channel to disabled.
    fn leave_pause(&self) {
        if self.read(reg::STATUS) & 3 == ChannelState::Paused as u32 {
            let ctrl0 = Ctrl0::from_bits(self.read(reg::CTRL0)).with_cont(true);
            self.write(reg::CTRL0, ctrl0.into_bits());
        }
    }

    /// STATUS.STATE as the hardware shows it.
    pub fn channel_state(&self) -> ChannelState {
        match self.read(reg::STATUS) & 3 {
            0 => ChannelState::Done,
            1 => ChannelState::Paused,
            2 => ChannelState::Busy,
            _ => ChannelState::Error,
        }
    }

    /// True if nothing runs and nothing is waiting to run.
    pub fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.mode == Mode::Idle && state.issued.is_empty() && state.submitted.is_empty()
    }

    /// The descriptor pool given at the start.
    pub fn pool(&self) -> DescriptorPool {
        self.pool
    }

    /// Ends the driver and gives the pool back for freeing; refused while the channel is not idle.
    pub fn release(self) -> Result<DescriptorPool, Box<Self>> {
        if self.state.lock().mode != Mode::Idle {
            return Err(Box::new(self));
        }
        self.write(reg::IDS, interrupt::ALL);
        Ok(self.pool)
    }
}

impl<R, M> fmt::Debug for Zdma<R, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zdma").field("pool", &self.pool).field("config", &self.config).finish_non_exhaustive()
    }
}

impl State {
    fn new_cookie(&mut self) -> Cookie {
        let cookie = Cookie(self.next_cookie);
        self.next_cookie = self.next_cookie.wrapping_add(1);
        cookie
    }
}
