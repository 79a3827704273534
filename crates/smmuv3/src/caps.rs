//! What a particular SMMU is: features, sizes and options, frozen into its identification registers.

use portcullis_arch::smmuv3::regs::{ADDRESS_BITS, Idr0, Idr1, Idr3, Idr5, SIdr0, SIdr1};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Hardware flag update (IDR0.HTTU).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Httu {
    /// None.
    None,
    /// Access flag.
    Access,
    /// Access flag and dirty state.
    Dirty,
}

/// Stall model (IDR0.STALL_MODEL).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StallModel {
    /// Stall and terminate.
    Both,
    /// Terminate only.
    Terminate,
    /// Stall forced.
    Forced,
}

/// Endianness of translation tables (IDR0.TTENDIAN).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableEndian {
    /// Either.
    Mixed,
    /// Little only.
    Little,
    /// Big only.
    Big,
}

/// The secure programming interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecureCaps {
    /// StreamID bits of secure streams.
    pub sid_bits: u8,
    /// MSIs.
    pub msi: bool,
}

/// The capabilities of an SMMUv3. Build one by changing a preset; the builder checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caps {
    /// AIDR minor revision: 0 to 3 for v3.0 to v3.3.
    pub revision: u8,
    /// IIDR.
    pub iidr: u32,
    /// The bytes of PIDR4 to PIDR7, PIDR0 to PIDR3 and CIDR0 to CIDR3 (offsets 0xfd0 to 0xffc).
    pub id_block: [u8; 12],
    /// Stage 1 translation.
    pub stage1: bool,
    /// Stage 2 translation.
    pub stage2: bool,
    /// VMSAv8-32 LPAE tables (IDR0.TTF bit 0).
    pub aarch32: bool,
    /// VMSAv8-64 tables (IDR0.TTF bit 1).
    pub aarch64: bool,
    /// Coherent access to tables and queues (IDR0.COHACC).
    pub coherent: bool,
    /// Hardware flag update.
    pub httu: Httu,
    /// EL2 stream worlds.
    pub hyp: bool,
    /// ATS.
    pub ats: bool,
    /// Split-stage ATS (IDR0.NS1ATS = 0).
    pub split_stage_ats: bool,
    /// CR2.REC_CFG_ATS exists.
    pub ats_record_errors: bool,
    /// Page requests (needs ATS).
    pub pri: bool,
    /// PASID on PRI overflow auto-responses always (IDR3.PPS).
    pub pps: bool,
    /// 16-bit ASIDs.
    pub asid16: bool,
    /// 16-bit VMIDs.
    pub vmid16: bool,
    /// VMID wildcards.
    pub vmw: bool,
    /// Message signalled interrupts.
    pub msi: bool,
    /// Wake-up events.
    pub sev: bool,
    /// Address translation operations.
    pub atos: bool,
    /// Two-level CD tables.
    pub cd2l: bool,
    /// Two-level stream tables.
    pub two_level_streams: bool,
    /// Table endianness.
    pub endian: TableEndian,
    /// Stall model.
    pub stall_model: StallModel,
    /// Termination is always an abort (IDR0.TERM_MODEL).
    pub abort_only: bool,
    /// Most stalled transactions (IDR5.STALL_MAX).
    pub stall_max: u16,
    /// StreamID bits, 0 to 32.
    pub sid_bits: u8,
    /// SubstreamID bits, 0 to 20.
    pub ssid_bits: u8,
    /// log2 of the most command queue entries, at most 19.
    pub cmdq_log2: u8,
    /// log2 of the most event queue entries, at most 19.
    pub eventq_log2: u8,
    /// log2 of the most page request queue entries, at most 19.
    pub priq_log2: u8,
    /// INSTCFG, PRIVCFG and NSCFG overrides work.
    pub attr_perms_override: bool,
    /// MTCFG, SHCFG and ALLOCCFG overrides work.
    pub attr_types_override: bool,
    /// Hierarchical attribute disable (IDR3.HAD).
    pub hierarchy_disable: bool,
    /// Stage 2 execute-never per privilege (IDR3.XNX).
    pub xnx: bool,
    /// Stage 2 forced write-back (IDR3.FWB).
    pub fwb: bool,
    /// Small tables (IDR3.STT).
    pub stt: bool,
    /// Range invalidation and level hints (IDR3.RIL).
    pub ril: bool,
    /// Break-before-make level (IDR3.BBML).
    pub bbml: u8,
    /// E0PD.
    pub e0pd: bool,
    /// Stage 1 walks to Device memory are Normal-NC (IDR3.PTWNNC).
    pub ptwnnc: bool,
    /// Output address bits: 32, 36, 40, 42, 44, 48 or 52.
    pub oas_bits: u8,
    /// 4 KiB granule.
    pub gran4k: bool,
    /// 16 KiB granule.
    pub gran16k: bool,
    /// 64 KiB granule.
    pub gran64k: bool,
    /// 52-bit addresses with 4 KiB and 16 KiB granules (IDR5.DS).
    pub ds: bool,
    /// 52-bit virtual addresses (IDR5.VAX = 1).
    pub va52: bool,
    /// The secure programming interface, if there is one.
    pub secure: Option<SecureCaps>,
    /// Entries of each port's TLB.
    pub tlb_entries: usize,
}

