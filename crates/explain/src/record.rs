//! Fault registers: what they say by name, in one sentence, and as Linux prints them.

use std::fmt;

use portcullis_arch::smmuv2::offset::{cb, gr0};
use portcullis_arch::smmuv2::{Fsr, Fsynr0, Gfsr, Gfsynr0};
use portcullis_arch::{Access, Attributes, Iova, StreamId};
use portcullis_bus::{Initiator, Memory};
use portcullis_smmuv2::SmmuV2;
use serde::Serialize;

use crate::bank::fsr_names;
use crate::line::Field;
use crate::probe::Probe;
use crate::words;

/// The fault registers of a context bank, as Linux's handler reads them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ContextRecord {
    /// Context bank.
    pub bank: u32,
    /// FSR.
    pub fsr: u32,
    /// FAR.
    pub far: u64,
    /// FSYNR0.
    pub fsynr0: u32,
    /// CBFRSYNRA.
    pub cbfrsynra: u32,
}

/// The global fault registers of one security state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GlobalRecord {
    /// GFSR.
    pub gfsr: u32,
    /// GFSYNR0.
    pub gfsynr0: u32,
    /// GFSYNR1.
    pub gfsynr1: u32,
    /// GFSYNR2; implementation defined.
    pub gfsynr2: u32,
    /// GFAR, where it is known: Linux does not print it.
    pub gfar: Option<u64>,
}

/// `an unprivileged write`, `a privileged instruction fetch`.
pub(crate) fn access_words(write: bool, privileged: bool, instruction: bool) -> String {
    let privilege = if privileged { "a privileged" } else { "an unprivileged" };
    let what = match (write, instruction) {
        (true, _) => "write",
        (false, true) => "instruction fetch",
        (false, false) => "read",
    };
    format!("{privilege} {what}")
}

fn initiator(stream: u32, privileged: bool, instruction: bool, non_secure: bool) -> Initiator {
    let attrs = Attributes::DEVICE_DEFAULT
        .with_privileged(privileged)
        .with_instruction(instruction)
        .with_non_secure(non_secure);
    Initiator::new(StreamId(stream)).with_attrs(attrs)
}

impl ContextRecord {
    /// Reads the registers of a bank of the model, whether or not they hold a fault; nothing is cleared.
    pub fn read<M: Memory>(smmu: &SmmuV2<M>, bank: u8) -> Self {
        Probe::of(smmu).map_or_else(Self::default, |p| Self::of(&p, bank))
    }

    pub(crate) fn of<M: Memory>(probe: &Probe<'_, M>, bank: u8) -> Self {
        Self {
            bank: bank.into(),
            fsr: probe.bank32(bank, cb::FSR),
            far: probe.bank64(bank, cb::FAR),
            fsynr0: probe.bank32(bank, cb::FSYNR0),
            cbfrsynra: probe.cbfrsynra(bank),
        }
    }

    /// True if a fault bit is set.
    pub fn is_fault(&self) -> bool {
        self.fsr & (Fsr::W1C | 1 << 30) != 0
    }

    /// The stream whose transaction faulted.
    pub fn stream(&self) -> StreamId {
        StreamId(self.cbfrsynra & 0xffff)
    }

    /// The transaction that faulted, to explain it again. Its privilege and instruction bit are those after S2CR.
    pub fn transaction(&self) -> (Initiator, Iova, Access) {
        let s = Fsynr0::from_bits(self.fsynr0);
        let access = if s.wnr() { Access::Write } else { Access::Read };
        (initiator(self.stream().get(), s.pnu(), s.ind(), true), Iova(self.far), access)
    }

    /// The fields by name.
    pub fn fields(&self) -> Vec<Field> {
        let (fsr, syn) = (Fsr::from_bits(self.fsr), Fsynr0::from_bits(self.fsynr0));
        let bit = |name, set: bool| Field::new(name, u8::from(set));
        vec![
            Field::new("bank", self.bank),
            Field::hex("FAR", self.far),
            Field::hex("stream", self.stream()),
            bit("TF", fsr.tf()),
            bit("AFF", fsr.aff()),
            bit("PF", fsr.pf()),
            bit("EF", fsr.ef()),
            bit("TLBMCF", fsr.tlbmcf()),
            bit("TLBLKF", fsr.tlblkf()),
            bit("ASF", fsr.asf()),
            bit("UUT", fsr.uut()),
            bit("SS", fsr.ss()),
            bit("MULTI", fsr.multi()),
            Field::new("FORMAT", format_name(fsr.format())),
            Field::new("PLVL", syn.plvl()),
            bit("WNR", syn.wnr()),
            bit("PNU", syn.pnu()),
            bit("IND", syn.ind()),
            bit("NSATTR", syn.nsattr()),
            bit("NESTED", syn.nested()),
            bit("S1PTWF", syn.s1ptwf()),
            bit("PTWF", syn.ptwf()),
            bit("AFR", syn.afr()),
            Field::new("S1CBNDX", syn.s1cbndx()),
        ]
    }

