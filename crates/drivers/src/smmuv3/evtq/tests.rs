//! The event queue against an SMMU that fills it, and records of every code against the fact sheet's bits.

use alloc::string::ToString;
use alloc::vec::Vec;

use portcullis_arch::smmuv3::regs::{OVERFLOW, PAGE, offset};
use portcullis_arch::smmuv3::{EventClass, EventCode};
use portcullis_arch::{Access, Iova, Ipa, Pa, StreamId, SubstreamId};
use portcullis_hal::fake::FakeMemory;

use super::decode::{Extra, Rights, Wanted};
use super::*;
use crate::fault::FaultReason;
use crate::smmuv3::cmdq::testing::{BASE, EVENTQ, FakePlatform, FakeSmmu, Pace, platform};

const CONS: u64 = PAGE + offset::EVENTQ_CONS;
const PROD: u64 = PAGE + offset::EVENTQ_PROD;

fn rig(
    memory: FakeMemory,
    log2: u8,
    coherent: bool,
) -> (alloc::sync::Arc<FakeSmmu>, EventQueue<FakePlatform>) {
    let smmu = FakeSmmu::new(memory, Pace::Manual);
    let options = QueueOptions { log2, coherent, address_bits: 48 };
    let queue = EventQueue::new(platform(&smmu), options).unwrap();
    queue.program();
    (smmu, queue)
}

fn plain() -> FakeMemory {
    FakeMemory::plain(BASE, 1 << 16)
}

/// C_BAD_STE of a stream.
fn words(stream: u32) -> [u64; 4] {
    [u64::from(stream) << 32 | 4, 0, 0, 0]
}

fn streams(queue: &EventQueue<FakePlatform>) -> Vec<Option<u32>> {
    let mut seen = Vec::new();
    let count = queue.drain(|event| {
        seen.push(match event {
            Event::Record(record) => Some(record.stream.get()),
            Event::Lost(_) => None,
        });
    });
    assert_eq!(count, seen.len());
    seen
}

#[test]
fn programming_writes_both_pages() {
    let (smmu, queue) = rig(plain(), 5, true);
    smmu.with(|device| {
        assert_eq!(device.registers[&0xa0], 1 << 62 | BASE | 5);
        assert_eq!((device.registers[&0x100a8], device.registers[&0x100ac]), (0, 0));
    });
    assert_eq!(queue.entries(), 32);
    drop(queue);
    smmu.memory.assert_clean();
}

#[test]
fn records_come_out_in_order_over_many_laps() {
    for log2 in 0..=5 {
        let (smmu, queue) = rig(plain(), log2, true);
        let (mut put, mut got) = (Vec::new(), Vec::new());
        for round in 0..100 {
            for _ in 0..round % (1 << log2) + 1 {
                let stream = put.len() as u32;
                if smmu.record(EVENTQ, &words(stream)) {
                    put.push(Some(stream));
                }
            }
            got.extend(streams(&queue));
        }
        assert_eq!(got, put);
        assert_eq!(streams(&queue), []);
    }
}

#[test]
fn an_overflow_is_reported_behind_what_was_in_the_queue_and_acknowledged() {
    let (smmu, queue) = rig(plain(), 2, true);
    for stream in 0..9 {
        assert_eq!(smmu.record(EVENTQ, &words(stream)), stream < 4);
    }
    assert_eq!(streams(&queue), [Some(0), Some(1), Some(2), Some(3), None]);
    smmu.with(|device| assert_eq!((device.get(PROD), device.get(CONS)), (OVERFLOW | 4, OVERFLOW | 4)));
    // Once only, and the next overflow is another one.
    assert_eq!(streams(&queue), []);
    for stream in 0..6 {
        smmu.record(EVENTQ, &words(stream));
    }
    assert_eq!(streams(&queue), [Some(0), Some(1), Some(2), Some(3), None]);
    smmu.with(|device| assert_eq!((device.get(PROD), device.get(CONS)), (0, 0)));
}

#[test]
fn an_overflow_behind_more_than_one_piece_is_reported_last() {
    let (smmu, queue) = rig(plain(), 6, true);
    for stream in 0..70 {
        smmu.record(EVENTQ, &words(stream));
    }
    let seen = streams(&queue);
    assert_eq!(seen.len(), 65);
    assert_eq!(seen.iter().position(Option::is_none), Some(64));
}