impl Caps {
    /// IAS in bits (IHI 0070 section 3.4).
    pub const fn ias_bits(&self) -> u8 {
        match (self.aarch32, self.aarch64) {
            (false, _) => self.oas_bits,
            (true, true) => {
                if self.oas_bits > 40 {
                    self.oas_bits
                } else {
                    40
                }
            }
            (true, false) => 40,
        }
    }

    /// The smallest useful SMMU: v3.1, stage 1 only, AArch64 tables with 4 and 64 KiB granules, 256 streams, no
    /// substreams, wired interrupts, faults terminate.
    pub fn small() -> Self {
        Self {
            revision: 1,
            iidr: 0,
            id_block: ARM_ID_BLOCK,
            stage1: true,
            stage2: false,
            aarch32: false,
            aarch64: true,
            coherent: true,
            httu: Httu::None,
            hyp: false,
            ats: false,
            split_stage_ats: false,
            ats_record_errors: false,
            pri: false,
            pps: false,
            asid16: false,
            vmid16: false,
            vmw: false,
            msi: false,
            sev: false,
            atos: false,
            cd2l: false,
            two_level_streams: true,
            endian: TableEndian::Little,
            stall_model: StallModel::Terminate,
            abort_only: true,
            stall_max: 0,
            sid_bits: 8,
            ssid_bits: 0,
            cmdq_log2: 8,
            eventq_log2: 7,
            priq_log2: 0,
            attr_perms_override: false,
            attr_types_override: false,
            hierarchy_disable: true,
            xnx: false,
            fwb: false,
            stt: false,
            ril: false,
            bbml: 0,
            e0pd: false,
            ptwnnc: false,
            oas_bits: 40,
            gran4k: true,
            gran16k: false,
            gran64k: true,
            ds: false,
            va52: false,
            secure: None,
            tlb_entries: portcullis_walk::tbu::DEFAULT_ENTRIES,
        }
    }

    /// Everything that this model has: a v3.3 part with both stages, all formats and granules, 52-bit addresses,
    /// substreams, hardware flag update, stalls, ATS with page requests, MSIs and a secure interface.
    pub fn full() -> Self {
        Self {
            revision: 3,
            iidr: 0x487 << 20 | 0x43b,
            stage2: true,
            aarch32: true,
            httu: Httu::Dirty,
            hyp: true,
            ats: true,
            split_stage_ats: true,
            ats_record_errors: true,
            pri: true,
            asid16: true,
            vmid16: true,
            vmw: true,
            msi: true,
            sev: true,
            atos: true,
            cd2l: true,
            endian: TableEndian::Mixed,
            stall_model: StallModel::Both,
            abort_only: false,
            stall_max: 1024,
            sid_bits: 32,
            ssid_bits: 20,
            cmdq_log2: 19,
            eventq_log2: 19,
            priq_log2: 19,
            attr_perms_override: true,
            attr_types_override: true,
            xnx: true,
            fwb: true,
            stt: true,
            ril: true,
            bbml: 2,
            e0pd: true,
            ptwnnc: true,
            oas_bits: 52,
            gran16k: true,
            ds: true,
            va52: true,
            secure: Some(SecureCaps { sid_bits: 32, msi: true }),
            ..Self::small()
        }
    }

