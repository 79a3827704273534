use super::*;
use crate::caps::SecureCaps;
use crate::lookup::tests::{CDS, S2TABLE, TABLE, caps, cd, ste};
use crate::rig::{AF, DBM, L3, READ_ONLY, Rig, TTB0, USER};
use portcullis_arch::smmuv3::regs::offset;
use portcullis_arch::smmuv3::{Cd, Ste, SteConfig};

const S1: u8 = 1;
const S2: u8 = 2;
const BOTH: u8 = 3;

fn addr(kind: u8, va: u64) -> GatosAddr {
    GatosAddr::new().with_kind(kind).with_rnw(true).with_addr_63_12(va >> 12)
}

/// Runs an operation through the registers.
fn run(r: &Rig, sid: GatosSid, addr: GatosAddr) -> u64 {
    r.write(offset::GATOS_SID, sid.into_bits(), 8);
    r.write(offset::GATOS_ADDR, addr.into_bits(), 8);
    r.write(offset::GATOS_CTRL, 1, 4);
    assert_eq!(r.read(offset::GATOS_CTRL, 4), 0, "RUN is clear when the result is there");
    r.read(offset::GATOS_PAR, 8)
}

fn ask(r: &Rig, kind: u8, va: u64) -> u64 {
    run(r, GatosSid::new(), addr(kind, va))
}

fn fault(code: u64, reason: u64, ipa: u64) -> u64 {
    1 | reason << 1 | code << 4 | ipa
}

fn stage1() -> Rig {
    let c = cd().with_mair(0xff);
    Rig::new(caps(), ste(SteConfig::Stage1), c)
}

const LEAF2: u64 = AF | 3 << 6 | 0xf << 2 | 1;

fn nested() -> Rig {
    let r = Rig::new(caps(), ste(SteConfig::Nested), cd().with_mair(0xff));
    r.memory.put(S2TABLE, &[LEAF2, 0x1_0000_0000 | LEAF2]);
    r
}

#[test]
fn results_show_address_size_and_attributes() {
    let r = stage1();
    r.page(0, 0x12_3000 | AF | USER | 3 << 8 | 3);
    assert_eq!(ask(&r, S1, 0), 0xff << 56 | 3 << 8 | 0x12_3000);
    // 1 GiB block, Device memory (MAIR 1 is 0): outer shareable.
    r.memory.put(TTB0 + 8, &[0x8000_0000 | 1 << 2 | AF | USER | 1]);
    assert_eq!(ask(&r, S1, 0x4000_5000), 2 << 8 | 1 << 11 | 0x8000_0000 | 1 << 29);
    let r = nested();
    r.page(0, 0x4012_3000 | AF | USER | 3 << 8 | 3);
    assert_eq!(ask(&r, S1, 0), 0xff << 56 | 3 << 8 | 0x4012_3000);
    assert_eq!(ask(&r, BOTH, 0), 0xff << 56 | 3 << 8 | 0x1_0012_3000);
    assert_eq!(ask(&r, S2, 0x4012_3000), 0xff << 56 | 1 << 11 | 0x1_0000_0000 | 1 << 29);
    assert_eq!(r.codes(), []);
}

#[test]
fn requests_that_cannot_be_are_told_from_stages_that_are_off() {
    const INV_REQ: u64 = 0xff;
    const INV_STAGE: u64 = 0xfe;
    let code = |r: &Rig, kind| ask(r, kind, 0) >> 4 & 0xff;
    let r = stage1();
    assert_eq!(ask(&r, 0, 0), fault(INV_REQ, 0, 0));
    assert_eq!((code(&r, S2), code(&r, BOTH)), (INV_STAGE, INV_STAGE));
    let with_ssid = GatosSid::new().with_ssid_valid(true);
    assert_eq!(run(&r, with_ssid, addr(S2, 0)), fault(INV_REQ, 0, 0));
    for config in [SteConfig::Abort, SteConfig::Bypass] {
        r.memory.put(TABLE, &ste(config).0);
        assert_eq!([S1, S2, BOTH].map(|k| code(&r, k)), [INV_STAGE; 3]);
    }
    let mut c = caps();
    (c.stage2, c.hyp, c.vmid16, c.vmw, c.split_stage_ats, c.xnx, c.ptwnnc, c.fwb) =
        (false, false, false, false, false, false, false, false);
    let only1 = Rig::new(c, ste(SteConfig::Stage1), cd());
    assert_eq!([S2, BOTH].map(|k| code(&only1, k)), [INV_REQ; 2]);
}

