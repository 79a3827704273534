//! Fault records of SMMUv2: decoding FSR, FSYNR0, GFSR and their companions, and Linux's log lines for them.

use core::fmt;

use portcullis_arch::smmuv2::{Fsr, Fsynr0, Gfsr, Gfsynr0};
use portcullis_arch::{Access, Iova, Ipa, StreamId};

use crate::fault::{FaultDetail, FaultReason, FaultReport};

/// FSR bits that make a context fault: the write-one-to-clear ones and SS.
pub(super) const CONTEXT_FAULT: u32 = Fsr::W1C | 1 << 30;

/// The registers as they were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextRegisters {
    /// CBn_FAR.
    pub far: u64,
    /// CBn_FSR.
    pub fsr: u32,
    /// CBn_FSYNR0.
    pub fsynr0: u32,
    /// CBFRSYNRAn.
    pub cbfrsynra: u32,
    /// CBn_IPAFAR, of a stage 2 bank.
    pub ipafar: Option<u64>,
}

/// Descriptor format of a faulting bank (FSR.FORMAT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AArch32 short descriptors.
    Aarch32Short,
    /// AArch32 long descriptors.
    Aarch32Long,
    /// AArch64.
    Aarch64,
}

/// One context fault, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextFault {
    /// The bank that recorded it.
    pub bank: u8,
    /// Kinds of fault; more than one bit may be set.
    pub flags: Fsr,
    /// The address that the device issued. In a stage 2 bank without stage 1 on top, an IPA in the device's sense.
    pub iova: Iova,
    /// What stage 2 was asked for, if it faulted and the register is valid for this kind of fault.
    pub ipa: Option<Ipa>,
    /// Read or write.
    pub access: Access,
    /// Privileged, after PRIVCFG.
    pub privileged: bool,
    /// Instruction fetch, after INSTCFG.
    pub instruction: bool,
    /// Table level.
    pub level: u8,
    /// The stream.
    pub stream: StreamId,
    /// Stage of the bank: 1 or 2.
    pub stage: u8,
    /// Stage 2 bank: the transaction came through a stage 1 bank first.
    pub nested: bool,
    /// Stage 2 bank: the access that faulted was the walk of a stage 1 table.
    pub stage1_walk: bool,
    /// Stage 2 bank and nested: the stage 1 bank. Stage 1 banks of real MMU-500s show noise here.
    pub stage1_bank: Option<u8>,
    /// The transaction waits for RESUME.
    pub stalled: bool,
    /// More faults came while this one was recorded.
    pub multiple: bool,
    /// Descriptor format.
    pub format: Format,
    /// The raw registers.
    pub raw: ContextRegisters,
}

impl ContextFault {
    /// Decodes the registers of a bank of stage `stage`.
    pub fn decode(bank: u8, stage: u8, raw: ContextRegisters) -> Self {
        let (fsr, syndrome) = (Fsr::from_bits(raw.fsr), Fsynr0::from_bits(raw.fsynr0));
        let stage2 = stage == 2;
        let nested = stage2 && syndrome.nested();
        let stage1_walk = stage2 && syndrome.s1ptwf();
        // For a permission fault IPAFAR means something only if the walk of a stage 1 table met it.
        let ipa_valid = fsr.tf() || fsr.aff() || fsr.ef() || fsr.asf() || (nested && stage1_walk);
        Self {
            bank,
            flags: fsr,
            iova: Iova(raw.far),
            ipa: raw.ipafar.filter(|_| ipa_valid).map(Ipa),
            access: if syndrome.wnr() { Access::Write } else { Access::Read },
            privileged: syndrome.pnu(),
            instruction: syndrome.ind(),
            level: syndrome.plvl(),
            stream: StreamId(raw.cbfrsynra & 0xffff),
            stage,
            nested,
            stage1_walk,
            stage1_bank: nested.then(|| syndrome.s1cbndx()),
            stalled: fsr.ss(),
            multiple: fsr.multi(),
            format: match fsr.format() {
                0 => Format::Aarch32Short,
                1 => Format::Aarch32Long,
                _ => Format::Aarch64,
            },
            raw,
        }
    }

    /// The kind, or the first of several in the order in which the hardware checks.
    pub fn reason(&self) -> FaultReason {
        let fsr = self.flags;
        let kinds = [
            (fsr.tf(), FaultReason::Translation),
            (fsr.asf(), FaultReason::AddressSize),
            (fsr.aff(), FaultReason::AccessFlag),
            (fsr.pf(), FaultReason::Permission),
            (fsr.ef(), FaultReason::ExternalAbort),
            (fsr.tlbmcf() || fsr.tlblkf(), FaultReason::TlbConflict),
            (fsr.uut(), FaultReason::Unsupported),
        ];
        kinds.iter().find(|(set, _)| *set).map_or(FaultReason::Other, |(_, reason)| *reason)
    }

