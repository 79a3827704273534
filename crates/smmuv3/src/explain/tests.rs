use super::*;
use crate::lookup::tests::{S2TABLE, TABLE, caps, cd, ste, who};
use crate::rig::{AF, DBM, EVENTQ, L3, READ_ONLY, Rig, TTB0, USER};
use portcullis_arch::smmuv3::regs::{Gbpa, offset};
use portcullis_arch::smmuv3::{Cd, EventCode, SteConfig};
use portcullis_bus::DmaPort;

fn rig() -> Rig {
    Rig::new(caps(), ste(SteConfig::Stage1), cd())
}

fn explain(r: &Rig, va: u64, access: Access) -> Explanation {
    r.smmu.explain(who(0, None), Iova(va), access)
}

fn code(e: &Explanation) -> Option<EventCode> {
    match &e.outcome {
        Outcome::Event { record, .. } => record.code(),
        _ => None,
    }
}

#[test]
fn a_translation_shows_every_word_on_the_way() {
    let r = rig();
    r.page(3, 0x12_3000 | AF | USER | 3);
    let e = explain(&r, 0x3123, Access::Write);
    assert_eq!(e.ste.map(|s| s.0), Some(Pa(TABLE)));
    assert!(e.cd.is_some() && e.l1std.is_none() && e.l1cd.is_none() && e.cd_walk.is_empty());
    let levels: Vec<i8> = e.walk.iter().map(|s| s.level).collect();
    assert_eq!(levels, [1, 2, 3]);
    assert_eq!(e.walk[0].address, TTB0);
    assert_eq!(e.rule, "STE.Config = 0b101: stage 1");
    let Outcome::Translated { walked, outgoing, .. } = e.outcome else { panic!("{e:?}") };
    assert_eq!(walked.pa, 0x12_3123);
    // The same as the port's.
    let t = r.port().translate(&who(0, None), Iova(0x3123), Access::Write).unwrap();
    assert_eq!((t.pa.get(), t.attrs), (walked.pa, outgoing));
}

#[test]
fn explanations_end_like_transactions_and_change_nothing() {
    let c = cd();
    let hd = c.with_dw0(c.dw0().with_ha(true).with_hd(true));
    let r = Rig::new(caps(), ste(SteConfig::Stage1), hd);
    let clean = 0x7000 | USER | READ_ONLY | DBM | 3;
    r.page(0, clean);
    r.page(1, 0);
    for (va, want) in [(0, None), (0x1000, Some(EventCode::Translation))] {
        let e = explain(&r, va, Access::Write);
        assert_eq!(code(&e), want);
        assert_eq!(r.memory.get(L3), clean, "no flag is written");
        assert_eq!(r.codes(), [], "nothing is recorded");
        if let Outcome::Event { record, recorded, ending, fault } = e.outcome {
            assert_eq!((recorded, ending, fault.is_some()), (Recorded::Now, Ending::Abort, true));
            assert!(r.port().write(who(0, None), Iova(va), &[0]).is_err());
            assert_eq!(r.events(), [record]);
        }
    }
}

#[test]
fn silent_ends_and_bypasses_have_their_reasons() {
    let r = rig();
    r.memory.put(TABLE, &ste(SteConfig::Abort).0);
    assert_eq!(explain(&r, 0, Access::Read).outcome, Outcome::Silent(SilentAbort::Stream));
    r.memory.put(TABLE, &ste(SteConfig::Bypass).0);
    let e = explain(&r, 0x1234, Access::Read);
    let Outcome::Bypass { reason, pa, .. } = e.outcome else { panic!("{e:?}") };
    assert_eq!((reason, pa), (BypassReason::Stream, Pa(0x1234)));
    assert_eq!(code(&explain(&r, 1 << 48, Access::Read)), Some(EventCode::AddrSize));
    r.enable(false, false);
    let e = explain(&r, 0x1234, Access::Read);
    assert!(matches!(e.outcome, Outcome::Bypass { reason: BypassReason::Disabled, .. }));
    assert!(e.ste.is_none());
    assert_eq!(explain(&r, 1 << 48, Access::Read).outcome, Outcome::Silent(SilentAbort::DisabledRange));
    let abort = Gbpa::new().with_abort(true).with_update(true).into_bits();
    r.write(offset::GBPA, abort.into(), 4);
    assert_eq!(explain(&r, 0, Access::Read).outcome, Outcome::Silent(SilentAbort::Disabled));
}

