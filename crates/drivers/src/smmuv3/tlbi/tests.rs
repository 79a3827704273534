//! Range invalidations, decoded again by the fact sheet's rules and by nothing of the code that made them.

extern crate std;

use std::vec::Vec;

use portcullis_arch::smmuv3::Command;
use proptest::prelude::*;

use super::*;

/// What a decoded command reaches: first byte, last byte, level (0 any), walk caches too.
type Reach = (u64, u64, u8, bool);

/// Reads an invalidation by address as an SMMU does (IHI 0070 section 4.4.1): bit positions and rules written down here
/// once more. `page` is the granule of the tables; a single invalidation reaches the entry that holds its address.
fn decode(command: Command, ranges: bool, page: u8) -> Result<Reach, &'static str> {
    let [low, high] = command.0;
    let field = |word: u64, top: u32, bottom: u32| word >> bottom & ((1 << (top - bottom + 1)) - 1);
    let (num, scale) = (field(low, 16, 12), field(low, 25, 20));
    let (ttl, tg) = (field(high, 9, 8), field(high, 11, 10));
    let (leaf, address) = (high & 1 != 0, high & !0xfff);
    if low & 0xe00 != 0 || field(low, 19, 17) != 0 || field(low, 31, 26) != 0 || field(high, 7, 1) != 0 {
        return Err("a reserved bit is set");
    }
    if tg == 0 {
        if num != 0 || scale != 0 || ttl != 0 {
            return Err("no granule, but a range");
        }
        let size = 1u64 << page;
        return Ok((address & !(size - 1), address | (size - 1), 0, !leaf));
    }
    if !ranges {
        return Err("a range without IDR3.RIL");
    }
    let granule = [0, 12, 14, 16][tg as usize];
    if granule != u32::from(page) {
        return Err("another granule than the tables'");
    }
    if scale > 31 {
        return Err("SCALE of more than five bits without IDR5.DS");
    }
    if num == 0 && scale == 0 && ttl == 0 {
        return Err("NUM = SCALE = TTL = 0: CERROR_ILL");
    }
    if granule == 14 && ttl == 1 {
        return Err("TTL = 1 with 16K acts as 0");
    }
    if granule == 16 && ttl == 1 {
        return Err("no leaves at level 1 with 64K");
    }
    let unit = match ttl {
        0 | 3 => granule,
        level => granule + (3 - level as u32) * (granule - 3),
    };
    if address & ((1 << unit) - 1) != 0 {
        return Err("the range does not start at a leaf of its level");
    }
    let bytes = u128::from(num + 1) << (scale as u32 + granule);
    let last = (u128::from(address) + bytes - 1).min(u64::MAX.into());
    Ok((address, last as u64, ttl as u8, !leaf))
}

const SCOPE: Scope = Scope::Stage1 { asid: Asid(0x1234), vmid: Vmid(0x56) };

fn is_all(command: &Command) -> bool {
    *command == all(SCOPE)
}

/// Checks the commands for a range; gives how many there are.
fn check(ranges: bool, page: u8, start: u64, len: u64, leaf: Option<u8>) -> usize {
    let tlbi = Tlbi::new(SCOPE, ranges, page);
    let commands: Vec<Command> = range(tlbi, start, len, leaf).take(10_000).collect();
    let last = start.saturating_add(len - 1);
    let granules = (last >> page) - (start >> page) + 1;
    if commands.iter().any(is_all) {
        assert_eq!(commands.len(), 1, "all, and more");
        let unit = leaf.filter(|&leaf| level_of(page, leaf).is_some()).unwrap_or(page);
        let leaves = (last >> unit) - (start >> unit) + 1;
        let large = if ranges { granules >= (1 << 36) - 1 } else { leaves >= tlbi.max_single };
        assert!(large, "everything for {granules} granules");
        return 1;
    }
    // The leaves that were there, if their size is known; else any.
    let known = leaf.filter(|&leaf| level_of(page, leaf).is_some());
    let (unit, level) = match known {
        Some(leaf) => (leaf, 3 - (leaf - page) / (page - 3)),
        None => (page, 0),
    };
    // Each in order, without gap.
    let mut next = start >> unit << unit;
    for command in &commands {
        let [low, _] = command.0;
        assert_eq!((low as u8, low >> 32 & 0xffff, low >> 48), (0x12, 0x56, 0x1234));
        let (first, end, ttl, walks) = decode(*command, ranges, page).unwrap_or_else(|why| {
            panic!("{why}: {command:x?} of {start:#x} + {len:#x}, {leaf:?}, granule {page}")
        });
        assert_eq!(first, next, "a gap or an overlap: {commands:x?}");
        assert!(ttl == 0 || ttl == level, "the leaves are at level {level}, not {ttl}");
        assert!(walks || leaf.is_some(), "tables went, so walk caches have to");
        // A single invalidation reaches all of the leaf that holds it.
        next = if ranges { end } else { end.max(first + ((1 << unit) - 1)) }.wrapping_add(1);
    }
    let covered = next.wrapping_sub(1);
    assert!(covered >= last, "{covered:#x} is short of {last:#x}");
    let wanted = last | ((1 << unit) - 1);
    assert!(covered - wanted <= if ranges { 1 << page } else { 0 }, "{covered:#x} is far beyond {wanted:#x}");
    if ranges {
        let bits = 64 - granules.leading_zeros() as usize;
        assert!(
            commands.len() <= bits.div_ceil(5) + 1,
            "{} commands for {granules} granules",
            commands.len()
        );
    } else {
        assert!((commands.len() as u64) < tlbi.max_single);
    }
    commands.len()
}

