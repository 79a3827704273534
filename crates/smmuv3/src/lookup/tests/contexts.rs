//! What a legal configuration becomes: tags, attributes, flags and the parameters of the walk.

use super::*;
use crate::caps::SecureCaps;
use crate::decision::FaultFlags;
use crate::lookup::attrs::Overrides;
use portcullis_arch::attrs::Allocate;
use portcullis_arch::smmuv3::ste::SteDw1;
use portcullis_arch::{MemoryType, Shareability};
use portcullis_walk::{AddressFormat, FlagUpdate, Regime, Split, TableFormat, TlbStage};

fn stage1(change_ste: fn(Ste) -> Ste, change_cd: fn(Cd) -> Cd) -> Scene {
    Scene::new(change_ste(ste(SteConfig::Stage1)), change_cd(cd()))
}

#[test]
fn tlb_tags_follow_the_stream_world() {
    let vmid = |e: Ste| e.with_dw2(e.dw2().with_s2vmid(0x55));
    let tags = |s: &Scene| {
        let k = s.context().key;
        (k.regime, k.stage, k.vmid, k.asid)
    };
    let s = stage1(vmid, |c| c);
    assert_eq!(tags(&s), (Regime::Guest, TlbStage::Stage1, 0x55, 9));
    let mut no_s2 = stage1(vmid, |c| c);
    no_s2.caps.stage2 = false;
    assert_eq!(tags(&no_s2), (Regime::Guest, TlbStage::Stage1, 0, 9));
    let mut el2 = stage1(|e| e.with_dw1(e.dw1().with_strw(2)).with_dw2(e.dw2().with_s2vmid(3)), |c| c);
    assert_eq!(tags(&el2), (Regime::Hyp, TlbStage::Stage1, 0, 0));
    el2.regs.cr2 = Cr2::new().with_e2h(true);
    assert_eq!(tags(&el2), (Regime::HypHost, TlbStage::Stage1, 0, 9));
    let s2 = Scene::new(ste(SteConfig::Stage2), Cd::default());
    assert_eq!(tags(&s2), (Regime::Guest, TlbStage::Stage2, 7, 0));
    assert_eq!(s2.context().stages.flat.output_bits, 48);
    let nested = Scene::new(ste(SteConfig::Nested), Cd::default());
    nested.memory.put(S2TABLE, &[0x4000_0000 | 1 << 10 | 3 << 6 | 0xf << 2 | 1]);
    nested.memory.put(0x4000_0000 + CDS, &cd().0);
    assert_eq!(tags(&nested), (Regime::Guest, TlbStage::Combined, 7, 9));
}

#[test]
fn fault_flags_come_from_cd_and_ste() {
    let s = Scene::new(
        {
            let e = ste(SteConfig::Stage1);
            e.with_dw1(e.dw1().with_mev(true))
        },
        {
            let c = cd();
            c.with_dw0(c.dw0().with_s(true).with_a(false))
        },
    );
    let f = FaultFlags::from_bits(s.context().token);
    assert_eq!(
        (f.s1_abort(), f.s1_record(), f.s1_stall(), f.merge(), f.flat()),
        (false, true, true, true, false)
    );
    let e = ste(SteConfig::Stage2);
    let s = Scene::new(e.with_dw2(e.dw2().with_s2r(true).with_s2s(true)), Cd::default());
    let f = FaultFlags::from_bits(s.context().token);
    assert_eq!((f.s2_record(), f.s2_stall(), f.flat()), (true, true, true));
}

#[test]
fn the_top_byte_is_dropped_only_where_every_address_ignores_it() {
    let mask = |change: fn(Cd) -> Cd| {
        let c = stage1(|e| e, change).context();
        (c.va_mask, c.key.va_bits)
    };
    assert_eq!(mask(|c| c), (u64::MAX, 64));
    assert_eq!(mask(|c| c.with_dw0(c.dw0().with_tbi0(true))), (u64::MAX, 64));
    assert_eq!(mask(|c| c.with_dw0(c.dw0().with_tbi0(true).with_tbi1(true))), ((1 << 56) - 1, 56));
    let el2 = stage1(|e| e.with_dw1(e.dw1().with_strw(2)), |c| c.with_dw0(c.dw0().with_tbi0(true)));
    assert_eq!(el2.context().va_mask, (1 << 56) - 1);
    let Some(s1) = el2.context().stages.stage1 else { panic!() };
    assert_eq!(s1.split, Split::Smmuv3 { region_bits: [39, 48], tbi: [true, false], single: true });
}

