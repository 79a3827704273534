//! Every command, with the bytes of the specification typed in: none of our own types makes or reads a message here.

mod vfio_user_common;

use std::os::fd::AsFd;
use std::time::Duration;

use portcullis_cosim::vfio_user::*;
use rustix::event::{EventfdFlags, eventfd};
use vfio_user_common::*;

/// The error reply to message `id`, command `command`.
fn error(id: u8, command: u8, errno: Errno) -> Vec<u8> {
    let mut bytes = vec![id, 0, command, 0, 16, 0, 0, 0, 0x21, 0, 0, 0];
    bytes.extend(errno.raw_os_error().to_le_bytes());
    bytes
}

#[test]
fn version_answers_0_0_with_our_limits() {
    let mut wire = Wire::new();
    let answer = wire.exchange("3412 0100 14000000 00000000 00000000  0000 0000");
    let mut expected = hex("3412 0100 55000000 01000000 00000000  0000 0000");
    expected.extend(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576}}\0");
    assert_eq!(answer, expected);
    let peer = wire.connection.peer().unwrap();
    assert_eq!((peer.major, peer.minor, peer.max_msg_fds, peer.max_data_xfer_size), (0, 0, 1, 1 << 20));
}

#[test]
fn version_0_1_is_answered_with_0_0_and_batching_is_announced_to_who_proposes_it() {
    let mut wire = Wire::new();
    let json = b"{\"capabilities\":{\"max_data_xfer_size\":64,\"max_dma_maps\":7,\"pgsizes\":4096,\"write_multiple\":true}}\0";
    let mut request = hex("0100 0100 00000000 00000000 00000000  0000 0100");
    request.extend(json);
    request[4] = u8::try_from(request.len()).unwrap();
    wire.send(&request, &[]);
    wire.pump().unwrap();
    let answer = wire.received();
    assert_eq!(answer[16..20], [0, 0, 0, 0]);
    assert_eq!(
        answer[20..],
        *b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"max_dma_maps\":65535,\"pgsizes\":4096,\"write_multiple\":true}}\0"
    );
    let peer = wire.connection.peer().unwrap();
    assert_eq!((peer.minor, peer.max_data_xfer_size, peer.max_dma_maps), (1, 64, 7));
}

#[test]
fn version_with_another_major_gets_an_error_reply_and_ends_the_connection() {
    let mut wire = Wire::new();
    wire.send(&hex("0700 0100 14000000 00000000 00000000  0100 0200"), &[]);
    let ended = wire.pump().unwrap_err();
    assert!(matches!(ended, ConnectionError::Version { major: 1, minor: 2 }), "{ended}");
    assert_eq!(wire.received(), error(7, 1, Errno::PROTONOSUPPORT));
    assert_eq!(wire.pump().unwrap(), Pumped::Closed);
}

#[test]
fn version_with_bad_data_is_refused_and_may_be_repeated() {
    let mut wire = Wire::new();
    let bad = "0100 0100 15000000 00000000 00000000  0000 0000 7b"; // "{" without NUL
    assert_eq!(wire.exchange(bad), error(1, 1, Errno::INVAL));
    assert!(wire.connection.peer().is_none());
    assert_eq!(wire.exchange("0100 0100 12000000 00000000 00000000  0000"), error(1, 1, Errno::INVAL));
    assert!(wire.exchange(VERSION).len() > 20);
    assert_eq!(wire.exchange(VERSION), error(1, 1, Errno::INVAL));
}

