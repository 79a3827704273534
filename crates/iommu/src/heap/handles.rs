//! How a buffer travels between processes: a number per process, one buffer behind them (Linux file descriptors).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use portcullis_hal::DmaMemory;
use spin::Mutex;

use super::{DmaBuf, HeapError};

/// A process's number for a buffer. Means nothing in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u32);

impl fmt::Display for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The handles of one process. Dropping it is the process's exit: its references go, others stay.
pub struct HandleTable<M: DmaMemory + Clone + 'static> {
    process: Arc<str>,
    limit: usize,
    entries: Mutex<Vec<Option<DmaBuf<M>>>>,
}

impl<M: DmaMemory + Clone + 'static> HandleTable<M> {
    /// Linux's `RLIMIT_NOFILE`.
    pub const DEFAULT_LIMIT: usize = 1024;

    /// For a process without handles, of which it may have [`DEFAULT_LIMIT`](Self::DEFAULT_LIMIT).
    pub fn new(process: &str) -> Self {
        Self::with_limit(process, Self::DEFAULT_LIMIT)
    }

    /// With another limit.
    pub fn with_limit(process: &str, limit: usize) -> Self {
        Self { process: process.into(), limit, entries: Mutex::default() }
    }

    /// Name of the process.
    pub fn process(&self) -> &str {
        &self.process
    }
    /// Handles in use.
    pub fn len(&self) -> usize {
        self.entries.lock().iter().flatten().count()
    }
    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives the process a handle, the lowest number that is free (Linux `dma_buf_fd`). It holds a reference.
    pub fn export(&self, buffer: DmaBuf<M>) -> Result<Handle, HeapError> {
        let mut entries = self.entries.lock();
        let at = entries.iter().position(Option::is_none).unwrap_or(entries.len());
        let handle = u32::try_from(at).ok().filter(|_| at < self.limit).map(Handle);
        let too_many = || HeapError::TooManyHandles { process: self.process.clone(), limit: self.limit };
        let handle = handle.ok_or_else(too_many)?;
        match entries.get_mut(at) {
            Some(entry) => *entry = Some(buffer),
            None => entries.push(Some(buffer)),
        }
        Ok(handle)
    }

    /// Another reference to the buffer behind a handle, for a driver that was given the number (Linux `dma_buf_get`).
    pub fn import(&self, handle: Handle) -> Result<DmaBuf<M>, HeapError> {
        let entries = self.entries.lock();
        let entry = usize::try_from(handle.0).ok().and_then(|at| entries.get(at));
        entry.cloned().flatten().ok_or_else(|| self.bad(handle))
    }

    /// Installs a handle to the same buffer in another process, as Binder and `SCM_RIGHTS` do. This process keeps its own.
    pub fn pass(&self, handle: Handle, to: &Self) -> Result<Handle, HeapError> {
        to.export(self.import(handle)?)
    }

    /// Gives a handle up.
    pub fn close(&self, handle: Handle) -> Result<(), HeapError> {
        let at = usize::try_from(handle.0).ok();
        let entry = at.and_then(|at| self.entries.lock().get_mut(at).and_then(Option::take));
        // Dropped here, not under the lock: it may be the last reference.
        entry.map(drop).ok_or_else(|| self.bad(handle))
    }

    fn bad(&self, handle: Handle) -> HeapError {
        HeapError::BadHandle { process: self.process.clone(), handle }
    }
}

impl<M: DmaMemory + Clone + 'static> fmt::Debug for HandleTable<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandleTable").field("process", &self.process).field("handles", &self.len()).finish()
    }
}
