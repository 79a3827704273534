//! Everything that the tables of a stream map, found by asking for one address after the other and skipping what a
//! missing or large descriptor covers.

use std::fmt;

use portcullis_arch::{Access, StreamId};
use portcullis_bus::{Initiator, Memory};
use portcullis_smmuv2::{Explanation, Outcome, SmmuV2};
use portcullis_walk::{Fault, FaultKind, Rule, TableFormat};
use serde::{Serialize, Serializer};

use crate::bank;
use crate::outcome;
use crate::probe::Probe;
use crate::words;

/// A run of addresses that the tables translate to one run of output addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// First input address.
    #[serde(serialize_with = "hex")]
    pub va: u64,
    /// Bytes.
    pub len: u64,
    /// Output address of the first byte.
    #[serde(serialize_with = "hex")]
    pub pa: u64,
}

fn hex<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(&format_args!("{value:#x}"))
}

impl Mapping {
    /// One past the last input address, wrapping at 2^64.
    pub fn end(&self) -> u64 {
        self.va.wrapping_add(self.len)
    }
    /// True if `va` is in it.
    pub fn contains(&self, va: u64) -> bool {
        va.wrapping_sub(self.va) < self.len
    }
    /// The input address that gives `pa`, if one does.
    pub fn address_of(&self, pa: u64) -> Option<u64> {
        let offset = pa.checked_sub(self.pa)?;
        (offset < self.len).then(|| self.va.wrapping_add(offset))
    }
}

/// `0x70000000..0x70001000 -> 0x60000000 (4 KiB)`.
impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} -> {:#x} ({})", self.va, self.end(), self.pa, words::bytes(self.len))
    }
}

/// What [`mappings`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mappings {
    /// In the order of input addresses.
    pub ranges: Vec<Mapping>,
    /// False if the search ended because it was long enough.
    pub complete: bool,
}

/// Lists what the tables behind a stream map for reads in the half of the address space around `near`, by at most
/// `budget` walks. Leaves without permission or access flag count as mapped. A stream that is not translated has none.
pub fn mappings<M: Memory>(smmu: &SmmuV2<M>, stream: StreamId, near: u64, budget: usize) -> Mappings {
    let Some(probe) = Probe::of(smmu) else { return Mappings::default() };
    probe.clear_faults();
    search(&probe, Initiator::new(stream), near, budget)
}

pub(crate) fn search<M: Memory>(probe: &Probe<'_, M>, from: Initiator, near: u64, budget: usize) -> Mappings {
    let first = probe.explain(from, near, Access::Read);
    let Some(bank) = first.bank else { return Mappings { complete: true, ..Mappings::default() } };
    let half = bank::half(&bank, probe.config(), near);
    let upstream = probe.config().upstream_bits;
    let region = region(&bank, half, upstream);
    scan(region, budget, |at| {
        let e = probe.explain(from, at, Access::Read);
        match (leaf(&e), skip(&e, probe)) {
            (Some((pa, size_log2)), _) => Looked::Leaf { pa, size_log2 },
            (None, Some(log2)) => Looked::Hole(log2),
            (None, None) => Looked::Nothing,
        }
    })
}

/// What is at an address.
pub(crate) enum Looked {
    /// A leaf: output address of the byte asked for and log2 of the page.
    Leaf {
        /// Output address.
        pa: u64,
        /// log2 of the page.
        size_log2: u8,
    },
    /// Nothing, nor in the rest of an aligned block of `1 << log2` bytes.
    Hole(u8),
    /// Nothing anywhere.
    Nothing,
}

/// Looks at one address after the other of `[start, end)`.
pub(crate) fn scan(
    (start, end): (u128, u128),
    budget: usize,
    mut look: impl FnMut(u64) -> Looked,
) -> Mappings {
    let mut found = Mappings::default();
    let mut va = start;
    for _ in 0..budget {
        if va >= end {
            found.complete = true;
            break;
        }
        let Ok(at) = u64::try_from(va) else { break };
        let left = |log2: u8| (1u128 << log2.min(64)) - (va & ((1 << log2.min(64)) - 1));
        va += match look(at) {
            Looked::Leaf { pa, size_log2 } => {
                let len = left(size_log2);
                push(&mut found.ranges, Mapping { va: at, len: u64::try_from(len).unwrap_or(u64::MAX), pa });
                len
            }
            Looked::Hole(log2) => left(log2),
            Looked::Nothing => {
                found.complete = true;
                break;
            }
        };
    }
    found
}