#[test]
fn nothing_is_served_before_version() {
    for &command in Command::ALL.iter().filter(|&&command| command != Command::Version) {
        let mut wire = Wire::new();
        let number = command.number() as u8;
        let mut request = vec![9, 0, number, 0, 48, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        request.extend([0; 32]);
        wire.send(&request, &[]);
        wire.pump().unwrap();
        assert_eq!(wire.received(), error(9, number, Errno::INVAL), "{command}");
        assert!(wire.calls().is_empty());
        assert_eq!(wire.connection.last_problem().unwrap().what, "a request before VERSION");
    }
}

#[test]
fn device_info() {
    let mut wire = Wire::negotiated();
    assert_eq!(
        wire.exchange("0200 0400 20000000 00000000 00000000  10000000 00000000 00000000 00000000"),
        hex("0200 0400 20000000 01000000 00000000  10000000 03000000 09000000 05000000")
    );
    // A larger argsz is room we do not need; the reply says what is needed.
    assert_eq!(
        wire.exchange("0200 0400 20000000 00000000 00000000  ffff0000 00000000 00000000 00000000")[16..20],
        [16, 0, 0, 0]
    );
    let small = "0200 0400 20000000 00000000 00000000  0f000000 00000000 00000000 00000000";
    assert_eq!(wire.exchange(small), error(2, 4, Errno::INVAL));
    let short = "0200 0400 1c000000 00000000 00000000  10000000 00000000 00000000";
    assert_eq!(wire.exchange(short), error(2, 4, Errno::INVAL));
}

#[test]
fn region_info() {
    let mut wire = Wire::negotiated();
    let ask = |index: u8| {
        format!(
            "0300 0500 30000000 00000000 00000000  20000000 00000000 {index:02x}000000 00000000 0000000000000000 0000000000000000"
        )
    };
    let says = |index: u8, flags: u8, size: &str| {
        hex(&format!(
            "0300 0500 30000000 01000000 00000000  20000000 {flags:02x}000000 {index:02x}000000 00000000 {size} 0000000000000000"
        ))
    };
    assert_eq!(wire.exchange(&ask(0)), says(0, 3, "0010000000000000"));
    assert_eq!(wire.exchange(&ask(1)), says(1, 0, "0000000000000000"));
    assert_eq!(wire.exchange(&ask(2)), says(2, 1, "1000000000000000"));
    assert_eq!(wire.exchange(&ask(7)), says(7, 3, "0001000000000000"));
    assert_eq!(wire.exchange(&ask(8)), says(8, 0, "0000000000000000"));
    assert_eq!(wire.exchange(&ask(9)), error(3, 5, Errno::INVAL));
    let small = ask(0).replace("20000000 00000000 00", "1f000000 00000000 00");
    assert_eq!(wire.exchange(&small), error(3, 5, Errno::INVAL));
}

#[test]
fn irq_info() {
    let mut wire = Wire::negotiated();
    let ask = |index: u8| {
        format!("0400 0700 20000000 00000000 00000000  10000000 00000000 {index:02x}000000 00000000")
    };
    let says = |index: u8, flags: u8, count: u8| {
        hex(&format!(
            "0400 0700 20000000 01000000 00000000  10000000 {flags:02x}000000 {index:02x}000000 {count:02x}000000"
        ))
    };
    assert_eq!(wire.exchange(&ask(0)), says(0, 0b0111, 1));
    assert_eq!(wire.exchange(&ask(1)), says(1, 0, 0));
    assert_eq!(wire.exchange(&ask(2)), says(2, 0b1001, 4));
    assert_eq!(wire.exchange(&ask(5)), error(4, 7, Errno::INVAL));
}

/// DEVICE_SET_IRQS of `argsz` bytes: flags, index, start, count, data.
fn set_irqs(flags: u8, index: u8, start: u32, count: u32, data: &str) -> String {
    let argsz = 20 + hex(data).len();
    let word = |number: u32| number.to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
    format!(
        "0500 0800 {:02x}000000 00000000 00000000  {argsz:02x}000000 {flags:02x}000000 {index:02x}000000 {} {} {data}",
        16 + argsz,
        word(start),
        word(count)
    )
}

#[test]
fn set_irqs_actions_and_data() {
    let done = hex("0500 0800 10000000 01000000 00000000");
    let mut wire = Wire::negotiated();
    let cases = [
        (set_irqs(0x21, 0, 0, 0, ""), "irqs 0 0+0 Trigger None"),
        (set_irqs(0x09, 0, 0, 1, ""), "irqs 0 0+1 Mask None"),
        (set_irqs(0x11, 0, 0, 1, ""), "irqs 0 0+1 Unmask None"),
        (set_irqs(0x22, 2, 1, 3, "010002"), "irqs 2 1+3 Trigger Bool([true, false, true])"),
        (set_irqs(0x24, 2, 0, 4, ""), "irqs 2 0+4 Trigger 0 eventfds"),
    ];
    for (request, call) in cases {
        assert_eq!(wire.exchange(&request), done, "{call}");
        assert_eq!(wire.calls(), [call]);
    }
}

#[test]
fn set_irqs_takes_one_eventfd_per_interrupt_and_closes_the_rest() {
    let done = hex("0500 0800 10000000 01000000 00000000");
    let mut wire = Wire::negotiated();
    let eventfds: Vec<_> = (0..3).map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap()).collect();
    let fds: Vec<_> = eventfds.iter().map(AsFd::as_fd).collect();
    assert_eq!(wire.exchange_with(&set_irqs(0x24, 2, 1, 2, ""), &fds), done);
    assert_eq!(wire.calls(), ["irqs 2 1+2 Trigger 2 eventfds"]);
    assert_eq!(wire.connection.counters().fds_closed, 1);
    // They are the peer's eventfds, in order.
    for fd in &wire.device.fds {
        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
    }
    let fired = |fd| rustix::io::read(fd, &mut [0; 8][..]).is_ok();
    assert_eq!([fired(&eventfds[0]), fired(&eventfds[1]), fired(&eventfds[2])], [true, true, false]);

    assert_eq!(wire.exchange_with(&set_irqs(0x24, 2, 0, 4, ""), &fds), error(5, 8, Errno::INVAL));
}