    /// Linux's three lines (`arm_smmu_print_context_fault_info`, 6.12; older kernels print the first only) for an
    /// SMMU named like `fd800000.iommu`.
    pub fn linux_lines(&self, device: &str) -> [String; 3] {
        let (fsr, syn) = (Fsr::from_bits(self.fsr), Fsynr0::from_bits(self.fsynr0));
        let set = |names: &[(bool, &str)]| -> String {
            names.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect()
        };
        let before = set(&[(fsr.multi(), "MULTI "), (fsr.ss(), "SS ")]);
        let after = set(&[
            (fsr.uut(), " UUT"),
            (fsr.asf(), " ASF"),
            (fsr.tlblkf(), " TLBLKF"),
            (fsr.tlbmcf(), " TLBMCF"),
            (fsr.ef(), " EF"),
            (fsr.pf(), " PF"),
            (fsr.aff(), " AFF"),
            (fsr.tf(), " TF"),
        ]);
        let syndrome = set(&[
            (syn.afr(), " AFR"),
            (syn.ptwf(), " PTWF"),
            (syn.nsattr(), " NSATTR"),
            (syn.ind(), " IND"),
            (syn.pnu(), " PNU"),
            (syn.wnr(), " WNR"),
        ]);
        [
            format!(
                "arm-smmu {device}: Unhandled context fault: fsr={:#x}, iova=0x{:08x}, fsynr={:#x}, \
                 cbfrsynra={:#x}, cb={}",
                self.fsr, self.far, self.fsynr0, self.cbfrsynra, self.bank
            ),
            format!(
                "arm-smmu {device}: FSR    = {:08x} [{before}Format={}{after}], SID={:#x}",
                self.fsr,
                fsr.format(),
                self.cbfrsynra
            ),
            format!(
                "arm-smmu {device}: FSYNR0 = {:08x} [S1CBNDX={}{syndrome} PLVL={}]",
                self.fsynr0,
                syn.s1cbndx(),
                syn.plvl()
            ),
        ]
    }
}

fn format_name(code: u8) -> &'static str {
    match code {
        0 => "AArch32 short",
        1 => "AArch32 long",
        _ => "AArch64",
    }
}

/// The kinds of fault in an FSR, as sentences begin.
fn context_kind(fsr: Fsr) -> String {
    let kinds: Vec<&str> = [
        (fsr.tf(), "translation fault (no valid descriptor for the address)"),
        (fsr.asf(), "address size fault (an address in the tables is too wide)"),
        (fsr.aff(), "access flag fault (AF=0 in the descriptor)"),
        (fsr.pf(), "permission fault (the descriptor forbids this access)"),
        (fsr.ef(), "external abort (memory refused an access, usually a table walk)"),
        (fsr.tlbmcf(), "TLB match conflict (two TLB entries for one address)"),
        (fsr.tlblkf(), "TLB lock fault"),
        (fsr.uut(), "unsupported upstream transaction"),
    ]
    .into_iter()
    .filter_map(|(set, name)| set.then_some(name))
    .collect();
    words::list(&kinds)
}

/// One sentence.
impl fmt::Display for ContextRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fsr, syn) = (Fsr::from_bits(self.fsr), Fsynr0::from_bits(self.fsynr0));
        let kind = context_kind(fsr);
        if kind.is_empty() && !fsr.ss() {
            return write!(f, "context bank {}: no fault is recorded", self.bank);
        }
        let kind = if kind.is_empty() { "fault whose bits are cleared already".into() } else { kind };
        write!(
            f,
            "context bank {}: {kind} at level {} on {} of {:#x} by stream {:#x} ({} tables)",
            self.bank,
            syn.plvl(),
            access_words(syn.wnr(), syn.pnu(), syn.ind()),
            self.far,
            self.stream(),
            format_name(fsr.format())
        )?;
        if fsr.ss() {
            f.write_str("; the transaction is stalled and waits for RESUME")?;
        }
        if fsr.multi() {
            f.write_str("; more faults came before this one was cleared (MULTI)")?;
        }
        Ok(())
    }
}

