//! What a port adds for SMMUv3: streams and substreams forgotten one by one, ranges, strict bypass, addresses with a top
//! byte that is ignored, 52-bit addresses, and dirty state behind a TLB.

mod common;

use std::sync::Arc;

use common::unit::{FROM, SUBSTREAM, Setting, Unit, context, key};
use common::*;
use portcullis_arch::vmsa::Granule;
use portcullis_arch::{Access, Iova, Pa, StreamId, SubstreamId};
use portcullis_bus::{DmaPort, Initiator, Memory, SystemMemory};
use portcullis_walk::{
    AddressFormat, Context, FaultOutcome, FlagUpdate, Invalidation, Scope, Split, Stage1, StageScope, Tbu,
    TlbStage,
};

const TABLE: u64 = 0x1000;
const LEAF: u64 = d::PAGE | d::AF | d::USER | d::NG;
const ABORT: FaultOutcome = FaultOutcome::Terminate { abort: true };
const ALL: Scope =
    Scope { secure: false, regime: None, vmid: None, asid: None, stages: StageScope::Stage1AndCombined };

type Port = Tbu<Unit, SystemMemory>;

fn memory() -> SystemMemory {
    SystemMemory::new(&[(0, 64 << 20)]).unwrap()
}

fn v3(tbi: [bool; 2], asid: u16) -> Context {
    let table = Some(region(TABLE, Granule::K4, 3, 21));
    let s1 =
        Stage1 { split: Split::Smmuv3 { region_bits: [21; 2], tbi, single: false }, ..stage1(table, table) };
    let mut c = context(key(TlbStage::Stage1, asid), only1(s1));
    let both = tbi == [true; 2];
    (c.key.va_bits, c.va_mask) = if both { (56, u64::MAX >> 8) } else { (64, u64::MAX) };
    c
}

fn at(port: &mut Port, va: u64) -> Result<u64, FaultOutcome> {
    port.translate(&FROM, Iova(va), Access::Read).map(|t| t.pa.get())
}

fn stream(n: u32, substream: Option<u32>) -> Initiator {
    Initiator { substream: substream.map(SubstreamId), ..Initiator::new(StreamId(n)) }
}

#[test]
fn forgetting_streams_leaves_the_others_and_the_tlb() {
    let m = memory();
    m.store64(Pa(TABLE), 0x9000 | LEAF).unwrap();
    let all: Vec<Initiator> = [(1, None), (1, Some(0)), (1, Some(5)), (2, None), (2, Some(5)), (3, None)]
        .map(|(s, x)| stream(s, x))
        .into();
    let substream = |s| Invalidation::Substream { stream: 1, substream: s };
    // Which of them are looked up again after what.
    let cases: [(Invalidation, &[usize]); 8] = [
        (Invalidation::Streams { first: 1, last: 1 }, &[0, 1, 2]),
        (Invalidation::Streams { first: 2, last: 3 }, &[3, 4, 5]),
        (Invalidation::Streams { first: 0, last: u32::MAX }, &[0, 1, 2, 3, 4, 5]),
        (Invalidation::Streams { first: 4, last: 9 }, &[]),
        (Invalidation::Streams { first: 3, last: 2 }, &[]),
        (substream(Some(5)), &[0, 2]),
        (substream(Some(0)), &[0, 1]),
        (substream(None), &[0, 1]),
    ];
    for (what, again) in cases {
        let unit = Unit::new(m.clone(), v3([false; 2], 1));
        for name in [2, 3, SUBSTREAM, SUBSTREAM | 5] {
            unit.configure(name, Setting::Translate(Arc::new(v3([false; 2], 1))));
        }
        let mut port = unit.port(64);
        let go = |port: &mut Port, i: usize| assert!(port.translate(&all[i], Iova(0), Access::Read).is_ok());
        (0..6).for_each(|i| go(&mut port, i));
        let before = port.stats();
        unit.log.publish(what);
        for (i, from) in all.iter().enumerate() {
            let resolved = port.stats().resolutions;
            go(&mut port, i);
            assert_eq!(port.stats().resolutions > resolved, again.contains(&i), "{what:?} {from:?}");
        }
        assert_eq!(port.stats().walks, before.walks, "the TLB stays");
    }
}