#[test]
fn set_irqs_that_make_no_sense_are_refused() {
    let mut wire = Wire::negotiated();
    let cases = [
        set_irqs(0x21, 5, 0, 1, ""),        // no such index
        set_irqs(0x21, 0, 0, 2, ""),        // count outside
        set_irqs(0x21, 2, 4, 1, ""),        // start outside
        set_irqs(0x21, 2, u32::MAX, 2, ""), // start + count overflows
        set_irqs(0x01, 0, 0, 1, ""),        // no action
        set_irqs(0x31, 0, 0, 1, ""),        // two actions
        set_irqs(0x20, 0, 0, 1, ""),        // no data kind
        set_irqs(0x23, 0, 0, 1, "01"),      // two data kinds
        set_irqs(0x61, 0, 0, 1, ""),        // unknown flag
        set_irqs(0x22, 2, 0, 4, "010101"),  // too few flags
        set_irqs(0x24, 0, 0, 0, ""),        // nothing, and not the disabling of all
        set_irqs(0x09, 0, 0, 0, ""),
    ];
    for request in cases {
        assert_eq!(wire.exchange(&request), error(5, 8, Errno::INVAL), "{request}");
    }
    assert!(wire.calls().is_empty());
    wire.device.refuse = true;
    assert_eq!(wire.exchange(&set_irqs(0x09, 0, 0, 1, "")), error(5, 8, Errno::BUSY));
}

#[test]
fn region_read_and_write_of_any_size_and_alignment() {
    let mut wire = Wire::negotiated();
    assert_eq!(
        wire.exchange(
            "0600 0a00 27000000 00000000 00000000  0301000000000000 00000000 07000000 a1a2a3a4a5a6a7"
        ),
        hex("0600 0a00 20000000 01000000 00000000  0301000000000000 00000000 07000000")
    );
    assert_eq!(
        wire.exchange("0700 0900 20000000 00000000 00000000  0201000000000000 00000000 09000000"),
        hex("0700 0900 29000000 01000000 00000000  0201000000000000 00000000 09000000 02a1a2a3a4a5a6a70a")
    );
    // The last byte of the configuration space.
    assert_eq!(
        wire.exchange("0800 0900 20000000 00000000 00000000  ff00000000000000 07000000 01000000"),
        hex("0800 0900 21000000 01000000 00000000  ff00000000000000 07000000 01000000 ff")
    );
    assert_eq!(
        wire.calls(),
        ["write 0 0x103 [a1, a2, a3, a4, a5, a6, a7]", "read 0 0x102 9", "read 7 0xff 1"]
    );
    // Nothing at all is allowed, and is not put to the device.
    assert_eq!(
        wire.exchange("0900 0900 20000000 00000000 00000000  0010000000000000 00000000 00000000"),
        hex("0900 0900 20000000 01000000 00000000  0010000000000000 00000000 00000000")
    );
    assert!(wire.calls().is_empty());
}

#[test]
fn posted_write_is_done_and_not_answered() {
    let mut wire = Wire::negotiated();
    let answer = wire.exchange(
        "0600 0a00 24000000 10000000 00000000  0400000000000000 00000000 04000000 78563412
         0700 0900 20000000 00000000 00000000  0400000000000000 00000000 04000000",
    );
    assert_eq!(
        answer,
        hex("0700 0900 24000000 01000000 00000000  0400000000000000 00000000 04000000 78563412")
    );
    assert_eq!(wire.connection.counters().posted, 1);
    assert_eq!(wire.connection.counters().requests(Command::RegionWrite), 1);
}