#[test]
fn stage_1_parameters() {
    let c = {
        let c = cd();
        let d0 = c.dw0().with_wxn(true).with_uwxn(true).with_affd(true).with_pan(true).with_epd1(true);
        let d0 = d0.with_ir0(1).with_or0(1).with_sh0(3).with_ha(true).with_hd(true).with_ips(2);
        c.with_dw0(d0).with_dw1(c.dw1().with_had0(true).with_e0pd0(true)).with_mair(0xff44)
    };
    let mut s = Scene::new(ste(SteConfig::Stage1), c);
    let s1 = s.context().stages.stage1.unwrap();
    assert_eq!((s1.format, s1.output_bits, s1.mair), (TableFormat::Aarch64, 40, 0xff44));
    assert!(s1.wxn && !s1.uwxn && s1.pan && s1.e0pd[0] && !s1.e0pd[1]);
    assert!(!s1.affd, "AFFD is ignored with HA");
    assert_eq!(s1.flags, FlagUpdate { access: true, dirty: true });
    let region = s1.regions[0].unwrap();
    assert!(s1.regions[1].is_none() && region.flat_attributes);
    assert_eq!((region.base, region.start_level, region.input_bits), (0x40_0000, 1, 39));
    assert_eq!(region.walk_attrs.memory(), MemoryType::NORMAL_WB);
    assert_eq!(region.walk_attrs.shareability(), Shareability::Inner);
    (s.caps.hierarchy_disable, s.caps.e0pd) = (false, false);
    let s1 = s.context().stages.stage1.unwrap();
    assert!(!s1.regions[0].unwrap().flat_attributes && !s1.e0pd[0]);
    // HD without HA acts as neither.
    s.memory.put(CDS, &c.with_dw0(c.dw0().with_ha(false)).0);
    let s1 = s.context().stages.stage1.unwrap();
    assert!(s1.flags == FlagUpdate::OFF && s1.affd);
    // EL2: one privilege, no PAN.
    let e = ste(SteConfig::Stage1);
    s.memory.put(TABLE, &e.with_dw1(e.dw1().with_strw(2)).0);
    let s1 = s.context().stages.stage1.unwrap();
    assert!(s1.single_privilege && !s1.pan);
}

#[test]
fn a_52_bit_configuration() {
    let mut s = stage1(
        |e| e,
        |c| {
            let d0 = c.dw0().with_ips(6).with_t0sz(12).with_tg1(3).with_sh0(2).with_sh1(3);
            c.with_dw0(d0).with_dw2(c.dw2().with_ds(true))
        },
    );
    (s.caps.oas_bits, s.caps.ds, s.caps.va52) = (52, true, true);
    let s1 = s.context().stages.stage1.unwrap();
    let [low, high] = s1.regions.map(|r| r.unwrap());
    assert_eq!((low.address, low.start_level, low.input_bits), (AddressFormat::Ds, -1, 52));
    assert_eq!((high.address, high.start_level), (AddressFormat::Lpa64K, 2));
    assert_eq!(s1.sh_override, [Some(Shareability::Outer), None]);
    assert_eq!(s1.output_bits, 52);
}

#[test]
fn vmsav8_32_ranges() {
    let s =
        stage1(|e| e, |c| c.with_dw0(c.dw0().with_aa64(false).with_t0sz(0o12).with_t1sz(1).with_uwxn(true)));
    let s1 = s.context().stages.stage1.unwrap();
    assert_eq!((s1.format, s1.output_bits), (TableFormat::Long, 40));
    assert_eq!(s1.split, Split::Long { tsz: [2, 1] });
    let [low, high] = s1.regions.map(|r| r.unwrap());
    assert_eq!((low.start_level, low.input_bits, high.start_level, high.input_bits), (2, 30, 1, 31));
    assert!(s1.uwxn);
}

