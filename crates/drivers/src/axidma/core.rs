//! The register sequences, and what both channels share: one reset.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use portcullis_arch::Iova;
use portcullis_arch::axidma::{Dmacr, Dmasr, MM2S, S2MM, error, irq, reg};
use portcullis_hal::{Clock, DmaMemory, Mmio, poll};
use spin::Mutex;

use super::error::{HardwareError, diagnose};
use super::ring::{Ring, pool_bytes};
use super::transaction::{Channel, Mode, Transaction};
use super::{AxiDmaError, Config};
use crate::dmaengine::{Completion, Direction, TransferError, deliver};

/// Linux's limit for a reset.
pub(super) const RESET_TIMEOUT_US: u64 = 1_000_000;
/// How long a channel may take to stop before the whole core is reset. MM2S does not stop while its stream is not ready.
const STOP_TIMEOUT_US: u64 = 1_000;
/// Reads of DMASR until a channel has to have left or reached Halted. It takes a few clocks.
const SPINS: usize = 1_000;
/// The largest IRQThreshold.
const MAX_BATCH: usize = 255;

const BOTH: [Direction; 2] = [Direction::MemToDev, Direction::DevToMem];

/// Who has the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mastery {
    /// The channels.
    Ready,
    /// Somebody resets it, and will finish.
    Resetting,
    /// It did not come out of reset.
    Stuck,
}

#[derive(Debug)]
pub(super) struct State {
    pub mastery: Mastery,
    mm2s: Channel,
    s2mm: Channel,
}

impl State {
    pub fn channel(&mut self, direction: Direction) -> &mut Channel {
        match direction {
            Direction::MemToDev => &mut self.mm2s,
            Direction::DevToMem => &mut self.s2mm,
        }
    }
}

/// Registers, memory and state of one core.
pub(super) struct Core<R, M, C> {
    regs: R,
    memory: M,
    pub clock: C,
    pub config: Config,
    scatter_gather: bool,
    state: Mutex<State>,
}

pub(super) fn other(direction: Direction) -> Direction {
    match direction {
        Direction::MemToDev => Direction::DevToMem,
        Direction::DevToMem => Direction::MemToDev,
    }
}

impl<R: Mmio, M: DmaMemory, C: Clock> Core<R, M, C> {
    pub fn new(regs: R, memory: M, clock: C, config: Config) -> Result<Self, AxiDmaError> {
        let first = BOTH.into_iter().find(|direction| config.channel(*direction).is_some());
        let first = first.ok_or(AxiDmaError::NoChannel)?;
        check(&config)?;
        let block = if first == Direction::MemToDev { MM2S } else { S2MM };
        let status = Dmasr::from_bits(regs.read32((block + reg::DMASR) as usize));
        let scatter_gather = status.sg_included();
        let mut rings = [None; 2];
        for (ring, direction) in rings.iter_mut().zip(BOTH).filter(|_| scatter_gather) {
            let Some(channel) = config.channel(direction) else { continue };
            let pool = channel.pool.ok_or(AxiDmaError::NoPool { channel: direction })?;
            let end = pool.iova.checked_add(pool.block.len as u64);
            let fits =
                end.is_some_and(|end| config.address_bits >= 64 || end.get() <= 1 << config.address_bits);
            let aligned = pool.block.pa.is_aligned(64) && pool.iova.is_aligned(64);
            if pool.block.len < pool_bytes(1) || !aligned || !fits {
                return Err(AxiDmaError::Pool { channel: direction, pool, needed: pool_bytes(1) });
            }
            *ring = Some(Ring::new(pool, config.coherent));
        }
        let [mm2s, s2mm] = rings.map(Channel::new);
        // Nobody else has it yet: the reset below is through before anything can start.
        let state = State { mastery: Mastery::Resetting, mm2s, s2mm };
        let core = Self { regs, memory, clock, config, scatter_gather, state: Mutex::new(state) };
        core.reset()?;
        Ok(core)
    }