#[test]
fn accesses_outside_are_refused_and_not_called() {
    let mut wire = Wire::negotiated();
    let reads = [
        ("0010000000000000 00000000 01000000", "an access outside its region"),
        ("ff0f000000000000 00000000 02000000", "an access outside its region"),
        ("ffffffffffffffff 00000000 02000000", "an access outside its region"),
        ("0000000000000000 01000000 01000000", "an access outside its region"),
        ("0000000000000000 09000000 01000000", "a region index the device does not have"),
        ("0000000000000000 ffffffff 01000000", "a region index the device does not have"),
        ("0000000000000000 00000000 01001000", "an access larger than max_data_xfer_size"),
        ("0000000000000000 00000000 ffffffff", "an access larger than max_data_xfer_size"),
    ];
    for (access, what) in reads {
        let request = format!("0600 0900 20000000 00000000 00000000  {access}");
        assert_eq!(wire.exchange(&request), error(6, 9, Errno::INVAL), "{access}");
        assert_eq!(wire.connection.last_problem().unwrap().what, what);
    }
    let writes = [
        "24000000 00000000 00000000  0000000000000000 02000000 04000000 00000000", // read-only region
        "24000000 00000000 00000000  fd0f000000000000 00000000 04000000 00000000", // over the end
        "23000000 00000000 00000000  0000000000000000 00000000 04000000 000000",   // fewer data than count
        "25000000 00000000 00000000  0000000000000000 00000000 04000000 0000000000", // more
        "1c000000 00000000 00000000  0000000000000000 00000000",                   // no count
    ];
    for write in writes {
        let request = format!("0600 0a00 {write}");
        assert_eq!(wire.exchange(&request), error(6, 10, Errno::INVAL), "{write}");
    }
    assert!(wire.calls().is_empty());
}

#[test]
fn a_write_larger_than_max_data_xfer_size_is_refused_and_the_stream_goes_on() {
    let mut wire = Wire::negotiated_with(Limits { max_data_xfer_size: 64, ..Limits::default() });
    let mut request = hex("0600 0a00 61000000 00000000 00000000  0000000000000000 00000000 41000000");
    request.extend([0; 65]);
    wire.send(&request, &[]);
    assert_eq!(wire.pump().unwrap(), Pumped::Idle);
    assert_eq!(wire.received(), error(6, 10, Errno::INVAL));
    assert!(wire.calls().is_empty());
    assert_eq!(wire.exchange("0600 0d00 10000000 00000000 00000000").len(), 16);
}

#[test]
fn batched_writes_are_done_in_order() {
    let mut wire = Wire::negotiated();
    let batch = "0000000000000000 00000000 04000000 1111111100000000
                 1000000000000000 00000000 08000000 2222222222222222
                 0000000000000000 07000000 01000000 3300000000000000";
    let posted = format!("0600 0f00 60000000 10000000 00000000  0300000000000000 {batch}");
    assert_eq!(wire.exchange(&posted), b"");
    let calls =
        ["write 0 0x0 [11, 11, 11, 11]", "write 0 0x10 [22, 22, 22, 22, 22, 22, 22, 22]", "write 7 0x0 [33]"];
    assert_eq!(wire.calls(), calls);
    let answered = format!("0600 0f00 60000000 00000000 00000000  0300000000000000 {batch}");
    assert_eq!(wire.exchange(&answered), hex("0600 0f00 18000000 01000000 00000000  0300000000000000"));
    assert_eq!(wire.calls(), calls);
    assert_eq!(wire.connection.counters().batched_writes, 6);
}

#[test]
fn a_bad_write_in_a_batch_stops_no_other() {
    let mut wire = Wire::negotiated();
    let answer = wire.exchange(
        "0600 0f00 60000000 00000000 00000000  0300000000000000
         0010000000000000 00000000 04000000 1111111100000000
         1000000000000000 00000000 09000000 2222222222222222
         0000000000000000 07000000 01000000 3300000000000000",
    );
    assert_eq!(answer, hex("0600 0f00 18000000 01000000 00000000  0100000000000000"));
    assert_eq!(wire.calls(), ["write 7 0x0 [33]"]);
    // A count that is not what follows: nothing is done.
    for count in ["0000000000000000", "0200000000000000", "ffffffffffffffff"] {
        let request = format!(
            "0600 0f00 30000000 00000000 00000000  {count} 0000000000000000 07000000 01000000 3300000000000000"
        );
        assert_eq!(wire.exchange(&request), error(6, 15, Errno::INVAL));
    }
    assert!(wire.calls().is_empty());
}

/// DMA_MAP: argsz, flags, offset, address, size (little-endian bytes).
fn map(argsz: &str, flags: &str, offset: &str, address: &str, size: &str) -> String {
    format!("0200 0200 30000000 00000000 00000000  {argsz} {flags} {offset} {address} {size}")
}

