//! CD validity: each rule of section 5.4 with a CD that violates only it, and its legal neighbour.

use super::*;
use crate::lookup::cd::illegal;
use crate::lookup::ste::World;

struct Case {
    name: &'static str,
    caps: fn(&mut Caps),
    regs: fn(&mut TableRegs),
    ste: fn(Ste) -> Ste,
    world: World,
    bad: fn(Cd) -> Cd,
    good: fn(Cd) -> Cd,
}

macro_rules! c {
    ($($dw:ident / $set:ident: $($with:ident($v:expr)),*);*) => {
        |s: Cd| { $(let s = s.$set(s.$dw()$(.$with($v))*);)* s }
    };
}

const SAME: fn(Cd) -> Cd = |c| c;
const ALL: fn(&mut Caps) = |_| {};

fn case(name: &'static str, caps: fn(&mut Caps), bad: fn(Cd) -> Cd, good: fn(Cd) -> Cd) -> Case {
    Case { name, caps, regs: |_| {}, ste: |e| e, world: World::El1, bad, good }
}

fn nested32(e: Ste) -> Ste {
    let e = e.with_dw0(e.dw0().with_config(7));
    e.with_dw2(e.dw2().with_s2aa64(false))
}

fn cases() -> Vec<Case> {
    let world = |case: Case, world| Case { world, ..case };
    vec![
        case("V", ALL, c!(dw0/with_dw0: with_v(false)), SAME),
        Case {
            ste: |e| e.with_dw1(e.dw1().with_s1stalld(true)),
            ..case("S1STALLD", ALL, c!(dw0/with_dw0: with_s(true)), SAME)
        },
        Case {
            regs: |r| r.stall_model = StallModel::Terminate,
            ..case("S with terminate only", ALL, c!(dw0/with_dw0: with_s(true)), SAME)
        },
        Case {
            regs: |r| r.stall_model = StallModel::Forced,
            ..case("S with stall forced", ALL, SAME, c!(dw0/with_dw0: with_s(true)))
        },
        case("A with TERM_MODEL", |c| c.abort_only = true, c!(dw0/with_dw0: with_a(false)), SAME),
        case(
            "ENDI big",
            |c| c.endian = TableEndian::Little,
            c!(dw0/with_dw0: with_endi(true)),
            c!(dw0/with_dw0: with_endi(true), with_epd0(true), with_epd1(true)),
        ),
        case("ENDI little", |c| c.endian = TableEndian::Big, SAME, c!(dw0/with_dw0: with_endi(true))),
        case("TTF 32", |c| c.aarch32 = false, c!(dw0/with_dw0: with_aa64(false)), SAME),
        case("TTF 64", |c| c.aarch64 = false, SAME, c!(dw0/with_dw0: with_aa64(false))),
        world(case("AA64 of EL2-E2H", ALL, c!(dw0/with_dw0: with_aa64(false)), SAME), World::El2Host),
        world(case("AA64 of EL3", ALL, c!(dw0/with_dw0: with_aa64(false)), SAME), World::El3),
        Case { ste: nested32, ..case("AA64 over 32", ALL, SAME, c!(dw0/with_dw0: with_aa64(false))) },
        case(
            "HA without HTTU",
            |c| c.httu = Httu::None,
            c!(dw0/with_dw0: with_ha(true)),
            c!(dw0/with_dw0: with_ha(true), with_aa64(false)),
        ),
        case("HD without HTTU", |c| c.httu = Httu::None, c!(dw0/with_dw0: with_hd(true)), SAME),
        case(
            "HD without dirty",
            |c| c.httu = Httu::Access,
            c!(dw0/with_dw0: with_ha(true), with_hd(true)),
            c!(dw0/with_dw0: with_ha(true)),
        ),
        case(
            "ASID",
            |c| c.asid16 = false,
            c!(dw0/with_dw0: with_asid(0x100)),
            c!(dw0/with_dw0: with_asid(0xff)),
        ),
        world(
            case("ASID of EL2-E2H", |c| c.asid16 = false, c!(dw0/with_dw0: with_asid(0x100)), SAME),
            World::El2Host,
        ),
        case("T0SZ small", ALL, c!(dw0/with_dw0: with_t0sz(15)), c!(dw0/with_dw0: with_t0sz(16))),
        case(
            "T0SZ large",
            |c| c.stt = false,
            c!(dw0/with_dw0: with_t0sz(40)),
            c!(dw0/with_dw0: with_t0sz(39)),
        ),
        case("T0SZ large with STT", ALL, c!(dw0/with_dw0: with_t0sz(49)), c!(dw0/with_dw0: with_t0sz(48))),
        case(
            "T0SZ large with STT, 64K",
            ALL,
            c!(dw0/with_dw0: with_t0sz(48), with_tg0(1)),
            c!(dw0/with_dw0: with_t0sz(47), with_tg0(1)),
        ),
        case(
            "T0SZ of 64K without VAX",
            ALL,
            c!(dw0/with_dw0: with_t0sz(12), with_tg0(1)),
            c!(dw0/with_dw0: with_t0sz(16), with_tg0(1)),
        ),
        case(
            "T0SZ of 64K with VAX",
            |c| c.va52 = true,
            c!(dw0/with_dw0: with_t0sz(11), with_tg0(1)),
            c!(dw0/with_dw0: with_t0sz(12), with_tg0(1)),
        ),
        case(
            "T0SZ of 4K with VAX",
            |c| (c.va52, c.ds) = (true, true),
            c!(dw0/with_dw0: with_t0sz(12)),
            c!(dw0/with_dw0: with_t0sz(12); dw2/with_dw2: with_ds(true)),
        ),
        case("T1SZ", ALL, c!(dw0/with_dw0: with_t1sz(0)), c!(dw0/with_dw0: with_t1sz(0), with_epd1(true))),
        world(
            case(
                "T0SZ of EL2, EPD0 does not count",
                ALL,
                c!(dw0/with_dw0: with_t0sz(0), with_epd0(true)),
                c!(dw0/with_dw0: with_epd0(true), with_t1sz(0), with_tg1(0)),
            ),
            World::El2,
        ),
        case(
            "TG0 reserved",
            ALL,
            c!(dw0/with_dw0: with_tg0(3)),
            c!(dw0/with_dw0: with_tg0(3), with_epd0(true)),
        ),
        case(
            "TG1 reserved",
            ALL,
            c!(dw0/with_dw0: with_tg1(0)),
            c!(dw0/with_dw0: with_tg1(0), with_epd1(true)),
        ),
        case(
            "TG0 4K",
            |c| c.gran4k = false,
            c!(dw0/with_dw0: with_tg0(0), with_tg1(3)),
            c!(dw0/with_dw0: with_tg0(1), with_tg1(3)),
        ),
        case("TG0 16K", |c| c.gran16k = false, c!(dw0/with_dw0: with_tg0(2)), SAME),
        case("TG1 16K", |c| c.gran16k = false, c!(dw0/with_dw0: with_tg1(1)), SAME),
        case("TG0 64K", |c| c.gran64k = false, c!(dw0/with_dw0: with_tg0(1)), SAME),
        case("TG1 64K", |c| c.gran64k = false, c!(dw0/with_dw0: with_tg1(3)), SAME),
        case(
            "TTB0 above IPS",
            ALL,
            c!(dw0/with_dw0: with_ips(1); dw1/with_dw1: with_ttb0_51_4(1 << 32)),
            c!(dw0/with_dw0: with_ips(1); dw1/with_dw1: with_ttb0_51_4(1 << 31)),
        ),
        case(
            "TTB1 above IPS",
            ALL,
            c!(dw0/with_dw0: with_ips(1); dw2/with_dw2: with_ttb1_51_4(1 << 32)),
            c!(dw0/with_dw0: with_ips(1), with_epd1(true); dw2/with_dw2: with_ttb1_51_4(1 << 32)),
        ),
        case(
            "TTB0 above OAS",
            |c| c.oas_bits = 40,
            c!(dw1/with_dw1: with_ttb0_51_4(1 << 36)),
            c!(dw1/with_dw1: with_ttb0_51_4(1 << 35)),
        ),
        case(
            "TTB0 above 48 bits",
            |c| c.oas_bits = 52,
            c!(dw0/with_dw0: with_ips(6); dw1/with_dw1: with_ttb0_51_4(1 << 44)),
            c!(dw0/with_dw0: with_ips(6), with_tg0(1); dw1/with_dw1: with_ttb0_51_4(1 << 44)),
        ),
        case(
            "TTB0 above 48 bits, DS",
            |c| (c.oas_bits, c.ds) = (52, true),
            c!(dw0/with_dw0: with_ips(6); dw1/with_dw1: with_ttb0_51_4(1 << 44)),
            c!(dw0/with_dw0: with_ips(6); dw1/with_dw1: with_ttb0_51_4(1 << 44); dw2/with_dw2: with_ds(true)),
        ),
        case(
            "TTB0 of 32",
            ALL,
            c!(dw0/with_dw0: with_aa64(false); dw1/with_dw1: with_ttb0_51_4(1 << 36)),
            c!(dw0/with_dw0: with_aa64(false), with_ips(0); dw1/with_dw1: with_ttb0_51_4(1 << 35)),
        ),
    ]
}

