//! What a particular SMMU is: counts, sizes and options, frozen into its identification registers.

use portcullis_arch::smmuv2::{Cr0, Idr0, Idr1, Idr2, Scr1, address_bits, address_code};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// AArch32 table formats (IDR0.PTFS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Aarch32 {
    /// Short and long descriptors.
    ShortAndLong,
    /// Long descriptors only.
    LongOnly,
    /// None.
    None,
}

/// AArch64 granules (IDR2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granules {
    /// 4 KiB.
    pub k4: bool,
    /// 16 KiB.
    pub k16: bool,
    /// 64 KiB.
    pub k64: bool,
}

/// A legal configuration cannot be made of these values.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A count is out of range.
    #[error("{what} is {value}, and must be {range}")]
    Range {
        /// Which.
        what: &'static str,
        /// Its value.
        value: u32,
        /// What is legal.
        range: &'static str,
    },
    /// Two options exclude each other.
    #[error("{0}")]
    Conflict(&'static str),
}

/// The configuration of an SMMUv2. Build one by changing [`Config::default`] or a preset; [`crate::SmmuV2::new`] checks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Stream mapping register groups: 1 to 128, or up to 1024 with the extension (more than 128 turns it on).
    pub stream_groups: u16,
    /// Context banks, 1 to 128.
    pub context_banks: u8,
    /// The first so many banks can only be stage 2.
    pub stage2_only_banks: u8,
    /// Stage 1 translation.
    pub stage1: bool,
    /// Stage 2 translation.
    pub stage2: bool,
    /// Nested translation (needs both stages).
    pub nested: bool,
    /// Address translation operations.
    pub translation_ops: bool,
    /// Stream matching (false: stream indexing).
    pub stream_matching: bool,
    /// StreamID width in bits, 1 to 15 (16 bits are reached with `extended_ids`).
    pub stream_id_bits: u8,
    /// 16-bit StreamIDs (EXIDENABLE).
    pub extended_ids: bool,
    /// Compressed StreamID indexing.
    pub compressed_index: bool,
    /// Every stream match conflict is detected (IDR1.SMCD).
    pub conflict_detection: bool,
    /// AArch32 formats.
    pub aarch32: Aarch32,
    /// AArch64 granules.
    pub granules: Granules,
    /// Intermediate address size in bits: 32, 36, 40, 42, 44 or 48.
    pub ipa_bits: u8,
    /// Output address size in bits: the same set.
    pub pa_bits: u8,
    /// Upstream bus width in bits: the same set, 49 or 64.
    pub upstream_bits: u8,
    /// Pages of 64 KiB instead of 4 KiB.
    pub page_64k: bool,
    /// Table walks are coherent (IDR0.CTTW).
    pub coherent_walk: bool,
    /// IDR0.BTM.
    pub broadcast: bool,
    /// 16-bit VMIDs.
    pub vmid16: bool,
    /// Hierarchical attributes can be disabled.
    pub hierarchy_disable: bool,
    /// Two security states.
    pub secure: bool,
    /// MMU-500 (DDI 0517): its fixed and implementation defined bits and reset values.
    pub mmu500: bool,
    /// IDR7: implementation revision.
    pub revision: u8,
    /// Number of TBUs, for TBU_PWR_STATUS of an MMU-500.
    pub tbus: u8,
    /// Entries of each port's TLB.
    pub tlb_entries: usize,
}

impl Default for Config {
    /// A plain SMMUv2 with everything this model has and no MMU-500 specifics.
    fn default() -> Self {
        Self {
            stream_groups: 64,
            context_banks: 32,
            stage2_only_banks: 0,
            stage1: true,
            stage2: true,
            nested: true,
            translation_ops: true,
            stream_matching: true,
            stream_id_bits: 15,
            extended_ids: false,
            compressed_index: false,
            conflict_detection: true,
            aarch32: Aarch32::ShortAndLong,
            granules: Granules { k4: true, k16: true, k64: true },
            ipa_bits: 48,
            pa_bits: 48,
            upstream_bits: 49,
            page_64k: false,
            coherent_walk: true,
            broadcast: false,
            vmid16: true,
            hierarchy_disable: true,
            secure: false,
            mmu500: false,
            revision: 0x10,
            tbus: 1,
            tlb_entries: portcullis_walk::tbu::DEFAULT_ENTRIES,
        }
    }
}