    /// What QEMU's SMMUv3 shows by default: stage 1, 44-bit addresses, all granules, 2^16 streams, no substreams.
    pub fn qemu_virt() -> Self {
        Self {
            asid16: true,
            sid_bits: 16,
            cmdq_log2: 19,
            eventq_log2: 19,
            ril: true,
            bbml: 2,
            oas_bits: 44,
            gran16k: true,
            ..Self::small()
        }
    }

    /// IDR0 as non-secure software reads it; `no_stalls` while S_CR0.NSSTALLD is set.
    pub(crate) fn idr0(&self, no_stalls: bool) -> Idr0 {
        let ats = self.ats && self.stage1 && self.stage2;
        Idr0::new()
            .with_s2p(self.stage2)
            .with_s1p(self.stage1)
            .with_ttf(u8::from(self.aarch32) | u8::from(self.aarch64) << 1)
            .with_cohacc(self.coherent)
            .with_httu(self.httu as u8)
            .with_hyp(self.hyp)
            .with_ats(self.ats)
            .with_ns1ats(ats && !self.split_stage_ats)
            .with_asid16(self.asid16)
            .with_msi(self.msi)
            .with_sev(self.sev)
            .with_atos(self.atos)
            .with_pri(self.pri)
            .with_vmw(self.vmw)
            .with_vmid16(self.vmid16)
            .with_cd2l(self.cd2l)
            .with_ttendian(match self.endian {
                TableEndian::Mixed => 0,
                TableEndian::Little => 2,
                TableEndian::Big => 3,
            })
            .with_atsrecerr(self.ats_record_errors)
            .with_stall_model(self.non_secure_stalls(no_stalls).code())
            .with_term_model(self.abort_only)
            .with_st_level(u8::from(self.two_level_streams))
    }

    /// The stall model of non-secure streams.
    pub(crate) fn non_secure_stalls(&self, no_stalls: bool) -> StallModel {
        match self.stall_model {
            StallModel::Both if no_stalls => StallModel::Terminate,
            model => model,
        }
    }

    pub(crate) fn idr1(&self) -> Idr1 {
        Idr1::new()
            .with_sidsize(self.sid_bits)
            .with_ssidsize(self.ssid_bits)
            .with_priqs(self.priq_log2)
            .with_eventqs(self.eventq_log2)
            .with_cmdqs(self.cmdq_log2)
            .with_attr_perms_ovr(self.attr_perms_override)
            .with_attr_types_ovr(self.attr_types_override)
    }

    pub(crate) fn idr3(&self) -> Idr3 {
        Idr3::new()
            .with_had(self.hierarchy_disable)
            .with_xnx(self.xnx)
            .with_pps(self.pps)
            .with_fwb(self.fwb)
            .with_stt(self.stt)
            .with_ril(self.ril)
            .with_bbml(self.bbml)
            .with_e0pd(self.e0pd)
            .with_ptwnnc(self.ptwnnc)
    }

    pub(crate) fn idr5(&self) -> Idr5 {
        let oas = ADDRESS_BITS.iter().position(|b| *b == self.oas_bits).unwrap_or(0);
        Idr5::new()
            .with_oas(oas as u8)
            .with_gran4k(self.gran4k)
            .with_gran16k(self.gran16k)
            .with_gran64k(self.gran64k)
            .with_ds(self.ds)
            .with_vax(u8::from(self.va52))
            .with_stall_max(self.stall_max)
    }

    /// AIDR.
    pub(crate) fn aidr(&self) -> u32 {
        self.revision.into()
    }

    pub(crate) fn s_idr0(&self) -> SIdr0 {
        let msi = self.secure.is_some_and(|s| s.msi);
        SIdr0::new().with_msi(msi).with_stall_model(self.stall_model.code())
    }

    pub(crate) fn s_idr1(&self) -> SIdr1 {
        let bits = self.secure.map_or(0, |s| s.sid_bits);
        SIdr1::new().with_s_sidsize(bits).with_secure_impl(self.secure.is_some())
    }

    /// S_IDR3: SAMS, because a secure queue takes no ATS and PRI commands here.
    pub(crate) fn s_idr3(&self) -> u32 {
        u32::from(self.ats) << 6
    }

    /// StreamID bits of one security state.
    pub(crate) fn stream_bits(&self, secure: bool) -> u8 {
        if secure { self.secure.map_or(0, |s| s.sid_bits) } else { self.sid_bits }
    }

