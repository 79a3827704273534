//! The command queue: many threads submit, the SMMU consumes, nobody takes a lock on the way.
//!
//! [`CommandQueue::issue`] queues commands, [`CommandQueue::issue_sync`] queues them with a CMD_SYNC behind and waits
//! until they are complete, [`Batch`] collects them. The slots and indices are `ring`'s business; here are the memory
//! that the slots lie in, the registers, the waiting and (in `recovery`) what happens when the SMMU stops.
//!
//! A CMD_SYNC is complete when CONS has passed it. Where the SMMU sends MSIs and is coherent, it also overwrites the
//! first word of the CMD_SYNC with zero, and a waiter looks there first: that is a cache line instead of a register.
//! The message may come after CONS has moved on (IHI 0070 section 3.18 promises nothing else), so the slot of the
//! last consumed CMD_SYNC is not given out again before its message has come; those of earlier ones are safe,
//! because a CMD_SYNC waits for the messages of its predecessors.
//!
//! Every wait is bounded, and one that runs out says what it waited for and what the registers said. The waits also
//! look after errors themselves, so nobody depends on the interrupt of GERROR being served in time.

mod atomics;
mod batch;
pub mod commands;
#[cfg(test)]
mod model_tests;
mod recovery;
mod ring;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::regs::{CMDQ_ERR_SHIFT, CommandError, QueueBase, offset};
use portcullis_arch::smmuv3::{Command, Opcode};
use portcullis_hal::{Block, DmaMemory, Mmio, poll};
use spin::Mutex;

use super::{Error, Platform, QueueRegisters};
use atomics::Native;
use recovery::Recovery;
use ring::{Left, Ring};

pub use batch::{Batch, MAX_BATCH};
pub use recovery::CommandFailure;

/// Bytes of a command.
const BYTES: usize = 16;
/// Looks at the queue alone before a waiter also asks GERROR.
const PATIENT_READS: u32 = 4;

/// Looks for a message alone before a waiter also reads CONS.
const LOOKS_AT_MEMORY: u32 = 10;

/// Where a queue goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueOptions {
    /// log2 of the entries; fewer are taken when memory is short.
    pub log2: u8,
    /// The SMMU snoops the CPU's caches.
    pub coherent: bool,
    /// Output address bits of the SMMU.
    pub address_bits: u8,
}

/// What a command queue is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandOptions {
    /// Size and place.
    pub queue: QueueOptions,
    /// IDR0.MSI. Completion by message needs a coherent SMMU as well.
    pub msi: bool,
    /// How long a wait may take, in microseconds (Linux: one second).
    pub timeout_us: u64,
}

/// The command queue of one SMMU.
pub struct CommandQueue<P: Platform> {
    platform: P,
    ring: Ring<Native>,
    block: Block,
    coherent: bool,
    keep_memory: AtomicBool,
    /// Completion by message; off for good after a message was aborted.
    msi: AtomicBool,
    timeout_us: u64,
    recovery: Mutex<Recovery>,
    /// One more than the position of the newest failed command.
    newest_failure: AtomicU64,
    /// Repeating a command has not helped: nothing is consumed until [`restart`](Self::restart).
    stuck: AtomicBool,
}

impl<P: Platform> fmt::Debug for CommandQueue<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ring, block, coherent, .. } = self;
        f.debug_struct("CommandQueue")
            .field("ring", ring)
            .field("block", block)
            .field("coherent", coherent)
            .finish_non_exhaustive()
    }
}

/// Allocates memory for `2^log2` entries of `bytes` each, fewer if there is no room, down to `2^min`.
pub(super) fn allocate<P: Platform>(
    platform: &P,
    what: &'static str,
    options: QueueOptions,
    bytes: usize,
    min: u8,
) -> Result<(Block, u8), Error> {
    let most = options.log2.min(19);
    let mut found = None;
    for log2 in (min.min(most)..=most).rev() {
        let len = bytes << log2;
        if let Some(block) = platform.memory().alloc(len, len.max(32)) {
            found = Some((block, log2));
            break;
        }
    }
    let (block, log2) = found.ok_or(Error::NoMemory { what, bytes: bytes << min.min(most) })?;
    let last = block.pa.get() + (block.len as u64 - 1);
    if last.checked_shr(options.address_bits.into()).unwrap_or(0) != 0 {
        platform.memory().free(block);
        return Err(Error::TableAddress { what, pa: block.pa.get(), bits: options.address_bits });
    }
    if !options.coherent {
        // The zeroes of the allocator, before the SMMU writes or reads there.
        platform.memory().clean(block.pa, block.len);
        platform.memory().wmb();
    }
    Ok((block, log2))
}

