//! SubstreamIDs, S1DSS, CD tables and their fetches through stage 2.

use super::*;
use crate::decision::BypassReason;
use crate::lookup::substream::{Choice, choose};
use portcullis_arch::smmuv3::L1Cd;
use portcullis_walk::{FaultKind, Updates};

fn with(config: SteConfig, s1cdmax: u8, s1dss: u8, s1fmt: u8) -> Ste {
    let e = ste(config);
    e.with_dw0(e.dw0().with_s1cdmax(s1cdmax).with_s1fmt(s1fmt)).with_dw1(e.dw1().with_s1dss(s1dss))
}

#[test]
fn the_whole_matrix_of_s1dss_and_substreams() {
    #[derive(Debug, PartialEq)]
    enum Want {
        Cd(u32),
        Off,
        Bad,
        Disabled,
    }
    use Want::*;
    // S1CDMax 0.
    let none: [(Option<u32>, Want); 3] = [(None, Cd(0)), (Some(0), Bad), (Some(1), Bad)];
    for (ssid, want) in &none {
        for s1dss in 0..4 {
            let is = match choose(16, &with(SteConfig::Stage1, 0, s1dss, 0), *ssid) {
                Choice::Cd(n) => Cd(n),
                Choice::NoStage1 => Off,
                Choice::Bad(_) => Bad,
                Choice::Disabled(_) => Disabled,
            };
            assert_eq!(is, *want, "S1DSS {s1dss} SSID {ssid:?}");
        }
    }
    // S1CDMax 3: eight CDs.
    for (s1dss, without, zero) in
        [(0, Disabled, Cd(0)), (1, Off, Cd(0)), (2, Cd(0), Disabled), (3, Disabled, Cd(0))]
    {
        for config in [SteConfig::Stage1, SteConfig::Nested] {
            let is = |ssid| match choose(16, &with(config, 3, s1dss, 0), ssid) {
                Choice::Cd(n) => Cd(n),
                Choice::NoStage1 => Off,
                Choice::Bad(_) => Bad,
                Choice::Disabled(_) => Disabled,
            };
            assert_eq!(is(None), without, "S1DSS {s1dss}");
            assert_eq!(is(Some(0)), zero, "S1DSS {s1dss}");
            assert_eq!((is(Some(7)), is(Some(8)), is(Some(0xf_ffff))), (Cd(7), Bad, Bad));
        }
    }
    // Stage 1 off, and no substreams at all.
    for config in [SteConfig::Bypass, SteConfig::Stage2] {
        assert_eq!(choose(16, &with(config, 3, 2, 0), None), Choice::NoStage1);
        assert!(matches!(choose(16, &with(config, 3, 2, 0), Some(1)), Choice::Bad(_)));
    }
    assert_eq!(choose(0, &with(SteConfig::Stage1, 3, 0, 0), None), Choice::Cd(0));
    assert!(matches!(choose(0, &with(SteConfig::Stage1, 3, 0, 0), Some(0)), Choice::Bad(_)));
}

#[test]
fn the_events_show_the_substream_that_the_architecture_asks_for() {
    let shown = |s: &Scene, ssid| match s.read(0, ssid) {
        Decision::Fault(f) => (f.code, f.ssid),
        other => panic!("{other:?}"),
    };
    let s = Scene::new(with(SteConfig::Stage1, 2, 2, 0), cd());
    assert_eq!(shown(&s, Some(4)), (EventCode::BadSubstreamId, Some(4)));
    assert_eq!(shown(&s, Some(0)), (EventCode::StreamDisabled, None));
    assert_eq!(shown(&s, Some(1)), (EventCode::BadCd, Some(1)));
    let two = Scene::new(with(SteConfig::Stage1, 2, 2, 1), Cd::default());
    assert_eq!(shown(&two, None), (EventCode::BadSubstreamId, Some(0)), "L1CD.V = 0 for the CD 0 of S1DSS");
    assert_eq!(shown(&two, Some(3)), (EventCode::BadSubstreamId, Some(3)));
}

#[test]
fn s1dss_1_bypasses_stage_1_without_reading_a_cd() {
    let s = Scene::new(with(SteConfig::Stage1, 2, 1, 0), cd());
    let (d, trail) = s.ask(who(0, None), 0, Access::Read);
    let Decision::Bypass { reason, limit_bits, .. } = d else { panic!("{d:?}") };
    assert_eq!((reason, limit_bits, trail.cd), (BypassReason::NoSubstream, 48, None));
    let s = Scene::new(with(SteConfig::Nested, 2, 1, 0), cd());
    let c = s.context();
    assert!(c.stages.stage1.is_none() && c.stages.stage2.is_some());
    assert!(crate::decision::FaultFlags::from_bits(c.token).flat());
}

