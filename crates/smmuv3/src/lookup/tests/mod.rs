//! What the tests of the look-up share: a memory of words, an SMMU that has everything, legal entries.

mod cds;
mod contexts;
pub(crate) mod fuzz;
mod layout;
mod sizes;
mod stes;
mod streams;
mod substreams;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use portcullis_arch::smmuv3::cd::CdDw0;
use portcullis_arch::smmuv3::regs::{Cr0, Cr1, Cr2, Gbpa, StrtabBaseCfg};
use portcullis_arch::smmuv3::{Cd, EventCode, Ste, SteConfig};
use portcullis_arch::{Access, Attributes, Pa, StreamId, SubstreamId};
use portcullis_bus::{BusError, Initiator, Memory};
use portcullis_walk::{Context, NoRecord};

use super::look_up;
use crate::caps::{Caps, Httu, StallModel, TableEndian};
use crate::decision::{ConfigFault, Decision, SilentAbort, TableRegs, Trail, View};

/// Sparse memory of aligned words: 0 where nothing was written, and an abort where it is told so.
#[derive(Default)]
pub struct Words {
    words: Mutex<BTreeMap<u64, u64>>,
    refused: Mutex<BTreeSet<u64>>,
    /// Loads in their order, with their attributes.
    pub loads: Mutex<Vec<(u64, Attributes)>>,
}

impl Words {
    pub fn put(&self, at: u64, words: &[u64]) {
        let mut map = self.words.lock().unwrap();
        words.iter().enumerate().for_each(|(i, w)| {
            map.insert(at + 8 * i as u64, *w);
        });
    }
    pub fn refuse(&self, at: u64) {
        self.refused.lock().unwrap().insert(at);
    }
    pub fn get(&self, at: u64) -> u64 {
        self.words.lock().unwrap().get(&at).copied().unwrap_or(0)
    }
}

impl Memory for Words {
    fn read(&self, pa: Pa, _: Attributes, buf: &mut [u8]) -> Result<(), BusError> {
        for (i, byte) in buf.iter_mut().enumerate() {
            let at = pa.get() + i as u64;
            *byte = (self.get(at & !7) >> (8 * (at & 7))) as u8;
        }
        Ok(())
    }
    fn write(&self, pa: Pa, _: Attributes, buf: &[u8]) -> Result<(), BusError> {
        for (i, byte) in buf.iter().enumerate() {
            let at = pa.get() + i as u64;
            let shift = 8 * (at & 7);
            let word = self.get(at & !7) & !(0xff << shift) | u64::from(*byte) << shift;
            self.put(at & !7, &[word]);
        }
        Ok(())
    }
    fn load64(&self, pa: Pa, attrs: Attributes) -> Result<u64, BusError> {
        assert_eq!(pa.get() % 8, 0);
        self.loads.lock().unwrap().push((pa.get(), attrs));
        if self.refused.lock().unwrap().contains(&pa.get()) {
            return Err(BusError::Decode);
        }
        Ok(self.get(pa.get()))
    }
    fn load32(&self, _: Pa, _: Attributes) -> Result<u32, BusError> {
        Err(BusError::Slave)
    }
    fn cas64(&self, pa: Pa, _: Attributes, expected: u64, new: u64) -> Result<u64, BusError> {
        let mut words = self.words.lock().unwrap();
        let word = words.entry(pa.get()).or_default();
        let held = *word;
        if held == expected {
            *word = new;
        }
        Ok(held)
    }
}

pub const TABLE: u64 = 0x10_0000;
pub const CDS: u64 = 0x20_0000;
pub const S2TABLE: u64 = 0x30_0000;

/// Everything that can be had.
pub fn caps() -> Caps {
    Caps {
        revision: 3,
        iidr: 0,
        stage1: true,
        stage2: true,
        aarch32: true,
        aarch64: true,
        coherent: true,
        httu: Httu::Dirty,
        hyp: true,
        ats: true,
        split_stage_ats: true,
        ats_record_errors: true,
        pri: true,
        pps: false,
        asid16: true,
        vmid16: true,
        vmw: true,
        msi: true,
        sev: true,
        atos: true,
        cd2l: true,
        two_level_streams: true,
        endian: TableEndian::Mixed,
        stall_model: StallModel::Both,
        abort_only: false,
        stall_max: 16,
        sid_bits: 16,
        ssid_bits: 16,
        cmdq_log2: 8,
        eventq_log2: 8,
        priq_log2: 8,
        attr_perms_override: true,
        attr_types_override: true,
        hierarchy_disable: true,
        xnx: true,
        fwb: true,
        stt: true,
        ril: true,
        bbml: 2,
        e0pd: true,
        ptwnnc: true,
        oas_bits: 48,
        gran4k: true,
        gran16k: true,
        gran64k: true,
        ds: false,
        va52: false,
        secure: None,
        tlb_entries: 64,
        ..Caps::full()
    }
}

