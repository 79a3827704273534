//! Peers that dribble, stall, lie, send garbage or die at the worst moment.

mod vfio_user_common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use portcullis_cosim::vfio_user::*;
use proptest::prelude::*;
use vfio_user_common::*;

/// A session with every command; true for the messages that bring one descriptor.
const SESSION: &[(&str, bool)] = &[
    (VERSION, false),
    ("0200 0400 20000000 00000000 00000000  10000000 00000000 00000000 00000000", false),
    ("0300 0d00 10000000 00000000 00000000", false),
    (
        "0400 0200 30000000 00000000 00000000  20000000 03000000 0000000000000000 0000004000000000 0000100000000000",
        true,
    ),
    (
        "0500 0200 30000000 00000000 00000000  20000000 03000000 0000000000000000 0000005000000000 0000100000000000",
        false,
    ),
    ("0600 0800 24000000 00000000 00000000  14000000 24000000 02000000 01000000 01000000", true),
    ("0700 0800 24000000 10000000 00000000  14000000 24000000 02000000 02000000 01000000", true),
    ("0800 0a00 24000000 10000000 00000000  0000000000000000 00000000 04000000 78563412", false),
    ("0900 0a00 28000000 00000000 00000000  0800000000000000 00000000 08000000 0102030405060708", false),
    ("0a00 0900 20000000 00000000 00000000  0000000000000000 00000000 10000000", false),
    ("0b00 0c00 10000000 01000000 00000000", false),
    ("0c00 0d00 10000000 00000000 00000000", true),
    (
        "0d00 0f00 30000000 00000000 00000000  0100000000000000 0000000000000000 07000000 01000000 3300000000000000",
        false,
    ),
    ("0e00 0300 28000000 00000000 00000000  18000000 00000000 0000004000000000 0000100000000000", false),
    ("0f00 0600 10000000 00000000 00000000", false),
];

fn session_bytes() -> Vec<u8> {
    SESSION.iter().flat_map(|(text, _)| hex(text)).collect()
}