#[test]
fn dma_map_with_and_without_descriptor() {
    let done = hex("0200 0200 10000000 01000000 00000000");
    let mut wire = Wire::negotiated();
    let file = tempfile::tempfile().unwrap();
    let first = map("20000000", "03000000", "0020000000000000", "0000004000000000", "0000100000000000");
    assert_eq!(wire.exchange_with(&first, &[file.as_fd(), file.as_fd()]), done);
    let second = map("28000000", "01000000", "0000000000000000", "0000005000000000", "0010000000000000");
    assert_eq!(wire.exchange(&second), done);
    // libvfio-user's "read and write the file, do not map it": as good as no descriptor.
    let third = map("20000000", "0b000000", "0000000000000000", "0000006000000000", "0010000000000000");
    assert_eq!(wire.exchange_with(&third, &[file.as_fd()]), done);
    // Up to the last byte of the address space.
    let fourth = map("20000000", "02000000", "0000000000000000", "00f0ffffffffffff", "0010000000000000");
    assert_eq!(wire.exchange(&fourth), done);
    assert_eq!(
        wire.calls(),
        [
            "map 0x40000000+0x100000 @0x2000 rw fd",
            "map 0x50000000+0x1000 @0x0 r- no fd",
            "map 0x60000000+0x1000 @0x0 rw no fd",
            "map 0xfffffffffffff000+0x1000 @0x0 -w no fd"
        ]
    );
    assert_eq!(wire.connection.counters().fds_received, 3);
    assert_eq!(wire.connection.counters().fds_closed, 1);
}

#[test]
fn dma_maps_that_break_the_rules_are_refused() {
    let mut wire = Wire::negotiated();
    let one = map("20000000", "03000000", "0000000000000000", "0010000000000000", "0010000000000000");
    wire.exchange(&one);
    wire.calls();
    let cases = [
        (one.clone(), Errno::EXIST),
        (
            map("20000000", "03000000", "0000000000000000", "ff1f000000000000", "0100000000000000"),
            Errno::EXIST,
        ),
        (
            map("20000000", "03000000", "0000000000000000", "0000000000000000", "0000010000000000"),
            Errno::EXIST,
        ),
        (
            map("1f000000", "03000000", "0000000000000000", "0000100000000000", "0010000000000000"),
            Errno::INVAL,
        ),
        (
            map("20000000", "13000000", "0000000000000000", "0000100000000000", "0010000000000000"),
            Errno::INVAL,
        ),
        (
            map("20000000", "03000000", "0000000000000000", "0000100000000000", "0000000000000000"),
            Errno::INVAL,
        ),
        (
            map("20000000", "03000000", "0000000000000000", "00f0ffffffffffff", "0110000000000000"),
            Errno::INVAL,
        ),
        (
            map("20000000", "03000000", "00f0ffffffffffff", "0000100000000000", "0010000000000000"),
            Errno::INVAL,
        ),
    ];
    for (request, errno) in cases {
        assert_eq!(wire.exchange(&request), error(2, 2, errno), "{request}");
    }
    assert!(wire.calls().is_empty());
    // What the device refuses is not mapped: it may be tried again.
    wire.device.refuse = true;
    let other = map("20000000", "03000000", "0000000000000000", "0000100000000000", "0010000000000000");
    assert_eq!(wire.exchange(&other), error(2, 2, Errno::BUSY));
    wire.device.refuse = false;
    assert_eq!(wire.exchange(&other).len(), 16);
}

#[test]
fn no_more_maps_than_announced() {
    let mut wire = Wire::negotiated_with(Limits { max_dma_maps: 1, ..Limits::default() });
    let at = |page: &str| map("20000000", "03000000", "0000000000000000", page, "0010000000000000");
    assert_eq!(wire.exchange(&at("0010000000000000")).len(), 16);
    assert_eq!(wire.exchange(&at("0020000000000000")), error(2, 2, Errno::NOSPC));
}