impl GlobalRecord {
    /// Reads the registers of one security state of the model; nothing is cleared.
    pub fn read<M: Memory>(smmu: &SmmuV2<M>, secure: bool) -> Self {
        let Some(p) = Probe::of(smmu) else { return Self::default() };
        let get = |at| p.banked32(at, secure);
        Self {
            gfsr: get(gr0::GFSR),
            gfsynr0: get(gr0::GFSYNR0),
            gfsynr1: get(gr0::GFSYNR1),
            gfsynr2: get(gr0::GFSYNR2),
            gfar: Some(u64::from(get(gr0::GFAR)) | u64::from(get(gr0::GFAR + 4)) << 32),
        }
    }

    /// The stream of the transaction that faulted. Means nothing for a configuration access or an external fault.
    pub fn stream(&self) -> StreamId {
        StreamId(self.gfsynr1 & 0xffff)
    }

    /// The transaction that faulted, to explain it again; `None` without GFAR.
    pub fn transaction(&self) -> Option<(Initiator, Iova, Access)> {
        let s = Gfsynr0::from_bits(self.gfsynr0);
        let access = if s.wnr() { Access::Write } else { Access::Read };
        // The syndrome says whether the attribute was non-secure; Linux, which is non-secure, sees no other streams.
        Some((initiator(self.stream().get(), s.pnu(), s.ind(), true), Iova(self.gfar?), access))
    }

    /// The fields by name.
    pub fn fields(&self) -> Vec<Field> {
        let (g, s) = (Gfsr::from_bits(self.gfsr), Gfsynr0::from_bits(self.gfsynr0));
        let bit = |name, set: bool| Field::new(name, u8::from(set));
        let mut fields = vec![
            Field::hex("stream", self.stream()),
            bit("ICF", g.icf()),
            bit("USF", g.usf()),
            bit("SMCF", g.smcf()),
            bit("UCBF", g.ucbf()),
            bit("UCIF", g.ucif()),
            bit("CAF", g.caf()),
            bit("EF", g.ef()),
            bit("PF", g.pf()),
            bit("UUT", g.uut()),
            bit("MULTI", g.multi()),
            bit("NESTED", s.nested()),
            bit("WNR", s.wnr()),
            bit("PNU", s.pnu()),
            bit("IND", s.ind()),
            bit("NSATTR", s.nsattr()),
        ];
        fields.extend(self.gfar.map(|far| Field::hex("GFAR", far)));
        fields
    }

    /// Linux's two lines (`arm_smmu_global_fault`, 6.12, with CONFIG_ARM_SMMU_DISABLE_BYPASS_BY_DEFAULT).
    pub fn linux_lines(&self, device: &str) -> [String; 2] {
        let first = if Gfsr::from_bits(self.gfsr).usf() {
            format!(
                "arm-smmu {device}: Blocked unknown Stream ID {:#x}; boot with \"arm-smmu.disable_bypass=0\" to \
                 allow, but this may have security implications",
                self.gfsynr1 & 0xffff
            )
        } else {
            format!("arm-smmu {device}: Unexpected global fault, this could be serious")
        };
        let second = format!(
            "arm-smmu {device}: \tGFSR 0x{:08x}, GFSYNR0 0x{:08x}, GFSYNR1 0x{:08x}, GFSYNR2 0x{:08x}",
            self.gfsr, self.gfsynr0, self.gfsynr1, self.gfsynr2
        );
        [first, second]
    }
}

/// One sentence.
impl fmt::Display for GlobalRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (g, s) = (Gfsr::from_bits(self.gfsr), Gfsynr0::from_bits(self.gfsynr0));
        let kinds: Vec<&str> = [
            (g.usf(), "unidentified stream (no stream match register holds it)"),
            (g.smcf(), "stream match conflict (several stream match registers hold it)"),
            (
                g.icf() && !s.nested(),
                "invalid context (S2CR of the stream is of type fault: no domain is attached)",
            ),
            (g.icf() && s.nested(), "invalid context (the context bank's CBAR.TYPE cannot be used)"),
            (g.ucbf(), "unimplemented context bank"),
            (g.ucif(), "unimplemented context interrupt"),
            (g.caf(), "configuration access fault (a CPU touched a register it may not)"),
            (g.ef(), "external fault"),
            (g.pf(), "permission fault (secure instruction fetch from non-secure memory)"),
            (g.uut(), "unsupported upstream transaction"),
        ]
        .into_iter()
        .filter_map(|(set, name)| set.then_some(name))
        .collect();
        if kinds.is_empty() {
            return f.write_str("no global fault is recorded");
        }
        write!(f, "global fault: {}", words::list(&kinds))?;
        if !g.caf() && !g.ef() {
            write!(f, " on {}", access_words(s.wnr(), s.pnu(), s.ind()))?;
            if let Some(far) = self.gfar {
                write!(f, " of {far:#x}")?;
            }
            write!(f, " by stream {:#x}", self.stream())?;
        }
        if g.multi() {
            f.write_str("; more faults came before this one was cleared (MULTI)")?;
        }
        Ok(())
    }
}