#[test]
fn stage_2_parameters() {
    let e = ste(SteConfig::Nested);
    let d2 = e.dw2().with_s2ha(true).with_s2hd(true).with_s2ptw(true).with_s2ps(3).with_s2endi(true);
    let e = e.with_dw2(d2).with_dw1(e.dw1().with_s2fwb(true));
    let s2 = super::super::ste::stage2(&caps(), &e);
    assert!(s2.protect_walks && s2.big_endian && s2.fwb && s2.xnx && !s2.affd && !s2.leaf_hints);
    assert_eq!((s2.output_bits, s2.flags), (42, FlagUpdate { access: true, dirty: true }));
    let region = s2.region.unwrap();
    assert_eq!((region.base, region.start_level, region.input_bits), (S2TABLE, 1, 40));
    // S2PTW counts only with both stages.
    let alone = e.with_dw0(e.dw0().with_config(6));
    assert!(!super::super::ste::stage2(&caps(), &alone).protect_walks);
    let mut none = caps();
    (none.fwb, none.xnx) = (false, false);
    let s2 = super::super::ste::stage2(&none, &e);
    assert!(!s2.fwb && !s2.xnx);
}

#[test]
fn overrides_replace_what_came_in() {
    let none = SteDw1::new().with_shcfg(1);
    let wb = Attributes::DEVICE_DEFAULT;
    let apply = |c: &Caps, secure, d: SteDw1, a| Overrides::of_ste(c, secure, d).apply(a);
    let all = caps();
    assert_eq!(apply(&all, false, none, wb), wb);
    for (code, want) in [
        (0, MemoryType::DEVICE_NGNRNE),
        (4, MemoryType::DEVICE_NGNRNE),
        (5, MemoryType::NORMAL_NC),
        (8, MemoryType::DEVICE_NGNRNE),
        (12, MemoryType::DEVICE_NGNRNE),
        (15, MemoryType::NORMAL_WB),
    ] {
        let got = apply(&all, false, none.with_mtcfg(true).with_memattr(code), wb);
        assert_eq!(got.memory(), want);
        assert_eq!(got.shareability(), if code == 15 { Shareability::Non } else { Shareability::Outer });
    }
    for (code, want) in
        [(0, Shareability::Non), (1, Shareability::Inner), (2, Shareability::Outer), (3, Shareability::Inner)]
    {
        let inner = wb.with_shareability(Shareability::Inner);
        assert_eq!(apply(&all, false, none.with_shcfg(code), inner).shareability(), want);
        let device = inner.with_memory(MemoryType::DEVICE_NGNRE);
        assert_eq!(apply(&all, false, none.with_shcfg(code), device).shareability(), Shareability::Outer);
    }
    for (code, privileged) in [(0, true), (1, true), (2, false), (3, true)] {
        let a = wb.with_privileged(true);
        assert_eq!(apply(&all, false, none.with_privcfg(code), a).privileged(), privileged);
        assert_eq!(
            apply(&all, false, none.with_instcfg(code), a.with_instruction(true)).instruction(),
            privileged
        );
    }
    let hints = apply(&all, false, none.with_alloccfg(0b1101), wb);
    assert_eq!(
        (hints.read_allocate(), hints.write_allocate(), hints.transient()),
        (Allocate::Yes, Allocate::No, 3)
    );
    assert_eq!(apply(&all, false, none.with_alloccfg(0b0111), wb), wb);
    let device = wb.with_memory(MemoryType::DEVICE_GRE);
    let became_wb = apply(&all, false, none.with_mtcfg(true).with_memattr(15), device);
    assert_eq!((became_wb.read_allocate(), became_wb.write_allocate()), (Allocate::Yes, Allocate::Yes));
    // NSCFG is for secure streams.
    let s = wb.with_non_secure(false);
    for (code, ns) in [(0, false), (1, false), (2, false), (3, true)] {
        assert_eq!(apply(&all, true, none.with_nscfg(code), s).non_secure(), ns);
        assert!(apply(&all, false, none.with_nscfg(code), wb).non_secure());
    }
    let everything = SteDw1::from_bits(u64::MAX);
    let mut without = caps();
    (without.attr_types_override, without.attr_perms_override) = (false, false);
    assert_eq!(apply(&without, true, everything, wb), wb);
}

