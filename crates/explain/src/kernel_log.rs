//! Lines of a kernel log about faults, back into registers and records. For SMMUv2 accepts Linux from the first driver to
//! 6.12 and the variants that NVIDIA's and Qualcomm's kernels print; for SMMUv3 see [`v3::kernel`](crate::v3::kernel).
//! Prefixes (time stamps, priorities) do not matter.

use serde::Serialize;

use crate::record::{ContextRecord, GlobalRecord};
use crate::v3::command::{CommandError, GlobalErrors};
use crate::v3::kernel::{self, EventDetailLine, EventLine, PageRequestLine};
use crate::v3::record::EventWords;

/// A line that was understood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KernelLine {
    /// The SMMU's device name, where the line has one: `fd800000.iommu`.
    pub device: Option<String>,
    /// What it says.
    pub message: KernelMessage,
}

/// What a line says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub enum KernelMessage {
    /// `Unhandled context fault: ...`
    ContextFault(ContextLine),
    /// `FSR    = 00000402 [Format=2 TF], SID=0x200`
    ContextFsr {
        /// FSR.
        fsr: u32,
        /// The stream, where the line says it.
        stream: Option<u32>,
    },
    /// `FSYNR0 = 00000011 [S1CBNDX=0 WNR PLVL=1]`
    ContextFsynr0 {
        /// FSYNR0.
        fsynr0: u32,
    },
    /// `FAR    = 0000000070002000` (Qualcomm)
    ContextFar {
        /// FAR.
        far: u64,
    },
    /// `Blocked unknown Stream ID 0x201; ...`
    UnknownStream {
        /// The stream.
        stream: u32,
    },
    /// `Unexpected global fault, this could be serious`
    UnexpectedGlobalFault,
    /// `GFSR 0x..., GFSYNR0 0x..., GFSYNR1 0x..., GFSYNR2 0x...`
    GlobalRegisters(GlobalRecord),
    /// SMMUv3: `event 0x10 received:`, four words follow.
    EventHead {
        /// The event's code.
        code: u8,
    },
    /// SMMUv3: a word of what the lines before announce; [`parse_log`](crate::parse_log) puts them together.
    Word {
        /// The word.
        value: u64,
    },
    /// SMMUv3: an event record, whole.
    EventRecord {
        /// Its words.
        record: EventWords,
    },
    /// SMMUv3: `event: F_TRANSLATION client: ...` of newer kernels.
    Event(EventLine),
    /// SMMUv3: `unpriv data write s1 "..." stag: 0x0` of newer kernels.
    EventDetail(EventDetailLine),
    /// SMMUv3: `EVTQ overflow detected -- events lost`
    EventsLost,
    /// SMMUv3: `PRIQ overflow detected -- requests lost`
    PageRequestsLost,
    /// SMMUv3: `unexpected PRI request received:`
    UnexpectedPageRequest,
    /// SMMUv3: the line after it.
    PageRequest(PageRequestLine),
    /// SMMUv3: `unexpected global error reported (0x00000001), this could be serious`
    GlobalErrors {
        /// Those that are active.
        active: GlobalErrors,
    },
    /// SMMUv3: `CMDQ error (cons 0x01000007): Illegal command`
    CommandError(CommandError),
    /// SMMUv3: `skipping command in error state:`, two words follow.
    SkippedCommand,
    /// SMMUv3: `CMD_SYNC timeout at 0x00000012 [hwprod ..., hwcons ...]`
    SyncTimeout {
        /// Where the CMD_SYNC is.
        at: u32,
        /// CMDQ_PROD.
        prod: u32,
        /// CMDQ_CONS.
        cons: u32,
    },
}

/// The values of a context fault line; which of them are there depends on the kernel's age and vendor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ContextLine {
    /// `fsr`
    pub fsr: Option<u32>,
    /// `iova`: FAR.
    pub iova: Option<u64>,
    /// `fsynr`: FSYNR0.
    pub fsynr0: Option<u32>,
    /// `cbfrsynra`
    pub cbfrsynra: Option<u32>,
    /// `cb`: context bank.
    pub bank: Option<u32>,
    /// `sid`: stream.
    pub stream: Option<u32>,
    /// Everything else of the form `name=value`, such as `pte`.
    pub other: Vec<(String, String)>,
}

impl ContextLine {
    /// The registers, if the line has those that say what kind of fault it was. What is missing besides is 0.
    pub fn record(&self) -> Option<ContextRecord> {
        Some(ContextRecord {
            fsr: self.fsr?,
            far: self.iova?,
            fsynr0: self.fsynr0.unwrap_or(0),
            cbfrsynra: self.cbfrsynra.or(self.stream).unwrap_or(0),
            bank: self.bank.unwrap_or(0),
        })
    }
}

