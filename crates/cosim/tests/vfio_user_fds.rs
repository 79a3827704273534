//! No descriptor is ever leaked. Alone in its process: it counts the descriptors of the process.

mod vfio_user_common;

use std::os::fd::AsFd;

use vfio_user_common::*;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn descriptors_on_any_message_cut_anywhere_are_closed_or_handed_over() {
    let file = tempfile::tempfile().unwrap();
    let messages = [
        "0200 0d00 10000000 00000000 00000000",
        "0400 0200 30000000 00000000 00000000  20000000 03000000 0000000000000000 0000004000000000 0000100000000000",
        "0400 0200 30000000 00000000 00000000  20000000 03000000 0000000000000000 0000004000000000 0000000000000000",
        "0600 0800 24000000 00000000 00000000  14000000 24000000 02000000 01000000 01000000",
        "0600 0800 24000000 00000000 00000000  14000000 24000000 02000000 01000000 09000000",
        "0a00 0900 20000000 00000000 00000000  0000000000000000 00000000 10000000",
        "0b00 0c00 10000000 01000000 00000000",
        "0f00 0600 10000000 00000000 00000000",
        "0f00 ff00 10000000 00000000 00000000",
        "0f00 0600 01000000 00000000 00000000",
    ];
    let before = open_descriptors();
    for text in messages {
        let bytes = hex(text);
        for cut in 1..=bytes.len() {
            for number in [1, 3, 16, 17, 40] {
                let fds = vec![file.as_fd(); number];
                let mut wire = Wire::negotiated();
                wire.send(&bytes[..cut], &fds);
                let first = wire.pump();
                if cut < bytes.len() && first.is_ok() {
                    wire.send(&bytes[cut..], &fds);
                    let _ = wire.pump();
                }
                let handed_over = wire.device.fds.len();
                assert!(handed_over <= 1);
            }
            assert_eq!(open_descriptors(), before, "{text} cut at {cut}");
        }
    }
    // Descriptors with random messages, random cuts, and a peer that goes away.
    let mut random = Random(0x5eed_0003);
    for _ in 0..fuzz_messages() / 40 {
        let mut wire = Wire::negotiated();
        for _ in 0..random.below(6) {
            let bytes = hex(messages[random.below(messages.len() as u64) as usize]);
            let cut = 1 + random.below(bytes.len() as u64) as usize;
            let fds = vec![file.as_fd(); random.below(20) as usize];
            let _ = send_with(&wire.peer, &bytes[..cut], &fds);
            if !random.one_in(3) {
                let _ = wire.pump();
            }
            let _ = send_with(&wire.peer, &bytes[cut..], &fds);
        }
        let _ = wire.pump();
    }
    assert_eq!(open_descriptors(), before);

    // One byte at a time with descriptors each: what is kept stays bounded.
    let mut wire = Wire::negotiated();
    let fds = vec![file.as_fd(); 16];
    let inside = open_descriptors();
    for byte in hex(messages[1]) {
        wire.send(&[byte], &fds);
        wire.pump().unwrap();
        assert!(open_descriptors() <= inside + 16);
    }
    drop(wire);
    assert_eq!(open_descriptors(), before);
}