#[test]
fn dma_unmap_of_whole_maps_only() {
    let unmap = |flags: &str, address: &str, size: &str| {
        format!("0300 0300 28000000 00000000 00000000  18000000 {flags} {address} {size}")
    };
    let mut wire = Wire::negotiated();
    for page in ["0010000000000000", "0020000000000000", "0040000000000000"] {
        wire.exchange(&map("20000000", "03000000", "0000000000000000", page, "0010000000000000"));
    }
    wire.calls();
    let one = unmap("00000000", "0010000000000000", "0010000000000000");
    assert_eq!(
        wire.exchange(&one),
        hex("0300 0300 28000000 01000000 00000000  18000000 00000000 0010000000000000 0010000000000000")
    );
    assert_eq!(wire.calls(), ["unmap 0x1000+0x1000"]);
    let cases = [
        (one, Errno::NOENT),
        (unmap("00000000", "0020000000000000", "0008000000000000"), Errno::INVAL),
        (unmap("00000000", "0020000000000000", "0000000000000000"), Errno::INVAL),
        (unmap("00000000", "00f0ffffffffffff", "0110000000000000"), Errno::INVAL),
        (unmap("01000000", "0020000000000000", "0010000000000000"), Errno::NOTSUP),
        (unmap("04000000", "0020000000000000", "0010000000000000"), Errno::INVAL),
    ];
    for (request, errno) in cases {
        assert_eq!(wire.exchange(&request), error(3, 3, errno), "{request}");
    }
    assert!(wire.calls().is_empty());
    wire.exchange(&unmap("00000000", "0000000000000000", "0000010000000000"));
    assert_eq!(wire.calls(), ["unmap 0x2000+0x1000", "unmap 0x4000+0x1000"]);
    wire.exchange(&unmap("02000000", "0000000000000000", "0000000000000000"));
    assert_eq!(wire.calls(), ["unmap all"]);
}

#[test]
fn reset() {
    let mut wire = Wire::negotiated();
    assert_eq!(
        wire.exchange("0200 0d00 10000000 00000000 00000000"),
        hex("0200 0d00 10000000 01000000 00000000")
    );
    assert_eq!(wire.calls(), ["reset"]);
}

#[test]
fn what_is_not_offered_is_refused_without_harm() {
    let mut wire = Wire::negotiated();
    for number in [6, 11, 12, 14, 16, 17, 18] {
        let request = format!("0200 {number:02x}00 18000000 00000000 00000000  0000000000000000");
        assert_eq!(wire.exchange(&request), error(2, number, Errno::NOTSUP));
    }
    for number in [0, 19, 255] {
        let request = format!("0200 {number:02x}00 10000000 00000000 00000000");
        assert_eq!(wire.exchange(&request), error(2, number, Errno::NOSYS));
        // Nobody wants to know.
        let request = format!("0200 {number:02x}00 10000000 10000000 00000000");
        assert_eq!(wire.exchange(&request), b"");
    }
    assert_eq!(wire.connection.counters().unknown_commands, 6);
    assert_eq!(wire.connection.counters().refused, 13);
    assert_eq!(wire.exchange("0200 0d00 10000000 00000000 00000000").len(), 16);
}

#[test]
fn dma_write_goes_out_and_its_reply_is_matched_later() {
    let mut wire = Wire::negotiated();
    let ticket = wire.connection.dma_write(0x0800_0200, &[0x10, 0, 0, 0]).unwrap();
    assert_eq!(
        wire.received(),
        hex("0000 0c00 24000000 00000000 00000000  0002000800000000 0400000000000000 10000000")
    );
    assert_eq!(wire.connection.outstanding(), 1);
    assert!(wire.connection.oldest_outstanding().is_some());
    // A read comes first; then the reply: QEMU's has no payload.
    assert_eq!(
        wire.exchange("0700 0900 20000000 00000000 00000000  0000000000000000 00000000 01000000").len(),
        33
    );
    assert!(wire.connection.take_completions().is_empty());
    assert_eq!(wire.exchange("0000 0c00 10000000 01000000 00000000"), b"");
    let done = wire.connection.take_completions();
    assert_eq!((done.len(), done[0].ticket, &done[0].result), (1, ticket, &Ok(vec![])));
    assert_eq!((wire.connection.outstanding(), wire.connection.oldest_outstanding()), (0, None));
}

#[test]
fn replies_to_dma_write_with_the_payloads_of_other_clients() {
    for payload in ["", "0002000800000000 04000000", "0002000800000000 0400000000000000"] {
        let mut wire = Wire::negotiated();
        wire.connection.dma_write(0x0800_0200, &[1]).unwrap();
        wire.received();
        let size = 16 + hex(payload).len();
        wire.exchange(&format!("0000 0c00 {size:02x}000000 01000000 00000000 {payload}"));
        assert_eq!(wire.connection.take_completions()[0].result, Ok(vec![]));
    }
}

#[test]
fn dma_read_brings_the_data() {
    let mut wire = Wire::negotiated();
    wire.connection.dma_read(0x4000_0000, 3).unwrap();
    assert_eq!(
        wire.received(),
        hex("0000 0b00 20000000 00000000 00000000  0000004000000000 0300000000000000")
    );
    wire.exchange("0000 0b00 23000000 01000000 00000000  0000004000000000 0300000000000000 aabbcc");
    assert_eq!(wire.connection.take_completions()[0].result, Ok(vec![0xaa, 0xbb, 0xcc]));
}

