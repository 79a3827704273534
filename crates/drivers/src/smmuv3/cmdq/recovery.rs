//! What happens when the SMMU stops at a command (IHI 0070 section 7.1): GERROR.CMDQ_ERR is active, CONS points at the
//! command and says why, and nothing moves until the error is acknowledged.
//!
//! | CMDQ_CONS.ERR | What is done | Who is told |
//! |---|---|---|
//! | illegal | the command becomes a CMD_SYNC, acknowledged | whoever waits for it |
//! | ATC invalidation not complete | acknowledged, the CMD_SYNC is tried again | whoever waits for a range with that CMD_SYNC in it: the device may still use what was to go |
//! | fetch aborted, or an unknown code | acknowledged, fetched again, up to eight times | if that does not help, everybody who waits, until [`CommandQueue::restart`] |
//!
//! All of them are also kept for [`gerror::handle`](crate::smmuv3::gerror::handle).

use alloc::collections::VecDeque;
use core::fmt;
use core::sync::atomic::Ordering;

use portcullis_arch::smmuv3::Command;
use portcullis_arch::smmuv3::regs::{CMDQ_ERR_SHIFT, CommandError, Gerror, offset};
use portcullis_hal::{DmaMemory, Mmio};

use super::{CommandQueue, Error, Platform, commands};

/// Fetches of one command that are tried before the queue is given up.
const FETCHES: u32 = 8;
/// Failures that are kept.
const KEPT: usize = 64;

/// A command at which the SMMU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandFailure {
    /// Counts the commands of the queue from 0.
    pub position: u64,
    /// CMDQ_CONS.ERR, if the architecture defines it.
    pub code: Option<CommandError>,
    /// The command as it lay in the queue.
    pub command: Command,
    /// How often the SMMU had stopped at it before.
    pub repeated: u32,
}

impl fmt::Display for CommandFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let why = match self.code {
            Some(CommandError::Ill) => "illegal command",
            Some(CommandError::Abt) => "abort on command fetch",
            Some(CommandError::AtcInvSync) => "ATC invalidation did not complete before CMD_SYNC",
            Some(CommandError::None) | None => "unknown error",
        };
        let [first, second] = self.command.0;
        write!(f, "CMDQ error at command {}: {why}: {first:#018x} {second:#018x}", self.position)?;
        if self.repeated > 0 { write!(f, " (again, {} times)", self.repeated) } else { Ok(()) }
    }
}

impl CommandFailure {
    /// It means that something was not done, for those who wait for it.
    fn is_final(&self) -> bool {
        matches!(self.code, Some(CommandError::Ill | CommandError::AtcInvSync))
    }
}

/// What is remembered about errors. Its lock also orders the writes of GERRORN.
#[derive(Debug, Default)]
pub(in crate::smmuv3) struct Recovery {
    /// Final failures, oldest first, for the submitters.
    failures: VecDeque<CommandFailure>,
    /// The newest failure that no longer fits in there.
    forgotten: Option<CommandFailure>,
    /// All of them, for the handler of GERROR.
    log: VecDeque<CommandFailure>,
    log_lost: u64,
    /// Where the SMMU stopped last, and how often in a row.
    last: Option<(u64, u32)>,
}

impl Recovery {
    fn note(&mut self, failure: CommandFailure) {
        if self.log.len() < KEPT {
            self.log.push_back(failure);
        } else {
            self.log_lost += 1;
        }
        if !failure.is_final() {
            return;
        }
        if self.failures.len() == KEPT {
            self.forgotten = self.failures.pop_front();
        }
        self.failures.push_back(failure);
    }

    /// Takes what has not been reported yet, and how many there was no room for.
    pub fn take_log(&mut self) -> (VecDeque<CommandFailure>, u64) {
        (core::mem::take(&mut self.log), core::mem::take(&mut self.log_lost))
    }

    /// The first failure in a range of positions.
    fn find(&self, from: u64, end: u64) -> Option<CommandFailure> {
        // What was forgotten was in the range if it is not older than it; being told too much is safe.
        let forgotten = self.forgotten.filter(|failure| failure.position >= from);
        let mut kept = self.failures.iter().filter(|failure| (from..end).contains(&failure.position));
        forgotten.or_else(|| kept.next().copied())
    }
}

