//! StreamIDs, linear and two-level tables.

use super::*;
use crate::lookup::stream::Geometry;
use portcullis_arch::smmuv3::L1Std;
use portcullis_arch::{MemoryType, Shareability};

fn cfg(fmt: u8, split: u8, log2size: u8) -> u32 {
    StrtabBaseCfg::new().with_fmt(fmt).with_split(split).with_log2size(log2size).into_bits()
}

/// A scene whose stream table is two-level; L1 at TABLE.
fn two_level(split: u8, log2size: u8) -> Scene {
    let mut s = Scene::new(Ste::default(), Cd::default());
    s.regs.strtab_base_cfg = cfg(1, split, log2size);
    s
}

fn l1std(span: u8, ptr: u64) -> u64 {
    L1Std::new().with_span(span).with_l2ptr_55_6(ptr >> 6).into_bits()
}

const L2: u64 = 0x80_0000;

#[test]
fn a_linear_table_has_its_entries_in_a_row_and_each_word_is_read_once() {
    let s = Scene::new(Ste::default(), Cd::default());
    s.memory.put(TABLE + 64 * 5, &ste(SteConfig::Bypass).0);
    let (d, trail) = s.ask(who(5, None), 0, Access::Read);
    assert!(matches!(d, Decision::Bypass { .. }));
    assert_eq!(trail.ste.map(|t| t.0), Some(TABLE + 320));
    let loads: Vec<u64> = s.memory.loads.lock().unwrap().iter().map(|l| l.0).collect();
    assert_eq!(loads, (0..8).map(|i| TABLE + 320 + 8 * i).collect::<Vec<_>>());
    let attrs = s.memory.loads.lock().unwrap()[0].1;
    assert_eq!((attrs.memory(), attrs.shareability()), (MemoryType::NORMAL_WB, Shareability::Inner));
    assert!(attrs.non_secure());
}

#[test]
fn a_stream_beyond_the_table_or_beyond_the_implementation_is_bad() {
    let mut s = Scene::new(ste(SteConfig::Bypass), Cd::default());
    s.memory.put(TABLE + 64 * 15, &ste(SteConfig::Bypass).0);
    assert_eq!(event(&s.read(15, None)), None);
    assert_eq!(event(&s.read(16, None)), Some(EventCode::BadStreamId));
    assert_eq!(event(&s.read(u32::MAX, None)), Some(EventCode::BadStreamId));
    // LOG2SIZE is capped to SIDSIZE, up to the widest of both.
    s.caps.sid_bits = 3;
    assert_eq!(event(&s.read(7, None)), Some(EventCode::BadSte));
    assert_eq!(event(&s.read(8, None)), Some(EventCode::BadStreamId));
    s.caps.sid_bits = 32;
    s.regs.strtab_base_cfg = cfg(0, 0, 63);
    s.regs.strtab_base = 0;
    assert_eq!(event(&s.read(u32::MAX, None)), Some(EventCode::BadSte));
    s.caps.sid_bits = 0;
    s.regs.strtab_base_cfg = cfg(0, 0, 0);
    assert_eq!(event(&s.read(1, None)), Some(EventCode::BadStreamId));
}

#[test]
fn the_base_is_aligned_to_the_table_as_written() {
    let base = (1 << 62) | 0x00ab_cdef_1234_5fc0;
    let all = 0x00ab_cdef_1234_5fc0u64;
    for log2 in 0..=63u8 {
        let align = |n: u32| if n >= 64 { 0 } else { all >> n << n };
        let g = Geometry::new(16, true, base, cfg(0, 8, log2));
        assert_eq!((g.base, g.log2size, g.split), (align(u32::from(log2) + 6), log2.min(16), None));
        for split in 0..32u8 {
            let acts = if [8, 10].contains(&split) { split } else { 6 };
            let g = Geometry::new(16, true, base, cfg(1, split, log2));
            let l1 = 3 + u32::from(log2.saturating_sub(acts));
            assert_eq!((g.base, g.split), (align(l1.max(6)), Some(acts)), "SPLIT {split} LOG2SIZE {log2}");
        }
    }
    // FMT is RES0 where two-level tables do not exist, and 2 and 3 act as linear.
    assert_eq!(Geometry::new(16, false, base, cfg(1, 8, 4)).split, None);
    for fmt in [2, 3] {
        assert_eq!(Geometry::new(16, true, base, cfg(fmt, 8, 4)).split, None);
    }
}

#[test]
fn two_level_tables_of_every_split_and_span() {
    for split in [6u8, 8, 10] {
        let s = two_level(split, split + 3);
        for span in 0..32u8 {
            let legal = (1..=11).contains(&span) && span <= split + 1;
            // An address that is not aligned to the array loses its low bits.
            s.memory.put(TABLE + 8, &[l1std(span, L2 + 64)]);
            let covered = if legal { 1u32 << (span - 1) } else { 0 };
            let aligned = if span == 1 { L2 + 64 } else { L2 };
            let first = 1 << split;
            for index in [0, covered.saturating_sub(1), covered, first - 1] {
                if index >= first {
                    continue;
                }
                let at = aligned + u64::from(index) * 64;
                s.memory.put(at, &ste(SteConfig::Bypass).0);
                let (d, trail) = s.ask(who(first + index, None), 0, Access::Read);
                if index < covered {
                    assert!(matches!(d, Decision::Bypass { .. }), "split {split} span {span} index {index}");
                    assert_eq!(trail.ste.map(|t| t.0), Some(at));
                } else {
                    let bad = Some(EventCode::BadStreamId);
                    assert_eq!(event(&d), bad, "split {split} span {span} index {index}");
                }
                assert_eq!(trail.l1std.map(|t| t.0), Some(TABLE + 8));
                s.memory.put(at, &[0; 8]);
            }
        }
    }
}

#[test]
fn a_level_1_descriptor_that_becomes_valid_counts_at_once() {
    let s = two_level(8, 10);
    assert_eq!(event(&s.read(0x100, None)), Some(EventCode::BadStreamId));
    s.memory.put(L2, &ste(SteConfig::Bypass).0);
    s.memory.put(TABLE + 8, &[l1std(9, L2)]);
    assert!(matches!(s.read(0x100, None), Decision::Bypass { .. }));
}

#[test]
fn aborted_fetches_name_their_address() {
    let s = two_level(8, 10);
    s.memory.refuse(TABLE);
    let fetch = |d: Decision| match d {
        Decision::Fault(f) => (f.code, f.fetch),
        other => panic!("{other:?}"),
    };
    assert_eq!(fetch(s.read(3, None)), (EventCode::SteFetch, TABLE));
    s.memory.put(TABLE + 8, &[l1std(9, L2)]);
    s.memory.refuse(L2 + 64 + 56);
    assert_eq!(fetch(s.read(0x101, None)), (EventCode::SteFetch, L2 + 64));
    // Nothing answers above OAS.
    s.memory.put(TABLE + 16, &[l1std(9, 1 << 50)]);
    assert_eq!(fetch(s.read(0x200, None)), (EventCode::SteFetch, 1 << 50));
}
