//! Collecting commands, so that many of them share a reservation, a register write and a CMD_SYNC.

use core::fmt;

use portcullis_arch::smmuv3::Command;

use super::{CommandQueue, Error, Platform};

/// Commands that a batch collects before it queues them.
pub const MAX_BATCH: usize = 64;

/// Commands on their way to a queue, in order. Full batches are queued as they fill; the rest, with a CMD_SYNC, by
/// [`submit_sync`](Batch::submit_sync), without which nothing is complete.
#[must_use = "commands of a batch are complete after submit_sync only"]
pub struct Batch<'q, P: Platform> {
    queue: &'q CommandQueue<P>,
    commands: [Command; MAX_BATCH],
    held: usize,
    /// Where the first command went, once it has gone.
    start: Option<u64>,
    result: Result<(), Error>,
}

impl<P: Platform> fmt::Debug for Batch<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { commands, held, start, result, .. } = self;
        f.debug_struct("Batch")
            .field("commands", &commands.get(..*held))
            .field("start", start)
            .field("result", result)
            .finish_non_exhaustive()
    }
}

impl<P: Platform> CommandQueue<P> {
    /// An empty batch.
    pub fn batch(&self) -> Batch<'_, P> {
        Batch { queue: self, commands: [Command::default(); MAX_BATCH], held: 0, start: None, result: Ok(()) }
    }
}

impl<P: Platform> Batch<'_, P> {
    /// Appends a command. If queueing fails, [`submit_sync`](Self::submit_sync) says so.
    pub fn push(&mut self, command: Command) {
        if self.held == self.queue.chunk() {
            self.flush();
        }
        if let Some(slot) = self.commands.get_mut(self.held) {
            *slot = command;
            self.held += 1;
        }
    }

    /// Appends commands.
    pub fn extend(&mut self, commands: impl IntoIterator<Item = Command>) {
        commands.into_iter().for_each(|command| self.push(command));
    }

    /// True if nothing was pushed since the start or the last [`submit_sync`](Self::submit_sync).
    pub fn is_empty(&self) -> bool {
        self.held == 0 && self.start.is_none() && self.result.is_ok()
    }

    fn flush(&mut self) {
        let commands = self.commands.get(..self.held).unwrap_or_default();
        match self.queue.submit(commands, false) {
            Ok((from, _)) => {
                self.start.get_or_insert(from);
            }
            // The first error is the cause.
            Err(error) => self.result = self.result.and(Err(error)),
        }
        self.held = 0;
    }

    /// Queues the rest with a CMD_SYNC and waits until all commands of the batch are complete. The batch is empty
    /// again afterwards. After an error all commands must be taken as not carried out.
    pub fn submit_sync(&mut self) -> Result<(), Error> {
        let commands = self.commands.get(..self.held).unwrap_or_default();
        let synced = self.queue.issue_sync_since(self.start, commands);
        (self.held, self.start) = (0, None);
        core::mem::replace(&mut self.result, Ok(())).and(synced)
    }
}