/// Reads one line. `None` if it is not about a fault of an SMMU, or its numbers are not numbers.
pub fn parse_line(line: &str) -> Option<KernelLine> {
    let second = || context_fault(line).or_else(|| registers(line)).or_else(|| global(line));
    let message = second().or_else(|| kernel::message(line))?;
    Some(KernelLine { device: device(line), message })
}

/// The text after `what`.
pub(crate) fn after<'a>(line: &'a str, what: &str) -> Option<&'a str> {
    line.split_once(what).map(|(_, rest)| rest)
}

/// The word between `arm-smmu` and the next colon.
fn device(line: &str) -> Option<String> {
    let (name, _) = after(line, "arm-smmu")?.split_once(": ")?;
    let name = name.trim_start_matches(|c: char| c != ' ').trim();
    (!name.is_empty() && !name.contains(char::is_whitespace)).then(|| name.to_owned())
}

/// A number at the start: hexadecimal with `0x`, else in `radix`.
pub(crate) fn number(text: &str, radix: u32) -> Option<u64> {
    let text = text.trim_start();
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (text, radix),
    };
    let end = digits.find(|c: char| !c.is_digit(radix)).unwrap_or(digits.len());
    u64::from_str_radix(digits.get(..end)?, radix).ok()
}

pub(crate) fn number32(text: &str, radix: u32) -> Option<u32> {
    number(text, radix)?.try_into().ok()
}

fn context_fault(line: &str) -> Option<KernelMessage> {
    let rest = after(line, "context fault")?;
    let mut found = ContextLine::default();
    for piece in rest.split([',', ' ', '\t', ';']) {
        let Some((name, value)) = piece.split_once('=') else { continue };
        let name = name.trim_start_matches([':', '(']);
        let value = value.trim_end_matches(')');
        let known = match name {
            "fsr" => number32(value, 16).map(|v| found.fsr = Some(v)),
            "iova" => number(value, 16).map(|v| found.iova = Some(v)),
            "fsynr" | "fsynr0" => number32(value, 16).map(|v| found.fsynr0 = Some(v)),
            "cbfrsynra" => number32(value, 16).map(|v| found.cbfrsynra = Some(v)),
            "cb" => number32(value, 10).map(|v| found.bank = Some(v)),
            "sid" => number32(value, 10).map(|v| found.stream = Some(v)),
            _ => None,
        };
        if known.is_none() && !name.is_empty() {
            found.other.push((name.to_owned(), value.to_owned()));
        }
    }
    (found.iova.is_some() || found.fsr.is_some()).then_some(KernelMessage::ContextFault(found))
}

/// The register on a line `NAME = 00000000 [...]`; not the one of `iova=` and the like.
fn assigned(line: &str, name: &str) -> Option<u64> {
    let rest = after(line, name)?;
    number(rest.trim_start_matches(' ').strip_prefix('=')?, 16)
}

fn registers(line: &str) -> Option<KernelMessage> {
    if let Some(fsynr0) = assigned(line, "FSYNR0") {
        return Some(KernelMessage::ContextFsynr0 { fsynr0: fsynr0.try_into().ok()? });
    }
    if let Some(fsr) = assigned(line, "FSR") {
        let stream = after(line, "SID=").and_then(|s| number32(s, 10));
        return Some(KernelMessage::ContextFsr { fsr: fsr.try_into().ok()?, stream });
    }
    assigned(line, "FAR").map(|far| KernelMessage::ContextFar { far })
}

