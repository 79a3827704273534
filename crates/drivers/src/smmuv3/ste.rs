//! Stream table entries: what a domain puts into the entry of a stream.

use portcullis_arch::Pa;
use portcullis_arch::smmuv3::ste::{SteDw0, SteDw1, SteDw2, SteDw3};
use portcullis_arch::smmuv3::{Ste, SteConfig};
use portcullis_pgtable::Stage2Registers;

use super::domain::Tables;
use super::entry::S1DSS_BYPASS;
use super::flush::Tag;
use super::strtab::abort_ste;
use super::{Domain, Error, Platform, Shared, StallModel};
use crate::ops::{DomainKind, StreamOverrides};

/// STE.S1DSS for transactions without a substream: refused.
const S1DSS_TERMINATE: u8 = 0;
/// Context descriptor 0.
const S1DSS_CD0: u8 = 2;
/// STE.SHCFG: as incoming.
const SHCFG_INCOMING: u8 = 1;
/// STE.STRW for EL2.
const STRW_EL2: u8 = 2;
/// STE.EATS: translation requests are answered, translated accesses pass.
const EATS_FULL: u8 = 1;

/// The part of a guest's stream table entry that the guest decides about: how stage 1 is configured, if at all. All
/// addresses in it are IPAs (Linux `iommu_hwpt_arm_smmuv3`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestSte {
    /// Word 0: V, Config (abort, bypass or stage 1), S1Fmt, S1ContextPtr, S1CDMax.
    pub dw0: u64,
    /// Word 1: S1DSS, S1CIR, S1COR, S1CSH, S1STALLD, EATS.
    pub dw1: u64,
}

impl GuestSte {
    const DW0: u64 = SteDw0::new()
        .with_v(true)
        .with_config(7)
        .with_s1fmt(3)
        .with_s1contextptr_55_6((1 << 50) - 1)
        .with_s1cdmax(0x1f)
        .into_bits();
    const DW1: u64 = SteDw1::new()
        .with_s1dss(3)
        .with_s1cir(3)
        .with_s1cor(3)
        .with_s1csh(3)
        .with_s1stalld(true)
        .with_eats(3)
        .into_bits();

    /// Refuses what a guest may not say.
    pub(super) fn check(&self, substream_bits: u8) -> Result<(), Error> {
        for (word, bits) in [(0, self.dw0 & !Self::DW0), (1, self.dw1 & !Self::DW1)] {
            if bits != 0 {
                return Err(Error::GuestEntry { word, bits });
            }
        }
        let dw0 = SteDw0::from_bits(self.dw0);
        if dw0.v() && SteConfig::from_code(dw0.config()).stage2() {
            return Err(Error::GuestEntry { word: 0, bits: SteDw0::new().with_config(2).into_bits() });
        }
        if dw0.v() && dw0.s1cdmax() > substream_bits {
            return Err(Error::GuestEntry {
                word: 0,
                bits: SteDw0::new().with_s1cdmax(dw0.s1cdmax()).into_bits(),
            });
        }
        Ok(())
    }

    fn config(&self) -> SteConfig {
        let dw0 = SteDw0::from_bits(self.dw0);
        if dw0.v() { SteConfig::from_code(dw0.config()) } else { SteConfig::Abort }
    }
}

/// What the driver makes for a stream's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CdPointer {
    pub at: Pa,
    pub format: u8,
    pub bits: u8,
}

/// The facts about a stream that its entry depends on.
#[derive(Clone, Copy, Debug)]
pub struct StreamFacts {
    pub can_stall: bool,
    pub ats: bool,
    pub overrides: StreamOverrides,
}

impl<P: Platform> Domain<P> {
    /// The stream table entry for a stream whose transactions meet this domain.
    pub(super) fn ste(&self, stream: StreamFacts, cds: Option<CdPointer>) -> Ste {
        let builder = SteBuilder { shared: &*self.shared, stream };
        match (self.kind(), &self.guest, &self.parent) {
            (DomainKind::Blocked, ..) => abort_ste(),
            (DomainKind::Identity, ..) => builder.bypass(),
            (_, Some(guest), Some(parent)) => match guest.config() {
                SteConfig::Abort => abort_ste(),
                SteConfig::Stage1 => {
                    let asked = SteDw1::from_bits(guest.dw1);
                    let ste = parent.add_stage2(builder.stage1(None, S1DSS_CD0), stream);
                    let dw0 = guest.dw0 | ste.dw0().into_bits();
                    let dw1 = ste.dw1();
                    let dw1 = dw1
                        .with_s1dss(asked.s1dss())
                        .with_s1cir(asked.s1cir())
                        .with_s1cor(asked.s1cor())
                        .with_s1csh(asked.s1csh())
                        .with_s1stalld(dw1.s1stalld() || asked.s1stalld() && builder.stalls_are_chosen())
                        .with_eats(if asked.eats() == EATS_FULL { dw1.eats() } else { 0 });
                    let dw0 = SteDw0::from_bits(dw0).with_config(SteConfig::Nested.code());
                    ste.with_dw0(dw0).with_dw1(dw1)
                }
                _ => parent.add_stage2(builder.passing(SteConfig::Stage2), stream),
            },
            (_, _, Some(parent)) => parent.add_stage2(builder.stage1(cds, S1DSS_CD0), stream),
            (DomainKind::Stage2, ..) => self.add_stage2(builder.passing(SteConfig::Stage2), stream),
            _ => builder.stage1(cds, S1DSS_CD0),
        }
    }

