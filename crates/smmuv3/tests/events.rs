//! Faults of real transactions: their records bit for bit, what becomes of the transaction, and the event queue's limits.

mod rig;

use portcullis_arch::{Attributes, Iova};
use portcullis_bus::{DmaFault, DmaPort, Mmio};
use rig::*;

const IN: u64 = 2 << 40;
const TT: u64 = 1 << 40;
const S2: u64 = 1 << 39;
const RNW: u64 = 1 << 35;

fn terminated<T>(result: Result<T, portcullis_bus::DmaError>) -> bool {
    matches!(result.map_err(|e| e.fault), Err(DmaFault::Terminated))
}

#[test]
fn configuration_errors_are_recorded() {
    let r = Rig::started(caps());
    let mut p = r.port();
    // An STE with V = 0.
    assert!(terminated(read4(&mut p, from(3), 0x1000)));
    assert_eq!(r.events(), [[3 << 32 | 0x04, 0, 0, 0]]);
    // Beyond the table, with RECINVSID.
    assert!(terminated(read4(&mut p, from(64), 0x1000)));
    assert_eq!(r.events(), [[64 << 32 | 0x02, 0, 0, 0]]);
    // A substream for a stream that has none.
    r.ste(4, [1 | 4 << 1, 1 << 44, 0, 0, 0, 0, 0, 0]);
    assert!(terminated(read4(&mut p, with_ssid(4, 9), 0x1000)));
    assert_eq!(r.events(), [[4 << 32 | 9 << 12 | 0x08, 0, 0, 0]]);
    // A CD with V = 0.
    r.ste(5, [1 | 5 << 1 | (CDS + 0x140), 0, 0, 0, 0, 0, 0, 0]);
    assert!(terminated(read4(&mut p, from(5), 0x1000)));
    assert_eq!(r.events(), [[5 << 32 | 0x0a, 0, 0, 0]]);
    // A CD that cannot be fetched.
    r.ste(6, [1 | 5 << 1 | NOWHERE, 0, 0, 0, 0, 0, 0, 0]);
    assert!(terminated(read4(&mut p, from(6), 0x1000)));
    assert_eq!(r.events(), [[6 << 32 | 0x09, 0, 0, NOWHERE]]);
    // S1DSS = 0 with substreams, none given; S1DSS = 2 and substream 0.
    r.ste(7, [1 | 5 << 1 | CDS | 3 << 59, 0, 0, 0, 0, 0, 0, 0]);
    assert!(terminated(read4(&mut p, from(7), 0x1000)));
    assert_eq!(r.events(), [[7 << 32 | 0x06, 0, 0, 0]]);
    r.ste(7, [1 | 5 << 1 | CDS | 3 << 59, 2, 0, 0, 0, 0, 0, 0]);
    r.cfgi_all();
    assert!(terminated(read4(&mut p, with_ssid(7, 0), 0x1000)));
    assert_eq!(r.events(), [[7 << 32 | 0x06, 0, 0, 0]]);
    assert_eq!(r.rises(LINE_EVENTQ), 7);
}

#[test]
fn an_ste_that_cannot_be_fetched_is_recorded_with_its_address() {
    let r = Rig::new(caps());
    r.start();
    r.w(CR0, CMDQEN | EVENTQEN);
    r.w64(STRTAB_BASE, NOWHERE);
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    assert!(terminated(read4(&mut r.port(), from(2), 0)));
    assert_eq!(r.events(), [[2 << 32 | 0x03, 0, 0, NOWHERE + 0x80]]);
}

#[test]
fn bad_stream_ids_are_silent_without_recinvsid() {
    let r = Rig::new(caps());
    r.start();
    r.w(CR0, CMDQEN | EVENTQEN);
    r.w(CR2, 0);
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    assert!(terminated(read4(&mut r.port(), from(64), 0)));
    assert_eq!(r.events().len(), 0);
}