#[test]
fn a_device_that_fills_as_fast_as_it_is_drained_does_not_hold_the_driver() {
    let (smmu, queue) = rig(plain(), 3, true);
    smmu.record(EVENTQ, &words(0));
    let mut number = 0;
    let given = queue.drain(|_| {
        number += 1;
        smmu.record(EVENTQ, &words(number));
    });
    assert!((8..=24).contains(&given), "{given}");
}

#[test]
fn indices_that_make_no_sense_are_reported_and_drained_past() {
    let (smmu, queue) = rig(plain(), 3, true);
    smmu.with(|device| device.set(PROD, 13));
    let mut seen = Vec::new();
    queue.drain(|event| seen.push(event));
    assert_eq!(seen, [Event::Lost(Lost::Indices { prod: 13, cons: 0 })]);
    smmu.with(|device| assert_eq!(device.get(CONS), 13));
    smmu.record(EVENTQ, &words(1));
    assert_eq!(streams(&queue), [Some(1)]);
}

#[test]
fn records_of_a_non_snooping_smmu_are_not_read_from_a_stale_cache() {
    for seed in 0..20 {
        let (smmu, queue) = rig(FakeMemory::non_coherent_reordering(BASE, 1 << 16, seed), 3, false);
        for round in 0..20u32 {
            for i in 0..round % 8 {
                assert!(smmu.record(EVENTQ, &words(round * 10 + i)));
            }
            let expected: Vec<_> = (0..round % 8).map(|i| Some(round * 10 + i)).collect();
            assert_eq!(streams(&queue), expected, "seed {seed}");
        }
    }
}

#[test]
fn a_translation_fault_has_all_its_fields() {
    // Code 0x10, SSV, substream 0x54321, stream 0x89abcdef; STAG 0x1234, stalled, privileged instruction read, stage 2,
    // CLASS = IN.
    let dw1 = 0x1234 | 1 << 31 | 1 << 33 | 1 << 34 | 1 << 35 | 1 << 39 | 2 << 40;
    let raw = [0x89ab_cdef_5432_1810, dw1, 0xff00_1234_5678_9abc, 0x0012_3456_789a_b123];
    let record = Record::decode(EventRecord(raw));
    let expected = Record {
        code: Some(EventCode::Translation),
        stream: StreamId(0x89ab_cdef),
        substream: Some(SubstreamId(0x54321)),
        stall: Some(0x1234),
        wanted: Some(Wanted { access: Access::Read, privileged: true, instruction: true }),
        stage: Some(2),
        class: Some(EventClass::In),
        input: Some(Iova(0xff00_1234_5678_9abc)),
        ipa: Some(Ipa(0x0012_3456_789a_b000)),
        fetch: None,
        reason: None,
        protection_fault: false,
        extra: None,
        raw: EventRecord(raw),
    };
    assert_eq!(record, expected);
    assert!(record.is_page_fault());
    assert_eq!(
        record.to_string(),
        "F_TRANSLATION stream 0x89abcdef substream 0x54321, privileged instruction read at 0xff00123456789abc, stage 2, ipa \
         0x123456789ab000, stalled with tag 0x1234"
    );
}

/// For each code: what all ones (with S2, and CLASS = TT) decode to, as letters: S substream, T stall, W wanted, P its
/// privilege, G stage and class, I input, A ipa, F fetch, R reason, X extra.
const FIELDS: [(u8, &str, FaultReason); 19] = [
    (0x01, "SWPIR", FaultReason::Unsupported),
    (0x02, "S", FaultReason::UnknownStream),
    (0x03, "SFR", FaultReason::ExternalAbort),
    (0x04, "S", FaultReason::InvalidContext),
    (0x05, "SIX", FaultReason::Unsupported),
    (0x06, "", FaultReason::InvalidContext),
    (0x07, "WI", FaultReason::Permission),
    (0x08, "S", FaultReason::InvalidContext),
    (0x09, "SFR", FaultReason::ExternalAbort),
    (0x0a, "S", FaultReason::InvalidContext),
    (0x0b, "SWPGIFR", FaultReason::ExternalAbort),
    (0x10, "STWPGIA", FaultReason::Translation),
    (0x11, "STWPGIA", FaultReason::AddressSize),
    (0x12, "STWPGIA", FaultReason::AccessFlag),
    (0x13, "STWPGIAX", FaultReason::Permission),
    (0x20, "SWPGIAR", FaultReason::TlbConflict),
    (0x21, "SR", FaultReason::StreamConflict),
    (0x24, "SIX", FaultReason::Other),
    (0x25, "SFR", FaultReason::ExternalAbort),
];