    /// True if MSIs of one security state exist.
    pub(crate) fn msis(&self, secure: bool) -> bool {
        if secure { self.secure.is_some_and(|s| s.msi) } else { self.msi }
    }

    /// All bits of an output address.
    pub(crate) fn output_mask(&self) -> u64 {
        (1 << self.oas_bits.min(63)) - 1
    }

    /// Checks every rule of the architecture about what may come with what.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), CapsError> {
        let within = |name, value: u32, most: u32| {
            if value > most { Err(CapsError::Range { name, value, most }) } else { Ok(()) }
        };
        within("revision", self.revision.into(), 3)?;
        within("sid_bits", self.sid_bits.into(), 32)?;
        within("ssid_bits", self.ssid_bits.into(), 20)?;
        within("cmdq_log2", self.cmdq_log2.into(), 19)?;
        within("eventq_log2", self.eventq_log2.into(), 19)?;
        within("priq_log2", self.priq_log2.into(), 19)?;
        within("bbml", self.bbml.into(), 2)?;
        within("secure.sid_bits", self.stream_bits(true).into(), 32)?;
        within("tlb_entries", u32::try_from(self.tlb_entries).unwrap_or(u32::MAX), 1 << 20)?;
        if !matches!(self.oas_bits, 32 | 36 | 40 | 42 | 44 | 48 | 52) {
            return Err(CapsError::OutputSize(self.oas_bits));
        }
        let (s1, s2) = (self.stage1, self.stage2);
        let (v31, v32, v33) = (self.revision >= 1, self.revision >= 2, self.revision >= 3);
        let (stalls, ats) = (self.stall_model != StallModel::Terminate, self.ats);
        // What is there needs something else: (there, needed is there, names).
        let needs: &[(bool, bool, &str, &str)] = &[
            (true, s1 || s2, "an SMMU", "stage1 or stage2"),
            (true, self.aarch32 || self.aarch64, "an SMMU", "aarch32 or aarch64 tables"),
            (self.aarch32, self.gran4k, "aarch32", "gran4k"),
            // Its addresses have 40 bits whatever the output size; this model does not truncate them.
            (self.aarch32, self.oas_bits >= 40, "aarch32", "oas_bits of 40 or more"),
            (self.aarch64, self.gran4k || self.gran16k || self.gran64k, "aarch64", "a granule"),
            (self.hyp, s1 && s2, "hyp", "stage1 and stage2"),
            (v32 && s1 && s2, self.hyp, "both stages from v3.2 on", "hyp"),
            (self.pri, ats, "pri", "ats"),
            (self.pps, self.pri, "pps", "pri"),
            (self.split_stage_ats, ats && s1 && s2, "split_stage_ats", "ats, stage1 and stage2"),
            (self.ats_record_errors, ats, "ats_record_errors", "ats"),
            (self.asid16, s1, "asid16", "stage1"),
            (self.vmid16, s2, "vmid16", "stage2"),
            (self.vmw, s2, "vmw", "stage2"),
            (self.ssid_bits > 0, s1, "ssid_bits", "stage1"),
            (self.cd2l, self.ssid_bits > 0, "cd2l", "ssid_bits"),
            (self.sid_bits >= 7, self.two_level_streams, "sid_bits of 7 or more", "two_level_streams"),
            (
                self.stream_bits(true) >= 7,
                self.two_level_streams,
                "secure.sid_bits of 7 or more",
                "two_level_streams",
            ),
            (stalls, self.stall_max > 0, "stall_model with stalls", "stall_max"),
            (self.stall_max > 0, stalls, "stall_max", "stall_model with stalls"),
            (self.priq_log2 > 0, self.pri, "priq_log2", "pri"),
            (self.httu != Httu::None, self.aarch64, "httu", "aarch64"),
            (self.oas_bits == 52, self.gran64k || self.ds, "oas_bits of 52", "gran64k or ds"),
            (self.oas_bits == 52, v31, "oas_bits of 52", "revision 1 or later"),
            (self.va52, v31 && (self.gran64k || self.ds), "va52", "revision 1 or later and gran64k or ds"),
            (self.ds, self.aarch64 && (self.gran4k || self.gran16k), "ds", "aarch64 and gran4k or gran16k"),
            (self.hierarchy_disable, s1 && v31, "hierarchy_disable", "stage1 and revision 1 or later"),
            (v31 && s1, self.hierarchy_disable, "stage1 from v3.1 on", "hierarchy_disable"),
            (self.xnx, s2 && v31, "xnx", "stage2 and revision 1 or later"),
            (v31 && s2, self.xnx, "stage2 from v3.1 on", "xnx"),
            (self.fwb, s2 && v31, "fwb", "stage2 and revision 1 or later"),
            (v32 && s2, self.fwb, "stage2 from v3.2 on", "fwb"),
            (self.ril, v31, "ril", "revision 1 or later"),
            (v32, self.ril, "v3.2 and later", "ril"),
            (self.bbml > 0, v31, "bbml", "revision 1 or later"),
            (v32, self.bbml >= 1, "v3.2 and later", "bbml of 1 or 2"),
            (self.e0pd, s1 && v31, "e0pd", "stage1 and revision 1 or later"),
            (v33 && s1, self.e0pd, "stage1 from v3.3 on", "e0pd"),
            (self.ptwnnc, s2 && v31, "ptwnnc", "stage2 and revision 1 or later"),
            (v33 && s2, self.ptwnnc, "stage2 from v3.3 on", "ptwnnc"),
            (self.stt, self.aarch64 && v31, "stt", "aarch64 and revision 1 or later"),
        ];
        match needs.iter().find(|(there, met, ..)| *there && !*met) {
            Some((_, _, what, needs)) => Err(CapsError::Needs { what, needs }),
            None => Ok(()),
        }
    }
}

