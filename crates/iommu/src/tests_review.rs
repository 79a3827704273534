//! Drivers that say the wrong thing about a buffer that bounces.

use alloc::sync::Arc;

use portcullis_arch::Pa;
use portcullis_hal::DmaMemory;
use portcullis_hal::fake::FakeMemory;

use crate::dma::{DeviceConfig, Direction, DmaAttrs, DmaDevice, DmaError};

#[test]
fn a_sync_that_runs_over_the_end_of_a_bounced_buffer_is_refused_instead_of_doing_nothing() {
    let memory = Arc::new(FakeMemory::non_coherent(0x1000_0000, 1 << 20));
    let device = DmaDevice::direct("dma", memory.clone(), DeviceConfig::default());
    let block = memory.alloc(0x1000, 0x1000).unwrap();
    // It ends in the middle of a cache line.
    let len = 0x120;
    let at = device.map_single(block.pa, len, Direction::FromDevice, DmaAttrs::NONE).unwrap();
    assert_ne!(Pa(at.get()), block.pa, "it bounces");
    memory.device_write(Pa(at.get()), b"news");
    let too_long = device.sync_single_for_cpu(at, len + 1, Direction::FromDevice);
    assert!(matches!(too_long, Err(DmaError::NotMapped { .. })), "{too_long:?}");
    let behind = device.sync_single_for_device(at.wrapping_add(0x100), 0x40, Direction::FromDevice);
    assert!(matches!(behind, Err(DmaError::NotMapped { .. })), "{behind:?}");
    device.sync_single_for_cpu(at, len, Direction::FromDevice).unwrap();
    let mut seen = [0; 4];
    memory.read(block.pa, &mut seen);
    assert_eq!(&seen, b"news");
    device.unmap_single(at, len, Direction::FromDevice, DmaAttrs::NONE).unwrap();
}
