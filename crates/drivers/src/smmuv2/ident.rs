//! What an SMMUv2 says it is: IDR0, IDR1, IDR2 and IDR7 decoded, and what this driver cannot drive.

use core::fmt;

use portcullis_arch::smmuv2::offset::gr0;
use portcullis_arch::smmuv2::{Idr0, Idr1, Idr2, address_bits};
use portcullis_hal::Mmio;
use portcullis_pgtable::Granule;
use thiserror::Error;

use super::Error;
use super::regs::Regs;

/// Context banks and stream match groups that the register map has room for.
const MAX_BANKS: u8 = 128;

/// How the SMMU finds the entry for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamMapping {
    /// Stream match groups: SMRn says which streams, S2CRn what becomes of them.
    Matching {
        /// How many.
        groups: u16,
    },
    /// The StreamID is the number of the S2CR.
    Indexing {
        /// How many S2CRs.
        streams: u16,
    },
}

/// The features of one SMMU. Displays as the lines that Linux prints at probe time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identification {
    /// Revision, major and minor (IDR7).
    pub revision: (u8, u8),
    /// Stage 1 translation.
    pub stage1: bool,
    /// Stage 2 translation.
    pub stage2: bool,
    /// Stage 1 followed by stage 2.
    pub nested: bool,
    /// Address translation operations.
    pub translation_operations: bool,
    /// IDR0.CTTW: table walks are coherent.
    pub coherent_walk: bool,
    /// Stream matching or stream indexing.
    pub streams: StreamMapping,
    /// 16-bit StreamIDs, used if present.
    pub extended_ids: bool,
    /// ID bits that SMRs hold (a mask). After probing, what a write and read back of an SMR gave.
    pub stream_id_mask: u16,
    /// MASK bits that SMRs hold. 0 until probed, and with stream indexing.
    pub stream_mask_mask: u16,
    /// Context banks.
    pub context_banks: u8,
    /// Those of them that can only do stage 2: the first ones.
    pub stage2_banks: u8,
    /// log2 of the page size, 12 or 16.
    pub page_shift: u32,
    /// Global pages in front of the context banks.
    pub global_pages: usize,
    /// Stage 1 input: upstream bus size in bits.
    pub va_bits: u8,
    /// Stage 1 output and stage 2 input.
    pub ipa_bits: u8,
    /// Stage 2 output.
    pub pa_bits: u8,
    /// AArch64 granules: 4K, 16K, 64K.
    pub granules: [bool; 3],
    /// AArch32 long descriptors.
    pub aarch32_long: bool,
    /// AArch32 short descriptors.
    pub aarch32_short: bool,
    /// 16-bit VMIDs, used if present.
    pub vmid16: bool,
    /// Bytes of registers that the architecture gives this SMMU.
    pub register_bytes: u64,
    /// Bytes of registers that the caller says there are.
    pub window_bytes: u64,
}

/// An SMMU that this driver cannot drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ProbeError {
    /// Neither stage.
    #[error("no translation support: IDR0 {idr0:#010x} has neither S1TS nor S2TS")]
    NoTranslation {
        /// IDR0.
        idr0: u32,
    },
    /// Stream matching without groups.
    #[error("stream matching supported, but no SMRs present: IDR0 {idr0:#010x} has SMS and NUMSMRG = 0")]
    NoStreamMatchGroups {
        /// IDR0.
        idr0: u32,
    },
    /// More stage 2 banks than banks, no bank, or more than the register map has room for.
    #[error(
        "impossible number of context banks: IDR1 {idr1:#010x} says {banks}, {stage2} of them stage 2 only"
    )]
    ContextBanks {
        /// IDR1.
        idr1: u32,
        /// NUMCB.
        banks: u8,
        /// NUMS2CB.
        stage2: u8,
    },
    /// The last context bank would lie outside of the window.
    #[error(
        "the window of {window:#x} bytes is too small: {banks} context banks behind {global_pages} global pages of \
         {page_bytes:#x} bytes (IDR1 {idr1:#010x}) need {needed:#x}"
    )]
    Window {
        /// IDR1.
        idr1: u32,
        /// Bytes that the caller says there are.
        window: u64,
        /// Bytes needed.
        needed: u64,
        /// NUMCB.
        banks: u8,
        /// Global pages.
        global_pages: usize,
        /// Bytes of a page.
        page_bytes: u64,
    },
    /// No page table format that `portcullis-pgtable` writes.
    #[error("no AArch64 translation granule: IDR2 {idr2:#010x} has none of PTFSv8_4K, _16K, _64K")]
    NoGranule {
        /// IDR2.
        idr2: u32,
    },
    /// The reset sequence could not be completed.
    #[error("reset failed: {0}")]
    Reset(Error),
}

