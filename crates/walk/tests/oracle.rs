//! Tables built by the `aarch64-paging` crate: this walker finds in them what was mapped, address by address.

mod common;

use aarch64_paging::Mapping;
use aarch64_paging::descriptor::{
    El1Attributes as S1, PagingAttributes, PhysicalAddress, Stage2Attributes as S2,
};
use aarch64_paging::paging::{
    Constraints, El1And0, MemoryRegion, Stage2 as S2Regime, TranslationRegime, VaRange,
};
use aarch64_paging::target::TargetAllocator;
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{MemoryType, Pa, Shareability};
use portcullis_bus::{Memory, SystemMemory};
use portcullis_walk::{FaultKind, Nested, NoRecord, Rule, Split, Trace};

/// Where the other crate believes its tables to be.
const TABLES: u64 = 0x1_0000_0000;

/// (root level, bits of input) of 4K tables.
const ROOTS: [(usize, u8); 3] = [(0, 48), (1, 39), (2, 30)];

/// One mapping as it was asked for.
#[derive(Clone, Copy, Debug)]
struct Map<F> {
    from: u64,
    to: u64,
    len: u64,
    flags: F,
}

/// Random ranges; later ones win. Pages, blocks of 2 MiB and blocks of 1 GiB all occur.
fn maps<F: Copy>(r: &mut Random, bits: u8, flags: &[F]) -> Vec<Map<F>> {
    let top = 1u64 << bits;
    (0..24)
        .map(|_| {
            let align = r.pick(&[12, 12, 16, 21, 25, if bits > 30 { 30 } else { 21 }]);
            let len =
                (1 + r.below(3)) << r.pick(&[12, 14, 16, 21, 23]) | if align == 30 { 1 << 30 } else { 0 };
            let window = r.pick(&[1u64 << 24, 1 << 27, top]).min(top);
            let from = (r.below(window) & !((1 << align) - 1)).min(top - len.next_power_of_two());
            let to = (r.below(1 << 40) & !((1 << align) - 1)) + (from & 0xfff);
            Map { from, to, len, flags: r.pick(flags) }
        })
        .collect()
}

/// Addresses worth asking for: inside, at the ends and around every range, and anywhere.
fn probes<F>(r: &mut Random, bits: u8, maps: &[Map<F>]) -> Vec<u64> {
    let mut out = Vec::new();
    for m in maps {
        out.extend([m.from, m.from.wrapping_sub(1), m.from + m.len - 1, m.from + m.len]);
        out.extend((0..24).map(|_| m.from + r.below(m.len)));
    }
    out.extend((0..200).map(|_| r.below(1 << bits)));
    out.retain(|&va| va >> bits == 0);
    out
}

fn expected<F: Copy>(maps: &[Map<F>], va: u64) -> Option<(u64, F)> {
    let m = maps.iter().rev().find(|m| (m.from..m.from + m.len).contains(&va))?;
    Some((m.to + (va - m.from), m.flags))
}

/// Puts the tables into memory.
fn load<R: TranslationRegime>(mapping: &Mapping<TargetAllocator<R::Attributes>, R>) -> (SystemMemory, u64)
where
    R::Attributes: PagingAttributes,
{
    let image = mapping.translation().as_bytes();
    let memory = SystemMemory::new(&[(TABLES, image.len() as u64)]).unwrap();
    memory.write(Pa(TABLES), A, &image).unwrap();
    (memory, mapping.root_address().0 as u64)
}

/// Counts leaves by size, so that the test knows that it saw them all.
fn note(sizes: &mut std::collections::BTreeMap<u8, usize>, trace: &Trace) {
    if let Some(Rule::Leaf { size_log2, .. }) = trace.steps.last().map(|s| s.rule) {
        *sizes.entry(size_log2).or_default() += 1;
    }
}

