//! Simple mode: the descriptor is in the registers.

use portcullis_arch::{Access, MemoryType, Shareability};

use super::*;

const READ_WRITE: u32 = 0;
const WRITE_ONLY: u32 = 1;
const READ_ONLY: u32 = 2;

/// DATA_ATTR with the reset values and other burst types (0 fixed, 1 incrementing).
fn bursts(read: u32, write: u32) -> u32 {
    0x0483_d20f & !(3 << 26 | 3 << 12) | read << 26 | write << 12
}

#[test]
fn a_simple_transfer_copies_any_length_between_any_addresses() {
    let port = port();
    let mut z = fpd(&port);
    let mut random = Random(0x1234_5678);
    for size in [1, 3, 15, 16, 17, 4095, 4096, 70_001, 200_000] {
        let data = random.bytes(size);
        let (src, dst) = (SRC + random.below(4096), DST + random.below(4096));
        port.put(src, &data);
        port.put(dst - 1, &vec![0xee; size + 2]);
        z.w(reg::TOTAL_BYTE, 0);
        z.start_simple(READ_WRITE, src, dst, size as u32);
        assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (2, 1));
        assert_eq!(z.settle(10), Activity::Idle);
        assert_eq!(port.bytes(dst, size), data, "{size} bytes");
        assert_eq!(port.bytes(dst - 1, 1), [0xee], "before");
        assert_eq!(port.bytes(dst + size as u64, 1), [0xee], "after");
        assert_eq!(z.r(reg::TOTAL_BYTE), size as u32);
        assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2), z.r(reg::ISR)), (0, 0, 0x400));
        assert_eq!(z.r64(reg::SRC_CUR_PYLD_LSB), src + size as u64);
        assert_eq!(z.r64(reg::DST_CUR_PYLD_LSB), dst + size as u64);
        z.w(reg::ISR, 0xfff);
    }
}

#[test]
fn a_step_is_bounded_and_moves_large_pieces() {
    let port = port();
    let mut z = fpd(&port);
    z.start_simple(READ_WRITE, SRC, DST, 0x2_0001);
    assert_eq!(z.step(0), Activity::Busy);
    assert_eq!(z.r(reg::TOTAL_BYTE), 0x1_0000);
    assert_eq!(z.step(0), Activity::Busy);
    assert_eq!(z.step(0), Activity::Idle);
    assert_eq!(z.r(reg::TOTAL_BYTE), 0x2_0001);
}

#[test]
fn the_source_size_governs_and_the_destination_size_in_write_only_mode() {
    for (mode, expected) in [(READ_WRITE, 100), (WRITE_ONLY, 50), (READ_ONLY, 0)] {
        let port = port();
        let mut z = fpd(&port);
        z.w(reg::CTRL0, 0x80 | mode << 4);
        z.w64(reg::SRC_DSCR_WORD0, SRC);
        z.w(reg::SRC_DSCR_WORD2, 100);
        z.w64(reg::DST_DSCR_WORD0, DST);
        z.w(reg::DST_DSCR_WORD2, 50);
        z.w(reg::CTRL2, 1);
        z.settle(3);
        assert_eq!(z.r(reg::TOTAL_BYTE), expected, "mode {mode}");
    }
}

#[test]
fn write_only_mode_repeats_the_fill_data_of_one_bus_word() {
    for (wide, words) in [(true, 4), (false, 2)] {
        let port = port();
        let mut z = if wide { fpd(&port) } else { lpd(&port) };
        for i in 0..4 {
            z.w(reg::WR_ONLY_WORD0 + 4 * i, 0x0302_0100 + i * 0x0404_0404);
        }
        z.start_simple(WRITE_ONLY, SRC, DST + 3, 40_003);
        z.settle(3);
        let expected: Vec<u8> = (0..words * 4).cycle().take(40_003).collect();
        assert_eq!(port.bytes(DST + 3, 40_003), expected);
        assert_eq!(port.bytes(DST + 3 + 40_003, 1), [0]);
        assert!(port.take_log().iter().all(|s| s.access == Access::Write));
    }
}

#[test]
fn read_only_mode_reads_everything_and_writes_nothing() {
    let port = port();
    let mut z = fpd(&port);
    z.start_simple(READ_ONLY, SRC + 1, DST, 50_000);
    z.settle(3);
    let log = port.take_log();
    assert!(log.iter().all(|s| s.access == Access::Read));
    assert_eq!(log.iter().map(|s| s.len).sum::<usize>(), 50_000);
    assert_eq!((z.r(reg::ISR), z.r(reg::TOTAL_BYTE)), (0x400, 0));
}

#[test]
fn a_fixed_source_is_read_beat_by_beat_at_one_address() {
    let port = port();
    let mut z = lpd(&port);
    port.put(SRC, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    z.w(reg::DATA_ATTR, bursts(0, 1));
    z.start_simple(READ_WRITE, SRC, DST, 20);
    z.settle(2);
    assert_eq!(port.bytes(DST, 21), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 0]);
    let log = port.take_log();
    let reads = log.iter().filter(|s| s.access == Access::Read);
    assert_eq!(reads.map(|s| (s.addr, s.len)).collect::<Vec<_>>(), [(SRC, 8), (SRC, 8), (SRC, 4)]);
    assert_eq!(z.r64(reg::SRC_CUR_PYLD_LSB), SRC);
}