#[test]
fn linear_and_two_level_tables_find_each_cd() {
    let l1cd = |ptr: u64| L1Cd::new().with_v(true).with_l2ptr_55_12(ptr >> 12).into_bits();
    let at = |s: &Scene, ssid| s.ask(who(0, Some(ssid)), 0, Access::Read).1;
    // Linear: aligned to the table's size, 2^10 * 64 bytes.
    let e = with(SteConfig::Stage1, 10, 0, 0);
    let e = e.with_dw0(e.dw0().with_s1contextptr_55_6((CDS + 0x40) >> 6));
    let s = Scene::new(e, Cd::default());
    assert_eq!(at(&s, 5).cd.map(|c| c.0), Some(CDS + 5 * 64));
    assert_eq!(at(&s, 1023).cd.map(|c| c.0), Some(CDS + 1023 * 64));
    // S1Fmt 3 acts as 0.
    let s = Scene::new(with(SteConfig::Stage1, 10, 0, 3), Cd::default());
    assert_eq!(at(&s, 5).cd.map(|c| c.0), Some(CDS + 5 * 64));
    for (fmt, leaf) in [(1u8, 6u32), (2, 10)] {
        let e = with(SteConfig::Stage1, 14, 0, fmt);
        // The level 1 table is aligned to its size or 64 bytes.
        let s = Scene::new(e, Cd::default());
        let l1 = CDS + 3 * 8;
        s.memory.put(l1, &[l1cd(0x77_7000)]);
        let base = if leaf == 6 { 0x77_7000 } else { 0x77_0000 };
        let ssid = 3 << leaf | 9;
        let trail = at(&s, ssid);
        assert_eq!(trail.l1cd.map(|l| l.0), Some(l1), "S1Fmt {fmt}");
        assert_eq!(trail.cd.map(|c| c.0), Some(base + 9 * 64), "S1Fmt {fmt}");
        assert_eq!(event(&s.read(0, Some(4 << leaf))), Some(EventCode::BadSubstreamId));
        // Above OAS.
        s.memory.put(l1, &[l1cd(1 << 48)]);
        assert_eq!(event(&s.read(0, Some(ssid))), Some(EventCode::BadSubstreamId));
        // With so few CDs only level 1 descriptor 0 is used.
        let s = Scene::new(with(SteConfig::Stage1, 5, 0, fmt), Cd::default());
        s.memory.put(CDS, &[l1cd(0x77_0000)]);
        assert_eq!(at(&s, 31).cd.map(|c| c.0), Some(0x77_0000 + 31 * 64));
        // Without substreams the pointer is one CD.
        let s = Scene::new(with(SteConfig::Stage1, 0, 0, fmt), cd());
        assert_eq!(s.ask(who(0, None), 0, Access::Read).1.cd.map(|c| c.0), Some(CDS));
    }
}

#[test]
fn an_aborted_cd_fetch_names_its_address_and_each_word_is_read_once() {
    let s = Scene::new(with(SteConfig::Stage1, 4, 0, 0), Cd::default());
    s.memory.put(CDS + 64, &cd().0);
    assert!(matches!(s.read(0, Some(1)), Decision::Translate(_)));
    let loads: Vec<u64> = s.memory.loads.lock().unwrap().iter().map(|l| l.0).skip(8).collect();
    assert_eq!(loads, (0..8).map(|i| CDS + 64 + 8 * i).collect::<Vec<_>>());
    s.memory.refuse(CDS + 64 + 24);
    let Decision::Fault(f) = s.read(0, Some(1)) else { panic!() };
    assert_eq!((f.code, f.ssid, f.fetch), (EventCode::CdFetch, Some(1), CDS + 64));
    let s = Scene::new(with(SteConfig::Stage1, 8, 0, 1), Cd::default());
    s.memory.refuse(CDS);
    let Decision::Fault(f) = s.read(0, Some(1)) else { panic!() };
    assert_eq!((f.code, f.fetch), (EventCode::CdFetch, CDS));
}