impl Identification {
    /// Reads and checks the identification registers. `window` is the size of the register window in bytes.
    pub(super) fn read<R: Mmio>(regs: &Regs<R>, window: u64) -> Result<Self, ProbeError> {
        let idr0 = Idr0::from_bits(regs.read(gr0::IDR0));
        let idr1 = Idr1::from_bits(regs.read(gr0::IDR1));
        let idr2 = Idr2::from_bits(regs.read(gr0::IDR2));
        let idr7 = regs.read(gr0::IDR7);
        if !idr0.s1ts() && !idr0.s2ts() {
            return Err(ProbeError::NoTranslation { idr0: idr0.into_bits() });
        }
        let id_bits = if idr0.exids() { 16 } else { idr0.numsidb() };
        let stream_id_mask = ((1u32 << id_bits) - 1) as u16;
        let streams = if idr0.sms() {
            if idr0.numsmrg() == 0 {
                return Err(ProbeError::NoStreamMatchGroups { idr0: idr0.into_bits() });
            }
            StreamMapping::Matching { groups: u16::from(idr0.numsmrg()).min(128) }
        } else {
            // S2CR registers end where the register map has no more room for them.
            StreamMapping::Indexing { streams: (u32::from(stream_id_mask) + 1).min(128) as u16 }
        };
        let (banks, stage2) = (idr1.numcb(), idr1.nums2cb());
        if banks == 0 || banks > MAX_BANKS || stage2 > banks {
            return Err(ProbeError::ContextBanks { idr1: idr1.into_bits(), banks, stage2 });
        }
        let page_shift = if idr1.pagesize() { 16 } else { 12 };
        let global_pages = 1usize << (u32::from(idr1.numpagendxb()) + 1);
        let needed = (global_pages as u64 + u64::from(banks)) << page_shift;
        if needed > window {
            return Err(ProbeError::Window {
                idr1: idr1.into_bits(),
                window,
                needed,
                banks,
                global_pages,
                page_bytes: 1 << page_shift,
            });
        }
        let granules = [idr2.ptfsv8_4k(), idr2.ptfsv8_16k(), idr2.ptfsv8_64k()];
        if granules == [false; 3] {
            return Err(ProbeError::NoGranule { idr2: idr2.into_bits() });
        }
        Ok(Self {
            revision: ((idr7 >> 4 & 0xf) as u8, (idr7 & 0xf) as u8),
            stage1: idr0.s1ts(),
            stage2: idr0.s2ts(),
            nested: idr0.nts(),
            translation_operations: idr0.s1ts() && !idr0.atosns(),
            coherent_walk: idr0.cttw(),
            streams,
            extended_ids: idr0.exids(),
            stream_id_mask,
            stream_mask_mask: 0,
            context_banks: banks,
            stage2_banks: stage2,
            page_shift,
            global_pages,
            va_bits: address_bits(idr2.ubs()),
            ipa_bits: address_bits(idr2.ias()),
            pa_bits: address_bits(idr2.oas()),
            granules,
            aarch32_long: idr0.ptfs() < 2,
            aarch32_short: idr0.ptfs() == 0,
            vmid16: idr2.vmid16s(),
            register_bytes: (2 * global_pages as u64) << page_shift,
            window_bytes: window,
        })
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

    /// Page and block sizes of all formats as a bit map (the figure in Linux's log).
    pub fn page_sizes(&self) -> u64 {
        const K4: u64 = 1 << 12 | 1 << 21 | 1 << 30;
        const K16: u64 = 1 << 14 | 1 << 25;
        const K64: u64 = 1 << 16 | 1 << 29;
        const SHORT: u64 = 1 << 12 | 1 << 16 | 1 << 20 | 1 << 24;
        let [k4, k16, k64] = self.granules;
        [(self.aarch32_short, SHORT), (k4 || self.aarch32_long, K4), (k16, K16), (k64, K64)]
            .iter()
            .filter(|(present, _)| *present)
            .fold(0, |all, (_, sizes)| all | sizes)
    }
}

impl fmt::Display for Identification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "SMMUv2 with:")?;
        let features = [
            (self.stage1, "stage 1 translation"),
            (self.stage2, "stage 2 translation"),
            (self.nested, "nested translation"),
            (self.translation_operations, "address translation ops"),
            (self.coherent_walk, "coherent table walk"),
        ];
        for (_, line) in features.iter().filter(|(present, _)| *present) {
            writeln!(f, "\t{line}")?;
        }
        match self.streams {
            StreamMapping::Matching { groups } => {
                writeln!(f, "\tstream matching with {groups} register groups")?;
            }
            StreamMapping::Indexing { streams } => writeln!(f, "\tstream indexing with {streams} streams")?,
        }
        writeln!(f, "\t{} context banks ({} stage-2 only)", self.context_banks, self.stage2_banks)?;
        writeln!(f, "\tSupported page sizes: {:#010x}", self.page_sizes())?;
        if self.stage1 {
            writeln!(f, "\tStage-1: {}-bit VA -> {}-bit IPA", self.va_bits, self.ipa_bits)?;
        }
        if self.stage2 {
            writeln!(f, "\tStage-2: {}-bit IPA -> {}-bit PA", self.ipa_bits, self.pa_bits)?;
        }
        if self.window_bytes != self.register_bytes {
            writeln!(
                f,
                "\tSMMU address space size ({:#x}) differs from mapped region size ({:#x})!",
                self.register_bytes, self.window_bytes
            )?;
        }
        Ok(())
    }
}