#[test]
fn stage_1_faults_are_recorded() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    r.map(root, 0x2000, DATA | RO);
    r.map(root, 0x3000, DATA | RW & !(1 << 10));
    r.map(root, 0x4000, 1 << 50 | 1 << 47 | RW);
    let mut p = r.port();
    r.store(DATA, &[0x55]);
    assert_eq!(read4(&mut p, from(1), 0x1000).unwrap(), 0x55);
    assert_eq!(r.events().len(), 0);
    let sid = 1u64 << 32;
    assert!(terminated(read4(&mut p, from(1), 0x9123)));
    assert_eq!(r.events(), [[sid | 0x10, RNW | IN, 0x9123, 0]]);
    assert!(terminated(write4(&mut p, from(1), 0x2004, 1)));
    assert_eq!(r.events(), [[sid | 0x13, IN, 0x2004, 0]]);
    assert!(terminated(read4(&mut p, from(1), 0x3000)));
    assert_eq!(r.events(), [[sid | 0x12, RNW | IN, 0x3000, 0]]);
    // Upper half with EPD1, however T1SZ and TG1 look.
    assert!(terminated(read4(&mut p, from(1), 0xffff_ffff_ffff_f000)));
    assert_eq!(r.events(), [[sid | 0x10, RNW | IN, 0xffff_ffff_ffff_f000, 0]]);
    // A privileged instruction fetch.
    let fetch = from(1).with_attrs(Attributes::DEVICE_DEFAULT.with_privileged(true).with_instruction(true));
    assert!(terminated(read4(&mut p, fetch, 0x9000)));
    assert_eq!(r.events(), [[sid | 0x10, RNW | 3 << 33 | IN, 0x9000, 0]]);
    assert!(terminated(write4(&mut p, fetch, 0x9000, 0)));
    assert_eq!(r.events(), [[sid | 0x10, 1 << 33 | IN, 0x9000, 0]], "a write is no fetch");
}

#[test]
fn overrides_show_in_records() {
    let mut r = Rig::started(caps());
    r.stage1(1, A | R);
    // PRIVCFG 3, INSTCFG 3.
    r.store(STRTAB + 64 + 8, &[1 << 2 | 1 << 4 | 3 << 6 | 3 << 48 | 3 << 50]);
    assert!(terminated(read4(&mut r.port(), from(1), 0x9000)));
    assert_eq!(r.events(), [[1 << 32 | 0x10, RNW | 3 << 33 | IN, 0x9000, 0]]);
}

#[test]
fn table_fetch_aborts_are_recorded_with_their_address() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A);
    r.store(root, &[NOWHERE | 3]);
    assert!(terminated(read4(&mut r.port(), from(1), 0x4000_0000)));
    assert_eq!(r.events(), [[1 << 32 | 0x0b, RNW | TT, 0x4000_0000, NOWHERE + 8]], "recorded although R = 0");
    let root = r.stage2(2, 0);
    r.store(root, &[NOWHERE | 3]);
    assert!(terminated(read4(&mut r.port(), from(2), 0x4000_0000)));
    assert_eq!(r.events(), [[2 << 32 | 0x0b, RNW | S2 | IN, 0x4000_0000, NOWHERE + 8]]);
}

#[test]
fn stage_2_faults_are_recorded_with_the_ipa() {
    let mut r = Rig::started(caps());
    let root = r.stage2(2, 1 << 58);
    r.map(root, 0x5000, DATA | S2_RO);
    let mut p = r.port();
    assert!(terminated(read4(&mut p, from(2), 0x1234_5678)));
    assert_eq!(r.events(), [[2 << 32 | 0x10, RNW | S2 | IN, 0x1234_5678, 0x1234_5000]]);
    assert!(terminated(write4(&mut p, from(2), 0x5008, 0)));
    assert_eq!(r.events(), [[2 << 32 | 0x13, S2 | IN, 0x5008, 0x5000]]);
    // Without S2R: aborted in silence.
    r.stage2(3, 0);
    assert!(terminated(read4(&mut p, from(3), 0x1234_5678)));
    assert_eq!(r.events().len(), 0);
}

