//! STE validity: each rule of section 5.2.2 with an entry that violates only it, and its legal neighbour.

use super::*;
use crate::caps::SecureCaps;
use SteConfig::{Abort, Bypass, Nested, Stage1, Stage2};

type Change<T> = fn(T) -> T;

struct Case {
    name: &'static str,
    caps: fn(&mut Caps),
    regs: fn(&mut TableRegs),
    base: SteConfig,
    bad: Change<Ste>,
    good: Change<Ste>,
}

macro_rules! e {
    // Changes to words: e!(dw1: with_eats(1), with_x(2); dw2: with_s2s(true))
    ($($dw:ident / $set:ident: $($with:ident($v:expr)),*);*) => {
        |s: Ste| { $(let s = s.$set(s.$dw()$(.$with($v))*);)* s }
    };
}

const SAME: fn(Ste) -> Ste = |s| s;
const ALL: fn(&mut Caps) = |_| {};
const NS: fn(&mut TableRegs) = |_| {};
const SECURE: fn(&mut TableRegs) = |r| r.secure = true;

fn secure(c: &mut Caps) {
    c.secure = Some(SecureCaps { sid_bits: 4, msi: true });
}

fn case(
    name: &'static str,
    caps: fn(&mut Caps),
    base: SteConfig,
    bad: Change<Ste>,
    good: Change<Ste>,
) -> Case {
    Case { name, caps, regs: NS, base, bad, good }
}