impl<P: Platform> CommandQueue<P> {
    /// The active errors: GERROR against GERRORN.
    pub(in crate::smmuv3) fn active_errors(&self) -> (Gerror, u32) {
        let read = |at: u64| self.platform.registers().read32(at as usize);
        let (gerror, gerrorn) = (read(offset::GERROR), read(offset::GERRORN));
        (Gerror::from_bits(gerror ^ gerrorn), gerrorn)
    }

    /// Calls `work` while nobody else acknowledges errors.
    pub(in crate::smmuv3) fn with_errors<T>(&self, work: impl FnOnce(&mut Recovery) -> T) -> T {
        work(&mut self.recovery.lock())
    }

    /// For waiters: recovers from an error of the queue if there is one, unless another thread is at it.
    pub(super) fn attend(&self) {
        let (active, _) = self.active_errors();
        if active.msi_cmdq_abt_err() {
            self.abandon_messages();
        }
        if active.cmdq_err()
            && let Some(mut recovery) = self.recovery.try_lock()
        {
            self.recover(&mut recovery);
        }
    }

    /// A message was aborted: from now on completion is read from CONS. The error itself is left to its handler.
    pub(in crate::smmuv3) fn abandon_messages(&self) {
        self.msi.store(false, Ordering::Relaxed);
    }

    /// Repairs and acknowledges an error of the queue, if one is active.
    pub(in crate::smmuv3) fn recover(&self, recovery: &mut Recovery) {
        let (active, gerrorn) = self.active_errors();
        if !active.cmdq_err() {
            return;
        }
        let mut cons = 0;
        let progress = self.ring.refresh(
            || {
                cons = self.platform.registers().read32(offset::CMDQ_CONS as usize);
                cons
            },
            |from, to| self.pinned(from, to),
        );
        let position = progress.hardware;
        if !progress.plausible || position >= self.ring.published() {
            // There is no command that could have failed: nothing to repair.
            self.acknowledge(gerrorn, Gerror::new().with_cmdq_err(true));
            return;
        }
        let repeated = match recovery.last {
            Some((at, times)) if at == position => times + 1,
            _ => 0,
        };
        let code = CommandError::from_code((cons >> CMDQ_ERR_SHIFT & 0x7f) as u8);
        let code = code.filter(|code| *code != CommandError::None);
        if self.stuck.load(Ordering::Relaxed) {
            return;
        }
        let failure = CommandFailure { position, code, command: self.read(position), repeated };
        recovery.last = Some((position, repeated));
        recovery.note(failure);
        if failure.is_final() {
            self.newest_failure.fetch_max(position + 1, Ordering::AcqRel);
        }
        match code {
            Some(CommandError::Ill) => {
                // The SMMU looks at nothing while the error is active.
                self.write(position, commands::sync_silent());
                self.clean(position, 1);
                self.platform.memory().wmb();
            }
            Some(CommandError::AtcInvSync) => {}
            _ if repeated + 1 >= FETCHES => {
                self.stuck.store(true, Ordering::Release);
                return;
            }
            _ => {
                // It may not have seen the slot.
                self.clean(position, 1);
                self.platform.memory().wmb();
            }
        }
        self.acknowledge(gerrorn, Gerror::new().with_cmdq_err(true));
    }

    /// Acknowledges active errors, `gerrorn` being what GERRORN holds. Under the lock of [`with_errors`](Self::with_errors).
    pub(in crate::smmuv3) fn acknowledge(&self, gerrorn: u32, errors: Gerror) {
        self.platform.registers().write32(offset::GERRORN as usize, gerrorn ^ errors.into_bits());
    }

    /// Tries again after the queue was given up. True if it had been.
    pub fn restart(&self) -> bool {
        let mut recovery = self.recovery.lock();
        let stuck = self.stuck.swap(false, Ordering::AcqRel);
        recovery.last = None;
        self.recover(&mut recovery);
        stuck
    }

    /// An error if one of the commands in `[from, end)` failed.
    pub(super) fn failed_in(&self, from: u64, end: u64) -> Result<(), Error> {
        if self.newest_failure.load(Ordering::Acquire) <= from {
            return Ok(());
        }
        match self.recovery.lock().find(from, end) {
            Some(CommandFailure { code, command, .. }) => {
                Err(Error::Command { code: code.unwrap_or(CommandError::None), command })
            }
            None => Ok(()),
        }
    }
}
