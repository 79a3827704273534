//! Page requests, bit by bit, and the overflow of their queue.

use alloc::vec::Vec;

use portcullis_arch::smmuv3::regs::OVERFLOW;
use portcullis_hal::fake::FakeMemory;

use super::*;
use crate::smmuv3::cmdq::testing::{BASE, FakeSmmu, PRIQ, Pace, platform};

#[test]
fn requests_have_their_fields_where_the_manual_has_them() {
    let request = Page::decode(PriRecord([0xbabc_def0_1234_5678 | 1 << 63, 0xffff_ffff_ffff_f123]));
    // [51:32] SSID, 58 Priv, 59 X, 60 R, 61 W, 62 Last, 63 SSV; 0xbabcdef0 has 63, 61, 60, 59, 57 and 55 set.
    let expected = PageRequest {
        stream: StreamId(0x1234_5678),
        substream: Some(SubstreamId(0xcdef0)),
        address: Iova(0xffff_ffff_ffff_f000),
        read: true,
        write: true,
        execute: true,
        privileged: false,
        group: 0x123,
        last: false,
    };
    assert_eq!(request, Page::Request(expected));
    // Privilege and execution mean nothing without a substream.
    let plain = Page::decode(PriRecord([1 << 58 | 1 << 59 | 1 << 60 | 1 << 62 | 7, 0x5000 | 9]));
    let Page::Request(plain) = plain else { panic!("{plain:?}") };
    assert_eq!((plain.substream, plain.privileged, plain.execute), (None, false, false));
    assert_eq!((plain.read, plain.write, plain.last, plain.group), (true, false, true, 9));
}

#[test]
fn last_alone_with_a_substream_is_a_stop_marker() {
    let stop = Page::decode(PriRecord([1 << 62 | 1 << 63 | 0x42 << 32 | 3, 5]));
    assert_eq!(stop, Page::Stop { stream: StreamId(3), substream: SubstreamId(0x42), group: 5 });
    assert!(matches!(Page::decode(PriRecord([1 << 62 | 3, 5])), Page::Request(_)));
}

#[test]
fn the_queue_is_drained_before_an_overflow_is_acknowledged() {
    let smmu = FakeSmmu::new(FakeMemory::plain(BASE, 1 << 16), Pace::Manual);
    let options = QueueOptions { log2: 2, coherent: true, address_bits: 48 };
    let queue = PriQueue::new(platform(&smmu), options).unwrap();
    queue.program();
    smmu.with(|device| assert_eq!(device.registers[&0xc0], 1 << 62 | BASE | 2));
    assert_eq!(queue.entries(), 4);
    for group in 0..6 {
        smmu.record(PRIQ, &[1 << 60 | 1, group]);
    }
    let mut seen = Vec::new();
    queue.drain(|page| {
        seen.push(match page {
            Page::Request(request) => Some(request.group),
            Page::Lost(Lost::Overflow) => None,
            other => panic!("{other:?}"),
        });
    });
    assert_eq!(seen, [Some(0), Some(1), Some(2), Some(3), None]);
    smmu.with(|device| assert_eq!((device.get(0x100c8), device.get(0x100cc)), (OVERFLOW | 4, OVERFLOW | 4)));
    drop(queue);
    smmu.memory.assert_clean();
}