#[test]
fn a_strict_bypass_asks_again_for_what_it_does_not_let_pass() {
    let m = memory();
    let unit = Unit::new(m.clone(), v3([false; 2], 1));
    unit.configure(1, Setting::Strict(0xffff_ffff));
    let mut port = unit.port(64);
    assert_eq!(at(&mut port, 0x1234), Ok(0x1234));
    let resolved = port.stats().resolutions;
    // Small addresses never ask, large ones always do, and are refused by the SMMU itself.
    for _ in 0..3 {
        assert_eq!(at(&mut port, 0xffff_ffff), Ok(0xffff_ffff));
    }
    assert_eq!(port.stats().resolutions, resolved);
    for i in 1..=3 {
        assert_eq!(at(&mut port, 1 << 32), Err(FaultOutcome::Terminate { abort: false }));
        assert_eq!((port.stats().resolutions, port.stats().refused), (resolved + i, i));
    }
    assert_eq!(at(&mut port, 0x5678), Ok(0x5678));
    assert_eq!(port.stats().resolutions, resolved + 3, "the refusal was not kept");
    // The first address of all may be a large one.
    let mut port = unit.port(64);
    assert_eq!(at(&mut port, 1 << 40), Err(FaultOutcome::Terminate { abort: false }));
    assert_eq!(at(&mut port, 0x5678), Ok(0x5678));
    // A plain bypass truncates.
    unit.configure(1, Setting::Bypass(0xffff_ffff));
    assert_eq!(at(&mut port, 1 << 32 | 0x99), Ok(0x99));
    // A transfer that runs out of the space ends there.
    unit.configure(1, Setting::Strict(0xfff));
    let done = port.read(FROM, Iova(0xff0), &mut [0; 64]);
    assert!(done.is_ok(), "terminated without an abort: the rest reads as zero");
}

#[test]
fn a_tagged_address_is_never_answered_from_what_an_invalidation_would_miss() {
    let high = 0xffff_ffff_ffe0_0000u64;
    for tbi in [[true, true], [true, false], [false, true]] {
        let m = memory();
        let unit = Unit::new(m.clone(), v3(tbi, 1));
        let mut port = unit.port(64);
        let names = |tag: u64, base: u64| tag << 56 | base & (u64::MAX >> 8);
        let mut random = Random(5);
        let mut now = 0x9000u64;
        m.store64(Pa(TABLE), now | LEAF).unwrap();
        for _ in 0..500 {
            let base = random.pick(&[0, high]);
            let ignored = tbi[usize::from(base == high)];
            let own = base >> 56;
            for tag in [own, 0xab, 0x5c, own ^ 0xff] {
                let want = if ignored || tag == own { Ok(now) } else { Err(ABORT) };
                assert_eq!(at(&mut port, names(tag, base)), want, "{tbi:?} {tag:#x}");
            }
            if random.below(3) == 0 {
                // Software names the page with any top byte.
                now = 0x9000 + (random.below(16) << 12);
                m.store64(Pa(TABLE), now | LEAF).unwrap();
                for base in [0, high] {
                    let operand = names(random.pick(&[0, 0xff, 0x7f, 0x12]), base);
                    unit.log.publish(if random.flip() {
                        Invalidation::Address(ALL, operand)
                    } else {
                        let (scope, granule_log2) = (ALL, 12);
                        Invalidation::Range { scope, start: operand, last: operand | 0xfff, granule_log2 }
                    });
                }
            }
        }
        assert!(port.stats().hits > 150, "canonical addresses are kept");
        if tbi == [true; 2] {
            assert!(
                port.stats().walks < port.stats().hits / 2,
                "and tagged ones where both halves ignore it"
            );
        }
    }
}

#[test]
fn a_range_of_the_upper_half_takes_out_what_lies_in_it_and_no_more() {
    let m = memory();
    (0..512).for_each(|p| m.store64(Pa(TABLE + p * 8), p << 12 | LEAF).unwrap());
    let base = 0xffff_ffff_ffe0_0000u64;
    for (first, pages, entries) in
        [(3u64, 4u64, 4096), (0, 512, 4096), (100, 400, 64), (511, 1, 4096), (0, 1, 4096)]
    {
        let unit = Unit::new(m.clone(), v3([false; 2], 1));
        let mut port = unit.port(entries);
        (0..512).for_each(|p| assert_eq!(at(&mut port, base + (p << 12)), Ok(p << 12)));
        (0..4).for_each(|p| assert_eq!(at(&mut port, p << 12), Ok(p << 12)));
        let held = |port: &mut Port, va: u64| port.cached(&FROM, Iova(va)).is_some();
        let before: Vec<bool> = (0..512).map(|p| held(&mut port, base + (p << 12))).collect();
        let start = base + (first << 12);
        let last = start + ((pages << 12) - 1);
        unit.log.publish(Invalidation::Range { scope: ALL, start, last, granule_log2: 12 });
        for p in 0..512u64 {
            let inside = (first..first + pages).contains(&p);
            assert_eq!(held(&mut port, base + (p << 12)), before[p as usize] && !inside, "page {p}");
        }
        assert!(held(&mut port, 0x1000), "the lower half");
    }
}