pub fn regs() -> TableRegs {
    TableRegs {
        secure: false,
        stall_model: StallModel::Both,
        cr0: Cr0::new().with_smmuen(true).with_atschk(true),
        cr1: Cr1::from_bits(0xd75),
        cr2: Cr2::new(),
        gbpa: Gbpa::new().with_shcfg(1),
        strtab_base: TABLE,
        strtab_base_cfg: StrtabBaseCfg::new().with_log2size(4).into_bits(),
    }
}

/// Valid, and nothing else.
pub fn ste(config: SteConfig) -> Ste {
    let s = Ste::default();
    let s = s.with_dw0(s.dw0().with_v(true).with_config(config.code()).with_s1contextptr_55_6(CDS >> 6));
    let s = s.with_dw1(s.dw1().with_shcfg(1));
    if !config.stage2() {
        return s;
    }
    // 4 KiB granule, 40-bit IPA from level 1, 48-bit PA.
    let d2 =
        s.dw2().with_s2t0sz(24).with_s2sl0(1).with_s2ps(5).with_s2aa64(true).with_s2vmid(7).with_s2affd(true);
    s.with_dw2(d2).with_dw3(s.dw3().with_s2ttb_51_4(S2TABLE >> 4))
}

/// Legal: 4 KiB granule, 39-bit halves, 48-bit output.
pub fn cd() -> Cd {
    let c = Cd::default();
    let d0 = CdDw0::new()
        .with_v(true)
        .with_aa64(true)
        .with_a(true)
        .with_r(true)
        .with_t0sz(25)
        .with_t1sz(25)
        .with_tg1(2)
        .with_ips(5)
        .with_asid(9);
    let c = c.with_dw0(d0);
    c.with_dw1(c.dw1().with_ttb0_51_4(0x40_0000 >> 4)).with_dw2(c.dw2().with_ttb1_51_4(0x50_0000 >> 4))
}

/// A scene: an SMMU, its registers and its memory.
pub struct Scene {
    pub caps: Caps,
    pub regs: TableRegs,
    pub memory: Words,
}

impl Scene {
    /// With this STE for stream 0 and this CD as the only one.
    pub fn new(ste: Ste, cd: Cd) -> Self {
        let memory = Words::default();
        memory.put(TABLE, &ste.0);
        memory.put(CDS, &cd.0);
        Self { caps: caps(), regs: regs(), memory }
    }

    pub fn ask(&self, from: Initiator, va: u64, access: Access) -> (Decision, Trail) {
        let view = View::new(&self.caps, self.regs, &self.memory);
        look_up(&view, &from, va, access, &mut NoRecord)
    }

    pub fn read(&self, sid: u32, ssid: Option<u32>) -> Decision {
        self.ask(who(sid, ssid), 0x1000, Access::Read).0
    }

    pub fn context(&self) -> Context {
        match self.read(0, None) {
            Decision::Translate(c) => *c,
            other => panic!("{other:?}"),
        }
    }
}

pub fn who(sid: u32, ssid: Option<u32>) -> Initiator {
    Initiator { substream: ssid.map(SubstreamId), ..Initiator::new(StreamId(sid)) }
}

/// The event of a decision.
pub fn event(d: &Decision) -> Option<EventCode> {
    match d {
        Decision::Fault(ConfigFault { code, .. }) => Some(*code),
        _ => None,
    }
}

#[test]
fn with_smmuen_0_gbpa_decides_and_nothing_is_fetched() {
    let mut s = Scene::new(Ste::default(), Cd::default());
    s.regs.cr0 = Cr0::new();
    s.regs.gbpa = Gbpa::new().with_shcfg(3).with_mtcfg(true).with_memattr(0xf).with_privcfg(3);
    let Decision::Bypass { attrs, limit_bits, .. } = s.read(99, Some(3)) else { panic!() };
    assert_eq!(limit_bits, 48);
    assert!(attrs.privileged() && attrs.shareability() == portcullis_arch::Shareability::Inner);
    let above = s.ask(who(0, None), 1 << 48, Access::Read).0;
    assert!(matches!(above, Decision::Silent(SilentAbort::DisabledRange)));
    s.regs.gbpa = s.regs.gbpa.with_abort(true);
    assert!(matches!(s.read(0, None), Decision::Silent(SilentAbort::Disabled)));
    assert!(s.memory.loads.lock().unwrap().is_empty());
}
