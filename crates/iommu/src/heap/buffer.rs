//! The buffer itself: memory, who is attached, and when it is freed.

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;
use spin::Mutex;

use super::attachment::Attached;
use super::{Attachment, HeapError, HeapUsage};
use crate::dma::{DmaDevice, DmaSpace, SgEntry};

/// What a heap counts.
#[derive(Default)]
pub(super) struct Counters {
    buffers: AtomicU64,
    bytes: AtomicU64,
    kept: AtomicU64,
}

impl Counters {
    pub fn usage(&self) -> HeapUsage {
        HeapUsage {
            buffers: self.buffers.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            kept: self.kept.load(Ordering::Relaxed),
        }
    }
}

/// Where the memory goes when the last reference is gone.
pub(super) trait Source: Send + Sync {
    fn counters(&self) -> &Counters;
    /// Takes the pieces of one buffer back.
    fn reclaim(&self, pieces: &[SgEntry]);
}

struct Buffer<M: DmaMemory + Clone + 'static> {
    heap: Arc<str>,
    memory: M,
    source: Arc<dyn Source>,
    /// In order; whole pages.
    pieces: Vec<SgEntry>,
    len: u64,
    attached: Mutex<Vec<Weak<Attached<M>>>>,
    /// Address spaces that may still owe an invalidation of it.
    lazy: Mutex<Vec<Arc<DmaSpace>>>,
    /// An unmap failed.
    reachable: AtomicBool,
}

/// A reference to a buffer; a clone is another one. The last one frees it.
pub struct DmaBuf<M: DmaMemory + Clone + 'static>(Arc<Buffer<M>>);

impl<M: DmaMemory + Clone + 'static> Clone for DmaBuf<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: DmaMemory + Clone + 'static> DmaBuf<M> {
    /// A buffer of these pieces, which are zeroed as devices see them.
    pub(super) fn new(heap: &Arc<str>, memory: M, source: Arc<dyn Source>, pieces: Vec<SgEntry>) -> Self {
        let len = pieces.iter().map(|piece| piece.len).sum();
        source.counters().buffers.fetch_add(1, Ordering::Relaxed);
        source.counters().bytes.fetch_add(len, Ordering::Relaxed);
        Self(Arc::new(Buffer {
            heap: heap.clone(),
            memory,
            source,
            pieces,
            len,
            attached: Mutex::default(),
            lazy: Mutex::default(),
            reachable: AtomicBool::new(false),
        }))
    }

    /// Name of the heap that it came from.
    pub fn heap(&self) -> &str {
        &self.0.heap
    }
    /// Bytes, whole pages.
    pub fn len(&self) -> u64 {
        self.0.len
    }
    /// Never: there are no buffers of 0 bytes.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }
    /// Where it is in memory, in order.
    pub fn pieces(&self) -> &[SgEntry] {
        &self.0.pieces
    }
    /// References to it: clones, handles and attachments.
    pub fn references(&self) -> usize {
        Arc::strong_count(&self.0)
    }
    /// True if both are references to one buffer.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Brings a device in, with a list of the pieces of its own (Linux `dma_buf_attach`). Nothing is mapped yet.
    pub fn attach(&self, device: &DmaDevice<M>) -> Attachment<M> {
        let attached = Arc::new(Attached::new(device.clone(), self.0.pieces.clone()));
        let mut list = self.0.attached.lock();
        list.retain(|attached| attached.strong_count() > 0);
        list.push(Arc::downgrade(&attached));
        drop(list);
        Attachment::new(self.clone(), attached)
    }

    /// Attachments, mapped or not.
    pub fn attachments(&self) -> usize {
        self.attached().len()
    }

    /// Lends the buffer to the CPU: what any device wrote can be read (Linux `DMA_BUF_IOCTL_SYNC` with `START`). Every mapped
    /// attachment is synced, in the direction it is mapped in: a CPU that only writes needs it as well, since it writes whole
    /// cache lines back.
    pub fn begin_cpu_access(&self) -> Result<(), HeapError> {
        self.sync(true)
    }

    /// Gives it back to the devices: what the CPU wrote can be read by all (`END`).
    pub fn end_cpu_access(&self) -> Result<(), HeapError> {
        self.sync(false)
    }

