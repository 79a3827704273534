//! What an SMMUv3 says it is: IDR0, 1, 3, 5, IIDR and AIDR decoded into [`Features`], and what this driver cannot drive.
//!
//! The refusals are those of Linux's `arm_smmu_device_hw_probe`.

use core::fmt;

use portcullis_arch::smmuv3::regs::{ADDRESS_BITS, Idr0, Idr1, Idr3, Idr5, PAGE, offset};
use portcullis_hal::Mmio;
use portcullis_pgtable::Granule;
use thiserror::Error;

use super::Error;

/// Widest addresses of the page tables of `portcullis-pgtable`.
const MAX_ADDRESS_BITS: u8 = 48;
/// A command queue of 64 entries would be filled by one batch.
const MIN_CMDQ_LOG2: u8 = 7;

/// What becomes of a transaction that faults (IDR0.STALL_MODEL).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StallModel {
    /// Software chooses.
    StallOrTerminate,
    /// It is terminated.
    Terminate,
    /// It is stalled, always.
    Stall,
}

/// The features of one SMMU. Displays as a few lines for a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Architecture revision, major (from 3) and minor: (3, 2) is SMMUv3.2.
    pub revision: (u8, u8),
    /// IIDR: who made it.
    pub iidr: u32,
    /// Stage 1 translation.
    pub stage1: bool,
    /// Stage 2 translation.
    pub stage2: bool,
    /// IDR0.COHACC: tables and queues are accessed coherently.
    pub coherent: bool,
    /// Broadcast TLB maintenance of CPUs is understood.
    pub broadcast_tlb: bool,
    /// Hardware updates of flags: 0 none, 1 access flag, 2 access flag and dirty state.
    pub httu: u8,
    /// EL2 stream worlds (IDR0.HYP).
    pub hyp: bool,
    /// ATS.
    pub ats: bool,
    /// Split-stage ATS: translation requests are answered with IPAs.
    pub split_ats: bool,
    /// Page request interface.
    pub pri: bool,
    /// CR2.REC_CFG_ATS exists.
    pub ats_record_errors: bool,
    /// Message signalled interrupts.
    pub msi: bool,
    /// Wake-up events.
    pub sev: bool,
    /// Bits of an ASID: 8 or 16.
    pub asid_bits: u8,
    /// Bits of a VMID: 8 or 16.
    pub vmid_bits: u8,
    /// Two-level CD tables.
    pub two_level_cd: bool,
    /// Two-level stream tables.
    pub two_level_streams: bool,
    /// What faults do.
    pub stall_model: StallModel,
    /// Termination is always an abort (CD.A must be 1).
    pub abort_only: bool,
    /// Stalled transactions that are possible at once.
    pub stall_max: u16,
    /// Bits of a stream id.
    pub stream_bits: u8,
    /// Bits of a substream id, 0 for none.
    pub substream_bits: u8,
    /// Largest command queue, log2 of its entries.
    pub cmdq_log2: u8,
    /// Largest event queue, log2 of its entries.
    pub evtq_log2: u8,
    /// Largest page request queue, log2 of its entries.
    pub priq_log2: u8,
    /// STE.INSTCFG and PRIVCFG work.
    pub override_permissions: bool,
    /// STE.MTCFG, SHCFG and ALLOCCFG work.
    pub override_types: bool,
    /// TLB invalidation by range, with level hints.
    pub range_invalidation: bool,
    /// Break-before-make level 0 to 2.
    pub bbml: u8,
    /// Stage 2 forced write-back.
    pub fwb: bool,
    /// Output address bits; at most 48 are used.
    pub output_bits: u8,
    /// Intermediate address bits; at most 48 are used.
    pub ipa_bits: u8,
    /// AArch64 granules: 4K, 16K, 64K.
    pub granules: [bool; 3],
    /// IDR0, 1, 3, 5 as they were read.
    pub raw: [u32; 4],
}