/// The input addresses that a half covers.
fn region(bank: &portcullis_smmuv2::BankView, half: usize, upstream: u8) -> (u128, u128) {
    use portcullis_arch::smmuv2::{TcrS1, TcrS2, TcrS2Aarch32};
    let bits = match (bank::format(bank), bank::stage(bank)) {
        (TableFormat::Aarch64, 1) => {
            let t = TcrS1::from_bits(bank.tcr);
            64 - if half == 0 { t.t0sz() } else { t.t1sz() }.clamp(16, 39)
        }
        (TableFormat::Aarch64, _) => 64 - TcrS2::from_bits(bank.tcr).t0sz().clamp(16, 39),
        (_, 2) => (32 - ((TcrS2Aarch32::from_bits(bank.tcr).t0sz() << 4) as i8 >> 4)) as u8,
        _ => 32,
    };
    let top = 1u128 << upstream;
    if half == 0 { (0, 1 << bits) } else { (top - (1 << bits.min(upstream)), top) }
}

fn push(ranges: &mut Vec<Mapping>, next: Mapping) {
    if let Some(last) = ranges.last_mut()
        && last.end() == next.va
        && last.pa.wrapping_add(last.len) == next.pa
    {
        last.len = last.len.saturating_add(next.len);
        return;
    }
    ranges.push(next);
}

/// Where the tables lead, whether or not they allow it: output address of the byte and log2 of the page.
pub(crate) fn leaf(e: &Explanation) -> Option<(u64, u8)> {
    match e.outcome {
        Outcome::Translated { walked, .. } if !e.walk.is_empty() => Some((walked.pa, walked.size_log2)),
        Outcome::Fault { fault, .. }
            if matches!(fault.kind, FaultKind::Permission | FaultKind::AccessFlag)
                && !fault.on_stage1_walk =>
        {
            let input = if fault.stage == 2 { fault.ipa } else { e.va.get() };
            match e.walk.last()?.rule {
                Rule::Leaf { output, size_log2 } => {
                    let size_log2 = size_log2.min(stage1_log2(e, &fault));
                    Some((output | input & ((1 << size_log2) - 1), size_log2))
                }
                _ => None,
            }
        }
        _ => None,
    }
}

/// log2 of the stage 1 leaf under a fault of stage 2.
fn stage1_log2(e: &Explanation, fault: &Fault) -> u8 {
    let leaf = e.walk.iter().rev().find(|s| s.stage == 1).map(|s| s.rule);
    match leaf {
        Some(Rule::Leaf { size_log2, .. }) if fault.stage == 2 => size_log2,
        _ => u8::MAX,
    }
}

/// log2 of the block around the address that faults for the same reason; `None` if the whole space does.
fn skip<M: Memory>(e: &Explanation, probe: &Probe<'_, M>) -> Option<u8> {
    let Outcome::Fault { fault, .. } = e.outcome else { return None };
    let bank = outcome::bank_of_stage(e, fault.stage)?;
    let granule = bank::granule(bank, probe.config(), bank::half(bank, probe.config(), e.va.get()));
    if outcome::steps_of_stage(e, &fault).is_empty() && e.walk.is_empty() {
        return None;
    }
    if fault.stage == 2 && e.stage2_bank.is_some() {
        // Two sizes overlap; a page is always right.
        return Some(12);
    }
    Some(bank::entry_log2(bank::format(bank), granule, fault.level))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Board, STREAM};

    #[test]
    fn what_is_mapped_is_found_and_adjacent_pages_are_one() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        board.map(0x7000_1000, 0x6000_1000);
        board.map(0x7000_2000, 0x6000_8000);
        board.map(0x80_0000_0000, 0x6000_9000);
        let all = mappings(&board.smmu, STREAM, 0, 10_000);
        assert!(all.complete);
        let text: Vec<String> = all.ranges.iter().map(Mapping::to_string).collect();
        assert_eq!(
            text,
            [
                "0x70000000..0x70002000 -> 0x60000000 (8 KiB)",
                "0x70002000..0x70003000 -> 0x60008000 (4 KiB)",
                "0x8000000000..0x8000001000 -> 0x60009000 (4 KiB)",
            ]
        );
        assert_eq!(all.ranges[0].address_of(0x6000_1234), Some(0x7000_1234));
        let json = serde_json::to_value(all.ranges[1]).unwrap();
        assert_eq!(json, serde_json::json!({ "va": "0x70002000", "len": 4096, "pa": "0x60008000" }));
    }

    #[test]
    fn the_budget_ends_the_search() {
        let board = Board::new();
        board.map(0x7000_0000, 0x6000_0000);
        let all = mappings(&board.smmu, STREAM, 0, 3);
        assert!(!all.complete);
    }

    #[test]
    fn a_stream_without_translation_has_no_mappings() {
        let board = Board::new();
        assert_eq!(mappings(&board.smmu, StreamId(0x999), 0, 10).ranges, []);
    }
}
