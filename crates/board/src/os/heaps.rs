//! The dma-buf heaps of a board: of all memory, of the areas for contiguous memory that its tree sets aside, of its carveouts.

use std::sync::Arc;

use portcullis_iommu::heap::{CarveoutHeap, CmaHeap, Heap, SystemHeap};

use crate::machine::ReservedRegion;
use crate::sim::{Machine, Memory};

/// A heap of a board.
pub type BoardHeap = Arc<dyn Heap<Memory>>;

/// The name of a reserved region's node, without its address.
fn name(region: &ReservedRegion) -> &str {
    let name = region.path.rsplit('/').next().unwrap_or_default();
    name.split('@').next().unwrap_or_default()
}

/// The heaps: `system`; one for each `shared-dma-pool` that may be mapped; one for each region that nobody else may map.
pub fn heaps(machine: &Machine) -> Vec<BoardHeap> {
    let mut heaps: Vec<BoardHeap> = vec![Arc::new(SystemHeap::new(machine.dma_memory()))];
    for reserved in &machine.description().reserved {
        let Some(region) = reserved.region else { continue };
        let (name, memory) = (name(reserved), machine.dma_memory());
        let pool = reserved.compatible.iter().any(|c| c == "shared-dma-pool");
        // A region that is too small for a page is no heap.
        if pool && !reserved.no_map {
            if let Ok(heap) = CmaHeap::over(name, memory, region.base, region.size) {
                heaps.push(Arc::new(heap));
            }
        } else if reserved.no_map
            && let Ok(heap) = CarveoutHeap::new(name, memory, region.base, region.size)
        {
            heaps.push(Arc::new(heap));
        }
    }
    heaps
}