/// An SMMU that this driver cannot drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// Not both register pages.
    #[error("the window of {window:#x} bytes is too small: an SMMUv3 has two pages of 64 KiB")]
    Window {
        /// Bytes that the caller says there are.
        window: u64,
    },
    /// Neither stage.
    #[error("no translation support: IDR0 {idr0:#010x} has neither S1P nor S2P")]
    NoTranslation {
        /// IDR0.
        idr0: u32,
    },
    /// Only 32-bit tables.
    #[error("AArch64 table format not supported: IDR0 {idr0:#010x} has TTF = {ttf}")]
    TableFormat {
        /// IDR0.
        idr0: u32,
        /// The field.
        ttf: u8,
    },
    /// Only big-endian tables, or a reserved value.
    #[error("little-endian tables not supported: IDR0 {idr0:#010x} has TTENDIAN = {ttendian}")]
    Endianness {
        /// IDR0.
        idr0: u32,
        /// The field.
        ttendian: u8,
    },
    /// Bases of tables or queues that cannot be chosen.
    #[error("embedded implementation (preset or relative bases) not supported: IDR1 {idr1:#010x}")]
    Preset {
        /// IDR1; bits 30:28 are TABLES_PRESET, QUEUES_PRESET and REL.
        idr1: u32,
    },
    /// The command queue holds no more than one batch.
    #[error("command queue of {} entries: more than 64 are needed (IDR1 {idr1:#010x})", 1u32 << .log2)]
    CommandQueue {
        /// IDR1.
        idr1: u32,
        /// CMDQS.
        log2: u8,
    },
    /// StreamIDs of a size that does not exist.
    #[error("stream ids of {bits} bits: IDR1 {idr1:#010x}")]
    StreamBits {
        /// IDR1.
        idr1: u32,
        /// SIDSIZE.
        bits: u8,
    },
    /// No granule.
    #[error("no translation granule: IDR5 {idr5:#010x} has none of GRAN4K, GRAN16K, GRAN64K")]
    NoGranule {
        /// IDR5.
        idr5: u32,
    },
    /// The set-up could not be completed.
    #[error("set-up failed: {0}")]
    Reset(#[from] Error),
}

impl Features {
    /// Reads and checks the identification registers. `window` is the size of the register window in bytes.
    pub fn read<R: Mmio>(registers: &R, window: u64) -> Result<Self, ProbeError> {
        if window < 2 * PAGE {
            return Err(ProbeError::Window { window });
        }
        let read = |at: u64| registers.read32(at as usize);
        let idr0 = Idr0::from_bits(read(offset::IDR0));
        let idr1 = Idr1::from_bits(read(offset::IDR1));
        let idr3 = Idr3::from_bits(read(offset::IDR3));
        let idr5 = Idr5::from_bits(read(offset::IDR5));
        let (iidr, aidr) = (read(offset::IIDR), read(offset::AIDR));
        check(idr0, idr1, idr5)?;
        let both = idr0.s1p() && idr0.s2p();
        let bits = ADDRESS_BITS.get(usize::from(idr5.oas())).copied().unwrap_or(MAX_ADDRESS_BITS);
        // The 32-bit format has 40-bit intermediate addresses whatever the output size is.
        let ipa_bits = if idr0.ttf() == 3 { bits.max(40) } else { bits };
        Ok(Self {
            revision: (3 + (aidr >> 4 & 0xf) as u8, (aidr & 0xf) as u8),
            iidr,
            stage1: idr0.s1p(),
            stage2: idr0.s2p(),
            coherent: idr0.cohacc(),
            broadcast_tlb: idr0.btm(),
            httu: idr0.httu(),
            hyp: idr0.hyp() && both,
            ats: idr0.ats(),
            split_ats: idr0.ats() && both && !idr0.ns1ats(),
            pri: idr0.pri() && idr0.ats(),
            ats_record_errors: idr0.ats() && idr0.atsrecerr(),
            msi: idr0.msi(),
            sev: idr0.sev(),
            asid_bits: if idr0.asid16() { 16 } else { 8 },
            vmid_bits: if idr0.vmid16() { 16 } else { 8 },
            two_level_cd: idr0.cd2l(),
            two_level_streams: idr0.st_level() == 1,
            stall_model: match idr0.stall_model() {
                0 => StallModel::StallOrTerminate,
                2 => StallModel::Stall,
                _ => StallModel::Terminate,
            },
            abort_only: idr0.term_model(),
            stall_max: idr5.stall_max(),
            stream_bits: idr1.sidsize(),
            substream_bits: if idr0.s1p() { idr1.ssidsize().min(20) } else { 0 },
            cmdq_log2: idr1.cmdqs().min(19),
            evtq_log2: idr1.eventqs().min(19),
            priq_log2: idr1.priqs().min(19),
            override_permissions: idr1.attr_perms_ovr(),
            override_types: idr1.attr_types_ovr(),
            range_invalidation: idr3.ril(),
            bbml: idr3.bbml(),
            fwb: idr3.fwb(),
            output_bits: bits.min(MAX_ADDRESS_BITS),
            ipa_bits: ipa_bits.min(MAX_ADDRESS_BITS),
            granules: [idr5.gran4k(), idr5.gran16k(), idr5.gran64k()],
            raw: [idr0.into_bits(), idr1.into_bits(), idr3.into_bits(), idr5.into_bits()],
        })
    }

