use super::*;
use crate::lookup::tests::{CDS, S2TABLE, TABLE, caps, cd, ste, who};
use crate::rig::{AF, DBM, L3, PRIQ, PXN, READ_ONLY, Rig, TTB0, USER, UXN};
use portcullis_arch::smmuv3::Cd;
use portcullis_arch::smmuv3::regs::{Cr2, PAGE, offset};
use portcullis_bus::DmaFault;
use portcullis_walk::Invalidation;

fn ste_with(config: SteConfig, eats: u8) -> Ste {
    let e = ste(config);
    e.with_dw1(e.dw1().with_eats(eats))
}

fn rig() -> Rig {
    Rig::new(caps(), ste_with(SteConfig::Stage1, 1), cd())
}

fn ask(rig: &Rig, addr: u64, no_write: bool) -> AtsReply {
    rig.port().translation_request(who(0, None), Iova(addr), no_write)
}

fn put_ste(rig: &Rig, e: Ste) {
    rig.memory.put(TABLE, &e.0);
}

/// Level 1 of stage 2 maps IPA 0..1 GiB to 1 GiB at 0x1_0000_0000 plus the tables' own gigabyte flat.
fn nested(eats: u8) -> Rig {
    let r = Rig::new(caps(), ste_with(SteConfig::Nested, eats), cd());
    // Everything below 1 GiB stays where it is, the next GiB moves.
    let leaf = AF | 3 << 6 | 0xf << 2 | 1;
    r.memory.put(S2TABLE, &[leaf, 0x1_0000_0000 | leaf]);
    r
}

const NONE: (bool, bool) = (false, false);