impl StallModel {
    /// The field's code.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Both => 0,
            Self::Terminate => 1,
            Self::Forced => 2,
        }
    }
}

/// PIDR and CIDR bytes of an Arm part, as QEMU shows them.
const ARM_ID_BLOCK: [u8; 12] = [0x04, 0x00, 0x00, 0x00, 0x84, 0xb4, 0xf0, 0x10, 0x0d, 0xf0, 0x05, 0xb1];

/// Capabilities that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CapsError {
    /// A number is too large.
    #[error("{name} is {value}, at most {most} is possible")]
    Range {
        /// The field.
        name: &'static str,
        /// Its value.
        value: u32,
        /// The largest legal one.
        most: u32,
    },
    /// Not an output address size of the architecture.
    #[error("oas_bits is {0}; it can be 32, 36, 40, 42, 44, 48 or 52")]
    OutputSize(u8),
    /// One thing needs another.
    #[error("{what} needs {needs}")]
    Needs {
        /// What is there.
        what: &'static str,
        /// What is missing.
        needs: &'static str,
    },
    /// The builder was given no memory for table walks and queues.
    #[error("an SMMU needs memory for its tables and queues")]
    NoMemory,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_presets_are_legal() {
        for caps in [Caps::small(), Caps::full(), Caps::qemu_virt()] {
            assert_eq!(caps.check(), Ok(()));
        }
    }

    #[test]
    fn the_qemu_preset_reads_as_qemu_does() {
        let c = Caps::qemu_virt();
        // S1P, TTF = 2, COHACC, ASID16, TTENDIAN = 2, STALL_MODEL = 1, TERM_MODEL, ST_LEVEL = 1.
        let idr0 = 1 << 1 | 2 << 2 | 1 << 4 | 1 << 12 | 2 << 21 | 1 << 24 | 1 << 26 | 1 << 27;
        assert_eq!(c.idr0(false).into_bits(), idr0);
        assert_eq!(c.idr1().into_bits(), 16 | 19 << 16 | 19 << 21);
        assert_eq!(c.idr3().into_bits(), 1 << 2 | 1 << 10 | 2 << 11);
        assert_eq!(c.idr5().into_bits(), 4 | 7 << 4);
        assert_eq!((c.aidr(), c.iidr), (1, 0));
    }

    #[test]
    fn the_full_part_reads_as_the_fact_sheet_says() {
        let c = Caps::full();
        let idr0 = 0b11
            | 3 << 2
            | 1 << 4
            | 2 << 6
            | 1 << 9
            | 1 << 10
            | 1 << 12
            | 0b11111 << 12
            | 1 << 17
            | 1 << 18
            | 1 << 19
            | 1 << 23
            | 1 << 27;
        assert_eq!(c.idr0(false).into_bits(), idr0);
        assert_eq!(c.idr0(true).into_bits(), idr0 | 1 << 24, "NSSTALLD takes stalling away");
        assert_eq!(c.idr1().into_bits(), 32 | 20 << 6 | 19 << 11 | 19 << 16 | 19 << 21 | 3 << 26);
        let idr3 = 1 << 2 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 10 | 2 << 11 | 1 << 13 | 1 << 14;
        assert_eq!(c.idr3().into_bits(), idr3);
        assert_eq!(c.idr5().into_bits(), 6 | 7 << 4 | 1 << 7 | 1 << 10 | 1024 << 16);
        assert_eq!(c.s_idr0().into_bits(), 1 << 13);
        assert_eq!(c.s_idr1().into_bits(), 32 | 1 << 31);
        assert_eq!(c.s_idr3(), 1 << 6);
        assert_eq!(c.aidr(), 3);
    }

    #[test]
    fn ns1ats_says_that_split_stage_is_missing_only_where_it_could_be_there() {
        let full = Caps { split_stage_ats: false, ..Caps::full() };
        assert!(full.idr0(false).ns1ats());
        let one = Caps { stage2: false, split_stage_ats: false, ..Caps::full() };
        assert!(!one.idr0(false).ns1ats());
    }

    /// Each rule is broken by one change of a legal part.
    #[test]
    fn every_dependency_is_checked() {
        let full = Caps::full;
        let qemu = Caps::qemu_virt;
        let old = || Caps { revision: 0, hierarchy_disable: false, ..Caps::small() };
        assert_eq!(old().check(), Ok(()));
        let bad = [
            Caps { stage1: false, ..Caps::small() },
            Caps { aarch64: false, ..qemu() },
            Caps { gran4k: false, ..full() },
            Caps { aarch32: true, oas_bits: 36, ..qemu() },
            Caps { gran4k: false, gran16k: false, gran64k: false, ..qemu() },
            Caps { hyp: true, ..qemu() },
            Caps { hyp: false, ..full() },
            Caps { pri: true, ..qemu() },
            Caps { pps: true, pri: false, priq_log2: 0, ..full() },
            Caps { split_stage_ats: true, ..qemu() },
            Caps { ats_record_errors: true, ..qemu() },
            Caps { vmid16: true, ..qemu() },
            Caps { vmw: true, ..qemu() },
            Caps { cd2l: true, ..qemu() },
            Caps { two_level_streams: false, ..qemu() },
            Caps { two_level_streams: false, sid_bits: 6, ..full() },
            Caps { stall_max: 0, ..full() },
            Caps { stall_max: 4, ..qemu() },
            Caps { pri: false, ..full() },
            Caps { httu: Httu::Access, aarch64: false, aarch32: true, stt: false, ..qemu() },
            Caps { oas_bits: 52, gran64k: false, ..qemu() },
            Caps { oas_bits: 52, ..old() },
            Caps { va52: true, gran64k: false, ..qemu() },
            Caps { ds: true, gran4k: false, gran16k: false, ..qemu() },
            Caps { hierarchy_disable: true, ..old() },
            Caps { hierarchy_disable: false, ..qemu() },
            Caps { xnx: true, ..qemu() },
            Caps { xnx: false, ..full() },
            Caps { fwb: true, ..qemu() },
            Caps { fwb: false, ..full() },
            Caps { ril: true, ..old() },
            Caps { ril: false, ..full() },
            Caps { bbml: 1, ..old() },
            Caps { bbml: 0, ..full() },
            Caps { e0pd: true, ..old() },
            Caps { e0pd: false, ..full() },
            Caps { ptwnnc: true, ..qemu() },
            Caps { ptwnnc: false, ..full() },
            Caps { stt: true, ..old() },
            Caps { oas_bits: 41, ..qemu() },
            Caps { oas_bits: 56, ..full() },
            Caps { revision: 4, ..full() },
            Caps { sid_bits: 33, ..full() },
            Caps { ssid_bits: 21, ..full() },
            Caps { cmdq_log2: 20, ..full() },
            Caps { eventq_log2: 20, ..full() },
            Caps { priq_log2: 20, ..full() },
            Caps { bbml: 3, ..full() },
            Caps { tlb_entries: 1 << 21, ..full() },
            Caps { secure: Some(SecureCaps { sid_bits: 33, msi: false }), ..full() },
        ];
        for (n, caps) in bad.iter().enumerate() {
            assert!(caps.check().is_err(), "case {n}");
        }
    }
}