#[test]
fn nested_faults_say_what_was_being_translated() {
    let mut r = Rig::started(caps());
    let s2 = r.table();
    let s1 = 0x10_0000u64;
    let ste = [1 | 7 << 1 | 0x20_0000, 0, s2_dw2(1 << 58), s2, 0, 0, 0, 0];
    r.ste(4, ste);
    let mut p = r.port();
    let sid = 4u64 << 32;
    // The CD.
    assert!(terminated(write4(&mut p, from(4), 0x7123, 1)));
    assert_eq!(r.events(), [[sid | 0x10, S2, 0x7123, 0x20_0000]]);
    r.map(s2, 0x20_0000, CDS | S2_RO);
    r.cd(0, cd(s1, A | R));
    // The stage 1 table.
    assert!(terminated(write4(&mut p, from(4), 0x7123, 1)));
    assert_eq!(r.events(), [[sid | 0x10, S2 | TT, 0x7123, s1]]);
    // A block at level 1 of stage 1 over an IPA that is not there: IN.
    let table = r.table();
    let next = r.table();
    r.map(s2, s1, table | S2_RO);
    r.map(s2, s1 + 0x1000, next | S2_RO);
    r.store(table, &[(s1 + 0x1000) | 3]);
    r.store(next, &[0x4000_0000 | RW & !2]);
    assert!(terminated(write4(&mut p, from(4), 0x7123, 1)));
    assert_eq!(r.events(), [[sid | 0x10, S2 | IN, 0x7123, 0x4000_7000]]);
    r.map(s2, 0x4000_7000, DATA | S2_RW);
    assert!(write4(&mut p, from(4), 0x7128, 0xabcd).is_ok());
    assert_eq!(r.load(DATA + 0x128), 0xabcd);
}

#[test]
fn oversized_addresses_of_untranslated_streams_are_always_recorded() {
    let c = portcullis_smmuv3::Caps { oas_bits: 44, ds: false, va52: false, ..caps() };
    let mut r = Rig::started(c);
    r.ste(1, [1 | 4 << 1, 1 << 44, 0, 0, 0, 0, 0, 0]);
    // S2T0SZ 20: IPAs have 44 bits.
    let root = r.table();
    r.ste(2, [1 | 6 << 1, 0, s2_dw2(4 << 32), root, 0, 0, 0, 0]);
    let mut p = r.port();
    r.store(DATA, &[0x77]);
    assert_eq!(read4(&mut p, from(1), DATA).unwrap(), 0x77);
    for sid in [1, 2] {
        assert!(terminated(read4(&mut p, from(sid), 1 << 44)));
        assert_eq!(r.events(), [[u64::from(sid) << 32 | 0x11, RNW | IN, 1 << 44, 0]], "stream {sid}");
    }
    assert_eq!(read4(&mut p, from(1), DATA).unwrap(), 0x77);
    r.w(CR0, EVENTQEN);
    assert!(terminated(read4(&mut p, from(1), 1 << 44)), "silently while SMMUEN = 0");
    assert_eq!(read4(&mut p, from(1), DATA).unwrap(), 0x77);
    assert_eq!(r.events().len(), 0);
}

#[test]
fn aborting_streams_are_silent() {
    let r = Rig::started(caps());
    let mut p = r.port();
    r.ste(1, [1, 0, 0, 0, 0, 0, 0, 0]);
    assert!(terminated(read4(&mut p, from(1), 0)));
    r.w(CR0, EVENTQEN | CMDQEN);
    r.w(GBPA, 0x8010_0000);
    assert!(terminated(read4(&mut p, from(1), DATA)));
    r.w(GBPA, 0x8000_1000);
    assert!(read4(&mut p, from(1), DATA).is_ok(), "GBPA is looked at again");
    assert_eq!(r.events().len(), 0);
}

/// The A, R, S table of section 5.5 on real transactions (S is in `stalls.rs`).
#[test]
fn a_and_r_decide() {
    for (flags, abort, recorded) in
        [(0, false, false), (R, false, true), (A, true, false), (A | R, true, true)]
    {
        let mut r = Rig::started(caps());
        r.stage1(1, flags);
        let mut p = r.port();
        let read = read4(&mut p, from(1), 0x1000);
        match abort {
            true => assert!(terminated(read)),
            false => assert_eq!(read.unwrap(), 0, "reads give zero"),
        }
        assert_eq!(write4(&mut p, from(1), 0x1000, 1).is_err(), abort);
        assert_eq!(r.events().len(), if recorded { 2 } else { 0 });
    }
}