fn access(reply: AtsReply) -> (bool, bool) {
    match reply {
        AtsReply::Granted(t) => (t.read, t.write),
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_of_streams_without_ats_are_unsupported() {
    let r = rig();
    let refused = |e: Ste, events: &[EventCode]| {
        put_ste(&r, e);
        assert_eq!(ask(&r, 0, false), AtsReply::Unsupported);
        assert_eq!(r.codes(), events);
    };
    refused(ste_with(SteConfig::Abort, 1), &[]);
    refused(ste_with(SteConfig::Bypass, 1), &[EventCode::BadAtsTreq]);
    refused(ste_with(SteConfig::Stage1, 0), &[EventCode::BadAtsTreq]);
    refused(ste_with(SteConfig::Stage1, 3), &[EventCode::BadAtsTreq]);
    r.enable(true, false);
    refused(ste_with(SteConfig::Nested, 2), &[EventCode::BadAtsTreq]);
    r.enable(false, true);
    refused(ste_with(SteConfig::Stage1, 1), &[EventCode::BadAtsTreq]);
    let mut c = caps();
    (c.ats, c.pri, c.split_stage_ats, c.ats_record_errors, c.priq_log2) = (false, false, false, false, 0);
    let r = Rig::new(c, ste_with(SteConfig::Stage1, 1), cd());
    assert_eq!(ask(&r, 0, false), AtsReply::Unsupported);
    assert_eq!(r.codes(), []);
}

#[test]
fn configuration_errors_are_completer_aborts_recorded_only_on_demand() {
    type Break = fn(&Rig) -> Initiator;
    let cases: [(EventCode, Break); 8] = [
        (EventCode::BadStreamId, |_| who(99, None)),
        (EventCode::SteFetch, |r| {
            r.memory.refuse(TABLE);
            who(0, None)
        }),
        (EventCode::BadSte, |r| {
            put_ste(r, Ste::default());
            who(0, None)
        }),
        (EventCode::BadSubstreamId, |_| who(0, Some(3))),
        (EventCode::StreamDisabled, |r| {
            let e = ste_with(SteConfig::Stage1, 1);
            put_ste(r, e.with_dw0(e.dw0().with_s1cdmax(2)));
            who(0, None)
        }),
        (EventCode::CdFetch, |r| {
            r.memory.refuse(CDS);
            who(0, None)
        }),
        (EventCode::BadCd, |r| {
            r.memory.put(CDS, &Cd::default().0);
            who(0, None)
        }),
        (EventCode::WalkEabt, |r| {
            r.memory.refuse(TTB0);
            who(0, None)
        }),
    ];
    for (code, broken) in cases {
        for (rec, inv) in [(false, true), (true, false), (true, true)] {
            let r = rig();
            r.set_cr2(Cr2::new().with_rec_cfg_ats(rec).with_recinvsid(inv));
            let from = broken(&r);
            assert_eq!(r.port().translation_request(from, Iova(0), false), AtsReply::Aborted, "{code:?}");
            let recorded = rec && (inv || code != EventCode::BadStreamId);
            assert_eq!(r.codes(), if recorded { vec![code] } else { vec![] });
        }
    }
}

#[test]
fn faults_of_the_translation_are_success_without_access() {
    let r = rig();
    r.set_cr2(Cr2::new().with_rec_cfg_ats(true).with_recinvsid(true));
    r.page(1, 0x7000 | USER | 3);
    r.page(2, 1 << 45 | AF | USER | 3);
    let c = cd();
    r.memory.put(CDS, &c.with_dw0(c.dw0().with_ips(3)).0);
    for (addr, what) in
        [(0, "translation"), (0x1000, "access flag"), (0x2000, "address size"), (1 << 40, "range")]
    {
        let AtsReply::Granted(t) = ask(&r, addr + 0x123, false) else { panic!("{what}") };
        assert_eq!((t.read, t.write, t.execute, t.size_log2), (false, false, false, 12), "{what}");
    }
    // A stage 2 fault on the way to the CD or the tables is one too.
    let r = nested(1);
    r.memory.put(S2TABLE, &[0]);
    assert_eq!(access(ask(&r, 0, false)), NONE);
    let r = nested(1);
    r.memory.put(TTB0, &[0x8000_0000 | 3]);
    assert_eq!(access(ask(&r, 0, false)), NONE);
    assert_eq!(r.codes(), []);
}

/// Section 13.7.1, written down again: (R, W, X) for what a request asks for and what the tables allow.
fn expected(
    (priv_req, exe): (bool, bool),
    (privcfg, instcfg): (u8, u8),
    allowed: impl Fn(bool) -> (bool, bool, bool),
) -> (bool, bool, bool) {
    let privileged = match privcfg {
        2 => false,
        3 => true,
        _ => priv_req,
    };
    let (r, w, x) = allowed(privileged);
    match instcfg {
        3 => (x, w, exe && x),
        2 => (r, w, exe && r),
        _ => (r, w, exe && r && x),
    }
}

#[test]
fn permissions_are_those_of_the_tables_and_the_request() {
    let mut c = caps();
    c.httu = crate::caps::Httu::None;
    for leaf in 0..16u64 {
        let bit = |n: u64, mask: u64| if leaf >> n & 1 != 0 { mask } else { 0 };
        let descriptor = 0x9_7000 | AF | 3 | bit(0, USER) | bit(1, READ_ONLY) | bit(2, PXN) | bit(3, UXN);
        let (user, ro, pxn, uxn) = (leaf & 1 != 0, leaf & 2 != 0, leaf & 4 != 0, leaf & 8 != 0);
        let allowed = |privileged: bool| match privileged {
            true => (true, !ro, !pxn && !(user && !ro)),
            // VMSAv8-64 has execute-only memory for unprivileged accesses.
            false => (user, user && !ro, !uxn),
        };
        for privcfg in 0..4 {
            for instcfg in 0..4 {
                let e = ste_with(SteConfig::Stage1, 1);
                let e = e.with_dw0(e.dw0().with_s1cdmax(1));
                let e = e.with_dw1(e.dw1().with_privcfg(privcfg).with_instcfg(instcfg).with_s1dss(2));
                let r = Rig::new(c.clone(), e, cd());
                r.memory.put(CDS + 64, &cd().0);
                r.page(5, descriptor);
                for request in [(false, false), (false, true), (true, false), (true, true)] {
                    for pasid in [false, true] {
                        let attrs = Attributes::DEVICE_DEFAULT;
                        let attrs = attrs.with_privileged(request.0).with_instruction(request.1);
                        let from = who(0, pasid.then_some(1)).with_attrs(attrs);
                        let reply = r.port().translation_request(from, Iova(0x5abc), false);
                        let counts = if pasid { request } else { (false, false) };
                        let want = expected(counts, (privcfg, instcfg), allowed);
                        let AtsReply::Granted(t) = reply else { panic!("{reply:?}") };
                        let case = format!("leaf {leaf:#x} {privcfg} {instcfg} {request:?} PASID {pasid}");
                        let want = if want.0 || want.1 { want } else { (false, false, false) };
                        assert_eq!((t.read, t.write, t.execute), want, "{case}");
                        assert_eq!(t.privileged, counts.0, "{case}");
                        if t.has_access() {
                            assert_eq!((t.addr, t.size_log2), (0x9_7000, 12), "{case}");
                        }
                        assert!(!t.global);
                    }
                }
            }
        }
    }
}

#[test]
fn only_requests_that_may_write_mark_pages_dirty() {
    let c = cd();
    let c = c.with_dw0(c.dw0().with_ha(true).with_hd(true));
    let r = Rig::new(caps(), ste_with(SteConfig::Stage1, 1), c);
    let clean = 0x7000 | USER | READ_ONLY | DBM | 3;
    r.page(0, clean);
    assert_eq!(access(ask(&r, 0, true)), (true, false));
    assert_eq!(r.memory.get(L3), clean | AF, "the access flag at request time, no dirty state");
    assert_eq!(access(ask(&r, 0, false)), (true, true));
    assert_eq!(r.memory.get(L3), (clean | AF) & !READ_ONLY);
    assert_eq!(access(ask(&r, 0, true)), (true, true), "dirty already");
}

#[test]
fn full_ats_gives_physical_addresses_and_split_stage_intermediate_ones() {
    for (eats, address) in [(1, 0x1_0000_7000u64), (2, 0x4000_7000)] {
        let r = nested(eats);
        r.page(0, 0x4000_7000 | AF | USER | 3);
        let AtsReply::Granted(t) = ask(&r, 0x123, false) else { panic!() };
        assert_eq!((t.addr, t.size_log2, t.read, t.write), (address, 12, true, true));
        let mut port = r.port();
        r.memory.put(0x1_0000_7000, &[0xabcd]);
        let mut word = [0; 8];
        port.read_translated(who(0, None), t.addr, &mut word).unwrap();
        assert_eq!(u64::from_le_bytes(word), 0xabcd);
        port.write_translated(who(0, None), t.addr + 8, &[7; 8]).unwrap();
        assert_eq!(r.memory.get(0x1_0000_7008), 0x0707_0707_0707_0707);
        assert_eq!(r.codes(), []);
    }
}

#[test]
fn split_stage_permissions_are_those_of_both_stages_and_faults_of_stage_2_are_recorded() {
    let r = nested(2);
    r.page(0, 0x4000_7000 | AF | USER | 3);
    let e = ste_with(SteConfig::Nested, 2);
    put_ste(&r, e.with_dw2(e.dw2().with_s2r(true)));
    // Read only at stage 2.
    let leaf = AF | 1 << 6 | 0xf << 2 | 1;
    r.memory.put(S2TABLE + 8, &[0x1_0000_0000 | leaf]);
    assert_eq!(access(ask(&r, 0, false)), (true, false));
    let mut port = r.port();
    let refused = port.write_translated(who(0, Some(7)), 0x4000_7010, &[0; 4]).unwrap_err();
    assert_eq!(refused.fault, DmaFault::Terminated);
    // F_PERMISSION, S2, CLASS = IN, a write, without a substream.
    assert_eq!(r.events()[0].0, [0x13, 1 << 39 | 2 << 40, 0x4000_7010, 0x4000_7000]);
    // Above IAS: stage 1.
    port.read_translated(who(0, None), 1 << 48, &mut [0; 4]).unwrap_err();
    assert_eq!(r.events()[0].0, [0x11, 1 << 35 | 2 << 40, 1 << 48, 0]);
}

#[test]
fn s1dss_1_answers_with_identity_or_stage_2() {
    let with = |config, eats| {
        let e = ste_with(config, eats);
        e.with_dw0(e.dw0().with_s1cdmax(1)).with_dw1(e.dw1().with_eats(eats).with_s1dss(1))
    };
    let r = Rig::new(caps(), with(SteConfig::Stage1, 1), cd());
    let AtsReply::Granted(t) = ask(&r, 0x1_2345_6789, false) else { panic!() };
    assert_eq!((t.addr, t.size_log2), (0x1_0000_0000, 30));
    assert!(t.read && t.write && !t.execute && !t.privileged);
    assert_eq!(access(ask(&r, 1 << 48, false)), NONE, "above IAS");
    for (eats, address) in [(1, 0x1_0000_0000u64), (2, 0x4000_0000)] {
        let r = nested(eats);
        put_ste(&r, with(SteConfig::Nested, eats));
        let AtsReply::Granted(t) = ask(&r, 0x4123_4567, false) else { panic!() };
        assert_eq!((t.addr, t.size_log2, t.read, t.write), (address, 30, true, true));
    }
}

fn translated_read(r: &Rig, sid: u32, at: u64) -> bool {
    r.port().read_translated(who(sid, Some(5)), at, &mut [0; 8]).is_ok()
}

#[test]
fn translated_transactions_are_checked_as_atschk_and_eats_say() {
    let r = rig();
    assert!(translated_read(&r, 0, 0x7000));
    // Above OAS: no event.
    assert!(!translated_read(&r, 0, 1 << 48));
    assert_eq!(r.codes(), []);
    for (e, events) in [
        (ste_with(SteConfig::Abort, 1), vec![]),
        (ste_with(SteConfig::Bypass, 1), vec![EventCode::TranslForbidden]),
        (ste_with(SteConfig::Stage1, 0), vec![EventCode::TranslForbidden]),
        (Ste::default(), vec![]),
    ] {
        put_ste(&r, e);
        assert!(!translated_read(&r, 0, 0x7000));
        assert_eq!(r.codes(), events);
    }
    assert!(!translated_read(&r, 99, 0x7000));
    assert_eq!(r.codes(), []);
    // Recorded on demand; RECINVSID does not count here.
    r.set_cr2(Cr2::new().with_rec_cfg_ats(true));
    assert!(!translated_read(&r, 0, 0x7000) && !translated_read(&r, 99, 0x7000));
    assert_eq!(r.codes(), [EventCode::BadSte, EventCode::BadStreamId]);
    r.enable(true, false);
    assert!(translated_read(&r, 99, 0x7000), "ATSCHK = 0: nothing is looked up");
    r.enable(false, true);
    assert!(!translated_read(&r, 0, 0x7008));
    // No substream in the record.
    assert_eq!(r.events()[0].0, [0x07, 1 << 35, 0x7008, 0]);
}

#[test]
fn a_translated_transaction_sees_an_invalidated_ste() {
    let r = rig();
    let mut port = r.port();
    let mut read = || port.read_translated(who(0, None), 0x7000, &mut [0; 8]).is_ok();
    assert!(read());
    put_ste(&r, ste_with(SteConfig::Stage1, 0));
    assert!(read(), "cached");
    r.smmu.log.publish(Invalidation::Streams { first: 0, last: 0 });
    assert!(!read());
}

#[test]
fn a_device_cannot_call_its_accesses_translated() {
    let r = rig();
    let mut port = r.port();
    for own in [OWN, OWN | 1, OWN | 2, u32::MAX] {
        let from = who(0, Some(own));
        assert!(port.read(from, Iova(0x7000), &mut [0; 8]).is_err());
        assert!(port.write(from, Iova(0x7000), &[0; 8]).is_err());
        assert!(port.copy((from, Iova(0x7000)), (from, Iova(0x8000)), 8).is_err());
        assert!(port.translate(&from, Iova(0x7000), Access::Read).is_err());
        assert_eq!(port.translation_request(from, Iova(0x7000), false), AtsReply::Aborted);
        let codes = r.codes();
        assert!(!codes.is_empty() && codes.iter().all(|c| *c == EventCode::BadSubstreamId), "{codes:?}");
    }
}

#[test]
fn page_requests_reach_the_queue() {
    let r = rig();
    let request = PageRequest {
        from: who(0, Some(9)),
        addr: Iova(0x5000),
        read: true,
        write: false,
        execute: false,
        privileged: false,
        group: 3,
        last: true,
    };
    r.port().page_request(request);
    assert_eq!(r.read(PAGE + offset::PRIQ_PROD, 4), 1);
    let record = [0, 8].map(|o| r.memory.get(PRIQ + o));
    assert_eq!(record, [1 << 63 | 1 << 62 | 1 << 60 | 9 << 32, 0x5003]);
}