    /// Adds this domain's stage 2 to an entry.
    fn add_stage2(&self, ste: Ste, stream: StreamFacts) -> Ste {
        let (Tables::Stage2(table), Some(Tag::Stage2(vmid))) = (&self.tables, self.tag) else {
            return abort_ste();
        };
        let r: Stage2Registers = table.registers();
        let forced = self.shared.features.stall_model == StallModel::Stall;
        let stall = forced || stream.can_stall && self.fault_model.stall;
        let config = if ste.config().stage1() { SteConfig::Nested } else { SteConfig::Stage2 };
        let dw1 = ste.dw1().with_shcfg(SHCFG_INCOMING).with_strw(0);
        let dw1 = if stall { dw1.with_eats(0) } else { dw1 };
        let dw2 = SteDw2::new()
            .with_s2vmid(vmid.get())
            .with_s2t0sz(r.t0sz)
            .with_s2sl0(r.sl0)
            .with_s2ir0(r.irgn)
            .with_s2or0(r.orgn)
            .with_s2sh0(r.sh)
            .with_s2tg(r.tg)
            .with_s2ps(r.ps)
            .with_s2aa64(true)
            .with_s2ptw(true)
            .with_s2s(stall)
            .with_s2r(true);
        ste.with_dw0(ste.dw0().with_config(config.code()))
            .with_dw1(dw1)
            .with_dw2(dw2)
            .with_dw3(SteDw3::new().with_s2ttb_51_4(r.vttbr.get() >> 4))
    }

    /// The entry of a stream that bypasses.
    pub(super) fn bypass(shared: &Shared<P>, stream: StreamFacts) -> Ste {
        SteBuilder { shared, stream }.bypass()
    }

    /// The entry with other overrides.
    pub(super) fn override_ste(ste: Ste, overrides: StreamOverrides) -> Ste {
        ste.with_dw1(apply_overrides(ste.dw1(), overrides))
    }

    /// The entry that leaves only the substreams of a stream their context descriptors.
    pub(super) fn substreams_only(
        shared: &Shared<P>,
        stream: StreamFacts,
        cds: CdPointer,
        main: DomainKind,
    ) -> Ste {
        let s1dss = if main == DomainKind::Identity { S1DSS_BYPASS } else { S1DSS_TERMINATE };
        SteBuilder { shared, stream }.stage1(Some(cds), s1dss)
    }
}

/// PRIVCFG and INSTCFG.
fn apply_overrides(dw1: SteDw1, overrides: StreamOverrides) -> SteDw1 {
    let code = |choice: Option<bool>| match choice {
        None => 0,
        Some(false) => 2,
        Some(true) => 3,
    };
    dw1.with_privcfg(code(overrides.privileged)).with_instcfg(code(overrides.instruction))
}

/// Entries for streams.
struct SteBuilder<'a, P: Platform> {
    shared: &'a Shared<P>,
    stream: StreamFacts,
}

impl<P: Platform> SteBuilder<'_, P> {
    /// Stalls happen where software allows them.
    fn stalls_are_chosen(&self) -> bool {
        self.shared.features.stall_model == StallModel::StallOrTerminate
    }

    /// What all entries have that do not abort.
    fn passing(&self, config: SteConfig) -> Ste {
        let mut dw1 = SteDw1::new();
        if self.shared.features.override_permissions {
            dw1 = apply_overrides(dw1, self.stream.overrides);
        }
        if self.stream.ats && config != SteConfig::Bypass {
            dw1 = dw1.with_eats(EATS_FULL);
        }
        Ste::default().with_dw0(SteDw0::new().with_v(true).with_config(config.code())).with_dw1(dw1)
    }

    fn bypass(&self) -> Ste {
        let ste = self.passing(SteConfig::Bypass);
        let types = self.shared.features.override_types;
        ste.with_dw1(ste.dw1().with_shcfg(if types { SHCFG_INCOMING } else { 0 }))
    }

    /// Stage 1; `cds` is `None` where a guest says where its descriptors are.
    fn stage1(&self, cds: Option<CdPointer>, s1dss: u8) -> Ste {
        let ste = self.passing(SteConfig::Stage1);
        let mut dw0 = ste.dw0();
        if let Some(cds) = cds {
            dw0 = dw0.with_s1fmt(cds.format).with_s1contextptr_55_6(cds.at.get() >> 6).with_s1cdmax(cds.bits);
        }
        let mut dw1 = ste
            .dw1()
            .with_s1dss(s1dss)
            .with_s1cir(1)
            .with_s1cor(1)
            .with_s1csh(3)
            .with_s1stalld(self.stalls_are_chosen() && !self.stream.can_stall);
        if self.shared.el2() {
            dw1 = dw1.with_strw(STRW_EL2);
        }
        if s1dss == S1DSS_BYPASS {
            dw1 = dw1.with_shcfg(SHCFG_INCOMING);
        }
        ste.with_dw0(dw0).with_dw1(dw1)
    }
}