#[test]
fn a_full_queue_loses_events_and_toggles_ovflg_once() {
    let r = Rig::started(caps());
    let mut p = r.port();
    for _ in 0..8 {
        assert!(terminated(read4(&mut p, from(3), 0)));
    }
    assert_eq!(r.r(EVENTQ_PROD), 8, "full, nothing lost yet");
    for _ in 0..3 {
        assert!(terminated(read4(&mut p, from(3), 0)));
    }
    assert_eq!(r.r(EVENTQ_PROD), 1 << 31 | 8);
    assert_eq!(r.r(GERROR), 0, "an overflow is no global error");
    // Unacknowledged: goes on as soon as there is room.
    r.w(EVENTQ_CONS, 1);
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!(r.r(EVENTQ_PROD), 1 << 31 | 9);
    r.w(EVENTQ_CONS, 1 << 31 | 1);
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!(r.r(EVENTQ_PROD), 9, "acknowledged: the next loss toggles back");
    assert_eq!(r.rises(LINE_EVENTQ), 1, "empty to non-empty once");
}

#[test]
fn a_disabled_queue_drops_events_without_overflow() {
    let r = Rig::started(caps());
    r.w(CR0, SMMUEN | CMDQEN);
    for _ in 0..20 {
        assert!(terminated(read4(&mut r.port(), from(3), 0)));
    }
    assert_eq!((r.r(EVENTQ_PROD), r.rises(LINE_EVENTQ)), (0, 0));
}

#[test]
fn a_refused_write_of_an_event_is_a_global_error() {
    let r = Rig::new(caps());
    r.start();
    r.w(CR0, SMMUEN | CMDQEN);
    r.w64(EVENTQ_BASE, NOWHERE | 3);
    r.w(CR0, SMMUEN | CMDQEN | EVENTQEN);
    let mut p = r.port();
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!((r.r(GERROR), r.r(EVENTQ_PROD)), (4, 0), "PROD does not count it");
    assert_eq!((r.rises(LINE_GERROR), r.rises(LINE_EVENTQ)), (1, 0));
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!(r.r(GERROR), 4, "nothing is written while it is active");
    r.acknowledge();
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!(r.r(GERROR), 0, "and again");
    assert_eq!(r.rises(LINE_GERROR), 2);
}

#[test]
fn messages_follow_the_record() {
    let mut r = Rig::new(caps());
    r.w64(EVENTQ_IRQ, DOORBELL);
    r.w(EVENTQ_IRQ + 8, 0x123);
    r.w64(GERROR_IRQ, DATA + 8);
    r.w(GERROR_IRQ + 8, 0x456);
    r.start();
    r.stage1(1, A | R);
    let mut p = r.port();
    assert!(terminated(read4(&mut p, from(1), 0x1000)));
    assert!(terminated(read4(&mut p, from(1), 0x1000)));
    assert_eq!(r.messages(), [(DOORBELL, 0x123)], "once per empty to non-empty");
    assert_eq!(r.rises(LINE_EVENTQ), 1, "the wire as well");
    r.command([0xff, 0]);
    assert_eq!(r.load(DATA + 8), 0x456);
    assert_eq!(r.events().len(), 2);
    r.w(IRQ_CTRL, 0);
    assert!(terminated(read4(&mut p, from(1), 0x1000)));
    assert_eq!((r.messages().len(), r.rises(LINE_EVENTQ)), (0, 1), "disabled: nothing");
    r.w(IRQ_CTRL, 7);
    assert_eq!(r.messages().len(), 0, "enabling reports nothing that happened before");
}

#[test]
fn messages_that_memory_refuses_are_global_errors() {
    let r = Rig::new(caps());
    r.w64(EVENTQ_IRQ, NOWHERE);
    r.w64(GERROR_IRQ, NOWHERE);
    r.start();
    assert!(terminated(read4(&mut r.port(), from(3), 0)));
    // MSI_EVENTQ_ABT, whose own message makes MSI_GERROR_ABT, which interrupts nobody.
    assert_eq!(r.r(GERROR), 1 << 5 | 1 << 7);
    assert_eq!(r.rises(LINE_GERROR), 1);
    assert_eq!(r.rises(LINE_EVENTQ), 1);
}