/// The fault bits of an FSR by name, for messages elsewhere.
pub(crate) fn fault_bits(fsr: u32) -> String {
    words::list(&fsr_names(fsr))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELD_EXAMPLE: ContextRecord =
        ContextRecord { bank: 0, fsr: 0x402, far: 0x7000_2000, fsynr0: 0x11, cbfrsynra: 0x200 };

    #[test]
    fn a_context_fault_prints_as_linux_prints_it() {
        assert_eq!(
            FIELD_EXAMPLE.linux_lines("fd800000.iommu"),
            [
                "arm-smmu fd800000.iommu: Unhandled context fault: fsr=0x402, iova=0x70002000, fsynr=0x11, \
                 cbfrsynra=0x200, cb=0",
                "arm-smmu fd800000.iommu: FSR    = 00000402 [Format=2 TF], SID=0x200",
                "arm-smmu fd800000.iommu: FSYNR0 = 00000011 [S1CBNDX=0 WNR PLVL=1]",
            ]
        );
        let all = ContextRecord { fsr: 0xc000_0408, fsynr0: 0x54_0573, ..FIELD_EXAMPLE };
        let lines = all.linux_lines("s");
        assert_eq!(lines[1], "arm-smmu s: FSR    = c0000408 [MULTI SS Format=2 PF], SID=0x200");
        assert_eq!(lines[2], "arm-smmu s: FSYNR0 = 00540573 [S1CBNDX=84 PTWF NSATTR IND PNU WNR PLVL=3]");
    }

    #[test]
    fn a_context_fault_is_one_plain_sentence() {
        assert_eq!(
            FIELD_EXAMPLE.to_string(),
            "context bank 0: translation fault (no valid descriptor for the address) at level 1 on an unprivileged write \
             of 0x70002000 by stream 0x200 (AArch64 tables)"
        );
        let quiet = ContextRecord { fsr: 0x400, ..FIELD_EXAMPLE };
        assert!(!quiet.is_fault());
        assert_eq!(quiet.to_string(), "context bank 0: no fault is recorded");
        let held = ContextRecord { fsr: 0x8000_0408, fsynr0: 0x63, ..FIELD_EXAMPLE };
        assert!(held.to_string().contains("on a privileged instruction fetch of 0x70002000"), "{held}");
        assert!(held.to_string().ends_with("(MULTI)"), "{held}");
    }

    #[test]
    fn the_published_unknown_stream_prints_as_linux_prints_it() {
        // tapasco issue 344: a second PE on HPC0.
        let r = GlobalRecord { gfsr: 0x8000_0002, gfsynr1: 0x201, ..GlobalRecord::default() };
        assert_eq!(
            r.linux_lines("fd800000.smmu"),
            [
                "arm-smmu fd800000.smmu: Blocked unknown Stream ID 0x201; boot with \"arm-smmu.disable_bypass=0\" to allow, \
                 but this may have security implications",
                "arm-smmu fd800000.smmu: \tGFSR 0x80000002, GFSYNR0 0x00000000, GFSYNR1 0x00000201, GFSYNR2 0x00000000",
            ]
        );
        assert_eq!(
            r.to_string(),
            "global fault: unidentified stream (no stream match register holds it) on an unprivileged read by stream 0x201; \
             more faults came before this one was cleared (MULTI)"
        );
    }

    #[test]
    fn fields_carry_the_architectures_names() {
        let get = |name: &str| {
            FIELD_EXAMPLE.fields().into_iter().find(|f| f.name == name).map(|f| f.value).unwrap()
        };
        assert_eq!((get("TF"), get("WNR"), get("PLVL")), ("1".into(), "1".into(), "1".into()));
        assert_eq!((get("FORMAT"), get("stream")), ("AArch64".into(), "0x200".into()));
        let (from, va, access) = FIELD_EXAMPLE.transaction();
        assert_eq!((from.stream, va, access), (StreamId(0x200), Iova(0x7000_2000), Access::Write));
    }
}