fn global(line: &str) -> Option<KernelMessage> {
    if let Some(rest) = after(line, "Blocked unknown Stream ID") {
        return Some(KernelMessage::UnknownStream { stream: number32(rest, 16)? });
    }
    if line.contains("Unexpected global fault") {
        return Some(KernelMessage::UnexpectedGlobalFault);
    }
    let get = |name: &str| after(line, name).and_then(|rest| number32(rest, 16));
    Some(KernelMessage::GlobalRegisters(GlobalRecord {
        gfsr: get("GFSR ")?,
        gfsynr0: get("GFSYNR0 ")?,
        gfsynr1: get("GFSYNR1 ")?,
        gfsynr2: get("GFSYNR2 ")?,
        gfar: None,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn context(line: &str) -> ContextLine {
        match parse_line(line).unwrap().message {
            KernelMessage::ContextFault(c) => c,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn lines_with_time_stamps_and_priorities_are_read() {
        let line = "<3>[   12.345678] arm-smmu fd800000.iommu: Unhandled context fault: fsr=0x402, iova=0x70002000, \
                    fsynr=0x11, cbfrsynra=0x200, cb=0";
        let parsed = parse_line(line).unwrap();
        assert_eq!(parsed.device.as_deref(), Some("fd800000.iommu"));
        let record = context(line).record().unwrap();
        assert_eq!(
            record,
            ContextRecord { bank: 0, fsr: 0x402, far: 0x7000_2000, fsynr0: 0x11, cbfrsynra: 0x200 }
        );
    }

    #[test]
    fn old_and_vendor_lines_are_read() {
        // Before FSR was printed.
        let c = context("arm-smmu 2b400000.iommu: Unhandled context fault: iova=0x1234, fsynr=0x30001, cb=7");
        assert_eq!((c.fsr, c.iova, c.fsynr0, c.bank), (None, Some(0x1234), Some(0x3_0001), Some(7)));
        assert_eq!(c.record(), None);
        // NVIDIA L4T.
        let c = context(
            "t19x-arm-smmu: context fault: smmu0, iova=0x80000000, fsynr=0x20013, cb=3, sid=17(0x11 - AFI), \
             pgd=26c000003, pud=26c000003, pmd=0, pte=0",
        );
        assert_eq!((c.iova, c.bank, c.stream), (Some(0x8000_0000), Some(3), Some(17)));
        assert!(c.other.contains(&("pmd".into(), "0".into())), "{c:?}");
        // Qualcomm.
        let c = context(
            "arm-smmu 15000000.iommu: Unhandled context fault: fsr=0x402, iova=0x100, fsynr=0x540003, \
             cbfrsynra=0x1c03, cb=11 soft iova-to-phys=0x0000000000000000",
        );
        assert_eq!(c.record().unwrap().bank, 11);
        assert_eq!(c.other, [("iova-to-phys".to_owned(), "0x0000000000000000".to_owned())]);
        let far = parse_line("arm-smmu 15000000.apps-smmu: FAR    = 0000000070002000").unwrap();
        assert_eq!(far.message, KernelMessage::ContextFar { far: 0x7000_2000 });
    }

    #[test]
    fn other_lines_are_not_mistaken() {
        for line in [
            "",
            "arm-smmu fd800000.iommu: probing hardware configuration...",
            "arm-smmu-v3 9050000.smmuv3: probing",
            "DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0x1000 [fault reason 0x06] PTE Read access is not set",
            "Unhandled context fault",
            "Unhandled context fault: fsr=, iova=zz, cb=",
            "Blocked unknown Stream ID nothing",
            "FSR = ",
        ] {
            assert_eq!(parse_line(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(
            bank in 0u32..128, fsr: u32, far: u64, fsynr0: u32, cbfrsynra: u32
        ) {
            let record = ContextRecord { bank, fsr, far, fsynr0, cbfrsynra };
            let [first, second, third] = record.linux_lines("fd800000.iommu").map(|l| parse_line(&l).unwrap());
            prop_assert_eq!(first.device.as_deref(), Some("fd800000.iommu"));
            let KernelMessage::ContextFault(c) = first.message else { panic!("{first:?}") };
            prop_assert_eq!(c.record(), Some(record));
            prop_assert_eq!(second.message, KernelMessage::ContextFsr { fsr, stream: Some(cbfrsynra) });
            prop_assert_eq!(third.message, KernelMessage::ContextFsynr0 { fsynr0 });
        }

        #[test]
        fn global_lines_are_read_back(gfsr: u32, gfsynr0: u32, gfsynr1: u32, gfsynr2: u32) {
            let record = GlobalRecord { gfsr, gfsynr0, gfsynr1, gfsynr2, gfar: None };
            let [first, second] = record.linux_lines("s").map(|l| parse_line(&l).unwrap().message);
            if gfsr & 2 != 0 {
                prop_assert_eq!(first, KernelMessage::UnknownStream { stream: gfsynr1 & 0xffff });
            } else {
                prop_assert_eq!(first, KernelMessage::UnexpectedGlobalFault);
            }
            prop_assert_eq!(second, KernelMessage::GlobalRegisters(record));
        }

        #[test]
        fn hostile_lines_do_not_panic(line in ".*") {
            let _ = parse_line(&line);
        }

        #[test]
        fn hostile_lines_that_begin_well_do_not_panic(
            head in prop::sample::select(vec![
                "arm-smmu", "arm-smmu x: ", "context fault", "context fault: fsr=", "iova=0x", "FSR    =", "FSYNR0 = ",
                "GFSR 0x", "Blocked unknown Stream ID 0x", "FAR=", "sid=0x", "GFSYNR0 ", "GFSYNR1 ", "GFSYNR2 ",
            ]),
            middle in ".{0,8}",
            pieces in prop::collection::vec("[=,: 0-9a-fxA-Z\u{e9}\u{1f600}()]{0,24}", 0..6)
        ) {
            let _ = parse_line(&format!("{head}{middle}{}", pieces.join(head)));
        }
    }
}