/// A stage 2 that maps 1 GiB at 0 to 1 GiB at 0x4000_0000, with these low and high descriptor bits.
fn nested(leaf: u64) -> Scene {
    let s = Scene::new(with(SteConfig::Nested, 0, 0, 0), Cd::default());
    s.memory.put(S2TABLE, &[0x4000_0000 | leaf | 1]);
    s.memory.put(0x4000_0000 + CDS, &cd().0);
    s
}

const AF: u64 = 1 << 10;
const READ: u64 = 1 << 6;
const WB: u64 = 0xf << 2;

#[test]
fn a_nested_cd_is_fetched_through_stage_2() {
    let s = nested(AF | READ | WB);
    let (d, trail) = s.ask(who(0, None), 0, Access::Read);
    let Decision::Translate(c) = d else { panic!("{d:?}") };
    assert!(c.stages.stage1.is_some() && c.stages.stage2.is_some());
    assert_eq!(trail.cd.map(|t| t.0), Some(0x4000_0000 + CDS));
}

#[test]
fn stage_2_faults_of_a_cd_fetch_are_told_apart() {
    let fault = |s: &Scene| match s.read(0, None) {
        Decision::Fault(f) => f,
        other => panic!("{other:?}"),
    };
    let s = nested(AF | READ | WB);
    s.memory.put(S2TABLE, &[0]);
    let f = fault(&s);
    assert_eq!((f.code, f.stage2.map(|f| (f.stage, f.ipa))), (EventCode::Translation, Some((2, CDS))));
    assert_eq!(fault(&nested(AF | WB)).code, EventCode::Permission);
    let s = nested(READ | WB);
    let e = with(SteConfig::Nested, 0, 0, 0);
    s.memory.put(TABLE, &e.with_dw2(e.dw2().with_s2affd(false).with_s2r(true)).0);
    let f = fault(&s);
    assert_eq!((f.code, f.flags.s2_record()), (EventCode::Access, true));
    s.memory.refuse(S2TABLE);
    assert_eq!((fault(&s).code, fault(&s).fetch), (EventCode::WalkEabt, S2TABLE));
    let s = nested(AF | READ | WB);
    s.memory.put(S2TABLE, &[1 << 47 | AF | READ | WB | 1]);
    let e = e.with_dw2(e.dw2().with_s2ps(2));
    s.memory.put(TABLE, &e.with_dw2(e.dw2().with_s2ps(2)).0);
    let f = fault(&s);
    assert_eq!((f.code, f.stage2.map(|f| f.kind)), (EventCode::AddrSize, Some(FaultKind::AddressSize)));
    // The pointer is beyond what stage 2 takes.
    let far = with(SteConfig::Nested, 0, 0, 0);
    s.memory.put(TABLE, &far.with_dw0(far.dw0().with_s1contextptr_55_6(1 << 40)).0);
    assert_eq!(fault(&s).code, EventCode::Translation);
}

#[test]
fn a_cd_in_device_memory_is_a_permission_fault_with_s2ptw_only() {
    let s = nested(AF | READ);
    assert!(matches!(s.read(0, None), Decision::Translate(_)));
    let attrs = s.memory.loads.lock().unwrap().last().unwrap().1;
    assert_eq!(attrs.memory(), portcullis_arch::MemoryType::NORMAL_NC, "PTWNNC");
    let e = with(SteConfig::Nested, 0, 0, 0);
    s.memory.put(TABLE, &e.with_dw2(e.dw2().with_s2ptw(true)).0);
    assert_eq!(event(&s.read(0, None)), Some(EventCode::Permission));
}

#[test]
fn a_cd_fetch_sets_the_access_flag_of_stage_2_and_never_dirty_state() {
    const DBM: u64 = 1 << 51;
    let s = nested(READ | WB | DBM);
    let e = with(SteConfig::Nested, 0, 0, 0);
    s.memory.put(TABLE, &e.with_dw2(e.dw2().with_s2ha(true).with_s2hd(true)).0);
    let before = s.memory.get(S2TABLE);
    let mut view = View::new(&s.caps, s.regs, &s.memory);
    view.updates = Updates::Pretend;
    let (d, _) = look_up(&view, &who(0, None), 0, Access::Read, &mut NoRecord);
    assert!(matches!(d, Decision::Translate(_)));
    assert_eq!(s.memory.get(S2TABLE), before, "an explanation changes nothing");
    assert!(matches!(s.read(0, None), Decision::Translate(_)));
    assert_eq!(s.memory.get(S2TABLE), before | AF);
}