fn cases() -> Vec<Case> {
    vec![
        case("V", ALL, Bypass, e!(dw0/with_dw0: with_v(false)), SAME),
        case("V of an abort", ALL, Abort, e!(dw0/with_dw0: with_v(false)), SAME),
        case(
            "S1P",
            |c| c.stage1 = false,
            Stage1,
            SAME,
            e!(dw0/with_dw0: with_config(6); dw2/with_dw2: with_s2aa64(true), with_s2t0sz(25), with_s2sl0(1)),
        ),
        case("S1P nested", |c| c.stage1 = false, Nested, SAME, e!(dw0/with_dw0: with_config(6))),
        case("S2P", |c| c.stage2 = false, Stage2, SAME, e!(dw0/with_dw0: with_config(4))),
        case("S2P nested", |c| c.stage2 = false, Nested, SAME, e!(dw0/with_dw0: with_config(5))),
        Case {
            name: "SEL2 stage 2",
            caps: secure,
            regs: SECURE,
            base: Stage2,
            bad: SAME,
            good: e!(dw0/with_dw0: with_config(4)),
        },
        Case {
            name: "SEL2 nested",
            caps: secure,
            regs: SECURE,
            base: Nested,
            bad: SAME,
            good: e!(dw0/with_dw0: with_config(5)),
        },
        case("STRW 1", ALL, Stage1, e!(dw1/with_dw1: with_strw(1)), e!(dw1/with_dw1: with_strw(2))),
        case("STRW 3", ALL, Stage1, e!(dw1/with_dw1: with_strw(3)), e!(dw1/with_dw1: with_strw(0))),
        Case {
            name: "secure STRW 3",
            caps: secure,
            regs: SECURE,
            base: Stage1,
            bad: e!(dw1/with_dw1: with_strw(3)),
            good: e!(dw1/with_dw1: with_strw(1)),
        },
        Case {
            name: "secure STRW 2",
            caps: secure,
            regs: SECURE,
            base: Stage1,
            bad: e!(dw1/with_dw1: with_strw(2)),
            good: SAME,
        },
        case(
            "EATS 1 stage 2 stall",
            ALL,
            Stage2,
            e!(dw1/with_dw1: with_eats(1); dw2/with_dw2: with_s2s(true)),
            e!(dw1/with_dw1: with_eats(1)),
        ),
        case(
            "EATS 1 nested stall",
            ALL,
            Nested,
            e!(dw1/with_dw1: with_eats(1); dw2/with_dw2: with_s2s(true)),
            e!(dw2/with_dw2: with_s2s(true)),
        ),
        case(
            "EATS 2 of stage 1",
            ALL,
            Stage1,
            e!(dw1/with_dw1: with_eats(2)),
            e!(dw1/with_dw1: with_eats(1)),
        ),
        case(
            "EATS 2 of stage 2",
            ALL,
            Stage2,
            e!(dw1/with_dw1: with_eats(2)),
            e!(dw0/with_dw0: with_config(7); dw1/with_dw1: with_eats(2)),
        ),
        case(
            "EATS 2 stall",
            ALL,
            Nested,
            e!(dw1/with_dw1: with_eats(2); dw2/with_dw2: with_s2s(true)),
            e!(dw1/with_dw1: with_eats(2)),
        ),
        case(
            "EATS 2 NS1ATS",
            |c| c.split_stage_ats = false,
            Nested,
            e!(dw1/with_dw1: with_eats(2)),
            e!(dw1/with_dw1: with_eats(1)),
        ),
        case("S1STALLD terminate only", |_| {}, Stage1, e!(dw1/with_dw1: with_s1stalld(true)), SAME)
            .model(|r| r.stall_model = StallModel::Terminate),
        case("S1STALLD forced", |_| {}, Stage1, e!(dw1/with_dw1: with_s1stalld(true)), SAME)
            .model(|r| r.stall_model = StallModel::Forced),
        case(
            "S1CDMax",
            |c| c.ssid_bits = 5,
            Stage1,
            e!(dw0/with_dw0: with_s1cdmax(6)),
            e!(dw0/with_dw0: with_s1cdmax(5)),
        ),
        case(
            "S1CDMax nested",
            |c| c.ssid_bits = 5,
            Nested,
            e!(dw0/with_dw0: with_s1cdmax(31)),
            e!(dw0/with_dw0: with_s1cdmax(5)),
        ),
        case(
            "S1Fmt 1",
            |c| c.cd2l = false,
            Stage1,
            e!(dw0/with_dw0: with_s1cdmax(1), with_s1fmt(1)),
            e!(dw0/with_dw0: with_s1cdmax(0), with_s1fmt(1)),
        ),
        case(
            "S1Fmt 2",
            |c| c.cd2l = false,
            Stage1,
            e!(dw0/with_dw0: with_s1cdmax(1), with_s1fmt(2)),
            e!(dw0/with_dw0: with_s1cdmax(1), with_s1fmt(3)),
        ),
        case(
            "S1ContextPtr",
            |c| c.oas_bits = 44,
            Stage1,
            e!(dw0/with_dw0: with_s1contextptr_55_6(1 << 38)),
            e!(dw0/with_dw0: with_s1contextptr_55_6(1 << 37)),
        ),
        case(
            "S2VMID",
            |c| c.vmid16 = false,
            Stage2,
            e!(dw2/with_dw2: with_s2vmid(0x100)),
            e!(dw2/with_dw2: with_s2vmid(0xff)),
        ),
        case("S2VMID nested", |c| c.vmid16 = false, Nested, e!(dw2/with_dw2: with_s2vmid(0x100)), SAME),
        case(
            "S2VMID stage 1",
            |c| c.vmid16 = false,
            Stage1,
            e!(dw2/with_dw2: with_s2vmid(0x100)),
            e!(dw1/with_dw1: with_strw(2); dw2/with_dw2: with_s2vmid(0x100)),
        ),
        case("S2S terminate only", ALL, Stage2, e!(dw2/with_dw2: with_s2s(true)), SAME)
            .model(|r| r.stall_model = StallModel::Terminate),
        case("S2S forced", ALL, Stage2, SAME, e!(dw2/with_dw2: with_s2s(true)))
            .model(|r| r.stall_model = StallModel::Forced),
        case(
            "TTF 64",
            |c| c.aarch64 = false,
            Stage2,
            SAME,
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0)),
        ),
        case(
            "TTF 32",
            |c| c.aarch32 = false,
            Stage2,
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0)),
            SAME,
        ),
        case(
            "S2FWB 32",
            ALL,
            Stage2,
            e!(dw1/with_dw1: with_s2fwb(true); dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0)),
            e!(dw1/with_dw1: with_s2fwb(true)),
        ),
        case("S2HA without HTTU", |c| c.httu = Httu::None, Stage2, e!(dw2/with_dw2: with_s2ha(true)), SAME),
        case("S2HD without HTTU", |c| c.httu = Httu::None, Stage2, e!(dw2/with_dw2: with_s2hd(true)), SAME),
        case(
            "S2HD without dirty",
            |c| c.httu = Httu::Access,
            Stage2,
            e!(dw2/with_dw2: with_s2ha(true), with_s2hd(true)),
            e!(dw2/with_dw2: with_s2ha(true)),
        ),
        case(
            "S2HA 32",
            ALL,
            Stage2,
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0), with_s2ha(true)),
            e!(dw2/with_dw2: with_s2ha(true)),
        ),
        case("S2TG reserved", ALL, Stage2, e!(dw2/with_dw2: with_s2tg(3)), SAME),
        case("S2TG 4K", |c| c.gran4k = false, Stage2, SAME, e!(dw2/with_dw2: with_s2tg(1))),
        case("S2TG 16K", |c| c.gran16k = false, Stage2, e!(dw2/with_dw2: with_s2tg(2)), SAME),
        case("S2TG 64K", |c| c.gran64k = false, Stage2, e!(dw2/with_dw2: with_s2tg(1)), SAME),
        case(
            "S2TTB above S2PS",
            ALL,
            Stage2,
            e!(dw2/with_dw2: with_s2ps(2); dw3/with_dw3: with_s2ttb_51_4(1 << 36)),
            e!(dw2/with_dw2: with_s2ps(2); dw3/with_dw3: with_s2ttb_51_4(1 << 35)),
        ),
        case(
            "S2TTB above OAS",
            |c| c.oas_bits = 40,
            Stage2,
            e!(dw3/with_dw3: with_s2ttb_51_4(1 << 36)),
            e!(dw3/with_dw3: with_s2ttb_51_4(1 << 35)),
        ),
        case(
            "S2TTB above 48 bits",
            |c| c.oas_bits = 52,
            Stage2,
            e!(dw2/with_dw2: with_s2ps(6); dw3/with_dw3: with_s2ttb_51_4(1 << 44)),
            e!(dw2/with_dw2: with_s2ps(6), with_s2tg(1); dw3/with_dw3: with_s2ttb_51_4(1 << 44)),
        ),
        case(
            "S2TTB of 32",
            ALL,
            Stage2,
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0); dw3/with_dw3: with_s2ttb_51_4(1 << 36)),
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0)),
        ),
        case(
            "S2T0SZ too small",
            |c| c.oas_bits = 44,
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(19), with_s2sl0(2)),
            e!(dw2/with_dw2: with_s2t0sz(20), with_s2sl0(2)),
        ),
        case(
            "S2T0SZ too large",
            |c| c.stt = false,
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(40), with_s2sl0(0)),
            e!(dw2/with_dw2: with_s2t0sz(39), with_s2sl0(0)),
        ),
        case(
            "S2T0SZ and S2SL0",
            ALL,
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(20)),
            e!(dw2/with_dw2: with_s2t0sz(21)),
        ),
        case(
            "S2T0SZ of DS",
            |c| (c.ds, c.oas_bits) = (true, 52),
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(2)),
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(2); dw3/with_dw3: with_s2ds(true)),
        ),
        case(
            "S2SL0_2 without DS",
            |c| (c.ds, c.oas_bits) = (true, 52),
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(0); dw3/with_dw3: with_s2sl0_2(true)),
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(0); dw3/with_dw3: with_s2ds(true), with_s2sl0_2(true)),
        ),
        case(
            "S2SL0_2 reserved",
            |c| (c.ds, c.oas_bits) = (true, 52),
            Stage2,
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(1); dw3/with_dw3: with_s2ds(true), with_s2sl0_2(true)),
            e!(dw2/with_dw2: with_s2t0sz(12), with_s2sl0(0); dw3/with_dw3: with_s2ds(true), with_s2sl0_2(true)),
        ),
        case(
            "S2T0SZ and S2SL0 of 32",
            ALL,
            Stage2,
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(2)),
            e!(dw2/with_dw2: with_s2aa64(false), with_s2t0sz(1)),
        ),
        case(
            "S2ENDI big",
            |c| c.endian = TableEndian::Little,
            Stage2,
            e!(dw2/with_dw2: with_s2endi(true)),
            SAME,
        ),
        case(
            "S2ENDI little",
            |c| c.endian = TableEndian::Big,
            Stage2,
            SAME,
            e!(dw2/with_dw2: with_s2endi(true)),
        ),
    ]
}