    /// All are synced even if one of them fails; the first error is told.
    fn sync(&self, for_cpu: bool) -> Result<(), HeapError> {
        self.attached().iter().map(|attached| attached.sync(for_cpu)).fold(Ok(()), Result::and)
    }

    /// Those that are attached. Without the lock around the list: their own work takes time.
    fn attached(&self) -> Vec<Arc<Attached<M>>> {
        let mut list = self.0.attached.lock();
        list.retain(|attached| attached.strong_count() > 0);
        list.iter().filter_map(Weak::upgrade).collect()
    }

    /// Copies bytes out, as a process does through its mapping of the buffer.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), HeapError> {
        self.check(offset, bytes.len())?;
        let mut rest = bytes;
        for (pa, len) in self.runs(offset, rest.len()) {
            let (now, later) = core::mem::take(&mut rest).split_at_mut(len);
            self.0.memory.read(pa, now);
            rest = later;
        }
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), HeapError> {
        self.check(offset, bytes.len())?;
        let mut rest = bytes;
        for (pa, len) in self.runs(offset, rest.len()) {
            let (now, later) = rest.split_at(len);
            self.0.memory.write(pa, now);
            rest = later;
        }
        Ok(())
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), HeapError> {
        let (len, size) = (len as u64, self.0.len);
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(HeapError::Bounds { offset, len, size }),
        }
    }

    /// The contiguous runs of a part of the buffer.
    fn runs(&self, offset: u64, len: usize) -> impl Iterator<Item = (Pa, usize)> {
        let (mut skip, mut left) = (offset, len as u64);
        self.0.pieces.iter().filter_map(move |piece| {
            if skip >= piece.len {
                skip -= piece.len;
                return None;
            }
            let run = (piece.len - skip).min(left);
            let pa = piece.pa.wrapping_add(skip);
            (skip, left) = (0, left - run);
            // Not more than a length in the CPU's memory.
            (run != 0).then_some((pa, run as usize))
        })
    }

    /// A device of this space may reach the buffer until a flush.
    pub(super) fn owed_by(&self, space: &Arc<DmaSpace>) {
        let mut lazy = self.0.lazy.lock();
        if !lazy.iter().any(|held| Arc::ptr_eq(held, space)) {
            lazy.push(space.clone());
        }
    }

    /// A device may reach the buffer for ever.
    pub(super) fn keep(&self) {
        self.0.reachable.store(true, Ordering::Relaxed);
    }
}

impl<M: DmaMemory + Clone + 'static> Drop for Buffer<M> {
    fn drop(&mut self) {
        let counters = self.source.counters();
        counters.buffers.fetch_sub(1, Ordering::Relaxed);
        counters.bytes.fetch_sub(self.len, Ordering::Relaxed);
        let flushed = self.lazy.get_mut().iter().all(|space| space.flush().is_ok());
        if flushed && !*self.reachable.get_mut() {
            self.source.reclaim(&self.pieces);
        } else {
            counters.kept.fetch_add(self.len, Ordering::Relaxed);
        }
    }
}

impl<M: DmaMemory + Clone + 'static> fmt::Debug for DmaBuf<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuf")
            .field("heap", &self.0.heap)
            .field("len", &self.0.len)
            .field("pieces", &self.0.pieces.len())
            .field("references", &self.references())
            .finish_non_exhaustive()
    }
}

/// Zeroes memory that was somebody else's, for the CPU and for devices that do not see its caches.
pub(super) fn zero(memory: &impl DmaMemory, piece: SgEntry) {
    const ZEROES: [u8; 256] = [0; 256];
    let mut at = 0;
    while at < piece.len {
        let len = (piece.len - at).min(ZEROES.len() as u64);
        memory.write(piece.pa.wrapping_add(at), ZEROES.get(..len as usize).unwrap_or(&ZEROES));
        at += len;
    }
    clean(memory, piece);
}

/// Makes devices see what the CPU wrote.
pub(super) fn clean(memory: &impl DmaMemory, piece: SgEntry) {
    memory.clean(piece.pa, usize::try_from(piece.len).unwrap_or(usize::MAX));
    memory.wmb();
}