    /// True if a device may be made to wait when it faults.
    pub fn can_stall(&self) -> bool {
        self.stall_model != StallModel::Terminate
    }

    /// Both stages, one on top of the other.
    pub fn nested(&self) -> bool {
        self.stage1 && self.stage2
    }

    /// True if the SMMU walks tables with this granule.
    pub fn supports(&self, granule: Granule) -> bool {
        let [k4, k16, k64] = self.granules;
        match granule {
            Granule::K4 => k4,
            Granule::K16 => k16,
            Granule::K64 => k64,
        }
    }

    /// The smallest granule.
    pub fn smallest_granule(&self) -> Granule {
        let [k4, k16, _] = self.granules;
        match (k4, k16) {
            (true, _) => Granule::K4,
            (_, true) => Granule::K16,
            _ => Granule::K64,
        }
    }

    /// Page and block sizes of all formats as a bit map.
    pub fn page_sizes(&self) -> u64 {
        const SIZES: [u64; 3] = [1 << 12 | 1 << 21 | 1 << 30, 1 << 14 | 1 << 25, 1 << 16 | 1 << 29];
        let present = self.granules.iter().zip(SIZES).filter(|(present, _)| **present);
        present.fold(0, |all, (_, sizes)| all | sizes)
    }
}

fn check(idr0: Idr0, idr1: Idr1, idr5: Idr5) -> Result<(), ProbeError> {
    let (raw0, raw1) = (idr0.into_bits(), idr1.into_bits());
    if !idr0.s1p() && !idr0.s2p() {
        return Err(ProbeError::NoTranslation { idr0: raw0 });
    }
    if idr0.ttf() & 2 == 0 {
        return Err(ProbeError::TableFormat { idr0: raw0, ttf: idr0.ttf() });
    }
    if !matches!(idr0.ttendian(), 0 | 2) {
        return Err(ProbeError::Endianness { idr0: raw0, ttendian: idr0.ttendian() });
    }
    if idr1.tables_preset() || idr1.queues_preset() || idr1.rel() {
        return Err(ProbeError::Preset { idr1: raw1 });
    }
    if idr1.cmdqs() < MIN_CMDQ_LOG2 {
        return Err(ProbeError::CommandQueue { idr1: raw1, log2: idr1.cmdqs() });
    }
    if idr1.sidsize() > 32 {
        return Err(ProbeError::StreamBits { idr1: raw1, bits: idr1.sidsize() });
    }
    if !idr5.gran4k() && !idr5.gran16k() && !idr5.gran64k() {
        return Err(ProbeError::NoGranule { idr5: idr5.into_bits() });
    }
    Ok(())
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "SMMUv{}.{} with:", self.revision.0, self.revision.1)?;
        let features = [
            (self.stage1, "stage 1 translation"),
            (self.stage2, "stage 2 translation"),
            (self.coherent, "coherent tables and queues"),
            (self.two_level_streams, "two-level stream tables"),
            (self.two_level_cd, "two-level context descriptor tables"),
            (self.stall_model == StallModel::StallOrTerminate, "stalling of faulting transactions"),
            (self.stall_model == StallModel::Stall, "stalling of faulting transactions (always)"),
            (self.ats, "ATS"),
            (self.pri, "page requests"),
            (self.msi, "message signalled interrupts"),
            (self.range_invalidation, "TLB invalidation by range"),
        ];
        for (_, line) in features.iter().filter(|(present, _)| *present) {
            writeln!(f, "\t{line}")?;
        }
        writeln!(f, "\t{}-bit stream ids, {}-bit substream ids", self.stream_bits, self.substream_bits)?;
        writeln!(f, "\tsupported page sizes: {:#010x}", self.page_sizes())?;
        writeln!(f, "\tias {}-bit, oas {}-bit", self.ipa_bits, self.output_bits)
    }
}