#[test]
fn overrides_of_the_stream_reach_the_transaction() {
    let over = |e: Ste| {
        let d1 = e.dw1().with_privcfg(3).with_instcfg(3).with_mtcfg(true).with_memattr(1);
        e.with_dw1(d1)
    };
    let s = Scene::new(over(ste(SteConfig::Bypass)), cd());
    let Decision::Bypass { attrs, .. } = s.read(0, None) else { panic!() };
    assert!(attrs.privileged() && attrs.instruction() && attrs.memory() == MemoryType::DEVICE_NGNRE);
    // With stage 1 the type comes from the tables; what came in says whether its allocation hints count.
    let s = Scene::new(over(ste(SteConfig::Stage1)), cd());
    let c = s.context();
    assert!(c.incoming.privileged() && c.incoming.instruction());
    assert_eq!(c.incoming.memory(), MemoryType::DEVICE_NGNRE);
    // An address translation operation says itself what it is.
    let mut view = View::new(&s.caps, s.regs, &s.memory);
    view.overrides = false;
    let (d, _) = look_up(&view, &who(0, None), 0, Access::Read, &mut NoRecord);
    let Decision::Translate(c) = d else { panic!() };
    assert!(!c.incoming.privileged() && !c.incoming.instruction());
    // Stage 2 alone takes all of them.
    let s = Scene::new(over(ste(SteConfig::Stage2)), cd());
    assert_eq!(s.context().incoming.memory(), MemoryType::DEVICE_NGNRE);
}

fn secure_scene(e: Ste, c: Cd) -> Scene {
    let mut s = Scene::new(e, c);
    s.caps.secure = Some(SecureCaps { sid_bits: 4, msi: true });
    s.regs.secure = true;
    s
}

fn secure_who() -> Initiator {
    let w = who(0, None);
    w.with_attrs(w.attrs.with_non_secure(false))
}

#[test]
fn secure_streams_walk_secure_unless_nscfg_says_otherwise() {
    let c = cd();
    let c = c.with_dw1(c.dw1().with_nscfg0(true));
    let s = secure_scene(ste(SteConfig::Stage1), c);
    let Decision::Translate(c) = s.ask(secure_who(), 0, Access::Read).0 else { panic!() };
    assert!(c.key.secure && !c.incoming.non_secure() && c.key.vmid == 0);
    let s1 = c.stages.stage1.unwrap();
    assert!(s1.secure && !s1.secure_fetch_only);
    let ns = s1.regions.map(|r| r.unwrap().walk_attrs.non_secure());
    assert_eq!(ns, [true, false]);
    assert!(s.memory.loads.lock().unwrap().iter().all(|l| !l.1.non_secure()));
    // S_IDR1.S_SIDSIZE counts, not IDR1.SIDSIZE.
    let mut s = s;
    s.regs.strtab_base_cfg = StrtabBaseCfg::new().with_log2size(6).into_bits();
    let w = secure_who();
    let far = Initiator { stream: StreamId(16), ..w };
    assert_eq!(event(&s.ask(far, 0, Access::Read).0), Some(EventCode::BadStreamId));
}

#[test]
fn sif_refuses_fetches_that_leave_a_bypassed_stage_1_non_secure() {
    let e = ste(SteConfig::Bypass);
    let e = e.with_dw1(e.dw1().with_nscfg(3).with_instcfg(3));
    let mut s = secure_scene(e, cd());
    assert!(matches!(s.ask(secure_who(), 0, Access::Read).0, Decision::Bypass { .. }));
    s.regs.cr0 = s.regs.cr0.with_sif(true);
    let (d, trail) = s.ask(secure_who(), 0, Access::Read);
    assert!(trail.only_this && event(&d) == Some(EventCode::Permission));
    let (d, trail) = s.ask(secure_who(), 0, Access::Write);
    assert!(trail.only_this && matches!(d, Decision::Bypass { .. }));
    let c = secure_scene(ste(SteConfig::Stage1), cd());
    let c = Scene { regs: s.regs, ..c };
    let Decision::Translate(c) = c.ask(secure_who(), 0, Access::Read).0 else { panic!() };
    assert!(c.stages.stage1.unwrap().secure_fetch_only);
}

#[test]
fn a_bypass_takes_oas_and_a_skipped_stage_1_takes_ias() {
    let mut s = Scene::new(ste(SteConfig::Bypass), cd());
    s.caps.oas_bits = 36;
    let limit = |s: &Scene| match s.read(0, None) {
        Decision::Bypass { limit_bits, .. } => limit_bits,
        other => panic!("{other:?}"),
    };
    assert_eq!(limit(&s), 36);
    let e = ste(SteConfig::Stage1);
    s.memory.put(TABLE, &e.with_dw0(e.dw0().with_s1cdmax(2)).with_dw1(e.dw1().with_s1dss(1)).0);
    assert_eq!(limit(&s), 40, "IAS is at least 40 bits with VMSAv8-32");
    s.caps.aarch32 = false;
    assert_eq!(limit(&s), 36);
}