    /// In terms that every IOMMU has.
    pub fn report(&self) -> FaultReport {
        FaultReport {
            reason: self.reason(),
            stream: Some(self.stream),
            substream: None,
            iova: self.iova,
            ipa: self.ipa,
            access: self.access,
            privileged: self.privileged,
            instruction: self.instruction,
            stage: Some(self.stage),
            level: Some(self.level),
            bank: Some(self.bank),
            stalled: self.stalled,
            detail: FaultDetail::SmmuV2Context(*self),
        }
    }

    /// The three lines of Linux 6.12 (`arm_smmu_print_context_fault_info`) for an SMMU named `device`
    /// (`fd800000.iommu`).
    pub fn linux_lines<'a>(&'a self, device: &'a str) -> impl fmt::Display + 'a {
        ContextLines { fault: self, device }
    }
}

struct ContextLines<'a> {
    fault: &'a ContextFault,
    device: &'a str,
}

/// Writes the names whose bit is set, each with a space before it.
fn names(f: &mut fmt::Formatter<'_>, names: &[(bool, &str)]) -> fmt::Result {
    names.iter().filter(|(set, _)| *set).try_for_each(|(_, name)| write!(f, " {name}"))
}

impl fmt::Display for ContextLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, device } = self;
        let (raw, fsr, syndrome) = (fault.raw, fault.flags, Fsynr0::from_bits(fault.raw.fsynr0));
        writeln!(
            f,
            "arm-smmu {device}: Unhandled context fault: fsr={:#x}, iova=0x{:08x}, fsynr={:#x}, cbfrsynra={:#x}, cb={}",
            raw.fsr, raw.far, raw.fsynr0, raw.cbfrsynra, fault.bank
        )?;
        write!(f, "arm-smmu {device}: FSR    = {:08x} [", raw.fsr)?;
        for (_, name) in [(fsr.multi(), "MULTI "), (fsr.ss(), "SS ")].iter().filter(|(set, _)| *set) {
            f.write_str(name)?;
        }
        write!(f, "Format={}", fsr.format())?;
        names(
            f,
            &[
                (fsr.uut(), "UUT"),
                (fsr.asf(), "ASF"),
                (fsr.tlblkf(), "TLBLKF"),
                (fsr.tlbmcf(), "TLBMCF"),
                (fsr.ef(), "EF"),
                (fsr.pf(), "PF"),
                (fsr.aff(), "AFF"),
                (fsr.tf(), "TF"),
            ],
        )?;
        writeln!(f, "], SID={:#x}", fault.stream.get())?;
        write!(f, "arm-smmu {device}: FSYNR0 = {:08x} [S1CBNDX={}", raw.fsynr0, syndrome.s1cbndx())?;
        names(
            f,
            &[
                (syndrome.afr(), "AFR"),
                (syndrome.ptwf(), "PTWF"),
                (syndrome.nsattr(), "NSATTR"),
                (syndrome.ind(), "IND"),
                (syndrome.pnu(), "PNU"),
                (syndrome.wnr(), "WNR"),
            ],
        )?;
        write!(f, " PLVL={}]", syndrome.plvl())
    }
}

/// One global fault: a transaction that did not get as far as a context bank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GlobalFault {
    /// Kinds of fault.
    pub flags: Gfsr,
    /// GFSYNR0: what kind of access it was, before any override.
    pub syndrome: Gfsynr0,
    /// The stream (GFSYNR1).
    pub stream: StreamId,
    /// The address that the device issued (GFAR), `None` where the driver did not read it.
    pub iova: Option<Iova>,
    /// GFSYNR1, raw.
    pub gfsynr1: u32,
    /// GFSYNR2, raw; implementation defined.
    pub gfsynr2: u32,
}

impl GlobalFault {
    /// The kind, or the first of several in the order in which the hardware checks.
    pub fn reason(&self) -> FaultReason {
        let gfsr = self.flags;
        let kinds = [
            (gfsr.usf(), FaultReason::UnknownStream),
            (gfsr.smcf(), FaultReason::StreamConflict),
            (gfsr.icf() || gfsr.ucbf() || gfsr.ucif(), FaultReason::InvalidContext),
            (gfsr.caf(), FaultReason::RegisterAccess),
            (gfsr.ef(), FaultReason::ExternalAbort),
            (gfsr.pf(), FaultReason::Permission),
            (gfsr.uut(), FaultReason::Unsupported),
        ];
        kinds.iter().find(|(set, _)| *set).map_or(FaultReason::Other, |(_, reason)| *reason)
    }

    /// In terms that every IOMMU has.
    pub fn report(&self) -> FaultReport {
        FaultReport {
            reason: self.reason(),
            // A register access of the CPU has no stream, and for an external fault it is unknown.
            stream: (!self.flags.caf() && !self.flags.ef()).then_some(self.stream),
            substream: None,
            iova: self.iova.unwrap_or_default(),
            ipa: None,
            access: if self.syndrome.wnr() { Access::Write } else { Access::Read },
            privileged: self.syndrome.pnu(),
            instruction: self.syndrome.ind(),
            stage: None,
            level: None,
            bank: None,
            stalled: false,
            detail: FaultDetail::SmmuV2Global(*self),
        }
    }