impl<P: Platform> CommandQueue<P> {
    /// Allocates the queue. It is not used before [`program`](Self::program).
    pub fn new(platform: P, options: CommandOptions) -> Result<Self, Error> {
        let (block, log2) = allocate(&platform, "the command queue", options.queue, BYTES, 1)?;
        let coherent = options.queue.coherent;
        Ok(Self {
            ring: Ring::new(log2.into()),
            platform,
            block,
            coherent,
            keep_memory: AtomicBool::new(false),
            msi: AtomicBool::new(options.msi && coherent),
            timeout_us: options.timeout_us,
            recovery: Mutex::new(Recovery::default()),
            newest_failure: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        })
    }

    /// Writes CMDQ_BASE, PROD and CONS. For a queue that is disabled, by the only thread that uses it. What had been
    /// queued before (a resume after a loss of power) counts as done: a reset invalidates everything anyway.
    pub fn program(&self) {
        let registers = self.platform.registers();
        let index = self.ring.restart();
        self.stuck.store(false, Ordering::Release);
        registers.write64(offset::CMDQ_BASE as usize, self.base().into_bits());
        registers.write32(offset::CMDQ_PROD as usize, index);
        registers.write32(offset::CMDQ_CONS as usize, index);
    }

    /// The value of CMDQ_BASE.
    pub fn base(&self) -> QueueBase {
        QueueBase::new()
            .with_allocate(true)
            .with_addr_55_5(self.block.pa.get() >> 5)
            .with_log2size(self.ring.len().trailing_zeros() as u8)
    }

    /// Slots.
    pub fn entries(&self) -> usize {
        self.ring.len() as usize
    }

    /// Completion is seen in memory, not by reading CONS.
    pub fn completes_by_message(&self) -> bool {
        self.msi.load(Ordering::Relaxed)
    }

    /// Drop will not free the queue's memory: for an SMMU that could not be turned off.
    pub fn keep_memory(&self) {
        self.keep_memory.store(true, Ordering::Relaxed);
    }

    /// Queues commands in order, without waiting for them. What the SMMU says about them goes to
    /// [`gerror::handle`](super::gerror::handle) only. With an error, those before it may have been queued: batches of up to
    /// 64 are queued as a whole or not at all.
    pub fn issue(&self, commands: &[Command]) -> Result<(), Error> {
        for chunk in commands.chunks(self.chunk()) {
            self.submit(chunk, false)?;
        }
        Ok(())
    }

    /// Queues commands in order, then waits until they and everything queued before them are complete. An error
    /// says which command the SMMU refused; the others have been carried out.
    pub fn issue_sync(&self, commands: &[Command]) -> Result<(), Error> {
        self.issue_sync_since(None, commands)
    }

    /// As `issue_sync`, for commands of which the first ones are at `start` already.
    fn issue_sync_since(&self, start: Option<u64>, commands: &[Command]) -> Result<(), Error> {
        let mut start = start;
        let whole = commands.len().saturating_sub(1) / self.chunk() * self.chunk();
        let (first, last) = commands.split_at_checked(whole).unwrap_or((commands, &[]));
        for chunk in first.chunks(self.chunk()) {
            let (from, _) = self.submit(chunk, false)?;
            start.get_or_insert(from);
        }
        let (from, end) = self.submit(last, true)?;
        let waited = self.wait(end);
        // What was refused is the better reason, also for a wait that ended because of it.
        self.failed_in(start.unwrap_or(from), end)?;
        waited
    }

    /// Commands that one reservation takes, with room for a CMD_SYNC.
    fn chunk(&self) -> usize {
        MAX_BATCH.min(self.entries().saturating_sub(1)).max(1)
    }

    /// Queues up to a chunk of commands; gives the positions it took.
    fn submit(&self, commands: &[Command], sync: bool) -> Result<(u64, u64), Error> {
        let count = commands.len() as u64 + u64::from(sync);
        if count == 0 {
            let at = self.ring.published();
            return Ok((at, at));
        }
        let from = match self.ring.reserve(count) {
            Some(from) => from,
            None => self.wait_for_room(count)?,
        };
        for (position, command) in (from..).zip(commands) {
            self.write(position, *command);
        }
        let end = from + count;
        if sync {
            let last = end - 1;
            let by_message = self.completes_by_message();
            self.write(
                last,
                if by_message { commands::sync_msi(self.address(last)) } else { commands::sync() },
            );
        }
        self.clean(from, count);
        self.platform.memory().wmb();
        self.ring.fill(from, count);
        self.publish();
        Ok((from, end))
    }

    fn publish(&self) {
        self.ring.publish(|index| self.platform.registers().write32(offset::CMDQ_PROD as usize, index));
    }

    /// Where the slot of a position lies.
    fn address(&self, position: u64) -> Pa {
        self.block.pa.wrapping_add(self.ring.slot(position) * BYTES as u64)
    }

    fn write(&self, position: u64, command: Command) {
        let [first, second] = command.0;
        let pa = self.address(position);
        self.platform.memory().store64(pa.wrapping_add(8), second);
        self.platform.memory().store64(pa, first);
    }