#[test]
fn configuration_errors_have_the_codes_of_their_events_and_no_events() {
    let r = stage1();
    let code = |par: u64| (par & 7, par >> 4 & 0xff);
    assert_eq!(code(run(&r, GatosSid::new().with_streamid(99), addr(S1, 0))), (1, 0x02));
    assert_eq!(code(run(&r, GatosSid::new().with_ssid_valid(true), addr(S1, 0))), (1, 0x08));
    r.memory.put(CDS, &Cd::default().0);
    assert_eq!(code(ask(&r, S1, 0)), (1, 0x0a));
    r.memory.refuse(CDS);
    assert_eq!(code(ask(&r, S1, 0)), (1, 0x09));
    let e = ste(SteConfig::Stage1);
    r.memory.put(TABLE, &e.with_dw0(e.dw0().with_s1cdmax(1)).0);
    assert_eq!(code(ask(&r, S1, 0)), (1, 0x06));
    r.memory.put(TABLE, &Ste::default().0);
    assert_eq!(code(ask(&r, S1, 0)), (1, 0x04));
    r.memory.refuse(TABLE);
    assert_eq!(code(ask(&r, S1, 0)), (1, 0x03));
    assert_eq!(r.codes(), []);
}

#[test]
fn stage_1_faults_show_no_address() {
    let r = stage1();
    r.page(1, 0x1000 | USER | 3);
    r.page(2, 0x1000 | AF | READ_ONLY | USER | 3);
    let c = cd();
    r.memory.put(CDS, &c.with_dw0(c.dw0().with_ips(3)).0);
    r.page(3, 1 << 45 | AF | USER | 3);
    assert_eq!(ask(&r, S1, 0), fault(0x10, 0, 0));
    assert_eq!(ask(&r, S1, 0x1000), fault(0x12, 0, 0));
    assert_eq!(run(&r, GatosSid::new(), addr(S1, 0x2000).with_rnw(false)), fault(0x13, 0, 0));
    assert_eq!(ask(&r, S1, 0x3000), fault(0x11, 0, 0));
    r.memory.refuse(L3);
    assert_eq!(ask(&r, S1, 0), fault(0x0b, 0, 0));
    assert_eq!(r.codes(), []);
}

#[test]
fn stage_2_faults_say_what_was_translated() {
    // The CD: a stage 1 operation hides stage 2.
    let r = nested();
    r.memory.put(S2TABLE, &[0]);
    assert_eq!(ask(&r, S1, 0), fault(0x09, 0, 0));
    assert_eq!(ask(&r, BOTH, 0), fault(0x10, 1, CDS));
    assert_eq!(ask(&r, S2, 0x5000), fault(0x10, 3, 0));
    r.memory.refuse(S2TABLE);
    assert_eq!(ask(&r, BOTH, 0), fault(0x0b, 1, 0));
    // A table.
    let r = nested();
    r.memory.put(TTB0, &[0x8000_0000 | 3]);
    assert_eq!(ask(&r, S1, 0), fault(0x0b, 0, 0));
    assert_eq!(ask(&r, BOTH, 0), fault(0x10, 2, 0x8000_0000));
    // The address.
    let r = nested();
    r.page(0, 0x8000_7000 | AF | USER | 3);
    assert_eq!(ask(&r, BOTH, 0), fault(0x10, 3, 0x8000_7000));
    assert_eq!(ask(&r, S1, 0) & 1, 0, "stage 1 alone has no fault");
    // Beyond IAS, which is stage 1's to say.
    assert_eq!(ask(&r, S2, 1 << 48), fault(0x11, 0, 0));
}

