//! Where the registers go: one after the other in the order of the board's addresses, in a window that is as small as a PCI
//! BAR can be.

use portcullis_arch::Pa;
use portcullis_board::tree::Region;

use super::{Device, GuestTreeError, MAX_WINDOW, MIN_WINDOW};

/// What the guest kernel keeps of the 32-bit PCI memory, at least.
const LEFT_FOR_PCI: u64 = 0x10_0000;
/// The window is by default at a multiple of this.
const DEFAULT_ALIGN: u64 = 0x1000_0000;

/// The window in `memory`, and the address of each device.
///
/// Devices start on 64 KiB, so that each can be mapped alone with every page size; SMMUs at a multiple of their size, as the
/// hardware has them.
pub(super) fn place(
    devices: &[&Device<'_>],
    memory: Region,
    base: Option<u64>,
) -> Result<(Region, Vec<Pa>), GuestTreeError> {
    let mut end = 0u64;
    let mut offsets = Vec::with_capacity(devices.len());
    for device in devices {
        let too_many = |needed| GuestTreeError::TooManyDevices {
            node: device.node.path.clone(),
            needed,
            limit: MAX_WINDOW,
        };
        let size = device.region.size;
        if size > MAX_WINDOW {
            return Err(too_many(end.saturating_add(size)));
        }
        let align = if device.kind.is_smmu() { size.next_power_of_two() } else { 0 };
        let offset = end.next_multiple_of(align.max(MIN_WINDOW));
        end = offset + size;
        if end > MAX_WINDOW {
            return Err(too_many(end));
        }
        offsets.push(offset);
    }
    let size = end.next_power_of_two().max(MIN_WINDOW);
    let window = Region { base: Pa(fit(memory, size, base)?), size };
    Ok((window, offsets.into_iter().map(|o| window.base.wrapping_add(o)).collect()))
}

fn fit(memory: Region, size: u64, wanted: Option<u64>) -> Result<u64, GuestTreeError> {
    let (start, end) = (memory.base.get(), memory.base.get().saturating_add(memory.size));
    let first = start.saturating_add(LEFT_FOR_PCI);
    let last = end.saturating_sub(size);
    let base = wanted.unwrap_or_else(|| {
        // The machine has room for the default, or the highest place has to do.
        let usual = last & !(DEFAULT_ALIGN - 1);
        if usual >= first { usual } else { last & !(size - 1) }
    });
    let refuse = |reason: String| Err(GuestTreeError::Window { base, size, reason });
    if !base.is_multiple_of(size) {
        return refuse("its base must be a multiple of its size, as it is a PCI BAR".into());
    }
    if base < first || base > last {
        return refuse(format!(
            "it must lie in QEMU's 32-bit PCI memory {memory} and leave the first {LEFT_FOR_PCI:#x} bytes of it to PCI devices"
        ));
    }
    Ok(base)
}