    fn read(&self, position: u64) -> Command {
        let pa = self.address(position);
        let memory = self.platform.memory();
        Command([memory.load64(pa), memory.load64(pa.wrapping_add(8))])
    }

    /// Writes slots back to where an SMMU that does not snoop can see them.
    fn clean(&self, from: u64, count: u64) {
        if self.coherent {
            return;
        }
        let before_end = count.min(self.ring.len() - self.ring.slot(from));
        let memory = self.platform.memory();
        memory.clean(self.address(from), before_end as usize * BYTES);
        if count > before_end {
            memory.clean(self.block.pa, (count - before_end) as usize * BYTES);
        }
    }

    /// Reads CONS and frees what the SMMU has done with. Gives the position up to which it has consumed.
    fn refresh(&self) -> u64 {
        let read = || self.platform.registers().read32(offset::CMDQ_CONS as usize);
        self.ring.refresh(read, |from, to| self.pinned(from, to)).hardware
    }

    /// Up to where the slots of `[from, to)`, which the SMMU has consumed, may be written.
    fn pinned(&self, from: u64, to: u64) -> u64 {
        Ring::<Native>::pinned(from, to, |position| {
            let first = self.platform.memory().load64(self.address(position));
            match (first as u32, first as u8 == Opcode::Sync as u8, first >> 12 & 3 == 1) {
                (0, _, _) | (_, true, false) => Left::Complete,
                // After an aborted message there may be none to wait for.
                (_, true, true) if self.completes_by_message() => Left::Pending,
                (_, true, true) => Left::Complete,
                _ => Left::Command,
            }
        })
    }

    /// Repeating a command has not helped; see [`restart`](Self::restart).
    pub fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Acquire)
    }

    /// Waits for room for `count` commands, and takes it.
    fn wait_for_room(&self, count: u64) -> Result<u64, Error> {
        if count > self.ring.len() {
            return Err(Error::QueueTooSmall { wanted: count as usize, room: self.entries() });
        }
        let mut found = None;
        self.wait_until("room in the command queue", || {
            self.refresh();
            found = self.ring.reserve(count);
            found.is_some()
        })?;
        // Not reachable: the wait ends well only with a position.
        found.ok_or(Error::QueueTooSmall { wanted: count as usize, room: self.entries() })
    }

    /// Waits until everything before `end` is complete, where a CMD_SYNC lies.
    fn wait(&self, end: u64) -> Result<(), Error> {
        let sync = self.address(end - 1);
        let by_message = self.completes_by_message();
        let mut looks = 0;
        self.wait_until("CMD_SYNC to complete", || {
            if self.ring.consumed() >= end {
                return true;
            }
            // A word that is not zero belongs to this CMD_SYNC, or to a later command. Then `consumed` has passed
            // this one.
            if by_message && self.platform.memory().load64(sync) as u32 == 0 {
                return true;
            }
            looks += 1;
            if by_message && looks < LOOKS_AT_MEMORY {
                return false;
            }
            self.refresh() >= end
        })
    }

    /// Polls `done`, and looks after errors of the queue while it does.
    fn wait_until(&self, what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), Error> {
        const WAITING: u64 = 0;
        const DONE: u64 = 1;
        const STUCK: u64 = 2;
        let mut reads = 0;
        let look = || {
            if done() {
                return DONE;
            }
            reads += 1;
            if reads < PATIENT_READS {
                return WAITING;
            }
            self.attend();
            if !self.stuck.load(Ordering::Acquire) {
                return WAITING;
            }
            if done() { DONE } else { STUCK }
        };
        match poll(self.platform.clock(), what, self.timeout_us, look, |state| state != WAITING) {
            Ok(DONE) => Ok(()),
            Ok(_) => Err(self.stuck_error()),
            Err(timeout) => {
                Err(Error::CommandQueue { what, waited_us: timeout.waited_us, seen: self.registers() })
            }
        }
    }

    /// What the registers say now.
    pub fn registers(&self) -> QueueRegisters {
        let read = |at: u64| self.platform.registers().read32(at as usize);
        QueueRegisters {
            prod: read(offset::CMDQ_PROD),
            cons: read(offset::CMDQ_CONS),
            gerror: read(offset::GERROR),
            gerrorn: read(offset::GERRORN),
        }
    }

    /// The error for somebody who waits while nothing is consumed any more.
    fn stuck_error(&self) -> Error {
        let seen = self.registers();
        let code = CommandError::from_code((seen.cons >> CMDQ_ERR_SHIFT & 0x7f) as u8);
        let command = self.read(self.refresh());
        Error::Command { code: code.unwrap_or(CommandError::None), command }
    }
}

impl<P: Platform> Drop for CommandQueue<P> {
    fn drop(&mut self) {
        if !*self.keep_memory.get_mut() {
            self.platform.memory().free(self.block);
        }
    }
}