#[test]
fn every_code_has_the_fields_of_the_manual_and_no_others() {
    for code in 0..=255u8 {
        let ones = !0 << 8 | u64::from(code);
        let raw = EventRecord([ones, !(3 << 40) | 1 << 40, !0, !0]);
        let record = Record::decode(raw);
        assert_eq!((record.stream, record.raw, record.number()), (StreamId(!0), raw, code));
        let entry = FIELDS.iter().find(|entry| entry.0 == code);
        assert_eq!(record.code.is_some(), entry.is_some());
        let (_, fields, reason) = entry.copied().unwrap_or((code, "", FaultReason::Other));
        let has = |letter| fields.contains(letter);
        let name = code;
        assert_eq!(record.substream.is_some(), has('S'), "{name:#x}");
        assert_eq!(record.stall, has('T').then_some(0xffff), "{name:#x}");
        assert_eq!(record.wanted.is_some(), has('W'), "{name:#x}");
        assert_eq!(record.wanted.is_some_and(|wanted| wanted.privileged), has('P'), "{name:#x}");
        assert_eq!((record.stage, record.class.is_some()), (has('G').then_some(2), has('G')), "{name:#x}");
        assert_eq!(record.input.is_some(), has('I'), "{name:#x}");
        assert_eq!(record.ipa, has('A').then_some(Ipa(0x00ff_ffff_ffff_f000)), "{name:#x}");
        assert_eq!(record.fetch, has('F').then_some(Pa(0x00ff_ffff_ffff_fff8)), "{name:#x}");
        assert_eq!(record.protection_fault, has('F'), "{name:#x}");
        assert_eq!(record.reason.is_some(), has('R'), "{name:#x}");
        assert_eq!(record.extra.is_some(), has('X'), "{name:#x}");
        assert_eq!(record.fault_reason(), reason, "{name:#x}");
        // No SSV: no substream, but for C_BAD_SUBSTREAMID.
        let without = Record::decode(EventRecord([ones & !(1 << 11), 0, 0, 0]));
        assert_eq!(without.substream.is_some(), code == 8, "{name:#x}");
        assert_eq!((without.stall, without.ipa), (None, None));
        assert!(!record.to_string().is_empty());
    }
}

#[test]
fn requests_and_hints_say_what_was_asked_for() {
    let treq = Record::decode(EventRecord([5, 7 | 1 << 28 | 1 << 31, 0x1234_5fff, 0]));
    assert_eq!(
        treq.extra,
        Some(Extra::AtsRequest {
            span: 7,
            privileged: true,
            rights: Rights { read: true, write: false, execute: false }
        })
    );
    assert_eq!(treq.input, Some(Iova(0x1234_5000)));
    let hint = Record::decode(EventRecord([0x24, 1 << 34 | 1 << 39 | 3 << 44, 0x5000, 0]));
    assert_eq!(
        hint.extra,
        Some(Extra::Hint {
            bytes: 0x3000,
            unprivileged: Rights { write: true, ..Rights::default() },
            privileged: Rights { read: true, ..Rights::default() },
        })
    );
    let update = Record::decode(EventRecord([0x13, 1 << 39 | 1 << 40, 0, 0x4000]));
    assert_eq!((update.extra, update.class), (Some(Extra::TableAccess(Access::Write)), Some(EventClass::Tt)));
}

#[test]
fn unknown_codes_are_kept_raw() {
    let raw = EventRecord([0xe3, 1, 2, 3]);
    let record = Record::decode(raw);
    assert_eq!((record.code, record.raw), (None, raw));
    assert!(record.to_string().starts_with("event 0xe3 stream 0x0: 0x00000000000000e3"), "{record}");
}
