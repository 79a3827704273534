//! The system heap: memory from anywhere (Linux `system_heap.c`).

use alloc::sync::Arc;
use alloc::vec::Vec;

use portcullis_hal::{Block, DmaMemory};

use super::buffer::{Counters, Source, clean};
use super::{DmaBuf, HEAP_PAGE, Heap, HeapError, HeapUsage, whole_pages};
use crate::dma::SgEntry;

/// Sizes of pieces, in bytes: orders 8, 4 and 0.
const PIECES: [u64; 3] = [HEAP_PAGE << 8, HEAP_PAGE << 4, HEAP_PAGE];

/// Buffers in as few pieces as there are: 1 MiB, 64 KiB, 4 KiB, each aligned to its size. Once a size was not to be had, or the
/// rest is smaller, it is not tried again for this buffer.
pub struct SystemHeap<M: DmaMemory + Clone + 'static> {
    name: Arc<str>,
    shared: Arc<Shared<M>>,
}

struct Shared<M> {
    memory: M,
    counters: Counters,
}

impl<M: DmaMemory + Clone + 'static> Source for Shared<M> {
    fn counters(&self) -> &Counters {
        &self.counters
    }
    fn reclaim(&self, pieces: &[SgEntry]) {
        for piece in pieces {
            // The length was one when the piece was allocated.
            self.memory.free(Block { pa: piece.pa, len: piece.len as usize });
        }
    }
}

impl<M: DmaMemory + Clone + 'static> SystemHeap<M> {
    /// A heap over all of the platform's memory, named `system`.
    pub fn new(memory: M) -> Self {
        Self { name: "system".into(), shared: Arc::new(Shared { memory, counters: Counters::default() }) }
    }
}

impl<M: DmaMemory + Clone + 'static> Heap<M> for SystemHeap<M> {
    fn name(&self) -> &str {
        &self.name
    }

    fn alloc(&self, len: u64) -> Result<DmaBuf<M>, HeapError> {
        let size = whole_pages(&self.name, len)?;
        let memory = &self.shared.memory;
        let mut pieces: Vec<SgEntry> = Vec::new();
        let (mut left, mut sizes) = (size, PIECES.into_iter().peekable());
        while left > 0 {
            let Some(&piece) = sizes.peek() else {
                self.shared.reclaim(&pieces);
                return Err(HeapError::NoMemory { heap: self.name.clone(), len: size, largest: 0 });
            };
            // Comes zeroed.
            let block = (piece <= left).then(|| memory.alloc(piece as usize, piece as usize)).flatten();
            match block {
                Some(block) => {
                    pieces.push(SgEntry { pa: block.pa, len: piece });
                    left -= piece;
                }
                None => drop(sizes.next()),
            }
        }
        for piece in &pieces {
            clean(memory, *piece);
        }
        Ok(DmaBuf::new(&self.name, memory.clone(), self.shared.clone(), pieces))
    }

    fn usage(&self) -> HeapUsage {
        self.shared.counters.usage()
    }
}