impl Case {
    fn model(self, regs: fn(&mut TableRegs)) -> Self {
        Self { regs, ..self }
    }
}

#[test]
fn each_rule_is_violated_alone_and_kept_by_its_neighbour() {
    for c in cases() {
        let mut s = Scene::new(Ste::default(), cd());
        (c.caps)(&mut s.caps);
        (c.regs)(&mut s.regs);
        let base = ste(c.base);
        let (bad, good) = ((c.bad)(base), (c.good)(base));
        let illegal = |e: &Ste| super::super::ste::illegal(&s.caps, &s.regs, e);
        assert!(illegal(&bad).is_some(), "{}: must be ILLEGAL", c.name);
        assert_eq!(illegal(&good), None, "{}: the neighbour must be legal", c.name);
        // And end to end.
        s.memory.put(TABLE, &bad.0);
        let from = if s.regs.secure {
            let w = who(0, None);
            w.with_attrs(w.attrs.with_non_secure(false))
        } else {
            who(0, None)
        };
        let (d, trail) = s.ask(from, 0, Access::Read);
        assert_eq!(event(&d), Some(EventCode::BadSte), "{}", c.name);
        assert!(!trail.rule.is_empty());
    }
}

#[test]
fn what_does_not_count_is_not_checked() {
    let garbage = |config: u8| {
        let mut e = Ste([u64::MAX; 8]);
        e = e.with_dw0(e.dw0().with_config(config));
        e
    };
    let s = Scene::new(Ste::default(), cd());
    let illegal = |e: Ste| super::super::ste::illegal(&s.caps, &s.regs, &e);
    for config in 0..4 {
        assert_eq!(illegal(garbage(config)), None, "Config {config}: nothing but V");
        s.memory.put(TABLE, &garbage(config).0);
        assert!(matches!(s.read(0, Some(5)), Decision::Silent(SilentAbort::Stream)));
    }
    assert_eq!(illegal(garbage(4)), None, "bypass: no field of a stage");
    // EATS 3 acts as 0 without DPT; reserved bits and fields of features that are not there do not count.
    assert_eq!(illegal(e!(dw1/with_dw1: with_eats(3); dw2/with_dw2: with_s2s(true))(ste(Stage2))), None);
    assert_eq!(
        illegal(e!(dw1/with_dw1: with_s1pie(true), with_s1mpam(true), with_impdef(0xfff))(ste(Stage1))),
        None
    );
    assert_eq!(
        illegal(e!(dw2/with_dw2: with_s2haft(true), with_s2pie(true), with_s2poe(true))(ste(Stage2))),
        None
    );
}