#[test]
fn each_rule_is_violated_alone_and_kept_by_its_neighbour() {
    for c in cases() {
        let mut s = Scene::new(Ste::default(), Cd::default());
        (c.caps)(&mut s.caps);
        (c.regs)(&mut s.regs);
        let e = (c.ste)(ste(SteConfig::Stage1));
        let check = |cd: &Cd| illegal(&s.caps, &s.regs, &e, c.world, cd);
        assert!(check(&(c.bad)(cd())).is_some(), "{}: must be ILLEGAL", c.name);
        assert_eq!(check(&(c.good)(cd())), None, "{}: the neighbour must be legal", c.name);
    }
}

#[test]
fn worlds_without_asids_and_with_one_half_check_less() {
    let mut s = Scene::new(Ste::default(), Cd::default());
    s.caps.asid16 = false;
    let e = ste(SteConfig::Stage1);
    let strange = c!(dw0/with_dw0: with_asid(0xffff), with_t1sz(63), with_tg1(0))(cd());
    for world in [World::El2, World::El3] {
        assert_eq!(illegal(&s.caps, &s.regs, &e, world, &strange), None);
        let c = super::super::cd::stage1(&s.caps, &s.regs, world, &strange);
        assert!(c.single_privilege && c.regions[1].is_none() && c.regions[0].is_some());
    }
    assert!(illegal(&s.caps, &s.regs, &e, World::El1, &strange).is_some());
    // Reserved words and fields of features that are not there.
    let mut words = cd().0;
    (words[4], words[5], words[6], words[7]) = (u64::MAX, u64::MAX, u64::MAX, u64::MAX);
    let odd = c!(dw1/with_dw1: with_haft(true), with_epan(true), with_pnch(true); dw2/with_dw2: with_pie(true), with_aie(true), with_ds(true));
    assert_eq!(illegal(&s.caps, &s.regs, &e, World::El1, &odd(Cd(words))), None);
}