#[test]
fn the_first_write_of_a_page_that_was_read_marks_it_dirty() {
    const DBM: u64 = 1 << 51;
    let m = memory();
    let clean = 0x9000 | LEAF | d::RO | DBM;
    m.store64(Pa(TABLE), clean & !d::AF).unwrap();
    let word = || m.load64(Pa(TABLE), A).unwrap();
    let mut c = v3([false; 2], 1);
    c.stages.stage1.as_mut().unwrap().flags = FlagUpdate { access: true, dirty: true };
    let unit = Unit::new(m.clone(), c);
    let mut port = unit.port(64);
    let mut buf = [0; 8];
    (0..3).for_each(|_| port.read(FROM, Iova(0x10), &mut buf).unwrap());
    assert_eq!((word(), port.stats().walks, port.stats().hits), (clean, 1, 2));
    port.write(FROM, Iova(0x10), &[7; 8]).unwrap();
    assert_eq!((word(), port.stats().walks), (clean & !d::RO, 2));
    (0..3).for_each(|_| port.write(FROM, Iova(0x10), &[8; 8]).unwrap());
    assert_eq!((port.stats().walks, port.stats().hits), (2, 5));
    // Software cleans it, and has to say so.
    m.store64(Pa(TABLE), clean).unwrap();
    port.write(FROM, Iova(0x10), &[9; 8]).unwrap();
    assert_eq!(word(), clean);
    unit.log.publish(Invalidation::Address(ALL, 0));
    port.write(FROM, Iova(0x10), &[9; 8]).unwrap();
    assert_eq!(word(), clean & !d::RO);
}

#[test]
fn a_copy_whose_source_is_refused_marks_no_target() {
    let m = memory();
    let clean = 0x9000 | LEAF | d::RO | 1 << 51;
    m.store64(Pa(TABLE + 8), clean).unwrap();
    let mut c = v3([false; 2], 1);
    c.stages.stage1.as_mut().unwrap().flags = FlagUpdate { access: true, dirty: true };
    let unit = Unit::new(m.clone(), c);
    let mut port = unit.port(64);
    assert!(port.copy((FROM, Iova(0)), (FROM, Iova(0x1000)), 64).is_err());
    assert_eq!(m.load64(Pa(TABLE + 8), A).unwrap(), clean);
    m.store64(Pa(TABLE), 0xa000 | LEAF).unwrap();
    assert!(port.copy((FROM, Iova(0)), (FROM, Iova(0x1000)), 64).is_ok());
    assert_eq!(m.load64(Pa(TABLE + 8), A).unwrap(), clean & !d::RO);
}

#[test]
fn entries_hold_4_tib_blocks_and_addresses_of_52_bits_in_both_halves() {
    let m = memory();
    // 64 KiB granule, 52 bits: entry 1023 of the level 1 table is a block at 0xa_ec00_0000_0000.
    let mut table = region(0x10_0000, Granule::K64, 1, 52);
    table.address = AddressFormat::Lpa64K;
    m.store64(Pa(0x10_0000 + 1023 * 8), 0xec00_0000_a001 | d::AF | d::USER | d::NG).unwrap();
    let s1 = Stage1 {
        split: Split::Smmuv3 { region_bits: [52; 2], tbi: [false; 2], single: false },
        output_bits: 52,
        ..stage1(Some(table), Some(table))
    };
    let mut c = context(key(TlbStage::Stage1, 1), only1(s1));
    (c.key.va_bits, c.va_mask) = (64, u64::MAX);
    let unit = Unit::new(m.clone(), c);
    let mut port = unit.port(64);
    for (base, walks) in [(0x000f_fc00_0000_0000u64, 1), (0xffff_fc00_0000_0000, 2)] {
        for offset in [0, 0x3ff_ffff_ffff, 0x123_4567_89ab] {
            assert_eq!(at(&mut port, base | offset), Ok(0xa_ec00_0000_0000 | offset));
        }
        assert_eq!(port.stats().walks, walks, "one walk for 4 TiB");
        assert_eq!(port.cached(&FROM, Iova(base)).unwrap().size_log2, 42);
    }
    unit.log.publish(Invalidation::Address(ALL, 0xffff_fd00_0000_0000));
    assert!(port.cached(&FROM, Iova(u64::MAX)).is_none());
    assert!(port.cached(&FROM, Iova(0x000f_ffff_ffff_ffff)).is_some());
}