#[test]
fn fields_of_missing_features_are_res0() {
    let mut s = Scene::new(Ste::default(), cd());
    s.caps.hyp = false;
    s.caps.ats = false;
    s.caps.fwb = false;
    s.caps.ssid_bits = 0;
    let illegal = |s: &Scene, e: Ste| super::super::ste::illegal(&s.caps, &s.regs, &e);
    assert_eq!(illegal(&s, e!(dw1/with_dw1: with_strw(3))(ste(Stage1))), None);
    assert_eq!(illegal(&s, e!(dw1/with_dw1: with_eats(2))(ste(Stage1))), None);
    assert_eq!(illegal(&s, e!(dw0/with_dw0: with_s1cdmax(31), with_s1fmt(2))(ste(Stage1))), None);
    let fwb32 = e!(dw1/with_dw1: with_s2fwb(true); dw2/with_dw2: with_s2aa64(false), with_s2t0sz(0));
    assert_eq!(illegal(&s, fwb32(ste(Stage2))), None);
    assert!(!super::super::ste::stage2(&s.caps, &fwb32(ste(Stage2))).fwb);
}

#[test]
fn effective_eats() {
    use super::super::ste::eats;
    let s = Scene::new(Ste::default(), cd());
    let with = |config, code| {
        let e = ste(config);
        e.with_dw1(e.dw1().with_eats(code))
    };
    let got = |s: &Scene, config, code| eats(&s.caps, &s.regs, &with(config, code));
    for (config, want) in [(Bypass, [0, 0, 0, 0]), (Stage1, [0, 1, 2, 0]), (Nested, [0, 1, 2, 0])] {
        for code in 0..4 {
            assert_eq!(got(&s, config, code), want[usize::from(code)]);
        }
    }
    let mut unchecked = Scene::new(Ste::default(), cd());
    unchecked.regs.cr0 = unchecked.regs.cr0.with_atschk(false);
    assert_eq!((got(&unchecked, Nested, 1), got(&unchecked, Nested, 2)), (1, 0));
    unchecked.regs = TableRegs { secure: true, ..regs() };
    assert_eq!(got(&unchecked, Stage1, 1), 0);
}