    fn read(&self, direction: Direction, offset: u32) -> u32 {
        self.regs.read32(at(direction, offset))
    }
    fn write(&self, direction: Direction, offset: u32, value: u32) {
        self.regs.write32(at(direction, offset), value);
    }
    fn control(&self, direction: Direction) -> Dmacr {
        Dmacr::from_bits(self.read(direction, reg::DMACR))
    }
    fn set_control(&self, direction: Direction, control: Dmacr) {
        self.write(direction, reg::DMACR, control.into_bits());
    }
    fn status(&self, direction: Direction) -> Dmasr {
        Dmasr::from_bits(self.read(direction, reg::DMASR))
    }
    fn wide(&self) -> bool {
        self.config.address_bits > 32
    }
    /// The upper half last: on a core of more than 32 bits it is what starts.
    fn write_address(&self, direction: Direction, low: u32, address: Iova) {
        self.write(direction, low, address.get() as u32);
        if self.wide() {
            self.write(direction, low + 4, (address.get() >> 32) as u32);
        }
    }
    fn read_address(&self, direction: Direction, low: u32) -> Iova {
        let high = if self.wide() { self.read(direction, low + 4) } else { 0 };
        Iova(u64::from(high) << 32 | u64::from(self.read(direction, low)))
    }

    pub fn has_scatter_gather(&self) -> bool {
        self.scatter_gather
    }

    pub fn is_idle(&self) -> bool {
        self.with(|state| BOTH.iter().all(|direction| state.channel(*direction).outstanding() == 0))
    }

    pub fn present(&self) -> impl Iterator<Item = Direction> {
        BOTH.into_iter().filter(|direction| self.config.channel(*direction).is_some())
    }