#[test]
fn dma_failures() {
    let cases = [
        ("10000000 21000000 0e000000", DmaFailure::Refused(Errno::FAULT)),
        ("10000000 21000000 00000000", DmaFailure::Unexplained),
        ("10000000 21000000 ffffffff", DmaFailure::Unexplained),
        ("10000000 01000000 00000000", DmaFailure::Malformed),
        ("22000000 01000000 00000000  0000004000000000 0300000000000000 aabb", DmaFailure::Malformed),
        ("23000000 01000000 00000000  0000004000000000 0200000000000000 aabbcc", DmaFailure::Malformed),
    ];
    for (reply, failure) in cases {
        let mut wire = Wire::negotiated();
        wire.connection.dma_read(0x4000_0000, 3).unwrap();
        wire.received();
        wire.exchange(&format!("0000 0b00 {reply}"));
        assert_eq!(wire.connection.take_completions()[0].result, Err(failure), "{reply}");
    }
    // The right id with another command.
    let mut wire = Wire::negotiated();
    wire.connection.dma_write(0, &[1]).unwrap();
    wire.exchange("0000 0b00 10000000 01000000 00000000");
    assert_eq!(wire.connection.take_completions()[0].result, Err(DmaFailure::Malformed));
}

#[test]
fn dma_is_split_into_what_the_peer_accepts() {
    let mut wire = Wire::new();
    let json = b"{\"capabilities\":{\"max_data_xfer_size\":4}}\0";
    let mut request = hex("0100 0100 00000000 00000000 00000000  0000 0000");
    request.extend(json);
    request[4] = u8::try_from(request.len()).unwrap();
    wire.send(&request, &[]);
    wire.pump().unwrap();
    wire.received();
    wire.connection.dma_write(0x1000, &[1, 2, 3, 4, 5]).unwrap();
    assert_eq!(
        wire.received(),
        hex("0000 0c00 24000000 00000000 00000000  0010000000000000 0400000000000000 01020304
             0100 0c00 21000000 00000000 00000000  0410000000000000 0100000000000000 05")
    );
    wire.connection.dma_read(0x1000, 6).unwrap();
    wire.received();
    // Answers in any order; one completion each.
    wire.exchange("0300 0b00 22000000 01000000 00000000  0410000000000000 0200000000000000 5566");
    wire.exchange("0100 0c00 10000000 01000000 00000000");
    assert!(wire.connection.take_completions().is_empty());
    wire.exchange("0200 0b00 24000000 01000000 00000000  0010000000000000 0400000000000000 11223344");
    wire.exchange("0000 0c00 10000000 21000000 05000000");
    let done = wire.connection.take_completions();
    assert_eq!(done[0].result, Ok(vec![0x11, 0x22, 0x33, 0x44, 0x55, 0x66]));
    assert_eq!(done[1].result, Err(DmaFailure::Refused(Errno::IO)));
}

#[test]
fn dma_requests_that_cannot_be() {
    let mut wire = Wire::new();
    assert_eq!(wire.connection.dma_write(0, &[1]), Err(RequestError::NotNegotiated));
    let mut wire = Wire::negotiated_with(Limits { max_dma: 8, max_requests: 2, ..Limits::default() });
    let size = |address, size| Err(RequestError::Size { address, size, limit: 8 });
    assert_eq!(wire.connection.dma_write(0, &[]), size(0, 0));
    assert_eq!(wire.connection.dma_write(0, &[0; 9]), size(0, 9));
    assert_eq!(wire.connection.dma_read(u64::MAX, 2), size(u64::MAX, 2));
    wire.connection.dma_read(u64::MAX, 1).unwrap();
    wire.connection.dma_write(0, &[1]).unwrap();
    assert!(matches!(wire.connection.dma_write(0, &[1]), Err(RequestError::Full { outstanding: 2, .. })));
    drop(std::mem::replace(&mut wire.peer, std::os::unix::net::UnixStream::pair().unwrap().0));
    assert_eq!(wire.pump().unwrap(), Pumped::Closed);
    assert_eq!(wire.connection.dma_write(0, &[1]), Err(RequestError::Closed));
    let done = wire.connection.take_completions();
    assert!(done.len() == 2 && done.iter().all(|done| done.result == Err(DmaFailure::Closed)));
}

#[test]
fn a_reply_to_nothing_is_counted_and_reported() {
    let mut wire = Wire::negotiated();
    assert_eq!(wire.exchange("7700 0c00 10000000 01000000 00000000"), b"");
    assert_eq!(wire.connection.counters().unknown_replies, 1);
    let problem = wire.connection.last_problem().unwrap();
    assert_eq!((problem.id, problem.command, problem.errno, problem.offset), (0x77, 12, None, 20));
    assert_eq!(wire.exchange("0200 0d00 10000000 00000000 00000000").len(), 16);
}

#[test]
fn a_peer_of_our_own_goes_through_everything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("device.sock");
    let listener = Listener::bind(&path).unwrap();
    let client = std::thread::spawn({
        let path = path.clone();
        move || {
            use portcullis_cosim::vfio_user::peer::{Outside, Peer, PeerError};
            let mut peer = Peer::connect(&path).unwrap();
            let version = peer.version().unwrap();
            assert_eq!((version.major, version.minor), (0, 0));
            assert!(version.capabilities.contains("\"write_multiple\":true"));
            assert_eq!(peer.device_info().unwrap(), (3, 9, 5));
            assert_eq!(peer.region_info(0).unwrap().size, BAR_SIZE);
            assert_eq!(peer.irq_info(2).unwrap(), (9, 4));
            let memory = peer.share(0x4000_0000, 0x10000).unwrap();
            peer.post(0, 8, &[1, 2, 3, 4]).unwrap();
            assert_eq!(peer.read_u32(0, 8).unwrap(), 0x0403_0201);
            peer.write(0, 9, &[9]).unwrap();
            let done = peer.write_multiple(&[(0, 8, &[5]), (0, 10, &[6, 7])], true).unwrap();
            assert_eq!((done, peer.read_u32(0, 8).unwrap()), (2, 0x0706_0905));
            let eventfd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
            peer.set_irqs(0x24, 2, 3, 1, &[], &[eventfd.as_fd()]).unwrap();
            let refused = peer.read(0, BAR_SIZE, &mut [0]).unwrap_err();
            assert!(matches!(refused, PeerError::Refused { errno: Errno::INVAL, .. }), "{refused}");
            peer.outside = Outside::Accept;
            // The server writes at 0x40000010 and at 0x08000200 when it is reset.
            peer.reset().unwrap();
            while peer.written.is_empty() {
                peer.answer_dma(Duration::from_millis(20)).unwrap();
            }
            assert_eq!((peer.written[0].address, &peer.written[0].data), (0x0800_0200, &vec![1, 0, 0, 0]));
            let mut found = [0; 4];
            std::os::unix::fs::FileExt::read_exact_at(&memory, &mut found, 0x10).unwrap();
            assert_eq!(found, *b"DMA!");
            peer.unmap(0x4000_0000, 0x10000).unwrap();
        }
    });
    let stream = listener.accept(Some(Duration::from_secs(10))).unwrap().expect("a client");
    let mut connection = Connection::new(stream, Limits::default()).unwrap();
    let mut device = Device::new();
    let mut asked = false;
    let mut completions = Vec::new();
    while connection.pump(&mut device, 1).unwrap() != Pumped::Closed {
        if !asked && device.calls.iter().any(|call| call == "reset") {
            asked = true;
            connection.dma_write(0x4000_0010, b"DMA!").unwrap();
            connection.dma_write(0x0800_0200, &[1, 0, 0, 0]).unwrap();
        }
        completions.extend(connection.take_completions());
        connection.wait(Some(Duration::from_secs(10))).unwrap();
    }
    client.join().unwrap();
    assert_eq!(completions.len(), 2);
    assert!(completions.iter().all(|done| done.result == Ok(vec![])));
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn listener_replaces_a_dead_socket_and_leaves_everything_else_alone() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    // Dead: bound by a listener that is gone, the file left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    // Live: refused, and the live one sees no client.
    assert!(matches!(Listener::bind(&path), Err(ListenError::InUse { .. })));
    assert!(listener.accept(Some(Duration::ZERO)).unwrap().is_none());
    assert!(listener.accept(Some(Duration::from_millis(5))).unwrap().is_none());
    // Not ours any more: not removed.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "data").unwrap();
    drop(listener);
    assert!(path.exists());
    assert!(matches!(Listener::bind(&path), Err(ListenError::NotASocket { .. })));
    let long = directory.path().join("x".repeat(120));
    assert!(matches!(Listener::bind(long), Err(ListenError::PathTooLong { .. })));
    assert!(matches!(Listener::bind(directory.path().join("no/s")), Err(ListenError::Io { .. })));
}