#[test]
fn addresses_of_messages_end_at_the_output_size() {
    let c = portcullis_smmuv3::Caps { aarch32: false, oas_bits: 36, ds: false, va52: false, ..caps() };
    let r = Rig::new(c);
    r.w64(EVENTQ_IRQ, 0x00ff_fff0_0000_0000 | DATA);
    r.w(EVENTQ_IRQ + 8, 0x99);
    r.start();
    assert!(terminated(read4(&mut r.port(), from(3), 0)));
    assert_eq!(r.load(DATA), 0x99);
}

#[test]
fn secure_streams_have_their_own_queue() {
    let r = Rig::started(secure_caps());
    r.start_secure();
    let secure = from(3).with_attrs(Attributes::DEVICE_DEFAULT.with_non_secure(false));
    let mut p = r.port();
    assert!(terminated(read4(&mut p, secure, 0)));
    assert_eq!((r.events().len(), r.rises(LINE_SECURE)), (0, 1));
    assert_eq!(r.secure_events(), [[3 << 32 | 0x04, 0, 0, 0]]);
    assert!(terminated(read4(&mut p, from(3), 0)));
    assert_eq!((r.events().len(), r.secure_events().len()), (1, 0));
    // Both at once in one port, and the secure side off: the non-secure one goes on.
    r.s.write32(S + CR0, 0).unwrap();
    r.store(DATA, &[5]);
    assert_eq!(read4(&mut p, secure, DATA).unwrap(), 5);
    assert!(terminated(read4(&mut p, from(3), 0)));
}

#[test]
fn the_rest_of_a_transfer_is_not_made() {
    let mut r = Rig::started(caps());
    let root = r.stage1(1, A | R);
    r.map(root, 0x1000, DATA | RW);
    let e = r.port().write(from(1), Iova(0x1ff8), &[1; 16]).unwrap_err();
    assert_eq!((e.done, e.fault), (8, DmaFault::Terminated));
    assert_eq!(r.events(), [[1 << 32 | 0x10, IN, 0x2000, 0]]);
}

#[test]
fn events_of_a_page_merge_with_the_one_before_where_the_stream_allows_it() {
    const MEV: u64 = 1 << 19;
    let mut r = Rig::started(caps());
    for (sid, mev) in [(1, MEV), (2, 0)] {
        r.stage1(sid, A | R);
        let at = STRTAB + u64::from(sid) * 64 + 8;
        r.store(at, &[r.load(at) | mev]);
    }
    r.cfgi_all();
    let mut p = r.port();
    let mut refused = |sid, at| assert!(terminated(read4(&mut p, from(sid), at)));
    for at in [0x5000, 0x5ffc, 0x5004, 0x6000, 0x5000] {
        refused(1, at);
    }
    let addresses = |events: Vec<[u64; 4]>| events.iter().map(|e| e[2]).collect::<Vec<_>>();
    // One for the three accesses of the first page, then one each.
    assert_eq!(addresses(r.events()), [0x5000, 0x6000, 0x5000]);
    // A record that software has consumed is past merging.
    refused(1, 0x5000);
    assert_eq!(addresses(r.events()), [0x5000]);
    for at in [0x5000, 0x5000] {
        refused(2, at);
    }
    assert_eq!(addresses(r.events()), [0x5000, 0x5000]);
}

#[test]
fn stalls_never_merge() {
    const MEV: u64 = 1 << 19;
    let mut r = Rig::started(caps());
    r.stage1(1, A | R | STALL);
    let at = STRTAB + 64 + 8;
    r.store(at, &[r.load(at) | MEV]);
    r.cfgi_all();
    let mut ports = [r.port(), r.port()];
    for p in &mut ports {
        let result = read4(p, from(1), 0x5000).map_err(|e| e.fault);
        assert!(matches!(result, Err(DmaFault::Stalled(_))));
    }
    assert_eq!(r.events().len(), 2);
}