impl Config {
    /// The MMU-500 of a Zynq UltraScale+ (UG1085, UG1087): 48 groups, 16 banks, 48-bit sizes, 4K and 64K granules,
    /// non-coherent walks, no translation operations.
    pub fn mmu500_zynqmp() -> Self {
        Self {
            stream_groups: 48,
            context_banks: 16,
            translation_ops: false,
            conflict_detection: false,
            granules: Granules { k4: true, k16: false, k64: true },
            coherent_walk: false,
            broadcast: true,
            vmid16: false,
            hierarchy_disable: false,
            secure: true,
            mmu500: true,
            revision: 0x21,
            tbus: 6,
            ..Self::default()
        }
    }

    /// Checks that the architecture allows this configuration.
    ///
    /// # Errors
    /// Names the value that is out of range, or the options that exclude each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        let range = |ok: bool, what, value: u32, range| {
            if ok { Ok(()) } else { Err(ConfigError::Range { what, value, range }) }
        };
        let conflict = |bad: bool, why| if bad { Err(ConfigError::Conflict(why)) } else { Ok(()) };
        const SIZES: &str = "32, 36, 40, 42, 44 or 48";
        let groups = u32::from(self.stream_groups);
        range((1..=1024).contains(&groups), "stream_groups", groups, "1 to 1024")?;
        let banks = u32::from(self.context_banks);
        range((1..=128).contains(&banks), "context_banks", banks, "1 to 128")?;
        let s2 = u32::from(self.stage2_only_banks);
        range(s2 <= banks, "stage2_only_banks", s2, "at most context_banks")?;
        let bits = u32::from(self.stream_id_bits);
        range((1..=15).contains(&bits), "stream_id_bits", bits, "1 to 15")?;
        let (ipa, pa, up) = (self.ipa_bits, self.pa_bits, self.upstream_bits);
        range(address_code(ipa).is_some(), "ipa_bits", ipa.into(), SIZES)?;
        range(address_code(pa).is_some(), "pa_bits", pa.into(), SIZES)?;
        let up_ok = address_code(up).is_some() && up != 48 || up == 49 || up == 64;
        range(up_ok, "upstream_bits", up.into(), "32, 36, 40, 42, 44, 49 or 64")?;
        range(self.tlb_entries <= 1 << 20, "tlb_entries", self.tlb_entries as u32, "at most 2^20")?;
        conflict(!self.stage1 && !self.stage2, "at least one stage of translation is needed")?;
        conflict(self.nested && !(self.stage1 && self.stage2), "nested translation needs both stages")?;
        conflict(self.stage2_only_banks > 0 && !self.stage2, "stage 2 only banks need stage 2")?;
        conflict(self.translation_ops && !self.stage1, "translation operations need stage 1")?;
        conflict(!self.aarch64() && self.aarch32 == Aarch32::None, "a table format is needed")?;
        conflict(groups > 128 && !self.stream_matching, "more than 128 groups need stream matching")?;
        conflict(self.extended_ids && !self.stream_matching, "extended ids need stream matching")?;
        conflict(self.compressed_index && self.stream_matching, "compressed indexing needs stream indexing")?;
        Ok(())
    }

    /// log2 of the page size.
    pub(crate) fn page_shift(&self) -> u32 {
        if self.page_64k { 16 } else { 12 }
    }

    /// log2 of the number of global pages.
    fn global_pages_log2(&self) -> u32 {
        let needed: u32 = if self.compressed_index { 24 } else { 16 };
        needed.max(self.context_banks.into()).next_power_of_two().trailing_zeros()
    }

    /// Number of global pages; the context banks follow.
    pub fn global_pages(&self) -> u64 {
        1 << self.global_pages_log2()
    }

    /// Size of the register window in bytes.
    pub fn window_size(&self) -> u64 {
        (2 * self.global_pages()) << self.page_shift()
    }

    /// More than 128 stream match groups.
    pub(crate) fn extended_groups(&self) -> bool {
        self.stream_groups > 128
    }

    /// AArch64 formats exist.
    pub(crate) fn aarch64(&self) -> bool {
        self.granules.k4 || self.granules.k16 || self.granules.k64
    }

    /// Bits of a StreamID while EXIDENABLE is 0 (IDR0.NUMSIDB).
    pub(crate) fn stream_bits(&self) -> u8 {
        if self.extended_ids { 15 } else { self.stream_id_bits }
    }

    /// IDR0 as secure software reads it (non-secure reads see less).
    pub fn idr0(&self) -> Idr0 {
        Idr0::new()
            .with_numsmrg(self.stream_groups.min(128) as u8)
            .with_exids(self.extended_ids)
            .with_numsidb(self.stream_bits())
            .with_btm(self.broadcast)
            .with_cttw(self.coherent_walk)
            .with_exsmrgs(self.extended_groups())
            .with_numirpt(1)
            .with_ptfs(match self.aarch32 {
                Aarch32::ShortAndLong => 0,
                Aarch32::LongOnly => 1,
                Aarch32::None => 2,
            })
            .with_atosns(!self.translation_ops)
            .with_sms(self.stream_matching)
            .with_nts(self.nested)
            .with_s2ts(self.stage2)
            .with_s1ts(self.stage1)
            .with_ses(self.secure)
    }

    /// IDR1 as secure software reads it.
    pub fn idr1(&self) -> Idr1 {
        Idr1::new()
            .with_numcb(self.context_banks)
            .with_numssdndxb(if self.mmu500 { 15 } else { 0 })
            .with_smcd(self.conflict_detection)
            .with_nums2cb(self.stage2_only_banks)
            .with_numpagendxb((self.global_pages_log2() - 1) as u8)
            .with_pagesize(self.page_64k)
    }

    /// IDR2.
    pub fn idr2(&self) -> Idr2 {
        let code = |bits| address_code(bits).unwrap_or(5);
        Idr2::new()
            .with_ias(code(self.ipa_bits))
            .with_oas(code(self.pa_bits))
            .with_ubs(match self.upstream_bits {
                64 => 15,
                49 => 5,
                b => code(b),
            })
            .with_ptfsv8_4k(self.granules.k4)
            .with_ptfsv8_16k(self.granules.k16)
            .with_ptfsv8_64k(self.granules.k64)
            .with_vmid16s(self.vmid16)
            .with_exnumsmrg(if self.extended_groups() { self.stream_groups } else { 0 })
            .with_hads(self.hierarchy_disable)
            .with_compindexs(self.compressed_index)
    }

    /// CR0 at reset.
    pub(crate) fn cr0_reset(&self) -> Cr0 {
        Cr0::new().with_clientpd(true).with_smcfcfg(self.mmu500)
    }

    /// SCR1 at reset: everything belongs to the non-secure side.
    pub(crate) fn scr1_reset(&self) -> Scr1 {
        Scr1::new()
            .with_nsnumcbo(self.context_banks)
            .with_nsnumsmrgo(self.stream_groups.min(128) as u8)
            .with_nsnumirpto(1)
            .with_gefro(self.mmu500)
    }

    /// The address bits that the bus delivers.
    pub(crate) fn upstream_mask(&self) -> u64 {
        if self.upstream_bits >= 64 { u64::MAX } else { (1 << self.upstream_bits) - 1 }
    }

    /// Bits that an AArch64 PASize code stands for, at most the output size of the SMMU.
    pub(crate) fn limited(&self, code: u8, limit: u8) -> u8 {
        address_bits(code).min(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zynqmp_identifies_itself_as_the_documents_say() {
        let c = Config::mmu500_zynqmp();
        c.check().unwrap();
        assert_eq!(c.idr0().into_bits(), 0xfc01_3e30);
        assert_eq!(c.idr1().into_bits(), 0x3000_0f10);
        assert_eq!(c.idr2().into_bits(), 0x0000_5555);
        assert_eq!(c.window_size(), 0x2_0000);
        assert_eq!(c.scr1_reset().into_bits(), 0x0201_3010);
        assert_eq!(c.cr0_reset().into_bits(), 0x0020_0001);
    }

    #[test]
    fn impossible_configurations_are_named() {
        let c = |f: fn(&mut Config)| {
            let mut c = Config::default();
            f(&mut c);
            c.check().unwrap_err().to_string()
        };
        assert_eq!(c(|c| c.stream_groups = 0), "stream_groups is 0, and must be 1 to 1024");
        assert_eq!(c(|c| c.context_banks = 129), "context_banks is 129, and must be 1 to 128");
        assert_eq!(c(|c| c.ipa_bits = 39), "ipa_bits is 39, and must be 32, 36, 40, 42, 44 or 48");
        assert!(c(|c| c.stage2 = false).contains("nested"));
        assert!(c(|c| c.compressed_index = true).contains("stream indexing"));
    }

    #[test]
    fn large_configurations_fit_their_window() {
        let c = Config { stream_groups: 1024, context_banks: 128, page_64k: true, ..Config::default() };
        c.check().unwrap();
        assert_eq!(c.window_size(), 2 * 128 * 0x1_0000);
        assert_eq!(c.idr2().exnumsmrg(), 1024);
        assert_eq!(c.idr0().numsmrg(), 128);
    }
}