#[test]
fn what_becomes_of_the_record_is_told() {
    let told = |r: &Rig| match explain(r, 0, Access::Read).outcome {
        Outcome::Event { recorded, ending, .. } => (recorded, ending),
        other => panic!("{other:?}"),
    };
    let r = rig();
    assert_eq!(told(&r), (Recorded::Now, Ending::Abort));
    let c = cd();
    r.memory.put(crate::lookup::tests::CDS, &c.with_dw0(c.dw0().with_r(false).with_a(false)).0);
    assert_eq!(told(&r), (Recorded::Suppressed, Ending::ZeroIgnore));
    r.memory.put(crate::lookup::tests::CDS, &c.with_dw0(c.dw0().with_s(true)).0);
    assert_eq!(told(&r), (Recorded::Now, Ending::Stall));
    let Outcome::Event { record, .. } = explain(&r, 0, Access::Read).outcome else { panic!() };
    assert_eq!((record.dw1().stall(), record.dw1().stag()), (true, 0));
    r.write(offset::CR0, 1, 4);
    assert_eq!(told(&r), (Recorded::Later, Ending::Stall));
    r.memory.put(crate::lookup::tests::CDS, &c.0);
    assert_eq!(told(&r), (Recorded::Lost, Ending::Abort));
    // A queue of one entry, full.
    r.write(offset::EVENTQ_BASE, EVENTQ, 8);
    r.write(offset::CR0, 5, 4);
    assert!(r.port().read(who(0, None), Iova(0), &mut [0]).is_err());
    assert_eq!(told(&r), (Recorded::Overflow, Ending::Abort));
    // RECINVSID is 0.
    let e = r.smmu.explain(who(77, None), Iova(0), Access::Read);
    assert!(matches!(e.outcome, Outcome::Event { recorded: Recorded::Suppressed, fault: None, .. }));
    assert_eq!(e.rule, "the StreamID is not below 2^STRTAB_BASE_CFG.LOG2SIZE");
}

#[test]
fn a_nested_cd_shows_the_walk_to_it() {
    let r = Rig::new(caps(), ste(SteConfig::Nested), cd());
    let leaf = AF | 3 << 6 | 0xf << 2 | 1;
    r.memory.put(S2TABLE, &[leaf]);
    r.page(0, 0x7000 | AF | USER | 3);
    let e = explain(&r, 0, Access::Read);
    assert_eq!(e.cd_walk.len(), 1);
    assert_eq!(e.walk.iter().filter(|s| s.stage == 2).count(), 4, "three tables and the page");
    assert!(matches!(e.outcome, Outcome::Translated { .. }));
    r.memory.put(S2TABLE, &[0]);
    let e = explain(&r, 0, Access::Read);
    let Outcome::Event { fault: Some(fault), .. } = e.outcome else { panic!("{e:?}") };
    assert_eq!((fault.stage, e.walk.len(), e.cd_walk.len()), (2, 0, 1));
}

#[test]
fn random_transactions_end_as_explained() {
    use crate::lookup::tests::CDS;
    use crate::lookup::tests::fuzz::Random;
    let mut rng = Random(7);
    let mut seen = [0; 4];
    let mut c = caps();
    // Transactions without an end would be compared with nothing.
    (c.stall_model, c.stall_max) = (crate::StallModel::Terminate, 0);
    for _ in 0..3000 {
        let config = rng.pick(&[SteConfig::Bypass, SteConfig::Stage1, SteConfig::Stage1, SteConfig::Nested]);
        let e = ste(config).0.map(|w| rng.word(w));
        let hd = cd().with_dw0(cd().dw0().with_ha(true).with_hd(true));
        let r = Rig::new(c.clone(), portcullis_arch::smmuv3::Ste(e), Cd(hd.0.map(|w| rng.word(w))));
        r.memory.put(S2TABLE, &[AF | 3 << 6 | 0xf << 2 | 1]);
        let plain = 0x7000 | USER | AF | 3;
        let clean = 0x7000 | USER | READ_ONLY | DBM | 3;
        (0..4).for_each(|n| r.page(n, if n == 0 { plain } else { rng.word(clean) }));
        let near = rng.pick(&[0x10, 0x1010, 0x2010, 0x3010]);
        let va = rng.word(near);
        let access = rng.pick(&[Access::Read, Access::Write]);
        let from = who(0, rng.one_in(8).then_some(1));
        let tables = [TABLE, CDS, L3].map(|t| [0, 8, 16, 24].map(|o| r.memory.get(t + o)));
        let e = r.smmu.explain(from, Iova(va), access);
        assert_eq!(tables, [TABLE, CDS, L3].map(|t| [0, 8, 16, 24].map(|o| r.memory.get(t + o))));
        let result = r.port().translate(&from, Iova(va), access);
        let events = r.events();
        match e.outcome {
            Outcome::Bypass { pa, attrs, .. } => {
                seen[0] += 1;
                let t = result.unwrap();
                assert_eq!((t.pa, t.attrs), (pa, attrs));
                assert!(events.is_empty());
            }
            Outcome::Silent(_) => {
                seen[1] += 1;
                assert!(result.is_err() && events.is_empty());
            }
            Outcome::Translated { walked, outgoing, .. } => {
                seen[2] += 1;
                let t = result.unwrap();
                assert_eq!((t.pa, t.attrs), (Pa(walked.pa), outgoing));
                assert!(events.is_empty());
            }
            Outcome::Event { record, recorded, ending, .. } => {
                seen[3] += 1;
                let abort = ending == Ending::Abort;
                assert_eq!(result, Err(portcullis_walk::FaultOutcome::Terminate { abort }));
                let want = if recorded == Recorded::Now { vec![record] } else { vec![] };
                assert_eq!(events, want);
            }
        }
    }
    assert!(seen.iter().all(|n| *n > 30), "{seen:?}");
}