/// Sends the session cut at the given places (the descriptors with the first byte of their message) and returns what the
/// device was asked and what came back.
fn run_session(cuts: &[usize]) -> (Vec<String>, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    let mut wire = Wire::new();
    let mut at = 0;
    let mut answers = Vec::new();
    for (text, with_fd) in SESSION {
        let bytes = hex(text);
        let mut fds: &[BorrowedFd<'_>] = if *with_fd { &[file.as_fd()] } else { &[] };
        let mut from = 0;
        for end in 1..=bytes.len() {
            if end == bytes.len() || cuts.contains(&(at + end)) {
                wire.send(&bytes[from..end], fds);
                fds = &[];
                from = end;
                if cuts.contains(&(at + end)) {
                    assert_eq!(wire.pump().unwrap(), Pumped::Idle);
                    answers.extend(wire.received());
                }
            }
        }
        at += bytes.len();
    }
    assert_eq!(wire.pump().unwrap(), Pumped::Idle);
    // Short reads hand back to poll; here nobody polls.
    for _ in 0..SESSION.len() {
        wire.pump().unwrap();
    }
    answers.extend(wire.received());
    assert_eq!(wire.connection.counters().fds_closed, 1, "the descriptor sent with a reset");
    (wire.calls(), answers)
}

#[test]
fn descriptors_go_to_the_message_they_were_sent_with() {
    let (calls, answers) = run_session(&[]);
    assert_eq!(
        calls,
        [
            "reset",
            "map 0x40000000+0x100000 @0x0 rw fd",
            "map 0x50000000+0x100000 @0x0 rw no fd",
            "irqs 2 1+1 Trigger 1 eventfds",
            "irqs 2 2+1 Trigger 1 eventfds",
            "write 0 0x0 [78, 56, 34, 12]",
            "write 0 0x8 [01, 02, 03, 04, 05, 06, 07, 08]",
            "read 0 0x0 16",
            "reset",
            "write 7 0x0 [33]",
            "unmap 0x40000000+0x100000",
        ]
    );
    assert!(answers.ends_with(&hex("0f00 0600 10000000 21000000 5f000000")));
}

#[test]
fn a_stream_cut_at_any_byte_is_the_same_stream() {
    let whole = run_session(&[]);
    for cut in 1..session_bytes().len() {
        assert_eq!(run_session(&[cut]), whole, "cut at {cut}");
    }
    let every: Vec<usize> = (1..session_bytes().len()).collect();
    assert_eq!(run_session(&every), whole, "one byte at a time");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_cut_anywhere_is_the_same_stream(cuts in prop::collection::vec(1..session_bytes().len(), 0..40)) {
        prop_assert_eq!(run_session(&cuts), run_session(&[]));
    }

    #[test]
    fn random_bytes_end_in_an_error_or_wait_for_more(bytes in prop::collection::vec(any::<u8>(), 0..300), negotiate: bool) {
        let mut wire = if negotiate { Wire::negotiated() } else { Wire::new() };
        wire.send(&bytes, &[]);
        let _ = wire.pump();
        drop(wire.peer);
        let _ = wire.connection.pump(&mut wire.device, 64);
        prop_assert!(wire.connection.is_closed() || wire.connection.counters().bytes_received > 0);
    }
}

#[test]
fn several_messages_in_one_send_keep_the_descriptor_with_the_first() {
    // A peer that joins messages in one call: the kernel attaches the descriptor to all the bytes.
    let file = tempfile::tempfile().unwrap();
    let mut wire = Wire::negotiated();
    let joined: Vec<u8> = SESSION[3..6].iter().flat_map(|(text, _)| hex(text)).collect();
    wire.send(&joined, &[file.as_fd()]);
    for _ in 0..4 {
        wire.pump().unwrap();
    }
    assert_eq!(
        wire.calls(),
        [
            "map 0x40000000+0x100000 @0x0 rw fd",
            "map 0x50000000+0x100000 @0x0 rw no fd",
            "irqs 2 1+1 Trigger 0 eventfds"
        ]
    );
}

#[test]
fn more_descriptors_than_announced_are_refused_not_mixed_up() {
    let file = tempfile::tempfile().unwrap();
    let fds = vec![file.as_fd(); 20];
    let mut wire = Wire::negotiated();
    wire.send(&hex(SESSION[3].0), &fds);
    wire.pump().unwrap();
    assert_eq!(wire.received(), hex("0400 0200 10000000 21000000 18000000")); // EMFILE
    assert!(wire.calls().is_empty());
    wire.send(&hex(SESSION[3].0), &[file.as_fd()]);
    wire.pump().unwrap();
    assert_eq!(wire.calls(), ["map 0x40000000+0x100000 @0x0 rw fd"]);
}

#[test]
fn a_peer_that_closes_anywhere_ends_the_connection_once() {
    let bytes = session_bytes();
    let mut boundaries = vec![0];
    for (text, _) in SESSION {
        boundaries.push(boundaries.last().unwrap() + hex(text).len());
    }
    for length in 0..=bytes.len() {
        let mut wire = Wire::new();
        wire.send(&bytes[..length], &[]);
        wire.peer.shutdown(std::net::Shutdown::Write).unwrap();
        let ended = loop {
            match wire.connection.pump(&mut wire.device, 3) {
                Ok(Pumped::Idle | Pumped::More) => assert!(wire.connection.wait(None).unwrap().any()),
                ended => break ended,
            }
        };
        if boundaries.contains(&length) {
            assert_eq!(ended.unwrap(), Pumped::Closed, "{length}");
        } else {
            assert!(matches!(ended, Err(ConnectionError::Truncated { .. })), "{length}: {ended:?}");
        }
        assert_eq!(wire.pump().unwrap(), Pumped::Closed);
        assert!(wire.connection.wait(None).unwrap().any());
    }
}

#[test]
fn a_peer_that_dies_with_answers_unread_is_closed_not_an_error() {
    let mut wire = Wire::negotiated();
    wire.send(&hex("0300 0d00 10000000 00000000 00000000"), &[]);
    wire.pump().unwrap();
    wire.connection.dma_write(0, &[1]).unwrap();
    drop(std::mem::replace(&mut wire.peer, UnixStream::pair().unwrap().0));
    assert_eq!(wire.pump().unwrap(), Pumped::Closed);
    assert_eq!(wire.connection.take_completions()[0].result, Err(DmaFailure::Closed));
}

#[test]
fn lost_framing_names_the_place_and_the_field() {
    let cases = [
        (
            "0200 0900 0f000000 00000000 00000000",
            "message 0x0002 (REGION_READ) at byte 20 of the stream: size field is 15",
        ),
        ("0200 0900 00000000 00000000 00000000", "size field is 0, less than the header's 16"),
        ("0200 0900 ffffffff 00000000 00000000", "size field is 4294967295, the limit is 2097152"),
        (
            "0200 ff00 10000000 02000000 00000000",
            "(unknown command) at byte 20 of the stream: flags field is 0x2",
        ),
        ("0200 0900 10000000 0f000000 00000000", "its type is neither request (0) nor reply (1)"),
    ];
    for (bytes, message) in cases {
        let mut wire = Wire::negotiated();
        wire.send(&hex(bytes), &[]);
        let ended = wire.pump().unwrap_err().to_string();
        assert!(ended.contains(message), "{ended}");
        assert_eq!(wire.pump().unwrap(), Pumped::Closed);
        // The peer is told.
        assert_eq!(wire.peer.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn a_peer_that_never_reads_cannot_grow_our_memory() {
    let limits = Limits { max_output: 64 << 10, max_requests: 16, ..Limits::default() };
    let mut wire = Wire::negotiated_with(limits);
    let read = hex("0700 0900 20000000 00000000 00000000  0000000000000000 00000000 00100000");
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut sent = 0;
    // Until the server's stalled input fills the socket too.
    loop {
        assert!(Instant::now() < deadline);
        match send_with(&wire.peer, &read, &[]) {
            Ok(count) => {
                assert_eq!(count, read.len());
                sent += 1;
            }
            Err(Errno::AGAIN) if wire.connection.counters().stalls > 0 => break,
            Err(Errno::AGAIN) => {}
            Err(errno) => panic!("{errno}"),
        }
        assert_eq!(wire.pump().unwrap(), Pumped::Idle);
        assert!(wire.connection.queued() <= (64 << 10) + 4096 + 32, "{}", wire.connection.queued());
    }
    assert_eq!(wire.connection.interest(), Interest { input: false, output: true });
    assert!(!wire.connection.wait(Some(Duration::from_millis(1))).unwrap().any());
    assert!(matches!(wire.connection.dma_write(0, &[0; 8]), Err(RequestError::Full { .. })));
    // When it reads at last, everything arrives.
    let mut answers = 0;
    while answers < sent * (32 + 4096) {
        assert!(Instant::now() < deadline);
        answers += wire.received().len();
        wire.pump().unwrap();
    }
    assert_eq!((answers, wire.connection.queued()), (sent * (32 + 4096), 0));
    assert_eq!(wire.connection.interest(), Interest { input: true, output: false });
}

#[test]
fn dma_requests_to_a_peer_that_never_answers_are_bounded() {
    let limits = Limits { max_requests: 16, max_dma: 4096, ..Limits::default() };
    let mut wire = Wire::negotiated_with(limits);
    let taken = (0..1000).filter(|_| wire.connection.dma_write(0x1000, &[0; 4]).is_ok()).count();
    assert_eq!((taken, wire.connection.outstanding()), (16, 16));
    assert!(wire.connection.oldest_outstanding().is_some());
    let mut wire = Wire::negotiated_with(limits);
    let taken = (0..10).filter(|_| wire.connection.dma_read(0x1000, 2048).is_ok()).count();
    assert_eq!(taken, 2, "reads hold room for their data");
}

#[test]
fn message_ids_of_requests_under_way_are_not_used_twice() {
    let mut wire = Wire::negotiated();
    wire.connection.dma_write(0xdead, &[0]).unwrap(); // id 0, never answered
    let mut answered = 0u32;
    while answered < 70_000 {
        wire.connection.dma_write(0x1000, &[0]).unwrap();
        let request = wire.received();
        let (id, tail) = request[request.len() - 33..].split_at(2);
        assert_ne!((id, answered > 0), (&[0, 0][..], true));
        assert_eq!(tail[..2], [12, 0]);
        wire.send(&[id, &hex("0c00 10000000 01000000 00000000")].concat(), &[]);
        wire.pump().unwrap();
        answered += 1;
        assert_eq!(wire.connection.take_completions().len(), 1);
    }
    assert_eq!(wire.connection.outstanding(), 1);
}

#[test]
fn output_never_starts_a_read_inside_a_header() {
    // QEMU gives up when one read brings a part of a header: fill the socket, drain it, look at every read.
    let mut wire = Wire::negotiated();
    let mut reads = 0u64;
    for round in 0..40 {
        while wire.connection.dma_write(0x1000, &vec![0; 1 + round * 97]).is_ok() {}
        let mut header = [0; 16];
        let mut replies = Vec::new();
        loop {
            // Flushed only when nothing is left to read: the end of what the socket took is then seen as it is.
            let count = wire.peer.read(&mut header).or_else(|_| {
                wire.connection.flush().unwrap();
                wire.peer.read(&mut header)
            });
            match count {
                Ok(count) => assert_eq!(count, 16, "a header in two pieces"),
                Err(_) => break,
            }
            reads += 1;
            let mut body = vec![0; u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize - 16];
            let mut have = 0;
            while have < body.len() {
                match wire.peer.read(&mut body[have..]) {
                    Ok(count) => have += count,
                    Err(_) => wire.connection.flush().unwrap(),
                }
            }
            replies.push([&header[..2], &hex("0c00 10000000 01000000 00000000")].concat());
        }
        // Only now: pumping would flush.
        for reply in replies {
            wire.peer.write_all(&reply).unwrap();
            wire.pump().unwrap();
        }
        while wire.connection.outstanding() > 0 {
            wire.pump().unwrap();
        }
        wire.connection.take_completions();
    }
    assert!(reads > 1000);
}

#[test]
fn budget_is_kept() {
    let mut wire = Wire::negotiated();
    for _ in 0..10 {
        wire.send(&hex("0300 0d00 10000000 10000000 00000000"), &[]);
    }
    assert_eq!(wire.connection.pump(&mut wire.device, 0).unwrap(), Pumped::More);
    assert_eq!(wire.connection.pump(&mut wire.device, 4).unwrap(), Pumped::More);
    assert_eq!(wire.calls().len(), 4);
    assert!(wire.connection.wait(Some(Duration::ZERO)).unwrap().input, "the rest may be in our buffer");
    wire.pump().unwrap();
    assert_eq!(wire.calls().len(), 6);
    assert!(!wire.connection.wait(Some(Duration::ZERO)).unwrap().any());
}

/// One message with a right size field: any command, flags, and a body that is often almost right.
fn random_message(random: &mut Random, id: u16, out: &mut Vec<u8>) -> (u16, u32) {
    let command = if random.one_in(8) { random.next() as u16 } else { random.below(20) as u16 };
    let flags = match random.below(8) {
        0 => 0x10,
        1 => 0x1,
        2 => 0x21,
        3 => (random.next() as u32) & !0xf,
        _ => 0,
    };
    let start = out.len();
    out.extend(id.to_le_bytes());
    out.extend(command.to_le_bytes());
    out.extend([0; 4]);
    out.extend(flags.to_le_bytes());
    out.extend(if random.one_in(4) { (random.next() as u32).to_le_bytes() } else { [0; 4] });
    let small = |random: &mut Random| match random.below(6) {
        0 => random.next(),
        1 => u64::MAX - random.below(16),
        2 => random.below(0x1100),
        _ => random.below(24),
    };
    match (command, random.one_in(5)) {
        (_, true) => {
            for _ in 0..random.below(80) {
                out.push(random.next() as u8);
            }
        }
        (2 | 3, _) => {
            out.extend(32u32.to_le_bytes());
            out.extend((small(random) as u32).to_le_bytes());
            if command == 2 {
                out.extend(small(random).to_le_bytes());
            }
            out.extend((small(random) << 12).to_le_bytes());
            out.extend((small(random) << 12).to_le_bytes());
        }
        (4..=7, _) => {
            out.extend((small(random) as u32).wrapping_add(16).to_le_bytes());
            out.extend([0; 4]);
            out.extend((small(random) as u32).to_le_bytes());
            out.extend([0; 20]);
        }
        (8, _) => {
            out.extend(20u32.to_le_bytes());
            out.extend((1u32 << random.below(3) | 8u32 << random.below(3)).to_le_bytes());
            for _ in 0..3 {
                out.extend((random.below(5) as u32).to_le_bytes());
            }
            out.extend(vec![1; random.below(6) as usize]);
        }
        (9 | 10, _) => {
            let count = small(random) as u32;
            out.extend(small(random).to_le_bytes());
            out.extend((random.below(10) as u32).to_le_bytes());
            out.extend(count.to_le_bytes());
            if command == 10 {
                out.extend(vec![0x5a; count.min(0x1200) as usize]);
            }
        }
        (15, _) => {
            let count = random.below(5);
            out.extend(count.to_le_bytes());
            for _ in 0..count {
                out.extend(small(random).to_le_bytes());
                out.extend((random.below(10) as u32).to_le_bytes());
                out.extend((random.below(10) as u32).to_le_bytes());
                out.extend(random.next().to_le_bytes());
            }
        }
        _ => {}
    }
    let size = (out.len() - start) as u32;
    out[start + 4..start + 8].copy_from_slice(&size.to_le_bytes());
    (command, flags)
}

#[test]
fn fuzz_every_request_gets_exactly_one_reply_in_order() {
    let mut random = Random(0x5eed_0001);
    let mut wire = Wire::negotiated();
    wire.device.quiet = true;
    let mut bytes = Vec::new();
    let mut expected = Vec::new();
    let mut buffered = Vec::new();
    let messages = fuzz_messages();
    for number in 0..messages {
        let id = random.next() as u16;
        let (command, flags) = random_message(&mut random, id, &mut bytes);
        if flags & 0xf == 0 && flags & 0x10 == 0 {
            expected.push((id, command));
        }
        if bytes.len() < 2000 && !random.one_in(16) && number + 1 != messages {
            continue;
        }
        if random.one_in(50) {
            let _ = wire.connection.dma_read(random.next(), 1 + random.below(64) as usize);
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match send_with(&wire.peer, rest, &[]) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::AGAIN) => {}
                Err(errno) => panic!("{errno}"),
            }
            while wire.pump().unwrap() == Pumped::Idle
                && wire.connection.wait(Some(Duration::ZERO)).unwrap().any()
            {
                buffered.extend(wire.received());
            }
        }
        bytes.clear();
        wire.connection.take_completions();
        buffered.extend(wire.received());
        assert!(wire.connection.queued() < 2 << 20);
        let mut seen = 0;
        let mut at = 0;
        while let Some(head) = buffered.get(at..at + 16) {
            let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
            let size = u32::from_le_bytes(head[4..8].try_into().unwrap()) as usize;
            match head[8] & 0xf {
                1 => {
                    assert_eq!((half(0), half(2)), expected[seen]);
                    assert!(head[8] == 1 || (head[8] == 0x21 && size == 16 && head[12..] != [0; 4]));
                    seen += 1;
                }
                _ => assert!(half(2) == 11 && size == 32),
            }
            at += size;
        }
        assert_eq!((seen, at), (expected.len(), buffered.len()));
        expected.clear();
        buffered.clear();
    }
    let counters = wire.connection.counters();
    assert!(wire.device.accesses > messages / 50, "{} of {messages}", wire.device.accesses);
    assert!(counters.refused > 0 && counters.unknown_commands > 0 && counters.unknown_replies > 0);
}

#[test]
fn fuzz_broken_framing_never_panics_and_never_hangs() {
    let mut random = Random(0x5eed_0002);
    let mut errors = 0u64;
    for _ in 0..fuzz_messages() / 20 {
        let mut wire = Wire::negotiated();
        wire.device.quiet = true;
        let mut bytes = Vec::new();
        for id in 0..1 + random.below(6) {
            random_message(&mut random, id as u16, &mut bytes);
        }
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
        let _ = send_with(&wire.peer, &bytes, &[]);
        let outcome = wire.pump();
        drop(std::mem::replace(&mut wire.peer, UnixStream::pair().unwrap().0));
        errors += u64::from(outcome.is_err() || wire.pump().is_err());
        assert_eq!(wire.pump().unwrap(), Pumped::Closed);
    }
    assert!(errors > fuzz_messages() / 100);
}

/// `cargo test --release --test vfio_user_robust -- --ignored --nocapture cost`
#[test]
#[ignore = "a measurement"]
fn cost_of_a_posted_write_and_of_a_read() {
    let mut wire = Wire::negotiated();
    wire.device.quiet = true;
    for (name, text) in [
        ("posted write", "0700 0a00 24000000 10000000 00000000  0000000000000000 00000000 04000000 78563412"),
        ("read", "0700 0900 20000000 00000000 00000000  0000000000000000 00000000 04000000"),
    ] {
        let message = hex(text);
        for together in [100, 1] {
            let before = wire.connection.counters().clone();
            let (mut messages, mut spent) = (0u32, Duration::ZERO);
            while messages < 200_000 {
                for _ in 0..together {
                    wire.send(&message, &[]);
                }
                let start = Instant::now();
                while wire.connection.pump(&mut wire.device, 256).unwrap() == Pumped::More {}
                spent += start.elapsed();
                messages += together;
                wire.received();
            }
            let after = wire.connection.counters();
            let calls = after.receives - before.receives;
            println!(
                "{name}, {together} together: {:?} each, {:.2} recvmsg each",
                spent / messages,
                calls as f64 / f64::from(messages)
            );
        }
    }
}