#[test]
fn privilege_and_instruction_come_from_the_operation() {
    let r = stage1();
    let e = ste(SteConfig::Stage1);
    r.memory.put(TABLE, &e.with_dw1(e.dw1().with_privcfg(3).with_instcfg(3)).0);
    r.page(0, 0x7000 | AF | 1 << 53 | 1 << 54 | 3);
    let par = |a: GatosAddr| run(&r, GatosSid::new(), a) & 1;
    assert_eq!(par(addr(S1, 0)), 1, "unprivileged, whatever PRIVCFG says");
    assert_eq!(par(addr(S1, 0).with_pnu(true)), 0, "data, whatever INSTCFG says");
    assert_eq!(par(addr(S1, 0).with_pnu(true).with_ind(true)), 1);
    assert_eq!(par(addr(S1, 0).with_pnu(true).with_ind(true).with_rnw(false)), 0, "a write is data");
}

#[test]
fn httui_leaves_the_tables_alone() {
    let c = cd();
    let c = c.with_dw0(c.dw0().with_ha(true).with_hd(true));
    let r = Rig::new(caps(), ste(SteConfig::Stage1), c);
    let clean = 0x7000 | USER | READ_ONLY | DBM | 3;
    r.page(0, clean);
    let write = addr(S1, 0).with_rnw(false);
    assert_eq!(run(&r, GatosSid::new(), write.with_httui(true)) & 1, 0);
    assert_eq!(r.memory.get(L3), clean);
    assert_eq!(run(&r, GatosSid::new(), write) & 1, 0);
    assert_eq!(r.memory.get(L3), (clean | AF) & !READ_ONLY);
}

#[test]
fn s1dss_1_gives_the_address_itself_or_stage_2() {
    let with = |config| {
        let e = ste(config);
        e.with_dw0(e.dw0().with_s1cdmax(1)).with_dw1(e.dw1().with_s1dss(1))
    };
    let r = stage1();
    r.memory.put(TABLE, &with(SteConfig::Stage1).0);
    assert_eq!(ask(&r, S1, 0x5000) & 0x00ff_ffff_ffff_f801, 0x5000);
    assert_eq!(ask(&r, S1, 1 << 48), fault(0x11, 0, 0));
    let r = nested();
    r.memory.put(TABLE, &with(SteConfig::Nested).0);
    assert_eq!(ask(&r, S1, 0x5000) & 0x00ff_ffff_ffff_f801, 0x5000);
    assert_eq!(ask(&r, BOTH, 0x4000_0000) & 0x00ff_ffff_ffff_f801, 0x1_0000_0000 | 1 << 11 | 1 << 29);
}

#[test]
fn run_needs_smmuen_and_registers_do_not_exist_without_atos() {
    let r = stage1();
    r.page(0, 0x7000 | AF | USER | 3);
    let before = ask(&r, S1, 0);
    r.enable(false, false);
    r.write(offset::GATOS_ADDR, addr(S2, 0).into_bits(), 8);
    r.write(offset::GATOS_CTRL, 1, 4);
    assert_eq!(r.read(offset::GATOS_PAR, 8), before, "nothing ran");
    let mut c = caps();
    c.atos = false;
    let r = Rig::new(c, ste(SteConfig::Stage1), cd());
    assert_eq!(ask(&r, S1, 0), 0);
}

#[test]
fn the_secure_interface_may_ask_about_both_kinds_of_streams() {
    let mut c = caps();
    c.secure = Some(SecureCaps { sid_bits: 4, msi: true });
    let r = Rig::new(c, ste(SteConfig::Stage1), cd());
    r.page(0, 0x7000 | AF | USER | 3);
    let mut regs = r.smmu.lock().regs.clone();
    let par = |regs: &Regs, ssec: bool| {
        let mut regs = regs.clone();
        regs.side[1].gatos_sid = GatosSid::new().with_ssec(ssec).into_bits();
        regs.side[1].gatos_addr = addr(S1, 0).into_bits();
        r.smmu.operation(&regs, 1)
    };
    assert_eq!(par(&regs, false) & 0x00ff_ffff_ffff_fc01, 0x7400, "the non-secure stream's, NS shown");
    // The secure stream table is empty: C_BAD_STE, or C_BAD_STREAMID beyond its size.
    regs.side[1].cr0 |= 1;
    regs.side[1].strtab_base = 0x70_0000;
    assert_eq!(par(&regs, true), fault(0x04, 0, 0));
    regs.side[0].cr0 &= !1;
    assert_eq!(par(&regs, false), fault(0xfd, 0, 0));
}
