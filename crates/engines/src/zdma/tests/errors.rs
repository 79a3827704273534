//! Error responses: each kind of access has its bit, ends the run, and leaves the channel ready for the next.

use portcullis_arch::Access;

use super::*;
use crate::testport::Rule;

const LIST: u64 = RAM + 0x1000;
const OTHER: u64 = RAM + 0x8000;

/// Two pairs of descriptors of 4096 bytes, all with INTR.
fn two_pairs(port: &TestPort) -> Zdma {
    port.put(SRC, &[0x5a; 8192]);
    for i in 0..2 {
        let command = if i == 1 { Command::Stop } else { Command::Next };
        let at = 32 * i;
        put_linked(port, LIST + at, SRC + 4096 * i, 4096, control(command, true), LIST + at + 32);
        put_linked(port, OTHER + at, DST + 4096 * i, 4096, control(command, true), OTHER + at + 32);
    }
    fpd(port)
}

#[test]
fn each_kind_of_access_reports_its_own_error_and_ends_the_run() {
    // Where it faults, ISR, bytes written, source and destination descriptors counted.
    let cases = [
        ("source data", Access::Read, SRC + 5000, 0x100, 5000, 1, 1),
        ("destination data", Access::Write, DST + 5000, 0x200, 5000, 1, 1),
        ("source descriptor", Access::Read, LIST + 40, 0x40, 4096, 1, 1),
        ("source descriptor, second half", Access::Read, LIST + 48, 0x40, 4096, 1, 1),
        ("destination descriptor", Access::Read, OTHER + 40, 0x80, 4096, 1, 1),
        ("first source descriptor", Access::Read, LIST, 0x40, 0, 0, 0),
        ("first destination descriptor", Access::Read, OTHER, 0x80, 0, 0, 0),
    ];
    for (name, access, at, error, bytes, sources, destinations) in cases {
        let port = port();
        let mut z = two_pairs(&port);
        port.add(at..at + 8, access, Rule::Terminate);
        z.w(reg::IEN, 0x7fd);
        z.start_lists(LIST, OTHER);
        assert_eq!(z.settle(2), Activity::Idle, "{name}");
        let done = if sources > 0 { 0x6 } else { 0 };
        assert_eq!(z.r(reg::ISR), 0x400 | error | done, "{name}");
        assert_eq!((z.r(reg::STATUS), z.r(reg::CTRL2)), (3, 0), "{name}");
        assert_eq!(z.r(reg::TOTAL_BYTE), bytes, "{name}");
        assert_eq!(z.r(reg::IRQ_SRC_ACCT), sources, "{name}");
        assert_eq!(z.r(reg::IRQ_DST_ACCT), destinations, "{name}");
        assert!(z.irq_level());
        let written = port.bytes(DST, 8192).iter().filter(|b| **b == 0x5a).count();
        assert_eq!(written as u32, bytes, "{name}");

        // Nothing restarts by itself, not even when CTRL0 is written; the next start forgets the error.
        z.w(reg::CTRL0, SG);
        assert_eq!(z.step(0), Activity::Idle);
        port.clear_rules();
        z.w(reg::ISR, 0xfff);
        z.w(reg::CTRL2, 1);
        assert_eq!(z.settle(2), Activity::Idle);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x406, 0), "{name}");
    }
}

#[test]
fn memory_that_does_not_answer_is_an_error_too() {
    for (src, dst, error) in [(0x1000, DST, 0x100), (SRC, 0x1000, 0x200)] {
        let port = port();
        let mut z = fpd(&port);
        z.start_simple(0, src, dst, 16);
        z.settle(2);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400 | error, 3));
    }
}

#[test]
fn errors_in_fixed_bursts_and_in_the_other_modes_are_reported() {
    for (mode, attr, access, at, error) in [
        (0, 0x0083_d20f, Access::Read, SRC, 0x100),
        (0, 0x0083_d20f, Access::Write, DST + 40, 0x200),
        (0, 0x0483_c20f, Access::Write, DST, 0x200),
        (1, 0x0483_d20f, Access::Write, DST + 40, 0x200),
        (1, 0x0483_c20f, Access::Write, DST, 0x200),
        (2, 0x0483_d20f, Access::Read, SRC + 40, 0x100),
        (2, 0x0083_d20f, Access::Read, SRC, 0x100),
    ] {
        let port = port();
        let mut z = fpd(&port);
        port.add(at..at + 1, access, Rule::Terminate);
        z.w(reg::DATA_ATTR, attr);
        z.start_simple(mode, SRC, DST, 64);
        z.settle(2);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400 | error, 3), "mode {mode} {attr:#x}");
        let expected = if access == Access::Write { at as u32 - DST as u32 } else { 0 };
        assert_eq!(z.r(reg::TOTAL_BYTE), expected);
        assert_eq!(z.r(reg::DBG1), 0, "the buffer is free again");
    }
}

#[test]
fn misaligned_descriptors_are_descriptor_errors() {
    for (source, destination, error) in [
        (LIST + 8, OTHER, 0x40),
        (LIST + 1, OTHER, 0x40),
        (LIST, OTHER + 4, 0x80),
        // Linked descriptors at a multiple of 16 only.
        (LIST + 0x110, OTHER, 0x40),
        (LIST, OTHER + 0x110, 0x80),
    ] {
        let port = port();
        let mut z = two_pairs(&port);
        for list in [LIST, OTHER] {
            put_linked(&port, list + 0x110, SRC, 16, control(Command::Stop, false), 0);
        }
        z.start_lists(source, destination);
        z.settle(2);
        assert_eq!((z.r(reg::ISR), z.r(reg::STATUS)), (0x400 | error, 3), "{source:#x} {destination:#x}");
        assert_eq!(z.r(reg::TOTAL_BYTE), 0);
    }
}

#[test]
fn a_linked_pointer_to_a_misaligned_descriptor_fails_when_it_is_followed() {
    let port = port();
    let mut z = two_pairs(&port);
    put_linked(&port, LIST, SRC, 64, control(Command::Next, false), LIST + 0x24);
    z.start_lists(LIST, OTHER);
    z.settle(2);
    assert_eq!((z.r(reg::ISR), z.r(reg::TOTAL_BYTE)), (0x440, 64));
    assert_eq!(z.r64(reg::SRC_CUR_DSCR_LSB), LIST + 0x24);
}