#[test]
fn every_t0sz_of_every_granule() {
    for (stt, va52, ds) in
        [(false, false, false), (true, false, false), (true, true, false), (true, true, true)]
    {
        let mut s = Scene::new(Ste::default(), Cd::default());
        (s.caps.stt, s.caps.va52, s.caps.ds) = (stt, va52, ds);
        for (tg, is64k) in [(0, false), (1, true), (2, false)] {
            for tsz in 0..64u8 {
                let most = if !stt {
                    39
                } else if is64k {
                    47
                } else {
                    48
                };
                let least = if va52 && (is64k || ds) { 12 } else { 16 };
                let c = cd();
                let c = c.with_dw0(c.dw0().with_tg0(tg).with_t0sz(tsz)).with_dw2(c.dw2().with_ds(ds));
                let is = illegal(&s.caps, &s.regs, &ste(SteConfig::Stage1), World::El1, &c).is_none();
                assert_eq!(
                    is,
                    (least..=most).contains(&tsz),
                    "TG0 {tg} T0SZ {tsz} STT {stt} VAX {va52} DS {ds}"
                );
            }
        }
    }
}

/// The rules that the cases end with.
pub fn said() -> std::collections::BTreeSet<&'static str> {
    let of = |c: Case| {
        let mut s = Scene::new(Ste::default(), Cd::default());
        (c.caps)(&mut s.caps);
        (c.regs)(&mut s.regs);
        let e = (c.ste)(ste(SteConfig::Stage1));
        illegal(&s.caps, &s.regs, &e, c.world, &(c.bad)(cd()))
    };
    cases().into_iter().filter_map(of).collect()
}
