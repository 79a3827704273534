//! The register map, against a table of its own.

use portcullis_arch::zdma::WINDOW;
use portcullis_bus::mmio::Mmio;
use portcullis_bus::{BusError, IrqLevels};
use std::sync::{Arc, Mutex};

use super::*;

/// Offset, reset value, and what reads back after writing all ones to the channel at rest.
#[rustfmt::skip]
const MAP: [(u32, u32, u32); 43] = [
    (0x000, 0x1,         0x1),
    (0x004, 0,           0xffff_ffff),
    (0x100, 0,           0),
    (0x104, 0xfff,       0xfff),
    (0x108, 0,           0),
    (0x10c, 0,           0),
    (0x110, 0x80,        0xfe),
    (0x114, 0x3ff,       0x3ff),
    (0x118, 0,           0x3f),
    (0x11c, 0,           0),
    (0x120, 0x0483_d20f, 0x0fff_ffff),
    (0x124, 0,           0x1ff),
    (0x128, 0,           0xffff_ffff),
    (0x12c, 0,           0x1_ffff),
    (0x130, 0,           0x3fff_ffff),
    (0x134, 0,           0x1f),
    (0x138, 0,           0xffff_ffff),
    (0x13c, 0,           0x1_ffff),
    (0x140, 0,           0x3fff_ffff),
    (0x144, 0,           0x1f),
    (0x148, 0,           0xffff_ffff),
    (0x14c, 0,           0xffff_ffff),
    (0x150, 0,           0xffff_ffff),
    (0x154, 0,           0xffff_ffff),
    (0x158, 0,           0xffff_ffff),
    (0x15c, 0,           0x1_ffff),
    (0x160, 0,           0xffff_ffff),
    (0x164, 0,           0x1_ffff),
    (0x168, 0,           0),
    (0x16c, 0,           0),
    (0x170, 0,           0),
    (0x174, 0,           0),
    (0x178, 0,           0),
    (0x17c, 0,           0),
    (0x180, 0,           0),
    (0x184, 0,           0),
    (0x188, 0,           0),
    (0x18c, 0,           0xfff),
    (0x190, 0,           0),
    (0x194, 0,           0),
    (0x198, 0x100,       0x100),
    (0x19c, 0,           0),
    (0x200, 0,           0x1),
];

#[test]
fn every_register_resets_and_masks_as_documented() {
    let mut z = fpd(&port());
    for (offset, reset, _) in MAP {
        assert_eq!(z.r(offset), reset, "reset of {offset:#x}");
    }
    for (offset, _, written) in MAP.iter().filter(|m| m.0 != 0x108) {
        z.w(*offset, u32::MAX);
        assert_eq!(z.r(*offset), *written, "{offset:#x} after writing ones");
    }
    assert_eq!(z.r(0x100), 0, "no INV_APB from a documented offset");
    z.reset();
    for (offset, reset, _) in MAP {
        assert_eq!(z.r(offset), reset, "{offset:#x} after reset");
    }
}

#[test]
fn ien_and_ids_move_the_mask_and_keep_nothing() {
    let mut z = fpd(&port());
    z.w(reg::IEN, 0x7fd);
    assert_eq!((z.r(reg::IMR), z.r(reg::IEN)), (0x802, 0));
    z.w(reg::IDS, 0x00d);
    assert_eq!((z.r(reg::IMR), z.r(reg::IDS)), (0x80f, 0));
    z.w(reg::IEN, 0xffff_ffff);
    assert_eq!(z.r(reg::IMR), 0);
}

#[test]
fn an_undecoded_offset_sets_bit_0_and_answers_as_err_ctrl_says() {
    for (offset, apb_error) in [(0x008, true), (0x0fc, false), (0x1a0, true), (0x204, false), (0xffc, true)] {
        let mut z = fpd(&port());
        z.w(reg::ERR_CTRL, apb_error.into());
        let (read, write) =
            if apb_error { (Err(BusError::Slave), Err(BusError::Slave)) } else { (Ok(0), Ok(())) };
        assert_eq!(Registers32::read(&mut z, offset), read, "{offset:#x}");
        assert_eq!(z.r(reg::ISR), 1);
        z.w(reg::ISR, 1);
        assert_eq!(z.r(reg::ISR), 0);
        assert_eq!(Registers32::write(&mut z, offset, 1), write, "{offset:#x}");
        assert_eq!(z.r(reg::ISR), 1);
    }
}

#[test]
fn exactly_the_documented_offsets_are_decoded() {
    let mut z = fpd(&port());
    let decoded: Vec<u32> =
        (0..WINDOW as u32).step_by(4).filter(|&o| Registers32::read(&mut z, o).is_ok()).collect();
    assert_eq!(decoded, MAP.map(|m| m.0));
}

#[test]
fn only_aligned_words_are_taken() {
    let z = Mutex::new(fpd(&port()));
    assert_eq!(z.read32(0x120), Ok(0x0483_d20f));
    assert_eq!(z.read32(0x122), Err(BusError::Slave));
    assert_eq!(z.read64(0x120), Err(BusError::Slave));
    assert_eq!(z.mmio_read(0x120, &mut [0; 1]), Err(BusError::Slave));
    assert_eq!(z.mmio_write(0x120, &[0; 2]), Err(BusError::Slave));
    assert_eq!(z.read32(1 << 40), Err(BusError::Slave));
}

#[test]
fn the_line_follows_isr_and_not_imr() {
    let sink = Arc::new(IrqLevels::default());
    let line = IrqLine::new(sink.clone(), 124);
    let mut z = Zdma::new(ZdmaConfig::fpd(StreamId(0x14e8)), Box::new(port()), line);
    z.w(reg::ERR_CTRL, 0);
    z.r(0x8);
    assert!(!sink.level(124), "masked");
    z.w(reg::IEN, 1);
    assert!(sink.level(124), "a sticky bit that is unmasked interrupts at once");
    z.w(reg::IDS, 1);
    assert!(!sink.level(124));
    assert_eq!(z.r(reg::ISR), 1, "masking clears nothing");
    z.w(reg::IEN, 1);
    z.w(reg::ISR, 1);
    assert!(!sink.level(124));
    assert_eq!(sink.rises(124), 2);
    z.w(reg::ERR_CTRL, 1);
    assert!(Registers32::write(&mut z, 0x8, 0).is_err());
    assert!(sink.level(124));
    z.reset();
    assert!(!sink.level(124));
}

#[test]
fn control_bits_without_enable_start_nothing() {
    let mut z = fpd(&port());
    for value in [0x40, 0x42, 0x46, 0xff, 0] {
        z.w(reg::CTRL0, value);
        assert_eq!(z.step(0), Activity::Idle);
        assert_eq!((z.r(reg::STATUS), z.r(reg::ISR)), (0, 0));
    }
}
