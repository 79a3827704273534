//! What an explanation means: the steps that decided, outgoing attributes, why an address is out of range.

use portcullis_arch::Attributes;
use portcullis_arch::attrs::{Allocate, MemoryType, Shareability};
use portcullis_arch::smmuv2::{CbType, Cbar, Sctlr, TcrS1, TcrS1Long, TcrS2, TcrS2Aarch32};
use portcullis_smmuv2::{BankView, Explanation};
use portcullis_walk::stage::combine;
use portcullis_walk::{Fault, FaultKind, Rule, Step, TableFormat, Walked};

use crate::bank;

/// The bank whose tables serve `stage`.
pub(crate) fn bank_of_stage(e: &Explanation, stage: u8) -> Option<&BankView> {
    match (stage, &e.bank, &e.stage2_bank) {
        (2, _, Some(second)) => Some(second),
        (_, first, _) => first.as_ref(),
    }
}

/// The steps of the walk that met `fault`: all of stage 1, or the last walk of stage 2.
pub(crate) fn steps_of_stage<'a>(e: &'a Explanation, fault: &Fault) -> Vec<&'a Step> {
    if fault.stage == 1 {
        return e.walk.iter().filter(|s| s.stage == 1).collect();
    }
    // A stage 1 step stands between any two walks of stage 2.
    let mut last: Vec<&Step> = e.walk.iter().rev().take_while(|s| s.stage == 2).collect();
    last.reverse();
    last
}

/// The physical address of each descriptor of a walk; `None` where stage 2 did not give one.
pub(crate) fn descriptor_places(walk: &[Step]) -> Vec<Option<u64>> {
    let nested = walk.iter().any(|s| s.stage == 2) && walk.iter().any(|s| s.stage == 1);
    let mut leaf = None;
    walk.iter()
        .map(|s| match (s.stage, s.rule) {
            (2, Rule::Leaf { output, size_log2 }) => {
                leaf = Some((output, size_log2));
                Some(s.address)
            }
            (2, _) => Some(s.address),
            _ if !nested => Some(s.address),
            _ => leaf.take().map(|(output, log2): (u64, u8)| output | s.address & ((1 << log2) - 1)),
        })
        .collect()
}

/// The attributes with which a translated transaction leaves the SMMU (IHI 0062D chapter 13).
pub(crate) fn outgoing(e: &Explanation, walked: &Walked, incoming: Attributes) -> Attributes {
    let Some(first) = &e.bank else { return incoming };
    let cbar = Cbar::from_bits(first.cbar);
    let on = Sctlr::from_bits(first.sctlr).m();
    let second = e.stage2_bank.map(|b| Sctlr::from_bits(b.sctlr));
    let after = match (cbar.kind(), second) {
        (CbType::Stage2, _) => {
            return if on { combine(incoming, walked.attrs) } else { incoming };
        }
        (CbType::Nested, Some(s)) if !s.m() => {
            Some(added(s.memattr(), s.shcfg(), Shareability::Non, s.racfg(), s.wacfg()))
        }
        (CbType::Nested, _) => None,
        _ => Some(added(cbar.memattr(), cbar.bpshcfg(), Shareability::Outer, cbar.racfg(), cbar.wacfg())),
    };
    let tables = after.map_or(walked.attrs, |a| combine(walked.attrs, a));
    if on {
        let secure = !tables.non_secure() && !incoming.non_secure();
        tables
            .with_non_secure(!secure)
            .with_privileged(incoming.privileged())
            .with_instruction(incoming.instruction())
    } else if second.is_some_and(|s| s.m()) {
        combine(incoming, tables)
    } else {
        incoming
    }
}

/// What a stage without tables adds: MemAttr, SHCFG (1 outer, 2 inner, 3 non), hints.
fn added(memattr: u8, shcfg: u8, default: Shareability, racfg: u8, wacfg: u8) -> Attributes {
    let sh = match shcfg {
        1 => Shareability::Outer,
        2 => Shareability::Inner,
        3 => Shareability::Non,
        _ => default,
    };
    Attributes::from_bits(0)
        .with_memory(MemoryType::from_code(memattr))
        .with_shareability(sh)
        .with_read_allocate(Allocate::from_code(racfg))
        .with_write_allocate(Allocate::from_code(wacfg))
}

/// FSR's name of a fault.
pub(crate) fn fsr_bit(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::Translation => "TF",
        FaultKind::AddressSize => "ASF",
        FaultKind::AccessFlag => "AFF",
        FaultKind::Permission => "PF",
        FaultKind::External => "EF",
    }
}

/// A fault's name in words.
pub(crate) fn fault_name(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::Translation => "translation fault",
        FaultKind::AddressSize => "address size fault",
        FaultKind::AccessFlag => "access flag fault",
        FaultKind::Permission => "permission fault",
        FaultKind::External => "external abort on a table walk",
    }
}

/// Why a fault happened before any descriptor was read, as far as the bank's registers tell.
pub(crate) fn before_the_walk(e: &Explanation, fault: &Fault) -> String {
    let Some(bank) = bank_of_stage(e, fault.stage) else { return "the bank does not exist".into() };
    let input = if fault.stage == 2 { fault.ipa } else { e.va.get() };
    if fault.kind == FaultKind::AddressSize {
        return if Sctlr::from_bits(bank.sctlr).m() {
            format!("the table base in TTBR ({:#x}) does not fit the output size", bank.ttbr0)
        } else {
            format!("M=0 and {input:#x} does not fit the output size")
        };
    }
    match (bank::format(bank), bank::stage(bank)) {
        (TableFormat::Aarch64, 2) => {
            let t = TcrS2::from_bits(bank.tcr);
            let (bits, sl0) = (64 - i16::from(t.t0sz()), t.sl0());
            if width_fits(input, bits) {
                format!("T0SZ={} with SL0={sl0} is not a legal pair for this granule", t.t0sz())
            } else {
                format!("{input:#x} is outside of the {bits} bits of T0SZ={}", t.t0sz())
            }
        }
        (_, 2) => {
            let t = TcrS2Aarch32::from_bits(bank.tcr);
            format!("{input:#x} is outside of T0SZ={:#x} with SL0={}", t.t0sz(), t.sl0())
        }
        (TableFormat::Aarch64, _) => {
            let t = TcrS1::from_bits(bank.tcr);
            let side = |n: u8, tsz: u8, epd: bool| {
                if epd {
                    format!("TTBR{n} is off (EPD{n}=1)")
                } else if (16..=39).contains(&tsz) {
                    format!("TTBR{n} covers {} bits (T{n}SZ={tsz})", 64 - tsz)
                } else {
                    format!("T{n}SZ={tsz} is illegal (16 to 39)")
                }
            };
            let (low, high) = (side(0, t.t0sz(), t.epd0()), side(1, t.t1sz(), t.epd1()));
            format!("{input:#x} is in no table's range: {low}, {high}")
        }
        (_, _) if input >> 32 != 0 => format!("{input:#x} is above the 32 bits of an AArch32 bank"),
        (_, _) => {
            let t = TcrS1Long::from_bits(bank.tcr);
            format!(
                "{input:#x} is in no table's range: T0SZ={}, T1SZ={}, TCR={:#x}",
                t.t0sz(),
                t.t1sz(),
                bank.tcr
            )
        }
    }
}

fn width_fits(address: u64, bits: i16) -> bool {
    bits >= 64 || (bits > 0 && address >> bits == 0)
}