    /// The two lines of Linux 6.12 (`arm_smmu_global_fault`) for an SMMU named `device`.
    pub fn linux_lines<'a>(&'a self, device: &'a str) -> impl fmt::Display + 'a {
        GlobalLines { fault: self, device }
    }
}

struct GlobalLines<'a> {
    fault: &'a GlobalFault,
    device: &'a str,
}

impl fmt::Display for GlobalLines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, device } = self;
        if fault.flags.usf() {
            writeln!(
                f,
                "arm-smmu {device}: Blocked unknown Stream ID {:#x}; boot with \"arm-smmu.disable_bypass=0\" to allow, \
                 but this may have security implications",
                fault.stream.get()
            )?;
        } else {
            writeln!(f, "arm-smmu {device}: Unexpected global fault, this could be serious")?;
        }
        write!(
            f,
            "arm-smmu {device}: \tGFSR 0x{:08x}, GFSYNR0 0x{:08x}, GFSYNR1 0x{:08x}, GFSYNR2 0x{:08x}",
            fault.flags.into_bits(),
            fault.syndrome.into_bits(),
            fault.gfsynr1,
            fault.gfsynr2
        )
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn the_field_example_decodes_and_prints_as_linux_prints_it() {
        let raw =
            ContextRegisters { far: 0x7000_2000, fsr: 0x402, fsynr0: 0x11, cbfrsynra: 0x200, ipafar: None };
        let fault = ContextFault::decode(0, 1, raw);
        assert_eq!((fault.reason(), fault.access, fault.level), (FaultReason::Translation, Access::Write, 1));
        assert_eq!((fault.format, fault.stalled, fault.multiple), (Format::Aarch64, false, false));
        assert_eq!(
            fault.linux_lines("fd800000.iommu").to_string(),
            "arm-smmu fd800000.iommu: Unhandled context fault: fsr=0x402, iova=0x70002000, fsynr=0x11, cbfrsynra=0x200, \
             cb=0\n\
             arm-smmu fd800000.iommu: FSR    = 00000402 [Format=2 TF], SID=0x200\n\
             arm-smmu fd800000.iommu: FSYNR0 = 00000011 [S1CBNDX=0 WNR PLVL=1]"
        );
    }

    #[test]
    fn stage_1_banks_show_noise_in_s1cbndx_and_it_is_not_believed() {
        let raw = ContextRegisters { fsr: 0x402, fsynr0: 0x30_0003, ..Default::default() };
        assert_eq!(ContextFault::decode(3, 1, raw).stage1_bank, None);
        let raw =
            ContextRegisters { fsr: 0x402, fsynr0: 0x03_0007, ipafar: Some(0x5000), ..Default::default() };
        let nested = ContextFault::decode(1, 2, raw);
        assert_eq!((nested.stage1_bank, nested.ipa), (Some(3), Some(Ipa(0x5000))));
    }

    #[test]
    fn ipafar_of_a_permission_fault_counts_only_for_a_stage_1_walk() {
        let raw =
            |fsynr0| ContextRegisters { fsr: 0x408, fsynr0, ipafar: Some(0x5000), ..Default::default() };
        assert_eq!(ContextFault::decode(0, 2, raw(0x7)).ipa, None);
        assert_eq!(ContextFault::decode(0, 2, raw(0xf)).ipa, Some(Ipa(0x5000)));
    }

    #[test]
    fn several_flags_print_in_linux_order() {
        let raw =
            ContextRegisters { far: 0x1000, fsr: 0xc000_0408, fsynr0: 0x73, cbfrsynra: 0x14e8, ipafar: None };
        let text = ContextFault::decode(5, 1, raw).linux_lines("s").to_string();
        assert!(text.contains("FSR    = c0000408 [MULTI SS Format=2 PF], SID=0x14e8"), "{text}");
        assert!(text.contains("FSYNR0 = 00000073 [S1CBNDX=0 IND PNU WNR PLVL=3]"), "{text}");
    }

    #[test]
    fn an_unknown_stream_prints_as_linux_prints_it() {
        let fault = GlobalFault {
            flags: Gfsr::from_bits(0x8000_0002),
            syndrome: Gfsynr0::from_bits(0),
            stream: StreamId(0x201),
            iova: None,
            gfsynr1: 0x201,
            gfsynr2: 0,
        };
        assert_eq!(fault.reason(), FaultReason::UnknownStream);
        assert_eq!(
            fault.linux_lines("fd800000.smmu").to_string(),
            "arm-smmu fd800000.smmu: Blocked unknown Stream ID 0x201; boot with \"arm-smmu.disable_bypass=0\" to allow, but \
             this may have security implications\n\
             arm-smmu fd800000.smmu: \tGFSR 0x80000002, GFSYNR0 0x00000000, GFSYNR1 0x00000201, GFSYNR2 0x00000000"
        );
    }
}