    /// Runs `change` under the lock, and the callbacks that come of it afterwards: while the core is being reset, whoever
    /// resets it runs them when that is through. A callback may terminate a channel, and would wait for a reset that its
    /// own caller has yet to do.
    pub fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut news = Vec::new();
        let result = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            if state.mastery != Mastery::Resetting {
                for direction in BOTH {
                    news.append(&mut state.channel(direction).news);
                }
            }
            result
        };
        deliver(news);
        result
    }

    pub fn mask_interrupts(&self) {
        for direction in self.present() {
            let control = Dmacr::from_bits(self.control(direction).into_bits() & !irq::ALL);
            self.set_control(direction, control);
        }
    }

    /// Starts what is issued, if the channel has nothing to do (Linux `xilinx_dma_start_transfer`). Waits for nothing
    /// but a few clocks of the core, with the lock held.
    pub fn start(&self, state: &mut State, direction: Direction) {
        let ready = state.mastery == Mastery::Ready;
        let channel = state.channel(direction);
        if !ready || channel.mode != Mode::Idle || channel.terminating || channel.issued.is_empty() {
            return;
        }
        let cyclic = channel.issued.front().is_some_and(|first| first.cyclic.is_some());
        let single = cyclic || !self.scatter_gather;
        let count = if single { 1 } else { channel.issued.len().min(MAX_BATCH) };
        channel.running.extend(channel.issued.drain(..count));
        if let Some(ring) = &channel.ring {
            for transaction in &channel.running {
                let Transaction { first, chunks, cyclic, .. } = transaction;
                let to_stream = direction == Direction::MemToDev;
                ring.write(&self.memory, *first, chunks, to_stream, cyclic.is_some());
            }
            ring.publish(&self.memory);
        }
        if !self.run(channel, direction, cyclic) {
            // It was told no tail and has fetched nothing.
            channel.on = false;
            self.set_control(direction, self.control(direction).with_rs(false));
            // Nobody would come back for what is issued behind them.
            let mut failed = ::core::mem::take(&mut channel.running);
            failed.append(&mut channel.issued);
            for transaction in failed {
                channel.complete(transaction, 0, Err(TransferError::NotStarted));
            }
            return;
        }
        channel.mode = Mode::Running;
        self.kick(channel, direction, cyclic);
    }

    /// Sets RS. False if the channel does not leave Halted.
    fn run(&self, channel: &mut Channel, direction: Direction, cyclic: bool) -> bool {
        let control = self.control(direction);
        // The manual allows to change this bit only while the channel does not run.
        if channel.on && control.cyclic() != cyclic {
            self.set_control(direction, control.with_rs(false));
            if !self.spin(direction, |status| status.halted()) {
                return false;
            }
            channel.on = false;
        }
        let delay = self.config.channel(direction).map_or(0, |config| config.irq_delay);
        // A packet may fill several S2MM transactions, so the number of packets is not known.
        let counted = self.scatter_gather && !cyclic && (direction == Direction::MemToDev || delay > 0);
        let packets = if counted { channel.running.len().clamp(1, MAX_BATCH) as u8 } else { 1 };
        let control = Dmacr::from_bits(control.into_bits() | irq::ALL)
            .with_irq_threshold(packets)
            .with_irq_delay(delay)
            .with_cyclic(cyclic)
            .with_rs(channel.on);
        self.set_control(direction, control);
        if channel.on {
            return true;
        }
        if let (Some(ring), Some(front)) = (&channel.ring, channel.running.front()) {
            self.write_address(direction, reg::CURDESC, ring.iova(front.first));
        }
        self.set_control(direction, control.with_rs(true));
        channel.on = self.spin(direction, |status| !status.halted());
        channel.on
    }

    fn spin(&self, direction: Direction, done: impl Fn(Dmasr) -> bool) -> bool {
        (0..SPINS).any(|_| done(self.status(direction)))
    }

    /// The write that makes the engine work.
    fn kick(&self, channel: &Channel, direction: Direction, cyclic: bool) {
        let Some(last) = channel.running.back() else { return };
        match (&channel.ring, last.chunks.first()) {
            (Some(ring), _) => {
                let end = ring.slot(last.first, last.chunks.len().saturating_sub(1));
                let tail = if cyclic { ring.beyond() } else { ring.iova(end) };
                self.write_address(direction, reg::TAILDESC, tail);
            }
            (None, Some(chunk)) => {
                self.write_address(direction, reg::ADDRESS, chunk.address);
                self.write(direction, reg::LENGTH, chunk.len);
            }
            (None, None) => {}
        }
    }

    /// Bytes that the descriptors of a transaction say were moved, and whether the last one is complete.
    pub fn moved(&self, ring: &Ring, transaction: &Transaction, direction: Direction) -> (u64, bool) {
        let (mut bytes, mut complete) = (0, false);
        for (n, chunk) in transaction.chunks.iter().enumerate() {
            let status = ring.status(&self.memory, ring.slot(transaction.first, n));
            let failed = status.int_err() || status.slv_err() || status.dec_err();
            complete = status.complete() && !failed;
            let told = u64::from(status.transferred().min(chunk.len));
            bytes += match direction {
                Direction::MemToDev if complete => u64::from(chunk.len),
                _ if complete || failed => told,
                _ => 0,
            };
            if !complete {
                break;
            }
        }
        (bytes, complete)
    }

    /// Ends what the descriptors in memory say is complete.
    fn reap(&self, channel: &mut Channel, direction: Direction) {
        let Some(ring) = channel.ring else { return };
        while let Some(front) = channel.running.front() {
            if front.cyclic.is_some() {
                return self.reap_periods(channel, &ring, direction);
            }
            let (bytes, complete) = self.moved(&ring, front, direction);
            if !complete {
                return;
            }
            if let Some(front) = channel.running.pop_front() {
                channel.complete(front, bytes, Ok(()));
            }
        }
    }

    /// Reports the periods that have passed. An engine that goes all the way round between two interrupts is reported
    /// once per period only.
    fn reap_periods(&self, channel: &mut Channel, ring: &Ring, direction: Direction) {
        let Some(front) = channel.running.front_mut() else { return };
        let Some(cyclic) = &mut front.cyclic else { return };
        let periods = front.chunks.len().checked_div(cyclic.chunks).unwrap_or(0);
        for _ in 0..periods {
            let first = cyclic.next * cyclic.chunks;
            let Some(chunks) = front.chunks.get(first..first + cyclic.chunks) else { return };
            let slots = (0..chunks.len()).map(|n| ring.slot(front.first, first + n));
            let mut bytes = 0;
            for (slot, chunk) in slots.clone().zip(chunks) {
                let status = ring.status(&self.memory, slot);
                if !status.complete() || status.slv_err() || status.dec_err() || status.int_err() {
                    return;
                }
                bytes += match direction {
                    Direction::MemToDev => u64::from(chunk.len),
                    Direction::DevToMem => u64::from(status.transferred().min(chunk.len)),
                };
            }
            for slot in slots {
                ring.clear_status(&self.memory, slot);
            }
            cyclic.total = cyclic.total.saturating_add(bytes);
            cyclic.next = (cyclic.next + 1) % periods;
            let completion = Completion {
                cookie: front.cookie,
                result: Ok(()),
                transferred: cyclic.total,
                residue: cyclic.residue(front.len),
                ongoing: true,
            };
            channel.news.push((front.notifier.clone(), completion));
        }
    }

    /// The transfer of a core without scatter-gather is through.
    fn direct_done(&self, channel: &mut Channel, direction: Direction) {
        if let Some(front) = channel.running.pop_front() {
            let bytes = match direction {
                Direction::MemToDev => front.len,
                Direction::DevToMem => u64::from(self.read(direction, reg::LENGTH)).min(front.len),
            };
            channel.complete(front, bytes, Ok(()));
        }
    }

    /// Deals with a channel's interrupt (Linux `xilinx_dma_irq_handler` and its tasklet).
    pub fn handle_irq(&self, direction: Direction) -> bool {
        let (ours, failed) = self.with(|state| self.interrupt(state, direction));
        if failed {
            // Whoever waits for the core looks at what became of it.
            let _stuck = self.reset();
        }
        ours
    }

    /// Gives whether the interrupt was ours, and whether the core has to be reset.
    fn interrupt(&self, state: &mut State, direction: Direction) -> (bool, bool) {
        match state.mastery {
            Mastery::Ready => {}
            Mastery::Resetting => return (false, false),
            Mastery::Stuck => return (self.unstick(state), false),
        }
        let status = self.read(direction, reg::DMASR);
        let pending = status & irq::ALL;
        if pending == 0 {
            return (false, false);
        }
        self.write(direction, reg::DMASR, pending);
        let channel = state.channel(direction);
        if channel.mode == Mode::Stopping {
            return (true, false);
        }
        if pending & (irq::IOC | irq::DELAY) != 0 && channel.mode == Mode::Running {
            match self.scatter_gather {
                true => self.reap(channel, direction),
                false => self.direct_done(channel, direction),
            }
        }
        if pending & irq::ERROR != 0 || status & error::ALL != 0 {
            self.fail(channel, direction, status);
            // The reset forgets what the other channel met: an SMMU may refuse everything until it has been seen to.
            let other = other(direction);
            if self.config.channel(other).is_some() {
                let status = self.read(other, reg::DMASR);
                if status & error::ALL != 0 {
                    self.fail(state.channel(other), other, status);
                }
            }
            state.mastery = Mastery::Resetting;
            return (true, true);
        }
        if channel.running.is_empty() {
            channel.mode = Mode::Idle;
            self.start(state, direction);
        }
        (true, false)
    }

    /// Notes what was wrong. The transaction ends when the core has been reset.
    fn fail(&self, channel: &mut Channel, direction: Direction, status: u32) {
        let (mut current, mut tail) = (Iova(0), Iova(0));
        if self.scatter_gather {
            current = self.read_address(direction, reg::CURDESC);
            tail = self.read_address(direction, reg::TAILDESC);
        }
        self.reap(channel, direction);
        channel.last_error = Some(HardwareError { status, current, tail });
        channel.failure = Some(diagnose(status, direction, current, channel.buffer_at(current)));
    }

    /// Resets the core, ends what cannot go on, and starts the rest. The caller has set [`Mastery::Resetting`] and
    /// holds no lock.
    pub fn reset(&self) -> Result<(), AxiDmaError> {
        let Some(direction) = self.present().next() else { return Ok(()) };
        if !self.scatter_gather {
            self.with(|state| {
                // Their status does not survive; nothing in memory tells it.
                for direction in self.present() {
                    let channel = state.channel(direction);
                    if channel.failure.is_none() && self.status(direction).ioc_irq() {
                        self.direct_done(channel, direction);
                    }
                }
            });
        }
        self.set_control(direction, self.control(direction).with_reset(true));
        let read = || u64::from(self.read(direction, reg::DMACR));
        let done = |control| !Dmacr::from_bits(control as u32).reset();
        let waited = poll(&self.clock, "AXI DMA DMACR.Reset == 0", RESET_TIMEOUT_US, read, done);
        self.with(|state| match waited {
            Ok(_) => {
                self.after_reset(state);
                Ok(())
            }
            Err(timeout) => {
                state.mastery = Mastery::Stuck;
                let (control, status) = (self.read(direction, reg::DMACR), self.read(direction, reg::DMASR));
                Err(AxiDmaError::Reset { timeout, control, status })
            }
        })
    }

    /// A reset that took too long may have ended since.
    pub fn unstick(&self, state: &mut State) -> bool {
        let ended = self.present().all(|direction| !self.control(direction).reset());
        if state.mastery == Mastery::Stuck && ended {
            self.after_reset(state);
            return true;
        }
        false
    }

    /// Both channels are halted and touch no memory.
    fn after_reset(&self, state: &mut State) {
        state.mastery = Mastery::Ready;
        for direction in self.present() {
            let channel = state.channel(direction);
            self.reap(channel, direction);
            if channel.terminating {
                self.end_all(channel, direction);
            } else if let Some(front) = channel.running.pop_front() {
                let error = channel.failure.unwrap_or(TransferError::EngineReset);
                let bytes = self.moved_of(channel, &front, direction);
                channel.complete(front, bytes, Err(error));
            }
            while let Some(transaction) = channel.running.pop_back() {
                channel.issued.push_front(transaction);
            }
            (channel.mode, channel.on, channel.failure) = (Mode::Idle, false, None);
            self.set_control(direction, Dmacr::from_bits(self.control(direction).into_bits() | irq::ALL));
        }
        for direction in BOTH {
            self.start(state, direction);
        }
    }

    /// Bytes that a transaction that is not complete has moved.
    pub fn moved_of(&self, channel: &Channel, transaction: &Transaction, direction: Direction) -> u64 {
        match (&channel.ring, &transaction.cyclic) {
            (_, Some(cyclic)) => cyclic.total,
            (Some(ring), None) => self.moved(ring, transaction, direction).0,
            (None, None) => 0,
        }
    }

    /// Ends everything of a channel that has stopped.
    pub fn end_all(&self, channel: &mut Channel, direction: Direction) {
        for transaction in ::core::mem::take(&mut channel.running) {
            let bytes = self.moved_of(channel, &transaction, direction);
            channel.complete(transaction, bytes, Err(TransferError::Terminated));
        }
        let issued = ::core::mem::take(&mut channel.issued);
        let queued: VecDeque<_> =
            issued.into_iter().chain(::core::mem::take(&mut channel.submitted)).collect();
        for transaction in queued {
            channel.complete(transaction, 0, Err(TransferError::Terminated));
        }
        (channel.mode, channel.terminating) = (Mode::Idle, false);
    }

    /// Tells one channel to stop. With the lock, so that it does not hit what runs after somebody's reset.
    pub fn tell_to_stop(&self, channel: &mut Channel, direction: Direction) {
        channel.mode = Mode::Stopping;
        self.set_control(direction, self.control(direction).with_rs(false));
    }

    /// Waits until a channel that was told to stop has stopped; false if it does not. Without the lock.
    pub fn wait_for_halt(&self, direction: Direction) -> bool {
        let read = || u64::from(self.read(direction, reg::DMASR));
        let done = |status| Dmasr::from_bits(status as u32).halted();
        let waited = poll(&self.clock, "AXI DMA DMASR.Halted == 1", STOP_TIMEOUT_US, read, done);
        waited.is_ok_and(|status| status as u32 & error::ALL == 0)
    }

    /// Ends everything of a channel that was told to stop, if it has stopped and the stream is whole. Otherwise gives
    /// false, and the core has to be reset.
    pub fn end_stopped(&self, channel: &mut Channel, direction: Direction) -> bool {
        let status = self.status(direction);
        let stopped = channel.mode == Mode::Stopping && status.halted();
        if !stopped || status.into_bits() & error::ALL != 0 || self.cut(channel, direction) {
            return false;
        }
        match self.scatter_gather {
            true => self.reap(channel, direction),
            false if status.ioc_irq() => self.direct_done(channel, direction),
            false => {}
        }
        self.write(direction, reg::DMASR, irq::ALL);
        // A packet counted already would count for the next batch, if that has the same threshold: only a change
        // reloads the counter.
        self.set_control(direction, self.control(direction).with_cyclic(false).with_irq_threshold(1));
        channel.on = false;
        self.end_all(channel, direction);
        true
    }

    /// True unless a channel that has stopped left the stream between two packets. What comes out of the stream next
    /// would be put together with what was cut, or received by somebody else, and nobody would be told.
    fn cut(&self, channel: &Channel, direction: Direction) -> bool {
        if direction == Direction::DevToMem {
            return !channel.running.is_empty();
        }
        let Some(ring) = &channel.ring else {
            return !channel.running.is_empty() && !self.status(direction).ioc_irq();
        };
        let Some(slot) = ring.slot_at(self.read_address(direction, reg::CURDESC)) else { return false };
        let behind = |first| (slot + ring.slots() - first) % ring.slots();
        // One that was not begun looks like one that was cut if it is the first since the start. It begins at once.
        let last = channel.running.iter().find_map(|t| t.chunks.get(behind(t.first)));
        last.is_some_and(|chunk| !chunk.eof || !ring.status(&self.memory, slot).complete())
    }
}

fn at(direction: Direction, offset: u32) -> usize {
    let block = match direction {
        Direction::MemToDev => MM2S,
        Direction::DevToMem => S2MM,
    };
    (block + offset) as usize
}

fn check(config: &Config) -> Result<(), AxiDmaError> {
    let Config { address_bits, length_bits, .. } = *config;
    if !(32..=64).contains(&address_bits) {
        return Err(AxiDmaError::Parameter { what: "xlnx,addrwidth", value: address_bits.into() });
    }
    if !(8..=26).contains(&length_bits) {
        return Err(AxiDmaError::Parameter { what: "xlnx,sg-length-width", value: length_bits.into() });
    }
    for width in [config.mm2s, config.s2mm].into_iter().flatten().map(|channel| channel.data_width) {
        if !width.is_power_of_two() || !(8..=1024).contains(&width) {
            return Err(AxiDmaError::Parameter { what: "xlnx,datawidth", value: width.into() });
        }
    }
    Ok(())
}