#[test]
fn stage_1_tables_of_aarch64_paging() {
    let valid = S1::VALID | S1::ACCESSED;
    let flags = [
        valid | S1::USER | S1::ATTRIBUTE_INDEX_1 | S1::INNER_SHAREABLE | S1::NON_GLOBAL,
        valid | S1::USER | S1::READ_ONLY | S1::ATTRIBUTE_INDEX_1 | S1::UXN | S1::NON_GLOBAL,
        valid | S1::ATTRIBUTE_INDEX_0 | S1::OUTER_SHAREABLE | S1::PXN,
        valid | S1::READ_ONLY | S1::ATTRIBUTE_INDEX_2 | S1::UXN | S1::PXN,
        S1::VALID | S1::USER | S1::ATTRIBUTE_INDEX_1,
        S1::empty(),
    ];
    let mut r = Random(1);
    let (mut sizes, mut asked) = (Default::default(), 0);
    for round in 0..12 {
        let (level, bits) = ROOTS[round % 3];
        let upper = round % 2 == 1;
        let range = if upper { VaRange::Upper } else { VaRange::Lower };
        let mut mapping =
            Mapping::with_asid_and_va_range(TargetAllocator::new(TABLES), 0, level, El1And0, range);
        let maps = maps(&mut r, bits, &flags);
        let high = if upper { u64::MAX << bits } else { 0 };
        for m in &maps {
            let region =
                MemoryRegion::new((high | m.from) as usize, (high | m.from).wrapping_add(m.len) as usize);
            let constraints =
                [Constraints::empty(), Constraints::NO_BLOCK_MAPPINGS, Constraints::NO_CONTIGUOUS_HINT];
            mapping
                .map_range(&region, PhysicalAddress(m.to as usize), m.flags, r.pick(&constraints))
                .unwrap();
        }
        let (memory, root) = load(&mapping);
        let table = region(root, Granule::K4, level as i8, bits);
        let mut s1 = if upper { stage1(None, Some(table)) } else { stage1(Some(table), None) };
        s1.split = Split::Aarch64 { va_bits: 64, signed: true, region_bits: [bits, bits] };
        let n = only1(s1);
        for va in probes(&mut r, bits, &maps) {
            asked += 1;
            let want = expected(&maps, va).filter(|(_, f)| f.contains(S1::VALID));
            for k in KINDS {
                let mut trace = Trace::default();
                let got = n.translate(&memory, high | va, kind(k), Updates::Apply, &mut trace);
                let Some((pa, f)) = want else {
                    assert_eq!(got.unwrap_err().kind, FaultKind::Translation, "{va:#x}");
                    continue;
                };
                if !f.contains(S1::ACCESSED) {
                    assert_eq!(got.unwrap_err().kind, FaultKind::AccessFlag, "{va:#x}");
                    continue;
                }
                let (write, fetch, privileged) = k;
                let user_writable = f.contains(S1::USER) && !f.contains(S1::READ_ONLY);
                let allowed = match (write, fetch, privileged) {
                    (true, _, _) => !f.contains(S1::READ_ONLY) && (privileged || f.contains(S1::USER)),
                    (_, false, _) => privileged || f.contains(S1::USER),
                    (_, _, true) => !f.contains(S1::PXN) && !user_writable,
                    (_, _, false) => !f.contains(S1::UXN),
                };
                match got {
                    Err(e) => {
                        assert!(!allowed && e.kind == FaultKind::Permission, "{va:#x} {k:?} {f:?} {e:?}")
                    }
                    Ok(w) => {
                        assert!(allowed, "{va:#x} {k:?} {f:?}");
                        assert_eq!(w.pa, pa, "{va:#x}");
                        assert_eq!(w.global, !f.contains(S1::NON_GLOBAL));
                        let memory_type = match f & S1::ATTRIBUTE_INDEX_MASK {
                            S1::ATTRIBUTE_INDEX_1 => MemoryType::NORMAL_WB,
                            S1::ATTRIBUTE_INDEX_2 => MemoryType::DEVICE_NGNRE,
                            _ => MemoryType::NORMAL_NC,
                        };
                        assert_eq!(w.attrs.memory(), memory_type);
                        note(&mut sizes, &trace);
                    }
                }
            }
        }
    }
    assert!(asked > 5000, "{asked}");
    for size in [12, 21, 30] {
        assert!(sizes.get(&size).is_some_and(|&n| n > 20), "leaves of 2^{size} bytes: {sizes:?}");
    }
}

#[test]
fn stage_2_tables_of_aarch64_paging() {
    let valid = S2::VALID | S2::ACCESS_FLAG;
    let wb = S2::MEMATTR_NORMAL_INNER_WB | S2::MEMATTR_NORMAL_OUTER_WB | S2::SH_INNER;
    let nc = S2::MEMATTR_NORMAL_INNER_NC | S2::MEMATTR_NORMAL_OUTER_NC;
    let flags = [
        valid | wb | S2::S2AP_ACCESS_RW,
        valid | wb | S2::S2AP_ACCESS_RO | S2::XN,
        valid | nc | S2::S2AP_ACCESS_WO,
        valid | S2::MEMATTR_DEVICE_nGnRE | S2::S2AP_ACCESS_RW | S2::XN,
        valid | wb,
        S2::empty(),
    ];
    let mut r = Random(2);
    let mut asked = 0;
    for round in 0..9 {
        let (level, bits) = ROOTS[round % 3];
        let mut mapping = Mapping::new(TargetAllocator::new(TABLES), level, S2Regime);
        let maps = maps(&mut r, bits, &flags);
        for m in &maps {
            let region = MemoryRegion::new(m.from as usize, (m.from + m.len) as usize);
            let to = PhysicalAddress(m.to as usize);
            mapping.map_range(&region, to, m.flags, Constraints::empty()).unwrap();
        }
        let (memory, root) = load(&mapping);
        let n: Nested = only2(stage2(region(root, Granule::K4, level as i8, bits)));
        for ipa in probes(&mut r, bits, &maps) {
            asked += 1;
            let want = expected(&maps, ipa).filter(|(_, f)| f.contains(S2::VALID));
            for k in KINDS {
                let got = n.translate(&memory, ipa, kind(k), Updates::Apply, &mut NoRecord);
                let Some((pa, f)) = want else {
                    let e = got.unwrap_err();
                    assert_eq!((e.kind, e.stage, e.ipa), (FaultKind::Translation, 2, ipa));
                    continue;
                };
                let (write, fetch, _) = k;
                let allowed = match (write, fetch) {
                    (true, _) => f.contains(S2::S2AP_ACCESS_WO),
                    (_, true) => !f.contains(S2::XN),
                    _ => f.contains(S2::S2AP_ACCESS_RO),
                };
                match got {
                    Err(e) => assert!(!allowed && e.kind == FaultKind::Permission, "{ipa:#x} {k:?} {f:?}"),
                    Ok(w) => {
                        assert!(allowed, "{ipa:#x} {k:?} {f:?}");
                        assert_eq!(w.pa, pa, "{ipa:#x}");
                        let is_wb = f.contains(wb);
                        assert_eq!(w.attrs.memory() == MemoryType::NORMAL_WB, is_wb);
                        assert_eq!(w.attrs.shareability() == Shareability::Inner, is_wb);
                    }
                }
            }
        }
    }
    assert!(asked > 3000, "{asked}");
}