fn pages() -> impl Strategy<Value = u8> {
    prop_oneof![Just(12u8), Just(14), Just(16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn every_range_is_covered_by_few_legal_commands(
        page in pages(),
        ranges: bool,
        start in prop_oneof![any::<u64>(), 0..1u64 << 48, (1u64 << 48) - (1 << 30)..1 << 48, u64::MAX - (1 << 22)..],
        len in (0u32..50).prop_flat_map(|bits| 1u64 << bits..=2u64 << bits),
        kind in 0u8..6,
    ) {
        let stride = page - 3;
        let leaf = [None, Some(page), Some(page + stride), Some(page + 2 * stride), Some(page + 4), Some(page)];
        check(ranges, page, start, len, leaf[usize::from(kind)]);
    }

    #[test]
    fn aligned_ranges_of_leaves_name_their_level(page in pages(), count in 1u64..5000, at in 0u64..1 << 16, up in 0u8..2) {
        let leaf = page + up * (page - 3);
        check(true, page, at << leaf, count << leaf, Some(leaf));
        let first = range(Tlbi::new(SCOPE, true, page), at << leaf, count << leaf, Some(leaf)).next().unwrap();
        prop_assert_eq!(first.0[1] >> 8 & 3, u64::from(3 - up));
    }
}

#[test]
fn every_small_number_of_pages_of_every_kind() {
    for page in [12, 14, 16] {
        for ranges in [false, true] {
            for count in 1..2100u64 {
                for leaf in [None, Some(page), Some(page + 4)] {
                    check(ranges, page, 0x1230_0000, count << page, leaf);
                }
            }
        }
    }
}

#[test]
fn what_linux_sends() {
    let commands = |tlbi, start, len, leaf| range(tlbi, start, len, leaf).map(|c| c.0).collect::<Vec<_>>();
    let stage1 = Tlbi::new(Scope::Stage1 { asid: Asid(1), vmid: Vmid(0) }, true, 12);
    // One page, known to be one.
    assert_eq!(
        commands(stage1, 0xffff_f000, 0x1000, Some(12)),
        [[1 << 48 | 0x12, 0xffff_f000 | 1 << 10 | 3 << 8 | 1]]
    );
    // One page of which tables went: two.
    assert_eq!(commands(stage1, 0x1000, 0x1000, None), [[1 << 48 | 1 << 20 | 0x12, 0x1000 | 1 << 10]]);
    // 2 MiB as one block.
    assert_eq!(
        commands(stage1, 0x20_0000, 0x20_0000, Some(21)),
        [[1 << 48 | 9 << 20 | 0x12, 0x20_0000 | 1 << 10 | 2 << 8 | 1]]
    );
    let stage2 = Tlbi::new(Scope::Stage2 { vmid: Vmid(7), nested: true }, false, 12);
    assert_eq!(
        commands(stage2, 0x8000_0000, 0x2000, Some(12)),
        [[7 << 32 | 0x2a, 0x8000_0001], [7 << 32 | 0x2a, 0x8000_1001], [7 << 32 | 0x10, 0]]
    );
    assert_eq!(commands(stage2, 0, 0x20_0000, Some(12)), [[7 << 32 | 0x28, 0]]);
    assert_eq!(commands(stage2, 0, 0, Some(12)), Vec::<[u64; 2]>::new());
    let hyp = Tlbi::new(Scope::Hyp { asid: Asid(2) }, true, 16);
    assert_eq!(
        commands(hyp, 0x10000, 0x30000, Some(16)),
        [[2 << 48 | 2 << 12 | 0x22, 0x10000 | 3 << 10 | 3 << 8 | 1]]
    );
}

#[test]
fn everything_by_scope() {
    let cases = [
        (all(SCOPE), [0x1234_0056_0000_0011, 0]),
        (all(Scope::Stage1All { vmid: Vmid(9) }), [0x9_0000_0010, 0]),
        (all(Scope::Hyp { asid: Asid(3) }), [0x3_0000_0000_0021, 0]),
        (all_el2(), [0x20, 0]),
        (all(Scope::Stage2 { vmid: Vmid(9), nested: true }), [0x9_0000_0028, 0]),
        (all_el1(), [0x30, 0]),
    ];
    for (command, words) in cases {
        assert_eq!(command.0, words);
    }
}

#[test]
fn addresses_of_stage_2_have_no_bits_above_51() {
    let tlbi = Tlbi::new(Scope::Stage2 { vmid: Vmid(1), nested: false }, true, 12);
    for command in range(tlbi, 0xfff0_0000_1000_0000, 0x4000, Some(12)) {
        assert_eq!(command.0[1] >> 52, 0);
    }
}