#[test]
fn a_fixed_destination_gets_every_beat_at_one_address() {
    let port = port();
    let mut z = fpd(&port);
    let data: Vec<u8> = (0..60).collect();
    port.put(SRC, &data);
    z.w(reg::DATA_ATTR, bursts(1, 0));
    // An odd address has the upper byte lanes only, in every beat (AXI4 A3.4.1).
    z.start_simple(READ_WRITE, SRC, DST + 4, 60);
    z.settle(2);
    let log = port.take_log();
    let writes: Vec<_> = log.iter().filter(|s| s.access == Access::Write).collect();
    assert_eq!(writes.len(), 5);
    assert!(writes.iter().all(|s| (s.addr, s.len) == (DST + 4, 12)));
    assert_eq!(port.bytes(DST, 20), [&[0; 4], &data[48..], &[0; 4]].concat());
    assert_eq!(z.r(reg::TOTAL_BYTE), 60);
}

#[test]
fn fixed_bursts_keep_whole_beats_whatever_the_buffer_and_the_step_hold() {
    for (attr, access, at) in [
        (bursts(0, 1), Access::Read, SRC + 5),
        (bursts(0, 0), Access::Read, SRC + 5),
        (bursts(1, 0), Access::Write, DST + 3),
        (bursts(0, 0), Access::Write, DST + 3),
    ] {
        for mode in [READ_WRITE, WRITE_ONLY, READ_ONLY] {
            let port = port();
            let mut z = fpd(&port);
            z.w(reg::DATA_ATTR, attr);
            z.start_simple(mode, SRC + 5, DST + 3, 100_003);
            assert_eq!(z.settle(10), Activity::Idle);
            let log = port.take_log();
            let beats: Vec<_> = log.iter().filter(|s| s.access == access && s.addr == at).collect();
            let Some((last, rest)) = beats.split_last() else { continue };
            let beat = 16 - (at % 16) as usize;
            assert!(rest.iter().all(|s| s.len == beat), "mode {mode} {attr:#x}");
            assert_eq!(rest.len() * beat + last.len, 100_003);
        }
    }
}

#[test]
fn intr_in_word_3_reports_and_counts_in_simple_mode() {
    let port = port();
    let mut z = fpd(&port);
    z.w(reg::SRC_DSCR_WORD3, 4);
    z.w(reg::DST_DSCR_WORD3, 4);
    z.start_simple(READ_WRITE, SRC, DST, 8);
    z.settle(2);
    assert_eq!(z.r(reg::ISR), 0x406);
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (1, 1));
    assert_eq!((z.r(reg::IRQ_SRC_ACCT), z.r(reg::IRQ_DST_ACCT)), (0, 0), "cleared by reading");
}

#[test]
fn size_0_is_done_at_once_without_data() {
    for mode in [READ_WRITE, WRITE_ONLY, READ_ONLY] {
        let port = port();
        let mut z = fpd(&port);
        z.start_simple(mode, SRC, DST, 0);
        assert_eq!(z.settle(1), Activity::Idle);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400, 0));
        assert!(port.take_log().is_empty());
    }
}

#[test]
fn total_byte_is_cleared_by_any_write_and_reports_its_overflow() {
    let port = port();
    let mut z = fpd(&port);
    z.start_simple(READ_WRITE, SRC, DST, 64);
    z.settle(2);
    for value in [0, 0xffff_ffff, 5] {
        z.registers.set(reg::TOTAL_BYTE, 0xffff_fff0);
        z.w(reg::TOTAL_BYTE, value);
        assert_eq!(z.r(reg::TOTAL_BYTE), 0);
    }
    z.registers.set(reg::TOTAL_BYTE, 0xffff_fff0);
    z.start_simple(READ_WRITE, SRC, DST, 64);
    z.settle(2);
    assert_eq!(z.r(reg::TOTAL_BYTE), 48);
    assert_eq!(z.r(reg::ISR), 0x408, "an overflow is not fatal");
}

#[test]
fn attributes_come_from_the_registers() {
    for (coherent_channel, cohrnt, expected) in [
        (true, true, Shareability::Outer),
        (true, false, Shareability::Non),
        (false, true, Shareability::Non),
    ] {
        let port = port();
        let mut z = if coherent_channel { lpd(&port) } else { fpd(&port) };
        // ARCACHE = 0xf (write-back), AWCACHE = 1 (Device-nGnRE).
        z.w(reg::DATA_ATTR, bursts(1, 1) & !(0xf << 22 | 0xf << 8) | 0xf << 22 | 1 << 8);
        z.w(reg::SRC_DSCR_WORD3, cohrnt.into());
        z.w(reg::DST_DSCR_WORD3, cohrnt.into());
        z.start_simple(READ_WRITE, SRC, DST, 8);
        z.settle(2);
        let log = port.take_log();
        assert_eq!(log.len(), 2);
        for (seen, memory) in log.iter().zip([MemoryType::NORMAL_WB, MemoryType::DEVICE_NGNRE]) {
            let attrs = seen.from.attrs;
            assert_eq!((attrs.memory(), attrs.shareability()), (memory, expected));
            assert!(attrs.non_secure() && !attrs.privileged() && !attrs.instruction());
            assert_eq!(seen.from.stream, z.config().stream);
            assert_eq!(seen.from.substream, None);
        }
    }
}

#[test]
fn enable_while_busy_changes_nothing() {
    let port = port();
    let mut z = fpd(&port);
    z.start_simple(READ_WRITE, SRC, DST, 0x2_0000);
    z.step(0);
    z.w64(reg::SRC_DSCR_WORD0, SRC + 0x8_0000);
    z.w(reg::CTRL2, 1);
    z.w(reg::CTRL2, 0);
    assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (2, 0));
    z.w(reg::CTRL2, 1);
    z.settle(3);
    assert_eq!(z.r(reg::TOTAL_BYTE), 0x2_0000);
    assert_eq!(z.r64(reg::SRC_CUR_PYLD_LSB), SRC + 0x2_0000);
}