#[test]
fn stream_worlds() {
    use super::super::ste::{World, world};
    for (config, strw, e2h, hyp, is_secure, want) in [
        (Stage1, 0, false, true, false, World::El1),
        (Stage1, 2, false, true, false, World::El2),
        (Stage1, 2, true, true, false, World::El2Host),
        (Stage1, 2, true, false, false, World::El1),
        (Nested, 2, true, true, false, World::El1),
        (Stage1, 0, false, true, true, World::El1),
        (Stage1, 1, false, true, true, World::El3),
        (Stage1, 1, false, false, true, World::El3),
    ] {
        let mut s = Scene::new(Ste::default(), cd());
        s.caps.hyp = hyp;
        s.regs.cr2 = Cr2::new().with_e2h(e2h);
        s.regs.secure = is_secure;
        let e = ste(config);
        let e = e.with_dw1(e.dw1().with_strw(strw));
        assert_eq!(world(&s.caps, &s.regs, &e), want, "{config:?} STRW {strw}");
    }
}

/// The texts of the rules in a source file.
fn rules_of(source: &str) -> std::collections::BTreeSet<&str> {
    let marked = source.split("=> \"").skip(1).chain(source.split("return Some(\"").skip(1));
    marked.filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn every_rule_decides_in_some_case() {
    let mut said = std::collections::BTreeSet::new();
    for c in cases() {
        let mut s = Scene::new(Ste::default(), cd());
        (c.caps)(&mut s.caps);
        (c.regs)(&mut s.regs);
        said.extend(super::super::ste::illegal(&s.caps, &s.regs, &(c.bad)(ste(c.base))));
    }
    let rules = rules_of(include_str!("../ste.rs"));
    assert!(rules.len() > 20);
    assert_eq!(said, rules);
    assert_eq!(super::cds::said(), rules_of(include_str!("../cd.rs")));
}
